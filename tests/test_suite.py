"""The suite itself: what dies or hangs is named, slow tests run when asked for; doctests, types, widths."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
TESTS = Path(__file__).parent
ROOT = TESTS.parent
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make, whose command is looked at")

DYING = """
import ctypes, os, signal, warnings, pytest

@pytest.mark.parametrize("i", range(8))
def test_before(i): pass

def test_segmentation_fault(): ctypes.string_at(0)
def test_killed(): os.kill(os.getpid(), signal.SIGKILL)
def test_hangs_in_c(): ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock

@pytest.mark.parametrize("i", range(8))
def test_after(i): pass

def test_warns():
    warnings.warn("of a class", type("Strange", (UserWarning,), {"__module__": "not_to_be_imported"}))

def test_exits_last(): os._exit(0)
"""


def run(folder: Path) -> subprocess.CompletedProcess:
    """The tests of a folder, run as make runs them, with the hooks and settings of this suite."""
    said = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (parallel,) = re.findall(r"python -m pytest (.*)", said)
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder), "-o", "faulthandler_timeout=5"]
    command = [sys.executable, "-m", "pytest", *settings, "-p", "workers", "-p", "no:cacheprovider"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": str(TESTS)}
    command += [*parallel.split(), str(folder)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)


@needs_make
def test_tests_that_die_or_hang_are_named(tmp_path):
    (tmp_path / "test_dying.py").write_text(DYING)
    done = run(tmp_path)
    assert done.returncode == 1, done.stdout
    failed = set(re.findall(r"^FAILED test_dying.py::(\S+) - worker .* crashed", done.stdout, re.M))
    assert failed == {"test_segmentation_fault", "test_killed", "test_hangs_in_c", "test_exits_last"}
    assert "4 failed, 17 passed" in done.stdout
    assert "INTERNALERROR" not in done.stdout + done.stderr
    assert "UserWarning: Strange: of a class" in done.stdout
    assert re.search(r"Timeout .*in test_hangs_in_c", done.stderr, re.S)  # stacks


@needs_make
@pytest.mark.parametrize(
    "when",
    [
        "os._exit(0)",
        pytest.param("def pytest_collection(): time.sleep(600)", marks=pytest.mark.slow),
        pytest.param("def pytest_sessionfinish(): time.sleep(600)", marks=pytest.mark.slow),
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


SLOW = ("test_slow[0]", "test_slow[1]")


@pytest.mark.parametrize(
    ("chosen", "runs"),
    [
        ((), {"test_quick"}),
        (("-m", "slow"), {"test_slow[0]", "test_slow[1]", "test_cases[reference]"}),
        (("--backend", "reference"), {"test_quick", "test_slow[0]", "test_slow[1]", "test_cases[reference]"}),
        (("test_it.py::test_slow[1]",), {"test_slow[1]"}),
        (
            ("./test_it.py::test_slow", "test_it.py::test_quick"),
            {"test_quick", "test_slow[0]", "test_slow[1]"},
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_slow_tests_run_when_asked_for(pytester, monkeypatch, chosen, runs):
    pytester.makepyfile(
        test_it="""
        import pytest
        def test_quick(): pass
        @pytest.mark.slow
        @pytest.mark.parametrize("i", range(2))
        def test_slow(i): pass
        @pytest.mark.slow
        def test_cases(backend): pass
        """
    )
    conftest = sys.modules["conftest"]
    monkeypatch.setattr(conftest.zls, "backends", lambda: ("reference",))
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(pytester.path), "-p", "no:faulthandler"]
    done = pytester.inline_run(*chosen, *settings, "-p", "no:cacheprovider", plugins=[conftest])
    assert done.ret == 0
    assert {report.nodeid.partition("::")[2] for report in done.listoutcomes()[0]} == runs


def test_convolutions_are_wide_enough():
    """8 channels or more, as CONTRIBUTING.md says: fewer break in torch on processors without AVX-512."""
    narrow = []
    for path in (
        p
        for folder in ("tests", "examples", "experiments", "benchmarks")
        for p in (ROOT / folder).glob("*.py")
    ):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            widths = []
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Conv2d"):
                widths = node.args[:2]
            elif isinstance(node, ast.keyword) and node.arg in ("width", "channels"):
                widths = [node.value]
            widths = [w.value for w in widths if isinstance(w, ast.Constant)]
            if len(widths) == 2 and widths[0] == 3:  # images
                del widths[0]
            narrow += [f"{path.name}:{node.lineno}: {w} channels" for w in widths if w < 8]
        if path.name != "test_experiments.py":  # which shows that they are refused
            narrow += [f"{path.name}: {found}" for found in re.findall(r"--width[ \",]+[0-7]\b", text)]
    assert not narrow, "\n".join(narrow)
