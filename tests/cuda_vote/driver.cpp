// The vote kernels' own course (csrc/cuda/vote_run.h) on the emulated GPU, as a shared library for
// test_cuda_vote.py.
#include <algorithm>
#include <exception>
#include <numeric>
#include <random>

#include "cuda_on_cpu.h"

#include "vote_run.h"

using namespace zipfls::cuda;
using namespace zipfls::cuda::vote;

#ifndef DRIVER_KERNELS
#define DRIVER_KERNELS -1
#endif

namespace {

/// Kernels to compile, a bit each, and whether of all types: what is planted with a fault needs
/// few.
constexpr bool has(Kernel kernel) { return (DRIVER_KERNELS >> static_cast<int>(kernel) & 1) != 0; }
constexpr bool kAllTypes = DRIVER_KERNELS == -1;

std::string& message() {
  static std::string text;
  return text;
}

/// The launches of the last call, for the test to see what it tested: "pack;wgmma wide;".
std::string& journal() {
  static std::string text;
  return text;
}

struct EmulatedLauncher {
  emulator::Schedule schedule;
  int multiprocessors;

  /// Blocks (or clusters) may run in any order: that of their warps.
  std::vector<int64_t> in_order(int64_t count) {
    std::vector<int64_t> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    if (schedule.order == emulator::Schedule::kDescending) std::reverse(order.begin(), order.end());
    if (schedule.order == emulator::Schedule::kRandom) {
      std::mt19937 random(schedule.seed);
      std::shuffle(order.begin(), order.end(), random);
    }
    return order;
  }
  void blocks_of(int64_t blocks, int threads, size_t shared,
                 const std::function<void(int64_t, int, char*)>& body) {
    for (const int64_t block : in_order(blocks)) {
      emulator::run_cluster(schedule, 1, threads, shared,
                            [&](int, int thread) { body(block, thread, emulator::block().arena); });
      schedule.seed++;
    }
  }

  template <class T>
  bool pack_as(const PackArgs& args, int64_t blocks) {
    blocks_of(blocks, kPackThreads, sizeof(PackShared<T>),
              [&](int64_t block, int thread, char* shared) {
                pack_rows<T>(args, block, thread, *reinterpret_cast<PackShared<T>*>(shared));
              });
    return true;
  }
  bool pack(const PackArgs& args, int64_t size, int64_t blocks) {
    journal() += "pack;";
    return size == 4 ? pack_as<uint32_t>(args, blocks) : pack_as<uint16_t>(args, blocks);
  }
  bool slabs(const PackArgs& args, int64_t blocks) {
    journal() += "pack slabs;";
    blocks_of(blocks, kPackThreads, sizeof(SlabShared),
              [&](int64_t block, int thread, char* shared) {
                pack_slabs(args, block, thread, *reinterpret_cast<SlabShared*>(shared));
              });
    return true;
  }

  template <class Config>
  bool mma_as(const MmaArgs& args, int64_t blocks) {
    blocks_of(blocks, Config::kThreads, Config::kSharedBytes,
              [&](int64_t block, int thread, char* shared) {
                vote_mma<Config>(args, block, thread, shared);
              });
    return true;
  }
  template <class Element, Major kMajor>
  bool mma_of(Kernel kernel, const MmaArgs& args, int64_t blocks) {
    if constexpr (has(Kernel::kMma))
      if (kernel == Kernel::kMma)
        return mma_as<MmaConfig<Element, kTileM, kTileN, kWarpsM, kWarpsN, kMajor, false>>(args,
                                                                                           blocks);
    if constexpr (has(Kernel::kMmaFew))
      if (kernel == Kernel::kMmaFew)
        return mma_as<MmaConfig<Element, kSmallTileM, kTileN, kWarpsM, kWarpsN, kMajor, false>>(
            args, blocks);
    if constexpr (has(Kernel::kMmaSmallMap))
      if (kernel == Kernel::kMmaSmallMap)
        return mma_as<MmaConfig<Element, kSmallMapTileM, kSmallMapTileN, 2, kUpsampleWarps / 2,
                                kMajor, true>>(args, blocks);
    if constexpr (has(Kernel::kMmaPatch) && kMajor == Major::kK)
      if (kernel == Kernel::kMmaPatch)
        return mma_as<
            MmaConfig<Element, kPatchTileM, kPatchTileN, 4, kUpsampleWarps / 4, kMajor, true>>(
            args, blocks);
    throw emulator::Fault("no such kernel");
  }
  bool mma(Kernel kernel, VoteType type, Layout layout, const MmaArgs& args, int64_t blocks) {
    const bool by_position = layout == Layout::kMNMajor;
    const char* const names[] = {"128", "64", "map", "patch"};
    journal() +=
        std::string("mma ") + names[static_cast<int>(kernel)] + (by_position ? " nchw;" : ";");
    if constexpr (kAllTypes) {
      if (type == VoteType::kFloat16)
        return by_position ? mma_of<Float16, Major::kMN>(kernel, args, blocks)
                           : mma_of<Float16, Major::kK>(kernel, args, blocks);
      if (type == VoteType::kTensorFloat32 && !by_position)
        return mma_of<TensorFloat32, Major::kK>(kernel, args, blocks);
      if (type == VoteType::kBFloat16 && by_position)
        return mma_of<BFloat16, Major::kMN>(kernel, args, blocks);
    }
    if (type == VoteType::kBFloat16 && !by_position)
      return mma_of<BFloat16, Major::kK>(kernel, args, blocks);
    throw emulator::Fault("no such kernel");
  }

  template <class Config>
  bool wgmma_as(const WgmmaProblem& problem) {
    const WgmmaArgs args = wgmma_args<Config>(problem);
    const int64_t blocks = wgmma_blocks<Config>(args, multiprocessors);
    const int64_t size = element_size(problem.type);
    const auto map = [&](const void* at, int64_t rows, int64_t stride) {
      if (reinterpret_cast<uintptr_t>(at) % 16 != 0 || stride % 16 != 0)
        throw emulator::Fault("no tensor map");
      return ptx::TensorMap{static_cast<const char*>(at), rows, stride, problem.D * size,
                            static_cast<int>(size)};
    };
    const ptx::TensorMap features = map(problem.features, problem.results.rows, problem.row_stride);
    const ptx::TensorMap weight = map(problem.weight, problem.C, problem.weight_stride);
    constexpr size_t kStatic = (sizeof(WgmmaShared<Config>) + 15) / 16 * 16;
    for (const int64_t cluster : in_order(blocks / Config::kCluster)) {
      emulator::run_cluster(schedule, Config::kCluster, Config::kThreads,
                            kStatic + Config::kSharedBytes, [&](int rank, int thread) {
                              char* const arena = emulator::block().arena;
                              vote_wgmma<Config>(args, &features, &weight,
                                                 cluster * Config::kCluster + rank, blocks, thread,
                                                 *reinterpret_cast<WgmmaShared<Config>*>(arena),
                                                 arena + kStatic);
                            });
      schedule.seed++;
    }
    return true;
  }
  template <class Element>
  bool wgmma_of(Kernel kernel, const WgmmaProblem& problem) {
    if constexpr (has(Kernel::kWgmmaWide))
      if (kernel == Kernel::kWgmmaWide) return wgmma_as<WideConfig<Element>>(problem);
    if constexpr (has(Kernel::kWgmmaNarrow))
      if (kernel == Kernel::kWgmmaNarrow) return wgmma_as<NarrowConfig<Element>>(problem);
    throw emulator::Fault("no such kernel");
  }
  bool wgmma(Kernel kernel, const WgmmaProblem& problem) {
    journal() += kernel == Kernel::kWgmmaWide ? "wgmma wide;" : "wgmma narrow;";
    if constexpr (kAllTypes) {
      if (problem.type == VoteType::kFloat16) return wgmma_of<Float16>(kernel, problem);
      if (problem.type == VoteType::kTensorFloat32) return wgmma_of<TensorFloat32>(kernel, problem);
    }
    if (problem.type == VoteType::kBFloat16) return wgmma_of<BFloat16>(kernel, problem);
    throw emulator::Fault("no such kernel");
  }
};

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
  const VoteDevice device = {9, 0, static_cast<int>(call.multiprocessors), 232448};
  VotePlan plan = plan_votes(x, device, call.wgmma != 0);
  if (call.kernel >= 0) plan.kernel = static_cast<Kernel>(call.kernel);
  if (call.images >= 0) plan.images = call.images;
  lay_out(plan, x, device.multiprocessors);
  return plan;
}

const char* vote_message() { return message().c_str(); }
const char* vote_journal() { return journal().c_str(); }

/// 0, or 1 with a message. Scratch holds noise beforehand.
int vote_run(const Call* call) {
  try {
    journal().clear();
    const VotePlan plan = plan_of(*call);
    constexpr size_t kGuard = 4096;
    std::vector<char> scratch(plan.bytes + 256 + kGuard, static_cast<char>(0xff));
    char* const first =
        scratch.data() + (256 - reinterpret_cast<uintptr_t>(scratch.data()) % 256) % 256;
    std::vector<uint32_t> counters(static_cast<size_t>(plan.tile_counters) + kGuard);
    std::fill_n(counters.end() - kGuard, kGuard, 77);
    EmulatedLauncher launcher = {{static_cast<emulator::Schedule::Order>(call->order),
                                  call->late != 0, static_cast<unsigned>(call->seed)},
                                 static_cast<int>(call->multiprocessors)};
    run_votes(launcher, plan, problem_of(*call), launcher.multiprocessors, first, counters.data());
    for (size_t i = 0; i < kGuard; i++) {
      if (first[plan.bytes + i] != static_cast<char>(0xff))
        throw emulator::Fault("written past the scratch");
      if (counters[counters.size() - kGuard + i] != 77)
        throw emulator::Fault("counted past the counters");
    }
    for (int64_t i = 0; i < plan.tile_counters; i++)
      if (counters[static_cast<size_t>(i)] != 0)
        throw emulator::Fault("a tile counter is not back at 0");
    return 0;
  } catch (const std::exception& error) {
    message() = error.what();
    return 1;
  }
}

/// kernel, layout, packs the weight, images a round, tiles of rows, class tiles, splits, scratch
/// bytes.
void vote_plan(const Call* call, int64_t* out) {
  const VotePlan plan = plan_of(*call);
  const VoteShape shape =
      shape_of(plan, problem_of(*call), plan.images, static_cast<int>(call->multiprocessors));
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
