"""A fine-grained set of real images: which typeface is this word set in?

The classes are the distinct Latin faces among font files: families, their weights and revivals of one another
are near neighbours. Words of the training, validation and test sets differ, so that a face is known by its
letters, not by a picture seen before.
"""

import hashlib
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from .cache import Arrays, cached, read
from .common import UsageError, notice

FONTS_VERSION = 2  # part of the cached file's name: raise it when the pictures change
WORDS = {
    "train": "anchor bridge castle dragon engine forest garden harbor island jacket kitchen lantern market "
    "needle orchard pepper quartz rabbit silver temple umbrella valley winter yellow zipper blanket copper "
    "falcon journey whisper",
    "validation": "basket candle finger glacier hunter jungle magnet pocket rocket thunder velvet wizard",
    "test": "bottle cricket feather gravel helmet jigsaw marble pumpkin quiver summit violin walnut",
}
HELD_OUT = 50  # faces beside those that are asked for, as far as there are more: for the linear probe
LETTERS = string.ascii_lowercase
SAMPLE = "Hamburgefonstiv"  # the type founders' own sample word


class FontsError(UsageError):
    """There are too few faces."""

    option = "--fonts"


@dataclass(frozen=True)
class Face:
    """One typeface of a font file."""

    file: Path
    index: int  # of the face in a collection
    family: str
    style: str

    @property
    def name(self) -> str:
        return f"{self.family} {self.style}"


@dataclass(frozen=True)
class Typefaces:
    """Words set in typefaces, one image each, without any distortion."""

    images: dict[str, torch.Tensor]  # train, validation, test -> (faces, words, 1, size, 2 * size) uint8
    held_out: dict[str, torch.Tensor]  # the same of faces that come after them, 50 at most
    names: list[str]  # of the faces
    digest: str  # SHA-256 of the list of all font files by content: what the choice of faces depends on


def load_typefaces(count: int, words: int, size: int, cache: Path, fonts: Sequence[Path]) -> Typefaces:
    """Set words in the distinct faces of font files; made once, then read from the cache.

    Args:
        count: faces.
        words: training words a face, at most 30; validation and test have 12 each.
        size: height of the images in pixels; they are twice as wide.
        cache: folder of the cached file, whose name has count, words, size and a part of the digest.
        fonts: folders where font files are looked for (none: the system's, and the fonts of matplotlib); or
            the cached file of another machine, made with the same count, words and size.

    Raises:
        FontsError: a folder or file does not exist or is not of this kind, or fewer distinct faces than asked
            for.
    """
    words_of = {part: text.split() for part, text in WORDS.items()}
    words_of["train"] = words_of["train"][:words]
    lengths = [len(part) for part in words_of.values()]
    every = [word for part in words_of.values() for word in part]
    shape = count, len(every), size, 2 * size

    def make() -> Arrays:
        faces = choose_faces(distinct_faces(files), count + HELD_OUT)
        if len(faces) < count:
            raise FontsError(
                f"{len(faces)} distinct Latin faces are found, {count} are needed; "
                "docs/EFFICACY.md names packages that bring more"
            )
        images = np.stack([[set_word(open_face(face), word, size) for word in every] for face in faces])
        names = np.array([face.name for face in faces])
        return {"images": images, "names": names, "digest": np.array(digest)}

    if len(fonts) == 1 and fonts[0].suffix == ".npz":
        arrays = read(fonts[0], shape)
        if arrays is None:
            raise FontsError(f"{fonts[0]} holds no {count} faces of {words} words at {size} pixels")
    else:
        files = find_fonts(fonts)
        digest = hashlib.sha256("".join(sorted(files)).encode()).hexdigest()
        name = f"typefaces-v{FONTS_VERSION}-{count}-{words}-{size}px-{digest[:16]}.npz"
        arrays = cached(cache / name, shape, make)
    parts = torch.from_numpy(arrays["images"]).unsqueeze(2).split(lengths, dim=1)
    of_part = dict(zip(words_of, parts, strict=True))
    return Typefaces(
        {name: part[:count] for name, part in of_part.items()},
        {name: part[count:] for name, part in of_part.items()},
        arrays["names"].tolist()[:count],
        str(arrays["digest"]),
    )


# Font files ------------------------------------------------------------------------------------------


def find_fonts(folders: Sequence[Path]) -> dict[str, Path]:
    """The font files of some folders, by the SHA-256 of their content: copies of a file are one."""
    from matplotlib import font_manager

    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise FontsError(f"there is no folder {', '.join(missing)}")
    own = Path(font_manager.__file__).parent / "mpl-data" / "fonts" / "ttf"
    found = font_manager.findSystemFonts(list(map(str, folders)) or None)
    found += [] if folders else font_manager.findSystemFonts(str(own))
    files = {}
    for path in sorted(found):
        try:
            files.setdefault(hashlib.sha256(Path(path).read_bytes()).hexdigest(), Path(path))
        except OSError as error:
            notice(f"skipped {path}: {error.strerror}")
    return files


def open_face(face: Face, pixels: int = 96) -> ImageFont.FreeTypeFont:
    """The face at a height, laid out by Pillow itself: some builds have libraries that do it otherwise."""
    return ImageFont.truetype(face.file, pixels, face.index, layout_engine=ImageFont.Layout.BASIC)


def faces_of(file: Path) -> Iterator[Face]:
    """The faces of a font file: one, or those of a collection."""
    count = 1
    with open(file, "rb") as content:
        head = content.read(12)
    if head[:4] == b"ttcf":
        count = int.from_bytes(head[8:12], "big")
    for index in range(count):
        family, style = ImageFont.truetype(file, 16, index).getname()
        yield Face(file, index, family or file.stem, style or "")


def distinct_faces(files: dict[str, Path]) -> list[Face]:
    """The faces that set every small letter in its own way and differ from all before them.

    A face is left out where two letters look alike (letters that it lacks all do) or one is empty, or where
    the sample word, coarsely, is that of an earlier face. A file that cannot be read is skipped, which a line
    on standard error says.
    """
    seen, faces = set(), []
    for _, file in sorted(files.items()):
        try:
            for face in faces_of(file):
                font = open_face(face, 48)
                letters = {image.tobytes() for image in (draw_word(font, x) for x in LETTERS) if image}
                if len(letters) < len(LETTERS):
                    continue
                coarse = np.asarray(draw_word(font, SAMPLE).resize((120, 24)).resize((60, 12))) // 32
                if coarse.tobytes() not in seen:
                    seen.add(coarse.tobytes())
                    faces.append(face)
        except Exception as error:  # a damaged font can raise anything
            notice(f"skipped {file}: {error or type(error).__name__}")
    return faces


def choose_faces(faces: Sequence[Face], count: int) -> list[Face]:
    """Whole families in a random order that is always the same, until there are enough faces.

    Near neighbours stay together: a random choice of single faces would part the weights of a family.
    """
    families: dict[str, list[Face]] = {}
    for face in sorted(faces, key=lambda face: (face.family, face.style, face.file.name, face.index)):
        families.setdefault(face.family, []).append(face)
    order = np.random.default_rng(0).permutation(len(families))
    names = list(families)
    return [face for i in order for face in families[names[i]]][:count]


# Pictures --------------------------------------------------------------------------------------------


def draw_word(font: ImageFont.FreeTypeFont, word: str) -> Image.Image | None:
    """A word in white on black, cut to its ink; None where there is none."""
    left, top, right, bottom = font.getbbox(word)
    image = Image.new("L", (int(right - left) + 16, int(bottom - top) + 16))
    ImageDraw.Draw(image).text((8 - left, 8 - top), word, 255, font)
    box = image.getbbox()
    return image.crop(box) if box else None


def set_word(font: ImageFont.FreeTypeFont, word: str, size: int) -> np.ndarray:
    """A word as large as fits, centred on (size, 2 * size) uint8."""
    image = draw_word(font, word)
    scale = min((2 * size - 4) / image.width, (size - 4) / image.height)
    width, height = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    page = Image.new("L", (2 * size, size))
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    page.paste(small, ((page.width - width) // 2, (page.height - height) // 2))
    return np.asarray(page)


class Distortions:
    """Words set smaller and elsewhere, blurred and with noise: each time an image is drawn, in another way.

    A word keeps 70 to 100 % of its size and stays on the page; it is blurred by a Gaussian of 0 to 1 pixels
    (at 32 pixels of height); the noise has a deviation of 0 to 24 grey levels.
    """

    def draw(self, count: int, shape: torch.Size, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """What is random about `count` images of a shape: numbers (count, 5) from 0 to 1, and noise."""
        return (
            torch.rand(count, 5, generator=generator),
            torch.randn(count, *shape, generator=generator),
        )

    def apply(self, images: torch.Tensor, drawn: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Distort images (n, 1, size, 2 * size) uint8 as drawn."""
        scale, along, down, sigma, strength = drawn.unbind(1)
        scale = 1 / (0.7 + 0.3 * scale)  # of the page that is looked at
        theta = drawn.new_zeros(len(images), 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = scale
        theta[:, 0, 2], theta[:, 1, 2] = ((scale - 1) * (2 * x - 1) for x in (along, down))
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        pages = F.grid_sample(images.float(), grid, align_corners=False)
        pages = blurred(pages, sigma * images.shape[2] / 32)
        pages += 24 * strength[:, None, None, None] * noise
        return pages.clamp(0, 255).round().to(torch.uint8)


def blurred(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Convolve each image (n, 1, H, W) with its own Gaussian of `sigma` (n,) pixels."""
    reach = torch.arange(-3, 4, device=images.device)
    kernel = torch.exp(-0.5 * (reach / sigma.clamp_min(1e-3)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)  # (n, 7)
    rows = F.conv2d(images.transpose(0, 1), kernel[:, None, :, None], padding=(3, 0), groups=len(images))
    pages = F.conv2d(rows, kernel[:, None, None, :], padding=(0, 3), groups=len(images))
    return pages.transpose(0, 1)
