"""gpu-check, as far as it can be tried without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import harness  # noqa: E402
import targets  # noqa: E402


@pytest.fixture(autouse=True)
def _no_worker(monkeypatch):
    """Runs of pytest started here are no workers of ours: pytest-benchmark would disable itself in them."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)


def test_gpu_check_dry_run(tmp_path):
    """The whole of it, on a CPU, at tiny sizes."""
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--dry", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    names = os.listdir(out)
    assert len(names) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    assert {"table.md", "records.json", "log.txt", "checks.json", "train.json"} <= set(names)
    table = (out / "table.md").read_text()
    assert table.strip() in done.stdout
    for target in targets.TARGETS:
        if target.kind == "cuda":
            assert f"{target.group}: {target.text} | {target.target}" in table
    checks = json.loads((out / "checks.json").read_text())
    assert set(checks) == {"build", "test", "sanitize", "loss, vote, step", "train"}
    assert all(c["ok"] is not False for c in checks.values())
    records = harness.load(out / "records.json")
    assert {r["bench"] for r in records} == {"ceiling", "launches", "loss", "vote", "step", "head"}
    assert all(set(harness.RECORD) <= set(r) for r in records)
    assert all(r["env"]["tiny"] for r in records)


def test_gpu_check_refuses_unknown_parts(tmp_path):
    script = str(ROOT / "benchmarks" / "gpu_check.py")
    for arguments, words in (["--parts", "los"], "unknown part los"), ([], "--out is needed"):
        where = ["--out", str(tmp_path)] if arguments else []
        command = [sys.executable, script, *where, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert words in done.stderr
