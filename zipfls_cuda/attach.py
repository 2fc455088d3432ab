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

The hooks share one _Voting with the handle. It holds names, numbers and the votes of the last forward, never
the model, so copies of the model (deepcopy, pickle) vote with their own weights, and a handle copied together
with the model belongs to the copy.

The hooks and ``Handle.votes_of`` are traced by torch.compile with fullgraph=True, which (torch 2.13) takes no
thread identities, loses what is written to a threading.local, knows no running backward, and recompiles for
every value of a number that changes from call to call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.utils._pytree import tree_leaves

from . import compiling
from .checks import autocast_enabled
from .functional import dense_vote

# What the probe can decide.
GLOBAL_POOLING = "global pooling"
CLASS_TOKEN = "class token"
PER_POSITION = "per-position head"

RETURNS = ("logits", "tuple")

# Where the channels of a feature map are.
MAP, MAP_CHANNELS_LAST, TOKENS = "NDHW", "NHWD", "NTD"

PROBE_SAMPLES = 4  # rows of the example, or of the first batch, that the probe looks at
PROBE_POSITIONS = 8  # positions per sample that run through the head in the probe
MAX_PREFIX = 4  # prefix tokens tried where the model does not tell their number
MAX_OPERATIONS = 100  # between the model's output and the logits of a loss

# torchvision's classifiers: class -> (module whose output is the map, module that holds the last nn.Linear).
TORCHVISION = {
    "ConvNeXt": ("features", "classifier"),
    "DenseNet": ("features", "classifier"),
    "EfficientNet": ("features", "classifier"),
    "MNASNet": ("layers", "classifier"),
    "MobileNetV2": ("features", "classifier"),
    "MobileNetV3": ("features", "classifier"),
    "RegNet": ("trunk_output", "fc"),
    "ResNet": ("layer4", "fc"),
    "ShuffleNetV2": ("conv5", "fc"),
    "SwinTransformer": ("permute", "head"),
    "VGG": ("features", "classifier"),
    "VisionTransformer": ("encoder", "heads"),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the probe decided: names and numbers alone, so that a copied model can follow it."""

    kind: str  # GLOBAL_POOLING, CLASS_TOKEN or PER_POSITION
    feature: str  # module whose output is the map
    seat: str  # module where the hook keeps it: ``feature``, or the one that takes its output as input
    side: str  # "output" or "input" of ``seat``
    layout: str  # MAP, MAP_CHANNELS_LAST or TOKENS
    shape: tuple[int, ...]  # of the map in the probe, without N
    prefix: int  # tokens at the front that do not vote
    classifier: str  # the nn.Linear that votes
    head: tuple[tuple[str, int], ...]  # modules every position goes through first, with their input's rank
    deep: tuple[tuple[str, str, int], ...]  # earlier stages that vote too: module, layout, channels

    def __str__(self) -> str:
        through = "".join(f"{name} -> " for name, _ in self.head) + self.classifier
        text = f"{self.kind}: {self.feature} {self.shape} -> {through}"
        if self.prefix:
            text += f", without {self.prefix} prefix token{'s' if self.prefix > 1 else ''}"
        return text + "".join(f", deep {name} ({channels} channels)" for name, _, channels in self.deep)


# The public functions -------------------------------------------------------------------------------


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
    given out for the output of that forward alone: see :meth:`Handle.votes_of`.

    Map and classifier are found for timm models (``forward_features`` and ``get_classifier``) and for the
    torchvision classes in ``TORCHVISION``. The classifier that votes is the one that is trained; what stands
    between it and the map is probed once, in eval mode, without gradient, with buffers, training flags and
    random state put back. Dropout does not touch the votes, and no gradient flows through them.

    Args:
        model: returns logits (N, C), or an object whose ``.logits`` they are.
        returns: "logits" leaves the output as it is. "tuple" makes the model return ``(logits, votes)`` in
            training mode, or ``(logits, votes, deep_logits)`` with ``deep``, and plain logits in eval mode.
        feature: name of the module whose output is the dense map, (N, D, H, W) or (N, H, W, D), or tokens
            (N, T, D). Needed, like ``classifier``, for models of other kinds.
        classifier: name of the nn.Linear that gives the logits.
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
        TypeError, ValueError: a bad argument, by name. RuntimeError: the positions of this model cannot vote,
        with the reason (from ``attach`` with an example, else from the first training batch).

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
            _check_name(model, argument, name)
    if feature is not None and isinstance(model.get_submodule(feature), nn.modules.dropout._DropoutNd):
        raise ValueError(f"feature must not be a dropout, name the module before {feature!r}")
    classifier = classifier or _find_classifier(model)
    linear = model.get_submodule(classifier)
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"classifier must name an nn.Linear, {classifier!r} is a {type(linear).__name__}")
    if linear.out_features < 2:
        raise ValueError(
            f"classifier must give at least 2 classes, {classifier!r} gives {linear.out_features}"
        )

    voting = _Voting(feature or _find_feature(model), classifier, upsample, tuple(deep), returns)
    plan = None if example is None else voting.probe(model, *_as_call(example))
    heads = None
    if deep:
        channels = [d[2] for d in plan.deep] if plan else [_known_channels(model, name) for name in deep]
        heads = _deep_heads(model, voting, channels, linear)
    old = _voting_of(model)
    if old is not None:
        _undo(model, old, "replaced by a later attach(model), whose handle has the votes")
    if heads is not None:
        model.zipf_heads = heads
    model.register_forward_pre_hook(_Before(voting), with_kwargs=True)
    # Also after an error, to keep no tensors; before other hooks, so that FSDP2 has not resharded the head.
    model.register_forward_hook(_After(voting), always_call=True, prepend=True)
    if plan:
        voting.follow(model, plan)
    return Handle(model, voting)


def detach(model: nn.Module) -> bool:
    """Undo ``attach``, deep heads included, without the handle: on copies and loaded models too.

    Returns:
        Whether the model was attached.

    Raises:
        TypeError: not an nn.Module, or one that wraps the attached model.
    """
    _check_unwrapped(model)
    voting = _voting_of(model)
    if voting is None:
        return False
    _undo(model, voting, "detached; attach(model) again gives another handle")
    return True


class Handle:
    """What ``attach`` returns: it has the votes of the last training forward. It does not own the model.

    A handle copied or pickled with its model belongs to the copy; copied without it, to no model.
    """

    def __init__(self, model: nn.Module, voting: _Voting) -> None:
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
        if model is not None and _voting_of(model) is self._voting:
            detach(model)

    def votes_of(self, logits: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The votes (N, P) that belong to ``logits``, and the deep logits: what ``ZipfLoss`` asks for.

        ``logits`` are what the model returned from its last training forward with gradient, known by
        identity, for any number of calls. Another tensor that is computed from them (``.float()``, a slice of
        classes, what DDP hands on) is taken if it has as many rows and one such forward has run since the
        last call.

        Raises:
            ValueError: no votes belong to ``logits``, with the cause. RuntimeError: the handle was replaced,
            or the model detached.
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


# The hooks ------------------------------------------------------------------------------------------


class _Voting:
    """The names that the hooks go by and the votes of the last forward; shared with the handle."""

    def __init__(
        self, feature: str | None, classifier: str, upsample: int, deep: tuple[str, ...], returns: str
    ) -> None:
        self.feature = feature  # None: the output of timm's forward_features
        self.classifier = classifier
        self.upsample = upsample
        self.deep = deep
        self.returns = returns
        self.plan: Plan | None = None
        self.warned = False  # of maps of one position
        self.ended: str | None = None  # what became of the attachment
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to a forward."""
        # The forward that runs: its thread (None where torch.compile traced its start) and its maps.
        self.running: tuple[int | None, dict[tuple[str, str], Tensor]] | None = None
        # Of the last forward: what is known to be its logits, votes, deep logits.
        self.latest: tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]] | None = None
        self.unasked = False  # no votes were asked for since that forward
        self.several = False  # nor between it and the one before

    def __getstate__(self) -> dict:
        names = ("running", "latest", "unasked", "several")
        return {k: v for k, v in vars(self).items() if k not in names}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.forget()

    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """At the start of a forward: keep the maps of one that votes."""
        if not model.training or not (torch.is_grad_enabled() or self.returns == "tuple"):
            if self.is_running():
                self.running = None  # left by a forward that was interrupted
            return
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "attach: DataParallel runs replicas of the model, whose votes would be lost: use "
                "torch.nn.parallel.DistributedDataParallel"
            )
        if self.running is not None and not self.is_running():
            raise RuntimeError(
                "attach: the model runs in another thread already; one forward at a time votes: give each "
                "thread a copy of the model, with a handle of its own"
            )
        if self.plan is None:
            _probe_first_batch(self, model, args, kwargs)
        self.running = None if torch.compiler.is_compiling() else threading.get_ident(), {}

    def is_running(self) -> bool:
        """Whether a forward that keeps maps runs in this thread."""
        if self.running is None:
            return False
        return torch.compiler.is_compiling() or self.running[0] in (None, threading.get_ident())

    def end(self, model: nn.Module, output: object) -> object:
        """At the end of a forward, or after its error (``output`` is None): let the kept maps vote."""
        if not self.is_running():
            return None
        kept = self.running[1]
        self.running = None  # nothing is kept in the second forward of activation checkpointing
        if output is None:
            return None
        logits = output if self.returns == "tuple" else _logits_of(output)
        if not isinstance(logits, Tensor):
            or_object = "" if self.returns == "tuple" else " or an object with .logits"
            raise RuntimeError(
                f"attach: in training mode the model returns a {type(output).__name__}, not logits (N, C)"
                f"{or_object}"
            )
        votes, deep_logits = self.vote(model, kept)
        if self.returns == "tuple":
            return (logits, votes, deep_logits) if deep_logits else (logits, votes)
        if deep_logits:
            # Rows of none of the deep logits: a graph that is followed from the logits (as DDP does to find
            # unused parameters) leads to the deep heads, whose gradients come by way of the loss.
            logits = torch.cat([logits, *(d[:0].to(logits.dtype) for d in deep_logits)])
            output = _with_logits(output, logits)
        # The second forward of checkpointing runs in a backward, and its logits are given to nothing.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self.latest = ((logits,), votes, deep_logits)
            self.several, self.unasked = self.unasked, True
        return output if deep_logits else None

    def vote(self, model: nn.Module, kept: dict) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Votes (N, P) of all maps, and deep logits."""
        plan = self.plan
        linear = model.get_submodule(plan.classifier)
        features = _kept(kept, plan.seat, plan.side).detach()
        with torch.no_grad():
            if plan.head:
                votes = self.vote_through_head(model, features, linear)
            else:
                votes = _vote(_as_map(features, plan.layout, plan.prefix), linear, self.upsample)
        all_votes, deep_logits = [votes], []
        for (name, layout, _), head in zip(plan.deep, model.zipf_heads if plan.deep else (), strict=True):
            features = _as_map(_kept(kept, name, "output"), layout, plan.prefix)
            pooled = features.mean(1) if features.dim() == 3 else features.mean((2, 3))
            deep_logits.append(head(_cast(pooled, head.weight)))
            all_votes.append(_vote(features.detach(), head, self.upsample))
        if not torch.compiler.is_compiling():
            self.warn_of_one_position(plan, max(v.shape[1] for v in all_votes) // self.upsample**2)
        return (torch.cat(all_votes, 1) if deep_logits else votes), tuple(deep_logits)

    def warn_of_one_position(self, plan: Plan, positions: int) -> None:
        """Warn, once, where no map has more than one position; ``positions`` is the number of the largest."""
        if positions != 1 or self.warned:
            return
        self.warned = True
        warnings.warn(
            f"attach: the map of {plan.feature!r} has one position on inputs of this size. A sample's one "
            "vote is then the model's own prediction: no other class is ranked, they share the label evenly. "
            "Use larger pictures, an earlier map (feature=...), or let earlier stages vote too (deep=(...)).",
            stacklevel=2,
        )

    def vote_through_head(self, model: nn.Module, features: Tensor, linear: nn.Linear) -> Tensor:
        """Votes (N, P) of features that go through the model's head first, each position by itself."""
        layout, prefix = self.plan.layout, self.plan.prefix
        if self.upsample == 2:  # before the head, which need not be affine
            features = F.interpolate(
                _as_map(features, layout, prefix), scale_factor=2, mode="bilinear", align_corners=False
            )
            layout = MAP
        rows = _rows(features, layout, prefix)
        N, P = rows.shape[:2]
        rows = rows.clone(memory_format=torch.contiguous_format)  # the head may hold an in-place activation
        rows = _run_head(model, self.plan.head, rows.flatten(0, 1), self.plan.layout)
        return _vote(rows.unflatten(0, (N, P)), linear)

    def probe(self, model: nn.Module, args: tuple, kwargs: dict) -> Plan:
        probe = _Probe(self, model, args, kwargs)
        plan = probe.plan()
        self.warn_of_one_position(plan, max(probe.positions))
        return plan

    def follow(self, model: nn.Module, plan: Plan) -> None:
        """Set the hooks that keep the plan's tensors."""
        seat = model.get_submodule(plan.seat)
        if plan.side == "input":
            seat.register_forward_pre_hook(_KeepInput(self, plan.seat))
        else:
            seat.register_forward_hook(_KeepOutput(self, plan.seat))
        for name in dict.fromkeys(name for name, _, _ in plan.deep):
            if (name, "output") != (plan.seat, plan.side):
                model.get_submodule(name).register_forward_hook(_KeepOutput(self, name))
        self.plan = plan


class _Hook:
    """One hook of an attached model, known by its class."""

    def __init__(self, voting: _Voting, name: str = "") -> None:
        self.voting, self.name = voting, name

    @property
    def __name__(self) -> str:
        """torch.jit.script asks for it first, and can do nothing with the hooks."""
        raise AttributeError(
            "attach: torch.jit.script cannot compile the hooks of an attached model: zls.detach(model) first"
        )


class _Before(_Hook):
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.voting.begin(model, args, kwargs)


class _After(_Hook):
    def __call__(self, model: nn.Module, args: tuple, output: object) -> object:
        return self.voting.end(model, output)


class _KeepInput(_Hook):
    def __call__(self, module: nn.Module, args: tuple) -> None:
        if self.voting.is_running():
            self.voting.running[1][self.name, "input"] = args[0]


class _KeepOutput(_Hook):
    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.voting.is_running():
            self.voting.running[1][self.name, "output"] = output


@compiling.eager(
    "zipfls_cuda.attach probes the model on its first training batch, which cannot be compiled: "
    "give attach an example, or train one batch before compiling"
)
def _probe_first_batch(voting: _Voting, model: nn.Module, args: tuple, kwargs: dict) -> None:
    voting.follow(model, voting.probe(model, args, kwargs))


def _voting_of(model: nn.Module) -> _Voting | None:
    return next((hook.voting for hook in model._forward_hooks.values() if isinstance(hook, _After)), None)


def _undo(model: nn.Module, voting: _Voting, reason: str) -> None:
    """Take hooks and deep heads away; ``reason`` is what the handle then says."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [k for k, h in hooks.items() if isinstance(h, _Hook) and h.voting is voting]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
    if voting.deep:
        del model.zipf_heads
    voting.ended = reason
    voting.forget()


def _deep_heads(model: nn.Module, voting: _Voting, channels: list[int], linear: nn.Linear) -> nn.ModuleList:
    """A linear head for each deep map; those of an earlier attach where maps and shapes are the same."""
    shapes = [(linear.out_features, d) for d in channels]
    old = _voting_of(model)
    if old and old.deep == voting.deep and [tuple(h.weight.shape) for h in model.zipf_heads] == shapes:
        return model.zipf_heads
    like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    with torch.inference_mode(False):  # parameters made in inference mode cannot be trained
        return nn.ModuleList(nn.Linear(d, classes, **like) for classes, d in shapes)


def _logits_of(output: object) -> object:
    """The logits of what a model returns: a tensor, or an object with ``.logits``."""
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


def _with_logits(output: object, logits: Tensor) -> object:
    """``output`` with other logits."""
    if isinstance(output, Tensor):
        return logits
    if hasattr(output, "_replace"):  # a namedtuple
        return output._replace(logits=logits)
    output.logits = logits
    return output


def _kept(kept: dict[tuple[str, str], Tensor], name: str, side: str) -> Tensor:
    if (name, side) not in kept:
        raise RuntimeError(
            f"attach: the module {name!r} has no map to vote: it did not run in this forward, or another "
            "took its place (then attach again)"
        )
    return kept[name, side]


# Positions ------------------------------------------------------------------------------------------


def _as_map(features: Tensor, layout: str, prefix: int) -> Tensor:
    """(N, D, H, W), or tokens (N, T, D) without the prefix: what dense_vote takes. A view."""
    if layout == TOKENS:
        return features[:, prefix:]
    return features.permute(0, 3, 1, 2) if layout == MAP_CHANNELS_LAST else features


def _rows(features: Tensor, layout: str, prefix: int) -> Tensor:
    """(N, P, D), row-major positions. A view."""
    if layout == TOKENS:
        return features[:, prefix:]
    return features.flatten(1, 2) if layout == MAP_CHANNELS_LAST else features.flatten(2).transpose(1, 2)


def _run_head(model: nn.Module, head: Sequence[tuple[str, int]], x: Tensor, layout: str) -> Tensor:
    """Rows (M, D) through the head's modules in eval mode, each row as a map of one position; (M, D').

    May overwrite ``x``.
    """
    for name, rank in head:
        module = model.get_submodule(name)
        with _eval_mode(module):
            x = module(_shape_for(x, rank, layout))
    return x.flatten(1)


def _shape_for(x: Tensor, rank: int, layout: str) -> Tensor:
    """``x``, which holds one position per row, in the rank that a module takes."""
    if x.dim() == rank:
        return x
    x = x.flatten(1)
    if rank == 4:
        return x[:, None, None, :] if layout == MAP_CHANNELS_LAST else x[:, :, None, None]
    return x.unsqueeze(1) if rank == 3 else x


@contextlib.contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Dropout off and batch norm on its running statistics; flags are set one by one, train() may do more."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _vote(features: Tensor, linear: nn.Linear, upsample: int = 1) -> Tensor:
    weight = _whole(linear.weight)
    bias = None if linear.bias is None else _whole(linear.bias)
    return dense_vote(_cast(features, weight), weight, bias, upsample=upsample)


def _cast(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the dtype of ``like``, unless autocast takes care of that."""
    return x if autocast_enabled(x) else x.to(like.dtype)


def _whole(weight: Tensor) -> Tensor:
    """A sharded weight (a DTensor, as FSDP2 makes them) gathered: its local part must not vote for all."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


# The probe ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Call:
    """One call of one module."""

    name: str
    began: int
    ended: int
    input: Tensor | None  # the first positional argument, if a tensor
    output: Tensor | None
    overwrote: bool  # its input


class _Probe:
    """Runs the model in eval mode and works out a Plan."""

    def __init__(self, voting: _Voting, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.voting, self.model = voting, model
        self.positions: list[int] = []  # of every map that votes
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        tensors += [*model.parameters(), *model.buffers()]
        if any(t.is_meta for t in tensors) or detect_fake_mode(tensors):
            raise self.refusal(
                "the model or the example (the first training batch) is on the meta device or under "
                "FakeTensorMode, and without values nothing can be probed. Attach after model.to_empty(...) "
                "and load_state_dict(...), or before them without example: the first training batch is probed"
            )
        self.args, self.kwargs = _few(args, kwargs)
        if any(isinstance(a, Tensor) and a.numel() == 0 for a in (*self.args, *self.kwargs.values())):
            raise self.refusal("the example, or the first training batch, is empty")

    def plan(self) -> Plan:
        with _undisturbed(self.model):
            calls, logits, features = self.trace()
            voter = self.check_classifier(calls, logits)
            feature = self.voting.feature or self.output_of_forward_features(calls, features)
            origin = self.last_call(calls, feature)
            if origin.output is None or origin.output.dim() not in (3, 4):
                raise self.refusal(f"feature {feature!r} gives {_wrong_map(origin.output)}")
            if origin.ended > voter.began:
                raise self.refusal(f"feature {feature!r} does not run before the classifier {voter.name!r}")
            seat, side = self.seat(calls, origin)
            between = self.between(calls, origin, voter, seat.began if side == "input" else seat.ended)
            decision = self.decide(origin.output, between, voter, seat.name, side)
            if self.voting.upsample == 2 and decision["layout"] == TOKENS:
                raise self.refusal("upsample=2 needs a map, and this model has tokens (N, T, D)")
            return Plan(
                feature=feature,
                seat=seat.name,
                side=side,
                shape=tuple(origin.output.shape[1:]),
                classifier=voter.name,
                deep=tuple(self.deep_stage(calls, name, decision["prefix"]) for name in self.voting.deep),
                **decision,
            )

    def refusal(self, reason: str) -> RuntimeError:
        return RuntimeError(
            f"attach: the positions of this {type(self.model).__name__} cannot vote: {reason}"
        )

    # Running the model

    def run(self) -> object:
        """What the model returns, on copies of the inputs: models may overwrite theirs."""
        args = [a.clone() if isinstance(a, Tensor) else a for a in self.args]
        kwargs = {k: a.clone() if isinstance(a, Tensor) else a for k, a in self.kwargs.items()}
        return self.model(*args, **kwargs)

    def trace(self) -> tuple[list[_Call], object, object]:
        """One run: all module calls in order of completion, what the model and forward_features return."""
        calls, open_calls, clock, features = [], [], itertools.count(), []

        def began(module, args):
            given = args[0] if args and isinstance(args[0], Tensor) else None
            open_calls.append((next(clock), given, _version(given)))

        def ended(name):
            def hook(module, args, output):
                start, given, version = open_calls.pop()
                output = output if isinstance(output, Tensor) else None
                calls.append(_Call(name, start, next(clock), given, output, _overwritten(given, version)))

            return hook

        with contextlib.ExitStack() as stack:
            for name, module in self.model.named_modules():
                if name:
                    stack.callback(module.register_forward_pre_hook(began).remove)
                    stack.callback(module.register_forward_hook(ended(name)).remove)
            if self.voting.feature is None:  # a method, so no hook sees it: shadowed for this run
                method = self.model.forward_features
                if "forward_features" in vars(self.model):
                    stack.callback(setattr, self.model, "forward_features", method)
                else:
                    stack.callback(delattr, self.model, "forward_features")
                self.model.forward_features = lambda *a, **k: features.append(method(*a, **k)) or features[-1]
            return calls, self.run(), features[-1] if features else None

    def classifier_input(self, seat: str, side: str, features: Tensor) -> Tensor:
        """What the classifier sees when ``features`` take the place of the map."""
        seen = []
        module = self.model.get_submodule(seat)
        if side == "input":
            replace = module.register_forward_pre_hook(lambda module, args: (features, *args[1:]))
        else:
            replace = module.register_forward_hook(lambda module, args, output: features)
        linear = self.model.get_submodule(self.voting.classifier)
        look = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            self.run()
        finally:
            replace.remove()
            look.remove()
        return seen[0]

    # Finding map and classifier in a trace

    def output_of_forward_features(self, calls: list[_Call], features: object) -> str:
        """Name of the module whose output timm's forward_features returns, as it is or in another layout."""
        if not isinstance(features, Tensor):
            raise self.refusal(
                f"forward_features returns a {type(features).__name__}; name the module: feature=..."
            )

        def holds(x: Tensor | None) -> bool:  # all tensors are alive, so equal addresses mean one memory
            return x is not None and x.data_ptr() == features.data_ptr() and x.numel() == features.numel()

        # Not one that passes it on: a dropout would, in eval mode.
        makers = [c for c in calls if holds(c.output) and (c.overwrote or not holds(c.input))]
        if not makers:
            raise self.refusal("forward_features returns no module's output; name the module: feature=...")
        return makers[-1].name

    def last_call(self, calls: list[_Call], name: str) -> _Call:
        mine = [c for c in calls if c.name == name]
        if not mine:  # checkpointing of a Sequential runs its parts
            parts = [c.name for c in calls if c.name.rpartition(".")[0] == name]
            instead = f", but its parts {', '.join(parts)}: name the last of them" if parts else ""
            raise self.refusal(f"in eval mode it does not run the module {name!r}{instead}")
        return mine[-1]

    def check_classifier(self, calls: list[_Call], logits: object) -> _Call:
        """The classifier's one call, after checking that it gives the logits."""
        name, logits = self.voting.classifier, _logits_of(logits)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise self.refusal(f"in eval mode it returns {got}, and logits (N, C) are needed")
        count = sum(c.name == name for c in calls)
        if count > 1:
            raise self.refusal(f"the classifier {name!r} runs {count} times in one forward")
        voter, linear = self.last_call(calls, name), self.model.get_submodule(name)
        if voter.input is None or voter.input.dim() != 2:
            got = "no tensor by position" if voter.input is None else f"shape {tuple(voter.input.shape)}"
            raise self.refusal(f"the classifier {name!r} takes {got}, not pooled features (N, D)")
        bias = None if linear.bias is None else _whole(linear.bias)
        affine = F.linear(voter.input, _whole(linear.weight), bias)
        if self.gap(affine, voter.output) > self.tolerance(affine):
            raise self.refusal(f"the classifier {name!r} does more than weight @ features + bias")
        if self.gap(voter.output, logits) > self.tolerance(logits):
            raise self.refusal(
                f"the logits are not the output of {name!r}: the model changes it, or has another classifier"
            )
        return voter

    def seat(self, calls: list[_Call], origin: _Call) -> tuple[_Call, str]:
        """Where to keep the map: at the input of the next module, else at the output of the one that made it.

        Activation checkpointing wraps, or takes apart, the backbone's modules, seldom the one that follows.
        """
        names = [c.name for c in calls]
        takers = [c for c in calls if c.input is origin.output and c.began > origin.ended]
        takers = [c for c in takers if names.count(c.name) == 1]
        return (min(takers, key=lambda c: c.began), "input") if takers else (origin, "output")

    def between(self, calls: list[_Call], origin: _Call, voter: _Call, start: int) -> list[_Call]:
        """The outermost calls from ``start`` to the classifier's."""
        inside = [c for c in calls if start <= c.began and c.ended < voter.began]
        outer = [c for c in inside if not any(o.began < c.began and c.ended < o.ended for o in inside)]
        # A module that overwrites the map has done its work on it by the time the positions vote.
        kept = origin.output.data_ptr()
        done = [i for i, c in enumerate(outer) if c.overwrote and c.input.data_ptr() == kept]
        return outer[done[-1] + 1 :] if done else outer

    def deep_stage(self, calls: list[_Call], name: str, prefix: int) -> tuple[str, str, int]:
        out = self.last_call(calls, name).output
        if out is None or out.dim() not in (3, 4):
            raise self.refusal(f"deep={name!r} gives {_wrong_map(out)}")
        if out.dim() == 3 and self.voting.upsample == 2:
            raise self.refusal(f"upsample=2 needs a map, and deep={name!r} gives tokens (N, T, D)")
        channels = {TOKENS: out.shape[2]} if out.dim() == 3 else self.channels_by_aspect(out)
        if _voting_of(self.model) is self.voting:  # its heads are made, where feature_info told the channels
            known = self.model.zipf_heads[self.voting.deep.index(name)].in_features
            channels = {layout: D for layout, D in channels.items() if known == D}
            if not channels:
                raise self.refusal(
                    f"deep={name!r} gives shape {tuple(out.shape)}, its head takes {known} channels"
                )
        layout = next(iter(channels))
        self.positions.append(_rows(out, layout, prefix).shape[1])
        return name, layout, channels[layout]

    def channels_by_aspect(self, features: Tensor) -> dict[str, int]:
        """Layouts of a map that no classifier tells, likelier first: height to width as in the input."""
        _, a, b, c = features.shape
        images = [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor) and x.dim() == 4]
        H, W = images[0].shape[2:] if images else (1, 1)
        layouts = {MAP: a, MAP_CHANNELS_LAST: c}
        if _ratio(a / b, H / W) < _ratio(b / c, H / W):
            layouts = dict(reversed(layouts.items()))
        return layouts

    # Deciding how positions vote

    def decide(self, features: Tensor, between: list[_Call], voter: _Call, seat: str, side: str) -> dict:
        """kind, layout, prefix and head, by the numbers; the best of the layouts possible."""
        found, problems = [], []
        for layout in (TOKENS,) if features.dim() == 3 else (MAP, MAP_CHANNELS_LAST):
            prefix, is_token = self.prefix(features, between, voter) if layout == TOKENS else (0, False)
            rows = _rows(features, layout, prefix)
            if rows.shape[1] == 0:
                raise self.refusal(f"the map has no positions, its shape is {tuple(features.shape)}")
            try:
                head = self.needed_head(between, rows, layout)
            except Exception as error:  # a module refuses a single position, or channels in this place
                problems.append(f"a single position cannot go through {_names(between)} ({error})")
                continue
            if not head and rows.shape[2] != voter.input.shape[1]:
                problems.append(
                    f"a position has {rows.shape[2]} channels and the classifier takes {voter.input.shape[1]}"
                )
                continue
            kind, gap = PER_POSITION, float("inf")
            if not head:
                kind = CLASS_TOKEN if is_token else GLOBAL_POOLING
                pooled = [features[:, 0]] if is_token else [rows.mean(1)]
                if prefix and not is_token:  # some models pool the prefix tokens too
                    pooled.append(features.mean(1))
                gap = min(self.gap(x, voter.input) for x in pooled)
            if gap > self.tolerance(features):
                kind = PER_POSITION
                gap = self.filled_gap(features, rows, layout, head, seat, side)
            if gap > self.tolerance(features):
                problems.append(
                    f"from map to classifier the model does more than {_names(between)} can do to a single "
                    f"position: filled with that position, the map gives other features (off by {gap:.1%})"
                )
                continue
            decision = {"kind": kind, "layout": layout, "prefix": prefix, "head": head}
            found.append((kind == PER_POSITION, gap, decision, rows.shape[1]))
        if not found:
            raise self.refusal(problems[0])
        *_, decision, positions = min(found, key=lambda f: f[:2])
        self.positions.append(positions)
        return decision

    def prefix(self, tokens: Tensor, between: list[_Call], voter: _Call) -> tuple[int, bool]:
        """Number of prefix tokens, and whether the first of them is the class token that gives the logits."""
        pooled = next(x for x in [*(c.input for c in between), voter.input] if x is not None and x.dim() == 2)
        known = getattr(self.model, "num_prefix_tokens", None)
        if known is not None and known >= tokens.shape[1]:
            known = None
        token_gap = self.gap(tokens[:, 0], pooled)
        counts = range(min(MAX_PREFIX + 1, tokens.shape[1])) if known is None else {0, known}
        mean_gaps = {k: self.gap(tokens[:, k:].mean(1), pooled) for k in counts}
        best = min(mean_gaps, key=mean_gaps.get)
        is_token = token_gap < mean_gaps[best] and token_gap <= self.tolerance(tokens)
        if known is not None:
            return known, is_token and known > 0
        if is_token:
            return 1, True
        return (best if mean_gaps[best] <= self.tolerance(tokens) else 0), False

    def needed_head(self, between: list[_Call], rows: Tensor, layout: str) -> tuple[tuple[str, int], ...]:
        """The modules that do something to a single position: all but pooling, flatten, dropout, identity.

        A module counts as doing nothing if it has no parameters and buffers (a fresh batch norm does
        nothing either, until it is trained) and returns what it gets, however large the values.
        """
        x, head = rows[:, :PROBE_POSITIONS].flatten(0, 1), []  # (M, D)
        for call in between:
            if call.input is None:
                raise TypeError(f"{call.name!r} takes no tensor by position")
            module = self.model.get_submodule(call.name)
            x = _shape_for(x, call.input.dim(), layout)
            out = module(x.clone())  # in-place modules overwrite what they get
            if not isinstance(out, Tensor):
                raise TypeError(f"{call.name!r} gives no tensor")
            bare = next(module.parameters(), None) is None and next(module.buffers(), None) is None
            if bare:
                wild = torch.randn_like(x) * 100
                pairs = ((out, x), (module(wild.clone()), wild))
                bare = all(torch.equal(y.flatten(1), z.flatten(1)) for y, z in pairs)
            if not bare:
                head.append((call.name, call.input.dim()))
            x = out
        return tuple(head)

    def filled_gap(
        self, features: Tensor, rows: Tensor, layout: str, head: tuple, seat: str, side: str
    ) -> float:
        """How far a position through the head is from what the model makes of a map filled with it."""
        worst = 0.0
        for k in {0, rows.shape[1] // 2}:
            row = rows[:, k]  # (N, D)
            filled = torch.empty_like(features).copy_(_shape_for(row, features.dim(), layout))
            alone = _run_head(self.model, head, row.clone(), layout)
            worst = max(worst, self.gap(alone, self.classifier_input(seat, side, filled)))
        return worst

    @staticmethod
    def gap(x: Tensor, y: Tensor) -> float:
        """Largest difference relative to the largest value of ``y``; inf for different shapes."""
        if x.shape != y.shape:
            return float("inf")
        x, y = x.double(), y.double()
        gap = ((x - y).abs().max() / y.abs().max().clamp_min(1e-30)).item()
        return gap if gap == gap else float("inf")

    @staticmethod
    def tolerance(x: Tensor) -> float:
        """Room for rounding, TF32 products included; wrong decisions are off by far more."""
        low = x.dtype in (torch.float16, torch.bfloat16) or autocast_enabled(x)
        return 5e-2 if low else 5e-3


def _version(x: Tensor | None) -> int | Tensor | None:
    """What tells later whether ``x`` was overwritten: its version, or a copy where it has none."""
    if x is None:
        return None
    return x.clone() if x.is_inference() else x._version


def _overwritten(x: Tensor | None, version: int | Tensor | None) -> bool:
    if isinstance(version, Tensor):
        return not torch.equal(x, version)
    return x is not None and x._version != version


def _few(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The first samples of a batch: tensors as long as the first one are cut, anything else stays."""
    first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()), None)

    def cut(a: object) -> object:
        return a[:PROBE_SAMPLES] if isinstance(a, Tensor) and a.dim() and len(a) == len(first) else a

    return tuple(map(cut, args)), {k: cut(v) for k, v in kwargs.items()}


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient; afterwards training flags, buffers and random state are as before.

    Inference mode is off: training may need what the model keeps of this run (a cache). It is on for models
    made in inference mode, since their buffers can be written nowhere else.
    """
    of_inference = any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    flags = [(m, m.training) for m in model.modules()]
    named = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    buffers = [(m, name, b, b.clone()) for m, name, b in named]
    was_training = model.training
    devices = {t.device for t in (*model.parameters(), *model.buffers())} - {torch.device("cpu")}
    python_state = random.getstate()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {d.type for d in devices}:
            of_kind = [d for d in devices if d.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=of_kind, device_type=kind))
        stack.enter_context(torch.inference_mode(of_inference))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code has no hooks of ours
        model.eval()
        try:
            yield
        finally:
            # train() first: models that cache something in eval mode drop it there. Then each one's own flag.
            model.train()
            if not was_training:
                model.eval()
            for module, flag in flags:
                module.training = flag
            for module, name, buffer, saved in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)
            random.setstate(python_state)


# Arguments ------------------------------------------------------------------------------------------


def _check_unwrapped(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    wrappers = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")
    if type(model).__name__ in wrappers:
        raise TypeError(
            f"model must be the model itself: attach first, then wrap it in {type(model).__name__}"
        )


def _check_model(model: nn.Module) -> None:
    _check_unwrapped(model)
    old = _voting_of(model)
    if hasattr(model, "zipf_heads") and not (old and old.deep):
        raise RuntimeError("model has an attribute zipf_heads already, the name attach needs for deep heads")


def _check_name(model: nn.Module, argument: str, name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be the name of a module, got {type(name).__name__}")
    if name not in dict(model.named_modules(remove_duplicate=False)) or not name:
        children = ", ".join(n for n, _ in model.named_children())
        raise ValueError(
            f"{argument} must name a module of the model, got {name!r}; at the top there are {children}"
        )


def _is_timm(model: nn.Module) -> bool:
    return all(callable(getattr(model, name, None)) for name in ("forward_features", "get_classifier"))


def _torchvision_names(model: nn.Module) -> tuple[str, str] | None:
    for cls in type(model).__mro__:
        if cls.__module__.startswith("torchvision.") and cls.__name__ in TORCHVISION:
            return TORCHVISION[cls.__name__]
    return None


def _find_classifier(model: nn.Module) -> str:
    """Name of the nn.Linear that gives the logits."""
    names = {module: name for name, module in model.named_modules()}
    if _is_timm(model):
        container = model.get_classifier()
        if not isinstance(container, nn.Module):
            raise RuntimeError(
                f"attach: get_classifier() of this {type(model).__name__} gives a "
                f"{type(container).__name__}, one nn.Linear is needed: classifier=..."
            )
    elif _torchvision_names(model):
        container = model.get_submodule(_torchvision_names(model)[1])
    else:
        raise ValueError(
            f"classifier must name the nn.Linear that gives the logits of this {type(model).__name__}"
        )
    linears = [m for m in container.modules() if isinstance(m, nn.Linear) and m in names]
    if not linears:
        raise RuntimeError(
            f"attach: the classifier of this {type(model).__name__} is a {type(container).__name__}; "
            "an nn.Linear is needed: classifier=..."
        )
    return names[linears[-1]]


def _find_feature(model: nn.Module) -> str | None:
    """Name of the module whose output is the map; None where timm's forward_features tells."""
    if _is_timm(model):
        return None
    if _torchvision_names(model):
        return _torchvision_names(model)[0]
    raise ValueError(
        f"feature must name the module whose output is the dense map of this {type(model).__name__}"
    )


def _known_channels(model: nn.Module, name: str) -> int:
    """Channels of a stage as timm's feature_info has them."""
    info = getattr(model, "feature_info", ())
    for stage in getattr(info, "info", info):
        if isinstance(stage, dict) and stage.get("module") == name:
            return stage["num_chs"]
    raise ValueError(f"deep needs example, a batch as the model takes it, to learn the channels of {name!r}")


def _as_call(example: object) -> tuple[tuple, dict]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, tuple | list):
        return tuple(example), {}
    if isinstance(example, dict):
        return (), example
    raise TypeError(f"example must be a tensor, a tuple of arguments or a dict, got {type(example).__name__}")


def _wrong_map(got: Tensor | None) -> str:
    shape = "no tensor" if got is None else f"shape {tuple(got.shape)}"
    return f"{shape}; needed are (N, D, H, W), (N, H, W, D) or tokens (N, T, D)"


def _names(calls: list[_Call]) -> str:
    return ", ".join(c.name for c in calls) or "pooling"


def _ratio(x: float, y: float) -> float:
    return max(x / y, y / x)
