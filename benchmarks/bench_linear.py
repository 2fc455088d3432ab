"""Linear layer and loss, value and gradients of input and weight, against their peers; memory beside time.

The least any implementation computes are three products of 2 N D C operations each: logits, and the gradients
of input and weight. ``PRODUCTS`` is these alone, in the chunks of our default. Losses take (input, weight,
target, votes); only ours look at the votes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import baselines
import clock
import torch
import torch.nn.functional as F
from baselines import Loss
from bench_loss import entries
from clock import TINY
from records import Records, Where
from torch import Tensor

import zipfls_cuda as zls
from zipfls_cuda import chunked

ON_GPU = clock.device().type == "cuda"


def plain(x: Tensor, weight: Tensor, target: Tensor, votes: Tensor) -> Tensor:
    """F.linear, then F.cross_entropy."""
    return F.cross_entropy(F.linear(x, weight), target)


def products(x: Tensor, weight: Tensor, target: Tensor, votes: Tensor) -> None:
    """Of every chunk the logits, and two products with them, as if they were a gradient."""
    x, weight = x.detach(), weight.detach()
    head = chunked.Head(x, weight, None, x.dtype)
    wanted = (True, True, False)
    grads, most = head.gradients(wanted, False), chunked.default_rows(len(x), x.dtype, x.device, 1)
    for rows in chunked.chunks_of(len(x), None, most):
        head.accumulate(grads, wanted, rows, *head.logits(rows, most))


def losses(device: str, tiny: bool = False) -> dict[str, Loss]:
    """All ways to compute it that run on a device type here, ours first, by name."""
    found = {}
    for b in [b for b in baselines.our_backends(device) if b != "reference"] or ["reference"]:
        ours = functools.partial(zls.linear_zipf_cross_entropy, zipf_weight=1.0, backend=b)
        found[baselines.ours(b)] = Loss(ours)
    found[baselines.LINEAR_THEN_LOSS] = Loss(
        lambda x, weight, *rest: zls.zipf_cross_entropy(F.linear(x, weight), *rest, zipf_weight=1.0)
    )
    found[baselines.LINEAR_THEN_CROSS_ENTROPY] = Loss(plain)
    found[baselines.COMPILED_LINEAR] = Loss(baselines.compiled(plain, tiny))
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        chunks = functools.partial(F.linear_cross_entropy, options=options)
        found[baselines.LINEAR_CROSS_ENTROPY] = Loss(
            lambda x, weight, target, votes: chunks(x, weight, target)
        )
    found[baselines.PRODUCTS] = Loss(products, backward=False)
    if device == "cuda":
        found |= packages()
    return found


def packages() -> dict[str, Loss]:
    """Losses of other packages that are installed."""
    found = {}
    with baselines.using("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found[baselines.LIGER_LINEAR] = Loss(lambda x, weight, y, votes: liger(weight, x, y), sync=True)
    with baselines.using("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found[baselines.CUT] = Loss(lambda x, weight, y, votes: linear_cross_entropy(x, weight, y))
    return found


@dataclass(frozen=True)
class Case:
    """Rows, features of a row, classes."""

    N: int
    D: int
    C: int
    P: int = 49
    dtype: str = "float32"

    @property
    def names(self) -> list[str]:
        """F.linear_cross_entropy on a CPU at small shapes only: 2048 x 256 x 65536 takes it a minute."""
        found = losses(clock.device().type, TINY)
        small = ON_GPU or self.N * self.C <= 1 << 23
        return [name for name in found if small or name != baselines.LINEAR_CROSS_ENTROPY]

    @property
    def where(self) -> Where:
        return Where("linear", asdict(self), "both", clock.best_clock().name)

    def run(self, records: Records) -> clock.Comparison:
        torch.compiler.reset()
        inputs, nbytes = linear_inputs(self), getattr(torch, self.dtype).itemsize * self.N * self.C

        def clear() -> None:
            for x in inputs[:2]:
                x.grad = None

        def cleared(call: Callable) -> None:
            clear()
            call()

        made = entries(self.names, losses(clock.device().type, TINY), [inputs])
        for entry in made:
            entry.calls = [functools.partial(cleared, call) for call in entry.calls]
            entry.clear = clear
        flops = 6 * self.N * self.D * self.C
        # A call takes seconds on a CPU: three rounds.
        return records.compare(
            self.where, made, clock.best_clock(), nbytes, flops, seconds=2.5, least_rounds=3, memory=True
        )


def linear_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (N, D) and weight (C, D) that want gradients, target (N,), votes (N, P)."""
    drawn, dtype = baselines.seeded(0), getattr(torch, case.dtype)
    x = torch.randn(case.N, case.D, **drawn).to(dtype).requires_grad_()
    weight = (torch.randn(case.C, case.D, **drawn) / case.D**0.5).to(dtype).requires_grad_()
    target = torch.randint(case.C, (case.N,), **drawn)
    return x, weight, target, torch.randint(case.C, (case.N, case.P), dtype=torch.int32, **drawn)


def cases(on_gpu: bool) -> list[Case]:
    if on_gpu:  # a language model's head, a face recognition's, iNat21's
        shapes = [(8192, 4096, 128256), (4096, 512, 1000000), (8192, 2048, 10000)]
        return [Case(*shape, dtype="bfloat16") for shape in shapes]
    return [Case(2048, 256, 65536), Case(8192, 256, 32000), Case(512, 256, 16384)]


CASES = [Case(6, 8, 10, 4)] if TINY else cases(ON_GPU)
