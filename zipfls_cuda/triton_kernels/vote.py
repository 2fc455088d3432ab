"""Stage 1 on a GPU: votes of dense positions, the product with the classifier and its argmax in one kernel.

scores (M, C) = F (M, D) W^T, M = N P positions, are computed tile by tile and never stored: each tile leaves
the (largest score, lowest class) of its rows, 8 bytes a row; ``vote_combine_kernel`` joins the class tiles in
ascending order. With a single class tile the product writes the votes itself. No atomics: the result does
not depend on scheduling.

* ``vote_fwd_kernel``: persistent, one program per multiprocessor slot, class tiles fastest, so that programs
  running together share a tile of F and all of W in L2. Tensor descriptors (TMA) where tuning says so and
  rows are 16-byte aligned, plain pointers otherwise.
* ``vote_upsample_kernel``: scores of whole images at their own resolution into a piece of L2, then bilinear
  interpolation to twice that, then bias and argmax. A quarter of the product that interpolated features take.

Positions are rows of one matrix with a fixed distance between rows. A channels_last map is one as it stands,
and so are tokens; tokens without their class token are (``x[:, 1:]``) if the gaps are computed along and
dropped. An NCHW map is transposed first: at 49 positions its rows lie 98 bytes apart, which neither TMA nor
16-byte loads take, and 2-byte loads would occupy the load units for longer than the product takes.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .label import INTERPRET
from .launch_cache import (
    Launch,
    device_of,
    launch,
    plan_cache,
    signature,
    store_plan,
    template,
    with_unit_stride,
)

# Tuning ----------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """How a product is cut up."""

    BM: int  # positions per tile
    BN: int  # classes per tile
    BK: int  # channels a step
    warps: int
    stages: int  # steps in flight
    tma: bool = False
    specialize: bool = False  # warps of their own for loads and products
    per_sm: int = 1  # programs per multiprocessor


# Triton 3.6 fails to compile warp specialisation for sm_100, and without it 128 x 256 spill there.
SPECIALIZES = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
LARGE_100 = (
    Config(128, 256, 64, 8, 3, tma=True, specialize=True)
    if SPECIALIZES
    else Config(128, 128, 64, 8, 3, tma=True, per_sm=2)
)

# On sm_90 no configuration has them. At 8 warps Triton 3.6 and 3.9 ignore the request. At 4 warps, BM = 128,
# they split the tile over two groups of warps, but not the host's descriptors: 3.9 fails to compile, 3.6
# copies boxes of 128 rows into buffers of 64. At BM = 64 two groups of warps both multiply the whole tile.

# (architecture, bytes per element) -> regime -> (relative rate, Config). choose() takes the regime with the
# least waves * tile size / rate. "large": most reuse, but nothing to do while it refills its pipeline and
# takes its argmax; "paired": two programs a multiprocessor, one in its epilogue while the other multiplies,
# which pays where products are short (D <= SHALLOW); "small": tiles for few positions. Chosen from compiled
# code (make kernel-report); the rates are estimates. What benchmarks/tune.py measures comes first (TUNED).
TUNING: dict[tuple[int, int], dict[str, tuple[float, Config]]] = {
    (80, 2): {
        "large": (1.0, Config(128, 128, 32, 8, 4, per_sm=2)),
        "small": (0.7, Config(64, 64, 64, 4, 3, per_sm=2)),
    },
    (80, 4): {
        "large": (1.0, Config(128, 64, 32, 4, 3)),
        "small": (0.8, Config(64, 64, 32, 4, 3)),
    },
    (90, 2): {
        "large": (1.0, Config(128, 256, 64, 8, 3, tma=True)),
        "paired": (0.95, Config(128, 128, 64, 8, 3, tma=True, per_sm=2)),
        "small": (0.7, Config(64, 128, 64, 4, 4, tma=True, per_sm=2)),
    },
    (90, 4): {
        "large": (1.0, Config(128, 128, 32, 8, 3, tma=True)),
        "small": (0.8, Config(64, 64, 32, 4, 3, tma=True, per_sm=2)),
    },
    (100, 2): {
        "large": (1.0, LARGE_100),
        "small": (0.7, Config(64, 128, 64, 4, 4, tma=True, per_sm=2)),
    },
    (100, 4): {
        "large": (1.0, Config(128, 128, 32, 8, 3, tma=True)),
        "small": (0.8, Config(64, 64, 32, 4, 3, tma=True, per_sm=2)),
    },
}
SHALLOW = 1024  # channels up to which the rate of a lone program per multiprocessor counts LONE_RATE
LONE_RATE = 0.9
TUNED = Path(__file__).with_name("vote_tuned.json")  # {"arch itemsize MxDxC": [BM, BN, ...]}
EXACT = Config(64, 64, 16, 8, 2)  # float32 without TF32, and float64: no tensor-core path worth a table
FLOAT64 = Config(32, 32, 16, 4, 2)
UPSAMPLE = {2: Config(64, 64, 64, 4, 3, per_sm=2), 4: Config(64, 64, 32, 4, 3, per_sm=2), 8: FLOAT64}
INTERPRETED = Config(32, 32, 32, 4, 1)  # small tiles: more edges in less time
COMBINE_BLOCK = 256  # positions per program of vote_combine_kernel
WIDEST_GAP = 1.25  # rows computed along, over rows wanted, up to which gaps beat a copy


def pointer_config(config: Config) -> Config:
    """The configuration where tensor descriptors cannot serve: addresses take registers, so smaller tiles."""
    if not config.tma:
        return config
    return config._replace(BM=64, BN=min(config.BN, 128), tma=False, specialize=False)


@functools.cache
def device_properties(device: torch.device) -> tuple[int, int]:
    """(architecture in the table, multiprocessors) of a CUDA device; of the interpreter's any."""
    if device.type != "cuda":
        return 90, 2
    p = torch.cuda.get_device_properties(device)
    arch = p.major * 10 + p.minor
    return (100 if arch >= 100 else 90 if arch >= 90 else 80), p.multi_processor_count


@functools.cache
def tuned() -> dict[str, Config]:
    """Configurations that were measured on a GPU, by architecture, type and shape; {} if none were."""
    return {k: Config(*v) for k, v in json.loads(TUNED.read_text()).items()} if TUNED.exists() else {}


def tuned_key(arch: int, itemsize: int, M: int, D: int, C: int) -> str:
    """Name of a product in ``tuned``."""
    return f"{arch} {itemsize} {M}x{D}x{C}"


@functools.lru_cache(maxsize=1024)
def choose(
    arch: int, multiprocessors: int, itemsize: int, exact: bool, M: int, D: int, C: int, aligned: bool
) -> tuple[Config, int]:
    """(Config, programs) for a product of M positions with C classes over D channels."""

    def tiles(config: Config) -> int:
        return triton.cdiv(M, config.BM) * triton.cdiv(C, config.BN)

    def cost(entry: tuple[float, Config]) -> float:
        rate, config = entry
        if D <= SHALLOW and config.per_sm == 1 and not config.specialize:
            rate *= LONE_RATE
        waves = triton.cdiv(tiles(config), multiprocessors * config.per_sm)
        return waves * config.per_sm * config.BM * config.BN / rate

    if itemsize == 8:
        config = FLOAT64
    elif exact:
        config = EXACT
    else:
        config = tuned().get(tuned_key(arch, itemsize, M, D, C))
        if config is None:
            config = min(TUNING[arch, itemsize].values(), key=cost)[1]
        if not aligned:
            config = pointer_config(config)
    return config, max(1, min(tiles(config), multiprocessors * config.per_sm))


# Device functions ----------------------------------------------------------------------------------

NO_CLASS = tl.constexpr(2147483647)  # the class of a position whose scores are all NaN


@triton.jit
def bias_of(bias, c, C, HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr, SCORES: tl.constexpr):
    """(BN,) bias of classes c, and NaN outside the classes: NaN never wins, and no score needs masking."""
    if HAS_BIAS:
        value = tl.load(bias + c, mask=c < C, other=float("nan")).to(SCORES)
    else:
        value = tl.zeros(c.shape, SCORES)
        if RAGGED:
            value = tl.where(c < C, value, float("nan"))
    return value


@triton.jit
def argmax_rows(scores, c, INTERPRETED: tl.constexpr):
    """Largest score of each row (-inf if all are NaN) and the lowest class that has it (NO_CLASS if all are
    NaN).

    NaN equals nothing, and max returns the other operand where one is NaN.
    """
    # NumPy would warn of rows that are all NaN.
    best = tl.max(tl.where(scores == scores, scores, -float("inf")) if INTERPRETED else scores, 1)
    winner = tl.min(tl.where(scores == best[:, None], c[None, :], NO_CLASS), 1)
    return tl.where(best == best, best, -float("inf")), winner


@triton.jit
def store_votes(votes, row, winner, M, ROWS, T, GAPS: tl.constexpr):
    """Votes of rows of the matrix; with GAPS, of each ROWS rows (an image) the first T are positions."""
    inside = row < M
    at = row
    if GAPS:
        position = row % ROWS
        inside &= position < T
        at = row // ROWS * T + position
    tl.store(votes + at, tl.where(winner == NO_CLASS, -1, winner), mask=inside)


@triton.jit
def multiply(a, w, scores, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """scores + a w^T. The interpreter would multiply the bit patterns of bfloat16."""
    if INTERPRETED and a.dtype != tl.float64:
        a, w = a.to(tl.float32), w.to(tl.float32)
    return tl.dot(a, tl.trans(w), scores, input_precision=PRECISION, out_dtype=scores.dtype)


@triton.jit
def row_tile_at(x, row, stride, k, D, V: tl.constexpr, EVEN: tl.constexpr):
    """Columns k of rows of x, whose rows begin on 16 bytes if V says so; 0 outside."""
    at = x + (row * (stride // V * V))[:, None] + k[None, :]
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=(k < D // V * V)[None, :], other=0)


# Kernels -------------------------------------------------------------------------------------------


@triton.jit
def vote_fwd_kernel(
    features,  # (M, D) rows features_stride apart; TMA: its descriptor, blocks (BM, BK)
    weight,  # (C, D) rows weight_stride apart, type of features; TMA: its descriptor, blocks (BN, BK)
    bias,  # (C,) type of features; HAS_BIAS
    votes,  # (N, T) int32; a single class tile
    best,  # (tiles, M) float32 or float64; several class tiles
    winners,  # (tiles, M) int32
    features_stride,
    weight_stride,
    M,
    C,
    D,
    ROWS,
    T,
    tiles,  # class tiles
    HAS_BIAS: tl.constexpr,
    GAPS: tl.constexpr,
    SINGLE: tl.constexpr,
    RAGGED: tl.constexpr,  # C is no multiple of BN
    EVEN: tl.constexpr,  # D is a multiple of BK
    V: tl.constexpr,  # elements per 16 bytes, or 1 where rows are not aligned
    PRECISION: tl.constexpr,
    SCORES: tl.constexpr,  # float32, or float64
    INTERPRETED: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Product and argmax of (BM positions, BN classes) tiles, one after another.

    Bytes from L2 a tile: (BM + BN) D itemsize; written: 8 BM. A thread holds BM BN / threads scores, float32.
    Per score the epilogue takes a max, a compare with select and a min.
    No two programs write the same address, and nothing is read that another wrote.
    """
    units = (M + BM - 1) // BM * tiles
    for unit in tl.range(tl.program_id(0), units, tl.num_programs(0), warp_specialize=SPECIALIZE):
        tile = unit % tiles
        first_row = unit // tiles * BM
        first_class = tile * BN
        c = first_class + tl.arange(0, BN)
        # The sum begins at the bias: added afterwards, it would cost registers that the accumulators need.
        scores = bias_of(bias, c, C, HAS_BIAS, RAGGED, SCORES)[None, :] + tl.zeros([BM, BN], SCORES)
        if TMA:
            for k in range(0, D, BK):
                a = features.load([first_row, k])
                w = weight.load([first_class, k])
                scores = multiply(a, w, scores, PRECISION, INTERPRETED)
        else:
            # Rows and classes past the end are the last again: computed, never stored, never out of bounds.
            row = tl.minimum(first_row + tl.arange(0, BM), M - 1).to(tl.int64)
            column = tl.minimum(first_class + tl.arange(0, BN), C - 1).to(tl.int64)
            for k in range(0, D, BK):
                channel = k + tl.arange(0, BK)
                a = row_tile_at(features, row, features_stride, channel, D, V, EVEN)
                w = row_tile_at(weight, column, weight_stride, channel, D, V, EVEN)
                scores = multiply(a, w, scores, PRECISION, INTERPRETED)
        top, winner = argmax_rows(scores, c, INTERPRETED)
        row = (first_row + tl.arange(0, BM)).to(tl.int64)
        if SINGLE:
            store_votes(votes, row, winner, M, ROWS, T, GAPS)
        else:
            at = tile.to(tl.int64) * M + row
            tl.store(best + at, top, mask=row < M)
            tl.store(winners + at, winner, mask=row < M)


@triton.jit
def vote_combine_kernel(
    best,  # (tiles, M) float32 or float64
    winners,  # (tiles, M) int32
    votes,  # (N, T) int32
    M,
    ROWS,
    T,
    tiles,
    GAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best class tile of each position, the first among equals; reads 8 bytes a position and tile."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -float("inf"), best.dtype.element_ty)
    winner = tl.full([BLOCK], NO_CLASS, tl.int32)
    for tile in range(0, tiles):
        at = tl.full([BLOCK], tile, tl.int64) * M + row
        score = tl.load(best + at, mask=row < M, other=-float("inf"))
        candidate = tl.load(winners + at, mask=row < M, other=NO_CLASS)
        # -inf may win, over no class; a tile of NaN has no class to send.
        wins = (candidate != NO_CLASS) & ((score > top) | (winner == NO_CLASS))
        top = tl.where(wins, score, top)
        winner = tl.where(wins, candidate, winner)
    store_votes(votes, row, winner, M, ROWS, T, GAPS)


@triton.jit
def lerp(x, end):
    """x + (end - x) / 4, as torch.lerp: inf to inf is NaN."""
    return x + 0.25 * (end - x)


@triton.jit
def vote_upsample_kernel(
    features,  # (N H W, D) rows features_stride apart
    weight,  # (C, D) rows weight_stride apart, type of features
    bias,  # (C,) type of features; HAS_BIAS
    best,  # (tiles, N 4 H W) float32 or float64
    winners,  # (tiles, N 4 H W) int32
    scratch,  # (programs, images H W, BN) type of best
    features_stride,
    weight_stride,
    N,
    C,
    D,
    H,
    W,
    images,  # per unit
    tiles,
    HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    EVEN: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    SCORES: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,
):
    """Votes of maps at twice their resolution (bilinear, align_corners=False), BN classes of some images a
    unit.

    The scores of a unit's positions go to the program's scratch, which stays in L2; each position then makes
    its four children from its nine neighbours there, rows first, edges replicated, bias last. 36 BN bytes are
    read from L2 a position, so the product's D 2 (BM + BN) / BM dominates from D of a few hundred.

    Hazards: a barrier between writing and reading the scratch, and one before the next unit writes it.
    """
    area = H * W
    rows = images * area
    M = N * area
    scratch += tl.program_id(0).to(tl.int64) * rows * BN
    units = (N + images - 1) // images * tiles
    lane = tl.arange(0, BN)[None, :]
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        tile = unit % tiles
        first_row = (unit // tiles).to(tl.int64) * rows
        c = tile * BN + tl.arange(0, BN)
        added = bias_of(bias, c, C, HAS_BIAS, RAGGED, SCORES)
        column = tl.minimum(c, C - 1).to(tl.int64)
        for m in range(0, rows, BM):
            i = m + tl.arange(0, BM)
            row = tl.minimum(first_row + i, M - 1).to(tl.int64)
            scores = tl.zeros([BM, BN], SCORES)
            for k in range(0, D, BK):
                channel = k + tl.arange(0, BK)
                a = row_tile_at(features, row, features_stride, channel, D, V, EVEN)
                w = row_tile_at(weight, column, weight_stride, channel, D, V, EVEN)
                scores = multiply(a, w, scores, PRECISION, INTERPRETED)
            tl.store(scratch + i[:, None] * BN + lane, scores, mask=(i < rows)[:, None])
        tl.debug_barrier()
        for o in range(0, rows, BO):
            i = o + tl.arange(0, BO)
            inside = (i < rows) & (first_row + i < M)
            image = i // area
            y = i % area // W
            x = i % area % W
            origin = image * area
            left = tl.maximum(x - 1, 0)
            right = tl.minimum(x + 1, W - 1)
            for dy in tl.static_range(2):
                y2 = tl.maximum(y - 1, 0) if dy == 0 else tl.minimum(y + 1, H - 1)
                here = blend_rows(scratch, origin + y * W, origin + y2 * W, x, lane, inside, BN)
                for dx in tl.static_range(2):
                    side = left if dx == 0 else right
                    there = blend_rows(scratch, origin + y * W, origin + y2 * W, side, lane, inside, BN)
                    child = lerp(here, there) + added[None, :]
                    top, winner = argmax_rows(child, c, INTERPRETED)
                    position = (2 * y + dy) * 2 * W + 2 * x + dx
                    at = (first_row + origin) * 4 + position + tile.to(tl.int64) * M * 4
                    tl.store(best + at, top, mask=inside)
                    tl.store(winners + at, winner, mask=inside)
        tl.debug_barrier()


@triton.jit
def blend_rows(scratch, row, other_row, x, lane, inside, BN: tl.constexpr):
    """(BO, BN) scores of column x, a quarter of the way from its row to another."""
    near = tl.load(scratch + (row + x)[:, None] * BN + lane, mask=inside[:, None], other=0)
    far = tl.load(scratch + (other_row + x)[:, None] * BN + lane, mask=inside[:, None], other=0)
    return lerp(near, far)


@triton.jit
def transpose_kernel(
    features,  # (N, D, T), any strides
    stride_n,
    stride_d,
    stride_t,
    out,  # (N, T, D) same type
    D,
    T,
    V: tl.constexpr,  # elements per 16 bytes if V | D, else 1
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    """Channels last. 2 itemsize bytes an element, read along positions and written along channels."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    for first in range(0, T, BT):
        t = first + tl.arange(0, BT)
        at = n * stride_n + d[:, None].to(tl.int64) * stride_d + t[None, :].to(tl.int64) * stride_t
        x = tl.load(features + at, mask=(d < D)[:, None] & (t < T)[None, :], other=0)
        at = (n * T + t[:, None]) * (D // V * V) + d[None, :]
        tl.store(out + at, tl.trans(x), mask=(t < T)[:, None] & (d < D // V * V)[None, :])


# Launchers -----------------------------------------------------------------------------------------


def position_rows(features: Tensor) -> tuple[Tensor, int, int, int, int]:
    """The positions as rows of a matrix with a fixed distance between rows, copied only if need be.

    Returns (tensor the rows lie in, distance of rows, M rows, rows per image, positions per image).
    """
    if features.dim() == 4:
        N, D, H, W = features.shape
        T = H * W
        _, stride_d, stride_h, stride_t = features.stride()
        stride_n = features.stride(0)
        dense = stride_d == 1 and (H == 1 or W == 1 or stride_h == W * stride_t)
        if W == 1:
            stride_t = stride_h
    else:
        N, T, D = features.shape
        stride_n, stride_t, stride_d = features.stride()
        dense = stride_d == 1
    if T == 1:
        stride_t = stride_n
    if dense and stride_t >= D and (N == 1 or stride_n == T * stride_t):
        return features, stride_t, N * T, T, T
    if dense and stride_t >= D and stride_n % stride_t == 0 and T <= stride_n // stride_t <= WIDEST_GAP * T:
        rows = stride_n // stride_t
        return features, stride_t, (N - 1) * rows + T, rows, T
    return channels_last(features), D, N * T, T, T


def channels_last(features: Tensor) -> Tensor:
    """(N, T, D) contiguous copy of a map or of tokens."""
    if features.dim() == 3:
        return features.contiguous()
    N, D, H, W = features.shape
    stride_n, stride_d, stride_h, stride_w = features.stride()
    if W > 1 and H > 1 and stride_h != W * stride_w:
        return features.permute(0, 2, 3, 1).reshape(N, H * W, D)
    T = H * W
    out = torch.empty((N, T, D), dtype=features.dtype, device=features.device)
    V = 16 // features.element_size()
    BT = min(64, max(16, triton.next_power_of_2(T)))
    stride_t = stride_w if W > 1 else stride_h
    args = (features, stride_n, stride_d, stride_t, out, D, T, V if D % V == 0 else 1, 64, BT)
    launch(transpose_kernel, (N, triton.cdiv(D, 64), 1), args, (features,), 4)
    return out


def precision_of(dtype: torch.dtype) -> str:
    """Precision of tl.dot: TF32 for float32 only if PyTorch's setting says so, exact otherwise."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 or dtype.itemsize == 2 else "ieee"


_SCORES = {torch.float64: (torch.float64, tl.float64)}


class Plan(NamedTuple):
    """What all calls with the same shapes, strides, types and alignment have in common."""

    launch: Launch
    combine: Launch | None  # None: a single class tile, no partial results
    copied: bool  # positions are no rows of a matrix as they stand
    blocks: tuple | None  # shape, strides and block of both tensor descriptors; None: plain pointers
    constants: tuple  # what follows the tensors in the kernel's arguments
    combine_constants: tuple
    votes: Tensor  # like the results
    best: Tensor
    winners: Tensor
    scratch: Tensor | None


def vote_fwd(features: Tensor, weight: Tensor, bias: Tensor | None, upsample: int) -> Tensor:
    """See reference.vote_fwd."""
    if weight.stride(1) != 1 or weight.stride(0) < weight.shape[1]:  # rows that overlap: no tensor descriptor
        weight = weight.contiguous()
    bias_or_weight = weight if bias is None else with_unit_stride(bias)
    precision = precision_of(features.dtype)
    key = (
        "vote", upsample, bias is None, precision, features.device,
        signature(features), signature(weight), signature(bias_or_weight),
    )  # fmt: skip
    plan = plan_cache.get(key)
    if plan is None:
        positions = features.shape[1] if features.dim() == 3 else features.shape[2] * features.shape[3]
        shape = features.shape[0], upsample * upsample * positions
        if 0 in shape:
            return torch.empty(shape, dtype=torch.int32, device=features.device)
        with device_of(features):
            plan = store_plan(key, _plan(features, weight, bias is not None, upsample, precision))
    votes = torch.empty_like(plan.votes, memory_format=torch.contiguous_format)
    with device_of(features):
        x = channels_last(features) if plan.copied else features
        _run(plan, x, weight, bias_or_weight, votes)
    return votes


def _run(plan: Plan, x: Tensor, weight: Tensor, bias: Tensor, votes: Tensor) -> None:
    best = winners = votes  # never touched with a single class tile
    if plan.combine is not None:
        best = torch.empty_like(plan.best, memory_format=torch.contiguous_format)
        winners = torch.empty_like(plan.winners, memory_format=torch.contiguous_format)
    if plan.blocks is not None:
        x, weight = (TensorDescriptor(y, *block) for y, block in zip((x, weight), plan.blocks, strict=True))
    if plan.scratch is not None:
        scratch = torch.empty_like(plan.scratch, memory_format=torch.contiguous_format)
        plan.launch(x, weight, bias, best, winners, scratch, *plan.constants)
    else:
        plan.launch(x, weight, bias, votes, best, winners, *plan.constants)
    if plan.combine is not None:
        plan.combine(best, winners, votes, *plan.combine_constants)


def _plan(features: Tensor, weight: Tensor, has_bias: bool, upsample: int, precision: str) -> Plan:
    x, stride, M, rows, T = position_rows(features)
    C, D = weight.shape
    if upsample == 2:
        if rows != T:
            x, stride = channels_last(features), D
        N, _, H, W = features.shape
        plan = _upsampled(x, stride, N, H, W, weight, has_bias, precision)
    else:
        V, tma = _alignment(x, stride, weight, D)
        arch, multiprocessors = device_properties(x.device)
        exact = precision == "ieee"
        config, programs = choose(arch, multiprocessors, x.element_size(), exact, M, D, C, tma)
        if INTERPRET:
            config = INTERPRETED._replace(tma=config.tma)
            programs = min(3, triton.cdiv(M, config.BM))
        plan = _product(x, stride, M, rows, T, weight, has_bias, config, programs, V, precision)
    votes = template((features.shape[0], upsample * upsample * T), torch.int32, x.device)
    return plan._replace(copied=x is not features, votes=votes)


def _alignment(x: Tensor, stride: int, weight: Tensor, D: int) -> tuple[int, bool]:
    """(V, whether tensor descriptors can serve) for rows of ``x`` and ``weight``."""
    V = 16 // x.element_size()
    bases = x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    rows = stride % V == 0 and (weight.stride(0) % V == 0 or weight.shape[0] == 1)
    return (V if rows and D % V == 0 else 1), bases and rows


def _product(
    x: Tensor, stride: int, M: int, rows: int, T: int, weight: Tensor, has_bias: bool, config: Config,
    programs: int, V: int, precision: str,
) -> Plan:  # fmt: skip
    """A product in a given configuration, and the launch that combines its class tiles."""
    C, D = weight.shape
    BM, BN, BK = config.BM, config.BN, config.BK
    scores, tl_scores = _SCORES.get(x.dtype, (torch.float32, tl.float32))
    tiles = triton.cdiv(C, BN)
    constants = (
        stride, weight.stride(0), M, C, D, rows, T, tiles, has_bias, rows != T, tiles == 1,
        C % BN != 0, D % BK == 0, V, precision, tl_scores, INTERPRET,
        config.tma, config.specialize, BM, BN, BK,
    )  # fmt: skip
    blocks = None
    if config.tma:
        blocks = (([M, D], [stride, 1], [BM, BK]), ([C, D], [weight.stride(0), 1], [BN, BK]))
    launch = Launch(vote_fwd_kernel, (programs, 1, 1), config.warps, config.stages)
    return _combined(x, scores, launch, blocks, constants, M, rows, T, tiles, None)


def _combined(
    x: Tensor, scores: torch.dtype, launch: Launch, blocks: tuple | None, constants: tuple, M: int,
    rows: int, T: int, tiles: int, scratch: Tensor | None,
) -> Plan:  # fmt: skip
    """The plan with templates of what it allocates, which hold no memory, but for ``votes``."""
    winners, best = template((tiles, M), torch.int32, x.device), template((tiles, M), scores, x.device)
    combine = None
    if tiles > 1 or scratch is not None:
        combine = Launch(vote_combine_kernel, (triton.cdiv(M, COMBINE_BLOCK), 1, 1), 4)
    combine_constants = (M, rows, T, tiles, rows != T, COMBINE_BLOCK)
    return Plan(launch, combine, False, blocks, constants, combine_constants, winners, best, winners, scratch)


def _upsampled(
    x: Tensor, stride: int, N: int, H: int, W: int, weight: Tensor, has_bias: bool, precision: str
) -> Plan:
    """Votes of N maps (H, W) at twice their resolution."""
    C, D = weight.shape
    area = H * W
    V, _ = _alignment(x, stride, weight, D)
    _, multiprocessors = device_properties(x.device)
    config = INTERPRETED if INTERPRET else UPSAMPLE[x.element_size()]
    scores, tl_scores = _SCORES.get(x.dtype, (torch.float32, tl.float32))
    tiles = triton.cdiv(C, config.BN)
    images = max(1, config.BM // area)
    units = triton.cdiv(N, images) * tiles
    programs = min(units, multiprocessors * config.per_sm)
    constants = (
        stride, weight.stride(0), N, C, D, H, W, images, tiles, has_bias, C % config.BN != 0,
        D % config.BK == 0, V, precision, tl_scores, INTERPRET, config.BM, config.BN, config.BK, 32,
    )  # fmt: skip
    launch = Launch(vote_upsample_kernel, (programs, 1, 1), config.warps, config.stages)
    scratch = template((programs, images * area, config.BN), scores, x.device)
    return _combined(x, scores, launch, None, constants, N * area * 4, area * 4, area * 4, tiles, scratch)
