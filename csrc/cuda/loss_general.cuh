// Loss and gradient for a target and a label that may be given class by class.
//
// One kernel of two policies: what the target is (ClassIndex, Probabilities) and what the label is
// (ByRank, PerClass). A class index with a label by rank is loss_rows.cuh's and loss_long.cuh's.
//
// S are the classes that the Zipf part is about: all but a class index y; of probabilities t those
// with t_c = min t (MATH.md, "Soft targets"). With m = max z_c and s = sum exp(z_c - m) over S, and
// the label p over S,
//
//     L_zipf = sum p log p - sum p (z - m) + log s
//     dz_c   = (CE's) + lambda [c in S] (exp(z_c - m) / s - p_c)
//
// before the denominators. Cross-entropy of a class index: loss_math.cuh. Of probabilities, with M
// = max z_c and Z = sum exp(z_c - M) over all classes, and u_c = w_c ((1 - e) t_c + e / C),
//
//     CE     = sum u log Z - sum u (z - M)
//     dz_c   = exp(z_c - M) sum u / Z - u_c
//
// A label by rank is that of label.h with S in the place of the non-target classes: q for every
// class of S without a vote, and at most P others. A label per class is the softmax over S of
// log_mass (N, C).
#pragma once

#include <type_traits>

#include "loss_rows.cuh"

namespace zipfls::cuda {

// Shared memory and the row -----------------------------------------------------------------------

/// Votes that make the label.
ZIPFLS_HOST_DEVICE int32_t label_votes(const LossGeneral& a) {
  return a.dense ? 0 : counted_votes(a);
}

/// Shared memory of a block beside BlockArea.
template <class A>
struct GeneralArea {
  static constexpr int kSums = 8;
  A* partial;  // (kSums, 32) A: of each warp
  VoteTables<A> tables;
  int32_t* unlabelled;  // (P + 1,) int32: [n] classes outside S with n votes, [0] with any; all 0
                        // between rows

  ZIPFLS_HOST_DEVICE static GeneralArea allocate(SmemAllocator& smem, const LossGeneral& a) {
    const int32_t P = label_votes(a);
    GeneralArea area;
    area.partial = smem.allocate<A>(kSums * kWarp);
    area.tables = VoteTables<A>::allocate(smem, P, a.C, a.grad != nullptr);
    area.unlabelled = smem.allocate<int32_t>(P + 1);
    return area;
  }
};

// The target --------------------------------------------------------------------------------------
//
// A policy has: scales (the block's), sample (of a row), in_s, add (a class to the three sums that
// are its own), finish (cross-entropy from the sums), gradient (of a class).

/// (N,) int64. Its sums: w_c (z - m) and w_c over S, without weights z - m and 0; classes of S that
/// rank above y.
template <class T>
struct ClassIndex {
  using A = Arithmetic<T>;
  static constexpr bool kProbabilities = false;
  const A* weight;  // (C,) A, or null
  int32_t y;
  A z_target;
  Finished<A> f;

  ZIPFLS_DEVICE static void scales(const LossGeneral& a, const BlockArea<A>& block) {
    mean_scales<A>(a, block);
  }
  ZIPFLS_DEVICE static Sample sample(const LossGeneral& a, int64_t i) { return load_sample(a, i); }

  ZIPFLS_DEVICE ClassIndex(const LossGeneral& a, const Sample& sample, const T* logits)
      : weight(static_cast<const A*>(a.weight)),
        y(sample.y),
        z_target(sample.live ? to_float(logits[sample.y]) : A(0)) {}
  ZIPFLS_DEVICE void set_extremes(A, A) {}
  ZIPFLS_DEVICE bool in_s(int32_t c, A) const { return c != y; }

  ZIPFLS_DEVICE void add(int32_t c, A z, A, A shift, A* sum) const {
    if (c == y) return;
    sum[0] += (weight == nullptr ? A(1) : weight[c]) * (z - shift);
    sum[1] += weight == nullptr ? A(0) : weight[c];
    sum[2] += z > z_target || (z == z_target && c < y);
  }
  /// Returns whether the Zipf part counts.
  ZIPFLS_DEVICE bool finish(const LossGeneral& a, const Sample& sample, const Scales<A>& scales,
                            A max_s, A s_exp, A, const A* sum) {
    RowStats<A> stats;
    stats.max = max_s;
    stats.sum_exp = s_exp;
    stats.smooth = sum[0];
    stats.smooth_weight = sum[1];
    stats.misclassified = static_cast<int32_t>(sum[2]);
    stats.finite = a.C - 1;  // sum is -inf already where a logit is
    stats.sum = stats.smooth;
    const bool counted = counts(a, sample, stats);
    f = finish_cross_entropy(a, sample, stats, z_target, scales, counted);
    return a.zipf && counted;
  }
  ZIPFLS_DEVICE A gradient(int32_t c, A z, A, A label) const {
    if (f.fill) return f.fill_value;
    if (c == y) return f.at_target;
    A g = exp_element<T>(z - f.shift) * f.per_exp - f.constant;
    g -= f.label_step == 0 ? A(0) : f.label_step * label;
    if (f.smooth_step != 0) g -= f.smooth_step * weight[c];
    return g;
  }
};

/// (N, C) A. Its sums over all classes: exp(z - M), u, u (z - M).
template <class T>
struct Probabilities {
  using A = Arithmetic<T>;
  static constexpr bool kProbabilities = true;
  const A* weight;  // (C,) A, or null
  A smoothing, spread;
  bool ce, zipf, invalid = false, infinite = false, labelled = false;
  A top = 0, least = 0;                                               // M, min t
  A along_exp = 0, ce_step = 0, zipf_step = 0, shift = 0, s_exp = 1;  // of the gradient
  Finished<A> f{};

  /// A mean divides by N, the Zipf part's by the samples that count.
  ZIPFLS_DEVICE static void scales(const LossGeneral& a, const BlockArea<A>& block) {
    Totals totals;
    if (threadIdx.x == 0) totals.ce = totals.kept = static_cast<double>(a.N);
    if (a.correct == nullptr) {
      totals.counted = totals.kept;
    } else if (a.reduction == kMean) {
      int32_t counted = 0;
      for (int64_t i = threadIdx.x; i < a.N; i += blockDim.x) counted += a.correct[i];
      totals.counted = counted;
    }
    publish_scales(a, block, totals);
  }
  ZIPFLS_DEVICE static Sample sample(const LossGeneral&, int64_t i) {
    return {i, 0, true, false, false};
  }

  ZIPFLS_DEVICE Probabilities(const LossGeneral& a, const Sample&, const T*)
      : weight(static_cast<const A*>(a.weight)),
        smoothing(static_cast<A>(a.label_smoothing)),
        spread(smoothing / static_cast<A>(a.C)),
        ce(a.ce),
        zipf(a.zipf) {}
  ZIPFLS_DEVICE void set_extremes(A top_, A least_) { top = top_, least = least_; }
  ZIPFLS_DEVICE bool in_s(int32_t, A p) const { return zipf && p == least; }

  /// u_c
  ZIPFLS_DEVICE A share_of(int32_t c, A p) const {
    const A smoothed = smoothing > 0 ? p * (1 - smoothing) + spread : p;
    return weight == nullptr ? smoothed : smoothed * weight[c];
  }
  ZIPFLS_DEVICE void add(int32_t c, A z, A p, A, A* sum) const {
    if (!ce) return;
    const A share = share_of(c, p);
    sum[0] += exp_element<T>(z - top);
    sum[1] += share;
    // 0 times -inf is NaN, as in F.cross_entropy; an infinity times 0 is none: log Z follows.
    if (z - top != A(0)) sum[2] += share * (z - top);
  }
  ZIPFLS_DEVICE bool finish(const LossGeneral& a, const Sample& sample, const Scales<A>& scales,
                            A max_s, A s_exp_, A members, const A* sum) {
    const A all_exp = sum[0], all_share = sum[1], all_cross = sum[2];
    labelled = zipf && members > A(1.5) && (a.correct == nullptr || a.correct[sample.i] != 0);
    invalid = sample.invalid;
    shift = shift_of(max_s);
    s_exp = s_exp_;
    ce_step = scales.ce_step;
    zipf_step = scales.zipf_step;
    along_exp = ce_step * (all_share / all_exp);
    // Then a p that rounds to 0 or 1 stands for one between: no infinity times 0.
    infinite = all_share == infinity<A>() || all_share == -infinity<A>();
    if (ce) {
      const A log_sum = log_of(all_exp);
      f.ce = all_share * (infinite && log_sum == A(0) ? A(1) : log_sum) - all_cross;
    }
    return labelled;
  }
  ZIPFLS_DEVICE A gradient(int32_t c, A z, A p, A label) const {
    if (invalid) return not_a_number<A>();
    A g = 0;
    if (ce) {
      const A e = infinite && z > -infinity<A>() ? A(1) : exp_element<T>(z - top);
      g = e * along_exp - ce_step * share_of(c, p);
    }
    if (labelled && in_s(c, p)) g += zipf_step * (exp_element<T>(z - shift) / s_exp - label);
    return g;
  }
};

// The label ---------------------------------------------------------------------------------------

/// From the votes: q for most classes of S, others patched. Its sums over S: z - m of finite z;
/// classes with a logit of -inf.
struct ByRank {
  static constexpr bool kByRank = true;
};
/// From a log mass for every class. Its sums over S: e^l, e^l l and e^l (z - m), l = log mass less
/// its maximum over S.
struct PerClass {
  static constexpr bool kByRank = false;
};

// The kernels -------------------------------------------------------------------------------------

/// Loss and gradient, by a policy for the target and one for the label.
///
/// - Bytes: a row of logits (C itemsize), of probabilities and of log masses (4 C each; float64: 8)
///   from device memory; of rows that a block does not hold, three times more from L2; log masses
///   twice more from L2. The gradient written once. P votes twice.
/// - Threads: 32 to 256 a row, rows by grid stride.
/// - The row: in registers, kGeneralVectors 16-byte vectors of logits and their target a thread;
///   longer rows in L2.
/// - Accumulators: float (float64: double); sums over rows: double.
/// - Hazards, a barrier for each: votes counted before voted classes outside S are; those before
///   ranks; logits read at voted classes and the target before the gradient, which may overwrite
///   them; gradient before its patches; tables emptied before the next row.
template <class T, class Target, class Label>
ZIPFLS_KERNEL(kGeneralBlock, kGeneralResident)
loss_general_kernel(LossGeneral a) {
  using A = Arithmetic<T>;
  using Group = RowGroup<0>;
  constexpr int V = kVector<T>;
  constexpr bool kByRank = Label::kByRank, kProbabilities = Target::kProbabilities;
  const int32_t P = label_votes(a);
  ZIPFLS_DYNAMIC_SHARED(shared, 16);
  SmemAllocator smem{shared};
  const auto block = BlockArea<A>::allocate(smem);
  const auto area = GeneralArea<A>::allocate(smem, a);
  const VoteTables<A>& t = area.tables;
  clear_tables<Group>(t, P);
  for (int32_t n = threadIdx.x; n <= P; n += blockDim.x) area.unlabelled[n] = 0;
  Target::scales(a, block);  // its barrier publishes the empty tables
  const auto larger_of = [](A x, A y) { return larger(x, y); };
  const auto sum_of = [](A x, A y) { return x + y; };

  for (int64_t i = blockIdx.x; i < a.N; i += gridDim.x) {
    Sample sample = Target::sample(a, i);
    const A* const probabilities =  // (C,) A
        static_cast<const A*>(a.probabilities) + i * a.probabilities_stride;
    const A* const log_mass =  // (C,) A, or (R,) by rank
        static_cast<const A*>(a.log_mass) + (kByRank ? 0 : i * a.C);
    RowShare<T, std::conditional_t<kProbabilities, A, void>, kGeneralVectors> x;
    x.row = RowVectors<T>::of(a, sample);
    x.beside = probabilities;
    const uint32_t vectors = x.row.count;
    if (!sample.live) x.row.count = 0;  // no logit is read
    if (x.parts() == 1) x.load(0);
    Target target(a, sample, x.row.logits);

    // 1. The votes; the largest logit, the least probability.
    bool bad = false;
    if (sample.live && a.votes.data != nullptr)
      bad = P > 0 ? count_votes<Group>(a.votes, i, a.C, t) : check_votes<Group>(a.votes, i, a.C);
    if constexpr (kProbabilities) {
      A most[2] = {-infinity<A>(), -infinity<A>()};  // max z, -min t
      x.for_classes([&](int32_t, A z, A p) {
        most[0] = larger(most[0], z);
        most[1] = larger(most[1], -p);
        bad |= p != p;
      });
      block_all_reduce(most, area.partial, larger_of);
      target.set_extremes(most[0], -most[1]);
    }
    sample.invalid |= Group::sync_any(bad);

    // 2. Over S: the largest logit and, per class, the largest log mass.
    const int32_t K = t.at_least[1];
    if constexpr (kByRank) {
      for_votes<Group>(t, sample.live ? P : 0, [&](int32_t, int32_t c, int32_t n, bool first) {
        if (!first || target.in_s(c, probabilities[c])) return;
        atomicAdd(&area.unlabelled[0], 1);
        atomicAdd(&area.unlabelled[n], 1);
      });
    }
    A top[2] = {-infinity<A>(), -infinity<A>()};  // max z, max log mass
    x.for_classes([&](int32_t c, A z, A p) {
      if (!target.in_s(c, p)) return;
      top[0] = larger(top[0], z);
      if (!kByRank) top[1] = larger(top[1], log_mass[c]);
    });
    block_all_reduce(top, area.partial, larger_of);
    const A shift = shift_of(top[0]);

    // 3. Sums: the target's, then over S.
    A sum[GeneralArea<A>::kSums] = {};
    A &members = sum[3], &s_exp = sum[4];
    A &mass = sum[5], &entropy = sum[6], &cross = sum[7];  // PerClass
    A &s_sum = sum[5], &absent = sum[6];                   // ByRank
    x.for_classes([&](int32_t c, A z, A p) {
      target.add(c, z, p, shift, sum);
      if (!target.in_s(c, p)) return;
      members += 1;
      s_exp += exp_element<T>(z - shift);
      if (!kByRank) {
        const A relative = relative_log_mass(log_mass[c], top[1]), e = exp_of(relative);
        if (e == 0) return;
        mass += e;
        entropy += e * relative;
        cross += e * (z - shift);
      } else if (z == -infinity<A>()) {
        absent += 1;
      } else {
        s_sum += z - shift;
      }
    });
    block_all_reduce(sum, area.partial, sum_of);

    // 4. Losses, and the gradient at the voted classes, whose logits step 5 may overwrite.
    const bool labelled = target.finish(a, sample, *block.scales, top[0], s_exp, members, sum);
    Finished<A>& f = target.f;
    if (!kByRank && labelled) f.zipf = (entropy - cross) / mass - log_of(mass) + log_of(s_exp);
    if (kByRank && labelled && Group::leads()) {
      const A sum_p_log_p = label_members<Group>(t, P, log_mass, [&](int32_t n) {
        return n == 0 ? static_cast<int32_t>(members) - (K - area.unlabelled[0])
                      : t.at_least[n] - t.at_least[n + 1] - area.unlabelled[n];
      });
      __syncwarp(kAllLanes);  // lanes read one another's labels
      const auto logit = [&](int32_t c) { return to_float(x.row.logits[c]); };
      VotedSums<A> voted;
      for_votes<RowGroup<kWarp>>(t, P, [&](int32_t p, int32_t c, int32_t n, bool first) {
        const A z = logit(c), label = t.label[n];
        if (target.in_s(c, probabilities[c])) voted.add(z - shift, n, label, t.label[0]);
        if (first && a.grad != nullptr) t.patch[p] = target.gradient(c, z, probabilities[c], label);
      });
      voted.template reduce<kWarp>();
      const A q = t.label[0];
      f.zipf = sum_p_log_p - (q * s_sum + voted.cross) + log_of(s_exp);
      if (absent - voted.absent > A(0.5) && q > 0) f.zipf += infinity<A>();
    }
    if (threadIdx.x == 0) report_row(a, block, 0, sample, f);
    __syncthreads();  // labels and patches are complete, and no logit is read by another thread

    // 5. The gradient.
    if (a.grad != nullptr) {
      const A q = kByRank && labelled ? t.label[0] : A(0);
      if (!sample.live) {  // the same value everywhere
#pragma unroll 1
        for (uint32_t j = threadIdx.x; j < vectors; j += blockDim.x) {
          A g[V];
#pragma unroll
          for (int v = 0; v < V; v++) g[v] = target.gradient(-1, 0, 0, 0);
          x.row.store(j, g);
        }
      }
      x.for_vectors([&](uint32_t j, const A* z, const A* p) {
        A g[V];
#pragma unroll
        for (int v = 0; v < V; v++) {
          const int32_t c = x.row.column(j) + v;
          g[v] = not_a_number<A>();
          if (!x.row.has(c)) continue;
          A label = q;
          if (!kByRank && labelled && target.in_s(c, p[v]))
            label = exp_of(relative_log_mass(log_mass[c], top[1])) / mass;
          g[v] = target.gradient(c, z[v], p[v], label);
        }
        x.row.store(j, g);
      });
      if (kByRank && labelled) {
        __syncthreads();  // other threads patch the gradient
      }
    }
    if constexpr (kByRank) {
      const bool patched = labelled && !sample.invalid && a.grad != nullptr;
      forget_votes<Group>(t, sample.live ? P : 0, [&](int32_t p, int32_t c) {
        if (patched) from_float(t.patch[p], x.row.grad + c);
      });
      for (int32_t n = threadIdx.x; n <= P; n += blockDim.x) area.unlabelled[n] = 0;
    }
    __syncthreads();  // the tables are empty for the next row
  }
  combine_losses<A>(a, block);
}

/// Whether each sample counts under only_correct: not ignored, and no class ranks above its target,
/// of probabilities the largest one's class (the lowest among equals; NaN is never the largest).
///
/// - Bytes: C itemsize a row, of probabilities C (itemsize + 4) (float64: 8 for 4).
/// - Threads: 128 a row, rows by grid stride, elements one by one: needed by only_correct alone,
///   where a mean's denominator precedes every gradient.
/// - Hazards: none but block_all_reduce_max's.
template <class T, bool PROBABILITIES>
ZIPFLS_KERNEL(kCorrectBlock)
loss_correct_kernel(LossGeneral a, int32_t* correct) {
  using A = Arithmetic<T>;
  ZIPFLS_DYNAMIC_SHARED(shared, 16);
  SmemAllocator smem{shared};
  double* const partial = smem.allocate<double>(kWarp);  // (warps,) float64: of a class, exact
  for (int64_t i = blockIdx.x; i < a.N; i += gridDim.x) {
    const T* const z = static_cast<const T*>(a.logits) + i * a.logits_stride;  // (C,) T
    int32_t y;
    bool kept = true;
    if constexpr (PROBABILITIES) {
      const A* const p =  // (C,) A
          static_cast<const A*>(a.probabilities) + i * a.probabilities_stride;
      A most = -infinity<A>();
      y = a.C;  // C: NaN all
      for (int32_t c = threadIdx.x; c < a.C; c += blockDim.x) {
        if (p[c] > most || (p[c] == most && y == a.C)) {
          most = p[c];
          y = c;
        }
      }
      const double top = block_all_reduce_max(static_cast<double>(most), partial);
      if (static_cast<double>(most) != top) y = a.C;
      y = static_cast<int32_t>(-block_all_reduce_max(-static_cast<double>(y), partial));
      y = y == a.C ? 0 : y;
    } else {
      const int64_t target = a.target[i];
      kept = target != a.ignore_index;
      y = static_cast<int32_t>(target < 0 ? 0 : target >= a.C ? a.C - 1 : target);
    }
    const A z_target = to_float(z[y]);
    bool misclassified = false;
    for (int32_t c = threadIdx.x; c < a.C; c += blockDim.x) {
      const A x = to_float(z[c]);
      misclassified |= x > z_target || (x == z_target && c < y);
    }
    misclassified = RowGroup<0>::sync_any(misclassified);
    if (threadIdx.x == 0) correct[i] = kept && !misclassified;
  }
}

}  // namespace zipfls::cuda
