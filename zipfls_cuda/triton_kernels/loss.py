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

import torch
import triton
from torch import Tensor

from . import loss_mean
from .label import (
    HASHING_PROGRAMS,
    INTERPRET,
    PAIRWISE_BLOCK,
    PAIRWISE_VOTES,
    device_of,
    launch,
    logits_mass,
    vote_scratch,
    vote_tile,
)
from .loss_bwd import loss_bwd, loss_bwd_
from .loss_long import loss_fwd_long_kernel
from .loss_rows import loss_fwd_kernel

__all__ = ["loss_bwd", "loss_bwd_", "loss_fwd"]

# Tuning ----------------------------------------------------------------------------------------------
#
# Chosen from the compiled code (make kernel-report: no spills, 16-byte accesses) and the model of time beside
# it; no entry was measured on a GPU.

LONGEST_ROW = 4096  # classes a program keeps in registers (float64: half): 16 float32 a thread at 8 warps
PROGRAMS = 8192  # of loss_fwd: more rows than that are walked through, so that folding stays at 64 KB
# Up to so many classes -> (elements a step, warps) of a long row. A multiprocessor holds seven programs or
# more of 4 warps, and its L1 most of their rows up to 30 KB; longer rows come again from L2, two at a time.
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


def long_tile(C: int, itemsize: int) -> tuple[int, int]:
    """(elements a step, warps) for a row read twice."""
    return next(tile for most, tile in LONG_TILES if most >= C or itemsize == 8)


def is_long(C: int, itemsize: int) -> bool:
    """Whether rows are read twice rather than kept in registers."""
    longest = LONGEST_ROW // 2 if itemsize == 8 else LONGEST_ROW
    return longest < C


def row_tile(N: int, C: int, P2: int) -> tuple[int, int, int]:
    """(B, R, warps) for rows of C classes kept in registers, with P2 votes each."""
    B = max(16, triton.next_power_of_2(C))
    if INTERPRET:  # several rows in the time of one, and some of them past the last
        return B, 4 if P2 <= PAIRWISE_VOTES else 1, 1
    R, warps = FEW_ROW_TILES.get(B, ROW_TILES[B]) if N < FEW_ROWS else ROW_TILES[B]
    while R > 1 and R * P2 > 128:  # votes live in registers too: 8 rows of 64 spilled
        R //= 2
    if P2 > 128:
        warps = max(warps, 8 if P2 > 1024 else 4)
    return B, R, warps


def vectors(logits: Tensor) -> tuple[int, bool, int]:
    """(V, EDGES, stride): elements a vector, whether rows have elements outside vectors, distance of rows."""
    N, C = logits.shape
    V, stride = 16 // logits.element_size(), logits.stride(0)
    # Rows of logits and of the gradient are not aligned alike, or hardly longer than their edges.
    if ((stride - C) % V and N > 1) or (C < 4 * V and C % V):
        V = 1
    edges = C % V != 0 or (stride % V != 0 and N > 1)
    # Without edges the stride is a multiple of V; of a single row it may be anything.
    return V, edges, stride if edges else stride // V * V


# Launcher ------------------------------------------------------------------------------------------

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}


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
    N, C = logits.shape
    device, dtype = logits.device, log_mass.dtype
    mean, none = reduction == "mean", reduction == "none"
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    shape = (N,) if none else ()
    loss = torch.empty(shape, dtype=dtype, device=device)
    ce = torch.empty(shape, dtype=dtype, device=device)
    zipf = torch.empty(shape, dtype=dtype, device=device)
    grad = torch.empty((N, C) if with_grad else (0,), dtype=logits.dtype, device=device)
    scaled = mean and with_grad and logits.dtype == torch.float16
    grad_scale = torch.empty(() if scaled else (0,), dtype=dtype, device=device)
    if N == 0 and none:
        return loss, ce, zipf, grad, grad_scale

    has_zipf, has_votes = zipf_weight != 0, votes is not None
    if has_zipf and log_mass.dim() == 1 and not has_votes:
        log_mass = logits_mass(logits, log_mass)
    label = 0 if not has_zipf else log_mass.dim()
    P = votes.shape[1] if has_votes else 0
    P2, pairwise = vote_tile(P)
    long = is_long(C, logits.element_size())
    R = 1
    if long:
        B, warps = long_tile(C, logits.element_size())
    else:
        B, R, warps = row_tile(N, C, P2)
    groups = -(-N // R)
    hashed = label == 1 and not pairwise
    steps = max(1, -(-groups // (HASHING_PROGRAMS if hashed else PROGRAMS)))
    programs = max(1, -(-groups // steps))

    correct = totals = log_mass  # never read unless set below
    partials, totals_kind = 0, 0
    with device_of(logits):
        if mean:
            totals_kind = 1
            if only_correct:
                correct = loss_mean.correct_samples(logits, target, ignore_index)
            if N > loss_mean.SCAN_ROWS:
                totals_kind = 2
                totals = loss_mean.partial_totals(
                    target, correct, weight, C, ignore_index, only_correct, dtype
                )
                partials = totals.shape[1]
        sums = counter = loss
        if not none:
            sums = torch.empty((2, programs), dtype=dtype, device=device)
            counter = loss_mean.counter_of(logits)
        scratch = vote_scratch(programs, P2, not hashed, votes if has_votes else target)
        V, edges, stride = vectors(logits)
        votes_or_target = votes if has_votes else target
        args = (
            logits, stride, target, target.stride(0),
            votes_or_target, votes.stride(0) if has_votes else 0, votes.stride(1) if has_votes else 0,
            log_mass, log_mass.shape[0], log_mass.stride(0), log_mass.stride(-1),
            log_mass if weight is None else weight, correct, totals, partials,
            loss, ce, zipf, grad, grad_scale, sums, counter, scratch,
            N, C, P, steps, ignore_index, ce_weight, zipf_weight, label_smoothing,
            ce_weight != 0, label, has_votes, weight is not None, label_smoothing > 0,
            only_correct, REDUCTIONS[reduction], totals_kind, scaled, with_grad,
            P2, pairwise, PAIRWISE_BLOCK, V, edges,
        )  # fmt: skip
        inputs = (logits, target, votes_or_target, log_mass, log_mass if weight is None else weight)
        if long:
            launch(loss_fwd_long_kernel, (programs, 1, 1), (*args, B // V), inputs, warps)
        else:
            launch(loss_fwd_kernel, (programs, 1, 1), (*args, R, B), inputs, warps)
    return loss, ce, zipf, grad, grad_scale
