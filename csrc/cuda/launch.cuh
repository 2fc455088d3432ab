// The one launch of every kernel.
#pragma once

#include <cuda_runtime.h>

#include "device.cuh"
#include "launch.h"

namespace zipfls::cuda {

// Which kernels a build has: all that plans choose, but for builds of the tests.
#ifndef ZIPFLS_DTYPES  // bits 1 << Dtype
#define ZIPFLS_DTYPES 15
#endif
#ifndef ZIPFLS_EVERY_ROWS_KERNEL  // 1: float64 too, for which no plan chooses some of them
#define ZIPFLS_EVERY_ROWS_KERNEL 0
#endif
#ifndef ZIPFLS_VOTE_KERNELS  // bits 1 << vote::Kernel; not -1: of bfloat16 alone, K-major
#define ZIPFLS_VOTE_KERNELS -1
#endif

/// f(an element of a dtype).
template <class F>
auto with_type(Dtype dtype, F f) {
  if constexpr ((ZIPFLS_DTYPES & 1 << kFloat64) != 0)
    if (dtype == kFloat64) return f(double{});
  if constexpr ((ZIPFLS_DTYPES & 1 << kBFloat16) != 0)
    if (dtype == kBFloat16) return f(bfloat16{});
  if constexpr ((ZIPFLS_DTYPES & 1 << kFloat16) != 0)
    if (dtype == kFloat16) return f(float16{});
  return f(float{});
}

namespace vote {

constexpr bool kAllTypes = ZIPFLS_VOTE_KERNELS == -1;

constexpr bool served(Kernel kernel) {
  return (ZIPFLS_VOTE_KERNELS >> static_cast<int>(kernel) & 1) != 0;
}

/// f(an element of a type).
template <class F>
auto with_element(VoteType type, F f) {
  if constexpr (kAllTypes) {
    if (type == VoteType::kFloat16) return f(Float16{});
    if (type == VoteType::kTensorFloat32) return f(TensorFloat32{});
  }
  return f(BFloat16{});
}

}  // namespace vote

struct Launch {
  int64_t blocks;
  int threads;
  uint32_t shared = 0;  // dynamic bytes a block
  int cluster = 1;      // blocks
};

/// Lets blocks of a kernel have more dynamic shared memory than every device gives unasked.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

/// Launches a kernel that has been allowed its shared memory.
template <class... Parameters, class... Arguments>
cudaError_t launch_allowed(void (*kernel)(Parameters...), const Launch& how, cudaStream_t stream,
                           const Arguments&... arguments) {
  if (how.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = how.shared;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(how.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = how.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

/// Launches a kernel without static shared memory. Where it needs more than 48 KB it is allowed all
/// that the device has: the limit belongs to the kernel, which another thread may launch with more.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& how, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (how.shared > 48 * 1024) {
    const cudaError_t error = allow_shared(kernel, current_device().shared_per_block);
    if (error != cudaSuccess) return error;
  }
  return launch_allowed(kernel, how, stream, arguments...);
}

}  // namespace zipfls::cuda
