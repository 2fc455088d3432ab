"""The arithmetic of distillation: sums of two rows over the classes but y, losses and gradients of samples.

As in loss_math.py, statistics of any part of a row (``Sums``) form a monoid, ``merge`` is ``rebase`` to a
common base and ``add``, and a tile is (G, W), its statistics (G,).

The losses are functions of the log odds u = log(p_y / (1 - p_y)) = (z_y - m) / T - log e. The relative error
of a small 1 - p_y = exp(-u) / (1 + exp(-u)) is the absolute error of u: 1e-6 in float32 where the target is
20 ahead. So exp(-|u|) is not taken of a rounded u: ``gap`` returns (z_y - m) / T as a sum of two numbers,
``exp_of`` its exponential, and e is a factor of that. In float64 the same would take every thread some
hundreds of double-precision instructions a row, more than its share of a row of 1000 classes.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .loss_math import Tile, infinity_to_zero, of_groups, of_rows, scaled, shift_to

# ln 2 in two parts, the first short enough for exact products with exponents.
LN2_SHORT, LN2_REST = tl.constexpr(0.693359375), tl.constexpr(-2.12194440054690583e-4)
LOG2_E = tl.constexpr(1.4426950408889634)
NO_COLUMN = tl.constexpr(2147483647)


class Options(NamedTuple):
    """Compile-time options, as the device functions use them."""

    HELD: bool  # a row is one tile
    FIXED: bool  # never; loss_kernel's loads ask
    SOFT: bool  # the teacher's row is read; loss_kernel's loads read a target of probabilities by this name
    CE: bool  # there is a cross-entropy, be its weight the teacher's probability; or MAX
    CE_BY_TEACHER: bool  # it has such a weight
    KD: bool  # there is a divergence of teacher and student
    AT_ONE: bool  # its temperature is 1, or there is none
    ENTROPY: bool  # it has the teacher's entropy in it: form "divergence"
    PROBABILITIES: bool  # the teacher's row is q times a sum of its own, and its base 0
    SHARES: bool  # a sample has a weight of the cross-entropy beside the other
    MAX: bool  # there is the largest logit's term


class Temperature(NamedTuple):
    """T, and 1 / T as the sum of two numbers."""

    T: tl.tensor
    inverse: tl.tensor
    rest: tl.tensor


class Base(NamedTuple):
    """What sums are relative to."""

    m: tl.tensor  # largest logit but y's
    m_t: tl.tensor  # the teacher's


class Sums(NamedTuple):
    """Sums over the classes but y of a part of a row: reference.DistillRows.sums."""

    base: Base
    e: tl.tensor  # of exp((z - m) / T)
    e_1: tl.tensor  # of exp(z - m); not AT_ONE
    f: tl.tensor  # of q = exp((t - m_t) / T)
    f_1: tl.tensor  # of exp(t - m_t); not AT_ONE
    d: tl.tensor  # of q ((t - m_t) - (z - m)), or of q (m - z)


class Exponentials(NamedTuple):
    """What the gradient of a tile (G, W) is made of; 0 at y."""

    p: tl.tensor  # exp((z - m) / T)
    p_1: tl.tensor  # exp(z - m)
    q: tl.tensor  # exp((t - m_t) / T)


class Odds(NamedTuple):
    """A target beside the other classes of its row, (R,) each."""

    x: tl.tensor  # (z_y - m) / T
    x_rest: tl.tensor  # what x was rounded by
    u: tl.tensor  # log odds
    p: tl.tensor  # probability of the target
    r: tl.tensor  # 1 - p
    minus_log_p: tl.tensor
    minus_log_r: tl.tensor


class Factors(NamedTuple):
    """What the gradient of R rows is made of, (R,) each: reference.DistillRows.gradient."""

    at_target: tl.tensor  # gradient at the target
    at_top: tl.tensor  # and what is added at the largest logit; MAX
    A: tl.tensor  # of p_1; CE
    B: tl.tensor  # of p; KD
    D: tl.tensor  # of q; KD


# Tiles -----------------------------------------------------------------------------------------------


@triton.jit
def teacher_in(tile, DTYPE: tl.constexpr, o: tl.constexpr):
    """A tile as loss_kernel loads it, the teacher's row in the type of the arithmetic, no mass outside."""
    t = tile.x
    if o.SOFT:
        t = tl.where(tile.inside, tile.t.to(DTYPE), 0.0 if o.PROBABILITIES else -float("inf"))
    return Tile(x=tile.x, t=t, column=tile.column, inside=tile.inside)


@triton.jit
def but_target(tile, y, o: tl.constexpr):
    """A tile with -inf at the targets y (R,), and no mass of the teacher's."""
    at_y = tile.column == of_rows(y, o)
    x = tl.where(at_y, -float("inf"), tile.x)
    t = tl.where(at_y, 0.0 if o.PROBABILITIES else -float("inf"), tile.t)
    return Tile(x=x, t=t, column=tile.column, inside=tile.inside)


@triton.jit
def argmax_combine(best, lowest, x, tile, VECTORS: tl.constexpr, o: tl.constexpr):
    """The largest of a row and its lowest column so far, with those of a tile's x or t; NaN is skipped."""
    top = tl.max(tl.where(x == x, x, -float("inf")), 1)
    there = tile.inside & (x == of_groups(top, VECTORS, o))
    first = tl.min(tl.where(there, tile.column, NO_COLUMN), 1)
    wins = (top > best) | ((top == best) & (first < lowest))
    return tl.where(wins, top, best), tl.where(wins, first, lowest)


# Sums ------------------------------------------------------------------------------------------------


@triton.jit
def no_base(G: tl.constexpr, DTYPE: tl.constexpr):
    """The base (G,) of nothing."""
    lowest = tl.full([G], -float("inf"), DTYPE)
    return Base(m=lowest, m_t=lowest)


@triton.jit
def no_sums(G: tl.constexpr, DTYPE: tl.constexpr):
    """The sums (G,) of nothing: the monoid's neutral element."""
    zero = tl.zeros([G], DTYPE)
    return Sums(base=no_base(G, DTYPE), e=zero, e_1=zero, f=zero, f_1=zero, d=zero)


@triton.jit
def tile_base(tile, floor, o: tl.constexpr):
    """The base of a tile and of what came before it, ``floor``."""
    m_t = floor.m_t
    if o.SOFT and not o.PROBABILITIES:
        m_t = tl.maximum(m_t, tl.max(tile.t, 1))
    return Base(m=tl.maximum(floor.m, tl.max(tile.x, 1)), m_t=m_t)


@triton.jit
def exponentials(tile, base, temperature, VECTORS: tl.constexpr, o: tl.constexpr):
    """Exponentials of a tile without its targets, and z - m, t - m_t."""
    x = tile.x - infinity_to_zero(of_groups(base.m, VECTORS, o))
    t = tile.t - infinity_to_zero(of_groups(base.m_t, VECTORS, o))
    if o.AT_ONE:
        p = tl.exp(x)
        p_1 = p
        q = tl.exp(t)
    else:
        p = tl.exp(x * temperature.inverse)
        p_1 = tl.exp(x)
        q = tl.exp(t * temperature.inverse)
    if o.PROBABILITIES:
        q = tile.t
    return Exponentials(p=p, p_1=p_1, q=q), x, t


@triton.jit
def tile_sums(tile, base, temperature, VECTORS: tl.constexpr, o: tl.constexpr):
    """The sums of a tile without its targets, and its exponentials; its ``base`` is not below its own."""
    exps, x, t = exponentials(tile, base, temperature, VECTORS, o)
    zero = tl.zeros_like(x)
    none = tl.sum(zero, 1)
    e_1, f, f_1, d = none, none, none, none
    if o.CE and not o.AT_ONE:
        e_1 = tl.sum(exps.p_1, 1)
    if o.SOFT:
        f = tl.sum(exps.q, 1)
    if o.CE_BY_TEACHER and not o.AT_ONE and not o.PROBABILITIES:
        f_1 = tl.sum(tl.exp(t), 1)
    if o.KD:
        ratio = t - x if o.ENTROPY else -x
        d = tl.sum(tl.where(exps.q > 0, exps.q * ratio, zero), 1)
    return Sums(base=base, e=tl.sum(exps.p, 1), e_1=e_1, f=f, f_1=f_1, d=d), exps


@triton.jit
def rebase(a, base, temperature, o: tl.constexpr):
    """Sums relative to larger maxima."""
    shift = shift_to(a.base.m, base.m)
    shift_t = shift_to(a.base.m_t, base.m_t)
    factor = tl.exp(shift * temperature.inverse)
    factor_t = tl.exp(shift_t * temperature.inverse)
    e_1, f, f_1, d = a.e_1, a.f, a.f_1, a.d
    if o.CE and not o.AT_ONE:
        e_1 *= tl.exp(shift)
    if o.SOFT:
        f *= factor_t
    if o.CE_BY_TEACHER and not o.AT_ONE:
        f_1 *= tl.exp(shift_t)
    if o.KD:
        d = scaled(tl.fma(a.f, shift_t - shift if o.ENTROPY else -shift, d), factor_t)
    return Sums(base=base, e=a.e * factor, e_1=e_1, f=f, f_1=f_1, d=d)


@triton.jit
def add(a, b):
    """Sums of two parts with the same base."""
    return Sums(base=b.base, e=a.e + b.e, e_1=a.e_1 + b.e_1, f=a.f + b.f, f_1=a.f_1 + b.f_1, d=a.d + b.d)


@triton.jit
def merge(a, b, temperature, o: tl.constexpr):
    """Sums of two parts, the base of the second not below that of the first: see tile_base."""
    return add(rebase(a, b.base, temperature, o), b)


@triton.jit
def join_lanes(base):
    """The base (1,) of a streamed row from those of its vectors."""
    return Base(m=tl.max(base.m, 0, keep_dims=True), m_t=tl.max(base.m_t, 0, keep_dims=True))


@triton.jit
def sum_lanes(a):
    """Sums (1,) of a streamed row from those of its vectors, which have the same base, (1,)."""
    return Sums(
        base=a.base, e=tl.sum(a.e, 0, keep_dims=True), e_1=tl.sum(a.e_1, 0, keep_dims=True),
        f=tl.sum(a.f, 0, keep_dims=True), f_1=tl.sum(a.f_1, 0, keep_dims=True),
        d=tl.sum(a.d, 0, keep_dims=True),
    )  # fmt: skip


# Losses of rows --------------------------------------------------------------------------------------


@triton.jit
def gap(zy, m, temperature):
    """(zy - m) / T as the sum of two numbers, the second 0 beside an infinite first."""
    s = zy - m
    minus_m = s - zy
    lost = (zy - (s - minus_m)) - (m + minus_m)
    x = s * temperature.inverse
    rest = tl.fma(s, temperature.inverse, -x) + tl.fma(lost, temperature.inverse, s * temperature.rest)
    return x, tl.where(tl.abs(x) < float("inf"), rest, 0.0)


@triton.jit
def exp_of(x, rest):
    """exp(x + rest) to a few units in the last place, for x of any size below 80."""
    if x.dtype == tl.float64:
        return tl.exp(x + rest)
    else:
        x = tl.where(x < -1000, -1000.0, x)
        n = tl.floor(x * LOG2_E + 0.5)
        return tl.exp((x - n * LN2_SHORT) - n * LN2_REST + rest) * tl.exp2(n)


@triton.jit
def log_of_1_plus(x):
    """log(1 + x) for x in [0, 1], in full precision."""
    w = 1 + x
    return tl.where(w == 1, x, tl.log(w) * (x / (w - 1)))


@triton.jit
def odds_of(zy, m, e, temperature):
    """The odds of targets with logits zy, beside others with the largest logit m and sum e; (R,) each."""
    zy = tl.where(zy == float("inf"), float("nan"), zy)
    m = tl.where(e == 0, zy, infinity_to_zero(m))  # no other class: nothing overflows
    x, rest = gap(zy, m, temperature)
    u = (x - tl.log(e)) + rest
    ahead = u >= 0
    v = exp_of(tl.where(ahead, -x, x), tl.where(ahead, -rest, rest))
    v = tl.where(ahead, v * e, v / e)  # exp(-|u|)
    one = tl.zeros_like(v) + 1
    log_1_v = log_of_1_plus(v)
    return Odds(
        x=x, x_rest=rest, u=u, p=tl.where(ahead, one, v) / (1 + v), r=tl.where(ahead, v, one) / (1 + v),
        minus_log_p=log_1_v + tl.maximum(-u, 0.0), minus_log_r=log_1_v + tl.maximum(u, 0.0),
    )  # fmt: skip


@triton.jit
def weighted(weight, x):
    """weight * x, 0 where the weight is 0, be x infinite or NaN."""
    return tl.where(weight == 0, tl.zeros_like(x), weight * x)


@triton.jit
def one_for_none(e):
    """Sums of exponentials, 1 in place of the 0 of no class."""
    return tl.where(e == 0, tl.zeros_like(e) + 1, e)


@triton.jit
def target_divergence(u, v, e, f, o: tl.constexpr):
    """TCKD of odds u and the teacher's v, with the sums e and f of the other classes.

    (log p of v) - (log p of u), plus 1 - p of v times the difference u - v of log odds; or the same of 1 - p
    where it is the larger. What is small stands beside nothing that is large.
    """
    cross = weighted(v.p, u.minus_log_p) + weighted(v.r, u.minus_log_r)
    if o.ENTROPY:
        u_v = ((u.x - v.x) + (u.x_rest - v.x_rest)) + tl.log(f / e)
        likely = (u.minus_log_p - v.minus_log_p) + weighted(v.r, u_v)
        unlikely = (u.minus_log_r - v.minus_log_r) - weighted(v.p, u_v)
        finite = tl.abs(u.u) < float("inf")
        cross = tl.where(finite, tl.where(v.u > 0, likely, unlikely), cross)
    return cross


@triton.jit
def odds_of_probabilities(p, f):
    """The odds of targets with probability p beside f of the others together, whose sum is any; 1 of none."""
    total = p + f
    empty = total == 0
    zero = tl.zeros_like(p)
    return Odds(
        x=zero, x_rest=zero, u=zero, p=tl.where(empty, 1.0, p / total), r=tl.where(empty, 0.0, f / total),
        minus_log_p=zero, minus_log_r=zero,
    )  # fmt: skip


@triton.jit
def losses_of(
    sums, zy, ty, share, w, ahead, ce_weight, kd_weight, tckd_weight, nckd_weight, soft_target_weight,
    max_weight, temperature, one, o: tl.constexpr,
):  # fmt: skip
    """CE and distillation of rows, and the factors of their gradient: reference.DistillRows.losses.

    zy, ty, share, w, ahead (R,): logits of the target, sample weights, and whether another class than the
    target is the largest; ``one``: the Temperature 1.
    """
    zero = tl.zeros_like(zy)
    ce, distillation, at_target, at_top, A, B, D = zero, zero, zero, zero, zero, zero, zero
    m, m_t, e, f = sums.base.m, sums.base.m_t, sums.e, sums.f
    u = odds_of(zy, m, e, temperature)
    w_max = w
    if o.PROBABILITIES and o.SOFT:
        total = ty + f
        if o.SHARES:
            share = tl.where(total == 0, share + w, share)
        w *= total
    if o.CE:
        e_1 = e if o.AT_ONE else sums.e_1
        student = u if o.AT_ONE else odds_of(zy, m, e_1, one)
        ce = student.minus_log_p
        if o.SHARES:
            ce = weighted(share, ce)
        a = ce_weight + zero
        if o.CE_BY_TEACHER:
            if o.PROBABILITIES:
                q_y = odds_of_probabilities(ty, f).p
            else:
                q_y = odds_of(ty, m_t, f if o.AT_ONE else sums.f_1, one).p
            distillation = soft_target_weight * weighted(q_y, ce)
            a += soft_target_weight * q_y
        if o.SHARES:
            a *= share
        at_target = -a * student.r
        A = a * student.r / one_for_none(e_1)
        if o.MAX:
            at_top = tl.where(ahead, max_weight * w_max, zero)
            gap = tl.where(ahead, m - zy, zero)
            gap = tl.where(student.u == student.u, gap, float("nan"))
            distillation += weighted(max_weight * w_max, gap)
            at_target -= at_top
    if o.KD:
        v = odds_of_probabilities(ty, f) if o.PROBABILITIES else odds_of(ty, m_t, f, temperature)
        alpha = kd_weight + tckd_weight
        beta = tl.where(f == 0, 0.0, nckd_weight + kd_weight * v.r)
        e, f = one_for_none(e), one_for_none(f)
        tckd = target_divergence(u, v, e, f, o)
        nckd = sums.d / (f * temperature.T) + tl.log(e / f if o.ENTROPY else e)
        kd = weighted(w, weighted(alpha + zero, tckd) + weighted(beta, nckd))
        distillation += temperature.T * temperature.T * kd
        w *= temperature.T
        D = w * beta / f
        B = w * (beta + alpha * (u.r - v.r)) / e
        at_target += w * alpha * tl.where(u.u > 0, v.r - u.r, u.p - v.p)
    return ce, distillation, Factors(at_target=at_target, at_top=at_top, A=A, B=B, D=D)


# Gradients -------------------------------------------------------------------------------------------


@triton.jit
def tile_gradient(tile, e, f, y, k, o: tl.constexpr):
    """A exp(z - m) + (B exp((z - m) / T) - D exp((t - m_t) / T)) of a tile, and what there is at the target.

    The difference first, of two rounded products: of equal rows, and of two classes, it is 0.
    """
    g = tl.zeros_like(e.p)
    if o.KD:
        g = of_rows(f.B, o) * e.p - of_rows(f.D, o) * e.q
    if o.CE:
        g = tl.fma(e.p_1, of_rows(f.A, o), g)
    if o.MAX:
        g = tl.where(tile.column == of_rows(k, o), g + of_rows(f.at_top, o), g)
    return tl.where(tile.column == of_rows(y, o), of_rows(f.at_target, o), g)
