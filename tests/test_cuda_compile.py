"""csrc/cuda compiles, without a GPU: the kernels by nvcc for every architecture, the bindings against torch.

Warnings are errors. No kernel spills; the row loops of the loss kernels move 16 bytes at a time.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import nvcc_report  # noqa: E402

DEAR = ("loss", "loss_distill", "loss_general", "vote_mma_sm80")  # to compile


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to compile the CUDA sources with")
@pytest.mark.skipif(
    nvcc_report.tool("cuobjdump") is None, reason="no cuobjdump to look into the binaries with"
)
@pytest.mark.parametrize(
    "arch",
    [pytest.param(a, marks=[] if a == "90a" else [pytest.mark.slow]) for a in nvcc_report.ARCHITECTURES],
)
@pytest.mark.parametrize(
    "source",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem in DEAR)) for p in nvcc_report.SOURCES],
)
def test_source_compiles_without_spills_and_with_16_byte_accesses(tmp_path, source, arch):
    cubin, error = nvcc_report.compile_one(source, arch, tmp_path)
    assert not error, f"{source.name} for sm_{arch}: {error}"
    rows = nvcc_report.rows(cubin, arch)
    assert rows or source.stem.startswith("vote")
    for row in rows:
        assert not row.faults, f"{row.kernel} for sm_{row.arch}: {row.faults}"
        if "slabs" in row.kernel:
            assert (row.wide_loads, row.wide_stores) == (row.loads, row.stores), row
        if "loss" in row.kernel:  # the gradient may be written over the logits
            assert row.read_only == 0, f"{row.kernel} for sm_{row.arch} reads past coherence"
        empty = row.arch == "80" and "cluster" in row.kernel
        if re.match(r"loss_(fwd|bwd|general|distill)", row.kernel) and not empty:
            assert row.wide_loads > 0, f"{row.kernel} for sm_{row.arch} has no 16-byte load"
            assert row.wide_stores > 0, f"{row.kernel} for sm_{row.arch} has no 16-byte store"


def test_no_source_is_left_out():
    assert {path.stem for path in nvcc_report.SOURCES} >= {
        "label",
        "loss",
        "loss_distill",
        "loss_general",
        "vote_mma_sm80",
        "vote_wgmma_sm90",
    }


def cuda_include() -> Path | None:
    """The toolkit's headers."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    command = [nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(\S+)", said, re.M)
    folders = [Path(top[1]) / "include"] if top else []
    folders.append(Path(nvcc).resolve().parents[1] / "include")
    return next((p for p in folders if (p / "cuda_runtime.h").exists()), None)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the bindings with")
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(p.name, marks=[] if p.name == "register.cpp" else [pytest.mark.slow])
        for p in sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))
    ],
)
def test_bindings_compile_against_torch(source):
    cuda = cuda_include()
    if cuda is None:
        pytest.skip("no CUDA toolkit headers to compile the bindings with")
    headers = Path(torch.__file__).parent / "include"
    if not (headers / "c10" / "cuda" / "CUDAGuard.h").exists():
        pytest.skip("this build of torch ships no CUDA headers")
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    command += ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]  # the CPU build of torch lacks that file
    for folder in (headers, headers / "torch" / "csrc" / "api" / "include", cuda):
        command += ["-isystem", str(folder)]
    done = subprocess.run([*command, str(ROOT / "csrc" / "cuda" / source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
