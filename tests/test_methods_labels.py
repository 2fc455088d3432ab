"""zls.methods whose label comes from the target, the logits, the batch or a table: see test_methods."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import warnings

import golden_methods
import pytest
import torch
import torch.nn.functional as F

from zipfls_cuda import methods, ops

M, C = 12, 9  # rows and columns of the stores
LOSSES = {
    methods.TfKDRegLoss: {},
    methods.LsrKDLoss: {"alpha": 0.3, "temperature": 4.0, "target_share": 0.4},
    methods.MaxSupLoss: {},
    methods.USKDLoss: {},
    methods.BAKELoss: {},
    methods.PSKDLoss: {"num_samples": M, "num_classes": C},
    methods.OLSLoss: {"num_classes": C},
}
SETTINGS = {  # constructor's defaults
    methods.TfKDRegLoss: {"alpha": 0.1, "temperature": 20.0, "multiplier": 100.0},
    methods.LsrKDLoss: {"target_share": None},
    methods.MaxSupLoss: {"start": 0.1, "end": 0.2, "epochs": 90},
    methods.USKDLoss: {"alpha": 1.0, "beta": 0.1, "mu": 0.005, "ranking": "probabilities", "ce_weight": 1.0},
    methods.BAKELoss: {"temperature": 4.0, "omega": 0.5, "ce_weight": 1.0},
    methods.PSKDLoss: {"alpha": 0.8, "epochs": 300, "dtype": torch.float32, "device": None},
    methods.OLSLoss: {"hard_weight": 0.5, "soft_weight": 0.5},
}
every_loss = pytest.mark.parametrize("Loss", LOSSES, ids=lambda Loss: Loss.__name__)


def make(N=5, dtype=torch.float32, seed=1):
    """(logits, what stands between logits and target by loss, target)"""
    g = torch.Generator().manual_seed(seed)
    z, weak, features = (torch.randn(N, n, generator=g, dtype=torch.float64).to(dtype) * 2 for n in (C, C, 6))
    index, y = torch.randperm(M, generator=g)[:N], torch.randint(C, (N,), generator=g)
    y[0] = z[0].argmax()  # one sample at least is classified right
    beside = {methods.USKDLoss: (weak,), methods.BAKELoss: (features,), methods.PSKDLoss: (index,)}
    return z, beside, y


def made(Loss, epoch=3, **options):
    """A criterion in the middle of a training, its store filled."""
    criterion = Loss(**{**LOSSES[Loss], **options})
    if hasattr(criterion, "set_epoch"):
        criterion.set_epoch(epoch)
    g = torch.Generator().manual_seed(2)
    for name in {"past", "label_matrix"} & dict(criterion.named_buffers()).keys():
        store = getattr(criterion, name)
        store.copy_(torch.randn(store.shape, generator=g).softmax(1))
    return criterion


# The authors' outputs -------------------------------------------------------------------------------------


def pskd(p, a):
    criterion = methods.PSKDLoss(*a["past"].shape, p["alpha_T"], p["end_epoch"], dtype=a["past"].dtype)
    criterion.past.copy_(a["past"])
    criterion.set_epoch(p["epoch"])
    return criterion


def maxsup(p, a):
    start, epochs = p.get("begin_lambda", 0.1), p["epochs"]
    end = p.get("end_lambda", 0.1 + 0.1 * epochs / (epochs - 1))  # maxsup_longtail's last epoch has 0.2
    criterion = methods.MaxSupLoss(start, end, epochs)
    criterion.set_epoch(p["epoch"])
    return criterion


def ols(p, a):
    criterion = methods.OLSLoss(len(a["label_matrix"])).to(a["logits"].dtype)
    criterion.label_matrix.copy_(a["label_matrix"])
    return criterion


def uskd(ranking):
    return lambda p, a: methods.USKDLoss(p["alpha"], p["beta"], p["mu"], ranking, ce_weight=0)


AUTHORS = {
    "tfkd_reg": lambda p, a: methods.TfKDRegLoss(p["reg_alpha"], p["reg_temperature"], p["multiplier"]),
    "lsrkd": lambda p, a: methods.LsrKDLoss(p["alpha"], p["T"]),
    "lsrkd_tc": lambda p, a: methods.LsrKDLoss(p["alpha"], p["T"], p["target_share"]),
    "maxsup": maxsup,
    "maxsup_longtail": maxsup,
    "uskd": uskd("log_probabilities"),
    "uskd_first_release": uskd("probabilities"),
    "zipfls_bake": lambda p, a: methods.BAKELoss(p["temp"], p["omega"], ce_weight=0),
    "pskd_step": pskd,
    "ols_epoch": ols,
}


def weak_logits(a):
    return F.linear(a["features"], a["weak_weight"], a["weak_bias"]).requires_grad_()


BESIDE = {
    "uskd": lambda a: (weak_logits(a),),
    "uskd_first_release": lambda a: (weak_logits(a),),
    "zipfls_bake": lambda a: (a["features"],),
    "pskd_step": lambda a: (a["index"],),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("function", AUTHORS)
def test_golden(backend, device, function, dtype):
    if reason := ops.refusal(backend, "distill_fwd", device.type, dtype):
        pytest.skip(f"{backend}: {reason}")
    for golden in golden_methods.cases(function):
        a = golden.inputs(dtype, device)
        if "soft_target" in a:  # USKDLoss takes classes
            continue
        x, beside = a["logits"].requires_grad_(), BESIDE.get(function, lambda a: ())(a)
        criterion = AUTHORS[function](golden.meta["params"], a).to(device)
        criterion.backend = backend
        loss = criterion(x, *beside, a["target"])
        loss.backward()
        golden.check("loss", loss)
        golden.check("grad", x.grad)
        if "grad_weak_logits" in golden.meta["arrays"]:
            golden.check("grad_weak_logits", beside[0].grad)
        if function == "pskd_step":
            golden.check("new_past", criterion.past)
        if function == "ols_epoch":
            criterion.end_epoch()
            golden.check("new_label_matrix", criterion.label_matrix)
        if function == "zipfls_bake":
            golden.check("targets", criterion.targets(x, *beside))


def test_ols_sees_a_matrix_that_was_written_and_moved():
    """What was written to S counts, also where a move then makes another tensor of it."""
    z, y, S = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 5, torch.rand(5, 5).double()
    expected = 0.5 * F.cross_entropy(z, y) - 0.5 * (S[y].float().double() * z.log_softmax(1)).sum(1).mean()
    criterion = methods.OLSLoss(5).eval()
    criterion.label_matrix.copy_(S)
    torch.testing.assert_close(criterion.double()(z, y), expected, rtol=1e-6, atol=0)
    criterion.label_matrix = S.new_full((5, 5), 0.2)
    smooth = 0.5 * F.cross_entropy(z, y) - 0.1 * z.log_softmax(1).sum(1).mean()
    torch.testing.assert_close(criterion(z, y), smooth, rtol=1e-6, atol=0)


# What all have in common ------------------------------------------------------------------------------------


def test_names_and_defaults():
    tail = {"ignore_index": -100, "reduction": "mean", "backend": None}
    for Loss, settings in SETTINGS.items():
        parameters = inspect.signature(Loss).parameters
        given = {k: p.default for k, p in parameters.items() if p.default is not p.empty}
        assert list(given.items()) == list({**settings, **tail}.items())
    assert {Loss.__name__ for Loss in LOSSES} <= set(methods.__all__)


@every_loss
def test_reductions_and_ignored_samples(Loss):
    """Ignored samples have no loss and no gradient, and means do not divide by them; of them alone: NaN."""
    z, beside, y = make(dtype=torch.float64)
    y[1] = 3
    between = beside.get(Loss, ())

    def run(y, **options):
        x = z.clone().requires_grad_()
        loss = made(Loss, ignore_index=3, **options)(x, *between, y)
        loss.sum().backward()
        return loss.detach(), x.grad

    rows, each = run(y, reduction="none")
    assert rows.shape == (5,)
    assert (rows[y == 3] == 0).all()
    assert (each[y == 3] == 0).all()
    n = (y != 3).sum()
    for reduction, divisor in (("sum", 1), ("mean", n)):
        loss, grad = run(y, reduction=reduction)
        torch.testing.assert_close(loss, rows.sum() / divisor)
        torch.testing.assert_close(grad, each / divisor)
    loss, grad = run(torch.full_like(y, 3))
    assert loss.isnan()
    assert (grad == 0).all()
    assert run(torch.full_like(y, 3), reduction="sum")[0] == 0
    with pytest.raises(ValueError, match="reduction must be one of"):
        Loss(**LOSSES[Loss], reduction="avg")
    with pytest.raises(RuntimeError, match="backend='cuda' cannot serve"):
        made(Loss, backend="cuda")(z, *between, y)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(Loss, dtype):
    """The loss of the rounded logits, in float32; the gradient in their type."""
    z, beside, y = make()
    z, between = z.to(dtype), beside.get(Loss, ())
    x, wide = z.clone().requires_grad_(), z.double().requires_grad_()
    loss, expected = (made(Loss)(x, *between, y) for x in (x, wide))
    (loss * 3).backward()
    (expected * 3).backward()
    assert (loss.dtype, x.grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=2e-6)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=tolerance, atol=tolerance)


@every_loss
def test_no_gradient_goes_elsewhere(Loss):
    """Only USKD's weak head is trained beside the logits; a gradient penalty is refused."""
    z, beside, y = make()
    x = z.requires_grad_()
    between = [b.requires_grad_() if b.is_floating_point() else b for b in beside.get(Loss, ())]
    (g,) = torch.autograd.grad(made(Loss)(x, *between, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        g.pow(2).sum().backward()
    made(Loss)(x, *between, y).backward()
    assert x.grad.isfinite().all()
    assert all((b.grad is not None) == (Loss is methods.USKDLoss) for b in between)


@every_loss
def test_is_a_module(Loss):
    criterion, (z, beside, y) = made(Loss, reduction="sum"), make()
    assert "reduction='sum'" in repr(criterion)
    for name in inspect.signature(Loss).parameters.keys() - {"ignore_index", "backend", "dtype", "device"}:
        assert f"{name}={getattr(criterion, name)!r}" in repr(criterion), name
    assert not list(criterion.parameters())
    between = beside.get(Loss, ())
    others = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    expected = criterion(z, *between, y)
    for same in others:
        assert torch.equal(same(z, *between, y), expected)


@every_loss
def test_resumes_exactly(Loss):
    """From a state_dict taken in the middle of an epoch."""
    (z, beside, y), whole = make(), made(Loss)
    between = beside.get(Loss, ())
    steps = [(z.requires_grad_(), *between, y), ((z.detach().flip(0) * 2).requires_grad_(), *between, y)]
    whole(*steps[0])
    resumed = Loss(**LOSSES[Loss])
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for criterion in (whole, resumed):
        criterion(*steps[1])
        if Loss is methods.OLSLoss:
            criterion.end_epoch()
    assert torch.equal(resumed(*steps[0]), whole(*steps[0]))
    for name, x in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], x)


@every_loss
def test_compiles_as_one_graph(Loss):
    z, beside, y = make()
    torch._dynamo.reset()
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)):
        criterion = made(Loss)
        x = z.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = wrap(criterion)(x * 2, *beside.get(Loss, ()), y)
        loss.backward()
        results.append((loss.detach(), x.grad, *criterion.state_dict().values()))
    torch.testing.assert_close(*results)


@every_loss
def test_a_setting_that_is_wrong_is_named(Loss):
    others = {"ignore_index", "reduction", "backend", "dtype", "device", "ranking"}
    for name in inspect.signature(Loss).parameters.keys() - others:
        for bad, error in ((float("nan"), (ValueError, TypeError)), ("1", TypeError)):
            with pytest.raises(error, match=f"{name} must be"):
                Loss(**{**LOSSES[Loss], name: bad})


BAD = {
    methods.TfKDRegLoss: {"alpha": 1.5, "temperature": 0, "multiplier": -1},
    methods.LsrKDLoss: {"target_share": 1, "temperature": 0},
    methods.MaxSupLoss: {"epochs": 0},
    methods.USKDLoss: {"ranking": "votes"},
    methods.BAKELoss: {"omega": 1, "temperature": -1},
    methods.PSKDLoss: {"num_samples": 0, "num_classes": 1, "alpha": 2, "epochs": 0},
    methods.OLSLoss: {"num_classes": 1},
}


@pytest.mark.parametrize(
    ("Loss", "name"),
    [(Loss, name) for Loss in BAD for name in BAD[Loss]],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_setting_outside_its_range_is_named(Loss, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Loss(**{**LOSSES[Loss], name: BAD[Loss][name]})


@every_loss
def test_bad_tensors_are_named(Loss):
    z, beside, y = make()
    between, criterion = beside.get(Loss, ()), made(Loss)
    z = z.requires_grad_()
    outside = y.clone()
    outside[2] = C
    cases = [
        ((z, y[:4]), ValueError, r"target must have shape \(5,\)"),
        ((z, y.int()), TypeError, "target must be int64"),
        ((z, outside), IndexError, r"target\[2\] = 9 is outside \[0, 9\)"),
        ((z[0], y), ValueError, r"logits must have shape \(N, C\)"),
        ((z.long(), y), TypeError, "logits must be float32"),
        ((z, y.to("meta")), ValueError, "target must be on the device of logits"),
    ]
    before = [b.clone() for b in criterion.buffers()]
    for (logits, target), error, message in cases:
        with pytest.raises(error, match=message):
            criterion(logits, *between, target)
    assert all(map(torch.equal, before, criterion.buffers())), "nothing is stored"


# Each by itself ---------------------------------------------------------------------------------------------


def test_tfkd_reg_is_its_formula():
    """CE and a divergence from the softmax of probabilities, apart; d from the one-hot to all but even."""
    z, _, y = make(dtype=torch.float64)
    onehot = F.one_hot(y, C).double()
    for T in (1e-3, 0.05, 1.0, 20.0):
        d = ((0.99 * onehot + 0.01 / (C - 1) * (1 - onehot)) / T).softmax(1)
        kl = F.kl_div(z.log_softmax(1), d, reduction="none").sum(1)
        expected = 0.8 * F.cross_entropy(z, y, reduction="none") + 0.2 * 5 * kl / C
        loss = methods.TfKDRegLoss(0.2, T, 5.0, reduction="none")(z, y)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert methods.TfKDRegLoss(1.0, 20.0, 0.0)(z, y) == 0


def test_lsrkd_without_a_share_is_with_an_even_one():
    z, _, y = make(dtype=torch.float64)
    for T in (1.0, 4.0):
        even = methods.LsrKDLoss(0.3, T, 1 / C)(z, y)
        torch.testing.assert_close(methods.LsrKDLoss(0.3, T)(z, y), even, rtol=1e-12, atol=1e-12)


def test_maxsup_grows_by_the_epoch_and_is_its_formula():
    z, _, y = make(dtype=torch.float64)
    ce, gap = F.cross_entropy(z, y), (z.amax(1) - z.mean(1)).mean()
    criterion = methods.MaxSupLoss(0.1, 0.3, epochs=10)
    for epoch, share in ((0, 0.1), (5, 0.2), (9, 0.28)):
        criterion.set_epoch(epoch)
        torch.testing.assert_close(criterion(z, y), ce + share * gap, rtol=1e-12, atol=0)
    torch.testing.assert_close(criterion.eval()(z, y), ce + 0.3 * gap, rtol=1e-12, atol=0)
    torch.testing.assert_close(methods.MaxSupLoss(0.2, 0.2)(z, y), ce + 0.2 * gap, rtol=1e-12, atol=0)


def test_maxsup_gives_the_lowest_of_equal_classes_the_gradient():
    x = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    methods.MaxSupLoss(0.2, 0.2)(x, torch.tensor([3])).backward()
    expected = torch.full((1, 4), 0.25 - 0.05, dtype=torch.float64)
    expected[0, 3] -= 1
    expected[0, 0] += 0.2
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("Loss", [methods.MaxSupLoss, methods.PSKDLoss], ids=lambda Loss: Loss.__name__)
def test_the_epoch_is_wanted(Loss):
    z, beside, y = make()
    criterion, z = Loss(**LOSSES[Loss]), z.requires_grad_()
    with pytest.raises(RuntimeError, match=r"set_epoch was never called: call criterion.set_epoch\(epoch\)"):
        criterion(z, *beside.get(Loss, ()), y)
    criterion.eval()(z, *beside.get(Loss, ()), y)
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        criterion.set_epoch(-1)


def test_uskd_weighs_and_ranks_without_gradient():
    """The three terms apart, by autograd; a sample that is ignored has no part in the batch's mean."""
    z, beside, y = make(dtype=torch.float64)
    weak = beside[methods.USKDLoss][0]
    y[3] = -100
    kept, x = y != -100, z.clone().requires_grad_()
    loss = methods.USKDLoss(0.7, 0.3, 0.2, ce_weight=0.5)(x, weak, y)
    loss.backward()
    t, zk, wk, yk = z.clone().requires_grad_(), z[kept], weak[kept], y[kept, None]
    xk, p, w = t[kept], zk.softmax(1), wk.softmax(1)
    key = w / (1 - w.gather(1, yk) + 1e-6) + p / (1 - p.gather(1, yk) + 1e-6)
    n = (1 / (1 + (key[:, None] > key[:, :, None]).sum(2).double())).scatter(1, yk, 0)
    n = n / n.sum(1, keepdim=True)
    square = p.gather(1, yk)[:, 0] ** 2
    ce = F.cross_entropy(xk, yk[:, 0], reduction="none")
    others = xk.scatter(1, yk, -math.inf).log_softmax(1).masked_fill(n == 0, 0)
    weight = 0.5 + 0.7 * (square + 1 - square.mean())
    expected = (weight * ce - 0.3 * (n * others).sum(1)).mean()
    expected = expected + 0.2 * F.cross_entropy(wk, yk[:, 0], label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(x.grad, torch.autograd.grad(expected, t)[0], rtol=1e-12, atol=1e-12)
    with pytest.raises(
        ValueError, match=r"weak_logits must have the shape of logits, \(5, 9\), got \(5, 8\)"
    ):
        methods.USKDLoss()(z, weak[:, :8], y)
    with pytest.raises(ValueError, match=r"target must have shape \(5,\)"):
        methods.USKDLoss()(z, weak, z.softmax(1))


def test_bake_of_one_sample_and_of_equal_features():
    z, beside, y = make(dtype=torch.float64)
    features = beside[methods.BAKELoss][0]
    criterion = methods.BAKELoss(omega=0.9)
    torch.testing.assert_close(criterion(z[:1], features[:1], y[:1]), F.cross_entropy(z[:1], y[:1]))
    Q = criterion.targets(z, features)
    torch.testing.assert_close(Q.sum(1), torch.ones_like(Q[:, 0]))
    equal = criterion.targets(z, torch.ones_like(features))
    p = (z / 4).softmax(1)
    mean = (p.sum(0) - p) / 4  # of the other samples: A has 1/4 beside the diagonal
    torch.testing.assert_close(equal - 0.9 * (equal.sum(0) - equal) / 4, 0.1 * p)
    assert not torch.allclose(equal, mean)
    for bad in (features[:4], features[0]):
        with pytest.raises(ValueError, match=r"features must have shape \(N, D\) with N = 5"):
            criterion(z, bad, y)


# Stores -----------------------------------------------------------------------------------------------------


def test_pskd_starts_with_the_one_hot_and_keeps_what_it_saw():
    z, beside, y = make(dtype=torch.float64)
    (index,), x = beside[methods.PSKDLoss], z.clone().requires_grad_()
    criterion = methods.PSKDLoss(M, C, 0.8, epochs=10, dtype=torch.float64)
    criterion.set_epoch(4)
    torch.testing.assert_close(criterion(x, index, y), F.cross_entropy(z, y), rtol=1e-12, atol=0)
    torch.testing.assert_close(criterion.past[index], z.softmax(1))
    others = torch.ones(M, dtype=torch.bool)
    others[index] = False
    assert (criterion.past[others] == 0).all()
    a, onehot = 0.8 * 5 / 10, F.one_hot(y, C).double()
    expected = F.cross_entropy(2 * z, (1 - a) * onehot + a * z.softmax(1))
    torch.testing.assert_close(criterion(2 * x, index, y), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(criterion.past[index], (2 * z).softmax(1))
    criterion.set_epoch(0)
    torch.testing.assert_close(criterion(x, index, y), F.cross_entropy(z, y), rtol=1e-12, atol=0)
    criterion.set_epoch(50)  # beyond the last: a is alpha
    expected = F.cross_entropy(z, 0.2 * onehot + 0.8 * z.softmax(1))
    torch.testing.assert_close(criterion(x, index, y), expected, rtol=1e-12, atol=0)


def test_pskd_stores_in_training_alone():
    z, beside, y = make()
    (index,), criterion = beside[methods.PSKDLoss], made(methods.PSKDLoss)
    before = criterion.past.clone()
    with torch.no_grad():
        assert torch.equal(criterion(z, index, y), criterion.eval()(z, index, y))
    torch.testing.assert_close(criterion(z.requires_grad_(), index + 100, y), F.cross_entropy(z, y))
    assert torch.equal(criterion.past, before)
    low = methods.PSKDLoss(M, C, dtype=torch.bfloat16)
    low.set_epoch(3)
    low(z, index, y)
    assert torch.equal(low.past[index], z.softmax(1).bfloat16())
    assert low(z, index, y).dtype == torch.float32
    with pytest.raises(TypeError, match="dtype must be float32"):
        methods.PSKDLoss(M, C, dtype=torch.int64)


def test_pskd_skips_classes_that_are_masked():
    z, beside, y = make()
    (index,), criterion = beside[methods.PSKDLoss], made(methods.PSKDLoss)
    masked = z.clone()
    masked[:, (y.max() + 1) % C if (y == (y.max() + 1) % C).sum() == 0 else 0] = -math.inf
    y = torch.where(masked.gather(1, y[:, None])[:, 0] == -math.inf, masked.argmax(1), y)
    for _ in range(2):
        criterion.past[index] = masked.softmax(1)
        x = masked.clone().requires_grad_()
        loss = criterion(x, index, y)
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()


def test_bad_indices_are_named():
    z, beside, y = make()
    (index,), criterion = beside[methods.PSKDLoss], made(methods.PSKDLoss)
    z, before = z.requires_grad_(), criterion.past.clone()
    for bad in (-1, M):
        outside = index.clone()
        outside[3] = bad
        with pytest.raises(IndexError, match=rf"index\[3\] = {bad} is outside \[0, 12\)"):
            criterion(z, outside, y)
    for bad, error, message in (
        (index[:4], ValueError, r"index must have shape \(5,\)"),
        (index.int(), TypeError, "index must be int64, got torch.int32"),
        (index.to("meta"), ValueError, "index must be on cpu, beside a store on cpu, got meta"),
    ):
        with pytest.raises(error, match=message):
            criterion(z, bad, y)
    with pytest.raises(ValueError, match=r"logits must have num_classes=9 classes, got shape \(5, 8\)"):
        criterion(z[:, :8], index, y.clamp(max=7))
    assert torch.equal(criterion.past, before)


def test_an_index_outside_is_nan_where_nobody_looks():
    """As on a GPU: under torch.compile the CPU's values are not looked at either."""
    z, beside, y = make()
    (index,), criterion = beside[methods.PSKDLoss], made(methods.PSKDLoss, reduction="none")
    index = index.clone()
    index[3] = M + 5
    before, x = criterion.past.clone(), z.requires_grad_()
    loss = torch.compile(criterion, backend="eager", fullgraph=True)(x, index, y)
    loss.sum().backward()
    assert loss.isnan().tolist() == x.grad.isnan().any(1).tolist() == [False, False, False, True, False]
    changed = (criterion.past != before).any(1)
    assert changed.sum() == 4


@pytest.mark.parametrize("Loss", [methods.PSKDLoss, methods.OLSLoss], ids=lambda Loss: Loss.__name__)
def test_a_store_elsewhere_is_named(Loss):
    z, beside, y = make()
    criterion = made(Loss).to("meta")
    with pytest.raises(
        ValueError, match=r"must be on the device of logits, cpu.*, got meta: move the criterion"
    ):
        criterion(z.requires_grad_(), *beside.get(Loss, ()), y)


class Event:
    """A CUDA event, on the CPU."""

    def synchronize(self):
        self.seen = True


def test_late_rows_are_written_before_anyone_reads_them():
    """Rows on their way from a GPU to a store on the CPU."""
    z, beside, y = make()
    index = beside[methods.PSKDLoss][0]
    rows = z.softmax(1)
    readers = {
        "the next step": lambda c: c(z.requires_grad_(), index.flip(0) * 0 + torch.arange(5), y),
        "state_dict": lambda c: c.state_dict(),
        "set_epoch": lambda c: c.set_epoch(7),
        "a copy": copy.deepcopy,
        "a pickle": pickle.dumps,
    }
    for name, read in readers.items():
        criterion, event = made(methods.PSKDLoss), Event()
        criterion._late = torch.full_like(index, M - 1)[:1], rows[:1], event
        read(criterion)
        assert event.seen
        assert torch.equal(criterion.past[M - 1], rows[0]), name
        assert criterion._late is None


def test_ols_learns_from_what_is_right():
    z, _, y = make(N=5)
    z2, _, y2 = make(N=5, seed=7)
    criterion = methods.OLSLoss(C)
    assert (criterion.label_matrix == 1 / C).all()
    for logits, target in ((z, y), (z2, y2)):
        criterion(logits.clone().requires_grad_(), target)
    with torch.no_grad():
        criterion(z, y)  # a validation in training mode
    criterion.eval()(z.clone().requires_grad_(), y)
    assert (criterion.label_matrix == 1 / C).all()
    criterion.end_epoch()
    p, t = torch.cat([z, z2]).softmax(1), torch.cat([y, y2])
    right = p.argmax(1) == t
    assert right.any()
    for k in range(C):
        rows = p[right & (t == k)]
        expected = rows.mean(0) if len(rows) else torch.full((C,), 1 / C)
        torch.testing.assert_close(criterion.label_matrix[k], expected)
    assert criterion.sums.count_nonzero() == criterion.counts.count_nonzero() == 0
    soft = -(criterion.label_matrix[y] * z.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(criterion(z, y), 0.5 * F.cross_entropy(z, y) + 0.5 * soft)


def test_ols_with_rows_of_zeros():
    """The authors' first epoch on CIFAR: such a row has no part."""
    z, _, y = make(dtype=torch.float64)
    criterion = methods.OLSLoss(C).double()
    criterion.label_matrix.zero_()
    x = z.clone().requires_grad_()
    loss = criterion(x, y)
    loss.backward()
    torch.testing.assert_close(loss, 0.5 * F.cross_entropy(z, y), rtol=1e-12, atol=0)
    assert x.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"logits must have num_classes=9 classes, got shape \(5, 8\)"):
        criterion(z[:, :8], y.clamp(max=7))


def test_maxsup_names_what_is_wrong():
    criterion = methods.MaxSupLoss(start=0.1, end=0.1)
    for logits, target, said in (
        ([1.0], torch.zeros(1, dtype=torch.int64), "logits"),
        (torch.zeros(2, 3), None, "target must be a torch.Tensor"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), "target must have shape"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            criterion(logits, target)
