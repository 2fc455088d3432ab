// Rows of many classes over a cluster of blocks: compute capability 9.0 and up.
#pragma once

#include "loss.cuh"

namespace zipfls::cuda {

/// Loss and gradient of rows that a cluster of blocks holds together, a slice each.
///
/// - Bytes: 2 C itemsize a row; votes and target once a block.
/// - Threads: up to 8 blocks of up to 320 a row.
/// - The row: as in loss_fwd_kernel, a slice of whole 16-byte vectors in each block. Every block
///   counts all votes and finds the same label, so that only the statistics (32 or 56 bytes a
///   block) cross, through distributed shared memory; then each patches the voted classes of its
///   slice.
/// - Accumulators: as loss_fwd_kernel.
/// - Hazards: as loss_fwd_kernel, and a peer's statistics are read after the cluster's barrier and
///   overwritten two barriers later; a gradient in place waits for the peers' last look at the
///   logits; the cluster leaves together.
/// - Never run on a GPU yet: compiled for sm_90a and sm_100 (on sm_80 it is empty and never
///   launched); logic run on the CPU by the harness.
template <class T>
ZIPFLS_KERNEL(kWideBlock, kWideResident<T>)
loss_fwd_cluster_kernel(LossFwd a, uint32_t row_bytes, uint32_t slice) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  loss_fwd_rows<T, 0, true>(a, row_bytes, slice);
#endif
}

}  // namespace zipfls::cuda
