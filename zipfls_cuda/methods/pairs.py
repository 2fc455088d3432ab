"""Batches of pairs of one class, for CS-KD."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from .. import checks


def by_class(targets: Tensor | Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Samples (M,), class after class; where there each sample's class starts (M,), and its size (M,)."""
    targets = torch.as_tensor(targets).cpu()
    if targets.dim() != 1 or not len(targets):
        raise ValueError(f"targets must have shape (M,) with M >= 1, got {tuple(targets.shape)}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integers, got {targets.dtype}")
    _, class_, size = targets.unique(return_inverse=True, return_counts=True)
    return class_.argsort(stable=True), (size.cumsum(0) - size)[class_], size[class_]


class PairSampler(Sampler[list[int]]):
    """Batches of indices whose second half are partners of the first: another sample of the same class each.

    For ``DataLoader(batch_sampler=...)``. An epoch visits every sample once in a first half, in random order.
    A partner is drawn from the whole class, the sample itself included, as in the authors' code. Over several
    ranks each has its own part of every epoch, and the first samples come again where the parts would differ
    in size, as with DistributedSampler.

    Args:
        targets: (M,) class of every sample: a tensor of integers, or a sequence of ints.
        batch_size: samples in a first half; a batch has twice as many. The last may be smaller.
        generator: draws orders and partners; over several ranks it must have the same seed on each. None is
            torch's default generator; over several ranks a seed that ``set_epoch`` gives, the same on each.
        num_replicas, rank: None is the default process group's, or one if there is none.

    Raises:
        TypeError, ValueError: a bad argument, by name.

    Example:
        >>> sampler = zls.methods.PairSampler([0, 1, 0, 1, 0, 1], batch_size=2)
        >>> len(sampler)
        3
        >>> all((a - c) % 2 == (b - d) % 2 == 0 for a, b, c, d in sampler)  # pairs (a, c) and (b, d)
        True

    Source: Yun et al., CVPR 2020; the authors' code.
    """

    def __init__(
        self,
        targets: Tensor | Sequence[int],
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        there = dist.is_available() and dist.is_initialized()
        replicas = (dist.get_world_size() if there else 1) if num_replicas is None else num_replicas
        self.num_replicas = checks.count("num_replicas", replicas, 1)
        self.rank = checks.count("rank", (dist.get_rank() if there else 0) if rank is None else rank, 0)
        if self.rank >= self.num_replicas:
            raise ValueError(f"rank must be below num_replicas={self.num_replicas}, got {self.rank}")
        self.batch_size = checks.count("batch_size", batch_size, 1)
        self.generator, self.epoch = generator, 0
        self._by_class, self._first, self._size = by_class(targets)

    def set_epoch(self, epoch: int) -> None:
        """The seed of the next pass over several ranks, where no generator was given."""
        self.epoch = checks.count("epoch", epoch, 0)

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        return -(-self._own() // self.batch_size)

    def _own(self) -> int:
        return -(-len(self._size) // self.num_replicas)

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of an epoch: first halves, then partners."""
        generator = self.generator
        if generator is None and self.num_replicas > 1:
            generator = torch.Generator().manual_seed(self.epoch)
        M = len(self._size)
        order = torch.randperm(M, generator=generator)
        share = torch.rand(M, generator=generator, dtype=torch.float64)
        partner = self._by_class[self._first + (share * self._size).long().clamp(max=self._size - 1)]
        own = order.repeat(-(-self._own() * self.num_replicas // M))
        for batch in own[self.rank :: self.num_replicas][: self._own()].split(self.batch_size):
            yield batch.tolist() + partner[batch].tolist()
