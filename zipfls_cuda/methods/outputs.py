"""Losses of networks with several outputs for one image: two views, or branches at several depths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from .distillation import DistillationModule


class SeveralOutputs(DistillationModule):
    """What DDGSD and BYOT have in common: a term of the whole batch, which has no form by sample."""

    def __init__(self, ignore_index: int, reduction: str, backend: str | None, **settings: float) -> None:
        super().__init__(ignore_index, reduction, backend, **settings)
        whole = self._settings[-1]
        if reduction == "none" and getattr(self, whole) != 0:
            raise ValueError(
                f"reduction must be 'mean' or 'sum' unless {whole} is 0: the term is one number for the "
                f"whole batch; got 'none' with {whole}={getattr(self, whole)!r}"
            )


class DDGSDLoss(SeveralOutputs):
    """Data-distortion guided self-distillation: two views of each image teach each other.

    CE(a) + CE(b) + kd_weight T^2 (KL(p_b || p_a) + KL(p_a || p_b)) + mmd_weight ||mean f_a - mean f_b||^2,
    where no gradient flows to the side that teaches and f are the pooled features, averaged over the batch.
    The batch goes through the network twice as long, both views in it. There is no authors' code; T (3 to 4)
    and the exact form of the last term are not confirmed. Of two public codes one takes the square of the
    difference of the means over batch and channels, the other a mean squared difference of logits, no T^2 and
    gradients to both sides. Cost a step: forward and backward of the second view.

    Args:
        temperature: T > 0.
        kd_weight, mmd_weight: finite; with mmd_weight=0 the features are not used and may be None.
        ignore_index, backend: as in ``distillation_loss``. The term of the features takes all samples.
        reduction: as in ``distillation_loss``; "none" only with mmd_weight=0.

    Raises:
        ValueError: views whose shapes differ, by name.

    Example:
        >>> criterion = zls.methods.DDGSDLoss()
        >>> logits, features = torch.zeros(4, 10), torch.zeros(4, 16)  # of both views: (2 N, C), (2 N, D)
        >>> criterion(*logits.chunk(2), *features.chunk(2), torch.tensor([0, 1]))
        tensor(4.6052)

    Source: Xu & Liu, AAAI 2019.
    """

    def __init__(
        self,
        temperature: float = 3.0,
        kd_weight: float = 1.0,
        mmd_weight: float = 5e-4,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        settings = {"temperature": temperature, "kd_weight": kd_weight, "mmd_weight": mmd_weight}
        super().__init__(ignore_index, reduction, backend, **settings)

    def forward(
        self,
        logits_a: Tensor,
        logits_b: Tensor,
        features_a: Tensor | None,
        features_b: Tensor | None,
        target: Tensor,
    ) -> Tensor:
        """The loss of the views' logits (N, C) and pooled features (N, D), and target (N,)."""
        checks.alike("logits_b", logits_b, "logits_a", logits_a)
        weights = {"ce_weight": 1.0, "kd_weight": self.kd_weight, "temperature": self.temperature}
        loss = self.loss(logits_a, logits_b, target, **weights)
        loss = loss + self.loss(logits_b, logits_a, target, **weights)
        if self.mmd_weight == 0:
            return loss
        checks.features("features_a", features_a, "logits_a", logits_a)
        checks.alike("features_b", features_b, "features_a", features_a)
        gap = features_a.to(loss.dtype).mean(0) - features_b.to(loss.dtype).mean(0)  # (D,)
        return loss + self.mmd_weight * gap.square().sum()


class BYOTLoss(SeveralOutputs):
    """Be your own teacher: the deepest of B branches teaches the others, by logits and by features.

    CE(z_0) + sum over b >= 1 of [soft_weight (-sum q log p_b) + (1 - soft_weight) CE(z_b)], plus hint_weight
    ||f_b - f_0|| for b >= 2, with q and p_b the softmax at temperature T of z_0 and z_b. The deepest branch
    gets no gradient as a teacher. As in the authors' code of the journal version: the soft term is a
    cross-entropy without T^2, the hint is one norm over the whole batch, not squared, and branch 1, next to
    the deepest, has none. The conference version has T^2 and squares the hint. Cost a step: the branches
    (the caller's: bottlenecks, a pooling and a linear head each) and their losses.

    Args:
        temperature: T > 0.
        soft_weight, hint_weight: finite; with hint_weight=0 the features are not used and may be None.
        ignore_index, backend: as in ``distillation_loss``. The hint takes all samples.
        reduction: as in ``distillation_loss``; "none" only with hint_weight=0.

    Raises:
        TypeError, ValueError: lists of other lengths, entries of other shapes, by name.

    Example:
        >>> criterion = zls.methods.BYOTLoss()
        >>> logits = [torch.zeros(2, 10, requires_grad=True) for _ in range(4)]  # deepest first
        >>> features = [torch.zeros(2, 16) for _ in range(4)]  # each after its adapter to the deepest's D
        >>> criterion(logits, features, torch.tensor([0, 1]))
        tensor(9.2103, grad_fn=<...>)

    Source: Zhang et al., ICCV 2019; the authors' code of the journal version.
    """

    def __init__(
        self,
        temperature: float = 3.0,
        soft_weight: float = 0.3,
        hint_weight: float = 0.03,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        settings = {"temperature": temperature, "soft_weight": soft_weight, "hint_weight": hint_weight}
        super().__init__(ignore_index, reduction, backend, **settings)

    def forward(
        self, branch_logits: Sequence[Tensor], branch_features: Sequence[Tensor] | None, target: Tensor
    ) -> Tensor:
        """The loss of B branches' logits, each (N, C), features, each (N, D), and target (N,).

        Deepest branch first. Feature 1 is not used and may be None.
        """
        branches("branch_logits", branch_logits)
        deepest = branch_logits[0]
        loss = self.loss(deepest, deepest, target, ce_weight=1.0)
        soft = self.soft_weight / self.temperature**2  # distillation_loss multiplies by T^2
        for b, logits in enumerate(branch_logits[1:], 1):
            checks.alike(f"branch_logits[{b}]", logits, "branch_logits[0]", deepest)
            loss = loss + self.loss(
                logits, deepest, target, ce_weight=1 - self.soft_weight, kd_weight=soft,
                temperature=self.temperature, form="cross_entropy",
            )  # fmt: skip
        if self.hint_weight == 0:
            return loss
        branches("branch_features", branch_features)
        if len(branch_features) != len(branch_logits):
            raise ValueError(
                f"branch_features must have one entry a branch, {len(branch_logits)} as branch_logits, "
                f"got {len(branch_features)}"
            )
        checks.features("branch_features[0]", branch_features[0], "branch_logits[0]", deepest)
        hint = branch_features[0].detach().to(loss.dtype)
        for b, x in enumerate(branch_features[2:], 2):
            checks.alike(f"branch_features[{b}]", x, "branch_features[0]", hint)
            loss = loss + self.hint_weight * torch.linalg.vector_norm(x.to(loss.dtype) - hint)
        return loss


def branches(name: str, x: object) -> None:
    """A list or tuple of at least one tensor."""
    if not isinstance(x, list | tuple):
        raise TypeError(f"{name} must be a list of tensors, one a branch, got {type(x).__name__}")
    if not x:
        raise ValueError(f"{name} must have at least one branch, got none")
