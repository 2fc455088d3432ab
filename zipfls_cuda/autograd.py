"""The gradient attached to the loss: the Functions of autograd, and which of them serves a call.

The forward operator computes loss and gradient together. ``Loss`` saves the gradient, and backward scales
it. ``csrc/autograd.cpp`` is ``Loss`` in C++ and serves eager calls of the C++ operators.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from . import checks, ops


def loss(
    forward: Callable,
    logits: Tensor,
    tensors: tuple[Tensor | None, ...],
    sharded: bool,
    options: tuple,
    inplace: bool,
    backend: str | None,
    grad_: str = "loss_grad_",
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss and its two parts), with the gradient to ``logits`` attached to the loss where one is wanted.

    Args:
        forward: takes the arguments of ``reference.loss_fwd`` or ``reference.distill_fwd``: logits,
            ``tensors`` (those before ce_weight), ``options`` (from ce_weight to reduction) and with_grad.
        sharded: whether the logits are a shard of the classes.
        inplace: whether backward computes the gradient, over the logits.
        grad_: the stage that does, for this forward.
    """
    if torch._C._are_functorch_transforms_active():
        function = LossInTransforms if torch.compiler.is_compiling() else LossRefusingForwardMode
        backward = ops.select("loss_bwd", backend, logits)
        return function.apply(logits, options, forward, backward, *tensors)[:3]
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(logits).tangent is not None:
        raise RuntimeError(NO_FORWARD_MODE)
    # Grad mode is asked for here: inside a Function it is always off.
    wanted = torch.is_grad_enabled() and logits.requires_grad
    compiling = torch.compiler.is_compiling()
    if inplace and wanted and not compiling:
        checks.inplace(logits, sharded)
        keeping = ops.KEEPING.get((forward, logits.device.type))
        if keeping is not None and has_factors(logits, *tensors, *options[:3]):
            way = from_factors(*keeping, options)
        else:
            stages = (ops.select(stage, backend, logits) for stage in (grad_, "loss_bwd_"))
            way = by_computing_again(forward, *stages, options)
        return LossInPlace.apply(logits, *way, *tensors)
    if not compiling and (native := ops.NATIVE.get(forward)) is not None:
        return native(logits, *tensors, *options)
    if wanted:
        backward, scale_ = ops.select("loss_bwd", backend, logits), ops.select("loss_bwd_", backend, logits)
        return Loss.apply(logits, _anchor(logits), tensors, options, forward, backward, scale_)
    return forward(logits, *tensors, *options, False)[:3]


def _anchor(logits: Tensor) -> tuple[Tensor, ...]:
    """A zero-element piece of the logits: ties a differentiable gradient to them without keeping them alive.

    The tuple hides it from autograd as an input: compiled autograd would add its gradient, None, to the
    logits' gradient. No compiled gradient is differentiable, so torch.compile needs no anchor.
    """
    if torch.compiler.is_compiling():
        return ()
    return (logits.narrow(0, 0, 0).clone(),)  # narrow_copy has no derivative in torch 2.11


NO_FORWARD_MODE = "zipfls_cuda: forward-mode differentiation of a loss is not supported; use reverse mode"
_NO_SECOND = (
    "zipfls_cuda: the gradient of a loss cannot be differentiated again (gradient penalty, Hessian, grad of "
    "grad, create_graph=True followed by a backward pass through the gradient)"
)


class RefuseSecond(torch.autograd.Function):
    """The identity on a gradient, tied to the logits by ``anchor``, whose own differentiation raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> None:
        raise RuntimeError(_NO_SECOND)


def refusing_second(grad: Tensor, grad_loss: Tensor, anchor: Tensor) -> Tensor:
    """``grad``, tied to the graph of ``anchor``: differentiating it raises."""
    if _is_batched(grad_loss):  # the graph belongs to the tensor inside, which an operator reaches
        return grad + RefuseSecond.apply(anchor.new_zeros(()), anchor)
    return RefuseSecond.apply(grad, anchor)


def _is_batched(x: Tensor) -> bool:
    """Whether ``x`` stands for a batch of gradients, as in vmap and under is_grads_batched."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x)


def may_overwrite(grad_loss: Tensor) -> bool:
    """Whether backward may scale the saved gradient in place: the graph is not kept.

    It may not where the upstream gradient is batched (the in-place operator has no batching rule), fake or
    traced.
    """
    if torch.compiler.is_compiling() or type(grad_loss) is not Tensor or _is_batched(grad_loss):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


class Loss(torch.autograd.Function):
    """The eager path: a bare forward(ctx, ...), since setup_context costs as much again as all the rest."""

    @staticmethod
    def forward(ctx, logits, anchor, tensors, options, forward, backward, backward_):
        loss, ce, zipf, grad, grad_scale = forward(logits, *tensors, *options, True)
        ctx.save_for_backward(grad, grad_scale, *anchor)
        ctx.backward, ctx.backward_ = backward, backward_
        ctx.mark_non_differentiable(ce, zipf)
        ctx.set_materialize_grads(False)
        return loss, ce, zipf

    @staticmethod
    def backward(ctx, grad_loss, _ce, _zipf):
        if grad_loss is None:
            return (None,) * 7
        grad, grad_scale, *anchor = ctx.saved_tensors
        if may_overwrite(grad_loss):
            ctx.backward_(grad, grad_loss, grad_scale)  # at once if by one
        else:
            grad = ctx.backward(grad, grad_loss, grad_scale)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grad = refusing_second(grad, grad_loss, anchor[0])
        return grad, None, None, None, None, None, None


MOST_PATCHES, TOO_MANY_CLASSES = 1024, 2**21  # kernels serve less than 2**31 votes times classes


def has_factors(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None,
    log_mass: Tensor,
    weight: Tensor | None,
    ce_weight: float,
    zipf_weight: float,
    label_smoothing: float,
) -> bool:
    """Whether a gradient over the logits comes from what forward keeps (ops.FACTOR_SCHEMAS).

    What is kept for the votes is at most half of a gradient.
    """
    C = logits.shape[1]
    if target.dim() != 1 or (weight is not None and label_smoothing != 0):
        return False
    if zipf_weight == 0:
        return True
    if votes is None or log_mass.dim() != 1:
        return False
    return votes.shape[1] <= min(C // 2, MOST_PATCHES) and C < TOO_MANY_CLASSES


InPlace = tuple[Callable, Callable]  # compute and overwrite of LossInPlace


def from_factors(factors_fwd: Callable, factors_bwd_: Callable, options: tuple) -> InPlace:
    """Forward keeps what a pass over the logits makes the gradient of."""

    def compute(logits, target, votes, log_mass, weight):
        *parts, factors, patches, grad_scale = factors_fwd(logits, target, votes, log_mass, weight, *options)
        return parts, (target, votes if patches.numel() else None, factors, patches, grad_scale)

    def overwrite(logits, grad_loss, target, votes, factors, patches, grad_scale):
        factors_bwd_(logits, target, votes, factors, patches, grad_loss, grad_scale)

    return compute, overwrite


def by_computing_again(forward: Callable, grad_: Callable, scale_: Callable, options: tuple) -> InPlace:
    """Forward keeps its arguments."""

    def compute(logits, *tensors):
        return forward(logits, *tensors, *options, False)[:3], tensors

    def overwrite(logits, grad_loss, *tensors):
        *_, grad_scale = grad_(logits, *tensors, *options)
        scale_(logits, grad_loss, grad_scale)

    return compute, overwrite


class LossInPlace(torch.autograd.Function):
    """Forward computes the loss alone; backward writes the gradient over the saved logits.

    compute(logits, *tensors) gives the losses and what to save; overwrite(logits, upstream gradient, *saved)
    writes the gradient.

    A gradient written in forward would silently change every later use of the logits. Written in backward,
    it increments the logits' version counter, so that another node that saved them, and a second backward,
    raise.
    """

    @staticmethod
    def forward(ctx, logits, compute, overwrite, *tensors):
        (loss, *parts), kept = compute(logits, *tensors)
        ctx.save_for_backward(logits, *kept)
        ctx.overwrite = overwrite
        ctx.mark_non_differentiable(*parts)
        ctx.set_materialize_grads(False)
        return loss, *parts

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            raise RuntimeError(_NO_SECOND)
        if not torch.compiler.is_compiling() and _is_batched(grad_loss):
            raise RuntimeError(
                "zipfls_cuda: inplace=True writes one gradient over the logits, so it has no batched "
                "gradients (is_grads_batched, jacobian(vectorize=True)); use inplace=False"
            )
        logits, *kept = ctx.saved_tensors
        grad = logits.detach()  # the same memory and version counter
        ctx.overwrite(grad, grad_loss, *kept)
        torch.autograd.graph.increment_version(logits)  # operators written in C++ do not
        return grad, *(None,) * (len(ctx.needs_input_grad) - 1)


class LossInTransforms(torch.autograd.Function):
    """The path inside torch.func transforms, which need setup_context and a vmap rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits, options, forward, backward, *tensors):
        return forward(logits, *tensors, *options, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *parts, grad, grad_scale = output
        ctx.save_for_backward(grad, grad_scale, inputs[0])
        ctx.backward = inputs[3]
        ctx.mark_non_differentiable(*parts, grad, grad_scale)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        grad, grad_scale, logits = ctx.saved_tensors
        grad = RefuseSecond.apply(ctx.backward(grad, grad_loss, grad_scale), logits)
        return grad, *(None,) * (len(ctx.needs_input_grad) - 1)


class LossRefusingForwardMode(LossInTransforms):
    """The same with a clear error for forward mode; torch.compile does not trace a class that has a jvp."""

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(NO_FORWARD_MODE)
