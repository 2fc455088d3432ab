"""A fine-grained set of images from nothing but seeds.

A family is an iterated function system: four affine maps of the plane, applied in random order to a
wandering point, which traces the attractor. A relative moves the family's maps a little; an image is one view
of one attractor.
"""

from pathlib import Path

import numpy as np
import torch

from .cache import cached

FAMILIES, RELATIVES, MAPS = 20, 5, 4
KINSHIP = np.array([0.06, 0.06, 0.015, 0.015, 0.04, 0.04])  # how far relatives are from each other
FRACTALS_VERSION = 1  # part of the cached file's name: raise it when the pictures change


def load_fractals(per_class: int, size: int, cache: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """100 classes, 20 families of 5 near relatives; generated once, then read from the cache.

    Args:
        per_class: training images per class; the test set has a fifth of that.
        size: height and width in pixels.
        cache: folder of the cached file, which is written whole or not at all.

    Returns:
        Images (N, 3, size, size) uint8 and classes (N,) of the training set, and of the test set.
    """
    count = per_class + max(1, per_class // 5)
    file = cache / f"fractals-v{FRACTALS_VERSION}-{size}px-{per_class}.npz"
    shape = FAMILIES * RELATIVES, count, 3, size, size
    images = cached(file, shape, lambda: {"images": make_fractals(count, size)})["images"]
    parts = images[:, :per_class], images[:, per_class:]
    classes = torch.arange(len(images))
    return [
        (torch.from_numpy(part.reshape(-1, 3, size, size)), classes.repeat_interleave(part.shape[1]))
        for part in parts
    ]


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
