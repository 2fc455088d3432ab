// Launches of the wgmma kernels; see vote_wgmma_sm90.cuh.
//
// Build for sm_90a (-gencode arch=compute_90a,code=sm_90a). For any other architecture the kernels
// compile to nothing, so that the file may be built for the same list as the rest; wgmma_present
// tells at run time.
#include "vote_launch.h"

#include <cuda.h>

#include "vote_wgmma_sm90.cuh"

namespace zipfls::cuda::vote {
namespace {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    vote_wgmma_kernel(const __grid_constant__ WgmmaArgs args,
                      const __grid_constant__ CUtensorMap features,
                      const __grid_constant__ CUtensorMap weight) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char ring[];
  __shared__ WgmmaShared<Config> shared;
  vote_wgmma<Config>(args, &features, &weight, blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x),
                     shared, ring);
#endif
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/// The driver's cuTensorMapEncodeTiled, without linking against the driver; null if it has none.
EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) entry = nullptr;
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return found;
}

/// Boxes of 128 rows by 128 bytes of a (rows, D) matrix, zeros beyond its ends, swizzled as wgmma
/// reads them.
cudaError_t encode(CUtensorMap* map, VoteType type, const void* at, int64_t rows, int64_t D,
                   int64_t stride) {
  const EncodeTiled encoder = encode_tiled();
  if (encoder == nullptr) return cudaErrorNotSupported;
  const CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                       CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                       CU_TENSOR_MAP_DATA_TYPE_TFLOAT32};
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(D), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(kTmaRowBytes / element_size(type)), 128};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encoder(map, types[static_cast<int>(type)], 2, const_cast<void*>(at), sizes, strides, box,
              steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class Config>
cudaError_t launch(const WgmmaProblem& problem, int multiprocessors, cudaStream_t stream) {
  // First of all: it binds the device's context to a thread that has none, which encoding needs.
  const auto kernel = vote_wgmma_kernel<Config>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  CUtensorMap features, weight;
  error = encode(&features, problem.type, problem.features, problem.results.rows, problem.D,
                 problem.row_stride);
  if (error != cudaSuccess) return error;
  error =
      encode(&weight, problem.type, problem.weight, problem.C, problem.D, problem.weight_stride);
  if (error != cudaSuccess) return error;

  const WgmmaArgs args = wgmma_args<Config>(problem);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = Config::kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(wgmma_blocks<Config>(args, multiprocessors)));
  config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = Config::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = Config::kCluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args, features, weight);
}

template <class Element>
cudaError_t launch_of(Kernel kernel, const WgmmaProblem& problem, int multiprocessors,
                      cudaStream_t stream) {
  return kernel == Kernel::kWgmmaWide
             ? launch<WideConfig<Element>>(problem, multiprocessors, stream)
             : launch<NarrowConfig<Element>>(problem, multiprocessors, stream);
}

}  // namespace

bool wgmma_present() {
  // A kernel that was compiled to nothing lacks the barriers' shared memory.
  cudaFuncAttributes attributes = {};
  if (cudaFuncGetAttributes(&attributes, vote_wgmma_kernel<WideConfig<BFloat16>>) != cudaSuccess) {
    cudaGetLastError();  // no code for this device: not an error of the caller's
    return false;
  }
  return attributes.sharedSizeBytes >= sizeof(WgmmaShared<WideConfig<BFloat16>>) &&
         encode_tiled() != nullptr;
}

cudaError_t launch_wgmma(Kernel kernel, const WgmmaProblem& problem, int multiprocessors,
                         cudaStream_t stream) {
  switch (problem.type) {
    case VoteType::kBFloat16:
      return launch_of<BFloat16>(kernel, problem, multiprocessors, stream);
    case VoteType::kFloat16:
      return launch_of<Float16>(kernel, problem, multiprocessors, stream);
    case VoteType::kTensorFloat32:
      return launch_of<TensorFloat32>(kernel, problem, multiprocessors, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace zipfls::cuda::vote
