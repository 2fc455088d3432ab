"""Builds zipfls_cuda._C: C++ for the CPU, and CUDA kernels where nvcc and a CUDA build of torch are there.

ZIPFLS_BUILD=cuda|cpu|none asks for one of the three, and failing then is an error; unset, what fails falls
back, from cuda to cpu to none (pure Python). zipfls_cuda/_build.json tells the installed package what was
built, and why nothing better. Whether a GPU is visible plays no part. TORCH_CUDA_ARCH_LIST sets the GPU
architectures (default: 8.0 9.0a 10.0+PTX). docs/BUILDING.md has the rest.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
DEFAULT_ARCHITECTURES = "8.0;9.0a;10.0+PTX"
MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
# What the compiler must take: C++20 and Python's headers.
PROBE = "#include <Python.h>\n#include <concepts>\nstatic_assert(std::integral<int>);\n"


def version(text: str) -> tuple[int, int]:
    """Major and minor."""
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def compiler() -> list[str]:
    return os.environ.get("CXX", "c++").split()


def toolkit() -> str | None:
    """Folder of the CUDA toolkit: CUDA_HOME, or where nvcc is, or /usr/local/cuda; None without one."""
    nvcc = shutil.which("nvcc")
    beside = nvcc and str(Path(nvcc).resolve().parent.parent)
    guesses = [os.environ.get("CUDA_HOME"), beside, "/usr/local/cuda"]
    # nvcc on the PATH may be a script that calls the real one: a toolkit has headers beside it.
    return next((g for g in guesses if g and (Path(g) / "include" / "cuda_runtime.h").exists()), None)


def first_error(output: str) -> str:
    """The line of a compiler's output that says what is wrong; empty if none does."""
    return next(
        (line.strip() for line in output.splitlines() if re.search(r"\b(error|fatal)\b", line, re.I)), ""
    )


@functools.cache
def without_compiler() -> str:
    """What keeps the C++ compiler from compiling anything here; empty if nothing does."""
    command = compiler()
    if shutil.which(command[0]) is None:
        return f"there is no C++ compiler ({command[0]} is not on the PATH)"
    flags = ["-std=c++20", f"-I{sysconfig.get_path('include')}", "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run([*command, *flags], input=PROBE, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    said = first_error(done.stderr) or f"exit status {done.returncode}"
    return f"{' '.join(command)} does not compile C++20 with Python's headers: {said}"


def why_not(build: str) -> str:
    """What is missing for a build, cuda or cpu; empty if nothing is."""
    if build == "cuda":
        import torch

        if torch.version.cuda is None:
            return f"torch {torch.__version__} is not a CUDA build"
        if toolkit() is None:
            return "there is no CUDA toolkit (nvcc)"
    return without_compiler()


def choose(asked: str) -> tuple[list[str], dict[str, str]]:
    """The builds to try, best first, and why others are not tried."""
    if asked == "none":
        return [], {}
    reasons = {build: why_not(build) for build in ([asked] if asked else ["cuda", "cpu"])}
    if asked and reasons[asked]:
        sys.exit(f"ZIPFLS_BUILD={asked}: {reasons[asked]}")
    return [b for b, reason in reasons.items() if not reason], {b: r for b, r in reasons.items() if r}


def openmp() -> list[str]:
    """What makes at::parallel_for parallel; without it ATen's headers quietly make it a plain loop.

    The flag is for compiling alone: linked, it could bring in a second OpenMP runtime beside torch's own,
    with threads that torch.set_num_threads knows nothing of. torch's has what GCC calls, not what clang does.
    """
    if "clang" not in subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout:
        return ["-fopenmp"]
    print("zipfls_cuda: built by clang, the CPU backend runs on one thread; GCC's has all.", file=sys.stderr)
    return []


def extension(build: str) -> setuptools.Extension:
    """The extension module of a build, cuda or cpu."""
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension, include_paths

    sources = sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
    # A chosen -std turns the contraction of a * b + c into one instruction off; it is what the exp counts on.
    # Python's own flags may hold -g, which makes the module ten times larger.
    flags = {"cxx": ["-O3", "-std=c++20", "-ffp-contract=fast", "-Wall", "-Wextra", "-g0"]}
    flags["cxx"] += [f"-isystem{folder}" for folder in include_paths()]  # torch's own warnings are not ours
    flags["cxx"] += openmp()
    if build == "cuda":
        sources += sorted([*ROOT.glob("csrc/cuda/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")])
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
        architectures = ",".join(os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ").split())
        # Without quotes, which versions of torch pass on differently; bindings.cpp makes strings of them.
        flags["cxx"] += [f"-DZIPFLS_CUDA={torch.version.cuda}", f"-DZIPFLS_CUDA_ARCH={architectures}"]
        flags["nvcc"] = ["-O3", "-std=c++17"]
    kind = CUDAExtension if build == "cuda" else CppExtension
    return kind("zipfls_cuda._C", [str(s.relative_to(ROOT)) for s in sources], extra_compile_args=flags)


@contextlib.contextmanager
def output_kept() -> Iterator[list[str]]:
    """What this process and its children print goes where it went, and in the end into the list as well."""
    kept: list[str] = []
    with tempfile.NamedTemporaryFile() as log:
        sys.stdout.flush()
        sys.stderr.flush()
        tee = subprocess.Popen(["tee", log.name], stdin=subprocess.PIPE)
        saved = os.dup(1), os.dup(2)
        for stream in (1, 2):
            os.dup2(tee.stdin.fileno(), stream)
        try:
            yield kept
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, copy in zip((1, 2), saved):
                os.dup2(copy, stream)
                os.close(copy)
            tee.stdin.close()
            tee.wait()
            kept.append(Path(log.name).read_text(errors="replace"))


def record(package: Path, asked: str, build: str, reasons: dict[str, str]) -> None:
    """Write what zipfls_cuda/extension.py reads."""
    built = {"asked": asked, "built": build, "reasons": reasons}
    if build != "none":
        import torch

        built |= {"module": MODULE, "torch": torch.__version__}
        built |= {"cuda": torch.version.cuda if build == "cuda" else None}
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build.json").write_text(json.dumps(built, indent=1) + "\n")


def commands(asked: str, builds: list[str], reasons: dict[str, str]) -> dict[str, type]:
    """The setuptools command that leaves a record of the build in the package."""

    class BuildPython(build_py):
        def run(self):
            super().run()
            package = (ROOT if self.editable_mode else Path(self.build_lib)) / "zipfls_cuda"
            record(package, asked, "none", reasons)

    if not builds:
        return {"build_py": BuildPython}
    from torch.utils.cpp_extension import BuildExtension

    class BuildBest(BuildExtension):
        def run(self):
            self.force = True  # without ninja, setuptools would not see that torch or the flags are others
            as_given = self.compiler, self.inplace
            module = Path(self.get_ext_fullpath("zipfls_cuda._C"))
            for build in builds:
                self.compiler, self.inplace = as_given
                try:
                    with output_kept() as output:
                        vars(self.extensions[0]).update(vars(extension(build)))
                        super().run()
                except (Exception, SystemExit) as error:
                    if asked:
                        raise
                    said = first_error("".join(output)) or str(error)
                    reasons[build] = f"the build for {build} failed: {' '.join(said.split())[:300]}"
                    print(f"zipfls_cuda: {reasons[build]}", file=sys.stderr)
                else:
                    return record(module.parent, asked, build, reasons)
            self.inplace = as_given[1]
            self.extensions = []
            module.unlink(missing_ok=True)  # an earlier build's
            return record(module.parent, asked, "none", reasons)

    return {"build_ext": BuildBest}


def extras() -> dict[str, list[str]]:
    """requirements-dev.txt as extras: without torch, which is there, and without the pins to one version."""
    sections: dict[str, list[str]] = {}
    section = ""
    for line in (ROOT / "requirements-dev.txt").read_text().splitlines():
        if line.startswith("#"):
            section = line.strip("# ")
        elif line and not line.startswith("torch=="):
            sections.setdefault(section, []).append(line.split("#")[0].split("==")[0].strip())
    examples = next(names for title, names in sections.items() if title.startswith("examples"))
    return {"dev": sorted(itertools.chain(*sections.values())), "examples": sorted(examples)}


def main() -> None:
    if version(setuptools.__version__) < (77, 0):
        sys.exit(f"zipfls_cuda needs setuptools>=77, got {setuptools.__version__}: pip install -U setuptools")
    asked = os.environ.get("ZIPFLS_BUILD", "")
    if asked not in ("", "cuda", "cpu", "none"):
        sys.exit(f"ZIPFLS_BUILD must be cuda, cpu or none, got {asked!r}")
    modules, requires, builds = [], "torch>=2.11", []
    reasons: dict[str, str] = {}
    # Neither the source distribution nor the question what a build requires needs torch or a compiler.
    if asked != "none" and "sdist" not in sys.argv and sys.argv[-1] != "egg_info":
        if importlib.util.find_spec("torch") is None:
            sys.exit(
                "zipfls_cuda is built for the torch that is installed, and this build sees none: pip hides "
                "it in an isolated build. With torch installed, use: pip install --no-build-isolation ."
            )
        import torch

        if version(torch.__version__) < (2, 11):
            sys.exit(f"zipfls_cuda needs torch>=2.11, got {torch.__version__}")
        builds, reasons = choose(asked)
        if "cuda" in builds:
            os.environ["CUDA_HOME"] = toolkit()  # before cpp_extension is imported, which looks once
        if builds:
            modules = [setuptools.Extension("zipfls_cuda._C", [])]  # BuildBest fills it in
            requires = "torch=={}.{}.*".format(*version(torch.__version__))
        else:
            print(
                f"zipfls_cuda: {reasons['cpu']}, so the package is installed as pure Python. It works, by "
                "its reference in plain PyTorch (and by Triton on a GPU); install a compiler and install "
                "again for the fast CPU backend.",
                file=sys.stderr,
            )
    setuptools.setup(
        ext_modules=modules,
        cmdclass=commands(asked, builds, reasons),
        install_requires=[requires],
        extras_require=extras(),
    )


main()
