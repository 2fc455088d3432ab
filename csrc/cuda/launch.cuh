// What the launchers share: the device they launch on, and the launch itself.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "device.cuh"
#include "tuning.h"

namespace zipfls::cuda {

/// f(an element of a dtype).
template <class F>
auto with_type(Dtype dtype, F f) {
  switch (dtype) {
    case kFloat64:
      return f(double{});
    case kBFloat16:
      return f(bfloat16{});
    case kFloat16:
      return f(float16{});
    default:
      return f(float{});
  }
}

/// The current device, asked once and remembered.
inline const Device& current_device() {
  constexpr int kMost = 64;
  static Device known[kMost] = {};  // written with equal values by whoever comes first
  int id = 0;
  cudaGetDevice(&id);
  thread_local Device odd;
  Device& device = id < kMost ? known[id] : odd;
  if (device.multiprocessors == 0) {
    int shared = 0, major = 0, multiprocessors = 0;
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, id);
    device.shared_per_block = shared;
    device.clusters = major >= 9;
    device.multiprocessors = multiprocessors;
  }
  return device;
}

/// Blocks that can be resident at once, if their registers and shared memory allow, and no more
/// than `items`.
inline int resident_blocks(int64_t items, int threads) {
  const int64_t most =
      int64_t{current_device().multiprocessors} * (kThreadsPerMultiprocessor / threads);
  return static_cast<int>(std::max<int64_t>(1, std::min(items, most)));
}

/// Launches kernel<<<blocks, threads, shared, stream>>>(arguments...), in clusters where cluster
/// > 1.
template <class Kernel, class... Arguments>
cudaError_t launch(Kernel kernel, int blocks, int threads, uint32_t shared, int cluster,
                   cudaStream_t stream, Arguments... arguments) {
  if (shared > 48 * 1024) {  // more than every device gives unasked
    // All that the device has, which only permits: the limit is the kernel's, not this call's, and
    // another thread may launch it with more. The kernels have no static shared memory beside it.
    const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            current_device().shared_per_block);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace zipfls::cuda
