// The CUDA runtime on the CPU: what csrc/cuda calls of it. cudaLaunchKernelEx runs the kernel.
#pragma once

#include <type_traits>

#include "ptx_on_cpu.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801
};
using cudaStream_t = void*;
struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};

enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount
};
/// An H200; a driver makes the plans for other devices by hand.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const int values[] = {9, 0, 227 * 1024, 132};
  *value = values[which];
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* id) {
  *id = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute which, int value) {
  const bool fits = which != cudaFuncAttributeMaxDynamicSharedMemorySize || value <= 227 * 1024;
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->sharedSizeBytes = 227 * 1024;
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const unsigned cluster = config->numAttrs != 0 ? config->attrs->val.clusterDim.x : 1;
  if (config->gridDim.x == 0 || config->gridDim.x % cluster != 0)
    return cudaErrorInvalidConfiguration;
  sim::launched.push_back(reinterpret_cast<const void*>(kernel));
  sim::launch([&] { kernel(arguments...); }, config->gridDim.x, config->blockDim.x, cluster,
              static_cast<uint32_t>(config->dynamicSmemBytes));
  return cudaSuccess;
}

// The driver's encoder of tensor maps -------------------------------------------------------------

enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
  CU_TENSOR_MAP_DATA_TYPE_TFLOAT32
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

namespace sim {
inline CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* at,
                             const cuuint64_t* sizes, const cuuint64_t* strides,
                             const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                             CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                             CUtensorMapFloatOOBfill) {
  const int element = type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 ? 4 : 2;
  if (rank != 2 || reinterpret_cast<uintptr_t>(at) % 16 != 0 || strides[0] % 16 != 0 ||
      box[0] * element != 128 || box[1] != 128 || steps[0] != 1 || steps[1] != 1 ||
      swizzle != CU_TENSOR_MAP_SWIZZLE_128B)
    return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const char*>(at), static_cast<int64_t>(sizes[1]),
          static_cast<int64_t>(strides[0]), static_cast<int64_t>(sizes[0]) * element, element};
  return CUDA_SUCCESS;
}
}  // namespace sim

enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess,
  cudaDriverEntryPointSymbolNotFound
};
constexpr int cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPoint(const char*, void** entry, int,
                                           cudaDriverEntryPointQueryResult* result) {
  *entry = reinterpret_cast<void*>(&sim::encode_tiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
