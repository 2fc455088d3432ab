"""Loss and gradient of rows that fit in registers: each logit is read once, each gradient written once.

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
def edge_columns(head, body, C, V: tl.constexpr):
    """Columns (R, 2V) outside the whole vectors, and which of them exist."""
    k = tl.arange(0, 2 * V)[None, :]
    before = k < V
    column = tl.where(before, k, (head + body)[:, None] + k - V)
    return column, tl.where(before, k < head[:, None], column < C)


@triton.jit
def tile_sums(x, counted, column, y, zy, safe_m, weight, WEIGHTED: tl.constexpr):
    """e = exp(x - m) and the sums over a tile (R, B) whose excluded elements are -inf.

    Returns e; s, t, finite; with WEIGHTED sum w (x - m) and sum w; whether some class beats the target.
    """
    d = x - safe_m[:, None]
    e = tl.exp(d)
    zero = tl.zeros_like(x)
    present = x > -float("inf")  # neither excluded nor -inf nor NaN
    t = tl.sum(tl.where(present, d, zero), 1)
    finite = tl.sum(present.to(x.dtype), 1)
    tw = tl.zeros_like(t)
    w_sum = tl.zeros_like(t)
    if WEIGHTED:
        w = tl.load(weight + column, mask=counted, other=0)
        tw = tl.sum(tl.where(counted, w * d, zero), 1)
        w_sum = tl.sum(w, 1)
    beats = (x > zy[:, None]) | ((column < y[:, None]) & counted & (x == zy[:, None]))
    return e, tl.sum(e, 1), t, finite, tw, w_sum, tl.max(beats.to(tl.int32), 1) > 0


@triton.jit
def mass_sums(a, x, safe_top, safe_m):
    """p = e^(a - top), and the sums of p, p (a - top) and p (x - m) over a tile; no mass, no term."""
    a = a - safe_top[:, None]
    p = tl.exp(a)
    zero = tl.zeros_like(p)
    entropy = tl.sum(tl.where(p > 0, p * a, zero), 1)
    cross = tl.sum(tl.where(p > 0, p * (x - safe_m[:, None]), zero), 1)
    return p, tl.sum(p, 1), entropy, cross


@triton.jit
def normalised(p, top, total, others):
    """The label over `others` classes from p and its sum; uniform where no class has mass."""
    massless = (top == -float("inf"))[:, None]
    others = tl.zeros_like(total) + others
    factor = (1 / tl.where(top == -float("inf"), others, total))[:, None]
    return tl.where(massless, factor, p * factor)


@triton.jit
def loss_fwd_kernel(
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
    steps,  # groups of R rows per program
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
    R: tl.constexpr,
    B: tl.constexpr,  # power of two >= C
):
    """Loss and gradient of rows that fit in registers: each logit is read once, each gradient written once.

    Bytes: 2 C itemsize a row, 4 P (int32) of votes, and the P logits of the voted classes again, from L1.
    A program takes R rows at a time, `steps` times; a thread holds R B / (32 warps) elements, as float32
    (float64 for float64). Elements outside whole 16-byte vectors, at most 2V a row, are a second, small tile.

    Hazard: the gradient at voted classes is stored over the constant-label value, by other threads; a barrier
    stands between. Equal votes store equal values. The gradient may lie over the logits (loss_grad_): no row
    is shared by programs, and a barrier stands between the reads of a group of rows, some of them repeated by
    several threads, and its first store. The next group touches other addresses.
    Never run on a GPU so far: compiled ahead of time and interpreted.
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
        ce_scale, zipf_scale = mean_scales(
            target, target_stride, correct, weight, totals, partials, N, C, ignore_index,
            HAS_WEIGHT, ONLY_CORRECT, TOTALS, D,
        )  # fmt: skip
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
        j = tl.arange(0, B)[None, :]
        inside = (j < body[:, None]) & row_ok[:, None]
        x = tl.load(logits + start[:, None] + j, mask=inside, other=-float("inf")).to(D)
        column = head[:, None] + j

        y = tl.load(target + row * target_stride, mask=row_ok, other=0)
        ignored = (y == ignore_index) | ~row_ok
        bad = (y < 0) | (y >= C)
        y = tl.minimum(tl.maximum(y, 0), C - 1)
        zy = tl.load(logits + row * stride + y, mask=row_ok, other=0).to(D)
        wy = tl.full([R], 1, D)
        if HAS_WEIGHT:
            wy = tl.load(weight + y)
        if LABEL == VOTES_LABEL:
            v, share, log_p, log_q, rest, bad_votes = votes_label(
                votes, votes_stride_n, votes_stride_p, log_mass, table_length, row, row_ok, y, C, P, scratch,
                R, P2, PAIRWISE, PAIR_BLOCK,
            )  # fmt: skip
            bad |= bad_votes
        elif HAS_VOTES:
            _, _, bad_votes = load_votes(votes, votes_stride_n, votes_stride_p, row, row_ok, C, P, P2)
            bad |= bad_votes
        bad &= ~ignored

        # Statistics over the non-target classes; the target becomes -inf, which adds to none of them.
        x = tl.where(column == y[:, None], -float("inf"), x)
        m = tl.max(x, 1)
        if EDGES:
            edge_column, edge_inside = edge_columns(head, body, C, V)
            edge_inside &= row_ok[:, None]
            edge_at = (row * stride)[:, None] + edge_column
            edge_x = tl.load(logits + edge_at, mask=edge_inside, other=-float("inf")).to(D)
            edge_x = tl.where(edge_column == y[:, None], -float("inf"), edge_x)
            m = tl.maximum(m, tl.max(edge_x, 1))
        safe_m = infinity_to_zero(m)
        e, s, t, finite, tw, w_sum, beaten = tile_sums(
            x, inside & (column != y[:, None]), column, y, zy, safe_m, weight, HAS_WEIGHT and SMOOTH
        )
        if EDGES:
            edge_counted = edge_inside & (edge_column != y[:, None])
            edge_e, edge_s, edge_t, edge_finite, edge_tw, edge_w_sum, edge_beaten = tile_sums(
                edge_x, edge_counted, edge_column, y, zy, safe_m, weight, HAS_WEIGHT and SMOOTH
            )
            s += edge_s
            t += edge_t
            finite += edge_finite
            tw += edge_tw
            w_sum += edge_w_sum
            beaten |= edge_beaten
        if LABEL == DENSE_LABEL:
            masses = log_mass + (row * mass_stride_n)[:, None]
            a = load_masses(masses, column, inside & (column != y[:, None]), mass_stride_c)
            top = tl.max(a, 1)
            if EDGES:
                edge_a = load_masses(masses, edge_column, edge_counted, mass_stride_c)
                top = tl.maximum(top, tl.max(edge_a, 1))
            safe_top = infinity_to_zero(top)
            p, total, entropy, cross = mass_sums(a, x, safe_top, safe_m)
            if EDGES:
                edge_p, edge_total, edge_entropy, edge_cross = mass_sums(edge_a, edge_x, safe_top, safe_m)
                total += edge_total
                entropy += edge_entropy
                cross += edge_cross

        # The losses.
        counted = ~ignored
        if ONLY_CORRECT:
            # A mean has asked correct_kernel already.
            counted &= tl.load(correct + row, mask=row_ok, other=0) != 0 if REDUCTION == MEAN else ~beaten
        ce_row = tl.zeros([R], D)
        zipf_row = tl.zeros([R], D)
        k1 = tl.zeros([R], D)
        gy = tl.zeros([R], D)
        if HAS_CE:
            if not HAS_WEIGHT:
                tw = tl.where(finite < C - 1, -float("inf"), t)
                w_sum = tl.zeros([R], D) + (C - 1)
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
            k1 += tl.where(counted, (gz + tl.zeros([R], D)) / s, 0.0)
            zipf_row = tl.where(counted, zipf_row, 0.0)
        ce_row = tl.where(ignored, 0.0, tl.where(bad, float("nan"), ce_row))
        zipf_row = tl.where(bad, float("nan"), zipf_row)
        if REDUCTION == NONE:
            tl.store(ce + row, ce_row, mask=row_ok)
            tl.store(zipf + row, zipf_row, mask=row_ok)
            tl.store(loss + row, ce_weight * ce_row + zipf_weight * zipf_row, mask=row_ok)
        else:
            ce_sum += ce_row
            zipf_sum += zipf_row

        # The gradient. It may lie over the logits: a barrier ends all reads of them, by all threads.
        if WITH_GRAD:
            tl.debug_barrier()
            silent = ignored
            if not HAS_CE:
                silent |= ~counted if HAS_ZIPF else row_ok
            silent &= ~bad
            spoilt = (silent | bad)[:, None]
            spoilt_value = tl.where(silent, 0.0, float("nan"))[:, None]
            label_scale = tl.zeros([R], D)
            if HAS_ZIPF:
                label_scale = tl.where(counted, gz + tl.zeros([R], D), 0.0)
            smooth_scale = gc * smoothing / C
            constant = tl.zeros([R], D)
            if LABEL == VOTES_LABEL:
                constant = label_scale * tl.exp(log_q)
            g = tl.fma(e, k1[:, None], -constant[:, None])
            if EDGES:
                edge_g = tl.fma(edge_e, k1[:, None], -constant[:, None])
            if LABEL == DENSE_LABEL:
                g = tl.fma(-label_scale[:, None], normalised(p, top, total, C - 1), g)
                if EDGES:
                    edge_g = tl.fma(-label_scale[:, None], normalised(edge_p, top, total, C - 1), edge_g)
            if HAS_CE and SMOOTH:
                w = load_weights(weight, column, inside, HAS_WEIGHT)
                g = tl.fma(-smooth_scale[:, None], w, g)
                if EDGES:
                    edge_w = load_weights(weight, edge_column, edge_inside, HAS_WEIGHT)
                    edge_g = tl.fma(-smooth_scale[:, None], edge_w, edge_g)
            g = tl.where(column == y[:, None], gy[:, None], g)
            g = tl.where(spoilt, spoilt_value, g)
            grad_start = row_vectors(row, C, C, V, EDGES)[1]
            tl.store(grad + grad_start[:, None] + j, narrow(g, grad.dtype.element_ty), mask=inside)
            if EDGES:
                edge_g = tl.where(edge_column == y[:, None], gy[:, None], edge_g)
                edge_g = tl.where(spoilt, spoilt_value, edge_g)
                at = (row * C)[:, None] + edge_column
                tl.store(grad + at, narrow(edge_g, grad.dtype.element_ty), mask=edge_inside)
            if LABEL == VOTES_LABEL:
                gv = tl.exp(zv - safe_m[:, None]) * k1[:, None] - label_scale[:, None] * tl.exp(log_p)
                if HAS_CE and SMOOTH:
                    gv -= smooth_scale * load_weights(weight, v, voted, HAS_WEIGHT)
                tl.debug_barrier()
                at = (row * C)[:, None] + v
                tl.store(grad + at, narrow(gv, grad.dtype.element_ty), mask=voted & ~spoilt)
    if REDUCTION != NONE:
        fold_losses(
            ce_sum, zipf_sum, ce_scale, zipf_scale, ce_weight, zipf_weight, loss, ce, zipf, sums, counter,
            HAS_CE, HAS_ZIPF, REDUCTION, D,
        )  # fmt: skip
