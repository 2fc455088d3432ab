"""What a soft label is: laws that turn a rank into a mass (paper: Eq. 4 and Table 6), and their tables.

A law is one small class. A deterministic law gives the log mass of each rank, and ``log_mass`` tabulates it:
every kernel gathers from such a table (R,), or reads log masses (N, C) by sample and class, and knows no
law. A random law draws the masses (N, C) instead.

To add a law, subclass ``Distribution`` as a frozen dataclass and write ``log_mass``::

    @dataclass(frozen=True)
    class Geometric(zls.Distribution):
        ratio: float

        def log_mass(self, rank, num_classes):
            return (rank - 1) * math.log(self.ratio)
"""

from __future__ import annotations

import functools
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
    """A law whose mass is a function of the rank; subclasses are immutable and hashable.

    Example:
        >>> import dataclasses
        >>> @dataclasses.dataclass(frozen=True)
        ... class SquareRoot(zls.Distribution):
        ...     def log_mass(self, rank, num_classes):
        ...         return -0.5 * rank.log()
        >>> zls.zipf_label(torch.tensor([1]), torch.tensor([[0]]), 3, distribution=SquareRoot())
        tensor([[0.5858, 0.0000, 0.4142]])
    """

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
    """A law that draws the mass of every class afresh for every sample, ranks unseen (Table 6).

    Example:
        >>> import dataclasses
        >>> @dataclasses.dataclass(frozen=True)
        ... class LogNormal(zls.RandomDistribution):
        ...     def draw(self, num_samples, num_classes, device):
        ...         return torch.randn(num_samples, num_classes, device=device)
        >>> zls.zipf_label(torch.tensor([1]), torch.tensor([[0]]), 3, distribution=LogNormal()).shape
        torch.Size([1, 3])
    """

    def draw(self, num_samples: int, num_classes: int, device: torch.device) -> Tensor:
        """Log masses (N, C) float32, drawn from torch's generator of ``device``; -inf where zero."""
        raise NotImplementedError(f"{type(self).__name__} must define draw(...)")


@dataclass(frozen=True)
class Zipf(Distribution):
    """mass(r) = r^-alpha, the law of the paper (Eq. 4).

    Args:
        alpha: the decay, finite and >= 0; 1.0 in the paper, 0 makes it ``Constant``.

    Example:
        >>> votes, target = torch.tensor([[0, 0, 1]]), torch.tensor([3])
        >>> zls.zipf_label(target, votes, 4, distribution=zls.Zipf(alpha=2.0))  # ranks 1, 2, 3
        tensor([[0.7347, 0.1837, 0.0816, 0.0000]])
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "alpha")

    def log_mass(self, rank: Tensor, num_classes: int) -> Tensor:
        return -self.alpha * rank.log()


@dataclass(frozen=True)
class Constant(Distribution):
    """mass(r) = 1: every non-target class alike, as in label smoothing (Table 6).

    Example:
        >>> votes, target = torch.tensor([[0, 0, 1]]), torch.tensor([3])
        >>> zls.zipf_label(target, votes, 4, distribution=zls.Constant())
        tensor([[0.3333, 0.3333, 0.3333, 0.0000]])
    """

    def log_mass(self, rank: Tensor, num_classes: int) -> Tensor:
        return torch.zeros_like(rank)


@dataclass(frozen=True)
class LinearDecay(Distribution):
    """mass(r) = (C - r) g + s with g = 2 (1 - C s) / ((C - 1) C): a straight line down to s (Table 6).

    Args:
        smallest_prob: s, the mass of rank C, 0 <= s <= 1/C (the upper end is checked when C is known).

    Example:
        >>> votes, target = torch.tensor([[0, 0, 1]]), torch.tensor([3])
        >>> zls.zipf_label(target, votes, 4, distribution=zls.LinearDecay(smallest_prob=0.1))
        tensor([[0.4444, 0.3333, 0.2222, 0.0000]])
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

    Example:
        >>> votes, target = torch.tensor([[0, 0, 1]]), torch.tensor([3])
        >>> zls.zipf_label(target, votes, 4, distribution=zls.ExponentialDecay(rate=1.0))
        tensor([[0.6652, 0.2447, 0.0900, 0.0000]])
    """

    rate: float

    def __post_init__(self) -> None:
        _check(self, "rate")

    def log_mass(self, rank: Tensor, num_classes: int) -> Tensor:
        return -self.rate * (rank - 1)


@dataclass(frozen=True)
class RandomUniform(RandomDistribution):
    """mass ~ U[0, 1), drawn for every sample and class (Table 6).

    Example:
        >>> generator = torch.manual_seed(0)  # one seed, one label
        >>> law = zls.RandomUniform()
        >>> label = zls.zipf_label(torch.tensor([3]), torch.tensor([[0]]), 4, distribution=law)
        >>> round(float(label.sum()), 4), float(label[0, 3])
        (1.0, 0.0)
    """

    def draw(self, num_samples: int, num_classes: int, device: torch.device) -> Tensor:
        return torch.rand(num_samples, num_classes, dtype=torch.float32, device=device).log_()


@dataclass(frozen=True)
class RandomPareto(RandomDistribution):
    """mass ~ Pareto in Lomax form, (1 - u)^(-1/a) - 1 with u ~ U[0, 1), as numpy.random.pareto (Table 6).

    Args:
        a: the shape, finite and > 0; 1 in the paper.

    Example:
        >>> generator = torch.manual_seed(0)  # one seed, one label
        >>> law = zls.RandomPareto(a=1.0)
        >>> label = zls.zipf_label(torch.tensor([3]), torch.tensor([[0]]), 4, distribution=law)
        >>> float(label[0, 3])
        0.0
    """

    a: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "a", above=0)

    def draw(self, num_samples: int, num_classes: int, device: torch.device) -> Tensor:
        u = torch.rand(num_samples, num_classes, dtype=torch.float32, device=device)
        t = u.neg_().log1p_().div_(-self.a)  # t = -log(1 - u) / a >= 0
        # log(e^t - 1) = t + log(1 - e^-t), which neither overflows for large t nor cancels for small.
        return t + t.neg().expm1().neg_().log_()


# The tables that kernels read --------------------------------------------------------------------------


def log_mass(
    law: Distribution, N: int, C: int, P: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The log masses that an operator gathers from.

    Args:
        N, C: samples and classes. P: votes a sample, or None to rank by logits.
        dtype: the accumulation dtype.

    Returns:
        (R,) by rank from 1, R = C by logits and min(P, C) + 1 by votes; of a random law draws (N, C).
    """
    if isinstance(law, RandomDistribution):
        return _checked(law, "draw", law.draw(N, C, device), (N, C), dtype, device)
    length = C if P is None else min(P, C) + 1
    if _belongs_to_a_mode(device) or "__dataclass_fields__" not in type(law).__dict__:
        # Such a table is not cached. A law that is no frozen dataclass of its own may equal another law
        # that has other masses.
        return _compute_table(law, length, C, dtype, device)
    # Cache one table per stream: work on another stream would not wait for the table to be written.
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    return cached_table(law, length, C, dtype, device, torch.get_default_dtype(), stream)


_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # of make_fx(pre_dispatch=True), which is on no stack


def _belongs_to_a_mode(device: torch.device) -> bool:
    """Whether a tensor made now must not outlive the call: traced, fake, in a transform, in a captured graph.

    Nor may such a call use a cached table: a tracer has to see how the table is computed, and a captured
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
def cached_table(
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
    """log mass(r) for r = 1 .. length, (length,), computed in float64, rounded once, in memory of its own."""
    with torch.no_grad():
        rank = torch.arange(1, length + 1, dtype=torch.float64, device=device)
        masses = law.log_mass(rank, num_classes)
        masses = _checked(law, "log_mass", masses, (length,), dtype, device)
        return masses.clone(memory_format=torch.contiguous_format)


def _checked(
    law: Distribution,
    method: str,
    x: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The result of a law's method, checked, detached and in ``dtype``."""
    if not isinstance(x, Tensor) or x.shape != shape or x.device != device or x.is_complex():
        got = f"{tuple(x.shape)} of {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"distribution: {type(law).__name__}.{method} must return a real tensor {shape} on {device}, "
            f"got {got}"
        )
    return x.detach().to(dtype)
