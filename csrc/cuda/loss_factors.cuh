// The gradient over the logits, from what loss_fwd kept of every row: no statistics, no label.
#pragma once

#include "loss_math.cuh"

namespace zipfls::cuda {

/// Elements of a piece of a row, in whole 16-byte vectors.
template <class T, int LANES>
constexpr int32_t kPiece = kFactorVectors<T> * LANES * kVector<T>;

/// Pieces of a row of C classes; a row that begins in the middle of a vector touches one more.
template <class T, int LANES>
ZIPFLS_HOST_DEVICE uint32_t pieces_of(const void* logits, int32_t C) {
  constexpr int V = kVector<T>;
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0 && C % V == 0;
  return (static_cast<uint32_t>(C) + (aligned ? 0 : V - 1) + kPiece<T, LANES> - 1) /
         kPiece<T, LANES>;
}

/// z_c becomes (exp(z_c - shift) per_exp - constant) grad_loss grad_scale; the voted classes and
/// the target become what was kept of them, times the same.
///
/// - Bytes: 2 C itemsize a row; for each piece of it P votes, the patches of those in it, 16 of
///   factors (float64: 32) and 8 for the target.
/// - Threads: LANES (8 or 32) take a piece of a row at a time, a warp by grid stride, 16 bytes a
///   lane and load, all loads before the first store; elements outside whole vectors a lane each.
/// - Accumulators: none.
/// - Hazard: other lanes patch the gradient, so each warp patches its own pieces, after a barrier.
template <class T, int LANES>
ZIPFLS_KERNEL(kScaleBlock, sizeof(T) == 8 ? 2 : 4)
loss_factors_bwd_kernel(FactorsBwd a, uint32_t items, uint32_t pieces) {
  using A = Arithmetic<T>;
  constexpr int V = kVector<T>, U = kFactorVectors<T>;
  const A common = a.grad_scale == nullptr ? A(1) : *static_cast<const A*>(a.grad_scale);
  const uint32_t groups = gridDim.x * (blockDim.x / LANES);
  const auto lane = static_cast<int32_t>(threadIdx.x % LANES);
  // All groups of a warp make the same number of passes: the barrier needs all lanes.
  const uint32_t group_in_warp = threadIdx.x % kWarp / LANES;
  for (uint32_t of_warp = (blockIdx.x * blockDim.x + threadIdx.x) / kWarp * (kWarp / LANES);
       of_warp < items; of_warp += groups) {
    const bool exists = of_warp + group_in_warp < items;
    const uint32_t item = exists ? of_warp + group_in_warp : 0;
    const uint32_t piece = item % pieces;
    const int64_t i = item / pieces;
    T* const row = static_cast<T*>(a.logits) + i * a.C;  // (C,) T
    const auto phase = static_cast<int32_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    // Columns from first up to last are the piece's, those from whole_begin up to whole_end in
    // whole vectors.
    const int32_t begin = static_cast<int32_t>(piece) * kPiece<T, LANES> - phase;
    const int32_t first = begin > 0 ? begin : 0;
    const int32_t end = begin < a.C - kPiece<T, LANES> ? begin + kPiece<T, LANES> : a.C;
    const int32_t last = exists ? end : first;
    const int32_t whole_begin = begin < 0 ? begin + V : begin;
    const int32_t whole_end = last - (last - begin) % V;

    const A* const kept = static_cast<const A*>(a.factors) + i * kFactors;
    const A scale = static_cast<const A*>(a.grad_loss)[i * a.grad_loss_stride] * common;
    const ExpShift<T> e(kept[0]);
    const A per_exp = kept[1] * scale, minus = -kept[2] * scale;
    const bool filled = !(e.shift > -infinity<A>());
    const A per_above = per_exp * e.correction;
    if (ptx::keep(!filled && e.usable())) {
      const auto gradient = [&](A z) { return fused(e.exp_above(e.above(z)), per_above, minus); };
      // A lane has vectors lane + u LANES of the piece's whole ones, for u LANES below `mine`.
      const auto vectors = static_cast<int32_t>(
          whole_begin < whole_end ? static_cast<uint32_t>(whole_end - whole_begin) / V : 0);
      const int32_t mine = vectors - lane;
      T* const own = ptx::keep(row + whole_begin + lane * V);
      uint4 raw[U];
      const auto compute = [&](const uint4& z, int u) {
        A x[V];
        unpack<T>(z, x);
#pragma unroll
        for (int v = 0; v < V; v++) x[v] = gradient(x[v]);
        ptx::st_global_cg_16(own + u * LANES * V, pack<T>(x));
      };
      if (vectors == U * LANES) {
#pragma unroll
        for (int u = 0; u < U; u++) raw[u] = ptx::ld_global_cs_16(own + u * LANES * V);
#pragma unroll
        for (int u = 0; u < U; u++) compute(raw[u], u);
      } else {
#pragma unroll
        for (int u = 0; u < U; u++)
          if (u * LANES < mine) raw[u] = ptx::ld_global_cs_16(own + u * LANES * V);
#pragma unroll
        for (int u = 0; u < U; u++)
          if (u * LANES < mine) compute(raw[u], u);
      }
      const int32_t before = whole_begin < last ? whole_begin : last;
      const int32_t behind = whole_end > before ? whole_end : before;
      const auto edge = [&](int32_t c) { from_float(gradient(to_float(row[c])), row + c); };
      if (first + lane < before) edge(first + lane);
      if (behind + lane < last) edge(behind + lane);
    } else {
      const A fill = e.shift == -infinity<A>() ? A(0) : not_a_number<A>();
#pragma unroll 1
      for (int32_t c = first + lane; c < last; c += LANES) {
        const A z = to_float(row[c]);
        from_float(filled ? fill : fused(exp_element<T>(z - e.shift), per_exp, minus), row + c);
      }
    }

    __syncwarp(kAllLanes);  // other lanes patch the gradient
    if (filled) continue;
    const int64_t target = a.target[i];
    const auto y = static_cast<int32_t>(target);  // of a row with a gradient: a class
    const auto in_piece = [&](int32_t c) {
      return static_cast<uint32_t>(c - first) < static_cast<uint32_t>(last - first);
    };
    const int32_t* const narrow =
        ptx::keep(static_cast<const int32_t*>(a.votes.data) + i * a.votes.stride);
#pragma unroll 1
    for (int32_t p = lane; p < a.votes.P; p += LANES) {
      const int32_t c = a.votes.wide ? load_vote(a.votes, i, p, a.C) : narrow[p];
      if (!in_piece(c) || c == y) continue;
      const A patch = to_float(static_cast<const T*>(a.patches)[i * a.votes.P + p]);
      if (patch == patch) from_float(patch * scale, row + c);
    }
    if (lane == 0 && in_piece(y)) from_float(kept[3] * scale, row + y);
  }
}

}  // namespace zipfls::cuda
