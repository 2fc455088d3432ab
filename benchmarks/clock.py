"""How time is taken: interleaved comparisons, two clocks, peak memory, ceilings.

Machines are shared and their speed drifts. A comparison takes one sample of every implementation per round,
in a new random order each round, within one process; a ratio is the median over rounds of (ours in that round
/ theirs in that round). A slow implementation runs in few of the rounds.

Clocks:
    host    perf_counter around a loop of calls: the time of a call on a CPU, the host's time on a GPU.
    device  CUDA events around eager calls that were all issued while the device still slept: neither the host
            nor the latency of a launch is in the time. Inputs rotate through up to MOST_COPIES copies that
            together exceed the L2 cache.

How a sample was taken (``how``):
    calls       by the host clock
    queued      by the device clock, the host ahead of the device throughout: device time
    events      by CUDA events from an idle device, as the call makes the host wait: includes the host's time
    host-bound  the host could not be brought ahead of the device: includes the host's time
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

# Tiny sizes, two rounds: everything runs, nothing is measured. Its records are never reported.
TINY = os.environ.get("ZIPFLS_BENCH") == "tiny"

SURE = ("calls", "queued")  # how samples are taken that hold nothing but what they say
MOST_COPIES = 256  # of the inputs; the smallest logits would need thousands


def device() -> torch.device:
    """Where benchmarks run: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def proc(name: str, pattern: str) -> str:
    """What the group of a pattern matches in a file of /proc; empty where there is none."""
    with contextlib.suppress(OSError):
        if found := re.search(pattern, Path("/proc", name).read_text()):
            return found[1]
    return ""


def processors() -> tuple[float, float]:
    """Seconds that the processors were busy with other processes so far, and seconds of all (Linux)."""
    found = proc("stat", r"cpu +((?:\d+ ?){8})") or "0 0 0 0 0"
    user, nice, system, idle, waiting, *rest = (int(x) / os.sysconf("SC_CLK_TCK") for x in found.split())
    busy = user + nice + system + sum(rest)
    return busy - time.process_time(), busy + idle + waiting


def copies(nbytes: int) -> int:
    """How many copies of the inputs to rotate through: one on a CPU; on a GPU three times its L2 of them."""
    if device().type == "cpu":
        return 1
    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20)
    return max(1, min(MOST_COPIES, -(-3 * l2 // max(1, nbytes))))


@dataclass
class Entry:
    """An implementation: a call per copy of the inputs."""

    name: str
    calls: Sequence[Callable]
    waits: bool = False  # the call makes the host wait for the device
    deep: bool = False  # one call launches more than the device's queue holds: the host need only stay ahead
    clear: Callable | None = None  # frees what an earlier call left behind, before peak memory is measured
    how: str = ""  # how samples are taken, set by the clock
    host: float = 0.0  # seconds the host takes to issue a call, as far as the device clock knows
    ahead: int = 256  # calls that the device clock issues before the device starts on them

    def turns(self, first: int, k: int) -> list[Callable]:
        """The calls ``first`` to ``first + k``, in turn over the copies of the inputs."""
        return [self.calls[i % len(self.calls)] for i in range(first, first + k)]


def issue(calls: Iterable[Callable]) -> float:
    """Seconds the host takes for the calls."""
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


class HostClock:
    """perf_counter around a loop of calls; on a GPU from an empty queue, whose draining is not timed."""

    name = "host"
    least, most = 1e-3, 200  # seconds a sample should last, calls it may take

    def ready(self, entry: Entry) -> None:
        """The first call may compile: it is not timed."""
        issue(entry.turns(0, 1))
        entry.how = "calls"

    def sample(self, entry: Entry, k: int) -> float:
        """Seconds per call, over ``k`` calls."""
        synchronize()
        total = issue(entry.turns(0, k))
        synchronize()
        return total / k


class DeviceClock:
    """CUDA events around eager calls, issued while the device sleeps so that it never waits for the host.

    The sleep follows from the host's time per call. A sleep shorter than the time to issue grows; where that
    does not help, fewer calls are issued at once, as a full queue stops the host.
    """

    name = "device"
    least, most = 1e-3, 1000
    hertz = 2e9  # of the counter that torch.cuda._sleep goes by, at most
    margin, longest = 1.5, 0.2  # the sleep over the host's time as guessed; seconds of a sleep

    def ready(self, entry: Entry) -> None:
        """Warm up, within reason; find out how long the host takes."""
        start = time.perf_counter()
        for i in (0, *range(len(entry.calls))):
            issue(entry.turns(i, 1))
            if i and time.perf_counter() - start > 0.5:
                break
        entry.host = min(self._timed(entry, i, 1)[0] for i in range(3))
        entry.how = "events" if entry.waits else "queued"

    def sample(self, entry: Entry, k: int) -> float:
        """Seconds per call, over ``k`` calls."""
        if entry.how == "events":
            return sum(self._timed(entry, i, 1)[1] for i in range(k)) / k
        total, done = 0.0, 0
        while done < k:
            seconds, n = self._ahead(entry, done, k - done)
            total, done = total + seconds, done + n
        return total / k

    def _ahead(self, entry: Entry, first: int, k: int) -> tuple[float, int]:
        """Seconds the device takes for as many of ``k`` calls as can be issued ahead of it, and how many."""
        guess = entry.host
        while True:
            n = max(1, min(k, entry.ahead, int(self.longest / (self.margin * entry.host + 1e-9))))
            _, seconds, held = self._timed(entry, first, n, 50e-6 + self.margin * entry.host * n)
            if held or entry.how == "host-bound":
                return seconds, n
            if n > 1 and entry.host > guess:  # a longer sleep did not help
                entry.ahead, entry.host = n // 2, guess
            elif entry.host < 4 * guess:
                entry.host *= self.margin
            else:
                entry.how = "host-bound"

    def _timed(self, entry: Entry, first: int, k: int, sleep: float = 0.0) -> tuple[float, float, bool]:
        """Seconds of ``k`` calls, the host's and the device's, and whether the device, which sleeps first,
        never had to wait for the host."""
        calls = entry.turns(first, k)
        begin, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        synchronize()
        before = time.perf_counter()
        begin.record()
        if sleep:
            torch.cuda._sleep(int(self.hertz * sleep))
        start.record()
        host = issue(calls)
        end.record()
        issued = time.perf_counter()
        synchronize()
        drained = time.perf_counter() - issued
        seconds = 1e-3 * start.elapsed_time(end)
        held = issued - before < 1e-3 * begin.elapsed_time(start)
        # Deep: a queue full when the device woke up, and not empty when the host is through, never ran dry.
        return host, seconds, held or (entry.deep and drained > 0.1 * seconds)


Clock = HostClock | DeviceClock


def best_clock() -> Clock:
    """The device's where there is a GPU."""
    return DeviceClock() if device().type == "cuda" else HostClock()


class ContextLost(Exception):  # noqa: N818
    """A call ended the CUDA context (an illegal access), so that this process can measure no more."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


@dataclass
class Comparison:
    """Samples in seconds per call, by round; None in rounds that an implementation did not run in."""

    samples: dict[str, list[float | None]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)  # per sample
    how: dict[str, str] = field(default_factory=dict)
    peak: dict[str, int | None] = field(default_factory=dict)  # bytes
    failed: dict[str, str] = field(default_factory=dict)  # name -> reason
    others: float = 0.0  # seconds of the processors that other processes took while rounds ran (Linux)
    total: float = 0.0  # seconds of all processors in that time

    @contextlib.contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """An implementation that raises is left out from here on, with its reason in ``failed``."""
        try:
            yield
        except Exception as error:
            line = next(iter(str(error).strip().splitlines()), "")
            reason = f"{type(error).__name__}: {line[:160]}"
            try:
                synchronize()
            except RuntimeError:  # the error of a lost context comes again with whatever is asked of it
                raise ContextLost(name, reason) from error
            self.failed[name] = reason
            self.samples.pop(name, None)

    def taken(self, name: str) -> list[float]:
        return [s for s in self.samples[name] if s is not None]

    def ratio(self, a: str, b: str) -> list[float]:
        """[median, 20 %, 80 %] of a's time over b's in the rounds both ran."""
        pairs = zip(self.samples[a], self.samples[b], strict=True)
        return quantiles([x / y for x, y in pairs if x is not None and y is not None])


def quantiles(values: Sequence[float]) -> list[float]:
    """[median, 20 % quantile, 80 % quantile]."""
    if len(values) == 1:
        return [values[0]] * 3
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return [statistics.median(values), fifths[0], fifths[3]]


def compare(
    entries: Sequence[Entry], clock: Clock, seconds: float = 2.0, most_rounds: int = 64,
    least_rounds: int = 7, memory: bool = False,
) -> Comparison:  # fmt: skip
    """Time the entries interleaved, ``seconds`` altogether as far as ``least_rounds`` of each allow.

    An entry ten times slower than the fastest gets three rounds. One that raises is left out, with its reason
    in ``failed``. ``memory``: measure the peak of one call first.
    """
    if TINY:
        seconds, most_rounds = 0.01, 2
    result, once, duration, wanted = Comparison(), {}, {}, {}
    for entry in entries:
        name = entry.name
        with result.trying(name):
            once[name], result.calls[name], duration[name] = _calls_of(entry, clock)
            result.peak[name] = peak_memory(entry) if memory else None
            result.samples[name] = []
    for name in result.samples:
        slow = once[name] > 10 * min(once[n] for n in result.samples)
        least = 3 if slow else least_rounds
        wanted[name] = min(most_rounds, max(least, int(seconds / len(result.samples) / duration[name])))
    before = processors()
    gc.collect()
    gc.disable()
    try:
        _take_rounds(result, entries, clock, wanted)
    finally:
        gc.enable()
    others, result.total = (now - then for then, now in zip(before, processors()))
    result.others = max(0.0, others)
    result.how = {entry.name: entry.how for entry in entries if entry.name in result.samples}
    return result


def _take_rounds(result: Comparison, entries: Sequence[Entry], clock: Clock, wanted: dict[str, int]) -> None:
    """Sample those that have not failed, in a new random order each round, until each has what is wanted."""
    rounds, shuffle = max(wanted.values(), default=0), random.Random(0).shuffle
    # Every 1st, 2nd, 4th, ... round, so that any two entries meet in all rounds of the slower one.
    stride = {name: 1 << max(0, (rounds // n).bit_length() - 1) for name, n in wanted.items()}
    for i in range(rounds):
        order = [entry for entry in entries if entry.name in result.samples]
        shuffle(order)
        for entry in order:
            with result.trying(entry.name):
                runs = i % stride[entry.name] == 0
                sample = clock.sample(entry, result.calls[entry.name]) if runs else None
                result.samples[entry.name].append(sample)


def _calls_of(entry: Entry, clock: Clock) -> tuple[float, int, float]:
    """Seconds of a call, calls per sample, seconds that taking a sample lasts."""
    clock.ready(entry)
    once = clock.sample(entry, 1)
    if once < 0.1 and not TINY:
        once = min(clock.sample(entry, 1) for _ in range(3))
    k = 1 if TINY else min(clock.most, max(1, math.ceil(clock.least / max(once, 1e-7))))
    start = time.perf_counter()
    clock.sample(entry, k)
    return once, k, max(once * k, time.perf_counter() - start)


def peak_memory(entry: Entry) -> int | None:
    """Bytes that one call takes at its peak beyond what was held before it; None where it cannot be told.

    On a GPU by PyTorch's allocator; on a CPU by the high-water mark of the process's resident memory (Linux).
    """
    if entry.clear:
        entry.clear()
    (call,) = entry.turns(0, 1)
    if device().type == "cuda":
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else memory freed earlier would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = int(proc("self/status", r"VmRSS:\s*(\d+) kB"))
    call()
    return max(0, int(proc("self/status", r"VmHWM:\s*(\d+) kB")) - before) * 1024


def ceilings(clock: Clock) -> Iterator[tuple[dict, Comparison, int, int]]:
    """What this machine can do at most: a large copy, and a matrix product per precision, on random data.

    (case, result, bytes, operations) each.
    """
    on_gpu = device().type == "cuda"
    nbytes = 1 << 20 if TINY else 1 << (31 if on_gpu else 27)
    n = 64 if TINY else 8192 if on_gpu else 1024
    source = torch.rand(nbytes // 4, device=device())
    target = torch.empty_like(source)
    result = compare([Entry("copy", [lambda: target.copy_(source)])], clock, seconds=0.5)
    yield {"dtype": "float32", "N": nbytes // 4}, result, 2 * nbytes, 0
    for dtype in ("float32", "bfloat16"):
        a, b = (torch.randn(n, n, device=device(), dtype=getattr(torch, dtype)) for _ in range(2))
        result = compare([Entry("product", [functools.partial(torch.matmul, a, b)])], clock, seconds=0.5)
        yield {"dtype": dtype, "N": n}, result, 0, 2 * n**3
