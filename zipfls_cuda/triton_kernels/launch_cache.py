"""The launch cache: plans and compiled kernels of earlier calls, so that a launch takes little host time."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

T = TypeVar("T")

plan_cache: dict[Hashable, object] = {}  # by all that a plan depends on: see signature


def store_plan(key: Hashable, plan: T) -> T:
    """Put ``plan`` into the cache and return it."""
    if len(plan_cache) > 4096:  # shapes that never return
        plan_cache.clear()
    plan_cache[key] = plan
    return plan


def signature(x: Tensor) -> tuple:
    """What a plan depends on in a tensor: type, shape, strides and alignment."""
    return x.dtype, x.shape, x.stride(), x.data_ptr() & 15


def with_unit_stride(x: Tensor) -> Tensor:
    """``x``, or a copy of it if its stride along the last axis is not 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def template(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor without memory, for torch.empty_like: a plan must not hold on to a graph's memory pool."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device=device)
    x = torch.empty((), dtype=dtype, device=device).expand(shape)
    x.untyped_storage().resize_(0)
    return x


def _hooked(hook: object) -> bool:
    """Whether a profiler looks on: None, a function, or a chain of hooks that may be empty."""
    return bool(getattr(hook, "calls", hook))


class Launch:
    """A kernel on a grid, always with arguments of the same types, alignment and integers.

    Triton examines some fifty arguments at every launch to find the binary they need. Here the first call
    asks it, and the others launch that binary.
    """

    __slots__ = ("compiled", "grid", "kernel", "registers", "stages", "warps")

    def __init__(
        self, kernel: triton.JITFunction, grid: tuple[int, int, int], warps: int, stages: int = 3,
        registers: int | None = None,
    ) -> None:  # fmt: skip
        self.kernel, self.grid, self.warps, self.stages = kernel, grid, warps, stages
        self.registers = registers  # a thread may have, where ptxas takes more than it needs
        self.compiled = None  # stays None where kernels are interpreted

    def __call__(self, *args) -> None:
        compiled = self.compiled
        if compiled is None:
            # Multiply-adds are written out (tl.fma), never the compiler's choice: a product fused into the
            # first step of a sum, fma(a, b, another lane's), leaves lanes with different last bits.
            self.compiled = self.kernel[self.grid](
                *args, num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=False,
                maxnreg=self.registers,
            )  # fmt: skip
        elif _hooked(knobs.runtime.launch_enter_hook) or _hooked(knobs.runtime.launch_exit_hook):
            compiled[self.grid](*args)
        else:
            active = driver.active
            stream = active.get_current_stream(active.get_current_device())
            run = compiled.run  # loads the binary if need be
            run(*self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)


def launch(
    kernel: triton.JITFunction, grid: tuple[int, int, int], args: tuple, inputs: tuple[Tensor, ...],
    warps: int, stages: int = 3,
) -> None:  # fmt: skip
    """kernel[grid](*args), cached by the ``inputs``, the tensors whose type and alignment may differ.

    Results and scratch come from torch.empty, always aligned, their types decided by those of the inputs.
    """
    plain = [x for x in args if x.__class__ in (int, bool, str)]
    tensors = [(x.dtype, x.data_ptr() & 15) for x in inputs]
    key = (kernel, grid, warps, stages, inputs[0].device, *tensors, *plain)
    run = plan_cache.get(key) or store_plan(key, Launch(kernel, grid, warps, stages))
    run(*args)


_NOTHING = contextlib.nullcontext()


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Context in which Triton launches on the device of ``x``; nothing to do where that is current."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(x.device)
