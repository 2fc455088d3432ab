// vote_fwd_cuda: the launches of one call (vote_run.h says which), packing.
//
// All in the caller's stream: packing of weights and features where their layout needs it, and the
// product with its argmax. Channels-last features take one launch. No kernel here has run on a GPU
// yet. vote_pack_kernel, vote_slabs_kernel: see vote_pack.cuh.
#include "vote.h"

#include <atomic>

#include "vote_launch.h"
#include "vote_run.h"

namespace zipfls::cuda {
namespace vote {
namespace {

template <class T>
__global__ void __launch_bounds__(kPackThreads) vote_pack_kernel(const PackArgs args) {
  __shared__ PackShared<T> shared;
  pack_rows<T>(args, blockIdx.x, static_cast<int>(threadIdx.x), shared);
}

__global__ void __launch_bounds__(kPackThreads) vote_slabs_kernel(const PackArgs args) {
  __shared__ SlabShared shared;
  pack_slabs(args, blockIdx.x, static_cast<int>(threadIdx.x), shared);
}

/// Launches on a stream of the current device; keeps the first error.
struct StreamLauncher {
  int multiprocessors;
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;

  bool pack(const PackArgs& args, int64_t size, int64_t blocks) {
    return size == 4 ? launch(vote_pack_kernel<uint32_t>, blocks, kPackThreads, args)
                     : launch(vote_pack_kernel<uint16_t>, blocks, kPackThreads, args);
  }
  bool slabs(const PackArgs& args, int64_t blocks) {
    return launch(vote_slabs_kernel, blocks, kPackThreads, args);
  }
  bool mma(Kernel kernel, VoteType type, Layout layout, const MmaArgs& args, int64_t blocks) {
    error = blocks > INT32_MAX ? cudaErrorInvalidConfiguration
                               : launch_mma(kernel, type, layout, args, blocks, stream);
    return error == cudaSuccess;
  }
  bool wgmma(Kernel kernel, const WgmmaProblem& problem) {
    error = launch_wgmma(kernel, problem, multiprocessors, stream);
    return error == cudaSuccess;
  }
  template <class... Parameters, class... Arguments>
  bool launch(void (*kernel)(Parameters...), int64_t blocks, int threads,
              const Arguments&... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream;
    error = blocks > INT32_MAX ? cudaErrorInvalidConfiguration
                               : cudaLaunchKernelEx(&config, kernel, arguments...);
    return error == cudaSuccess;
  }
};

/// Whether the current device runs the wgmma kernels. All devices of that capability give the same
/// answer.
bool uses_wgmma(const VoteDevice& device) {
  static std::atomic<bool> present = false;  // once it is, for good
  if (device.major != 9 || device.minor != 0) return false;
  if (!present) present = wgmma_present();
  return present;
}

}  // namespace
}  // namespace vote

const char* vote_refusal(const VoteProblem& x, const VoteDevice& device) {
  if (device.major < 8) return "it needs compute capability 8.0";
  if (device.shared_memory_per_block < vote::mma_shared_bytes(vote::Kernel::kMmaSmallMap))
    return "it needs more shared memory than a block may have on this device";
  if (x.C > INT32_MAX / 2) return "it takes at most 2^30 classes";
  if (x.H > INT32_MAX / 8 || x.W > INT32_MAX / 8)
    return "it takes at most 2^28 positions in a row or column";
  if (x.D > INT32_MAX / 2) return "it takes at most 2^30 channels";
  return nullptr;
}

vote::VotePlan vote_plan(const VoteProblem& x, const VoteDevice& device) {
  return vote::plan_votes(x, device, vote::uses_wgmma(device));
}

cudaError_t vote_fwd_cuda(const VoteProblem& problem, const vote::VotePlan& plan,
                          const VoteDevice& device, void* scratch, uint32_t* tile_counters,
                          cudaStream_t stream) {
  vote::StreamLauncher launcher = {device.multiprocessors, stream};
  vote::run_votes(launcher, plan, problem, device.multiprocessors, static_cast<char*>(scratch),
                  tile_counters);
  return launcher.error;
}

}  // namespace zipfls::cuda
