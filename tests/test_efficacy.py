"""Does it help? Commands mean what they say, runs go on where they stopped, the table is right."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

import zipfls_cuda as zls

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "benchmarks")]

import records as files  # noqa: E402
import report  # noqa: E402

from experiments import efficacy, model  # noqa: E402

NAMES = list(efficacy.METHODS)
TINY = efficacy.Plan(
    "--depth 8 --width 8 --size 16 --epochs 2 --batch-size 32 --device cpu",
    {"digits": "--data digits --limit 64"},
    {"digits": 1},
)
ENV = {"kind": "cpu", "device": "made up", "arch": "none", "threads": 1, "torch": "2", "compiler": "gcc"}
ENV |= {"commit": "abc", "dirty": False}


PLACE = ("--cache", "nowhere")  # digits need none


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def record(run: dict, last: float) -> dict:
    return {"run": "1", **run, "last": last, "best": last, "seconds": 30.0}


def write(folder: Path, plan: efficacy.Plan, percent) -> list[dict]:
    """Records of all runs of a plan, each with what ``percent`` says of it."""
    records = [record(run, percent(run) / 100) for run in plan.runs()]
    files.dump(folder / "efficacy" / "cpu.json", {"1": ENV}, records)
    return records


# Runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", efficacy.PLANS)
def test_every_command_is_one_and_all_differ(preset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: preset != "cpu")
    plan = efficacy.PLANS[preset]
    runs = plan.runs()
    assert len({run["command"] for run in runs}) == len(runs) == len(plan.methods) * sum(plan.seeds.values())
    assert set(NAMES[:3]) <= set(plan.methods) <= set(NAMES)
    assert min(plan.seeds.values()) >= 3
    for run in runs:
        args = efficacy.parse_arguments(efficacy.make_parser(), shlex.split(run["command"]))
        assert (args.data.partition(":")[0], args.seed) == (run["data"], [run["seed"]])
        assert args.device == ("cpu" if preset == "cpu" else "cuda")


def test_methods_train_with_the_loss_they_name():
    laws = dict.fromkeys(NAMES[2:4], zls.Zipf()) | {NAMES[9]: zls.Zipf()}
    laws |= {NAMES[4]: zls.Constant(), NAMES[5]: zls.LinearDecay(), NAMES[6]: zls.ExponentialDecay(1.0)}
    laws |= {NAMES[7]: zls.RandomUniform(), NAMES[8]: zls.RandomPareto(1.0)}
    logits, target = torch.randn(4, 7), torch.arange(4)
    votes = torch.randint(7, (4, 9), dtype=torch.int32)
    for run in TINY.runs():
        args = efficacy.parse_arguments(efficacy.make_parser(), shlex.split(run["command"]))
        (name,) = args.loss
        criterion, method = model.make_loss(name, args, 7), run["method"]
        smoothing = 0.1 if "smoothing" in method else 0.0
        if method not in laws:
            want = torch.nn.functional.cross_entropy(logits, target, label_smoothing=smoothing)
            assert torch.equal(criterion(logits, target), want)
            continue
        assert args.ranking == ("logits" if "logits" in method else "votes")
        weight = 1.0 if "weight 1" in method else 0.1
        torch.manual_seed(0)
        got = criterion((logits, votes), target)
        torch.manual_seed(0)
        law = {"zipf_weight": weight, "distribution": laws[method]}
        torch.testing.assert_close(got, zls.zipf_cross_entropy(logits, target, votes, **law))


def test_whole_seeds_come_first_and_more_may_be_asked_for():
    plan = efficacy.Plan("", {"a": "--a", "b": "--b"}, {"a": 3, "b": 1})
    order = [(run["seed"], run["data"]) for run in plan.runs() if run["method"] == NAMES[0]]
    assert order == [(0, "a"), (0, "b"), (1, "a"), (2, "a")]
    assert [run["method"] for run in plan.runs()[: len(NAMES)]] == NAMES
    assert len(plan.runs(2)) == 5 * len(NAMES)


def test_runs_go_on_where_they_stopped(tmp_path, monkeypatch):
    path, done, stop = tmp_path / "new folder" / "x.json", [], [4]

    def trained(run, place):
        if len(done) in stop:
            raise KeyboardInterrupt
        done.append(run["command"])
        return {**run, "last": 0.5}

    monkeypatch.setattr(efficacy, "run_one", trained)
    with pytest.raises(KeyboardInterrupt):
        efficacy.run_all(TINY, path, PLACE)
    assert [r["command"] for r in files.load(path)] == done == [r["command"] for r in TINY.runs()[:4]]
    stop.clear()
    assert efficacy.run_all(TINY, path, PLACE) == len(NAMES) - 4
    assert efficacy.run_all(TINY, path, PLACE) == 0
    assert efficacy.run_all(TINY, path, PLACE, least=2) == len(NAMES)
    assert done == [r["command"] for r in TINY.runs(2)]
    records = files.load(path)
    assert [r["command"] for r in records] == [r["command"] for r in TINY.runs(2)]
    assert len({r["run"] for r in records}) == 3  # sessions, each with its own environment


def test_a_run_is_trained_and_can_be_repeated(tmp_path):
    few = dataclasses.replace(TINY, methods=tuple(NAMES[i] for i in (0, 2, 8)))
    found = []
    for name in ("one.json", "two.json"):
        assert efficacy.run_all(few, tmp_path / name, PLACE) == 3
        found.append(files.load(tmp_path / name))
    for first, second in zip(*found):
        assert len(first["accuracy"]) == first["settings"]["epochs"] == 2
        assert first["last"] == first["accuracy"][-1] <= first["best"] == max(first["accuracy"])
        assert 0 <= first["last"] <= 1 < 64 * first["cross_entropy"]
        assert first["env"]["threads"] == 1
        same = {"accuracy", "cross_entropy", "command", "settings"}
        assert {k: first[k] for k in same} == {k: second[k] for k in same}
    assert len({r["cross_entropy"] for r in found[0]}) == 3  # three methods, three networks
    text = (tmp_path / "one.json").read_text()
    assert str(tmp_path) not in text


@pytest.mark.slow
def test_runs_side_by_side_are_the_same_runs(tmp_path):
    """Processes of one thread each give what one after the other gives, and every run its record."""
    found = []
    for jobs in (1, 3):
        path = tmp_path / f"{jobs}.json"
        assert efficacy.run_all(efficacy.TINY, path, PLACE, jobs=jobs) == 3
        found.append({r["command"]: (r["accuracy"], r["cross_entropy"]) for r in files.load(path)})
    assert found[0] == found[1]
    assert list(found[0]) == [run["command"] for run in efficacy.TINY.runs()]


def test_data_is_made_once_for_runs_side_by_side(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(efficacy, "load_data", lambda *args, fonts: made.append(args))
    monkeypatch.setattr(efficacy, "ProcessPoolExecutor", lambda *args: pytest.fail("made"))
    plan = efficacy.Plan(
        "--device cpu", {"a": "--data fractals:7", "b": "--data digits --limit 9"}, {"a": 2, "b": 2}
    )
    with pytest.raises(pytest.fail.Exception, match="made"):
        list(efficacy.run_some(plan.runs(), ["--cache", str(tmp_path)], 2))
    assert made == [("fractals:7", 32, tmp_path, None), ("digits", 32, tmp_path, 9)]


# The table -------------------------------------------------------------------------------------------


def test_the_table_follows_from_the_records(tmp_path, monkeypatch):
    plan = efficacy.Plan("--common", {"easy": "--easy", "hard": "--hard"}, {"easy": 3, "hard": 3})
    monkeypatch.setitem(efficacy.PLANS, "cpu", plan)

    def percent(run):
        """Cross-entropy 60, 70, 80; some others more, by what is written here."""
        more = {
            ("easy", NAMES[1]): (2, 3, 4),
            ("easy", NAMES[2]): (1, 3, 5),
            ("hard", NAMES[2]): (-2, -3, -4),
        }
        return 60 + 10 * run["seed"] + more.get((run["data"], run["method"]), (0, 0, 0))[run["seed"]]

    records = write(tmp_path, plan, percent)
    text = report.block("efficacy-cpu", {}, tmp_path)
    lines = text.splitlines()
    assert (
        "| training loss | easy, 3 seeds | minus cross-entropy | hard, 3 seeds | minus cross-entropy |"
        in lines
    )
    assert f"| {NAMES[0]} | 70.00 ± 10.00 |  | 70.00 ± 10.00 |  |" in lines
    # Of 3 seeds the interval is 4.303 / sqrt(3) = 2.48 deviations: 3 +- 1 excludes 0, 3 +- 2 does not.
    assert f"| {NAMES[1]} | 73.00 ± 11.00 | **+3.00 ± 1.00** | 70.00 ± 10.00 | +0.00 ± 0.00 |" in lines
    assert f"| {NAMES[2]} | 73.00 ± 12.00 | +3.00 ± 2.00 | 67.00 ± 9.00 | **-3.00 ± 1.00** |" in lines
    assert "-0.00" not in text
    assert sum(line.startswith("| ") for line in lines) == len(NAMES) + 2
    assert "2 of the table's 18 are bold, 1 of them gains; chance alone would give about 0.9" in text
    assert "easy +0.00 ± 1.00, hard **-3.00 ± 1.00**.\n" in text
    assert f"{len(records)} runs, 30 min of training" in text
    assert "`--hard --common`" in text
    assert "made up (none), 1 thread, torch 2, gcc, commit abc." in text


def test_only_whole_seeds_of_the_plan_as_it_stands_count(tmp_path, monkeypatch):
    plan = efficacy.Plan("--common", {"easy": "--easy"}, {"easy": 3})
    monkeypatch.setitem(efficacy.PLANS, "cpu", plan)
    file = tmp_path / "efficacy" / "cpu.json"
    assert report.block("efficacy-cpu", {}, tmp_path) == report.NOTHING
    records = write(tmp_path, plan, lambda run: 60 + run["seed"])
    files.dump(file, {"1": ENV}, records[:-1])  # the last method of the last seed is missing
    text = report.block("efficacy-cpu", {}, tmp_path)
    assert "easy, 2 seeds" in text
    assert f"| {NAMES[0]} | 60.50 ± 0.71 |  |" in text
    records[0]["command"] += " --epochs 7"  # of another plan
    files.dump(file, {"1": ENV}, records)
    text = report.block("efficacy-cpu", {}, tmp_path)
    assert f"| {NAMES[0]} | 61.50 ± 0.71 |  |" in text
    files.dump(file, {"1": ENV}, records[: len(NAMES)])
    assert report.block("efficacy-cpu", {}, tmp_path) == report.NOTHING


def test_a_plan_of_some_methods_is_balanced_by_them():
    plan = efficacy.Plan("--common", {"easy": "--easy"}, {"easy": 2}, tuple(NAMES[:3]))
    records = [record(run, 0.5) for run in plan.runs()]
    assert len(records) == 6
    assert efficacy.balanced(plan, records) == records
    assert efficacy.balanced(plan, records[:-1]) == records[:3]


def test_the_table_of_a_plan_of_some_methods(tmp_path, monkeypatch):
    plan = efficacy.Plan("--common", {"easy": "--easy"}, {"easy": 3}, tuple(NAMES[:3]))
    monkeypatch.setitem(efficacy.PLANS, "cpu", plan)
    write(tmp_path, plan, lambda run: 60)
    lines = report.block("efficacy-cpu", {}, tmp_path).splitlines()
    rows = [line.split(" | ")[0][2:] for line in lines if line.startswith("| ")]
    assert rows[-3:] == NAMES[:3]
    assert any("of the table's 2 are bold" in line for line in lines)


def test_report_renews_the_table(tmp_path, monkeypatch):
    plan = efficacy.Plan("--common", {"easy": "--easy"}, {"easy": 3})
    monkeypatch.setitem(efficacy.PLANS, "cpu", plan)
    page = "# Title\n<!-- report:efficacy-cpu -->\n<!-- /report -->\nThe end.\n"
    assert report.renewed(page, tmp_path) == page  # nothing measured, nothing shown
    write(tmp_path, plan, lambda run: 60)
    text = report.renewed(page, tmp_path)
    assert f"| {NAMES[0]} | 60.00 ± 0.00 |  |" in text
    assert report.renewed(text.replace("60.00", "61.00", 1), tmp_path) == text


# What is committed -----------------------------------------------------------------------------------


def test_committed_records_are_the_plan_s():
    plan, path = efficacy.PLANS["cpu"], efficacy.FOLDER / "cpu.json"
    assert path.stat().st_size < 200_000
    records = files.load(path)
    assert len({r["command"] for r in records}) == len(records)
    used = efficacy.balanced(plan, records)
    for data in plan.data:
        assert len(efficacy.accuracies(used, data, efficacy.BASELINE)) >= 3
    for r in records:
        assert r in used, r["command"]
        assert len(r["accuracy"]) == r["settings"]["epochs"]
        assert r["last"] == r["accuracy"][-1]
        assert r["best"] == max(r["accuracy"])
        assert r["env"]["threads"] == 1
        assert r["env"]["commit"] != "unknown"
        assert not r["env"]["dirty"]
    assert json.loads(path.read_text())["format"] == 1


def test_page_shows_the_committed_records():
    blocks = dict(report.MARKED.findall((ROOT / "docs" / "EFFICACY.md").read_text()))
    assert blocks["efficacy-cpu"] == report.block("efficacy-cpu", {}) + "\n"
    assert report.NOTHING not in blocks["efficacy-cpu"]
