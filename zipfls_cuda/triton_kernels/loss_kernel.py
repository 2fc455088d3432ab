"""The kernel of the loss: logits, target and votes in, losses and gradient out."""

from __future__ import annotations

import triton
import triton.language as tl

from .label import label_of_ranks, load_votes, rank_of_votes, votes_label
from .loss_math import (
    DENSE_LABEL,
    KEPT,
    MEAN,
    NO_LABEL,
    NONE,
    NOT_WANTED,
    VOTES_LABEL,
    Base,
    Factors,
    Options,
    Rows,
    Tile,
    add,
    count_finite,
    cross_entropy_of,
    exponentials_again,
    folded,
    from_float,
    infinity_to_zero,
    join,
    join_lanes,
    merge,
    no_base,
    no_stats,
    of_rows,
    power_of_2,
    rebase,
    row_vectors,
    sum_lanes,
    tile_base,
    tile_gradient,
    tile_stats,
    to_float,
    unfold,
    voted_gradient,
    zipf_of_masses,
    zipf_of_votes,
)
from .loss_reduce import combine_losses, gradient_scales, mean_scales


@triton.jit
def load_tile(
    logits, target, start, target_start, j, head, body, row_ok, DTYPE: tl.constexpr, o: tl.constexpr,
    WHOLE: tl.constexpr = False,
):  # fmt: skip
    """Elements j of the whole vectors of rows; start, target_start, body (R,)."""
    at = logits + of_rows(start, o) + j
    target_at = target + of_rows(target_start, o) + j
    if WHOLE:
        inside = tl.full(j.shape, 1, tl.int1)
        x = to_float(tl.load(at), DTYPE, o)
        t = tl.load(target_at) if o.SOFT else x
    else:
        inside = (j < of_rows(body, o)) & of_rows(row_ok, o)
        x = to_float(tl.load(at, mask=inside, other=-float("inf")), DTYPE, o)
        t = tl.load(target_at, mask=inside, other=float("nan")) if o.SOFT else x
    return Tile(x=x, t=t, column=of_rows(head, o) + j, inside=inside)


@triton.jit
def load_edges(
    logits, target, row, stride, target_stride, head, body, row_ok, C, V: tl.constexpr, DTYPE: tl.constexpr,
    o: tl.constexpr,
):  # fmt: skip
    """Elements before and after the whole vectors, a tile (R, 2V)."""
    k = tl.arange(0, 2 * V)[None, :]
    before = k < V
    column = tl.where(before, k, of_rows(head + body, o) + k - V)
    inside = tl.where(before, k < of_rows(head, o), column < C) & of_rows(row_ok, o)
    x = tl.load(logits + of_rows(row * stride, o) + column, mask=inside, other=-float("inf")).to(DTYPE)
    t = x
    if o.SOFT:
        t = tl.load(target + of_rows(row * target_stride, o) + column, mask=inside, other=float("nan"))
    return Tile(x=x, t=t, column=column, inside=inside)


@triton.jit
def tile_of(r, j, WHOLE: tl.constexpr, o: tl.constexpr):
    """Elements j of the whole vectors of rows."""
    return load_tile(
        r.logits, r.target, r.start, r.target_start, j, r.head, r.body, r.ok, r.zy.dtype, o, WHOLE
    )


@triton.jit
def edges_of(r, V: tl.constexpr, o: tl.constexpr):
    """The other elements."""
    return load_edges(
        r.logits, r.target, r.row, r.stride, r.target_stride, r.head, r.body, r.ok, r.C, V, r.zy.dtype, o
    )


@triton.jit
def class_target(logits, stride, target, target_stride, weight, row, row_ok, C, ignore_index,
                 DTYPE: tl.constexpr, o: tl.constexpr):  # fmt: skip
    """The target's class, its logit and its weight; whether the row is ignored, and whether it is invalid."""
    wy = tl.full(row.shape, 1, DTYPE)
    if o.SOFT:
        return row, wy, wy, ~row_ok, ~row_ok
    else:
        y = tl.load(target + row * target_stride, mask=row_ok, other=0)
        ignored = (y == ignore_index) | ~row_ok
        invalid = (y < 0) | (y >= C)
        y = tl.minimum(tl.maximum(y, 0), C - 1)
        zy = tl.load(logits + row * stride + y, mask=row_ok, other=0).to(DTYPE)
        if o.HAS_WEIGHT:
            wy = tl.load(weight + y)
        return y, zy, wy, ignored, invalid


@triton.jit
def label_over_s(
    votes, votes_stride_n, votes_stride_p, log_mass, table_length, r, least, members, P, scratch,
    R: tl.constexpr, P2: tl.constexpr, SORTED: tl.constexpr, PLACES: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """votes_label over S: the classes but y, or the `members` classes (R,) whose probability is `least`."""
    if o.SOFT:
        v, place, stands, count, rank, K, bad = rank_of_votes(
            votes, votes_stride_n, votes_stride_p, r.row, r.ok, r.C, P, scratch, R, P2, SORTED, PLACES
        )
        t = tl.load(r.target + (r.row * r.target_stride)[:, None] + v, mask=stands, other=0)
        in_s = stands & (t == least[:, None])
        dtype: tl.constexpr = log_mass.dtype.element_ty
        share = tl.where(in_s, tl.full(count.shape, 1, dtype) / tl.maximum(count, 1).to(dtype), 0.0)
        rest = members - (tl.sum(share, 1) + 0.5).to(tl.int32)  # each vote stands for 1/count of a class
        share, p, q, entropy = label_of_ranks(log_mass, table_length, in_s, count, rank, K, rest)
        return v, place, share, p, q, entropy, rest, bad
    else:
        return votes_label(
            votes, votes_stride_n, votes_stride_p, log_mass, table_length, r.row, r.ok, r.y, r.C, P, scratch,
            R, P2, SORTED, PLACES,
        )  # fmt: skip


@triton.jit
def add_tile(vectors, r, j, WHOLE: tl.constexpr, o: tl.constexpr):
    """The statistics (G,) of a streamed row with those of one more tile."""
    tile = tile_of(r, j, WHOLE, o)
    base = tile_base(tile, vectors.base, r, WHOLE, o)
    stats, _, _ = tile_stats(tile, base, r, WHOLE, False, o)
    return merge(vectors, stats, o)


@triton.jit
def running_stats(r, offset, end, at_y, V: tl.constexpr, EDGES: tl.constexpr, B: tl.constexpr,
                  G: tl.constexpr, o: tl.constexpr):  # fmt: skip
    """The statistics of a streamed row, whose base grows from tile to tile."""
    D: tl.constexpr = r.zy.dtype
    vectors = no_stats(no_base(G, D), G, D)
    for first in range(0, r.C // V * V, B):
        if o.FIXED:
            vectors = add_tile(vectors, r, first + offset, False, o)
        elif (first + B <= end) & ((at_y < first) | (at_y >= first + B)):
            vectors = add_tile(vectors, r, first + offset, True, o)
        else:
            vectors = add_tile(vectors, r, first + offset, False, o)
    base = join_lanes(vectors.base, o)
    if EDGES:
        edges = edges_of(r, V, o)
        base = join(base, tile_base(edges, no_base(1, D), r, False, o), o)
    stats = sum_lanes(rebase(vectors, base, o))
    if EDGES:
        stats = add(stats, tile_stats(edges, base, r, False, False, o)[0])
    return stats


@triton.jit
def fixed_stats(r, offset, end, at_y, V: tl.constexpr, EDGES: tl.constexpr, B: tl.constexpr,
                G: tl.constexpr, o: tl.constexpr):  # fmt: skip
    """The statistics of a streamed row, relative to the largest of G logits from all over it.

    They are of no use where the other logits are too far from it: where s is beyond 2^64 or below 2^-64. The
    target's vector is left out of its tile, which so is as whole as the others, and is then a tile itself.
    """
    D: tl.constexpr = r.zy.dtype
    column = tl.arange(0, G) * (r.C // G)
    x = tl.load(r.logits + r.row * r.stride + column, mask=r.ok & (column != r.y), other=-float("inf"))
    none = no_base(1, D)
    m = infinity_to_zero(tl.max(x.to(D), 0, keep_dims=True))
    base = Base(m=m, mass_top=none.mass_top, top=none.top, least=none.least)
    vectors = no_stats(base, G, D)
    first_of_y = tl.maximum(at_y, 0).to(tl.int32) // V * V
    K: tl.constexpr = B // (G * V)
    vector = tl.arange(0, K)[:, None] * (G * V) + tl.arange(0, G)[None, :] * V
    whole = end // B * B
    for first in range(0, whole, B):
        tile = tile_of(r, first + offset, True, o)
        chosen = first + vector != first_of_y
        vectors = add(vectors, tile_stats(tile, base, r, True, True, o, chosen)[0])
    if whole < end:
        tile = tile_of(r, whole + offset, False, o)
        chosen = (whole + vector != first_of_y) & (whole + vector < end)
        vectors = add(vectors, tile_stats(tile, base, r, True, True, o, chosen)[0])
    beside_y = tl.arange(0, (V + G - 1) // G)[:, None] * G + tl.arange(0, G)[None, :]
    tile = tile_of(r, first_of_y + beside_y[:, :, None], False, o)
    vectors = add(vectors, tile_stats(tile, base, r, False, True, o, beside_y < V)[0])
    stats = sum_lanes(vectors)
    if EDGES:
        stats = add(stats, tile_stats(edges_of(r, V, o), base, r, False, True, o)[0])
    return unfold(stats, r)


@triton.jit
def finite_of_rows(r, offset, base, V: tl.constexpr, EDGES: tl.constexpr, B: tl.constexpr, o: tl.constexpr):
    """t and finite of rows, read again because some of their logits are -inf; not SOFT."""
    t, finite = count_finite(tile_of(r, offset, False, o), base, r, o)
    if not o.HELD:
        for first in range(B, r.C // V * V, B):
            tile_t, tile_finite = count_finite(tile_of(r, first + offset, False, o), base, r, o)
            t += tile_t
            finite += tile_finite
        t, finite = tl.sum(t, 0, keep_dims=True), tl.sum(finite, 0, keep_dims=True)
    if EDGES:
        edge_t, edge_finite = count_finite(edges_of(r, V, o), base, r, o)
        t += edge_t
        finite += edge_finite
    return t, finite


@triton.jit
def store_gradient(grad, start, j, r, f, base, WHOLE: tl.constexpr, o: tl.constexpr):
    """The gradient of one tile of a streamed row, but for the target and the voted classes."""
    tile = tile_of(r, j, WHOLE, o)
    e, p = exponentials_again(tile, base, r, WHOLE, o)
    g = from_float(tile_gradient(tile, e, p, f, base.least, r, WHOLE, o), grad.dtype.element_ty)
    if WHOLE:
        tl.store(grad + of_rows(start, o) + j, g)
    else:
        tl.store(grad + of_rows(start, o) + j, g, mask=tile.inside)


@triton.jit
def loss_fwd_kernel(
    logits,  # (N, C) float16, bfloat16, float32 or float64, rows `stride` apart
    stride,
    target,  # (N,) int64, any stride; SOFT: (N, C) type of log_mass, rows `target_stride` apart
    target_stride,
    votes,  # (N, P) int32 or int64, any strides; HAS_VOTES
    votes_stride_n,
    votes_stride_p,
    log_mass,  # VOTES_LABEL: (table_length,) by rank; DENSE_LABEL: (N, C), any strides; float32 or float64
    table_length,
    mass_stride_n,
    mass_stride_c,
    weight,  # (C,) type of log_mass; HAS_WEIGHT
    correct,  # (N,) int32: the sample counts in L_zipf; ONLY_CORRECT and MEAN, or ONLY_CORRECT and SOFT
    totals,  # (3, partials) type of log_mass; PARTIAL_TOTALS. (1,) int32; COUNTED and ONLY_CORRECT
    partials,
    loss,  # (1,) or, for NONE, (N,), type of log_mass
    ce,  # as loss
    zipf,  # as loss
    grad,  # (N, C) type of logits; GRADIENT is WRITTEN
    factors,  # (N, 4) type of log_mass; KEPT, as the next
    patches,  # (N, P) type of logits
    grad_scale,  # (1,) type of log_mass; SCALED
    sums,  # (2, programs) scratch, type of log_mass; not NONE
    counter,  # (1,) int32, 0 before and after; not NONE
    scratch,  # (programs, 5 P2) int32; VOTES_LABEL and not SORTED
    N,
    C,
    P,
    steps,  # groups of R rows per program
    ignore_index,
    ce_weight: tl.float64,
    zipf_weight: tl.float64,
    smoothing: tl.float64,
    SOFT: tl.constexpr,  # the target is a row of probabilities
    HAS_CE: tl.constexpr,
    LABEL: tl.constexpr,
    HAS_VOTES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr,
    ONLY_CORRECT: tl.constexpr,
    REDUCTION: tl.constexpr,
    TOTALS: tl.constexpr,
    SCALED: tl.constexpr,
    GRADIENT: tl.constexpr,
    P2: tl.constexpr,
    SORTED: tl.constexpr,
    V: tl.constexpr,  # elements per 16 bytes, or 1 where rows of logits and gradient are not aligned alike
    EDGES: tl.constexpr,
    HELD: tl.constexpr,  # a row is one tile, B >= C
    R: tl.constexpr,  # rows at a time; 1 if not HELD
    B: tl.constexpr,  # elements of a tile's row, a power of two
    G: tl.constexpr,  # threads a streamed row; R if HELD
):
    """Loss and gradient of rows; a row is held in registers (HELD) or streamed twice, in tiles.

    Bytes: HELD: 2 C itemsize a row; else 3 C itemsize, of which the second read, in descending order, comes
    from L1 or L2; SOFT: the target, once or twice; 4 P of votes, and the logits of the voted classes again,
    from L1. A program takes R rows at a time, `steps` times; a thread holds R B / (32 warps) elements as
    float32 (float64 for float64). Accumulators: Stats, one for each row of a held tile, one for each thread
    of a streamed row. Elements outside whole vectors, fewer than 2V a row, are a tile of their own. Logits
    that are -inf show in the sum t, which is then taken again without them; FIXED: logits far from most
    others show in the sum s, and all sums are then taken again.

    Hazards: the gradient at the target and the voted classes is stored over that of the others, by other
    threads: a barrier stands between. Equal votes store equal values. The gradient may lie over the logits
    (loss_grad_): programs share no row, and a barrier stands between the reads of a group of rows, some of
    them by several threads, and its first store; after it a logit is read only to be overwritten by the same
    thread.

    A gradient that is KEPT is not written, but what loss_factors_bwd_kernel makes it of: of each row m, K1,
    K2 (loss.py) and the gradient at the target; and the gradient at the votes that stand for their class,
    NaN for the others. Not SOFT, not DENSE_LABEL, and not both SMOOTH and HAS_WEIGHT.
    """
    D: tl.constexpr = log_mass.dtype.element_ty
    KEEPS: tl.constexpr = GRADIENT == KEPT
    HAS_ZIPF: tl.constexpr = LABEL != NO_LABEL
    FIXED: tl.constexpr = not HELD and not SOFT and LABEL != DENSE_LABEL and tl.float64 != D
    o: tl.constexpr = Options(
        HELD=HELD, FIXED=FIXED, SOFT=SOFT, CE=HAS_CE, ZIPF=HAS_ZIPF, DENSE=LABEL == DENSE_LABEL,
        SMOOTH=SMOOTH, HAS_WEIGHT=HAS_WEIGHT, SUMS_LOGITS=HAS_ZIPF or (SMOOTH and not HAS_WEIGHT),
        FIND_CORRECT=ONLY_CORRECT and REDUCTION != MEAN and not SOFT,
    )  # fmt: skip
    LABEL_FIRST: tl.constexpr = HELD and not SOFT
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
        gc, gz = gradient_scales(ce_scale, zipf_scale, ce_weight, zipf_weight, grad_scale, HAS_CE, SCALED)
    ce_sum = tl.zeros([R], D)
    zipf_sum = tl.zeros([R], D)
    if HELD:
        offset = tl.arange(0, B)[None, :]
    else:
        K: tl.constexpr = B // (G * V)
        offset = tl.arange(0, K)[:, None, None] * (G * V) + tl.arange(0, V)[None, None, :]
        offset += tl.arange(0, G)[None, :, None] * V
    for step in range(0, steps):
        group = tl.program_id(0).to(tl.int64) * steps + step
        row = group * R + tl.arange(0, R)
        row_ok = row < N
        head, start, body = row_vectors(row, stride, C, V, EDGES)
        target_start = start
        if SOFT:
            target_start = row_vectors(row, target_stride, C, V, EDGES)[1]
        y, zy, wy, ignored, invalid = class_target(
            logits, stride, target, target_stride, weight, row, row_ok, C, ignore_index, D, o
        )
        # Beside an int64 class ptxas keeps what all threads of a streamed row share in uniform registers.
        if HELD and not SOFT:
            y = y.to(tl.int32)
        r = Rows(
            logits=logits, target=target, row=row, stride=stride, target_stride=target_stride, start=start,
            target_start=target_start, head=head, body=body, ok=row_ok, y=y, zy=zy,
            masses=log_mass + of_rows(row * mass_stride_n, o), mass_stride_c=mass_stride_c, weight=weight,
            smoothing=smoothing, C=C,
        )  # fmt: skip

        # The label of a held row comes first where it can: later, more would live through it.
        if LABEL == VOTES_LABEL and LABEL_FIRST:
            v, place, share, p_v, q, entropy, rest, bad_votes = label_over_s(
                votes, votes_stride_n, votes_stride_p, log_mass, table_length, r, zy, ignored, P, scratch,
                R, P2, SORTED, KEEPS, o,
            )  # fmt: skip

        # Statistics.
        end = tl.max(tl.where(row_ok, body, 0), 0)
        if HELD:
            tile = tile_of(r, offset, False, o)
            base = tile_base(tile, no_base(R, D), r, False, o)
            if EDGES:
                edges = edges_of(r, V, o)
                base = join(base, tile_base(edges, no_base(R, D), r, False, o), o)
            stats, e, p = tile_stats(tile, base, r, False, False, o)
            if EDGES:
                stats = add(stats, tile_stats(edges, base, r, False, False, o)[0])
        else:
            at_y = end if SOFT else tl.max(y - head, 0)
            if FIXED:
                stats = fixed_stats(r, offset, end, at_y, V, EDGES, B, G, o)
                near = (stats.s > 2.0**-64) & (stats.s < 2.0**64)
                if tl.min(near.to(tl.int32), 0) == 0:
                    stats = running_stats(r, offset, end, at_y, V, EDGES, B, G, o)
            else:
                stats = running_stats(r, offset, end, at_y, V, EDGES, B, G, o)
            base = stats.base
        t, finite = stats.t, stats.finite
        if not SOFT:
            finite = tl.zeros([R], D) + (C - 1)
            if o.SUMS_LOGITS:
                absent = (t == -float("inf")) | (t != t)
                if tl.max(absent.to(tl.int32), 0) > 0:
                    t, finite = finite_of_rows(r, offset, base, V, EDGES, B, o)

        # The label.
        members = stats.members
        if SOFT:
            invalid = stats.flag > 0
        else:
            members = tl.zeros([R], tl.int32) + (C - 1)
        if LABEL == VOTES_LABEL:
            if not LABEL_FIRST:
                v, place, share, p_v, q, entropy, rest, bad_votes = label_over_s(
                    votes, votes_stride_n, votes_stride_p, log_mass, table_length, r, base.least, members, P,
                    scratch, R, P2, SORTED, KEEPS, o,
                )  # fmt: skip
            invalid |= bad_votes
            voted = row_ok[:, None] & (share > 0)
            zv = tl.load(logits + (row * stride)[:, None] + v, mask=voted, other=0).to(D)
        elif HAS_VOTES:
            _, _, bad_votes = load_votes(votes, votes_stride_n, votes_stride_p, row, row_ok, C, P, P2)
            invalid |= bad_votes
        invalid &= ~ignored

        # The losses, and what the gradient is made of.
        counted = ~ignored
        if SOFT:
            counted &= members >= 2
        if ONLY_CORRECT:
            if o.FIND_CORRECT:
                counted &= stats.flag == 0
            else:
                counted &= tl.load(correct + row, mask=row_ok, other=0) != 0
        zero = tl.zeros([R], D)
        ce_row, zipf_row, k_s, k, at_target, infinite = zero, zero, zero, zero, zero, row_ok
        if HAS_CE:
            ce_row, k_s, k, at_target, infinite = cross_entropy_of(stats, t, finite, wy, r, o)
            k *= gc
            k_s *= gc
            at_target *= gc
        label_scale = zero
        if HAS_ZIPF:
            label_scale = tl.where(counted, gz + zero, 0.0)
            if LABEL == VOTES_LABEL:
                zipf_row = zipf_of_votes(
                    base.m, stats.s, t, finite, zv, share, p_v, q, entropy, rest, members
                )
            else:
                zipf_row = zipf_of_masses(
                    stats.s, t, finite, base.mass_top, stats.total, stats.entropy, stats.cross, members
                )
            k_s += tl.where(counted, (gz + zero) / stats.s, 0.0)
            zipf_row = tl.where(counted, zipf_row, 0.0)
        ce_row = tl.where(ignored, 0.0, tl.where(invalid, float("nan"), ce_row))
        zipf_row = tl.where(invalid, float("nan"), zipf_row)
        if REDUCTION == NONE:
            tl.store(ce + row, ce_row, mask=row_ok)
            tl.store(zipf + row, zipf_row, mask=row_ok)
            tl.store(loss + row, ce_weight * ce_row + zipf_weight * zipf_row, mask=row_ok)
        else:
            ce_sum += ce_row
            zipf_sum += zipf_row

        # The gradient. It may lie over the logits: a barrier ends all reads by all threads, but for those of
        # logits by the threads that overwrite them. The edges come first: what they need would live through
        # the loop.
        if GRADIENT != NOT_WANTED:
            if not KEEPS:
                tl.debug_barrier()
            zero_grad = ignored
            if not HAS_CE:
                zero_grad |= ~counted if HAS_ZIPF else row_ok
            zero_grad &= ~invalid
            constant, mass = zero, zero
            if LABEL == VOTES_LABEL:
                constant = label_scale * q
            if LABEL == DENSE_LABEL:  # uniform where no class has mass
                massless = base.mass_top == -float("inf")
                mass = tl.where(massless, 0.0, label_scale / stats.total)
                constant = tl.where(massless, label_scale / members.to(D), 0.0)
            some_invalid = tl.max((zero_grad | invalid).to(tl.int32), 0) > 0
            whole, k_folded = tl.where(some_invalid, 0, end // B), k_s
            if FIXED:
                lost = folded(infinity_to_zero(base.m))[1]
                whole = tl.where(tl.max(tl.abs(lost), 0) < 64, whole, 0)
                k_folded *= power_of_2(-lost)
            f = Factors(
                in_s=k_s, folded=k_folded, elsewhere=k, label=label_scale, mass=mass, constant=constant,
                target=gc + zero if SOFT else gc * smoothing / C + zero,
                infinite=infinite, invalid=zero_grad | invalid, value=tl.where(zero_grad, 0.0, float("nan")),
                some_invalid=some_invalid,
            )  # fmt: skip
            grad_start = row_vectors(row, C, C, V, EDGES)[1]
            T: tl.constexpr = logits.dtype.element_ty
            if EDGES and not KEEPS:
                edge = edges_of(r, V, o)
                edge_e, edge_p = exponentials_again(edge, base, r, False, o)
                edge_g = tile_gradient(edge, edge_e, edge_p, f, base.least, r, False, o)
                at = of_rows(row * C, o) + edge.column
                tl.store(grad + at, from_float(edge_g, T), mask=edge.inside)
            if LABEL == VOTES_LABEL:
                gv = voted_gradient(zv, v, voted, p_v, base, f, r, o)
            if KEEPS:
                shift = tl.where(zero_grad, -float("inf"), infinity_to_zero(base.m))
                at_row = factors + row * 4
                tl.store(at_row, tl.where(invalid, float("nan"), shift), mask=row_ok)
                tl.store(at_row + 1, k_s, mask=row_ok)
                tl.store(at_row + 2, constant + f.target if SMOOTH and HAS_CE else constant, mask=row_ok)
                tl.store(at_row + 3, at_target, mask=row_ok)
                if LABEL == VOTES_LABEL:
                    patch = tl.where(voted, gv, float("nan"))
                    there = (place < P) & row_ok[:, None]
                    tl.store(patches + (row * P)[:, None] + place, from_float(patch, T), mask=there)
            elif HELD:
                g = tile_gradient(tile, e, p, f, base.least, r, False, o)
                tl.store(grad + of_rows(grad_start, o) + offset, from_float(g, T), mask=tile.inside)
            else:
                blocks = (C // V * V + B - 1) // B
                for i in range(0, blocks - whole if FIXED else blocks):
                    first = (blocks - 1 - i) * B
                    if not FIXED and first + B <= end:
                        store_gradient(grad, grad_start, first + offset, r, f, base, True, o)
                    else:
                        store_gradient(grad, grad_start, first + offset, r, f, base, False, o)
                if FIXED:
                    for i in range(0, whole):
                        first = (whole - 1 - i) * B
                        store_gradient(grad, grad_start, first + offset, r, f, base, True, o)
            if (LABEL == VOTES_LABEL or not SOFT) and not KEEPS:
                tl.debug_barrier()
            if not SOFT and not KEEPS:
                tl.store(grad + row * C + y, from_float(at_target, T), mask=row_ok & ~f.invalid)
            if LABEL == VOTES_LABEL and not KEEPS:
                at_votes = (row * C)[:, None] + v
                tl.store(grad + at_votes, from_float(gv, T), mask=voted & ~f.invalid[:, None])
    if REDUCTION != NONE:
        combine_losses(
            ce_sum, zipf_sum, ce_scale, zipf_scale, ce_weight, zipf_weight, loss, ce, zipf, sums, counter,
            HAS_CE, HAS_ZIPF, REDUCTION, D,
        )  # fmt: skip
