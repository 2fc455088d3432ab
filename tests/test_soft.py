"""Targets of probabilities (mixup, CutMix, soft labels): the oracle, F.cross_entropy, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from cases import DTYPES, INFINITE, TARGETS, infinite_rows, make, probabilities, rms, with_target
from exact import check_against_oracle, run, zipf_of

import zipfls_cuda as zls
from zipfls_cuda import checks

REDUCTIONS = ("mean", "sum", "none")


# Against the oracle ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TARGETS)
def test_soft_loss_exact(backend, device, dtype, kind):
    for shape in [(5, 12, 9), (3, 2, 5), (4, 3, 1), (3, 7, 0), (2, 97, 160), (2, 301, 16)]:
        case = make(*shape)
        check_against_oracle(backend, device, with_target(case, kind), dtype=dtype, zipf_weight=0.5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("only_correct", [False, True])
def test_soft_loss_options(backend, device, reduction, smoothing, weighted, only_correct):
    case = make(8, 11, 6, seed=3)
    case.logits[torch.arange(4), case.target[:4]] += 8  # half of them classified correctly
    weight = torch.rand(11, generator=torch.Generator().manual_seed(1)).to(device) if weighted else None
    for kind, by_votes in itertools.product(("mixup", "half"), (True, False)):
        check_against_oracle(
            backend,
            device,
            with_target(case, kind),
            zipf_weight=0.3,
            reduction=reduction,
            label_smoothing=smoothing,
            weight=weight,
            only_correct=only_correct,
            by_votes=by_votes,
        )


@pytest.mark.parametrize(
    "law", [zls.Zipf(4.0), zls.Constant(), zls.LinearDecay(0.0), zls.ExponentialDecay(0.7)], ids=str
)
@pytest.mark.parametrize("by_votes", [True, False])
def test_soft_loss_of_every_law(backend, device, law, by_votes):
    mass = oracle.MASSES[type(law).__name__](*vars(law).values())
    for kind in ("mixup", "half"):
        case = make(5, 13, 20, kind="distinct")
        options = {"distribution": law, "mass": mass, "by_votes": by_votes}
        check_against_oracle(backend, device, with_target(case, kind), **options)


def test_soft_loss_of_a_random_law(backend, device):
    """Masses given class by class, also where a row is shorter than a vector."""
    for C in (3, 30):
        case, law = make(6, C, 5), zls.RandomPareto(1.0)
        torch.manual_seed(5)
        mass = law.draw(6, C, device).double().exp().cpu().numpy()
        torch.manual_seed(5)
        t = probabilities(case, "half")
        got = run(case.logits.to(device), t.to(device), None, backend=backend, distribution=law)
        exact = oracle.batch(case.logits.numpy(), t.numpy(), None, mass)
        np.testing.assert_allclose(got[0].cpu().numpy(), exact[0], rtol=2e-6)
        np.testing.assert_allclose(got[3].cpu().numpy(), exact[3], rtol=1e-4, atol=2e-7)


def test_no_mass_is_uniform(backend, device):
    """Where none of the least probable classes has mass, the label is uniform over them."""
    votes = torch.tensor(
        [[0, 0, 1, 2, 3]], dtype=torch.int32, device=device
    )  # 1, 2, 3 rank 2; 4 and 5 rank 5
    target = torch.tensor([[0.4, 0.2, 0.2, 0.2, 0.0, 0.0]], device=device)
    masses = lambda r, C: 1.0 if r < 5 else 0.0  # noqa: E731

    class Cut(zls.Constant):
        def log_mass(self, rank, num_classes):
            return torch.where(rank < 5, 0.0, -torch.inf).to(rank)

    x = torch.randn(1, 6, device=device)
    got = run(x, target, votes, backend=backend, distribution=Cut())
    exact = oracle.batch(x.cpu().numpy(), target.cpu().numpy(), votes.cpu().numpy(), masses)
    np.testing.assert_allclose(got[2].item(), exact[2], rtol=2e-6)
    np.testing.assert_allclose(got[3].cpu().numpy(), exact[3], rtol=1e-5, atol=1e-7)


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("C", [100, 9973])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_error_budget(backend, device, dtype, C):
    """Over many samples, no worse than twice the error of plain PyTorch in the same dtype."""
    case = make(48, C, 49, device=device, dtype=dtype, scale=3.0)
    t = probabilities(case, "mixup")
    options = {"reduction": "none", "label_smoothing": 0.1}
    got = run(case.logits, t, case.votes, backend=backend, **options)
    plain = run(case.logits, t, case.votes, backend="reference", **options)
    if dtype == torch.float64:  # no wider type to compare with: the two must agree
        for a, b in zip(got, plain, strict=True):
            assert rms(a, b) <= 1e-13 * (1 + b.abs().max().item())
        return
    exact = run(case.logits.double(), t, case.votes, backend="reference", **options)
    for name, a, b, c in zip(("loss", "ce", "zipf", "gradient"), got, exact, plain, strict=True):
        assert rms(a, b) <= 2 * rms(c, b), name


def test_soft_loss_every_width(backend, device):
    for C in [*range(2, 36), 63, 65, 127, 129, 257, 1025]:
        case = make(3, C, 10, seed=C, device=device)
        t, weight = probabilities(case, "half"), torch.rand(C, device=device)
        got = run(case.logits, t, case.votes, backend=backend, weight=weight)
        exact = run(case.logits.double(), t, case.votes, backend="reference", weight=weight)
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


# Against F.cross_entropy, to the letter ----------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_soft_without_zipf_is_cross_entropy(backend, device, reduction, smoothing, weighted):
    weight = torch.rand(9, device=device) if weighted else None
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    corners = ("empty", "masked", "masked where 0", "+inf", "nan", "all masked", "nan target", "dominant")
    for corner in ("mixup", "any sum", *corners):
        case = make(0 if corner == "empty" else 6, 9, 4, device=device)
        t = probabilities(case, corner if corner in TARGETS else "mixup of smoothed")
        if corner == "masked":
            case.logits[:, 2] = -torch.inf
        elif corner == "masked where 0":  # 0 times -inf: F.cross_entropy's loss is NaN, its gradient is not
            case.logits[:, 2], t[:, 2] = -torch.inf, 0
        elif corner == "+inf":
            case.logits[1, 3] = torch.inf
        elif corner == "nan":
            case.logits[2, 3] = torch.nan
        elif corner == "all masked":
            case.logits[1] = -torch.inf
        elif corner == "nan target":
            t[2, 3] = torch.nan
        elif corner == "dominant":
            case.logits[torch.arange(6), case.target] += 1e4
        x = case.leaf()
        expected = F.cross_entropy(x, t, **options)
        expected.sum().backward()
        loss, ce, zipf, grad = run(case.logits, t, case.votes, backend=backend, zipf_weight=0, **options)
        torch.testing.assert_close(loss, expected.detach(), rtol=3e-6, atol=3e-6, equal_nan=True)
        torch.testing.assert_close(ce, loss, equal_nan=True)
        assert ((zipf == 0) | (corner == "nan target")).all()
        torch.testing.assert_close(grad, x.grad, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_hot_equals_the_class(backend, device, reduction):
    case = make(8, 11, 6, seed=3, device=device)
    case.logits[torch.arange(4), case.target[:4]] += 8
    t = probabilities(case, "one-hot")
    for only, smoothing, by_votes in itertools.product((False, True), (0.0, 0.2), (True, False)):
        options = {"only_correct": only, "label_smoothing": smoothing, "reduction": reduction}
        votes = case.votes if by_votes else None
        hard = run(case.logits, case.target, votes, backend=backend, **options)
        for a, b in zip(run(case.logits, t, votes, backend=backend, **options), hard, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
    weight = torch.rand(11, device=device)  # a mean divides by N here, by the targets' weights there
    hard = run(case.logits, case.target, case.votes, weight=weight, backend=backend, reduction="none")
    soft = run(case.logits, t, case.votes, weight=weight, backend=backend, reduction="none")
    for a, b in zip(soft, hard, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


# What the Zipf term is over ----------------------------------------------------------------------------


def test_mixup_leaves_both_labels_out(backend, device):
    """With and without a floor, and whatever the two labels' own logits."""
    case = make(5, 20, 9, device=device)
    case.target[:] = 4
    plain = torch.zeros(5, 20, device=device)
    plain[:, 4], plain[:, 7] = 0.7, 0.3
    loss, grad = zipf_of(case.logits, plain, case.votes, backend)
    assert (loss > 0).all()
    assert (grad[:, [4, 7]] == 0).all()
    assert (grad != 0).sum() == 5 * 18
    floored = zipf_of(case.logits, 0.9 * plain + 0.1 / 20, case.votes, backend)
    assert torch.equal(floored[0], loss)
    assert torch.equal(floored[1], grad)
    for odd in (30.0, torch.inf, -torch.inf, torch.nan):
        moved = case.logits.clone()
        moved[:, 4], moved[:, 7] = odd, -odd
        other = zipf_of(moved, plain, case.votes, backend)
        assert torch.equal(other[0], loss)
        assert torch.equal(other[1], grad)


def test_fewer_than_two_least_probable_classes(backend, device):
    """No Zipf term, though the sample counts in the mean; the cross-entropy stays."""
    case = make(4, 9, 6, device=device)
    t = probabilities(case, "smoothed")
    t[2] = torch.arange(9.0, device=device).softmax(0)
    loss, grad = zipf_of(case.logits, t, case.votes, backend)
    assert loss[2] == 0
    assert (grad[2] == 0).all()
    assert (loss[[0, 1, 3]] > 0).all()
    mean, _ = zipf_of(case.logits, t, case.votes, backend, reduction="mean")
    torch.testing.assert_close(mean, loss.sum() / 4)
    x = case.leaf()
    F.cross_entropy(x, t, reduction="none")[2].backward()
    got = run(case.logits, t, case.votes, backend=backend, reduction="none")
    torch.testing.assert_close(got[3][2], x.grad[2])
    case.logits[2, 0] = torch.nan  # of the one class that has the least: still no term
    assert zipf_of(case.logits, t, case.votes, backend)[0][2] == 0


def test_uniform_target(backend, device):
    """Every class has the least probability: the label and the softmax are over all of them."""
    case = make(3, 10, 12, device=device)
    loss, grad = zipf_of(case.logits, probabilities(case, "uniform"), case.votes, backend)
    label = zls.rank_votes(case.votes, 10, backend="reference").float().reciprocal()
    label = label / label.sum(1, keepdim=True)
    torch.testing.assert_close(loss, (label * (label.log() - case.logits.log_softmax(1))).sum(1))
    torch.testing.assert_close(grad, case.logits.softmax(1) - label)


def test_odd_logits_in_the_zipf_term(backend, device):
    """-inf with mass: loss +inf, its gradient -p~; NaN and +inf make the row NaN and no other."""
    case = make(4, 12, 9, device=device)
    case.target[:] = 3
    t = probabilities(case, "smoothed")
    _, clean = zipf_of(case.logits, t, case.votes, backend)
    label = case.logits[:, [c for c in range(12) if c != 3]].softmax(1)[1, 6] - clean[1, 7]
    case.logits[1, 7] = -torch.inf
    loss, grad = zipf_of(case.logits, t, case.votes, backend)
    assert loss[1] == torch.inf
    torch.testing.assert_close(grad[1, 7], -label)
    assert grad.isfinite().all()
    for odd in (torch.nan, torch.inf):
        case.logits[1, 7] = odd
        for part in run(case.logits, t, case.votes, backend=backend, reduction="none"):
            assert part[1].isnan().all()
            assert part[[0, 2, 3]].isfinite().all()
    t[2, 5] = torch.nan
    for part in run(case.logits, t, case.votes, backend=backend, reduction="none"):
        assert part[2].isnan().all()
        assert part[[0, 3]].isfinite().all()
    loss, grad = zipf_of(case.logits, t, case.votes, backend)
    assert loss[2].isnan()
    assert grad[2].isnan().all()


def test_all_of_the_least_masked(backend, device):
    case = make(3, 9, 4, device=device)
    t = probabilities(case, "half")
    x = case.logits.masked_fill(t == t.amin(1, keepdim=True), -torch.inf)
    expected = zipf_of(x, t, case.votes, "reference")
    got = zipf_of(x, t, case.votes, backend)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert (got[1][t != t.amin(1, keepdim=True)] == 0).all()


def test_soft_only_correct(backend, device):
    """The argmaxes agree, lowest index on ties in both; none does: 0, and the cross-entropy untouched."""
    x = torch.tensor([[1.0, 2.0, 2.0, 0.0]], device=device).expand(4, 4)
    t = torch.tensor(
        [[0.1, 0.4, 0.4, 0.1], [0.1, 0.1, 0.7, 0.1], [0.4, 0.4, 0.1, 0.1], [0.1, 0.6, 0.1, 0.2]],
        device=device,
    )
    votes = torch.tensor([[3, 3, 0]], dtype=torch.int32, device=device).expand(4, 3)
    every, _ = zipf_of(x, t, votes, backend)
    zipf, grad = zipf_of(x, t, votes, backend, only_correct=True)
    assert zipf.tolist() == [every[0], 0, 0, every[3]]
    assert (grad[1:3] == 0).all()
    mean, _ = zipf_of(x, t, votes, backend, only_correct=True, reduction="mean")
    torch.testing.assert_close(mean, (every[0] + every[3]) / 2)
    loss, ce, zipf, grad = run(x[1:3], t[1:3], votes[1:3], backend=backend, only_correct=True)
    assert zipf == 0
    y = x[1:3].clone().requires_grad_()
    F.cross_entropy(y, t[1:3]).backward()
    torch.testing.assert_close(loss, ce)
    torch.testing.assert_close(grad, y.grad)


# Infinite probabilities ----------------------------------------------------------------------------------

INF = torch.inf


@pytest.mark.parametrize(
    "options",
    [
        {"zipf_weight": 0.5},
        {"zipf_weight": 0, "weight": torch.arange(11.0) + 0.5, "label_smoothing": 0.1},
        {"zipf_weight": 0.5, "weight": torch.arange(11.0), "only_correct": True},
    ],
    ids=["plain", "cross-entropy", "a weight of 0"],
)
def test_infinite_probabilities(backend, device, options):
    """What the reference gives, row by row, in every type; nothing reads the target's values beforehand."""
    z, t, votes = infinite_rows(device)
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
    narrow = {torch.float32: 2e-5, torch.float16: 2e-3}
    for dtype, rounding in (
        narrow.items() if backend == "triton" else [*narrow.items(), (torch.float64, 1e-9)]
    ):
        x, u = z.to(dtype), t.double() if dtype == torch.float64 else t
        expected = run(x, u, votes, backend="reference", reduction="none", **options)
        got = run(x, u, votes, backend=backend, reduction="none", **options)
        for part, a, b in zip(("loss", "ce", "zipf", "gradient"), got, expected, strict=True):
            for name, row, exact in zip(INFINITE, a, b, strict=True):
                torch.testing.assert_close(
                    row, exact, rtol=rounding, atol=rounding, equal_nan=True,
                    msg=lambda m, w=f"{part} of {name!r}, {dtype}": f"{w}: {m}",
                )  # fmt: skip
    for reduction in ("mean", "sum"):
        rows = [0, 1, 3, -1]
        expected = run(z[rows], t[rows], votes[rows], backend="reference", reduction=reduction, **options)
        got = run(z[rows], t[rows], votes[rows], backend=backend, reduction=reduction, **options)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, equal_nan=True)


def test_infinite_probabilities_in_the_reference():
    """F.cross_entropy's answer, but where it is NaN for a p that rounds to 0 or 1."""
    z, t, votes = infinite_rows()
    loss, _, _, grad = run(z, t, votes, backend="reference", zipf_weight=0, reduction="none")
    x = z.requires_grad_()
    expected = F.cross_entropy(x, t, reduction="none")
    expected.sum().backward()
    rows = dict(zip(INFINITE, zip(loss, expected.detach(), grad, x.grad, strict=True), strict=True))
    for name in ("where it dominates", "where another dominates", "negative where it dominates", "far below"):
        loss, _, grad, _ = rows.pop(name)
        infinite = {c for c, share in INFINITE[name][1].items() if abs(share) == INF}
        sign = next(iter(INFINITE[name][1].values()))
        assert loss == sign, name
        assert grad.tolist() == pytest.approx(
            [torch.nan if c in infinite else sign for c in range(11)], nan_ok=True
        ), name
    for name, (loss, theirs, grad, their_grad) in rows.items():
        torch.testing.assert_close(loss, theirs, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(grad, their_grad, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


# Types and layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_target_dtypes(backend, device, dtype):
    """A target of any float type, used in the type of the arithmetic; the loss has the type it always has."""
    case = make(4, 12, 6, device=device, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for kind in DTYPES:
        t = probabilities(case, "mixup of smoothed").to(kind)
        loss, ce, zipf, grad = run(case.logits, t, case.votes, backend=backend)
        assert {loss.dtype, ce.dtype, zipf.dtype} == {wide}
        assert grad.dtype == dtype
        for a, b in zip((loss, grad), run(case.logits, t.to(wide), case.votes, backend=backend)[::3]):
            assert torch.equal(a, b)


def test_soft_strides(backend, device):
    case = make(6, 21, 8, device=device)
    t = probabilities(case, "half")
    expected = run(case.logits, t, case.votes, backend=backend)
    odd = torch.zeros(6, 25, device=device)
    odd[:, 3:24] = t
    for target in (t.t().contiguous().t(), torch.stack([t, t], 2)[..., 1], odd[:, 3:24]):
        x = case.logits.t().contiguous().t()
        for a, b in zip(run(x, target, case.votes, backend=backend), expected, strict=True):
            assert torch.equal(a, b)
    row = run(case.logits, t[:1].expand(6, -1), case.votes, backend=backend)
    copied = run(case.logits, t[:1].repeat(6, 1), case.votes.long(), backend=backend)
    for a, b in zip(row, copied, strict=True):
        assert torch.equal(a, b)


def test_soft_float16_mean_does_not_underflow(backend, device):
    case = make(64, 2000, 20, device=device, scale=1.0)
    t = probabilities(case, "mixup")
    x = case.logits.half().requires_grad_()
    y = case.logits.half().double().requires_grad_()
    (zls.zipf_cross_entropy(x, t, case.votes, backend=backend) * 65536).backward()
    (zls.zipf_cross_entropy(y, t, case.votes, backend="reference") * 65536).backward()
    assert ((x.grad == 0) & (y.grad.abs() > 1e-3)).sum() == 0
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=2e-3, atol=1e-3)


# Autograd, transforms, compile --------------------------------------------------------------------------


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_soft_gradcheck(backend, device, reduction):
    case = make(4, 7, 6, dtype=torch.float64, device=device)
    case.logits[0, case.target[0]] += 9.0
    for kind, options in (
        ("mixup", {"label_smoothing": 0.2, "only_correct": True}),
        ("half", {"weight": torch.rand(7, device=device)}),
    ):
        t = probabilities(case, kind).double()

        def f(x, t=t, options=options):
            return zls.zipf_cross_entropy(x, t, case.votes, backend=backend, reduction=reduction, **options)

        # Interpreted, one random projection of the Jacobian in place of all of its entries.
        assert torch.autograd.gradcheck(f, (case.leaf(),), fast_mode=backend == "triton")


def test_soft_autograd(backend, device):
    """Upstream gradients by sample, a kept graph, no second derivative, no gradient where none is wanted."""
    case = make(4, 9, 5, device=device)
    t, x = probabilities(case, "mixup"), case.leaf()
    rows = zls.zipf_cross_entropy(x, t, case.votes, reduction="none", backend=backend)
    ones = torch.autograd.grad(rows.sum(), x, retain_graph=True)[0]
    scale = torch.tensor([0.0, -2.0, 0.5, 1e4], device=device)
    first = torch.autograd.grad(rows, x, scale, retain_graph=True)[0]
    torch.testing.assert_close(first, ones * scale[:, None], rtol=1e-6, atol=0)
    assert torch.equal(torch.autograd.grad(rows, x, scale)[0], first)
    loss = zls.zipf_cross_entropy(x, t, case.votes, backend=backend)
    g = torch.autograd.grad(loss, x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiated again"):
        (loss + g.pow(2).sum()).backward()
    with torch.no_grad():
        torch.testing.assert_close(zls.zipf_cross_entropy(x, t, case.votes, backend=backend), loss.detach())


def test_soft_transforms(backend, device):
    case = make(4, 9, 5, device=device)
    t = probabilities(case, "mixup")
    expected = run(case.logits, t, case.votes, backend=backend)[3]

    def per_sample(x, t, v):
        return zls.zipf_cross_entropy(x[None], t[None], v[None], zipf_weight=1.0, backend=backend)

    rows = torch.func.vmap(torch.func.grad(per_sample))(case.logits, t, case.votes)
    torch.testing.assert_close(rows / 4, expected)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(
            lambda x: zls.zipf_loss(x, t, case.votes, backend=backend), (case.logits,), (case.logits,)
        )


def test_soft_compile_with_a_dynamic_batch(backend, device):
    def step(x, t, v):
        return zls.zipf_cross_entropy(x, t, v, label_smoothing=0.1, backend=backend) * 3

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled, graphs = torch.compile(step, backend=counter, fullgraph=True, dynamic=True), 0
    for N in (6, 4, 9):
        case = make(N, 12, 9, device=device)
        t, grads = probabilities(case, "mixup"), []
        for f in (step, compiled):
            x = case.leaf()
            loss = f(x, t, case.votes)
            loss.backward()
            grads.append((loss.detach(), x.grad))
        torch.testing.assert_close(grads[1], grads[0])
        graphs = counter.frame_count if N == 6 else graphs
    assert counter.frame_count == graphs, "the first batch's graphs serve every batch size"


# The module, the head --------------------------------------------------------------------------------


def test_soft_module(device):
    """ZipfLoss takes a soft target in every form of call; so do the deep heads."""
    case = make(5, 8, 6)
    criterion = zls.ZipfLoss(0.3, label_smoothing=0.1, weight=torch.rand(8))
    heads = [torch.randn(5, 8), torch.randn(5, 8).bfloat16()]
    for kind in DTYPES:
        t = probabilities(case, "mixup").to(kind)
        options = {"weight": criterion.weight, "label_smoothing": 0.1}
        expected = zls.zipf_cross_entropy(case.logits, t, case.votes, zipf_weight=0.3, **options)
        assert torch.equal(criterion(case.logits, t, case.votes), expected)
        assert torch.equal(criterion((case.logits, case.votes), t), expected)
        beta = sum(F.cross_entropy(h.float(), t.float(), **options) for h in heads)
        deep = criterion((case.logits, case.votes, heads), t)
        assert deep.dtype == torch.float32
        torch.testing.assert_close(deep, expected + 0.1 * beta)


def test_soft_head_loss(backend, device):
    features, weight = torch.randn(3, 6, 4, 4, device=device), torch.randn(9, 6, device=device)
    t = torch.rand(3, 9, device=device).round()
    loss = zls.zipf_head_loss(features, weight, None, t, backend=backend)
    votes = zls.dense_vote(features, weight, backend=backend)
    logits = F.linear(features.mean((2, 3)), weight)
    torch.testing.assert_close(loss, zls.zipf_cross_entropy(logits, t, votes, backend=backend))


# What is refused ---------------------------------------------------------------------------------------

X, T = torch.randn(4, 6), torch.rand(4, 6)
V = torch.zeros(4, 3, dtype=torch.int32)
BAD = [
    (
        lambda: zls.zipf_loss(X, T[:3], V),
        ValueError,
        r"target must have shape \(4,\).*\(4, 6\), prob.*got \(3, 6\)",
    ),
    (lambda: zls.zipf_loss(X, T[:, :5], V), ValueError, r"target must have shape .*got \(4, 5\)"),
    (
        lambda: zls.zipf_loss(X, T[:, 0], V),
        TypeError,
        "target must be int64 class indices, got torch.float32",
    ),
    (lambda: zls.zipf_loss(X, T[None], V), ValueError, r"target must have shape .*got \(1, 4, 6\)"),
    (lambda: zls.zipf_loss(X, T.long(), V), TypeError, "target must be float32.*got torch.int64"),
    (lambda: zls.zipf_loss(X, T.bool(), V), TypeError, "target must be float32.*got torch.bool"),
    (lambda: zls.zipf_loss(X, T.to("meta"), V), ValueError, "target must be on the device of logits"),
    (lambda: zls.zipf_loss(X, T, V, ignore_index=0), ValueError, "ignore_index must be left out"),
    (lambda: zls.ZipfLoss(ignore_index=3)(X, T, V), ValueError, "ignore_index must be left out.*got 3"),
    (lambda: zls.zipf_loss(X, T.clone().requires_grad_(), V), ValueError, "target must not require grad"),
    (lambda: zls.zipf_loss(X, T, V + 6), IndexError, r"votes\[0, 0\] = 6 is outside \[0, 6\)"),
    (lambda: zls.zipf_loss(X, T, V + 6, backend="reference"), IndexError, r"votes\[0, 0\] = 6 is outside"),
    (lambda: zls.zipf_label(T, V, 6), ValueError, r"target must have shape \(N,\), got \(4, 6\)"),
    (
        lambda: checks.loss_inputs(X, T, V, shard=True),
        ValueError,
        r"target must be class indices \(4,\) for cl",
    ),
    (lambda: zls.check_inputs(X, T, V + 6), IndexError, r"votes\[0, 0\] = 6 is outside"),
    (lambda: zls.check_inputs(X, T, V, ignore_index=3), ValueError, "ignore_index must be left out"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_soft_target_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_soft_target_is_accepted():
    assert zls.check_inputs(X, T, V - 1) is None
    assert zls.check_inputs(X, T.half()) is None
    assert zls.zipf_loss(X, T, V, ignore_index=-1).isfinite()


def test_soft_target_with_a_gradient_is_refused_under_transforms():
    with pytest.raises(ValueError, match="target must not require grad"):
        torch.func.grad(lambda t: zls.zipf_loss(X, t, V))(T)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_out_of_range_vote_poisons_its_row_on_a_gpu():
    votes = V.cuda()
    votes[1, 2] = 6
    loss, _, _, grad = run(X.cuda(), T.cuda(), votes, backend=None, reduction="none")
    assert loss.isnan().tolist() == grad.isnan().all(1).tolist() == [False, True, False, False]
    assert grad[[0, 2, 3]].isfinite().all()


def test_a_backend_that_is_not_here_says_so():
    with pytest.raises(RuntimeError, match="backend='cuda' cannot"):
        zls.zipf_loss(X, T, V, backend="cuda")
