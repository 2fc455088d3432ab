"""Targets of probabilities, rows that fit in registers: each logit and probability is read once.

Never run on a GPU so far: compiled ahead of time for sm_80, sm_90 and sm_100, and run in Triton's
interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .label import label_of_ranks, load_votes, rank_of_votes
from .loss_math import (
    DENSE_LABEL,
    MEAN,
    NO_LABEL,
    NONE,
    VOTES_LABEL,
    infinity_to_zero,
    load_masses,
    load_weights,
    narrow,
    row_vectors,
    zipf_of_masses,
    zipf_of_votes,
)
from .loss_mean import fold_losses, gradient_scales
from .loss_rows import edge_columns, mass_sums, normalised

# Device functions ----------------------------------------------------------------------------------


@triton.jit
def soft_mean_scales(number, N, ONLY_CORRECT: tl.constexpr, DTYPE: tl.constexpr):
    """What the means multiply by: 1 / N; that of L_zipf with ONLY_CORRECT by 1 / the number correct."""
    one = tl.full([1], 1, DTYPE)
    ce_scale = one / (one * N)
    zipf_scale = ce_scale
    if ONLY_CORRECT:
        counted = tl.load(number)
        zipf_scale = one / (one * counted)
        # No sample is correct: the Zipf term is 0. No sample at all: NaN, by 0 * inf.
        zipf_scale = tl.where((N > 0) & (counted == 0), tl.zeros_like(one), zipf_scale)
    return ce_scale, zipf_scale


@triton.jit
def mixed_target(
    t, column, inside, weight, smoothing, C, SMOOTH: tl.constexpr, HAS_WEIGHT: tl.constexpr
):  # fmt: skip
    """w_c t'_c of columns, where inside, and 0 elsewhere; t' = (1 - smoothing) t + smoothing / C."""
    if SMOOTH:
        t = tl.fma(t, 1 - smoothing, smoothing / C)
    t *= load_weights(weight, column, inside, HAS_WEIGHT)
    return tl.where(inside, t, tl.zeros_like(t))


@triton.jit
def share_times(u, d):
    """u d, and 0 where d is: of an infinite share of the target no NaN. (0 times -inf is NaN.)"""
    return tl.where(d == 0, tl.zeros_like(d), u * d)


@triton.jit
def soft_cross_entropy(u_sum, z, uz_sum):
    """u_sum log z - uz_sum, and whether u_sum is infinite.

    Beside an infinite share a p that rounds to 0 or 1 stands for one between: no infinity times 0.
    """
    infinite = tl.abs(u_sum) == float("inf")
    log_z = tl.log(z)
    return u_sum * tl.where(infinite & (log_z == 0), 1.0, log_z) - uz_sum, infinite


@triton.jit
def between(e, x, infinite):
    """Exponentials of x, or 1 for those that must not be 0: see soft_cross_entropy."""
    return tl.where(infinite & (x > -float("inf")), tl.zeros_like(e) + 1, e)


@triton.jit
def soft_tile_sums(
    x, t, inside, in_s, column, safe_top, safe_m, weight, smoothing, C,
    HAS_CE: tl.constexpr, HAS_ZIPF: tl.constexpr, SMOOTH: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """e = exp(x - m) in S, exp(x - top) elsewhere, and the sums over a tile (R, B), -inf outside the row.

    One exponential an element for both parts. Returns e; over S: sum e, sum of finite x - m, their number;
    elsewhere: sum e; over all: sum of w t' and of w t' (x - top).
    """
    zero = tl.zeros_like(x)
    shift = safe_top[:, None] + zero
    if HAS_ZIPF:
        shift = tl.where(in_s, safe_m[:, None], shift)
    d = x - shift
    e = tl.exp(d)
    s = tl.sum(zero, 1)
    z_sum, finite = s, s
    elsewhere = tl.sum(tl.where(in_s, zero, e), 1)
    if HAS_ZIPF:
        present = in_s & (x > -float("inf"))
        s = tl.sum(tl.where(in_s, e, zero), 1)
        z_sum = tl.sum(tl.where(present, d, zero), 1)
        finite = tl.sum(present.to(x.dtype), 1)
    u_sum, uz_sum = tl.sum(zero, 1), tl.sum(zero, 1)
    if HAS_CE:
        u = mixed_target(t, column, inside, weight, smoothing, C, SMOOTH, HAS_WEIGHT)
        u_sum = tl.sum(u, 1)
        uz_sum = tl.sum(tl.where(inside, share_times(u, x - safe_top[:, None]), zero), 1)
    return e, s, z_sum, finite, elsewhere, u_sum, uz_sum


@triton.jit
def soft_tile_gradient(
    x, e, p, t, inside, infinite, in_s, column, k_s, k, label_scale, gc, weight, smoothing, C,
    HAS_CE: tl.constexpr, HAS_ZIPF: tl.constexpr, SMOOTH: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile (R, B) from soft_tile_sums' e; p: the label, or its constant (R, 1)."""
    zero = tl.zeros_like(e)
    g = zero
    if HAS_CE:
        e = between(e, x, infinite[:, None])
        g = e * k[:, None]
    if HAS_ZIPF:
        g = tl.where(in_s, tl.fma(e, k_s[:, None], -label_scale[:, None] * p), g)
    if HAS_CE:
        u = mixed_target(t, column, inside, weight, smoothing, C, SMOOTH, HAS_WEIGHT)
        g = tl.fma(-gc[:, None], u, g)
    return g


@triton.jit
def soft_votes_label(
    votes, votes_stride_n, votes_stride_p, log_mass, table_length, row, row_ok, target_rows, least, members,
    C, P, scratch, R: tl.constexpr, P2: tl.constexpr, PAIRWISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """votes_label over S, the `members` classes (R,) whose target is `least`; target_rows (R, 1) pointers."""
    v, live, count, rank, K, bad = rank_of_votes(
        votes, votes_stride_n, votes_stride_p, row, row_ok, C, P, scratch, R, P2, PAIRWISE, BLOCK
    )
    in_s = live & (tl.load(target_rows + v, mask=live, other=0) == least[:, None])
    dtype: tl.constexpr = log_mass.dtype.element_ty
    share = tl.where(in_s, tl.full(count.shape, 1, dtype) / tl.maximum(count, 1).to(dtype), 0.0)
    rest = members - (tl.sum(share, 1) + 0.5).to(tl.int32)  # each vote stands for 1/count of a class
    share, log_p, log_q = label_of_ranks(log_mass, table_length, in_s, count, rank, K, rest)
    return v, share, log_p, log_q, rest, bad


# Kernels -------------------------------------------------------------------------------------------


@triton.jit
def soft_loss_fwd_kernel(
    logits,  # (N, C) float16, bfloat16, float32 or float64, rows `stride` apart
    stride,
    target,  # (N, C) type of log_mass, rows `target_stride` apart
    target_stride,
    votes,  # (N, P) int32 or int64, any strides; HAS_VOTES
    votes_stride_n,
    votes_stride_p,
    log_mass,  # VOTES_LABEL: (table_length,) by rank; DENSE_LABEL: (N, C), any strides; float32 or float64
    table_length,
    mass_stride_n,
    mass_stride_c,
    weight,  # (C,) type of log_mass; HAS_WEIGHT
    correct,  # (N,) int32: the sample counts in L_zipf; ONLY_CORRECT
    number,  # (1,) int32: how many do; ONLY_CORRECT
    loss,  # (1,) or, for NONE, (N,), type of log_mass
    ce,  # as loss
    zipf,  # as loss
    grad,  # (N, C) type of logits; WITH_GRAD
    grad_scale,  # (1,) type of log_mass; SCALED
    sums,  # (2, programs) scratch, type of log_mass; not NONE
    counter,  # (1,) int32, 0 before and after; not NONE
    scratch,  # (programs, 5 P2) int32; VOTES_LABEL and not PAIRWISE
    N,
    C,
    P,
    steps,  # groups of R rows per program
    ce_weight: tl.float64,
    zipf_weight: tl.float64,
    smoothing: tl.float64,
    HAS_CE: tl.constexpr,
    LABEL: tl.constexpr,
    HAS_VOTES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr,
    ONLY_CORRECT: tl.constexpr,
    REDUCTION: tl.constexpr,
    SCALED: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    P2: tl.constexpr,
    PAIRWISE: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    V: tl.constexpr,  # elements per 16 bytes, or 1 where rows of logits and gradient are not aligned alike
    EDGES: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,  # power of two >= C
):
    """Loss and gradient of rows that fit in registers, beside a target of probabilities (MATH: Soft targets).

    S are the classes whose probability is the row's least: L_zipf is over them as it is over the non-target
    classes in loss_fwd_kernel, its label a constant and at most P exceptions.

    Bytes: C (2 itemsize + 4) a row, or C 24 in float64, 4 P of votes, and logits and target of the voted
    classes again, from L1. A program takes R rows at a time, `steps` times; a thread holds R B / (32 warps)
    elements of both. Elements outside whole vectors of V, at most 2V a row, are a second, small tile.

    Hazard: as in loss_fwd_kernel, barriers before the gradient, which may lie over the logits, and between it
    and that of the voted classes. Never run on a GPU so far: compiled ahead of time and interpreted.
    """
    D: tl.constexpr = log_mass.dtype.element_ty
    HAS_ZIPF: tl.constexpr = LABEL != NO_LABEL
    scratch += tl.program_id(0).to(tl.int64) * 5 * P2
    ce_weight = tl.full([1], ce_weight, D)
    zipf_weight = tl.full([1], zipf_weight, D)
    smoothing = tl.full([1], smoothing, D)
    ce_scale = tl.full([1], 1, D)
    zipf_scale = tl.full([1], 1, D)
    gc = ce_weight
    gz = zipf_weight
    if REDUCTION == MEAN:
        ce_scale, zipf_scale = soft_mean_scales(number, N, ONLY_CORRECT, D)
        gc, gz = gradient_scales(
            ce_scale, zipf_scale, ce_weight, zipf_weight, grad_scale, HAS_CE, SCALED and WITH_GRAD
        )
    ce_sum = tl.zeros([R], D)
    zipf_sum = tl.zeros([R], D)
    for step in range(0, steps):
        group = tl.program_id(0).to(tl.int64) * steps + step
        row = group * R + tl.arange(0, R)
        row_ok = row < N
        head, start, body = row_vectors(row, stride, C, V, EDGES)
        target_start = row_vectors(row, target_stride, C, V, EDGES)[1]
        target_rows = target + (row * target_stride)[:, None]
        j = tl.arange(0, B)[None, :]
        inside = (j < body[:, None]) & row_ok[:, None]
        x = tl.load(logits + start[:, None] + j, mask=inside, other=-float("inf")).to(D)
        t = tl.load(target + target_start[:, None] + j, mask=inside, other=float("inf"))
        column = head[:, None] + j
        if EDGES:
            edge_column, edge_inside = edge_columns(head, body, C, V)
            edge_inside &= row_ok[:, None]
            at = (row * stride)[:, None] + edge_column
            edge_x = tl.load(logits + at, mask=edge_inside, other=-float("inf")).to(D)
            edge_t = tl.load(target_rows + edge_column, mask=edge_inside, other=float("inf"))

        # Which classes S are, and the largest logits.
        odd = tl.max((t != t).to(tl.int32), 1)
        top = tl.max(x, 1)
        m = top
        least = tl.min(t, 1)
        if EDGES:
            odd = tl.maximum(odd, tl.max((edge_t != edge_t).to(tl.int32), 1))
            top = tl.maximum(top, tl.max(edge_x, 1))
            least = tl.minimum(least, tl.min(edge_t, 1))
        in_s = inside & (t == least[:, None]) & HAS_ZIPF
        members = tl.sum(in_s.to(tl.int32), 1)
        if HAS_ZIPF:
            m = tl.max(tl.where(in_s, x, -float("inf")), 1)
        if EDGES:
            edge_in_s = edge_inside & (edge_t == least[:, None]) & HAS_ZIPF
            members += tl.sum(edge_in_s.to(tl.int32), 1)
            if HAS_ZIPF:
                m = tl.maximum(m, tl.max(tl.where(edge_in_s, edge_x, -float("inf")), 1))
        safe_top = infinity_to_zero(top)
        safe_m = infinity_to_zero(m)
        e, s, z_sum, finite, elsewhere, u_sum, uz_sum = soft_tile_sums(
            x, t, inside, in_s, column, safe_top, safe_m, weight, smoothing, C,
            HAS_CE, HAS_ZIPF, SMOOTH, HAS_WEIGHT,
        )  # fmt: skip
        if EDGES:
            edge_e, edge_s, edge_z_sum, edge_finite, edge_elsewhere, edge_u_sum, edge_uz_sum = soft_tile_sums(
                edge_x, edge_t, edge_inside, edge_in_s, edge_column, safe_top, safe_m, weight, smoothing, C,
                HAS_CE, HAS_ZIPF, SMOOTH, HAS_WEIGHT,
            )  # fmt: skip
            s += edge_s
            z_sum += edge_z_sum
            finite += edge_finite
            elsewhere += edge_elsewhere
            u_sum += edge_u_sum
            uz_sum += edge_uz_sum

        # The label.
        bad = odd > 0
        if LABEL == VOTES_LABEL:
            v, share, log_p, log_q, rest, bad_votes = soft_votes_label(
                votes, votes_stride_n, votes_stride_p, log_mass, table_length, row, row_ok, target_rows,
                least, members, C, P, scratch, R, P2, PAIRWISE, PAIR_BLOCK,
            )  # fmt: skip
            bad |= bad_votes
            voted = row_ok[:, None] & (share > 0)
            zv = tl.load(logits + (row * stride)[:, None] + v, mask=voted, other=0).to(D)
            p = tl.exp(log_q)[:, None]
            edge_p = p
        elif HAS_VOTES:
            _, _, bad_votes = load_votes(votes, votes_stride_n, votes_stride_p, row, row_ok, C, P, P2)
            bad |= bad_votes
        if LABEL == DENSE_LABEL:
            masses = log_mass + (row * mass_stride_n)[:, None]
            a = load_masses(masses, column, in_s, mass_stride_c)
            mass_top = tl.max(a, 1)
            if EDGES:
                edge_a = load_masses(masses, edge_column, edge_in_s, mass_stride_c)
                mass_top = tl.maximum(mass_top, tl.max(edge_a, 1))
            safe_mass_top = infinity_to_zero(mass_top)
            p, total, entropy, cross = mass_sums(a, x, safe_mass_top, safe_m)
            if EDGES:
                edge_p, edge_total, edge_entropy, edge_cross = mass_sums(
                    edge_a, edge_x, safe_mass_top, safe_m
                )
                total += edge_total
                entropy += edge_entropy
                cross += edge_cross
                edge_p = normalised(edge_p, mass_top, total, members)
            p = normalised(p, mass_top, total, members)

        # The losses.
        ce_row = tl.zeros([R], D)
        zipf_row = tl.zeros([R], D)
        k = tl.zeros([R], D)
        k_s = tl.zeros([R], D)
        label_scale = tl.zeros([R], D)
        counted = row_ok
        infinite = row_ok
        if HAS_CE:
            c = tl.full([R], 1, D)
            if HAS_ZIPF:
                c = tl.exp(m - top)
                elsewhere += s * c
            ce_row, infinite = soft_cross_entropy(u_sum, elsewhere, uz_sum)
            k = gc * u_sum / elsewhere
            k_s = k * between(c, m, infinite)
        if HAS_ZIPF:
            counted &= members >= 2
            if ONLY_CORRECT:
                counted &= tl.load(correct + row, mask=row_ok, other=0) != 0
            if LABEL == VOTES_LABEL:
                zipf_row = zipf_of_votes(
                    m, s, z_sum, finite, zv, share, log_p, log_q, rest, members
                )  # fmt: skip
            else:
                zipf_row = zipf_of_masses(s, z_sum, finite, mass_top, total, entropy, cross, members)
            zipf_row = tl.where(counted, zipf_row, 0.0)
            k_s += tl.where(counted, (gz + tl.zeros([R], D)) / s, 0.0)
            label_scale = tl.where(counted, gz + tl.zeros([R], D), 0.0)
        ce_row = tl.where(row_ok, tl.where(bad, float("nan"), ce_row), 0.0)
        zipf_row = tl.where(row_ok & bad, float("nan"), zipf_row)
        if REDUCTION == NONE:
            tl.store(ce + row, ce_row, mask=row_ok)
            tl.store(zipf + row, zipf_row, mask=row_ok)
            tl.store(loss + row, ce_weight * ce_row + zipf_weight * zipf_row, mask=row_ok)
        else:
            ce_sum += ce_row
            zipf_sum += zipf_row

        # The gradient. It may lie over the logits: every thread has read its own by now.
        if WITH_GRAD:
            tl.debug_barrier()
            spoilt = bad
            if not HAS_CE:
                spoilt |= ~counted if HAS_ZIPF else row_ok
            spoilt_value = tl.where(bad, float("nan"), 0.0)[:, None]
            spoilt = spoilt[:, None]
            if not HAS_ZIPF:
                p = tl.zeros([R, 1], D)
                edge_p = p
            g = soft_tile_gradient(
                x, e, p, t, inside, infinite, in_s, column, k_s, k, label_scale, gc, weight, smoothing, C,
                HAS_CE, HAS_ZIPF, SMOOTH, HAS_WEIGHT,
            )  # fmt: skip
            g = tl.where(spoilt, spoilt_value, g)
            if EDGES:
                edge_g = soft_tile_gradient(
                    edge_x, edge_e, edge_p, edge_t, edge_inside, infinite, edge_in_s, edge_column, k_s, k,
                    label_scale, gc, weight, smoothing, C, HAS_CE, HAS_ZIPF, SMOOTH, HAS_WEIGHT,
                )  # fmt: skip
                edge_g = tl.where(spoilt, spoilt_value, edge_g)
            grad_start = row_vectors(row, C, C, V, EDGES)[1]
            tl.store(grad + grad_start[:, None] + j, narrow(g, grad.dtype.element_ty), mask=inside)
            if EDGES:
                at = (row * C)[:, None] + edge_column
                tl.store(grad + at, narrow(edge_g, grad.dtype.element_ty), mask=edge_inside)
            if LABEL == VOTES_LABEL:
                gv = tl.exp(zv - safe_m[:, None])
                if HAS_CE:
                    gv = between(gv, zv, infinite[:, None])
                gv = gv * k_s[:, None] - label_scale[:, None] * tl.exp(log_p)
                if HAS_CE:
                    tv = least[:, None] + tl.zeros_like(gv)
                    u = mixed_target(tv, v, voted, weight, smoothing, C, SMOOTH, HAS_WEIGHT)
                    gv -= gc[:, None] * u
                tl.debug_barrier()
                at = (row * C)[:, None] + v
                tl.store(grad + at, narrow(gv, grad.dtype.element_ty), mask=voted & ~spoilt)
    if REDUCTION != NONE:
        fold_losses(
            ce_sum, zipf_sum, ce_scale, zipf_scale, ce_weight, zipf_weight, loss, ce, zipf, sums, counter,
            HAS_CE, HAS_ZIPF, REDUCTION, D,
        )  # fmt: skip
