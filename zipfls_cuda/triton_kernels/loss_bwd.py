"""The upstream gradient: multiplied in on the device, at once where it is one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_cache import Launch, device_of, plan_cache, signature, store_plan
from .loss_math import from_float

BWD_BLOCK, BWD_PROGRAMS = 4096, 1056  # eight programs per multiprocessor walk through all elements


@triton.jit(do_not_specialize=["numel"])
def loss_bwd_kernel(
    grad,  # (numel,) float16, bfloat16, float32 or float64
    grad_loss,  # scalar, any float type
    grad_scale,  # scalar float32 or float64; SCALED
    out,  # (numel,) type of grad; grad itself if INPLACE
    numel,
    V: tl.constexpr,
    SCALED: tl.constexpr,
    INPLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = grad * grad_loss * grad_scale; in place it ends at once where the product is one.

    A grid of few programs that walk through all blocks: ending at once is then nearly free. 2 itemsize bytes
    an element otherwise.
    """
    D: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    scale = tl.load(grad_loss).to(D)
    if SCALED:
        scale *= tl.load(grad_scale).to(D)
    if not INPLACE or scale != 1:
        pid = tl.program_id(0).to(tl.int64)
        whole = numel.to(tl.int64) // V * V  # a mask in whole vectors keeps accesses 16 bytes wide
        for first in range(pid * BLOCK, whole, tl.num_programs(0).to(tl.int64) * BLOCK):
            i = first + tl.arange(0, BLOCK)
            g = tl.load(grad + i, mask=i < whole, other=0).to(D)
            tl.store(out + i, from_float(g * scale, out.dtype.element_ty), mask=i < whole)
        if pid == 0:
            i = whole + tl.arange(0, V)
            g = tl.load(grad + i, mask=i < numel, other=0).to(D)
            tl.store(out + i, from_float(g * scale, out.dtype.element_ty), mask=i < numel)


@triton.jit
def loss_bwd_rows_kernel(
    grad,  # (N, C) float16, bfloat16, float32 or float64
    grad_loss,  # (N,) any float type, any stride (0 when expanded)
    grad_loss_stride,
    grad_scale,  # scalar float32 or float64; SCALED
    out,  # (N, C) type of grad; grad itself if INPLACE
    N,
    C,
    V: tl.constexpr,  # elements per 16 bytes where V | C, else 1
    SCALED: tl.constexpr,
    INPLACE: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """out = grad * grad_loss[:, None] * grad_scale, R rows a program; groups of rows scaled by one are left
    alone in place.
    """
    D: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    row_ok = row < N
    scale = tl.load(grad_loss + row * grad_loss_stride, mask=row_ok, other=1).to(D)
    if SCALED:
        scale *= tl.load(grad_scale).to(D)
    scale = tl.where(row_ok, scale, 1.0)
    if not INPLACE or tl.max((scale != 1).to(tl.int32), 0) > 0:
        start = (row * (C // V * V))[:, None]
        for first in range(0, C, B):
            c = first + tl.arange(0, B)[None, :]
            inside = (c < C // V * V) & row_ok[:, None]
            g = tl.load(grad + start + c, mask=inside, other=0).to(D)
            tl.store(out + start + c, from_float(g * scale[:, None], out.dtype.element_ty), mask=inside)


def _plan(grad: Tensor, grad_loss: Tensor, inplace: bool, scaled: bool) -> tuple[Launch, tuple]:
    """The launch, and what follows the tensors in its arguments."""
    V = 16 // grad.element_size()
    if grad_loss.dim() == 0:
        numel = grad.numel()
        programs = min(BWD_PROGRAMS, -(-numel // BWD_BLOCK))
        return Launch(loss_bwd_kernel, (programs, 1, 1), 8), (numel, V, scaled, inplace, BWD_BLOCK)
    N, C = grad.shape
    V = V if C % V == 0 else 1
    B = min(4096, max(16, triton.next_power_of_2(C)))
    R = max(1, 2048 // B)
    return Launch(loss_bwd_rows_kernel, (-(-N // R), 1, 1), 4), (N, C, V, scaled, inplace, R, B)


def _scale(grad: Tensor, grad_loss: Tensor, grad_scale: Tensor, out: Tensor) -> None:
    """out = grad * grad_loss * grad_scale; both (N, C) and contiguous, or the same tensor."""
    inplace, scaled = out is grad, grad_scale.numel() > 0
    key = (inplace, scaled, grad.device, signature(grad), signature(grad_loss), signature(grad_scale))
    plan = plan_cache.get(key) or store_plan(key, _plan(grad, grad_loss, inplace, scaled))
    launch, constants = plan
    if launch.grid[0] == 0:
        return
    with device_of(grad):
        if grad_loss.dim() == 0:
            launch(grad, grad_loss, grad_scale, out, *constants)
        else:
            launch(grad, grad_loss, grad_loss.stride(0), grad_scale, out, *constants)


def loss_bwd(grad: Tensor, grad_loss: Tensor, grad_scale: Tensor) -> Tensor:
    """See reference.loss_bwd."""
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    _scale(grad, grad_loss, grad_scale, out)
    return out


def loss_bwd_(grad: Tensor, grad_loss: Tensor, grad_scale: Tensor) -> None:
    """loss_bwd in place; nothing is written where the scale is one."""
    if grad.is_contiguous():
        _scale(grad, grad_loss, grad_scale, grad)
    else:
        grad.copy_(loss_bwd(grad, grad_loss, grad_scale))
