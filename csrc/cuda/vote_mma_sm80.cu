// Launches of the mma.sync kernels; see vote_mma_sm80.cuh.
#include "vote_launch.h"
#include "vote_mma_sm80.cuh"

namespace zipfls::cuda::vote {
namespace {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, kBlocksPerMultiprocessor)
    vote_mma_kernel(const __grid_constant__ MmaArgs args) {
  extern __shared__ __align__(128) char shared[];
  vote_mma<Config>(args, blockIdx.x, static_cast<int>(threadIdx.x), shared);
}

template <class Config>
cudaError_t launch(const MmaArgs& args, int64_t blocks, cudaStream_t stream) {
  const auto kernel = vote_mma_kernel<Config>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared);  // room for two blocks
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = Config::kSharedBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <class Element, Major kMajor>
cudaError_t launch_of(Kernel kernel, const MmaArgs& args, int64_t blocks, cudaStream_t stream) {
  switch (kernel) {
    case Kernel::kMma:
      return launch<MmaConfig<Element, kTileM, kTileN, kWarpsM, kWarpsN, kMajor, false>>(
          args, blocks, stream);
    case Kernel::kMmaFew:
      return launch<MmaConfig<Element, kSmallTileM, kTileN, kWarpsM, kWarpsN, kMajor, false>>(
          args, blocks, stream);
    case Kernel::kMmaSmallMap:
      return launch<
          MmaConfig<Element, kSmallMapTileM, kSmallMapTileN, 2, kUpsampleWarps / 2, kMajor, true>>(
          args, blocks, stream);
    case Kernel::kMmaPatch:
      if constexpr (kMajor == Major::kK)
        return launch<
            MmaConfig<Element, kPatchTileM, kPatchTileN, 4, kUpsampleWarps / 4, kMajor, true>>(
            args, blocks, stream);
      break;
    default:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_mma(Kernel kernel, VoteType type, Layout layout, const MmaArgs& args,
                       int64_t blocks, cudaStream_t stream) {
  const bool by_position = layout == Layout::kMNMajor;
  switch (type) {
    case VoteType::kBFloat16:
      return by_position ? launch_of<BFloat16, Major::kMN>(kernel, args, blocks, stream)
                         : launch_of<BFloat16, Major::kK>(kernel, args, blocks, stream);
    case VoteType::kFloat16:
      return by_position ? launch_of<Float16, Major::kMN>(kernel, args, blocks, stream)
                         : launch_of<Float16, Major::kK>(kernel, args, blocks, stream);
    case VoteType::kTensorFloat32:
      if (!by_position) return launch_of<TensorFloat32, Major::kK>(kernel, args, blocks, stream);
  }
  return cudaErrorInvalidValue;
}

size_t mma_shared_bytes(Kernel kernel) {
  const auto of = [](auto config) { return static_cast<size_t>(decltype(config)::kSharedBytes); };
  constexpr Major kMajor = Major::kK;
  switch (kernel) {
    case Kernel::kMmaSmallMap:
      return of(MmaConfig<BFloat16, kSmallMapTileM, kSmallMapTileN, 2, kUpsampleWarps / 2, kMajor,
                          true>());
    case Kernel::kMmaPatch:
      return of(
          MmaConfig<BFloat16, kPatchTileM, kPatchTileN, 4, kUpsampleWarps / 4, kMajor, true>());
    default:
      return of(MmaConfig<BFloat16, kTileM, kTileN, kWarpsM, kWarpsN, kMajor, false>());
  }
}

}  // namespace zipfls::cuda::vote
