"""The benchmarks: baselines that are right, records that are whole, figures that follow from the records.

No time that is taken here decides anything.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import zipfls_cuda as zls

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import baselines  # noqa: E402
import bench_distill  # noqa: E402
import bench_linear  # noqa: E402
import bench_loss  # noqa: E402
import bench_step  # noqa: E402
import bench_vote  # noqa: E402
import clock  # noqa: E402
import records as files  # noqa: E402
import report  # noqa: E402
import targets  # noqa: E402

RECORDED = [r for path in files.RESULTS.glob("*.json") for r in files.load(path)]
ENVIRONMENT = set(files.environment())
CPU_LOSSES = baselines.losses("cpu", tiny=True)
WHOLE = [name for name in CPU_LOSSES if "cross_entropy" not in name]  # with the Zipf term


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Runs of pytest started here are no workers of ours: pytest-benchmark would disable itself in them."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)


def inputs(N=6, C=23, P=9, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(N, C, generator=g, dtype=torch.float64).mul(2).to(dtype).requires_grad_()
    votes = (torch.rand(N, P, generator=g).pow(3) * C).int()
    return logits, torch.randint(C, (N,), generator=g), votes


def value_and_gradient(call, logits, *rest):
    x = logits.detach().clone().requires_grad_()
    loss = call(x, *rest)
    loss.backward()
    return loss.detach(), x.grad


# Baselines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CPU_LOSSES)
def test_baseline_losses_agree_with_the_reference(name):
    loss = CPU_LOSSES[name]
    logits, target, votes = inputs(dtype=torch.float32)
    if name in WHOLE:
        whole = functools.partial(zls.zipf_cross_entropy, zipf_weight=1.0, backend="reference")
        exact = value_and_gradient(whole, logits.double(), target, votes)
    else:
        exact = value_and_gradient(F.cross_entropy, logits.double(), target)
    for actual, expected in zip(value_and_gradient(loss.call, logits, target, votes), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WHOLE)
def test_baseline_losses_agree_with_the_authors_code(name):
    golden = np.load(ROOT / "tests" / "golden" / "zipf_official.npz")
    seen = 0
    for i, meta in enumerate(json.loads(bytes(golden["meta"]).decode())):
        plain = meta["distribution"] == "zipf" and meta["ranking"] == "votes" and not meta["only_correct"]
        if not plain or (meta["alpha"], meta["zipf_weight"]) != (1.0, 1.0) or meta["C"] > 2000:
            continue
        a = {k: torch.from_numpy(golden[f"{i:02d}/{k}"]) for k in ("logits", "target", "votes")}
        loss, grad = value_and_gradient(CPU_LOSSES[name].call, a["logits"], a["target"], a["votes"])
        expected = torch.from_numpy(golden[f"{i:02d}/grad_total"])
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        total = torch.as_tensor(golden[f"{i:02d}/ce"]) + torch.as_tensor(golden[f"{i:02d}/zipf"])
        torch.testing.assert_close(loss, total.to(loss.dtype), rtol=1e-4, atol=1e-5)
        seen += 1
    assert seen


@pytest.mark.parametrize("method", bench_distill.METHODS)
def test_baseline_distillations_agree_with_the_reference(method, monkeypatch):
    """Liger's through stand-ins: its functions of (log p, log q) with the arguments that they are given."""
    logits, target, votes = inputs(dtype=torch.float32)
    args = (inputs(dtype=torch.float32)[0].detach().roll(1, 0), target, votes)
    options = bench_distill.METHODS[method] | {"temperature": bench_distill.T, "backend": "reference"}
    exact = value_and_gradient(
        lambda z, t, y, votes: zls.distillation_loss(z, t.double(), y, **options), logits.double(), *args
    )
    without = value_and_gradient(
        lambda z, t, y, votes: zls.zipf_cross_entropy(z, y, votes, backend="reference", zipf_weight=1.0),
        logits.double(), *args,
    )  # fmt: skip
    jsd = lambda beta: {0.0: bench_distill.kl_div}[beta]  # noqa: E731
    stand_in = type("transformers", (), {"LigerJSD": staticmethod(jsd), "LigerKLDIVLoss": torch.nn.KLDivLoss})
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    found = bench_distill.losses(method, "cpu", tiny=True) | bench_distill.losses(method, "cuda", tiny=True)
    assert (baselines.LIGER_KL in found) == (baselines.LIGER_JSD in found) == (method == "KD")
    for name, loss in found.items():
        expected = without if name == baselines.PLAIN_LOSS else exact
        for a, b in zip(value_and_gradient(loss.call, logits, *args), expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_linear_losses_agree_with_the_reference(monkeypatch):
    """Those of other packages through stand-ins: (weight, x, target) for Liger's, (x, weight, target)."""
    x, weight, target, votes = bench_linear.linear_inputs(bench_linear.Case(6, 8, 10, 4))

    class Liger:
        def __call__(self, weight, x, target):
            return bench_linear.plain(x, weight, target, None)

    liger = type("transformers", (), {"LigerFusedLinearCrossEntropyLoss": Liger})
    cut = type("cce", (), {"linear_cross_entropy": staticmethod(lambda *a: bench_linear.plain(*a, None))})
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", cut)
    found = bench_linear.losses("cpu", tiny=True) | bench_linear.losses("cuda", tiny=True)
    ours = [n for n in found if n.startswith("zipfls_cuda")]
    assert {*found} - {*ours} <= {*report.PEERS}
    assert len(found) - len(ours) == 7
    results = {}
    for name, loss in found.items():
        weight.grad = None
        if loss.backward:
            results[name] = (*value_and_gradient(loss.call, x, weight, target, votes), weight.grad)
        else:
            assert loss.call(x, weight, target, votes) is None
            assert weight.grad is None
    for name, got in results.items():
        same = baselines.LINEAR_THEN_LOSS if name in ours else baselines.LINEAR_THEN_CROSS_ENTROPY
        if name != baselines.LINEAR_THEN_LOSS:
            torch.testing.assert_close(got, results[same], msg=lambda m, n=name: f"{n}: {m}")
    large = bench_linear.Case(2048, 256, 65536)
    assert (baselines.LINEAR_CROSS_ENTROPY in large.names) == bench_linear.ON_GPU


def test_distillations_of_16_bits_and_what_they_compare(monkeypatch):
    """All in one comparison, torch.compile in one dtype; arithmetic in float32; votes of our loss alone."""
    held = []

    class Records:
        def compare(self, where, entries, timer, nbytes, **options):
            held.append((where, nbytes))
            for e in entries:
                e.calls[0]()
            return [e.name for e in entries]

    for dtype, compiled in (("float32", True), ("bfloat16", False)):
        monkeypatch.setattr(bench_distill, "TINY", True)  # torch.compile without a compiler
        case = bench_distill.Case("DKD", 4, 10, dtype=dtype)
        assert case.run(Records()) == case.names
        assert (baselines.COMPILED_REFERENCE in case.names) == compiled
        assert {baselines.REFERENCE, baselines.PLAIN_LOSS} <= set(case.names)
    assert [nbytes for _, nbytes in held] == [3 * 4 * 10 * 4, 3 * 4 * 10 * 2]
    z, t = torch.randn(2, 4, 10).bfloat16()
    losses = bench_distill.losses("DKD", "cpu", tiny=True)
    narrow, exact = (
        losses[n].call(z, t, torch.arange(4), None) for n in (baselines.REFERENCE, case.names[0])
    )
    torch.testing.assert_close(narrow, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("layout", ["channels_last", "NCHW", "tokens"])
def test_baseline_votes_agree_with_the_reference(layout, upsample):
    if layout == "tokens" and upsample == 2:
        pytest.skip("tokens have no map to upsample")
    features, weight = baselines.vote_inputs(2, 3, 4, 20, 30, torch.float32, layout)
    features, weight = features.cpu(), weight.cpu()
    assert features.shape == ((2, 12, 20) if layout == "tokens" else (2, 20, 3, 4))
    expected = zls.dense_vote(features.double(), weight.double(), upsample=upsample, backend="reference")
    for name, call in baselines.votes("cpu", upsample, layout).items():
        found = call(features, weight)
        if name == baselines.MATMUL_BATCHED:
            assert layout == "NCHW"
            torch.testing.assert_close(
                found.flatten(2).mT.reshape(-1, 30), baselines.matmul_alone(features, weight)
            )
        elif name != baselines.MATMUL:
            torch.testing.assert_close(found.int(), expected, msg=lambda m, n=name: f"{n}: {m}")
    scores = baselines.matmul_alone(features, weight)
    if upsample == 1:
        torch.testing.assert_close(scores.argmax(1).view(2, -1).int(), expected)


def test_baseline_heads_agree():
    features, weight = baselines.vote_inputs(3, 2, 2, 8, 7, torch.float32, "channels_last")
    target = torch.tensor([1, 6, 0])
    plain = F.cross_entropy(features.cpu().mean((2, 3)) @ weight.cpu().t(), target)
    votes = zls.dense_vote(features.cpu(), weight.cpu(), backend="reference")
    whole = plain + zls.zipf_loss(features.cpu().mean((2, 3)) @ weight.cpu().t(), target, votes)
    for name, head in baselines.heads("cpu").items():
        expected = whole if name.startswith("zipfls_cuda") else plain
        torch.testing.assert_close(head(features.cpu(), weight.cpu(), target), expected)


def test_step_trains_resnet50():
    with torch.device("meta"):
        model = bench_step.resnet((3, 4, 6, 3), 64)
        out = model(torch.empty(2, 3, 224, 224))
    fc = 2048 * 1000 + 1000
    assert sum(p.numel() for p in model.parameters()) + fc == 25_557_032  # the usual ResNet-50
    assert out.shape == (2, 2048, 7, 7)


@pytest.mark.parametrize("name", bench_step.criteria())
def test_step_losses(name):
    features, _ = baselines.vote_inputs(3, 2, 2, 8, 7, torch.float32, "channels_last")
    fc, target = torch.nn.Linear(8, 7), torch.tensor([1, 6, 0])
    features = features.cpu()
    votes = zls.dense_vote(features, fc.weight, fc.bias, backend="reference")
    logits = fc(features.mean((2, 3)))
    if name == baselines.SMOOTHING:
        expected = F.cross_entropy(logits, target, label_smoothing=0.1)
    elif name == baselines.CROSS_ENTROPY:
        expected = F.cross_entropy(logits, target)
    else:
        expected = zls.zipf_cross_entropy(logits, target, votes, zipf_weight=1.0, backend="reference")
    criterion = bench_step.criteria()[name]
    torch.testing.assert_close(criterion(features, fc, target), expected)


def test_steps_run_and_say_what_waits(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    held = []

    class Records:
        def compare(self, where, entries, timer, **options):
            held.extend(entries)

    bench_step.Case(2, 5, 16, (1, 1), 4, "float32", what="tiny").run(Records())
    assert [e.name for e in held] == bench_step.NAMES
    assert all(e.deep for e in held)  # more launches than a queue holds
    assert [e.name for e in held if e.waits] == [n for n in bench_step.NAMES if n == baselines.PUBLISHED]
    for e in held:
        e.calls[0]()


# Harness ---------------------------------------------------------------------------------------------


class DriftingClock:
    """A machine whose speed changes tenfold from round to round; each implementation has its own cost."""

    name, least, most = "host", 1e-3, 200

    def __init__(self, costs: dict[str, float]):
        self.costs, self.samples, self.order = costs, 0, []

    def ready(self, entry):
        if self.costs[entry.name] < 0:
            raise RuntimeError("cannot run here")
        entry.how = "calls"

    def sample(self, entry, k):
        running = sum(cost > 0 for cost in self.costs.values())
        speed = 10 ** ((max(0, self.samples - 2 * running) // running) % 2)  # steady until the rounds begin
        self.samples += 1
        self.order.append(entry.name)
        return self.costs[entry.name] * speed


def test_ratios_survive_a_machine_that_drifts(monkeypatch):
    monkeypatch.setattr(clock, "TINY", False)
    timer = DriftingClock({"a": 0.2, "b": 0.4, "broken": -1.0})
    entries = [clock.Entry(name, [lambda: None]) for name in timer.costs]
    result = clock.compare(entries, timer, seconds=20, most_rounds=16)
    assert set(result.failed) == {"broken"}
    assert "cannot run here" in result.failed["broken"]
    assert result.ratio("a", "b") == pytest.approx([0.5] * 3)
    assert len(result.taken("a")) == len(result.taken("b")) == 16
    rounds = list(itertools.batched(timer.order[-32:], 2)) if hasattr(itertools, "batched") else None
    assert rounds is None or all(set(r) == {"a", "b"} for r in rounds)


def test_slow_entries_run_in_few_rounds(monkeypatch):
    monkeypatch.setattr(clock, "TINY", False)
    timer = DriftingClock({"fast": 1e-3, "slow": 1.0})
    result = clock.compare([clock.Entry(n, [lambda: None]) for n in timer.costs], timer, seconds=0.5)
    assert len(result.taken("slow")) < len(result.taken("fast"))
    together = [s for s, f in zip(result.samples["slow"], result.samples["fast"], strict=True) if s and f]
    assert len(together) == len(result.taken("slow"))
    assert 3 <= len(together) < 7


def test_what_the_first_call_compiles_is_not_timed(monkeypatch):
    """It gets as many rounds, and calls a sample, as the calls that follow take."""
    monkeypatch.setattr(clock, "TINY", False)
    now, first = [0.0], [10.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += first.pop() if first else 3e-4

    result = clock.compare([clock.Entry("x", [call])], clock.HostClock(), seconds=1.0, most_rounds=16)
    assert result.calls == {"x": 4}
    assert result.samples["x"] == pytest.approx([3e-4] * 16)


class PretendGPU:
    """A device with a queue, on a clock of its own: the host launches, the device follows when it can.

    ``depth`` launches fit in the queue; a host that launches more waits. An idle device takes ``latency`` to
    start on a launch.
    """

    depth, latency, speed = 1000, 4e-6, 2e9

    def __init__(self, monkeypatch):
        self.host = self.device = 0.0
        self.waiting, self.launches = [], 0  # ends of launches in the queue
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(clock, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(cycles / self.speed))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self.Event(self))

    def launch(self, seconds: float, host: float = 2e-6) -> None:
        self.host += host
        self.launches += 1
        self.waiting = [end for end in self.waiting if end > self.host]
        if len(self.waiting) >= self.depth:
            self.host = self.waiting[-self.depth]
        self.device = max(self.device, self.host + self.latency) + seconds
        self.waiting.append(self.device)

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    class Event:
        def __init__(self, gpu):
            self.gpu = gpu

        def record(self):
            self.gpu.launch(0.0, 1e-6)
            self.at = self.gpu.device

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)


def device_time(gpu, call, k=300, **fields):
    """Seconds of a call by the device clock, and how they were taken."""
    timer, entry = clock.DeviceClock(), clock.Entry("x", [call], **fields)
    timer.ready(entry)
    timer.sample(entry, 1)
    return timer.sample(entry, k), entry


def test_device_time_holds_nothing_of_the_host(monkeypatch):
    gpu = PretendGPU(monkeypatch)
    seconds, entry = device_time(gpu, lambda: gpu.launch(3e-6, host=40e-6))
    assert entry.how == "queued"
    assert seconds == pytest.approx(3e-6)
    seconds, entry = device_time(gpu, lambda: gpu.launch(3e-6, host=40e-6), waits=True)
    assert entry.how == "events"
    assert seconds > 6e-6


def test_a_full_queue_or_a_slow_host_only_takes_fewer_calls_at_once(monkeypatch):
    gpu = PretendGPU(monkeypatch)
    seconds, entry = device_time(gpu, lambda: [gpu.launch(1e-6) for _ in range(40)])
    assert entry.how == "queued"
    assert seconds == pytest.approx(40e-6)
    assert 1 < entry.ahead <= gpu.depth / 40
    host = iter([1e-5] * 10)  # slower than it looked
    seconds, entry = device_time(gpu, lambda: gpu.launch(1e-6, host=next(host, 3e-5)))
    assert entry.how == "queued"
    assert seconds == pytest.approx(1e-6)
    assert entry.ahead > 1


def test_what_keeps_the_host_is_found_out(monkeypatch):
    gpu = PretendGPU(monkeypatch)

    def waits():
        gpu.launch(5e-6)
        gpu.synchronize()
        gpu.launch(5e-6)

    assert device_time(gpu, waits, k=4)[1].how == "host-bound"


def test_a_step_of_more_launches_than_the_queue_holds(monkeypatch):
    gpu = PretendGPU(monkeypatch)

    def step(seconds):
        for _ in range(1500):
            gpu.launch(seconds, host=1e-5)

    seconds, entry = device_time(gpu, lambda: step(1e-4), k=2, deep=True)
    assert entry.how == "queued"
    assert seconds == pytest.approx(0.15)
    assert device_time(gpu, lambda: step(1e-4), k=2)[1].how == "host-bound"
    assert device_time(gpu, lambda: step(1e-6), k=2, deep=True)[1].how == "host-bound"


def test_inputs_of_a_gpu_exceed_its_cache_together(monkeypatch):
    l2 = 60 << 20
    properties = type("Properties", (), {"L2_cache_size": l2})
    monkeypatch.setattr(clock, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    for nbytes in (1 << 20, 5 << 20, 100 << 20):
        assert 3 * l2 <= clock.copies(nbytes) * nbytes < 3 * l2 + nbytes
    assert clock.copies(1 << 30) == 1
    assert clock.copies(100) == clock.MOST_COPIES


def test_device_samples_last_and_rotate(monkeypatch):
    monkeypatch.setattr(clock, "TINY", False)
    gpu = PretendGPU(monkeypatch)
    seen = []
    calls = [lambda i=i: (seen.append(i), gpu.launch(2e-6, host=1e-5)) for i in range(7)]
    result = clock.compare([clock.Entry("x", calls)], clock.DeviceClock(), seconds=0.1)
    assert result.calls["x"] * 2e-6 >= 1e-3
    assert result.how == {"x": "queued"}
    assert result.samples["x"] == pytest.approx([2e-6] * len(result.samples["x"]))
    last = seen[-result.calls["x"] :]
    assert last == [i % 7 for i in range(len(last))]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no high-water mark here")
def test_peak_memory_sees_what_a_call_takes(monkeypatch):
    monkeypatch.setattr(clock, "device", lambda: torch.device("cpu"))
    clock.peak_memory(clock.Entry("warm", [lambda: torch.ones(10)]))
    peak = clock.peak_memory(clock.Entry("x", [lambda: torch.ones(1 << 24).sum()]))
    if peak is None:
        pytest.skip("the high-water mark cannot be reset here")
    assert 0.9 < peak / (4 << 24) < 1.5


RESULT = clock.Comparison({"x": [1.0, 2.0, 3.0]}, {"x": 1}, {"x": "calls"}, {"x": None})


def test_records_replace_only_what_ran_again(tmp_path):
    path = tmp_path / "records.json"
    first = files.Records(path)
    first.add(files.Where("ceiling", {"dtype": "float32"}, "", "host"), RESULT, 8, 0)
    for N in (1, 2):
        first.add(files.Where("loss", {"N": N, "blocks": (3, 4)}, "both", "host"), RESULT, 8, 0)
    first.fail(files.Where("vote", {"N": 2}, "forward", "host"), "x", "out of memory")
    second = files.Records(path)
    second.add(files.Where("ceiling", {"dtype": "float32"}, "", "host"), RESULT, 8, 0)
    second.add(files.Where("loss", {"N": 2, "blocks": (3, 4)}, "both", "host"), RESULT, 8, 0)
    second.add(files.Where("loss", {"N": 2, "blocks": (3, 4)}, "forward", "host"), RESULT, 8, 0)
    second.fail(files.Where("vote", {"N": 2}, "forward", "host"), "x", "again")
    found = files.load(path)
    assert [(r["bench"], r["case"].get("N"), r["mode"], r["run"]) for r in found] == [
        ("ceiling", None, "", "1"), ("loss", 1, "both", "1"), ("ceiling", None, "", "2"),
        ("loss", 2, "both", "2"), ("loss", 2, "forward", "2"), ("failed vote", 2, "forward", "2"),
    ]  # fmt: skip
    assert all(set(files.RECORD) <= set(r) for r in found)
    assert all(set(r["env"]) == ENVIRONMENT for r in found)
    assert found[1]["median"] == 2.0
    third = files.Records(path)
    third.add(files.Where("loss", {"N": 1, "blocks": (3, 4)}, "both", "host"), RESULT, 8, 0)
    assert {r["run"] for r in files.load(path)} == {"2", "3"}  # the first run's ceiling went with it


def test_what_is_on_record_of_this_code_is_not_measured_again(tmp_path):
    path = tmp_path / "records.json"
    where = files.Where("loss", {"N": 1, "blocks": (3, 4)}, "both", "host")
    first = files.Records(path)
    assert first.known(where) == {}
    first.add(where, RESULT, 8, 0)
    first.fail(where, "y", "no such kernel")
    assert first.known(where) == {"x": "", "y": "no such kernel"}
    second = files.Records(path)
    assert second.known(where) == {"x": "", "y": "no such kernel"}
    assert second.known(where._replace(mode="forward")) == {}
    for changed in ({"source": "other code"}, {"device": "another"}):
        env = {**first.environment, **changed}
        files.dump(path, {"1": env}, json.loads(path.read_text())["records"])
        other = files.Records(path)
        assert other.known(where) == {}
        other.add(where, RESULT, 8, 0)
        assert other.known(where) == {"x": ""}
        files.dump(path, {"1": first.environment}, first.records)
    second.fail(where, "x", "out of memory")  # a figure of "x" no longer counts, and the reverse
    second.add(where._replace(case={"N": 1, "blocks": [3, 4]}), RESULT, 8, 0)
    second.records.pop(0)
    assert [(r["bench"], r["name"]) for r in second.all()] == [("failed loss", "y"), ("loss", "x")]


class BreakingClock(DriftingClock):
    """An implementation of cost -1 ends the CUDA context."""

    def ready(self, entry):
        self.dead = self.costs[entry.name] < 0
        super().ready(entry)

    def synchronize(self):
        if self.dead:
            raise RuntimeError("an illegal memory access was encountered")


def test_an_implementation_that_ends_the_context_is_on_record_and_left_out(tmp_path, monkeypatch):
    timer = BreakingClock({"a": 0.1, "bad": -1.0})
    monkeypatch.setattr(clock, "synchronize", timer.synchronize)
    entries = [clock.Entry(name, [lambda: None]) for name in timer.costs]
    first, second = (files.Where("loss", {"N": N}, "both", "host") for N in range(2))
    ours = files.Records(tmp_path / "records.json")
    with pytest.raises(clock.ContextLost, match="bad: RuntimeError: cannot run here") as lost:
        ours.compare(first, entries, timer, 8)
    ours.fail(first, lost.value.name, lost.value.reason, lost=True)
    timer.dead = False
    for place, reason in (first, "RuntimeError: cannot run here"), (second, "left out"):
        again = files.Records(tmp_path / "records.json")  # a new process each time
        result = again.compare(place, entries, timer, 8)
        assert set(result.samples) == {"a"}
        assert "left out" in result.failed["bad"]
        known = again.known(place)
        assert known["a"] == ""
        assert known["bad"].startswith(reason)
    other = files.Records(tmp_path / "records.json")
    assert set(other.left_out("loss")) == {"bad"}
    assert not other.left_out("step")
    found = [r for r in files.load(tmp_path / "records.json") if r["bench"] == "failed loss"]
    assert [r["facts"]["lost"] for r in found] == [True, False]


def test_an_implementation_that_fails_between_rounds_is_out(monkeypatch):
    monkeypatch.setattr(clock, "TINY", False)

    class Clock(DriftingClock):
        def sample(self, entry, k):
            if entry.name == "b" and self.samples > 12:
                raise RuntimeError("out of memory")
            return super().sample(entry, k)

    timer = Clock({"a": 0.1, "b": 0.1})
    result = clock.compare([clock.Entry(n, [lambda: None]) for n in timer.costs], timer, most_rounds=16)
    assert result.failed == {"b": "RuntimeError: out of memory"}
    assert set(result.samples) == {"a"}


RESTARTING = """
import clock, records

class Case:
    names = ["good", "bad"]

    def __init__(self, N):
        self.N, self.where = N, records.Where("loss", {"N": N}, "both", "host")

    def run(self, ours):
        def breaks():
            clock.synchronize = breaks
            raise RuntimeError("an illegal memory access was encountered")

        calls = {"good": lambda: None, "bad": breaks if self.N == 1 else lambda: None}
        entries = [clock.Entry(name, [call]) for name, call in calls.items()]
        return ours.compare(self.where, entries, clock.HostClock(), 8)

CASES = [Case(1), Case(2)]
"""


@pytest.mark.slow
def test_a_lost_context_starts_the_process_anew(tmp_path):
    for name in ("conftest.py", "pytest.ini"):
        (tmp_path / name).write_text((ROOT / "benchmarks" / name).read_text())
    (tmp_path / "bench_it.py").write_text(RESTARTING)
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    env = {k: v for k, v in os.environ.items() if "XDIST" not in k}  # it is no worker of ours
    env |= {
        "ZIPFLS_BENCH": "tiny",
        "PYTHONPATH": path,
        "ZIPFLS_BENCH_RECORDS": str(tmp_path / "records.json"),
    }
    command = [sys.executable, "-m", "pytest", "bench_it.py", "-rs"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the CUDA context is lost, by bad" in done.stdout
    assert re.search(r"SKIPPED.*illegal memory access", done.stdout)
    found = [r for r in files.load(tmp_path / "records.json") if "ceiling" not in r["bench"]]
    assert [(r["bench"], r["case"]["N"], r["name"], r["run"]) for r in found] == [
        ("failed loss", 1, "bad", "1"), ("loss", 1, "good", "2"), ("loss", 2, "good", "2"),
        ("failed loss", 2, "bad", "2"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert "4 skipped" in done.stdout
    assert re.search(r"SKIPPED \[2\] conftest.py:\d+: measured already", done.stdout)


# Records and report ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(files.RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_committed_records_are_whole(path):
    assert path.stat().st_size < 400_000
    records = files.load(path)
    for r in records:
        assert set(files.RECORD) <= set(r) - {"env"}
        assert set(r["env"]) == ENVIRONMENT
        assert r["env"]["commit"]
        assert not r["env"]["tiny"]
        if r["median"] is not None:
            assert 0 < r["p20"] <= r["median"] <= r["p80"]
            assert r["rounds"] >= 3
            if r["bench"] not in ("step", "head", "methods"):
                assert r["bytes"] or r["flops"]
    kind = "" if records[0]["env"]["kind"] == "cuda" else "cpu "
    assert path.stem == files.slug(kind + records[0]["env"]["device"])
    for run in {r["run"] for r in records if r["median"] is not None}:
        assert {r["name"] for r in records if r["bench"] == "ceiling" and r["run"] == run} == {
            "copy",
            "product",
        }


def test_pages_follow_from_the_records():
    shown = set()
    for page in report.pages():
        text = page.read_text()
        assert report.renewed(text) == text, f"{page.name}: run python benchmarks/report.py"
        shown |= {name for name, _ in report.MARKED.findall(text)}
    assert shown & {*report.NAMES}


MEASURED = ("vote", "step", "distill", "linear")  # blocks that follow from records of their own


def made_up(kind: str, time: float = 1e-3, copy_time: float = 1e-3, how: str = "") -> list[dict]:
    """Records of every case there is for a kind of device, each implementation taking the same ``time``."""
    env = dict.fromkeys(ENVIRONMENT, "")
    env |= {"kind": kind, "device": "made up", "threads": 1, "others": 0.0, "tiny": False, "dirty": False}
    env["backends"] = ["cuda", "triton", "reference"] if kind == "cuda" else ["cpu", "reference"]
    peers = [v for k, v in vars(baselines).items() if k.isupper() and isinstance(v, str)]
    ours = baselines.kernels(baselines.ours(b) for b in env["backends"])
    device = "device" if kind == "cuda" else "host"
    found = []

    def add(bench: str, case: dict, mode: str, clock: str, nbytes: int, flops: int, name: str = "") -> None:
        taken = copy_time if name == "copy" else time
        names = [name] if name else [*ours, *peers]
        if kind == "cuda" and bench == "loss" and not name:  # as bench_loss has it
            compiled = case["sweep"] == "compiled"
            names = [n for n in names if n in ours or (n in bench_loss.COMPILED) == compiled]
        for n in names:
            ratio = {other: [1.0, 0.9, 1.1] for other in names if other != n and n in ours}
            values = [
                "1", bench, case, mode, clock, how or ("queued" if clock == "device" else "calls"), n,
                taken, taken, taken, 9, 1, nbytes, flops, 1 << 20, ratio,
            ]  # fmt: skip
            found.append({**dict(zip(files.RECORD, values, strict=True)), "env": env})

    add("ceiling", {"dtype": "float32"}, "", device, 1 << 30, 0, "copy")
    for dtype in ("float32", "bfloat16"):
        add("ceiling", {"dtype": dtype}, "", device, 0, 1 << 40, "product")
    for c in bench_loss.gpu_cases() if kind == "cuda" else bench_loss.cpu_cases():
        case = {k: v for k, v in vars(c).items() if k not in ("mode", "clock")}
        itemsize = getattr(torch, c.dtype).itemsize
        add("loss", case, c.mode, c.clock or device, 2 * c.N * c.C * itemsize, 0)
    for c in bench_distill.cases(kind == "cuda"):
        add("distill", c.where.case, "both", device, 3 * c.N * c.C, 0)
    for c in bench_linear.cases(kind == "cuda"):
        add("linear", c.where.case, "both", device, 2 * c.N * c.C, 0)
    for c in bench_vote.gpu_cases() if kind == "cuda" else bench_vote.cpu_cases():
        add("vote", c.where.case, "forward", device, 1 << 20, 1 << 30)
    for C in (1000, 10000):
        case = {"N": 256, "C": C, "size": 224, "compiled": False, "what": "ResNet-50", "dtype": "bfloat16"}
        add("step", case, "step", device, 0, 0)
    add("head", {"N": 8, "H": 7, "D": 64, "C": 10, "dtype": "float32"}, "both", device, 0, 0)
    return found


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_target_finds_its_records(kind):
    verdicts = targets.judge(made_up(kind), kind)
    rows = [t for t in targets.TARGETS if t.kind == kind]
    bare = sum(t.target == "-" for t in rows)
    backends = 2 if kind == "cuda" else 1
    assert len(verdicts) == backends * (len(rows) - bare) + bare >= (9 if kind == "cpu" else 50)
    assert [v.text for v in verdicts if v.measured == targets.GAP] == []
    assert {v.met for v in verdicts if v.target != "-"} == {True, False}
    nothing = targets.judge([], kind)
    assert len(nothing) == len(rows)
    assert all(v.met is None and v.measured == targets.GAP for v in nothing)


def test_each_backend_is_judged_by_its_own_records():
    records = made_up("cuda", time=1e-6)
    for r in records:
        if r["name"] == baselines.ours("triton") and r["median"]:
            r["median"] = 1.0
    small = [v for v in targets.judge(records, "cuda") if v.text == "time on the GPU"]
    assert [(v.backend, v.met) for v in small] == [
        (baselines.ours("cuda"), True),
        (baselines.ours("triton"), False),
    ]
    text = report.target_table(targets.judge(records, "cuda"))
    assert text.startswith("|  | target | cuda | met | triton | met |")
    assert re.search(r"time on the GPU \| <= 6 us \| 1 us \S+ \| yes \| 1.+ us \S+ \| no \|", text)
    without = [r for r in records if r["name"] != baselines.ours("triton")]
    assert report.target_table(targets.judge(without, "cuda")).startswith("|  | target | measured | met |")


@pytest.mark.parametrize("how", ["events", "host-bound"])
def test_time_that_is_not_the_devices_is_shown_and_not_judged(how):
    verdicts = targets.judge(made_up("cuda", how=how), "cuda")
    for v in verdicts:
        if "memory" in v.text or v.group == "ceiling":
            assert "judged" not in v.measured
        else:
            assert v.met is None
            assert v.measured[0] in "0123456789+"
            assert how in v.measured
    records = made_up("cuda")
    for r in records:  # a peer that makes the host wait
        if r["name"] == baselines.LIGER:
            r["how"] = how
    doubtful = {v.text for v in targets.judge(records, "cuda") if "not judged" in v.measured}
    assert doubtful == {f"time of {baselines.LIGER}"}
    path, mark = Path("nvidia-made-up.json"), report.MARK
    text = report.block("gpu-loss", {path: records})
    assert "1.00" + mark in text
    assert "1.00 ms" + mark in report.block("gpu-loss", {path: made_up("cuda", how=how)})
    assert "1.00 ms" + mark in report.block("gpu-vote", {path: made_up("cuda", how=how)})
    assert report.NOTE in text
    assert mark not in report.block("gpu-loss", {path: made_up("cuda")})


def test_a_share_of_the_copy_is_of_the_same_runs_copy():
    records = made_up("cuda")
    slow = {**records[0], "run": "2", "median": 10 * records[0]["median"]}
    long = [r for r in records if r["case"].get("C") == 16384 and r["name"] == baselines.ours("cuda")]
    again = [{**r, "run": "2"} for r in long]
    records = [slow] + [r for r in records if r not in long] + again

    def share(records):
        rows = targets.judge(records, "cuda")
        return next(v.measured for v in rows if "C >= 4096" in v.text and v.backend.endswith("cuda"))

    only = [r for r in records if r["case"].get("C") in (None, 16384)]
    assert float(share([slow, *again]).split()[0]) == pytest.approx(
        10 * float(share([r for r in made_up("cuda") if r in long or r["bench"] == "ceiling"]).split()[0]),
        rel=0.01,
    )
    assert share(only) == share([slow, *again])


def test_a_target_judges_by_its_bound():
    def met(copy_time):
        verdicts = targets.judge(made_up("cuda", copy_time=copy_time), "cuda")
        return {v.met for v in verdicts if "share of the copy" in v.text}

    assert met(1e-6) == {False}
    assert met(1.0) == {True}


def test_loss_cases_of_a_gpu_begin_with_every_regime_and_end_with_what_compiles():
    cases = bench_loss.gpu_cases()
    assert len(set(cases)) == len(cases)
    first = cases[:15]
    for has in (
        lambda c: c.C >= 4096 and c.C % 8 == 0 and c.N * c.C * 2 > 64e6,
        lambda c: c.C == 1000 and c.N >= 32768,
        lambda c: c.C % 8 and c.C > 1000,
        lambda c: c.clock == "host" and c.mode == "both",
        lambda c: not c.clock and (c.N, c.C) == (128, 100),
    ):
        assert any(has(c) and not c.sweep for c in first)
    assert [i for i, c in enumerate(cases) if c.sweep == "compiled"] == list(
        range(len(cases) - 6, len(cases))
    )


def test_main_votes_of_a_gpu_in_both_layouts():
    cases = bench_vote.gpu_cases()
    main = [c for c in cases if c.upsample == 1]
    shapes = {(c.N, c.H, c.D, c.C) for c in main} - {
        (128, 7, 2048, 1000)
    }  # half a batch, for the tiles' sake
    for shape in shapes:
        layouts = {c.layout for c in main if shape == (c.N, c.H, c.D, c.C)}
        assert "NCHW" in layouts
        assert layouts & {"channels_last", "tokens"}
    for c in cases:
        assert c.dtype == "bfloat16"
        assert (baselines.ARGMAX in c.names) == (c.upsample == 1)
        assert (baselines.MATMUL_BATCHED in c.names) == (c.layout == "NCHW")


def test_a_peer_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setattr(baselines, "installed", lambda package: package == "quack")
    monkeypatch.setitem(sys.modules, "quack", None)  # an ImportError
    with pytest.warns(UserWarning, match="not compared: quack: ") as warned:
        baselines.losses("cuda", tiny=True)
    assert len(warned) == 1  # none of those that are not installed


def test_what_could_not_be_measured_is_named_with_the_reason():
    records = made_up("cuda")
    failed = {"bench": "failed loss", "name": baselines.LIGER, "facts": {"reason": "out of memory"}}
    text = report.block("gpu-loss", {Path("x.json"): [*records, {**records[-1], **failed}]})
    assert f"Could not be measured: {baselines.LIGER}, 1 of the comparisons: out of memory." in text
    assert "Could not be measured" not in report.block("gpu-loss", {Path("x.json"): records})


def test_blocks_of_a_gpu_show_both_backends():
    results = {Path("x.json"): made_up("cuda")}
    for name in ("gpu-loss", "gpu-distill", "gpu-linear", "gpu-vote"):
        text = report.block(name, results)
        assert "(cuda backend)" in text
        assert "(triton backend)" in text
    assert "| call | logits | cuda | triton |" in report.block("gpu-host", results)
    assert "| zipfls_cuda, triton |" in report.block("gpu-step", results)
    head, row = (
        next(line for line in report.block("gpu-loss", results).split("\n") if line.startswith(start)).split(
            " | "
        )
        for start in ("| logits | dtype", "| 8192 x 10000 |")
    )
    for peer in bench_loss.COMPILED:  # from a comparison of their own
        assert row[head.index(report.PEERS[peer])] == "1.00"


def test_a_run_cut_short_can_be_reported():
    records = made_up("cuda")
    rest = [r for r in records if r["bench"] != "ceiling"]
    sweeps = [r for r in rest if r["case"].get("sweep")]
    for some in [records[:n] for n in (3, 4, 9, 30, 120, 300)] + [rest[:9], rest[-3:], records[-2:], sweeps]:
        for name in report.NAMES:
            text = report.block(name, {Path("x.json"): some})
            assert text == report.NOTHING or "| ---" in text
            assert not re.search(r"\| ---.*(\n(?!\|)|$)", text)  # no table without rows


@pytest.mark.parametrize(("bench", "group"), [("distill", "distillation"), ("vote", "CPU vote")])
def test_a_device_shows_the_targets_that_it_has_figures_of(bench, group):
    some = [r for r in made_up("cpu") if r["bench"] == bench]
    text = report.block("cpu-targets", {Path("x.json"): some})
    assert {line.split(":")[0] for line in text.splitlines() if "<=" in line} == {f"| {group}"}


def dumped(folder: Path, records: list[dict], **environment) -> Path:
    """A folder with a file of records."""
    bare = [{k: v for k, v in r.items() if k != "env"} for r in records]
    files.dump(folder / "made-up.json", {"1": records[0]["env"] | environment}, bare)
    return folder


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_report_renews_the_blocks(kind, tmp_path):
    folder = dumped(tmp_path, made_up(kind))
    names = [n for n in report.NAMES if n.startswith("gpu" if kind == "cuda" else "cpu")]
    marked = "".join(f"<!-- report:{n} -->\nold\n<!-- /report -->\n\n" for n in names)
    text = report.renewed(f"# Title\n\n{marked}The end.\n", folder)
    assert text.startswith("# Title\n")
    assert text.endswith("The end.\n")
    assert report.NOTHING not in text
    assert "\nold\n" not in text
    assert [name for name, _ in report.MARKED.findall(text)] == names
    assert report.renewed(text, folder) == text
    assert report.renewed(text.replace("1.00 ms", "0.90 ms", 1), folder) == text
    for wrong, words in (
        ("<!-- report:speed -->\n<!-- /report -->\n", "there is no block speed"),
        ("<!-- report:cpu-loss -->\n", "a block is not closed"),
    ):
        with pytest.raises(ValueError, match=words):
            report.renewed(text + wrong, folder)


def test_the_page_waits_for_records_of_a_gpu(tmp_path):
    page = (ROOT / "docs" / "BENCHMARKS.md").read_text()
    blocks = dict(report.MARKED.findall(page))
    assert {f"gpu-{name}" for name in ("targets", "loss", *MEASURED, "host")} <= set(blocks)
    recorded = {f"{r['env']['kind']}-{r['bench']}".replace("cuda", "gpu") for r in RECORDED}
    for name, text in blocks.items():
        if name in report.NAMES:
            source = name if name[4:] in MEASURED else f"{name[:3]}-loss"
            assert (text in ("", report.NOTHING + "\n")) == (source not in recorded)
    text = report.renewed(page, dumped(tmp_path, made_up("cuda")))
    for name, body in report.MARKED.findall(text):
        if name.startswith("gpu-"):
            assert "| ---" in body
            assert report.NOTHING not in body


def test_report_without_records_says_so(tmp_path):
    empty = "<!-- report:cpu-loss -->\n<!-- /report -->\n"
    assert report.renewed(empty, tmp_path) == empty  # nothing measured, nothing shown
    text = report.renewed("<!-- report:cpu-loss -->\nold\n<!-- /report -->\n", tmp_path)
    assert text == f"<!-- report:cpu-loss -->\n{report.NOTHING}\n<!-- /report -->\n"


def test_tiny_records_are_never_reported(tmp_path):
    folder = dumped(tmp_path, made_up("cpu"), tiny=True)
    assert report.block("cpu-loss", report.load_all(folder)) == report.NOTHING


@pytest.mark.parametrize(
    "value,text", [(1.0, "1.00 s"), (0.01234, "12.3 ms"), (5e-6, "5.00 us"), (4.56e-8, "45.6 ns")]
)
def test_times_read_well(value, text):
    assert report.seconds(value) == text
