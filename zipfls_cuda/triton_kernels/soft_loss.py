"""Stage 4 with targets of probabilities (docs/MATH.md, "Soft targets"): loss and gradient.

Any class may be outside S, the classes of least probability, so the target is read whole beside the logits.
The label over S is still one constant and at most P exceptions, and all else is as in loss.py:
``soft_loss_fwd_kernel`` keeps both rows in registers, ``soft_loss_fwd_long_kernel`` reads them twice.

Never run on a GPU so far: compiled ahead of time for sm_80, sm_90 and sm_100, and run in Triton's
interpreter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import loss_mean
from .label import PAIRWISE_BLOCK, logits_mass, vote_scratch
from .launching import Launch, described, device_of, neighbours, plans, remembered
from .loss import GRADIENT, IN_PLACE, NO_GRADIENT, REDUCTIONS, Plan, cut_rows, plan_of
from .soft_loss_long import soft_loss_fwd_long_kernel
from .soft_loss_rows import soft_loss_fwd_kernel

# Registers hold logits and target, so half as many classes as in loss.py, by which shorter rows are cut. Of
# longer ones (elements a step, warps): more a thread spilled (make kernel-report). Not measured on a GPU.
LONGEST_ROW = 2048
LONG_TILE, LONG_TILE_DENSE = (1024, 4), (512, 4)  # the second beside a mass for every class


def _plan(
    logits: Tensor,
    votes: Tensor | None,
    log_mass: Tensor,
    weighted: bool,
    ce_weight: float,
    zipf_weight: float,
    label_smoothing: float,
    only_correct: bool,
    reduction: str,
    gradient: int,
) -> Plan:
    label = log_mass.dim() if zipf_weight != 0 else 0
    rows = cut_rows(
        logits,
        0 if votes is None else votes.shape[1],
        label,
        LONGEST_ROW,
        LONG_TILE_DENSE if label == 2 else LONG_TILE,
    )
    scaled = reduction == "mean" and gradient != NO_GRADIENT and logits.dtype == torch.float16
    constants = (
        ce_weight != 0, label, votes is not None, weighted, label_smoothing > 0,
        only_correct, REDUCTIONS[reduction], scaled, gradient != NO_GRADIENT,
        rows.P2, rows.pairwise, PAIRWISE_BLOCK, rows.V, rows.edges,
        *((rows.B // rows.V,) if rows.long else (rows.R, rows.B)),
    )  # fmt: skip
    kernel = soft_loss_fwd_long_kernel if rows.long else soft_loss_fwd_kernel
    # Two warps spilled at C = 16, P = 16 on sm_90 (make kernel-report).
    warps = 4 if rows.warps == 2 and not rows.long else rows.warps
    launch = Launch(kernel, (rows.programs, 1, 1), warps)
    return plan_of(launch, rows, constants, logits, log_mass.dtype, reduction, gradient)


def _soft_loss(
    gradient: int,
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None,
    log_mass: Tensor,
    weight: Tensor | None,
    ce_weight: float,
    zipf_weight: float,
    label_smoothing: float,
    only_correct: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits = neighbours(logits)
    V = 16 // logits.element_size()
    if target.stride(1) != 1 or (target.stride(0) - logits.stride(0)) % V:
        target = target.contiguous()  # whose rows are aligned as the gradient's
    only_correct = only_correct and zipf_weight != 0
    if log_mass.dim() == 1:
        log_mass = neighbours(log_mass)
    if weight is not None:
        weight = neighbours(weight)
    if votes is None:
        votes_or_target, P, votes_stride_n, votes_stride_p = target, 0, 0, 0
        if zipf_weight != 0 and log_mass.dim() == 1:
            log_mass = logits_mass(logits, log_mass)
    else:
        votes_or_target, P = votes, votes.shape[1]
        votes_stride_n, votes_stride_p = votes.stride()
    weight_or_mass = log_mass if weight is None else weight
    key = (
        "soft_loss", gradient, ce_weight != 0, zipf_weight != 0, label_smoothing > 0, only_correct, reduction,
        votes is None, weight is None, logits.device, described(logits), described(target),
        described(votes_or_target), described(log_mass), described(weight_or_mass),
    )  # fmt: skip
    plan = plans.get(key) or remembered(
        key,
        _plan(
            logits, votes, log_mass, weight is not None,
            ce_weight, zipf_weight, label_smoothing, only_correct, reduction, gradient,
        ),
    )  # fmt: skip
    loss, ce, zipf, grad, grad_scale = results = plan.results(logits, gradient)
    if plan.nothing:
        return results
    N, C = logits.shape
    rows = plan.rows
    correct = number = log_mass  # never read unless set below
    with device_of(logits):
        sums = counter = scratch = loss
        if only_correct:
            correct, number = loss_mean.soft_correct_samples(logits, target)
        if reduction != "none":
            sums, counter = loss_mean.workspace(logits, log_mass.dtype)
        if rows.hashed:
            scratch = vote_scratch(rows.programs, rows.P2, logits)
        target_stride = target.stride(0) if rows.edges else target.stride(0) // rows.V * rows.V
        plan.launch(
            logits, rows.stride, target, target_stride, votes_or_target, votes_stride_n, votes_stride_p,
            log_mass, log_mass.shape[0], log_mass.stride(0), log_mass.stride(-1),
            weight_or_mass, correct, number, loss, ce, zipf, grad, grad_scale, sums, counter, scratch,
            N, C, P, rows.steps, ce_weight, zipf_weight, label_smoothing, *plan.constants,
        )  # fmt: skip
    return results


def soft_loss_fwd(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None,
    log_mass: Tensor,
    weight: Tensor | None,
    ce_weight: float,
    zipf_weight: float,
    label_smoothing: float,
    only_correct: bool,
    reduction: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See reference.soft_loss_fwd; a row with a vote out of range becomes NaN."""
    return _soft_loss(
        GRADIENT if with_grad else NO_GRADIENT, logits, target, votes, log_mass, weight,
        ce_weight, zipf_weight, label_smoothing, only_correct, reduction,
    )  # fmt: skip


def soft_loss_grad_(logits: Tensor, *args) -> Tensor:
    """See reference.soft_loss_grad_."""
    if logits.is_contiguous():
        return _soft_loss(IN_PLACE, logits, *args)[4]
    grad, grad_scale = _soft_loss(GRADIENT, logits, *args)[3:]
    logits.copy_(grad)
    return grad_scale
