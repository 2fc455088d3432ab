"""Logits, target and votes in, losses and gradient out: one read and one write of the logits.

One kernel (loss_kernel.py) in two forms. A row of up to LONGEST_ROW classes (LONGEST_SOFT_ROW beside a target
of probabilities, which is read whole) is held in registers between statistics and gradient. A longer row is
streamed: read twice, the second time backwards, so that what was read last comes from L1 or L2. In L2, two
rows per multiprocessor in flight are 34 of an H200's 50 MB at C = 65536 in bfloat16; beyond about 95000
classes the front of a row is read from memory again.

S are the classes that the label is over: all but y, or those of the row's least probability (docs/MATH.md,
"Soft targets"). With m = max_S z_c, s = sum_S exp(z_c - m) and t = sum_S (z_c - m), a label that is q
everywhere in S but at the voted classes gives

    L_zipf  = sum p log p - (q t + sum_voted (p_c - q)(z_c - m)) + log s
    dz_c    = exp(z_c - m) K1 - K2,   K1 = a / (Z e^-m) + lambda / s,   K2 = lambda q   for other c in S

so one exponential and one multiply-add per element give the gradient, and at most P + 1 classes differ.

The means' denominators, and the sum of the losses, are in loss_reduce.py.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..reference import dense_log_mass
from . import loss_math, loss_reduce
from .label import HASHING_PROGRAMS, INTERPRET, SORTED_VOTES, vote_scratch, vote_tile
from .launch_cache import Launch, device_of, plan_cache, signature, store_plan, template, with_unit_stride
from .loss_bwd import loss_bwd, loss_bwd_
from .loss_kernel import loss_fwd_kernel
from .loss_math import NOT_WANTED, WRITTEN

__all__ = ["loss_bwd", "loss_bwd_", "loss_factors_fwd", "loss_fwd", "loss_grad_"]

# Tuning ----------------------------------------------------------------------------------------------
#
# Chosen from the compiled code of Triton 3.9 (make kernel-report: no spills, 16-byte accesses), not by
# measurement. Triton 3.6 keeps a few masks of some kernels on the stack, 8 or 16 bytes a thread.

# Classes of a row that is held in registers (float64: half): 16 float32 a thread at 8 warps. Beside a target
# of probabilities registers hold both.
LONGEST_ROW, LONGEST_SOFT_ROW = 4096, 2048
PROGRAMS = loss_reduce.MOST_PROGRAMS  # more rows than that are walked through
# Streamed rows: (most bytes of a row, most of one of fewer than FEW_LONG_ROWS, (elements of a tile, warps)).
# Two warps do half of what four do with the votes, with as many loads in flight. A multiprocessor holds 14
# programs of two, five or three of 8 warps: so many rows are in flight, and L2 keeps them for the second
# read. Larger tiles spilled, beside a mass for every class and beside a target of probabilities.
LONG_TILES = (
    (24 << 10, 40 << 10, (1024, 2)),
    (64 << 10, 64 << 10, (2048, 8)),
    (float("inf"), float("inf"), (4096, 8)),
)
FEW_LONG_ROWS = 1024
LONG_TILE_DENSE = (2048, 8)
LONG_SOFT_TILE, LONG_SOFT_TILE_DENSE = (1024, 4), (512, 4)

# Power-of-two row length -> (rows per program, warps). One warp has no barriers, and does once what each warp
# of a program does with the votes: about 600 instructions.
ROW_TILES = {
    16: (8, 1),
    32: (4, 1),
    64: (2, 1),
    128: (2, 1),
    256: (1, 1),
    512: (1, 1),
    1024: (1, 1),
    2048: (1, 4),
    4096: (1, 8),
}
# (held, elements of a tile) -> registers of a thread, where ptxas by itself takes more than it needs, or so
# few that it spills. Masses, weights, label smoothing and the edges of a held row need more.
REGISTERS = {(True, 4096): 104, (False, 2048): 56}
EDGED_REGISTERS = {(False, 2048): 56, (False, 4096): 104}  # where rows have edges
DENSE_REGISTERS = {(True, 4096): 136}  # beside a mass for every class
KEPT_REGISTERS = (64, 72)  # where the gradient is kept, for tiles of 2048 elements; of rows with edges
WIDE_KEPT_REGISTERS = {(True, 1024): 128, (False, 1024): 168}  # of float64
SOFT_REGISTERS = 128  # beside a target of probabilities, held with 1024 votes
# Where registers hold more than a float32 logit for a class: probabilities, masses, or float64; else (1, 4).
WIDE_ROW_TILES = {16: (8, 4), 32: (4, 4), 64: (2, 4), 128: (1, 1), 256: (1, 1)}
SHORT_ROW = 256  # classes up to which all elements of a row are in vectors
FEW_ROWS = 4096  # below, latency counts: a row per program, and more warps for it
FEW_ROW_TILES = {16: (1, 1), 32: (1, 1), 64: (1, 1), 128: (1, 1), 256: (1, 2), 512: (1, 2), 1024: (1, 2)}


def longest_row(itemsize: int, soft: bool) -> int:
    """Classes up to which a row is held in registers, which hold half as many float64."""
    return (LONGEST_SOFT_ROW if soft else LONGEST_ROW) // (2 if itemsize == 8 else 1)


def long_tile(N: int, C: int, itemsize: int, label: int, soft: bool) -> tuple[int, int]:
    """(elements of a tile, warps) for streamed rows; ``label``: 2 beside a mass for every class."""
    if soft:
        return LONG_SOFT_TILE_DENSE if label == 2 else LONG_SOFT_TILE
    if label == 2:
        return LONG_TILE_DENSE
    few = N < FEW_LONG_ROWS
    row = 0 if itemsize == 8 else C * itemsize
    return next(tile for many_rows, few_rows, tile in LONG_TILES if row <= (few_rows if few else many_rows))


def row_tile(N: int, C: int, P2: int, wide: bool) -> tuple[int, int, int]:
    """(B, R, warps) for rows of C classes kept in registers, with P2 votes each; ``wide``: WIDE_ROW_TILES."""
    B = max(16, triton.next_power_of_2(C))
    if INTERPRET:  # several rows in the time of one, and some of them past the last
        return B, 4 if P2 <= SORTED_VOTES else 1, 1
    if wide:
        R, warps = WIDE_ROW_TILES.get(B, (1, 4)) if N >= FEW_ROWS else (1, 4)
    else:
        R, warps = FEW_ROW_TILES.get(B, ROW_TILES[B]) if N < FEW_ROWS else ROW_TILES[B]
    while R > 1 and R * P2 > 128:  # votes live in registers too: 8 rows of 64 spilled
        R //= 2
    if P2 > 128:
        warps = max(warps, 16 if P2 > 2048 else 8 if P2 > 1024 else 4)
    return B, R, warps


class Rows(NamedTuple):
    """How rows are cut up over programs, and read."""

    held: bool  # in registers
    B: int  # elements of a tile's row
    R: int  # rows of a tile
    warps: int
    steps: int  # groups of R rows a program
    programs: int
    V: int  # elements a vector
    edges: bool  # whether rows have elements outside vectors
    stride: int  # distance of rows
    P2: int = 0
    sorted_: bool = False  # in registers, not hashed
    hashed: bool = False
    registers: int | None = None  # a thread may have


def cut_rows(logits: Tensor, P: int, label: int, soft: bool, weighted: bool, kept: bool = False) -> Rows:
    """For logits with P votes a row.

    ``label``: 1 if votes rank; ``soft``: a target of probabilities; ``kept``: the gradient is not written.
    """
    N, C = logits.shape
    itemsize = logits.element_size()
    P2, sorted_ = vote_tile(P)
    hashed = label == 1 and not sorted_
    held = longest_row(itemsize, soft) >= C
    wide = soft or label == 2 or itemsize == 8
    if held:
        B, R, warps = row_tile(N, C, P2, wide)
        if B > 2048 or (soft and ((label == 2 and B == 2048) or P2 in (256, 1024))):  # 4 spilled
            warps = max(warps, 8)
    else:
        (B, warps), R = long_tile(N, C, itemsize, label, soft), 1
        if P2 > 128:  # votes live in registers too
            warps = max(warps, 16 if P2 > 2048 else 8 if P2 > 512 else 4)
            B = max(B, 32 * warps * 16 // itemsize)  # a vector for every thread
    steps, programs = share_rows(N, R, HASHING_PROGRAMS if hashed else PROGRAMS)
    V, edges, stride = row_layout(logits)
    if soft:
        limit = SOFT_REGISTERS if held and P2 == 1024 else None
    elif label == 2:
        limit = DENSE_REGISTERS.get((held, B))
    elif kept and itemsize == 8:
        limit = WIDE_KEPT_REGISTERS.get((held, B))
    elif kept and (held, B) == (False, 2048) and P2 <= 64:
        limit = KEPT_REGISTERS[edges]
    elif wide or weighted or P2 > 64 or (held and edges):
        limit = None
    else:
        limit = (EDGED_REGISTERS if edges else REGISTERS).get((held, B))
    return Rows(held, B, R, warps, steps, programs, V, edges, stride, P2, sorted_, hashed, limit)


def share_rows(N: int, R: int, most: int) -> tuple[int, int]:
    """(groups of R rows a program, programs), at most ``most`` of them."""
    groups = -(-N // R)
    steps = max(1, -(-groups // most))
    return steps, max(1, -(-groups // steps))


def row_layout(logits: Tensor) -> tuple[int, bool, int]:
    """(elements a vector, whether rows have elements outside vectors, distance of rows)."""
    N, C = logits.shape
    V, stride = 16 // logits.element_size(), logits.stride(0)
    # Rows of logits and of the gradient are not aligned alike, or hardly longer than their edges.
    if ((stride - C) % V and N > 1) or (C < 4 * V and C % V):
        V = 1
    while V > 1 and SHORT_ROW >= C and (C % V or (stride % V and N > 1)):
        V //= 2  # shorter vectors take fewer instructions than edges
    edges = C % V != 0 or (stride % V != 0 and N > 1)
    if not edges:
        stride = stride // V * V  # of a single row it may be anything
    return V, edges, stride


# Launchers -----------------------------------------------------------------------------------------

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
NO_GRADIENT, GRADIENT, IN_PLACE, KEPT = 0, 1, 2, 3


def second_rows(x: Tensor, logits: Tensor) -> Tensor:
    """``x`` (N, C), or a copy of it if its rows are not contiguous or not aligned as those of the logits."""
    if x.stride(1) != 1 or (x.stride(0) - logits.stride(0)) % (16 // logits.element_size()):
        return x.contiguous()  # whose rows are aligned as the gradient's
    return x


class Plan(NamedTuple):
    """What all calls with the same shapes, strides, types, alignment and options have in common."""

    launch: Launch
    rows: Rows
    constants: tuple  # the last arguments of the kernel
    losses: Tensor  # like loss, ce and zipf
    grad: Tensor  # KEPT: patches
    grad_scale: Tensor
    empty: bool  # no rows, and no mean or sum of them

    def results(self, logits: Tensor, gradient: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """loss, ce, zipf, grad or patches, and grad_scale, not yet written.

        empty_like has less to parse than empty.
        """
        empty = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
        grad = logits if gradient == IN_PLACE else empty(self.grad)
        return empty(self.losses), empty(self.losses), empty(self.losses), grad, empty(self.grad_scale)


def is_scaled(logits: Tensor, reduction: str, gradient: int) -> bool:
    """Whether the gradient is stored without the mean's denominator: see loss_reduce.gradient_scales."""
    return reduction == "mean" and gradient != NO_GRADIENT and logits.dtype == torch.float16


def plan_of(
    kernel: triton.JITFunction, rows: Rows, constants: tuple, logits: Tensor, dtype: torch.dtype,
    reduction: str, gradient: int, patches: int = 0,
) -> Plan:  # fmt: skip
    """The plan of a loss, whose results but the gradient have the type ``dtype``."""
    N, C = logits.shape
    grad = {GRADIENT: (N, C), KEPT: (N, patches)}.get(gradient, (0,))
    device = logits.device
    return Plan(
        Launch(kernel, (rows.programs, 1, 1), rows.warps, registers=rows.registers),
        rows,
        constants,
        template((N,) if reduction == "none" else (), dtype, device),
        template(grad, logits.dtype, device),
        template(() if is_scaled(logits, reduction, gradient) else (0,), dtype, device),
        N == 0 and reduction == "none",
    )


def _plan(
    logits: Tensor, soft: bool, votes: Tensor | None, log_mass: Tensor, weighted: bool, ce_weight: float,
    zipf_weight: float, label_smoothing: float, only_correct: bool, reduction: str, gradient: int,
) -> Plan:  # fmt: skip
    N, dtype = logits.shape[0], log_mass.dtype
    label = log_mass.dim() if zipf_weight != 0 else 0
    P = 0 if votes is None else votes.shape[1]
    rows = cut_rows(logits, P, label, soft, weighted or label_smoothing > 0, gradient == KEPT)
    wanted = {NO_GRADIENT: NOT_WANTED, KEPT: loss_math.KEPT}.get(gradient, WRITTEN)
    scaled = is_scaled(logits, reduction, gradient)
    lanes = rows.R if rows.held else min(32 * rows.warps, rows.B // rows.V)
    totals = 0 if reduction != "mean" else 3 if soft else 1 if N <= loss_reduce.SCAN_ROWS else 2
    constants = (
        soft, ce_weight != 0, label, votes is not None, weighted, label_smoothing > 0, only_correct,
        REDUCTIONS[reduction], totals, scaled, wanted.value,
        rows.P2, rows.sorted_, rows.V, rows.edges, rows.held, rows.R, rows.B, lanes,
    )  # fmt: skip
    patches = P if label == 1 else 0
    return plan_of(loss_fwd_kernel, rows, constants, logits, dtype, reduction, gradient, patches)


def _loss(
    gradient: int, logits: Tensor, target: Tensor, votes: Tensor | None, log_mass: Tensor,
    weight: Tensor | None, ce_weight: float, zipf_weight: float, label_smoothing: float, only_correct: bool,
    ignore_index: int, reduction: str, factors: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    logits = with_unit_stride(logits)
    soft = target.dim() == 2
    if soft:
        target = second_rows(target, logits)
        only_correct = only_correct and zipf_weight != 0
        ignore_index = 0
    if log_mass.dim() == 1:
        log_mass = with_unit_stride(log_mass)
    if weight is not None:
        weight = with_unit_stride(weight)
    if votes is None:
        votes_or_target, P, votes_stride_n, votes_stride_p = target, 0, 0, 0
        if zipf_weight != 0 and log_mass.dim() == 1:
            log_mass = dense_log_mass(log_mass, None, logits, logits.shape[1])
    else:
        votes_or_target, P = votes, votes.shape[1]
        votes_stride_n, votes_stride_p = votes.stride()
    weight_or_mass = log_mass if weight is None else weight
    key = (
        "loss", gradient, ce_weight != 0, zipf_weight != 0, label_smoothing > 0, only_correct, ignore_index,
        reduction, votes is None, weight is None, logits.device, signature(logits), signature(target),
        signature(votes_or_target), signature(log_mass), signature(weight_or_mass),
    )  # fmt: skip
    plan = plan_cache.get(key) or store_plan(
        key,
        _plan(
            logits, soft, votes, log_mass, weight is not None,
            ce_weight, zipf_weight, label_smoothing, only_correct, reduction, gradient,
        ),
    )  # fmt: skip
    loss, ce, zipf, grad, grad_scale = results = plan.results(logits, gradient)
    if plan.empty:
        return results
    N, C = logits.shape
    rows = plan.rows
    correct = totals = log_mass  # never read unless set below
    partials, target_stride = 0, target.stride(0)
    with device_of(logits):
        sums = counter = scratch = loss
        if only_correct and (soft or reduction == "mean"):
            correct, totals = loss_reduce.correct_samples(logits, target, ignore_index)
        if soft and not rows.edges:
            target_stride = target_stride // rows.V * rows.V  # of a single row it may be anything
        if not soft and reduction == "mean" and N > loss_reduce.SCAN_ROWS:
            totals = loss_reduce.partial_totals(
                target, correct, weight, C, ignore_index, only_correct, log_mass.dtype
            )
            partials = totals.shape[1]
        if reduction != "none":
            sums, counter = loss_reduce.workspace(logits, log_mass.dtype)
        if rows.hashed:
            scratch = vote_scratch(rows.programs, rows.P2, logits)
        plan.launch(
            logits, rows.stride, target, target_stride, votes_or_target, votes_stride_n, votes_stride_p,
            log_mass, log_mass.shape[0], log_mass.stride(0), log_mass.stride(-1),
            weight_or_mass, correct, totals, partials,
            loss, ce, zipf, grad, log_mass if factors is None else factors, grad,
            grad_scale, sums, counter, scratch,
            N, C, P, rows.steps, ignore_index, ce_weight, zipf_weight, label_smoothing, *plan.constants,
        )  # fmt: skip
    return results


def loss_fwd(
    logits: Tensor, target: Tensor, votes: Tensor | None, log_mass: Tensor, weight: Tensor | None,
    ce_weight: float, zipf_weight: float, label_smoothing: float, only_correct: bool, ignore_index: int,
    reduction: str, with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See reference.loss_fwd; a row with a target or vote out of range becomes NaN."""
    return _loss(
        GRADIENT if with_grad else NO_GRADIENT, logits, target, votes, log_mass, weight,
        ce_weight, zipf_weight, label_smoothing, only_correct, ignore_index, reduction,
    )  # fmt: skip


def loss_factors_fwd(
    logits: Tensor, target: Tensor, votes: Tensor | None, log_mass: Tensor, weight: Tensor | None,
    ce_weight: float, zipf_weight: float, label_smoothing: float, *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See ops.FACTOR_SCHEMAS."""
    if target.dim() != 1:
        raise ValueError("target must be class indices, got probabilities")
    if zipf_weight != 0 and (votes is None or log_mass.dim() != 1):
        raise ValueError("votes must rank the classes, by which log_mass is a table")
    if weight is not None and label_smoothing != 0:
        raise ValueError(f"label_smoothing must be 0 beside weight, got {label_smoothing}")
    C, P = logits.shape[1], 0 if votes is None else votes.shape[1]
    if zipf_weight != 0 and C * vote_tile(P)[0] >= 2**31:
        raise ValueError(f"votes times classes must be below 2**31, got {P} and {C}")
    args = (weight, ce_weight, zipf_weight, label_smoothing, *options)
    factors = torch.empty((logits.shape[0], 4), dtype=log_mass.dtype, device=logits.device)
    *parts, patches, grad_scale = _loss(KEPT, logits, target, votes, log_mass, *args, factors)
    return *parts, factors, patches, grad_scale


def loss_grad_(logits: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference.loss_grad_."""
    in_place = logits.is_contiguous()
    *parts, grad, grad_scale = _loss(IN_PLACE if in_place else GRADIENT, logits, *args)
    if not in_place:
        logits.copy_(grad)
    return *parts, grad_scale
