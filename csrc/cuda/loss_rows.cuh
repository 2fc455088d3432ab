// Loss and gradient of rows that stay on chip: each in 8 lanes, a warp, a block or a cluster.
#pragma once

#include "loss_math.cuh"

namespace zipfls::cuda {

/// Shared memory of one row (or of a block's slice of it).
template <class T>
struct RowArea {
  using A = Arithmetic<T>;
  uint4* row;  // (vectors,) 16 bytes: logits, then the gradient
  VoteTables<A> tables;
  RowStats<A>* warps;     // (32,): of each warp; rows of a whole block
  RowStats<A>* exchange;  // (2,): the block's, for its cluster; by parity of the pass
  Finished<A>* finished;  // (1,): rows of a whole block

  /// One layout for all kernels: arrays that a kernel does not use take a few bytes.
  ZIPFLS_HOST_DEVICE static RowArea allocate(SmemAllocator& smem, uint32_t vectors, int32_t P,
                                             int32_t C, bool with_grad, bool whole_block) {
    RowArea area;
    area.row = smem.allocate<uint4>(vectors);
    area.tables = VoteTables<A>::allocate(smem, P, C, with_grad);
    area.warps = smem.allocate<RowStats<A>>(whole_block ? kWarp : 0);
    area.exchange = smem.allocate<RowStats<A>>(whole_block ? 2 : 0);
    area.finished = smem.allocate<Finished<A>>(whole_block ? 1 : 0);
    return area;
  }
};

/// Votes that make the label.
ZIPFLS_HOST_DEVICE int32_t counted_votes(const LossFwd& a) { return a.zipf ? a.votes.P : 0; }

/// The body of loss_fwd_kernel and loss_fwd_cluster_kernel; see there.
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

  ZIPFLS_DYNAMIC_SHARED(shared, 16);
  SmemAllocator smem{shared};
  const auto block = BlockArea<A>::allocate(smem);
  smem.used += row_bytes * Group::row_in_block();
  const auto area = RowArea<T>::allocate(smem, slice, P, a.C, with_grad, Group::kWholeBlock);
  const VoteTables<A>& t = area.tables;
  T* const held = reinterpret_cast<T*>(area.row);  // (slice V,) T: columns from first_column on
  clear_tables<Group>(t, P);
  mean_scales<A>(a, block);  // its barrier publishes the empty tables

  const int64_t blocks = CLUSTER ? gridDim.x / ptx::cluster_size() : gridDim.x;
  const int64_t block_index = CLUSTER ? blockIdx.x / ptx::cluster_size() : blockIdx.x;
  const uint32_t first_vector = CLUSTER ? ptx::cluster_rank() * slice : 0;
  const A* const smooth_weight =
      a.ce && a.label_smoothing != 0 ? static_cast<const A*>(a.weight) : nullptr;
  const bool look_for_misclassified = a.zipf && a.only_correct && a.correct == nullptr;
  int parity = 0;

  // All groups of a block make the same number of passes: barriers and shuffles need all threads.
  const int rows = Group::rows_per_block();
  for (int64_t first = block_index * rows; first < a.N; first += blocks * rows) {
    Sample sample = load_sample(a, first + Group::row_in_block());
    const auto row = RowVectors<T>::of(a, sample);
    const int32_t first_column = row.column(first_vector);
    const uint32_t vectors = row.count <= first_vector          ? 0
                             : row.count < first_vector + slice ? row.count - first_vector
                                                                : slice;

    // 1. Start the row's copies to shared memory.
#pragma unroll
    for (int k = 0; k < K_MAX; k++) {
      const uint32_t j = Group::lane() + k * Group::size();
      if (!sample.live || j >= vectors) continue;
      if (row.whole(first_vector + j)) {
        ptx::cp_async_16(area.row + j, row.logits + row.column(first_vector + j));
      } else {
        row.copy_edge(first_vector + j, held + j * V);
      }
    }

    // 2. Count the votes while they are pending.
    bool bad_vote = false;
    if (sample.live && a.votes.data != nullptr)
      bad_vote = a.zipf ? count_votes<Group>(a.votes, sample.i, a.C, t)
                        : check_votes<Group>(a.votes, sample.i, a.C);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    const bool any_bad = Group::sync_any(bad_vote);  // the row and its counts are visible
    sample.invalid |= any_bad && !sample.ignored;
    auto logit = [&](int32_t c) {
      if (CLUSTER && static_cast<uint32_t>(c - first_column) >= vectors * V)
        return to_float(row.logits[c]);
      return to_float(held[c - first_column]);
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
    stats.max = warp_reduce_max<Group::kLeaders>(stats.max);
    const A warp_max = stats.max, warp_shift = shift_of(warp_max);
#pragma unroll
    for (int k = 0; k < K_MAX; k++) {
      const uint32_t j = Group::lane() + k * Group::size();
      if (j < vectors) add_vector<T>(x + k * V, warp_shift, stats);
    }
    const RareSums<A> rare{smooth_weight, look_for_misclassified, sample.y, z_target};
    if (rare.wanted() && sample.live) {
#pragma unroll 1
      for (uint32_t e = Group::lane(); e < vectors * V; e += Group::size()) {
        const int32_t c = first_column + static_cast<int32_t>(e);
        if (c >= 0 && c < a.C) rare.add(c, to_float(held[e]), warp_shift, stats);
      }
    }
    stats.sum_exp = warp_reduce_sum<Group::kLeaders>(stats.sum_exp);
    stats.sum = warp_reduce_sum<Group::kLeaders>(stats.sum);
    stats.finite = warp_reduce_sum<Group::kLeaders>(stats.finite);
    if (smooth_weight != nullptr) {
      stats.smooth = warp_reduce_sum<Group::kLeaders>(stats.smooth);
      stats.smooth_weight = warp_reduce_sum<Group::kLeaders>(stats.smooth_weight);
    }
    if (look_for_misclassified)
      stats.misclassified = warp_reduce_sum<Group::kLeaders>(stats.misclassified);
    if constexpr (Group::kWholeBlock) {
      if (threadIdx.x % kWarp == 0) area.warps[threadIdx.x / kWarp] = stats;
      __syncthreads();
      if (Group::leads()) {
        stats = threadIdx.x < blockDim.x / kWarp ? area.warps[threadIdx.x] : RowStats<A>{};
        stats = merge_lanes<kWarp>(stats, smooth_weight != nullptr, look_for_misclassified);
      }
    }
    if constexpr (CLUSTER) {
      // Two copies, by parity: a block overwrites this pass's copy two passes later, after a
      // barrier at which every peer arrives only once it has read the copy.
      if (threadIdx.x == 0) area.exchange[parity] = stats;
      ptx::cluster_sync();
      if (Group::leads()) {
        stats = threadIdx.x < ptx::cluster_size() ? *ptx::mapa(area.exchange + parity, threadIdx.x)
                                                  : RowStats<A>{};
        stats = merge_lanes<kWarp>(stats, smooth_weight != nullptr, look_for_misclassified);
      }
      parity ^= 1;
    }

    // 4. Losses and gradient factors, by the leading lanes, from the logits in shared memory.
    Finished<A> f;
    if (Group::leads()) {
      f = finish_row<Group>(
          a, sample, stats, z_target, entropy, t, K, *block.scales, logit, [&](int32_t c) {
            return !CLUSTER || static_cast<uint32_t>(c - first_column) < vectors * V;
          });
      if (Group::lane() == 0) {
        if (!CLUSTER || ptx::cluster_rank() == 0)
          report_row(a, block, Group::row_in_block(), sample, f);
        if (Group::kWholeBlock) *area.finished = f;
      }
    }
    Group::sync();  // the logits in shared memory are not read any more
    // In place, a peer may still read a voted class outside its slice, which must be a logit.
    if (CLUSTER && a.grad == a.logits) ptx::cluster_sync();
    if constexpr (Group::kWholeBlock) f = *area.finished;

    // 5. The gradient: written over the logits in shared memory, patched there, then stored.
    if (with_grad) {
      // A warp of -inf alone has exponentials of 0, and a shift without meaning.
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
      Group::sync();  // other threads patch the gradient
      if (!f.fill) {
#pragma unroll 1
        for (int32_t k = Group::lane(); k < K; k += Group::size()) {
          const int32_t c = t.class_of(t.voted[k]);
          if (c == sample.y || static_cast<uint32_t>(c - first_column) >= vectors * V) continue;
          from_float(t.patch[k], held + (c - first_column));
        }
        if (Group::lane() == 0 && static_cast<uint32_t>(sample.y - first_column) < vectors * V)
          from_float(f.at_target, held + (sample.y - first_column));
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
        ptx::st_global_cg_16(row.grad + column, area.row[j]);
      } else {
#pragma unroll 1
        for (int v = 0; v < V; v++)
          if (column + v >= 0 && column + v < a.C) row.grad[column + v] = held[j * V + v];
      }
    }
  }
  if constexpr (CLUSTER) ptx::cluster_sync();  // no block exits while a peer may read its memory
  combine_losses<A>(a, block);
}

/// Loss and gradient of rows held on chip: each logit is read once, each gradient element written
/// once.
///
/// - Bytes: 2 C itemsize a row; P votes twice (4 bytes each, the second time from L1); 8 for the
///   target.
/// - Threads: LANES a row (8 or 32, blocks of 128 hold 16 or 4 rows), or a block a row (LANES = 0).
/// - The row: exp(z - m) in registers, at most 64 bytes a thread, between statistics and gradient;
///   in shared memory the logits, read at voted classes, then the gradient, patched there.
/// - Accumulators: float (float64: double); sums over rows: double.
/// - Hazards, a barrier for each: counts before ranks; logits read at voted classes before the
///   gradient overwrites them; gradient before its patches; patches before the store; tables
///   emptied before the next row.
template <class T, int LANES>
ZIPFLS_KERNEL(LANES == 0 ? kWideBlock : kSmallBlock,
              LANES == 0 ? kWideResident<T> : kSmallResident<T>)
loss_fwd_kernel(LossFwd a, uint32_t row_bytes, uint32_t slice) {
  loss_fwd_rows<T, LANES, false>(a, row_bytes, slice);
}

/// Loss and gradient of rows that the blocks of a cluster hold, a slice each: sm_90 and later (an
/// empty kernel on sm_80).
///
/// - Bytes: 2 C itemsize a row; votes and target once a block.
/// - Threads: up to 8 blocks of up to 320 a row.
/// - The row: as in loss_fwd_kernel, a slice of whole 16-byte vectors in each block. Every block
///   counts all votes and computes the same label, so that blocks exchange their statistics alone
///   (32 or 56 bytes), through distributed shared memory; each patches the voted classes of its
///   slice.
/// - Accumulators: as loss_fwd_kernel.
/// - Hazards: as loss_fwd_kernel, and a peer's statistics are read after the cluster's barrier and
///   overwritten two barriers later; a gradient in place waits for the peers' last read of a
///   logit; all blocks of a cluster exit together.
template <class T>
ZIPFLS_KERNEL(kWideBlock, kWideResident<T>)
loss_fwd_cluster_kernel(LossFwd a, uint32_t row_bytes, uint32_t slice) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  loss_fwd_rows<T, 0, true>(a, row_bytes, slice);
#endif
}

}  // namespace zipfls::cuda
