// zipfls_cuda.autograd.Loss in C++, for the plain loss and distillation on any device: the
// operators are dispatched. At 128 x 100 a torch.autograd.Function written in Python takes more
// time, forward and backward, than the loss itself.
#include "autograd.h"

#include <memory>
#include <mutex>

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

namespace zipfls {
namespace {

namespace autograd = torch::autograd;
namespace compiled = torch::dynamo::autograd;
using at::Tensor;
using autograd::variable_list;
using Optional = std::optional<Tensor>;

using LossFwd = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&,
                                                                   const Optional&, const Tensor&,
                                                                   const Optional&, double, double,
                                                                   double, bool, int64_t,
                                                                   std::string_view, bool);
using DistillFwd = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&, double, double,
    double, double, double, double, double, std::string_view, int64_t, std::string_view, bool);
using LossBwd = Tensor(const Tensor&, const Tensor&, const Tensor&);
using LossBwdInPlace = void(Tensor&, const Tensor&, const Tensor&);

/// The operator of a name, looked up once; Python (ops.py) defines it.
template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

/// A node of the autograd graph, held by the pointer that this version of torch holds nodes by.
template <class Node>
auto make_node() {
  using Pointer = std::decay_t<decltype(autograd::Edge::function)>;
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<autograd::Node>>)
    return std::make_shared<Node>();
  else
    return c10::make_intrusive<Node>();
}

/// The identity on a gradient; what comes next in the graph is the logits. Its own differentiation
/// raises.
struct RefuseSecond : autograd::Node {
  std::string name() const override { return "ZipfLossRefusesSecondDerivative"; }

  variable_list apply(variable_list&&) override {
    throw std::runtime_error(  // the text of autograd._NO_SECOND
        "zipfls_cuda: the gradient of a loss cannot be differentiated again (gradient penalty, "
        "Hessian, grad of grad, create_graph=True followed by a backward pass through the "
        "gradient)");
  }
};

/// d loss / d logits, computed in forward, times the upstream gradient.
struct LossBackward : autograd::Node {
  autograd::SavedVariable grad_;        // (N, C) T
  autograd::SavedVariable grad_scale_;  // () or (0,) A

  std::string name() const override { return "ZipfLossBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    grad_.reset_data();
    grad_scale_.reset_data();
  }

  variable_list apply(variable_list&& upstream) override {
    static const auto loss_bwd_ = find<LossBwdInPlace>("zipfls::loss_bwd_");
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!upstream[0].defined() || !task_should_compute_output(0)) return {Tensor()};
    const bool differentiable = c10::GradMode::is_enabled();
    // Batched gradients, fake tensors: the in-place operator has no batching rule, and tracing no
    // use for it.
    const bool wrapped = at::isTensorSubclassLike(upstream[0]);
    Tensor grad = grad_.unpack();
    const Tensor scale = grad_scale_.unpack();
    if (wrapped || autograd::get_current_graph_task_keep_graph()) {
      grad = scaled(grad, upstream[0], scale);
    } else {  // what is saved will not be needed again: scaled where it is, at once if by one
      at::AutoDispatchBelowADInplaceOrView below;
      loss_bwd_.call(grad, upstream[0], scale);
    }
    if (differentiable) {
      const auto refuse = make_node<RefuseSecond>();
      refuse->add_next_edge(next_edge(0));
      if (wrapped) {  // the graph belongs to the tensor inside, which an operator reaches
        Tensor zero = at::zeros({}, scale.options().dtype(grad.scalar_type()));
        autograd::set_history(zero, refuse);
        grad = grad.add(zero);
      } else {
        grad = grad.detach();
        autograd::set_history(grad, refuse);
      }
    }
    return {std::move(grad)};
  }

  // Compiled autograd: what a node saves becomes an input of the compiled graph, and its backward a
  // call of the function bound here, which is traced like any other.

  void compiled_args(compiled::CompiledNodeArgs& args) const override {
    args.collect(grad_, false);
    args.collect(grad_scale_, false);
  }

  variable_list apply_with_saved(const variable_list& upstream,
                                 compiled::SwapSavedVariables& saved) override {
    saved.before(grad_);
    saved.before(grad_scale_);
    const auto& python = compiled::getPyCompilerInterface();
    const auto function = python->bind_function(saved.get_py_compiler(), name(), &traced,
                                                {at::TensorType::get(), at::TensorType::get()},
                                                /*is_custom_function=*/true, /*is_traceable=*/true);
    using Metadata = std::vector<std::optional<autograd::InputMetadata>>;
    auto results = python->call_function(
        saved.get_py_compiler(), "apply_functional", function, upstream,
        {grad_.unpack(), grad_scale_.unpack()},
        compiled::IValuePacker<Metadata>::pack(compiled::get_input_metadata(next_edges())));
    saved.after(grad_);
    saved.after(grad_scale_);
    return results;
  }

 private:
  static Tensor scaled(const Tensor& grad, const Tensor& upstream, const Tensor& scale) {
    static const auto loss_bwd = find<LossBwd>("zipfls::loss_bwd");
    at::AutoDispatchBelowADInplaceOrView below;
    return loss_bwd.call(grad, upstream, scale);
  }

  static variable_list traced(const variable_list& upstream, const std::vector<at::IValue>& saved) {
    if (!upstream[0].defined()) return {Tensor()};
    return {scaled(saved[0].toTensor(), upstream[0], saved[1].toTensor())};
  }
};

/// (loss and its two parts) of a forward operator, called with with_grad; the gradient is attached
/// to the loss where one is wanted.
template <class Forward>
Parts with_gradient(const Tensor& logits, const Forward& forward) {
  const bool wanted = c10::GradMode::is_enabled() && logits.requires_grad();
  auto [loss, first, second, grad, grad_scale] = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return forward(wanted);
  }();
  if (wanted) {
    const auto node = make_node<LossBackward>();
    node->set_next_edges(autograd::collect_next_edges(logits));
    autograd::set_history(loss, node);
    node->grad_ = autograd::SavedVariable(std::move(grad), false);
    node->grad_scale_ = autograd::SavedVariable(std::move(grad_scale), false);
  }
  return {std::move(loss), std::move(first), std::move(second)};
}

}  // namespace

Parts loss(const Tensor& logits, const Tensor& target, const Optional& votes,
           const Tensor& log_mass, const Optional& weight, double ce_weight, double zipf_weight,
           double label_smoothing, bool only_correct, int64_t ignore_index,
           std::string_view reduction) {
  static const auto loss_fwd = find<LossFwd>("zipfls::loss_fwd");
  return with_gradient(logits, [&](bool wanted) {
    return loss_fwd.call(logits, target, votes, log_mass, weight, ce_weight, zipf_weight,
                         label_smoothing, only_correct, ignore_index, reduction, wanted);
  });
}

Parts distill(const Tensor& logits, const Tensor& teacher, const Optional& target,
              const Optional& sample_weight, const Optional& teacher_index, double ce_weight,
              double kd_weight, double tckd_weight, double nckd_weight, double soft_target_weight,
              double max_weight, double temperature, std::string_view form, int64_t ignore_index,
              std::string_view reduction) {
  static const auto distill_fwd = find<DistillFwd>("zipfls::distill_fwd");
  return with_gradient(logits, [&](bool wanted) {
    return distill_fwd.call(logits, teacher, target, sample_weight, teacher_index, ce_weight,
                            kd_weight, tckd_weight, nckd_weight, soft_target_weight, max_weight,
                            temperature, form, ignore_index, reduction, wanted);
  });
}

}  // namespace zipfls
