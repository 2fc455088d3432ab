"""Train a small ResNet with Zipf's Label Smoothing and compare it with the usual losses.

    python examples/train.py --preset demo                      # ce, ls, zipf on handwritten digits
    python examples/train.py --data fractals --loss ce,zipf     # 100 generated fine-grained classes
    python examples/train.py --data folder:PATH --loss zipf      # your images, PATH/<class>/<image>
    python examples/train.py --data cifar100:PATH --loss ce,ls,zipf --epochs 100
    python examples/train.py --preset cifar100 --data cifar100:PATH  # the authors' setting
    torchrun --nproc-per-node 2 examples/train.py --data fractals

A training loop of your own needs the lines marked (1), (2) and (3): a network that also returns its
dense feature map, one call that lets every position of that map vote, and the loss. All the rest is
an ordinary training script. With --model timm:NAME, zls.attach takes the place of (1) and (2).
docs/RECIPES.md has the authors' settings and the loops of other frameworks.

Under --out, each loss gets a log with one JSON line per epoch (LOSS.jsonl) and a checkpoint
(LOSS.pt) from which --resume goes on as if nothing had happened. At the end come summary.json and
two pictures: curves.png, and spectra.png, the paper's Fig. 2: the mean sorted softmax probabilities
with the Zipf law fitted to them.

Shapes: N batch, C classes, D channels, H, W height and width of the last map, P = H*W positions.
Source: Liang et al., "Efficient One Pass Self-distillation with Zipf's Label Smoothing", ECCV 2022.
"""

import argparse
import json
import math
import os
import pickle
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import zipfls_cuda as zls


class UsageError(Exception):
    """What an option asks for cannot be done; the message says why."""

    option = ""


# ------------------------------------------------------------------------------------------- data


class DataError(UsageError):
    """The data is missing or not what it should be."""

    option = "--data"


@dataclass
class Split:
    """Images in memory, with their classes."""

    images: torch.Tensor  # (N, channels, size, size) uint8
    labels: torch.Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, limit: int) -> "Split":
        """A random selection of at most `limit` images, always the same one."""
        keep = select(len(self), limit)
        return Split(self.images[keep], self.labels[keep])


def select(count: int, limit: int | None) -> torch.Tensor:
    """Indices of `limit` things out of `count`, random but always the same; all of them if not more."""
    if limit is None or count <= limit:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit]


@dataclass
class Data:
    """A training and a test set."""

    train: Split
    test: Split
    classes: list[str]  # C names
    mirror: bool  # does a mirrored image keep its class?


def load_data(source: str, size: int, cache: Path, limit: int | None = None) -> Data:
    """Load what --data names; see data_source for the names.

    Args:
        source: the name of the data, with its argument after a colon.
        size: height and width of the images in pixels.
        cache: folder where generated data is kept.
        limit: images of each set at most, where each is a file of its own.
    """
    kind, _, argument = source.partition(":")
    if kind == "digits":
        return load_digits(size)
    if kind == "fractals":
        return load_fractals(int(argument or 100), size, cache)
    if kind == "folder":
        return load_folder(Path(argument).expanduser(), size, limit)
    if kind == "tinyimagenet":
        return load_tinyimagenet(Path(argument).expanduser(), size, limit)
    return load_cifar100(Path(argument).expanduser(), size)


def split_by_class(labels: Sequence[int], test_part: float = 0.25) -> tuple[list[int], list[int]]:
    """Draw the same part of every class for the test set; returns training and test indices."""
    rng = np.random.default_rng(0)  # the split is a property of the data: no seed of a run moves it
    labels = np.asarray(labels)
    train, test = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cut = max(1, round(test_part * len(members)))
        test.extend(members[:cut].tolist())
        train.extend(members[cut:].tolist())
    return sorted(train), sorted(test)


def load_digits(size: int) -> Data:
    """The 1797 handwritten digits that come with scikit-learn, 8x8 grey, resized to `size`."""
    from sklearn.datasets import load_digits as bundled_digits

    digits = bundled_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)  # (N, 1, 8, 8)
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images, labels = images.round().to(torch.uint8), torch.from_numpy(digits.target).long()
    train, test = split_by_class(digits.target)
    return Data(
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
        [str(digit) for digit in range(10)],
        mirror=False,
    )


IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
TEST_PARTS = ("val", "valid", "validation", "test")  # beside train/; of several the first is taken


def load_folder(root: Path, size: int, limit: int | None = None) -> Data:
    """Images of any size from ROOT/<class>/, a quarter of each class being kept for testing.

    Where there is ROOT/train/<class>/ with val/, valid/, validation/ or test/ beside it, in small or capital
    letters, they are used as they are. Of several the first in this order is taken, which a line on standard
    error says.

    Raises:
        DataError: no folder, fewer than 2 classes, a class without an image or with too few to split, a class
            for testing that the training set lacks, one half of such a split alone.
    """
    folders = {entry.name.lower(): entry for entry in visible(root, []) if entry.is_dir()}
    parts = [folders[name] for name in TEST_PARTS if name in folders]
    if "train" in folders and parts:
        train_root, test_root, *others = folders["train"], *parts
        if others:
            names = ", ".join(part.name for part in others)
            notice(f"{root}: testing on {test_root.name}, not on {names}")
        classes, files, labels = find_images(train_root)
        test_classes, test_files, test_labels = find_images(test_root)
        missing = ", ".join(sorted(set(classes) - set(test_classes)))
        if unknown := ", ".join(sorted(set(test_classes) - set(classes))):
            reverse = f"; {test_root.name} lacks: {missing}" if missing else ""
            raise DataError(f"{test_root} has classes that {train_root} lacks: {unknown}{reverse}")
        if missing:
            notice(f"{test_root} has no image of these classes: {missing}")
        test_labels = [classes.index(test_classes[label]) for label in test_labels]
    else:
        for name in ("train", *TEST_PARTS):
            if name in folders and holds_folders_alone(folders[name]):
                raise DataError(
                    f"{folders[name]} holds folders as one part of a split does; "
                    f"{root} needs train and one of {', '.join(TEST_PARTS)}"
                )
        classes, every_file, every_label = find_images(root)
        train, test = split_by_class(every_label)
        if alone := sorted(set(every_label) - {every_label[i] for i in train}):
            names = "; ".join(f"{root / classes[label]} has one image" for label in alone)
            raise DataError(f"{names}; a class needs one to train and one to test")
        files, labels = [every_file[i] for i in train], [every_label[i] for i in train]
        test_files, test_labels = [every_file[i] for i in test], [every_label[i] for i in test]
    return Data(
        read_split(files, labels, size, limit),
        read_split(test_files, test_labels, size, limit),
        classes,
        mirror=True,
    )


def load_tinyimagenet(root: Path, size: int, limit: int | None = None) -> Data:
    """TinyImageNet as published: train/<class>/images/, and val/images/ with val_annotations.txt."""
    if (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    classes, files, labels = find_images(root / "train")
    listing = root / "val" / "val_annotations.txt"
    try:
        rows = [line.split("\t") for line in listing.read_text().splitlines()]
        test_labels = [classes.index(row[1]) for row in rows]
    except FileNotFoundError:
        raise DataError(f"there is no file {listing}") from None
    except (IndexError, ValueError) as error:
        raise DataError(f"{listing} is not a list of images and classes: {error}") from error
    test_files = [root / "val" / "images" / row[0] for row in rows]
    return Data(
        read_split(files, labels, size, limit),
        read_split(test_files, test_labels, size, limit),
        classes,
        mirror=True,
    )


def find_images(root: Path) -> tuple[list[str], list[Path], list[int]]:
    """List ROOT/<class>/**/<image>: the class names, the files and the class of each file.

    What is hidden, no image by its suffix, or in no class folder is skipped; a line on standard error names
    the first of it.
    """
    skipped: list[Path] = []
    entries = visible(root, skipped)
    folders = [entry for entry in entries if entry.is_dir()]
    skipped += [entry for entry in entries if not entry.is_dir()]
    if len(folders) < 2:
        raise DataError(f"{root} needs at least 2 class folders, it has {len(folders)}")
    found = [list(images_below(folder, skipped)) for folder in folders]
    if skipped:
        names = [str(path.relative_to(root)) for path in sorted(skipped)]
        more = f" and {len(names) - 5} more" if names[5:] else ""
        reason = "hidden, no image, or in no class folder"
        notice(f"{root}: skipped, since {reason}: {', '.join(names[:5])}{more}")
    if empty := [folder for folder, files in zip(folders, found, strict=True) if not files]:
        raise DataError("; ".join(f"class folder {folder} holds no image" for folder in empty))
    labels = [label for label, files in enumerate(found) for _ in files]
    return [folder.name for folder in folders], [file for files in found for file in files], labels


def visible(folder: Path, skipped: list[Path]) -> list[Path]:
    """The entries of a folder in order; hidden ones are added to `skipped` instead.

    Hidden are names with a dot in front (.ipynb_checkpoints, the ._NAME of a Mac) and SYSTEM_FOLDERS.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    shown = []
    for entry in sorted(folder.iterdir()):
        hidden = entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS
        (skipped if hidden else shown).append(entry)
    return shown


def notice(text: str) -> None:
    """Say on standard error what was decided about the data; of several processes the first says it."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def images_below(folder: Path, skipped: list[Path]) -> Iterator[Path]:
    """The images of a folder and of those in it, in order; what is none is added to `skipped`."""
    for entry in visible(folder, skipped):
        if entry.is_dir() and not entry.is_symlink():  # a link may lead round in a circle
            yield from images_below(entry, skipped)
        elif entry.suffix.lower() in IMAGE_SUFFIXES:
            yield entry
        else:
            skipped.append(entry)


def holds_folders_alone(folder: Path) -> bool:
    """Whether a folder holds folders and no image directly."""
    entries = visible(folder, [])
    is_folder = [entry.is_dir() for entry in entries]
    return any(is_folder) and not any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in entries)


def read_split(files: Sequence[Path], labels: Sequence[int], size: int, limit: int | None) -> Split:
    """Read at most `limit` of the images."""
    keep = select(len(files), limit)
    return Split(read_images([files[i] for i in keep], size), torch.tensor(labels)[keep])


def read_images(files: Sequence[Path], size: int) -> torch.Tensor:
    """Read images, crop them to a square and resize: (N, 3, size, size) uint8.

    Images of more than 8 bits are scaled to 8 (see scale_to_bytes).

    Raises:
        DataError: a file is no image, or of numbers whose range is not known; the images of more than 8 bits
            all lie in the lowest sixteenth of their range; they are too many for the memory.
    """
    from PIL import Image, ImageOps

    needed = len(files) * 3 * size**2
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        raise DataError(
            f"{len(files)} images of {size} x {size} pixels are {needed / 1e9:.1f} GB, too many to keep in "
            f"the {memory / 1e9:.1f} GB of memory here, which this script does; see --limit and --size"
        )
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    highest = {}  # of each image of more than 8 bits, as a share of its range

    def read(i: int) -> None:
        try:
            with Image.open(files[i]) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode in ("I", "F") or image.mode.startswith("I;"):
                    values, highest[files[i]] = scale_to_bytes(np.asarray(image))
                    image = Image.fromarray(values)
                image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read the image {files[i]}: {error}") from error
        images[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        list(pool.map(read, range(len(files))))
    if highest and max(highest.values()) < 1 / 16:  # 12 bits stored in 16, say
        file, share = max(highest.items(), key=lambda item: item[1])
        raise DataError(
            f"the images of more than 8 bits reach {share:.2%} of their range at most, in {file}: they would "
            "be next to black; scale them all by one number, to 0 to 65535 in 16 bits or 0 to 1 in floats"
        )
    return images


def scale_to_bytes(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Bring the pixels of an image of more than 8 bits to 0 to 255.

    Floats count from 0 to 1, whole numbers from 0 to 65535: those of 32 bits too, which is what Pillow gives
    for some files of 16 bits. No file states what other numbers mean, and images each scaled by their own
    lowest and highest pixel could not be compared.

    Args:
        values: (H, W) integers or floats.

    Returns:
        (H, W) uint8, and the highest pixel as a share of the range.

    Raises:
        ValueError: a pixel is NaN or outside the range.
    """
    floats = values.dtype.kind == "f"
    top = 1 if floats else 65535
    low, high = values.min(), values.max()  # NaN if any pixel is
    if np.isnan(low):
        raise ValueError("it has pixels that are NaN")
    if low < 0 or high > top:
        kind = "floats" if floats else "whole numbers"
        raise ValueError(f"its {kind} go from {low:g} to {high:g}, where 0 to {top} is expected")
    return np.rint(values * (255 / top)).astype(np.uint8), float(high) / top


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that builds NumPy arrays and plain values only; a full one may run any code."""

    def find_class(self, module: str, name: str):
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        try:
            return allowed[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed here") from None


def load_cifar100(root: Path, size: int) -> Data:
    """CIFAR-100 from its published Python pickles, the files `train` and `test` (and `meta`)."""
    if (root / "cifar-100-python").is_dir():
        root = root / "cifar-100-python"

    def unpickle(name: str) -> dict:
        try:
            with open(root / name, "rb") as file:
                content = ArrayUnpickler(file, encoding="latin1").load()
        except FileNotFoundError:
            raise DataError(f"there is no file {root / name}") from None
        except Exception as error:  # a damaged pickle can raise anything
            raise DataError(f"{root / name} is not a CIFAR-100 file: {error}") from error
        if not isinstance(content, dict):
            raise DataError(f"{root / name} is not a CIFAR-100 file: it holds no dictionary")
        return content

    def load(name: str) -> Split:
        content = unpickle(name)
        pixels, labels = content.get("data"), content.get("fine_labels")
        if not (
            isinstance(pixels, np.ndarray)
            and pixels.dtype == np.uint8
            and pixels.shape == (max(1, len(pixels)), 3 * 32 * 32)
        ):
            raise DataError(f"{root / name}: 'data' is not an (N, 3072) array of bytes")
        if not (
            isinstance(labels, list)
            and len(labels) == len(pixels)
            and all(isinstance(label, int) and 0 <= label < 100 for label in labels)
        ):
            raise DataError(f"{root / name}: 'fine_labels' is not a class from 0 to 99 per image")
        images = torch.tensor(pixels).view(-1, 3, 32, 32)
        if size != 32:
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        return Split(images, torch.tensor(labels))

    names = unpickle("meta").get("fine_label_names") if (root / "meta").exists() else None
    return Data(load("train"), load("test"), names or [str(i) for i in range(100)], mirror=True)


# --------------------------------------------------------------------------------------- fractals
#
# A fine-grained set from nothing but seeds. A family is an iterated function system: four affine
# maps of the plane, applied in random order to a wandering point, which traces the attractor. A
# relative moves the family's maps a little; an image is one view of one attractor.

FAMILIES, RELATIVES, MAPS = 20, 5, 4
KINSHIP = np.array([0.06, 0.06, 0.015, 0.015, 0.04, 0.04])  # how far relatives are from each other
FRACTALS_VERSION = 1  # part of the cached file's name: raise it when the pictures change


def load_fractals(per_class: int, size: int, cache: Path) -> Data:
    """100 classes, 20 families of 5 near relatives; generated once, then read from the cache.

    Args:
        per_class: training images per class; the test set has a fifth of that.
        size: height and width in pixels.
        cache: folder of the cached file, which is written whole or not at all.
    """
    test_per_class = max(1, per_class // 5)
    shape = (FAMILIES * RELATIVES, per_class + test_per_class, 3, size, size)
    file = cache / f"fractals-v{FRACTALS_VERSION}-{size}px-{per_class}.npz"
    images = read_cached(file, shape)
    if images is None:
        images = make_fractals(shape[1], size)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as out:
                np.savez(out, images=images)
        except OSError as error:
            print(f"cannot keep the fractals in {cache}: {error}", file=sys.stderr)

    def split(part: np.ndarray) -> Split:
        labels = torch.arange(len(part)).repeat_interleave(part.shape[1])
        return Split(torch.from_numpy(part.reshape(-1, 3, size, size)), labels)

    names = [f"family {f} relative {r}" for f in range(FAMILIES) for r in range(RELATIVES)]
    return Data(split(images[:, :per_class]), split(images[:, per_class:]), names, mirror=False)


def read_cached(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The images of a cached file, or None where it is missing or damaged."""
    try:
        with np.load(file, allow_pickle=False) as content:
            images = content["images"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        images = None
    if images is None or images.dtype != np.uint8 or images.shape != shape:
        print(f"{file} is damaged: making it again", file=sys.stderr)
        return None
    return images


def make_fractals(per_class: int, size: int, seed: int = 0) -> np.ndarray:
    """Generate (100, per_class, 3, size, size) uint8, a function of the arguments alone."""
    rng = np.random.default_rng(seed)
    families = choose_families(rng)  # (20, 4, 6)
    relatives = np.repeat(families, RELATIVES, axis=0)  # (100, 4, 6)
    relatives = relatives + KINSHIP * rng.normal(size=relatives.shape)
    relatives[..., 2:4] = relatives[..., 2:4].clip(-0.85, 0.85)  # below 1: every map contracts
    points, maps = trace_attractors(relatives, 16384, rng)
    family = np.repeat(np.arange(FAMILIES), RELATIVES)
    centre = points.reshape(FAMILIES, -1, 2).mean(1)[family, None]
    spread = points.reshape(FAMILIES, -1, 2).std((1, 2))[family, None, None]
    points = ((points - centre) / spread).astype(np.float32)
    palettes = rng.uniform(0.2, 1.0, (FAMILIES, MAPS, 3))[family]
    attractors = zip(points, maps, palettes, strict=True)
    return np.stack([take_views(*attractor, per_class, size, rng) for attractor in attractors])


def rotation(angle: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 2, 2) of angles (...) in radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


def choose_families(rng: np.random.Generator) -> np.ndarray:
    """Draw 20 systems whose attractors neither shrink to dust nor fill the plane.

    Returns:
        (20, 4, 6): per map two angles in radians, two scales, and the offset in x and y.
    """
    count = 8 * FAMILIES
    systems = np.empty((count, MAPS, 6))
    systems[..., 0:2] = rng.uniform(-np.pi, np.pi, (count, MAPS, 2))
    systems[..., 2] = rng.uniform(0.35, 0.8, (count, MAPS))
    systems[..., 3] = systems[..., 2] * rng.uniform(0.3, 1.0, (count, MAPS))
    systems[..., 3] *= rng.choice([-1, 1], (count, MAPS))
    systems[..., 4:6] = rng.uniform(-1, 1, (count, MAPS, 2))
    points, _ = trace_attractors(systems, 4096, rng)
    points = points - points.mean(1, keepdims=True)
    points = points / points.std((1, 2), keepdims=True)
    cell = np.clip((points + 2.5) * (32 / 5), 0, 31).astype(np.int64)
    cell = cell[..., 0] * 32 + cell[..., 1] + 1024 * np.arange(count)[:, None]
    covered = (np.bincount(cell.ravel(), minlength=1024 * count).reshape(count, -1) > 0).mean(1)
    return systems[(covered > 0.12) & (covered < 0.40)][:FAMILIES]


def trace_attractors(
    systems: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Play the chaos game with K systems at once, 512 points of each side by side.

    Args:
        systems: (K, 4, 6) as choose_families returns them.
        count: points per attractor, a multiple of 512.

    Returns:
        points: (K, count, 2), and for each the map that was applied last: (K, count).
    """
    matrix = rotation(systems[..., 0]) * systems[..., None, 2:4] @ rotation(systems[..., 1])
    offset = systems[..., 4:6]
    weight = np.abs(np.linalg.det(matrix)) + 0.05  # a map is drawn as often as it fills area
    threshold = (weight / weight.sum(1, keepdims=True)).cumsum(1)[:, None, :-1]
    system = np.arange(len(systems))[:, None]
    point = np.zeros((len(systems), 512, 2))
    points, maps = [], []
    for step in range(16 + count // 512):
        chosen = (rng.random((len(systems), 512, 1)) > threshold).sum(-1)
        point = np.einsum("kpij,kpj->kpi", matrix[system, chosen], point) + offset[system, chosen]
        if step >= 16:  # by then a point has forgotten where it began
            points.append(point)
            maps.append(chosen)
    return np.concatenate(points, 1), np.concatenate(maps, 1)


def take_views(
    points: np.ndarray,
    maps: np.ndarray,
    palette: np.ndarray,
    count: int,
    size: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw views of one attractor: turned, scaled, moved, recoloured, on a noisy background.

    Args:
        points: (M, 2), centred, with unit spread; maps: (M,), the map behind each point.
        palette: (4, 3), the colour of each map in red, green, blue from 0 to 1.

    Returns:
        (count, 3, size, size) uint8.
    """
    pick = rng.integers(len(points), size=(count, 2 * size * size))
    angle, scale = rng.uniform(-0.3, 0.3, count), rng.uniform(0.8, 1.2, count)
    view = (rotation(angle) * scale[:, None, None]).astype(np.float32)
    shift = rng.uniform(-0.4, 0.4, (count, 1, 2)).astype(np.float32)
    pixel = np.floor((points[pick] @ view + shift + 2.5) * (size / 5)).astype(np.int64)
    seen = ((pixel >= 0) & (pixel < size)).all(-1)
    layer = np.arange(count)[:, None] * MAPS + maps[pick]
    place = (layer * size + pixel[..., 1]) * size + pixel[..., 0]
    hits = np.bincount(place[seen], minlength=count * MAPS * size * size)
    hits = hits.reshape(count, MAPS, size * size).astype(np.float32)
    ink = hits.sum(1, keepdims=True)  # (count, 1, size * size)
    colour = palette + rng.normal(0, 0.15, (count, MAPS, 3))
    colour = np.swapaxes(colour, 1, 2).astype(np.float32) @ hits / np.maximum(ink, 1)
    cover = 1 - np.exp(-ink / 3)
    background = rng.uniform(0, 0.4, (count, 3, 1)).astype(np.float32)
    image = background + cover * (colour - background)
    image += rng.normal(0, 0.08, image.shape).astype(np.float32)
    return (image.clip(0, 1) * 255).round().astype(np.uint8).reshape(count, 3, size, size)


# ---------------------------------------------------------------------------------------- network


# On x86 processors without AVX-512, oneDNN 3.12 (torch 2.13 and 2.14) writes out of bounds in the backward of
# strided 1x1 convolutions with fewer than 8 input channels of channels_last maps: gradients are wrong, or the
# process crashes or never ends. ONEDNN_MAX_CPU_ISA=AVX2 shows it on any x86 processor.
MIN_WIDTH = 8


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if inputs != outputs or stride != 1:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al.: depth 6n+2, three stages, the last map a quarter of the input.

    Training mode returns (logits, features), eval mode plain logits:
        images (N, channels, size, size) -> logits (N, C), features (N, D, size/4, size/4).
    With `deep`, training mode returns two more: the map of the stage before the last,
        (N, D/2, size/2, size/2), and the logits (N, C) of a classifier of its own.
    """

    def __init__(self, depth: int, channels: int, num_classes: int, width: int = 16, deep: bool = False):
        super().__init__()
        layers = [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        inputs = width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                outputs = width * 2**stage
                layers.append(Block(inputs, outputs, stride=2 if stage and not block else 1))
                inputs = outputs
        self.body = nn.Sequential(*layers)
        self.last = len(layers) - (depth - 2) // 6  # where the last stage begins
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.deep_fc = nn.Linear(inputs // 2, num_classes) if deep else None

    def forward(self, images: torch.Tensor):
        deep_features = self.body[: self.last](images)
        features = self.body[self.last :](deep_features)  # (N, D, H, W): the dense map, before pooling
        logits = self.fc(features.mean((2, 3)))
        if self.training and self.deep_fc is not None:
            return logits, features, deep_features, self.deep_fc(deep_features.mean((2, 3)))
        return (logits, features) if self.training else logits  # (1)


class ModelError(UsageError):
    """The model does not exist, or its positions cannot vote."""

    option = "--model"


def make_network(args: argparse.Namespace, channels: int, num_classes: int, deep: bool) -> nn.Module:
    """The network that --model names."""
    if args.model == "resnet":
        return ResNet(args.depth, channels, num_classes, args.width, deep)
    try:
        import timm

        name = args.model.removeprefix("timm:")
        known = timm.get_pretrained_cfg(name)
        size = {"img_size": args.size} if known and known.fixed_input_size else {}
        return timm.create_model(name, num_classes=num_classes, in_chans=channels, **size)
    except (ImportError, RuntimeError) as error:
        raise ModelError(f"cannot make {args.model}: {error}") from error


def attach_votes(net: nn.Module, args: argparse.Namespace, example: torch.Tensor) -> zls.Handle:
    """Let a timm model vote: the handle is for ZipfLoss(votes=...)."""
    stages = getattr(net, "feature_info", [])
    stages = [stage["module"] for stage in getattr(stages, "info", stages)]
    if args.deep and len(stages) < 2:
        raise ModelError(f"{args.model} does not tell its stages, which --deep needs")
    try:
        deep = stages[-2:-1] if args.deep else ()
        return zls.attach(net, deep=deep, upsample=args.upsample, example=example)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{args.model}: {error}") from error


# ----------------------------------------------------------------------------------------- losses

LOSSES = {
    "ce": "cross-entropy",
    "ls": "label smoothing",
    "zipf": "Zipf's label smoothing",
}

LAWS = {  # what --distribution may name, with the default of its number where it takes one
    "constant": (zls.Constant,),
    "linear": (zls.LinearDecay, 0.0),
    "exponential": (zls.ExponentialDecay, 1.0),
    "uniform": (zls.RandomUniform,),
    "pareto": (zls.RandomPareto, 1.0),
}


class LawError(UsageError):
    """The distribution does not exist, or not for this number of classes."""

    option = "--distribution"


def make_law(text: str) -> zls.Distribution:
    """The law that --distribution names: NAME or NAME:NUMBER."""
    name, colon, number = text.partition(":")
    if name not in LAWS:
        raise LawError(f"{name!r} is not one of {', '.join(LAWS)}")
    law, *default = LAWS[name]
    if colon and not default:
        raise LawError(f"{name!r} takes no number")
    try:
        return law(float(number)) if colon else law(*default)
    except ValueError as error:
        raise LawError(f"{text!r}: {error}") from error


def make_loss(name: str, args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The training criterion that --loss names."""
    if name == "ce":
        return nn.CrossEntropyLoss()
    if name == "ls":
        return nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    weights = {"zipf_weight": args.zipf_weight, "deep_weight": args.deep_weight, "ranking": args.ranking}
    if args.distribution is None:
        return zls.ZipfLoss(alpha=args.alpha, **weights)
    law = make_law(args.distribution)
    try:  # some laws exist for few classes only
        zls.zipf_label(torch.zeros(1).long(), torch.zeros(1, 1).int(), num_classes, distribution=law)
    except ValueError as error:
        raise LawError(str(error)) from error
    return zls.ZipfLoss(distribution=law, **weights)


# --------------------------------------------------------------------------------------- training


@dataclass
class Place:
    """Where this process runs: its device, and its rank among the processes of the run."""

    device: torch.device
    rank: int = 0
    processes: int = 1

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over all processes, in place."""
        if self.processes > 1:
            dist.all_reduce(values)
        return values


class Loader:
    """Shuffled, augmented and normalised batches of this process.

    One generator draws order and augmentation of whole batches in every process, and each takes
    every `processes`-th image of them: what is drawn does not depend on how many there are, and the
    generator's state is all a checkpoint must hold. An incomplete last batch is left out.
    """

    def __init__(self, data: Data, batch_size: int, seed: int, place: Place):
        self.images = data.train.images.to(place.device)
        self.labels = data.train.labels.to(place.device)
        whole = min(batch_size, len(self.labels))
        self.batch_size = whole - whole % place.processes
        if not self.batch_size:
            raise DataError(f"{whole} training images are too few for {place.processes} processes")
        self.place, self.mirror = place, data.mirror
        self.generator = torch.Generator().manual_seed(seed)
        self.mean, self.std = mean_and_std(data.train.images, place.device)

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images (n, channels, size, size) float32 and labels (n,) int64."""
        margin = self.images.shape[-1] // 8
        order = torch.randperm(len(self.labels), generator=self.generator)
        mine = slice(self.place.rank, None, self.place.processes)
        for index in order[: len(self) * self.batch_size].view(len(self), self.batch_size):
            corner = torch.randint(2 * margin + 1, (2, self.batch_size), generator=self.generator)
            mirror = torch.rand(self.batch_size, generator=self.generator) < 0.5
            drawn = index[mine], corner[:, mine], mirror[mine] & self.mirror
            index, corner, mirror = (x.to(self.place.device) for x in drawn)
            images = crop(self.images[index], corner, mirror, margin)
            yield normalise(images, self.mean, self.std), self.labels[index]


def mean_and_std(images: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel, (channels, 1, 1), of (N, channels, size, size) uint8."""
    value = torch.arange(256, dtype=torch.float64)
    count = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)])
    share = count / count.sum(1, keepdim=True).double()  # (channels, 256): no float copy is made
    mean = share @ value
    std = ((share @ value**2) - mean**2).clamp_min(1).sqrt()
    return tuple(x.float().view(-1, 1, 1).to(device) for x in (mean, std))


def crop(images: torch.Tensor, corner: torch.Tensor, mirror: torch.Tensor, margin: int) -> torch.Tensor:
    """Pad images by `margin`, cut each at its own corner, and flip those marked.

    Args:
        images: (n, channels, size, size) uint8.
        corner: (2, n) int64, row and column from 0 to 2 * margin.
        mirror: (n,) bool.
    """
    size = images.shape[-1]
    padded = F.pad(images, (margin,) * 4)
    along = torch.arange(size, device=images.device)
    row = corner[0, :, None] + along
    column = corner[1, :, None] + torch.where(mirror[:, None], along.flip(0), along)
    n = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[n, :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Bytes to floats of mean 0 and deviation 1, channels last in memory."""
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


class Trainer:
    """A network, the loss it is trained with, and all that a checkpoint must hold of them."""

    def __init__(self, loss: str, seed: int, data: Data, args: argparse.Namespace, place: Place):
        self.place, self.amp, self.upsample = place, args.amp, args.upsample
        self.loader = Loader(data, args.batch_size, seed, place)
        self.num_classes = len(data.classes)
        self.criterion = make_loss(loss, args, self.num_classes).to(place.device)
        torch.manual_seed(seed)  # equal seeds, equal weights, whatever the loss
        self.votes = loss == "zipf" and args.ranking == "votes"
        shape = data.train.images.shape[1:]
        net = make_network(args, shape[0], self.num_classes, self.votes and args.deep)
        self.net = net.to(place.device, memory_format=torch.channels_last)
        if self.votes and args.model != "resnet":
            self.criterion.votes = attach_votes(net, args, torch.randn(2, *shape, device=place.device))
        self.model = nn.parallel.DistributedDataParallel(net) if place.processes > 1 else net
        torch.manual_seed(seed + place.rank)  # the random laws draw from here
        self.optimizer = torch.optim.SGD(
            net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True
        )
        self.steps = args.epochs * len(self.loader)
        warmup = min(1, args.epochs / 5) * len(self.loader)

        def rate(step: int) -> float:
            """Linear warm-up, then half a cosine down to zero."""
            return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=args.amp == "fp16")

    def autocast(self) -> torch.autocast:
        """The mixed precision of --amp: none, bf16 or fp16."""
        dtype = torch.float16 if self.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.place.device.type, dtype, enabled=self.amp != "none")

    def train_epoch(self, bar: tqdm) -> dict[str, float]:
        """Pass over the training set once; returns mean objective, cross-entropy and accuracy."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.place.device)
        self.model.train()
        for images, labels in self.loader:
            with self.autocast():
                output = self.model(images)
                logits = output[0] if isinstance(output, tuple) else output
                if not self.votes:
                    output = logits
                elif isinstance(
                    self.net, ResNet
                ):  # others are attached, and the criterion asks for their votes
                    output = self.vote(*output)
                loss = self.criterion(output, labels)  # (3)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            with torch.no_grad():
                cross_entropy = F.cross_entropy(logits.float(), labels, reduction="sum")
                correct = (logits.argmax(1) == labels).sum()
                sums += torch.stack([loss * len(labels), cross_entropy, correct])
            bar.update()
        means = self.place.sum(sums) / (len(self.loader) * self.loader.batch_size)
        names = "train_loss", "train_cross_entropy", "train_accuracy"
        return dict(zip(names, means.tolist(), strict=True))

    def vote(self, logits: torch.Tensor, features: torch.Tensor, *deep: torch.Tensor) -> tuple:
        """What ZipfLoss takes, (logits, votes) or (logits, votes, deep_logits), of what ResNet returned."""
        fc = self.net.fc
        votes = zls.dense_vote(features, fc.weight, fc.bias, upsample=self.upsample)  # (2)  (N, P) int32
        if not deep:
            return logits, votes
        deep_features, deep_logits = deep
        fc = self.net.deep_fc
        deep_votes = zls.dense_vote(deep_features, fc.weight, fc.bias, upsample=self.upsample)
        return logits, torch.cat([votes, deep_votes], 1), deep_logits

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, C) float32 in eval mode of images (N, channels, size, size) uint8."""
        self.net.eval()
        logits = [torch.empty(0, self.num_classes, device=self.place.device)]
        for batch in images.split(500):
            batch = normalise(batch.to(self.place.device), self.loader.mean, self.loader.std)
            with self.autocast():
                logits.append(self.net(batch).float())
        return torch.cat(logits)

    def evaluate(self, test: Split) -> dict[str, float]:
        """Cross-entropy and accuracy on a test set, which the processes share out."""
        if self.place.processes > 1:  # each has seen other batches: the first one's averages count
            for buffer in self.net.buffers():
                dist.broadcast(buffer, 0)
        mine = slice(self.place.rank, None, self.place.processes)
        logits = self.predict(test.images[mine])
        labels = test.labels[mine].to(logits.device)
        cross_entropy = F.cross_entropy(logits, labels, reduction="sum").double()
        correct = (logits.argmax(1) == labels).sum()
        means = self.place.sum(torch.stack([cross_entropy, correct])) / len(test)
        return dict(zip(("test_cross_entropy", "test_accuracy"), means.tolist(), strict=True))

    def parts(self) -> dict:
        """What has a state_dict of its own."""
        names = "net", "optimizer", "scheduler", "scaler"
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict:
        """All that the rest of the run depends on; a call that all processes make together."""
        random = [torch.get_rng_state()]
        if self.place.device.type == "cuda":
            random.append(torch.cuda.get_rng_state())
        every_random = [random]
        if self.place.processes > 1:
            every_random = [None] * self.place.processes
            dist.all_gather_object(every_random, random)
        state = {name: part.state_dict() for name, part in self.parts().items()}
        return state | {"random": every_random, "order": self.loader.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Go back to where state_dict was called."""
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.loader.generator.set_state(state["order"])
        random = state["random"][self.place.rank]
        torch.set_rng_state(random[0])
        if self.place.device.type == "cuda" and len(random) > 1:
            torch.cuda.set_rng_state(random[1])


@dataclass
class Run:
    """One trained network and what was measured on it."""

    loss: str
    seed: int
    history: list[dict]  # one record per epoch
    spectrum: list[float]  # C mean probabilities, sorted, highest first
    alpha: float  # exponent of the Zipf law fitted to them
    intercept: float  # log probability of that law at rank 1


def train(loss: str, seed: int, data: Data, args: argparse.Namespace, place: Place) -> Run:
    """Train one network, or finish what a checkpoint began."""
    name = loss if len(args.seed) == 1 else f"{loss}-seed{seed}"
    checkpoint, log = args.out / f"{name}.pt", args.out / f"{name}.jsonl"
    trainer = Trainer(loss, seed, data, args, place)
    settings = describe(args, data, place)
    history = []
    if args.resume and checkpoint.exists():
        history = load_checkpoint(checkpoint, trainer, settings)
        write_log(log, history, place)
    bar = tqdm(
        desc=name,
        total=trainer.steps,
        initial=len(history) * len(trainer.loader),
        unit="batch",
        leave=False,
        disable=True if place.rank else None,  # None: only where there is a terminal
    )
    with bar:
        for epoch in range(len(history) + 1, args.epochs + 1):
            record = {"loss": loss, "seed": seed, "epoch": epoch}
            record["lr"] = trainer.scheduler.get_last_lr()[0]
            start = time.perf_counter()
            record |= trainer.train_epoch(bar)
            record["train_seconds"] = time.perf_counter() - start
            if not math.isfinite(record["train_loss"]):
                raise FloatingPointError(f"the loss {name} became {record['train_loss']}")
            record |= trainer.evaluate(data.test)
            history.append(record)
            save_checkpoint(checkpoint, trainer, settings, history)
            write_log(log, history, place)
            if place.rank == 0:
                tqdm.write(
                    f"{name:<5} epoch {epoch:>{len(str(args.epochs))}}/{args.epochs}"
                    f"  train {record['train_loss']:.4f} ({record['train_accuracy']:7.2%})"
                    f"  test {record['test_cross_entropy']:.4f} ({record['test_accuracy']:7.2%})"
                    f"  {record['train_seconds']:.1f} s"
                )
    probabilities = trainer.predict(data.test.images).softmax(1)  # (M, C)
    alpha, intercept = zls.fit_zipf(probabilities)
    spectrum = probabilities.double().sort(1, descending=True).values.mean(0)
    return Run(loss, seed, history, spectrum.tolist(), float(alpha), float(intercept))


# ------------------------------------------------------------------------------------ checkpoints


class CheckpointError(UsageError):
    """A checkpoint cannot be resumed from."""

    option = "--resume"


@contextmanager
def atomic_file(path: Path, mode: str = "wb"):
    """Open a file for writing that takes its name only once it is complete."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def describe(args: argparse.Namespace, data: Data, place: Place) -> dict:
    """All that decides the outcome of a run but loss and seed: checkpoints must agree on it."""
    free = {"cache", "data", "device", "loss", "out", "preset", "resume", "seed"}
    settings = {name: value for name, value in vars(args).items() if name not in free}
    settings["data"] = zlib.crc32(data.train.labels.numpy(), zlib.crc32(data.train.images.numpy()))
    settings["processes"] = place.processes
    return settings


def save_checkpoint(path: Path, trainer: Trainer, settings: dict, history: list[dict]) -> None:
    """Write the trainer's state, its settings and the epochs so far; the first process writes."""
    state = {"settings": settings, "history": history, "trainer": trainer.state_dict()}
    if trainer.place.rank == 0:
        with atomic_file(path) as file:
            torch.save(state, file)


def load_checkpoint(path: Path, trainer: Trainer, settings: dict) -> list[dict]:
    """Bring the trainer back to where the checkpoint was written; returns the epochs so far."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, history = state["settings"], state["history"]
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(f"{path} is not a checkpoint of this script: {error}") from error
    for name in settings | saved:
        if settings.get(name) != saved.get(name):
            values = f" ({saved.get(name)} there, {settings.get(name)} here)"
            option = name if name == "processes" else "--" + name.replace("_", "-")
            raise CheckpointError(f"{path} was made with another {option}{'' if name == 'data' else values}")
    trainer.load_state_dict(state["trainer"])
    return history


def write_log(path: Path, history: list[dict], place: Place) -> None:
    """Write one JSON line per epoch: the epochs of the checkpoint, no more and no fewer."""
    if place.rank == 0:
        with atomic_file(path, "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in history)


# ---------------------------------------------------------------------------------------- results

COLOURS = {"ce": "#0072B2", "ls": "#E69F00", "zipf": "#009E73"}  # Okabe and Ito: safe for all eyes
MARKERS = {"ce": "o", "ls": "s", "zipf": "^"}


def by_loss(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each loss, in the order in which the losses were named."""
    losses = dict.fromkeys(run.loss for run in runs)
    return {loss: [run for run in runs if run.loss == loss] for loss in losses}


def new_figure(columns: int, width: float):
    """A figure with its axes, `width` inches wide, that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Accuracy and cross-entropy against epochs; several seeds as their mean and range."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    figure, axes = new_figure(2, 10)
    columns = ("accuracy", "accuracy (%)", 100), ("cross_entropy", "cross-entropy", 1)
    for axis, (name, title, scale) in zip(axes, columns, strict=True):
        late = []  # the values after the first third of the epochs, which set the axis' range
        for loss, group in by_loss(runs).items():
            epochs = [record["epoch"] for record in group[0].history]
            look = {"color": COLOURS[loss], "lw": 1.8, "marker": None if epochs[1:] else "."}
            train, test = (
                scale * np.array([[record[f"{part}_{name}"] for record in r.history] for r in group])
                for part in ("train", "test")
            )
            axis.plot(epochs, train.mean(0), ":", **look)
            axis.plot(epochs, test.mean(0), "-", label=LOSSES[loss], **look)
            if len(group) > 1:
                low, high = test.min(0), test.max(0)
                axis.fill_between(epochs, low, high, color=COLOURS[loss], alpha=0.2, lw=0)
            late += [values[:, len(epochs) // 3 :] for values in (train, test)]
        low, high = (f([f(values) for values in late]) for f in (np.min, np.max))
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(title, loc="left")
        axis.margins(x=0.02)
        if name == "accuracy":
            spare = 0.05 * (high - low) + 0.1
            axis.set_ylim(low - spare, high + spare)
        else:
            axis.set_yscale("log")
            axis.set_ylim(low / 1.2, high * 1.2)
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0].plot([], [], "-", color="0.4", label="test")
    axes[0].plot([], [], ":", color="0.4", label="training (augmented)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path)


def draw_spectra(runs: Sequence[Run], path: Path) -> None:
    """The paper's Fig. 2: mean sorted softmax probability against rank, and the fitted law."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, (axis,) = new_figure(1, 6.4)
    for loss, group in by_loss(runs).items():
        spectrum = np.mean([run.spectrum for run in group], axis=0)
        alpha = np.mean([run.alpha for run in group])
        intercept = np.mean([run.intercept for run in group])
        rank = np.arange(1, len(spectrum) + 1)
        label = rf"{LOSSES[loss]}, $\alpha$ = {alpha:.2f}"
        size = 6 if len(rank) <= 20 else 3.5
        axis.loglog(rank, spectrum, MARKERS[loss], color=COLOURS[loss], ms=size, label=label)
        axis.loglog(rank, np.exp(intercept) * rank**-alpha, "--", color=COLOURS[loss], lw=1.2)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("rank")
    axis.set_title("mean sorted softmax probability, and the fitted Zipf law (dashed)", loc="left")
    axis.legend(frameon=False)
    figure.savefig(path)


def print_table(runs: Sequence[Run]) -> None:
    """Print one row per loss, with mean and standard deviation where there are several seeds."""

    def cell(values: list[float], form: str) -> str:
        spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
        return f"{np.mean(values):{form}}{spread}"

    rows = [("loss", "best test %", "last test %", "test CE", "Zipf alpha", "s/epoch")]
    for loss, group in by_loss(runs).items():
        accuracy = [[100 * record["test_accuracy"] for record in run.history] for run in group]
        seconds = [np.median([record["train_seconds"] for record in run.history]) for run in group]
        rows.append(
            (
                loss,
                cell([max(a) for a in accuracy], ".2f"),
                cell([a[-1] for a in accuracy], ".2f"),
                cell([run.history[-1]["test_cross_entropy"] for run in group], ".4f"),
                cell([run.alpha for run in group], ".2f"),
                cell(seconds, ".2f"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))


def report(runs: Sequence[Run], out: Path) -> None:
    """Write summary.json and the pictures; print the table and the names of the pictures."""
    draw_curves(runs, out / "curves.png")
    draw_spectra(runs, out / "spectra.png")
    with atomic_file(out / "summary.json", "w") as file:
        json.dump([vars(run) for run in runs], file, indent=1)
    print_table(runs)
    print(f"pictures: {out / 'curves.png'} {out / 'spectra.png'}")


# ----------------------------------------------------------------------------------- command line

# The authors' settings: their lambda is --zipf-weight, their beta --deep-weight, and alpha is 1, the default.
# Their data ends in a colon: its path is for --data to give.
SMALL = {"width": 64, "batch_size": 128, "epochs": 200, "deep": True, "upsample": 2}
LARGE = {"data": "folder:", "model": "timm:resnet50", "size": 224, "batch_size": 256, "epochs": 100}
AUTHORS = {
    "cifar100": SMALL | {"data": "cifar100:", "zipf_weight": 0.1, "deep_weight": 0.1},
    "tinyimagenet": SMALL | {"data": "tinyimagenet:", "size": 64, "zipf_weight": 1.0, "deep_weight": 0.5},
    "imagenet": LARGE | {"zipf_weight": 0.1},
    "inat21": LARGE | {"zipf_weight": 1.0},
}
AUTHORS = {k: v | {"lr": 0.1, "weight_decay": 1e-4, "out": f"runs/{k}"} for k, v in AUTHORS.items()}
PRESETS = AUTHORS | {  # values of the options below; what the command line says overrides them
    "demo": {"data": "digits", "loss": "ce,ls,zipf", "epochs": 15, "depth": 14, "out": "runs/demo"},
}


def make_parser() -> argparse.ArgumentParser:
    """The options; what is wrong with one ends the program with a message that names it."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    # fmt: off
    add("--preset", choices=PRESETS, help="a set of options; others beside it override its values")
    add("--data", type=data_source, default="digits", metavar="SOURCE",
        help="digits, fractals[:PER_CLASS], folder:PATH, cifar100:PATH, tinyimagenet:PATH (default: digits)")
    add("--loss", type=loss_list, default="zipf", metavar="LIST",
        help="of ce, ls and zipf, with commas: they are compared (default: zipf)")
    add("--zipf-weight", type=number(float, 0), default=0.1, metavar="X",
        help="weight of the Zipf term (default: 0.1)")
    add("--alpha", type=number(float, 0), metavar="X", help="exponent of the Zipf law (default: 1)")
    add("--distribution", metavar="NAME[:X]",
        help="another law: constant, linear[:SMALLEST], exponential[:RATE], uniform, pareto[:A]")
    add("--ranking", choices=("votes", "logits"), default="votes",
        help="what ranks the classes: the votes of the map's positions, or the logits (default: votes)")
    add("--upsample", type=int, choices=(1, 2), default=1,
        help="2 lets maps vote at twice their resolution (default: 1)")
    add("--deep", action=argparse.BooleanOptionalAction, default=False,
        help="the stage before the last votes too, through a classifier of its own")
    add("--deep-weight", type=number(float, 0), default=0.1, metavar="X",
        help="weight of that classifier's cross-entropy (default: 0.1)")
    add("--label-smoothing", type=number(float, 0, 1), default=0.1, metavar="X",
        help="smoothing of the loss ls (default: 0.1)")
    add("--epochs", type=number(int, 1), default=30, metavar="N", help="(default: 30)")
    add("--batch-size", type=number(int, 2), default=64, metavar="N",
        help="of all processes together (default: 64)")
    add("--lr", type=number(float, 0), default=0.1, metavar="X",
        help="highest learning rate (default: 0.1)")
    add("--weight-decay", type=number(float, 0), default=5e-4, metavar="X",
        help="(default: 0.0005)")
    add("--model", type=model_name, default="resnet", metavar="NAME",
        help="resnet, the one in this file, or timm:NAME (default: resnet)")
    add("--depth", type=depth, default=20, metavar="6n+2", help="of resnet (default: 20)")
    add("--width", type=number(int, MIN_WIDTH), default=16, metavar="N",
        help=f"channels of resnet's first stage, at least {MIN_WIDTH} (default: 16)")
    add("--size", type=number(int, 16), default=32, metavar="PIXELS",
        help="height and width of the images (default: 32)")
    add("--limit", type=number(int, 2), metavar="N", help="use N images of each set at most")
    add("--seed", type=seed_list, default="0", metavar="LIST",
        help="one, or several with commas (default: 0)")
    add("--amp", choices=("none", "bf16", "fp16"), default="none", help="mixed precision")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=Path, default="runs/train", metavar="FOLDER", help="(default: runs/train)")
    add("--cache", type=Path, default=".data", metavar="FOLDER",
        help="keeps generated data (default: .data)")
    add("--resume", action="store_true", help="go on from the checkpoints in --out")
    # fmt: on
    return parser


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line over its preset, and check what concerns several options."""
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    args = parser.parse_args(argv)
    if args.distribution and args.alpha is not None:
        parser.error("argument --alpha: not allowed with --distribution, which replaces the law")
    if args.distribution:
        make_law(args.distribution)
    args.alpha = 1.0 if args.alpha is None else args.alpha
    if args.ranking == "logits" and (args.deep or args.upsample > 1):
        parser.error("argument --ranking: logits takes no votes, so it needs --no-deep and --upsample 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda is not available here")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % processes:
        parser.error(f"argument --batch-size: {args.batch_size} does not divide by {processes}")
    return args


def number(kind: type, low: float, high: float = math.inf):
    """The type of an option that is a finite number from `low` to `high`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            name = "a whole number" if kind is int else "a number"
            span = f"of at least {low}" if math.isinf(high) else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {span}")
        return value

    return parse


def loss_list(text: str) -> list[str]:
    """The type of --loss: ce,ls,zipf."""
    for name in text.split(","):
        if name not in LOSSES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(LOSSES)}")
    return list(dict.fromkeys(text.split(",")))


def seed_list(text: str) -> list[int]:
    """The type of --seed: 0,1,2."""
    return list(dict.fromkeys(number(int, 0)(seed) for seed in text.split(",")))


def data_source(text: str) -> str:
    """The type of --data: digits, fractals[:PER_CLASS], folder:PATH, cifar100:PATH or tinyimagenet:PATH."""
    kind, colon, argument = text.partition(":")
    paths = "folder", "cifar100", "tinyimagenet"
    if kind in paths and not argument:
        raise argparse.ArgumentTypeError(f"{text!r} lacks its path: --data {kind}:PATH")
    if kind == "fractals" and colon:
        number(int, 1)(argument)
    elif kind not in ("fractals", *paths) and text != "digits":
        known = "digits, fractals, fractals:PER_CLASS, " + ", ".join(f"{kind}:PATH" for kind in paths)
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {known}")
    return text


def model_name(text: str) -> str:
    """The type of --model: resnet or timm:NAME."""
    kind, _, name = text.partition(":")
    if text != "resnet" and not (kind == "timm" and name):
        raise argparse.ArgumentTypeError(f"{text!r} is neither resnet nor timm:NAME")
    return text


def depth(text: str) -> int:
    """The type of --depth: 6n+2."""
    value = number(int, 8)(text)
    if value % 6 != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not 6n+2, such as 8, 14, 20, 32 or 56")
    return value


@contextmanager
def join_processes(device: str) -> Iterator[Place]:
    """Join the processes that torchrun started, or run alone."""
    cuda = device != "cpu" and torch.cuda.is_available()
    if "RANK" not in os.environ:
        yield Place(torch.device("cuda" if cuda else "cpu"))
        return
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Place(place, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Train what the command line asks for, then write and print the comparison."""
    parser = make_parser()
    try:
        args = parse_arguments(parser, argv)
        with join_processes(args.device) as place:
            args.out.mkdir(parents=True, exist_ok=True)
            if place.rank > 0:
                dist.barrier()  # the first process makes what the others then find in the cache
            data = load_data(args.data, args.size, args.cache, args.limit)
            if place.rank == 0 and place.processes > 1:
                dist.barrier()
            if args.limit:
                data.train, data.test = data.train.head(args.limit), data.test.head(args.limit)
            todo = [(loss, seed) for loss in args.loss for seed in args.seed]
            runs = [train(loss, seed, data, args, place) for loss, seed in todo]
            if place.rank == 0:
                report(runs, args.out)
            return runs
    except UsageError as error:
        parser.error(f"argument {error.option}: {error}")
    except FileExistsError:
        parser.error(f"argument --out: {args.out} is not a folder")
    except FloatingPointError as error:
        sys.exit(f"{error}: a lower --lr may help")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command with --resume goes on after the last whole epoch")
