"""The vote kernels of csrc/cuda, run on the CPU: one fiber per CUDA thread.

simulator.py compiles the unchanged launchers and kernels; tests/cuda_sim/ptx_on_cpu.h writes out cp.async,
ldmatrix, mma.sync, mbarriers, TMA and wgmma from the PTX ISA's description. Integers small enough make every
score exact, so votes compare bit by bit with reference.py, ties included. Kernels with one planted fault each
show what the simulator catches.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import WGMMA_SHAPES
from simulator import GXX, KERNELS, compiled, copy_sources, plant

from zipfls_cuda import reference

pytestmark = pytest.mark.skipif(GXX is None, reason="no g++ to compile the CUDA kernels for the CPU with")

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # VoteType
PLANNED, MMA, MMA_FEW, MMA_MAP, MMA_PATCH, WIDE, NARROW = range(-1, 6)  # Kernel
K_MAJOR, MN_MAJOR, PACKED = range(3)  # Layout
SCHEDULES = {  # order of warps, asynchronous operations as late as possible, seed
    "ascending late": (0, 1, 0),
    "descending early": (1, 0, 1),
    "random late": (2, 1, 2),
}


FIELDS = [
    "type",
    "features",
    "N",
    "H",
    "W",
    "D",
    "stride_n",
    "stride_h",
    "stride_w",
    "stride_d",
    "weight",
    "C",
]
FIELDS += [
    "weight_stride_c",
    "weight_stride_d",
    "bias",
    "bias_stride",
    "upsample",
    "votes",
    "multiprocessors",
]
FIELDS += ["wgmma", "kernel", "images", "order", "late", "seed"]


class Call(ctypes.Structure):
    """One call; vote_driver.cpp has the same."""

    _fields_ = [
        (name, ctypes.c_void_p if name in ("features", "weight", "bias", "votes") else ctypes.c_int64)
        for name in FIELDS
    ]


def load(library: Path) -> ctypes.CDLL:
    driver = ctypes.CDLL(str(library))
    driver.vote_message.restype = driver.vote_journal.restype = ctypes.c_char_p
    return driver


@pytest.fixture(scope="session")
def driver() -> ctypes.CDLL:
    return load(compiled("vote"))


class MachineError(AssertionError):
    """What the simulator reports."""


def call_of(
    features, weight, bias, upsample, votes, multiprocessors, wgmma, kernel, images, schedule
) -> Call:
    is_map = features.dim() == 4
    N, D = features.shape[0], features.shape[1 if is_map else 2]
    H, W = features.shape[2:] if is_map else (1, features.shape[1])
    strides = features.stride()
    n, d, h, w = strides if is_map else (strides[0], strides[2], 0, strides[1])
    bias_at, bias_stride = (None, 0) if bias is None else (bias.data_ptr(), bias.stride(0))
    return Call(
        TYPES[features.dtype], features.data_ptr(), N, H, W, D, n, h, w, d,
        weight.data_ptr(), weight.shape[0], *weight.stride(), bias_at, bias_stride,
        upsample, votes.data_ptr(), multiprocessors, wgmma, kernel, images, *schedule,
    )  # fmt: skip


def positions(features: torch.Tensor, upsample: int = 1) -> int:
    count = features.shape[2] * features.shape[3] if features.dim() == 4 else features.shape[1]
    return count * upsample * upsample


def run(
    driver, features, weight, bias=None, upsample=1, *, kernel=PLANNED, images=-1, multiprocessors=4, wgmma=0,
    schedule="ascending late",
):  # fmt: skip
    """Votes by the kernels, and the journal of launches."""
    votes = torch.full((features.shape[0], positions(features, upsample)), -77, dtype=torch.int32)
    schedule = SCHEDULES.get(schedule, schedule)
    call = call_of(features, weight, bias, upsample, votes, multiprocessors, wgmma, kernel, images, schedule)
    if driver.vote_run(ctypes.byref(call)):
        raise MachineError(driver.vote_message().decode())
    return votes, driver.vote_journal().decode()


def plan(driver, N, D, side, C, dtype=torch.bfloat16, upsample=1, *, nchw=False, wgmma=1) -> dict[str, int]:
    """What a GPU of 132 multiprocessors would run for (N, D, side, side) features; nothing is allocated."""
    P, somewhere = side * side, 1 << 20
    strides = (P * D, side, 1, P) if nchw else (P * D, side * D, D, 1)
    call = Call(
        TYPES[dtype], somewhere, N, side, side, D, *strides, somewhere, C, D, 1, None, 0, upsample, somewhere,
        132, wgmma, PLANNED, -1, 0, 0, 0,
    )  # fmt: skip
    out = (ctypes.c_int64 * 8)()
    driver.vote_plan(ctypes.byref(call), out)
    names = ("kernel", "layout", "pack_weight", "images", "tiles", "tiles_n", "splits", "bytes")
    return dict(zip(names, out, strict=True))


def integers(*shape, dtype, seed, largest=3):
    """Small integers: products and their sums are exact in every type."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=g).to(dtype)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides that starts on 16 bytes."""
    size = x.element_size()
    storage = torch.zeros(x.untyped_storage().nbytes() // size + 16, dtype=x.dtype)
    skip = (-storage.data_ptr() % 16) // size
    out = storage.as_strided(x.shape, x.stride(), skip)
    return out.copy_(x)


def maps(N, D, H, W, dtype, seed=0, channels_last=True):
    x = integers(N, D, H, W, dtype=dtype, seed=seed)
    return aligned(x.to(memory_format=torch.channels_last) if channels_last else x)


LIBC = ctypes.CDLL(None)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, on 16 bytes, right before a page that may not be read."""
    count = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    used = count * x.element_size()
    pages = -(-used // 4096)
    base = LIBC.mmap(None, (pages + 1) * 4096, 3, 0x22, -1, 0)  # read, write; private, anonymous
    assert LIBC.mprotect(base + pages * 4096, 4096, 0) == 0
    start = base + pages * 4096 - used
    memory = (ctypes.c_char * used).from_address(start - start % 16)
    return torch.frombuffer(memory, dtype=x.dtype, count=count).as_strided(x.shape, x.stride()).copy_(x)


def check(driver, features, weight, bias=None, upsample=1, **how):
    votes, journal = run(driver, features, weight, bias, upsample, **how)
    assert torch.equal(votes, reference.vote_fwd(features, weight, bias, upsample)), journal
    return journal


# The kernels, whole ---------------------------------------------------------------------------------

KERNEL_NAMES = {MMA: "mma 128", MMA_FEW: "mma 64", WIDE: "wgmma wide", NARROW: "wgmma narrow"}
SHAPES = [  # N, D, H, W, C; 4 or 6 stages of 16 to 64 channels
    (1, 8, 1, 1, 2),
    (3, 72, 7, 7, 200),
    (2, 520, 5, 13, 40),  # deeper than the stages
    (7, 40, 7, 7, 600),  # several tiles a block, both ways
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNEL_NAMES, ids=KERNEL_NAMES.get)
def test_vote_kernels_exact(driver, kernel, dtype, schedule):
    for seed, (N, D, H, W, C) in enumerate(SHAPES):
        features = maps(N, D, H, W, dtype, seed)
        weight, bias = aligned(integers(C, D, dtype=dtype, seed=1)), integers(C, dtype=dtype, seed=2)
        how = {"kernel": kernel, "schedule": schedule, "multiprocessors": 2}
        assert KERNEL_NAMES[kernel] in check(driver, features, weight, bias, **how)
    check(driver, features, weight, None, **how)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_vote_upsampled_exact(driver, dtype, schedule):
    for seed, (H, W, C, channels_last) in enumerate(
        [
            (4, 4, 150, True),
            (1, 3, 20, True),
            (7, 7, 20, True),
            (9, 13, 70, True),
            (8, 2, 130, False),
            (2, 70, 9, True),
        ]
    ):
        features = maps(3, 40, H, W, dtype, seed, channels_last)
        weight, bias = aligned(integers(C, 40, dtype=dtype, seed=1)), integers(C, dtype=dtype, seed=2)
        check(driver, features, weight, bias, 2, schedule=schedule)


@pytest.mark.parametrize("wgmma", [0, 1], ids=["mma", "wgmma"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_vote_layouts(driver, dtype, wgmma):
    """Every layout gives the votes of its contiguous copy; the journal shows whether it was packed."""
    weight, bias = aligned(integers(70, 24, dtype=dtype, seed=1)), integers(70, dtype=dtype, seed=2)
    half = dtype != torch.float32
    kernel = NARROW if wgmma else PLANNED

    def taken(features, upsample=1, weight=weight, bias=bias, **how):
        return check(driver, features, weight, bias, upsample, wgmma=wgmma, **how)

    tokens = aligned(integers(3, 18, 24, dtype=dtype, seed=3))
    assert "pack" not in taken(tokens, kernel=kernel)
    assert "pack" not in taken(tokens[:, 1:], kernel=kernel)  # without the class token: rows in between
    assert "pack" in taken(tokens[:, 9:], kernel=kernel)  # too many of them
    assert "pack" not in taken(tokens[:1, 9:], kernel=kernel)
    assert "pack" in taken(tokens[:1].expand(3, -1, -1), kernel=kernel)
    assert "pack" in taken(tokens[:, :, 1:], weight=weight[:, 1:], kernel=kernel)  # misaligned
    assert "pack" not in taken(aligned(tokens.repeat(1, 1, 2))[:, :, :24], kernel=kernel)
    assert "pack" not in taken(tokens[:, :, :17], weight=weight[:, :17], kernel=kernel)  # a ragged end
    assert "pack" in taken(aligned(tokens.transpose(1, 2).contiguous()).transpose(1, 2), kernel=kernel)

    last = maps(3, 24, 4, 4, dtype)
    first = maps(3, 24, 4, 4, dtype, channels_last=False)
    assert "pack" not in taken(last)
    assert ("nchw" if half else "pack") in taken(first)
    assert ("nchw" if half else "pack") in taken(first, 2)
    assert "pack" in taken(maps(3, 24, 5, 5, dtype, channels_last=False))
    assert "pack" in taken(maps(3, 24, 5, 5, dtype, channels_last=False), 2)
    for D, H, W in [(24, 5, 5), (72, 7, 7), (16, 14, 14), (8, 1, 1), (64, 2, 3), (200, 1, 9)]:
        journal = taken(
            maps(3, D, H, W, dtype, channels_last=False),
            weight=aligned(integers(70, D, dtype=dtype, seed=5)),
            kernel=kernel,
        )
        assert ("slabs" in journal) == (half and H * W > 1), (D, H, W, journal)
    odd = maps(3, 20, 7, 7, dtype, channels_last=False)  # half a group of channels
    assert "slabs" not in taken(odd, weight=aligned(integers(70, 20, dtype=dtype, seed=5)))
    assert "slabs" not in taken(maps(3, 24, 15, 15, dtype, channels_last=False))  # too many positions
    assert "pack" in taken(maps(2, 24, 10, 8, dtype, channels_last=False), 2)  # patches have borders
    assert "pack" not in taken(maps(3, 24, 5, 5, dtype)[:, :, 1:4, ::2], 2)  # rows anywhere
    assert "pack" in taken(maps(3, 24, 5, 5, dtype)[:, :, 1:4, ::2])
    assert "pack" not in taken(
        aligned(last[:1].contiguous(memory_format=torch.channels_last)).expand(3, -1, -1, -1), 2
    )
    packed = maps(5, 24, 5, 5, dtype, channels_last=False)
    assert taken(packed, images=2, kernel=kernel).count("pack") == 3  # rounds
    many, bias300 = aligned(integers(300, 24, dtype=dtype, seed=6)), integers(300, dtype=dtype, seed=7)
    maps7 = maps(5, 24, 7, 7, dtype, channels_last=False)
    for images in (4, 3):  # the last round is smaller, and splits its classes where the others do not
        journal = taken(maps7, 2, weight=many, bias=bias300, images=images, multiprocessors=2)
        assert journal.count("pack") == 2

    assert "pack" in taken(tokens, weight=aligned(weight.t().contiguous()).t(), kernel=kernel)
    assert "pack" in taken(tokens, weight=torch.stack([weight, weight], -1)[..., 0], kernel=kernel)
    taken(tokens, bias=torch.stack([bias, bias], -1)[..., 0], kernel=kernel)
    assert "pack" in taken(tokens, weight=weight[:1].expand(70, -1), kernel=kernel)  # rows that overlap
    overlapping = aligned(tokens.flatten()[: 24 + 8 * 17][None])[0].as_strided((1, 18, 24), (160, 8, 1))
    assert ("pack" in taken(overlapping, kernel=kernel)) == bool(wgmma)
    one = aligned(integers(4, 1, 3, 3, dtype=dtype, seed=4))
    taken(one, weight=aligned(integers(70, 1, dtype=dtype, seed=5)))
    taken(torch.zeros(2, 0, 3, 3, dtype=dtype), weight=torch.zeros(70, 0, dtype=dtype))
    taken(torch.zeros(2, 0, 3, 3, dtype=dtype), 2, weight=torch.zeros(70, 0, dtype=dtype))


def random_features(pick, dtype, seed):
    """A map or tokens of any size and layout."""
    N, D = pick([1, 2, 3, 5]), pick([1, 3, 8, 17, 24, 40, 64, 96, 130, 264])
    H, W = pick([(1, 1), (2, 4), (3, 3), (8, 8), (7, 7), (1, 16), (5, 9), (12, 12), (3, 40)])
    kind = pick(["last", "first", "tokens", "slice", "pad", "strided"])
    if kind in ("last", "first"):
        return maps(N, D, H, W, dtype, seed, channels_last=kind == "last")
    skip = pick([0, 1, 2]) if kind == "slice" else 0
    if kind in ("tokens", "slice"):
        return integers(N, H * W + skip, D, dtype=dtype, seed=seed)[:, skip:]
    if kind == "pad":
        return integers(N, H, W, D + pick([1, 4, 8]), dtype=dtype, seed=seed)[..., :D].permute(0, 3, 1, 2)
    return integers(N, 2 * H, W + 1, D, dtype=dtype, seed=seed)[:, ::2, 1:].permute(0, 3, 1, 2)


@pytest.mark.parametrize("first", range(0, 80, 20))
def test_vote_random_problems(driver, first):
    """Any sizes, layouts, kernels and schedules; a read past the end of an input is a crash."""
    for seed in range(first, first + 20):
        pick = random.Random(seed).choice
        dtype = pick(list(TYPES))
        features = guarded(random_features(pick, dtype, seed))
        D = features.shape[1 if features.dim() == 4 else 2]
        C = pick([2, 9, 100, 127, 128, 129, 257, 300, 520])
        weight = guarded(integers(C, D, dtype=dtype, seed=1))
        if pick([False, False, True]):
            weight = guarded(weight.t().contiguous()).t()
        bias = pick([None, guarded(integers(C, dtype=dtype, seed=2))])
        upsample = pick([1, 1, 2]) if features.dim() == 4 else 1
        kernel = PLANNED if upsample == 2 else pick([PLANNED, MMA, MMA_FEW])
        how = {"kernel": kernel, "schedule": (pick(range(3)), pick(range(2)), seed)}
        how |= {"multiprocessors": pick([1, 2, 3, 8]), "wgmma": 0}
        journal = check(driver, features, weight, bias, upsample, **how)
        if upsample == 1 and "nchw" not in journal:
            check(driver, features, weight, bias, **{**how, "kernel": pick([WIDE, NARROW]), "wgmma": 1})


@pytest.mark.parametrize("kernel", [MMA, MMA_FEW, MMA_MAP, WIDE, NARROW])
def test_vote_ties_nan_and_infinities(driver, kernel):
    """The lowest class among equal scores; NaN never wins; minus infinity may; -1 where all are NaN."""
    upsample = 2 if kernel == MMA_MAP else 1
    dtype = torch.bfloat16
    features = maps(4, 16, 4, 4, dtype, 1)
    features[1, :, 2, 1] = torch.nan
    features[2, 3, 1, 1] = torch.inf
    features[3, 3, 1, 1] = -torch.inf
    weight = aligned(integers(300, 16, dtype=dtype, seed=2, largest=1))  # many ties
    g = torch.Generator().manual_seed(3)
    for bias in (
        None,
        torch.full((300,), -torch.inf),
        torch.full((300,), torch.nan),
        torch.full((300,), -torch.inf).index_fill_(0, torch.tensor([0, 7, 299]), torch.nan),
        torch.tensor([0.0, 1.0, -torch.inf, torch.nan, torch.inf])[torch.randint(0, 5, (300,), generator=g)],
        torch.tensor([0.0, 1.0, -torch.inf, torch.nan])[torch.randint(0, 4, (300,), generator=g)],
        torch.full((300,), torch.nan).index_fill_(0, torch.tensor([131, 260]), -torch.inf),
        torch.full((300,), torch.nan).index_fill_(0, torch.tensor([255, 256]), 0.0),
    ):
        bias = None if bias is None else bias.to(dtype)
        check(driver, features, weight, bias, upsample, kernel=kernel)
    check(driver, features, aligned(torch.zeros_like(weight)), None, upsample, kernel=kernel)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_vote_real_numbers(driver, dtype):
    """Scores of real numbers: a vote misses the best exact score by no more than rounding."""
    g = torch.Generator().manual_seed(0)
    features = aligned(torch.randn(2, 200, 5, 5, generator=g).to(dtype, memory_format=torch.channels_last))
    weight = aligned(torch.randn(150, 200, generator=g).to(dtype))
    scores = features.double().flatten(2).transpose(1, 2) @ weight.double().t()
    for kernel in (MMA, NARROW):
        votes, _ = run(driver, features, weight, kernel=kernel)
        chosen = scores.gather(-1, votes.long()[..., None])[..., 0]
        # wgmma reads float32 as it is: unless TMA rounds, the last bits are cut off.
        margin = (
            200**0.5 * 8 * (2.0**-24 if dtype != torch.float32 else 2.0**-11 if kernel == MMA else 2.0**-10)
        )
        assert (scores.amax(-1) - chosen <= margin).all()


def test_vote_repeats_bitwise(driver):
    """Whatever the order of threads and copies, the votes are the same."""
    g = torch.Generator().manual_seed(0)
    features = aligned(
        torch.randn(3, 100, 7, 7, generator=g).bfloat16().to(memory_format=torch.channels_last)
    )
    weight = aligned(torch.randn(300, 104, generator=g).bfloat16())[:, :100]
    for kernel in (MMA, WIDE):
        seen = [run(driver, features, weight, kernel=kernel, schedule=s)[0] for s in SCHEDULES.values()]
        assert all(torch.equal(seen[0], other) for other in seen[1:])


# The parts ------------------------------------------------------------------------------------------


def test_vote_tile_order_visits_every_tile_once(driver):
    for down, across, group in [(1, 1, 1), (7, 3, 2), (5, 4, 16), (16, 1, 5), (33, 40, 16)]:
        out = torch.empty(down * across, 2, dtype=torch.int64)
        driver.vote_tiles(
            ctypes.c_int64(down), across, ctypes.c_int64(group), ctypes.c_void_p(out.data_ptr())
        )
        assert set(map(tuple, out.tolist())) == {(d, a) for d in range(down) for a in range(across)}
        assert len(out.unique(dim=0)) == down * across
        walk = (out[:, 0] // group).tolist()
        assert walk == sorted(walk)  # a group's rows are finished before the next one's


@pytest.mark.parametrize("rows", [64, 128])
def test_vote_patches_cover_every_map(driver, rows):
    sizes = [(H, W) for H in range(1, 20) for W in range(1, 20)] + [
        (1, 500),
        (300, 1),
        (2, 90),
        (33, 47),
        (64, 64),
    ]
    for H, W in sizes:
        votes = torch.zeros(3, 4 * H * W, dtype=torch.int32)
        at = ctypes.c_void_p(votes.data_ptr())
        assert driver.vote_patches(ctypes.c_int64(3), H, W, rows, at) == 0, (H, W)
        assert (votes == 1).all(), (H, W)


@pytest.mark.parametrize("blocks", [4, 8, 16, 32])
def test_vote_fragments(driver, blocks):
    """The argmax over accumulators of 16 rows, with everything that can be in a score."""
    g = torch.Generator().manual_seed(blocks)
    choices = torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0, -torch.inf, torch.nan, torch.inf])
    out = torch.empty(16, dtype=torch.int32)
    for trial in range(120):
        few = choices[: 2 + trial % 7]
        scores = few[torch.randint(0, len(few), (16, 8 * blocks), generator=g)].contiguous()
        if trial % 3 == 0:  # mostly nothing
            keep = torch.rand(16, 8 * blocks, generator=g) < 0.02
            scores = torch.where(keep, scores, torch.nan if trial % 2 else -torch.inf)
        bias = torch.randint(-1, 2, (8 * blocks,), generator=g).float()
        bias[8 * blocks - trial % (8 * blocks) :] = torch.nan  # past the last class
        pointers = (ctypes.c_void_p(x.data_ptr()) for x in (scores, bias))
        assert driver.vote_fragment(blocks, *pointers, 1000, ctypes.c_void_p(out.data_ptr())) == 0
        expected = reference.argmax_lowest(scores + bias)
        assert torch.equal(out, torch.where(expected >= 0, expected + 1000, -1))


def test_vote_float16_widens_exactly(driver):
    out = torch.empty(65536)
    driver.vote_widen(ctypes.c_void_p(out.data_ptr()))
    expected = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    assert torch.equal(out.nan_to_num(7e9), expected.nan_to_num(7e9))
    assert torch.equal(out.signbit()[~out.isnan()], expected.signbit()[~out.isnan()])


def test_vote_comparison_is_an_order(driver):
    """argmax_combine(): the same winner whichever pair comes first, so that splits combine in any order."""
    scores = torch.tensor(
        [-torch.inf, -torch.inf, -1.0, 0.0, -0.0, 0.0, 1.0, torch.inf, torch.inf, torch.nan, 5.0]
    )
    indices = torch.tensor([4, 2, 3, 9, 8, 10, 1, 12, 11, -1, -1], dtype=torch.int32)
    n = len(scores)
    out = torch.empty(n, n, dtype=torch.int32)
    driver.vote_argmax_combine(n, *(ctypes.c_void_p(x.data_ptr()) for x in (scores, indices, out)))
    assert torch.equal(out, out.t())
    rank = {4: 2, 2: 1, 3: 0}  # -1.0 beats both -inf, of which the lower class wins
    assert out[0, 1] == 2
    assert out[0, 2] == out[1, 2] == 3
    assert rank[3] == 0
    assert out[3, 4] == 8  # 0.0 equals -0.0
    assert out[7, 8] == 11
    assert out[0, 9] == 4
    assert out[9, 10] == -1


MIB = 1 << 20


def test_vote_plans(driver):
    """Kernels, tiles and memory at the shapes that matter: ImageNet, ViT, iNat21, CIFAR-100."""
    resnet50 = plan(driver, 256, 2048, 7, 1000)
    assert (resnet50["kernel"], resnet50["layout"], resnet50["pack_weight"]) == (WIDE, K_MAJOR, 0)
    assert (resnet50["tiles"], resnet50["tiles_n"]) == (98, 4)  # 2.97 waves of 132
    assert resnet50["bytes"] <= 0.5 * MIB
    assert plan(driver, 256, 768, 14, 1000)["kernel"] == WIDE
    inat = plan(driver, 256, 2048, 7, 10000)
    assert inat["kernel"] == WIDE
    assert inat["bytes"] <= 4 * MIB
    assert plan(driver, 256, 2048, 7, 10000, wgmma=0)["bytes"] <= 4 * MIB  # any other GPU
    for D, side in ((512, 4), (256, 8)):
        cifar = plan(driver, 128, D, side, 100, upsample=2)
        assert (cifar["kernel"], cifar["splits"], cifar["bytes"]) == (MMA_MAP, 1, 0)  # one launch
        assert plan(driver, 128, D, side, 100, upsample=2, nchw=True)["layout"] == MN_MAJOR
    assert plan(driver, 128, 256, 8, 100)["kernel"] == NARROW
    assert plan(driver, 32, 256, 14, 1000, upsample=2)["kernel"] == MMA_PATCH
    # NCHW: 98 bytes from channel to channel are packed, a bounded part of the batch at a time.
    packed = plan(driver, 256, 2048, 7, 1000, nchw=True)
    assert (packed["kernel"], packed["layout"], packed["images"]) == (WIDE, PACKED, 256)
    large = plan(driver, 1024, 10000, 16, 1000, torch.float32, nchw=True)  # 2.6e9 elements
    assert large["layout"] == PACKED
    assert large["images"] < 1024
    assert large["bytes"] <= 80 * MIB
    huge = plan(driver, 1 << 20, 2048, 64, 1000)  # rows beyond TMA's coordinates
    assert huge["kernel"] == MMA
    assert huge["bytes"] == 8 * (1 << 20) * 64 * 64 * huge["splits"]


def test_shapes_for_a_gpu_take_the_wgmma_kernels(driver):
    """On an H200, all types and layouts of what tests on a GPU compare with exact scores."""
    for (N, D, H, W, C), kernel in WGMMA_SHAPES.items():
        assert H == W
        for dtype, nchw in itertools.product(TYPES, (False, True)):
            chosen = plan(driver, N, D, H, C, dtype, nchw=nchw)["kernel"]
            mn_major = nchw and dtype != torch.float32 and H * W % 8 == 0 and C <= 512
            wanted = {"wide": WIDE, "narrow": NARROW}[kernel]
            assert mn_major or chosen == wanted, (N, D, H, C, dtype, nchw)


# What the simulator catches ---------------------------------------------------------------------------

SM80, SM90 = "vote_mma_sm80.cuh", "vote_wgmma_sm90.cuh"
LAYOUT, EPILOGUE = "vote_layout.cuh", "vote_epilogue.cuh"
END = "  if constexpr (Config::kCluster > 1) ptx::cluster_sync();\n}"
FAULTS = {  # name -> file, what stands there, what instead
    "no barrier between copies and products": (
        SM80,
        "ptx::block_sync();\n    start_next();",
        "start_next();",
    ),
    "waits for one group of copies too few": (
        SM80,
        "cp_async_wait_group<kMmaStages - 2>",
        "cp_async_wait_group<kMmaStages - 1>",
    ),
    "no barrier between scores and neighbours": (
        SM80,
        "warp_class);\n      ptx::block_sync();",
        "warp_class);",
    ),
    "one swizzle less": (LAYOUT, "((chunk ^ ((row >> 1) & 3)) << 4)", "(chunk << 4)"),
    "ties to the highest class": (
        LAYOUT,
        "challenger.index < holder.index",
        "challenger.index > holder.index",
    ),
    "searched from the wrong end": (EPILOGUE, "block = here ? 8", "block = here && block < 0 ? 8"),
    "a stage released before its products are done": (SM90, "ptx::wgmma_wait_group<1>();", ""),
    "wrong parity of an empty stage": (SM90, "state.phase ^ 1", "state.phase"),
    "the other block's arrivals not counted": (SM90, "Config::kCluster * Config::kConsumers * 4", "8"),
    "bytes of half a stage announced": (SM90, "Config::kFullStageBytes);", "Config::kFullStageBytes / 2);"),
    "both halves of the classes alike": (SM90, "static_cast<int32_t>(rank) * Config::kBoxRows", "0"),
    "one buffer for the biases of all tiles": (SM90, "    turn ^= 1;\n", ""),
    "a block leaves its cluster early": (SM90, END, "}"),
    "arrives before the other lanes have stored": (
        EPILOGUE,
        "  ptx::warp_sync();\n  return lane",
        "  return lane",
    ),
    "arrives without having stored": (EPILOGUE, "ptx::st_global_cg_8(", "if (false) ptx::st_global_cg_8("),
    "combined by the last but one": (EPILOGUE, "results.splits) - 1;\n  if", "results.splits) - 2;\n  if"),
    "a warp increments another warp's counter": (
        SM90,
        "(args.results, stored / 16, lane);",
        "(args.results, stored / 32, lane);",
    ),
    "a block's warps increment one counter": (SM80, "tile * kWarps + warp, lane", "tile * kWarps, lane"),
    "no arrival for the last tile": (
        SM90,
        "  if (stored >= 0 && arrive_is_last(args.results, arrive(",
        "  if (false && arrive_is_last(args.results, arrive(",
    ),
}


# What a fault's file is exercised by: kernel, channels (more than the stages hold), classes, upsample.
EXERCISES = {SM80: [(MMA, 200, 300, 1), (MMA_MAP, 200, 150, 2)], SM90: [(WIDE, 320, 600, 1)]}


def survives(driver, exercises) -> bool:
    """Whether a few calls go well, under several orders of threads and copies."""
    for schedule in [*SCHEDULES.values(), (2, 0, 5), (2, 1, 6), (2, 1, 3), (2, 0, 8)]:
        for kernel, D, C, upsample in exercises:
            features = maps(2 if upsample == 2 else 7, D, 7, 7, torch.bfloat16)
            weight, bias = (
                integers(*n, dtype=torch.bfloat16, seed=len(n), largest=9) for n in ((C, D), (C,))
            )
            how = {"kernel": kernel, "schedule": schedule, "multiprocessors": 2}
            try:
                check(driver, features, aligned(weight), bias, upsample, **how)
                if schedule == SCHEDULES["ascending late"]:
                    check(
                        driver, features[:1], aligned(torch.zeros_like(weight)), None, upsample, **how
                    )  # ties
            except AssertionError:  # wrong votes, or a MachineError
                return False
    return True


# Planted by `make test`, one of each kind: barriers, waits, addresses, ties, search, counters, clusters.
QUICK = {
    "no barrier between copies and products",
    "one swizzle less",
    "ties to the highest class",
    "searched from the wrong end",
    "a stage released before its products are done",
    "both halves of the classes alike",
    "a block leaves its cluster early",
    "arrives before the other lanes have stored",
    "a warp increments another warp's counter",
}


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.slow]) for f in FAULTS]
)
def test_vote_planted_fault_is_caught(tmp_path, fault):
    exercises = EXERCISES.get(FAULTS[fault][0], EXERCISES[SM80])
    kernels = sum(1 << kernel for kernel, *_ in exercises)
    root = copy_sources(tmp_path)
    plant(root, *FAULTS[fault])
    library = compiled("vote", "plain", root, (f"-DZIPFLS_VOTE_KERNELS={kernels}",))
    assert not survives(load(library), exercises)


@pytest.mark.parametrize("file", [SM80, SM90])
def test_vote_without_a_fault_survives(driver, file):
    assert survives(driver, EXERCISES[file])


# What nvcc makes of them ------------------------------------------------------------------------------

NVCC = shutil.which("nvcc")


def cuobjdump() -> Path | None:
    """NVIDIA's disassembler driver, from the toolkit or from Triton's package."""
    spec = importlib.util.find_spec("triton")
    bundled = [] if spec is None else [Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"]
    found = [Path(p) for p in (shutil.which("cuobjdump"),) if p] + [p for p in bundled if p.exists()]
    return found[0] if found else None


@pytest.mark.skipif(NVCC is None, reason="no nvcc to compile the CUDA kernels with")
@pytest.mark.skipif(
    cuobjdump() is None, reason="no cuobjdump (CUDA toolkit or Triton) to look at machine code with"
)
@pytest.mark.parametrize(
    ("file", "arch", "kernels", "wanted"),
    [
        pytest.param(
            "vote_mma_sm80",
            "80",
            18,
            ("HMMA.", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"),
            marks=pytest.mark.slow,
        ),
        ("vote_wgmma_sm90", "90a", 6, ("HGMMA.64x", "UTMALDG.2D", "SYNCS.PHASECHK", "USETMAXREG")),
    ],
)
def test_vote_machine_code(tmp_path, file, arch, kernels, wanted):
    """No spills, and the instructions that each kernel is written for."""
    cubin = tmp_path / f"{file}.cubin"
    target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", str(KERNELS / f"{file}.cu")]
    subprocess.run(
        [NVCC, "-std=c++17", "-O3", "-Werror", "all-warnings", "-cubin", *target, "-o", str(cubin)],
        check=True,
    )
    look = [str(cuobjdump()), str(cubin)]
    usage = subprocess.run(
        [*look, "--dump-resource-usage"], capture_output=True, text=True, check=True
    ).stdout
    resources = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert len(resources) == kernels
    assert all(stack == "0" and local == "0" for _, stack, local in resources), usage
    code = subprocess.run([*look, "--dump-sass"], capture_output=True, text=True, check=True).stdout
    functions = code.split("Function : ")[1:]
    assert len(functions) == kernels
    for function in functions:
        for instruction in wanted:
            mn_major = "MajorE1" in function.splitlines()[0]
            name = "LDSM.16.MT88.4" if mn_major and instruction == "LDSM.16.M88.4" else instruction
            assert name in function, f"{function.splitlines()[0]} has no {name}"
        assert "LDL" not in function
        assert "STL" not in function
