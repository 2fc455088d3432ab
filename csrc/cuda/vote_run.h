// The course of one call: pack what needs it, multiply; in rounds where packed features are large.
//
// A template over who launches, so that the tests take the same course on the CPU. A launcher has
//   pack(PackArgs, element size, blocks)
//   slabs(PackArgs, blocks)
//   mma(Kernel, VoteType, Layout, MmaArgs, blocks)
//   wgmma(Kernel, WgmmaProblem)
// each of which returns false to stop.
#pragma once

#include "vote_pack.cuh"
#include "vote_plan.h"
#include "vote_mma_sm80.cuh"
#include "vote_wgmma_sm90.cuh"

namespace zipfls::cuda::vote {

/// rows (N, H, W, D) at x.from -> (N * H * W, pitch)
template <class Launcher>
bool pack(Launcher& launcher, PackArgs args, int64_t size) {
  args.channel_tiles = ceil_div(args.D, kPackTile);
  if (in_slabs(args, size)) return launcher.slabs(args, args.N * args.channel_tiles);
  return launcher.pack(args, size,
                       ceil_div(args.N * args.H * args.W, kPackTile) * args.channel_tiles);
}

/// The product of the problem's images, features and weight in their final layout.
template <class Launcher>
bool multiply(Launcher& launcher, const VotePlan& plan, const VoteProblem& x, int multiprocessors,
              char* scratch, uint32_t* tile_counters) {
  const int64_t size = element_size(x.type);
  const bool plain_rows = x.upsample == 1 && plan.features != Layout::kMNMajor;
  const VoteShape shape = shape_of(plan, x, x.N, multiprocessors);
  const Results results = {x.votes,
                           shape.map,
                           shape.rows,
                           shape.splits,
                           reinterpret_cast<ScoreIndex*>(scratch + plan.pairs_at),
                           tile_counters};
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
    return launcher.wgmma(plan.kernel, product);
  }
  const void* const nowhere = x.votes;  // an address that copies of no bytes may be given
  MmaArgs args = {};
  args.features = static_cast<const char*>(x.D == 0 ? nowhere : x.features);
  args.weight = static_cast<const char*>(x.D == 0 ? nowhere : x.weight);
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
  return launcher.mma(plan.kernel, x.type, plan.features, args, shape.tiles * shape.splits);
}

/// The whole call. tile_counters: plan.tile_counters counters, 0 before and after.
template <class Launcher>
bool run_votes(Launcher& launcher, const VotePlan& plan, const VoteProblem& problem,
               int multiprocessors, char* scratch, uint32_t* tile_counters) {
  const int64_t size = element_size(problem.type);
  VoteProblem x = problem;
  if (plan.pack_weight) {
    PackArgs args = {};
    args.from = x.weight;
    args.to = scratch + plan.weight_at;
    args.N = x.C, args.H = 1, args.W = 1, args.D = x.D;
    args.pitch = plan.weight_pitch;
    args.stride_n = x.weight_stride_c, args.stride_d = x.weight_stride_d;
    args.by_position = x.weight_stride_c < x.weight_stride_d;
    if (!pack(launcher, args, size)) return false;
    x.weight = args.to;
    x.weight_stride_c = plan.weight_pitch, x.weight_stride_d = 1;
  }
  if (plan.features != Layout::kPacked)
    return multiply(launcher, plan, x, multiprocessors, scratch, tile_counters);

  for (int64_t n = 0; n < problem.N; n += plan.images) {
    PackArgs args = {};
    args.from = static_cast<const char*>(problem.features) + n * problem.stride_n * size;
    args.to = scratch + plan.features_at;
    args.N = std::min(plan.images, problem.N - n);
    args.H = x.H, args.W = x.W, args.D = x.D;
    args.pitch = plan.row_pitch;
    args.stride_n = problem.stride_n, args.stride_h = problem.stride_h;
    args.stride_w = problem.stride_w, args.stride_d = problem.stride_d;
    args.by_position = (x.W > 1 ? problem.stride_w : problem.stride_h) < problem.stride_d;
    if (!pack(launcher, args, size)) return false;
    x.N = args.N;
    x.features = args.to;
    x.stride_d = 1, x.stride_w = plan.row_pitch;
    x.stride_h = x.W * x.stride_w, x.stride_n = x.H * x.stride_h;
    x.votes = problem.votes + n * x.H * x.W * x.upsample * x.upsample;
    if (!multiply(launcher, plan, x, multiprocessors, scratch, tile_counters)) return false;
  }
  return true;
}

}  // namespace zipfls::cuda::vote
