// Dense votes on a CUDA device: what register_vote.cpp asks for and vote.cu launches. No torch
// header.
//
//   v[n, p] = argmax_c (F[n, p] . W[c] + b[c])
//
// The scores live in registers or shared memory, tile by tile; what reaches device memory is one
// pair (best score, its class) per position and range of classes, and the votes.
#pragma once

#include <cuda_runtime_api.h>

#include "vote_problem.h"

namespace zipfls::cuda {

/// Device memory that vote_fwd_cuda needs besides its arguments.
struct VoteNeeds {
  size_t scratch = 0;    // bytes, on a 256-byte boundary
  int64_t arrivals = 0;  // counters, which are 0 before and after
};
VoteNeeds vote_needs(const VoteProblem& problem, const VoteDevice& device);

/// Why no kernel here serves the problem on the device; null if one does.
const char* vote_refusal(const VoteProblem& problem, const VoteDevice& device);

/// Votes of all positions, on the current device, in the stream's order. Nothing is synchronised.
/// An empty problem (no position) launches nothing. C >= 1; at most 2^31 - 1 classes.
cudaError_t vote_fwd_cuda(const VoteProblem& problem, const VoteDevice& device, void* scratch,
                          uint32_t* arrivals, cudaStream_t stream);

}  // namespace zipfls::cuda
