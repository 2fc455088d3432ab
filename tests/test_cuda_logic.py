"""The CUDA kernels of the loss and the labels, run on the CPU: one fiber per CUDA thread.

simulator.py compiles the unchanged launchers and kernels of csrc/cuda three ways: plain; under
AddressSanitizer and UBSan; with a race check. Values are compared with reference.py in float64, under several
orders of the threads, several contents of fresh shared memory, and with asynchronous copies as early and as
late as they may come. Kernels with one planted fault each show what it catches.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import re
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cases import KINDS, TARGETS, error, infinite_rows, make, with_target
from simulator import BUILDS, GXX, KERNELS, compiled, copy_sources, plant

import zipfls_cuda as zls
from zipfls_cuda import labels, reference

pytestmark = pytest.mark.skipif(GXX is None, reason="no g++ to compile the CUDA kernels for the CPU with")

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
LANES8, LANES16, LANES32, BLOCK, CLUSTER, LONG = range(6)
SHAPES = {"8 lanes": (LANES8, 128, 1), "16 lanes": (LANES16, 128, 1), "32 lanes": (LANES32, 128, 1)}
SHAPES |= {"block": (BLOCK, 64, 1), "cluster": (CLUSTER, 64, 2), "long": (LONG, 512, 1)}


def held(shape: tuple[int, int, int], C: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """The shape, or the next wider one that can hold rows of C classes."""
    vectors = -(-C * dtype.itemsize // 16) + 1
    if shape[0] == LANES8 and vectors > 8 * 4:
        shape = SHAPES["32 lanes"]
    if shape[0] == LANES16 and vectors > 16 * 8:
        shape = SHAPES["block"]
    if shape[0] == LANES32 and vectors > 32 * 4:
        shape = SHAPES["block"]
    if shape[0] in (BLOCK, CLUSTER):
        threads = -(-vectors // (4 * shape[2]) // 32) * 32
        shape = (shape[0], max(threads, shape[1]), shape[2])
    return shape


@pytest.fixture(scope="module")
def drivers() -> dict[str, Path]:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(BUILDS, pool.map(lambda build: compiled("loss", build), BUILDS)))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The reference runs on thousands of tiny tensors: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The driver's protocol ----------------------------------------------------------------------------

# The fields of Header in loss_driver.cpp, in its order.
HEADER = [
    *("op", "dtype", "N", "C", "P", "wide", "has_votes", "dense", "has_weight", "ce", "zipf"),
    *("only_correct", "ignore_index", "reduction", "with_grad", "scaled", "phase", "row_gap"),
    *("kernel", "threads", "cluster", "blocks", "totals", "multiprocessors", "clusters"),
    *("order", "fill", "seed", "late", "R", "grad_loss_stride", "in_place", "repeats"),
]
LOSS, BACKWARD, RANK, LABEL, FAULT, SOFT_LOSS, DISTILL = range(7)
KEPT = 2  # in_place: by loss_factors_bwd
DEFAULTS = {"kernel": -1, "multiprocessors": 132, "clusters": 1, "repeats": 1, "ignore_index": -100}


def pack(numbers=(0.0, 0.0, 0.0), arrays=(), **header) -> bytes:
    assert not set(header) - set(HEADER), set(header) - set(HEADER)
    values = [int(header.get(name, DEFAULTS.get(name, 0))) for name in HEADER]
    return struct.pack(f"{len(HEADER)}q3d", *values, *numbers) + raw(arrays)


def raw(arrays) -> bytes:
    return b"".join(a.contiguous().view(torch.uint8).numpy().tobytes() for a in arrays if a.numel())


def spaced(x: torch.Tensor, gap: int) -> torch.Tensor:
    """Rows (N, C) with a gap after each but the last."""
    N, C = x.shape
    rows = torch.full((N, C + gap), 7.0, dtype=x.dtype)
    rows[:, :C] = x
    return rows.flatten()[: max(0, N * (C + gap) - gap)]


class Case:
    """One call: bytes for the driver, and how to take its result apart: (dtype, shape) of each output."""

    def __init__(self, data: bytes, outputs: list[tuple[torch.dtype, tuple[int, ...]]]):
        self.data, self.outputs = data, outputs


def execute(program: Path, cases: list[Case], tmp_path: Path) -> list[tuple[str, list[torch.Tensor]]]:
    """(faults, outputs) of each case; a sanitizer's report fails the test."""
    given, results = tmp_path / "cases", tmp_path / "results"
    given.write_bytes(b"".join(case.data for case in cases))
    done = subprocess.run([program, given, results], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    data, at, found = results.read_bytes(), 0, []
    for case in cases:
        (size,) = struct.unpack_from("q", data, at)
        faults, at = data[at + 8 : at + 8 + size].decode(), at + 8 + size
        tensors = []
        for dtype, shape in case.outputs:
            count = int(np.prod(shape))
            size = count * dtype.itemsize
            tensor = torch.frombuffer(bytearray(data[at : at + size] or b"\0"), dtype=torch.uint8)
            tensors.append(tensor[:size].view(dtype).reshape(shape))
            at += size
        found.append((faults, tensors))
    assert at == len(data)
    return found


def loss_case(
    case,
    *,
    law=None,
    votes_dtype=torch.int32,
    weight=None,
    ce_weight=1.0,
    zipf_weight=1.0,
    label_smoothing=0.0,
    only_correct=False,
    ignore_index=-100,
    reduction="mean",
    with_grad=True,
    dense=None,
    shape=None,
    **header,
) -> Case:
    """A call of loss_fwd, as register.cpp would make it."""
    logits, target, votes = case
    soft = target.dim() == 2
    N, C = logits.shape
    dtype = logits.dtype
    A = reference.accumulation_dtype(dtype)
    P = 0 if votes is None else votes.shape[1]
    law = law or zls.Zipf(1.0)
    mass = dense if dense is not None else labels.log_mass(law, N, C, P, A, logits.device)
    gap = header.get("row_gap", 0)
    arrays = [spaced(logits, gap), spaced(target.to(A), gap) if soft else target]
    arrays += ([] if votes is None else [votes.to(votes_dtype)]) + [mass.to(A)]
    arrays += [] if weight is None else [weight.to(A)]
    arrays += [upstream_of(N).to(A)] if header.get("in_place") == KEPT else []
    if shape is not None:
        header |= dict(zip(("kernel", "threads", "cluster"), held(shape, C, dtype)))
    data = pack(
        (ce_weight, zipf_weight, label_smoothing),
        arrays,
        op=SOFT_LOSS if soft else LOSS,
        dtype=DTYPES[dtype],
        N=N,
        C=C,
        P=P,
        wide=votes_dtype == torch.int64,
        has_votes=votes is not None,
        dense=dense is not None,
        has_weight=weight is not None,
        ce=ce_weight != 0,
        zipf=zipf_weight != 0,
        only_correct=only_correct,
        ignore_index=ignore_index,
        reduction=("none", "sum", "mean").index(reduction),
        with_grad=with_grad,
        scaled=with_grad and dtype == torch.float16 and reduction == "mean",
        R=mass.shape[0],
        **header,
    )
    return Case(data, outputs_of(logits, reduction, with_grad))


def upstream_of(N: int) -> torch.Tensor:
    """The gradient of each loss, (N,), that a KEPT gradient is multiplied by."""
    return torch.linspace(0.5, 1.5, N)


def keeps(case, options) -> bool:
    """Whether a call's gradient can be made from factors."""
    _, target, votes = case
    weighted = options.get("weight") is not None and options.get("label_smoothing", 0) != 0
    votes = votes is not None or options.get("zipf_weight", 1) == 0
    others = options.get("dense") is not None or options.get("row_gap") or options.get("in_place")
    return votes and not weighted and not others and options.get("with_grad", True) and target.dim() == 1


def outputs_of(logits, reduction: str, with_grad: bool) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """loss, ce, zipf, grad, grad_scale, and what the driver chose."""
    A, results = reference.accumulation_dtype(logits.dtype), logits.shape[:1] if reduction == "none" else ()
    grad = logits.shape if with_grad else (0,)
    return [(A, results)] * 3 + [(logits.dtype, grad), (A, ()), (torch.int64, (4,))]


def by_reference(case, dtype, **options):
    """What reference.py makes of it: (loss, ce, zipf, grad times grad_scale)."""
    logits, target, votes = case
    kept = options.get("in_place") == KEPT
    options = {k: v for k, v in options.items() if k not in ("shape", "votes_dtype") and k not in HEADER[16:]}
    law, dense = options.pop("law", None) or zls.Zipf(1.0), options.pop("dense", None)
    A = reference.accumulation_dtype(dtype)
    N, C = logits.shape
    P = None if votes is None else votes.shape[1]
    mass = dense if dense is not None else labels.log_mass(law, N, C, P, torch.float64, logits.device)
    weight = options.pop("weight", None)
    args = {"ce_weight": 1.0, "zipf_weight": 1.0, "label_smoothing": 0.0, "only_correct": False}
    args |= {"ignore_index": -100, "reduction": "mean", "with_grad": True} | options
    target = target.to(A) if target.dim() == 2 else target
    loss, ce, zipf, grad, scale = reference.loss_fwd(
        logits.to(dtype), target, votes, mass.to(A), None if weight is None else weight.to(A), *args.values()
    )
    if kept:
        grad = (grad.to(A) * upstream_of(N).to(A)[:, None]).to(grad.dtype)
    grad = grad.to(A) * scale if scale.numel() else grad
    return loss, ce, zipf, grad


def check_loss(program, tmp_path, calls: list[tuple]) -> None:
    """Each (case, options) against float64, within twice plain PyTorch's error, and without a fault.

    Calls whose gradient can be made from factors are made that way too.
    """
    kept = [(case, options | {"in_place": KEPT}) for case, options in calls if keeps(case, options)]
    check(program, tmp_path, calls + kept, loss_case, by_reference)


def check(program, tmp_path, calls: list[tuple], make_case, by_reference) -> None:
    """``check_loss`` of any loss: make_case and by_reference take a case and its options."""
    cases = [make_case(case, **options) for case, options in calls]
    for (case, options), (faults, got) in zip(calls, execute(program, cases, tmp_path)):
        assert not faults, f"{options}: {faults}"
        loss, ce, zipf, grad, scale, chosen = got
        dtype = case[0].dtype
        exact = by_reference(case, torch.float64, **options)
        plain = by_reference(case, dtype, **options)
        if dtype == torch.float16 and options.get("reduction", "mean") == "mean" and grad.numel():
            grad = grad.float() * scale
        assert chosen[3] == 0, "the tile counter is not back at 0"
        for name, a, b, c in zip(("loss", "ce", "zipf", "grad"), (loss, ce, zipf, grad), exact, plain):
            if name == "grad" and not grad.numel():
                continue
            what = f"{name} of {tuple(case[0].shape)} {dtype} {options}"
            try:
                got_error, plain_error = error(a, b), error(c, b)
            except AssertionError as failed:
                raise AssertionError(f"{what}: {failed}\n{a}\n{b}") from None
            size = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
            roundings = 256 if dtype == torch.float64 else 16  # float64 is held against itself
            budget = 2 * plain_error + roundings * torch.finfo(a.dtype).eps * max(size, 1e-3)
            assert got_error <= budget, f"{what}: error {got_error:.3g} above {budget:.3g}"


# Values, in every kernel --------------------------------------------------------------------------

SIZES = [(5, 12, 9), (3, 2, 5), (4, 3, 1), (5, 100, 49), (2, 97, 320), (20, 37, 5), (1, 7, 0)]
SCHEDULES = [{"order": o, "fill": f, "seed": 7 + o, "late": o % 2} for o, f in zip(range(4), (2, 0, 1, 2))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_in_every_kernel(drivers, tmp_path, shape, dtype):
    calls = [(make(*size, dtype=dtype), {"zipf_weight": 0.5}) for size in SIZES]
    calls += [(make(5, 12, 9, kind=kind, dtype=dtype), {"reduction": "sum"}) for kind in KINDS]
    calls += [(make(5, 6, 40, kind=kind, dtype=dtype), {"votes_dtype": torch.int64}) for kind in KINDS]
    for i, (_, options) in enumerate(calls):
        options |= {"shape": SHAPES[shape]} | SCHEDULES[i % 4]
    check_loss(drivers["plain"], tmp_path, calls)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_any_size_in_every_kernel(drivers, tmp_path, shape):
    """What rounding m log2 e loses is thousands at m = 1e10: no power of 2 of a float32."""
    calls = []
    for size in (1e8, 1e9, 1e10, 1e12, 1e30):
        case = make(5, 41, 9, seed=4)
        calls.append(
            (case._replace(logits=case.logits * size), {"shape": SHAPES[shape], "reduction": "none"})
        )
    check_loss(drivers["plain"], tmp_path, calls)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_warps(drivers, tmp_path, dtype):
    """Blocks whose warps hold all the vectors that they can but the last: -inf, infinity, large logits."""
    case = make(8, 2500 if dtype == torch.float64 else 10000, 9, dtype=dtype)
    z, planned = case.logits, {"multiprocessors": 132, "reduction": "none"}
    z[1, 5:2000:7] = -torch.inf
    z[2, :1000] = -torch.inf
    z[3, 700] = torch.inf
    z[4, 700] = torch.nan
    z[5, 1:] = -torch.inf
    z[6] = -torch.inf
    z[6, [1, 3, -1]] = torch.tensor([1.0, 0.0, -0.5], dtype=z.dtype)  # the last in another warp
    case.target[:7] = torch.tensor([0, 4, 1100, 701, 702, 0, 1])
    calls = [(case, planned), (case, planned | {"only_correct": True})]
    if dtype.itemsize == 4 or dtype == torch.bfloat16:
        calls += [(case._replace(logits=z.clip(-4, 4).nan_to_num() * size), planned) for size in (1e10, 1e30)]
    check_loss(drivers["plain"], tmp_path, calls)


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_options_in_every_kernel(drivers, tmp_path, shape):
    case = make(9, 41, 6, seed=3)
    case.logits[torch.arange(4), case.target[:4]] += 8  # half of them classified correctly
    case.logits[5, 7] = case.logits[5, case.target[5]]  # a tie
    case.target[[1, 8]] = 4
    weight = torch.rand(41, generator=torch.Generator().manual_seed(1))
    calls = []
    values = (("mean", "sum", "none"), (0.0, 0.1), (None, weight), (False, True), (0.0, 1.0), (0.0, 0.3))
    for reduction, smoothing, w, only_correct, ce_weight, zipf_weight in itertools.product(*values):
        options = {"reduction": reduction, "label_smoothing": smoothing, "weight": w, "ignore_index": 4}
        options |= {"only_correct": only_correct, "ce_weight": ce_weight, "zipf_weight": zipf_weight}
        calls.append((case, options | {"shape": SHAPES[shape], "blocks": 2} | SCHEDULES[len(calls) % 4]))
    calls += [(case, options | {"with_grad": False}) for case, options in calls[::7]]
    check_loss(drivers["plain"], tmp_path, calls)


def corner_cases(dtype) -> list:
    """Infinities, NaN, masked classes voted and not, with mass and without; targets that dominate."""
    inf, cases = torch.inf, []
    base = make(6, 30, 20, kind="some", dtype=dtype)
    base.target[:] = 4
    for change in range(12):
        case = base._replace(logits=base.logits.clone(), votes=base.votes.clone(), target=base.target.clone())
        z = case.logits
        if change == 0:
            z[:3, 10:], z[3:, ::3] = -inf, -inf
        elif change == 1:
            z[1, 7] = inf
        elif change == 2:
            z[1, 7] = torch.nan
        elif change == 3:
            z[:, 4] = torch.tensor([30.0, 1e4, -1e4, inf, -inf, torch.nan])
        elif change == 4:
            z[:, 5:], z[:, :4] = -inf, -inf
        elif change == 5:
            z[:] = -inf
        elif change == 6:
            case.votes[:] = 3
            z[:, 3] = -inf
        elif change == 7:
            z += 8192
        elif change == 8:
            z[:, :28] = -10000.0
        elif change == 9:
            case.target[:] = -100
        elif change == 10:
            case.target[[0, 5]] = -100
            z[0] = torch.nan
        elif change == 11:
            z[2] = inf
        cases.append(case)
    return cases


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_corners_in_every_kernel(drivers, tmp_path, shape, dtype):
    calls = []
    for case in corner_cases(dtype):
        for options in (
            {"reduction": "none"},
            {"reduction": "none", "ce_weight": 0.0, "law": zls.LinearDecay(0.0)},
            {"reduction": "none", "zipf_weight": 0.0, "label_smoothing": 0.3},
            {"reduction": "mean", "only_correct": True},
            {"reduction": "none", "ce_weight": 0.0, "law": zls.Zipf(8.0)},
        ):
            calls.append((case, options | {"shape": SHAPES[shape]} | SCHEDULES[len(calls) % 4]))
    check_loss(drivers["plain"], tmp_path, calls)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_shares_of_low_rows(drivers, tmp_path, dtype):
    """A warp, or a block of a cluster, with nothing but -inf, in rows whose exponentials would overflow."""
    vector, calls = 16 // dtype.itemsize, []
    for shape, low, zipf in itertools.product(SHAPES.values(), (-1000.0, -300.0, 300.0), (0.0, 0.5)):
        case = make(5, 75 * vector, 9, dtype=dtype)
        case.logits.add_(low)
        case.target[:] = torch.tensor([1, 2, 30 * vector, 65 * vector, 70 * vector])
        for first, last in ((32, 64), (0, 32), (38, 75)):
            masked = case._replace(logits=case.logits.clone())
            masked.logits[:, first * vector : last * vector] = -torch.inf
            calls.append((masked, {"shape": shape, "zipf_weight": zipf, "reduction": "sum"}))
    check_loss(drivers["plain"], tmp_path, calls)


def test_masked_class_without_mass_is_skipped(drivers, tmp_path):
    votes = torch.tensor([[c for c in range(6) for _ in range(6 - c)]]).int()  # every rank is taken
    logits, target = torch.tensor([[1.0, 0.5, -0.5, 2.0, 0.0, -torch.inf]]), torch.tensor([0])
    options = {"law": zls.LinearDecay(0.0), "ce_weight": 0.0}
    check_loss(
        drivers["plain"],
        tmp_path,
        [((logits, target, votes), options | {"shape": shape}) for shape in SHAPES.values()],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_rows(drivers, tmp_path, dtype):
    """Every phase of a row to the 16-byte vectors, and gaps between rows that keep it."""
    size, calls = dtype.itemsize, []
    vector = 16 // size
    for C in [*range(2, 2 * vector + 3), 61, 63, 64, 65]:
        for shape in SHAPES.values():
            phase = len(calls) % vector * size
            calls.append((make(3, C, 10, seed=C, dtype=dtype), {"shape": shape, "phase": phase}))
    calls += [(case, options | {"row_gap": vector}) for case, options in calls[::3]]
    check_loss(drivers["plain"], tmp_path, calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_long_rows(drivers, tmp_path, dtype):
    """Hash tables of votes (above kDirectClasses), several vectors a thread, empty slices of a cluster."""
    calls = []
    for C, P, kind in [
        (2049, 16, "peaked"),
        (5003, 49, "uniform"),
        (2500, 300, "distinct"),
        (2100, 9, "target"),
    ]:
        case = make(2, C, P, kind=kind, dtype=dtype)
        for kernel, threads, cluster in [(BLOCK, 64, 1), (CLUSTER, 32, 4 if C > 2500 else 8), (LONG, 512, 1)]:
            calls.append((case, {"shape": (kernel, threads, cluster), "label_smoothing": 0.1}))
    vector = 16 // dtype.itemsize
    ragged = make(3, 1600 * vector + 1, 20, dtype=dtype)  # 4 vectors a thread at once, up to a part of one
    ragged.target[1], ragged.logits[1, 700:] = -100, torch.nan
    for phase in (0, dtype.itemsize):
        calls += [
            (ragged, {"shape": (LONG, 512, 1), "phase": phase, "reduction": r}) for r in ("mean", "none")
        ]
    masked = make(2, 5000, 30, dtype=dtype)
    masked.target[:] = 4990
    masked.logits[:, :4500] = -torch.inf  # whole warps and blocks of nothing but -inf
    calls += [(masked, {"shape": (CLUSTER, 32, 4), "zipf_weight": z}) for z in (0.0, 1.0)]
    calls += [(masked, {"shape": (LONG, 512, 1), "zipf_weight": z}) for z in (0.0, 1.0)]
    check_loss(drivers["plain"], tmp_path, calls)


def test_launches_as_planned(drivers, tmp_path):
    """What the launcher would run: every kernel is chosen somewhere, and computes the same."""
    chosen = set()
    shapes = [(300, 10, 5, 1), (40, 500, 9, 2), (70, 1000, 49, 1), (6, 1000, 49, 132), (5, 100, 320, 132)]
    shapes += [(3, 3000, 20, 1), (2, 20000, 16, 132), (1, 70000, 5, 1)]
    for N, C, P, multiprocessors in shapes:
        for clusters in (1, 0) if C > 15360 else (1,):
            for dtype in (torch.float32, torch.bfloat16) if C < 20000 else (torch.bfloat16,):
                options = {"multiprocessors": multiprocessors, "clusters": clusters, "ignore_index": 3}
                case = make(N, C, P, dtype=dtype)
                check_loss(drivers["plain"], tmp_path, [(case, options)])
                data = loss_case(case, **options)
                ((_, got),) = execute(drivers["plain"], [data], tmp_path)
                chosen.add(int(got[5][0]))
    assert chosen == {LANES8, LANES16, LANES32, BLOCK, CLUSTER, LONG}


def test_laws_and_dense_masses(drivers, tmp_path):
    """Every law by rank; and loss_dense, with a mass for every class: random laws, ranks by logits."""
    laws = [zls.Zipf(0.5), zls.Zipf(30.0), zls.Constant(), zls.LinearDecay(0.01), zls.ExponentialDecay(0.7)]
    calls = []
    for law, kind in itertools.product(laws, ("peaked", "distinct")):
        calls += [
            (make(5, 13, 20, kind=kind), {"law": law, "shape": SHAPES[s]}) for s in ("8 lanes", "block")
        ]
    weight = torch.rand(30, generator=torch.Generator().manual_seed(1))
    for dtype in DTYPES:
        for case in [make(6, 30, 5, dtype=dtype), *corner_cases(dtype)]:
            dense = torch.rand(6, 30, generator=torch.Generator().manual_seed(2)).log()
            dense[1, 6:12], dense[2] = -torch.inf, -torch.inf
            for reduction, only_correct in itertools.product(("mean", "none"), (False, True)):
                options = {"dense": dense, "reduction": reduction, "only_correct": only_correct}
                calls.append((case, options | {"label_smoothing": 0.1, "weight": weight}))
                calls.append((case._replace(votes=None), options | {"ce_weight": 0.0}))
    check_loss(drivers["plain"], tmp_path, calls)


def test_denominators_summed_beforehand(drivers, tmp_path):
    """loss_totals's partial sums give what every block adds up itself."""
    case = make(300, 12, 9)
    case.target[::7] = -100
    weight = torch.rand(12, generator=torch.Generator().manual_seed(1))
    calls = []
    for only_correct, w, totals in itertools.product((False, True), (None, weight), (0, 1, 5)):
        calls.append((case, {"only_correct": only_correct, "weight": w, "totals": totals, "blocks": 3}))
    check_loss(drivers["plain"], tmp_path, calls)


def test_empty_batch(drivers, tmp_path):
    for shape in SHAPES.values():
        for reduction in ("mean", "sum", "none"):
            case = loss_case(make(0, 12, 9), reduction=reduction, shape=shape, blocks=1)
            ((faults, got),) = execute(drivers["plain"], [case], tmp_path)
            assert not faults
            if reduction != "none":
                assert got[0].isnan() if reduction == "mean" else got[0] == 0


@pytest.mark.parametrize(
    ("argument", "row", "bad"),
    [("target", 1, 9), ("target", 2, -1), ("target", 0, 2**40), ("votes", 1, 9), ("votes", 3, 2**40)],
)
def test_out_of_range(drivers, tmp_path, argument, row, bad):
    """That sample is NaN, the others are unchanged, and AddressSanitizer reports nothing."""
    case = make(5, 9, 4)
    votes = case.votes.long()
    good = [i for i in range(5) if i != row]
    expected = by_reference(case, torch.float32, reduction="none")
    votes[row, 0] = -(2**32) + 3  # no vote: it must not wrap to class 3
    if argument == "target":
        case.target[row] = bad
    else:
        votes[row, 2] = bad
    case = case._replace(votes=votes)
    options = {"votes_dtype": torch.int64, "reduction": "none"}
    dense = torch.zeros(5, 9)
    cases = [loss_case(case, **options, shape=shape) for shape in SHAPES.values()]
    cases += [loss_case(case, **options, shape=shape, zipf_weight=0.0) for shape in SHAPES.values()]
    cases += [loss_case(case, **options, dense=dense)]
    weight = torch.ones(9)
    means = [
        loss_case(case, votes_dtype=torch.int64, shape=shape, weight=weight) for shape in SHAPES.values()
    ]
    ignored = case._replace(target=case.target.clone())
    ignored.target[row] = -100
    skipped = [loss_case(ignored, **options, shape=shape) for shape in SHAPES.values()]
    found = execute(drivers["sanitized"], cases + means + skipped, tmp_path)
    for i, (faults, (loss, _ce, _zipf, grad, _, _)) in enumerate(found):
        assert not faults
        if i < len(cases):
            assert grad[row].isnan().all()
            assert loss[row].isnan()
            assert loss[good].isfinite().all()
        elif i < len(cases) + len(means):
            assert loss.isnan()
            assert grad[row].isnan().all()
            assert grad[good].isfinite().all()
        else:
            assert loss[row] == 0
            assert (grad[row] == 0).all()
            torch.testing.assert_close(loss[good], expected[0][good])
        if i < 5:
            torch.testing.assert_close(loss[good], expected[0][good])
            torch.testing.assert_close(grad[good], expected[3][good])


def test_out_of_range_in_a_long_row(drivers, tmp_path):
    """The NaN reaches every column, where a thread writes several vectors at once too."""
    case = make(2, 8200, 4)
    case.target[0] = 8200
    call = loss_case(case, shape=SHAPES["long"], reduction="none")
    ((faults, (loss, _ce, _zipf, grad, _, _)),) = execute(drivers["sanitized"], [call], tmp_path)
    assert not faults
    assert loss[0].isnan()
    assert grad[0].isnan().all()
    assert grad[1].isfinite().all()


# Targets of probabilities -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_targets(drivers, tmp_path, dtype):
    """Every kind of target and of votes; rows held, of several parts (here by few threads) and ragged."""
    calls = []
    for kind in TARGETS:
        calls += [(with_target(make(*size, dtype=dtype), kind), {"zipf_weight": 0.5}) for size in SIZES]
        calls += [
            (with_target(make(5, 12, 9, kind=k, dtype=dtype), kind), {"reduction": "none"}) for k in KINDS
        ]
    vector = 16 // dtype.itemsize
    for C in [*range(2, 2 * vector + 3), 61, 64, 65, 700]:
        case = with_target(make(3, C, 10, seed=C, dtype=dtype), TARGETS[C % len(TARGETS)])
        calls.append((case, {"phase": len(calls) % vector * dtype.itemsize, "label_smoothing": 0.1}))
    calls += [(case, options | {"row_gap": 2 * vector}) for case, options in calls[::3]]
    for C, P, kind in [
        (2049, 16, "peaked"),
        (5003, 49, "uniform"),
        (2100, 300, "distinct"),
        (900, 9, "target"),
    ]:
        for target in ("one-hot", "mixup", "half"):
            calls.append((with_target(make(2, C, P, kind=kind, dtype=dtype), target), {"blocks": 1}))
    for i, (_, options) in enumerate(calls):
        options |= {"shape": (-1, 32 * (i % 3), 1), "order": i % 4}  # 0: as planned
    check_loss(drivers["plain"], tmp_path, calls)


@pytest.mark.parametrize("kind", ["one-hot", "mixup of smoothed", "half", "uniform", "distinct"])
def test_soft_options(drivers, tmp_path, kind):
    case = make(9, 41, 6, seed=3)
    case.logits[torch.arange(4), case.target[:4]] += 8  # half of them classified correctly
    case.logits[5, 7] = case.logits[5, case.target[5]]  # a tie
    case = with_target(case, kind)
    weight = torch.rand(41, generator=torch.Generator().manual_seed(1))
    calls = []
    values = (("mean", "sum", "none"), (0.0, 0.1), (None, weight), (False, True), (0.0, 1.0), (0.0, 0.3))
    for reduction, smoothing, w, only_correct, ce_weight, zipf_weight in itertools.product(*values):
        options = {"reduction": reduction, "label_smoothing": smoothing, "weight": w}
        options |= {"only_correct": only_correct, "ce_weight": ce_weight, "zipf_weight": zipf_weight}
        calls.append((case, options | {"blocks": 2} | SCHEDULES[len(calls) % 4]))
    calls += [(case, options | {"with_grad": False}) for case, options in calls[::7]]
    laws = [zls.Zipf(0.5), zls.Zipf(30.0), zls.Constant(), zls.LinearDecay(0.01), zls.ExponentialDecay(0.7)]
    calls += [(case, {"law": law}) for law in laws]
    check_loss(drivers["plain"], tmp_path, calls)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_corners(drivers, tmp_path, dtype):
    """Infinities and NaN in logits and target; masses for every class, rows without any; wrong votes."""
    calls = []
    for kind, case in itertools.product(
        ("one-hot", "mixup", "half", "distinct", "uniform"), corner_cases(dtype)
    ):
        case.target[case.target == -100] = 0  # nothing is ignored
        case = with_target(case, kind)
        dense = torch.rand(6, 30, generator=torch.Generator().manual_seed(2)).log()
        dense[1, 6:12], dense[2] = -torch.inf, -torch.inf
        for options in (
            {"reduction": "none"},
            {"reduction": "none", "ce_weight": 0.0, "law": zls.LinearDecay(0.0)},
            {"reduction": "none", "zipf_weight": 0.0, "label_smoothing": 0.3},
            {"reduction": "mean", "only_correct": True},
            {"reduction": "none", "ce_weight": 0.0, "law": zls.Zipf(8.0)},
            {"reduction": "none", "dense": dense, "label_smoothing": 0.1},
            {"reduction": "mean", "dense": dense, "ce_weight": 0.0, "only_correct": True},
        ):
            calls.append((case, options | SCHEDULES[len(calls) % 4]))
    for value, (part, only_correct) in itertools.product(
        (torch.nan, -1.0), itertools.product((1.0, 0.0), (False, True))
    ):
        case = with_target(make(6, 30, 20, dtype=dtype), "mixup")
        case.target[1, 3] = case.target[4] = value
        options = {"reduction": "none", "only_correct": only_correct, "zipf_weight": part}
        calls.append((case, options | SCHEDULES[len(calls) % 4]))
    z, t, votes = infinite_rows()
    for options in (
        {"zipf_weight": 0.5, "only_correct": True, "dense": torch.rand(z.shape).log()},
        {"zipf_weight": 0.5, "weight": torch.arange(11.0)},
        {"zipf_weight": 0.0, "label_smoothing": 0.1},
    ):
        case = make(*z.shape, votes.shape[1])._replace(logits=z.to(dtype), target=t, votes=votes)
        calls.append((case, {"reduction": "none"} | options | SCHEDULES[len(calls) % 4]))
    check_loss(drivers["plain"], tmp_path, calls)


def test_soft_empty_batch(drivers, tmp_path):
    for reduction in ("mean", "sum", "none"):
        case = loss_case(with_target(make(0, 12, 9), "mixup"), reduction=reduction, blocks=1)
        ((faults, got),) = execute(drivers["plain"], [case], tmp_path)
        assert not faults
        if reduction != "none":
            assert got[0].isnan() if reduction == "mean" else got[0] == 0


@pytest.mark.parametrize("dense", [False, True])
def test_soft_vote_out_of_range(drivers, tmp_path, dense):
    """That sample is NaN, the others are unchanged, and AddressSanitizer reports nothing."""
    case = with_target(make(5, 9, 4), "mixup")
    votes = case.votes.long()
    votes[:, 0], votes[3, 2] = -(2**32) + 3, 2**40  # no vote: it must not wrap to class 3; a wrong one
    masses = torch.zeros(5, 9) if dense else None
    others = [0, 1, 2, 4]
    options = {"votes_dtype": torch.int64, "reduction": "none", "dense": masses}
    mild = case._replace(votes=votes.where(votes < 9, -1))
    expected = by_reference(mild, torch.float32, **options)
    for zipf_weight in (1.0, 0.0):
        given = loss_case(case._replace(votes=votes), zipf_weight=zipf_weight, **options)
        ((faults, got),) = execute(drivers["sanitized"], [given], tmp_path)
        assert not faults
        assert got[3][3].isnan().all()
        for name in range(3):
            assert got[name][3].isnan()
        if zipf_weight == 1:
            torch.testing.assert_close(got[0][others], expected[0][others])
            torch.testing.assert_close(got[3][others], expected[3][others])


# Distillation -------------------------------------------------------------------------------------


class Taught(NamedTuple):
    logits: torch.Tensor  # (N, C)
    teacher: torch.Tensor  # (N, C), of the same type or of the accumulation type
    target: torch.Tensor | None  # (N,) int64
    sample_weight: torch.Tensor | None  # (N,)
    index: torch.Tensor | None = None  # (N,) int64: the teacher is a table (R, C)


def taught(N=5, C=12, dtype=torch.float32, *, wide=False, seed=0, scale=2.0) -> Taught:
    case, other = (make(N, C, 1, seed=seed + i, scale=scale, dtype=torch.float64) for i in range(2))
    to = reference.accumulation_dtype(dtype) if wide else dtype
    return Taught(case.logits.to(dtype), other.logits.to(to), case.target, None)


TERMS = ("ce_weight", "kd_weight", "tckd_weight", "nckd_weight", "soft_target_weight")
ALL = dict(zip(TERMS, (0.7, 0.3, 1.1, 2.0, 0.4)))
DISTILLATION = dict.fromkeys((*TERMS, "max_weight"), 0.0) | {"temperature": 1.0, "form": "divergence"}
DISTILLATION |= {"ignore_index": -100, "reduction": "mean", "with_grad": True}


def split(options: dict) -> tuple[dict, dict]:
    """distill_fwd's options, all of them in its order, and the driver's."""
    given = DISTILLATION | {k: v for k, v in options.items() if k in DISTILLATION}
    return given, {k: v for k, v in options.items() if k not in DISTILLATION}


def distill_case(case: Taught, **options) -> Case:
    """A call of distill_fwd, as register.cpp would make it."""
    o, header = split(options)
    z, t, target, weight, index = case
    A = reference.accumulation_dtype(z.dtype)
    mean = o["reduction"] == "mean"
    gap = header.get("row_gap", 0)
    data = pack(
        (o["ce_weight"], 1.0, 0.0),
        [],
        op=DISTILL,
        dtype=DTYPES[z.dtype],
        N=z.shape[0],
        C=z.shape[1],
        ce=o["ce_weight"] != 0,
        zipf=True,
        ignore_index=o["ignore_index"],
        reduction=("none", "sum", "mean").index(o["reduction"]),
        with_grad=o["with_grad"],
        scaled=o["with_grad"] and z.dtype == torch.float16 and mean,
        **header,
    )
    flags = (t.dtype != z.dtype, target is not None, weight is not None, o["form"] == "divergence")
    columns = 1 if weight is None else weight.dim()
    kinds = (index is not None, len(t), columns, o["form"] == "probabilities")
    weights = (o[term] for term in (*TERMS[1:], "max_weight"))
    data += struct.pack("8q6d", *flags, *kinds, *weights, o["temperature"])
    arrays = [spaced(z, gap), spaced(t, gap)]
    arrays += [x for x in (target, None if weight is None else weight.to(A), index) if x is not None]
    return Case(data + raw(arrays), outputs_of(z, o["reduction"], o["with_grad"]))


def distill_by_reference(case: Taught, dtype, **options) -> tuple[torch.Tensor, ...]:
    o, _ = split(options)
    A = reference.accumulation_dtype(dtype)
    weight = None if case.sample_weight is None else case.sample_weight.to(A)
    values = list(o.values())
    *parts, grad, scale = reference.distill_fwd(
        case.logits.to(dtype), case.teacher.to(A), case.target, weight, case.index, *values
    )
    return *parts, grad.to(A) * scale if scale.numel() else grad


def check_distill(program, tmp_path, calls: list[tuple]) -> None:
    check(program, tmp_path, calls, distill_case, distill_by_reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distillation(drivers, tmp_path, dtype):
    """Each term, both types of teacher, rows held, of several parts (here by few threads) and ragged."""
    calls = []
    for C, terms, T in itertools.product((2, 9, 100), [*({term: 1.3} for term in TERMS), ALL], (1.0, 4.0)):
        calls.append((taught(5, C, dtype, wide=len(calls) % 3 == 0), {"temperature": T, **terms}))
    vector = 16 // dtype.itemsize
    for C in [*range(2, 2 * vector + 3), 61, 64, 65, 700]:
        case = taught(3, C, dtype, wide=C % 2 == 0, seed=C)
        options = {"phase": len(calls) % vector * dtype.itemsize, "temperature": 2.5, **ALL}
        calls += [(case, options), (case, options | {"row_gap": 2 * vector})]
    for C in (900, 2049, 5003):
        case = taught(2, C, dtype, wide=C == 2049)
        masked = taught(2, C, dtype)
        masked.logits[:, 600:] = masked.teacher[:, 600:] = -torch.inf  # parts and threads without a class
        masked.teacher[:, 300:350] = -1e4
        late = taught(2, C, dtype)
        late.logits[:, 800:] += 300  # the maxima grow from part to part
        late.teacher[:, 850:] += 200
        without = taught(
            2, C, dtype
        )  # threads and parts where the teacher has no mass, the student none but 0
        without.logits[:, : C * 2 // 3], without.teacher[:, : C * 2 // 3] = -torch.inf, -1e4
        for chosen in (case, masked, late, without):
            calls.append((chosen, {"temperature": 2.0, "blocks": 1, "phase": dtype.itemsize, **ALL}))
            calls.append((chosen._replace(target=None), {"kd_weight": 1.0, "blocks": 1}))
    for i, (_, options) in enumerate(calls):
        options |= {"threads": 32 * (i % 3)} | SCHEDULES[i % 4]  # 0: as planned
    check_distill(drivers["plain"], tmp_path, calls)


def test_distillation_options(drivers, tmp_path):
    case = taught(9, 41, seed=3)
    case.target[[1, 8]] = 4
    weight = torch.rand(9, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    kd = {"kd_weight": 1.0, "temperature": 4.0}
    dkd = {"ce_weight": 1.0, "tckd_weight": 1.0, "nckd_weight": 8.0, "temperature": 4.0}
    nkd = {"ce_weight": 1.0, "soft_target_weight": 1.0, "nckd_weight": 1.5, "temperature": 1.0}
    calls = []
    for terms, reduction, form, w, given, totals in itertools.product(
        (kd, {"ce_weight": 0.1, **kd}, dkd, nkd, {"ce_weight": 1.0}, {"soft_target_weight": 1.0}, ALL),
        ("mean", "sum", "none"),
        ("divergence", "cross_entropy"),
        (None, weight),
        (True, False),
        (0, 2),
    ):
        if not given and (terms is not kd or totals):
            continue
        options = {"reduction": reduction, "form": form, "ignore_index": 4, "totals": totals, **terms}
        chosen = case._replace(sample_weight=w, target=case.target if given else None)
        calls.append((chosen, options | {"blocks": 2} | SCHEDULES[len(calls) % 4]))
    calls += [(case, options | {"with_grad": False}) for case, options in calls[::7]]
    check_distill(drivers["plain"], tmp_path, calls)


OF_METHODS = (
    {"max_weight": 0.7},
    {"max_weight": 0.7, **ALL},
    {"form": "probabilities", "kd_weight": 1.3},
    {"form": "probabilities", "ce_weight": 1.0, "kd_weight": 1.0, "max_weight": 1.0},
    {"form": "probabilities", "max_weight": 0.7, **ALL},
)


def for_methods(N, C, dtype, options, *, wide=False) -> Taught:
    """Ties of the largest logit around the target, and labels of several sums, one of them 0."""
    case = taught(N, C, dtype, wide=wide, seed=C)
    z, t, y = case.logits, case.teacher, case.target
    y[:2] = torch.tensor([0, C - 1])
    for i in range(2):
        z[i, [0, C - 1]] = z[i].amax() + 1
    z[2, C // 2 :] = z[2].amax() + 1
    if options.get("form") == "probabilities":
        t = (t.double().softmax(1) * torch.arange(float(N))[:, None]).to(t.dtype)
    return case._replace(teacher=t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distillation_of_methods(drivers, tmp_path, dtype):
    """Labels as the teacher, both weights, the largest logit; rows held, in parts, and of a table."""
    calls = []
    for C, options in itertools.product((2, 9, 64, 700, 5008), OF_METHODS):
        k = len(calls)
        case = for_methods(5, C, dtype, options, wide=k % 3 == 0)
        weight = torch.rand(5, 2, generator=torch.Generator().manual_seed(k))
        case = case._replace(sample_weight=(weight, None, weight[:, 0])[k % 3])
        if C % 16 == 0 and k % 2:
            case = case._replace(index=torch.tensor([2, 0, 1, 4, 2]))
        settings = {"temperature": (1.0, 2.5)[k % 2], "reduction": ("none", "mean", "sum")[k % 3]}
        schedule = {"blocks": 1 + k % 3, "threads": 32 * (k % 3)} | SCHEDULES[k % 4]
        calls.append((case, options | settings | schedule))
    check_distill(drivers["plain"], tmp_path, calls)


def distill_corners(dtype) -> list[Taught]:
    """Infinities, NaN, masked classes and rows, targets far ahead and behind, in either row or both."""
    inf, cases = torch.inf, []
    base = taught(6, 30, dtype)
    base.target[:] = 4
    for change, which in itertools.product(range(14), ((0,), (1,), (0, 1))):
        case = base._replace(logits=base.logits.clone(), teacher=base.teacher.clone())
        case = case._replace(target=base.target.clone())
        for z in (case[i] for i in which):
            if change == 0:
                z[:3, 10:], z[3:, 5::3] = -inf, -inf
            elif change == 1:
                z[1, 7] = inf
            elif change == 2:
                z[1, 7] = torch.nan
            elif change == 3:
                z[:, 4] = torch.tensor([30.0, 1e4, -1e4, inf, -inf, torch.nan])
            elif change == 4:
                z[:, 5:], z[:, :4] = -inf, -inf
            elif change == 5:
                z[:] = -inf
            elif change == 6:
                z[:, :28] = -10000.0
            elif change == 7:
                z.add_(8192)
            elif change == 8:
                z[2] = inf
            elif change == 9:
                z[2] = torch.nan
            elif change == 10:
                z[0, :4], z[3] = -inf, 0.0
            elif change == 11:
                case.target[:] = -100
            elif change == 12:
                case.target[[0, 5]] = -100
                z[0] = torch.nan
            elif change == 13:
                z[1:4, 4] = z[1:4].amax(1)  # a tie
        cases.append(case)
    return cases


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distillation_corners(drivers, tmp_path, dtype):
    calls, zero = [], torch.tensor([0.0, 1, 0, 1, 0, 1])
    for case in distill_corners(dtype):
        for options in (
            {"temperature": 2.0, **ALL},
            {"form": "cross_entropy", **ALL},
            {"kd_weight": 1.0},
            {"tckd_weight": 1.0, "temperature": 4.0},
            {"nckd_weight": 1.0, "temperature": 4.0},
            {"ce_weight": 1.0},
            {"soft_target_weight": 1.0},
            {"max_weight": 1.0},
        ):
            calls.append((case, {"reduction": "none", **options}))
        calls.append((case._replace(sample_weight=zero), {"reduction": "none", **ALL}))
        calls.append((case._replace(target=None), {"reduction": "none", "kd_weight": 1.0}))
        calls.append((case, {"reduction": "mean", "temperature": 2.0, **ALL}))
    for i, (_, options) in enumerate(calls):
        options |= {"threads": 32 * (i % 3)} | SCHEDULES[i % 4]
    check_distill(drivers["plain"], tmp_path, calls)


def test_distillation_out_of_range(drivers, tmp_path):
    """That sample is NaN, the others are unchanged, and AddressSanitizer reports nothing."""
    for row, bad in ((1, 9), (2, -1), (0, 2**40)):
        case = taught(5, 9)
        expected = distill_by_reference(case, torch.float32, reduction="none", **ALL)
        good = [i for i in range(5) if i != row]
        case.target[row] = bad
        given = [distill_case(case, reduction=r, phase=4, **ALL) for r in ("none", "mean")]
        (faults, got), (more, mean) = execute(drivers["sanitized"], given, tmp_path)
        assert not faults
        assert not more
        for a, b in zip(got[:4], expected):
            assert a[row].isnan().all()
            torch.testing.assert_close(a[good], b[good])
        assert mean[0].isnan()
        assert mean[3][row].isnan().all()
        assert mean[3][good].isfinite().all()


def test_distillation_rows_of_a_table(drivers, tmp_path):
    """Rows by index, held and of several parts; a sample whose index is outside is NaN."""
    calls = []
    for C, dtype in itertools.product((16, 64, 5008), DTYPES):
        case, table = taught(5, C, dtype, seed=C), taught(3, C, dtype, seed=1).teacher
        for target in (case.target, None):
            given = case._replace(teacher=table, index=torch.tensor([2, 0, 1, 2, 2]), target=target)
            options = {"temperature": 2.0, **ALL} if target is not None else {"kd_weight": 1.0}
            calls.append((given, options | {"blocks": 1 + len(calls) % 3, "threads": 32 * (len(calls) % 3)}))
    check_distill(drivers["plain"], tmp_path, calls)
    for bad in (-1, 3, 2**40):
        case, table, index = taught(5, 16), taught(3, 16, seed=1).teacher, torch.tensor([2, 0, 1, 2, 2])
        given = case._replace(teacher=table, index=index)
        expected = distill_by_reference(given, torch.float32, reduction="none", **ALL)
        index[3] = bad
        data = distill_case(given, reduction="none", **ALL)
        ((faults, got),) = execute(drivers["sanitized"], [data], tmp_path)
        assert not faults
        for a, b in zip(got[:4], expected):
            assert a[3].isnan().all()
            torch.testing.assert_close(a[[0, 1, 2, 4]], b[[0, 1, 2, 4]])


def test_distillation_of_no_sample(drivers, tmp_path):
    for reduction, given in itertools.product(("mean", "sum", "none"), (True, False)):
        case = taught(0, 12)
        case = case._replace(target=case.target if given else None)
        data = distill_case(case, reduction=reduction, kd_weight=1.0, blocks=1)
        ((faults, got),) = execute(drivers["plain"], [data], tmp_path)
        assert not faults
        if reduction != "none":
            assert got[0].isnan() if reduction == "mean" else got[0] == 0


def hard_distillations(dtypes, **header) -> list[Case]:
    """Every path through the kernel, small: for the builds that look at every access."""
    cases = []
    for dtype, wide, threads in itertools.product(dtypes, (False, True), (0, 32)):
        case = taught(5, 41, dtype, wide=wide)
        case.target[2], case.target[3] = -100, 41
        weight = torch.rand(5, generator=torch.Generator().manual_seed(1))
        long = taught(3, 2200, dtype, wide=wide)
        for given, options in (
            (case, ALL),
            (case._replace(sample_weight=weight), ALL | {"temperature": 4.0, "reduction": "none"}),
            (case._replace(target=None), {"kd_weight": 1.0}),
            (case, {"ce_weight": 1.0, "reduction": "sum", "totals": 2}),
            (for_methods(5, 41, dtype, OF_METHODS[4], wide=wide), OF_METHODS[4]),
            (long, ALL | {"temperature": 2.0, "blocks": 1}),
            (long._replace(target=None), {"kd_weight": 1.0, "blocks": 1, "with_grad": False}),
        ):
            schedule = SCHEDULES[len(cases) % 4] | header | {"threads": threads, "phase": dtype.itemsize}
            cases.append(distill_case(given, **({"blocks": 2} | options | schedule)))
    return cases


def test_distillation_repeats_bitwise(drivers, tmp_path):
    """Whatever the order of threads and blocks, what fresh memory holds, and how often it is launched."""
    case, options = taught(11, 900, torch.bfloat16), {"threads": 64, "blocks": 3, **ALL}
    orders = [{"order": o, "fill": f, "seed": s} for o, f, s in [(0, 0, 1), (1, 1, 2), (2, 2, 3), (3, 0, 4)]]
    cases = [distill_case(case, **options, **order) for order in orders]
    (_, first), *others = execute(
        drivers["plain"], [*cases, distill_case(case, repeats=3, **options)], tmp_path
    )
    for faults, got in others:
        assert not faults
        for a, b in zip(got[:4], first[:4]):
            assert torch.equal(a, b)


# Labels, ranks, backward --------------------------------------------------------------------------


def label_calls(dtypes=(torch.float32, torch.float64)) -> list[tuple[Case, torch.Tensor]]:
    calls = []
    for kind, (N, C, P) in itertools.product(KINDS, [(5, 12, 9), (3, 6, 40), (2, 2051, 30), (2, 9, 0)]):
        _, target, votes = make(N, C, P, kind=kind)
        target[1] = -100
        sizes = {"N": N, "C": C, "P": P, "has_votes": True, "ignore_index": -100}
        schedule = SCHEDULES[len(calls) % 4]
        data = pack(arrays=[votes], op=RANK, **sizes, **schedule)
        calls.append((Case(data, [(torch.int32, (N, C))]), reference.rank_fwd(votes, C)))
        for A, dense in itertools.product(dtypes, (False, True)):
            mass = labels.log_mass(zls.Zipf(1.0), N, C, P, A, votes.device)
            if dense:
                mass = torch.rand(N, C, dtype=A).log()
                mass[0] = -torch.inf
            arrays = [votes, target, mass]
            data = pack(
                arrays=arrays, op=LABEL, dtype=DTYPES[A], dense=dense, R=mass.shape[0], **sizes, **schedule
            )
            label = reference.label_fwd(target, votes, mass, C, -100)
            calls.append((Case(data, [(A, (N, C))]), label))
    return calls


@pytest.mark.parametrize("build", BUILDS)
def test_ranks_and_labels(drivers, tmp_path, build):
    calls = label_calls()
    for (faults, (got,)), (_, expected) in zip(
        execute(drivers[build], [case for case, _ in calls], tmp_path), calls
    ):
        assert not faults
        if expected.dtype == torch.int32:
            assert torch.equal(got, expected)
        else:
            torch.testing.assert_close(got, expected, rtol=3e-6, atol=1e-12)


def backward_calls(dtypes) -> list[tuple[Case, torch.Tensor]]:
    calls = []
    for dtype, (N, C), scaled, in_place in itertools.product(
        dtypes, [(1, 5000), (7, 13), (3, 1100)], (False, True), (False, True)
    ):
        A = reference.accumulation_dtype(dtype)
        grad = torch.randn(N, C).to(dtype)
        for stride, upstream in [(0, torch.rand(1)), (1, torch.rand(N)), (3, torch.rand(3 * N)[: 3 * N - 2])]:
            upstream = upstream.to(A)
            upstream[0] = 1.0
            scale = torch.full((1,), 0.125, dtype=A)
            per_row = upstream[:1].expand(N) if stride == 0 else upstream[::stride]
            expected = reference.loss_bwd(grad, per_row, scale.squeeze() if scaled else scale[:0])
            data = pack(
                arrays=[grad, upstream] + ([scale] if scaled else []),
                op=BACKWARD,
                dtype=DTYPES[dtype],
                N=N,
                C=C,
                grad_loss_stride=stride,
                scaled=scaled,
                in_place=in_place,
                phase=len(calls) % 3 * dtype.itemsize,
                row_gap=len(calls) % 2 * dtype.itemsize,
            )
            calls.append((Case(data, [(dtype, (N, C))]), expected))
    return calls


@pytest.mark.parametrize("build", BUILDS)
def test_backward(drivers, tmp_path, build):
    calls = backward_calls(DTYPES if build == "plain" else (torch.float32, torch.bfloat16))
    found = execute(drivers[build], [case for case, _ in calls], tmp_path)
    for (faults, (got,)), (_, expected) in zip(found, calls):
        assert not faults
        assert torch.equal(got, expected)


# Memory, races, order -----------------------------------------------------------------------------


def hard_cases(dtypes=(torch.float32, torch.bfloat16), **header) -> list[Case]:
    """Every path through the loss kernels, small: for the builds that look at every access."""
    weight = torch.rand(41, generator=torch.Generator().manual_seed(1))
    cases = []
    for dtype, shape in itertools.product(dtypes, SHAPES.values()):
        for options in (
            {},
            {"label_smoothing": 0.1, "weight": weight, "only_correct": True, "reduction": "none"},
            {"only_correct": True, "totals": 2, "reduction": "mean"},
            {"with_grad": False, "reduction": "sum"},
            {"zipf_weight": 0.0},
        ):
            case = make(5, 41, 20, dtype=dtype, kind=KINDS[len(cases) % len(KINDS)])
            case.target[2] = -100
            schedule = SCHEDULES[len(cases) % 4] | header
            cases.append(loss_case(case, shape=shape, blocks=2, phase=dtype.itemsize, **schedule, **options))
            if shape[0] >= BLOCK and not options:
                wide = make(3, 2200, 40, dtype=dtype)
                wide_shape = (shape[0], 512 if shape[0] == LONG else 320, shape[2])
                cases.append(loss_case(wide, shape=wide_shape, blocks=1, **(schedule | header)))
        dense = torch.rand(5, 41, generator=torch.Generator().manual_seed(2)).log()
        schedule = SCHEDULES[len(cases) % 4] | header
        cases.append(loss_case(make(5, 41, 20, dtype=dtype), dense=dense, **schedule))
    for dtype, kind, threads in itertools.product(dtypes, ("one-hot", "mixup", "half"), (0, 32)):
        case = with_target(make(5, 41, 20, dtype=dtype, kind=KINDS[len(cases) % len(KINDS)]), kind)
        wide = with_target(make(3, 2200, 40, dtype=dtype), kind)
        for options in (
            {},
            {"label_smoothing": 0.1, "weight": weight, "only_correct": True},
            {"dense": dense},
        ):
            schedule = SCHEDULES[len(cases) % 4] | header | {"threads": threads, "phase": dtype.itemsize}
            cases.append(loss_case(case, **options, **schedule))
        cases.append(loss_case(wide, blocks=1, **schedule))
    return cases + hard_distillations(dtypes, **header)


def kept_cases(dtypes=(torch.float32, torch.bfloat16)) -> list[Case]:
    """A gradient from factors, of every kernel and of rows in one piece of 8 or 32 lanes and in several."""
    cases = []
    for dtype, shape, (C, P) in itertools.product(dtypes, SHAPES.values(), ((41, 20), (2200, 40))):
        for options in ({}, {"only_correct": True, "reduction": "none"}, {"zipf_weight": 0.0}):
            case = make(5, C, P, dtype=dtype, kind=KINDS[len(cases) % len(KINDS)])
            case.target[2] = -100
            options |= SCHEDULES[len(cases) % 4] | {"phase": dtype.itemsize, "in_place": KEPT}
            cases.append(loss_case(case, shape=shape, blocks=2, **options))
    return cases


@pytest.mark.parametrize("build", ["sanitized", "races"])
def test_every_access_is_in_bounds_and_ordered(drivers, tmp_path, build):
    for faults, _ in execute(drivers[build], hard_cases() + kept_cases(), tmp_path):
        assert not faults, faults


@pytest.mark.parametrize("build", BUILDS)
def test_gradient_over_the_logits(drivers, tmp_path, build):
    """In place is out of place bit for bit, on every path; no logit is read once it is written over."""
    dtypes = DTYPES if build == "plain" else (torch.float32, torch.bfloat16)
    for schedule in SCHEDULES if build == "plain" else ({},):
        apart = execute(drivers[build], hard_cases(dtypes, **schedule), tmp_path)
        over = execute(drivers[build], hard_cases(dtypes, in_place=True, **schedule), tmp_path)
        for (faults, got), (_, expected) in zip(over, apart):
            assert not faults, faults
            for a, b in zip(got, expected):
                assert torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


@pytest.mark.parametrize("in_place", [0, KEPT], ids=["written", "kept"])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_repeat_bitwise(drivers, tmp_path, shape, in_place):
    """Whatever the order of threads and blocks, what fresh memory holds, and how often it is launched."""
    case = make(11, 60, 80, dtype=torch.bfloat16)
    options = {"shape": SHAPES[shape], "label_smoothing": 0.1, "blocks": 3, "in_place": in_place}
    orders = [
        {"order": o, "fill": f, "seed": s, "late": s % 2}
        for o, f, s in [(0, 0, 1), (1, 1, 2), (2, 2, 3), (3, 0, 4), (2, 1, 5)]
    ]
    cases = [loss_case(case, **options, **order) for order in orders] + [
        loss_case(case, **options, repeats=3)
    ]
    (_, first), *others = execute(drivers["plain"], cases, tmp_path)
    for faults, got in others:
        assert not faults
        for a, b in zip(got[:4], first[:4]):
            assert torch.equal(a, b)


# What the simulator catches -------------------------------------------------------------------------

FAULTS = {
    "missing barrier": (1, "races", "without a barrier between"),
    "missing syncwarp": (2, "races", "without a barrier between"),
    "past the end, shared": (3, "sanitized", "use-after-poison"),
    "past the end, device": (4, "sanitized", "heap-buffer-overflow"),
    "uninitialised read": (5, "races", "read of uninitialised byte"),
    "plain increment": (6, "races", "without a barrier between"),
    "divergent barrier": (7, "plain", "while others wait at line"),
    "early exit": (8, "plain", "deadlock"),
    "misaligned vector": (9, "sanitized", "misaligned address"),
}


def run_fault(program: Path, fault: int, tmp_path: Path, **schedule) -> str:
    given, results = tmp_path / "cases", tmp_path / "results"
    given.write_bytes(pack(op=FAULT, kernel=fault, **schedule))
    done = subprocess.run([program, given, results], capture_output=True, text=True)
    if done.returncode != 0:
        return done.stderr
    data = results.read_bytes()
    return data[8 : 8 + struct.unpack_from("q", data)[0]].decode()


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(drivers, tmp_path, fault):
    number, build, message = FAULTS[fault]
    for schedule in SCHEDULES:
        assert message in run_fault(drivers[build], number, tmp_path, **schedule)


@pytest.mark.parametrize("build", BUILDS)
def test_faultless_kernel_passes(drivers, tmp_path, build):
    for schedule in SCHEDULES:
        assert run_fault(drivers[build], 0, tmp_path, **schedule) == ""


BARRIERS = {  # file -> barriers of which each is needed, how many they are, a call that shows it
    "held row": (
        "loss_rows.cuh",
        r"^ +Group::sync\(\);  // (?!other threads read).*$",
        4,
        {"shape": SHAPES["block"]},
    ),
    "cluster in place": (
        "loss_rows.cuh",
        r"^ +if \(CLUSTER && a.grad == a.logits\) ptx::cluster_sync\(\);$",
        1,
        {"shape": SHAPES["cluster"], "in_place": True},
    ),
    "patches": ("loss_factors.cuh", r"^ +__syncwarp\(.*\);.*$", 1, {"in_place": KEPT}),
    "soft targets": ("loss_general.cuh", r"^ +__syncthreads\(\);.*$", 3, {"threads": 64}),
    "distillation": ("loss_distill.cuh", r"^ +__sync(?:threads|warp)\(.*\);.*$", 2, {"threads": 64}),
}


@pytest.mark.parametrize(
    ("barriers", "number"),
    [
        pytest.param(name, i, marks=[pytest.mark.slow] if i else [])  # the first of each kind in make test
        for name, (_, _, count, _) in BARRIERS.items()
        for i in range(count)
    ],
)
def test_missing_barrier_in_a_loss_kernel_is_caught(tmp_path, barriers, number):
    """Without any one of them the race check reports."""
    file, pattern, count, options = BARRIERS[barriers]
    source = (KERNELS / file).read_text()
    found = list(re.finditer(pattern, source, re.M))
    assert len(found) == count
    barrier, root = found[number], copy_sources(tmp_path)
    mutant = source[: barrier.start()] + source[barrier.end() :]
    (root / "csrc" / "cuda" / file).write_text(mutant)
    program = compiled("loss", "races", root, ("-DZIPFLS_DTYPES=1",))
    case = make(3, 41, 20)
    if "distill" in file:
        case = distill_case(taught(3, 41), blocks=1, **options, **ALL)
    else:
        case = loss_case(with_target(case, "mixup") if "general" in file else case, blocks=1, **options)
    ((faults, _),) = execute(program, [case], tmp_path)
    assert "without a barrier between" in faults or "uninitialised" in faults, barrier.group()


@pytest.mark.slow
def test_teacher_read_past_its_row_is_caught(tmp_path):
    root = copy_sources(tmp_path)
    plant(root, "loss_math.cuh", "row.has(first + v) ? to_float(beside", "true ? to_float(beside")
    program = compiled("loss", "sanitized", root, ("-DZIPFLS_DTYPES=1",))
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        execute(program, [distill_case(taught(3, 41), **ALL)], tmp_path)


@pytest.mark.slow
def test_missing_wait_for_copies_is_caught(tmp_path):
    """Late copies of a row that no thread waits for leave NaN."""
    root = copy_sources(tmp_path)
    plant(root, "loss_rows.cuh", "    ptx::cp_async_wait_group<0>();\n", "")
    program = compiled("loss", "plain", root, ("-DZIPFLS_DTYPES=1",))
    for late in (0, 1):
        case = loss_case(make(3, 41, 20), shape=SHAPES["block"], late=late)
        ((_, got),) = execute(program, [case], tmp_path)
        assert got[0].isnan() == bool(late)
