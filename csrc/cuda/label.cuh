// Stages 2 and 3, for inspection: ranks and soft labels. The loss kernels build the same tables and
// do not store the label.
#pragma once

#include "tables.cuh"

namespace zipfls::cuda {

/// Ranks of all classes by votes, (N, C) int32; a row with a vote outside the classes becomes 0.
///
/// - Bytes: P votes read and C int32 written a row. A block a row, rows by grid stride. Tables in
///   shared memory.
/// - Hazard: other threads store the ranks of voted classes over the rank of all unvoted ones; a
///   barrier precedes.
ZIPFLS_KERNEL(kLabelBlock) rank_fwd_kernel(LabelFwd a) {
  using Group = RowGroup<0>;
  ZIPFLS_DYNAMIC_SHARED(shared, 16);
  SmemAllocator smem{shared};
  const auto t = VoteTables<float>::allocate(smem, a.votes.P, a.C, false);
  clear_tables<Group>(t, a.votes.P);
  for (int64_t i = blockIdx.x; i < a.N; i += gridDim.x) {
    __syncthreads();  // the tables are empty
    const bool bad = Group::sync_any(count_votes<Group>(a.votes, i, a.C, t));
    int32_t* const rank = static_cast<int32_t*>(a.out) + i * a.C;  // (C,) int32
    const int32_t unvoted = bad ? 0 : rank_below(t.at_least[1]);
    for (int32_t c = threadIdx.x; c < a.C; c += blockDim.x) rank[c] = unvoted;
    __syncthreads();
    for_votes<Group>(t, a.votes.P, [&](int32_t, int32_t c, int32_t n, bool first) {
      if (first && !bad) rank[c] = rank_below(t.at_least[n + 1]);
    });
    __syncthreads();
    forget_votes<Group>(t, a.votes.P, [](int32_t, int32_t) {});
  }
}

/// Soft labels (N, C) A: NaN in a row with an index outside the classes, 0 in an ignored one.
///
/// - Bytes: P votes read (dense: C log masses, three times, from L2 after the first) and C labels
///   written a row. A block a row, rows by grid stride; tables in shared memory; sums in A.
/// - Hazard: as rank_fwd_kernel.
template <class A>
ZIPFLS_KERNEL(kLabelBlock)
label_fwd_kernel(LabelFwd a) {
  using Group = RowGroup<0>;
  ZIPFLS_DYNAMIC_SHARED(shared, 16);
  SmemAllocator smem{shared};
  A* const partial = smem.allocate<A>(kLabelBlock / kWarp);  // (warps,) A
  const int32_t P = a.dense ? 0 : a.votes.P;
  const auto t = VoteTables<A>::allocate(smem, P, a.C, false);
  clear_tables<Group>(t, P);
  for (int64_t i = blockIdx.x; i < a.N; i += gridDim.x) {
    const int64_t target = a.target[i];
    const bool ignored = target == a.ignore_index;
    const bool inside = target >= 0 && target < a.C;
    const int32_t y = inside ? static_cast<int32_t>(target) : 0;
    A* const label = static_cast<A*>(a.out) + i * a.C;  // (C,) A
    __syncthreads();                                    // the tables are empty
    const bool bad_vote = ignored   ? false
                          : a.dense ? check_votes<Group>(a.votes, i, a.C)
                                    : count_votes<Group>(a.votes, i, a.C, t);
    const bool invalid = Group::sync_any(bad_vote) || ignored || !inside;
    const A invalid_value = ignored ? A(0) : not_a_number<A>();
    if (a.dense) {
      const A* const log_mass = static_cast<const A*>(a.log_mass) + i * a.C;  // (C,) A
      A top = -infinity<A>();
      for (int32_t c = threadIdx.x; c < a.C; c += blockDim.x)
        if (c != y) top = larger(top, log_mass[c]);
      top = block_all_reduce_max(top, partial);
      A mass = 0;
      for (int32_t c = threadIdx.x; c < a.C; c += blockDim.x)
        if (c != y) mass += exp_of(relative_log_mass(log_mass[c], top));
      mass = block_all_reduce_sum(mass, partial);
      for (int32_t c = threadIdx.x; c < a.C; c += blockDim.x) {
        const A value = c == y ? A(0) : exp_of(relative_log_mass(log_mass[c], top)) / mass;
        label[c] = invalid ? invalid_value : value;
      }
      continue;
    }
    if (Group::leads()) label_counts<Group>(t, P, a.C, y, static_cast<const A*>(a.log_mass));
    __syncthreads();
    for (int32_t c = threadIdx.x; c < a.C; c += blockDim.x)
      label[c] = invalid ? invalid_value : c == y ? A(0) : t.label[0];
    __syncthreads();
    for_votes<Group>(t, ignored ? 0 : P, [&](int32_t, int32_t c, int32_t n, bool first) {
      if (first && c != y && !invalid) label[c] = t.label[n];
    });
    __syncthreads();
    forget_votes<Group>(t, ignored ? 0 : P, [](int32_t, int32_t) {});
  }
}

}  // namespace zipfls::cuda
