"""Dense votes: a matrix product whose scores are never stored, against the product alone and with argmax.

The operations counted are the product's, 2 N P D C; the bytes are features and weight read once, votes
written.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace

import baselines
import harness
import pytest
import torch
from harness import TINY, Entry

ON_GPU = harness.device().type == "cuda"
CLOCK = harness.DeviceClock() if ON_GPU else harness.HostClock()


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
    sweep: str = ""
    what: str = ""

    def __str__(self) -> str:
        up = "up2" if self.upsample == 2 else ""
        parts = [f"{self.N}x{self.H}x{self.W} D{self.D} C{self.C}", self.dtype, self.layout, up, self.sweep]
        return " ".join(part for part in parts if part)

    @property
    def where(self) -> harness.Where:
        return harness.Where("vote", asdict(self), "forward", CLOCK.name)

    @property
    def votes(self) -> dict:
        """Contestants that take features and weight: fewer in sweeps."""
        found = baselines.votes(harness.device().type, self.upsample, self.layout)
        if self.sweep:
            names = [*baselines.kernels(found), baselines.MATMUL, baselines.MATMUL_ARGMAX]
            return {name: found[name] for name in names}
        return found

    @property
    def names(self) -> list[str]:
        alone = not self.sweep and self.upsample == 1
        return [*self.votes, *([baselines.ARGMAX] if alone else [])]


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
    cases += [Case(32, 7, 7, 512, 1000, layout=layout, what=RESNET18) for layout in ("NCHW", "tokens")]
    cases += [Case(16, 7, 7, D, 1000, sweep="D") for D in (32, 128, 512, 2048)]
    cases += [Case(16, 7, 7, 256, C, sweep="C") for C in (100, 1000, 10000)]
    return cases


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
    cases = [
        *main,
        *(replace(case, layout="NCHW") for case in main),
        bf16(128, 4, 4, 512, 100, upsample=2, what=STAGE1),
        bf16(128, 8, 8, 256, 100, upsample=2, what=STAGE2),
        bf16(128, 7, 7, 2048, 1000, what=RESNET50),
        Case(256, 7, 7, 2048, 1000, "tf32", what=RESNET50),
    ]
    cases += [bf16(256, 7, 7, D, 1000, sweep="D") for D in (64, 256, 1024, 4096)]
    cases += [bf16(256, 7, 7, 1024, C, sweep="C") for C in (100, 1000, 4000, 21841)]
    return cases


def tiny_cases() -> list[Case]:
    return [
        Case(2, 2, 2, 8, 10),
        Case(2, 2, 2, 8, 10, "bfloat16", "NCHW"),
        Case(2, 2, 2, 8, 10, layout="tokens"),
        Case(2, 2, 2, 8, 10, upsample=2),
        Case(2, 2, 2, 8, 10, sweep="D"),
    ]


CASES = tiny_cases() if TINY else gpu_cases() if ON_GPU else cpu_cases()


def run(case: Case, book: harness.Book) -> harness.Result:
    dtype = harness.dtype_of(case.dtype)
    P = case.H * case.W
    size = (case.N * P + case.C) * case.D * dtype.itemsize
    inputs = [
        harness.vote_inputs(case.N, case.H, case.W, case.D, case.C, dtype, case.layout, seed)
        for seed in range(harness.copies(size))
    ]
    nbytes = size + 4 * case.N * P * case.upsample**2
    flops = 2 * case.N * P * case.D * case.C
    with torch.no_grad(), harness.precision(case.dtype):
        entries = [Entry(name, [functools.partial(f, *x) for x in inputs]) for name, f in case.votes.items()]
        if baselines.ARGMAX in case.names:
            scores = [baselines.matmul_alone(*x) for x in inputs]
            entries.append(Entry(baselines.ARGMAX, [functools.partial(torch.argmax, s, 1) for s in scores]))
        return book.race(
            case.where,
            entries,
            CLOCK,
            nbytes,
            flops,
            ours=[name for name in case.votes if name.startswith("zipfls_cuda")],
            seconds=0.8 if case.sweep else 1.5,
            memory=not case.sweep,
        )


@pytest.mark.parametrize(
    "case,name", [pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in case.names]
)
def bench_vote(case: Case, name: str, report) -> None:
    report(case.where, case.names, name, functools.partial(run, case))
