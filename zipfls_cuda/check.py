"""``python -m zipfls_cuda check``: the kernels that serve on this machine, against ``expected.py``.

Runs the rows of ``check_rows.py``: results must be within their bounds, and have the same bits in every run.
A row that raises has failed, and the others go on; once the CUDA context is dead, the device's other rows are
failures that were not run.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import __version__, ops
from .check_rows import Row, rows_of
from .expected import Deviation, same_bits

RUNS, RUNS_INTERPRETED = 20, 2  # of every row; the second over Triton's interpreter, which is slow
PATIENCE = 60  # seconds after which a row that still runs is said to


# The run ------------------------------------------------------------------------------------------------


def check_row(row: Row) -> dict[str, Any]:
    """What became of a row: its worst error and bound, the runs made, and its failure, "" if it passed."""
    found: dict[str, Any] = {"worst": None, "error": None, "bound": None, "runs": 0, "failure": ""}
    runs = RUNS_INTERPRETED if row.backend == "triton" and ops.triton_interpreted() else RUNS
    try:
        call, judge = row.prepare(*row[:-1])
        first = call()
        found["runs"] = 1
        deviations = list(judge(first))
        if deviations:  # none where every call must raise
            worst = max(deviations, key=Deviation.ratio)
            found |= worst._asdict()
            if not worst.error <= worst.bound:
                raise AssertionError(f"{worst.worst} differs")
        while found["runs"] < runs:
            again = call()
            found["runs"] += 1
            if not all(map(same_bits, first, again)):
                raise AssertionError(f"run {found['runs']} gave other bits than the first")
    except Exception as error:  # whatever a kernel raises, the other rows are still wanted
        name = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        found["failure"] = f"{name}{error}"
    return found


def context_error(device: torch.device) -> str:
    """Why a CUDA device's context serves no longer; "" if it does."""
    if device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).item()
    except Exception as error:  # of several types, by version
        return f"the CUDA context is dead: {type(error).__name__}: {error}".splitlines()[0]
    return ""


def environment() -> dict[str, Any]:
    """Versions, build, devices, and which backend is usable."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    cpu = torch.backends.cpu.get_cpu_capability()
    devices = [f"cpu: {platform.machine()}, {cpu}, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices.append(
            f"cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors"
        )
    return {
        "zipfls_cuda": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "triton": triton + (" (interpreted)" if ops.triton_interpreted() else ""),
        "build": ops.build_info(),
        "devices": devices,
        "backends": {name: ops.reason_against(name) or "usable" for name in ops.BACKENDS},
    }


def expected_minutes(rows: list[Row]) -> float:
    """A rough guess from the first row of each backend and operator, whose kernels are compiled meanwhile."""
    seconds = 0.0
    for _, group in itertools.groupby(rows, key=lambda row: (row.device, row.backend, row.operator)):
        first, *others = group
        start = time.monotonic()
        check_row(first)
        seconds += (time.monotonic() - start) * (1 + len(others))
    return seconds / 60


def run(rows: list[Row], wrote: Callable[[Row, dict[str, Any]], None]) -> int:
    """Check the rows, print each, and hand it to ``wrote``; returns the number that failed."""
    dead: dict[torch.device, str] = {}
    failed = 0
    for i, row in enumerate(rows, 1):
        names = row.names().values()
        line = "{:6} {:9} {:26} {:8} {:44}".format(*names)
        print(f"{i:4} {line} ", end="", flush=True)
        late = threading.Timer(PATIENCE, print, [f"(running for {PATIENCE} s) "], {"end": "", "flush": True})
        late.daemon = True
        late.start()
        if row.device in dead:
            found: dict[str, Any] = {"runs": 0, "failure": f"not run, as {dead[row.device]}"}
        else:
            found = check_row(row)
        late.cancel()
        if found["failure"] and row.device not in dead and (reason := context_error(row.device)):
            dead[row.device] = reason
            found["failure"] += f"; {reason}"
        numbers = (
            "" if found.get("error") is None else f"error {found['error']:.1e}, bound {found['bound']:.1e}"
        )
        print(f"FAILED {numbers}: {found['failure']}" if found["failure"] else f"ok {numbers}", flush=True)
        failed += bool(found["failure"])
        wrote(row, found)
    return failed


# The command --------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command; ``run`` of the parsed arguments runs it."""
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:N; by default the CPU, and the current CUDA device"
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and dtypes: under a minute")
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        default="zipfls-check.json",
        help="where the report goes (%(default)s)",
    )
    parser.set_defaults(run=functools.partial(main, parser))


def devices_of(parser: argparse.ArgumentParser, name: str | None) -> list[torch.device]:
    """The devices to check; an unknown one ends the program with status 2."""
    there, current = ["cpu"], "cuda"
    if torch.cuda.is_available():
        there += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        current = f"cuda:{torch.cuda.current_device()}"
    if name is None:
        return [torch.device(d) for d in ("cpu", current) if d in there]
    name = current if name == "cuda" else name
    if name not in there:
        none = "" if current in there else " (there is no CUDA device)"
        parser.error(f"--device must be one of {', '.join(there)}{none}, got {name}")
    return [torch.device(name)]


def main(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Check, print the table and write the report; returns 0, or 1 if anything differs."""
    devices = devices_of(parser, arguments.device)
    report = {"complete": False, "quick": arguments.quick, **environment(), "rows": []}

    def write() -> None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")

    def wrote(row: Row, found: dict[str, Any]) -> None:
        report["rows"].append({**row.names(), "ok": not found["failure"], **found})
        write()  # whatever ends the program, the report has the rows so far

    try:
        write()
    except OSError as error:
        parser.error(f"--json must name a file that can be written, got {arguments.json}: {error.strerror}")
    for key in ("zipfls_cuda", "python", "torch", "triton", "devices", "backends"):
        print(f"{key:11} {report[key]}")
    rows = [row for device in devices for row in rows_of(device, arguments.quick)]
    print(f"{len(rows)} rows, each run {RUNS} times ({RUNS_INTERPRETED} in Triton's interpreter)", flush=True)
    if not arguments.quick and devices[-1].type == "cuda":
        print("guessing the time it takes: ", end="", flush=True)
        print(f"about {expected_minutes(rows):.1f} minutes", flush=True)
    failed = run(rows, wrote)
    report |= {"complete": True, "passed": len(rows) - failed, "failed": failed}
    write()
    print(f"{len(rows) - failed} of {len(rows)} rows passed; report to attach to an issue: {arguments.json}")
    return 1 if failed else 0
