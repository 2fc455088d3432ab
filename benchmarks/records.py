"""Records: what was measured, on which machine, of which code; one file per device in benchmarks/results.

A record is one implementation in one comparison (fields: RECORD; ``facts`` say why one has no figure).
A file holds the environments of its runs once (``environment``); ``load`` joins the two.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import clock
import torch
from clock import TINY, Comparison, Entry
from sources import ROOT, digest, first_line

from zipfls_cuda import ops

RESULTS = ROOT / "benchmarks" / "results"
RECORD = (
    "run", "bench", "case", "mode", "clock", "how", "name", "median", "p20", "p80", "rounds", "calls",
    "bytes", "flops", "peak", "ratio",
)  # fmt: skip


def environment() -> dict[str, object]:
    """Everything about this machine and this code that a figure depends on."""
    kind = clock.device().type
    cpu = re.sub(r"\((R|TM)\)", "", clock.proc("cpuinfo", r"model name\s*:\s*(.+)")) or platform.processor()
    cpu = " ".join(cpu.split()) or platform.machine()
    mhz, gpu, driver = clock.proc("cpuinfo", r"cpu MHz\s*:\s*([\d.]+)"), None, ""
    clocks = [f"{float(mhz):.0f} MHz"] if mhz else []
    if kind == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        found = first_line("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").split(",")
        driver, clocks = found[0], [x.strip() for x in found[1:]] or clocks
    build = ops.build_info()
    return {
        "device": gpu.name if gpu else cpu,
        "kind": kind,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "driver": driver,
        "clocks": ", ".join(clocks),
        "memory": gpu.total_memory if gpu else int(clock.proc("meminfo", r"MemTotal:\s*(\d+)") or 0) * 1024,
        "l2": getattr(gpu, "L2_cache_size", 0),
        "arch": f"sm_{gpu.major}{gpu.minor}" if gpu else torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": next((d.version for d in importlib.metadata.distributions(name="triton")), ""),
        "compiler": str(build.get("compiler", "")) or first_line("g++", "--version"),
        "build": {k: v for k, v in build.items() if k != "compiler"},
        "backends": list(ops.backends()),
        "commit": first_line("git", "rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": bool(first_line("git", "status", "--porcelain", "--", "zipfls_cuda", "csrc", "setup.py")),
        "source": digest(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "others": 0.0,  # the share of the processors that other processes took: Records.write puts it in
        "tiny": TINY,
    }


class Where(NamedTuple):
    """A comparison among the records."""

    bench: str
    case: dict
    mode: str
    clock: str

    def __str__(self) -> str:
        return " ".join(str(x) for x in (self.bench, *self.case.values(), self.mode, self.clock) if x)


CEILING = "ceiling"  # records of this benchmark belong to their run and go with it
FAILED = "failed "  # before the benchmark's name: facts of an implementation that could not be measured


def _key(record: dict) -> tuple:
    """What a record must share with another to stand for the same comparison."""
    bench = record["bench"].removeprefix(FAILED)
    run = record["run"] if bench == CEILING else ""
    return bench, json.dumps(record["case"], sort_keys=True), record["mode"], record["clock"], run


class Records:
    """Records of this run, written to one file per device as they come in.

    An earlier record stays until the same implementation is measured in the same comparison again. A record
    of the same code (``source``) on the same device counts as measured.
    """

    def __init__(self, path: Path | None = None):
        self.environment = environment()
        name = f"{'' if self.environment['kind'] == 'cuda' else 'cpu '}{self.environment['device']}"
        default = RESULTS / f"{slug(name)}.json"
        self.path = path or Path(os.environ.get("ZIPFLS_BENCH_RECORDS") or default)
        if TINY and self.path == default:
            raise ValueError("tiny records must not join real ones: set ZIPFLS_BENCH_RECORDS to another file")
        old = json.loads(self.path.read_text()) if self.path.exists() else {"runs": {}, "records": []}
        self.runs, self.old = old["runs"], old["records"]
        self.run = str(1 + max(map(int, self.runs), default=0))
        self.records: list[dict] = []
        self.others = self.total = 0.0  # seconds of the processors, other processes' and all
        same = ("source", "device", "torch", "threads", "tiny")
        self.valid = {k for k, env in self.runs.items() if all(env[x] == self.environment[x] for x in same)}
        self.valid.add(self.run)

    def compare(
        self, where: Where, entries: Sequence[Entry], timer: clock.Clock, nbytes: int = 0, flops: int = 0,
        **options,
    ) -> Comparison:  # fmt: skip
        """Compare and record (``options``: clock.compare's), without what ended the CUDA context before."""
        out = self.left_out(where.bench)
        result = clock.compare([entry for entry in entries if entry.name not in out], timer, **options)
        self.others += result.others
        self.total += result.total
        result.failed |= {entry.name: out[entry.name] for entry in entries if entry.name in out}
        self.add(where, result, nbytes, flops)
        for name in set(result.failed) - set(self.known(where)):
            self.fail(where, name, result.failed[name])
        return result

    def add(self, where: Where, result: Comparison, nbytes: int, flops: int) -> None:
        """Record the quantiles of each implementation, and of its ratios to the others."""
        for name in result.samples:
            median, p20, p80 = map(_round, clock.quantiles(result.taken(name)))
            counts = len(result.taken(name)), result.calls[name], nbytes, flops, result.peak[name]
            ratio = {n: [_round(q) for q in result.ratio(name, n)] for n in result.samples if n != name}
            values = (self.run, *where, result.how[name], name, median, p20, p80, *counts, ratio)
            self.records.append(dict(zip(RECORD, values, strict=True)))
        self.write()

    def fail(self, where: Where, name: str, reason: str, lost: bool = False) -> None:
        """Record why an implementation has no figure; ``lost``: because it ended the CUDA context."""
        known = {**where._asdict(), "bench": FAILED + where.bench, "facts": {"reason": reason, "lost": lost}}
        self.records.append({**dict.fromkeys(RECORD), "ratio": {}, "run": self.run, "name": name, **known})
        self.write()

    def known(self, where: Where) -> dict[str, str]:
        """What of this code on this device is on record: name -> why it has no figure, or "" if it has."""
        key = _key({"run": self.run, **where._asdict()})
        found = [r for r in self.all() if r["run"] in self.valid and _key(r) == key]
        return {r["name"]: r.get("facts", {}).get("reason", "") for r in found}

    def left_out(self, bench: str) -> dict[str, str]:
        """What is not tried, as it ended the CUDA context in a comparison of a benchmark: name -> reason."""
        failed = [r for r in self.all() if r["run"] in self.valid and r["bench"] == FAILED + bench]
        lost = {r["name"]: r["facts"]["reason"] for r in failed if r["facts"]["lost"]}
        return {name: f"left out: it ended the CUDA context: {reason}" for name, reason in lost.items()}

    def all(self) -> list[dict]:
        """Records of earlier runs that nothing replaced, and this run's."""
        again = {(_key(r), r["name"]) for r in self.records}
        return [r for r in self.old if (_key(r), r["name"]) not in again] + self.records

    def write(self) -> None:
        """Write the file whole, so that a run cut short leaves a readable one."""
        records = self.all()
        used = {r["run"] for r in records if r["bench"] != CEILING} | {self.run}
        self.environment["others"] = round(self.others / self.total, 3) if self.total else 0.0
        runs = {k: v for k, v in {**self.runs, self.run: self.environment}.items() if k in used}
        dump(self.path, runs, [r for r in records if r["run"] in used])


@functools.cache
def of_this_run() -> Records:
    """The records of this process."""
    return Records()


def slug(text: str) -> str:
    """A file name from a device's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def dump(path: Path, runs: dict, records: list[dict]) -> None:
    """Write a file of records, one a line."""
    lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in records)
    header = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in runs.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(f'{{"format": 1,\n"runs": {{\n{header}}},\n"records": [\n{lines}]}}\n')
    temporary.replace(path)


def _round(x: float) -> float:
    return float(f"{x:.4g}")


def load(path: Path) -> list[dict]:
    """Records of a file, each with its run's environment as ``env``."""
    data = json.loads(Path(path).read_text())
    return [{**r, "env": data["runs"][r["run"]]} for r in data["records"]]
