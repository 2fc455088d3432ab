"""The formulas of the loss that both of its kernels share: device functions over R rows at a time.

Never run on a GPU so far: compiled ahead of time for sm_80, sm_90 and sm_100, and run in Triton's
interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .label import INTERPRET

NONE, SUM, MEAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # reduction
NO_LABEL, VOTES_LABEL, DENSE_LABEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
INTERPRETED = tl.constexpr(INTERPRET)


@triton.jit
def infinity_to_zero(x):
    """-inf becomes 0: a maximum to subtract where there may be nothing to take it over."""
    return tl.where(x == -float("inf"), tl.zeros_like(x), x)


@triton.jit
def narrow(x, dtype: tl.constexpr):
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
def cross_entropy_of(m, s, zy, wy, tw, w_sum, C, smoothing, SMOOTH: tl.constexpr):
    """Cross-entropy of rows from their non-target statistics, all (R,).

    Returns the loss, the factor k with p_c a = exp(z_c - m) k, and the gradient p_y a - b_y at the target;
    a and b are 1 and [c = y] without weights and label smoothing.
    """
    top = tl.maximum(m, zy)
    c = tl.exp(m - top)
    ey = tl.exp(zy - top)
    total = s * c + ey
    log_total = tl.log(total)
    nll = log_total + (top - zy)
    loss = wy * nll
    a = wy
    by = wy
    if SMOOTH:
        share = smoothing / C
        loss = (1 - smoothing) * loss - share * (tw + w_sum * (m - top - log_total) - wy * nll)
        a = (1 - smoothing) * wy + share * (w_sum + wy)
        by = (1 - smoothing) * wy + share * wy
    return loss, a * c / total, ey / total * a - by


@triton.jit
def zipf_of_votes(m, s, t, finite, zv, share, log_p, log_q, rest, others):
    """L_zipf of rows whose label is q but for the votes' classes; (R,), and (R, P2) for what ends in v or p.

    The label is over `others` classes. t and finite leave -inf logits out; such a logit with mass makes the
    loss infinite.
    """
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    absent = zv == -float("inf")
    zero = tl.zeros_like(log_p)
    entropy = tl.sum(tl.where((share > 0) & (p > 0), share * p * log_p, zero), 1)
    entropy += tl.where((rest > 0) & (q > 0), rest * q * log_q, tl.zeros_like(q))
    d = zv - infinity_to_zero(m)[:, None]
    cross = q * t + tl.sum(tl.where((share > 0) & ~absent, share * (p - q[:, None]) * d, zero), 1)
    absent_votes = tl.sum(tl.where(absent, share, zero), 1)  # classes; each vote stands for 1/count of one
    absent_rest = others - finite - absent_votes > 0.5
    infinite = (absent_rest & (q > 0)) | (tl.max((absent & (share > 0) & (p > 0)).to(tl.int32), 1) > 0)
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


@triton.jit
def load_masses(masses, column, counted, mass_stride_c):
    """Log masses of columns, -inf where not counted."""
    at = column.to(tl.int64) * mass_stride_c
    return tl.load(masses + at, mask=counted, other=-float("inf"))


@triton.jit
def load_weights(weight, column, inside, HAS_WEIGHT: tl.constexpr):
    """Class weights of columns, or 1; ``weight`` points to the type of the arithmetic, read or not."""
    if HAS_WEIGHT:
        return tl.load(weight + column, mask=inside, other=0)
    else:
        return tl.full(column.shape, 1, weight.dtype.element_ty)
