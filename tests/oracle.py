"""Zipf's Label Smoothing written a second time, from the paper: float64, one sample at a time, no cleverness.

Shares no code with the package. The reference is held against this, and every backend against both.
"""

from __future__ import annotations

import math

import numpy as np


def rank_by(values) -> list[int]:
    """Competition rank of every entry: 1 + how many are larger."""
    return [1 + sum(other > value for other in values) for value in values]


def count(votes, C: int) -> list[int]:
    counts = [0] * C
    for vote in votes:
        if vote >= 0:
            counts[vote] += 1
    return counts


def soft_label(y: int, masses) -> np.ndarray:
    """(C,) label: masses of the non-target classes, normalised; uniform where they are all zero."""
    C = len(masses)
    kept = [0.0 if c == y else float(masses[c]) for c in range(C)]
    total = math.fsum(kept)
    if total == 0:
        return np.array([0.0 if c == y else 1 / (C - 1) for c in range(C)])
    return np.array([m / total for m in kept])


def log_softmax(z: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        shifted = z - z.max()
        return shifted - np.log(np.exp(shifted).sum())


def sample(z, y, votes, mass, *, class_weight=None, smoothing=0.0):
    """(ce, zipf, d ce/dz, d zipf/dz, correct) of one sample; ``mass(rank, C)``, or an array of C masses."""
    z = np.asarray(z, dtype=np.float64)
    C = len(z)
    w = np.ones(C) if class_weight is None else np.asarray(class_weight, dtype=np.float64)

    log_p = log_softmax(z)
    ce = -(1 - smoothing) * w[y] * log_p[y]
    dce = (1 - smoothing) * w[y] * np.exp(log_p)
    dce[y] -= (1 - smoothing) * w[y]
    if smoothing:
        ce -= smoothing / C * (w * log_p).sum()
        dce += smoothing / C * (w.sum() * np.exp(log_p) - w)

    if callable(mass):
        ranks = rank_by(list(z) if votes is None else count(votes, C))
        masses = [mass(r, C) for r in ranks]
    else:
        masses = mass
    label = soft_label(y, masses)
    others = [c for c in range(C) if c != y]
    log_q = log_softmax(z[others])
    terms, dzipf = [], np.zeros(C)
    for c, lq in zip(others, log_q, strict=True):
        if label[c] > 0:
            terms.append(label[c] * (math.log(label[c]) - lq))
        dzipf[c] = np.exp(lq) - label[c]
    correct = all(not (z[c] > z[y] or (c < y and z[c] == z[y])) for c in others)
    return ce, math.fsum(terms), dce, dzipf, correct


def soft_sample(z, t, votes, mass, *, class_weight=None, smoothing=0.0):
    """As ``sample``, of a target t (C,) of probabilities."""
    z, t = np.asarray(z, dtype=np.float64), np.asarray(t, dtype=np.float64)
    C = len(z)
    w = np.ones(C) if class_weight is None else np.asarray(class_weight, dtype=np.float64)
    mixed = w * ((1 - smoothing) * t + smoothing / C)
    log_p = log_softmax(z)
    with np.errstate(invalid="ignore"):
        ce = -math.fsum(mixed * log_p)
    dce = np.exp(log_p) * math.fsum(mixed) - mixed

    least = [c for c in range(C) if t[c] == min(t)]
    zipf, dzipf = 0.0, np.zeros(C)
    if len(least) >= 2:
        if callable(mass):
            mass = [mass(r, C) for r in rank_by(list(z) if votes is None else count(votes, C))]
        total = math.fsum(mass[c] for c in least)
        log_q = log_softmax(z[least])
        for c, lq in zip(least, log_q, strict=True):
            label = mass[c] / total if total > 0 else 1 / len(least)
            if label > 0:
                zipf += label * (math.log(label) - lq)
            dzipf[c] = np.exp(lq) - label
    return ce, zipf, dce, dzipf, int(np.argmax(z)) == int(np.argmax(t))


def batch(
    logits,
    target,
    votes,
    mass,
    *,
    zipf_weight=1.0,
    ce_weight=1.0,
    only_correct=False,
    class_weight=None,
    smoothing=0.0,
    ignore_index=-100,
    reduction="mean",
):
    """(loss, ce, zipf, d loss/d logits) of a batch; gradient of the sum for "none".

    ``target`` holds N classes, or N rows of C probabilities, of which none is ignored or weighs another.
    """
    N, C = np.shape(logits)
    soft = np.ndim(target) == 2
    w = np.ones(C) if class_weight is None else np.asarray(class_weight, dtype=np.float64)
    ce, zipf = np.zeros(N), np.zeros(N)
    dce, dzipf = np.zeros((N, C)), np.zeros((N, C))
    ce_total = zipf_total = kept = 0.0
    for i in range(N):
        y = target[i] if soft else int(target[i])
        if not soft and y == ignore_index:
            continue
        m = mass if callable(mass) else mass[i]
        v = None if votes is None else list(map(int, votes[i]))
        of_one = soft_sample if soft else sample
        a, b, da, db, correct = of_one(logits[i], y, v, m, class_weight=class_weight, smoothing=smoothing)
        ce[i], dce[i] = a, da
        ce_total += 1 if soft else w[y]
        kept += 1
        if correct or not only_correct:
            zipf[i], dzipf[i] = b, db
            zipf_total += 1
    if reduction == "none":
        return ce_weight * ce + zipf_weight * zipf, ce, zipf, ce_weight * dce + zipf_weight * dzipf
    ce_scale = zipf_scale = 1.0
    if reduction == "mean":
        ce_scale = 1 / ce_total if ce_total else math.nan
        zipf_scale = 1 / zipf_total if zipf_total else (0.0 if kept else math.nan)
    ce_sum, zipf_sum = ce.sum() * ce_scale, zipf.sum() * zipf_scale
    grad = np.zeros((N, C))
    if kept:
        grad = ce_weight * ce_scale * dce + zipf_weight * zipf_scale * dzipf
    return ce_weight * ce_sum + zipf_weight * zipf_sum, ce_sum, zipf_sum, grad


MASSES = {
    "Zipf": lambda alpha: lambda r, C: r**-alpha,
    "Constant": lambda: lambda r, C: 1.0,
    "LinearDecay": lambda s: lambda r, C: max(0.0, (C - r) * 2 * (1 - C * s) / ((C - 1) * C) + s),
    "ExponentialDecay": lambda rate: lambda r, C: math.exp(-rate * (r - 1)),
}
