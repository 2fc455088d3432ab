"""A whole training step with different losses, and the classifier head alone.

On a GPU: ResNet-50 on synthetic 224x224 images, batch 256, bfloat16 autocast, channels_last, C = 1000 and
10000. On a CPU: the same network, narrow and shallow, on 32x32 images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import baselines
import clock
import torch
import torch.nn.functional as F
from clock import TINY, Entry
from records import Records, Where
from sources import installed
from torch import Tensor, nn

import zipfls_cuda as zls

ON_GPU = clock.device().type == "cuda"
CLOCK = clock.best_clock()


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; ``width`` channels inside, four times as many out."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.path = nn.Sequential(
            *_conv(channels, width, 1), nn.ReLU(True),
            *_conv(width, width, 3, stride), nn.ReLU(True),
            *_conv(width, 4 * width, 1),
        )  # fmt: skip
        same = stride == 1 and channels == 4 * width
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(channels, 4 * width, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.path(x) + self.shortcut(x))


def _conv(channels: int, out: int, size: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(channels, out, size, stride, size // 2, bias=False), nn.BatchNorm2d(out)


def resnet(blocks: tuple[int, ...], width: int, small_images: bool = False) -> nn.Sequential:
    """A bottleneck ResNet up to its last map (N, D, H, W); (3, 4, 6, 3) and width 64: ResNet-50."""
    stem = _conv(3, width, 3) if small_images else _conv(3, width, 7, 2)
    layers = [*stem, nn.ReLU(True), *([] if small_images else [nn.MaxPool2d(3, 2, 1)])]
    channels = width
    for stage, count in enumerate(blocks):
        for i in range(count):
            layers.append(Bottleneck(channels, width << stage, 2 if i == 0 and stage > 0 else 1))
            channels = 4 * width << stage
    return nn.Sequential(*layers)


def criteria() -> dict[str, Callable[[Tensor, nn.Linear, Tensor], Tensor]]:
    """What a step ends with, ours as a training script calls it: (features, classifier, target) -> loss."""

    def made(loss: Callable, vote: Callable | None = None) -> Callable:
        def criterion(features: Tensor, fc: nn.Linear, target: Tensor) -> Tensor:
            with torch.no_grad():
                votes = vote(features, fc.weight, fc.bias) if vote else None
            return loss(fc(features.mean((2, 3))), target, votes)

        return criterion

    found = {}
    for b in baselines.our_backends(clock.device().type):
        zipf = functools.partial(zls.zipf_cross_entropy, zipf_weight=1.0, backend=b)
        found[baselines.ours(b)] = made(zipf, functools.partial(zls.dense_vote, backend=b))
    found[baselines.CROSS_ENTROPY] = made(baselines.cross_entropy)
    found[baselines.SMOOTHING] = made(lambda x, y, votes: F.cross_entropy(x, y, label_smoothing=0.1))
    if installed("scipy"):
        dense = lambda x, *fc: F.linear(x.permute(0, 2, 3, 1), *fc).argmax(-1).flatten(1)  # noqa: E731
        found[baselines.PUBLISHED] = made(baselines.published_zipf, dense)
    return found


NAMES = list(criteria())
HEADS = baselines.heads(clock.device().type)


@dataclass(frozen=True)
class Case:
    """A network, its images and its classes."""

    N: int
    C: int
    size: int
    blocks: tuple[int, ...]
    width: int
    dtype: str
    what: str = ""

    names = NAMES

    @property
    def where(self) -> Where:
        return Where("step", {**asdict(self), "compiled": False}, "step", CLOCK.name)

    def run(self, records: Records) -> clock.Comparison:
        device, dtype = clock.device(), getattr(torch, self.dtype)
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(0)
        model = resnet(self.blocks, self.width, self.size <= 64)
        model = model.to(device, memory_format=torch.channels_last)
        fc = nn.Linear(4 * self.width << len(self.blocks) - 1, self.C).to(device)
        parameters = [*model.parameters(), *fc.parameters()]
        optimizer = torch.optim.SGD(parameters, 1e-3, momentum=0.9, foreach=True)
        drawn = baselines.seeded(0)
        images = torch.randn(self.N, 3, self.size, self.size, **drawn)
        images = images.contiguous(memory_format=torch.channels_last)
        target = torch.randint(self.C, (self.N,), **drawn)

        def step(criterion: Callable) -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = criterion(model(images), fc, target)
            loss.backward()
            optimizer.step()

        clear, waits = optimizer.zero_grad, {baselines.PUBLISHED}
        entries = [
            Entry(name, [functools.partial(step, f)], waits=name in waits, deep=True, clear=clear)
            for name, f in criteria().items()
        ]
        seconds = 30.0 if ON_GPU else 10.0
        return records.compare(self.where, entries, CLOCK, seconds=seconds, memory=True)


@dataclass(frozen=True)
class Head:
    """A feature map and its classes."""

    N: int
    H: int
    D: int
    C: int
    dtype: str

    names = tuple(HEADS)

    @property
    def where(self) -> Where:
        return Where("head", asdict(self), "both", CLOCK.name)

    def run(self, records: Records) -> clock.Comparison:
        shape = self.N, self.H, self.H, self.D, self.C
        made = baselines.vote_inputs(*shape, getattr(torch, self.dtype), "channels_last")
        features, weight = (x.requires_grad_() for x in made)
        target = torch.randint(self.C, (self.N,), **baselines.seeded(1))

        def clear() -> None:
            features.grad = weight.grad = None

        def both(head: Callable) -> None:
            clear()
            head(features, weight, target).backward()

        entries = [Entry(name, [functools.partial(both, f)], clear=clear) for name, f in HEADS.items()]
        return records.compare(self.where, entries, CLOCK, seconds=2.0, memory=True)


if TINY:  # 8 channels: MIN_WIDTH of experiments/model.py
    CASES = [Case(2, 5, 16, (1, 1), 8, "float32", what="tiny"), Head(2, 2, 8, 10, "float32")]
elif ON_GPU:
    resnet50 = functools.partial(Case, 256, size=224, blocks=(3, 4, 6, 3), width=64, dtype="bfloat16")
    CASES = [resnet50(C=C, what="ResNet-50") for C in (1000, 10000)]
    CASES += [Head(256, 7, 2048, C, "bfloat16") for C in (1000, 10000)]
else:
    small = Case(32, 100, 32, (1, 1, 1), 16, "float32", what="small ResNet")
    CASES = [small, Head(64, 7, 512, 1000, "float32")]
