"""Many processes, with gloo: class shards against the unsharded reference, DTensors, DDP and FSDP2.

Starting processes is dear, so each world size starts once and every rank runs all the checks: one test, which
names the checks that fail. A check yields (what, problem) and goes on, so that ranks stay in step.
"""

from __future__ import annotations

import copy
import itertools
import traceback
from dataclasses import dataclass
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.distributed as dist
import torch.nn.functional as F
from cases import KINDS, Case, make
from processes import spawn
from torch import nn

import zipfls_cuda as zls
from zipfls_cuda import sharded

CHECKS = {}  # name -> (function of rank and world, world sizes)


def check(*worlds):
    def register(function):
        CHECKS[function.__name__] = function, worlds
        return function

    return register


def process(rank, world, folder):
    """What a rank runs: all checks of its world size, outcomes into a file."""
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store", timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    outcome = {}
    for name, (function, worlds) in CHECKS.items():
        if world in worlds:
            torch.manual_seed(0)
            problems = []
            try:
                count = 0
                for what, problem in function(rank, world):
                    count += 1
                    problems += [f"{what}: {problem}"] if problem else []
                problems += [] if count else ["nothing was compared"]
            except Exception:
                problems.append(traceback.format_exc())
            outcome[name] = "\n".join(problems[:5])
            torch.save(outcome, f"{folder}/{rank}")
    dist.destroy_process_group()


# What checks are made of ------------------------------------------------------------------------------


def differs(actual, expected, rtol=0.0, atol=0.0) -> str:
    """How two tensors differ; empty if they do not. NaN equals NaN."""
    try:
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)
    except AssertionError as error:
        return str(error)
    return ""


def refuses(error, pattern, f, *args, **options) -> str:
    try:
        f(*args, **options)
    except error as e:
        return "" if pattern in str(e) else f"says {e}"
    except Exception as e:
        return f"raises {e!r}"
    return "raises nothing"


def alike(x) -> str:
    """Whether a tensor has the same bits on every rank."""
    others = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(others, x.detach().contiguous())
    return "".join(differs(x.detach(), other) for other in others)


def uneven(C, world):
    """Sizes of the shards: small ones first; none at all where there are few classes."""
    ends = [C * (i + 1) ** 2 // world**2 for i in range(world)]
    return tuple(b - a for a, b in zip([0, *ends], ends))


def splits(C, world):
    """Several ways to cut C classes into shards."""
    yield uneven(C, world)
    yield uneven(C, world)[::-1]
    yield tuple(len(part) for part in torch.arange(C).tensor_split(world))
    yield (0,) * (world - 1) + (C,)


def part(x, split, rank):
    """A rank's shard of the last axis."""
    return None if x is None else x.split(split, -1)[rank].contiguous()


def run(x, target, votes, upstream=None, **options):
    x = x.detach().clone().requires_grad_()
    options = {"zipf_weight": 1.0, "return_parts": True, **options}
    parts = zls.zipf_cross_entropy(x, target, votes, **options)
    parts[0].backward(torch.ones_like(parts[0]) if upstream is None else upstream)
    return *(p.detach() for p in parts), x.grad


def compared(case, split, rank, *, weight=None, upstream=None, exact=True, group=None, **options):
    """One loss of class shards against the reference of all classes: in float64, or in the same dtype."""
    got = run(
        part(case.logits, split, rank),
        case.target,
        case.votes,
        upstream,
        weight=part(weight, split, rank),
        process_group=group or dist.group.WORLD,
        **options,
    )
    whole = case.logits.double() if exact else case.logits
    expected = run(whole, case.target, case.votes, upstream, weight=weight, backend="reference", **options)
    about = f"{split} {options}"
    for name, a, b in zip(("loss", "ce", "zipf", "gradient"), got, expected, strict=True):
        b = part(b, split, rank) if name == "gradient" else b
        dtype = case.logits.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        finite = b[b.isfinite()]
        size = finite.abs().max().item() if finite.numel() else 0.0
        allowed = torch.finfo(a.dtype).eps * size + 24 * torch.finfo(wide).eps * max(size, 1.0)
        right = a.dtype == (dtype if name == "gradient" else wide)
        yield f"{name} {about}", differs(a.double(), b.double(), 0, allowed) if right else f"is {a.dtype}"


# The loss of class shards -----------------------------------------------------------------------------


@check(2, 4)
def loss_options(rank, world):
    case = make(8, 11, 6, seed=3)
    case.logits[torch.arange(4), case.target[:4]] += 8  # half of them classified correctly
    case.target[[1, 5]] = 4
    weight = torch.rand(11)
    for split, dtype in zip(splits(11, world), (torch.float64, torch.float32, torch.float32, torch.float64)):
        for reduction, smoothing, w, only_correct in itertools.product(
            ("mean", "sum", "none"), (0.0, 0.1), (None, weight), (False, True)
        ):
            yield from compared(
                case.to(dtype=dtype),
                split,
                rank,
                zipf_weight=0.3,
                reduction=reduction,
                label_smoothing=smoothing,
                weight=w,
                only_correct=only_correct,
                ignore_index=4,
            )


@check(2, 4)
def loss_shapes_and_types(rank, world):
    for kind, (C, P) in itertools.product(KINDS, ((12, 9), (6, 40))):
        yield from compared(make(5, C, P, kind=kind), uneven(C, world), rank)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for reduction in ("mean", "none"):
            case = make(6, 37, 20, dtype=dtype)
            yield from compared(case, uneven(37, world), rank, label_smoothing=0.1, reduction=reduction)
    for shape in ((3, 2, 5), (4, 3, 1), (2, 3001, 49), (3, 97, 320), (1, 7, 0), (0, 9, 4)):
        for split in splits(shape[1], world):
            yield from compared(make(*shape), split, rank)
    case = make(6, 21, 8)
    wide = Case(case.logits, case.target, case.votes.long())
    wide.votes[:, 2] = -(2**32) + 3  # no vote
    yield from compared(wide, uneven(21, world), rank)


@dataclass(frozen=True)
class Rising(zls.Distribution):
    """The more votes, the less mass: exceptions below the constant."""

    def log_mass(self, rank, num_classes):
        return rank.log()


LAWS = (
    zls.Zipf(0.5),
    zls.Zipf(30.0),
    zls.Zipf(150.0),
    zls.Constant(),
    zls.LinearDecay(0.0),
    zls.LinearDecay(0.01),
    zls.ExponentialDecay(0.7),
    Rising(),
)


@check(2, 4)
def loss_of_every_law(rank, world):
    kinds = ("peaked", "distinct", "target") if world == 2 else ("target",)  # four on two cores take long
    for law, kind in itertools.product(LAWS, kinds):
        for C in (13, 2):
            yield from compared(make(5, C, 20, kind=kind), uneven(C, world), rank, distribution=law)


def corners():
    """Rows that have broken losses: name, case."""
    for name in (
        *(
            "masked",
            "masked target",
            "all masked",
            "others masked",
            "nan",
            "nan target",
            "+inf",
            "+inf target",
        ),
        *("dominant", "hopeless", "offset", "ignored", "all ignored", "none correct", "ties", "zeros"),
    ):
        case = make(6, 10, 8, kind="some", seed=7)
        x, y = case.logits, case.target
        rows = torch.arange(6)
        if name == "masked":
            x[:3, 2:7] = x[3:, ::3] = -torch.inf
            y[:] = 8
        elif name == "masked target":
            x[rows, y] = -torch.inf
        elif name == "all masked":
            x[2] = -torch.inf
        elif name == "others masked":
            x[:3].masked_fill_(F.one_hot(y[:3], 10) == 0, -torch.inf)
            x[rows[:3], y[:3]] = torch.tensor([0.5, -500.0, 300.0])
        elif name == "nan":
            x[1, (y[1] + 3) % 10] = torch.nan
        elif name == "nan target":
            x[1, y[1]] = torch.nan
        elif name == "+inf":
            x[1, (y[1] + 3) % 10] = torch.inf
        elif name == "+inf target":
            x[1, y[1]] = torch.inf
        elif name in ("dominant", "hopeless"):
            x[rows, y] += 1e4 if name == "dominant" else -1e4
        elif name == "offset":
            x.mul_(64).round_().div_(64).add_(8192)
        elif name == "ignored":
            y[1], case.votes[1, 0] = -100, 77  # its votes are not read
        elif name == "all ignored":
            y[:] = -100
        elif name == "none correct":
            x[rows, y] = x.amin(1) - 1
        elif name == "ties":
            x[:] = x[:, :1]  # only the class 0 is a correct target
            y[:] = torch.tensor([0, 1, 9, 0, 3, 0])
        elif name == "zeros":  # -0.0 equals 0.0: the target 5 ties with an earlier class of another shard
            x[:], y[:] = -1.0, 5
            x[:, [1, 5, 9]] = torch.tensor([-0.0, 0.0, 0.0])
        yield name, case


@check(2, 4)
def loss_corners(rank, world):
    weight = torch.rand(10)
    for name, case in corners():
        ways = [{"distribution": law, "reduction": "none"} for law in LAWS[3:]]
        for zipf_weight, reduction in ((0.5, "mean"), (0.5, "none"), (0.0, "none")):
            common = {"zipf_weight": zipf_weight, "reduction": reduction}
            ways += [common, common | {"only_correct": True}]
            ways += [common | {"label_smoothing": 0.2, "weight": weight}]
        for options in ways:
            for what, problem in compared(case, uneven(10, world), rank, exact=False, **options):
                yield f"{name} {what}", problem
        for split in splits(10, world):
            x = part(case.logits, split, rank).requires_grad_()
            y = case.leaf()
            options = {"only_correct": True, "reduction": "none"}
            a = zls.zipf_loss(x, *case[1:], process_group=dist.group.WORLD, **options)
            b = zls.zipf_loss(y, *case[1:], backend="reference", **options)
            a.sum().backward()
            b.sum().backward()
            yield f"{name} alone {split}", differs(a, b, 1e-5, 1e-5)
            yield f"{name} alone gradient {split}", differs(x.grad, part(y.grad, split, rank), 1e-5, 1e-6)


def distilled(z, t, y, upstream=None, **options):
    z = z.detach().clone().requires_grad_()
    parts = zls.distillation_loss(z, t, y, return_parts=True, **options)
    parts[0].backward(torch.ones_like(parts[0]) if upstream is None else upstream)
    return *(p.detach() for p in parts), z.grad


@check(2, 4)
def distillation(rank, world):
    """Every term, form and reduction; odd rows, ignored samples, no target; against the reference."""
    terms = dict(zip(("ce", "kd", "tckd", "nckd", "soft_target"), (0.7, 0.3, 1.1, 2.0, 0.4), strict=True))
    terms = {f"{name}_weight": value for name, value in terms.items()}
    alone = {"ce_weight": 0.0, "kd_weight": 1.0}
    for name, case in (("plain", make(6, 11, 1)), ("two", make(5, 2, 1)), *corners()):
        z, y, t = case.logits, case.target, make(*case.logits.shape, 1, seed=9).logits
        C = z.shape[1]
        if name.endswith("masked"):
            t = t.masked_fill(z == -torch.inf, -torch.inf)
        split = uneven(C, world) if name != "two" else (1, 1) + (0,) * (world - 2)
        for reduction, T, form in (("mean", 4.0, "divergence"), ("none", 1.0, "cross_entropy")):
            common = {"reduction": reduction, "temperature": T, "form": form}
            weight = torch.rand(len(z), generator=torch.Generator().manual_seed(2))
            for target, w, weights in ((y, None, terms), (y, weight, terms), (None, weight, alone)):
                options = {"sample_weight": w, **common, **weights}
                shards = part(z, split, rank), part(t, split, rank), target
                got = distilled(*shards, process_group=dist.group.WORLD, **options)
                expected = distilled(z, t, target, backend="reference", **options)
                index = torch.arange(len(z)).flip(0)  # of a table, which every rank has its columns of
                table = part(t.flip(0), split, rank)
                options["teacher_index"] = index
                by_index = distilled(shards[0], table, target, process_group=dist.group.WORLD, **options)
                yield f"{name} by index", "".join(map(differs, by_index, got))
                for what, a, b in zip(("loss", "ce", "distillation", "gradient"), got, expected, strict=True):
                    b = part(b, split, rank) if what == "gradient" else b
                    size = max(1.0, b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0)
                    yield f"{name} {what} {options}", differs(a, b, 0, 1e-5 * size)
                yield f"{name} alike {options}", alike(got[0])


@check(2)
def distillation_is_refused(rank, world):
    case, group = make(4, 6, 1), dist.group.WORLD
    z, t, y = part(case.logits, (2, 4), rank), part(case.logits, (2, 4), rank), case.target
    f = zls.distillation_loss
    yield "target", refuses(IndexError, "target[1] = 6", f, z, t, y.index_fill(0, torch.tensor(1), 6),
                            process_group=group)  # fmt: skip
    shape = "teacher must have the shape of logits"
    yield "teacher", refuses(ValueError, shape, f, z, t[:, :1], y, process_group=group)
    yield "batch", refuses(ValueError, "the sum of target", f, z, t, y + rank, process_group=group)
    if "cpu" in zls.backends():
        yield "backend", refuses(RuntimeError, "class shards", f, z, t, y, process_group=group, backend="cpu")
    x, options = z.clone().requires_grad_() * 1, {"process_group": group, "inplace": True}
    yield "inplace", refuses(ValueError, "inplace must be False", f, x, t, y, **options)
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    sharded_z, sharded_t = (distribute_tensor(case.logits, mesh, [Shard(1)]) for _ in range(2))
    expected = f(case.logits, case.logits, y, kd_weight=1.0, backend="reference")
    yield "dtensor", differs(f(sharded_z, sharded_t, y, kd_weight=1.0), expected, 1e-6, 1e-6)


@check(2)
def related_methods(rank, world):
    """Under DDP: snapshots alike on all ranks and like those of one process; pairs that differ by rank."""
    torch.manual_seed(3)
    plain = nn.Linear(6, 4)
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    x, y = torch.randn(8, 6), torch.arange(8) % 4
    results = []
    for net, rows in ((plain, slice(None)), (model, slice(4 * rank, 4 * rank + 4))):
        teacher = zls.methods.SnapshotTeacher(net, every=1, copies=2)
        criterions = zls.methods.MrKDLoss(0.5, 2.0), zls.methods.DKDLoss(warmup_epochs=3)
        for epoch in range(3):
            criterions[1].set_epoch(epoch)
            logits = net(x[rows])
            loss = criterions[0](logits, teacher(x[rows]), y[rows])
            net.zero_grad()
            (loss + criterions[1](logits, logits.detach().flip(1), y[rows])).backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.1 * p.grad
            teacher.step()
        results.append(torch.cat(teacher(x)))
    yield "snapshots", differs(*results, 1e-5, 1e-6)
    yield "alike", alike(results[1])
    targets = torch.arange(20) % 3
    firsts = torch.tensor([i for batch in zls.methods.PairSampler(targets, 5) for i in batch[:5]])
    both = [torch.empty_like(firsts) for _ in range(2)]
    dist.all_gather(both, firsts)
    yield "pairs", "" if sorted(torch.cat(both).tolist()) == list(range(20)) else str(both)


@check(2)
def stores_of_methods(rank, world):
    """PS-KD's store and OLS' matrix after two steps of two ranks: those of one process with all samples."""
    z, y, index = torch.randn(2, 6, 5), torch.randint(5, (2, 6)), torch.randperm(20)[:6]
    y[0, :3] = z[0, :3].argmax(1)

    def steps(rows):
        pskd, ols = zls.methods.PSKDLoss(20, 5), zls.methods.OLSLoss(5)
        for epoch in (0, 1):
            pskd.set_epoch(epoch)
            logits = z[epoch][rows].requires_grad_()
            yield pskd(logits, index[rows], y[epoch][rows]).detach()
            yield ols(logits, y[epoch][rows]).detach()
            ols.end_epoch()
        yield from (pskd.past, ols.label_matrix)

    with mock.patch("torch.distributed.is_initialized", return_value=False):
        *losses, past, matrix = steps(slice(None))
    *of_rank, my_past, my_matrix = steps(slice(3 * rank, 3 * rank + 3))
    yield "past", differs(my_past, past)
    yield "label_matrix", differs(my_matrix, matrix, rtol=1e-6) or alike(my_matrix)
    for loss, mine in zip(losses, of_rank, strict=True):
        dist.all_reduce(mine)
        yield "loss", differs(mine / world, loss, rtol=1e-6)


class WithBox(nn.Module):
    """A network with a linear layer of its own for the box of RecursiveMix."""

    def __init__(self):
        super().__init__()
        self.body, self.fc, self.fc_box = nn.Conv2d(8, 8, 3), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x, mix, box):
        maps = self.body(x)
        return self.fc(maps.mean((2, 3))), self.fc_box(mix.pool(maps, box))


@check(2)
def related_systems(rank, world):
    """Under DDP: stores alike on all ranks and as of one process; a layer for the box trains at once."""
    torch.manual_seed(3)
    plain = nn.Linear(6, 4)
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    x, index = torch.randn(3, 8, 6), torch.stack([torch.randperm(20)[:8] for _ in range(3)])
    sampled = torch.cat([index[..., None], torch.randint(20, (3, 8, 5))], 2)
    results = []
    for net, rows in ((plain, slice(None)), (model, slice(4 * rank, 4 * rank + 4))):
        torch.manual_seed(4)
        memory = zls.methods.InstanceMemory(20, 4, temperature=0.2, momentum=0.5)
        for k in range(3):
            e, i = F.normalize(net(x[k, rows])), index[k, rows]
            loss = memory.instance_loss(e, i)
            loss = loss + memory.contrast_loss(e, e.detach().flip(1), i, sampled=sampled[k, rows])
            net.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.1 * p.grad
        results.append([*memory.state_dict().values(), *net.parameters()])
    for a, b in zip(*results, strict=True):
        yield "stores and weights", differs(b.detach(), a.detach(), 1e-5, 1e-6)
        yield "alike", alike(b.detach())

    model, mix = nn.parallel.DistributedDataParallel(WithBox()), zls.methods.RecursiveMix(num_classes=4)
    torch.manual_seed(rank)  # each rank draws its own boxes
    for _ in range(3):
        images, soft, box = mix(torch.randn(4, 8, 8, 8), torch.arange(4))
        logits, of_box = model(images, mix, box)
        model.zero_grad()
        (F.cross_entropy(logits, soft) + mix.consistency(of_box, logits)).backward()
        for name, p in model.named_parameters():
            yield name, alike(p.grad)


@check(2, 4)
def loss_is_alike_and_repeats(rank, world):
    case = make(33, 1003, 49)
    split = uneven(1003, world)
    seen = []
    for _ in range(3):
        seen.append(run(part(case.logits, split, rank), *case[1:], process_group=dist.group.WORLD))
        for x in seen[-1][:3]:
            yield "alike", alike(x)
    for other in seen[1:]:
        for a, b in zip(other, seen[0], strict=True):
            yield "repeated", "" if torch.equal(a, b) else "differs"


@check(2)
def loss_gradient_rules(rank, world):
    """Upstream gradients, kept graphs, no gradient at all; second derivatives and forward mode raise."""
    case = make(6, 11, 7)
    split = uneven(11, world)
    x = part(case.logits, split, rank)

    def loss(x, **options):
        return zls.zipf_cross_entropy(x, *case[1:], process_group=dist.group.WORLD, **options)

    yield from compared(case, split, rank, reduction="none", upstream=torch.tensor([0.0, 1, -2, 0.5, 1e4, 3]))
    yield from compared(case, split, rank, reduction="none", upstream=torch.tensor(2.5).expand(6))
    leaf = x.clone().requires_grad_()
    kept = loss(leaf) * 3
    first, second = (torch.autograd.grad(kept, leaf, retain_graph=True)[0].clone() for _ in range(2))
    yield "kept graph", "" if torch.equal(first, second) else "scaled twice"
    with torch.no_grad():
        yield "no gradient", "" if not loss(leaf).requires_grad else "is attached"
    g = torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0]
    yield "penalty", refuses(RuntimeError, "differentiated again", lambda: g.pow(2).sum().backward())
    yield "func.grad", differs(torch.func.grad(loss)(x), first / 3, 1e-6, 1e-8)
    with fwd.dual_level():
        yield "forward mode", refuses(RuntimeError, "forward-mode", loss, fwd.make_dual(x, x))
    rows = torch.func.vmap(
        lambda z, y, v: zls.zipf_loss(z[None], y[None], v[None], process_group=dist.group.WORLD)
    )
    yield "vmap", refuses(RuntimeError, "vmap", rows, x, *case[1:])

    half = make(64, 500, 20, scale=1.0)  # a float16 mean does not underflow before GradScaler
    split = uneven(500, world)
    a, b = (
        part(half.logits.half(), split, rank).requires_grad_(),
        half.logits.half().double().requires_grad_(),
    )
    (loss_of(half, a, process_group=dist.group.WORLD) * 65536).backward()
    (loss_of(half, b, backend="reference") * 65536).backward()
    yield "float16", differs(a.grad.double(), part(b.grad, split, rank), 2e-3, 1e-3)


def loss_of(case, x, **options):
    return zls.zipf_cross_entropy(x, *case[1:], **{"zipf_weight": 1.0, **options})


@check(2, 4)
def loss_out_of_range(rank, world):
    """An IndexError that names the same target or vote on every rank."""
    for argument, row, bad in (("target", 1, 9), ("target", 2, -1), ("votes", 3, 9), ("votes", 0, 2**40)):
        case = make(5, 9, 4)
        target, votes = case.target.clone(), case.votes.long()
        if argument == "target":
            target[row] = bad
        else:
            votes[row, 2] = bad
        where = f"{argument}[{row}{', 2' if argument == 'votes' else ''}] = {bad} is outside [0, 9)"
        x = part(case.logits, uneven(9, world), rank)
        call = lambda x, t, v: zls.zipf_cross_entropy(x, t, v, process_group=dist.group.WORLD)  # noqa: E731
        yield where, refuses(IndexError, where, call, x, target, votes)


@check(4)
def loss_over_a_part_of_the_ranks(rank, world):
    """Ranks of a group count, not those of the world; who is not in it is told so."""
    group, case = dist.new_group([1, 3]), make(6, 11, 7)
    x, name = case.logits[:, :4], "process_group"
    if rank in (1, 3):
        yield from compared(case, (7, 4), {1: 0, 3: 1}[rank], group=group)
    else:
        yield "outsider", refuses((ValueError, TypeError), name, loss_of, case, x, process_group=group)


# Votes of class shards --------------------------------------------------------------------------------


@check(2, 4)
def votes_of_every_kind(rank, world):
    """Small integers: scores are exact and often tie, so votes must be equal."""
    for C, dtype in itertools.product(
        (2, 13, 300), (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    ):
        features = torch.randint(-2, 3, (3, 6, 4, 5)).to(dtype)
        weight, bias = torch.randint(-2, 3, (C, 6)).to(dtype), torch.randint(-2, 3, (C,)).to(dtype)
        bias[C // 2] = -torch.inf
        if C > 2:
            weight[C // 3] = torch.nan
            features[1, :, 2, 2] = torch.nan
        for split in splits(C, world):
            shard, offsets = weight.split(split)[rank], part(bias, split, rank)
            options = {"process_group": dist.group.WORLD}
            tokens = features.flatten(2).transpose(1, 2)
            for x, b, upsample in (
                (features, bias, 1),
                (features, None, 2),
                (features, bias, 2),
                (tokens, bias, 1),
            ):
                local = None if b is None else offsets
                got = zls.dense_vote(x, shard, local, upsample=upsample, **options)
                expected = zls.dense_vote(x, weight, b, upsample=upsample, backend="reference")
                yield f"{C} {dtype} {split} {upsample}", differs(got, expected)
    yield "no vote", "" if (C, got.min()) == (300, -1) else "the case has no position of NaN alone"


@check(2, 4)
def votes_of_random_scores(rank, world):
    features, weight, bias = torch.randn(3, 64, 5, 5), torch.randn(1001, 64), torch.randn(1001)
    split = uneven(1001, world)
    exact = [x.double() for x in (features, weight, bias)]
    expected = zls.dense_vote(*exact, backend="reference")
    scores = F.linear(exact[0].flatten(2).transpose(1, 2), *exact[1:]).topk(2, -1).values
    clear = scores[..., 0] - scores[..., 1] > 1e-3
    for args in ((features, weight, bias), exact):
        shards = args[0], args[1].split(split)[rank].requires_grad_(), part(args[2], split, rank)
        votes = zls.dense_vote(*shards, process_group=dist.group.WORLD)
        yield "votes", differs(votes[clear], expected[clear])
        yield "alike", alike(votes)
        yield "detached", "requires grad" if votes.requires_grad else ""
    yield "clear", "" if clear.float().mean() > 0.9 else "the case decides too little"
    with torch.autocast("cpu", torch.bfloat16):
        votes = zls.dense_vote(
            *shards_of(features, weight, bias, split, rank), process_group=dist.group.WORLD
        )
    yield "autocast", alike(votes)
    chosen = scores_at(exact, votes)
    yield "autocast", "" if (scores[..., 0] - chosen).max() < 0.5 else "misses the best score"
    weight[[3, 700, 1000]] = weight[3] * 50  # equal rows in other shards: bitwise ties, whatever the sizes
    for split in splits(1001, world):
        votes = zls.dense_vote(
            *shards_of(features, weight, None, split, rank), process_group=dist.group.WORLD
        )
        tied = (votes == 700) | (votes == 1000)
        yield f"ties {split}", "a higher class wins" if tied.any() or not (votes == 3).any() else ""
    empty = zls.dense_vote(features[:0], weight.split(split)[rank], process_group=dist.group.WORLD)
    odd = (
        features.clone().index_fill_(1, torch.tensor(5), torch.nan),
        weight,
        None,
        1,
        torch.zeros(3, 25).long(),
    )
    yield "a score of NaN", differs(sharded._scores(*odd), torch.full((3, 25), -torch.inf))
    yield "empty", differs(empty, torch.empty(0, 25, dtype=torch.int32))


def shards_of(features, weight, bias, split, rank):
    return features, weight.split(split)[rank], part(bias, split, rank)


def scores_at(args, votes):
    scores = F.linear(args[0].flatten(2).transpose(1, 2), *args[1:])
    return scores.gather(2, votes.long()[..., None])[..., 0]


# What goes over the wire, and what is refused ---------------------------------------------------------


@check(2)
def wire(rank, world):
    """The bytes of docs/DISTRIBUTED.md, counted."""
    N, P, C, D, group = 7, 9, 20, 5, dist.group.WORLD
    case, sent = make(N, C, P), []
    split = uneven(C, world)

    def spy(function, name):
        def call(*args, **options):
            x = args[1] if name == "gather" else args[0]
            sent.append((name, x.numel() * x.element_size()))
            return function(*args, **options)

        return mock.patch.object(dist, function.__name__, call)

    def expect(what, *expected):
        got, sent[:] = list(sent), []
        yield what, "" if got == list(expected) else f"sent {got}"

    with spy(dist.all_reduce, "reduce"), spy(dist.all_gather, "gather"):
        for dtype, reductions in ((torch.bfloat16, (8,)), (torch.float32, (8,)), (torch.float64, (8, 8))):
            args = torch.randn(N, P, D, dtype=dtype), torch.randn(split[rank], D, dtype=dtype)
            zls.dense_vote(*args, process_group=group)
            yield from expect("votes", ("gather", 24), *(("reduce", b * N * P) for b in reductions))
        x = part(case.logits, split, rank).requires_grad_()
        loss = loss_of(case, x, process_group=group)
        yield from expect("loss", ("gather", 40), ("reduce", 8 * N), ("reduce", 12 * N))
        loss.backward()
        yield from expect("backward")
        w = part(torch.rand(C), split, rank)
        loss_of(case, x, weight=w, label_smoothing=0.1, only_correct=True, process_group=group)
        yield from expect("all options", ("gather", 40), ("reduce", 8 * N), ("reduce", 24 * N))


@check(2)
def refusals(rank, world):
    case, group = make(6, 11, 7), dist.group.WORLD
    x = part(case.logits, (5, 6), rank)

    def f(x=x, y=case.target, v=case.votes, **options):
        return zls.zipf_cross_entropy(x, y, v, **{"process_group": group} | options)

    yield "no votes", refuses(TypeError, "votes must be given", f, v=None)
    yield "random law", refuses(ValueError, "distribution", f, distribution=zls.RandomUniform())
    yield "backend", refuses(RuntimeError, "backend='cpu' cannot serve", f, backend="cpu")
    yield "group", refuses(TypeError, "process_group", f, process_group="gloo")
    yield "weight of all classes", refuses(ValueError, "weight must have shape", f, weight=torch.rand(11))
    yield "votes", refuses(TypeError, "votes must be int32", f, v=case.votes.float())
    yield "batches of their own", refuses(ValueError, "the sum of target", f, y=(case.target + rank) % 11)
    yield "votes of their own", refuses(ValueError, "the sum of votes", f, v=case.votes.clamp(max=10 * rank))
    yield "other sizes", refuses(ValueError, "but N is [6, 5]", f, *(t[: 6 - rank] for t in (x, *case[1:])))
    yield "one class", refuses(ValueError, "at least 2 classes", f, x[:, :1] if rank else x[:, :0])
    vote = lambda w, **o: zls.dense_vote(torch.randn(2 + rank, 3, 4), w, process_group=group, **o)  # noqa: E731
    yield "other features", refuses(ValueError, "but N is [2, 3]", vote, torch.randn(5, 4))
    yield "vote backend", refuses(ValueError, "backend must be", vote, torch.randn(5, 4), backend="gpu")
    with zls.use_backend("reference"):
        yield "reference serves", differs(f(), f(backend="reference"))


# DTensors ---------------------------------------------------------------------------------------------


@check(2, 4)
def dtensors(rank, world):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh, case = init_device_mesh("cpu", (world,)), make(6, 5 if world == 4 else 11, 7)
    C, split = case.logits.shape[1], [len(c) for c in torch.arange(case.logits.shape[1]).chunk(world)]
    split += [0] * (world - len(split))  # 5 classes on 4 ranks: 2, 2, 1 and none
    weight, group = torch.rand(C), dist.group.WORLD
    whole = distribute_tensor(case.logits, mesh, [Shard(1)])
    for votes, options in itertools.product(
        (case.votes, distribute_tensor(case.votes, mesh, [Replicate()])), ({}, {"process_group": group})
    ):
        x = whole.detach().clone().requires_grad_()
        w = distribute_tensor(weight, mesh, [Shard(0)])
        options = {"zipf_weight": 1.0, "weight": w, "label_smoothing": 0.1, **options}
        loss = zls.zipf_cross_entropy(x, case.target, votes, **options)
        loss.backward()
        expected = run(*case, weight=weight, label_smoothing=0.1, backend="reference")
        yield "loss", differs(loss.detach(), expected[0], 1e-5, 1e-6)
        yield "placements", "" if x.grad.placements == (Shard(1),) else str(x.grad.placements)
        yield "gradient", differs(x.grad.full_tensor(), expected[3], 1e-5, 1e-6)
        yield "local gradient", differs(x.grad.to_local(), part(expected[3], split, rank), 1e-5, 1e-6)
    yield "zipf_loss", differs(zls.zipf_loss(whole, *case[1:]), zls.zipf_loss(*case), 1e-5, 1e-6)

    features, W, b = (
        torch.randint(-2, 3, (2, 4, 3, 3)).float(),
        torch.randint(-2, 3, (C, 4)).float(),
        torch.randn(C),
    )
    shards = [distribute_tensor(x, mesh, [Shard(0)]) for x in (W, b)]
    shards[0].requires_grad_()
    replicated = distribute_tensor(features, mesh, [Replicate()])
    expected = zls.dense_vote(features, W, b, backend="reference")
    yield "votes", differs(zls.dense_vote(replicated, *shards), expected)
    yield (
        "votes of plain features",
        differs(zls.dense_vote(features, *shards, process_group=group), expected),
    )

    # Read raw, these would give some ranks' classes for all.
    yield "FSDP2's weight", refuses(TypeError, "weight is a DTensor", zls.dense_vote, features, *shards)
    rows = distribute_tensor(torch.randn(4, C), mesh, [Shard(0)])
    y = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.int32)
    yield "rows", refuses(TypeError, "logits is a DTensor", zls.zipf_loss, rows, *y)
    yield (
        "rows in a group",
        refuses(ValueError, "logits is a DTensor placed", zls.zipf_loss, rows, *y, process_group=group),
    )
    copies = distribute_tensor(case.logits, mesh, [Replicate()])
    yield "copies", refuses(TypeError, "logits is a DTensor", zls.zipf_loss, copies, *case[1:])
    t = distribute_tensor(case.target, mesh, [Shard(0)])
    yield "target", refuses(ValueError, "target is a DTensor placed", zls.zipf_loss, whole, t, case.votes)
    v = distribute_tensor(case.votes, mesh, [Shard(0)])
    yield (
        "votes shards",
        refuses(ValueError, "votes is a DTensor placed", zls.zipf_loss, whole, case.target, v),
    )
    f = distribute_tensor(features, mesh, [Shard(0)])
    yield "features", refuses(ValueError, "features is a DTensor placed", zls.dense_vote, f, *shards)
    other = dist.new_group([0])
    if rank == 0:
        yield (
            "other group",
            refuses(ValueError, "other ranks", zls.zipf_loss, whole, *case[1:], process_group=other),
        )
    if world == 4:  # classes over one dimension of a mesh, copies over the other
        mesh = init_device_mesh("cpu", (2, 2))
        x = distribute_tensor(case.logits, mesh, [Replicate(), Shard(1)]).requires_grad_()
        zls.zipf_cross_entropy(x, *case[1:], zipf_weight=1.0).backward()
        yield "two dimensions", differs(x.grad.full_tensor(), run(*case, backend="reference")[3], 1e-5, 1e-6)


# Training ---------------------------------------------------------------------------------------------


@check(2)
def class_parallel_training(rank, world):
    """Three steps of a classifier in shards, through the module: the weights stay slices of the whole."""
    split, group = uneven(9, world), dist.group.WORLD
    features, target = torch.randn(6, 5, 3, 3), torch.randint(9, (6,))
    whole, deep = torch.randn(9, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    shards = [x.detach().split(split)[rank].clone().requires_grad_() for x in (whole, deep)]
    class_weight = torch.rand(9)
    settings = {"label_smoothing": 0.1, "zipf_weight": 0.5}
    one = zls.ZipfLoss(weight=class_weight, **settings)
    many = zls.ZipfLoss(weight=part(class_weight, split, rank), process_group=group, **settings)
    for step in range(3):
        losses = []
        for criterion, weights, options in (
            (one, (whole, deep), {}),
            (many, shards, {"process_group": group}),
        ):
            x = features.clone().requires_grad_()
            votes = zls.dense_vote(x, weights[0], **options)
            loss = criterion(
                (F.linear(x.mean((2, 3)), weights[0]), votes, F.linear(x.mean((2, 3)), weights[1])), target
            )
            loss.backward()
            for w in weights:
                w.data -= 0.5 * w.grad
                w.grad = None
            if options:
                dist.all_reduce(x.grad)  # features' gradients from each shard of classes add up
            losses.append((loss.detach(), votes, x.grad))
        for a, b in zip(*losses, strict=True):
            yield f"step {step}", differs(a, b, 1e-5, 1e-6)
        for a, b in zip((whole, deep), shards, strict=True):
            yield f"weight {step}", differs(b.detach(), a.detach().split(split)[rank], 1e-5, 1e-6)


@check(2)
def class_parallel_backbone(rank, world):
    """The step of docs/DISTRIBUTED.md: a DDP backbone below class shards gets the whole batch's gradient."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (world,))

    def gathered(x):
        x = DTensor.from_local(x, mesh, [Shard(0)]).redistribute(mesh, [Replicate()])
        return x.to_local(grad_placements=[Partial()])

    group, split = dist.group.WORLD, uneven(9, world)
    images, target = torch.randn(4 * world, 3, 8, 8), torch.randint(9, (4 * world,))
    one, head = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 9)
    backbone = nn.parallel.DistributedDataParallel(copy.deepcopy(one))
    shard = nn.Linear(8, split[rank])
    shard.weight.data, shard.bias.data = (
        head.weight.detach().split(split)[rank],
        part(head.bias.detach(), split, rank),
    )

    mine = slice(4 * rank, 4 * rank + 4)
    maps = backbone(images[mine])
    pooled = gathered(maps.mean((2, 3)))
    pooled.register_hook(lambda grad: grad * dist.get_world_size(group))
    y = gathered(target[mine])
    votes = zls.dense_vote(gathered(maps.detach()), shard.weight, shard.bias, process_group=group)
    loss = zls.ZipfLoss(process_group=group)((shard(pooled), votes), y)
    loss.backward()

    expected = zls.zipf_head_loss(one(images), head.weight, head.bias, target)
    expected.backward()
    yield "loss", differs(loss.detach(), expected.detach(), 1e-5, 1e-6)
    yield "shard", differs(shard.weight.grad, head.weight.grad.split(split)[rank], 1e-5, 1e-6)
    yield "backbone", differs(backbone.module.weight.grad, one.weight.grad, 1e-4, 1e-6)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU())
        self.fc = nn.Linear(16, 7)

    def forward(self, x):
        return self.fc(self.stage(x).mean((2, 3)))


def trained(rank, world, wrap, whole):
    """Three steps of an attached model, part of the batch each, against one process with the whole batch."""
    X, y = torch.randn(4 * world, 3, 20, 20), torch.randint(7, (4 * world,))
    twin = Small().train()
    twins = zls.ZipfLoss(0.5, votes=zls.attach(twin, feature="stage", classifier="fc", example=X))
    model, criterion = copy.deepcopy((twin, twins))
    model, mine = wrap(model), slice(4 * rank, 4 * rank + 4)
    both = [
        (m, loss, torch.optim.SGD(m.parameters(), 0.1)) for m, loss in ((model, criterion), (twin, twins))
    ]
    for step in range(3):
        votes = []
        for (m, loss, optimizer), rows in zip(both, (mine, slice(None)), strict=True):
            out = m(X[rows])
            optimizer.zero_grad()
            loss(out, y[rows]).backward()
            votes.append(loss.votes.votes_of(out)[0])
            optimizer.step()
        yield f"votes {step}", differs(votes[0], votes[1][mine])
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            yield f"gradient of {name} {step}", differs(whole(p.grad), q.grad, 1e-4, 1e-6)
            yield f"{name} {step}", differs(whole(p.detach()), q.detach(), 1e-4, 1e-6)
    yield "eval", "" if isinstance(model.eval()(X[mine]), torch.Tensor) else "does not give plain logits"


@check(2)
def ddp(rank, world):
    yield from trained(rank, world, nn.parallel.DistributedDataParallel, lambda x: x)


@check(2)
def fsdp2(rank, world):
    from torch.distributed.fsdp import fully_shard

    def wrap(model):
        fully_shard(model.stage)
        fully_shard(model.fc)
        return fully_shard(model)

    yield from trained(rank, world, wrap, lambda x: x.full_tensor())
    model = wrap(Small())
    yield (
        "raw",
        refuses(TypeError, "weight is a DTensor", zls.dense_vote, torch.randn(2, 16, 3, 3), model.fc.weight),
    )


class Headed(nn.Module):
    """A model whose forward ends with the loss: its head's logits never exist whole."""

    def __init__(self):
        super().__init__()
        self.stage = nn.Sequential(nn.Linear(9, 16), nn.ReLU())
        self.fc = nn.Linear(16, 40)

    def forward(self, x, target):
        return zls.linear_zipf_cross_entropy(
            self.stage(x), self.fc.weight, target, linear_bias=self.fc.bias, chunk_rows=3, zipf_weight=0.5
        )


@check(2)
def linear_loss_in_forward(rank, world):
    """DDP, and FSDP2 with the head in the root's group, against one process with the whole batch."""
    from torch.distributed.fsdp import fully_shard

    def sharded_model(model):
        fully_shard(model.stage)
        return fully_shard(model)

    X, y = torch.randn(8 * world, 9), torch.randint(40, (8 * world,))
    mine = slice(8 * rank, 8 * rank + 8)
    for wrap in (nn.parallel.DistributedDataParallel, sharded_model):
        twin = Headed()
        model = wrap(copy.deepcopy(twin))
        both = [(m, torch.optim.SGD(m.parameters(), 0.1)) for m in (model, twin)]
        for step in range(3):
            for (m, optimizer), rows in zip(both, (mine, slice(None)), strict=True):
                optimizer.zero_grad()
                m(X[rows], y[rows]).backward()
                optimizer.step()
            for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
                grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                yield f"{wrap.__name__}, {name} {step}", differs(grad, q.grad, 1e-4, 1e-6)
    model = Headed()
    fully_shard(model.fc)
    fully_shard(model)
    yield "a head of its own group", refuses(TypeError, "linear_weight is a DTensor", model, X, y)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_distributed(tmp_path, world):
    spawn(process, (world, str(tmp_path)), world)
    problems = [
        f"{name}, rank {rank}: {outcome.get(name, 'not reached')}"
        for rank, outcome in enumerate(torch.load(tmp_path / str(rank)) for rank in range(world))
        for name, (_, worlds) in CHECKS.items()
        if world in worlds and outcome.get(name, "not reached")
    ]
    assert not problems, "\n".join(problems)
