"""Every instruction set of the CPU kernels that this processor has, forced by ZIPFLS_CPU_ISA.

Each is loaded in a process of its own, whichever the processor would choose by itself.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DTYPES, KINDS, TARGETS, error, make, probabilities

import zipfls_cuda as zls
from zipfls_cuda import ops
from zipfls_cuda.labels import log_mass

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif("cpu" not in zls.backends(), reason="the C++ extension is not built")
instruction_sets = pytest.mark.parametrize("isa", ops.build_info().get("isa", []))

# Both sides of every width: vectors are 2 to 16 lanes, rows end in the middle of them.
CLASSES = (2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 1003, 4099)


def loss_calls(dtype):
    """(case, target, options) of every path through the loss."""
    for i, C in enumerate(CLASSES):
        case = make(5, C, 49, dtype=dtype, kind=KINDS[i % len(KINDS)], seed=C)
        if i % 2:  # rows that start anywhere
            case = case._replace(logits=torch.cat([case.logits] * 2, 1)[:, 1 : C + 1])
        weight = torch.rand(C, generator=torch.Generator().manual_seed(C)) if i % 3 == 0 else None
        options = {"weight": weight, "label_smoothing": 0.1 * (i % 2), "only_correct": i % 5 == 0}
        options |= {"reduction": ("mean", "sum", "none")[i % 3], "zipf_weight": 0.5}
        soft = probabilities(case, TARGETS[i % len(TARGETS)])
        case.target[1] = -100
        for target, votes in ((case.target, case.votes), (case.target, None), (soft, case.votes)):
            yield case.logits, target, votes, options


def losses(backend: str, dtype: torch.dtype, computed: torch.dtype, inplace: bool) -> list[torch.Tensor]:
    """loss, ce, zipf, gradient of each call, for logits of a dtype, computed in the same or another."""
    found = []
    wide = torch.float64 if computed == torch.float64 else torch.float32
    for logits, target, votes, options in loss_calls(dtype):
        if options["weight"] is not None:
            options = options | {"weight": options["weight"].to(wide)}
        target = target.to(wide) if target.is_floating_point() else target
        leaf = logits.to(computed).detach().clone().requires_grad_()
        given = leaf.clone() if inplace else leaf
        parts = zls.zipf_cross_entropy(
            given, target, votes, return_parts=True, inplace=inplace, backend=backend, **options
        )
        parts[0].sum().backward()
        found += [*(p.detach() for p in parts), leaf.grad]
    return found


def distilled(backend: str, dtype: torch.dtype, computed: torch.dtype) -> list[torch.Tensor]:
    """loss, ce, distillation, gradient at every T that has a path of its own, with and without a target."""
    found = []
    wide = torch.float64 if computed == torch.float64 else torch.float32
    for i, C in enumerate(CLASSES):
        case, teacher = make(5, C, dtype=dtype, seed=C), make(5, C, dtype=dtype, seed=C + 1).logits
        case.target[1] = -100
        options = {"temperature": (1.0, 2.0, 4.0, 3.0)[i % 4], "reduction": ("mean", "sum", "none")[i % 3]}
        every = dict.fromkeys(
            ("ce_weight", "kd_weight", "tckd_weight", "nckd_weight", "soft_target_weight"), 0.5
        )
        for target, more in ((case.target, every), (None, {"ce_weight": 0.0, "kd_weight": 1.0})):
            x = case.logits.to(computed).detach().clone().requires_grad_()
            t = teacher.to(computed if i % 2 else wide)
            parts = zls.distillation_loss(
                x, t, target, form=("divergence", "cross_entropy")[i % 2], return_parts=True, backend=backend,
                **options, **more,
            )  # fmt: skip
            parts[0].sum().backward()
            found += [*(p.detach() for p in parts), x.grad]
    return found


def labels(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
    found = []
    for i, C in enumerate(CLASSES):
        case = make(5, C, 49, kind=KINDS[i % len(KINDS)], seed=C)
        mass = log_mass(zls.Zipf(1.0), 5, C, 49, dtype, torch.device("cpu"))
        found.append(ops.select("label_fwd", backend, case.votes)(case.target, case.votes, mass, C, -100))
    return found


def integers(backend: str) -> list[torch.Tensor]:
    """Ranks; votes of integers so small that every score is exact, ties included."""
    found = []
    for i, C in enumerate(CLASSES):
        case = make(5, C, 49, kind=KINDS[i % len(KINDS)], seed=C)
        found.append(zls.rank_votes(case.votes, C, backend=backend))
    for dtype in DTYPES:
        for D, H, W, C in ((1, 1, 1, 2), (3, 2, 5, 7), (24, 3, 3, 300), (33, 4, 4, 65), (72, 7, 7, 100)):
            g = torch.Generator().manual_seed(D)
            x, w = (torch.randint(-3, 4, size, generator=g).to(dtype) for size in ((2, D, H, W), (C, D)))
            b = torch.randint(-3, 4, (C,), generator=g).to(dtype)
            for features in (x, x.contiguous(memory_format=torch.channels_last)):
                found.append(zls.dense_vote(features, w, b, backend=backend))
                found.append(zls.dense_vote(features, w, None, upsample=2, backend=backend))
    return found


def everything(path: str) -> None:
    """What a process with a forced instruction set computes."""
    found = {"isa": ops.build_info()["isa_used"], "integers": integers("cpu")}
    found |= {
        f"losses {dtype} {i}": losses("cpu", dtype, dtype, i) for dtype in DTYPES for i in (False, True)
    }
    found |= {f"distilled {dtype}": distilled("cpu", dtype, dtype) for dtype in DTYPES}
    found |= {f"labels {dtype}": labels("cpu", dtype) for dtype in (torch.float32, torch.float64)}
    torch.save(found, path)


@pytest.fixture(scope="module")
def expected() -> dict[str, list[torch.Tensor]]:
    """By the reference in float64, and for losses by the reference in the logits' dtype too."""
    found = {"integers": integers("reference"), "labels": labels("reference", torch.float64)}
    for dtype in DTYPES:
        found[f"losses {dtype}"] = losses("reference", dtype, torch.float64, False)
        found[f"plain losses {dtype}"] = losses("reference", dtype, dtype, False)
        found[f"distilled {dtype}"] = distilled("reference", dtype, torch.float64)
    return found


def forced(isa: str, *command: str) -> subprocess.CompletedProcess:
    """A process of Python with a forced instruction set; skips where the processor does not have it."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=TESTS.parent,
        env={**os.environ, "ZIPFLS_CPU_ISA": isa, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        capture_output=True,
        text=True,
    )
    if "ZIPFLS_CPU_ISA must be" in done.stdout + done.stderr:
        pytest.skip(f"this processor does not have {isa}")
    return done


@instruction_sets
def test_every_instruction_set(isa, tmp_path, expected):
    done = forced(isa, "-c", f"import test_isa; test_isa.everything({str(tmp_path / 'found')!r})")
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found")
    assert found["isa"] == isa
    for got, exact in zip(found["integers"], expected["integers"], strict=True):
        assert torch.equal(got, exact)
    for dtype, roundings in ((torch.float32, 8), (torch.float64, 128)):  # the second: the reference's own
        for got, exact in zip(found[f"labels {dtype}"], expected["labels"], strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=roundings * torch.finfo(dtype).eps, atol=0)
    for dtype in DTYPES:
        for i, (got, exact) in enumerate(
            zip(found[f"distilled {dtype}"], expected[f"distilled {dtype}"], strict=True)
        ):
            wide, size = torch.promote_types(dtype, torch.float32), max(1.0, exact.abs().max().item())
            budget = (
                128 * torch.finfo(wide).eps * size + 2 * torch.finfo(got.dtype).eps * exact.abs().max().item()
            )
            assert error(got, exact) <= budget, (dtype, i)
    names = ("loss", "ce", "zipf", "gradient")
    for dtype, inplace in itertools.product(DTYPES, (False, True)):
        results = found[f"losses {dtype} {inplace}"], expected[f"losses {dtype}"]
        for i, (got, exact, plain) in enumerate(
            zip(*results, expected[f"plain losses {dtype}"], strict=True)
        ):
            size = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
            roundings = 256 if dtype == torch.float64 else 16  # float64 is held against itself
            budget = 2 * error(plain, exact) + roundings * torch.finfo(got.dtype).eps * max(size, 1e-3)
            assert got.dtype == plain.dtype
            assert error(got, exact) <= budget, (names[i % 4], dtype, inplace, i // 4)


@pytest.mark.slow
@instruction_sets
def test_suite_over_every_instruction_set(isa):
    """What the suite asks of the CPU kernels."""
    files = [
        TESTS / f"test_{name}.py"
        for name in ("golden", "loss", "soft", "label", "vote", "inplace", "distillation")
    ]
    done = forced(isa, "-m", "pytest", "--backend", "cpu", "-p", "no:cacheprovider", *map(str, files))
    assert done.returncode == 0, done.stdout[-5000:]
