"""Marks for torch.compile that do not import torch._dynamo, as torch.compiler's decorators do at once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def constant_result(function: Callable) -> Callable:
    """Mark a function as ``torch.compiler.assume_constant_result`` does: its result is fixed in a trace."""
    function._dynamo_marked_constant = True  # all that torch's own decorator does, after its import
    return function


def eager(reason: str) -> Callable[[Callable], Callable]:
    """Decorator: ``torch.compiler.disable(reason=reason)``, applied at the first call."""

    def decorate(function: Callable) -> Callable:
        disabled: list[Callable] = []

        @functools.wraps(function)
        def call(*args, **kwargs):
            if not disabled:
                disabled.append(torch.compiler.disable(function, reason=reason))
            return disabled[0](*args, **kwargs)

        # While a caller is traced, these two stop the trace here, as on torch's own wrapper.
        call._torchdynamo_disable, call._torchdynamo_disable_msg = True, reason
        return call

    return decorate
