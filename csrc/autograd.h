// The loss with its gradient attached, for eager code.
#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace zipfls {

/// The loss, differentiable in the logits, and its two parts.
using Parts = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

/// (loss, ce, zipf) of torch.ops.zipfls.loss_fwd; see autograd.cpp.
Parts loss(const at::Tensor& logits, const at::Tensor& target,
           const std::optional<at::Tensor>& votes, const at::Tensor& log_mass,
           const std::optional<at::Tensor>& weight, double ce_weight, double zipf_weight,
           double label_smoothing, bool only_correct, int64_t ignore_index,
           std::string_view reduction);

/// (loss, ce, distillation) of torch.ops.zipfls.distill_fwd.
Parts distill(const at::Tensor& logits, const at::Tensor& teacher,
              const std::optional<at::Tensor>& target,
              const std::optional<at::Tensor>& sample_weight,
              const std::optional<at::Tensor>& teacher_index, double ce_weight, double kd_weight,
              double tckd_weight, double nckd_weight, double soft_target_weight, double max_weight,
              double temperature, std::string_view form, int64_t ignore_index,
              std::string_view reduction);

}  // namespace zipfls
