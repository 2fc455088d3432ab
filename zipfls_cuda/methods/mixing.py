"""RecursiveMix: each batch shows the one before it, shrunk, in a box of its images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, functional

Box = tuple[int, int, int, int]  # x0, y0, x1, y1: columns x0 to x1 - 1 and rows y0 to y1 - 1


class RecursiveMix(nn.Module):
    """RecursiveMix: pastes the previous mixed batch, shrunk whole, into one box of this batch's images.

    ``images, soft_target, box = mix(images, target)`` mixes; the label is (1 - s) target + s (that of the
    batch before, itself mixed), s the box's share of the image. The share is drawn from U(0, alpha), before
    the box is cut at the border. ``mix.consistency(roi_logits, logits)`` is the term of the box, omega s
    (-sum_c P_c log p_c): p the softmax of a linear layer of its own on the features of the box
    (``mix.pool``), P that of the previous batch's logits. Call it for every batch, with the network's logits.

    The whole objective is F.cross_entropy(logits, soft_target) + consistency. The first batch is left alone:
    its box is the whole image, with s = 0 and a term of 0. A box with an empty side has s = 0 too. Row i goes
    with row i of the batch before; where that is shorter, its rows come again from the first. The authors'
    code takes the box's rows for columns where it pools, and starts anew every epoch; here the last batch of
    an epoch goes on into the next.

    In eval mode images and target pass unmixed and leave no trace. Boxes follow torch's CPU generator. The
    state_dict holds the batch kept, so training resumes exactly. Under DDP each rank mixes its own batches,
    and keeps and saves its own. Kept: images, labels and logits of one batch. Cost a step: a copy of the
    images, and the pooling and linear layer of the box.

    Args:
        alpha: largest share, in [0, 1].
        omega: weight of the consistency term; 0.5 on ImageNet, 0.1 on CIFAR-10.
        num_classes: C, for targets that are class indices.
        backend: as in ``distillation_loss``, for ``consistency``.

    Raises:
        TypeError, ValueError: a bad argument, by name.

    Example:
        >>> mix = zls.methods.RecursiveMix(num_classes=10)
        >>> for _ in range(2):
        ...     images, soft_target, box = mix(torch.zeros(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
        ...     maps = torch.zeros(4, 16, 8, 8)  # the network's last map of images
        ...     logits, roi_logits = torch.zeros(4, 10), torch.zeros(4, 10)  # of maps, of mix.pool(maps, box)
        ...     loss = torch.nn.functional.cross_entropy(logits, soft_target)
        ...     loss = loss + mix.consistency(roi_logits, logits)
        >>> soft_target.shape, mix.pool(maps, box).shape
        (torch.Size([4, 10]), torch.Size([4, 16]))

    Source: Yang et al., NeurIPS 2022; the authors' code.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        *,
        omega: float = 0.5,
        num_classes: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.alpha, self.omega = checks.number("alpha", alpha, 0.0, 1.0), checks.number("omega", omega)
        self.num_classes = None if num_classes is None else checks.num_classes(num_classes)
        self.backend = backend
        self.set_extra_state(dict.fromkeys(("images", "labels", "logits", "past_logits"), None))

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Box]:
        """Mixed images (N, channels, H, W), their label (N, C), and the box in pixels.

        ``target`` is (N,) class indices in [0, C), or (N, C) probabilities.
        """
        labels = _labels(images, target, self.num_classes)
        N, _, H, W = images.shape
        box = (0, 0, W, H)
        if not self.training:
            return images, labels, box
        images, share = images.clone(), 0.0
        if self.images is not None:
            kept = (("images", images, self.images, "channels"), ("target", labels, self.labels, "classes"))
            for name, x, past, what in kept:
                if x.shape[1] != past.shape[1]:
                    raise ValueError(
                        f"{name} must have {past.shape[1]} {what} as the batch before, got {x.shape[1]}"
                    )
            box = x0, y0, x1, y1 = self.draw(H, W)
            share = (x1 - x0) * (y1 - y0) / (H * W)
            if share:
                size = (y1 - y0, x1 - x0)
                images[:, :, y0:y1, x0:x1] = F.interpolate(_rows(self.images, N).to(images), size)  # nearest
                labels = (1 - share) * labels + share * _rows(self.labels, N).to(labels)
        self.images, self.labels, self.share = images.detach(), labels, share
        self.past_logits, self.logits = self.logits, None
        return images, labels, box

    def draw(self, H: int, W: int) -> Box:
        """A box in an image of H rows and W columns; a side may be empty."""
        u, v, w = torch.rand(3, dtype=torch.float64).tolist()
        side = math.sqrt(self.alpha * u)
        (x0, x1), (y0, y1) = (
            (max(int(size * c) - int(size * side) // 2, 0), min(int(size * c) + int(size * side) // 2, size))
            for size, c in ((W, v), (H, w))
        )
        return x0, y0, x1, y1

    def pool(self, features: Tensor, box: Box) -> Tensor:
        """Features (N, D) of the box from the maps (N, D, h, w) of the last images: RoI align to 1x1.

        The mean of samples between the map's positions, at most one position apart.
        """
        if self.images is None:
            raise RuntimeError("pool needs the size of the images: call mix(images, target) first")
        if features.dim() != 4:
            raise ValueError(f"features must have shape (N, D, h, w), got {tuple(features.shape)}")
        (x0, y0, x1, y1), (H, W) = box, self.images.shape[2:]
        rows, columns = _samples(y0 / H, y1 / H, features, 2), _samples(x0 / W, x1 / W, features, 3)
        return torch.einsum("y,ndyx,x->nd", rows, features, columns)

    def consistency(self, roi_logits: Tensor, logits: Tensor) -> Tensor:
        """The consistency term of the last batch mixed, from the logits (N, C) of the box and of the network.

        No gradient flows to the network's logits, which are kept for the next batch.
        """
        checks.alike("roi_logits", roi_logits, "logits", logits)
        if self.images is None:
            raise RuntimeError("consistency is of a batch that was mixed: call mix(images, target) first")
        if len(logits) != len(self.images):
            raise ValueError(
                f"logits must have a row for each of the {len(self.images)} images, got {len(logits)}"
            )
        self.logits = logits.detach()
        if self.share == 0:
            return roi_logits[:0].float().sum()  # in the graph: DDP finds the parameters of the box's layer
        if self.past_logits is None:
            raise RuntimeError(
                "the logits of the batch before are not known: call consistency(roi_logits, logits) for "
                "every batch that is mixed"
            )
        past = _rows(self.past_logits, len(logits)).to(logits.device)
        return functional.distillation_loss(
            roi_logits, past, None, ce_weight=0.0, kd_weight=self.omega * self.share, form="cross_entropy",
            backend=self.backend,
        )  # fmt: skip

    def get_extra_state(self) -> dict[str, object]:
        """What state_dict holds."""
        names = ("images", "labels", "logits", "past_logits", "share")
        return {name: getattr(self, name) for name in names}

    def set_extra_state(self, state: dict[str, object]) -> None:
        """From load_state_dict."""
        self.images: Tensor | None = state["images"]  # of the last batch, mixed
        self.labels: Tensor | None = state["labels"]
        self.logits: Tensor | None = state["logits"]  # of the last batch, once consistency has them
        self.past_logits: Tensor | None = state["past_logits"]  # of the one before it
        self.share = float(state.get("share", 0.0))  # of the last box

    def extra_repr(self) -> str:
        """The settings shown by repr."""
        return f"alpha={self.alpha}, omega={self.omega}, num_classes={self.num_classes}"


def _labels(images: Tensor, target: Tensor, num_classes: int | None) -> Tensor:
    """The target as probabilities (N, C)."""
    checks.images(images)
    if checks.is_soft(target):
        checks.soft_target(target, (len(images), target.shape[1]))
        return target
    target = checks.target(target, len(images))
    if num_classes is None:
        raise ValueError(
            "num_classes must be given to RecursiveMix for a target of class indices (N,), whose label "
            "is (N, num_classes); or give probabilities (N, C)"
        )
    return F.one_hot(target, num_classes).float()


def _rows(x: Tensor, N: int) -> Tensor:
    """The first N rows; where there are fewer, from the first again."""
    return x[:N] if len(x) >= N else x[torch.arange(N, device=x.device) % len(x)]


def _samples(low: float, high: float, features: Tensor, axis: int) -> Tensor:
    """Weights of the map's positions along ``axis`` in the mean of RoI align's samples from low to high."""
    size, device = features.shape[axis], features.device
    low, high = low * size, high * size
    count = max(math.ceil(high - low), 1)
    at = low - 0.5 + (torch.arange(count, device=device) + 0.5) * ((high - low) / count)
    gap = (at.clamp(0, size - 1)[:, None] - torch.arange(size, device=device)).abs()  # to position i, at i
    return (1 - gap).clamp_min(0).mean(0).to(features.dtype)
