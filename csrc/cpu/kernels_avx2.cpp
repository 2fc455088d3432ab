// The kernels for x86-64 with AVX2, FMA and F16C (Haswell, Zen and later).
//
// The set is switched on inside this file, after the standard headers: no flag of the build may do
// it, for then the compiler could also use it in inline functions of the standard library, of which
// the linker keeps one copy for the whole program, whatever machine that runs on.
#if defined(__x86_64__)
#include <cmath>
#include <cstddef>
#include <cstdint>

#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define ZIPFLS_ISA avx2
#define ZIPFLS_AVX2
#define ZIPFLS_VECTOR_BYTES 32
#include "kernel_table.h"

namespace zipfls::cpu {
constexpr Kernels kAvx2 = avx2::table("avx2");
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
