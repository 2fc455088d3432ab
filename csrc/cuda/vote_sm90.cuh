// Dense votes by wgmma: the kernel for Hopper (sm_90a), for all that is not upsampled. Never run on
// a GPU yet; tests/test_cuda_vote.py replays this very file on the CPU, thread by thread, two
// blocks to a cluster.
//
// Bytes moved
//   In: per tile of 128 positions x kClasses classes, 128 bytes of every row a stage. The blocks of
//   a cluster have the same classes and different positions; each fetches its half of the classes'
//   rows and sends it to both, so L2 delivers 128 + kClasses / kCluster rows a block. Device memory
//   gives the features once, and the weights once per group of rows (kGroupBytes).
//   Out: the votes, 4 bytes a position; with several tiles of classes 8 bytes per position and tile
//   before that, written and read again (vote_fold.cuh).
//
// Threads
//   384. Warpgroup 0 is the producer, one thread of it; warpgroups 1 and 2 consume, 64 positions
//   each by all of the tile's classes. One block a multiprocessor, persistent: it walks over tiles
//   (tile_at), and the producer runs ahead across their borders.
//
// Operands and accumulators
//   A ring of kRing stages in shared memory, in the 128-byte swizzle, written by the bulk tensor
//   copy and read by wgmma through descriptors; both operands have channels next to each other.
//   kClasses / 2 float32 accumulators a thread, in registers. Rows and channels out of bounds are
//   zeros that the copy engine fills in; classes past C have a bias of NaN and never win.
//
// Argmax
//   Exposed it would cost 16 * 3.8 / D of the main loop: 3 % at D = 2048, 12 % at 512. The second
//   consumer therefore runs kStagger stages behind the first: one takes its argmax while the
//   other's products keep the tensor cores busy. Both use every stage, so the ring bounds the lag;
//   and it lasts: who has the tensor cores alone gains just what the other gains a moment later.
//   Ping-pong (a tile for each consumer) would need no lag, but with 128 accumulators a thread its
//   tiles are 128 x 128, which ask half as much again of L2.
//   A warp counts itself in, for the fold, only when the next tile's products are under way, and
//   looks at the count after them, so that the latencies of its stores and of the atomic are
//   hidden.
//
// Hazards, and what orders them
//   Stage written by the copy engine -> read by wgmma: barrier `full`, one arrival and all bytes of
//     the stage, whichever block of the cluster asked for them.
//   Stage read -> overwritten: barrier `empty` of every block whose copies write there. Each
//     consumer warp arrives once its products are complete (products_wait): 8 arrivals from each
//     block. wgmma and the copy engine both belong to the asynchronous proxy, so no proxy fence.
//   A block's copies -> the other block's `full`: they land in the phase they are meant for, since
//     that block's consumers have arrived at the sender's `empty` after their phase was complete.
//   Accumulators: products_begin before, products_wait after, `hold` against the compiler.
//   Bias: each consumer has two buffers of its own, by turns. Written beside the first products,
//     read after a group_sync (128 threads); written again two tiles later, past the group_sync
//     between.
//   Pairs -> fold: see vote_fold.cuh.
//   A block's shared memory outlives the other's copies and arrivals: cluster_sync at the end.
#pragma once

#include "vote_fold.cuh"
#include "vote_plan.h"
#include "vote_scores.cuh"
#include "vote_tuning.h"

namespace zipfls::cuda::vote {

/// The wgmma kernels' matrices: rows of D elements, 16-byte aligned, strides in bytes.
struct WgmmaProblem {
  VoteType type;
  const void* features;  // (results.rows, D)
  int64_t row_stride;
  const void* weight;  // (C, D)
  int64_t C, weight_stride, D;
  const void* bias;
  int64_t bias_stride;  // elements
  Results results;      // splits: tiles of classes
};

/// What the kernel is told.
struct WgmmaArgs {
  const void* bias;
  int64_t bias_stride;            // elements
  int64_t down;                   // tiles of rows, kCluster blocks each
  int64_t group;                  // of them, see tile_at
  int32_t C, class_tiles, depth;  // depth: stages a tile
  Results results;                // a group of rows: the 16 of a warp
};

template <class Element_, int kClasses_, int kCluster_, int kRing_>
struct WgmmaConfig {
  using Element = Element_;
  static constexpr int kClasses = kClasses_, kCluster = kCluster_, kRing = kRing_;
  static constexpr int kThreads = 384, kConsumers = 2;
  static constexpr int kChannels = kBulkBytes / kSize<Element>;  // of a stage
  static constexpr int kSlabs = kBulkBytes / 32;                 // products deep
  static constexpr int kBoxRows =
      128;  // of every copy: a block's positions, or its share of the classes
  static constexpr int kFeatureBytes = kBulkRows * kBulkBytes, kWeightBytes = kClasses * kBulkBytes;
  static constexpr int kOneStage = kFeatureBytes + kWeightBytes;
  static constexpr int kSharedBytes = kRing * kOneStage + 1024;  // the ring starts on 1024 bytes

  static_assert(kClasses / kCluster == kBoxRows && kBulkRows == kBoxRows, "");
  static_assert(kStagger < kRing, "the first consumer must reach its lead without the second");
};

template <class Element>
using WideConfig = WgmmaConfig<Element, kWideClasses, kWideCluster, kWideStages>;
template <class Element>
using NarrowConfig = WgmmaConfig<Element, kNarrowClasses, kNarrowCluster, kNarrowStages>;

template <class Config>
WgmmaArgs wgmma_args(const WgmmaProblem& problem) {
  constexpr int64_t kRowsDown = int64_t{kBulkRows} * Config::kCluster;
  WgmmaArgs args = {};
  args.bias = problem.bias;
  args.bias_stride = problem.bias_stride;
  args.down = ceil_div(problem.results.rows, kRowsDown);
  args.group = std::max<int64_t>(1, kGroupBytes / (kRowsDown * problem.row_stride));
  args.C = static_cast<int32_t>(problem.C);
  args.class_tiles = static_cast<int32_t>(ceil_div(problem.C, Config::kClasses));
  args.depth = static_cast<int32_t>(ceil_div(problem.D, Config::kChannels));
  args.results = problem.results;
  return args;
}

/// Blocks of the persistent grid.
template <class Config>
int64_t wgmma_blocks(const WgmmaArgs& args, int multiprocessors) {
  const int64_t at_a_time = std::max(1, multiprocessors / Config::kCluster);
  return Config::kCluster * std::min<int64_t>(at_a_time, args.down * args.class_tiles);
}

template <class Config>
struct WgmmaShared {
  ptx::Barrier full[Config::kRing], empty[Config::kRing], stagger;
  alignas(16) float bias[Config::kConsumers][2][Config::kClasses];
};

/// wgmma's view of rows of 128 bytes in the 128-byte swizzle: address, 1024 bytes from 8 rows to
/// the next 8. 32 bytes further along the rows is the same view, 2 added.
ZIPFLS_HOST_DEVICE uint64_t matrix_view(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | uint64_t{1} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

/// A place in the ring, and the parity of its current use.
struct Place {
  uint32_t stage = 0, parity = 0;
  ZIPFLS_VOTE_DEVICE void advance(uint32_t ring) {
    if (++stage == ring) stage = 0, parity ^= 1;
  }
};

/// One thread: keeps the ring full.
template <class Config>
ZIPFLS_VOTE_DEVICE void produce(const WgmmaArgs& args, const ptx::TensorMap* features,
                                const ptx::TensorMap* weight, int64_t cluster, int64_t clusters,
                                uint32_t rank, WgmmaShared<Config>& shared, char* ring) {
  Place at;
  for (int64_t t = cluster; t < args.down * args.class_tiles; t += clusters) {
    const TileAt tile = tile_at(t, args.down, args.class_tiles, args.group);
    const int32_t row = static_cast<int32_t>((tile.down * Config::kCluster + rank) * kBulkRows);
    const int32_t first_class =
        tile.across * Config::kClasses + static_cast<int32_t>(rank) * Config::kBoxRows;
    for (int32_t k = 0; k < args.depth; k++) {
      char* const stage = ring + at.stage * Config::kOneStage;
      char* const share = stage + Config::kFeatureBytes + rank * Config::kBoxRows * kBulkBytes;
      ptx::barrier_wait(&shared.empty[at.stage], at.parity ^ 1);
      ptx::barrier_expect(&shared.full[at.stage], Config::kOneStage);
      ptx::copy_box(stage, features, &shared.full[at.stage], k * Config::kChannels, row);
      if constexpr (Config::kCluster > 1) {
        ptx::copy_box_to((1 << Config::kCluster) - 1, share, weight, &shared.full[at.stage],
                         k * Config::kChannels, first_class);
      } else {
        ptx::copy_box(share, weight, &shared.full[at.stage], k * Config::kChannels, first_class);
      }
      at.advance(Config::kRing);
    }
  }
}

/// The warp is done with a stage: tells every block whose copies write there.
template <class Config>
ZIPFLS_VOTE_DEVICE void release(ptx::Barrier* empty, int lane) {
  if constexpr (Config::kCluster > 1) {
    if (lane < Config::kCluster) ptx::barrier_arrive_at(empty, static_cast<uint32_t>(lane));
  } else {
    if (lane == 0) ptx::barrier_arrive(empty);
  }
}

/// One warpgroup: 64 positions by all classes of each tile.
template <class Config>
ZIPFLS_VOTE_DEVICE void consume(const WgmmaArgs& args, int64_t cluster, int64_t clusters,
                                uint32_t rank, int consumer, int thread,
                                WgmmaShared<Config>& shared, char* ring) {
  using Element = typename Config::Element;
  const int lane = thread % 32, warp = thread / 32;  // of the warpgroup
  const uint64_t first_view = matrix_view(ptx::shared_address(ring));
  constexpr uint64_t kStageView = Config::kOneStage >> 4, kWeightView = Config::kFeatureBytes >> 4;
  const uint64_t rows_view = static_cast<uint64_t>(consumer * (64 * kBulkBytes >> 4));

  float sum[Config::kClasses / 2] = {};
  Place at;
  int turn = 0;
  bool first = true;
  int64_t put = -1;  // first of the rows that the warp has put pairs of, and not counted itself in
  uint32_t arrived = 0;
  for (int64_t t = cluster; t < args.down * args.class_tiles; t += clusters) {
    const TileAt tile = tile_at(t, args.down, args.class_tiles, args.group);
    const int32_t first_class = tile.across * Config::kClasses;
    const int64_t first_row =
        (tile.down * Config::kCluster + rank) * kBulkRows + consumer * 64 + warp * 16;
    float* const bias = shared.bias[consumer][turn];
    typename Element::Stored stored[Config::kClasses / 128];
#pragma unroll
    for (int i = 0; i < Config::kClasses / 128; i++)
      stored[i] =
          stored_bias<Element>(args.bias, args.bias_stride,
                               static_cast<int64_t>(first_class) + thread + 128 * i, args.C);
    if (first && consumer == 1) ptx::barrier_wait(&shared.stagger, 0);

    uint32_t before = 0;
    for (int32_t k = 0; k < args.depth; k++) {
      ptx::barrier_wait(&shared.full[at.stage], at.parity);
      const uint64_t features = first_view + at.stage * kStageView;
      ptx::hold(sum);
      ptx::products_begin();
#pragma unroll
      for (int slab = 0; slab < Config::kSlabs; slab++)
        ptx::multiply_group<Element, Config::kClasses>(
            sum, features + rows_view + 2 * slab, features + kWeightView + 2 * slab, k + slab > 0);
      ptx::products_commit();
      ptx::hold(sum);
      if (k == 0) {
#pragma unroll
        for (int i = 0; i < Config::kClasses / 128; i++)
          bias[thread + 128 * i] = padded_bias<Element>(
              stored[i], static_cast<int64_t>(first_class) + thread + 128 * i, args.C);
        if (put >= 0) arrived = count_in(args.results, put / 16, lane);
      }
      ptx::products_wait<1>();  // those of the stage before
      if (k > 0) release<Config>(&shared.empty[before], lane);
      if (first && consumer == 0 && k + 1 == (args.depth < kStagger ? args.depth : kStagger) &&
          lane == 0)
        ptx::barrier_arrive(&shared.stagger);
      before = at.stage;
      at.advance(Config::kRing);
    }
    ptx::products_wait<0>();
    ptx::hold(sum);
    release<Config>(&shared.empty[before], lane);
    if (put >= 0 && came_last(args.results, arrived)) fold_sixteen(args.results, put, lane);

    ptx::group_sync(1 + consumer, 128);
    Best rows[2];
    best_of_fragment<Config::kClasses / 8>(sum, bias, fragment_column(lane), first_class, rows);
    const Best low = best_of_quad(rows[0]), high = best_of_quad(rows[1]);
    if (lane % 4 < 2) {  // the first lane of four has the upper row, the second the lower
      const bool upper = lane % 4 == 0;
      const Best found = {upper ? low.score : high.score, upper ? low.index : high.index};
      const int64_t row = first_row + fragment_row(lane, lane % 4);
      if (row < args.results.rows) put_best(args.results, tile.across, row, found);
    }
    if (args.class_tiles > 1) put = first_row;
    turn ^= 1;
    first = false;
  }
  if (put >= 0 && came_last(args.results, count_in(args.results, put / 16, lane)))
    fold_sixteen(args.results, put, lane);
  ptx::warp_sync();
}

/// The kernel: block `block` of `blocks`; ring: kSharedBytes of shared memory.
template <class Config>
ZIPFLS_VOTE_DEVICE void vote_wgmma(const WgmmaArgs& args, const ptx::TensorMap* features,
                                   const ptx::TensorMap* weight, int64_t block, int64_t blocks,
                                   int thread, WgmmaShared<Config>& shared, char* ring) {
  ring += (1024 - ptx::shared_address(ring) % 1024) % 1024;
  const uint32_t rank = Config::kCluster > 1 ? ptx::cluster_rank() : 0;
  if (thread == 0) {
    ptx::prefetch_map(features);
    ptx::prefetch_map(weight);
    for (int s = 0; s < Config::kRing; s++) {
      ptx::barrier_init(&shared.full[s], 1);
      ptx::barrier_init(&shared.empty[s], Config::kCluster * Config::kConsumers * 4);
    }
    ptx::barrier_init(&shared.stagger, 4);
    ptx::barriers_publish();
  }
  if constexpr (Config::kCluster > 1) {
    ptx::cluster_sync();
  } else {
    ptx::block_sync();
  }
  const int64_t cluster = block / Config::kCluster, clusters = blocks / Config::kCluster;
  if (thread < 128) {
    ptx::release_registers<kProducerRegisters>();
    if (thread == 0) produce<Config>(args, features, weight, cluster, clusters, rank, shared, ring);
    ptx::warp_sync();
  } else {
    ptx::claim_registers<kConsumerRegisters>();
    consume<Config>(args, cluster, clusters, rank, thread / 128 - 1, thread % 128, shared, ring);
  }
  if constexpr (Config::kCluster > 1) ptx::cluster_sync();
}

}  // namespace zipfls::cuda::vote
