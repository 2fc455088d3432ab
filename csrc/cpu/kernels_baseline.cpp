// The kernels for any machine the compiler targets by default (x86-64: SSE2; AArch64: NEON).
#define ZIPFLS_ISA baseline
#define ZIPFLS_VECTOR_BYTES 16
#include "kernel_table.h"

namespace zipfls::cpu {
constexpr Kernels kBaseline = baseline::table("baseline");
}
