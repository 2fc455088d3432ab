"""The related methods that --method names, and what a training step gives each of them.

A method is a class of losses. What it takes is told by names: its constructor gets those of num_classes,
num_samples, targets and epochs that it has, and its forward names what a step must find (`Method.step`).
A line in METHODS is all that another one needs.

Not here: DynamicMLP, as the data have neither place nor date.
"""

import argparse
import functools
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from zipfls_cuda import methods

from .common import Place
from .data import Data
from .model import ModelError, make_network, stages

DIM = 128  # of an embedding


class Mixed(nn.Module):
    """RecursiveMix: cross-entropy with the mixed label, and the consistency of the box."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.mix = methods.RecursiveMix(num_classes=num_classes, omega=0.1)

    def forward(self, logits, roi_logits, soft_target):
        return F.cross_entropy(logits, soft_target) + self.mix.consistency(roi_logits, logits)


class Instances(nn.Module):
    """Stage 1 of contrastive temporal coding."""

    def __init__(self, num_samples: int):
        super().__init__()
        self.memory = methods.InstanceMemory(num_samples, DIM, temperature=0.5, momentum=0.9)

    def forward(self, logits, embedding, index, target):
        return F.cross_entropy(logits, target) + 0.1 * self.memory.instance_loss(embedding, index)


class Contrast(nn.Module):
    """Stage 2, against the network of stage 1."""

    def __init__(self, num_samples: int, targets: torch.Tensor):
        super().__init__()
        options = {"temperature": 0.4, "momentum": 0.9, "targets": targets}
        self.memory = methods.InstanceMemory(num_samples, DIM, negatives=min(16384, num_samples), **options)

    def forward(self, logits, embedding, frozen_embedding, index, target):
        contrast = self.memory.contrast_loss(embedding, frozen_embedding, index)
        return F.cross_entropy(logits, target) + contrast


METHODS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "kd": ("KD", methods.KDLoss),
    "dkd": ("DKD", methods.DKDLoss),
    "nkd": ("NKD", methods.NKDLoss),
    "wsld": ("WSLD", methods.WSLDLoss),
    "tfkd-self": ("Tf-KD, self-training", methods.TfKDSelfLoss),
    "cskd": ("CS-KD", methods.CSKDLoss),
    "mrkd": ("MrKD", functools.partial(methods.MrKDLoss, alpha=0.5, temperature=4.0)),
    "tfkd-reg": ("Tf-KD, regularisation", methods.TfKDRegLoss),
    "lsrkd": ("LsrKD", functools.partial(methods.LsrKDLoss, alpha=0.1, temperature=4.0)),
    "maxsup": ("MaxSup", methods.MaxSupLoss),
    "ols": ("online label smoothing", methods.OLSLoss),
    "pskd": ("PS-KD", methods.PSKDLoss),
    "bake": ("BAKE", methods.BAKELoss),
    "uskd": ("USKD", methods.USKDLoss),
    "ddgsd": ("DDGSD", methods.DDGSDLoss),
    "byot": ("BYOT", methods.BYOTLoss),
    "rm": ("RecursiveMix", Mixed),
    "ctc": ("contrastive temporal coding, stage 1", Instances),
    "ctc2": ("contrastive temporal coding, stage 2", Contrast),
}
EVERY, COPIES = 2, 2  # MrKD: epochs between copies, and how many


def wants(name: str) -> set[str]:
    """What the method's forward takes; nothing for a loss that is none of METHODS."""
    if name not in METHODS:
        return set()
    made = METHODS[name][1]
    made = made.func if isinstance(made, functools.partial) else made
    return {*inspect.signature(made.forward).parameters} - {"self"}


def teacher_of(name: str) -> str | None:
    """The loss whose network teaches this method; it is trained before."""
    if "frozen_embedding" in wants(name):
        return "ctc"
    return "ce" if "teacher" in wants(name) else None


def with_teachers(losses: list[str]) -> list[str]:
    """The losses in order, each after the one that its teacher is trained with."""
    found: list[str] = []
    for name in losses:
        teacher = teacher_of(name)
        found += [*with_teachers([teacher] if teacher else []), name]
    return list(dict.fromkeys(found))


class Outputs(nn.Module):
    """A network with the heads that a method wants; a call gives its outputs by name."""

    def __init__(self, net: nn.Module, wanted: set[str], num_classes: int, example: torch.Tensor):
        super().__init__()
        self.net, self.heads, heads = net, nn.ModuleDict(), {}
        self.stages = stages(net) if wanted & MAPS else []
        if not self.stages:
            return
        with torch.no_grad():
            channels = [x.shape[1] for x in self.run(example)[1]]  # of each stage
        if len(channels) < 2 or any(x.dim() != 4 for x in self.run(example)[1]):
            raise ModelError("this method needs a network with stages of maps (N, D, H, W)")
        *earlier, D = channels
        earlier.reverse()
        if "weak_logits" in wanted:
            heads["weak"] = nn.Linear(earlier[0], num_classes)
        if "branch_logits" in wanted:
            heads["branches"] = nn.ModuleList(nn.Linear(d, num_classes) for d in earlier)
            heads["adapters"] = nn.ModuleList(nn.Linear(d, D) for d in earlier[1:])  # branch 1 has no hint
        if "roi_logits" in wanted:
            heads["roi"] = nn.Linear(D, num_classes)
        for name in wanted & {"embedding", "frozen_embedding"}:
            heads[name] = nn.Linear(D, DIM)
        self.heads.update(heads)

    def run(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits, and the maps of the stages, the deepest last."""
        maps, modules = [], [self.net.get_submodule(name) for name in self.stages]
        hooks = [m.register_forward_hook(lambda module, args, x: maps.append(x)) for m in modules]
        try:
            return self.net(images), maps
        finally:
            for hook in hooks:
                hook.remove()

    def forward(self, images, pool=None, frozen_features=None):
        """Outputs by name; `pool` makes features of a box of the last map."""
        logits, maps = self.run(images)
        found = {"logits": logits}
        if not maps:
            return found
        pooled, heads = [x.mean((2, 3)) for x in reversed(maps)], self.heads
        found["features"] = pooled[0]
        if "weak" in heads:
            found["weak_logits"] = heads["weak"](pooled[1])
        if "branches" in heads:
            pairs = zip(heads["branches"], pooled[1:], strict=True)
            found["branch_logits"] = [logits, *(head(x) for head, x in pairs)]
            pairs = zip(heads["adapters"], pooled[2:], strict=True)
            found["branch_features"] = [pooled[0], None, *(adapt(x) for adapt, x in pairs)]
        if "roi" in heads:
            found["roi_logits"] = heads["roi"](pool(maps[-1]))
        if "embedding" in heads:
            found["embedding"] = F.normalize(heads["embedding"](pooled[0]))
        if "frozen_embedding" in heads:
            found["frozen_embedding"] = F.normalize(heads["frozen_embedding"](frozen_features))
        return found


HEADS = {"weak_logits", "branch_logits", "roi_logits", "embedding", "frozen_embedding"}
MAPS = HEADS | {"features", "features_a"}  # what needs the maps of the stages


class Method(nn.Module):
    """One method at work on a network: its loss, heads, teacher or copies; state_dict holds them."""

    def __init__(self, name: str, net: nn.Module, data: Data, args: argparse.Namespace, place: Place):
        super().__init__()
        self.wants, self.teacher_loss = wants(name), teacher_of(name)
        labels, shape, C = data.train.labels, data.train.images.shape[1:], len(data.classes)
        facts = {"num_classes": C, "num_samples": len(labels), "targets": labels, "epochs": args.epochs}
        make = METHODS[name][1]
        taken = inspect.signature(make).parameters
        self.criterion = make(**{k: v for k, v in facts.items() if k in taken}).to(place.device)
        example = torch.zeros(2, *shape, device=place.device)
        self.outputs = Outputs(net.eval(), self.wants, C, example).to(place.device)
        self.teacher = self.copies = None
        if self.teacher_loss:
            teacher = make_network(args, shape[0], C).to(place.device, memory_format=torch.channels_last)
            self.teacher = Outputs(teacher.eval(), self.wants & {"frozen_embedding"}, C, example)
            self.teacher.requires_grad_(False)
            self.teacher.heads.clear()
        if "teachers" in self.wants:
            self.copies = methods.SnapshotTeacher(net, every=EVERY, copies=COPIES)
        wrap = nn.parallel.DistributedDataParallel if place.processes > 1 else lambda model: model
        self.model = [wrap(self.outputs)]  # in a list: its parameters are those of `outputs`

    def train(self, mode: bool = True) -> "Method":
        """As nn.Module.train; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher:
            self.teacher.eval()
        return self

    def learn_from(self, weights: dict) -> None:
        """Give the teacher its weights; stage 2 of contrastive temporal coding goes on from them too."""
        self.teacher.net.load_state_dict(weights)
        if "frozen_embedding" in self.wants:
            self.outputs.net.load_state_dict(weights)

    def begin_epoch(self, epoch: int) -> None:
        """Before an epoch, from 0."""
        if hasattr(self.criterion, "set_epoch"):
            self.criterion.set_epoch(epoch)

    def end_epoch(self) -> None:
        """After an epoch."""
        if hasattr(self.criterion, "end_epoch"):
            self.criterion.end_epoch()
        if self.copies:
            self.copies.step()

    def step(self, images, labels, index) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n, C) and loss of a batch: `images` (n, ...), or twice as many, views or partners after."""
        n, given, more = len(labels), {"target": labels, "index": index}, {}
        if "partner_logits" in self.wants:
            images, partners = images[:n], images[n:]
        if "soft_target" in self.wants:
            mix = self.criterion.mix
            images, given["soft_target"], box = mix(images, labels)
            more["pool"] = functools.partial(mix.pool, box=box)
        with torch.no_grad():
            if self.teacher:
                given["teacher"], maps = self.teacher.run(images)
                more |= {"frozen_features": maps[-1].mean((2, 3))} if maps else {}
            if self.copies:
                given["teachers"] = self.copies(images)
        given |= self.model[0](images, **more)
        if "partner_logits" in self.wants:
            with torch.no_grad():
                given["partner_logits"] = self.outputs.net(partners)
        if "logits_a" in self.wants:
            for name in ("logits", "features"):
                given[f"{name}_a"], given[f"{name}_b"] = given[name].chunk(2)
        return given["logits"][:n], self.criterion(**{name: given[name] for name in self.wants})
