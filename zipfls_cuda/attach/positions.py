"""What the probe decided, and how positions of a map vote by it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..checks import autocast_enabled
from ..functional import dense_vote

# What the probe can decide.
GLOBAL_POOLING = "global pooling"
CLASS_TOKEN = "class token"
PER_POSITION = "per-position head"

# Where the channels of a feature map are.
MAP, MAP_CHANNELS_LAST, TOKENS = "NDHW", "NHWD", "NTD"
TOKENS_LAST = "NDT"  # what a module of the head may take

# The remedy where the probe refuses.
BY_HAND = (
    "Let the map vote by hand, votes = zls.dense_vote(features, weight, bias) with the (C, D) and (C,) of a "
    "classifier, and give the votes to the criterion: criterion(logits, target, votes)"
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the probe decided: names and numbers alone, so that a copied model can follow it.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        >>> print(zls.attach(model, feature="0", classifier="3", example=torch.randn(2, 3, 16, 16)).plan)
        global pooling: 0 (8, 14, 14) -> 3
    """

    kind: str  # GLOBAL_POOLING, CLASS_TOKEN or PER_POSITION
    feature: str  # module whose output is the map
    seat: str  # module where the hook keeps it: ``feature``, or the one that takes its output as input
    side: str  # "output" or "input" of ``seat``
    layout: str  # MAP, MAP_CHANNELS_LAST or TOKENS
    shape: tuple[int, ...]  # of the map in the probe, without N
    prefix: int  # tokens at the front that do not vote
    classifier: str  # the nn.Linear, or 1x1 nn.Conv2d, that votes
    head: tuple[tuple[str, int], ...]  # modules every position goes through first, with their input's rank
    deep: tuple[tuple[str, str, int], ...]  # earlier stages that vote too: module, layout, channels
    fusion: str | None = None  # module that fuses pooled features with further tensors, such as metadata

    def __str__(self) -> str:
        through = "".join(f"{name} -> " for name, _ in self.head) + self.classifier
        text = f"{self.kind}: {self.feature} {self.shape} -> {through}"
        if self.fusion:
            text += f", each with what {self.fusion} adds to the pooled features"
        if self.prefix:
            text += f", without {self.prefix} prefix token{'s' if self.prefix > 1 else ''}"
        return text + "".join(f", deep {name} ({channels} channels)" for name, _, channels in self.deep)


def as_map(features: Tensor, layout: str, prefix: int) -> Tensor:
    """(N, D, H, W), or tokens (N, T, D) without the prefix: what dense_vote takes. A view."""
    if layout == TOKENS:
        return features[:, prefix:]
    return features.permute(0, 3, 1, 2) if layout == MAP_CHANNELS_LAST else features


def rows(features: Tensor, layout: str, prefix: int) -> Tensor:
    """(N, P, D), row-major positions. A view."""
    if layout == TOKENS:
        return features[:, prefix:]
    return features.flatten(1, 2) if layout == MAP_CHANNELS_LAST else features.flatten(2).transpose(1, 2)


def run_head(model: nn.Module, head: Sequence[tuple[str, int]], x: Tensor, layout: str) -> Tensor:
    """Rows (M, D) through the head's modules in eval mode, each row as a map of one position; (M, D').

    May overwrite ``x``.
    """
    for name, rank in head:
        module = model.get_submodule(name)
        with eval_mode(module):
            x = module(shape_for(x, rank, layout))
    return x.flatten(1)


def shape_for(x: Tensor, rank: int, layout: str) -> Tensor:
    """``x``, which holds one position per row, in the rank that a module takes."""
    if x.dim() == rank:
        return x
    x = x.flatten(1)
    if rank == 4:
        return x[:, None, None, :] if layout == MAP_CHANNELS_LAST else x[:, :, None, None]
    if rank == 3:
        return x.unsqueeze(2 if layout == TOKENS_LAST else 1)
    return x


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Dropout off and batch norm on its running statistics; flags are set one by one, train() may do more."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies every position by one matrix: an nn.Linear, or a 1x1 convolution."""
    if isinstance(module, nn.Conv2d):
        plain = (module.kernel_size, module.stride, module.padding) == ((1, 1), (1, 1), (0, 0))
        return plain and module.groups == 1
    return isinstance(module, nn.Linear)


def matrix(linear: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Weight (C, D) and bias (C,) of a module that ``is_linear``, whole where they are sharded."""
    return whole(linear.weight).flatten(1), None if linear.bias is None else whole(linear.bias)


def vote(features: Tensor, linear: nn.Linear | nn.Conv2d, upsample: int = 1) -> Tensor:
    """Votes (N, P) of features (N, D, H, W) or (N, T, D)."""
    weight, bias = matrix(linear)
    return dense_vote(cast(features, weight), weight, bias, upsample=upsample)


def cast(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the dtype of ``like``, unless autocast takes care of that."""
    return x if autocast_enabled(x) else x.to(like.dtype)


def autocast_of(x: Tensor) -> tuple[str, torch.dtype] | None:
    """Device type and dtype of the autocast that is on for the device of ``x``; None if none is."""
    kind = x.device.type
    return (kind, torch.get_autocast_dtype(kind)) if autocast_enabled(x) else None


def autocast_again(state: tuple[str, torch.dtype] | None) -> contextlib.AbstractContextManager:
    """Autocast as ``autocast_of`` found it, if it has ended since.

    accelerate, and with it Hugging Face's Trainer, puts autocast inside ``model.forward``: its modules run
    under autocast, the model's own hooks do not.
    """
    if state is None or torch.is_autocast_enabled(state[0]):
        return contextlib.nullcontext()
    return torch.autocast(*state)


def whole(weight: Tensor) -> Tensor:
    """A sharded weight (a DTensor, as FSDP2 makes them) gathered: its local part must not vote for all."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
