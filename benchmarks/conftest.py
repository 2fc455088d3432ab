"""pytest-benchmark around clock.compare: it collects, selects and prints; ``compare`` takes the samples.

A benchmark is one test per case and implementation of a file's CASES, with ``where`` (their place in the
records), ``names`` (what they compare) and ``run(records)``. The first test of a case takes all the samples,
interleaved; each test then hands its own to pytest-benchmark through a timer that plays them back. A case
with records of this code on this device is skipped.

An implementation that ends the CUDA context is put on record, and the process restarts without it.
"""

from __future__ import annotations

import functools
import os
import sys

import clock
import pytest
import records


class Playback:
    """A timer that advances by one of ``samples`` per call of ``next_round``."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def next_round(self) -> None:
        self.now += next(self.samples)


PLAYBACK = Playback()
_compared: dict[str, clock.Comparison] = {}
_lost: list[str] = []  # what ended the CUDA context


def pytest_pycollect_makeitem(collector: pytest.Module, name: str, obj) -> list[pytest.Function] | None:
    if name != "CASES":
        return None
    tests = []
    for case in obj:
        for who in case.names:
            call = lambda benchmark, case=case, who=who: play(benchmark, case, who)  # noqa: E731
            tests.append(pytest.Function.from_parent(collector, name=f"{case.where}-{who}", callobj=call))
            tests[-1].add_marker(pytest.mark.benchmark(timer=PLAYBACK, disable_gc=False))
    return tests


def pytest_report_header() -> str:
    ours = records.of_this_run()
    return f"zipfls_cuda benchmarks on {ours.environment['device']}; records: {ours.path}"


def pytest_benchmark_generate_machine_info() -> dict:
    """What pytest-benchmark tells about the machine: what the records tell (its own way takes seconds)."""
    return records.of_this_run().environment


def pytest_unconfigure() -> None:
    """Start anew where the CUDA context is lost."""
    if _lost:
        sys.stdout.flush()
        os.execv(sys.executable, sys.orig_argv)


@functools.cache
def with_ceilings() -> records.Records:
    """The records of this run, with the ceilings, which are measured before anything else."""
    ours, timer = records.of_this_run(), clock.best_clock()
    for case, *measured in clock.ceilings(timer):
        ours.add(records.Where(records.CEILING, case, "", timer.name), *measured)
    return ours


def play(benchmark, case, name: str) -> None:
    """One implementation of a comparison that is made once."""
    key, known = str(case.where), records.of_this_run().known(case.where)
    if key not in _compared:
        if known.keys() >= set(case.names):
            _refuse(name, known[name])
            pytest.skip("measured already")
        try:
            _compared[key] = case.run(with_ceilings())
        except clock.ContextLost as lost:
            records.of_this_run().fail(case.where, lost.name, lost.reason, lost=True)
            _lost.append(str(lost))
            pytest.exit(f"the CUDA context is lost, by {lost}; starting anew without it")
    result = _compared[key]
    _refuse(name, result.failed.get(name, ""))
    samples = result.taken(name)
    benchmark.group = key
    PLAYBACK.samples = iter(samples)
    benchmark.pedantic(PLAYBACK.next_round, rounds=len(samples))


def _refuse(name: str, reason: str) -> None:
    """An implementation without a figure: ours fails, a peer is skipped."""
    if reason:
        (pytest.fail if name.startswith("zipfls_cuda") else pytest.skip)(reason)
