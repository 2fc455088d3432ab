"""Class shards: votes and loss of a classifier whose classes are spread over the ranks of a process group.

Each of W ranks has a contiguous range of the C classes, in rank order, of any size or none: logits (N, C/W),
weight (C/W, D), class weights (C/W,). Features, target and votes are global and alike on all ranks.
Plain PyTorch, next to docs/MATH.md; ``reference`` decides what a corner case means.

* Votes: the local ``dense_vote`` finds a position's best class of this rank, a dot product finds its score
  again, and a max-reduction of (score, class) keys finds the best of all. 8 bytes a position.
* Loss: each rank works out the whole label from the votes, as a constant and at most P exceptions. It lacks
  sums over all classes: a max-reduction gives m (8 bytes a sample), a sum-reduction of sums over z - m gives
  the rest (12 bytes a sample, 24 with every option). All-gathering (m, sums) instead would be one collective,
  of W / 2 times the bytes.
* Gradient: each rank writes its own shard. No collective.

Every call first gathers a table of the shards' sizes (40 bytes a rank at most), which the host reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import checks, compiling, ops, reference
from .labels import Distribution, RandomDistribution


@dataclass(frozen=True)
class Shard:
    """The classes [offset, offset + width) out of num_classes, and the group that holds the others."""

    group: dist.ProcessGroup
    offset: int
    width: int
    num_classes: int

    def columns(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Local columns of classes (int64), and which of them are here (bool); the others get any column."""
        column = classes - self.offset
        here = (column >= 0) & (column < self.width)
        return column.clamp(0, max(self.width - 1, 0)), here

    def pick(self, x: Tensor, classes: Tensor) -> Tensor:
        """x (N, C/W) at the classes (N, K): (N, K), 0 where a class is not here."""
        if not self.width:
            return x.new_zeros(classes.shape)
        column, here = self.columns(classes)
        return x.gather(1, column).masked_fill(~here, 0)

    def mark(self, classes: Tensor) -> Tensor:
        """(N, C/W) bool: True at those of the classes (N, K) that are here."""
        column, here = self.columns(classes)
        marks = torch.zeros(len(classes), self.width + 1, dtype=torch.bool, device=classes.device)
        return marks.scatter_(1, column.where(here, self.width), True)[:, : self.width]


# Arguments -------------------------------------------------------------------------------------------


def _local(
    name: str, x: Tensor, dim: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, dist.ProcessGroup | None]:
    """The shard of ``x`` on this rank and the group that its shards are spread over."""
    if not checks.is_dtensor(x):
        return x, group
    sharded = [i for i, p in enumerate(x.placements) if type(p).__name__ == "Shard" and p.dim == dim]
    if len(sharded) != 1 or not all(p.is_replicate() or i in sharded for i, p in enumerate(x.placements)):
        raise ValueError(
            f"{name} is a DTensor placed {x.placements}; expected are class shards, Shard({dim}), over one "
            "dimension of its mesh and replicas over the others"
        )
    of_mesh = x.device_mesh.get_group(sharded[0])
    if group is not None and dist.get_process_group_ranks(group) != dist.get_process_group_ranks(of_mesh):
        raise ValueError(f"{name} is a DTensor sharded over other ranks than those of process_group")
    return x.to_local(), of_mesh


def _replica(name: str, x: Tensor | None) -> Tensor | None:
    """``x`` as a plain tensor that is the same on every rank."""
    if not checks.is_dtensor(x):
        return x
    if not all(p.is_replicate() for p in x.placements):
        raise ValueError(f"{name} is a DTensor placed {x.placements}; it must be replicated over the mesh")
    return x.to_local()


def _shard(group: dist.ProcessGroup, width: int, N: int, P: int, *same: Tensor) -> Shard:
    """This rank's place among the shards: offsets by an exclusive scan of the widths. One small all-gather.

    Args:
        width: classes on this rank. N, P: sizes that all ranks must have alike.
        same: tensors that all ranks must have alike, the first on the group's device; integers by their sum.

    Raises:
        TypeError, ValueError: on every rank alike.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    rank, W, device = dist.get_rank(group), dist.get_world_size(group), same[0].device
    if rank < 0:
        raise ValueError("process_group must have this process as a member")
    sums = [x.sum().reshape(1) for x in same if not x.is_floating_point()]
    mine = torch.cat([torch.tensor([width, N, P], dtype=torch.int64, device=device), *sums])
    _refuse_vmap(mine)
    gathered = [torch.empty_like(mine) for _ in range(W)]
    dist.all_gather(gathered, mine, group=group)
    widths, *alike = torch.stack(gathered).t().tolist()
    for what, values in zip(("N", "P", "the sum of target", "the sum of votes"), alike):
        if len(set(values)) > 1:
            raise ValueError(
                f"the batch must be the same on every rank of process_group, but {what} is {values} by rank"
            )
    if sum(widths) < 2:
        raise ValueError(f"the class shards must have at least 2 classes together, got {widths}")
    return Shard(group, sum(widths[:rank]), width, sum(widths))


# The reductions --------------------------------------------------------------------------------------


_LOW = (1 << 32) - 1
_NONE = torch.iinfo(torch.int64).min  # the key of no class: below that of a score of -inf


def _ordered(bits: Tensor) -> Tensor:
    """Bits of floats as signed integers in the floats' order, and back again. NaN excepted."""
    info = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


def _best_of_all(score: Tensor, class_: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The largest score over the ranks and its class, the lowest on ties; (-inf, -1) where no rank has one.

    Args:
        score: any shape, float32 or float64, no NaN. class_: int64, < 2^31; negative: none on this rank.

    A key has the float32 score in its high word and the class's complement in the low one: the larger key is
    the larger score or the lower class. A float64 score fills the key, so the class takes a second reduction.
    """
    score, no_vote = score + 0.0, class_ < 0  # -0.0 becomes 0.0
    if score.dtype == torch.float64:
        mine = _ordered(score.view(torch.int64)).masked_fill(no_vote, _NONE)
        key = _all_reduce(mine.clone(), dist.ReduceOp.MAX, group)
        low = _all_reduce((_LOW - class_).masked_fill(no_vote | (mine != key), -1), dist.ReduceOp.MAX, group)
        class_, best = (_LOW - low).masked_fill(low < 0, -1), _ordered(key).view(torch.float64)
    else:
        key = (_ordered(score.view(torch.int32)).long() << 32) | (_LOW - class_)
        key = _all_reduce(key.masked_fill(no_vote, _NONE), dist.ReduceOp.MAX, group)
        class_ = (_LOW - (key & _LOW)).masked_fill(key == _NONE, -1)
        best = _ordered((key >> 32).int()).view(torch.float32)
    return best.masked_fill(class_ < 0, -torch.inf), class_


def _all_reduce(x: Tensor, op: dist.ReduceOp, group: dist.ProcessGroup) -> Tensor:
    _refuse_vmap(x)
    if x.numel():
        dist.all_reduce(x, op, group=group)
    return x


def _refuse_vmap(x: Tensor) -> None:
    if torch._C._functorch.is_batchedtensor(x):
        raise RuntimeError(
            "process_group: the collectives of class shards cannot be batched by torch.func.vmap"
        )


def _sums_of_all(group: dist.ProcessGroup, **parts: Tensor) -> dict[str, Tensor]:
    """Each part (N,) summed over the ranks, in one reduction."""
    total = _all_reduce(torch.stack(list(parts.values())), dist.ReduceOp.SUM, group)
    return dict(zip(parts, total.unbind(), strict=True))


# Stage 1: dense votes --------------------------------------------------------------------------------


@compiling.eager("collectives of class shards run eagerly")
@torch.no_grad()
def dense_vote(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    upsample: int,
    backend: str | None,
    process_group: dist.ProcessGroup | None,
) -> Tensor:
    """Votes over all classes, (N, P) int32, the same on every rank; as ``functional.dense_vote``.

    The local winner comes from the best backend; its score is taken again by a dot product in the
    accumulation type, whose order depends on D alone. So equal rows in different shards have equal scores,
    and the lowest class wins whatever the shards' sizes.

    Args:
        features: (N, D, H, W) or (N, T, D), the same on every rank.
        weight, bias: (C/W, D) and (C/W,) or None, this rank's classes. Or DTensors, Shard(0).

    Source: Sec. 3.2.
    """
    features = _replica("features", features)
    weight, group = _local("weight", weight, 0, process_group)
    bias, group = (None, group) if bias is None else _local("bias", bias, 0, group)
    upsample = checks.vote_inputs(features, weight, bias, upsample, shard=True)
    positions = features.shape[2] * features.shape[3] if features.dim() == 4 else features.shape[1]
    N, P = features.shape[0], upsample**2 * positions
    vote = ops.select("vote_fwd", backend, features)
    shard = _shard(group, len(weight), N, P, features)
    column = features.new_full((N, P), -1, dtype=torch.int64)
    score = features.new_zeros((N, P), dtype=reference.accumulation_dtype(features.dtype))
    if shard.width:
        pair = (weight, bias)
        if shard.width == 1:  # the operators want two classes: of two that are equal, the first wins
            pair = tuple(None if x is None else torch.cat([x, x]) for x in pair)
        column = vote(features, *pair, upsample).long()
        score = _scores(features, weight, bias, upsample, column.clamp(min=0))
    _, votes = _best_of_all(score, (column + shard.offset).where(column >= 0, -1), group)
    return votes.int()


def _scores(features: Tensor, weight: Tensor, bias: Tensor | None, upsample: int, column: Tensor) -> Tensor:
    """F_k . W_c + b_c of one class per position, (N, P); ``column`` (N, P) int64. NaN counts as -inf."""
    dtype = reference.accumulation_dtype(features.dtype)
    N, P = column.shape
    at_a_time = max(1, reference.SCORES_AT_A_TIME // max(1, P * weight.shape[1]))  # samples
    scores = []
    for x, c in zip(features.split(at_a_time), column.split(at_a_time), strict=True):
        x = x.to(dtype)
        if upsample == 2:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        scores.append((x * weight[c].to(dtype)).sum(2))
    score = torch.cat(scores).reshape(N, P)
    score = score if bias is None else score + bias[column].to(dtype)
    return score.masked_fill(score.isnan(), -torch.inf)


# Stages 2 and 3: the label, as a constant and its exceptions -------------------------------------------


def _label(
    votes: Tensor, target: Tensor, log_mass: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The soft label of all classes by what differs from a constant: nothing here is as long as C.

    Args:
        votes: (N, P), those outside [0, C) do not count; target: (N,) in [0, C).
        log_mass: (R,) log mass by rank from 1, R > min(P, C).

    Returns:
        classes: (N, P) int64, the votes, sorted.
        exception: (N, P) bool, the first vote of each class but the target.
        log_p: (N, P), log p~ of an exception, else -inf.
        log_q: (N,), log p~ of every other non-target class, -inf if there is none.
        rest: (N,), the number of those.
    """
    v = votes.long()
    v = v.where((v >= 0) & (v < num_classes), -1).sort(1).values
    start = torch.searchsorted(v, v)
    count = torch.searchsorted(v, v, right=True) - start
    first = (start == torch.arange(v.shape[1], device=v.device)) & (v >= 0)
    counts = count.where(first, 0).sort(1).values  # one for each voted class, zeros before them
    above = v.shape[1] - torch.searchsorted(counts, count, right=True)  # voted classes with more votes

    exception = first & (v != target[:, None])
    rest = num_classes - 1 - exception.sum(1)
    number = torch.cat([exception.long(), rest[:, None]], 1).to(log_mass.dtype)  # of classes with each mass
    log_masses = log_mass[torch.cat([above, first.sum(1, keepdim=True)], 1)]  # rank r is entry r - 1
    log_masses = log_masses.where(number > 0, -torch.inf)
    massless = (log_masses == -torch.inf).all(1, keepdim=True)  # then the label is uniform
    log_masses = torch.where(massless & (number > 0), 0.0, log_masses)
    log_masses = log_masses - log_masses.amax(1, keepdim=True)
    log_label = log_masses - (number * log_masses.exp()).sum(1, keepdim=True).log()
    return v, exception, log_label[:, :-1], log_label[:, -1], rest


# Stage 4: the loss -----------------------------------------------------------------------------------


def _reference_alone(backend: str | None) -> None:
    """Refuse the other backends, whose losses are of all classes."""
    backend = backend or ops._forced.backend
    if backend not in (None, "reference"):
        raise RuntimeError(
            f"backend={backend!r} cannot serve this call: class shards are served by 'reference' alone"
        )


@compiling.eager("collectives of class shards run eagerly")
def loss_inputs(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None,
    weight: Tensor | None,
    law: Distribution,
    backend: str | None,
    process_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Shard]:
    """The loss's tensors checked, DTensors among them by their local parts, and this rank's shard.

    Raises:
        TypeError, ValueError: a bad argument, by name; no votes; a random law.
        RuntimeError: a backend other than "reference" was asked for.
    """
    logits, group = _local("logits", logits, 1, process_group)
    target, votes = _replica("target", target), _replica("votes", votes)
    if weight is not None:
        weight, _ = _local("weight", weight, 0, group)
    if votes is None:
        raise TypeError(
            "votes must be given where process_group is, or logits is a DTensor of class shards: ranking by "
            "the logits would need all of them on one rank"
        )
    if isinstance(law, RandomDistribution):
        raise ValueError(f"distribution must be a law of the rank for class shards, got {law!r}")
    _reference_alone(backend)
    target = checks.loss_inputs(logits, target, votes, weight, shard=True)
    return logits, target, votes, weight, _shard(group, logits.shape[1], *votes.shape, target, votes)


@compiling.eager("collectives of class shards run eagerly")
def loss_fwd(
    shard: Shard,
    logits: Tensor,
    target: Tensor,
    votes: Tensor,
    log_mass: Tensor,
    weight: Tensor | None,
    ce_weight: float,
    zipf_weight: float,
    label_smoothing: float,
    only_correct: bool,
    ignore_index: int,
    reduction: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ce_weight * CE + zipf_weight * L_zipf and its gradient shard (Eq. 6); as ``reference.loss_fwd``.

    Args:
        logits: (N, C/W); weight: (C/W,) or None. target (N,), votes (N, P): global, the same on every rank.

    Returns:
        loss, ce, zipf, grad_scale: as the reference of all classes, the same on every rank.
        grad: (N, C/W), the slice of the whole gradient.

    Raises:
        IndexError: a target or vote out of range in CPU tensors, on every rank alike.
    """
    C, e = shard.num_classes, label_smoothing
    dtype = reference.accumulation_dtype(logits.dtype)
    ignored = target == ignore_index
    if target.device.type == "cpu":
        reference.raise_outside(target, votes, C, ignored)
    bad = reference.outside(target, votes, C, ignored)
    y = target.clamp(0, C - 1)
    z = logits.to(dtype)
    at_target = shard.mark(y[:, None])

    # m = max_{c != y} z_c, and its class: with it, only_correct is an exact comparison.
    column = torch.full_like(y, -1)
    if shard.width:
        column = reference.argmax_lowest(z.masked_fill(at_target, torch.nan)).long()
    top = shard.pick(z, (column + shard.offset)[:, None])[:, 0]
    m, leader = _best_of_all(top, (column + shard.offset).where(column >= 0, -1), shard.group)

    # Sums over all classes of z - m.
    shift = m.masked_fill(m == -torch.inf, 0)
    d = z - shift[:, None]  # (N, C/W)
    exp = d.exp().masked_fill(at_target, 0)
    sums = {"s": exp.sum(1), "z_y": shard.pick(z, y[:, None])[:, 0]}
    if weight is not None:
        sums["w_y"] = shard.pick(weight.expand(len(y), -1), y[:, None])[:, 0]
    if ce_weight != 0 and e > 0:
        sums["wd"] = d.sum(1) if weight is None else (weight * d).sum(1)
        if weight is not None:
            sums["w"] = weight.sum().expand(len(y))
    if zipf_weight != 0:
        classes, exception, log_p, log_q, rest = _label(votes, y, log_mass, C)
        p, q = log_p.exp(), log_q.exp()
        left_out = at_target | shard.mark(classes)  # left out of the sum, not subtracted: d may be -inf
        constant = (q * d.masked_fill(left_out, 0).sum(1)).masked_fill(q == 0, 0)
        sums["pd"] = constant + (p * shard.pick(d, classes)).masked_fill(p == 0, 0).sum(1)
    sums = _sums_of_all(shard.group, **sums)
    s, z_y = sums["s"], sums["z_y"]
    w_y, w_sum = sums.get("w_y", torch.ones_like(s)), sums.get("w", C)  # 1 and C without class weights

    # From here to the gradient everything is (N,) and the same on every rank.
    zipf_rows = ~ignored
    ce_total, zipf_total = w_y.masked_fill(ignored, 0).sum(), zipf_rows.sum().to(dtype)
    ce_scale, zipf_scale = torch.ones_like(ce_total), torch.ones_like(ce_total)
    if only_correct:
        zipf_rows = zipf_rows & ~((m > z_y) | ((m == z_y) & (leader >= 0) & (leader < y)))
    if reduction == "mean":
        ce_scale = torch.where(ce_total == 0, torch.nan, 1 / ce_total)
        correct_total = zipf_rows.sum().to(dtype)
        none_correct = (zipf_total > 0) & (correct_total == 0)
        zipf_scale = torch.where(none_correct, 0.0, 1 / correct_total)

    ce, zipf = torch.zeros_like(s), torch.zeros_like(s)
    if ce_weight != 0:  # the target joins the others' statistics
        top = torch.maximum(m, z_y)
        log_sum = (s * (m - top).exp() + (z_y - top).exp()).log()  # log sum_c exp(z_c - top)
        ce = w_y * ((top - z_y) + log_sum)
        if e > 0:
            ce = (1 - e) * ce - (e / C) * (sums["wd"] - ((top - shift) + log_sum) * w_sum)
    if zipf_weight != 0:
        entropy = (p * log_p).masked_fill(p == 0, 0).sum(1) + (rest * q * log_q).masked_fill(q == 0, 0)
        zipf = entropy - sums["pd"] + s.log()
    ce = ce.masked_fill(bad, torch.nan).masked_fill(ignored, 0)
    zipf = zipf.masked_fill(~zipf_rows, 0).masked_fill(bad & ~ignored, torch.nan)
    if reduction != "none":
        ce, zipf = ce.sum(), zipf.sum()
    if reduction == "mean":
        ce = ce * ce_scale if ce_weight != 0 else ce
        zipf = zipf * zipf_scale if zipf_weight != 0 else zipf
    loss = ce_weight * ce + zipf_weight * zipf
    grad, grad_scale = logits.new_empty(0), z.new_empty(0)
    if not with_grad:
        return loss, ce.clone(), zipf.clone(), grad, grad_scale

    a, b = ce_weight * ce_scale, zipf_weight * zipf_scale
    if logits.dtype == torch.float16 and reduction == "mean":
        grad_scale = ce_scale if ce_weight != 0 else zipf_scale
        grad_scale = torch.where(torch.isfinite(grad_scale) & (grad_scale != 0), grad_scale, 1.0)
        a, b = a / grad_scale, b / grad_scale
    dz, dz_y = torch.zeros_like(exp), torch.zeros_like(s)
    if ce_weight != 0:  # p_c w - w'_c, w the weight of the whole smoothed label and w'_c that of class c
        w = a * ((1 - e) * w_y + (e / C) * w_sum)
        dz = exp * (w * (m - top - log_sum).exp())[:, None]
        dz_y = w * (z_y - top - log_sum).exp() - a * (1 - e + e / C) * w_y
        if e > 0:
            dz = dz - (a * (e / C)) * (1.0 if weight is None else weight)
    if zipf_weight != 0:  # p^_c - p~_c: the constant everywhere, then the exceptions that are here
        b = b * zipf_rows
        dz = dz + (exp * (b / s)[:, None] - (b * q)[:, None]).masked_fill(~zipf_rows[:, None], 0)
        if shard.width:
            column, here = shard.columns(classes)
            patch = (b[:, None] * (q[:, None] - p)).masked_fill(~(exception & here), 0)
            dz.scatter_add_(1, column, patch)  # no two that are not 0 in one place: any order gives the same
    dz = torch.where(at_target, dz_y[:, None], dz)
    dz = dz.masked_fill(bad[:, None], torch.nan).masked_fill(ignored[:, None], 0)
    return loss, ce.clone(), zipf.clone(), dz.to(logits.dtype), grad_scale


# Distillation ----------------------------------------------------------------------------------------


@compiling.eager("collectives of class shards run eagerly")
def distill_inputs(
    logits: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    sample_weight: Tensor | None,
    teacher_index: Tensor | None,
    backend: str | None,
    process_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Shard]:
    """As ``loss_inputs``, of ``distillation_loss``; teacher (N, C/W) is a class shard as the logits are.

    Its rows by ``teacher_index`` are taken here, NaN where the index is outside.
    """
    logits, group = _local("logits", logits, 1, process_group)
    teacher, group = _local("teacher", teacher, 1, group)
    target, sample_weight = _replica("target", target), _replica("sample_weight", sample_weight)
    teacher_index = _replica("teacher_index", teacher_index)
    _reference_alone(backend)
    target = checks.distillation_inputs(logits, teacher, target, sample_weight, teacher_index, shard=True)
    if teacher_index is not None:
        nobody = torch.zeros_like(teacher_index, dtype=torch.bool)
        teacher, bad = reference.rows_by_index(teacher, teacher_index, nobody)
        teacher = teacher.masked_fill(bad[:, None], torch.nan)
    shard = _shard(group, logits.shape[1], len(logits), 0, logits if target is None else target)
    return logits, teacher, target, sample_weight, shard


@compiling.eager("collectives of class shards run eagerly")
def distill_fwd(
    shard: Shard,
    logits: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    sample_weight: Tensor | None,
    ce_weight: float,
    kd_weight: float,
    tckd_weight: float,
    nckd_weight: float,
    soft_target_weight: float,
    max_weight: float,
    temperature: float,
    form: str,
    ignore_index: int,
    reduction: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``reference.distill_fwd``, and its gradient shard: two maxima, then seven sums a sample, reduced.

    Args:
        logits, teacher: (N, C/W). target, sample_weight (N,): global, the same on every rank.

    Raises:
        NotImplementedError: max_weight is not 0.
    """
    if max_weight != 0:
        raise NotImplementedError(f"max_weight must be 0 beside class shards, got {max_weight!r}")
    C, N = shard.num_classes, len(logits)
    dtype = reference.accumulation_dtype(logits.dtype)
    z, t = logits.to(dtype), teacher.to(dtype)
    if target is None:
        ignored = bad = torch.zeros(N, dtype=torch.bool, device=z.device)
        column = reference.argmax_lowest(t).long() if shard.width else ignored.long() - 1
        top = shard.pick(t, (column + shard.offset)[:, None])[:, 0]
        _, y = _best_of_all(top, (column + shard.offset).where(column >= 0, -1), shard.group)
        y = y.clamp(min=0)
    else:
        ignored = target == ignore_index
        if target.device.type == "cpu":
            reference.raise_outside(target, None, C, ignored)
        bad, y = reference.outside(target, None, C, ignored), target.clamp(0, C - 1)
    at_target = shard.mark(y[:, None])
    maxima = z.new_full((2, N), -torch.inf)
    if shard.width:  # NaN stays out of the reduction and is in the sums
        for i, x in enumerate((z, t)):
            maxima[i] = x.masked_fill(at_target | x.isnan(), -torch.inf).amax(1)
    m, m_t = reference.finite_max(_all_reduce(maxima, dist.ReduceOp.MAX, shard.group))
    m_t = reference.base_of_teacher(m_t, form)
    rows = reference.DistillRows(z, t, at_target, m, m_t, temperature, form)
    logits_of_target = [shard.pick(x, y[:, None])[:, 0] for x in (z, t)]
    sums = _all_reduce(
        torch.cat([rows.sums(), torch.stack(logits_of_target)]), dist.ReduceOp.SUM, shard.group
    )
    weights = (ce_weight, kd_weight, tckd_weight, nckd_weight, soft_target_weight)
    ce, distillation, factors = rows.losses(sums[5], sums[6], sums[:5], sample_weight, *weights)
    dz = rows.gradient(*factors) if with_grad else z.new_empty(0)
    return reference.distill_results(
        ce, distillation, dz, ignored, bad, ce_weight, reduction, logits.dtype, with_grad
    )
