// Binds vote_fwd to torch for CUDA tensors: guards, strides, scratch from the caching allocator.
#include <optional>

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "tile_counters.h"
#include "vote.h"

namespace zipfls::cuda {
namespace {

/// Refuses what the tensor cores would not compute as asked: float64 has no kernel, float32 only
/// TensorFloat-32.
VoteType vote_type(at::ScalarType type) {
  if (type == at::kBFloat16) return VoteType::kBFloat16;
  if (type == at::kHalf) return VoteType::kFloat16;
  TORCH_CHECK(type == at::kFloat, "backend='cuda' cannot serve this call: it has no kernel for ",
              type, " in vote_fwd");
  const auto precision =
      at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  TORCH_CHECK(precision == at::Float32Precision::TF32,
              "backend='cuda' cannot serve this call: vote_fwd multiplies float32 in "
              "TensorFloat-32 only, and "
              "torch.backends.cuda.matmul.fp32_precision is not 'tf32'");
  return VoteType::kTensorFloat32;
}

/// Of the current device.
VoteDevice current_device() {
  int device = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  return {attribute(cudaDevAttrComputeCapabilityMajor),
          attribute(cudaDevAttrComputeCapabilityMinor), attribute(cudaDevAttrMultiProcessorCount),
          static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin))};
}

/// features (N, D, H, W) or (N, T, D); weight (C, D); bias (C,) -> votes (N, P) int32.
at::Tensor vote_fwd(const at::Tensor& features, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias, int64_t upsample) {
  check_float(features, "features");
  TORCH_CHECK_VALUE(features.dim() == 3 || features.dim() == 4,
                    "features must have shape (N, D, H, W) or (N, T, D), got ", features.sizes());
  TORCH_CHECK_VALUE(upsample == 1 || (upsample == 2 && features.dim() == 4),
                    "upsample must be 1, or 2 for a map, got ", upsample);
  const bool map = features.dim() == 4;
  VoteProblem x;
  x.N = features.size(0);
  x.D = features.size(map ? 1 : 2);
  x.H = map ? features.size(2) : 1;
  x.W = features.size(map ? 3 : 1);
  x.stride_n = features.stride(0);
  x.stride_d = features.stride(map ? 1 : 2);
  x.stride_h = map ? features.stride(2) : 0;
  x.stride_w = features.stride(map ? 3 : 1);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == x.D, "weight must have shape (C, ", x.D,
                    "), got ", weight.sizes());
  check_type(weight, "weight", features.scalar_type());
  check_same_device(weight, "weight", features);
  x.C = weight.size(0);
  check_num_classes(x.C);
  x.weight_stride_c = weight.stride(0);
  x.weight_stride_d = weight.stride(1);
  if (bias.has_value()) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == x.C, "bias must have shape (", x.C,
                      ",), got ", bias->sizes());
    check_type(*bias, "bias", features.scalar_type());
    check_same_device(*bias, "bias", features);
    x.bias_stride = bias->stride(0);
  }

  const int64_t positions = x.H * x.W * upsample * upsample;
  const at::Tensor votes = at::empty({x.N, positions}, features.options().dtype(at::kInt));
  x.type = vote_type(features.scalar_type());
  if (votes.numel() == 0) return votes;

  const c10::cuda::CUDAGuard guard(features.device());
  x.features = features.const_data_ptr();
  x.weight = weight.const_data_ptr();
  x.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  x.upsample = static_cast<int>(upsample);
  x.votes = votes.mutable_data_ptr<int32_t>();
  const VoteDevice device = current_device();
  const char* const reason = vote_refusal(x, device);
  TORCH_CHECK(reason == nullptr, "backend='cuda' cannot serve vote_fwd on this device: ", reason);
  const vote::VotePlan plan = vote_plan(x, device);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor scratch =
      at::empty({static_cast<int64_t>(plan.bytes)}, features.options().dtype(at::kByte));
  at::Tensor held;
  uint32_t* counters = nullptr;
  if (plan.tile_counters > 0) {
    held = tile_counters(stream, plan.tile_counters);
    counters = reinterpret_cast<uint32_t*>(held.mutable_data_ptr<int32_t>());
  }
  C10_CUDA_CHECK(vote_fwd_cuda(x, plan, device, scratch.mutable_data_ptr(), counters, stream));
  return votes;
}

}  // namespace

TORCH_LIBRARY_IMPL(zipfls, CUDA, m) { m.impl("vote_fwd", TORCH_FN(vote_fwd)); }

}  // namespace zipfls::cuda
