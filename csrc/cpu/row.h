// Loops over one row of classes that leave the target out.
#pragma once

#include "simd.h"

namespace zipfls::ZIPFLS_ISA {

/// Calls span(first, last) for the runs of whole vectors without the target, elements [first,
/// last), and block(offset, keep) for the vectors that need a mask: the target's, and the last W
/// elements when C is no multiple of W, where keep marks what no other call has seen. A row shorter
/// than a vector is one masked block at 0: its buffers have room for W elements. A short row is
/// masked blocks throughout: where its target splits it is as good as random, and each mispredicted
/// end of a loop costs as much as several masks.
template <class A, class Span, class Block>
ZIPFLS_INLINE void for_nontarget(int64_t C, int64_t y, Span span, Block block) {
  constexpr int W = Lanes<A>::W;
  constexpr int64_t kShort = 8 * W;
  const int64_t whole = C / W * W, around = y / W * W;
  if (C <= kShort) {
    const Mask<A> distance =
        iota<A>(0) - static_cast<int32_t>(y);  // 0 at the target once c is added
    for (int64_t c = 0; c < whole; c += W) block(c, distance + static_cast<int32_t>(c) != 0);
  } else if (around < whole) {
    span(int64_t{0}, around);
    span(around + W, whole);
    block(around, iota<A>(around) != static_cast<int32_t>(y));
  } else {
    span(int64_t{0}, whole);
  }
  if (whole < C) {
    const int64_t offset = C < W ? 0 : C - W;
    const Mask<A> index = iota<A>(offset);
    block(offset, (index >= static_cast<int32_t>(whole)) & (index < static_cast<int32_t>(C)) &
                      (index != static_cast<int32_t>(y)));
  }
}

/// max_{c != y} of x (C,), NaN ignored; -inf where there is nothing else. Loads are of T,
/// arithmetic in A.
template <class A, class T>
ZIPFLS_INLINE A max_nontarget(const T* x, int64_t C, int64_t y) {
  using V = Vec<A>;
  constexpr int W = Lanes<A>::W;
  constexpr A kLowest = -static_cast<A>(INFINITY);
  V m0 = splat<A>(kLowest), m1 = m0, m2 = m0, m3 = m0;
  for_nontarget<A>(
      C, y,
      [&](int64_t c, int64_t last) __attribute__((always_inline)) {
        for (; c + 4 * W <= last; c += 4 * W) {
          m0 = max_ignoring_nan(m0, load(x + c));
          m1 = max_ignoring_nan(m1, load(x + c + W));
          m2 = max_ignoring_nan(m2, load(x + c + 2 * W));
          m3 = max_ignoring_nan(m3, load(x + c + 3 * W));
        }
        for (; c < last; c += W) m0 = max_ignoring_nan(m0, load(x + c));
      },
      [&](int64_t c, Mask<A> keep) __attribute__((always_inline)) {
        m0 = max_ignoring_nan(m0, keep ? load(x + c) : splat<A>(kLowest));
      });
  return reduce_max<A>(max_ignoring_nan(max_ignoring_nan(m0, m1), max_ignoring_nan(m2, m3)));
}

/// Sums of S vectors' terms over the non-target classes, in double at the end.
///
/// term(offset, x) gives one vector's terms x[0 .. S). A lane adds at most kRun vectors in A before
/// it is folded, so that rounding does not grow with C: few where one term may be far larger than
/// thousands of others.
template <class A, int S, int64_t kRun = 128, class Term>
ZIPFLS_INLINE void sum_nontarget(int64_t C, int64_t y, double (&total)[S], Term term) {
  using V = Vec<A>;
  constexpr int W = Lanes<A>::W;
  V sum[S] = {};
  int64_t room = kRun;  // vectors that sum may still add
  for (double& t : total) t = 0;
  auto span = [&](int64_t c, int64_t last) __attribute__((always_inline)) {
    while (c < last) {
      const int64_t stop = last - c < room * W ? last : c + room * W;
      room -= (stop - c) / W;
      for (; c < stop; c += W) {
        V x[S];
        term(c, x);
        for (int s = 0; s < S; s++) sum[s] += x[s];
      }
      if (room > 0) continue;
      for (int s = 0; s < S; s++) {
        total[s] += reduce_add<A>(sum[s]);
        sum[s] = V{};
      }
      room = kRun;
    }
  };
  auto block = [&](int64_t c, Mask<A> keep) __attribute__((always_inline)) {
    V x[S];
    term(c, x);
    for (int s = 0; s < S; s++) sum[s] += keep ? x[s] : V{};
  };
  for_nontarget<A>(C, y, span, block);
  for (int s = 0; s < S; s++) total[s] += reduce_add<A>(sum[s]);
}

}  // namespace zipfls::ZIPFLS_ISA
