"""User-facing messages: what is wrong with an argument, what was given, what is expected.

Nothing here looks at a tensor's values, so nothing synchronises; ``check_inputs`` alone does, on request.
Options come back as plain Python numbers, and the target in the type that the operators take.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import labels, scalars
from .labels import Distribution
from .reference import raise_outside

REDUCTIONS = ("mean", "sum", "none")
FORMS = ("divergence", "cross_entropy")
FORMS_OF_METHODS = (*FORMS, "probabilities")
DEFAULT_ALPHA = float("1.0")  # an object of its own: tells alpha left out from alpha=1.0 given
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_dtensor(x: object) -> bool:
    """Whether ``x`` is a DTensor, told by name: torch.distributed.tensor is slow to load."""
    return type(x).__name__ == "DTensor"


def is_class_shard(x: object, dim: int) -> bool:
    """Whether ``x`` is a DTensor with its classes, axis ``dim``, sharded over a mesh."""
    return is_dtensor(x) and any(p.is_shard(dim) for p in x.placements)


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; torch raises an error if asked for the meta device."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _tensor(name: str, x: object) -> None:
    if type(x) is Tensor:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if is_dtensor(x):
        raise TypeError(
            f"{name} is a DTensor, of which a kernel would see one shard; give it {name}.full_tensor(), "
            "or call inside the forward of the FSDP module that owns it"
        )


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _float(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def _same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {x.device}")


def number(name: str, x: object, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in [low, high]."""
    x = scalars.number(name, x)
    if not (
        low <= x <= high and abs(x) < math.inf
    ):  # comparisons trace under torch.compile, isfinite does not
        expected = "finite" if low == -math.inf else f"in [{low:g}, {high:g}]" if high < math.inf else ">= 0"
        raise ValueError(f"{name} must be {expected}, got {x!r}")
    return x


def constant(name: str, x: Tensor | None) -> None:
    """A weight of classes or samples wants no gradient, unless none is recorded, as in F.cross_entropy."""
    if x is not None and x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} must not require grad, as gradients flow to logits alone; give {name}.detach()"
        )


def class_weight(x: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Class ``weight`` (C,) of the cross-entropy."""
    _tensor("weight", x)
    if x.dim() != 1 if shape is None else x.shape != shape:
        raise ValueError(
            f"weight must have shape (C,){'' if shape is None else f' = {shape}'}, got {_shape(x)}"
        )
    _float("weight", x)
    constant("weight", x)


def num_classes(value: object) -> int:
    """``num_classes`` C >= 2."""
    value = scalars.integer("num_classes", value)
    if value < 2:
        raise ValueError(f"num_classes must be at least 2, got {value}")
    return value


def votes(x: Tensor, num_samples: int | None = None) -> None:
    """``votes`` (N, P) int32 or int64."""
    _tensor("votes", x)
    if x.dim() != 2:
        raise ValueError(f"votes must have shape (N, P), got {_shape(x)}")
    if x.dtype != torch.int32 and x.dtype != torch.int64:
        raise TypeError(f"votes must be int32 or int64, got {x.dtype}")
    if num_samples is not None and x.shape[0] != num_samples:
        raise ValueError(f"votes must have one row per sample, ({num_samples}, P), got {_shape(x)}")


def target(x: Tensor, num_samples: int | None = None) -> Tensor:
    """``target`` (N,) int64, or uint8, which becomes int64: uint8 could not hold every ``ignore_index``."""
    _tensor("target", x)
    if x.dim() != 1 or (num_samples is not None and x.shape[0] != num_samples):
        expected = "(N,)" if num_samples is None else f"({num_samples},), one class per row of logits"
        raise ValueError(f"target must have shape {expected}, got {_shape(x)}")
    if x.dtype == torch.uint8:
        return x.long()
    if x.dtype != torch.int64:
        raise TypeError(f"target must be int64 class indices, got {x.dtype}")
    return x


def is_soft(t: object) -> bool:
    """Whether a target is of probabilities (N, C) rather than of class indices (N,)."""
    return isinstance(t, Tensor) and t.dim() == 2


def soft_target(t: Tensor, shape: tuple[int, ...]) -> None:
    """``target`` (N, C) probabilities, in any float type."""
    _tensor("target", t)
    if t.shape != shape:
        raise ValueError(
            f"target must have shape ({shape[0]},), one class per row of logits, or {tuple(shape)}, "
            f"probabilities, got {_shape(t)}"
        )
    if t.dtype not in FLOATS:
        raise TypeError(
            f"target must be float32, bfloat16, float16 or float64 probabilities where its shape is that of "
            f"logits, got {t.dtype}"
        )
    if t.requires_grad:
        raise ValueError(
            "target must not require grad, as gradients flow to logits alone; give target.detach()"
        )


def no_ignore_index(ignore_index: int) -> None:
    """``ignore_index`` beside a target of probabilities, which has no samples to ignore."""
    if ignore_index >= 0:
        raise ValueError(
            "ignore_index must be left out, or negative, where target is of probabilities, which name no "
            f"class to ignore; got {ignore_index}"
        )


def inplace(x: Tensor, sharded: bool) -> None:
    """Logits that the gradient may be written over."""
    if sharded:
        raise ValueError("inplace must be False for class shards (process_group)")
    if x.is_leaf or (x._base is not None and x._base.is_leaf):
        raise ValueError(
            "inplace needs logits that an operation made: these are a leaf of the graph, or a view of one, "
            "which the gradient would overwrite"
        )
    if not x.is_contiguous():
        raise ValueError(f"inplace needs contiguous logits, got strides {x.stride()}")


def label_inputs(t: Tensor, v: Tensor) -> Tensor:
    """``target`` and ``votes`` of zipf_label; returns the target."""
    t = target(t)
    votes(v, t.shape[0])
    _same_device("votes", v, "target", t)
    return t


def _logits(x: Tensor, shard: bool) -> tuple[int, int]:
    """``logits`` (N, C) of a loss; returns N and C."""
    _tensor("logits", x)
    if x.dim() != 2:
        raise ValueError(f"logits must have shape (N, C), got {_shape(x)}")
    _float("logits", x)
    if x.shape[1] < 2 and not shard:
        raise ValueError(f"logits must have at least 2 classes, got shape {_shape(x)}")
    return x.shape[0], x.shape[1]


def loss_inputs(
    logits: Tensor, t: Tensor, v: Tensor | None, weight: Tensor | None = None, *, shard: bool = False
) -> Tensor:
    """The tensors of the loss: ranks, shapes, dtypes, devices. A ``shard`` may have any number of classes.

    Returns the target: class indices in int64, probabilities as they are.
    """
    N, C = _logits(logits, shard)
    if not is_soft(t):
        t = target(t, N)
    elif shard:
        raise ValueError(f"target must be class indices ({N},) for class shards, got {_shape(t)}")
    else:
        soft_target(t, (N, C))
    _same_device("target", t, "logits", logits)
    if v is not None:
        votes(v, N)
        _same_device("votes", v, "logits", logits)
    if weight is not None:
        class_weight(weight, (C,))
        _same_device("weight", weight, "logits", logits)
    return t


def loss_options(
    zipf_weight: float, label_smoothing: float, only_correct: bool, ignore_index: int, reduction: str
) -> tuple[float, float, bool, int, str]:
    """The numbers and names among the loss's options, in this order."""
    zipf_weight = number("zipf_weight", zipf_weight)
    label_smoothing = number("label_smoothing", label_smoothing, 0.0, 1.0)
    only_correct = scalars.flag("only_correct", only_correct)
    return zipf_weight, label_smoothing, only_correct, *which_samples(ignore_index, reduction)


def which_samples(ignore_index: int, reduction: str) -> tuple[int, str]:
    """``ignore_index`` and ``reduction``."""
    ignore_index = scalars.integer("ignore_index", ignore_index)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    return ignore_index, reduction


def distillation_inputs(
    logits: Tensor,
    teacher: Tensor,
    t: Tensor | None,
    sample_weight: Tensor | None,
    teacher_index: Tensor | None = None,
    *,
    shard: bool = False,
    columns: bool = False,
) -> Tensor | None:
    """The tensors of ``distillation_loss``, as ``loss_inputs``; returns the target.

    Args:
        columns: whether sample_weight may be (N, 2).
    """
    N, C = _logits(logits, shard)
    _tensor("teacher", teacher)
    if teacher_index is None:
        if teacher.shape != logits.shape:
            raise ValueError(
                f"teacher must have the shape of logits, {_shape(logits)}, got {_shape(teacher)}"
            )
    else:
        if teacher.dim() != 2 or teacher.shape[1] != C or not len(teacher):
            raise ValueError(f"teacher must have shape (R, {C}) beside teacher_index, got {_shape(teacher)}")
        _tensor("teacher_index", teacher_index)
        if teacher_index.shape != (N,):
            raise ValueError(
                f"teacher_index must have shape ({N},), one row of teacher per row of logits, "
                f"got {_shape(teacher_index)}"
            )
        if teacher_index.dtype != torch.int64:
            raise TypeError(f"teacher_index must be int64, got {teacher_index.dtype}")
        _same_device("teacher_index", teacher_index, "logits", logits)
    _float("teacher", teacher)
    _same_device("teacher", teacher, "logits", logits)
    if t is not None:
        t = target(t, N)
        _same_device("target", t, "logits", logits)
    if sample_weight is not None:
        _tensor("sample_weight", sample_weight)
        if sample_weight.shape != (N,) and not (columns and sample_weight.shape == (N, 2)):
            raise ValueError(
                f"sample_weight must have shape ({N},), one weight per row of logits, "
                f"got {_shape(sample_weight)}"
            )
        _float("sample_weight", sample_weight)
        _same_device("sample_weight", sample_weight, "logits", logits)
        constant("sample_weight", sample_weight)
    return t


def table(name: str, x: Tensor, logits: Tensor, num_classes: int, *, or_cpu: bool = False) -> None:
    """A buffer with a column per class, ``num_classes``, which serves ``logits``."""
    _, C = _logits(logits, False)
    if num_classes != C:
        raise ValueError(f"logits must have num_classes={num_classes} classes, got shape {_shape(logits)}")
    if x.device != logits.device and not (or_cpu and x.device.type == "cpu"):
        expected = f"{logits.device}{' or the CPU' * or_cpu}"
        raise ValueError(
            f"{name} must be on the device of logits, {expected}, got {x.device}: move the criterion there"
        )


def rows_of_table(index: Tensor, store: Tensor, logits: Tensor) -> None:
    """``index`` (N,) int64 into the M rows of ``store``; values are looked at on the CPU alone."""
    N, _ = _logits(logits, False)
    _tensor("index", index)
    if index.shape != (N,):
        raise ValueError(
            f"index must have shape ({N},), one row of the store per row of logits, got {_shape(index)}"
        )
    if index.device not in (store.device, torch.device("cpu")):
        where = " or ".join(dict.fromkeys(("cpu", str(store.device))))
        raise ValueError(f"index must be on {where}, beside a store on {store.device}, got {index.device}")
    sample_index(index, store.shape[0])


def target_of_methods(logits: Tensor, t: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The classes (N,) int64 and which samples count (N,) bool, for a label that is made from them.

    A target out of range is an IndexError on the CPU; elsewhere it is for the caller to make its row NaN.
    """
    N, C = _logits(logits, False)
    t = target(t, N)
    _same_device("target", t, "logits", logits)
    counted = t != ignore_index
    if t.device.type == "cpu" and not torch.compiler.is_compiling():
        raise_outside(t, None, C, ~counted)
    return t, counted


def linear_inputs(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, num_samples: int | None = None
) -> torch.dtype:
    """The tensors of a linear layer; returns the dtype of its products, autocast's where it is on.

    Args:
        name: of ``x`` in messages; those of the others have "linear" in the place of "input".
    """
    of = name.removesuffix("input") or "linear_"
    tensors = [(name, x), (f"{of}weight", weight)] + ([] if bias is None else [(f"{of}bias", bias)])
    for of_tensor, tensor in tensors:
        _tensor(of_tensor, tensor)
        _float(of_tensor, tensor)
    if x.dim() != 2 or (num_samples is not None and x.shape[0] != num_samples):
        raise ValueError(
            f"{name} must have shape ({'N' if num_samples is None else num_samples}, D), got {_shape(x)}"
        )
    D = x.shape[1]
    if weight.dim() != 2 or weight.shape[1] != D:
        raise ValueError(f"{of}weight must have shape (C, D) with D = {D} as in {name}, got {_shape(weight)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{of}bias must have shape (C,) = ({weight.shape[0]},), got {_shape(bias)}")
    dtypes = [product_dtype(tensor) for _, tensor in tensors]
    for (of_tensor, tensor), dtype in zip(tensors, dtypes, strict=True):
        if dtype != dtypes[0]:
            raise TypeError(f"{of_tensor} must have the dtype of {name}, {dtypes[0]}, got {dtype}")
        _same_device(of_tensor, tensor, name, x)
    return dtypes[0]


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which F.linear takes ``x``: under autocast, autocast's for all floats but float64."""
    if autocast_enabled(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def temperature(x: float) -> float:
    """``temperature`` > 0."""
    x = float(number("temperature", x))
    if x <= 0:
        raise ValueError(f"temperature must be > 0, got {x:g}")
    return x


def count(name: str, x: int, low: int) -> int:
    """A whole number that is not below ``low``."""
    x = scalars.integer(name, x)
    if x < low:
        raise ValueError(f"{name} must be at least {low}, got {x}")
    return x


def features(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Pooled features (N, D) beside another tensor of N samples."""
    _tensor(name, x)
    if x.dim() != 2 or x.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} must have shape (N, D) with N = {other.shape[0]} as {other_name}, got {_shape(x)}"
        )
    _float(name, x)
    _same_device(name, x, other_name, other)


def sample_index(x: Tensor, size: int, name: str = "index", shape: str = "(N,)") -> None:
    """Samples of a store, int64; on the CPU in [0, size), elsewhere not looked at. ``shape``: its axes."""
    _tensor(name, x)
    if x.dim() != 1 + shape.count(", "):
        raise ValueError(f"{name} must have shape {shape}, got {_shape(x)}")
    if x.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {x.dtype}")
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (x < 0) | (x >= size)
        if outside.any():
            i = outside.nonzero()[0].tolist()
            where = ", ".join(map(str, i))
            raise IndexError(
                f"{name}[{where}] = {int(x[tuple(i)])} is outside [0, {size}), a store's samples"
            )


def images(x: Tensor) -> None:
    """``images`` (N, channels, H, W)."""
    _tensor("images", x)
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"images must have shape (N, channels, H, W), not empty, got {_shape(x)}")
    _float("images", x)


def alike(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """A tensor with the shape and the device of another."""
    _tensor(name, x)
    if x.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {_shape(other)}, got {_shape(x)}")
    _float(name, x)
    _same_device(name, x, other_name, other)


def distillation_options(
    weights: dict[str, float], T: float, form: str, forms: tuple[str, ...] = FORMS
) -> tuple[float | str, ...]:
    """The ``weights`` of the terms in their order, then ``T``, the temperature, and the ``form``."""
    weights = {name: float(number(name, x)) for name, x in weights.items()}
    T = temperature(T)
    if form not in forms:
        raise ValueError(f"form must be one of {', '.join(forms)}, got {form!r}")
    return *weights.values(), T, form


def target_or_none(t: Tensor | None, weights: dict[str, float]) -> None:
    """A ``target`` that may be None where of all ``weights`` kd_weight alone is not 0."""
    if t is None:
        for name, x in weights.items():
            if name != "kd_weight" and x != 0:
                raise ValueError(f"target may be None with kd_weight alone, got None with {name}={x!r}")


def num_items(x: object, reduction: str) -> float | Tensor:
    """What a mean divides by; a tensor's value is not looked at, which would synchronise."""
    if reduction != "mean":
        raise ValueError(f"num_items is what a mean divides by, not for reduction={reduction!r}")
    if isinstance(x, Tensor):
        if x.dim() != 0:
            raise ValueError(f"num_items must be a number or a scalar tensor, got shape {_shape(x)}")
        if x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"num_items must be a real number, got {x.dtype}")
        return x
    x = number("num_items", x)
    if x <= 0:
        raise ValueError(f"num_items must be positive, got {x}")
    return x


def law(alpha: float, distribution: Distribution | None) -> Distribution:
    """The law asked for by ``alpha`` or by ``distribution``, never by both."""
    if distribution is None:
        return labels.Zipf(alpha)
    # Tracing does not keep the identity of floats: there, alpha=1.0 beside a distribution passes.
    if alpha != 1.0 if torch.compiler.is_compiling() else alpha is not DEFAULT_ALPHA:
        raise ValueError(
            f"alpha and distribution exclude each other, got alpha={alpha!r} and {distribution!r}"
        )
    if not isinstance(distribution, labels.Distribution):
        made_before = any(base.__qualname__ == "Distribution" for base in type(distribution).__mro__)
        raise TypeError(
            f"distribution must be a zls.Distribution such as zls.Zipf(1.0), got {distribution!r}"
            + " of an earlier import of zipfls_cuda in this process; make it anew" * made_before
        )
    return distribution


def vote_inputs(
    features: Tensor, weight: Tensor, bias: Tensor | None, upsample: int, *, shard: bool = False
) -> int:
    """The arguments of dense_vote; returns ``upsample``. A ``shard`` may have any number of classes."""
    _tensor("features", features)
    if features.dim() not in (3, 4):
        raise ValueError(f"features must have shape (N, D, H, W) or (N, T, D), got {_shape(features)}")
    _float("features", features)
    D = features.shape[1] if features.dim() == 4 else features.shape[2]
    _tensor("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != D:
        raise ValueError(f"weight must have shape (C, D) with D = {D} as in features, got {_shape(weight)}")
    if weight.shape[0] < 2 and not shard:
        raise ValueError(f"weight must have at least 2 classes, got shape {_shape(weight)}")
    tensors = [("weight", weight)]
    if bias is not None:
        _tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape (C,) = ({weight.shape[0]},), got {_shape(bias)}")
        tensors.append(("bias", bias))
    for name, x in tensors:
        if x.dtype != features.dtype:
            raise TypeError(f"{name} must have the dtype of features, {features.dtype}, got {x.dtype}")
        _same_device(name, x, "features", features)
    factor = upsampling(upsample)
    if factor == 2 and features.dim() == 3:
        raise ValueError("upsample=2 needs a map, features (N, D, H, W); got tokens " + str(_shape(features)))
    return factor


def upsampling(x: object) -> int:
    """``upsample``, 1 or 2."""
    try:
        factor = scalars.integer("upsample", x)
    except TypeError:
        factor = 0
    if factor not in (1, 2):
        raise ValueError(f"upsample must be 1 or 2, got {x!r}")
    return factor


def probabilities(x: Tensor) -> None:
    """``probabilities`` (M, C) of fit_zipf."""
    _tensor("probabilities", x)
    _float("probabilities", x)
    if x.dim() != 2 or x.shape[0] == 0:
        raise ValueError(f"probabilities must have shape (M, C) with M >= 1, got {_shape(x)}")


def check_inputs(
    logits: Tensor, target: Tensor, votes: Tensor | None = None, *, ignore_index: int = -100
) -> None:
    """Check everything about a loss's inputs, values included. Synchronises: for debugging, on any device.

    Args:
        logits: (N, C), any float type.
        target: (N,) int64 or uint8, in [0, C) or ``ignore_index``; or (N, C) probabilities, any float type.
        votes: (N, P) int32 or int64, below C; negative means no vote. Or None.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device.
        IndexError: names the first target or vote outside its range (votes of ignored samples are not read).

    Example:
        >>> zls.check_inputs(torch.zeros(2, 5), torch.tensor([0, 7]))
        Traceback (most recent call last):
        IndexError: target[1] = 7 is outside [0, 5)
    """
    target, ignore_index = loss_inputs(logits, target, votes), scalars.integer("ignore_index", ignore_index)
    if not is_soft(target):
        raise_outside(target, votes, logits.shape[1], target == ignore_index)
        return
    no_ignore_index(ignore_index)
    if votes is not None:
        raise_outside(None, votes, logits.shape[1])
