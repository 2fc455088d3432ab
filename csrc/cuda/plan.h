// From a call's shape and the device to its kernel, grid and shared memory: host arithmetic alone.
//
// A plan is made once per call: the caller allocates by it, the launcher launches it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "args.h"
#include "tuning.h"
#include "vote_layout.cuh"

namespace zipfls::cuda {

/// Properties of a device that plans depend on.
struct Device {
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  int shared_per_block = 0;  // bytes, after opting in
};

/// Blocks that can be resident at once, if their registers and shared memory allow, and no more
/// than `items`.
inline int resident_blocks(int64_t items, int threads, const Device& device) {
  const int64_t most = int64_t{device.multiprocessors} * (kThreadsPerMultiprocessor / threads);
  return static_cast<int>(std::max<int64_t>(1, std::min(items, most)));
}

// Losses ------------------------------------------------------------------------------------------

struct LossPlan {
  enum Kernel { kLanes8, kLanes16, kLanes32, kBlock, kCluster, kLong, kGeneral, kDistill } kernel;
  int threads;       // of a block
  int cluster;       // blocks a row
  uint32_t vectors;  // 16-byte vectors of shared memory for each row (or slice of a row) of a block
  int64_t groups;    // of rows, one for each pass of a block (or cluster) through its loop
  uint32_t row_bytes = 0;  // shared memory of one row
  uint32_t shared = 0;     // and of a block
  int blocks = 0;          // LossFwd::sums are (2, blocks)

  /// Threads of a row: 8, 16, 32, or 0 for blocks.
  int lanes() const { return kernel <= kLanes32 ? 8 << kernel : 0; }
};

inline uint32_t vectors_of(int64_t elements, int vector) {
  // A row that starts in the middle of a vector touches one more.
  return static_cast<uint32_t>((elements + vector - 1 + vector - 1) / vector);
}

inline int round_up(int64_t x, int unit) { return static_cast<int>((x + unit - 1) / unit * unit); }

/// The rows or long kernel for N rows of C classes of `vector` elements per 16 bytes, P votes each,
/// without shared memory and grid; table_bytes: shared memory of one row's tables.
inline LossPlan choose_rows(int64_t N, int32_t C, int32_t P, int vector, uint32_t table_bytes,
                            const Device& device) {
  const uint32_t vectors = vectors_of(C, vector);
  const auto held = [&](int lanes) -> uint32_t {  // float64 as 16 bits
    if (vector == 4)
      return lanes == 0    ? kHeldVectors<4, 0>
             : lanes == 16 ? kHeldVectors<4, 16>
                           : kHeldVectors<4, 32>;
    return lanes == 0    ? kHeldVectors<2, 0>
           : lanes == 16 ? kHeldVectors<2, 16>
                         : kHeldVectors<2, 32>;
  };
  const int64_t resident = int64_t{device.multiprocessors} * (kThreadsPerMultiprocessor / kWarp);
  const bool full = N * 2 >= resident;  // a warp a row fills at least half of the device
  auto rows_fit = [&](int rows) {
    return rows * (vectors * 16 + table_bytes + 1024) <=
           static_cast<uint32_t>(device.shared_per_block) / 2;
  };
  const bool narrow = vector > 2;  // float64 is for checks: a block a row will do
  for (const auto kernel : {LossPlan::kLanes8, LossPlan::kLanes16}) {
    LossPlan plan = {kernel, kSmallBlock, 1, vectors, 0};
    const int lanes = plan.lanes(), rows = kSmallBlock / lanes;
    plan.groups = (N + rows - 1) / rows;
    if (narrow && N * lanes >= kSharedWarps * kWarp * device.multiprocessors &&
        vectors <= lanes * held(lanes) && rows_fit(rows))
      return plan;
  }
  if (narrow && vectors <= kWarp * held(kWarp) && rows_fit(kSmallBlock / kWarp)) {
    // With few rows, as many blocks as there are multiprocessors.
    const int64_t rows = std::clamp<int64_t>(N / device.multiprocessors, 1, kSmallBlock / kWarp);
    return {LossPlan::kLanes32, static_cast<int>(rows) * kWarp, 1, vectors, (N + rows - 1) / rows};
  }

  auto threads_for = [&](uint32_t slice_vectors, int most) {
    const int wanted = full ? kFullDeviceVectors : kIdleDeviceVectors;
    const int least = round_up((slice_vectors + held(0) - 1) / held(0), kWarp);
    int threads = round_up((slice_vectors + wanted - 1) / wanted, kWarp);
    if (!full) {
      threads = std::min(threads, kIdleBlock);
      threads = threads > P / kVotesPerThread ? threads : round_up(P / kVotesPerThread, kWarp);
    }
    threads = threads > most ? most : threads;
    return threads > least ? threads : least;
  };
  auto block_fits = [&](uint32_t slice_vectors, int most) {
    return slice_vectors <= most * held(0) && slice_vectors * 16 + table_bytes + 4096 <=
                                                  static_cast<uint32_t>(device.shared_per_block);
  };
  if (block_fits(vectors, kWideBlock))
    return {LossPlan::kBlock, threads_for(vectors, kWideBlock), 1, vectors, N};
  if (narrow && device.major >= 9) {
    for (int size = 2; size <= kLargestCluster; size *= 2) {
      const uint32_t slice = (vectors + size - 1) / size;
      const bool last = size == kLargestCluster;
      if ((slice <= kClusterSlice || last) && block_fits(slice, kWideBlock))
        return {LossPlan::kCluster, threads_for(slice, kWideBlock), size, slice, N};
    }
  }
  return {LossPlan::kLong, kLongBlock, 1, 0, N};
}

// Votes -------------------------------------------------------------------------------------------

namespace vote {

enum class Kernel {
  kMma,          // mma.sync, 128 x 128
  kMmaFew,       // mma.sync, 64 x 128
  kMmaSmallMap,  // mma.sync, upsampling, whole maps in 64 positions
  kMmaPatch,     // mma.sync, upsampling, patches of 128 positions
  kWgmmaWide,    // wgmma, 128 x 256, clusters of two
  kWgmmaNarrow,  // wgmma, 128 x 128
};

enum class Layout {
  kKMajor,   // as they are: channels next to each other, rows on 16-byte boundaries
  kMNMajor,  // as they are: positions next to each other (NCHW), channels on 16 bytes
  kPacked,   // copied to scratch as rows
};

struct VotePlan {
  Kernel kernel;
  Layout features;
  bool pack_weight;
  int64_t images;                   // of one round: all, but for packed features beyond kPackBytes
  int64_t row_pitch, weight_pitch;  // elements, of what is packed
  size_t weight_at, features_at, pairs_at, bytes;  // scratch, see lay_out
  int64_t tile_counters;                           // see vote_epilogue.cuh
  int multiprocessors;
};

/// The product's shape in one round.
struct VoteShape {
  int64_t rows;     // of the product, including those between images; upsampling: votes
  RowMap map;       // rows <-> positions; upsampling: the identity on votes
  Patches patches;  // upsampling
  int64_t tiles;    // of rows
  int32_t tiles_n, tiles_per_split, splits;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t element_size(VoteType type) { return type == VoteType::kTensorFloat32 ? 4 : 2; }

/// Elements from position to position, and positions from image to image, where a problem's
/// positions are rows of one matrix (slices of longer images included); otherwise pitch 0.
struct Flat {
  int64_t stride, pitch;
};

inline Flat flat_rows(const VoteProblem& x) {
  const int64_t P = x.H * x.W;
  if (P == 1) {
    if (x.N == 1) return {ceil_div(x.D, 8) * 8, 1};
    return {x.stride_n, x.stride_n > 0 ? 1 : 0};
  }
  const int64_t stride = x.W > 1 ? x.stride_w : x.stride_h;
  if (stride <= 0 || (x.W > 1 && x.H > 1 && x.stride_h != x.W * x.stride_w)) return {0, 0};
  if (x.N == 1) return {stride, P};
  const int64_t pitch = x.stride_n / stride;
  if (x.stride_n % stride != 0 || pitch < P || pitch > P + P / kPitchSlack) return {0, 0};
  return {stride, pitch};
}

/// Whether a stride, of a dimension of the given size, keeps 16-byte alignment.
inline bool keeps_alignment(int64_t size, int64_t stride, int64_t element) {
  return size <= 1 || stride * element % 16 == 0;
}

inline bool aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

inline Layout layout_of(const VoteProblem& x, bool wgmma) {
  const int64_t size = element_size(x.type), P = x.H * x.W;
  if (x.D == 0) return Layout::kKMajor;
  const Flat flat = flat_rows(x);
  const bool strides_fit = keeps_alignment(x.N, x.stride_n, size) &&
                           keeps_alignment(x.H, x.stride_h, size) &&
                           keeps_alignment(x.W, x.stride_w, size);
  if (aligned(x.features) && (x.D == 1 || x.stride_d == 1) && strides_fit &&
      (x.upsample == 2 || flat.pitch > 0))
    return Layout::kKMajor;
  const bool contiguous = (x.W == 1 || x.stride_w == 1) && (x.H == 1 || x.stride_h == x.W);
  if (size == 2 && P % 8 == 0 && contiguous && aligned(x.features) &&
      keeps_alignment(x.N, x.stride_n, size) && keeps_alignment(x.D, x.stride_d, size)) {
    if (x.upsample == 2 ? P <= kSmallMapTileM : !wgmma || x.C <= kMNMajorMaxClasses)
      return Layout::kMNMajor;
  }
  return Layout::kPacked;
}

/// Cuts maps of H x W into tiles of at most `rows` positions.
inline Patches cut_maps(int32_t H, int32_t W, int32_t rows) {
  if (H * int64_t{W} <= rows) return {static_cast<int32_t>(rows / (H * int64_t{W})), H, W, 1, 1};
  Patches best = {1, 0, 0, 0, 0};
  int64_t fewest = INT64_MAX;
  for (int32_t core_w = 1; core_w <= std::min(W, rows); core_w++) {
    const int32_t w = std::min(core_w + 2, W), h = rows / w;
    const int32_t core_h = h >= H ? H : h - 2;
    if (core_h < 1) break;
    const int64_t down = ceil_div(H, core_h), across = ceil_div(W, core_w);
    if (down * across < fewest) {
      fewest = down * across;
      best = {1, core_h, core_w, static_cast<int32_t>(down), static_cast<int32_t>(across)};
    }
  }
  return best;
}

struct TileSize {
  int32_t rows, classes;
};

inline TileSize tile_size(Kernel kernel) {
  switch (kernel) {
    case Kernel::kMma:
      return {kTileM, kTileN};
    case Kernel::kMmaFew:
      return {kSmallTileM, kTileN};
    case Kernel::kMmaSmallMap:
      return {kSmallMapTileM, kSmallMapTileN};
    case Kernel::kMmaPatch:
      return {kPatchTileM, kPatchTileN};
    case Kernel::kWgmmaWide:
      return {kWgmmaTileM, kWideTileN};
    case Kernel::kWgmmaNarrow:
      return {kWgmmaTileM, kNarrowTileN};
  }
  return {0, 0};
}

/// Of `images` images.
inline VoteShape shape_of(const VotePlan& plan, const VoteProblem& x, int64_t images) {
  const int64_t P = x.H * x.W;
  const TileSize tile = tile_size(plan.kernel);
  VoteShape shape = {};
  shape.tiles_n = static_cast<int32_t>(ceil_div(x.C, tile.classes));
  int64_t splits = std::min<int64_t>(shape.tiles_n, kMaxSplits);
  if (x.upsample == 2) {
    shape.patches = cut_maps(static_cast<int32_t>(x.H), static_cast<int32_t>(x.W), tile.rows);
    shape.tiles =
        ceil_div(images, shape.patches.images) * shape.patches.down * shape.patches.across;
    shape.rows = images * 4 * P;
    shape.map = {4 * P, 4 * P};
    splits = std::min(
        splits, ceil_div(int64_t{kBlocksPerMultiprocessor} * plan.multiprocessors, shape.tiles));
  } else {
    const int64_t pitch = plan.features == Layout::kKMajor && x.D > 0 ? flat_rows(x).pitch : P;
    shape.map = {P, images == 1 ? P : pitch};
    shape.rows = (images - 1) * shape.map.pitch + P;
    shape.tiles = ceil_div(shape.rows, tile.rows);
    if (plan.kernel == Kernel::kWgmmaWide || plan.kernel == Kernel::kWgmmaNarrow)
      splits = shape.tiles_n;
  }
  shape.tiles_per_split = static_cast<int32_t>(ceil_div(shape.tiles_n, splits));
  shape.splits = static_cast<int32_t>(ceil_div(shape.tiles_n, shape.tiles_per_split));
  return shape;
}

/// Waves of tiles, in units of a wide tile's time.
inline double wgmma_cost(int64_t rows, int64_t C, int multiprocessors, int32_t classes,
                         int32_t cluster) {
  const int64_t at_a_time = std::max(1, multiprocessors / cluster);
  const int64_t waves =
      ceil_div(ceil_div(rows, kWgmmaTileM * cluster) * ceil_div(C, classes), at_a_time);
  return static_cast<double>(waves) * classes / kWideTileN;
}

/// Offsets of a plan's scratch, large enough for every round: the last one may have fewer images,
/// so fewer tiles, and so more splits than the others.
inline void lay_out(VotePlan& plan, const VoteProblem& x) {
  const int64_t size = element_size(x.type),
                features = plan.images * x.H * x.W * plan.row_pitch * size;
  int64_t pairs = 0;
  plan.tile_counters = 0;
  for (const int64_t images : {plan.images, x.N % plan.images}) {
    if (images == 0) continue;
    const VoteShape shape = shape_of(plan, x, images);
    if (shape.splits == 1) continue;
    pairs = std::max(pairs, shape.splits * shape.rows * static_cast<int64_t>(sizeof(ScoreIndex)));
    // 8 warps or fewer have a tile's rows; a cluster may have one more tile than there are.
    plan.tile_counters = std::max(plan.tile_counters, (shape.tiles + 1) * 8);
  }
  const auto round_up = [](int64_t bytes) {
    return static_cast<size_t>(ceil_div(bytes, 256) * 256);
  };
  plan.weight_at = 0;
  plan.features_at = round_up(plan.pack_weight ? x.C * plan.weight_pitch * size : 0);
  plan.pairs_at = plan.features_at + round_up(plan.features == Layout::kPacked ? features : 0);
  plan.bytes = plan.pairs_at + round_up(pairs);
}

/// wgmma: whether the device has it and this build a kernel for it.
inline VotePlan plan_votes(const VoteProblem& x, const Device& device, bool wgmma) {
  const int64_t size = element_size(x.type), P = x.H * x.W, round = 16 / size;
  VotePlan plan = {};
  plan.multiprocessors = device.multiprocessors;
  plan.features = layout_of(x, wgmma);
  // Rows that overlap or coincide are packed too: no document says that TMA's stride between rows
  // may be less than a row.
  const auto apart = [&](int64_t rows, int64_t stride) { return rows <= 1 || stride >= x.D; };
  plan.pack_weight =
      x.D > 0 && !(aligned(x.weight) && (x.D == 1 || x.weight_stride_d == 1) &&
                   keeps_alignment(x.C, x.weight_stride_c, size) && apart(x.C, x.weight_stride_c));
  if (wgmma && x.upsample == 1 && plan.features == Layout::kKMajor && x.D > 0 &&
      !apart(x.N * P, flat_rows(x).stride))
    plan.features = Layout::kPacked;
  plan.row_pitch = plan.weight_pitch = ceil_div(x.D, round) * round;
  plan.images = x.N;
  if (plan.features == Layout::kPacked)
    plan.images =
        std::clamp<int64_t>(kPackBytes / std::max<int64_t>(1, P * plan.row_pitch * size), 1, x.N);

  const int64_t rows = plan.images * P;
  if (x.upsample == 2) {
    plan.kernel = P <= kSmallMapTileM ? Kernel::kMmaSmallMap : Kernel::kMmaPatch;
  } else if (wgmma && x.D > 0 && plan.features != Layout::kMNMajor &&
             rows + rows / kPitchSlack < INT32_MAX - kWgmmaTileM * kWideCluster &&
             ceil_div(rows, kWgmmaTileM) * ceil_div(x.C, kNarrowTileN) >= kMinWgmmaTiles) {
    const double wide = wgmma_cost(rows, x.C, device.multiprocessors, kWideTileN, kWideCluster);
    const double narrow =
        wgmma_cost(rows, x.C, device.multiprocessors, kNarrowTileN, kNarrowCluster);
    plan.kernel = wide <= narrow * kNarrowPenalty ? Kernel::kWgmmaWide : Kernel::kWgmmaNarrow;
  } else {
    const bool many = ceil_div(rows, kTileM) * ceil_div(x.C, kTileN) >= device.multiprocessors;
    plan.kernel = many ? Kernel::kMma : Kernel::kMmaFew;
  }
  lay_out(plan, x);
  return plan;
}

}  // namespace vote
}  // namespace zipfls::cuda
