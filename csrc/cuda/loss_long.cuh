// Loss and gradient of rows that are too long to stay on chip.
#pragma once

#include "loss_rows.cuh"

namespace zipfls::cuda {

/// Loss and gradient of long rows: a block reads a row twice, the second time backwards, so that
/// the vectors read last are still in L2.
///
/// - Bytes: 2 C itemsize a row of device memory and C itemsize of L2; votes and target as
///   loss_fwd_kernel.
/// - Threads: 512 a row, rows by grid stride.
/// - The row: in L2.
/// - Accumulators: a running maximum a thread, sums in float (float64: double) relative to it; sums
///   over rows: double.
/// - Hazard: other threads patch the gradient at the voted classes and the target; a barrier
///   precedes the patches.
template <class T>
ZIPFLS_KERNEL(kLongBlock)
loss_fwd_long_kernel(LossFwd a) {
  using A = Arithmetic<T>;
  using Group = RowGroup<0>;
  constexpr int V = kVector<T>, U = 4;  // vectors in flight a thread
  const bool with_grad = a.grad != nullptr;
  const int32_t P = counted_votes(a);
  ZIPFLS_DYNAMIC_SHARED(shared, 16);
  SmemAllocator smem{shared};
  const auto block = BlockArea<A>::allocate(smem);
  const auto area = RowArea<T>::allocate(smem, 0, P, a.C, with_grad, true);
  const VoteTables<A>& t = area.tables;
  clear_tables<Group>(t, P);
  mean_scales<A>(a, block);
  const A* const weight = static_cast<const A*>(a.weight);
  const A* const smooth_weight = a.ce && a.label_smoothing != 0 ? weight : nullptr;
  const bool look_for_misclassified = a.zipf && a.only_correct && a.correct == nullptr;

  for (int64_t i = blockIdx.x; i < a.N; i += gridDim.x) {
    Sample sample = load_sample(a, i);
    const auto row = RowVectors<T>::of(a, sample);
    auto logit = [&](int32_t c) { return to_float(row.logits[c]); };
    const A z_target = sample.live ? logit(sample.y) : A(0);
    bool bad_vote = false;
    if (sample.live && a.votes.data != nullptr)
      bad_vote =
          a.zipf ? count_votes<Group>(a.votes, i, a.C, t) : check_votes<Group>(a.votes, i, a.C);
    sample.invalid |= Group::sync_any(bad_vote) && !sample.ignored;
    const int32_t K = t.at_least[1];
    A entropy = 0;
    if (a.zipf && Group::leads()) {
      entropy = label_counts<Group>(t, P, a.C, sample.y, static_cast<const A*>(a.log_mass));
      __syncwarp(kAllLanes);
    }

    // Statistics: the sums move to a new shift when a larger logit occurs.
    RowStats<A> stats;
    const uint32_t step = blockDim.x * U, count = sample.live ? row.count : 0;
    for (uint32_t base = threadIdx.x; base < count; base += step) {
      uint4 raw[U];
      A x[U * V];
#pragma unroll
      for (int u = 0; u < U; u++) {
        const uint32_t j = base + u * blockDim.x;
        if (j < count && row.whole(j)) raw[u] = ptx::ld_global_cg_16(row.logits + row.column(j));
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
    const RareSums<A> rare{smooth_weight, look_for_misclassified, sample.y, z_target};
    if (rare.wanted() && sample.live) {
#pragma unroll 1
      for (int32_t c = threadIdx.x; c < a.C; c += blockDim.x)
        rare.add(c, logit(c), shift_of(stats.max), stats);
    }
    stats = merge_lanes<kWarp>(stats, smooth_weight != nullptr, look_for_misclassified);
    if (threadIdx.x % kWarp == 0) area.warps[threadIdx.x / kWarp] = stats;
    __syncthreads();
    if (Group::leads()) {
      stats = threadIdx.x < blockDim.x / kWarp ? area.warps[threadIdx.x] : RowStats<A>{};
      stats = merge_lanes<kWarp>(stats, smooth_weight != nullptr, look_for_misclassified);
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
          if (j < count && row.whole(j)) raw[u] = ptx::ld_global_cs_16(row.logits + row.column(j));
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
      __syncthreads();  // other threads patch the gradient
      if (!f.fill) {
#pragma unroll 1
        for (int32_t k = threadIdx.x; k < K; k += blockDim.x) {
          const int32_t c = t.class_of(t.voted[k]);
          if (c != sample.y) from_float(t.patch[k], row.grad + c);
        }
        if (threadIdx.x == 0) from_float(f.at_target, row.grad + sample.y);
      }
    }
    forget_votes<Group>(t, P, K);
    __syncthreads();
  }
  combine_losses<A>(a, block);
}

}  // namespace zipfls::cuda
