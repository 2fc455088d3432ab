// Launchers of loss_general.cuh's kernels.
#include "launch.cuh"
#include "loss_general.cuh"

namespace zipfls::cuda {

LossPlan plan_loss_general(const LossGeneral& a, Dtype dtype, const Device& device) {
  return with_type(dtype, [&](auto x) {
    using T = decltype(x);
    SmemAllocator smem{nullptr};
    BlockArea<Arithmetic<T>>::allocate(smem);
    GeneralArea<Arithmetic<T>>::allocate(smem, a);
    const uint32_t vectors = vectors_of(a.C, kVector<T>);
    LossPlan plan = {};
    plan.kernel = LossPlan::kGeneral;
    plan.threads =
        std::min(kGeneralBlock, round_up((vectors + kGeneralVectors - 1) / kGeneralVectors, kWarp));
    plan.cluster = 1;
    plan.groups = a.N;
    plan.shared = smem.used;
    plan.blocks = resident_blocks(a.N, std::max(plan.threads, kGeneralLeast), device);
    return plan;
  });
}

cudaError_t loss_general_cuda(const LossGeneral& a, Dtype dtype, const LossPlan& plan,
                              cudaStream_t stream) {
  return with_type(dtype, [&](auto x) {
    using T = decltype(x);
    const auto kernel = a.probabilities == nullptr ? loss_general_kernel<T, ClassIndex<T>, PerClass>
                        : a.dense ? loss_general_kernel<T, Probabilities<T>, PerClass>
                                  : loss_general_kernel<T, Probabilities<T>, ByRank>;
    return launch(kernel, {plan.blocks, plan.threads, plan.shared}, stream, a);
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
    const auto kernel =
        a.probabilities == nullptr ? loss_correct_kernel<T, false> : loss_correct_kernel<T, true>;
    return launch(kernel, {blocks, kCorrectBlock, smem.used}, stream, a, correct);
  });
}

}  // namespace zipfls::cuda
