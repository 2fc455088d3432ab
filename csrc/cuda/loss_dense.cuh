// Loss and gradient where a log mass is given for every class of every sample.
#pragma once

#include "loss_math.cuh"

namespace zipfls::cuda {

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
template <class T>
ZIPFLS_KERNEL(kDenseBlock, kDenseResident)
loss_dense_kernel(LossFwd a) {
  using A = Arithmetic<T>;
  using Group = RowGroup<0>;
  ZIPFLS_DYNAMIC_SHARED(shared, 16);
  SmemAllocator smem{shared};
  const auto block = BlockArea<A>::allocate(smem);
  A* const partial = smem.allocate<A>(kDenseBlock / kWarp);  // (warps,) A
  mean_scales<A>(a, block);
  const A* const weight = static_cast<const A*>(a.weight);

  for (int64_t i = blockIdx.x; i < a.N; i += gridDim.x) {
    Sample sample = load_sample(a, i);
    const T* const z = static_cast<const T*>(a.logits) + i * a.logits_stride;  // (C,) T
    const A* const log_mass = static_cast<const A*>(a.log_mass) + i * a.C;     // (C,) A
    const int32_t C = sample.live ? a.C : 0, y = sample.y;
    const A z_target = sample.live ? to_float(z[y]) : A(0);
    sample.invalid |= Group::sync_any(sample.live && a.votes.data != nullptr &&
                                      check_votes<Group>(a.votes, i, a.C)) &&
                      !sample.ignored;

    RowStats<A> stats;
    A top = -infinity<A>();
    for (int32_t c = threadIdx.x; c < C; c += blockDim.x) {
      if (c == y) continue;
      stats.max = larger(stats.max, to_float(z[c]));
      top = larger(top, log_mass[c]);
    }
    stats.max = block_all_reduce_max(stats.max, partial);
    top = block_all_reduce_max(top, partial);
    const A shift = shift_of(stats.max);
    A mass = 0, entropy = 0,
      cross = 0;  // sums of e^a, e^a a and e^a (z - shift), a = log mass - top
    for (int32_t c = threadIdx.x; c < C; c += blockDim.x) {
      const A x = to_float(z[c]);
      if (c == y) continue;
      stats.sum_exp += exp_element<T>(x - shift);
      stats.smooth += (weight == nullptr ? A(1) : weight[c]) * (x - shift);
      stats.smooth_weight += weight == nullptr ? A(0) : weight[c];
      stats.misclassified += x > z_target || (x == z_target && c < y);
      const A relative = relative_log_mass(log_mass[c], top), p = exp_of(relative);
      if (p == 0) continue;
      mass += p;
      entropy += p * relative;
      cross += p * (x - shift);
    }
    stats.sum_exp = block_all_reduce_sum(stats.sum_exp, partial);
    stats.smooth = block_all_reduce_sum(stats.smooth, partial);
    stats.smooth_weight = block_all_reduce_sum(stats.smooth_weight, partial);
    stats.misclassified =
        static_cast<int32_t>(block_all_reduce_sum(static_cast<A>(stats.misclassified), partial));
    stats.finite = a.C - 1;  // smooth is -inf already where a logit is
    stats.sum = stats.smooth;
    mass = block_all_reduce_sum(mass, partial);
    entropy = block_all_reduce_sum(entropy, partial);
    cross = block_all_reduce_sum(cross, partial);

    const bool counted = counts(a, sample, stats);
    Finished<A> f = finish_cross_entropy(a, sample, stats, z_target, *block.scales, counted);
    if (a.zipf && counted) f.zipf = (entropy - cross) / mass - log_of(mass) + log_of(stats.sum_exp);
    if (threadIdx.x == 0) report_row(a, block, 0, sample, f);
    if (a.grad == nullptr) continue;
    T* const grad = static_cast<T*>(a.grad) + i * a.C;  // (C,) T
    for (int32_t c = threadIdx.x; c < a.C; c += blockDim.x) {
      A g = f.fill_value;
      if (!f.fill) {
        g = exp_element<T>(to_float(z[c]) - shift) * f.per_exp - f.constant;
        g -= f.label_step == 0
                 ? A(0)
                 : f.label_step * (exp_of(relative_log_mass(log_mass[c], top)) / mass);
        if (f.smooth_step != 0) g -= f.smooth_step * weight[c];
        if (c == y) g = f.at_target;
      }
      from_float(g, grad + c);
    }
  }
  combine_losses<A>(a, block);
}

}  // namespace zipfls::cuda
