"""What surrounds the rows: the means' denominators before them, the sum of their losses after them.

A mean's denominators need all targets before any gradient is written. Up to SCAN_ROWS rows every program of
the loss adds them up itself (8 bytes a row, from L2); above that ``totals_kernel`` leaves partial sums. With
``only_correct`` they need all logits: ``correct_kernel`` goes first. The losses are combined by the program
that finishes last, over per-program partial sums and in a fixed order, so results are bitwise repeatable
although which program combines them is not.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_cache import launch
from .loss_math import MEAN

SCAN_ROWS = 1024  # rows whose targets every program adds up itself: 8 KB from L2 each
TOTALS_PROGRAMS = 64  # partial sums of the denominators: 64 * 3 numbers, read by every program of the loss
MOST_PROGRAMS = 8192  # of a loss, whose partial sums combine_losses adds up: 64 KB
CORRECT_PROGRAMS = 528  # of correct_kernel: four per multiprocessor

# Where the denominators come from; 0: no mean. COUNTED: of probabilities, the samples and those correct.
SCAN_TOTALS, PARTIAL_TOTALS, COUNTED = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

# Device functions ----------------------------------------------------------------------------------


@triton.jit
def totals_of(first, last, target, target_stride, correct, weight, C, ignore_index,
              HAS_WEIGHT: tl.constexpr, ONLY_CORRECT: tl.constexpr, DTYPE: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """Sums over samples first .. last: the targets' class weights; samples not ignored; those that count."""
    ce = tl.zeros([BLOCK], DTYPE)
    kept = tl.zeros([BLOCK], tl.int32)
    counted = tl.zeros([BLOCK], tl.int32)
    for begin in range(first, last, BLOCK):
        n = (begin + tl.arange(0, BLOCK)).to(tl.int64)
        y = tl.load(target + n * target_stride, mask=n < last, other=0)
        keep = (n < last) & (y != ignore_index)
        kept += keep.to(tl.int32)
        if HAS_WEIGHT:
            y = tl.minimum(tl.maximum(y, 0), C - 1)
            ce += tl.load(weight + y, mask=keep, other=0)
        if ONLY_CORRECT:
            counted += tl.load(correct + n, mask=n < last, other=0)
    kept = tl.sum(kept, 0)
    total = tl.sum(ce, 0) if HAS_WEIGHT else kept.to(DTYPE)
    chosen = tl.sum(counted, 0) if ONLY_CORRECT else kept
    return total, kept.to(DTYPE), chosen.to(DTYPE)


@triton.jit
def mean_scales(
    target,  # (N,) int64, any stride
    target_stride,
    correct,  # (N,) int32, ONLY_CORRECT: the sample counts
    weight,  # (C,) float32 or float64, HAS_WEIGHT
    totals,  # (3, partials) float32 or float64, PARTIAL_TOTALS; (1,) int32, COUNTED and ONLY_CORRECT
    partials,
    N,
    C,
    ignore_index,
    HAS_WEIGHT: tl.constexpr,
    ONLY_CORRECT: tl.constexpr,
    TOTALS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """What the means multiply by: 1 / sum of the targets' weights (COUNTED: 1 / N); 1 / number that count."""
    if TOTALS == SCAN_TOTALS:
        ce, kept, counted = totals_of(
            0, N, target, target_stride, correct, weight, C, ignore_index,
            HAS_WEIGHT, ONLY_CORRECT, DTYPE, 256,
        )  # fmt: skip
    elif TOTALS == COUNTED:
        ce = tl.full([1], N, DTYPE)
        kept, counted = ce, ce
        if ONLY_CORRECT:
            counted = tl.load(totals + tl.arange(0, 1)).to(DTYPE)
    else:
        kept_lanes = tl.zeros([64], DTYPE)
        ce_lanes, counted_lanes = kept_lanes, kept_lanes
        for begin in range(0, partials, 64):
            i = begin + tl.arange(0, 64)
            kept_lanes += tl.load(totals + partials + i, mask=i < partials, other=0)
            if HAS_WEIGHT:
                ce_lanes += tl.load(totals + i, mask=i < partials, other=0)
            if ONLY_CORRECT:
                counted_lanes += tl.load(totals + 2 * partials + i, mask=i < partials, other=0)
        kept = tl.sum(kept_lanes, 0)
        ce = tl.sum(ce_lanes, 0) if HAS_WEIGHT else kept
        counted = tl.sum(counted_lanes, 0) if ONLY_CORRECT else kept
    one = tl.full([1], 1, DTYPE)
    ce_scale = one / (one * ce)
    if HAS_WEIGHT and TOTALS != COUNTED:  # targets without any: NaN, not infinite
        ce_scale = tl.where(ce == 0, float("nan"), ce_scale)
    zipf_scale = one / (one * counted)
    # No sample is correct: the Zipf term is 0. No sample at all: NaN, by 0 * inf.
    zipf_scale = tl.where((kept > 0) & (counted == 0), tl.zeros_like(one), zipf_scale)
    return ce_scale, zipf_scale


@triton.jit
def gradient_scales(
    ce_scale, zipf_scale, ce_weight, zipf_weight, grad_scale, HAS_CE: tl.constexpr, SCALED: tl.constexpr
):
    """Factors of both parts in the stored gradient, (1,) each; the first program stores grad_scale (SCALED).

    A float16 gradient divided by N before GradScaler's scale reaches it flushes to zero: it is stored
    without the mean's denominator, which backward multiplies in.
    """
    gc = ce_weight * ce_scale
    gz = zipf_weight * zipf_scale
    if SCALED:
        later = ce_scale if HAS_CE else zipf_scale
        usable = (later != 0) & (tl.abs(later) < float("inf"))
        later = tl.where(usable, later, 1.0)
        gc = ce_weight * (ce_scale / later)
        gz = zipf_weight * (zipf_scale / later)
        if tl.program_id(0) == 0:
            tl.store(grad_scale + tl.arange(0, 1), later)
    return gc, gz


@triton.jit
def combine_losses(
    ce_rows,  # (R,) this program's sums
    zipf_rows,  # (R,)
    ce_scale,  # (1,)
    zipf_scale,  # (1,)
    ce_weight,  # (1,)
    zipf_weight,  # (1,)
    loss,  # (1,) float32 or float64
    ce,  # (1,)
    zipf,  # (1,)
    sums,  # (2, programs) scratch, of their type
    counter,  # (1,) int32, 0 before and after
    HAS_CE: tl.constexpr,
    HAS_ZIPF: tl.constexpr,
    REDUCTION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Sum over programs, in order, by whichever program arrives last.

    The barrier puts the stores of all threads before the one thread's atomic, which releases them to the
    device; the last arriver's atomic acquires what all others released, and hands its ticket to its own
    threads through another barrier (part of a scalar atomic whose result is used).
    """
    programs = tl.num_programs(0)
    pid = tl.program_id(0)
    tl.store(sums + pid, tl.sum(ce_rows, 0))
    tl.store(sums + programs + pid, tl.sum(zipf_rows, 0))
    tl.debug_barrier()
    ticket = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if ticket == programs - 1:
        ce_lanes = tl.zeros([256], DTYPE)
        zipf_lanes = tl.zeros([256], DTYPE)
        for begin in range(0, programs, 256):
            i = begin + tl.arange(0, 256)
            # .cg: from L2, where the other multiprocessors' stores are
            ce_lanes += tl.load(sums + i, mask=i < programs, other=0, cache_modifier=".cg")
            zipf_lanes += tl.load(sums + programs + i, mask=i < programs, other=0, cache_modifier=".cg")
        one = tl.arange(0, 1)
        ce_total = tl.sum(ce_lanes, 0) + tl.zeros([1], DTYPE)
        zipf_total = tl.sum(zipf_lanes, 0) + tl.zeros([1], DTYPE)
        if REDUCTION == MEAN:
            if HAS_CE:
                ce_total *= ce_scale
            if HAS_ZIPF:
                zipf_total *= zipf_scale
        tl.store(ce + one, ce_total)
        tl.store(zipf + one, zipf_total)
        tl.store(loss + one, ce_weight * ce_total + zipf_weight * zipf_total)
        tl.store(counter, 0)


# Kernels -------------------------------------------------------------------------------------------


@triton.jit
def argmax_of_rows(x, row, stride, C, row_ok, V: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    """(R,) int32: the lowest class of the largest x, in which NaN is skipped; 0 where all are NaN."""
    start = (row * (stride // V * V))[:, None]
    best = tl.full([R, B], -float("inf"), x.dtype.element_ty)
    winner = tl.full([R, B], 2147483647, tl.int32)
    for first in range(0, C, B):
        c = first + tl.arange(0, B)[None, :]
        t = tl.load(x + start + c, mask=(c < C // V * V) & row_ok[:, None], other=float("nan"))
        wins = (t > best) | ((t == best) & (c < winner))  # -inf may win; NaN never does
        best = tl.where(wins, t, best)
        winner = tl.where(wins, c, winner)
    winner = tl.where(best == tl.max(best, 1)[:, None], winner, 2147483647)
    y = tl.min(winner, 1)
    return tl.where(y < C, y, 0)


@triton.jit
def correct_kernel(
    logits,  # (N, C) any float type, rows `stride` apart
    stride,
    target,  # (N,) int64, any stride; SOFT: (N, C) float32 or float64, rows `target_stride` apart
    target_stride,
    correct,  # (N,) int32: not ignored, and no class beats the target, or its largest class
    number,  # (1,) int32, 0 before: how many are correct; SOFT
    N,
    C,
    steps,  # groups of R rows per program
    ignore_index,
    SOFT: tl.constexpr,
    V: tl.constexpr,  # elements per 16 bytes where V divides C and the strides of rows, else 1
    R: tl.constexpr,
    B: tl.constexpr,
):
    """argmax z = y, or argmax t, ties to the lowest class; reads each once, R rows by B columns at a time.

    The number is a sum of integers by atomics, the same in any order.
    """
    D: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    found = tl.zeros([R], tl.int32)
    for step in range(0, steps):
        row = (tl.program_id(0).to(tl.int64) * steps + step) * R + tl.arange(0, R)
        row_ok = row < N
        if SOFT:
            y = argmax_of_rows(target, row, target_stride, C, row_ok, V, R, B)
            counts = row_ok
        else:
            y = tl.load(target + row * target_stride, mask=row_ok, other=0)
            counts = y != ignore_index
            y = tl.minimum(tl.maximum(y, 0), C - 1)
        start = (row * (stride // V * V))[:, None]
        zy = tl.load(logits + start + y[:, None], mask=row_ok[:, None], other=0).to(D)
        misclassified = tl.zeros([R, B], tl.int32)
        for first in range(0, C, B):
            c = first + tl.arange(0, B)[None, :]
            x = tl.load(logits + start + c, mask=(c < C // V * V) & row_ok[:, None], other=-float("inf"))
            x = x.to(D)
            misclassified |= ((x > zy) | ((c < y[:, None]) & (x == zy))).to(tl.int32)
        right = (tl.max(misclassified, 1) == 0) & counts
        tl.store(correct + row, right.to(tl.int32), mask=row_ok)
        found += right.to(tl.int32)
    if SOFT:
        tl.atomic_add(number, tl.sum(found, 0), sem="relaxed")


@triton.jit
def totals_kernel(
    target,  # (N,) int64, any stride
    target_stride,
    correct,  # (N,) int32; ONLY_CORRECT
    weight,  # (C,) float32 or float64; HAS_WEIGHT
    totals,  # (3, programs) float32 or float64
    N,
    C,
    per_program,
    ignore_index,
    HAS_WEIGHT: tl.constexpr,
    ONLY_CORRECT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums of the means' denominators, for more rows than loss_fwd adds up itself; 8 bytes a row."""
    programs = tl.num_programs(0)
    pid = tl.program_id(0)
    first = pid * per_program
    ce, kept, counted = totals_of(
        first, tl.minimum(first + per_program, N), target, target_stride, correct, weight, C, ignore_index,
        HAS_WEIGHT, ONLY_CORRECT, totals.dtype.element_ty, BLOCK,
    )  # fmt: skip
    tl.store(totals + pid, ce)
    tl.store(totals + programs + pid, kept)
    tl.store(totals + 2 * programs + pid, counted)


# Launchers -----------------------------------------------------------------------------------------

_workspaces: dict[tuple, tuple[Tensor, Tensor]] = {}


def workspace(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """sums (2 MOST_PROGRAMS,) and counter (1,) int32 of combine_losses, shared by the launches of one stream.

    Streams have one each, and a captured graph its own, zeroed in the graph: it may replay beside any stream.
    """
    if not x.is_cuda:
        key = (dtype, x.device)
    elif torch.cuda.is_current_stream_capturing():
        return _new_workspace(x, dtype)
    else:
        key = (dtype, x.device, torch._C._cuda_getCurrentRawStream(x.get_device()))
    found = _workspaces.get(key)
    if found is None:
        found = _workspaces[key] = _lasting_workspace(x, dtype) if x.is_cuda else _new_workspace(x, dtype)
    return found


def _lasting_workspace(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A workspace that a thread of its own allocates.

    torch.compile's CUDA graphs, while they warm up, send what the calling thread allocates to a pool of which
    nothing may outlive the run.
    """

    def make() -> tuple[Tensor, Tensor, torch.cuda.Event]:
        with torch.cuda.device(x.device):
            made = _new_workspace(x, dtype)
            return *made, torch.cuda.current_stream().record_event()

    with ThreadPoolExecutor(1) as thread:
        sums, counter, zeroed = thread.submit(make).result()
    torch.cuda.current_stream(x.device).wait_event(zeroed)
    return sums, counter


def _new_workspace(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    sums = torch.empty(2 * MOST_PROGRAMS, dtype=dtype, device=x.device)
    return sums, torch.zeros(1, dtype=torch.int32, device=x.device)


def correct_samples(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(N,) int32: the sample is not ignored, and the largest logit is of the target's class, or of its most
    probable one; (1,) int32: how many such samples, for probabilities alone.
    """
    N, C = logits.shape
    soft = target.dim() == 2
    correct = torch.empty(N, dtype=torch.int32, device=logits.device)
    number = torch.zeros(1, dtype=torch.int32, device=logits.device) if soft else correct
    if N == 0:
        return correct, number
    V = 16 // logits.element_size()
    if logits.stride(0) % V or C % V or (soft and target.stride(0) % V):
        V = 1
    B = min(2048, max(16, triton.next_power_of_2(C)))
    R = 2048 // B
    groups = -(-N // R)
    steps = -(-groups // CORRECT_PROGRAMS)
    args = (
        logits, logits.stride(0), target, target.stride(0), correct, number,
        N, C, steps, ignore_index, soft, V, R, B,
    )  # fmt: skip
    launch(correct_kernel, (-(-groups // steps), 1, 1), args, (logits, target), 4)
    return correct, number


def partial_totals(
    target: Tensor, correct: Tensor, weight: Tensor | None, C: int, ignore_index: int, only_correct: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(3, programs) partial sums of the means' denominators."""
    N = target.shape[0]
    per_program = max(1024, -(-N // TOTALS_PROGRAMS))
    programs = -(-N // per_program)
    totals = torch.empty((3, programs), dtype=dtype, device=target.device)
    weight_or_target = target if weight is None else weight
    args = (
        target, target.stride(0), correct, weight_or_target, totals,
        N, C, per_program, ignore_index, weight is not None, only_correct, 1024,
    )  # fmt: skip
    launch(totals_kernel, (programs, 1, 1), args, (target, correct, weight_or_target, totals), 4)
    return totals
