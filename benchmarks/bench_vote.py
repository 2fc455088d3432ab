"""Dense votes: a matrix product whose scores are never stored, against the product alone and with argmax.

The operations counted are the product's, 2 N P D C; the bytes are features and weight read once, votes
written.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace

import baselines
import clock
import torch
from clock import TINY, Entry
from records import Records, Where

ON_GPU = clock.device().type == "cuda"
CLOCK = clock.best_clock()


@dataclass(frozen=True)
class Case:
    """Shape, layout of the features, and what it stands for."""

    N: int
    H: int
    W: int
    D: int
    C: int
    dtype: str = "float32"
    layout: str = "channels_last"
    upsample: int = 1
    what: str = ""

    @property
    def where(self) -> Where:
        return Where("vote", {**asdict(self), "sweep": ""}, "forward", CLOCK.name)

    @property
    def votes(self) -> dict:
        """What takes features and weight."""
        return baselines.votes(clock.device().type, self.upsample, self.layout)

    @property
    def names(self) -> list[str]:
        return [*self.votes, *([baselines.ARGMAX] if self.upsample == 1 else [])]

    @torch.no_grad()
    def run(self, records: Records) -> clock.Comparison:
        dtype, P = getattr(torch, self.dtype), self.H * self.W
        size = (self.N * P + self.C) * self.D * dtype.itemsize
        shape = self.N, self.H, self.W, self.D, self.C, dtype, self.layout
        inputs = [baselines.vote_inputs(*shape, seed) for seed in range(clock.copies(size))]
        entries = [Entry(name, [functools.partial(f, *x) for x in inputs]) for name, f in self.votes.items()]
        if baselines.ARGMAX in self.names:
            calls = [functools.partial(torch.argmax, baselines.matmul_alone(*x), 1) for x in inputs]
            entries.append(Entry(baselines.ARGMAX, calls))
        nbytes, flops = size + 4 * self.N * P * self.upsample**2, 2 * self.N * P * self.D * self.C
        return records.compare(self.where, entries, CLOCK, nbytes, flops, seconds=1.5, memory=True)


RESNET18, RESNET50, VIT, INAT, STAGE1, STAGE2, WIDE = (
    "ResNet-18, ImageNet", "ResNet-50, ImageNet", "ViT-B/16, ImageNet", "ResNet-50, iNat21",
    "CIFAR-100, stage 1", "CIFAR-100, stage 2", "many classes",
)  # fmt: skip


def cpu_cases() -> list[Case]:
    cases = []
    for dtype in ("float32", "bfloat16"):
        cases += [
            Case(32, 7, 7, 512, 1000, dtype, what=RESNET18),
            Case(128, 4, 4, 512, 100, dtype, what=STAGE1),
            Case(128, 8, 8, 256, 100, dtype, what=STAGE2),
            Case(128, 4, 4, 512, 100, dtype, upsample=2, what=STAGE1),
            Case(64, 7, 7, 64, 10000, dtype, what=WIDE),
        ]
    return cases + [Case(32, 7, 7, 512, 1000, layout=layout, what=RESNET18) for layout in ("NCHW", "tokens")]


def gpu_cases() -> list[Case]:
    bf16 = functools.partial(Case, dtype="bfloat16")
    main = [
        bf16(256, 7, 7, 2048, 1000, what=RESNET50),
        bf16(256, 7, 7, 512, 1000, what=RESNET18),
        bf16(256, 14, 14, 768, 1000, layout="tokens", what=VIT),
        bf16(256, 7, 7, 2048, 10000, what=INAT),
        bf16(128, 4, 4, 512, 100, what=STAGE1),
        bf16(128, 8, 8, 256, 100, what=STAGE2),
    ]
    return [
        *main,
        *(replace(case, layout="NCHW") for case in main),
        bf16(128, 4, 4, 512, 100, upsample=2, what=STAGE1),
        bf16(128, 8, 8, 256, 100, upsample=2, what=STAGE2),
        bf16(128, 7, 7, 2048, 1000, what=RESNET50),
    ]


CASES = gpu_cases() if ON_GPU else cpu_cases()
if TINY:
    varied = ({}, {"dtype": "bfloat16", "layout": "NCHW"}, {"layout": "tokens"}, {"upsample": 2})
    CASES = [Case(2, 2, 2, 8, 10, **options) for options in varied]
