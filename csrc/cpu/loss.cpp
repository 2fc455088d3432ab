// loss_fwd, loss_grad_, loss_bwd, loss_bwd_: cross-entropy and the Zipf term with their gradient,
// for a target of classes (N,) or of probabilities (N, C). distill_fwd, distill_grad_:
// cross-entropy and distillation from a teacher's logits.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <string_view>
#include <tuple>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "recycle.h"
#include "rows.h"

namespace zipfls::cpu {
namespace {

// loss, ce, zipf, grad, grad_scale
using Parts = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// loss, ce, zipf, grad_scale
using Losses = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Losses without_grad(const Parts& parts) {
  const auto& [loss, ce, zipf, grad, grad_scale] = parts;
  return {loss, ce, zipf, grad_scale};
}

double element(const at::Tensor& x, int64_t i) {  // x float32 or float64, contiguous
  return x.scalar_type() == at::kDouble ? x.const_data_ptr<double>()[i]
                                        : x.const_data_ptr<float>()[i];
}

void set_element(const at::Tensor& x, int64_t i, double value) {
  if (x.scalar_type() == at::kDouble)
    x.mutable_data_ptr<double>()[i] = value;
  else
    x.mutable_data_ptr<float>()[i] = static_cast<float>(value);
}

/// The denominators of a mean, without only_correct.
struct Totals {
  double weight;       // sum of the class weights of the targets that count
  int64_t samples;     // the number of those targets
  bool inside = true;  // whether they are all in [0, C)
};

/// Totals of a target of classes (N,).
Totals total(const int64_t* target, int64_t N, int64_t C, int64_t ignore_index,
             const std::optional<at::Tensor>& weight) {
  Totals totals{0, 0};
  for (int64_t i = 0; i < N; i++) {
    const int64_t y = target[i];
    if (y == ignore_index) continue;
    if (y < 0 || y >= C) return {0, 0, false};
    totals.samples++;
    if (weight.has_value()) totals.weight += element(*weight, y);
  }
  if (!weight.has_value()) totals.weight = static_cast<double>(totals.samples);
  return totals;
}

/// argmax of a row of probabilities (C,), the lowest index on ties; a NaN is never the largest.
template <class A>
int64_t argmax(const A* x, int64_t C) {
  int64_t best = C;
  for (int64_t c = 0; c < C; c++)
    if (best == C ? x[c] == x[c] : x[c] > x[best]) best = c;
  return best == C ? 0 : best;
}

/// The factor that a mean's gradient is stored without. A float16 mean is stored per sample, and
/// loss_bwd multiplies by 1/N together with the upstream gradient in float32. 1 otherwise.
double held_back(double scale, at::ScalarType type, bool mean, bool with_grad) {
  const bool usable = std::isfinite(scale) && scale != 0;
  return with_grad && type == at::kHalf && mean && usable ? scale : 1;
}

/// grad_scale: the scalar that multiplies grad in loss_bwd, or (0,).
at::Tensor grad_scale_of(double scale, at::ScalarType type, bool mean, bool with_grad,
                         const at::TensorOptions& options) {
  if (!(with_grad && type == at::kHalf && mean)) return at::empty({0}, options);
  at::Tensor grad_scale = at::empty({}, options);
  set_element(grad_scale, 0, scale);
  return grad_scale;
}

/// One part of the loss: its rows (N,) float64, its weight in the loss, the factor of its mean.
struct Part {
  const double* rows;
  double weight;
  double scale;
};

/// (loss, ce, zipf): scalars, or (N,) for "none".
std::tuple<at::Tensor, at::Tensor, at::Tensor> reduce_parts(const Part& ce, const Part& zipf,
                                                            int64_t N, bool none,
                                                            const at::TensorOptions& options) {
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

/// reference.loss_fwd on CPU tensors. With only_correct, logits and probabilities are read a second
/// time where the number of correct samples, or an argmax of probabilities, is needed.
///
/// Args: grad (N, C), contiguous, uninitialised or the logits themselves: a row's logits are read
/// before its gradient is written. (0,) for no gradient.
Parts loss_into(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& target,
                const std::optional<at::Tensor>& votes, const at::Tensor& log_mass,
                const std::optional<at::Tensor>& weight, double ce_weight, double zipf_weight,
                double label_smoothing, bool only_correct, int64_t ignore_index,
                std::string_view reduction) {
  check_loss(logits, target, votes, log_mass, weight, reduction);
  const int64_t N = logits.size(0), C = logits.size(1);
  const int64_t P = votes.has_value() ? votes->size(1) : 0;
  const auto type = accumulation_type(logits.scalar_type());
  const bool soft = target.dim() == 2, wide = type == at::kDouble;
  const bool mean = reduction == "mean", none = reduction == "none", with_grad = grad.dim() == 2;

  const Kernels& k = kernels();
  const Dtype dtype = dtype_of(logits);
  const at::Tensor z = with_contiguous_rows(logits), mass = log_mass.contiguous();
  const at::Tensor t = soft ? with_contiguous_rows(target) : target.contiguous();
  const at::Tensor v = votes.has_value() ? with_contiguous_rows(*votes) : at::Tensor();
  std::optional<at::Tensor> w;
  if (weight.has_value()) w = weight->contiguous();
  const int64_t* const classes = soft ? nullptr : t.const_data_ptr<int64_t>();  // (N,) int64

  auto raise = [&] {
    raise_outside(soft ? nullptr : &target, votes.has_value() ? &*votes : nullptr, C,
                  soft ? nullptr : &ignore_index);
  };
  const Totals totals =
      soft ? Totals{static_cast<double>(N), N} : total(classes, N, C, ignore_index, w);
  if (!totals.inside) raise();

  LossFwd a{};
  a.C = C;
  a.logits = z.const_data_ptr();
  a.logits_stride = z.stride(0);
  a.target = t.const_data_ptr();
  a.target_stride = t.stride(0);
  if (votes.has_value()) a.votes = votes_of(v);
  a.log_mass = mass.const_data_ptr();
  a.mass = mass.dim() == 2 ? Mass::kPerClass : votes.has_value() ? Mass::kByVotes : Mass::kByLogits;
  a.weight = w.has_value() ? w->const_data_ptr() : nullptr;
  a.weight_sum = static_cast<double>(C);
  if (w.has_value() && !soft) {
    a.weight_sum = 0;
    for (int64_t c = 0; c < C; c++) a.weight_sum += element(*w, c);
  }
  a.ignore_index = ignore_index;
  a.ce = ce_weight != 0;
  a.zipf = zipf_weight != 0;
  a.only_correct = only_correct;
  a.label_smoothing = label_smoothing;

  // A mean of the Zipf part under only_correct divides by a number that only the logits tell. The
  // row kernel itself compares with a class, but not with an argmax of probabilities.
  std::unique_ptr<uint8_t[]> correct;  // (N,) bool
  int64_t zipf_samples = totals.samples;
  if (only_correct && (mean || soft)) {
    correct = std::make_unique<uint8_t[]>(N);
    const auto* const rows = static_cast<const char*>(a.logits);
    const int64_t row_bytes = a.logits_stride * z.element_size();
    auto target_class = [&](int64_t i) {
      if (!soft) return classes[i];
      const int64_t at = i * a.target_stride;
      return wide ? argmax(static_cast<const double*>(a.target) + at, C)
                  : argmax(static_cast<const float*>(a.target) + at, C);
    };
    at::parallel_for(0, N, grain(C, 0), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        correct[i] = (soft || classes[i] != ignore_index) &&
                     k.is_correct[dtype](rows + i * row_bytes, C, target_class(i));
    });
    zipf_samples = std::count(correct.get(), correct.get() + N, 1);
    a.correct = correct.get();
  }
  // If no target has a weight the mean of classes is NaN, as F.cross_entropy's, not infinite.
  const double ce_scale = !mean ? 1.0 : !soft && totals.weight == 0 ? NAN : 1 / totals.weight;
  const double zipf_scale = !mean ? 1.0
                            : totals.samples > 0 && zipf_samples == 0
                                ? 0.0
                                : 1 / static_cast<double>(zipf_samples);
  const double scale =
      held_back(ce_weight != 0 ? ce_scale : zipf_scale, logits.scalar_type(), mean, with_grad);
  a.ce_factor = ce_weight * (ce_scale / scale);
  a.zipf_factor = zipf_weight * (zipf_scale / scale);
  a.grad = with_grad ? grad.mutable_data_ptr() : nullptr;
  const auto row_losses = std::make_unique_for_overwrite<double[]>(2 * N);  // (2, N) float64
  a.ce_rows = row_losses.get();
  a.zipf_rows = row_losses.get() + N;

  std::atomic<bool> inside{true};
  const bool sort = a.zipf && a.mass == Mass::kByLogits;
  const auto kernel = soft ? k.soft_loss_fwd[dtype] : k.loss_fwd[dtype];
  at::parallel_for(0, N, grain(soft ? 2 * C : C, P), [&](int64_t begin, int64_t end) {
    const Scratch scratch = thread_scratch().get(C, P, wide ? 8 : 4, sort);
    if (!kernel(a, scratch, begin, end)) inside = false;
  });
  if (!inside) raise();

  const auto options = logits.options().dtype(type);
  auto [loss, ce, zipf] = reduce_parts({a.ce_rows, ce_weight, ce_scale},
                                       {a.zipf_rows, zipf_weight, zipf_scale}, N, none, options);
  return {loss, ce, zipf, grad,
          grad_scale_of(scale, logits.scalar_type(), mean, with_grad, options)};
}

Parts loss_fwd_cpu(const at::Tensor& logits, const at::Tensor& target,
                   const std::optional<at::Tensor>& votes, const at::Tensor& log_mass,
                   const std::optional<at::Tensor>& weight, double ce_weight, double zipf_weight,
                   double label_smoothing, bool only_correct, int64_t ignore_index,
                   std::string_view reduction, bool with_grad) {
  return loss_into(gradient_like(logits, with_grad), logits, target, votes, log_mass, weight,
                   ce_weight, zipf_weight, label_smoothing, only_correct, ignore_index, reduction);
}

/// As reference.loss_grad_.
Losses loss_grad__cpu(at::Tensor& logits, const at::Tensor& target,
                      const std::optional<at::Tensor>& votes, const at::Tensor& log_mass,
                      const std::optional<at::Tensor>& weight, double ce_weight, double zipf_weight,
                      double label_smoothing, bool only_correct, int64_t ignore_index,
                      std::string_view reduction) {
  check_contiguous(logits, "logits");
  return without_grad(loss_into(logits, logits, target, votes, log_mass, weight, ce_weight,
                                zipf_weight, label_smoothing, only_correct, ignore_index,
                                reduction));
}

/// IndexError that names the first row outside a table of R rows, of samples that are not ignored.
void raise_outside_table(const at::Tensor& index, int64_t R, const at::Tensor& target,
                         int64_t ignore_index) {
  const auto* const rows = index.const_data_ptr<int64_t>();
  const auto* const y = target.defined() ? target.const_data_ptr<int64_t>() : nullptr;
  for (int64_t i = 0; i < index.size(0); i++) {
    if ((y == nullptr || y[i] != ignore_index) && (rows[i] < 0 || rows[i] >= R))
      TORCH_CHECK_INDEX(false, "teacher_index[", i, "] = ", rows[i], " is outside [0, ", R, ")");
  }
}

/// reference.distill_fwd on CPU tensors; grad as of loss_into.
Parts distill_into(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& teacher,
                   const std::optional<at::Tensor>& target,
                   const std::optional<at::Tensor>& sample_weight,
                   const std::optional<at::Tensor>& teacher_index, double ce_weight,
                   double kd_weight, double tckd_weight, double nckd_weight,
                   double soft_target_weight, double max_weight, double temperature,
                   std::string_view form, int64_t ignore_index, std::string_view reduction) {
  check_distill(logits, teacher, target, sample_weight, teacher_index, temperature, form,
                reduction);
  const int64_t N = logits.size(0), C = logits.size(1);
  const auto type = accumulation_type(logits.scalar_type());
  const bool mean = reduction == "mean", with_grad = grad.dim() == 2;
  const bool same_type = teacher.scalar_type() == logits.scalar_type();
  const bool columns = sample_weight.has_value() && sample_weight->dim() == 2;

  const Dtype dtype = dtype_of(logits);
  const at::Tensor z = with_contiguous_rows(logits);
  const at::Tensor y = target.has_value() ? target->contiguous() : at::Tensor();
  int64_t samples = N;
  if (target.has_value()) {
    const Totals totals = total(y.const_data_ptr<int64_t>(), N, C, ignore_index, std::nullopt);
    if (!totals.inside) raise_outside(&y, nullptr, C, &ignore_index);
    samples = totals.samples;
  }
  at::Tensor index;
  if (teacher_index.has_value()) {
    index = teacher_index->contiguous();
    raise_outside_table(index, teacher.size(0), y, ignore_index);
  }
  // Of a table that is to be copied, the rows of the samples alone.
  const bool of_type = same_type || teacher.scalar_type() == type;
  const bool copied = !of_type || (teacher.stride(1) != 1 && C > 1);
  at::Tensor t = teacher;  // (N, C), or (R, C) by index
  if (index.defined() && copied) {
    t = t.index_select(0, index.clamp(0, teacher.size(0) - 1));
    index = at::Tensor();
  }
  t = with_contiguous_rows(same_type ? t : t.to(type));
  const double mean_scale = mean ? 1 / static_cast<double>(samples) : 1.0;
  const double scale = held_back(mean_scale, logits.scalar_type(), mean, with_grad);
  const auto row_losses = std::make_unique_for_overwrite<double[]>(2 * N);  // (2, N) float64

  DistillFwd a{};
  a.C = C;
  a.logits = z.const_data_ptr();
  a.logits_stride = z.stride(0);
  a.teacher = t.const_data_ptr();
  a.teacher_stride = t.stride(0);
  a.teacher_index = index.defined() ? index.const_data_ptr<int64_t>() : nullptr;
  a.target = y.defined() ? y.const_data_ptr<int64_t>() : nullptr;
  a.ignore_index = ignore_index;
  if (sample_weight.has_value()) {
    const auto* const first = static_cast<const char*>(sample_weight->const_data_ptr());
    a.weight_stride = sample_weight->stride(0);
    a.share = columns ? first : nullptr;
    a.sample_weight =
        columns ? first + sample_weight->stride(1) * sample_weight->element_size() : first;
  }
  a.ce_weight = ce_weight;
  a.kd_weight = kd_weight;
  a.tckd_weight = tckd_weight;
  a.nckd_weight = nckd_weight;
  a.soft_target_weight = soft_target_weight;
  a.max_weight = max_weight;
  a.temperature = temperature;
  a.cross_entropy = form != "divergence";
  a.probabilities = form == "probabilities";
  a.factor = mean_scale / scale;
  a.grad = with_grad ? grad.mutable_data_ptr() : nullptr;
  a.ce_rows = row_losses.get();
  a.rest_rows = row_losses.get() + N;
  const auto kernel = same_type ? kernels().distill_fwd[dtype] : kernels().distill_fwd_wide[dtype];
  at::parallel_for(0, N, grain(3 * C, 0), [&](int64_t begin, int64_t end) {
    kernel(a, thread_scratch().get(C, 0, type == at::kDouble ? 8 : 4, false), begin, end);
  });

  const auto options = logits.options().dtype(type);
  auto [loss, ce, rest] =
      reduce_parts({a.ce_rows, ce_weight, mean_scale}, {a.rest_rows, 1, mean_scale}, N,
                   reduction == "none", options);
  return {loss, ce, rest, grad,
          grad_scale_of(scale, logits.scalar_type(), mean, with_grad, options)};
}

Parts distill_fwd_cpu(const at::Tensor& logits, const at::Tensor& teacher,
                      const std::optional<at::Tensor>& target,
                      const std::optional<at::Tensor>& sample_weight,
                      const std::optional<at::Tensor>& teacher_index, double ce_weight,
                      double kd_weight, double tckd_weight, double nckd_weight,
                      double soft_target_weight, double max_weight, double temperature,
                      std::string_view form, int64_t ignore_index, std::string_view reduction,
                      bool with_grad) {
  return distill_into(gradient_like(logits, with_grad), logits, teacher, target, sample_weight,
                      teacher_index, ce_weight, kd_weight, tckd_weight, nckd_weight,
                      soft_target_weight, max_weight, temperature, form, ignore_index, reduction);
}

/// As reference.distill_grad_. A teacher in the logits' memory is copied: its rows may be other
/// ones.
Losses distill_grad__cpu(at::Tensor& logits, const at::Tensor& teacher,
                         const std::optional<at::Tensor>& target,
                         const std::optional<at::Tensor>& sample_weight,
                         const std::optional<at::Tensor>& teacher_index, double ce_weight,
                         double kd_weight, double tckd_weight, double nckd_weight,
                         double soft_target_weight, double max_weight, double temperature,
                         std::string_view form, int64_t ignore_index, std::string_view reduction) {
  check_contiguous(logits, "logits");
  return without_grad(
      distill_into(logits, logits, teacher.is_alias_of(logits) ? teacher.clone() : teacher, target,
                   sample_weight, teacher_index, ce_weight, kd_weight, tckd_weight, nckd_weight,
                   soft_target_weight, max_weight, temperature, form, ignore_index, reduction));
}

/// out = in * grad_loss * grad_scale, row by row. in and out may be one tensor, which a scale of 1
/// leaves alone. One read and one write of the gradient.
///
/// Args: in, out (N, C), contiguous; grad_loss a scalar or (N,), any strides; grad_scale a scalar
/// or (0,).
void scale_rows(const at::Tensor& in, const at::Tensor& out, const at::Tensor& grad_loss,
                const at::Tensor& grad_scale) {
  check_float(in, "grad");
  TORCH_CHECK_VALUE(in.dim() == 2 && in.is_contiguous(), "grad must be (N, C) and contiguous, got ",
                    in.sizes());
  const int64_t N = in.size(0), C = in.size(1);
  TORCH_CHECK_VALUE(grad_loss.dim() == 0 || (grad_loss.dim() == 1 && grad_loss.size(0) == N),
                    "grad_loss must be a scalar or have shape (", N, ",), got ", grad_loss.sizes());
  TORCH_CHECK_VALUE(grad_scale.numel() <= 1, "grad_scale must be a scalar or empty, got ",
                    grad_scale.sizes());
  check_same_device(grad_loss, "grad_loss", in);
  check_same_device(grad_scale, "grad_scale", in);
  const auto type = accumulation_type(in.scalar_type());
  const at::Tensor upstream = grad_loss.to(type).contiguous();  // () or (N,) A
  const at::Tensor mean = grad_scale.to(type).contiguous();     // () or (0,) A
  const double common = mean.numel() == 0 ? 1 : element(mean, 0);
  const bool scalar = upstream.dim() == 0, in_place = in.const_data_ptr() == out.const_data_ptr();
  const auto scale = kernels().scale[dtype_of(in)];
  const int64_t size = in.element_size();
  const auto* const from = static_cast<const char*>(in.const_data_ptr());
  auto* const to = static_cast<char*>(out.mutable_data_ptr());
  if (scalar) {
    const double factor = element(upstream, 0) * common;
    if (in_place && factor == 1) return;
    at::parallel_for(0, N * C, 32768, [&](int64_t begin, int64_t end) {
      scale(from + begin * size, to + begin * size, end - begin, factor);
    });
    return;
  }
  at::parallel_for(0, N, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, C)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; i++) {
                       const double factor = element(upstream, i) * common;
                       if (in_place && factor == 1) continue;
                       scale(from + i * C * size, to + i * C * size, C, factor);
                     }
                   });
}

at::Tensor loss_bwd_cpu(const at::Tensor& grad, const at::Tensor& grad_loss,
                        const at::Tensor& grad_scale) {
  const at::Tensor in = grad.contiguous();  // (N, C)
  at::Tensor out = at::empty_like(in);      // (N, C)
  scale_rows(in, out, grad_loss, grad_scale);
  return out;
}

void loss_bwd__cpu(at::Tensor& grad, const at::Tensor& grad_loss, const at::Tensor& grad_scale) {
  scale_rows(grad, grad, grad_loss, grad_scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(zipfls, CPU, m) {
  m.impl("loss_fwd", loss_fwd_cpu);
  m.impl("loss_grad_", loss_grad__cpu);
  m.impl("distill_fwd", distill_fwd_cpu);
  m.impl("distill_grad_", distill_grad__cpu);
  m.impl("loss_bwd", loss_bwd_cpu);
  m.impl("loss_bwd_", loss_bwd__cpu);
}

}  // namespace zipfls::cpu
