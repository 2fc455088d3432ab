"""Losses of a linear layer in chunks of rows: as F.linear and the loss in turn, without the logits."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from cases import DTYPES, error, make, probabilities
from torch.autograd import forward_ad

import zipfls_cuda as zls
from zipfls_cuda import chunked, linear, ops

N, D, C, P = 23, 6, 12, 9


def inputs(dtype=torch.float32, device="cpu", *, ignored=True, soft=False):
    """(input, linear_weight, linear_bias, target, votes), the first three leaves that want gradients."""
    case = make(N, C, P)
    g = torch.Generator().manual_seed(1)
    heads = (torch.randn(shape, generator=g).to(device, dtype) for shape in ((N, D), (C, D), (C,)))
    target = case.target.clone()
    if ignored:
        target[3::7] = -100
    target = probabilities(case, "mixup of smoothed") if soft else target
    return *(x.requires_grad_() for x in heads), target.to(device), case.votes.to(device)


def results(parts, leaves, upstream=None):
    """(loss, ce, zipf and the gradients to the leaves)."""
    loss = parts[0]
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    return *(x.detach() for x in parts), *torch.autograd.grad(loss, leaves, upstream)


def chunks(args, upstream=None, **options):
    x, w, b, target, votes = args
    options = {"chunk_rows": 5, "zipf_weight": 0.7, **options}
    parts = zls.linear_zipf_cross_entropy(x, w, target, votes, linear_bias=b, return_parts=True, **options)
    return results(parts, [t for t in args[:3] if t is not None], upstream)


def plain(args, upstream=None, **options):
    """F.linear, then the loss."""
    x, w, b, target, votes = args
    options = {"zipf_weight": 0.7, **options}
    parts = zls.zipf_cross_entropy(F.linear(x, w, b), target, votes, return_parts=True, **options)
    return results(parts, [t for t in args[:3] if t is not None], upstream)


def exact(args, upstream=None, **options):
    """``plain`` in float64 on the CPU, from the same rounded tensors."""
    wide = [None if t is None else t.detach().double().cpu().requires_grad_() for t in args[:3]]
    target = args[3].double() if args[3].is_floating_point() else args[3]
    options = {k: v.double().cpu() if torch.is_tensor(v) else v for k, v in options.items()}
    return plain((*wide, target.cpu(), args[4].cpu()), upstream, **{**options, "backend": "reference"})


NAMES = ("loss", "ce", "zipf", "gradient to input", "gradient to weight", "gradient to bias")


def assert_within_budget(ours, theirs, truth):
    """No worse than twice the error of the plain way, and a few roundings of the result's type."""
    for name, a, b, c in zip(NAMES, ours, theirs, truth):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        size = c[c.isfinite()].abs().max().item() if c.isfinite().any() else 0.0
        allowed = 2 * error(b, c) + 4 * torch.finfo(a.dtype).eps * max(size, 1e-3)
        assert error(a, c) <= allowed, f"{name}: {error(a, c):.3g} off, allowed is {allowed:.3g}"


WEIGHT = torch.linspace(0.0, 2.0, C)
OPTIONS = {
    "as it is": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "correct": {"only_correct": True},
    "correct, sum": {"only_correct": True, "reduction": "sum"},
    "weights": {"weight": WEIGHT, "label_smoothing": 0.1},
    "weights, correct": {"weight": WEIGHT, "only_correct": True},
    "weights, sum": {"weight": WEIGHT, "reduction": "sum"},
    "items": {"num_items": 7.5},
    "no Zipf": {"zipf_weight": 0.0, "weight": WEIGHT},
    "one chunk": {"chunk_rows": 64, "weight": WEIGHT},
    "rows": {"chunk_rows": 1},
    "law": {"distribution": zls.LinearDecay()},
}


@pytest.mark.interpreted(4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_plain_way(backend, device, options, soft, dtype):
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in OPTIONS[options].items()}
    args = inputs(dtype, device, soft=soft)
    upstream = torch.rand(N) if options.get("reduction") == "none" else torch.tensor(3.0)
    ours = chunks(args, upstream, backend=backend, **options)
    without = {k: v for k, v in options.items() if k != "chunk_rows"}
    truth = exact(args, upstream, **without)
    assert_within_budget(ours, plain(args, upstream, backend=backend, **without), truth)
    again = chunks(args, upstream, backend=backend, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("options", ["as it is", "none", "correct", "weights, correct"])
def test_gradcheck(options):
    x, w, b, target, votes = inputs(torch.float64)
    options = {k: v.double() if torch.is_tensor(v) else v for k, v in OPTIONS[options].items()}

    def loss(x, w, b):
        return zls.linear_zipf_cross_entropy(
            x, w, target, votes, linear_bias=b, **{"chunk_rows": 5, "zipf_weight": 0.7, **options}
        )

    torch.autograd.gradcheck(loss, (x, w, b))


def test_ranks_by_the_logits_without_votes():
    x, w, b, target, _ = inputs()
    got = zls.linear_zipf_cross_entropy(x, w, target, linear_bias=b, chunk_rows=5)
    expected = zls.zipf_cross_entropy(F.linear(x, w, b), target)
    torch.testing.assert_close(got, expected)
    ours, theirs = (torch.autograd.grad(loss, (x, w, b)) for loss in (got, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", ["all ignored", "none correct", "all correct", "no weight", "no rows", "one correct"]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_means_of_nothing(case, weighted, dtype):
    """Losses NaN or 0, and gradients of zeros or NaN, where the plain way has them."""
    x, w, b, target, votes = inputs(dtype)
    weight = WEIGHT + 0.5 if weighted else None
    if case == "all ignored":
        target[:] = -100
    elif case == "no weight":
        weight = torch.zeros(C)
    elif case == "no rows":
        x, target, votes = x[:0].detach().requires_grad_(), target[:0], votes[:0]
    elif "correct" in case:
        top = F.linear(x, w, b).argmax(1)
        target = top if case == "all correct" else (top + 1) % C
        if case == "one correct":
            target[11] = top[11]
    args = (x, w, b, target, votes)
    options = {"weight": weight, "only_correct": "correct" in case}
    assert_within_budget(chunks(args, **options), plain(args, **options), exact(args, **options))


def test_float16_gradients_of_a_mean_over_few_correct_samples_do_not_vanish():
    """Zipf's mean is over one sample of 4096, CE's over all: in the unit of Zipf's, dz is 0 in float16."""
    N, C = 4096, 512
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(N, D, generator=g).half(), 0.01 * torch.randn(C, D, generator=g).half()
    top = F.linear(x, w).argmax(1)
    target = (top + 1) % C
    target[7] = top[7]
    args = (x.requires_grad_(), w.requires_grad_(), None, target, torch.randint(C, (N, P)))
    options = {"only_correct": True, "chunk_rows": 512}
    upstream = torch.tensor(float(N))
    ours = chunks(args, upstream, **options)
    options.pop("chunk_rows")
    theirs, truth = plain(args, upstream, **options), exact(args, upstream, **options)
    assert_within_budget(ours, theirs, truth)
    others = torch.arange(N) != 7  # whose gradient is that of CE alone
    assert_within_budget(*((*x[:3], x[3][others]) for x in (ours, theirs, truth)))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), ()])
def test_only_the_gradients_that_are_wanted(monkeypatch, wanted):
    x, w, b, target, votes = inputs()
    expected = chunks((x, w, b, target, votes))
    heads = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, w, b))]
    calls = []
    for name in ("mm", "addmm"):
        function = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=function, **k: calls.append(1) or f(*a, **k))
    monkeypatch.setattr(chunked, "add_product", lambda *a, f=chunked.add_product: calls.append(1) or f(*a))
    loss = zls.linear_zipf_cross_entropy(
        heads[0], heads[1], target, votes, linear_bias=heads[2], zipf_weight=0.7, chunk_rows=5
    )
    assert torch.equal(loss.detach(), expected[0])
    assert len(calls) == 4 * (1 + (0 in wanted) + (1 in wanted))  # 20 rows that count
    if wanted:
        loss.backward()
    for i, (head, grad) in enumerate(zip(heads, expected[3:])):
        assert (head.grad is not None) == (i in wanted)
        assert head.grad is None or torch.equal(head.grad, grad)


def test_evaluation_computes_no_gradient(monkeypatch):
    args = inputs()
    monkeypatch.setitem(ops.OPERATORS, ("loss_grad_", "cpu"), None)
    for reduction in ("mean", "sum", "none"):
        options = {"zipf_weight": 0.7, "reduction": reduction}
        expected = zls.zipf_cross_entropy(F.linear(*args[:3]), *args[3:], **options)
        with torch.no_grad():
            loss = zls.linear_zipf_cross_entropy(
                *args[:2], *args[3:], linear_bias=args[2], chunk_rows=5, **options
            )
        torch.testing.assert_close(loss, expected)


def test_ignored_rows_are_left_out_on_a_cpu(monkeypatch):
    x, w, b, target, votes = inputs()
    target[:] = -100
    target[[2, 9, 20]] = 4
    seen = []
    op = ops.OPERATORS["loss_grad_", "cpu"]
    monkeypatch.setitem(ops.OPERATORS, ("loss_grad_", "cpu"), lambda z, *a: seen.append(len(z)) or op(z, *a))
    args = (x, w, b, target, votes)
    ours = chunks(args, backend="cpu")
    assert seen == [3]
    assert_within_budget(ours, plain(args), exact(args))


# Distillation --------------------------------------------------------------------------------------------

TAUGHT = {
    "KD": {"kd_weight": 1.0, "temperature": 2.0},
    "KD alone": {"kd_weight": 1.0, "ce_weight": 0.0},
    "DKD, none": {"tckd_weight": 1.0, "nckd_weight": 8.0, "temperature": 4.0, "reduction": "none"},
    "NKD, sum": {"soft_target_weight": 1.0, "nckd_weight": 1.5, "reduction": "sum"},
    "items, form": {"kd_weight": 0.5, "num_items": 9.0, "form": "cross_entropy"},
    "sample weights": {"kd_weight": 0.5, "sample_weight": torch.linspace(0.0, 2.0, N)},
}


@pytest.mark.interpreted(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", TAUGHT)
def test_distillation_equals_the_plain_way(backend, device, options, dtype):
    x, w, b, target, _ = inputs(dtype, device)
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in TAUGHT[options].items()}
    target = None if options.get("ce_weight") == 0 else target
    of_teacher = torch.randn(N, 9), torch.randn(C, 9), torch.randn(C)
    upstream = torch.rand(N) if options.get("reduction") == "none" else torch.tensor(3.0)

    def one_after_the_other(x, w, b, of_teacher, backend, sample_weight=None, **options):
        logits, teacher = F.linear(x, w, b), F.linear(*of_teacher)
        y = None if target is None else target.to(x.device)
        parts = zls.distillation_loss(
            logits, teacher, y, backend=backend, return_parts=True, sample_weight=sample_weight, **options
        )
        return results(parts, (x, w, b), upstream)

    on_device = [t.to(device) for t in of_teacher]
    parts = zls.linear_distillation_loss(
        x, w, *on_device[:2], target, linear_bias=b, teacher_bias=on_device[2], chunk_rows=5,
        return_parts=True, backend=backend, **options,
    )  # fmt: skip
    ours = results(parts, (x, w, b), upstream)
    theirs = one_after_the_other(x, w, b, on_device, backend, **options)
    wide = [t.detach().double().cpu().requires_grad_() for t in (x, w, b)]
    options = {k: v.cpu() if torch.is_tensor(v) else v for k, v in options.items()}
    truth = one_after_the_other(*wide, [t.double() for t in of_teacher], "reference", **options)
    if dtype != torch.float64:  # there the float32 teacher's logits differ by their own rounding
        assert_within_budget(ours, theirs, truth)
    if dtype != torch.bfloat16:
        torch.testing.assert_close(ours, theirs)


def test_distillation_refuses_by_name():
    x, w, _, target, _ = inputs()
    t, u = torch.randn(N, 9), torch.randn(C, 9)
    for error_type, match, arguments in (
        (ValueError, r"teacher_input must have shape \(23, D\)", (x, w, t[:4], u, target)),
        (ValueError, "teacher_weight must have the 12 classes of linear_weight", (x, w, t, u[:5], target)),
        (TypeError, "teacher_weight must have the dtype of teacher_input", (x, w, t, u.half(), target)),
        (ValueError, "target may be None with kd_weight alone", (x, w, t, u, None)),
    ):
        with pytest.raises(error_type, match=match):
            zls.linear_distillation_loss(*arguments, kd_weight=1.0)


# Memory --------------------------------------------------------------------------------------------------


def peak_bytes(call) -> int:
    """The most bytes that PyTorch's CPU allocator had given out at a time during a call, by its own count."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("only_correct", [False, True])
def test_no_more_than_an_eighth_of_the_logits(dtype, reduction, only_correct):
    """Beside the gradients, which are kept in float32 and then given in the type of the weight."""
    N, D, C = 2464, 16, 4096
    x, w = (
        torch.randn(N, D, dtype=dtype, requires_grad=True),
        torch.randn(C, D, dtype=dtype, requires_grad=True),
    )
    b, target = torch.zeros(C, dtype=dtype, requires_grad=True), torch.randint(C, (N,))
    target[::50] = -100

    def step():
        loss = zls.linear_zipf_cross_entropy(
            x, w, target, linear_bias=b, zipf_weight=0.0 if reduction == "none" else 0.1, votes=VOTES[:N],
            reduction=reduction, only_correct=only_correct,
        )  # fmt: skip
        loss.sum().backward()

    x.grad = w.grad = b.grad = None
    logits = N * C * dtype.itemsize
    gradients = N * D * dtype.itemsize + C * (D + 1) * (4 if dtype == torch.float32 else 4 + dtype.itemsize)
    assert peak_bytes(step) <= logits / 8 + gradients
    assert all(t.grad is not None for t in (x, w, b))


VOTES = torch.randint(4096, (2464, 4), generator=torch.Generator().manual_seed(3), dtype=torch.int32)


def test_default_rows():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    wide, narrow = torch.float32, torch.bfloat16
    assert chunked.default_rows(2048, wide, cpu, 1) == 227
    assert chunked.default_rows(8192, narrow, cpu, 1) == 744
    assert chunked.default_rows(8192, wide, cpu, 2) == 455
    assert chunked.default_rows(10, wide, cpu, 1) == chunked.FEWEST_ROWS["cpu"]
    assert chunked.default_rows(10**6, wide, cpu, 1) == chunked.MOST_ROWS["cpu"]
    assert chunked.default_rows(10**6, narrow, gpu, 1) == chunked.MOST_ROWS["cuda"]
    assert chunked.default_rows(4096, narrow, gpu, 2) == chunked.FEWEST_ROWS["cuda"] // 2


def test_correct_samples_are_counted_without_those_ignored():
    """As where ignored rows stay in the chunks, which they do not on a CPU."""
    x, w, b, target, _ = (t.detach() for t in inputs())
    top = F.linear(x, w, b).argmax(1)
    head = chunked.Head(x, w, b, torch.float32)
    spans = chunked.chunks_of(N, None, 5)
    for ignore_index in (-100, int(top[0])):
        count = chunked.count_correct(head, spans, 5, top, ignore_index)
        assert count == (top != ignore_index).sum()
    expected = ((top == target) & (target != -100)).sum()
    assert chunked.count_correct(head, spans, 5, target, -100) == expected


# Autograd ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_and_the_buffers_scaled_once(reduction):
    """The kept graph gives the same again; the last backward scales the saved gradients where they are."""
    x, w, b, target, votes = inputs()
    loss = zls.linear_zipf_cross_entropy(
        x, w, target, votes, linear_bias=b, chunk_rows=5, reduction=reduction
    )
    upstream = torch.full_like(loss, 3.0)
    first = torch.autograd.grad(loss, (x, w, b), upstream, retain_graph=True)
    second = torch.autograd.grad(loss, (x, w, b), 2 * upstream, retain_graph=True)
    third = torch.autograd.grad(loss, (x, w, b), upstream)
    for a, c, d in zip(first, second, third, strict=True):
        assert torch.equal(a, d)
        torch.testing.assert_close(c, 2 * a)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (x, w, b), upstream)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("of", [0, 1, 2])
def test_a_second_derivative_is_refused(reduction, of):
    x, w, b, target, votes = inputs()
    loss = zls.linear_zipf_cross_entropy(x, w, target, votes, linear_bias=b, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, (x, w, b)[of], create_graph=True)
    for leaf in (x, w, b):
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(grad.square().sum(), leaf, retain_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_mode_is_refused(reduction):
    x, w, b, target, votes = inputs()
    options = {"linear_bias": b, "reduction": reduction}
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        zls.linear_zipf_cross_entropy(
            forward_ad.make_dual(x, torch.ones_like(x)), w, target, votes, **options
        )
    f = lambda x: zls.linear_zipf_cross_entropy(x, w, target, votes, **options).sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(f, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_func(reduction):
    x, w, b, target, votes = inputs()

    def loss(x, w, b):
        return zls.linear_zipf_cross_entropy(
            x, w, target, votes, linear_bias=b, chunk_rows=5, reduction=reduction
        ).sum()

    expected = torch.autograd.grad(loss(x, w, b), (x, w, b))
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1, 2))(x, w, b), expected)
    many = torch.stack([x, 2 * x]).detach()
    got = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None))(many, w, b)
    torch.testing.assert_close(got[0], expected[0])
    losses = torch.func.vmap(loss, in_dims=(0, None, None))(many, w, b)
    torch.testing.assert_close(losses[0], loss(x, w, b))


def test_no_gradient_through_the_parts_and_none_for_an_unused_loss():
    x, w, b, target, votes = inputs()
    loss, ce, zipf = zls.linear_zipf_cross_entropy(x, w, target, votes, linear_bias=b, return_parts=True)
    assert loss.requires_grad
    assert (ce.requires_grad, zipf.requires_grad) == (False, False)
    torch.testing.assert_close(loss.detach(), ce + 0.1 * zipf)


# Modes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("only_correct", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_waits_for_a_device(dtype, reduction, only_correct, grad):
    """On meta tensors, which have no values: whatever looks at one raises."""
    N, D, C, E = 4000, 6, 12, 9
    empty = functools.partial(torch.empty, device="meta")
    head = empty(N, D, dtype=dtype), empty(C, D, dtype=dtype), empty(C, dtype=dtype)
    target, votes = empty(N, dtype=torch.int64), empty(N, 4, dtype=torch.int32)
    upstream = empty(N) if reduction == "none" and grad else None
    rest = (-100, reduction, dtype, None, "reference", grad, grad, grad, upstream)
    for y in (target, empty(N, C)):
        found = chunked.loss_fwd(*head, y, votes, empty(5), empty(C), 1.0, 0.1, 0.1, only_correct, *rest)
        assert [x.shape for x in found[3:6]] == [x.shape if grad else (0,) for x in head]
    teacher = empty(N, E), empty(C, E), None
    options = (torch.float32, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 2.0, "divergence")
    chunked.distill_fwd(*head, *teacher, target, empty(N), *options, *rest)


@pytest.mark.interpreted(0)  # the operator is opaque to the compiler, whatever it calls
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph_with_a_dynamic_batch(backend, device, reduction):
    def step(x, w, b, target, votes):
        return zls.linear_zipf_cross_entropy(
            x, w, target, votes, linear_bias=b, chunk_rows=5, reduction=reduction, backend=backend
        ).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    x, w, b, target, votes = inputs(device=device)
    for n in (N, 11):
        found = []
        for f in (step, compiled):
            leaf = x.detach()[:n].clone().requires_grad_()
            loss = f(leaf, w, b, target[:n], votes[:n])
            found.append((loss.detach(), *torch.autograd.grad(loss * 3, (leaf, w, b))))
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, w, b, target, votes), step(x, w, b, target, votes))


def test_compile_with_inductor_and_the_default_chunks():
    x, w, b, target, votes = inputs()
    t, u = torch.randn(N, 9), torch.randn(C, 9)

    def step(x, w, b):
        first = zls.linear_zipf_cross_entropy(x, w, target, votes, linear_bias=b, only_correct=True)
        return first + zls.linear_distillation_loss(x, w, t, u, target, kd_weight=1.0, linear_bias=b)

    torch._dynamo.reset()
    losses = step(x, w, b), torch.compile(step, fullgraph=True)(x, w, b)
    grads = [torch.autograd.grad(loss, (x, w, b)) for loss in losses]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("stage", ["loss", "loss, none", "distill"])
def test_opcheck(stage):
    x, w, b, target, votes = (t.detach() for t in inputs())
    rest = (torch.float32, 5, "reference", True, True, True)
    if stage == "distill":
        teacher = (torch.randn(N, 9), torch.randn(C, 9), None, target, None, torch.float32)
        args = (x, w, b, *teacher, 1.0, 0.5, *(0.0,) * 4, 2.0, "divergence", -100, "mean", *rest, None)
        torch.library.opcheck(torch.ops.zipfls.linear_distill_fwd.default, args)
        return
    reduction = "none" if "none" in stage else "mean"
    upstream = torch.rand(N) if reduction == "none" else None
    options = (1.0, 0.5, 0.1, False, -100, reduction)
    args = (x, w, b, target, votes, torch.zeros(13), None, *options, *rest, upstream)
    torch.library.opcheck(torch.ops.zipfls.linear_loss_fwd.default, args)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(amp, dtype):
    """As F.linear under autocast, but that gradients to float32 leaves are not rounded to 16 bits between."""
    x, w, b, target, votes = inputs(dtype)
    args, rounded = (x, w, b, target, votes), [t.detach().to(amp).requires_grad_() for t in (x, w, b)]
    with torch.autocast("cpu", amp):
        ours, theirs = chunks(args), plain(args)
    assert_within_budget(ours, theirs, exact((*rounded, target, votes)))
    assert [g.dtype for g in ours[3:]] == [dtype] * 3
    with torch.autocast("cpu", amp):
        wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
        assert chunks((*wide, target, votes))[0].dtype == torch.float64


def test_checkpointed_and_saved_on_hooks():
    x, w, b, target, votes = inputs()

    def loss(x):
        return zls.linear_zipf_cross_entropy(x, w, target, votes, linear_bias=b, chunk_rows=5)

    expected = torch.autograd.grad(loss(x), (x, w, b))
    got = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(got, (x, w, b)), expected, rtol=0, atol=0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        got = loss(x)
    torch.testing.assert_close(torch.autograd.grad(got, (x, w, b)), expected, rtol=0, atol=0)


# Arguments -----------------------------------------------------------------------------------------------


def test_wrong_arguments_by_name():
    x, w, b, target, votes = inputs()

    def call(x=x, w=w, target=target, votes=votes, **options):
        return zls.linear_zipf_cross_entropy(x, w, target, votes, **options)

    for error_type, match, arguments in (
        (ValueError, r"input must have shape \(N, D\), got \(23,\)", {"x": x[:, 0]}),
        (ValueError, r"linear_weight must have shape \(C, D\) with D = 6", {"w": w[:, :5]}),
        (ValueError, r"linear_bias must have shape \(C,\) = \(12,\)", {"linear_bias": b[:3]}),
        (TypeError, "linear_weight must have the dtype of input, torch.float32", {"w": w.half()}),
        (TypeError, "linear_bias must be a torch.Tensor, got float", {"linear_bias": 1.0}),
        (TypeError, "input must be float32", {"x": x.long()}),
        (ValueError, "at least 2 classes", {"w": w[:1]}),
        (ValueError, r"target must have shape \(23,\)", {"target": target[:4]}),
        (ValueError, "votes must have one row per sample", {"votes": votes[:4]}),
        (ValueError, r"weight must have shape \(C,\)", {"weight": torch.ones(3)}),
        (RuntimeError, "weight must not require grad", {"weight": torch.ones(C, requires_grad=True)}),
        (ValueError, "chunk_rows must be at least 1, got 0", {"chunk_rows": 0}),
        (TypeError, "chunk_rows must be an int", {"chunk_rows": 1.5}),
        (ValueError, "distribution must be a law of the rank", {"distribution": zls.RandomUniform()}),
        (ValueError, "reduction must be one of", {"reduction": "max"}),
        (ValueError, "num_items", {"reduction": "sum", "num_items": 3}),
        (ValueError, "backend must be None or one of", {"backend": "best"}),
        (TypeError, "process_group", {"process_group": None}),
        (TypeError, "inplace", {"inplace": True}),
        (ValueError, "linear_weight must be on the device of input", {"w": w.to("meta")}),
    ):
        with pytest.raises(error_type, match=match):
            call(**arguments)


def test_out_of_range_is_named_by_its_row_among_all():
    x, w, _, target, votes = inputs()
    target[19] = C
    with pytest.raises(IndexError, match=rf"target\[19\] = {C} is outside"):
        zls.linear_zipf_cross_entropy(x, w, target, votes, chunk_rows=5)
    target[19], votes[20, 3] = 0, C
    with pytest.raises(IndexError, match=rf"votes\[20, 3\] = {C}"):
        zls.linear_zipf_cross_entropy(x, w, target, votes, chunk_rows=5)


@pytest.mark.parametrize("views", ["rows", "columns", "expanded"])
def test_strides(views):
    x, w, b, target, votes = inputs()
    expected = chunks((x, w, b, target, votes))
    with torch.no_grad():
        if views == "rows":
            x, w = (torch.stack([t, t], 1)[:, 0] for t in (x, w))
        elif views == "columns":
            x, w = (t.t().contiguous().t() for t in (x, w))
        else:
            x = x[:1].expand(N, D)
    if views == "expanded":
        expected = chunks((x.detach().clone().requires_grad_(), w, b, target, votes))
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    for a, c in zip(chunks((x, w, b, target, votes)), expected, strict=True):
        torch.testing.assert_close(a, c)


# The head ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(N, D, 3, 4), (N, 9, D)], ids=["map", "tokens"])
@pytest.mark.parametrize("options", [{}, {"only_correct": True, "return_parts": True}, {"inplace": True}])
def test_a_head_of_many_logits_takes_the_same_path(monkeypatch, shape, options):
    _, w, b, target, _ = inputs()
    features = torch.randn(shape, requires_grad=True)
    seen = []
    function = linear.linear_zipf_cross_entropy
    monkeypatch.setattr(
        linear, "linear_zipf_cross_entropy", lambda *a, **k: seen.append(1) or function(*a, **k)
    )
    found = []
    for large in (1 << 26, N * C * 4):
        monkeypatch.setattr(linear, "LARGE", large)
        loss = zls.zipf_head_loss(features, w, b, target, **options)
        parts = loss if isinstance(loss, tuple) else (loss,)
        found.append(results(parts, (features, w, b)))
    assert seen == [1]
    torch.testing.assert_close(found[1], found[0])
    zls.zipf_head_loss(features, w, b, target, distribution=zls.RandomUniform()).backward()
    assert seen == [1]
