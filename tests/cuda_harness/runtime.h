// Launching kernels on the CPU: what the driver sees of runtime.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace sim {

/// The order in which the threads of a block take turns, and what fresh shared memory holds.
struct Schedule {
  enum Order { kAscending, kDescending, kRandom, kRandomByWarp } order = kAscending;
  enum Fill { kZeros, kOnes, kNoise } fill = kZeros;
  uint64_t seed = 1;
};

/// Runs kernel() once for every thread of every block. Faults are collected, see faults().
void launch(const std::function<void()>& kernel, uint32_t blocks, uint32_t threads,
            uint32_t cluster, uint32_t shared_bytes, const Schedule& schedule);

/// Device memory that the race check watches. `written`: holds values already.
void watch(const void* at, size_t bytes, bool written, const char* name);
void forget_watched();

/// What went wrong since the last call, a line each; empty: nothing.
std::string faults();

}  // namespace sim
