// The launchers: they choose kernel and grid, and launch on the given stream of the current device.
// No torch.
//
// Each returns cudaSuccess or what the launch failed with. Pointers are the caller's
// responsibility; how many bytes of scratch a call wants is asked beforehand.
#pragma once

#include <cuda_runtime_api.h>

#include "args.h"

namespace zipfls::cuda {

/// Whether the tables of P votes over C classes fit; more votes are ranked by the caller
/// (loss_dense).
bool tables_fit(int32_t P, int32_t C, Dtype dtype);

/// Blocks of loss_fwd or loss_dense for a call, whose `sums` are (2, blocks) float64.
int loss_blocks(const LossFwd& a, Dtype dtype, bool dense);
cudaError_t loss_fwd_cuda(const LossFwd& a, Dtype dtype, int blocks, cudaStream_t stream);
cudaError_t loss_dense_cuda(const LossFwd& a, Dtype dtype, int blocks, cudaStream_t stream);

/// Blocks of loss_totals, whose partials are (3, blocks) float64; 0: loss_fwd adds the targets up
/// itself.
int totals_blocks(int64_t N);
cudaError_t loss_totals_cuda(const LossTotals& a, Dtype dtype, int blocks, cudaStream_t stream);
cudaError_t loss_correct_cuda(const LossCorrect& a, Dtype dtype, cudaStream_t stream);

/// The same for targets that are probabilities.
int soft_loss_blocks(const SoftLossFwd& s, Dtype dtype);
cudaError_t soft_loss_fwd_cuda(const SoftLossFwd& s, Dtype dtype, int blocks, cudaStream_t stream);
/// correct: (N,) int32, whether a sample counts under only_correct.
cudaError_t soft_correct_cuda(const SoftLossFwd& s, Dtype dtype, int32_t* correct,
                              cudaStream_t stream);

cudaError_t loss_bwd_cuda(const LossBwd& a, Dtype dtype, cudaStream_t stream);

cudaError_t rank_fwd_cuda(const LabelFwd& a, cudaStream_t stream);
/// dtype: kFloat32 or kFloat64, of log_mass and out.
cudaError_t label_fwd_cuda(const LabelFwd& a, Dtype dtype, cudaStream_t stream);

}  // namespace zipfls::cuda
