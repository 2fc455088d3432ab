"""Everything a machine with an NVIDIA GPU can show: build, tests, sanitizer, benchmarks, a training.

    make gpu-check OUT=DIR [PART=cuda,triton] [SECONDS=560] [DRY=1]

Uses the Python that runs it, its torch and triton, and nvcc; installs nothing, downloads nothing. Every call
builds first, then runs the parts in the order of PARTS and ends within SECONDS. A second call with the same
DIR, or a copy, resumes: what has passed with the same sources is not repeated, and records add up. Where one
call is too short for all, ask for PART=exercise,cuda,triton,memcheck, then loss,vote, then the others. DIR
gets, as the parts end:

    table.md       every target: asked, measured, met or not (also printed last)
    records.json   the benchmarks' records, as they are taken
    checks.json    outcome of build, tests, sanitizer and training
    tune.json      launch constants in other values (benchmarks/tune.py)
    efficacy.json  the training's records, for benchmarks/results/efficacy/h200.json
    log.txt        everything the parts printed

DRY=1 runs all of it on a CPU at tiny sizes; its figures mean nothing. A missing tool is reported as absent;
both GPU backends must be usable. Exit status 1 if the build, a test, the sanitizer or a benchmark failed, in
this call or an earlier one of the same sources; a missed target or a part cut short is no failure.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from sources import ROOT, digest, first_line, installed

HERE = Path(__file__).resolve().parent
BUILD = 240  # seconds
SPARE = 8  # seconds for ending what runs, and for the table
PATIENCE = 120  # seconds for a single test: Triton and torch.compile compile within one
LEAST = 15  # seconds that a part is begun with
CUT_SHORT = 124  # status of a program that took too long

# What tests a backend, the most telling first. Some tests of test_gpu take 20 GiB of its memory.
WORKERS_ON_GPU = 4
SUITE = ("gpu_vote", "vote", "loss", "soft", "label", "inplace", "golden", "ops", "autograd")
SUITE += ("distillation", "linear", "properties", "reliability")

# Kernels of ours, as the sanitizer names them: C++ by its namespace, Triton by the function.
OWN = re.compile(
    r"zipfls|\b((soft_)?(loss|correct)\w*|(rank|label|vote|distill)_\w+|totals|transpose)_kernel\b"
)
FILTERS = {"cuda": "zipfls", "triton": "_kernel"}  # what their names have in common


class Child:
    """A program in a process group (not session) of its own; its output is in a file and survives a kill."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        pipes = {"stdin": subprocess.DEVNULL, "stdout": self.file, "stderr": subprocess.STDOUT}
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background, and inherited
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, process_group=0, **pipes)

    def wait(self, seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)

    def output(self) -> str:
        return os.pread(self.file.fileno(), 1 << 28, 0).decode(errors="replace")

    def kill(self, patience: float = 0) -> None:
        """End it and what it started, after ``patience`` seconds to print what it knows.

        A process stuck in the driver does not die, and is not waited for.
        """
        if patience:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGINT)
            self.wait(patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait(2)


class Check:
    """One invocation: its folder, its clock, and what has been found so far."""

    def __init__(self, out: Path, parts: list[str], dry: bool, seconds: float):
        self.out, self.parts, self.dry = out.resolve(), parts, dry
        self.start = time.monotonic()
        self.end = self.start + seconds - SPARE
        self.running: list[Child] = []
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "log.txt").open("a", buffering=1)
        self.records = self.out / "records.json"
        old = out / "checks.json"
        self.checks: dict[str, dict] = json.loads(old.read_text()) if old.exists() else {}
        self.source = digest(("zipfls_cuda", "csrc", "tests"), ("setup.py", "benchmarks/gpu_check.py"))
        self.usable: list[str] = []
        self.python = [sys.executable]

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self.start:6.1f} s] {text}"
        print(line, flush=True)
        self.log.write(line + "\n")

    def note(self, name: str, ok: bool | None, text: str) -> None:
        """Record the outcome of a check; ``ok`` is None where nothing was checked, or not to its end."""
        self.checks[name] = {"ok": ok, "text": text, "source": self.source}
        part = self.out / "checks.json.part"
        part.write_text(json.dumps(self.checks, indent=1) + "\n")
        part.replace(self.out / "checks.json")
        self.say(f"{name}: {text}")
        self.write_table()

    def note_run(self, name: str, status: int, words: str) -> None:
        """Record how a program ended: right, wrong, or cut short."""
        self.note(name, None if status == CUT_SHORT else status == 0, cut(status, words))

    def passed(self, name: str) -> bool:
        """Whether a check need not be repeated."""
        found = self.checks.get(name, {})
        return bool(found.get("ok") and found.get("source") == self.source)

    def left(self) -> float:
        return self.end - time.monotonic()

    def share(self, part: str) -> float:
        """Seconds for a part: what it is known to need, and more where there is more than all others need."""
        need = PARTS[part][0]
        later = sum(PARTS[p][0] for p in self.parts[self.parts.index(part) :])
        return min(self.left(), max(need, self.left() * need / later))

    def environment(self, **more: str) -> dict[str, str]:
        found = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ZIPFLS_BACKEND")}
        ninja, nvcc = Path(sys.executable).parent, Path(found.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
        found["PATH"] = os.pathsep.join([str(ninja), found.get("PATH", os.defpath), str(nvcc)])
        found |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "ZIPFLS_BENCH_RECORDS": str(self.records)}
        if self.dry:  # one thread: on a busy machine two wait for each other most of the time
            found |= {"ZIPFLS_BENCH": "tiny", "OMP_NUM_THREADS": "1"}
        return found | more

    def start_process(self, command: list[str], **environment: str) -> Child:
        self.say("$ " + " ".join(Path(c).name if c == sys.executable else c for c in command))
        self.running.append(Child(command, self.environment(**environment)))
        return self.running[-1]

    def finish(self, child: Child, limit: float) -> tuple[int, str]:
        """Wait at most ``limit`` seconds; the program's status, or CUT_SHORT, and its output."""
        patience = max(0, min(5, limit / 4))
        status = child.wait(max(0, limit - patience))
        child.kill(patience if status is None else 0)  # in any case what it has left running
        self.running.remove(child)
        output = child.output()
        self.log.write(output)
        return CUT_SHORT if status is None else status, output

    def run(self, command: list[str], limit: float, **environment: str) -> tuple[int, str]:
        return self.finish(self.start_process(command, **environment), limit)

    def write_table(self) -> str:
        """table.md from whatever is there by now."""
        try:
            text = self.table()
        except Exception as error:  # half a build may not import; the log has the rest
            text = f"no table: {type(error).__name__}: {error}\n"
        (self.out / "table.md").write_text(text)
        return text

    def table(self) -> str:
        words = {True: "ok", False: "FAILED", None: "-"}
        lines = ["# gpu-check" + (" (dry run: the figures mean nothing)" if self.dry else ""), ""]
        for name, c in self.checks.items():
            old = "" if c["source"] == self.source else " (of other sources)"
            lines.append(f"{name}: {words[c['ok']]}, {c['text']}{old}  ")
        if "build" not in self.checks:
            return "\n".join(lines) + "\n"
        sys.path += [str(ROOT)] * (str(ROOT) not in sys.path)
        import records
        import report
        import targets

        found = records.load(self.records) if self.records.exists() else []
        verdicts = targets.judge(found, "cuda")
        lines += ["", report.provenance(found) + "."] if found else []
        met = [v.met for v in verdicts if v.target != "-"]
        counts = f"{met.count(True)} met, {met.count(False)} not met, {met.count(None)} not measured"
        lines += ["", report.target_table(verdicts), "", f"{len(met)} targets: {counts}.", ""]
        return "\n".join(lines)


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


def cut(status: int, words: str) -> str:
    return f"cut short: {words}" if status == CUT_SHORT else words


def architecture() -> str:
    """Of the first GPU, as TORCH_CUDA_ARCH_LIST has it; an H100's where nothing tells."""
    told = first_line("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    arch = found[0] if (found := re.match(r"\d+\.\d+", told)) else "9.0"
    return arch + "a" * (float(arch) >= 9)


def build(check: Check) -> bool:
    """The extension, in place, for the GPU that is there; and whether both backends for it can be used."""
    if check.dry:
        check.note("build", None, "left as it is")
        check.usable = ["cpu"]
        return True
    arch, jobs = architecture(), str(os.cpu_count() or 4)
    more = {"ZIPFLS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": arch, "MAX_JOBS": jobs}
    check.checks.pop("build", None)  # until it is there again, no table: that would load the old one
    began = time.monotonic()
    command = [*check.python, "setup.py", "build_ext", "--inplace"]
    status, output = check.run(command, min(BUILD, check.left()), **more)
    words = f"{arch}, {time.monotonic() - began:.0f} s"
    check.note("build", status == 0, words if status == 0 else cut(status, last_line(output)))
    if status != 0:
        return False
    status, output = check.run([*check.python, "-m", "zipfls_cuda"], min(60, check.left()))
    check.usable = re.findall(r"^  (cuda|triton) +usable$", output, re.M)
    missing = re.findall(r"^  ((?:cuda|triton) +not usable: .+)$", output, re.M)
    words = "; ".join(" ".join(m.split()) for m in missing) or ", ".join(check.usable) or last_line(output)
    check.note("backends", check.usable == ["cuda", "triton"], words)
    return True


# A line of pytest -v: one test and its outcome, by xdist the other way round.
OUTCOME = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<word>[A-Z]+) (?P<name>tests/.+?)"
    r"|(?P<name1>tests/\S+?::.+?) (?P<word1>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*)\s*$",
    re.M,
)


def outcomes(output: str) -> dict[str, str]:
    """Test -> PASSED, FAILED, ERROR, ...: of a whole run, or of what it printed before it was cut short."""
    # The last word counts: a test may pass, and then fail as it is cleared up.
    return {m["name"] or m["name1"]: m["word"] or m["word1"] for m in OUTCOME.finditer(output)}


def run_tests(check: Check, name: str, backend: str, files: Iterable[str], workers: int, limit: float):
    """Some files of the suite over one backend, each test with a time limit, in several processes."""
    paths = [f"tests/test_{f}.py" for f in files if f != "properties" or installed("hypothesis")]
    command = [*check.python, "-m", "pytest", *paths, "--backend", backend, "-p", "no:cacheprovider"]
    command += ["-o", "addopts=--strict-markers", "-v", "-rfE", "--tb=short"]
    for plugin, options in (
        ("pytest_benchmark", ["--benchmark-disable"]),
        ("pytest_timeout", ["--timeout", str(PATIENCE), "--timeout-method", "thread"]),
        ("xdist", ["-n", str(workers)]),
    ):
        command += options if installed(plugin) else []
    command += ["-k", "test_golden and 00"] if check.dry else []
    status, output = check.run(command, limit)
    found = outcomes(output)
    count = {word: list(found.values()).count(word) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    failed = [test for test, word in found.items() if word in ("FAILED", "ERROR")]
    words = ", ".join(f"{n} {word.lower()}" for word, n in count.items() if n) or last_line(output)
    if failed:
        words += f"; first: {', '.join(failed[:5])}"
    elif status not in (0, CUT_SHORT):
        words += f"; {last_line(output)}"
    ok = False if failed else None if status == CUT_SHORT else status == 0 and bool(found)
    check.note(name, ok, cut(status, words))


def suite(check: Check, backend: str) -> None:
    """All that tests a backend: first what only a GPU can show, then the suite that runs anywhere."""
    if backend not in (*check.usable, "reference"):
        check.note(backend, None, "absent")
        return
    many = max(1, (os.cpu_count() or 1) - 2)
    groups = [(f"{backend}, GPU only", ("gpu",), min(WORKERS_ON_GPU, many))] * (backend != "reference")
    groups += [(f"{backend}, suite", ("triton",) * (backend == "triton") + SUITE, many)]
    groups = [group for group in groups if not check.passed(group[0])]
    end = time.monotonic() + check.share(backend)
    for i, (name, files, workers) in enumerate(groups, 1):
        left = end - time.monotonic()
        if left < LEAST:
            check.note(name, None, "no time left")
        else:
            run_tests(check, name, backend, files, workers, left if i == len(groups) else 0.6 * left)


def sanitize(check: Check, part: str, *tools: str) -> None:
    """Every kernel once at small shapes, under tools of compute-sanitizer; without tools, by itself.

    All tools and backends run side by side.
    """
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if tools and (check.dry or not Path(sanitizer).exists()):
        check.note(part, None, "absent: there is no compute-sanitizer")
        return
    running, end = {}, time.monotonic() + check.share(part)
    for tool, backend in itertools.product(tools or [""], check.usable):
        name, command, more = f"{tool or part}, {backend}", [], {}
        if tool:
            command = [sanitizer, "--tool", tool, "--target-processes", "application-only"]
            command += ["--show-backtrace", "no", "--print-limit", "1000"]
            if tool != "initcheck":  # which must see all that is written
                command += ["--kernel-name", f"kns={FILTERS[backend]}"]
            more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command += [*check.python, str(HERE / "gpu_check.py"), "--exercise", backend]
        if not check.passed(name):
            running[name] = check.start_process(command, **more)
    for name, child in running.items():
        check.note(name, *verdict(*check.finish(child, max(1, end - time.monotonic()))))


def reports(output: str) -> list[str]:
    """The kernel of each report that the sanitizer printed; "" where it names none."""
    found: list[str] = []
    for line in output.splitlines():
        if re.match(r"========= (Invalid|Uninitialized|Barrier|Program hit|(Error|Warning): Race)", line):
            found.append("")
        named = re.match(r"=========.*?\bat (?:0x[0-9a-f]+ in )?(\S.*?)(?:\+0x[0-9a-f]+.*)?$", line)
        if found and not found[-1] and named:
            found[-1] = named[1]
    return found


def verdict(status: int, output: str) -> tuple[bool | None, str]:
    """What an exercise's output says, and the sanitizer's: only reports of our own kernels are a failure."""
    if re.search(r"^=========.*Device not supported", output, re.M):
        return None, "absent: the sanitizer cannot watch this device"
    found = reports(output)
    own, other = ([k for k in found if bool(OWN.search(k)) is ours] for ours in (True, False))
    right = re.findall(r"^\d+ calls right.*$", output, re.M)
    words = right[-1] if right else f"the calls ended early: {last_line(output)}"
    for kernels, whose in ((own, "our kernels"), (other, "others")):
        if kernels:
            names = ", ".join(dict.fromkeys(k[:80] or "no kernel" for k in kernels[:100]))
            words += f"; {len(kernels)} reports of {whose}: {names[:400]}"
    if own:
        return False, words
    return (None, cut(status, words)) if status == CUT_SHORT else (bool(right), words)


def bench(check: Check, part: str) -> None:
    """A benchmark file; what has its record is not measured again."""
    command = [*check.python, "-m", "pytest", f"benchmarks/bench_{part}.py", "-rfEs"]
    status, output = check.run(command, check.share(part))
    check.note_run(part, status, last_line(output).strip("= "))


def tune(check: Check, part: str) -> None:
    """Launch constants in other values, and kernels with a stage left out: benchmarks/tune.py."""
    if check.dry or shutil.which("nvcc", path=check.environment()["PATH"]) is None:
        check.note(part, None, f"absent: there is no {'GPU' if check.dry else 'nvcc'}")
        return
    command = [*check.python, str(HERE / "tune.py"), "--out", str(check.out / "tune.json")]
    status, output = check.run([*command, "--arch", architecture().replace(".", "")], check.share(part))
    check.note_run(part, status, "tables in log.txt, rows in tune.json" if status == 0 else last_line(output))


def train(check: Check, part: str) -> None:
    """Does it help? experiments/efficacy.py, as many seeds as there is time for."""
    records = check.out / "efficacy.json"
    prepared = sorted((ROOT / ".data").glob("typefaces-*-500-25-64px-*.npz"))[:1]  # made elsewhere
    with tempfile.TemporaryDirectory() as folder:
        command = [*check.python, "-m", "experiments.efficacy", "--preset", "gpu", "--records", str(records)]
        command += ["--cache", folder, "--jobs", "1" if check.dry else "4"]
        command += ["--fonts", *map(str, prepared)] if prepared else []
        status, output = check.run(command, check.share(part))
    check.note_run(part, status, "records in efficacy.json" if status == 0 else last_line(output))


PARTS: dict[str, tuple] = {  # in order: seconds given at least, where they are left; function, its arguments
    "exercise": (50, sanitize),
    "cuda": (160, suite),
    "triton": (180, suite),
    "memcheck": (80, sanitize, "memcheck"),
    "loss": (350, bench),
    "vote": (160, bench),
    "distill": (100, bench),
    "methods": (60, bench),
    "linear": (80, bench),
    "tune": (100, tune),
    "step": (250, bench),
    "train": (200, train),
    "sanitize": (80, sanitize, "racecheck", "synccheck", "initcheck"),
    "reference": (120, suite),
}


def run_part(check: Check, part: str) -> None:
    _, function, *arguments = PARTS[part]
    function(check, part, *arguments)


def run_parts(check: Check) -> None:
    for part in check.parts:
        if check.left() < LEAST:
            check.note(part, None, "no time left")
        else:
            check.checks.pop(part, None)
            run_part(check, part)


def exercise(backend: str) -> None:
    """Every operator of a backend against float64: the rows of `python -m zipfls_cuda check --quick`."""
    import torch

    from zipfls_cuda import check, check_rows

    check.RUNS = check.RUNS_INTERPRETED = 1
    device = torch.device("cpu" if backend == "cpu" else "cuda")
    rows = [row for row in check_rows.rows_of(device, quick=True) if row.backend == backend]
    for row in rows:
        if getattr(row.case, "N", 0) > 1000:  # as many as fill a device: too slow under the sanitizer
            row = row._replace(case=row.case._replace(N=67))
        failure = check.check_row(row)["failure"]
        print(*row.names().values(), flush=True)
        if failure:
            raise AssertionError(failure)
    print(f"{len(rows)} calls right on {backend} ({device})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for records, log and table")
    parser.add_argument("--parts", default="", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=560, help="for all of it (default: 560)")
    parser.add_argument("--dry", action="store_true", help="run all of it on a CPU at tiny sizes")
    parser.add_argument("--exercise", metavar="BACKEND", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.exercise:
        exercise(arguments.exercise)
        return 0
    if arguments.out is None:
        parser.error("--out is needed: a folder for records, log and table (make gpu-check OUT=dir)")
    asked = re.findall(r"[^,\s]+", arguments.parts) or list(PARTS)
    if unknown := [p for p in asked if p not in PARTS]:
        parser.error(f"unknown part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    parts = [p for p in PARTS if p in asked]
    check = Check(arguments.out, parts, arguments.dry, arguments.seconds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of the block below, as SIGINT does
    try:
        if build(check):
            run_parts(check)
    finally:
        for child in list(check.running):
            check.finish(child, 0)
        print(check.write_table())
    return any(c["ok"] is False and c["source"] == check.source for c in check.checks.values())


if __name__ == "__main__":
    sys.exit(main())
