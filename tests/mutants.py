"""``make mutants``: faults seeded into a copy of the source, each of which the tests must catch.

Every mutant is one small change to the maths. It is applied to a copy of the package, the tests it concerns
run against that copy, and at least one must fail. Prints what caught each; exits 1 if any survives, or if a
fault's text is no longer in the source. ``python tests/mutants.py WORD`` runs those whose name contains WORD.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LOSS = ("tests/test_golden.py", "tests/test_loss.py", "tests/test_autograd.py", "tests/test_api.py")
DISTILL = ("tests/test_distillation.py",)
METHODS = ("tests/test_methods.py",)
OUTPUTS = ("tests/test_methods_outputs.py",)
MADE = ("tests/test_methods_labels.py",)
SYSTEMS = ("tests/test_methods_systems.py",)
LINEAR = ("tests/test_linear.py",)
LABEL = ("tests/test_golden.py", "tests/test_label.py")
VOTE = ("tests/test_vote.py",)


class Mutant(NamedTuple):
    """One fault: ``old`` becomes ``new`` in ``path``, and one of ``tests`` must fail over ``backend``."""

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    backend: str = "reference"


REFERENCE = "zipfls_cuda/reference.py"
AUTOGRAD = "zipfls_cuda/autograd.py"
CHUNKED = "zipfls_cuda/chunked.py"
LAWS = "zipfls_cuda/labels.py"
TRITON = "zipfls_cuda/triton_kernels"
MODULES, PAIRS, SNAPSHOTS, SEVERAL, MADE_LABELS, STORES, MIXING, MEMORY, DYNAMIC = (
    f"zipfls_cuda/methods/{name}.py"
    for name in [
        "distillation",
        "pairs",
        "snapshots",
        "outputs",
        "labels",
        "stores",
        "mixing",
        "memory",
        "dynamic_mlp",
    ]
)

MUTANTS = [
    *(
        Mutant(f"linear: {name}", CHUNKED, old, new, LINEAR)
        for name, old, new in (
            ("CE in the unit of Zipf's mean", "ratio = ce / grad", "ratio = ce / ce"),
            ("ignored samples counted as correct", "correct & (t != ignore_index)", "correct"),
            ("only the last chunk's weight", "out.addmm_(dz.t(), x)", "out.copy_(dz.t() @ x)"),
            (
                "the mean not in the gradient",
                "grad_scale = ce_weight * ce + rest_weight * rest, factors.grad.clone()",
                "grad_scale = ce_weight * ce + rest_weight * rest, grad_scale",
            ),
            ("upstream by row ignored", "scale_(dz, grad_loss[rows], scale)", "pass"),
            ("float16 in Zipf's unit", "if dtype != torch.float16:", "if True:"),
            (
                "a gradient that can be differentiated",
                "if not anchor or not torch.is_grad_enabled()",
                "if True",
            ),
            ("ignored rows computed", "(~ignored).nonzero()[:, 0] if ignored.any() else None", "None"),
            ("saved gradients scaled where the graph is kept", "if overwrite:", "if True:"),
            (
                "the teacher's last chunk",
                "return teacher.logits(rows, most)[1], *of_rows",
                "return teacher.logits(chunks[0], most)[1][: len(head.input[rows])], *of_rows",
            ),
        )
    ),
    Mutant("DKD's warm-up from 0", MODULES, "((epoch + 1) / self.warmup", "(epoch / self.warmup", METHODS),
    Mutant("Tf-KD without 1 / C", MODULES, " / max(logits.shape[-1], 1)", "", METHODS),
    Mutant(
        "MrKD's cross-entropy with every copy",
        MODULES,
        "target, kd_weight=kd_weight, temperature=T)",
        "target, ce_weight=1 - self.alpha, kd_weight=kd_weight, temperature=T)",
        METHODS,
    ),
    Mutant(
        "partners of any class",
        PAIRS,
        "self._first + (share * self._size).long()",
        "(share * M).long()",
        METHODS,
    ),
    Mutant(
        "the newest copy replaced",
        SNAPSHOTS,
        "(taken - 1) % len(self.copies)",
        "taken % len(self.copies)",
        METHODS,
    ),
    Mutant("Tf-KD reg with its entropy", MADE_LABELS, "return loss - constant\n", "return loss\n", MADE),
    Mutant("teacher correction without T", MADE_LABELS, "self.temperature * (math.log", "(math.log", MADE),
    Mutant("MaxSup beside all of CE", MADE_LABELS, "1 - share, share", "0 * share + 1, share", MADE),
    Mutant("USKD's weight without the batch's mean", MADE_LABELS, "square + 1 - mean", "square + 1", MADE),
    Mutant("BAKE with the sample itself", MADE_LABELS, ".masked_fill(itself, 0)", "", MADE),
    Mutant("PS-KD's first epoch from the store", STORES, "torch.where(epoch == 0, 0, a)", "a", MADE),
    Mutant("PS-KD weights swapped", STORES, "torch.stack([1 - a, a])", "torch.stack([a, 1 - a])", MADE),
    Mutant("PS-KD forgets to store", STORES, "self.past.index_copy_(0, index, rows)", "pass", MADE),
    Mutant("OLS learns from what is wrong", STORES, "counted & (logits.argmax(1) == y)", "counted", MADE),
    Mutant("BYOT's soft term with T squared", SEVERAL, " / self.temperature**2", "", OUTPUTS),
    Mutant(
        "BYOT's hint from branch 1", SEVERAL, "branch_features[2:], 2)", "branch_features[1:], 1)", OUTPUTS
    ),
    Mutant(
        "DDGSD teaches one view",
        SEVERAL,
        "(logits_b, logits_a, target",
        "(logits_a, logits_b, target",
        OUTPUTS,
    ),
    Mutant(
        "RecursiveMix's rows not again", MIXING, "device) % len(x)", "device).clamp(max=len(x) - 1)", SYSTEMS
    ),
    Mutant("RecursiveMix's own labels", MIXING, "_rows(self.labels, N).to(labels)", "labels", SYSTEMS),
    Mutant(
        "a store's momentum turned round",
        MEMORY,
        "old + (1 - self.momentum) * e",
        "e + (1 - self.momentum) * old",
        SYSTEMS,
    ),
    Mutant("negatives of the own class", MEMORY, "at < first, at", "at < others, at", SYSTEMS),
    Mutant("Dynamic MLP without its shortcut", DYNAMIC, "features + self.norm", "self.norm", SYSTEMS),
    Mutant(
        "votes without place and date",
        "zipfls_cuda/attach/hooks.py",
        "features = features + positions.shape_for(",
        "_ = features + positions.shape_for(",
        ("tests/test_attach_fusion.py",),
    ),
    Mutant("distillation without T squared", REFERENCE, "T * T * _times(", "T * _times(", DISTILL),
    Mutant("KL without 1 - q_y before NCKD", REFERENCE, "kd_weight * r_v)", "kd_weight)", DISTILL),
    Mutant(
        "target left in the teacher's sums",
        REFERENCE,
        "((x - m[:, None]) / temperature).masked_fill(self.at_target, -torch.inf).exp()",
        "((x - m[:, None]) / temperature).exp()",
        DISTILL,
    ),
    Mutant(
        "0 times -inf at a masked class",
        REFERENCE,
        "torch.where(q > 0, q * ratio, 0.0)",
        "(q * ratio)",
        DISTILL,
    ),
    Mutant("log odds in float32", REFERENCE, "(x.double().masked_fill(", "(x.masked_fill(", DISTILL),
    Mutant("TCKD left out of the gradient", REFERENCE, "(beta + alpha * (r_u - r_v))", "beta", DISTILL),
    Mutant("soft target at T", REFERENCE, "torch.sigmoid(t_y - f_1.log())", "torch.sigmoid(v)", DISTILL),
    Mutant(
        "teacher's entropy kept",
        REFERENCE,
        '        if self.form == "divergence":\n            ratio',
        "        if True:\n            ratio",
        DISTILL,
    ),
    Mutant(
        "distillation of ignored samples in the mean",
        REFERENCE,
        "scale = 1 / (~ignored).sum()",
        "scale = 1 / torch.ones_like(ignored).sum()",
        DISTILL,
    ),
    Mutant(
        "weight of a sample on the cross-entropy",
        REFERENCE,
        "if w.dim() == 2 else (one, w)",
        "if w.dim() == 2 else (w, w)",
        DISTILL,
    ),
    *(
        Mutant(f"methods: {name}", REFERENCE, old, new, DISTILL)
        for name, old, new in (
            ("both weights turned round", "(w[:, 0], w[:, 1]) if w", "(w[:, 1], w[:, 0]) if w"),
            ("a row of 0 leaves nothing", "torch.where(empty, w_ce + w, w_ce)", "w_ce"),
            ("labels without their sum", "w = w * total", "w = w * 1.0"),
            ("the highest of equal logits", "(m == z_y) & (k < y)", "(m == z_y) & (k > y)"),
            ("the largest logit's gradient at the target alone", "[-step, step]", "[-step, 0 * step]"),
        )
    ),
    Mutant("gradient of the wrong sign", REFERENCE, "(p_nontarget - label)", "(label - p_nontarget)", LOSS),
    Mutant(
        "rank by >= instead of >",
        REFERENCE,
        "values.contiguous(), right=True)",
        "values.contiguous())",
        LABEL,
    ),
    Mutant(
        "target left in the label",
        REFERENCE,
        "    log_mass = log_mass.masked_fill(at_target, -torch.inf)\n",
        "",
        LABEL,
    ),
    Mutant(
        "target left in the non-target softmax",
        REFERENCE,
        "log_nontarget = logits.masked_fill(at_target, -torch.inf).log_softmax(1)",
        "log_nontarget = logits.log_softmax(1)",
        LOSS,
    ),
    Mutant(
        "target left in the gradient's softmax",
        REFERENCE,
        "p_nontarget = z.masked_fill(onehot.bool(), -torch.inf).softmax(1)",
        "p_nontarget = z.softmax(1)",
        LOSS,
    ),
    Mutant(
        "maximum not subtracted",
        REFERENCE,
        "log_p = z.log_softmax(1)",
        "log_p = z - z.exp().sum(1, True).log()",
        LOSS,
    ),
    Mutant(
        "CE divided by the batch size",
        REFERENCE,
        "torch.where(ce_total == 0, torch.nan, 1 / ce_total)",
        "ce_total.new_tensor(1 / N)",
        LOSS,
    ),
    Mutant("Zipf divided by the batch size", REFERENCE, "1 / correct_total)", "1 / max(N, 1))", LOSS),
    Mutant("class weights forgotten", REFERENCE, "ce = w[y] * nll", "ce = nll", LOSS),
    Mutant(
        "smoothing spread over C - 1", REFERENCE, "(e / C) * (w * log_p)", "(e / (C - 1)) * (w * log_p)", LOSS
    ),
    Mutant(
        "zero mass multiplied, not skipped",
        REFERENCE,
        "torch.where(label > 0, label * (log_label - log_nontarget), 0.0)",
        "(label * (log_label - log_nontarget)).masked_fill(at_target, 0.0)",
        LOSS,
    ),
    Mutant(
        "masses normalised outside log space",
        REFERENCE,
        "log_label = log_mass.log_softmax(1)",
        "log_label = (log_mass.exp() / log_mass.exp().sum(1, True)).log()",
        LABEL,
    ),
    Mutant(
        "label summed in float32",
        REFERENCE,
        "label_from_mass(log_mass.double(),",
        "label_from_mass(log_mass,",
        LABEL,
    ),
    Mutant(
        "infinity times a p that rounds to 0",
        REFERENCE,
        ".masked_fill(infinite & (log_prob > -torch.inf), 1.0)",
        "",
        ("tests/test_soft.py",),
    ),
    Mutant(
        "negative votes counted",
        REFERENCE,
        "inside = (votes >= 0) & (votes < num_classes)",
        "inside = votes < num_classes",
        LABEL,
    ),
    Mutant(
        "ignored samples kept in the gradient",
        REFERENCE,
        "dz = dz.masked_fill(bad[:, None], torch.nan).masked_fill(ignored[:, None], 0)",
        "dz = dz.masked_fill(bad[:, None], torch.nan)",
        LOSS,
    ),
    Mutant(
        "only_correct with ties to any class",
        REFERENCE,
        "~((logits > z_y) | (earlier & (logits == z_y))).any(1)",
        "~(logits > z_y).any(1)",
        LOSS,
    ),
    *(
        Mutant(f"soft target: {name}", REFERENCE, old, new, ("tests/test_soft.py",))
        for name, old, new in (
            ("least probability taken as zero", "target != target.amin(1, keepdim=True)", "target != 0"),
            ("classes of the least probability counted from one", "(~at_target).sum(1) >= 2", "~bad"),
            ("class weights forgotten", "u = u if weight is None else u * weight", "pass"),
            ("probabilities taken to sum to 1", "(prob * total - u)", "(prob - u)"),
            (
                "only_correct by the logits' own argmax",
                "is_correct(logits, argmax_lowest(t).long()",
                "is_correct(logits, logits.argmax(1)",
            ),
        )
    ),
    Mutant(
        "float16 mean divided before the scaler",
        REFERENCE,
        "dz = dz / grad_scale",
        "dz, grad_scale = dz, torch.ones_like(grad_scale)",
        LOSS,
    ),
    Mutant("ties to the highest class", REFERENCE, "index, C).amin(-1)", "index, -1).amax(-1)", VOTE),
    Mutant(
        "NaN wins the vote", REFERENCE, "best = scores.masked_fill(~valid, -torch.inf)", "best = scores", VOTE
    ),
    Mutant(
        "upsampling without the quarter",
        REFERENCE,
        "pair = [torch.lerp(scores, before, 0.25), ",
        "pair = [scores, ",
        VOTE,
    ),
    Mutant(
        "bias before interpolating",
        REFERENCE,
        "scores = F.linear(block.to(dtype), weight)  # (n, H*W, C), or (n, 1, C)",
        "scores = F.linear(block.to(dtype), weight, None if bias is None else bias * 0.5)",
        VOTE,
    ),
    Mutant(
        "saved gradient scaled twice",
        AUTOGRAD,
        "return not torch._C._autograd._get_current_graph_task_keep_graph()",
        "return True",
        LOSS,
    ),
    Mutant(
        "logits overwritten in secret",
        AUTOGRAD,
        "torch.autograd.graph.increment_version(logits)",
        "pass",
        ("tests/test_inplace.py",),
        "cpu",
    ),
    Mutant(
        "second derivative let through",
        AUTOGRAD,
        "return RefuseSecond.apply(grad, anchor)",
        "return grad",
        LOSS,
    ),
    Mutant(
        "every row scaled by the first upstream value",
        REFERENCE,
        "return (grad * scale.unsqueeze(-1)).to(grad.dtype)",
        "return (grad * scale.flatten()[:1]).to(grad.dtype)",
        LOSS,
    ),
    Mutant(
        "alpha of the wrong sign",
        LAWS,
        "return -self.alpha * rank.log()",
        "return self.alpha * rank.log()",
        LABEL,
    ),
    Mutant(
        "linear decay off by one rank",
        LAWS,
        "((num_classes - rank) * g + s)",
        "((num_classes + 1 - rank) * g + s)",
        LABEL,
    ),
    *(
        Mutant(f"Triton: {name}", f"{TRITON}/{file}.py", old, new, (f"tests/test_{test}",), "triton")
        for name, file, old, new, test in (
            (
                "rank by >= instead of >",
                "label",
                "rank_at = 1 + classes_from - classes_at",
                "rank_at = 1 + classes_from",
                "triton.py::test_ranks_and_label",
            ),
            (
                "target left in the label",
                "label",
                "stands & ~at_target, count",
                "stands, count",
                "triton.py::test_loss_several_rows_per_program",
            ),
            (
                "all votes for one class",
                "label",
                "tl.where(place < P2, more, 0)",
                "more",
                "triton.py::test_ranks_and_label",
            ),
            (
                "elements of one vector alone counted",
                "loss_math",
                "tile.x.shape[0] * tile.x.shape[2]",
                "tile.x.shape[2]",
                "triton.py::test_streamed_threads_of_several_vectors",
            ),
            (
                "the target's tile taken whole",
                "loss_kernel",
                "(at_y >= first + B)",
                "(at_y >= first)",
                "triton.py::test_streamed_threads_of_several_vectors",
            ),
            (
                "infinite logits left in their sum",
                "loss_kernel",
                "tl.max(absent.to(tl.int32), 0) > 0",
                "tl.max(absent.to(tl.int32), 0) > 1",
                "triton.py::test_streamed_threads_of_several_vectors",
            ),
            (
                "the target left among its tile",
                "loss_kernel",
                "chosen = first + vector != first_of_y",
                "chosen = first + vector >= 0",
                "triton.py::test_streamed_rows_of_all_sizes",
            ),
            (
                "logits far above the base not looked for",
                "loss_kernel",
                "(stats.s < 2.0**64)",
                "(stats.s >= 0)",
                "triton.py::test_streamed_rows_of_all_sizes",
            ),
            (
                "what a folded base lost forgotten",
                "loss_math",
                "s=a.s * power_of_2(-lost)",
                "s=a.s",
                "triton.py::test_streamed_rows_of_all_sizes",
            ),
            (
                "binary of another alignment",
                "launch_cache",
                "(x.dtype, x.data_ptr() & 15)",
                "x.dtype",
                "triton.py::test_launch_remembers_binaries_by_all_that_decides",
            ),
            (
                "plan of another alignment",
                "launch_cache",
                "x.stride(), x.data_ptr() & 15",
                "x.stride()",
                "triton.py::test_plans_are_kept_apart_by_alignment",
            ),
            (
                "S not begun anew",
                "loss_math",
                "kept = a.base.least == base.least",
                "kept = a.base.least >= base.least",
                "triton.py::test_soft_least_classes_anywhere",
            ),
            (
                "one class is enough for a rank",
                "loss_kernel",
                "members >= 2",
                "members >= 1",
                "triton.py::test_soft_least_classes_anywhere",
            ),
            (
                "argmax of the target to the highest class",
                "loss_reduce",
                "(c < winner))",
                "(c > winner))",
                "triton.py::test_soft_only_correct_beyond_a_tile",
            ),
            (
                "sum not rescaled to a new maximum",
                "loss_math",
                "t = tl.fma(finite, shift, t)",
                "t = t + 0",
                "triton.py::test_streamed_threads_of_several_vectors",
            ),
            (
                "classes past the end vote",
                "vote",
                'other=float("nan")).to(SCORES)',
                "other=0).to(SCORES)",
                "triton.py::test_vote_tiles_and_types",
            ),
            (
                "factors without the label's constant",
                "loss_kernel",
                "constant + f.target if",
                "constant * 0 + f.target if",
                "inplace.py::test_equals_out_of_place",
            ),
            (
                "patches of votes that stand for no class",
                "loss_kernel",
                'tl.where(voted, gv, float("nan"))',
                "gv",
                "inplace.py::test_one_vote_patches_a_class",
            ),
            (
                "patches in the order of the classes",
                "label",
                "p = v & (P2 - 1)",
                "p += 0",
                "inplace.py::test_equals_out_of_place",
            ),
            (
                "patches without the upstream gradient",
                "loss_factors",
                "patch * scale[:, None]",
                "patch",
                "inplace.py::test_equals_out_of_place",
            ),
            (
                "ties to the highest class tile",
                "vote",
                "(score > top)",
                "(score >= top)",
                "triton.py::test_vote_tiles_and_types",
            ),
        )
    ),
    *(
        Mutant(f"Triton: {name}", f"{TRITON}/{file}.py", old, new, (f"tests/test_{test}",), "triton")
        for name, file, old, new, test in (
            (
                "a teacher's row is clamped without NaN",
                "distill_kernel",
                "invalid = invalid | (missing & ~ignored)",
                "invalid = invalid",
                "distillation.py::test_index_out_of_range",
            ),
            (
                "a tie of the largest logit is the target's",
                "distill_kernel",
                "ahead = (zy < row_top) | ((zy == row_top) & (k < y))",
                "ahead = zy < row_top",
                "distillation.py::test_options_of_methods",
            ),
            (
                "the largest logit of the last tile",
                "distill_kernel",
                "top, top_column = argmax_combine(top, top_column, part.x, part, True, o)",
                "top, top_column = argmax_combine(top * 0, top_column, part.x, part, True, o)",
                "distillation.py::test_options_of_methods",
            ),
            (
                "a teacher that the gradient overwrites",
                "distill",
                "if _written_over(teacher, logits, others[2]):",
                "if False:",
                "distillation.py::test_a_table_in_the_memory_of_the_logits",
            ),
        )
    ),
    *(
        Mutant(f"Triton: {name}", f"{TRITON}/distill_math.py", old, new, (f"tests/test_{test}",), "triton")
        for name, old, new, test in (
            (
                "teacher's sums not rescaled",
                "f *= factor_t",
                "f *= 1.0",
                "triton.py::test_distill_kernels",
            ),
            (
                "teacher's largest class in the last tile",
                "wins = (top > best) |",
                "wins = (top == top) |",
                "triton.py::test_distill_finds_the_teachers_largest_class",
            ),
            (
                "a row of 0 leaves its weight nowhere",
                "share = tl.where(total == 0, share + w, share)",
                "share = share + 0.0",
                "distillation.py::test_a_row_of_zeros",
            ),
            (
                "mass outside a row of probabilities",
                "tile.t.to(DTYPE), 0.0 if",
                "tile.t.to(DTYPE), 1.0 if",
                "distillation.py::test_options_of_methods",
            ),
            (
                "TCKD as a difference of large logarithms",
                "tl.where(v.u > 0, likely, unlikely)",
                "tl.where(v.u > 0, unlikely, likely)",
                "distillation.py::test_what_is_small_keeps_its_digits",
            ),
            (
                "target's gradient of two probabilities near 1",
                "tl.where(u.u > 0, v.r - u.r, u.p - v.p)",
                "(u.p - v.p)",
                "distillation.py::test_what_is_small_keeps_its_digits",
            ),
        )
    ),
    *(
        Mutant(f"C++: {name}", f"csrc/{file}", old, new, tests, "cpu")
        for name, file, old, new, tests in (
            ("rank by >= instead of >", "label.h", "return 1 + above;", "return above;", LABEL),
            ("target counted among its like", "label.h", "(n == n_target ? 1 : 0)", "0", LABEL),
            ("target counted among the unvoted", "label.h", "(n_target == 0 ? 1 : 0)", "0", LABEL),
            (
                "entropy without its class count",
                "label.h",
                "+= together * Sum(rel",
                "+= Sum(mass_) * Sum(rel",
                LOSS,
            ),
            ("target joined by subtraction", "softmax.h", "z_target > largest ||", "false &&", LOSS),
            (
                "target left in the sums",
                "cpu/row.h",
                "(index != static_cast<int32_t>(y))",
                "(index >= 0)",
                LOSS,
            ),
            (
                "target's gradient unwritten",
                "cpu/loss_kernel.h",
                "put(out + y, static_cast<A>(at_target));",
                "",
                LOSS,
            ),
            ("masses that underflow together", "cpu/label_kernel.h", "&& largest >= usual_ - 40", "", LOSS),
            (
                "a row's shift left to the next",
                "cpu/label_kernel.h",
                "largest <= usual_ && largest >= usual_ - 40 ? usual_ :",
                "largest <= shift_ && largest >= shift_ - 40 ? shift_ :",
                LOSS,
            ),
            ("bound of the rounded scores too tight", "cpu/vote_kernel.h", "0x1.01p-8f", "0x1p-12f", VOTE),
            (
                "ties to the highest class",
                "cpu/vote_kernel.h",
                "class_of_lane < at",
                "class_of_lane > at",
                VOTE,
            ),
            (
                "a soft target's step outside S",
                "cpu/soft_loss_kernel.h",
                "in_s(c) ? step : V{}",
                "step",
                ("tests/test_soft.py",),
            ),
            (
                "a soft target's NaN",
                "cpu/soft_loss_kernel.h",
                "nan_target |= y != y;",
                "",
                ("tests/test_soft.py",),
            ),
            (
                "the teacher's row by the sample",
                "cpu/distill_kernel.h",
                "a.teacher_index == nullptr ? i : a.teacher_index[i]",
                "i",
                DISTILL,
            ),
            (
                "a tie of the largest logit is the higher class's",
                "cpu/distill_kernel.h",
                "if (x_y == 0 && k > y) k = y;",
                "",
                DISTILL,
            ),
            (
                "a row of 0 leaves its weight nowhere",
                "cpu/distill_kernel.h",
                "if (total == 0 && a.share != nullptr) share += w;",
                "",
                DISTILL,
            ),
            (
                "the largest logit's step after rounding",
                "cpu/distill_kernel.h",
                "static_cast<A>(at + a.factor * step)",
                "static_cast<A>(a.factor * step)",
                DISTILL,
            ),
            (
                "weights of samples side by side",
                "cpu/loss.cpp",
                "a.weight_stride = sample_weight->stride(0);",
                "a.weight_stride = 1;",
                DISTILL,
            ),
            (
                "a class without mass in the distillation",
                "cpu/distill_kernel.h",
                "x[2] > A(0) ? x[2] * (entropy * dt - dz) : V{}",
                "x[2] * (entropy * dt - dz)",
                DISTILL,
            ),
            (
                "the fourth power as the square",
                "cpu/distill_kernel.h",
                "kPower == 2 ? y : y * y",
                "y",
                DISTILL,
            ),
            (
                "an ignored sample's gradient",
                "cpu/distill_kernel.h",
                "if (grad_row != nullptr) __builtin_memset",
                "if (false) __builtin_memset",
                DISTILL,
            ),
            (
                "exponentials over the logits",
                "cpu/loss_kernel.h",
                "static_cast<const void*>(out) != static_cast<const void*>(z)",
                "true",
                ("tests/test_inplace.py",),
            ),
            ("weightless mean infinite", "cpu/loss.cpp", "totals.weight == 0 ? NAN :", "", LOSS),
        )
    ),
]


class Tree:
    """A copy of the source in a temporary folder, in which faults take turns."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name)
        self.lock = threading.Lock()
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "runs", ".*cache", "results")
        shutil.copytree(ROOT, self.root, dirs_exist_ok=True, ignore=ignored)
        self.env = {**os.environ, "PYTHONPATH": self.folder.name, "PYTHONDONTWRITEBYTECODE": "1"}

    def build(self) -> None:
        """Compile what changed since the last time."""
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        env = {**self.env, "ZIPFLS_BUILD": "cpu"}
        subprocess.run(command, cwd=self.root, env=env, check=True, capture_output=True)

    def caught_by(self, mutant: Mutant) -> str:
        """Name of the first test that fails against the mutant; empty if it survives."""
        with self.lock:
            path = self.root / mutant.path
            source = path.read_text()
            found = source.count(mutant.old)
            if found != 1:
                sys.exit(f"mutant {mutant.name!r}: its text stands {found} times in {mutant.path}")
            path.write_text(source.replace(mutant.old, mutant.new))
            if mutant.path.startswith("csrc"):
                self.build()
            run = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
            run += ["--backend", mutant.backend, *mutant.tests]
            result = subprocess.run(run, cwd=self.root, env=self.env, capture_output=True, text=True)
            path.write_text(source)
        failed = re.findall(r"^FAILED (\S+)", result.stdout, re.M)
        if result.returncode not in (0, 1) or bool(failed) != (result.returncode == 1):
            sys.exit(
                f"mutant {mutant.name!r}: the tests did not run:\n{result.stdout[-3000:]}{result.stderr}"
            )
        return failed[0] if failed else ""


def main() -> None:
    """Run every mutant and print what caught it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("word", nargs="?", default="", help="only mutants whose name contains this")
    word = parser.parse_args().word
    survivors = []
    chosen = [m for m in MUTANTS if word in m.name]

    compiled = Tree()  # for all faults in C++, one after the other: only what changed is compiled

    def timed(mutant: Mutant) -> tuple[Mutant, str, float]:
        start = time.monotonic()
        tree = compiled if mutant.path.startswith("csrc") else Tree()
        return mutant, tree.caught_by(mutant), time.monotonic() - start

    for mutant, test, seconds in ThreadPoolExecutor(2).map(timed, chosen):
        print(
            f"{mutant.backend:9} {mutant.name:46} {test or 'SURVIVED'}  ({seconds:.0f} s)",
            flush=True,
        )
        if not test:
            survivors.append(mutant.name)
    print(f"{len(chosen)} mutants, {len(chosen) - len(survivors)} caught, {len(survivors)} survived")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
