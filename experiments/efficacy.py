"""Does it help? Test accuracy of every method on every data set, over several seeds.

    python -m experiments.efficacy                 what a CPU can do: one thread, about an hour
    python -m experiments.efficacy --preset gpu    the larger plan: all fractals, more epochs and seeds, bf16
    python -m experiments.efficacy --preset h200 --jobs 9  three methods, for minutes on a large GPU
    python -m experiments.efficacy --seeds 10      more seeds; a run that has its record is skipped

Every run is one command line of experiments.run, which its record names. Records go to
benchmarks/results/efficacy/PRESET.json as runs finish, whole seeds first; benchmarks/report.py makes
the table in docs/EFFICACY.md of them.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from .data import load_data
from .run import make_parser, parse_arguments, train_all

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from clock import TINY as TINY_RUN
from records import RESULTS, dump, environment, load
from sources import ROOT

FOLDER = RESULTS / "efficacy"

BASELINE, SMOOTHING, ZIPF = "cross-entropy", "label smoothing, 0.1", "Zipf, ranks by dense votes"
METHODS = {  # what is compared, with its options; the laws of the paper's Table 6 come after Zipf's
    BASELINE: "--loss ce",
    SMOOTHING: "--loss ls --label-smoothing 0.1",
    ZIPF: "--loss zipf --zipf-weight 0.1",
    "Zipf, ranks by logits": "--loss zipf --zipf-weight 0.1 --ranking logits",
    "constant": "--loss zipf --zipf-weight 0.1 --distribution constant",
    "linear decay": "--loss zipf --zipf-weight 0.1 --distribution linear:0",
    "exponential decay, rate 1": "--loss zipf --zipf-weight 0.1 --distribution exponential:1",
    "random uniform": "--loss zipf --zipf-weight 0.1 --distribution uniform",
    "random Pareto": "--loss zipf --zipf-weight 0.1 --distribution pareto:1",
    "Zipf, ranks by dense votes, weight 1": "--loss zipf --zipf-weight 1",
}


@dataclass(frozen=True)
class Plan:
    """What is trained, but for the method."""

    options: str  # of every run
    data: dict[str, str]  # data set -> its options
    seeds: dict[str, int]  # data set -> how many
    methods: tuple[str, ...] = tuple(METHODS)

    def run(self, data: str, method: str, seed: int) -> dict:
        """What names a run."""
        command = f"{self.data[data]} {self.options} {METHODS[method]} --seed {seed}"
        return {"data": data, "method": method, "seed": seed, "command": command}

    def runs(self, least: int = 0) -> list[dict]:
        """All runs, of `least` seeds at least; whole seeds first: a plan cut short compares fairly."""
        return [
            self.run(data, method, seed)
            for seed in range(max(least, *self.seeds.values()))
            for data in self.data
            if seed < max(least, self.seeds[data])
            for method in self.methods
        ]


# Sizes were chosen by the accuracy of cross-entropy alone: away from where every method is right, or none is.
PLANS = {
    "cpu": Plan(
        "--depth 8 --device cpu",
        {
            "digits": "--data digits --limit 449 --epochs 12",
            "fractals": "--data fractals:100 --limit 4000 --epochs 12",
        },
        {"digits": 10, "fractals": 3},
    ),
    "gpu": Plan(
        "--depth 20 --amp bf16 --device cuda",
        {
            "digits": "--data digits --limit 449 --epochs 60",
            "fractals": "--data fractals:500 --epochs 60 --batch-size 128",
        },
        {"digits": 10, "fractals": 10},
    ),
    "h200": Plan(
        "--depth 20 --amp bf16 --device cuda",
        {"fractals": "--data fractals:200 --epochs 24 --batch-size 128"},
        {"fractals": 6},
        (BASELINE, SMOOTHING, ZIPF),
    ),
}
# Instead of any of them where benchmarks walk through everything at tiny sizes; never reported.
TINY = Plan(
    "--depth 8 --width 8 --size 16 --epochs 1 --batch-size 32 --device cpu",
    {"digits": "--data digits --limit 40"},
    {"digits": 1},
    (BASELINE, SMOOTHING, ZIPF),
)

# Running ---------------------------------------------------------------------------------------------


def run_one(run: dict, cache: Path) -> dict:
    """Train one network; returns its record."""
    args = parse_arguments(make_parser(), [*shlex.split(run["command"]), "--cache", str(cache)])
    free = {"cache", "data", "loss", "out", "preset", "resume", "seed", "skip_bad_images", "fonts"}
    with (
        tempfile.TemporaryDirectory() as out,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        args.out = Path(out)
        (result,) = train_all(args)
    accuracy = [round(epoch["test_accuracy"], 5) for epoch in result.history]
    return run | {
        "last": accuracy[-1],
        "best": max(accuracy),
        "accuracy": accuracy,  # of the test set, epoch by epoch
        "cross_entropy": round(result.history[-1]["test_cross_entropy"], 5),
        "seconds": round(sum(epoch["train_seconds"] for epoch in result.history), 1),
        "settings": {k: v for k, v in vars(args).items() if k not in free},
    }


def run_some(runs: Sequence[dict], cache: Path, jobs: int) -> Iterator[dict]:
    """The records of runs as they are done, `jobs` at a time, each job a process with one thread."""
    if jobs == 1:
        for run in runs:
            yield run_one(run, cache)
        return
    for options in {run["command"].partition(" --loss")[0]: run["command"] for run in runs}.values():
        args = parse_arguments(make_parser(), shlex.split(options))
        load_data(args.data, args.size, cache, args.limit)  # once, before all need it
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for done in as_completed([pool.submit(run_one, run, cache) for run in runs]):
            yield done.result()


def run_all(plan: Plan, path: Path, cache: Path, least: int = 0, jobs: int = 1) -> int:
    """Do the runs of a plan that have no record in the file, writing it after each; returns their number."""
    runs, records = {}, []
    if path.exists():
        records = load(path)
        runs = {r["run"]: r.pop("env") for r in records}
    here = str(1 + max(map(int, runs), default=0))
    runs[here] = {k: v for k, v in environment().items() if k not in ("others", "tiny")}
    todo = plan.runs(least)
    have = {r["command"] for r in records}
    missing = [run for run in todo if run["command"] not in have]
    print(f"{len(missing)} runs to do, {len(todo) - len(missing)} have their record in {path}")
    start = time.monotonic()
    for i, found in enumerate(run_some(missing, cache, jobs), 1):
        record = {"run": here} | found
        records.append(record)
        dump(path, runs, records)
        name = f"{record['data']}, {record['method']}, seed {record['seed']}"
        passed = time.monotonic() - start
        print(f"{i}/{len(missing)}  {name}: {100 * record['last']:.2f} %  ({passed:.0f} s)", flush=True)
    return len(missing)


# Results ---------------------------------------------------------------------------------------------

# Two-sided 95 % quantiles of Student's t for n seeds: a mean of n is known to T95[n] * deviation / sqrt(n).
T95 = dict(zip(range(2, 11), (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), strict=True))


@dataclass(frozen=True)
class Sample:
    """Values of some seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def certain(self) -> bool:
        """Is the mean's 95 % interval on one side of zero?"""
        n = len(self.values)
        return n > 1 and abs(self.mean) > T95[min(n, max(T95))] * self.deviation / math.sqrt(n)


def balanced(plan: Plan, records: Sequence[dict]) -> list[dict]:
    """The records that a table is made of.

    Only runs that are the plan's as it stands, and only seeds that every method of a data set has: all
    methods then meet the same first weights, batches and crops.
    """
    by_command = {r["command"]: r for r in records}
    chosen = []
    for data in plan.data:
        for seed in sorted({r["seed"] for r in records}):
            mine = [by_command.get(plan.run(data, method, seed)["command"]) for method in plan.methods]
            chosen += mine if all(mine) else []
    return chosen


def accuracies(records: Sequence[dict], data: str, method: str) -> dict[int, float]:
    """Percent right after the last epoch, by seed."""
    return {r["seed"]: 100 * r["last"] for r in records if (r["data"], r["method"]) == (data, method)}


def difference(values: dict[int, float], base: dict[int, float]) -> Sample:
    """One method's accuracies less another's, seed by seed."""
    return Sample(tuple(values[seed] - base[seed] for seed in values))


INTRODUCTION = (
    "Test accuracy in % after the last epoch, mean ± standard deviation over the seeds; and what it is "
    "more or less than cross-entropy's, seed by seed, as all methods start from the same weights and "
    "meet the same batches and crops."
)


def summary(plan: Plan, records: list[dict]) -> tuple[list[str], list[list[str]], str, str]:
    """Accuracy of every method, and its difference from cross-entropy, from the records of a plan.

    Returns the head and the rows of a Markdown table, what it shows, and where it comes from.
    """

    def cell(sample: Sample, form: str) -> str:
        mean = round(sample.mean, 2) + 0.0  # no -0.00
        return f"{mean:{form}}" + (f" ± {sample.deviation:.2f}" if len(sample.values) > 1 else "")

    def bold(less: Sample) -> str:
        return f"**{cell(less, '+.2f')}**" if less.certain else cell(less, "+.2f")

    head, rows = ["training loss"], {method: [method] for method in plan.methods}
    differences, over_smoothing = [], []
    for data in dict.fromkeys(r["data"] for r in records):
        found = {method: accuracies(records, data, method) for method in rows}
        base = found[BASELINE]
        head += [f"{data}, {len(base)} seed{'s' * (len(base) > 1)}", f"minus {BASELINE}"]
        for method, values in found.items():
            rows[method].append(cell(Sample(tuple(values.values())), ".2f"))
            less = difference(values, base)
            rows[method].append("" if method == BASELINE else bold(less))
            differences += [] if method == BASELINE else [less]
        less = difference(found[ZIPF], found[SMOOTHING])
        over_smoothing.append(f"{data} {bold(less)}")
    certain = [d for d in differences if d.certain]
    options = "; ".join(f"{data}: `{of_data} {plan.options}`" for data, of_data in plan.data.items())
    remarks = (
        "**Bold**: a difference that the seeds tell from 0 (95 % interval by Student's t, on these test "
        "images); none of the others can be called one. "
        f"{len(certain)} of the table's {len(differences)} are bold, "
        f"{sum(d.mean > 0 for d in certain)} of them gains; "
        f"chance alone would give about {0.05 * len(differences):.1f}. "
        f"{ZIPF}, minus label smoothing: {', '.join(over_smoothing)}."
    )
    minutes = sum(r["seconds"] for r in records) / 60
    source = f"Options of experiments.run: {options}. {len(records)} runs, {minutes:.0f} min of training."
    return head, list(rows.values()), remarks, source


def main() -> None:
    """Do the runs of a plan that have no record yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PLANS, default="cpu", help="which plan (default: cpu)")
    parser.add_argument("--seeds", type=int, default=0, metavar="N", help="at least N seeds of each data set")
    parser.add_argument("--records", type=Path, metavar="FILE", help="(default: the plan's own)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".data", metavar="FOLDER")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    args = parser.parse_args()
    if args.preset == "cpu":
        torch.set_num_threads(1)  # an accuracy must not depend on how many there are
    plan = TINY if TINY_RUN else PLANS[args.preset]
    records = args.records or FOLDER / f"{'tiny' if TINY_RUN else args.preset}.json"
    run_all(plan, records, args.cache, args.seeds, args.jobs)


if __name__ == "__main__":
    main()
