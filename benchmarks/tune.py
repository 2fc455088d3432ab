"""Variants of the CUDA kernels' launch constants, and with a stage left out: compiled apart, checked, timed.

    python benchmarks/tune.py [--only loss vote] [--arch 90a] [--out tune.json]

A variant is a replacement in the text of csrc/cuda. Each is compiled into a library without torch,
called through ctypes on the same inputs, compared with the results of the unchanged kernels and timed
interleaved with them: a table of times over theirs, to choose the constants in tuning.h from. Where a stage
is left out, results are wrong on purpose: the difference in time is the cost of the stage.

``--compile`` stops after compiling, which needs no GPU.

    python benchmarks/tune.py --triton 12544x2048x1000 ...

measures the configurations of Triton's votes instead, for M positions, D channels and C classes in bfloat16,
and keeps the fastest where the package finds it.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import clock
import torch
from sources import ROOT

sys.path.append(str(ROOT))  # the package may be built in place, and not installed

import baselines

KERNELS = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "tune"
SOURCES = {
    "loss": ("loss.cu", "loss_general.cu"),
    "vote": ("vote.cu", "vote_mma_sm80.cu", "vote_wgmma_sm90.cu"),
}


@dataclass(frozen=True)
class Variant:
    """A replacement of text that stands once in a file of csrc/cuda; without a file: none.

    The results of one named "without" a stage are not compared: they are wrong.
    """

    name: str
    file: str = ""
    old: str = ""
    new: str = ""


def constants(name: str, old: str, *values: str) -> list[Variant]:
    """A constant of tuning.h in other values."""
    return [Variant(f"{name} {new}", "tuning.h", f"{name} = {old}", f"{name} = {new}") for new in values]


AS_IT_IS = Variant("as it is")
HELD = "LANES == 0    ? (SIZE == 4 ? 20 : 10)"
RESIDENT = "LANES == 16 || SIZE == 8 ? 4 : "
STREAMED, STORED = "__ldcs(static_cast<const uint4*>(at))", "__stcg(static_cast<uint4*>(at), raw)"
BEST = "argmax_of_fragment<Config::kTileN / 8>(sum, bias, fragment_column(lane), first_class,"
ANY = "rows[0] = {sum[0] + bias[lane], first_class}, rows[1] = {sum[2], first_class}"
COMBINED = "if (args.tiles_n > 1) stored = first_row;"
PACKED = "    cudaError_t error = pack(args, size, stream);"
VARIANTS = {
    "loss": (
        AS_IT_IS,
        Variant("kHeldVectors 8 a block", "tuning.h", HELD, "LANES == 0 ? (SIZE == 4 ? 16 : 8)"),
        Variant("kSmallResident 4", "tuning.h", RESIDENT + "5 - kSpillsSooner", RESIDENT + "4"),
        *constants("kSharedWarps", "7", "4", "16"),
        *constants("kSmallBlock", "128", "256"),
        *constants("kWideBlock", "192", "256"),
        *constants("kLongBlock", "512", "256", "1024"),
        *constants("kLargestCluster", "8", "4"),
        *constants("kClusterSlice", "1536", "768"),
        *constants("kFullDeviceVectors", "10", "5"),
        *constants("kIdleDeviceVectors", "1", "2", "4"),
        *constants("kIdleBlock", "128", "192"),
        *constants("kVotesPerThread", "4", "1"),
        Variant("plain loads", "ptx.cuh", STREAMED, "*static_cast<const uint4*>(at)"),
        Variant("stores first to leave L2", "ptx.cuh", STORED, STORED.replace("__stcg", "__stcs")),
    ),
    "vote": (
        AS_IT_IS,
        *constants("kStagger", "2", "1", "3"),
        *constants("kWideStages", "4", "3"),
        *constants("kGroupBytes", "int64_t{16} << 20", "int64_t{8} << 20", "int64_t{32} << 20"),
        *constants("kNarrowPenalty", "1.35", "0.5"),  # 128 x 128 tiles wherever wgmma serves
        *constants("kMinWgmmaTiles", "33", "1 << 30"),  # mma.sync everywhere
        *constants("kPackBytes", "int64_t{64} << 20", "int64_t{32} << 20", "int64_t{18} << 20"),
        Variant("promotion to 128 bytes", "vote_wgmma_sm90.cu", "PROMOTION_L2_256B", "PROMOTION_L2_128B"),
        Variant("without argmax", "vote_wgmma_sm90.cuh", BEST + " rows)", ANY),
        Variant("without combine", "vote_wgmma_sm90.cuh", COMBINED, ""),
        Variant("without packing", "vote.cu", PACKED, "    cudaError_t error = cudaSuccess;"),
    ),
}

LOSSES = ((8192, 4096), (4096, 21841), (8192, 10007), (1024, 131072), (32768, 1000), (1024, 1000), (128, 100))
SIZES = {
    "loss": {f"{N} x {C}": (N, C) for N, C in LOSSES},
    "vote": {  # N, D, side, C, layout
        "ResNet-50": (256, 2048, 7, 1000, "channels_last"),
        "ResNet-18": (256, 512, 7, 1000, "channels_last"),
        "ViT-B/16": (256, 768, 14, 1000, "channels_last"),
        "iNat21": (256, 2048, 7, 10000, "channels_last"),
        "stage 2": (128, 256, 8, 100, "channels_last"),
        "ResNet-50 NCHW": (256, 2048, 7, 1000, "NCHW"),
    },
}


def varied(kernels: Path, variant: Variant) -> None:
    """Makes the replacement in a copy of csrc/cuda."""
    if variant.file:
        file = kernels / variant.file
        text = file.read_text()
        if (count := text.count(variant.old)) != 1:
            raise ValueError(f"{variant.name}: {file.name} has {count} times {variant.old!r}")
        file.write_text(text.replace(variant.old, variant.new))


def command(kind: str, arch: str, kernels: Path) -> list[str]:
    """nvcc's, for tune.cu over a copy of csrc/cuda; the sources of kernels are still to follow."""
    options = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    options += [f"-I{kernels}", f"-DTUNE_{kind.upper()}"]
    return [shutil.which("nvcc"), *options, str(Path(__file__).with_suffix(".cu"))]


def compiled(kind: str, arch: str, variant: Variant) -> Path | None:
    """The variant's library; what nvcc has against it is printed."""
    folder = BUILD / kind / "".join(c if c.isalnum() else "_" for c in variant.name)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(KERNELS, folder / "cuda")
    shutil.copy(KERNELS.parent / "label.h", folder)
    varied(folder / "cuda", variant)
    library = folder / "kernels.so"
    sources = [folder / "cuda" / source for source in SOURCES[kind]]
    whole = [*command(kind, arch, folder / "cuda"), *sources, "-shared", "-o", library]
    done = subprocess.run(whole, capture_output=True, text=True)
    if done.returncode:
        print(f"{kind}, {variant.name}: does not compile\n{(done.stderr or done.stdout)[-2000:]}")
    return None if done.returncode else library


class Problem:
    """Calls on the GPU, each with inputs and outputs of its own, so that none is found in L2.

    ``_loss`` and ``_vote`` make the arguments of tune_run in tune.cu, and name its results among them.
    """

    def __init__(self, kind: str, size: tuple) -> None:
        make, nbytes = self._loss if kind == "loss" else self._vote, 0
        self.kept, self.calls = [], []
        while not self.calls or (len(self.calls) < 32 and nbytes < 200e6):
            arguments, results = make(*size)
            nbytes += arguments[0].nbytes * (2 if kind == "loss" else 1)
            self.kept.append((arguments, results))
            self.calls.append([ctypes.c_int64(x.data_ptr() if torch.is_tensor(x) else x) for x in arguments])

    @staticmethod
    def _loss(N: int, C: int) -> tuple[list, list]:
        zeros = functools.partial(torch.zeros, device=clock.device())
        logits, *rest = baselines.loss_inputs(N, C, 49, torch.bfloat16)
        log_mass = -torch.arange(1, min(49, C) + 2, device=clock.device()).float().log()
        results = parts, grad = [zeros(3), zeros(N, C, dtype=torch.bfloat16)]
        scratch, counter = zeros(1 << 17, dtype=torch.float64), zeros(1, dtype=torch.int32)
        return [logits.detach(), *rest, log_mass, N, C, 49, parts, grad, scratch, counter], results

    @staticmethod
    def _vote(N: int, D: int, side: int, C: int, layout: str) -> tuple[list, list]:
        zeros = functools.partial(torch.zeros, device=clock.device())
        features, weight = baselines.vote_inputs(N, side, side, D, C, torch.bfloat16, layout)
        votes = zeros(N, side * side, dtype=torch.int32)
        scratch, counters = zeros(128 << 20, dtype=torch.uint8), zeros(1 << 18, dtype=torch.int32)
        arguments = [features, N, D, side, side, *features.stride(), weight, C, votes]
        return [*arguments, scratch, scratch.nbytes, counters, counters.numel()], [votes]

    def run(self, kernels: ctypes.CDLL, k: int) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = kernels.tune_run(*self.calls[k % len(self.calls)], stream)
        if error:
            raise RuntimeError(f"CUDA error {error}")

    def results(self, kernels: ctypes.CDLL) -> list[torch.Tensor]:
        _, results = self.kept[0]
        for x in results:
            x.fill_(-7)
        self.run(kernels, 0)
        torch.cuda.synchronize()
        return [x.clone() for x in results]


def disagreement(kind: str, got: list[torch.Tensor], expected: list[torch.Tensor]) -> str:
    """What a variant computes differently; empty if nothing that rounding does not explain."""
    if kind == "vote":
        share = (got[0] != expected[0]).float().mean().item()
        return f"{share:.2%} of the votes differ" if share > 1e-3 else ""
    (parts, grad), (expected_parts, expected_grad) = got, expected
    if not torch.allclose(parts, expected_parts, rtol=1e-3):
        return f"the loss is {parts[0].item():.6g}, not {expected_parts[0].item():.6g}"
    close = torch.isclose(grad.float(), expected_grad.float(), rtol=2e-2, atol=1e-3 / grad.numel())
    share = (~close).double().mean().item()
    wrong = share > 0.1 / grad.shape[1]  # more than an element in ten rows
    return f"{share:.2%} of the gradient differs" if wrong else ""


def measure(kind: str, case: str, size: tuple, libraries: dict[str, Path], timer) -> list[dict]:
    """A row {kind, case, variant, seconds, how, ratio, wrong} for each variant."""
    torch.manual_seed(0)
    problem, results, wrong, entries = Problem(kind, size), {}, {}, []
    for name, library in libraries.items():
        kernels = ctypes.CDLL(str(library))
        try:
            results[name] = problem.results(kernels)
        except RuntimeError as error:
            wrong[name] = str(error)
            continue
        calls = [functools.partial(problem.run, kernels, k) for k in range(len(problem.calls))]
        entries.append(clock.Entry(name, calls))
    found = clock.compare(entries, timer)
    wrong |= found.failed
    base, rows = AS_IT_IS.name, []
    for name in libraries:
        row = {"kind": kind, "case": case, "variant": name, "seconds": None, "how": "", "ratio": None}
        if name in found.samples:
            row |= {"seconds": statistics.median(found.taken(name)), "how": found.how[name]}
            row["ratio"] = found.ratio(name, base)[0] if base in found.samples else None
        if name not in wrong and base in results and not name.startswith("without "):
            wrong[name] = disagreement(kind, results[name], results[base])
        rows.append(row | {"wrong": wrong.get(name, "")})
    return rows


def table(kind: str, rows: list[dict]) -> str:
    """A line a variant, a column a case: microseconds of the kernels as they are, then times over theirs."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    lines = {"": f"{kind:28}" + "".join(f"{case:>17}" for case in cases)}
    for row in rows:
        text = "-"
        if row["ratio"] is not None:
            first = row["variant"] == AS_IT_IS.name
            text = f"{1e6 * row['seconds']:.1f} us" if first else f"{row['ratio']:.3f}"
            text += "!" if row["wrong"] else ""
        lines[row["variant"]] = lines.get(row["variant"], f"{row['variant']:28}") + f"{text:>17}"
    wrong = [f"! {row['variant']}, {row['case']}: {row['wrong']}" for row in rows if row["wrong"]]
    return "\n".join([*lines.values(), *wrong])


def tune_votes(shapes: list[str]) -> int:
    """Keeps the fastest configuration of Triton's votes for shapes MxDxC in vote.TUNED."""
    if not torch.cuda.is_available():
        print("tune --triton needs a CUDA device")
        return 2
    from zipfls_cuda.triton_kernels import vote

    arch, multiprocessors = vote.device_properties(torch.device("cuda", torch.cuda.current_device()))
    entries = {key: list(config) for key, config in vote.tuned().items()}
    tiles = (64, 128), (128, 128), (128, 256), (64, 256)
    for shape in shapes:
        M, D, C = map(int, shape.split("x"))
        x, weight = (torch.randn(n, D, dtype=torch.bfloat16, device="cuda") for n in (M, C))
        votes, found = torch.empty((1, M), dtype=torch.int32, device="cuda"), []
        V, tma = vote._alignment(x, D, weight, D)
        special = (False, True) if arch >= 90 and tma and vote.SPECIALIZES else (False,)
        cuts = itertools.product(tiles, (32, 64), (4, 8), (2, 3, 4), (1, 2), special)
        for (BM, BN), BK, warps, stages, per_sm, specialize in cuts:
            config = vote.Config(BM, BN, BK, warps, stages, arch >= 90 and tma, specialize, per_sm)
            programs = min(-(-M // BM) * -(-C // BN), multiprocessors * per_sm)
            plan = vote._product(x, D, M, M, M, weight, False, config, programs, V, "tf32")
            try:
                taken = vote.triton.testing.do_bench(lambda: vote._run(plan, x, weight, weight, votes))  # noqa: B023
                found.append((taken, config))
            except Exception as error:  # does not fit this GPU: no candidate
                print(f"  {config}: {type(error).__name__}", file=sys.stderr)
        milliseconds, config = min(found)
        entries[vote.tuned_key(arch, 2, M, D, C)] = list(config)
        print(f"{shape}: {milliseconds * 1e3:.1f} us with {config}")
        vote.TUNED.write_text(json.dumps(entries, indent=1) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--triton", nargs="+", metavar="MxDxC", help="measure Triton's votes for these")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--arch", default="90a", help="as nvcc names it")
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON, as they come")
    parser.add_argument("--compile", action="store_true", help="compile, and no more")
    args = parser.parse_args()
    if args.triton:
        return tune_votes(args.triton)
    if shutil.which("nvcc") is None or not (args.compile or torch.cuda.is_available()):
        print("tune needs nvcc, and a CUDA device (--compile does not)")
        return 2
    wrong, rows = False, []
    for kind in args.only:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            built = pool.map(functools.partial(compiled, kind, args.arch), VARIANTS[kind])
            libraries = {v.name: library for v, library in zip(VARIANTS[kind], built, strict=True) if library}
        wrong |= len(libraries) < len(VARIANTS[kind])
        for case, size in SIZES[kind].items() if AS_IT_IS.name in libraries and not args.compile else ():
            found = measure(kind, case, size, libraries, clock.DeviceClock())
            wrong |= found[0]["seconds"] is None  # of the kernels as they are
            rows += found
            torch.cuda.empty_cache()
            if args.out:
                args.out.write_text(json.dumps(rows, indent=0))
            print(table(kind, [row for row in rows if row["kind"] == kind]), flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
