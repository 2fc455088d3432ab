"""Compiles csrc/cuda for the CPU: the launchers and their kernels, unchanged, over tests/cuda_sim.

One fiber per CUDA thread; cudaLaunchKernelEx is the simulator's, and so is every PTX instruction.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from processes import alone

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "csrc" / "cuda"
GXX = shutil.which("g++")

FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-gnu-unique"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-unused"]
# name -> (flags for the kernels, for the simulator, for linking)
BUILDS = {  # slowest first
    "sanitized": (
        ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DZIPFLS_DTYPES=5"],
        ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        ["-fsanitize=address,undefined"],
    ),
    "plain": (["-DZIPFLS_EVERY_ROWS_KERNEL=1"], [], []),
    # No float16 and float64 here: the same templates, and every build costs time.
    "races": (
        ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-DZIPFLS_DTYPES=5"],
        ["-DSIM_RACES"],
        [],
    ),
}


def copy_sources(folder: Path) -> Path:
    """A copy of the kernels and the simulator, to plant a fault in: its root."""
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("cpu", "*.cpp"))
    shutil.copytree(ROOT / "tests" / "cuda_sim", folder / "tests" / "cuda_sim")
    return folder


def plant(root: Path, file: str, old: str, new: str) -> None:
    """Replace a text that stands once in a copy's csrc/cuda."""
    path = root / "csrc" / "cuda" / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new))


def _run(command: list) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def _built(name: str, key: object, sources: list[Path], make) -> Path:
    """The file of that name that make(path) leaves, unless it was made of the same sources before."""
    digest = hashlib.sha256(repr(key).encode())
    for source in sources:
        digest.update(source.read_bytes())
    folder = ROOT / "build" / "cuda_sim"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{digest.hexdigest()[:16]}"
    with alone(path):
        if not path.exists():
            part = folder / f"{path.name}.part"
            make(part)
            os.replace(part, path)
    return path


def compiled(driver: str, build: str = "plain", root: Path = ROOT, extra: tuple[str, ...] = ()) -> Path:
    """A driver of tests/cuda_sim: a program, or a shared library if it has no main function.

    Args:
        root: what copy_sources returned, or the project.
        extra: further flags for the kernels.
    """
    sim = root / "tests" / "cuda_sim"
    for_kernels, for_sim, for_linking = BUILDS[build]
    if extra:
        for_kernels = [flag for flag in for_kernels if not flag.startswith("-DZIPFLS_DTYPES")]
    compile_it = [GXX, *FLAGS, "-I", sim, "-I", sim / "toolkit", "-c"]
    headers = sorted(sim.glob("*.h")) + sorted(sim.glob("*.cuh"))
    machine = _built(
        f"sim-{build}.o",
        (FLAGS, for_sim),
        [sim / "sim.cpp", *headers],
        lambda part: _run([*compile_it, *for_sim, sim / "sim.cpp", "-o", part]),
    )
    source = sim / f"{driver}_driver.cpp"
    library = "int main(" not in source.read_text()
    kernels = [p for p in sorted((root / "csrc" / "cuda").iterdir()) if p.suffix != ".cpp"]

    def make(part: Path) -> None:
        kernel_object = part.with_name(f"{part.name}.o")
        _run([*compile_it, *for_kernels, *extra, source, "-o", kernel_object])
        _run([GXX, *for_linking, *(["-shared"] if library else []), kernel_object, machine, "-o", part])
        kernel_object.unlink()

    key = (FLAGS, BUILDS[build], extra)
    inputs = [source, sim / "sim.cpp", *headers, *kernels, root / "csrc" / "label.h"]
    return _built(f"{driver}-{build}", key, inputs, make)
