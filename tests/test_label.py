"""Ranks and labels: every backend against a count written in plain Python, exactly."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from cases import KINDS, make

import zipfls_cuda as zls

SHAPES = [(5, 12, 9), (1, 2, 1), (3, 2, 7), (4, 3, 40), (2, 1000, 49), (3, 130, 0)]
LAWS = {
    "zipf": (zls.Zipf(1.0), oracle.MASSES["Zipf"](1.0)),
    "steep": (zls.Zipf(3.5), oracle.MASSES["Zipf"](3.5)),
    "flat": (zls.Zipf(0), oracle.MASSES["Constant"]()),
    "constant": (zls.Constant(), oracle.MASSES["Constant"]()),
    "linear": (zls.LinearDecay(0.0), oracle.MASSES["LinearDecay"](0.0)),
    "linear+": (zls.LinearDecay(1e-4), oracle.MASSES["LinearDecay"](1e-4)),
    "exponential": (zls.ExponentialDecay(0.3), oracle.MASSES["ExponentialDecay"](0.3)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rank_equals_count(backend, device, shape, kind):
    N, C, P = shape
    case = make(N, C, P, kind=kind)
    ranks = zls.rank_votes(case.votes.to(device), C, backend=backend)
    assert ranks.dtype == torch.int32
    assert ranks.tolist() == [oracle.rank_by(oracle.count(v, C)) for v in case.votes.tolist()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("law", LAWS)
def test_label_equals_oracle(backend, device, law, kind):
    N, C, P = 4, 12, 15
    case = make(N, C, P, kind=kind)
    distribution, mass = LAWS[law]
    label = zls.zipf_label(
        case.target.to(device), case.votes.to(device), C, distribution=distribution, backend=backend
    )
    assert label.dtype == torch.float32
    for i in range(N):
        masses = [mass(r, C) for r in oracle.rank_by(oracle.count(case.votes[i].tolist(), C))]
        exact = oracle.soft_label(int(case.target[i]), masses)
        np.testing.assert_allclose(label[i].cpu().numpy(), exact, rtol=3e-6, atol=0)


@pytest.mark.parametrize("int_dtype", [torch.int32, torch.int64])
def test_label_dtypes_strides_and_ignored(backend, device, int_dtype):
    case = make(6, 20, 8)
    target = case.target.clone()
    target[2] = -1
    wide = torch.stack([case.votes, case.votes.flip(1)], 2).to(int_dtype).to(device)  # stride 2 along P
    strided = zls.zipf_label(target.to(device), wide[..., 0], 20, ignore_index=-1, backend=backend)
    plain = zls.zipf_label(target.to(device), case.votes.to(device), 20, ignore_index=-1, backend=backend)
    assert torch.equal(strided, plain)
    assert (plain[2] == 0).all()
    kept = plain[[0, 1, 3, 4, 5]]
    torch.testing.assert_close(kept.sum(1), torch.ones(5, device=device))
    assert (plain.cpu().gather(1, target.clamp(min=0)[:, None]) == 0).all()


@pytest.mark.parametrize("alpha", [150.0, 2000.0])
def test_label_survives_masses_that_underflow(backend, device, alpha):
    """The target alone at rank 1: the others, of mass 2^-alpha and less, have 0 in float32, or in float64."""
    target = torch.tensor([0], device=device)
    votes = torch.tensor([[0, 0, 0, 1, 1, 2]], dtype=torch.int32, device=device)
    label = zls.zipf_label(target, votes, 5, alpha=alpha, backend=backend)
    exact = [0, 1, (2 / 3) ** alpha, 0.5**alpha, 0.5**alpha]
    np.testing.assert_allclose(label[0].cpu().numpy(), np.array(exact) / sum(exact), rtol=2e-5, atol=1e-37)


def test_label_without_any_mass_is_uniform(backend, device):
    """LinearDecay(0) at C = 2 gives the only non-target class, at rank 2, the mass 0."""
    votes = torch.zeros(1, 3, dtype=torch.int32, device=device)
    label = zls.zipf_label(
        torch.tensor([0], device=device), votes, 2, distribution=zls.LinearDecay(0.0), backend=backend
    )
    assert label.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("law", ["zipf", "linear+"])
def test_label_of_many_classes_is_exact(backend, device, law):
    """Thousands of equal masses add up as they should, whatever processor sums them."""
    C, votes = 32001, torch.tensor([[0, 0, 1, 2, 3]], dtype=torch.int32, device=device)
    distribution, mass = (zls.LinearDecay(1e-6), None) if law == "linear+" else LAWS[law]
    mass = mass or oracle.MASSES["LinearDecay"](1e-6)
    label = zls.zipf_label(
        torch.tensor([5], device=device), votes, C, distribution=distribution, backend=backend
    )
    exact = oracle.soft_label(5, [mass(r, C) for r in [1, 2, 2, 2] + [5] * (C - 4)])
    rounding = 3e-7 if backend in ("reference", "cpu") else 6e-7  # the others round a logarithm once more
    np.testing.assert_allclose(label[0].cpu().numpy(), exact, rtol=rounding, atol=0)


@pytest.mark.parametrize("name", ["RandomUniform", "RandomPareto"])
def test_random_label_follows_the_generator(backend, device, name):
    law = getattr(zls, name)()
    case = make(6, 50, 4).to(device)

    def draw(seed):
        torch.manual_seed(seed)
        return zls.zipf_label(case.target, case.votes, 50, distribution=law, backend=backend)

    first = draw(1)
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))
    torch.testing.assert_close(first.sum(1), torch.ones(6, device=device))
    torch.manual_seed(1)
    reference = zls.zipf_label(case.target, case.votes, 50, distribution=law, backend="reference")
    torch.testing.assert_close(first, reference, rtol=1e-5, atol=1e-9)


def test_random_laws_have_their_distribution():
    """Kolmogorov-Smirnov distance of the masses to U[0, 1) and to Lomax's 1 - (1 + x)^-a."""
    n = 200_000
    for law, cdf in [
        (zls.RandomUniform(), lambda x: x),
        (zls.RandomPareto(1.0), lambda x: 1 - 1 / (1 + x)),
        (zls.RandomPareto(3.0), lambda x: 1 - (1 + x) ** -3),
    ]:
        mass = law.draw(n // 100, 100, torch.device("cpu")).double().exp().flatten().sort().values
        ideal = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        assert (cdf(mass) - ideal).abs().max() < 1.95 / math.sqrt(n)  # fails by chance once in a thousand


def test_a_law_is_one_small_class(backend, device):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Rising(zls.Distribution):
        power: float

        def log_mass(self, rank, num_classes):
            return self.power * rank.log()

    case = make(4, 12, 15).to(device)
    label = zls.zipf_label(case.target, case.votes, 12, distribution=Rising(2.0), backend=backend)
    for i in range(4):
        masses = [r**2.0 for r in oracle.rank_by(oracle.count(case.votes[i].tolist(), 12))]
        exact = oracle.soft_label(int(case.target[i]), masses)
        np.testing.assert_allclose(label[i].cpu().numpy(), exact, rtol=3e-6)


def test_label_out_of_range(backend, device):
    votes = torch.tensor([[0, 1], [7, 2], [3, -9]], dtype=torch.int32, device=device)
    target = torch.tensor([0, 1, 2], device=device)
    if backend in ("reference", "cpu") and device.type == "cpu":
        with pytest.raises(IndexError, match=r"votes\[1, 0\] = 7 is outside \[0, 7\)"):
            zls.zipf_label(target, votes, 7, backend=backend)
        with pytest.raises(IndexError, match=r"votes\[1, 0\] = 7"):
            zls.rank_votes(votes, 7, backend=backend)
        with pytest.raises(IndexError, match=r"target\[2\] = 7"):
            zls.zipf_label(target + 5, votes.clamp(max=6), 7, backend=backend)
        return
    label = zls.zipf_label(target, votes, 7, backend=backend)
    assert label[1].isnan().all()
    assert label[[0, 2]].isfinite().all()
    ranks = zls.rank_votes(votes, 7, backend=backend)
    assert (ranks[1] == 0).all()
    assert (ranks[[0, 2]] > 0).all()
    assert zls.zipf_label(target + 5, votes.clamp(max=6), 7, backend=backend)[2].isnan().all()
