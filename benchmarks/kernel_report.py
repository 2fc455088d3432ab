"""What Triton makes of zipfls_cuda/triton_kernels, and how long it should take: `make kernel-report`. No GPU.

Every kernel in every configuration of the tuning tables is compiled ahead of time for sm_80, sm_90 and
sm_100. The launchers themselves are called, on uninitialised CPU tensors of representative shapes, with a
stand-in for Triton's driver that compiles where the real one would launch: types, alignment and constants are
those of a real call.

One row per kernel, configuration and architecture: registers a thread, stack bytes, instructions that touch
local memory (spills), shared memory, 16-byte accesses of all accesses to global memory (TMA counted apart),
and the tensor-core instruction. The exit status is 1 if anything spills, does not compile, asks for more
shared memory than there is, is a 16-bit product on Hopper without wgmma (HGMMA), or may give the lanes of a
sum different last bits (a multiply-add with another lane's value, or one left to ptxas to make).

Beside it, a model of time for the shapes that matter: bytes over bandwidth, operations over rate, tiles in
waves over the multiprocessors, resident programs. It is arithmetic from assumed ceilings (H200: copy 4.3
TB/s, bf16 product 790 TFLOP/s), not a measurement of these kernels.

    python benchmarks/kernel_report.py [--quick] [--arch 90] [--only vote] [--jobs 2] [--host]

``--quick`` compiles one configuration of each kind. ``--host`` measures the host's time per call with the
launch stubbed out instead. On two shared cores of a virtual machine, triton 3.9, CPU tensors, median of 300:
10 us for loss_fwd at 256 x 1000 (five allocations and a launch), 3 us for loss_bwd_, 12 us for vote_fwd with
its fold. Not measured beside a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

if __name__ in ("__main__", "__mp_main__"):  # a program, not a module of the tests: compiled, not interpreted
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nvcc_report
import torch
import triton
from triton.backends.compiler import GPUTarget

from zipfls_cuda import triton_kernels
from zipfls_cuda.triton_kernels import label as label_file
from zipfls_cuda.triton_kernels import launching
from zipfls_cuda.triton_kernels import loss as loss_file
from zipfls_cuda.triton_kernels import soft_loss as soft_file
from zipfls_cuda.triton_kernels import vote as vote_file

ARCHITECTURES = (80, 90, 100)
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program may have
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP64: "fp64"}


@dataclass(kw_only=True)
class Row(nvcc_report.Row):
    """One kernel, in one configuration, for one architecture; ``shared`` is what a launch asks for."""

    case: str
    warps: int
    needs_wgmma: bool
    fusible: str  # see fusible()

    @property
    def faults(self) -> list[str]:
        """What fails the report."""
        found = super().faults
        if self.shared > SHARED[int(self.arch)]:
            found.append(f"{self.shared} bytes of shared memory, of {SHARED[int(self.arch)]}")
        if self.needs_wgmma and self.arch == "90" and self.tensor != "HGMMA":
            found.append(f"a Hopper product without wgmma (found {self.tensor or 'none'})")
        if self.fusible:
            found.append(f"lanes may differ in the last bit: {self.fusible}")
        return found


# Compiling what the launchers launch -----------------------------------------------------------------


class Driver:
    """Stands in for Triton's driver on a machine without a GPU: launches are compiled, or do nothing."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        device = {"max_shared_mem": 1 << 20, "multiprocessor_count": H200.multiprocessors}
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: device,
            load_binary=lambda *args: (None, 1, 32, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # caches of compiled kernels are per device: one per architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, src, metadata) -> Callable:
        return lambda *args: None


@contextlib.contextmanager
def stand_in(arch: int) -> Iterator[None]:
    """Within it the launchers take CPU tensors for those of a GPU of this architecture."""
    device = vote_file._device
    triton.runtime.driver.set_active(Driver(arch))  # stays: a machine without a GPU has none to go back to
    vote_file._device = lambda x: (arch, H200.multiprocessors)
    try:
        yield
    finally:
        vote_file._device = device


def compiled_launches(call: Callable[[], object], arch: int) -> list[tuple[str, object]]:
    """(kernel's name, compiled kernel) for each launch of a call."""
    launches = []
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append((self.__name__, kernel))
        return kernel

    launching.plans.clear()  # what was compiled for another architecture
    triton.JITFunction.run = compile_only
    try:
        with stand_in(arch):
            call()
    finally:
        triton.JITFunction.run = run
        launching.plans.clear()
    return launches


# The cases: every configuration of the tables --------------------------------------------------------

FORWARD = ("loss_fwd_kernel", "loss_fwd_long_kernel")
SOFT = ("soft_loss_fwd_kernel", "soft_loss_fwd_long_kernel")
VOTE = ("vote_fwd_kernel", "vote_upsample_kernel")


@dataclass
class Case:
    """A call of a launcher; ``kernels`` names those of its launches that are reported."""

    name: str
    call: Callable[[], object]
    kernels: tuple[str, ...]
    wgmma: bool = False  # a 16-bit product, which must use wgmma on sm_90
    quick: bool = False
    args: Callable[[], tuple] | None = None


def loss_case(
    N: int,
    C: int,
    dtype: torch.dtype = BF16,
    P: int | None = 49,
    label: str = "",
    *,
    kernels: tuple[str, ...] = FORWARD,
    quick: bool = False,
    dense: bool = False,
    weight: bool = False,
    smoothing: float = 0.0,
    only_correct: bool = False,
    ce_weight: float = 1.0,
    zipf_weight: float = 0.1,
    reduction: str = "mean",
    with_grad: bool = True,
) -> Case:
    """A call of loss_fwd; ``label`` says what is special about it."""

    @functools.cache
    def args() -> tuple:
        D = FP64 if dtype == FP64 else FP32
        mass = torch.empty(N, C, dtype=D) if dense else torch.empty(min(P or C, C) + 1, dtype=D)
        return (
            torch.empty(N, C, dtype=dtype),
            torch.empty(N, dtype=torch.int64),
            None if P is None else torch.empty(N, P, dtype=torch.int32),
            mass,
            torch.empty(C, dtype=D) if weight else None,
            ce_weight, zipf_weight, smoothing, only_correct, -100, reduction, with_grad,
        )  # fmt: skip

    name = f"loss {N}x{C} {NAMES[dtype]} P={P}{' ' if label else ''}{label}"
    return Case(name, lambda: triton_kernels.loss_fwd(*args()), kernels, quick=quick, args=args)


def soft_loss_case(
    N: int,
    C: int,
    dtype: torch.dtype = BF16,
    P: int | None = 49,
    label: str = "",
    *,
    kernels: tuple[str, ...] = SOFT,
    quick: bool = False,
    **options,
) -> Case:
    """A call of soft_loss_fwd; options as for loss_case."""
    hard = loss_case(N, C, dtype, P, **options)

    def call() -> object:
        *tensors, ce, zipf, smoothing, only_correct, _, reduction, with_grad = hard.args()
        tensors[1] = torch.empty(N, C, dtype=tensors[3].dtype)
        return triton_kernels.soft_loss_fwd(*tensors, ce, zipf, smoothing, only_correct, reduction, with_grad)

    name = f"soft {N}x{C} {NAMES[dtype]} P={P}{' ' if label else ''}{label}"
    return Case(name, call, kernels, quick=quick)


def vote_case(
    shape: tuple[int, ...],  # (N, D, H, W), or tokens (N, T, D)
    C: int,
    dtype: torch.dtype = BF16,
    label: str = "",
    *,
    upsample: int = 1,
    nchw: bool = False,
    tf32: bool = False,
    kernels: tuple[str, ...] = VOTE,
    quick: bool = False,
) -> Case:
    """A call of vote_fwd; ``label`` says what is special about it."""
    D = shape[1] if len(shape) == 4 else shape[2]
    positions = math.prod(shape) // D

    @functools.cache
    def args() -> tuple:
        last = len(shape) == 4 and not nchw
        memory_format = torch.channels_last if last else torch.contiguous_format
        features = torch.empty(shape, dtype=dtype, memory_format=memory_format)
        return features, torch.empty(C, D, dtype=dtype), torch.empty(C, dtype=dtype), upsample

    def call() -> object:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            return triton_kernels.vote_fwd(*args())
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    name = f"vote {positions}x{D}x{C} {NAMES[dtype]}{' ' if label else ''}{label}"
    return Case(name, call, kernels, dtype.itemsize == 2, quick)


# The shapes of the model of time, each a case.
VOTE_SHAPES = (
    ((256, 2048, 7, 7), 1000),
    ((256, 512, 7, 7), 1000),
    ((256, 196, 768), 1000),
    ((256, 2048, 7, 7), 10000),
    ((128, 2048, 7, 7), 1000),
    ((128, 512, 4, 4), 100),
    ((128, 256, 8, 8), 100),
)
LOSS_SHAPES = (
    (128, 100, FP32, 320),
    (256, 1000, BF16, 49),
    (1024, 1000, BF16, 49),
    (32768, 1000, BF16, 49),
    (4096, 10007, BF16, 49),
    (4096, 10000, BF16, 49),
    (4096, 21841, BF16, 49),
    (4096, 128256, BF16, 49),
)


@functools.cache
def cases() -> list[Case]:
    """Every kernel in every configuration of the tables, by calls that lead there."""
    return [*loss_cases(), *soft_loss_cases(), *backward_and_label_cases(), *vote_cases()]


def loss_cases() -> Iterator[Case]:
    for shape in LOSS_SHAPES:
        yield loss_case(*shape, quick=shape[1] == 21841)
    for C, (R, _) in loss_file.ROW_TILES.items():
        for dtype in (BF16, FP32):
            yield loss_case(loss_file.FEW_ROWS, C, dtype)
            if R > 1:  # as many rows a program only with few votes
                yield loss_case(loss_file.FEW_ROWS, C, dtype, 16)
            if C in loss_file.FEW_ROW_TILES:
                yield loss_case(256, C, dtype)
    yield loss_case(256, 1000, FP16, quick=True)
    for C in (1000, 2048, 10000, 131072):
        yield loss_case(256, C, FP64)
    for C in (997, 3989):
        for dtype in (BF16, FP32):
            yield loss_case(8192, C, dtype)
    for C in (21841, 131072):
        yield loss_case(256, C, FP32)
    for P in (16, 196, 320, 1024, 4096):
        yield loss_case(256, 1000, BF16, P, quick=P == 320)
    for P in (1024, 4096):
        yield loss_case(256, 10000, BF16, P)
    for C in (1000, 4096, 10000, 131073):
        everything = {"weight": True, "smoothing": 0.1}
        yield loss_case(256, C, BF16, None, "dense", dense=True)
        yield loss_case(256, C, label="plain CE", zipf_weight=0.0)
        yield loss_case(256, C, label="Zipf alone", ce_weight=0.0, only_correct=True, reduction="none")
        yield loss_case(256, C, label="weights, sum", weight=True, reduction="sum")
        yield loss_case(256, C, label="everything", only_correct=True, **everything)
        yield loss_case(256, C, label="dense everything", dense=True, **everything)
    yield loss_case(256, 1000, label="none", reduction="none")
    yield loss_case(256, 1000, label="no gradient", with_grad=False)
    yield loss_case(32768, 1000, label="totals", kernels=("totals_kernel",), quick=True)
    for C in (100, 1000, 21841):
        yield loss_case(256, C, label="correct", only_correct=True, kernels=("correct_kernel",))
    for C in (1000, 1024):
        yield loss_case(256, C, BF16, None, "ranked by logits", kernels=("logits_mass_kernel",))


def soft_loss_cases() -> Iterator[Case]:
    for C in (C for C in loss_file.ROW_TILES if C <= soft_file.LONGEST_ROW):
        for dtype in (BF16, FP32):
            yield soft_loss_case(loss_file.FEW_ROWS, C, dtype)
            yield soft_loss_case(loss_file.FEW_ROWS, C, dtype, 16)
            if C in loss_file.FEW_ROW_TILES:
                yield soft_loss_case(256, C, dtype)
    for C in (1000, 1024, 10000):
        yield soft_loss_case(256, C, FP16, quick=C == 1000)
        yield soft_loss_case(256, C, FP64)
    for C in (997, 2039, 21841):
        for dtype in (BF16, FP32):
            yield soft_loss_case(8192, C, dtype, quick=C == 21841 and dtype == BF16)
    for P in (16, 196, 320, 1024, 4096):
        yield soft_loss_case(256, 1000, BF16, P)
    for P in (1024, 4096):
        yield soft_loss_case(256, 10000, BF16, P)
    for C in (1000, 2048, 10000, 131073):
        everything = {"weight": True, "smoothing": 0.1, "only_correct": True}
        yield soft_loss_case(256, C, BF16, None, "dense", dense=True)
        yield soft_loss_case(256, C, label="plain CE", zipf_weight=0.0)
        yield soft_loss_case(256, C, label="Zipf alone", ce_weight=0.0, reduction="none")
        yield soft_loss_case(256, C, label="everything", **everything)
        yield soft_loss_case(256, C, label="dense everything", dense=True, **everything)
    yield soft_loss_case(256, 1000, label="no gradient", with_grad=False)
    for C in (100, 1000, 21841):
        yield soft_loss_case(256, C, label="correct", only_correct=True, kernels=("soft_correct_kernel",))


def backward_and_label_cases() -> Iterator[Case]:
    for dtype in (BF16, FP32):
        grad = torch.empty(256, 1000, dtype=dtype)
        for upstream in (torch.empty(()), torch.empty(256)):
            for function in (triton_kernels.loss_bwd, triton_kernels.loss_bwd_):
                name = f"{function.__name__} 256x1000 {NAMES[dtype]} {'rows' if upstream.dim() else 'scalar'}"
                call = functools.partial(function, grad, upstream, torch.empty(0))
                kernels = ("loss_bwd_kernel", "loss_bwd_rows_kernel")
                yield Case(name, call, kernels, quick=name == "loss_bwd_ 256x1000 bf16 scalar")
    for P in (49, 196, 320, 4096):
        votes = torch.empty(64, P, dtype=torch.int32)
        target, table = torch.empty(64, dtype=torch.int64), torch.empty(P + 1)
        call = functools.partial(triton_kernels.rank_fwd, votes, 1000)
        yield Case(f"ranks 64x1000 P={P}", call, ("rank_fwd_kernel",))
        call = functools.partial(triton_kernels.label_fwd, target, votes, table, 1000, -100)
        yield Case(f"label 64x1000 P={P}", call, ("label_fwd_kernel",), quick=P == 49)
    call = functools.partial(triton_kernels.label_fwd, target, votes, torch.empty(64, 1000), 1000, -100)
    yield Case("label 64x1000 dense", call, ("label_fwd_kernel",))


def vote_cases() -> Iterator[Case]:
    for shape, C in VOTE_SHAPES:
        yield vote_case(shape, C, quick=C == 10000)
    few = (16, 512, 7, 7)
    map7 = (256, 2048, 7, 7)
    yield vote_case(few, 1000)
    yield vote_case(few, 1000, FP16)
    yield vote_case(map7, 1000, FP16)
    yield vote_case((256, 2049, 7, 7), 1000, label="unaligned")
    yield vote_case((256, 2040, 7, 7), 1000, label="ragged D")
    yield vote_case(map7, 1000, label="NCHW", nchw=True, kernels=("vote_fwd_kernel", "transpose_kernel"))
    yield vote_case(map7, 1000, FP32)
    yield vote_case(map7, 1000, FP32, "TF32", tf32=True)
    yield vote_case((4, 512, 7, 7), 100, FP32, "TF32", tf32=True)
    yield vote_case(map7, 1000, FP64)
    for dtype in (BF16, FP64):
        yield vote_case(map7, 1000, dtype, "fold", kernels=("vote_fold_kernel",))
    for dtype in (BF16, FP32, FP64):
        yield vote_case((128, 512, 4, 4), 100, dtype, "upsampled", upsample=2)


def report_case(arch: int, index: int) -> tuple[list[Row], str]:
    """(rows, what went wrong) of one case, compiled. Runs in a worker process."""
    case = cases()[index]
    try:
        launches = compiled_launches(case.call, arch)
    except Exception as error:
        reason = " ".join(str(error)[-200:].split())
        return [], f"sm_{arch} {case.name}: {type(error).__name__}: {reason}"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        for name, kernel in launches:
            if name not in case.kernels:
                continue
            cubin.write_bytes(kernel.asm["cubin"])
            found = vars(nvcc_report.rows(cubin, str(arch))[0]) | {"shared": kernel.metadata.shared}
            wgmma = case.wgmma and name in VOTE
            found |= {"warps": kernel.metadata.num_warps, "fusible": fusible(kernel.asm["ptx"])}
            rows.append(Row(**found, case=case.name, needs_wgmma=wgmma))
    return rows, "" if rows else f"sm_{arch} {case.name}: launches none of {', '.join(case.kernels)}"


def fusible(ptx: str) -> str:
    """The first instruction by which the lanes of a sum may come to differ in the last bit, or "".

    Each lane adds another lane's value to its own, and both must get the same sum. They do not if a product
    of the lane's own is fused into the addition: it is not rounded, and the other lane's is. So no value from
    a shuffle enters a multiply-add; and each addition and product has its rounding mode, without which ptxas
    may fuse it.
    """
    shuffled: set[str] = set()
    for operation, operands in re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(.*);", ptx, re.MULTILINE):
        if re.fullmatch(r"(add|sub|mul)(\.(ftz|sat))*\.b?f\d+(x2)?", operation):
            return f"{operation} {operands}"
        written, *read = re.findall(r"%\w+", operands) or [""]
        if operation.startswith("shfl"):
            shuffled.add(written)
        elif not shuffled.isdisjoint(read):
            if operation.startswith("fma"):
                return f"{operation} {operands}"
            if operation.startswith(("mov", "cvt")):  # the same value
                shuffled.add(written)
    return ""


def accesses(ttgir: str) -> str:
    """Loads (L) and stores (S) of bfloat16, those of logits and gradient, and barriers (B), in order."""
    memory = r"(tt\.load|tt\.store) .*x!tt\.ptr<bf16>|(?:gpu|ttg)\.barrier"
    letters = {"tt.load": "L", "tt.store": "S", "": "B"}
    return "".join(letters[kind] for kind in re.findall(memory, ttgir))


# Warp specialisation on Hopper -----------------------------------------------------------------------

WARP_GROUPS = (
    vote_file.Config(128, 256, 64, 4, 3, True, True),
    vote_file.Config(64, 128, 64, 4, 4, True, True),
)


@contextlib.contextmanager
def no_stderr() -> Iterator[None]:
    """Nothing is written to standard error, by the compiler either, which prints all of a failed module."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def specialization(config: vote_file.Config) -> str:
    """What this Triton makes of a specialised vote kernel for sm_90: "" if what it should."""
    table = vote_file.TUNING[90, 2]
    vote_file.TUNING[90, 2] = {"specialised": (1.0, config)}
    vote_file.choose.cache_clear()
    try:
        with no_stderr():
            launches = compiled_launches(vote_case((256, 2048, 7, 7), 1000).call, 90)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        vote_file.TUNING[90, 2] = table
        vote_file.choose.cache_clear()
    return judged(dict(launches)["vote_fwd_kernel"].asm["ttgir"], config.BM)


def judged(ttgir: str, BM: int) -> str:
    """ "" if products run beside loads in warps of their own, each row of the tile in one of them."""
    if "ttg.warp_specialize(" not in ttgir:
        return "ignored"
    copy = r"async_tma_copy_global_to_local .*tensordesc<(?:tensor<)?(\d+)x.*-> !ttg\.memdesc<(\d+)x"
    for box, buffer in re.findall(copy, ttgir):
        if box != buffer:
            return f"{box} rows are copied into a buffer of {buffer}"
    rows = sum(map(int, re.findall(r"ttng\.warp_group_dot .*-> tensor<(\d+)x", ttgir)))
    return "" if rows == BM else f"{rows} rows are multiplied for a tile of {BM}"


# Model of time ---------------------------------------------------------------------------------------

H200 = SimpleNamespace(
    multiprocessors=132,
    copy=4.3e12,  # bytes a second, read and written
    l2=5.5e12,
    product=790e12,  # bf16 operations a second
    shared=227 << 10,
    registers=65536,
    threads=2048,
)


def resident(row: Row) -> int:
    """Programs of a kernel that fit on one H200 multiprocessor at a time."""
    registers = math.ceil(row.registers * 32 / 256) * 256 * row.warps
    by_shared = H200.shared // (row.shared + 1024)
    return max(1, min(32, H200.threads // (row.warps * 32), H200.registers // registers, by_shared))


def vote_model(M: int, D: int, C: int, BM: int, BN: int, slots: int) -> dict[str, float]:
    """Waves and times of a tiled bf16 product with argmax epilogue, seconds."""
    rows, columns = math.ceil(M / BM), math.ceil(C / BN)
    waves = rows * columns / slots
    ideal = 2 * M * D * C / H200.product
    padded = ideal * (math.ceil(waves) / waves) * (rows * BM / M) * (columns * BN / C)
    return {
        "tiles": rows * columns,
        "waves": waves,
        "ideal": ideal,
        "tail": padded - ideal,  # and padding
        "argmax": padded * 16 / D,  # where nothing multiplies meanwhile
        "fold": 2 * 8 * M * columns / H200.copy,
        "dense": ideal + 2 * 2 * M * C / H200.copy,  # matmul, scores written, argmax of them
    }


def loss_model(N: int, C: int, itemsize: int, P: int) -> dict[str, float]:
    """Bytes and times of the loss kernel, seconds."""
    moved = 2 * N * C * itemsize + 4 * N * P
    reread = N * C * itemsize if loss_file.is_long(C, itemsize, loss_file.LONGEST_ROW) else 0
    ideal = moved / H200.copy
    return {"bytes": moved, "ideal": ideal, "with L2": max(ideal, (moved + reread) / H200.l2)}


def print_model(rows: list[Row]) -> None:
    """Expected times per shape on an H200, with the occupancy of the kernels where they were compiled."""
    compiled = {row.case: row for row in rows if row.arch == "90"}
    print("\nModel of time, H200, bf16 votes (microseconds; arithmetic, not a measurement)")
    print(
        f"{'M x D x C':>20} {'tile':>8} {'a SM':>5} {'fit':>4} {'tiles':>6} {'waves':>6} {'ideal':>6} "
        f"{'tail':>6} {'argmax':>7} {'fold':>5} {'sum':>6} {'/ matmul':>8} {'matmul + argmax':>16}"
    )
    for shape, C in VOTE_SHAPES:
        D = shape[1] if len(shape) == 4 else shape[2]
        M = math.prod(shape) // D
        row = compiled.get(vote_case(shape, C).name)
        config, _ = vote_file.choose(90, H200.multiprocessors, 2, False, M, D, C, True)
        m = vote_model(M, D, C, config.BM, config.BN, H200.multiprocessors * config.per_sm)
        if config.per_sm > 1:
            m["argmax"] = 0.0  # another program multiplies meanwhile
        total = m["ideal"] + m["tail"] + m["argmax"] + m["fold"]
        print(
            f"{f'{M} x {D} x {C}':>20} {f'{config.BM}x{config.BN}':>8} {config.per_sm:>5} "
            f"{resident(row) if row else '-':>4} {m['tiles']:>6} {m['waves']:>6.2f} {m['ideal'] * 1e6:>6.1f} "
            f"{m['tail'] * 1e6:>6.1f} {m['argmax'] * 1e6:>7.2f} {m['fold'] * 1e6:>5.2f} {total * 1e6:>6.1f} "
            f"{total / m['ideal']:>8.2f} {m['dense'] * 1e6:>16.1f}"
        )
    print("\nModel of time, H200, loss and gradient (microseconds)")
    print(
        f"{'N x C (bytes), P':>24} {'rows':>5} {'warps':>6} {'a SM':>5} {'waves':>7} {'MB':>8} {'ideal':>8} "
        f"{'with L2':>8}"
    )
    for N, C, dtype, P in LOSS_SHAPES:
        itemsize, row = dtype.itemsize, compiled.get(loss_case(N, C, dtype, P).name)
        if loss_file.is_long(C, itemsize, loss_file.LONGEST_ROW):
            R, warps = 1, loss_file.long_tile(C, itemsize, 1)[1]
        else:
            R, warps = loss_file.row_tile(N, C, label_file.vote_tile(P)[0])[1:]
        fit = resident(row) if row else None
        waves = f"{math.ceil(N / R) / (H200.multiprocessors * fit):.2f}" if fit else "-"
        m = loss_model(N, C, itemsize, P)
        print(
            f"{f'{N} x {C} ({itemsize}), {P}':>24} {R:>5} {warps:>6} {fit or '-':>5} {waves:>7} "
            f"{m['bytes'] / 1e6:>8.1f} {m['ideal'] * 1e6:>8.2f} {m['with L2'] * 1e6:>8.2f}"
        )


# Host time -------------------------------------------------------------------------------------------


def host_times(repeats: int = 300) -> dict[str, float]:
    """Median host seconds per call with the launch stubbed out: allocation, choice, Triton's own path."""
    grad, one, nothing = torch.empty(256, 1000, dtype=BF16), torch.ones(()), torch.empty(0)
    timed = [
        loss_case(256, 1000),
        loss_case(128, 100, FP32, 320),
        Case("loss_bwd_ 256x1000 bf16", lambda: triton_kernels.loss_bwd_(grad, one, nothing), ()),
        vote_case((256, 2048, 7, 7), 1000),
    ]
    medians = {}
    with stand_in(90):
        for case in timed:
            case.call()  # compiles
            times = []
            for _ in range(repeats):
                begin = time.perf_counter()
                case.call()
                times.append(time.perf_counter() - begin)
            medians[case.name] = sorted(times)[repeats // 2]
    return medians


# The report ------------------------------------------------------------------------------------------

HEAD = (
    f"{'kernel':<22} {'case':<48} {'sm':>4} {'warps':>5} {'regs':>5} {'stack':>5} {'spill':>5} "
    f"{'shared':>7} {'16-byte':>9} {'TMA':>4} {'tensor':>7} {'instr':>6}"
)


def line(r: Row) -> str:
    wide = f"{r.wide_loads + r.wide_stores}/{r.loads + r.stores}"
    return (
        f"{r.kernel:<22} {r.case:<48} {r.arch:>4} {r.warps:>5} {r.registers:>5} {r.stack:>5} {r.spills:>5} "
        f"{r.shared:>7} {wide:>9} {r.bulk:>4} {r.tensor or '-':>7} {r.instructions:>6}"
    )


def collect(
    architectures: tuple[int, ...], only: str, quick: bool, jobs: int
) -> Iterator[tuple[list[Row], str]]:
    """What report_case gives for each chosen case, in order, as they are ready."""
    work = [
        (arch, i)
        for arch in architectures
        for i, case in enumerate(cases())
        if (case.quick or not quick) and (only in case.name or any(only in k for k in case.kernels))
    ]
    if jobs == 1:
        yield from (report_case(*item) for item in work)
    elif work:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            yield from pool.map(report_case, *zip(*work, strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one configuration of each kind")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--only", default="", help="only cases or kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--host", action="store_true", help="host time per call instead")
    options = parser.parse_args(argv)
    print(f"triton {triton.__version__}, torch {torch.__version__}, no GPU: nothing here has run on one\n")
    if options.host:
        for name, seconds in host_times().items():
            print(f"{seconds * 1e6:8.1f} us  {name}")
        return 0
    begin = time.perf_counter()
    rows, wrong = [], []
    print(HEAD)
    for found, error in collect(tuple(options.arch), options.only, options.quick, options.jobs):
        for row in found:
            print(line(row), flush=True)
            wrong += [f"sm_{row.arch} {row.kernel}, {row.case}: {fault}" for fault in row.faults]
        rows += found
        wrong += [error] if error else []
    if 90 in options.arch and not options.quick and options.only in "vote":
        for config in WARP_GROUPS:
            verdict = specialization(config) or "AS IT SHOULD: measure it, and put it into vote.TUNING"
            print(f"\nwarp specialisation on sm_90, {config.BM} x {config.BN}: {verdict}")
    print_model(rows)
    print(f"\n{len(rows)} kernels in {time.perf_counter() - begin:.0f} s, {len(wrong)} faults")
    print("\n".join(wrong))
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
