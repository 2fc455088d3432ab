"""The stages in Triton: ``backend="triton"``, on NVIDIA GPUs from sm_80 up, or interpreted on the CPU.

One file per stage, each with its kernels, their tuning and their launchers. ``make kernel-report`` compiles
all of them ahead of time. No kernel here has run on a GPU yet.
"""

from torch import Tensor

from . import loss as _loss
from . import soft_loss as _soft_loss
from .label import label_fwd, rank_fwd
from .loss import loss_bwd, loss_bwd_
from .vote import vote_fwd


def loss_fwd(logits: Tensor, target: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See reference.loss_fwd; a row with a target or vote out of range becomes NaN."""
    if target.dim() == 1:
        return _loss.loss_fwd(logits, target, *args)
    *options, _ignore_index, reduction, with_grad = args
    return _soft_loss.soft_loss_fwd(logits, target, *options, reduction, with_grad)


def loss_grad_(logits: Tensor, target: Tensor, *args) -> Tensor:
    """See reference.loss_grad_."""
    if target.dim() == 1:
        return _loss.loss_grad_(logits, target, *args)
    *options, _ignore_index, reduction = args
    return _soft_loss.soft_loss_grad_(logits, target, *options, reduction)


__all__ = [
    "label_fwd",
    "loss_bwd",
    "loss_bwd_",
    "loss_fwd",
    "loss_grad_",
    "rank_fwd",
    "vote_fwd",
]
