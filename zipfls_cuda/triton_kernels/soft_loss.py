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

from . import loss, loss_mean
from .label import HASHING_PROGRAMS, PAIRWISE_BLOCK, device_of, launch, logits_mass, vote_scratch, vote_tile
from .soft_loss_long import soft_loss_fwd_long_kernel
from .soft_loss_rows import soft_loss_fwd_kernel

# (elements a step, warps) of a long row, float64 the second: with more elements a thread, masks or statistics
# are spilled (make kernel-report). Rows in registers are cut as in loss.py. No entry was measured on a GPU.
LONG_TILE, LONG_TILE_64 = (2048, 4), (2048, 8)


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
    N, C = logits.shape
    device, dtype = logits.device, log_mass.dtype
    mean, none = reduction == "mean", reduction == "none"
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    shape = (N,) if none else ()
    loss_, ce, zipf = (torch.empty(shape, dtype=dtype, device=device) for _ in range(3))
    grad = torch.empty((N, C) if with_grad else (0,), dtype=logits.dtype, device=device)
    scaled = mean and with_grad and logits.dtype == torch.float16
    grad_scale = torch.empty(() if scaled else (0,), dtype=dtype, device=device)
    if N == 0 and none:
        return loss_, ce, zipf, grad, grad_scale

    has_zipf, has_votes = zipf_weight != 0, votes is not None
    if has_zipf and log_mass.dim() == 1 and not has_votes:
        log_mass = logits_mass(logits, log_mass)
    label = 0 if not has_zipf else log_mass.dim()
    only_correct = only_correct and has_zipf
    P = votes.shape[1] if has_votes else 0
    P2, pairwise = vote_tile(P)
    long = loss.is_long(C, logits.element_size())
    R = 1
    if long:
        B, warps = LONG_TILE_64 if logits.element_size() == 8 else LONG_TILE
    else:
        B, R, warps = loss.row_tile(N, C, P2)
    groups = -(-N // R)
    hashed = label == 1 and not pairwise
    steps = max(1, -(-groups // (HASHING_PROGRAMS if hashed else loss.PROGRAMS)))
    programs = max(1, -(-groups // steps))

    V, edges, stride = loss.vectors(logits)
    if target.stride(1) != 1 or (V > 1 and N > 1 and (target.stride(0) - stride) % V):
        target = target.contiguous()  # whose rows are then aligned as the gradient's
    target_stride = target.stride(0) if edges else target.stride(0) // V * V
    with device_of(logits):
        correct = number = log_mass  # never read unless set below
        if only_correct:
            correct, number = loss_mean.soft_correct_samples(logits, target)
        sums = counter = loss_
        if not none:
            sums = torch.empty((2, programs), dtype=dtype, device=device)
            counter = loss_mean.counter_of(logits)
        votes_or_target = votes if has_votes else target
        scratch = vote_scratch(programs, P2, not hashed, votes_or_target)
        args = (
            logits, stride, target, target_stride,
            votes_or_target, votes.stride(0) if has_votes else 0, votes.stride(1) if has_votes else 0,
            log_mass, log_mass.shape[0], log_mass.stride(0), log_mass.stride(-1),
            log_mass if weight is None else weight, correct, number,
            loss_, ce, zipf, grad, grad_scale, sums, counter, scratch,
            N, C, P, steps, ce_weight, zipf_weight, label_smoothing,
            ce_weight != 0, label, has_votes, weight is not None, label_smoothing > 0,
            only_correct, loss.REDUCTIONS[reduction], scaled, with_grad,
            P2, pairwise, PAIRWISE_BLOCK, V, edges,
        )  # fmt: skip
        inputs = (logits, target, votes_or_target, log_mass, log_mass if weight is None else weight)
        if long:
            launch(soft_loss_fwd_long_kernel, (programs, 1, 1), (*args, B // V), inputs, warps)
        else:
            launch(soft_loss_fwd_kernel, (programs, 1, 1), (*args, R, B), inputs, warps)
    return loss_, ce, zipf, grad, grad_scale
