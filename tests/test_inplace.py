"""inplace=True: the same gradient, written over the logits in backward, and whoever needed them is told."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import DTYPES, KINDS, make
from torch.utils._python_dispatch import TorchDispatchMode

import zipfls_cuda as zls
from zipfls_cuda import autograd, ops

REDUCTIONS = ("mean", "sum", "none")


@pytest.fixture(autouse=True)
def _served(request):
    """Skips the backends that have no kernel for it."""
    if "backend" in request.fixturenames:
        backend, device = request.getfixturevalue("backend"), request.getfixturevalue("device")
        reason = ops.refusal(backend, "loss_grad_", device.type, torch.float32)
        if reason:
            pytest.skip(f"{backend}: {reason}")


def run(case, upstream=None, function=zls.zipf_cross_entropy, **options):
    """(loss, gradient, logits after backward) of logits that are no leaf, through the public function."""
    x = case.leaf()
    logits, seen = x * 1, []
    logits.register_hook(seen.append)
    loss = function(logits, case.target, case.votes, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), seen[0], logits.detach()


def needs_factors(backend):
    if ops.UNSERVED.get((backend, "loss_factors_fwd"), ()) is None:
        pytest.skip(f"{backend} computes the gradient again")


def check_equal(case, upstream=None, function=zls.zipf_cross_entropy, **options):
    """In place: the same gradient, in the memory of the logits, and the same bits where it is computed again.

    What is made of factors is rounded once, after the upstream gradient is in it, not before and after.
    """
    loss, grad, _ = run(case, upstream, function, **options)
    with mock.patch.object(autograd, "from_factors", wraps=autograd.from_factors) as made_of_factors:
        got = run(case, upstream, function, inplace=True, **options)
    torch.testing.assert_close(got[0], loss, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert got[1].data_ptr() == got[2].data_ptr() or not grad.numel()
    rtol, atol = 0.0, 0.0
    if made_of_factors.called and grad.numel():
        largest = grad.double().nan_to_num(0, 0, 0).abs().max().item()
        wide = torch.finfo(torch.float64 if grad.dtype == torch.float64 else torch.float32).eps
        rtol = 2 * torch.finfo(grad.dtype).eps
        atol = 8 * wide * largest + torch.finfo(grad.dtype).smallest_normal * torch.finfo(grad.dtype).eps
    for x in got[1:]:
        torch.testing.assert_close(x, grad, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_out_of_place(backend, device, reduction, dtype):
    if backend == "triton" and ops.triton_interpreted():
        cases = ((7, "peaked"), (12, "none"), (300, "distinct"))
    else:
        cases = itertools.product((2, 7, 12, 53, 300), ("peaked", "distinct", "none"))
    for C, kind in cases:
        case = make(6, C, 20, dtype, device, kind=kind)
        upstream = torch.rand(6 if reduction == "none" else (), device=device)
        check_equal(case, reduction=reduction, backend=backend)
        check_equal(case, upstream.to(torch.float64 if dtype == torch.float64 else torch.float32),
                    reduction=reduction, label_smoothing=0.1, only_correct=True, backend=backend)  # fmt: skip


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_label(backend, device, kind):
    """Votes, logits and random draws give the ranks; class weights; sound and odd logits."""
    case = make(5, 40, 25, device=device, kind=kind)
    case.logits[1, 3] = -torch.inf  # leaves the closed form
    case.logits[2, 4] = torch.nan
    case.logits[torch.arange(2), case.target[:2]] += 9
    weight = torch.rand(40, device=device)
    for options in (
        {},
        {"weight": weight, "label_smoothing": 0.2},
        {"distribution": zls.ExponentialDecay(0.7)},
        {"distribution": zls.LinearDecay(0.0), "zipf_weight": 0.3, "num_items": 7},
        {"only_correct": True, "ignore_index": int(case.target[3])},
        {"zipf_weight": 0.0},
    ):
        check_equal(case, backend=backend, **options)
    check_equal(case, function=zls.zipf_loss, backend=backend)
    check_equal(case._replace(votes=None), backend=backend, weight=weight)
    results = []
    for inplace in (False, True):
        torch.manual_seed(5)
        results.append(run(case, distribution=zls.RandomUniform(), inplace=inplace, backend=backend)[1])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.interpreted(1)
@pytest.mark.parametrize(("C", "P"), [(5000, 320), (33000, 49), (70001, 49)])
def test_long_rows(backend, device, C, P):
    for dtype in (torch.float32, torch.bfloat16):
        check_equal(make(2, C, P, dtype, device), label_smoothing=0.1, backend=backend)


@pytest.mark.parametrize("C", [3, 12, 300])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_targets_of_probabilities(backend, device, dtype, reduction, C):
    case = make(5, C, 20, dtype, device)
    t = torch.nn.functional.one_hot(case.target, C) * 0.7 + 0.3 / C
    soft = case._replace(target=t)
    check_equal(soft, reduction=reduction, label_smoothing=0.1, only_correct=True, backend=backend)
    check_equal(soft._replace(votes=None), reduction=reduction, backend=backend)


def test_keeps_nothing_of_the_logits_size(backend, device):
    case, saved = make(64, 500, 9, device=device), []
    logits = case.leaf() * 1

    def pack(x):
        saved.append((x.data_ptr(), x.numel()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = zls.zipf_cross_entropy(logits, *case[1:], inplace=True, backend=backend)
    assert (logits.data_ptr(), logits.numel()) in saved
    factors = ops.UNSERVED.get((backend, "loss_factors_fwd"), ()) is not None
    assert sum(n for at, n in saved if at != logits.data_ptr()) < 64 * (24 if factors else 20)
    assert torch.equal(logits, case.logits), "nothing is written before backward"
    loss.backward()
    assert not torch.equal(logits, case.logits)


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        (True, {}),
        (True, {"weight": torch.rand(40)}),
        (True, {"label_smoothing": 0.1}),
        (True, {"zipf_weight": 0.0, "votes": None}),
        (False, {"votes": None}),
        (False, {"log_mass": torch.zeros(3, 40)}),
        (False, {"target": torch.rand(3, 40)}),
        (False, {"weight": torch.rand(40), "label_smoothing": 0.1}),
        (False, {"votes": torch.zeros(3, 21)}),
        (False, {"logits": torch.zeros(1, 1).expand(3, 4000), "votes": torch.zeros(3, 1025)}),
        (True, {"logits": torch.zeros(1, 1).expand(3, 2**21 - 1), "votes": torch.zeros(3, 1024)}),
        (False, {"logits": torch.zeros(1, 1).expand(3, 2**21), "votes": torch.zeros(3, 1024)}),
    ],
)
def test_what_has_factors(expected, changes):
    """Of other losses backward computes the gradient again."""
    call = {"logits": torch.zeros(3, 40), "target": torch.zeros(3).long(), "votes": torch.zeros(3, 20)}
    call |= {"log_mass": torch.zeros(21), "weight": None}
    call |= {"ce_weight": 1.0, "zipf_weight": 0.1, "label_smoothing": 0.0} | changes
    assert autograd.has_factors(**call) == expected


@pytest.mark.interpreted(1)
@pytest.mark.parametrize(
    ("C", "P", "made_from"), [(40, 20, "factors"), (40, 21, "grad"), (21841, 1024, "factors")]
)
def test_factors_are_what_a_gpu_uses(backend, device, C, P, made_from):
    needs_factors(backend)
    called, case = [], make(3, C, P, device=device)

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.name())
            return function(*args, **(kwargs or {}))

    with Listen():
        loss = zls.zipf_cross_entropy(case.leaf() * 1, *case[1:], inplace=True, backend=backend)
        loss.backward()
    assert any(name.startswith(f"zipfls::loss_{made_from}") for name in called)
    assert any(name.startswith("zipfls::loss_grad_") for name in called) == (made_from == "grad")


def test_rows_that_do_not_count(backend, device):
    """Ignored, out of range and without votes; int64 votes, negative ones and ones for the target."""
    needs_factors(backend)
    case = make(7, 40, 9, device=device)
    case.target[0], case.target[1], case.votes[2, 3], case.votes[3] = -100, 40, 41, -1
    case.votes[4], case.votes[5] = case.target[4], -7
    case.votes[5, 2] = case.target[5]
    case.logits[0, 5], case.logits[6, 7] = torch.nan, torch.inf
    tensors = (case.target, case.votes.long(), -torch.arange(1.0, 11, device=device).log(), None)
    options = (1.0, 0.5, 0.1, False, -100, "none")
    *expected, grad, _ = ops.OPERATORS["loss_fwd", backend](case.logits, *tensors, *options, True)
    keep, upstream = ops.OPERATORS["loss_factors_fwd", backend], torch.rand(7, device=device)
    *got, factors, patches, scale = keep(case.logits, *tensors, *options)
    arguments = (*tensors[:2], factors, patches, upstream, scale)
    ops.OPERATORS["loss_factors_bwd_", backend](case.logits, *arguments)
    torch.testing.assert_close(got, expected, equal_nan=True)
    torch.testing.assert_close(case.logits, grad * upstream[:, None], equal_nan=True)
    assert (case.logits[0] == 0).all()
    assert case.logits[1:3].isnan().all()


@pytest.mark.parametrize("P", [9, 49])
def test_one_vote_patches_a_class(backend, device, P):
    """Else threads would store different values, in no order."""
    needs_factors(backend)
    case, table = make(5, 40, P, device=device), -torch.arange(1.0, 41, device=device).log()
    options = (None, 1.0, 0.5, 0.0, False, -100, "mean")
    *_, patches, _ = ops.OPERATORS["loss_factors_fwd", backend](*case, table, *options)
    for y, votes, patch in zip(
        case.target.tolist(), case.votes.tolist(), patches.isnan().tolist(), strict=True
    ):
        patched = [c for c, is_nan in zip(votes, patch, strict=True) if not is_nan and c != y]
        assert sorted(patched) == sorted(set(votes) - {y})


def test_what_has_no_factors_is_refused(backend, device):
    needs_factors(backend)
    case, table = make(3, 40, 9, device=device), torch.zeros(41, device=device)
    dense = torch.zeros(3, 40, device=device)
    op, options = ops.OPERATORS["loss_factors_fwd", backend], (True, -100, "mean")
    for tensors, smoothing, message in (
        ((torch.rand(3, 40, device=device), case.votes, table, None), 0.0, "target must be class indices"),
        ((case.target, None, table, None), 0.0, "votes must rank the classes"),
        ((case.target, case.votes, dense, None), 0.0, "votes must rank the classes"),
        ((case.target, case.votes, table, table[:40]), 0.1, "label_smoothing must be 0 beside weight"),
    ):
        with pytest.raises(ValueError, match=message):
            op(case.logits, *tensors, 1.0, 0.5, smoothing, *options)


def test_peak_memory_on_a_gpu(backend, device):
    """Nothing of the logits' size is allocated beside them, forward and backward."""
    if device.type != "cuda":
        pytest.skip("memory is counted by CUDA's allocator only")
    case = make(4096, 1000, 49, torch.bfloat16, device)
    leaf = case.leaf()
    for _ in range(2):  # tables are made once
        logits = leaf * 1
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = zls.zipf_cross_entropy(logits, *case[1:], inplace=True, backend=backend)
        torch.autograd.grad(loss, logits)
        peak = torch.cuda.max_memory_allocated() - before
    assert peak < 0.07 * logits.nbytes  # 49 + 8 elements a row of 1000, and sums


def test_who_still_needs_the_logits_is_told(backend, device):
    case = make(6, 12, 9, device=device)

    def loss(logits):
        return zls.zipf_cross_entropy(logits, *case[1:], inplace=True, backend=backend)

    leaf = case.leaf()
    logits = leaf * 1
    first, second = loss(logits), loss(logits)
    first.backward(retain_graph=True)
    for later in (second, first):  # another loss of the same logits; the same one again
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            later.backward()
    logits = leaf * 1
    value = loss(logits)
    with torch.no_grad():
        logits += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    with pytest.raises(RuntimeError, match="differentiated again"):
        torch.autograd.grad(loss(leaf * 1), leaf, create_graph=True)
    value = loss(leaf * 1)
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_saved_elsewhere(backend, device):
    """Hooks that move what is saved (offloading to the host): the gradient is written there, and right."""
    case = make(6, 12, 9, device=device)
    expected = run(case, backend=backend)[1]
    leaf = case.leaf()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        loss = zls.zipf_cross_entropy(leaf * 1, *case[1:], inplace=True, backend=backend)
    loss.backward()
    assert torch.equal(leaf.grad, expected)


def test_without_gradient_and_in_transforms(backend, device):
    """Where there is nothing to save, the option changes nothing."""
    case = make(6, 12, 9, device=device)
    options = {"backend": backend, "inplace": True}
    with torch.no_grad():
        loss = zls.zipf_cross_entropy(case.leaf(), *case[1:], **options)
    expected = run(case, backend=backend)
    torch.testing.assert_close(loss, expected[0])

    def of_leaf(x, **more):
        return zls.zipf_cross_entropy(x, *case[1:], **options | more)

    torch.testing.assert_close(torch.func.grad(of_leaf)(case.logits), expected[1])
    torch._dynamo.reset()
    x = case.leaf()
    torch.compile(of_leaf, backend="aot_eager", fullgraph=True)(x * 1).backward()
    torch.testing.assert_close(x.grad, expected[1])


def test_refusals():
    case = make(6, 12, 9)
    for x, pattern in (
        (case.leaf(), "inplace needs logits that an operation made"),
        (torch.randn(9, 12, requires_grad=True)[:6], "or a view of one"),
        (torch.randn(12, 6, requires_grad=True).view(6, 12), "or a view of one"),
        ((case.leaf().T.contiguous() * 1).T, "inplace needs contiguous logits"),
        ((case.leaf() * 1)[:, :8], "inplace needs contiguous logits"),
    ):
        with pytest.raises(ValueError, match=pattern):
            zls.zipf_cross_entropy(x, case.target % 8, case.votes % 8, inplace=True)
    target, votes = case.target % 6, case.votes % 6
    op = torch.ops.zipfls.loss_grad_.default
    options = (torch.zeros(9), None, 1.0, 1.0, 0.0, False, -100, "mean")
    with pytest.raises((ValueError, RuntimeError), match="contiguous"):  # operators guard memory themselves
        op(torch.randn(6, 12)[:, ::2], target.cpu(), votes.cpu(), *options)


def test_class_shards_are_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        case = make(6, 12, 9)
        with pytest.raises(ValueError, match="inplace must be False for class shards"):
            zls.zipf_cross_entropy(case.leaf() * 1, *case[1:], inplace=True, process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def test_module_and_head():
    case = make(6, 12, 9)
    expected = run(case)
    x = case.leaf()
    logits = x * 1
    criterion = zls.ZipfLoss(inplace=True)
    assert "inplace=True" in repr(criterion)
    criterion(logits, *case[1:]).backward()
    assert torch.equal(x.grad, expected[1])
    assert torch.equal(logits, expected[1])
    grads = []
    for inplace in (False, True):
        torch.manual_seed(0)
        f, w = torch.randn(4, 5, 3, 3, requires_grad=True), torch.randn(9, 5, requires_grad=True)
        zls.zipf_head_loss(f, w, None, torch.arange(4), inplace=inplace).backward()
        grads.append((f.grad, w.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
