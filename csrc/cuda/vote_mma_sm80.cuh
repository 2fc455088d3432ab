// Dense votes by mma.sync: the kernel for every GPU from sm_80 on, and for all upsampling.
//
// Bytes moved
//   In: each tile of kTileM positions reads its features once per tile of classes, and the weights
//   of its classes, through L2; device memory delivers both about once, since blocks next to each
//   other in time share them. Out: the votes, 4 bytes a position; with several splits of the
//   classes 8 bytes per position and split before that, written and read again (vote_epilogue.cuh).
//
// Threads
//   kWarpsM * kWarpsN warps, each with kTileM / kWarpsM positions by kTileN / kWarpsN classes.
//
// Operands and accumulators
//   kMmaStages pipeline stages of shared memory, 64 bytes of every row each, written by cp.async
//   past L1 and read by ldmatrix without bank conflicts (swizzle64). A block's main loop runs over
//   (class tile, channels) as one sequence: the next tile's copies are pending during a tile's
//   epilogue. Rows past the end, and channels past D, are zeros that cp.async writes itself;
//   classes past C have a bias of NaN and never win. float32 accumulators in registers: 128 a
//   thread in the plain kernel (two blocks a multiprocessor), 32 when upsampling.
//
// Upsampling
//   The tile's scores are stored in shared memory, (kTileM, kPitch) float; kShare threads a
//   position read its 3 x 3 neighbours, 16 bytes (4 classes) at a time, and keep a running argmax
//   of each of its quarters in registers across the class tiles.
//
// Hazards, and what orders them
// - Stage written by cp.async -> read by ldmatrix: every thread waits for its own copies,
//   block_sync.
// - Stage read -> overwritten: the same block_sync. The stage that step i fills was last read in
//   step i - 1, and no thread passes the barrier of step i before all have finished step i - 1.
// - Bias of a tile: written with the tile's first copies, kMmaStages - 1 steps (and so a
//   block_sync) before it is read; its buffer is written again kMmaStages tiles later, after
//   another block_sync.
// - Pairs of a warp (plain): a lane updates only its own rows'; block_sync before the end.
// - Scores (upsampling): written after the block_sync of a step that follows the last read of the
//   tile before; read after another one.
// - Pairs -> combine: see vote_epilogue.cuh.
#pragma once

#include "vote_epilogue.cuh"
#include "tuning.h"

namespace zipfls::cuda::vote {

/// The kernel's arguments. Strides in bytes.
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
  int32_t tiles_n, tiles_per_split;
  Patches patches;
  Results results;  // a group of rows: those of a warp
};

/// The index of features that is contiguous in memory: channels (K) or positions (MN).
enum class Major { kK, kMN };

template <class Element_, int kTileM_, int kTileN_, int kWarpsM_, int kWarpsN_, Major kMajor_,
          bool kUpsample_>
struct MmaConfig {
  using Element = Element_;
  static constexpr int kTileM = kTileM_, kTileN = kTileN_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr Major kMajor = kMajor_;
  static constexpr bool kUpsample = kUpsample_;

  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpTileM = kTileM / kWarpsM, kWarpTileN = kTileN / kWarpsN;
  static constexpr int kMmasM = kWarpTileM / 16, kMmasN = kWarpTileN / 8;  // instructions
  static constexpr int kTileK = kMmaRowBytes / kSize<Element>;             // of a stage
  static constexpr int kMmasK = kMmaRowBytes / 32;                         // instructions deep

  // Shared memory, in this order: stages (features, weight), bias, then the pairs or the scores.
  static constexpr int kFeatureBytes = kTileM * kMmaRowBytes;
  static constexpr int kFullStageBytes = kFeatureBytes + kTileN * kMmaRowBytes;
  static constexpr int kBiasAt = kMmaStages * kFullStageBytes;
  static constexpr int kEpilogueAt = kBiasAt + kMmaStages * kTileN * 4;
  /// Threads that share a position when upsampling, each with every kShare-th group of four
  /// classes.
  static constexpr int kShare = kThreads / kTileM;
  /// Floats from position to position: 8 lanes that read 16 bytes each then touch all banks once.
  static constexpr int kPitch = kTileN + 4 * kShare;
  static constexpr int kSharedBytes =
      kEpilogueAt + (kUpsample ? kTileM * kPitch * 4 : kWarpsN * kTileM * 8);

  static_assert(kWarpTileM % 16 == 0 && kWarpTileN % 16 == 0, "");
  static_assert(kTileM * 4 % kThreads == 0 && kTileN * 4 % kThreads == 0, "");
  static_assert(kMajor == Major::kK || kSize<Element> == 2,
                "ldmatrix transposes 16-bit elements only");
  static_assert(!kUpsample || kThreads % kTileM == 0, "");
};

/// This thread's copies of features: the same rows (or columns) in every stage.
template <class Config>
struct FeatureCopies {
  static constexpr int kStep = Config::kThreads / 4;  // rows from one copy to the next
  static constexpr int kCopies = Config::kTileM / kStep;
  static constexpr int kRowChunks = Config::kTileM / 8;  // MN-major: 16-byte chunks of a channel
  static constexpr int kChannelStep = Config::kThreads / kRowChunks;
  static constexpr bool kByChannel = Config::kMajor == Major::kMN;

  const char* from[kByChannel ? 1 : kCopies];  // null past the last row

  ZIPFLS_DEVICE void init(const MmaArgs& args, int64_t tile, const Patch& patch, int thread) {
    if constexpr (kByChannel) {
      from[0] = row(args, tile, patch, thread % kRowChunks * 8);
    } else {
#pragma unroll
      for (int i = 0; i < kCopies; i++) from[i] = row(args, tile, patch, thread / 4 + i * kStep);
    }
  }

  ZIPFLS_DEVICE static const char* row(const MmaArgs& args, int64_t tile, const Patch& patch,
                                       int r) {
    if constexpr (Config::kUpsample) {
      const Position at = position_at(patch, r);
      if (at.n < 0) return nullptr;
      return args.features + at.n * args.stride_n + at.h * args.stride_h + at.w * args.stride_w;
    } else {
      const int64_t flat = tile * Config::kTileM + r;
      if (flat >= args.results.rows) return nullptr;
      if constexpr (kByChannel)
        return args.features + flat / args.results.map.pitch * args.stride_n +
               flat % args.results.map.pitch * args.stride_w;
      return args.features + flat * args.stride_w;
    }
  }

  /// Starts the copies of the channels of step `step` to a stage.
  ZIPFLS_DEVICE void start(const MmaArgs& args, int64_t step, uint32_t stage, int thread) const {
    if constexpr (kByChannel) {
      const int64_t first = step * Config::kTileK;
#pragma unroll
      for (int i = 0; i < Config::kTileK / kChannelStep; i++) {
        const int k = thread / kRowChunks + i * kChannelStep;
        const bool there = from[0] != nullptr && first + k < args.D;
        ptx::cp_async_16(stage + swizzle_columns<2 * Config::kTileM>(k, thread % kRowChunks),
                         there ? from[0] + (first + k) * args.stride_d : args.features,
                         there ? 16 : 0);
      }
    } else {
      const int64_t at = step * kMmaRowBytes + thread % 4 * 16, left = args.channel_bytes - at;
      const uint32_t bytes = left <= 0 ? 0 : left < 16 ? static_cast<uint32_t>(left) : 16;
#pragma unroll
      for (int i = 0; i < kCopies; i++) {
        const uint32_t there = from[i] == nullptr ? 0 : bytes;
        ptx::cp_async_16(stage + swizzle64(thread / 4 + i * kStep, thread % 4),
                         there == 0 ? args.features : from[i] + at, there);
      }
    }
  }
};

/// Starts the copies of a tile's weights.
template <class Config>
ZIPFLS_DEVICE void start_weight(const MmaArgs& args, int32_t first_class, int64_t step,
                                uint32_t stage, int thread) {
  constexpr int kStep = Config::kThreads / 4;
  const int64_t at = step * kMmaRowBytes + thread % 4 * 16, left = args.channel_bytes - at;
  const uint32_t bytes = left <= 0 ? 0 : left < 16 ? static_cast<uint32_t>(left) : 16;
  const int64_t c = first_class + static_cast<int64_t>(thread / 4);
  const char* from = args.weight + c * args.weight_stride + at;
#pragma unroll
  for (int i = 0; i < Config::kTileN / kStep; i++) {
    const uint32_t there = c + i * kStep < args.C ? bytes : 0;
    ptx::cp_async_16(stage + swizzle64(thread / 4 + i * kStep, thread % 4),
                     there == 0 ? args.weight : from, there);
    from += kStep * args.weight_stride;
  }
}

/// mma.sync over one stage: kMmasK times 32 bytes of every row.
template <class Config>
ZIPFLS_DEVICE void mma_stage(float (&sum)[Config::kMmasM][4 * Config::kMmasN], uint32_t stage,
                             int lane, int warp_row, int warp_class) {
  using Element = typename Config::Element;
#pragma unroll
  for (int slab = 0; slab < Config::kMmasK; slab++) {
    uint32_t a[Config::kMmasM][4], b[Config::kMmasN / 2][4];
#pragma unroll
    for (int i = 0; i < Config::kMmasM; i++) {
      if constexpr (Config::kMajor == Major::kMN) {
        ptx::ldmatrix_x4_trans(
            a[i], stage + swizzle_columns<2 * Config::kTileM>(
                              16 * slab + at_channel(lane), warp_row / 8 + 2 * i + at_chunk(lane)));
      } else {
        ptx::ldmatrix_x4(
            a[i], stage + swizzle64(warp_row + 16 * i + a_row(lane), 2 * slab + a_chunk(lane)));
      }
    }
#pragma unroll
    for (int j = 0; j < Config::kMmasN / 2; j++)
      ptx::ldmatrix_x4(b[j],
                       stage + Config::kFeatureBytes +
                           swizzle64(warp_class + 16 * j + b_row(lane), 2 * slab + b_chunk(lane)));
    if constexpr (kSize<Element> == 4) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
#pragma unroll
        for (int i = 0; i < Config::kMmasM; i++) ptx::cvt_rna_tf32(a[i][e]);
#pragma unroll
        for (int j = 0; j < Config::kMmasN / 2; j++) ptx::cvt_rna_tf32(b[j][e]);
      }
    }
#pragma unroll
    for (int i = 0; i < Config::kMmasM; i++)
#pragma unroll
      for (int j = 0; j < Config::kMmasN; j++)
        ptx::mma_sync<Element>(sum[i] + 4 * j, a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

/// Argmax of each row of the warp's tile, combined into `best` (kTileM,) by the row's own lane.
template <class Config>
ZIPFLS_DEVICE void argmax_of_tile(float (&sum)[Config::kMmasM][4 * Config::kMmasN],
                                  const float* bias, ScoreIndex* best, int32_t first_class,
                                  bool first_tile, int lane, int warp_row, int warp_class) {
#pragma unroll
  for (int i = 0; i < Config::kMmasM; i++) {
    ScoreIndex rows[2];
    argmax_of_fragment<Config::kMmasN>(sum[i], bias + warp_class, fragment_column(lane),
                                       first_class + warp_class, rows);
    const ScoreIndex low = argmax_of_quad(rows[0]), high = argmax_of_quad(rows[1]);
    if (lane % 4 < 2) {  // the first lane of four has the upper row, the second the lower
      const bool upper = lane % 4 == 0;
      const ScoreIndex found = {upper ? low.score : high.score, upper ? low.index : high.index};
      ScoreIndex* const mine = best + warp_row + 16 * i + fragment_row(lane, lane % 4);
      *mine = argmax_combine(first_tile ? identity() : *mine, found);
    }
  }
}

/// Scores of the tile to shared memory: (kTileM, kPitch) float.
template <class Config>
ZIPFLS_DEVICE void store_scores(const float (&sum)[Config::kMmasM][4 * Config::kMmasN],
                                float* scores, int lane, int warp_row, int warp_class) {
#pragma unroll
  for (int i = 0; i < Config::kMmasM; i++)
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int j = 0; j < Config::kMmasN; j++) {
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

/// Argmax of a position's quarters over the tile's classes, every kShare-th group of four; rows: of
/// its 3 x 3 neighbours.
template <class Config>
ZIPFLS_DEVICE void argmax_of_upsampled(const float* scores, const float* bias,
                                       const int (&rows)[3][3], int share, int32_t first_class,
                                       ScoreIndex (&best)[4]) {
#pragma unroll 1
  for (int c = 4 * share; c < Config::kTileN; c += 4 * Config::kShare) {
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
      upsample_scores(around, b.x[e], quarters);
#pragma unroll
      for (int q = 0; q < 4; q++) argmax_update(best[q], quarters[q], first_class + c + e);
    }
  }
}

/// The kernel: block `block` of tiles * splits, consecutive blocks being splits of one tile.
template <class Config>
ZIPFLS_DEVICE void vote_mma(const MmaArgs& args, int64_t block, int thread, unsigned char* shared) {
  using Element = typename Config::Element;
  const Results& results = args.results;
  const int lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / Config::kWarpsN * Config::kWarpTileM;
  const int warp_class = warp % Config::kWarpsN * Config::kWarpTileN;
  const int64_t tile = block / results.splits;
  const int32_t split = static_cast<int32_t>(block % results.splits);
  const int32_t first_tile = split * args.tiles_per_split;
  const int32_t tiles = args.tiles_n - first_tile < args.tiles_per_split ? args.tiles_n - first_tile
                                                                         : args.tiles_per_split;
  const int64_t depth = (args.channel_bytes + kMmaRowBytes - 1) / kMmaRowBytes;
  const int64_t steps_a_tile = depth > 0 ? depth : 1;
  const int64_t steps = tiles * steps_a_tile;
  const uint32_t stages = ptx::shared_address(shared);
  float* const bias =
      reinterpret_cast<float*>(shared + Config::kBiasAt);  // (kMmaStages, kTileN) float
  ScoreIndex* const pairs =
      reinterpret_cast<ScoreIndex*>(shared + Config::kEpilogueAt);  // (kWarpsN, kTileM)
  float* const scores =
      reinterpret_cast<float*>(shared + Config::kEpilogueAt);  // (kTileM, kPitch) float

  Patch patch = {};
  Position mine = {-1, 0, 0};
  int around[3][3] = {};
  ScoreIndex quarters[4] = {identity(), identity(), identity(), identity()};
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

  // The next copies of the sequence: step `ahead` of class tile `ahead_tile`.
  int64_t ahead = 0;
  int32_t ahead_tile = 0;
  uint32_t ahead_stage = 0;
  const auto start_next = [&] {
    if (ahead_tile < tiles) {
      const int32_t first_class = (first_tile + ahead_tile) * Config::kTileN;
      const uint32_t stage = stages + ahead_stage * Config::kFullStageBytes;
      features.start(args, ahead, stage, thread);
      start_weight<Config>(args, first_class, ahead, stage + Config::kFeatureBytes, thread);
      if (ahead == 0) {
        float* const to = bias + ahead_tile % kMmaStages * Config::kTileN;
        for (int i = thread; i < Config::kTileN; i += Config::kThreads) {
          const int64_t c = static_cast<int64_t>(first_class) + i;
          to[i] = padded_bias<Element>(stored_bias<Element>(args.bias, args.bias_stride, c, args.C),
                                       c, args.C);
        }
      }
      ahead_stage = ahead_stage + 1 == kMmaStages ? 0 : ahead_stage + 1;
      if (++ahead == steps_a_tile) ahead = 0, ahead_tile++;
    }
    ptx::cp_async_commit_group();  // an empty group too: cp_async_wait_group counts groups
  };
#pragma unroll
  for (int i = 0; i < kMmaStages - 1; i++) start_next();

  float sum[Config::kMmasM][4 * Config::kMmasN] = {};
  int64_t step = 0;
  int32_t now = 0;  // class tile
  uint32_t stage = 0;
  for (int64_t i = 0; i < steps; i++) {
    ptx::cp_async_wait_group<kMmaStages - 2>();
    ptx::block_sync();
    start_next();
    mma_stage<Config>(sum, stages + stage * Config::kFullStageBytes, lane, warp_row, warp_class);
    stage = stage + 1 == kMmaStages ? 0 : stage + 1;
    if (++step < steps_a_tile) continue;

    const float* const tile_bias = bias + now % kMmaStages * Config::kTileN;
    const int32_t first_class = (first_tile + now) * Config::kTileN;
    if constexpr (Config::kUpsample) {
      store_scores<Config>(sum, scores, lane, warp_row, warp_class);
      ptx::block_sync();
      if (mine.n >= 0)
        argmax_of_upsampled<Config>(scores, tile_bias, around, thread % Config::kShare, first_class,
                                    quarters);
    } else {
      argmax_of_tile<Config>(sum, tile_bias, pairs + warp % Config::kWarpsN * Config::kTileM,
                             first_class, now == 0, lane, warp_row, warp_class);
    }
#pragma unroll
    for (int d = 0; d < Config::kMmasM; d++)
#pragma unroll
      for (int e = 0; e < 4 * Config::kMmasN; e++) sum[d][e] = 0;
    step = 0;
    now++;
  }

  if constexpr (Config::kUpsample) {
    const int share = thread % Config::kShare;
#pragma unroll
    for (int first = 0; first < 4;
         first += Config::kShare) {  // a quarter for each of the kShare threads
      ScoreIndex found = identity();
#pragma unroll
      for (int s = 0; s < Config::kShare; s++) {
        ScoreIndex quarter = quarters[first + s];
#pragma unroll
        for (int mask = 1; mask < Config::kShare; mask *= 2)
          quarter = argmax_combine(
              quarter, {ptx::shfl_xor(quarter.score, mask), ptx::shfl_xor(quarter.index, mask)});
        found = {s == share ? quarter.score : found.score,
                 s == share ? quarter.index : found.index};
      }
      if (mine.n < 0) continue;
      const int q = first + share;
      store_score_index(results, split, upsampled_index(mine, args.H, args.W, q / 2, q % 2), found);
    }
  } else {
    ptx::block_sync();
    for (int r = thread; r < Config::kTileM; r += Config::kThreads) {
      const int64_t row = tile * Config::kTileM + r;
      if (row >= results.rows) continue;
      ScoreIndex best = pairs[r];
#pragma unroll
      for (int across = 1; across < Config::kWarpsN; across++)
        best = argmax_combine(best, pairs[across * Config::kTileM + r]);
      store_score_index(results, split, row, best);
    }
  }

  if (results.splits == 1) return;
  constexpr int kWarps = Config::kThreads / 32;
  if (!arrive_is_last(results, arrive(results, tile * kWarps + warp, lane))) return;
  // The votes of the same rows, from all splits.
  if constexpr (Config::kUpsample) {
    if (mine.n < 0) return;
    for (int q = thread % Config::kShare; q < 4; q += Config::kShare) {
      const int64_t vote = upsampled_index(mine, args.H, args.W, q / 2, q % 2);
      store_vote(results, vote, combine_splits(results, vote, 0, 1).index);
    }
  } else {
    for (int r = thread; r < Config::kTileM; r += Config::kThreads) {
      const int64_t row = tile * Config::kTileM + r;
      if (row < results.rows) store_vote(results, row, combine_splits(results, row, 0, 1).index);
    }
  }
}

}  // namespace zipfls::cuda::vote
