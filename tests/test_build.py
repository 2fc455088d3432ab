"""The build: what setup.py decides, what the extension says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import zipfls_cuda as zls
from zipfls_cuda import ops

ROOT = Path(__file__).parent.parent
needs_extension = pytest.mark.skipif("cpu" not in zls.backends(), reason="the C++ extension is not built")


def python(*args, cwd=ROOT, **env):
    """Run Python in a folder, with changes to the environment (None removes a variable)."""
    full = {k: v for k, v in {**os.environ, **env}.items() if v is not None}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=full, capture_output=True, text=True, timeout=300
    )


@needs_extension
def test_build_info():
    info = ops.build_info()
    assert info["isa_used"] in info["isa"]
    assert info["isa"][0] == "baseline"
    assert info["compiler"]
    assert info["torch"] == torch.__version__.split("+")[0]


@pytest.mark.parametrize(
    ("built", "runs", "fails"),
    [
        ("8.0,9.0a,10.0+PTX", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 1)], [(7, 5)]),
        ("9.0a", [(9, 0)], [(8, 0), (8, 9), (10, 0), (12, 0)]),
        ("10.0a+PTX", [(10, 0)], [(9, 0), (10, 3), (12, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("Hopper", [(9, 0), (8, 0)], []),  # left to CUDA
    ],
)
def test_architectures_that_a_build_runs_on(monkeypatch, built, runs, fails):
    monkeypatch.setattr(ops, "_C", object())
    monkeypatch.setattr(ops, "build_info", lambda: {"cuda": "13.0", "cuda_arch": built})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for capability in runs + fails:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i, c=capability: c)
        reason = ops.reason_against("cuda")
        assert (reason == "") == (capability in runs), (capability, reason)
        if reason:
            assert built in reason
            assert "{}.{}".format(*capability) in reason


THREADS = """
import os, torch
import zipfls_cuda
torch.set_num_threads(3)
z, table, y = torch.empty(64, 4096), torch.empty(4096), torch.tensor(range(64))  # no parallel work so far
before = len(os.listdir("/proc/self/task"))
torch.ops.zipfls.loss_fwd(z, y, None, table, None, 1.0, 0.0, 0.0, False, -100, "mean", True)
print(before, len(os.listdir("/proc/self/task")))
"""


@needs_extension
def test_loss_uses_the_threads_of_torch():
    """Compiled without OpenMP, at::parallel_for is a plain loop and nothing but the clock tells."""
    if "clang" in ops.build_info()["compiler"]:
        pytest.skip("built by clang: one thread, as setup.py says")
    assert ops.build_info()["openmp"]
    done = python("-c", THREADS)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after == before + 2


@needs_extension
def test_unknown_instruction_set_is_named():
    done = python("-m", "zipfls_cuda", ZIPFLS_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "ZIPFLS_CPU_ISA must be unset or one of" in done.stderr
    assert "got 'sse9'" in done.stderr


def setup(*args, **env):
    return python("setup.py", "-q", *args, **env)


def test_setup_refuses_what_it_cannot_build(tmp_path):
    done = setup("--name", ZIPFLS_BUILD="gpu")
    assert done.returncode != 0
    assert "ZIPFLS_BUILD must be cuda, cpu or none, got 'gpu'" in done.stderr
    if torch.version.cuda is None:
        done = setup("--name", ZIPFLS_BUILD="cuda")
        assert done.returncode != 0
        assert "is not a CUDA build" in done.stderr
    done = setup("--name", ZIPFLS_BUILD="cpu", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "there is no C++ compiler (no-such-compiler" in done.stderr


def test_without_a_compiler_it_installs_as_pure_python(tmp_path):
    """The compiler hidden: a plain notice, a wheel without the extension, which works and says so."""
    build = f"import sys; sys.argv = ['setup.py', '-q', 'bdist_wheel', '-d', {str(tmp_path)!r}]; "
    build += f"import os; os.chdir({str(ROOT)!r}); "
    # A build folder of its own: that of the project holds the extension.
    build += (
        f"sys.argv[2:2] = ['egg_info', '-e', {str(tmp_path)!r}, 'build', '-b', {str(tmp_path / 'b')!r}]; "
    )
    build += "import runpy; runpy.run_path('setup.py', run_name='__main__')"
    done = python("-c", build, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "installed as pure Python" in done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [n for n in archive.namelist() if n.endswith(".so")]
        archive.extractall(tmp_path / "site")
    # Without the finder of an editable install, which would lend the project's own extension to the wheel.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]; "
    code += "import torch, runpy, zipfls_cuda as z; print(z.__file__); print(z.backends()); "
    code += "print(z.zipf_loss(torch.zeros(2, 3), torch.tensor([0, 1])).item()); "
    code += "runpy.run_module('zipfls_cuda', run_name='__main__')"
    done = python("-c", code, PYTHONPATH=str(tmp_path / "site"), TRITON_INTERPRET=None, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where, backends, loss, *report = done.stdout.splitlines()
    assert where.startswith(str(tmp_path))
    assert "'cpu'" not in backends
    assert "'reference'" in backends
    assert float(loss) == 0.0
    assert any("the C++ extension is not built" in line for line in report)
