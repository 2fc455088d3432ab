"""Inputs for tests: logits, targets and votes of every kind that has ever broken a loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# (N, D, H, W, C) of channels_last maps, and which wgmma kernel an sm_90 of 132 multiprocessors gives them to.
# The smaller shapes of test_vote.py all go to mma.sync.
WGMMA_SHAPES = {
    (65, 200, 7, 7, 1000): "wide",
    (20, 72, 14, 14, 517): "wide",
    (256, 520, 7, 7, 1000): "wide",  # several tiles a cluster, each deeper than the ring of stages
    (128, 264, 8, 8, 100): "narrow",
    (128, 264, 7, 7, 100): "narrow",
}


class Case(NamedTuple):
    logits: Tensor  # (N, C)
    target: Tensor  # (N,) int64
    votes: Tensor  # (N, P) int32

    def to(self, device=None, dtype=None) -> Case:
        return Case(self.logits.to(device, dtype), self.target.to(device), self.votes.to(device))

    def leaf(self) -> Tensor:
        """The logits as a fresh leaf that wants a gradient."""
        return self.logits.detach().clone().requires_grad_()


def make(
    N: int = 5,
    C: int = 12,
    P: int = 9,
    dtype=torch.float32,
    device="cpu",
    *,
    kind="peaked",
    scale=2.0,
    seed=0,
) -> Case:
    """A random case; ``kind`` is the shape of the histogram of votes.

    peaked: as a network votes; uniform; one: a class takes all; target: the target takes all; distinct: each
    vote its own class (as far as C goes); none: no vote at all; some: half the votes negative; ties: many
    classes with equal counts.
    """
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(N, C, generator=g, dtype=torch.float64) * scale).to(dtype)
    target = torch.randint(C, (N,), generator=g)
    if kind == "peaked":
        votes = (torch.rand(N, P, generator=g).pow(3) * C).long().clamp(max=C - 1)
        votes = (votes + torch.randint(C, (N, 1), generator=g)) % C
    elif kind == "uniform":
        votes = torch.randint(C, (N, P), generator=g)
    elif kind == "one":
        votes = torch.randint(C, (N, 1), generator=g).expand(N, P)
    elif kind == "target":
        votes = target[:, None].expand(N, P)
    elif kind == "distinct":
        votes = torch.stack([torch.randperm(C, generator=g).repeat(-(-P // C))[:P] for _ in range(N)])
    elif kind == "none":
        votes = torch.full((N, P), -1)
    elif kind == "some":
        votes = torch.randint(C, (N, P), generator=g)
        votes[torch.rand(N, P, generator=g) < 0.5] = -1
    elif kind == "ties":
        votes = (torch.arange(P) // 3 % C).expand(N, P)
    else:
        raise ValueError(kind)
    return Case(logits, target, votes.to(torch.int32).contiguous()).to(device)


KINDS = ("peaked", "uniform", "one", "target", "distinct", "none", "some", "ties")
TARGETS = ("one-hot", "smoothed", "mixup", "mixup of smoothed", "uniform", "distinct", "half", "any sum")


def probabilities(case, kind: str) -> torch.Tensor:
    """(N, C) float32 targets whose largest class is, where there is one, the case's target."""
    N, C = case.logits.shape
    g = torch.Generator().manual_seed(7)
    first = F.one_hot(case.target.cpu(), C).float()
    other = F.one_hot(torch.randint(C, (N,), generator=g), C).float()
    lam = 0.55 + 0.4 * torch.rand(N, 1, generator=g)
    t = {
        "one-hot": first,
        "smoothed": 0.9 * first + 0.1 / C,
        "mixup": lam * first + (1 - lam) * other,
        "mixup of smoothed": lam * (0.9 * first + 0.1 / C) + (1 - lam) * (0.9 * other + 0.1 / C),
        "uniform": torch.full((N, C), 1 / C),
        "distinct": torch.rand(N, C, generator=g).softmax(1),  # one class has the least: no Zipf term
        "half": torch.randint(2, (N, C), generator=g) / C + first,  # as many classes in as out
        "any sum": torch.randint(-2, 5, (N, C), generator=g) / 3.0,  # F.cross_entropy asks for no sum
    }[kind]
    return t.to(case.logits.device)


def with_target(case: Case, kind: str) -> Case:
    """The case with a target of probabilities."""
    return case._replace(target=probabilities(case, kind))


INF = torch.inf
# Row of a target with infinite probabilities -> (logits by class, probabilities by class).
INFINITE = {
    "at the largest logit": ({4: 5.0}, {4: INF}),
    "elsewhere": ({}, {3: INF}),
    "negative": ({}, {3: -INF}),
    "several": ({}, {2: INF, 5: INF}),
    "several negative": ({}, {2: -INF, 5: -INF}),
    "of both signs": ({}, {2: -INF, 5: INF}),
    "all": ({}, dict.fromkeys(range(11), INF)),
    "all negative": ({}, dict.fromkeys(range(11), -INF)),
    "where masked": ({3: -INF}, {3: INF}),
    "beside a mask": ({3: -INF}, {6: INF}),
    "beside a mask of 0": ({3: -INF}, {3: 0.0, 6: INF}),
    "where it dominates": ({4: 60.0}, {4: INF}),
    "where another dominates": ({4: 1e4}, {6: INF, 7: INF}),
    "negative where it dominates": ({4: 1e4}, {4: -INF}),
    "far below": ({0: 80.0, 1: 40.0, 2: -30.0, 3: -60.0}, {5: INF}),
    "beside NaN": ({}, {3: INF, 4: torch.nan}),
    "none": ({}, {}),
}


def infinite_rows(device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """(logits, target, votes), a row for each of INFINITE."""
    case = make(len(INFINITE), 11, 7, seed=4, scale=1.0)
    z, t = case.logits, probabilities(case, "mixup of smoothed")
    for i, (logits, shares) in enumerate(INFINITE.values()):
        for x, changes in ((z, logits), (t, shares)):
            for c, value in changes.items():
                x[i, c] = value
    return z.to(device), t.to(device), case.votes.to(device)


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest difference, as float64; NaN and infinity must agree in place and sign, and do not count."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    special = ~exact.isfinite()
    assert torch.equal(actual[special].nan_to_num(nan=7.0), exact[special].nan_to_num(nan=7.0)), (
        "NaN or inf differ"
    )
    assert actual[~special].isfinite().all(), "NaN or inf where a finite value belongs"
    return (actual - exact)[~special].abs().max().item() if (~special).any() else 0.0


def rms(actual: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, as float64."""
    return (actual.detach().double().cpu() - exact.detach().double().cpu()).square().mean().sqrt().item()
