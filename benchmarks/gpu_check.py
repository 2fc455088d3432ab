"""Put a machine with an NVIDIA GPU to the proof: build, tests, sanitizer, benchmarks, a training.

    python3 benchmarks/gpu_check.py --out DIR [--parts test,sanitize,loss,vote,step,train] [--dry]

Uses the Python that runs it, its torch and triton, and nvcc; installs nothing, fetches nothing. Each part
stands alone and stays under 8 minutes; all of them, the build included, under 25. DIR gets, as the work goes
on, so that they exist when it is cut short:

    table.md      every target: asked, measured, met or not (also printed last)
    records.json  the benchmarks' records
    checks.json   outcome of build, tests, sanitizer and training
    log.txt       everything the parts printed
    train.json, curves.png, spectra.png   the training

--dry walks through all of it on a CPU at tiny sizes; its figures mean nothing. A backend or tool that is not
there is reported as absent. Exit status 1 if the build, a test, the sanitizer or a benchmark failed; a target
that is not met is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
PARTS = {"test": 270, "sanitize": 210, "loss": 340, "vote": 150, "step": 240, "train": 190}  # seconds of all
BUILD = 90
ALL = 1490
ALONE = 440  # seconds a part may take when it runs alone, after the build
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


class Child:
    """A program in a process group of its own; its output is in a file, so that killing it loses nothing."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.output, self.read = "", 0
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=self.file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, seconds: float) -> int | None:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def news(self) -> str:
        """What was printed since the last time."""
        more = os.pread(self.file.fileno(), 1 << 24, self.read)
        self.read += len(more)
        self.output += more.decode(errors="replace")
        return more.decode(errors="replace")

    def kill(self) -> None:
        """End it and what it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self.process.kill()
        self.process.wait()


class Check:
    """One invocation: its folder, its clock, and what has been found so far."""

    def __init__(self, out: Path, parts: list[str], dry: bool):
        self.out, self.parts, self.dry = out.resolve(), parts, dry
        self.start = time.monotonic()
        self.children: list[Child] = []
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "log.txt").open("a")
        self.records = self.out / "records.json"
        old = out / "checks.json"
        self.checks: dict[str, dict] = json.loads(old.read_text()) if old.exists() else {}
        self.python = [sys.executable]

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self.start:6.1f} s] {text}"
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()

    def note(self, name: str, ok: bool | None, text: str) -> None:
        """Record the outcome of a check; ``ok`` is None where there was nothing to check."""
        self.checks[name] = {"ok": ok, "text": text}
        (self.out / "checks.json").write_text(json.dumps(self.checks, indent=1) + "\n")
        self.say(f"{name}: {text}")
        self.write_table()

    def seconds(self, part: str) -> float:
        """What a part may take."""
        if self.dry:
            return 120
        left = ALL - (time.monotonic() - self.start)
        return max(20, min(ALONE if len(self.parts) == 1 else PARTS[part], left))

    def environment(self, **more: str) -> dict[str, str]:
        found = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **more}
        found["ZIPFLS_BENCH_RECORDS"] = str(self.records)
        for name in ("TRITON_INTERPRET", "ZIPFLS_BACKEND"):  # settings of a caller that would mislead
            found.pop(name, None)
        if self.dry:  # one thread: on a busy machine two wait for each other most of the time
            found |= {"ZIPFLS_BENCH": "tiny", "OMP_NUM_THREADS": "1"}
        return found

    def start_process(self, command: list[str], **environment: str) -> Child:
        self.say("$ " + " ".join(Path(c).name if c == sys.executable else c for c in command))
        child = Child(command, self.environment(**environment))
        self.children.append(child)
        return child

    def finish(self, child: Child, limit: float) -> tuple[int, str]:
        """Wait at most ``limit`` seconds, keeping log and table fresh; status (124: cut short) and output."""
        end, refresh = time.monotonic() + limit, time.monotonic() + 20
        status = None
        while status is None:
            status = child.wait(0.5)
            if status is None and time.monotonic() >= end:
                child.kill()
                status = 124
            self.log.write(child.news())
            self.log.flush()
            if time.monotonic() >= refresh:
                self.write_table()
                refresh = time.monotonic() + 20
        return status, child.output

    def run(self, command: list[str], limit: float, **environment: str) -> tuple[int, str]:
        return self.finish(self.start_process(command, **environment), limit)

    # The table ------------------------------------------------------------------------------------------

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
        lines += [f"{name}: {words[c['ok']]}, {c['text']}  " for name, c in self.checks.items()]
        if "build" not in self.checks:
            return "\n".join(lines) + "\n"
        sys.path[:0] = [p for p in (str(ROOT), str(HERE)) if p not in sys.path]
        import harness
        import report
        import targets

        records = harness.load(self.records) if self.records.exists() else []
        if records:
            lines += ["", report.provenance(records) + "."]
        verdicts = targets.judge(records, "cuda")
        lines += ["", report.target_table(verdicts), ""]
        met = [v.met for v in verdicts if v.target != "-"]
        counts = f"{met.count(True)} met, {met.count(False)} not met, {met.count(None)} not measured"
        return "\n".join([*lines, f"{len(met)} targets: {counts}.", ""])


# Parts -----------------------------------------------------------------------------------------------


def build(check: Check) -> None:
    """The extension, in place, for the GPU that is there."""
    if check.dry:
        check.note("build", None, "left as it is")
        return
    probe = "import torch.cuda as c; print(*(c.get_device_capability() if c.is_available() else ()))"
    _, output = check.run([*check.python, "-c", probe], 60)
    found = re.findall(r"^(\d+) (\d+)$", output, re.M)
    more = {"MAX_JOBS": str(os.cpu_count() or 4)}
    if found:
        major, minor = found[-1]
        more["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}{'a' if int(major) >= 9 else ''}"
    began = time.monotonic()
    status, output = check.run([*check.python, "setup.py", "build_ext", "--inplace"], BUILD, **more)
    words = f"{more.get('TORCH_CUDA_ARCH_LIST', 'no GPU')}, {time.monotonic() - began:.0f} s"
    if status == 124:
        check.note("build", False, f"cut short after {BUILD} s; going on without it")
    else:
        check.note("build", status == 0, words if status == 0 else last_line(output))
    status, output = check.run([*check.python, "-m", "zipfls_cuda"], 60)
    usable = re.findall(r"^  (cuda|triton|cpu|reference) .*\busable$", output, re.M)
    usable = [b for b in usable if f"{b} not usable" not in output]
    check.note("backends", status == 0, ", ".join(dict.fromkeys(usable)) or last_line(output))


def test(check: Check) -> None:
    """The whole suite, on every backend there is; the benchmarks' own test would call this program again."""
    command = [*check.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable"]
    if check.dry:
        command += ["tests/test_golden.py", "-k", "00 and reference"]
    else:
        workers = ["-n", str(min(8, os.cpu_count() or 1))] if has(check, "xdist") else []
        command += ["tests", "--ignore=tests/test_benchmarks.py", *workers]
    status, output = check.run(command, check.seconds("test"))
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M)
    words = last_line(output).strip("= ")
    if failed:
        words += f"; first: {', '.join(failed[:5])}"
    check.note("test", status == 0, words if status != 124 else f"cut short: {words}")


def sanitize(check: Check) -> None:
    """Every kernel once at small shapes under each tool of compute-sanitizer, the tools side by side."""
    exercise = [*check.python, str(HERE / "gpu_check.py"), "--exercise"]
    if check.dry:
        status, output = check.run(exercise, check.seconds("sanitize"))
        check.note("sanitize", status == 0, f"without the sanitizer: {last_line(output)}")
        return
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        check.note("sanitize", None, "absent: there is no compute-sanitizer")
        return
    end = time.monotonic() + check.seconds("sanitize")
    options = ["--error-exitcode", "9", "--print-limit", "20"]
    running = {
        name: check.start_process(
            [tool, "--tool", name, *options, *exercise], PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
        for name in TOOLS
    }
    for name, child in running.items():
        status, output = check.finish(child, max(5, end - time.monotonic()))
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.+)", output)
        words = summary[-1] if summary else last_line(output)
        ok = None if status == 124 else status == 0
        check.note(f"sanitize, {name}", ok, words if status != 124 else f"cut short: {words}")


def bench(*names: str) -> Callable[[Check], None]:
    """Benchmark files, in one process."""
    name = ", ".join(names)

    def part(check: Check) -> None:
        files = [f"benchmarks/bench_{n}.py" for n in names]
        command = [*check.python, "-m", "pytest", *files, "-rfEs"]
        status, output = check.run(command, check.seconds(names[0]))
        words = last_line(output).strip("= ")
        check.note(
            name, None if status == 124 else status == 0, words if status != 124 else f"cut short: {words}"
        )

    return part


def train(check: Check) -> None:
    """The example's training with the three losses on the procedural set, cut short if it takes too long."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        common = [*check.python, "examples/train.py", "--loss", "ce,ls,zipf", "--out", str(out)]
        common += ["--cache", str(Path(folder) / "data")]
        sizes = ["--data", "fractals", "--epochs", "12", "--batch-size", "256", "--amp", "bf16"]
        if check.dry:
            sizes = ["--data", "digits", "--epochs", "1", "--limit", "40", "--depth", "8", "--width", "4"]
            sizes += ["--size", "16"]
        status, output = check.run([*common, *sizes], check.seconds("train"))
        epochs = {}
        for path in sorted(out.rglob("*.jsonl")):
            lines = path.read_text().splitlines()
            epochs[path.stem] = [json.loads(line) for line in lines if line.startswith("{")]
        (check.out / "train.json").write_text(json.dumps(epochs) + "\n")
        for name in ("curves.png", "spectra.png"):
            if (out / name).exists():
                shutil.copy(out / name, check.out / name)
    best = []
    for loss, lines in epochs.items():
        accuracy = [line["test_accuracy"] for line in lines if "test_accuracy" in line]
        if accuracy:
            best.append(f"{loss} {100 * max(accuracy):.2f} % after {len(accuracy)} epochs")
    words = ", ".join(best) or last_line(output)
    check.note(
        "train", None if status == 124 else status == 0, words if status != 124 else f"cut short: {words}"
    )


RUN: dict[str, Callable[[Check], None]] = {
    "test": test, "sanitize": sanitize, "loss": bench("loss"), "vote": bench("vote"), "step": bench("step"),
    "train": train,
}  # fmt: skip


def has(check: Check, module: str) -> bool:
    return check.run([*check.python, "-c", f"import {module}"], 30)[0] == 0


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


# What runs under the sanitizer -------------------------------------------------------------------------


def exercise() -> None:
    """Every operator of every GPU backend (on a CPU: of every backend) at small, ragged shapes."""
    import torch

    import zipfls_cuda as zls

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    usable = [b for b in zls.backends() if b in ("cuda", "triton")] if on_gpu else list(zls.backends())
    calls = 0
    for backend in usable:
        for dtype in (torch.float32, torch.bfloat16):
            for N, C, P in ((3, 5, 4), (2, 1000, 49), (2, 10007, 49)):
                g = torch.Generator().manual_seed(0)
                z = torch.randn(N, C, generator=g).to(device, dtype).requires_grad_()
                y = torch.randint(C, (N,), generator=g).to(device)
                votes = torch.randint(C, (N, P), generator=g).int().to(device)
                for options in ({}, {"reduction": "none"}, {"only_correct": True}, {"label_smoothing": 0.1}):
                    z.grad = None
                    loss = zls.zipf_cross_entropy(z, y, votes, backend=backend, **options)
                    (3 * loss.sum()).backward()
                    exact = zls.zipf_cross_entropy(z.detach(), y, votes, backend="reference", **options)
                    torch.testing.assert_close(loss.detach(), exact, rtol=1e-3, atol=1e-3)
                    calls += 1
                zls.zipf_cross_entropy(z, y, None, backend=backend).backward()
                zls.zipf_cross_entropy(z * 1, y, votes, inplace=True, backend=backend).backward()
                soft = torch.nn.functional.one_hot(y, C) * 0.9 + 0.1 / C
                zls.zipf_cross_entropy(z, soft, votes, only_correct=True, backend=backend).backward()
                zls.zipf_cross_entropy(z * 1, soft, votes, inplace=True, backend=backend).backward()
                calls += 3
                zls.rank_votes(votes, C, backend=backend)
                zls.zipf_label(y, votes, C, backend=backend)
            for H, D, C in ((3, 20, 11), (4, 72, 130)):
                features = torch.randn(2, D, H, H, device=device).to(dtype)
                weight = torch.randn(C, D, device=device).to(dtype)
                for x in (features, features.contiguous(memory_format=torch.channels_last)):
                    for upsample in (1, 2):
                        found = zls.dense_vote(x, weight, upsample=upsample, backend=backend)
                        assert 0 <= int(found.min()) <= int(found.max()) < C
                        calls += 1
                zls.dense_vote(features.flatten(2).transpose(1, 2), weight, backend=backend)
    print(f"{calls} calls right on {', '.join(usable) or 'no backend'} ({device})")


# Command line ----------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for records, log and table")
    parser.add_argument("--parts", default="", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--dry", action="store_true", help="walk through it on a CPU at tiny sizes")
    parser.add_argument("--exercise", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.exercise:
        exercise()
        return 0
    if arguments.out is None:
        parser.error("--out is needed: a folder for records, log and table (make gpu-check OUT=dir)")
    parts = re.split(r"[,\s]+", arguments.parts.strip()) if arguments.parts.strip() else list(PARTS)
    unknown = [p for p in parts if p not in PARTS]
    if unknown:
        parser.error(f"unknown part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    check = Check(arguments.out, parts, arguments.dry)

    def stop(number: int, frame: object) -> None:
        for child in check.children:
            if child.process.poll() is None:
                child.kill()
        check.write_table()
        sys.exit(1)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    build(check)
    if check.dry:  # the benchmarks of a dry run share one process
        dry = [p for p in ("loss", "vote", "step") if p in parts]
        parts = [p for p in parts if p not in dry]
        if dry:
            bench(*dry)(check)
    for part in (p for p in PARTS if p in parts):
        if not check.dry and time.monotonic() - check.start > ALL - 20:
            check.note(part, None, "no time left")
            continue
        RUN[part](check)
    print(check.write_table())
    return any(c["ok"] is False for c in check.checks.values())


if __name__ == "__main__":
    sys.exit(main())
