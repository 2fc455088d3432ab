"""Zipf's Label Smoothing (ECCV 2022) for PyTorch, fused: ``import zipfls_cuda as zls``."""

import warnings as _warnings

with _warnings.catch_warnings():  # torch says at its import that NumPy is missing; nothing here needs it
    _warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch as _torch  # noqa: F401

from . import methods as methods
from .attach import Handle, Plan, attach, detach
from .checks import check_inputs
from .functional import (
    dense_vote,
    distillation_loss,
    fit_zipf,
    rank_votes,
    zipf_cross_entropy,
    zipf_label,
    zipf_loss,
)
from .labels import (
    Constant,
    Distribution,
    ExponentialDecay,
    LinearDecay,
    RandomDistribution,
    RandomPareto,
    RandomUniform,
    Zipf,
)
from .linear import linear_distillation_loss, linear_zipf_cross_entropy, zipf_head_loss
from .modules import ZipfLoss
from .ops import backends, use_backend

__version__ = "0.1.0"

__all__ = [
    "Constant",
    "Distribution",
    "ExponentialDecay",
    "Handle",
    "LinearDecay",
    "Plan",
    "RandomDistribution",
    "RandomPareto",
    "RandomUniform",
    "Zipf",
    "ZipfLoss",
    "__version__",
    "attach",
    "backends",
    "check_inputs",
    "dense_vote",
    "detach",
    "distillation_loss",
    "fit_zipf",
    "linear_distillation_loss",
    "linear_zipf_cross_entropy",
    "rank_votes",
    "use_backend",
    "zipf_cross_entropy",
    "zipf_head_loss",
    "zipf_label",
    "zipf_loss",
]
