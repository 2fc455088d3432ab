// Launchers of the loss kernels for targets that are probabilities.
#include "soft_loss.cuh"
#include "launch.cuh"
#include "launch.h"

namespace zipfls::cuda {

int soft_loss_blocks(const SoftLossFwd& s, Dtype dtype) {
  return with_type(dtype, [&](auto x) {
    return resident_blocks(s.loss.N, std::max(soft_threads<decltype(x)>(s.loss.C), kSoftLeast));
  });
}

cudaError_t soft_loss_fwd_cuda(const SoftLossFwd& s, Dtype dtype, int blocks, cudaStream_t stream) {
  return with_type(dtype, [&](auto x) {
    using T = decltype(x);
    const auto kernel = s.dense ? soft_loss_fwd_kernel<T, true> : soft_loss_fwd_kernel<T, false>;
    return launch(kernel, blocks, soft_threads<T>(s.loss.C), soft_shared_bytes<T>(s), 1, stream, s);
  });
}

cudaError_t soft_correct_cuda(const SoftLossFwd& s, Dtype dtype, int32_t* correct,
                              cudaStream_t stream) {
  if (s.loss.N == 0) return cudaSuccess;
  SmemAllocator smem{nullptr};
  smem.allocate<double>(kWarp);
  return with_type(dtype, [&](auto x) {
    return launch(soft_correct_kernel<decltype(x)>, resident_blocks(s.loss.N, kCorrectBlock),
                  kCorrectBlock, smem.used, 1, stream, s, correct);
  });
}

}  // namespace zipfls::cuda
