"""Votes at sizes that only a GPU is asked for, against exact scores: its kernels, rounds, tiles.

Skipped without one, and has then proven nothing.
"""

from __future__ import annotations

import pytest
import torch
from cases import WGMMA_SHAPES
from test_vote import assert_votes, inputs, serves

import zipfls_cuda as zls

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

HALF_DTYPES = (torch.bfloat16, torch.float16)


def large_inputs(backend, device, shape, dtype, layout="channels_last"):
    if device.type != "cuda" or not serves(backend, device, dtype):
        pytest.skip(f"{backend} does not serve {dtype} on a GPU")
    features, weight, bias = inputs(*shape, dtype, device)
    return features.to(memory_format=getattr(torch, layout)), weight, bias


@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
@pytest.mark.parametrize("dtype", [*HALF_DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", WGMMA_SHAPES, ids=str)
def test_vote_where_wgmma_multiplies(backend, device, shape, dtype, layout):
    features, weight, bias = large_inputs(backend, device, shape, dtype, layout)
    assert_votes(zls.dense_vote(features, weight, bias, backend=backend), features, weight, bias)
    assert_votes(zls.dense_vote(features, weight, backend=backend), features, weight)


@pytest.mark.parametrize("dtype", [*HALF_DTYPES, torch.float32], ids=str)
def test_vote_tokens_after_a_class_token(backend, device, dtype):
    features, weight, bias = large_inputs(backend, device, (24, 96, 197, 1, 1000), dtype)
    tokens = features.flatten(2).transpose(1, 2).contiguous()[:, 1:]
    assert_votes(zls.dense_vote(tokens, weight, bias, backend=backend), tokens, weight, bias)


@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_vote_in_several_rounds(backend, device, dtype, layout, upsample):
    """More features than are packed at a time (64 MiB), the last round a small one."""
    features, weight, bias = large_inputs(backend, device, (700, 1024, 7, 7, 50), dtype, layout)
    votes = zls.dense_vote(features, weight, bias, upsample=upsample, backend=backend)
    assert_votes(votes, features, weight, bias, upsample)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
@pytest.mark.parametrize("shape", [(6, 40, 33, 29, 300), (40, 96, 8, 8, 1000)], ids=str)
@pytest.mark.parametrize("dtype", [*HALF_DTYPES, torch.float32], ids=str)
def test_vote_upsampled_of_many_tiles(backend, device, dtype, shape, layout):
    features, weight, bias = large_inputs(backend, device, shape, dtype, layout)
    votes = zls.dense_vote(features, weight, bias, upsample=2, backend=backend)
    assert_votes(votes, features, weight, bias, upsample=2)


@pytest.mark.parametrize("shape", [(3, 33, 5, 7, 101), *WGMMA_SHAPES], ids=str)
def test_vote_of_digits_beyond_tensor_float_32(backend, device, shape):
    """Digits that TensorFloat-32 drops, where it is allowed: within its error of the best score."""
    N, D, H, W, C = shape
    features, weight = torch.randn(N, D, H, W, device=device), torch.randn(C, D, device=device)
    votes = zls.dense_vote(features, weight, backend=backend)
    assert_votes(votes, features, weight)
