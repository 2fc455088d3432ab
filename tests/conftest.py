"""Fixtures: every test that takes ``backend`` runs once per backend usable here, on that backend's device."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

import zipfls_cuda as zls
from zipfls_cuda import ops

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_addoption(parser):
    parser.addoption("--backend", action="append", help="run the backend tests over this one only")


def pytest_report_header(config):
    reasons = (f"{b}: {ops.reason_against(b) or 'tested'}" for b in ops.BACKENDS)
    return "zipfls_cuda backends: " + "; ".join(reasons)


# Triton's interpreter is slow: unless asked for with --backend triton, it runs these files only.
INTERPRETED = ("test_golden", "test_label", "test_api")


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        names = metafunc.config.getoption("--backend")
        if not names:
            names = list(zls.backends())
            if ops.triton_interpreted() and metafunc.module.__name__ not in INTERPRETED and "triton" in names:
                names.remove("triton")
        metafunc.parametrize("backend", names)


@pytest.fixture
def device(backend) -> torch.device:
    """The device whose tensors the backend is tested on."""
    on_gpu = backend in ("cuda", "triton", "reference") and torch.cuda.is_available()
    return torch.device(
        "cuda" if on_gpu and not (backend == "triton" and ops.triton_interpreted()) else "cpu"
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
