"""What the public functions give, held against the oracle in float64."""

from __future__ import annotations

import numpy as np
import oracle
import torch
from cases import Case, error
from torch import Tensor

import zipfls_cuda as zls


def run(x, target, votes, *, backend, upstream=None, **options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, ce, zipf, gradient) through zipf_cross_entropy."""
    x = x.detach().clone().requires_grad_()
    options = {"zipf_weight": 1.0, "return_parts": True, **options}
    loss, ce, zipf = zls.zipf_cross_entropy(x, target, votes, backend=backend, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), ce, zipf, x.grad


def zipf_of(x, target, votes, backend, **options) -> tuple[Tensor, Tensor]:
    """(loss, gradient) through zipf_loss, of each sample unless another reduction is asked for."""
    x = x.detach().clone().requires_grad_()
    loss = zls.zipf_loss(x, target, votes, backend=backend, **{"reduction": "none", **options})
    loss.sum().backward()
    return loss.detach(), x.grad


def check_against_oracle(
    backend, device, case: Case, *, dtype=torch.float32, mass=None, by_votes=True, **options
) -> None:
    """The whole loss in one dtype against the oracle on the same (rounded) logits and target.

    A few roundings of the largest intermediate are allowed; test_error_budget has the statistics.
    """
    case = case.to(device, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    target = case.target.to(wide) if case.target.is_floating_point() else case.target
    votes = case.votes if by_votes else None
    got = run(case.logits, target, votes, backend=backend, **options)
    if mass is None:
        mass = oracle.MASSES["Zipf"](options.get("alpha", 1.0))
    for law in ("alpha", "distribution"):
        options.pop(law, None)
    names = {"weight": "class_weight", "label_smoothing": "smoothing"}
    exact = oracle.batch(
        case.logits.double().cpu().numpy(),
        target.cpu().numpy(),
        None if votes is None else votes.cpu().numpy(),
        mass,
        **{
            names.get(k, k): v.double().cpu().numpy() if torch.is_tensor(v) else v for k, v in options.items()
        },
    )
    for name, a, b in zip(("loss", "ce", "zipf", "gradient"), got, exact, strict=True):
        assert a.dtype == (dtype if name == "gradient" else wide), name
        b = torch.as_tensor(np.asarray(b))
        size = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
        allowed = torch.finfo(a.dtype).eps * size + 24 * torch.finfo(wide).eps * max(size, 1.0)
        assert error(a, b) <= allowed, f"{name} is far from exact"
