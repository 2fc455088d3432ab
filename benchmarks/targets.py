"""The performance targets, one row each: what is asked, and how the records answer it.

``judge`` gives for every row, and on a GPU for each of our backends, what was measured and whether it meets
the target. Device time that was not taken with the host ahead of the device is shown and not judged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import baselines
from clock import SURE

BENCHES = ("loss", "vote", "step", "distill", "linear")  # whose records the targets judge
MIB = 1 << 20
GAP = "not measured"


@dataclass(frozen=True)
class Verdict:
    """One row of the table for one backend; ``met`` is None where nothing was measured or can be judged."""

    group: str
    text: str
    target: str
    measured: str
    met: bool | None
    backend: str = ""  # the one judged; empty where there is none


@dataclass(frozen=True, order=True)
class Figure:
    """A figure, where it is from, how it was timed ("": not timed but counted)."""

    value: float
    where: str = ""
    how: str = ""

    @property
    def doubt(self) -> str:
        """Why the figure cannot be judged; empty if it can."""
        return "" if self.how in ("", *SURE) else ": ".join(filter(None, (self.where, self.how)))


@dataclass(frozen=True)
class Target:
    """A row: on which kind of device, what, and the bound that the worst of the figures must keep to."""

    kind: str
    group: str
    text: str
    target: str  # as it reads: ">= 95 %", "<= 6 us", "-" for nothing to meet
    form: str  # how a figure reads
    figures: Callable[[list[dict], str], Iterable[Figure]]  # of records and the name of a backend of ours
    bound: float | None = None  # where it is not the number in ``target``

    def judge(self, records: list[dict], name: str) -> Verdict:
        """The verdict on a backend."""
        figures = list(self.figures(records, name)) if name or self.target == "-" else []
        if not figures:
            return Verdict(self.group, self.text, self.target, GAP, None, name)
        above, met = self.target.startswith(">="), None
        worst = (min if above else max)(figures)
        text = self.form.format(worst.value) + (f" ({worst.where})" if worst.where else "")
        if doubt := next((f.doubt for f in figures if f.doubt), ""):
            text += f", not judged ({doubt})"
        elif self.target != "-":
            bound = float(re.search(r"[\d.]+", self.target)[0]) if self.bound is None else self.bound
            met = worst.value >= bound if above else worst.value <= bound
        return Verdict(self.group, self.text, self.target, text, met, name)


def names(records: list[dict], bench: str = "") -> list[str]:
    """Our backends to show: on a GPU each but plain PyTorch, best first; on a CPU the one that serves."""
    records = [r for r in records if not bench or r["bench"] == bench]
    timed = {r["name"] for r in records}
    known = dict.fromkeys(baselines.ours(b) for r in records for b in r["env"]["backends"])
    found = [name for name in known if name in timed]
    return baselines.kernels(found) if records and records[0]["env"]["kind"] == "cuda" else found[:1]


def find(
    records: Iterable[dict], bench: str, name: str = "", mode: str = "", clock: str = "", **case
) -> list[dict]:
    """Records of a benchmark whose case agrees, those of sweeps left out unless ``sweep`` is asked for."""
    case = {"sweep": "", **case}
    asked = {"name": name, "mode": mode, "clock": clock}
    return [
        r
        for r in records
        if r["bench"] == bench
        and all(not value or r[key] == value for key, value in asked.items())
        and all(r["case"].get(key, value) == value for key, value in case.items())
    ]


def ceiling(records: list[dict], name: str, dtype: str = "float32", run: str = "") -> float:
    """Bytes (copy) or operations (product) a second that were reached in a run, or any; 0 if unmeasured."""
    found = [r for r in find(records, "ceiling", name, dtype=dtype) if not run or r["run"] == run]
    return (found[-1]["bytes"] or found[-1]["flops"]) / found[-1]["median"] if found else 0.0


def meeting(records: list[dict], r: dict, peer: str) -> tuple[list[float], str] | None:
    """Our time over a peer's [median, 20 %, 80 %] at a record's shape, and how the two were timed at worst.

    Peers that take long to compile have a comparison of their own at some shapes.
    """
    for sweep in (r["case"].get("sweep", ""), "compiled"):
        here = {**r["case"], "sweep": sweep}
        for mine in find(records, r["bench"], r["name"], r["mode"], r["clock"], **here):
            if peer in mine["ratio"]:
                theirs = find(records, r["bench"], peer, r["mode"], r["clock"], **here)
                hows = [x["how"] for x in (mine, *theirs) if x["how"] not in SURE]
                return mine["ratio"][peer], hows[0] if hows else mine["how"]
    return None


def _shape(r: dict) -> str:
    c = r["case"]
    if "method" in c:
        return f"{c['method']}, {c['N']}x{c['C']}, {c['dtype']}"
    return f"{c['N']}x{c['C']}" if "D" not in c else f"N {c['N']}, D {c['D']}, C {c['C']}, {c['dtype']}"


SHAPES: dict[str, Callable[[dict], bool]] = {  # of the loss, by record
    "any": lambda r: True,
    "small": lambda r: (r["case"]["N"], r["case"]["C"]) in baselines.SMALL,
    "large": lambda r: r["bytes"] > 128e6,
    "wide": lambda r: r["bytes"] > 128e6 and r["case"]["C"] >= 4096 and r["case"]["C"] % 8 == 0,
    "unaligned": lambda r: r["case"]["C"] in (21841, 10007),
    "many rows": lambda r: r["case"]["C"] == 1000 and r["case"]["N"] >= 32768,
}


def ratio(
    records: list[dict], name: str, peer: str, shapes: str = "any", bench: str = "loss", power: int = 1,
    **case,
) -> list[Figure]:  # fmt: skip
    """Our time over a peer's, or with power -1 theirs over ours."""
    rows = filter(SHAPES[shapes], find(records, bench, name, **case))
    met = [(r, *found) for r in rows if (found := meeting(records, r, peer))]
    several = len({_shape(r) for r, _, _ in met}) > 1
    return [Figure(x[0] ** power, _shape(r) if several else "", how) for r, x, how in met]


def of_copy(records: list[dict], name: str, shapes: str) -> Iterator[Figure]:
    """The loss's bandwidth as a share of the copy's in the same run, percent."""
    rows = find(records, "loss", name, mode="both", clock="device", dtype="bfloat16")
    for r in filter(SHAPES[shapes], rows):
        if copy := ceiling(records, "copy", run=r["run"]):
            yield Figure(100 * r["bytes"] / r["median"] / copy, _shape(r), r["how"])


def microseconds(
    records: list[dict], name: str, clock: str, shapes: str = "any", bench: str = "loss", **case
) -> list[Figure]:
    """Time of a call."""
    found = filter(SHAPES[shapes], find(records, bench, name, clock=clock, **case))
    return [Figure(1e6 * r["median"], _shape(r), r["how"]) for r in found]


def peak(records: list[dict], name: str, bench: str, **case) -> list[Figure]:
    """Peak extra memory: in MiB; of the loss as a multiple of the logits, where those are a MiB or more."""
    found = [r for r in find(records, bench, name, **case) if r["peak"] is not None]
    if bench == "loss":
        return [Figure(2 * r["peak"] / r["bytes"], _shape(r)) for r in found if r["bytes"] >= 2 * MIB]
    return [Figure(r["peak"] / MIB, _shape(r)) for r in found]


def layouts(records: list[dict], name: str) -> list[Figure]:
    """NCHW's rate as a share of channels_last's, percent."""
    case = {"what": "ResNet-50, ImageNet", "N": 256, "dtype": "bfloat16"}
    both = [find(records, "vote", name, layout=layout, **case)[:1] for layout in ("channels_last", "NCHW")]
    if not all(both):
        return []
    (fast,), (slow,) = both
    return [Figure(100 * fast["median"] / slow["median"], "", r["how"]) for r in (fast, slow)]


def added(records: list[dict], name: str, of: str, C: int) -> list[Figure]:
    """What our loss adds to a step with F.cross_entropy: percent of its time, MiB to its peak memory."""
    if of == "time":
        found = ratio(records, name, baselines.CROSS_ENTROPY, bench="step", C=C)[:1]
        return [Figure(100 * (f.value - 1), "", f.how) for f in found]
    peaks = [peak(records, n, "step", C=C)[:1] for n in (name, baselines.CROSS_ENTROPY)]
    return [Figure(ours.value - theirs.value) for ours, theirs in zip(*peaks, strict=False)]


def reached(records: list[dict], name: str, of: str, dtype: str, unit: float) -> list[Figure]:
    """A ceiling."""
    value = ceiling(records, of, dtype)
    return [Figure(value / unit)] if value else []


def distill_targets(*more: tuple[str, float]) -> Iterator[tuple]:
    """The worst of KD and DKD over all shapes, against each peer."""
    peers = (baselines.REFERENCE, 0.35), (baselines.COMPILED_REFERENCE, 0.9), (baselines.PLAIN_LOSS, 1.6)
    for peer, bound in (*peers, *more):
        figures = partial(ratio, peer=peer, bench="distill")
        yield "distillation", f"time of {peer}", f"<= {bound}", "{:.3g}", figures


def linear_targets(*more: tuple[str, float]) -> Iterator[tuple]:
    """Linear layer and loss, the worst over all shapes, against each peer."""
    peers = (
        (baselines.PRODUCTS, 1.1),
        (baselines.LINEAR_THEN_LOSS, 1.0),
        (baselines.LINEAR_CROSS_ENTROPY, 1.0),
    )
    for peer, bound in (*peers, *more):
        figures = partial(ratio, peer=peer, bench="linear")
        yield "linear and loss", f"time of {peer}", f"<= {bound}", "{:.3g}", figures


def cpu_targets() -> Iterator[tuple]:
    for N, C, bound in ((256, 10000, 0.45), (64, 131072, 0.12), (256, 1000, 0.8), (128, 100, 1.2)):
        figures = partial(ratio, peer=baselines.CROSS_ENTROPY, N=N, C=C, mode="both", dtype="float32")
        yield "CPU loss", f"time of F.cross_entropy, {N} x {C}", f"<= {bound}", "{:.3g}", figures
    case = {"dtype": "float32", "upsample": 1, "layout": "channels_last"}
    for name in ("ResNet-18, ImageNet", "CIFAR-100, stage 1", "CIFAR-100, stage 2", "many classes"):
        figures = partial(ratio, peer=baselines.MATMUL, bench="vote", what=name, **case)
        yield "CPU vote", f"time of torch.matmul alone, {name}", "<= 1.05", "{:.3g}", figures
    yield "CPU vote", "peak extra memory, any shape", "<= 64 MiB", "{:.2f} MiB", partial(peak, bench="vote")
    yield from distill_targets()
    yield from linear_targets()


def gpu_targets() -> Iterator[tuple]:
    copy = partial(reached, of="copy", dtype="float32", unit=1e12)
    yield "ceiling", "copy, bytes read and written", "-", "{:.3g} TB/s", copy
    product = partial(reached, of="product", dtype="bfloat16", unit=1e12)
    yield "ceiling", "bf16 matrix product, random data", "-", "{:.3g} TFLOP/s", product
    for text, percent, shapes in (
        ("C >= 4096, logits > 64 MB", 95, "wide"),
        ("C = 1000, N >= 32768", 90, "many rows"),
        ("C = 21841, 10007", 85, "unaligned"),
    ):
        figures = partial(of_copy, shapes=shapes)
        yield "loss", f"share of the copy bandwidth, {text}", f">= {percent} %", "{:.1f} %", figures
    both = {"mode": "both", "dtype": "bfloat16"}
    group, form, small = "loss, small", "{:.3g} us", partial(microseconds, shapes="small", **both)
    yield group, "time on the GPU", "<= 6 us", form, partial(small, clock="device")
    yield group, "host time, forward + backward", "<= 25 us", form, partial(small, clock="host")
    for peer, bound in (
        (baselines.CROSS_ENTROPY, "0.40"),
        (baselines.COMPILED_CROSS_ENTROPY, "0.60"),
        (baselines.COMPILED_REFERENCE, "0.10"),
        (baselines.LIGER, "0.80"),
        (baselines.QUACK, "1.05"),
    ):
        figures = partial(ratio, peer=peer, shapes="large", clock="device", **both)
        yield "loss", f"time of {peer}", f"<= {bound}", "{:.3g}", figures
    memory = partial(peak, bench="loss", clock="device", **both)
    yield "loss", "peak extra memory", "1 x logits", "{:.3f} x logits", memory, 1.01
    yield from distill_targets((baselines.LIGER_KL, 0.9), (baselines.LIGER_JSD, 0.9))
    yield from linear_targets((baselines.LIGER_LINEAR, 0.9), (baselines.CUT, 0.9))
    yield from gpu_vote_targets()
    for C, percent, name in ((1000, 0.1, "ImageNet"), (10000, 0.7, "iNat21")):
        text, figures = f"ResNet-50, {name}: added", partial(added, C=C)
        yield "step", f"{text} time", f"<= +{percent} %", "{:+.2f} %", partial(figures, of="time")
        yield "step", f"{text} peak memory", "+0", "{:+.2f} MiB", partial(figures, of="peak"), 0.5


def gpu_vote_targets() -> Iterator[tuple]:
    faster = partial(ratio, peer=baselines.MATMUL_ARGMAX, bench="vote", power=-1)
    for what, bound, times, case in (
        ("ResNet-50, ImageNet", 1.02, 1.3, {"N": 256, "layout": "channels_last"}),
        ("ResNet-18, ImageNet", 1.05, 1.8, {"layout": "channels_last"}),
        ("ViT-B/16, ImageNet", 1.03, 1.6, {"layout": "tokens"}),
        ("ResNet-50, iNat21", 1.02, 1.25, {"layout": "channels_last"}),
    ):
        case |= {"what": what, "dtype": "bfloat16"}
        figures = partial(ratio, peer=baselines.MATMUL, bench="vote", **case)
        yield "vote", f"time of torch.matmul alone, {what}", f"<= {bound}", "{:.3g}", figures
        figures = partial(faster, **case)
        yield "vote", f"speed over matmul + argmax, {what}", f">= {times}x", "{:.3g}x", figures
    last = {"dtype": "bfloat16", "layout": "channels_last"}
    for what in ("CIFAR-100, stage 1", "CIFAR-100, stage 2"):
        figures = partial(microseconds, clock="device", bench="vote", what=what, **last)
        yield "vote", f"{what}, with and without upsampling", "<= 6 us", "{:.3g} us", figures
        figures = partial(faster, what=what, **last)
        yield "vote", f"speed over matmul + argmax, {what}", ">= 2x", "{:.3g}x", figures
    yield "vote", "NCHW, rate against channels_last", ">= 85 %", "{:.0f} %", layouts
    for what, bound in (("ResNet-50, ImageNet", 0.5), ("ResNet-50, iNat21", 4)):
        figures = partial(peak, bench="vote", what=what, **last)
        yield "vote", f"peak extra memory, {what}", f"<= {bound} MiB", "{:.2f} MiB", figures


TARGETS = [Target("cpu", *row) for row in cpu_targets()] + [Target("cuda", *row) for row in gpu_targets()]


def judge(records: list[dict], kind: str) -> list[Verdict]:
    """Every row for a kind of device ("cpu", "cuda") against records from one, for each backend of ours."""
    timed = [r for r in records if r["env"]["kind"] == kind and r["bench"] in BENCHES]
    ours = names(timed) or [""]
    rows = [target for target in TARGETS if target.kind == kind]
    return [t.judge(records, name) for t in rows for name in ([""] if t.target == "-" else ours)]
