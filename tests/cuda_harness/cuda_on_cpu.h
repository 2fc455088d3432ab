// CUDA's device side for a C++ compiler: enough of it for csrc/cuda/*.cuh to run on the CPU,
// unchanged.
//
// Every CUDA thread is a fiber; barriers, shuffles and votes of a warp switch fibers (runtime.cpp).
// Blocks run one after another, those of a cluster together. Arithmetic is the CPU's: same IEEE
// operations, another libm.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define ZIPFLS_DEVICE inline
#define ZIPFLS_KERNEL(...) inline void
#define ZIPFLS_DYNAMIC_SHARED(name) unsigned char* const name = sim::shared_memory()
#define ZIPFLS_RED_ZONE 32
#define ZIPFLS_GUARD(at, bytes) sim::guard(at, bytes)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace sim {

struct Index {
  uint32_t x;
};
extern Index thread_index, block_index, block_size, grid_size;

unsigned char* shared_memory();
void guard(void* at, uint32_t bytes);

// What a fiber waits for, in runtime.cpp. `line` tells call sites apart.
void sync_threads(int line);
bool sync_threads_or(bool x, int line);
void sync_warp(uint32_t mask, int line);
uint32_t ballot(uint32_t mask, bool x, int line);
void exchange(uint32_t mask, void* value, int bytes, int from_lane, int line);
int32_t atomic_add(int32_t* at, int32_t x);
int32_t atomic_cas(int32_t* at, int32_t expected, int32_t x);
double read_published(const double* at);

uint32_t cluster_size();
uint32_t cluster_rank();
void cluster_sync();
void* cluster_map(void* mine, uint32_t rank);

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
}  // namespace sim

#define threadIdx sim::thread_index
#define blockIdx sim::block_index
#define blockDim sim::block_size
#define gridDim sim::grid_size

inline void __syncthreads(int line = __builtin_LINE()) { sim::sync_threads(line); }
inline int __syncthreads_or(int x, int line = __builtin_LINE()) {
  return sim::sync_threads_or(x != 0, line);
}
inline void __syncwarp(uint32_t mask, int line = __builtin_LINE()) { sim::sync_warp(mask, line); }
inline uint32_t __ballot_sync(uint32_t mask, bool x, int line = __builtin_LINE()) {
  return sim::ballot(mask, x, line);
}
template <class X>
X __shfl_xor_sync(uint32_t mask, X x, int lane_mask, int line = __builtin_LINE()) {
  sim::exchange(mask, &x, sizeof x, static_cast<int>(threadIdx.x % 32) ^ lane_mask, line);
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

namespace zipfls::cuda::ptx {

// At once, the earliest that it may happen: a missing barrier shows, a missing wait does not.
inline void cp_async_16(void* to, const void* from) {
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
}
inline void cp_async_commit_group() {}
template <int kPending>
void cp_async_wait_group() {}
inline uint4 ld_global_cs_16(const void* at) { return *static_cast<const uint4*>(at); }
inline uint4 ld_global_cg_16(const void* at) { return *static_cast<const uint4*>(at); }
inline void st_global_cg_16(void* at, uint4 x) { *static_cast<uint4*>(at) = x; }
inline float ex2_approx_ftz(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline uint32_t cluster_size() { return sim::cluster_size(); }
inline uint32_t cluster_rank() { return sim::cluster_rank(); }
inline void cluster_sync() { sim::cluster_sync(); }
template <class X>
X* mapa(X* mine, uint32_t rank) {
  return static_cast<X*>(sim::cluster_map(mine, rank));
}

}  // namespace zipfls::cuda::ptx
