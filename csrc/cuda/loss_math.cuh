// Stage 4: a row's statistics, losses and gradient factors, shared by the loss kernels.
//
// With m = max z_c, s = sum exp(z_c - m) and t = sum (z_c - m), the target left out of all three,
// and a label that is q for every class without a vote (MATH.md, "Why one pass is enough"):
//
//     L_zipf = sum p log p - (q t + sum_voted (p_c - q)(z_c - m)) + log s
//     dz_c   = exp(z_c - m) k1 - k2,   k1 = CE's a / (Z e^-m) + lambda / s,   k2 = lambda q
//
// for c without a vote; the gradient of at most P voted classes and of the target differs, and is
// patched. Kernels:
//
//   loss_fwd_kernel, loss_fwd_cluster_kernel  loss_rows.cuh: a row on chip, in 8 or 16 lanes, a
//                                             warp, a block or a cluster
//   loss_fwd_long_kernel                      loss_long.cuh: a row that is read twice
//   loss_general_kernel, loss_correct_kernel  loss_general.cuh: targets and labels class by class
//   loss_distill_kernel                       loss_distill.cuh: a teacher's row for a label
//   loss_totals_kernel                        loss_reduce.cuh: what a mean divides by
//   loss_bwd_kernel                           loss_bwd.cuh: the upstream gradient
//   loss_factors_bwd_kernel                   loss_factors.cuh: the gradient over the logits, from
//                                             the factors and patches that the first two kept
//
// The gradient may be written over the logits (LossFwd::grad == logits): a row belongs to one block
// (or cluster), and a barrier separates the row's last read of a logit that another thread
// overwrites from its first gradient. No pointer is __restrict__.
#pragma once

#include <type_traits>

#include "loss_reduce.cuh"
#include "tables.cuh"

namespace zipfls::cuda {

// Statistics of a row -----------------------------------------------------------------------------

/// Sums over (a part of) a row's non-target classes. shift: the largest logit, or 0 where that is
/// -inf.
template <class A>
struct RowStats {
  A max = -infinity<A>();  // -inf where there is no class, or none but -inf
  A sum_exp = 0;           // sum exp(z - shift)
  A sum = 0;               // sum (z - shift) over finite z
  A smooth = 0;            // sum w (z - shift) over all z: weighted label smoothing only
  A smooth_weight = 0;     // sum w, likewise
  int32_t finite = 0;      // classes whose logit is not -inf (NaN and +inf reach the sums anyway)
  int32_t misclassified = 0;  // classes that rank above the target; only_correct only
};

template <class A>
ZIPFLS_DEVICE A shift_of(A max) {
  return max == -infinity<A>() ? A(0) : max;
}

/// Takes one copy of a class out again that stands in the row twice, once in the target's place.
/// The other copy keeps sum_exp above 1 - 2^-23: nothing cancels.
template <class T, class A>
ZIPFLS_DEVICE void remove_copy(A z, RowStats<A>& stats) {
  if (z != -infinity<A>()) {
    const A above = z - shift_of(stats.max);
    stats.sum_exp -= exp_element<T>(above);
    stats.sum -= above;
    stats.finite--;
  }
}

/// One RowStats from those of WIDTH consecutive lanes; all lanes of the warp call.
template <int WIDTH, class A>
ZIPFLS_DEVICE RowStats<A> merge_lanes(RowStats<A> x, bool weighted, bool misclassified) {
  RowStats<A> all;
  all.max = warp_reduce_max<WIDTH>(x.max);
  const A lift = shift_of(x.max) - shift_of(all.max);
  // A part of -inf alone adds 0 whatever its shift; a NaN stays one.
  const A factor = x.max == -infinity<A>() ? A(0) : exp_of(lift);
  all.sum_exp = warp_reduce_sum<WIDTH>(x.sum_exp * factor);
  all.sum = warp_reduce_sum<WIDTH>(x.finite == 0 ? x.sum : x.sum + static_cast<A>(x.finite) * lift);
  all.finite = warp_reduce_sum<WIDTH>(x.finite);
  if (weighted) {
    const bool none = x.smooth_weight == 0;  // and 0 times an infinite lift would be NaN
    all.smooth = warp_reduce_sum<WIDTH>(none ? x.smooth : x.smooth + x.smooth_weight * lift);
    all.smooth_weight = warp_reduce_sum<WIDTH>(x.smooth_weight);
  }
  if (misclassified) all.misclassified = warp_reduce_sum<WIDTH>(x.misclassified);
  return all;
}

/// exp(x - shift) as one FFMA and one ex2: 2^(x log2 e - scaled). What rounding shift log2 e to
/// `scaled` changes is the same factor for all x, and known: `correction` takes it back. float64
/// subtracts and calls exp.
template <class T, class A = Arithmetic<T>>
struct ExpShift {
  static constexpr A kLog2E = static_cast<A>(1.44269504088896340736);
  static constexpr A kLn2 = static_cast<A>(0.69314718055994530942);
  static constexpr bool kFolded = sizeof(T) < 8;
  A shift;
  A scaled, error = 0, correction = 1;  // error: shift log2 e - scaled

  ZIPFLS_DEVICE explicit ExpShift(A shift_) : shift(shift_) {
    scaled = shift * kLog2E;
    if constexpr (kFolded) {
      error = ::fmaf(shift, kLog2E, -scaled);
      // shift log2 e overflows, or so does what it lost as a power of 2: x - shift need not.
      if (!(::fabsf(error) < 64)) {
        scaled = not_a_number<A>();
        error = 0;
      }
      correction = ptx::ex2_approx_ftz(-error);
    }
  }
  /// Whether above() is a number where x is.
  ZIPFLS_DEVICE bool usable() const { return scaled == scaled; }
  /// (x - shift) log2 e + error; float64: x - shift.
  ZIPFLS_DEVICE A above(A x) const {
    if constexpr (kFolded) {
      return ::fmaf(x, kLog2E, -scaled);
    } else {
      return x - shift;
    }
  }
  /// exp(x - shift) / correction, from above(x).
  ZIPFLS_DEVICE static A exp_above(A y) {
    if constexpr (kFolded) {
      return ptx::ex2_approx_ftz(y);
    } else {
      return exp_of(y);
    }
  }
  /// sum (x - shift) over COUNT elements, from the sum of above(x).
  template <int COUNT>
  ZIPFLS_DEVICE A natural(A sum) const {
    if constexpr (kFolded) {
      return ::fmaf(sum, kLn2, error * (-COUNT * kLn2));
    } else {
      return sum;
    }
  }
};

/// Adds COUNT logits to the sums, relative to e.shift, and turns x into exp(x - shift) /
/// e.correction. Elements that the sums leave out are -inf: columns outside the row.
template <class T, int COUNT = kVector<T>, class A>
ZIPFLS_DEVICE void add_vector(A* x, const ExpShift<T>& e, RowStats<A>& stats) {
  A z[COUNT], vector_sum = 0, vector_exp = 0;
#pragma unroll
  for (int v = 0; v < COUNT; v++) {
    z[v] = x[v];
    const A above = e.above(z[v]);
    x[v] = e.exp_above(above);
    vector_exp += x[v];
    vector_sum += above;
  }
  stats.finite += COUNT;
  if (!(vector_sum > -infinity<A>())) {  // rare, and so one test for all
    vector_exp = 0;
#pragma unroll
    for (int v = 0; v < COUNT; v++) {
      const A above = z[v] - e.shift;
      if constexpr (e.kFolded) x[v] = e.exp_above(above * e.kLog2E + e.error);
      vector_exp += x[v];
      const bool present = above != -infinity<A>();
      stats.sum += present ? above : A(0);
      stats.finite -= present ? 0 : 1;
    }
  } else {
    stats.sum += e.template natural<COUNT>(vector_sum);
  }
  stats.sum_exp += vector_exp * e.correction;
}

/// add_vector of COUNT vectors, adjacent in x, where e is usable. False: their logits are still to
/// be summed up, by add_present.
template <class T, int COUNT, class A>
ZIPFLS_DEVICE bool add_vectors(A* x, const ExpShift<T>& e, RowStats<A>& stats) {
  constexpr int kElements = COUNT * kVector<T>, kGroup = 8;  // elements added up together
  A sum = 0, sum_exp = 0;
#pragma unroll
  for (int first = 0; first < kElements; first += kGroup) {
    A group_sum = 0, group_exp = 0;
#pragma unroll
    for (int v = first; v < first + kGroup && v < kElements; v++) {
      const A above = e.above(x[v]);
      x[v] = e.exp_above(above);
      group_exp += x[v];
      group_sum += above;
    }
    sum += group_sum;
    sum_exp += group_exp;
    // Else ptxas begins with all sums at once, for which registers do not suffice.
    if (first + kGroup == kElements / 2) ptx::warp_sync();
  }
  stats.sum_exp += sum_exp * e.correction;
  if (!(sum > -infinity<A>())) return false;
  stats.finite += kElements;
  stats.sum += e.template natural<kElements>(sum);
  return true;
}

/// Adds those of a vector's logits that are not -inf to the sum of logits alone.
template <class T, class A>
ZIPFLS_DEVICE void add_present(const uint4& raw, const ExpShift<T>& e, RowStats<A>& stats) {
  A z[kVector<T>];
  unpack<T>(raw, z);
#pragma unroll
  for (int v = 0; v < kVector<T>; v++) {
    const A above = z[v] - e.shift;
    const bool present = above != -infinity<A>();
    stats.sum += present ? above : A(0);
    stats.finite += present ? 1 : 0;
  }
}

/// Sums that only some options need, class by class in a separate loop.
template <class A>
struct RareSums {
  const A* smooth_weight;  // (C,) A, or null
  bool misclassified;      // only_correct looks at the row
  int32_t y;
  A z_target;

  ZIPFLS_DEVICE bool wanted() const { return smooth_weight != nullptr || misclassified; }
  ZIPFLS_DEVICE void add(int32_t c, A z, A shift, RowStats<A>& stats) const {
    if (c == y) return;
    if (smooth_weight != nullptr) {
      stats.smooth += smooth_weight[c] * (z - shift);
      stats.smooth_weight += smooth_weight[c];
    }
    if (misclassified) stats.misclassified += z > z_target || (z == z_target && c < y);
  }
};

// One sample --------------------------------------------------------------------------------------

/// A row's target, before its logits are read.
struct Sample {
  int64_t i;
  int32_t y;     // target class; 0 where there is none to read
  bool live;     // not ignored, with a target inside the classes: only then are logits read
  bool ignored;  // loss and gradient 0
  bool invalid;  // an index outside the classes: loss and gradient NaN
};

/// A row i >= N, of a warp whose other rows exist, is ignored.
ZIPFLS_DEVICE Sample load_sample(const LossFwd& a, int64_t i) {
  const int64_t target = i < a.N ? a.target[i] : a.ignore_index;
  const bool ignored = target == a.ignore_index, inside = target >= 0 && target < a.C;
  const bool live = !ignored && inside;
  return {i, live ? static_cast<int32_t>(target) : 0, live, ignored, !ignored && !inside};
}

/// Cross-entropy of a row, and its share of the gradient before ce_step.
template <class A>
struct CrossEntropy {
  A loss;
  A per_exp;    // d loss / d z_c = exp(z_c - shift) per_exp - share w_c, c != y
  A at_target;  // d loss / d z_y
};

/// Adds the target to the other classes' statistics, without subtraction: exact where it dominates.
///
/// weight: w_y. others: sum w_c, others_sum: sum w_c (z_c - shift), over c != y. share: label
/// smoothing / C.
template <class A>
ZIPFLS_DEVICE CrossEntropy<A> cross_entropy_of(const RowStats<A>& stats, A z_target, A weight,
                                               A others, A others_sum, A smoothing, A share) {
  const A shift = shift_of(stats.max);
  const bool alone = stats.max == -infinity<A>();
  A nll, per_exp, rest,
      log_others;  // -log p_y; p_c / exp(z_c - shift); 1 - p_y; log p_c - (z_c - shift)
  if (z_target > stats.max || alone) {
    const A factor = alone ? A(0) : exp_of(stats.max - z_target);
    // z_y - z_y: 0, and NaN at an infinite z_y, as the softmax of an infinity is.
    const A other_exp = (alone ? stats.sum_exp : stats.sum_exp * factor) + (z_target - z_target);
    nll = log1p_of(other_exp);
    per_exp = factor / (1 + other_exp);
    rest = other_exp / (1 + other_exp);
    log_others = (shift - z_target) - nll;
  } else {
    const A total = stats.sum_exp + exp_of(z_target - shift), log_total = log_of_sum(total);
    nll = (shift - z_target) + log_total;
    per_exp = A(1) / total;
    rest = stats.sum_exp / total;
    log_others = -log_total;
  }
  if (smoothing == 0) return {weight * nll, weight * per_exp, -weight * rest};
  // Skipped, not multiplied by 0: the log probability of a masked class is -inf.
  const A loss =
      (1 - smoothing) * weight * nll - share * (others_sum + others * log_others - weight * nll);
  const A a = (1 - smoothing) * weight + share * (others + weight);
  return {loss, a * per_exp, share * others - a * rest};
}

/// A row's losses, and the factors of its gradient: exp(z_c - shift) per_exp - constant for a class
/// c without a vote.
template <class A>
struct Finished {
  A shift;
  A per_exp, constant;
  A at_target;
  A label_step;   // factor of p~ in the gradient
  A smooth_step;  // factor of w_c; 0 unless weighted label smoothing
  A fill_value;   // the whole gradient, where fill
  int32_t fill;
  A ce, zipf;
};

/// Losses and gradient factors from a row's statistics, without the label's part.
template <class A>
ZIPFLS_DEVICE Finished<A> finish_cross_entropy(const LossFwd& a, const Sample& sample,
                                               const RowStats<A>& stats, A z_target,
                                               const Scales<A>& scales, bool counted) {
  Finished<A> f{};
  f.shift = shift_of(stats.max);
  const A* const weight = static_cast<const A*>(a.weight);
  if (a.ce && sample.live) {
    const A w = weight == nullptr ? A(1) : weight[sample.y];
    const A smoothing = static_cast<A>(ptx::here(a.label_smoothing));
    const int32_t C = ptx::here(a.C);
    const A share = smoothing == 0 ? A(0) : smoothing / static_cast<A>(C);
    const A others = weight == nullptr ? static_cast<A>(C - 1) : stats.smooth_weight;
    const A others_sum = weight != nullptr        ? stats.smooth
                         : stats.finite < a.C - 1 ? -infinity<A>()
                                                  : stats.sum;
    const auto ce = cross_entropy_of(stats, z_target, w, others, others_sum, smoothing, share);
    f.ce = ce.loss;
    f.per_exp = scales.ce_step * ce.per_exp;
    f.at_target = scales.ce_step * ce.at_target;
    if (smoothing != 0) (weight == nullptr ? f.constant : f.smooth_step) = scales.ce_step * share;
  }
  if (a.zipf && counted) {
    f.label_step = scales.zipf_step;
    f.per_exp += scales.zipf_step / stats.sum_exp;
  }
  // A row that counts in no part has gradient 0 whatever its logits.
  f.fill = sample.ignored || sample.invalid || (!a.ce && !(a.zipf && counted));
  f.fill_value = sample.invalid ? not_a_number<A>() : A(0);
  return f;
}

/// Whether a row's Zipf part counts.
template <class A>
ZIPFLS_DEVICE bool counts(const LossFwd& a, const Sample& sample, const RowStats<A>& stats) {
  if (!sample.live || !a.only_correct) return sample.live;
  return a.correct != nullptr ? a.correct[sample.i] != 0 : stats.misclassified == 0;
}

/// Stores a row's losses, or adds them to those of the group's earlier rows: by one thread of the
/// group.
template <class A>
ZIPFLS_DEVICE void report_row(const LossFwd& a, const BlockArea<A>& block, int row_in_block,
                              const Sample& sample, const Finished<A>& f) {
  const A nan = not_a_number<A>();
  const A ce = sample.ignored ? A(0) : sample.invalid ? nan : f.ce;
  const A zipf = sample.ignored ? A(0) : sample.invalid ? nan : f.zipf;
  if (a.reduction != kNone) {
    block.sums[row_in_block] += static_cast<double>(ce);
    block.sums[kMostRows + row_in_block] += static_cast<double>(zipf);
  } else if (sample.i < a.N) {
    static_cast<A*>(a.ce_out)[sample.i] = ce;
    static_cast<A*>(a.zipf_out)[sample.i] = zipf;
    static_cast<A*>(a.loss)[sample.i] =
        static_cast<A>(a.ce_weight) * ce + static_cast<A>(a.zipf_weight) * zipf;
  }
}

/// Stores (shift, per_exp, constant, gradient at the target) of a row for loss_factors_bwd: by one
/// thread. The shift of a row without a gradient is -inf, of one that is NaN it is NaN.
template <class A>
ZIPFLS_DEVICE void keep_factors(const LossFwd& a, const Sample& sample, const Finished<A>& f) {
  if (a.factors == nullptr || sample.i >= a.N) return;
  A* const kept = static_cast<A*>(a.factors) + sample.i * kFactors;
  kept[0] = !f.fill ? f.shift : f.fill_value == 0 ? -infinity<A>() : f.fill_value;
  kept[1] = f.per_exp;
  kept[2] = f.constant;
  kept[3] = f.at_target;
}

/// Sums over a row's voted classes: over its votes, each with 1 / n of its class that has n, since
/// the order of the votes is fixed and that of the classes is not.
template <class A>
struct VotedSums {
  A cross = 0;  // sum (p_c - q)(z_c - m) of finite z_c; -inf where a class with a label has a logit
                // of -inf
  A absent = 0;  // classes with a logit of -inf

  /// above: z_c - m.
  ZIPFLS_DEVICE void add(A above, int32_t n, A label, A q) {
    const A share = A(1) / static_cast<A>(n);
    if (above == -infinity<A>()) {
      absent += share;
      if (label > 0) cross = -infinity<A>();
    } else {
      cross += (label - q) * above * share;
    }
  }
  template <int WIDTH>
  ZIPFLS_DEVICE void reduce() {
    cross = warp_reduce_sum<WIDTH>(cross);
    if (__ballot_sync(kAllLanes, absent != 0) != 0) absent = warp_reduce_sum<WIDTH>(absent);
  }
};

/// By a row's leading lanes: losses, gradient factors, and the gradient at its voted classes.
///
/// logit(c): z_c, in A. in_part(c): whether a class belongs to this block's part of the row. keeps:
/// whether this block stores what LossFwd::patches asks for.
template <class T, class Leaders, class A, class Logit, class InPart>
ZIPFLS_DEVICE Finished<A> finish_row(const LossFwd& a, const Sample& sample, RowStats<A> stats,
                                     A z_target, A entropy, const VoteTables<A>& t, int32_t P,
                                     const Scales<A>& scales, Logit logit, InPart in_part,
                                     bool keeps) {
  if (stats.finite == 1 && stats.sum_exp < 2) {  // the largest logit alone: exactly 1
    stats.sum_exp = 1;
    stats.sum = 0;
  }
  const bool counted = counts(a, sample, stats);
  Finished<A> f = finish_cross_entropy(a, sample, stats, z_target, scales, counted);
  if (!a.zipf) return f;

  const A q = t.label[0], smooth_constant = f.constant;
  VotedSums<A> voted;
  if (sample.live) {
    const bool patches = ptx::keep(a.grad != nullptr) != 0;
    keeps = ptx::keep(keeps && a.factors != nullptr) != 0;
    for_votes<Leaders>(t, P, [&](int32_t p, int32_t c, int32_t n, bool first) {
      if (c == sample.y) return;
      const A above = logit(c) - f.shift, label = t.label[n];
      voted.add(above, n, label, q);
      if (!keeps && !(patches && first && in_part(c))) return;
      const A constant = fused(f.label_step, label, smooth_constant);
      A g = fused(exp_element<T>(above), f.per_exp, -constant);
      if (f.smooth_step != 0) g -= f.smooth_step * static_cast<const A*>(a.weight)[c];
      if (keeps) {
        from_float(first ? g : not_a_number<A>(), static_cast<T*>(a.patches) + sample.i * P + p);
      } else {
        t.patch[p] = g;
      }
    });
  }
  voted.template reduce<Leaders::kLeaders>();
  const bool absent_rest = static_cast<A>(a.C - 1 - stats.finite) - voted.absent > A(0.5);
  if (counted) {
    f.zipf = entropy - (q * stats.sum + voted.cross) + log_of_sum(stats.sum_exp);
    if (absent_rest && q > 0) f.zipf += infinity<A>();
  }
  f.constant += f.label_step * q;
  return f;
}

// A row's vectors --------------------------------------------------------------------------------

/// The 16-byte vectors of one row of logits (and of its gradient, at the same phase). The row may
/// begin and end in the middle of a vector: vector j holds the columns from j V - phase on.
template <class T>
struct RowVectors {
  static constexpr int V = kVector<T>;
  const T* logits;  // (C,) T
  T* grad;          // (C,) T, or null
  int32_t C, phase;
  uint32_t count;  // vectors the row touches

  ZIPFLS_DEVICE static RowVectors of(const LossFwd& a, const Sample& sample) {
    RowVectors row;
    row.C = a.C;
    const int64_t i = sample.i < a.N ? sample.i : 0;
    row.logits = static_cast<const T*>(a.logits) + i * a.logits_stride;
    row.grad = a.grad == nullptr || sample.i >= a.N ? nullptr : static_cast<T*>(a.grad) + i * a.C;
    row.phase = static_cast<int32_t>(reinterpret_cast<uintptr_t>(row.logits) % 16 / sizeof(T));
    row.count = static_cast<uint32_t>(row.phase + int64_t{a.C} + V - 1) / V;
    return row;
  }
  ZIPFLS_DEVICE int32_t column(uint32_t j) const { return static_cast<int32_t>(j * V) - phase; }
  /// Vector j of the logits and of the gradient, where it is whole.
  ZIPFLS_DEVICE const uint4* vector(uint32_t j) const {
    return reinterpret_cast<const uint4*>(logits - phase) + j;
  }
  ZIPFLS_DEVICE uint4* grad_vector(uint32_t j) const {
    return reinterpret_cast<uint4*>(grad - phase) + j;
  }
  ZIPFLS_DEVICE bool has(int32_t c) const {
    return static_cast<uint32_t>(c) < static_cast<uint32_t>(C);
  }
  ZIPFLS_DEVICE bool whole(uint32_t j) const {
    return j - whole_begin() < whole_end() - whole_begin();
  }
  /// Vectors from whole_begin() up to whole_end() are whole.
  ZIPFLS_DEVICE uint32_t whole_begin() const { return phase == 0 ? 0 : 1; }
  ZIPFLS_DEVICE uint32_t whole_end() const { return static_cast<uint32_t>(phase + C) / V; }

  /// A vector of which only some columns exist; the others become -inf.
  ZIPFLS_DEVICE uint4 load_edge(uint32_t j) const {
    Arithmetic<T> x[V];
#pragma unroll
    for (int v = 0; v < V; v++) {
      const int32_t c = column(j) + v;
      x[v] = c >= 0 && c < C ? to_float(logits[c]) : -infinity<Arithmetic<T>>();
    }
    return pack<T>(x);
  }
  /// Vector j, whole or not.
  ZIPFLS_DEVICE void load(uint32_t j, Arithmetic<T>* x) const {
    unpack<T>(whole(j) ? ptx::ld_global_cg_16(logits + column(j)) : load_edge(j), x);
  }
  ZIPFLS_DEVICE void store(uint32_t j, const Arithmetic<T>* g) const {
    if (whole(j)) {
      ptx::st_global_cg_16(grad + column(j), pack<T>(g));
      return;
    }
#pragma unroll
    for (int v = 0; v < V; v++) {
      const int32_t c = column(j) + v;
      if (c >= 0 && c < C) from_float(g[v], grad + c);
    }
  }
};

/// A thread's share of a row of logits, and of a second row of C elements beside it (probabilities,
/// a teacher's logits; Beside: their type, void for none), in registers: U vectors of logits and
/// the other row's elements of the same classes. Of a row with more vectors than the block holds at
/// once, one part of it at a time.
template <class T, class Beside, int U>
struct RowShare {
  using A = Arithmetic<T>;
  static constexpr bool kPair = !std::is_void_v<Beside>;
  static constexpr int V = kVector<T>, kWide = std::is_same_v<Beside, T> ? 1 : V / kVector<A>;
  RowVectors<T> row;
  const Beside* beside;                 // (C,) at the same element of a vector as the logits
  uint4 logits[U];                      // V T each
  uint4 others[kPair ? U * kWide : 1];  // V Beside for each of them

  ZIPFLS_DEVICE uint32_t vector(uint32_t part, int u) const {
    return (part * U + u) * blockDim.x + threadIdx.x;
  }
  ZIPFLS_DEVICE uint32_t parts() const {
    return (row.count + U * blockDim.x - 1) / (U * blockDim.x);
  }

  ZIPFLS_DEVICE void load(uint32_t part) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      const uint32_t j = vector(part, u);
      if (j >= row.count) continue;
      const int32_t column = row.column(j);
      const bool whole = row.whole(j);
      logits[u] = whole ? ptx::ld_global_cg_16(row.logits + column) : row.load_edge(j);
      if constexpr (kPair) {
        constexpr int W = kVector<Beside>;
#pragma unroll
        for (int w = 0; w < kWide; w++) {
          const int32_t first = column + w * W;
          if (whole) {
            others[u * kWide + w] = ptx::ld_global_cg_16(beside + first);
          } else {
            A x[W];
#pragma unroll
            for (int v = 0; v < W; v++)
              x[v] = row.has(first + v) ? to_float(beside[first + v]) : -infinity<A>();
            others[u * kWide + w] = pack<Beside>(x);
          }
        }
      }
    }
  }

  /// Calls visit(part) for each part of the row, loaded.
  template <class Visit>
  ZIPFLS_DEVICE void for_parts(Visit visit) {
    const uint32_t n = parts();
#pragma unroll 1
    for (uint32_t part = 0; part < n; part++) {
      if (n > 1) load(part);
      visit(part);
    }
  }
  /// Calls visit(vector's index, its logits (V,) A, the other row's elements (V,) A) for the
  /// vectors of this thread in a part that is loaded. Elements outside the row are -inf.
  template <class Visit>
  ZIPFLS_DEVICE void for_loaded(uint32_t part, Visit visit) const {
#pragma unroll
    for (int u = 0; u < U; u++) {
      const uint32_t j = vector(part, u);
      if (j >= row.count) continue;
      A x[V], y[V] = {};
      unpack<T>(logits[u], x);
      if constexpr (kPair) {
#pragma unroll
        for (int w = 0; w < kWide; w++)
          unpack<Beside>(others[u * kWide + w], y + w * kVector<Beside>);
      }
      visit(j, x, y);
    }
  }
  /// The same for all vectors of this thread.
  template <class Visit>
  ZIPFLS_DEVICE void for_vectors(Visit visit) {
    for_parts([&](uint32_t part) { for_loaded(part, visit); });
  }
  /// Calls visit(class, its logit, the other row's element) for all classes of this thread, in
  /// ascending order.
  template <class Visit>
  ZIPFLS_DEVICE void for_classes(Visit visit) {
    for_vectors([&](uint32_t j, const A* x, const A* y) {
#pragma unroll
      for (int v = 0; v < V; v++)
        if (row.has(row.column(j) + v)) visit(row.column(j) + v, x[v], y[v]);
    });
  }
};

/// The gradient x of V columns as all rows have it becomes that of a row which is filled, or has
/// weighted label smoothing.
template <int V, class A>
ZIPFLS_DEVICE void rare_gradient(A* x, int32_t column, int32_t C, const Finished<A>& f,
                                 const A* weight) {
#pragma unroll
  for (int v = 0; v < V; v++) {
    if (f.fill) {
      x[v] = f.fill_value;
    } else if (column + v >= 0 && column + v < C) {
      x[v] -= f.smooth_step * weight[column + v];
    }
  }
}

}  // namespace zipfls::cuda
