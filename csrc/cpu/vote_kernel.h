// What goes around the matrix product of the dense votes: packing its operand, and the argmax of
// its result.
//
// A tile holds the scores of some positions for Q classes from `first_class` on; it is read once,
// from the cache where the product left it. Each position keeps a running pair (best score, its
// class), so that tiles over classes can follow each other, and no more than a tile of scores
// exists at any time.
//
// Ties go to the lowest class, NaN never wins, -inf may: class -1 says that no score but NaN was
// seen.
#pragma once

#include "simd.h"

namespace zipfls::ZIPFLS_ISA {

// Packing
// ---------------------------------------------------------------------------------------------

/// Positions as rows: to[p * D + d] = from[p * along_p + d * along_d], p < count, d < D, in the
/// type U. Blocks of 16 channels: what is written of a row at a time is one cache line (of
/// float32), and the lines that an NCHW map is read from stay in cache for the next positions.
template <class T, class U>
void pack_kernel(const void* from, int64_t along_p, int64_t along_d, int64_t count, int64_t D,
                 void* to) {
  using A = decltype(value(T{}));
  constexpr int W = Lanes<A>::W;
  constexpr int64_t kBlock = 16;
  for (int64_t d0 = 0; d0 < D; d0 += along_d == 1 ? D : kBlock) {
    const int64_t end = along_d == 1 || D - d0 < kBlock ? D : d0 + kBlock;
    for (int64_t p = 0; p < count; p++) {
      const T* const x = static_cast<const T*>(from) + p * along_p;  // (D,) T, stride along_d
      U* const y = static_cast<U*>(to) + p * D;                      // (D,) U
      int64_t d = d0;
      if (along_d == 1)
        for (; d + W <= end; d += W) store(y + d, load(x + d));
      for (; d < end; d++) put(y + d, value(x[d * along_d]));
    }
  }
}

// argmax
// ----------------------------------------------------------------------------------------------

/// Combines the scores of one position with its pair. score(offset) gives W of them; what it gives
/// beyond Q does not count.
template <class A, class Score>
ZIPFLS_INLINE void fold_position(int64_t Q, int64_t first_class, Score score, A& best,
                                 int32_t& index) {
  using V = Vec<A>;
  using I = Mask<A>;
  using Int = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  constexpr int W = Lanes<A>::W;
  constexpr A kLowest = -static_cast<A>(INFINITY);
  constexpr Int kNone = sizeof(A) == 4 ? Int{INT32_MAX} : static_cast<Int>(INT64_MAX);
  // Lanes start with the position's own score: only a larger one replaces it, so the lowest class
  // stays.
  const A before = index < 0 ? kLowest : best;
  V top = splat<A>(before);
  I where = I{} + kNone, here = iota<A>(0);
  int64_t q = 0;
  for (; q + W <= Q; q += W, here += W) {
    const V x = score(q);
    const I larger = x > top;
    top = larger ? x : top;
    where = larger ? here : where;
  }
  if (q < Q) {  // the last W scores, some of them again; or all, where there are fewer than W
    q = Q < W ? 0 : Q - W;
    here = iota<A>(q);
    const V x = score(q);
    const I larger = (x > top) & (here < static_cast<Int>(Q));
    top = larger ? x : top;
    where = larger ? here : where;
  }
  const A found = reduce_max<A>(top);
  Int at = kNone;
  if (found > before) {  // the lowest class of the lanes that hold it, nearly always one
    for (uint32_t lanes = bits<A>(top == found); lanes != 0; lanes &= lanes - 1) {
      const Int class_of_lane = where[__builtin_ctz(lanes)];
      at = class_of_lane < at ? class_of_lane : at;
    }
  } else if (index < 0) {  // nothing above -inf so far: does a -inf stand here?
    for (q = 0; q < Q && at == kNone; q += W) {
      const V x = score(q);
      for (int w = 0; w < W && q + w < Q && at == kNone; w++)
        if (x[w] == kLowest) at = static_cast<Int>(q + w);
    }
  }
  if (at == kNone) return;
  best = found;
  index = static_cast<int32_t>(first_class + at);
}

/// scores (rows, Q), bias (Q,) or null, both with W to spare behind; combined with best (rows,),
/// index (rows,).
template <class A>
void argmax_kernel(const void* scores, int64_t rows, int64_t Q, int64_t first_class,
                   const void* bias_, void* best, int32_t* index) {
  const A* const bias = static_cast<const A*>(bias_);
  for (int64_t r = 0; r < rows; r++) {
    const A* const row = static_cast<const A*>(scores) + r * Q;  // (Q,) A
    A& row_best = static_cast<A*>(best)[r];
    if (bias == nullptr)
      fold_position<A>(
          Q, first_class, [&](int64_t q) __attribute__((always_inline)) { return load(row + q); },
          row_best, index[r]);
    else
      fold_position<A>(
          Q, first_class,
          [&](int64_t q) __attribute__((always_inline)) { return load(row + q) + load(bias + q); },
          row_best, index[r]);
  }
}

/// x + (y - x) / 4, a quarter of the way to the neighbour.
template <class V>
ZIPFLS_INLINE V quarter_way(V x, V y) {
  return x + (y - x) * 0.25f;
}

/// scores (H, W, Q) of one image, combined with best (2H, 2W) and index (2H, 2W): bilinear,
/// align_corners=False, so that a doubled position lies a quarter of the way to a neighbour in each
/// direction; at the edges it is its own neighbour. Rows first, then columns; the bias after both.
/// Scores, bias and line have W lanes to spare behind.
///
/// Args:
///   line: (W, Q) A, scratch for a row of the map at doubled height.
template <class A>
void argmax_upsampled_kernel(const void* scores_, int64_t H, int64_t W, int64_t Q,
                             int64_t first_class, const void* bias_, void* line_, void* best,
                             int32_t* index) {
  constexpr int kLanes = Lanes<A>::W;
  const A* const scores = static_cast<const A*>(scores_);
  const A* const bias = static_cast<const A*>(bias_);
  A* const line = static_cast<A*>(line_);
  for (int64_t h = 0; h < 2 * H; h++) {
    const int64_t near = h / 2, other = h % 2 == 0 ? near - 1 : near + 1;
    const A* const from = scores + near * W * Q;                                    // (W, Q) A
    const A* const to = scores + (other < 0 || other >= H ? near : other) * W * Q;  // (W, Q) A
    for (int64_t k = 0; k < W * Q; k += kLanes)
      store(line + k, quarter_way(load(from + k), load(to + k)));
    for (int64_t w = 0; w < 2 * W; w++) {
      const int64_t left = w / 2, next = w % 2 == 0 ? left - 1 : left + 1;
      const A* const x = line + left * Q;                                   // (Q,) A
      const A* const y = line + (next < 0 || next >= W ? left : next) * Q;  // (Q,) A
      const int64_t p = h * 2 * W + w;
      fold_position<A>(
          Q, first_class,
          [&](int64_t q) __attribute__((always_inline)) {
            const Vec<A> score = quarter_way(load(x + q), load(y + q));
            return bias == nullptr ? score : score + load(bias + q);
          },
          static_cast<A*>(best)[p], index[p]);
    }
  }
}

// argmax of rounded scores
// ------------------------------------------------------------------------------

/// x . w over D channels, in float32.
ZIPFLS_INLINE float dot(const bfloat16* x, const bfloat16* w, int64_t D) {
  constexpr int W = Lanes<float>::W;
  F::V sum[2] = {};
  int64_t d = 0;
  for (; d + 2 * W <= D; d += 2 * W) {
    sum[0] += load(x + d) * load(w + d);
    sum[1] += load(x + d + W) * load(w + d + W);
  }
  for (; d + W <= D; d += W) sum[0] += load(x + d) * load(w + d);
  float total = reduce_add<float>(sum[0] + sum[1]);
  for (; d < D; d++) total += value(x[d]) * value(w[d]);
  return total;
}

/// Votes by float32 scores from a product that was rounded to bfloat16, the only form in which it
/// comes at full speed.
///
/// Rounding moves a score by 2^-8 of itself at most. A class whose upper bound stays below the best
/// lower bound cannot win; the few others, mostly one, are scored again in float32, and the best of
/// those wins.
///
/// Args:
///   scores: (rows, C) bfloat16, W to spare behind: rounded products, without bias.
///   features: (rows, D) bfloat16, `stride` elements from row to row; weight: (C, D) bfloat16.
///   bias: (C,) float32, W to spare behind; zeros for none.
///   index: (rows,) int32.
inline void argmax_rounded_kernel(const void* scores, int64_t rows, int64_t C, const void* features,
                                  int64_t stride, const void* weight_, int64_t D, const float* bias,
                                  int32_t* index) {
  using V = F::V;
  constexpr int W = F::W;
  constexpr float kRelative = 0x1.01p-8f;  // half a unit of bfloat16's last place, and a little
  const bfloat16* const weight = static_cast<const bfloat16*>(weight_);
  for (int64_t r = 0; r < rows; r++) {
    const bfloat16* const row = static_cast<const bfloat16*>(scores) + r * C;       // (C,)
    const bfloat16* const x = static_cast<const bfloat16*>(features) + r * stride;  // (D,)
    V lower = splat<float>(-static_cast<float>(INFINITY));
    Mask<float> infinite = {};
    for (int64_t c = 0; c < C; c += W) {
      const V product = load(row + c), magnitude = product < 0.0f ? -product : product;
      const V bound = product + load(bias + c) - magnitude * kRelative;
      Mask<float> counts = iota<float>(c) < static_cast<int32_t>(C);
      infinite |= ~(magnitude < static_cast<float>(INFINITY)) & counts;
      lower = (bound > lower) & counts ? bound : lower;
    }
    // An infinite product says nothing about how large the score is, nor does a NaN: all classes
    // are scored.
    const bool all = any<float>(infinite);
    const float threshold = all ? -static_cast<float>(INFINITY) : reduce_max<float>(lower);
    int64_t candidate = -1;  // the only one so far, not yet scored
    bool scored = false;
    float best = -static_cast<float>(INFINITY);
    int64_t winner = -1;
    auto consider = [&](int64_t c) {
      // A product of 0 is no rounding: all of them are 0 where a classifier starts from zeros.
      const float score = (value(row[c]) == 0.0f ? 0.0f : dot(x, weight + c * D, D)) + bias[c];
      if (score > best || (winner < 0 && score == best)) {
        best = score;
        winner = c;
      }
    };
    for (int64_t c = 0; c < C; c += W) {
      const V product = load(row + c), magnitude = product < 0.0f ? -product : product;
      const V bound = product + load(bias + c) + magnitude * kRelative;
      const Mask<float> stands = (bound >= threshold) | (all ? Mask<float>{} - 1 : Mask<float>{});
      if (!any<float>(stands)) continue;
      for (int w = 0; w < W && c + w < C; w++) {
        if (stands[w] == 0) continue;
        if (!scored && candidate < 0) {
          candidate = c + w;
          continue;
        }
        if (!scored) consider(candidate);
        scored = true;
        consider(c + w);
      }
    }
    if (!scored && candidate >= 0 && all)
      consider(candidate);  // a NaN does not win for want of others
    index[r] = static_cast<int32_t>(scored || all ? winner : candidate);
  }
}

}  // namespace zipfls::ZIPFLS_ISA
