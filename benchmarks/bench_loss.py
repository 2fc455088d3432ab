"""The loss: cross-entropy plus Zipf's Label Smoothing, value and gradient, against its peers.

The least any implementation moves is the logits once and their gradient once: 2 N C itemsize bytes.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

import baselines
import clock
import torch
from clock import TINY, Entry
from records import Records, Where

ON_GPU = clock.device().type == "cuda"
LOSSES = baselines.losses(clock.device().type, TINY)
KERNELS = baselines.kernels(LOSSES)
EAGER = [name for name in LOSSES if "compile" not in name]
COMPILED = [baselines.COMPILED_CROSS_ENTROPY, baselines.COMPILED_REFERENCE]
SCIPY_AT_MOST = 3_000_000  # logits; ranking more than that takes SciPy seconds


@dataclass(frozen=True)
class Case:
    """Shape and mode. Modes: both (forward + backward); of host time also forward, infer (no gradient)."""

    N: int
    C: int
    P: int = 49
    dtype: str = "float32"
    mode: str = "both"
    sweep: str = ""  # "compiled": the peers that take long to compile; "host": next to no arithmetic
    clock: str = ""  # "host" for host time on a GPU

    @property
    def main(self) -> bool:
        """Whether all are compared: not what takes long to compile, not where host time is asked for."""
        return not self.sweep and not self.clock

    @property
    def names(self) -> list[str]:
        if self.sweep == "compiled":
            return [*KERNELS, *COMPILED]
        if not self.main:
            return [*KERNELS, baselines.CROSS_ENTROPY]
        names = list(LOSSES) if self.dtype == "float32" and not ON_GPU else EAGER
        small = self.N * self.C <= SCIPY_AT_MOST and self.dtype == ("bfloat16" if ON_GPU else "float32")
        return [*[n for n in names if small or n != baselines.PUBLISHED], baselines.COPY]

    @property
    def timer(self) -> clock.Clock:
        return clock.HostClock() if self.clock == "host" else clock.best_clock()

    @property
    def where(self) -> Where:
        described = {k: v for k, v in asdict(self).items() if k not in ("mode", "clock")}
        return Where("loss", described, self.mode, self.timer.name)

    def run(self, records: Records) -> clock.Comparison:
        torch.compiler.reset()  # past a few shapes torch.compile would silently stop compiling
        dtype = getattr(torch, self.dtype)
        nbytes = 2 * self.N * self.C * dtype.itemsize
        seeds = range(clock.copies(nbytes))
        inputs = [baselines.loss_inputs(self.N, self.C, self.P, dtype, seed) for seed in seeds]
        nbytes = nbytes // 2 if self.mode == "infer" else nbytes
        options = {"seconds": 2.5 if self.main else 0.8, "memory": self.main or self.sweep == "compiled"}
        made = entries(self.names, LOSSES, inputs, self.mode)
        return records.compare(self.where, made, self.timer, nbytes, **options)


def cpu_cases() -> list[Case]:
    main = [(256, 10000), (64, 131072), (256, 1000), (128, 100)]
    cases = [Case(N, C, dtype=dtype) for dtype in ("float32", "bfloat16") for N, C in main]
    # Next to no arithmetic: what the way through Python, the operator and autograd costs.
    return cases + [Case(4, 8, 4, mode=mode, sweep="host") for mode in ("both", "forward", "infer")]


def gpu_cases() -> list[Case]:
    """What matters most first, as time may run out: a shape of every regime, small ones and host time, then
    the other main shapes, and last the peers that take seconds to compile."""
    bf16 = functools.partial(Case, dtype="bfloat16")
    first = [(8192, 10000), (32768, 1000), (4096, 21841)]  # long rows, many short ones, odd ones
    others = [(8192, 4096), (8192, 8192), (8192, 16384), (4096, 32768), (2048, 131072), (131072, 1000)]
    compiled = [*first, (2048, 131072), (256, 1000), (128, 100)]
    cases = [bf16(N, C) for N, C in [*first, *baselines.SMALL]]
    cases += [bf16(N, C, mode=mode, clock="host") for N, C in baselines.SMALL for mode in ("both", "forward")]
    cases += [bf16(N, C) for N, C in [*others, (8192, 10007)]]
    cases += [Case(N, C) for N, C in [(8192, 10000), (32768, 1000), (256, 1000), (128, 100)]]
    return cases + [bf16(N, C, sweep="compiled") for N, C in compiled]


CASES = gpu_cases() if ON_GPU else cpu_cases()
if TINY:
    varied = ({}, {"dtype": "bfloat16"}, {"sweep": "compiled"}, {"clock": "host"})
    modes = ({"mode": mode, "sweep": "host"} for mode in ("both", "forward", "infer"))
    CASES = [Case(4, 10, **options) for options in (*varied, *modes)]


def entries(
    names: list[str], losses: dict[str, baselines.Loss], inputs: list[tuple], mode: str = "both"
) -> list[Entry]:
    """Losses by name, each over all copies of its arguments, of which the logits are the first."""

    def call(loss: baselines.Loss, x: tuple) -> None:
        x[0].grad = None
        value = loss.call(*x)
        if mode == "both" and loss.backward:
            value.backward()

    def clear(inputs: list[tuple]) -> None:
        for x in inputs:
            x[0].grad = None

    made, run = [], torch.no_grad()(call) if mode == "infer" else call
    for name in names:
        if name == baselines.COPY:
            logits = [z.detach() for z, *_ in inputs]
            made.append(Entry(name, [functools.partial(torch.empty_like(z).copy_, z) for z in logits]))
            continue
        loss, own = losses[name], inputs
        if loss.in_place:
            own = [(z.detach().clone().requires_grad_(), *rest) for z, *rest in inputs]
        calls = [functools.partial(run, loss, x) for x in own]
        made.append(Entry(name, calls, waits=loss.sync, clear=functools.partial(clear, own)))
    return made
