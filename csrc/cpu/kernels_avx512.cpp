// The kernels for x86-64 with AVX-512 F, BW, DQ and VL (Skylake-SP, Zen 4 and later).
//
// Why the set is switched on in the source: kernels_avx2.cpp.
#if defined(__x86_64__)
#include <cmath>
#include <cstddef>
#include <cstdint>

#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define ZIPFLS_ISA avx512
#define ZIPFLS_AVX512
#define ZIPFLS_VECTOR_BYTES 64
#include "kernel_table.h"

namespace zipfls::cpu {
constexpr Kernels kAvx512 = avx512::table("avx512");
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
