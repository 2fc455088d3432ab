"""Which code a measurement is of, and what is there; imports nothing of the package: it may not be built."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh")


def digest(folders: Iterable[str] = ("zipfls_cuda", "csrc"), files: Iterable[str] = ("setup.py",)) -> str:
    """Changes with the sources in the folders, and with the files."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))]
    digest = hashlib.sha256()
    for path in [*(path for path in found if path.suffix in SUFFIXES), *(ROOT / file for file in files)]:
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def first_line(*command: str) -> str:
    """What a command prints; empty if it cannot run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""
