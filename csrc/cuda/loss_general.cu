// Launchers of the loss kernels for a target of probabilities or a log mass for every class.
#include "launch.cuh"
#include "loss_dense.cuh"
#include "loss_general.cuh"

namespace zipfls::cuda {

LossPlan plan_loss_general(const LossGeneral& a, Dtype dtype, const Device& device) {
  return with_type(dtype, [&](auto x) {
    using T = decltype(x);
    LossPlan plan = {};
    plan.kernel = LossPlan::kGeneral;
    plan.cluster = 1;
    plan.groups = a.N;
    if (a.probabilities == nullptr) {
      SmemAllocator smem{nullptr};
      BlockArea<Arithmetic<T>>::allocate(smem);
      smem.allocate<Arithmetic<T>>(kDenseBlock / kWarp);
      plan.threads = kDenseBlock;
      plan.shared = smem.used;
      plan.blocks = resident_blocks(a.N, kDenseBlock, device);
    } else {
      plan.threads = soft_threads<T>(a.C);
      plan.shared = soft_shared_bytes<T>(a);
      plan.blocks = resident_blocks(a.N, std::max(plan.threads, kSoftLeast), device);
    }
    return plan;
  });
}

cudaError_t loss_general_cuda(const LossGeneral& a, Dtype dtype, const LossPlan& plan,
                              cudaStream_t stream) {
  return with_type(dtype, [&](auto x) {
    using T = decltype(x);
    const Launch how = {plan.blocks, plan.threads, plan.shared};
    if (a.probabilities == nullptr) return launch(loss_dense_kernel<T>, how, stream, a);
    const auto kernel = a.dense ? soft_loss_fwd_kernel<T, true> : soft_loss_fwd_kernel<T, false>;
    return launch(kernel, how, stream, a);
  });
}

cudaError_t loss_correct_cuda(const LossGeneral& a, Dtype dtype, int32_t* correct,
                              cudaStream_t stream) {
  if (a.N == 0) return cudaSuccess;
  SmemAllocator smem{nullptr};
  smem.allocate<double>(kWarp);
  const int blocks = resident_blocks(a.N, kCorrectBlock, current_device());
  return with_type(dtype, [&](auto x) {
    using T = decltype(x);
    if (a.probabilities != nullptr)
      return launch(soft_correct_kernel<T>, {blocks, kCorrectBlock, smem.used}, stream, a, correct);
    const LossCorrect of = {a.logits, a.logits_stride, a.target, a.N, a.C, a.ignore_index, correct};
    return launch(loss_correct_kernel<T>, {blocks, kCorrectBlock}, stream, of);
  });
}

}  // namespace zipfls::cuda
