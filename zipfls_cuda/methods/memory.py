"""Contrastive temporal coding: a stored vector for every training sample, and losses against the store."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from .pairs import by_class

EPSILON = 1e-7  # of the authors' noise-contrastive estimate


class InstanceMemory(nn.Module):
    """The stores of contrastive temporal coding, and the losses of its two stages.

    Stage 1 adds a * ``instance_loss`` to the cross-entropy: cross-entropy over all M samples of e m / tau,
    whose class is the sample's own index. Stage 2, against a copy of the network frozen after stage 1, adds
    b * ``contrast_loss``: NCE(e, m') + NCE(e', m), e' an embedding of the copy's features and m, m' the two
    stores. An embedding is F.normalize(linear(features)). In training mode a loss moves the vectors of its
    batch afterwards, m_i <- normalise(momentum m_i + (1 - momentum) e); of an index that stands twice in a
    batch the last counts. With x = exp(e m / tau) / Z, Z = M mean(exp) of the first batch of all,
    NCE = -log(x_0 / (x_0 + r)) - sum_k log((K / M) / (x_k + r)) over K samples of other classes, r = K / M +
    1e-7. The authors: tau = 0.1 and a = 0.5 for transfer, 0.5 or 0.4 and 0.1 for accuracy; K = 16384, b = 1,
    momentum 0.9.

    The state_dict holds stores and Z, so training resumes exactly. Works under DDP: the ranks gather the
    embeddings of the batch, of one size on each, and move all stores alike. Kept: 2 M dim numbers (51 MB for
    CIFAR and dim = 128). Cost a step: products (N, dim) with (dim, M), one in stage 1 and two in stage 2; in
    stage 2 the copy's forward. The authors gather (N, K + 1, dim) instead, 1.1 GB. Negatives are drawn with
    replacement, on the store's device, by torch's generator.

    Args:
        num_samples: M of the training set.
        dim: of an embedding.
        temperature: tau > 0.
        momentum: share of the old vector, in [0, 1].
        targets: (M,) class of every sample, from which ``contrast_loss`` draws negatives of other classes;
            None: negatives are any other samples.
        negatives: K >= 1.

    Raises:
        TypeError, ValueError: a bad argument, by name; an embedding of another shape, or on another device
            than the store.
        IndexError: an index outside [0, M) in CPU tensors (on other devices the loss is NaN, and so is that
            sample's gradient; its vector stays).
        RuntimeError: a second derivative.

    Example:
        >>> memory = zls.methods.InstanceMemory(50000, 128, temperature=0.1, momentum=0.9, negatives=16)
        >>> e = torch.nn.functional.normalize(torch.randn(8, 128, requires_grad=True))
        >>> memory.instance_loss(e, torch.arange(8)).backward()  # beside the cross-entropy of stage 1
        >>> memory.contrast_loss(e.detach(), e.detach(), torch.arange(8)).shape  # of stage 2
        torch.Size([])

    Source: Cui et al., ECCV 2022; the authors' code.
    """

    memory: Tensor  # (M, dim), of the network in training
    frozen_memory: Tensor  # (M, dim), of the copy
    normalizer: Tensor  # (2,), Z of the two terms; -1 before the first batch

    def __init__(
        self,
        num_samples: int,
        dim: int,
        *,
        temperature: float,
        momentum: float,
        targets: Tensor | Sequence[int] | None = None,
        negatives: int = 16384,
    ) -> None:
        super().__init__()
        M, dim = checks.count("num_samples", num_samples, 2), checks.count("dim", dim, 1)
        self.temperature = checks.temperature(temperature)
        self.momentum = checks.number("momentum", momentum, 0.0, 1.0)
        self.negatives = checks.count("negatives", negatives, 1)
        for name in ("memory", "frozen_memory"):
            self.register_buffer(name, torch.empty(M, dim).uniform_(-1, 1) * math.sqrt(3 / dim))
        self.register_buffer("normalizer", torch.full((2,), -1.0))
        self.has_normalizer = False
        self.register_load_state_dict_post_hook(_look_at_the_normalizer)
        order = by_class(torch.arange(M) if targets is None else targets)
        for name, x in zip(("_by_class", "_first", "_size"), order, strict=True):
            self.register_buffer(name, x, persistent=False)  # (M,)
        got, classes = len(self._size), len(self._first.unique())
        if got != M or classes < 2:
            raise ValueError(
                f"targets must have shape ({M},) and >= 2 classes, got {got} of {classes} classes"
            )

    def instance_loss(self, e: Tensor, index: Tensor) -> Tensor:
        """Stage 1: mean loss of embeddings e (N, dim) of the samples ``index`` (N,) int64."""
        x, index, valid = self._batch("e", e, index)
        value = _with_gradient(
            lambda x: F.cross_entropy(F.linear(x, self.memory) / self.temperature, index), x
        )
        self._move(self.memory, x, index, valid)
        return value

    def contrast_loss(
        self, e: Tensor, e_frozen: Tensor, index: Tensor, *, sampled: Tensor | None = None
    ) -> Tensor:
        """Stage 2: mean of both terms, of embeddings (N, dim) of the network's and the copy's features.

        ``index`` (N,) int64 are the samples; ``sampled`` (N, K + 1) int64, index first, takes the place of
        negatives drawn here.
        """
        checks.alike("e_frozen", e_frozen, "e", e)
        y, *_ = self._batch("e_frozen", e_frozen, index)
        x, index, valid = self._batch("e", e, index)
        sampled, M = self.draw(index) if sampled is None else sampled, len(self.memory)
        checks.sample_index(sampled, M, "sampled", "(N, K + 1)")
        if len(sampled) != len(index) or sampled.shape[1] < 2 or sampled.device != index.device:
            raise ValueError(
                f"sampled must have shape ({len(index)}, K + 1) and be on {index.device}, got "
                f"{tuple(sampled.shape)} on {sampled.device}"
            )
        sampled = sampled.clamp(0, M - 1)  # elsewhere than on the CPU values are not looked at

        def exponentials(x: Tensor, store: Tensor) -> Tensor:
            return (F.linear(x, store).gather(1, sampled) / self.temperature).exp()  # (N, K + 1)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            found, scale = (
                (exponentials(x, self.frozen_memory), exponentials(y, self.memory)),
                self.normalizer,
            )
            if not self.has_normalizer:
                scale = M * _everyones(torch.stack([x.detach().nanmean() for x in found])[None]).mean(0)
                if self.training:
                    self.normalizer.copy_(scale)
                    self.has_normalizer = True
            return sum(_nce(x / Z, M) for x, Z in zip(found, scale, strict=True))

        value = _with_gradient(loss, x, y)
        self._move(self.memory, x, index, valid)
        self._move(self.frozen_memory, y, index, valid)
        return value

    def draw(self, index: Tensor) -> Tensor:
        """``index`` (N,) and K samples of other classes each: (N, K + 1)."""
        first, others = self._first[index, None], len(self.memory) - self._size[index, None]  # (N, 1)
        share = torch.rand(len(index), self.negatives, dtype=torch.float64, device=index.device)
        at = torch.minimum((share * others).long(), others - 1)  # among the others, class after class
        at = torch.where(at < first, at, at + len(self.memory) - others)
        return torch.cat([index[:, None], self._by_class[at]], 1)

    def _batch(self, name: str, e: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings in the store's type, NaN where the index is outside; index within; where it was."""
        M, dim = self.memory.shape
        checks.sample_index(index, M)
        checks.features(name, e, "index", index)
        if e.shape[1] != dim:
            raise ValueError(f"{name} must have shape (N, {dim}), got {tuple(e.shape)}")
        if e.device != self.memory.device:
            raise ValueError(
                f"{name} must be on the device of the store, {self.memory.device}, got {e.device}; "
                "memory.to(device) moves the store"
            )
        valid = (index >= 0) & (index < M)
        x = e.to(self.memory.dtype) * torch.where(valid, 1.0, math.nan)[:, None]  # the gradient too is NaN
        return x, index.clamp(0, M - 1), valid

    @torch.no_grad()
    def _move(self, store: Tensor, e: Tensor, index: Tensor, valid: Tensor) -> None:
        """Move the vectors of a batch, of all ranks' batches."""
        if self.training:
            e, index, valid = _everyones(e.detach()), _everyones(index), _everyones(valid)
            old = store[index]
            new = F.normalize(self.momentum * old + (1 - self.momentum) * e)
            new = torch.where(valid[:, None], new, old)
            last = ((index[:, None] == index) * torch.arange(len(index), device=index.device)).amax(1)
            store[index] = new[last]  # equal rows at an index that stands twice

    def extra_repr(self) -> str:
        """The settings shown by repr."""
        M, dim = self.memory.shape
        settings = ("temperature", "momentum", "negatives")
        return f"{M}, {dim}, " + ", ".join(f"{name}={getattr(self, name)}" for name in settings)


def _look_at_the_normalizer(module: InstanceMemory, _: object) -> None:
    """After load_state_dict."""
    module.has_normalizer = bool(module.normalizer[0] >= 0)


def _nce(x: Tensor, M: int) -> Tensor:
    """Mean over the samples of x (N, K + 1), the sample itself first."""
    noise = (x.shape[1] - 1) / M
    first, others = x[:, 0], x[:, 1:]
    each = (first / (first + noise + EPSILON)).log() + (noise / (others + noise + EPSILON)).log().sum(1)
    return -each.mean()


def _everyones(x: Tensor) -> Tensor:
    """Rows of all ranks, one after another."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _with_gradient(loss: Callable, *inputs: Tensor) -> Tensor:
    """``loss(*inputs)`` with its gradients computed at once: the store it reads changes before backward."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
            return loss(*inputs)
        given = [x.detach().requires_grad_() for x in inputs]
        value = loss(*given)
        return Given.apply(value.detach(), torch.autograd.grad(value, given), *inputs)


class Given(torch.autograd.Function):
    """A loss with the gradients that were computed along with it."""

    @staticmethod
    def forward(ctx, value, grads, *inputs):
        ctx.save_for_backward(*grads)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("the losses of InstanceMemory cannot be differentiated a second time")
        return None, None, *(grad * x for x in ctx.saved_tensors)
