"""Builds zipfls_cuda._C: C++ for the CPU, and CUDA kernels where nvcc and a CUDA build of torch are there.

ZIPFLS_BUILD=cuda|cpu|none forces one of the three, and failing then is an error; unset, the best that this
machine can build is built, down to pure Python where there is no C++ compiler. Whether a GPU is visible plays
no part. TORCH_CUDA_ARCH_LIST sets the GPU architectures (default: 8.0 9.0a 10.0+PTX).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup

ROOT = Path(__file__).parent
DEFAULT_ARCHITECTURES = "8.0;9.0a;10.0+PTX"


def toolkit() -> str | None:
    """Folder of the CUDA toolkit: CUDA_HOME, or where nvcc is, or /usr/local/cuda; None without one."""
    nvcc = shutil.which("nvcc")
    beside = nvcc and str(Path(nvcc).resolve().parent.parent)
    guesses = [os.environ.get("CUDA_HOME"), beside, "/usr/local/cuda"]
    # nvcc on the PATH may be a script that calls the real one: a toolkit has headers beside it.
    return next((g for g in guesses if g and (Path(g) / "include" / "cuda_runtime.h").exists()), None)


def why_not(build: str) -> str:
    """What is missing for a build, cuda or cpu; empty if nothing is."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler} is not on the PATH)"
    if build == "cuda":
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is not a CUDA build"
        if toolkit() is None:
            return "there is no CUDA toolkit (nvcc)"
    return ""


def choose() -> str:
    """cuda, cpu or none."""
    asked = os.environ.get("ZIPFLS_BUILD", "")
    if asked not in ("", "cuda", "cpu", "none"):
        sys.exit(f"ZIPFLS_BUILD must be cuda, cpu or none, got {asked!r}")
    if asked:
        if asked != "none" and why_not(asked):
            sys.exit(f"ZIPFLS_BUILD={asked}: {why_not(asked)}")
        return asked
    for build in ("cuda", "cpu"):
        if not why_not(build):
            return build
    print(
        f"zipfls_cuda: {why_not('cpu')}, so the package is installed as pure Python. It works, by its "
        "reference in plain PyTorch (and by Triton on a GPU); install a compiler and install again for the "
        "fast CPU backend.",
        file=sys.stderr,
    )
    return "none"


def openmp() -> list[str]:
    """What makes at::parallel_for parallel; without it ATen's headers quietly make it a plain loop.

    The flag is for compiling alone: linked, it could bring in a second OpenMP runtime beside torch's own,
    with threads that torch.set_num_threads knows nothing of. torch's has what GCC calls, not what clang does.
    """
    version = [*os.environ.get("CXX", "c++").split(), "--version"]
    if "clang" not in subprocess.run(version, capture_output=True, text=True).stdout:
        return ["-fopenmp"]
    print("zipfls_cuda: built by clang, the CPU backend runs on one thread; GCC's has all.", file=sys.stderr)
    return []


def extension(build: str):
    """The extension module, and the command that builds it."""
    cuda = build == "cuda"
    if cuda:
        os.environ["CUDA_HOME"] = toolkit()  # before cpp_extension is imported, which looks once
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, include_paths

    sources = sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
    # A chosen -std turns the contraction of a * b + c into one instruction off; it is what the exp counts on.
    flags = {"cxx": ["-O3", "-std=c++20", "-ffp-contract=fast", "-Wall", "-Wextra"]}
    flags["cxx"] += [f"-isystem{folder}" for folder in include_paths()]  # torch's own warnings are not ours
    flags["cxx"] += openmp()
    if cuda:
        sources += sorted([*ROOT.glob("csrc/cuda/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")])
        architectures = ",".join(os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ").split())
        # Without quotes, which versions of torch pass on differently; bindings.cpp makes strings of them.
        flags["cxx"] += [f"-DZIPFLS_CUDA={torch.version.cuda}", f"-DZIPFLS_CUDA_ARCH={architectures}"]
        flags["nvcc"] = ["-O3", "-std=c++17"]
    kind = CUDAExtension if cuda else CppExtension
    names = [str(s.relative_to(ROOT)) for s in sources]
    return [kind("zipfls_cuda._C", names, extra_compile_args=flags)], {"build_ext": BuildExtension}


build = choose()
modules, commands = extension(build) if build != "none" else ([], {})
setup(ext_modules=modules, cmdclass=commands)
