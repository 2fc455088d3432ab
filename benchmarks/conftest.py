"""pytest-benchmark around the harness: it collects, selects and prints; ``harness.race`` takes the samples.

A benchmark is one test per case and contestant. The first of a case runs its race, all contestants
interleaved; each test then hands its own samples to pytest-benchmark through a timer that plays them back, so
that its tables show them side by side, and the records go to benchmarks/results/<device>.json. What has a
record of this code on this device is skipped (harness.Book: ZIPFLS_BENCH_AGAIN=all measures it again).

A contestant that ends the CUDA context is put on record, and the process starts itself anew: it goes on with
what has no record, without that contestant.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator

import baselines
import harness
import pytest


class Playback:
    """A timer that advances by one recorded sample per call of ``next_round``."""

    def __init__(self):
        self.now, self.samples = 0.0, iter(())

    def __call__(self) -> float:
        return self.now

    def next_round(self) -> None:
        self.now += next(self.samples)


PLAYBACK = Playback()
_races: dict[str, harness.Result] = {}
_lost: list[str] = []  # what ended the CUDA context


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=PLAYBACK, disable_gc=False))


def pytest_report_header() -> str:
    return f"zipfls_cuda benchmarks on {harness.book().environment['device']}; records: {harness.book().path}"


def pytest_benchmark_generate_machine_info() -> dict:
    """What pytest-benchmark tells about the machine: what the records tell (its own way takes seconds)."""
    return harness.book().environment


def pytest_benchmark_generate_commit_info() -> dict:
    return {"id": harness.book().environment["commit"], "dirty": harness.book().environment["dirty"]}


def pytest_unconfigure() -> None:
    """Start anew where the CUDA context is lost; what this run measured is not measured again."""
    if _lost:
        sys.stdout.flush()
        again = {"ZIPFLS_BENCH_AGAIN": str(harness.book().since)}
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **again})


@pytest.fixture(scope="session")
def machine() -> None:
    """Note which peers are absent; measure the ceilings before anything else in the same run."""
    book = harness.book()
    for name, reason in baselines.absent(harness.device().type).items():
        book.fact(harness.Where("absent", {}), name, {"reason": reason})
    clock = harness.DeviceClock() if harness.device().type == "cuda" else harness.HostClock()
    for case, result, nbytes, flops in harness.ceilings(clock):
        book.add("ceiling", case, "", clock.name, result, nbytes, flops)


@pytest.fixture
def fact(benchmark, request) -> Callable:
    """``fact(where, name, count)``: put on record what ``count()`` finds of a contestant."""

    def play(where: harness.Where, name: str, count: Callable[[], dict]) -> None:
        _skip_known(where, [name], name)
        request.getfixturevalue("machine")
        book, result = harness.book(), harness.Result()
        with _ending(), book.noting(where), result.trying(name):
            book.fact(where, name, benchmark.pedantic(count))
        if name in result.failed:
            book.fail(where, name, result.failed[name])
            _refuse(name, result.failed[name])

    return play


@pytest.fixture
def report(benchmark, request) -> Callable:
    """``report(where, names, name, run)``: one contestant of a race that ``run(book)`` holds once."""

    def play(
        where: harness.Where, names: list[str], name: str, run: Callable[[harness.Book], harness.Result]
    ) -> None:
        key = " ".join(str(x) for x in (where.bench, *where.case.values(), where.mode, where.clock) if x)
        if key not in _races:
            _skip_known(where, names, name)
            request.getfixturevalue("machine")
            with _ending():
                _races[key] = run(harness.book())
        result = _races[key]
        _refuse(name, result.failed.get(name, ""))
        samples = result.taken(name)
        benchmark.group = key
        PLAYBACK.samples = iter(samples)
        benchmark.pedantic(PLAYBACK.next_round, rounds=len(samples))

    return play


def _skip_known(where: harness.Where, names: list[str], name: str) -> None:
    """Skip what is on record; what failed there fails again."""
    if harness.book().measured(where, names):
        _refuse(name, harness.book().reason(where, name))
        pytest.skip("measured already")


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """End the session where the CUDA context is lost."""
    try:
        yield
    except harness.ContextLost as lost:
        _lost.append(str(lost))
        pytest.exit(f"the CUDA context is lost, by {lost}; starting anew without it")


def _refuse(name: str, reason: str) -> None:
    """A contestant without a figure: ours fails, a peer is skipped."""
    if reason and name.startswith("zipfls_cuda"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
