// Loss and gradient of rows that are too long to stay on chip.
#pragma once

#include "loss_rows.cuh"

namespace zipfls::cuda {

/// Loss and gradient of long rows: a block reads a row twice, the second time backwards, so that
/// the vectors read last are still in L2.
///
/// - Bytes: 2 C itemsize a row of device memory and C itemsize of L2; votes and target as
///   loss_fwd_kernel.
/// - Threads: 512 a row, rows by grid stride; 32 elements (float64: 4) of whole vectors at once but
///   at the row's ends and at the target.
/// - The row: in L2.
/// - Accumulators: a running maximum a thread, sums in float (float64: double) relative to it; sums
///   over rows: double.
/// - Hazard: other threads patch the gradient at the voted classes and the target; a barrier
///   precedes the patches.
template <class T>
ZIPFLS_KERNEL(kLongBlock, 1)
loss_fwd_long_kernel(LossFwd a) {
  using A = Arithmetic<T>;
  using Group = RowGroup<0>;
  using Leaders = RowGroup<kWarp>;
  constexpr int V = kVector<T>, U = sizeof(T) == 8 ? 2 : 32 / V;  // vectors in flight a thread
  constexpr uint32_t kStep = U * kLongBlock;
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
    A entropy = 0;
    if (a.zipf && Group::leads()) {
      entropy = label_counts<Group>(t, P, a.C, sample.y, static_cast<const A*>(a.log_mass));
      __syncwarp(kAllLanes);
    }

    // Statistics: the sums move to a new shift when a larger logit occurs. Nearly all passes of a
    // thread are plain: its U vectors are whole, and none holds the target.
    RowStats<A> stats;
    ExpShift<T> shift(0);
    const uint32_t count = sample.live ? row.count : 0, whole_end = row.whole_end();
    const uint32_t plain_begin = row.whole_begin();
    const uint32_t behind =
        kStep - kLongBlock;  // from a pass's first vector of a thread to its last
    const uint32_t plain_end = whole_end > behind ? whole_end - behind : 0;
    const uint32_t target_vector = static_cast<uint32_t>(sample.y + row.phase) / V;
    const uint32_t target_base = target_vector % kLongBlock == threadIdx.x
                                     ? target_vector / kStep * kStep + threadIdx.x
                                     : UINT32_MAX;  // first vector of the pass with the target
    auto move_to = [&](A top) {
      if (!(top > stats.max)) return;
      const A lift = shift_of(stats.max) - top;
      stats.sum_exp *= stats.max == -infinity<A>() ? A(0) : exp_of(lift);
      if (stats.finite != 0) stats.sum += static_cast<A>(stats.finite) * lift;
      stats.max = top;
      shift = ExpShift<T>(top);
    };
#pragma unroll 1
    for (uint32_t base = threadIdx.x; base < count; base += kStep) {
      if (base >= plain_begin && base < plain_end && base != target_base) {
        uint4 raw[U];
        A x[U * V];
#pragma unroll
        for (int u = 0; u < U; u++)
          raw[u] = ptx::ld_global_cg_16(row.vector(base) + u * kLongBlock);
        move_to(largest_of<T>(raw));
#pragma unroll
        for (int u = 0; u < U; u++) unpack<T>(raw[u], x + u * V);
        add_vector<T, U * V>(x, shift, stats);
        continue;
      }
#pragma unroll 1
      for (uint32_t j = base; j < count && j < base + kStep; j += kLongBlock) {
        A x[V], top = -infinity<A>();
        row.load(j, x);
#pragma unroll
        for (int v = 0; v < V; v++) {
          if (row.column(j) + v == sample.y) x[v] = -infinity<A>();
          top = larger(top, x[v]);
        }
        move_to(top);
        add_vector<T>(x, shift, stats);
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
      const auto finished = finish_row<T, Leaders>(
          a, sample, stats, z_target, entropy, t, P, *block.scales, logit,
          [](int32_t) { return true; }, true);
      if (threadIdx.x == 0) {
        report_row(a, block, 0, sample, finished);
        keep_factors(a, sample, finished);
        *area.finished = finished;
      }
    }
    __syncthreads();
    const Finished<A> f = *area.finished;

    if (with_grad) {
      const uint32_t passes = (row.count + kStep - 1) / kStep;
      const ExpShift<T> e(f.shift);
      const A per_exp = f.per_exp * e.correction, minus = -f.constant;
      const bool all_plain = sample.live && !f.fill && f.smooth_step == 0 && e.scaled == e.scaled;
#pragma unroll 1
      for (uint32_t pass = passes; pass-- > 0;) {
        const uint32_t base = pass * kStep + threadIdx.x;
        if (all_plain && base >= plain_begin && base < plain_end) {
          uint4 raw[U];
#pragma unroll
          for (int u = 0; u < U; u++)
            raw[u] = ptx::ld_global_cs_16(row.vector(base) + u * kLongBlock);
#pragma unroll
          for (int u = 0; u < U; u++) {
            A x[V];
            unpack<T>(raw[u], x);
#pragma unroll
            for (int v = 0; v < V; v++) x[v] = fused(e.exp_above(e.above(x[v])), per_exp, minus);
            ptx::st_global_cg_16(row.grad_vector(base) + u * kLongBlock, pack<T>(x));
          }
          continue;
        }
#pragma unroll 1
        for (uint32_t j = base; j < row.count && j < base + kStep; j += kLongBlock) {
          A x[V] = {};
          if (sample.live) {
            row.load(j, x);
#pragma unroll
            for (int v = 0; v < V; v++)
              x[v] = fused(exp_element<T>(x[v] - f.shift), f.per_exp, minus);
          }
          if (f.fill || f.smooth_step != 0) rare_gradient<V>(x, row.column(j), a.C, f, weight);
          row.store(j, x);
        }
      }
      __syncthreads();  // other threads patch the gradient
    }
    const bool patched = with_grad && !f.fill;
    if (patched && threadIdx.x == 0) from_float(f.at_target, row.grad + sample.y);
    forget_votes<Group>(t, sample.live ? P : 0, [&](int32_t p, int32_t c) {
      if (patched && c != sample.y) from_float(t.patch[p], row.grad + c);
    });
    __syncthreads();
  }
  combine_losses<A>(a, block);
}

}  // namespace zipfls::cuda
