"""Outputs of the code that the authors of related methods published (golden/methods_official.npz)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ARRAYS = np.load(Path(__file__).parent / "golden" / "methods_official.npz")
META = json.loads(bytes(ARRAYS["meta"]).decode())
INPUTS = {item["id"]: item for item in META["inputs"]}


class Golden(NamedTuple):
    """One call of the authors' code."""

    meta: dict

    def __str__(self) -> str:
        return f"{self.meta['id']}-{self.meta['function']}-{INPUTS[self.meta['input']]['kind']}"

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Arrays by name; floats in ``dtype``, which holds them exactly from float32 up."""
        names = INPUTS[self.meta["input"]]["arrays"]
        arrays = {name: torch.from_numpy(ARRAYS[f"{self.meta['input']}/{name}"]).to(device) for name in names}
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in arrays.items()}

    def check(self, name: str, actual: Tensor) -> None:
        """An output against the formula at 80 digits where it is there, else against the authors' float64.

        float64 within 1e-12 of the scale (1e-10 for WSLD, which takes an exponential from 1), float32 within
        1e-6 of it plus twice the authors' own error.
        """
        exact = f"exact_{name}" if f"exact_{name}" in self.meta["arrays"] else name
        expected = torch.from_numpy(np.asarray(ARRAYS[f"{self.meta['id']}/{exact}"])).double()
        kind = name.partition("_")[0]  # loss, grad; the scale of other outputs is their largest value
        scale = max(self.meta.get(f"{kind}_scale", 0.0), expected.abs().max().item())
        if actual.dtype == torch.float64:
            allowed = torch.full_like(expected, (1e-10 if self.meta["function"] == "wsld" else 1e-12) * scale)
        else:
            allowed = torch.full_like(expected, 1e-6 * scale)
            theirs = name.replace(kind, f"{kind}32", 1)  # grad32_features
            if theirs in self.meta["arrays"] and theirs not in self.meta["not_finite"]:
                there = torch.from_numpy(np.asarray(ARRAYS[f"{self.meta['id']}/{theirs}"])).double()
                allowed = allowed + 2 * (there - expected).abs()
        assert actual.shape == expected.shape
        error = (actual.detach().cpu().double() - expected).abs()
        assert (error <= allowed).all(), f"{name} is off by {(error / scale).max().item():.2g} of the scale"


def cases(*functions: str) -> list[Golden]:
    """All cases of the functions, in the file's order."""
    found = [Golden(meta) for meta in META["cases"] if meta["function"] in functions]
    assert {case.meta["function"] for case in found} == set(functions)
    return found
