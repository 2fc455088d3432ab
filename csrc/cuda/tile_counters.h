// Counters by which the blocks of a launch find out which of them comes last. They are 0 before a
// launch, and the launch leaves them so.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAStream.h>

namespace zipfls::cuda {

/// At least `count` counters, int32, for one launch in `stream`, whose device is the current one.
/// The caller holds on to the tensor until it has launched.
at::Tensor tile_counters(const c10::cuda::CUDAStream& stream, int64_t count);

}  // namespace zipfls::cuda
