"""Does it help? Test accuracy of every method on every data set, over several seeds.

    python benchmarks/efficacy.py                  what a CPU can do: one thread, about an hour
    python benchmarks/efficacy.py --preset gpu     the larger plan: all fractals, more epochs and seeds, bf16
    python benchmarks/efficacy.py --seeds 0,1,2,3  more seeds; a run that has its record is skipped

Every run is one command line of examples/train.py, which its record names. Records go to
benchmarks/results/efficacy/PRESET.json as runs finish, whole seeds first; benchmarks/report.py makes the
README's table of them.
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
from dataclasses import dataclass
from pathlib import Path

import harness
import torch

sys.path.append(str(harness.ROOT / "examples"))

import train

FOLDER = harness.RESULTS / "efficacy"

BASELINE = "cross-entropy"
METHODS = {  # what is compared, with its options; the laws of the paper's Table 6 come after Zipf's
    BASELINE: "--loss ce",
    "label smoothing, 0.1": "--loss ls --label-smoothing 0.1",
    "Zipf, ranks by dense votes": "--loss zipf --zipf-weight 0.1",
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
    seeds: tuple[int, ...]

    def runs(self, seeds: Sequence[int] | None = None) -> Iterator[dict]:
        """What names each run, whole seeds first: a plan cut short still compares like with like."""
        for seed in self.seeds if seeds is None else seeds:
            for data, of_data in self.data.items():
                for method, of_method in METHODS.items():
                    command = f"{of_data} {self.options} {of_method} --seed {seed}"
                    yield {"data": data, "method": method, "seed": seed, "command": command}


# Sizes were chosen by the accuracy of cross-entropy alone: away from where every method is right, or none is.
PLANS = {
    "cpu": Plan(
        "--depth 8 --device cpu",
        {
            "digits": "--data digits --limit 449 --epochs 12",
            "fractals": "--data fractals:100 --limit 4000 --epochs 12",
        },
        (0, 1, 2),
    ),
    "gpu": Plan(
        "--depth 20 --amp bf16",
        {
            "digits": "--data digits --limit 449 --epochs 60",
            "fractals": "--data fractals:500 --epochs 60 --batch-size 128",
        },
        tuple(range(10)),
    ),
}

# Running ---------------------------------------------------------------------------------------------


def run_one(run: dict, cache: Path) -> dict:
    """Train one network; returns its record."""
    options = shlex.split(run["command"])
    settings = vars(train.parse_arguments(train.make_parser(), options))
    free = {"cache", "data", "loss", "out", "preset", "resume", "seed"}
    with (
        tempfile.TemporaryDirectory() as out,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        (result,) = train.main([*options, "--cache", str(cache), "--out", out])
    accuracy = [round(epoch["test_accuracy"], 5) for epoch in result.history]
    return run | {
        "last": accuracy[-1],
        "best": max(accuracy),
        "accuracy": accuracy,  # of the test set, epoch by epoch
        "cross_entropy": round(result.history[-1]["test_cross_entropy"], 5),
        "seconds": round(sum(epoch["train_seconds"] for epoch in result.history), 1),
        "settings": {k: v for k, v in settings.items() if k not in free},
    }


def run_all(plan: Plan, path: Path, cache: Path, seeds: Sequence[int] | None = None) -> int:
    """Do the runs of a plan that have no record in the file, writing it after each; returns their number."""
    runs, records = {}, []
    if path.exists():
        records = harness.load(path)
        runs = {r["run"]: r.pop("env") for r in records}
    here = str(1 + max(map(int, runs), default=0))
    runs[here] = {k: v for k, v in harness.environment().items() if k not in ("others", "tiny")}
    todo = list(plan.runs(seeds))
    have = {r["command"] for r in records}
    missing = [run for run in todo if run["command"] not in have]
    print(f"{len(missing)} runs to do, {len(todo) - len(missing)} have their record in {path}")
    for i, run in enumerate(missing, 1):
        start = time.monotonic()
        record = {"run": here} | run_one(run, cache)
        records.append(record)
        harness.dump(path, runs, records)
        name = f"{run['data']}, {run['method']}, seed {run['seed']}"
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


def accuracies(plan: Plan, records: Sequence[dict]) -> dict[str, dict[str, dict[int, float]]]:
    """Percent right after the last epoch by data set, method and seed.

    Only runs that are the plan's as it stands, and only seeds that every method of a data set has: all
    methods then meet the same first weights, batches and crops.
    """
    seeds = sorted({r["seed"] for r in records})
    last = {r["command"]: 100 * r["last"] for r in records}
    found = {data: {method: {} for method in METHODS} for data in plan.data}
    for seed in seeds:
        for data in plan.data:
            mine = [run for run in plan.runs([seed]) if run["data"] == data]
            if all(run["command"] in last for run in mine):
                for run in mine:
                    found[data][run["method"]][seed] = last[run["command"]]
    return found


def difference(values: dict[int, float], base: dict[int, float]) -> Sample:
    """One method's values less another's, seed by seed."""
    return Sample(tuple(values[seed] - base[seed] for seed in values))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PLANS, default="cpu", help="which plan (default: cpu)")
    parser.add_argument("--seeds", type=train.seed_list, metavar="LIST", help="other seeds than the plan's")
    parser.add_argument("--records", type=Path, metavar="FILE", help="(default: the plan's own)")
    parser.add_argument("--cache", type=Path, default=harness.ROOT / ".data", metavar="FOLDER")
    args = parser.parse_args()
    if args.preset == "cpu":
        torch.set_num_threads(1)  # an accuracy must not depend on how many there are
    run_all(PLANS[args.preset], args.records or FOLDER / f"{args.preset}.json", args.cache, args.seeds)


if __name__ == "__main__":
    main()
