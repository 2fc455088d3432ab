// What a mean divides by, and the sums of the losses over rows and blocks.
//
// Where one block cannot add up all targets beside its rows, loss_totals_kernel does so before.
#pragma once

#include "device.cuh"
#include "tuning.h"

namespace zipfls::cuda {

// Denominators ------------------------------------------------------------------------

/// Factors of the sums in the losses, and in the gradient (with ce_weight and zipf_weight).
template <class A>
struct Scales {
  A ce, zipf, ce_step, zipf_step;
};

constexpr int kMostRows = kSmallBlock / 8;  // of a block at a time

/// Shared memory of a block, beside that of its rows.
template <class A>
struct BlockArea {
  double* partial;    // (3, 32) float64: of each warp
  double* sums;       // (2, 16) float64: losses of the rows that each group of threads has finished
  Scales<A>* scales;  // (1,)

  ZIPFLS_HOST_DEVICE static BlockArea allocate(SmemAllocator& smem) {
    BlockArea block;
    block.partial = smem.allocate<double>(3 * kWarp);
    block.sums = smem.allocate<double>(2 * kMostRows);
    block.scales = smem.allocate<Scales<A>>(1);
    return block;
  }
};

/// Sums over a stride of samples.
struct Totals {
  double ce = 0;       // the targets' class weights
  double kept = 0;     // samples not ignored
  double counted = 0;  // samples that count in the Zipf part

  /// With WARP, `kept` and `counted` are then the warp's, in each of its lanes.
  template <class A, bool WARP = false>
  ZIPFLS_DEVICE void add_targets(const Denominators& d, int64_t first, int64_t step) {
    int32_t kept_here = 0, counted_here = 0;
#pragma unroll 1
    for (int64_t i = first; i < d.N; i += step) {
      const int64_t y = d.target[i];
      if (y == d.ignore_index) continue;
      kept_here++;
      if (d.weight != nullptr) {
        const int64_t c = y < 0      ? 0
                          : y >= d.C ? d.C - 1
                                     : y;  // out of range: the row is NaN anyway
        ce += static_cast<double>(static_cast<const A*>(d.weight)[c]);
      }
      if (d.correct != nullptr) counted_here += d.correct[i];
    }
    if constexpr (WARP) {
      kept_here = warp_reduce_sum<kWarp>(kept_here);
      if (d.correct != nullptr) counted_here = warp_reduce_sum<kWarp>(counted_here);
    }
    kept = kept_here;
    counted = counted_here;
  }

  /// The block's sums, for thread 0, in a fixed order. Without weights, and where all samples
  /// count, `kept` is the other sums too. partial: (3, 32) float64 in shared memory. any: whether
  /// one of the warp's threads has a sample. counts: whether `kept` and `counted` are yet to be
  /// summed up over the warp.
  ZIPFLS_DEVICE void reduce(double* partial, bool weighted, bool some_count, bool any,
                            bool counts = true) {
    if (any && weighted) ce = warp_reduce_sum<kWarp>(ce);
    if (any && counts) {
      kept = warp_reduce_sum<kWarp>(kept);
      if (some_count) counted = warp_reduce_sum<kWarp>(counted);
    }
    if (threadIdx.x % kWarp == 0) {
      double* const mine = partial + threadIdx.x / kWarp;
      mine[0] = kept;
      if (weighted) mine[kWarp] = ce;
      if (some_count) mine[2 * kWarp] = counted;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
#pragma unroll 1
    for (uint32_t w = 1; w < blockDim.x / kWarp; w++) {
      kept += partial[w];
      if (weighted) ce += partial[kWarp + w];
      if (some_count) counted += partial[2 * kWarp + w];
    }
    if (!weighted) ce = kept;
    if (!some_count) counted = kept;
  }
};

/// Partial sums of the denominators, (3, blocks) float64, in a fixed order.
///
/// - Bytes: 8 a sample (and 4 where only some count). 256 threads, samples by grid stride, float64
///   sums.
template <class A>
ZIPFLS_KERNEL(kTotalsBlock)
loss_totals_kernel(LossTotals a) {
  ZIPFLS_DYNAMIC_SHARED(shared, 16);
  SmemAllocator smem{shared};
  const auto block = BlockArea<A>::allocate(smem);
  Totals totals;
  totals.template add_targets<A>(a.of, int64_t{blockIdx.x} * blockDim.x + threadIdx.x,
                                 int64_t{gridDim.x} * blockDim.x);
  totals.reduce(block.partial, a.of.weight != nullptr, a.of.correct != nullptr, true);
  if (threadIdx.x == 0) {
    a.partials[blockIdx.x] = totals.ce;
    a.partials[gridDim.x + blockIdx.x] = totals.kept;
    a.partials[2 * gridDim.x + blockIdx.x] = totals.counted;
  }
}

/// The block's scales to shared memory, from its threads' shares of the totals (read for a mean
/// alone; any: Totals::reduce), and for a float16 mean grad_scale. Ends with a barrier.
///
/// A float16 gradient that is divided by N before GradScaler's scale multiplies it becomes 0: it is
/// stored without the denominator, which backward applies.
template <class A>
ZIPFLS_DEVICE void publish_scales(const LossFwd& a, const BlockArea<A>& block, Totals totals,
                                  bool any = true, bool counts = true) {
  Scales<A> scales = {1, 1, 0, 0};
  A later = 1;
  if (threadIdx.x < 2 * kMostRows) block.sums[threadIdx.x] = 0;
  if (a.reduction == kMean) {
    totals.reduce(block.partial, a.denominators.weight != nullptr, a.correct != nullptr, any,
                  counts);
    if (threadIdx.x == 0) {
      scales.ce = totals.ce == 0 ? static_cast<A>(NAN) : A(1) / static_cast<A>(totals.ce);
      // No sample is correct: the Zipf part is 0. No sample at all: NaN, by 0 times infinity.
      const bool none_correct = totals.kept > 0 && totals.counted == 0;
      scales.zipf = none_correct ? A(0) : A(1) / static_cast<A>(totals.counted);
    }
  }
  if (threadIdx.x == 0) {
    if (a.scaled) {
      later = a.ce ? scales.ce : scales.zipf;
      const bool usable =
          later != 0 && ::fabs(static_cast<double>(later)) < INFINITY;  // not NaN either
      later = usable ? later : A(1);
      if (blockIdx.x == 0) *static_cast<A*>(a.grad_scale) = later;
    }
    scales.ce_step = static_cast<A>(a.ce_weight) * (scales.ce / later);
    scales.zipf_step = static_cast<A>(a.zipf_weight) * (scales.zipf / later);
    *block.scales = scales;
  }
  __syncthreads();
}

/// publish_scales of the denominators.
template <class A>
ZIPFLS_DEVICE void mean_scales(const LossFwd& a, const BlockArea<A>& block) {
  Totals totals;
  bool any = true;
  if (a.reduction == kMean) {
    const Denominators& d = a.denominators;
    any = static_cast<int64_t>(threadIdx.x / kWarp * kWarp) <
          (d.partials != nullptr ? d.num_partials : d.N);
    if (d.partials != nullptr) {
#pragma unroll 1
      for (int32_t k = threadIdx.x; k < d.num_partials; k += blockDim.x) {
        totals.kept += d.partials[d.num_partials + k];
        if (d.weight != nullptr) totals.ce += d.partials[k];
        if (d.correct != nullptr) totals.counted += d.partials[2 * d.num_partials + k];
      }
    } else {
      if (any) totals.template add_targets<A, true>(d, threadIdx.x, blockDim.x);
    }
  }
  publish_scales(a, block, totals, any, a.denominators.partials != nullptr);
}

/// Sums of the rows' losses: over the block, then over all blocks by the block that arrives last,
/// in a fixed order: results repeat bitwise although the last block varies.
///
/// Hazard: the last block reads what others stored. Each stores, fences, then increments the
/// counter; the last one has read all increments, fences, and reads from L2 (L1 may hold older
/// lines).
template <class A>
ZIPFLS_DEVICE void combine_losses(const LossFwd& a, const BlockArea<A>& block) {
  if (a.reduction == kNone) return;
  __syncthreads();  // the rows' sums are complete
  if (threadIdx.x >= kWarp) return;
  const uint32_t lane = threadIdx.x;
  double ce = warp_reduce_sum<kMostRows>(block.sums[lane % kMostRows]);
  double zipf = warp_reduce_sum<kMostRows>(block.sums[kMostRows + lane % kMostRows]);
  uint32_t arrived = 0;
  if (lane == 0) {
    a.sums[blockIdx.x] = ce;
    a.sums[gridDim.x + blockIdx.x] = zipf;
    __threadfence();
    arrived = atomicAdd(a.tile_counter, 1u);
  }
  if (__shfl_sync(kAllLanes, arrived, 0) != gridDim.x - 1) return;
  __syncwarp(kAllLanes);
  __threadfence();
  ce = 0;
  zipf = 0;
#pragma unroll 4
  for (uint32_t k = lane; k < gridDim.x; k += kWarp) {
    ce += __ldcg(a.sums + k);
    zipf += __ldcg(a.sums + gridDim.x + k);
  }
  ce = warp_reduce_sum<kWarp>(ce);
  zipf = warp_reduce_sum<kWarp>(zipf);
  if (lane != 0) return;
  A ce_total = static_cast<A>(ce), zipf_total = static_cast<A>(zipf);
  if (a.reduction == kMean) {
    if (a.ce) ce_total *= block.scales->ce;
    if (a.zipf) zipf_total *= block.scales->zipf;
  }
  *static_cast<A*>(a.ce_out) = ce_total;
  *static_cast<A*>(a.zipf_out) = zipf_total;
  *static_cast<A*>(a.loss) =
      static_cast<A>(a.ce_weight) * ce_total + static_cast<A>(a.zipf_weight) * zipf_total;
  *a.tile_counter = 0;  // for the next launch on this stream
}

}  // namespace zipfls::cuda
