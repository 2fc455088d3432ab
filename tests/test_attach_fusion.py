"""attach on models whose head fuses the pooled features with metadata, as DynamicMLP does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zipfls_cuda as zls

K, D, C = 6, 16, 5


class Fused(nn.Module):
    """Map, mean over positions, DynamicMLP, classifier."""

    def __init__(self, kind="c", tokens=False, norm=False, fuse=None):
        super().__init__()
        self.body = nn.Conv2d(8, D, 3)
        self.arrange = nn.Flatten(2) if tokens else nn.Identity()
        self.norm = nn.LayerNorm(D) if norm else nn.Identity()
        self.fuse = fuse or zls.methods.DynamicMLP(D, K, d=12, hidden=6, kind=kind, width=10)
        self.fc = nn.Linear(D, C)
        self.tokens = tokens

    def forward(self, images, metadata):
        maps = self.arrange(self.body(images))
        pooled = maps.flatten(2).mean(2)
        return self.fc(self.fuse(self.norm(pooled), metadata))


def batch(N=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, 8, 7, 7, generator=g), torch.randn(N, K, generator=g)


def attached(model, **options):
    return zls.attach(model, feature="body", classifier="fc", **options)


def expected_votes(model, images, metadata):
    """The classifier on each position's features plus what the head adds to their mean, written out."""
    with torch.no_grad():
        maps = model.body(images)
        pooled = maps.mean((2, 3))
        maps = maps + (model.fuse(pooled, metadata) - pooled)[:, :, None, None]
        scores = model.fc(maps.flatten(2).transpose(1, 2))  # (N, P, C)
    return scores.argmax(2), scores.mean(1)


@pytest.mark.parametrize("kind", ["a", "b", "c"])
@pytest.mark.parametrize("example", [True, False])
def test_positions_vote_with_what_the_head_adds(kind, example):
    torch.manual_seed(0)
    model, given = Fused(kind), batch()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    handle = attached(model, example=given if example else None)
    logits = model(*given)
    votes, _ = handle.votes_of(logits)
    expected, mean_scores = expected_votes(model, *given)
    assert torch.equal(votes.long(), expected)
    torch.testing.assert_close(mean_scores, logits.detach())  # as with global pooling alone
    assert handle.plan.kind == "global pooling"
    assert str(handle.plan).endswith("-> fc, each with what fuse adds to the pooled features")
    votes, _ = handle.votes_of(model(given[0], given[1].flip(0)))
    assert not torch.equal(votes.long(), expected), "place and date have a say"


def test_it_trains_and_undoes():
    torch.manual_seed(0)
    model, (images, metadata), y = Fused(), batch(), torch.arange(8) % C
    handle = attached(model)
    criterion = zls.ZipfLoss(0.5, votes=handle)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        loss = criterion(model(images, metadata), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.7 * losses[0]
    twin = copy.deepcopy(model)
    twin(images, metadata)
    assert zls.detach(model)
    assert not model.fuse._forward_hooks
    assert zls.detach(twin)


def test_upsampled_tokens_and_autocast():
    torch.manual_seed(0)
    images, metadata = batch()
    model = Fused()
    votes, _ = (handle := attached(model, upsample=2)).votes_of(model.train()(images, metadata))
    assert votes.shape == (8, 100)
    handle.remove()
    model = Fused(tokens=True)
    model.arrange.register_forward_hook(lambda module, args, out: out.transpose(1, 2))
    model.forward = lambda x, m: model.fc(model.fuse(model.arrange(model.body(x)).mean(1), m))
    handle = zls.attach(model, feature="arrange", classifier="fc")
    votes, _ = handle.votes_of(model(images, metadata))
    assert handle.plan.layout == "NTD"
    assert votes.shape == (8, 25)
    model = Fused()
    handle = attached(model)
    with torch.autocast("cpu", torch.bfloat16):
        votes, _ = handle.votes_of(model(images, metadata))
    expected, _ = expected_votes(copy.deepcopy(model).eval(), images, metadata)
    assert votes.shape == expected.shape


def test_it_compiles_as_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, given = Fused(), batch()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    handle = attached(model, example=given)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    votes, _ = handle.votes_of(compiled(*given))
    assert torch.equal(votes.long(), expected_votes(model, *given)[0])


class Concatenated(nn.Module):
    """Fuses by a linear layer of both, which is no residual but has the same shapes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D + K, D)

    def forward(self, x, m):
        return F.relu(self.linear(torch.cat([x, m], 1)))


def test_any_module_that_keeps_the_width_is_served():
    torch.manual_seed(0)
    model, given = Fused(fuse=Concatenated()), batch()
    votes, _ = attached(model).votes_of(model(*given))
    assert torch.equal(votes.long(), expected_votes(model, *given)[0])


def test_a_norm_before_it_is_refused():
    model = Fused(norm=True)
    attached(model)
    with pytest.raises(RuntimeError, match="attach: the positions of this Fused cannot vote"):
        model(*batch())
