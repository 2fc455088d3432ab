"""The stages in Triton: ``backend="triton"``, on NVIDIA GPUs from sm_80 up, or interpreted on the CPU.

A file per stage, each with its kernels, their tuning and their launchers; the losses have several: see
loss.py and distill.py. ``make kernel-report`` compiles every kernel ahead of time.
"""

from .distill import distill_fwd, distill_grad_
from .label import label_fwd, rank_fwd
from .loss import loss_bwd, loss_bwd_, loss_factors_fwd, loss_fwd, loss_grad_
from .loss_factors import loss_factors_bwd_
from .vote import vote_fwd

__all__ = [
    "distill_fwd",
    "distill_grad_",
    "label_fwd",
    "loss_bwd",
    "loss_bwd_",
    "loss_factors_bwd_",
    "loss_factors_fwd",
    "loss_fwd",
    "loss_grad_",
    "rank_fwd",
    "vote_fwd",
]
