"""``python -m zipfls_cuda``: versions, what was built how, the devices, and which backend serves what."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

from . import __version__, check, extension, ops


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return {False: "no", True: "yes"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _serving(stage: str, device: str) -> str:
    served = [b for b in ops.BACKENDS if not ops.refusal(b, stage, device, torch.float32)]
    return ", ".join(sorted(served, key=ops.backends().index))


def _other_copies() -> list[Path]:
    """Folders of installed copies of the package that are not the one running."""
    found = (
        d.locate_file(extension.FOLDER.name) for d in importlib.metadata.distributions(name="zipfls_cuda")
    )
    here = extension.FOLDER.resolve()
    copies = {Path(f).resolve() for f in found if (Path(f) / "__init__.py").exists()}
    return sorted(copies - {here})


def _print_copy() -> None:
    print(f"  path      {extension.FOLDER}")
    for other in _other_copies():
        reason = (
            "the current folder holds it"
            if extension.FOLDER.parent == Path(os.getcwd())
            else "it comes first"
        )
        print(f"  beside    {other}: installed, and not the copy that runs, as {reason} on sys.path")


def _print_build() -> None:
    info = ops.build_info()
    built = extension.BUILT
    if extension.REASON:
        print(f"  {extension.PROBLEM or 'the C++ extension ' + extension.REASON}")
    for key, value in info.items():
        print(f"  {key:9} {_text(value)}")
    if info and not info["openmp"]:
        print("  threads   one: built without OpenMP (by clang); a build by GCC uses all of torch's threads")
    asked = built.get("asked")
    best = "the best that could be built" if built else "unknown"
    print(f"  asked     {'ZIPFLS_BUILD=' + asked if asked else best}")
    for build, reason in built.get("reasons", {}).items():
        print(f"  not {build:5} {reason}")


def main() -> int:
    """Run the command: without one, print the report."""
    parser = argparse.ArgumentParser(
        prog="python -m zipfls_cuda", description="Print what is built and which backend serves what."
    )
    commands = parser.add_subparsers(title="command")
    text = "compare every kernel that serves on this machine with a second computation in float64"
    check.add_arguments(commands.add_parser("check", help=text, description=text))
    arguments = parser.parse_args()
    if "run" in arguments:
        return arguments.run(arguments)
    report()
    return 0


def report() -> None:
    """Print the report."""
    print(f"zipfls_cuda {__version__}")
    _print_copy()
    print(f"  python    {platform.python_version()} on {platform.platform()}")
    print(f"  torch     {torch.__version__} (CUDA {torch.version.cuda or 'none'})")
    print(f"  triton    {_version('triton')}")

    print("build")
    _print_build()

    print("devices")
    print(f"  cpu       {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        print(f"  cuda:{i}    {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        print("  cuda      none")

    print("backends, best first")
    for backend in ops.BACKENDS:
        reason = ops.reason_against(backend)
        print(f"  {backend:9} {'not usable: ' + reason if reason else 'usable'}")

    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    print("backends of each operator (float32; the first is the default)")
    for stage in ops.STAGES:
        for device in devices:
            print(f"  {stage:15} {device:6} {_serving(stage, device)}")


if __name__ == "__main__":
    sys.exit(main())
