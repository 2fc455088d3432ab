"""The loss: cross-entropy plus Zipf's Label Smoothing, value and gradient, against its peers.

The least any implementation moves is the logits once and their gradient once: 2 N C itemsize bytes.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import asdict, dataclass

import baselines
import harness
import pytest
import torch
from harness import TINY, Entry

ON_GPU = harness.device().type == "cuda"
LOSSES = baselines.losses(harness.device().type, TINY)
OURS = [name for name in LOSSES if name.startswith("zipfls_cuda")]
KERNELS = baselines.kernels(LOSSES)
BRIEF = [*OURS[:2], baselines.CROSS_ENTROPY]  # for sweeps
EAGER = [name for name in LOSSES if "compile" not in name]
COMPILED = [baselines.COMPILED_CROSS_ENTROPY, baselines.COMPILED_REFERENCE]
SCIPY_AT_MOST = 3_000_000  # logits; ranking more than that takes SciPy seconds


@dataclass(frozen=True)
class Case:
    """Shape and mode. Modes: both (forward + backward), forward, backward, infer (no gradient wanted)."""

    N: int
    C: int
    P: int = 49
    dtype: str = "float32"
    mode: str = "both"
    sweep: str = ""  # the name of the sweep it belongs to
    clock: str = ""  # "host" for host time on a GPU

    def __str__(self) -> str:
        parts = [f"{self.N}x{self.C} P{self.P}", self.dtype, self.mode, self.sweep, self.clock]
        return " ".join(part for part in parts if part)

    @property
    def names(self) -> list[str]:
        """Contestants: all at the main shapes, few elsewhere."""
        if self.sweep in ("C", "N", "P"):
            return BRIEF
        if self.sweep == "compiled":
            return [*KERNELS, *COMPILED]
        if self.mode == "infer":
            return [*KERNELS, baselines.CROSS_ENTROPY]
        if self.mode != "both" or self.sweep:
            return BRIEF
        if self.clock:
            return [name for name in EAGER if name != baselines.PUBLISHED]
        names = list(LOSSES) if self.dtype == "float32" and not ON_GPU else EAGER
        small = self.N * self.C <= SCIPY_AT_MOST and self.dtype == ("bfloat16" if ON_GPU else "float32")
        return [*[n for n in names if small or n != baselines.PUBLISHED], baselines.COPY]

    @property
    def timer(self) -> harness.HostClock | harness.DeviceClock:
        return harness.DeviceClock() if ON_GPU and self.clock != "host" else harness.HostClock()

    @property
    def where(self) -> harness.Where:
        described = {k: v for k, v in asdict(self).items() if k not in ("mode", "clock")}
        return harness.Where("loss", described, self.mode, self.timer.name)


def cpu_cases() -> list[Case]:
    main = [(256, 10000), (64, 131072), (256, 1000), (128, 100)]
    cases = [Case(N, C) for N, C in main]
    cases += [Case(N, C, dtype="bfloat16") for N, C in main]
    cases += [Case(N, C, mode=mode) for N, C in main for mode in ("forward", "backward", "infer")]
    cases += [Case(128, C, sweep="C") for C in (30, 100, 300, 1000, 3000, 10007, 30000, 100000)]
    cases += [Case(N, 1000, sweep="N") for N in (8, 32, 128, 512, 2048, 8192)]
    cases += [Case(256, 1000, P, sweep="P") for P in (1, 4, 16, 49, 196, 784, 3136)]
    # Next to no arithmetic: what the way through Python, the operator and autograd costs.
    cases += [Case(4, 8, 4, mode=mode, sweep="host") for mode in ("both", "forward", "infer")]
    return cases


def gpu_cases() -> list[Case]:
    """What matters most first, as time may run out: a shape of every regime, small ones and host time, then
    the other main shapes, modes, sweeps, and last the peers that take seconds to compile."""
    bf16 = functools.partial(Case, dtype="bfloat16")
    first = [(8192, 10000), (32768, 1000), (4096, 21841)]  # long rows, many short ones, odd ones
    small = [(256, 1000), (512, 1000), (1024, 1000), (128, 100)]
    others = [(8192, 4096), (8192, 8192), (8192, 16384), (4096, 32768), (2048, 131072), (131072, 1000)]
    cases = [bf16(N, C) for N, C in [*first, *small]]
    cases += [bf16(N, C, mode=mode, clock="host") for N, C in small for mode in ("both", "forward")]
    cases += [bf16(N, C) for N, C in [*others, (8192, 10007)]]
    cases += [Case(N, C) for N, C in [(8192, 10000), (32768, 1000), (256, 1000), (128, 100)]]
    cases += [
        bf16(N, C, mode=mode)
        for N, C in [(8192, 10000), (32768, 1000), (256, 1000)]
        for mode in ("forward", "backward", "infer")
    ]
    cases += [
        bf16(max(256, (1 << 26) // C), C, sweep="C") for C in (100, 256, 1024, 4096, 16384, 65536, 262144)
    ]
    cases += [bf16(N, 1000, sweep="N") for N in (64, 256, 1024, 4096, 16384, 65536)]
    cases += [bf16(1024, 1000, P, sweep="P") for P in (1, 16, 49, 196, 784, 3136)]
    cases += [bf16(N, C, sweep="compiled") for N, C in [*first, (2048, 131072), (256, 1000), (128, 100)]]
    return cases


def tiny_cases() -> list[Case]:
    main = [
        Case(4, 10),
        Case(4, 10, dtype="bfloat16"),
        Case(4, 10, mode="backward"),
        Case(4, 10, mode="infer"),
    ]
    return [
        *main,
        Case(4, 10, sweep="compiled"),
        Case(4, 20, sweep="C"),
        Case(4, 8, 4, sweep="host"),
        Case(4, 10, clock="host"),
    ]


CASES = tiny_cases() if TINY else gpu_cases() if ON_GPU else cpu_cases()


def entries(case: Case) -> list[Entry]:
    """The contestants of a case, over as many copies of its inputs as the caches ask for."""
    dtype = getattr(torch, case.dtype)
    size = 2 * case.N * case.C * dtype.itemsize
    seeds = range(harness.copies(size))
    inputs = [harness.loss_inputs(case.N, case.C, case.P, dtype, seed) for seed in seeds]
    made = []
    for name in case.names:
        if name == baselines.COPY:
            out = [torch.empty_like(z, requires_grad=False) for z, _, _ in inputs]
            calls = [functools.partial(o.copy_, z.detach()) for o, (z, _, _) in zip(out, inputs)]
            made.append(Entry(name, calls))
            continue
        loss = LOSSES[name]
        own = (
            [(z.detach().clone().requires_grad_(), *rest) for z, *rest in inputs] if loss.in_place else inputs
        )
        made.append(entry(name, loss, case.mode, own))
    return made


def entry(name: str, loss: baselines.Loss, mode: str, inputs: list[tuple]) -> Entry:
    """One contestant in one mode."""

    def hand_over(x: tuple, out: torch.Tensor) -> None:
        x[0].grad = None  # of another call on the same logits that was prepared together with this one
        out.backward()

    def both(x: tuple) -> None:
        x[0].grad = None
        out = loss.call(*x)
        if loss.backward:
            out.backward()

    def forward(x: tuple) -> torch.Tensor:
        x[0].grad = None
        return loss.call(*x)

    def infer(x: tuple) -> torch.Tensor:
        with torch.no_grad():
            return loss.call(*x)

    def clear() -> None:
        for x in inputs:
            x[0].grad = None

    if mode == "backward":
        prepare = [functools.partial(forward, x) for x in inputs]
        calls = [functools.partial(hand_over, x) for x in inputs]
        return Entry(name, calls, prepare, waits=loss.sync, clear=clear)
    call = {"both": both, "forward": forward, "infer": infer}[mode]
    return Entry(name, [functools.partial(call, x) for x in inputs], waits=loss.sync, clear=clear)


def run(case: Case, book: harness.Book) -> harness.Result:
    torch.compiler.reset()  # past a few shapes torch.compile would silently stop compiling
    main = case.mode == "both" and not case.sweep and not case.clock
    size = getattr(torch, case.dtype).itemsize * case.N * case.C
    passes = {"both": 2, "forward": 2, "infer": 1, "backward": 1}[case.mode]
    return book.race(
        case.where,
        entries(case),
        case.timer,
        passes * size,
        ours=OURS,
        seconds=2.5 if main else 0.8,
        memory=main or case.sweep == "compiled",
    )


# Launches and synchronisations ---------------------------------------------------------------------------


def count(loss: baselines.Loss, inputs: tuple) -> dict[str, int]:
    """Kernels that forward and backward launch, and calls in both that made the host wait."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    one = torch.ones((), device=inputs[0].device)  # else autograd launches a kernel to make it

    def launched(call: functools.partial) -> tuple[int, torch.Tensor | None]:
        harness.synchronize()
        with profile(activities=activities) as seen:
            result = call()
            harness.synchronize()
        return sum(e.device_type == DeviceType.CUDA for e in seen.events()), result

    for _ in range(3):  # whatever is made once is made here
        inputs[0].grad = None
        loss.call(*inputs).backward(one)
    inputs[0].grad = None
    forward, value = launched(functools.partial(loss.call, *inputs))
    backward, _ = launched(functools.partial(value.backward, one))
    waits = 0
    if ON_GPU:
        inputs[0].grad = None
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                loss.call(*inputs).backward(one)
            waits = sum("synchroniz" in str(w.message) for w in caught)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"forward": forward, "backward": backward, "synchronisations": waits}


COUNTED = [(4, 10)] if TINY else [(256, 1000), (1024, 1000), (128, 100)] if ON_GPU else []


@pytest.mark.parametrize("N,C", COUNTED)
@pytest.mark.parametrize("name", [name for name in OURS if ON_GPU or TINY])
def bench_launches(N: int, C: int, name: str, fact) -> None:
    where = harness.Where("launches", {"N": N, "C": C, "P": 49, "dtype": "bfloat16", "sweep": ""})
    fact(where, name, lambda: count(LOSSES[name], harness.loss_inputs(N, C, 49, torch.bfloat16)))


@pytest.mark.parametrize(
    "case,name", [pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in case.names]
)
def bench_loss(case: Case, name: str, report) -> None:
    report(case.where, case.names, name, functools.partial(run, case))
