// Dense votes on a CUDA device: what register_vote.cpp asks for and vote.cu launches. No torch
// header.
//
//   v[n, p] = argmax_c (F[n, p] . W[c] + b[c])
//
// The scores live in registers or shared memory, tile by tile; what reaches device memory is one
// pair (best score, its class) per position and range of classes, and the votes.
#pragma once

#include <cuda_runtime_api.h>

#include "vote_plan.h"

namespace zipfls::cuda {

/// Why no kernel here serves the problem on the device; null if one does.
const char* vote_refusal(const VoteProblem& problem, const VoteDevice& device);

/// Kernel, tiles and memory for a problem with at least one position, on the current device.
vote::VotePlan vote_plan(const VoteProblem& problem, const VoteDevice& device);

/// Votes of all positions by its plan, on the current device, in the stream's order. Nothing is
/// synchronised.
///
/// Args:
///   scratch: plan.bytes bytes of device memory on a 256-byte boundary.
///   tile_counters: plan.tile_counters counters in device memory, 0 before and after.
cudaError_t vote_fwd_cuda(const VoteProblem& problem, const vote::VotePlan& plan,
                          const VoteDevice& device, void* scratch, uint32_t* tile_counters,
                          cudaStream_t stream);

}  // namespace zipfls::cuda
