// Dense votes by wgmma: the kernel for Hopper (sm_90a), for all that is not upsampled.
//
// Bytes moved
//   In: per tile of 128 positions x kTileN classes, 128 bytes of every row a stage. The blocks of a
//   cluster have the same classes and different positions; each loads its half of the classes' rows
//   and multicasts it to both, so that L2 delivers 128 + kTileN / kCluster rows a block. Device
//   memory delivers the features once, and the weights once per group of rows (kGroupBytes).
//   Out: the votes, 4 bytes a position; with several tiles of classes 8 bytes per position and tile
//   before that, written and read again (vote_epilogue.cuh).
//
// Threads
//   384. Warpgroup 0 is the producer, one thread of it; warpgroups 1 and 2 are consumers, 64
//   positions each by all of the tile's classes. One persistent block a multiprocessor: it loops
//   over tiles (tile_at), and the producer's loads run ahead across their borders.
//
// Operands and accumulators
//   kStages pipeline stages in shared memory, in the 128-byte swizzle, written by TMA and read by
//   wgmma through descriptors; both operands are K-major. kTileN / 2 float32 accumulators a thread,
//   in registers. Rows and channels out of bounds are zeros that TMA writes; classes past C have a
//   bias of NaN and never win.
//
// Epilogue
//   Exposed it would cost 16 * 3.8 / D of the main loop: 3 % at D = 2048, 12 % at 512. The second
//   consumer therefore runs kStagger stages behind the first: during one's epilogue the other's
//   products keep the tensor cores busy. Both use every stage, so the number of stages bounds the
//   lag; and it lasts: the time that one warpgroup gains alone on the tensor cores the other gains
//   a moment later. Ping-pong (a tile for each consumer) would need no lag, but with 128
//   accumulators a thread its tiles are 128 x 128, which ask half as much again of L2. A warp
//   increments the tile counter only once the next tile's products are issued, and reads the count
//   after them: that hides the latencies of its stores and of the atomic.
//
// Hazards, and what orders them
// - Stage written by TMA -> read by wgmma: mbarrier `full`, one arrival and all bytes of the stage,
//   whichever block of the cluster loaded them.
// - Stage read -> overwritten: mbarrier `empty` of every block whose loads write there. Each
//   consumer warp arrives once its products are complete (wgmma_wait_group): 8 arrivals from each
//   block. wgmma and TMA both belong to the async proxy, so no proxy fence.
// - A block's multicast -> the other block's `full`: the bytes count in the intended phase, since
//   that block's consumers arrived at the sender's `empty` after their phase was complete.
// - Accumulators: wgmma_fence before, wgmma_wait_group after, fence_operand against the compiler.
// - Bias: each consumer has two buffers of its own, in turn. Written beside the first products,
//   read after a named_barrier_sync (128 threads); written again two tiles later, after the
//   named_barrier_sync between.
// - Pairs -> combine: see vote_epilogue.cuh.
// - A block's shared memory must outlive the other's copies and arrivals: cluster_sync at the end.
#pragma once

#include "vote_epilogue.cuh"
#include "plan.h"
#include "tuning.h"

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

/// The kernel's arguments.
struct WgmmaArgs {
  const void* bias;
  int64_t bias_stride;          // elements
  int64_t tiles_m;              // kCluster blocks each
  int64_t group;                // of them, see tile_at
  int32_t C, tiles_n, tiles_k;  // tiles_k: stages a tile
  Results results;              // a group of rows: the 16 of a warp
};

template <class Element_, int kTileN_, int kCluster_, int kStages_>
struct WgmmaConfig {
  using Element = Element_;
  static constexpr int kTileN = kTileN_, kCluster = kCluster_, kStages = kStages_;
  static constexpr int kThreads = 384, kConsumers = 2;
  static constexpr int kTileK = kTmaRowBytes / kSize<Element>;  // of a stage
  static constexpr int kMmasK = kTmaRowBytes / 32;              // products deep
  static constexpr int kBoxRows =
      128;  // of every copy: a block's positions, or its share of the classes
  static constexpr int kFeatureBytes = kWgmmaTileM * kTmaRowBytes,
                       kWeightBytes = kTileN * kTmaRowBytes;
  static constexpr int kFullStageBytes = kFeatureBytes + kWeightBytes;
  static constexpr int kSharedBytes =
      kStages * kFullStageBytes + 1024;  // stages start on 1024 bytes

  static_assert(kTileN / kCluster == kBoxRows && kWgmmaTileM == kBoxRows, "");
  static_assert(kStagger < kStages, "the first consumer must lead without the second");
};

template <class Element>
using WideConfig = WgmmaConfig<Element, kWideTileN, kWideCluster, kWideStages>;
template <class Element>
using NarrowConfig = WgmmaConfig<Element, kNarrowTileN, kNarrowCluster, kNarrowStages>;

template <class Config>
WgmmaArgs wgmma_args(const WgmmaProblem& problem) {
  constexpr int64_t kClusterTileM = int64_t{kWgmmaTileM} * Config::kCluster;
  WgmmaArgs args = {};
  args.bias = problem.bias;
  args.bias_stride = problem.bias_stride;
  args.tiles_m = ceil_div(problem.results.rows, kClusterTileM);
  args.group = std::max<int64_t>(1, kGroupBytes / (kClusterTileM * problem.row_stride));
  args.C = static_cast<int32_t>(problem.C);
  args.tiles_n = static_cast<int32_t>(ceil_div(problem.C, Config::kTileN));
  args.tiles_k = static_cast<int32_t>(ceil_div(problem.D, Config::kTileK));
  args.results = problem.results;
  return args;
}

/// Blocks of the persistent grid.
template <class Config>
int64_t wgmma_blocks(const WgmmaArgs& args, int multiprocessors) {
  const int64_t at_a_time = std::max(1, multiprocessors / Config::kCluster);
  return Config::kCluster * std::min<int64_t>(at_a_time, args.tiles_m * args.tiles_n);
}

template <class Config>
struct WgmmaShared {
  ptx::mbarrier_t full[Config::kStages], empty[Config::kStages], stagger;
  alignas(16) float bias[Config::kConsumers][2][Config::kTileN];
};

/// The matrix descriptor of K-major rows of 128 bytes in the 128-byte swizzle: address, and 1024
/// bytes from 8 rows to the next 8. 32 bytes further along the rows: 2 more.
ZIPFLS_HOST_DEVICE uint64_t wgmma_descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | uint64_t{1} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

/// A pipeline stage, and the phase (parity) of its current use.
struct PipelineState {
  uint32_t index = 0, phase = 0;
  ZIPFLS_DEVICE void advance(uint32_t stages) {
    if (++index == stages) index = 0, phase ^= 1;
  }
};

/// One thread: loads every stage as soon as it is empty.
template <class Config>
ZIPFLS_DEVICE void produce(const WgmmaArgs& args, const ptx::TensorMap* features,
                           const ptx::TensorMap* weight, int64_t cluster, int64_t clusters,
                           uint32_t rank, WgmmaShared<Config>& shared, unsigned char* stages) {
  PipelineState state;
  for (int64_t t = cluster; t < args.tiles_m * args.tiles_n; t += clusters) {
    const Tile tile = tile_at(t, args.tiles_m, args.tiles_n, args.group);
    const int32_t row = static_cast<int32_t>((tile.m * Config::kCluster + rank) * kWgmmaTileM);
    const int32_t first_class =
        tile.n * Config::kTileN + static_cast<int32_t>(rank) * Config::kBoxRows;
    for (int32_t k = 0; k < args.tiles_k; k++) {
      unsigned char* const stage = stages + state.index * Config::kFullStageBytes;
      unsigned char* const share =
          stage + Config::kFeatureBytes + rank * Config::kBoxRows * kTmaRowBytes;
      ptx::mbarrier_wait_parity(&shared.empty[state.index], state.phase ^ 1);
      ptx::mbarrier_arrive_expect_tx(&shared.full[state.index], Config::kFullStageBytes);
      ptx::tma_load_2d(stage, features, &shared.full[state.index], k * Config::kTileK, row);
      if constexpr (Config::kCluster > 1) {
        ptx::tma_load_2d_multicast((1 << Config::kCluster) - 1, share, weight,
                                   &shared.full[state.index], k * Config::kTileK, first_class);
      } else {
        ptx::tma_load_2d(share, weight, &shared.full[state.index], k * Config::kTileK, first_class);
      }
      state.advance(Config::kStages);
    }
  }
}

/// The warp has read a stage: arrives at `empty` of every block whose loads write there.
template <class Config>
ZIPFLS_DEVICE void release(ptx::mbarrier_t* empty, int lane) {
  if constexpr (Config::kCluster > 1) {
    if (lane < Config::kCluster) ptx::mbarrier_arrive_cluster(empty, static_cast<uint32_t>(lane));
  } else {
    if (lane == 0) ptx::mbarrier_arrive(empty);
  }
}

/// One warpgroup: 64 positions by all classes of each tile.
template <class Config>
ZIPFLS_DEVICE void consume(const WgmmaArgs& args, int64_t cluster, int64_t clusters, uint32_t rank,
                           int consumer, int thread, WgmmaShared<Config>& shared,
                           unsigned char* stages) {
  using Element = typename Config::Element;
  const int lane = thread % 32, warp = thread / 32;  // of the warpgroup
  const uint64_t first_descriptor = wgmma_descriptor(ptx::shared_address(stages));
  constexpr uint64_t kStageOffset = Config::kFullStageBytes >> 4,
                     kWeightOffset = Config::kFeatureBytes >> 4;
  const uint64_t rows_offset = static_cast<uint64_t>(consumer * (64 * kTmaRowBytes >> 4));

  float sum[Config::kTileN / 2] = {};
  PipelineState state;
  int turn = 0;
  bool first = true;
  int64_t stored = -1;  // first of the rows whose pairs the warp has stored without arriving
  uint32_t arrived = 0;
  for (int64_t t = cluster; t < args.tiles_m * args.tiles_n; t += clusters) {
    const Tile tile = tile_at(t, args.tiles_m, args.tiles_n, args.group);
    const int32_t first_class = tile.n * Config::kTileN;
    const int64_t first_row =
        (tile.m * Config::kCluster + rank) * kWgmmaTileM + consumer * 64 + warp * 16;
    float* const bias = shared.bias[consumer][turn];
    typename Element::Stored raw_bias[Config::kTileN / 128];
#pragma unroll
    for (int i = 0; i < Config::kTileN / 128; i++)
      raw_bias[i] =
          stored_bias<Element>(args.bias, args.bias_stride,
                               static_cast<int64_t>(first_class) + thread + 128 * i, args.C);
    if (first && consumer == 1) ptx::mbarrier_wait_parity(&shared.stagger, 0);

    uint32_t before = 0;
    for (int32_t k = 0; k < args.tiles_k; k++) {
      ptx::mbarrier_wait_parity(&shared.full[state.index], state.phase);
      const uint64_t features = first_descriptor + state.index * kStageOffset;
      ptx::fence_operand(sum);
      ptx::wgmma_fence();
#pragma unroll
      for (int slab = 0; slab < Config::kMmasK; slab++)
        ptx::wgmma<Element, Config::kTileN>(sum, features + rows_offset + 2 * slab,
                                            features + kWeightOffset + 2 * slab, k + slab > 0);
      ptx::wgmma_commit_group();
      ptx::fence_operand(sum);
      if (k == 0) {
#pragma unroll
        for (int i = 0; i < Config::kTileN / 128; i++)
          bias[thread + 128 * i] = padded_bias<Element>(
              raw_bias[i], static_cast<int64_t>(first_class) + thread + 128 * i, args.C);
        if (stored >= 0) arrived = arrive(args.results, stored / 16, lane);
      }
      ptx::wgmma_wait_group<1>();  // of the stage before
      if (k > 0) release<Config>(&shared.empty[before], lane);
      if (first && consumer == 0 && k + 1 == (args.tiles_k < kStagger ? args.tiles_k : kStagger) &&
          lane == 0)
        ptx::mbarrier_arrive(&shared.stagger);
      before = state.index;
      state.advance(Config::kStages);
    }
    ptx::wgmma_wait_group<0>();
    ptx::fence_operand(sum);
    release<Config>(&shared.empty[before], lane);
    if (stored >= 0 && arrive_is_last(args.results, arrived))
      combine_16_rows(args.results, stored, lane);

    ptx::named_barrier_sync(1 + consumer, 128);
    ScoreIndex rows[2];
    argmax_of_fragment<Config::kTileN / 8>(sum, bias, fragment_column(lane), first_class, rows);
    const ScoreIndex low = argmax_of_quad(rows[0]), high = argmax_of_quad(rows[1]);
    if (lane % 4 < 2) {  // the first lane of four has the upper row, the second the lower
      const bool upper = lane % 4 == 0;
      const ScoreIndex found = {upper ? low.score : high.score, upper ? low.index : high.index};
      const int64_t row = first_row + fragment_row(lane, lane % 4);
      if (row < args.results.rows) store_score_index(args.results, tile.n, row, found);
    }
    if (args.tiles_n > 1) stored = first_row;
    turn ^= 1;
    first = false;
  }
  if (stored >= 0 && arrive_is_last(args.results, arrive(args.results, stored / 16, lane)))
    combine_16_rows(args.results, stored, lane);
  ptx::warp_sync();
}

/// The kernel: block `block` of `blocks`; stages: kSharedBytes of shared memory.
template <class Config>
ZIPFLS_DEVICE void vote_wgmma(const WgmmaArgs& args, const ptx::TensorMap* features,
                              const ptx::TensorMap* weight, int64_t block, int64_t blocks,
                              int thread, WgmmaShared<Config>& shared, unsigned char* stages) {
  stages += (1024 - ptx::shared_address(stages) % 1024) % 1024;
  const uint32_t rank = Config::kCluster > 1 ? ptx::cluster_rank() : 0;
  if (thread == 0) {
    ptx::prefetch_tensormap(features);
    ptx::prefetch_tensormap(weight);
    for (int s = 0; s < Config::kStages; s++) {
      ptx::mbarrier_init(&shared.full[s], 1);
      ptx::mbarrier_init(&shared.empty[s], Config::kCluster * Config::kConsumers * 4);
    }
    ptx::mbarrier_init(&shared.stagger, 4);
    ptx::fence_mbarrier_init();
  }
  if constexpr (Config::kCluster > 1) {
    ptx::cluster_sync();
  } else {
    ptx::block_sync();
  }
  const int64_t cluster = block / Config::kCluster, clusters = blocks / Config::kCluster;
  if (thread < 128) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (thread == 0)
      produce<Config>(args, features, weight, cluster, clusters, rank, shared, stages);
    ptx::warp_sync();
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    consume<Config>(args, cluster, clusters, rank, thread / 128 - 1, thread % 128, shared, stages);
  }
  if constexpr (Config::kCluster > 1) ptx::cluster_sync();
}

}  // namespace zipfls::cuda::vote
