"""The probe: one run of the model decides how the positions of its map vote."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.utils._pytree import tree_leaves

from ..checks import autocast_enabled
from . import positions
from .models import prefix_tokens
from .positions import (
    BY_HAND,
    CLASS_TOKEN,
    GLOBAL_POOLING,
    MAP,
    MAP_CHANNELS_LAST,
    PER_POSITION,
    TOKENS,
    TOKENS_LAST,
    Plan,
)

PROBE_SAMPLES = 4  # rows of the example, or of the first batch, that the probe looks at
PROBE_POSITIONS = 8  # positions per sample that run through the head in the probe
MAX_PREFIX = 4  # prefix tokens tried where the model does not tell their number

if TYPE_CHECKING:
    from .hooks import Voting


@dataclasses.dataclass
class _Call:
    """One call of one module."""

    name: str
    began: int
    ended: int
    input: Tensor | None  # the first positional argument, if a tensor
    fuses: bool  # it takes further tensors
    output: Tensor | None
    overwrote: bool  # its input
    autocast: tuple[str, torch.dtype] | None  # that it ran under


class Probe:
    """Runs the model in eval mode and works out a Plan."""

    def __init__(
        self, voting: Voting, model: nn.Module, args: tuple, kwargs: dict, heads: nn.ModuleList | None
    ) -> None:
        self.voting, self.model = voting, model
        self.heads = heads  # of the deep maps, where they are made already
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
            with positions.autocast_again(seat.autocast):
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

        def began(module, args, kwargs):
            given = args[0] if args and isinstance(args[0], Tensor) else None
            fuses = any(isinstance(x, Tensor) for x in (*args[1:], *kwargs.values()))
            open_calls.append((next(clock), given, fuses, _version(given)))

        def ended(name):
            def hook(module, args, output):
                start, given, fuses, version = open_calls.pop()
                output = output if isinstance(output, Tensor) else None
                overwrote, seen = _overwritten(given, version), given if output is None else output
                autocast = None if seen is None else positions.autocast_of(seen)
                calls.append(_Call(name, start, next(clock), given, fuses, output, overwrote, autocast))

            return hook

        with contextlib.ExitStack() as stack:
            for name, module in self.model.named_modules():
                if name:
                    stack.callback(module.register_forward_pre_hook(began, with_kwargs=True).remove)
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
        return seen[0].flatten(1)  # (N, D)

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
        name, logits = self.voting.classifier, logits_of(logits)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise self.refusal(f"in eval mode it returns {got}, and logits (N, C) are needed")
        count = sum(c.name == name for c in calls)
        if count > 1:
            raise self.refusal(f"the classifier {name!r} runs {count} times in one forward")
        voter, linear = self.last_call(calls, name), self.model.get_submodule(name)
        pooled = voter.input
        if pooled is None or not (pooled.dim() == 2 or (pooled.dim() == 4 and pooled[0, 0].numel() == 1)):
            got = "no tensor by position" if pooled is None else f"shape {tuple(pooled.shape)}"
            raise self.refusal(
                f"the classifier {name!r} takes {got}, not pooled features (N, D) or (N, D, 1, 1)"
                + (
                    f": the model pools its scores. {BY_HAND}"
                    if pooled is not None and pooled.dim() == 4
                    else ""
                )
            )
        voter = dataclasses.replace(voter, input=pooled.flatten(1), output=voter.output.flatten(1))
        with positions.autocast_again(voter.autocast):
            affine = F.linear(voter.input, *positions.matrix(linear))
            tolerance = self.tolerance(affine)
        if self.gap(affine, voter.output) > tolerance:
            raise self.refusal(f"the classifier {name!r} does more than weight @ features + bias")
        if self.gap(voter.output, logits) > self.tolerance(logits):
            raise self.refusal(
                f"the logits are not the output of {name!r}: the model changes it, or has another "
                f"classifier. {BY_HAND}"
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
        if self.heads is not None:  # made already, where feature_info told the channels
            known = self.heads[self.voting.deep.index(name)].in_features
            channels = {layout: D for layout, D in channels.items() if known == D}
            if not channels:
                raise self.refusal(
                    f"deep={name!r} gives shape {tuple(out.shape)}, its head takes {known} channels"
                )
        layout = next(iter(channels))
        self.positions.append(positions.rows(out, layout, prefix).shape[1])
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
        """kind, layout, prefix, head and fusion, by the numbers; of two possible layouts the likelier.

        Both are possible where a head's norm broadcasts: it takes the channels for those of another layout.
        """
        found, problems = [], []
        fusion, added = self.fusion(between)
        for layout in (TOKENS,) if features.dim() == 3 else self.channels_by_aspect(features):
            prefix, is_token = self.prefix(features, between, voter) if layout == TOKENS else (0, False)
            rows = positions.rows(features, layout, prefix)
            if rows.shape[1] == 0:
                raise self.refusal(f"the map has no positions, its shape is {tuple(features.shape)}")
            try:
                head = self.needed_head([c for c in between if c is not fusion], rows, layout)
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
                gap = min(self.gap(x + added, voter.input) for x in pooled)
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
            decision["fusion"] = fusion and fusion.name
            found.append((kind == PER_POSITION, len(found), decision, rows.shape[1]))
        if not found:
            raise self.refusal(problems[0])
        *_, decision, count = min(found, key=lambda f: f[:2])
        self.positions.append(count)
        return decision

    def fusion(self, between: list[_Call]) -> tuple[_Call | None, Tensor | float]:
        """The one module that fuses pooled features with further tensors, and what it adds to them (N, D).

        It cannot run on a position alone. Every position takes what was added to the mean of them, so that
        the mean of the positions' scores stays the logits.
        """
        fusing = [c for c in between if c.fuses and c.input is not None and c.input.dim() == 2]
        if len(fusing) != 1 or fusing[0].output is None or fusing[0].output.shape != fusing[0].input.shape:
            return None, 0.0
        return fusing[0], fusing[0].output - fusing[0].input

    def prefix(self, tokens: Tensor, between: list[_Call], voter: _Call) -> tuple[int, bool]:
        """Number of prefix tokens, and whether the first of them is the class token that gives the logits."""
        pooled = next(x for x in [*(c.input for c in between), voter.input] if x is not None and x.dim() == 2)
        known = prefix_tokens(self.model)
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
            taken = _layout_of(call.input, x.flatten(1).shape[1], layout)
            x = positions.shape_for(x, call.input.dim(), taken)
            out = module(x.clone())  # in-place modules overwrite what they get
            if not isinstance(out, Tensor):
                raise TypeError(f"{call.name!r} gives no tensor")
            bare = next(module.parameters(), None) is None and next(module.buffers(), None) is None
            if bare:
                wild = torch.randn_like(x) * 100
                pairs = ((out, x), (module(wild.clone()), wild))
                bare = all(torch.equal(y.flatten(1), z.flatten(1)) for y, z in pairs)
            if not bare and taken != layout:
                raise TypeError(
                    f"{call.name!r} takes the map in another layout, without a module that permutes it"
                )
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
            filled = torch.empty_like(features).copy_(positions.shape_for(row, features.dim(), layout))
            alone = positions.run_head(self.model, head, row.clone(), layout)
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


def _layout_of(x: Tensor, channels: int, layout: str) -> str:
    """The layout of a map that a module takes: ``layout`` unless the other one alone has so many channels."""
    layouts = {4: (MAP, MAP_CHANNELS_LAST), 3: (TOKENS_LAST, TOKENS)}.get(x.dim(), ())
    fitting = [kind for kind, axis in zip(layouts, (1, -1), strict=False) if x.shape[axis] == channels]
    return fitting[0] if len(fitting) == 1 and layout in layouts else layout


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


def _wrong_map(got: Tensor | None) -> str:
    shape = "no tensor" if got is None else f"shape {tuple(got.shape)}"
    return f"{shape}; needed are (N, D, H, W), (N, H, W, D) or tokens (N, T, D)"


def _names(calls: list[_Call]) -> str:
    return ", ".join(c.name for c in calls) or "pooling"


def _ratio(x: float, y: float) -> float:
    return max(x / y, y / x)


def logits_of(output: object) -> object:
    """The logits of what a model returns: a tensor, or an object with ``.logits``."""
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)
