// Stage 4: votes in, loss and gradient out, one read and one write of the logits.
//
// With m = max z_c, s = sum exp(z_c - m) and t = sum (z_c - m), the target left out of all three,
// and a label that is q for every class without a vote (MATH.md, "Why one pass is enough"):
//
//     L_zipf = sum p log p - (q t + sum_voted (p_c - q)(z_c - m)) + log s
//     dz_c   = exp(z_c - m) k1 - k2,   k1 = CE's a / (Z e^-m) + lambda / s,   k2 = lambda q
//
// for c without a vote; at most P voted classes and the target differ, and are patched. Kernels:
//
//   loss_fwd_kernel       rows held on chip: 8 lanes, a warp or a block each
//   loss_fwd_cluster_kernel (loss_cluster.cuh)  the same, a cluster of blocks a row
//   loss_fwd_long_kernel  rows too long for that: read twice, the second time from L2
//   loss_dense_kernel     a log mass for every class given: random laws, ranks by logits
//   loss_totals_kernel, loss_correct_kernel   what a mean divides by, where it must come first
//   loss_bwd_kernel       the upstream gradient joins
//
// The gradient may be written over the logits (LossFwd::grad == logits): a row belongs to one block
// (or cluster), and between its last reading of a logit that another thread overwrites and the
// first gradient stands a barrier. No pointer here promises not to alias.
//
// Never run on a GPU yet: compiled for sm_80, sm_90a and sm_100; logic run on the CPU by the
// tests' harness.
#pragma once

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
  int32_t finite = 0;      // classes whose logit is not -inf (NaN and +inf spoil the sums anyway)
  int32_t beaten = 0;      // classes that beat the target; only_correct only
};

template <class A>
ZIPFLS_DEVICE A shift_of(A max) {
  return max == -infinity<A>() ? A(0) : max;
}

/// One RowStats from those of WIDTH neighbouring lanes; all lanes of the warp take part.
template <int WIDTH, class A>
ZIPFLS_DEVICE RowStats<A> merge_lanes(RowStats<A> x, bool weighted, bool beaten) {
  RowStats<A> all;
  all.max = lanes_max<WIDTH>(x.max);
  const A lift = shift_of(x.max) - shift_of(all.max);
  // Nothing but -inf adds nothing, however far it would be lifted; a NaN stays one.
  const A factor = x.max == -infinity<A>() ? A(0) : exp_of(lift);
  all.sum_exp = lanes_sum<WIDTH>(x.sum_exp * factor);
  all.sum = lanes_sum<WIDTH>(x.finite == 0 ? x.sum : x.sum + static_cast<A>(x.finite) * lift);
  all.finite = lanes_sum<WIDTH>(x.finite);
  if (weighted) {
    const bool none = x.smooth_weight == 0;  // and 0 times an infinite lift would be NaN
    all.smooth = lanes_sum<WIDTH>(none ? x.smooth : x.smooth + x.smooth_weight * lift);
    all.smooth_weight = lanes_sum<WIDTH>(x.smooth_weight);
  }
  if (beaten) all.beaten = lanes_sum<WIDTH>(x.beaten);
  return all;
}

/// Adds a vector of V logits to the sums, whose shift is given, and turns x into exp(x - shift).
/// What does not belong to the sums is -inf: the target, and columns outside the row.
template <class T, class A>
ZIPFLS_DEVICE void add_vector(A* x, A shift, RowStats<A>& stats) {
  constexpr int V = kVector<T>;
  A above[V], vector_sum = 0, vector_exp = 0;
#pragma unroll
  for (int v = 0; v < V; v++) {
    above[v] = x[v] - shift;
    x[v] = exp_element<T>(above[v]);
    vector_exp += x[v];
    vector_sum += above[v];
  }
  stats.sum_exp += vector_exp;
  if (vector_sum == -infinity<A>()) {  // rare, and so one test for all V
    vector_sum = 0;
#pragma unroll
    for (int v = 0; v < V; v++) {
      if (above[v] == -infinity<A>()) continue;
      vector_sum += above[v];
      stats.finite++;
    }
  } else {
    stats.finite += V;
  }
  stats.sum += vector_sum;
}

/// The sums that only some options need, class by class in a loop of their own.
template <class A>
struct RareSums {
  const A* smooth_weight;  // (C,) A, or null
  bool beaten;             // only_correct looks at the row
  int32_t y;
  A z_target;

  ZIPFLS_DEVICE bool wanted() const { return smooth_weight != nullptr || beaten; }
  ZIPFLS_DEVICE void add(int32_t c, A z, A shift, RowStats<A>& stats) const {
    if (c == y) return;
    if (smooth_weight != nullptr) {
      stats.smooth += smooth_weight[c] * (z - shift);
      stats.smooth_weight += smooth_weight[c];
    }
    if (beaten) stats.beaten += z > z_target || (z == z_target && c < y);
  }
};

// What the mean divides by ------------------------------------------------------------------------

/// What sums are multiplied with: in the losses, and in the gradient (with ce_weight and
/// zipf_weight).
template <class A>
struct Scales {
  A ce, zipf, ce_step, zipf_step;
};

constexpr int kMostRows = kSmallBlock / 8;  // that a block works on at a time

/// Memory of a block beside its rows'.
template <class A>
struct BlockArea {
  double* partial;    // (3, 32) float64: of each warp
  double* sums;       // (2, 16) float64: losses of the rows that each group of threads has finished
  Scales<A>* scales;  // (1,)
  int32_t* last;      // (1,) int32

  ZIPFLS_HOST_DEVICE static BlockArea carve(Carver& carver) {
    BlockArea block;
    block.partial = carver.take<double>(3 * kWarp);
    block.sums = carver.take<double>(2 * kMostRows);
    block.scales = carver.take<Scales<A>>(1);
    block.last = carver.take<int32_t>(1);
    return block;
  }
};

/// Sums over a stride of samples.
struct Totals {
  double ce = 0;       // the targets' class weights
  double kept = 0;     // samples not ignored
  double counted = 0;  // samples that count in the Zipf part

  template <class A>
  ZIPFLS_DEVICE void add_targets(const Denominators& d, int64_t first, int64_t step) {
    int32_t kept_here = 0, counted_here = 0;
#pragma unroll 1
    for (int64_t i = first; i < d.N; i += step) {
      const int64_t y = d.target[i];
      if (y == d.ignore_index) continue;
      kept_here++;
      if (d.weight != nullptr) {
        const int64_t c = y < 0      ? 0
                          : y >= d.C ? d.C - 1
                                     : y;  // out of range: the row is NaN anyway
        ce += static_cast<double>(static_cast<const A*>(d.weight)[c]);
      }
      if (d.correct != nullptr) counted_here += d.correct[i];
    }
    kept += kept_here;
    counted += d.correct == nullptr ? kept_here : counted_here;
    if (d.weight == nullptr) ce += kept_here;
  }

  /// The block's sums, for thread 0. partial: (3, 32) float64 in shared memory.
  ZIPFLS_DEVICE void reduce(double* partial) {
    ce = block_sum(ce, partial);
    kept = block_sum(kept, partial + kWarp);
    counted = block_sum(counted, partial + 2 * kWarp);
  }
};

/// Partial sums of the denominators, (3, blocks) float64, in a fixed order.
///
/// - Bytes: 8 a sample (and 4 where only some count). 256 threads, samples by grid stride, float64
///   sums.
/// - Never run on a GPU yet: compiled for sm_80, sm_90a and sm_100; logic run on the CPU by the
///   harness.
template <class A>
ZIPFLS_KERNEL(kTotalsBlock)
loss_totals_kernel(LossTotals a) {
  ZIPFLS_DYNAMIC_SHARED(shared);
  Carver carver{shared};
  const auto block = BlockArea<A>::carve(carver);
  Totals totals;
  totals.template add_targets<A>(a.of, int64_t{blockIdx.x} * blockDim.x + threadIdx.x,
                                 int64_t{gridDim.x} * blockDim.x);
  totals.reduce(block.partial);
  if (threadIdx.x == 0) {
    a.partials[blockIdx.x] = totals.ce;
    a.partials[gridDim.x + blockIdx.x] = totals.kept;
    a.partials[2 * gridDim.x + blockIdx.x] = totals.counted;
  }
}

/// The block's scales to shared memory, from its threads' shares of the totals (looked at for a
/// mean only), and for a float16 mean grad_scale. Ends with a barrier.
///
/// A float16 gradient divided by N before GradScaler's scale reaches it flushes to zero: it is
/// stored without the denominator, which backward multiplies in.
template <class A>
ZIPFLS_DEVICE void publish_scales(const LossFwd& a, const BlockArea<A>& block, Totals totals) {
  Scales<A> scales = {1, 1, 0, 0};
  A later = 1;
  if (threadIdx.x < 2 * kMostRows) block.sums[threadIdx.x] = 0;
  if (a.reduction == kMean) {
    totals.reduce(block.partial);
    if (threadIdx.x == 0) {
      scales.ce = totals.ce == 0 ? static_cast<A>(NAN) : A(1) / static_cast<A>(totals.ce);
      // No sample is correct: the Zipf part is 0. No sample at all: NaN, by 0 times infinity.
      const bool none_correct = totals.kept > 0 && totals.counted == 0;
      scales.zipf = none_correct ? A(0) : A(1) / static_cast<A>(totals.counted);
    }
  }
  if (threadIdx.x == 0) {
    if (a.scaled) {
      later = a.ce ? scales.ce : scales.zipf;
      const bool usable =
          later != 0 && ::fabs(static_cast<double>(later)) < INFINITY;  // not NaN either
      later = usable ? later : A(1);
      if (blockIdx.x == 0) *static_cast<A*>(a.grad_scale) = later;
    }
    scales.ce_step = static_cast<A>(a.ce_weight) * (scales.ce / later);
    scales.zipf_step = static_cast<A>(a.zipf_weight) * (scales.zipf / later);
    *block.scales = scales;
  }
  __syncthreads();
}

/// publish_scales of the denominators.
template <class A>
ZIPFLS_DEVICE void mean_scales(const LossFwd& a, const BlockArea<A>& block) {
  Totals totals;
  if (a.reduction == kMean) {
    const Denominators& d = a.denominators;
    if (d.partials != nullptr) {
#pragma unroll 1
      for (int32_t k = threadIdx.x; k < d.num_partials; k += blockDim.x) {
        totals.ce += d.partials[k];
        totals.kept += d.partials[d.num_partials + k];
        totals.counted += d.partials[2 * d.num_partials + k];
      }
    } else {
      totals.template add_targets<A>(d, threadIdx.x, blockDim.x);
    }
  }
  publish_scales(a, block, totals);
}

/// Sums of the rows' losses: over the block, then over all blocks by whichever arrives last, always
/// in the same order; so results repeat bitwise, although which block adds up does not.
///
/// Hazard: the last block reads what others stored. Each stores, fences and only then counts itself
/// in; the last one has seen all counts, fences, and reads from L2 (L1 may hold older lines).
template <class A>
ZIPFLS_DEVICE void fold_losses(const LossFwd& a, const BlockArea<A>& block) {
  if (a.reduction == kNone) return;
  __syncthreads();  // the rows' sums are there
  double ce = threadIdx.x < kMostRows ? block.sums[threadIdx.x] : 0;
  double zipf = threadIdx.x < kMostRows ? block.sums[kMostRows + threadIdx.x] : 0;
  ce = block_sum(ce, block.partial);
  zipf = block_sum(zipf, block.partial + kWarp);
  if (threadIdx.x == 0) {
    a.sums[blockIdx.x] = ce;
    a.sums[gridDim.x + blockIdx.x] = zipf;
    __threadfence();
    *block.last = atomicAdd(a.arrivals, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (*block.last == 0) return;
  __threadfence();
  ce = 0;
  zipf = 0;
#pragma unroll 1
  for (uint32_t k = threadIdx.x; k < gridDim.x; k += blockDim.x) {
    ce += __ldcg(a.sums + k);
    zipf += __ldcg(a.sums + gridDim.x + k);
  }
  ce = block_sum(ce, block.partial);
  zipf = block_sum(zipf, block.partial + kWarp);
  if (threadIdx.x != 0) return;
  A ce_total = static_cast<A>(ce), zipf_total = static_cast<A>(zipf);
  if (a.reduction == kMean) {
    if (a.ce) ce_total *= block.scales->ce;
    if (a.zipf) zipf_total *= block.scales->zipf;
  }
  *static_cast<A*>(a.ce_out) = ce_total;
  *static_cast<A*>(a.zipf_out) = zipf_total;
  *static_cast<A*>(a.loss) =
      static_cast<A>(a.ce_weight) * ce_total + static_cast<A>(a.zipf_weight) * zipf_total;
  *a.arrivals = 0;  // for the next launch on this stream
}

// One sample --------------------------------------------------------------------------------------

/// What is known of a row before its logits are.
struct Sample {
  int64_t i;
  int32_t y;     // target class; 0 where there is none to read
  bool live;     // kept, with a target inside the classes: only then are logits read
  bool ignored;  // loss and gradient 0
  bool spoilt;   // an index outside the classes: loss and gradient NaN
};

/// i >= N is a row that only keeps its warp company: ignored.
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

/// The target joins the other classes' statistics, never by subtraction: exact where it dominates.
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
    const A total = stats.sum_exp + exp_of(z_target - shift), log_total = log_of(total);
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

/// How a row ends: its losses, and the gradient of class c, exp(z_c - shift) per_exp - constant for
/// a class without a vote.
template <class A>
struct Finished {
  A shift;
  A per_exp, constant;
  A at_target;
  A label_step;   // what p~ is multiplied with in the gradient
  A smooth_step;  // what w_c is multiplied with; 0 unless weighted label smoothing
  A fill_value;   // the whole gradient, where fill
  int32_t fill;
  A ce, zipf;
};

/// Losses and gradient factors from a row's statistics; the label's part is still to come.
template <class A>
ZIPFLS_DEVICE Finished<A> finish_cross_entropy(const LossFwd& a, const Sample& sample,
                                               const RowStats<A>& stats, A z_target,
                                               const Scales<A>& scales, bool counted) {
  Finished<A> f{};
  f.shift = shift_of(stats.max);
  const A* const weight = static_cast<const A*>(a.weight);
  if (a.ce && sample.live) {
    const A w = weight == nullptr ? A(1) : weight[sample.y];
    const A smoothing = static_cast<A>(a.label_smoothing), share = smoothing / static_cast<A>(a.C);
    const A others = weight == nullptr ? static_cast<A>(a.C - 1) : stats.smooth_weight;
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
  // Where nothing of the row counts, its gradient is 0 whatever the logits.
  f.fill = sample.ignored || sample.spoilt || (!a.ce && !(a.zipf && counted));
  f.fill_value = sample.spoilt ? not_a_number<A>() : A(0);
  return f;
}

/// Whether a row's Zipf part counts.
template <class A>
ZIPFLS_DEVICE bool counts(const LossFwd& a, const Sample& sample, const RowStats<A>& stats) {
  if (!sample.live || !a.only_correct) return sample.live;
  return a.correct != nullptr ? a.correct[sample.i] != 0 : stats.beaten == 0;
}

/// Reports a row's losses, or adds them to those of the group's earlier rows: by one thread of the
/// group.
template <class A>
ZIPFLS_DEVICE void report_row(const LossFwd& a, const BlockArea<A>& block, int row_in_block,
                              const Sample& sample, const Finished<A>& f) {
  const A nan = not_a_number<A>();
  const A ce = sample.ignored ? A(0) : sample.spoilt ? nan : f.ce;
  const A zipf = sample.ignored ? A(0) : sample.spoilt ? nan : f.zipf;
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

/// What the voted classes add to the rest of a row.
template <class A>
struct VotedSums {
  A cross;   // sum (p_c - q)(z_c - m) of finite z_c; -inf where a class with a label has a logit of
             // -inf
  A absent;  // classes with a logit of -inf
};

/// Over the votes of row i if it is live, each standing for 1 / n_c of its class: their
/// order is fixed, that of the list of classes is not. By the row's leading lanes.
///
/// logit(c): z_c, in A. labelled(c): whether class c has a label.
template <class Group, class A, class Logit, class Labelled>
ZIPFLS_DEVICE VotedSums<A> voted_sums(const LossFwd& a, int64_t i, bool live,
                                      const VoteTables<A>& t, A shift, Logit logit,
                                      Labelled labelled) {
  constexpr int kLanes = Group::kLeaders;
  const A q = t.label[0];
  A cross = 0, absent = 0;
  if (live) {
#pragma unroll 1
    for (int32_t p = Group::lane(); p < a.votes.P; p += kLanes) {
      const int32_t c = load_vote(a.votes, i, p, a.C);
      if (c < 0 || !labelled(c)) continue;
      const int32_t n = t.votes_for(c);
      const A label = t.label[n], z = logit(c), share = A(1) / static_cast<A>(n);
      if (z == -infinity<A>()) {
        absent += share;
        if (label > 0) cross = -infinity<A>();
      } else {
        cross += (label - q) * (z - shift) * share;
      }
    }
  }
  return {lanes_sum<kLanes>(cross), lanes_sum<kLanes>(absent)};
}

/// A row's end, by its leading lanes: losses, gradient factors, and the gradient at its voted
/// classes.
///
/// logit(c): z_c, in A. in_part(c): whether a class belongs to this block's part of the row.
template <class Group, class A, class Logit, class InPart>
ZIPFLS_DEVICE Finished<A> finish_row(const LossFwd& a, const Sample& sample,
                                     const RowStats<A>& stats, A z_target, A entropy,
                                     const VoteTables<A>& t, int32_t K, const Scales<A>& scales,
                                     Logit logit, InPart in_part) {
  constexpr int kLanes = Group::kLeaders;
  const bool counted = counts(a, sample, stats);
  Finished<A> f = finish_cross_entropy(a, sample, stats, z_target, scales, counted);
  if (!a.zipf) return f;

  const A q = t.label[0];
  const auto voted = voted_sums<Group>(a, sample.i, sample.live, t, f.shift, logit,
                                       [&](int32_t c) { return c != sample.y; });
  const bool absent_rest = static_cast<A>(a.C - 1 - stats.finite) - voted.absent > A(0.5);
  if (counted) {
    f.zipf = entropy - (q * stats.sum + voted.cross) + log_of(stats.sum_exp);
    if (absent_rest && q > 0) f.zipf += infinity<A>();
  }
  const A smooth_constant = f.constant;
  f.constant += f.label_step * q;

  if (t.patch == nullptr) return f;
#pragma unroll 1
  for (int32_t k = Group::lane(); k < K; k += kLanes) {
    const int32_t slot = t.voted[k], c = t.class_of(slot);
    if (c == sample.y || !in_part(c)) continue;
    const A label = f.label_step * t.label[t.counts[slot]];
    A g = exp_of(logit(c) - f.shift) * f.per_exp - (label + smooth_constant);
    if (f.smooth_step != 0) g -= f.smooth_step * static_cast<const A*>(a.weight)[c];
    t.patch[k] = g;
  }
  return f;
}

// Where a row lies --------------------------------------------------------------------------------

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
  ZIPFLS_DEVICE bool has(int32_t c) const {
    return static_cast<uint32_t>(c) < static_cast<uint32_t>(C);
  }
  ZIPFLS_DEVICE bool whole(uint32_t j) const { return column(j) >= 0 && column(j) + V <= C; }

  /// A vector of which only some columns exist; the others become -inf.
  ZIPFLS_DEVICE uint4 load_edge(uint32_t j) const {
    Arithmetic<T> x[V];
#pragma unroll
    for (int v = 0; v < V; v++) {
      const int32_t c = column(j) + v;
      x[v] = c >= 0 && c < C ? widen(logits[c]) : -infinity<Arithmetic<T>>();
    }
    return pack<T>(x);
  }
  /// The same, element by element to shared memory, to (V,) T.
  ZIPFLS_DEVICE void copy_edge(uint32_t j, T* to) const {
#pragma unroll 1
    for (int v = 0; v < V; v++) {
      const int32_t c = column(j) + v;
      if (c >= 0 && c < C) {
        to[v] = logits[c];
      } else {
        narrow(-infinity<Arithmetic<T>>(), to + v);
      }
    }
  }
  ZIPFLS_DEVICE void store(uint32_t j, const Arithmetic<T>* g) const {
    if (whole(j)) {
      store_vector(grad + column(j), pack<T>(g));
      return;
    }
#pragma unroll
    for (int v = 0; v < V; v++) {
      const int32_t c = column(j) + v;
      if (c >= 0 && c < C) narrow(g[v], grad + c);
    }
  }
};

/// Gradient of V columns from exp(z - shift), x, and its factors; factor: from x's own shift to the
/// row's.
template <int V, class A>
ZIPFLS_DEVICE void gradient_vector(A* x, int32_t column, int32_t C, A factor, const Finished<A>& f,
                                   const A* weight) {
  if (f.fill) {
#pragma unroll
    for (int v = 0; v < V; v++) x[v] = f.fill_value;
    return;
  }
  const A per_exp = f.per_exp * factor;
#pragma unroll
  for (int v = 0; v < V; v++) x[v] = x[v] * per_exp - f.constant;
  if (f.smooth_step == 0) return;
#pragma unroll
  for (int v = 0; v < V; v++)
    if (column + v >= 0 && column + v < C) x[v] -= f.smooth_step * weight[column + v];
}

// The kernels -------------------------------------------------------------------------------------

/// Memory of one row (or of a block's slice of it).
template <class T>
struct RowArea {
  using A = Arithmetic<T>;
  uint4* row;  // (vectors,) 16 bytes: logits, then the gradient
  VoteTables<A> tables;
  RowStats<A>* warps;     // (32,): of each warp; rows of a whole block
  RowStats<A>* exchange;  // (2,): the block's, for its cluster; by parity of the pass
  Finished<A>* finished;  // (1,): rows of a whole block

  /// One layout for all kernels: what a kernel has no use for is a few unused bytes.
  ZIPFLS_HOST_DEVICE static RowArea carve(Carver& carver, uint32_t vectors, int32_t P, int32_t C,
                                          bool with_grad, bool whole_block) {
    RowArea area;
    area.row = carver.take<uint4>(vectors);
    area.tables = VoteTables<A>::carve(carver, P, C, with_grad);
    area.warps = carver.take<RowStats<A>>(whole_block ? kWarp : 0);
    area.exchange = carver.take<RowStats<A>>(whole_block ? 2 : 0);
    area.finished = carver.take<Finished<A>>(whole_block ? 1 : 0);
    return area;
  }
};

/// Votes that the label is made from.
ZIPFLS_HOST_DEVICE int32_t counted_votes(const LossFwd& a) { return a.zipf ? a.votes.P : 0; }

/// The body of loss_fwd_kernel and loss_fwd_cluster_kernel; what they promise is said there.
///
/// row_bytes: shared memory of one row. slice: vectors of the row that a block of a cluster holds,
/// otherwise as many as a row can have.
template <class T, int LANES, bool CLUSTER>
ZIPFLS_DEVICE void loss_fwd_rows(const LossFwd& a, uint32_t row_bytes, uint32_t slice) {
  using A = Arithmetic<T>;
  using Group = RowGroup<LANES>;
  constexpr int V = kVector<T>, K_MAX = kHeldVectors;
  const bool with_grad = a.grad != nullptr;
  const int32_t P = counted_votes(a);

  ZIPFLS_DYNAMIC_SHARED(shared);
  Carver carver{shared};
  const auto block = BlockArea<A>::carve(carver);
  carver.used += row_bytes * Group::row_in_block();
  const auto area = RowArea<T>::carve(carver, slice, P, a.C, with_grad, Group::kWholeBlock);
  const VoteTables<A>& t = area.tables;
  T* const held = reinterpret_cast<T*>(area.row);  // (slice V,) T: columns from first_column on
  clear_tables<Group>(t, P);
  mean_scales<A>(a, block);  // its barrier publishes the empty tables

  const int64_t blocks = CLUSTER ? gridDim.x / cluster_size() : gridDim.x;
  const int64_t block_index = CLUSTER ? blockIdx.x / cluster_size() : blockIdx.x;
  const uint32_t first_vector = CLUSTER ? cluster_rank() * slice : 0;
  const A* const smooth_weight =
      a.ce && a.label_smoothing != 0 ? static_cast<const A*>(a.weight) : nullptr;
  const bool look_for_beaten = a.zipf && a.only_correct && a.correct == nullptr;
  int parity = 0;

  // All groups of a block make the same number of passes, so that barriers and shuffles are for
  // all.
  const int rows = Group::rows_per_block();
  for (int64_t first = block_index * rows; first < a.N; first += blocks * rows) {
    Sample sample = load_sample(a, first + Group::row_in_block());
    const auto row = RowVectors<T>::of(a, sample);
    const int32_t first_column = row.column(first_vector);
    const uint32_t vectors = row.count <= first_vector          ? 0
                             : row.count < first_vector + slice ? row.count - first_vector
                                                                : slice;

    // 1. The row is sent for: into shared memory, without passing through registers.
#pragma unroll
    for (int k = 0; k < K_MAX; k++) {
      const uint32_t j = Group::lane() + k * Group::size();
      if (!sample.live || j >= vectors) continue;
      if (row.whole(first_vector + j)) {
        copy_async(area.row + j, row.logits + row.column(first_vector + j));
      } else {
        row.copy_edge(first_vector + j, held + j * V);
      }
    }

    // 2. The votes, while it is under way.
    bool bad_vote = false;
    if (sample.live && a.votes.data != nullptr)
      bad_vote = a.zipf ? count_votes<Group>(a.votes, sample.i, a.C, t)
                        : check_votes<Group>(a.votes, sample.i, a.C);
    copy_async_wait();
    const bool any_bad = Group::sync_any(bad_vote);  // the row and its counts are there
    sample.spoilt |= any_bad && !sample.ignored;
    auto logit = [&](int32_t c) {
      if (CLUSTER && static_cast<uint32_t>(c - first_column) >= vectors * V)
        return widen(row.logits[c]);
      return widen(held[c - first_column]);
    };
    const A z_target = sample.live ? logit(sample.y) : A(0);
    const int32_t K = t.at_least[1];
    A entropy = 0;
    if (a.zipf && Group::leads()) {
      entropy = label_counts<Group>(t, P, a.C, sample.y, static_cast<const A*>(a.log_mass));
      __syncwarp(kAllLanes);  // lanes read one another's labels in finish_row
    }

    // 3. Statistics: of the warp, then of the block, then of the cluster.
    A x[K_MAX * V];
#pragma unroll
    for (int k = 0; k < K_MAX; k++) {
      const uint32_t j = Group::lane() + k * Group::size();
      if (sample.live && j < vectors) {
        unpack<T>(area.row[j], x + k * V);
        const int v_target = sample.y - row.column(first_vector + j);
        if (v_target >= 0 && v_target < V) {
#pragma unroll
          for (int v = 0; v < V; v++) x[k * V + v] = v == v_target ? -infinity<A>() : x[k * V + v];
        }
      } else {
#pragma unroll
        for (int v = 0; v < V; v++) x[k * V + v] = -infinity<A>();
      }
    }
    RowStats<A> stats;
#pragma unroll
    for (int e = 0; e < K_MAX * V; e++) stats.max = larger(stats.max, x[e]);
    stats.max = lanes_max<Group::kLeaders>(stats.max);
    const A warp_max = stats.max, warp_shift = shift_of(warp_max);
#pragma unroll
    for (int k = 0; k < K_MAX; k++) {
      const uint32_t j = Group::lane() + k * Group::size();
      if (j < vectors) add_vector<T>(x + k * V, warp_shift, stats);
    }
    const RareSums<A> rare{smooth_weight, look_for_beaten, sample.y, z_target};
    if (rare.wanted() && sample.live) {
#pragma unroll 1
      for (uint32_t e = Group::lane(); e < vectors * V; e += Group::size()) {
        const int32_t c = first_column + static_cast<int32_t>(e);
        if (c >= 0 && c < a.C) rare.add(c, widen(held[e]), warp_shift, stats);
      }
    }
    stats.sum_exp = lanes_sum<Group::kLeaders>(stats.sum_exp);
    stats.sum = lanes_sum<Group::kLeaders>(stats.sum);
    stats.finite = lanes_sum<Group::kLeaders>(stats.finite);
    if (smooth_weight != nullptr) {
      stats.smooth = lanes_sum<Group::kLeaders>(stats.smooth);
      stats.smooth_weight = lanes_sum<Group::kLeaders>(stats.smooth_weight);
    }
    if (look_for_beaten) stats.beaten = lanes_sum<Group::kLeaders>(stats.beaten);
    if constexpr (Group::kWholeBlock) {
      if (threadIdx.x % kWarp == 0) area.warps[threadIdx.x / kWarp] = stats;
      __syncthreads();
      if (Group::leads()) {
        stats = threadIdx.x < blockDim.x / kWarp ? area.warps[threadIdx.x] : RowStats<A>{};
        stats = merge_lanes<kWarp>(stats, smooth_weight != nullptr, look_for_beaten);
      }
    }
    if constexpr (CLUSTER) {
      // Two copies, by parity: a block writes the one of this pass again two passes on, when every
      // peer has arrived at the barrier between, and so has read it.
      if (threadIdx.x == 0) area.exchange[parity] = stats;
      cluster_sync();
      if (Group::leads()) {
        stats = threadIdx.x < cluster_size() ? *cluster_peer(area.exchange + parity, threadIdx.x)
                                             : RowStats<A>{};
        stats = merge_lanes<kWarp>(stats, smooth_weight != nullptr, look_for_beaten);
      }
      parity ^= 1;
    }

    // 4. Losses and gradient factors, by the leading lanes; they still read the logits in shared
    // memory.
    Finished<A> f;
    if (Group::leads()) {
      f = finish_row<Group>(
          a, sample, stats, z_target, entropy, t, K, *block.scales, logit, [&](int32_t c) {
            return !CLUSTER || static_cast<uint32_t>(c - first_column) < vectors * V;
          });
      if (Group::lane() == 0) {
        if (!CLUSTER || cluster_rank() == 0) report_row(a, block, Group::row_in_block(), sample, f);
        if (Group::kWholeBlock) *area.finished = f;
      }
    }
    Group::sync();  // from here on nobody reads the logits in shared memory
    // In place, a peer that still looks up a vote outside its slice must not find a gradient there.
    if (CLUSTER && a.grad == a.logits) cluster_sync();
    if constexpr (Group::kWholeBlock) f = *area.finished;

    // 5. The gradient, over the logits in shared memory, patched there and stored as it then lies.
    if (with_grad) {
      // A warp with nothing but -inf has exponentials of 0, and a shift that means nothing.
      const A factor = !Group::kWholeBlock || warp_shift == f.shift ? A(1)
                       : warp_max == -infinity<A>()                 ? A(0)
                                                                    : exp_of(warp_shift - f.shift);
#pragma unroll
      for (int k = 0; k < K_MAX; k++) {
        const uint32_t j = Group::lane() + k * Group::size();
        if (j >= vectors) continue;
        gradient_vector<V>(x + k * V, row.column(first_vector + j), a.C, factor, f, smooth_weight);
        area.row[j] = pack<T>(x + k * V);
      }
      Group::sync();  // the patches come over the gradient, from other threads
      if (!f.fill) {
#pragma unroll 1
        for (int32_t k = Group::lane(); k < K; k += Group::size()) {
          const int32_t c = t.class_of(t.voted[k]);
          if (c == sample.y || static_cast<uint32_t>(c - first_column) >= vectors * V) continue;
          narrow(t.patch[k], held + (c - first_column));
        }
        if (Group::lane() == 0 && static_cast<uint32_t>(sample.y - first_column) < vectors * V)
          narrow(f.at_target, held + (sample.y - first_column));
      }
    }
    forget_votes<Group>(t, P, K);
    Group::sync();  // the gradient is patched, and the tables are empty for the next row
    if (row.grad == nullptr) continue;
#pragma unroll
    for (int k = 0; k < K_MAX; k++) {
      const uint32_t j = Group::lane() + k * Group::size();
      if (j >= vectors) continue;
      const int32_t column = row.column(first_vector + j);
      if (row.whole(first_vector + j)) {
        store_vector(row.grad + column, area.row[j]);
      } else {
#pragma unroll 1
        for (int v = 0; v < V; v++)
          if (column + v >= 0 && column + v < a.C) row.grad[column + v] = held[j * V + v];
      }
    }
  }
  if constexpr (CLUSTER) cluster_sync();  // no block leaves while a peer may read its memory
  fold_losses<A>(a, block);
}

/// Loss and gradient of rows held on chip: each logit is read once, each gradient element written
/// once.
///
/// - Bytes: 2 C itemsize a row; P votes twice (4 bytes each, the second time from L1); 8 for the
///   target.
/// - Threads: LANES a row (8 or 32, blocks of 128 hold 16 or 4 rows), or a block a row (LANES = 0).
/// - The row: exp(z - m) in registers, at most 64 bytes a thread, between statistics and gradient;
///   in shared memory the logits for the votes to look up, then the gradient for them to patch.
/// - Accumulators: float (float64: double); sums over rows: double.
/// - Hazards, each with its barrier: counts before ranks; logits looked up before the gradient
///   overwrites them; gradient before its patches; patches before the store; tables emptied before
///   the next row.
/// - Never run on a GPU yet: compiled for sm_80, sm_90a and sm_100; logic run on the CPU by the
///   harness.
template <class T, int LANES>
ZIPFLS_KERNEL(LANES == 0 ? kWideBlock : kSmallBlock,
              LANES == 0 ? kWideResident<T> : kSmallResident<T>)
loss_fwd_kernel(LossFwd a, uint32_t row_bytes, uint32_t slice) {
  loss_fwd_rows<T, LANES, false>(a, row_bytes, slice);
}

/// Loss and gradient of rows that do not fit on chip: a block reads a row twice, the second time
/// backwards, so that what was read last is met first, in L2.
///
/// - Bytes: 2 C itemsize a row of device memory and C itemsize of L2; votes and target as
///   loss_fwd_kernel.
/// - Threads: 512 a row, rows by grid stride.
/// - The row: in L2.
/// - Accumulators: a running maximum a thread, sums in float (float64: double) relative to it; sums
///   over rows: double.
/// - Hazard: the gradient at voted classes and target is stored over the others' formula by other
///   threads; a barrier stands between.
/// - Never run on a GPU yet: compiled for sm_80, sm_90a and sm_100; logic run on the CPU by the
///   harness.
template <class T>
ZIPFLS_KERNEL(kLongBlock)
loss_fwd_long_kernel(LossFwd a) {
  using A = Arithmetic<T>;
  using Group = RowGroup<0>;
  constexpr int V = kVector<T>, U = 4;  // vectors in flight a thread
  const bool with_grad = a.grad != nullptr;
  const int32_t P = counted_votes(a);
  ZIPFLS_DYNAMIC_SHARED(shared);
  Carver carver{shared};
  const auto block = BlockArea<A>::carve(carver);
  const auto area = RowArea<T>::carve(carver, 0, P, a.C, with_grad, true);
  const VoteTables<A>& t = area.tables;
  clear_tables<Group>(t, P);
  mean_scales<A>(a, block);
  const A* const weight = static_cast<const A*>(a.weight);
  const A* const smooth_weight = a.ce && a.label_smoothing != 0 ? weight : nullptr;
  const bool look_for_beaten = a.zipf && a.only_correct && a.correct == nullptr;

  for (int64_t i = blockIdx.x; i < a.N; i += gridDim.x) {
    Sample sample = load_sample(a, i);
    const auto row = RowVectors<T>::of(a, sample);
    auto logit = [&](int32_t c) { return widen(row.logits[c]); };
    const A z_target = sample.live ? logit(sample.y) : A(0);
    bool bad_vote = false;
    if (sample.live && a.votes.data != nullptr)
      bad_vote =
          a.zipf ? count_votes<Group>(a.votes, i, a.C, t) : check_votes<Group>(a.votes, i, a.C);
    sample.spoilt |= Group::sync_any(bad_vote) && !sample.ignored;
    const int32_t K = t.at_least[1];
    A entropy = 0;
    if (a.zipf && Group::leads()) {
      entropy = label_counts<Group>(t, P, a.C, sample.y, static_cast<const A*>(a.log_mass));
      __syncwarp(kAllLanes);
    }

    // Statistics: the sums move to a new shift when a larger logit turns up.
    RowStats<A> stats;
    const uint32_t step = blockDim.x * U, count = sample.live ? row.count : 0;
    for (uint32_t base = threadIdx.x; base < count; base += step) {
      uint4 raw[U];
      A x[U * V];
#pragma unroll
      for (int u = 0; u < U; u++) {
        const uint32_t j = base + u * blockDim.x;
        if (j < count && row.whole(j)) raw[u] = load_kept(row.logits + row.column(j));
      }
      A top = -infinity<A>();
#pragma unroll
      for (int u = 0; u < U; u++) {
        const uint32_t j = base + u * blockDim.x;
        if (j < count) {
          if (!row.whole(j)) raw[u] = row.load_edge(j);
          unpack<T>(raw[u], x + u * V);
        }
        const int v_target = sample.y - row.column(j);
#pragma unroll
        for (int v = 0; v < V; v++) {
          if (j >= count || v == v_target) x[u * V + v] = -infinity<A>();
          top = larger(top, x[u * V + v]);
        }
      }
      if (top > stats.max) {
        const A lift = shift_of(stats.max) - top;
        stats.sum_exp *= stats.max == -infinity<A>() ? A(0) : exp_of(lift);
        if (stats.finite != 0) stats.sum += static_cast<A>(stats.finite) * lift;
        stats.max = top;
      }
      const A shift = shift_of(stats.max);
#pragma unroll
      for (int u = 0; u < U; u++) {
        const uint32_t j = base + u * blockDim.x;
        if (j >= count) continue;
        add_vector<T>(x + u * V, shift, stats);
      }
    }
    const RareSums<A> rare{smooth_weight, look_for_beaten, sample.y, z_target};
    if (rare.wanted() && sample.live) {
#pragma unroll 1
      for (int32_t c = threadIdx.x; c < a.C; c += blockDim.x)
        rare.add(c, logit(c), shift_of(stats.max), stats);
    }
    stats = merge_lanes<kWarp>(stats, smooth_weight != nullptr, look_for_beaten);
    if (threadIdx.x % kWarp == 0) area.warps[threadIdx.x / kWarp] = stats;
    __syncthreads();
    if (Group::leads()) {
      stats = threadIdx.x < blockDim.x / kWarp ? area.warps[threadIdx.x] : RowStats<A>{};
      stats = merge_lanes<kWarp>(stats, smooth_weight != nullptr, look_for_beaten);
      const auto finished = finish_row<Group>(a, sample, stats, z_target, entropy, t, K,
                                              *block.scales, logit, [](int32_t) { return true; });
      if (threadIdx.x == 0) {
        report_row(a, block, 0, sample, finished);
        *area.finished = finished;
      }
    }
    __syncthreads();
    const Finished<A> f = *area.finished;

    if (with_grad) {
      const uint32_t passes = (row.count + step - 1) / step;
      for (uint32_t pass = passes; pass-- > 0;) {
        const uint32_t base = pass * step + threadIdx.x;
        uint4 raw[U];
#pragma unroll
        for (int u = 0; u < U; u++) {
          const uint32_t j = base + u * blockDim.x;
          if (j < count && row.whole(j)) raw[u] = load_streaming(row.logits + row.column(j));
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
          const uint32_t j = base + u * blockDim.x;
          if (j >= row.count) continue;
          A x[V] = {};
          if (sample.live) {
            if (!row.whole(j)) raw[u] = row.load_edge(j);
            unpack<T>(raw[u], x);
#pragma unroll
            for (int v = 0; v < V; v++) x[v] = exp_element<T>(x[v] - f.shift);
          }
          gradient_vector<V>(x, row.column(j), a.C, A(1), f, weight);
          row.store(j, x);
        }
      }
      __syncthreads();  // the patches come over the gradient, from other threads
      if (!f.fill) {
#pragma unroll 1
        for (int32_t k = threadIdx.x; k < K; k += blockDim.x) {
          const int32_t c = t.class_of(t.voted[k]);
          if (c != sample.y) narrow(t.patch[k], row.grad + c);
        }
        if (threadIdx.x == 0) narrow(f.at_target, row.grad + sample.y);
      }
    }
    forget_votes<Group>(t, P, K);
    __syncthreads();
  }
  fold_losses<A>(a, block);
}

/// Loss and gradient where every class of every sample comes with a log mass: random laws, ranks by
/// logits.
///
/// - Bytes: (C itemsize + 4 C) of device memory read and twice that from L2, C itemsize written a
///   row.
/// - Threads: 256 a row, rows by grid stride, element by element: an ablation's kernel, kept plain.
/// - The row: in L2.
/// - Accumulators: float (float64: double); sums over rows: double.
/// - Hazards: each thread writes the columns it read; all read the target's logit, barriers before
///   the first gradient.
/// - Never run on a GPU yet: compiled for sm_80, sm_90a and sm_100; logic run on the CPU by the
///   harness.
template <class T>
ZIPFLS_KERNEL(kDenseBlock, kDenseResident)
loss_dense_kernel(LossFwd a) {
  using A = Arithmetic<T>;
  using Group = RowGroup<0>;
  ZIPFLS_DYNAMIC_SHARED(shared);
  Carver carver{shared};
  const auto block = BlockArea<A>::carve(carver);
  A* const partial = carver.take<A>(kDenseBlock / kWarp);  // (warps,) A
  mean_scales<A>(a, block);
  const A* const weight = static_cast<const A*>(a.weight);

  for (int64_t i = blockIdx.x; i < a.N; i += gridDim.x) {
    Sample sample = load_sample(a, i);
    const T* const z = static_cast<const T*>(a.logits) + i * a.logits_stride;  // (C,) T
    const A* const log_mass = static_cast<const A*>(a.log_mass) + i * a.C;     // (C,) A
    const int32_t C = sample.live ? a.C : 0, y = sample.y;
    const A z_target = sample.live ? widen(z[y]) : A(0);
    sample.spoilt |= Group::sync_any(sample.live && a.votes.data != nullptr &&
                                     check_votes<Group>(a.votes, i, a.C)) &&
                     !sample.ignored;

    RowStats<A> stats;
    A top = -infinity<A>();
    for (int32_t c = threadIdx.x; c < C; c += blockDim.x) {
      if (c == y) continue;
      stats.max = larger(stats.max, widen(z[c]));
      top = larger(top, log_mass[c]);
    }
    stats.max = block_max(stats.max, partial);
    top = block_max(top, partial);
    const A shift = shift_of(stats.max);
    A mass = 0, entropy = 0,
      cross = 0;  // sums of e^a, e^a a and e^a (z - shift), a = log mass - top
    for (int32_t c = threadIdx.x; c < C; c += blockDim.x) {
      const A x = widen(z[c]);
      if (c == y) continue;
      stats.sum_exp += exp_element<T>(x - shift);
      stats.smooth += (weight == nullptr ? A(1) : weight[c]) * (x - shift);
      stats.smooth_weight += weight == nullptr ? A(0) : weight[c];
      stats.beaten += x > z_target || (x == z_target && c < y);
      const A relative = relative_log_mass(log_mass[c], top), p = exp_of(relative);
      if (p == 0) continue;
      mass += p;
      entropy += p * relative;
      cross += p * (x - shift);
    }
    stats.sum_exp = block_total(stats.sum_exp, partial);
    stats.smooth = block_total(stats.smooth, partial);
    stats.smooth_weight = block_total(stats.smooth_weight, partial);
    stats.beaten = static_cast<int32_t>(block_total(static_cast<A>(stats.beaten), partial));
    stats.finite = a.C - 1;  // smooth is -inf already where a logit is
    stats.sum = stats.smooth;
    mass = block_total(mass, partial);
    entropy = block_total(entropy, partial);
    cross = block_total(cross, partial);

    const bool counted = counts(a, sample, stats);
    Finished<A> f = finish_cross_entropy(a, sample, stats, z_target, *block.scales, counted);
    if (a.zipf && counted) f.zipf = (entropy - cross) / mass - log_of(mass) + log_of(stats.sum_exp);
    if (threadIdx.x == 0) report_row(a, block, 0, sample, f);
    if (a.grad == nullptr) continue;
    T* const grad = static_cast<T*>(a.grad) + i * a.C;  // (C,) T
    for (int32_t c = threadIdx.x; c < a.C; c += blockDim.x) {
      A g = f.fill_value;
      if (!f.fill) {
        g = exp_element<T>(widen(z[c]) - shift) * f.per_exp - f.constant;
        g -= f.label_step == 0
                 ? A(0)
                 : f.label_step * (exp_of(relative_log_mass(log_mass[c], top)) / mass);
        if (f.smooth_step != 0) g -= f.smooth_step * weight[c];
        if (c == y) g = f.at_target;
      }
      narrow(g, grad + c);
    }
  }
  fold_losses<A>(a, block);
}

/// Whether each sample counts under only_correct: kept, and no other class beats its target.
///
/// - Bytes: C itemsize a row.
/// - Threads: 128 a row, rows by grid stride, elements one by one: needed by the mean of
///   only_correct alone, whose denominator comes before every gradient. No sums, no hazards.
/// - Never run on a GPU yet: compiled for sm_80, sm_90a and sm_100; logic run on the CPU by the
///   harness.
template <class T>
ZIPFLS_KERNEL(kCorrectBlock)
loss_correct_kernel(LossCorrect a) {
  for (int64_t i = blockIdx.x; i < a.N; i += gridDim.x) {
    const int64_t target = a.target[i];
    const bool kept = target != a.ignore_index;
    const int32_t y = static_cast<int32_t>(target < 0 ? 0 : target >= a.C ? a.C - 1 : target);
    const T* const z = static_cast<const T*>(a.logits) + i * a.logits_stride;  // (C,) T
    const auto z_target = widen(z[y]);
    bool beaten = false;
    for (int32_t c = threadIdx.x; c < a.C; c += blockDim.x) {
      const auto x = widen(z[c]);
      beaten |= x > z_target || (x == z_target && c < y);
    }
    beaten = RowGroup<0>::sync_any(beaten);
    if (threadIdx.x == 0) a.correct[i] = kept && !beaten;
  }
}

/// out = grad * grad_loss * grad_scale; where they multiply to one and out is grad, nothing is
/// done.
///
/// - Bytes: 2 C itemsize a row, or 8 a block where there is nothing to do.
/// - Threads: a warp takes 1024 elements of a row at a time, by grid stride, 16 bytes a lane (edges
///   one by one). Products in float (float64: double).
/// - Hazards: none, each lane writes where it read.
/// - Never run on a GPU yet: compiled for sm_80, sm_90a and sm_100; logic run on the CPU by the
///   harness.
template <class T>
ZIPFLS_KERNEL(kScaleBlock)
loss_bwd_kernel(LossBwd a) {
  using A = Arithmetic<T>;
  constexpr int V = kVector<T>;
  const A common = a.grad_scale == nullptr ? A(1) : *static_cast<const A*>(a.grad_scale);
  const int64_t chunks = (a.C + kScaleChunk - 1) / kScaleChunk, items = a.N * chunks;
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / kWarp);
  const int lane = threadIdx.x % kWarp;
  for (int64_t item = int64_t{blockIdx.x} * (blockDim.x / kWarp) + threadIdx.x / kWarp;
       item < items; item += warps) {
    const int64_t i = item / chunks, first = item % chunks * kScaleChunk;
    const A scale = static_cast<const A*>(a.grad_loss)[i * a.grad_loss_stride] * common;
    if (scale == 1 && a.out == a.grad) {
      if (a.N == 1) return;  // it is everybody's scale
      continue;
    }
    const int64_t last = first + kScaleChunk < a.C ? first + kScaleChunk : a.C;
    const T* const in = static_cast<const T*>(a.grad) + i * a.C;  // (C,) T
    T* const out = static_cast<T*>(a.out) + i * a.C;  // (C,) T, at the same phase of 16 bytes
    const int64_t phase =
        static_cast<int64_t>(reinterpret_cast<uintptr_t>(in + first) % 16 / sizeof(T));
    const bool same =
        reinterpret_cast<uintptr_t>(out + first) % 16 / sizeof(T) == static_cast<uintptr_t>(phase);
    for (int64_t c = first - phase + lane * V; c < last; c += kWarp * V) {
      if (same && c >= first && c + V <= last) {
        A x[V];
        unpack<T>(load_streaming(in + c), x);
#pragma unroll
        for (int v = 0; v < V; v++) x[v] *= scale;
        store_vector(out + c, pack<T>(x));
      } else {
        for (int v = 0; v < V; v++)
          if (c + v >= first && c + v < last) narrow(widen(in[c + v]) * scale, out + c + v);
      }
    }
  }
}

}  // namespace zipfls::cuda
