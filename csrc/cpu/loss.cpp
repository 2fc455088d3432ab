// loss_fwd, loss_grad_, loss_bwd, loss_bwd_: cross-entropy and the Zipf term with their gradient.
#include <atomic>
#include <cmath>
#include <memory>

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "parts.h"
#include "recycle.h"

namespace zipfls::cpu {
namespace {

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
///
/// Args: grad (N, C), contiguous, uninitialised or the logits themselves: a row's logits are read
/// before its gradient is written. (0,) for no gradient.
Parts loss_into(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& target,
                const std::optional<at::Tensor>& votes, const at::Tensor& log_mass,
                const std::optional<at::Tensor>& weight, double ce_weight, double zipf_weight,
                double label_smoothing, bool only_correct, int64_t ignore_index,
                std::string_view reduction) {
  check_loss(logits, votes, log_mass, weight, reduction);
  const int64_t N = logits.size(0), C = logits.size(1);
  const auto type = accumulation_type(logits.scalar_type());
  check_target(target, N);
  check_same_device(target, "target", logits);
  const int64_t P = votes.has_value() ? votes->size(1) : 0;
  const bool mean = reduction == "mean", none = reduction == "none", with_grad = grad.dim() == 2;

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
  // Of targets without any weight the mean is NaN, as F.cross_entropy's, not infinite.
  const double ce_scale = !mean ? 1.0 : totals.weight == 0 ? NAN : 1 / totals.weight;
  const double zipf_scale = !mean ? 1.0
                            : totals.samples > 0 && zipf_samples == 0
                                ? 0.0
                                : 1 / static_cast<double>(zipf_samples);

  const auto options = logits.options().dtype(type);
  const double scale =
      held_back(ce_weight != 0 ? ce_scale : zipf_scale, logits.scalar_type(), mean, with_grad);

  LossFwd a{};
  a.C = C;
  a.logits = rows;
  a.logits_stride = z.stride(0);
  a.target = targets;
  if (votes.has_value()) a.votes = votes_of(v);
  a.log_mass = mass.const_data_ptr();
  a.mass = mass_of(log_mass, votes.has_value());
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
  a.ce_factor = ce_weight * (ce_scale / scale);
  a.zipf_factor = zipf_weight * (zipf_scale / scale);
  a.grad = with_grad ? grad.mutable_data_ptr() : nullptr;
  const auto row_losses = std::make_unique_for_overwrite<double[]>(2 * N);  // (2, N) float64
  a.ce_rows = row_losses.get();
  a.zipf_rows = row_losses.get() + N;

  std::atomic<bool> inside{true};
  const bool sort = a.zipf && a.mass == Mass::kByLogits;
  at::parallel_for(0, N, grain(C, P), [&](int64_t begin, int64_t end) {
    const Scratch scratch = thread_scratch().get(C, P, type == at::kDouble ? 8 : 4, sort);
    if (!k.loss_fwd[dtype](a, scratch, begin, end)) inside = false;
  });
  if (!inside) raise_outside(&target, votes_or_null, C, &ignore_index);

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
at::Tensor loss_grad__cpu(at::Tensor& logits, const at::Tensor& target,
                          const std::optional<at::Tensor>& votes, const at::Tensor& log_mass,
                          const std::optional<at::Tensor>& weight, double ce_weight,
                          double zipf_weight, double label_smoothing, bool only_correct,
                          int64_t ignore_index, std::string_view reduction) {
  check_contiguous(logits, "logits");
  return std::get<4>(loss_into(logits, logits, target, votes, log_mass, weight, ce_weight,
                               zipf_weight, label_smoothing, only_correct, ignore_index,
                               reduction));
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
  m.impl("loss_bwd", loss_bwd_cpu);
  m.impl("loss_bwd_", loss_bwd__cpu);
}

}  // namespace zipfls::cpu
