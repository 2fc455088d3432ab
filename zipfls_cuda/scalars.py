"""Options as plain Python numbers: NumPy scalars and tensors of one value are numbers, as in PyTorch.

A tensor must be on the CPU. On another device, reading its value (as F.cross_entropy does) would wait in
every call for all the work queued there.
"""

from __future__ import annotations

import numbers
import operator

import torch
from torch import Tensor


def number(name: str, x: object) -> float:
    """``x`` as a Python number; TypeError, by ``name``, for anything else, True and False included."""
    if type(x) is float or type(x) is int or isinstance(x, torch.SymInt | torch.SymFloat):
        return x
    value = _value(name, x)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {_described(x)}")
    return float(value)


def integer(name: str, x: object) -> int:
    """``x`` as a Python integer; TypeError, by ``name``, for anything else, True and False included."""
    if type(x) is int or isinstance(x, torch.SymInt):
        return x
    value = _value(name, x)
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an int, got {_described(x)}")


def flag(name: str, x: object) -> bool:
    """``x`` as True or False, 1 and 0 included; TypeError, by ``name``, for anything else."""
    if type(x) is bool:
        return x
    value = _value(name, x)
    if isinstance(value, bool | int) and value in (0, 1):
        return bool(value)
    if getattr(value, "dtype", None) == "bool" and value.ndim == 0:  # NumPy's
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {_described(x)}")


def _value(name: str, x: object) -> object:
    """The value of a tensor that has one and is on the CPU; anything but a tensor as it is."""
    if not isinstance(x, Tensor) or x.numel() != 1:
        return x
    if x.device.type != "cpu":
        raise TypeError(
            f"{name} must be a number or a tensor on the CPU, got a tensor on {x.device}, and reading it "
            f"there in every call would wait for the device; give {name}.item(), taken once"
        )
    if x.requires_grad:
        raise TypeError(f"{name} must not require grad: gradients flow to logits alone; give {name}.item()")
    return x.item()


def _described(x: object) -> str:
    if isinstance(x, Tensor):
        return f"Tensor of shape {tuple(x.shape)} and dtype {x.dtype}"
    return type(x).__name__
