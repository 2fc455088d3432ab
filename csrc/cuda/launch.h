// The launchers: each launches its kernels on a stream of the current device, by the plan that the
// caller made. No torch; nothing synchronises.
//
// Each returns cudaSuccess or the error of the launch. Pointers are the caller's responsibility.
#pragma once

#include <cuda_runtime_api.h>

#include "args.h"
#include "plan.h"

namespace zipfls::cuda {

/// The current device, queried once.
inline const Device& current_device() {
  constexpr int kCached = 64;
  static Device cached[kCached] = {};  // several threads may write the same values
  int id = 0;
  cudaGetDevice(&id);
  thread_local Device other;
  Device& device = id < kCached ? cached[id] : other;
  if (device.multiprocessors == 0) {
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      cudaDeviceGetAttribute(&value, which, id);
      return value;
    };
    device.major = attribute(cudaDevAttrComputeCapabilityMajor);
    device.minor = attribute(cudaDevAttrComputeCapabilityMinor);
    device.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  }
  return device;
}

// Losses and labels -------------------------------------------------------------------------------

/// Whether the tables of P votes over C classes fit; otherwise the caller ranks the votes and
/// passes a log mass for every class.
bool tables_fit(int32_t P, int32_t C, Dtype dtype);

LossPlan plan_loss(const LossGeneral& a, Dtype dtype, const Device& device);
cudaError_t loss_fwd_cuda(const LossGeneral& a, Dtype dtype, const LossPlan& plan,
                          cudaStream_t stream);

/// The part of both that loss_general.cu compiles.
LossPlan plan_loss_general(const LossGeneral& a, Dtype dtype, const Device& device);
cudaError_t loss_general_cuda(const LossGeneral& a, Dtype dtype, const LossPlan& plan,
                              cudaStream_t stream);

LossPlan plan_distill(const DistillFwd& a, Dtype dtype, const Device& device);
cudaError_t distill_fwd_cuda(const DistillFwd& a, Dtype dtype, const LossPlan& plan,
                             cudaStream_t stream);

/// Blocks of loss_totals, whose partials are (3, blocks) float64; 0: loss_fwd adds the targets up.
inline int totals_blocks(int64_t N) { return N > kScanRows ? kTotalsBlocks : 0; }
cudaError_t loss_totals_cuda(const LossTotals& a, Dtype dtype, int blocks, cudaStream_t stream);

/// correct: (N,) int32, whether a sample counts under only_correct.
cudaError_t loss_correct_cuda(const LossGeneral& a, Dtype dtype, int32_t* correct,
                              cudaStream_t stream);

cudaError_t loss_bwd_cuda(const LossBwd& a, Dtype dtype, cudaStream_t stream);
cudaError_t loss_factors_bwd_cuda(const FactorsBwd& a, Dtype dtype, cudaStream_t stream);

cudaError_t rank_fwd_cuda(const LabelFwd& a, cudaStream_t stream);
/// dtype: kFloat32 or kFloat64, of log_mass and out.
cudaError_t label_fwd_cuda(const LabelFwd& a, Dtype dtype, cudaStream_t stream);

// Votes -------------------------------------------------------------------------------------------
//
//   v[n, p] = argmax_c (F[n, p] . W[c] + b[c])
//
// The scores stay in registers or shared memory, tile by tile; device memory holds one pair (score,
// class) per position and split of the classes, and the votes.

/// Why no kernel here serves the problem on the device; null if one does.
const char* vote_refusal(const VoteProblem& problem, const Device& device);

/// The plan of a problem with at least one position, on the current device.
vote::VotePlan plan_vote(const VoteProblem& problem, const Device& device);

/// Args:
///   scratch: plan.bytes bytes of device memory on a 256-byte boundary.
///   tile_counters: plan.tile_counters counters in device memory, 0 before and after.
cudaError_t vote_fwd_cuda(const VoteProblem& problem, const vote::VotePlan& plan, void* scratch,
                          uint32_t* tile_counters, cudaStream_t stream);

namespace vote {

struct MmaArgs;
struct WgmmaProblem;

/// vote_mma_sm80.cu: the product by mma.sync.
cudaError_t launch_mma(const VotePlan& plan, VoteType type, const MmaArgs& args, int64_t blocks,
                       cudaStream_t stream);
/// Bytes of shared memory of a block of it.
int mma_shared_bytes(Kernel kernel);

/// vote_wgmma_sm90.cu: the product by wgmma.
cudaError_t launch_wgmma(const VotePlan& plan, const WgmmaProblem& problem, cudaStream_t stream);
/// Whether this build has that kernel for the current device.
bool wgmma_present();

}  // namespace vote
}  // namespace zipfls::cuda
