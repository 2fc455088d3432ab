"""Table 1, side by side: a training step with every method of experiments.run, against plain cross-entropy.

Each method trains a network of its own, the demo's ResNet, on one batch of random images, as experiments.run
does: its teacher, second view, branches or partners are part of the step. All are timed in one interleaved
run. What a method keeps beside the network it trains and its heads (a teacher, copies, stores, a batch) is
counted after the run and stands with the record.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict, dataclass

import clock
import torch
from clock import TINY, Entry
from records import Records, Where
from sources import ROOT
from torch.utils._pytree import tree_leaves

sys.path.append(str(ROOT))

from experiments.common import Place
from experiments.data import Data, Split
from experiments.methods import COPIES, EVERY, METHODS
from experiments.model import LOSSES
from experiments.run import make_parser, parse_arguments
from experiments.trainer import Trainer

ON_GPU = clock.device().type == "cuda"
CLOCK = clock.best_clock()
NAMES = LOSSES | {name: title for name, (title, _) in METHODS.items()}


@dataclass(frozen=True)
class Case:
    """N images of a batch, C classes, M images of a training set, and the network."""

    N: int
    C: int
    M: int
    size: int
    depth: int
    width: int
    dtype: str

    names = tuple(NAMES.values())

    @property
    def where(self) -> Where:
        return Where("methods", asdict(self), "step", CLOCK.name)

    def run(self, records: Records) -> clock.Comparison:
        torch.backends.cudnn.benchmark = True
        drawn = torch.Generator().manual_seed(0)
        images = torch.randint(256, (self.M, 3, self.size, self.size), dtype=torch.uint8, generator=drawn)
        labels = torch.arange(self.M) % self.C
        data = Data(
            Split(images, labels), Split(images[:1], labels[:1]), [*map(str, range(self.C))], mirror=True
        )
        options = (
            f"--depth {self.depth} --width {self.width} --size {self.size} --batch-size {self.N} --lr 1e-3"
        )
        options += f" --amp {'bf16' if self.dtype == 'bfloat16' else 'none'} --epochs 100"
        args, place = parse_arguments(make_parser(), options.split()), Place(clock.device())
        trainers = {title: self.trainer(Trainer(name, 0, data, args, place)) for name, title in NAMES.items()}
        entries = [
            Entry(
                title,
                [functools.partial(t.step, *next(iter(t.loader)))],
                deep=True,
                clear=t.optimizer.zero_grad,
            )
            for title, t in trainers.items()
        ]
        result = records.compare(self.where, entries, CLOCK, seconds=60.0 if ON_GPU else 120.0, memory=True)
        for r in records.records:
            if (r["run"], r["bench"]) == (records.run, "methods"):
                r["facts"] = {"kept": kept(trainers[r["name"]])}
        records.write()
        return result

    @staticmethod
    def trainer(made: Trainer) -> Trainer:
        """Ready for a step in the middle of training: MrKD has its copies."""
        made.model.train()
        if made.method:
            made.method.begin_epoch(0)
            for _ in range(EVERY * COPIES if made.method.copies else 0):
                made.method.end_epoch()
        return made


def kept(made: Trainer) -> int:
    """Bytes that the method holds from step to step beside the network it trains and its heads."""
    if made.method is None:
        return 0
    state = {k: v for k, v in made.method.state_dict().items() if not k.startswith("outputs.")}
    tensors = [x for x in tree_leaves(state) if isinstance(x, torch.Tensor)]
    return sum({x.data_ptr(): x.nbytes for x in tensors}.values())


if TINY:
    CASES = [Case(8, 5, 40, size=16, depth=8, width=8, dtype="float32")]
elif ON_GPU:
    CASES = [Case(256, 100, 50000, size=32, depth=20, width=64, dtype="bfloat16")]
else:
    CASES = [Case(64, 100, 50000, size=32, depth=20, width=16, dtype="float32")]
