"""Gradients as PyTorch sees them: gradcheck, upstream gradients, kept graphs, second derivatives."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from cases import make
from torch.utils.checkpoint import checkpoint

import zipfls_cuda as zls
from zipfls_cuda import ops

REFUSED = "differentiated again"


def loss_of(case, backend, **options):
    options = {"zipf_weight": 1.0, "backend": backend, **options}
    return lambda x: zls.zipf_cross_entropy(x, case.target, case.votes, **options)


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2, "only_correct": True}, {"weight": True}], ids=str
)
def test_gradcheck(backend, device, reduction, options):
    case = make(4, 7, 6, dtype=torch.float64, device=device)
    case.target[3] = -100
    case.logits[0, case.target[0]] += 9.0
    if "weight" in options:
        options = {"weight": torch.rand(7, device=device)}
    f = loss_of(case, backend, reduction=reduction, **options)
    fast = backend == "triton"  # interpreted: one random projection of the Jacobian, not all of its entries
    assert torch.autograd.gradcheck(f, (case.leaf(),), fast_mode=fast)
    by_logits = lambda x: zls.zipf_loss(x, case.target, reduction=reduction, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(by_logits, (case.leaf(),), fast_mode=fast)


def test_gradient_of_the_differentiable_reference(backend, device):
    """The hand-written gradient against autograd through the reference's differentiable form."""
    from zipfls_cuda import reference

    case = make(5, 30, 9, dtype=torch.float64, device=device)
    x = case.leaf()
    label = zls.zipf_label(case.target, case.votes, 30, backend="reference").double()
    label = label / label.sum(1, keepdim=True)
    loss = reference.zipf_term(x, case.target, label, label.log())
    loss = loss + reference.cross_entropy_term(x, case.target, None, 0.1)
    loss.mean().backward()
    y = case.leaf()
    loss_of(case, backend, label_smoothing=0.1)(y).backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-6, atol=1e-8)  # the public label is float32


def test_upstream_gradient_per_sample(backend, device):
    """reduction="none": every row scaled by its own upstream value (1), expanded and strided ones too (2)."""
    case = make(6, 11, 7, device=device)
    x = case.leaf()
    ones = torch.autograd.grad(loss_of(case, backend, reduction="none")(x).sum(), x)[0]
    scales = torch.tensor([0.0, 1.0, -2.0, 0.5, 1e4, 3.0], device=device)
    strided = torch.stack([scales, scales * 7], 1)[:, 0]
    for upstream in (
        scales,
        strided,
        torch.tensor(2.5, device=device).expand(6),
        torch.ones(6, device=device),
    ):
        x = case.leaf()
        loss_of(case, backend, reduction="none")(x).backward(upstream)
        torch.testing.assert_close(x.grad, ones * upstream[:, None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [0.0, -1.5, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_upstream_scale(backend, device, dtype, scale):
    case = make(4, 9, 5, dtype=dtype, device=device)
    x, y = case.leaf(), case.logits.double().requires_grad_()
    (loss_of(case, backend)(x) * scale).backward()
    (loss_of(case, "reference")(y) * scale).backward()
    tolerance = 4 * torch.finfo(dtype).eps * max(abs(scale), 1)
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=0, atol=max(tolerance, 1e-6 * abs(scale)))


def test_backward_twice_with_a_kept_graph(backend, device):
    """In-place scaling of the saved gradient must not scale it twice (21)."""
    case = make(4, 9, 5, device=device)
    for reduction in ("mean", "none"):
        x = case.leaf()
        loss = (loss_of(case, backend, reduction=reduction)(x) * 3).sum()
        first = torch.autograd.grad(loss, x, retain_graph=True)[0].clone()
        second = torch.autograd.grad(loss, x, retain_graph=True)[0].clone()
        third = torch.autograd.grad(loss, x)[0]
        assert torch.equal(first, second)
        assert torch.equal(first, third)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, x)


def test_two_losses_on_one_logits(backend, device):
    """Nothing is written over the logits (3)."""
    case = make(4, 9, 5, device=device)
    before = case.logits.clone()
    x = case.leaf()
    total = (
        loss_of(case, backend)(x)
        + 2 * loss_of(case, backend, reduction="sum")(x)
        + F.cross_entropy(x, case.target)
    )
    total.backward()
    assert torch.equal(x.detach(), before)
    parts = []
    for f in (
        loss_of(case, backend),
        loss_of(case, backend, reduction="sum"),
        lambda x: F.cross_entropy(x, case.target),
    ):
        y = case.leaf()
        f(y).backward()
        parts.append(y.grad)
    torch.testing.assert_close(x.grad, parts[0] + 2 * parts[1] + parts[2])


def test_no_gradient_is_computed_when_none_is_wanted(backend, device, monkeypatch):
    from zipfls_cuda import ops

    case = make(4, 9, 5, device=device)
    asked = []

    def watch(stage, name, x, select=ops.select):
        op = select(stage, name, x)
        if stage != "loss_fwd":
            return op
        return lambda *args: asked.append(args[-1]) or op(*args)

    monkeypatch.setattr(ops, "select", watch)
    f = loss_of(case, backend)
    with torch.no_grad():
        assert not f(case.leaf()).requires_grad
    with torch.inference_mode():
        f(case.logits)
    assert not f(case.logits).requires_grad
    assert asked == [False] * 3
    x = case.leaf()
    f(x).backward()
    assert asked[-1] is True
    with torch.no_grad():
        torch.testing.assert_close(f(x), f(case.logits))


def test_parts_are_detached(backend, device):
    case = make(4, 9, 5, device=device)
    loss, ce, zipf = loss_of(case, backend, return_parts=True, zipf_weight=0.5)(case.leaf())
    assert loss.requires_grad
    assert not ce.requires_grad
    assert not zipf.requires_grad
    torch.testing.assert_close(loss.detach(), ce + 0.5 * zipf)


# Second derivatives and forward mode always raise (16) -----------------------------------------------------


def test_gradient_penalty_raises(backend, device):
    case = make(4, 9, 5, device=device)
    x = case.leaf()
    loss = loss_of(case, backend)(x)
    g = torch.autograd.grad(loss, x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=REFUSED):
        (loss + g.pow(2).sum()).backward()


@pytest.mark.parametrize("upstream", [False, True])
def test_grad_of_grad_raises(backend, device, upstream):
    case = make(4, 9, 5, device=device)
    x = case.leaf()
    hidden = x * 2  # not a leaf
    scale = torch.ones((), device=device, requires_grad=upstream)
    g = torch.autograd.grad(loss_of(case, backend)(hidden) * scale, x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(g.sum(), x, allow_unused=True)


def test_gradgradcheck_refuses(backend, device):
    case = make(2, 3, 2, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.gradgradcheck(loss_of(case, backend), (case.leaf(),))


def test_create_graph_alone_is_fine(backend, device):
    case = make(4, 9, 5, device=device)
    x, y = case.leaf(), case.leaf()
    g = torch.autograd.grad(loss_of(case, backend)(x) * 2, x, create_graph=True)[0]
    (loss_of(case, backend)(y) * 2).backward()
    assert torch.equal(g.detach(), y.grad)


def test_transforms(backend, device):
    case = make(4, 9, 5, device=device)
    f = loss_of(case, backend)
    x = case.leaf()
    expected = torch.autograd.grad(f(x), x)[0]
    torch.testing.assert_close(torch.func.grad(f)(case.logits), expected)

    def per_sample(x, y, v):
        return zls.zipf_cross_entropy(x[None], y[None], v[None], zipf_weight=1.0, backend=backend)

    rows = torch.func.vmap(torch.func.grad(per_sample))(*case)
    torch.testing.assert_close(rows / 4, expected)
    losses = torch.func.vmap(per_sample)(*case)
    torch.testing.assert_close(losses, loss_of(case, backend, reduction="none")(case.logits))
    jacobian = torch.func.jacrev(loss_of(case, backend, reduction="none"))(case.logits)
    torch.testing.assert_close(jacobian.sum(0), rows)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(case.logits)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.func.jacrev(torch.func.jacrev(f))(case.logits)
    for transform in (torch.func.hessian, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match="forward-mode"):
            transform(f)(case.logits)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(f, (case.logits,), (torch.ones_like(case.logits),))


def test_forward_mode_raises(backend, device):
    case = make(4, 9, 5, device=device)
    tangent = torch.ones_like(case.logits)
    with fwd.dual_level():
        for x in (case.logits, case.leaf()):
            with pytest.raises(RuntimeError, match="forward-mode"):
                loss_of(case, backend)(fwd.make_dual(x, tangent))
        loss_of(case, backend)(case.logits)  # no tangent: nothing to refuse


# In a training step -----------------------------------------------------------------------------------


def test_checkpointing_gives_the_same_gradient(backend, device):
    case = make(4, 9, 5, device=device)
    x, y = case.leaf(), case.leaf()
    checkpoint(lambda x: loss_of(case, backend)(x * 2), x, use_reentrant=False).backward()
    loss_of(case, backend)(y * 2).backward()
    assert torch.equal(x.grad, y.grad)


def test_float16_mean_does_not_underflow(backend, device):
    """Divided by N and stored in float16 before GradScaler scales it, much would be zero (19)."""
    N, C = 64, 2000
    case = make(N, C, 20, device=device, scale=1.0)
    half = case.logits.half()
    x, y = half.clone().requires_grad_(), half.double().requires_grad_()
    (loss_of(case, backend)(x) * 65536).backward()
    (loss_of(case, "reference")(y) * 65536).backward()
    lost = ((x.grad == 0) & (y.grad.abs() > 1e-3)).float().mean()
    assert lost == 0
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=2e-3, atol=1e-3)


def test_grad_scaler(backend, device):
    """A step under GradScaler equals the float32 step, to half precision."""
    case = make(8, 10, 9, device=device)
    inputs = torch.randn(8, 6, device=device)
    steps = []
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        head = torch.nn.Linear(6, 10).to(device)
        optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        with torch.autocast(device.type, dtype, enabled=dtype == torch.float16):
            logits = head(inputs)
            assert logits.dtype == dtype
            loss = zls.zipf_cross_entropy(logits, case.target, case.votes, backend=backend)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        steps.append(head.weight.detach().clone())
    torch.testing.assert_close(steps[1], steps[0], rtol=0, atol=2e-3)


def test_head_loss(backend, device):
    """Gradients to features, weight and bias equal those of the parts written out."""
    features = torch.randn(3, 6, 4, 4, device=device)
    weight, bias = torch.randn(9, 6, device=device), torch.randn(9, device=device)
    target = torch.randint(9, (3,), device=device)
    for upsample, tokens in ((1, False), (2, False), (1, True)):
        source = features.flatten(2).transpose(1, 2) if tokens else features
        a = [t.detach().clone().requires_grad_() for t in (source, weight, bias)]
        b = [t.detach().clone().requires_grad_() for t in (source, weight, bias)]
        options = {"zipf_weight": 0.7, "label_smoothing": 0.1, "backend": backend}
        loss = zls.zipf_head_loss(*a, target, upsample=upsample, **options)
        loss.backward()
        votes = zls.dense_vote(*b, upsample=upsample, backend=backend)
        logits = F.linear(b[0].mean(1 if tokens else (2, 3)), *b[1:])
        expected = zls.zipf_cross_entropy(logits, target, votes, **options)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    class_weight = torch.rand(9, device=device)
    parts = zls.zipf_head_loss(
        features, weight, None, target, class_weight=class_weight, return_parts=True, backend=backend
    )
    logits = F.linear(features.mean((2, 3)), weight)
    torch.testing.assert_close(parts[1], F.cross_entropy(logits, target, class_weight))


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_micro_batches_add_up_with_num_items(backend, device, dtype, as_tensor):
    """Gradients accumulated over unequal micro-batches, some samples ignored: those of the whole batch."""
    case = make(12, 10, 9, device=device, dtype=dtype)
    case.target[[1, 5, 6]] = -100
    deep = torch.randn(12, 10, device=device)
    criterion = zls.ZipfLoss(0.7, label_smoothing=0.1, deep_weight=0.3)
    with zls.use_backend(backend):
        whole, parts = case.leaf(), case.leaf()
        loss = criterion((whole, case.votes, deep), case.target)
        loss.backward()
        n = torch.tensor(9.0, device=device, dtype=torch.float64, requires_grad=True) if as_tensor else 9
        total = 0
        for rows in (slice(0, 5), slice(5, 7), slice(7, 12)):  # the second has ignored samples alone
            output = (parts[rows], case.votes[rows], deep[rows])
            share = criterion(output, case.target[rows], num_items_in_batch=n)
            share.backward()
            assert share.dtype == torch.float32
            total += share.detach()
    torch.testing.assert_close(total, loss.detach())
    assert not as_tensor or n.grad is None
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(parts.grad, whole.grad, rtol=tolerance, atol=tolerance / 12)


# Batched gradients and compiled autograd: as F.cross_entropy -----------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_batched_gradients(backend, device, reduction, soft):
    case = make(4, 9, 5, device=device)
    target = case.logits.softmax(1) if soft else case.target

    def f(x):
        return zls.zipf_cross_entropy(x, target, case.votes, reduction=reduction, backend=backend)

    x = case.leaf()
    upstream = torch.randn(3, *f(x).shape, device=device)
    one_by_one = torch.stack([torch.autograd.grad(f(x), x, u)[0] for u in upstream])
    for keep in (True, False):
        together = torch.autograd.grad(f(x), x, upstream, is_grads_batched=True, retain_graph=keep)[0]
        torch.testing.assert_close(together, one_by_one)
    together = torch.autograd.grad(f(x), x, upstream, is_grads_batched=True, create_graph=True)[0]
    torch.testing.assert_close(together, one_by_one)
    with pytest.raises(RuntimeError, match=REFUSED):
        (together.sum() + x.sum()).backward()
    jacobians = [torch.autograd.functional.jacobian(f, case.logits, vectorize=v) for v in (True, False)]
    torch.testing.assert_close(*jacobians)
    loss = zls.zipf_cross_entropy(
        x * 1, target, case.votes, inplace=True, reduction=reduction, backend=backend
    )
    with pytest.raises(RuntimeError, match=r"inplace=True .* no batched gradients"):
        torch.autograd.grad(loss, x, upstream, is_grads_batched=True)


@pytest.mark.skipif(not ops.NATIVE, reason="the C++ extension is not built")
def test_both_kinds_of_target_take_the_native_autograd():
    """An eager call on the C++ operator attaches a C++ node; other backends attach the Python Function."""
    case = make(4, 9, 5)
    for target in (case.target, case.logits.softmax(1)):
        loss = zls.zipf_cross_entropy(case.leaf(), target, case.votes, backend="cpu")
        assert loss.grad_fn.name() == "ZipfLossBackward"
        parts = zls.zipf_cross_entropy(case.leaf(), target, case.votes, backend="cpu", return_parts=True)
        assert [part.requires_grad for part in parts] == [True, False, False]
        with torch.no_grad():
            assert zls.zipf_cross_entropy(case.leaf(), target, case.votes, backend="cpu").grad_fn is None
        loss = zls.zipf_cross_entropy(case.leaf(), target, case.votes, backend="reference")
        assert loss.grad_fn.name() == "LossBackward"


@pytest.mark.skipif(not ops.NATIVE, reason="the C++ extension is not built")
def test_distillation_takes_the_native_autograd():
    case = make(4, 9, 5)
    f = partial(zls.distillation_loss, teacher=case.logits.flip(0), target=case.target, kd_weight=1.0)
    assert f(case.leaf(), backend="cpu").grad_fn.name() == "ZipfLossBackward"
    assert f(case.leaf(), backend="reference").grad_fn.name() == "LossBackward"
    parts = f(case.leaf(), backend="cpu", return_parts=True)
    assert [part.requires_grad for part in parts] == [True, False, False]
    with torch.no_grad():
        assert f(case.leaf(), backend="cpu").grad_fn is None
    assert f(case.logits, backend="cpu").grad_fn is None


COMPILED = {
    "none": {"reduction": "none"},
    "mean in float16": {"dtype": torch.float16},
    "weight, smoothing, only_correct": {"weight": True, "label_smoothing": 0.1, "only_correct": True},
    "parts": {"return_parts": True, "reduction": "sum"},
    "probabilities": {"soft": True},
    "in place": {"inplace": True},
    "probabilities in place": {"soft": True, "inplace": True},
    "distillation": {"distils": True},
    "distillation in float16, in place": {"distils": True, "dtype": torch.float16, "inplace": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_autograd(backend, device, name):
    """An eager loss whose backward pass is compiled: as DDP's python_reducer does it."""
    import torch._dynamo.compiled_autograd as compiled_autograd

    options = dict(COMPILED[name])
    case = make(6, 9, 5, device=device, dtype=options.pop("dtype", torch.float32))
    target = case.logits.softmax(1).detach() if options.pop("soft", False) else case.target
    if "weight" in options:
        options["weight"] = torch.rand(9, device=device)
    function, beside = zls.zipf_cross_entropy, (target, case.votes)
    if options.pop("distils", False):
        function, beside = partial(zls.distillation_loss, kd_weight=2.0), (case.logits.flip(1), target)
    torch._dynamo.reset()

    def gradient(N, compiler):
        x = case.leaf()
        logits = x[:N] * 2
        loss = function(logits, *(x[:N] for x in beside), backend=backend, **options)
        loss = (loss[0] if "return_parts" in options else loss).sum() * 3
        if not options.get("inplace"):
            loss = loss + F.cross_entropy(logits.float(), case.target[:N])  # a gradient to add to
        with compiled_autograd._enable(compiler) if compiler else contextlib.nullcontext():
            loss.backward()
        return x.grad

    compiler = torch.compile(backend="eager")
    for N in (6, 4):
        torch.testing.assert_close(gradient(N, compiler), gradient(N, None))
