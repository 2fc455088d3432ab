"""The hooks of an attached model, and the votes of its last training forward."""

from __future__ import annotations

import threading
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import compiling
from . import positions
from .positions import MAP, Plan
from .probe import Probe, logits_of

# A map that a hook kept, and the autocast of its module.
Kept = tuple[Tensor, tuple[str, torch.dtype] | None]


class Voting:
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
        self.running: tuple[int | None, dict[tuple[str, str], Kept]] | None = None
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
        logits = output if self.returns == "tuple" else logits_of(output)
        if not isinstance(logits, Tensor):
            or_object = "" if self.returns == "tuple" else " or an object with .logits"
            raise RuntimeError(
                f"attach: in training mode the model returns a {type(output).__name__}, not logits (N, C)"
                f"{or_object}"
            )
        with positions.autocast_again(_kept(kept, self.plan.seat, self.plan.side)[1]):
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

    def keep(self, name: str, side: str, features: Tensor) -> None:
        """Keep the map that ``name`` takes or gives, if a forward that votes runs."""
        if self.is_running():
            self.running[1][name, side] = features, positions.autocast_of(features)

    def vote(self, model: nn.Module, kept: dict[tuple[str, str], Kept]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Votes (N, P) of all maps, and deep logits."""
        plan = self.plan
        linear = model.get_submodule(plan.classifier)
        if not positions.is_linear(linear):
            raise RuntimeError(
                f"attach: the classifier {plan.classifier!r} has become a {type(linear).__name__}, whose "
                "weight is not all that gives the logits (an adapter, a wrapper): attach again"
            )
        features = _kept(kept, plan.seat, plan.side)[0].detach()
        with torch.no_grad():
            if plan.fusion:
                added = _kept(kept, plan.fusion, "added")[0].to(features.dtype)  # (N, D)
                features = features + positions.shape_for(added, features.dim(), plan.layout)
            if plan.head:
                votes = self.vote_through_head(model, features, linear)
            else:
                votes = positions.vote(
                    positions.as_map(features, plan.layout, plan.prefix), linear, self.upsample
                )
        all_votes, deep_logits = [votes], []
        for (name, layout, _), head in zip(plan.deep, model.zipf_heads if plan.deep else (), strict=True):
            features = positions.as_map(_kept(kept, name, "output")[0], layout, plan.prefix)
            pooled = features.mean(1) if features.dim() == 3 else features.mean((2, 3))
            deep_logits.append(head(positions.cast(pooled, head.weight)))
            all_votes.append(positions.vote(features.detach(), head, self.upsample))
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

    def vote_through_head(self, model: nn.Module, features: Tensor, linear: nn.Linear | nn.Conv2d) -> Tensor:
        """Votes (N, P) of features that go through the model's head first, each position by itself."""
        layout, prefix = self.plan.layout, self.plan.prefix
        if self.upsample == 2:  # before the head, which need not be affine
            features = F.interpolate(
                positions.as_map(features, layout, prefix),
                scale_factor=2,
                mode="bilinear",
                align_corners=False,
            )
            layout = MAP
        rows = positions.rows(features, layout, prefix)
        N, P = rows.shape[:2]
        rows = rows.clone(memory_format=torch.contiguous_format)  # the head may hold an in-place activation
        rows = positions.run_head(model, self.plan.head, rows.flatten(0, 1), self.plan.layout)
        return positions.vote(rows.unflatten(0, (N, P)), linear)

    def probe(self, model: nn.Module, args: tuple, kwargs: dict) -> Plan:
        heads = model.zipf_heads if self.deep and voting_of(model) is self else None
        probe = Probe(self, model, args, kwargs, heads)
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
        if plan.fusion:
            model.get_submodule(plan.fusion).register_forward_hook(_KeepAdded(self, plan.fusion))
        for name in dict.fromkeys(name for name, _, _ in plan.deep):
            if (name, "output") != (plan.seat, plan.side):
                model.get_submodule(name).register_forward_hook(_KeepOutput(self, name))
        self.plan = plan


class _Hook:
    """One hook of an attached model, known by its class."""

    def __init__(self, voting: Voting, name: str = "") -> None:
        self.voting, self.name = voting, name

    @property
    def __name__(self) -> str:
        """torch.jit.script asks for it first, and can do nothing with the hooks."""
        raise AttributeError(
            "attach: torch.jit.script cannot compile the hooks of an attached model: zls.detach(model) first"
        )


class Before(_Hook):
    """Begins a forward of the model."""

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.voting.begin(model, args, kwargs)


class After(_Hook):
    """Ends a forward of the model: the kept maps vote."""

    def __call__(self, model: nn.Module, args: tuple, output: object) -> object:
        return self.voting.end(model, output)


class _KeepInput(_Hook):
    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.voting.keep(self.name, "input", args[0])


class _KeepOutput(_Hook):
    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.voting.keep(self.name, "output", output)


class _KeepAdded(_Hook):
    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.voting.is_running():
            self.voting.keep(self.name, "added", output.detach() - args[0].detach())


@compiling.eager(
    "zipfls_cuda.attach probes the model on its first training batch, which cannot be compiled: "
    "give attach an example, or train one batch before compiling"
)
def _probe_first_batch(voting: Voting, model: nn.Module, args: tuple, kwargs: dict) -> None:
    voting.follow(model, voting.probe(model, args, kwargs))


def voting_of(model: nn.Module) -> Voting | None:
    """What the hooks of an attached model share; None if it is not attached."""
    return next((hook.voting for hook in model._forward_hooks.values() if isinstance(hook, After)), None)


def undo(model: nn.Module, voting: Voting, reason: str) -> None:
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


def deep_heads(
    model: nn.Module, voting: Voting, channels: list[int], linear: nn.Linear | nn.Conv2d
) -> nn.ModuleList:
    """A linear head for each deep map; those of an earlier attach where maps and shapes are the same."""
    shapes = [(linear.weight.shape[0], d) for d in channels]
    old = voting_of(model)
    if old and old.deep == voting.deep and [tuple(h.weight.shape) for h in model.zipf_heads] == shapes:
        return model.zipf_heads
    like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    with torch.inference_mode(False):  # parameters made in inference mode cannot be trained
        return nn.ModuleList(nn.Linear(d, classes, **like) for classes, d in shapes)


def _with_logits(output: object, logits: Tensor) -> object:
    """``output`` with other logits."""
    if isinstance(output, Tensor):
        return logits
    if hasattr(output, "_replace"):  # a namedtuple
        return output._replace(logits=logits)
    output.logits = logits
    return output


def _kept(kept: dict[tuple[str, str], Kept], name: str, side: str) -> Kept:
    if (name, side) not in kept:
        raise RuntimeError(
            f"attach: the module {name!r} has no map to vote: it did not run in this forward, or another "
            "took its place (then attach again)"
        )
    return kept[name, side]
