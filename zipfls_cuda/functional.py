"""The package's functions: arguments checked, operator chosen, gradient attached."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from . import checks, distributions, ops, scalars, sharded
from .checks import DEFAULT_ALPHA
from .distributions import Distribution

# Stage 1: dense votes ------------------------------------------------------------------------------


def dense_vote(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    upsample: int = 1,
    backend: str | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Let every position of a feature map vote for a class: v_k = argmax_c (F_k . W_c + b_c).

    Not differentiable. The dense scores (N, P, C) never exist. Under autocast it runs in the autocast dtype;
    float32 products follow ``torch.backends.cuda.matmul.fp32_precision``.

    Args:
        features: (N, D, H, W) in any memory format (channels_last is the fast one), or tokens (N, T, D);
            float32, bfloat16, float16 or float64.
        weight: (C, D) of the classifier that also gives the logits, same dtype and device.
        bias: (C,) or None.
        upsample: 1, or 2 to vote on the map at twice its resolution (bilinear,
            align_corners=False; maps only).
        backend: name of a backend, or None for the best one.
        process_group: weight and bias are this rank's class shards, (C/W, D) and (C/W,); features, and
            the votes of all classes, are the same on every rank (docs/DISTRIBUTED.md). A weight that is a
            DTensor, Shard(0), brings its group along where features is a replicated DTensor.

    Returns:
        votes (N, P) int32, P = upsample*H * upsample*W in row-major order, or T. Among equal computed scores
        the lowest class; a NaN score never wins; -1 (no vote) where all scores are NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, by name.
        RuntimeError: the named backend cannot serve.

    Source: Sec. 3.2, "dense classification ranking".
    """
    if isinstance(features, Tensor) and checks.autocast_enabled(features):
        features, weight, bias = (_autocast(x, features.device.type) for x in (features, weight, bias))
    if process_group is not None or (sharded.by_class(weight, 0) and checks.is_dtensor(features)):
        return sharded.dense_vote(features, weight, bias, upsample, backend, process_group)
    upsample = checks.vote_inputs(features, weight, bias, upsample)
    if features.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad):
        features, weight = features.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    return ops.select("vote_fwd", backend, features)(features, weight, bias, upsample)


def _autocast(x: Tensor | None, device: str) -> Tensor | None:
    """``x`` in the autocast dtype, as autocast casts the arguments of F.linear: all floats but float64."""
    castable = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if castable else x


# Stages 2 and 3: ranks and label, for inspection -----------------------------------------------------


def rank_votes(votes: Tensor, num_classes: int, *, backend: str | None = None) -> Tensor:
    """Competition ranks of all classes by votes: r_c = 1 + #{m : n_m > n_c}.

    Args:
        votes: (N, P) int32 or int64, below ``num_classes``; negative means no vote.
        num_classes: C >= 2.

    Returns:
        ranks (N, C) int32 from 1; ties share the smallest rank, all classes without a vote the one after.

    Raises:
        TypeError, ValueError: a bad argument, by name. IndexError: a vote >= C in a CPU tensor (on other
        devices its row becomes 0).

    Source: Sec. 3.2; the authors' code ranks the target too.
    """
    num_classes = checks.num_classes(num_classes)
    checks.votes(votes)
    return ops.select("rank_fwd", backend, votes)(votes, num_classes)


def zipf_label(
    target: Tensor,
    votes: Tensor,
    num_classes: int,
    *,
    alpha: float = DEFAULT_ALPHA,
    distribution: Distribution | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """Soft label over the non-target classes: p~_c = mass(r_c) / sum_{m != y} mass(r_m).

    Args:
        target: (N,) int64 or uint8 in [0, C), or ``ignore_index``.
        votes: (N, P) int32 or int64, below C; negative means no vote.
        num_classes: C >= 2.
        alpha: decay of Zipf's law, or ``distribution``: another law.

    Returns:
        labels (N, C) float32, each row summing to 1 with 0 at the target; all 0 where ignored.

    Raises:
        TypeError, ValueError: a bad argument, by name. IndexError: a target or vote out of range in CPU
        tensors (on other devices its row becomes NaN).

    Source: Eq. 4; Table 6.
    """
    law = checks.law(alpha, distribution)
    num_classes, ignore_index = checks.num_classes(num_classes), scalars.integer("ignore_index", ignore_index)
    target = checks.label_inputs(target, votes)
    log_mass = _log_mass(law, target.shape[0], num_classes, votes.shape[1], torch.float32, target.device)
    op = ops.select("label_fwd", backend, votes)
    return op(target, votes, log_mass, num_classes, ignore_index)


def fit_zipf(probabilities: Tensor) -> tuple[float, float]:
    """Fit Zipf's law p(r) = exp(intercept) * r^-alpha to softmax outputs.

    Rows are sorted in descending order and averaged; a least-squares line through (log rank, log p) over
    the ranks with p > 0 gives the law.

    Args:
        probabilities: (M, C) softmax rows, any float type.

    Returns:
        (alpha, intercept): the decay (positive for a falling law) and log p at rank 1, natural logarithm.

    Raises:
        TypeError, ValueError: not a float (M, C) tensor, or fewer than two ranks with p > 0.

    Source: Fig. 2.
    """
    checks.probabilities(probabilities)
    p = probabilities.detach().double().sort(1, descending=True).values.mean(0)
    rank = torch.arange(1, p.numel() + 1, dtype=torch.float64, device=p.device)
    x, y = rank[p > 0].log(), p[p > 0].log()
    if x.numel() < 2:
        raise ValueError(f"probabilities must be positive at two ranks or more, got {x.numel()}")
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return -slope.item(), (y.mean() - slope * x.mean()).item()


# Stage 4: the loss -----------------------------------------------------------------------------------


def zipf_loss(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None = None,
    *,
    alpha: float = DEFAULT_ALPHA,
    distribution: Distribution | None = None,
    only_correct: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Zipf's Label Smoothing term alone: L_zipf = sum_{c != y} p~_c log(p~_c / p^_c).

    Arguments, result and errors as :func:`zipf_cross_entropy`, a target of probabilities included; the mean
    divides by the number of samples that are not ignored (with ``only_correct``: that are classified
    correctly; 0 if none is).

    Source: Eq. 5.
    """
    law = checks.law(alpha, distribution)
    options = (0.0, *checks.loss_options(1.0, 0.0, only_correct, ignore_index, reduction))
    inputs = _loss_inputs(logits, target, votes, None, law, backend, process_group)
    return _loss(*inputs, law, options, inplace, backend)[0]


def zipf_cross_entropy(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None = None,
    *,
    zipf_weight: float = 0.1,
    alpha: float = DEFAULT_ALPHA,
    distribution: Distribution | None = None,
    only_correct: bool = False,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_parts: bool = False,
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy plus Zipf's Label Smoothing: CE(z, y) + zipf_weight * L_zipf, in one pass.

    The gradient is computed together with the loss and flows to ``logits`` alone. Differentiating it again
    raises a RuntimeError.

    Args:
        logits: (N, C), C >= 2, any float type; arithmetic runs in float32 (float64 for float64).
        target: (N,) int64 or uint8 in [0, C), or ``ignore_index``. Or probabilities (N, C) as in
            F.cross_entropy, any float type, used in the type of the arithmetic, without gradient: mixup,
            CutMix, soft labels. The Zipf term is then over the classes whose probability is the row's
            minimum, 0 where they are fewer than two; all means divide by N; ``only_correct`` compares with
            its argmax. Our extension (docs/MATH.md, "Soft targets").
        votes: (N, P) int32 or int64 from :func:`dense_vote`, below C; negative means no vote; P = 0 is
            allowed. None ranks by the logits instead.
        zipf_weight: lambda, finite; 0 skips the Zipf term. The paper uses 0.1 (CIFAR-100, ImageNet) and 1.0
            (TinyImageNet, iNat21).
        alpha: decay of Zipf's law, >= 0. Or ``distribution``: another law in its place.
        only_correct: count L_zipf only where the target has the largest logit (lowest index on ties).
        label_smoothing, weight: of the cross-entropy alone, as in F.cross_entropy; weight is (C,).
        ignore_index, reduction: as in F.cross_entropy; beside probabilities, ignore_index must be negative.
            The mean of CE divides by the sum of the targets' class weights, that of L_zipf by the number of
            samples that count.
        return_parts: return (loss, ce, zipf) with the two parts detached and unweighted.
        num_items: what a mean divides by instead of its own count: the sum over the samples / num_items. For
            gradient accumulation, the samples of all micro-batches: a number, or a scalar tensor.
        inplace: keep no gradient beside the logits: backward computes it over them. Whoever looks at the
            logits afterwards finds the gradient there; a graph that still needs them raises, and so does a
            second backward (but where saved_tensors_hooks keep autograd from noticing). They must be
            contiguous, no leaf nor a view of one, and of all classes (no process_group). For a third pass
            over the logits it saves memory of their size; under torch.compile and torch.func nothing changes.
        backend: name of a backend, or None for the best one.
        process_group: logits (N, C/W) and weight (C/W,) are this rank's class shards, in rank order; target
            and votes (required) are of all classes and the same on every rank, and so is the loss. The
            gradient is the shard of the whole one (docs/DISTRIBUTED.md). Logits that are a DTensor, Shard(1),
            bring their group along.

    Returns:
        The loss: a scalar, or (N,) for "none"; float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: a bad argument, by name. IndexError: a target or vote out of range in CPU
        tensors (on other devices that sample's loss and gradient are NaN). RuntimeError: the named backend
        cannot serve; weight requires grad, as F.cross_entropy says too.

    Source: Eq. 6.
    """
    law = checks.law(alpha, distribution)
    options = checks.loss_options(zipf_weight, label_smoothing, only_correct, ignore_index, reduction)
    options = (1.0, *map(float, options[:2]), *options[2:])
    if num_items is not None:
        num_items = checks.num_items(num_items, reduction)
        options = (*options[:-1], "sum")
    inputs = _loss_inputs(logits, target, votes, weight, law, backend, process_group)
    parts = _loss(*inputs, law, options, inplace, backend)
    if num_items is not None:
        n = num_items.detach().to(parts[0].dtype) if isinstance(num_items, Tensor) else num_items
        parts = tuple(part / n for part in parts)
    return parts if return_parts else parts[0]


def zipf_head_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    upsample: int = 1,
    backend: str | None = None,
    **options,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Global pooling, classifier, votes and loss in one call, with gradients to features, weight and bias.

    Args:
        features: (N, D, H, W) map or (N, T, D) tokens; pooled by the mean over positions.
        weight, bias: (C, D) and (C,) or None; give logits and votes both.
        target: (N,) int64 or uint8 in [0, C), or ``ignore_index``; or probabilities (N, C).
        upsample: as in :func:`dense_vote`.
        options: those of :func:`zipf_cross_entropy`; its class ``weight`` goes by the name ``class_weight``.

    Returns, raises: as :func:`zipf_cross_entropy`.

    Source: Fig. 1.
    """
    class_weight = options.pop("class_weight", None)
    checks.constant("class_weight", class_weight)
    votes = dense_vote(features, weight, bias, upsample=upsample, backend=backend)
    # Pooled logits are the mean of the dense scores, but not taken from there: weight's gradient needs the
    # pooled features all the same, and with them the logits are a product of 1/P the size.
    pooled = features.mean((2, 3) if features.dim() == 4 else 1)
    logits = F.linear(pooled, weight, bias)
    return zipf_cross_entropy(logits, target, votes, weight=class_weight, backend=backend, **options)


def _loss_inputs(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None,
    weight: Tensor | None,
    law: Distribution,
    backend: str | None,
    process_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, sharded.Shard | None]:
    """The loss's tensors, checked, and which classes they are of: None for all."""
    if process_group is not None or (type(logits) is not Tensor and sharded.by_class(logits, 1)):
        return sharded.loss_inputs(logits, target, votes, weight, law, backend, process_group)
    return logits, checks.loss_inputs(logits, target, votes, weight), votes, weight, None


# Log masses ------------------------------------------------------------------------------------------


def _log_mass(
    law: Distribution, N: int, C: int, P: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What the operators gather from: a table (R,) by rank, or (N, C) draws of a random law."""
    if isinstance(law, distributions.RandomDistribution):
        return _masses(law, "draw", law.draw(N, C, device), (N, C), dtype, device)
    length = C if P is None else min(P, C) + 1  # by logits, ranks reach C; by votes, K + 1
    if _belongs_to_a_mode(device) or "__dataclass_fields__" not in type(law).__dict__:
        # Not a frozen dataclass of its own: two laws of different masses may be equal.
        return _compute_table(law, length, C, dtype, device)
    # Of each stream its own: a kernel of another would not wait until the table is there.
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    return _log_mass_table(law, length, C, dtype, device, torch.get_default_dtype(), stream)


_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # of make_fx(pre_dispatch=True), which is on no stack


def _belongs_to_a_mode(device: torch.device) -> bool:
    """Whether a tensor made now must not outlive the call: traced, fake, in a transform, in a captured graph.

    Nor may the call be given one made before: a tracer has to see how the table comes about, and a captured
    graph computes it in its own memory.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        or torch._C._is_tracing()
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


@functools.lru_cache(maxsize=256)
def _log_mass_table(
    law: Distribution,
    length: int,
    num_classes: int,
    dtype: torch.dtype,
    device: torch.device,
    default_dtype: torch.dtype,  # a law may make tensors of its own
    stream: int,
) -> Tensor:
    """The table of a law, kept: an ordinary tensor, whatever modes the thread is in."""
    functionalize = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
    outside = torch._C._ExcludeDispatchKeyGuard(functionalize)
    with outside, torch.inference_mode(False), torch._C._DisableAutocast():
        return _compute_table(law, length, num_classes, dtype, device)


def _compute_table(
    law: Distribution, length: int, num_classes: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """log mass(r) for r = 1 .. length, (length,), taken in float64 and rounded once; memory of its own."""
    with torch.no_grad():
        rank = torch.arange(1, length + 1, dtype=torch.float64, device=device)
        masses = law.log_mass(rank, num_classes)
        masses = _masses(law, "log_mass", masses, (length,), dtype, device)
        return masses.clone(memory_format=torch.contiguous_format)


def _masses(
    law: Distribution,
    method: str,
    x: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """What a law returned, checked, detached and in ``dtype``."""
    if not isinstance(x, Tensor) or x.shape != shape or x.device != device or x.is_complex():
        got = f"{tuple(x.shape)} of {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"distribution: {type(law).__name__}.{method} must return a real tensor {shape} on {device}, "
            f"got {got}"
        )
    return x.detach().to(dtype)


# Autograd --------------------------------------------------------------------------------------------


def _loss(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None,
    weight: Tensor | None,
    shard: sharded.Shard | None,
    law: Distribution,
    options: tuple,
    inplace: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce, zipf) by the chosen backend, with the gradient attached where one is wanted."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    N, C = logits.shape if shard is None else (len(logits), shard.num_classes)
    P = None if votes is None else votes.shape[1]
    log_mass = _log_mass(law, N, C, P, dtype, logits.device)
    if weight is not None:
        weight = weight.detach().to(dtype)
    if checks.is_soft(target):  # probabilities (N, C), of which none is ignored
        checks.no_ignore_index(options[4])
        target = target.to(dtype)
    if shard is None:
        forward = ops.select("loss_fwd", backend, logits)
    else:
        forward = functools.partial(sharded.loss_fwd, shard)
    tensors = (target, votes, log_mass, weight)
    if torch._C._are_functorch_transforms_active():
        function = _LossInTransforms if torch.compiler.is_compiling() else _LossRefusingForwardMode
        backward = ops.select("loss_bwd", backend, logits)
        return function.apply(logits, *tensors, options, forward, backward)[:3]
    _refuse_tangents(logits)
    # Inside a Function this would be wrong under no_grad: there, grad mode is always off.
    wanted = torch.is_grad_enabled() and logits.requires_grad
    if inplace and wanted and not torch.compiler.is_compiling():
        checks.inplace(logits, shard is not None)
        backward_ = ops.select("loss_grad_", backend, logits)
        scale_ = ops.select("loss_bwd_", backend, logits)
        return _LossInPlace.apply(logits, *tensors, options, forward, backward_, scale_)
    if forward is ops.NATIVE_LOSS_FWD and not torch.compiler.is_compiling():
        return ops.native_loss(logits, *tensors, *options)  # the rest of this function, in C++
    if wanted:
        backward, scale_ = ops.select("loss_bwd", backend, logits), ops.select("loss_bwd_", backend, logits)
        return _Loss.apply(logits, _anchor(logits), tensors, options, forward, backward, scale_)
    return forward(logits, *tensors, *options, False)[:3]


def _anchor(logits: Tensor) -> tuple[Tensor, ...]:
    """A zero-element piece of the logits: ties a differentiable gradient to them without keeping them alive.

    In a tuple, where autograd looks for no inputs: compiled autograd would add its gradient, None, to the
    logits'. No compiled gradient is differentiable, so under torch.compile there is no anchor.
    """
    if torch.compiler.is_compiling():
        return ()
    return (logits.narrow(0, 0, 0).clone(),)  # narrow_copy has no derivative in torch 2.11


def _refuse_tangents(logits: Tensor) -> None:
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(logits).tangent is not None:
        raise RuntimeError(_NO_FORWARD_MODE)


_NO_FORWARD_MODE = (
    "zipfls_cuda: forward-mode differentiation of the Zipf loss is not supported; use reverse mode"
)
_NO_SECOND = (
    "zipfls_cuda: the gradient of the Zipf loss cannot be differentiated again (gradient penalty, Hessian, "
    "grad of grad, create_graph=True followed by a backward pass through the gradient)"
)


class _RefuseSecond(torch.autograd.Function):
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


def _is_batched(x: Tensor) -> bool:
    """Whether ``x`` is a batch of gradients in the guise of one, as in vmap and under is_grads_batched."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x)


def _may_overwrite(grad_loss: Tensor) -> bool:
    """Whether backward may scale the saved gradient where it is, since the graph is not kept.

    Not where the upstream gradient is batched (the in-place operator has no batching rule), fake or traced.
    """
    if torch.compiler.is_compiling() or type(grad_loss) is not Tensor or _is_batched(grad_loss):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


class _Loss(torch.autograd.Function):
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
        if _may_overwrite(grad_loss):
            ctx.backward_(grad, grad_loss, grad_scale)  # at once if by one
        else:
            grad = ctx.backward(grad, grad_loss, grad_scale)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if _is_batched(grad_loss):  # the graph belongs to the tensor inside, which an operator reaches
                grad = grad + _RefuseSecond.apply(anchor[0].new_zeros(()), anchor[0])
            else:
                grad = _RefuseSecond.apply(grad, anchor[0])
        return grad, None, None, None, None, None, None


class _LossInPlace(torch.autograd.Function):
    """The loss alone in forward; in backward the gradient, over the saved logits.

    Written in forward it would turn every later use of the logits silently wrong. Here the logits' version
    counter tells on whoever saved them too, and on a second backward.
    """

    @staticmethod
    def forward(ctx, logits, target, votes, log_mass, weight, options, forward, backward_, scale_):
        loss, ce, zipf = forward(logits, target, votes, log_mass, weight, *options, False)[:3]
        ctx.save_for_backward(logits, target, votes, log_mass, weight)
        ctx.options, ctx.backward_, ctx.scale_ = options, backward_, scale_
        ctx.mark_non_differentiable(ce, zipf)
        ctx.set_materialize_grads(False)
        return loss, ce, zipf

    @staticmethod
    def backward(ctx, grad_loss, _ce, _zipf):
        if grad_loss is None:
            return (None,) * 9
        if torch.is_grad_enabled():
            raise RuntimeError(_NO_SECOND)
        if not torch.compiler.is_compiling() and _is_batched(grad_loss):
            raise RuntimeError(
                "zipfls_cuda: inplace=True writes one gradient over the logits, so it has no batched "
                "gradients (is_grads_batched, jacobian(vectorize=True)); use inplace=False"
            )
        logits, *tensors = ctx.saved_tensors
        grad = logits.detach()  # the same memory and version counter
        ctx.scale_(grad, grad_loss, ctx.backward_(grad, *tensors, *ctx.options))
        torch.autograd.graph.increment_version(logits)  # operators written in C++ do not
        return grad, *(None,) * 8


class _LossInTransforms(torch.autograd.Function):
    """The path inside torch.func transforms, which need setup_context and a vmap rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits, target, votes, log_mass, weight, options, forward, backward):
        return forward(logits, target, votes, log_mass, weight, *options, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ce, zipf, grad, grad_scale = output
        ctx.save_for_backward(grad, grad_scale, inputs[0])
        ctx.backward = inputs[-1]
        ctx.mark_non_differentiable(ce, zipf, grad, grad_scale)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * 8
        grad, grad_scale, logits = ctx.saved_tensors
        grad = _RefuseSecond.apply(ctx.backward(grad, grad_loss, grad_scale), logits)
        return grad, None, None, None, None, None, None, None


class _LossRefusingForwardMode(_LossInTransforms):
    """The same with a clear error for forward mode; torch.compile does not trace a class that has a jvp."""

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(_NO_FORWARD_MODE)
