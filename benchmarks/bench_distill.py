"""Distillation from a teacher's logits, KD and DKD at T = 4, value and gradient, against its peers.

The least any implementation moves is both rows once and the gradient once: 3 N C itemsize bytes. Losses take
(logits, teacher, target, votes); only ``zipf_cross_entropy``, our loss without a teacher, looks at the votes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import baselines
import clock
import torch
import torch.nn.functional as F
from baselines import Loss
from bench_loss import entries
from clock import TINY
from records import Records, Where
from torch import Tensor

import zipfls_cuda as zls

ON_GPU = clock.device().type == "cuda"
T = 4.0
# Options of distillation_loss: the authors' on CIFAR-100.
METHODS = {"KD": {"ce_weight": 0.1, "kd_weight": 0.9}, "DKD": {"tckd_weight": 1.0, "nckd_weight": 8.0}}
kl_div = functools.partial(F.kl_div, reduction="batchmean", log_target=True)  # KL(q || p) of log p, log q


def kd(divergence: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """KD (Hinton et al.) as one would write it in PyTorch, over some ``kl_div``."""

    def loss(logits: Tensor, teacher: Tensor, target: Tensor, votes: Tensor) -> Tensor:
        z, t = logits.float(), teacher.float()
        kl = divergence((z / T).log_softmax(1), (t / T).log_softmax(1))
        return 0.1 * F.cross_entropy(z, target) + 0.9 * T**2 * kl

    return loss


def plain_dkd(logits: Tensor, teacher: Tensor, target: Tensor, votes: Tensor) -> Tensor:
    """DKD (Zhao et al., Eq. 7); as in the authors' code a large number takes the target out of a softmax."""
    z, t, y = logits.float(), teacher.float(), target[:, None]
    of_target = ((x / T).softmax(1).gather(1, y) for x in (z, t))
    tckd = kl_div(*(torch.cat([p, 1 - p], 1).log() for p in of_target))
    nckd = kl_div(*((x / T).scatter(1, y, -1000.0).log_softmax(1) for x in (z, t)))
    return F.cross_entropy(z, target) + T**2 * (tckd + 8.0 * nckd)


def losses(method: str, device: str, tiny: bool = False) -> dict[str, Loss]:
    """All ways to compute a method that run on a device type here, ours first, by name."""
    found, backends, options = {}, baselines.our_backends(device), METHODS[method] | {"temperature": T}
    for b in [b for b in backends if b != "reference"] or backends:
        ours = lambda z, t, y, votes, b=b: zls.distillation_loss(z, t, y, backend=b, **options)  # noqa: E731
        found[baselines.ours(b)] = Loss(ours)
    found[baselines.PLAIN_LOSS] = Loss(lambda z, t, *rest: zls.zipf_cross_entropy(z, *rest, zipf_weight=1.0))
    plain = {"KD": kd(kl_div), "DKD": plain_dkd}[method]
    found[baselines.REFERENCE] = Loss(plain)
    found[baselines.COMPILED_REFERENCE] = Loss(baselines.compiled(plain, tiny))
    if (method, device) == ("KD", "cuda"):
        with baselines.using("liger_kernel"):
            from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

            liger_kl = LigerKLDIVLoss(reduction="batchmean", log_target=True)
            found[baselines.LIGER_KL] = Loss(kd(liger_kl), sync=True)
            found[baselines.LIGER_JSD] = Loss(kd(LigerJSD(beta=0.0)), sync=True)  # at 0 it is the KL too
    return found


@dataclass(frozen=True)
class Case:
    """A method and the shape of its rows."""

    method: str
    N: int
    C: int
    P: int = 49
    dtype: str = "float32"

    @property
    def names(self) -> list[str]:
        compiled = self.dtype == ("bfloat16" if ON_GPU else "float32")  # takes long: in one dtype alone
        found = losses(self.method, clock.device().type)
        return [name for name in found if compiled or name != baselines.COMPILED_REFERENCE]

    @property
    def where(self) -> Where:
        return Where("distill", asdict(self), "both", clock.best_clock().name)

    def run(self, records: Records) -> clock.Comparison:
        torch.compiler.reset()
        dtype, inputs = getattr(torch, self.dtype), []
        nbytes = 3 * dtype.itemsize * self.N * self.C
        for seed in range(clock.copies(nbytes)):
            logits, *rest = baselines.loss_inputs(self.N, self.C, self.P, dtype, seed)
            teacher, *_ = baselines.loss_inputs(self.N, self.C, 1, dtype, -1 - seed)
            inputs.append((logits, teacher.detach(), *rest))
        made = entries(self.names, losses(self.method, clock.device().type, TINY), inputs)
        return records.compare(self.where, made, clock.best_clock(), nbytes, seconds=2.5, memory=True)


def cases(on_gpu: bool) -> list[Case]:
    shapes = (
        [(8192, 10000), (256, 1000), (2048, 131072)] if on_gpu else [(256, 1000), (256, 10000), (64, 131072)]
    )
    dtypes = ["bfloat16"] if on_gpu else ["float32", "bfloat16"]
    return [Case(m, N, C, dtype=dtype) for dtype in dtypes for N, C in shapes for m in METHODS]


CASES = [Case(m, 4, 10, dtype=d) for d in ("float32", "bfloat16") for m in METHODS] if TINY else cases(ON_GPU)
