"""The three stages of Zipf's Label Smoothing in plain PyTorch: what every other backend must equal.

Reads next to the paper (Liang et al., ECCV 2022, arXiv 2207.12980); N samples, C classes, D channels,
P votes a sample. Runs on any device in any float type, and decides the meaning of every corner case.

* ``vote_fwd``, ``rank_fwd``, ``label_fwd``, ``loss_fwd``, ``loss_bwd`` are the operators' reference
  implementations. The loss writes the gradient out by hand and needs no autograd.
* ``distill_fwd`` is the loss with a teacher's logits in the place of votes and label.
* ``zipf_term`` and ``cross_entropy_term`` are the same loss in differentiable form, for checks by autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES_AT_A_TIME = 1 << 22  # dense scores held at once by vote_fwd, so that (N, P, C) never exists


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type arithmetic runs in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Stage 1: dense votes ------------------------------------------------------------------------------


def vote_fwd(features: Tensor, weight: Tensor, bias: Tensor | None, upsample: int) -> Tensor:
    """Vote of every position, v_k = argmax_c (F_k . W_c + b_c) (Sec. 3.2).

    Args:
        features: (N, D, H, W) map or (N, T, D) tokens.
        weight: (C, D) classifier.
        bias: (C,) or None.
        upsample: 1, or 2 to double a map's resolution bilinearly (align_corners=False).

    Returns:
        (N, P) int32: the lowest class among equal computed scores; NaN never wins; -1 if all are NaN.
    """
    dtype = accumulation_dtype(features.dtype)
    if features.dim() == 4:
        N, D, H, W = features.shape
        positions = features.permute(0, 2, 3, 1).reshape(N, H * W, D)
    else:
        N, T, D = features.shape
        H, W = 1, T
        positions = features
    C = weight.shape[0]
    P = upsample * H * upsample * W
    weight = weight.to(dtype)
    if upsample == 1:
        positions = positions.reshape(N * P, 1, D)  # no position needs its neighbours: blocks of any size do
    block_size = max(1, SCORES_AT_A_TIME // max(1, upsample**2 * positions.shape[1] * C))
    votes = []
    for block in positions.split(block_size):
        scores = F.linear(block.to(dtype), weight)  # (n, H*W, C), or (n, 1, C)
        if upsample == 2:
            scores = _upsample2(scores.unflatten(1, (H, W)))
        if bias is not None:
            scores = scores + bias.to(dtype)  # after interpolating: a -inf bias times zero is NaN
        votes.append(argmax_lowest(scores))
    return torch.cat(votes).reshape(N, P)


def _upsample2(scores: Tensor) -> Tensor:
    """(n, H, W, C) -> (n, 2H * 2W, C), bilinear, align_corners=False: the weights are 3/4 and 1/4."""
    for axis in (1, 2):
        size = scores.shape[axis]
        before = torch.cat([scores.narrow(axis, 0, 1), scores.narrow(axis, 0, size - 1)], axis)
        after = torch.cat([scores.narrow(axis, 1, size - 1), scores.narrow(axis, size - 1, 1)], axis)
        pair = [torch.lerp(scores, before, 0.25), torch.lerp(scores, after, 0.25)]
        scores = torch.stack(pair, axis + 1).flatten(axis, axis + 1)
    return scores.flatten(1, 2)


def argmax_lowest(scores: Tensor) -> Tensor:
    """Index of the largest score along the last axis (int32): lowest on ties, NaN skipped, -1 if all NaN."""
    C = scores.shape[-1]
    valid = ~scores.isnan()
    best = scores.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True)
    index = torch.arange(C, device=scores.device, dtype=torch.int32)
    lowest = torch.where(valid & (scores == best), index, C).amin(-1)
    return torch.where(lowest == C, -1, lowest).to(torch.int32)


# Stage 2: ranks ------------------------------------------------------------------------------------


def count_votes(votes: Tensor, num_classes: int) -> Tensor:
    """Votes per class n_c, (N, C) int32; votes outside [0, C) are not counted."""
    inside = (votes >= 0) & (votes < num_classes)
    counts = torch.zeros(votes.shape[0], num_classes, dtype=torch.int32, device=votes.device)
    return counts.scatter_add_(1, votes.long().clamp(0, num_classes - 1), inside.int())


def competition_rank(values: Tensor) -> Tensor:
    """r_c = 1 + #{m : x_m > x_c} per row, (N, C) int32: ties share the smallest rank (Sec. 3.2).

    NaN ranks last, above nothing.
    """
    values = values.masked_fill(values.isnan(), -torch.inf) if values.is_floating_point() else values
    not_above = torch.searchsorted(values.sort(1).values, values.contiguous(), right=True)
    return (1 + values.shape[1] - not_above).int()


def rank_fwd(votes: Tensor, num_classes: int) -> Tensor:
    """Ranks (N, C) int32 of all classes by votes; all without a vote share the rank after the voted ones.

    A vote >= C is an IndexError on a CPU tensor, and sets its row to 0 elsewhere.
    """
    bad = (votes >= num_classes).any(1)
    if votes.device.type == "cpu":
        raise_outside(None, votes, num_classes)
    return competition_rank(count_votes(votes, num_classes)).masked_fill(bad[:, None], 0)


# Stage 3: the soft label ---------------------------------------------------------------------------


def target_classes(target: Tensor, num_classes: int) -> Tensor:
    """(N, C) bool: the classes that the Zipf term leaves out.

    Of a class (N,) int64: itself. Of probabilities (N, C): every class above the row's minimum, which is what
    label smoothing and mixup give to the classes they do not name.
    """
    if target.dim() == 1:
        return target[:, None] == torch.arange(num_classes, device=target.device)
    return target != target.amin(1, keepdim=True)


def label_from_mass(log_mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Soft label over the non-target classes, p~_c = mass_c / sum_{m != y} mass_m, and its logarithm (Eq. 4).

    Args:
        log_mass: (N, C) log masses, normalised or not.
        target: (N,) int64 in [0, C), or probabilities (N, C).

    Returns:
        p~ and log p~, (N, C) each: 0 and -inf at the target. Where every non-target mass is zero: uniform.
    """
    at_target = target_classes(target, log_mass.shape[1])
    log_mass = log_mass.masked_fill(at_target, -torch.inf)
    massless = (log_mass == -torch.inf).all(1, keepdim=True)
    log_mass = torch.where(massless & ~at_target, 0.0, log_mass)
    log_label = log_mass.log_softmax(1)
    return log_label.exp(), log_label


def label_fwd(target: Tensor, votes: Tensor, log_mass: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Zipf soft label p~ (N, C) in the dtype of ``log_mass``; an ignored sample's row is 0.

    ``log_mass`` is a table (R,) by rank from 1, or (N, C) masses per sample and class.
    """
    ignored = target == ignore_index
    bad = _bad_rows(target, votes, num_classes, ignored)
    return whole_label(dense_log_mass(log_mass, votes, None, num_classes), target, bad, ignored)


def whole_label(log_mass: Tensor, target: Tensor, bad: Tensor, ignored: Tensor) -> Tensor:
    """``label_fwd`` from masses (N, C); bad, ignored: (N,) bool, rows of NaN, and of 0."""
    # In float64: a float32 sum of 32000 equal masses is 4e-5 off.
    label = label_from_mass(log_mass.double(), target.clamp(0, log_mass.shape[1] - 1))[0].to(log_mass.dtype)
    return label.masked_fill(bad[:, None], torch.nan).masked_fill(ignored[:, None], 0.0)


def dense_log_mass(log_mass: Tensor, votes: Tensor | None, logits: Tensor | None, num_classes: int) -> Tensor:
    """(N, C) log masses from a table by rank, of votes if there are any and else of the logits."""
    if log_mass.dim() == 2:
        return log_mass
    rank = competition_rank(logits) if votes is None else competition_rank(count_votes(votes, num_classes))
    # Rank K+1 is the last entry when all K voted classes differ; with all classes voted it is never used.
    return log_mass[rank.long() - 1]


def outside(target: Tensor | None, votes: Tensor | None, num_classes: int, ignored: Tensor | None) -> Tensor:
    """(N,) bool: samples with a target outside [0, C) or a vote >= C (negative: no vote), unless ignored."""
    bad = None if target is None else (target < 0) | (target >= num_classes)
    if votes is not None:
        bad_votes = (votes >= num_classes).any(1)
        bad = bad_votes if bad is None else bad | bad_votes
    return bad if ignored is None else bad & ~ignored


def raise_outside(
    target: Tensor | None, votes: Tensor | None, num_classes: int, ignored: Tensor | None = None
) -> None:
    """IndexError naming the first target or vote outside [0, C), if any. Synchronises."""
    bad = outside(target, votes, num_classes, ignored)
    if not bad.any():
        return
    i = int(bad.nonzero()[0])
    if target is not None and not 0 <= int(target[i]) < num_classes:
        raise IndexError(f"target[{i}] = {int(target[i])} is outside [0, {num_classes})")
    k = int((votes[i] >= num_classes).nonzero()[0])
    raise IndexError(f"votes[{i}, {k}] = {int(votes[i, k])} is outside [0, {num_classes})")


def _bad_rows(target: Tensor, votes: Tensor | None, num_classes: int, ignored: Tensor) -> Tensor:
    """Rows whose results are NaN; an IndexError on the CPU, where looking costs no synchronisation."""
    if target.device.type == "cpu":
        raise_outside(target, votes, num_classes, ignored)
    return outside(target, votes, num_classes, ignored)


# Stage 4: the loss ---------------------------------------------------------------------------------


def zipf_term(logits: Tensor, target: Tensor, label: Tensor, log_label: Tensor) -> Tensor:
    """L_zipf = sum_{c != y} p~_c log(p~_c / p^_c) per sample, (N,) (Eq. 5); differentiable in ``logits``.

    p^ is the softmax over the non-target classes. Classes without mass are skipped.
    """
    at_target = target_classes(target, logits.shape[1])
    log_nontarget = logits.masked_fill(at_target, -torch.inf).log_softmax(1)
    return torch.where(label > 0, label * (log_label - log_nontarget), 0.0).sum(1)


def cross_entropy_term(
    logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float
) -> Tensor:
    """Cross-entropy per sample with class weights and label smoothing, (N,); as F.cross_entropy."""
    return F.cross_entropy(
        logits, target, weight, ignore_index=-1, reduction="none", label_smoothing=label_smoothing
    )


def is_correct(logits: Tensor, target: Tensor) -> Tensor:
    """(N,) bool: no other class beats the target, that is argmax z = y with ties to the lowest class."""
    z_y = logits.gather(1, target[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < target[:, None]
    return ~((logits > z_y) | (earlier & (logits == z_y))).any(1)


def loss_fwd(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None,
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
    """ce_weight * CE + zipf_weight * L_zipf and its gradient (Eq. 6), without autograd.

    Args:
        logits: (N, C) z, any float type.
        target: (N,) int64 classes, or (N, C) probabilities in the accumulation dtype (``_soft_loss_fwd``).
        votes: (N, P) int32/int64, or None to rank by z.
        log_mass: table (R,) by rank from 1, or (N, C), in the accumulation dtype.
        weight: (C,) class weights of the CE part, in the accumulation dtype, or None.
        ce_weight, zipf_weight: a part whose weight is 0 is skipped (0, not 0 times infinity).
        ignore_index: the class of a sample that does not count; not used beside probabilities.
        reduction: "mean", "sum" or "none".
        with_grad: whether the gradient is computed.

    Returns:
        loss, ce, zipf: scalars, or (N,) for "none", in the accumulation dtype (ce and zipf unweighted).
        grad: (N, C) d loss / d logits in the logits' dtype, not yet multiplied by grad_scale; (0,) without.
        grad_scale: scalar that multiplies grad in backward, or (0,) where it is one. Only a float16 mean
            needs it: divided by N before GradScaler's scale is applied, float16 gradients flush to zero.
    """
    if target.dim() == 2:
        return _soft_loss_fwd(
            logits, target, votes, log_mass, weight,
            ce_weight, zipf_weight, label_smoothing, only_correct, reduction, with_grad,
        )  # fmt: skip
    N, C = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    z = logits.to(dtype)
    ignored = target == ignore_index
    bad = _bad_rows(target, votes, C, ignored)
    y = target.clamp(0, C - 1)
    onehot = F.one_hot(y, C).to(dtype)
    zero = z.new_zeros(N)
    dz = z.new_zeros(N, C)

    ce, zipf, zipf_rows = zero, zero, ~ignored
    w = torch.ones(C, dtype=dtype, device=z.device) if weight is None else weight
    ce_total, zipf_total = w[y].masked_fill(ignored, 0).sum(), (~ignored).sum().to(dtype)
    ce_scale, zipf_scale = ce_total.new_ones(()), ce_total.new_ones(())
    if only_correct:
        zipf_rows = zipf_rows & is_correct(logits, y)
    if reduction == "mean":
        ce_scale = torch.where(ce_total == 0, torch.nan, 1 / ce_total)  # as F.cross_entropy, smoothed or not
        correct_total = zipf_rows.sum().to(dtype)
        none_correct = (zipf_total > 0) & (correct_total == 0)
        zipf_scale = torch.where(none_correct, 0.0, 1 / correct_total)

    if ce_weight != 0:
        e = label_smoothing
        log_p = z.log_softmax(1)
        nll = -log_p.gather(1, y[:, None]).squeeze(1)
        ce = w[y] * nll
        a, b = w[y][:, None], w[y][:, None] * onehot
        if e > 0:  # skipped, not multiplied by 0: the log probability of a masked class is -inf
            ce = (1 - e) * ce - (e / C) * (w * log_p).sum(1)
            a, b = (1 - e) * a + (e / C) * w.sum(), (1 - e) * b + (e / C) * w
        dz = dz + (ce_weight * ce_scale) * (log_p.exp() * a - b)
    if zipf_weight != 0:
        label, log_label = label_from_mass(dense_log_mass(log_mass, votes, logits, C), y)
        zipf = zipf_term(z, y, label, log_label)
        p_nontarget = z.masked_fill(onehot.bool(), -torch.inf).softmax(1)
        step = (zipf_weight * zipf_scale) * (p_nontarget - label)
        dz = dz + step.masked_fill(onehot.bool() | ~zipf_rows[:, None], 0)

    ce = ce.masked_fill(bad, torch.nan).masked_fill(ignored, 0)
    zipf = zipf.masked_fill(~zipf_rows, 0).masked_fill(bad & ~ignored, torch.nan)
    dz = dz.masked_fill(bad[:, None], torch.nan).masked_fill(ignored[:, None], 0)

    weights, scales = (ce_weight, zipf_weight), (ce_scale, zipf_scale)
    return _results((ce, zipf), dz, weights, scales, reduction, logits.dtype, with_grad)


def _results(
    parts: tuple[Tensor, Tensor],
    dz: Tensor,
    weights: tuple[float, float],
    scales: tuple[Tensor, Tensor],
    reduction: str,
    dtype: torch.dtype,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``loss_fwd`` returns, from the (N,) losses of CE and Zipf and the whole gradient (N, C)."""
    (ce, zipf), (ce_weight, zipf_weight), (ce_scale, zipf_scale) = parts, weights, scales
    if reduction != "none":
        ce, zipf = ce.sum(), zipf.sum()
    if reduction == "mean":
        ce = ce * ce_scale if ce_weight != 0 else ce
        zipf = zipf * zipf_scale if zipf_weight != 0 else zipf
    loss = ce_weight * ce + zipf_weight * zipf

    grad, grad_scale = dz.new_empty(0, dtype=dtype), dz.new_empty(0)
    if with_grad:
        if dtype == torch.float16 and reduction == "mean":
            grad_scale = ce_scale if ce_weight != 0 else zipf_scale
            usable = torch.isfinite(grad_scale) & (grad_scale != 0)
            grad_scale = torch.where(usable, grad_scale, 1.0)
            dz = dz / grad_scale
        grad = dz.to(dtype)
    return loss, ce.clone(), zipf.clone(), grad, grad_scale


def _soft_loss_fwd(
    logits: Tensor,
    target: Tensor,
    votes: Tensor | None,
    log_mass: Tensor,
    weight: Tensor | None,
    ce_weight: float,
    zipf_weight: float,
    label_smoothing: float,
    only_correct: bool,
    reduction: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``loss_fwd`` for targets that are probabilities (our extension; docs/MATH.md, "Soft targets").

    CE = -sum_c w_c t'_c log p_c with t' = (1 - e) t + e / C, its gradient p_c sum_k w_k t'_k - w_c t'_c;
    L_zipf = sum_{c in S} p~_c log(p~_c / p^_c), S = {c : t_c = min_k t_k}, its gradient p^_c - p~_c in S.

    Args:
        target: (N, C) probabilities t, in the accumulation dtype; a row with a NaN gives NaN. Beside an
            infinite t every p_c of a logit above -inf counts as between 0 and 1, though it may round to one:
            CE is infinite, its gradient too, and NaN at the infinite t; NaN all where infinities disagree.
        The others as for ``loss_fwd``. ``only_correct``: where argmax z = argmax t, lowest index on ties.

    Returns:
        As ``loss_fwd``. Means divide by N, under ``only_correct`` the Zipf part's by the number correct.
    """
    N, C = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    z, t = logits.to(dtype), target.contiguous()  # sums in one order, whatever the strides
    bad = t.isnan().any(1)
    if votes is not None:
        if votes.device.type == "cpu":
            raise_outside(None, votes, C)
        bad = bad | outside(None, votes, C, None)
    ce, zipf, dz = z.new_zeros(N), z.new_zeros(N), z.new_zeros(N, C)
    samples = z.new_full((), N)
    counted = torch.ones_like(bad)
    if only_correct:
        counted = is_correct(logits, argmax_lowest(t).long().clamp(min=0))
    ce_scale, zipf_scale = z.new_ones(()), z.new_ones(())
    if reduction == "mean":
        ce_scale = 1 / samples
        number = counted.sum().to(dtype)
        zipf_scale = torch.where((samples > 0) & (number == 0), 0.0, 1 / number)

    if ce_weight != 0:
        e = label_smoothing
        u = t * (1 - e) + e / C if e > 0 else t
        u = u if weight is None else u * weight
        log_prob = z.log_softmax(1)
        total = u.sum(1, keepdim=True)
        infinite = total.isinf()  # then a p that rounds to 0 or 1 stands for one between: no infinity times 0
        prob = log_prob.exp().masked_fill(infinite & (log_prob > -torch.inf), 1.0)
        log_prob = log_prob.masked_fill(infinite & (log_prob == 0), -1.0)
        ce = -(u * log_prob).sum(1)  # 0 times -inf is NaN, as in F.cross_entropy
        dz = dz + (ce_weight * ce_scale) * (prob * total - u)
    if zipf_weight != 0:
        at_target = target_classes(t, C)
        zipf_rows = counted & ((~at_target).sum(1) >= 2)
        label, log_label = label_from_mass(dense_log_mass(log_mass, votes, logits, C), t)
        zipf = zipf_term(z, t, label, log_label).masked_fill(~zipf_rows, 0)
        step = z.masked_fill(at_target, -torch.inf).softmax(1) - label
        step = (zipf_weight * zipf_scale) * step
        dz = dz + step.masked_fill(at_target | ~zipf_rows[:, None], 0)

    ce, zipf = ce.masked_fill(bad, torch.nan), zipf.masked_fill(bad, torch.nan)
    dz = dz.masked_fill(bad[:, None], torch.nan)
    weights, scales = (ce_weight, zipf_weight), (ce_scale, zipf_scale)
    return _results((ce, zipf), dz, weights, scales, reduction, logits.dtype, with_grad)


def loss_grad_(logits: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``loss_fwd`` with the gradient written over the logits; kernels want them contiguous.

    Args:
        logits and the others as for ``loss_fwd``, but for ``with_grad``.

    Returns:
        loss, ce, zipf, grad_scale, as ``loss_fwd``.
    """
    *parts, grad, grad_scale = loss_fwd(logits, *args, True)
    logits.copy_(grad)
    return *parts, grad_scale


def loss_bwd(grad: Tensor, grad_loss: Tensor, grad_scale: Tensor) -> Tensor:
    """grad * grad_loss * grad_scale in the dtype of grad, the product taken in at least float32.

    Args:
        grad, grad_scale: from loss_fwd. grad_loss: the upstream gradient, a scalar or (N,), any strides.
    """
    scale = grad_loss.to(accumulation_dtype(grad.dtype))
    if grad_scale.numel():
        scale = scale * grad_scale
    return (grad * scale.unsqueeze(-1)).to(grad.dtype)


def loss_bwd_(grad: Tensor, grad_loss: Tensor, grad_scale: Tensor) -> None:
    """``loss_bwd`` in place."""
    grad.copy_(loss_bwd(grad, grad_loss, grad_scale))


# Distillation: the same loss with a teacher's row in the place of the label --------------------------


def distill_fwd(
    logits: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    sample_weight: Tensor | None,
    teacher_index: Tensor | None,
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
    """v (ce + soft_target q1_y) CE + T^2 w (kd KL + tckd TCKD + nckd NCKD) + w max (max_c z_c - z_y).

    p, q are the softmax of z/T and t/T over all classes, p^, q^ those over the classes c != y; q1 is q at
    T = 1. TCKD = KL((q_y, 1 - q_y) || (p_y, 1 - p_y)), NCKD = KL(q^ || p^), and
    KL(q || p) = TCKD + (1 - q_y) NCKD (Zhao et al., CVPR 2022, Eq. 7). The target is left out of every sum
    over the classes: what is small beside it keeps its digits, and no logarithm is taken of what underflows.

    Args:
        logits, teacher: (N, C) z and t, any float types; the arithmetic's is that of the logits. The teacher
            may be a table (R, C) beside a ``teacher_index``.
        target: (N,) int64; or None with kd_weight alone, when the teacher's largest class takes its place.
        sample_weight: (N,) w in the accumulation dtype, or None for 1; v is 1. (N, 2): v and w.
        max_weight: the largest logit's term; of equal ones the lowest class has the gradient.
        teacher_index: (N,) int64, the teacher's row of each sample; None: the i-th of the i-th.
        form: "divergence", or "cross_entropy" without the teacher's entropies: -sum q log p. Or
            "probabilities": the same, the teacher's rows being q times a sum of their own, whatever T; w is
            multiplied by that sum. A row of 0 has no part, and leaves its w to v where there is a v.
        The others as for ``loss_fwd``. A term whose weight is 0 is skipped, and so is a class without mass.

    Returns:
        loss, ce, distillation: ce is v CE, distillation all of the loss but ce_weight * ce.
        grad, grad_scale: as ``loss_fwd``. Means divide by the number of samples not ignored.
    """
    N, C = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    z = logits.to(dtype)
    ignored = bad = torch.zeros(N, dtype=torch.bool, device=z.device)
    if target is not None:
        ignored = target == ignore_index
        bad = _bad_rows(target, None, C, ignored)
    if teacher_index is not None:
        teacher, nobody = rows_by_index(teacher, teacher_index, ignored)
        bad = bad | nobody
    t = teacher.to(dtype)
    y = argmax_lowest(t).long().clamp(min=0) if target is None else target.clamp(0, C - 1)
    at_target = F.one_hot(y, C).bool()
    m, m_t = (x.masked_fill(at_target, -torch.inf).amax(1) for x in (z, t))
    rows = DistillRows(z, t, at_target, finite_max(m), base_of_teacher(m_t, form), temperature, form)
    z_y, t_y = (x.gather(1, y[:, None])[:, 0] for x in (z, t))
    weights = (ce_weight, kd_weight, tckd_weight, nckd_weight, soft_target_weight)
    ce, distillation, factors = rows.losses(z_y, t_y, rows.sums(), sample_weight, *weights)
    dz = rows.gradient(*factors) if with_grad else z.new_empty(0)
    if max_weight != 0:
        k = argmax_lowest(z.masked_fill(at_target, torch.nan)).long().clamp(min=0)
        ahead = (m > z_y) | ((m == z_y) & (k < y))
        largest = torch.maximum(m, z_y)
        none = largest - largest  # 0; NaN where the largest logit is not finite
        w = max_weight * columns_of(sample_weight, z_y)[1]
        distillation = distillation + _times(w, torch.where(ahead, m - z_y, 0) + none)
        if with_grad:
            step = torch.where(ahead, w, 0)
            dz = (dz + none[:, None]).scatter_add_(
                1, torch.stack([y, k], 1), torch.stack([-step, step], 1).to(dtype)
            )
    return distill_results(ce, distillation, dz, ignored, bad, ce_weight, reduction, logits.dtype, with_grad)


def rows_by_index(table: Tensor, index: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, C) of a table (R, C), and for which samples (N,) bool the index is outside, unless ignored.

    On the CPU that is an IndexError.
    """
    R = len(table)
    bad = ((index < 0) | (index >= R)) & ~ignored
    if index.device.type == "cpu" and bad.any():
        i = int(bad.nonzero()[0])
        raise IndexError(f"teacher_index[{i}] = {int(index[i])} is outside [0, {R})")
    return table[index.clamp(0, R - 1)], bad


def finite_max(m: Tensor) -> Tensor:
    """The largest logits of rows, 0 for a row of -inf alone, which has no largest to subtract."""
    return m.masked_fill(m == -torch.inf, 0)


def base_of_teacher(m_t: Tensor, form: str) -> Tensor:
    """What the teacher's exponentials are relative to: probabilities are none."""
    return torch.zeros_like(m_t) if form == "probabilities" else finite_max(m_t)


def columns_of(sample_weight: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) weights of the cross-entropy and of the distillation, in the dtype of ``like`` (N,)."""
    one = torch.ones_like(like)
    if sample_weight is None:
        return one, one
    w = sample_weight.to(like.dtype)
    return (w[:, 0], w[:, 1]) if w.dim() == 2 else (one, w)


def distill_results(
    ce: Tensor,
    distillation: Tensor,
    dz: Tensor,
    ignored: Tensor,
    bad: Tensor,
    ce_weight: float,
    reduction: str,
    dtype: torch.dtype,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``distill_fwd`` returns, from the (N,) losses and the (N, C) gradients of the samples."""
    ce, distillation = (x.masked_fill(bad, torch.nan).masked_fill(ignored, 0) for x in (ce, distillation))
    scale = ce.new_ones(())
    if reduction == "mean":
        scale = 1 / (~ignored).sum().to(ce.dtype)
    if with_grad:
        dz = (dz * scale).masked_fill(bad[:, None], torch.nan).masked_fill(ignored[:, None], 0)
    return _results((ce, distillation), dz, (ce_weight, 1.0), (scale, scale), reduction, dtype, with_grad)


class DistillRows(NamedTuple):
    """Rows of both networks, in the accumulation dtype, or their classes of one shard (``sharded``)."""

    z: Tensor  # (N, C) logits
    t: Tensor  # (N, C) the teacher's; or probabilities, beside the form of that name
    at_target: Tensor  # (N, C) bool
    m: Tensor  # (N,) max_{c != y} z_c
    m_t: Tensor  # (N,) max_{c != y} t_c; 0 beside probabilities
    temperature: float
    form: str

    def _exp(self, x: Tensor, m: Tensor, temperature: float) -> Tensor:
        """exp((x - m) / T), 0 at the target."""
        return ((x - m[:, None]) / temperature).masked_fill(self.at_target, -torch.inf).exp()

    def _teacher(self, temperature: float) -> Tensor:
        if self.form == "probabilities":
            return self.t.masked_fill(self.at_target, 0)
        return self._exp(self.t, self.m_t, temperature)

    def sums(self) -> Tensor:
        """(5, N) sums over the classes c != y: e_T, e_1, f_T, f_1, d.

        e_T = sum exp((z_c - m) / T), e_1 the same at T = 1; f_T, f_1 likewise of t, whose exponentials
        probabilities are; d = sum exp((t_c - m') / T) ((t_c - m') - (z_c - m)), or of m - z_c but for
        "divergence".
        """
        q = self._teacher(self.temperature)
        ratio = self.m[:, None] - self.z
        if self.form == "divergence":
            ratio = (self.t - self.m_t[:, None]) + ratio
        e_T, f_T = self._exp(self.z, self.m, self.temperature).sum(1), q.sum(1)
        e_1, f_1 = e_T, f_T
        if self.temperature != 1:
            e_1, f_1 = self._exp(self.z, self.m, 1.0).sum(1), self._teacher(1.0).sum(1)
        return torch.stack([e_T, e_1, f_T, f_1, torch.where(q > 0, q * ratio, 0.0).sum(1)])

    def losses(
        self,
        z_y: Tensor,
        t_y: Tensor,
        sums: Tensor,
        sample_weight: Tensor | None,
        ce_weight: float,
        kd_weight: float,
        tckd_weight: float,
        nckd_weight: float,
        soft_target_weight: float,
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """CE and distillation (N,) each, and the factors (N,) of ``gradient``, None where a term is skipped.

        With u the log odds of the target, log(p_y / (1 - p_y)), and v the teacher's: p_y = s(u), s the
        sigmoid, and -log p_y = softplus(-u); u does not underflow where p_y or 1 - p_y does. In float64, as
        the rounding of u is the relative error of what is small: in float32 1e-6 with the target 20 ahead.

        Args:
            z_y, t_y: (N,) logits of the target class. sums: (5, N) of all classes, from ``sums``.
            sample_weight: (N,), (N, 2) or None, as of ``distill_fwd``.
        """
        T, dtype = self.temperature, z_y.dtype
        e_T, e_1, f_T, f_1, d = sums.double().unbind()
        z_y, t_y = (x.double().masked_fill(x == torch.inf, torch.nan) for x in (z_y, t_y))
        z_y, t_y = z_y - self.m, t_y - self.m_t
        u, v, u_1 = z_y / T - e_T.log(), t_y / T - f_T.log(), z_y - e_1.log()
        zero = torch.zeros_like(z_y)
        one = torch.ones_like(z_y)  # a sum is 0 where all its classes are -inf, and otherwise not below 1
        f = f_T.masked_fill(f_T == 0, 1)
        w_ce, w = columns_of(sample_weight, z_y)
        s_v, r_v, q_y = torch.sigmoid(v), torch.sigmoid(-v), torch.sigmoid(t_y - f_1.log())
        if self.form == "probabilities":
            total = t_y + f_T
            empty = total == 0
            s_v, r_v = (t_y / total).masked_fill(empty, 1), (f_T / total).masked_fill(empty, 0)
            q_y = s_v
            if sample_weight is not None and sample_weight.dim() == 2:
                w_ce = torch.where(empty, w_ce + w, w_ce)
            w = w * total
        ce = distillation = dz_y = zero
        A = B = D = None
        if ce_weight != 0 or soft_target_weight != 0:
            nll = softplus(-u_1)
            a = ce_weight * one
            if ce_weight != 0:
                ce = _times(w_ce, nll)
            if soft_target_weight != 0:
                distillation = soft_target_weight * _times(w_ce, _times(q_y, nll))
                a = a + soft_target_weight * q_y
            dz_y = -w_ce * a * torch.sigmoid(-u_1)
            A = -dz_y / torch.maximum(e_1, one)
        alpha = kd_weight + tckd_weight  # of TCKD
        if kd_weight != 0 or tckd_weight != 0 or nckd_weight != 0:
            s_u, r_u = torch.sigmoid(u), torch.sigmoid(-u)
            beta = (nckd_weight + kd_weight * r_v).masked_fill(f_T == 0, 0)  # of NCKD
            log_p, log_not_p = -softplus(-u), -softplus(u)  # log p_y, log(1 - p_y)
            log_f = zero
            if self.form == "divergence":
                log_p, log_not_p = log_p + softplus(-v), log_not_p + softplus(v)
                log_f = f.log()
            tckd = -_times(s_v, log_p) - _times(r_v, log_not_p) if alpha != 0 else zero
            nckd = d / (T * f) - log_f + torch.maximum(e_T, one).log()
            distillation = distillation + T * T * _times(w, alpha * tckd + _times(beta, nckd))
            D = w * T * beta / f
            B = w * T * (beta + alpha * (r_u - r_v)) / torch.maximum(e_T, one)
            dz_y = dz_y + w * T * alpha * torch.where(u > 0, r_v - r_u, s_u - s_v)
        factors = (None if x is None else x.to(dtype) for x in (dz_y, A, B, D))
        return ce.to(dtype), distillation.to(dtype), tuple(factors)

    def gradient(self, dz_y: Tensor, A: Tensor | None, B: Tensor | None, D: Tensor | None) -> Tensor:
        """(N, C): A exp(z_c - m) + (B exp((z_c - m) / T) - D exp((t_c - m') / T)) at c != y, dz_y at y."""
        dz = torch.zeros_like(self.z, memory_format=torch.contiguous_format)
        if A is not None:
            dz = dz + A[:, None] * self._exp(self.z, self.m, 1.0)
        if B is not None:  # the difference first: of two classes it is 0
            p, q = self._exp(self.z, self.m, self.temperature), self._teacher(self.temperature)
            dz = dz + (B[:, None] * p - D[:, None] * q)
        return torch.where(self.at_target, dz_y[:, None], dz).contiguous()


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) in full precision everywhere; F.softplus is linear above 20."""
    return -F.logsigmoid(-x)


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x, 0 where the weight is 0, be x infinite or NaN."""
    return (weight * x).masked_fill(weight == 0, 0)


def distill_grad_(logits: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``loss_grad_`` of ``distill_fwd``."""
    *parts, grad, grad_scale = distill_fwd(logits, *args, True)
    logits.copy_(grad)
    return *parts, grad_scale
