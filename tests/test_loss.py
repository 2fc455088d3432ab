"""The loss and its gradient: every backend against the float64 oracle, within twice plain PyTorch's error."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, KINDS, make, rms
from exact import check_against_oracle, run, zipf_of

import zipfls_cuda as zls
from zipfls_cuda import ops

REDUCTIONS = ("mean", "sum", "none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("C", "P"), [(10, 16), (100, 80), (9973, 49), (1000, 49)])
def test_error_budget(backend, device, dtype, C, P):
    """Over many samples, no worse than twice the error of plain PyTorch in the same dtype."""
    case = make(64, C, P, device=device, dtype=dtype, scale=3.0)
    options = {"reduction": "none", "label_smoothing": 0.1}
    got = run(case.logits, case.target, case.votes, backend=backend, **options)
    plain = run(case.logits, case.target, case.votes, backend="reference", **options)
    if dtype == torch.float64:  # no wider type to compare with: the two must agree
        for a, b in zip(got, plain, strict=True):
            assert rms(a, b) <= 1e-13 * (1 + b.abs().max().item())
        return
    exact = run(case.logits.double(), case.target, case.votes, backend="reference", **options)
    for name, a, b, c in zip(("loss", "ce", "zipf", "gradient"), got, exact, plain, strict=True):
        assert rms(a, b) <= 2 * rms(c, b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(5, 12, 9), (3, 2, 5), (4, 3, 1), (2, 1000, 49), (3, 97, 320), (2, 2051, 16), (1, 7, 0)],
    ids=str,
)
def test_loss_exact(backend, device, shape, dtype):
    check_against_oracle(backend, device, make(*shape), dtype=dtype, zipf_weight=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_every_histogram(backend, device, kind):
    for C, P in [(12, 9), (6, 40)]:
        check_against_oracle(backend, device, make(5, C, P, kind=kind))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("only_correct", [False, True])
def test_loss_options(backend, device, reduction, smoothing, weighted, only_correct):
    case = make(8, 11, 6, seed=3)
    case.logits[torch.arange(4), case.target[:4]] += 8  # half of them classified correctly
    case.target[[1, 5]] = 4
    check_against_oracle(
        backend,
        device,
        case,
        zipf_weight=0.3,
        reduction=reduction,
        label_smoothing=smoothing,
        weight=torch.rand(11, generator=torch.Generator().manual_seed(1)).to(device) if weighted else None,
        only_correct=only_correct,
        ignore_index=4,
    )


@pytest.mark.parametrize(
    "law",
    [
        zls.Zipf(0.5),
        zls.Zipf(4.0),
        zls.Constant(),
        zls.LinearDecay(0.0),
        zls.LinearDecay(0.01),
        zls.ExponentialDecay(0.7),
    ],
    ids=str,
)
@pytest.mark.parametrize("by_votes", [True, False])
def test_loss_of_every_law(backend, device, law, by_votes):
    mass = oracle.MASSES[type(law).__name__](*vars(law).values())
    for kind in ("peaked", "distinct"):
        case = make(5, 13, 20, kind=kind)
        check_against_oracle(backend, device, case, distribution=law, mass=mass, by_votes=by_votes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_ranked_by_logits_with_ties(backend, device, dtype):
    case = make(4, 40, 3)
    case.logits.mul_(2).round_().div_(2)
    check_against_oracle(backend, device, case, dtype=dtype, by_votes=False)


@pytest.mark.parametrize("law", [zls.RandomUniform(), zls.RandomPareto(1.0)], ids=str)
@pytest.mark.parametrize("by_votes", [True, False])
def test_loss_of_random_laws(backend, device, law, by_votes):
    case = make(6, 30, 5)
    torch.manual_seed(5)
    mass = law.draw(6, 30, device).double().exp().cpu().numpy()
    on_device = case.to(device)
    torch.manual_seed(5)
    votes = on_device.votes if by_votes else None
    loss, _, _, grad = run(on_device.logits, on_device.target, votes, backend=backend, distribution=law)
    exact = oracle.batch(case.logits.numpy(), case.target.numpy(), None, mass)
    np.testing.assert_allclose(loss.cpu().numpy(), exact[0], rtol=2e-6)
    np.testing.assert_allclose(grad.cpu().numpy(), exact[3], rtol=1e-4, atol=2e-7)


# Against F.cross_entropy, to the letter ---------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "corner", ["plain", "ignored", "all ignored", "empty", "masked", "+inf", "nan", "dominant"]
)
def test_without_zipf_it_is_cross_entropy(backend, device, reduction, smoothing, weighted, corner):
    case = make(0 if corner == "empty" else 6, 9, 4, device=device)
    if corner == "ignored":
        case.target[1] = -100
    elif corner == "all ignored":
        case.target[:] = -100
    elif corner == "masked":
        case.logits[:, 2], case.target[:] = -torch.inf, 5
        case.target[0] = 2  # a target that is masked itself
    elif corner == "+inf":
        case.logits[1, 3] = torch.inf
    elif corner == "nan":
        case.logits[2, 3] = torch.nan
    elif corner == "dominant":
        case.logits[torch.arange(6), case.target] += 1e4
    weight = torch.rand(9, device=device) if weighted else None
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    x = case.leaf()
    expected = F.cross_entropy(x, case.target, **options)
    expected.sum().backward()
    loss, ce, zipf, grad = run(
        case.logits, case.target, case.votes, backend=backend, zipf_weight=0, **options
    )
    torch.testing.assert_close(loss, expected.detach(), rtol=3e-6, atol=3e-6, equal_nan=True)
    torch.testing.assert_close(ce, loss, equal_nan=True)
    assert (zipf == 0).all()
    torch.testing.assert_close(grad, x.grad, rtol=1e-5, atol=1e-6, equal_nan=True)


# Numerics that bite (MATH.md) ---------------------------------------------------------------------------


@pytest.mark.parametrize("boost", [30.0, 1e4, torch.inf, -torch.inf, -1e4])
def test_target_stays_out_of_every_statistic(backend, device, boost):
    """Whatever the target's own logit, the Zipf term and its gradient are those of the other classes."""
    case = make(6, 20, 9, device=device)
    expected, expected_grad = zipf_of(case.logits, case.target, case.votes, backend)
    moved = case.logits.scatter(1, case.target[:, None], boost)
    loss, grad = zipf_of(moved, case.target, case.votes, backend)
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad)
    assert (grad.gather(1, case.target[:, None]) == 0).all()


def test_offset_of_ten_thousand(backend, device):
    """Everything works on z - m: on logits that stay exact under the offset, nothing changes."""
    case = make(5, 50, 9, device=device)
    x = (case.logits * 64).round() / 64
    expected = run(x, case.target, case.votes, backend=backend)
    shifted = run(x + 8192, case.target, case.votes, backend=backend)
    for a, b in zip(shifted, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


def test_two_classes_have_no_zipf_term(backend, device):
    case = make(7, 2, 5, scale=20.0, device=device)
    loss, grad = zipf_of(case.logits, case.target, case.votes, backend)
    assert (loss == 0).all()
    assert (grad == 0).all()
    loss, grad = zipf_of(case.logits, case.target, None, backend)
    assert (loss == 0).all()
    assert (grad == 0).all()


def test_steep_law_does_not_underflow(backend, device):
    check_against_oracle(backend, device, make(5, 12, 9), alpha=30.0)
    target = torch.tensor([0], device=device)
    votes = torch.tensor([[0, 0, 0, 1, 1, 2]], dtype=torch.int32, device=device)
    x = torch.tensor([[0.5, 1.0, -1.0, 0.25, 2.0]], device=device)
    loss, grad = zipf_of(x, target, votes, backend, alpha=150.0)  # the label is class 1 alone
    log_q = x[:, 1:].double().log_softmax(1)
    torch.testing.assert_close(loss.double(), -log_q[:, 0], rtol=2e-6, atol=0)
    expected = log_q.exp() - torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64, device=device)
    torch.testing.assert_close(grad[:, 1:].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_masked_nontarget_class(backend, device, dtype):
    """A -inf logit with label mass: loss +inf, its gradient -p~_c; the other gradients as without it."""
    case = make(4, 10, 12, device=device, dtype=dtype)
    case.target[:] = 0
    case.votes[:] = torch.tensor([3, 3, 3, 5, 5, 0, 0, 0, 0, 8, -1, -1])
    label = zls.zipf_label(case.target, case.votes, 10, backend="reference")
    for c in (3, 5, 7):  # rank 2, rank 3, and a class without votes
        x = case.logits.clone()
        x[:, c] = -torch.inf
        loss, grad = zipf_of(x, case.target, case.votes, backend)
        assert (loss == torch.inf).all()
        q = x[:, 1:].double().softmax(1)
        expected = q - label[:, 1:].double()
        torch.testing.assert_close(
            grad[:, 1:].double(), expected, rtol=0, atol=max(1e-6, torch.finfo(dtype).eps)
        )


def test_masked_class_without_mass_is_skipped(backend, device):
    """Zero mass times -inf: the term is left out, so the loss stays finite. Every class has its own rank."""
    C = 6
    votes = torch.tensor([[c for c in range(C) for _ in range(C - c)]], dtype=torch.int32, device=device)
    x = torch.tensor([[1.0, 0.5, -0.5, 2.0, 0.0, -torch.inf]], device=device)
    target = torch.tensor([0], device=device)
    loss, grad = zipf_of(x, target, votes, backend, distribution=zls.LinearDecay(0.0))  # rank C has mass 0
    exact = oracle.batch(x.cpu().numpy(), [0], votes.tolist(), oracle.MASSES["LinearDecay"](0.0), ce_weight=0)
    np.testing.assert_allclose(loss.item(), exact[0], rtol=2e-6)
    np.testing.assert_allclose(grad.cpu().numpy(), exact[3], rtol=1e-5, atol=1e-7)


def test_several_masked_classes(backend, device):
    """Voted and unvoted, with and without the label's mass, as the differentiable reference has it."""
    case = make(6, 30, 20, kind="some", device=device)
    case.target[:] = 4
    x = case.logits.clone()
    x[:3, 10:] = -torch.inf
    x[3:, ::3] = -torch.inf
    expected = zipf_of(x, case.target, case.votes, "reference")
    loss, grad = zipf_of(x, case.target, case.votes, backend)
    assert torch.equal(loss, expected[0])
    torch.testing.assert_close(grad, expected[1], rtol=1e-5, atol=1e-6)


def test_all_nontarget_masked(backend, device):
    x = torch.full((2, 5), -torch.inf, device=device)
    x[:, 1] = 0.5
    target, votes = torch.tensor([1, 1], device=device), torch.zeros(2, 3, dtype=torch.int32, device=device)
    got = run(x, target, votes, backend=backend, reduction="none")
    expected = run(x, target, votes, backend="reference", reduction="none")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    ce = run(x, target, votes, backend=backend, reduction="none", zipf_weight=0)
    assert (ce[0] == 0).all()


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_nan_and_infinity_propagate(backend, device, odd):
    case = make(4, 12, 9, device=device)
    case.target[:] = 3
    case.logits[1, 7] = odd
    loss, ce, zipf, grad = run(case.logits, case.target, case.votes, backend=backend, reduction="none")
    for part in (loss, ce, zipf, grad):
        assert part[1].isnan().all()
        assert part[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("C", [300, 1200, 5000])
@pytest.mark.parametrize("low", [0.0, -300.0])
def test_masked_tile(backend, device, C, low):
    """Most of a row -inf (whole tiles of an online softmax), also where exponentials would overflow."""
    case = make(2, C, 30, device=device)
    case.target[:] = C - 10
    case.logits.add_(low)
    case.logits[:, C // 10 : C - C // 10] = -torch.inf
    got = run(case.logits, case.target, case.votes, backend=backend, zipf_weight=0)
    x = case.leaf()
    expected = F.cross_entropy(x, case.target)
    expected.backward()
    torch.testing.assert_close(got[0], expected.detach())
    torch.testing.assert_close(got[3], x.grad)


# Sizes, strides, types ---------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [*range(2, 40), 63, 64, 65, 127, 129, 255, 257, 1023, 1025])
def test_every_width(backend, device, C):
    case = make(3, C, 10, seed=C, device=device)
    got = run(case.logits, case.target, case.votes, backend=backend)
    exact = run(case.logits.double(), case.target, case.votes, backend="reference")
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(backend, device, dtype):
    case = make(6, 21, 8, dtype=dtype, device=device)
    expected = run(case.logits, case.target, case.votes, backend=backend)
    odd = torch.zeros(6, 25, dtype=dtype, device=device)
    odd[:, 3:24] = case.logits
    doubled = torch.stack([case.logits, case.logits], 2)
    layouts = [case.logits.t().contiguous().t(), doubled[..., 1], odd[:, 3:24]]
    votes = case.votes.t().contiguous().t()
    target = torch.stack([case.target, case.target], 1)[:, 0]
    for x in layouts:
        x.requires_grad_() if x.is_leaf else None
        got = run(x, target, votes, backend=backend)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
    row = case.logits[:1].expand(6, -1)
    same = run(row, case.target, case.votes, backend=backend)
    copied = run(row.contiguous(), case.target, case.votes, backend=backend)
    for a, b in zip(same, copied, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("votes_dtype", [torch.int32, torch.int64], ids=str)
def test_vote_dtypes(backend, device, votes_dtype):
    case = make(6, 21, 8, device=device)
    expected = run(case.logits, case.target, case.votes, backend=backend)
    got = run(case.logits, case.target, case.votes.to(votes_dtype), backend=backend)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_votes_past_32_bits_are_no_vote_when_negative(backend, device):
    """An int64 vote of -2^32 + 3 must not wrap to class 3."""
    case = make(2, 8, 6, device=device)
    votes = case.votes.long()
    votes[:, 2] = -(2**32) + 3
    without = votes.clone()
    without[:, 2] = -1
    got = run(case.logits, case.target, votes, backend=backend)
    for a, b in zip(got, run(case.logits, case.target, without, backend=backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("P", [1, 2, 31, 32, 33, 64, 100, 128, 129, 500, 4096])
def test_many_votes(backend, device, P):
    for kind in ("peaked", "distinct") if P < 4096 else ("uniform",):
        check_against_oracle(backend, device, make(2, 60, P, kind=kind))


def test_zipf_loss_is_the_zipf_part(backend, device):
    case = make(6, 21, 8, device=device)
    for reduction, only in itertools.product(REDUCTIONS, (False, True)):
        parts = zls.zipf_cross_entropy(
            *case, only_correct=only, reduction=reduction, return_parts=True, backend=backend
        )
        alone = zls.zipf_loss(*case, only_correct=only, reduction=reduction, backend=backend)
        torch.testing.assert_close(alone, parts[2], rtol=1e-6, atol=1e-7)


# Out of range ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "row", "bad"),
    [("target", 1, 9), ("target", 2, -1), ("target", 0, 2**40), ("votes", 1, 9), ("votes", 3, 2**40)],
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_out_of_range(backend, device, argument, row, bad, reduction):
    case = make(5, 9, 4)
    target, votes = case.target, case.votes.long()
    if argument == "target":
        target[row] = bad
    else:
        votes[row, 2] = bad
    args = (case.logits.to(device), target.to(device), votes.to(device))
    if backend in ("reference", "cpu") and device.type == "cpu":
        where = rf"target\[{row}\]" if argument == "target" else rf"votes\[{row}, 2\]"
        with pytest.raises(IndexError, match=where + rf" = {bad} is outside \[0, 9\)"):
            run(*args, backend=backend, reduction=reduction)
        return
    loss, _, _, grad = run(*args, backend=backend, reduction=reduction)
    good = [i for i in range(5) if i != row]
    assert grad[row].isnan().all()
    assert grad[good].isfinite().all()
    if reduction == "none":
        assert loss[row].isnan()
        assert loss[good].isfinite().all()
    else:
        assert loss.isnan()


def test_votes_of_ignored_samples_are_not_read(backend, device):
    case = make(3, 9, 4, device=device)
    case.target[1], case.votes[1, 0] = -100, 77
    loss, _, _, grad = run(*case, backend=backend, reduction="none")
    assert loss[1] == 0
    assert (grad[1] == 0).all()
    assert loss.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mean_of_targets_without_weight(backend, device, smoothing, dtype):
    """Class weights of 0 at every target: loss and gradient are NaN as F.cross_entropy's, smoothed or not."""
    case = make(5, 9, 4, device=device, dtype=dtype)
    case.target[1:] = 3
    case.target[0] = -100
    weight = torch.rand(9, device=device)
    weight[3] = 0
    options = {"weight": weight.to(dtype), "label_smoothing": smoothing}
    x, z = case.leaf(), case.leaf()
    loss = zls.zipf_cross_entropy(x, case.target, case.votes, backend=backend, **options)
    loss.backward()
    expected = F.cross_entropy(z.float(), case.target, weight, label_smoothing=smoothing)
    expected.backward()
    assert loss.isnan()
    assert expected.isnan()
    assert torch.equal(x.grad.isnan(), z.grad.isnan())
    assert (x.grad[0] == 0).all()


@dataclass(frozen=True)
class Jagged(zls.Distribution):
    """A law whose largest mass is at no fixed rank."""

    def log_mass(self, rank, num_classes):
        return 21 * (rank // 6) + 0.37 * (rank % 6)


def test_a_row_does_not_depend_on_those_before_it(backend, device):
    """The same rows in another order: bitwise the same losses and gradients."""
    N = 64 if backend == "triton" and ops.triton_interpreted() else 256
    case = make(N, 40, 30, device=device)
    order = torch.randperm(N, device=device)
    law = Jagged()
    one = run(case.logits, case.target, case.votes, backend=backend, distribution=law, reduction="none")
    shuffled = (x[order] for x in (case.logits, case.target, case.votes))
    two = run(*shuffled, backend=backend, distribution=law, reduction="none")
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a[order], b)


# Memory ----------------------------------------------------------------------------------------------


@pytest.mark.skipif("cpu" not in zls.backends(), reason="the C++ extension is not built")
def test_loss_large_gradients_reuse_memory_and_stay_apart():
    """From 32 MiB on, the memory of a gradient that was given back serves the next one, and no other."""
    N, C = 64, 131072  # 32 MiB
    z, y = torch.randn(N, C), torch.arange(N)

    def grad(x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(zls.zipf_cross_entropy(x.requires_grad_(), y, zipf_weight=0.0), x)[0]

    a = grad(z.clone())
    kept, where = a.clone(), a.data_ptr()
    b = grad(2 * z)  # a lives: memory of its own
    assert b.data_ptr() != where
    assert torch.equal(a, kept)
    del a
    c = grad(z.clone())
    assert c.data_ptr() == where
    assert torch.equal(c, kept)
