// The loss or the vote kernels behind a plain C interface, for tune.py: without torch, so that a
// variant of them compiles in seconds. Compiled with TUNE_LOSS or TUNE_VOTE defined.
#include "launch.h"

#ifdef TUNE_LOSS

extern "C" {

/// A mean loss over bfloat16 logits with its gradient; tune.py has the same structure.
struct LossCall {
  const void* logits;     // (N, C) bfloat16
  const int64_t* target;  // (N,)
  const int32_t* votes;   // (N, P)
  const float* log_mass;  // (min(P, C) + 1,) by rank
  int64_t N, C, P;
  float* parts;            // (3,) loss, ce, zipf
  void* grad;              // (N, C) bfloat16, or null
  double* scratch;         // room for the sums of every block, and for loss_totals
  uint32_t* tile_counter;  // (1,), 0
};

static_assert(sizeof(LossCall) == TUNE_CALL_BYTES, "tune.py has another structure");

int tune_run(const LossCall* call, cudaStream_t stream) {
  using namespace zipfls::cuda;
  LossGeneral a = {};
  a.logits = call->logits;
  a.logits_stride = call->C;
  a.target = call->target;
  a.votes = {call->votes, call->P, static_cast<int32_t>(call->P), false};
  a.log_mass = call->log_mass;
  a.N = call->N;
  a.C = static_cast<int32_t>(call->C);
  a.ignore_index = -100;
  a.ce = a.zipf = true;
  a.ce_weight = a.zipf_weight = 1;
  a.reduction = kMean;
  a.loss = call->parts;
  a.ce_out = call->parts + 1;
  a.zipf_out = call->parts + 2;
  a.grad = call->grad;
  a.tile_counter = call->tile_counter;
  a.denominators = {a.target, nullptr, nullptr, nullptr, 0, a.N, a.C, a.ignore_index};
  double* scratch = call->scratch;
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

}  // extern "C"
#endif

#ifdef TUNE_VOTE

extern "C" {

/// Votes of a bfloat16 map; tune.py has the same structure.
struct VoteCall {
  const void* features;  // (N, D, H, W), strides below
  int64_t N, D, H, W, stride_n, stride_d, stride_h, stride_w;
  const void* weight;  // (C, D), contiguous
  int64_t C;
  int32_t* votes;  // (N, H * W)
  void* scratch;   // of `room` bytes
  int64_t room;
  uint32_t* tile_counters;  // `counters` of them, 0
  int64_t counters;
};

static_assert(sizeof(VoteCall) == TUNE_CALL_BYTES, "tune.py has another structure");

int tune_run(const VoteCall* call, cudaStream_t stream) {
  using namespace zipfls::cuda;
  VoteProblem x;
  x.features = call->features;
  x.N = call->N, x.D = call->D, x.H = call->H, x.W = call->W;
  x.stride_n = call->stride_n, x.stride_d = call->stride_d;
  x.stride_h = call->stride_h, x.stride_w = call->stride_w;
  x.weight = call->weight;
  x.C = call->C, x.weight_stride_c = call->D, x.weight_stride_d = 1;
  x.votes = call->votes;
  const vote::VotePlan plan = plan_vote(x, current_device());
  if (plan.bytes > static_cast<size_t>(call->room) || plan.tile_counters > call->counters)
    return cudaErrorMemoryAllocation;
  return vote_fwd_cuda(x, plan, call->scratch, call->tile_counters, stream);
}

}  // extern "C"
#endif
