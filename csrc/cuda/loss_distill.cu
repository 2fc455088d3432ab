// Launchers of loss_distill.cuh's kernel.
#include "launch.cuh"
#include "loss_distill.cuh"

namespace zipfls::cuda {

LossPlan plan_distill(const DistillFwd& a, Dtype dtype, const Device& device) {
  return with_type(dtype, [&](auto x) {
    using T = decltype(x);
    SmemAllocator smem{nullptr};
    BlockArea<Arithmetic<T>>::allocate(smem);
    if (a.more())
      DistillArea<T, true>::allocate(smem);
    else
      DistillArea<T, false>::allocate(smem);
    const uint32_t vectors = vectors_of(a.C, kVector<T>);
    const int64_t warps = int64_t{device.multiprocessors} * (kThreadsPerMultiprocessor / kWarp);
    const int wanted = a.N * 2 >= warps ? kDistillFullVectors : kIdleDeviceVectors;
    LossPlan plan = {};
    plan.kernel = LossPlan::kDistill;
    plan.threads = std::min(kDistillBlock<T>, round_up((vectors + wanted - 1) / wanted, kWarp));
    plan.cluster = 1;
    plan.groups = a.N;
    plan.shared = smem.used;
    // As many blocks as are resident: see loss.cu's complete.
    const int by_threads = kThreadsPerMultiprocessor / std::max(plan.threads, kGeneralLeast);
    const int by_registers = kRegistersPerMultiprocessor / (kDistillRegisters<T> * plan.threads);
    const int64_t resident = int64_t{std::min(by_threads, by_registers)} * device.multiprocessors;
    plan.blocks = static_cast<int>(std::max<int64_t>(1, std::min(a.N, resident)));
    return plan;
  });
}

cudaError_t distill_fwd_cuda(const DistillFwd& a, Dtype dtype, const LossPlan& plan,
                             cudaStream_t stream) {
  return with_type(dtype, [&](auto x) {
    using T = decltype(x);
    using A = Arithmetic<T>;
    const Launch how = {plan.blocks, plan.threads, plan.shared};
    if (a.more())
      return launch(a.wide ? loss_distill_kernel<T, A, true> : loss_distill_kernel<T, T, true>, how,
                    stream, a);
    return launch(a.wide ? loss_distill_kernel<T, A, false> : loss_distill_kernel<T, T, false>, how,
                  stream, a);
  });
}

}  // namespace zipfls::cuda
