"""The C++ extension: what the build left, whether it fits this torch, and the one warning where it does not.

``MODULE`` is the loaded extension, or None. ``REASON`` says what is wrong, ``PROBLEM`` also the price and
the remedy: both are empty if nothing is, ``PROBLEM`` also if ZIPFLS_BUILD asked for it. ``BUILT`` is what
setup.py wrote down: what was "asked", what was "built", the "reasons" against anything better.
"""

from __future__ import annotations

import importlib
import json
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

FOLDER = Path(__file__).parent
SLOWLY = "plain PyTorch (backend 'reference'), many times slower"
REMEDY = "in the folder of its source: pip install --no-build-isolation --no-deps ."


def _built() -> dict:
    """What setup.py wrote down; {} if nothing, or if that is of a build for another version of Python."""
    try:
        built = json.loads((FOLDER / "_build.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return built if built.get("module", f"_C{EXTENSION_SUFFIXES[0]}") == f"_C{EXTENSION_SUFFIXES[0]}" else {}


def _versions(text: str | None, parts: int) -> str:
    """The first parts of a version."""
    return ".".join((text or "").split("+")[0].split(".")[:parts])


def _mismatch(built_for: dict) -> str:
    """Why an extension must not run with this torch; empty if it may."""
    there, here = (_versions(v, 2) for v in (built_for["torch"], torch.__version__))
    if there != here:
        return f"was built for torch {there}, and this is torch {torch.__version__}"
    there, here = (_versions(v, 1) for v in (built_for["cuda"], torch.version.cuda))
    if there and here and there != here:  # a torch without CUDA has no library for it to load
        return f"was built for CUDA {there}, and this torch for CUDA {here}"
    return ""


def _load(built: dict) -> tuple[ModuleType | None, str]:
    """The extension, or None, and what is wrong with it, as the end of a sentence that it begins."""
    reasons = "; ".join(f"{build}: {reason}" for build, reason in built.get("reasons", {}).items())
    if built.get("built") == "none":
        asked = built["asked"] == "none"
        return None, "was left out at the build (ZIPFLS_BUILD=none)" if asked else f"is not built ({reasons})"
    if not any((FOLDER / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return None, f"is missing: there is no _C{EXTENSION_SUFFIXES[0]} in {FOLDER}"
    wrong = _mismatch(built) if "torch" in built else ""  # before it is loaded, which might end the process
    if wrong:
        return None, f"{wrong}: it is not loaded"
    try:
        module = importlib.import_module("._C", __package__)  # registers the C++ operators
    except ImportError as error:
        return None, f"is built but does not load ({error})"
    if not hasattr(module, "built_for"):
        return None, "was built from an older source than the Python files beside it: it is not used"
    wrong = _mismatch(module.built_for)
    if wrong:
        return None, f"{wrong}: it is not used"
    if torch.version.cuda and not module.built_for["cuda"]:
        return module, "was built without CUDA, which this torch has" + (f" ({reasons})" if reasons else "")
    return module, ""


def _advice(module: ModuleType | None, wrong: str) -> str:
    """What is wrong as a whole message: what, the price, the remedy."""
    if module is None:
        price = f"CPU tensors are served by {SLOWLY}, CUDA tensors by Triton where it is installed"
    else:
        price = f"CUDA tensors are served by Triton where it is installed, else by {SLOWLY}"
    wanted = "cpu" if module is not None else "none"
    return (
        f"zipfls_cuda: the C++ extension {wrong}. {price}. To build it for this torch, {REMEDY} "
        f"(with -v for the compiler's words; ZIPFLS_BUILD={wanted} before it asks for this state by name, "
        "without the warning)"
    )


BUILT = _built()
MODULE, REASON = _load(BUILT)
_as_asked = BUILT.get("asked") == ("none" if MODULE is None else "cpu") and BUILT["built"] == BUILT["asked"]
PROBLEM = _advice(MODULE, REASON) if REASON and not _as_asked else ""
if PROBLEM:
    warnings.warn(PROBLEM, stacklevel=2)
