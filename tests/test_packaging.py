"""What is packed and installed: source distribution, wheels, what an installed package says of its build."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
import warnings
import zipfile
from email.parser import Parser
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import zipfls_cuda as zls
from zipfls_cuda import extension, ops

ROOT = Path(__file__).parent.parent
SO = f"_C{EXTENSION_SUFFIXES[0]}"
MINOR = ".".join(torch.__version__.split(".")[:2])


def python(*args, cwd, timeout=120, **env):
    """Run Python in a folder, with changes to the environment (None removes a variable)."""
    base = {**os.environ, "PYTHONPATH": "", "TRITON_INTERPRET": None, "ZIPFLS_BUILD": None, "CXX": None}
    full = {k: v for k, v in {**base, **env}.items() if v is not None}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=full, capture_output=True, text=True, timeout=timeout
    )


# The source distribution ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution of the tree, unpacked: its folder."""
    folder = tmp_path_factory.mktemp("sdist")
    # It is staged in the tree, in a folder of one name: one process of the suite after another.
    with open(tmp_path_factory.getbasetemp().parent / "sdist.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = python("setup.py", "-q", "egg_info", "-e", str(folder), "sdist", "-d", str(folder), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not done.stdout + done.stderr, "setuptools warns of something"
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_sdist_holds_what_git_holds(sdist):
    staged = f"--exclude=/{sdist.name}/"  # by another process, see sdist
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", staged],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip("this is no checkout of git")
    packed = {p.relative_to(sdist).as_posix() for p in sdist.rglob("*") if p.is_file()}
    added = {p for p in packed if p.startswith("zipfls_cuda.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    held = {p for p in listed.stdout.splitlines() if (ROOT / p).exists()}
    assert packed - added == held


# Wheels --------------------------------------------------------------------------------------------


def wheel_of(source: Path, to: Path, before: str = "", **env) -> Path:
    """A wheel built from a source distribution, as pip builds it."""
    to.mkdir()
    code = f"{before}from setuptools import build_meta; build_meta.build_wheel({str(to)!r})"
    done = python("-c", code, cwd=source, PYTHONDONTWRITEBYTECODE=None, **env)
    assert done.returncode == 0, done.stderr
    assert not re.search("Warning|warning:", done.stdout + done.stderr), "setuptools warns of something"
    (wheel,) = to.glob("*.whl")
    return wheel


def metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def installed(wheel: Path, to: Path) -> Path:
    """The wheel's files, as an installation would place them."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(to)
    return to


# An editable install's finder would lend the project's own files to another copy of the package.
IMPORT = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]; "
REPORT = IMPORT + "import runpy; runpy.run_module('zipfls_cuda', run_name='__main__')"


def warned(done) -> list[str]:
    """The package's own warnings in what a process printed."""
    return re.findall(r"UserWarning: (zipfls_cuda: .*)", done.stderr)


def test_pure_wheel(sdist, tmp_path):
    """Asked for by name, with neither torch nor a compiler: complete, for any torch, without a warning."""
    wheel = wheel_of(sdist, tmp_path / "dist", ZIPFLS_BUILD="none", CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    about = metadata(wheel)
    requires = about.get_all("Requires-Dist")
    assert [r for r in requires if "extra" not in r] == ["torch>=2.11"]
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Author"] == "zipfls_cuda contributors"
    assert about["Author-email"] is None
    assert about.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2207.12980"]
    assert set(about.get_all("Provides-Extra")) == {"dev", "examples"}
    dev = {r for r in requires if 'extra == "dev"' in r}
    for name in ("build", "ninja", "pybind11", "triton", "pytest", "pytest-benchmark"):
        assert any(re.match(rf"{name}\b(?!-)", r) for r in dev), name
    assert not any(re.match(r"torch\b(?!vision)", r) for r in dev), "the extra would fetch another torch"
    site = installed(wheel, tmp_path / "site")
    names = {p.relative_to(site).as_posix() for p in (site / "zipfls_cuda").rglob("*") if p.is_file()}
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT / "zipfls_cuda").rglob("*.py")}
    assert names == here | {"zipfls_cuda/py.typed", "zipfls_cuda/_build.json"}
    done = python("-W", "error", "-c", REPORT, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert f"path      {site / 'zipfls_cuda'}" in done.stdout
    assert "the C++ extension was left out at the build (ZIPFLS_BUILD=none)" in done.stdout


COMPILER = """#!/bin/sh
for word in "$@"; do
    case $word in -fsyntax-only|--version) exec c++ "$@";; esac
done
echo "some.h:1:2: error: this compiler is too old for CUDA_OR_CPU" >&2
exit 1
"""


@pytest.fixture
def old_compiler(tmp_path) -> str:
    """A compiler that takes C++20 and none of our files."""
    compiler = tmp_path / "c++-too-old"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    return str(compiler)


def test_compile_that_fails_falls_back_and_the_import_says_so(sdist, tmp_path, old_compiler):
    source = tmp_path / "source"
    shutil.copytree(sdist, source)
    # A CUDA build of torch, so that cuda is tried too, where there is a toolkit.
    cuda = "import torch; torch.version.cuda = torch.version.cuda or '99.0'; "
    wheel = wheel_of(source, tmp_path / "dist", cuda, CXX=old_compiler, MAX_JOBS="1")
    site = installed(wheel, tmp_path / "site")
    assert not list(site.rglob("*.so"))
    reasons = json.loads((site / "zipfls_cuda" / "_build.json").read_text())["reasons"]
    assert set(reasons) == {"cuda", "cpu"}
    assert "this compiler is too old" in reasons["cpu"]
    done = python("-c", REPORT, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    (said,) = warned(done)
    assert "is not built" in said
    assert "this compiler is too old" in said
    assert "many times slower" in said
    assert "pip install --no-build-isolation" in said
    assert said in done.stdout


@pytest.mark.slow
def test_compile_that_was_asked_for_by_name_does_not_fall_back(sdist, tmp_path, old_compiler):
    source = tmp_path / "source"
    shutil.copytree(sdist, source)
    done = python("setup.py", "-q", "build", cwd=source, CXX=old_compiler, MAX_JOBS="1", ZIPFLS_BUILD="cpu")
    assert done.returncode != 0
    assert "this compiler is too old" in done.stdout + done.stderr


def test_isolated_build_is_refused(tmp_path):
    """Where pip hides the installed torch: one line that says what to use, and nothing is built."""
    site = Path(importlib.util.find_spec("setuptools").origin).parent.parent
    for part in (site / "_distutils_hack", *site.glob("setuptools*")):
        (tmp_path / part.name).symlink_to(part)
    done = python("-S", "setup.py", "-q", "dist_info", cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert done.stderr.strip().endswith("use: pip install --no-build-isolation .")
    requires = (ROOT / "pyproject.toml").read_text().partition("[project]")[0]
    assert '"torch' not in requires, "an isolated build would fetch a torch of its own"


@pytest.mark.slow
def test_compiled_wheel_of_the_sdist(sdist, tmp_path):
    """By the build tool: small, pinned to this torch, silent at import; without its extension it warns."""
    command = ["-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path / "dist"), str(sdist)]
    done = python(*command, cwd=tmp_path, timeout=1800, ZIPFLS_BUILD="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.stat().st_size < 2e6
    assert f"torch=={MINOR}.*" in metadata(wheel).get_all("Requires-Dist")
    site = installed(wheel, tmp_path / "site")
    done = python("-W", "error", "-c", REPORT, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert re.search(r"cpu +usable", done.stdout)
    (site / "zipfls_cuda" / SO).rename(tmp_path / SO)
    done = python("-c", REPORT, cwd=tmp_path, PYTHONPATH=str(site))
    (said,) = warned(done)
    assert "is missing" in said
    assert said in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not on the PATH")
def test_clang_builds_it(sdist, tmp_path):
    """One thread, which is said, and the reference's results."""
    source = tmp_path / "source"
    shutil.copytree(sdist, source)
    command = ["setup.py", "-q", "build_ext", "--inplace"]
    done = python(*command, cwd=source, timeout=1800, CXX="clang++", ZIPFLS_BUILD="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    done = python("-W", "error", "-c", REPORT, cwd=tmp_path, PYTHONPATH=str(source))
    assert done.returncode == 0, done.stderr
    assert re.search(r"compiler +clang", done.stdout)
    assert "one: built without OpenMP" in done.stdout
    tests = [f"tests/test_{name}.py" for name in ("loss", "vote", "label")]
    command = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--backend", "cpu", *tests]
    done = python(*command, cwd=source, timeout=1800, PYTHONPATH=str(source))
    assert done.returncode == 0, done.stdout


# What an import says -------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path):
    """Load extension.py beside a record of a build and a module of these bytes: itself, its warnings."""
    count = iter(range(100))

    def load(record: dict | None, module: bytes | None):
        name = f"copy{next(count)}"
        folder = tmp_path / name
        folder.mkdir()
        if record is not None:
            (folder / "_build.json").write_text(json.dumps(record))
        if module is not None:
            (folder / SO).write_bytes(module)
        source = shutil.copy(extension.__file__, folder)
        parent = types.ModuleType(name)
        parent.__path__ = [str(folder)]
        sys.modules[name] = parent
        spec = importlib.util.spec_from_file_location(f"{name}.extension", source)
        loaded = importlib.util.module_from_spec(spec)
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                spec.loader.exec_module(loaded)
        finally:
            del sys.modules[name]
        assert all(w.category is UserWarning for w in seen)
        return loaded, [str(w.message) for w in seen]

    return load


def record(**changes) -> dict:
    """What a CPU build for this torch leaves."""
    return {
        "asked": "", "built": "cpu", "reasons": {}, "module": SO, "torch": torch.__version__, "cuda": None,
        **changes,
    }  # fmt: skip


NONE = {"asked": "", "built": "none", "reasons": {"cpu": "there is no C++ compiler"}}


@pytest.mark.parametrize(
    "built,module,says",
    [
        (None, None, f"is missing: there is no {SO} in "),
        (record(), None, f"is missing: there is no {SO} in "),
        (NONE, None, "is not built (cpu: there is no C++ compiler)"),
        ({**NONE, "asked": "none"}, None, ""),
        ({**NONE, "asked": "none"}, b"of an earlier build", ""),
        (record(), b"no ELF", "is built but does not load ("),
        (record(asked="cpu"), b"no ELF", "is built but does not load ("),
        # The module would fail to load, and the message would say so: it was not tried.
        (record(torch="2.9.1+cu126"), b"no ELF", f"was built for torch 2.9, and this is torch {MINOR}."),
        (record(cuda="9.2"), b"no ELF", "was built for CUDA 9, and this torch for CUDA 13"),
        (record(torch="2.9.1", module="_C.cpython-39.so"), b"no ELF", "is built but does not load ("),
    ],
)  # fmt: skip
def test_one_warning_says_what_is_wrong_with_the_extension(package, monkeypatch, built, module, says):
    monkeypatch.setattr(torch.version, "cuda", "13.0" if built and built.get("cuda") else None)
    loaded, seen = package(built, module)
    assert loaded.MODULE is None
    assert loaded.REASON
    assert len(seen) == (1 if says else 0)
    if says:
        assert says in seen[0]
        assert "many times slower" in seen[0]
        assert "pip install --no-build-isolation" in seen[0]
        assert seen[0] == loaded.PROBLEM


@pytest.mark.skipif(ops._C is None, reason="the C++ extension is not built")
def test_warning_of_a_build_without_cuda(package, monkeypatch):
    """The extension of these tests, where torch has CUDA or another version."""
    module = Path(ops._C.__file__).read_bytes()
    if not ops.build_info()["cuda"]:
        monkeypatch.setattr(torch.version, "cuda", None)
        assert package(record(), module)[1] == []
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        loaded, (said,) = package(record(reasons={"cuda": "there is no nvcc"}), module)
        assert loaded.MODULE is not None
        assert "was built without CUDA, which this torch has (cuda: there is no nvcc)" in said
        assert package(record(asked="cpu"), module)[1] == []
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    loaded, (said,) = package(None, module)  # nothing to tell it by, before it is loaded
    assert loaded.MODULE is None
    assert f"was built for torch {MINOR}, and this is torch 2.99.0: it is not used" in said


def test_report_of_a_folder_without_extension_beside_an_installed_copy(sdist, tmp_path):
    """Run from a folder of the source: which copy it is, and the warning of the import once more."""
    site = tmp_path / "site"
    about = site / "zipfls_cuda-0.1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: zipfls_cuda\nVersion: 0.1.0\n")
    shutil.copytree(sdist / "zipfls_cuda", site / "zipfls_cuda")
    done = python("-c", REPORT, cwd=sdist, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    (said,) = warned(done)
    assert f"is missing: there is no {SO} in {sdist / 'zipfls_cuda'}" in said
    assert said in done.stdout
    assert f"path      {sdist / 'zipfls_cuda'}" in done.stdout
    assert f"beside    {site / 'zipfls_cuda'}: installed, and not the copy that runs" in done.stdout


LIGHT = """
import sys
sys.modules["numpy"] = None  # not installed
import zipfls_cuda
print(*(name for name in ("torch._dynamo", "torch._inductor", "sympy", "triton") if name in sys.modules))
assert not zipfls_cuda.ops.torch.cuda.is_initialized()
"""


def test_import_is_light_and_needs_no_numpy():
    done = python("-c", LIGHT, cwd=ROOT, PYTHONPATH=str(Path(zls.__file__).parent.parent))
    assert done.returncode == 0, done.stderr
    assert "NumPy" not in done.stderr
    assert done.stdout.split() == []
