// The launches of one call of the dense votes, all in the caller's stream: packing of weights and
// features where their layout needs it, and the product with its argmax; in rounds where the packed
// features would be large. Channels-last features take one launch.
#include <atomic>

#include "launch.cuh"
#include "vote_mma_sm80.cuh"
#include "vote_pack.cuh"
#include "vote_wgmma_sm90.cuh"

namespace zipfls::cuda {
namespace vote {
namespace {

template <class T>
ZIPFLS_KERNEL(kPackThreads)
vote_pack_kernel(const PackArgs args) {
  ZIPFLS_SHARED(PackShared<T>, shared);
  pack_rows<T>(args, blockIdx.x, static_cast<int>(threadIdx.x), shared);
}

ZIPFLS_KERNEL(kPackThreads) vote_slabs_kernel(const PackArgs args) {
  ZIPFLS_SHARED(SlabShared, shared);
  pack_slabs(args, blockIdx.x, static_cast<int>(threadIdx.x), shared);
}

/// rows (N, H, W, D) at args.from -> (N * H * W, pitch)
cudaError_t pack(PackArgs args, int64_t size, cudaStream_t stream) {
  args.channel_tiles = ceil_div(args.D, kPackTile);
  if (in_slabs(args, size))
    return launch(vote_slabs_kernel, {args.N * args.channel_tiles, kPackThreads}, stream, args);
  const auto kernel = size == 4 ? vote_pack_kernel<uint32_t> : vote_pack_kernel<uint16_t>;
  const int64_t row_tiles = ceil_div(args.N * args.H * args.W, kPackTile);
  return launch(kernel, {row_tiles * args.channel_tiles, kPackThreads}, stream, args);
}

/// The product of the problem's images, features and weight in their final layout.
cudaError_t launch_product(const VotePlan& plan, const VoteProblem& x, char* scratch,
                           uint32_t* tile_counters, cudaStream_t stream) {
  const int64_t size = element_size(x.type);
  const VoteShape shape = shape_of(plan, x, x.N);
  Results results = {};
  results.votes = x.votes;
  results.map = shape.map;
  results.rows = shape.rows;
  results.splits = shape.splits;
  results.pairs = reinterpret_cast<ScoreIndex*>(scratch + plan.pairs_at);
  results.tile_counters = tile_counters;
  if (plan.kernel == Kernel::kWgmmaWide || plan.kernel == Kernel::kWgmmaNarrow) {
    WgmmaProblem product = {};
    product.type = x.type;
    product.features = x.features;
    product.row_stride = flat_rows(x).stride * size;
    product.weight = x.weight;
    product.C = x.C;
    product.weight_stride = (x.C > 1 ? x.weight_stride_c : plan.weight_pitch) * size;
    product.D = x.D;
    product.bias = x.bias;
    product.bias_stride = x.bias_stride;
    product.results = results;
    return launch_wgmma(plan, product, stream);
  }
  const bool plain_rows = x.upsample == 1 && plan.features != Layout::kMNMajor;
  const void* const unread = x.votes;  // without channels: an address for copies of 0 bytes
  MmaArgs args = {};
  args.features = static_cast<const char*>(x.D == 0 ? unread : x.features);
  args.weight = static_cast<const char*>(x.D == 0 ? unread : x.weight);
  args.bias = x.bias;
  args.bias_stride = x.bias_stride;
  args.stride_n = x.stride_n * size;
  args.stride_h = x.stride_h * size;
  args.stride_w = (plain_rows ? flat_rows(x).stride : x.W > 1 ? x.stride_w : 1) * size;
  args.stride_d = x.stride_d * size;
  args.weight_stride = x.weight_stride_c * size;
  args.channel_bytes = x.D * size;
  args.N = x.N;
  args.D = x.D;
  args.H = static_cast<int32_t>(x.H);
  args.W = static_cast<int32_t>(x.W);
  args.C = static_cast<int32_t>(x.C);
  args.tiles_n = shape.tiles_n;
  args.tiles_per_split = shape.tiles_per_split;
  args.patches = shape.patches;
  args.results = results;
  return launch_mma(plan, x.type, args, shape.tiles * shape.splits, stream);
}

/// Whether the current device runs the wgmma kernels: the same for all devices of that capability.
bool uses_wgmma(const Device& device) {
  static std::atomic<bool> present = false;
  if (device.major != 9 || device.minor != 0) return false;
  if (!present) present = wgmma_present();
  return present;
}

}  // namespace
}  // namespace vote

const char* vote_refusal(const VoteProblem& x, const Device& device) {
  if (device.major < 8) return "it needs compute capability 8.0";
  if (device.shared_per_block < vote::mma_shared_bytes(vote::Kernel::kMmaSmallMap))
    return "it needs more shared memory than a block may have on this device";
  if (x.C > INT32_MAX / 2) return "it takes at most 2^30 classes";
  if (x.H > INT32_MAX / 8 || x.W > INT32_MAX / 8)
    return "it takes at most 2^28 positions in a row or column";
  if (x.D > INT32_MAX / 2) return "it takes at most 2^30 channels";
  return nullptr;
}

vote::VotePlan plan_vote(const VoteProblem& x, const Device& device) {
  return vote::plan_votes(x, device, vote::uses_wgmma(device));
}

cudaError_t vote_fwd_cuda(const VoteProblem& problem, const vote::VotePlan& plan, void* scratch,
                          uint32_t* tile_counters, cudaStream_t stream) {
  using namespace vote;
  const int64_t size = element_size(problem.type);
  char* const memory = static_cast<char*>(scratch);
  VoteProblem x = problem;
  if (plan.pack_weight) {
    PackArgs args = {};
    args.from = x.weight;
    args.to = memory + plan.weight_at;
    args.N = x.C, args.H = 1, args.W = 1, args.D = x.D;
    args.pitch = plan.weight_pitch;
    args.stride_n = x.weight_stride_c, args.stride_d = x.weight_stride_d;
    args.by_position = x.weight_stride_c < x.weight_stride_d;
    const cudaError_t error = pack(args, size, stream);
    if (error != cudaSuccess) return error;
    x.weight = args.to;
    x.weight_stride_c = plan.weight_pitch, x.weight_stride_d = 1;
  }
  if (plan.features != Layout::kPacked)
    return launch_product(plan, x, memory, tile_counters, stream);

  for (int64_t n = 0; n < problem.N; n += plan.images) {
    PackArgs args = {};
    args.from = static_cast<const char*>(problem.features) + n * problem.stride_n * size;
    args.to = memory + plan.features_at;
    args.N = std::min(plan.images, problem.N - n);
    args.H = x.H, args.W = x.W, args.D = x.D;
    args.pitch = plan.row_pitch;
    args.stride_n = problem.stride_n, args.stride_h = problem.stride_h;
    args.stride_w = problem.stride_w, args.stride_d = problem.stride_d;
    args.by_position = (x.W > 1 ? problem.stride_w : problem.stride_h) < problem.stride_d;
    cudaError_t error = pack(args, size, stream);
    if (error != cudaSuccess) return error;
    x.N = args.N;
    x.features = args.to;
    x.stride_d = 1, x.stride_w = plan.row_pitch;
    x.stride_h = x.W * x.stride_w, x.stride_n = x.H * x.stride_h;
    x.votes = problem.votes + n * x.H * x.W * x.upsample * x.upsample;
    error = launch_product(plan, x, memory, tile_counters, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace zipfls::cuda
