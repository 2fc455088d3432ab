"""The arithmetic of the loss: statistics of tiles and how they are merged, losses and gradients of rows.

A row's label is over S: for a class index y all classes but y, for probabilities t the classes whose t is the
row's least. Statistics of any part of a row (``Stats``) form a monoid: ``tile_stats`` of a tile, and
``merge``, which is ``rebase`` to a common base and ``add``. A held row is one tile; a streamed row merges its
tiles, or adds them up, where their base is FIXED.

A tile of held rows is (R, B), its statistics (R,). A tile of a streamed row is (K, G, V): 16-byte vectors of
V elements, K for each of G threads; it has statistics (G,), which ``sum_lanes`` adds up at the end. A tile is
WHOLE if all its elements are in the row, and none is the target's: it needs no masks.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .label import INTERPRETED

NONE, SUM, MEAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # reduction
NOT_WANTED, WRITTEN, KEPT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # the gradient
NO_LABEL, VOTES_LABEL, DENSE_LABEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2_E = tl.constexpr(1.44269502162933349609375)  # to float32
LN_2 = tl.constexpr(0.6931471805599453)


class Options(NamedTuple):
    """Compile-time options, as the device functions use them."""

    HELD: bool  # a row is one tile
    FIXED: bool  # a streamed row's base comes from some of its logits; sums are `folded`, until `unfold`
    SOFT: bool  # the target is a row of probabilities
    CE: bool  # there is a cross-entropy
    ZIPF: bool  # there is a Zipf term
    DENSE: bool  # its label is made from a mass for each class
    SMOOTH: bool  # label smoothing of the cross-entropy
    HAS_WEIGHT: bool  # class weights in it
    SUMS_LOGITS: bool  # the sum t is used
    FIND_CORRECT: bool  # which rows are classified correctly must be found here


class Rows(NamedTuple):
    """R rows of the arguments, (R,) each where nothing else is said."""

    logits: tl.tensor  # pointer
    target: tl.tensor  # pointer; SOFT
    row: tl.tensor  # number of the row
    stride: tl.tensor  # scalar, distance of rows of logits
    target_stride: tl.tensor  # scalar; of probabilities
    start: tl.tensor  # offset of the first whole vector of logits
    target_start: tl.tensor  # of probabilities
    head: tl.tensor  # columns before it
    body: tl.tensor  # columns in whole vectors
    ok: tl.tensor  # bool, the row is one
    y: tl.tensor  # the target's class
    zy: tl.tensor  # its logit
    masses: tl.tensor  # pointer to the row's log masses; DENSE
    mass_stride_c: tl.tensor  # scalar
    weight: tl.tensor  # pointer, to the type of the arithmetic, read or not
    smoothing: tl.tensor  # (1,)
    C: tl.tensor  # scalar


class Base(NamedTuple):
    """What statistics are relative to: their own exponentials are at most 1."""

    m: tl.tensor  # largest logit of S; FIXED: one near it
    mass_top: tl.tensor  # largest log mass of S; DENSE
    top: tl.tensor  # largest logit; SOFT and CE
    least: tl.tensor  # smallest probability, by which S is chosen; SOFT and ZIPF


class Stats(NamedTuple):
    """Statistics of a part of a row."""

    base: Base
    s: tl.tensor  # sum over S of exp(x - m)
    t: tl.tensor  # sum over S of x - m, where x is not -inf
    finite: tl.tensor  # number of those x; not SOFT: of all, until t is -inf and count_finite counts
    members: tl.tensor  # int32, number of classes in S; SOFT
    total: tl.tensor  # sum over S of e^a, a = log mass - mass_top; DENSE, as the next two
    entropy: tl.tensor  # sum over S of e^a a
    cross: tl.tensor  # sum over S of e^a (x - m)
    u: tl.tensor  # SOFT: sum of the target's weighted probabilities u; else, if smoothed, of S's weights u
    ux: tl.tensor  # sum of u (x - top); else of u (x - m)
    z: tl.tensor  # sum of exp(x - top); SOFT and CE
    flag: tl.tensor  # int32; SOFT: a probability is NaN; else, FIND_CORRECT: a class beats the target


class Tile(NamedTuple):
    """A tile of rows as it was loaded, (R, B) or (K, G, V) each."""

    x: tl.tensor  # logits, -inf outside the row
    t: tl.tensor  # probabilities, NaN outside the row; SOFT
    column: tl.tensor
    inside: tl.tensor  # bool


class Factors(NamedTuple):
    """What the gradient of R rows is made of, (R,) each, with the weights of both parts in it."""

    in_s: tl.tensor  # of exp(x - m), in S
    folded: tl.tensor  # of the power of 2 that stands for it; FIXED
    elsewhere: tl.tensor  # of exp(x - top), outside S; SOFT
    label: tl.tensor  # of the label
    mass: tl.tensor  # of e^a, in S; DENSE
    constant: tl.tensor  # gradient by the label's constant, in S
    target: tl.tensor  # of the cross-entropy's target: of u if SOFT, else of the smoothed weights
    infinite: tl.tensor  # bool, sum u is infinite; SOFT
    invalid: tl.tensor  # bool, the gradient is not computed but set
    value: tl.tensor  # what to
    some_invalid: tl.tensor  # scalar bool


@triton.jit
def infinity_to_zero(x):
    """-inf becomes 0: a maximum to subtract where there may be nothing to take it over."""
    return tl.where(x == -float("inf"), tl.zeros_like(x), x)


@triton.jit
def to_float(x, dtype: tl.constexpr, o: tl.constexpr):
    """x in the type of the arithmetic; bfloat16 of FIXED rows in one step, not two."""
    if not INTERPRETED and o.FIXED and x.dtype == tl.bfloat16 and dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(dtype)


@triton.jit
def from_float(x, dtype: tl.constexpr):
    """x in the type of the gradient, to nearest even. The interpreter would cut float32 off to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def row_vectors(row, stride, C, V: tl.constexpr, EDGES: tl.constexpr):
    """Where the 16-byte vectors of rows lie, V elements each.

    Returns head (R,): columns before the first vector; start (R,): offset of that vector in the tensor; body
    (R,): columns in whole vectors. Without EDGES the host promises V | stride and V | C. Both forms multiply
    by V last, which is how the compiler learns that addresses and mask edges are multiples of V.
    """
    if EDGES:
        start = (row * stride + (V - 1)) // V * V
        head = (start - row * stride).to(tl.int32)
        body = (C - head) // V * V
    else:
        start = row * (stride // V * V)
        head = tl.zeros_like(row).to(tl.int32)
        body = C // V * V + head
    return head, start, body


@triton.jit
def of_rows(x, o: tl.constexpr):
    """x (R,) beside a tile.

    Beside votes (R, P2) it is x[:, None]. With the same shape here, Triton 3.6 distributes votes over threads
    like the tile of a streamed row: each vote in every warp.
    """
    return x[:, None] if o.HELD else x[None, :]


@triton.jit
def of_groups(x, VECTORS: tl.constexpr, o: tl.constexpr):
    """x (G,) beside a tile (K, G, V), or (R,) of rows beside a tile."""
    return x[:, None] if VECTORS else of_rows(x, o)


@triton.jit
def tile_sum(x, chosen=None):
    """Sums of a tile, (R,) or (G,); ``chosen`` (K, G): of those vectors alone."""
    if len(x.shape) == 3:
        x = tl.sum(x, 2)
        if chosen is not None:
            x = tl.where(chosen, x, tl.zeros_like(x))
        return tl.sum(x, 0)
    else:
        return tl.sum(x, 1)


@triton.jit
def tile_max(x):
    """Maxima of a tile, (R,) or (G,)."""
    if len(x.shape) == 3:
        return tl.max(tl.max(x, 2), 0)
    else:
        return tl.max(x, 1)


@triton.jit
def load_masses(tile, r):
    """Log masses of a tile, -inf outside the row."""
    at = tile.column.to(tl.int64) * r.mass_stride_c
    return tl.load(r.masses + at, mask=tile.inside, other=-float("inf"))


@triton.jit
def load_weights(r, column, inside, o: tl.constexpr):
    """Class weights of columns, or 1."""
    if o.HAS_WEIGHT:
        return tl.load(r.weight + column, mask=inside, other=0)
    else:
        return tl.full(column.shape, 1, r.weight.dtype.element_ty)


# Probabilities as targets ----------------------------------------------------------------------------


@triton.jit
def weighted_target(t, column, inside, r, o: tl.constexpr):
    """u_c = w_c t'_c of columns, where inside, and 0 elsewhere; t' = (1 - smoothing) t + smoothing / C."""
    if o.SMOOTH:
        t = tl.fma(t, 1 - r.smoothing, r.smoothing / r.C)
    t *= load_weights(r, column, inside, o)
    return tl.where(inside, t, tl.zeros_like(t))


@triton.jit
def share_times(u, d):
    """u d, and 0 where d is 0, for an infinite u too."""
    return tl.where(d == 0, tl.zeros_like(d), u * d)


@triton.jit
def not_zero(e, x, infinite):
    """Exponentials e of x, or 1 beside an infinite u, where one that rounds to 0 must not be 0."""
    return tl.where(infinite & (x > -float("inf")), tl.zeros_like(e) + 1, e)


# Statistics ------------------------------------------------------------------------------------------


@triton.jit
def no_base(G: tl.constexpr, DTYPE: tl.constexpr):
    """The base (G,) of nothing."""
    lowest = tl.full([G], -float("inf"), DTYPE)
    return Base(m=lowest, mass_top=lowest, top=lowest, least=-lowest)


@triton.jit
def no_stats(base, G: tl.constexpr, DTYPE: tl.constexpr):
    """The statistics (G,) of nothing: with no_base the monoid's neutral element."""
    zero = tl.zeros([G], DTYPE)
    none = tl.zeros([G], tl.int32)
    return Stats(
        base=base, s=zero, t=zero, finite=zero, members=none, total=zero, entropy=zero,
        cross=zero, u=zero, ux=zero, z=zero, flag=none,
    )  # fmt: skip


@triton.jit
def of_least(base, least, maximum, o: tl.constexpr):
    """A maximum over S, or -inf if a smaller probability has begun S anew."""
    if o.SOFT and o.ZIPF:
        maximum = tl.where(base.least == least, maximum, -float("inf"))
    return maximum


@triton.jit
def elements_of_s(tile, y, least, WHOLE: tl.constexpr, o: tl.constexpr):
    """Which elements of a tile are in S, for the least probability, beside the tile."""
    if o.SOFT:
        return (tile.t == least) & o.ZIPF
    elif WHOLE:
        return tl.full(tile.x.shape, 1, tl.int1)
    else:
        return tile.inside & (tile.column != of_rows(y.to(tl.int32), o))


@triton.jit
def logits_of_s(tile, in_s):
    """The logits of a tile's S, -inf elsewhere."""
    return tl.where(in_s, tile.x, -float("inf"))


@triton.jit
def masses_of_s(tile, in_s, r):
    """The log masses of a tile's S, -inf elsewhere."""
    return tl.where(in_s, load_masses(tile, r), -float("inf"))


@triton.jit
def tile_base(tile, floor, r, WHOLE: tl.constexpr, o: tl.constexpr):
    """The base of a tile and of what came before it, ``floor``: of rows (R,), or of (G,)."""
    m, mass_top, top, least = floor.m, floor.mass_top, floor.top, floor.least
    if o.SOFT and o.CE:
        top = tl.maximum(top, tile_max(tile.x))
    if o.SOFT and o.ZIPF:
        least = tl.minimum(least, -tile_max(-tile.t))
        m = of_least(floor, least, m, o)
        mass_top = of_least(floor, least, mass_top, o)
    if o.ZIPF or not o.SOFT:
        in_s = elements_of_s(tile, r.y, of_groups(least, len(tile.x.shape) == 3, o), WHOLE, o)
        m = tl.maximum(m, tile_max(logits_of_s(tile, in_s)))
        if o.DENSE:
            mass_top = tl.maximum(mass_top, tile_max(masses_of_s(tile, in_s, r)))
    return Base(m=m, mass_top=mass_top, top=top, least=least)


@triton.jit
def folded(m):
    """b = m log2 e, rounded, and what it lost: exp(x - m) = 2^(x log2 e - b) 2^-lost, one multiply-add."""
    b = m * LOG2_E
    return b, fused(m, LOG2_E, -b)


@triton.jit
def fused(x, y, z):
    """x y + z, rounded once in float32; the interpreter's tl.fma rounds twice."""
    if INTERPRETED and x.dtype == tl.float32:
        return (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def power_of_2(x):
    """2^x of float32, and 0 below 2^-126: one instruction, where tl.exp2 takes four."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def tile_stats(tile, base, r, WHOLE: tl.constexpr, FOLD: tl.constexpr, o: tl.constexpr, chosen=None):
    """The statistics of a tile, or of its ``chosen`` vectors, (G,) or (R,).

    Unless it is FIXED, ``base`` is not below the tile's own. FOLD: d = x log2 e - b and 2^d stand for x - m
    and its exponential, see `folded`. Returns also e = exp(x - m), or exp(x - top) outside S, and e^a, for
    the gradient of a held row.
    """
    VECTORS: tl.constexpr = len(tile.x.shape) == 3
    zero = tl.zeros_like(tile.x)
    none = tl.zeros_like(base.m)
    m, top = of_groups(base.m, VECTORS, o), of_groups(base.top, VECTORS, o)
    in_s = elements_of_s(tile, r.y, of_groups(base.least, VECTORS, o), WHOLE, o)
    s, t, finite, total, entropy, cross = none, none, none, none, none, none
    u_sum, ux, z = none, none, none
    members, flag = none.to(tl.int32), none.to(tl.int32)
    if o.SOFT:
        flag = tile_max(((tile.t != tile.t) & tile.inside).to(tl.int32))
        members = tile_sum(in_s.to(tl.int32))
        if o.CE:
            to_top = tile.x - infinity_to_zero(top)
            if not o.HELD:
                z = tile_sum(tl.exp(to_top))
            u = weighted_target(tile.t, tile.column, tile.inside, r, o)
            u_sum = tile_sum(u)
            ux = tile_sum(tl.where(tile.inside, share_times(u, to_top), zero))
    if o.HELD and o.SOFT and o.CE:
        d = tile.x - tl.where(in_s, infinity_to_zero(m), infinity_to_zero(top))
    else:
        d = logits_of_s(tile, in_s) - infinity_to_zero(m)
    if FOLD:
        d = fused(logits_of_s(tile, in_s), LOG2_E, -folded(m)[0])
    e = power_of_2(d) if FOLD else tl.exp(d)
    p = e
    if o.ZIPF or not o.SOFT:
        s = tile_sum(tl.where(in_s, e, zero) if o.HELD and o.SOFT and o.CE else e, chosen)
        present = logits_of_s(tile, in_s) > -float("inf") if o.SOFT else in_s
        t = tile_sum(tl.where(present, d, zero), chosen)
        if WHOLE and not o.SOFT:
            finite = none + tile.x.shape[0] * tile.x.shape[2]
        else:  # e >= 0 ties the sum to the threads that hold the tile
            finite = tile_sum((present & (e >= 0)).to(zero.dtype))
    if o.HELD and o.SOFT and o.CE:  # one exponential an element for both sums
        z = tile_sum(tl.where(in_s, zero, e)) + s * tl.exp(base.m - infinity_to_zero(base.top))
    if o.DENSE:
        a = masses_of_s(tile, in_s, r) - infinity_to_zero(of_groups(base.mass_top, VECTORS, o))
        p = tl.exp(a)
        total = tile_sum(p)
        entropy = tile_sum(tl.where(p > 0, p * a, zero))
        cross = tile_sum(tl.where(p > 0, p * d, zero))
    if not o.SOFT:
        if o.FIND_CORRECT:
            zy = of_rows(r.zy, o)
            earlier = in_s & (tile.column < of_rows(r.y, o))
            x = logits_of_s(tile, in_s)
            flag = tile_max(((x > zy) | (earlier & (x == zy))).to(tl.int32))
        if o.CE and o.SMOOTH and o.HAS_WEIGHT:
            w = tl.load(r.weight + tile.column, mask=tile.inside, other=0)
            w = tl.where(in_s, w, zero)  # a load summed at once breaks Triton 3.6's optimiser
            u_sum = tile_sum(w, chosen)
            ux = tile_sum(tl.where(in_s, w * d, zero), chosen)
    stats = Stats(
        base=base, s=s, t=t, finite=finite, members=members, total=total, entropy=entropy, cross=cross,
        u=u_sum, ux=ux, z=z, flag=flag,
    )  # fmt: skip
    return stats, e, p


@triton.jit
def unfold(a, r):
    """The statistics (R,) of rows from those that FOLD makes of all classes of S."""
    lost = folded(a.base.m)[1]
    t = tl.fma(a.t, LN_2, lost * (-LN_2 * (r.C - 1)))
    ux = tl.fma(a.ux, LN_2, lost * (-LN_2 * a.u))
    return Stats(
        base=a.base, s=a.s * power_of_2(-lost), t=t, finite=a.finite, members=a.members, total=a.total,
        entropy=a.entropy, cross=a.cross, u=a.u, ux=ux, z=a.z, flag=a.flag,
    )  # fmt: skip


@triton.jit
def count_finite(tile, base, r, o: tl.constexpr):
    """t and finite of a tile, relative to the base of the rows; not SOFT."""
    x = logits_of_s(tile, elements_of_s(tile, r.y, r.y, False, o))
    present = x > -float("inf")
    d = tl.where(present, x - infinity_to_zero(of_rows(base.m, o)), tl.zeros_like(x))
    return tile_sum(d), tile_sum(present.to(x.dtype))


@triton.jit
def shift_to(maximum, larger):
    """maximum - larger, and 0 where the maximum is -inf: sums of no elements need no rescaling."""
    return tl.where(maximum == -float("inf"), tl.zeros_like(maximum), maximum - larger)


@triton.jit
def scaled(x, factor):
    """x * factor, and 0 where the factor is: what has no mass left drops out, infinite or not."""
    return tl.where(factor > 0, x * factor, tl.zeros_like(x))


@triton.jit
def rebase(a, base, o: tl.constexpr):
    """Statistics relative to larger maxima.

    As a larger maximum rescales sums of exponentials, a smaller least probability empties those over S.
    """
    m, mass_top = a.base.m, a.base.mass_top
    s, t, finite, members, ux, z = a.s, a.t, a.finite, a.members, a.ux, a.z
    total, entropy, cross = a.total, a.entropy, a.cross
    none = tl.zeros_like(s)
    if o.SOFT and o.CE:
        top_shift = shift_to(a.base.top, base.top)
        z *= tl.exp(top_shift)
        ux += share_times(a.u, top_shift)
    if o.SOFT and o.ZIPF:
        kept = a.base.least == base.least
        m = tl.where(kept, m, -float("inf"))
        s = tl.where(kept, s, none)
        t = tl.where(kept, t, none)
        finite = tl.where(kept, finite, none)
        members = tl.where(kept, members, 0)
        if o.DENSE:
            mass_top = tl.where(kept, mass_top, -float("inf"))
            total = tl.where(kept, total, none)
            entropy = tl.where(kept, entropy, none)
            cross = tl.where(kept, cross, none)
    if o.ZIPF or not o.SOFT:
        shift = shift_to(m, base.m)
        s *= tl.exp(shift)
        t = tl.fma(finite, shift, t)
        if o.DENSE:
            mass_shift = shift_to(mass_top, base.mass_top)
            factor = tl.exp(mass_shift)
            entropy = scaled(entropy + total * mass_shift, factor)
            cross = scaled(cross + total * shift, factor)
            total *= factor
        if o.CE and o.SMOOTH and o.HAS_WEIGHT and not o.SOFT:
            ux += a.u * shift
    return Stats(
        base=base, s=s, t=t, finite=finite, members=members, total=total, entropy=entropy, cross=cross,
        u=a.u, ux=ux, z=z, flag=a.flag,
    )  # fmt: skip


@triton.jit
def add(a, b):
    """Statistics of two parts with the same base."""
    return Stats(
        base=b.base, s=a.s + b.s, t=a.t + b.t, finite=a.finite + b.finite, members=a.members + b.members,
        total=a.total + b.total, entropy=a.entropy + b.entropy, cross=a.cross + b.cross,
        u=a.u + b.u, ux=a.ux + b.ux, z=a.z + b.z, flag=a.flag | b.flag,
    )  # fmt: skip


@triton.jit
def merge(a, b, o: tl.constexpr):
    """Statistics of two parts, the base of the second not below that of the first: see tile_base."""
    return add(rebase(a, b.base, o), b)


@triton.jit
def join(a, b, o: tl.constexpr):
    """The base of two parts."""
    least = tl.minimum(a.least, b.least)
    m = tl.maximum(of_least(a, least, a.m, o), of_least(b, least, b.m, o))
    mass_top = tl.maximum(of_least(a, least, a.mass_top, o), of_least(b, least, b.mass_top, o))
    return Base(m=m, mass_top=mass_top, top=tl.maximum(a.top, b.top), least=least)


@triton.jit
def join_lanes(base, o: tl.constexpr):
    """The base (1,) of a streamed row from those of its vectors."""
    least = tl.min(base.least, 0, keep_dims=True)
    m = tl.max(of_least(base, least, base.m, o), 0, keep_dims=True)
    mass_top = tl.max(of_least(base, least, base.mass_top, o), 0, keep_dims=True)
    return Base(m=m, mass_top=mass_top, top=tl.max(base.top, 0, keep_dims=True), least=least)


@triton.jit
def sum_lanes(a):
    """Statistics (1,) of a streamed row from those of its vectors, which have the same base, (1,)."""
    return Stats(
        base=a.base, s=tl.sum(a.s, 0, keep_dims=True), t=tl.sum(a.t, 0, keep_dims=True),
        finite=tl.sum(a.finite, 0, keep_dims=True), members=tl.sum(a.members, 0, keep_dims=True),
        total=tl.sum(a.total, 0, keep_dims=True), entropy=tl.sum(a.entropy, 0, keep_dims=True),
        cross=tl.sum(a.cross, 0, keep_dims=True), u=tl.sum(a.u, 0, keep_dims=True),
        ux=tl.sum(a.ux, 0, keep_dims=True), z=tl.sum(a.z, 0, keep_dims=True),
        flag=tl.max(a.flag, 0, keep_dims=True),
    )  # fmt: skip


# Losses of rows --------------------------------------------------------------------------------------


@triton.jit
def class_cross_entropy(stats, t, finite, wy, r, o: tl.constexpr):
    """Cross-entropy of rows with a class as target, from the statistics of the others, and its weight (R,).

    Returns the loss, the factor k with p_c a = exp(z_c - m) k, and the gradient p_y a - b_y at the target;
    a and b are 1 and [c = y] without weights and label smoothing.
    """
    zy, C, smoothing = r.zy, r.C, r.smoothing
    m = stats.base.m
    top = tl.maximum(m, zy)
    c = tl.exp(m - top)
    ey = tl.exp(zy - top)
    total = stats.s * c + ey
    log_total = tl.log(total)
    nll = log_total + (top - zy)
    loss = wy * nll
    a = wy
    by = wy
    if o.SMOOTH:
        tw, w_sum = stats.ux, stats.u
        if not o.HAS_WEIGHT:
            tw = tl.where(finite < C - 1, -float("inf"), t)
            w_sum = tl.zeros_like(wy) + (C - 1)
        share = smoothing / C
        loss = (1 - smoothing) * loss - share * (tw + w_sum * (m - top - log_total) - wy * nll)
        a = (1 - smoothing) * wy + share * (w_sum + wy)
        by = (1 - smoothing) * wy + share * wy
    return loss, a * c / total, ey / total * a - by


@triton.jit
def soft_cross_entropy(stats, o: tl.constexpr):
    """Cross-entropy of rows with probabilities as target.

    Returns the loss; factors of exp(z_c - m) in S and of exp(z_c - top) elsewhere; whether the sum of u is
    infinite. Beside an infinite u a p that rounds to 0 or 1 stands for one between: no infinity times 0.
    """
    infinite = tl.abs(stats.u) == float("inf")
    log_z = tl.log(stats.z)
    loss = stats.u * tl.where(infinite & (log_z == 0), 1.0, log_z) - stats.ux
    k = stats.u / stats.z
    k_s = k
    if o.ZIPF:
        k_s *= not_zero(tl.exp(stats.base.m - stats.base.top), stats.base.m, infinite)
    return loss, k_s, k, infinite


@triton.jit
def cross_entropy_of(stats, t, finite, wy, r, o: tl.constexpr):
    """The loss; factors of the exponentials in S and elsewhere; gradient at the target; infinite."""
    if o.SOFT:
        loss, k_s, k, infinite = soft_cross_entropy(stats, o)
        return loss, k_s, k, k, infinite
    else:
        loss, k_s, at_target = class_cross_entropy(stats, t, finite, wy, r, o)
        return loss, k_s, k_s, at_target, loss != loss  # the third and the last are not used


@triton.jit
def zipf_of_votes(m, s, t, finite, zv, share, p, q, entropy, rest, others):
    """L_zipf of rows whose label is q but for the votes' classes; (R,), and (R, P2): zv, share and p.

    The label is over `others` classes. t and finite leave -inf logits out; such a logit with mass makes the
    loss infinite.
    """
    absent = zv == -float("inf")
    zero = tl.zeros_like(p)
    d = zv - infinity_to_zero(m)[:, None]
    cross = q * t + tl.sum(tl.where((share > 0) & ~absent, share * (p - q[:, None]) * d, zero), 1)
    infinite = finite < others
    if tl.max(infinite.to(tl.int32), 0) > 0:
        absent_votes = tl.sum(tl.where(absent, share, zero), 1)  # classes: the shares of one add up to 1
        absent_rest = others - finite - absent_votes > 0.5
        with_mass = (absent & (share > 0) & (p > 0)).to(tl.int32)
        infinite = (absent_rest & (q > 0)) | (tl.max(with_mass, 1) > 0)
    return entropy - cross + tl.log(s) + tl.where(infinite, float("inf"), 0.0)


@triton.jit
def zipf_of_masses(s, t, finite, top, total, entropy, cross, others):
    """L_zipf of rows with a mass for each of the label's `others` classes, (R,).

    With a_c = log mass - top: total = sum e^a, entropy = sum e^a a, cross = sum e^a (z_c - m). Where no class
    has any mass, the label is uniform and t, the sum over finite z_c - m, serves instead of cross.
    """
    massless = top == -float("inf")
    others = tl.zeros_like(s) + others
    uniform = -tl.log(others) - tl.where(finite < others, -float("inf"), t) / others
    total = tl.where(massless, tl.zeros_like(total) + 1, total)
    return tl.where(massless, uniform, (entropy - cross) / total - tl.log(total)) + tl.log(s)


# Gradients -------------------------------------------------------------------------------------------


@triton.jit
def exponentials_again(tile, base, r, WHOLE: tl.constexpr, o: tl.constexpr):
    """e and e^a of tile_stats, relative to the base (R,) of the rows; of no use where S has none.

    A WHOLE tile's e is `folded`, if FIXED.
    """
    origin = infinity_to_zero(of_rows(base.m, o))
    if o.SOFT and o.CE:
        in_s = elements_of_s(tile, r.y, of_rows(base.least, o), False, o)
        origin = tl.where(in_s, origin, infinity_to_zero(of_rows(base.top, o)))
    if WHOLE and o.FIXED:
        e = power_of_2(fused(tile.x, LOG2_E, -folded(origin)[0]))
    else:
        e = tl.exp(tile.x - origin)
    p = e
    if o.DENSE:
        p = tl.exp(load_masses(tile, r) - infinity_to_zero(of_rows(base.mass_top, o)))
    return e, p


@triton.jit
def without_target(g, t, column, inside, factor, r, o: tl.constexpr):
    """g less what the cross-entropy's target has at columns, whose probabilities are t; ``factor`` as g."""
    if o.CE and o.SOFT:
        g = tl.fma(-factor, weighted_target(t, column, inside, r, o), g)
    elif o.CE and o.SMOOTH:
        g = tl.fma(-factor, load_weights(r, column, inside, o), g)
    return g


@triton.jit
def tile_gradient(tile, e, p, f, least, r, WHOLE: tl.constexpr, o: tl.constexpr):
    """Gradient of a tile, before the target's and the voted classes, from e and e^a of tile_stats.

    WHOLE: from those of exponentials_again; if FIXED, the gradient of no row is set.
    """
    g = e
    if o.CE and o.SOFT:
        e = not_zero(e, tile.x, of_rows(f.infinite, o))
    if o.ZIPF or not o.SOFT:
        g = tl.fma(e, of_rows(f.folded if WHOLE and o.FIXED else f.in_s, o), -of_rows(f.constant, o))
    if o.DENSE:
        g = tl.fma(-of_rows(f.mass, o), p, g)
    if o.SOFT:
        rest = tl.zeros_like(e)
        if o.CE:
            rest = e * of_rows(f.elsewhere, o)
        g = tl.where(elements_of_s(tile, r.y, of_rows(least, o), False, o), g, rest)
    g = without_target(g, tile.t, tile.column, tile.inside, of_rows(f.target, o), r, o)
    if not (WHOLE and o.FIXED) and f.some_invalid:
        g = tl.where(of_rows(f.invalid, o), of_rows(f.value, o), g)
    return g


@triton.jit
def voted_gradient(zv, v, voted, p, base, f, r, o: tl.constexpr):
    """Gradient (R, P2) at the votes' classes, all of S, from their logits and labels."""
    e = tl.exp(zv - infinity_to_zero(base.m)[:, None])
    if o.CE and o.SOFT:
        e = not_zero(e, zv, f.infinite[:, None])
    g = e * f.in_s[:, None] - f.label[:, None] * p
    t = base.least[:, None] + tl.zeros_like(g)
    return without_target(g, t, v, voted, f.target[:, None], r, o)
