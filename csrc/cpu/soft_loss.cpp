// soft_loss_fwd, soft_loss_grad_: the loss where targets are probabilities.
#include <algorithm>
#include <atomic>
#include <memory>

#include <torch/library.h>

#include "parts.h"
#include "recycle.h"

namespace zipfls::cpu {
namespace {

/// argmax of a row of probabilities (C,), lowest index on ties; NaN is never the largest.
template <class A>
int64_t argmax(const A* x, int64_t C) {
  int64_t best = C;
  for (int64_t c = 0; c < C; c++)
    if (best == C ? x[c] == x[c] : x[c] > x[best]) best = c;
  return best == C ? 0 : best;
}

/// loss, ce, zipf, grad, grad_scale: as reference.soft_loss_fwd. Under only_correct the logits and
/// the target are read a second time.
///
/// Args: grad as in loss_into.
Parts soft_loss_into(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& target,
                     const std::optional<at::Tensor>& votes, const at::Tensor& log_mass,
                     const std::optional<at::Tensor>& weight, double ce_weight, double zipf_weight,
                     double label_smoothing, bool only_correct, std::string_view reduction) {
  check_loss(logits, votes, log_mass, weight, reduction);
  const int64_t N = logits.size(0), C = logits.size(1);
  const int64_t P = votes.has_value() ? votes->size(1) : 0;
  const auto type = accumulation_type(logits.scalar_type());
  TORCH_CHECK_VALUE(target.sizes() == logits.sizes(), "target must have shape (", N, ", ", C,
                    "), got ", target.sizes());
  check_type(target, "target", type);
  check_same_device(target, "target", logits);

  const Kernels& k = kernels();
  const Dtype dtype = dtype_of(logits);
  const bool mean = reduction == "mean", wide = type == at::kDouble, with_grad = grad.dim() == 2;
  const at::Tensor z = with_contiguous_rows(logits), t = with_contiguous_rows(target);
  const at::Tensor mass = log_mass.contiguous();
  const at::Tensor v = votes.has_value() ? with_contiguous_rows(*votes) : at::Tensor();
  const at::Tensor w = weight.has_value() ? weight->contiguous() : at::Tensor();

  SoftLossFwd a{};
  a.C = C;
  a.logits = z.const_data_ptr();
  a.logits_stride = z.stride(0);
  a.target = t.const_data_ptr();
  a.target_stride = t.stride(0);
  if (votes.has_value()) a.votes = votes_of(v);
  a.log_mass = mass.const_data_ptr();
  a.weight = w.defined() ? w.const_data_ptr() : nullptr;
  a.mass = mass_of(mass, votes.has_value());
  a.ce = ce_weight != 0;
  a.zipf = zipf_weight != 0;
  a.label_smoothing = label_smoothing;

  std::unique_ptr<uint8_t[]> correct;  // (N,) bool
  int64_t counted = N;
  if (only_correct) {
    correct = std::make_unique<uint8_t[]>(N);
    at::parallel_for(0, N, grain(C, 0), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t at = i * a.target_stride;
        const int64_t y = wide ? argmax(static_cast<const double*>(a.target) + at, C)
                               : argmax(static_cast<const float*>(a.target) + at, C);
        const auto* const row = static_cast<const char*>(a.logits);
        correct[i] = k.is_correct[dtype](row + i * a.logits_stride * z.element_size(), C, y);
      }
    });
    counted = std::count(correct.get(), correct.get() + N, 1);
    a.correct = correct.get();
  }
  const double ce_scale = mean ? 1 / static_cast<double>(N) : 1;
  const double zipf_scale = !mean                   ? 1
                            : N > 0 && counted == 0 ? 0
                                                    : 1 / static_cast<double>(counted);
  const double held =
      held_back(a.ce ? ce_scale : zipf_scale, logits.scalar_type(), mean, with_grad);
  a.ce_factor = ce_weight * (ce_scale / held);
  a.zipf_factor = zipf_weight * (zipf_scale / held);
  a.grad = with_grad ? grad.mutable_data_ptr() : nullptr;
  const auto row_losses = std::make_unique_for_overwrite<double[]>(2 * N);  // (2, N) float64
  a.ce_rows = row_losses.get();
  a.zipf_rows = row_losses.get() + N;

  std::atomic<bool> inside{true};
  const bool sort = a.zipf && a.mass == Mass::kByLogits;
  at::parallel_for(0, N, grain(2 * C, P), [&](int64_t begin, int64_t end) {
    const Scratch scratch = thread_scratch().get(C, P, wide ? 8 : 4, sort);
    if (!k.soft_loss_fwd[dtype](a, scratch, begin, end)) inside = false;
  });
  if (!inside) raise_outside(nullptr, &*votes, C, nullptr);

  const auto options = logits.options().dtype(type);
  auto [loss, ce, zipf] =
      reduce_parts({a.ce_rows, ce_weight, ce_scale}, {a.zipf_rows, zipf_weight, zipf_scale}, N,
                   reduction == "none", options);
  return {loss, ce, zipf, grad,
          grad_scale_of(held, logits.scalar_type(), mean, with_grad, options)};
}

Parts soft_loss_fwd_cpu(const at::Tensor& logits, const at::Tensor& target,
                        const std::optional<at::Tensor>& votes, const at::Tensor& log_mass,
                        const std::optional<at::Tensor>& weight, double ce_weight,
                        double zipf_weight, double label_smoothing, bool only_correct,
                        std::string_view reduction, bool with_grad) {
  return soft_loss_into(gradient_like(logits, with_grad), logits, target, votes, log_mass, weight,
                        ce_weight, zipf_weight, label_smoothing, only_correct, reduction);
}

/// As reference.soft_loss_grad_.
at::Tensor soft_loss_grad__cpu(at::Tensor& logits, const at::Tensor& target,
                               const std::optional<at::Tensor>& votes, const at::Tensor& log_mass,
                               const std::optional<at::Tensor>& weight, double ce_weight,
                               double zipf_weight, double label_smoothing, bool only_correct,
                               std::string_view reduction) {
  check_contiguous(logits, "logits");
  return std::get<4>(soft_loss_into(logits, logits, target, votes, log_mass, weight, ce_weight,
                                    zipf_weight, label_smoothing, only_correct, reduction));
}

}  // namespace

TORCH_LIBRARY_IMPL(zipfls, CPU, m) {
  m.impl("soft_loss_fwd", soft_loss_fwd_cpu);
  m.impl("soft_loss_grad_", soft_loss_grad__cpu);
}

}  // namespace zipfls::cpu
