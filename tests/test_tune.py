"""benchmarks/tune.py, as far as it goes without a GPU: the variants apply, its calls are the kernels'."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
SPEC = importlib.util.spec_from_file_location("tune", ROOT / "benchmarks" / "tune.py")
tune = importlib.util.module_from_spec(SPEC)
sys.modules["tune"] = tune
SPEC.loader.exec_module(tune)

VARIANTS = [(kind, v) for kind, variants in tune.VARIANTS.items() for v in variants]


@pytest.mark.parametrize(("kind", "variant"), VARIANTS, ids=lambda x: getattr(x, "name", x))
def test_variant_applies(tmp_path, kind, variant):
    """Its replacement still finds its text, once, and changes it."""
    kernels = shutil.copytree(tune.KERNELS, tmp_path / "cuda")
    before = {p.name: p.read_text() for p in kernels.iterdir()}
    tune.varied(kernels, variant)
    changed = {p.name for p in kernels.iterdir() if p.read_text() != before[p.name]}
    assert changed == {variant.file} - {""}


def test_variant_that_finds_nothing_is_named(tmp_path):
    kernels = shutil.copytree(tune.KERNELS, tmp_path / "cuda")
    with pytest.raises(ValueError, match=r"gone: tuning.h has 0 times 'no such text'"):
        tune.varied(kernels, tune.Variant("gone", "tuning.h", "no such text", ""))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to compile the CUDA kernels with")
@pytest.mark.parametrize("kind", tune.VARIANTS)
def test_the_functions_that_are_tuned_compile(tmp_path, kind):
    command = [*tune.command(kind, "90a", tune.KERNELS), "-c", "-o", str(tmp_path / "tune.o")]
    subprocess.run([*command, "-Werror", "all-warnings"], check=True)


@pytest.mark.parametrize(
    ("kind", "size"),
    [("loss", (3, 20)), ("vote", (2, 8, 3, 5, "channels_last")), ("vote", (2, 8, 3, 5, "NCHW"))],
)
def test_calls_are_what_the_kernels_take(kind, size):
    """A pointer where tune.cu has one, and a number where it has one."""
    made = {"loss": tune.Problem._loss, "vote": tune.Problem._vote}[kind](*size)[0]
    source = (ROOT / "benchmarks" / "tune.cu").read_text().partition(f"#ifdef TUNE_{kind.upper()}")[2]
    signature = re.sub(r"//.*", "", re.search(r"tune_run\((.*?)\) \{", source, re.S)[1])
    *taken, stream = (" ".join(argument.split()) for argument in signature.split(","))
    assert stream == "cudaStream_t stream"
    assert ["*" in argument for argument in taken] == [torch.is_tensor(x) for x in made]


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
        """On the CPU: b computes nothing, c and d something else, e fails when it is timed."""

        def __init__(self, kind, size):
            self.calls, self.timed = [0, 1], False

        def run(self, kernels, k):
            if kernels == "e.so":
                raise RuntimeError("CUDA error 1")

        def results(self, kernels):
            if kernels == "b.so":
                raise RuntimeError("CUDA error 700")
            return [torch.full((5,), int(kernels in ("c.so", "d.so")), dtype=torch.int32)]

    monkeypatch.setattr(tune, "Problem", Problem)
    monkeypatch.setattr(tune.ctypes, "CDLL", str)
    monkeypatch.setattr(tune.clock, "TINY", True)
    names = {
        "as it is": "a",
        "kStagger 1": "b",
        "without combine": "c",
        "kStagger 3": "d",
        "kWideStages 3": "e",
    }
    libraries = {name: Path(f"{file}.so") for name, file in names.items()}
    timer = tune.clock.HostClock()
    rows = tune.measure("vote", "a", (), libraries, timer)
    assert [row["variant"] for row in rows] == list(names)
    assert [row["seconds"] is None for row in rows] == [False, True, False, False, True]
    assert rows[0]["ratio"] == 1
    assert all((row["ratio"] is None) == (row["seconds"] is None) for row in rows)
    words = ["", "CUDA error 700", "", "100.00% of the votes differ", "CUDA error 1"]
    assert all(
        word in row["wrong"] and bool(word) == bool(row["wrong"])
        for word, row in zip(words, rows, strict=True)
    )
    assert "! kStagger 1, a: CUDA error 700" in tune.table("vote", rows)
    rows = tune.measure("vote", "a", (), libraries | {"as it is": Path("b.so")}, timer)
    assert all(row["ratio"] is None for row in rows)  # nothing to compare with
    assert rows[0]["wrong"] == "CUDA error 700"


def test_table():
    rows = [
        {"case": "a", "variant": "as it is", "seconds": 1e-5, "ratio": 1.0, "wrong": ""},
        {"case": "a", "variant": "x 3", "seconds": 9e-6, "ratio": 0.9, "wrong": "the loss is 2, not 1"},
        {"case": "a", "variant": "without y", "seconds": 8e-6, "ratio": 0.8, "wrong": ""},
    ]
    lines = tune.table("loss", rows).splitlines()
    assert [line.split()[-1] for line in lines[:4]] == ["a", "us", "0.900!", "0.800"]
    assert lines[4:] == ["! x 3, a: the loss is 2, not 1"]


def test_main_measures_what_compiles(tmp_path, monkeypatch, capsys):
    """Every case of the kinds asked for, into a file as they come; status 1 if a variant did not compile."""
    measured = []

    def measure(kind, case, size, libraries, timer):
        measured.append((kind, case, len(libraries)))
        row = {"kind": kind, "case": case, "seconds": 1e-6, "how": "queued", "ratio": 1.0, "wrong": ""}
        return [row | {"variant": name} for name in libraries]

    monkeypatch.setattr(tune.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(tune, "measure", measure)
    out = tmp_path / "tune.json"
    monkeypatch.setattr(sys, "argv", ["tune.py", "--only", "vote", "--out", str(out)])
    for broken, status in ((), 0), (("kStagger 1",), 1):
        measured.clear()
        monkeypatch.setattr(
            tune, "compiled", lambda kind, arch, v, broken=broken: None if v.name in broken else Path(v.name)
        )
        assert tune.main() == status
        there = len(tune.VARIANTS["vote"]) - len(broken)
        assert measured == [("vote", case, there) for case in tune.SIZES["vote"]]
        assert len(json.loads(out.read_text())) == there * len(measured)
    assert "ResNet-50 NCHW" in capsys.readouterr().out
    monkeypatch.setattr(tune, "compiled", lambda kind, arch, v: None if v is tune.AS_IT_IS else Path(v.name))
    measured.clear()
    assert tune.main() == 1
    assert not measured, "without the kernels as they are there is nothing to compare with"


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
@pytest.mark.parametrize("options", [["--triton", "64x16x8"], ["--only", "loss"]])
def test_without_a_gpu_it_says_what_is_missing(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py", *options])
    assert tune.main() == 2
    assert "CUDA device" in capsys.readouterr().out
