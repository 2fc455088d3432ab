"""The method a second time, for ``python -m zipfls_cuda check``: inputs, float64 results, and error bounds.

It shares no code with the rest of the package, so that the reference is checked as the other backends are:
float64 on the CPU, ranks by counting distinct values, the gradient by autograd; a class index is taken as the
probabilities that are 1 there and 0 elsewhere.

The bound of a result is that of two roundings in the type it is stored in, and of ``roundings_of`` the
backend in the type that the arithmetic runs in, of the terms that the result is made of.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from types import EllipsisType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDINGS = 64
VOTE_EPS = 2.0**-21  # of a score: tensor cores align the addends of a sum at the largest one's last digit
IGNORE = -100
Rows = list[int] | EllipsisType


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which a backend adds up tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Losses and labels --------------------------------------------------------------------------------------


class LossCase(NamedTuple):
    """Shape and options of a loss; ``ranking``: "votes", "logits", or "masses" (N, C)."""

    N: int
    C: int
    P: int = 49
    reduction: str = "mean"  # or sum, none; "" for a label
    soft: bool = False
    ranking: str = "votes"
    options: bool = False  # label smoothing, class weights, ignored samples, only_correct
    zipf_weight: float = 0.5

    def __str__(self) -> str:
        ranked = f"P = {self.P}" if self.ranking == "votes" else f"by {self.ranking}"
        kind = "soft" * self.soft
        words = (f"{self.N} x {self.C}", kind, ranked, self.reduction, "options" * self.options)
        return ", ".join(filter(None, words))


class Problem(NamedTuple):
    """The tensors of a case, on the CPU, the logits rounded to the row's dtype."""

    logits: Tensor  # (N, C)
    target: Tensor  # (N,) int64, or (N, C)
    votes: Tensor | None  # (N, P) int32
    log_mass: Tensor  # (R,) or (N, C)
    weight: Tensor | None  # (C,)

    def to(self, device: torch.device) -> Problem:
        return Problem(*(x if x is None else x.to(device) for x in self))


class Expected(NamedTuple):
    """float64 results; ``size`` is the sum of the absolute terms that a gradient is made of."""

    loss: Tensor
    ce: Tensor
    zipf: Tensor
    grad: Tensor
    size: Tensor
    label: Tensor
    ranks: Tensor


@functools.lru_cache(maxsize=16)
def problem(case: LossCase, dtype: torch.dtype) -> Problem:
    """Random inputs, the same on every call."""
    N, C, P = case.N, case.C, case.P
    g, wide = torch.Generator().manual_seed(N + C + P), arithmetic_dtype(dtype)
    logits = torch.randn(N, C, generator=g, dtype=torch.float64) * 2
    target = torch.randint(C, (N,), generator=g)
    logits[N // 2] += 100  # exp of which is infinite in float32
    if case.options:
        logits[torch.arange(0, N, 2), target[::2]] += 8  # classified correctly
        logits[[2, 4], (target[[2, 4]] + torch.tensor([1, -1])) % C] = logits[[2, 4], target[[2, 4]]]  # a tie
    votes = (torch.rand(N, P, generator=g).pow(3) * C).int().clamp(max=C - 1)
    votes[torch.rand(N, P, generator=g) < 0.1] = -1
    ranks = C if case.ranking == "logits" else min(P, C) + 1
    log_mass = -torch.arange(1.0, ranks + 1, dtype=torch.float64).log()
    if case.ranking == "masses":
        log_mass = torch.randint(10, (N, C), generator=g).double().log()  # some have none
    weight = torch.rand(C, generator=g).to(wide) if case.options else None
    if case.soft:  # a mixture of two smoothed classes
        other, share = torch.randint(C, (N,), generator=g), torch.rand(N, 1, generator=g) * 0.4 + 0.55
        target = (share * F.one_hot(target, C) + (1 - share) * F.one_hot(other, C) + 0.1 / C).to(wide)
        if case.options:
            target[1] = torch.rand(C, generator=g).softmax(0)  # the least probability is of one class
    elif case.options:
        target[1::5] = IGNORE
    ranking = votes if case.ranking == "votes" else None
    return Problem(logits.to(dtype), target, ranking, log_mass.to(wide), weight)


def expected_ranks(values: Tensor) -> Tensor:
    """(N, C) competition ranks: 1 + how many of the row are larger."""
    ranks = torch.empty(values.shape, dtype=torch.int64)
    for i, row in enumerate(values):
        _, place, number = row.unique(return_inverse=True, return_counts=True)
        ranks[i] = (1 + len(row) - number.cumsum(0))[place]
    return ranks


@functools.lru_cache(maxsize=16)
def expected_loss(case: LossCase, dtype: torch.dtype) -> Expected:
    """Loss, its parts and its gradient."""
    p = problem(case, dtype)
    N, C = case.N, case.C
    z = p.logits.double().requires_grad_()
    kept = torch.ones(N, dtype=torch.bool) if case.soft else p.target != IGNORE
    t = p.target.double() if case.soft else F.one_hot(p.target.clamp(min=0), C).double()
    w = torch.ones(C, dtype=torch.float64) if p.weight is None else p.weight.double()
    e = 0.1 if case.options else 0.0

    ranks = torch.zeros(N, C, dtype=torch.int64)
    if case.ranking == "logits":
        ranks = expected_ranks(p.logits)
    elif p.votes is not None:
        ranks = expected_ranks(torch.stack([row[row >= 0].bincount(minlength=C) for row in p.votes]))
    mass = (p.log_mass if case.ranking == "masses" else p.log_mass[(ranks - 1).clamp(min=0)]).double().exp()
    least = t == t.amin(1, keepdim=True)
    label = mass * least / (mass * least).sum(1, keepdim=True)

    mixed = w * ((1 - e) * t + e / C)
    log_p = z - z.logsumexp(1, keepdim=True)
    ce = -(mixed * log_p).sum(1)
    log_q = z - z.masked_fill(~least, -torch.inf).logsumexp(1, keepdim=True)
    zipf = (torch.special.xlogy(label, label) - label * log_q).sum(1)
    counts = kept & (z.argmax(1) == t.argmax(1)) if case.options else kept
    zipf_counts = counts & (least.sum(1) >= 2)
    ce, zipf = ce.where(kept, 0), zipf.where(zipf_counts, 0)

    ce_scale = zipf_scale = torch.ones((), dtype=torch.float64)
    if case.reduction == "mean":
        ce_scale = 1 / (torch.full((), N).double() if case.soft else (t @ w)[kept].sum())
        zipf_scale = 1 / counts.double().sum()
    if case.reduction != "none":
        ce, zipf = ce.sum() * ce_scale, zipf.sum() * zipf_scale
    loss = ce + case.zipf_weight * zipf
    (grad,) = torch.autograd.grad(loss.sum(), z)
    size = kept[:, None] * ce_scale * (log_p.exp() * mixed.sum(1, keepdim=True) + mixed)
    share = (log_q.exp() * least + label) * zipf_counts[:, None]
    size = (size + case.zipf_weight * zipf_scale * share).detach()
    return Expected(loss.detach(), ce.detach(), zipf.detach(), grad, size, label, ranks)


class DistillCase(NamedTuple):
    """Shape and options of a distillation loss; all of its terms have a weight."""

    N: int
    C: int
    reduction: str = "mean"  # or sum, none
    temperature: float = 4.0
    form: str = "divergence"
    options: bool = False  # ignored samples, weights of samples
    weights: tuple[float, float, float, float, float] = (0.7, 0.3, 0.5, 1.5, 0.4)

    def __str__(self) -> str:
        words = (f"{self.N} x {self.C}", f"T = {self.temperature:g}", self.form, self.reduction)
        return ", ".join(filter(None, (*words, "options" * self.options)))


class Taught(NamedTuple):
    """The tensors of a case, on the CPU, the logits of both networks rounded to the row's dtype."""

    logits: Tensor  # (N, C)
    teacher: Tensor  # (N, C)
    target: Tensor  # (N,) int64
    sample_weight: Tensor | None  # (N,)
    teacher_index: Tensor | None  # (N,) int64

    def to(self, device: torch.device) -> Taught:
        return Taught(*(x if x is None else x.to(device) for x in self))


@functools.lru_cache(maxsize=16)
def distillation(case: DistillCase, dtype: torch.dtype) -> tuple[Taught, Expected]:
    """Random inputs, and the loss by the softmax of all classes and of those that are not the target.

    The Expected has the distillation in the place of zipf, and neither label nor ranks.
    """
    (N, C), T = case[:2], case.temperature
    g, wide = torch.Generator().manual_seed(N + C), arithmetic_dtype(dtype)
    logits, teacher = ((torch.randn(N, C, generator=g) * 2).to(dtype) for _ in range(2))
    target = torch.randint(C, (N,), generator=g)
    onehot = F.one_hot(target, C).bool()
    kept, weight = torch.ones(N, dtype=torch.bool), torch.ones(N, dtype=wide)
    if case.options:
        weight, kept[1::5] = torch.rand(N, generator=g).to(wide), False
        target[~kept] = IGNORE
    z, t = logits.double().requires_grad_(), teacher.double()

    def distance(q: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
        terms = q * (log_q - log_p) if case.form == "divergence" else -q * log_p
        return terms.where(q > 0, 0).sum(1)

    def log_softmax(x: Tensor, among: Tensor) -> Tensor:
        return (x / T - (x / T).where(among, -torch.inf).logsumexp(1, keepdim=True)).where(among, 0)

    log_p, log_q = (log_softmax(x, torch.ones_like(onehot)) for x in (z, t))
    log_p_others, log_q_others = (log_softmax(x, ~onehot) for x in (z, t))
    q, q_others = log_q.exp(), log_q_others.exp() * ~onehot
    log_pair_p, log_pair_q = (
        torch.stack([x[onehot], x.where(~onehot, -torch.inf).logsumexp(1)], 1) for x in (log_p, log_q)
    )
    ce = (z.logsumexp(1) - z[onehot]).where(kept, 0)
    a, kd, tckd, nckd, soft = case.weights
    terms = kd * distance(q, log_q, log_p) + tckd * distance(log_pair_q.exp(), log_pair_q, log_pair_p)
    terms = terms + nckd * distance(q_others, log_q_others, log_p_others)
    share = t.softmax(1)[onehot]
    rest = (T * T * weight.double() * terms + soft * share * ce).where(kept, 0)
    scale = 1 / kept.double().sum() if case.reduction == "mean" else 1.0
    if case.reduction != "none":
        ce, rest = ce.sum() * scale, rest.sum() * scale
    loss = a * ce + rest
    (grad,) = torch.autograd.grad(loss.sum(), z)
    size = (a + soft) * (z.softmax(1) + onehot)
    size = size + T * (kd + tckd + nckd) * (log_p.exp() + q + log_p_others.exp() + q_others)
    x = Expected(*(y.detach() for y in (loss, ce, rest, grad, size * scale)), q, q)
    if not case.options:
        return Taught(logits, teacher, target, None, None), x
    return Taught(logits, teacher.flip(0), target, weight, torch.arange(N).flip(0)), x


# Comparing ----------------------------------------------------------------------------------------------


class Deviation(NamedTuple):
    """The error of a result, where it is largest relative to its bound, and that bound."""

    worst: str  # which result
    error: float
    bound: float

    def ratio(self) -> float:
        return self.error / self.bound if self.bound else self.error


def deviation(what: str, got: Tensor, exact: Tensor, bound: Tensor | float) -> Deviation:
    """Of two tensors of one shape, ``got`` on any device; NaN where a number belongs is an infinite error."""
    if got.shape != exact.shape:
        raise AssertionError(f"{what} has shape {tuple(got.shape)}, expected {tuple(exact.shape)}")
    if not got.numel():
        return Deviation(what, 0.0, 0.0)
    error = (got.detach().cpu().double() - exact.double()).abs().nan_to_num(nan=torch.inf).flatten()
    limit = torch.as_tensor(bound, dtype=torch.float64).broadcast_to(exact.shape).flatten()
    worst = int(torch.where(error > 0, error / limit, 0.0).argmax())
    return Deviation(what, error[worst].item(), limit[worst].item())


def check_dtype(what: str, got: Tensor, expected: torch.dtype) -> None:
    """AssertionError if a result has another dtype."""
    if got.dtype != expected:
        raise AssertionError(f"{what} is {got.dtype}, expected {expected}")


def roundings_of(backend: str, num_classes: int) -> int:
    """Roundings of the arithmetic that a backend's results may be off by.

    The kernels add in trees or in many lanes. "reference" adds as torch's softmax does: an eighth of the
    classes one after another, where the processor has 8 lanes.
    """
    return ROUNDINGS + (num_classes // 8 if backend == "reference" else 0)


def rounding(exact: Tensor, size: Tensor, dtype: torch.dtype, roundings: int = ROUNDINGS) -> Tensor:
    """Bound of a result stored in ``dtype`` and made of terms of ``size``."""
    stored = torch.finfo(dtype)
    arithmetic = roundings * torch.finfo(arithmetic_dtype(dtype)).eps * size
    return arithmetic + stored.eps * (1 + stored.eps) * (exact.abs() + stored.smallest_normal)


def loss_deviations(
    x: Expected,
    dtype: torch.dtype,
    parts: Sequence[Tensor],
    grads: Sequence[Tensor],
    scale: Tensor | float = 1.0,
    upstream: float = 1.0,
    rows: Rows = ...,
    roundings: int = ROUNDINGS,
) -> Iterator[Deviation]:
    """Of loss, ce and zipf, if given, and of gradients that ``scale`` still multiplies; of some rows."""
    wide = arithmetic_dtype(dtype)
    for what, got, exact in zip(("loss", "ce", "zipf")[: len(parts)], parts, x[:3]):
        check_dtype(what, got, wide)
        yield deviation(what, got[rows], exact[rows], rounding(exact, 1 + exact.abs(), wide, roundings)[rows])
    for grad in grads:
        check_dtype("gradient", grad, dtype)
        exact = x.grad * upstream
        bound = rounding(exact, x.size * upstream, dtype, roundings)
        yield deviation("gradient", (grad.double() * scale)[rows], exact[rows], bound[rows])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN with NaN."""
    a, b = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


# Votes --------------------------------------------------------------------------------------------------


class VoteCase(NamedTuple):
    """Shape of a product; ``integers``: scores are exact, with ties and a class whose scores are NaN."""

    N: int
    D: int
    H: int
    W: int
    C: int
    layout: str = "NCHW"  # or NHWC, tokens
    upsample: int = 1
    integers: bool = False
    tf32: bool = False

    def __str__(self) -> str:
        words = [f"{self.N} x {self.D} x {self.H} x {self.W} {self.layout}"]
        words += ["upsampled"] * (self.upsample == 2) + ["ties, NaN"] * self.integers + ["TF32"] * self.tf32
        return f"{', '.join(words)}, C = {self.C}"


@functools.lru_cache(maxsize=4)
def expected_scores(case: VoteCase, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, float]:
    """[features, weight, bias]; scores (N, P, C) float64; how far a computed score may be off."""
    N, D, H, W, C = case[:5]
    g = torch.Generator().manual_seed(D + C)
    features, weight = torch.randn(N, D, H, W, generator=g), torch.randn(C, D, generator=g)
    bias = torch.randn(C, generator=g) * D**0.5
    if case.integers:
        features, weight, bias = (x.round().clamp(-3, 3) for x in (features, weight, bias))
        bias[C // 2] = torch.nan
    # Rounded to float16 first: TF32 holds such numbers.
    features, weight, bias = inputs = [x.half().to(dtype) for x in (features, weight, bias)]
    wide = features.double()
    if case.upsample == 2:
        wide = F.interpolate(wide, scale_factor=2, mode="bilinear", align_corners=False)
    scores = wide.flatten(2).transpose(1, 2) @ weight.double().T + bias.double()
    if case.layout == "NHWC":
        inputs[0] = features.to(memory_format=torch.channels_last)
    if case.layout == "tokens":
        inputs[0] = features.flatten(2).transpose(1, 2).contiguous()
    top = [x.double().nan_to_num(nan=0).abs().max().item() for x in inputs]
    eps = torch.finfo(dtype).eps if dtype == torch.float64 else VOTE_EPS
    margin = 0.0 if case.integers else 4 * eps * (top[0] * top[1] * D**0.5 + top[2])
    return inputs, scores.nan_to_num(nan=-torch.inf), margin
