// What the CPU launchers share: tensors as rows of plain memory, work for threads, errors.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "../checks.h"
#include "isa.h"
#include "scratch.h"

namespace zipfls::cpu {

inline Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kDouble:
      return kFloat64;
    case at::kBFloat16:
      return kBFloat16;
    default:
      return kFloat16;
  }
}

/// x (N, M) with contiguous rows, whatever the stride between them: expanded and sliced batches
/// need no copy.
inline at::Tensor with_contiguous_rows(const at::Tensor& x) {
  return x.stride(1) == 1 || x.size(1) <= 1 ? x : x.contiguous();
}

/// votes as the kernels take them; the tensor must outlive it and have contiguous rows.
inline Votes votes_of(const at::Tensor& votes) {
  return {votes.const_data_ptr(), votes.stride(0), votes.size(1), votes.scalar_type() == at::kLong};
}

/// IndexError that names the first target or vote outside [0, C), sample by sample, target first;
/// samples whose target is ignored (where there are targets and an ignore_index) are not looked at.
/// Returns if there is none.
void raise_outside(const at::Tensor* target, const at::Tensor* votes, int64_t C,
                   const int64_t* ignore_index);

/// Samples a thread should have at least, of samples with C classes and P votes each: ATen's own
/// grain, a vote costing as much as 8 classes.
inline int64_t grain(int64_t C, int64_t P) {
  return std::max<int64_t>(1, 32768 / (C + 8 * P + 64));
}

}  // namespace zipfls::cpu
