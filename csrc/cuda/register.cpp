// Binds the operators to torch for CUDA tensors: checks, guards, strides, one plan per call, memory
// from the caching allocator, the current stream. Nothing here synchronises with the device.
#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "launch.h"

namespace zipfls::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Parts =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;     // loss, ce, zipf, grad, grad_scale
using Losses = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, ce, zipf, grad_scale
/// loss, ce, zipf, factors, patches, grad_scale
using LossFactors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

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

Reduction reduction_of(std::string_view name) {  // one of three: check_loss
  if (name == "mean") return kMean;
  return name == "sum" ? kSum : kNone;
}

const void* data_or_null(const OptionalTensor& x) {
  return x.has_value() ? x->const_data_ptr() : nullptr;
}

/// logits (N, C), or a copy, such that each row begins at the phase to 16 bytes that it has in a
/// fresh contiguous tensor: the gradient's vectors and the logits' then coincide, and the order of
/// summation, and so every bit of the result, does not depend on the strides.
Tensor with_aligned_rows(const Tensor& logits) {
  const int64_t N = logits.size(0), C = logits.size(1);
  const auto itemsize = static_cast<int64_t>(logits.element_size());
  const bool base = reinterpret_cast<uintptr_t>(logits.const_data_ptr()) % 16 == 0;
  const bool rows = N <= 1 || (logits.stride(0) - C) * itemsize % 16 == 0;
  if (base && rows && logits.stride(1) == 1) return logits;
  return at::empty(logits.sizes(), logits.options().memory_format(at::MemoryFormat::Contiguous))
      .copy_(logits);
}

/// Whether every row of x is made of whole 16-byte vectors, so that any row may stand beside any
/// other of its type.
bool whole_vectors(const Tensor& x) {
  const auto itemsize = static_cast<int64_t>(x.element_size());
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && x.stride(1) == 1 &&
         x.size(1) * itemsize % 16 == 0 && x.stride(0) * itemsize % 16 == 0;
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
/// For ranks that the kernels do not compute: of logits, and of more votes than their tables hold.
Tensor dense_log_mass(const Tensor& table, const OptionalTensor& votes, const Tensor& logits,
                      int64_t C) {
  const Tensor index = rank_index(votes.has_value() ? count_votes(*votes, C) : logits);
  return table.index_select(0, index.flatten()).view(index.sizes());
}

/// Counters by which the blocks of a launch find which of them arrives last: 0 before a launch and
/// after it. At least `count`, int32, for one launch in `stream`, whose device is the current one.
/// The caller holds the tensor until it has launched.
///
/// Launches on one stream run one after another, so that each stream has its own counters; a graph
/// may be replayed on any stream, so that each captured launch has its own.
Tensor tile_counters(const c10::cuda::CUDAStream& stream, int64_t count) {
  const auto options = at::TensorOptions().device(stream.device()).dtype(at::kInt);
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None)
    return at::zeros({count}, options);
  static std::mutex mutex;
  static auto* const cached =
      new std::map<std::pair<c10::DeviceIndex, c10::StreamId>, Tensor>;  // never freed
  const std::lock_guard<std::mutex> lock(mutex);
  Tensor& counters = (*cached)[{stream.device_index(), stream.id()}];
  if (!counters.defined() || counters.numel() < count) {
    // Not from PyTorch's allocator: while torch.compile's CUDA graphs warm up it allocates from a
    // pool of which nothing may outlive the run. Smaller arrays are not freed: launches to come may
    // hold them.
    const int64_t size =
        std::max<int64_t>({count, 1024, counters.defined() ? 2 * counters.numel() : 0});
    const auto bytes = static_cast<size_t>(size) * sizeof(int32_t);
    void* memory = nullptr;
    // Another thread's capture neither forbids this nor records it.
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    C10_CUDA_CHECK(cudaMalloc(&memory, bytes));
    C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, stream));
    counters = at::from_blob(memory, {size}, options);
  }
  return counters;
}

uint32_t* counters_of(const Tensor& counters) {
  return reinterpret_cast<uint32_t*>(counters.mutable_data_ptr<int32_t>());
}

/// kKept: not written, but what it is made of is.
enum class Gradient { kNone, kNew, kInPlace, kKept };

at::TensorOptions results_type(const Tensor& logits) {
  return logits.options().dtype(accumulation_type(logits.scalar_type()));
}

/// Sizes and pointers of a loss's logits and results; the results, allocated, and grad over the
/// logits where that is asked for.
Parts allocate_results(LossFwd& a, const Tensor& logits, std::string_view reduction_name,
                       Gradient gradient) {
  const int64_t N = logits.size(0), C = logits.size(1);
  const Reduction reduction = reduction_of(reduction_name);
  const auto options = results_type(logits);
  const auto shape = reduction == kNone ? at::DimVector({N}) : at::DimVector();
  const bool with_grad = gradient == Gradient::kNew || gradient == Gradient::kInPlace;
  const bool scaled =
      gradient != Gradient::kNone && logits.scalar_type() == at::kHalf && reduction == kMean;
  const Tensor loss = at::empty(shape, options), ce = at::empty(shape, options),
               zipf = at::empty(shape, options);
  const Tensor grad =
      gradient == Gradient::kInPlace ? logits
      : with_grad ? at::empty({N, C}, logits.options().memory_format(at::MemoryFormat::Contiguous))
                  : at::empty({0}, logits.options());
  const Tensor grad_scale = scaled ? at::empty({}, options) : at::empty({0}, options);
  a.logits = logits.const_data_ptr();
  a.logits_stride = logits.stride(0);
  a.N = N;
  a.C = static_cast<int32_t>(C);
  a.reduction = reduction;
  a.scaled = scaled;
  a.loss = loss.mutable_data_ptr();
  a.ce_out = ce.mutable_data_ptr();
  a.zipf_out = zipf.mutable_data_ptr();
  a.grad = with_grad && N > 0 ? grad.mutable_data_ptr() : nullptr;
  a.grad_scale = scaled ? grad_scale.mutable_data_ptr() : nullptr;
  return {loss, ce, zipf, grad, grad_scale};
}

/// What a mean over class indices divides by: the memory of partial sums, where a launch of its own
/// precedes.
Tensor prepare_denominators(LossFwd& a, const Tensor& logits, cudaStream_t stream) {
  a.denominators = {a.target, a.weight, a.correct, nullptr, 0, a.N, a.C, a.ignore_index};
  const int blocks = totals_blocks(a.N);
  if (blocks == 0) return {};
  const Tensor partials = at::empty({3, blocks}, logits.options().dtype(at::kDouble));
  C10_CUDA_CHECK(loss_totals_cuda({a.denominators, partials.mutable_data_ptr<double>()},
                                  dtype_of(logits.scalar_type()), blocks, stream));
  a.denominators.partials = partials.const_data_ptr<double>();
  a.denominators.num_partials = blocks;
  return partials;
}

/// Memory for sums over blocks, to be held until the launch: (2, blocks) float64 and a counter.
std::pair<Tensor, Tensor> prepare_sums(LossFwd& a, const LossPlan& plan, const Tensor& logits,
                                       const c10::cuda::CUDAStream& stream) {
  if (a.reduction == kNone) return {};
  const Tensor sums = at::empty({2, plan.blocks}, logits.options().dtype(at::kDouble));
  const Tensor counter = tile_counters(stream, 1);
  a.sums = sums.mutable_data_ptr<double>();
  a.tile_counter = counters_of(counter);
  return {sums, counter};
}

/// reference.loss_fwd on CUDA tensors: (loss, ce, zipf, grad, grad_scale). In place, the logits are
/// contiguous and aligned, and grad is the same memory. kept: where factors and patches go, for
/// Gradient::kKept.
Parts loss_parts(const Tensor& given_logits, const Tensor& given_target,
                 const OptionalTensor& given_votes, const Tensor& given_log_mass,
                 const OptionalTensor& given_weight, double ce_weight, double zipf_weight,
                 double label_smoothing, bool only_correct, int64_t ignore_index,
                 std::string_view reduction, Gradient gradient,
                 std::pair<Tensor, Tensor>* kept = nullptr) {
  check_loss(given_logits, given_target, given_votes, given_log_mass, given_weight, reduction);
  const int64_t N = given_logits.size(0), C = given_logits.size(1);
  const bool soft = given_target.dim() == 2;  // probabilities
  const c10::cuda::CUDAGuard guard(given_logits.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();

  // Inputs, as the kernels take them.
  const Dtype dtype = dtype_of(given_logits.scalar_type());
  const Tensor logits = with_aligned_rows(given_logits);
  const Tensor target = soft ? with_aligned_rows(given_target) : given_target.contiguous();
  const OptionalTensor votes = with_contiguous_rows(given_votes);
  OptionalTensor weight;
  if (given_weight.has_value()) weight = given_weight->contiguous();
  LossGeneral a = {};
  a.zipf = zipf_weight != 0;
  const bool fits = votes.has_value() && tables_fit(static_cast<int32_t>(votes->size(1)),
                                                    static_cast<int32_t>(C), dtype);
  a.dense = a.zipf && (given_log_mass.dim() == 2 || !fits);
  const Tensor log_mass = a.dense && given_log_mass.dim() == 1
                              ? dense_log_mass(given_log_mass, votes, logits, C)
                              : given_log_mass.contiguous();

  const Parts results = allocate_results(a, logits, reduction, gradient);
  if (soft) {
    a.probabilities = target.const_data_ptr();
    a.probabilities_stride = target.stride(0);
  } else {
    a.target = target.const_data_ptr<int64_t>();
  }
  a.votes = votes_of(votes);
  a.log_mass = log_mass.const_data_ptr();
  a.weight = data_or_null(weight);
  a.ignore_index = ignore_index;
  a.ce = ce_weight != 0;
  a.only_correct = only_correct;
  a.ce_weight = ce_weight;
  a.zipf_weight = zipf_weight;
  a.label_smoothing = label_smoothing;
  if (kept != nullptr) {
    TORCH_CHECK_VALUE(!soft, "target must be class indices, got probabilities");
    TORCH_CHECK_VALUE(!a.dense, "votes must rank the classes, at most as many as tables hold");
    TORCH_CHECK_VALUE(!weight.has_value() || label_smoothing == 0,
                      "label_smoothing must be 0 beside weight, got ", label_smoothing);
    auto& [factors, patches] = *kept;
    factors = at::empty({N, kFactors}, results_type(logits));
    patches = at::empty({N, a.zipf ? votes->size(1) : 0}, logits.options());
    a.factors = factors.mutable_data_ptr();
    a.patches = patches.mutable_data_ptr();
  }

  // Which samples count, and what a mean divides by, where a launch of its own must precede.
  Tensor correct, partials;
  if (only_correct && a.zipf && (soft || a.reduction == kMean)) {
    correct = at::empty({N}, logits.options().dtype(at::kInt));
    C10_CUDA_CHECK(loss_correct_cuda(a, dtype, correct.mutable_data_ptr<int32_t>(), stream));
    a.correct = correct.const_data_ptr<int32_t>();
  }
  if (a.reduction == kMean && !soft) partials = prepare_denominators(a, logits, stream);
  const LossPlan plan = plan_loss(a, dtype, current_device());
  const auto held = prepare_sums(a, plan, logits, stream);
  if (N > 0 || a.reduction != kNone) C10_CUDA_CHECK(loss_fwd_cuda(a, dtype, plan, stream));
  return results;
}

Parts loss_fwd(const Tensor& logits, const Tensor& target, const OptionalTensor& votes,
               const Tensor& log_mass, const OptionalTensor& weight, double ce_weight,
               double zipf_weight, double label_smoothing, bool only_correct, int64_t ignore_index,
               std::string_view reduction, bool with_grad) {
  return loss_parts(logits, target, votes, log_mass, weight, ce_weight, zipf_weight,
                    label_smoothing, only_correct, ignore_index, reduction,
                    with_grad ? Gradient::kNew : Gradient::kNone);
}

/// loss_fwd without a gradient, but with what loss_factors_bwd_ makes it of: factors (N, 4) and the
/// gradient at the votes (N, P), P = 0 without a Zipf term.
LossFactors loss_factors_fwd(const Tensor& logits, const Tensor& target,
                             const OptionalTensor& votes, const Tensor& log_mass,
                             const OptionalTensor& weight, double ce_weight, double zipf_weight,
                             double label_smoothing, bool only_correct, int64_t ignore_index,
                             std::string_view reduction) {
  std::pair<Tensor, Tensor> kept;
  const auto [loss, ce, zipf, grad, grad_scale] =
      loss_parts(logits, target, votes, log_mass, weight, ce_weight, zipf_weight, label_smoothing,
                 only_correct, ignore_index, reduction, Gradient::kKept, &kept);
  return {loss, ce, zipf, kept.first, kept.second, grad_scale};
}

/// Writes a gradient over the logits, by compute(where it goes).
template <class Compute>
Losses over_logits(Tensor& logits, Compute compute) {
  const bool aligned = reinterpret_cast<uintptr_t>(logits.const_data_ptr()) % 16 == 0;
  const bool in_place = logits.is_contiguous() && aligned;
  const Parts parts = compute(in_place ? Gradient::kInPlace : Gradient::kNew);
  const auto& [loss, ce, zipf, grad, grad_scale] = parts;
  if (!in_place) logits.copy_(grad);
  return {loss, ce, zipf, grad_scale};
}

/// loss_fwd with the gradient over the logits.
Losses loss_grad_(Tensor& logits, const Tensor& target, const OptionalTensor& votes,
                  const Tensor& log_mass, const OptionalTensor& weight, double ce_weight,
                  double zipf_weight, double label_smoothing, bool only_correct,
                  int64_t ignore_index, std::string_view reduction) {
  return over_logits(logits, [&](Gradient gradient) {
    return loss_parts(logits, target, votes, log_mass, weight, ce_weight, zipf_weight,
                      label_smoothing, only_correct, ignore_index, reduction, gradient);
  });
}

/// reference.distill_fwd on CUDA tensors: (loss, ce, distillation, grad, grad_scale). A teacher of
/// another type than the logits is first converted to the accumulation type.
Parts distill_parts(const Tensor& given_logits, const Tensor& given_teacher,
                    const OptionalTensor& given_target, const OptionalTensor& given_weight,
                    const OptionalTensor& given_index, double ce_weight, double kd_weight,
                    double tckd_weight, double nckd_weight, double soft_target_weight,
                    double max_weight, double temperature, std::string_view form,
                    int64_t ignore_index, std::string_view reduction, Gradient gradient) {
  check_distill(given_logits, given_teacher, given_target, given_weight, given_index, temperature,
                form, reduction);
  const c10::cuda::CUDAGuard guard(given_logits.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Dtype dtype = dtype_of(given_logits.scalar_type());
  const Tensor logits = with_aligned_rows(given_logits);
  const auto type = accumulation_type(given_logits.scalar_type());
  const bool wide = given_teacher.scalar_type() != given_logits.scalar_type();
  const bool of_type = !wide || given_teacher.scalar_type() == type;
  const bool by_index =
      given_index.has_value() && of_type && whole_vectors(given_teacher) && whole_vectors(logits);
  Tensor teacher = given_teacher;
  OptionalTensor index;
  if (given_index.has_value()) index = given_index->contiguous();
  OptionalTensor target, weight;
  if (given_target.has_value()) target = given_target->contiguous();
  if (index.has_value() && !by_index) {  // rows are gathered; outside of the table: NaN
    const int64_t R = given_teacher.size(0);
    const Tensor outside = index->lt(0).logical_or(index->ge(R));
    teacher = teacher.index_select(0, index->clamp(0, R - 1));
    teacher.masked_fill_(outside.unsqueeze(1), NAN);
    if (target.has_value())
      target = target->masked_fill(outside.logical_and(target->ne(ignore_index)),
                                   ignore_index == -1 ? -2 : -1);
    index = std::nullopt;
  }
  if (wide) teacher = teacher.to(type);
  if (!by_index) teacher = with_aligned_rows(teacher);
  const bool columns = given_weight.has_value() && given_weight->dim() == 2;
  if (given_weight.has_value()) weight = columns ? *given_weight : given_weight->contiguous();
  DistillFwd a = {};
  const Parts results = allocate_results(a, logits, reduction, gradient);
  a.target = target.has_value() ? target->const_data_ptr<int64_t>() : nullptr;
  a.ignore_index = ignore_index;
  a.ce = ce_weight != 0;
  a.zipf = true;
  a.ce_weight = ce_weight;
  a.zipf_weight = 1;
  a.teacher = teacher.const_data_ptr();
  a.teacher_stride = teacher.stride(0);
  a.wide = wide;
  a.teacher_index = index.has_value() ? index->const_data_ptr<int64_t>() : nullptr;
  a.table_rows = given_teacher.size(0);
  a.sample_weight = data_or_null(columns ? weight->select(1, 1) : weight);
  a.share = columns ? weight->const_data_ptr() : nullptr;
  a.weight_stride = columns ? weight->stride(0) : 1;
  a.kd_weight = kd_weight;
  a.tckd_weight = tckd_weight;
  a.nckd_weight = nckd_weight;
  a.soft_target_weight = soft_target_weight;
  a.max_weight = max_weight;
  a.temperature = temperature;
  a.divergence = form == "divergence";
  a.probabilities = form == "probabilities";

  Tensor partials;
  if (a.reduction == kMean && a.target != nullptr)
    partials = prepare_denominators(a, logits, stream);
  const LossPlan plan = plan_distill(a, dtype, current_device());
  const auto held = prepare_sums(a, plan, logits, stream);
  if (a.N > 0 || a.reduction != kNone) C10_CUDA_CHECK(distill_fwd_cuda(a, dtype, plan, stream));
  return results;
}

Parts distill_fwd(const Tensor& logits, const Tensor& teacher, const OptionalTensor& target,
                  const OptionalTensor& sample_weight, const OptionalTensor& teacher_index,
                  double ce_weight, double kd_weight, double tckd_weight, double nckd_weight,
                  double soft_target_weight, double max_weight, double temperature,
                  std::string_view form, int64_t ignore_index, std::string_view reduction,
                  bool with_grad) {
  return distill_parts(logits, teacher, target, sample_weight, teacher_index, ce_weight, kd_weight,
                       tckd_weight, nckd_weight, soft_target_weight, max_weight, temperature, form,
                       ignore_index, reduction, with_grad ? Gradient::kNew : Gradient::kNone);
}

/// distill_fwd's gradient over the logits; returns grad_scale.
Losses distill_grad_(Tensor& logits, const Tensor& teacher, const OptionalTensor& target,
                     const OptionalTensor& sample_weight, const OptionalTensor& teacher_index,
                     double ce_weight, double kd_weight, double tckd_weight, double nckd_weight,
                     double soft_target_weight, double max_weight, double temperature,
                     std::string_view form, int64_t ignore_index, std::string_view reduction) {
  // In the memory of the logits, but not the logits themselves: its rows may be other samples'.
  const bool same = teacher.const_data_ptr() == logits.const_data_ptr() &&
                    teacher.strides() == logits.strides() &&
                    teacher.scalar_type() == logits.scalar_type() && !teacher_index.has_value();
  const Tensor apart = teacher.is_alias_of(logits) && !same ? teacher.clone() : teacher;
  return over_logits(logits, [&](Gradient gradient) {
    return distill_parts(logits, apart, target, sample_weight, teacher_index, ce_weight, kd_weight,
                         tckd_weight, nckd_weight, soft_target_weight, max_weight, temperature,
                         form, ignore_index, reduction, gradient);
  });
}

/// Checks what multiplies a gradient (N, C), or what stands in its place.
void check_upstream(const Tensor& grad_loss, const Tensor& grad_scale, const Tensor& grad) {
  const int64_t N = grad.size(0);
  TORCH_CHECK_VALUE(grad_loss.dim() == 0 || (grad_loss.dim() == 1 && grad_loss.size(0) == N),
                    "grad_loss must be a scalar or have shape (", N, ",), got ", grad_loss.sizes());
  check_same_device(grad_loss, "grad_loss", grad);
  check_type(grad_scale, "grad_scale", accumulation_type(grad.scalar_type()));
  check_same_device(grad_scale, "grad_scale", grad);
  TORCH_CHECK_VALUE(grad_scale.numel() <= 1, "grad_scale must be a scalar or empty, got ",
                    grad_scale.sizes());
}

/// out = grad * grad_loss * grad_scale, all on one device; out may be grad.
void scale_gradient(const Tensor& grad, const Tensor& grad_loss, const Tensor& grad_scale,
                    const Tensor& out) {
  const auto type = accumulation_type(grad.scalar_type());
  TORCH_CHECK_VALUE(grad.dim() == 2, "grad must have shape (N, C), got ", grad.sizes());
  check_float(grad, "grad");
  check_upstream(grad_loss, grad_scale, grad);
  const int64_t N = grad.size(0), C = grad.size(1);
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

/// The gradient over the logits, times grad_loss and grad_scale, from loss_factors_fwd's results.
void loss_factors_bwd_(Tensor& logits, const Tensor& given_target,
                       const OptionalTensor& given_votes, const Tensor& factors,
                       const Tensor& given_patches, const Tensor& grad_loss,
                       const Tensor& grad_scale) {
  const int64_t N = check_logits(logits);
  const auto type = accumulation_type(logits.scalar_type());
  check_target(given_target, N);
  check_same_device(given_target, "target", logits);
  const int64_t P = given_patches.dim() == 2 ? given_patches.size(1) : -1;
  TORCH_CHECK_VALUE(P >= 0 && given_patches.size(0) == N, "patches must have shape (", N,
                    ", P), got ", given_patches.sizes());
  check_type(given_patches, "patches", logits.scalar_type());
  check_same_device(given_patches, "patches", logits);
  TORCH_CHECK_VALUE(factors.sizes() == at::IntArrayRef({N, kFactors}), "factors must have shape (",
                    N, ", ", kFactors, "), got ", factors.sizes());
  check_type(factors, "factors", type);
  check_same_device(factors, "factors", logits);
  check_upstream(grad_loss, grad_scale, logits);
  OptionalTensor votes;
  if (P > 0) {
    TORCH_CHECK_VALUE(given_votes.has_value(), "votes must be those of the patches, got none");
    check_votes(*given_votes, N);
    TORCH_CHECK_VALUE(given_votes->size(1) == P, "votes must have shape (", N, ", ", P, "), got ",
                      given_votes->sizes());
    check_same_device(*given_votes, "votes", logits);
    votes = with_contiguous_rows(given_votes);
  }
  if (N == 0) return;

  const c10::cuda::CUDAGuard guard(logits.device());
  const Tensor target = given_target.contiguous(), patches = given_patches.contiguous(),
               rows = factors.contiguous(), upstream = grad_loss.to(type),
               grad = logits.contiguous();
  FactorsBwd a = {};
  a.logits = grad.mutable_data_ptr();
  a.target = target.const_data_ptr<int64_t>();
  a.votes = votes_of(votes);
  a.factors = rows.const_data_ptr();
  a.patches = patches.const_data_ptr();
  a.grad_loss = upstream.const_data_ptr();
  a.grad_loss_stride = upstream.dim() == 0 ? 0 : upstream.stride(0);
  a.grad_scale = grad_scale.numel() == 1 ? grad_scale.const_data_ptr() : nullptr;
  a.N = N;
  a.C = static_cast<int32_t>(logits.size(1));
  C10_CUDA_CHECK(
      loss_factors_bwd_cuda(a, dtype_of(logits.scalar_type()), c10::cuda::getCurrentCUDAStream()));
  if (!logits.is_contiguous()) logits.copy_(grad);
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

/// Refuses what the kernels cannot compute: float64, and float32 but in TensorFloat-32.
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

/// features (N, D, H, W) or (N, T, D); weight (C, D); bias (C,) -> votes (N, P) int32.
Tensor vote_fwd(const Tensor& features, const Tensor& weight, const OptionalTensor& bias,
                int64_t upsample) {
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
  const Tensor votes = at::empty({x.N, positions}, features.options().dtype(at::kInt));
  x.type = vote_type(features.scalar_type());
  if (votes.numel() == 0) return votes;

  const c10::cuda::CUDAGuard guard(features.device());
  x.features = features.const_data_ptr();
  x.weight = weight.const_data_ptr();
  x.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  x.upsample = static_cast<int>(upsample);
  x.votes = votes.mutable_data_ptr<int32_t>();
  const Device& device = current_device();
  const char* const reason = vote_refusal(x, device);
  TORCH_CHECK(reason == nullptr, "backend='cuda' cannot serve vote_fwd on this device: ", reason);
  const vote::VotePlan plan = plan_vote(x, device);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor scratch =
      at::empty({static_cast<int64_t>(plan.bytes)}, features.options().dtype(at::kByte));
  Tensor counters;
  if (plan.tile_counters > 0) counters = tile_counters(stream, plan.tile_counters);
  C10_CUDA_CHECK(vote_fwd_cuda(x, plan, scratch.mutable_data_ptr(),
                               counters.defined() ? counters_of(counters) : nullptr, stream));
  return votes;
}

}  // namespace

TORCH_LIBRARY_IMPL(zipfls, CUDA, m) {
  m.impl("loss_fwd", TORCH_FN(loss_fwd));
  m.impl("loss_grad_", TORCH_FN(loss_grad_));
  m.impl("loss_factors_fwd", TORCH_FN(loss_factors_fwd));
  m.impl("loss_factors_bwd_", TORCH_FN(loss_factors_bwd_));
  m.impl("distill_fwd", TORCH_FN(distill_fwd));
  m.impl("distill_grad_", TORCH_FN(distill_grad_));
  m.impl("loss_bwd", TORCH_FN(loss_bwd));
  m.impl("loss_bwd_", TORCH_FN(loss_bwd_));
  m.impl("rank_fwd", TORCH_FN(rank_fwd));
  m.impl("label_fwd", TORCH_FN(label_fwd));
  m.impl("vote_fwd", TORCH_FN(vote_fwd));
}

}  // namespace zipfls::cuda
