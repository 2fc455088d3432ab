"""The suite itself: what dies or hangs is named, slow tests run when asked for, no test relies on broken kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
MAKEFILE = (ROOT / "Makefile").read_text()

DYING = """
import ctypes, os, signal, pytest

@pytest.mark.parametrize("i", range(8))
def test_before(i): pass

def test_segmentation_fault(): ctypes.string_at(0)
def test_killed(): os.kill(os.getpid(), signal.SIGKILL)
def test_hangs_in_c(): ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock

@pytest.mark.parametrize("i", range(8))
def test_after(i): pass

def test_exits_last(): os._exit(0)
"""


def run(folder: Path, *options: str, **env: str) -> subprocess.CompletedProcess:
    """The tests of a folder, run as make runs them, with the hooks and settings of this suite."""
    (parallel,) = re.findall(r"^PARALLEL := (.*)", MAKEFILE, re.M)
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder), "-o", "faulthandler_timeout=5"]
    command = [sys.executable, "-m", "pytest", *settings, "-p", "workers", "-p", "no:cacheprovider", *options]
    env = (
        {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        | {"PYTHONPATH": str(TESTS)}
        | env
    )
    command += [*parallel.replace("$(JOBS)", "2").split(), str(folder)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)


def test_tests_that_die_or_hang_are_named(tmp_path):
    (tmp_path / "test_dying.py").write_text(DYING)
    done = run(tmp_path)
    assert done.returncode == 1, done.stdout
    failed = set(re.findall(r"^FAILED test_dying.py::(\S+) - worker .* crashed", done.stdout, re.M))
    assert failed == {"test_segmentation_fault", "test_killed", "test_hangs_in_c", "test_exits_last"}
    assert "4 failed, 16 passed" in done.stdout
    assert "INTERNALERROR" not in done.stdout + done.stderr
    assert re.search(r"Timeout .*in test_hangs_in_c", done.stderr, re.S)  # stacks


@pytest.mark.parametrize(
    "when",
    [
        "os._exit(0)",
        "def pytest_collection(): time.sleep(600)",
        "def pytest_sessionfinish(): time.sleep(600)",
    ],
    ids=["dies at its start", "hangs while it collects", "hangs after its tests"],
)
def test_a_worker_lost_outside_of_tests_fails_the_run(tmp_path, when):
    (tmp_path / "conftest.py").write_text(
        f"import os, time\nif os.environ.get('PYTEST_XDIST_WORKER') == 'gw0':\n    {when}\n"
    )
    (tmp_path / "test_right.py").write_text("def test_right(): pass\ndef test_too(): pass\n")
    done = run(tmp_path)
    assert done.returncode == 1, done.stdout
    assert "workers that died" in done.stdout
    assert "gw0: Not properly terminated" in done.stdout
    assert "2 passed" in done.stdout
    assert "INTERNALERROR" not in done.stdout + done.stderr
