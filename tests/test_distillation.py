"""distillation_loss: the authors' outputs, the formulas again by autograd, what bites in published code."""

from __future__ import annotations

import itertools

import golden_methods
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, error

import zipfls_cuda as zls
from zipfls_cuda import functional, ops

REDUCTIONS = ("mean", "sum", "none")
TERMS = ("ce_weight", "kd_weight", "tckd_weight", "nckd_weight", "soft_target_weight")
ALL = dict(zip(TERMS, (0.7, 0.3, 1.1, 2.0, 0.4), strict=True))


@pytest.fixture(autouse=True)
def _served(request):
    """Skips the backends that have no kernel for it."""
    if "backend" in request.fixturenames:
        backend, device = request.getfixturevalue("backend"), request.getfixturevalue("device")
        reason = ops.refusal(backend, "distill_fwd", device.type, torch.float32)
        if reason:
            pytest.skip(f"{backend}: {reason}")


def make(N=5, C=9, dtype=torch.float32, device="cpu", scale=2.0):
    """(logits, teacher, target)"""
    g = torch.Generator().manual_seed(1)
    z, t = (torch.randn(N, C, generator=g, dtype=torch.float64) * scale for _ in range(2))
    return z.to(device, dtype), t.to(device, dtype), torch.randint(C, (N,), generator=g).to(device)


def run(z, t, y, upstream=None, function=zls.distillation_loss, **options):
    """(loss, gradient)"""
    x = z.detach().clone().requires_grad_()
    loss = function(x, t, y, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), x.grad


def literal(
    z, t, y, *, temperature=1.0, ce_weight=1.0, form="divergence", sample_weight=1.0, reduction="mean",
    kd_weight=0.0, tckd_weight=0.0, nckd_weight=0.0, soft_target_weight=0.0,
):  # fmt: skip
    """The formulas as they are written, by softmax and autograd: for logits of a few units, in float64."""
    kept = y != -100
    onehot = F.one_hot(y.clamp(min=0), z.shape[1]).bool()
    T = temperature

    def divergence(q, p):
        p, log_q = p.where(q > 0, 1.0), q.where(q > 0, 1.0).log() * (form == "divergence")
        return (q * (log_q - p.log())).sum(1)

    def two(x):
        x = (x / T).softmax(1)
        return torch.stack([x[onehot], x.masked_fill(onehot, 0).sum(1)], 1)

    p, q = (z / T).softmax(1), (t / T).softmax(1)
    p_hat, q_hat = ((x / T).masked_fill(onehot, -torch.inf).softmax(1) for x in (z, t))
    ce = -z.log_softmax(1)[onehot]
    loss = (ce_weight + soft_target_weight * t.softmax(1)[onehot]) * ce
    distilled = kd_weight * divergence(q, p) + tckd_weight * divergence(two(t), two(z))
    loss = (loss + T**2 * sample_weight * (distilled + nckd_weight * divergence(q_hat, p_hat))) * kept
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / kept.sum()}[reduction]


# The authors' outputs -------------------------------------------------------------------------------------


def options_of(meta, C, z, t, y):
    """distillation_loss's options that give what the authors' function gives."""
    p, function = meta["params"], meta["function"]
    if function in ("mdistiller_kd", "zipfls_cskd"):
        return {"temperature": p.get("temperature") or p["temp_factor"], "ce_weight": 0, "kd_weight": 1}
    if function == "mdistiller_kd_total":
        return {name: p[name] for name in ("temperature", "ce_weight", "kd_weight")}
    if function == "cskd_step":
        return {"temperature": p["temp"], "kd_weight": p["lamda"]}
    if function.startswith("mdistiller_dkd"):
        warm = min(p["epoch"] / p["warmup"], 1) if "warmup" in p else 1
        return {
            "temperature": p["temperature"],
            "ce_weight": p.get("ce_weight", 0),
            "tckd_weight": warm * p["alpha"],
            "nckd_weight": warm * p["beta"],
        }
    if function == "nkd":
        return {"temperature": p["temp"], "ce_weight": 0, "soft_target_weight": 1, "nckd_weight": p["gamma"],
                "form": "cross_entropy"}  # fmt: skip
    if function == "wsld":
        ce, of_teacher = (
            zls.distillation_loss(x, x, y, reduction="none", backend="reference") for x in (z, t)
        )
        weight = -torch.expm1(-ce / (of_teacher + 1e-7))
        return {"temperature": p["temp"], "ce_weight": 0, "kd_weight": p["alpha"], "form": "cross_entropy",
                "sample_weight": weight}  # fmt: skip
    a = p["alpha"]  # Tf-KD: a mean over N * C
    return {
        "temperature": p["temperature"],
        "ce_weight": 1 - a,
        "kd_weight": a * p.get("multiplier", 1) / C,
    }


GOLDEN = golden_methods.cases(
    "mdistiller_kd", "mdistiller_kd_total", "mdistiller_dkd", "mdistiller_dkd_total", "nkd", "wsld",
    "zipfls_cskd", "cskd_step", "tfkd_self", "tfkd_kd",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("golden", GOLDEN, ids=str)
def test_golden(backend, device, golden, dtype):
    a = golden.inputs(dtype, device)
    z, t, y = a["logits"], a["teacher"], a["target"]
    options = options_of(golden.meta, z.shape[1], z, t, y)
    loss, grad = run(z, t, y, backend=backend, **options)
    golden.check("loss", loss)
    golden.check("grad", grad)
    if golden.meta["function"] in ("mdistiller_kd", "zipfls_cskd"):  # KL(q || p) knows no target
        loss, grad = run(z, t, None, backend=backend, **options)
        golden.check("loss", loss)
        golden.check("grad", grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("golden", GOLDEN[:20], ids=str)
def test_golden_of_16_bits(backend, device, golden, dtype):
    """Against the float64 formula of the rounded inputs, within the rounding of the gradient."""
    a = golden.inputs(dtype, device)
    z, t, y = a["logits"], a["teacher"], a["target"]
    options = options_of(golden.meta, z.shape[1], z.double(), t.double(), y)
    loss, grad = run(z, t, y, backend=backend, **options)
    expected, wide = run(z.double(), t.double(), y, backend="reference", **options)
    scale = golden.meta["grad_scale"]
    assert abs(loss.double() - expected) <= 1e-6 * max(golden.meta["loss_scale"], abs(expected))
    eps = torch.finfo(dtype).eps / (1 if dtype == torch.float16 else 2)  # stored, then divided by N
    allowed = wide.abs() * eps + 1e-6 * max(scale, wide.abs().max().item())
    assert ((grad.double() - wide).abs() <= allowed).all()


# The formulas, term by term -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["divergence", "cross_entropy"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("terms", [*({name: 1.3} for name in TERMS), ALL], ids=lambda x: "+".join(x))
def test_formula(backend, device, terms, reduction, form):
    for C, T in ((2, 4.0), (9, 1.0), (9, 2.5), (40, 4.0)):
        z, t, y = make(6, C, torch.float64, device)
        y[2] = -100
        weight = torch.rand(6, dtype=torch.float64, device=device)
        upstream = torch.rand(6 if reduction == "none" else (), dtype=torch.float64, device=device)
        options = {"ce_weight": 0.0, **terms, "temperature": T, "form": form, "reduction": reduction}
        for more in ({}, {"sample_weight": weight}):
            loss, grad = run(z, t, y, upstream, backend=backend, **options, **more)
            expected, wanted = run(z, t, y, upstream, function=literal, **options, **more)
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(backend, device, dtype):
    """Rows of any length that start anywhere, at every T that has a path of its own, against float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ways = itertools.cycle(
        itertools.product((1.0, 2.0, 4.0, 1.5), REDUCTIONS, ("divergence", "cross_entropy"))
    )
    for C in (*range(2, 36), 63, 64, 65, 127, 300, 1003, 33003):
        T, reduction, form = next(ways)
        z, t, y = make(5, C + 2, torch.float64, device, scale=4.0)
        z, t, y = z.to(dtype)[:, 1 : C + 1], t.to(dtype if C % 2 else wide)[:, 2:], y % C
        y[1], y[3] = C - 1, -100
        z[2, 0] = t[2, 0] = -torch.inf if y[2] else 0.0
        weight = torch.rand(5, device=device, dtype=wide) if C % 3 else None
        options = {"temperature": T, "reduction": reduction, "form": form, **ALL}
        loss, grad = run(z, t, y, sample_weight=weight, backend=backend, **options)
        weight = None if weight is None else weight.double()
        expected, exact = run(z.double(), t.double(), y, sample_weight=weight, backend="reference", **options)
        size = max(1.0, T) ** 2 * max(1.0, expected.abs().max().item())
        assert error(loss, expected) <= 16 * torch.finfo(wide).eps * size, (C, T, reduction, form)
        size = max(1.0, T) * sum(ALL.values()) * torch.finfo(wide).eps * (1 if reduction != "mean" else 0.25)
        stored = 2 * torch.finfo(dtype).eps * exact.abs().max().item()
        assert error(grad, exact) <= 16 * size + stored, (C, T, reduction, form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teacher", DTYPES, ids=str)
def test_dtypes(backend, device, dtype, teacher):
    z, t, y = make(5, 30, torch.float64, device)
    z, t = z.to(dtype), t.to(teacher)
    loss, grad = run(z, t, y, temperature=2.0, backend=backend, **ALL)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    assert grad.is_contiguous()
    wide_t = t.double() if dtype == torch.float64 else t.float().double()
    expected, wanted = run(z.double(), wide_t, y, function=literal, temperature=2.0, **ALL)
    exact = dtype == torch.float64
    torch.testing.assert_close(loss.double(), expected, rtol=1e-12 if exact else 1e-6, atol=0)
    eps = torch.finfo(dtype).eps
    assert error(grad, wanted) <= (1e-12 if exact else eps * wanted.abs().max().item() + 2e-7)


def test_gradcheck(backend, device):
    z, t, y = make(4, 7, torch.float64, device)
    y[3] = -100
    for reduction in REDUCTIONS:
        for form in ("divergence", "cross_entropy"):
            options = {"temperature": 3.0, "form": form, "reduction": reduction, "backend": backend, **ALL}
            f = lambda x, o=options: zls.distillation_loss(x, t, y, **o)  # noqa: E731
            assert torch.autograd.gradcheck(f, (z.clone().requires_grad_(),))


def test_parts(backend, device):
    """loss = ce_weight * ce + distillation; the parts are detached, the cross-entropy is PyTorch's."""
    z, t, y = make(device=device)
    y[1] = -100
    for reduction in REDUCTIONS:
        x = z.clone().requires_grad_()
        options = {"temperature": 2.0, "reduction": reduction, "backend": backend}
        loss, ce, rest = zls.distillation_loss(x, t, y, return_parts=True, **options, **ALL)
        assert [part.requires_grad for part in (loss, ce, rest)] == [True, False, False]
        torch.testing.assert_close(ce, F.cross_entropy(z, y, reduction=reduction))
        torch.testing.assert_close(loss.detach(), ALL["ce_weight"] * ce + rest)
        alone = zls.distillation_loss(z, t, y, **options, **{**ALL, "ce_weight": 0})
        torch.testing.assert_close(rest, alone)


def test_kl_is_pytorchs(backend, device):
    z, t, _ = make(dtype=torch.float64, device=device)
    loss = zls.distillation_loss(z, t, None, ce_weight=0, kd_weight=1, temperature=3, backend=backend)
    p, q = ((x / 3).log_softmax(1) for x in (z, t))
    expected = 9 * F.kl_div(p, q, reduction="batchmean", log_target=True)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_num_items(backend, device):
    z, t, y = make(device=device)
    whole = run(z, t, y, kd_weight=1.0, backend=backend)
    for n in (5, torch.tensor(5)):
        parts = [run(z[a], t[a], y[a], kd_weight=1.0, num_items=n, backend=backend)
                 for a in (slice(2), slice(2, 5))]  # fmt: skip
        torch.testing.assert_close(sum(part[0] for part in parts), whole[0])
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole[1])


def test_ignored_samples(backend, device):
    """Loss and gradient 0, whatever their rows hold; all ignored: as F.cross_entropy."""
    z, t, y = make(device=device)
    y[1] = -100
    z[1, 0] = t[1, 3] = torch.nan
    kept = torch.tensor([0, 2, 3, 4], device=device)
    options = {"temperature": 2.0, "backend": backend, **ALL}
    for reduction in REDUCTIONS:
        loss, grad = run(z, t, y, reduction=reduction, **options)
        expected, wanted = run(z[kept], t[kept], y[kept], reduction=reduction, **options)
        torch.testing.assert_close(loss[kept] if reduction == "none" else loss, expected)
        assert (loss[1] == 0) if reduction == "none" else True
        torch.testing.assert_close(grad[kept], wanted)
        assert (grad[1] == 0).all()
        loss, grad = run(z, t, torch.full_like(y, -100), reduction=reduction, **options)
        assert loss.isnan() if reduction == "mean" else (loss == 0).all()
        assert (grad == 0).all()
        loss, grad = run(z[:0], t[:0], y[:0], reduction=reduction, **options)
        torch.testing.assert_close(loss, F.cross_entropy(z[:0], y[:0], reduction=reduction), equal_nan=True)
        assert grad.shape == (0, 9)


def test_target_out_of_range(backend, device):
    z, t, y = make(device=device)
    y[2] = 9
    raising = device.type == "cpu" and backend != "triton"
    if raising:
        with pytest.raises(IndexError, match=r"target\[2\] = 9 is outside \[0, 9\)"):
            zls.distillation_loss(z, t, y, backend=backend)
        return
    loss, grad = run(z, t, y, reduction="none", backend=backend, **ALL)
    assert loss.isnan().tolist() == [i == 2 for i in range(5)]
    assert grad[2].isnan().all()
    assert grad[[0, 1, 3, 4]].isfinite().all()


# What bites in published code -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ahead", [100.0, 200.0, 800.0, 1500.0, 5000.0, -100.0, -1500.0])
def test_the_target_far_ahead_or_behind(backend, device, ahead, dtype):
    """No log of a probability that underflows (1), no large number in place of leaving the target out (2)."""
    z, t, y = make(4, 9, torch.float64, device)
    for far_z, far_t in ((ahead, 0.0), (0.0, ahead), (ahead, ahead * 0.9)):
        x, s = (a.scatter_add(1, y[:, None], torch.full((4, 1), b, dtype=a.dtype, device=device)).to(dtype)
                for a, b in ((z, far_z), (t, far_t)))  # fmt: skip
        loss, grad = run(x, s, y, temperature=1.0, backend=backend, **ALL)
        assert loss.isfinite()
        assert grad.isfinite().all()
        wide = run(x.double(), s.double(), y, temperature=1.0, backend=backend, **ALL)
        nckd = {"ce_weight": 0, "nckd_weight": 1, "backend": backend}  # which the target has no part in
        torch.testing.assert_close(
            run(x, s, y, **nckd), run(x.scatter(1, y[:, None], 0), s.scatter(1, y[:, None], 0), y, **nckd)
        )
        torch.testing.assert_close(loss.double(), wide[0], rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(grad.double(), wide[1], rtol=2e-6, atol=1e-6)


def test_classes_masked_in_both_rows(backend, device):
    """They take no part (3): the result of the rows without them."""
    z, t, y = make(4, 9, torch.float64, device)
    y[:] = torch.tensor([0, 3, 4, 5], device=device)
    kept = torch.tensor([0, 1, 3, 4, 5, 8], device=device)
    masked = [2, 6, 7]
    z[:, masked] = t[:, masked] = -torch.inf
    for form in ("divergence", "cross_entropy"):
        options = {"temperature": 2.0, "form": form, "backend": backend, **ALL}
        loss, grad = run(z, t, y, **options)
        expected, wanted = run(z[:, kept], t[:, kept], torch.searchsorted(kept, y), **options)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(grad[:, kept], wanted)
        assert (grad[:, masked] == 0).all()


def test_masked_targets_and_masked_rows(backend, device):
    """-inf at the target, at all the others, in one row or both: 0 or +inf, and gradients that are finite."""
    inf = torch.inf
    z = torch.tensor([[-inf, 1, 2], [3, -inf, -inf], [1, 2, 3], [3, -inf, -inf], [-inf, 1, 2], [1, -inf, 3]])
    t = torch.tensor([[-inf, 2, 1], [1, -inf, -inf], [3, -inf, -inf], [1, 2, 3], [1, 2, 3], [1, 2, 3.0]])
    y, soft = torch.zeros(6, dtype=torch.int64), {"ce_weight": 0, "reduction": "none", "backend": backend}
    z, t, y = z.to(device, torch.float64), t.to(device, torch.float64), y.to(device)
    kl = (t.softmax(1) * (t.log_softmax(1) - z.log_softmax(1))).masked_fill(t == -inf, 0).sum(1)
    loss, grad = run(z, t, y, kd_weight=1, **soft)
    torch.testing.assert_close(loss, kl)
    assert kl.isinf().tolist() == [False, False, False, True, True, True]
    torch.testing.assert_close(grad, z.softmax(1) - t.softmax(1))
    loss, grad = run(z, t, None, kd_weight=1, **soft)
    torch.testing.assert_close(loss, kl)
    torch.testing.assert_close(grad, z.softmax(1) - t.softmax(1))
    loss, grad = run(z, t, y, tckd_weight=1, **soft)
    assert loss.isinf().tolist() == [False, False, False, True, True, False]
    assert (loss[:2] == 0).all()
    assert grad.isfinite().all()
    loss, grad = run(z, t, y, nckd_weight=1, **soft)
    assert loss.isinf().tolist() == [False, False, False, True, False, True]
    assert (loss[1:3] == 0).all(), "no class but the target, in one row or both"
    assert (grad[1:3] == 0).all()
    assert grad.isfinite().all()
    loss, grad = run(z, t, y, soft_target_weight=1, **soft)
    assert loss.isfinite().tolist() == [True, True, True, True, False, True]
    assert grad.isfinite().all()


def test_what_is_small_keeps_its_digits(backend, device):
    """KD of confident networks at T = 1 in float32 (4): p and q agree to 2e-9 at the target."""
    for ahead in (20.0, 25.0):
        z, t, y = make(64, 100, torch.float32, device, scale=1.0)
        x, s = (a.scatter(1, y[:, None], ahead) for a in (z, t))
        loss, grad = run(x, s, y, ce_weight=0, kd_weight=1, backend=backend)
        expected, wanted = run(x.double(), s.double(), y, ce_weight=0, kd_weight=1, backend="reference")
        theirs = F.kl_div(x.log_softmax(1), s.softmax(1), reduction="batchmean")
        assert abs(loss - expected) < 2e-6 * expected < abs(theirs - expected)
        assert error(grad, wanted) < 2e-6 * wanted.abs().max()


def test_two_classes(backend, device):
    """NCKD is 0, and DKD is alpha T^2 TCKD (5)."""
    for dtype in DTYPES:
        z, t, y = make(6, 2, dtype, device, scale=4.0)
        options = {"ce_weight": 0, "temperature": 4.0, "backend": backend}
        loss, grad = run(z, t, y, nckd_weight=8, **options)
        assert loss == 0
        assert (grad == 0).all()
        dkd = run(z, t, y, nckd_weight=8, tckd_weight=0.5, **options)
        kd = run(z, t, y, kd_weight=0.5, **options)
        torch.testing.assert_close(dkd, kd)


def test_offsets_change_nothing(backend, device):
    z, t, y = make(5, 30, torch.float64, device)
    z, t = z.mul(64).round() / 64, t.mul(64).round() / 64  # exact at the offset too
    expected = run(z.float(), t.float(), y, temperature=4.0, backend=backend, **ALL)
    moved = run(z.float() + 1e4, t.float() - 1e4, y, temperature=4.0, backend=backend, **ALL)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)


def test_a_nan_or_infinity_is_its_samples_alone(backend, device):
    for where, value, c in itertools.product(range(2), (torch.nan, torch.inf), (0, 4)):
        z, t, y = make(device=device)
        (z, t)[where][2, (y[2] + c) % 9] = value
        loss, grad = run(z, t, y, reduction="none", temperature=2.0, backend=backend, **ALL)
        assert loss.isnan().tolist() == [i == 2 for i in range(5)]
        assert grad.isnan().all(1).tolist() == [i == 2 for i in range(5)]
        assert grad[[0, 1, 3, 4]].isfinite().all()
    torch.testing.assert_close(  # a teacher that no term asks for is not looked at
        run(z, t, y, backend=backend), run(z, z, y, backend=backend)
    )


def test_sample_weight_of_zero(backend, device):
    """It switches the distillation of a sample off, be it infinite."""
    z, t, y = make(device=device)
    z[2, (y[2] + 1) % 9] = -torch.inf
    weight = torch.tensor([1.0, 1, 0, 1, 1], device=device)
    options = {"kd_weight": 1.0, "reduction": "none", "backend": backend}
    loss, grad = run(z, t, y, sample_weight=weight, **options)
    plain, wanted = run(z, t, y, **options)
    assert plain[2].isinf()
    torch.testing.assert_close(loss[2], F.cross_entropy(z[2], y[2]))
    torch.testing.assert_close(grad[2], z[2].softmax(0) - F.one_hot(y[2], 9))
    rows = [0, 1, 3, 4]
    assert torch.equal(loss[rows], plain[rows])
    assert torch.equal(grad[rows], wanted[rows])


@pytest.mark.parametrize("C", [9, 64, 3000])
def test_rows_of_a_table(backend, device, C):
    """teacher_index: as with the rows taken before, whatever their type and strides."""
    z, _, y = make(5, C, device=device)
    table, index = make(7, C, device=device)[1], torch.tensor([6, 0, 0, 3, 5], device=device)
    weight = torch.rand(5, device=device)
    y[3] = -100
    for dtype in DTYPES:
        for given in (table, table.to(torch.bfloat16), table.t().contiguous().t()):
            options = {"temperature": 2.0, "sample_weight": weight, "backend": backend, **ALL}
            x = z.to(dtype)
            ours = run(x, given, y, teacher_index=index, **options)
            theirs = run(x, given[index], y, **options)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    options = {"ce_weight": 0.0, "kd_weight": 1.0, "backend": backend, "reduction": "none"}
    ours, theirs = run(z, table, None, teacher_index=index, **options), run(z, table[index], None, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_table_in_the_memory_of_the_logits(backend, device):
    """inplace=True: a row that another sample's gradient overwrites is copied before."""
    for C in (9, 64):
        z, _, y = make(5, C, device=device)
        index = torch.tensor([4, 0, 0, 3, 1], device=device)
        options = {"backend": backend, "temperature": 2.0, **ALL}
        for by_index in (True, False):
            expected = run(z, z[index] if by_index else z[:1].expand_as(z), y, **options)[1]
            logits = z.clone().requires_grad_() * 1
            teacher = logits.detach() if by_index else logits.detach()[:1].expand_as(z)
            options["teacher_index"] = index if by_index else None
            zls.distillation_loss(logits, teacher, y, inplace=True, **options).backward()
            del options["teacher_index"]
            torch.testing.assert_close(logits.detach(), expected, rtol=1e-6, atol=1e-7)


def test_index_out_of_range(backend, device):
    """IndexError on the CPU, NaN of that sample elsewhere; an ignored sample's index is not read."""
    for C in (9, 64):
        z, _, y = make(5, C, device=device)
        table = make(3, C, device=device)[1]
        for bad in (-1, 3, 2**40):
            index = torch.tensor([0, bad, 2, 1, 1], device=device)
            options = {"teacher_index": index, "reduction": "none", "backend": backend, **ALL}
            if device.type == "cpu" and backend in ("reference", "cpu"):
                with pytest.raises(IndexError, match=rf"teacher_index\[1\] = {bad} is outside \[0, 3\)"):
                    run(z, table, y, **options)
            else:
                loss, grad = run(z, table, y, **options)
                assert loss.isnan().tolist() == grad.isnan().all(1).tolist() == [False, True, *[False] * 3]
            ignored = y.clone()
            ignored[1] = -100
            loss, grad = run(z, table, ignored, **options)
            assert loss[1] == 0
            assert (grad[1] == 0).all()
            assert grad.isfinite().all()


def test_bitwise_repeatable_and_whatever_the_strides(backend, device):
    z, t, y = make(64, 200, device=device)
    weight = torch.rand(64, device=device)
    options = {"temperature": 4.0, "reduction": "none", "backend": backend, **ALL}
    first = run(z, t, y, sample_weight=weight, **options)
    threads = torch.get_num_threads()
    for n in (1, 2, threads):
        torch.set_num_threads(n)
        again = run(z, t, y, sample_weight=weight, **options)
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    views = (z.T.contiguous().T, torch.stack([t, t], 2)[..., 0], y.repeat_interleave(2)[::2])
    for i, view in enumerate(views):
        args = [z, t, y]
        args[i] = view
        loss, grad = run(*args, sample_weight=torch.stack([weight, weight], 1)[:, 1], **options)
        torch.testing.assert_close((loss, grad), first, rtol=1e-5, atol=1e-6)
        assert grad.is_contiguous() or i == 0


# What zls.methods needs beside it: functional.distill ------------------------------------------------------

METHODS = {
    "max": {"max_weight": 0.7},
    "max and all": {"max_weight": 0.7, **ALL},
    "probabilities": {"form": "probabilities", "kd_weight": 1.3},
    "MaxSup": {"form": "probabilities", "ce_weight": 1.0, "kd_weight": 1.0, "max_weight": 1.0},
    "everything": {"form": "probabilities", "max_weight": 0.7, **ALL},
    "weights alone": {"ce_weight": 1.0, "form": "probabilities"},
}
of_methods = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)


def literal_of_methods(
    z, t, y, *, temperature=1.0, form="divergence", sample_weight=None, teacher_index=None, ce_weight=0.0,
    kd_weight=0.0, tckd_weight=0.0, nckd_weight=0.0, soft_target_weight=0.0, max_weight=0.0,
    reduction="mean",
):  # fmt: skip
    """The formulas as they are written, by softmax, argmax and autograd, in float64."""
    t = t if teacher_index is None else t[teacher_index]
    kept, T, c = y != -100, temperature, y.clamp(min=0)[:, None]
    onehot = F.one_hot(c[:, 0], z.shape[1]).bool()
    mass = share = w = torch.ones(len(z), dtype=z.dtype, device=z.device)
    q, q_1 = (t / T).softmax(1), t.softmax(1)
    if sample_weight is not None:
        share, w = sample_weight.unbind(1) if sample_weight.dim() == 2 else (share, sample_weight)
    if form == "probabilities":
        mass = t.sum(1)
        empty = mass == 0
        q = q_1 = torch.where(empty[:, None], onehot.to(t.dtype), t / mass.where(~empty, 1.0)[:, None])
        if sample_weight is not None and sample_weight.dim() == 2:
            share = torch.where(empty, share + w, share)

    def divergence(q, log_p):
        log_q = q.where(q > 0, 1.0).log() * (form == "divergence")
        return (q * (log_q - log_p.masked_fill(q == 0, 0.0))).sum(1)

    def two(q):
        return torch.stack([q[onehot], q.masked_fill(onehot, 0).sum(1)], 1)

    q_hat = q.masked_fill(onehot, 0)
    q_hat = q_hat / q_hat.sum(1, keepdim=True).clamp(min=1e-300)
    kl, tckd, nckd = (
        divergence(q, (z / T).log_softmax(1)),
        divergence(two(q), two((z / T).softmax(1)).log()),
        divergence(q_hat, (z / T).masked_fill(onehot, -torch.inf).log_softmax(1)),
    )
    each = share * (ce_weight + soft_target_weight * q_1[onehot]) * -z.log_softmax(1)[onehot]
    each = each + T**2 * w * mass * (kd_weight * kl + tckd_weight * tckd + nckd_weight * nckd)
    largest = z.gather(1, z.detach().argmax(1, keepdim=True)) - z.gather(1, c)  # of equal ones the lowest
    each = (each + max_weight * w * largest[:, 0]) * kept
    return {"none": each, "sum": each.sum(), "mean": each.sum() / kept.sum()}[reduction]


def of_form(t, options):
    """A teacher of logits, or labels of any sum instead, one row of them 0."""
    if options.get("form") != "probabilities":
        return t
    return t.softmax(1) * torch.arange(len(t), dtype=t.dtype, device=t.device)[:, None] / 3


def several_weights(N, dtype, device):
    """None, of a sample, and both in all strides that a caller may give."""
    w = torch.rand(N, 2, dtype=dtype, device=device) + 0.1
    spaced = torch.zeros(2 * N, 6, dtype=dtype, device=device)[::2, 1::3].copy_(w)
    return None, w[:, 0], w, w[0].expand(N, 2), w.T.contiguous().T, spaced, w[:1, :1].expand(N, 2)


def with_ties(z, y):
    """Every tie of the largest logit with the target's class, below and above it, and none."""
    z, y = z.clone(), y.clone()
    C = z.shape[1]
    top = z.amax(1) + 1
    y[0], z[0, 0] = 0, top[0]  # the target alone
    y[1], z[1, 0], z[1, C - 1] = 0, top[1], top[1]  # it is the lowest of two
    y[2], z[2, 0], z[2, C - 1] = C - 1, top[2], top[2]  # it is not
    z[3, C // 2 :] = top[3]  # many
    y[4], z[4, C - 1] = 0, top[4]  # the last
    return z, y


@of_methods
def test_options_of_methods(backend, device, options):
    """Held and streamed rows, ties of the maximum, a row of 0, all weights and strides, all reductions."""
    for C, T, reduction in ((2, 1.0, "mean"), (9, 2.5, "none"), (40, 1.0, "sum"), (1500, 1.0, "none")):
        z, t, y = make(7, C, torch.float64, device)
        z, y = with_ties(z, y)
        y[5] = -100
        t, index = of_form(t, options), torch.tensor([3, 0, 6, 2, 2, 1, 0], device=device)
        upstream = torch.rand(7 if reduction == "none" else (), dtype=torch.float64, device=device)
        given = {"temperature": T, "reduction": reduction, **options}
        weights = several_weights(7, torch.float64, device)
        for k, weight in enumerate(weights if C == 9 else weights[:1] + weights[2:3]):
            more = {"sample_weight": weight, "teacher_index": index if k % 2 else None}
            loss, grad = run(z, t, y, upstream, function=functional.distill, backend=backend, **given, **more)
            expected, wanted = run(z, t, y, upstream, function=literal_of_methods, **given, **more)
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


@of_methods
def test_options_of_methods_in_every_type_and_width(backend, device, options):
    """Against float64; rows that start anywhere; stores of any type, read where they are or gathered."""
    for C, dtype, teacher in (
        *((C, torch.float32, torch.float32) for C in (2, 7, 16, 17, 33, 63, 1003)),
        *((C, torch.bfloat16, torch.float32) for C in (40, 65)),
        *((C, torch.float16, torch.bfloat16) for C in (64, 77)),
        (2056, torch.float16, torch.float32),
    ):
        z, t, y = make(5, C + 2, torch.float64, device)
        z, y = z.to(dtype)[:, 1 : C + 1] if C % 8 else z.to(dtype)[:, :C].contiguous(), y % C
        t = of_form(t[:, :C].contiguous(), options).to(teacher)
        y[1] = -100
        wide = torch.float32
        weight = torch.rand(5, 2, device=device, dtype=wide)
        index = torch.tensor([4, 4, 0, 1, 2], device=device)
        given = {"sample_weight": weight, "teacher_index": index, **options}
        loss, grad = run(z, t, y, function=functional.distill, backend=backend, **given)
        given["sample_weight"] = weight.double()
        expected, exact = run(z.double(), t.double(), y, function=literal_of_methods, **given)
        assert (loss.dtype, grad.dtype) == (wide, dtype)
        assert error(loss, expected) <= 2e-6 * max(1.0, expected.abs().item()), (C, dtype)
        stored = 2 * torch.finfo(dtype).eps * exact.abs().max().item()
        assert error(grad, exact) <= 8 * torch.finfo(wide).eps + stored, (C, dtype)


@of_methods
def test_options_of_methods_in_place(backend, device, options):
    """The gradient over the logits is that beside them, to the bit."""
    for C in (9, 64, 1500):
        z, t, y = make(5, C, device=device)
        z, y = with_ties(z, y)
        t, weights = of_form(t, options), torch.rand(5, 2, device=device)
        order = (*TERMS, "max_weight", "temperature", "form")
        tail = [{"temperature": 1.0, "form": "divergence", **options}.get(name, 0.0) for name in order]
        args = (t, y, weights, None, *tail, -100, "sum")
        *parts, grad, _ = ops.OPERATORS["distill_fwd", backend](z, *args, True)
        *again, _ = ops.OPERATORS["distill_grad_", backend](z, *args)
        torch.testing.assert_close((*again, z), (*parts, grad), rtol=0, atol=0)


@of_methods
def test_options_of_methods_beside_nan_infinity_and_weights_of_zero(backend, device, options):
    for value, c in itertools.product((torch.nan, torch.inf), (0, 4)):
        z, t, y = make(device=device)
        t = of_form(t, options)
        z[2, (y[2] + c) % 9] = value
        given = {"reduction": "none", "backend": backend, "function": functional.distill, **options}
        loss, grad = run(z, t, y, sample_weight=torch.ones(5, 2, device=device), **given)
        assert loss.isnan().tolist() == [i == 2 for i in range(5)]
        assert grad.isnan().all(1).tolist() == [i == 2 for i in range(5)]
        assert grad[[0, 1, 3, 4]].isfinite().all()
    z, t, y = make(device=device)
    t = of_form(t, options)
    z[3, y[3]] = -torch.inf  # every term is infinite
    weights = torch.ones(5, 2, device=device)
    weights[3] = 0
    loss, grad = run(z, t, y, sample_weight=weights, **given)
    assert loss[3] == 0
    assert (grad[3] == 0).all()
    assert grad.isfinite().all()
    weights[3] = 1
    loss, grad = run(z, t, y, sample_weight=weights, **given)
    assert loss[3] == torch.inf
    assert grad.isfinite().all()


def test_a_row_of_zeros(backend, device):
    """No part; with both weights, its second is the cross-entropy's: finite at any first weight."""
    z, t, y = make(3, 9, torch.float64, device)
    t = torch.zeros_like(t)
    ce, p, onehot = F.cross_entropy(z, y, reduction="none"), z.softmax(1), F.one_hot(y, 9)
    given = {"form": "probabilities", "ce_weight": 1.0, "kd_weight": 1.0, "reduction": "none"}
    for weight, scale in ((None, 1.0), (0.3, 1.0), ((0.0, 0.3), 0.3), ((0.7, 0.3), 1.0), ((0.7, 0.0), 0.7)):
        w = None if weight is None else torch.tensor([weight] * 3, dtype=z.dtype, device=device)
        loss, grad = run(z, t, y, sample_weight=w, function=functional.distill, backend=backend, **given)
        torch.testing.assert_close(loss, scale * ce, rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, scale * (p - onehot), rtol=1e-12, atol=1e-12)


def test_parts_with_two_weights(backend, device):
    """ce is that of the loss, with its samples' weights."""
    z, t, y = make(dtype=torch.float64, device=device)
    w = torch.rand(5, 2, dtype=torch.float64, device=device)
    args = (z, t, y, w, None, 0.5, 1.0, 0.0, 0.0, 0.0, 0.3, 1.0, "divergence", -100, "none", False)
    loss, ce, rest = ops.OPERATORS["distill_fwd", backend](*args)[:3]
    torch.testing.assert_close(ce, w[:, 0] * F.cross_entropy(z, y, reduction="none"))
    torch.testing.assert_close(loss, 0.5 * ce + rest)


def test_the_public_function_has_none_of_them():
    z, t, y = make()
    with pytest.raises(ValueError, match="one of divergence, cross_entropy, got 'probabilities'"):
        zls.distillation_loss(z, t, y, form="probabilities")
    with pytest.raises(ValueError, match=r"sample_weight must have shape \(5,\).*got \(5, 2\)"):
        zls.distillation_loss(z, t, y, sample_weight=torch.ones(5, 2))
    for options, message in (
        ({"form": "kl"}, "form must be one of divergence, cross_entropy, probabilities, got 'kl'"),
        ({"sample_weight": torch.ones(5, 3)}, r"sample_weight must have shape \(5,\)"),
        ({"max_weight": torch.inf}, "max_weight must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            functional.distill(z, t, y, **options)
    with pytest.raises(ValueError, match="got None with max_weight=1"):
        functional.distill(z, t, None, max_weight=1.0)


# As a part of PyTorch -------------------------------------------------------------------------------------


def test_second_derivatives_and_forward_mode_raise(backend, device):
    z, t, y = make(device=device)
    f = lambda x: zls.distillation_loss(x, t, y, kd_weight=1.0, backend=backend)  # noqa: E731
    x = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        g.pow(2).sum().backward()
    with pytest.raises(RuntimeError, match="differentiated again"):
        torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(z)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(f, (z,), (torch.ones_like(z),))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kept_graphs_and_batched_gradients(backend, device, reduction):
    """A saved gradient that is scaled in place is not scaled twice; batched upstream gradients work."""
    z, t, y = make(device=device)
    x = z.clone().requires_grad_()
    loss = zls.distillation_loss(x, t, y, reduction=reduction, backend=backend, **ALL)
    upstream = torch.randn(3, *loss.shape, device=device)
    rows = [torch.autograd.grad(loss, x, u, retain_graph=True)[0].clone() for u in upstream]
    together = torch.autograd.grad(loss, x, upstream, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(together, torch.stack(rows))
    assert torch.equal(torch.autograd.grad(loss, x, upstream[0])[0], rows[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x, upstream[0])


@pytest.mark.parametrize("given", [False, True])
def test_transforms(backend, device, given):
    """torch.func.vmap of grad: per-sample gradients, with and without a target and weights."""
    z, t, y = make(device=device)
    options = {"ce_weight": 0.5 * given, "kd_weight": 1.0, "temperature": 2.0, "backend": backend}
    weight = torch.rand(5, device=device) if given else None

    def per_sample(x, s, *more):
        y, w = (a[None] for a in more) if given else (None, None)
        return zls.distillation_loss(x[None], s[None], y, sample_weight=w, **options)

    more = (y, weight) if given else ()
    loss, grad = run(z, t, y if given else None, sample_weight=weight, reduction="none", **options)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(per_sample))(z, t, *more), grad)
    torch.testing.assert_close(torch.func.vmap(per_sample)(z, t, *more), loss)
    jacobian = torch.func.jacrev(lambda x: per_sample(x[0], t[0], *(a[0] for a in more)))(z)
    torch.testing.assert_close(jacobian[0], grad[0])


@pytest.mark.parametrize("given", [False, True])
def test_compile_fullgraph_with_a_dynamic_batch(backend, device, given):
    torch._dynamo.reset()
    options = {"ce_weight": 0.5 * given, "kd_weight": 1.0, "temperature": 2.0, "backend": backend}

    def f(x, t, y, w):
        return zls.distillation_loss(x * 2, t, y, sample_weight=w, **options) * 3

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    for N in (6, 4):
        z, t, y = make(N, device=device)
        y, w = (y, torch.rand(N, device=device)) if given else (None, None)
        grads = []
        for g in (f, compiled):
            x = z.clone().requires_grad_()
            loss = g(x, t, y, w)
            loss.backward()
            grads.append((loss.detach(), x.grad))
        torch.testing.assert_close(grads[1], grads[0])


def test_inplace(backend, device):
    """The same gradient in the memory of the logits; whoever needs them afterwards is told."""
    for dtype in DTYPES:
        for reduction in REDUCTIONS:
            z, t, y = make(dtype=dtype, device=device)
            options = {"reduction": reduction, "temperature": 2.0, "backend": backend, **ALL}
            loss, grad = run(z, t, y, **options)
            logits, seen = z.clone().requires_grad_() * 1, []
            logits.register_hook(lambda g, seen=seen: seen.append(g.data_ptr()))
            value = zls.distillation_loss(logits, t, y, inplace=True, **options)
            assert torch.equal(logits, z)
            value.sum().backward(retain_graph=True)
            assert torch.equal(value, loss)
            assert torch.equal(logits, grad)
            assert seen == [logits.data_ptr()]
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                value.sum().backward()
    for teacher in (
        lambda x: x,
        lambda x: x[:1].expand_as(x),
        lambda x: x.view(-1)[9:].repeat(2)[:45].view(5, 9),
    ):
        expected = run(z, teacher(z), y, backend=backend, **ALL)[1]
        logits = z.clone().requires_grad_() * 1
        zls.distillation_loss(
            logits, teacher(logits.detach()), y, inplace=True, backend=backend, **ALL
        ).backward()
        assert torch.equal(logits, expected), "a teacher in the memory of the logits"
    with pytest.raises(ValueError, match="inplace needs logits that an operation made"):
        zls.distillation_loss(z.clone().requires_grad_(), t, y, inplace=True, backend=backend)


def test_no_gradient_reaches_the_teacher(backend, device):
    z, t, y = make(device=device)
    x, s = z.clone().requires_grad_(), t.clone().requires_grad_()
    zls.distillation_loss(x, s, y, kd_weight=1.0, backend=backend).backward()
    assert s.grad is None
    with torch.no_grad():
        assert not zls.distillation_loss(x, s, y, kd_weight=1.0, backend=backend).requires_grad
    assert not zls.distillation_loss(z, s, y, kd_weight=1.0, backend=backend).requires_grad


def test_float16_mean_does_not_underflow(backend, device):
    z, t, y = make(64, 2000, torch.float16, device, scale=1.0)
    x, wide = z.clone().requires_grad_(), z.double().requires_grad_()
    options = {"kd_weight": 1.0, "temperature": 4.0}
    (zls.distillation_loss(x, t, y, backend=backend, **options) * 65536).backward()
    (zls.distillation_loss(wide, t, y, backend="reference", **options) * 65536).backward()
    assert not ((x.grad == 0) & (wide.grad.abs() > 1e-3)).any()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=2e-3, atol=1e-3)


@pytest.mark.skipif("cpu" not in zls.backends(), reason="the C++ extension is not built")
def test_operators_guard_memory():
    z, t, y = make()
    w, tail = torch.rand(5), (1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 2.0, "divergence", -100, "mean")
    bad = [
        (z[0], t, y, w), (z, t[:, :8], y, w), (z, t[:4], y, w), (z, t, y[:4], w), (z, t, y.int(), w),
        (z, t, y, w[:4]), (z, t, y, w.double()), (z.long(), t, y, w),
        (z, t.long(), y, w), (z, t, y + 9, w), (z, t, y - 9, w),
    ]  # fmt: skip
    bad = [(*args, None) for args in bad]
    i = torch.arange(5)
    bad += [(z, t, y, w, index) for index in (i[:4], i.int(), i + 1, i - 1, i[None])]
    bad += [(z, table, y, w, i * 0) for table in (t[:0], t[:, :8], t[0])]
    for args in bad:
        with pytest.raises((ValueError, TypeError, IndexError)):
            ops.OPERATORS["distill_fwd", "cpu"](*args, *tail, True)
    for options in (("kl", -100, "mean"), ("divergence", -100, "avg")):
        with pytest.raises(ValueError, match="must be"):
            ops.OPERATORS["distill_fwd", "cpu"](z, t, y, w, None, *tail[:7], *options, True)
    with pytest.raises(ValueError, match="logits must be contiguous"):
        ops.OPERATORS["distill_grad_", "cpu"](torch.randn(5, 18)[:, ::2], t, y, w, None, *tail)


def test_backends_without_it():
    """None serves in their place; named, they are refused by name."""
    z, t, y = make()
    for backend in zls.backends():
        if ops.UNSERVED.get((backend, "distill_fwd"), ()) is None:
            with pytest.raises(
                RuntimeError,
                match=f"backend='{backend}' cannot serve this call: it (has no kernel|serves cuda)",
            ):
                zls.distillation_loss(z, t, y, backend=backend)
            with zls.use_backend(backend), pytest.raises(RuntimeError, match=f"backend='{backend}' cannot"):
                zls.distillation_loss(z, t, y)
    torch.testing.assert_close(zls.distillation_loss(z, t, y), F.cross_entropy(z, y))


X, T, Y = make()
W = torch.ones(5)
INDEX = torch.arange(5)
BAD = [
    (
        lambda: zls.distillation_loss(X, T[:0], Y, teacher_index=INDEX),
        ValueError,
        r"teacher must have shape \(R, 9\) beside teacher_index, got \(0, 9\)",
    ),
    (
        lambda: zls.distillation_loss(X, T[:, :8], Y, teacher_index=INDEX),
        ValueError,
        r"teacher must have shape \(R, 9\) beside teacher_index, got \(5, 8\)",
    ),
    (
        lambda: zls.distillation_loss(X, T, Y, teacher_index=INDEX[:4]),
        ValueError,
        r"teacher_index must have shape \(5,\), one row of teacher per row of logits, got \(4,\)",
    ),
    (
        lambda: zls.distillation_loss(X, T, Y, teacher_index=INDEX.int()),
        TypeError,
        "teacher_index must be int64, got torch.int32",
    ),
    (
        lambda: zls.distillation_loss(X, T, Y, teacher_index=INDEX.to("meta")),
        ValueError,
        "teacher_index must be on the device of logits, cpu, got meta",
    ),
    (lambda: zls.distillation_loss([1.0], T, Y), TypeError, "logits must be a torch.Tensor, got list"),
    (lambda: zls.distillation_loss(X[:, :1], T, Y), ValueError, "logits must have at least 2 classes"),
    (lambda: zls.distillation_loss(X, None, Y), TypeError, "teacher must be a torch.Tensor, got NoneType"),
    (
        lambda: zls.distillation_loss(X, T[:, :8], Y),
        ValueError,
        r"teacher must have the shape of logits, \(5, 9\), ",
    ),
    (lambda: zls.distillation_loss(X, T[0], Y), ValueError, r"teacher must .*got \(9,\)"),
    (lambda: zls.distillation_loss(X, T.long(), Y), TypeError, "teacher must be float32"),
    (
        lambda: zls.distillation_loss(X, T.to("meta"), Y),
        ValueError,
        "teacher must be on the device of logits",
    ),
    (lambda: zls.distillation_loss(X, T, Y[:3]), ValueError, r"target must have shape \(5,\)"),
    (lambda: zls.distillation_loss(X, T, T), ValueError, r"target must have shape \(5,\)"),
    (lambda: zls.distillation_loss(X, T, Y.int()), TypeError, "target must be int64"),
    (lambda: zls.distillation_loss(X, T, Y.to("meta")), ValueError, "target must be on the device of logits"),
    (
        lambda: zls.distillation_loss(X, T, None, kd_weight=1),
        ValueError,
        "target may be None with kd_weight alone, got None with ce_weight=1.0",
    ),
    (
        lambda: zls.distillation_loss(X, T, None, ce_weight=0, soft_target_weight=2),
        ValueError,
        "got None with soft_target_weight=2",
    ),
    (lambda: zls.distillation_loss(X, T, Y, temperature=0), ValueError, "temperature must be > 0, got 0"),
    (lambda: zls.distillation_loss(X, T, Y, temperature=-1), ValueError, "temperature must be > 0, got -1"),
    (
        lambda: zls.distillation_loss(X, T, Y, temperature=torch.nan),
        ValueError,
        "temperature must be finite, got nan",
    ),
    (
        lambda: zls.distillation_loss(X, T, Y, temperature="4"),
        TypeError,
        "temperature must be a number, got str",
    ),
    *(
        (
            lambda name=name: zls.distillation_loss(X, T, Y, **{name: torch.inf}),
            ValueError,
            f"{name} must be finite",
        )
        for name in TERMS
    ),
    (
        lambda: zls.distillation_loss(X, T, Y, form="kl"),
        ValueError,
        "form must be one of divergence, cross_entropy",
    ),
    (lambda: zls.distillation_loss(X, T, Y, reduction="avg"), ValueError, "reduction must be one of"),
    (lambda: zls.distillation_loss(X, T, Y, ignore_index=1.5), TypeError, "ignore_index must be an int"),
    (lambda: zls.distillation_loss(X, T, Y, num_items=0), ValueError, "num_items must be positive"),
    (lambda: zls.distillation_loss(X, T, Y, backend="gpu"), ValueError, "backend must be None or one of"),
    (
        lambda: zls.distillation_loss(X, T, Y, sample_weight=W[:4]),
        ValueError,
        r"sample_weight must have shape \(5,\), .* got \(4,\)",
    ),
    (
        lambda: zls.distillation_loss(X, T, Y, sample_weight=2.0),
        TypeError,
        "sample_weight must be a torch.Tensor",
    ),
    (
        lambda: zls.distillation_loss(X, T, Y, sample_weight=W.long()),
        TypeError,
        "sample_weight must be float32",
    ),
    (
        lambda: zls.distillation_loss(X, T, Y, sample_weight=W.to("meta")),
        ValueError,
        "sample_weight must be on the device",
    ),
    (
        lambda: zls.distillation_loss(X, T, Y, sample_weight=W.clone().requires_grad_()),
        RuntimeError,
        "sample_weight must not require grad",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
