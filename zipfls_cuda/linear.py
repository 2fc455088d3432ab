"""Losses of a linear head: from its features, weight and bias, with gradients to all three."""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, chunked, ops
from .checks import DEFAULT_ALPHA
from .functional import (
    LossOptions,
    dense_vote,
    distillation_options,
    loss_inputs,
    loss_options,
    per_item,
    zipf_cross_entropy,
)
from .labels import Distribution, RandomDistribution
from .reference import accumulation_dtype


class _HeadOptions(LossOptions, total=False):
    upsample: int
    class_weight: Tensor | None


@overload
def zipf_head_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[_HeadOptions],
) -> Tensor: ...
@overload
def zipf_head_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    return_parts: Literal[True],
    **options: Unpack[_HeadOptions],
) -> tuple[Tensor, Tensor, Tensor]: ...
def zipf_head_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    upsample: int = 1,
    zipf_weight: float = 0.1,
    alpha: float = DEFAULT_ALPHA,
    distribution: Distribution | None = None,
    only_correct: bool = False,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_parts: bool = False,
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Global pooling, classifier, votes and loss in one call, with gradients to features, weight and bias.

    Args:
        features: (N, D, H, W) map or (N, T, D) tokens; pooled by the mean over positions.
        weight: (C, D) of the classifier, which gives logits and votes both.
        bias: (C,) of the classifier, or None.
        target: (N,) int64 or uint8 in [0, C), or ``ignore_index``; or probabilities (N, C).
        upsample: as in ``dense_vote``.
        class_weight: the ``weight`` of ``zipf_cross_entropy``; the other options go by its names. Logits of
            64 MiB or more are taken in chunks, as by ``linear_zipf_cross_entropy``, and ``inplace`` is then
            without effect; but not beside a random law.

    Result and errors are those of ``zipf_cross_entropy``.

    Example:
        >>> features = torch.randn(8, 16, 7, 7, requires_grad=True)
        >>> weight, bias = torch.randn(10, 16), torch.zeros(10)
        >>> loss = zls.zipf_head_loss(features, weight, bias, torch.randint(10, (8,)), zipf_weight=0.1)
        >>> loss.backward()
        >>> features.grad.shape
        torch.Size([8, 16, 7, 7])

    Source: Fig. 1.
    """
    checks.constant("class_weight", class_weight)
    votes = dense_vote(features, weight, bias, upsample=upsample, backend=backend)
    # Pooled logits are the mean of the dense scores, but not taken from there: weight's gradient needs the
    # pooled features all the same, and with them the logits are a product of 1/P the size.
    pooled = features.mean((2, 3) if features.dim() == 4 else 1)
    if _is_large(pooled, weight) and not isinstance(distribution, RandomDistribution):
        return linear_zipf_cross_entropy(
            pooled, weight, target, votes, linear_bias=bias, zipf_weight=zipf_weight, alpha=alpha,
            distribution=distribution, only_correct=only_correct, label_smoothing=label_smoothing,
            weight=class_weight, ignore_index=ignore_index, reduction=reduction, return_parts=return_parts,
            num_items=num_items, backend=backend,
        )  # fmt: skip
    logits = F.linear(pooled, weight, bias)
    return zipf_cross_entropy(
        logits, target, votes, zipf_weight=zipf_weight, alpha=alpha, distribution=distribution,
        only_correct=only_correct, label_smoothing=label_smoothing, weight=class_weight,
        ignore_index=ignore_index, reduction=reduction, return_parts=return_parts, num_items=num_items,
        inplace=inplace, backend=backend,
    )  # fmt: skip


LARGE = 1 << 26  # bytes of logits from which zipf_head_loss takes them in chunks


def _is_large(pooled: Tensor, weight: Tensor) -> bool:
    """Whether the logits of a head would take ``LARGE`` bytes or more."""
    return pooled.shape[0] * weight.shape[0] * checks.product_dtype(pooled).itemsize >= LARGE


# Heads whose logits never exist whole ---------------------------------------------------------------------


class _LinearOptions(TypedDict, total=False):
    linear_bias: Tensor | None
    chunk_rows: int | None
    zipf_weight: float
    alpha: float
    distribution: Distribution | None
    only_correct: bool
    label_smoothing: float
    weight: Tensor | None
    ignore_index: int
    reduction: str
    num_items: float | Tensor | None
    backend: str | None


@overload
def linear_zipf_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    votes: Tensor | None = None,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[_LinearOptions],
) -> Tensor: ...
@overload
def linear_zipf_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    votes: Tensor | None = None,
    *,
    return_parts: Literal[True],
    **options: Unpack[_LinearOptions],
) -> tuple[Tensor, Tensor, Tensor]: ...
def linear_zipf_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    votes: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    chunk_rows: int | None = None,
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """``zipf_cross_entropy`` of F.linear(input, linear_weight, linear_bias), whose logits never exist whole.

    Logits of a chunk of rows at a time, the gradient written over them, then its products, which give the
    gradients to input, weight and bias. Those are computed together with the loss, but for reduction "none",
    whose backward computes the logits once more. Differentiating a gradient again raises a RuntimeError.

    Args:
        input: (N, D) features, any float type.
        linear_weight: (C, D), C >= 2, same dtype and device; under autocast the products are in its dtype.
        target, votes: as for ``zipf_cross_entropy``, probabilities included. votes=None ranks by the logits.
        linear_bias: (C,) or None.
        chunk_rows: logits of so many rows exist at a time. None: a ninth of N (of 16-bit logits an
            eleventh), but on a CPU 224 to 1,024, on a GPU 1,024 to 8,192. The result is the same within
            rounding.
        only_correct: as for ``zipf_cross_entropy``. A mean needs the number of correct samples before any
            gradient, and computes all logits once more.
        The others as for ``zipf_cross_entropy``. There is no ``inplace``, as the gradient is always written
            over the logits; no ``process_group``; and no random law, whose masses are as large as the logits.

    Returns:
        As ``zipf_cross_entropy``. Gradients accumulate over the chunks in float32 (float64 for float64
        products) and are rounded once, in backward; they are the same bits in every run.

    Raises:
        TypeError: an argument of the wrong type or dtype, by name; a DTensor.
        ValueError: an argument of a wrong shape, value or device, by name; a random law.
        IndexError: a target or vote out of range in CPU tensors.
        RuntimeError: the named backend cannot serve; weight requires grad.

    Example:
        >>> features = torch.ones(4, 8, requires_grad=True)
        >>> weight = torch.zeros(1000, 8, requires_grad=True)
        >>> loss = zls.linear_zipf_cross_entropy(features, weight, torch.arange(4), zipf_weight=0.0)
        >>> loss.backward()
        >>> loss, weight.grad.shape
        (tensor(6.9078, grad_fn=<LinearLossBackward>), torch.Size([1000, 8]))

    Source: Eq. 6; the chunks as in Liger Kernel's fused linear cross-entropy (arXiv 2410.10989, Sec. 3.2).
    """
    law = checks.law(alpha, distribution)
    if isinstance(law, RandomDistribution):
        raise ValueError(
            f"distribution must be a law of the rank where logits are taken in chunks, got {law!r}, which "
            "draws as many masses as there are logits"
        )
    options, num_items = loss_options(
        zipf_weight, label_smoothing, only_correct, ignore_index, reduction, num_items
    )
    dtype = checks.linear_inputs("input", input, linear_weight, linear_bias)
    logits = _stand_in(input, linear_weight, dtype)
    _, _, tensors, _ = loss_inputs(logits, target, votes, weight, law, options[4], backend, None)
    tensors = (input, linear_weight, linear_bias, *tensors)
    return _linear_loss("loss", tensors, options, dtype, chunk_rows, backend, num_items, return_parts)


class _LinearDistillationOptions(TypedDict, total=False):
    linear_bias: Tensor | None
    teacher_bias: Tensor | None
    chunk_rows: int | None
    temperature: float
    ce_weight: float
    kd_weight: float
    tckd_weight: float
    nckd_weight: float
    soft_target_weight: float
    form: str
    sample_weight: Tensor | None
    ignore_index: int
    reduction: str
    num_items: float | Tensor | None
    backend: str | None


@overload
def linear_distillation_loss(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[_LinearDistillationOptions],
) -> Tensor: ...
@overload
def linear_distillation_loss(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None,
    *,
    return_parts: Literal[True],
    **options: Unpack[_LinearDistillationOptions],
) -> tuple[Tensor, Tensor, Tensor]: ...
def linear_distillation_loss(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_rows: int | None = None,
    temperature: float = 1.0,
    ce_weight: float = 1.0,
    kd_weight: float = 0.0,
    tckd_weight: float = 0.0,
    nckd_weight: float = 0.0,
    soft_target_weight: float = 0.0,
    form: str = "divergence",
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_parts: bool = False,
    num_items: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """``distillation_loss`` of two linear heads, neither of whose logits ever exist whole.

    Student: F.linear(input, linear_weight, linear_bias); teacher: F.linear(teacher_input, teacher_weight,
    teacher_bias). Gradients flow to the student's three tensors alone, as of ``linear_zipf_cross_entropy``.

    Args:
        input: (N, D) features of the student, any float type.
        linear_weight: (C, D), C >= 2; linear_bias: (C,) or None: same dtype and device.
        teacher_input: (N, E) features of the teacher, any float type.
        teacher_weight: (C, E); teacher_bias: (C,) or None: the dtype of ``teacher_input``.
        target: (N,), or None with ``kd_weight`` alone.
        chunk_rows: logits of so many rows of each head exist at a time; None: half as many as for
            ``linear_zipf_cross_entropy``.
        The others as for ``distillation_loss``. There is no ``inplace`` and no ``process_group``.

    Returns:
        As ``distillation_loss``; the gradients as those of ``linear_zipf_cross_entropy``.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``linear_zipf_cross_entropy``.

    Example:
        >>> student, teacher = torch.ones(4, 8, requires_grad=True), torch.ones(4, 16)
        >>> heads = torch.zeros(1000, 8, requires_grad=True), torch.zeros(1000, 16)
        >>> loss = zls.linear_distillation_loss(
        ...     student, heads[0], teacher, heads[1], None, ce_weight=0.0, kd_weight=1.0
        ... )
        >>> loss.backward()
        >>> loss.item(), heads[0].grad.shape
        (0.0, torch.Size([1000, 8]))
    """
    options, num_items = distillation_options(
        target, ce_weight, kd_weight, tckd_weight, nckd_weight, soft_target_weight,
        temperature, form, ignore_index, reduction, num_items,
    )  # fmt: skip
    dtype = checks.linear_inputs("input", input, linear_weight, linear_bias)
    teacher_dtype = checks.linear_inputs(
        "teacher_input", teacher_input, teacher_weight, teacher_bias, input.shape[0]
    )
    if teacher_weight.shape[0] != linear_weight.shape[0]:
        raise ValueError(
            f"teacher_weight must have the {linear_weight.shape[0]} classes of linear_weight, got shape "
            f"{tuple(teacher_weight.shape)}"
        )
    logits = _stand_in(input, linear_weight, dtype)
    teacher = _stand_in(teacher_input, teacher_weight, teacher_dtype)
    target = checks.distillation_inputs(logits, teacher, target, sample_weight)
    if sample_weight is not None:
        sample_weight = sample_weight.detach().to(accumulation_dtype(logits.dtype))
    of_teacher = (None if x is None else x.detach() for x in (teacher_input, teacher_weight, teacher_bias))
    tensors = (input, linear_weight, linear_bias, *of_teacher, target, sample_weight)
    options = (teacher_dtype, *options)
    return _linear_loss("distill", tensors, options, dtype, chunk_rows, backend, num_items, return_parts)


def _stand_in(input: Tensor, linear_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the logits' shape, dtype and device, for checks; of one element."""
    one = torch.empty((1, 1), dtype=dtype, device=input.device)
    return one.expand(input.shape[0], linear_weight.shape[0])


def _linear_loss(
    stage: str,
    tensors: tuple[Tensor | None, ...],
    options: tuple,
    dtype: torch.dtype,
    chunk_rows: int | None,
    backend: str | None,
    num_items: float | Tensor | None,
    return_parts: bool,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The loss of a stage, "loss" or "distill", from checked tensors and options."""
    if chunk_rows is not None:
        chunk_rows = checks.count("chunk_rows", chunk_rows, 1)
    name = ops.name_of(f"{stage}_grad_", backend, tensors[0].device, dtype)
    op = getattr(torch.ops.zipfls, f"linear_{stage}_fwd").default
    parts = chunked.linear_loss(chunked.Call(op, options, (dtype, chunk_rows, name)), tensors)
    parts = per_item(parts, num_items)
    return parts if return_parts else parts[0]
