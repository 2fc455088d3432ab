"""Attach votes to a model: it returns what it returned before, and a handle keeps the votes of its training.

How it works. Forward hooks keep the dense map while the model runs and let its positions vote once the logits
are there. What stands between map and classifier is not guessed but probed, on one small batch: the model
runs once with every module call recorded, and the modules called between the two are the *head*.

* A head that does nothing to a single position (pooling, flatten, dropout) need not run. If the classifier's
  input is then the mean over positions ("global pooling") or the first token ("class token"), the
  positions vote through the classifier as they are.
* Any other head (a norm, a convolution, an activation) runs on every position as if it were a map of its own
  ("per-position head"). Whether that is what the model means is checked by filling the whole map with one
  position and running the model: its classifier must see what the head makes of that position alone.

The hooks share one Voting with the handle. It holds names, numbers and the votes of the last forward, never
the model, so copies of the model (deepcopy, pickle) vote with their own weights, and a handle copied together
with the model belongs to the copy.

The hooks and ``Handle.votes_of`` are traced by torch.compile with fullgraph=True, which (torch 2.13) takes no
thread identities, loses what is written to a threading.local, knows no running backward, and recompiles for
every value of a number that changes from call to call.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .hooks import After, Before, Voting, deep_heads, undo, voting_of
from .models import as_call, check_name, check_unwrapped, find_classifier, find_feature, known_channels
from .positions import Plan, is_linear

__all__ = ["Handle", "Plan", "attach", "detach"]

RETURNS = ("logits", "tuple")
MAX_OPERATIONS = 100  # between the model's output and the logits of a loss


def attach(
    model: nn.Module,
    *,
    returns: str = "logits",
    feature: str | None = None,
    classifier: str | None = None,
    upsample: int = 1,
    deep: Sequence[str] = (),
    example: Tensor | tuple | dict | None = None,
) -> Handle:
    """Make a classification model vote while it trains; ``ZipfLoss(votes=handle)`` asks for the votes.

    The model returns what it returned: logits, or an object with ``.logits``. Its class, parameters and
    state_dict stay as they are (but for the deep heads); deepcopy, pickle, torch.save and torch.compile work.
    Attach before wrapping the model (DDP, torch.compile) and, with ``deep``, before building the optimizer;
    FSDP2's fully_shard may come before or after. Attaching again replaces: the earlier handle says so when it
    is used, and deep heads of the same names and shapes stay.

    A forward in training mode with gradient enabled leaves its votes in the handle, in place of those of the
    one before; other forwards (validation, update_bn, a teacher's) neither leave nor disturb any. Votes are
    given out for the output of that forward alone: see ``Handle.votes_of``.

    Map and classifier are found for timm models (``forward_features`` and ``get_classifier``) and for the
    classes of torchvision and transformers that ``attach.models.KNOWN`` lists. The classifier that votes is
    the one that is trained; what stands between it and the map is probed once, in eval mode, without
    gradient, with buffers, training flags and random state put back. Dropout does not touch the votes, and no
    gradient flows through them.

    Args:
        model: returns logits (N, C), or an object whose ``.logits`` they are.
        returns: "logits" leaves the output as it is. "tuple" makes the model return ``(logits, votes)`` in
            training mode, or ``(logits, votes, deep_logits)`` with ``deep``, and plain logits in eval mode.
        feature: name of the module whose output is the dense map, (N, D, H, W) or (N, H, W, D), or tokens
            (N, T, D). Needed, like ``classifier``, for models of other kinds.
        classifier: name of the nn.Linear, or the nn.Conv2d of kernel 1, that gives the logits.
        upsample: 1, or 2 to vote on maps at twice their resolution (not on tokens).
        deep: names of modules whose outputs vote too ("Dense2"), each through a linear head of its own on its
            mean over positions. The heads are registered as ``model.zipf_heads`` and trained by
            ``ZipfLoss(deep_weight=...)``.
        example: a batch as the model takes it: a tensor, a tuple of arguments or a dict of keyword arguments.
            Without it the first training batch is the example. Needed before torch.compile with
            fullgraph=True, and for ``deep`` unless timm's ``feature_info`` knows the channels of the stages.

    Returns:
        The handle, for ``ZipfLoss(votes=handle)``; ``handle.remove()``, like ``zls.detach(model)``, undoes it
        all, ``handle.plan`` and its repr tell what the probe decided. Votes are (N, P) int32 on the logits'
        device, P the positions of the map followed by those of the deep maps; ``deep_logits`` is a tuple with
        one (N, C) for each name in ``deep``.

    Raises:
        TypeError: an argument of the wrong type, by name.
        ValueError: an argument of a wrong value, by name.
        RuntimeError: the positions of this model cannot vote, with the reason (from ``attach`` with an
            example, else from the first training batch).

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        >>> handle = zls.attach(model, feature="0", classifier="3")  # timm and others: zls.attach(model)
        >>> criterion = zls.ZipfLoss(zipf_weight=0.1, votes=handle)
        >>> images, target = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
        >>> criterion(model(images), target).backward()
        >>> handle.plan.kind
        'global pooling'

    Source: Sec. 3.2, dense votes; "Dense1" and "Dense2" of the recipe for small images, whose beta weights
    the cross-entropy of the deep heads.
    """
    _check_model(model)
    if returns not in RETURNS:
        raise ValueError(f"returns must be 'logits' or 'tuple', got {returns!r}")
    if isinstance(upsample, bool) or upsample not in (1, 2):
        raise ValueError(f"upsample must be 1 or 2, got {upsample!r}")
    if isinstance(deep, str) or not all(isinstance(name, str) for name in deep):
        raise TypeError(f"deep must be a sequence of module names such as ('layer3',), got {deep!r}")
    for argument, name in (("feature", feature), ("classifier", classifier), *(("deep", d) for d in deep)):
        if name is not None:
            check_name(model, argument, name)
    if feature is not None and isinstance(model.get_submodule(feature), nn.modules.dropout._DropoutNd):
        raise ValueError(f"feature must not be a dropout, name the module before {feature!r}")
    classifier = classifier or find_classifier(model)
    linear = model.get_submodule(classifier)
    if not is_linear(linear):
        raise TypeError(
            "classifier must name an nn.Linear or an nn.Conv2d of kernel 1, stride 1 and one group, "
            f"{classifier!r} is a {linear}"
        )
    if linear.weight.shape[0] < 2:
        raise ValueError(
            f"classifier must give at least 2 classes, {classifier!r} gives {linear.weight.shape[0]}"
        )

    voting = Voting(feature or find_feature(model), classifier, upsample, tuple(deep), returns)
    plan = None if example is None else voting.probe(model, *as_call(example))
    heads = None
    if deep:
        channels = [d[2] for d in plan.deep] if plan else [known_channels(model, name) for name in deep]
        heads = deep_heads(model, voting, channels, linear)
    old = voting_of(model)
    if old is not None:
        undo(model, old, "replaced by a later attach(model), whose handle has the votes")
    if heads is not None:
        model.zipf_heads = heads
    model.register_forward_pre_hook(Before(voting), with_kwargs=True)
    # Also after an error, to keep no tensors; before other hooks, so that FSDP2 has not resharded the head.
    model.register_forward_hook(After(voting), always_call=True, prepend=True)
    if plan:
        voting.follow(model, plan)
    return Handle(model, voting)


def detach(model: nn.Module) -> bool:
    """Undo ``attach``, deep heads included, without the handle: on copies and loaded models too.

    Returns:
        Whether the model was attached.

    Raises:
        TypeError: not an nn.Module, or one that wraps the attached model.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        >>> handle = zls.attach(model, feature="0", classifier="3")
        >>> zls.detach(model), zls.detach(model)
        (True, False)
    """
    check_unwrapped(model)
    voting = voting_of(model)
    if voting is None:
        return False
    undo(model, voting, "detached; attach(model) again gives another handle")
    return True


class Handle:
    """What ``attach`` returns: it has the votes of the last training forward. It does not own the model.

    A handle copied or pickled with its model belongs to the copy; copied without it, to no model.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        >>> handle = zls.attach(model, feature="0", classifier="3")
        >>> logits = model(torch.randn(8, 3, 16, 16))
        >>> votes, deep_logits = handle.votes_of(logits)
        >>> votes.shape, deep_logits
        (torch.Size([8, 196]), ())
    """

    def __init__(self, model: nn.Module, voting: Voting) -> None:
        self._model, self._voting = weakref.ref(model), voting

    def __getstate__(self) -> dict:
        return {"_model": None, "_voting": self._voting}  # the model of a copy cannot be known here

    @property
    def plan(self) -> Plan | None:
        """What the probe decided; None before it."""
        return self._voting.plan

    def remove(self) -> None:
        """Give back the model as it was, deep heads removed. A second call does nothing."""
        if self._model is None:
            raise RuntimeError("this handle is a copy, which does not know its model: zls.detach(model)")
        model = self._model()
        if model is not None and voting_of(model) is self._voting:
            detach(model)

    def votes_of(self, logits: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The votes (N, P) that belong to ``logits``, and the deep logits: what ``ZipfLoss`` asks for.

        ``logits`` are what the model returned from its last training forward with gradient, known by
        identity, for any number of calls. Another tensor that is computed from them (``.float()``, a slice of
        classes, what DDP hands on) is taken if it has as many rows and one such forward has run since the
        last call.

        Raises:
            ValueError: no votes belong to ``logits``, with the cause.
            RuntimeError: the handle was replaced, or the model detached.
        """
        voting = self._voting
        if voting.ended is not None:
            raise RuntimeError(f"attach: this handle gives no votes: its model was {voting.ended}")
        if voting.latest is None:
            raise ValueError(f"attach: no training forward has left votes for these logits. {CAUSES}")
        outputs, votes, deep_logits = voting.latest
        if not any(output is logits for output in outputs):
            self._check_substitute(logits, outputs[0], votes)
            voting.latest = ((*outputs, logits), votes, deep_logits)
        voting.unasked = voting.several = False
        return votes, deep_logits

    def _check_substitute(self, logits: Tensor, output: Tensor, votes: Tensor) -> None:
        """Whether ``logits``, not the output itself, can only be computed from it."""
        voting = self._voting
        if not voting.unasked:
            raise ValueError(
                "attach: these logits are not the output of the last training forward, whose votes have been "
                f"used, and no other has run since. {CAUSES}"
            )
        if voting.several:
            raise ValueError(
                "attach: two training forwards or more have run since the last loss, and these logits are "
                "not the output of the last: compute each loss right after its forward, run forwards without "
                "a loss under torch.no_grad(), or attach(..., returns='tuple') and pass the votes along"
            )
        if len(logits) != len(votes):
            raise ValueError(
                f"attach: logits have {len(logits)} rows, and the last training forward, whose votes there "
                f"are, had {len(votes)}. {CAUSES}"
            )
        if not torch.compiler.is_compiling() and not _computed_from(logits, output):
            raise ValueError(
                f"attach: these logits are not computed from the last training forward's output. {CAUSES}"
            )

    def __repr__(self) -> str:
        model = None if self._model is None else self._model()
        ended = f", {self._voting.ended}" if self._voting.ended else ""
        plan = self.plan or "to be probed on the first training batch"
        return f"Attached({'a model' if model is None else type(model).__name__}, {plan}{ended})"


CAUSES = (
    "Possible causes: they are of an earlier forward; of a forward in eval mode (call model.train() first) "
    "or without gradient; of model.forward(x), which runs no hooks (call model(x)); of another model (a copy "
    "needs a handle of its own: attach it); of torch.utils.checkpoint with use_reentrant=True "
    "(use_reentrant=False works)"
)


def _computed_from(x: Tensor, output: Tensor) -> bool:
    """Whether the graph of ``x`` leads to that of ``output`` within a few operations."""
    goal, edge, seen = output.grad_fn, [x.grad_fn], set()
    while edge and len(seen) < MAX_OPERATIONS:
        node = edge.pop(0)
        if node is goal:
            return goal is not None
        if node is not None and node not in seen:
            seen.add(node)
            edge.extend(following for following, _ in node.next_functions)
    return False


def _check_model(model: nn.Module) -> None:
    check_unwrapped(model)
    old = voting_of(model)
    if hasattr(model, "zipf_heads") and not (old and old.deep):
        raise RuntimeError("model has an attribute zipf_heads already, the name attach needs for deep heads")
