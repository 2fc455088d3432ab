// Cross-entropy and distillation from a teacher's row, with the gradient (docs/SEMANTICS.md,
// "Distillation"; the formulas are those of reference.DistillRows).
//
// Bytes moved: both rows are read from memory once and the gradient is written once; the second and
// third pass find rows and exponentials in the core's cache. Three rows of scratch: exponentials at
// T of both networks, and the student's at 1. Arithmetic in A, float or double; sums in double, and
// so is all that is one number a row: the rounding of a log odds is the relative error of what is
// small beside the target.
#pragma once

#include "loss_kernel.h"
#include "row.h"
#include "soft_loss_kernel.h"

namespace zipfls::ZIPFLS_ISA {

/// e^x from e^(x / kPower); 0 where that is below the smallest normal number, as exp_lanes.
template <class A, int kPower>
ZIPFLS_INLINE Vec<A> raised(Vec<A> y) {
  using V = Vec<A>;
  constexpr bool kWide = sizeof(A) == 8;
  constexpr double kSquare = kWide ? 0x1p-511 : 0x1p-63;  // the roots of the smallest, rounded up
  constexpr double kFourth = kWide ? 0x1.6a09e667f3bcdp-256 : 0x1.6a09e8p-32;
  y = y < static_cast<A>(kPower == 2 ? kSquare : kFourth) ? V{} : y;
  y *= y;
  return kPower == 2 ? y : y * y;
}

/// log(1 + e^x).
ZIPFLS_INLINE double softplus(double x) {
  return x > 0 ? x + ::log1p(::exp(-x)) : ::log1p(::exp(x));
}

ZIPFLS_INLINE double sigmoid(double x) { return 1 / (1 + ::exp(-x)); }

/// weight * x, 0 where the weight is 0, be x infinite or NaN.
ZIPFLS_INLINE double times(double weight, double x) { return weight == 0 ? 0 : weight * x; }

/// Sums over the classes c != y: x of the student, t of the teacher, m and m' their largest.
struct DistillSums {
  double e_T, e_1;  // of exp((x_c - m) / T), exp(x_c - m)
  double f_T, f_1;  // of exp((t_c - m') / T), exp(t_c - m'); f_1 only where it is wanted
  double d;         // of exp((t_c - m') / T) ((t_c - m') - (x_c - m)), or of (m - x_c)
};

/// What the gradient of a row is made of, before its exponentials.
struct DistillFactors {
  double at_target;           // d / d x_y
  double per_hard;            // of exp(x_c - m)
  double per_exp, per_teach;  // of exp((x_c - m) / T), and of -exp((t_c - m') / T)
};

/// CE and distillation of row i into a's rows; the factors of the gradient.
///
/// Args: x_y, t_y: the target's logits less the row's largest other one, or t_y its probability.
/// share, w: the sample's weights of the cross-entropy and of the rest. beyond: what else is in the
/// loss.
template <bool kMore>
ZIPFLS_INLINE DistillFactors distill_terms(const DistillFwd& a, int64_t i, const DistillSums& s,
                                           double x_y, double t_y, double share, double w,
                                           double beyond) {
  const double T = a.temperature;
  const bool probabilities = kMore && a.probabilities;
  // A sum is 0 where all its classes are -inf, and otherwise not below 1; one of probabilities is
  // any.
  const double e = s.e_T < 1 ? 1 : s.e_T, e_1 = s.e_1 < 1 ? 1 : s.e_1,
               f = (probabilities ? s.f_T == 0 : s.f_T < 1) ? 1 : s.f_T;
  const double u = x_y / T - ::log(s.e_T), v = t_y / T - ::log(s.f_T), u_1 = x_y - ::log(s.e_1);
  double s_v = 0, r_v = 0, q_y = 0;  // the teacher's probability of the target, and of the others
  if (probabilities) {
    const double total = t_y + s.f_T;
    s_v = q_y = total == 0 ? 1 : t_y / total;
    r_v = total == 0 ? 0 : s.f_T / total;
    if (total == 0 && a.share != nullptr) share += w;
    w *= total;
  } else {
    if (a.soft_target_weight != 0) q_y = sigmoid(t_y - ::log(s.f_1));
    if (a.distils()) {
      s_v = sigmoid(v);
      r_v = sigmoid(-v);
    }
  }
  DistillFactors g{0, 0, 0, 0};
  double ce = 0, rest = beyond;
  if (a.hard()) {
    const double nll = softplus(-u_1);
    double along = a.ce_weight;
    if (a.ce_weight != 0) ce = times(share, nll);
    if (a.soft_target_weight != 0) {
      rest += a.soft_target_weight * times(share, times(q_y, nll));
      along += a.soft_target_weight * q_y;
    }
    g.at_target = -along * share * sigmoid(-u_1);
    g.per_hard = -g.at_target / e_1;
  }
  if (a.distils()) {
    const double alpha = a.kd_weight + a.tckd_weight;
    const double s_u = sigmoid(u), r_u = sigmoid(-u);
    const double beta = s.f_T == 0 ? 0 : a.nckd_weight + a.kd_weight * r_v;
    double log_p = -softplus(-u), log_not_p = -softplus(u), log_f = 0;
    if (!a.cross_entropy) {
      log_p += softplus(-v);
      log_not_p += softplus(v);
      log_f = ::log(f);
    }
    const double tckd = alpha == 0 ? 0 : -times(s_v, log_p) - times(r_v, log_not_p);
    const double nckd = s.d / (T * f) - log_f + ::log(e);
    rest += T * T * times(w, alpha * tckd + times(beta, nckd));
    g.per_teach = w * T * beta / f;
    g.per_exp = w * T * (beta + alpha * (r_u - r_v)) / e;
    g.at_target += w * T * alpha * (u > 0 ? r_v - r_u : s_u - s_v);
  }
  a.ce_rows[i] = ce;
  a.rest_rows[i] = rest;
  return g;
}

/// The lowest class but y whose logit in a row (C,) is the largest, `top`; 0 where none is.
template <class A, class U>
ZIPFLS_INLINE int64_t lowest_at(A top, const U* t, int64_t C, int64_t y) {
  constexpr int W = Lanes<A>::W;
  int64_t c = 0;
  while (c + W <= C && !any<A>(load(t + c) == top)) c += W;
  while (c < C && (value(t[c]) != top || c == y)) c++;
  return c < C ? c : 0;
}

/// The lowest class with the largest logit of a row (C,); NaN is never the largest.
template <class A, class U>
ZIPFLS_INLINE int64_t largest_class(const U* t, int64_t C) {
  return lowest_at<A>(max_nontarget<A>(t, C, C), t, C, C);
}

/// Row i; kPower is T where e^x is that power of e^(x / T), else 0. kMore: with the options of
/// DistillFwd::more.
template <class T, class U, int kPower, bool kMore>
ZIPFLS_INLINE void distill_row(const DistillFwd& a, const Scratch& scratch, int64_t i) {
  using A = decltype(value(T{}));
  using V = Vec<A>;
  constexpr int W = Lanes<A>::W;
  constexpr A kLowest = -static_cast<A>(INFINITY);
  const int64_t C = a.C;
  T* const grad_row = a.grad == nullptr ? nullptr : static_cast<T*>(a.grad) + i * C;  // (C,) T
  if (a.target != nullptr && a.target[i] == a.ignore_index) {
    a.ce_rows[i] = a.rest_rows[i] = 0;
    if (grad_row != nullptr) __builtin_memset(grad_row, 0, C * sizeof(T));
    return;
  }
  const T* const logits = static_cast<const T*>(a.logits) + i * a.logits_stride;  // (C,) T
  const int64_t source = a.teacher_index == nullptr ? i : a.teacher_index[i];
  const U* const teacher = static_cast<const U*>(a.teacher) + source * a.teacher_stride;  // (C,) U
  const T* const z = padded_row<A>(logits, C, scratch.padded[0]);
  const U* const t = padded_row<A>(teacher, C, scratch.padded[1]);
  const int64_t y = a.target != nullptr ? a.target[i] : largest_class<A>(t, C);
  A* const p = static_cast<A*>(scratch.row[0]);    // (C + W,) A, exp((z - m) / T)
  A* const q = static_cast<A*>(scratch.row[1]);    // (C + W,) A, exp((t - m') / T)
  A* const p_1 = static_cast<A*>(scratch.row[2]);  // (C + W,) A, exp(z - m), where they need an exp

  const bool probabilities = kMore && a.probabilities, suppresses = kMore && a.max_weight != 0;
  const A top = max_nontarget<A>(z, C, y), top_t = probabilities ? A(0) : max_nontarget<A>(t, C, y);
  const A m = top == kLowest ? A(0) : top, m_t = top_t == kLowest ? A(0) : top_t;
  const A per_T = static_cast<A>(1 / a.temperature), entropy = a.cross_entropy ? A(0) : A(1);
  const bool hard = a.hard(), soft_target = a.soft_target_weight != 0;
  auto at_one = [&](V x, V at_T) __attribute__((always_inline)) {
    if constexpr (kPower == 1) return at_T;
    if constexpr (kPower > 1) return raised<A, kPower>(at_T);
    return exp_lanes(x);
  };
  double sum[5];
  sum_nontarget<A, 5>(C, y, sum, [&](int64_t c, V(&x)[5]) __attribute__((always_inline)) {
    const V dz = load(z + c) - m, dt = load(t + c) - m_t;
    x[0] = exp_lanes(dz * per_T);
    x[1] = hard ? at_one(dz, x[0]) : V{};
    x[2] = probabilities ? dt : exp_lanes(dt * per_T);
    x[3] = soft_target && !probabilities ? at_one(dt, x[2]) : V{};
    x[4] = x[2] > A(0) ? x[2] * (entropy * dt - dz) : V{};  // classes without mass are skipped
    store(p + c, x[0]);
    store(q + c, x[2]);
    if (kPower == 0 && hard) store(p_1 + c, x[1]);
  });

  // +inf at the target makes the sample NaN, as it does elsewhere in the row.
  auto above = [](double x, double largest) __attribute__((always_inline)) {
    return x == INFINITY ? static_cast<double>(NAN) : x - largest;
  };
  auto weight_of = [&](const void* rows) __attribute__((always_inline)) {
    return rows == nullptr ? 1.0
                           : static_cast<double>(static_cast<const A*>(rows)[i * a.weight_stride]);
  };
  const double weight = weight_of(a.sample_weight), share = kMore ? weight_of(a.share) : 1.0;
  const double x_y = above(value(z[y]), m);
  // The largest logit's term: where it is not the target's, of which class.
  int64_t k = y;
  double step = 0, beyond = 0;
  if (suppresses) {
    if (sum[1] != 0 && x_y <= 0) k = lowest_at<A>(top, z, C, y);
    if (x_y == 0 && k > y) k = y;
    step = k == y ? 0 : a.max_weight * weight;
    const double odds = x_y - ::log(sum[1]);  // NaN where the row has one, or nothing else
    beyond = times(a.max_weight * weight, odds != odds ? NAN : k == y ? 0 : -x_y);
  }
  DistillFactors g = distill_terms<kMore>(a, i, {sum[0], sum[1], sum[2], sum[3], sum[4]}, x_y,
                                          above(value(t[y]), m_t), share, weight, beyond);
  if (grad_row == nullptr) return;

  T* const out = C < W ? static_cast<T*>(scratch.padded[0]) : grad_row;  // (C,) T
  const A per_hard = static_cast<A>(a.factor * g.per_hard);
  const A per_exp = static_cast<A>(a.factor * g.per_exp);
  const A per_teach = static_cast<A>(a.factor * g.per_teach);
  const bool distils = a.distils();
  for_blocks<A>(C, [&](int64_t c) __attribute__((always_inline)) {
    V step = {};
    if (distils) step = per_exp * load(p + c) - per_teach * load(q + c);
    if (hard) step += per_hard * (kPower == 0 ? load(p_1 + c) : at_one(V{}, load(p + c)));
    store(out + c, step);
  });
  if (kMore && k != y) {
    A at = 0;  // as above, with the step in it before it is rounded
    if (distils) at = per_exp * p[k] - per_teach * q[k];
    if (hard) at += per_hard * (kPower == 0 ? p_1[k] : p[k]);
    put(out + k, static_cast<A>(at + a.factor * step));
    g.at_target -= step;
  }
  put(out + y, static_cast<A>(a.factor * g.at_target));
  if (C < W) __builtin_memcpy(grad_row, out, C * sizeof(T));
}

/// Rows [begin, end). One function for each type of logits and teacher.
template <class T, class U>
void distill_fwd_kernel(const DistillFwd& a, const Scratch& scratch, int64_t begin, int64_t end) {
  auto rows = [&](auto row) __attribute__((always_inline)) {
    for (int64_t i = begin; i < end; i++) row(i);
  };
  if (a.more()) {
    if (a.temperature == 1)
      rows([&](int64_t i) { distill_row<T, U, 1, true>(a, scratch, i); });
    else
      rows([&](int64_t i) { distill_row<T, U, 0, true>(a, scratch, i); });
    return;
  }
  if (a.temperature == 1)
    rows([&](int64_t i) { distill_row<T, U, 1, false>(a, scratch, i); });
  else if (a.temperature == 2)
    rows([&](int64_t i) { distill_row<T, U, 2, false>(a, scratch, i); });
  else if (a.temperature == 4)
    rows([&](int64_t i) { distill_row<T, U, 4, false>(a, scratch, i); });
  else
    rows([&](int64_t i) { distill_row<T, U, 0, false>(a, scratch, i); });
}

}  // namespace zipfls::ZIPFLS_ISA
