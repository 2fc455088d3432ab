"""The laws that turn a rank into the mass of a soft label (paper: Eq. 4 and Table 6).

A law is one small class. A deterministic one says how much mass each rank gets, in log space, and that is
all any backend ever needs: kernels gather from a table of log masses and none of them knows the law behind
it. A random one draws a mass per sample and class instead.

To add a law, subclass :class:`Distribution` as a frozen dataclass and write ``log_mass``::

    @dataclass(frozen=True)
    class Geometric(zls.Distribution):
        ratio: float

        def log_mass(self, rank, num_classes):
            return (rank - 1) * math.log(self.ratio)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import scalars


def _check(law: Distribution, name: str, *, above: float | None = None) -> None:
    """The parameter ``name`` of a law becomes a Python number, finite and >= 0 or > ``above``."""
    given = getattr(law, name)
    value = scalars.number(name, given)
    if value is not given:
        object.__setattr__(law, name, value)  # frozen
    low_enough = value >= 0 if above is None else value > above
    if not (low_enough and value < math.inf):  # comparisons trace under torch.compile, isfinite does not
        raise ValueError(
            f"{name} must be finite and {'>= 0' if above is None else f'> {above:g}'}, got {value!r}"
        )


@dataclass(frozen=True)
class Distribution:
    """A law whose mass is a function of the rank; subclasses are immutable and hashable."""

    def log_mass(self, rank: Tensor, num_classes: int) -> Tensor:
        """Natural logarithm of the unnormalised mass at each rank.

        Args:
            rank: float64, any shape, ranks from 1. Ranks up to ``num_classes + 1`` may be asked for; the
                last never carries weight.
            num_classes: C, for laws whose shape depends on it.

        Returns:
            float64, the shape of ``rank``; -inf where the mass is zero. Never NaN or +inf.
        """
        raise NotImplementedError(f"{type(self).__name__} must define log_mass(rank, num_classes)")


@dataclass(frozen=True)
class RandomDistribution(Distribution):
    """A law that draws the mass of every class afresh for every sample, ranks unseen (Table 6)."""

    def draw(self, num_samples: int, num_classes: int, device: torch.device) -> Tensor:
        """Log masses (N, C) float32, drawn from torch's generator of ``device``; -inf where zero."""
        raise NotImplementedError(f"{type(self).__name__} must define draw(...)")


@dataclass(frozen=True)
class Zipf(Distribution):
    """mass(r) = r^-alpha, the law of the paper (Eq. 4).

    Args:
        alpha: the decay, finite and >= 0; 1.0 in the paper, 0 makes it :class:`Constant`.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "alpha")

    def log_mass(self, rank: Tensor, num_classes: int) -> Tensor:
        return -self.alpha * rank.log()


@dataclass(frozen=True)
class Constant(Distribution):
    """mass(r) = 1: every non-target class alike, as in label smoothing (Table 6)."""

    def log_mass(self, rank: Tensor, num_classes: int) -> Tensor:
        return torch.zeros_like(rank)


@dataclass(frozen=True)
class LinearDecay(Distribution):
    """mass(r) = (C - r) g + s with g = 2 (1 - C s) / ((C - 1) C): a straight line down to s (Table 6).

    Args:
        smallest_prob: s, the mass of rank C, 0 <= s <= 1/C (the upper end is checked when C is known).
    """

    smallest_prob: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "smallest_prob")

    def log_mass(self, rank: Tensor, num_classes: int) -> Tensor:
        s = self.smallest_prob
        if s * num_classes > 1:
            raise ValueError(
                f"distribution: LinearDecay's smallest_prob must be at most 1/C = {1 / num_classes:.6g} "
                f"for C = {num_classes} classes, got {s!r}"
            )
        g = 2 * (1 - num_classes * s) / ((num_classes - 1) * num_classes)
        return ((num_classes - rank) * g + s).clamp(min=0).log()  # rank C + 1 would be negative


@dataclass(frozen=True)
class ExponentialDecay(Distribution):
    """mass(r) = exp(-rate (r - 1)) (the authors' code).

    Args:
        rate: the decay per rank, finite and >= 0.
    """

    rate: float

    def __post_init__(self) -> None:
        _check(self, "rate")

    def log_mass(self, rank: Tensor, num_classes: int) -> Tensor:
        return -self.rate * (rank - 1)


@dataclass(frozen=True)
class RandomUniform(RandomDistribution):
    """mass ~ U[0, 1), drawn for every sample and class (Table 6)."""

    def draw(self, num_samples: int, num_classes: int, device: torch.device) -> Tensor:
        return torch.rand(num_samples, num_classes, dtype=torch.float32, device=device).log_()


@dataclass(frozen=True)
class RandomPareto(RandomDistribution):
    """mass ~ Pareto in Lomax form, (1 - u)^(-1/a) - 1 with u ~ U[0, 1), as numpy.random.pareto (Table 6).

    Args:
        a: the shape, finite and > 0; 1 in the paper.
    """

    a: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "a", above=0)

    def draw(self, num_samples: int, num_classes: int, device: torch.device) -> Tensor:
        u = torch.rand(num_samples, num_classes, dtype=torch.float32, device=device)
        t = u.neg_().log1p_().div_(-self.a)  # t = -log(1 - u) / a >= 0
        # log(e^t - 1) = t + log(1 - e^-t), which neither overflows for large t nor cancels for small.
        return t + t.neg().expm1().neg_().log_()
