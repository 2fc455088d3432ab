"""Train a small ResNet with Zipf's Label Smoothing and compare it with the usual losses.

    python examples/train.py --preset demo                         # ce, ls and zipf on handwritten digits
    python examples/train.py --data fractals --loss ce,zipf        # 100 fine-grained classes, made on the spot
    python examples/train.py --data folder:PATH --loss zipf        # your images: PATH/<class>/<image>
    python examples/train.py --data cifar100:PATH --preset cifar100
    torchrun --nproc-per-node 2 examples/train.py --data fractals  # several processes

What a training loop of your own needs are the lines marked (1), (2) and (3): a network that also
returns its dense feature map, one call that lets every position of the map vote, and the loss.
Everything else here is an ordinary training script.

Each run writes, under --out, a log with one JSON line per epoch (LOSS.jsonl), a checkpoint from which
--resume goes on as if nothing had happened (LOSS.pt), summary.json and two pictures: the curves of the
losses compared, and Fig. 2 of the paper, the mean sorted softmax of each network with its Zipf law.

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

# ------------------------------------------------------------------------------------------- data


class DataError(Exception):
    """The data cannot be used; the message says what is wrong and where."""


class CheckpointError(Exception):
    """A checkpoint cannot be resumed from; the message says why."""


@dataclass
class Split:
    """Images in memory, with their classes."""

    images: torch.Tensor  # (N, channels, size, size) uint8
    labels: torch.Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, limit: int) -> "Split":
        """A random selection of at most `limit` images, always the same one."""
        keep = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:limit]
        return Split(self.images[keep], self.labels[keep])


@dataclass
class Data:
    """A training and a test set."""

    train: Split
    test: Split
    classes: list[str]  # C names
    mirror: bool  # does a mirrored image keep its class?


def load_data(source: str, size: int, cache: Path) -> Data:
    """Load what --data names: digits, fractals[:PER_CLASS], folder:PATH or cifar100:PATH.

    Args:
        source: the name of the data, with its argument after a colon.
        size: height and width of the images in pixels.
        cache: folder where generated data is kept.
    """
    kind, _, argument = source.partition(":")
    if kind == "digits":
        return load_digits(size)
    if kind == "fractals":
        return load_fractals(int(argument or 100), size, cache)
    if kind == "folder":
        return load_folder(Path(argument).expanduser(), size)
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


def load_folder(root: Path, size: int) -> Data:
    """Images of any size from ROOT/<class>/, or from ROOT/train/<class>/ and ROOT/test/<class>/ (or val).

    Without a test folder a quarter of every class is kept for testing.
    """
    parts = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if (root / "train").is_dir() and parts:
        classes, files, labels = find_images(root / "train")
        test_classes, test_files, test_labels = find_images(parts[0])
        if unknown := sorted(set(test_classes) - set(classes)):
            raise DataError(f"{parts[0]} has a class that {root / 'train'} lacks: {unknown[0]}")
        test_labels = [classes.index(test_classes[label]) for label in test_labels]
    else:
        classes, every_file, every_label = find_images(root)
        train, test = split_by_class(every_label)
        if alone := sorted(set(every_label) - {every_label[i] for i in train}):
            raise DataError(
                f"class {classes[alone[0]]} in {root} has one image; it needs one to train and one to test"
            )
        files, labels = [every_file[i] for i in train], [every_label[i] for i in train]
        test_files, test_labels = [every_file[i] for i in test], [every_label[i] for i in test]
    return Data(
        Split(read_images(files, size), torch.tensor(labels)),
        Split(read_images(test_files, size), torch.tensor(test_labels)),
        classes,
        mirror=True,
    )


def find_images(root: Path) -> tuple[list[str], list[Path], list[int]]:
    """List ROOT/<class>/**/<image>: the class names, the files and the class of each file."""
    if not root.is_dir():
        raise DataError(f"there is no folder {root}")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if len(classes) < 2:
        raise DataError(f"{root} needs at least 2 class folders, it has {len(classes)}")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(f for f in (root / name).rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise DataError(f"class folder {root / name} holds no image")
        files += found
        labels += [label] * len(found)
    return classes, files, labels


def read_images(files: Sequence[Path], size: int) -> torch.Tensor:
    """Read images, crop them to a square and resize: (N, 3, size, size) uint8."""
    from PIL import Image, ImageOps

    def read(file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                image = ImageOps.exif_transpose(image).convert("RGB")
                return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read the image {file}: {error}") from error

    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(read, files)))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


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
        pixels, labels = content.get("data"), np.asarray(content.get("fine_labels"))
        shaped = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8
        if not shaped or pixels.shape != (len(pixels), 3 * 32 * 32):
            raise DataError(f"{root / name}: 'data' is not an (N, 3072) array of bytes")
        if labels.shape != (len(pixels),) or labels.dtype.kind != "i" or not len(labels):
            raise DataError(f"{root / name}: 'fine_labels' does not hold a class for each image")
        if labels.min() < 0 or labels.max() >= 100:
            raise DataError(f"{root / name}: 'fine_labels' has a class outside 0 .. 99")
        images = torch.tensor(pixels).view(-1, 3, 32, 32)
        if size != 32:
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        return Split(images, torch.tensor(labels).long())

    names = unpickle("meta").get("fine_label_names") if (root / "meta").exists() else None
    return Data(load("train"), load("test"), names or [str(i) for i in range(100)], mirror=True)


# --------------------------------------------------------------------------------------- fractals
#
# A fine-grained set from nothing but seeds. A family is an iterated function system: four affine maps
# of the plane, applied in random order to a wandering point, which traces the system's attractor. A
# relative moves the family's maps a little; an image is one view of an attractor.

FAMILIES, RELATIVES, MAPS = 20, 5, 4
FRACTALS_VERSION = (
    1  # to be raised with every change of the pictures: it is in the cache's file name
)


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
    """Generate the set: (100, per_class, 3, size, size) uint8, a function of its arguments alone."""
    rng = np.random.default_rng(seed)
    families = choose_families(rng)  # (20, 4, 6)
    relatives = np.repeat(families, RELATIVES, axis=0)  # (100, 4, 6)
    relatives = relatives + rng.normal(size=relatives.shape) * [0.12, 0.12, 0.03, 0.03, 0.08, 0.08]
    relatives[..., 2:4] = relatives[..., 2:4].clip(-0.85, 0.85)  # below 1: every map contracts
    points, maps = trace_attractors(relatives, 16384, rng)
    family = np.repeat(np.arange(FAMILIES), RELATIVES)
    centre = points.reshape(FAMILIES, -1, 2).mean(1)[family, None]
    spread = points.reshape(FAMILIES, -1, 2).std((1, 2))[family, None, None]
    points = ((points - centre) / spread).astype(np.float32)
    palettes = rng.uniform(0.2, 1.0, (FAMILIES, MAPS, 3))[family]
    return np.stack(
        [
            take_views(*attractor, per_class, size, rng)
            for attractor in zip(points, maps, palettes, strict=True)
        ]
    )


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
    weight = (
        np.abs(np.linalg.det(matrix)) + 0.05
    )  # maps are chosen in proportion to the area they fill
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
    place = (
        (np.arange(count)[:, None] * MAPS + maps[pick]) * size * size
        + pixel[..., 1] * size
        + pixel[..., 0]
    )
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
    """

    def __init__(self, depth: int, channels: int, num_classes: int, width: int = 16):
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
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor):
        features = self.body(images)  # (N, D, H, W): the dense feature map, before pooling
        logits = self.fc(features.mean((2, 3)))
        return (logits, features) if self.training else logits  # (1)


# ----------------------------------------------------------------------------------------- losses

LOSSES = {
    "ce": "cross-entropy",
    "ls": "label smoothing",
    "zipf": "Zipf's label smoothing",
}

DISTRIBUTIONS = {  # what --distribution may name: how to make it, and its default argument
    "constant": (lambda _: zls.Constant(), None),
    "linear": (zls.LinearDecay, 0.0),
    "exponential": (zls.ExponentialDecay, 1.0),
    "uniform": (lambda _: zls.RandomUniform(), None),
    "pareto": (zls.RandomPareto, 1.0),
}


def make_loss(name: str, args: argparse.Namespace) -> nn.Module:
    """The training criterion of --loss."""
    if name == "ce":
        return nn.CrossEntropyLoss()
    if name == "ls":
        return nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    if args.distribution is None:
        return zls.ZipfLoss(zipf_weight=args.zipf_weight, alpha=args.alpha)
    kind, _, argument = args.distribution.partition(":")
    make, default = DISTRIBUTIONS[kind]
    law = make(float(argument) if argument else default)
    return zls.ZipfLoss(zipf_weight=args.zipf_weight, distribution=law)


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

    One generator draws order and augmentation for the whole batch on every process, and each process
    takes every `processes`-th image of it: what is drawn does not depend on how many there are, and
    the generator's state is all that a checkpoint has to hold. Incomplete last batches are left out.
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
        """Yield images (n, channels, size, size) float and labels (n,)."""
        margin = self.images.shape[-1] // 8
        order = torch.randperm(len(self.labels), generator=self.generator)
        for batch in range(len(self)):
            index = order[batch * self.batch_size :][: self.batch_size]
            corner = torch.randint(2 * margin + 1, (2, self.batch_size), generator=self.generator)
            mirror = torch.rand(self.batch_size, generator=self.generator) < 0.5
            mine = slice(self.place.rank, None, self.place.processes)
            index, corner, mirror = index[mine], corner[:, mine], mirror[mine] & self.mirror
            index, corner, mirror = (x.to(self.place.device) for x in (index, corner, mirror))
            images = crop(self.images[index], corner, mirror, margin)
            yield normalise(images, self.mean, self.std), self.labels[index]


def mean_and_std(images: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel, (channels, 1, 1), of (N, channels, H, W) uint8."""
    value = torch.arange(256, dtype=torch.float64)
    count = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)])
    share = count / count.sum(1, keepdim=True).double()  # (channels, 256): no float copy is made
    mean = share @ value
    std = ((share @ value**2) - mean**2).clamp_min(1).sqrt()
    return tuple(x.float().view(-1, 1, 1).to(device) for x in (mean, std))


def crop(
    images: torch.Tensor, corner: torch.Tensor, mirror: torch.Tensor, margin: int
) -> torch.Tensor:
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


def autocast(place: Place, amp: str) -> torch.autocast:
    """The mixed precision of --amp: none, bf16 or fp16."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(place.device.type, dtype, enabled=amp != "none")


def train_epoch(
    model, criterion, loader, optimizer, scheduler, scaler, amp, bar
) -> dict[str, float]:
    """One pass over the training set; returns the means of the objective, cross-entropy and accuracy."""
    net = model.module if hasattr(model, "module") else model  # without DDP's wrapper
    place = loader.place
    sums = torch.zeros(4, dtype=torch.float64, device=place.device)
    model.train()
    for images, labels in loader:
        with autocast(place, amp):
            logits, features = model(images)
            if isinstance(criterion, zls.ZipfLoss):
                votes = zls.dense_vote(features, net.fc.weight, net.fc.bias)  # (2)  (n, P) int32
                loss = criterion(logits, labels, votes)  # (3)
            else:
                loss = criterion(logits, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        with torch.no_grad():
            cross_entropy = F.cross_entropy(logits.float(), labels, reduction="sum")
            correct = (logits.argmax(1) == labels).sum()
            sums += torch.stack(
                [loss * len(labels), cross_entropy, correct, loss.new_tensor(len(labels))]
            )
        bar.update()
    objective, cross_entropy, correct, count = place.sum(sums).tolist()
    return {
        "train_loss": objective / count,
        "train_cross_entropy": cross_entropy / count,
        "train_accuracy": correct / count,
    }


@torch.no_grad()
def predict(net: ResNet, images: torch.Tensor, loader: Loader, amp: str) -> torch.Tensor:
    """Logits (N, C) float32 of a network in eval mode for images (N, channels, size, size) uint8."""
    net.eval()
    logits = []
    for batch in images.split(500):
        batch = normalise(batch.to(loader.place.device), loader.mean, loader.std)
        with autocast(loader.place, amp):
            logits.append(net(batch).float())
    return torch.cat(logits) if logits else torch.empty(0, net.fc.out_features)


def evaluate(net: ResNet, split: Split, loader: Loader, amp: str) -> dict[str, float]:
    """Cross-entropy and accuracy on a test set, which the processes share out among themselves."""
    place = loader.place
    if (
        place.processes > 1
    ):  # every process has seen other batches: test with the first one's averages
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)
    mine = slice(place.rank, None, place.processes)
    logits = predict(net, split.images[mine], loader, amp)
    labels = split.labels[mine].to(logits.device)
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum").double()
    correct = (logits.argmax(1) == labels).sum()
    cross_entropy, correct = place.sum(torch.stack([cross_entropy, correct])).tolist()
    return {"test_cross_entropy": cross_entropy / len(split), "test_accuracy": correct / len(split)}


@dataclass
class Run:
    """One trained network and what was measured on it."""

    loss: str
    seed: int
    history: list[dict]  # one record per epoch
    spectrum: list[float]  # C mean probabilities, sorted, highest first
    alpha: float  # exponent of the Zipf law fitted to them
    intercept: float  # log probability of that law at rank 1


def train_network(loss: str, seed: int, data: Data, args: argparse.Namespace, place: Place) -> Run:
    """Train a network with one loss and one seed, or finish what a checkpoint began.

    Equal seeds give equal initial weights, batches and augmentation, whatever the loss.
    """
    name = loss if len(args.seed) == 1 else f"{loss}-seed{seed}"
    checkpoint, log = args.out / f"{name}.pt", args.out / f"{name}.jsonl"
    criterion = make_loss(loss, args).to(place.device)
    loader = Loader(data, args.batch_size, seed, place)
    torch.manual_seed(seed)
    net = ResNet(args.depth, data.train.images.shape[1], len(data.classes), args.width)
    net = net.to(place.device, memory_format=torch.channels_last)
    model = nn.parallel.DistributedDataParallel(net) if place.processes > 1 else net
    torch.manual_seed(seed + place.rank)  # the random laws draw from here
    optimizer = torch.optim.SGD(
        net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True
    )
    steps, warmup = args.epochs * len(loader), min(1, args.epochs / 5) * len(loader)

    def rate(step: int) -> float:
        """Linear warm-up, then half a cosine down to zero."""
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    scaler = torch.amp.GradScaler(place.device.type, enabled=args.amp == "fp16")
    parts = {"model": net, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    settings = describe(args, data, place)
    history = []
    if args.resume and checkpoint.exists():
        history = load_checkpoint(checkpoint, parts, loader, settings)
        if place.rank == 0:
            write_log(log, history)

    done = len(history)
    hidden = None if place.rank == 0 else True  # None: tqdm hides itself where there is no terminal
    with tqdm(
        total=steps,
        initial=done * len(loader),
        desc=name,
        unit="batch",
        disable=hidden,
        leave=False,
    ) as bar:
        for epoch in range(done + 1, args.epochs + 1):
            lr, start = scheduler.get_last_lr()[0], time.perf_counter()
            record = {"loss": loss, "seed": seed, "epoch": epoch, "lr": lr}
            record |= train_epoch(
                model, criterion, loader, optimizer, scheduler, scaler, args.amp, bar
            )
            record["train_seconds"] = time.perf_counter() - start
            record |= evaluate(net, data.test, loader, args.amp)
            if not math.isfinite(record["train_loss"]):
                raise FloatingPointError(
                    f"the {loss} loss is {record['train_loss']} in epoch {epoch}"
                )
            history.append(record)
            save_checkpoint(checkpoint, parts, loader, settings, history)
            if place.rank == 0:
                write_log(log, history)
                tqdm.write(
                    f"{name:<8} epoch {epoch:>{len(str(args.epochs))}}/{args.epochs}"
                    f"  train {record['train_loss']:.4f} ({record['train_accuracy']:7.2%})"
                    f"  test {record['test_cross_entropy']:.4f} ({record['test_accuracy']:7.2%})"
                    f"  {record['train_seconds']:.1f} s"
                )
    probabilities = predict(net, data.test.images, loader, args.amp).softmax(1)  # (M, C)
    alpha, intercept = zls.fit_zipf(probabilities)
    spectrum = probabilities.double().sort(1, descending=True).values.mean(0)
    return Run(loss, seed, history, spectrum.tolist(), float(alpha), float(intercept))


# ------------------------------------------------------------------------------------ checkpoints


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
    """All that decides the outcome of a run, apart from loss and seed: a checkpoint must agree on it."""
    free = {"cache", "data", "device", "loss", "out", "preset", "resume", "seed"}
    settings = {name: value for name, value in vars(args).items() if name not in free}
    settings["data"] = zlib.crc32(data.train.labels.numpy(), zlib.crc32(data.train.images.numpy()))
    settings["processes"] = place.processes
    return settings


def save_checkpoint(
    path: Path, parts: dict, loader: Loader, settings: dict, history: list[dict]
) -> None:
    """Write everything the rest of the run depends on, atomically, from the first process."""
    place = loader.place
    cuda = place.device.type == "cuda"
    random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if cuda else None}
    every_random = [random]
    if place.processes > 1:
        every_random = [None] * place.processes
        dist.all_gather_object(every_random, random)
    if place.rank == 0:
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"order": loader.generator.get_state(), "random": every_random}
        state |= {"settings": settings, "history": history}
        with atomic_file(path) as file:
            torch.save(state, file)


def load_checkpoint(path: Path, parts: dict, loader: Loader, settings: dict) -> list[dict]:
    """Bring every part back to where the checkpoint was written; returns the epochs behind it."""
    place = loader.place
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["settings"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of this script: {error}") from error
    for name in settings | saved:
        if settings.get(name) != saved.get(name):
            values = (
                "" if name == "data" else f" ({saved.get(name)} there, {settings.get(name)} here)"
            )
            flag = name if name == "processes" else "--" + name.replace("_", "-")
            raise CheckpointError(f"{path} was made with another {flag}{values}")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    loader.generator.set_state(state["order"])
    random = state["random"][place.rank]
    torch.set_rng_state(random["cpu"])
    if place.device.type == "cuda" and random["cuda"] is not None:
        torch.cuda.set_rng_state(random["cuda"])
    return state["history"]


def write_log(path: Path, history: list[dict]) -> None:
    """Write one JSON line per epoch: always the epochs of the checkpoint, no more and no fewer."""
    with atomic_file(path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in history)


# ---------------------------------------------------------------------------------------- results

COLOURS = {
    "ce": "#0072B2",
    "ls": "#E69F00",
    "zipf": "#009E73",
}  # Okabe and Ito's, safe for all eyes
MARKERS = {"ce": "o", "ls": "s", "zipf": "^"}


def by_loss(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each loss, in the order in which the losses were named."""
    return {
        loss: [run for run in runs if run.loss == loss]
        for loss in dict.fromkeys(r.loss for r in runs)
    }


def new_figure(columns: int, width: float):
    """An empty figure, in inches, without a display."""
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
    """Test and training accuracy and cross-entropy against epochs; several seeds as mean and range."""
    figure, axes = new_figure(2, 10)
    for axis, name, title, scale in (
        (axes[0], "accuracy", "accuracy (%)", 100),
        (axes[1], "cross_entropy", "cross-entropy", 1),
    ):
        for loss, group in by_loss(runs).items():
            epochs = [record["epoch"] for record in group[0].history]
            for part, style in (("test", "-"), ("train", ":")):
                values = scale * np.array(
                    [[r[f"{part}_{name}"] for r in run.history] for run in group]
                )
                label = LOSSES[loss] if part == "test" else None
                axis.plot(
                    epochs, values.mean(0), style, color=COLOURS[loss], label=label, linewidth=1.8
                )
                if len(group) > 1 and part == "test":
                    axis.fill_between(
                        epochs,
                        values.min(0),
                        values.max(0),
                        color=COLOURS[loss],
                        alpha=0.2,
                        linewidth=0,
                    )
        axis.set_xlabel("epoch")
        axis.set_title(title, loc="left")
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False)
    figure.savefig(path)


def draw_spectra(runs: Sequence[Run], path: Path) -> None:
    """The paper's Fig. 2: mean sorted softmax probability against rank, with the fitted Zipf law."""
    figure, (axis,) = new_figure(1, 6.4)
    for loss, group in by_loss(runs).items():
        spectrum = np.mean([run.spectrum for run in group], axis=0)
        rank = np.arange(1, len(spectrum) + 1)
        alpha, intercept = (
            np.mean([getattr(run, x) for run in group]) for x in ("alpha", "intercept")
        )
        law = np.exp(intercept) * rank**-alpha
        label = rf"{LOSSES[loss]}, $\alpha$ = {alpha:.2f}"
        axis.loglog(rank, spectrum, MARKERS[loss], color=COLOURS[loss], markersize=5, label=label)
        axis.loglog(rank, law, "--", color=COLOURS[loss], linewidth=1.2)
    axis.set_xlabel("rank")
    axis.set_title("mean sorted softmax probability, and the fitted Zipf law (dashed)", loc="left")
    axis.legend(frameon=False)
    figure.savefig(path)


def print_table(runs: Sequence[Run]) -> None:
    """Print one row per loss: mean over the seeds, with the standard deviation where there are several."""

    def cell(values: list[float], form: str) -> str:
        spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
        return f"{np.mean(values):{form}}{spread}"

    rows = [
        ("loss", "best test %", "last test %", "test cross-entropy", "Zipf exponent", "s per epoch")
    ]
    for loss, group in by_loss(runs).items():
        accuracy = [[100 * record["test_accuracy"] for record in run.history] for run in group]
        rows.append(
            (
                loss,
                cell([max(a) for a in accuracy], ".2f"),
                cell([a[-1] for a in accuracy], ".2f"),
                cell([run.history[-1]["test_cross_entropy"] for run in group], ".4f"),
                cell([run.alpha for run in group], ".2f"),
                cell([np.mean([r["train_seconds"] for r in run.history]) for run in group], ".2f"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))


def report(runs: Sequence[Run], out: Path) -> None:
    """Write summary.json and the pictures, print the table and the names of the files."""
    draw_curves(runs, out / "curves.png")
    draw_spectra(runs, out / "spectra.png")
    with atomic_file(out / "summary.json", "w") as file:
        json.dump([vars(run) for run in runs], file, indent=1)
    print_table(runs)
    print(f"pictures: {out / 'curves.png'} {out / 'spectra.png'}")


# ----------------------------------------------------------------------------------- command line

PRESETS = {  # values for the options below; what the command line says goes first
    "demo": {"data": "digits", "loss": "ce,ls,zipf", "epochs": 20, "depth": 14, "out": "runs/demo"},
    "cifar100": {"loss": "ce,ls,zipf", "epochs": 200, "depth": 56, "batch_size": 128},
}


def make_parser() -> argparse.ArgumentParser:
    """The options. What is wrong with one ends the program with a message that names it."""

    def number(convert: type, low: float, high: float = math.inf):
        def parse(text: str):
            try:
                value = convert(text)
            except ValueError:
                value = math.nan
            if not low <= value <= high or math.isinf(value):
                kind = "a whole number" if convert is int else "a number"
                span = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
                raise argparse.ArgumentTypeError(f"{text!r} is not {kind} {span}")
            return value

        return parse

    def losses(text: str) -> list[str]:
        for name in text.split(","):
            if name not in LOSSES:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(LOSSES)}")
        return list(dict.fromkeys(text.split(",")))

    def seeds(text: str) -> list[int]:
        return list(dict.fromkeys(number(int, 0)(seed) for seed in text.split(",")))

    def data(text: str) -> str:
        kind, _, argument = text.partition(":")
        if kind in ("folder", "cifar100") and not argument:
            raise argparse.ArgumentTypeError(f"{text!r} lacks its path: {kind}:PATH")
        if kind == "fractals" and argument:
            number(int, 1)(argument)
        elif kind not in ("digits", "fractals", "folder", "cifar100") or (
            kind == "digits" and argument
        ):
            known = "digits, fractals, fractals:PER_CLASS, folder:PATH, cifar100:PATH"
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {known}")
        return text

    def distribution(text: str) -> str:
        kind, colon, argument = text.partition(":")
        if kind not in DISTRIBUTIONS:
            raise argparse.ArgumentTypeError(f"{kind!r} is not one of {', '.join(DISTRIBUTIONS)}")
        if colon:
            if DISTRIBUTIONS[kind][1] is None:
                raise argparse.ArgumentTypeError(f"{kind!r} takes no number")
            number(float, 0)(argument)
        return text

    def depth(text: str) -> int:
        value = number(int, 8)(text)
        if value % 6 != 2:
            raise argparse.ArgumentTypeError(f"{text!r} is not 6n+2, as 8, 14, 20, 32 or 56")
        return value

    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="a set of options; others given beside it go first")
    add(
        "--data",
        type=data,
        default="digits",
        metavar="SOURCE",
        help="digits, fractals[:PER_CLASS], folder:PATH or cifar100:PATH (default: digits)",
    )
    add(
        "--loss",
        type=losses,
        default="zipf",
        metavar="LIST",
        help="of ce, ls and zipf, with commas: they are compared (default: zipf)",
    )
    add(
        "--zipf-weight",
        type=number(float, 0),
        default=0.1,
        metavar="X",
        help="weight of the Zipf term (default: 0.1)",
    )
    add("--alpha", type=number(float, 0), metavar="X", help="exponent of the Zipf law (default: 1)")
    add(
        "--distribution",
        type=distribution,
        metavar="NAME[:X]",
        help="another law: constant, linear[:SMALLEST], exponential[:RATE], uniform or pareto[:A]",
    )
    add(
        "--label-smoothing",
        type=number(float, 0, 1),
        default=0.1,
        metavar="X",
        help="smoothing of the loss ls (default: 0.1)",
    )
    add("--epochs", type=number(int, 1), default=30, metavar="N")
    add(
        "--batch-size",
        type=number(int, 2),
        default=64,
        metavar="N",
        help="over all processes together",
    )
    add(
        "--lr",
        type=number(float, 0),
        default=0.1,
        metavar="X",
        help="highest learning rate (default: 0.1)",
    )
    add("--weight-decay", type=number(float, 0), default=5e-4, metavar="X")
    add(
        "--depth", type=depth, default=20, metavar="6n+2", help="layers of the ResNet (default: 20)"
    )
    add("--width", type=number(int, 1), default=16, metavar="N", help="channels of its first stage")
    add(
        "--size",
        type=number(int, 16),
        default=32,
        metavar="PIXELS",
        help="image size (default: 32)",
    )
    add(
        "--limit", type=number(int, 2), metavar="N", help="use at most N training and N test images"
    )
    add(
        "--seed",
        type=seeds,
        default="0",
        metavar="LIST",
        help="one or several, with commas (default: 0)",
    )
    add("--amp", choices=("none", "bf16", "fp16"), default="none", help="mixed precision")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=Path, default="runs/train", metavar="FOLDER", help="(default: runs/train)")
    add(
        "--cache",
        type=Path,
        default=".data",
        metavar="FOLDER",
        help="generated data (default: .data)",
    )
    add("--resume", action="store_true", help="go on from the checkpoints in --out")

    return parser


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Read the command line, after its preset, and check what concerns several options."""
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    args = parser.parse_args(argv)
    if args.distribution and args.alpha is not None:
        parser.error(
            "argument --alpha: not allowed with --distribution, which replaces the Zipf law"
        )
    if args.alpha is None:
        args.alpha = 1.0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda is not available here")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % processes:
        parser.error(
            f"argument --batch-size: {args.batch_size} is no multiple of {processes} processes"
        )
    return args


@contextmanager
def join_processes(device: str) -> Iterator[Place]:
    """Join the processes that torchrun started, or run alone."""
    cuda = device != "cpu" and torch.cuda.is_available()
    place = Place(torch.device("cuda" if cuda else "cpu"))
    if "RANK" not in os.environ:
        yield place
        return
    if cuda:
        place.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place.device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Place(place.device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Train what the command line asks for, then write and print the comparison."""
    parser = make_parser()
    args = parse_arguments(parser, argv)
    with join_processes(args.device) as place:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            if place.rank > 0:
                dist.barrier()  # the first process makes what the others then find in the cache
            data = load_data(args.data, args.size, args.cache)
            if place.rank == 0 and place.processes > 1:
                dist.barrier()
            if args.limit:
                data.train, data.test = data.train.head(args.limit), data.test.head(args.limit)
            runs = [
                train_network(loss, seed, data, args, place)
                for loss in args.loss
                for seed in args.seed
            ]
        except DataError as error:
            parser.error(f"argument --data: {error}")
        except CheckpointError as error:
            parser.error(f"argument --resume: {error}")
        except FloatingPointError as error:
            sys.exit(f"{error}: try a lower --lr")
        if place.rank == 0:
            report(runs, args.out)
    return runs


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command with --resume goes on after the last whole epoch")
