"""Does it help? Test accuracy of every method on every data set, over several seeds.

    python -m experiments.efficacy                 typefaces: one thread, hours; what has a record is skipped
    python -m experiments.efficacy --row "label smoothing"  one row of the table once more, in minutes
    python -m experiments.efficacy --preset gpu --jobs 9    the same on larger images, for minutes on a GPU
    python -m experiments.efficacy --preset cpu    every law of the paper, on digits and fractals: an hour
    python -m experiments.efficacy --seeds 10      more seeds

Every run is one command line of experiments.run, which its record names. Records go to
benchmarks/results/efficacy/PRESET.json as runs finish, whole seeds first; benchmarks/report.py makes
the table in docs/EFFICACY.md of them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
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
from .study import Sample, Study

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

    def missing(self, records: Sequence[dict], least: int = 0) -> list[dict]:
        """The runs without a record."""
        known = {r["command"] for r in records}
        return [run for run in self.runs(least) if run["command"] not in known]

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
}
ZIPF_WEIGHTS = (0.03, 0.1, 0.3, 1.0)
TYPEFACES = {
    BASELINE: ("--loss ce",),
    SMOOTHING.split(",")[0]: tuple(f"--loss ls --label-smoothing {x}" for x in (0.05, 0.1, 0.2, 0.3)),
    ZIPF: tuple(f"--loss zipf --zipf-weight {x}" for x in ZIPF_WEIGHTS),
    "Zipf, ranks by logits": tuple(f"--loss zipf --ranking logits --zipf-weight {x}" for x in ZIPF_WEIGHTS),
    "constant": tuple(f"--loss zipf --distribution constant --zipf-weight {x}" for x in ZIPF_WEIGHTS),
    "Tf-KD, regularisation": ("--loss tfkd-reg",),  # the authors' settings: nothing is chosen
    "MaxSup": ("--loss maxsup",),
    "CS-KD": ("--loss cskd",),
}
COMPARED = BASELINE, SMOOTHING.split(",")[0], ZIPF
STUDIES = {
    "typefaces": Study(
        "--stem-stride 2 --stages 3 --depth 8 --epochs 30 --batch-size 32 --device cpu",
        "--data typefaces-validation:100:15",
        "--data typefaces:100:15",
        tuple(f"--lr {lr} --weight-decay {decay}" for lr in (0.1, 0.2, 0.4) for decay in (5e-4, 2e-3)),
        TYPEFACES,
        {
            "50 faces": ("--data typefaces:50:15", ""),
            "200 faces": ("--data typefaces:200:15", ""),
            "8 words a face": ("--data typefaces:100:8", ""),
            "30 words a face": ("--data typefaces:100:30", ""),
            "a map of 2 x 4 (4 stages)": ("--data typefaces:100:15", "--stages 4 --depth 10"),
            "a map of 1 x 2 (5 stages)": ("--data typefaces:100:15", "--stages 5 --depth 12"),
        },
        COMPARED,
        {
            "faces": {"50": "50 faces", "100": "", "200": "200 faces"},
            "training words a face": {"8": "8 words a face", "15": "", "30": "30 words a face"},
            "positions that vote": {
                "1 x 2": "a map of 1 x 2 (5 stages)",
                "2 x 4": "a map of 2 x 4 (4 stages)",
                "4 x 8": "",
            },
        },
    ),
    "gpu": Study(
        "--size 64 --width 64 --stages 4 --depth 18 --epochs 20 --batch-size 128 --amp bf16 --device cuda",
        "--data typefaces-validation:500:25",
        "--data typefaces:500:25",
        ("--lr 0.1 --weight-decay 5e-4",),
        {method: TYPEFACES[method][1:3] or TYPEFACES[method] for method in COMPARED},
        seeds=(1, 3, 0),
    ),
}
# Instead of any of them where benchmarks walk through everything at tiny sizes; never reported.
TINY = Plan(
    "--depth 8 --width 8 --size 16 --epochs 1 --batch-size 32 --device cpu",
    {"digits": "--data digits --limit 40"},
    {"digits": 1},
    (BASELINE, SMOOTHING, ZIPF),
)

RUN_KEYS = "data", "method", "seed", "command"  # what names a run

# Running ---------------------------------------------------------------------------------------------


def run_one(run: dict, place: Sequence[str] = ()) -> dict:
    """Train one network; returns its record. `place`: options that say where the data lies."""
    args = parse_arguments(make_parser(), [*shlex.split(run["command"]), *place])
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
        "calibration_error": round(result.history[-1]["test_calibration_error"], 5),
        "train_accuracy": round(result.history[-1]["train_accuracy"], 5),
        **({"data_sha256": result.digest} if result.digest else {}),
        **({} if result.probe is None else {"probe": round(result.probe, 5)}),
        "seconds": round(sum(epoch["train_seconds"] for epoch in result.history), 1),
        "settings": {k: v for k, v in vars(args).items() if k not in free},
    }


def run_some(runs: Sequence[dict], place: Sequence[str], jobs: int) -> Iterator[dict]:
    """The records of runs as they are done, `jobs` at a time, each job a process with one thread."""
    if jobs == 1:
        for run in runs:
            yield run_one(run, place)
        return
    for options in {run["command"].partition(" --loss")[0]: run["command"] for run in runs}.values():
        args = parse_arguments(make_parser(), [*shlex.split(options), *place])
        load_data(args.data, args.size, args.cache, args.limit, fonts=args.fonts)  # once, before all need it
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for done in as_completed([pool.submit(run_one, run, place) for run in runs]):
            yield done.result()


def run_all(plan: Plan | Study, path: Path, place: Sequence[str] = (), least: int = 0, jobs: int = 1) -> int:
    """Do the runs of a plan that have no record in the file, writing it after each; returns their number."""
    runs, records = {}, []
    if path.exists():
        records = load(path)
        runs = {r["run"]: r.pop("env") for r in records}
    here = str(1 + max(map(int, runs), default=0))
    runs[here] = {k: v for k, v in environment().items() if k not in ("others", "tiny")}
    count = 0
    while missing := plan.missing(records, least):  # of a study the next step's
        print(f"{len(missing)} runs to do; {path} has {len(records)}")
        start = time.monotonic()
        for i, found in enumerate(run_some(missing, place, jobs), 1):
            record = {"run": here} | found
            records.append(record)
            dump(path, runs, records)
            name = f"{record['data']}, {record['method']}, seed {record['seed']}"
            passed = time.monotonic() - start
            print(f"{i}/{len(missing)}  {name}: {100 * record['last']:.2f} %  ({passed:.0f} s)", flush=True)
        count += len(missing)
    return count


def repeat_row(study: Study, path: Path, method: str, place: Sequence[str], jobs: int) -> None:
    """Train one row of a study's table once more, and print what is found beside what is on record."""
    results = study.results(load(path) if path.exists() else []).get(method)
    if not results:
        raise SystemExit(f"{path} has no judged runs of {method!r}: the study has not come to them")
    runs = [{k: record[k] for k in (*RUN_KEYS, "setting", "options")} for record in results.values()]
    for record in run_some(runs, place, jobs):
        there = results[record["seed"]]
        found = f"{100 * record['last']:.2f} %, {100 * there['last']:.2f} on record"
        print(f"{method}, seed {record['seed']}: {found}", flush=True)


# Results ---------------------------------------------------------------------------------------------


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
    plans = PLANS | STUDIES
    add = parser.add_argument
    add("--preset", choices=plans, default="typefaces", help="which plan (default: typefaces)")
    add("--row", metavar="METHOD", help="train this row of the study's table once more")
    add("--seeds", type=int, default=0, metavar="N", help="at least N seeds of each data set")
    add("--records", type=Path, metavar="FILE", help="(default: the plan's own)")
    add("--cache", type=Path, default=ROOT / ".data", metavar="FOLDER")
    add("--fonts", nargs="+", default=(), metavar="FOLDER", help="as for experiments.run")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    args = parser.parse_args()
    if args.preset in ("cpu", "typefaces"):
        torch.set_num_threads(1)  # an accuracy must not depend on how many there are
    plan = TINY if TINY_RUN else plans[args.preset]
    records = args.records or FOLDER / f"{'tiny' if TINY_RUN else args.preset}.json"
    place = ["--cache", str(args.cache), *(["--fonts", *args.fonts] if args.fonts else [])]
    if args.row is None:
        run_all(plan, records, place, args.seeds, args.jobs)
        if isinstance(plan, Study) and args.records is None:
            from .plots import draw_study

            draw_study(plan, load(records), ROOT / "docs" / f"efficacy-{args.preset}.png")
    elif isinstance(plan, Study) and args.row in plan.methods:
        repeat_row(plan, records, args.row, place, args.jobs)
    else:
        rows = ", ".join(repr(row) for row in plan.methods) if isinstance(plan, Study) else "of a study"
        parser.error(f"argument --row: {args.row!r} is not one of {rows}")


if __name__ == "__main__":
    main()
