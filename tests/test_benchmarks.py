"""The benchmarks: baselines that are right, records that are whole, figures that follow from the records.

No time that is taken here decides anything.
"""

from __future__ import annotations

import itertools
import json
import re
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
import bench_loss  # noqa: E402
import bench_step  # noqa: E402
import bench_vote  # noqa: E402
import harness  # noqa: E402
import report  # noqa: E402
import targets  # noqa: E402

CPU_LOSSES = baselines.losses("cpu", tiny=True)


@pytest.fixture(autouse=True)
def _no_worker(monkeypatch):
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
    if loss.whole:
        exact = value_and_gradient(baselines.fused("reference"), logits.double(), target, votes)
    else:
        smoothing = 0.1 if name == baselines.SMOOTHING else 0.0
        plain = lambda z, y, v: F.cross_entropy(z, y, label_smoothing=smoothing)  # noqa: E731
        exact = value_and_gradient(plain, logits.double(), target, votes)
    for actual, expected in zip(value_and_gradient(loss.call, logits, target, votes), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, loss in CPU_LOSSES.items() if loss.whole])
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


@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("layout", ["channels_last", "NCHW", "tokens"])
def test_baseline_votes_agree_with_the_reference(layout, upsample):
    if layout == "tokens" and upsample == 2:
        pytest.skip("tokens have no map to upsample")
    features, weight = harness.vote_inputs(2, 3, 4, 20, 30, torch.float32, layout)
    features, weight = features.cpu(), weight.cpu()
    assert features.shape == ((2, 12, 20) if layout == "tokens" else (2, 20, 3, 4))
    expected = zls.dense_vote(features.double(), weight.double(), upsample=upsample, backend="reference")
    for name, call in baselines.votes("cpu", upsample).items():
        found = call(features, weight)
        if name != baselines.MATMUL:
            torch.testing.assert_close(found.int(), expected, msg=lambda m, n=name: f"{n}: {m}")
    scores = baselines.matmul_alone(features, weight)
    if upsample == 1:
        torch.testing.assert_close(scores.argmax(1).view(2, -1).int(), expected)


def test_baseline_heads_agree():
    features, weight = harness.vote_inputs(3, 2, 2, 8, 7, torch.float32, "channels_last")
    target = torch.tensor([1, 6, 0])
    plain = F.cross_entropy(features.cpu().mean((2, 3)) @ weight.cpu().t(), target)
    votes = zls.dense_vote(features.cpu(), weight.cpu(), backend="reference")
    whole = plain + zls.zipf_loss(features.cpu().mean((2, 3)) @ weight.cpu().t(), target, votes)
    for name, head in baselines.heads("cpu").items():
        expected = whole if name.startswith("zipfls_cuda") else plain
        torch.testing.assert_close(head(features.cpu(), weight.cpu(), target), expected)


def test_step_trains_resnet50():
    with torch.device("meta"):
        model = bench_step.ResNet((3, 4, 6, 3), 64)
        out = model(torch.empty(2, 3, 224, 224))
    fc = 2048 * 1000 + 1000
    assert sum(p.numel() for p in model.parameters()) + fc == 25_557_032  # the usual ResNet-50
    assert out.shape == (2, 2048, 7, 7)


@pytest.mark.parametrize("name", bench_step.criteria())
def test_step_losses(name):
    features, _ = harness.vote_inputs(3, 2, 2, 8, 7, torch.float32, "channels_last")
    fc, target = torch.nn.Linear(8, 7), torch.tensor([1, 6, 0])
    features = features.cpu()
    votes = zls.dense_vote(features, fc.weight, fc.bias, backend="reference")
    logits = fc(features.mean((2, 3)))
    if name == baselines.SMOOTHING:
        expected = F.cross_entropy(logits, target, label_smoothing=0.1)
    elif name == baselines.CROSS_ENTROPY:
        expected = F.cross_entropy(logits, target)
    else:
        expected = zls.zipf_cross_entropy(logits, target, votes, backend="reference")
    criterion = bench_step.criteria()[name]
    torch.testing.assert_close(criterion(features, fc, target), expected)


# Harness ---------------------------------------------------------------------------------------------


class DriftingClock:
    """Plays a machine whose speed changes tenfold from round to round; each contestant has its own cost."""

    name, least = "host", 1e-3

    def __init__(self, costs: dict[str, float]):
        self.costs, self.samples, self.order = costs, 0, []

    def ready(self, entry):
        if self.costs[entry.name] < 0:
            raise RuntimeError("cannot run here")
        return "calls"

    def sample(self, entry, k):
        running = sum(cost > 0 for cost in self.costs.values())
        speed = 10 ** ((self.samples // running) % 2)
        self.samples += 1
        self.order.append(entry.name)
        return self.costs[entry.name] * speed


def test_ratios_survive_a_machine_that_drifts(monkeypatch):
    monkeypatch.setattr(harness, "TINY", False)
    clock = DriftingClock({"a": 0.2, "b": 0.4, "broken": -1.0})
    entries = [harness.Entry(name, [lambda: None]) for name in clock.costs]
    result = harness.race(entries, clock, seconds=20, most_rounds=16)
    assert set(result.failed) == {"broken"}
    assert "cannot run here" in result.failed["broken"]
    assert result.ratio("a", "b") == pytest.approx([0.5] * 3)
    assert len(result.taken("a")) == len(result.taken("b")) == 16
    rounds = list(itertools.batched(clock.order[-32:], 2)) if hasattr(itertools, "batched") else None
    assert rounds is None or all(set(r) == {"a", "b"} for r in rounds)


def test_slow_contestants_sit_out(monkeypatch):
    monkeypatch.setattr(harness, "TINY", False)
    clock = DriftingClock({"fast": 1e-3, "slow": 1.0})
    result = harness.race([harness.Entry(n, [lambda: None]) for n in clock.costs], clock, seconds=0.5)
    assert len(result.taken("slow")) < len(result.taken("fast"))
    together = [s for s, f in zip(result.samples["slow"], result.samples["fast"], strict=True) if s and f]
    assert len(together) == len(result.taken("slow")) >= 3


def test_host_clock_prepares_untimed():
    calls = []
    entry = harness.Entry("x", [lambda state: calls.append(state)], [lambda: len(calls)])
    assert harness.HostClock().sample(entry, 4) > 0
    assert calls == [0, 1, 2, 3]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no high-water mark here")
def test_peak_memory_sees_what_a_call_takes(monkeypatch):
    monkeypatch.setattr(harness, "device", lambda: torch.device("cpu"))
    harness.peak_memory(harness.Entry("warm", [lambda: torch.ones(10)]))
    peak = harness.peak_memory(harness.Entry("x", [lambda: torch.ones(1 << 24).sum()]))
    if peak is None:
        pytest.skip("the high-water mark cannot be reset here")
    assert 0.9 < peak / (4 << 24) < 1.5


def test_a_book_keeps_what_did_not_run_again(tmp_path):
    path = tmp_path / "records.json"
    result = harness.Result({"x": [1.0, 2.0, 3.0]}, {"x": 1}, {"x": "calls"}, {"x": None})
    first = harness.Book(path)
    for bench in ("loss", "vote"):
        first.add(bench, {"N": 1}, "both", "host", result, 8, 0)
    second = harness.Book(path)
    second.add("loss", {"N": 2}, "both", "host", result, 8, 0)
    second.fact("launches", {"N": 2}, "x", {"forward": 1})
    found = harness.load(path)
    assert [(r["bench"], r["case"]["N"], r["run"]) for r in found] == [
        ("vote", 1, "1"), ("loss", 2, "2"), ("launches", 2, "2"),
    ]  # fmt: skip
    assert all(set(harness.RECORD) <= set(r) for r in found)
    assert all(set(r["env"]) == set(harness.ENVIRONMENT) for r in found)
    assert found[0]["median"] == 2.0


# Records and report ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(harness.RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_committed_records_are_whole(path):
    assert path.stat().st_size < 200_000
    records = harness.load(path)
    for r in records:
        assert set(harness.RECORD) <= set(r) - {"env"}
        assert set(r["env"]) == set(harness.ENVIRONMENT)
        assert r["env"]["commit"]
        assert not r["env"]["tiny"]
        if r["median"] is not None:
            assert 0 < r["p20"] <= r["median"] <= r["p80"]
            assert r["rounds"] >= 3
            if r["bench"] not in ("step", "head"):
                assert r["bytes"] or r["flops"]
    kind = "" if records[0]["env"]["kind"] == "cuda" else "cpu "
    assert path.stem == harness.slug(kind + records[0]["env"]["device"])
    assert {r["name"] for r in records if r["bench"] == "ceiling"} == {"copy", "product"}


def test_readme_and_pictures_follow_from_the_records():
    assert report.check() == []


def made_up(kind: str, time: float = 1e-3, copy_time: float = 1e-3) -> list[dict]:
    """Records of every case there is for a kind of device, each contestant taking the same ``time``."""
    env = dict.fromkeys(harness.ENVIRONMENT, "")
    env |= {"kind": kind, "device": "made up", "threads": 1, "others": 0.0, "tiny": False, "dirty": False}
    best = "cuda" if kind == "cuda" else "cpu"
    env["backends"] = [best, "reference"]
    peers = [v for k, v in vars(baselines).items() if k.isupper() and isinstance(v, str)]
    names = [baselines.ours(best), *peers]
    device = "device" if kind == "cuda" else "host"
    found = []

    def add(bench: str, case: dict, mode: str, clock: str, nbytes: int, flops: int, name: str = "") -> None:
        taken = copy_time if name == "copy" else time
        for n in [name] if name else names:
            ratio = {other: [1.0, 0.9, 1.1] for other in names if other != n and n == names[0]}
            values = [
                "1", bench, case, mode, clock, "graph", n, taken, taken, taken, 9, 1,
                nbytes, flops, 1 << 20, ratio,
            ]  # fmt: skip
            found.append({**dict(zip(harness.RECORD, values, strict=True)), "env": env})

    add("ceiling", {"dtype": "float32"}, "", device, 1 << 30, 0, "copy")
    for dtype in ("float32", "bfloat16"):
        add("ceiling", {"dtype": dtype}, "", device, 0, 1 << 40, "product")
    for c in bench_loss.gpu_cases() if kind == "cuda" else bench_loss.cpu_cases():
        case = {k: v for k, v in vars(c).items() if k not in ("mode", "clock")}
        itemsize = getattr(torch, c.dtype).itemsize
        add("loss", case, c.mode, c.clock or device, 2 * c.N * c.C * itemsize, 0)
    for c in bench_vote.gpu_cases() if kind == "cuda" else bench_vote.cpu_cases():
        add("vote", dict(vars(c)), "forward", device, 1 << 20, 1 << 30)
    for C, compiled in itertools.product((1000, 10000), (False, True)):
        case = {"N": 256, "C": C, "size": 224, "compiled": compiled, "what": "ResNet-50", "dtype": "bfloat16"}
        add("step", case, "step", device, 0, 0)
    add("head", {"N": 8, "H": 7, "D": 64, "C": 10, "dtype": "float32"}, "both", device, 0, 0)
    counted = {"forward": 1, "backward": 1, "synchronisations": 0}
    found.append({**found[-1], "bench": "launches", "name": names[0], "facts": counted,
                  "case": {"N": 256, "C": 1000, "P": 49}})  # fmt: skip
    return found


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_target_finds_its_records(kind):
    verdicts = targets.judge(made_up(kind), kind)
    assert len(verdicts) >= (9 if kind == "cpu" else 30)
    assert [v.text for v in verdicts if v.measured == targets.GAP] == []
    assert {v.met for v in verdicts if v.target != "-"} == {True, False}
    assert all(v.met is None for v in targets.judge([], kind))


def test_a_target_judges_by_its_bound():
    def met(copy_time):
        verdicts = targets.judge(made_up("cuda", copy_time=copy_time), "cuda")
        return {v.met for v in verdicts if "share of the copy" in v.text}

    assert met(1e-6) == {False}
    assert met(1.0) == {True}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_report_writes_and_notices_changes(kind, tmp_path):
    pytest.importorskip("matplotlib")
    records = made_up(kind)
    runs = {"1": records[0]["env"]}
    path = tmp_path / "made-up.json"
    harness.dump(path, runs, [{k: v for k, v in r.items() if k != "env"} for r in records])
    readme = tmp_path / "README.md"
    label = "gpu" if kind == "cuda" else "cpu"
    names = [n for n in report.BLOCKS if n.startswith(label)]
    marked = "".join(f"<!-- report:{n} -->\nold\n<!-- /report -->\n\n" for n in names)
    readme.write_text(f"# Title\n\n{marked}The end.\n")

    problems = report.check(readme, tmp_path)
    assert sum("differs" in p for p in problems) == len(names)
    assert sum("not drawn" in p for p in problems) == len(report.PICTURES)
    report.write(readme, tmp_path)
    text = readme.read_text()
    assert report.check(readme, tmp_path) == []
    assert text.startswith("# Title\n")
    assert text.endswith("The end.\n")
    assert report.NOTHING not in text
    for picture in re.findall(r"\(benchmarks/results/([^)]+)\)", text):
        assert (tmp_path / picture).exists()

    readme.write_text(text.replace("1.00 ms", "0.90 ms", 1))
    assert any("differs" in p for p in report.check(readme, tmp_path))
    readme.write_text("# Title\n")
    assert any("shows none" in p for p in report.check(readme, tmp_path))
    readme.write_text("<!-- report:speed -->\n<!-- /report -->\n")
    assert any("no block speed" in p for p in report.check(readme, tmp_path))


def test_report_without_records_says_so(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- report:cpu-loss -->\n<!-- /report -->\n")
    assert report.check(readme, tmp_path) == []  # nothing measured, nothing shown
    report.write(readme, tmp_path)
    assert report.NOTHING in readme.read_text()
    assert report.check(readme, tmp_path) == []


def test_tiny_records_are_never_reported(tmp_path):
    records = made_up("cpu")
    runs = {"1": {**records[0]["env"], "tiny": True}}
    harness.dump(tmp_path / "x.json", runs, [{k: v for k, v in r.items() if k != "env"} for r in records])
    assert report.block("cpu-loss", report.load_all(tmp_path)) == report.NOTHING


@pytest.mark.parametrize(
    "value,text", [(1.0, "1.00 s"), (0.01234, "12.3 ms"), (5e-6, "5.00 us"), (4.56e-8, "45.6 ns")]
)
def test_times_read_well(value, text):
    assert report.seconds(value) == text
