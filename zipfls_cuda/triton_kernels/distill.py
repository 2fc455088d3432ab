"""Logits, a teacher's logits and target in, losses and gradient out: one read of both and one write.

A kernel of its own (distill_kernel.py), in the form of the loss kernel: rows of up to LONGEST_ROW classes are
held in registers, longer ones streamed twice. To the loss kernel a teacher's row would be no label, since
labels have one sum: it is a second row of logits, with a maximum and sums of its own.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import loss_reduce
from .distill_kernel import distill_fwd_kernel
from .label import INTERPRET
from .launch_cache import device_of, plan_cache, signature, store_plan, with_unit_stride
from .loss import (
    FEW_ROWS,
    GRADIENT,
    IN_PLACE,
    NO_GRADIENT,
    PROGRAMS,
    REDUCTIONS,
    Plan,
    Rows,
    is_scaled,
    plan_of,
    row_layout,
    second_rows,
    share_rows,
)

__all__ = ["distill_fwd", "distill_grad_"]

# Tuning: chosen from the compiled code, as in loss.py.

LONGEST_ROW = 2048  # classes of a row that is held in registers; float64: half
ELEMENTS = 8  # of each of both rows that a thread holds; a warp has several short rows
MOST_WARPS = 4  # of a held row: 8 spilled at 2048 classes on sm_100, and beside float64 at 1024
LONG_TILE = (1024, 4)  # (elements of a tile, warps) of a streamed row; float64: half the elements


def cut_rows(logits: Tensor) -> Rows:
    """How rows are cut up over programs, and read."""
    N, C = logits.shape
    wide = logits.dtype == torch.float64
    held = LONGEST_ROW // (2 if wide else 1) >= C
    (B, warps), R = LONG_TILE, 1
    B = B // 2 if wide else B
    if held:
        B = max(16, triton.next_power_of_2(C))
        warps = min(MOST_WARPS, max(1, B // (32 * ELEMENTS)))
        R = max(1, 32 * ELEMENTS // B) if N >= FEW_ROWS else 1  # below, latency counts
        if INTERPRET:  # several rows in the time of one, and some of them past the last
            R, warps = 4, 1
    return Rows(held, B, R, warps, *share_rows(N, R, PROGRAMS), *row_layout(logits))


def _whole_vectors(x: Tensor, logits: Tensor) -> bool:
    """Whether every row of ``x`` is made of the whole vectors that the logits are read in."""
    V = 16 // logits.element_size()
    return x.stride(1) == 1 and x.stride(0) % V == 0 and x.shape[1] % V == 0


def _plan(
    logits: Tensor, dtype: torch.dtype, options: tuple, no_target: bool, reduction: str, gradient: int
) -> Plan:
    rows = cut_rows(logits)
    totals = 0
    if reduction == "mean":
        scanned = logits.shape[0] <= loss_reduce.SCAN_ROWS
        totals = 3 if no_target else 1 if scanned else 2
    constants = (
        *options, REDUCTIONS[reduction], totals, is_scaled(logits, reduction, gradient),
        gradient != NO_GRADIENT, rows.V, rows.edges, rows.held, rows.R, rows.B,
    )  # fmt: skip
    return plan_of(distill_fwd_kernel, rows, constants, logits, dtype, reduction, gradient)


def _distill(
    gradient: int, logits: Tensor, teacher: Tensor, target: Tensor | None, sample_weight: Tensor | None,
    teacher_index: Tensor | None, ce_weight: float, kd_weight: float, tckd_weight: float, nckd_weight: float,
    soft_target_weight: float, max_weight: float, temperature: float, form: str, ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    logits = with_unit_stride(logits)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    kd = kd_weight != 0 or tckd_weight != 0 or nckd_weight != 0
    probabilities = form == "probabilities"
    shares = sample_weight is not None and sample_weight.dim() == 2
    needed = target is None or kd or soft_target_weight != 0  # else no term asks for the teacher
    needed = needed or (probabilities and shares)  # where a row of 0 leaves its weight to the target
    table_rows, by_index = teacher.shape[0], needed and teacher_index is not None
    if by_index and not (_whole_vectors(logits, logits) and _whole_vectors(teacher, logits)):
        teacher, by_index = teacher[teacher_index.clamp(0, table_rows - 1)], False
    if not needed:
        teacher = logits
    elif not by_index:
        teacher = second_rows(teacher, logits)
    if shares:
        sample_weight = with_unit_stride(sample_weight)
    weighted = sample_weight is not None and (kd or max_weight != 0 or shares)
    options = (
        teacher_index is not None, by_index, target is not None, weighted, shares, ce_weight != 0,
        soft_target_weight != 0, max_weight != 0, kd, temperature == 1 or not kd, form == "divergence",
        probabilities,
    )  # fmt: skip
    classes = logits if target is None else target
    weight = sample_weight if weighted else logits
    index = logits if teacher_index is None else teacher_index
    key = (
        "distill", gradient, options, ignore_index, reduction, logits.device, signature(logits),
        signature(teacher), signature(index), signature(classes), signature(weight),
    )  # fmt: skip
    plan = plan_cache.get(key) or store_plan(
        key, _plan(logits, dtype, options, target is None, reduction, gradient)
    )
    loss, ce, distillation, grad, grad_scale = results = plan.results(logits, gradient)
    if plan.empty:
        return results
    N, C = logits.shape
    rows = plan.rows
    teacher_stride = teacher.stride(0)
    if not rows.edges and not by_index:
        teacher_stride = teacher_stride // rows.V * rows.V  # of a single row it may be anything
    totals, partials, sums, counter = loss, 0, loss, loss  # never read unless set below
    with device_of(logits):
        if target is not None and reduction == "mean" and N > loss_reduce.SCAN_ROWS:
            totals = loss_reduce.partial_totals(target, target, None, C, ignore_index, False, dtype)
            partials = totals.shape[1]
        if reduction != "none":
            sums, counter = loss_reduce.workspace(logits, dtype)
        plan.launch(
            logits, rows.stride, teacher, teacher_stride, index, index.stride(0), table_rows,
            classes, classes.stride(0), weight, weight.stride(0), totals, partials,
            loss, ce, distillation, grad, grad_scale, sums, counter,
            N, C, rows.steps, ignore_index,
            ce_weight, kd_weight, tckd_weight, nckd_weight, soft_target_weight, max_weight, temperature,
            *plan.constants,
        )  # fmt: skip
    return results


def distill_fwd(logits: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See reference.distill_fwd; a row with a target out of range becomes NaN."""
    *inputs, with_grad = args
    return _distill(GRADIENT if with_grad else NO_GRADIENT, logits, *inputs)


def _written_over(teacher: Tensor, logits: Tensor, teacher_index: Tensor | None) -> bool:
    """Whether a row of the teacher may lie in another sample's logits, which its gradient overwrites."""
    if teacher.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr():
        return False
    same = teacher.data_ptr() == logits.data_ptr() and teacher.stride() == logits.stride()
    return teacher_index is not None or teacher.dtype != logits.dtype or not same


def distill_grad_(logits: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference.distill_grad_."""
    in_place = logits.is_contiguous()
    teacher, *others = args
    if _written_over(teacher, logits, others[2]):
        teacher = teacher.clone()
    *parts, grad, grad_scale = _distill(IN_PLACE if in_place else GRADIENT, logits, teacher, *others)
    if not in_place:
        logits.copy_(grad)
    return *parts, grad_scale
