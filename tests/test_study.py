"""experiments/study.py: settings are chosen on validation words, judged on test words; nothing runs twice."""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "benchmarks")]

import records as files  # noqa: E402
import report  # noqa: E402

from experiments import efficacy, plots  # noqa: E402
from experiments.study import Sample, Study, best, tables  # noqa: E402

SMALL = Study(
    "--common",
    "--data v",
    "--data t",
    ("--lr 1", "--lr 2"),
    {
        "plain": ("--loss a",),
        "smooth": ("--loss b1", "--loss b2"),
        "new": ("--loss c1", "--loss c2", "--loss c3"),
    },
    {"few": ("--data few", ""), "deep": ("--data t", "--stages 9")},
    ("plain", "new"),
    {"words": {"1": "few", "2": ""}, "stages": {"3": "", "9": "deep"}},
    (2, 3, 1),
)
RIGHT = {"--lr 1": 0.0, "--lr 2": 0.1, "a": 0.5, "b1": 0.4, "b2": 0.45, "c1": 0.7, "c2": 0.6, "c3": 0.1}


def record(run: dict) -> dict:
    """Lr 2 is best, and of the settings b2 and c1; on test words c1 is the worst."""
    setting = run["setting"].split()[1]
    last = RIGHT[run["options"][:6]] + RIGHT[setting] + 0.01 * run["seed"]
    if "--data t" in run["command"] and setting == "c1":
        last -= 0.6 + 0.005 * run["seed"]
    numbers = {
        "cross_entropy": 1.5,
        "calibration_error": 0.125,
        "train_accuracy": 0.99,
        "seconds": 30.0,
        "probe": last / 2,
    }
    return {"run": "1", **run, "last": last, **numbers}


def play(study: Study, most: int = 1000) -> list[dict]:
    """The records of a study, one run at a time."""
    records = []
    while len(records) < most and (todo := study.missing(records)):
        records.append(record(todo[0]))
    return records


def test_steps_follow_from_the_records_of_those_before():
    records = play(SMALL)
    steps = [r["data"] for r in records]
    assert steps == ["tuning"] * 4 + ["choice"] * 10 + ["test"] * 9 + ["few", "few", "deep", "deep"]
    assert len({r["command"] for r in records}) == len(records)
    assert [r["seed"] for r in records[:4]] == [0, 0, 1, 1]
    assert all("--data v" in r["command"] for r in records[:14])
    assert all("--lr 2" in r["command"] for r in records[4:])
    judged = {r["setting"] for r in records if r["data"] == "test"}
    assert judged == {"--loss a", "--loss b2", "--loss c1"}  # by validation, though c1 is worst on test
    assert {r["command"] for r in records if r["data"] == "deep"} == {
        f"--data t --common --lr 2 --stages 9 --loss {loss} --seed 0" for loss in ("a", "c1")
    }
    assert SMALL.missing(records) == []
    assert [r["seed"] for r in SMALL.missing(records, 4)] == [3, 3, 3]


def test_nothing_is_judged_before_all_is_chosen():
    records = play(SMALL)
    for kept in range(14):
        assert {r["data"] for r in SMALL.missing(records[:kept])} == {"tuning" if kept < 4 else "choice"}
        assert tables(SMALL, records[:kept]) == []
    lost = records[:7] + records[8:14]
    assert [r["command"] for r in SMALL.missing(lost)] == [records[7]["command"]]


def test_a_condition_that_shows_something_gets_the_other_seeds():
    """What the first seeds of one condition show may be chance among many; the records do not forget why."""
    study, records = dataclasses.replace(SMALL, seeds=(2, 4, 2)), []
    while todo := study.missing(records):
        found = record(todo[0])
        if found["data"] == "few" and "c1" in found["setting"]:
            found["last"] -= 0.2 + 0.01 * (-1) ** found["seed"]  # less than plain's, and more: no difference
        if found["data"] == "deep" and "c1" in found["setting"] and found["seed"] == 3:
            found["last"] += 5  # seeds that were asked later do not take the question back
        records.append(found)
    seeds = {name: [r["seed"] for r in records if r["data"] == name] for name in ("few", "deep")}
    assert seeds == {"few": [0, 0, 1, 1], "deep": [0, 0, 1, 1, 2, 2, 3, 3]}
    lost = [r for r in records if (r["data"], r["seed"]) != ("deep", 1)]
    assert [(r["data"], r["seed"]) for r in study.missing(lost)] == [("deep", 1)] * 2
    (row,) = (line for line in tables(study, records) if line.startswith("| deep"))
    assert row.startswith("| deep | 4 | ")


def test_a_single_candidate_needs_no_run():
    study = Study("", "--data v", "--data t", ("--lr 1",), {"plain": ("--loss a",), "new": ("--loss c1",)})
    assert {r["data"] for r in study.missing([])} == {"test"}
    assert len(study.missing([])) == 10


def test_best_is_by_the_mean_and_needs_every_record():
    runs = [{"command": f"{x}{s}", "setting": x} for x in "ab" for s in "01"]
    known = {"a0": {"last": 0.9}, "a1": {"last": 0.1}, "b0": {"last": 0.6}, "b1": {"last": 0.6}}
    assert best(runs, known, "setting") == "b"
    known.pop("a1")
    assert best(runs, known, "setting") == ""


def test_the_table_follows_from_the_records(tmp_path, monkeypatch):
    records = play(SMALL)
    lines = tables(SMALL, records)
    rows = {line.split(" | ")[0].strip("| "): line for line in lines}
    assert rows["plain"] == "| plain | `--loss a` | 61.00 ± 0.58 |  | 1.500 | 12.5 | 99.0 | 30.50 |  |"
    new = [10 * (0.2 - 0.6) * 10 - 0.5 * s for s in range(3)]
    less = Sample(tuple(new))
    assert less.mean == pytest.approx(-40.5)
    assert less.reach == pytest.approx(4.303 * statistics.stdev(new) / 3**0.5)
    assert f"**-40.50 ± {less.reach:.2f}**" in rows["new"]
    assert f"**-20.25 ± {less.reach / 2:.2f}** |" in rows["new"]
    assert f"reach 0.00 to {less.reach:.2f} points" in "\n".join(lines)
    assert rows["few"] == "| few | 1 | 60.00 | +20.00 |"
    assert rows["deep"] == "| deep | 1 | 60.00 | -40.00 |"
    assert "- plain: `--lr 1` 50.50, `--lr 2` 60.50" in lines  # of the baseline, the options
    assert "- smooth: `--loss b1` 50.50, `--loss b2` 55.50" in lines
    # a seed that one method lacks counts for none
    seed = [r for r in records if (r["data"], r["method"], r["seed"]) == ("test", "new", 2)]
    assert "2 seeds" in tables(SMALL, [r for r in records if r not in seed])[0]
    # and the report's block is this table
    monkeypatch.setitem(efficacy.STUDIES, "typefaces", SMALL)
    assert report.block("efficacy-typefaces", {}, tmp_path) == report.NOTHING
    environment = {"kind": "cpu", "device": "made up", "arch": "none", "threads": 1, "torch": "2"}
    environment |= {"compiler": "gcc", "commit": "abc", "dirty": False}
    files.dump(tmp_path / "efficacy" / "typefaces.json", {"1": environment}, records)
    text = report.block("efficacy-typefaces", {}, tmp_path)
    assert text.startswith("\n".join(lines))
    assert "27 runs, 14 min of training. made up" in text


def test_the_picture_is_drawn_from_records(tmp_path):
    records = [r | {"accuracy": [r["last"] / 2, r["last"]]} for r in play(SMALL)]
    plots.draw_study(SMALL, records, tmp_path / "a.png")
    first = (tmp_path / "a.png").read_bytes()
    plots.draw_study(SMALL, records[:-4], tmp_path / "b.png")  # the other conditions are still to come
    assert first != (tmp_path / "b.png").read_bytes()
    plots.draw_study(SMALL, records, tmp_path / "b.png")
    assert first == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("name", efficacy.STUDIES)
def test_every_command_is_one(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    study, records = efficacy.STUDIES[name], []
    while todo := study.missing(records):
        for run in todo:
            args = efficacy.parse_arguments(efficacy.make_parser(), shlex.split(run["command"]))
            kind = "typefaces-validation" if run["data"] in ("tuning", "choice") else "typefaces"
            assert args.data.partition(":")[0] == kind
            assert args.seed == [run["seed"]]
        records += [run | {"last": 0.5} for run in todo]
    assert {r["method"] for r in records if r["data"] == "test"} == set(study.methods)


def test_a_row_is_trained_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "typefaces.json"
    files.dump(path, {"1": {"device": "made up"}}, play(SMALL))
    trained = []

    def train(run, place):
        trained.append((run["command"], tuple(place)))
        return run | {"last": 0.25}

    monkeypatch.setattr(efficacy, "run_one", train)
    before = path.read_text()
    efficacy.repeat_row(SMALL, path, "smooth", ["--cache", "here"], 1)
    assert [command[-8:] for command, _ in trained] == ["--seed 0", "--seed 1", "--seed 2"]
    assert all("--loss b2" in command and place == ("--cache", "here") for command, place in trained)
    assert "smooth, seed 2: 25.00 %, 57.00 on record" in capsys.readouterr().out
    assert path.read_text() == before
    with pytest.raises(SystemExit, match="no judged runs of 'new'"):
        efficacy.repeat_row(SMALL, tmp_path / "none.json", "new", [], 1)
    assert json.loads(before)
