// The votes' index arithmetic: element types, shared-memory layouts, fragments, tile orders,
// patches, and the order of scores. For host and device: the tests check it exhaustively.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef ZIPFLS_HOST_DEVICE
#ifdef __CUDACC__
#define ZIPFLS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ZIPFLS_HOST_DEVICE inline __attribute__((always_inline))
#endif
#endif

namespace zipfls::cuda {

// Elements ----------------------------------------------------------------------------------------

ZIPFLS_HOST_DEVICE float float_of_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// Operands of the tensor cores, as they are stored.

struct BFloat16 {
  using Stored = uint16_t;
  ZIPFLS_HOST_DEVICE static float to_float(Stored x) {
    return float_of_bits(static_cast<uint32_t>(x) << 16);
  }
};

struct Float16 {
  using Stored = uint16_t;
  /// Exact: the exponent is rebased by a multiplication, which also normalises subnormals.
  ZIPFLS_HOST_DEVICE static float to_float(Stored x) {
    const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fffu) << 13;
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
    if (magnitude >= 0x0f800000u) return float_of_bits(sign | magnitude | 0x70000000u);  // inf, NaN
    return float_of_bits(sign) + (sign ? -1.0f : 1.0f) * (float_of_bits(magnitude) * 0x1p112f);
  }
};

struct TensorFloat32 {
  using Stored = float;
  ZIPFLS_HOST_DEVICE static float to_float(Stored x) { return x; }
};

template <class Element>
constexpr int kSize = static_cast<int>(sizeof(typename Element::Stored));

namespace vote {

/// bias[c] as it is stored, 0 without one or past the last class.
template <class Element>
ZIPFLS_HOST_DEVICE typename Element::Stored stored_bias(const void* bias, int64_t stride, int64_t c,
                                                        int64_t C) {
  using Stored = typename Element::Stored;
  return bias == nullptr || c >= C ? Stored{} : static_cast<const Stored*>(bias)[c * stride];
}
/// NaN past the last class. Added to every score, it keeps the columns of a ragged tile from
/// winning without a select or a branch of their own.
template <class Element>
ZIPFLS_HOST_DEVICE float padded_bias(typename Element::Stored bias, int64_t c, int64_t C) {
  return c < C ? Element::to_float(bias) : NAN;
}

// Scores ------------------------------------------------------------------------------------------

/// A score and its class. Class -1: every score so far is NaN, and `score` has no meaning.
///
/// The one source of the vote's order: among equal computed scores the lowest class wins; a NaN
/// score never wins; minus infinity may. argmax_combine is associative and commutative, so that
/// splits may be combined in any order.
struct alignas(8) ScoreIndex {
  float score;
  int32_t index;
};

/// argmax_combine's identity.
ZIPFLS_HOST_DEVICE ScoreIndex identity() { return {-INFINITY, -1}; }

ZIPFLS_HOST_DEVICE bool beats(ScoreIndex challenger, ScoreIndex holder) {
  if (challenger.index < 0) return false;
  if (holder.index < 0) return true;
  return challenger.score > holder.score ||
         (challenger.score == holder.score && challenger.index < holder.index);
}

ZIPFLS_HOST_DEVICE ScoreIndex argmax_combine(ScoreIndex a, ScoreIndex b) {
  const bool second = beats(b, a);  // field by field, to stay in registers
  return {second ? b.score : a.score, second ? b.index : a.index};
}

/// Rows of the matrix product and positions: image n's P positions are rows n * pitch .. + P. pitch
/// > P where the tensor is a slice of longer images (tokens without their class token): the rows in
/// between are computed and not read.
struct RowMap {
  int64_t positions;  // P
  int64_t pitch;

  /// Index of a row's vote, -1 for a row in between.
  ZIPFLS_HOST_DEVICE int64_t vote_of(int64_t row) const {
    if (pitch == positions) return row;
    const int64_t p = row % pitch;
    return p < positions ? row / pitch * positions + p : -1;
  }
};

// Shared memory -----------------------------------------------------------------------------------

/// Rows of 64 bytes, two to the 128 bytes that shared memory serves at once: chunk c (16 bytes) of
/// a row is stored where c is exclusive-ored with the row's pair, so that both the copy's writes
/// (whole rows) and ldmatrix's reads (one chunk of 8 rows) touch all 32 banks once.
ZIPFLS_HOST_DEVICE uint32_t swizzle64(uint32_t row, uint32_t chunk) {
  return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4);
}

/// Rows of `kRowBytes` (128 or 256) bytes, one channel each, positions next to each other: the
/// chunk is exclusive-ored with the channel, for the same reason.
template <int kRowBytes>
ZIPFLS_HOST_DEVICE uint32_t swizzle_columns(uint32_t channel, uint32_t chunk) {
  return channel * kRowBytes + ((chunk ^ (channel & 7)) << 4);
}

// Fragments ---------------------------------------------------------------------------------------

/// ldmatrix of four 8 x 8 matrices: lanes 8i .. 8i + 7 give the addresses of matrix i's rows.
/// A of mma.m16n8k16, rows of positions: matrices are (rows 0-7, k low), (8-15, low), (0-7, high),
/// (8-15, high).
ZIPFLS_HOST_DEVICE uint32_t a_row(uint32_t lane) { return lane & 15; }
ZIPFLS_HOST_DEVICE uint32_t a_chunk(uint32_t lane) { return lane >> 4; }
/// B, two blocks of 8 classes: (classes 0-7, k low), (0-7, high), (8-15, low), (8-15, high).
ZIPFLS_HOST_DEVICE uint32_t b_row(uint32_t lane) { return (lane & 7) + ((lane >> 4) << 3); }
ZIPFLS_HOST_DEVICE uint32_t b_chunk(uint32_t lane) { return (lane >> 3) & 1; }
/// A from rows of channels, transposed on the way: the same four matrices, addressed by channel.
ZIPFLS_HOST_DEVICE uint32_t at_channel(uint32_t lane) { return (lane & 7) + ((lane >> 4) << 3); }
ZIPFLS_HOST_DEVICE uint32_t at_chunk(uint32_t lane) { return (lane >> 3) & 1; }

/// Accumulators of mma.m16n8 and of wgmma.m64nN alike: of each 16 rows (a warp's) by 8 columns, a
/// lane has two columns of row lane / 4 and the same two of the row 8 below: x[4j + 2h + e] is
/// column 8j + 2(lane % 4) + e.
ZIPFLS_HOST_DEVICE int fragment_row(int lane, int half) { return lane / 4 + 8 * half; }
ZIPFLS_HOST_DEVICE int fragment_column(int lane) { return lane % 4 * 2; }

// Tile orders -------------------------------------------------------------------------------------

struct Tile {
  int64_t m;  // tile of rows
  int32_t n;  // tile of classes
};

/// Tile t of tiles_m * tiles_n, in groups of `group` tiles of rows: a group's rows stay in L2 while
/// the class tiles pass, and tiles next to each other in time share a class tile.
ZIPFLS_HOST_DEVICE Tile tile_at(int64_t t, int64_t tiles_m, int32_t tiles_n, int64_t group) {
  const int64_t first = t / (group * tiles_n) * group;
  const int64_t size = tiles_m - first < group ? tiles_m - first : group;
  const int64_t within = t - first * tiles_n;
  return {first + within % size, static_cast<int32_t>(within / size)};
}

// Upsampling --------------------------------------------------------------------------------------

/// x + (y - x) / 4, a quarter of the way to the neighbour: torch.lerp's arithmetic. The product is
/// exact, so contracting to a fused multiply-add changes nothing.
ZIPFLS_HOST_DEVICE float quarter_way(float x, float y) { return x + (y - x) * 0.25f; }

/// How maps are cut into tiles of at most R positions. Doubling a position takes its eight
/// neighbours: a tile holds whole maps where they fit, else a patch with a border one position
/// wide, computed again by the patches next to it.
struct Patches {
  int32_t images;          // whole maps a tile holds, 1 where maps are cut
  int32_t core_h, core_w;  // positions that a patch votes for
  int32_t down, across;    // patches of a map
};

/// One tile: `images` maps from n0 on, their positions from (h0, w0), h by w of them; votes for
/// those from (core_h0, core_w0) up to, not including, (core_h1, core_w1).
struct Patch {
  int64_t n0;
  int32_t images, h0, w0, h, w, core_h0, core_w0, core_h1, core_w1;
};

ZIPFLS_HOST_DEVICE Patch patch_at(const Patches& cut, int64_t tile, int64_t N, int32_t H,
                                  int32_t W) {
  const int32_t per_map = cut.down * cut.across;
  const int32_t within = static_cast<int32_t>(tile % per_map);
  Patch patch;
  patch.n0 = tile / per_map * cut.images;
  patch.images = static_cast<int32_t>(N - patch.n0 < cut.images ? N - patch.n0 : cut.images);
  patch.core_h0 = within / cut.across * cut.core_h;
  patch.core_w0 = within % cut.across * cut.core_w;
  patch.core_h1 = patch.core_h0 + cut.core_h < H ? patch.core_h0 + cut.core_h : H;
  patch.core_w1 = patch.core_w0 + cut.core_w < W ? patch.core_w0 + cut.core_w : W;
  patch.h0 = patch.core_h0 > 0 ? patch.core_h0 - 1 : 0;
  patch.w0 = patch.core_w0 > 0 ? patch.core_w0 - 1 : 0;
  patch.h = (patch.core_h1 < H ? patch.core_h1 + 1 : H) - patch.h0;
  patch.w = (patch.core_w1 < W ? patch.core_w1 + 1 : W) - patch.w0;
  return patch;
}

/// Position that row r of a tile holds; n = -1 for a row past the last.
struct Position {
  int64_t n;
  int32_t h, w;
};

ZIPFLS_HOST_DEVICE Position position_at(const Patch& patch, int32_t r) {
  const int32_t per_map = patch.h * patch.w, image = r / per_map, within = r % per_map;
  if (image >= patch.images) return {-1, 0, 0};
  return {patch.n0 + image, patch.h0 + within / patch.w, patch.w0 + within % patch.w};
}

ZIPFLS_HOST_DEVICE bool in_core(const Patch& patch, const Position& at) {
  return at.n >= 0 && at.h >= patch.core_h0 && at.h < patch.core_h1 && at.w >= patch.core_w0 &&
         at.w < patch.core_w1;
}

/// Row of the tile that holds the neighbour (dh, dw) of row r's position; the position itself past
/// an edge.
ZIPFLS_HOST_DEVICE int32_t neighbour(const Patch& patch, const Position& at, int32_t r, int32_t dh,
                                     int32_t dw, int32_t H, int32_t W) {
  const int32_t h = at.h + dh < 0 || at.h + dh >= H ? at.h : at.h + dh;
  const int32_t w = at.w + dw < 0 || at.w + dw >= W ? at.w : at.w + dw;
  return r + (h - at.h) * patch.w + (w - at.w);
}

/// Index of the vote in quarter (dy, dx) of a position.
ZIPFLS_HOST_DEVICE int64_t upsampled_index(const Position& at, int32_t H, int32_t W, int32_t dy,
                                           int32_t dx) {
  return (at.n * 2 * H + 2 * at.h + dy) * 2 * W + 2 * at.w + dx;
}

}  // namespace vote
}  // namespace zipfls::cuda
