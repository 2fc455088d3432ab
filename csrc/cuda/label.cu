// Launchers of rank_fwd and label_fwd.
#include "label.cuh"
#include "launch.cuh"

namespace zipfls::cuda {

namespace {

template <class A>
uint32_t table_bytes(int32_t P, int32_t C, bool patches) {
  SmemAllocator smem{nullptr};
  VoteTables<A>::allocate(smem, P, C, patches);
  return smem.used;
}

}  // namespace

bool tables_fit(int32_t P, int32_t C, Dtype dtype) {
  const int64_t slots = C <= kDirectClasses ? C : int64_t{4} * kSlotsPerVote * P;
  if (slots + P > int64_t{kMostTableBytes}) return false;  // and no 32-bit byte count can overflow
  return (dtype == kFloat64 ? table_bytes<double>(P, C, true) : table_bytes<float>(P, C, true)) <=
         kMostTableBytes;
}

cudaError_t rank_fwd_cuda(const LabelFwd& a, cudaStream_t stream) {
  if (a.N == 0) return cudaSuccess;
  const Launch how = {resident_blocks(a.N, kLabelBlock, current_device()), kLabelBlock,
                      table_bytes<float>(a.votes.P, a.C, false)};
  return launch(rank_fwd_kernel, how, stream, a);
}

template <class A>
static cudaError_t label_fwd(const LabelFwd& a, cudaStream_t stream) {
  SmemAllocator smem{nullptr};
  smem.allocate<A>(kLabelBlock / kWarp);
  VoteTables<A>::allocate(smem, a.dense ? 0 : a.votes.P, a.C, false);
  const Launch how = {resident_blocks(a.N, kLabelBlock, current_device()), kLabelBlock, smem.used};
  return launch(label_fwd_kernel<A>, how, stream, a);
}

cudaError_t label_fwd_cuda(const LabelFwd& a, Dtype dtype, cudaStream_t stream) {
  if (a.N == 0) return cudaSuccess;
  return dtype == kFloat64 ? label_fwd<double>(a, stream) : label_fwd<float>(a, stream);
}

}  // namespace zipfls::cuda
