// Parts of the loss and label kernels: element types, 16-byte vectors, reductions, the threads of a
// row, shared-memory allocation. Kernels contain no launch syntax and no PTX.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#define ZIPFLS_ISA cuda  // the namespace that label.h's functions are compiled in
#include "../label.h"

#include "ptx.cuh"
#include "args.h"

namespace zipfls::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

// Elements ----------------------------------------------------------------------------------------

#ifdef __CUDACC__
using bfloat16 = __nv_bfloat16;
using float16 = __half;

ZIPFLS_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }
ZIPFLS_DEVICE float to_float(float16 x) { return __half2float(x); }
ZIPFLS_DEVICE void from_float(float x, bfloat16* to) { *to = __float2bfloat16_rn(x); }
ZIPFLS_DEVICE void from_float(float x, float16* to) { *to = __float2half_rn(x); }

ZIPFLS_DEVICE float2 to_float2(uint32_t two, bfloat16) {
  return {__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u)};
}
ZIPFLS_DEVICE float2 to_float2(uint32_t two, float16) {
  return __half22float2(*reinterpret_cast<const __half2*>(&two));
}
ZIPFLS_DEVICE uint32_t from_float2(float low, float high, bfloat16) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}
ZIPFLS_DEVICE uint32_t from_float2(float low, float high, float16) {
  const __half2 two = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}

/// The larger of each of two packed numbers; NaN is ignored.
ZIPFLS_DEVICE uint32_t larger2(uint32_t a, uint32_t b, bfloat16) {
  const __nv_bfloat162 two = __hmax2(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                     *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&two);
}
ZIPFLS_DEVICE uint32_t larger2(uint32_t a, uint32_t b, float16) {
  const __half2 two =
      __hmax2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&two);
}

#else
using sim::bfloat16;
using sim::float16;
using sim::from_float;
using sim::from_float2;
using sim::larger2;
using sim::to_float;
using sim::to_float2;
#endif

ZIPFLS_DEVICE float to_float(float x) { return x; }
ZIPFLS_DEVICE double to_float(double x) { return x; }
ZIPFLS_DEVICE void from_float(float x, float* to) { *to = x; }
ZIPFLS_DEVICE void from_float(double x, double* to) { *to = x; }

template <class T>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
/// The type that arithmetic on T uses.
template <class T>
using Arithmetic = typename ArithmeticOf<T>::type;

template <class A>
ZIPFLS_DEVICE A infinity() {
  return static_cast<A>(INFINITY);
}
template <class A>
ZIPFLS_DEVICE A not_a_number() {
  return static_cast<A>(NAN);
}

// <cmath> by type: float arguments never become double.
ZIPFLS_DEVICE float larger(float a, float b) { return ::fmaxf(a, b); }  // NaN is ignored
ZIPFLS_DEVICE double larger(double a, double b) { return ::fmax(a, b); }
ZIPFLS_DEVICE float exp_of(float x) { return ::expf(x); }
ZIPFLS_DEVICE double exp_of(double x) { return ::exp(x); }
ZIPFLS_DEVICE float log_of(float x) { return ::logf(x); }
ZIPFLS_DEVICE double log_of(double x) { return ::log(x); }
ZIPFLS_DEVICE float log1p_of(float x) { return ::log1pf(x); }
ZIPFLS_DEVICE double log1p_of(double x) { return ::log1p(x); }

/// a b + c, rounded once.
ZIPFLS_DEVICE float fused(float a, float b, float c) { return ::fmaf(a, b, c); }
ZIPFLS_DEVICE double fused(double a, double b, double c) { return ::fma(a, b, c); }
/// log(x) of a sum that is 0 or not much below 1. float: two instructions, absolute error below
/// 2e-7 where x < 2.
ZIPFLS_DEVICE float log_of_sum(float x) { return ptx::lg2_approx_ftz(x) * 0.69314718055994530942f; }
ZIPFLS_DEVICE double log_of_sum(double x) { return ::log(x); }

/// exp(x), x <= 0, of an element of type T. Two instructions but for float64: the relative error is
/// 2^-22 plus |x| 2^-24, no more than the rounding of log p costs where a softmax is exp(log p).
template <class T>
ZIPFLS_DEVICE Arithmetic<T> exp_element(Arithmetic<T> x) {
  if constexpr (sizeof(T) == 8) {
    return exp_of(x);
  } else {
    return ptx::ex2_approx_ftz(x * 1.44269504088896340736f);
  }
}

/// Elements of T in 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

/// x (kVector<T>,) from 16 bytes.
template <class T>
ZIPFLS_DEVICE void unpack(uint4 raw, Arithmetic<T>* x) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(word[i]);
    } else if constexpr (sizeof(T) == 2) {
      const float2 two = to_float2(word[i], T{});
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    } else if (i < 2) {
      x[i] = __hiloint2double(static_cast<int>(word[2 * i + 1]), static_cast<int>(word[2 * i]));
    }
  }
}

/// The largest of K vectors; NaN is ignored.
template <class T, int K>
ZIPFLS_DEVICE Arithmetic<T> largest_of(const uint4 (&raw)[K]) {
  if constexpr (sizeof(T) == 2) {
    uint32_t two = raw[0].x;
#pragma unroll
    for (int k = 0; k < K; k++) {
      if (k > 0) two = larger2(two, raw[k].x, T{});
      two = larger2(two, raw[k].y, T{});
      two = larger2(two, raw[k].z, T{});
      two = larger2(two, raw[k].w, T{});
    }
    const float2 both = to_float2(two, T{});
    return larger(both.x, both.y);
  } else {
    Arithmetic<T> top = -infinity<Arithmetic<T>>();
#pragma unroll
    for (int k = 0; k < K; k++) {
      Arithmetic<T> x[kVector<T>];
      unpack<T>(raw[k], x);
#pragma unroll
      for (int v = 0; v < kVector<T>; v++) top = larger(top, x[v]);
    }
    return top;
  }
}

/// The inverse of unpack, rounding to nearest.
template <class T>
ZIPFLS_DEVICE uint4 pack(const Arithmetic<T>* x) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) {
      word[i] = __float_as_uint(x[i]);
    } else if constexpr (sizeof(T) == 2) {
      word[i] = from_float2(x[2 * i], x[2 * i + 1], T{});
    } else if (i < 2) {
      word[2 * i] = static_cast<uint32_t>(__double2loint(x[i]));
      word[2 * i + 1] = static_cast<uint32_t>(__double2hiint(x[i]));
    }
  }
  return {word[0], word[1], word[2], word[3]};
}

/// 16 bytes of -inf.
template <class T>
ZIPFLS_DEVICE uint4 absent_vector() {
  Arithmetic<T> x[kVector<T>];
#pragma unroll
  for (int v = 0; v < kVector<T>; v++) x[v] = -infinity<Arithmetic<T>>();
  return pack<T>(x);
}

// Shared memory -----------------------------------------------------------------------------------

/// Allocates arrays in one range of memory, each on a 16-byte boundary; without memory it counts
/// the bytes. The test build leaves guarded gaps between the arrays.
struct SmemAllocator {
  unsigned char* memory;
  uint32_t used = 0;  // bytes

  template <class X>
  ZIPFLS_HOST_DEVICE X* allocate(uint32_t count) {
#ifdef __CUDA_ARCH__
    X* const piece = reinterpret_cast<X*>(memory + used);
#else
    X* const piece = memory == nullptr ? nullptr : reinterpret_cast<X*>(memory + used);
#endif
    used += count * static_cast<uint32_t>(sizeof(X));
    if (memory != nullptr) ZIPFLS_GUARD(memory + used, (16 - used % 16) % 16 + ZIPFLS_RED_ZONE);
    used = (used + 15) / 16 * 16 + ZIPFLS_RED_ZONE;
    return piece;
  }
  /// On the device, keeps the offset that follows from sizes known at run time.
  ZIPFLS_HOST_DEVICE void keep() {
#ifdef __CUDA_ARCH__
    used = ptx::keep(used);
#endif
  }
};

// Rows of threads ---------------------------------------------------------------------------------

/// Reductions over each WIDTH consecutive lanes of a warp, a power of two; every lane gets the
/// result. All lanes of the warp call.
template <int WIDTH, class X>
ZIPFLS_DEVICE X warp_reduce_sum(X x) {
  if constexpr (WIDTH == kWarp && std::is_same_v<X, int32_t>) {
    return __reduce_add_sync(kAllLanes, x);
  } else {
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2)
      x += __shfl_xor_sync(kAllLanes, x, offset);
    return x;
  }
}
/// NaN is ignored.
template <int WIDTH, class X>
ZIPFLS_DEVICE X warp_reduce_max(X x) {
#pragma unroll
  for (int offset = WIDTH / 2; offset > 0; offset /= 2)
    x = larger(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

/// The threads that share one row: LANES of a warp (8, 16, 32), or with LANES = 0 the whole block.
template <int LANES>
struct RowGroup {
  static constexpr bool kWholeBlock = LANES == 0;
  /// Lanes that do a row's scalar work: all the group's, or the block's first warp.
  static constexpr int kLeaders = kWholeBlock ? kWarp : LANES;

  ZIPFLS_DEVICE static int size() { return kWholeBlock ? static_cast<int>(blockDim.x) : LANES; }
  ZIPFLS_DEVICE static int lane() {
    return static_cast<int>(kWholeBlock ? threadIdx.x : threadIdx.x % kLeaders);
  }
  ZIPFLS_DEVICE static bool leads() { return !kWholeBlock || threadIdx.x < kWarp; }
  ZIPFLS_DEVICE static int rows_per_block() {
    return kWholeBlock ? 1 : static_cast<int>(blockDim.x) / kLeaders;
  }
  ZIPFLS_DEVICE static int row_in_block() {
    return kWholeBlock ? 0 : static_cast<int>(threadIdx.x) / kLeaders;
  }

  /// Barrier of the row's threads (of the warp's, where they are fewer); orders their memory
  /// accesses.
  ZIPFLS_DEVICE static void sync() {
    if constexpr (kWholeBlock) {
      __syncthreads();
    } else {
      __syncwarp(kAllLanes);
    }
  }
  /// Whether any thread of the row says so; a barrier too.
  ZIPFLS_DEVICE static bool sync_any(bool x) {
    if constexpr (kWholeBlock) {
      return __syncthreads_or(x) != 0;
    } else {
      __syncwarp(kAllLanes);
      const uint32_t all = __ballot_sync(kAllLanes, x);
      const uint32_t mine = LANES == kWarp ? kAllLanes : (1u << (LANES % kWarp)) - 1;
      return (all >> (threadIdx.x % kWarp / kLeaders * kLeaders) & mine) != 0;
    }
  }
};

/// Maximum over the block's threads, for each of them; NaN is ignored. Ends with a barrier passed.
/// shared: (blockDim / 32,) A.
template <class A>
ZIPFLS_DEVICE A block_all_reduce_max(A x, A* shared) {
  x = warp_reduce_max<kWarp>(x);
  __syncthreads();  // shared may still be read from before
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  for (uint32_t w = 0; w < blockDim.x / kWarp; w++) x = larger(x, shared[w]);
  return x;
}

/// The same for sums, in a fixed order.
template <class A>
ZIPFLS_DEVICE A block_all_reduce_sum(A x, A* shared) {
  x = warp_reduce_sum<kWarp>(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  A total = 0;
  for (uint32_t w = 0; w < blockDim.x / kWarp; w++) total += shared[w];
  return total;
}

/// x[k] over the block's threads, for each k and each thread, in a fixed order by
/// join(A, A), which is associative and commutative but for rounding. shared: (K, blockDim / 32) A.
template <int K, class A, class Join>
ZIPFLS_DEVICE void block_all_reduce(A (&x)[K], A* shared, Join join) {
  const uint32_t warps = blockDim.x / kWarp;
#pragma unroll
  for (int k = 0; k < K; k++) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      x[k] = join(x[k], __shfl_xor_sync(kAllLanes, x[k], offset));
  }
  __syncthreads();  // shared may still be read from before
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int k = 0; k < K; k++) shared[k * warps + threadIdx.x / kWarp] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; k++) {
    x[k] = shared[k * warps];
#pragma unroll 1
    for (uint32_t w = 1; w < warps; w++) x[k] = join(x[k], shared[k * warps + w]);
  }
}

}  // namespace zipfls::cuda
