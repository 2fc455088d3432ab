// Loss and gradient of rows that stay on chip: each in 8 or 16 lanes, a warp, a block or a cluster.
#pragma once

#include "loss_math.cuh"

namespace zipfls::cuda {

/// Shared memory of one row (or of a block's slice of it).
template <class T>
struct RowArea {
  using A = Arithmetic<T>;
  uint4* row;  // (vectors,) 16 bytes: logits, then the gradient
  VoteTables<A> tables;
  A* target;              // (2,): the target's logit, and the one that takes its place in the row
  RowStats<A>* warps;     // (32,): of each warp; rows of a whole block
  RowStats<A>* exchange;  // (2,): the block's, for its cluster; by parity of the pass
  Finished<A>* finished;  // (1,): rows of a whole block

  /// One layout for all kernels: arrays that a kernel does not use take a few bytes.
  ZIPFLS_HOST_DEVICE static RowArea allocate(SmemAllocator& smem, uint32_t vectors, int32_t P,
                                             int32_t C, bool with_grad, bool whole_block) {
    RowArea area;
    area.target = smem.allocate<A>(2);
    area.warps = smem.allocate<RowStats<A>>(whole_block ? kWarp : 0);
    area.exchange = smem.allocate<RowStats<A>>(whole_block ? 2 : 0);
    area.finished = smem.allocate<Finished<A>>(whole_block ? 1 : 0);
    area.row = smem.allocate<uint4>(vectors);
    area.tables = VoteTables<A>::allocate(smem, P, C, with_grad);
    return area;
  }
};

/// Votes that make the label.
ZIPFLS_HOST_DEVICE int32_t counted_votes(const LossFwd& a) { return a.zipf ? a.votes.P : 0; }

/// The body of loss_fwd_kernel and loss_fwd_cluster_kernel; see there.
///
/// row_bytes: shared memory of one row. slice: vectors of the row that a block of a cluster holds,
/// otherwise as many as a row can have. part: vectors of it that a warp of a block has at most;
/// where a row has a warp or less, slice.
template <class T, int LANES, bool CLUSTER>
ZIPFLS_DEVICE void loss_fwd_rows(const LossFwd& a, uint32_t row_bytes, uint32_t slice,
                                 uint32_t part) {
  using A = Arithmetic<T>;
  using Group = RowGroup<LANES>;
  using Leaders = RowGroup<Group::kLeaders>;  // of a block: its first warp
  constexpr int V = kVector<T>, K_MAX = kHeldVectors<sizeof(T), LANES>;
  constexpr uint32_t kStep = Group::kLeaders;    // vectors from one of a lane to its next
  constexpr int kPair = sizeof(T) == 4 ? 2 : 1;  // vectors added up together: 8 elements
  const bool with_grad = a.grad != nullptr;
  const int32_t P = counted_votes(a);

  ZIPFLS_DYNAMIC_SHARED(shared, 16);
  SmemAllocator smem{shared};
  const auto block = BlockArea<A>::allocate(smem);
  smem.used += row_bytes * Group::row_in_block();
  const auto area = RowArea<T>::allocate(smem, slice, P, a.C, with_grad, Group::kWholeBlock);
  const VoteTables<A>& t = area.tables;
  T* const held = reinterpret_cast<T*>(area.row);  // (slice V,) T: columns from slice_column on
  if (Group::leads()) clear_tables<Leaders>(t, P);
  mean_scales<A>(a, block);  // its barrier publishes the empty tables

  const int64_t blocks = CLUSTER ? gridDim.x / ptx::cluster_size() : gridDim.x;
  const int64_t block_index = CLUSTER ? blockIdx.x / ptx::cluster_size() : blockIdx.x;
  // Of the block's slice of the row each warp has a part, which only its own lanes read and write
  // but for the votes: from vector warp_first on.
  const uint32_t slice_first = CLUSTER ? ptx::cluster_rank() * slice : 0;
  const uint32_t warp_first = Group::kWholeBlock ? threadIdx.x / kWarp * part : 0;
  const uint32_t rest = warp_first < slice ? slice - warp_first : 0;
  const uint32_t warp_room = CLUSTER && rest < part ? rest : part;  // a row ends within its slice
  const uint32_t first_vector = slice_first + warp_first, lane = Leaders::lane();
  uint4* const own = area.row + warp_first;
  T* const own_elements = held + warp_first * V;
  const A* const smooth_weight =
      a.ce && a.label_smoothing != 0 ? static_cast<const A*>(a.weight) : nullptr;
  const bool look_for_misclassified = a.zipf && a.only_correct && a.correct == nullptr;
  const bool rare_sums = ptx::keep(smooth_weight != nullptr || look_for_misclassified) != 0;
  const bool few_votes = !Group::kWholeBlock || a.votes.P <= kLeadersVotes;
  int parity = 0;

  // All groups of a block make the same number of passes: barriers and shuffles need all threads.
  const int rows = Group::rows_per_block();
  for (int64_t first = block_index * rows; first < a.N; first += blocks * rows) {
    Sample sample = load_sample(a, first + Group::row_in_block());
    const auto row = RowVectors<T>::of(a, sample);
    const int32_t first_column = row.column(first_vector), slice_column = row.column(slice_first);
    const uint32_t behind = row.count > first_vector ? row.count - first_vector : 0;
    const uint32_t vectors = ptx::keep(behind < warp_room ? behind : warp_room);
    // A lane has vectors lane + step for steps below these: all of its part, and those it reads.
    const uint32_t steps = ptx::keep(vectors > lane ? vectors - lane : 0);
    const uint32_t mine = ptx::keep(sample.live ? steps : 0);
    const auto inside = [&](int32_t c) {
      return !CLUSTER || static_cast<uint32_t>(c - slice_column) < slice * V;
    };

    // 1. Start the row's copies to shared memory. Nearly all vectors are whole: those from
    // whole_begin on, whole of them.
    const uint32_t whole_begin = first_vector == 0 ? row.whole_begin() : 0;
    const uint32_t row_end = row.whole_end() - first_vector;
    const uint32_t whole_end = row_end < vectors ? row_end : vectors;
    const uint32_t whole = ptx::keep(whole_end > whole_begin ? whole_end - whole_begin : 0);
    const bool first_whole = lane >= whole_begin;
    const uint32_t whole_steps =
        ptx::keep(lane < whole_begin + whole ? whole_begin + whole - lane : 0);
    const auto is_whole = [&](uint32_t step) {
      return step < whole_steps && (step > 0 || first_whole);
    };
    const bool edges = ptx::keep(whole < vectors) != 0;
    // A warp of a block whose lanes all have K_MAX whole vectors does not ask for each.
    const bool full = Group::kWholeBlock && ptx::keep(whole == K_MAX * kStep) != 0;
    const auto for_whole = [&](auto visit) {
      if (full) {
#pragma unroll
        for (uint32_t step = 0; step < K_MAX * kStep; step += kStep) visit(step);
      } else {
#pragma unroll
        for (uint32_t step = 0; step < K_MAX * kStep; step += kStep)
          if (is_whole(step)) visit(step);
      }
    };
    // visit(element of own_elements, column) for those of the vectors that are not whole, at most
    // two: an element for each of V lanes.
    const auto for_edges = [&](auto visit) {
      const auto edge = [&](uint32_t j) {
        if (lane < V)
          visit(j * V + lane, row.column(first_vector + j) + static_cast<int32_t>(lane));
      };
      if (!edges) return;
      if (whole_begin > 0 && vectors > 0) edge(0);
      if (whole_end < vectors) edge(ptx::here(vectors - 1));
    };
    if (sample.live) {
      const uint4* const source = ptx::keep(row.vector(first_vector + lane));
      const uint32_t to = ptx::keep(ptx::shared_address(area.row) + (warp_first + lane) * 16);
      for_whole([&](uint32_t step) { ptx::cp_async_16(to + step * 16, source + step, 16); });
      for_edges([&](uint32_t e, int32_t c) {
        if (row.has(c)) {
          own_elements[e] = row.logits[c];
        } else {
          from_float(-infinity<A>(), own_elements + e);
        }
      });
    }
    ptx::cp_async_commit_group();

    // 2. Count the votes while they are pending, and make the label. The leading lanes count few
    // votes without the others.
    auto count = [&](auto group) {
      if (!sample.live || a.votes.data == nullptr) return false;
      return a.zipf ? count_votes<decltype(group)>(a.votes, sample.i, a.C, t)
                    : check_votes<decltype(group)>(a.votes, sample.i, a.C);
    };
    bool any_bad = false;
    if (!few_votes) any_bad = Group::sync_any(count(Group()));
    A entropy = 0;
    if (Group::leads()) {
      if (few_votes) any_bad = Leaders::sync_any(count(Leaders()));
      sample.invalid |= any_bad && !sample.ignored;
      if (a.zipf)
        entropy = label_counts<Leaders>(t, P, a.C, sample.y, static_cast<const A*>(a.log_mass));
    }

    // 3. Statistics: of the warp, then of the block, then of the cluster. A thread reads the
    // vectors that it copied itself. In the target's place stands the logit beside it, twice in the
    // row then: it neither leads the maximum astray nor dominates a sum (remove_copy).
    ptx::cp_async_wait_group<0>();
    __syncwarp(kAllLanes);  // vectors that are not whole
    const uint32_t target_element = static_cast<uint32_t>(sample.y - first_column);
    if (target_element / V % kStep == lane && target_element / V - lane < mine) {
      area.target[0] = to_float(own_elements[target_element]);
      area.target[1] = to_float(own_elements[target_element ^ 1]);
      own_elements[target_element] = own_elements[target_element ^ 1];
    }
    uint4 raw[K_MAX];
    if (full && sample.live) {
#pragma unroll
      for (int k = 0; k < K_MAX; k++) raw[k] = own[lane + k * kStep];
    } else {
#pragma unroll
      for (int k = 0; k < K_MAX; k++) {
        raw[k] = absent_vector<T>();
        if (k * kStep < mine) raw[k] = own[lane + k * kStep];
      }
    }
    RowStats<A> stats;
    stats.max = warp_reduce_max<Group::kLeaders>(largest_of<T>(raw));
    const A warp_max = stats.max;
    const ExpShift<T> warp_shift(shift_of(warp_max));
    A x[K_MAX * V];
    if (full && sample.live && warp_shift.usable()) {
#pragma unroll
      for (int k = 0; k < K_MAX; k++) unpack<T>(raw[k], x + k * V);
      if (!add_vectors<T, K_MAX>(x, warp_shift, stats)) {
#pragma unroll 1
        for (uint32_t j = lane; j < vectors; j += kStep) add_present(own[j], warp_shift, stats);
      }
    } else {
#pragma unroll
      for (int k = 0; k < K_MAX; k += kPair) {
#pragma unroll
        for (int j = k; j < k + kPair; j++) unpack<T>(raw[j], x + j * V);
        if (kPair == 2 && (k + 1) * kStep < mine) {
          add_vector<T, kPair * V>(x + k * V, warp_shift, stats);
        } else if (k * kStep < mine) {
          add_vector<T>(x + k * V, warp_shift, stats);
        }
      }
    }
    if (rare_sums) {
      Group::sync();  // other threads read the row, and the target's logit
      const A z_target = !sample.live ? A(0)
                         : CLUSTER    ? to_float(row.logits[sample.y])
                                      : area.target[0];
      const RareSums<A> rare{smooth_weight, look_for_misclassified, sample.y, z_target};
#pragma unroll 1
      for (uint32_t e = lane; e < (sample.live ? vectors * V : 0); e += kStep) {
        const int32_t c = first_column + static_cast<int32_t>(e);
        if (row.has(c)) rare.add(c, to_float(own_elements[e]), warp_shift.shift, stats);
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
    if (Group::kWholeBlock && threadIdx.x % kWarp == 0) area.warps[threadIdx.x / kWarp] = stats;
    Group::sync();  // the row, the target's logit and the warps' statistics are visible
    if (Group::kWholeBlock && Group::leads()) {
      stats = threadIdx.x < blockDim.x / kWarp ? area.warps[threadIdx.x] : RowStats<A>{};
      stats = merge_lanes<kWarp>(stats, smooth_weight != nullptr, look_for_misclassified);
    }
    A z_target = 0, z_copy = -infinity<A>();
    if (sample.live && Group::leads()) {
      if constexpr (CLUSTER) {
        const int32_t copied = ((sample.y + row.phase) ^ 1) - row.phase;
        z_target = to_float(row.logits[sample.y]);
        if (row.has(copied)) z_copy = to_float(row.logits[copied]);
      } else {
        z_target = area.target[0];
        z_copy = area.target[1];
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
      remove_copy<T>(z_copy, stats);
      const bool reports = !CLUSTER || ptx::cluster_rank() == 0;
      const auto logit = [&](int32_t c) {
        return to_float(inside(c) ? held[c - slice_column] : row.logits[c]);
      };
      f = finish_row<T, Leaders>(a, sample, stats, z_target, entropy, t, P, *block.scales, logit,
                                 inside, reports);
      if (Group::lane() == 0) {
        if (reports) {
          report_row(a, block, Group::row_in_block(), sample, f);
          keep_factors(a, sample, f);
        }
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
      A per_exp = f.per_exp * warp_shift.correction;
      if (Group::kWholeBlock && warp_shift.shift != f.shift)
        per_exp *= warp_max == -infinity<A>() ? A(0) : exp_of(warp_shift.shift - f.shift);
      const bool rare = ptx::keep(f.fill || f.smooth_step != 0) != 0;
      const A minus = -f.constant;
      const auto store = [&](int k, bool correct) {
        const uint32_t j = lane + k * kStep;
#pragma unroll
        for (int e = k * V; e < (k + 1) * V; e++) x[e] = fused(x[e], per_exp, minus);
        if (correct)
          rare_gradient<V>(x + k * V, row.column(first_vector + j), a.C, f, smooth_weight);
        own[j] = pack<T>(x + k * V);
      };
      if (full && !rare) {
#pragma unroll
        for (int k = 0; k < K_MAX; k++) store(k, false);
      } else {
#pragma unroll
        for (int k = 0; k < K_MAX; k++)
          if (k * kStep < steps) store(k, rare);
      }
      Group::sync();  // other threads patch the gradient
    }
    const bool patched = with_grad && !f.fill;
    if (patched && Group::lane() == 0 && inside(sample.y))
      from_float(f.at_target, held + (sample.y - slice_column));
    forget_votes<Group>(t, sample.live ? P : 0, [&](int32_t p, int32_t c) {
      if (patched && c != sample.y && inside(c)) from_float(t.patch[p], held + (c - slice_column));
    });
    Group::sync();  // the gradient is patched, and the tables are empty for the next row
    if (row.grad != nullptr) {
      uint4* const destination = ptx::keep(row.grad_vector(first_vector + lane));
      for_whole([&](uint32_t step) { ptx::st_global_cg_16(destination + step, own[lane + step]); });
      for_edges([&](uint32_t e, int32_t c) {
        if (row.has(c)) row.grad[c] = own_elements[e];
      });
    }
    __syncwarp(kAllLanes);  // the next row's vectors overwrite what other lanes stored
  }
  if constexpr (CLUSTER) ptx::cluster_sync();  // no block exits while a peer may read its memory
  combine_losses<A>(a, block);
}

/// Loss and gradient of rows held on chip: each logit is read once, each gradient element written
/// once.
///
/// - Bytes: 2 C itemsize a row; P votes (4 bytes each); 8 for the target.
/// - Threads: LANES a row (8, 16 or 32, blocks of 128 hold 16, 8 or 4 rows), or a block a row
///   (LANES = 0).
/// - The row: exp(z - m) in registers, kHeldVectors a thread, between statistics and gradient;
///   in shared memory the logits, read at voted classes, then the gradient, patched there.
/// - Accumulators: float (float64: double); sums over rows: double.
/// - Hazards, a barrier for each: counts before ranks; copies before logits are read at voted
///   classes, and those before the gradient overwrites them; gradient before its patches; patches
///   before the store; tables emptied before the next row. Barriers are of the row's threads: of a
///   warp where several rows or one share it, and of a block four a row.
template <class T, int LANES>
ZIPFLS_KERNEL(LANES == 0 ? kWideBlock : kSmallBlock,
              LANES == 0 ? kWideResident<sizeof(T)> : kSmallResident<sizeof(T), LANES>)
loss_fwd_kernel(LossFwd a, uint32_t row_bytes, uint32_t slice, uint32_t part) {
  loss_fwd_rows<T, LANES, false>(a, row_bytes, slice, part);
}

/// Loss and gradient of rows that the blocks of a cluster hold, a slice each: sm_90 and later (an
/// empty kernel on sm_80).
///
/// - Bytes: 2 C itemsize a row; votes and target once a block.
/// - Threads: up to 8 blocks of up to 256 a row.
/// - The row: as in loss_fwd_kernel, a slice of whole 16-byte vectors in each block. Every block
///   counts all votes and computes the same label, so that blocks exchange their statistics alone
///   (32 or 56 bytes), through distributed shared memory; each patches the voted classes of its
///   slice.
/// - Accumulators: as loss_fwd_kernel.
/// - Hazards: as loss_fwd_kernel, and a peer's statistics are read after the cluster's barrier and
///   overwritten two barriers later; a gradient in place waits for the peers' last read of a
///   logit; all blocks of a cluster exit together.
template <class T>
ZIPFLS_KERNEL(kWideBlock, kWideResident<sizeof(T)>)
loss_fwd_cluster_kernel(LossFwd a, uint32_t row_bytes, uint32_t slice, uint32_t part) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  loss_fwd_rows<T, 0, true>(a, row_bytes, slice, part);
#endif
}

}  // namespace zipfls::cuda
