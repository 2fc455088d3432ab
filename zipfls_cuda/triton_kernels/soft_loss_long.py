"""Targets of probabilities, rows too long for registers: logits and target are read twice.

Never run on a GPU so far: compiled ahead of time for sm_80, sm_90 and sm_100, and run in Triton's
interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .label import load_votes
from .loss_long import lanes_sum, mass_lanes, softmax_lanes
from .loss_math import (
    DENSE_LABEL,
    MEAN,
    NO_LABEL,
    NONE,
    VOTES_LABEL,
    infinity_to_zero,
    load_masses,
    narrow,
    row_vectors,
    zipf_of_masses,
    zipf_of_votes,
)
from .loss_mean import fold_losses, gradient_scales
from .loss_rows import edge_columns, normalised
from .soft_loss_rows import (
    between,
    mixed_target,
    share_times,
    soft_cross_entropy,
    soft_mean_scales,
    soft_tile_gradient,
    soft_votes_label,
)


@triton.jit
def soft_lanes_update(
    x,  # (1, L, V) logits, -inf outside the row
    t,  # (1, L, V) target, inf outside the row
    inside,  # (1, L, V) bool
    column,  # (1, L, V)
    masses,  # pointers (1, 1, 1) to the row's log masses; DENSE
    mass_stride_c,
    odd,
    top,
    z,
    u_sum,
    uz_sum,
    least,
    m,
    s,
    z_sum,
    finite,
    members,
    mass_top,
    total,
    entropy,
    cross,  # all (1, L), as odd; of S as far as the lane has come from m on
    weight,
    smoothing,
    C,
    HAS_CE: tl.constexpr,
    HAS_ZIPF: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    DENSE: tl.constexpr,
):
    """Takes one tile into the running statistics of each lane.

    As a greater maximum rescales sums of exponentials, a smaller least probability empties those over S.
    """
    odd = tl.maximum(odd, tl.max((t != t).to(tl.int32), 2))
    if HAS_CE:
        new_top = tl.maximum(top, tl.max(x, 2))
        shift = tl.where(top == -float("inf"), tl.zeros_like(top), top - new_top)
        d = x - infinity_to_zero(new_top)[:, :, None]
        u = mixed_target(t, column, inside, weight, smoothing, C, SMOOTH, HAS_WEIGHT)
        z = z * tl.exp(shift) + tl.sum(tl.exp(d), 2)
        uz_sum += share_times(u_sum, shift)
        uz_sum += tl.sum(tl.where(inside, share_times(u, d), tl.zeros_like(x)), 2)
        u_sum += tl.sum(u, 2)
        top = new_top
    if HAS_ZIPF:
        new_least = tl.minimum(least, tl.min(t, 2))
        kept = new_least == least
        nothing = tl.zeros_like(s)
        in_s = inside & (t == new_least[:, :, None])
        members = tl.where(kept, members, 0) + tl.sum(in_s.to(tl.int32), 2)
        m, shift, d, s, z_sum, finite = softmax_lanes(
            tl.where(in_s, x, -float("inf")),
            tl.where(kept, m, -float("inf")),
            tl.where(kept, s, nothing),
            tl.where(kept, z_sum, nothing),
            tl.where(kept, finite, nothing),
        )
        if DENSE:
            mass_top, total, entropy, cross = mass_lanes(
                load_masses(masses, column, in_s, mass_stride_c),
                d,
                shift,
                tl.where(kept, mass_top, -float("inf")),
                tl.where(kept, total, nothing),
                tl.where(kept, entropy, nothing),
                tl.where(kept, cross, nothing),
            )
        least = new_least
    return odd, top, z, u_sum, uz_sum, least, m, s, z_sum, finite, members, mass_top, total, entropy, cross


@triton.jit
def ce_lanes_sum(top, lane_top, z, u_sum, uz_sum):
    """What lanes add up to for the cross-entropy, (1,) each, relative to the maximum over all of them."""
    shift = tl.where(lane_top == -float("inf"), tl.zeros_like(lane_top), lane_top - top[:, None])
    return tl.sum(z * tl.exp(shift), 1), tl.sum(u_sum, 1), tl.sum(uz_sum + share_times(u_sum, shift), 1)


@triton.jit
def zipf_lanes_sum(
    least, m, mass_top, lane_least, lane_m, s, z_sum, finite, members, lane_top, total, entropy, cross
):  # fmt: skip
    """What lanes add up to over S, (1,) each: those whose least probability is the row's."""
    kept = lane_least == least[:, None]
    nothing = tl.zeros_like(s)
    s, z_sum, finite, _, _, _, total, entropy, cross = lanes_sum(
        m,
        mass_top,
        tl.where(kept, lane_m, -float("inf")),
        tl.where(kept, s, nothing),
        tl.where(kept, z_sum, nothing),
        tl.where(kept, finite, nothing),
        nothing,
        nothing,
        nothing,
        tl.where(kept, lane_top, -float("inf")),
        tl.where(kept, total, nothing),
        tl.where(kept, entropy, nothing),
        tl.where(kept, cross, nothing),
    )
    return s, z_sum, finite, tl.sum(tl.where(kept, members, 0), 1), total, entropy, cross


@triton.jit
def kept_max(least, lane_least, x):
    """(1,) largest x (1, L) of the lanes whose least probability is the row's."""
    return tl.max(tl.where(lane_least == least[:, None], x, -float("inf")), 1)


@triton.jit
def soft_long_gradient(
    x, t, inside, infinite, column, safe_top, safe_m, least, constant, masses, mass_stride_c, mass_top, total,
    members, k_s, k, label_scale, gc, spoilt, spoilt_value, weight, smoothing, C,
    HAS_CE: tl.constexpr, HAS_ZIPF: tl.constexpr, SMOOTH: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    DENSE: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile (1, B) of a long row, before the voted classes."""
    in_s = inside & (t == least[:, None]) & HAS_ZIPF
    e = tl.exp(x - tl.where(in_s, safe_m[:, None], safe_top[:, None]))
    p = constant[:, None]
    if DENSE:
        a = load_masses(masses, column, in_s, mass_stride_c)
        p = normalised(tl.exp(a - infinity_to_zero(mass_top)[:, None]), mass_top, total, members)
    g = soft_tile_gradient(
        x, e, p, t, inside, infinite, in_s, column, k_s, k, label_scale, gc, weight, smoothing, C,
        HAS_CE, HAS_ZIPF, SMOOTH, HAS_WEIGHT,
    )  # fmt: skip
    return tl.where(spoilt[:, None], spoilt_value[:, None], g)


@triton.jit
def soft_loss_fwd_long_kernel(
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
    steps,  # rows per program
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
    L: tl.constexpr,  # lanes: L V elements at a time
):
    """soft_loss_fwd_kernel for rows too long for registers: two passes over logits and target.

    First pass: statistics of all classes, and of S, which is not known before the end: each lane (V
    neighbouring elements) keeps them for the least probability that it has met, and lanes whose least is not
    the row's are dropped where the lanes meet. Second pass, backwards: the gradient.

    Bytes: C (3 itemsize + 8) a row, or C 40 in float64, of which the second reads come from L1 or L2.

    Hazard: as in soft_loss_fwd_kernel. Never run on a GPU so far: compiled ahead of time and interpreted.
    """
    D: tl.constexpr = log_mass.dtype.element_ty
    HAS_ZIPF: tl.constexpr = LABEL != NO_LABEL
    DENSE: tl.constexpr = LABEL == DENSE_LABEL
    BLOCK: tl.constexpr = L * V
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
    ce_sum = tl.zeros([1], D)
    zipf_sum = tl.zeros([1], D)
    offset = (tl.arange(0, L)[:, None] * V + tl.arange(0, V)[None, :])[None, :, :]
    for step in range(0, steps):
        row = tl.program_id(0).to(tl.int64) * steps + step + tl.zeros([1], tl.int64)
        row_ok = row < N
        head, start, body = row_vectors(row, stride, C, V, EDGES)
        target_start = row_vectors(row, target_stride, C, V, EDGES)[1]
        target_rows = target + (row * target_stride)[:, None]
        masses = log_mass + (row * mass_stride_n)[:, None]

        # First pass: statistics, lane by lane.
        odd = tl.zeros([1, L], tl.int32)
        lowest = tl.full([1, L], -float("inf"), D)
        top = lowest
        least = -lowest
        m = lowest
        mass_top = lowest
        z = tl.zeros([1, L], D)
        u_sum = tl.zeros([1, L], D)
        uz_sum = tl.zeros([1, L], D)
        s = tl.zeros([1, L], D)
        z_sum = tl.zeros([1, L], D)
        finite = tl.zeros([1, L], D)
        members = tl.zeros([1, L], tl.int32)
        total = tl.zeros([1, L], D)
        entropy = tl.zeros([1, L], D)
        cross = tl.zeros([1, L], D)
        for first in range(0, C // V * V, BLOCK):
            j = first + offset
            inside = (j < body[:, None, None]) & row_ok[:, None, None]
            x = tl.load(logits + start[:, None, None] + j, mask=inside, other=-float("inf")).to(D)
            t = tl.load(target + target_start[:, None, None] + j, mask=inside, other=float("inf"))
            (odd, top, z, u_sum, uz_sum, least, m, s, z_sum, finite, members, mass_top, total, entropy,
             cross) = soft_lanes_update(
                x, t, inside, head[:, None, None] + j, masses[:, :, None], mass_stride_c,
                odd, top, z, u_sum, uz_sum, least, m, s, z_sum, finite, members, mass_top, total, entropy,
                cross, weight, smoothing, C, HAS_CE, HAS_ZIPF, SMOOTH, HAS_WEIGHT, DENSE,
            )  # fmt: skip
        if EDGES:  # two lanes of their own: what lies before the whole vectors, and what after
            edge_column, edge_inside = edge_columns(head, body, C, V)
            edge_inside &= row_ok[:, None]
            edge_at = (row * stride)[:, None] + edge_column
            edge_x = tl.load(logits + edge_at, mask=edge_inside, other=-float("inf")).to(D)
            edge_t = tl.load(target_rows + edge_column, mask=edge_inside, other=float("inf"))
            nothing = tl.zeros([1, 2], D)
            none = tl.zeros([1, 2], tl.int32)
            below = tl.full([1, 2], -float("inf"), D)
            edge = soft_lanes_update(
                tl.reshape(edge_x, [1, 2, V]), tl.reshape(edge_t, [1, 2, V]),
                tl.reshape(edge_inside, [1, 2, V]), tl.reshape(edge_column, [1, 2, V]),
                masses[:, :, None], mass_stride_c,
                none, below, nothing, nothing, nothing, -below, below, nothing, nothing, nothing, none, below,
                nothing, nothing, nothing, weight, smoothing, C, HAS_CE, HAS_ZIPF, SMOOTH, HAS_WEIGHT, DENSE,
            )  # fmt: skip

        # The lanes meet.
        bad = tl.max(odd, 1) > 0
        row_top = tl.max(top, 1)
        row_least = tl.min(least, 1)
        if EDGES:
            bad |= tl.max(edge[0], 1) > 0
            row_top = tl.maximum(row_top, tl.max(edge[1], 1))
            row_least = tl.minimum(row_least, tl.min(edge[5], 1))
        row_m = kept_max(row_least, least, m)
        row_mass_top = kept_max(row_least, least, mass_top)
        if EDGES:
            row_m = tl.maximum(row_m, kept_max(row_least, edge[5], edge[6]))
            row_mass_top = tl.maximum(row_mass_top, kept_max(row_least, edge[5], edge[11]))
        z, u_sum, uz_sum = ce_lanes_sum(row_top, top, z, u_sum, uz_sum)
        s, z_sum, finite, members, total, entropy, cross = zipf_lanes_sum(
            row_least,
            row_m,
            row_mass_top,
            least,
            m,
            s,
            z_sum,
            finite,
            members,
            mass_top,
            total,
            entropy,
            cross,
        )
        if EDGES:
            edge_z, edge_u_sum, edge_uz_sum = ce_lanes_sum(row_top, edge[1], edge[2], edge[3], edge[4])
            z += edge_z
            u_sum += edge_u_sum
            uz_sum += edge_uz_sum
            (edge_s, edge_z_sum, edge_finite, edge_members, edge_total, edge_entropy,
             edge_cross) = zipf_lanes_sum(
                row_least, row_m, row_mass_top, edge[5], edge[6], edge[7], edge[8], edge[9], edge[10],
                edge[11], edge[12], edge[13], edge[14],
            )  # fmt: skip
            s += edge_s
            z_sum += edge_z_sum
            finite += edge_finite
            members += edge_members
            total += edge_total
            entropy += edge_entropy
            cross += edge_cross
        top = row_top
        least = row_least
        m = row_m
        mass_top = row_mass_top
        safe_top = infinity_to_zero(top)
        safe_m = infinity_to_zero(m)

        # The label and the losses: as in soft_loss_fwd_kernel.
        constant = tl.zeros([1], D)
        if LABEL == VOTES_LABEL:
            v, share, log_p, log_q, rest, bad_votes = soft_votes_label(
                votes, votes_stride_n, votes_stride_p, log_mass, table_length, row, row_ok, target_rows,
                least, members, C, P, scratch, 1, P2, PAIRWISE, PAIR_BLOCK,
            )  # fmt: skip
            bad |= bad_votes
            voted = row_ok[:, None] & (share > 0)
            zv = tl.load(logits + (row * stride)[:, None] + v, mask=voted, other=0).to(D)
            constant = tl.exp(log_q)
        elif HAS_VOTES:
            _, _, bad_votes = load_votes(votes, votes_stride_n, votes_stride_p, row, row_ok, C, P, P2)
            bad |= bad_votes
        ce_row = tl.zeros([1], D)
        zipf_row = tl.zeros([1], D)
        k = tl.zeros([1], D)
        k_s = tl.zeros([1], D)
        label_scale = tl.zeros([1], D)
        counted = row_ok
        infinite = row_ok
        if HAS_CE:
            ce_row, infinite = soft_cross_entropy(u_sum, z, uz_sum)
            k = gc * u_sum / z
            k_s = k * between(tl.exp(m - top), m, infinite)
        if HAS_ZIPF:
            counted &= members >= 2
            if ONLY_CORRECT:
                counted &= tl.load(correct + row, mask=row_ok, other=0) != 0
            if LABEL == VOTES_LABEL:
                zipf_row = zipf_of_votes(m, s, z_sum, finite, zv, share, log_p, log_q, rest, members)
            else:
                zipf_row = zipf_of_masses(s, z_sum, finite, mass_top, total, entropy, cross, members)
            zipf_row = tl.where(counted, zipf_row, 0.0)
            k_s += tl.where(counted, gz / s, 0.0)
            label_scale = tl.where(counted, gz, 0.0)
        ce_row = tl.where(row_ok, tl.where(bad, float("nan"), ce_row), 0.0)
        zipf_row = tl.where(row_ok & bad, float("nan"), zipf_row)
        if REDUCTION == NONE:
            tl.store(ce + row, ce_row, mask=row_ok)
            tl.store(zipf + row, zipf_row, mask=row_ok)
            tl.store(loss + row, ce_weight * ce_row + zipf_weight * zipf_row, mask=row_ok)
        else:
            ce_sum += ce_row
            zipf_sum += zipf_row

        # Second pass, backwards: the gradient. It may lie over the logits: a barrier ends the first pass and
        # the reads of single logits for all threads; from here each is read only to be written.
        if WITH_GRAD:
            tl.debug_barrier()
            spoilt = bad
            if not HAS_CE:
                spoilt |= ~counted if HAS_ZIPF else row_ok
            spoilt_value = tl.where(bad, float("nan"), 0.0)
            grad_start = row_vectors(row, C, C, V, EDGES)[1]
            blocks = (C // V * V + BLOCK - 1) // BLOCK
            for i in range(0, blocks):
                j = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)[None, :]
                inside = (j < body[:, None]) & row_ok[:, None]
                x = tl.load(logits + start[:, None] + j, mask=inside, other=0).to(D)
                t = tl.load(target + target_start[:, None] + j, mask=inside, other=0)
                g = soft_long_gradient(
                    x, t, inside, infinite, head[:, None] + j, safe_top, safe_m, least, constant, masses,
                    mass_stride_c, mass_top, total, members, k_s, k, label_scale, gc, spoilt, spoilt_value,
                    weight, smoothing, C, HAS_CE, HAS_ZIPF, SMOOTH, HAS_WEIGHT, DENSE,
                )  # fmt: skip
                tl.store(grad + grad_start[:, None] + j, narrow(g, grad.dtype.element_ty), mask=inside)
            if EDGES:
                edge_x = tl.load(logits + edge_at, mask=edge_inside, other=0).to(D)
                edge_g = soft_long_gradient(
                    edge_x, edge_t, edge_inside, infinite, edge_column, safe_top, safe_m, least, constant,
                    masses, mass_stride_c, mass_top, total, members, k_s, k, label_scale, gc, spoilt,
                    spoilt_value, weight, smoothing, C, HAS_CE, HAS_ZIPF, SMOOTH, HAS_WEIGHT, DENSE,
                )  # fmt: skip
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
                tl.store(grad + at, narrow(gv, grad.dtype.element_ty), mask=voted & ~spoilt[:, None])
    if REDUCTION != NONE:
        fold_losses(
            ce_sum, zipf_sum, ce_scale, zipf_scale, ce_weight, zipf_weight, loss, ce, zipf, sums, counter,
            HAS_CE, HAS_ZIPF, REDUCTION, D,
        )  # fmt: skip
