// Launches on one stream come one after another, so each stream has its own counters; a graph may
// be replayed on any stream, so each captured launch has its own.
#include "tile_counters.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

namespace zipfls::cuda {

at::Tensor tile_counters(const c10::cuda::CUDAStream& stream, int64_t count) {
  const auto options = at::TensorOptions().device(stream.device()).dtype(at::kInt);
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None)
    return at::zeros({count}, options);
  static std::mutex mutex;
  static auto* const known =
      new std::map<std::pair<c10::DeviceIndex, c10::StreamId>, at::Tensor>;  // never freed
  const std::lock_guard<std::mutex> lock(mutex);
  at::Tensor& counters = (*known)[{stream.device_index(), stream.id()}];
  if (!counters.defined() || counters.numel() < count) {
    // Not from PyTorch's allocator, which torch.compile's CUDA graphs, while they warm up, point at
    // a pool of which nothing may outlive the run. Those that have become too few stay where they
    // are, for launches still to come that were given them.
    const int64_t size =
        std::max<int64_t>({count, 1024, counters.defined() ? 2 * counters.numel() : 0});
    const auto bytes = static_cast<size_t>(size) * sizeof(int32_t);
    void* memory = nullptr;
    // Another thread's capture, if there is one, neither forbids this nor minds it.
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    C10_CUDA_CHECK(cudaMalloc(&memory, bytes));
    C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, stream));
    counters = at::from_blob(memory, {size}, options);
  }
  return counters;
}

}  // namespace zipfls::cuda
