"""The loss as a module: it stores options and calls functional."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, functional
from .checks import DEFAULT_ALPHA
from .distributions import Distribution


class ZipfLoss(nn.Module):
    """Cross-entropy plus Zipf's Label Smoothing (Eq. 6), with the options of ``zipf_cross_entropy``.

    Called as ``criterion(logits, target, votes)``, or on the output of an attached model,
    ``criterion((logits, votes), target)`` and ``criterion((logits, votes, deep_logits), target)``.

    Args:
        zipf_weight: lambda, finite; 0 skips the Zipf term. The paper uses 0.1 or 1.0.
        alpha: decay of Zipf's law, >= 0. Or ``distribution``: another law in its place.
        only_correct: count the Zipf term only where the target has the largest logit.
        label_smoothing, weight, ignore_index, reduction: as in F.cross_entropy; smoothing and the class
            weights (C,), a buffer, touch the cross-entropy alone.
        deep_weight: beta, the weight of the cross-entropy of every deep head (``deep_logits``).
        inplace: write the gradient over the logits, in backward, as :func:`zls.zipf_cross_entropy` tells.
        process_group: logits, deep_logits and weight are this rank's class shards (docs/DISTRIBUTED.md).

    Raises:
        TypeError, ValueError: a bad option, by name, when the module is made.

    Validate with F.cross_entropy: in eval mode models give plain logits.
    """

    weight: Tensor | None  # (C,)

    def __init__(
        self,
        zipf_weight: float = 1.0,
        alpha: float = DEFAULT_ALPHA,
        *,
        distribution: Distribution | None = None,
        only_correct: bool = False,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        deep_weight: float = 0.1,
        inplace: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.zipf_weight, self.label_smoothing, self.only_correct, self.ignore_index, self.reduction = (
            checks.loss_options(zipf_weight, label_smoothing, only_correct, ignore_index, reduction)
        )
        self.deep_weight = checks.number("deep_weight", deep_weight)
        if weight is not None:
            checks.class_weight(weight)
        self.distribution = checks.law(alpha, distribution)
        self.inplace = inplace
        self.process_group = process_group
        self.register_buffer("weight", weight)

    def forward(
        self,
        output: Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Sequence[Tensor]],
        target: Tensor,
        votes: Tensor | None = None,
        *,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of logits (N, C) and target (N,) or (N, C); see the class for the forms of ``output``.

        num_items: what means divide by, as in :func:`zls.zipf_cross_entropy`; of deep heads too.
        """
        logits, votes, deep_logits = self._unpack(output, votes)
        if num_items is not None:
            num_items = checks.num_items(num_items, self.reduction)
        if isinstance(num_items, Tensor):
            num_items = num_items.detach()
        loss = functional.zipf_cross_entropy(
            logits,
            target,
            votes,
            zipf_weight=self.zipf_weight,
            distribution=self.distribution,
            only_correct=self.only_correct,
            label_smoothing=self.label_smoothing,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            num_items=num_items,
            inplace=self.inplace,
            process_group=self.process_group,
        )
        for head in deep_logits:
            ce = self._cross_entropy(head, target, loss.dtype, self.reduction if num_items is None else "sum")
            loss = loss + self.deep_weight * (ce if num_items is None else (ce / num_items).to(loss.dtype))
        return loss

    def _cross_entropy(self, logits: Tensor, target: Tensor, dtype: torch.dtype, reduction: str) -> Tensor:
        """Cross-entropy of a deep head."""
        options = {
            "ignore_index": self.ignore_index,
            "reduction": reduction,
            "label_smoothing": self.label_smoothing,
        }
        if self.process_group is not None:  # of class shards: the whole loss without its Zipf term
            no_votes, options["process_group"] = target.new_empty(len(target), 0), self.process_group
            return functional.zipf_cross_entropy(
                logits, target, no_votes, zipf_weight=0.0, weight=self.weight, **options
            )
        weight = None if self.weight is None else self.weight.to(dtype)
        target = target.to(dtype) if checks.is_soft(target) else target
        return F.cross_entropy(logits.to(dtype), target, weight, **options)

    @staticmethod
    def _unpack(output: object, votes: Tensor | None) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
        if isinstance(output, Tensor):
            return output, votes, ()
        if not isinstance(output, tuple | list) or len(output) not in (2, 3):
            got = f"{len(output)} items" if isinstance(output, tuple | list) else type(output).__name__
            raise TypeError(
                f"output must be logits, (logits, votes) or (logits, votes, deep_logits), got {got}"
            )
        if votes is not None:
            raise TypeError("votes were given twice: in output and by themselves")
        deep_logits = output[2] if len(output) == 3 else ()
        return output[0], output[1], (deep_logits,) if isinstance(deep_logits, Tensor) else deep_logits

    def extra_repr(self) -> str:
        """The settings shown by repr."""
        options = [f"zipf_weight={self.zipf_weight}", f"distribution={self.distribution}"]
        defaults = {"only_correct": False, "label_smoothing": 0.0, "ignore_index": -100, "reduction": "mean"}
        options += [f"{k}={getattr(self, k)!r}" for k, v in defaults.items() if getattr(self, k) != v]
        if self.weight is not None:
            options.append(f"weight=({self.weight.numel()},)")
        if self.inplace:
            options.append("inplace=True")
        if self.process_group is not None:
            options.append(f"process_group of {dist.get_world_size(self.process_group)} ranks")
        return ", ".join([*options, f"deep_weight={self.deep_weight}"])
