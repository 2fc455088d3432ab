"""What only the Triton backend has: its tilings, loops, alignments and hazards.

The shared suite compares every backend with the reference; here tiles are shrunk so that each loop turns more
than once and each edge occurs, and the launchers are called directly. Without a GPU everything runs
interpreted.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from zipfls_cuda import reference, triton_kernels
from zipfls_cuda.triton_kernels import distill as distill_file
from zipfls_cuda.triton_kernels import launch_cache, loss_reduce
from zipfls_cuda.triton_kernels import loss as loss_file
from zipfls_cuda.triton_kernels import vote as vote_file

if not vote_file.INTERPRET and not torch.cuda.is_available():
    pytest.skip("Triton was imported without its interpreter, and there is no GPU", allow_module_level=True)

DEVICE = "cpu" if vote_file.INTERPRET else "cuda"
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
INF, NAN = float("inf"), float("nan")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of inf - inf in the interpreter


def placed(x, device=DEVICE):
    """A copy on the device with the strides and the offset of ``x``; x.to(device) would close its gaps."""
    if x is None:
        return None
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return memory.to(device, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())


def table(length, dtype=torch.float32, alpha=1.0):
    return (-alpha * torch.arange(1, length + 1, dtype=torch.float64).log()).to(dtype)


def loss_args(
    N,
    C,
    P=7,
    dtype=torch.float32,
    *,
    logits=None,
    votes=None,
    alpha=1.0,
    weight=False,
    dense=False,
    ce=1.0,
    zipf=0.7,
    smoothing=0.0,
    only_correct=False,
    reduction="mean",
    with_grad=True,
):
    """Arguments of loss_fwd: random, with one ignored sample from N = 3 on."""
    D = reference.accumulation_dtype(dtype)
    z = (2 * torch.randn(N, C, dtype=torch.float64)).to(dtype) if logits is None else logits
    target = torch.randint(0, C, (N,))
    if N > 1:
        target[0] = z[0].argmax()
    if N > 2:
        target[1] = -100
    if votes is None and P is not None:
        votes = torch.randint(-1, max(2, C // 2), (N, P), dtype=torch.int32)
    mass = torch.randn(N, C, dtype=D) if dense else table(C if P is None else min(P, C) + 1, D, alpha)
    args = [z, target, votes, mass, torch.rand(C, dtype=D) if weight else None]
    return (*map(placed, args), ce, zipf, smoothing, only_correct, -100, reduction, with_grad)


def on_cpu(args):
    return [x.cpu() if isinstance(x, torch.Tensor) else x for x in args]


def assert_same(args, tolerance=None):
    """triton_kernels.loss_fwd equals reference.loss_fwd."""
    tolerance = tolerance or TOLERANCE[args[0].dtype]
    ours, theirs = triton_kernels.loss_fwd(*args), reference.loss_fwd(*on_cpu(args))
    for name, x, y in zip(("loss", "ce", "zipf", "grad", "grad_scale"), ours, theirs, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        torch.testing.assert_close(
            x.cpu().double(),
            y.double(),
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    return ours


def test_views_reach_the_device_as_they_are():
    base = torch.randn(6, 9)
    for x in (base[:, 2:7], base[1:, ::2], base.t(), base[:1].expand(4, 9), base[0, 3:3], base[:, 5]):
        there = placed(x, "meta")
        assert (there.shape, there.stride()) == (x.shape, x.stride())
        assert there.storage_offset() == x.storage_offset()
        there = placed(x)
        assert torch.equal(there.cpu(), x)
        assert there.data_ptr() % 16 == x.data_ptr() % 16 or not x.numel()
        assert there.data_ptr() != x.data_ptr() or not x.numel()


@pytest.fixture(autouse=True)
def _forgotten_plans():
    """Tests change the tables that plans are made from."""
    launch_cache.plan_cache.clear()
    yield
    launch_cache.plan_cache.clear()


SHORT = {
    "LONGEST_ROW": 32,
    "LONG_TILES": ((64, 64, (32, 4)), (INF, INF, (32, 4))),
    "LONG_TILE_DENSE": (32, 4),
}  # from 33 classes streamed, 32 at a time


@pytest.fixture(params=["held", "streamed"])
def row_kernel(request, monkeypatch):
    """Held and streamed, the same rows."""
    if request.param == "streamed":
        for name, value in SHORT.items():
            monkeypatch.setattr(loss_file, name, value)


# The loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("C", [64, 77])
def test_loss_kernels(row_kernel, dtype, C):
    assert_same(loss_args(3, C, dtype=dtype, weight=True, smoothing=0.1, only_correct=True))


@pytest.mark.parametrize(
    "options",
    [
        {"dense": True, "smoothing": 0.2},
        {"P": None, "reduction": "none"},
        {"zipf": 0.0, "reduction": "sum", "smoothing": 0.3},
        {"ce": 0.0, "only_correct": True, "reduction": "none"},
        {"alpha": 150.0, "reduction": "sum"},
        {"with_grad": False},
    ],
    ids=str,
)
def test_loss_options(row_kernel, options):
    assert_same(loss_args(3, 83, dtype=torch.float64, **options))


@pytest.mark.parametrize("R", [1, 8])
@pytest.mark.parametrize("N", [1, 5, 13])
def test_loss_several_rows_per_program(monkeypatch, N, R):
    """R rows at once, groups of rows walked through, and partial sums combined."""
    monkeypatch.setattr(loss_file, "INTERPRET", False)
    monkeypatch.setattr(loss_file, "FEW_ROWS", 0 if R == 8 else 99)
    monkeypatch.setattr(loss_file, "PROGRAMS", 2)
    assert loss_file.row_tile(N, 10, 16, True)[1] == R
    assert_same(loss_args(N, 10, dtype=torch.float64))


def test_streamed_threads_of_several_vectors(monkeypatch):
    """Several vectors a thread; -inf in a tile that needs no masks, all over one, and beside the target."""
    monkeypatch.setattr(loss_file, "LONGEST_ROW", 32)
    monkeypatch.setattr(loss_file, "LONG_TILES", ((INF, INF, (256, 1)),))
    monkeypatch.setattr(loss_file, "LONG_TILE_DENSE", (256, 1))
    z = torch.randn(4, 700, dtype=torch.float64)
    z[0, 300] = -INF
    z[2, 256:512] = -INF
    z[3, 4] = -INF
    args = list(loss_args(4, 700, dtype=torch.float64, logits=z, zipf=0.3))
    args[1] = torch.tensor([5, 600, 5, 5], device=DEVICE)
    args[10] = "none"
    assert_same(tuple(args))
    assert_same((*args[:3], placed(table(8, torch.float64, 400.0)), *args[4:]))  # unvoted: no mass, no loss
    args[0][:] = 0.25 * torch.arange(700)  # all finite, and the maximum grows from tile to tile
    assert_same(tuple(args))
    args[0][1:] += torch.randn(3, 700, dtype=torch.float64).to(DEVICE)
    args[2], args[3] = None, torch.randn(4, 700, dtype=torch.float64).to(DEVICE)
    args[3][:2] = -INF
    assert_same(tuple(args))


@pytest.mark.parametrize("C", [320, 333])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_streamed_rows_of_all_sizes(monkeypatch, dtype, C):
    """Sums are relative to some of a row's logits, but where none of these is finite, or like the others."""
    monkeypatch.setattr(loss_file, "LONGEST_ROW", 32)
    monkeypatch.setattr(loss_file, "LONG_TILES", ((INF, INF, (64, 1)),))
    z, y = torch.randn(16, C, dtype=torch.float64), torch.full((16,), 100)
    z[0, 150:] += 30
    z[1, 150:] += 200
    z[2, 150:] -= 200
    z[3:6, :70] = -INF
    z[4, 70:] += 200
    z[5, 70:] -= 200
    z[6] = -INF
    z[6, C - 1] = 1
    z[7] += 1e5
    z[8] *= 1e5
    z[9] *= 1e10
    z[10] = -1e10
    z[11] = -3e38
    z[12] = 3e38
    z[13, 200:] = -1e36
    z[14, 250] = INF
    z[15, 250] = NAN
    y[::3], y[1::3] = C - 1, 0
    for options in ({"zipf": 0.3}, {"zipf": 0.0, "smoothing": 0.1, "weight": True}):
        args = list(loss_args(16, C, dtype=dtype, logits=z.to(dtype), reduction="none", **options))
        args[1] = y.to(DEVICE)
        assert_same(args)


@pytest.mark.parametrize("weight", [False, True])
def test_loss_totals_from_partial_sums(monkeypatch, weight):
    monkeypatch.setattr(loss_reduce, "SCAN_ROWS", 2)
    monkeypatch.setattr(loss_reduce, "CORRECT_PROGRAMS", 2)
    assert_same(loss_args(6, 20, dtype=torch.float64, weight=weight, only_correct=True))


@pytest.mark.parametrize("P", [0, 1, 16, 17, 256, 257, 600])
def test_loss_vote_counts(P):
    """Sorted up to 256 votes, hashed above; classes that collide in the table included."""
    C = 1500
    votes = torch.randint(-1, 40, (2, P), dtype=torch.int64) * 32 + torch.randint(0, 2, (2, P))
    votes = votes.clamp(max=C - 1)
    assert_same(loss_args(2, C, P, torch.float64, votes=votes))


def test_loss_of_a_row_beyond_262144_classes():
    """As tuned: many steps, odd rows, vectors that begin elsewhere in each row."""
    assert_same(loss_args(2, 262151, dtype=torch.bfloat16, smoothing=0.1))


def test_loss_refuses_more_votes_than_it_holds():
    with pytest.raises(RuntimeError, match="4096"):
        triton_kernels.loss_fwd(*loss_args(1, 8, 4097))


@pytest.mark.parametrize("view", ["rows", "columns", "unaligned", "expanded", "transposed", "same phase"])
def test_loss_views_of_logits(row_kernel, view):
    """Rows at any distance and alignment: whole vectors only where logits and gradient agree."""
    z = (2 * torch.randn(8, 101)).bfloat16()
    z = {
        "rows": lambda: z[::2, :72],
        "columns": lambda: z[:, ::2],
        "unaligned": lambda: z[:, 3:100],
        "expanded": lambda: z[:1, :66].expand(4, 66),
        "transposed": lambda: z.t(),
        "same phase": lambda: z[:, 5:98],
    }[view]()
    args = loss_args(z.shape[0], z.shape[1], logits=z[:2])
    assert_same((*args[:1], args[1][:2], args[2][:2], *args[3:]))


def corner_rows(C):
    """Rows of awkward logits, with targets."""
    z = torch.randn(12, C, dtype=torch.float64)
    z[0, 3] = -INF  # a non-target of mass
    z[1, :] = -INF
    z[1, 5] = 1.0  # only the target is there
    z[2, 7] = INF  # a non-target
    z[3, 5] = INF  # the target
    z[4, 5] = -INF  # the target
    z[5, 9] = NAN
    z[6, 5] = NAN
    z[7, 5] = 300.0  # the target dominates
    z[8] += 1e4
    z[9] = -INF
    z[10, : C // 2] = -1e4
    z[11] -= 1e3
    return z, torch.full((12,), 5)


@pytest.mark.parametrize(
    "dense,ce,zipf,smoothing",
    [(False, 1.0, 0.5, 0.0), (True, 1.0, 0.5, 0.0), (False, 1.0, 0.0, 0.1), (False, 0.0, 1.0, 0.0)],
)
def test_loss_corners(row_kernel, dense, ce, zipf, smoothing):
    z, y = corner_rows(48)
    args = list(
        loss_args(12, 48, logits=z, dtype=torch.float64, dense=dense, ce=ce, zipf=zipf, reduction="none")
    )
    args[1], args[7], args[8] = y.to(DEVICE), smoothing, ce == 0
    assert_same(args)


@pytest.mark.parametrize("dense", [False, True])
def test_loss_without_mass_is_uniform(row_kernel, dense):
    args = list(loss_args(3, 48, dtype=torch.float64, reduction="none"))
    args[3] = torch.full((3, 48) if dense else (8,), -INF, dtype=torch.float64, device=DEVICE)
    if dense:
        args[3][1] = 0.0
    assert_same(args)


@pytest.mark.parametrize("only_correct", [False, True])
def test_loss_float16_mean_leaves_the_denominator_to_backward(only_correct):
    grad, scale = assert_same(loss_args(5, 40, dtype=torch.float16, only_correct=only_correct))[3:]
    assert scale.item() == 0.25
    assert grad.abs().max() > 0.1


@pytest.mark.parametrize("zipf", [0.7, 0.0])
def test_loss_out_of_range_poisons_its_row_alone(row_kernel, zipf):
    args = list(loss_args(7, 40, dtype=torch.float64, reduction="none", zipf=zipf))
    args[2] = args[2].long()
    expected = reference.loss_fwd(*on_cpu(args))
    args[1][2:5] = torch.tensor([-7, 40, 2**40])
    args[2][5, 4], args[2][6, 0] = 40, 2**40
    ours = triton_kernels.loss_fwd(*args)
    for x, y in zip(ours[:4], expected[:4], strict=True):
        assert x[2:].isnan().all()
        torch.testing.assert_close(x[:2].cpu(), y[:2])
    args[10] = "mean"
    assert triton_kernels.loss_fwd(*args)[0].isnan()


# Distillation --------------------------------------------------------------------------------------------

EVERY_TERM = (0.7, 0.3, 1.1, 2.0, 0.4)  # ce, kd, tckd, nckd, soft target


def distill_args(
    N,
    C,
    dtype=torch.float32,
    teacher_dtype=None,
    *,
    logits=None,
    teacher=None,
    target=True,
    weight=False,
    index=None,
    terms=EVERY_TERM,
    max_weight=0.0,
    temperature=2.5,
    form="divergence",
    reduction="mean",
    with_grad=True,
):
    """Arguments of distill_fwd: random, with one ignored sample from N = 3 on."""
    z, t = (2 * torch.randn(N, C, dtype=torch.float64) for _ in range(2))
    z = z.to(dtype) if logits is None else logits
    t = t.to(teacher_dtype or dtype) if teacher is None else teacher
    y = torch.randint(0, C, (N,))
    if N > 2:
        y[1] = -100
    shape = (N, 2) if weight == "both" else (N,)
    w = torch.rand(shape, dtype=reference.accumulation_dtype(dtype)) if weight else None
    if form == "probabilities":
        t = t.softmax(1) * torch.arange(len(t)).to(t)[:, None]
    terms = terms if target else (0.0, 0.9, 0.0, 0.0, 0.0)
    args = map(placed, (z, t, y if target else None, w, index))
    return (*args, *terms, max_weight, temperature, form, -100, reduction, with_grad)


def assert_distilled(args):
    """triton_kernels.distill_fwd equals reference.distill_fwd, and distill_grad_ its gradient, bit by bit."""
    tolerance = TOLERANCE[args[0].dtype]
    ours, theirs = triton_kernels.distill_fwd(*args), reference.distill_fwd(*on_cpu(args))
    for name, x, y in zip(("loss", "ce", "distillation", "grad", "scale"), ours, theirs, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        torch.testing.assert_close(
            x.cpu().double(),
            y.double(),
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    if args[-1]:
        z = args[0].clone(memory_format=torch.contiguous_format)
        *parts, scale = triton_kernels.distill_grad_(z, *args[1:-1])
        torch.testing.assert_close((z, scale), ours[3:], rtol=0, atol=0, equal_nan=True)
        of_parts = {"rtol": tolerance, "atol": tolerance}  # a sum's order depends on the rows' strides
        torch.testing.assert_close(tuple(parts), ours[:3], **of_parts, equal_nan=True)
    return ours


@pytest.fixture(params=["held", "streamed"])
def distill_kernel(request, monkeypatch):
    """Held and streamed, the same rows: from 33 classes, 32 at a time."""
    if request.param == "streamed":
        monkeypatch.setattr(distill_file, "LONGEST_ROW", 32)
        monkeypatch.setattr(distill_file, "LONG_TILE", (32, 4))


@pytest.mark.parametrize(
    "dtype,teacher",
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
def test_distill_kernels(distill_kernel, dtype, teacher):
    for C in (64, 77):
        assert_distilled(distill_args(5, C, dtype, teacher, weight=True))


@pytest.mark.parametrize("C", [2, 16, 31, 32, 33, 63, 65])
def test_distill_tile_boundaries(distill_kernel, C):
    assert_distilled(distill_args(3, C, torch.bfloat16))


@pytest.mark.parametrize(
    "options",
    [
        {"form": "cross_entropy"},
        {"temperature": 1.0, "reduction": "none"},
        {"terms": (0.0, 0.0, 1.0, 8.0, 0.0), "temperature": 4.0, "weight": True},
        {"terms": (0.0, 0.0, 0.0, 1.5, 1.0), "temperature": 1.0, "form": "cross_entropy"},
        {"terms": (1.0, 0.0, 0.0, 0.0, 0.0), "reduction": "sum"},
        {"terms": (0.0, 0.0, 0.0, 0.0, 1.0)},
        {"terms": (0.0, 0.0, 0.0, 0.0, 0.0)},
        {"target": False},
        {"target": False, "temperature": 1.0, "reduction": "none", "weight": True},
        {"with_grad": False},
        {"max_weight": 0.6, "weight": True},
        {"max_weight": 0.6, "terms": (0.0, 0.0, 0.0, 0.0, 0.0), "reduction": "none"},
        {"max_weight": 0.6, "form": "probabilities", "weight": "both", "temperature": 1.0},
        {"form": "probabilities", "weight": "both"},
        {"form": "probabilities", "terms": (1.0, 0.0, 0.0, 0.0, 0.0), "weight": "both", "reduction": "none"},
        {"form": "probabilities", "target": False, "temperature": 1.0},
    ],
    ids=str,
)
def test_distill_options(distill_kernel, options):
    assert_distilled(distill_args(3, 83, torch.float64, **options))


@pytest.mark.parametrize("R", [1, 16])
def test_distill_several_rows_per_program(monkeypatch, R):
    """R rows at once, groups of rows walked through, and partial sums combined."""
    monkeypatch.setattr(distill_file, "INTERPRET", False)
    monkeypatch.setattr(distill_file, "FEW_ROWS", 0 if R == 16 else 99)
    monkeypatch.setattr(distill_file, "PROGRAMS", 2)
    for N in (1, 19):
        args = distill_args(N, 10, torch.float64)
        assert distill_file.cut_rows(args[0]).R == R
        assert_distilled(args)


def test_distill_totals_from_partial_sums(monkeypatch):
    monkeypatch.setattr(loss_reduce, "SCAN_ROWS", 2)
    for target in (True, False):
        assert_distilled(distill_args(6, 20, torch.float64, target=target))


@pytest.mark.parametrize("C", [2048, 2049, 5003])
def test_distill_as_tuned(C):
    assert_distilled(distill_args(2, C, torch.bfloat16, torch.float32))
    assert_distilled(distill_args(2, C, torch.float32, target=False))


@pytest.mark.parametrize("view", ["rows", "columns", "unaligned", "expanded", "transposed", "same phase"])
def test_distill_views(distill_kernel, view):
    """Rows of either network at any distance and alignment."""
    x = (2 * torch.randn(8, 101)).bfloat16()
    x = {
        "rows": lambda: x[:4:2, :72],
        "columns": lambda: x[:2, ::2],
        "unaligned": lambda: x[:2, 3:100],
        "expanded": lambda: x[:1, :66].expand(2, 66),
        "transposed": lambda: x.t()[:2],
        "same phase": lambda: x[:2, 5:98],
    }[view]()
    for given in ({"logits": x}, {"teacher": x}, {"logits": x, "teacher": x}):
        assert_distilled(distill_args(*x.shape, torch.bfloat16, **given))


@pytest.mark.parametrize(
    "at,terms,form",
    [
        ("student", EVERY_TERM, "divergence"),
        ("teacher", EVERY_TERM, "cross_entropy"),
        ("both", (0.0, 0.5, 0.0, 0.0, 0.0), "divergence"),
        ("both", (0.0, 0.0, 1.0, 2.0, 0.0), "divergence"),
    ],
)
def test_distill_corners(distill_kernel, at, terms, form):
    """-inf, +inf and NaN anywhere; targets far ahead; tiles and vectors without any class."""
    x, y = corner_rows(48)
    given = {"student": {"logits": x}, "teacher": {"teacher": x}, "both": {"logits": x, "teacher": x}}[at]
    args = list(distill_args(12, 48, torch.float64, terms=terms, form=form, reduction="none", **given))
    args[2] = y.to(DEVICE)
    assert_distilled(args)


def test_distill_of_a_row_without_vectors_of_mass(distill_kernel):
    """-inf in whole tiles of both rows, the largest in the edges, then in the first tile."""
    z, t = torch.randn(4, 77, dtype=torch.float64), torch.randn(4, 77, dtype=torch.float64)
    z[0, :70] = t[0, :70] = z[1, 5:] = t[1, 5:] = -INF
    z[2, 76] = t[2, 0] = 90.0
    z[3, 0] = t[3, 76] = 90.0
    for target in (True, False):
        assert_distilled(
            distill_args(4, 77, torch.float64, logits=z, teacher=t, target=target, reduction="none")
        )


@pytest.mark.parametrize("where", [0, 1, 31, 32, 63, 64, 75, 76])
def test_distill_finds_the_teachers_largest_class(distill_kernel, where):
    """KL does not depend on the class that is left out, but its digits do, where one is 20 ahead."""
    z, t = torch.randn(4, 77), torch.randn(4, 77)
    z[:, where] = t[:, where] = 20.0
    args = distill_args(4, 77, logits=z, teacher=t, target=False, temperature=1.0, reduction="none")
    loss = triton_kernels.distill_fwd(*args)[0]
    wide = reference.distill_fwd(z.double(), t.double(), *on_cpu(args)[2:])[0]
    torch.testing.assert_close(loss.cpu().double(), wide, rtol=1e-5, atol=0)


def test_distill_out_of_range_poisons_its_row_alone(distill_kernel):
    args = list(distill_args(5, 40, torch.float64, reduction="none"))
    expected = reference.distill_fwd(*on_cpu(args))
    args[2][2:] = torch.tensor([-7, 40, 2**40])
    ours = triton_kernels.distill_fwd(*args)
    for x, y in zip(ours[:4], expected[:4], strict=True):
        assert x[2:].isnan().all()
        torch.testing.assert_close(x[:2].cpu(), y[:2])
    args[-2] = "mean"
    assert triton_kernels.distill_fwd(*args)[0].isnan()


@pytest.mark.parametrize("C", [40, 77])
def test_distill_rows_of_a_table(distill_kernel, C):
    """Read where they are if they are made of whole vectors (40 classes), gathered otherwise."""
    table, index = torch.randn(3, C, dtype=torch.float64), torch.tensor([2, 0, 2, 1, 1])
    for target in (True, False):
        args = distill_args(5, C, torch.float64, teacher=table, index=index, target=target, reduction="none")
        ours = assert_distilled(args)
        args = list(args)
        args[1:5:3] = table[index], None
        for x, y in zip(ours, triton_kernels.distill_fwd(*args), strict=True):
            assert torch.equal(x, y)


def test_distill_float16_mean_leaves_the_denominator_to_backward():
    grad, scale = assert_distilled(distill_args(5, 40, torch.float16))[3:]
    assert scale.item() == 0.25
    assert grad.abs().max() > 0.1


# The loss with targets of probabilities -----------------------------------------------------------------


def soft_args(N, C, P=7, dtype=torch.float32, *, target=None, **options):
    """Arguments of loss_fwd: those of loss_args beside a random target with several least classes."""
    args = list(loss_args(N, C, P, dtype, **options))
    if target is None:
        target = torch.randint(0, 3, (N, C), dtype=args[3].dtype) / 4 + 0.01
    args[1] = placed(target)
    return tuple(args)


def assert_same_soft(args):
    """triton_kernels.loss_fwd equals reference.loss_fwd for a target of probabilities."""
    tolerance = TOLERANCE[args[0].dtype]
    ours, theirs = triton_kernels.loss_fwd(*args), reference.loss_fwd(*on_cpu(args))
    for name, x, y in zip(("loss", "ce", "zipf", "grad", "grad_scale"), ours, theirs, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        torch.testing.assert_close(
            x.cpu().double(),
            y.double(),
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.fixture(params=["held", "streamed"])
def soft_kernel(request, monkeypatch):
    """Held and streamed, the same rows beside a target of probabilities."""
    if request.param == "streamed":
        monkeypatch.setattr(loss_file, "LONGEST_SOFT_ROW", 32)
        for name in ("LONG_SOFT_TILE", "LONG_SOFT_TILE_DENSE"):
            monkeypatch.setattr(loss_file, name, (32, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("C", [64, 77])
def test_soft_kernels(soft_kernel, dtype, C):
    assert_same_soft(soft_args(5, C, dtype=dtype, weight=True, smoothing=0.1, only_correct=True))


@pytest.mark.parametrize(
    "options",
    [
        {"dense": True, "smoothing": 0.2},
        {"P": None, "reduction": "none"},
        {"zipf": 0.0, "reduction": "sum", "smoothing": 0.3},
        {"ce": 0.0, "only_correct": True, "reduction": "none"},
        {"ce": 0.0, "zipf": 0.0},
        {"alpha": 150.0, "reduction": "sum"},
        {"P": 300, "with_grad": False},
    ],
    ids=str,
)
def test_soft_options(soft_kernel, options):
    assert_same_soft(soft_args(3, 83, dtype=torch.float64, **options))


@pytest.mark.parametrize("dense", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("least", ["first", "last", "edge", "one", "all", "NaN", "falling"])
def test_soft_least_classes_anywhere(soft_kernel, dense, least):
    """S met early, late, or not before the elements outside whole vectors; smaller than two classes; all."""
    z = torch.randn(3, 79, dtype=torch.float64)
    t = torch.rand(3, 79, dtype=torch.float64) + 1
    where = {"first": [0, 1, 33], "last": [40, 70, 77], "edge": [77, 78], "one": [50]}
    t[:, where.get(least, [])] = 0.25
    if least == "all":
        t[:] = -0.5
    if least == "NaN":
        t[1, 60], t[:, [3, 40]] = NAN, 0.0
    if least == "falling":  # each tile has a new least probability; the last has few of it
        t = (-torch.arange(79, dtype=torch.float64) // 5).expand(3, 79)
    for reduction in ("none", "mean"):
        args = soft_args(3, 79, logits=z, target=t, dtype=torch.float64, dense=dense, reduction=reduction)
        assert_same_soft(args)
    z[2, 50] = NAN  # no matter to a row whose S is that class alone
    assert_same_soft(
        soft_args(3, 79, logits=z, target=t, dtype=torch.float64, dense=dense, ce=0.0, reduction="none")
    )


@pytest.mark.parametrize(
    "dense,ce,zipf",
    [
        (False, 1.0, 0.5),
        pytest.param(True, 1.0, 0.5, marks=pytest.mark.slow),
        (False, 0.0, 1.0),
        (False, 1.0, 0.0),
    ],
)
def test_soft_corners(soft_kernel, dense, ce, zipf):
    z, y = corner_rows(48)
    options = {
        "logits": z,
        "dtype": torch.float64,
        "dense": dense,
        "ce": ce,
        "zipf": zipf,
        "reduction": "none",
    }
    one_hot = torch.nn.functional.one_hot(y, 48).double()
    for target in (one_hot, one_hot.roll(2, 1) * 0.5 + one_hot * 0.5, 0.9 * one_hot + 0.1 / 48):
        assert_same_soft(soft_args(12, 48, target=target, **options))


@pytest.mark.parametrize("R", [1, 8])
def test_soft_several_rows_per_program(monkeypatch, R):
    monkeypatch.setattr(loss_file, "INTERPRET", False)
    monkeypatch.setattr(loss_file, "FEW_ROWS", 0 if R == 8 else 99)
    monkeypatch.setattr(loss_file, "PROGRAMS", 2)
    monkeypatch.setattr(loss_reduce, "CORRECT_PROGRAMS", 2)
    for N in (1, 13):
        assert_same_soft(soft_args(N, 10, dtype=torch.float64, only_correct=True))


def test_soft_only_correct_beyond_a_tile():
    """argmax z = argmax t, lowest on ties in both, NaN skipped in t, -inf allowed; tiles of 2048 columns."""
    z = torch.randn(8, 4500, dtype=torch.float64)
    t = torch.rand(8, 4500, dtype=torch.float64)
    for n, (c, d) in enumerate([(3, 4), (3, 2051), (2047, 2048), (4499, 403), (0, 1), (5, 5), (7, 9)]):
        z[n, [c, d]], t[n, [c, d]] = 9.0, 2.0
    t[4, 0] = z[5, 1] = NAN
    z[6, 7] = -INF
    t[7] = -INF
    expected = reference.is_correct(z, reference.argmax_lowest(t).long().clamp(min=0))
    correct, number = loss_reduce.correct_samples(z.to(DEVICE), t.to(DEVICE), -100)
    assert correct.tolist() == expected.int().tolist()
    assert number.item() == expected.sum()
    assert 0 < number.item() < 8


@pytest.mark.parametrize(
    "view",
    ["unaligned", "transposed"]
    + [pytest.param(v, marks=pytest.mark.slow) for v in ("rows", "phase", "columns", "expanded")],
)
def test_soft_views_of_target(soft_kernel, view):
    """Rows of the target at any distance and alignment, beside rows of logits at any other."""
    t = torch.randint(0, 3, (8, 101)) / 4
    t = {
        "rows": lambda: t[::2, :75],
        "phase": lambda: t[:4, :93],
        "columns": lambda: t[:, ::2],
        "unaligned": lambda: t[:, 3:100],
        "expanded": lambda: t[:1, :67].expand(4, 67),
        "transposed": lambda: t.t()[:5],
    }[view]()
    N, C = t.shape
    z = torch.randn(N, C + 8).bfloat16()
    for logits in (z[:, :C].contiguous(), z[:, :C], z[:, 3 : C + 3]):
        assert_same_soft(soft_args(N, C, logits=logits, target=t, dtype=torch.bfloat16))


def test_soft_vote_out_of_range_poisons_its_row_alone(soft_kernel):
    for zipf in (0.7, 0.0):
        args = list(soft_args(3, 40, dtype=torch.float64, reduction="none", zipf=zipf))
        expected = reference.loss_fwd(*on_cpu(args))
        args[2][1, 4] = 40
        ours = triton_kernels.loss_fwd(*args)
        for x, y in zip(ours[:4], expected[:4], strict=True):
            assert x[1].isnan().all()
            torch.testing.assert_close(x[::2].cpu(), y[::2])


# In place ------------------------------------------------------------------------------------------------


def assert_in_place_is_the_same(args, *, aligned=True):
    """loss_grad_ writes over the logits what loss_fwd writes beside them.

    Bit for bit, but where logits are not ``aligned`` and the gradient beside them is: their sums then differ
    in order.
    """
    expected = triton_kernels.loss_fwd(*args)
    logits = placed(args[0])
    *parts, scale = triton_kernels.loss_grad_(logits, *args[1:-1])
    assert not torch.equal(logits, args[0])
    rounding = {"rtol": 0, "atol": 0} if aligned else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close((*parts, logits, scale), expected, **rounding, equal_nan=True)


IN_PLACE = [
    {},
    {"P": 300, "reduction": "sum"},
    {"P": None, "only_correct": True},
    {"dense": True, "weight": True, "smoothing": 0.1, "reduction": "none"},
    {"only_correct": True, "weight": True, "smoothing": 0.2},
    {"ce": 0.0, "only_correct": True, "reduction": "none"},
    {"zipf": 0.0},
]


@pytest.mark.parametrize("options", IN_PLACE, ids=str)
@pytest.mark.parametrize("C", [64, 77])
def test_loss_in_place(row_kernel, C, options):
    for dtype in (torch.float64, torch.float16) if not options else (torch.bfloat16,):
        assert_in_place_is_the_same(loss_args(3, C, dtype=dtype, **options))


@pytest.mark.parametrize("options", IN_PLACE, ids=str)
@pytest.mark.parametrize("C", [64, 77])
def test_soft_loss_in_place(soft_kernel, C, options):
    for dtype in (torch.float64, torch.float16) if not options else (torch.bfloat16,):
        assert_in_place_is_the_same(soft_args(3, C, dtype=dtype, **options))


def test_in_place_of_several_rows_per_program_and_of_views(monkeypatch):
    """Groups of rows walked through; logits not aligned, not contiguous, and none at all."""
    monkeypatch.setattr(loss_file, "INTERPRET", False)
    monkeypatch.setattr(loss_file, "FEW_ROWS", 0)
    monkeypatch.setattr(loss_file, "PROGRAMS", 2)
    for make in (loss_args, soft_args):
        assert_in_place_is_the_same(make(13, 10))
        logits = torch.randn(10 * 41 + 1)[1:].view(10, 41)
        assert_in_place_is_the_same(make(10, 41, logits=logits), aligned=False)
        assert_in_place_is_the_same(make(10, 30, logits=torch.randn(30, 10).t()))
        empty = make(0, 9, logits=torch.randn(0, 9), reduction="none")
        triton_kernels.loss_grad_(*empty[:-1])


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN and the largest integers."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("C", [40, 77])
def test_outputs_are_written_in_full(row_kernel, poisoned_memory, C):
    for reduction in ("mean", "none"):
        assert_same(loss_args(4, C, reduction=reduction, only_correct=True))
        assert_same_soft(soft_args(4, C, reduction=reduction, only_correct=True))
    assert_same(loss_args(2, 50, 300))
    votes = torch.randint(-1, C, (3, 20), dtype=torch.int32, device=DEVICE)
    assert torch.equal(triton_kernels.rank_fwd(votes, C).cpu(), reference.rank_fwd(votes.cpu(), C))
    x, w = torch.randn(2, 9, 40, device=DEVICE), torch.randn(C, 40, device=DEVICE)
    assert torch.equal(
        triton_kernels.vote_fwd(x, w, None, 1).cpu(), reference.vote_fwd(x.cpu(), w.cpu(), None, 1)
    )
    x = torch.randn(2, 40, 3, 4, device=DEVICE)
    assert torch.equal(
        triton_kernels.vote_fwd(x, w, None, 2).cpu(), reference.vote_fwd(x.cpu(), w.cpu(), None, 2)
    )
    grad = torch.randn(4, C, device=DEVICE)
    scale = torch.full((), 3.0, device=DEVICE)
    assert torch.equal(triton_kernels.loss_bwd(grad, scale, scale.new_empty(0)), 3 * grad)


def test_loss_is_repeatable_and_leaves_its_counter_at_zero(monkeypatch):
    monkeypatch.setattr(loss_file, "PROGRAMS", 3)
    args = loss_args(9, 50, 300)
    first, second = triton_kernels.loss_fwd(*args), triton_kernels.loss_fwd(*args)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(counter.item() == 0 for _, counter in loss_reduce._workspaces.values())


# Backward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype,shape", [(torch.float32, (3, 7)), (torch.bfloat16, (5, 64)), (torch.float64, (1, 4500))]
)
@pytest.mark.parametrize("upstream", ["scalar", "rows", "expanded", "strided"])
@pytest.mark.parametrize("scaled", [False, True])
def test_backward_scales(dtype, shape, upstream, scaled):
    N = shape[0]
    D = reference.accumulation_dtype(dtype)
    grad = torch.randn(shape).to(dtype).to(DEVICE)
    g = {
        "scalar": torch.full((), 0.3),
        "rows": torch.randn(N),
        "expanded": torch.full((), 0.7).expand(N),
        "strided": torch.randn(3 * N)[::3],
    }[upstream]
    g = placed(g)
    scale = torch.full((), 1.5, dtype=D, device=DEVICE) if scaled else torch.empty(0, dtype=D, device=DEVICE)
    expected = reference.loss_bwd(grad, g, scale)
    before = grad.clone()
    out = triton_kernels.loss_bwd(grad, g, scale)
    assert torch.equal(grad, before)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=0)
    triton_kernels.loss_bwd_(grad, g, scale)
    assert torch.equal(grad, out)


def test_backward_in_place_of_a_view():
    grad = torch.randn(6, 9, device=DEVICE).t()
    expected = 2 * grad
    triton_kernels.loss_bwd_(grad, torch.full((), 2.0, device=DEVICE), torch.empty(0, device=DEVICE))
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("rows", [False, True])
def test_backward_by_one_writes_nothing(rows):
    grad = torch.full((4, 20), NAN, device=DEVICE)
    one = torch.ones(4 if rows else (), device=DEVICE)
    bits = grad.view(torch.int32)
    bits[:] = 0x7F800001  # a signalling NaN: any arithmetic quiets it
    triton_kernels.loss_bwd_(grad, one, torch.empty(0, device=DEVICE))
    assert (bits == 0x7F800001).all()


# Ranks and label -------------------------------------------------------------------------------------


@pytest.mark.parametrize("C,P", [(5, 3), (40, 16), (40, 60), (3000, 300)])
def test_ranks_and_label(C, P):
    votes = torch.randint(-1, min(C, 50), (3, P), device=DEVICE)
    votes *= (C - 1) // votes.max()  # beyond the hash table, too
    votes[2] = 3  # all for one class
    target = torch.randint(0, C, (3,), device=DEVICE)
    target[0], target[1] = votes[0].max(), -100  # voted; ignored
    assert torch.equal(triton_kernels.rank_fwd(votes, C).cpu(), reference.rank_fwd(votes.cpu(), C))
    for mass in (table(min(P, C) + 1, torch.float64, 2.0), torch.randn(3, C, dtype=torch.float64)):
        ours = triton_kernels.label_fwd(target, votes, mass.to(DEVICE), C, -100)
        torch.testing.assert_close(ours.cpu(), reference.label_fwd(target.cpu(), votes.cpu(), mass, C, -100))


# Votes -----------------------------------------------------------------------------------------------


def assert_votes(features, weight, bias=None, upsample=1):
    """Votes equal the reference's. Scores are small integers: every sum is exact, and ties are real."""
    features, weight, bias = map(placed, (features, weight, bias))
    votes = triton_kernels.vote_fwd(features, weight, bias, upsample)
    cpu = [x if x is None else x.cpu() for x in (features, weight, bias)]
    assert torch.equal(votes.cpu(), reference.vote_fwd(*cpu, upsample))
    return votes


def integers(*shape, dtype=torch.bfloat16, spread=3):
    return torch.randint(-spread, spread + 1, shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [32, 40, 33])
def test_vote_tiles_and_types(dtype, D):
    """Several tiles both ways, ragged in C, D and M; descriptors and pointers; ties everywhere."""
    assert_votes(integers(3, 23, D, dtype=dtype), integers(70, D, dtype=dtype), integers(70, dtype=dtype))
    assert_votes(integers(1, 5, D, dtype=dtype), integers(9, D, dtype=dtype))


@pytest.mark.parametrize(
    "layout", ["channels_last", "nchw", "rows", "class token", "one position", "half", "expanded"]
)
def test_vote_layouts(layout):
    x = integers(3, 24, 5, 7)
    copied = layout in ("nchw", "half", "expanded", "rows")
    x = {
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "nchw": lambda: x,
        "rows": lambda: x.contiguous(memory_format=torch.channels_last)[:, :, :, 1:6],
        "class token": lambda: integers(2, 96, 24)[
            :, 1:
        ],  # the gap and the row after it: in different programs
        "one position": lambda: x[:, :, :1, :1].contiguous(memory_format=torch.channels_last),
        "half": lambda: integers(3, 36, 24)[:, 18:],
        "expanded": lambda: integers(1, 36, 24).expand(3, 36, 24),
    }[layout]()
    assert_votes(x, integers(20, 24))
    x = placed(x)
    rows = vote_file.position_rows(x)[0]
    assert (rows.data_ptr() != x.data_ptr()) == copied


@pytest.mark.parametrize("upsample", [1, 2])
def test_vote_special_scores(upsample):
    """Ties go to the lowest class, NaN never wins, -inf may, and all NaN is no vote."""
    x = torch.ones(1, 16, 1, 3).contiguous(memory_format=torch.channels_last)
    x[0, :, 0, 2] = NAN
    weight = torch.zeros(70, 16)
    bias = torch.full((70,), -INF)
    assert assert_votes(x, weight, bias, upsample).unique().tolist() == [-1, 0]
    bias[3] = NAN
    bias[[40, 66]] = 1.0
    assert assert_votes(x, weight, bias, upsample).unique().tolist() == [-1, 40]
    weight[40] = NAN
    assert assert_votes(x, weight, bias, upsample).unique().tolist() == [-1, 66]


@pytest.mark.parametrize("D", [16, 17])
def test_vote_what_lies_outside_the_classes_never_wins(D):
    """Negative scores all over: zeros from beyond the last class would win."""
    votes = assert_votes(-torch.ones(1, 4, D).bfloat16(), integers(40, D).abs() + 1)
    assert votes.max() < 40


@pytest.mark.parametrize("shape", [(3, 20, 4, 4), (2, 20, 7, 5), (1, 20, 9, 1), (5, 20, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_vote_upsampled(shape, dtype):
    for x in (
        integers(*shape, dtype=dtype),
        integers(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last),
    ):
        assert_votes(x, integers(40, 20, dtype=dtype), integers(40, dtype=dtype), upsample=2)


def test_vote_follows_the_precision_setting():
    setting = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert vote_file.precision_of(torch.float32) == "tf32"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert vote_file.precision_of(torch.float32) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = setting


def test_vote_configurations_fit_the_shape():
    """The choice takes waves into account, and pointers where descriptors cannot serve."""
    choose = vote_file.choose
    large, programs = choose(90, 132, 2, False, 256 * 49, 2048, 1000, True)
    assert (large.BM, large.BN, programs) == (128, 256, 132)
    assert choose(90, 132, 2, False, 256 * 49, 512, 1000, True)[0].per_sm == 2
    assert choose(90, 132, 2, False, 4 * 49, 2048, 100, True)[0].BM == 64
    assert not choose(90, 132, 2, False, 256 * 49, 2047, 1000, False)[0].tma
    assert choose(90, 132, 4, True, 256 * 49, 2048, 1000, True)[0] == vote_file.EXACT


def test_vote_tuned_configurations_come_first(monkeypatch, tmp_path):
    config = vote_file.Config(64, 64, 64, 4, 2)
    tuned = tmp_path / "tuned.json"
    tuned.write_text(f'{{"{vote_file.tuned_key(90, 2, 999, 64, 50)}": [64, 64, 64, 4, 2]}}')
    monkeypatch.setattr(vote_file, "TUNED", tuned)
    vote_file.tuned.cache_clear()
    vote_file.choose.cache_clear()
    try:
        assert vote_file.choose(90, 132, 2, False, 999, 64, 50, True)[0] == config
    finally:
        vote_file.tuned.cache_clear()
        vote_file.choose.cache_clear()


# Launching -------------------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAITS, name
        return function(*args, **(kwargs or {}))


def test_launchers_never_wait_for_the_device(monkeypatch):
    launched = []
    monkeypatch.setattr(
        launch_cache.Launch, "__call__", lambda self, *args: launched.append(self.kernel.__name__)
    )
    empty = partial(torch.empty, device=DEVICE)
    grad, votes = empty(3, 40), torch.zeros(3, 300, dtype=torch.int32, device=DEVICE)
    target, mass = torch.zeros(3, dtype=torch.int64, device=DEVICE), table(41).to(DEVICE)
    features, weight = empty(3, 16, 4, 4), empty(600, 16)  # several tiles of classes, to be combined
    with NoWaiting():
        for C, N in ((40, 3), (5000, 2000)):
            for options in ({"only_correct": True, "weight": True}, {"P": None}, {"reduction": "none"}):
                triton_kernels.loss_fwd(*loss_args(N, C, logits=torch.empty(N, C), **options))
                triton_kernels.loss_fwd(*soft_args(N, C, logits=torch.empty(N, C), **options))
        for upstream in (empty(()), empty(3)):
            triton_kernels.loss_bwd(grad, upstream, empty(0))
            triton_kernels.loss_bwd_(grad, upstream, empty(()))
        for upstream in (empty(()), empty(3)):
            *_, factors, patches, scale = triton_kernels.loss_factors_fwd(*loss_args(3, 40)[:-1])
            triton_kernels.loss_factors_bwd_(grad, target, votes[:, :9], factors, patches, upstream, scale)
        triton_kernels.rank_fwd(votes, 40)
        triton_kernels.label_fwd(target, votes, mass, 40, -100)
        for upsample in (1, 2):
            triton_kernels.vote_fwd(features, weight, None, upsample)
    kernels = "correct loss_bwd loss_bwd_rows loss_factors_bwd loss_fwd rank_fwd totals transpose "
    kernels += "vote_combine vote_fwd vote_upsample"
    assert set(launched) == {f"{kernel}_kernel" for kernel in kernels.split()}


class OnGrid:
    """Something launched as f[grid](*args)."""

    def __init__(self, call):
        self.call = call

    def __getitem__(self, grid):
        return partial(self.call, grid)


class Binary(OnGrid):
    """A compiled kernel: launched by its run, or by [grid] where a profiler looks on."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, launched):
        super().__init__(lambda grid, *args: launched.append(("watched", grid, args)))
        self.run = lambda x, y, z, *rest: launched.append((rest[:3], (x, y, z), rest[6:]))


@pytest.fixture
def no_driver(monkeypatch):
    class Driver:
        active = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda d: f"stream of {d}")

    monkeypatch.setattr(launch_cache, "driver", Driver)


def test_launch_remembers_binaries_by_all_that_decides(no_driver):
    """A binary serves again for the same integers, types and alignment, whatever the floats, and not else."""
    compiled, launched = [], []
    kernel = OnGrid(lambda grid, *args, **options: compiled.append(args) or Binary(launched))
    x = torch.empty(32)
    calls = [(x, 7, 0.5, True), (x[4:], 7, 0.25, True)]
    calls += [(x[1:], 7, 0.5, True), (x.half(), 7, 0.5, True), (x, 8, 0.5, True), (x, 7, 0.5, False)]
    for args in calls:
        launch_cache.launch(kernel, (2, 1, 1), args, args[:1], 4)
    assert [args[1:] for args in compiled] == [args[1:] for args in calls[:1] + calls[2:]]
    assert [(how, grid, args[2]) for how, grid, args in launched] == [
        (("stream of 3", "function", "metadata"), (2, 1, 1), 0.25)
    ]


def test_partial_sums_are_kept_apart_by_their_type():
    """Denominators of float32 and float64 losses with nothing but integers to tell them apart by."""
    target = torch.zeros(3000, dtype=torch.int64, device=DEVICE)
    correct = torch.ones(3000, dtype=torch.int32, device=DEVICE)
    for dtype in (torch.float32, torch.float64):
        known = set(launch_cache.plan_cache)
        totals = loss_reduce.partial_totals(target, correct, None, 7, -100, True, dtype)
        assert totals.sum(1).tolist() == [3000.0] * 3
        assert set(launch_cache.plan_cache) - known, "launched from the other's plan"


def test_templates_hold_no_memory():
    x = launch_cache.template((3, 4), torch.float64, torch.device("cpu"))
    assert x.untyped_storage().nbytes() == 0
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    assert like.shape == (3, 4)
    assert like.stride() == (4, 1)
    assert like.untyped_storage().nbytes() == 96


def test_plans_are_kept_apart_by_alignment():
    x = torch.empty(5, 8)
    unaligned = torch.empty(41)[1:].view(5, 8)
    assert launch_cache.signature(x) == launch_cache.signature(torch.empty(5, 8))
    assert launch_cache.signature(x) != launch_cache.signature(unaligned)


def test_launch_under_a_profiler_takes_tritons_own_path(no_driver, monkeypatch):
    launched = []
    launch = launch_cache.Launch(OnGrid(lambda grid, *args, **options: Binary(launched)), (2, 1, 1), 4)
    launch(1)

    def hook(metadata):
        pass

    for chain in (launch_cache.knobs.runtime.launch_enter_hook, launch_cache.knobs.runtime.launch_exit_hook):
        chain.add(hook)
        try:
            launch(2)
        finally:
            chain.remove(hook)
    for name in ("launch_enter_hook", "launch_exit_hook"):  # a plain function, or none
        monkeypatch.setattr(launch_cache.knobs.runtime, name, hook)
        launch(3)
        monkeypatch.setattr(launch_cache.knobs.runtime, name, None)
    launch(4)
    assert [how for how, _, _ in launched] == ["watched"] * 4 + [("stream of 3", "function", "metadata")]


@pytest.mark.parametrize("soft", [False, True])
def test_plans_are_kept_apart_by_all_that_decides(soft):
    """A call like one before, but for one thing, is the same call to a reference, and must be to us."""
    make, check = (soft_args, assert_same_soft) if soft else (loss_args, assert_same)
    z = torch.randn(6, 96, dtype=torch.float64)
    base = {"logits": z[:4, :40], "P": 7, "dtype": torch.float64}
    other = [
        {"logits": z[:4, 1:41]},
        {"logits": z[:4, :41]},
        {"logits": z[:3, :40]},
        {"logits": z[:, :80].reshape(-1, 40)[:4]},
        {"logits": z[:4, :40].float(), "dtype": torch.float32},
        {"P": 8},
        {"P": None},
        {"weight": True},
        {"dense": True},
        {"ce": 0.0},
        {"zipf": 0.0},
        {"smoothing": 0.1},
        {"only_correct": True},
        {"reduction": "none"},
        {"reduction": "sum"},
        {"with_grad": False},
    ]
    for options in (change for pair in zip(other, [{}] * len(other), strict=True) for change in pair):
        args = make(*(base | options)["logits"].shape, **(base | options))
        check(args)
        if not soft and options == {}:
            args[1][1] = 3
            check(args)
            check((*args[:9], 3, *args[10:]))  # another ignore_index
    assert len(launch_cache.plan_cache) > len(other)
