"""The loss as a module: it stores options and calls functional."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import checks, functional
from .attach import Handle
from .checks import DEFAULT_ALPHA
from .labels import Distribution

RANKINGS = ("votes", "logits")


class ZipfLoss(nn.Module):
    """Cross-entropy plus Zipf's Label Smoothing (Eq. 6), with the options of ``zipf_cross_entropy``.

    With an attached model: ``criterion = ZipfLoss(votes=attach(model))``, then ``criterion(output, target)``
    of what the model returns, logits or an object with ``.logits``. Votes that are passed win:
    ``criterion(logits, target, votes)``, ``criterion((logits, votes), target)`` and
    ``criterion((logits, votes, deep_logits), target)``.

    In eval mode it is plain cross-entropy with the class weights, without label smoothing. So it is in
    training mode where it would ask for votes and no gradient is to come (under no_grad, or of logits that
    require none): a loop that validates with its training criterion is right.

    Args:
        zipf_weight: lambda, finite; 0 skips the Zipf term. The paper uses 0.1 (CIFAR-100, ImageNet) and 1.0
            (TinyImageNet, iNat21).
        alpha: decay of Zipf's law, >= 0.
        distribution: another law in its place.
        votes: the handle that ``attach`` returned, which is asked for the votes of every output.
        ranking: "votes" ranks the classes by votes, "logits" by the logits, which needs no attached model.
        only_correct: count the Zipf term only where the target has the largest logit.
        label_smoothing: of the cross-entropy alone, as in F.cross_entropy.
        weight: class weights (C,) of the cross-entropy alone, as in F.cross_entropy; a buffer.
        ignore_index: as in F.cross_entropy.
        reduction: as in F.cross_entropy.
        deep_weight: beta, the weight of the cross-entropy of every deep head (``deep_logits``).
        inplace: write the gradient over the logits, in backward, as ``zls.zipf_cross_entropy`` tells.
        process_group: logits, deep_logits and weight are this rank's class shards (docs/DISTRIBUTED.md).

    Raises:
        TypeError: an option of the wrong type, by name, when the module is made.
        ValueError: an option of a wrong value, by name, when the module is made.

    Example:
        >>> criterion = zls.ZipfLoss(zipf_weight=0.1, label_smoothing=0.1)
        >>> logits, target = torch.zeros(1, 5, requires_grad=True), torch.tensor([2])
        >>> criterion(logits, target, torch.tensor([[2, 2, 2, 0, 0, 1]]))
        tensor(1.6139, grad_fn=<...>)
        >>> criterion.eval()(logits, target)  # plain cross-entropy
        tensor(1.6094, grad_fn=<...>)
    """

    weight: Tensor | None  # (C,)

    def __init__(
        self,
        zipf_weight: float = 0.1,
        alpha: float = DEFAULT_ALPHA,
        *,
        votes: Handle | None = None,
        ranking: str = "votes",
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
        if votes is not None and not isinstance(votes, Handle):
            raise TypeError(
                f"votes must be the handle that attach(model) returned, got {type(votes).__name__}; votes "
                "(N, P) go into the call: criterion(logits, target, votes)"
            )
        if ranking not in RANKINGS:
            raise ValueError(f"ranking must be one of {', '.join(RANKINGS)}, got {ranking!r}")
        if votes is not None and ranking == "logits":
            raise ValueError("ranking='logits' asks for no votes: leave out votes=handle, or ranking")
        self.votes = votes
        self.ranking = ranking
        self.distribution = checks.law(alpha, distribution)
        self.inplace = inplace
        self.process_group = process_group
        self.register_buffer("weight", weight)

    def forward(
        self,
        output: object,
        target: Tensor,
        votes: Tensor | None = None,
        *,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            output: logits (N, C), an object with ``.logits``, ``(logits, votes)`` or
                ``(logits, votes, deep_logits)``.
            target: (N,) classes, or probabilities (N, C).
            votes: (N, P) int32 or int64, in place of the handle's.
            num_items_in_batch: what means divide by, those of deep heads too: ``num_items`` of
                ``zls.zipf_cross_entropy``, by the name that Hugging Face's Trainer gives it
                (``compute_loss_func=criterion``).

        Returns:
            A scalar, or (N,) for reduction "none".

        Raises:
            ValueError: in training, with a gradient to come, there are no votes: with the causes and the
            remedy. TypeError: ``output`` has none of these forms.
        """
        logits, votes, deep_logits = self._unpack(output, votes)
        asks = votes is None and self.ranking == "votes"
        if not self.training or (asks and not (torch.is_grad_enabled() and logits.requires_grad)):
            return self._cross_entropy(logits, target, 0.0, num_items_in_batch)
        if asks:
            if self.votes is not None:
                votes, deep_logits = self.votes.votes_of(logits)
            elif self.zipf_weight != 0:
                raise ValueError(
                    "ZipfLoss has no votes to rank the classes by: attach the model and give the criterion "
                    "its handle, ZipfLoss(votes=zls.attach(model)), or pass votes, criterion(logits, target, "
                    "votes). With ranking='logits' the logits rank them"
                )
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
            num_items=num_items_in_batch,
            inplace=self.inplace,
            process_group=self.process_group,
        )
        for head in deep_logits:
            ce = self._cross_entropy(head, target, self.label_smoothing, num_items_in_batch)
            loss = loss + self.deep_weight * ce.to(loss.dtype)
        return loss

    def _cross_entropy(
        self, logits: Tensor, target: Tensor, label_smoothing: float, num_items: float | Tensor | None
    ) -> Tensor:
        """The loss without its Zipf term: of a deep head, or in validation."""
        no_votes = torch.empty(len(target), 0, dtype=torch.int32, device=target.device)
        return functional.zipf_cross_entropy(
            logits,
            target,
            no_votes,
            zipf_weight=0.0,
            label_smoothing=label_smoothing,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            num_items=num_items,
            process_group=self.process_group,
        )

    @staticmethod
    def _unpack(output: object, votes: Tensor | None) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if isinstance(logits, Tensor):
            return logits, votes, ()
        if not isinstance(output, tuple | list) or len(output) not in (2, 3):
            got = f"{len(output)} items" if isinstance(output, tuple | list) else type(output).__name__
            raise TypeError(
                "output must be logits, an object with .logits, (logits, votes) or "
                f"(logits, votes, deep_logits), got {got}"
            )
        if votes is not None:
            raise TypeError("votes were given twice: in output and by themselves")
        deep_logits = output[2] if len(output) == 3 else ()
        return output[0], output[1], (deep_logits,) if isinstance(deep_logits, Tensor) else deep_logits

    def extra_repr(self) -> str:
        """The settings shown by repr."""
        options = [f"zipf_weight={self.zipf_weight}", f"distribution={self.distribution}"]
        options += [f"votes={self.votes}"] if self.votes else [f"ranking={self.ranking!r}"]
        defaults = {"only_correct": False, "label_smoothing": 0.0, "ignore_index": -100, "reduction": "mean"}
        options += [f"{k}={getattr(self, k)!r}" for k, v in defaults.items() if getattr(self, k) != v]
        if self.weight is not None:
            options.append(f"weight=({self.weight.numel()},)")
        if self.inplace:
            options.append("inplace=True")
        if self.process_group is not None:
            options.append(f"process_group of {dist.get_world_size(self.process_group)} ranks")
        return ", ".join([*options, f"deep_weight={self.deep_weight}"])
