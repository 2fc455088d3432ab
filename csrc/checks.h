// What must hold before a kernel may touch memory: every launcher calls these.
//
// User-facing messages are in zipfls_cuda/checks.py. Here only what pointers depend on is looked
// at: shapes, types, devices; and, on the CPU, where looking costs no synchronisation, the range of
// class indices.
#pragma once

#include <limits>
#include <optional>
#include <string>
#include <string_view>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace zipfls {

inline at::ScalarType accumulation_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_float(const at::Tensor& x, const char* name) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, name,
      " must be float32, bfloat16, float16 or float64, got ", type);
}

inline void check_same_device(const at::Tensor& x, const char* name, const at::Tensor& like) {
  TORCH_CHECK(x.device() == like.device(), name, " must be on ", like.device(), ", got ",
              x.device());
}

/// C classes: indices and ranks are int32.
inline void check_num_classes(int64_t C) {
  TORCH_CHECK_VALUE(C >= 2 && C < std::numeric_limits<int32_t>::max(),
                    "classes must number at least 2, got ", C);
}

/// votes (N, P) int32 or int64.
inline void check_votes(const at::Tensor& votes, int64_t N) {
  TORCH_CHECK_VALUE(votes.dim() == 2 && votes.size(0) == N, "votes must have shape (", N,
                    ", P), got ", votes.sizes());
  TORCH_CHECK_TYPE(votes.scalar_type() == at::kInt || votes.scalar_type() == at::kLong,
                   "votes must be int32 or int64, got ", votes.scalar_type());
  TORCH_CHECK_VALUE(votes.size(1) < std::numeric_limits<int32_t>::max() / 8,
                    "votes must be fewer a sample, got ", votes.sizes());
}

/// target (N,) int64.
inline void check_target(const at::Tensor& target, int64_t N) {
  TORCH_CHECK_VALUE(target.dim() == 1 && target.size(0) == N, "target must have shape (", N,
                    ",), got ", target.sizes());
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "target must be int64, got ",
                   target.scalar_type());
}

/// log_mass: (N, C), or (R,) with an entry for every rank that can occur; P = -1 for ranks by
/// logits.
inline void check_log_mass(const at::Tensor& log_mass, int64_t N, int64_t C, int64_t P) {
  if (log_mass.dim() == 2) {
    TORCH_CHECK_VALUE(log_mass.size(0) == N && log_mass.size(1) == C, "log_mass must have shape (",
                      N, ", ", C, "), got ", log_mass.sizes());
  } else {
    const int64_t ranks = P < 0 || P >= C ? C : P + 1;
    TORCH_CHECK_VALUE(log_mass.dim() == 1 && log_mass.size(0) >= ranks,
                      "log_mass must have an entry for each of ", ranks, " ranks, got ",
                      log_mass.sizes());
  }
}

inline void check_type(const at::Tensor& x, const char* name, at::ScalarType type) {
  TORCH_CHECK_TYPE(x.scalar_type() == type, name, " must be ", type, ", got ", x.scalar_type());
}

/// logits (N, C); returns N.
inline int64_t check_logits(const at::Tensor& logits) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must have shape (N, C), got ", logits.sizes());
  check_float(logits, "logits");
  check_num_classes(logits.size(1));
  return logits.size(0);
}

inline void check_reduction(std::string_view reduction) {
  TORCH_CHECK_VALUE(reduction == "mean" || reduction == "none" || reduction == "sum",
                    "reduction must be mean, sum or none, got ", reduction);
}

/// logits (N, C); target (N,) int64 or (N, C); log_mass, weight and probabilities in the
/// accumulation type.
inline void check_loss(const at::Tensor& logits, const at::Tensor& target,
                       const std::optional<at::Tensor>& votes, const at::Tensor& log_mass,
                       const std::optional<at::Tensor>& weight, std::string_view reduction) {
  const int64_t N = check_logits(logits), C = logits.size(1);
  const auto type = accumulation_type(logits.scalar_type());
  if (target.dim() == 2) {
    TORCH_CHECK_VALUE(target.sizes() == logits.sizes(), "target must have shape (", N, ", ", C,
                      "), got ", target.sizes());
    check_type(target, "target", type);
  } else {
    check_target(target, N);
  }
  check_same_device(target, "target", logits);
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
  check_reduction(reduction);
}

/// logits, teacher (N, C), or teacher (R, C) with teacher_index (N,) int64; target (N,) int64 or
/// none; sample_weight (N,) or (N, 2) in the accumulation type.
inline void check_distill(const at::Tensor& logits, const at::Tensor& teacher,
                          const std::optional<at::Tensor>& target,
                          const std::optional<at::Tensor>& sample_weight,
                          const std::optional<at::Tensor>& teacher_index, double temperature,
                          std::string_view form, std::string_view reduction) {
  const int64_t N = check_logits(logits), C = logits.size(1);
  check_float(teacher, "teacher");
  if (teacher_index.has_value()) {
    TORCH_CHECK_VALUE(teacher.dim() == 2 && teacher.size(0) > 0 && teacher.size(1) == C,
                      "teacher must have shape (R, ", C, "), got ", teacher.sizes());
    TORCH_CHECK_VALUE(teacher_index->dim() == 1 && teacher_index->size(0) == N,
                      "teacher_index must have shape (", N, ",), got ", teacher_index->sizes());
    check_type(*teacher_index, "teacher_index", at::kLong);
    check_same_device(*teacher_index, "teacher_index", logits);
  } else {
    TORCH_CHECK_VALUE(teacher.sizes() == logits.sizes(), "teacher must have shape ", logits.sizes(),
                      ", got ", teacher.sizes());
  }
  check_same_device(teacher, "teacher", logits);
  if (target.has_value()) {
    check_target(*target, N);
    check_same_device(*target, "target", logits);
  }
  if (sample_weight.has_value()) {
    const bool columns = sample_weight->dim() == 2 && sample_weight->size(1) == 2;
    TORCH_CHECK_VALUE((sample_weight->dim() == 1 || columns) && sample_weight->size(0) == N,
                      "sample_weight must have shape (", N, ",) or (", N, ", 2), got ",
                      sample_weight->sizes());
    check_type(*sample_weight, "sample_weight", accumulation_type(logits.scalar_type()));
    check_same_device(*sample_weight, "sample_weight", logits);
  }
  TORCH_CHECK_VALUE(temperature > 0, "temperature must be > 0, got ", temperature);
  TORCH_CHECK_VALUE(form == "divergence" || form == "cross_entropy" || form == "probabilities",
                    "form must be divergence, cross_entropy or probabilities, got ", form);
  check_reduction(reduction);
}

/// For what is written in place.
inline void check_contiguous(const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.is_contiguous(), name, " must be contiguous, got strides ", x.strides());
}

}  // namespace zipfls
