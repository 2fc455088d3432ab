// From accumulators to the best class: the epilogue of both vote kernels. No memory traffic but the
// bias's.
//
// A lane's scores of one row are first reduced to their maximum (fmax ignores NaN), in groups of
// four that keep their own maximum in place of their last score; then the groups are searched for
// it, from the last to the first, so that the lowest class stays. Per score that is one addition
// (the bias), one maximum, and a quarter of a comparison with four moves; with the bias's loads and
// the reduction across lanes 3.8 instructions in sm_90a code, none of them a branch. The rules of
// ties, NaN and minus infinity follow without a case of their own: NaN equals nothing, an all-NaN
// maximum least of all.
#pragma once

#include "vote_tiles.cuh"
#ifdef __CUDACC__
#include "vote_ptx.cuh"
#endif  // elsewhere the includer has its own ptx::

namespace zipfls::cuda::vote {

struct alignas(8) BiasPair {
  float low, high;
};

/// The two rows of a lane's fragment. x (4 * kBlocks,) accumulators, overwritten; bias (8 *
/// kBlocks,) of the tile, padded by NaN, on 8 bytes; column is the lane's first (fragment_column);
/// first_class that of the tile.
template <int kBlocks>
ZIPFLS_HOST_DEVICE void best_of_fragment(float* x, const float* bias, int column,
                                         int32_t first_class, Best (&best)[2]) {
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

/// The best of the four lanes that share a row of a fragment.
ZIPFLS_VOTE_DEVICE Best best_of_quad(Best mine) {
#pragma unroll
  for (int mask = 1; mask <= 2; mask *= 2)
    mine = better(mine, {ptx::shuffle_xor(mine.score, mask), ptx::shuffle_xor(mine.index, mask)});
  return mine;
}

/// Scores of the 3 x 3 positions around one, for one class -> those of its four quarters: rows
/// first, then columns, then the bias.
ZIPFLS_HOST_DEVICE void double_scores(const float (&s)[3][3], float bias, float (&out)[4]) {
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

/// Takes class c into a running best, classes ascending: equal scores leave the lower one in place.
ZIPFLS_HOST_DEVICE void take(Best& best, float score, int32_t c) {
  const bool wins = score > best.score || (best.index < 0 && score == best.score);
  best.score = wins ? score : best.score;
  best.index = wins ? c : best.index;
}

}  // namespace zipfls::cuda::vote
