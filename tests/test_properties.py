"""Properties over random shapes, strides, dtypes and histograms (hypothesis), for every backend."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
from cases import KINDS, error, make
from hypothesis import HealthCheck, given, settings

import zipfls_cuda as zls

SLOW = {"triton": 12}  # examples under the interpreter


def examples(backend):
    return settings(
        max_examples=SLOW.get(backend, 60),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


CASES = st.fixed_dictionaries(
    {
        "N": st.integers(1, 7),
        "C": st.integers(2, 70),
        "P": st.integers(0, 90),
        "kind": st.sampled_from(KINDS),
        "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
        "scale": st.sampled_from([0.0, 1.0, 30.0]),
        "seed": st.integers(0, 2**16),
    }
)
OPTIONS = st.fixed_dictionaries(
    {
        "zipf_weight": st.sampled_from([0.0, 0.1, 1.0]),
        "alpha": st.sampled_from([0.0, 0.5, 1.0, 3.0]),
        "only_correct": st.booleans(),
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "ignore_index": st.sampled_from([-100, 0, 1]),
    }
)


def test_loss_equals_oracle(backend, device):
    @examples(backend)
    @given(CASES, OPTIONS, st.booleans(), st.integers(0, 3))
    def check(shape, options, by_votes, layout):
        case = make(**shape, device=device)
        x = case.logits
        if layout == 1:
            x = x.t().contiguous().t()
        elif layout == 2:
            x = torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]]
        elif layout == 3:
            x = torch.stack([x, x], -1)[..., 1]
        x.requires_grad_()
        votes = case.votes if by_votes else None
        loss, ce, zipf = zls.zipf_cross_entropy(
            x, case.target, votes, **options, return_parts=True, backend=backend
        )
        grad = torch.autograd.grad(loss.sum(), x)[0]
        given_options = {k: v for k, v in options.items() if k not in ("alpha", "label_smoothing")}
        exact = oracle.batch(
            case.logits.detach().double().cpu().numpy(),
            case.target.cpu().numpy(),
            None if votes is None else votes.cpu().numpy(),
            oracle.MASSES["Zipf"](options["alpha"]),
            smoothing=options["label_smoothing"],
            **given_options,
        )
        eps = torch.finfo(loss.dtype).eps
        size = 1 + shape["scale"]
        for a, b in zip((loss, ce, zipf), exact[:3], strict=True):
            if options["zipf_weight"] == 0 and a is zipf:
                assert (zipf == 0).all()  # skipped, so not reported
                continue
            assert error(a, torch.as_tensor(np.asarray(b))) <= 60 * eps * size * shape["N"]
        grad_eps = torch.finfo(shape["dtype"]).eps
        assert error(grad, torch.as_tensor(exact[3])) <= (2 * grad_eps + 60 * eps) * 2

    check()


def test_rank_and_label_equal_oracle(backend, device):
    @examples(backend)
    @given(CASES)
    def check(shape):
        shape = {**shape, "dtype": torch.float32}
        case = make(**shape, device=device)
        C = shape["C"]
        ranks = [oracle.rank_by(oracle.count(v, C)) for v in case.votes.tolist()]
        assert zls.rank_votes(case.votes, C, backend=backend).tolist() == ranks
        label = zls.zipf_label(case.target, case.votes, C, backend=backend)
        exact = [
            oracle.soft_label(y, [1 / r for r in row])
            for y, row in zip(case.target.tolist(), ranks, strict=True)
        ]
        assert error(label, torch.as_tensor(np.array(exact))) <= 4e-7

    check()


def test_gradient_sums_to_zero_and_loss_is_positive(backend, device):
    """Softmax gradients sum to zero over the classes; a KL divergence is not negative."""

    @examples(backend)
    @given(CASES)
    def check(shape):
        case = make(**{**shape, "dtype": torch.float64}, device=device)
        x = case.leaf()
        zipf = zls.zipf_loss(x, case.target, case.votes, reduction="none", backend=backend)
        assert (zipf >= -1e-9).all()
        zipf.sum().backward()
        assert x.grad.sum(1).abs().max() <= 1e-9
        permutation = torch.randperm(case.votes.shape[1])
        shuffled = zls.zipf_loss(
            x.detach(), case.target, case.votes[:, permutation], reduction="none", backend=backend
        )
        torch.testing.assert_close(shuffled, zipf.detach(), rtol=1e-12, atol=1e-12)

    check()


@pytest.mark.parametrize("upsample", [1, 2])
def test_vote_is_the_best_score(backend, device, upsample):
    @examples(backend)
    @given(
        st.integers(1, 3),
        st.integers(1, 40),
        st.integers(1, 5),
        st.integers(1, 5),
        st.integers(2, 70),
        st.booleans(),
        st.booleans(),
        st.integers(0, 2**16),
    )
    def check(N, D, H, W, C, channels_last, biased, seed):
        torch.manual_seed(seed)
        features = torch.randint(-8, 9, (N, D, H, W), device=device).float()
        weight = torch.randint(-8, 9, (C, D), device=device).float()
        bias = torch.randint(-8, 9, (C,), device=device).float() if biased else None
        if channels_last:
            features = features.contiguous(memory_format=torch.channels_last)
        # Small integers: every score is exact in float32, so ties are real ties and must go to the lowest.
        votes = zls.dense_vote(features, weight, bias, upsample=upsample, backend=backend)
        doubled = features.double()
        if upsample == 2:
            doubled = torch.nn.functional.interpolate(
                doubled, scale_factor=2, mode="bilinear", align_corners=False
            )
        scores = doubled.flatten(2).transpose(1, 2) @ weight.double().t() + (
            0 if bias is None else bias.double()
        )
        best = scores == scores.amax(-1, keepdim=True)
        assert torch.equal(votes.long(), best.int().argmax(-1))

    check()
