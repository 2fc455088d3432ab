"""The public functions: arguments checked, operator chosen and called, a loss through ``autograd``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, TypedDict, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor

from . import autograd, checks, labels, ops, scalars, sharded
from .checks import DEFAULT_ALPHA
from .labels import Distribution
from .reference import accumulation_dtype

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
        TypeError: an argument of the wrong type or dtype, by name.
        ValueError: an argument of a wrong shape, value or device, by name.
        RuntimeError: the named backend cannot serve.

    Example:
        >>> features = torch.tensor([1.0, -1.0, 2.0, -2.0]).view(1, 1, 2, 2)  # four positions of one channel
        >>> zls.dense_vote(features, weight=torch.tensor([[1.0], [-1.0]]))
        tensor([[0, 1, 0, 1]], dtype=torch.int32)

    Source: Sec. 3.2, "dense classification ranking".
    """
    if isinstance(features, Tensor) and checks.autocast_enabled(features):
        features, weight, bias = (_autocast(x, features.device.type) for x in (features, weight, bias))
    if process_group is not None or (checks.is_dtensor(features) and checks.is_class_shard(weight, 0)):
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
        backend: name of a backend, or None for the best one.

    Returns:
        ranks (N, C) int32 from 1; ties share the smallest rank, all classes without a vote the one after.

    Raises:
        TypeError: an argument of the wrong type or dtype, by name.
        ValueError: an argument of a wrong shape or value, by name.
        IndexError: a vote >= C in a CPU tensor (on other devices its row becomes 0).

    Example:
        >>> zls.rank_votes(torch.tensor([[2, 2, 2, 0, 0, 1]]), num_classes=5)
        tensor([[2, 3, 1, 4, 4]], dtype=torch.int32)

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
        alpha: decay of Zipf's law, >= 0.
        distribution: another law in its place.
        ignore_index: a target that stands for no class.
        backend: name of a backend, or None for the best one.

    Returns:
        labels (N, C) float32, each row summing to 1 with 0 at the target; all 0 where ignored.

    Raises:
        TypeError: an argument of the wrong type or dtype, by name.
        ValueError: an argument of a wrong shape or value, by name.
        IndexError: a target or vote out of range in CPU tensors (on other devices its row becomes NaN).

    Example:
        >>> votes = torch.tensor([[2, 2, 2, 0, 0, 1]])  # ranks 2, 3, 1, 4, 4
        >>> zls.zipf_label(torch.tensor([2]), votes, num_classes=5)
        tensor([[0.3750, 0.2500, 0.0000, 0.1875, 0.1875]])

    Source: Eq. 4; Table 6.
    """
    law = checks.law(alpha, distribution)
    num_classes, ignore_index = checks.num_classes(num_classes), scalars.integer("ignore_index", ignore_index)
    target = checks.label_inputs(target, votes)
    log_mass = labels.log_mass(
        law, target.shape[0], num_classes, votes.shape[1], torch.float32, target.device
    )
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
        TypeError: not a float tensor.
        ValueError: not (M, C), or fewer than two ranks with p > 0.

    Example:
        >>> p = torch.arange(1, 101).double() ** -1.5
        >>> alpha, intercept = zls.fit_zipf((p / p.sum())[None])
        >>> round(alpha, 3)
        1.5

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

    Arguments, result and errors as ``zipf_cross_entropy``, a target of probabilities included; the mean
    divides by the number of samples that are not ignored (with ``only_correct``: that are classified
    correctly; 0 if none is).

    Example:
        >>> logits, target = torch.zeros(1, 5), torch.tensor([2])
        >>> zls.zipf_loss(logits, target, votes=torch.tensor([[2, 2, 2, 0, 0, 1]]))
        tensor(0.0442)

    Source: Eq. 5.
    """
    law = checks.law(alpha, distribution)
    options = (0.0, *checks.loss_options(1.0, 0.0, only_correct, ignore_index, reduction))
    inputs = loss_inputs(logits, target, votes, None, law, options[4], backend, process_group)
    return autograd.loss(*inputs, options, inplace, backend)[0]


class LossOptions(TypedDict, total=False):
    """Options of ``zipf_cross_entropy`` and of the losses of a head (linear.py) alike."""

    zipf_weight: float
    alpha: float
    distribution: Distribution | None
    only_correct: bool
    label_smoothing: float
    ignore_index: int
    reduction: str
    num_items: float | Tensor | None
    inplace: bool
    backend: str | None


class _CrossEntropyOptions(LossOptions, total=False):
    weight: Tensor | None
    process_group: dist.ProcessGroup | None


@overload
def zipf_cross_entropy(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None = None,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[_CrossEntropyOptions],
) -> Tensor: ...
@overload
def zipf_cross_entropy(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None = None,
    *,
    return_parts: Literal[True],
    **options: Unpack[_CrossEntropyOptions],
) -> tuple[Tensor, Tensor, Tensor]: ...
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
        votes: (N, P) int32 or int64 from ``dense_vote``, below C; negative means no vote; P = 0 is
            allowed. None ranks by the logits instead.
        zipf_weight: lambda, finite; 0 skips the Zipf term. The paper uses 0.1 (CIFAR-100, ImageNet) and 1.0
            (TinyImageNet, iNat21).
        alpha: decay of Zipf's law, >= 0.
        distribution: another law in its place.
        only_correct: count L_zipf only where the target has the largest logit (lowest index on ties).
        label_smoothing: of the cross-entropy alone, as in F.cross_entropy.
        weight: class weights (C,) of the cross-entropy alone, as in F.cross_entropy.
        ignore_index: as in F.cross_entropy; beside probabilities it must be negative.
        reduction: as in F.cross_entropy. The mean of CE divides by the sum of the targets' class weights, the
            mean of L_zipf by the number of samples that count.
        return_parts: return (loss, ce, zipf) with the two parts detached and unweighted.
        num_items: what a mean divides by instead of its own count: the sum over the samples / num_items. For
            gradient accumulation, the samples of all micro-batches: a number, or a scalar tensor.
        inplace: keep no gradient beside the logits: backward computes it over them. A reader of the
            logits afterwards finds the gradient there; a graph that still needs them raises, and so does a
            second backward (but where saved_tensors_hooks keep autograd from noticing). They must be
            contiguous, no leaf nor a view of one, and of all classes (no process_group). It saves memory of
            the logits' size for one more pass over them: on GPUs four numbers a sample and one a vote are
            kept for it. On the CPU, and where a target is probabilities, the logits rank, label smoothing
            stands beside class weights, or votes outnumber half the classes, backward computes the whole loss
            again. Under torch.compile and torch.func nothing changes.
        backend: name of a backend, or None for the best one.
        process_group: logits (N, C/W) and weight (C/W,) are this rank's class shards, in rank order; target
            and votes (required) are of all classes and the same on every rank, and so is the loss. The
            gradient is the shard of the whole one (docs/DISTRIBUTED.md). Logits that are a DTensor, Shard(1),
            bring their group along.

    Returns:
        The loss: a scalar, or (N,) for "none"; float32 (float64 for float64 logits).

    Raises:
        TypeError: an argument of the wrong type or dtype, by name.
        ValueError: an argument of a wrong shape or value, by name.
        IndexError: a target or vote out of range in CPU tensors (on other devices that sample's loss and
            gradient are NaN).
        RuntimeError: the named backend cannot serve; weight requires grad, as F.cross_entropy says too.

    Example:
        >>> logits, target = torch.zeros(1, 5, requires_grad=True), torch.tensor([2])
        >>> votes = torch.tensor([[2, 2, 2, 0, 0, 1]])
        >>> loss, ce, zipf = zls.zipf_cross_entropy(logits, target, votes, zipf_weight=0.1, return_parts=True)
        >>> loss.backward()
        >>> logits.grad
        tensor([[ 0.1875,  0.2000, -0.8000,  0.2062,  0.2062]])

    Source: Eq. 6.
    """
    law = checks.law(alpha, distribution)
    options, num_items = loss_options(
        zipf_weight, label_smoothing, only_correct, ignore_index, reduction, num_items
    )
    inputs = loss_inputs(logits, target, votes, weight, law, options[4], backend, process_group)
    parts = per_item(autograd.loss(*inputs, options, inplace, backend), num_items)
    return parts if return_parts else parts[0]


def loss_options(
    zipf_weight: float,
    label_smoothing: float,
    only_correct: bool,
    ignore_index: int,
    reduction: str,
    num_items: float | Tensor | None,
) -> tuple[tuple, float | Tensor | None]:
    """The operator's options, checked, from ce_weight to reduction; and num_items."""
    options = checks.loss_options(zipf_weight, label_smoothing, only_correct, ignore_index, reduction)
    options = (1.0, *map(float, options[:2]), *options[2:])
    if num_items is not None:
        num_items = checks.num_items(num_items, reduction)
        options = (*options[:-1], "sum")
    return options, num_items


def per_item(
    parts: tuple[Tensor, Tensor, Tensor], num_items: float | Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the samples divided by ``num_items``, where it is given."""
    if num_items is None:
        return parts
    n = num_items.detach().to(parts[0].dtype) if isinstance(num_items, Tensor) else num_items
    return parts[0] / n, parts[1] / n, parts[2] / n


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """scale * F.cross_entropy in the pass of ``zipf_cross_entropy``; for ``zls.methods``.

    Args:
        target: as in ``zipf_cross_entropy``; a row of (N, C) may have any sum, and negative entries.
        scale: finite; part of the gradient that the pass writes, which backward would otherwise scale.
        The others as in ``zipf_cross_entropy``.
    """
    options = checks.loss_options(0.0, label_smoothing, False, ignore_index, reduction)
    options = (float(scale), *map(float, options[:2]), *options[2:])
    law = labels.Zipf(1.0)  # without a part in the loss
    inputs = loss_inputs(logits, target, None, None, law, options[4], backend, None)
    return autograd.loss(*inputs, options, False, backend)[0]


def loss_inputs(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None,
    weight: Tensor | None,
    law: Distribution,
    ignore_index: int,
    backend: str | None,
    process_group: dist.ProcessGroup | None,
) -> tuple[Callable, Tensor, tuple[Tensor, Tensor | None, Tensor, Tensor | None], bool]:
    """The first arguments of ``autograd.loss``: operator, checked tensors, whether they are a shard."""
    is_shard = process_group is not None or (type(logits) is not Tensor and checks.is_class_shard(logits, 1))
    if is_shard:
        logits, target, votes, weight, shard = sharded.loss_inputs(
            logits, target, votes, weight, law, backend, process_group
        )
        forward, C = functools.partial(sharded.loss_fwd, shard), shard.num_classes
    else:
        target = checks.loss_inputs(logits, target, votes, weight)
        forward, C = ops.select("loss_fwd", backend, logits), logits.shape[1]
    dtype = accumulation_dtype(logits.dtype)
    P = None if votes is None else votes.shape[1]
    log_mass = labels.log_mass(law, logits.shape[0], C, P, dtype, logits.device)
    if weight is not None:
        weight = weight.detach().to(dtype)
    if target.dim() == 2:  # probabilities, of which none is ignored
        checks.no_ignore_index(ignore_index)
        target = target.to(dtype)
    return forward, logits, (target, votes, log_mass, weight), is_shard


# Distillation: the loss with a teacher's row in the place of the label -------------------------------------


class DistillationOptions(TypedDict, total=False):
    """Options of ``distillation_loss``."""

    temperature: float
    ce_weight: float
    kd_weight: float
    tckd_weight: float
    nckd_weight: float
    soft_target_weight: float
    form: str
    sample_weight: Tensor | None
    teacher_index: Tensor | None
    ignore_index: int
    reduction: str
    num_items: float | Tensor | None
    inplace: bool
    backend: str | None
    process_group: dist.ProcessGroup | None


@overload
def distillation_loss(
    logits: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[DistillationOptions],
) -> Tensor: ...
@overload
def distillation_loss(
    logits: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    *,
    return_parts: Literal[True],
    **options: Unpack[DistillationOptions],
) -> tuple[Tensor, Tensor, Tensor]: ...
def distillation_loss(
    logits: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    *,
    temperature: float = 1.0,
    ce_weight: float = 1.0,
    kd_weight: float = 0.0,
    tckd_weight: float = 0.0,
    nckd_weight: float = 0.0,
    soft_target_weight: float = 0.0,
    form: str = "divergence",
    sample_weight: Tensor | None = None,
    teacher_index: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_parts: bool = False,
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy plus distillation from a teacher's logits: KD, DKD, NKD and their relatives in one call.

    With p and q the softmax of logits and teacher over T, q1 that of the teacher at T = 1, and w the sample's
    weight: (ce_weight + soft_target_weight q1_y) CE + T^2 w (kd_weight KL(q || p) + tckd_weight TCKD +
    nckd_weight NCKD), where TCKD = KL((q_y, 1 - q_y) || (p_y, 1 - p_y)), NCKD is KL(q || p) of the classes
    other than the target, each softmax taken over those alone, and KL = TCKD + (1 - q_y) NCKD. The value is
    finite, and accurate, for any finite logits. The gradient flows to ``logits`` alone; differentiating it
    again raises a RuntimeError.

    Args:
        logits: (N, C) of the student, C >= 2, any float type; arithmetic runs in float32 (float64 for
            float64).
        teacher: (N, C) logits of the teacher, any float type; no gradient flows to it.
        target: (N,) int64 or uint8 in [0, C), or ``ignore_index``. None where of all weights only
            ``kd_weight`` is not 0.
        temperature: T > 0.
        ce_weight, kd_weight, tckd_weight, nckd_weight, soft_target_weight: finite; a term of weight 0 is
            skipped.
        form: "divergence"; or "cross_entropy", which leaves out the teacher's entropy, a constant:
            -sum q log p for KL and likewise for TCKD and NCKD.
        sample_weight: (N,) any float type, w of each sample, of the T^2 terms alone and without gradient.
            Means do not divide by it.
        teacher_index: (N,) int64, the row of each sample in ``teacher``, which is then a table (R, C): logits
            kept by sample, or a row for every class. None: row i of sample i.
        ignore_index: as in F.cross_entropy.
        reduction: "mean" over the samples that are not ignored, "sum" or "none".
        return_parts: return (loss, ce, distillation), detached but for the loss: the unweighted
            cross-entropy, and all of the loss but ce_weight * CE.
        num_items, inplace: as in ``zipf_cross_entropy``.
        backend: name of a backend, or None for the best one that has this loss.
        process_group: logits and teacher (N, C/W) are this rank's class shards, as in
            ``zipf_cross_entropy``. Logits that are a DTensor, Shard(1), bring their group along.

    Returns:
        The loss: a scalar, or (N,) for "none"; float32 (float64 for float64 logits). A class whose logit is
        -inf in both rows takes no part; where it is so in ``logits`` alone the divergence is +inf.

    Raises:
        TypeError: an argument of the wrong type or dtype, by name.
        ValueError: an argument of a wrong shape or value, by name.
        IndexError: a target or teacher_index out of range in CPU tensors (on other devices that sample's loss
            and gradient are NaN).
        RuntimeError: the named backend cannot serve; sample_weight requires grad.

    Example:
        >>> logits, teacher = torch.zeros(1, 4, requires_grad=True), torch.tensor([[2.0, 1.0, 0.0, 0.0]])
        >>> loss = zls.distillation_loss(logits, teacher, torch.tensor([0]), kd_weight=0.5, temperature=2.0)
        >>> loss.backward()
        >>> logits.grad
        tensor([[-0.9269,  0.2411,  0.3429,  0.3429]])

    Source: Hinton et al., arXiv 1503.02531; Zhao et al., CVPR 2022, Eq. 7 (TCKD, NCKD); Yang et al.,
    ICCV 2023 (the soft target).
    """
    options, num_items = distillation_options(
        target, ce_weight, kd_weight, tckd_weight, nckd_weight, soft_target_weight,
        temperature, form, ignore_index, reduction, num_items,
    )  # fmt: skip
    inputs = distillation_inputs(
        logits, teacher, target, sample_weight, teacher_index, False, backend, process_group
    )
    parts = per_item(autograd.loss(*inputs, options, inplace, backend, "distill_grad_"), num_items)
    return parts if return_parts else parts[0]


def distill(
    logits: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    ce_weight: float = 0.0,
    kd_weight: float = 0.0,
    tckd_weight: float = 0.0,
    nckd_weight: float = 0.0,
    soft_target_weight: float = 0.0,
    max_weight: float = 0.0,
    temperature: float = 1.0,
    form: str = "divergence",
    sample_weight: Tensor | None = None,
    teacher_index: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """``distillation_loss`` with what ``zls.methods`` needs beside it.

    Args:
        max_weight: finite, of w (max_c z_c - z_y); of equal logits the lowest class has the gradient.
        form: also "probabilities": the teacher's rows are labels P >= 0 of any sum, any float type, and
            kd_weight is that of T^2 w (-sum_c P_c log p_c). A row of 0 has no part.
        sample_weight: also (N, 2), any strides: weights of the cross-entropies, soft target included, and of
            the other terms. A row of probabilities that is 0 leaves its second weight to the first.
        The others as in ``distillation_loss``.
    """
    options, _ = distillation_options(
        target, ce_weight, kd_weight, tckd_weight, nckd_weight, soft_target_weight,
        temperature, form, ignore_index, reduction, None, max_weight, checks.FORMS_OF_METHODS,
    )  # fmt: skip
    inputs = distillation_inputs(logits, teacher, target, sample_weight, teacher_index, True, backend, None)
    return autograd.loss(*inputs, options, False, backend, "distill_grad_")[0]


def distillation_inputs(
    logits: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    sample_weight: Tensor | None,
    teacher_index: Tensor | None,
    columns: bool,
    backend: str | None,
    process_group: dist.ProcessGroup | None,
) -> tuple[Callable, Tensor, tuple[Tensor | None, ...], bool]:
    """As ``loss_inputs``, of ``distillation_loss``; ``columns``: sample_weight may be (N, 2)."""
    is_shard = process_group is not None or (type(logits) is not Tensor and checks.is_class_shard(logits, 1))
    if is_shard:
        logits, teacher, target, sample_weight, shard = sharded.distill_inputs(
            logits, teacher, target, sample_weight, teacher_index, backend, process_group
        )
        forward = functools.partial(sharded.distill_fwd, shard)
    else:
        target = checks.distillation_inputs(
            logits, teacher, target, sample_weight, teacher_index, columns=columns
        )
        forward = ops.select("distill_fwd", backend, logits)
    if sample_weight is not None:
        sample_weight = sample_weight.detach().to(accumulation_dtype(logits.dtype))
    tensors = (teacher.detach(), target, sample_weight)
    return forward, logits, tensors if is_shard else (*tensors, teacher_index), is_shard


def distillation_options(
    target: Tensor | None,
    ce_weight: float,
    kd_weight: float,
    tckd_weight: float,
    nckd_weight: float,
    soft_target_weight: float,
    temperature: float,
    form: str,
    ignore_index: int,
    reduction: str,
    num_items: float | Tensor | None,
    max_weight: float = 0.0,
    forms: tuple[str, ...] = checks.FORMS,
) -> tuple[tuple, float | Tensor | None]:
    """The operator's options, checked, from ce_weight to reduction; and num_items."""
    weights = {
        "ce_weight": ce_weight,
        "kd_weight": kd_weight,
        "tckd_weight": tckd_weight,
        "nckd_weight": nckd_weight,
        "soft_target_weight": soft_target_weight,
        "max_weight": max_weight,
    }
    options = checks.distillation_options(weights, temperature, form, forms)
    options += checks.which_samples(ignore_index, reduction)
    checks.target_or_none(target, weights)
    if num_items is not None:
        num_items = checks.num_items(num_items, reduction)
        options = (*options[:-1], "sum")
    return options, num_items
