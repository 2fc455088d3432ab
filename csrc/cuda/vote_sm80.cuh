// Dense votes by mma.sync: the kernel for every GPU from sm_80 on, and for all upsampling. Never
// run on a GPU yet; tests/test_cuda_vote.py replays this very file on the CPU, thread by thread.
//
// Bytes moved
//   In: each tile of kRows positions reads its features once per tile of classes, and the weights
//   of its classes, through L2; device memory gives both about once, since blocks next to each
//   other in time share them. Out: the votes, 4 bytes a position; where the classes are split over
//   blocks, 8 bytes per position and block before that, written and read again (vote_fold.cuh).
//
// Threads
//   kWarpsDown * kWarpsAcross warps, each with a rectangle of kRows / kWarpsDown positions by
//   kClasses / kWarpsAcross classes.
//
// Operands and accumulators
//   kStages stages of shared memory, 64 bytes of every row each, filled by cp.async past L1 and
//   read by ldmatrix without bank conflicts (swizzle64). A block walks over (class tile, channels)
//   as one sequence: the next tile's copies are under way during a tile's argmax. Rows past the
//   end, and channels past D, are zeros that cp.async writes itself; classes past C have a bias of
//   NaN and never win. float32 accumulators in registers: 128 a thread in the plain kernel (two
//   blocks a multiprocessor), 32 when upsampling.
//
// Upsampling
//   The tile's scores go through shared memory, (kRows, kPitch) float; kShare threads a position
//   read its 3 x 3 neighbours, 16 bytes (4 classes) at a time, and keep a running best of each of
//   its quarters in registers across the class tiles.
//
// Hazards, and what orders them
//   Stage written by copies -> read by ldmatrix: every thread waits for its own copies, block_sync.
//   Stage read -> overwritten: the same block_sync. The stage filled in step i was last read in
//   step
//     i - 1, and nobody is past the barrier of step i before all have finished step i - 1.
//   Bias of a tile: written with the tile's first copies, kStages - 1 steps (and so a block_sync)
//     before it is read; its slot is written again kStages tiles later, past one more block_sync.
//   Best pairs of a warp (plain): a lane updates only its own rows'; block_sync before the end.
//   Scores (upsampling): written past the block_sync of a step after the last look at the tile
//     before; read past one more.
//   Pairs -> fold: see vote_fold.cuh.
#pragma once

#include "vote_fold.cuh"
#include "vote_scores.cuh"
#include "vote_tuning.h"

namespace zipfls::cuda::vote {

/// What the kernel is told. Strides in bytes.
struct MmaArgs {
  const char* features;
  const char* weight;  // (C, D), rows weight_stride apart
  const void* bias;
  int64_t bias_stride;  // elements
  int64_t stride_n, stride_h, stride_w, stride_d;
  int64_t weight_stride;
  int64_t channel_bytes;  // D * size: what a row holds
  int64_t N, D;
  int32_t H, W, C;
  int32_t class_tiles, tiles_per_split;
  Patches patches;
  Results results;  // a group of rows: those of a warp
};

/// Which bytes are next to each other in memory.
enum class Minor { kChannels, kPositions };

template <class Element_, int kRows_, int kClasses_, int kWarpsDown_, int kWarpsAcross_,
          Minor kMinor_, bool kUpsample_>
struct MmaConfig {
  using Element = Element_;
  static constexpr int kRows = kRows_, kClasses = kClasses_;
  static constexpr int kWarpsDown = kWarpsDown_, kWarpsAcross = kWarpsAcross_;
  static constexpr Minor kMinor = kMinor_;
  static constexpr bool kUpsample = kUpsample_;

  static constexpr int kThreads = 32 * kWarpsDown * kWarpsAcross;
  static constexpr int kWarpRows = kRows / kWarpsDown, kWarpClasses = kClasses / kWarpsAcross;
  static constexpr int kDown = kWarpRows / 16, kAcross = kWarpClasses / 8;  // instructions
  static constexpr int kChannels = kStageBytes / kSize<Element>;            // of a stage
  static constexpr int kSlabs = kStageBytes / 32;                           // instructions deep

  // Shared memory, in this order: stages (features, weight), bias, then the best pairs or the
  // scores.
  static constexpr int kFeatureBytes = kRows * kStageBytes;
  static constexpr int kOneStage = kFeatureBytes + kClasses * kStageBytes;
  static constexpr int kBiasAt = kStages * kOneStage;
  static constexpr int kLastAt = kBiasAt + kStages * kClasses * 4;
  /// Threads that share a position when upsampling, each with every kShare-th group of four
  /// classes.
  static constexpr int kShare = kThreads / kRows;
  /// Floats from position to position: 8 lanes that read 16 bytes each then touch all banks once.
  static constexpr int kPitch = kClasses + 4 * kShare;
  static constexpr int kSharedBytes =
      kLastAt + (kUpsample ? kRows * kPitch * 4 : kWarpsAcross * kRows * 8);

  static_assert(kWarpRows % 16 == 0 && kWarpClasses % 16 == 0, "");
  static_assert(kRows * 4 % kThreads == 0 && kClasses * 4 % kThreads == 0, "");
  static_assert(kMinor == Minor::kChannels || kSize<Element> == 2,
                "ldmatrix transposes 16-bit elements only");
  static_assert(!kUpsample || kThreads % kRows == 0, "");
};

/// This thread's part of the copies of features: the same rows (or columns) stage after stage.
template <class Config>
struct FeatureCopies {
  static constexpr int kStep = Config::kThreads / 4;  // rows from one copy to the next
  static constexpr int kCopies = Config::kRows / kStep;
  static constexpr int kRowChunks =
      Config::kRows / 8;  // position-minor: 16-byte chunks of a channel
  static constexpr int kChannelStep = Config::kThreads / kRowChunks;
  static constexpr bool kByChannel = Config::kMinor == Minor::kPositions;

  const char* from[kByChannel ? 1 : kCopies];  // null past the last row

  ZIPFLS_VOTE_DEVICE void init(const MmaArgs& args, int64_t tile, const Patch& patch, int thread) {
    if constexpr (kByChannel) {
      from[0] = row(args, tile, patch, thread % kRowChunks * 8);
    } else {
#pragma unroll
      for (int i = 0; i < kCopies; i++) from[i] = row(args, tile, patch, thread / 4 + i * kStep);
    }
  }

  ZIPFLS_VOTE_DEVICE static const char* row(const MmaArgs& args, int64_t tile, const Patch& patch,
                                            int r) {
    if constexpr (Config::kUpsample) {
      const Position at = position_at(patch, r);
      if (at.n < 0) return nullptr;
      return args.features + at.n * args.stride_n + at.h * args.stride_h + at.w * args.stride_w;
    } else {
      const int64_t flat = tile * Config::kRows + r;
      if (flat >= args.results.rows) return nullptr;
      if constexpr (kByChannel)
        return args.features + flat / args.results.map.pitch * args.stride_n +
               flat % args.results.map.pitch * args.stride_w;
      return args.features + flat * args.stride_w;
    }
  }

  /// Copies channels from `step` stages on to a stage.
  ZIPFLS_VOTE_DEVICE void start(const MmaArgs& args, int64_t step, uint32_t stage,
                                int thread) const {
    if constexpr (kByChannel) {
      const int64_t first = step * Config::kChannels;
#pragma unroll
      for (int i = 0; i < Config::kChannels / kChannelStep; i++) {
        const int k = thread / kRowChunks + i * kChannelStep;
        const bool there = from[0] != nullptr && first + k < args.D;
        ptx::copy16(stage + swizzle_columns<2 * Config::kRows>(k, thread % kRowChunks),
                    there ? from[0] + (first + k) * args.stride_d : args.features, there ? 16 : 0);
      }
    } else {
      const int64_t at = step * kStageBytes + thread % 4 * 16, left = args.channel_bytes - at;
      const uint32_t bytes = left <= 0 ? 0 : left < 16 ? static_cast<uint32_t>(left) : 16;
#pragma unroll
      for (int i = 0; i < kCopies; i++) {
        const uint32_t there = from[i] == nullptr ? 0 : bytes;
        ptx::copy16(stage + swizzle64(thread / 4 + i * kStep, thread % 4),
                    there == 0 ? args.features : from[i] + at, there);
      }
    }
  }
};

/// The copies of a tile's weights.
template <class Config>
ZIPFLS_VOTE_DEVICE void start_weight(const MmaArgs& args, int32_t first_class, int64_t step,
                                     uint32_t stage, int thread) {
  constexpr int kStep = Config::kThreads / 4;
  const int64_t at = step * kStageBytes + thread % 4 * 16, left = args.channel_bytes - at;
  const uint32_t bytes = left <= 0 ? 0 : left < 16 ? static_cast<uint32_t>(left) : 16;
  const int64_t c = first_class + static_cast<int64_t>(thread / 4);
  const char* from = args.weight + c * args.weight_stride + at;
#pragma unroll
  for (int i = 0; i < Config::kClasses / kStep; i++) {
    const uint32_t there = c + i * kStep < args.C ? bytes : 0;
    ptx::copy16(stage + swizzle64(thread / 4 + i * kStep, thread % 4),
                there == 0 ? args.weight : from, there);
    from += kStep * args.weight_stride;
  }
}

/// One stage's products: kSlabs times 32 bytes of every row.
template <class Config>
ZIPFLS_VOTE_DEVICE void multiply_stage(float (&sum)[Config::kDown][4 * Config::kAcross],
                                       uint32_t stage, int lane, int warp_row, int warp_class) {
  using Element = typename Config::Element;
#pragma unroll
  for (int slab = 0; slab < Config::kSlabs; slab++) {
    uint32_t a[Config::kDown][4], b[Config::kAcross / 2][4];
#pragma unroll
    for (int i = 0; i < Config::kDown; i++) {
      if constexpr (Config::kMinor == Minor::kPositions) {
        ptx::load_matrices_transposed(
            a[i], stage + swizzle_columns<2 * Config::kRows>(
                              16 * slab + at_channel(lane), warp_row / 8 + 2 * i + at_chunk(lane)));
      } else {
        ptx::load_matrices(
            a[i], stage + swizzle64(warp_row + 16 * i + a_row(lane), 2 * slab + a_chunk(lane)));
      }
    }
#pragma unroll
    for (int j = 0; j < Config::kAcross / 2; j++)
      ptx::load_matrices(
          b[j], stage + Config::kFeatureBytes +
                    swizzle64(warp_class + 16 * j + b_row(lane), 2 * slab + b_chunk(lane)));
#pragma unroll
    for (int e = 0; e < 4; e++) {
#pragma unroll
      for (int i = 0; i < Config::kDown; i++) ptx::round_operand<Element>(a[i][e]);
#pragma unroll
      for (int j = 0; j < Config::kAcross / 2; j++) ptx::round_operand<Element>(b[j][e]);
    }
#pragma unroll
    for (int i = 0; i < Config::kDown; i++)
#pragma unroll
      for (int j = 0; j < Config::kAcross; j++)
        ptx::multiply<Element>(sum[i] + 4 * j, a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

/// Best pair of each row of the warp's rectangle, folded into `best` (kRows,): only the row's own
/// lane does.
template <class Config>
ZIPFLS_VOTE_DEVICE void take_tile(float (&sum)[Config::kDown][4 * Config::kAcross],
                                  const float* bias, Best* best, int32_t first_class,
                                  bool first_tile, int lane, int warp_row, int warp_class) {
#pragma unroll
  for (int i = 0; i < Config::kDown; i++) {
    Best rows[2];
    best_of_fragment<Config::kAcross>(sum[i], bias + warp_class, fragment_column(lane),
                                      first_class + warp_class, rows);
    const Best low = best_of_quad(rows[0]), high = best_of_quad(rows[1]);
    if (lane % 4 < 2) {  // the first lane of four has the upper row, the second the lower
      const bool upper = lane % 4 == 0;
      const Best found = {upper ? low.score : high.score, upper ? low.index : high.index};
      Best* const mine = best + warp_row + 16 * i + fragment_row(lane, lane % 4);
      *mine = better(first_tile ? nothing() : *mine, found);
    }
  }
}

/// Scores of the tile to shared memory: (kRows, kPitch) float.
template <class Config>
ZIPFLS_VOTE_DEVICE void put_scores(const float (&sum)[Config::kDown][4 * Config::kAcross],
                                   float* scores, int lane, int warp_row, int warp_class) {
#pragma unroll
  for (int i = 0; i < Config::kDown; i++)
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int j = 0; j < Config::kAcross; j++) {
        float* const to = scores + (warp_row + 16 * i + fragment_row(lane, half)) * Config::kPitch +
                          warp_class + 8 * j + fragment_column(lane);
        to[0] = sum[i][4 * j + 2 * half];
        to[1] = sum[i][4 * j + 2 * half + 1];
      }
}

/// Four consecutive floats on a 16-byte boundary.
struct alignas(16) Four {
  float x[4];
};

/// A position's quarters over the tile's classes, every kShare-th group of four; rows: its 3 x 3
/// neighbours'.
template <class Config>
ZIPFLS_VOTE_DEVICE void take_doubled(const float* scores, const float* bias,
                                     const int (&rows)[3][3], int share, int32_t first_class,
                                     Best (&best)[4]) {
#pragma unroll 1
  for (int c = 4 * share; c < Config::kClasses; c += 4 * Config::kShare) {
    Four s[3][3];
#pragma unroll
    for (int h = 0; h < 3; h++)
#pragma unroll
      for (int w = 0; w < 3; w++) s[h][w] = *reinterpret_cast<const Four*>(scores + rows[h][w] + c);
    const Four b = *reinterpret_cast<const Four*>(bias + c);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float around[3][3], quarters[4];
#pragma unroll
      for (int h = 0; h < 3; h++)
#pragma unroll
        for (int w = 0; w < 3; w++) around[h][w] = s[h][w].x[e];
      double_scores(around, b.x[e], quarters);
#pragma unroll
      for (int q = 0; q < 4; q++) take(best[q], quarters[q], first_class + c + e);
    }
  }
}

/// The kernel: block `block` of tiles * splits, neighbouring blocks being ranges of classes of one
/// tile.
template <class Config>
ZIPFLS_VOTE_DEVICE void vote_mma(const MmaArgs& args, int64_t block, int thread, char* shared) {
  using Element = typename Config::Element;
  const Results& results = args.results;
  const int lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / Config::kWarpsAcross * Config::kWarpRows;
  const int warp_class = warp % Config::kWarpsAcross * Config::kWarpClasses;
  const int64_t tile = block / results.splits;
  const int32_t split = static_cast<int32_t>(block % results.splits);
  const int32_t first_tile = split * args.tiles_per_split;
  const int32_t tiles = args.class_tiles - first_tile < args.tiles_per_split
                            ? args.class_tiles - first_tile
                            : args.tiles_per_split;
  const int64_t depth = (args.channel_bytes + kStageBytes - 1) / kStageBytes;
  const int64_t steps_a_tile = depth > 0 ? depth : 1;
  const int64_t steps = tiles * steps_a_tile;
  const uint32_t stages = ptx::shared_address(shared);
  float* const bias =
      reinterpret_cast<float*>(shared + Config::kBiasAt);  // (kStages, kClasses) float
  Best* const pairs = reinterpret_cast<Best*>(shared + Config::kLastAt);  // (kWarpsAcross, kRows)
  float* const scores =
      reinterpret_cast<float*>(shared + Config::kLastAt);  // (kRows, kPitch) float

  Patch patch = {};
  Position mine = {-1, 0, 0};
  int around[3][3] = {};
  Best quarters[4] = {nothing(), nothing(), nothing(), nothing()};
  if constexpr (Config::kUpsample) {
    patch = patch_at(args.patches, tile, args.N, args.H, args.W);
    const int r = thread / Config::kShare;
    mine = position_at(patch, r);
    if (!in_core(patch, mine)) mine.n = -1;
    if (mine.n >= 0) {
#pragma unroll
      for (int h = 0; h < 3; h++)
#pragma unroll
        for (int w = 0; w < 3; w++)
          around[h][w] = neighbour(patch, mine, r, h - 1, w - 1, args.H, args.W) * Config::kPitch;
    }
  }

  FeatureCopies<Config> features;
  features.init(args, tile, patch, thread);

  // What comes next in the sequence of copies: step `ahead` of class tile `ahead_tile`.
  int64_t ahead = 0;
  int32_t ahead_tile = 0;
  uint32_t ahead_stage = 0;
  const auto start_next = [&] {
    if (ahead_tile < tiles) {
      const int32_t first_class = (first_tile + ahead_tile) * Config::kClasses;
      const uint32_t stage = stages + ahead_stage * Config::kOneStage;
      features.start(args, ahead, stage, thread);
      start_weight<Config>(args, first_class, ahead, stage + Config::kFeatureBytes, thread);
      if (ahead == 0) {
        float* const to = bias + ahead_tile % kStages * Config::kClasses;
        for (int i = thread; i < Config::kClasses; i += Config::kThreads) {
          const int64_t c = static_cast<int64_t>(first_class) + i;
          to[i] = padded_bias<Element>(stored_bias<Element>(args.bias, args.bias_stride, c, args.C),
                                       c, args.C);
        }
      }
      ahead_stage = ahead_stage + 1 == kStages ? 0 : ahead_stage + 1;
      if (++ahead == steps_a_tile) ahead = 0, ahead_tile++;
    }
    ptx::copies_commit();  // an empty group too: the count of groups is what copies_wait goes by
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; i++) start_next();

  float sum[Config::kDown][4 * Config::kAcross] = {};
  int64_t step = 0;
  int32_t now = 0;  // class tile
  uint32_t stage = 0;
  for (int64_t i = 0; i < steps; i++) {
    ptx::copies_wait<kStages - 2>();
    ptx::block_sync();
    start_next();
    multiply_stage<Config>(sum, stages + stage * Config::kOneStage, lane, warp_row, warp_class);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    if (++step < steps_a_tile) continue;

    const float* const tile_bias = bias + now % kStages * Config::kClasses;
    const int32_t first_class = (first_tile + now) * Config::kClasses;
    if constexpr (Config::kUpsample) {
      put_scores<Config>(sum, scores, lane, warp_row, warp_class);
      ptx::block_sync();
      if (mine.n >= 0)
        take_doubled<Config>(scores, tile_bias, around, thread % Config::kShare, first_class,
                             quarters);
    } else {
      take_tile<Config>(sum, tile_bias, pairs + warp % Config::kWarpsAcross * Config::kRows,
                        first_class, now == 0, lane, warp_row, warp_class);
    }
#pragma unroll
    for (int d = 0; d < Config::kDown; d++)
#pragma unroll
      for (int e = 0; e < 4 * Config::kAcross; e++) sum[d][e] = 0;
    step = 0;
    now++;
  }

  if constexpr (Config::kUpsample) {
    const int share = thread % Config::kShare;
#pragma unroll
    for (int first = 0; first < 4;
         first += Config::kShare) {  // a quarter for each of those who share
      Best found = nothing();
#pragma unroll
      for (int s = 0; s < Config::kShare; s++) {
        Best quarter = quarters[first + s];
#pragma unroll
        for (int mask = 1; mask < Config::kShare; mask *= 2)
          quarter = better(quarter, {ptx::shuffle_xor(quarter.score, mask),
                                     ptx::shuffle_xor(quarter.index, mask)});
        found = {s == share ? quarter.score : found.score,
                 s == share ? quarter.index : found.index};
      }
      if (mine.n < 0) continue;
      const int q = first + share;
      put_best(results, split, doubled(mine, args.H, args.W, q / 2, q % 2), found);
    }
  } else {
    ptx::block_sync();
    for (int r = thread; r < Config::kRows; r += Config::kThreads) {
      const int64_t row = tile * Config::kRows + r;
      if (row >= results.rows) continue;
      Best best = pairs[r];
#pragma unroll
      for (int across = 1; across < Config::kWarpsAcross; across++)
        best = better(best, pairs[across * Config::kRows + r]);
      put_best(results, split, row, best);
    }
  }

  if (results.splits == 1) return;
  constexpr int kWarps = Config::kThreads / 32;
  if (!came_last(results, count_in(results, tile * kWarps + warp, lane))) return;
  // The same rows again, of all classes.
  if constexpr (Config::kUpsample) {
    if (mine.n < 0) return;
    for (int q = thread % Config::kShare; q < 4; q += Config::kShare) {
      const int64_t vote = doubled(mine, args.H, args.W, q / 2, q % 2);
      put_vote(results, vote, fold(results, vote, 0, 1).index);
    }
  } else {
    for (int r = thread; r < Config::kRows; r += Config::kThreads) {
      const int64_t row = tile * Config::kRows + r;
      if (row < results.rows) put_vote(results, row, fold(results, row, 0, 1).index);
    }
  }
}

}  // namespace zipfls::cuda::vote
