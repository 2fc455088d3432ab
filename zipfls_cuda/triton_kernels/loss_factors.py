"""The gradient over the logits, from what the loss kept of every row: no statistics, no label."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch_cache import Launch, device_of, plan_cache, signature, store_plan
from .loss import row_layout
from .loss_kernel import load_edges, load_tile
from .loss_math import LOG2_E, Options, folded, from_float, fused, of_rows, power_of_2, row_vectors

PIECE, WARPS = 2048, 2  # elements of a program: 32 a thread, 16-byte loads in flight for each
PROGRAM_VOTES = 512  # of all rows of a program, but where a row has more: 1024 took 160 registers a thread


@triton.jit
def gradient_of(x, shift, per_exp, constant, o: tl.constexpr):
    """exp(x - shift) per_exp - constant; 0 where the shift is -inf and NaN where it is NaN."""
    g = tl.fma(tl.exp(x - of_rows(shift, o)), of_rows(per_exp, o), -of_rows(constant, o))
    filled = of_rows((shift == -float("inf")) | (shift != shift), o)
    return tl.where(filled, tl.where(of_rows(shift != shift, o), float("nan"), tl.zeros_like(g)), g)


@triton.jit
def loss_factors_bwd_kernel(
    logits,  # (N, C) float16, bfloat16, float32 or float64, contiguous; the gradient lies over them
    target,  # (N,) int64, any stride
    target_stride,
    votes,  # (N, P) int32 or int64, any strides; not read where P is 0
    votes_stride_n,
    votes_stride_p,
    factors,  # (N, 4) float32 or float64: see loss_fwd_kernel, KEPT
    patches,  # (N, P) type of logits
    grad_loss,  # scalar or (N,), any float type
    grad_loss_stride,
    grad_scale,  # scalar, type of factors; SCALED
    N,
    C,
    P,
    pieces,  # of a row, B elements of whole vectors each
    SCALED: tl.constexpr,
    HAS_PATCHES: tl.constexpr,
    P2: tl.constexpr,
    V: tl.constexpr,  # as of loss_fwd_kernel, as the next
    EDGES: tl.constexpr,
    R: tl.constexpr,  # rows at a time
    B: tl.constexpr,
):
    """z_c becomes (exp(z_c - shift) per_exp - constant) grad_loss grad_scale, but for the patches.

    Bytes: 2 C itemsize a row; for each piece of it the votes and patches. A program takes a piece of R rows,
    the first one with the elements outside whole vectors. Hazard: other threads patch the gradient, so each
    program patches its own piece, after a barrier.
    """
    D: tl.constexpr = factors.dtype.element_ty
    T: tl.constexpr = logits.dtype.element_ty
    FIXED: tl.constexpr = tl.float64 != D
    o: tl.constexpr = Options(
        HELD=True, FIXED=FIXED, SOFT=False, CE=False, ZIPF=False, DENSE=False, SMOOTH=False, HAS_WEIGHT=False,
        SUMS_LOGITS=False, FIND_CORRECT=False,
    )  # fmt: skip
    piece = tl.program_id(0) % pieces
    row = (tl.program_id(0) // pieces).to(tl.int64) * R + tl.arange(0, R)
    row_ok = row < N
    head, start, body = row_vectors(row, C, C, V, EDGES)
    scale = tl.load(grad_loss + row * grad_loss_stride, mask=row_ok, other=0).to(D)
    if SCALED:
        scale *= tl.load(grad_scale)
    shift = tl.load(factors + row * 4, mask=row_ok, other=0)
    per_exp = tl.load(factors + row * 4 + 1, mask=row_ok, other=0) * scale
    constant = tl.load(factors + row * 4 + 2, mask=row_ok, other=0) * scale
    at_target = tl.load(factors + row * 4 + 3, mask=row_ok, other=0) * scale
    y = tl.load(target + row * target_stride, mask=row_ok, other=-1)

    j = piece * B + tl.arange(0, B)[None, :]
    tile = load_tile(logits, logits, start, start, j, head, body, row_ok, D, o)
    plain = FIXED
    if FIXED:
        lost = folded(shift)[1]
        plain = tl.max((~(tl.abs(lost) < 64)).to(tl.int32), 0) == 0
    if plain:
        e = power_of_2(fused(tile.x, LOG2_E, -of_rows(folded(shift)[0], o)))
        g = tl.fma(e, of_rows(per_exp * power_of_2(-folded(shift)[1]), o), -of_rows(constant, o))
        tl.store(logits + of_rows(start, o) + j, from_float(g, T), mask=tile.inside)
    else:
        g = gradient_of(tile.x, shift, per_exp, constant, o)
        tl.store(logits + of_rows(start, o) + j, from_float(g, T), mask=tile.inside)
    if EDGES:  # noqa: SIM102 known when compiling, unlike the piece
        if piece == 0:
            edge = load_edges(logits, logits, row, C, C, head, body, row_ok, C, V, D, o)
            edge_g = gradient_of(edge.x, shift, per_exp, constant, o)
            tl.store(logits + of_rows(row * C, o) + edge.column, from_float(edge_g, T), mask=edge.inside)

    tl.debug_barrier()
    patched = row_ok & (shift > -float("inf"))
    here = in_piece(y, head, body, piece, C, B)
    tl.store(logits + row * C + y, from_float(at_target, T), mask=patched & here)
    if HAS_PATCHES:
        p = tl.arange(0, P2)[None, :]
        there = (p < P) & patched[:, None]
        at = (row * votes_stride_n)[:, None] + p.to(tl.int64) * votes_stride_p
        v = tl.load(votes + at, mask=there, other=-1)
        patch = tl.load(patches + (row * P)[:, None] + p, mask=there, other=0).to(D)
        here = in_piece(v, head[:, None], body[:, None], piece, C, B) & there & (patch == patch)
        tl.store(logits + (row * C)[:, None] + v, from_float(patch * scale[:, None], T), mask=here)


@triton.jit
def in_piece(c, head, body, piece, C, B: tl.constexpr):
    """Whether classes belong to a piece; those outside whole vectors are the first one's."""
    j = c - head
    whole = (j >= 0) & (j < body)
    return (c >= 0) & (c < C) & (tl.where(whole, j // B, 0) == piece)


def _plan(logits: Tensor, patches: Tensor, scaled: bool) -> tuple[Launch, tuple]:
    """The launch, and what follows the tensors in its arguments."""
    (N, C), P = logits.shape, patches.shape[1]
    V, edges, _ = row_layout(logits)
    P2 = max(16, triton.next_power_of_2(P))
    B = min(PIECE, max(16, triton.next_power_of_2(C)))
    R = max(1, min(PIECE // B, PROGRAM_VOTES // P2))
    pieces = -(-C // B)
    launch = Launch(loss_factors_bwd_kernel, (-(-N // R) * pieces, 1, 1), WARPS)
    return launch, (N, C, P, pieces, scaled, P > 0, P2, V, edges, R, B)


def loss_factors_bwd_(
    logits: Tensor, target: Tensor, votes: Tensor | None, factors: Tensor, patches: Tensor, grad_loss: Tensor,
    grad_scale: Tensor,
) -> None:  # fmt: skip
    """See ops.FACTOR_SCHEMAS."""
    if not logits.is_contiguous():
        grad = logits.contiguous()
        loss_factors_bwd_(grad, target, votes, factors, patches, grad_loss, grad_scale)
        logits.copy_(grad)
        return
    factors, patches = factors.contiguous(), patches.contiguous()
    scaled = grad_scale.numel() > 0
    votes = patches if votes is None else votes
    tensors = (logits, target, votes, factors, patches, grad_loss, grad_scale)
    key = ("loss_factors_bwd_", logits.device, *map(signature, tensors))
    launch, constants = plan_cache.get(key) or store_plan(key, _plan(logits, patches, scaled))
    if launch.grid[0] == 0:
        return
    upstream_stride = 0 if grad_loss.dim() == 0 else grad_loss.stride(0)
    with device_of(logits):
        launch(
            logits, target, target.stride(0), votes, *votes.stride(), factors, patches,
            grad_loss, upstream_stride, grad_scale, *constants,
        )  # fmt: skip
