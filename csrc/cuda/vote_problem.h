// The arguments of one call of the dense votes, and the device that it runs on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zipfls::cuda {

/// Element type of features, weight and bias. Accumulators are float32 throughout.
enum class VoteType {
  kBFloat16,
  kFloat16,
  kTensorFloat32,  // float32 in memory, multiplied with 10 bits of mantissa
};

/// One call. Strides count elements; where a size is 1 its stride is never used.
struct VoteProblem {
  VoteType type = VoteType::kBFloat16;
  const void* features = nullptr;  // (N, H, W, D), any strides; tokens are H = 1, W = T
  int64_t N = 0, H = 0, W = 0, D = 0;
  int64_t stride_n = 0, stride_h = 0, stride_w = 0, stride_d = 0;
  const void* weight = nullptr;  // (C, D), any strides
  int64_t C = 0;
  int64_t weight_stride_c = 0, weight_stride_d = 0;
  const void* bias = nullptr;  // (C,), or null
  int64_t bias_stride = 0;
  int upsample = 1;  // 1, or 2: bilinear, align_corners=False, on the scores, before the bias
  int32_t* votes = nullptr;  // (N, upsample*H * upsample*W), contiguous
};

/// Properties of the problem's device that decide kernel and tiles.
struct VoteDevice {
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  size_t shared_memory_per_block = 0;  // bytes, after opting in
};

}  // namespace zipfls::cuda
