"""A study in three steps: tune the baseline, choose every method's setting, then judge once.

Options and settings are chosen by the mean accuracy on validation words over the first seeds; test words are
met by the chosen settings alone. Each step's runs follow from the records of the steps before, so a study
that was cut short goes on, and its records say how it came to its table.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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
    def reach(self) -> float:
        """Half the length of the mean's 95 % interval, by Student's t."""
        n = len(self.values)
        return T95[min(n, max(T95))] * self.deviation / math.sqrt(n) if n > 1 else math.inf

    @property
    def certain(self) -> bool:
        """Is the mean's 95 % interval on one side of zero?"""
        return abs(self.mean) > self.reach


@dataclass(frozen=True)
class Study:
    """What is tried, and on what."""

    options: str  # of every run
    validation: str  # data on which settings are chosen
    test: str  # data on which they are judged
    baselines: tuple[str, ...]  # options tried for the baseline, and used for all methods then
    methods: dict[str, tuple[str, ...]]  # method -> the settings tried; the first method is the baseline
    conditions: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> its data, its options
    compared: tuple[str, ...] = ()  # the methods that meet the other conditions
    # What varies between conditions -> its values in order, with the conditions; "": the test's own.
    scales: dict[str, dict[str, str]] = field(default_factory=dict)
    seeds: tuple[int, int, int] = (2, 5, 3)  # to choose, to judge, in each other condition at first

    @property
    def baseline(self) -> str:
        return next(iter(self.methods))

    def run(self, step: str, data: str, options: str, method: str, setting: str, seed: int) -> dict:
        """What names a run; `data` is the step, or the condition."""
        command = f"{data} {self.options} {options} {setting} --seed {seed}"
        return {"data": step, "method": method, "setting": setting, "options": options, "seed": seed} | {
            "command": command
        }

    def steps(self, records: Sequence[dict]) -> Iterable[list[dict]]:
        """The runs of each step, as long as the records of the steps before have all that they follow from.

        Seeds come first in every step: one that is cut short compares fairly.
        """
        known = {r["command"]: r for r in records}
        choose, judge, elsewhere = self.seeds
        tuning = [  # none where there is nothing to choose from, nor below
            self.run("tuning", self.validation, options, self.baseline, setting, seed)
            for seed in range(choose)
            for options in self.baselines
            for setting in self.methods[self.baseline][:1]
            if self.baselines[1:]
        ]
        yield tuning
        options = best(tuning, known, "options") if tuning else self.baselines[0]
        if not options:
            return
        choices = [
            self.run("choice", self.validation, options, method, setting, seed)
            for seed in range(choose)
            for method, settings in self.methods.items()
            for setting in settings
            if settings[1:]
        ]
        yield choices
        chosen = {}
        for method, settings in self.methods.items():
            tried = [run for run in choices if run["method"] == method]
            chosen[method] = best(tried, known, "setting") if tried else settings[0]
            if not chosen[method]:
                return
        yield [
            self.run("test", self.test, options, method, setting, seed)
            for seed in range(judge)
            for method, setting in chosen.items()
        ]
        others = [
            self.run(name, data, f"{options} {more}".strip(), method, chosen[method], seed)
            for seed in range(max(elsewhere, judge))
            for name, (data, more) in self.conditions.items()
            for method in self.compared
        ]
        first = [run for run in others if run["seed"] < elsewhere]
        yield first
        # Among so many comparisons chance shows something: where one does, the other seeds are asked too.
        shown = [name for name in self.conditions if shows(first, known, name, self.compared)]
        yield [run for run in others if run["seed"] >= elsewhere and run["data"] in shown]

    def missing(self, records: Sequence[dict], least: int = 0) -> list[dict]:
        """The next runs without a record; `least` seeds at least are judged."""
        if least > self.seeds[1]:
            return dataclasses.replace(self, seeds=(self.seeds[0], least, self.seeds[2])).missing(records)
        known = {r["command"] for r in records}
        for runs in self.steps(records):
            if todo := [run for run in runs if run["command"] not in known]:
                return todo
        return []

    def results(self, records: Sequence[dict], step: str = "test") -> dict[str, dict[int, dict]]:
        """The records of one step by method and seed: of the seeds that every method has."""
        known = {r["command"]: r for r in records}
        runs = [run for runs in self.steps(records) for run in runs if run["data"] == step]
        found: dict[str, dict[int, dict]] = {run["method"]: {} for run in runs}
        for run in runs:
            if run["command"] in known:
                found[run["method"]][run["seed"]] = known[run["command"]]
        common = set.intersection(*(set(seeds) for seeds in found.values())) if found else set()
        return {method: {s: of[s] for s in sorted(common)} for method, of in found.items() if common}


def best(runs: Sequence[dict], known: dict[str, dict], name: str) -> str:
    """The first value of `name` whose runs were right most often; empty if a record is missing."""
    right: dict[str, list[float]] = {}
    for run in runs:
        if run["command"] not in known:
            return ""
        right.setdefault(run[name], []).append(known[run["command"]]["last"])
    return max(right, key=lambda value: statistics.mean(right[value]))


def shows(runs: Sequence[dict], known: dict[str, dict], condition: str, methods: Sequence[str]) -> bool:
    """Do the runs under a condition tell some method from the first? False while a record is missing."""
    of: dict[str, dict[int, dict]] = {method: {} for method in methods}
    for run in (run for run in runs if run["data"] == condition):
        if run["command"] not in known:
            return False
        of[run["method"]][run["seed"]] = known[run["command"]]
    return any(difference(of[method], of[methods[0]]).certain for method in methods[1:])


def column(of: dict[int, dict], name: str, scale: float = 1) -> Sample:
    """One number of the records of some seeds."""
    return Sample(tuple(scale * record[name] for record in of.values()))


def difference(of: dict[int, dict], base: dict[int, dict], name: str = "last") -> Sample:
    """Percent right of one method less another's, seed by seed."""
    return Sample(tuple(100 * (record[name] - base[seed][name]) for seed, record in of.items()))


def interval(sample: Sample) -> str:
    """A mean difference with its 95 % interval, bold where that is on one side of zero."""
    text = f"{sample.mean:+.2f}" + (f" ± {sample.reach:.2f}" if len(sample.values) > 1 else "")
    return f"**{text}**" if sample.certain else text


def tried(study: Study, records: Sequence[dict]) -> list[str]:
    """What was tried on validation words, and how often it was right: a line of Markdown a method."""
    known = {r["command"]: r for r in records}
    right: dict[str, dict[str, list[float]]] = {}
    for run in (run for runs in study.steps(records) for run in runs if run["data"] in ("tuning", "choice")):
        if run["command"] in known:
            what = run["options" if run["data"] == "tuning" else "setting"]
            right.setdefault(run["method"], {}).setdefault(what, []).append(known[run["command"]]["last"])
    lines = []
    for method, of in right.items():
        means = {what: statistics.mean(values) for what, values in of.items()}
        cells = [f"`{what}` {100 * mean:.2f}" for what, mean in means.items()]
        lines.append(f"- {method}: {', '.join(cells)}")
    if lines:
        lines[:0] = ["", f"Tried on validation words, % right, mean of {study.seeds[0]} seeds:", ""]
    return lines


def tables(study: Study, records: Sequence[dict]) -> list[str]:
    """What was judged, and what happened under other conditions: lines of Markdown, none without records."""
    results = study.results(records)
    if not results:
        return []
    base = results[study.baseline]
    lines = [
        f"Judged on test words, {len(base)} seeds: mean ± standard error; differences from {study.baseline} "
        "seed by seed, with their 95 % interval by Student's t, **bold** where it is on one side of zero. "
        "Training: on the distorted words, while they are learnt. Probe: a logistic regression on the "
        "features, for 50 faces that the network was not trained on.",
        "",
        f"| training loss | setting | accuracy, % | minus {study.baseline} | NLL | ECE, % | training, % "
        f"| probe, % | minus {study.baseline} |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    reaches = []
    for method, of in results.items():
        right = column(of, "last", 100)
        less = difference(of, base)
        reaches += [] if method == study.baseline else [less.reach]
        cells = [
            method,
            f"`{next(iter(of.values()))['setting']}`",
            f"{right.mean:.2f} ± {right.deviation / math.sqrt(len(right.values)):.2f}",
            "" if method == study.baseline else interval(less),
            f"{column(of, 'cross_entropy').mean:.3f}",
            f"{column(of, 'calibration_error', 100).mean:.1f}",
            f"{column(of, 'train_accuracy', 100).mean:.1f}",
            f"{column(of, 'probe', 100).mean:.2f}",
            "" if method == study.baseline else interval(difference(of, base, "probe")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if len(base) > 1 and reaches:
        lines += ["", f"The intervals reach {min(reaches):.2f} to {max(reaches):.2f} points: what is smaller"]
        lines[-1] += f" {len(base)} seeds cannot resolve."
    rows = []
    for name in study.conditions:
        if results := study.results(records, name):
            of_base = results[study.baseline]
            cells = [name, f"{len(of_base)}", f"{column(of_base, 'last', 100).mean:.2f}"]
            cells += [interval(difference(of, of_base)) for of in list(results.values())[1:]]
            rows.append(f"| {' | '.join(cells)} |")
    if rows:
        head = [
            "condition",
            "seeds",
            study.baseline,
            *(f"{method}, minus that" for method in study.compared[1:]),
        ]
        lines += ["", f"| {' | '.join(head)} |", "| --- " + "| ---: " * (len(head) - 1) + "|", *rows]
    return lines + tried(study, records)
