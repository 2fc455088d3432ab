"""Losses whose label is a row of a table that training fills: a row a sample, or a row a class."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..reference import accumulation_dtype
from .distillation import DistillationModule, ScheduledModule


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class PSKDLoss(ScheduledModule):
    """Progressive self-distillation: CE with the label (1 - a) onehot + a P_i, P_i the last prediction of i.

    a = alpha (epoch + 1) / epochs, at most alpha: call ``set_epoch`` at the start of every epoch. The softmax
    of the logits replaces P_i. In the first epoch, and at a sample's first visit, the label is the one-hot.
    In eval mode, and where no gradient is recorded, the loss is the cross-entropy and nothing is stored. On
    ImageNet alpha is 0.3. Cost a step: rows of the store, read where they are and written, and a softmax; the
    store takes M C numbers (5.1 GB in float32 for ImageNet, half in bfloat16).

    The store may be on the CPU beside logits on a GPU: with ``index`` on the CPU too it is read without
    synchronising, and written at the next call (or set_epoch, state_dict, a copy). Under DDP every rank keeps
    the whole store, and gathers the predictions of all ranks, whose batches must have the same size, as
    DistributedSampler's do. A sample that is twice in a step is stored once, as either of the two.

    Args:
        num_samples: M >= 1. num_classes: C >= 2.
        alpha: in [0, 1].
        epochs: > 0, of the whole training.
        dtype: of the store, any float type.
        device: of the store; None is the default device. ``criterion.to`` moves it.
        ignore_index, reduction, backend: as in ``distillation_loss``.

    Raises:
        RuntimeError: in training mode ``set_epoch`` was never called.
        IndexError: an index outside [0, M), on the CPU (on other devices that sample's loss is NaN).
        ValueError: a store on a device that cannot serve the logits.

    Example:
        >>> criterion = zls.methods.PSKDLoss(num_samples=100, num_classes=4)
        >>> criterion.set_epoch(0)
        >>> logits, index = torch.zeros(2, 4, requires_grad=True), torch.tensor([7, 50])
        >>> criterion(logits, index, torch.tensor([0, 3]))
        tensor(1.3863, grad_fn=<...>)
        >>> criterion.past[7]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])

    Source: Kim et al., ICCV 2021; the authors' code.
    """

    past: Tensor  # (M, C), 0 where a sample was not visited

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        alpha: float = 0.8,
        epochs: float = 300,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(ignore_index, reduction, backend, alpha=alpha, epochs=epochs)
        self.alpha = checks.number("alpha", alpha, 0.0, 1.0)
        if self.epochs <= 0:
            raise ValueError(f"epochs must be > 0, got {epochs!r}")
        self.num_samples = checks.count("num_samples", num_samples, 1)
        self.num_classes = checks.num_classes(num_classes)
        self._settings = ("num_samples", "num_classes", *self._settings)
        if dtype not in checks.FLOATS:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        self.register_buffer(
            "past", torch.zeros(self.num_samples, self.num_classes, dtype=dtype, device=device)
        )
        self._late: tuple[Tensor, Tensor, torch.cuda.Event] | None = None
        self.register_state_dict_pre_hook(_before_state_dict)

    def forward(self, logits: Tensor, index: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, C), index (N,) int64 of the samples in [0, M), and target (N,)."""
        if not (self.training and torch.is_grad_enabled()):
            return self.loss(logits, logits, target, ce_weight=1.0)
        self._write_late_rows()
        checks.table("past", self.past, logits, self.num_classes, or_cpu=True)
        checks.rows_of_table(index, self.past, logits)
        epoch = self.epoch_on(logits.device, "epochs")
        a = self.alpha * ((epoch + 1) / self.epochs).clamp(max=1)
        dtype = accumulation_dtype(logits.dtype)
        a = torch.where(epoch == 0, 0, a).to(dtype)
        weights = torch.stack([1 - a, a]).expand(len(logits), 2)  # a row of 0 leaves a to the one-hot
        past, rows = self.past, index.to(self.past.device)
        if past.device != logits.device:
            past, rows = self._gathered(rows, logits.device), None
        elif past.device.type == "cpu":  # elsewhere the operator makes NaN of an index outside
            rows, inside = self._checked(rows)
            weights = weights if inside is None else weights.where(inside, torch.nan)
        loss = self.loss(
            logits, past, target, ce_weight=1.0, kd_weight=1.0, form="probabilities", sample_weight=weights,
            teacher_index=rows,
        )  # fmt: skip
        # Not by the kernel that reads the rows: of a sample that is twice in the batch it would race.
        self._store(index, logits.detach().to(dtype).softmax(1))
        return loss

    def _gathered(self, index: Tensor, device: torch.device) -> Tensor:
        """(N, C) rows of a store on the CPU on another device, NaN where the index is outside."""
        index, inside = self._checked(index)
        rows = self.past.index_select(0, index)
        if inside is not None:
            rows = rows.masked_fill(~inside, torch.nan)
        return rows.pin_memory().to(device, non_blocking=True)

    def _checked(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """An index of the store, and where it was inside (N, 1); None if checks.rows_of_table has looked."""
        if index.device.type == "cpu" and not torch.compiler.is_compiling():
            return index, None
        inside = (index >= 0) & (index < self.num_samples)
        return index.clamp(0, self.num_samples - 1), inside[:, None]

    @torch.no_grad()
    def _store(self, index: Tensor, p: Tensor) -> None:
        """Writes the rows of all ranks; from a GPU to a store on the CPU later, without waiting for them."""
        if (ranks := _world_size()) > 1:
            mine, p = p, p.new_empty(ranks * len(p), p.shape[1])
            index_of_mine, index = index.to(p.device), index.new_empty(ranks * len(index), device=p.device)
            dist.all_gather_into_tensor(p, mine)
            dist.all_gather_into_tensor(index, index_of_mine)
        device = self.past.device
        rows = p.to(self.past.dtype).to(device, non_blocking=True)
        self._late = index.to(device, non_blocking=True), rows, None
        if p.device == device:
            self._write_late_rows()
        else:
            copied = torch.cuda.Event()
            copied.record()
            self._late = *self._late[:2], copied

    @torch.no_grad()
    def _write_late_rows(self) -> None:
        """What the last step left to be written."""
        if self._late is None:
            return
        (index, rows, copied), self._late = self._late, None
        if copied is not None:
            copied.synchronize()
        index, inside = self._checked(index)
        if inside is not None:
            rows = torch.where(inside, rows, self.past.index_select(0, index))
        self.past.index_copy_(0, index, rows)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that starts, from 0."""
        self._write_late_rows()
        super().set_epoch(epoch)

    def __getstate__(self) -> dict[str, object]:
        """For copies and pickles."""
        self._write_late_rows()
        return self.__dict__.copy()


def _before_state_dict(module: PSKDLoss, *_: object) -> None:
    module._write_late_rows()


class OLSLoss(DistillationModule):
    """Online label smoothing: hard_weight CE + soft_weight (-sum_c S_{y,c} log p_c), S learnt in training.

    Row k of S is the mean softmax of the last epoch's samples of class k that were classified right, 1 / C if
    there were none. Call ``end_epoch()`` at the end of every epoch. The code for fine-grained sets has
    weights 1 and 1; that for CIFAR-100 has S = 0 in the first epoch, and the others 1 / C, as here. Samples
    are counted in training mode where a gradient is recorded; otherwise S serves unchanged. Under DDP
    ``end_epoch`` adds what all ranks have counted: call it on each, and keep the criterion out of the wrapped
    model, whose buffers DDP overwrites. Cost a step: a row of S a sample, read where it is, and a softmax; S
    and the next S take 2 C^2 numbers (8 MB at C = 1000, 0.8 GB at C = 10000).

    Args:
        num_classes: C >= 2.
        hard_weight, soft_weight: finite.
        ignore_index, reduction, backend: as in ``distillation_loss``.

    Raises:
        ValueError: the criterion is on another device than the logits.

    Example:
        >>> criterion = zls.methods.OLSLoss(num_classes=4)
        >>> logits = torch.tensor([[2.0, 1.0, 0.0, 0.0]], requires_grad=True)
        >>> criterion(logits, torch.tensor([0]))
        tensor(1.1188, grad_fn=<...>)
        >>> criterion.end_epoch()
        >>> criterion.label_matrix[0]
        tensor([0.6103, 0.2245, 0.0826, 0.0826])

    Source: Zhang et al., IEEE TIP 2021; the authors' code.
    """

    label_matrix: Tensor  # (C, C) S
    sums: Tensor  # (C, C) of this epoch's predictions, by class
    counts: Tensor  # (C,)

    def __init__(
        self,
        num_classes: int,
        hard_weight: float = 0.5,
        soft_weight: float = 0.5,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        settings = {"hard_weight": hard_weight, "soft_weight": soft_weight}
        super().__init__(ignore_index, reduction, backend, **settings)
        self.num_classes = C = checks.num_classes(num_classes)
        self._settings = ("num_classes", *self._settings)
        self.register_buffer("label_matrix", torch.full((C, C), 1 / C))
        self.register_buffer("sums", torch.zeros(C, C))
        self.register_buffer("counts", torch.zeros(C))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, C) and target (N,)."""
        checks.table("label_matrix", self.label_matrix, logits, self.num_classes)
        target, counted = checks.target_of_methods(logits, target, self.ignore_index)
        y = target.clamp(0, self.num_classes - 1)
        loss = self.loss(
            logits, self.label_matrix, target, ce_weight=self.hard_weight, kd_weight=self.soft_weight,
            form="probabilities", teacher_index=y,
        )  # fmt: skip
        if self.training and torch.is_grad_enabled():
            self._count(logits.detach(), y, counted & (target == y))
        return loss

    @torch.no_grad()
    def _count(self, logits: Tensor, y: Tensor, counted: Tensor) -> None:
        right = counted & (logits.argmax(1) == y)
        p = logits.to(self.sums.dtype).softmax(1).masked_fill_(~right[:, None], 0)
        self.sums.index_put_((y,), p, accumulate=True)  # in one order, unlike index_add_ on GPUs
        self.counts.index_put_((y,), right.to(self.counts.dtype), accumulate=True)

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Makes S of what the epoch has counted, on all ranks, and starts anew."""
        if _world_size() > 1:
            dist.all_reduce(self.sums)
            dist.all_reduce(self.counts)
        counts = self.counts[:, None]
        self.label_matrix.copy_(torch.where(counts > 0, self.sums / counts, 1 / self.num_classes))
        self.sums.zero_()
        self.counts.zero_()
