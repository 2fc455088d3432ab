// loss_fwd, loss_bwd, loss_bwd_: cross-entropy and the Zipf term with their gradient.
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

using Parts = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

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

/// What a mean divides by, from the targets alone.
struct Totals {
  double weight = 0;    // sum of the class weights of the targets that count
  int64_t samples = 0;  // their number
  bool inside = true;   // whether they are classes
};

Totals total(const int64_t* target, int64_t N, int64_t C, int64_t ignore_index,
             const std::optional<at::Tensor>& weight) {
  Totals totals;
  for (int64_t i = 0; i < N; i++) {
    const int64_t y = target[i];
    if (y == ignore_index) continue;
    if (y < 0 || y >= C) {
      totals.inside = false;
      break;
    }
    totals.samples++;
    if (weight.has_value()) totals.weight += element(*weight, y);
  }
  if (!weight.has_value()) totals.weight = static_cast<double>(totals.samples);
  return totals;
}

/// loss, ce, zipf, grad, grad_scale: as reference.loss_fwd, to the letter.
Parts loss_fwd_cpu(const at::Tensor& logits, const at::Tensor& target,
                   const std::optional<at::Tensor>& votes, const at::Tensor& log_mass,
                   const std::optional<at::Tensor>& weight, double ce_weight, double zipf_weight,
                   double label_smoothing, bool only_correct, int64_t ignore_index,
                   std::string_view reduction, bool with_grad) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must have shape (N, C), got ", logits.sizes());
  check_float(logits, "logits");
  const int64_t N = logits.size(0), C = logits.size(1);
  const auto type = accumulation_type(logits.scalar_type());
  check_num_classes(C);
  check_target(target, N);
  check_same_device(target, "target", logits);
  check_type(log_mass, "log_mass", type);
  check_same_device(log_mass, "log_mass", logits);
  if (votes.has_value()) {
    check_votes(*votes, N);
    check_same_device(*votes, "votes", logits);
  }
  const int64_t P = votes.has_value() ? votes->size(1) : 0;
  check_log_mass(log_mass, N, C, votes.has_value() ? P : -1);
  if (weight.has_value()) {
    TORCH_CHECK_VALUE(weight->dim() == 1 && weight->size(0) == C, "weight must have shape (", C,
                      ",), got ", weight->sizes());
    check_type(*weight, "weight", type);
    check_same_device(*weight, "weight", logits);
  }
  const bool mean = reduction == "mean", none = reduction == "none";
  TORCH_CHECK_VALUE(mean || none || reduction == "sum", "reduction must be mean, sum or none, got ",
                    reduction);

  const Kernels& k = kernels();
  const Dtype dtype = dtype_of(logits);
  const at::Tensor z = with_contiguous_rows(logits), y = target.contiguous(),
                   mass = log_mass.contiguous();
  const at::Tensor v = votes.has_value() ? with_contiguous_rows(*votes) : at::Tensor();
  std::optional<at::Tensor> w;
  if (weight.has_value()) w = weight->contiguous();
  const int64_t* const targets = y.const_data_ptr<int64_t>();  // (N,) int64
  const auto* const rows = static_cast<const char*>(z.const_data_ptr());
  const int64_t row_bytes = z.stride(0) * z.element_size();

  const Totals totals = total(targets, N, C, ignore_index, w);
  const at::Tensor* const votes_or_null = votes.has_value() ? &*votes : nullptr;
  if (!totals.inside) raise_outside(&target, votes_or_null, C, &ignore_index);

  // The mean of the Zipf part under only_correct divides by a number that only the logits tell.
  std::unique_ptr<uint8_t[]> correct;  // (N,) bool
  int64_t zipf_samples = totals.samples;
  if (mean && only_correct) {
    correct = std::make_unique<uint8_t[]>(N);
    at::parallel_for(0, N, grain(C, 0), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        correct[i] =
            targets[i] != ignore_index && k.is_correct[dtype](rows + i * row_bytes, C, targets[i]);
    });
    zipf_samples = 0;
    for (int64_t i = 0; i < N; i++) zipf_samples += correct[i];
  }
  const double ce_scale = mean ? 1 / totals.weight : 1;
  const double zipf_scale = !mean ? 1.0
                            : totals.samples > 0 && zipf_samples == 0
                                ? 0.0
                                : 1 / static_cast<double>(zipf_samples);

  // A float16 mean: stored per sample, for 1/N to join the upstream gradient in float32, in
  // loss_bwd.
  const auto options = logits.options().dtype(type);
  at::Tensor grad, grad_scale;
  double scale = 1;
  if (with_grad && dtype == kFloat16 && mean) {
    scale = ce_weight != 0 ? ce_scale : zipf_scale;
    if (!std::isfinite(scale) || scale == 0) scale = 1;
    grad_scale = at::empty({}, options);
    set_element(grad_scale, 0, scale);
  } else {
    grad_scale = at::empty({0}, options);
  }
  grad = with_grad ? empty_gradient(N, C, logits.options()) : at::empty({0}, logits.options());

  LossFwd a{};
  a.C = C;
  a.logits = rows;
  a.logits_stride = z.stride(0);
  a.target = targets;
  if (votes.has_value()) a.votes = votes_of(v);
  a.log_mass = mass.const_data_ptr();
  a.mass = log_mass.dim() == 2 ? Mass::kPerClass
           : votes.has_value() ? Mass::kByVotes
                               : Mass::kByLogits;
  a.weight = w.has_value() ? w->const_data_ptr() : nullptr;
  a.weight_sum = static_cast<double>(C);
  if (w.has_value()) {
    a.weight_sum = 0;
    for (int64_t c = 0; c < C; c++) a.weight_sum += element(*w, c);
  }
  a.correct = correct.get();
  a.ignore_index = ignore_index;
  a.ce = ce_weight != 0;
  a.zipf = zipf_weight != 0;
  a.only_correct = only_correct;
  a.label_smoothing = label_smoothing;
  // Where the targets' weights sum to 0, 1/0 would be infinity minus infinity at every class
  // instead of an infinity with a sign at some: it multiplies the finished rows. Beside it the Zipf
  // part does not show.
  const bool infinite = a.ce && std::isinf(ce_scale);
  a.ce_factor = ce_weight * (infinite ? 1 : ce_scale / scale);
  a.zipf_factor = infinite ? 0 : zipf_weight * (zipf_scale / scale);
  a.grad = with_grad ? grad.mutable_data_ptr() : nullptr;
  const auto row_losses = std::make_unique_for_overwrite<double[]>(2 * N);  // (2, N) float64
  a.ce_rows = row_losses.get();
  a.zipf_rows = row_losses.get() + N;

  std::atomic<bool> inside{true};
  const bool sort = a.zipf && a.mass == Mass::kByLogits;
  at::parallel_for(0, N, grain(C, P), [&](int64_t begin, int64_t end) {
    const Scratch scratch = thread_scratch().get(C, P, type == at::kDouble ? 8 : 4, sort);
    if (!k.loss_fwd[dtype](a, scratch, begin, end)) inside = false;
    if (!infinite || !with_grad) return;
    for (int64_t i = begin; i < end; i++) {
      if (targets[i] == ignore_index) continue;
      char* const row = static_cast<char*>(a.grad) + i * C * grad.element_size();
      k.scale[dtype](row, row, C, ce_scale);
    }
  });
  if (!inside) raise_outside(&target, votes_or_null, C, &ignore_index);

  const auto shape = none ? logits.sizes().slice(0, 1) : at::IntArrayRef();
  at::Tensor loss = at::empty(shape, options), ce = at::empty(shape, options),
             zipf = at::empty(shape, options);
  auto finish = [&](int64_t i, double ce_, double zipf_) {
    set_element(loss, i, ce_weight * ce_ + zipf_weight * zipf_);
    set_element(ce, i, ce_);
    set_element(zipf, i, zipf_);
  };
  if (none) {
    for (int64_t i = 0; i < N; i++) finish(i, a.ce_rows[i], a.zipf_rows[i]);
  } else {
    double ce_sum = 0, zipf_sum = 0;  // in the order of the samples, whatever the number of threads
    for (int64_t i = 0; i < N; i++) {
      ce_sum += a.ce_rows[i];
      zipf_sum += a.zipf_rows[i];
    }
    finish(0, a.ce ? ce_sum * ce_scale : ce_sum, a.zipf ? zipf_sum * zipf_scale : zipf_sum);
  }
  return {loss, ce, zipf, grad, grad_scale};
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
  m.impl("loss_bwd", loss_bwd_cpu);
  m.impl("loss_bwd_", loss_bwd__cpu);
}

}  // namespace zipfls::cpu
