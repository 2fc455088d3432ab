"""The data that --data names, in memory: built-in sets, published files, folders of images."""

import os
import pickle
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .common import UsageError, notice
from .fonts import Distortions, load_typefaces
from .fractals import load_fractals


class DataError(UsageError):
    """The data is missing or not what it should be."""

    option = "--data"


@dataclass
class Split:
    """Images in memory, with their classes."""

    images: torch.Tensor  # (N, channels, H, W) uint8
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
    distortions: Distortions | None = None  # in the place of random crops
    held_out: tuple[Split, Split] | None = (
        None  # of other classes: what a linear probe learns, and is judged on
    )
    digest: str = ""  # SHA-256 of the files that it was made from, where a record should tell

    @cached_property
    def mean_and_std(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of each channel of the training images, each (channels, 1, 1) float32."""
        value = torch.arange(256, dtype=torch.float64)
        channels = self.train.images.unbind(1)
        count = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in channels])
        share = count / count.sum(1, keepdim=True).double()  # (channels, 256): no float copy is made
        mean = share @ value
        std = ((share @ value**2) - mean**2).clamp_min(1).sqrt()
        return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)


def load_data(
    source: str,
    size: int,
    cache: Path,
    limit: int | None = None,
    skip_bad: bool = False,
    fonts: Sequence[Path] = (),
) -> Data:
    """Load what --data names.

    Args:
        source: the name of the data, with its argument after a colon.
        size: height and width of the images in pixels; words are twice as wide.
        cache: folder where generated data is kept.
        limit: images of each set at most.
        skip_bad: leave out the images of a folder that cannot be read.
        fonts: folders of the font files; none: the system's.
    """
    kind, _, argument = source.partition(":")
    path = Path(argument).expanduser()
    if kind == "folder":
        data = load_folder(path, size, limit, skip_bad)
    elif kind == "tinyimagenet":
        data = load_tinyimagenet(path, size, limit, skip_bad)
    elif kind == "cifar100":
        data = load_cifar100(path, size)
    elif kind == "fractals":
        train, test = (Split(*part) for part in load_fractals(int(argument or 100), size, cache))
        data = Data(train, test, [f"fractal {i}" for i in range(100)], mirror=False)
    elif kind in TYPEFACES:
        data = load_fonts(source, size, cache, fonts)
    else:
        data = load_digits(size)
    if limit:
        data.train, data.test = data.train.head(limit), data.test.head(limit)
    return data


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


TYPEFACES = ("typefaces", "typefaces-validation")  # judged on the test words, or on the validation words


def load_fonts(source: str, size: int, cache: Path, fonts: Sequence[Path]) -> Data:
    """Words, the class being their typeface: typefaces[:FACES[:WORDS]], 100 and 25 where not given."""
    kind, *counts = source.split(":")
    faces, words = map(int, (*counts, *(100, 25)[len(counts) :]))
    found = load_typefaces(faces, words, size, cache, fonts)
    judged = "validation" if kind.endswith("validation") else "test"
    distortions, generator = Distortions(), torch.Generator().manual_seed(zlib.crc32(judged.encode()))

    def split(words: torch.Tensor) -> Split:
        return Split(words.flatten(0, 1), torch.arange(len(words)).repeat_interleave(words.shape[1]))

    def distorted(words: torch.Tensor) -> Split:
        plain = split(words)
        drawn = distortions.draw(len(plain), plain.images.shape[1:], generator)
        return Split(distortions.apply(plain.images, *drawn), plain.labels)

    return Data(
        split(found.images["train"]),
        distorted(found.images[judged]),
        found.names,
        mirror=False,
        distortions=distortions,
        held_out=(distorted(found.held_out["train"]), distorted(found.held_out[judged]))
        if len(found.held_out["train"]) > 1
        else None,
        digest=found.digest,
    )


IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
TEST_PARTS = ("val", "valid", "validation", "test")  # beside train/; of several the first is taken


def load_folder(root: Path, size: int, limit: int | None = None, skip_bad: bool = False) -> Data:
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
    return read_data((files, labels), (test_files, test_labels), classes, size, limit, skip_bad)


def load_tinyimagenet(root: Path, size: int, limit: int | None = None, skip_bad: bool = False) -> Data:
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
    return read_data((files, labels), (test_files, test_labels), classes, size, limit, skip_bad)


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


Files = tuple[Sequence[Path], Sequence[int]]  # with the class of each


def read_data(
    train: Files, test: Files, classes: list[str], size: int, limit: int | None, skip_bad: bool
) -> Data:
    """Read the images of both sets, at most `limit` of each."""
    parts = []
    for files, labels in (train, test):
        keep = select(len(files), limit)
        parts.append(([files[i] for i in keep], torch.tensor(labels)[keep]))
    bad = {} if skip_bad else None
    images = read_images(parts[0][0] + parts[1][0], size, bad)
    splits = []
    for (files, labels), own in zip(parts, images.split([len(files) for files, _ in parts]), strict=True):
        if bad:
            good = torch.tensor([file not in bad for file in files])
            lost = set(labels.tolist()) - set(labels[good].tolist())
            if lost and (not splits or not good.any()):
                names = ", ".join(classes[label] for label in sorted(lost))
                raise DataError(f"no image that can be read is left of these classes: {names}")
            own, labels = own[good], labels[good]
        splits.append(Split(own, labels))
    if bad:
        notice("\n  ".join([f"left out {len(bad)} images:", *(f"{k}: {v}" for k, v in bad.items())]))
    return Data(*splits, classes, mirror=True)


def read_images(files: Sequence[Path], size: int, bad: dict[Path, str] | None = None) -> torch.Tensor:
    """Read images, crop them to a square and resize: (N, 3, size, size) uint8.

    Images of more than 8 bits are scaled to 8 (see scale_to_bytes).

    Args:
        bad: receives the files that cannot be read, with the reason; their images are left undefined.

    Raises:
        DataError: without `bad`, files are no images, or of numbers whose range is not known; the images of
            more than 8 bits all lie in the lowest sixteenth of their range; they are too many for the memory.
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
    reasons, highest = {}, {}  # highest: of each image of more than 8 bits, as a share of its range

    def read(i: int) -> None:
        try:
            with Image.open(files[i]) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode in ("I", "F") or image.mode.startswith("I;"):
                    values, highest[files[i]] = scale_to_bytes(np.asarray(image))
                    image = Image.fromarray(values)
                image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
            images[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        except Exception as error:  # a damaged file can raise anything
            reasons[files[i]] = str(error) or type(error).__name__

    with ThreadPoolExecutor() as pool:
        list(pool.map(read, range(len(files))))
    reasons = {file: reasons[file] for file in files if file in reasons}  # in order
    if bad is not None:
        bad.update(reasons)
    elif reasons:
        lines = "".join(f"\n  {file}: {reason}" for file, reason in reasons.items())
        raise DataError(f"cannot read {len(reasons)} images, which --skip-bad-images leaves out:{lines}")
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
