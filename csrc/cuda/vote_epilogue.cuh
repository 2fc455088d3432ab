// The epilogue of both vote kernels: argmax over a tile's scores, and the combine of splits.
//
// Argmax. A thread's scores of one row are first reduced to their maximum (fmax ignores NaN), in
// groups of four that keep their own maximum in place of their last score; then the groups are
// searched for it, from the last to the first, so that the lowest class stays. Per score that is
// one addition (the bias), one maximum, and a quarter of a comparison with four moves; with the
// loads of the bias and the reduction across lanes 3.8 instructions in sm_90a code, none of them a
// branch. Ties, NaN and minus infinity need no case of their own: NaN compares equal to nothing.
//
// Combine. Where the classes of a position are split, each split stores its (score, class) pair in
// device memory, and the warp that arrives last at the tile counter of a group of positions reduces
// their pairs. Bytes moved: 8 written and 8 read per position and split, through L2; 4 written per
// position; one atomic per split and group of positions (the 16 or 32 of a warp). Pairs of
// consecutive rows are contiguous, so that a warp reads whole lines: that of split s and row r is
// at pairs[s * rows + r].
//
// Why the product's kernel combines, and neither a kernel of its own nor the loss: a launch costs
// more than the combine, which here runs beside other tiles' products; the loss would read every
// pair twice (for its label too), where few lanes of a row wait for them, and would spill. The
// dense path is two launches in all, votes and loss. (In a captured graph each also clears its
// counters: register.cpp.)
//
// Hazards
// - Pairs stored by one warp -> read by another, of any block: all lanes store, warp_sync, then
//   lane 0 counts the warp with release; the warp that reads the last count has read all before it,
//   fences, and reads from L2. No warp waits for another.
// - Counters are 0 before a launch and after it: the last arrival wraps them.
// - Which warp combines is not determined; the result is, by argmax_combine.
#pragma once

#include "ptx.cuh"
#include "vote_layout.cuh"

namespace zipfls::cuda::vote {

// Argmax ------------------------------------------------------------------------------------------

struct alignas(8) BiasPair {
  float low, high;
};

/// The pairs of the two rows of a lane's fragment. x (4 * kBlocks,) accumulators, overwritten; bias
/// (8 * kBlocks,) of the tile, padded by NaN, on 8 bytes; column is the lane's first
/// (fragment_column); first_class that of the tile.
template <int kBlocks>
ZIPFLS_HOST_DEVICE void argmax_of_fragment(float* x, const float* bias, int column,
                                           int32_t first_class, ScoreIndex (&best)[2]) {
  static_assert(kBlocks % 2 == 0, "groups of four scores span two blocks of columns");
  float top[2] = {NAN, NAN};
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int j = 0; j < kBlocks; j += 2) {
    const BiasPair b = *reinterpret_cast<const BiasPair*>(bias + 8 * j + column);
    const BiasPair b8 = *reinterpret_cast<const BiasPair*>(bias + 8 * j + 8 + column);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int half = 0; half < 2; half++) {
      float* const g = x + 4 * j + 2 * half;  // g[0], g[1], g[4], g[5]
      g[0] += b.low, g[1] += b.high, g[4] += b8.low, g[5] += b8.high;
      g[5] = ::fmaxf(::fmaxf(g[0], g[1]), ::fmaxf(g[4], g[5]));
      top[half] = ::fmaxf(top[half], g[5]);
    }
  }
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int half = 0; half < 2; half++) {
    int32_t block = -1;
    float first = 0, second = 0, third = 0;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int j = kBlocks - 2; j >= 0; j -= 2) {
      const float* const g = x + 4 * j + 2 * half;
      const bool here = g[5] == top[half];
      block = here ? 8 * j : block;
      first = here ? g[0] : first;
      second = here ? g[1] : second;
      third = here ? g[4] : third;
    }
    const int32_t within = first == top[half]    ? 0
                           : second == top[half] ? 1
                           : third == top[half]  ? 8
                                                 : 9;
    best[half] = {top[half], block < 0 ? -1 : first_class + column + block + within};
  }
}

/// argmax_combine over the four lanes that share a row of a fragment.
ZIPFLS_DEVICE ScoreIndex argmax_of_quad(ScoreIndex mine) {
#pragma unroll
  for (int mask = 1; mask <= 2; mask *= 2)
    mine = argmax_combine(mine, {ptx::shfl_xor(mine.score, mask), ptx::shfl_xor(mine.index, mask)});
  return mine;
}

/// Scores of the 3 x 3 positions around one, for one class -> those of its four quarters: rows
/// first, then columns, then the bias.
ZIPFLS_HOST_DEVICE void upsample_scores(const float (&s)[3][3], float bias, float (&out)[4]) {
  float line[2][3];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int w = 0; w < 3; w++) {
    line[0][w] = quarter_way(s[1][w], s[0][w]);
    line[1][w] = quarter_way(s[1][w], s[2][w]);
  }
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int dy = 0; dy < 2; dy++) {
    out[2 * dy] = quarter_way(line[dy][1], line[dy][0]) + bias;
    out[2 * dy + 1] = quarter_way(line[dy][1], line[dy][2]) + bias;
  }
}

/// argmax_combine with class c, classes ascending: equal scores keep the lower class.
ZIPFLS_HOST_DEVICE void argmax_update(ScoreIndex& best, float score, int32_t c) {
  const bool wins = score > best.score || (best.index < 0 && score == best.score);
  best.score = wins ? score : best.score;
  best.index = wins ? c : best.index;
}

// Combine of splits -------------------------------------------------------------------------------

/// Where the votes and the splits' pairs are stored.
struct Results {
  int32_t* votes;
  RowMap map;
  int64_t rows;             // of the product; upsampling: votes
  int32_t splits;           // of the classes; 1: votes are stored at once, what follows is unused
  ScoreIndex* pairs;        // (splits, rows)
  uint32_t* tile_counters;  // one for each group of rows
};

ZIPFLS_DEVICE void store_vote(const Results& results, int64_t row, int32_t vote) {
  const int64_t at = results.map.vote_of(row);
  if (at >= 0) results.votes[at] = vote;
}

/// Stores the pair of a row over the classes of one split.
ZIPFLS_DEVICE void store_score_index(const Results& results, int32_t split, int64_t row,
                                     ScoreIndex best) {
  if (results.splits == 1) {
    store_vote(results, row, best.index);
  } else {
    ptx::st_global_cg_8(results.pairs + split * results.rows + row, best);
  }
}

/// Counts the warp, which has stored its pairs of a group of rows. All lanes; the result is
/// arrive_is_last's argument.
ZIPFLS_DEVICE uint32_t arrive(const Results& results, int64_t group, int lane) {
  ptx::warp_sync();
  return lane == 0 ? ptx::atom_inc_release(results.tile_counters + group,
                                           static_cast<uint32_t>(results.splits) - 1)
                   : 0;
}

/// Whether all splits' pairs of the group can be read now. All lanes.
ZIPFLS_DEVICE bool arrive_is_last(const Results& results, uint32_t arrived) {
  const bool last = ptx::shfl(arrived, 0) == static_cast<uint32_t>(results.splits) - 1;
  if (last) ptx::fence_acq_rel();
  return last;
}

/// The pair of a row over splits first, first + step, ...
ZIPFLS_DEVICE ScoreIndex combine_splits(const Results& results, int64_t row, int32_t first,
                                        int32_t step) {
  ScoreIndex best = identity();
#pragma unroll 4
  for (int32_t s = first; s < results.splits; s += step)
    best = argmax_combine(best, ptx::ld_global_cg_8(results.pairs + s * results.rows + row));
  return best;
}

/// Votes of 16 rows, by a warp: two lanes a row.
ZIPFLS_DEVICE void combine_16_rows(const Results& results, int64_t first_row, int lane) {
  const int64_t row = first_row + lane % 16;
  ScoreIndex best = row < results.rows ? combine_splits(results, row, lane / 16, 2) : identity();
  best = argmax_combine(best, {ptx::shfl_xor(best.score, 16), ptx::shfl_xor(best.index, 16)});
  if (lane < 16 && row < results.rows) store_vote(results, row, best.index);
}

}  // namespace zipfls::cuda::vote
