"""Operators: opcheck, torch.compile with dynamic shapes, fake tensors, choice of backend."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from cases import make

import zipfls_cuda as zls
from zipfls_cuda import ops


def operator(stage, backend):
    if ops.UNSERVED.get((backend, stage), ()) is None:
        pytest.skip(f"{backend} has no kernel for {stage}")
    return ops.OPERATORS[stage, backend]


def samples(stage, device):
    """Arguments for an operator, over its options and types."""
    case = make(5, 12, 9, device=device)
    table = torch.zeros(10, device=device)
    empty = torch.zeros(0, device=device)
    weight = torch.rand(12, device=device)
    if stage == "vote_fwd":
        f, w, b = (torch.randn(s, device=device) for s in ((2, 6, 3, 4), (12, 6), (12,)))
        return [
            (f, w, b, 1),
            (f, w, None, 2),
            (f.flatten(2).transpose(1, 2), w, b, 1),
            (f.half(), w.half(), None, 1),
        ]
    if stage == "rank_fwd":
        return [(case.votes, 12), (case.votes.long(), 15)]
    if stage == "label_fwd":
        return [
            (case.target, case.votes, table, 12, -100),
            (case.target, case.votes, torch.zeros(5, 12, device=device), 12, 3),
        ]
    if stage == "loss_fwd":
        out = []
        for reduction in ("mean", "none"):
            for dtype in (torch.float32, torch.float16, torch.float64):
                t = table.double() if dtype == torch.float64 else table
                x = case.logits.to(dtype)
                out.append((x, case.target, case.votes, t, None, 1.0, 0.5, 0.1, False, -100, reduction, True))
        long_table = torch.zeros(12, device=device)
        out.append((case.logits, case.target, None, long_table, weight, 0.0, 1.0, 0.0, True, 3, "sum", True))
        dense = torch.zeros(5, 12, device=device)
        out.append(
            (case.logits, case.target, case.votes, dense, weight, 1.0, 1.0, 0.0, True, 3, "mean", False)
        )
        return out
    if stage == "loss_fwd of probabilities":
        out = []
        for dtype, reduction in ((torch.float32, "none"), (torch.float16, "mean"), (torch.float64, "sum")):
            t = table.double() if dtype == torch.float64 else table
            x, y = case.logits.to(dtype), torch.rand(5, 12, device=device, dtype=t.dtype).round()
            out.append((x, y, case.votes, t, None, 1.0, 0.5, 0.1, True, -100, reduction, True))
        dense, y = torch.zeros(5, 12, device=device), torch.rand(5, 12, device=device)
        return [*out, (case.logits, y, None, dense, weight, 0.0, 1.0, 0.0, False, -100, "mean", False)]
    if stage == "distill_fwd":
        out = []
        for dtype, reduction, form in (
            (torch.float32, "none", "divergence"),
            (torch.float16, "mean", "cross_entropy"),
            (torch.float64, "sum", "divergence"),
        ):
            x, t, w = case.logits.to(dtype), torch.randn(5, 12, device=device), torch.rand(5, device=device)
            w = w.double() if dtype == torch.float64 else w
            out.append(
                (x, t, case.target, w, None, 1.0, 0.5, 0.2, 0.3, 0.1, 0.0, 4.0, form, -100, reduction, True)
            )
        index = torch.arange(5, device=device) // 2
        without = (None, None, index, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, form, 3, "mean", False)
        out.append((case.logits, t[:3], *without))
        shares = torch.rand(2, device=device).expand(5, 2)
        made = (case.logits, t[:3].softmax(1), case.target, shares, index, 1.0, 0.5, 0.0, 0.0, 0.0, 0.3)
        return [*out, (*made, 1.0, "probabilities", 3, "mean", True)]
    if stage == "loss_factors_fwd":  # a vote a class, none for the target: no patch is NaN
        out, votes = [], (case.target[:, None] + torch.arange(1, 10, device=device)).int() % 12
        for dtype, reduction in ((torch.float32, "mean"), (torch.float16, "mean"), (torch.float64, "none")):
            t = table.double() if dtype == torch.float64 else table
            x = case.logits.to(dtype)
            out.append((x, case.target, votes, t, None, 1.0, 0.5, 0.1, True, -100, reduction))
        return [*out, (case.logits, case.target, None, table, weight, 1.0, 0.0, 0.0, False, -100, "sum")]
    scale = torch.full((), 2.0, device=device)
    if stage == "loss_factors_bwd_":
        out = []
        for dtype, upstream in ((torch.float32, scale), (torch.float16, torch.rand(5, device=device))):
            factors, patches = torch.rand(5, 4, device=device), torch.rand(5, 9, device=device).to(dtype)
            x = case.logits.to(dtype)
            out.append((x, case.target, case.votes, factors, patches, upstream, scale))
        return [*out, (case.logits, case.target, None, factors, case.logits[:, :0], scale, empty)]
    if "_grad_" in stage:
        return [args[:-1] for args in samples(stage.replace("grad_", "fwd"), device)]
    return [
        (case.logits, scale, empty),
        (case.logits.half(), scale, scale),
        (case.logits, torch.rand(5, device=device), empty),
        (case.logits.double(), torch.rand(5, device=device).double(), empty.double()),
    ]


CALLS = (*ops.STAGES, *ops.FACTOR_SCHEMAS, "loss_fwd of probabilities", "loss_grad_ of probabilities")


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(backend, device, call):
    chosen, stage = samples(call, device), call.split()[0]
    if backend == "triton" and ops.triton_interpreted():
        chosen = chosen[:2]
    for args in chosen:
        args = tuple(a.clone() if torch.is_tensor(a) and stage.endswith("_") else a for a in args)
        torch.library.opcheck(operator(stage, backend), args)


@pytest.mark.parametrize("call", CALLS)
def test_fake_kernels_tell_the_truth(backend, device, call):
    """Shape, dtype, strides and device of every result, as the fake kernel foretells."""
    stage = call.split()[0]
    for args in samples(call, device):
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = tuple(mode.from_tensor(a) if torch.is_tensor(a) else a for a in args)
            foretold = operator(stage, backend)(*fakes)
        args = tuple(a.clone() if torch.is_tensor(a) else a for a in args)
        actual = operator(stage, backend)(*args)
        if actual is None:
            continue
        pairs = [(foretold, actual)] if torch.is_tensor(actual) else zip(foretold, actual, strict=True)
        for fake, real in pairs:
            assert fake.shape == real.shape
            assert fake.dtype == real.dtype
            assert fake.stride() == real.stride()
            assert fake.device == real.device


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compile_fullgraph_with_a_dynamic_batch(backend, device, reduction, dtype):
    def step(features, weight, bias, target):
        votes = zls.dense_vote(features, weight, bias, backend=backend)
        logits = torch.nn.functional.linear(features.mean((2, 3)), weight, bias)
        loss = zls.zipf_cross_entropy(
            logits, target, votes, zipf_weight=0.5, label_smoothing=0.1, reduction=reduction, backend=backend
        )
        return loss.sum() * 3

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    frames = 0
    for N in (6, 4, 9):
        weight = torch.randn(10, 5, device=device).to(dtype)
        bias = torch.randn(10, device=device).to(dtype)
        features = torch.randn(N, 5, 3, 3, device=device).to(dtype)
        target = torch.randint(10, (N,), device=device)
        grads = []
        for f in (step, compiled):
            w = weight.clone().requires_grad_()
            loss = f(features, w, bias, target)
            loss.backward()
            grads.append((loss.detach(), w.grad))
        torch.testing.assert_close(grads[1], grads[0])
        frames = frames or counter.frame_count  # torch 2.11 starts over once, in the first call
    assert counter.frame_count == frames, "one graph serves every batch size"


def test_compile_with_inductor(device):
    """The default compiler, the module, a kept graph, and a second derivative that is refused there too."""
    case = make(6, 12, 9, device=device)
    criterion = zls.ZipfLoss(0.5, label_smoothing=0.1)
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True)
    x, y = case.leaf(), case.leaf()
    loss = compiled(x, case.target, case.votes)
    first = torch.autograd.grad(loss * 2, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss * 2, x)[0])
    (criterion(y, case.target, case.votes) * 2).backward()
    torch.testing.assert_close(first, y.grad)
    g = torch.autograd.grad(compiled(x, case.target, case.votes), x, create_graph=True)[0]
    # torch 2.11 gives any compiled function's gradient no graph; later versions one that says what is wrong.
    with pytest.raises(RuntimeError, match=r"double backward|does not require grad"):
        g.sum().backward()


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 2.0},
        {"distribution": zls.LinearDecay(0.001)},
        {"distribution": zls.RandomPareto(1.0)},
        {"only_correct": True},
        {"ignore_index": 3},
    ],
    ids=str,
)
def test_compile_options(options):
    case = make(6, 12, 9)
    torch._dynamo.reset()

    def f(x):
        return zls.zipf_cross_entropy(x, case.target, case.votes, **options)

    results = []
    for g in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(3)
        results.append(g(case.logits))
    torch.testing.assert_close(*results)


def test_compile_reads_use_backend():
    case = make(6, 12, 9)
    torch._dynamo.reset()

    def f(x):
        with zls.use_backend("reference"):
            return zls.zipf_cross_entropy(x, case.target, case.votes)

    torch.testing.assert_close(
        torch.compile(f, backend="aot_eager", fullgraph=True)(case.logits), f(case.logits)
    )


def test_compiled_out_of_range_still_raises():
    case = make(6, 12, 9)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, y, v: zls.zipf_cross_entropy(x, y, v), backend="aot_eager", fullgraph=True
    )
    case.target[2] = 12
    with pytest.raises(IndexError, match=r"target\[2\]"):
        compiled(*case)


def test_export():
    case = make(6, 12, 9)
    program = torch.export.export(zls.ZipfLoss(), tuple(case))
    torch.testing.assert_close(program.module()(*case), zls.ZipfLoss()(*case))


# The choice of a backend ---------------------------------------------------------------------------


def test_backends_are_listed_best_first():
    usable = zls.backends()
    assert usable[-1] == "reference" or usable[-1] == "triton"
    assert "reference" in usable
    order = [b for b in ops.BACKENDS if b in usable and not (b == "triton" and ops.triton_interpreted())]
    assert [b for b in usable if b in order] == order
    if ops.triton_interpreted() and "triton" in usable:
        assert usable[-1] == "triton"


def test_default_backend_on_cpu():
    x = torch.zeros(2, 3)
    for stage in ops.STAGES:
        native = "cpu" in zls.backends() and ops.UNSERVED.get(("cpu", stage), ()) is not None
        assert ops.select(stage, None, x) is ops.OPERATORS[stage, "cpu" if native else "reference"]


def test_unknown_and_unusable_backends():
    case = make()
    for call in (
        lambda b: zls.zipf_cross_entropy(*case, backend=b),
        lambda b: zls.dense_vote(torch.zeros(1, 2, 3, 3), torch.zeros(4, 2), backend=b),
        lambda b: zls.rank_votes(case.votes, 12, backend=b),
        lambda b: zls.use_backend(b).__enter__(),
    ):
        with pytest.raises(
            ValueError, match="backend must be None or one of cuda, triton, cpu, reference, got 'tpu'"
        ):
            call("tpu")
        for name in set(ops.BACKENDS) - set(zls.backends()):
            with pytest.raises(RuntimeError, match=f"backend='{name}' cannot"):
                call(name)


def test_use_backend_nests_and_restores(monkeypatch):
    chosen = []
    monkeypatch.setattr(ops, "_resolved", {})
    monkeypatch.setattr(ops, "_resolve", lambda stage, backend, *_: chosen.append(backend) or "reference")
    x = torch.zeros(2, 3)
    for stage in ("loss_fwd", "loss_bwd"):
        ops.select(stage, None, x)
    with zls.use_backend("reference"):
        ops.select("loss_fwd", None, x)
        with zls.use_backend(None):
            ops.select("loss_fwd", None, x.double())
        ops.select("loss_bwd", None, x)
    ops.select("rank_fwd", None, x)
    with pytest.raises(KeyError), zls.use_backend("reference"):
        raise KeyError
    ops.select("vote_fwd", None, x)
    assert chosen == [None, None, "reference", None, "reference", None, None]


def run_python(code, **env):
    import os

    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_environment_variable_sets_the_backend():
    code = "import torch, zipfls_cuda as z; z.zipf_loss(torch.zeros(2, 3), torch.tensor([0, 1]))"
    assert run_python(code, ZIPFLS_BACKEND="reference").returncode == 0
    failed = run_python(code, ZIPFLS_BACKEND="tpu")
    assert "ValueError: backend must be None or one of" in failed.stderr
    if "cuda" not in zls.backends():
        assert "RuntimeError: backend='cuda' cannot serve" in run_python(code, ZIPFLS_BACKEND="cuda").stderr


def test_report_of_the_installation():
    report = subprocess.run(
        [sys.executable, "-m", "zipfls_cuda"], capture_output=True, text=True, timeout=120, cwd="/"
    )
    assert report.returncode == 0, report.stderr
    for word in (zls.__version__, torch.__version__, "backends", "loss_fwd", "vote_fwd", *ops.BACKENDS):
        assert word in report.stdout
