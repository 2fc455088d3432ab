// Loss and gradient with a teacher's row in the place of the label (reference.distill_fwd).
//
// Over the classes c != y, with m = max z_c and m' = max t_c:
//
//     e_T = sum exp((z_c - m) / T),  e_1 at T = 1;  f_T, f_1 likewise of t
//     d   = sum exp((t_c - m') / T) ((t_c - m') - (z_c - m)), for "cross_entropy" of m - z_c
//     dz_c = A exp(z_c - m) + (B exp((z_c - m) / T) - D exp((t_c - m') / T))
//
// Losses, dz_y and A, B, D follow from these and z_y, t_y in float64: the rounding of a log odds is
// the relative error of a probability that is small.
#pragma once

#include "loss_math.cuh"

namespace zipfls::cuda {

// Sums of a row -----------------------------------------------------------------------------------

/// Which sums a call needs. kMore: with the options of DistillFwd::more.
template <class A, bool kMore>
struct DistillTerms {
  bool at_T, at_1, soft;   // those at T; those at 1 beside them; of these, the teacher's
  bool divergence, given;  // given: the teacher's row is probabilities
  A per_T;                 // 1 / T

  ZIPFLS_DEVICE static DistillTerms of(const DistillFwd& a) {
    DistillTerms terms;
    terms.given = kMore && a.probabilities;
    terms.at_T = a.kd_weight != 0 || a.tckd_weight != 0 || a.nckd_weight != 0;
    if (terms.probabilities()) terms.at_T = true;
    const bool same = terms.at_T && a.temperature == 1;  // the sums at 1 are those at T
    terms.soft = a.soft_target_weight != 0 && !same && !terms.probabilities();
    terms.at_1 = (a.ce || a.soft_target_weight != 0 || suppresses(a)) && !same;
    terms.divergence = a.divergence;
    terms.per_T = static_cast<A>(1 / a.temperature);
    return terms;
  }

  ZIPFLS_DEVICE bool probabilities() const { return kMore && given; }

  /// Whether there is the largest logit's term.
  ZIPFLS_DEVICE static bool suppresses(const DistillFwd& a) { return kMore && a.max_weight != 0; }

  /// exp((t - m') / T), which a probability is; 0 outside of the row.
  template <class T>
  ZIPFLS_DEVICE A mass(A t, A shift_t) const {
    if (probabilities()) return t == -infinity<A>() ? A(0) : t;
    return exp_element<T>((t - shift_t) * per_T);
  }
};

/// Sums over some of the classes c != y. m, m': their maxima, or 0 where those are -inf, as m' is
/// beside probabilities.
template <class T>
struct DistillSums {
  using A = Arithmetic<T>;
  enum { kStudentT, kTeacherT, kStudent1, kTeacher1, kCross, kSums };  // e_T, f_T, e_1, f_1, d
  A top[2] = {-infinity<A>(), -infinity<A>()};                         // max z_c, max t_c
  A sum[kSums] = {};

  /// Rebases the sums to maxima that are not below their own. Sums of no mass become 0.
  template <class Terms>
  ZIPFLS_DEVICE void rebase(const A (&to)[2], const Terms& terms) {
    const A lift = shift_of(top[0]) - shift_of(to[0]), lift_t = shift_of(top[1]) - shift_of(to[1]);
    const auto factor = [&](int k, A x) { return top[k] == -infinity<A>() ? A(0) : exp_of(x); };
    if (terms.at_T) {
      const A by = terms.probabilities() ? A(1) : factor(1, lift_t * terms.per_T),
              mass = sum[kTeacherT];
      const A ratio = terms.divergence ? lift_t - lift : -lift;
      sum[kCross] = by == 0 ? A(0) : by * (sum[kCross] + mass * ratio);
      sum[kTeacherT] = mass * by;
      sum[kStudentT] *= factor(0, lift * terms.per_T);
    }
    if (terms.at_1) sum[kStudent1] *= factor(0, lift);
    if (terms.soft) sum[kTeacher1] *= factor(1, lift_t);
    top[0] = to[0];
    top[1] = to[1];
  }

  /// Adds a class, whose logits are no larger than the maxima. A class at -inf in both rows, or
  /// without mass, adds 0.
  template <class Terms>
  ZIPFLS_DEVICE void add(A z, A t, A shift, A shift_t, const Terms& terms) {
    const A z_above = z - shift, t_above = t - shift_t;
    if (terms.at_T) {
      const A q = terms.template mass<T>(t, shift_t);
      sum[kStudentT] += exp_element<T>(z_above * terms.per_T);
      sum[kTeacherT] += q;
      if (q > 0) sum[kCross] += q * (terms.divergence ? t_above - z_above : -z_above);
    }
    if (terms.at_1) sum[kStudent1] += exp_element<T>(z_above);
    if (terms.soft) sum[kTeacher1] += exp_element<T>(t_above);
  }
};

/// The block's sums over a row, for each thread. y: the class left out. partial: (kSums, 32) A.
/// largest: the lowest of this thread's classes with the row's largest logit but y's, or C; kMore.
template <class T, bool kMore, class Share>
ZIPFLS_DEVICE DistillSums<T> distill_sums(Share& x, int32_t y,
                                          const DistillTerms<Arithmetic<T>, kMore>& terms,
                                          Arithmetic<T>* partial, int32_t& largest) {
  using A = Arithmetic<T>;
  constexpr int V = kVector<T>;
  DistillSums<T> sums;
  if constexpr (kMore) largest = x.row.C;
  x.for_parts([&](uint32_t part) {
    A top[2] = {sums.top[0], sums.top[1]};
    x.for_loaded(part, [&](uint32_t j, const A* z, const A* t) {
#pragma unroll
      for (int v = 0; v < V; v++) {
        if (x.row.column(j) + v == y) continue;
        if constexpr (kMore)
          if (z[v] > top[0]) largest = x.row.column(j) + v;
        top[0] = larger(top[0], z[v]);
        if (!terms.probabilities()) top[1] = larger(top[1], t[v]);
      }
    });
    sums.rebase(top, terms);
    const A shift = shift_of(top[0]), shift_t = shift_of(top[1]);
    x.for_loaded(part, [&](uint32_t j, const A* z, const A* t) {
#pragma unroll
      for (int v = 0; v < V; v++)
        if (x.row.column(j) + v != y) sums.add(z[v], t[v], shift, shift_t, terms);
    });
  });
  A top[2] = {sums.top[0], sums.top[1]};
  block_all_reduce(top, partial, [](A a, A b) { return larger(a, b); });
  if constexpr (kMore)
    if (sums.top[0] != top[0]) largest = x.row.C;
  sums.rebase(top, terms);
  block_all_reduce(sums.sum, partial, [](A a, A b) { return a + b; });
  return sums;
}

/// The least class of the block's threads. partial: (32,) float64.
ZIPFLS_DEVICE int32_t block_min(int32_t c, double* partial) {
  return static_cast<int32_t>(-block_all_reduce_max(-static_cast<double>(c), partial));
}

/// The teacher's largest class, for each thread: the lowest among equals; NaN is never the largest,
/// and a row of nothing else has class 0. partial: (32,) float64.
template <class A, class Share>
ZIPFLS_DEVICE int32_t largest_class(Share& x, double* partial) {
  A most = -infinity<A>();
  int32_t y = x.row.C;  // C: NaN all
  x.for_classes([&](int32_t c, A, A t) {
    if (t > most || (t == most && y == x.row.C)) {
      most = t;
      y = c;
    }
  });
  const double top = block_all_reduce_max(static_cast<double>(most), partial);
  if (static_cast<double>(most) != top) y = x.row.C;
  y = block_min(y, partial);
  return y == x.row.C ? 0 : y;
}

// Losses of a row ---------------------------------------------------------------------------------

/// What a log odds x says, each of full relative precision: p = s(x), s the sigmoid.
struct LogOdds {
  double p, rest;          // rest: 1 - p
  double log_p, log_rest;  // log p, log(1 - p)
  double sum, log_sum;     // of the classes c != y, that x is relative to; 0 both without mass
};

/// Of a target with logit z, m included, and the others' sum.
ZIPFLS_DEVICE LogOdds log_odds(double z, double sum) {
  const double x = z - ::log(sum);
  const double e = ::exp(-::fabs(x)), above = ::log1p(e), large = 1 / (1 + e), small = e / (1 + e);
  const bool ahead = x > 0;
  LogOdds odds;
  odds.p = ahead ? large : small;
  odds.rest = ahead ? small : large;
  odds.log_p = ahead ? -above : x - above;
  odds.log_rest = ahead ? -x - above : -above;
  odds.sum = sum;
  odds.log_sum = sum == 0 ? 0 : ::log(sum);
  return odds;
}

/// The same of a target with probability p beside the sum of the others', of a row of any sum; of
/// one of 0, 1. No logarithms.
ZIPFLS_DEVICE LogOdds odds_of_probability(double p, double sum) {
  const double total = p + sum;
  LogOdds odds = {};
  odds.p = total == 0 ? 1 : p / total;
  odds.rest = total == 0 ? 0 : sum / total;
  odds.sum = sum;
  return odds;
}

/// weight * x, 0 where the weight is 0, be x infinite or NaN.
ZIPFLS_DEVICE double times(double weight, double x) { return weight == 0 ? 0 : weight * x; }

/// A row's losses, and the factors of its gradient times a mean's.
template <class A>
struct DistillFactors {
  A ce, distillation;
  A at_target, A_1, B, D;
};

/// What finish_distillation needs for the options of DistillFwd::more.
struct DistillMore {
  double x_y;       // the target's logit less m
  double total;     // sum of a row of probabilities
  int32_t largest;  // the lowest class with the largest logit but y's
};

/// Args: odds: (4,) student and teacher at T, student and teacher at 1. d: DistillSums::kCross.
/// at_top: what is added to the gradient at more.largest; kMore.
template <class A, bool kMore>
ZIPFLS_DEVICE DistillFactors<A> finish_distillation(const DistillFwd& a, const Sample& sample,
                                                    const LogOdds* odds, double d, double step,
                                                    const DistillMore& more, A* at_top) {
  const LogOdds &u = odds[0], &v = odds[1], &u_1 = odds[2], &v_1 = odds[3];
  const double T = a.temperature;
  const auto mass = [](const LogOdds& x) { return x.sum == 0 ? 1 : x.sum; };  // else not below 1
  double ce = 0, distillation = 0, at_target = 0, A_1 = 0, B = 0, D = 0;
  const auto weight_of = [&](const void* rows) {
    if (rows == nullptr) return 1.0;
    const int64_t at = kMore ? sample.i * a.weight_stride : sample.i;
    return static_cast<double>(static_cast<const A*>(rows)[at]);
  };
  double share = 1, of_rest = 1;  // of_rest: what its weight is multiplied by
  if constexpr (kMore) {
    share = weight_of(a.share);
    if (a.probabilities) {
      if (a.share != nullptr && more.total == 0) share += weight_of(a.sample_weight);
      of_rest = more.total;
    }
  }
  if (a.ce || a.soft_target_weight != 0 || DistillTerms<A, kMore>::suppresses(a)) {
    double weight = a.ce_weight;
    if (a.ce) ce = -u_1.log_p;
    if (a.soft_target_weight != 0) {
      distillation = a.soft_target_weight * times(v_1.p, -u_1.log_p);
      weight += a.soft_target_weight * v_1.p;
    }
    if constexpr (kMore) {
      ce = times(share, ce);
      distillation = times(share, distillation);
      weight *= share;
    }
    at_target = -weight * u_1.rest;
    A_1 = -at_target / mass(u_1);
  }
  if (a.kd_weight != 0 || a.tckd_weight != 0 || a.nckd_weight != 0) {
    const double alpha = a.kd_weight + a.tckd_weight;                           // of TCKD
    const double beta = v.sum == 0 ? 0 : a.nckd_weight + a.kd_weight * v.rest;  // of NCKD
    double log_p = u.log_p, log_rest = u.log_rest, nckd = d / (T * mass(v)) + u.log_sum, tckd = 0;
    if (a.divergence) {
      log_p -= v.log_p;
      log_rest -= v.log_rest;
      nckd -= v.log_sum;
    }
    if (alpha != 0) tckd = -times(v.p, log_p) - times(v.rest, log_rest);
    double w = weight_of(a.sample_weight);
    if constexpr (kMore) w *= of_rest;
    distillation += T * T * times(w, alpha * tckd + times(beta, nckd));
    // Of p_y - q_y the difference of what is small.
    const double ahead = u.p > u.rest ? v.rest - u.rest : u.p - v.p;
    at_target += w * T * alpha * ahead;
    B = w * T * (beta + alpha * (u.rest - v.rest)) / mass(u);
    D = w * T * beta / mass(v);
  }
  const auto scaled = [&](double x) { return static_cast<A>(x * step); };
  if constexpr (kMore) {
    double added = 0;
    if (a.max_weight != 0) {
      const bool ahead =
          u_1.sum != 0 && (more.x_y < 0 || (more.x_y == 0 && more.largest < sample.y));
      const double w = a.max_weight * weight_of(a.sample_weight), none = u_1.p - u_1.p;
      distillation += times(w, (ahead ? -more.x_y : 0) + none);  // none: 0, or NaN
      added = ahead ? w : 0;
      at_target -= added;
    }
    *at_top = scaled(added);
  }
  return {static_cast<A>(ce), static_cast<A>(distillation),
          scaled(at_target),  scaled(A_1),
          scaled(B),          scaled(D)};
}

// The kernel --------------------------------------------------------------------------------------

/// Shared memory of a block beside BlockArea.
template <class T, bool kMore>
struct DistillArea {
  using A = Arithmetic<T>;
  A* partial;                  // (kSums, 32) A: of each warp
  LogOdds* odds;               // (4,)
  DistillFactors<A>* factors;  // (1,)
  A* at_top;                   // (1,); kMore

  ZIPFLS_HOST_DEVICE static DistillArea allocate(SmemAllocator& smem) {
    DistillArea area;
    area.partial = smem.allocate<A>(DistillSums<T>::kSums * kWarp);
    area.odds = smem.allocate<LogOdds>(4);
    area.factors = smem.allocate<DistillFactors<A>>(1);
    area.at_top = kMore ? smem.allocate<A>(1) : nullptr;
    return area;
  }
};

/// Loss and gradient of distillation; S: the teacher's type, T or A; kMore: with the options of
/// DistillFwd::more, which cost registers.
///
/// - Bytes: a row of logits (C itemsize) and of the teacher's from device memory; of rows that a
///   block does not hold, twice, and without a target three times. The gradient written once.
/// - Threads: 32 to 640 a row, rows by grid stride.
/// - The rows: in registers, kDistillVectors 16-byte vectors of logits and the teacher's same
///   classes a thread; longer rows in parts.
/// - Accumulators: float (float64: double), rebased from part to part. Then double: the log odds by
///   a lane each, the rest by one thread. Sums over rows: double. All in a fixed order.
/// - Hazards: factors are published, and z_y and t_y read, before the gradient, which may overwrite
///   the logits (and so a teacher that is the same memory); the next row's reductions separate its
///   factors from this row's.
template <class T, class S, bool kMore>
ZIPFLS_KERNEL(kDistillBlock<T>)
loss_distill_kernel(DistillFwd a) {
  using A = Arithmetic<T>;
  using Sums = DistillSums<T>;
  constexpr int V = kVector<T>;
  ZIPFLS_DYNAMIC_SHARED(shared, 16);
  SmemAllocator smem{shared};
  const auto block = BlockArea<A>::allocate(smem);
  const auto area = DistillArea<T, kMore>::allocate(smem);
  const auto terms = DistillTerms<A, kMore>::of(a);
  if (a.target != nullptr) {
    mean_scales<A>(a, block);
  } else {
    Totals totals;
    if (threadIdx.x == 0) totals.ce = totals.kept = totals.counted = static_cast<double>(a.N);
    publish_scales(a, block, totals);
  }

  for (int64_t i = blockIdx.x; i < a.N; i += gridDim.x) {
    Sample sample = {i, 0, true, false, false};
    if (a.target != nullptr) sample = load_sample(a, i);
    RowShare<T, S, kDistillVectors> x;
    {
      int64_t row = i;
      if (a.teacher_index != nullptr) {
        row = a.teacher_index[i];
        if (sample.live && static_cast<uint64_t>(row) >= static_cast<uint64_t>(a.table_rows)) {
          sample.live = false;
          sample.invalid = true;
        }
      }
      x.beside = static_cast<const S*>(a.teacher) + row * a.teacher_stride;  // read where live
    }
    x.row = RowVectors<T>::of(a, sample);
    if (!sample.live) {  // the same value everywhere; no logit is read
      if (threadIdx.x == 0) report_row(a, block, 0, sample, Finished<A>{});
#pragma unroll 1
      for (uint32_t j = threadIdx.x; a.grad != nullptr && j < x.row.count; j += blockDim.x) {
        A g[V];
#pragma unroll
        for (int v = 0; v < V; v++) g[v] = sample.invalid ? not_a_number<A>() : A(0);
        x.row.store(j, g);
      }
      continue;
    }
    if (x.parts() == 1) x.load(0);
    if (a.target == nullptr) sample.y = largest_class<A>(x, block.partial);
    int32_t largest = 0;
    const Sums sums = distill_sums<T, kMore>(x, sample.y, terms, area.partial, largest);
    if (terms.suppresses(a)) largest = block_min(largest, block.partial);
    const A shift = shift_of(sums.top[0]), shift_t = shift_of(sums.top[1]);
    const A e_T = sums.sum[Sums::kStudentT], f_T = sums.sum[Sums::kTeacherT],
            e_1 = sums.sum[Sums::kStudent1], f_1 = sums.sum[Sums::kTeacher1];

    if (threadIdx.x < kWarp) {
      const int k = static_cast<int>(threadIdx.x);
      if (k < 4) {
        const bool student = k % 2 == 0, at_T = k < 2;
        double z = student ? static_cast<double>(to_float(x.row.logits[sample.y]))
                           : static_cast<double>(to_float(x.beside[sample.y]));
        z = z == static_cast<double>(INFINITY) ? static_cast<double>(NAN) : z;
        z -= static_cast<double>(student ? shift : shift_t);
        A sum = student ? e_T : f_T;
        if (k == 2 && terms.at_1) sum = e_1;
        if (k == 3 && terms.soft) sum = f_1;
        area.odds[k] = !student && terms.probabilities()
                           ? odds_of_probability(z, static_cast<double>(f_T))
                           : log_odds(at_T ? z / a.temperature : z, static_cast<double>(sum));
      }
      __syncwarp(kAllLanes);
      if (k == 0) {
        const double d = static_cast<double>(sums.sum[Sums::kCross]);
        DistillMore more = {};
        if constexpr (kMore) {
          more.x_y = static_cast<double>(to_float(x.row.logits[sample.y])) - shift;
          more.total = static_cast<double>(to_float(x.beside[sample.y])) + f_T;
          more.largest = largest;
        }
        const auto factors = finish_distillation<A, kMore>(
            a, sample, area.odds, d, static_cast<double>(block.scales->zipf_step), more,
            area.at_top);
        Finished<A> f{};
        f.ce = factors.ce;
        f.zipf = factors.distillation;
        *area.factors = factors;
        report_row(a, block, 0, sample, f);
      }
    }
    __syncthreads();  // the factors are complete, and no logit is read by another thread

    if (a.grad == nullptr) continue;
    const DistillFactors<A> f = *area.factors;
    const A at_top = kMore ? *area.at_top : A(0);
    x.for_vectors([&](uint32_t j, const A* z, const A* t) {
      A g[V];
#pragma unroll
      for (int v = 0; v < V; v++) {
        A p = 0, q = 0;
        if (terms.at_T) {
          p = exp_element<T>((z[v] - shift) * terms.per_T);
          q = terms.template mass<T>(t[v], shift_t);
        }
        const A e = terms.at_1 ? exp_element<T>(z[v] - shift) : p;
        g[v] = f.A_1 * e + (f.B * p - f.D * q);  // the difference first: of two classes it is 0
        if constexpr (kMore)
          if (x.row.column(j) + v == largest) g[v] += at_top;
        if (x.row.column(j) + v == sample.y) g[v] = f.at_target;
      }
      x.row.store(j, g);
    });
  }
  combine_losses<A>(a, block);
}

}  // namespace zipfls::cuda
