"""benchmarks/tune.py, as far as it goes without a GPU: the variants apply, its calls are the kernels'."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("tune", ROOT / "benchmarks" / "tune.py")
tune = importlib.util.module_from_spec(SPEC)
sys.modules["tune"] = tune
SPEC.loader.exec_module(tune)

VARIANTS = [(kind, v) for kind, variants in tune.VARIANTS.items() for v in variants]


@pytest.mark.parametrize(("kind", "variant"), VARIANTS, ids=lambda x: getattr(x, "name", x))
def test_variant_applies(tmp_path, kind, variant):
    """Its replacements still find their text, once, and change it."""
    kernels = shutil.copytree(tune.KERNELS, tmp_path / "cuda")
    before = {p.name: p.read_text() for p in kernels.iterdir()}
    tune.varied(kernels, variant)
    changed = {p.name for p in kernels.iterdir() if p.read_text() != before[p.name]}
    assert changed == {file for file, *_ in variant.edits}


def test_variant_that_finds_nothing_is_named(tmp_path):
    kernels = shutil.copytree(tune.KERNELS, tmp_path / "cuda")
    with pytest.raises(ValueError, match=r"gone: tuning.h has 0 times 'no such text'"):
        tune.varied(kernels, tune.swap("gone", "tuning.h", "no such text", ""))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to compile the CUDA kernels with")
@pytest.mark.parametrize("kind", tune.CALLS)
def test_calls_are_what_the_kernels_take(tmp_path, kind):
    command = [*tune.command(kind, "90a", tune.KERNELS), "-c", "-o", str(tmp_path / "tune.o")]
    subprocess.run([*command, "-Werror", "all-warnings"], check=True)
    other = f"-DTUNE_CALL_BYTES={8 * len(tune.CALLS[kind]._fields_) + 8}"
    assert subprocess.run([*command, "-U", "TUNE_CALL_BYTES", other], capture_output=True).returncode != 0


def test_disagreement():
    votes = torch.arange(10000, dtype=torch.int32)
    few, many = votes.clone(), votes.clone()
    few[:5], many[:500] = -1, -1
    assert tune.disagreement("vote", [few], [votes]) == ""
    assert tune.disagreement("vote", [many], [votes]) == "5.00% of the votes differ"
    parts, grad = torch.ones(3), torch.full((4, 5000), 1e-4)
    grad[:, 7] = -0.25  # as targets are
    assert tune.disagreement("loss", [parts, grad * 1.001], [parts, grad]) == ""
    assert tune.disagreement("loss", [parts * 2, grad], [parts, grad]) == "the loss is 2, not 1"
    for wrong in (grad * torch.nan, grad * (grad < 0), grad * (grad > 0)):  # the last: without targets
        assert "of the gradient" in tune.disagreement("loss", [parts, wrong], [parts, grad])


def test_a_variant_that_fails_costs_its_own_row(monkeypatch):
    class Problem:
        def __init__(self, kind, size):
            pass

        def results(self, kernels):
            if kernels == "b.so":
                raise RuntimeError("CUDA error 700")
            return [torch.zeros(5, dtype=torch.int32)]

        def time(self, kernels):
            return {"a.so": 2.0, "c.so": 1.0}[kernels]

    monkeypatch.setattr(tune, "Problem", Problem)
    monkeypatch.setattr(tune.ctypes, "CDLL", str)
    libraries = {"as it is": Path("a.so"), "kStagger 1": Path("b.so"), "without fold": Path("c.so")}
    rows = tune.measure("vote", "a", (), libraries)
    assert [row["ratio"] for row in rows] == [1.0, None, 0.5]
    assert [row["wrong"] for row in rows] == ["", "CUDA error 700", "left out"]
    assert "! kStagger 1, a: CUDA error 700" in tune.table("vote", rows)
    broken = {"as it is": Path("b.so"), "without fold": Path("c.so")}
    assert len(tune.measure("vote", "a", (), broken)) == 1  # nothing to compare with


def test_table():
    rows = [
        {"case": "a", "variant": "as it is", "seconds": 1e-5, "ratio": 1.0, "wrong": ""},
        {"case": "a", "variant": "x 3", "seconds": 9e-6, "ratio": 0.9, "wrong": "the loss is 2, not 1"},
        {"case": "a", "variant": "without y", "seconds": 8e-6, "ratio": 0.8, "wrong": "left out"},
    ]
    lines = tune.table("loss", rows).splitlines()
    assert [line.split()[-1] for line in lines[:4]] == ["a", "us", "0.900!", "0.800"]
    assert lines[4:] == ["! x 3, a: the loss is 2, not 1"]
