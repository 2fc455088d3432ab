"""Stage 4 on a GPU: votes in, loss and gradient out, one read and one write of the logits.

Two kernels compute the same thing and share every formula:

* ``loss_fwd_kernel`` keeps R rows of up to LONGEST_ROW classes in registers between statistics and gradient;
* ``loss_fwd_long_kernel`` reads a longer row twice, the second time backwards, so that what was read last
  comes from L1 or L2. In L2, two rows per multiprocessor in flight are 34 of an H200's 50 MB at C = 65536 in
  bfloat16; beyond about 95000 classes the front of a row is read from memory again.

With m = max_{c != y} z_c, s = sum_{c != y} exp(z_c - m) and t = sum_{c != y} (z_c - m), the target left out
of all three, a label that is q everywhere but at the voted classes gives

    L_zipf  = sum p log p - (q t + sum_voted (p_c - q)(z_c - m)) + log s
    dz_c    = exp(z_c - m) K1 - K2,   K1 = a / (Z e^-m) + lambda / s,   K2 = lambda q   for other c != y

so one exponential and one multiply-add per element give the gradient, and at most P + 1 classes differ.

The means' denominators, and the fold of the losses, are in loss_mean.py.

Never run on a GPU so far: compiled ahead of time for sm_80, sm_90 and sm_100, and run in Triton's
interpreter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import loss_mean
from .label import (
    HASHING_PROGRAMS,
    INTERPRET,
    PAIRWISE_BLOCK,
    PAIRWISE_VOTES,
    logits_mass,
    vote_scratch,
    vote_tile,
)
from .launching import Launch, described, device_of, neighbours, plans, remembered, template
from .loss_bwd import loss_bwd, loss_bwd_
from .loss_long import loss_fwd_long_kernel
from .loss_rows import loss_fwd_kernel

__all__ = ["loss_bwd", "loss_bwd_", "loss_fwd", "loss_grad_"]

# Tuning ----------------------------------------------------------------------------------------------
#
# Chosen from the compiled code (make kernel-report: no spills, 16-byte accesses) and the model of time beside
# it; no entry was measured on a GPU. That is Triton 3.9: 3.6 keeps a few masks of some kernels on the stack
# (8 or 16 bytes a thread), not for want of registers.

LONGEST_ROW = 4096  # classes a program keeps in registers (float64: half): 16 float32 a thread at 8 warps
PROGRAMS = loss_mean.MOST_PROGRAMS  # more rows than that are walked through
# Up to so many classes -> (elements a step, warps) of a long row. A multiprocessor holds seven programs or
# more of 4 warps, and its L1 most of their rows up to 30 KB; longer rows come again from L2, two at a time.
# Beside a mass for every class the longer step spilled on sm_100 (make kernel-report).
LONG_TILES = ((32768, (2048, 4)), (float("inf"), (4096, 8)))

# Power-of-two row length -> (rows per program, warps).
ROW_TILES = {
    16: (8, 2),
    32: (4, 2),
    64: (2, 2),
    128: (1, 1),
    256: (1, 1),
    512: (1, 2),
    1024: (1, 4),
    2048: (1, 4),
    4096: (1, 8),
}
FEW_ROWS = 4096  # below, latency counts: a row per program, and more warps for it
FEW_ROW_TILES = {16: (1, 2), 32: (1, 2), 64: (1, 2), 128: (1, 4), 256: (1, 4), 512: (1, 4), 1024: (1, 4)}


def long_tile(C: int, itemsize: int, label: int) -> tuple[int, int]:
    """(elements a step, warps) for a row read twice; ``label``: 2 beside a mass for every class."""
    return next(tile for most, tile in LONG_TILES if most >= C or itemsize == 8 or label == 2)


def is_long(C: int, itemsize: int, longest: int) -> bool:
    """Whether rows are read twice rather than kept in registers, which hold half as many float64."""
    return (longest // 2 if itemsize == 8 else longest) < C


def row_tile(N: int, C: int, P2: int) -> tuple[int, int, int]:
    """(B, R, warps) for rows of C classes kept in registers, with P2 votes each."""
    B = max(16, triton.next_power_of_2(C))
    if INTERPRET:  # several rows in the time of one, and some of them past the last
        return B, 4 if P2 <= PAIRWISE_VOTES else 1, 1
    R, warps = FEW_ROW_TILES.get(B, ROW_TILES[B]) if N < FEW_ROWS else ROW_TILES[B]
    while R > 1 and R * P2 > 128:  # votes live in registers too: 8 rows of 64 spilled
        R //= 2
    if P2 > 128:
        warps = max(warps, 16 if P2 > 2048 else 8 if P2 > 1024 else 4)
    return B, R, warps


class Rows(NamedTuple):
    """How rows are cut up over programs, and read."""

    long: bool  # read twice
    B: int  # elements in registers
    R: int  # rows in registers
    warps: int
    P2: int
    pairwise: bool
    hashed: bool
    steps: int  # groups of R rows a program
    programs: int
    V: int  # elements a vector
    edges: bool  # whether rows have elements outside vectors
    stride: int  # distance of rows


def cut_rows(logits: Tensor, P: int, label: int, longest: int, tile_of_long: tuple[int, int]) -> Rows:
    """For logits with P votes a row; ``label``: 1 if votes rank; ``longest``: row kept in registers."""
    N, C = logits.shape
    itemsize = logits.element_size()
    P2, pairwise = vote_tile(P)
    hashed = label == 1 and not pairwise
    long = is_long(C, itemsize, longest)
    if long:
        (B, warps), R = tile_of_long, 1
        if P2 > 2048:  # votes live in registers too
            warps = max(warps, 16)
    else:
        B, R, warps = row_tile(N, C, P2)
    groups = -(-N // R)
    steps = max(1, -(-groups // (HASHING_PROGRAMS if hashed else PROGRAMS)))
    V, stride = 16 // itemsize, logits.stride(0)
    # Rows of logits and of the gradient are not aligned alike, or hardly longer than their edges.
    if ((stride - C) % V and N > 1) or (C < 4 * V and C % V):
        V = 1
    edges = C % V != 0 or (stride % V != 0 and N > 1)
    if not edges:
        stride = stride // V * V  # of a single row it may be anything
    return Rows(
        long, B, R, warps, P2, pairwise, hashed, steps, max(1, -(-groups // steps)), V, edges, stride
    )  # fmt: skip


# Launchers -----------------------------------------------------------------------------------------

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
NO_GRADIENT, GRADIENT, IN_PLACE = 0, 1, 2


class Plan(NamedTuple):
    """What all calls with the same shapes, strides, types, alignment and options have in common."""

    launch: Launch
    rows: Rows
    constants: tuple  # the last arguments of the kernel
    losses: Tensor  # like loss, ce and zipf
    grad: Tensor
    grad_scale: Tensor
    nothing: bool  # to do

    def results(self, logits: Tensor, gradient: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """loss, ce, zipf, grad and grad_scale, not yet written; empty_like has less to parse than empty."""
        losses = self.losses
        grad = logits
        if gradient != IN_PLACE:
            grad = torch.empty_like(self.grad, memory_format=torch.contiguous_format)
        return (
            torch.empty_like(losses, memory_format=torch.contiguous_format),
            torch.empty_like(losses, memory_format=torch.contiguous_format),
            torch.empty_like(losses, memory_format=torch.contiguous_format),
            grad,
            torch.empty_like(self.grad_scale),
        )


def plan_of(
    launch: Launch,
    rows: Rows,
    constants: tuple,
    logits: Tensor,
    dtype: torch.dtype,
    reduction: str,
    gradient: int,
) -> Plan:
    """With templates of the results, which hold no memory."""
    N, C = logits.shape
    device = logits.device
    scaled = reduction == "mean" and gradient != NO_GRADIENT and logits.dtype == torch.float16
    return Plan(
        launch,
        rows,
        constants,
        template((N,) if reduction == "none" else (), dtype, device),
        template((N, C) if gradient == GRADIENT else (0,), logits.dtype, device),
        template(() if scaled else (0,), dtype, device),
        N == 0 and reduction == "none",
    )


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
    N = logits.shape[0]
    label = log_mass.dim() if zipf_weight != 0 else 0
    P = 0 if votes is None else votes.shape[1]
    tile = long_tile(logits.shape[1], logits.element_size(), label)
    rows = cut_rows(logits, P, label, LONGEST_ROW, tile)
    scaled = reduction == "mean" and gradient != NO_GRADIENT and logits.dtype == torch.float16
    totals = 0 if reduction != "mean" else 1 if N <= loss_mean.SCAN_ROWS else 2
    constants = (
        ce_weight != 0, label, votes is not None, weighted, label_smoothing > 0,
        only_correct, REDUCTIONS[reduction], totals, scaled, gradient != NO_GRADIENT,
        rows.P2, rows.pairwise, PAIRWISE_BLOCK, rows.V, rows.edges,
        *((rows.B // rows.V,) if rows.long else (rows.R, rows.B)),
    )  # fmt: skip
    kernel = loss_fwd_long_kernel if rows.long else loss_fwd_kernel
    launch = Launch(kernel, (rows.programs, 1, 1), rows.warps)
    return plan_of(launch, rows, constants, logits, log_mass.dtype, reduction, gradient)


def _loss(
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
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits = neighbours(logits)
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
        "loss", gradient, ce_weight != 0, zipf_weight != 0, label_smoothing > 0, only_correct, ignore_index,
        reduction, votes is None, weight is None, logits.device, described(logits), described(target),
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
    correct = totals = log_mass  # never read unless set below
    partials = 0
    with device_of(logits):
        sums = counter = scratch = loss
        if reduction == "mean":
            if only_correct:
                correct = loss_mean.correct_samples(logits, target, ignore_index)
            if N > loss_mean.SCAN_ROWS:
                totals = loss_mean.partial_totals(
                    target, correct, weight, C, ignore_index, only_correct, log_mass.dtype
                )
                partials = totals.shape[1]
        if reduction != "none":
            sums, counter = loss_mean.workspace(logits, log_mass.dtype)
        if rows.hashed:
            scratch = vote_scratch(rows.programs, rows.P2, logits)
        plan.launch(
            logits, rows.stride, target, target.stride(0), votes_or_target, votes_stride_n, votes_stride_p,
            log_mass, log_mass.shape[0], log_mass.stride(0), log_mass.stride(-1),
            weight_or_mass, correct, totals, partials,
            loss, ce, zipf, grad, grad_scale, sums, counter, scratch,
            N, C, P, rows.steps, ignore_index, ce_weight, zipf_weight, label_smoothing, *plan.constants,
        )  # fmt: skip
    return results


def loss_fwd(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None,
    log_mass: Tensor,
    weight: Tensor | None,
    ce_weight: float,
    zipf_weight: float,
    label_smoothing: float,
    only_correct: bool,
    ignore_index: int,
    reduction: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See reference.loss_fwd; a row with a target or vote out of range becomes NaN."""
    return _loss(
        GRADIENT if with_grad else NO_GRADIENT, logits, target, votes, log_mass, weight,
        ce_weight, zipf_weight, label_smoothing, only_correct, ignore_index, reduction,
    )  # fmt: skip


def loss_grad_(logits: Tensor, *args) -> Tensor:
    """See reference.loss_grad_."""
    if logits.is_contiguous():
        return _loss(IN_PLACE, logits, *args)[4]
    grad, grad_scale = _loss(GRADIENT, logits, *args)[3:]
    logits.copy_(grad)
    return grad_scale
