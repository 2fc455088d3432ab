"""DDGSDLoss and BYOTLoss: published outputs, gradients, settings, errors."""

from __future__ import annotations

import inspect

import golden_methods
import pytest
import torch
import torch.nn.functional as F

import zipfls_cuda as zls
from zipfls_cuda import methods, ops

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def skip_unless(backend, device, dtype):
    if reason := ops.refusal(backend, "distill_fwd", device.type, dtype):
        pytest.skip(f"{backend}: {reason}")


def views(N=4, C=9, D=6, dtype=torch.float64, device="cpu"):
    """(logits_a, logits_b, features_a, features_b, target)"""
    g = torch.Generator().manual_seed(2)
    shapes = (N, C), (N, C), (N, D), (N, D)
    made = [torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for s in shapes]
    return *made, torch.randint(C, (N,), generator=g).to(device)


def branches(B=4, N=4, C=9, D=6, dtype=torch.float64):
    """(branch_logits, branch_features, target)"""
    g = torch.Generator().manual_seed(3)
    logits, features = (
        [torch.randn(N, k, generator=g, dtype=torch.float64).to(dtype) for _ in range(B)] for k in (C, D)
    )
    return logits, features, torch.randint(C, (N,), generator=g)


def leaves(tensors):
    return [x.clone().requires_grad_() for x in tensors]


# Published outputs ------------------------------------------------------------------------------------------


@DTYPES
def test_ddgsd_golden(backend, device, dtype):
    """Self-KD-Lib's objective is a quarter of ours with four times its weights and features of one channel.

    It averages the cross-entropies over both views and halves that; its feature term is the square of the
    difference of the means over batch and channels.
    """
    skip_unless(backend, device, dtype)
    for golden in golden_methods.cases("ddgsd_selfkdlib"):
        a = golden.inputs(dtype, device)
        x, f = leaves((a["logits"], a["teacher"])), leaves((a["features"], a["features2"]))
        criterion = methods.DDGSDLoss(golden.meta["params"]["T"], 4.0, 4 * 5e-4, backend=backend)
        loss = criterion(*x, *(k.mean(1, keepdim=True) for k in f), a["target"]) / 4
        loss.backward()
        golden.check("loss", loss)
        golden.check("grad_logits_both_views", torch.cat([k.grad for k in x]))
        golden.check("grad_features_both_views", torch.cat([k.grad for k in f]))


@DTYPES
def test_ddgsd_golden_of_the_other_code(backend, device, dtype):
    """Its value: no T^2, means over N C, a squared difference of logits. Its gradient goes to both sides."""
    skip_unless(backend, device, dtype)
    for golden in golden_methods.cases("ddgsd_youngerous"):
        a, p = golden.inputs(dtype, device), golden.meta["params"]
        T, C = p["temperature"], a["logits"].shape[1]
        criterion = methods.DDGSDLoss(T, p["lmbda"] / (T**2 * C), 0.0, backend=backend)
        loss = criterion(a["logits"], a["teacher"], None, None, a["target"])
        golden.check("loss", loss + p["mu"] * F.mse_loss(a["logits"], a["teacher"]))


@DTYPES
def test_byot_golden(backend, device, dtype):
    skip_unless(backend, device, dtype)
    for golden in golden_methods.cases("byot_heads"):
        a, p = golden.inputs(dtype, device), golden.meta["params"]
        z, f = leaves(a["branch_logits"]), leaves(a["branch_features"])
        adapted = [f[0]] + [
            F.linear(x, *wb) for x, *wb in zip(f[1:], a["adapt_weight"], a["adapt_bias"], strict=True)
        ]
        criterion = methods.BYOTLoss(
            p["temperature"], p["loss_coefficient"], p["feature_loss_coefficient"], backend=backend
        )
        loss = criterion(z, adapted, a["target"])
        loss.backward()
        golden.check("loss", loss)
        for b in range(p["branches"]):
            golden.check(f"grad_branch_logits{b}", z[b].grad)
            unused = torch.zeros_like(f[b]) if f[b].grad is None else f[b].grad
            golden.check(f"grad_branch_features{b}", unused)
            assert (f[b].grad is None) == (b < 2), "of the deepest and of the next to it none is used"


@DTYPES
def test_byot_golden_of_the_conference_version(backend, device, dtype):
    """One branch: distillation_loss as a cross-entropy with T^2, and a squared hint where one is above 0."""
    skip_unless(backend, device, dtype)
    for golden in golden_methods.cases("byot_conference"):
        a, p = golden.inputs(dtype, device), golden.meta["params"]
        x, f = leaves((a["logits"], a["features"]))
        loss = zls.distillation_loss(
            x, a["teacher"], a["target"], temperature=p["temperature"], ce_weight=1 - p["alpha"],
            kd_weight=p["alpha"], form="cross_entropy", backend=backend,
        )  # fmt: skip
        above = (f > 0) | (a["features2"] > 0)
        loss = loss + p["beta"] * ((f - a["features2"]).square() * above).sum()
        loss.backward()
        golden.check("loss", loss)
        golden.check("grad", x.grad)
        golden.check("grad_features", f.grad)


def test_names_and_defaults():
    for Loss, settings in (
        (methods.DDGSDLoss, {"temperature": 3.0, "kd_weight": 1.0, "mmd_weight": 5e-4}),
        (methods.BYOTLoss, {"temperature": 3.0, "soft_weight": 0.3, "hint_weight": 0.03}),
    ):
        tail = {"ignore_index": -100, "reduction": "mean", "backend": None}
        found = {k: p.default for k, p in inspect.signature(Loss).parameters.items()}
        assert list(found.items()) == list({**settings, **tail}.items())
        shown = ", ".join(f"{k}={v!r}" for k, v in settings.items())
        assert repr(Loss()) == f"{Loss.__name__}({shown})"


# Against the formulas ---------------------------------------------------------------------------------------


def kl(student, teacher, T):
    q = (teacher.detach() / T).softmax(1)
    return (q * (q.log() - (student / T).log_softmax(1))).sum(1)


def test_ddgsd_by_formula():
    za, zb, fa, fb, y = views()
    x = leaves((za, zb, fa, fb))
    loss = methods.DDGSDLoss(4.0, 0.7, 0.3)(*x, y)
    e = leaves((za, zb, fa, fb))
    expected = F.cross_entropy(e[0], y) + F.cross_entropy(e[1], y)
    expected = expected + 0.7 * 16 * (kl(e[0], e[1], 4.0) + kl(e[1], e[0], 4.0)).mean()
    expected = expected + 0.3 * (e[2].mean(0) - e[3].mean(0)).square().sum()
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, x), torch.autograd.grad(expected, e), strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_ignored_has_no_part_in_the_terms_by_sample():
    za, zb, fa, fb, y = views()
    y[1] = 3
    criterion = methods.DDGSDLoss(mmd_weight=0, ignore_index=3, reduction="none")
    rows = criterion(za, zb, None, None, y)
    assert (rows[y == 3] == 0).all()
    for reduction, expected in (("sum", rows.sum()), ("mean", rows.sum() / (y != 3).sum())):
        whole = methods.DDGSDLoss(mmd_weight=0.5, ignore_index=3, reduction=reduction)
        hint = 0.5 * (fa.mean(0) - fb.mean(0)).square().sum()
        torch.testing.assert_close(whole(za, zb, fa, fb, y), expected + hint)
    z, f, y = branches()
    y[1] = 3
    rows = methods.BYOTLoss(hint_weight=0, ignore_index=3, reduction="none")(z, None, y)
    assert (rows[y == 3] == 0).all()
    norms = sum(torch.linalg.vector_norm(x - f[0]) for x in f[2:])
    whole = methods.BYOTLoss(hint_weight=0.5, ignore_index=3)(z, f, y)
    torch.testing.assert_close(whole, rows.sum() / (y != 3).sum() + 0.5 * norms)


def test_byot_of_one_branch_is_the_cross_entropy():
    z, f, y = branches(B=1)
    torch.testing.assert_close(methods.BYOTLoss()(z, f, y), F.cross_entropy(z[0], y))


def test_a_hint_of_equal_features_has_a_gradient_of_zero():
    z, f, y = branches()
    f = [f[0].clone().requires_grad_() for _ in f]
    methods.BYOTLoss()(z, f, y).backward()
    assert (f[2].grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision(dtype):
    """Features in 16 bit: their terms are computed in float32, and the loss is float32."""
    *tensors, y = views(dtype=dtype)
    exact = methods.DDGSDLoss(mmd_weight=0.5)(*(x.double() for x in tensors), y)
    loss = methods.DDGSDLoss(mmd_weight=0.5)(*tensors, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    z, f, y = branches(dtype=dtype)
    exact = methods.BYOTLoss(hint_weight=0.5)([x.double() for x in z], [x.double() for x in f], y)
    torch.testing.assert_close(methods.BYOTLoss(hint_weight=0.5)(z, f, y).double(), exact, rtol=1e-5, atol=0)


def test_both_compile_as_one_graph():
    torch._dynamo.reset()
    *tensors, y = views()
    for criterion, given in ((methods.DDGSDLoss(), (*tensors, y)), (methods.BYOTLoss(), branches())):
        compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*given), criterion(*given))


# Errors -----------------------------------------------------------------------------------------------------


def test_a_term_of_the_whole_batch_has_no_form_by_sample():
    for Loss, name in ((methods.DDGSDLoss, "mmd_weight"), (methods.BYOTLoss, "hint_weight")):
        with pytest.raises(ValueError, match=f"reduction must be 'mean' or 'sum' unless {name} is 0"):
            Loss(reduction="none")
        assert Loss(reduction="none", **{name: 0}).reduction == "none"
        with pytest.raises(ValueError, match="reduction must be one of"):
            Loss(reduction="avg")
        with pytest.raises(ValueError, match="temperature must be > 0"):
            Loss(temperature=0)
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            Loss(**{name: float("nan")})


def test_bad_views_are_named():
    za, zb, fa, fb, y = views()
    criterion = methods.DDGSDLoss()
    for given, error, message in (
        ((za, zb[:3], fa, fb, y), ValueError, "logits_b must have the shape of logits_a"),
        (
            (za, zb, fa[:3], fb, y),
            ValueError,
            r"features_a must have shape \(N, D\) with N = 4 as logits_a, got \(3, 6\)",
        ),
        ((za, zb, fa, fb[:3], y), ValueError, "features_b must have the shape of features_a"),
        ((za, zb, fa[:, :, None], fb, y), ValueError, "features_a must have shape"),
        ((za, zb, None, fb, y), TypeError, "features_a must be a torch.Tensor, got NoneType"),
        ((za, zb, fa, fb.long(), y), TypeError, "features_b must be float32"),
        ((za, zb, fa.to("meta"), fb, y), ValueError, "features_a must be on the device of logits_a, cpu"),
        ((za, zb, fa, fb, y[:3]), ValueError, "target must have shape"),
    ):
        with pytest.raises(error, match=message):
            criterion(*given)


def test_bad_branches_are_named():
    z, f, y = branches()
    criterion = methods.BYOTLoss()
    for given, error, message in (
        (
            (torch.stack(z), f, y),
            TypeError,
            "branch_logits must be a list of tensors, one a branch, got Tensor",
        ),
        (([], f, y), ValueError, "branch_logits must have at least one branch"),
        (
            ([*z[:3], z[3][:, :8]], f, y),
            ValueError,
            r"branch_logits\[3\] must have the shape of branch_logits",
        ),
        (
            (z, f[:3], y),
            ValueError,
            "branch_features must have one entry a branch, 4 as branch_logits, got 3",
        ),
        ((z, [f[0][:3], *f[1:]], y), ValueError, r"branch_features\[0\] must have shape \(N, D\) with N = 4"),
        ((z, [*f[:2], f[2][:, :5], f[3]], y), ValueError, r"branch_features\[2\] must have the shape of"),
        ((z, None, y), TypeError, "branch_features must be a list"),
    ):
        with pytest.raises(error, match=message):
            criterion(*given)
    criterion(z, [f[0], None, *f[2:]], y)
