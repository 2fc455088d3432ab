"""Train a small network with cross-entropy, label smoothing, Zipf's Label Smoothing or a related method.

    python -m experiments.run --preset demo                      # ce, ls, zipf on handwritten digits
    python -m experiments.run --data fractals --loss ce,zipf     # 100 generated fine-grained classes
    python -m experiments.run --data folder:PATH --loss zipf     # your images, PATH/<class>/<image>
    python -m experiments.run --data cifar100:PATH --loss ce,ls,zipf --epochs 100
    python -m experiments.run --method dkd,byot                  # related methods; docs/METHODS.md lists them
    python -m experiments.run --preset cifar100 --data cifar100:PATH  # the authors' setting
    torchrun --nproc-per-node 2 -m experiments.run --data fractals

Under --out, each loss gets a log with one JSON line per epoch (LOSS.jsonl) and a checkpoint (LOSS.pt) from
which --resume goes on as if nothing had happened. At the end come summary.json and two pictures: curves.png,
and spectra.png, the paper's Fig. 2: the mean sorted softmax probabilities with the Zipf law fitted to them.
docs/RECIPES.md has the authors' settings; examples/train.py is a script to copy from.

Source: Liang et al., "Efficient One Pass Self-distillation with Zipf's Label Smoothing", ECCV 2022.
"""

import argparse
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .common import OutError, UsageError, atomic_file, join_processes, speaks
from .data import TYPEFACES, load_data
from .methods import METHODS, with_teachers
from .model import LOSSES, MIN_WIDTH, make_law
from .trainer import Run, by_loss, prepare, train

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


class Parser(argparse.ArgumentParser):
    """Of several processes the first alone says what is wrong."""

    def exit(self, status: int = 0, message: str | None = None) -> None:
        super().exit(status, message if speaks() else None)

    def print_usage(self, file=None) -> None:
        if speaks():
            super().print_usage(file)


def make_parser() -> argparse.ArgumentParser:
    """The options; what is wrong with one ends the program with a message that names it."""
    parser = Parser(
        prog="python -m experiments.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    # fmt: off
    add("--preset", choices=PRESETS, help="a set of options; others beside it override its values")
    add("--data", type=data_source, default="digits", metavar="SOURCE",
        help="digits, fractals[:PER_CLASS], typefaces[:FACES[:WORDS]], folder:PATH, cifar100:PATH, "
        "tinyimagenet:PATH (default: digits); typefaces-validation is judged on other words")
    add("--fonts", type=Path, nargs="+", default=(), metavar="FOLDER",
        help="where typefaces are looked for, or the cache's file of them (default: the system's folders)")
    add("--loss", "--method", type=loss_list, default="zipf", metavar="LIST",
        help=f"of ce, ls, zipf, {', '.join(METHODS)}, with commas: they are compared; one with a teacher "
        "has ce, its teacher's loss, trained before (default: zipf)")
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
        help="resnet, the one of experiments/model.py, or timm:NAME (default: resnet)")
    add("--depth", type=number(int, 8), default=20, metavar="6n+2",
        help="of resnet with 3 stages; 2 SN+2 with S (default: 20)")
    add("--stages", type=number(int, 2, 5), default=3, metavar="S",
        help="of resnet; each but the first halves the map (default: 3)")
    add("--stem-stride", type=int, choices=(1, 2), default=1,
        help="of resnet's first convolution; 2 halves height and width of every map (default: 1)")
    add("--width", type=number(int, MIN_WIDTH), default=16, metavar="N",
        help=f"channels of resnet's first stage, at least {MIN_WIDTH} (default: 16)")
    add("--size", type=number(int, 16), default=32, metavar="PIXELS",
        help="height and width of the images, half the width of words (default: 32)")
    add("--limit", type=number(int, 2), metavar="N", help="use N images of each set at most")
    add("--skip-bad-images", action="store_true", help="leave out the images of a folder that cannot be read")
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
    if args.model == "resnet" and (args.depth - 2) % (2 * args.stages):
        some = ", ".join(str(2 * args.stages * n + 2) for n in (1, 2, 3))
        parser.error(f"argument --depth: {args.depth} is not {2 * args.stages}n+2, such as {some}")
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
    """The type of --loss: names with commas; those of teachers come before."""
    for name in text.split(","):
        if name not in LOSSES and name not in METHODS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join([*LOSSES, *METHODS])}")
    return with_teachers(text.split(","))


def seed_list(text: str) -> list[int]:
    """The type of --seed: 0,1,2."""
    return list(dict.fromkeys(number(int, 0)(seed) for seed in text.split(",")))


def data_source(text: str) -> str:
    """The type of --data."""
    kind, colon, argument = text.partition(":")
    paths = "folder", "cifar100", "tinyimagenet"
    if kind in paths and not argument:
        raise argparse.ArgumentTypeError(f"{text!r} lacks its path: --data {kind}:PATH")
    if kind == "fractals" and colon:
        number(int, 1)(argument)
    elif kind in TYPEFACES:
        for count, most in zip(argument.split(":") if colon else (), (math.inf, 30), strict=False):
            number(int, 2 if most == math.inf else 1, most)(count)
        if argument.count(":") > 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind}[:FACES[:WORDS]]")
    elif kind not in ("fractals", *paths) and text != "digits":
        known = (
            "digits, fractals[:PER_CLASS], typefaces[:FACES[:WORDS]], typefaces-validation[:FACES[:WORDS]], "
        )
        known += ", ".join(f"{kind}:PATH" for kind in paths)
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {known}")
    return text


def model_name(text: str) -> str:
    """The type of --model: resnet or timm:NAME."""
    kind, _, name = text.partition(":")
    if text != "resnet" and not (kind == "timm" and name):
        raise argparse.ArgumentTypeError(f"{text!r} is neither resnet nor timm:NAME")
    return text


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
    """Write summary.json, print the table, then draw the pictures."""
    with atomic_file(out / "summary.json", "w") as file:
        json.dump([vars(run) for run in runs], file, indent=1)
    print_table(runs)
    from . import plots

    plots.draw_curves(runs, out / "curves.png")
    plots.draw_spectra(runs, out / "spectra.png")
    print(f"pictures: {out / 'curves.png'} {out / 'spectra.png'}")


def make_folder(out: Path) -> None:
    """Make a folder, and see that files can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise OutError(f"{out} is not a folder that can be written to: {error.strerror}") from error


def train_all(args: argparse.Namespace) -> list[Run]:
    """Train every loss with every seed; what cannot be done is found out before the first of them."""
    with join_processes(args.device) as place:

        def load():
            return load_data(args.data, args.size, args.cache, args.limit, args.skip_bad_images, args.fonts)

        place.first(lambda: make_folder(args.out))
        data = place.first(load) or load()  # the other processes find in the cache what the first one made
        todo = [(loss, seed) for loss in args.loss for seed in args.seed]
        for loss, seed in todo:
            if args.resume or seed == args.seed[0]:
                prepare(loss, seed, data, args, place)
        return [train(loss, seed, data, args, place) for loss, seed in todo]


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Train what the command line asks for, then write and print the comparison."""
    parser = make_parser()
    try:
        args = parse_arguments(parser, argv)
        from . import plots  # noqa: F401  a missing matplotlib is found before the training, not after

        runs = train_all(args)
        if speaks():
            report(runs, args.out)
        return runs
    except UsageError as error:
        parser.exit(2, f"{parser.prog}: error: argument {error.option}: {error}\n")
    except ImportError as error:
        parser.exit(2, f"{parser.prog}: error: {error}; pip install '.[examples]' brings it\n")
    except FloatingPointError as error:
        parser.exit(1, f"{error}: a lower --lr may help\n")
    except KeyboardInterrupt:
        parser.exit(1, "interrupted: the same command with --resume goes on after the last whole epoch\n")


if __name__ == "__main__":
    main()
