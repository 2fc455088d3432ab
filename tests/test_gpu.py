"""What only a GPU can show: streams, graphs, synchronisation, a living context, 64-bit offsets, memory.

Everything here is skipped without one, and has then proven nothing.
"""

from __future__ import annotations

import functools
import itertools
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, error, make
from torch import nn

import zipfls_cuda as zls
from zipfls_cuda import ops

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _gpu(backend, device):
    if device.type != "cuda" or backend == "reference":
        pytest.skip(f"{backend} on {device.type} makes no such promises")


def room_for(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if free < gib * GIB:
        pytest.skip(f"{gib} GiB of GPU memory are needed, {free / GIB:.0f} are free")


@contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step) -> torch.cuda.CUDAGraph:
    """A graph of ``step()``, which has never run on these shapes before: nothing is made in advance."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph


OPTIONS = {
    "plain": {},
    "none": {"reduction": "none"},
    "only correct": {"only_correct": True},
    "smoothed, weighted": {"label_smoothing": 0.1, "weight": ...},
    "decay": {"distribution": zls.ExponentialDecay(0.5), "zipf_weight": 0.3},
    "in place": {"inplace": True},
    "by logits": {"votes": None},
    "soft": {"target": ...},
    "distilled": {"teacher": ..., "temperature": 4.0, "tckd_weight": 1.0, "nckd_weight": 8.0},
    "distilled in place": {"teacher": ..., "kd_weight": 0.5, "soft_target_weight": 1.0, "inplace": True},
}


def step_of(name, backend, N, C, D, dtype, device):
    """(inputs, step): static inputs, and a training step of head and loss that reads nothing else."""
    options = dict(OPTIONS[name])
    features = torch.randn(N, D, 3, 3, device=device).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(C, D, device=device).to(dtype).requires_grad_()
    target = torch.randint(C, (N,), device=device)
    inputs = [features, weight, target]
    if "weight" in options:
        options["weight"] = torch.rand(C, device=device)
    if "target" in options:
        options.pop("target")
        target = torch.rand(N, C, device=device).round()
        inputs[2] = target
    distilled = options.pop("teacher", None) is not None
    if distilled:
        inputs.append(torch.randn(N, C, device=device).to(dtype))
    operator = "distill_grad_" if distilled else "loss_grad_"
    if "inplace" in options and ops.refusal(backend, operator, device.type, dtype):
        pytest.skip(f"{backend} writes no gradient in place")
    by_logits = "votes" in options
    options.pop("votes", None)

    def step():
        votes = None if by_logits else zls.dense_vote(features, weight, backend=backend)
        logits = F.linear(features.mean((2, 3)), weight)
        function, label = (
            (zls.distillation_loss, (inputs[-1], target)) if distilled
            else (zls.zipf_cross_entropy, (target, votes))
        )  # fmt: skip
        loss = function(logits, *label, backend=backend, **options)
        (grad,) = torch.autograd.grad(loss.mean() * 3, weight)
        return votes if votes is not None else target, loss.detach(), grad

    return inputs, step


def check_alike(got, expected) -> None:
    """Votes to the bit; the rest as far as cuBLAS, which makes the logits, repeats itself."""
    for a, b in zip(got, expected, strict=True):
        tolerance = {"rtol": 1e-2, "atol": 1e-3} if a.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(a.cpu(), b.cpu(), **tolerance)


def fresh(inputs) -> None:
    """New values in the same memory."""
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x) if x.is_floating_point() and x.dim() != 2 else x.roll(1, 0))


@pytest.mark.parametrize("name", OPTIONS)
def test_no_synchronisation(backend, device, name):
    """Forward and backward leave the host alone, from the first call for a shape on."""
    _, step = step_of(name, backend, 6, 37, 16, torch.bfloat16, device)
    if backend == "triton":
        step()  # compiling a kernel loads it, which waits
    with no_synchronisation():
        step()


def test_label_without_synchronisation(backend, device):
    case = make(6, 37, 9, device=device)
    calls = (
        lambda: zls.rank_votes(case.votes, 37, backend=backend),
        lambda: zls.zipf_label(case.target, case.votes, 37, backend=backend),
    )
    for call in calls:
        call()
        with no_synchronisation():
            call()


@pytest.mark.parametrize(
    ("name", "dtype"), itertools.product(OPTIONS, (torch.float16, torch.bfloat16)), ids=str
)
def test_graph_replays_as_eager(backend, device, name, dtype):
    """Capture and replay, on new inputs in the same memory: as the eager call."""
    C = 41 + 4 * list(OPTIONS).index(name)  # a size of its own, so that its tables are made while capturing
    inputs, step = step_of(name, backend, 6, C, 16, dtype, device)
    if backend == "triton":  # kernels are compiled before; the tables of another size do not help
        step_of(name, backend, 6, C + 2, 16, dtype, device)[1]()
    w = torch.ones(2, 2, device=device, dtype=dtype, requires_grad=True)
    F.linear(w.detach(), w).sum().backward()  # cuBLAS makes its handles, also in the thread of backward
    out = []
    graph = captured(lambda: out.extend(step()))
    for _ in range(3):
        fresh(inputs)
        graph.replay()
        torch.cuda.synchronize()
        check_alike(out, step())


@pytest.mark.parametrize(("N", "C"), [(2, 300), (64, 1000)])
def test_folded_votes_in_graphs_and_streams(backend, device, N, C):
    """Votes combined from several tiles of classes: replayed, and on several streams at once, as alone."""
    D = 64
    weight = torch.randn(C, D, device=device).bfloat16()
    maps = [
        torch.randn(N, D, 7, 7, device=device).bfloat16().to(memory_format=torch.channels_last)
        for _ in range(3)
    ]
    vote = functools.partial(zls.dense_vote, weight=weight, backend=backend)
    expected = [vote(x) for x in maps]
    static, out = maps[0].clone(), []
    graph = captured(lambda: out.append(vote(static)))
    streams = [torch.cuda.Stream() for _ in maps]
    for _ in range(20):
        got = []
        for x, stream in zip(maps, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(vote(x))
        for x, votes in zip(maps, expected, strict=True):
            static.copy_(x)
            graph.replay()
            assert torch.equal(out[0], votes)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def launched(call) -> list[str]:
    """Names of the kernels that a call launches."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def test_votes_and_loss_are_two_launches(backend, device):
    if backend == "triton":
        pytest.skip("Triton's votes are combined by a launch of their own")
    features = torch.randn(64, 256, 7, 7, device=device).bfloat16().to(memory_format=torch.channels_last)
    weight, logits = torch.randn(1000, 256, device=device).bfloat16(), torch.randn(64, 1000, device=device)
    target = torch.arange(64, device=device)

    def dense_path():
        votes = zls.dense_vote(features, weight, backend=backend)
        return zls.zipf_cross_entropy(logits.requires_grad_(), target, votes, backend=backend)

    dense_path()  # what is made once is made here
    names = launched(dense_path)
    assert len(names) == 2, names


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(("N", "C"), [(256, 1000), (1024, 1000), (128, 100)])
def test_a_loss_is_a_launch_each_way(backend, device, N, C, distilled):
    logits = torch.randn(N, C, device=device).bfloat16().requires_grad_()
    target, votes = torch.arange(N, device=device) % C, torch.randint(C, (N, 49), device=device).int()
    teacher, losses = logits.detach().flip(0), []

    def forward():
        if distilled:
            losses.append(zls.distillation_loss(logits, teacher, target, kd_weight=1.0, backend=backend))
        else:
            losses.append(zls.zipf_cross_entropy(logits, target, votes, backend=backend))

    def backward():
        torch.autograd.grad(losses[-1], logits, one)

    forward()  # what is made once is made here
    one = torch.ones_like(losses[0])  # else autograd launches a kernel to make it
    backward()
    for call in forward, backward:
        names = launched(call)
        assert len(names) <= 1, names


def test_compiled_with_cuda_graphs(backend, device):
    """Model, votes and loss under torch.compile's own CUDA graphs train as in eager mode.

    Compiled first: all that is made once for a shape is made while its graphs warm up and are recorded.
    """
    torch._dynamo.reset()
    C = {"cuda": 19, "triton": 23}[backend]  # a size that no other test has
    states = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, C)
        )
        model = model.to(device)
        example = torch.randn(2, 3, 9, 9, device=device)
        handle = zls.attach(model, feature="1", classifier="4", example=example)
        criterion, optimizer = zls.ZipfLoss(1.0, votes=handle), torch.optim.SGD(model.parameters(), 0.1)

        def loss_of(images, target, model=model, criterion=criterion):
            with torch.autocast("cuda", torch.bfloat16):
                return criterion(model(images), target)

        run = torch.compile(loss_of, mode="reduce-overhead") if compiled else loss_of
        with zls.use_backend(backend):
            for k in range(5):
                images = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(k)).to(device)
                loss = run(images, torch.arange(8, device=device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        states.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_amp_with_grad_scaler(backend, device, dtype):
    """Attached, channels_last, autocast, GradScaler: the loss falls and no step is skipped."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 9)
    )
    model = model.to(device, memory_format=torch.channels_last)
    images = torch.randn(32, 3, 15, 15, device=device).to(memory_format=torch.channels_last)
    target = torch.arange(32, device=device) % 9
    handle = zls.attach(model, feature="1", classifier="4", example=images)
    criterion, optimizer = zls.ZipfLoss(0.1, votes=handle), torch.optim.Adam(model.parameters(), 1e-2)
    scaler, losses = torch.amp.GradScaler("cuda", init_scale=1024), []
    with zls.use_backend(backend):
        for _ in range(30):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype):
                loss = criterion(model(images), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert scaler.get_scale() == 1024


@pytest.mark.parametrize("name", OPTIONS)
def test_runs_on_the_current_stream(backend, device, name):
    """Inputs that a slow kernel of the same stream has yet to write are waited for; no other stream is."""
    inputs, step = step_of(name, backend, 8, 50, 16, torch.bfloat16, device)
    step()
    kept = [x.detach().clone() for x in inputs]
    expected = step()
    with torch.no_grad():
        for x in inputs:
            x.zero_()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        with torch.no_grad():
            for x, old in zip(inputs, kept, strict=True):
                x.copy_(old)
        got = step()
    stream.synchronize()
    check_alike(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
@pytest.mark.parametrize("name", OPTIONS)
def test_second_device(backend, device, name):
    """Tensors decide, not the current device."""
    torch.manual_seed(1)
    there, step = step_of(name, backend, 6, 37, 16, torch.bfloat16, torch.device("cuda", 1))
    here, expected = step_of(name, backend, 6, 37, 16, torch.bfloat16, torch.device("cuda", 0))
    with torch.no_grad():
        for a, b in zip(here, there, strict=True):
            a.copy_(b)
    with torch.cuda.device(0):
        got = step()
    if name != "smoothed, weighted":  # its weights are drawn on each device
        assert all(x.device.index == 1 for x in got)
        check_alike(got, expected())


@pytest.mark.parametrize("C", [10, 1000, 70001])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_out_of_range_poisons_its_row_and_not_the_context(backend, device, C, reduction):
    case = make(6, C, 20, device=device)
    expected = case.leaf()
    options = {"reduction": "none", "backend": backend}
    zls.zipf_cross_entropy(expected, case.target, case.votes.long(), **options).sum().backward()
    for row, bad in itertools.product((0, 5), (C, 2**31 - 1, -7, 2**40)):
        target, votes = case.target.clone(), case.votes.long()
        if bad == -7:
            target[row] = bad  # a negative vote would be no vote
        elif row == 0:
            target[row] = bad
        else:
            votes[row, 3] = bad
        x = case.leaf()
        loss = zls.zipf_cross_entropy(x, target, votes, reduction=reduction, backend=backend)
        loss.sum().backward()
        torch.cuda.synchronize()  # raises if the context is lost
        poisoned = torch.arange(6, device=device) == row
        assert torch.equal(x.grad.isnan().all(1), poisoned)
        assert torch.equal(x.grad.isnan().any(1), poisoned)
        if reduction == "none":
            assert torch.equal(loss.isnan(), poisoned)
            torch.testing.assert_close(x.grad[~poisoned], expected.grad[~poisoned], rtol=0, atol=0)
        else:
            assert loss.isnan()


def assert_hundred_runs_agree(step) -> None:
    first = step()
    for _ in range(100):
        for a, b in zip(step(), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPTIONS)
def test_hundred_runs_one_result(backend, device, name):
    _, step = step_of(name, backend, 64, 1003, 32, torch.bfloat16, device)
    assert_hundred_runs_agree(step)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("N", "C"), [(16, 131072), (64, 21841)])
def test_hundred_runs_of_long_rows_one_result(backend, device, N, C, name):
    _, step = step_of(name, backend, N, C, 32, torch.bfloat16, device)
    assert_hundred_runs_agree(step)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
@pytest.mark.parametrize("upsample", [1, 2])
def test_hundred_votes_one_result(backend, device, upsample, layout):
    features = torch.randn(256, 2048, 7, 7, device=device).bfloat16()
    features = features.to(memory_format=getattr(torch, layout))
    weight = torch.randn(1000, 2048, device=device).bfloat16()
    assert_hundred_runs_agree(lambda: (zls.dense_vote(features, weight, upsample=upsample, backend=backend),))


def test_float32_votes_need_tensor_float_32(backend, device):
    """Backend "cuda" has no other float32 product: it refuses, and without a name another backend serves."""
    features, weight = torch.randn(2, 8, 3, 3, device=device), torch.randn(5, 8, device=device)
    call = functools.partial(zls.dense_vote, features, weight)
    assert call(backend=backend).shape == (2, 9)
    torch.backends.cuda.matmul.allow_tf32 = False  # what conftest allowed, and restores
    if backend == "triton":
        assert call(backend=backend).shape == (2, 9)
        return
    with pytest.raises(RuntimeError, match="fp32_precision is not 'tf32'"):
        call(backend=backend)
    with pytest.raises(RuntimeError, match="fp32_precision is not 'tf32'"):
        ops.OPERATORS["vote_fwd", backend](features, weight, None, 1)
    assert call().shape == (2, 9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "C"), [(300, 100), (1024, 1000), (129, 2049), (64, 10240), (33, 21841), (8, 131072)]
)
def test_distillation_of_large_rows(backend, device, N, C, dtype):
    """Rows that are held or streamed, aligned or not: as the reference in float64 of the rounded inputs."""
    drawn = {"generator": torch.Generator(device).manual_seed(C), "device": device, "dtype": torch.float64}
    z, t = (torch.randn(N, C, **drawn).mul_(3).to(dtype) for _ in range(2))
    y = torch.arange(N, device=device) * 17 % C
    y[1::7] = -100
    sample_weight = torch.rand(N, **drawn)
    terms = {"kd_weight": 0.3, "tckd_weight": 1.1, "nckd_weight": 2.0, "soft_target_weight": 0.4}
    for reduction, T in (("mean", 4.0), ("none", 1.0), ("sum", 1.5)):
        results = []
        for x, s, b in ((z, t, backend), (z.double(), t.double(), "reference")):
            x = x.clone().requires_grad_()
            options = {"temperature": T, "reduction": reduction, "backend": b, **terms}
            loss = zls.distillation_loss(x, s, y, sample_weight=sample_weight, **options)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), x)))
        (loss, grad), (expected, exact) = results
        bound = 1e-12 if dtype == torch.float64 else 2e-6
        size = max(1.0, expected.abs().max().item())
        assert error(loss, expected) <= bound * size, (reduction, error(loss, expected), size)
        per_row = 5.0 * T / ((y != -100).sum().item() if reduction == "mean" else 1)
        stored = 2 * torch.finfo(dtype).eps * exact.abs()
        assert ((grad.double() - exact).abs() <= bound * per_row + stored).all(), reduction


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("C", [1000, 10007, 131072])
def test_loss_past_2_31_elements(backend, device, C, distilled):
    """The last rows of more than 2^31 logits get what they get alone."""
    N = 2**31 // C + 64
    room_for(20)
    last = slice(N - 40, N)
    x = torch.empty(N, C, dtype=torch.bfloat16, device=device)
    for rows in x.split(4096):
        rows.normal_()
    target = torch.randint(C, (N,), device=device)
    votes = torch.randint(C, (N, 9), device=device, dtype=torch.int32)
    alone = x[last].clone().requires_grad_()
    teacher = x.flip(0) if distilled else None
    x.requires_grad_()

    def loss_of(logits, rows):
        options = {"reduction": "none", "backend": backend}
        if distilled:
            return zls.distillation_loss(logits, teacher[rows], target[rows], kd_weight=1.0, **options)
        return zls.zipf_cross_entropy(logits, target[rows], votes[rows], **options)

    loss = loss_of(x, slice(None))
    loss.sum().backward()
    expected = loss_of(alone, last)
    expected.sum().backward()
    torch.testing.assert_close(loss[last], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad[last], alone.grad, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("N", "D", "side", "C"),
    [(1024, 64, 16, 10000), (22000, 2048, 7, 16)],
    ids=["scores", "features"],
)
@pytest.mark.parametrize("layout", ["channels_last", "NCHW"])
def test_votes_past_2_31_elements(backend, device, N, D, side, C, layout):
    """More than 2^31 scores, or features: the last samples vote as they do alone.

    Alone another kernel may serve, which adds in another order: votes may differ where two scores tie.
    """
    room_for(20)
    features = torch.empty(N, D, side, side, dtype=torch.bfloat16, device=device)
    if layout == "channels_last":
        features = features.to(memory_format=torch.channels_last)
    for rows in features.split(512):
        rows.normal_()
    weight = torch.randn(C, D, device=device).bfloat16()
    votes = zls.dense_vote(features, weight, backend=backend)
    for part in (slice(0, 3), slice(N - 3, N)):
        alone = features[part].clone(memory_format=torch.preserve_format)
        expected = zls.dense_vote(alone, weight, backend=backend)
        scores = alone.double().flatten(2).transpose(1, 2) @ weight.double().t()
        ours, theirs = (scores.gather(2, v.long()[..., None]) for v in (votes[part], expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
        assert (votes[part] == expected).float().mean() > 0.99


def peak_of(call) -> int:
    """Peak extra memory in bytes, results included, once all that is cached is cached."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = call()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before  # asked for, not rounded up
    del result
    return peak


@pytest.mark.parametrize(("C", "mib"), [(1000, 1), (10000, 4)])
def test_votes_take_no_dense_scores(backend, device, C, mib):
    """A score and a class for each position and tile of classes; tiles of wgmma are twice as wide."""
    if torch.cuda.get_device_capability(device)[0] == 9 and C == 1000:
        mib = 0.5
    features = torch.randn(256, 2048, 7, 7, device=device).bfloat16().to(memory_format=torch.channels_last)
    weight = torch.randn(C, 2048, device=device).bfloat16()
    assert peak_of(lambda: zls.dense_vote(features, weight, backend=backend)) <= mib * (1 << 20)


@pytest.mark.parametrize("distilled", [False, True])
def test_loss_takes_its_gradient_and_no_more(backend, device, distilled):
    case = make(4096, 1000, 49, torch.bfloat16, device)
    x, teacher = case.leaf(), case.logits.flip(0)

    def call():
        if distilled:
            loss = zls.distillation_loss(x, teacher, case.target, kd_weight=1.0, backend=backend)
        else:
            loss = zls.zipf_cross_entropy(x, *case[1:], backend=backend)
        return torch.autograd.grad(loss, x)

    assert peak_of(call) <= 1.01 * x.nbytes


def test_instance_memory(backend, device):
    """As on the CPU, without synchronisation; an index outside gives NaN, and the store stays as it is."""
    torch.manual_seed(0)
    on_cpu = zls.methods.InstanceMemory(50, 8, temperature=0.2, momentum=0.5, negatives=16)
    memory = zls.methods.InstanceMemory(50, 8, temperature=0.2, momentum=0.5, negatives=16).to(device)
    memory.load_state_dict(on_cpu.state_dict())
    e, index = F.normalize(torch.randn(6, 8)), torch.tensor([3, 9, 3, 0, 49, 7])
    sampled = on_cpu.draw(index)
    results = []
    for one, where in ((on_cpu, "cpu"), (memory, device)):
        x, i, drawn = e.detach().to(where).requires_grad_(), index.to(where), sampled.to(where)
        one.draw(i)
        with no_synchronisation() if where == device else nullcontext():
            loss = one.instance_loss(x, i) + one.contrast_loss(x, x.detach().flip(1), i, sampled=drawn)
            loss.backward()
        results.append([loss.detach(), x.grad, *one.state_dict().values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-5)
    before, bad = memory.memory.clone(), torch.tensor([5, 50, -1, 2**40, 6, 7], device=device)
    x = e.to(device).requires_grad_()
    loss = memory.instance_loss(x, bad)
    loss.backward()
    torch.cuda.synchronize()  # raises if the context is lost
    assert loss.isnan()
    assert x.grad.isfinite().all(1).tolist() == [True, False, False, False, True, True]
    assert torch.equal(memory.memory[[0, 49]], before[[0, 49]])


def test_recursive_mix(backend, device):
    """A step waits for nothing: mixing, pooling, the consistency term."""
    mix = zls.methods.RecursiveMix(num_classes=37, backend=backend)
    made = [torch.randn(4, 3, 32, 32, device=device) for _ in range(3)]
    target, maps = torch.arange(4, device=device), torch.randn(4, 16, 8, 8, device=device)
    weight = torch.randn(37, 16, device=device, requires_grad=True)
    mix.draw = lambda H, W: (4, 8, 20, 30)
    for k, images in enumerate(made):
        with no_synchronisation() if k == 2 else nullcontext():  # by then every kernel is loaded
            _, soft, box = mix(images, target)
            roi_logits, logits = F.linear(mix.pool(maps, box), weight), F.linear(maps.mean((2, 3)), weight)
            (F.cross_entropy(logits, soft) + mix.consistency(roi_logits, logits)).backward()
    assert weight.grad.isfinite().all()
