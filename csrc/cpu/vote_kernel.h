// argmax of score tiles: what follows the matrix product of the dense votes.
//
// A tile holds the scores of some positions for Q classes from `first_class` on; it is read once, from the
// cache where the product left it. Each position keeps a running pair (best score, its class), so that tiles
// over classes can follow each other, and no more than a tile of scores exists at any time.
//
// Ties go to the lowest class, NaN never wins, -inf may: index -1 says that no score but NaN was seen.
#pragma once

#include "simd.h"

namespace zipfls::ZIPFLS_ISA {

/// Folds the scores of one position into its pair. score(offset) gives a vector, score_at(q) one of them.
template <class A, class Score, class ScoreAt>
ZIPFLS_INLINE void fold_position(int64_t Q, int64_t first_class, Score score, ScoreAt score_at, A& best,
                                 int32_t& index) {
  using V = Vec<A>;
  using I = Mask<A>;
  constexpr int W = Lanes<A>::W;
  constexpr A kLowest = -static_cast<A>(INFINITY);
  // Lanes start with the position's own pair: only a larger score replaces it, so the lowest class stays.
  V top = splat<A>(index < 0 ? kLowest : best);
  I where = I{} - 1, here = iota<A>(0);
  int64_t q = 0;
  for (; q + W <= Q; q += W, here += W) {
    const V x = score(q);
    const I larger = x > top;
    top = larger ? x : top;
    where = larger ? here : where;
  }
  A found = index < 0 ? kLowest : best;
  int64_t at = -1;
  for (int w = 0; w < W; w++) {
    if (where[w] < 0) continue;
    if (top[w] > found || (top[w] == found && at >= 0 && where[w] < at)) {
      found = top[w];
      at = where[w];
    }
  }
  for (; q < Q; q++) {
    const A x = score_at(q);
    if (x > found) {
      found = x;
      at = q;
    }
  }
  if (at < 0 && index < 0)  // nothing above -inf so far: does a -inf stand here?
    for (q = 0; q < Q && at < 0; q++)
      if (score_at(q) == kLowest) at = q;
  if (at < 0) return;
  best = found;
  index = static_cast<int32_t>(first_class + at);
}

/// scores (rows, Q), bias (Q,) or null; folds into best (rows,) and index (rows,).
template <class A>
void argmax_kernel(const void* scores, int64_t rows, int64_t Q, int64_t first_class, const void* bias_, void* best,
                   int32_t* index) {
  const A* const bias = static_cast<const A*>(bias_);
  for (int64_t r = 0; r < rows; r++) {
    const A* const row = static_cast<const A*>(scores) + r * Q;  // (Q,) A
    A& row_best = static_cast<A*>(best)[r];
    if (bias == nullptr)
      fold_position<A>(
          Q, first_class, [&](int64_t q) __attribute__((always_inline)) { return load(row + q); },
          [&](int64_t q) __attribute__((always_inline)) { return row[q]; }, row_best, index[r]);
    else
      fold_position<A>(
          Q, first_class, [&](int64_t q) __attribute__((always_inline)) { return load(row + q) + load(bias + q); },
          [&](int64_t q) __attribute__((always_inline)) { return row[q] + bias[q]; }, row_best, index[r]);
  }
}

/// x + (y - x) / 4, a quarter of the way to the neighbour.
template <class V>
ZIPFLS_INLINE V quarter_way(V x, V y) {
  return x + (y - x) * 0.25f;
}

/// scores (H, W, Q) of one image, folded into best (2H, 2W) and index (2H, 2W): bilinear,
/// align_corners=False, so that a doubled position lies a quarter of the way to a neighbour in each
/// direction; at the edges it is its own neighbour. Rows first, then columns; the bias after both.
///
/// Args:
///   line: (W, Q) A, scratch for a row of the map at doubled height.
template <class A>
void argmax_upsampled_kernel(const void* scores_, int64_t H, int64_t W, int64_t Q, int64_t first_class,
                             const void* bias_, void* line_, void* best, int32_t* index) {
  constexpr int kLanes = Lanes<A>::W;
  const A* const scores = static_cast<const A*>(scores_);
  const A* const bias = static_cast<const A*>(bias_);
  A* const line = static_cast<A*>(line_);
  for (int64_t h = 0; h < 2 * H; h++) {
    const int64_t near = h / 2, other = h % 2 == 0 ? near - 1 : near + 1;
    const A* const from = scores + near * W * Q;                                     // (W, Q) A
    const A* const to = scores + (other < 0 || other >= H ? near : other) * W * Q;  // (W, Q) A
    int64_t k = 0;
    for (; k + kLanes <= W * Q; k += kLanes) store(line + k, quarter_way(load(from + k), load(to + k)));
    for (; k < W * Q; k++) line[k] = quarter_way(from[k], to[k]);
    for (int64_t w = 0; w < 2 * W; w++) {
      const int64_t left = w / 2, next = w % 2 == 0 ? left - 1 : left + 1;
      const A* const x = line + left * Q;                                      // (Q,) A
      const A* const y = line + (next < 0 || next >= W ? left : next) * Q;  // (Q,) A
      const int64_t p = h * 2 * W + w;
      fold_position<A>(
          Q, first_class,
          [&](int64_t q) __attribute__((always_inline)) {
            const Vec<A> score = quarter_way(load(x + q), load(y + q));
            return bias == nullptr ? score : score + load(bias + q);
          },
          [&](int64_t q) __attribute__((always_inline)) {
            const A score = quarter_way(x[q], y[q]);
            return bias == nullptr ? score : score + bias[q];
          },
          static_cast<A*>(best)[p], index[p]);
    }
  }
}

}  // namespace zipfls::ZIPFLS_ISA
