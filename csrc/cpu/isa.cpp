// Which instruction set's kernels this process uses.
#include <cstdlib>
#include <string>

#include <c10/util/Exception.h>

#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace zipfls::cpu {

std::vector<const Kernels*> compiled_kernels() {
#if defined(__x86_64__)
  return {&kBaseline, &kAvx2, &kAvx512};
#else
  return {&kBaseline};
#endif
}

namespace {

#if defined(__x86_64__)
/// Whether the processor converts float16. __builtin_cpu_supports of older versions of clang (14
/// among them) does not know the name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

bool runs_here(const Kernels& set) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (&set == &kAvx2) return avx2;
  if (&set == &kAvx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return &set == &kBaseline;
}

const Kernels& choose() {
  const char* const variable = std::getenv("ZIPFLS_CPU_ISA");
  const std::string wanted = variable == nullptr ? "" : variable;
  const Kernels* best = nullptr;
  std::string names;
  for (const Kernels* set : compiled_kernels()) {
    if (!runs_here(*set)) continue;
    names += (names.empty() ? "" : ", ") + std::string(set->name);
    if (wanted.empty() || wanted == set->name) best = set;
  }
  TORCH_CHECK(best != nullptr,
              "ZIPFLS_CPU_ISA must be unset or one of those this build and machine have, ", names,
              "; got '", wanted, "'");
  return *best;
}

}  // namespace

bool multiplies_bfloat16() {
  static const bool forced = std::getenv("ZIPFLS_CPU_BFLOAT16") != nullptr;
#if defined(__x86_64__)
  return forced || __builtin_cpu_supports("avx512bf16");
#else
  return forced;
#endif
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace zipfls::cpu
