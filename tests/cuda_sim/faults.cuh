// Kernels with one fault each, and the same without it: what the simulator must catch, and must
// not.
#pragma once

#include "../../csrc/cuda/device.cuh"
#include "sim.h"

namespace sim {

enum Fault {
  kNone,              // every kernel below without its fault
  kMissingBarrier,    // shared memory read before the barrier that publishes it
  kMissingSyncwarp,   // the same within a warp
  kPastTheEnd,        // a write past an array in shared memory, into the gap before the next
  kPastGlobal,        // and past an array in device memory
  kUninitialised,     // shared memory read before it is written
  kPlainIncrement,    // a counter that is not incremented atomically
  kDivergentBarrier,  // a barrier that half of the threads reach elsewhere
  kEarlyExit,         // a thread that leaves while others wait for it
  kMisaligned,        // a 16-byte load from an odd address
  kFaults
};

/// One block of 64 threads; total: (1,) int32, out: (64,) int32 in device memory.
inline void faulty_kernel(int fault, int32_t* total, int32_t* out) {
  using namespace zipfls::cuda;
  ZIPFLS_DYNAMIC_SHARED(shared, 16);
  SmemAllocator smem{shared};
  int32_t* const values = smem.allocate<int32_t>(64);
  int32_t* const count = smem.allocate<int32_t>(1);
  const int32_t t = static_cast<int32_t>(threadIdx.x);
  if (fault == kEarlyExit && t == 5) return;
  if (fault == kMissingBarrier) values[63 - t] = t;  // so that the order alone is at fault
  if (fault == kMissingBarrier) __syncthreads();
  if (fault != kUninitialised || t != 7) values[t + (fault == kPastTheEnd ? 1 : 0)] = t;
  if (fault == kPastTheEnd && t == 0) values[0] = 0;
  if (t == 0) *count = 0;
  if (fault == kDivergentBarrier && t % 64 < 32) {
    __syncthreads();
  } else if (fault != kMissingBarrier) {
    __syncthreads();
  }
  int32_t sum = values[63 - t];
  if (fault == kPlainIncrement) {
    *count += 1;
  } else {
    atomicAdd(count, 1);
  }
  __syncthreads();
  values[t] = sum + *count;
  if (fault != kMissingSyncwarp) __syncwarp(kAllLanes);
  sum = values[t ^ 1];
  if (fault == kMisaligned && t == 3)
    sum += static_cast<int32_t>(__ldcg(reinterpret_cast<const uint4*>(values + 1)).x);
  out[t + (fault == kPastGlobal ? 1 : 0)] = sum;
  atomicAdd(total, sum);
}

/// The simulator reports the fault (or a sanitizer, which ends the program).
inline int run_faulty_kernel(int fault) {
  zipfls::cuda::SmemAllocator smem{nullptr};
  smem.allocate<int32_t>(64);
  smem.allocate<int32_t>(1);
  const auto total = std::make_unique<int32_t[]>(1), out = std::make_unique<int32_t[]>(64);
  watch(total.get(), 4, true, "total");
  watch(out.get(), 256, false, "out");
  launch([&] { faulty_kernel(fault, total.get(), out.get()); }, 1, 64, 1, smem.used);
  return total[0];
}

}  // namespace sim
