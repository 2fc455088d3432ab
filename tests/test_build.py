"""The build: what setup.py decides, what the extension says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
import types
import warnings
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


@pytest.fixture
def gpus(monkeypatch):
    """A machine with these GPUs, by compute capability, and a build for these architectures."""
    monkeypatch.setattr(ops, "_C", object())
    monkeypatch.setattr(ops, "_resolved", {})
    monkeypatch.setattr(ops, "_gpus_spoken_of", set())
    monkeypatch.setattr(ops, "triton_interpreted", lambda: False)
    monkeypatch.setattr(ops, "_not_installed", lambda backend: "no C++" if backend == "cpu" else "")

    def machine(built, *capabilities, initialized=True):
        monkeypatch.setattr(ops, "build_info", lambda: {"cuda": "13.0", "cuda_arch": built})
        for name, value in (
            ("is_available", lambda: True), ("is_initialized", lambda: initialized),
            ("device_count", lambda: len(capabilities)), ("get_device_capability", lambda i: capabilities[i]),
            ("get_device_name", lambda device: f"GPU {device.index}"),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    return machine


def on(index):
    """What ``select`` looks at of a tensor on a GPU."""
    return types.SimpleNamespace(device=torch.device("cuda", index), dtype=torch.float32)


def test_each_gpu_is_served_by_what_runs_on_it_and_says_once_what_does_not(gpus):
    gpus("9.0a", (9, 0), (7, 5), (8, 0))
    op = ops.OPERATORS
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            assert ops.select("loss_fwd", None, on(0)) is op["loss_fwd", "cuda"]
            assert ops.select("loss_fwd", None, on(1)) is op["loss_fwd", "reference"]
            assert ops.select("loss_fwd", None, on(2)) is op["loss_fwd", "triton"]
            assert ops.select("label_fwd", None, on(1)) is op["label_fwd", "reference"]
    old, unbuilt = (str(w.message) for w in seen)
    assert "GPU 1 (cuda:1) is served by 'reference'" in old
    assert "many times slower" in old
    for backend in ("cuda", "triton"):
        assert f"'{backend}' cannot serve it: cuda:1 has compute capability 7.5" in old
        with pytest.raises(RuntimeError, match=r"cannot serve this call: cuda:1 has compute capability 7\.5"):
            ops.select("loss_fwd", backend, on(1))
    assert "GPU 2 (cuda:2) is served by 'triton', as 'cuda' cannot serve it: cuda:2" in unbuilt
    assert "it was built for 9.0a (TORCH_CUDA_ARCH_LIST)" in unbuilt
    assert zls.backends() == ("cuda", "triton", "reference")


def test_machine_of_old_gpus_alone(gpus):
    gpus("8.0,9.0a", (7, 5), (7, 0))
    for backend in ("cuda", "triton"):
        reason = ops.reason_against(backend)
        assert "cuda:0 has compute capability 7.5" in reason
        assert "cuda:1 has compute capability 7.0" in reason
    assert zls.backends() == ("reference",)


def test_gpus_are_not_looked_at_before_cuda_is_initialised(gpus, monkeypatch):
    """Looking would initialise it; what is chosen then, for a fake tensor, is not kept."""
    gpus("8.0", (7, 5), initialized=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", None)
    assert ops.select("loss_fwd", None, on(0)) is ops.OPERATORS["loss_fwd", "cuda"]
    assert zls.backends() == ("cuda", "triton", "reference")
    assert ops._resolved == {}


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
