// The choice among the instruction sets.
#pragma once

#include <vector>

#include "kernels.h"

namespace zipfls::cpu {

/// The tables of all sets this build has, narrowest first.
std::vector<const Kernels*> compiled_kernels();

/// The kernels for this machine: the widest set it has, or the one the variable ZIPFLS_CPU_ISA
/// names. Looks once; a name that is unknown, not compiled or not supported here is an error, at
/// every call.
const Kernels& kernels();

/// Whether the processor multiplies bfloat16 by itself, with sums in float32. With the variable
/// ZIPFLS_CPU_BFLOAT16 in the environment it counts as one that does: the votes are the same, and
/// the tests reach that path on every processor.
bool multiplies_bfloat16();

}  // namespace zipfls::cpu
