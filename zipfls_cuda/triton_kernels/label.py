"""Stages 2 and 3 on a GPU: votes -> ranks -> soft label, kept as "one constant and at most P exceptions".

Where masses depend on the rank of votes alone, at most P classes differ from the rest (MATH: "Why one pass is
enough"), so a row's label is the label of each vote's class, the label of all classes without a vote, and the
number of the latter. ``votes_label`` computes exactly that in registers; the loss kernels use it and never
see an (N, C) label. ``rank_fwd`` and ``label_fwd`` write the dense form out, for inspection.

How a row of votes is counted without indexing shared memory, which Triton does not offer:

* P <= SORTED_VOTES: a bitonic sort in registers, at P = 49 some 200 instructions of one warp. Equal votes are
  then neighbours, and the last of them stands for its class. A class with n votes has a vote at each place
  1 .. n of its run, so a histogram of the places gives b_k, the number of classes with at least k votes, and
  the rank of a class with k votes is 1 + b_{k+1}.
* larger P: a hash table in global memory, 20 P bytes for each program in flight, counted by integer atomics.
  (Compiling tl.sort or tl.gather for thousands of votes takes minutes and gigabytes.) Each vote i learns its
  class's count n_i, and all of a class's votes stand for it, 1/n_i each. A histogram of the n_i gives, at
  level k, h_k = k * a_k with a_k the number of classes with k votes, whose rank is 1 + sum_{j>k} a_j.

Neither depends on the order of equal votes or of atomics: bitwise the same on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import outside, whole_label
from .launch_cache import device_of, launch

INTERPRET: bool = triton.knobs.runtime.interpret  # whether kernels run in Triton's interpreter
INTERPRETED = tl.constexpr(INTERPRET)

SORTED_VOTES = 256  # 36 steps of 4 instructions for each vote; the compiler takes seconds for more
MOST_VOTES = 4096  # P above is refused: a row of votes must fit in a program's registers
HASHING_PROGRAMS = 264  # two per multiprocessor share 264 * 20 P bytes of scratch; rows are walked through


# Device functions ----------------------------------------------------------------------------------


@triton.jit
def maximum(a, b):
    """What a scan combines by."""
    return tl.maximum(a, b)


@triton.jit
def load_votes(
    votes,  # (N, P) int32 or int64, any strides
    votes_stride_n,
    votes_stride_p,
    row,  # (R,) int64
    row_ok,  # (R,) bool, row < N
    C,
    P,
    P2: tl.constexpr,  # power of two >= P
):
    """Votes of R rows: v (R, P2) int32; live (R, P2): it is a vote in [0, C); bad (R,): one is >= C."""
    p = tl.arange(0, P2)
    inside = row_ok[:, None] & (p < P)[None, :]
    at = row[:, None] * votes_stride_n + p[None, :].to(tl.int64) * votes_stride_p
    v = tl.load(votes + at, mask=inside, other=-1)
    live = (v >= 0) & (v < C)
    bad = tl.max((v >= C).to(tl.int32), 1) > 0
    return tl.where(live, v, -1).to(tl.int32), live, bad


@triton.jit
def sort_rows(v, P2: tl.constexpr):
    """v (R, P2) in ascending order; tl.sort takes 0.3 s a program in the interpreter."""
    if INTERPRETED:
        i, j = tl.arange(0, P2)[None, :, None], tl.arange(0, P2)[None, None, :]
        before = (v[:, None, :] < v[:, :, None]) | ((v[:, None, :] == v[:, :, None]) & (j < i))
        place = tl.sum(before.to(tl.int32), 2)
        return tl.sum(tl.where(place[:, None, :] == i, v[:, None, :], 0), 2)
    else:
        return tl.sort(v, 1)


@triton.jit
def count_sorted(v, R: tl.constexpr, P2: tl.constexpr):
    """Of sorted rows (R, P2): whether a vote is the last of its equals, and its place among them, from 1."""
    p = tl.arange(0, P2)[None, :]
    none = tl.zeros([R, 1], tl.int32)
    first = v != tl.gather(v, tl.maximum(p - 1, 0) + none, 1)
    start = tl.associative_scan(tl.where(first, p, 0), 1, maximum)
    last = (v != tl.gather(v, tl.minimum(p + 1, P2 - 1) + none, 1)) | (p == P2 - 1)
    return last, p - start + 1


@triton.jit
def count_hashed(v, live, scratch, P2: tl.constexpr):
    """Votes that the class of each vote has, and how many have each count, from 1; (1, P2) each.

    scratch (5 P2,) int32, in global memory and so in L2: keys and counts of a hash table of 2 P2 slots, and
    the histogram. In which slot a class ends up depends on which thread comes first; its count does not.
    Hazards: a barrier stands before the first store (the row before may still be read), between clearing and
    counting, and between each count and its reading, which goes to L2 (.cg), where the atomics were.
    """
    slots: tl.constexpr = 2 * P2
    counts = scratch + slots
    levels = counts + slots
    at = tl.arange(0, slots)[None, :]
    level = tl.arange(0, P2)[None, :]
    tl.debug_barrier()
    tl.store(scratch + at, tl.full([1, slots], -1, tl.int32))
    tl.store(counts + at, tl.zeros([1, slots], tl.int32))
    tl.store(levels + level, tl.zeros([1, P2], tl.int32))
    tl.debug_barrier()
    slot = v & (slots - 1)
    pending = live
    while tl.max(pending.to(tl.int32)) > 0:
        expected = tl.where(pending, -1, -2)  # no key is -2: the settled change nothing
        seen = tl.atomic_cas(scratch + slot, expected, v)
        pending = pending & (seen != -1) & (seen != v)
        slot = tl.where(pending, (slot + 1) & (slots - 1), slot)
    tl.atomic_add(counts + slot, 1, mask=live)
    tl.debug_barrier()
    count = tl.load(counts + slot, mask=live, other=1, cache_modifier=".cg")
    tl.atomic_add(levels + count - 1, 1, mask=live)
    tl.debug_barrier()
    return count, tl.load(levels + level, cache_modifier=".cg")


@triton.jit
def histogram_rows(x, mask, R: tl.constexpr, P2: tl.constexpr):
    """(R, P2) int32: how often each of 0 .. P2-1 occurs in each row of x (R, P2), where mask holds."""
    x += P2 * tl.arange(0, R)[:, None]
    counts = tl.histogram(tl.reshape(x, [R * P2]), R * P2, mask=tl.reshape(mask, [R * P2]))
    return tl.reshape(counts, [R, P2])


@triton.jit
def rank_of_votes(
    votes,  # (N, P) int32 or int64, any strides
    votes_stride_n,
    votes_stride_p,
    row,  # (R,) int64
    row_ok,  # (R,) bool
    C,
    P,
    scratch,  # (5 P2,) int32 of this program's own; not SORTED
    R: tl.constexpr,  # 1 if not SORTED
    P2: tl.constexpr,
    SORTED: tl.constexpr,
    PLACES: tl.constexpr = False,  # C P2 is below 2^31
):
    """Competition ranks of the voted classes.

    Returns, (R, P2): v, the votes, in any order; place, if PLACES: which of the row's votes each is; stands,
    which of them stand for their class; count, how many do for that class; rank, of it. K (R,): number of
    distinct voted classes; bad (R,): a vote is >= C.
    """
    v, live, bad = load_votes(votes, votes_stride_n, votes_stride_p, row, row_ok, C, P, P2)
    p = tl.arange(0, P2)[None, :] + tl.zeros_like(v)
    if SORTED:
        if PLACES:
            v = sort_rows(v * P2 + p, P2)
            p = v & (P2 - 1)
            v = (v - p) // P2
        else:
            v = sort_rows(v, P2)
        last, place = count_sorted(v, R, P2)
        live = v >= 0
        at_least = histogram_rows(tl.where(live, place - 1, 0), live, R, P2)  # classes with so many votes
        more = tl.gather(at_least, tl.minimum(place, P2 - 1), 1)
        rank = 1 + tl.where(place < P2, more, 0)
        stands = live & last
        K = tl.sum(stands.to(tl.int32), 1)
        count = tl.full([R, P2], 1, tl.int32)
    else:
        stands = live
        count, votes_at = count_hashed(v, live, scratch, P2)
        level = tl.where(live, count - 1, 0)
        classes_at = votes_at // (1 + tl.arange(0, P2))[None, :]
        classes_from = tl.cumsum(classes_at, 1, reverse=True)
        rank_at = 1 + classes_from - classes_at
        # Through memory: the table's keys are done with, since a barrier.
        tl.store(scratch + tl.arange(0, P2)[None, :], rank_at)
        tl.debug_barrier()
        rank = tl.load(scratch + level, cache_modifier=".cg")
        K = tl.sum(classes_at, 1)
    return v, p, stands, count, rank, K, bad


@triton.jit
def votes_label(
    votes,  # (N, P) int32 or int64, any strides
    votes_stride_n,
    votes_stride_p,
    log_mass,  # (table_length,) by rank from 1, float32 or float64
    table_length,
    row,  # (R,) int64
    row_ok,  # (R,) bool
    y,  # (R,) int64 in [0, C)
    C,
    P,
    scratch,  # (5 P2,) int32 of this program's own; not SORTED
    R: tl.constexpr,
    P2: tl.constexpr,
    SORTED: tl.constexpr,
    PLACES: tl.constexpr = False,
):
    """The soft label of R rows: of every vote's class, and of all the others at once.

    Returns:
        v, place (R, P2): the votes' classes, and places as of rank_of_votes; share (R, P2): 1 / (votes that
        stand for that class), and 0 where the vote stands for none, or for the target, so that a sum over
        voted non-target classes is sum_i share_i x_i; p (R, P2): the label of v, where it stands; q, rest
        (R,): the label of the non-target classes without a vote, and their number; entropy (R,): the sum over
        all classes of p log p; bad (R,): a vote is >= C.
    """
    v, place, stands, count, rank, K, bad = rank_of_votes(
        votes, votes_stride_n, votes_stride_p, row, row_ok, C, P, scratch, R, P2, SORTED, PLACES
    )
    at_target = v == y.to(tl.int32)[:, None]
    target_voted = tl.max((stands & at_target).to(tl.int32), 1)
    rest = C - 1 - (K - target_voted)
    share, p, q, entropy = label_of_ranks(log_mass, table_length, stands & ~at_target, count, rank, K, rest)
    return v, place, share, p, q, entropy, rest, bad


@triton.jit
def label_of_ranks(log_mass, table_length, exception, count, rank, K, rest):
    """share, p (R, P2), q and entropy (R,) of votes_label.

    ``exception`` (R, P2): the vote stands for a class of the label; rest (R,): number of its other classes.
    """
    dtype: tl.constexpr = log_mass.dtype.element_ty
    log_p = tl.load(log_mass + tl.minimum(rank, table_length) - 1, mask=exception, other=-float("inf"))
    log_q = tl.load(log_mass + tl.minimum(K, table_length - 1))  # of rank K + 1
    log_q = tl.where(rest > 0, log_q, -float("inf"))
    # Normalised by the largest mass, in log space: at alpha = 150 all but one underflow.
    top = tl.maximum(tl.max(log_p, 1), log_q)
    massless = top == -float("inf")  # every mass is zero: uniform
    log_p = tl.where(massless[:, None], tl.zeros_like(log_p), log_p - top[:, None])
    log_q = tl.where(massless, tl.zeros_like(log_q), log_q - top)
    share = tl.where(exception, tl.full(count.shape, 1, dtype) / tl.maximum(count, 1).to(dtype), 0.0)
    p, q = tl.exp(log_p), tl.exp(log_q)
    rest_q = rest.to(dtype) * q
    total = tl.sum(share * p, 1) + rest_q
    # Relative to the largest: sum p log p = sum p log (p / total) / total, where 0 log 0 is 0.
    entropy = tl.sum(tl.where(p > 0, share * p * log_p, 0.0), 1) + tl.where(rest_q > 0, rest_q * log_q, 0.0)
    return share, p / total[:, None], q / total, entropy / total - tl.log(total)


# Kernels -------------------------------------------------------------------------------------------


@triton.jit
def rank_fwd_kernel(
    votes,  # (N, P) int32 or int64, any strides
    votes_stride_n,
    votes_stride_p,
    ranks,  # (N, C) int32
    scratch,  # (programs, 5 P2) int32; not SORTED
    N,
    C,
    P,
    P2: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Ranks of all classes. A row at a time; writes 4 C bytes and reads the row's votes.

    Every class is first given the rank after the voted ones, then the voted ones are written over: two
    threads may write one address, so a barrier stands between (equal votes write equal values).
    """
    scratch += tl.program_id(0).to(tl.int64) * 5 * P2
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.full([1], n, tl.int64)
        v, _, stands, _, rank, K, bad = rank_of_votes(
            votes, votes_stride_n, votes_stride_p, row, row < N, C, P, scratch, 1, P2, SORTED
        )
        start = row[:, None] * C
        others = tl.where(bad, 0, K + 1)[:, None]
        for first in range(0, C, BLOCK):
            c = first + tl.arange(0, BLOCK)[None, :]
            tl.store(ranks + start + c, others + tl.zeros([1, BLOCK], tl.int32), mask=c < C)
        tl.debug_barrier()
        tl.store(ranks + start + v, rank, mask=stands & ~bad[:, None])


# Launchers -----------------------------------------------------------------------------------------


def vote_tile(P: int) -> tuple[int, bool]:
    """(P2, SORTED): size of the register tile that holds a row's votes, and how they are counted.

    Raises:
        RuntimeError: more votes a sample than this backend serves.
    """
    if P > MOST_VOTES:
        raise RuntimeError(f'backend="triton" serves at most {MOST_VOTES} votes a sample, got {P}')
    return max(16, triton.next_power_of_2(P)), P <= SORTED_VOTES


def vote_scratch(programs: int, P2: int, x: Tensor) -> Tensor:
    """What count_hashed needs, (programs, 5 P2) int32, on the device of ``x``."""
    return torch.empty((programs, 5 * P2), dtype=torch.int32, device=x.device)


def rank_fwd(votes: Tensor, num_classes: int) -> Tensor:
    """See reference.rank_fwd; a row with a vote >= C becomes 0."""
    N, P = votes.shape
    ranks = torch.empty((N, num_classes), dtype=torch.int32, device=votes.device)
    if N == 0:
        return ranks
    P2, sorted_ = vote_tile(P)
    BLOCK = min(2048, triton.next_power_of_2(num_classes))
    with device_of(votes):
        programs = N if sorted_ else min(N, HASHING_PROGRAMS)
        scratch = ranks if sorted_ else vote_scratch(programs, P2, votes)
        args = (votes, *votes.stride(), ranks, scratch, N, num_classes, P, P2, sorted_, BLOCK)
        launch(rank_fwd_kernel, (programs, 1, 1), args, (votes,), 8 if P2 > 1024 else 4)
    return ranks


def label_fwd(target: Tensor, votes: Tensor, log_mass: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """See reference.label_fwd; a row with a target or vote out of range becomes NaN.

    A whole label is for inspection: the ranks are a kernel's, the rest is PyTorch's.
    """
    ignored = target == ignore_index
    bad = outside(target, votes, num_classes, ignored)
    if log_mass.dim() == 1:
        log_mass = log_mass[(rank_fwd(votes, num_classes).long() - 1).clamp(0, len(log_mass) - 1)]
    return whole_label(log_mass, target, bad, ignored)
