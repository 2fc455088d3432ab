// Packing: features or weights of any layout -> (rows, pitch), K-major (channels next to each
// other), every row on a 16-byte boundary.
//
// Why: 7 x 7 maps in NCHW order have a channel every 98 bytes. No copy wider than 2 bytes can read
// such a row (cp.async needs 4, 8 or 16 aligned bytes, TMA strides of 16), and neither ldmatrix nor
// wgmma can read it from shared memory (both: 16-byte rows). Converting inside the product would
// repeat for every tile of classes, and costs about what shared memory has left beside wgmma's own
// reads (40 % of its cycles); so it is done once, at the speed of memory.
//
// Bytes moved: each element read once and written once (4 bytes for a half-precision element).
// Reads are evicted first, so that L2 keeps what is written for the product to read.
//
// pack_slabs: 16-bit maps whose channels follow one another. 64 channels of one image are then one
// range of memory, whatever the number of positions: it is read by 16 bytes, copied to shared
// memory in that order, and stored by 8 channels of a position, 16 bytes. Groups of 8 channels are
// an odd number of 16 bytes apart there: the 8 groups by 4 positions that a warp gathers from touch
// each bank once.
//
// pack_rows: any other layout. 64 positions by 64 channels a block of 256 threads, 16 loads of a
// thread pending, lanes along whichever index is contiguous; through shared memory, padded so that
// either direction is free of bank conflicts for 16-bit elements.
//
// Hazards: offsets written -> read, and tile written -> read by other threads: a block_sync each.
#pragma once

#include "ptx.cuh"
#include "vote_layout.cuh"

namespace zipfls::cuda::vote {

constexpr int kPackTile = 64, kPackThreads = 256;

/// Strides in elements. Rows are the N * H * W positions, in that order.
struct PackArgs {
  const void* from;
  void* to;  // (N * H * W, pitch)
  int64_t N, H, W, D, pitch;
  int64_t stride_n, stride_h, stride_w, stride_d;
  int64_t channel_tiles;
  bool by_position;  // lanes along positions when reading
};

template <class T>
struct PackShared {
  T tile[kPackTile][kPackTile + 2];
  int64_t offset[kPackTile];
};

template <class T>
struct alignas(2 * sizeof(T)) Two {
  T x[2];
};

template <class T>
ZIPFLS_DEVICE void pack_rows(const PackArgs& args, int64_t block, int thread,
                             PackShared<T>& shared) {
  const int64_t rows = args.N * args.H * args.W;
  const int64_t first_row = block / args.channel_tiles * kPackTile;
  const int64_t first_channel = block % args.channel_tiles * kPackTile;
  if (thread < kPackTile) {
    const int64_t row = first_row + thread, h = row / args.W % args.H, n = row / (args.W * args.H);
    shared.offset[thread] =
        row < rows ? n * args.stride_n + h * args.stride_h + row % args.W * args.stride_w : -1;
  }
  ptx::block_sync();
  constexpr int kTurns = kPackTile * kPackTile / kPackThreads;
  T x[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; i++) {
    const int major = thread / kPackTile + i * (kPackThreads / kPackTile),
              minor = thread % kPackTile;
    const int r = args.by_position ? minor : major, k = args.by_position ? major : minor;
    const bool there = shared.offset[r] >= 0 && first_channel + k < args.D;
    x[i] = there ? ptx::ld_global_cs(static_cast<const T*>(args.from) + shared.offset[r] +
                                     (first_channel + k) * args.stride_d)
                 : T{};
  }
#pragma unroll
  for (int i = 0; i < kTurns; i++) {
    const int major = thread / kPackTile + i * (kPackThreads / kPackTile),
              minor = thread % kPackTile;
    shared.tile[args.by_position ? minor : major][args.by_position ? major : minor] = x[i];
  }
  ptx::block_sync();
  for (int i = thread; i < kPackTile * kPackTile / 2; i += kPackThreads) {
    const int r = i / (kPackTile / 2), k = i % (kPackTile / 2) * 2;
    if (first_row + r >= rows || first_channel + k >= args.D)
      continue;  // pitch is even: a pair fits
    Two<T>* const to = reinterpret_cast<Two<T>*>(static_cast<T*>(args.to) +
                                                 (first_row + r) * args.pitch + first_channel + k);
    *to = {{shared.tile[r][k], shared.tile[r][k + 1]}};
  }
}

// Slabs -------------------------------------------------------------------------------------------

/// Most positions of a map whose slab of 64 channels fits: 14 x 14, in 25 KB.
constexpr int kSlabPositions = 196;
constexpr int kSlabGroups = kPackTile / 8;  // of 8 channels

/// Whether maps are packed by slabs.
inline bool in_slabs(const PackArgs& args, int64_t size) {
  const int64_t P = args.H * args.W;
  return size == 2 && P <= kSlabPositions && (args.W == 1 || args.stride_w == 1) &&
         (args.H == 1 || args.stride_h == args.W) && args.stride_d == P && args.D % 8 == 0 &&
         (args.N == 1 || args.stride_n % 8 == 0) &&
         reinterpret_cast<uintptr_t>(args.from) % 16 == 0;
}

struct alignas(16) Eight {
  uint16_t x[8];
};

struct SlabShared {
  Eight vectors[kSlabGroups * (kSlabPositions + 1)];
};

/// Block `block` of images * channel tiles.
ZIPFLS_DEVICE void pack_slabs(const PackArgs& args, int64_t block, int thread, SlabShared& shared) {
  const int64_t n = block / args.channel_tiles;
  const int64_t first_channel = block % args.channel_tiles * kPackTile;
  const int P = static_cast<int>(args.H * args.W), pitch = P | 1;  // 16 bytes each
  const int64_t left = (args.D - first_channel) / 8;
  const int groups = left < kSlabGroups ? static_cast<int>(left) : kSlabGroups;
  const uint16_t* const from =
      static_cast<const uint16_t*>(args.from) + n * args.stride_n + first_channel * P;
#pragma unroll 2
  for (int i = thread; i < groups * P; i += kPackThreads)
    shared.vectors[i / P * pitch + i % P] =
        ptx::ld_global_cs(reinterpret_cast<const Eight*>(from) + i);
  ptx::block_sync();
  const int g = thread % kSlabGroups;
  if (g >= groups) return;
  const uint16_t* const group = shared.vectors[g * pitch].x;  // (8, P)
  uint16_t* const to = static_cast<uint16_t*>(args.to) + n * P * args.pitch + first_channel + 8 * g;
#pragma unroll 2
  for (int p = thread / kSlabGroups; p < P; p += kPackThreads / kSlabGroups) {
    Eight x;
#pragma unroll
    for (int k = 0; k < 8; k++) x.x[k] = group[k * P + p];
    ptx::st_global_cg(to + p * args.pitch, x);
  }
}

}  // namespace zipfls::cuda::vote
