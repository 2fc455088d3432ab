// The launches of a call of the dense votes on the CPU, as a shared library for test_cuda_vote.py.
#include <algorithm>
#include <exception>

// The launchers and their kernels, unchanged.
#include "../../csrc/cuda/vote.cu"
#include "../../csrc/cuda/vote_mma_sm80.cu"
#include "../../csrc/cuda/vote_wgmma_sm90.cu"

using namespace zipfls::cuda;
using namespace zipfls::cuda::vote;

namespace {

std::string message;
/// The launches of the last call, for the test to see what it tested: "pack;wgmma wide;".
std::string journal;

std::string journal_of(const VotePlan& plan) {
  const char* const products[] = {"mma 128",   "mma 64",     "mma map",
                                  "mma patch", "wgmma wide", "wgmma narrow"};
  std::string text;
  for (const void* kernel : sim::launched) {
    if (kernel == reinterpret_cast<const void*>(&vote_slabs_kernel)) {
      text += "pack slabs;";
    } else if (kernel == reinterpret_cast<const void*>(&vote_pack_kernel<uint16_t>) ||
               kernel == reinterpret_cast<const void*>(&vote_pack_kernel<uint32_t>)) {
      text += "pack;";
    } else {
      text += products[static_cast<int>(plan.kernel)];
      text += plan.features == Layout::kMNMajor ? " nchw;" : ";";
    }
  }
  return text;
}

}  // namespace

extern "C" {

/// A problem, in VoteProblem's order, and how to run it.
struct Call {
  int64_t type;
  const void* features;
  int64_t N, H, W, D, stride_n, stride_h, stride_w, stride_d;
  const void* weight;
  int64_t C, weight_stride_c, weight_stride_d;
  const void* bias;
  int64_t bias_stride, upsample;
  int32_t* votes;
  int64_t multiprocessors, wgmma;
  int64_t kernel, images;  // -1: as planned
  int64_t order, late, seed;
};

static VoteProblem problem_of(const Call& call) {
  VoteProblem x;
  x.type = static_cast<VoteType>(call.type);
  x.features = call.features;
  x.N = call.N, x.H = call.H, x.W = call.W, x.D = call.D;
  x.stride_n = call.stride_n, x.stride_h = call.stride_h, x.stride_w = call.stride_w,
  x.stride_d = call.stride_d;
  x.weight = call.weight;
  x.C = call.C, x.weight_stride_c = call.weight_stride_c, x.weight_stride_d = call.weight_stride_d;
  x.bias = call.bias, x.bias_stride = call.bias_stride;
  x.upsample = static_cast<int>(call.upsample);
  x.votes = call.votes;
  return x;
}

static VotePlan plan_of(const Call& call) {
  const VoteProblem x = problem_of(call);
  const Device device = {9, 0, static_cast<int>(call.multiprocessors), 232448};
  VotePlan plan = plan_votes(x, device, call.wgmma != 0);
  if (call.kernel >= 0) plan.kernel = static_cast<Kernel>(call.kernel);
  if (call.images >= 0) plan.images = call.images;
  lay_out(plan, x);
  return plan;
}

const char* vote_message() { return message.c_str(); }
const char* vote_journal() { return journal.c_str(); }

/// 0, or 1 with a message. Scratch holds noise beforehand.
int vote_run(const Call* call) {
  constexpr size_t kGuard = 4096;
  const VotePlan plan = plan_of(*call);
  sim::launched.clear();
  std::vector<char> scratch(plan.bytes + 256 + kGuard, static_cast<char>(0xff));
  char* const first =
      scratch.data() + (256 - reinterpret_cast<uintptr_t>(scratch.data()) % 256) % 256;
  std::vector<uint32_t> counters(static_cast<size_t>(plan.tile_counters) + kGuard);
  std::fill_n(counters.end() - kGuard, kGuard, 77);
  const sim::Schedule::Order orders[] = {sim::Schedule::kAscending, sim::Schedule::kDescending,
                                         sim::Schedule::kLazyWarps};
  sim::schedule = {orders[call->order],
                   call->order == 0 ? sim::Schedule::kOnes : sim::Schedule::kNoise,
                   static_cast<uint64_t>(call->seed), call->late != 0};
  const cudaError_t error = vote_fwd_cuda(problem_of(*call), plan, first, counters.data(), nullptr);
  message = sim::faults();
  journal = journal_of(plan);
  if (error != cudaSuccess) message += "error " + std::to_string(error) + " of a launch\n";
  for (size_t i = 0; i < kGuard; i++) {
    if (first[plan.bytes + i] != static_cast<char>(0xff)) message = "written past the scratch";
    if (counters[counters.size() - kGuard + i] != 77) message = "written past the tile counters";
  }
  for (int64_t i = 0; i < plan.tile_counters; i++)
    if (counters[static_cast<size_t>(i)] != 0 && message.empty())
      message = "a tile counter is not back at 0";
  return message.empty() ? 0 : 1;
}

/// kernel, layout, packs the weight, images a round, tiles of rows, class tiles, splits, scratch
/// bytes.
void vote_plan(const Call* call, int64_t* out) {
  const VotePlan plan = plan_of(*call);
  const VoteShape shape = shape_of(plan, problem_of(*call), plan.images);
  const int64_t values[] = {static_cast<int64_t>(plan.kernel),
                            static_cast<int64_t>(plan.features),
                            plan.pack_weight,
                            plan.images,
                            shape.tiles,
                            shape.tiles_n,
                            shape.splits,
                            static_cast<int64_t>(plan.bytes)};
  std::memcpy(out, values, sizeof values);
}

/// Tiles in the order of the walk: (count, 2) int64.
void vote_tiles(int64_t down, int32_t across, int64_t group, int64_t* out) {
  for (int64_t t = 0; t < down * across; t++) {
    const Tile tile = tile_at(t, down, across, group);
    out[2 * t] = tile.m, out[2 * t + 1] = tile.n;
  }
}

/// How often each of 4 * N * H * W votes is cast when maps are cut into tiles of `rows` positions;
/// -1: a neighbour is not where it should be, or a tile holds too much.
int vote_patches(int64_t N, int32_t H, int32_t W, int32_t rows, int32_t* votes) {
  const Patches cut = cut_maps(H, W, rows);
  const int64_t tiles = ceil_div(N, cut.images) * cut.down * cut.across;
  for (int64_t t = 0; t < tiles; t++) {
    const Patch patch = patch_at(cut, t, N, H, W);
    if (patch.images * patch.h * patch.w > rows) return -1;
    for (int32_t r = 0; r < rows; r++) {
      const Position at = position_at(patch, r);
      if (!in_core(patch, at)) continue;
      for (int32_t dh = -1; dh <= 1; dh++)
        for (int32_t dw = -1; dw <= 1; dw++) {
          const int32_t other = neighbour(patch, at, r, dh, dw, H, W);
          if (other < 0 || other >= rows) return -1;
          const Position there = position_at(patch, other);
          const int32_t h = std::min(std::max(at.h + dh, 0), H - 1),
                        w = std::min(std::max(at.w + dw, 0), W - 1);
          if (there.n != at.n || there.h != h || there.w != w) return -1;
        }
      for (int32_t q = 0; q < 4; q++) votes[upsampled_index(at, H, W, q / 2, q % 2)]++;
    }
  }
  return 0;
}

/// The argmax of fragments: scores (16, 8 * blocks) float, bias (8 * blocks,) -> (16,) classes,
/// through the lanes' accumulators. blocks: 4, 8, 16 or 32.
int vote_fragment(int blocks, const float* scores, const float* bias, int32_t first_class,
                  int32_t* out) {
  const int columns = 8 * blocks;
  for (int row = 0; row < 8; row++) {
    ScoreIndex best[2] = {identity(), identity()};
    for (int lane = 4 * row; lane < 4 * row + 4; lane++) {
      float x[128];
      for (int j = 0; j < blocks; j++)
        for (int half = 0; half < 2; half++)
          for (int e = 0; e < 2; e++)
            x[4 * j + 2 * half + e] =
                scores[(row + 8 * half) * columns + 8 * j + 2 * (lane % 4) + e];
      ScoreIndex mine[2];
      switch (blocks) {
        case 4:
          argmax_of_fragment<4>(x, bias, fragment_column(lane), first_class, mine);
          break;
        case 8:
          argmax_of_fragment<8>(x, bias, fragment_column(lane), first_class, mine);
          break;
        case 16:
          argmax_of_fragment<16>(x, bias, fragment_column(lane), first_class, mine);
          break;
        case 32:
          argmax_of_fragment<32>(x, bias, fragment_column(lane), first_class, mine);
          break;
        default:
          return -1;
      }
      for (int half = 0; half < 2; half++) best[half] = argmax_combine(best[half], mine[half]);
    }
    out[row] = best[0].index, out[row + 8] = best[1].index;
  }
  return 0;
}

/// Every float16 widened: (65536,) float.
void vote_widen(float* out) {
  for (uint32_t x = 0; x < 65536; x++) out[x] = Float16::to_float(static_cast<uint16_t>(x));
}

/// argmax_combine() of every pair: scores (n,) float, indices (n,) -> (n, n) indices.
void vote_argmax_combine(int n, const float* scores, const int32_t* indices, int32_t* out) {
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++)
      out[i * n + j] = argmax_combine({scores[i], indices[i]}, {scores[j], indices[j]}).index;
}

}  // extern "C"
