"""pytest-benchmark around the harness: it collects, selects and prints; ``harness.race`` takes the samples.

A benchmark is one test per case and contestant. The first of a case runs its race, all contestants
interleaved; each test then hands its own samples to pytest-benchmark through a timer that plays them back, so
that its tables show them side by side, and the records go to benchmarks/results/<device>.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

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


@pytest.fixture(scope="session", autouse=True)
def ceilings() -> None:
    """Measure the machine's ceilings before anything else, in the same run."""
    clock = harness.DeviceClock() if harness.device().type == "cuda" else harness.HostClock()
    for case, result, nbytes, flops in harness.ceilings(clock):
        harness.book().add("ceiling", case, "", clock.name, result, nbytes, flops)


@pytest.fixture
def report(benchmark) -> Callable:
    """``report(key, name, run)``: one contestant of the race ``key``, which ``run(book)`` holds once."""

    def play(key: str, name: str, run: Callable[[harness.Book], harness.Result]) -> None:
        if key not in _races:
            _races[key] = run(harness.book())
        result = _races[key]
        if name in result.failed:
            if name.startswith("zipfls_cuda"):
                pytest.fail(result.failed[name])
            pytest.skip(result.failed[name])
        samples = result.taken(name)
        benchmark.group = key
        PLAYBACK.samples = iter(samples)
        benchmark.pedantic(PLAYBACK.next_round, rounds=len(samples))

    return play
