"""Loss and gradient of rows too long for registers: each logit is read twice, the second time from L2.

Never run on a GPU so far: compiled ahead of time for sm_80, sm_90 and sm_100, and run in Triton's
interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .label import load_votes, votes_label
from .loss_math import (
    DENSE_LABEL,
    MEAN,
    NO_LABEL,
    NONE,
    VOTES_LABEL,
    cross_entropy_of,
    infinity_to_zero,
    load_masses,
    load_weights,
    narrow,
    row_vectors,
    zipf_of_masses,
    zipf_of_votes,
)
from .loss_mean import fold_losses, gradient_scales, mean_scales


@triton.jit
def softmax_lanes(x, m, s, t, finite):
    """Takes one tile (1, L, V) into the online softmax of each lane (1, L); also the shift of m, and x - m.

    The maximum over a lane's V elements comes first, so rescaling costs one exponential in V + 1.
    """
    new_m = tl.maximum(m, tl.max(x, 2))
    shift = tl.where(m == -float("inf"), tl.zeros_like(m), m - new_m)  # nothing yet to rescale: no inf - inf
    d = x - infinity_to_zero(new_m)[:, :, None]
    present = x > -float("inf")
    s = tl.fma(s, tl.exp(shift), tl.sum(tl.exp(d), 2))
    t = tl.fma(finite, shift, t) + tl.sum(tl.where(present, d, tl.zeros_like(x)), 2)
    finite += tl.sum(present.to(x.dtype), 2)
    return new_m, shift, d, s, t, finite


@triton.jit
def mass_lanes(a, d, shift, top, total, entropy, cross):
    """Takes one tile of log masses (1, L, V) into the sums of each lane; d, shift: of softmax_lanes."""
    new_top = tl.maximum(top, tl.max(a, 2))
    mass_shift = tl.where(top == -float("inf"), tl.zeros_like(top), top - new_top)
    factor = tl.exp(mass_shift)
    a = a - infinity_to_zero(new_top)[:, :, None]
    p = tl.exp(a)
    zero = tl.zeros_like(p)
    entropy = scaled(entropy + total * mass_shift, factor) + tl.sum(tl.where(p > 0, p * a, zero), 2)
    cross = scaled(cross + total * shift, factor) + tl.sum(tl.where(p > 0, p * d, zero), 2)
    total = tl.fma(total, factor, tl.sum(p, 2))
    return new_top, total, entropy, cross


@triton.jit
def lanes_update(
    x,  # (1, L, V) logits, -inf where excluded
    counted,  # (1, L, V) bool: neither excluded nor outside the row
    column,  # (1, L, V)
    a,  # (1, L, V) log masses, -inf where excluded; DENSE
    y,
    zy,
    m,
    s,
    t,
    finite,
    tw,
    w_sum,
    beaten,
    top,
    total,
    entropy,
    cross,  # all (1, L): one online softmax per lane
    weight,
    WEIGHTED: tl.constexpr,
    DENSE: tl.constexpr,
):
    """Takes one tile into the running statistics of each lane."""
    m, shift, d, s, t, finite = softmax_lanes(x, m, s, t, finite)
    if WEIGHTED:
        w = tl.load(weight + column, mask=counted, other=0)
        tw += w_sum * shift + tl.sum(tl.where(counted, w * d, tl.zeros_like(x)), 2)
        # A load summed at once breaks the optimiser of Triton 3.6.
        w_sum += tl.sum(tl.where(counted, w, tl.zeros_like(x)), 2)
    earlier = (column < y[:, None, None]) & counted
    beats = (x > zy[:, None, None]) | (earlier & (x == zy[:, None, None]))
    beaten = tl.maximum(beaten, tl.max(beats.to(tl.int32), 2))
    if DENSE:
        top, total, entropy, cross = mass_lanes(a, d, shift, top, total, entropy, cross)
    return m, s, t, finite, tw, w_sum, beaten, top, total, entropy, cross


@triton.jit
def lanes_sum(
    m,
    top,  # (1,) over all lanes
    lane_m,
    s,
    t,
    finite,
    tw,
    w_sum,
    beaten,
    lane_top,
    total,
    entropy,
    cross,  # (1, L)
):
    """What lanes add up to, (1,) each, relative to the maxima over all of them."""
    shift = tl.where(lane_m == -float("inf"), tl.zeros_like(lane_m), lane_m - m[:, None])
    mass_shift = tl.where(lane_top == -float("inf"), tl.zeros_like(lane_top), lane_top - top[:, None])
    factor = tl.exp(mass_shift)
    return (
        tl.sum(s * tl.exp(shift), 1),
        tl.sum(t + finite * shift, 1),
        tl.sum(finite, 1),
        tl.sum(tw + w_sum * shift, 1),
        tl.sum(w_sum, 1),
        tl.max(beaten, 1) > 0,
        tl.sum(total * factor, 1),
        tl.sum(scaled(entropy + total * mass_shift, factor), 1),
        tl.sum(scaled(cross + total * shift, factor), 1),
    )


@triton.jit
def scaled(x, factor):
    """x * factor, and 0 where the factor is: what has no mass left drops out, infinite or not."""
    return tl.where(factor > 0, x * factor, tl.zeros_like(x))


@triton.jit
def lanes_gradient(
    x, column, inside, safe_m, k1, constant, label_scale, smooth_scale, y, gy, spoilt, spoilt_value,
    masses, mass_stride_c, top, total, weight, C,
    SMOOTH: tl.constexpr, HAS_WEIGHT: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile (1, L, V) of a long row, before the voted classes."""
    g = tl.fma(tl.exp(x - safe_m[:, None, None]), k1[:, None, None], -constant[:, None, None])
    if DENSE:
        a = load_masses(masses, column, inside, mass_stride_c)
        p = tl.exp(a - infinity_to_zero(top)[:, None, None])
        others = tl.zeros_like(total) + (C - 1)
        massless = top == -float("inf")
        factor = 1 / tl.where(massless, others, total)
        p = tl.where(massless[:, None, None], factor[:, None, None], p * factor[:, None, None])
        g = tl.fma(-label_scale[:, None, None], p, g)
    if SMOOTH:
        w = load_weights(weight, column, inside, HAS_WEIGHT)
        g = tl.fma(-smooth_scale[:, None, None], w, g)
    g = tl.where(column == y[:, None, None], gy[:, None, None], g)
    return tl.where(spoilt[:, None, None], spoilt_value[:, None, None], g)


@triton.jit
def loss_fwd_long_kernel(
    logits,  # (N, C) float16, bfloat16, float32 or float64, rows `stride` apart
    stride,
    target,  # (N,) int64, any stride
    target_stride,
    votes,  # (N, P) int32 or int64, any strides; HAS_VOTES
    votes_stride_n,
    votes_stride_p,
    log_mass,  # VOTES_LABEL: (table_length,) by rank; DENSE_LABEL: (N, C), any strides; float32 or float64
    table_length,
    mass_stride_n,
    mass_stride_c,
    weight,  # (C,) type of log_mass; HAS_WEIGHT
    correct,  # (N,) int32: the sample counts in L_zipf; ONLY_CORRECT and MEAN
    totals,  # (3, partials) type of log_mass; PARTIAL_TOTALS
    partials,
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
    ignore_index,
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
    TOTALS: tl.constexpr,
    SCALED: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    P2: tl.constexpr,
    PAIRWISE: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    V: tl.constexpr,  # elements per 16 bytes, or 1 where rows of logits and gradient are not aligned alike
    EDGES: tl.constexpr,
    L: tl.constexpr,  # lanes: L V elements at a time
):
    """Loss and gradient of rows too long for registers: as loss_fwd_kernel, reading each logit twice.

    Bytes: 3 C itemsize a row, of which the second read, in descending order, comes from L1 or L2. Each lane
    (V neighbouring elements, one 16-byte access) keeps its own online softmax; lanes meet once, at the end.
    With EDGES two more lanes take the elements outside whole vectors.

    Hazard: as in loss_fwd_kernel, a barrier between the constant-label gradient and that of voted classes.
    Never run on a GPU so far: compiled ahead of time and interpreted.
    """
    D: tl.constexpr = log_mass.dtype.element_ty
    HAS_ZIPF: tl.constexpr = LABEL != NO_LABEL
    scratch += tl.program_id(0).to(tl.int64) * 5 * P2
    DENSE: tl.constexpr = LABEL == DENSE_LABEL
    BLOCK: tl.constexpr = L * V
    ce_weight = tl.full([1], ce_weight, D)
    zipf_weight = tl.full([1], zipf_weight, D)
    smoothing = tl.full([1], smoothing, D)
    ce_scale = tl.full([1], 1, D)
    zipf_scale = tl.full([1], 1, D)
    gc = ce_weight
    gz = zipf_weight
    if REDUCTION == MEAN:
        ce_scale, zipf_scale = mean_scales(
            target, target_stride, correct, weight, totals, partials, N, C, ignore_index,
            HAS_WEIGHT, ONLY_CORRECT, TOTALS, D,
        )  # fmt: skip
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
        y = tl.load(target + row * target_stride, mask=row_ok, other=0)
        ignored = (y == ignore_index) | ~row_ok
        bad = (y < 0) | (y >= C)
        y = tl.minimum(tl.maximum(y, 0), C - 1)
        zy = tl.load(logits + row * stride + y, mask=row_ok, other=0).to(D)
        wy = tl.full([1], 1, D)
        if HAS_WEIGHT:
            wy = tl.load(weight + y)

        # First read: statistics over the non-target classes, lane by lane.
        m = tl.full([1, L], -float("inf"), D)
        s = tl.zeros([1, L], D)
        t = tl.zeros([1, L], D)
        finite = tl.zeros([1, L], D)
        tw = tl.zeros([1, L], D)
        w_sum = tl.zeros([1, L], D)
        beaten = tl.zeros([1, L], tl.int32)
        top = tl.full([1, L], -float("inf"), D)
        total = tl.zeros([1, L], D)
        entropy = tl.zeros([1, L], D)
        cross = tl.zeros([1, L], D)
        masses = log_mass + (row * mass_stride_n)[:, None, None]
        for first in range(0, C // V * V, BLOCK):
            j = first + offset
            inside = (j < body[:, None, None]) & row_ok[:, None, None]
            x = tl.load(logits + start[:, None, None] + j, mask=inside, other=-float("inf")).to(D)
            column = head[:, None, None] + j
            counted = inside & (column != y[:, None, None])
            x = tl.where(counted, x, -float("inf"))
            a = x
            if DENSE:
                a = load_masses(masses, column, counted, mass_stride_c)
            m, s, t, finite, tw, w_sum, beaten, top, total, entropy, cross = lanes_update(
                x, counted, column, a, y, zy, m, s, t, finite, tw, w_sum, beaten, top, total, entropy, cross,
                weight, HAS_WEIGHT and SMOOTH, DENSE,
            )  # fmt: skip
        if EDGES:  # two lanes of their own: what lies before the whole vectors, and what after
            after = tl.arange(0, 2)[None, :, None] > 0
            k = tl.arange(0, V)[None, None, :]
            edge_column = tl.where(after, (head + body)[:, None, None], 0) + k
            edge_inside = tl.where(after, edge_column < C, k < head[:, None, None]) & row_ok[:, None, None]
            edge_counted = edge_inside & (edge_column != y[:, None, None])
            at = (row * stride)[:, None, None] + edge_column
            edge_x = tl.load(logits + at, mask=edge_counted, other=-float("inf")).to(D)
            edge_mass = edge_x
            if DENSE:
                edge_mass = load_masses(masses, edge_column, edge_counted, mass_stride_c)
            nothing = tl.zeros([1, 2], D)
            lowest = tl.full([1, 2], -float("inf"), D)
            edge = lanes_update(
                edge_x, edge_counted, edge_column, edge_mass, y, zy,
                lowest, nothing, nothing, nothing, nothing, nothing,
                tl.zeros([1, 2], tl.int32), lowest, nothing, nothing, nothing,
                weight, HAS_WEIGHT and SMOOTH, DENSE,
            )  # fmt: skip

        # The lanes meet.
        lane_m = m
        lane_top = top
        m = tl.max(m, 1)
        top = tl.max(top, 1)
        if EDGES:
            m = tl.maximum(m, tl.max(edge[0], 1))
            top = tl.maximum(top, tl.max(edge[7], 1))
        s, t, finite, tw, w_sum, beaten, total, entropy, cross = lanes_sum(
            m, top, lane_m, s, t, finite, tw, w_sum, beaten, lane_top, total, entropy, cross
        )
        if EDGES:
            edge_s, edge_t, edge_finite, edge_tw, edge_w_sum, edge_beaten, edge_p, edge_a, edge_z = lanes_sum(
                m, top, edge[0], edge[1], edge[2], edge[3], edge[4], edge[5], edge[6],
                edge[7], edge[8], edge[9], edge[10],
            )  # fmt: skip
            s += edge_s
            t += edge_t
            finite += edge_finite
            tw += edge_tw
            w_sum += edge_w_sum
            beaten |= edge_beaten
            total += edge_p
            entropy += edge_a
            cross += edge_z
        safe_m = infinity_to_zero(m)

        # The losses: line for line as in loss_fwd_kernel.
        if LABEL == VOTES_LABEL:
            v, share, log_p, log_q, rest, bad_votes = votes_label(
                votes, votes_stride_n, votes_stride_p, log_mass, table_length, row, row_ok, y, C, P, scratch,
                1, P2, PAIRWISE, PAIR_BLOCK,
            )  # fmt: skip
            bad |= bad_votes
        elif HAS_VOTES:
            _, _, bad_votes = load_votes(votes, votes_stride_n, votes_stride_p, row, row_ok, C, P, P2)
            bad |= bad_votes
        bad &= ~ignored
        counted_row = ~ignored
        if ONLY_CORRECT:
            counted_row &= tl.load(correct + row, mask=row_ok, other=0) != 0 if REDUCTION == MEAN else ~beaten
        ce_row = tl.zeros([1], D)
        zipf_row = tl.zeros([1], D)
        k1 = tl.zeros([1], D)
        gy = tl.zeros([1], D)
        if HAS_CE:
            if not HAS_WEIGHT:
                tw = tl.where(finite < C - 1, -float("inf"), t)
                w_sum = tl.zeros([1], D) + (C - 1)
            ce_row, k1, gy = cross_entropy_of(m, s, zy, wy, tw, w_sum, C, smoothing, SMOOTH)
            k1 *= gc
            gy *= gc
        if HAS_ZIPF:
            if LABEL == VOTES_LABEL:
                voted = row_ok[:, None] & (share > 0)
                zv = tl.load(logits + (row * stride)[:, None] + v, mask=voted, other=0).to(D)
                zipf_row = zipf_of_votes(m, s, t, finite, zv, share, log_p, log_q, rest, C - 1)
            else:
                zipf_row = zipf_of_masses(s, t, finite, top, total, entropy, cross, C - 1)
            k1 += tl.where(counted_row, gz / s, 0.0)
            zipf_row = tl.where(counted_row, zipf_row, 0.0)
        ce_row = tl.where(ignored, 0.0, tl.where(bad, float("nan"), ce_row))
        zipf_row = tl.where(bad, float("nan"), zipf_row)
        if REDUCTION == NONE:
            tl.store(ce + row, ce_row, mask=row_ok)
            tl.store(zipf + row, zipf_row, mask=row_ok)
            tl.store(loss + row, ce_weight * ce_row + zipf_weight * zipf_row, mask=row_ok)
        else:
            ce_sum += ce_row
            zipf_sum += zipf_row

        # Second read, backwards: the gradient. It may lie over the logits: a barrier ends the first read and
        # those of single logits, by all threads; from here each logit is read only to be written itself.
        # The edges come first: what they need would live through the loop.
        if WITH_GRAD:
            tl.debug_barrier()
            silent = ignored
            if not HAS_CE:
                silent |= ~counted_row if HAS_ZIPF else row_ok
            silent &= ~bad
            spoilt = silent | bad
            spoilt_value = tl.where(silent, 0.0, float("nan"))
            label_scale = tl.zeros([1], D)
            constant = tl.zeros([1], D)
            if HAS_ZIPF:
                label_scale = tl.where(counted_row, gz, 0.0)
            if LABEL == VOTES_LABEL:
                constant = label_scale * tl.exp(log_q)
            smooth_scale = gc * smoothing / C
            if EDGES:
                at = (row * stride)[:, None, None] + edge_column
                edge_x = tl.load(logits + at, mask=edge_inside, other=0).to(D)
                edge_g = lanes_gradient(
                    edge_x, edge_column, edge_inside, safe_m, k1, constant, label_scale, smooth_scale, y, gy,
                    spoilt, spoilt_value, masses, mass_stride_c, top, total, weight, C,
                    HAS_CE and SMOOTH, HAS_WEIGHT, DENSE,
                )  # fmt: skip
                at = (row * C)[:, None, None] + edge_column
                tl.store(grad + at, narrow(edge_g, grad.dtype.element_ty), mask=edge_inside)
            if LABEL == VOTES_LABEL:
                gv = tl.exp(zv - safe_m[:, None]) * k1[:, None] - label_scale[:, None] * tl.exp(log_p)
                if HAS_CE and SMOOTH:
                    gv -= smooth_scale * load_weights(weight, v, voted, HAS_WEIGHT)
            grad_start = row_vectors(row, C, C, V, EDGES)[1]
            blocks = (C // V * V + BLOCK - 1) // BLOCK
            for i in range(0, blocks):
                j = (blocks - 1 - i) * BLOCK + offset
                inside = (j < body[:, None, None]) & row_ok[:, None, None]
                x = tl.load(logits + start[:, None, None] + j, mask=inside, other=0).to(D)
                column = head[:, None, None] + j
                g = lanes_gradient(
                    x, column, inside, safe_m, k1, constant, label_scale, smooth_scale, y, gy, spoilt,
                    spoilt_value, masses, mass_stride_c, top, total, weight, C,
                    HAS_CE and SMOOTH, HAS_WEIGHT, DENSE,
                )  # fmt: skip
                tl.store(grad + grad_start[:, None, None] + j, narrow(g, grad.dtype.element_ty), mask=inside)
            if LABEL == VOTES_LABEL:
                tl.debug_barrier()
                at = (row * C)[:, None] + v
                tl.store(grad + at, narrow(gv, grad.dtype.element_ty), mask=voted & ~spoilt[:, None])
    if REDUCTION != NONE:
        fold_losses(
            ce_sum, zipf_sum, ce_scale, zipf_scale, ce_weight, zipf_weight, loss, ce, zipf, sums, counter,
            HAS_CE, HAS_ZIPF, REDUCTION, D,
        )  # fmt: skip
