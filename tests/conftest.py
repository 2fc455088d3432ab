"""Fixtures: every test that takes ``backend`` runs once per backend usable here, on that backend's device."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("ZIPFLS_CPU_BFLOAT16", "1")  # the same paths on every processor

import pytest
from workers import (  # noqa: F401
    pytest_collection,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
    pytest_warning_recorded,
)

import zipfls_cuda as zls
from zipfls_cuda import ops

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_addoption(parser):
    parser.addoption(
        "--backend", action="append", help="run the backend tests over this one only, slow ones too"
    )


# Cases of each test over Triton's interpreter that are not slow.
INTERPRETED_CASES = 2


def _abridged(config) -> bool:
    """Whether tests run over Triton in part only."""
    interpreted = ops.triton_interpreted() and "triton" in zls.backends()
    return interpreted and not config.getoption("--backend")


def pytest_sessionstart(session):
    """What is tested, and what is not: a header that -q does not hide."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None:  # a worker of xdist
        return
    reasons = (f"{b}: {ops.reason_against(b) or 'tested'}" for b in ops.BACKENDS)
    terminal.write_line("zipfls_cuda backends: " + "; ".join(reasons))
    if _abridged(session.config):
        terminal.write_line(
            f"triton is interpreted: {INTERPRETED_CASES} cases of each test over it are run, the others "
            "are slow: pytest --backend triton runs them all"
        )


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", metafunc.config.getoption("--backend") or zls.backends())


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    """Marks interpreted cases slow; leaves slow tests out unless -m, --backend or a name asks for them."""
    if _abridged(config):
        tests = {}
        for item in items:
            if hasattr(item, "callspec") and item.callspec.params.get("backend") == "triton":
                tests.setdefault((item.path, item.originalname), []).append(item)
        for cases in tests.values():
            mark = cases[0].get_closest_marker("interpreted")
            n, k = len(cases), mark.args[0] if mark else INTERPRETED_CASES
            kept = {i * (n - 1) // max(k - 1, 1) for i in range(k)}  # first, last, between
            for i in set(range(n)) - kept:
                cases[i].add_marker(pytest.mark.slow)
    if config.getoption("-m") or config.getoption("--backend"):
        return
    named = [arg.partition("::")[::2] for arg in config.args if "::" in arg]

    def asked_for(item) -> bool:
        name = item.nodeid.partition("::")[2]
        return any(
            item.path == (config.invocation_params.dir / file).resolve()
            and (name == asked or name.startswith((f"{asked}[", f"{asked}::")))
            for file, asked in named
        )

    left_out = {item for item in items if item.get_closest_marker("slow") and not asked_for(item)}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


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


@pytest.fixture(autouse=True)
def _tensor_float_32(request):
    """Backend "cuda" multiplies float32 as TensorFloat-32 or not at all: its tests allow that."""
    wanted = "backend" in request.fixturenames and request.getfixturevalue("backend") == "cuda"
    if not wanted or not torch.cuda.is_available():
        yield
        return
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True  # fp32_precision follows; the reverse is not true
    yield
    matmul.allow_tf32 = before
