// Binds the loss and label kernels to torch for CUDA tensors: checks, guards, strides, memory from
// the caching allocator, the current stream. Nothing here synchronises with the device. (Votes:
// register_vote.cpp.)
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "tile_counters.h"
#include "launch.h"

namespace zipfls::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Parts =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // loss, ce, zipf, grad, grad_scale

Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return kFloat64;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kFloat16;
    default:
      return kFloat32;
  }
}

Reduction reduction_of(std::string_view name) {
  if (name == "mean") return kMean;
  if (name == "sum") return kSum;
  TORCH_CHECK_VALUE(name == "none", "reduction must be mean, sum or none, got ", name);
  return kNone;
}

const void* data_or_null(const OptionalTensor& x) {
  return x.has_value() ? x->const_data_ptr() : nullptr;
}

/// logits (N, C), or a copy, such that each row begins at the phase to 16 bytes that it has in a
/// fresh contiguous tensor: the gradient's vectors and the logits' then coincide, and the order of
/// summation, and with it every bit of the result, does not depend on the strides.
Tensor with_aligned_rows(const Tensor& logits) {
  const int64_t N = logits.size(0), C = logits.size(1);
  const auto itemsize = static_cast<int64_t>(logits.element_size());
  const bool base = reinterpret_cast<uintptr_t>(logits.const_data_ptr()) % 16 == 0;
  const bool rows = N <= 1 || (logits.stride(0) - C) * itemsize % 16 == 0;
  if (base && rows && logits.stride(1) == 1) return logits;
  return at::empty(logits.sizes(), logits.options().memory_format(at::MemoryFormat::Contiguous))
      .copy_(logits);
}

/// votes (N, P) with contiguous rows, as the kernels take them.
OptionalTensor with_contiguous_rows(const OptionalTensor& votes) {
  if (!votes.has_value() || votes->size(1) <= 1 || votes->stride(1) == 1) return votes;
  return votes->contiguous();
}

Votes votes_of(const OptionalTensor& votes) {
  if (!votes.has_value()) return {};
  return {votes->const_data_ptr(), votes->stride(0), static_cast<int32_t>(votes->size(1)),
          votes->scalar_type() == at::kLong};
}

/// r_c = 1 + #{m : x_m > x_c} per row of values (N, C), minus 1: an index into a table by rank.
Tensor rank_index(const Tensor& values) {
  const Tensor comparable =
      values.is_floating_point() ? values.masked_fill(values.isnan(), -INFINITY) : values;
  const Tensor sorted = std::get<0>(comparable.sort(1));
  const Tensor not_above =
      at::searchsorted(sorted, comparable.contiguous(), /*out_int32=*/false, /*right=*/true);
  return not_above.neg().add_(values.size(1));
}

/// Votes per class, (N, C) int32; votes outside [0, C) are not counted.
Tensor count_votes(const Tensor& votes, int64_t C) {
  const Tensor inside = votes.ge(0).logical_and_(votes.lt(C));
  return at::zeros({votes.size(0), C}, votes.options().dtype(at::kInt))
      .scatter_add_(1, votes.to(at::kLong).clamp(0, C - 1), inside.to(at::kInt));
}

/// (N, C) log masses from a table by rank: of the votes where there are any, else of the logits.
/// What the kernels cannot rank by themselves: logits, and more votes than their tables hold.
Tensor dense_log_mass(const Tensor& table, const OptionalTensor& votes, const Tensor& logits,
                      int64_t C) {
  const Tensor index = rank_index(votes.has_value() ? count_votes(*votes, C) : logits);
  return table.index_select(0, index.flatten()).view(index.sizes());
}

enum class Gradient { kNone, kNew, kInPlace };

/// A call of loss_fwd, checked, with its outputs: what both kinds of target have in common. `a`
/// points to memory that the tensors here hold.
struct LossCall {
  Tensor logits, log_mass;
  OptionalTensor votes, weight;
  at::TensorOptions options;  // of the arithmetic's type
  Dtype dtype;
  bool dense;  // log_mass is (N, C)
  Parts parts;
  LossFwd a = {};
  Tensor correct, partials, sums, counter;

  /// In place, the logits are contiguous and aligned, and grad is the same memory.
  LossCall(const Tensor& given_logits, const OptionalTensor& given_votes,
           const Tensor& given_log_mass, const OptionalTensor& given_weight, double ce_weight,
           double zipf_weight, double label_smoothing, bool only_correct,
           std::string_view reduction_name, Gradient gradient) {
    const int64_t N = given_logits.size(0), C = given_logits.size(1);
    const auto type = accumulation_type(given_logits.scalar_type());
    check_type(given_log_mass, "log_mass", type);
    check_same_device(given_log_mass, "log_mass", given_logits);
    if (given_votes.has_value()) {
      check_votes(*given_votes, N);
      check_same_device(*given_votes, "votes", given_logits);
    }
    check_log_mass(given_log_mass, N, C, given_votes.has_value() ? given_votes->size(1) : -1);
    if (given_weight.has_value()) {
      TORCH_CHECK_VALUE(given_weight->dim() == 1 && given_weight->size(0) == C,
                        "weight must have shape (", C, ",), got ", given_weight->sizes());
      check_type(*given_weight, "weight", type);
      check_same_device(*given_weight, "weight", given_logits);
    }
    const Reduction reduction = reduction_of(reduction_name);

    dtype = dtype_of(given_logits.scalar_type());
    options = given_logits.options().dtype(type);
    logits = with_aligned_rows(given_logits);
    votes = with_contiguous_rows(given_votes);
    if (given_weight.has_value()) weight = given_weight->contiguous();
    const bool zipf_wanted = zipf_weight != 0;
    const bool fits = votes.has_value() && tables_fit(static_cast<int32_t>(votes->size(1)),
                                                      static_cast<int32_t>(C), dtype);
    dense = zipf_wanted && (given_log_mass.dim() == 2 || !fits);
    log_mass = dense && given_log_mass.dim() == 1 ? dense_log_mass(given_log_mass, votes, logits, C)
                                                  : given_log_mass.contiguous();

    const auto shape = reduction == kNone ? at::DimVector({N}) : at::DimVector();
    const bool with_grad = gradient != Gradient::kNone;
    const bool scaled = with_grad && dtype == kFloat16 && reduction == kMean;
    auto& [loss, ce, zipf, grad, grad_scale] = parts;
    loss = at::empty(shape, options);
    ce = at::empty(shape, options);
    zipf = at::empty(shape, options);
    grad = gradient == Gradient::kInPlace ? logits
           : with_grad
               ? at::empty({N, C}, logits.options().memory_format(at::MemoryFormat::Contiguous))
               : at::empty({0}, logits.options());
    grad_scale = scaled ? at::empty({}, options) : at::empty({0}, options);

    a.logits = logits.const_data_ptr();
    a.logits_stride = logits.stride(0);
    a.votes = votes_of(votes);
    a.log_mass = log_mass.const_data_ptr();
    a.weight = data_or_null(weight);
    a.N = N;
    a.C = static_cast<int32_t>(C);
    a.ce = ce_weight != 0;
    a.zipf = zipf_wanted;
    a.only_correct = only_correct;
    a.ce_weight = ce_weight;
    a.zipf_weight = zipf_weight;
    a.label_smoothing = label_smoothing;
    a.reduction = reduction;
    a.scaled = scaled;
    a.loss = loss.mutable_data_ptr();
    a.ce_out = ce.mutable_data_ptr();
    a.zipf_out = zipf.mutable_data_ptr();
    a.grad = with_grad && N > 0 ? grad.mutable_data_ptr() : nullptr;
    a.grad_scale = scaled ? grad_scale.mutable_data_ptr() : nullptr;
  }

  /// Room for whether each sample counts.
  int32_t* room_for_correct() {
    correct = at::empty({a.N}, options.dtype(at::kInt));
    return correct.mutable_data_ptr<int32_t>();
  }
  /// Scratch for the sums over the rows of a launch of so many blocks. Returns whether there is
  /// anything to launch.
  bool ready(int blocks, const c10::cuda::CUDAStream& stream) {
    if (a.reduction == kNone) return a.N > 0;
    sums = at::empty({2, blocks}, options.dtype(at::kDouble));
    counter = tile_counters(stream, 1);
    a.sums = sums.mutable_data_ptr<double>();
    a.tile_counter = reinterpret_cast<uint32_t*>(counter.mutable_data_ptr<int32_t>());
    return true;
  }
};

void check_logits(const Tensor& logits) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must have shape (N, C), got ", logits.sizes());
  check_float(logits, "logits");
  check_num_classes(logits.size(1));
}

/// A target of classes: (loss, ce, zipf, grad, grad_scale).
Parts loss_parts(const Tensor& given_logits, const Tensor& given_target,
                 const OptionalTensor& votes, const Tensor& log_mass, const OptionalTensor& weight,
                 double ce_weight, double zipf_weight, double label_smoothing, bool only_correct,
                 int64_t ignore_index, std::string_view reduction, Gradient gradient) {
  check_logits(given_logits);
  check_target(given_target, given_logits.size(0));
  check_same_device(given_target, "target", given_logits);
  const c10::cuda::CUDAGuard guard(given_logits.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  LossCall call(given_logits, votes, log_mass, weight, ce_weight, zipf_weight, label_smoothing,
                only_correct, reduction, gradient);
  const Tensor target = given_target.contiguous();
  LossFwd& a = call.a;
  a.target = target.const_data_ptr<int64_t>();
  a.ignore_index = ignore_index;

  // What a mean divides by: known before the first gradient is written, by launches of their own
  // where one block cannot add it up in passing.
  if (a.reduction == kMean) {
    if (only_correct && a.zipf) {
      int32_t* const correct = call.room_for_correct();
      C10_CUDA_CHECK(
          loss_correct_cuda({a.logits, a.logits_stride, a.target, a.N, a.C, ignore_index, correct},
                            call.dtype, stream));
      a.correct = correct;
    }
    a.denominators = {a.target, a.weight, a.correct, nullptr, 0, a.N, a.C, ignore_index};
    if (const int blocks = totals_blocks(a.N); blocks > 0) {
      call.partials = at::empty({3, blocks}, call.options.dtype(at::kDouble));
      C10_CUDA_CHECK(loss_totals_cuda({a.denominators, call.partials.mutable_data_ptr<double>()},
                                      call.dtype, blocks, stream));
      a.denominators.partials = call.partials.const_data_ptr<double>();
      a.denominators.num_partials = blocks;
    }
  }
  const int blocks = loss_blocks(a, call.dtype, call.dense);
  if (call.ready(blocks, stream))
    C10_CUDA_CHECK(call.dense ? loss_dense_cuda(a, call.dtype, blocks, stream)
                              : loss_fwd_cuda(a, call.dtype, blocks, stream));
  return std::move(call.parts);
}

/// A target of probabilities.
Parts soft_loss_parts(const Tensor& given_logits, const Tensor& given_target,
                      const OptionalTensor& votes, const Tensor& log_mass,
                      const OptionalTensor& weight, double ce_weight, double zipf_weight,
                      double label_smoothing, bool only_correct, std::string_view reduction,
                      Gradient gradient) {
  check_logits(given_logits);
  TORCH_CHECK_VALUE(given_target.sizes() == given_logits.sizes(), "target must have shape ",
                    given_logits.sizes(), ", got ", given_target.sizes());
  check_type(given_target, "target", accumulation_type(given_logits.scalar_type()));
  check_same_device(given_target, "target", given_logits);
  const c10::cuda::CUDAGuard guard(given_logits.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  LossCall call(given_logits, votes, log_mass, weight, ce_weight, zipf_weight, label_smoothing,
                only_correct, reduction, gradient);
  const Tensor target = with_aligned_rows(given_target);
  SoftLossFwd s = {call.a, call.dense, target.const_data_ptr(), target.stride(0)};
  if (only_correct && s.loss.zipf) {
    int32_t* const correct = call.room_for_correct();
    C10_CUDA_CHECK(soft_correct_cuda(s, call.dtype, correct, stream));
    s.loss.correct = correct;
  }
  const int blocks = soft_loss_blocks(s, call.dtype);
  if (call.ready(blocks, stream)) {
    s.loss.sums = call.a.sums;
    s.loss.tile_counter = call.a.tile_counter;
    C10_CUDA_CHECK(soft_loss_fwd_cuda(s, call.dtype, blocks, stream));
  }
  return std::move(call.parts);
}

/// reference.loss_fwd on CUDA tensors, for a target of classes (N,) or of probabilities (N, C).
Parts any_loss_parts(const Tensor& logits, const Tensor& target, const OptionalTensor& votes,
                     const Tensor& log_mass, const OptionalTensor& weight, double ce_weight,
                     double zipf_weight, double label_smoothing, bool only_correct,
                     int64_t ignore_index, std::string_view reduction, Gradient gradient) {
  if (target.dim() == 2)
    return soft_loss_parts(logits, target, votes, log_mass, weight, ce_weight, zipf_weight,
                           label_smoothing, only_correct, reduction, gradient);
  return loss_parts(logits, target, votes, log_mass, weight, ce_weight, zipf_weight,
                    label_smoothing, only_correct, ignore_index, reduction, gradient);
}

Parts loss_fwd(const Tensor& logits, const Tensor& target, const OptionalTensor& votes,
               const Tensor& log_mass, const OptionalTensor& weight, double ce_weight,
               double zipf_weight, double label_smoothing, bool only_correct, int64_t ignore_index,
               std::string_view reduction, bool with_grad) {
  return any_loss_parts(logits, target, votes, log_mass, weight, ce_weight, zipf_weight,
                        label_smoothing, only_correct, ignore_index, reduction,
                        with_grad ? Gradient::kNew : Gradient::kNone);
}

/// Writes the gradient that f(logits, how) gives over the logits; returns its grad_scale.
template <class F>
Tensor write_over(Tensor& logits, F f) {
  const bool aligned = reinterpret_cast<uintptr_t>(logits.const_data_ptr()) % 16 == 0;
  if (logits.is_contiguous() && aligned) return std::get<4>(f(logits, Gradient::kInPlace));
  const Parts parts = f(logits, Gradient::kNew);
  logits.copy_(std::get<3>(parts));
  return std::get<4>(parts);
}

/// loss_fwd's gradient over the logits; returns grad_scale.
Tensor loss_grad_(Tensor& logits, const Tensor& target, const OptionalTensor& votes,
                  const Tensor& log_mass, const OptionalTensor& weight, double ce_weight,
                  double zipf_weight, double label_smoothing, bool only_correct,
                  int64_t ignore_index, std::string_view reduction) {
  return write_over(logits, [&](const Tensor& z, Gradient gradient) {
    return any_loss_parts(z, target, votes, log_mass, weight, ce_weight, zipf_weight,
                          label_smoothing, only_correct, ignore_index, reduction, gradient);
  });
}

/// out = grad * grad_loss * grad_scale, all on one device; out may be grad.
void scale_gradient(const Tensor& grad, const Tensor& grad_loss, const Tensor& grad_scale,
                    const Tensor& out) {
  const auto type = accumulation_type(grad.scalar_type());
  TORCH_CHECK_VALUE(grad.dim() == 2, "grad must have shape (N, C), got ", grad.sizes());
  check_float(grad, "grad");
  const int64_t N = grad.size(0), C = grad.size(1);
  TORCH_CHECK_VALUE(grad_loss.dim() == 0 || (grad_loss.dim() == 1 && grad_loss.size(0) == N),
                    "grad_loss must be a scalar or have shape (", N, ",), got ", grad_loss.sizes());
  check_same_device(grad_loss, "grad_loss", grad);
  check_type(grad_scale, "grad_scale", type);
  check_same_device(grad_scale, "grad_scale", grad);
  TORCH_CHECK_VALUE(grad_scale.numel() <= 1, "grad_scale must be a scalar or empty, got ",
                    grad_scale.sizes());
  if (grad.numel() == 0) return;

  const c10::cuda::CUDAGuard guard(grad.device());
  const Tensor upstream = grad_loss.to(type);
  const bool one = upstream.dim() == 0 || upstream.stride(0) == 0;  // one scale for all rows
  LossBwd a = {};
  a.grad = grad.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.grad_loss = upstream.const_data_ptr();
  a.grad_loss_stride = one ? 0 : upstream.stride(0);
  a.grad_scale = grad_scale.numel() == 1 ? grad_scale.const_data_ptr() : nullptr;
  a.N = one ? 1 : N;
  a.C = one ? N * C : C;
  C10_CUDA_CHECK(loss_bwd_cuda(a, dtype_of(grad.scalar_type()), c10::cuda::getCurrentCUDAStream()));
}

Tensor loss_bwd(const Tensor& grad, const Tensor& grad_loss, const Tensor& grad_scale) {
  const Tensor in = grad.contiguous();
  const Tensor out = at::empty_like(in, in.options(), at::MemoryFormat::Contiguous);
  scale_gradient(in, grad_loss, grad_scale, out);
  return out;
}

void loss_bwd_(Tensor& grad, const Tensor& grad_loss, const Tensor& grad_scale) {
  if (grad.is_contiguous()) {
    scale_gradient(grad, grad_loss, grad_scale, grad);
  } else {
    grad.copy_(loss_bwd(grad, grad_loss, grad_scale));
  }
}

/// Ranks (N, C) int32; a row with a vote outside the classes becomes 0.
Tensor rank_fwd(const Tensor& given_votes, int64_t C) {
  TORCH_CHECK_VALUE(given_votes.dim() == 2, "votes must have shape (N, P), got ",
                    given_votes.sizes());
  const int64_t N = given_votes.size(0);
  check_votes(given_votes, N);
  check_num_classes(C);
  const c10::cuda::CUDAGuard guard(given_votes.device());
  const Tensor votes = *with_contiguous_rows(given_votes);
  if (!tables_fit(static_cast<int32_t>(votes.size(1)), static_cast<int32_t>(C), kFloat32))
    return rank_index(count_votes(votes, C))
        .add_(1)
        .to(at::kInt)
        .masked_fill_(votes.ge(C).any(1, true), 0);
  const Tensor rank = at::empty({N, C}, votes.options().dtype(at::kInt));
  LabelFwd a = {};
  a.votes = votes_of(votes);
  a.N = N;
  a.C = static_cast<int32_t>(C);
  a.out = rank.mutable_data_ptr();
  C10_CUDA_CHECK(rank_fwd_cuda(a, c10::cuda::getCurrentCUDAStream()));
  return rank;
}

/// Soft labels (N, C) in the dtype of log_mass.
Tensor label_fwd(const Tensor& given_target, const Tensor& given_votes,
                 const Tensor& given_log_mass, int64_t C, int64_t ignore_index) {
  TORCH_CHECK_VALUE(given_target.dim() == 1, "target must have shape (N,), got ",
                    given_target.sizes());
  const int64_t N = given_target.size(0);
  check_target(given_target, N);
  check_votes(given_votes, N);
  check_num_classes(C);
  check_same_device(given_votes, "votes", given_target);
  check_same_device(given_log_mass, "log_mass", given_target);
  TORCH_CHECK_TYPE(
      given_log_mass.scalar_type() == at::kFloat || given_log_mass.scalar_type() == at::kDouble,
      "log_mass must be float32 or float64, got ", given_log_mass.scalar_type());
  check_log_mass(given_log_mass, N, C, given_votes.size(1));
  const c10::cuda::CUDAGuard guard(given_target.device());
  const Dtype dtype = dtype_of(given_log_mass.scalar_type());
  const Tensor target = given_target.contiguous(), votes = *with_contiguous_rows(given_votes);
  const bool fits = tables_fit(static_cast<int32_t>(votes.size(1)), static_cast<int32_t>(C), dtype);
  const Tensor log_mass = given_log_mass.dim() == 1 && !fits
                              ? dense_log_mass(given_log_mass, votes, Tensor(), C)
                              : given_log_mass.contiguous();
  const Tensor label = at::empty({N, C}, log_mass.options());
  LabelFwd a = {};
  a.target = target.const_data_ptr<int64_t>();
  a.votes = votes_of(votes);
  a.log_mass = log_mass.const_data_ptr();
  a.dense = log_mass.dim() == 2;
  a.N = N;
  a.C = static_cast<int32_t>(C);
  a.ignore_index = ignore_index;
  a.out = label.mutable_data_ptr();
  C10_CUDA_CHECK(label_fwd_cuda(a, dtype, c10::cuda::getCurrentCUDAStream()));
  return label;
}

}  // namespace

TORCH_LIBRARY_IMPL(zipfls, CUDA, m) {
  m.impl("loss_fwd", TORCH_FN(loss_fwd));
  m.impl("loss_grad_", TORCH_FN(loss_grad_));
  m.impl("loss_bwd", TORCH_FN(loss_bwd));
  m.impl("loss_bwd_", TORCH_FN(loss_bwd_));
  m.impl("rank_fwd", TORCH_FN(rank_fwd));
  m.impl("label_fwd", TORCH_FN(label_fwd));
}

}  // namespace zipfls::cuda
