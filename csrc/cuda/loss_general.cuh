// Stage 4 for targets that are probabilities t (N, C) (MATH.md, "Soft targets").
//
// With M = max z_c and Z = sum exp(z_c - M) over all classes, u_c = w_c ((1 - e) t_c + e / C), and
// over S = {c : t_c = min t}: m = max z_c, s = sum exp(z_c - m), the label p,
//
//     CE     = sum u log Z - sum u (z - M)
//     L_zipf = sum p log p - sum p (z - m) + log s
//     dz_c   = exp(z_c - M) sum u / Z - u_c + lambda [c in S] (exp(z_c - m) / s - p_c)
//
// before the denominators. The label is that of label.h with S in the place of the non-target
// classes: q for every class of S without a vote, and at most P others. Kernels:
//
//   soft_loss_fwd_kernel   dense: a log mass for every class given (random laws, ranks by logits)
//   soft_correct_kernel    which samples count under only_correct
#pragma once

#include "loss_rows.cuh"

namespace zipfls::cuda {

/// Memory of a block beside BlockArea.
template <class A>
struct SoftArea {
  static constexpr int kSums = 8;
  A* partial;  // (kSums, 32) A: of each warp
  VoteTables<A> tables;
  int32_t* unlabelled;  // (P + 1,) int32: [n] classes outside S with n votes, [0] with any; all 0
                        // between rows

  ZIPFLS_HOST_DEVICE static SoftArea allocate(SmemAllocator& smem, int32_t P, int32_t C,
                                              bool with_grad) {
    SoftArea area;
    area.partial = smem.allocate<A>(kSums * kWarp);
    area.tables = VoteTables<A>::allocate(smem, P, C, with_grad);
    area.unlabelled = smem.allocate<int32_t>(P + 1);
    return area;
  }
};

/// Votes that make the label.
ZIPFLS_HOST_DEVICE int32_t label_votes(const LossGeneral& a) {
  return a.dense ? 0 : counted_votes(a);
}

/// A thread's share of a row's logits and target, in registers; of a row with more than the block
/// holds at once, one part of it at a time.
template <class T>
struct SoftShare {
  using A = Arithmetic<T>;
  static constexpr int V = kVector<T>, U = kSoftVectors;
  RowVectors<T> row;
  const A* target;  // (C,) A
  uint4 logits[U];  // V T each
  A share[U * V];   // of the target

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
      if (row.whole(j)) {
        logits[u] = ptx::ld_global_cg_16(row.logits + column);
#pragma unroll
        for (int v = 0; v < V; v += kVector<A>)
          unpack<A>(ptx::ld_global_cg_16(target + column + v), share + u * V + v);
      } else {
        logits[u] = row.load_edge(j);
#pragma unroll
        for (int v = 0; v < V; v++)
          share[u * V + v] = row.has(column + v) ? target[column + v] : A(0);
      }
    }
  }

  /// Calls visit(u, vector's index, its logits (V,)) for all vectors of this thread.
  template <class Visit>
  ZIPFLS_DEVICE void for_vectors(Visit visit) {
    const uint32_t n = parts();
#pragma unroll 1
    for (uint32_t part = 0; part < n; part++) {
      if (n > 1) load(part);
#pragma unroll
      for (int u = 0; u < U; u++) {
        const uint32_t j = vector(part, u);
        if (j >= row.count) continue;
        A x[V];
        unpack<T>(logits[u], x);
        visit(u, j, x);
      }
    }
  }
  /// Calls visit(class, its logit, its share of the target) for all classes of this thread.
  template <class Visit>
  ZIPFLS_DEVICE void for_classes(Visit visit) {
    for_vectors([&](int u, uint32_t j, const A* x) {
#pragma unroll
      for (int v = 0; v < V; v++)
        if (row.has(row.column(j) + v)) visit(row.column(j) + v, x[v], share[u * V + v]);
    });
  }
};

/// Loss and gradient where a target is probabilities.
///
/// - Bytes: C (2 itemsize + 4) a row of device memory (float64: 8 for 4); of rows that a block does
///   not hold, logits and target three times more, from L2. dense: 4 C more, and twice that from
///   L2. P votes twice.
/// - Threads: 32 to 256 a row, rows by grid stride.
/// - The row: in registers, kSoftVectors 16-byte vectors of logits and their target a thread;
///   longer rows in L2.
/// - Accumulators: float (float64: double); sums over rows: double.
/// - Hazards, each with its barrier: votes counted before the classes of the target are told apart,
///   those before ranks; logits looked up at voted classes before the gradient, which may overwrite
///   them; gradient before its patches; tables emptied before the next row.
template <class T, bool DENSE>
ZIPFLS_KERNEL(kSoftBlock, kSoftResident)
soft_loss_fwd_kernel(LossGeneral a) {
  using A = Arithmetic<T>;
  using Group = RowGroup<0>;
  constexpr int V = kVector<T>;
  const int32_t P = label_votes(a);
  ZIPFLS_DYNAMIC_SHARED(shared, 16);
  SmemAllocator smem{shared};
  const auto block = BlockArea<A>::allocate(smem);
  const auto area = SoftArea<A>::allocate(smem, P, a.C, a.grad != nullptr);
  const VoteTables<A>& t = area.tables;
  clear_tables<Group>(t, P);
  for (int32_t n = threadIdx.x; n <= P; n += blockDim.x) area.unlabelled[n] = 0;

  Totals totals;  // a mean divides by N, the Zipf part's by those that count
  if (threadIdx.x == 0) totals.ce = totals.kept = static_cast<double>(a.N);
  if (a.correct == nullptr) {
    totals.counted = totals.kept;
  } else if (a.reduction == kMean) {
    int32_t counted = 0;
    for (int64_t i = threadIdx.x; i < a.N; i += blockDim.x) counted += a.correct[i];
    totals.counted = counted;
  }
  publish_scales(a, block, totals);  // its barrier publishes the empty tables

  const A* const weight = static_cast<const A*>(a.weight);  // (C,) A
  const A smoothing = static_cast<A>(a.label_smoothing), spread = smoothing / static_cast<A>(a.C);
  const auto larger_of = [](A x, A y) { return larger(x, y); };
  const auto sum_of = [](A x, A y) { return x + y; };
  // w_c t'_c
  const auto share_of = [&](int32_t c, A p) {
    const A smoothed = smoothing > 0 ? p * (1 - smoothing) + spread : p;
    return weight == nullptr ? smoothed : smoothed * weight[c];
  };

  for (int64_t i = blockIdx.x; i < a.N; i += gridDim.x) {
    Sample sample = {i, 0, true, false, false};
    SoftShare<T> x;
    x.row = RowVectors<T>::of(a, sample);
    x.target = static_cast<const A*>(a.probabilities) + i * a.probabilities_stride;
    const A* const log_mass =  // (C,) A, or (R,) by rank
        static_cast<const A*>(a.log_mass) + (DENSE ? i * a.C : 0);
    if (x.parts() == 1) x.load(0);

    // 1. The votes; the largest logit, the least probability.
    bool bad = false;
    if (a.votes.data != nullptr)
      bad = P > 0 ? count_votes<Group>(a.votes, i, a.C, t) : check_votes<Group>(a.votes, i, a.C);
    A most[2] = {-infinity<A>(), -infinity<A>()};  // max z, -min t
    x.for_classes([&](int32_t, A z, A p) {
      most[0] = larger(most[0], z);
      most[1] = larger(most[1], -p);
      bad |= p != p;
    });
    block_all_reduce(most, area.partial, larger_of);
    sample.invalid = Group::sync_any(bad);
    const A top = most[0], least = -most[1];
    const auto in_s = [&](A p) { return a.zipf && p == least; };

    // 2. The largest logit and, where each class has its own, the largest log mass in S.
    const int32_t K = t.at_least[1];
#pragma unroll 1
    for (int32_t k = threadIdx.x; k < K; k += blockDim.x) {
      const int32_t slot = t.voted[k];
      if (in_s(x.target[t.class_of(slot)])) continue;
      atomicAdd(&area.unlabelled[0], 1);
      atomicAdd(&area.unlabelled[t.counts[slot]], 1);
    }
    A top_s[2] = {-infinity<A>(), -infinity<A>()};  // max z, max log mass
    x.for_classes([&](int32_t c, A z, A p) {
      if (!in_s(p)) return;
      top_s[0] = larger(top_s[0], z);
      if (DENSE) top_s[1] = larger(top_s[1], log_mass[c]);
    });
    block_all_reduce(top_s, area.partial, larger_of);
    const A shift = shift_of(top_s[0]);

    // 3. Sums: over all classes, then over S.
    A sum[SoftArea<A>::kSums] = {};
    A &all_exp = sum[0], &all_share = sum[1], &all_cross = sum[2], &members = sum[3],
      &s_exp = sum[4];
    A &mass = sum[5], &entropy = sum[6], &cross = sum[7];  // dense: e^l, e^l l, e^l (z - shift)
    A &s_sum = sum[5], &absent = sum[6];  // else: z - shift, finite z; classes with a logit of -inf
    x.for_classes([&](int32_t c, A z, A p) {
      if (a.ce) {
        const A share = share_of(c, p);
        all_exp += exp_element<T>(z - top);
        all_share += share;
        // 0 times -inf is NaN, as in F.cross_entropy; an infinity times 0 is none: log Z follows.
        if (z - top != A(0)) all_cross += share * (z - top);
      }
      if (!in_s(p)) return;
      members += 1;
      s_exp += exp_element<T>(z - shift);
      if (DENSE) {
        const A relative = relative_log_mass(log_mass[c], top_s[1]), e = exp_of(relative);
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

    // 4. Losses, and the gradient at the voted classes, which others may not compute any more once
    // the gradient is being written.
    const bool labelled = a.zipf && members > A(1.5) && (a.correct == nullptr || a.correct[i] != 0);
    const A ce_step = block.scales->ce_step, zipf_step = block.scales->zipf_step;
    const A along_exp = ce_step * (all_share / all_exp);
    // Then a p that rounds to 0 or 1 stands for one between: no infinity times 0.
    const bool infinite = all_share == infinity<A>() || all_share == -infinity<A>();
    const auto gradient = [&](int32_t c, A z, A p, A label) {
      A g = 0;
      if (a.ce) {
        const A e = infinite && z > -infinity<A>() ? A(1) : exp_element<T>(z - top);
        g = e * along_exp - ce_step * share_of(c, p);
      }
      if (labelled && in_s(p)) g += zipf_step * (exp_element<T>(z - shift) / s_exp - label);
      return g;
    };
    Finished<A> f{};
    if (a.ce) {
      const A log_sum = log_of(all_exp);
      f.ce = all_share * (infinite && log_sum == A(0) ? A(1) : log_sum) - all_cross;
    }
    if (DENSE && labelled) f.zipf = (entropy - cross) / mass - log_of(mass) + log_of(s_exp);
    if (!DENSE && labelled && Group::leads()) {
      const A sum_p_log_p = label_members<Group>(t, P, log_mass, [&](int32_t n) {
        return n == 0 ? static_cast<int32_t>(members) - (K - area.unlabelled[0])
                      : t.at_least[n] - t.at_least[n + 1] - area.unlabelled[n];
      });
      __syncwarp(kAllLanes);  // lanes read one another's labels
      const auto logit = [&](int32_t c) { return to_float(x.row.logits[c]); };
      const auto voted = voted_sums<Group>(a, i, true, t, shift, logit,
                                           [&](int32_t c) { return in_s(x.target[c]); });
      const A q = t.label[0];
      f.zipf = sum_p_log_p - (q * s_sum + voted.cross) + log_of(s_exp);
      if (absent - voted.absent > A(0.5) && q > 0) f.zipf += infinity<A>();
      if (t.patch != nullptr) {
#pragma unroll 1
        for (int32_t k = Group::lane(); k < K; k += kWarp) {
          const int32_t slot = t.voted[k], c = t.class_of(slot);
          t.patch[k] = gradient(c, logit(c), x.target[c], t.label[t.counts[slot]]);
        }
      }
    }
    if (threadIdx.x == 0) report_row(a, block, 0, sample, f);
    __syncthreads();  // labels and patches are there, and nobody looks a logit up any more

    // 5. The gradient.
    if (a.grad != nullptr) {
      const A q = DENSE || !labelled ? A(0) : t.label[0];
      x.for_vectors([&](int u, uint32_t j, const A* z) {
        A g[V];
#pragma unroll
        for (int v = 0; v < V; v++) {
          const int32_t c = x.row.column(j) + v;
          g[v] = not_a_number<A>();
          if (sample.invalid || !x.row.has(c)) continue;
          const A p = x.share[u * V + v];
          A label = q;
          if (DENSE && labelled && in_s(p))
            label = exp_of(relative_log_mass(log_mass[c], top_s[1])) / mass;
          g[v] = gradient(c, z[v], p, label);
        }
        x.row.store(j, g);
      });
      if (!DENSE && labelled) {
        __syncthreads();  // the patches come over the gradient, from other threads
#pragma unroll 1
        for (int32_t k = threadIdx.x; k < K && !sample.invalid; k += blockDim.x)
          from_float(t.patch[k], x.row.grad + t.class_of(t.voted[k]));
      }
    }
    forget_votes<Group>(t, P, K);
    for (int32_t n = threadIdx.x; n <= P; n += blockDim.x) area.unlabelled[n] = 0;
    __syncthreads();
  }
  combine_losses<A>(a, block);
}

/// Whether argmax z = argmax t, the lowest class among equals in both; NaN is never the largest
/// probability.
///
/// - Bytes: C (itemsize + 4) a row (float64: 8 for 4). 128 threads a row, rows by grid stride,
///   elements one by one: needed by only_correct alone.
/// - Hazards: none but block_all_reduce_max's.
template <class T>
ZIPFLS_KERNEL(kCorrectBlock)
soft_correct_kernel(LossGeneral a, int32_t* correct) {
  using A = Arithmetic<T>;
  ZIPFLS_DYNAMIC_SHARED(shared, 16);
  SmemAllocator smem{shared};
  double* const partial = smem.allocate<double>(kWarp);  // (warps,) float64: of a class, exact
  for (int64_t i = blockIdx.x; i < a.N; i += gridDim.x) {
    const T* const z = static_cast<const T*>(a.logits) + i * a.logits_stride;  // (C,) T
    const A* const t =
        static_cast<const A*>(a.probabilities) + i * a.probabilities_stride;  // (C,) A
    A most = -infinity<A>();
    int32_t y = a.C;  // C: NaN all
    for (int32_t c = threadIdx.x; c < a.C; c += blockDim.x) {
      if (t[c] > most || (t[c] == most && y == a.C)) {
        most = t[c];
        y = c;
      }
    }
    const double top = block_all_reduce_max(static_cast<double>(most), partial);
    if (static_cast<double>(most) != top) y = a.C;
    y = static_cast<int32_t>(-block_all_reduce_max(-static_cast<double>(y), partial));
    y = y == a.C ? 0 : y;
    const A z_target = to_float(z[y]);
    bool misclassified = false;
    for (int32_t c = threadIdx.x; c < a.C; c += blockDim.x) {
      const A x = to_float(z[c]);
      misclassified |= x > z_target || (x == z_target && c < y);
    }
    misclassified = RowGroup<0>::sync_any(misclassified);
    if (threadIdx.x == 0) correct[i] = !misclassified;
  }
}

// Its launch --------------------------------------------------------------------------------------

/// Threads of a block of soft_loss_fwd for rows of C classes.
template <class T>
int soft_threads(int32_t C) {
  const uint32_t vectors = vectors_of(C, kVector<T>);
  const int threads = round_up((vectors + kSoftVectors - 1) / kSoftVectors, kWarp);
  return threads < kSoftBlock ? threads : kSoftBlock;
}

/// Shared memory of a block of soft_loss_fwd.
template <class T>
uint32_t soft_shared_bytes(const LossGeneral& a) {
  SmemAllocator smem{nullptr};
  BlockArea<Arithmetic<T>>::allocate(smem);
  SoftArea<Arithmetic<T>>::allocate(smem, label_votes(a), a.C, a.grad != nullptr);
  return smem.used;
}

}  // namespace zipfls::cuda
