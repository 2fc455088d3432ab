"""experiments/fonts.py: words set in typefaces, from the fonts that come with matplotlib."""

import itertools
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import ImageFont

from experiments import fonts, run
from experiments.common import Place
from experiments.data import load_data
from experiments.trainer import Loader

OWN = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
NAMES = [
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralItalic.ttf",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six faces; a copy of one, a font without letters, a damaged file and one that is no font."""
    root = tmp_path_factory.mktemp("fonts")
    for name in NAMES:
        shutil.copy(OWN / name, root)
    shutil.copy(OWN / NAMES[0], root / "copy.ttf")
    changed = bytearray((OWN / NAMES[0]).read_bytes())
    changed += b"\0"  # another file, the same pictures
    (root / "almost.ttf").write_bytes(changed)
    shutil.copy(OWN / "STIXSizOneSymReg.ttf", root)
    (root / "damaged.ttf").write_bytes((OWN / NAMES[1]).read_bytes()[:2000])
    (root / "readme.txt").write_text("no font")
    return root


@pytest.fixture
def load(folder, tmp_path):
    return lambda source, size=16: load_data(source, size, tmp_path / "cache", fonts=[folder])


def test_distinct_faces_are_the_classes(load, capsys):
    data = load("typefaces:6:3")
    names = [" ".join(ImageFont.truetype(OWN / name, 16).getname()) for name in NAMES]
    assert sorted(data.classes) == sorted(names)
    assert data.train.images.shape == (18, 1, 16, 32)
    assert data.test.images.shape == (72, 1, 16, 32)
    assert data.train.labels.bincount().tolist() == [3] * 6
    assert data.test.labels.bincount().tolist() == [12] * 6
    assert len({image.numpy().tobytes() for image in data.train.images}) == 18
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "damaged.ttf" in said[0]


def test_words_are_disjoint_and_letters_covered():
    words = {part: text.split() for part, text in fonts.WORDS.items()}
    every = [word for part in words.values() for word in part]
    assert [len(part) for part in words.values()] == [30, 12, 12]
    assert len(set(every)) == len(every)
    assert set("".join(words["train"][:25])) >= set("".join(words["validation"] + words["test"])) - set("x")


def test_images_are_a_function_of_the_fonts(load, folder, tmp_path, monkeypatch):
    first = load("typefaces:5:4")
    monkeypatch.setattr(fonts, "set_word", lambda *args: pytest.fail("not from the cache"))
    again = load("typefaces:5:4")
    monkeypatch.undo()
    other = load_data("typefaces:5:4", 16, tmp_path / "other", fonts=[folder])
    for data in again, other:
        assert data.classes == first.classes
        assert data.digest == first.digest
        assert len(data.digest) == 64
        for part in "train", "test":
            assert torch.equal(getattr(data, part).images, getattr(first, part).images)
    (file,) = (tmp_path / "other").iterdir()
    elsewhere = load_data("typefaces:5:4", 16, tmp_path, fonts=[file])
    assert elsewhere.classes == first.classes
    assert elsewhere.digest == first.digest
    assert torch.equal(elsewhere.test.images, first.test.images)
    with pytest.raises(fonts.FontsError, match="holds no 5 faces of 4 words at 32 pixels"):
        load_data("typefaces:5:4", 32, tmp_path, fonts=[file])
    validation = load("typefaces-validation:5:4")
    assert torch.equal(validation.train.images, first.train.images)
    assert not torch.equal(validation.test.images, first.test.images)
    (folder / "more.ttf").write_bytes((OWN / "cmr10.ttf").read_bytes())
    try:
        assert load("typefaces:5:4").digest != first.digest
    finally:
        (folder / "more.ttf").unlink()


def test_families_stay_together(load):
    families = [name.rsplit(" ", 1)[0] for name in load("typefaces:6:1").classes]
    changes = sum(a != b for a, b in itertools.pairwise(families))
    assert changes == len(set(families)) - 1


def test_too_few_faces_and_no_folder(load, tmp_path):
    with pytest.raises(fonts.FontsError, match="6 distinct Latin faces are found, 7 are needed"):
        load("typefaces:7")
    for name, said in ("none", "there is no folder"), ("none.npz", "holds no 2 faces"):
        with pytest.raises(fonts.FontsError, match=said):
            load_data("typefaces:2", 16, tmp_path, fonts=[tmp_path / name])


def test_an_unwritable_cache_is_said(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    data = load_data("typefaces:2:2", 16, tmp_path / "file" / "cache", fonts=[folder])
    assert len(data.train) == 4
    assert capsys.readouterr().err.count("cannot keep") == 1


def test_distortions():
    images = torch.zeros(4, 1, 32, 64, dtype=torch.uint8)
    images[:, :, 8:24, 16:48] = 200
    half = torch.full((4, 5), 0.5)
    still = torch.tensor([1.0, 0.5, 0.5, 0.0, 0.0]).repeat(4, 1)  # full size, no blur, no noise
    noise = torch.randn(4, 1, 32, 64, generator=torch.Generator().manual_seed(0))
    apply = fonts.Distortions().apply
    assert torch.equal(apply(images, still, noise), images)
    small = still.clone()
    small[:, 0] = 0
    share = (apply(images, small, noise) > 100).float().mean() / (images > 100).float().mean()
    assert abs(share - 0.7**2) < 0.05
    corner = small.clone()
    corner[:, 1:3] = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    places = [torch.nonzero(image[0]).float().mean(0) for image in apply(images, corner, noise)]
    assert len({tuple(place.round().tolist()) for place in places}) == 4
    blurry, noisy = still.clone(), still.clone()
    blurry[:, 3] = noisy[:, 4] = 1
    out = apply(images, blurry, noise).float()
    assert 0 < out[0, 0, 16, 15] < out[0, 0, 16, 16] < 200
    assert out[0, 0, 16, 32] == 200
    out = apply(images, noisy, noise).float()[:, :, 8:24, 16:48]
    assert abs(out.std() - 24) < 3
    # an image is its own row's affair
    drawn = torch.stack([still[0], small[1], blurry[2], noisy[3]])
    together = apply(images, drawn, noise)
    for i in range(4):
        assert torch.equal(together[i : i + 1], apply(images[i : i + 1], drawn[i : i + 1], noise[i : i + 1]))
    assert not torch.equal(apply(images, half, noise), images)


def test_every_process_distorts_its_share_of_the_batch(load):
    data = load("typefaces:6:3")
    whole = [images for images, *_ in Loader(data, 6, 0, Place(torch.device("cpu")))]
    parts = [
        [images for images, *_ in Loader(data, 6, 0, Place(torch.device("cpu"), rank, 2))] for rank in (0, 1)
    ]
    for batch, even, odd in zip(whole, *parts, strict=True):
        torch.testing.assert_close(batch[::2], even)
        torch.testing.assert_close(batch[1::2], odd)
    assert not np.array_equal(whole[0], whole[1])


def test_training_on_words(folder, tmp_path, capsys):
    argv = f"--data typefaces:4:8 --fonts {folder} --size 16 --stages 4 --depth 10 --width 8 --epochs 1"
    (result,) = run.main(
        [*argv.split(), "--batch-size", "8", "--out", str(tmp_path), "--cache", str(tmp_path)]
    )
    assert 0 <= result.history[0]["test_calibration_error"] <= 1
    assert len(result.spectrum) == 4
    with pytest.raises(SystemExit):
        run.main(["--data", "typefaces:3:31"])
    assert "31" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--stages", "4", "--depth", "8"])
    assert "8n+2" in capsys.readouterr().err


def test_faces_that_come_after_are_held_out(load, monkeypatch):
    assert load("typefaces:6:3").held_out is None
    data, every = load("typefaces:3:3"), load("typefaces:6:3")
    learnt, judged = data.held_out
    assert data.classes == every.classes[:3]
    assert (len(learnt), len(judged)) == (9, 36)
    assert learnt.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert torch.equal(data.train.images, every.train.images[:9])
    still = every.train.images[9:].float()
    assert (learnt.images.float() - still).abs().mean() < (learnt.images.float() - still.flip(0)).abs().mean()
    validation = load("typefaces-validation:3:3").held_out
    assert not torch.equal(validation[1].images, judged.images)
    monkeypatch.setattr(fonts, "HELD_OUT", 2)
    monkeypatch.setattr(fonts, "FONTS_VERSION", 0)
    assert len(load("typefaces:3:3").held_out[0]) == 6


def test_linear_probe(load):
    from experiments.data import Split
    from experiments.probe import features, linear_probe
    from experiments.trainer import Trainer

    data = load("typefaces:4:4")
    args = run.parse_arguments(
        run.make_parser(), ["--depth", "8", "--width", "8", "--size", "16", "--batch-size", "8"]
    )
    trainer = Trainer("ce", 0, data, args, Place(torch.device("cpu")))
    found = torch.from_numpy(features(trainer.net, trainer.predict, data.test.images))
    assert found.shape == (48, 32)
    with torch.no_grad():
        logits = trainer.net.fc(found)
    torch.testing.assert_close(logits, trainer.predict(data.test.images))
    assert linear_probe(trainer.net, trainer.predict, data.test, data.test) > 0.8  # fitted on the same
    wrong = Split(data.test.images, data.test.labels.roll(12))
    assert linear_probe(trainer.net, trainer.predict, data.test, wrong) < 0.2


def test_calibration_error(load):
    from experiments.trainer import Trainer

    data = load("typefaces:4:4")
    args = run.parse_arguments(
        run.make_parser(), ["--depth", "8", "--width", "8", "--size", "16", "--batch-size", "8"]
    )
    trainer = Trainer("ce", 0, data, args, Place(torch.device("cpu")))
    found = trainer.evaluate(data.test)["test_calibration_error"]
    probabilities = trainer.predict(data.test.images).softmax(1).double().numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == data.test.labels.numpy()
    expected = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert found == pytest.approx(expected, abs=1e-9)
