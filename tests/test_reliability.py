"""Bugs that published fused losses shipped and that no other file tests. The numbers are the catalogue's.

1, 2 (upstream gradients), 3, 21 (saved gradients), 16 (second derivatives), 19 (float16): test_autograd.
5 (all ignored): test_api. 6, 13, 14 (infinities, cancellation, underflow), 11 (out of range): test_loss.
15 (ties): test_vote. 12 (vacuous tests): mutants.py. 17, 18, 20 (attached models): test_attach.
"""

from __future__ import annotations

import os

import pytest
import torch
from cases import make

import zipfls_cuda as zls


@pytest.fixture
def poisoned():
    """Fresh memory is filled with NaN (and large integers), so what a kernel leaves unwritten shows (4)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_output_is_written(backend, device, poisoned, reduction):
    case = make(6, 37, 10, device=device)
    case.target[[0, 3]] = -100
    for votes in (case.votes, case.votes[:, :0], None):
        for only_correct in (False, True):
            x = case.leaf()
            parts = zls.zipf_cross_entropy(
                x,
                case.target,
                votes,
                only_correct=only_correct,
                reduction=reduction,
                return_parts=True,
                backend=backend,
            )
            parts[0].sum().backward()
            for part in (*parts, x.grad):
                assert part.isfinite().all()
            assert (x.grad[[0, 3]] == 0).all()
    label = zls.zipf_label(case.target, case.votes, 37, backend=backend)
    assert label.isfinite().all()
    assert zls.rank_votes(case.votes, 37, backend=backend).amax() <= 37
    features, weight = torch.randn(2, 5, 3, 3, device=device), torch.randn(37, 5, device=device)
    for upsample in (1, 2):
        votes = zls.dense_vote(features, weight, upsample=upsample, backend=backend)
        assert ((votes >= 0) & (votes < 37)).all()


@pytest.mark.interpreted(0)  # the interpreter repeats itself; make kernel-report looks at the code
def test_repeats_bitwise_whatever_the_threads(backend, device):
    case = make(33, 1003, 49, device=device)
    features, weight = torch.randn(8, 16, 5, 5, device=device), torch.randn(1003, 16, device=device)
    repeats, threads = (2, (2,)) if backend == "triton" else (4, (1, 2))
    seen, before = [], torch.get_num_threads()
    for n in threads:
        torch.set_num_threads(n)
        for _ in range(repeats):
            x = case.leaf()
            loss = zls.zipf_cross_entropy(x, case.target, case.votes, label_smoothing=0.1, backend=backend)
            loss.backward()
            seen.append((loss.detach(), x.grad, zls.dense_vote(features, weight, backend=backend)))
    torch.set_num_threads(before)
    for other in seen[1:]:
        for a, b in zip(other, seen[0], strict=True):
            assert torch.equal(a, b)


def free_memory() -> int:
    with open("/proc/meminfo") as lines:
        table = dict(line.split(":") for line in lines)
    return int(table["MemAvailable"].split()[0]) * 1024


@pytest.mark.slow
def test_more_than_2_31_elements():
    """64-bit offsets (7): the last row of a (3, 2^30) matrix comes out as it does alone."""
    if "cpu" not in zls.backends():
        pytest.skip("the C++ extension is not built")
    if not os.path.exists("/proc/meminfo") or free_memory() < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    N, C = 3, 2**30
    x = torch.zeros(N, C, dtype=torch.bfloat16)
    x[2, -5:] = torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.bfloat16)
    target = torch.tensor([0, -100, C - 2])
    votes = torch.tensor([[1, 1], [2, 3], [C - 1, C - 3]], dtype=torch.int32)
    both = zls.zipf_cross_entropy(x, target, votes, reduction="none", backend="cpu")
    alone = zls.zipf_cross_entropy(x[2:], target[2:], votes[2:], reduction="none", backend="cpu")
    assert both[1] == 0
    assert both[2] == alone[0]
    assert both[0] != both[2]


def test_mass_tables_are_cached():
    """One table per law, length and device; a new one is not made on every call."""
    from zipfls_cuda import labels

    case = make(5, 12, 9)
    zls.zipf_loss(*case, alpha=1.25)
    before = labels.cached_table.cache_info()
    for _ in range(3):
        zls.zipf_loss(*case, alpha=1.25)
    after = labels.cached_table.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (3, 0)
    with torch.inference_mode():  # a table made here must still serve under autograd
        zls.zipf_loss(*case, alpha=1.75)
    zls.zipf_loss(case.leaf(), case.target, case.votes, alpha=1.75).backward()


def test_distributed_tensors_are_refused_by_name():
    """A DTensor would reach a kernel as the pointer of one shard (9)."""
    import torch.distributed as dist
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        weight = distribute_tensor(torch.randn(6, 5), mesh, [Shard(0)])
        with pytest.raises(TypeError, match=r"weight is a DTensor.*weight.full_tensor\(\)"):
            zls.dense_vote(torch.randn(2, 5, 3, 3), weight)
        logits = distribute_tensor(torch.randn(4, 6), mesh, [Shard(1)])
        with pytest.raises(TypeError, match="logits is a DTensor"):
            zls.zipf_loss(logits, torch.zeros(4, dtype=torch.int64))
    finally:
        dist.destroy_process_group()


def test_logits_are_not_kept_alive(backend, device):
    """Between forward and backward the loss holds one gradient, not the logits beside it."""
    import gc
    import weakref

    case = make(5, 12, 9, device=device)
    hidden = case.leaf() * 1.0
    storage = weakref.ref(hidden.untyped_storage())
    alive = weakref.ref(hidden)
    loss = zls.zipf_cross_entropy(hidden, case.target, case.votes, backend=backend)
    del hidden
    gc.collect()  # Triton's interpreter leaves a cycle with the storages of a launch
    assert alive() is None
    assert storage() is None
    loss.backward()
