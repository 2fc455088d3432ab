"""gpu-check, as far as it can be tried without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import zipfls_cuda as zls

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
import records as files  # noqa: E402
import targets  # noqa: E402


@pytest.fixture(autouse=True)
def _no_worker(monkeypatch):
    """Runs of pytest started here are no workers of ours: pytest-benchmark would disable itself in them."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
def test_gpu_check_dry_run(tmp_path):
    """The whole of it, on a CPU, at tiny sizes."""
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--dry", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    names = os.listdir(out)
    assert set(names) == {"table.md", "records.json", "log.txt", "checks.json", "efficacy.json"}
    table = (out / "table.md").read_text()
    assert table.strip() in done.stdout
    for target in targets.TARGETS:
        if target.kind == "cuda":
            assert f"{target.group}: {target.text} | {target.target}" in table
    checks = json.loads((out / "checks.json").read_text())
    absent = {"cuda", "triton", "memcheck", "sanitize", "tune"}
    done = {
        "exercise, cpu",
        "loss",
        "vote",
        "distill",
        "linear",
        "methods",
        "step",
        "train",
        "reference, suite",
    }
    assert set(checks) == {"build"} | absent | done
    assert all(checks[name]["ok"] is True for name in done), checks
    assert all(checks[name]["text"].startswith("absent") for name in absent)
    records = files.load(out / "records.json")
    assert {r["bench"] for r in records} == {
        "ceiling",
        "loss",
        "vote",
        "distill",
        "linear",
        "methods",
        "step",
        "head",
    }
    assert all(set(files.RECORD) <= set(r) for r in records)
    assert all(r["env"]["tiny"] for r in records)


def test_gpu_check_refuses_unknown_parts(tmp_path):
    script = str(ROOT / "benchmarks" / "gpu_check.py")
    for arguments, words in (["--parts", "los"], "unknown part los"), ([], "--out is needed"):
        where = ["--out", str(tmp_path)] if arguments else []
        command = [sys.executable, script, *where, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert words in done.stderr


# Pieces of it, with made-up programs in the place of compilers, GPUs and sanitizers ----------------------


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport os, sys, time\n{text}\n")
    path.chmod(0o755)
    return path


def make_check(tmp_path, text="", *, parts=("cuda",), seconds=60.0, usable=("cuda", "triton")):
    """A check whose Python is a program of ours."""
    found = gpu_check.Check(tmp_path / "out", list(parts), False, seconds)
    found.python, found.usable = [str(program(tmp_path / "bin" / "python", text))], list(usable)
    return found


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A folder that is first on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture(autouse=True)
def _no_table(monkeypatch):
    """The table takes seconds, and the dry run has one."""
    monkeypatch.setattr(gpu_check.Check, "table", lambda self: "")


PYTEST_OUTPUT = """\
zipfls_cuda backends: cuda: tested
[gw0] [ 10%] PASSED tests/test_gpu.py::test_a[cuda-only correct]
[gw13] [ 20%] FAILED tests/test_gpu.py::test_a[cuda-smoothed, weighted]
[gw1] [100%] SKIPPED tests/test_vote.py::test_b[cuda-(2, 16, 3, 3, 10)-torch.float32]
tests/test_loss.py::test_c[cuda-(5, 8) x] PASSED                    [ 40%]
tests/test_loss.py::test_d ERROR
tests/test_loss.py::test_e PASSED
tests/test_loss.py::test_e ERROR
=== short test summary info ===
FAILED tests/test_gpu.py::test_a[cuda-smoothed, weighted] - assert
tests/test_loss.py::test_hangs """


def test_outcomes_are_read_as_they_come():
    assert gpu_check.outcomes(PYTEST_OUTPUT) == {
        "tests/test_gpu.py::test_a[cuda-only correct]": "PASSED",
        "tests/test_gpu.py::test_a[cuda-smoothed, weighted]": "FAILED",
        "tests/test_vote.py::test_b[cuda-(2, 16, 3, 3, 10)-torch.float32]": "SKIPPED",
        "tests/test_loss.py::test_c[cuda-(5, 8) x]": "PASSED",
        "tests/test_loss.py::test_d": "ERROR",
        "tests/test_loss.py::test_e": "ERROR",
    }


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["plain", "xdist"])
def test_outcomes_of_pytest_itself(tmp_path, workers):
    """Its lines are what `outcomes` takes them for, with xdist and without."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', ['a b', '(1, 2)'])\ndef test_x(x): assert x == 'a b'\n"
        "def test_y(): pytest.skip('so')\n"
        "@pytest.fixture\ndef bad(): raise ValueError\n"
        "def test_z(bad): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "tests", "-v", "-p", "no:cacheprovider", *workers]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120).stdout
    name = "tests/test_x.py::test_"
    assert gpu_check.outcomes(output) == {
        f"{name}x[a b]": "PASSED", f"{name}x[(1, 2)]": "FAILED", f"{name}y": "SKIPPED", f"{name}z": "ERROR",
    }  # fmt: skip


HANGS = f"print({PYTEST_OUTPUT!r}, flush=True); time.sleep(60)"


def test_what_hangs_keeps_its_output_and_its_limit(tmp_path, monkeypatch):
    """Each group of tests has its limit; what it printed before counts; the next group has its turn."""
    monkeypatch.setattr(gpu_check, "LEAST", 1)
    check = make_check(tmp_path, HANGS, seconds=gpu_check.SPARE + 4)
    start = time.monotonic()
    gpu_check.run_part(check, "cuda")
    assert time.monotonic() - start < 6
    for name in ("cuda, GPU only", "cuda, suite"):
        assert check.checks[name]["ok"] is False
        assert check.checks[name]["text"].startswith(
            "cut short: 2 passed, 1 failed, 2 error, 1 skipped; first:"
        )
    assert "\ntests/test_loss.py::test_hangs " in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.parametrize(
    "text,ok",
    [
        ("print('tests/test_vote.py::a PASSED')", True),
        ("print('tests/test_vote.py::a PASSED', flush=True); time.sleep(60)", None),
        ("print('tests/test_vote.py::a PASSED'); sys.exit(2)", False),
        ("print('tests/test_vote.py::a FAILED'); sys.exit(1)", False),
        ("pass", False),
    ],
)
def test_verdict_on_tests(tmp_path, text, ok):
    check = make_check(tmp_path, text)
    gpu_check.run_tests(check, "x", "cuda", ["vote"], 1, 3)
    assert check.checks["x"]["ok"] is ok


def test_commands_of_the_tests(tmp_path, monkeypatch):
    """Files in order and backends apart; no option of a plugin that is not there."""
    commands = []
    monkeypatch.setattr(
        gpu_check.Check, "run", lambda self, command, limit: commands.append(command) or (0, "")
    )
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for there in (True, False):
        monkeypatch.setattr(gpu_check, "installed", lambda module, there=there: there)
        check = make_check(tmp_path, parts=["cuda", "triton", "reference"])
        for part in ("cuda", "triton", "reference"):
            gpu_check.run_part(check, part)
    files = [[Path(c).stem for c in command if c.startswith("tests/")] for command in commands]
    suite = [f"test_{f}" for f in gpu_check.SUITE]
    assert files[:5] == [["test_gpu"], suite, ["test_gpu"], ["test_triton", *suite], suite]
    assert files[6] == [f for f in suite if f != "test_properties"]
    backends = [command[command.index("--backend") + 1] for command in commands]
    assert backends[:5] == ["cuda", "cuda", "triton", "triton", "reference"]
    assert [command[command.index("-n") + 1] for command in commands[:5]] == ["4", "14", "4", "14", "14"]
    for i, command in enumerate(commands):
        assert "addopts=--strict-markers" in command
        for option in ("-n", "--timeout", "--benchmark-disable"):
            assert (option in command) == (i < 5)
    for name in {f for some in files for f in some}:
        assert (ROOT / "tests" / f"{name}.py").exists()


def test_a_backend_that_is_not_there_is_absent(tmp_path):
    check = make_check(tmp_path, parts=["cuda", "exercise"], usable=["triton"])
    gpu_check.run_part(check, "cuda")
    assert check.checks["cuda"]["ok"] is None
    gpu_check.run_part(check, "exercise")
    assert set(check.checks) == {"cuda", "exercise, triton"}


def test_children_die_with_all_they_started(tmp_path):
    """One that ignores the request to stop, with a child of its own; both in our session."""
    text = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "pid = os.fork()\n"
        "if pid: print(pid, flush=True)\n"
        "time.sleep(60)"
    )
    check = make_check(tmp_path, text)
    child = check.start_process(check.python)
    while not (line := child.output()):
        time.sleep(0.05)
    pids = [child.process.pid, int(line)]
    assert [os.getsid(pid) for pid in pids] == [os.getsid(0)] * 2
    assert {os.getpgid(pid) for pid in pids} == {child.process.pid}
    start = time.monotonic()
    child.kill(0.5)
    assert time.monotonic() - start < 3
    assert child.process.returncode == -signal.SIGKILL
    time.sleep(0.2)
    stat = Path(f"/proc/{pids[1]}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_what_is_cut_short_may_say_what_it_knows(tmp_path):
    text = "try: print('begun', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: print('so far')"
    check = make_check(tmp_path, text)
    status, output = check.run(check.python, 5)
    assert (status, output) == (124, "begun\nso far\n")


def test_a_process_that_cannot_be_killed_is_not_waited_for(tmp_path, monkeypatch):
    """As one stuck in the driver."""
    check = make_check(tmp_path, "time.sleep(60)")
    child = check.start_process(check.python)
    with monkeypatch.context() as m:
        m.setattr(os, "killpg", lambda *_: None)
        start = time.monotonic()
        child.kill()
        assert time.monotonic() - start < 3
    child.kill()


def test_parts_share_the_time_that_is_left(tmp_path, monkeypatch):
    parts = list(gpu_check.PARTS)
    check = make_check(tmp_path, parts=parts, seconds=560)
    monkeypatch.setattr(gpu_check.Check, "left", lambda self: left)
    left = 500.0
    need = {part: seconds for part, (seconds, *_) in gpu_check.PARTS.items()}
    assert check.share("loss") == need["loss"]  # less than all that follow need: first come
    left = 5000.0
    assert check.share("exercise") == pytest.approx(5000 * need["exercise"] / sum(need.values()))
    assert check.share("reference") == 5000
    left = 20.0
    assert all(check.share(part) == 20 for part in parts)


def test_a_machine_that_hangs_all_over_takes_no_longer(tmp_path, path, monkeypatch):
    """Nothing ends by itself, or when asked: all the parts together stay within the seconds."""
    stubborn = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    program(path / "compute-sanitizer", stubborn)
    short = {part: (0.5, *rest) for part, (_, *rest) in gpu_check.PARTS.items()}
    monkeypatch.setattr(gpu_check, "PARTS", short)
    started, start = [], gpu_check.Check.start_process
    monkeypatch.setattr(
        gpu_check.Check,
        "start_process",
        lambda *args, **more: started.append(start(*args, **more)) or started[-1],
    )
    monkeypatch.setattr(gpu_check, "LEAST", 0.4)
    seconds = gpu_check.SPARE + 6
    check = make_check(tmp_path, stubborn, parts=gpu_check.PARTS, seconds=seconds)
    gpu_check.run_parts(check)
    assert time.monotonic() - check.start < seconds
    assert {c["ok"] for c in check.checks.values()} == {None}
    assert sum("cut short" in c["text"] for c in check.checks.values()) > 5
    assert len(started) > 5
    assert all(child.process.returncode == -signal.SIGKILL for child in started)


def test_no_part_begins_without_time(tmp_path):
    check = make_check(tmp_path, parts=["exercise"], seconds=gpu_check.SPARE + gpu_check.LEAST - 1)
    gpu_check.run_parts(check)
    assert check.checks["exercise"]["text"] == "no time left"
    check = make_check(tmp_path, "print('3 calls right')", parts=["exercise"])
    gpu_check.run_parts(check)
    assert {name: c["ok"] for name, c in check.checks.items()} == {
        "exercise, cuda": True,
        "exercise, triton": True,
    }


def test_what_passed_is_not_repeated(tmp_path, monkeypatch):
    """Unless with other sources; what failed or was cut short is."""
    done = []
    monkeypatch.setattr(gpu_check, "run_tests", lambda check, name, *_: done.append(name))
    for ok, source, repeated in (
        (True, None, False), (True, "other", True), (False, None, True), (None, None, True),
    ):  # fmt: skip
        check = make_check(tmp_path)
        check.source = source or check.source
        check.note("cuda, suite", ok, "")
        done.clear()
        gpu_check.run_part(make_check(tmp_path), "cuda")
        assert done == ["cuda, GPU only"] + ["cuda, suite"] * repeated


BUILD = """
if "setup.py" in sys.argv:
    names = ("ZIPFLS_BUILD", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")
    print(*(os.environ[n] for n in names), os.environ["PATH"].split(os.pathsep)[0])
    sys.exit(FAIL)
print("  cuda      usable\\n  triton    not usable: no compiler\\n  cpu       usable")
"""


@pytest.mark.parametrize(
    "smi,arch",
    [("print('9.0')", "9.0a"), ("print('8.0\\n8.0')", "8.0"), ("print('12.0')", "12.0a"),
     ("print('N/A')", "9.0a"), (None, "9.0a")],
)  # fmt: skip
def test_build_is_for_the_gpu_that_is_there(tmp_path, path, monkeypatch, smi, arch):
    if smi is None:
        monkeypatch.setenv("PATH", str(path))
    else:
        program(path / "nvidia-smi", smi)
    check = make_check(tmp_path, BUILD.replace("FAIL", "0"))
    assert gpu_check.build(check)
    output = (tmp_path / "out" / "log.txt").read_text()
    assert f"cuda {arch} {os.cpu_count()} {Path(sys.executable).parent}\n" in output
    assert check.checks["build"]["ok"] is True
    assert check.checks["backends"]["ok"] is False
    assert check.checks["backends"]["text"] == "triton not usable: no compiler"
    assert check.usable == ["cuda"]


def test_nothing_follows_a_build_that_failed(tmp_path, monkeypatch):
    python = program(tmp_path / "bin" / "python", BUILD.replace("FAIL", "3"))
    monkeypatch.setattr(gpu_check.sys, "executable", str(python))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu_check, "run_parts", lambda check: pytest.fail("went on"))
    assert gpu_check.main() == 1


def test_a_call_that_is_ended_ends_what_it_runs(tmp_path, monkeypatch, capsys):
    """By SIGTERM or from the keyboard: what was printed is in the log, and there is a table."""
    children = []

    def interrupted(check):
        command = [sys.executable, "-c", "print('so far', flush=True); import time; time.sleep(60)"]
        children.append(child := check.start_process(command))
        while not child.output():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry", "--out", str(tmp_path)])
    monkeypatch.setattr(gpu_check, "run_parts", interrupted)
    monkeypatch.setattr(gpu_check.Check, "table", lambda self: "the table")
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit):
            gpu_check.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert children[0].process.returncode == -signal.SIGKILL
    assert "so far\n" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "table.md").read_text() == "the table"
    assert "the table" in capsys.readouterr().out


def test_both_backends_must_be_usable(tmp_path):
    check = make_check(tmp_path, "print('  cuda      usable\\n  triton    usable')")
    assert gpu_check.build(check)
    assert check.checks["backends"] | {"source": ""} == {
        "ok": True, "text": "cuda, triton", "source": "",
    }  # fmt: skip


RIGHT = "12 calls right on cuda (cuda)\n"
OURS = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void zipfls::cuda::vote::pack_kernel<(int)2>(PackArgs)+0x380 in vote.cu:61
=========     by thread (65,0,0) in block (0,0,0)
=========     Access at 0x7bd889c03041 is misaligned
========= ERROR SUMMARY: 1 error
"""
RACE = """\
========= Error: Race reported between Write access at loss_fwd_long_kernel+0x150 in loss.py:27
=========     and Read access at loss_fwd_long_kernel+0x160 in loss.py:30 [4194304 hazards]
"""
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<(int)4>(int)"
REDUCE = "void cub::DeviceReduceKernel<(int)256>(int *)"
OTHERS = f"""\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at {ELEMENTWISE}+0x130
=========     by thread (0,0,0) in block (0,0,0)
========= Error: Race reported between Write access at 0xa60 in {REDUCE}
=========     and Read access at 0xcc0 in {REDUCE} [28 hazards]
========= Program hit cudaErrorNotSupported (error 801) due to "not supported" on CUDA API call to x.
========= ERROR SUMMARY: 3 errors
"""
REFUSED = "========= Error: Device not supported. Please refer to the documentation\n"


@pytest.mark.parametrize(
    "status,output,ok,words",
    [
        (0, RIGHT, True, "12 calls right on cuda (cuda)"),
        (0, OTHERS + RIGHT, True, f"3 reports of others: {ELEMENTWISE}, {REDUCE}, no kernel"),
        (0, OURS + OTHERS + RIGHT, False, "1 reports of our kernels: void zipfls::cuda::vote::pack_kernel<"),
        (0, RACE + RIGHT, False, "1 reports of our kernels: loss_fwd_long_kernel"),
        (1, "AssertionError: votes\n", False, "the calls ended early: AssertionError: votes"),
        (124, "cuda loss\n", None, "cut short: the calls ended early: cuda loss"),
        (124, OURS, False, "1 reports of our kernels"),
        (255, REFUSED, None, "absent: the sanitizer cannot watch this device"),
    ],
)  # fmt: skip
def test_verdict_of_the_sanitizer(status, output, ok, words):
    found = gpu_check.verdict(status, output)
    assert found[0] is ok
    assert words in found[1]


def test_our_kernels_are_known_by_their_names():
    kernels = [
        name
        for file in (ROOT / "zipfls_cuda" / "triton_kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)
    ]
    assert len(kernels) > 10
    assert all(gpu_check.OWN.search(name) for name in kernels), kernels
    foreign = "nll_loss_forward_reduce_cuda_kernel_2d unrolled_elementwise_kernel softmax_warp_forward"
    assert not gpu_check.OWN.search(foreign)
    assert all(gpu_check.FILTERS["triton"] in name for name in kernels)
    for file in (ROOT / "csrc" / "cuda").glob("*.cu"):
        assert f"namespace {gpu_check.FILTERS['cuda']}" in file.read_text()


def test_the_sanitizer_runs_the_exercise_of_each_backend_by_itself(tmp_path, path):
    """Filtered by kernel, but where it must see all that is written."""
    program(path / "compute-sanitizer", "print(*sys.argv[1:]); print('1 calls right')")
    check = make_check(tmp_path, parts=["memcheck", "sanitize"])
    for part in ("memcheck", "sanitize"):
        gpu_check.run_part(check, part)
    assert {c["ok"] for c in check.checks.values()} == {True}
    tools = ("memcheck", "racecheck", "synccheck", "initcheck")
    assert set(check.checks) == {f"{tool}, {backend}" for tool in tools for backend in ("cuda", "triton")}
    for line in (tmp_path / "out" / "log.txt").read_text().splitlines():
        if line.startswith("--tool"):
            backend = line.split()[-1]
            assert (f"--kernel-name kns={gpu_check.FILTERS[backend]}" in line) == ("initcheck" not in line)
            assert f"gpu_check.py --exercise {backend}" in line


def test_the_exercise_calls_every_operator_and_says_what_is_wrong(monkeypatch, capsys):
    from zipfls_cuda import check, ops

    for name in ("RUNS", "RUNS_INTERPRETED"):
        monkeypatch.setattr(check, name, getattr(check, name))
    gpu_check.exercise("cpu")
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"{len(printed) - 1} calls right on cpu (cpu)"
    called = {line.split()[2] for line in printed[:-1]}
    assert called >= {operator for operator, backend in ops.OPERATORS if backend == "cpu"}
    monkeypatch.setattr(check, "check_row", lambda row: {"failure": "loss differs"})
    with pytest.raises(AssertionError, match="loss differs"):
        gpu_check.exercise("cpu")


@pytest.mark.parametrize("status", [0, 1])
def test_tune_for_the_gpu_that_is_there(tmp_path, path, status):
    program(path / "nvcc", "")
    program(path / "nvidia-smi", "print('9.0')")
    check = make_check(tmp_path, f"print(*sys.argv); sys.exit({status})", parts=("tune",))
    gpu_check.run_part(check, "tune")
    assert check.checks["tune"]["ok"] is (status == 0)
    assert f"--out {check.out / 'tune.json'} --arch 90a" in (check.out / "log.txt").read_text()


def test_what_the_gpu_tests_compute_runs_on_a_cpu(monkeypatch):
    """The steps of tests/test_gpu.py over backend "cpu" in a GPU's place, as the reference computes them."""
    if "cpu" not in zls.backends():
        pytest.skip("the C++ extension is not built")
    spec = importlib.util.spec_from_file_location("gpu_tests", ROOT / "tests" / "test_gpu.py")
    gpu_tests = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, "is_available", lambda: True)
        spec.loader.exec_module(gpu_tests)
    device = torch.device("cpu")
    for name in gpu_tests.OPTIONS:
        made = []
        for backend in ("cpu", "reference"):
            torch.manual_seed(0)
            options = {} if "place" not in name else {"inplace": backend == "cpu"}
            with monkeypatch.context() as m:
                m.setitem(gpu_tests.OPTIONS, name, gpu_tests.OPTIONS[name] | options)
                inputs, step = gpu_tests.step_of(name, backend, 6, 37, 16, torch.float32, device)
            gpu_tests.fresh(inputs)
            made.append(step())
        torch.testing.assert_close(*made)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        gpu_tests.test_distillation_of_large_rows("cpu", device, 9, 2049, dtype)
