"""Tensors of any strides: every tensor argument of every operator, against a contiguous copy of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import make

import zipfls_cuda as zls
from zipfls_cuda import ops

N, C, P = 4, 20, 5


def noise(shape, like):
    """Anything but what belongs there, in the type of ``like``."""
    return (1 + torch.rand(shape, device=like.device)).to(like.dtype)


def views(x, few=False):
    """Views of the shape and type of ``x``, and whether elements of theirs share memory (not so in ``x``)."""
    if x.dim() == 0:
        yield torch.stack([noise((), x), x])[1], False
        return
    yield torch.stack([x, noise(x.shape, x)], -1)[..., 0], False
    if not few or x.dim() == 1:
        yield x[..., :1].expand(x.shape), True
    if few:
        return
    wide = noise((*x.shape[:-1], x.shape[-1] + 3), x)
    wide[..., 1:-2] = x
    yield wide[..., 1:-2], False
    if x.dim() > 1:
        yield x.transpose(0, -1).contiguous().transpose(0, -1), False
        yield x[:1].expand(x.shape), True


def contiguous(args):
    """Copies of the tensors among them."""
    return [
        x.clone(memory_format=torch.contiguous_format) if isinstance(x, torch.Tensor) else x for x in args
    ]


def calls(device):
    """(operator, its arguments)."""
    z, y, v = make(N, C, P).to(device)
    table = -torch.arange(1.0, C + 1, device=device).log()
    dense, weight = torch.randn(N, C, device=device), torch.rand(C, device=device) + 0.1
    soft = torch.randint(3, (N, C), device=device) / 4.0
    scalar, rows = torch.tensor(0.7, device=device), torch.rand(N, device=device)
    channels_last = torch.randn(2, 3, 4, 16, device=device).permute(0, 3, 1, 2)
    classifier, bias = torch.randn(C, 16, device=device), torch.rand(C, device=device)
    yield "vote_fwd", (channels_last, classifier, bias, 1)
    yield "vote_fwd", (channels_last, classifier, bias, 2)
    yield "vote_fwd", (torch.randn(3, 5, 16, device=device), classifier, None, 1)
    yield "rank_fwd", (v, C)
    for votes, mass in ((v, table), (None, table), (v, dense)):
        tail = (votes, mass, weight, 1.0, 0.5, 0.1, False)
        yield "loss_fwd", (z, y, *tail, -100, "mean", True)
        yield "loss_fwd", (z, soft, *tail, -100, "none", True)
        if votes is not None:
            yield "label_fwd", (y, v, mass, C, -100)
    yield "loss_grad_", (z, y, *tail, -100, "sum")
    yield "loss_grad_", (z, soft, *tail, -100, "mean")
    distilled = (z.flip(0), y, rows, None, 1.0, 0.5, 0.2, 0.3, 0.1, 0.4, 4.0, "divergence", -100)
    yield "distill_fwd", (z, *distilled, "none", True)
    yield "distill_grad_", (z, *distilled, "mean")
    yield "distill_fwd", (z, *distilled[:3], y.clamp(min=0) % len(z), *distilled[4:], "sum", True)
    shares = torch.rand(len(z), 2, device=device)
    made = (soft, y, shares, y.clamp(min=0) % len(z), 1.0, 0.5, 0.2, 0.3, 0.1, 0.4, 1.0, "probabilities")
    yield "distill_fwd", (z, *made, -100, "mean", True)
    for votes, w in ((v, None), (None, weight)):
        options = (1.0, 0.5 if w is None else 0.0, 0.0, True, -100, "mean")
        yield "loss_factors_fwd", (z, y, votes, table, w, *options)
    factors, patches = torch.rand(N, 4, device=device), torch.randn(N, P, device=device)
    for upstream in (scalar, rows):
        yield "loss_factors_bwd_", (z, y, v, factors, patches, upstream, scalar)
    for upstream in (scalar, rows):
        yield "loss_bwd", (z, upstream, scalar)
        yield "loss_bwd_", (z, upstream, scalar)


def result(name, backend, args):
    """What the operator gives, or writes over its first argument, as a list."""
    out = ops.OPERATORS[name, backend](*args)
    if name == "loss_factors_fwd":  # of what it keeps, some may be anything: its gradient may not
        logits, target, votes = args[0].clone(memory_format=torch.contiguous_format), *args[1:3]
        *losses, factors, patches, grad_scale = out
        upstream = logits.new_ones(())
        bwd_ = ops.OPERATORS["loss_factors_bwd_", backend]
        bwd_(logits, target, votes if patches.numel() else None, factors, patches, upstream, grad_scale)
        return [*losses, factors, logits]
    out = [out] if isinstance(out, torch.Tensor) else list(out or ())
    return out + [args[0]] * name.endswith("_")


def test_every_tensor_argument(backend, device):
    few = backend == "triton" and ops.triton_interpreted()  # slow
    for name, args in calls(device):
        if ops.refusal(backend, name, device.type, torch.float32):
            continue
        plain = result(name, backend, contiguous(args))
        schema = ops.OPERATORS[name, backend]._schema.arguments
        for i in (i for i, x in enumerate(args) if isinstance(x, torch.Tensor)):
            written = name.endswith("_") and i == 0
            if name.endswith("grad_") and not written:
                continue  # as loss_fwd
            for view, shared in views(args[i], few):
                if written and shared:
                    continue
                given = contiguous(args)
                given[i] = view
                if written and backend == "cpu":
                    with pytest.raises(ValueError, match="contiguous"):
                        result(name, backend, given)
                    continue
                expected = result(name, backend, contiguous(given)) if shared else plain
                what = f"{name}, {schema[i].name} {tuple(view.shape)} of strides {view.stride()}"
                for a, b in zip(result(name, backend, given), expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6, msg=lambda m, w=what: f"{w}: {m}")


def test_weights_and_laws_as_a_user_has_them(backend, device):
    """A column of a table, every other element, one number expanded; a law that expands one number."""
    z, y, v = make(N, C, P, device=device)
    table = torch.rand(C, 3, device=device) + 0.1
    weights = (table[:, 1], torch.rand(2 * C, device=device)[::2], torch.tensor(2.0, device=device).expand(C))
    options = {"label_smoothing": 0.1, "backend": backend}
    for weight in weights:
        for target in (y, z.softmax(1)):
            loss = zls.zipf_cross_entropy(z, target, v, weight=weight, zipf_weight=0, **options)
            torch.testing.assert_close(loss, F.cross_entropy(z, target, weight, label_smoothing=0.1))

    class Flat(zls.Constant):
        def log_mass(self, rank, num_classes):
            return torch.tensor(-2.0, dtype=rank.dtype, device=rank.device).expand_as(rank)

    for votes in (v, None):
        flat, constant = (
            zls.zipf_loss(z, y, votes, distribution=law, backend=backend) for law in (Flat(), zls.Constant())
        )
        torch.testing.assert_close(flat, constant)


def test_class_shards():
    """Through process_group, on the one rank there is."""
    whole = (*make(N, C, P), torch.rand(C) + 0.1)
    options = {"label_smoothing": 0.1, "reduction": "none"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for i, x in enumerate(whole):
            for view, _ in views(x):
                args = (*whole[:i], view, *whole[i + 1 :])
                *plain, weight = contiguous(args)
                expected = zls.zipf_cross_entropy(*plain, weight=weight, backend="reference", **options)
                got = zls.zipf_cross_entropy(
                    *args[:3], weight=args[3], process_group=dist.group.WORLD, **options
                )
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    finally:
        dist.destroy_process_group()
