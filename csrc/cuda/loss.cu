// Launchers of the loss kernels.
#include "loss_bwd.cuh"
#include "loss_dense.cuh"
#include "loss_long.cuh"
#include "launch.cuh"
#include "launch.h"
#include "loss_plan.h"

namespace zipfls::cuda {

namespace {

template <class T>
cudaError_t loss_fwd(const LossFwd& a, int blocks, cudaStream_t stream) {
  const LossLaunch l = loss_launch<T>(a, current_device());
  const auto [kernel, threads, cluster, slice, groups] = l.plan;
  if constexpr (sizeof(T) < 8) {  // plan_loss keeps to the other two for float64
    if (kernel == LossPlan::kLanes8)
      return launch(loss_fwd_kernel<T, 8>, blocks, threads, l.shared, 1, stream, a, l.row_bytes,
                    slice);
    if (kernel == LossPlan::kLanes32)
      return launch(loss_fwd_kernel<T, 32>, blocks, threads, l.shared, 1, stream, a, l.row_bytes,
                    slice);
    if (kernel == LossPlan::kCluster)
      return launch(loss_fwd_cluster_kernel<T>, blocks, threads, l.shared, cluster, stream, a,
                    l.row_bytes, slice);
  }
  if (kernel == LossPlan::kBlock)
    return launch(loss_fwd_kernel<T, 0>, blocks, threads, l.shared, 1, stream, a, l.row_bytes,
                  slice);
  return launch(loss_fwd_long_kernel<T>, blocks, threads, l.shared, 1, stream, a);
}

}  // namespace

int loss_blocks(const LossFwd& a, Dtype dtype, bool dense) {
  if (dense) return resident_blocks(a.N, kDenseBlock);
  return with_type(dtype,
                   [&](auto x) { return loss_launch<decltype(x)>(a, current_device()).blocks; });
}

cudaError_t loss_fwd_cuda(const LossFwd& a, Dtype dtype, int blocks, cudaStream_t stream) {
  return with_type(dtype, [&](auto x) { return loss_fwd<decltype(x)>(a, blocks, stream); });
}

cudaError_t loss_dense_cuda(const LossFwd& a, Dtype dtype, int blocks, cudaStream_t stream) {
  return with_type(dtype, [&](auto x) {
    using T = decltype(x);
    SmemAllocator smem{nullptr};
    BlockArea<Arithmetic<T>>::allocate(smem);
    smem.allocate<Arithmetic<T>>(kDenseBlock / kWarp);
    return launch(loss_dense_kernel<T>, blocks, kDenseBlock, smem.used, 1, stream, a);
  });
}

int totals_blocks(int64_t N) { return N > kScanRows ? kTotalsBlocks : 0; }

cudaError_t loss_totals_cuda(const LossTotals& a, Dtype dtype, int blocks, cudaStream_t stream) {
  SmemAllocator smem{nullptr};
  BlockArea<double>::allocate(smem);
  if (dtype == kFloat64)
    return launch(loss_totals_kernel<double>, blocks, kTotalsBlock, smem.used, 1, stream, a);
  return launch(loss_totals_kernel<float>, blocks, kTotalsBlock, smem.used, 1, stream, a);
}

cudaError_t loss_correct_cuda(const LossCorrect& a, Dtype dtype, cudaStream_t stream) {
  if (a.N == 0) return cudaSuccess;
  return with_type(dtype, [&](auto x) {
    const int blocks = resident_blocks(a.N, kCorrectBlock);
    return launch(loss_correct_kernel<decltype(x)>, blocks, kCorrectBlock, 0, 1, stream, a);
  });
}

cudaError_t loss_bwd_cuda(const LossBwd& a, Dtype dtype, cudaStream_t stream) {
  if (a.N == 0 || a.C == 0) return cudaSuccess;
  const int64_t items = a.N * ((a.C + kScaleChunk - 1) / kScaleChunk);
  const int blocks =
      resident_blocks((items + kScaleBlock / kWarp - 1) / (kScaleBlock / kWarp), kScaleBlock);
  return with_type(dtype, [&](auto x) {
    return launch(loss_bwd_kernel<decltype(x)>, blocks, kScaleBlock, 0, 1, stream, a);
  });
}

}  // namespace zipfls::cuda
