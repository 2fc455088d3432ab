"""examples/train.py trains on built-in data and on folders, and says what is wrong."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import zipfls_cuda as zls

SCRIPT = Path(__file__).parents[1] / "examples" / "train.py"


@pytest.fixture
def train(monkeypatch, capsys):
    """Runs the script; returns the accuracies that it prints, in percent."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return [float(line.split()[-1].rstrip("%")) for line in capsys.readouterr().out.splitlines()]

    return run


def write_images(root: Path, count: int, dtype: str = "uint8") -> None:
    for level, name in enumerate(("dark", "grey", "light")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture = np.random.default_rng(i).integers(80 * level, 80 * level + 60, (20 + i, 24))
            Image.fromarray(picture.astype(dtype)).save(root / name / f"{i}.png")
        (root / name / "._0.png").write_bytes(b"hidden")


def test_it_learns_digits_with_votes(train, monkeypatch):
    weights, original = [], zls.ZipfLoss.forward

    def recorded(self, output, target):
        weights.append((self.zipf_weight, self.votes.votes_of(output)[0].shape))
        return original(self, output, target)

    monkeypatch.setattr(zls.ZipfLoss, "forward", recorded)
    first, last = train("--epochs", 2, "--size", 8)
    assert max(first, last) > 90  # chance is 10
    assert weights[0] == (0.1, (64, 4))
    assert len(weights) == 2 * 22  # epochs, batches of 1347 images


def test_it_learns_a_folder(train, tmp_path, capsys):
    write_images(tmp_path / "train", 8)
    write_images(tmp_path / "val", 2)
    argv = "--data", tmp_path, "--epochs", 4, "--size", 16, "--batch-size", 6, "--zipf-weight", 0
    assert train(*argv)[-1] == 100
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit):
        train(*argv)
    assert (
        f"argument --data: {tmp_path} needs images in train/CLASS/ and val/CLASS/" in capsys.readouterr().err
    )
    write_images(tmp_path / "val", 1, "uint16")
    with pytest.raises(ValueError, match=r"val/dark/0.png has more than 8 bits a channel"):
        train(*argv)


def test_it_is_short():
    assert len(SCRIPT.read_text().splitlines()) <= 120
