"""The stages in Triton: ``backend="triton"``, on NVIDIA GPUs from sm_80 up, or interpreted on the CPU.

One file per stage, each with its kernels, their tuning and their launchers. ``make kernel-report`` compiles
all of them ahead of time. No kernel here has run on a GPU yet.
"""

from .label import label_fwd, rank_fwd
from .loss import loss_bwd, loss_bwd_, loss_fwd, loss_grad_
from .soft_loss import soft_loss_fwd, soft_loss_grad_
from .vote import vote_fwd

__all__ = [
    "label_fwd",
    "loss_bwd",
    "loss_bwd_",
    "loss_fwd",
    "loss_grad_",
    "rank_fwd",
    "soft_loss_fwd",
    "soft_loss_grad_",
    "vote_fwd",
]
