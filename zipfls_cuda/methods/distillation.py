"""Losses that are ``distillation_loss`` with the weights of a method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import checks, functional


class DistillationModule(nn.Module):
    """What the losses have in common: their settings, checked when the module is made, and the call."""

    def __init__(self, ignore_index: int, reduction: str, backend: str | None, **settings: float) -> None:
        super().__init__()
        for name, x in settings.items():
            setattr(self, name, checks.temperature(x) if name == "temperature" else checks.number(name, x))
        self.ignore_index, self.reduction = checks.which_samples(ignore_index, reduction)
        self.backend = backend
        self._settings = tuple(settings)

    def loss(
        self,
        logits: Tensor,
        teacher: Tensor,
        target: Tensor,
        *,
        ce_weight: float = 0.0,
        kd_weight: float = 0.0,
        tckd_weight: float = 0.0,
        nckd_weight: float = 0.0,
        soft_target_weight: float = 0.0,
        max_weight: float = 0.0,
        temperature: float = 1.0,
        form: str = "divergence",
        sample_weight: Tensor | None = None,
        teacher_index: Tensor | None = None,
        reduction: str | None = None,
    ) -> Tensor:
        """``functional.distill`` with the settings of the module; ``reduction`` None is the module's."""
        return functional.distill(
            logits, teacher, target, ce_weight=ce_weight, kd_weight=kd_weight, tckd_weight=tckd_weight,
            nckd_weight=nckd_weight, soft_target_weight=soft_target_weight, max_weight=max_weight,
            temperature=temperature, form=form, sample_weight=sample_weight, teacher_index=teacher_index,
            ignore_index=self.ignore_index, reduction=reduction or self.reduction, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The settings shown by repr."""
        defaults = {"ignore_index": -100, "reduction": "mean", "backend": None}
        shown = [*self._settings, *(k for k, v in defaults.items() if getattr(self, k) != v)]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


class ScheduledModule(DistillationModule):
    """A loss whose weights follow the epoch: ``set_epoch`` gives it, at the start of each.

    The epoch is in the state_dict, and is read on the device, so that compiled and captured steps follow it.
    """

    epoch: Tensor  # () int64, -1 before the first set_epoch

    def __init__(self, ignore_index: int, reduction: str, backend: str | None, **settings: float) -> None:
        super().__init__(ignore_index, reduction, backend, **settings)
        self.register_buffer("epoch", torch.tensor(-1))
        self.knows_epoch = False
        self.register_load_state_dict_post_hook(_look_at_the_epoch)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that starts, from 0."""
        self.epoch.fill_(checks.count("epoch", epoch, 0))
        self.knows_epoch = True

    def epoch_on(self, device: torch.device, setting: str, otherwise: str = "") -> Tensor:
        """The epoch () float64 on a device; ``setting`` needs it, and ``otherwise`` does without."""
        if not self.knows_epoch:
            raise RuntimeError(
                f"{type(self).__name__} has {setting}={getattr(self, setting):g} and set_epoch was never "
                f"called: call criterion.set_epoch(epoch), from 0, at the start of every epoch{otherwise}"
            )
        return self.epoch.double().to(device)


def _look_at_the_epoch(module: ScheduledModule, _: object) -> None:
    """After load_state_dict."""
    module.knows_epoch = int(module.epoch) >= 0


class KDLoss(DistillationModule):
    """Knowledge distillation: ce_weight CE + kd_weight T^2 KL(q || p), the softmaxes at temperature T.

    The weights are those of mdistiller on CIFAR-100; on ImageNet it has T = 1 and 0.5 each. Cost a step: the
    teacher's forward.

    Args:
        temperature: T > 0.
        ce_weight, kd_weight: finite.
        ignore_index, reduction, backend: as in ``distillation_loss``.

    Example:
        >>> criterion = zls.methods.KDLoss(temperature=4.0)
        >>> logits, teacher = torch.zeros(1, 4, requires_grad=True), torch.tensor([[2.0, 1.0, 0.0, 0.0]])
        >>> criterion(logits, teacher, torch.tensor([0]))
        tensor(0.4640, grad_fn=<...>)

    Source: Hinton et al., arXiv 1503.02531; mdistiller's code.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        settings = {"temperature": temperature, "ce_weight": ce_weight, "kd_weight": kd_weight}
        super().__init__(ignore_index, reduction, backend, **settings)

    def forward(self, logits: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """The loss of logits and teacher (N, C) and target (N,)."""
        return self.loss(
            logits, teacher, target,
            ce_weight=self.ce_weight, kd_weight=self.kd_weight, temperature=self.temperature,
        )  # fmt: skip


class DKDLoss(ScheduledModule):
    """Decoupled distillation: ce_weight CE + warm T^2 (alpha TCKD + beta NCKD), as in ``distillation_loss``.

    warm = min((epoch + 1) / warmup_epochs, 1): call ``set_epoch`` at the start of every epoch. The epoch is
    in the state_dict, and is read on the device, so that compiled and captured steps follow it. beta is the
    authors' for most pairs on CIFAR-100 (2 for ResNet56-20 and 110-32; 6 for WRN-40-2's, VGG13-VGG8 and
    VGG13-MobileNetV2); on ImageNet T = 1, beta = 0.5 (ResNet34-18) or 2 (ResNet50-MobileNet),
    warmup_epochs = 1, and alpha is 0.5 in the paper and 1 in the code. Cost a step: the teacher's forward.

    Args:
        temperature: T > 0.
        alpha, beta, ce_weight: finite.
        warmup_epochs: >= 0; 0 for no warm-up, and no ``set_epoch``.
        ignore_index, reduction, backend: as in ``distillation_loss``.

    Raises:
        RuntimeError: in training mode ``set_epoch`` was never called.

    Example:
        >>> criterion = zls.methods.DKDLoss(warmup_epochs=20)
        >>> criterion.set_epoch(0)
        >>> logits, teacher = torch.zeros(1, 4, requires_grad=True), torch.tensor([[2.0, 1.0, 0.0, 0.0]])
        >>> criterion(logits, teacher, torch.tensor([0]))
        tensor(1.4471, grad_fn=<...>)

    Source: Zhao et al., CVPR 2022, Eq. 7; mdistiller's code.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        ce_weight: float = 1.0,
        warmup_epochs: float = 20,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        settings = {"temperature": temperature, "alpha": alpha, "beta": beta, "ce_weight": ce_weight}
        super().__init__(ignore_index, reduction, backend, **settings)
        self.warmup_epochs = checks.number("warmup_epochs", warmup_epochs, 0.0)
        self._settings += ("warmup_epochs",)

    def forward(self, logits: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """The loss of logits and teacher (N, C) and target (N,); in eval mode as after the warm-up."""
        warm = None
        if self.training and self.warmup_epochs > 0:
            epoch = self.epoch_on(logits.device, "warmup_epochs", ", or give warmup_epochs=0")
            warm = ((epoch + 1) / self.warmup_epochs).clamp(max=1).expand(logits.shape[:1])
        return self.loss(
            logits, teacher, target, ce_weight=self.ce_weight, tckd_weight=self.alpha, nckd_weight=self.beta,
            temperature=self.temperature, sample_weight=warm,
        )  # fmt: skip


class NKDLoss(DistillationModule):
    """Normalised distillation: ce_weight CE + q1_y CE + gamma T^2 (-sum_{c != y} q^_c log p^_c).

    q1_y is the teacher's probability of the target at T = 1 always, p^ and q^ are the softmaxes over the
    other classes at T. The last term keeps the teacher's entropy, a constant. ImageNet: T = 1, gamma = 1.5;
    CIFAR-100: 3 and 3.5. (From July to October 2023 the published code left the target in the last term.)
    Cost a step: the teacher's forward.

    Args:
        temperature: T > 0.
        gamma, ce_weight: finite.
        ignore_index, reduction, backend: as in ``distillation_loss``.

    Example:
        >>> criterion = zls.methods.NKDLoss()
        >>> logits, teacher = torch.zeros(1, 4, requires_grad=True), torch.tensor([[2.0, 1.0, 0.0, 0.0]])
        >>> criterion(logits, teacher, torch.tensor([0]))
        tensor(3.8803, grad_fn=<...>)

    Source: Yang et al., ICCV 2023; cls_KD's code.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        gamma: float = 1.5,
        ce_weight: float = 1.0,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        settings = {"temperature": temperature, "gamma": gamma, "ce_weight": ce_weight}
        super().__init__(ignore_index, reduction, backend, **settings)

    def forward(self, logits: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """The loss of logits and teacher (N, C) and target (N,)."""
        return self.loss(
            logits, teacher, target, ce_weight=self.ce_weight, soft_target_weight=1.0, nckd_weight=self.gamma,
            temperature=self.temperature, form="cross_entropy",
        )  # fmt: skip


class WSLDLoss(DistillationModule):
    """Weighted soft labels: ce_weight CE + w alpha T^2 (-sum q log p), w = 1 - exp(-CE(z) / (CE(t) + 1e-7)).

    w is each sample's own, without gradient: small where the student knows the sample better than the
    teacher. ImageNet: T = 2, alpha = 2.5; CIFAR-100: 4 and 2.25. Cost a step: the teacher's forward, and the
    cross-entropies of both networks once more.

    Args:
        temperature: T > 0.
        alpha, ce_weight: finite.
        ignore_index, reduction, backend: as in ``distillation_loss``.

    Example:
        >>> criterion = zls.methods.WSLDLoss()
        >>> logits, teacher = torch.zeros(1, 4, requires_grad=True), torch.tensor([[2.0, 1.0, 0.0, 0.0]])
        >>> criterion(logits, teacher, torch.tensor([0]))
        tensor(14.4124, grad_fn=<...>)

    Source: Zhou et al., ICLR 2021; cls_KD's code, which adds the 1e-7.
    """

    def __init__(
        self,
        temperature: float = 2.0,
        alpha: float = 2.5,
        ce_weight: float = 1.0,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        settings = {"temperature": temperature, "alpha": alpha, "ce_weight": ce_weight}
        super().__init__(ignore_index, reduction, backend, **settings)

    def forward(self, logits: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """The loss of logits and teacher (N, C) and target (N,)."""
        with torch.no_grad():
            ce, of_teacher = (
                self.loss(x.detach(), teacher, target, ce_weight=1.0, reduction="none")
                for x in (logits, teacher)
            )
            weight = -torch.expm1(-ce / (of_teacher.to(ce.dtype) + 1e-7))
        return self.loss(
            logits, teacher, target, ce_weight=self.ce_weight, kd_weight=self.alpha, sample_weight=weight,
            temperature=self.temperature, form="cross_entropy",
        )  # fmt: skip


class CSKDLoss(DistillationModule):
    """Class-wise self-distillation: ce_weight CE + kd_weight T^2 KL(q || p), q of another image of the class.

    ``PairSampler`` gives batches whose second half are the partners of the first; their logits come from a
    forward in training mode without gradient, and have no cross-entropy. The authors' kd_weight is 3 on
    fine-grained data sets. Cost a step: that forward, of as many images again.

    Args:
        temperature: T > 0.
        kd_weight, ce_weight: finite.
        ignore_index, reduction, backend: as in ``distillation_loss``.

    Example:
        >>> model, criterion = torch.nn.Linear(3, 4), zls.methods.CSKDLoss()
        >>> images, target = torch.zeros(8, 3), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])  # as of PairSampler
        >>> with torch.no_grad():
        ...     partner_logits = model(images[4:])
        >>> criterion(model(images[:4]), partner_logits, target[:4]).shape
        torch.Size([])

    Source: Yun et al., CVPR 2020; the authors' code.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        kd_weight: float = 1.0,
        ce_weight: float = 1.0,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        settings = {"temperature": temperature, "kd_weight": kd_weight, "ce_weight": ce_weight}
        super().__init__(ignore_index, reduction, backend, **settings)

    def forward(self, logits: Tensor, partner_logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits and their partners' (N, C) and target (N,), the class of both."""
        return self.loss(
            logits, partner_logits, target,
            ce_weight=self.ce_weight, kd_weight=self.kd_weight, temperature=self.temperature,
        )  # fmt: skip


class TfKDSelfLoss(DistillationModule):
    """Teacher-free self-training: (1 - alpha) CE + alpha multiplier T^2 KL(q || p) / C.

    The teacher is the same network trained before. The code takes the mean over N C numbers, hence the 1 / C
    and the multiplier; the paper has neither. The defaults are ResNet18's on CIFAR-100; (0.95, 20, 1) is
    MobileNetV2's and ShuffleNetV2's, (0.4, 20, 50) GoogLeNet's, (0.9, 20, 50) DenseNet121's, (0.9, 20, 100)
    ResNeXt29's. Cost a step: the teacher's forward.

    Args:
        alpha, multiplier: finite.
        temperature: T > 0.
        ignore_index, reduction, backend: as in ``distillation_loss``.

    Example:
        >>> criterion = zls.methods.TfKDSelfLoss()
        >>> logits, teacher = torch.zeros(1, 4, requires_grad=True), torch.tensor([[2.0, 1.0, 0.0, 0.0]])
        >>> criterion(logits, teacher, torch.tensor([0]))
        tensor(4.3079, grad_fn=<...>)

    Source: Yuan et al., CVPR 2020; the authors' code.
    """

    def __init__(
        self,
        alpha: float = 0.95,
        temperature: float = 6.0,
        multiplier: float = 50.0,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        settings = {"alpha": alpha, "temperature": temperature, "multiplier": multiplier}
        super().__init__(ignore_index, reduction, backend, **settings)

    def forward(self, logits: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """The loss of logits and teacher (N, C) and target (N,)."""
        kd_weight = self.alpha * self.multiplier / max(logits.shape[-1], 1)
        return self.loss(
            logits, teacher, target,
            ce_weight=1 - self.alpha, kd_weight=kd_weight, temperature=self.temperature,
        )  # fmt: skip


class MrKDLoss(DistillationModule):
    """Memory-replay distillation: (1 - alpha) CE + alpha mean_j T^2 KL(q_j || p) over earlier selves q_j.

    ``SnapshotTeacher`` keeps the copies and gives their logits. Without a copy, as before the first, it is
    the cross-entropy. No code is published, and the constants are not confirmed: they have no defaults. Cost
    a step: a forward of each copy.

    Args:
        alpha: finite, the share of the teachers.
        temperature: T > 0.
        ignore_index, reduction, backend: as in ``distillation_loss``.

    Raises:
        TypeError: ``teachers`` is no list or tuple.

    Example:
        >>> criterion = zls.methods.MrKDLoss(alpha=0.5, temperature=4.0)
        >>> logits, target = torch.zeros(1, 4, requires_grad=True), torch.tensor([0])
        >>> teachers = [torch.tensor([[2.0, 1.0, 0.0, 0.0]]), torch.tensor([[3.0, 0.0, 0.0, 0.0]])]
        >>> criterion(logits, teachers, target)
        tensor(1.0396, grad_fn=<...>)
        >>> criterion(logits, [], target)
        tensor(1.3863, grad_fn=<...>)

    Source: Wang et al., arXiv 2009.05226.
    """

    def __init__(
        self,
        alpha: float,
        temperature: float,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(ignore_index, reduction, backend, alpha=alpha, temperature=temperature)

    def forward(self, logits: Tensor, teachers: Sequence[Tensor], target: Tensor) -> Tensor:
        """The loss of logits (N, C), teachers, each (N, C), and target (N,)."""
        if not isinstance(teachers, list | tuple):
            raise TypeError(f"teachers must be a list of logits, got {type(teachers).__name__}")
        if not teachers:
            return self.loss(logits, logits, target, ce_weight=1.0)
        kd_weight, T = self.alpha / len(teachers), self.temperature
        loss = self.loss(
            logits, teachers[0], target, ce_weight=1 - self.alpha, kd_weight=kd_weight, temperature=T
        )
        for teacher in teachers[1:]:
            loss = loss + self.loss(logits, teacher, target, kd_weight=kd_weight, temperature=T)
        return loss
