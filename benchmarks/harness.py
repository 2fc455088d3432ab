"""How time is taken: races of interleaved contestants, two clocks, peak memory, ceilings, records.

The machines these run on are shared and their speed drifts, so nothing is measured alone. A *race* takes one
sample of every contestant per round, in a new random order each round, within one process; a ratio is the
median over rounds of (ours in that round / theirs in that round). A slow contestant sits out most rounds.

Clocks:
    host    perf_counter around a loop of calls: all there is on a CPU; on a GPU the time the host is busy.
    device  CUDA events around replays of a captured graph, or around eager calls where capture fails. Inputs
            rotate through copies that together exceed the L2 cache, as a training step would leave it.

A record is one contestant in one race (fields: RECORD; ``facts`` hold what was counted, not timed). A file of
records holds the environments of its runs (fields: ENVIRONMENT) once; ``load`` joins the two.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from zipfls_cuda import ops

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

# Tiny sizes, two rounds: walks through everything and measures nothing. Its records are never reported.
TINY = os.environ.get("ZIPFLS_BENCH") == "tiny"

# A run on a CPU that has taken so many seconds hurries, so that a busy machine does not stretch it forever.
START, PATIENCE = time.monotonic(), 210

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
    """Digest of the package's own sources: names the code where there is no repository to ask."""
    digest = hashlib.sha256()
    for folder in ("zipfls_cuda", "csrc"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
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
    capture: bool = True  # may be captured in a CUDA graph
    clear: Callable | None = None  # frees what an earlier call left behind, before peak memory is measured
    graph: tuple | None = None  # (captured graph, calls in it)


class HostClock:
    """perf_counter around a loop of calls; on a GPU from an empty queue, whose draining is not timed."""

    name = "host"
    least = 1e-3  # seconds a sample should last

    def ready(self, entry: Entry) -> str:
        return "calls"

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
    """CUDA events around graph replays, or around eager calls of what cannot be captured."""

    name = "device"
    least = 2e-4
    in_graph = (
        32  # at least so many calls in a graph of short ones, so that launching it is not what is timed
    )

    def ready(self, entry: Entry) -> str:
        """Warm up and capture; says how samples will be taken."""
        for call, prepare in zip(entry.calls, entry.prepare or [None] * len(entry.calls)):
            for _ in range(2):
                call(prepare()) if prepare else call()
        if not entry.capture or entry.prepare is not None:
            return "events"
        seconds = self.sample(entry, len(entry.calls))
        n = len(entry.calls) if seconds > 1e-4 else max(self.in_graph, len(entry.calls))
        graph = torch.cuda.CUDAGraph()
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                entry.calls[0]()
            torch.cuda.current_stream().wait_stream(stream)
            synchronize()
            with torch.cuda.graph(graph):
                for i in range(n):
                    entry.calls[i % len(entry.calls)]()
            graph.replay()
            synchronize()
        except Exception:  # it synchronises, or allocates in a way that capture forbids
            synchronize()
            return "events"
        entry.graph = (graph, n)
        return "graph"

    def sample(self, entry: Entry, k: int) -> float:
        """Seconds per call, over at least ``k`` calls."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph, n = entry.graph or (None, len(entry.calls))
        synchronize()
        if graph is not None:
            replays = -(-k // n)
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            k = replays * n
        elif entry.prepare is None:
            start.record()
            for i in range(k):
                entry.calls[i % n]()
            end.record()
        else:
            total = 0.0
            for i in range(k):
                state = entry.prepare[i % n]()
                start.record()
                entry.calls[i % n](state)
                end.record()
                synchronize()
                total += start.elapsed_time(end)
            return total * 1e-3 / k
        synchronize()
        return start.elapsed_time(end) * 1e-3 / k


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copies(nbytes: int) -> int:
    """How many copies of the inputs to rotate through: one on a CPU; on a GPU beyond three times its L2."""
    if device().type == "cpu":
        return 1
    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20)
    return max(1, min(16, -(-3 * l2 // max(1, nbytes))))


# Races ---------------------------------------------------------------------------------------------


@dataclass
class Result:
    """A race's samples, seconds per call by round; None where a contestant sat out."""

    samples: dict[str, list[float | None]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)  # per sample
    how: dict[str, str] = field(default_factory=dict)
    peak: dict[str, int | None] = field(default_factory=dict)  # bytes
    failed: dict[str, str] = field(default_factory=dict)  # name -> reason

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
        try:
            result.how[entry.name] = clock.ready(entry)
            once = clock.sample(entry, 1)
            if once < 0.1 and not TINY:
                once = min(clock.sample(entry, 1) for _ in range(3))
            k = 1 if TINY else min(200, max(1, round(clock.least / max(once, 1e-7))))
            share[entry.name] = (k, once * k)
            result.peak[entry.name] = peak_memory(entry) if memory else None
        except Exception as error:
            result.failed[entry.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
            continue
        result.calls[entry.name] = share[entry.name][0]
        result.samples[entry.name] = []
        running.append(entry)
    if not running:
        return result
    budget = seconds / len(running)
    fastest = min(duration / k for k, duration in share.values())
    wanted = {}
    for name, (k, duration) in share.items():
        least = 3 if duration / k > 10 * fastest else least_rounds
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
                order = list(running)
                shuffle(order)
                for entry in order:
                    runs = i % stride[entry.name] == 0
                    sample = clock.sample(entry, share[entry.name][0]) if runs else None
                    result.samples[entry.name].append(sample)
    finally:
        gc.enable()
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
    """What this machine can do at most: a large copy, and a matrix product per dtype, on random data.

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
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=device(), dtype=dtype) for _ in range(2))
        result = race([Entry("product", [lambda a=a, b=b: a @ b])], clock, seconds=0.5)
        found.append(({"dtype": name_of(dtype), "N": n}, result, 0, 2 * n**3))
    return found


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Records -------------------------------------------------------------------------------------------


class Book:
    """Records of this run, written to one file per device as they come in.

    What an earlier run left in the file stays, but for the benchmarks that ran again.
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

    def fact(self, bench: str, case: dict, name: str, facts: dict) -> None:
        """Record what is counted rather than timed."""
        known = {"run": self.run, "bench": bench, "case": case, "name": name, "facts": facts}
        self.records.append({**dict.fromkeys(RECORD), "ratio": {}, **known})
        self.write()

    def write(self) -> None:
        """Write the file whole, so that a run cut short leaves a readable one."""
        again = {r["bench"] for r in self.records}
        records = [r for r in self.old if r["bench"] not in again] + self.records
        self.environment["others"] = NEIGHBOURS.share()
        runs = {**self.runs, self.run: self.environment}
        runs = {k: v for k, v in runs.items() if any(r["run"] == k for r in records)}
        dump(self.path, runs, records)


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
    return torch.Generator().manual_seed(seed)


def loss_inputs(N: int, C: int, P: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, C) that want a gradient, target (N,) int64, votes (N, P) int32 that favour a few classes."""
    g = seeded(seed)
    logits = torch.randn(N, C, generator=g).mul_(2).to(device(), dtype).requires_grad_()
    target = torch.randint(C, (N,), generator=g)
    spread = (torch.rand(N, P, generator=g).pow(4) * C).long()
    votes = ((target[:, None] + spread) % C).to(torch.int32)
    return logits, target.to(device()), votes.to(device())


def vote_inputs(
    N: int, H: int, W: int, D: int, C: int, dtype: torch.dtype, layout: str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Features (N, D, H, W), channels_last or NCHW, or (N, H*W, D), tokens; weight (C, D)."""
    g = seeded(seed)
    features = torch.randn(N, H * W, D, generator=g).to(device(), dtype)
    weight = (torch.randn(C, D, generator=g) / D**0.5).to(device(), dtype)
    if layout != "tokens":
        features = features.view(N, H, W, D).permute(0, 3, 1, 2)
        features = features.contiguous() if layout == "NCHW" else features
    return features, weight
