"""Losses whose label is made from the target, the logits or the batch, without a teacher."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, functional
from ..reference import accumulation_dtype
from .distillation import DistillationModule, ScheduledModule


class TfKDRegLoss(DistillationModule):
    """Teacher-free regularisation: (1 - alpha) CE + alpha multiplier KL(d || p) / C, d a designed teacher.

    d is the softmax over T of the probabilities 0.99 at the target and 0.01 / (C - 1) elsewhere, p that of
    the logits at T = 1: the authors say that this worked on CIFAR-100; the paper has p over T too. The whole
    is one cross-entropy with label smoothing less a constant. The code takes the mean over N C numbers, hence
    the 1 / C and the multiplier. The defaults are ResNet18's on CIFAR-100; (0.95, 40, 1) is MobileNetV2's,
    (0.95, 10, 1) ShuffleNetV2's, (0.1, 40, 50) GoogLeNet's. Cost a step: none.

    Args:
        alpha: in [0, 1].
        temperature: T > 0.
        multiplier: >= 0.
        ignore_index, reduction, backend: as in ``distillation_loss``.

    Example:
        >>> criterion = zls.methods.TfKDRegLoss()
        >>> criterion(torch.zeros(1, 4, requires_grad=True), torch.tensor([0]))
        tensor(1.2482, grad_fn=<...>)

    Source: Yuan et al., CVPR 2020; the authors' code.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        temperature: float = 20.0,
        multiplier: float = 100.0,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(ignore_index, reduction, backend, alpha=alpha, temperature=temperature)
        self.alpha = checks.number("alpha", alpha, 0.0, 1.0)
        self.multiplier = checks.number("multiplier", multiplier, 0.0)
        self._settings += ("multiplier",)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, C) and target (N,)."""
        C = max(logits.shape[-1], 2)
        weight = self.alpha * self.multiplier / C  # of KL(d || p) = CE(d) - entropy
        ahead = (0.99 - 0.01 / (C - 1)) / self.temperature
        log_sum = math.log(math.exp(ahead) + C - 1) if ahead < 700 else ahead
        rest = math.exp(-log_sum)  # d_c
        at_target = math.exp(ahead - log_sum)  # d_y
        constant = weight * (log_sum - at_target * ahead)
        scale = 1 - self.alpha + weight  # the label's sum
        smoothing = min(C * weight * rest / scale, 1.0) if scale > 0 else 0.0
        loss = functional.cross_entropy(
            logits, target, scale=scale, label_smoothing=smoothing,
            ignore_index=self.ignore_index, reduction=self.reduction, backend=self.backend,
        )  # fmt: skip
        if self.reduction == "mean":
            return loss - constant
        counted = (target != self.ignore_index).to(loss.dtype)
        return loss - constant * (counted if self.reduction == "none" else counted.sum())


class LsrKDLoss(DistillationModule):
    """Label smoothing as distillation: (1 - alpha) CE + alpha T^2 KL(q || p), p at T, q uniform.

    With ``target_share`` q has that share at the target and the rest evenly elsewhere (teacher correction).
    No code is published, and the constants are not confirmed: they have no defaults. Cost a step: none;
    teacher correction writes and reads a row of teacher's logits a sample.

    Args:
        alpha: finite, the share of the uniform teacher.
        temperature: T > 0.
        target_share: in (0, 1), or None for 1 / C.
        ignore_index, reduction, backend: as in ``distillation_loss``.

    Example:
        >>> criterion = zls.methods.LsrKDLoss(alpha=0.5, temperature=4.0, target_share=0.4)
        >>> criterion(torch.zeros(1, 4, requires_grad=True), torch.tensor([0]))
        tensor(1.1261, grad_fn=<...>)

    Source: Wang et al., arXiv 2009.05226.
    """

    def __init__(
        self,
        alpha: float,
        temperature: float,
        target_share: float | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(ignore_index, reduction, backend, alpha=alpha, temperature=temperature)
        if target_share is not None:
            target_share = checks.number("target_share", target_share)
            if not 0 < target_share < 1:
                raise ValueError(f"target_share must be in (0, 1), or None, got {target_share!r}")
        self.target_share = target_share
        self._settings += ("target_share",)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, C) and target (N,)."""
        if self.target_share is None:
            teacher = logits.new_zeros(logits.shape[-1:]).expand(logits.shape)  # in the memory of one row
        else:
            target = checks.target_of_methods(logits, target, self.ignore_index)[0]
            r, C = self.target_share, logits.shape[1]
            ahead = self.temperature * (math.log(r / (1 - r)) + math.log(C - 1))
            dtype = accumulation_dtype(logits.dtype)
            teacher = logits.new_zeros(logits.shape, dtype=dtype)
            teacher.scatter_(1, target.clamp(0, C - 1)[:, None], ahead)
        return self.loss(
            logits, teacher, target,
            ce_weight=1 - self.alpha, kd_weight=self.alpha, temperature=self.temperature,
        )  # fmt: skip


class MaxSupLoss(ScheduledModule):
    """Max suppression: CE + l (max_c z_c - mean_c z_c), l growing linearly from ``start`` by the epoch.

    That is label smoothing by l, (1 - l) CE + l (-mean_c log p_c), plus l (max_c z_c - z_y): the smoothing
    alone where the target has the largest logit, the lowest class of equal ones. l = start + (end - start)
    epoch / epochs; in eval mode it is ``end``. Cost a step: none.

    Args:
        start, end: finite; where they are equal ``set_epoch`` is not needed.
        epochs: > 0.
        ignore_index, reduction, backend: as in ``distillation_loss``.

    Raises:
        RuntimeError: in training mode ``set_epoch`` was never called.

    Example:
        >>> criterion = zls.methods.MaxSupLoss()
        >>> criterion.set_epoch(0)
        >>> criterion(torch.tensor([[1.0, 0.0, 0.0, 0.0]], requires_grad=True), torch.tensor([0]))
        tensor(0.8187, grad_fn=<...>)

    Source: Zhou et al., NeurIPS 2025; the authors' code.
    """

    def __init__(
        self,
        start: float = 0.1,
        end: float = 0.2,
        epochs: float = 90,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(ignore_index, reduction, backend, start=start, end=end, epochs=epochs)
        if self.epochs <= 0:
            raise ValueError(f"epochs must be > 0, got {epochs!r}")

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, C) and target (N,)."""
        target = checks.target_of_methods(logits, target, self.ignore_index)[0]
        dtype = accumulation_dtype(logits.dtype)
        rest, share, weights = 1 - self.end, self.end, None
        if self.training and self.start != self.end:
            epoch = self.epoch_on(logits.device, "epochs", ", or give start and end the same value")
            share = (self.start + (self.end - self.start) * epoch / self.epochs).to(dtype)
            weights = torch.stack([1 - share, share]).expand(*logits.shape[:1], 2)
            rest = share = 1.0
        return self.loss(
            logits, _even_rows(logits, dtype), target, ce_weight=rest, kd_weight=share, max_weight=share,
            form="probabilities", sample_weight=weights,
        )  # fmt: skip


def _even_rows(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Probabilities 1 / C in the shape of the logits, in the memory of one row."""
    return logits.new_full(logits.shape[-1:], 1 / max(logits.shape[-1], 1), dtype=dtype).expand(logits.shape)


class BAKELoss(DistillationModule):
    """Batch knowledge ensembling: ce_weight CE + T^2 KL(Q || p), Q made of the batch's own predictions.

    Q = (1 - omega) (I - omega A)^-1 p without gradient, A the softmax over the other samples of the products
    of normalised features. The authors' omega is 0.5 to 0.9. (The Zipf authors' trainer detaches the logits,
    and so trains by cross-entropy alone.) Under DDP each rank's batch is its own. Cost a step: an N x N
    product and solution, and Q written and read.

    Args:
        temperature: T > 0.
        omega: in [0, 1), the share of the other samples.
        ce_weight: finite.
        ignore_index, reduction, backend: as in ``distillation_loss``. Ignored samples still lend their
            predictions to the others.

    Example:
        >>> criterion = zls.methods.BAKELoss()
        >>> logits, features = torch.eye(3, 4), torch.ones(3, 8)
        >>> criterion(logits, features, torch.tensor([0, 1, 2]))
        tensor(0.7748)

    Source: Ge et al., arXiv 2104.13298; the authors' code.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        omega: float = 0.5,
        ce_weight: float = 1.0,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        settings = {"temperature": temperature, "omega": omega, "ce_weight": ce_weight}
        super().__init__(ignore_index, reduction, backend, **settings)
        if not 0 <= self.omega < 1:
            raise ValueError(f"omega must be in [0, 1), got {omega!r}")

    def forward(self, logits: Tensor, features: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, C), features (N, D) and target (N,)."""
        target, _ = checks.target_of_methods(logits, target, self.ignore_index)
        teacher = self.temperature * self.targets(logits, features).log()
        return self.loss(
            logits, teacher, target, ce_weight=self.ce_weight, kd_weight=1.0, temperature=self.temperature
        )

    @torch.no_grad()
    def targets(self, logits: Tensor, features: Tensor) -> Tensor:
        """Q (N, C), float32 (float64 for float64 logits)."""
        checks.features("features", features, "logits", logits)
        dtype = accumulation_dtype(logits.dtype)
        with torch.autocast(logits.device.type, enabled=False):
            h = F.normalize(features.to(dtype), dim=1)
            itself = torch.eye(len(h), dtype=torch.bool, device=h.device)
            A = (h @ h.T).masked_fill(itself, -torch.inf).softmax(1).masked_fill(itself, 0)
            p = (logits.to(dtype) / self.temperature).softmax(1)
            system = itself.to(dtype) - self.omega * A  # never singular; solve_ex does not synchronise
            return torch.linalg.solve_ex(system, (1 - self.omega) * p).result.clamp(min=0)


class USKDLoss(DistillationModule):
    """Universal self-distillation: ce_weight CE + alpha w CE + beta NCE(n) + mu LS(weak).

    w = p_y^2 + 1 - mean of p_y^2 over the batch; NCE(n) = -sum_{c != y} n_c log p^_c, n_c in proportion to
    1 / rank_c; LS(weak) is the cross-entropy, smoothed by 0.1, of ``weak_logits``, those of a linear head on
    the pooled second-last feature map, which it alone trains. Classes are ranked by
    W_c / (1 - W_y + 1e-6) + S_c / (1 - S_y + 1e-6), W the softmax of ``weak_logits``, S the logits' softmax
    (the first release, with the numbers reported since) or its logarithm (the code since July 2023). No
    gradient flows through w and n. ImageNet: the defaults; CIFAR-100: 0.1 each. The published code takes soft
    targets too; this does not. Under DDP the mean is of each rank's batch. Cost a step: two softmaxes, a
    sort, and a row of label a sample, written and read.

    Args:
        alpha, beta, mu, ce_weight: finite.
        ranking: "probabilities" or "log_probabilities".
        ignore_index, reduction, backend: as in ``distillation_loss``.

    Example:
        >>> criterion = zls.methods.USKDLoss()
        >>> logits, weak_logits = torch.tensor([[2.0, 1.0, 0.0, 0.0]], requires_grad=True), torch.zeros(1, 4)
        >>> criterion(logits, weak_logits, torch.tensor([0]))
        tensor(1.1035, grad_fn=<...>)

    Source: Yang et al., ICCV 2023; cls_KD's code.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
        ranking: str = "probabilities",
        ce_weight: float = 1.0,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        settings = {"alpha": alpha, "beta": beta, "mu": mu, "ce_weight": ce_weight}
        super().__init__(ignore_index, reduction, backend, **settings)
        if ranking not in ("probabilities", "log_probabilities"):
            raise ValueError(f"ranking must be 'probabilities' or 'log_probabilities', got {ranking!r}")
        self.ranking = ranking
        self._settings += ("ranking",)

    def forward(self, logits: Tensor, weak_logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits and weak_logits (N, C) and target (N,)."""
        target, counted = checks.target_of_methods(logits, target, self.ignore_index)
        checks.alike("weak_logits", weak_logits, "logits", logits)
        # The teacher's probability of the target, times soft_target_weight, is the weight of a CE.
        loss = self.loss(
            logits, self._teacher(logits, weak_logits, target, counted), target, ce_weight=self.ce_weight,
            soft_target_weight=2 * self.alpha, nckd_weight=self.beta, form="cross_entropy",
        )  # fmt: skip
        if self.mu == 0:
            return loss
        return loss + functional.cross_entropy(
            weak_logits, target, scale=self.mu, label_smoothing=0.1,
            ignore_index=self.ignore_index, reduction=self.reduction, backend=self.backend,
        )  # fmt: skip

    @torch.no_grad()
    def _teacher(self, logits: Tensor, weak_logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
        """(N, C): log n_c at c != y, and at y what makes the softmax w / 2, which is below 1."""
        N, C = logits.shape
        dtype = accumulation_dtype(logits.dtype)
        y = target.clamp(0, C - 1)[:, None]
        log_p = logits.to(dtype).log_softmax(1)
        p, key = log_p.exp(), torch.zeros_like(log_p)
        for x in (weak_logits.to(dtype).softmax(1), p if self.ranking == "probabilities" else log_p):
            key += x / (1 - x.gather(1, y) + 1e-6)
        order = key.argsort(dim=1, descending=True, stable=True)
        n = 1 / torch.arange(1, C + 1, dtype=dtype, device=logits.device)
        n = torch.empty_like(p).scatter_(1, order, n.expand(N, C)).scatter_(1, y, 0.0)
        square = p.gather(1, y)[:, 0].square()
        mean = square.masked_fill(~counted, 0).sum() / counted.sum()
        half = (square + 1 - mean) / 2
        return n.log().scatter_(1, y, (half.logit() + n.sum(1).log())[:, None])
