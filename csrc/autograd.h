// The loss with its gradient attached, for eager code.
#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace zipfls {

/// (loss, ce, zipf) of torch.ops.zipfls.loss_fwd, the loss differentiable in the logits; see
/// autograd.cpp.
std::tuple<at::Tensor, at::Tensor, at::Tensor> loss(
    const at::Tensor& logits, const at::Tensor& target, const std::optional<at::Tensor>& votes,
    const at::Tensor& log_mass, const std::optional<at::Tensor>& weight, double ce_weight,
    double zipf_weight, double label_smoothing, bool only_correct, int64_t ignore_index,
    std::string_view reduction);

}  // namespace zipfls
