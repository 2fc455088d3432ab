"""Linear layer and loss by chunks of rows: logits of a chunk exist at a time, with no gradient beside them.

For each chunk: z = x W^T + b into a buffer; the stage's in-place operator (``loss_grad_``, ``distill_grad_``)
writes dz over z and returns the losses; then dx = dz W, and dW += dz^T x and db += sum dz in the accumulation
dtype. These are sums over the samples; a mean's factor comes at the end, for the gradients in backward. Under
``only_correct`` a mean divides the Zipf part by a number that only all logits tell: they are computed once
more, before.

Backward scales the three gradients. With reduction "none" its scale differs by row, so forward keeps none of
them and backward computes them from the inputs. Nothing here waits for a device; on CPU tensors the rows of
ignored samples are left out.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import autograd, ops, reference

Rows = slice | Tensor  # rows of a chunk: in a row, or their indices (n,) int64
Grads = tuple[Tensor, Tensor, Tensor]  # to input (N, D), weight (C, D), bias (C,); (0,) where not wanted

# Rows of a chunk by default: temporaries are to be an eighth of the logits at most. 16-bit products are added
# through a buffer of a PARTS-th of the chunk's elements, which takes 6 bytes for each (a product of 16 bits
# and its conversion), so their chunk is a SHARE_16-th of the logits. More than MOST_ROWS make the products no
# faster, fewer than FEWEST_ROWS slower: on a GPU each chunk also reads weight and its gradient and writes the
# latter, 12 bytes an element beside 6 n operations.
SHARE, SHARE_16, PARTS = 9, 11, 12
FEWEST_ROWS = {"cpu": 224, "cuda": 1024}
MOST_ROWS = {"cpu": 1024, "cuda": 8192}


def default_rows(N: int, dtype: torch.dtype, device: torch.device, buffers: int) -> int:
    """Rows of a chunk where none are given; ``buffers``: logits of one head, or of two."""
    low, high = (rows.get(device.type, rows["cuda"]) for rows in (FEWEST_ROWS, MOST_ROWS))
    share = SHARE_16 if dtype.itemsize == 2 else SHARE
    return max(low // buffers, min(N // (share * buffers), high // buffers))


@dataclass
class Head:
    """A linear layer over rows of features, and its products in one dtype."""

    input: Tensor  # (N, D)
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)
    dtype: torch.dtype  # of the products: that of the tensors, or autocast's
    buffer: Tensor | None = None  # (rows of a chunk, C)

    def __post_init__(self) -> None:
        self.cast_weight = self.weight.to(self.dtype)
        self.cast_bias = None if self.bias is None else self.bias.to(self.dtype)

    def logits(self, rows: Rows, most: int) -> tuple[Tensor, Tensor]:
        """Features (n, D) and logits (n, C) of a chunk of at most ``most`` rows, over those of the last."""
        if self.buffer is None:
            self.buffer = self.input.new_empty((most, len(self.weight)), dtype=self.dtype)
        x = self.input[rows].to(self.dtype)
        out = self.buffer[: len(x)]
        if self.cast_bias is None:
            torch.mm(x, self.cast_weight.t(), out=out)
        else:
            torch.addmm(self.cast_bias, x, self.cast_weight.t(), out=out)
        return x, out

    def gradients(self, wanted: Sequence[bool], skipping: bool) -> Grads:
        """Where the gradients go: zeros, but for rows of the input that all will be written."""
        wide, (C, D) = reference.accumulation_dtype(self.dtype), self.weight.shape
        x = self.input.new_empty((len(self.input), D) if wanted[0] else 0)
        w = self.weight.new_zeros((C, D) if wanted[1] else 0, dtype=wide)
        b = self.weight.new_zeros(C if wanted[2] else 0, dtype=wide)
        return x.zero_() if skipping else x, w, b

    def accumulate(self, grads: Grads, wanted: Sequence[bool], rows: Rows, x: Tensor, dz: Tensor) -> None:
        """The products of a chunk's gradient dz (n, C)."""
        to_input, to_weight, to_bias = grads
        if wanted[0]:
            if isinstance(rows, slice) and to_input.dtype == self.dtype:
                torch.mm(dz, self.cast_weight, out=to_input[rows])
            else:
                to_input[rows] = torch.mm(dz, self.cast_weight).to(to_input.dtype)
        if wanted[1]:
            add_product(to_weight, dz, x)
        if wanted[2]:
            add_sum(to_bias, dz)


def add_sum(out: Tensor, dz: Tensor) -> None:
    """out += sum of the rows of dz, where ``out`` (C,) is of the accumulation dtype."""
    if dz.dtype == out.dtype:
        out.addmv_(dz.t(), dz.new_ones(len(dz)))
    elif dz.is_cuda:
        out.add_(dz.sum(0, dtype=out.dtype))
    else:  # a CPU would convert all of dz to sum it
        out.add_(torch.mm(dz.new_ones(1, len(dz)), dz)[0])


# Whether torch has float32 products of 16-bit factors: builds for CUDA do.
WIDE_PRODUCTS = torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype", "CUDA")


def add_product(out: Tensor, dz: Tensor, x: Tensor) -> None:
    """out += dz^T x, where ``out`` (C, D) is of the accumulation dtype.

    A 16-bit product is added block by block of classes: in float32 where torch gives one of 16-bit factors,
    which is on CUDA devices alone.
    """
    if dz.dtype == out.dtype:
        out.addmm_(dz.t(), x)
        return
    block = 1 + dz.numel() // (PARTS * x.shape[1])
    for to, part in zip(out.split(block), dz.split(block, 1), strict=True):
        if WIDE_PRODUCTS and dz.device.type == "cuda":
            to.add_(torch.mm(part.t(), x, out_dtype=out.dtype))
        else:
            to.add_(torch.mm(part.t(), x))


def chunks_of(N: int, rows: Tensor | None, most: int) -> list[Rows]:
    """All rows, or those given (M,) int64, in chunks of nearly equal size and at most ``most`` rows."""
    M = N if rows is None else len(rows)
    count = max(1, -(-M // most))
    bounds = [M * i // count for i in range(count + 1)]
    spans = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    return spans if rows is None else [rows[span] for span in spans]


def counted_rows(target: Tensor | None, votes: Tensor | None, C: int, ignore_index: int) -> Tensor | None:
    """On CPU tensors of class indices, the rows (M,) that are not ignored, or None for all of them.

    Raises:
        IndexError: a target or vote out of range in CPU tensors, by its index among all.
    """
    if target is None or target.dim() == 2 or target.device.type != "cpu":
        return None
    ignored = target == ignore_index
    reference.raise_outside(target, votes, C, ignored)
    return (~ignored).nonzero()[:, 0] if ignored.any() else None


# What a mean divides by ------------------------------------------------------------------------------


class Factors(NamedTuple):
    """What sums over the samples are multiplied by, for a mean of them: scalar tensors.

    Where the two parts have different denominators, the class weights of CE carry the ratio, so that one
    factor is left for the gradient of both.
    """

    ce: Tensor
    rest: Tensor
    grad: Tensor
    weight: Tensor | None = None  # (C,) class weights
    ratio: Tensor | None = None  # float16 only: dz is computed in float32 and divided by it


def _usable(factor: Tensor) -> Tensor:
    """The factor, or 1 where it is no number to multiply a gradient of zeros by."""
    return factor.where(torch.isfinite(factor) & (factor != 0), 1.0)


def loss_factors(
    target: Tensor,
    weight: Tensor | None,
    C: int,
    dtype: torch.dtype,
    zipf_weight: float,
    ignore_index: int,
    correct: Tensor | None,
) -> Factors:
    """The factors of a mean; ``correct``: the number of correct samples, where Zipf's mean divides by it."""
    wide = reference.accumulation_dtype(dtype)
    samples = torch.full((), len(target), dtype=wide, device=target.device)
    ce = 1 / samples
    if target.dim() == 1:
        ignored = target == ignore_index
        total = samples = (~ignored).sum().to(wide)
        if weight is not None:
            total = weight[target.clamp(0, C - 1)].masked_fill(ignored, 0).sum()
        ce = torch.where(total == 0, torch.nan, 1 / total)
    zipf = 1 / samples
    if correct is not None:
        zipf = torch.where((samples > 0) & (correct == 0), 0.0, 1 / correct.to(wide))
    if zipf_weight == 0 or (correct is None and (weight is None or target.dim() == 2)):
        return Factors(ce, zipf, _usable(ce), weight)
    grad = torch.where(torch.isfinite(zipf) & (zipf != 0), zipf, _usable(ce))
    ratio = ce / grad
    weight = ratio.expand(C).contiguous() if weight is None else weight * ratio
    if dtype != torch.float16:
        return Factors(ce / ratio, zipf, grad, weight)
    return Factors(ce / ratio, zipf, grad * _usable(ratio), weight, _usable(ratio))


def count_correct(head: Head, chunks: list[Rows], most: int, target: Tensor, ignore_index: int) -> Tensor:
    """The number of samples whose target class has the largest logit; one more product of all logits."""
    count = torch.zeros((), dtype=torch.int64, device=target.device)
    for rows in chunks:
        _, logits = head.logits(rows, most)
        part = max(1, most // PARTS)  # is_correct has a few bytes for each of its logits
        for z, t in zip(logits.split(part), target[rows].split(part), strict=True):
            soft = t.dim() == 2
            y = reference.argmax_lowest(t).long().clamp(min=0) if soft else t.clamp(0, z.shape[1] - 1)
            correct = reference.is_correct(z, y)
            count += (correct if soft else correct & (t != ignore_index)).sum()
    return count


# The operators ---------------------------------------------------------------------------------------


def _run(
    stage: str,
    head: Head,
    chunks: list[Rows],
    most: int,
    others: Callable[[Rows], tuple],
    options: tuple,
    backend: str,
    wanted: Sequence[bool],
    factors: Factors | None,
    grad_loss: Tensor | None,
) -> tuple[Tensor, ...]:
    """The losses and gradients of all chunks; results as of ``loss_fwd``.

    Args:
        stage: "loss" or "distill". others: the stage's tensors after the logits, for the rows of a chunk.
        options: the stage's; reduction is "none", or "sum" where ``factors`` are those of a mean.
        grad_loss: (N,) multiplies the rows of dz.
    """
    wide, N = reference.accumulation_dtype(head.dtype), len(head.input)
    fwd, grad_, scale_ = (
        ops.OPERATORS[name, backend] for name in (f"{stage}_fwd", f"{stage}_grad_", "loss_bwd_")
    )
    parts = head.input.new_zeros((3, N) if options[-1] == "none" else (3,), dtype=wide)
    grads = head.gradients(wanted, any(isinstance(rows, Tensor) for rows in chunks))
    ratio = None if factors is None else factors.ratio
    for rows in chunks:
        x, logits = head.logits(rows, most)
        if any(wanted):
            dz = logits if ratio is None else logits.float()
            *losses, scale = grad_(dz, *others(rows), *options)
            if ratio is not None:
                dz = logits.copy_(dz.div_(ratio))
            if grad_loss is not None:
                scale_(dz, grad_loss[rows], scale)
            head.accumulate(grads, wanted, rows, x, dz)
        else:
            losses = fwd(logits, *others(rows), *options, False)[:3]
        if options[-1] == "none":
            parts[:, rows] = torch.stack(tuple(losses))
        else:
            parts += torch.stack(tuple(losses))
    loss, ce, rest = (part.clone() for part in parts)
    grad_scale = parts.new_ones(())
    if factors is not None:
        ce_weight, rest_weight = options[0], options[1] if stage == "loss" else 1.0
        ce = ce * factors.ce if ce_weight != 0 else ce
        rest = rest * factors.rest if rest_weight != 0 else rest
        loss, grad_scale = ce_weight * ce + rest_weight * rest, factors.grad.clone()
    return loss, ce, rest, *grads, grad_scale


@contextlib.contextmanager
def _plain_products(device: torch.device) -> Iterator[None]:
    """Products in the dtype of their factors, not in autocast's, and without a graph."""
    known = "cpu" if device.type == "meta" else device.type  # there is no autocast for meta tensors
    with torch.no_grad(), torch.autocast(known, enabled=False):
        yield


def loss_fwd(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    votes: Tensor | None,
    log_mass: Tensor,
    weight: Tensor | None,
    ce_weight: float,
    zipf_weight: float,
    label_smoothing: float,
    only_correct: bool,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
    chunk_rows: int | None,
    backend: str,
    of_input: bool,
    of_weight: bool,
    of_bias: bool,
    grad_loss: Tensor | None,
) -> tuple[Tensor, ...]:
    """``reference.loss_fwd`` of F.linear(input, linear_weight, linear_bias), with the gradients of all three.

    Args:
        input: (N, D); linear_weight: (C, D); linear_bias: (C,) or None.
        dtype: of the products. chunk_rows: logits of so many rows exist at a time; None for the default.
        of_input, of_weight, of_bias: which gradients are computed.
        grad_loss: (N,) that the gradients of reduction "none" are multiplied by, or None.
        The others as for ``reference.loss_fwd``; log_mass is a table by rank.

    Returns:
        loss, ce, zipf: as ``reference.loss_fwd``.
        grad_input (N, D) in the input's dtype, grad_weight (C, D) and grad_bias (C,) in the accumulation
        dtype: not yet multiplied by grad_scale, a scalar. (0,) where not wanted.
    """
    with _plain_products(input.device):
        head, (N, C) = Head(input, linear_weight, linear_bias, dtype), (len(input), len(linear_weight))
        most = chunk_rows or default_rows(N, dtype, input.device, 1)
        chunks = chunks_of(N, counted_rows(target, votes, C, ignore_index), most)
        factors = None
        if reduction == "mean":
            counting = only_correct and zipf_weight != 0
            correct = count_correct(head, chunks, most, target, ignore_index) if counting else None
            factors = loss_factors(target, weight, C, dtype, zipf_weight, ignore_index, correct)
            reduction, weight = "sum", factors.weight
        options = (ce_weight, zipf_weight, label_smoothing, only_correct, ignore_index, reduction)

        def others(rows: Rows) -> tuple:
            return target[rows], None if votes is None else votes[rows], log_mass, weight

        wanted = (of_input, of_weight, of_bias)
        return _run("loss", head, chunks, most, others, options, backend, wanted, factors, grad_loss)


def distill_fwd(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    target: Tensor | None,
    sample_weight: Tensor | None,
    teacher_dtype: torch.dtype,
    ce_weight: float,
    kd_weight: float,
    tckd_weight: float,
    nckd_weight: float,
    soft_target_weight: float,
    max_weight: float,
    temperature: float,
    form: str,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
    chunk_rows: int | None,
    backend: str,
    of_input: bool,
    of_weight: bool,
    of_bias: bool,
    grad_loss: Tensor | None,
) -> tuple[Tensor, ...]:
    """``reference.distill_fwd`` of the logits of two heads, as ``loss_fwd``; no gradient to the teacher's.

    Args:
        teacher_input: (N, E); teacher_weight: (C, E); teacher_bias: (C,) or None; products in teacher_dtype.
        The others as for ``loss_fwd`` and ``reference.distill_fwd``.
    """
    with _plain_products(input.device):
        head, (N, C) = Head(input, linear_weight, linear_bias, dtype), (len(input), len(linear_weight))
        teacher = Head(teacher_input, teacher_weight, teacher_bias, teacher_dtype)
        most = chunk_rows or default_rows(N, dtype, input.device, 2)
        chunks = chunks_of(N, counted_rows(target, None, C, ignore_index), most)
        factors = None
        if reduction == "mean":
            samples = torch.full((), N, device=input.device)
            if target is not None:
                samples = (target != ignore_index).sum()
            mean = 1 / samples.to(reference.accumulation_dtype(dtype))
            factors, reduction = Factors(mean, mean, _usable(mean)), "sum"
        weights = (ce_weight, kd_weight, tckd_weight, nckd_weight, soft_target_weight, max_weight)
        options = (*weights, temperature, form, ignore_index, reduction)

        def others(rows: Rows) -> tuple:
            of_rows = (None if x is None else x[rows] for x in (target, sample_weight))
            return teacher.logits(rows, most)[1], *of_rows, None

        wanted = (of_input, of_weight, of_bias)
        return _run("distill", head, chunks, most, others, options, backend, wanted, factors, grad_loss)


# The gradient ----------------------------------------------------------------------------------------


class Call(NamedTuple):
    """An operator's call without its tensors."""

    op: Callable
    options: tuple  # up to reduction
    rest: tuple  # dtype, chunk_rows, backend


def _call(call: Call, tensors: Sequence[Tensor | None], wanted: Sequence[bool], grad_loss=None) -> tuple:
    return call.op(*tensors, *call.options, *call.rest, *wanted, grad_loss)


def linear_loss(call: Call, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(loss and its two parts), with gradients to the first three tensors: input, weight and bias.

    Raises:
        RuntimeError: forward-mode differentiation.
    """
    heads = [x for x in tensors[:3] if x is not None]
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors[:3]]
    compiling = torch.compiler.is_compiling()
    transformed = torch._C._are_functorch_transforms_active()
    dual = forward_ad._current_level >= 0 and not transformed
    if dual and any(forward_ad.unpack_dual(x).tangent is not None for x in heads):
        raise RuntimeError(autograd.NO_FORWARD_MODE)
    if not transformed and not any(wanted):
        return _call(call, tensors, wanted)[:3]
    function = LinearLossByRow if call.options[-1] == "none" else LinearLoss
    if transformed and not compiling:
        function = REFUSING_FORWARD_MODE[function]
    # A differentiable gradient is tied to this piece of the inputs (autograd.RefuseSecond).
    anchor = () if compiling else (sum(x.narrow(0, 0, 0).clone().sum() for x in heads if x.requires_grad),)
    return function.apply(call, wanted, anchor, *tensors)[:3]


class LinearLoss(torch.autograd.Function):
    """Forward computes losses and gradients; backward scales them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call, wanted, anchor, *tensors):
        return _call(call, tensors, wanted)

    @staticmethod
    def setup_context(ctx, inputs, output):
        call, wanted, anchor, *tensors = inputs
        _, *parts, x, w, b, grad_scale = output
        ctx.save_for_backward(x, w, b, grad_scale, *anchor)
        ctx.scale, ctx.scale_ = (ops.OPERATORS[name, call.rest[-1]] for name in ("loss_bwd", "loss_bwd_"))
        ctx.wanted, ctx.dtypes = wanted, [None if x is None else x.dtype for x in tensors[:3]]
        ctx.mark_non_differentiable(*parts, x, w, b, grad_scale)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if grad_loss is None:
            return tuple(grads)
        x, w, b, grad_scale, *anchor = ctx.saved_tensors
        overwrite = autograd.may_overwrite(grad_loss)
        for i, (grad, wanted, dtype) in enumerate(zip((x, w, b), ctx.wanted, ctx.dtypes, strict=True)):
            if not wanted:
                continue
            rows = grad if grad.dim() == 2 else grad[None]
            if overwrite:
                ctx.scale_(rows, grad_loss, grad_scale)  # at once if by one
            else:
                grad = ctx.scale(rows, grad_loss, grad_scale).view_as(grad)
            grads[3 + i] = _refusing(grad.to(dtype), grad_loss, anchor)
        return tuple(grads)


class LinearLossByRow(torch.autograd.Function):
    """Reduction "none", whose upstream gradient differs by row: backward computes the logits once more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call, wanted, anchor, *tensors):
        return _call(call, tensors, (False, False, False))[:3]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, ctx.wanted, anchor, *tensors = inputs
        ctx.save_for_backward(*anchor, *tensors)
        ctx.anchors = len(anchor)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if grad_loss is None:
            return tuple(grads)
        saved = ctx.saved_tensors
        anchor, tensors = saved[: ctx.anchors], saved[ctx.anchors :]
        found = _call(ctx.call, tensors, ctx.wanted, grad_loss)[3:6]
        for i, (grad, wanted) in enumerate(zip(found, ctx.wanted, strict=True)):
            if wanted:
                grads[3 + i] = _refusing(grad.to(tensors[i].dtype), grad_loss, anchor)
        return tuple(grads)


def _refusing(grad: Tensor, grad_loss: Tensor, anchor: Sequence[Tensor]) -> Tensor:
    """``grad``, which cannot be differentiated again where that could be asked for."""
    if not anchor or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grad
    return autograd.refusing_second(grad, grad_loss, anchor[0])


def _refuse_forward_mode(function: type) -> type:
    """The Function with a clear error for forward mode; torch.compile traces no class that has a jvp."""

    def jvp(ctx, *tangents):
        raise RuntimeError(autograd.NO_FORWARD_MODE)

    return type(f"{function.__name__}RefusingForwardMode", (function,), {"jvp": staticmethod(jvp)})


REFUSING_FORWARD_MODE = {f: _refuse_forward_mode(f) for f in (LinearLoss, LinearLossByRow)}
