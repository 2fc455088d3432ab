// Launches of the wgmma kernels; see vote_wgmma_sm90.cuh.
//
// Build for sm_90a (-gencode arch=compute_90a,code=sm_90a). For any other architecture the kernels
// compile to nothing, so that the file may be built for the same list as the rest; wgmma_present
// tells at run time.
#include <cuda.h>

#include "launch.cuh"
#include "vote_wgmma_sm90.cuh"

namespace zipfls::cuda::vote {
namespace {

template <class Config>
ZIPFLS_KERNEL(Config::kThreads, 1)
vote_wgmma_kernel(const __grid_constant__ WgmmaArgs args,
                  const __grid_constant__ CUtensorMap features,
                  const __grid_constant__ CUtensorMap weight) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  ZIPFLS_DYNAMIC_SHARED(stages, 1024);
  ZIPFLS_SHARED(WgmmaShared<Config>, shared);
  vote_wgmma<Config>(args, &features, &weight, blockIdx.x, gridDim.x, static_cast<int>(threadIdx.x),
                     shared, stages);
#endif
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/// The driver's cuTensorMapEncodeTiled, without linking against the driver; null without one.
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
cudaError_t launch_config(const WgmmaProblem& problem, int multiprocessors, cudaStream_t stream) {
  // First: it binds the device's context to a thread that has none, which encoding needs.
  const auto kernel = vote_wgmma_kernel<Config>;
  cudaError_t error = allow_shared(kernel, Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  CUtensorMap features, weight;
  error = encode(&features, problem.type, problem.features, problem.results.rows, problem.D,
                 problem.row_stride);
  if (error != cudaSuccess) return error;
  error =
      encode(&weight, problem.type, problem.weight, problem.C, problem.D, problem.weight_stride);
  if (error != cudaSuccess) return error;
  const WgmmaArgs args = wgmma_args<Config>(problem);
  const Launch how = {wgmma_blocks<Config>(args, multiprocessors), Config::kThreads,
                      Config::kSharedBytes, Config::kCluster};
  return launch_allowed(kernel, how, stream, args, features, weight);
}

}  // namespace

bool wgmma_present() {
  if constexpr (served(Kernel::kWgmmaWide)) {
    // A kernel that was compiled to nothing lacks the mbarriers' shared memory.
    using Config = WideConfig<BFloat16>;
    cudaFuncAttributes attributes = {};
    if (cudaFuncGetAttributes(&attributes, vote_wgmma_kernel<Config>) == cudaSuccess)
      return attributes.sharedSizeBytes >= sizeof(WgmmaShared<Config>) && encode_tiled() != nullptr;
    cudaGetLastError();  // no code for this device: not an error of the caller's
  }
  return false;
}

cudaError_t launch_wgmma(const VotePlan& plan, const WgmmaProblem& problem, cudaStream_t stream) {
  return with_element(problem.type, [&](auto element) {
    using Element = decltype(element);
    if constexpr (served(Kernel::kWgmmaWide))
      if (plan.kernel == Kernel::kWgmmaWide)
        return launch_config<WideConfig<Element>>(problem, plan.multiprocessors, stream);
    if constexpr (served(Kernel::kWgmmaNarrow))
      if (plan.kernel == Kernel::kWgmmaNarrow)
        return launch_config<NarrowConfig<Element>>(problem, plan.multiprocessors, stream);
    return cudaErrorInvalidValue;
  });
}

}  // namespace zipfls::cuda::vote
