// Launchers of the loss kernels.
#include "launch.cuh"
#include "loss_bwd.cuh"
#include "loss_factors.cuh"
#include "loss_long.cuh"
#include "loss_rows.cuh"

namespace zipfls::cuda {
namespace {

/// Adds shared memory and grid to a plan that chooses the rest.
template <class T>
LossPlan complete(LossPlan plan, const LossFwd& a, const Device& device) {
  const int lanes = plan.lanes();
  SmemAllocator row{nullptr}, block{nullptr};
  RowArea<T>::allocate(row, plan.vectors, counted_votes(a), a.C, a.grad != nullptr, lanes == 0);
  BlockArea<Arithmetic<T>>::allocate(block);
  plan.row_bytes = row.used;
  plan.shared = block.used + row.used * (lanes == 0 ? 1 : plan.threads / lanes);

  // As many blocks as are resident, if the multiprocessor has the registers and the shared memory,
  // so that all end together: more would run in waves, the last of them nearly empty. One block
  // without rows, for the sums.
  const int64_t by_threads = kThreadsPerMultiprocessor / plan.threads;
  const int64_t by_registers =
      kRegistersPerMultiprocessor / (rows_registers<sizeof(T)>(lanes) * plan.threads);
  const int64_t by_shared = device.shared_per_block / (plan.shared + kReservedShared);
  const int64_t resident =
      std::max<int64_t>(1, std::min(std::min(by_threads, by_registers), by_shared));
  const int64_t at_once = std::max<int64_t>(1, resident * device.multiprocessors / plan.cluster);
  const int64_t passes = std::max<int64_t>(1, (plan.groups + at_once - 1) / at_once);
  plan.blocks =
      static_cast<int>(std::max<int64_t>(1, (plan.groups + passes - 1) / passes)) * plan.cluster;
  return plan;
}

template <class T>
LossPlan plan_rows(const LossFwd& a, const Device& device) {
  SmemAllocator tables{nullptr};
  VoteTables<Arithmetic<T>>::allocate(tables, counted_votes(a), a.C, a.grad != nullptr);
  return complete<T>(choose_rows(a.N, a.C, counted_votes(a), kVector<T>, tables.used, device), a,
                     device);
}

template <class T>
cudaError_t launch_rows(const LossFwd& a, const LossPlan& plan, cudaStream_t stream) {
  const Launch how = {plan.blocks, plan.threads, plan.shared, plan.cluster};
  const bool block = plan.kernel == LossPlan::kBlock || plan.kernel == LossPlan::kCluster;
  const uint32_t threads = static_cast<uint32_t>(plan.threads);
  const uint32_t part = block ? (plan.vectors + threads - 1) / threads * kWarp : plan.vectors;
  if constexpr (sizeof(T) < 8 ||
                ZIPFLS_EVERY_ROWS_KERNEL) {  // choose_rows chooses among the others for float64
    if (plan.kernel == LossPlan::kLanes8)
      return launch(loss_fwd_kernel<T, 8>, how, stream, a, plan.row_bytes, plan.vectors, part);
    if (plan.kernel == LossPlan::kLanes16)
      return launch(loss_fwd_kernel<T, 16>, how, stream, a, plan.row_bytes, plan.vectors, part);
    if (plan.kernel == LossPlan::kLanes32)
      return launch(loss_fwd_kernel<T, 32>, how, stream, a, plan.row_bytes, plan.vectors, part);
    if (plan.kernel == LossPlan::kCluster)
      return launch(loss_fwd_cluster_kernel<T>, how, stream, a, plan.row_bytes, plan.vectors, part);
  }
  if (plan.kernel == LossPlan::kBlock)
    return launch(loss_fwd_kernel<T, 0>, how, stream, a, plan.row_bytes, plan.vectors, part);
  return launch(loss_fwd_long_kernel<T>, how, stream, a);
}

}  // namespace

LossPlan plan_loss(const LossGeneral& a, Dtype dtype, const Device& device) {
  if (a.dense || a.probabilities != nullptr) return plan_loss_general(a, dtype, device);
  return with_type(dtype, [&](auto x) { return plan_rows<decltype(x)>(a, device); });
}

cudaError_t loss_fwd_cuda(const LossGeneral& a, Dtype dtype, const LossPlan& plan,
                          cudaStream_t stream) {
  if (plan.kernel == LossPlan::kGeneral) return loss_general_cuda(a, dtype, plan, stream);
  return with_type(dtype, [&](auto x) { return launch_rows<decltype(x)>(a, plan, stream); });
}

cudaError_t loss_totals_cuda(const LossTotals& a, Dtype dtype, int blocks, cudaStream_t stream) {
  SmemAllocator smem{nullptr};
  BlockArea<double>::allocate(smem);
  const auto kernel = dtype == kFloat64 ? loss_totals_kernel<double> : loss_totals_kernel<float>;
  return launch(kernel, {blocks, kTotalsBlock, smem.used}, stream, a);
}

cudaError_t loss_bwd_cuda(const LossBwd& a, Dtype dtype, cudaStream_t stream) {
  if (a.N == 0 || a.C == 0) return cudaSuccess;
  constexpr int kWarps = kScaleBlock / kWarp;
  const int64_t items = a.N * ((a.C + kScaleChunk - 1) / kScaleChunk);
  const int blocks = resident_blocks((items + kWarps - 1) / kWarps, kScaleBlock, current_device());
  return with_type(dtype, [&](auto x) {
    return launch(loss_bwd_kernel<decltype(x)>, {blocks, kScaleBlock}, stream, a);
  });
}

cudaError_t loss_factors_bwd_cuda(const FactorsBwd& a, Dtype dtype, cudaStream_t stream) {
  if (a.N == 0) return cudaSuccess;
  return with_type(dtype, [&](auto x) {
    using T = decltype(x);
    const auto launch_lanes = [&](auto kernel, int lanes, uint32_t pieces) {
      const int64_t items = a.N * pieces, groups = kScaleBlock / lanes;
      if (items > INT32_MAX) return cudaErrorInvalidConfiguration;
      const int blocks =
          resident_blocks((items + groups - 1) / groups, kScaleBlock, current_device());
      return launch(kernel, {blocks, kScaleBlock}, stream, a, static_cast<uint32_t>(items), pieces);
    };
    if (pieces_of<T, 8>(a.logits, a.C) == 1)
      return launch_lanes(loss_factors_bwd_kernel<T, 8>, 8, 1);
    return launch_lanes(loss_factors_bwd_kernel<T, kWarp>, kWarp,
                        pieces_of<T, kWarp>(a.logits, a.C));
  });
}

}  // namespace zipfls::cuda
