"""The stages in Triton: ``backend="triton"``, on NVIDIA GPUs from sm_80 up, or interpreted on the CPU.

A file per stage, each with its kernels, their tuning and their launchers; the loss has several: see loss.py.
``make kernel-report`` compiles every kernel ahead of time.
"""

from .label import label_fwd, rank_fwd
from .loss import loss_bwd, loss_bwd_, loss_fwd, loss_grad_
from .vote import vote_fwd

__all__ = [
    "label_fwd",
    "loss_bwd",
    "loss_bwd_",
    "loss_fwd",
    "loss_grad_",
    "rank_fwd",
    "vote_fwd",
]
