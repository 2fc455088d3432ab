"""The kernel of the distillation loss: logits, a teacher's logits and target in, losses and gradient out."""

from __future__ import annotations

import triton
import triton.language as tl

from .distill_math import (
    NO_COLUMN,
    Factors,
    Options,
    Temperature,
    add,
    argmax_combine,
    but_target,
    exponentials,
    join_lanes,
    losses_of,
    merge,
    no_base,
    no_sums,
    rebase,
    sum_lanes,
    teacher_in,
    tile_base,
    tile_gradient,
    tile_sums,
)
from .loss_kernel import load_edges, load_tile
from .loss_math import MEAN, NONE, from_float, of_rows, row_vectors
from .loss_reduce import combine_losses, gradient_scales, mean_scales


@triton.jit
def distill_fwd_kernel(
    logits,  # (N, C) z, float16, bfloat16, float32 or float64, rows `stride` apart
    stride,
    teacher,  # (N, C) t, or PROBABILITIES, any of these types, rows `teacher_stride` apart. BY_INDEX: (R, C)
    teacher_stride,
    teacher_index,  # (N,) int64, any stride; HAS_INDEX
    index_stride,
    table_rows,  # HAS_INDEX: where an index is outside [0, table_rows) the sample becomes NaN
    target,  # (N,) int64, any stride; HAS_TARGET
    target_stride,
    sample_weight,  # (N,) type of loss, any stride; HAS_WEIGHT. SHARES: (N, 2), rows contiguous
    weight_stride,
    totals,  # (3, partials) type of loss; PARTIAL_TOTALS
    partials,
    loss,  # (1,) or, for NONE, (N,), float32 or float64
    ce,  # as loss
    distillation,  # as loss
    grad,  # (N, C) type of logits; WITH_GRAD
    grad_scale,  # (1,) type of loss; SCALED
    sums,  # (2, programs) scratch, type of loss; not NONE
    counter,  # (1,) int32, 0 before and after; not NONE
    N,
    C,
    steps,  # groups of R rows per program
    ignore_index,
    ce_weight: tl.float64,
    kd_weight: tl.float64,
    tckd_weight: tl.float64,
    nckd_weight: tl.float64,
    soft_target_weight: tl.float64,
    max_weight: tl.float64,
    T: tl.float64,
    HAS_INDEX: tl.constexpr,
    BY_INDEX: tl.constexpr,  # the teacher's row of a sample is that of its index; not EDGES
    HAS_TARGET: tl.constexpr,  # else the teacher's largest class, the lowest of equal ones
    HAS_WEIGHT: tl.constexpr,
    SHARES: tl.constexpr,  # a weight of the cross-entropy and one of the rest
    HAS_CE: tl.constexpr,
    CE_BY_TEACHER: tl.constexpr,
    MAX: tl.constexpr,  # the largest logit's term
    KD: tl.constexpr,
    AT_ONE: tl.constexpr,
    ENTROPY: tl.constexpr,
    PROBABILITIES: tl.constexpr,  # the teacher's rows are these, not logits
    REDUCTION: tl.constexpr,
    TOTALS: tl.constexpr,
    SCALED: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    V: tl.constexpr,  # as for loss_fwd_kernel, and the teacher's rows aligned like those of the logits
    EDGES: tl.constexpr,
    HELD: tl.constexpr,  # a row is one tile, B >= C
    R: tl.constexpr,  # rows at a time; 1 if not HELD
    B: tl.constexpr,  # elements of a tile's row, a power of two
):
    """Loss and gradient of rows; both rows are held in registers (HELD) or streamed twice, in tiles.

    Bytes: HELD: C itemsize a row of logits and of gradient each, and the teacher's row; else both rows twice,
    the second time in descending order, from L1 or L2, and the teacher's once more without a target. A
    program takes R rows at a time, `steps` times; a thread holds R B / (32 warps) elements of both rows, then
    of their exponentials, as float32 (float64 for float64). Accumulators: Sums, one for each row of a held
    tile, one for each 16-byte vector of a streamed tile. Elements outside whole vectors, fewer than 2V a row,
    are a tile of their own. Hazards: the gradient over the logits (distill_grad_), as in loss_fwd_kernel.
    """
    D: tl.constexpr = loss.dtype.element_ty
    o: tl.constexpr = Options(
        HELD=HELD, FIXED=False, SOFT=KD or CE_BY_TEACHER or not HAS_TARGET or (PROBABILITIES and SHARES),
        CE=HAS_CE or CE_BY_TEACHER or MAX, CE_BY_TEACHER=CE_BY_TEACHER, KD=KD, AT_ONE=AT_ONE,
        ENTROPY=ENTROPY, PROBABILITIES=PROBABILITIES, SHARES=SHARES, MAX=MAX,
    )  # fmt: skip
    G: tl.constexpr = R if HELD else B // V
    W: tl.constexpr = B if HELD else V
    one = tl.full([1], 1, D)
    at_one = Temperature(T=one, inverse=one, rest=one - one)
    if AT_ONE:
        temperature = at_one
    else:
        wide = tl.full([1], T, tl.float64)
        inverse = (tl.full([1], 1, tl.float64) / wide).to(D)
        rest = tl.fma(-wide, inverse.to(tl.float64), tl.full([1], 1, tl.float64)) / wide
        temperature = Temperature(T=wide.to(D), inverse=inverse, rest=rest.to(D))
    ce_weight = tl.full([1], ce_weight, D)
    kd_weight = tl.full([1], kd_weight, D)
    tckd_weight = tl.full([1], tckd_weight, D)
    nckd_weight = tl.full([1], nckd_weight, D)
    soft_target_weight = tl.full([1], soft_target_weight, D)
    max_weight = tl.full([1], max_weight, D)
    scale = one
    gradient_scale = one
    if REDUCTION == MEAN:
        scale = mean_scales(
            target, target_stride, target, loss, totals, partials, N, C, ignore_index, False, False, TOTALS, D
        )[0]
        gradient_scale = gradient_scales(scale, scale, one, one, grad_scale, True, SCALED and WITH_GRAD)[0]
    ce_sum = tl.zeros([R], D)
    distillation_sum = tl.zeros([R], D)
    offset = tl.arange(0, B // W)[:, None] * W + tl.arange(0, W)[None, :]  # (1, B), or (G, V)
    for step in range(0, steps):
        group = tl.program_id(0).to(tl.int64) * steps + step
        row = group * R + tl.arange(0, R)
        row_ok = row < N
        head, start, body = row_vectors(row, stride, C, V, EDGES)
        teacher_row = row
        if HAS_INDEX:
            index = tl.load(teacher_index + row * index_stride, mask=row_ok, other=0)
            missing = (index < 0) | (index >= table_rows)
            if BY_INDEX:
                teacher_row = tl.minimum(tl.maximum(index, 0), table_rows - 1)
        teacher_start = row_vectors(teacher_row, teacher_stride, C, V, EDGES)[1]

        # Both rows, where they are held; their target.
        if HELD:
            whole = load_tile(logits, teacher, start, teacher_start, offset, head, body, row_ok, D, o)
            whole = teacher_in(whole, D, o)
        if HAS_TARGET:
            y = tl.load(target + row * target_stride, mask=row_ok, other=0)
            ignored = (y == ignore_index) | ~row_ok
            invalid = ((y < 0) | (y >= C)) & ~ignored
            y = tl.minimum(tl.maximum(y, 0), C - 1)
        else:
            ignored = ~row_ok
            invalid = row < 0
            best = tl.full([G], -float("inf"), D)
            lowest = tl.full([G], NO_COLUMN, tl.int32)
            if HELD:
                best, lowest = argmax_combine(best, lowest, whole.t, whole, False, o)
            else:
                for first in range(0, C // V * V, B):
                    seen = load_tile(
                        logits, teacher, start, teacher_start, first + offset, head, body, row_ok, D, o
                    )
                    seen = teacher_in(seen, D, o)
                    best, lowest = argmax_combine(best, lowest, seen.t, seen, True, o)
            row_best, y = best, lowest
            if not HELD:
                row_best = tl.max(best, 0, keep_dims=True)
                y = tl.min(tl.where(best == row_best, lowest, NO_COLUMN), 0, keep_dims=True)
            if EDGES:
                ends = load_edges(
                    logits, teacher, row, stride, teacher_stride, head, body, row_ok, C, V, D, o
                )
                ends = teacher_in(ends, D, o)
                row_best, y = argmax_combine(row_best, y, ends.t, ends, False, o)
            y = tl.where(y < C, y, 0).to(tl.int64)
        if HAS_INDEX:
            invalid = invalid | (missing & ~ignored)
        # Beside an int64 class ptxas keeps what all threads of a streamed row share in uniform registers.
        if HELD:
            y = y.to(tl.int32)
        zy = tl.load(logits + row * stride + y, mask=row_ok, other=0).to(D)
        ty = zy
        if o.SOFT:
            ty = tl.load(teacher + teacher_row * teacher_stride + y, mask=row_ok, other=0).to(D)

        # Sums. A held row's base is known before its sums; a streamed row's grows from tile to tile.
        if HELD:
            tile = but_target(whole, y, o)
            base = tile_base(tile, no_base(R, D), o)
        else:
            vectors = no_sums(G, D)
            top = tl.full([G], -float("inf"), D)
            top_column = tl.full([G], NO_COLUMN, tl.int32)
            for first in range(0, C // V * V, B):
                part = load_tile(
                    logits, teacher, start, teacher_start, first + offset, head, body, row_ok, D, o
                )
                part = but_target(teacher_in(part, D, o), y, o)
                part_sums = tile_sums(part, tile_base(part, vectors.base, o), temperature, True, o)[0]
                vectors = merge(vectors, part_sums, temperature, o)
                if MAX:
                    top, top_column = argmax_combine(top, top_column, part.x, part, True, o)
            base = join_lanes(vectors.base)
        if EDGES:
            edges = load_edges(logits, teacher, row, stride, teacher_stride, head, body, row_ok, C, V, D, o)
            edges = but_target(teacher_in(edges, D, o), y, o)
            base = tile_base(edges, base, o)
            # Before the sums of the tile: after them Triton 3.6 spilled.
            edge_sums = tile_sums(edges, base, temperature, False, o)[0]
        if HELD:
            row_sums, e = tile_sums(tile, base, temperature, False, o)
        else:
            row_sums = sum_lanes(rebase(vectors, base, temperature, o))
        if EDGES:
            row_sums = add(row_sums, edge_sums)

        # The largest logit but the target's, and its lowest column.
        k = y
        ahead = row < 0
        if MAX:
            if HELD:
                none = tl.full([R], -float("inf"), D)
                row_top, k = argmax_combine(none, tl.full([R], NO_COLUMN, tl.int32), tile.x, tile, False, o)
            else:
                row_top = tl.max(top, 0, keep_dims=True)
                k = tl.min(tl.where(top == row_top, top_column, NO_COLUMN), 0, keep_dims=True)
            if EDGES:
                row_top, k = argmax_combine(row_top, k, edges.x, edges, False, o)
            ahead = (zy < row_top) | ((zy == row_top) & (k < y))

        # The losses, and what the gradient is made of.
        w = tl.full([R], 1, D)
        share = w
        if SHARES:
            share = tl.load(sample_weight + row * weight_stride, mask=row_ok, other=0)
            w = tl.load(sample_weight + row * weight_stride + 1, mask=row_ok, other=0)
        elif HAS_WEIGHT:
            w = tl.load(sample_weight + row * weight_stride, mask=row_ok, other=0)
        ce_row, distillation_row, f = losses_of(
            row_sums, zy, ty, share, w, ahead, ce_weight, kd_weight, tckd_weight, nckd_weight,
            soft_target_weight, max_weight, temperature, at_one, o,
        )  # fmt: skip
        if not HAS_CE:
            ce_row = tl.zeros([R], D)
        ce_row = tl.where(ignored, 0.0, tl.where(invalid, float("nan"), ce_row))
        distillation_row = tl.where(ignored, 0.0, tl.where(invalid, float("nan"), distillation_row))
        if REDUCTION == NONE:
            tl.store(ce + row, ce_row, mask=row_ok)
            tl.store(distillation + row, distillation_row, mask=row_ok)
            tl.store(loss + row, ce_weight * ce_row + distillation_row, mask=row_ok)
        else:
            ce_sum += ce_row
            distillation_sum += distillation_row

        # The gradient. It may lie over the logits: a barrier ends all reads by all threads, but for those of
        # logits by the threads that overwrite them.
        if WITH_GRAD:
            tl.debug_barrier()
            f = Factors(
                at_target=f.at_target * gradient_scale, at_top=f.at_top * gradient_scale,
                A=f.A * gradient_scale, B=f.B * gradient_scale, D=f.D * gradient_scale,
            )  # fmt: skip
            unset = of_rows(ignored | invalid, o)
            value = of_rows(tl.where(ignored, tl.zeros([R], D), float("nan")), o)
            grad_start = of_rows(row_vectors(row, C, C, V, EDGES)[1], o)
            TYPE: tl.constexpr = grad.dtype.element_ty
            if EDGES:
                edge = load_edges(
                    logits, teacher, row, stride, teacher_stride, head, body, row_ok, C, V, D, o
                )
                edge = but_target(teacher_in(edge, D, o), y, o)
                edge_e = exponentials(edge, base, temperature, False, o)[0]
                edge_g = tl.where(unset, value, tile_gradient(edge, edge_e, f, y, k, o))
                tl.store(grad + of_rows(row * C, o) + edge.column, from_float(edge_g, TYPE), mask=edge.inside)
            if HELD:
                g = tl.where(unset, value, tile_gradient(tile, e, f, y, k, o))
                tl.store(grad + grad_start + offset, from_float(g, TYPE), mask=tile.inside)
            else:
                blocks = (C // V * V + B - 1) // B
                for i in range(0, blocks):
                    j = (blocks - 1 - i) * B + offset
                    again = load_tile(logits, teacher, start, teacher_start, j, head, body, row_ok, D, o)
                    again = but_target(teacher_in(again, D, o), y, o)
                    again_e = exponentials(again, base, temperature, False, o)[0]
                    again_g = tl.where(unset, value, tile_gradient(again, again_e, f, y, k, o))
                    tl.store(grad + grad_start + j, from_float(again_g, TYPE), mask=again.inside)
    if REDUCTION != NONE:
        combine_losses(
            ce_sum, distillation_sum, scale, scale, ce_weight, one, loss, ce, distillation, sums, counter,
            HAS_CE, True, REDUCTION, D,
        )  # fmt: skip
