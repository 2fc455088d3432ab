"""Generated images are made once and kept in a file."""

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .common import OutError, atomic_file, notice

Arrays = dict[str, np.ndarray]


def cached(file: Path, shape: tuple[int, ...], make: Callable[[], Arrays]) -> Arrays:
    """The arrays of a file, which is made where it is missing or damaged.

    Args:
        file: its name must tell all that the arrays depend on; it is written whole or not at all.
        shape: what the array `images`, of bytes, must have; there may be more of them.
        make: makes the arrays.
    """
    arrays = read(file, shape)
    if arrays is None:
        if file.exists():
            notice(f"{file} is damaged: making it again")
        arrays = make()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as out:
                np.savez_compressed(out, **arrays)
        except (OSError, OutError) as error:
            notice(f"cannot keep {file.name} in {file.parent}: {error}")
    return arrays


def read(file: Path, shape: tuple[int, ...]) -> Arrays | None:
    """The arrays of a file; None where it is missing or damaged, or has images of another shape."""
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        images = arrays["images"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    fits = images.dtype == np.uint8 and len(images) >= shape[0] and images.shape[1:] == shape[1:]
    return arrays if fits else None
