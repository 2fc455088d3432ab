"""Table 1: every method's step runs, what it keeps is counted, and the page shows both devices."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
os.environ.setdefault("ZIPFLS_BENCH_RECORDS", os.devnull)

import bench_methods  # noqa: E402
import clock  # noqa: E402
import records as files  # noqa: E402
import report  # noqa: E402

TITLES = list(bench_methods.NAMES.values())


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """The records of a tiny run."""
    monkeypatch.setattr(clock, "TINY", True)
    path = tmp_path / "tiny.json"
    case = bench_methods.Case(8, 5, 40, size=16, depth=8, width=8, dtype="float32")
    case.run(files.Records(path))
    return files.load(path)


def test_every_method_is_measured_and_reported(measured, tmp_path):
    assert [r["name"] for r in measured] == TITLES
    assert all(r["median"] > 0 and len(r["ratio"]) == len(TITLES) - 1 for r in measured)
    kept = {name: r["facts"]["kept"] for name, r in zip(bench_methods.NAMES, measured, strict=True)}
    assert kept["pskd"] >= 40 * 5 * 4
    assert kept["ctc"] >= 2 * 40 * 128 * 4
    assert kept["ols"] >= 2 * 5 * 5 * 4
    assert kept["mrkd"] > kept["kd"] > 1000, "two copies, one teacher"
    assert kept["rm"] >= 8 * 3 * 16 * 16 * 4
    for name in ("ce", "ls", "zipf", "cskd", "ddgsd", "byot", "maxsup"):
        assert kept[name] <= 16, name
    env = {**measured[0]["env"], "tiny": False}
    on_cpu = [{**r, "env": env} for r in measured]
    on_gpu = [{**r, "env": {**env, "kind": "cuda"}, "median": r["median"] / 4} for r in on_cpu[:3]]
    rows = report.methods_block({Path("a"): on_cpu}).splitlines()
    assert sum(row.startswith("| ") for row in rows) == 2 + len(TITLES)
    (plain,) = [row.split(" | ") for row in rows if row.startswith("| cross-entropy |")]
    assert plain[5:9] == [""] * 4
    both = report.methods_block({Path("a"): on_cpu, Path("b"): on_gpu}).splitlines()
    (plain,) = [row.split(" | ") for row in both if row.startswith("| cross-entropy |")]
    assert plain[2] == plain[6] == "1.00"
    assert float(plain[7]) == pytest.approx(4 * float(plain[3]), rel=0.02)
    assert plain[-1] == "nothing |"
    assert report.methods_block({}) == report.NOTHING
    assert all(torch.isfinite(torch.tensor(r["median"])) for r in measured)


def test_the_page_has_its_place():
    page = (ROOT / "docs" / "BENCHMARKS.md").read_text()
    assert "<!-- report:methods -->" in page
    assert len((ROOT / "benchmarks" / "bench_methods.py").read_text().splitlines()) < 150
