"""Generated images are made once and kept in a file."""

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .common import OutError, atomic_file, notice


def cached(file: Path, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> np.ndarray:
    """The uint8 images of a file, which is made where it is missing or damaged.

    Args:
        file: its name must tell all that the images depend on; it is written whole or not at all.
        shape: what the images must have.
        make: makes them.
    """
    images = read(file, shape)
    if images is None:
        images = make()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as out:
                np.savez(out, images=images)
        except (OSError, OutError) as error:
            notice(f"cannot keep {file.name} in {file.parent}: {error}")
    return images


def read(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The images of a file, or None where it is missing or damaged."""
    try:
        with np.load(file, allow_pickle=False) as content:
            images = content["images"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        images = None
    if images is None or images.dtype != np.uint8 or images.shape != shape:
        notice(f"{file} is damaged: making it again")
        return None
    return images
