// The upstream gradient multiplies the one that loss_fwd stored.
#pragma once

#include "device.cuh"
#include "tuning.h"

namespace zipfls::cuda {

/// out = grad * grad_loss * grad_scale. Returns at once where the factors' product is 1 and out is
/// grad.
///
/// - Bytes: 2 C itemsize a row, or 8 a block where there is nothing to do.
/// - Threads: a warp takes 1024 elements of a row at a time, by grid stride, 16 bytes a lane (edges
///   one by one). Products in float (float64: double).
/// - Hazards: none, each lane writes where it read.
template <class T>
ZIPFLS_KERNEL(kScaleBlock)
loss_bwd_kernel(LossBwd a) {
  using A = Arithmetic<T>;
  constexpr int V = kVector<T>;
  const A common = a.grad_scale == nullptr ? A(1) : *static_cast<const A*>(a.grad_scale);
  const bool over = a.out == a.grad;
  if (over && a.N == 1 && *static_cast<const A*>(a.grad_loss) * common == 1) return;
  const int64_t chunks = (a.C + kScaleChunk - 1) / kScaleChunk, items = a.N * chunks;
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / kWarp);
  const int lane = threadIdx.x % kWarp;
  for (int64_t item = int64_t{blockIdx.x} * (blockDim.x / kWarp) + threadIdx.x / kWarp;
       item < items; item += warps) {
    const int64_t i = item / chunks, first = item % chunks * kScaleChunk;
    const A scale = static_cast<const A*>(a.grad_loss)[i * a.grad_loss_stride] * common;
    if (over && scale == 1) continue;
    const int64_t last = first + kScaleChunk < a.C ? first + kScaleChunk : a.C;
    const T* const in = static_cast<const T*>(a.grad) + i * a.C;  // (C,) T
    T* const out = static_cast<T*>(a.out) + i * a.C;  // (C,) T, at the same phase of 16 bytes
    const int64_t phase =
        static_cast<int64_t>(reinterpret_cast<uintptr_t>(in + first) % 16 / sizeof(T));
    const bool same =
        reinterpret_cast<uintptr_t>(out + first) % 16 / sizeof(T) == static_cast<uintptr_t>(phase);
    for (int64_t c = first - phase + lane * V; c < last; c += kWarp * V) {
      if (same && c >= first && c + V <= last) {
        A x[V];
        unpack<T>(ptx::ld_global_cs_16(in + c), x);
#pragma unroll
        for (int v = 0; v < V; v++) x[v] *= scale;
        ptx::st_global_cg_16(out + c, pack<T>(x));
      } else {
        for (int v = 0; v < V; v++)
          if (c + v >= first && c + v < last) from_float(to_float(in[c + v]) * scale, out + c + v);
      }
    }
  }
}

}  // namespace zipfls::cuda
