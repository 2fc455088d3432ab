"""Where a model has its dense map and its classifier: known for three libraries, else by name."""

from __future__ import annotations

from torch import Tensor, nn

from .positions import BY_HAND, is_linear

# Classifiers of libraries: class -> module whose output is the map, module that holds the last nn.Linear, and
# the number of prefix tokens where the probe cannot tell it. "-1" is the last of a sequence.
KNOWN = {
    "torchvision": {
        "AlexNet": ("features", "classifier"),
        "ConvNeXt": ("features", "classifier"),
        "DenseNet": ("features", "classifier"),
        "EfficientNet": ("features", "classifier"),
        "GoogLeNet": ("inception5b", "fc"),
        "Inception3": ("Mixed_7c", "fc"),
        "MNASNet": ("layers", "classifier"),
        "MaxVit": ("blocks.-1", "classifier"),
        "MobileNetV2": ("features", "classifier"),
        "MobileNetV3": ("features", "classifier"),
        "RegNet": ("trunk_output", "fc"),
        "ResNet": ("layer4", "fc"),
        "ShuffleNetV2": ("conv5", "fc"),
        "SqueezeNet": ("features", "classifier"),
        "SwinTransformer": ("permute", "head"),
        "VGG": ("features", "classifier"),
        "VisionTransformer": ("encoder", "heads"),
    },
    "transformers": {
        "ConvNextForImageClassification": ("convnext.encoder.stages.-1", "classifier"),
        "ConvNextV2ForImageClassification": ("convnextv2.encoder.stages.-1", "classifier"),
        "DeiTForImageClassification": ("deit.layernorm", "classifier", 2),  # class and distillation token
        "MobileNetV2ForImageClassification": ("mobilenet_v2.conv_1x1", "classifier"),
        "RegNetForImageClassification": ("regnet.encoder.stages.-1", "classifier"),
        "ResNetForImageClassification": ("resnet.encoder.stages.-1", "classifier"),
        "SwinForImageClassification": ("swin.layernorm", "classifier"),
        "Swinv2ForImageClassification": ("swinv2.layernorm", "classifier"),
        "ViTForImageClassification": ("vit.layernorm", "classifier"),
    },
}


def check_unwrapped(model: nn.Module) -> None:
    """Raise a TypeError for anything but a module that is no wrapper."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    wrappers = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")
    if type(model).__name__ in wrappers:
        raise TypeError(
            f"model must be the model itself: attach first, then wrap it in {type(model).__name__}"
        )


def check_name(model: nn.Module, argument: str, name: object) -> None:
    """Raise for anything but the name of a module of the model."""
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be the name of a module, got {type(name).__name__}")
    if name not in dict(model.named_modules(remove_duplicate=False)) or not name:
        children = ", ".join(n for n, _ in model.named_children())
        raise ValueError(
            f"{argument} must name a module of the model, got {name!r}; at the top there are {children}"
        )


def _is_timm(model: nn.Module) -> bool:
    return all(callable(getattr(model, name, None)) for name in ("forward_features", "get_classifier"))


def _known(model: nn.Module) -> tuple | None:
    """What KNOWN has of a model."""
    for cls in type(model).__mro__:
        found = KNOWN.get(cls.__module__.partition(".")[0], {}).get(cls.__name__)
        if found:
            return found
    return None


def prefix_tokens(model: nn.Module) -> int | None:
    """Tokens at the front that are no positions, where the model or its library tells."""
    known = _known(model)
    return known[2] if known and len(known) > 2 else getattr(model, "num_prefix_tokens", None)


def _resolved(model: nn.Module, name: str) -> str:
    """``name`` with the last of a sequence for "-1"."""
    parts: list[str] = []
    for part in name.split("."):
        part = str(len(model.get_submodule(".".join(parts))) - 1) if part == "-1" else part
        parts.append(part)
    return ".".join(parts)


def find_classifier(model: nn.Module) -> str:
    """Name of the nn.Linear, or 1x1 nn.Conv2d, that gives the logits."""
    names = {module: name for name, module in model.named_modules()}
    if _is_timm(model):
        container = model.get_classifier()
        if not isinstance(container, nn.Module):
            raise RuntimeError(
                f"attach: get_classifier() of this {type(model).__name__} gives a "
                f"{type(container).__name__}: its logits come from several classifiers, and no "
                f"single one can vote. {BY_HAND}"
            )
    elif known := _known(model):
        container = model.get_submodule(known[1])
    else:
        raise ValueError(
            f"classifier must name the nn.Linear that gives the logits of this {type(model).__name__}"
        )
    linears = [m for m in container.modules() if is_linear(m) and m in names]
    if not linears:
        raise RuntimeError(
            f"attach: the classifier of this {type(model).__name__} is a {type(container).__name__}; "
            "an nn.Linear, or an nn.Conv2d of kernel 1, is needed: classifier=..."
        )
    return names[linears[-1]]


def find_feature(model: nn.Module) -> str | None:
    """Name of the module whose output is the map; None where timm's forward_features tells."""
    if _is_timm(model):
        return None
    if known := _known(model):
        return _resolved(model, known[0])
    raise ValueError(
        f"feature must name the module whose output is the dense map of this {type(model).__name__}"
    )


def known_channels(model: nn.Module, name: str) -> int:
    """Channels of a stage as timm's feature_info has them."""
    info = getattr(model, "feature_info", ())
    for stage in getattr(info, "info", info):
        if isinstance(stage, dict) and stage.get("module") == name:
            return stage["num_chs"]
    raise ValueError(f"deep needs example, a batch as the model takes it, to learn the channels of {name!r}")


def as_call(example: object) -> tuple[tuple, dict]:
    """Positional and keyword arguments of the example."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, tuple | list):
        return tuple(example), {}
    if isinstance(example, dict):
        return (), example
    raise TypeError(f"example must be a tensor, a tuple of arguments or a dict, got {type(example).__name__}")
