// Launches of the mma.sync kernels; see vote_mma_sm80.cuh.
#include "launch.cuh"
#include "vote_mma_sm80.cuh"

namespace zipfls::cuda::vote {
namespace {

template <class Config>
ZIPFLS_KERNEL(Config::kThreads, kBlocksPerMultiprocessor)
vote_mma_kernel(const __grid_constant__ MmaArgs args) {
  ZIPFLS_DYNAMIC_SHARED(shared, 128);
  vote_mma<Config>(args, blockIdx.x, static_cast<int>(threadIdx.x), shared);
}

template <class Element, Major kMajor>
using Mma = MmaConfig<Element, kTileM, kTileN, kWarpsM, kWarpsN, kMajor, false>;
template <class Element, Major kMajor>
using MmaFew = MmaConfig<Element, kSmallTileM, kTileN, kWarpsM, kWarpsN, kMajor, false>;
template <class Element, Major kMajor>
using MmaSmallMap =
    MmaConfig<Element, kSmallMapTileM, kSmallMapTileN, 2, kUpsampleWarps / 2, kMajor, true>;
template <class Element, Major kMajor>
using MmaPatch = MmaConfig<Element, kPatchTileM, kPatchTileN, 4, kUpsampleWarps / 4, kMajor, true>;

template <class Config>
cudaError_t launch_config(const MmaArgs& args, int64_t blocks, cudaStream_t stream) {
  const auto kernel = vote_mma_kernel<Config>;
  cudaError_t error = allow_shared(kernel, Config::kSharedBytes);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared);  // room for two blocks
  if (error != cudaSuccess) return error;
  return launch_allowed(kernel, {blocks, Config::kThreads, Config::kSharedBytes}, stream, args);
}

template <class Element, Major kMajor>
cudaError_t launch_kernel(Kernel kernel, const MmaArgs& args, int64_t blocks, cudaStream_t stream) {
  if constexpr (served(Kernel::kMma))
    if (kernel == Kernel::kMma) return launch_config<Mma<Element, kMajor>>(args, blocks, stream);
  if constexpr (served(Kernel::kMmaFew))
    if (kernel == Kernel::kMmaFew)
      return launch_config<MmaFew<Element, kMajor>>(args, blocks, stream);
  if constexpr (served(Kernel::kMmaSmallMap))
    if (kernel == Kernel::kMmaSmallMap)
      return launch_config<MmaSmallMap<Element, kMajor>>(args, blocks, stream);
  if constexpr (served(Kernel::kMmaPatch) && kMajor == Major::kK)
    if (kernel == Kernel::kMmaPatch)
      return launch_config<MmaPatch<Element, kMajor>>(args, blocks, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_mma(const VotePlan& plan, VoteType type, const MmaArgs& args, int64_t blocks,
                       cudaStream_t stream) {
  const bool mn_major = plan.features == Layout::kMNMajor;
  return with_element(type, [&](auto element) {
    using Element = decltype(element);
    if constexpr (kSize<Element> == 2 && kAllTypes)  // ldmatrix transposes 16-bit elements alone
      if (mn_major) return launch_kernel<Element, Major::kMN>(plan.kernel, args, blocks, stream);
    return mn_major ? cudaErrorInvalidValue
                    : launch_kernel<Element, Major::kK>(plan.kernel, args, blocks, stream);
  });
}

int mma_shared_bytes(Kernel kernel) {
  switch (kernel) {
    case Kernel::kMmaSmallMap:
      return MmaSmallMap<BFloat16, Major::kK>::kSharedBytes;
    case Kernel::kMmaPatch:
      return MmaPatch<BFloat16, Major::kK>::kSharedBytes;
    default:
      return Mma<BFloat16, Major::kK>::kSharedBytes;
  }
}

}  // namespace zipfls::cuda::vote
