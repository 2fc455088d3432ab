"""zls.methods: the authors' outputs, settings, errors, schedules, samplers and snapshots."""

from __future__ import annotations

import collections
import copy
import doctest
import inspect
import pickle

import golden_methods
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import zipfls_cuda as zls
from zipfls_cuda import methods, ops

LOSSES = {
    methods.KDLoss: {},
    methods.DKDLoss: {"warmup_epochs": 0},
    methods.NKDLoss: {},
    methods.WSLDLoss: {},
    methods.CSKDLoss: {},
    methods.TfKDSelfLoss: {},
    methods.MrKDLoss: {"alpha": 0.5, "temperature": 4.0},
}
every_loss = pytest.mark.parametrize("Loss", LOSSES, ids=lambda Loss: Loss.__name__)


def make(N=5, C=9, dtype=torch.float32):
    """(logits, teacher, target)"""
    g = torch.Generator().manual_seed(1)
    z, t = (torch.randn(N, C, generator=g, dtype=torch.float64).to(dtype) * 2 for _ in range(2))
    return z, t, torch.randint(C, (N,), generator=g)


def given(Loss, teacher):
    """The teacher as the loss takes it."""
    return [teacher, teacher.flip(0)] if Loss is methods.MrKDLoss else teacher


# The authors' outputs -------------------------------------------------------------------------------------


def dkd(p):
    criterion = methods.DKDLoss(
        p["temperature"], p["alpha"], p["beta"], p.get("ce_weight", 0), p.get("warmup", 0)
    )
    criterion.set_epoch(p.get("epoch", 1) - 1)
    return criterion


AUTHORS = {
    "mdistiller_kd": lambda p: methods.KDLoss(p["temperature"], 0, 1),
    "mdistiller_kd_total": lambda p: methods.KDLoss(**p),
    "mdistiller_dkd": dkd,
    "mdistiller_dkd_total": dkd,
    "nkd": lambda p: methods.NKDLoss(p["temp"], p["gamma"], 0),
    "wsld": lambda p: methods.WSLDLoss(p["temp"], p["alpha"], 0),
    "zipfls_cskd": lambda p: methods.CSKDLoss(p["temp_factor"], ce_weight=0),
    "cskd_step": lambda p: methods.CSKDLoss(p["temp"], p["lamda"]),
    "tfkd_self": lambda p: methods.TfKDSelfLoss(**p),
    "tfkd_kd": lambda p: methods.TfKDSelfLoss(**p, multiplier=1),
    "mrkd": lambda p: methods.MrKDLoss(p["alpha"], p["T"]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("function", AUTHORS)
def test_golden(backend, device, function, dtype):
    if reason := ops.refusal(backend, "distill_fwd", device.type, dtype):
        pytest.skip(f"{backend}: {reason}")
    for golden in golden_methods.cases(function):
        a = golden.inputs(dtype, device)
        x, teacher = a["logits"].requires_grad_(), a["teacher"]
        criterion = AUTHORS[function](golden.meta["params"])
        criterion.backend = backend
        loss = criterion(x, [teacher, teacher.roll(1, 0)] if function == "mrkd" else teacher, a["target"])
        loss.backward()
        golden.check("loss", loss)
        golden.check("grad", x.grad)


# What all have in common ------------------------------------------------------------------------------------


def test_names_and_defaults():
    def defaults(f):
        return {k: p.default for k, p in inspect.signature(f).parameters.items() if p.default is not p.empty}

    tail = {"ignore_index": -100, "reduction": "mean", "backend": None}
    expected = {
        methods.KDLoss: {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9},
        methods.DKDLoss: {
            **{"temperature": 4.0, "alpha": 1.0, "beta": 8.0, "ce_weight": 1.0, "warmup_epochs": 20},
        },
        methods.NKDLoss: {"temperature": 1.0, "gamma": 1.5, "ce_weight": 1.0},
        methods.WSLDLoss: {"temperature": 2.0, "alpha": 2.5, "ce_weight": 1.0},
        methods.CSKDLoss: {"temperature": 4.0, "kd_weight": 1.0, "ce_weight": 1.0},
        methods.TfKDSelfLoss: {"alpha": 0.95, "temperature": 6.0, "multiplier": 50.0},
        methods.MrKDLoss: {},
    }
    for Loss, settings in expected.items():
        assert list(defaults(Loss).items()) == list({**settings, **tail}.items())
    pairs = {"generator": None, "num_replicas": None, "rank": None}
    assert defaults(methods.PairSampler) == pairs
    assert defaults(methods.SnapshotTeacher) == {"copies": 1}
    assert {Loss.__name__ for Loss in LOSSES} | {"PairSampler", "SnapshotTeacher"} <= set(methods.__all__)


@pytest.mark.parametrize("name", ["", *methods.__all__])
def test_examples(name):
    item = getattr(methods, name) if name else methods
    tests = doctest.DocTestFinder(recurse=False).find(
        item, name or "methods", globs={"zls": zls, "torch": torch}
    )
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert any(test.examples for test in tests)
    assert sum(runner.run(test).failed for test in tests) == 0


@every_loss
def test_reductions_and_ignored_samples(Loss):
    z, t, y = make()
    y[1] = 3
    options = {**LOSSES[Loss], "ignore_index": 3}
    rows = Loss(**options, reduction="none")(z, given(Loss, t), y)
    assert rows.shape == (5,)
    assert (rows[y == 3] == 0).all()
    torch.testing.assert_close(Loss(**options, reduction="sum")(z, given(Loss, t), y), rows.sum())
    torch.testing.assert_close(Loss(**options)(z, given(Loss, t), y), rows.sum() / (y != 3).sum())
    with pytest.raises(ValueError, match="reduction must be one of"):
        Loss(**LOSSES[Loss], reduction="avg")
    with pytest.raises(RuntimeError, match="backend='cuda' cannot serve"):
        Loss(**LOSSES[Loss], backend="cuda")(z, given(Loss, t), y)


@every_loss
def test_no_gradient_reaches_the_teacher(Loss):
    z, t, y = make()
    x, s = z.requires_grad_(), t.requires_grad_()
    Loss(**LOSSES[Loss])(x, given(Loss, s), y).backward()
    assert x.grad.isfinite().all()
    assert s.grad is None


@every_loss
def test_is_a_module(Loss):
    criterion = Loss(**LOSSES[Loss], reduction="sum")
    z, t, y = make()
    assert "reduction='sum'" in repr(criterion)
    for name, p in inspect.signature(Loss).parameters.items():
        shown = name in ("ignore_index", "backend") or f"{name}={getattr(criterion, name)!r}" in repr(
            criterion
        )
        assert shown, (name, p, repr(criterion))
    assert not list(criterion.parameters())
    expected = criterion(z, given(Loss, t), y)
    for same in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(same(z, given(Loss, t), y), expected)


@every_loss
def test_compiles_as_one_graph(Loss):
    criterion, (z, t, y) = Loss(**LOSSES[Loss]), make()
    torch._dynamo.reset()
    grads = []
    for f in (criterion, torch.compile(criterion, backend="aot_eager", fullgraph=True)):
        x = z.clone().requires_grad_()
        f(x * 2, given(Loss, t), y).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@every_loss
def test_a_setting_that_is_wrong_is_named(Loss):
    for name in set(inspect.signature(Loss).parameters) - {"ignore_index", "reduction", "backend"}:
        with pytest.raises(ValueError, match=f"{name} must be"):
            Loss(**{**LOSSES[Loss], name: float("nan")})
        with pytest.raises(TypeError, match=f"{name} must be a number, got str"):
            Loss(**{**LOSSES[Loss], name: "1"})
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        Loss(**{**LOSSES[Loss], "temperature": 0})


@every_loss
def test_a_teacher_that_is_wrong_is_named(Loss):
    z, t, y = make()
    with pytest.raises(ValueError, match=r"teacher must have the shape of logits, \(5, 9\), got \(5, 8\)"):
        Loss(**LOSSES[Loss])(z, given(Loss, t[:, :8]), y)


# Each by itself ---------------------------------------------------------------------------------------------


def test_dkd_warms_up_from_the_first_epoch():
    """By 1/W, 2/W, ... to 1 (METHODS: the first epoch is not without distillation)."""
    z, t, y = make(dtype=torch.float64)
    criterion, ce = methods.DKDLoss(warmup_epochs=4), F.cross_entropy(z, y)
    whole = methods.DKDLoss(warmup_epochs=0)(z, t, y) - ce
    for epoch, warm in enumerate((0.25, 0.5, 0.75, 1.0, 1.0)):
        criterion.set_epoch(epoch)
        torch.testing.assert_close(criterion(z, t, y), ce + warm * whole, rtol=1e-12, atol=0)
    criterion.set_epoch(0)
    torch.testing.assert_close(criterion.eval()(z, t, y), ce + whole)


def test_dkd_wants_the_epoch():
    z, t, y = make()
    criterion = methods.DKDLoss()
    with pytest.raises(RuntimeError, match=r"set_epoch was never called: call criterion.set_epoch\(epoch\)"):
        criterion(z, t, y)
    criterion.eval()(z, t, y)
    for epoch, error in ((-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="epoch must be"):
            criterion.set_epoch(epoch)


def test_dkd_resumes():
    z, t, y = make()
    criterion = methods.DKDLoss()
    untold = criterion.state_dict()
    criterion.set_epoch(2)
    resumed = methods.DKDLoss()
    resumed.load_state_dict(criterion.state_dict())
    assert torch.equal(resumed(z, t, y), criterion(z, t, y))
    resumed = methods.DKDLoss()
    resumed.load_state_dict({k: torch.full_like(v, -1) for k, v in untold.items()})
    with pytest.raises(RuntimeError, match="set_epoch was never called"):
        resumed(z, t, y)


def test_one_graph_serves_every_epoch():
    z, t, y = make()
    torch._dynamo.reset()
    criterion = methods.DKDLoss(warmup_epochs=20)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    for epoch in range(12):
        criterion.set_epoch(epoch)
        torch.testing.assert_close(compiled(z, t, y), criterion(z, t, y))
    assert counter.frame_count == 1


def test_wsld_weighs_by_the_ratio_of_cross_entropies():
    z, t, y = make(dtype=torch.float64)
    ce, of_teacher = (F.cross_entropy(x, y, reduction="none") for x in (z, t))
    weight = 1 - (-ce / (of_teacher + 1e-7)).exp()
    soft = -((t / 2).softmax(1) * (z / 2).log_softmax(1)).sum(1)
    expected = ce + 2.5 * 4 * weight * soft
    torch.testing.assert_close(methods.WSLDLoss(reduction="none")(z, t, y), expected)
    low = methods.WSLDLoss(reduction="none")(z, t.bfloat16(), y)
    assert low.dtype == torch.float64


def test_mrkd_before_the_first_copy_and_with_several():
    z, t, y = make()
    criterion = methods.MrKDLoss(0.3, 2.0)
    torch.testing.assert_close(criterion(z, [], y), F.cross_entropy(z, y))
    copies = [t, t.flip(0), t * 2]
    losses = [criterion(z, [one], y) for one in copies]
    torch.testing.assert_close(criterion(z, copies, y), torch.stack(losses).mean())
    with pytest.raises(TypeError, match="teachers must be a list of logits, got Tensor"):
        criterion(z, t, y)


# Pairs ----------------------------------------------------------------------------------------------------


def test_pairs_are_of_one_class_and_an_epoch_visits_all():
    targets = torch.tensor([3, 1, 3, 7, 1, 3, 3, 9])
    sampler = methods.PairSampler(targets, 3)
    partners = collections.defaultdict(set)
    for _ in range(60):
        batches = list(sampler)
        assert [len(b) for b in batches] == [6, 6, 4]
        assert len(batches) == len(sampler)
        firsts = [i for b in batches for i in b[: len(b) // 2]]
        seconds = [i for b in batches for i in b[len(b) // 2 :]]
        assert sorted(firsts) == list(range(8))
        assert torch.equal(targets[firsts], targets[seconds])
        for first, second in zip(firsts, seconds, strict=True):
            partners[first].add(second)
    members = {i: {j for j in range(8) if targets[j] == targets[i]} for i in range(8)}
    assert partners == members, "any sample of the class may be the partner"
    assert firsts != list(range(8)), "in random order"


def test_one_seed_gives_one_epoch():
    targets = torch.arange(40) % 4
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        own = torch.Generator().manual_seed(7)
        draws.append(
            [list(methods.PairSampler(targets, 8)), list(methods.PairSampler(targets, 8, generator=own))]
        )
    assert draws[0] == draws[1]
    assert draws[0][0] != draws[0][1]


def test_pairs_over_ranks():
    targets = (torch.arange(22) % 4).tolist()
    for seed in (None, 3):
        epochs = []
        for epoch in (0, 1):
            firsts = []
            for rank in range(4):
                generator = None if seed is None else torch.Generator().manual_seed(seed + epoch)
                sampler = methods.PairSampler(targets, 4, generator=generator, num_replicas=4, rank=rank)
                sampler.set_epoch(epoch)
                batches = list(sampler)
                assert [len(b) // 2 for b in batches] == [4, 2]
                assert len(sampler) == 2
                firsts += [i for b in batches for i in b[: len(b) // 2]]
                assert all(targets[i] == targets[j] for b in batches
                           for i, j in zip(b, b[len(b) // 2 :]))  # fmt: skip
            assert set(firsts) == set(range(22))
            assert len(firsts) == 24
            epochs.append(firsts)
        assert epochs[0] != epochs[1]
    few = [list(methods.PairSampler([0, 1], 1, num_replicas=5, rank=r)) for r in range(5)]
    assert all(len(batches) == 1 for batches in few), "more ranks than samples"


def test_pairs_in_a_data_loader():
    data = torch.utils.data.TensorDataset(torch.arange(12.0), torch.arange(12) % 3)
    loader = torch.utils.data.DataLoader(data, batch_sampler=methods.PairSampler(data.tensors[1], 4))
    assert len(loader) == 3
    for _, y in loader:
        assert torch.equal(y[:4], y[4:])


def test_pairs_take_the_ranks_of_the_default_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sampler = methods.PairSampler([0, 0, 1], 2)
        assert (sampler.num_replicas, sampler.rank) == (1, 0)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.5], 1), TypeError, "targets must be integers, got torch.float32"),
        (([[0]], 1), ValueError, r"targets must have shape \(M,\) with M >= 1, got \(1, 1\)"),
        (([], 1), ValueError, "targets must have shape"),
        (([0], 0), ValueError, "batch_size must be at least 1, got 0"),
        (([0], 1.5), TypeError, "batch_size must be an int"),
        (([0], 1, 0, 0), ValueError, "num_replicas must be at least 1"),
        (([0], 1, 2, 2), ValueError, "rank must be below num_replicas=2, got 2"),
        (([0], 1, 2, -1), ValueError, "rank must be at least 0"),
    ],
)
def test_bad_pairs_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        methods.PairSampler(*arguments[:2], **dict(zip(("num_replicas", "rank"), arguments[2:])))


# Snapshots ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Has a buffer that training changes, dropout, and an output with .logits if asked for."""

    def __init__(self, wraps=False):
        super().__init__()
        self.norm, self.drop, self.fc, self.wraps = nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4), wraps

    def forward(self, x, scale=1.0):
        logits = self.fc(self.drop(self.norm(x))) * scale
        return collections.namedtuple("Output", "logits")(logits) if self.wraps else logits


def advance(model):
    """Other weights and statistics, as an epoch gives."""
    model.train()(torch.randn(8, 6))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))


def eval_logits(model, x):
    with torch.no_grad():
        out = copy.deepcopy(model).eval()(x)
        return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("wraps", [False, True])
def test_snapshots(wraps):
    model, x = Net(wraps), torch.randn(8, 6)
    teacher, taken = methods.SnapshotTeacher(model, every=3, copies=2), []
    for epoch in range(1, 13):
        advance(model)
        teacher.train()
        teacher.step()
        if epoch % 3 == 0:
            taken.append(eval_logits(model, x))
        got = teacher(x)
        assert len(got) == min(len(taken), 2)
        for a, b in zip(got, taken[-2:]):
            assert torch.equal(a, b), "oldest first, in eval mode, unchanged by training"
            assert not a.requires_grad
    assert torch.equal(teacher(x, scale=2.0)[0], 2 * taken[-2])
    assert not any(p.requires_grad for p in teacher.parameters())
    assert model.training
    assert not any("_model" in name for name in teacher.state_dict()), "the model is not the teacher's"
    assert all(p.requires_grad for p in model.parameters())


def test_snapshots_resume_exactly():
    model, x = Net(), torch.randn(8, 6)
    teacher = methods.SnapshotTeacher(model, every=2, copies=2)
    for _ in range(5):
        advance(model)
        teacher.step()
    again = methods.SnapshotTeacher(copy.deepcopy(model), every=2, copies=2)
    again.load_state_dict(teacher.state_dict())
    for a, b in zip(again(x), teacher(x), strict=True):
        assert torch.equal(a, b)
    advance(model)
    again._model[0].load_state_dict(model.state_dict())
    for one in (teacher, again):
        one.step()
    assert len(teacher(x)) == 2
    for a, b in zip(again(x), teacher(x), strict=True):
        assert torch.equal(a, b)


def test_snapshots_in_training():
    """With MrKD, of an attached and of a compiled model: the copies' forwards leave no votes."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    handle = zls.attach(model, feature="1", classifier="4")
    criterion, zipf = methods.MrKDLoss(0.5, 4.0), zls.ZipfLoss(votes=handle)
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    for one in (model, torch.compile(model, backend="eager")):
        teacher = methods.SnapshotTeacher(one, every=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            logits = model(x)
            loss = criterion(logits, teacher(x), y) + zipf(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            teacher.step()
        assert loss.isfinite()
        assert torch.equal(teacher(x)[0], model.eval()(x))
        model.train()


def test_bad_snapshots_are_named():
    for error, message, arguments in (
        (TypeError, "model must be a torch.nn.Module, got int", {"model": 3, "every": 1}),
        (ValueError, "every must be at least 1, got 0", {"model": Net(), "every": 0}),
        (ValueError, "copies must be at least 1, got 0", {"model": Net(), "every": 1, "copies": 0}),
        (TypeError, "every must be an int, got float", {"model": Net(), "every": 1.5}),
    ):
        with pytest.raises(error, match=message):
            methods.SnapshotTeacher(**arguments)


def test_sharded_parameters_are_refused():
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(nn.Linear(3, 4), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=r"parameters that are DTensors \(FSDP2\)"):
            methods.SnapshotTeacher(model, every=1)
    finally:
        dist.destroy_process_group()
