"""docs/RECIPES.md: every snippet runs on tiny models and data and learns; every preset parses and trains."""

from __future__ import annotations

import contextlib
import re
import shlex
import socket
import sys
from pathlib import Path

import pytest
import test_experiments
import torch
import torchvision_stub
from processes import spawn
from test_experiments import parse, run, write_cifar100, write_folder, write_tinyimagenet
from torch.utils.data import DataLoader, TensorDataset

import zipfls_cuda as zls
from zipfls_cuda import functional

PAGE = (Path(__file__).parents[1] / "docs" / "RECIPES.md").read_text()
SNIPPETS = dict(re.findall(r"^### (.+?)\n(?:(?!###).)*?```python\n(.*?)```", PAGE, re.M | re.S))
COMMANDS = re.findall(r"^python -m experiments.run (.+)$", PAGE, re.M)
CLASSES = 4

one_thread, no_pictures = test_experiments.one_thread, test_experiments.no_pictures


# Snippets -------------------------------------------------------------------------------------------


def coloured_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise around one colour per class: images (count, 3, 64, 64) and labels (count,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    colours = torch.randn(CLASSES, 3, 1, 1, generator=generator)
    return colours[labels] + 0.5 * torch.randn(count, 3, 64, 64, generator=generator), labels


@pytest.fixture
def given(tmp_path, monkeypatch) -> dict:
    """The names that the page says a reader brings along."""
    monkeypatch.chdir(tmp_path)  # for what frameworks write
    images, labels = coloured_images(32)
    dataset = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    return {
        "train_loader": DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True),
        "test_loader": DataLoader(TensorDataset(images, labels), batch_size=16),
        "train_dataset": dataset,
        "test_dataset": dataset,
        "num_classes": CLASSES,
        "device": "cpu",
        "output_dir": str(tmp_path / "output"),
    }


@pytest.fixture
def steps(monkeypatch) -> list[dict]:
    """What happened in every training step: the loss, its votes and the gradient of its logits."""
    seen, original = [], functional.zipf_cross_entropy

    def recorded(logits, target, votes=None, **options):
        loss = original(logits, target, votes, **options)
        if not options["zipf_weight"]:  # validation, or a deep head
            return loss
        step = {"loss": loss.item(), "votes": votes, "weight": options["zipf_weight"]}
        logits.register_hook(lambda grad: step.update(grad=grad.abs().sum().item()))
        seen.append(step)
        return loss

    monkeypatch.setattr(functional, "zipf_cross_entropy", recorded)
    monkeypatch.setattr(zls, "zipf_cross_entropy", recorded)
    return seen


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps the precision of the first Accelerator for the whole process."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


def torchvision():
    try:
        return torchvision_stub.import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")


def small_timm(monkeypatch):
    torchvision()  # which timm imports
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def create_small(name, **options):
        assert timm.is_model(name)
        return create("resnet18", **options, **test_experiments.SMALL_TIMM)

    monkeypatch.setattr(timm, "create_model", create_small)


def small_torchvision(monkeypatch):
    resnet = torchvision().models.resnet
    assert callable(resnet.resnet50)

    class Small(resnet.ResNet):
        """One block a stage, a quarter as wide."""

        def __init__(self, num_classes):
            super().__init__(resnet.BasicBlock, [1, 1, 1, 1])
            self.fc = torch.nn.Linear(512 // 4, num_classes)

        def _make_layer(self, block, planes, *args, **options):
            return super()._make_layer(block, planes // 4, *args, **options)

    monkeypatch.setattr(torchvision().models, "resnet50", Small)


def small_lightning(monkeypatch):
    small_timm(monkeypatch)  # first: lightning imports torchvision too
    pytest.importorskip("lightning")


def small_transformers(monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    with contextlib.suppress(ImportError):
        torchvision_stub.import_torchvision()  # which transformers imports if it is there

    def from_pretrained(name, num_labels, ignore_mismatched_sizes):
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        config = transformers.ResNetConfig(num_labels=num_labels, **sizes)
        return transformers.ResNetForImageClassification(config)

    monkeypatch.setattr(transformers.AutoModelForImageClassification, "from_pretrained", from_pretrained)


def small_accelerate(monkeypatch):
    small_timm(monkeypatch)  # first: accelerate imports torchvision where it can
    pytest.importorskip("accelerate")


SHRINK = {
    "timm": small_timm,
    "torchvision": small_torchvision,
    "Lightning": small_lightning,
    "Hugging Face": small_transformers,
    "accelerate": small_accelerate,
}
DISTILLATION = "Distillation"  # which has no votes
LANGUAGE = "Language models"  # nor has this
OUTPUTS = {"Two views": zls.methods.DDGSDLoss, "Branches": zls.methods.BYOTLoss}  # nor have these


def test_no_snippet_is_forgotten():
    assert sorted(SNIPPETS) == sorted([*SHRINK, LANGUAGE, DISTILLATION, *OUTPUTS])
    assert PAGE.count("```python") == len(SNIPPETS)
    for name, code in SNIPPETS.items():
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) <= 25, f"{name} has {len(lines)} lines"


SLOW = {"Lightning", "Hugging Face", "accelerate"}  # to import


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in SHRINK])
def test_snippet(name, given, steps, monkeypatch):
    SHRINK[name](monkeypatch)
    exec(compile(SNIPPETS[name], f"docs/RECIPES.md, {name}", "exec"), given)
    assert len(steps) == 10 * 4  # epochs, batches
    for step in steps:
        assert step["votes"].shape[0] == 8
        assert step["votes"].shape[1] > 1
        assert step["weight"] == 0.1
        assert step["grad"] > 0
    first, last = (torch.tensor([step["loss"] for step in part]).mean() for part in (steps[:4], steps[-4:]))
    assert last < 0.8 * first, (first, last)


def small_language_model(seed: int = 0):
    """A GPT-2 of 1,000 tokens and random weights, without dropout."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"vocab_size": 1000, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    without = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **without, bos_token_id=0, eos_token_id=0)
    )


def texts(count: int) -> list[dict]:
    """Counting up from a random token, the first and the last two tokens without a label."""
    starts = torch.randint(900, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    made = []
    for start in starts:
        ids = torch.arange(start, start + 20)
        labels = ids.clone()
        labels[[0, 1, 18]] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


@pytest.mark.slow
def test_language_model(given, monkeypatch):
    """It learns; loss and gradients with zipf_weight 0, and whatever is evaluated, are the model's own."""
    small_transformers(monkeypatch)
    import transformers

    models, calls, loss = [], [], zls.linear_zipf_cross_entropy

    def from_pretrained(name):
        models.append(small_language_model())
        return models[-1]

    def recorded(*args, **options):
        found = loss(*args, **options)
        calls.append((found.item(), options))
        return found

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(zls, "linear_zipf_cross_entropy", recorded)
    arguments = transformers.TrainingArguments.__init__
    monkeypatch.setattr(
        transformers.TrainingArguments, "__init__",
        lambda self, *args, **options: arguments(
            self, *args, **options, use_cpu=True, report_to=[], learning_rate=1e-2,
            per_device_train_batch_size=4, gradient_accumulation_steps=2,
        ),
    )  # fmt: skip
    given["train_texts"] = texts(16)
    exec(compile(SNIPPETS[LANGUAGE], "docs/RECIPES.md, language models", "exec"), given)
    assert len(calls) == 10 * 4
    assert all(int(options["num_items"]) == 8 * 17 for _, options in calls)
    first, last = (sum(value for value, _ in part) for part in (calls[:4], calls[-4:]))
    assert last < 0.8 * first, (first, last)

    (ours,) = models
    theirs = small_language_model()
    theirs.load_state_dict(ours.state_dict())
    batch = {k: torch.stack([t[k] for t in texts(3)]) for k in ("input_ids", "labels")}
    monkeypatch.setattr(
        zls, "linear_zipf_cross_entropy", lambda *a, **options: loss(*a, **options | {"zipf_weight": 0.0})
    )
    for n in (None, torch.tensor(40)):
        found = []
        for model in (ours.train(), theirs.train()):
            model.zero_grad()
            out = model(**batch, num_items_in_batch=n)
            out.loss.backward()
            found.append((out.loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
        torch.testing.assert_close(*found)
    outs = [model.eval()(**batch) for model in (ours, theirs)]
    torch.testing.assert_close(outs[0].logits, outs[1].logits)
    torch.testing.assert_close(outs[0].loss, outs[1].loss)


def test_distillation(given, monkeypatch):
    """The student comes to say what the teacher says, and the teacher is as before."""
    small_timm(monkeypatch)
    timm, create, losses = sys.modules["timm"], sys.modules["timm"].create_model, []

    def opinionated(name, **options):
        model = create(name, **options)
        with torch.no_grad():
            model.fc.weight.mul_(20 if name == "resnet101" else 1)  # a teacher with something to say
        return model

    monkeypatch.setattr(timm, "create_model", opinionated)
    forward = zls.methods.KDLoss.forward
    monkeypatch.setattr(
        zls.methods.KDLoss, "forward", lambda *args: losses.append(forward(*args)) or losses[-1]
    )
    exec(compile(SNIPPETS[DISTILLATION], "docs/RECIPES.md, distillation", "exec"), given)
    assert not given["teacher"].training
    assert all(p.grad is None for p in given["teacher"].parameters())
    first, last = (torch.stack(part).mean() for part in (losses[:4], losses[-4:]))
    assert last < 0.5 * first, (first, last)


@pytest.mark.parametrize("name", OUTPUTS)
def test_several_outputs(name, given, monkeypatch):
    small_timm(monkeypatch)
    losses, forward = [], OUTPUTS[name].forward
    monkeypatch.setattr(
        OUTPUTS[name], "forward", lambda *args: losses.append(forward(*args).detach()) or forward(*args)
    )
    torch.manual_seed(0)
    exec(compile(SNIPPETS[name], f"docs/RECIPES.md, {name}", "exec"), given)
    assert len(losses) == 10 * 4
    first, last = (torch.stack(part).mean() for part in (losses[:4], losses[-4:]))
    assert last < 0.5 * first, (first, last)


@pytest.mark.slow
def test_hugging_face_in_bfloat16(given, steps, monkeypatch):
    """The Trainer's autocast is inside model.forward, and has ended when the map votes."""
    small_transformers(monkeypatch)
    import transformers

    initialise = transformers.TrainingArguments.__init__

    def in_bfloat16(self, *args, **options):
        initialise(self, *args, **options, bf16=True, use_cpu=True)

    monkeypatch.setattr(transformers.TrainingArguments, "__init__", in_bfloat16)
    exec(compile(SNIPPETS["Hugging Face"], "docs/RECIPES.md, Hugging Face", "exec"), given)
    assert len(steps) == 10 * 4
    assert all(step["votes"].shape == (8, 8 * 8) for step in steps)  # 64 / 8 positions a side
    assert all(step["grad"] > 0 for step in steps)
    first, last = (sum(step["loss"] for step in part) for part in (steps[:4], steps[-4:]))
    assert last < 0.8 * first


def train_hugging_face(rank: int, folder: Path, count: int, batch: int, accumulation: int, processes: int):
    """Run the snippet with its own data, plain SGD and no batch norm; rank 0 writes what came out of it.

    Args:
        folder: where `result` goes: what the Trainer logged at each step, and the weights.
        count: images of the training set.
        batch: images of a forward of one process.
        accumulation: batches of a step.
    """
    transformers = pytest.importorskip("transformers")
    settings = {"learning_rate": 0.1, "num_train_epochs": 2, "eval_strategy": "no", "save_strategy": "no"}
    settings |= {"optim": "sgd", "max_grad_norm": 1e9, "logging_steps": 1, "use_cpu": True}
    settings |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    images, labels = coloured_images(count)
    dataset = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    given = {"train_dataset": dataset, "test_dataset": dataset, "num_classes": CLASSES}
    given["output_dir"] = str(folder)
    logged = []
    with pytest.MonkeyPatch.context() as patch:
        if processes > 1:
            patch.setenv("RANK", str(rank))
            patch.setenv("LOCAL_RANK", str(rank))
        small_transformers(patch)
        trainer, arguments = transformers.Trainer, transformers.TrainingArguments
        initialise = arguments.__init__
        auto = transformers.AutoModelForImageClassification
        make = auto.from_pretrained

        def without_batch_norm(*args, **options):  # whose statistics are a micro-batch's
            torch.manual_seed(0)
            model = make(*args, **options)
            for parent in list(model.modules()):
                for name, child in parent.named_children():
                    if isinstance(child, torch.nn.BatchNorm2d):
                        setattr(parent, name, torch.nn.GroupNorm(1, child.num_features))
            return model

        patch.setattr(auto, "from_pretrained", without_batch_norm)
        patch.setattr(arguments, "__init__", lambda self, *a, **o: initialise(self, *a, **o | settings))
        patch.setattr(trainer, "log", lambda self, logs, *_: logged.append(logs))
        exec(compile(SNIPPETS["Hugging Face"], "docs/RECIPES.md", "exec"), given)
        steps = [(step["loss"], step["grad_norm"]) for step in logged if "grad_norm" in step]
        if rank == 0:
            torch.save((torch.tensor(steps), given["model"].state_dict()), folder / "result")


@pytest.mark.slow
@pytest.mark.parametrize("count, batch, processes", [(27, 4, 1), (28, 2, 2)])
def test_hugging_face_accumulates(tmp_path, monkeypatch, count, batch, processes):
    """Four batches a step, of one process or of each of two, train as one batch of their size.

    In the last step of an epoch there are three batches, and of one process the last has one image less.
    """
    pytest.importorskip("accelerate")
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    train_hugging_face(0, tmp_path / "whole", count, 16, 1, 1)
    if processes == 1:
        train_hugging_face(0, tmp_path / "parts", count, batch, 4, 1)
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for name, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", port), ("WORLD_SIZE", processes)):
            monkeypatch.setenv(name, str(value))
        spawn(train_hugging_face, (tmp_path / "parts", count, batch, 4, processes), processes)
    (whole, weights), (parts, weights_of_parts) = (
        torch.load(tmp_path / n / "result") for n in ("whole", "parts")
    )
    assert whole.shape == (4, 2)
    assert whole[-1, 0] < whole[0, 0]  # it learns
    torch.testing.assert_close(parts[:, 0], whole[:, 0], rtol=0, atol=2e-4)  # rounded to four digits
    torch.testing.assert_close(parts[:, 1], whole[:, 1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weights_of_parts, weights, rtol=1e-3, atol=1e-5)


# Presets --------------------------------------------------------------------------------------------


def test_every_preset_has_its_line():
    lines = [shlex.split(command) for command in COMMANDS]
    assert {line[1] for line in lines} == set(run.AUTHORS)
    for line in lines:
        args = parse(*line)
        assert args.alpha == 1.0
        assert args.loss == ["zipf"]
        assert args.data.endswith(":PATH")


@pytest.mark.parametrize(
    "preset, zipf_weight, deep_weight",
    [("cifar100", 0.1, 0.1), ("tinyimagenet", 1.0, 0.5), ("imagenet", 0.1, None), ("inat21", 1.0, None)],
)
def test_numbers_of_the_presets(preset, zipf_weight, deep_weight):
    args = parse("--preset", preset, "--data", "folder:PATH")
    assert args.zipf_weight == zipf_weight
    assert (args.deep, args.upsample) == ((False, 1) if deep_weight is None else (True, 2))
    assert deep_weight in (None, args.deep_weight)
    (row,) = re.findall(rf"^\| `{preset}` \| (.*) \|$", PAGE, re.M)
    cells = row.split(" | ")
    assert cells[:3] == [str(zipf_weight), str(deep_weight or "-"), "1"]
    assert cells[3] == ("last stage" if deep_weight is None else "last two stages, upsampled")
    assert cells[5] == f"{args.epochs}, {args.batch_size}"


@pytest.mark.parametrize("preset", run.AUTHORS)
def test_a_preset_without_data_asks_for_it(preset, capsys):
    with pytest.raises(SystemExit):
        parse("--preset", preset)
    assert re.search(r"argument --data: '\w+:' lacks its path: --data \w+:PATH", capsys.readouterr().err)


@pytest.mark.parametrize("preset", run.AUTHORS)
def test_tiny_run_of_a_preset(preset, tmp_path, monkeypatch, steps):
    kind = run.PRESETS[preset]["data"].removesuffix(":")
    write = {"cifar100": write_cifar100, "tinyimagenet": write_tinyimagenet}.get(kind)
    if write:
        write(tmp_path / "data")
    else:
        small_timm(monkeypatch)
        write_folder(tmp_path / "data", {"red": 8, "blue": 8, "green": 8})
    argv = ["--preset", preset, "--data", f"{kind}:{tmp_path / 'data'}", "--limit", "8", "--epochs", "1"]
    argv += ["--depth", "8", "--width", "16", "--device", "cpu", "--out", str(tmp_path / "out")]
    (made,) = run.main(argv)
    assert made.loss == "zipf"
    assert made.history[0]["train_loss"] > made.history[0]["train_cross_entropy"]
    (step,) = steps
    assert step["weight"] == run.PRESETS[preset]["zipf_weight"]
    # all positions of both maps at twice their resolution; or those of the last map, 224 / 32 a side
    positions = {"cifar100": 16**2 + 32**2, "tinyimagenet": 32**2 + 64**2}
    assert step["votes"].shape == (8, positions.get(preset, 7**2))
