"""The contract people program against: names, defaults, forms of call, and what bad input is told."""

from __future__ import annotations

import copy
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import make

import zipfls_cuda as zls

X, Y = torch.randn(4, 6), torch.tensor([0, 1, 5, 2])
V = torch.zeros(4, 3, dtype=torch.int32)
MAP, W, B = torch.randn(2, 5, 3, 3), torch.randn(6, 5), torch.randn(6)


def test_names_and_defaults():
    def defaults(f):
        return {k: p.default for k, p in inspect.signature(f).parameters.items() if p.default is not p.empty}

    group = {"process_group": None}
    assert defaults(zls.dense_vote) == {"bias": None, "upsample": 1, "backend": None, **group}
    law = {"alpha": 1.0, "distribution": None}
    tail = {"ignore_index": -100, "reduction": "mean"}
    last = {"inplace": False, "backend": None, **group}
    assert defaults(zls.zipf_loss) == {"votes": None, **law, "only_correct": False, **tail, **last}
    assert defaults(zls.zipf_cross_entropy) == {
        **{"votes": None, "zipf_weight": 0.1, **law, "only_correct": False, "label_smoothing": 0.0},
        **{"weight": None, **tail, "return_parts": False, "num_items": None, **last},
    }
    assert defaults(zls.ZipfLoss) == {
        **{"zipf_weight": 0.1, "votes": None, "ranking": "votes", **law, "only_correct": False},
        **{"label_smoothing": 0.0, "weight": None},
        **{**tail, "deep_weight": 0.1, "inplace": False, **group},
    }
    terms = {"kd_weight": 0.0, "tckd_weight": 0.0, "nckd_weight": 0.0, "soft_target_weight": 0.0}
    assert defaults(zls.distillation_loss) == {
        **{"temperature": 1.0, "ce_weight": 1.0, **terms, "form": "divergence", "sample_weight": None},
        **{"teacher_index": None},
        **{**tail, "return_parts": False, "num_items": None, **last},
    }
    assert defaults(zls.check_inputs) == {"votes": None, "ignore_index": -100}
    for name in zls.__all__:
        assert inspect.getdoc(getattr(zls, name)) or name == "__version__"


BAD = [
    # logits
    (lambda: zls.zipf_loss([1.0], Y, V), TypeError, "logits must be a torch.Tensor, got list"),
    (lambda: zls.zipf_loss(X[0], Y, V), ValueError, r"logits must have shape \(N, C\), got \(6,\)"),
    (lambda: zls.zipf_loss(X[:, :1], Y, V), ValueError, "logits must have at least 2 classes"),
    (lambda: zls.zipf_loss(X.long(), Y, V), TypeError, "logits must be float32"),
    (lambda: zls.zipf_loss(X.to(torch.complex64), Y, V), TypeError, "logits must be float32"),
    # target
    (lambda: zls.zipf_loss(X, None, V), TypeError, "target must be a torch.Tensor, got NoneType"),
    (lambda: zls.zipf_loss(X, Y[:3], V), ValueError, r"target must have shape \(4,\).*got \(3,\)"),
    (lambda: zls.zipf_loss(X, Y[:, None], V), ValueError, r"target must have shape .*got \(4, 1\)"),
    (lambda: zls.zipf_loss(X, Y.int(), V), TypeError, "target must be int64 class indices, got torch.int32"),
    (
        lambda: zls.zipf_loss(X, Y.to("meta"), V),
        ValueError,
        "target must be on the device of logits, cpu, got meta",
    ),
    # votes
    (lambda: zls.zipf_loss(X, Y, 3), TypeError, "votes must be a torch.Tensor, got int"),
    (lambda: zls.zipf_loss(X, Y, V[0]), ValueError, r"votes must have shape \(N, P\), got \(3,\)"),
    (
        lambda: zls.zipf_loss(X, Y, V[:2]),
        ValueError,
        r"votes must have one row per sample, \(4, P\), got \(2, 3\)",
    ),
    (lambda: zls.zipf_loss(X, Y, V.float()), TypeError, "votes must be int32 or int64, got torch.float32"),
    (lambda: zls.zipf_loss(X, Y, V.to("meta")), ValueError, "votes must be on the device of logits"),
    # options
    (lambda: zls.zipf_cross_entropy(X, Y, V, num_items=0), ValueError, "num_items must be positive, got 0"),
    (
        lambda: zls.zipf_cross_entropy(X, Y, V, num_items="4"),
        TypeError,
        "num_items must be a number, got str",
    ),
    (
        lambda: zls.zipf_cross_entropy(X, Y, V, num_items=torch.ones(2)),
        ValueError,
        r"num_items must be a number or a scalar tensor, got shape \(2,\)",
    ),
    (
        lambda: zls.zipf_cross_entropy(X, Y, V, num_items=torch.tensor(True)),
        TypeError,
        r"num_items must be a real number, got torch\.bool",
    ),
    (
        lambda: zls.zipf_cross_entropy(X, Y, V, num_items=4, reduction="sum"),
        ValueError,
        "num_items is what a mean divides by, not for reduction='sum'",
    ),
    (lambda: zls.zipf_loss(X, Y, V, alpha=-1), ValueError, "alpha must be finite and >= 0, got -1"),
    (lambda: zls.zipf_loss(X, Y, V, alpha=math.nan), ValueError, "alpha must be finite and >= 0, got nan"),
    (lambda: zls.zipf_loss(X, Y, V, alpha=math.inf), ValueError, "alpha must be finite and >= 0, got inf"),
    (lambda: zls.zipf_loss(X, Y, V, alpha="1"), TypeError, "alpha must be a number, got str"),
    (
        lambda: zls.zipf_loss(X, Y, V, alpha=2.0, distribution=zls.Constant()),
        ValueError,
        "exclude each other",
    ),
    (
        lambda: zls.zipf_loss(X, Y, V, alpha=1.0, distribution=zls.Constant()),
        ValueError,
        "exclude each other",
    ),
    (lambda: zls.ZipfLoss(1.0, 1.0, distribution=zls.Constant()), ValueError, "exclude each other"),
    (
        lambda: zls.zipf_loss(X, Y, V, distribution="zipf"),
        TypeError,
        "distribution must be a zls.Distribution",
    ),
    (
        lambda: zls.zipf_loss(X, Y, V, distribution=zls.LinearDecay(0.2)),
        ValueError,
        "smallest_prob must be at most",
    ),
    (
        lambda: zls.zipf_loss(X, Y, V, reduction="avg"),
        ValueError,
        "reduction must be one of mean, sum, none, got 'avg'",
    ),
    (lambda: zls.zipf_loss(X, Y, V, ignore_index=1.5), TypeError, "ignore_index must be an int, got float"),
    (lambda: zls.zipf_loss(X, Y, V, backend="gpu"), ValueError, "backend must be None or one of"),
    (
        lambda: zls.zipf_cross_entropy(X, Y, V, zipf_weight=math.nan),
        ValueError,
        "zipf_weight must be finite, got nan",
    ),
    (
        lambda: zls.zipf_cross_entropy(X, Y, V, zipf_weight=X),
        TypeError,
        "zipf_weight must be a number, got Tensor",
    ),
    (
        lambda: zls.zipf_cross_entropy(X, Y, V, label_smoothing=1.5),
        ValueError,
        r"label_smoothing must be in \[0, 1\]",
    ),
    (
        lambda: zls.zipf_cross_entropy(X, Y, V, weight=B[:2]),
        ValueError,
        r"weight must have shape \(C,\) = \(6,\)",
    ),
    (
        lambda: zls.zipf_cross_entropy(X, Y, V, weight=[1.0] * 6),
        TypeError,
        "weight must be a torch.Tensor, got list",
    ),
    (
        lambda: zls.zipf_cross_entropy(X, Y, V, weight=torch.ones(6).int()),
        TypeError,
        "weight must be float32",
    ),
    (
        lambda: zls.zipf_cross_entropy(X, Y, V, weight=B.to("meta")),
        ValueError,
        "weight must be on the device",
    ),
    (lambda: zls.ZipfLoss(zipf_weight="big"), TypeError, "zipf_weight must be a number, got str"),
    (lambda: zls.ZipfLoss(reduction="avg"), ValueError, "reduction must be one of"),
    (lambda: zls.ZipfLoss(deep_weight=math.inf), ValueError, "deep_weight must be finite"),
    (lambda: zls.ZipfLoss(weight=torch.ones(2, 2)), ValueError, r"weight must have shape \(C,\)"),
    (lambda: zls.ZipfLoss()((X, V, (), 1), Y), TypeError, "output must be logits, .* got 4 items"),
    (lambda: zls.ZipfLoss()((X, V), Y, V), TypeError, "votes were given twice"),
    # laws
    (lambda: zls.LinearDecay(-0.1), ValueError, "smallest_prob must be finite and >= 0, got -0.1"),
    (lambda: zls.ExponentialDecay(-1), ValueError, "rate must be finite and >= 0"),
    (lambda: zls.RandomPareto(0), ValueError, "a must be finite and > 0, got 0"),
    (lambda: zls.Zipf(True), TypeError, "alpha must be a number, got bool"),
    # dense_vote
    (lambda: zls.dense_vote(X, W), ValueError, r"features must have shape \(N, D, H, W\) or \(N, T, D\)"),
    (lambda: zls.dense_vote(MAP.int(), W), TypeError, "features must be float32"),
    (lambda: zls.dense_vote(MAP, W[:, :4]), ValueError, r"weight must have shape \(C, D\) with D = 5"),
    (lambda: zls.dense_vote(MAP, W[:1]), ValueError, "weight must have at least 2 classes"),
    (
        lambda: zls.dense_vote(MAP, W.double()),
        TypeError,
        "weight must have the dtype of features, torch.float32",
    ),
    (lambda: zls.dense_vote(MAP, W, B[:3]), ValueError, r"bias must have shape \(C,\) = \(6,\), got \(3,\)"),
    (lambda: zls.dense_vote(MAP, W, B.half()), TypeError, "bias must have the dtype of features"),
    (lambda: zls.dense_vote(MAP, W.to("meta")), ValueError, "weight must be on the device of features"),
    (lambda: zls.dense_vote(MAP, W, upsample=3), ValueError, "upsample must be 1 or 2, got 3"),
    (lambda: zls.dense_vote(MAP.flatten(2).mT, W, upsample=2), ValueError, "upsample=2 needs a map"),
    (lambda: zls.dense_vote(None, W), TypeError, "features must be a torch.Tensor, got NoneType"),
    # the rest
    (lambda: zls.rank_votes(V, 1), ValueError, "num_classes must be at least 2, got 1"),
    (lambda: zls.rank_votes(V, 2.0), TypeError, "num_classes must be an int, got float"),
    (lambda: zls.rank_votes(V.float(), 3), TypeError, "votes must be int32 or int64"),
    (lambda: zls.zipf_label(Y, V[:2], 6), ValueError, r"votes must have one row per sample"),
    (lambda: zls.zipf_label(Y.float(), V, 6), TypeError, "target must be int64"),
    (lambda: zls.fit_zipf(X[0].softmax(0)), ValueError, r"probabilities must have shape \(M, C\)"),
    (lambda: zls.fit_zipf(Y), TypeError, "probabilities must be float32"),
    (
        lambda: zls.fit_zipf(torch.eye(3)[:1]),
        ValueError,
        "probabilities must be positive at two ranks or more",
    ),
    (lambda: zls.check_inputs(X, Y + 2, V), IndexError, r"target\[2\] = 7 is outside \[0, 6\)"),
    (lambda: zls.check_inputs(X, Y, V + 6), IndexError, r"votes\[0, 0\] = 6 is outside \[0, 6\)"),
    (lambda: zls.check_inputs(X, Y.int(), V), TypeError, "target must be int64"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_check_inputs_accepts_what_is_right():
    y = Y.clone()
    y[0] = -100
    votes = V.clone()
    votes[0] = 99  # the votes of an ignored sample are not read
    votes[1] = -7
    assert zls.check_inputs(X, y, votes) is None
    assert zls.check_inputs(X, Y) is None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("P", [0, 3])
def test_empty_batch_is_like_cross_entropy(backend, device, reduction, P):
    x = torch.zeros(0, 6, device=device, requires_grad=True)
    y = torch.zeros(0, dtype=torch.int64, device=device)
    v = torch.zeros(0, P, dtype=torch.int32, device=device)
    expected = F.cross_entropy(x, y, reduction=reduction)
    for votes in (v, None):
        for only_correct in (False, True):
            options = {"only_correct": only_correct, "reduction": reduction, "backend": backend}
            loss = zls.zipf_cross_entropy(x, y, votes, **options)
            torch.testing.assert_close(loss, expected, equal_nan=True)
            zipf = zls.zipf_loss(x, y, votes, **options)
            torch.testing.assert_close(zipf, expected, equal_nan=True)
            loss.sum().backward()
            assert x.grad.shape == (0, 6)


@pytest.mark.parametrize("only_correct", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_all_ignored(backend, device, only_correct, label_smoothing):
    """The mean is NaN, as F.cross_entropy's, with gradients 0; sums and samples are 0 (5)."""
    case = make(3, 6, 4, device=device)
    case.target[:] = -100
    for reduction in ("mean", "sum", "none"):
        for f in (zls.zipf_cross_entropy, zls.zipf_loss):
            x = case.leaf()
            options = {"label_smoothing": label_smoothing} if f is zls.zipf_cross_entropy else {}
            loss = f(
                x,
                case.target,
                case.votes,
                reduction=reduction,
                only_correct=only_correct,
                backend=backend,
                **options,
            )
            loss.sum().backward()
            assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
            assert (x.grad == 0).all()


def test_only_correct_without_a_correct_sample(backend, device):
    """The Zipf part and its gradient are 0; the cross-entropy is untouched."""
    case = make(3, 6, 4, device=device)
    x = case.logits.scatter(1, case.target[:, None], -50.0).requires_grad_()
    loss, ce, zipf = zls.zipf_cross_entropy(
        x, case.target, case.votes, only_correct=True, return_parts=True, backend=backend
    )
    loss.backward()
    assert zipf == 0
    y = x.detach().clone().requires_grad_()
    F.cross_entropy(y, case.target).backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ce, loss.detach())


def test_only_correct_ties(backend, device):
    """argmax with ties to the lowest index: a tie counts only for the lower class."""
    x = torch.tensor([[1.0, 2.0, 2.0, 0.0], [1.0, 2.0, 2.0, 0.0]], device=device)
    target = torch.tensor([1, 2], device=device)
    votes = torch.tensor([[3, 3, 0], [3, 3, 0]], dtype=torch.int32, device=device)
    options = {"reduction": "none", "backend": backend}
    zipf = zls.zipf_loss(x, target, votes, only_correct=True, **options)
    every = zls.zipf_loss(x, target, votes, **options)
    assert zipf[0] == every[0] > 0
    assert zipf[1] == 0


def test_loss_dtypes(backend, device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        case = make(3, 6, 4, dtype=dtype, device=device)
        for reduction in ("mean", "sum", "none"):
            x = case.leaf()
            loss = zls.zipf_cross_entropy(x, case.target, case.votes, reduction=reduction, backend=backend)
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert loss.shape == ((3,) if reduction == "none" else ())
            loss.sum().backward()
            assert x.grad.dtype == dtype


# The module -----------------------------------------------------------------------------------------------


def test_module_forms_of_call():
    case = make(5, 8, 6)
    criterion = zls.ZipfLoss(0.3, 1.5, label_smoothing=0.1, weight=torch.rand(8), ignore_index=2)
    expected = zls.zipf_cross_entropy(
        *case, zipf_weight=0.3, alpha=1.5, label_smoothing=0.1, weight=criterion.weight, ignore_index=2
    )
    assert torch.equal(criterion(*case), expected)
    assert torch.equal(criterion((case.logits, case.votes), case.target), expected)
    heads = [torch.randn(5, 8), torch.randn(5, 8).bfloat16()]
    beta = sum(
        F.cross_entropy(h.float(), case.target, criterion.weight, ignore_index=2, label_smoothing=0.1)
        for h in heads
    )
    deep = criterion((case.logits, case.votes, heads), case.target)
    torch.testing.assert_close(deep, expected + 0.1 * beta)
    by_logits = zls.zipf_cross_entropy(
        case.logits,
        case.target,
        zipf_weight=0.3,
        alpha=1.5,
        label_smoothing=0.1,
        weight=criterion.weight,
        ignore_index=2,
    )
    criterion.ranking = "logits"
    assert torch.equal(criterion(case.logits, case.target), by_logits)


def test_module_is_a_module():
    criterion = zls.ZipfLoss(0.3, distribution=zls.LinearDecay(1e-3), weight=torch.ones(8), reduction="sum")
    for part in ("zipf_weight=0.3", "LinearDecay(smallest_prob=0.001)", "reduction='sum'", "weight=(8,)"):
        assert part in repr(criterion)
    assert "alpha=1.0" in repr(zls.ZipfLoss())
    assert list(criterion.state_dict()) == ["weight"]
    assert [n for n, _ in criterion.named_buffers()] == ["weight"]
    assert not list(criterion.parameters())
    case = make(5, 8, 6)
    assert criterion.double().weight.dtype == torch.float64
    for same in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(same(*case), criterion(*case))


# Fitting the law ----------------------------------------------------------------------------------------


def test_fit_recovers_the_law():
    rank = torch.arange(1, 101, dtype=torch.float64)
    for alpha in (0.5, 1.0, 2.5):
        p = rank**-alpha / (rank**-alpha).sum()
        rows = torch.stack([p[torch.randperm(100)] for _ in range(7)])
        fitted, intercept = zls.fit_zipf(rows)
        assert isinstance(fitted, float)
        assert fitted == pytest.approx(alpha, rel=1e-9)
        assert intercept == pytest.approx(p[0].log().item(), rel=1e-9)
    assert zls.fit_zipf(rows.float())[0] == pytest.approx(2.5, rel=1e-4)


def test_fit_skips_ranks_without_probability():
    p = torch.tensor([[0.5, 0.25, 0.25 * 2 / 3, 0.0, 0.0]])  # sorted: p ~ 1/(2 r) at ranks 1, 2, 3
    assert zls.fit_zipf(p)[0] == pytest.approx(1.0, rel=1e-6)


# Numbers of other types: what F.cross_entropy takes ------------------------------------------------------


NUMPY = pytest.importorskip("numpy")
NUMBERS = {
    "float32": lambda x: NUMPY.float32(x),
    "float64": lambda x: NUMPY.float64(x),
    "tensor": lambda x: torch.tensor(x),
}
INTEGERS = {
    "int64": lambda x: NUMPY.int64(x),
    "uint8": lambda x: NUMPY.uint8(x),
    "tensor": lambda x: torch.tensor(x),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_other_types(backend, device, kind):
    case, number = make(4, 6, 5, device=device), NUMBERS[kind]
    near = {"rtol": 1e-6, "atol": 1e-6}
    for options in (
        {"zipf_weight": 0.3},
        {"label_smoothing": 0.1},
        {"alpha": 1.5},
        {"num_items": 3.0},
        {"label_smoothing": 1},
    ):
        other = {k: number(v) for k, v in options.items()}
        plain, same = (zls.zipf_cross_entropy(*case, backend=backend, **o) for o in (options, other))
        torch.testing.assert_close(same, plain, **near)
        if not {"num_items", "alpha"} & set(options):
            criterion = zls.ZipfLoss(**other, deep_weight=number(0.5))
            assert all(type(getattr(criterion, k)) in (float, int) for k in (*options, "deep_weight"))
    for law, parameter in (
        (zls.Zipf, 1.5),
        (zls.LinearDecay, 0.125),
        (zls.ExponentialDecay, 0.5),
        (zls.RandomPareto, 2.0),
    ):
        assert law(number(parameter)) == law(parameter)
        assert hash(law(number(parameter))) == hash(law(parameter))


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_of_other_types(backend, device, kind):
    case, integer = make(4, 6, 5, device=device), INTEGERS[kind]
    options = {"backend": backend}
    for target in (case.target, case.target.byte()):
        losses = [zls.zipf_cross_entropy(case.logits, target, case.votes, ignore_index=i, **options)
                  for i in (integer(2), 2)]  # fmt: skip
        assert torch.equal(*losses)
    assert torch.equal(
        zls.rank_votes(case.votes, integer(6), **options), zls.rank_votes(case.votes, 6, **options)
    )
    labels = [zls.zipf_label(case.target, case.votes, n, ignore_index=i, **options)
              for n, i in ((integer(6), integer(2)), (6, 2))]  # fmt: skip
    assert torch.equal(*labels)
    votes = [zls.dense_vote(MAP.to(device), W.to(device), upsample=u, **options) for u in (integer(2), 2)]
    assert torch.equal(*votes)
    zls.check_inputs(*case, ignore_index=integer(2))


def test_uint8_classes(backend, device):
    case = make(4, 6, 5, device=device)
    y = case.target.byte()
    y[1] = 255
    for options in ({"ignore_index": 255}, {"ignore_index": 255, "reduction": "none", "only_correct": True}):
        results = []
        for target in (y, y.long()):
            x = case.leaf()
            zls.zipf_cross_entropy(x, target, case.votes, backend=backend, **options).sum().backward()
            label = zls.zipf_label(target, case.votes, 6, ignore_index=255, backend=backend)
            results.append((x.grad, label))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    zls.check_inputs(case.logits, y, case.votes, ignore_index=255)
    y[1] = 156  # -100 in eight bits, which ignores nothing
    with pytest.raises(IndexError, match=r"target\[1\] = 156"):
        zls.check_inputs(case.logits, y, case.votes)
    if device.type == "cpu" and backend != "triton":
        with pytest.raises(IndexError, match=r"target\[1\] = 156"):
            zls.zipf_loss(case.logits, y, case.votes, backend=backend)


def test_flags_and_names_of_other_types():
    true, plain = (zls.zipf_cross_entropy(X, Y, V, only_correct=o) for o in (NUMPY.bool_(True), True))
    assert torch.equal(true, plain)
    assert zls.ZipfLoss(only_correct=torch.tensor(False), reduction=NUMPY.str_("sum")).only_correct is False


NO_NUMBERS = (True, NUMPY.bool_(True), "1", None, [1.0], torch.tensor(True), torch.ones(2), 1j)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused(value):
    for name in ("zipf_weight", "label_smoothing", "alpha", "ignore_index"):
        with pytest.raises(TypeError, match=f"{name} must be an? (number|int), got"):
            zls.zipf_cross_entropy(X, Y, V, **{name: value})
    with pytest.raises(TypeError, match="num_classes must be an int, got"):
        zls.rank_votes(V, value)
    if not isinstance(value, bool | NUMPY.bool_ | torch.Tensor):
        with pytest.raises(TypeError, match="only_correct must be True or False, got"):
            zls.zipf_cross_entropy(X, Y, V, only_correct=value)


def test_options_on_another_device_or_with_gradient_are_refused():
    """Reading them would synchronise in every call, or lose the gradient without a word."""
    with pytest.raises(TypeError, match=r"alpha must be a number or a tensor on the CPU, got .* on meta"):
        zls.zipf_cross_entropy(X, Y, V, alpha=torch.tensor(1.0, device="meta"))
    with pytest.raises(TypeError, match="zipf_weight must not require grad"):
        zls.zipf_cross_entropy(X, Y, V, zipf_weight=torch.tensor(1.0, requires_grad=True))


def test_a_class_weight_that_requires_grad_is_refused():
    """As F.cross_entropy refuses it; and as there, not where nothing records a gradient."""
    w = torch.nn.Parameter(torch.ones(6))
    plain = zls.ZipfLoss(weight=torch.ones(6))
    plain.weight = w.data.clone().requires_grad_()
    refused = {
        "weight": (
            lambda: zls.zipf_cross_entropy(X, Y, V, weight=w),
            lambda: zls.zipf_cross_entropy(X, X.softmax(1), V, weight=w),
            lambda: zls.ZipfLoss(weight=w),
            lambda: plain(X, Y, V),
            lambda: torch.func.grad(lambda w: zls.zipf_cross_entropy(X, Y, V, weight=w))(w.data),
        ),
        "class_weight": (lambda: zls.zipf_head_loss(MAP, W, B, Y[:2], class_weight=w),),
    }
    for name, calls in refused.items():
        for call in calls:
            with pytest.raises(RuntimeError, match=f"{name} must not require grad.*{name}.detach"):
                call()
    for call in (lambda w: F.cross_entropy(X, Y, w), lambda w: zls.zipf_cross_entropy(X, Y, V, weight=w)):
        with torch.no_grad():
            call(w)
