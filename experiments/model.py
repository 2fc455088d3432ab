"""The networks that --model names, how they vote, and the losses that --loss names."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import zipfls_cuda as zls

from .common import UsageError

# On x86 processors without AVX-512, oneDNN 3.12 (torch 2.13 and 2.14) writes out of bounds in the backward of
# strided 1x1 convolutions with fewer than 8 input channels of channels_last maps: gradients are wrong, or the
# process crashes or never ends. ONEDNN_MAX_CPU_ISA=AVX2 shows it on any x86 processor.
MIN_WIDTH = 8


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if inputs != outputs or stride != 1:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al.: depth 6n+2, three stages, the last map a quarter of the input.

    With S stages the depth is 2Sn+2, and the last map is smaller than the input by 2 ** (S - 1), times the
    stem's stride. Images (N, channels, H, W) -> logits (N, C).
    """

    def __init__(
        self,
        depth: int,
        channels: int,
        num_classes: int,
        width: int = 16,
        stages: int = 3,
        stem_stride: int = 1,
    ):
        super().__init__()
        blocks = (depth - 2) // (2 * stages)
        conv = nn.Conv2d(channels, width, 3, stem_stride, padding=1, bias=False)
        layers = [conv, nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
        for stage in range(stages):
            for block in range(blocks):
                outputs = width * 2**stage
                layers.append(Block(inputs, outputs, stride=2 if stage and not block else 1))
                inputs = outputs
        self.body = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # The last module of each stage, as timm's models tell it.
        self.feature_info = [{"module": f"body.{2 + (stage + 1) * blocks}"} for stage in range(stages)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.body(images)  # (N, D, H/4, W/4) with 3 stages: the dense map, before pooling
        return self.fc(features.mean((2, 3)))


class ModelError(UsageError):
    """The model does not exist, or its positions cannot vote."""

    option = "--model"


def make_network(args: argparse.Namespace, channels: int, num_classes: int) -> nn.Module:
    """The network that --model names."""
    if args.model == "resnet":
        return ResNet(args.depth, channels, num_classes, args.width, args.stages, args.stem_stride)
    try:
        import timm

        name = args.model.removeprefix("timm:")
        known = timm.get_pretrained_cfg(name)
        size = {"img_size": args.size} if known and known.fixed_input_size else {}
        return timm.create_model(name, num_classes=num_classes, in_chans=channels, **size)
    except (ImportError, RuntimeError) as error:
        raise ModelError(f"cannot make {args.model}: {error}") from error


def stages(net: nn.Module) -> list[str]:
    """Names of the stages' last modules, the deepest last; empty if the network does not tell."""
    found = getattr(net, "feature_info", [])
    return [stage["module"] for stage in getattr(found, "info", found)]


def attach_votes(net: nn.Module, args: argparse.Namespace, example: torch.Tensor) -> zls.Handle:
    """Let a network vote; the handle is for ZipfLoss(votes=...)."""
    if args.deep and len(stages(net)) < 2:
        raise ModelError(f"{args.model} does not tell its stages, which --deep needs")
    options = {"feature": "body", "classifier": "fc"} if isinstance(net, ResNet) else {}
    options["deep"] = stages(net)[-2:-1] if args.deep else ()
    try:
        return zls.attach(net, upsample=args.upsample, example=example, **options)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{args.model}: {error}") from error


LOSSES = {
    "ce": "cross-entropy",
    "ls": "label smoothing",
    "zipf": "Zipf's label smoothing",
}

LAWS = {  # what --distribution may name, with the default of its number where it takes one
    "constant": (zls.Constant,),
    "linear": (zls.LinearDecay, 0.0),
    "exponential": (zls.ExponentialDecay, 1.0),
    "uniform": (zls.RandomUniform,),
    "pareto": (zls.RandomPareto, 1.0),
}


class LawError(UsageError):
    """The distribution does not exist, or not for this number of classes."""

    option = "--distribution"


def make_law(text: str) -> zls.Distribution:
    """The law that --distribution names: NAME or NAME:NUMBER."""
    name, colon, number = text.partition(":")
    if name not in LAWS:
        raise LawError(f"{name!r} is not one of {', '.join(LAWS)}")
    law, *default = LAWS[name]
    if colon and not default:
        raise LawError(f"{name!r} takes no number")
    try:
        return law(float(number)) if colon else law(*default)
    except ValueError as error:
        raise LawError(f"{text!r}: {error}") from error


def make_loss(name: str, args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The training criterion that --loss names."""
    if name == "ce":
        return nn.CrossEntropyLoss()
    if name == "ls":
        return nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    weights = {"zipf_weight": args.zipf_weight, "deep_weight": args.deep_weight, "ranking": args.ranking}
    if args.distribution is None:
        return zls.ZipfLoss(alpha=args.alpha, **weights)
    law = make_law(args.distribution)
    try:  # some laws exist for few classes only
        zls.zipf_label(torch.zeros(1).long(), torch.zeros(1, 1).int(), num_classes, distribution=law)
    except ValueError as error:
        raise LawError(str(error)) from error
    return zls.ZipfLoss(distribution=law, **weights)
