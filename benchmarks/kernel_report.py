"""What Triton makes of zipfls_cuda/triton_kernels, without a GPU: `make kernel-report`.

Every kernel in every configuration of the tuning tables is compiled ahead of time for sm_80, sm_90 and
sm_100. The launchers are called on uninitialised CPU tensors, with a stand-in for Triton's driver that
compiles where the real one would launch: types, alignment and constants are those of a real call.

One row per kernel, configuration and architecture: registers a thread, stack bytes, instructions that touch
local memory (spills), shared memory, 16-byte accesses of all accesses to global memory (TMA counted apart),
the tensor-core instruction, and what a thread executes for a logit in each loop over a streamed row. The exit
status is 1 if anything spills, does not compile, asks for more shared memory than there is, is a 16-bit
product on Hopper without wgmma (HGMMA), or may give the lanes of a sum different last bits (a multiply-add
with another lane's value, or one left to ptxas to make).

    python benchmarks/kernel_report.py [--arch 90] [--only vote soft] [--jobs 2]
"""

from __future__ import annotations

import argparse
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
from unittest import mock

if __name__ in ("__main__", "__mp_main__"):  # a program, not a module of the tests: compiled, not interpreted
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nvcc_report
import torch
import triton
from triton.backends.compiler import GPUTarget

from zipfls_cuda import check_rows, triton_kernels
from zipfls_cuda.triton_kernels import distill as distill_file
from zipfls_cuda.triton_kernels import launch_cache
from zipfls_cuda.triton_kernels import loss as loss_file
from zipfls_cuda.triton_kernels import vote as vote_file

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # architecture -> bytes a program may have
ARCHITECTURES = tuple(SHARED)
MULTIPROCESSORS = 132  # of the device that launches are planned for
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP64: "fp64"}


@dataclass(kw_only=True)
class Row(nvcc_report.Row):
    """One kernel, in one configuration, for one architecture; ``shared`` is what a launch asks for."""

    needs_wgmma: bool
    fusible: str  # see fusible()

    @property
    def faults(self) -> list[str]:
        """What fails the report."""
        found, most = super().faults, SHARED[int(self.arch)]
        if self.shared > most:
            found.append(f"{self.shared} bytes of shared memory, of {most}")
        if self.needs_wgmma and self.arch == "90" and self.tensor != "HGMMA":
            found.append(f"a Hopper product without wgmma (found {self.tensor or 'none'})")
        if self.fusible:
            found.append(f"lanes may differ in the last bit: {self.fusible}")
        return found


def driver(arch: int) -> SimpleNamespace:
    """Stands in for Triton's driver on a machine without a GPU, for kernels that are never launched."""
    device = {"max_shared_mem": 1 << 20, "multiprocessor_count": MULTIPROCESSORS}
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,  # caches of compiled kernels are per device: one per architecture
        get_current_stream=lambda device: 0,
        utils=SimpleNamespace(get_device_properties=lambda _: device),
    )


def compiled_launches(call: Callable[[], object], arch: int) -> list[tuple[str, object]]:
    """(kernel's name, compiled kernel) for each launch of a call, on CPU tensors taken for a GPU's."""
    launches, run = [], triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append((self.__name__, kernel))
        return None  # so that the second launch of a kernel compiles it too, and does not run it

    triton.runtime.driver.set_active(driver(arch))  # stays: a machine without a GPU has none to go back to
    with (
        mock.patch.object(triton.JITFunction, "run", compile_only),
        mock.patch.object(vote_file, "device_properties", return_value=(arch, MULTIPROCESSORS)),
        mock.patch.dict(launch_cache.plan_cache, clear=True),  # it holds kernels of another architecture
    ):
        call()
    return launches


FORWARD = ("loss_fwd_kernel",)
VOTE = ("vote_fwd_kernel", "vote_upsample_kernel")


@dataclass
class Case:
    """A call of a launcher; ``kernels`` names those of its launches that are reported."""

    name: str
    call: Callable[[], object]
    kernels: tuple[str, ...]
    wgmma: bool = False  # a 16-bit product, which must use wgmma on sm_90


def loss_case(
    N: int, C: int, dtype: torch.dtype = BF16, P: int | None = 49, label: str = "", *, soft: bool = False,
    dense: bool = False, weight: bool = False, kept: bool = False, kernels: tuple[str, ...] = FORWARD,
    **options,
) -> Case:  # fmt: skip
    """A call of loss_fwd, ``soft`` with probabilities, or of loss_factors_fwd (``kept``).

    ``label`` says what is special about it.
    """
    D = FP64 if dtype == FP64 else FP32
    settings = {
        "ce_weight": 1.0, "zipf_weight": 0.1, "label_smoothing": 0.0, "only_correct": False,
        "ignore_index": -100, "reduction": "mean", "with_grad": True,
    }  # fmt: skip

    if kept:
        del settings["with_grad"]

    def call() -> object:
        return (triton_kernels.loss_factors_fwd if kept else triton_kernels.loss_fwd)(
            torch.empty(N, C, dtype=dtype),
            torch.empty(N, C, dtype=D) if soft else torch.empty(N, dtype=torch.int64),
            None if P is None else torch.empty(N, P, dtype=torch.int32),
            torch.empty(N, C, dtype=D) if dense else torch.empty(min(P or C, C) + 1, dtype=D),
            torch.empty(C, dtype=D) if weight else None,
            *(settings | options).values(),
        )

    name = f"{'soft' if soft else 'loss'} {N}x{C} {NAMES[dtype]} P={P} {label}".rstrip()
    return Case(name, call, kernels)


def distill_case(
    N: int, C: int, dtype: torch.dtype = BF16, label: str = "", *, teacher: torch.dtype | None = None,
    target: bool = True, weight: bool = False, shares: bool = False, table: bool = False, **options,
) -> Case:  # fmt: skip
    """A call of distill_fwd, by default for DKD at T = 4; ``label`` says what is special about it."""

    def call() -> object:
        settings = {
            "ce_weight": 1.0 if target else 0.0, "kd_weight": 0.0 if target else 1.0,
            "tckd_weight": 1.0 if target else 0.0, "nckd_weight": 8.0 if target else 0.0,
            "soft_target_weight": 0.0, "max_weight": 0.0, "temperature": 4.0, "form": "divergence",
            "ignore_index": -100, "reduction": "mean", "with_grad": True,
        }  # fmt: skip
        settings |= options
        accumulated = FP64 if dtype == FP64 else FP32
        return triton_kernels.distill_fwd(
            torch.empty(N, C, dtype=dtype),
            torch.empty(N, C, dtype=teacher or dtype),
            torch.empty(N, dtype=torch.int64) if target else None,
            torch.empty((N, 2) if shares else N, dtype=accumulated) if weight or shares else None,
            torch.empty(N, dtype=torch.int64) if table else None,
            *settings.values(),
        )

    return Case(f"distill {N}x{C} {NAMES[dtype]} {label}".rstrip(), call, ("distill_fwd_kernel",))


def vote_case(
    shape: tuple[int, ...], C: int, dtype: torch.dtype = BF16, label: str = "", *, upsample: int = 1,
    kernels: tuple[str, ...] = VOTE,
) -> Case:  # fmt: skip
    """A call of vote_fwd on tokens (N, T, D) or a map (N, D, H, W): channels_last, or NCHW by its label; TF32
    by its label too."""
    tokens = len(shape) == 3
    D = shape[2] if tokens else shape[1]
    layout = torch.contiguous_format if tokens or label == "NCHW" else torch.channels_last

    def call() -> object:
        features = torch.empty(shape, dtype=dtype, memory_format=layout)
        weight, bias = torch.empty(C, D, dtype=dtype), torch.empty(C, dtype=dtype)
        with check_rows.tensor_float_32(label == "TF32"):
            return triton_kernels.vote_fwd(features, weight, bias, upsample)

    name = f"vote {math.prod(shape) // D}x{D}x{C} {NAMES[dtype]} {label}".rstrip()
    return Case(name, call, kernels, dtype.itemsize == 2)


@functools.cache
def cases() -> list[Case]:
    """Every kernel in every configuration of the tables, by calls that lead there."""
    losses = (*loss_cases(soft=False), *loss_cases(soft=True), *distill_cases())
    return [*losses, *backward_and_label_cases(), *vote_cases()]


def loss_cases(soft: bool) -> Iterator[Case]:
    """Rows of every length, held in registers or read twice; every type and option."""
    case = functools.partial(loss_case, soft=soft)
    longest = loss_file.LONGEST_SOFT_ROW if soft else loss_file.LONGEST_ROW
    for C, (R, _) in loss_file.ROW_TILES.items():
        for dtype in (BF16, FP32) if longest >= C else ():
            yield case(loss_file.FEW_ROWS, C, dtype)
            if soft or R > 1:  # as many rows a program only with few votes
                yield case(loss_file.FEW_ROWS, C, dtype, 16)
            if C in loss_file.FEW_ROW_TILES:
                yield case(256, C, dtype)
    for C in (1000, 1024, 10000):
        yield case(256, C, FP16)
    for C in (1000, longest // 2, 10000):
        yield case(256, C, FP64)
    for C in (997, longest - 9, 21841):  # unaligned
        for dtype in (BF16, FP32):
            yield case(8192, C, dtype)
    for P in (16, 196, 320, 1024, 4096):
        yield case(256, 1000, BF16, P)
    for P in (196, 320, 1024, 4096):
        yield case(256, 10000, BF16, P)
    for C in (1000, longest, 10000, 131073):
        everything = {"weight": True, "label_smoothing": 0.1, "only_correct": True}
        yield case(256, C, BF16, None, "dense", dense=True)
        yield case(256, C, label="plain CE", zipf_weight=0.0)
        yield case(256, C, label="Zipf alone", ce_weight=0.0, only_correct=True, reduction="none")
        yield case(256, C, label="everything", **everything)
        yield case(256, C, label="dense everything", dense=True, **everything)
    yield case(256, 1000, label="no gradient", with_grad=False)
    for C in (100, 1000, 21841):
        yield case(256, C, label="correct", only_correct=True, kernels=("correct_kernel",))
    if soft:  # the rest is of a class index as target: longer rows, sums of class weights
        return
    yield loss_case(128, 100, FP32, 320)
    for N, C in ((1024, 1000), (32768, 1000), (4096, 10007), (4096, 10000), (4096, 21841), (4096, 128256)):
        yield loss_case(N, C)
    for C, dtype in ((131072, FP64), (10000, FP32), (10007, FP32), (21841, FP32), (131072, FP32)):
        yield loss_case(256, C, dtype)
    for C in (100, 1000, 997, 2048, loss_file.LONGEST_ROW, 10000, 21841, 131072):
        for dtype in (BF16, FP32):
            yield loss_case(256, C, dtype, label="kept", kept=True)
    for P in (196, 320, 1024):
        yield loss_case(256, 10000, BF16, P, "kept", kept=True)
    for label, options in (
        ("kept, plain CE", {"zipf_weight": 0.0}),
        ("kept, smoothed", {"label_smoothing": 0.1}),
    ):
        yield loss_case(4096, 10007, FP32, label=label, kept=True, **options)
    yield loss_case(4096, 100, label="kept", kept=True)
    yield loss_case(256, 1000, FP64, label="kept", kept=True)
    for C in (1000, loss_file.LONGEST_ROW, 10000, 131073):
        yield loss_case(256, C, label="weights, sum", weight=True, reduction="sum")
    yield loss_case(256, 1000, label="none", reduction="none")
    yield loss_case(32768, 1000, label="totals", kernels=("totals_kernel",))


def distill_cases() -> Iterator[Case]:
    """Rows of every length and alignment, every type, and what changes the sums."""
    longest = distill_file.LONGEST_ROW
    everything = {"kd_weight": 0.5, "soft_target_weight": 0.5, "weight": True}
    made = {"kd_weight": 1.0, "tckd_weight": 0.0, "nckd_weight": 0.0, "temperature": 1.0}
    made |= {"form": "probabilities", "shares": True, "teacher": FP32}
    C = 16
    while longest >= C:
        yield distill_case(256, C)
        for dtype in (BF16, FP32):
            yield distill_case(loss_file.FEW_ROWS, C, dtype)
        C *= 2
    for C in (1000, 997, longest - 9, 10000, 21841):
        for dtype in (BF16, FP32):
            yield distill_case(8192, C, dtype)
    for C in (1000, longest // 2 - 9, 10000, 21841):
        yield distill_case(256, C, FP64)
        yield distill_case(256, C, FP64, "everything", **everything)
    for C in (1000, longest - 9, 21841):
        yield distill_case(256, C, FP16)
        yield distill_case(256, C, label="everything", **everything)
        yield distill_case(256, C, FP32, "everything", reduction="none", **everything)
        yield distill_case(256, C, label="T=1", temperature=1.0, form="cross_entropy", soft_target_weight=1.0)
        yield distill_case(256, C, label="no target", target=False)
        yield distill_case(256, C, label="by index", table=True)
        yield distill_case(256, C, label="plain CE", tckd_weight=0.0, nckd_weight=0.0, reduction="sum")
        yield distill_case(256, C, label="float32 teacher", teacher=FP32)
        yield distill_case(256, C, FP32, "bfloat16 teacher", teacher=BF16)
        for dtype in (BF16, FP32):
            yield distill_case(256, C, dtype, "MaxSup", max_weight=1.0, **made)
            yield distill_case(256, C, dtype, "PS-KD", table=True, **made)
            yield distill_case(256, C, dtype, "max beside DKD", max_weight=1.0)
    yield distill_case(256, 1000, label="no gradient", with_grad=False)


def backward_and_label_cases() -> Iterator[Case]:
    for dtype in (BF16, FP32):
        grad = torch.empty(256, 1000, dtype=dtype)
        for upstream in (torch.empty(()), torch.empty(256)):
            for function in (triton_kernels.loss_bwd, triton_kernels.loss_bwd_):
                name = f"{function.__name__} 256x1000 {NAMES[dtype]} {'rows' if upstream.dim() else 'scalar'}"
                call = functools.partial(function, grad, upstream, torch.empty(0))
                yield Case(name, call, ("loss_bwd_kernel", "loss_bwd_rows_kernel"))
        for C, P in ((100, 49), (1000, 49), (997, 49), (1000, 320), (10000, 49), (21841, 1024)):
            logits, patches = torch.empty(256, C, dtype=dtype), torch.empty(256, P, dtype=dtype)
            target, votes = torch.empty(256, dtype=torch.int64), torch.empty(256, P, dtype=torch.int32)
            kept = (torch.empty(256, 4), patches, torch.empty(()), torch.empty(0))
            call = functools.partial(triton_kernels.loss_factors_bwd_, logits, target, votes, *kept)
            yield Case(f"loss_factors_bwd_ 256x{C} {NAMES[dtype]} P={P}", call, ("loss_factors_bwd_kernel",))
    for P in (49, 196, 320, 4096):
        votes = torch.empty(64, P, dtype=torch.int32)
        call = functools.partial(triton_kernels.rank_fwd, votes, 1000)
        yield Case(f"ranks 64x1000 P={P}", call, ("rank_fwd_kernel",))


def vote_cases() -> Iterator[Case]:
    resnet50, few = (256, 2048, 7, 7), (16, 512, 7, 7)
    yield vote_case(resnet50, 10000)
    shapes = [(resnet50, 1000), ((256, 512, 7, 7), 1000), ((256, 196, 768), 1000), ((128, 2048, 7, 7), 1000)]
    for shape, C in [*shapes, ((128, 512, 4, 4), 100), ((128, 256, 8, 8), 100), (few, 1000)]:
        yield vote_case(shape, C)
    for shape in (few, resnet50):
        yield vote_case(shape, 1000, FP16)
    yield vote_case((256, 2049, 7, 7), 1000, label="unaligned")
    yield vote_case((256, 2040, 7, 7), 1000, label="ragged D")
    yield vote_case(resnet50, 1000, label="NCHW", kernels=("vote_fwd_kernel", "transpose_kernel"))
    for dtype, label in ((FP32, ""), (FP32, "TF32"), (FP64, "")):
        yield vote_case(resnet50, 1000, dtype, label)
    yield vote_case((4, 512, 7, 7), 100, FP32, "TF32")
    for dtype in (BF16, FP64):
        yield vote_case(resnet50, 1000, dtype, "combine", kernels=("vote_combine_kernel",))
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
            found |= {"case": f"{case.name}, {kernel.metadata.num_warps} warps"}
            found |= {"needs_wgmma": case.wgmma and name in VOTE, "fusible": fusible(kernel.asm["ptx"])}
            rows.append(Row(**found))
    return rows, "" if rows else f"sm_{arch} {case.name}: launches none of {', '.join(case.kernels)}"


def fusible(ptx: str) -> str:
    """The first instruction by which the lanes of a sum may come to differ in the last bit, or "".

    Each lane adds another lane's value to its own, and both must get the same sum. They do not if a product
    of the lane's own is fused into the addition: it is not rounded, and the other lane's is. So no value from
    a shuffle enters a multiply-add, but from one by index, which moves a finished value between layouts; and
    each addition and product has its rounding mode, without which ptxas may fuse it.
    """
    shuffled: set[str] = set()
    for operation, operands in re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(.*);", ptx, re.MULTILINE):
        if re.fullmatch(r"(add|sub|mul)(\.(ftz|sat))*\.b?f\d+(x2)?", operation):
            return f"{operation} {operands}"
        written, *read = re.findall(r"%\w+", operands) or [""]
        if operation.startswith("shfl") and not operation.startswith("shfl.sync.idx"):
            shuffled.add(written)
        elif not shuffled.isdisjoint(read):
            if operation.startswith("fma"):
                return f"{operation} {operands}"
            if operation.startswith(("mov", "cvt")):  # the same value
                shuffled.add(written)
    return ""


def collect(architectures: list[int], only: list[str], jobs: int) -> Iterator[tuple[list[Row], str]]:
    """What report_case gives for each chosen case, in order, as they are ready."""
    texts = [" ".join([case.name, *case.kernels]) for case in cases()]
    chosen = [i for i, text in enumerate(texts) if any(word in text for word in only)]
    work = [(arch, i) for arch in architectures for i in chosen]
    if jobs == 1:
        yield from (report_case(*item) for item in work)
    elif work:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            yield from pool.map(report_case, *zip(*work, strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--only", nargs="+", default=[""], help="cases or kernels whose name contains one")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(argv)
    print(f"triton {triton.__version__}, torch {torch.__version__}\n\n{nvcc_report.HEAD}")
    begin, count, wrong = time.perf_counter(), 0, []
    for found, error in collect(options.arch, options.only, options.jobs):
        for row in found:
            print(nvcc_report.line(row), flush=True)
            wrong += [f"sm_{row.arch} {row.kernel}, {row.case}: {fault}" for fault in row.faults]
        count += len(found)
        wrong += [error] if error else []
    print(f"\n{count} kernels in {time.perf_counter() - begin:.0f} s, {len(wrong)} faults")
    print("\n".join(wrong))
    return 1 if wrong or not count else 0


if __name__ == "__main__":
    sys.exit(main())
