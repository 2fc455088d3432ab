"""The rows of ``python -m zipfls_cuda check``: what each calls, how it is judged, and the table of all.

A row is an operator of a backend at one dtype and shape. The shapes are chosen so that all kernels of all
backends are launched: many short rows, rows held on chip, rows shared by a cluster, rows read twice; labels
from counted, hashed and sorted votes, from the logits and from masses per class; products of every dtype,
layout and tile.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional, ops
from .expected import (
    IGNORE,
    Deviation,
    DistillCase,
    LossCase,
    Problem,
    Rows,
    VoteCase,
    arithmetic_dtype,
    check_dtype,
    deviation,
    distillation,
    expected_loss,
    expected_scores,
    loss_deviations,
    problem,
    rounding,
    roundings_of,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Results = Sequence[Tensor]
Prepared = tuple[Callable[[], Results], Callable[[Results], Iterator[Deviation]]]  # a call, and its judge


class Row(NamedTuple):
    """One line of the table: ``prepare(*the other fields)`` gives a call and the judge of its results."""

    device: torch.device
    backend: str
    operator: str
    dtype: torch.dtype
    case: Any
    prepare: Callable[..., Prepared]

    def names(self) -> dict[str, str]:
        """The row, for the table and the report."""
        case = f"{self.case[0]} x {self.case[1]}" if self.prepare is backward_row else str(self.case)
        if self.prepare is bad_row:
            case = "soft, " * self.case.soft + "sample out of range, NaN"
        return {
            "device": str(self.device),
            "backend": self.backend,
            "operator": self.operator,
            "dtype": str(self.dtype).removeprefix("torch."),
            "case": case,
        }


# What a row calls ---------------------------------------------------------------------------------------


def invoke(operator: str, backend: str, case: LossCase, p: Problem) -> Results:
    """The results of an operator of ranks, labels or losses."""
    op = ops.OPERATORS[operator, backend]
    if operator == "rank_fwd":
        return (op(p.votes, case.C),)
    if operator == "label_fwd":
        return (op(p.target, p.votes, p.log_mass, case.C, IGNORE),)
    options = (1.0, case.zipf_weight, 0.1 if case.options else 0.0, case.options)
    arguments = (p.target, p.votes, p.log_mass, p.weight, *options, IGNORE, case.reduction)
    if not operator.endswith("_"):
        return op(p.logits, *arguments, True)
    grad = p.logits.clone()
    if operator == "loss_factors_bwd_":
        keep = ops.OPERATORS["loss_factors_fwd", backend]
        *parts, factors, patches, scale = keep(p.logits, *arguments)
        op(grad, p.target, p.votes, factors, patches, torch.ones_like(factors[:, 0]), scale)
        return *parts, grad, scale.new_empty(0)
    *parts, scale = op(grad, *arguments)
    return *parts, grad, scale


def compare(
    operator: str, backend: str, case: LossCase, dtype: torch.dtype, results: Results, rows: Rows = ...
) -> Iterator[Deviation]:
    """Deviations of what ``invoke`` returned; ``rows`` needs results of each sample."""
    x, roundings = expected_loss(case, dtype), roundings_of(backend, case.C)
    if operator == "rank_fwd":
        check_dtype("rank", results[0], torch.int32)
        yield deviation("rank", results[0][rows], x.ranks[rows], 0.0)
    elif operator == "label_fwd":
        check_dtype("label", results[0], dtype)
        label = x.label[rows]
        yield deviation("label", results[0][rows], label, rounding(label, label, dtype, roundings))
    else:
        *parts, grad, scale = results
        scale = scale if scale.numel() else 1.0
        yield from loss_deviations(x, dtype, parts, [grad], scale, rows=rows, roundings=roundings)


def operator_row(device, backend, operator, dtype, case: LossCase) -> Prepared:
    """An operator on a case's tensors; the dtype of rank_fwd is that of the votes."""
    of = torch.float32 if operator == "rank_fwd" else dtype
    p = problem(case, of).to(device)
    if operator == "rank_fwd":
        p = p._replace(votes=p.votes.to(dtype))
    return (
        lambda: invoke(operator, backend, case, p),
        lambda results: compare(operator, backend, case, of, results),
    )


BAD = (("target", 12), ("target", -1), ("votes", 12), ("votes", 2**31 - 1), ("logits", torch.nan))


def bad_row(device, backend, operator, dtype, case: LossCase) -> Prepared:
    """Sample 2 is out of range, or NaN: an IndexError or NaN there (a rank: 0), and no harm to the others."""
    p, others = problem(case, dtype), [i for i in range(case.N) if i != 2]
    read = {"rank_fwd": ("votes",), "label_fwd": ("votes", "target")}.get(operator, Problem._fields)
    raising = device.type == "cpu" and backend != "triton"
    bad: list[tuple[str, Problem]] = []
    for name, value in BAD:
        if name in read and not (name == "target" and case.soft):
            x = getattr(p, name).clone()
            x[2, ...] = value
            bad.append((f"{name}[2] = {value}", p._replace(**{name: x}).to(device)))
    width = 1 if operator in ("rank_fwd", "label_fwd") else 5

    def call() -> Results:
        found: list[Tensor] = []
        for name, q in bad:
            expected = raising and "nan" not in name
            try:
                found += invoke(operator, backend, case, q)
            except IndexError:
                if not expected:
                    raise
            else:
                if expected:
                    raise AssertionError(f"{name} of {case.C} classes raised no IndexError")
        return found

    def judge(results: Results) -> Iterator[Deviation]:
        for one in zip(*[iter(results)] * width):
            for x in (one[0], one[3]) if width == 5 else one[:1]:
                if not (x[2] == 0 if operator == "rank_fwd" else x[2].isnan()).all():
                    raise AssertionError(
                        "the results of a sample out of range, or with a NaN, are not NaN (rank: 0)"
                    )
            yield from compare(operator, backend, case, dtype, one, others)

    return call, judge


def public_row(device, backend, operator, dtype, case: LossCase) -> Prepared:
    """A public function; of a loss the gradient attached to it, also taken twice or in place."""
    p, (name, _, kind) = problem(case, dtype).to(device), operator.partition(" ")

    def call() -> Results:
        if name == "rank_votes":
            return (functional.rank_votes(p.votes, case.C, backend=backend),)
        if name == "zipf_label":
            return (functional.zipf_label(p.target, p.votes, case.C, backend=backend),)
        x = p.logits.clone().requires_grad_()
        parts = functional.zipf_cross_entropy(
            x * 1 if kind == "inplace" else x, p.target, p.votes, zipf_weight=case.zipf_weight,
            reduction=case.reduction, return_parts=True, inplace=kind == "inplace", backend=backend,
        )  # fmt: skip
        upstream = torch.full_like(parts[0], 3.0)
        grads = [torch.autograd.grad(parts[0], x, upstream, retain_graph=kind == "twice")[0]]
        if kind == "twice":
            grads += torch.autograd.grad(parts[0], x, upstream)
        return [part.detach() for part in parts] + grads

    def judge(results: Results) -> Iterator[Deviation]:
        if name == "zipf_cross_entropy":
            x, roundings = expected_loss(case, dtype), roundings_of(backend, case.C)
            return loss_deviations(x, dtype, results[:3], results[3:], upstream=3.0, roundings=roundings)
        return compare(STAGES[name], backend, case, dtype, results)

    return call, judge


def distill_row(device, backend, operator, dtype, case: DistillCase) -> Prepared:
    """distill_fwd and distill_grad_, or the public function and the gradient attached to it."""
    (taught, x), wide = distillation(case, dtype), arithmetic_dtype(dtype)
    tensors, (a, kd, tckd, nckd, soft) = taught.to(device), case.weights
    options = (*case.weights, 0.0, case.temperature, case.form, IGNORE, case.reduction)
    upstream = 3.0 if operator == "distillation_loss" else 1.0

    def call() -> Results:
        logits, *others = tensors
        if operator == "distillation_loss":
            logits = logits.clone().requires_grad_()
            parts = functional.distillation_loss(
                logits, *others[:2], sample_weight=others[2], teacher_index=others[3], ce_weight=a,
                kd_weight=kd, tckd_weight=tckd, nckd_weight=nckd, soft_target_weight=soft,
                temperature=case.temperature, form=case.form, reduction=case.reduction, return_parts=True,
                backend=backend,
            )  # fmt: skip
            grad = torch.autograd.grad(parts[0], logits, torch.full_like(parts[0], upstream))
            return [*(part.detach() for part in parts), *grad, torch.empty(0)]
        op = ops.OPERATORS[operator, backend]
        if not operator.endswith("_"):
            return op(logits, *others, *options, True)
        grad = logits.clone()
        *parts, scale = op(grad, *others, *options)
        return *parts, grad, scale

    def judge(results: Results) -> Iterator[Deviation]:
        *parts, grad, scale = results
        roundings, T = roundings_of(backend, case.C), case.temperature
        for what, got, exact in zip(("loss", "ce", "distillation"), parts, x[:3]):
            check_dtype(what, got, wide)
            yield deviation(what, got, exact, rounding(exact, T * T * (1 + exact.abs()), wide, roundings))
        check_dtype("gradient", grad, dtype)
        got, exact = grad.double() * (scale if scale.numel() else 1.0), x.grad * upstream
        yield deviation("gradient", got, exact, rounding(exact, x.size * upstream, dtype, roundings))

    return call, judge


def backward_row(device, backend, operator, dtype, case: tuple[int, int, bool]) -> Prepared:
    """loss_bwd and loss_bwd_: gradient times upstream gradient, a scalar or of each sample, times scale."""
    (N, C, per_sample), wide = case, arithmetic_dtype(dtype)
    g = torch.Generator().manual_seed(N + C)
    upstream = (torch.rand((N,) if per_sample else (), generator=g) + 0.5).to(wide)
    scale = torch.tensor(0.37, dtype=wide) if dtype == torch.float16 else torch.empty(0, dtype=wide)
    inputs = (torch.randn(N, C, generator=g).to(dtype), upstream, scale)
    exact = inputs[0].double() * upstream.double().unsqueeze(-1) * (scale.double() if scale.numel() else 1.0)
    op, (grad, *rest) = ops.OPERATORS[operator, backend], [x.to(device) for x in inputs]

    def call() -> Results:
        if not operator.endswith("_"):
            return (op(grad, *rest),)
        out = grad.clone()
        op(out, *rest)
        return (out,)

    def judge(results: Results) -> Iterator[Deviation]:
        check_dtype("gradient", results[0], dtype)
        yield deviation("gradient", results[0], exact, rounding(exact, exact.abs(), dtype))

    return call, judge


@contextlib.contextmanager
def tensor_float_32(allowed: bool) -> Iterator[None]:
    """Whether float32 products on a GPU may run as TensorFloat-32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, allowed
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def vote_row(device, backend, operator, dtype, case: VoteCase) -> Prepared:
    """A vote may miss the best score by its rounding; among equal scores the lowest class wins, NaN never."""
    inputs, scores, margin = expected_scores(case, dtype)
    inputs = [x.to(device) for x in inputs]

    def call() -> Results:
        with tensor_float_32(case.tf32):
            if operator == "dense_vote":
                return (functional.dense_vote(*inputs, upsample=case.upsample, backend=backend),)
            return (ops.OPERATORS[operator, backend](*inputs, case.upsample),)

    def judge(results: Results) -> Iterator[Deviation]:
        check_dtype("votes", results[0], torch.int32)
        votes = results[0].cpu().long()
        if votes.shape != scores.shape[:2] or votes.min() < 0 or votes.max() >= case.C:
            raise AssertionError(f"votes {tuple(votes.shape)} from {votes.min()} to {votes.max()}")
        if case.integers:
            yield deviation("votes", votes, scores.argmax(-1), 0.0)
        chosen = scores.gather(-1, votes[..., None])[..., 0]
        yield deviation("score of the vote", chosen, scores.amax(-1), margin)

    return call, judge


# The table ----------------------------------------------------------------------------------------------

STAGES = {"zipf_cross_entropy": "loss_fwd", "zipf_label": "label_fwd", "rank_votes": "rank_fwd"}
STAGES |= {"dense_vote": "vote_fwd", "distillation_loss": "distill_fwd"}
Plan = tuple[tuple[str, ...], Sequence, Sequence[torch.dtype], Callable[..., Prepared]]


def plans(many: int, quick: bool, tiny: bool) -> Iterator[Plan]:
    """(operators, cases, dtypes, prepare); ``many`` rows fill the device, ``tiny`` is for an interpreter."""
    dtypes = DTYPES[: 1 if tiny else 2 if quick else 4]
    cases = tiny_cases() if tiny else quick_cases(many)
    if not quick and not tiny:
        cases = [a + b for a, b in zip(cases, more_cases(many))]
    losses, soft, labels, votes, scaled = cases
    bad = LossCase(5, 12, 9, "none")
    plain = [c._replace(options=False, reduction="mean") for c in (losses[0], soft[0])]
    yield ("loss_fwd", "loss_grad_"), [*losses, *soft], dtypes, operator_row
    kept = [c._replace(options=False) for c in losses if c.ranking == "votes" and c.P <= 1024]
    yield ("loss_factors_bwd_",), kept, dtypes, operator_row
    yield ("distill_fwd", "distill_grad_"), distill_cases(quick, tiny), dtypes, distill_row
    yield ("distillation_loss",), distill_cases(quick=True, tiny=True), dtypes[:1], distill_row
    yield ("loss_bwd", "loss_bwd_"), scaled, dtypes, backward_row
    yield ("label_fwd",), labels, (torch.float32, torch.float64)[: len(dtypes)], operator_row
    yield ("rank_fwd",), labels, (torch.int32, torch.int64)[: len(dtypes)], operator_row
    yield ("vote_fwd",), votes, dtypes, vote_row
    yield ("vote_fwd",), [case._replace(tf32=True) for case in votes], dtypes[:1], vote_row
    for kind in ("", " twice", " inplace"):
        yield ("zipf_cross_entropy" + kind,), plain, dtypes, public_row
    yield ("zipf_label", "rank_votes"), labels[:1], dtypes[:1], public_row
    yield ("dense_vote",), votes[:1], dtypes[:1], vote_row
    yield ("loss_fwd", "loss_grad_", "loss_factors_bwd_", "label_fwd", "rank_fwd"), [bad], dtypes[:1], bad_row
    yield ("loss_fwd", "loss_grad_"), [bad._replace(soft=True)], dtypes[:1], bad_row


Cases = list[list]  # of losses, of losses with soft targets, of labels, of votes, of backward


def quick_cases(many: int) -> Cases:
    """A case of each kind."""
    losses = [
        LossCase(16, 1000, reduction="none"),
        LossCase(many, 130, 20, options=True),
        LossCase(4, 20011, 320, "sum"),
        LossCase(8, 1000, ranking="logits"),
        LossCase(8, 1003, ranking="masses"),
    ]
    if many > 4000:  # a GPU: past what a cluster of blocks holds
        losses.append(LossCase(2, 50021))
    soft = [case._replace(soft=True, N=min(case.N, 300)) for case in losses]
    labels = [LossCase(9, 12, 9, ""), LossCase(16, 48, 32, ""), LossCase(4, 32001, 320, "")]
    votes = [
        VoteCase(2, 64, 7, 7, 257),
        VoteCase(2, 64, 8, 8, 257),
        VoteCase(2, 40, 7, 7, 300, "tokens"),
        VoteCase(2, 40, 8, 8, 70, "NHWC", integers=True),
        VoteCase(2, 40, 4, 6, 70, upsample=2),
        VoteCase(2, 24, 12, 12, 70, "NHWC", upsample=2),
    ]
    if many > 4000:  # a GPU: products large enough for wgmma
        votes += [VoteCase(65, 200, 7, 7, 1000, "NHWC"), VoteCase(128, 264, 7, 7, 100, "NHWC")]
    return [[*losses, LossCase(many, 100)], soft, labels, votes, [(16, 1000, False), (7, 37, True)]]


def more_cases(many: int) -> Cases:
    """What takes longer, or differs less."""
    longest = 131075 if many > 4000 else 33003  # past what a cluster of blocks holds
    losses = [
        LossCase(many, 500),
        LossCase(2, longest),
        LossCase(2, 5003, ranking="logits"),
        LossCase(3, 5000, 3000),
        LossCase(5, 2, 9),
        LossCase(5, 37, 0),
    ]
    soft = [
        LossCase(4, 4091, soft=True, ranking="logits"),
        LossCase(2, longest, soft=True),
        LossCase(9, 37, soft=True),
    ]
    labels = [LossCase(3, 5000, 3000, ""), LossCase(16, 1000, 49, ""), LossCase(5, 2, 9, "")]
    votes = [
        VoteCase(16, 64, 8, 8, 100),
        VoteCase(3, 33, 5, 7, 101),
        VoteCase(2, 24, 5, 5, 70, "NHWC", upsample=2, integers=True),
    ]
    return [losses, soft, labels, votes, [(many, 500, False), (2, 20011, True)]]


def tiny_cases() -> Cases:
    """A case of each Triton kernel that takes no time in its interpreter."""
    losses = [LossCase(5, 37, 9, options=True), LossCase(2, 4100, 20), LossCase(3, 40, ranking="logits")]
    soft = [LossCase(5, 37, 9, soft=True, options=True), LossCase(2, 2100, 20, soft=True)]
    votes = [VoteCase(2, 20, 3, 3, 40, "NHWC", integers=True), VoteCase(2, 20, 5, 5, 40)]
    votes += [VoteCase(2, 20, 3, 4, 40, upsample=2)]
    return [losses, soft, [LossCase(5, 37, 9, "")], votes, [(5, 37, False), (5, 37, True)]]


def distill_cases(quick: bool, tiny: bool) -> list[DistillCase]:
    """Distillation: short and long rows, T of 1 and others, both forms."""
    cases = [DistillCase(7, 37, options=True), DistillCase(5, 40, "none", 1.0, "cross_entropy")]
    if not tiny:
        cases += [DistillCase(16, 1000, "sum"), DistillCase(5, 2, temperature=2.0)]
    if not quick:
        cases += [DistillCase(3, 20011, temperature=1.5), DistillCase(67, 130, "none", options=True)]
    return cases


def rows_of(device: torch.device, quick: bool) -> list[Row]:
    """The rows of a device: each operator of each backend that serves its tensors."""
    many = 67
    if device.type == "cuda":
        many = max(4099, 32 * torch.cuda.get_device_properties(device).multi_processor_count + 3)
    rows = []
    for backend in ops.BACKENDS:
        tiny = backend == "triton" and ops.triton_interpreted()
        for operators, cases, dtypes, prepare in plans(many, quick, tiny):
            for operator, case, dtype in itertools.product(operators, cases, dtypes):
                tf32 = getattr(case, "tf32", False)
                if tf32 and (device.type == "cpu" or backend == "reference"):
                    continue
                with tensor_float_32(tf32):
                    stage = STAGES.get(operator.split()[0], operator)
                    refused = ops.refusal(backend, stage, device.type, dtype)
                if not refused:
                    rows.append(Row(device, backend, operator, dtype, case, prepare))
    return rows
