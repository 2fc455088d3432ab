// CUDA for a C++ compiler: enough of the language, of the runtime and of PTX for csrc/cuda/*.cu to
// run on the CPU, unchanged. ptx.cuh includes it where the compiler is not nvcc; the headers of the
// CUDA toolkit beside it include it too.
//
// Every CUDA thread is a fiber; barriers, shuffles and votes of a warp switch fibers (sim.cpp).
// Blocks run one after another, those of a cluster together. Arithmetic is the CPU's: the same IEEE
// operations, another libm.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "sim.h"

#define ZIPFLS_DEVICE inline
#define ZIPFLS_KERNEL(...) inline void
#define ZIPFLS_DYNAMIC_SHARED(name, alignment) unsigned char* const name = sim::shared_memory()
#define ZIPFLS_SHARED(type, name) \
  auto& name = *static_cast<type*>(sim::static_shared(static_cast<uint32_t>(sizeof(type))))
#define __grid_constant__
#define __CUDA_ARCH_FEAT_SM90_ALL
#define ZIPFLS_RED_ZONE 32
#define ZIPFLS_GUARD(at, bytes) sim::guard(at, bytes)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

extern struct SimIndex {
  uint32_t x;
} threadIdx, blockIdx, blockDim, gridDim;

namespace sim {

template <class To, class From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float to_float(bfloat16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }
inline void from_float(float x, bfloat16* to) {
  const uint32_t u = bits_as<uint32_t>(x);
  to->bits = static_cast<uint16_t>(x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float to_float(float16 x) {
  const uint32_t sign = uint32_t{x.bits} >> 15 << 31, exponent = x.bits >> 10 & 31,
                 fraction = x.bits & 1023;
  if (exponent == 31) return bits_as<float>(sign | 0x7f800000u | fraction << 13);
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                   : bits_as<float>((exponent + 112) << 23 | fraction << 13);
  return sign != 0 ? -size : size;
}
inline void from_float(float x, float16* to) {
  const uint16_t sign = static_cast<uint16_t>(bits_as<uint32_t>(x) >> 31 << 15);
  const float size = std::fabs(x);
  uint32_t bits;
  if (x != x) {
    bits = 0x7fff;
  } else if (size >= 65520.0f) {
    bits = 0x7c00;
  } else if (size <
             6.103515625e-5f) {  // subnormal: steps of 2^-24, ties to even as nearbyint rounds
    bits = static_cast<uint32_t>(std::nearbyint(size * 16777216.0f));
  } else {
    const uint32_t u = bits_as<uint32_t>(size);
    bits = ((u + 0xfff + (u >> 13 & 1)) >> 13) - (112u << 10);
  }
  to->bits = static_cast<uint16_t>(sign | bits);
}
template <class T>
float2 to_float2(uint32_t two, T) {
  T low, high;
  low.bits = static_cast<uint16_t>(two);
  high.bits = static_cast<uint16_t>(two >> 16);
  return {to_float(low), to_float(high)};
}
template <class T>
uint32_t from_float2(float low, float high, T) {
  T a, b;
  from_float(low, &a);
  from_float(high, &b);
  return a.bits | uint32_t{b.bits} << 16;
}
template <class T>
uint32_t larger2(uint32_t a, uint32_t b, T type) {
  const float2 x = to_float2(a, type), y = to_float2(b, type);
  return from_float2(std::fmax(x.x, y.x), std::fmax(x.y, y.y), type);
}
}  // namespace sim

inline void __syncthreads(int line = __builtin_LINE()) {
  sim::meet(sim::kOfBlock, "__syncthreads", line, nullptr, [](void**) {});
}
inline int __syncthreads_or(int x, int line = __builtin_LINE()) {
  sim::meet(sim::kOfBlock, "__syncthreads_or", line, &x, [](void** threads) {
    int any = 0;
    for (uint32_t t = 0; t < blockDim.x; t++) any |= *static_cast<int*>(threads[t]);
    for (uint32_t t = 0; t < blockDim.x; t++) *static_cast<int*>(threads[t]) = any;
  });
  return x;
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, int line = __builtin_LINE()) {
  if (mask != 0xffffffffu) sim::fail("__syncwarp of a part of a warp");
  sim::Thread* self = &sim::thread();
  sim::meet(sim::kOfWarp, "__syncwarp", line, self, [](void** lanes) {
    auto& ordered = sim::block().stores[sim::thread().index / 32];
    for (int lane = 0; lane < 32; lane++) {
      auto& stores = static_cast<sim::Thread*>(lanes[lane])->stores;
      ordered.insert(ordered.end(), stores.begin(), stores.end());
      stores.clear();
    }
  });
}
inline uint32_t __ballot_sync(uint32_t mask, bool x, int line = __builtin_LINE()) {
  if (mask != 0xffffffffu) sim::fail("__ballot_sync of a part of a warp");
  uint32_t bits = x;
  sim::meet(sim::kOfWarp, "__ballot_sync", line, &bits, [](void** lanes) {
    uint32_t all = 0;
    for (int lane = 0; lane < 32; lane++) all |= *static_cast<uint32_t*>(lanes[lane]) << lane;
    for (int lane = 0; lane < 32; lane++) *static_cast<uint32_t*>(lanes[lane]) = all;
  });
  return bits;
}
namespace sim {
template <class X>
X shuffle(uint32_t mask, X x, uint32_t from, const char* what, int line) {
  if (mask != 0xffffffffu || from >= 32) fail("a shuffle of a part of a warp");
  struct Call {
    X in, out;
    uint32_t from;
  } call = {x, x, from};
  meet(kOfWarp, what, line, &call, [](void** lanes) {
    for (int lane = 0; lane < 32; lane++) {
      Call& mine = *static_cast<Call*>(lanes[lane]);
      mine.out = static_cast<Call*>(lanes[mine.from])->in;
    }
  });
  return call.out;
}
}  // namespace sim
template <class X>
X __shfl_xor_sync(uint32_t mask, X x, int lane_mask, int line = __builtin_LINE()) {
  return sim::shuffle(mask, x, (threadIdx.x % 32) ^ static_cast<uint32_t>(lane_mask),
                      "__shfl_xor_sync", line);
}
template <class X>
X __shfl_sync(uint32_t mask, X x, int lane, int line = __builtin_LINE()) {
  return sim::shuffle(mask, x, static_cast<uint32_t>(lane), "__shfl_sync", line);
}
inline int32_t __reduce_add_sync(uint32_t mask, int32_t x, int line = __builtin_LINE()) {
  for (int offset = 16; offset > 0; offset /= 2)
    x += sim::shuffle(mask, x, (threadIdx.x % 32) ^ static_cast<uint32_t>(offset),
                      "__reduce_add_sync", line);
  return x;
}
inline int32_t atomicAdd(int32_t* at, int32_t x) { return sim::atomic_add(at, x); }
inline uint32_t atomicAdd(uint32_t* at, uint32_t x) {
  return static_cast<uint32_t>(
      sim::atomic_add(reinterpret_cast<int32_t*>(at), static_cast<int32_t>(x)));
}
inline int32_t atomicCAS(int32_t* at, int32_t expected, int32_t x) {
  return sim::atomic_cas(at, expected, x);
}
inline void __threadfence() {}

inline uint4 __ldcs(const uint4* at) { return *at; }
inline uint4 __ldcg(const uint4* at) { return *at; }
inline double __ldcg(const double* at) { return sim::read_published(at); }
inline void __stcg(uint4* at, uint4 x) { *at = x; }
inline float __uint_as_float(uint32_t x) { return sim::bits_as<float>(x); }
inline uint32_t __float_as_uint(float x) { return sim::bits_as<uint32_t>(x); }
inline double __hiloint2double(int high, int low) {
  return sim::bits_as<double>(uint64_t{static_cast<uint32_t>(high)} << 32 |
                              static_cast<uint32_t>(low));
}
inline int __double2loint(double x) { return static_cast<int>(sim::bits_as<uint64_t>(x)); }
inline int __double2hiint(double x) { return static_cast<int>(sim::bits_as<uint64_t>(x) >> 32); }

#include "ptx_on_cpu.h"
#include "runtime_on_cpu.h"
