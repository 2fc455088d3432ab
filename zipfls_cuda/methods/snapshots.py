"""Copies of a network kept along its training, for MrKD and born-again networks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .. import checks


class SnapshotTeacher(nn.Module):
    """Frozen copies of a model in training, one taken every few epochs, the oldest replaced by the newest.

    Call ``step()`` at the end of every epoch. ``teacher(x)`` is the list of the copies' logits, oldest first,
    in eval mode and without gradient; empty before the first copy. The memory of all copies is taken at once.
    The state_dict holds copies and epochs, so training resumes exactly; the model is not part of it.

    Works under DDP (pass either the model or its wrapper): each rank copies its replica. FSDP2 is refused by
    name, as its parameters are shards.

    Args:
        model: what is copied. It returns logits, or an object with ``.logits``.
        every: epochs from one copy to the next, >= 1.
        copies: how many are kept, >= 1.

    Raises:
        TypeError, ValueError: a bad argument, by name; parameters that are DTensors.

    Example:
        >>> model = torch.nn.Linear(3, 4)
        >>> teacher = zls.methods.SnapshotTeacher(model, every=10, copies=2)
        >>> for epoch in range(20):
        ...     logits = teacher(torch.zeros(8, 3))  # beside the batch's step
        ...     teacher.step()
        >>> [x.shape for x in teacher(torch.zeros(8, 3))]
        [torch.Size([8, 4]), torch.Size([8, 4])]

    Source: Wang et al., arXiv 2009.05226; Furlanello et al., ICML 2018.
    """

    def __init__(self, model: nn.Module, *, every: int, copies: int = 1) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        model = _unwrapped(model)
        if any(checks.is_dtensor(x) for x in _tensors(model)):
            raise TypeError(
                "model has parameters that are DTensors (FSDP2), of which a copy would be a shard"
            )
        self.every, copies = checks.count("every", every, 1), checks.count("copies", copies, 1)
        self._model = [model]  # in a list: not a submodule
        self.copies = nn.ModuleList(copy.deepcopy(model) for _ in range(copies))
        self.copies.requires_grad_(False).eval()
        self.epochs = 0

    @torch.no_grad()
    def step(self) -> None:
        """Ends an epoch: after every ``every``-th the model's weights replace the oldest copy's."""
        self.epochs += 1
        taken, rest = divmod(self.epochs, self.every)
        if rest == 0:
            oldest = self.copies[(taken - 1) % len(self.copies)]
            for mine, theirs in zip(_tensors(oldest), _tensors(self._model[0]), strict=True):
                mine.copy_(theirs)

    def forward(self, *args: object, **options: object) -> list[Tensor]:
        """Logits of every copy, oldest first; the arguments are the model's."""
        taken = self.epochs // self.every
        kept = [self.copies[i % len(self.copies)] for i in range(max(0, taken - len(self.copies)), taken)]
        with torch.no_grad():
            outputs = [model(*args, **options) for model in kept]
        return [x if isinstance(x, Tensor) else x.logits for x in outputs]

    def train(self, mode: bool = True) -> SnapshotTeacher:
        """As nn.Module.train; the copies stay in eval mode."""
        super().train(mode)
        self.copies.eval()
        return self

    def get_extra_state(self) -> dict[str, int]:
        """What state_dict holds beside the copies."""
        return {"epochs": self.epochs}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """From load_state_dict."""
        self.epochs = state["epochs"]


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DDP and torch.compile."""
    while True:
        inner = model._modules.get("_orig_mod")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, in one order."""
    return itertools.chain(model.parameters(), model.buffers())
