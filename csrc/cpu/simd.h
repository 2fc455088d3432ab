// Vectors of one instruction set: lanes, loads and stores of the four float types, exp.
//
// Written in the compilers' vector extensions, so one source serves every instruction set: the
// translation unit that includes this file says which one (see kernels_avx2.cpp) through
//   ZIPFLS_ISA           name of the set; everything here lives in the namespace of that name, so
//   that no
//                        function compiled for a wide set can be picked by the linker for a narrow
//                        one;
//   ZIPFLS_VECTOR_BYTES  bytes of a vector.
// For the same reason nothing here uses the standard library: an inline std:: function that one of
// these files happened to instantiate would be shared with the whole program.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#if defined(ZIPFLS_AVX2) || defined(ZIPFLS_AVX512)
#include <immintrin.h>
#endif

#include "kernels.h"

#define ZIPFLS_INLINE inline __attribute__((always_inline))

namespace zipfls::ZIPFLS_ISA {

using namespace zipfls::cpu;

template <class A>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int W = ZIPFLS_VECTOR_BYTES / 4;
  typedef float V __attribute__((vector_size(ZIPFLS_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(ZIPFLS_VECTOR_BYTES)));  // also masks: 0 or -1
  typedef uint32_t U __attribute__((vector_size(ZIPFLS_VECTOR_BYTES)));
  typedef uint16_t H __attribute__((vector_size(ZIPFLS_VECTOR_BYTES / 2)));  // 16-bit floats
};

template <>
struct Lanes<double> {
  static constexpr int W = ZIPFLS_VECTOR_BYTES / 8;
  typedef double V __attribute__((vector_size(ZIPFLS_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(ZIPFLS_VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(ZIPFLS_VECTOR_BYTES)));
};

template <class A>
using Vec = typename Lanes<A>::V;
template <class A>
using Mask = typename Lanes<A>::I;

/// The float type whose vectors have as many lanes as those of the integer type V.
template <class V>
using FloatOf = std::conditional_t<sizeof(V) == 4, float, double>;

template <class To, class From>
ZIPFLS_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

template <class A>
ZIPFLS_INLINE Vec<A> splat(A x) {
  return x - Vec<A>{};  // x - 0, not 0 + x: keeps the sign of -0
}

/// first, first + 1, ...: the indices of a vector's lanes.
template <class A>
ZIPFLS_INLINE Mask<A> iota(int64_t first) {
  using Int = decltype(Mask<A>{}[0] + 0);
  Mask<A> lane;
  for (int w = 0; w < Lanes<A>::W; w++) lane[w] = w;
  return lane + static_cast<Int>(first);
}

/// The lanes that a mask marks, lane w as bit w.
template <class A>
ZIPFLS_INLINE uint32_t bits(Mask<A> mask) {
#if defined(ZIPFLS_AVX512)
  if constexpr (sizeof(A) == 4) return _mm512_movepi32_mask(bit_cast<__m512i>(mask));
  return _mm512_movepi64_mask(bit_cast<__m512i>(mask));
#elif defined(ZIPFLS_AVX2)
  if constexpr (sizeof(A) == 4) return _mm256_movemask_ps(bit_cast<__m256>(mask));
  return _mm256_movemask_pd(bit_cast<__m256d>(mask));
#else
  uint32_t joined = 0;
  for (int w = 0; w < Lanes<A>::W; w++) joined |= mask[w] != 0 ? 1u << w : 0;
  return joined;
#endif
}

template <class A>
ZIPFLS_INLINE bool any(Mask<A> mask) {
#if defined(ZIPFLS_AVX512) || defined(ZIPFLS_AVX2)
  return bits<A>(mask) != 0;
#else
  uint64_t word[sizeof(Mask<A>) / 8], joined = 0;
  __builtin_memcpy(word, &mask, sizeof mask);
  for (uint64_t w : word) joined |= w;
  return joined != 0;
#endif
}

/// How many lanes of x equal n.
ZIPFLS_INLINE int32_t count_equal(Mask<float> x, int32_t n) {
#if defined(ZIPFLS_AVX512)
  return __builtin_popcount(_mm512_cmpeq_epi32_mask(bit_cast<__m512i>(x), _mm512_set1_epi32(n)));
#elif defined(ZIPFLS_AVX2)
  return __builtin_popcount(_mm256_movemask_ps(bit_cast<__m256>(x == n)));
#else
  const Mask<float> equal = x == n;
  int32_t lanes = 0;
  for (int w = 0; w < Lanes<float>::W; w++) lanes -= equal[w];
  return lanes;
#endif
}

/// The larger of each lane; a NaN in x is ignored.
template <class V>
ZIPFLS_INLINE V max_ignoring_nan(V best, V x) {
  return x > best ? x : best;
}

template <class A, int kBytes>
struct Half {
  typedef A V __attribute__((vector_size(kBytes)));
};

/// The lanes of x joined into one value, half with half.
template <class A, int kBytes = ZIPFLS_VECTOR_BYTES, class V, class Join>
ZIPFLS_INLINE A reduce(V x, Join join) {
  if constexpr (kBytes == sizeof(A)) {
    return x[0];
  } else if constexpr (kBytes == 2 * sizeof(A)) {
    return join(x[0], x[1]);
  } else {
    typename Half<A, kBytes / 2>::V half[2];
    __builtin_memcpy(&half, &x, sizeof x);
    return reduce<A, kBytes / 2>(join(half[0], half[1]), join);
  }
}

template <class A>
ZIPFLS_INLINE A reduce_max(Vec<A> x) {
  return reduce<A>(x, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

/// Sum of the lanes.
template <class A>
ZIPFLS_INLINE A reduce_add(Vec<A> x) {
  return reduce<A>(x, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

// Conversions of 16-bit floats
// ----------------------------------------------------------------------

using F = Lanes<float>;

ZIPFLS_INLINE F::V float_from_bf16(F::H h) {
#if defined(ZIPFLS_AVX512)  // GCC widens half by half
  return bit_cast<F::V>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bit_cast<__m256i>(h)), 16));
#else
  return bit_cast<F::V>(__builtin_convertvector(h, F::U) << 16);
#endif
}

/// Rounds to nearest, ties to even; NaN stays NaN.
ZIPFLS_INLINE F::H bf16_from_float(F::V x) {
  const F::U bits = bit_cast<F::U>(x);
  F::U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = x != x ? F::U{} + 0x7fc0 : rounded;
  return __builtin_convertvector(rounded, F::H);
}

#if defined(ZIPFLS_AVX512)
ZIPFLS_INLINE F::V float_from_f16(F::H h) {
  return _mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(h));
}
ZIPFLS_INLINE F::H f16_from_float(F::V x) {
  return bit_cast<F::H>(
      _mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(ZIPFLS_AVX2)
ZIPFLS_INLINE F::V float_from_f16(F::H h) { return _mm256_cvtph_ps(bit_cast<__m128i>(h)); }
ZIPFLS_INLINE F::H f16_from_float(F::V x) {
  return bit_cast<F::H>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
ZIPFLS_INLINE F::V float_from_f16(F::H h) {
  const F::U half = __builtin_convertvector(h, F::U);
  const F::U exponent = (half >> 10) & 31, magnitude = (half & 0x7fff) << 13;
  // The exponent's bias grows by 112; infinity and NaN must reach the top exponent: 112 more.
  const F::U normal = magnitude + (112u << 23) + (exponent == 31 ? F::U{} + (112u << 23) : F::U{});
  // A subnormal is 2^-14 (0x38800000) times a fraction without its leading one: put it there, take
  // it off.
  const F::V subnormal = bit_cast<F::V>(magnitude | 0x38800000u) - bit_cast<float>(0x38800000u);
  const F::U value = exponent == 0 ? bit_cast<F::U>(subnormal) : normal;
  return bit_cast<F::V>(value | (half >> 15) << 31);
}
ZIPFLS_INLINE F::H f16_from_float(F::V x) {
  const F::U bits = bit_cast<F::U>(x), magnitude = bits & 0x7fffffff;
  // Normal: lower the exponent's bias by 112 and round 13 bits off, to nearest, ties to even.
  // Rounding carries into the exponent, at the top into infinity.
  const F::U normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal: 0.5 has steps of 2^-24 above it, as a float16 near zero, so adding it rounds.
  const F::U subnormal = bit_cast<F::U>(bit_cast<F::V>(magnitude) + 0.5f) - 0x3f000000u;
  F::U value = magnitude < 0x38800000u ? subnormal : normal;
  value = magnitude >= 0x47800000u ? F::U{} + 0x7c00 : value;  // 65536 and above, infinity
  value = magnitude > 0x7f800000u ? F::U{} + 0x7e00 : value;   // NaN
  return __builtin_convertvector(value | (bits >> 16 & 0x8000), F::H);
}
#endif

// Loads and stores of one vector, any alignment
// ------------------------------------------------------

template <class A>
ZIPFLS_INLINE Vec<A> load(const A* p) {
  Vec<A> x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
ZIPFLS_INLINE F::V load(const bfloat16* p) {
  F::H h;
  __builtin_memcpy(&h, p, sizeof h);
  return float_from_bf16(h);
}
ZIPFLS_INLINE F::V load(const float16* p) {
  F::H h;
  __builtin_memcpy(&h, p, sizeof h);
  return float_from_f16(h);
}

/// W of the integers whose vectors have the lanes of A.
template <class A, class V>
ZIPFLS_INLINE Mask<A> load_integers(const V* p) {
  static_assert(sizeof(V) == sizeof(A));
  Mask<A> x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <class A, class V>
ZIPFLS_INLINE void store_integers(V* p, Mask<A> x) {
  static_assert(sizeof(V) == sizeof(A));
  __builtin_memcpy(p, &x, sizeof x);
}

ZIPFLS_INLINE void store(float* p, Vec<float> x) { __builtin_memcpy(p, &x, sizeof x); }
ZIPFLS_INLINE void store(double* p, Vec<double> x) { __builtin_memcpy(p, &x, sizeof x); }
ZIPFLS_INLINE void store(bfloat16* p, F::V x) {
  const F::H h = bf16_from_float(x);
  __builtin_memcpy(p, &h, sizeof h);
}
ZIPFLS_INLINE void store(float16* p, F::V x) {
  const F::H h = f16_from_float(x);
  __builtin_memcpy(p, &h, sizeof h);
}

/// One value in the arithmetic's type.
ZIPFLS_INLINE float value(float x) { return x; }
ZIPFLS_INLINE double value(double x) { return x; }
ZIPFLS_INLINE float value(bfloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
ZIPFLS_INLINE float value(float16 x) { return float_from_f16(F::H{} + x.bits)[0]; }

/// One value in the type of a tensor.
ZIPFLS_INLINE void put(float* p, float x) { *p = x; }
ZIPFLS_INLINE void put(double* p, double x) { *p = x; }
ZIPFLS_INLINE void put(bfloat16* p, float x) { p->bits = bf16_from_float(splat<float>(x))[0]; }
ZIPFLS_INLINE void put(float16* p, float x) { p->bits = f16_from_float(splat<float>(x))[0]; }

// exp
// -------------------------------------------------------------------------------------------------

/// e^x for x up to about 80, within 1 ulp; e^0 = 1, NaN stays NaN.
///
/// x = n log 2 + r with |r| <= log(2) / 2, e^x = 2^n e^r, and e^r is a polynomial with the least
/// largest relative error (0.05 x 2^-24; in double 0.03 x 2^-53), its first two coefficients held
/// at 1. log 2 is split in a head, whose product with n is exact, and a tail.
///
/// Below the smallest normal number the result is 0, unless kGradual asks for subnormals: a vector
/// with one of them costs a processor about 190 cycles instead of 5. -inf is fast either way:
/// masked classes are common.
template <bool kGradual = false>
ZIPFLS_INLINE Vec<float> exp_lanes(Vec<float> x) {
  using V = Vec<float>;
  using U = Lanes<float>::U;
  constexpr float kLowest = kGradual ? -103.98f : -87.33f;  // log 2^-150, log 2^-126 and a little
  constexpr float kShift = 0x1.8p23f;  // adding it rounds to an integer, in the low bits
  const auto underflows = x < kLowest;
  x = underflows ? V{} : x;
  const V shifted = x * 1.44269504f + kShift, n = shifted - kShift;
  const V r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  V y = r * 0.00138145402f + 0.00836874511f;
  y = y * r + 0.0416683908f;
  y = y * r + 0.166665204f;
  y = y * r + 0.499999934f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const U bits = bit_cast<U>(shifted);  // n in the low bits, which the shift to the exponent keeps
  if constexpr (kGradual) {             // 2^n is no normal number: two factors
    y *= bit_cast<V>((bits << 23) + ((127u + 60u) << 23));
    return underflows ? V{} : y * 0x1p-60f;
  }
  return underflows ? V{} : y * bit_cast<V>((bits << 23) + (127u << 23));
}

template <bool kGradual = false>
ZIPFLS_INLINE Vec<double> exp_lanes(Vec<double> x) {
  using V = Vec<double>;
  using U = Lanes<double>::U;
  constexpr double kLowest = kGradual ? -745.14 : -708.39;  // log 2^-1075, log 2^-1022 and a little
  constexpr double kShift = 0x1.8p52;
  const auto underflows = x < kLowest;
  x = underflows ? V{} : x;
  const V shifted = x * 1.4426950408889634 + kShift, n = shifted - kShift;
  const V r = (x - n * 0x1.62e42fefa3p-1) - n * 0x1.3de6af278ece6p-42;
  V y = r * 2.5000018853083341953e-8 + 2.7630306255647857359e-7;
  y = y * r + 2.7557586803847070697e-6;
  y = y * r + 2.4801492949617070769e-5;
  y = y * r + 1.9841269505773806997e-4;
  y = y * r + 1.3888888943759984011e-3;
  y = y * r + 8.333333333494977261e-3;
  y = y * r + 4.1666666666529728134e-2;
  y = y * r + 0.16666666666666411508;
  y = y * r + 0.50000000000000106688;
  y = y * r + 1.0;
  y = y * r + 1.0;
  const U bits = bit_cast<U>(shifted);
  if constexpr (kGradual) {
    y *= bit_cast<V>((bits << 52) + ((uint64_t{1023} + 60) << 52));
    return underflows ? V{} : y * 0x1p-60;
  }
  return underflows ? V{} : y * bit_cast<V>((bits << 52) + (uint64_t{1023} << 52));
}

}  // namespace zipfls::ZIPFLS_ISA
