"""How time is taken: races of interleaved contestants, two clocks, peak memory, ceilings, records.

The machines these run on are shared and their speed drifts, so nothing is measured alone. A *race* takes one
sample of every contestant per round, in a new random order each round, within one process; a ratio is the
median over rounds of (ours in that round / theirs in that round). A slow contestant sits out most rounds.

Clocks:
    host    perf_counter around a loop of calls: all there is on a CPU; on a GPU the time the host is busy.
    device  CUDA events around eager calls that were all issued while the device still slept, so that neither
            the host nor the latency of a launch is in the time. Inputs rotate through copies that together
            exceed the L2 cache, as a training step would leave it, as far as MOST_COPIES reach.

How a sample was taken (``how``):
    calls       the host clock's
    queued      the device clock's, the host ahead of the device throughout: device time
    events      by CUDA events from an idle device, as the call makes the host wait: includes the host's time
    host-bound  the host could not be brought ahead of the device: includes the host's time

A record is one contestant in one race (fields: RECORD; ``facts`` hold what was counted, not timed). A file of
records holds the environments of its runs (fields: ENVIRONMENT) once; ``load`` joins the two.

An illegal access ends a CUDA context and all that would come after it in the process: see ``ContextLost``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zipfls_cuda import ops

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

# Tiny sizes, two rounds: walks through everything and measures nothing. Its records are never reported.
TINY = os.environ.get("ZIPFLS_BENCH") == "tiny"

# A run on a CPU that has taken so many seconds hurries, so that a busy machine does not stretch it forever.
START, PATIENCE = time.monotonic(), 210

SURE = ("calls", "queued")  # how samples are taken that hold nothing but what they say
MOST_COPIES = 256  # of the inputs; the smallest logits would need thousands

ENVIRONMENT = (
    "device", "kind", "cpu", "threads", "driver", "clocks", "memory", "l2", "arch", "python", "torch", "cuda",
    "triton", "compiler", "build", "backends", "commit", "dirty", "source", "date", "others", "tiny",
)  # fmt: skip
RECORD = (
    "run", "bench", "case", "mode", "clock", "how", "name", "median", "p20", "p80", "rounds", "calls",
    "bytes", "flops", "peak", "ratio",
)  # fmt: skip


# Environment ---------------------------------------------------------------------------------------


def device() -> torch.device:
    """Where benchmarks run: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _output(*command: str) -> str:
    """First line a command prints; empty if it cannot run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return " ".join(re.sub(r"\((R|TM)\)", "", found[1]).split())
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _source_digest() -> str:
    """Digest of the package's sources and of how they are built: tells whether a record is of this code."""
    digest = hashlib.sha256()
    for folder in ("zipfls_cuda", "csrc"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    digest.update((ROOT / "setup.py").read_bytes())
    return digest.hexdigest()[:12]


def environment() -> dict[str, object]:
    """Everything about this machine and this code that a figure depends on (fields: ENVIRONMENT)."""
    on_gpu = device().type == "cuda"
    gpu = torch.cuda.get_device_properties(0) if on_gpu else None
    state = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    smi = _output("nvidia-smi", f"--query-gpu={state}", "--format=csv,noheader") if on_gpu else ""
    mhz = re.search(r"cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo"))
    changed = _output("git", "status", "--porcelain", "--", "zipfls_cuda", "csrc", "setup.py")
    build = ops.build_info()
    values = {
        "device": gpu.name if on_gpu else _cpu_model(),
        "kind": device().type,
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "driver": smi.split(",")[0],
        "clocks": ", ".join(x.strip() for x in smi.split(",")[1:])
        or (f"{float(mhz[1]):.0f} MHz" if mhz else ""),
        "memory": gpu.total_memory if on_gpu else _memory_total(),
        "l2": getattr(gpu, "L2_cache_size", 0) if on_gpu else 0,
        "arch": f"sm_{gpu.major}{gpu.minor}" if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": _version("triton"),
        "compiler": str(build.get("compiler", "")) or _output("g++", "--version"),
        "build": {k: v for k, v in build.items() if k != "compiler"},
        "backends": list(ops.backends()),
        "commit": _output("git", "rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": bool(changed),
        "source": _source_digest(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "others": 0.0,  # Book.write puts in what it saw
        "tiny": TINY,
    }
    assert tuple(values) == ENVIRONMENT
    return values


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _memory_total() -> int:
    found = re.search(r"MemTotal:\s*(\d+) kB", _read("/proc/meminfo"))
    return int(found[1]) * 1024 if found else 0


class Neighbours:
    """What share of the machine's processors other processes took while races ran (Linux)."""

    def __init__(self):
        self.others = self.total = 0.0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Count a stretch of time."""
        start = self._now()
        yield
        busy, total, own = (b - a for a, b in zip(start, self._now()))
        self.others += max(0.0, busy - own)
        self.total += total

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Busy and total seconds of all processors, and of this process."""
        first = _read("/proc/stat").split("\n")[0].split()[1:9]
        ticks = [int(x) / os.sysconf("SC_CLK_TCK") for x in first] or [0.0] * 5
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks), time.process_time()

    def share(self) -> float:
        return round(self.others / self.total, 3) if self.total > 0 else 0.0


NEIGHBOURS = Neighbours()


def slug(text: str) -> str:
    """A file name from a device's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# Clocks --------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A contestant: one call per copy of the inputs; ``prepare`` makes, untimed, what the call then takes."""

    name: str
    calls: Sequence[Callable]
    prepare: Sequence[Callable] | None = None
    waits: bool = False  # the call makes the host wait for the device
    deep: bool = False  # one call launches more than the device's queue holds: the host need only stay ahead
    clear: Callable | None = None  # frees what an earlier call left behind, before peak memory is measured
    how: str = ""  # how samples are taken, set by the clock
    host: float = 0.0  # seconds the host takes to issue a call, as far as the device clock knows
    ahead: int = 0  # calls that the device clock issues before the device starts on them

    def states(self, first: int, k: int) -> list[tuple]:
        """What the calls ``first`` to ``first + k`` take."""
        n = len(self.calls)
        return [(self.prepare[i % n](),) if self.prepare else () for i in range(first, first + k)]

    def issue(self, first: int, states: list[tuple]) -> None:
        """The calls from ``first`` on, in turn over the copies of the inputs."""
        n = len(self.calls)
        for i, state in enumerate(states, first):
            self.calls[i % n](*state)


class HostClock:
    """perf_counter around a loop of calls; on a GPU from an empty queue, whose draining is not timed."""

    name = "host"
    least, most = 1e-3, 200  # seconds a sample should last, calls it may take

    def ready(self, entry: Entry) -> None:
        entry.how = "calls"

    def sample(self, entry: Entry, k: int) -> float:
        """Seconds per call, over ``k`` calls."""
        n = len(entry.calls)
        synchronize()
        if entry.prepare is None:
            calls = [entry.calls[i % n] for i in range(k)]
            start = time.perf_counter()
            for call in calls:
                call()
            total = time.perf_counter() - start
        else:
            total = 0.0
            for i in range(k):
                state = entry.prepare[i % n]()
                synchronize()
                start = time.perf_counter()
                entry.calls[i % n](state)
                total += time.perf_counter() - start
        synchronize()
        return total / k


class DeviceClock:
    """CUDA events around eager calls, issued while the device sleeps so that it never waits for the host.

    The sleep comes from the host's time per call. Where it turns out too short (measured: the sleep against
    the host's time to issue), it grows; where that does not help fewer calls are issued at once, as a full
    queue stops the host. A replay of a captured graph would need no sleep, but times what a captured call has
    to make anew where eager calls keep it.
    """

    name = "device"
    least, most = 1e-3, 1000
    at_once, prepared = 256, 16  # calls issued at once; with prepared states, which take memory
    hertz = 2e9  # of the counter that torch.cuda._sleep goes by, at most
    margin, longest = 1.5, 0.2  # the sleep over the host's time as guessed; seconds of a sleep

    def ready(self, entry: Entry) -> None:
        """Warm up, within reason; find out how long the host takes."""
        start = time.perf_counter()
        entry.issue(0, entry.states(0, 1))
        for i in range(len(entry.calls)):
            entry.issue(i, entry.states(i, 1))
            if time.perf_counter() - start > 0.5:
                break
        taken = []
        for i in range(3):
            states = entry.states(i, 1)
            synchronize()
            start = time.perf_counter()
            entry.issue(i, states)
            taken.append(time.perf_counter() - start)
        synchronize()
        entry.host = min(taken)
        entry.ahead = self.prepared if entry.prepare else self.at_once
        entry.how = "events" if entry.waits else "queued"

    def sample(self, entry: Entry, k: int) -> float:
        """Seconds per call, over ``k`` calls."""
        if entry.how == "events":
            return self._from_idle(entry, k)
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
            seconds, held = self._queued(entry, first, n)
            if held or entry.how == "host-bound":
                return seconds, n
            if n > 1 and entry.host > guess:  # a longer sleep did not help
                entry.ahead, entry.host = n // 2, guess
            elif entry.host < 4 * guess:
                entry.host *= self.margin
            else:
                entry.how = "host-bound"

    def _queued(self, entry: Entry, first: int, k: int) -> tuple[float, bool]:
        """Seconds the device takes for ``k`` calls, and whether it never had to wait for the host."""
        states = entry.states(first, k)
        begin, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        synchronize()
        before = time.perf_counter()
        begin.record()
        torch.cuda._sleep(int(self.hertz * (50e-6 + self.margin * entry.host * k)))
        start.record()
        entry.issue(first, states)
        end.record()
        issued = time.perf_counter()
        synchronize()
        drained = time.perf_counter() - issued
        seconds = 1e-3 * start.elapsed_time(end)
        held = issued - before < 1e-3 * begin.elapsed_time(start)
        # Deep: a queue full when the device woke up, and not empty when the host is through, never ran dry.
        return seconds, held or (entry.deep and drained > 0.1 * seconds)

    @staticmethod
    def _from_idle(entry: Entry, k: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        total = 0.0
        for i in range(k):
            states = entry.states(i, 1)
            synchronize()
            start.record()
            entry.issue(i, states)
            end.record()
            synchronize()
            total += 1e-3 * start.elapsed_time(end)
        return total / k


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copies(nbytes: int) -> int:
    """How many copies of the inputs to rotate through: one on a CPU; on a GPU three times its L2 of them."""
    if device().type == "cpu":
        return 1
    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20)
    return max(1, min(MOST_COPIES, -(-3 * l2 // max(1, nbytes))))


# Races ---------------------------------------------------------------------------------------------


class ContextLost(Exception):  # noqa: N818
    """A contestant ended the CUDA context (an illegal access), so that this process can measure no more."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def context_lost() -> bool:
    """Whether the CUDA context is beyond use: its error comes again with whatever is asked of it."""
    try:
        synchronize()
    except RuntimeError:
        return True
    return False


def reason_of(error: Exception) -> str:
    """An exception in a line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


@dataclass
class Result:
    """A race's samples, seconds per call by round; None where a contestant sat out."""

    samples: dict[str, list[float | None]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)  # per sample
    how: dict[str, str] = field(default_factory=dict)
    peak: dict[str, int | None] = field(default_factory=dict)  # bytes
    failed: dict[str, str] = field(default_factory=dict)  # name -> reason

    @contextlib.contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """A contestant that raises is out of the race, with its reason in ``failed``."""
        try:
            yield
        except Exception as error:
            reason = reason_of(error)
            if context_lost():
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


def race(
    entries: Sequence[Entry],
    clock: HostClock | DeviceClock,
    *,
    seconds: float = 2.0,
    least_rounds: int = 7,
    most_rounds: int = 64,
    memory: bool = False,
) -> Result:
    """Time the contestants interleaved, ``seconds`` altogether as far as ``least_rounds`` of each allow.

    A contestant ten times slower than the fastest gets three rounds: precision matters elsewhere. One that
    raises is left out, with its reason in ``failed``. ``memory``: measure the peak of one call first.
    """
    if TINY:
        seconds, least_rounds, most_rounds = 0.01, 2, 2
    elif device().type == "cpu" and time.monotonic() - START > PATIENCE:
        seconds, least_rounds = seconds / 4, 5
    result, running, share = Result(), [], {}
    for entry in entries:
        with result.trying(entry.name):
            clock.ready(entry)
            once = clock.sample(entry, 1)
            if once < 0.1 and not TINY:
                once = min(clock.sample(entry, 1) for _ in range(3))
            k = 1 if TINY else min(clock.most, max(1, math.ceil(clock.least / max(once, 1e-7))))
            start = time.perf_counter()
            clock.sample(entry, k)
            share[entry.name] = (k, once, max(once * k, time.perf_counter() - start))
            result.peak[entry.name] = peak_memory(entry) if memory else None
            result.calls[entry.name] = k
            result.samples[entry.name] = []
            running.append(entry)
    if not running:
        return result
    budget = seconds / len(running)
    fastest = min(once for _, once, _ in share.values())
    wanted = {}
    for name, (_, once, duration) in share.items():
        least = 3 if once > 10 * fastest else least_rounds
        wanted[name] = min(most_rounds, max(least, int(budget / duration)))
    rounds = max(wanted.values())
    # Every 1st, 2nd, 4th, ... round, so that any two contestants meet in all rounds of the slower one.
    stride = {name: 1 << max(0, (rounds // n).bit_length() - 1) for name, n in wanted.items()}
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        with NEIGHBOURS.watch():
            for i in range(rounds):
                order = [entry for entry in running if entry.name not in result.failed]
                shuffle(order)
                for entry in order:
                    runs = i % stride[entry.name] == 0
                    with result.trying(entry.name):
                        sample = clock.sample(entry, share[entry.name][0]) if runs else None
                        result.samples[entry.name].append(sample)
    finally:
        gc.enable()
    result.how = {entry.name: entry.how for entry in running}
    return result


# Peak memory ---------------------------------------------------------------------------------------


def peak_memory(entry: Entry) -> int | None:
    """Bytes that one call takes at its peak beyond what was held before it; None where it cannot be told.

    On a GPU by PyTorch's allocator; on a CPU by the high-water mark of the process's resident memory (Linux).
    """
    if entry.clear:
        entry.clear()
    state = [entry.prepare[0]()] if entry.prepare else []
    if device().type == "cuda":
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        entry.calls[0](*state)
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else memory freed earlier would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    entry.calls[0](*state)
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", _read("/proc/self/status"))
    return int(found[1]) * 1024 if found else 0


# Ceilings ------------------------------------------------------------------------------------------


def ceilings(clock: HostClock | DeviceClock) -> list[tuple[dict, Result, int, int]]:
    """What this machine can do at most: a large copy, and a matrix product per precision, on random data.

    Returns (case, result, bytes, operations) each.
    """
    on_gpu = device().type == "cuda"
    nbytes = 1 << 20 if TINY else 1 << (31 if on_gpu else 27)
    n = 64 if TINY else 8192 if on_gpu else 1024
    found = []
    source = torch.rand(nbytes // 4, device=device())
    target = torch.empty_like(source)
    result = race([Entry("copy", [lambda: target.copy_(source)])], clock, seconds=0.5)
    found.append(({"dtype": "float32", "N": nbytes // 4}, result, 2 * nbytes, 0))
    for dtype in ("float32", *(["tf32"] if on_gpu else []), "bfloat16"):
        a, b = (torch.randn(n, n, device=device(), dtype=dtype_of(dtype)) for _ in range(2))
        with precision(dtype):
            result = race([Entry("product", [lambda a=a, b=b: a @ b])], clock, seconds=0.5)
        found.append(({"dtype": dtype, "N": n}, result, 0, 2 * n**3))
    return found


def dtype_of(name: str) -> torch.dtype:
    """A case's dtype; "tf32" is float32 whose products may round to TF32 (``precision``)."""
    return torch.float32 if name == "tf32" else getattr(torch, name)


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Allow TF32 to everyone in the block where that is the case's dtype."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32  # fp32_precision follows it; the reverse is not true
    matmul.allow_tf32 = before or dtype == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32 = before


# Records -------------------------------------------------------------------------------------------


class Where(NamedTuple):
    """A race among the records."""

    bench: str
    case: dict
    mode: str | None = None
    clock: str | None = None


PER_RUN = ("ceiling", "absent")  # records that belong to their run and go with it
FAILED = "failed "  # before the benchmark's name: facts of a contestant that could not be measured


def _where(record: dict) -> tuple:
    """What a record must share with another to stand for the same race."""
    bench = record["bench"].removeprefix(FAILED)
    run = record["run"] if bench in PER_RUN else ""
    return bench, json.dumps(record["case"], sort_keys=True), record["mode"], record["clock"], run


class Book:
    """Records of this run, written to one file per device as they come in.

    What an earlier run left in the file stays until the same contestant is measured in the same race again.
    What an earlier run measured of the same code (its ``source``) on the same device need not be measured
    again: ``measured`` tells. ZIPFLS_BENCH_AGAIN=all lets only this run's records count; a number, those
    from that run on.
    """

    def __init__(self, path: Path | None = None):
        self.environment = environment()
        name = slug(f"{'' if self.environment['kind'] == 'cuda' else 'cpu '}{self.environment['device']}")
        default = RESULTS / f"{name}.json"
        self.path = path or Path(os.environ.get("ZIPFLS_BENCH_RECORDS") or default)
        if TINY and self.path == default:
            raise ValueError("tiny records must not join real ones: set ZIPFLS_BENCH_RECORDS to another file")
        old = json.loads(self.path.read_text()) if self.path.exists() else {"runs": {}, "records": []}
        self.runs, self.old = old["runs"], old["records"]
        self.run = str(1 + max((int(r) for r in self.runs), default=0))
        self.records: list[dict] = []
        again = os.environ.get("ZIPFLS_BENCH_AGAIN", "0")
        self.since = int(self.run) if again == "all" else int(again)
        same = ("source", "device", "torch", "threads", "tiny")
        self.valid = {
            run
            for run, env in self.runs.items()
            if int(run) >= self.since and all(env[key] == self.environment[key] for key in same)
        } | {self.run}

    def race(
        self,
        where: Where,
        entries: Sequence[Entry],
        clock: HostClock | DeviceClock,
        nbytes: int = 0,
        flops: int = 0,
        ours: Sequence[str] = (),
        **options,
    ) -> Result:
        """Hold a race (``options``: race's) and record it, without those that ended a process before.

        Raises:
            ContextLost: a contestant ended the CUDA context; that is on record.
        """
        out = {entry.name: self.banned(where, entry.name) for entry in entries}
        with self.noting(where):
            result = race([entry for entry in entries if not out[entry.name]], clock, **options)
        result.failed |= {name: reason for name, reason in out.items() if reason}
        self.add(*where, result, nbytes, flops, ours)
        for name, reason in result.failed.items():
            if not self.reason(where, name):
                self.fail(where, name, reason)
        return result

    def add(
        self,
        bench: str,
        case: dict,
        mode: str,
        clock: str,
        result: Result,
        nbytes: int,
        flops: int,
        ours: Sequence[str] = (),
    ) -> None:
        """Record every contestant of a race; ``ours`` also get their ratio to each other one."""
        for name in result.samples:
            median, p20, p80 = (_round(q) for q in quantiles(result.taken(name)))
            others = [n for n in result.samples if n != name] if name in ours else []
            record = {
                "run": self.run, "bench": bench, "case": case, "mode": mode, "clock": clock,
                "how": result.how[name], "name": name, "median": median, "p20": p20, "p80": p80,
                "rounds": len(result.taken(name)), "calls": result.calls[name],
                "bytes": nbytes, "flops": flops, "peak": result.peak[name],
                "ratio": {n: [_round(q) for q in result.ratio(name, n)] for n in others},
            }  # fmt: skip
            assert tuple(record) == RECORD
            self.records.append(record)
        self.write()

    def fact(self, where: Where, name: str, facts: dict) -> None:
        """Record what is counted or known rather than timed."""
        known = {"run": self.run, **where._asdict(), "name": name, "facts": facts}
        self.records.append({**dict.fromkeys(RECORD), "ratio": {}, **known})
        self.write()

    def fail(self, where: Where, name: str, reason: str, lost: bool = False) -> None:
        """Record why a contestant has no figure; ``lost``: because it ended the CUDA context."""
        self.fact(where._replace(bench=FAILED + where.bench), name, {"reason": reason, "lost": lost})

    @contextlib.contextmanager
    def noting(self, where: Where) -> Iterator[None]:
        """Put on record who ended the CUDA context."""
        try:
            yield
        except ContextLost as lost:
            self.fail(where, lost.name, lost.reason, lost=True)
            raise

    def _known(self, where: Where) -> list[dict]:
        """Records of a race that count: of this code on this device."""
        key = _where({"run": self.run, **where._asdict()})
        return [r for r in self.all() if r["run"] in self.valid and _where(r) == key]

    def measured(self, where: Where, names: Iterable[str]) -> bool:
        """Whether every one of the contestants is on record, be it with the reason why it has no figure."""
        return set(names) <= {r["name"] for r in self._known(where)}

    def reason(self, where: Where, name: str) -> str:
        """Why a contestant has no figure; empty if it has one."""
        found = [r for r in self._known(where) if r["name"] == name and r["bench"].startswith(FAILED)]
        return found[0]["facts"]["reason"] if found else ""

    def banned(self, where: Where, name: str) -> str:
        """Why a contestant is left out: it ended the context in this race, or in three of this benchmark."""
        bench = FAILED + where.bench
        found = [r for r in self.all() if r["run"] in self.valid and (r["bench"], r["name"]) == (bench, name)]
        losses = [r for r in found if r["facts"]["lost"]]
        if any(r in losses for r in self._known(where)):
            return self.reason(where, name)
        return "left out: it ended the CUDA context three times" if len(losses) >= 3 else ""

    def all(self) -> list[dict]:
        """Records of earlier runs that nothing replaced, and this run's."""
        again = {(_where(r), r["name"]) for r in self.records}
        return [r for r in self.old if (_where(r), r["name"]) not in again] + self.records

    def write(self) -> None:
        """Write the file whole, so that a run cut short leaves a readable one."""
        records = self.all()
        used = {r["run"] for r in records if r["bench"] not in PER_RUN} | {self.run}
        self.environment["others"] = NEIGHBOURS.share()
        runs = {k: v for k, v in {**self.runs, self.run: self.environment}.items() if k in used}
        dump(self.path, runs, [r for r in records if r["run"] in used])


@functools.cache
def book() -> Book:
    """The records of this process."""
    return Book()


def dump(path: Path, runs: dict, records: list[dict]) -> None:
    """Write a file of records, one a line."""
    lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in records)
    header = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in runs.items())
    text = f'{{"format": 1,\n"runs": {{\n{header}}},\n"records": [\n{lines}]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.replace(path)


def _round(x: float) -> float:
    return float(f"{x:.4g}")


def load(path: Path) -> list[dict]:
    """Records of a file, each with its run's environment as ``env``."""
    data = json.loads(Path(path).read_text())
    return [{**r, "env": data["runs"][r["run"]]} for r in data["records"]]


# Inputs --------------------------------------------------------------------------------------------


def seeded(seed: int) -> torch.Generator:
    """A generator on the device that benchmarks run on, so that inputs are drawn there."""
    return torch.Generator(device()).manual_seed(seed)


def loss_inputs(N: int, C: int, P: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, C) that want a gradient, target (N,) int64, votes (N, P) int32 that favour a few classes."""
    drawn = {"generator": seeded(seed), "device": device()}
    logits = torch.randn(N, C, **drawn).mul_(2).to(dtype).requires_grad_()
    target = torch.randint(C, (N,), **drawn)
    spread = (torch.rand(N, P, **drawn).pow_(4) * C).long()
    return logits, target, ((target[:, None] + spread) % C).to(torch.int32)


def vote_inputs(
    N: int, H: int, W: int, D: int, C: int, dtype: torch.dtype, layout: str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Features (N, D, H, W), channels_last or NCHW, or (N, H*W, D), tokens; weight (C, D)."""
    drawn = {"generator": seeded(seed), "device": device()}
    features = torch.randn(N, H * W, D, **drawn).to(dtype)
    weight = (torch.randn(C, D, **drawn) / D**0.5).to(dtype)
    if layout != "tokens":
        features = features.view(N, H, W, D).permute(0, 3, 1, 2)
        features = features.contiguous() if layout == "NCHW" else features
    return features, weight
