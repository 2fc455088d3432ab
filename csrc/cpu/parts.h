// What the launchers of loss_fwd and soft_loss_fwd share: their checks, and results from rows.
#pragma once

#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>

#include <ATen/ops/empty.h>

#include "rows.h"

namespace zipfls::cpu {

using Parts = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline double element(const at::Tensor& x, int64_t i) {  // x float32 or float64, contiguous
  return x.scalar_type() == at::kDouble ? x.const_data_ptr<double>()[i]
                                        : x.const_data_ptr<float>()[i];
}

inline void set_element(const at::Tensor& x, int64_t i, double value) {
  if (x.scalar_type() == at::kDouble)
    x.mutable_data_ptr<double>()[i] = value;
  else
    x.mutable_data_ptr<float>()[i] = static_cast<float>(value);
}

/// All arguments but the target. logits (N, C); log_mass and weight in the accumulation type.
inline void check_loss(const at::Tensor& logits, const std::optional<at::Tensor>& votes,
                       const at::Tensor& log_mass, const std::optional<at::Tensor>& weight,
                       std::string_view reduction) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must have shape (N, C), got ", logits.sizes());
  check_float(logits, "logits");
  const int64_t N = logits.size(0), C = logits.size(1);
  const auto type = accumulation_type(logits.scalar_type());
  check_num_classes(C);
  check_type(log_mass, "log_mass", type);
  check_same_device(log_mass, "log_mass", logits);
  if (votes.has_value()) {
    check_votes(*votes, N);
    check_same_device(*votes, "votes", logits);
  }
  check_log_mass(log_mass, N, C, votes.has_value() ? votes->size(1) : -1);
  if (weight.has_value()) {
    TORCH_CHECK_VALUE(weight->dim() == 1 && weight->size(0) == C, "weight must have shape (", C,
                      ",), got ", weight->sizes());
    check_type(*weight, "weight", type);
    check_same_device(*weight, "weight", logits);
  }
  TORCH_CHECK_VALUE(reduction == "mean" || reduction == "none" || reduction == "sum",
                    "reduction must be mean, sum or none, got ", reduction);
}

/// Where the log masses come from.
inline Mass mass_of(const at::Tensor& log_mass, bool by_votes) {
  return log_mass.dim() == 2 ? Mass::kPerClass : by_votes ? Mass::kByVotes : Mass::kByLogits;
}

/// What a mean's gradient is stored without: a float16 mean is stored per sample, for 1/N to join
/// the upstream gradient in float32, in loss_bwd. 1 for everything else.
inline double held_back(double scale, at::ScalarType type, bool mean, bool with_grad) {
  const bool usable = std::isfinite(scale) && scale != 0;
  return with_grad && type == at::kHalf && mean && usable ? scale : 1;
}

/// grad_scale: the scalar that multiplies grad in loss_bwd, or (0,).
inline at::Tensor grad_scale_of(double scale, at::ScalarType type, bool mean, bool with_grad,
                                const at::TensorOptions& options) {
  if (!(with_grad && type == at::kHalf && mean)) return at::empty({0}, options);
  at::Tensor grad_scale = at::empty({}, options);
  set_element(grad_scale, 0, scale);
  return grad_scale;
}

/// One part of the loss: its rows (N,) float64, its weight in the loss, what its mean multiplies.
struct Part {
  const double* rows;
  double weight;
  double scale;
};

/// (loss, ce, zipf): scalars, or (N,) for "none".
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> reduce_parts(
    const Part& ce, const Part& zipf, int64_t N, bool none, const at::TensorOptions& options) {
  const auto shape = none ? at::IntArrayRef(N) : at::IntArrayRef();
  at::Tensor loss = at::empty(shape, options), ces = at::empty(shape, options),
             zipfs = at::empty(shape, options);
  auto finish = [&](int64_t i, double ce_, double zipf_) {
    set_element(loss, i, ce.weight * ce_ + zipf.weight * zipf_);
    set_element(ces, i, ce_);
    set_element(zipfs, i, zipf_);
  };
  if (none) {
    for (int64_t i = 0; i < N; i++) finish(i, ce.rows[i], zipf.rows[i]);
  } else {
    double ce_sum = 0, zipf_sum = 0;  // in the order of the samples, whatever the number of threads
    for (int64_t i = 0; i < N; i++) {
      ce_sum += ce.rows[i];
      zipf_sum += zipf.rows[i];
    }
    finish(0, ce.weight != 0 ? ce_sum * ce.scale : ce_sum,
           zipf.weight != 0 ? zipf_sum * zipf.scale : zipf_sum);
  }
  return {loss, ces, zipfs};
}

}  // namespace zipfls::cpu
