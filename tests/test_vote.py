"""Dense votes: every backend against scores in float64.

Where two classes' exact scores are closer than rounding can tell apart, either may win; everywhere else the
vote must be the exact one. The margin is the error bound of a product accumulated in the compute type.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES

import zipfls_cuda as zls
from zipfls_cuda import ops


def serves(backend, device, dtype):
    return not ops.refusal(backend, "vote_fwd", device.type, dtype)


def exact_scores(features, weight, bias, upsample):
    """(N, P, C) float64 scores; interpolation on the features, where the package does it on the scores."""
    features = features.double()
    if features.dim() == 4:
        if upsample == 2:
            features = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
        features = features.flatten(2).transpose(1, 2)
    return features @ weight.double().t() + (0 if bias is None else bias.double())


def tf32_allowed():
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def rounding(features, weight):
    """What a product may be off by, of its size, and whether inputs lose digits before it."""
    if features.dtype == torch.float64:
        return 2.0**-53, False
    if not features.is_cuda:
        return 2.0**-24, False
    held = all(torch.equal(x.half().float(), x) for x in (features, weight) if x.dtype == torch.float32)
    if tf32_allowed() and not held:
        return 2.0**-11, True
    return 2.0**-21, False  # tensor cores cut a sum's addends off at the largest one's last digit


def assert_votes(votes, features, weight, bias=None, upsample=1):
    scores = exact_scores(features, weight, bias, upsample)
    assert votes.dtype == torch.int32
    assert votes.shape == scores.shape[:2]
    D = weight.shape[1]
    eps, lossy = rounding(features, weight)
    size = features.double().abs().max().item() * weight.double().abs().max().item() * D
    margin = 4 * eps * (size / D**0.5 + (0 if bias is None else bias.double().abs().max().item()))
    best = scores.max(-1).values
    chosen = scores.gather(-1, votes.long().unsqueeze(-1)).squeeze(-1)
    assert (best - chosen <= margin).all(), f"a vote misses the best score by {(best - chosen).max():.3g}"
    top2 = scores.topk(2, -1).values
    clear = top2[..., 0] - top2[..., 1] > 2 * margin
    assert lossy or clear.float().mean() > 0.9, "the case decides too little"
    assert torch.equal(votes[clear], scores.argmax(-1).int()[clear])


def inputs(N, D, H, W, C, dtype, device, seed=0):
    """Features, weight, bias; where TensorFloat-32 is allowed, numbers that it holds: few votes are open."""
    g = torch.Generator().manual_seed(seed)
    shapes = (N, D, H, W), (C, D), (C,)
    values = [torch.randn(shape, generator=g) for shape in shapes]
    if device.type == "cuda" and tf32_allowed():
        values = [x.half() for x in values]
    return tuple(x.to(device, dtype) for x in values)


SHAPES = [
    (2, 16, 3, 3, 10),  # nothing a multiple of anything
    (1, 1, 1, 1, 2),
    (3, 33, 5, 7, 101),
    (2, 64, 7, 7, 257),
    (1, 130, 2, 2, 1000),
    (5, 8, 1, 1, 3),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vote_exact(backend, device, shape, dtype):
    if not serves(backend, device, dtype):
        with pytest.raises(RuntimeError, match="vote_fwd"):
            zls.dense_vote(*inputs(*shape, dtype, device), backend=backend)
        return
    features, weight, bias = inputs(*shape, dtype, device)
    assert_votes(zls.dense_vote(features, weight, bias, backend=backend), features, weight, bias)
    assert_votes(zls.dense_vote(features, weight, backend=backend), features, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 16, 3, 3, 10), (1, 7, 1, 1, 5), (3, 33, 4, 6, 37), (1, 8, 1, 5, 300)], ids=str
)
def test_vote_upsampled(backend, device, shape, dtype):
    if not serves(backend, device, dtype):
        pytest.skip(f"{backend} does not serve {dtype}")
    features, weight, bias = inputs(*shape, dtype, device)
    votes = zls.dense_vote(features, weight, bias, upsample=2, backend=backend)
    assert_votes(votes, features, weight, bias, upsample=2)


def test_vote_memory_formats_and_tokens(backend, device):
    features, weight, bias = inputs(3, 24, 4, 5, 19, torch.float32, device)
    votes = zls.dense_vote(features, weight, bias, backend=backend)
    last = features.contiguous(memory_format=torch.channels_last)
    sliced = torch.cat([features, features], 1)[:, :24]
    wide = torch.stack([features, features], -1)[..., 0]
    expanded = features[:1].expand(3, -1, -1, -1)
    tokens = features.flatten(2).transpose(1, 2)
    for same in (last, sliced, wide, tokens, tokens.contiguous()):
        assert torch.equal(zls.dense_vote(same, weight, bias, backend=backend), votes)
    assert torch.equal(zls.dense_vote(expanded, weight, bias, backend=backend), votes[:1].expand(3, -1))
    upsampled = zls.dense_vote(features, weight, bias, upsample=2, backend=backend)
    assert torch.equal(zls.dense_vote(last, weight, bias, upsample=2, backend=backend), upsampled)
    wide_weight = torch.stack([weight, weight], -1)[..., 0]
    wide_bias = torch.stack([bias, bias], -1)[..., 0]
    assert torch.equal(zls.dense_vote(features, wide_weight, wide_bias, backend=backend), votes)
    assert torch.equal(zls.dense_vote(features, weight.t().contiguous().t(), bias, backend=backend), votes)


@pytest.mark.parametrize("upsample", [1, 2])
def test_vote_ties_take_the_lowest_class(backend, device, upsample):
    features = torch.ones(1, 4, 2, 2, device=device)
    weight = torch.zeros(300, 4, device=device)
    weight[[7, 8, 150, 299]] = 1.0
    assert (zls.dense_vote(features, weight, upsample=upsample, backend=backend) == 7).all()
    assert (zls.dense_vote(features, torch.zeros_like(weight), upsample=upsample, backend=backend) == 0).all()


@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vote_nan_never_wins(backend, device, upsample, dtype):
    features = torch.ones(2, 2, 2, 2, device=device, dtype=dtype)
    weight = torch.arange(140, device=device).float()[:, None].expand(140, 2).contiguous().to(dtype)
    bias = torch.zeros(140, device=device, dtype=dtype)
    bias[[0, 100, 139]] = torch.nan
    votes = zls.dense_vote(features, weight, bias, upsample=upsample, backend=backend)
    assert (votes == 138).all()
    features[1] = torch.nan  # every score of the second sample
    votes = zls.dense_vote(features, weight, bias, upsample=upsample, backend=backend)
    assert (votes[0] == 138).all()
    assert (votes[1] == -1).all()
    bias[:] = torch.nan
    assert (zls.dense_vote(features, weight, bias, upsample=upsample, backend=backend) == -1).all()


@pytest.mark.parametrize("upsample", [1, 2])
def test_vote_infinite_scores(backend, device, upsample):
    features, weight, _ = inputs(2, 6, 3, 3, 40, torch.float32, device)
    bias = torch.full((40,), -torch.inf, device=device)
    assert (zls.dense_vote(features, weight, bias, upsample=upsample, backend=backend) == 0).all()
    bias[[5, 31]] = 0.0
    votes = zls.dense_vote(features, weight, bias, upsample=upsample, backend=backend)
    assert set(votes.unique().tolist()) <= {5, 31}
    bias[33] = torch.inf
    assert (zls.dense_vote(features, weight, bias, upsample=upsample, backend=backend) == 33).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_vote_scores_are_not_rounded_to_half(backend, device, dtype):
    """Scores 256 and a little more: equal once rounded to bfloat16 or float16, apart in float32."""
    D = 32
    features = torch.ones(1, D, 1, 1, device=device, dtype=dtype)
    weight = torch.full((20, D), 8.0, device=device)
    weight = weight.to(dtype)
    weight[13, 0] = torch.nextafter(torch.tensor(8.0, dtype=dtype), torch.tensor(9.0, dtype=dtype))
    scores = weight.float().sum(1)
    assert scores[13] > scores[0]
    assert scores[13].to(dtype) == scores[0].to(dtype)
    assert zls.dense_vote(features, weight, backend=backend).item() == 13


def test_vote_rounded_products_do_not_decide(backend, device):
    """Products of a large batch that bfloat16 rounds to one number; a bias then favours the wrong class."""
    D, C = 96, 130
    features = torch.ones(2, D, 6, 6, device=device, dtype=torch.bfloat16)
    weight, bias = torch.full((C, D), 8.0), torch.zeros(C)
    weight[:, 0] = 0.0  # scores of 760
    weight[5, 0], bias[5] = 6.125, 2.0  # 766.125 + 2, as 768 + 2 if rounded
    weight[13, 0] = 9.875  # 769.875, as 768 if rounded
    weight, bias = weight.to(features), bias.to(features)
    product = weight.float().sum(1)
    assert product[5].bfloat16() == product[13].bfloat16() == 768
    assert (zls.dense_vote(features, weight, bias, backend=backend) == 13).all()


def test_vote_empty(backend, device):
    weight = torch.randn(5, 4, device=device)
    assert zls.dense_vote(torch.randn(0, 4, 3, 3, device=device), weight, backend=backend).shape == (0, 9)
    assert zls.dense_vote(torch.randn(2, 0, 4, device=device), weight, backend=backend).shape == (2, 0)
    votes = zls.dense_vote(torch.randn(0, 4, 3, 3, device=device), weight, upsample=2, backend=backend)
    assert votes.shape == (0, 36)
    no_channels = zls.dense_vote(
        torch.randn(2, 0, 3, 3, device=device),
        torch.randn(5, 0, device=device),
        torch.arange(5.0, device=device),
        backend=backend,
    )
    assert (no_channels == 4).all()


def test_vote_is_never_differentiable(backend, device):
    features, weight, bias = inputs(1, 4, 2, 2, 5, torch.float32, device)
    votes = zls.dense_vote(features.requires_grad_(), weight.requires_grad_(), bias, backend=backend)
    assert not votes.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_vote_under_autocast(backend, device, dtype):
    features, weight, bias = inputs(2, 16, 3, 3, 10, torch.float32, device)
    with torch.autocast(device.type, dtype):
        votes = zls.dense_vote(features.to(dtype), weight, bias, backend=backend)  # mixed, as in training
    cast = [x.to(dtype) for x in (features, weight, bias)]
    assert torch.equal(votes, zls.dense_vote(*cast, backend=backend))


@pytest.mark.interpreted(0)  # as in test_reliability.py
def test_vote_repeats_bitwise(backend, device):
    features, weight, bias = inputs(4, 48, 5, 5, 333, torch.float32, device)
    first = zls.dense_vote(features, weight, bias, backend=backend)
    for _ in range(3):
        assert torch.equal(zls.dense_vote(features, weight, bias, backend=backend), first)
