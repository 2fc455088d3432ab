"""Operators and backends: the one place that knows which backends exist and which serves a call.

Every stage is an operator of ``torch.ops.zipfls`` with one schema and one fake kernel, under three names:

* ``<stage>``: C++, registered by ``csrc`` for the CPU ("cpu") and for CUDA devices ("cuda");
* ``<stage>_triton``: Triton ("triton");
* ``<stage>_reference``: plain PyTorch, any device ("reference").

The operators are not differentiable; ``functional`` wraps them in an autograd.Function.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import compiling, extension, reference

_C = (
    extension.MODULE
)  # has registered the C++ operators; None where there is none: reference (and triton) only

# Schemas: arguments and results are described in reference.py, function by function.
SCHEMAS = {
    "vote_fwd": "(Tensor features, Tensor weight, Tensor? bias, int upsample) -> Tensor",
    "rank_fwd": "(Tensor votes, SymInt num_classes) -> Tensor",
    "label_fwd": (
        "(Tensor target, Tensor votes, Tensor log_mass, SymInt num_classes, int ignore_index) -> Tensor"
    ),
    "loss_fwd": (
        "(Tensor logits, Tensor target, Tensor? votes, Tensor log_mass, Tensor? weight, float ce_weight, "
        "float zipf_weight, float label_smoothing, bool only_correct, int ignore_index, str reduction, "
        "bool with_grad) -> (Tensor loss, Tensor ce, Tensor zipf, Tensor grad, Tensor grad_scale)"
    ),
    "loss_grad_": (
        "(Tensor(a!) logits, Tensor target, Tensor? votes, Tensor log_mass, Tensor? weight, float ce_weight, "
        "float zipf_weight, float label_smoothing, bool only_correct, int ignore_index, str reduction) "
        "-> (Tensor loss, Tensor ce, Tensor zipf, Tensor grad_scale)"
    ),
    "distill_fwd": (
        "(Tensor logits, Tensor teacher, Tensor? target, Tensor? sample_weight, Tensor? teacher_index, "
        "float ce_weight, float kd_weight, float tckd_weight, float nckd_weight, float soft_target_weight, "
        "float max_weight, float temperature, str form, int ignore_index, str reduction, bool with_grad) "
        "-> (Tensor loss, Tensor ce, Tensor distillation, Tensor grad, Tensor grad_scale)"
    ),
    "distill_grad_": (
        "(Tensor(a!) logits, Tensor teacher, Tensor? target, Tensor? sample_weight, Tensor? teacher_index, "
        "float ce_weight, float kd_weight, float tckd_weight, float nckd_weight, float soft_target_weight, "
        "float max_weight, float temperature, str form, int ignore_index, str reduction) "
        "-> (Tensor loss, Tensor ce, Tensor distillation, Tensor grad_scale)"
    ),
    "loss_bwd": "(Tensor grad, Tensor grad_loss, Tensor grad_scale) -> Tensor",
    "loss_bwd_": "(Tensor(a!) grad, Tensor grad_loss, Tensor grad_scale) -> ()",
}


# A gradient over the logits without computing the loss again: of class targets, and where votes make the
# label (log_mass by rank) or there is none, but for weighted label smoothing. GPU backends alone.
#
# factors (N, 4), accumulation dtype: shift, a, b and the target's gradient. The gradient at a class without a
# vote is exp(z_c - shift) a - b; a row of which the shift is -inf has gradient 0, and where it is NaN, NaN.
# patches (N, P), dtype of the logits, P = 0 without a Zipf term: the gradient at the class of each vote, NaN
# where another vote has it. Of votes for the target or for no class, and of rows with gradient 0 or NaN: any.
FACTOR_SCHEMAS = {
    "loss_factors_fwd": (
        "(Tensor logits, Tensor target, Tensor? votes, Tensor log_mass, Tensor? weight, float ce_weight, "
        "float zipf_weight, float label_smoothing, bool only_correct, int ignore_index, str reduction) "
        "-> (Tensor loss, Tensor ce, Tensor zipf, Tensor factors, Tensor patches, Tensor grad_scale)"
    ),
    "loss_factors_bwd_": (
        "(Tensor(a!) logits, Tensor target, Tensor? votes, Tensor factors, Tensor patches, "
        "Tensor grad_loss, Tensor grad_scale) -> ()"
    ),
}

_LINEAR = "Tensor input, Tensor linear_weight, Tensor? linear_bias"
_CHUNKS = (
    "ScalarType dtype, SymInt? chunk_rows, str backend, bool of_input, bool of_weight, bool of_bias, "
    "Tensor? grad_loss"
)
_GRADIENTS = "Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_scale"

# Linear layer and loss (chunked.py). One operator serves all backends: it calls those of the one it is given.
LINEAR_SCHEMAS = {
    "linear_loss_fwd": (
        f"({_LINEAR}, Tensor target, Tensor? votes, Tensor log_mass, Tensor? weight, float ce_weight, "
        "float zipf_weight, float label_smoothing, bool only_correct, int ignore_index, str reduction, "
        f"{_CHUNKS}) -> (Tensor loss, Tensor ce, Tensor zipf, {_GRADIENTS})"
    ),
    "linear_distill_fwd": (
        f"({_LINEAR}, Tensor teacher_input, Tensor teacher_weight, Tensor? teacher_bias, Tensor? target, "
        "Tensor? sample_weight, ScalarType teacher_dtype, float ce_weight, float kd_weight, "
        "float tckd_weight, float nckd_weight, float soft_target_weight, float max_weight, "
        f"float temperature, str form, int ignore_index, str reduction, {_CHUNKS}) "
        f"-> (Tensor loss, Tensor ce, Tensor distillation, {_GRADIENTS})"
    ),
}


# Fake kernels: shapes and dtypes for torch.compile and torch.export ---------------------------------


def _vote_fake(features: Tensor, weight: Tensor, bias: Tensor | None, upsample: int) -> Tensor:
    positions = features.shape[2] * features.shape[3] if features.dim() == 4 else features.shape[1]
    return features.new_empty((features.shape[0], positions * upsample * upsample), dtype=torch.int32)


def _rank_fake(votes: Tensor, num_classes: int) -> Tensor:
    return votes.new_empty((votes.shape[0], num_classes), dtype=torch.int32)


def _label_fake(
    target: Tensor, votes: Tensor, log_mass: Tensor, num_classes: int, ignore_index: int
) -> Tensor:
    return log_mass.new_empty((target.shape[0], num_classes))


def _loss_fake(logits: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    reduction, with_grad = args[-2:]
    dtype = reference.accumulation_dtype(logits.dtype)
    shape = logits.shape[:1] if reduction == "none" else ()
    parts = (logits.new_empty(shape, dtype=dtype) for _ in range(3))
    grad = logits.new_empty(logits.shape if with_grad else (0,))
    scaled = with_grad and logits.dtype == torch.float16 and reduction == "mean"
    return *parts, grad, logits.new_empty(() if scaled else (0,), dtype=dtype)


def _loss_grad_fake(logits: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *parts, _, grad_scale = _loss_fake(logits, *args, True)
    return *parts, grad_scale


def _loss_factors_fake(
    logits: Tensor, target: Tensor, votes: Tensor | None, log_mass: Tensor, weight: Tensor | None, *options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *parts, _, grad_scale = _loss_fake(logits, *options, True)
    N, P = logits.shape[0], 0 if votes is None or options[1] == 0 else votes.shape[1]
    factors = logits.new_empty((N, 4), dtype=reference.accumulation_dtype(logits.dtype))
    return *parts, factors, logits.new_empty((N, P)), grad_scale


def _linear_fake(input: Tensor, linear_weight: Tensor, *args) -> tuple[Tensor, ...]:
    reduction, dtype, _, _, of_input, of_weight, of_bias, _ = args[-8:]
    wide, (C, D) = reference.accumulation_dtype(dtype), linear_weight.shape
    shape = input.shape[:1] if reduction == "none" else ()
    parts = (input.new_empty(shape, dtype=wide) for _ in range(3))
    grads = (
        input.new_empty((input.shape[0], D) if of_input else (0,)),
        linear_weight.new_empty((C, D) if of_weight else (0,), dtype=wide),
        linear_weight.new_empty((C,) if of_bias else (0,), dtype=wide),
    )
    return *parts, *grads, input.new_empty((), dtype=wide)


def _loss_bwd_fake(grad: Tensor, grad_loss: Tensor, grad_scale: Tensor) -> Tensor:
    return torch.empty_like(grad)


def _inplace_fake(grad: Tensor, *args) -> None:
    return None


FAKES: dict[str, Callable] = {
    "vote_fwd": _vote_fake,
    "rank_fwd": _rank_fake,
    "label_fwd": _label_fake,
    "loss_fwd": _loss_fake,
    "loss_grad_": _loss_grad_fake,
    "distill_fwd": _loss_fake,
    "distill_grad_": _loss_grad_fake,
    "loss_bwd": _loss_bwd_fake,
    "loss_bwd_": _inplace_fake,
    "loss_factors_fwd": _loss_factors_fake,
    "loss_factors_bwd_": _inplace_fake,
    **dict.fromkeys(LINEAR_SCHEMAS, _linear_fake),
}

STAGES = tuple(SCHEMAS)

# What a backend has no kernel for: (backend, stage) -> dtypes, or None for all of them.
UNSERVED: dict[tuple[str, str], tuple[torch.dtype, ...] | None] = {
    ("cuda", "vote_fwd"): (torch.float64,),
    **{(backend, stage): None for backend in ("cpu", "reference") for stage in FACTOR_SCHEMAS},
}


# Registration --------------------------------------------------------------------------------------


def _stage_of(module: str, stage: str) -> Callable:
    """A stage as the package's module of that name has it at the time of the call.

    Late, since importing triton is slow, and not every machine has it; and since operators are registered
    once a process, while modules may be imported anew.
    """

    def call(*args):
        return getattr(importlib.import_module(f".{module}", __package__), stage)(*args)

    return call


def _vmap_by_loop(op: Callable) -> Callable:
    """Batching rule for torch.func.vmap: one call per element of the mapped dimension."""

    def rule(info, in_dims, *args):
        calls = (
            op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        )
        outs = list(calls)
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        return tuple(map(torch.stack, zip(*outs, strict=True))), (0,) * len(outs[0])

    return rule


def _registered(name: str, schema: str) -> bool:
    """Whether an earlier import in this process (a reload, an isolated test) registered the operator.

    Raises:
        ImportError: under another schema, as another version of the package does.
    """
    if not hasattr(torch.ops.zipfls, name):
        return False
    there = getattr(torch.ops.zipfls, name).default._schema
    if there != torch._C.parse_schema(f"zipfls::{name}{schema}"):
        raise ImportError(
            f"zipfls_cuda was imported before in this process, in another version: the operator {there} is "
            f"registered, and this version's is {name}{schema}. Restart the Python process"
        )
    return True


def _register(name: str, stage: str, schema: str) -> None:
    """Define an operator, with its implementation in Python if it has one, fake kernel and batching rule."""
    _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    if name.endswith("_triton"):
        for key in ("CUDA", "CPU"):  # CPU tensors: under Triton's interpreter only, see reason_against
            _library.impl(name, _stage_of("triton_kernels", stage), key)
    elif name.endswith("_reference"):
        _library.impl(name, _stage_of("reference", stage), "CompositeExplicitAutograd")
    elif name in LINEAR_SCHEMAS:
        _library.impl(name, _stage_of("chunked", name.removeprefix("linear_")), "CompositeExplicitAutograd")
    torch.library.register_fake(f"zipfls::{name}", FAKES[stage], lib=_library)
    if not stage.endswith("_"):  # in place
        op = getattr(torch.ops.zipfls, name).default
        torch.library.register_vmap(f"zipfls::{name}", _vmap_by_loop(op), lib=_library)


# The registered functions keep this module's globals, and so the library, alive: operators outlive a module
# that is deleted and imported anew. A module that is reloaded has to keep the library itself.
_library = globals().get("_library") or torch.library.Library("zipfls", "FRAGMENT")
OPERATORS: dict[tuple[str, str], torch._ops.OpOverload] = {}  # (stage, backend) -> operator

for _stage, _schema in (SCHEMAS | FACTOR_SCHEMAS).items():
    for _suffix, _names in (("", ("cuda", "cpu")), ("_triton", ("triton",)), ("_reference", ("reference",))):
        _serving = [b for b in _names if UNSERVED.get((b, _stage), ()) is not None]
        if not _serving:
            continue
        _name = f"{_stage}{_suffix}"
        if not _registered(_name, _schema):
            _register(_name, _stage, _schema)
        for _backend in _serving:
            OPERATORS[_stage, _backend] = getattr(torch.ops.zipfls, _name).default

for _name, _schema in LINEAR_SCHEMAS.items():
    if not _registered(_name, _schema):
        _register(_name, _name, _schema)

# Losses with their gradient attached by C++ (csrc/autograd.cpp), for eager calls of these operators.
NATIVE: dict[Callable, Callable] = {
    getattr(torch.ops.zipfls, f"{_name}_fwd").default: getattr(_C, _name)
    for _name in ("loss", "distill")
    if hasattr(_C, _name)
}


# (forward operator, type of device) -> loss_factors_fwd and loss_factors_bwd_ of the same backend.
KEEPING: dict[tuple[Callable, str], tuple[Callable, Callable]] = {
    (OPERATORS["loss_fwd", backend], device): tuple(OPERATORS[stage, backend] for stage in FACTOR_SCHEMAS)
    for backend, device in (("cuda", "cuda"), ("triton", "cuda"), ("triton", "cpu"))
}


# Backends ------------------------------------------------------------------------------------------

BACKENDS = ("cuda", "triton", "cpu", "reference")  # best first


def build_info() -> dict[str, object]:
    """What ``csrc`` was built with (compiler, CUDA, OpenMP, instruction sets); {} if not built."""
    return dict(_C.build_info()) if _C is not None else {}


def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def reason_against(backend: str) -> str:
    """Why a backend cannot be used on this machine; empty if it can.

    GPUs are looked at once CUDA is initialised, not before: looking would initialise it, which forbids forks.
    """
    reason = _not_installed(backend)
    if reason or backend not in _GPU_BACKENDS or not _devices_known(backend):
        return reason
    reasons = [gpu_reason(backend, i) for i in range(torch.cuda.device_count())]
    return "" if not all(reasons) else "; ".join(reasons)


def _not_installed(backend: str) -> str:
    """What ``reason_against`` can say without looking at the GPUs."""
    if backend == "reference":
        return ""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if importlib.util.find_spec(f"{__package__}.triton_kernels") is None:
            return "this version of zipfls_cuda has no Triton kernels"
        if triton_interpreted() or torch.cuda.is_available():
            return ""
        return "there is no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    if _C is None:
        return f"the C++ extension {extension.REASON}"
    if backend == "cuda":
        if not build_info().get("cuda"):
            return "the C++ extension was built without CUDA"
        if not torch.cuda.is_available():
            return "there is no CUDA device"
    return ""


_GPU_BACKENDS = ("cuda", "triton")
_OLDEST_GPU = (8, 0)  # compute capability that the kernels need


def _devices_known(backend: str) -> bool:
    """Whether the GPUs may be asked, and a backend runs on them."""
    return torch.cuda.is_initialized() and not (backend == "triton" and triton_interpreted())


def gpu_reason(backend: str, index: int) -> str:
    """Why the kernels of "cuda" or "triton" do not run on one GPU; empty if they do."""
    capability = torch.cuda.get_device_capability(index)
    there = "cuda:{} has compute capability {}.{}".format(index, *capability)
    built = build_info()["cuda_arch"] if backend == "cuda" else ""
    if capability < _OLDEST_GPU:
        return f"{there}, and its kernels need 8.0 or newer" + (f" (built for {built})" if built else "")
    if built and not _built_for(built, capability):
        return f"{there}, and it was built for {built} (TORCH_CUDA_ARCH_LIST)"
    return ""


def _built_for(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for these architectures, as TORCH_CUDA_ARCH_LIST names them, runs on a device."""
    for name in architectures.split(","):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if parts is None:  # "Hopper" and the like
            return True
        built, only, ptx = (int(parts[1]), int(parts[2])), parts[3], parts[4]
        same_family = built[0] == capability[0] and built <= capability
        if built == capability or (same_family and only != "a") or (ptx and not only and built <= capability):
            return True
    return False


def backends() -> tuple[str, ...]:
    """Names of the backends usable on this machine, best first.

    Out of "cuda" (C++/CUDA), "triton", "cpu" (C++) and "reference" (pure PyTorch, any device). Triton under
    its interpreter comes last: it serves when named and is never chosen.

    Example:
        >>> zls.backends()[-1] in ("reference", "triton")
        True
    """
    usable = [name for name in BACKENDS if not reason_against(name)]
    if "triton" in usable and triton_interpreted():
        usable.remove("triton")
        usable.append("triton")
    return tuple(usable)


def _devices(backend: str) -> tuple[str, ...]:
    """Device types whose tensors a backend serves; reference: any."""
    return {"cuda": ("cuda",), "cpu": ("cpu",), "triton": ("cpu",) if triton_interpreted() else ("cuda",)}[
        backend
    ]


def refusal(backend: str, stage: str, device: str | torch.device, dtype: torch.dtype) -> str:
    """Why a backend cannot serve a stage on tensors of a device and dtype; empty if it can."""
    reason = reason_against(backend)
    if reason:
        return reason
    device = torch.device(device)
    if backend != "reference" and device.type not in _devices(backend):
        return f"it serves {' and '.join(_devices(backend))} tensors, and these are on {device.type}"
    if backend in _GPU_BACKENDS and device.index is not None and _devices_known(backend):
        reason = gpu_reason(backend, device.index)
        if reason:
            return reason
    dtypes = UNSERVED.get((backend, stage), ())
    if dtypes is None:
        return f"it has no kernel for {stage}"
    if dtype in dtypes:
        return f"it has no kernel for {dtype} in {stage}"
    if (backend, stage, dtype) == (
        "cuda",
        "vote_fwd",
        torch.float32,
    ) and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return (
            "it multiplies float32 as TF32 only, and torch.backends.cuda.matmul.fp32_precision is not 'tf32'"
        )
    return ""


@compiling.constant_result
def _resolve(stage: str, backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the backend that serves a call; the rules are ``select``'s."""
    if backend is None:
        usable = [b for b in BACKENDS if not (b == "triton" and triton_interpreted())]
        chosen = next(b for b in usable if not refusal(b, stage, device, dtype))
        if device.type == "cuda" and torch.cuda.is_initialized():
            _say_what_the_gpu_lacks(device, chosen)
        return chosen
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = refusal(backend, stage, device, dtype)
    if reason:
        raise RuntimeError(f"backend={backend!r} cannot serve this call: {reason}")
    return backend


_gpus_spoken_of: set[int] = set()


def _say_what_the_gpu_lacks(device: torch.device, chosen: str) -> None:
    """Warn, in the first call on a GPU, of the installed backends that it is too old for or not built for."""
    if device.index in _gpus_spoken_of:
        return
    _gpus_spoken_of.add(device.index)
    installed = [b for b in _GPU_BACKENDS if not _not_installed(b) and _devices_known(b)]
    reasons = [f"{b!r} cannot serve it: {r}" for b in installed if (r := gpu_reason(b, device.index))]
    if reasons:
        slowly = f", which is {extension.SLOWLY}" if chosen == "reference" else ""
        name = torch.cuda.get_device_name(device)
        warnings.warn(
            f"zipfls_cuda: {name} ({device}) is served by {chosen!r}{slowly}, as {' and '.join(reasons)}",
            stacklevel=4,
        )


class _Forced(threading.local):
    """The backend that use_backend or ZIPFLS_BACKEND asks for, or None."""

    backend: str | None = os.environ.get("ZIPFLS_BACKEND") or None


_forced = _Forced()
_resolved: dict[tuple, torch._ops.OpOverload] = {}


def name_of(stage: str, backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the backend that ``select`` would choose for tensors of a device and dtype."""
    return _resolve(stage, backend or _forced.backend, device, dtype)


def select(stage: str, backend: str | None, x: Tensor) -> torch._ops.OpOverload:
    """The operator of a stage that serves the tensor ``x``.

    ``backend`` names it, else ``use_backend``, else ZIPFLS_BACKEND, else the best one that can serve.

    Raises:
        ValueError: unknown name. RuntimeError: the named backend cannot serve; there is no falling back.
    """
    backend = backend or _forced.backend
    key = (stage, backend, x.device, x.dtype)
    op = _resolved.get(key)
    if op is None:
        op = OPERATORS[stage, _resolve(*key)]
        on_gpu = x.device.type == "cuda"
        depends_on_precision = on_gpu and stage == "vote_fwd" and x.dtype == torch.float32
        # A fake tensor may be on a device that was not looked at yet: see reason_against.
        fake = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        unknown_gpu = on_gpu and not torch.cuda.is_initialized()
        if not depends_on_precision and not fake and not unknown_gpu:
            _resolved[key] = op
    return op


@contextlib.contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Context manager: calls in the block that name no backend use this one.

    Raises:
        ValueError: unknown name. RuntimeError: that backend cannot be used on this machine.

    Example:
        >>> with zls.use_backend("reference"):
        ...     loss = zls.zipf_loss(torch.zeros(1, 5), torch.tensor([2]))
    """
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
        reason = reason_against(backend)
        if reason:
            raise RuntimeError(f"backend={backend!r} cannot be used here: {reason}")
    previous, _forced.backend = _forced.backend, backend
    try:
        yield
    finally:
        _forced.backend = previous
