// The loss or the vote kernels behind a plain C function, for tune.py: without torch, so that a
// variant of them compiles in seconds. Compiled with TUNE_LOSS or TUNE_VOTE defined.
#include "launch.h"

using namespace zipfls::cuda;

#ifdef TUNE_LOSS

/// A mean loss over bfloat16 logits with its gradient; tune.py's Problem._loss makes the arguments.
extern "C" int tune_run(const void* logits,     // (N, C) bfloat16
                        const int64_t* target,  // (N,)
                        const int32_t* votes,   // (N, P)
                        const float* log_mass,  // (min(P, C) + 1,) by rank
                        int64_t N, int64_t C, int64_t P,
                        float* parts,            // (3,) loss, ce, zipf
                        void* grad,              // (N, C) bfloat16
                        double* scratch,         // sums of every block, and of loss_totals
                        uint32_t* tile_counter,  // (1,), 0
                        cudaStream_t stream) {
  LossGeneral a = {};
  a.logits = logits;
  a.logits_stride = C;
  a.target = target;
  a.votes = {votes, P, static_cast<int32_t>(P), false};
  a.log_mass = log_mass;
  a.N = N;
  a.C = static_cast<int32_t>(C);
  a.ignore_index = -100;
  a.ce = a.zipf = true;
  a.ce_weight = a.zipf_weight = 1;
  a.reduction = kMean;
  a.loss = parts;
  a.ce_out = parts + 1;
  a.zipf_out = parts + 2;
  a.grad = grad;
  a.tile_counter = tile_counter;
  a.denominators = {a.target, nullptr, nullptr, nullptr, 0, a.N, a.C, a.ignore_index};
  if (const int blocks = totals_blocks(a.N); blocks > 0) {
    const cudaError_t error =
        loss_totals_cuda({a.denominators, scratch}, kBFloat16, blocks, stream);
    if (error != cudaSuccess) return error;
    a.denominators.partials = scratch;
    a.denominators.num_partials = blocks;
    scratch += 3 * blocks;
  }
  a.sums = scratch;
  return loss_fwd_cuda(a, kBFloat16, plan_loss(a, kBFloat16, current_device()), stream);
}

#endif

#ifdef TUNE_VOTE

/// Votes of a bfloat16 map; tune.py's Problem._vote makes the arguments.
extern "C" int tune_run(const void* features,  // (N, D, H, W), strides below
                        int64_t N, int64_t D, int64_t H, int64_t W, int64_t stride_n,
                        int64_t stride_d, int64_t stride_h, int64_t stride_w,
                        const void* weight,  // (C, D), contiguous
                        int64_t C,
                        int32_t* votes,                             // (N, H * W)
                        void* scratch, int64_t bytes,               // room
                        uint32_t* tile_counters, int64_t counters,  // how many, all 0
                        cudaStream_t stream) {
  VoteProblem x;
  x.features = features;
  x.N = N, x.D = D, x.H = H, x.W = W;
  x.stride_n = stride_n, x.stride_d = stride_d;
  x.stride_h = stride_h, x.stride_w = stride_w;
  x.weight = weight;
  x.C = C, x.weight_stride_c = D, x.weight_stride_d = 1;
  x.votes = votes;
  const vote::VotePlan plan = plan_vote(x, current_device());
  if (plan.bytes > static_cast<size_t>(bytes) || plan.tile_counters > counters)
    return cudaErrorMemoryAllocation;
  return vote_fwd_cuda(x, plan, scratch, tile_counters, stream);
}

#endif
