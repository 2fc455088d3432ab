"""The performance targets, one row each: what is asked, and how the records answer it.

``judge`` gives for every row, and on a GPU for every backend of ours, what was measured and whether that
meets the target. A row without records says so; nothing is filled in. Time on the device that was not taken
with the host ahead of it (harness: ``how``) is shown and not judged. ``choice``: which backend was faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import baselines
import harness

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
    backend: str = ""  # the contestant judged; empty where there is none


# A measurement: the figure that counts, how it reads, why it cannot be judged; or None for no records.
Measured = tuple[float, str, str] | None


@dataclass(frozen=True)
class Target:
    """A row: on which kind of device, what, and the bound that the measured figure must keep to."""

    kind: str
    group: str
    text: str
    bound: float
    target: str
    measure: Callable[[list[dict], str], Measured]  # of records and the name of a backend of ours
    above: bool = False


# Finding records -------------------------------------------------------------------------------------


def default_name(records: Iterable[dict]) -> str:
    """The name of the backend that a call without ``backend`` takes, among the contestants."""
    records = list(records)
    names = {r["name"] for r in records}
    backends = next((r["env"]["backends"] for r in records), [])
    return next((baselines.ours(b) for b in backends if baselines.ours(b) in names), "")


def names(records: list[dict], bench: str = "") -> list[str]:
    """Our backends to show: on a GPU each but plain PyTorch, best first; on a CPU the one that serves."""
    records = [r for r in records if not bench or r["bench"] == bench]
    if not records or records[0]["env"]["kind"] != "cuda":
        return [name for name in [default_name(records)] if name]
    known = dict.fromkeys(b for r in records for b in r["env"]["backends"])
    timed = {r["name"] for r in records}
    return baselines.kernels(baselines.ours(b) for b in known if baselines.ours(b) in timed)


def find(
    records: Iterable[dict], bench: str, name: str = "", mode: str = "", clock: str = "", **case
) -> list[dict]:
    """Records of a benchmark whose case agrees, those of sweeps left out unless ``sweep`` is asked for."""
    case = {"sweep": "", **case}
    return [
        r
        for r in records
        if r["bench"] == bench
        and (not name or r["name"] == name)
        and (not mode or r["mode"] == mode)
        and (not clock or r["clock"] == clock)
        and all(r["case"].get(k, v) == v for k, v in case.items())
    ]


def ceiling(records: list[dict], name: str, dtype: str = "float32", run: str = "") -> float:
    """Bytes (copy) or operations (product) a second that were reached in a run, or any; 0 if unmeasured."""
    found = [r for r in find(records, "ceiling", name, dtype=dtype) if not run or r["run"] == run]
    return (found[-1]["bytes"] or found[-1]["flops"]) / found[-1]["median"] if found else 0.0


def meeting(records: list[dict], r: dict, peer: str) -> tuple[list[float], str] | None:
    """Our time over a peer's [median, 20 %, 80 %] at a record's shape, and how the two were timed at worst.

    Peers that take long to compile have a race of their own at some shapes.
    """
    for sweep in (r["case"].get("sweep", ""), "compiled"):
        here = {**r["case"], "sweep": sweep}
        for mine in find(records, r["bench"], r["name"], r["mode"], r["clock"], **here):
            if peer in mine["ratio"]:
                theirs = find(records, r["bench"], peer, r["mode"], r["clock"], **here)
                hows = [x["how"] for x in (mine, *theirs) if x["how"] not in harness.SURE]
                return mine["ratio"][peer], hows[0] if hows else mine["how"]
    return None


# Measures --------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Figure:
    """A figure, where it is from, how it was timed ("": not timed but counted)."""

    value: float
    where: str = ""
    how: str = ""


def _worst(figures: Iterable[Figure], form: str, above: bool = False) -> Measured:
    """The figure furthest from its target, and where; the first doubt among all of them."""
    figures = list(figures)
    if not figures:
        return None
    worst = (min if above else max)(figures)
    doubts = [
        f"{f.where}: {f.how}" if f.where else f.how for f in figures if f.how and f.how not in harness.SURE
    ]
    return (
        worst.value,
        form.format(worst.value) + (f" ({worst.where})" if worst.where else ""),
        doubts[0] if doubts else "",
    )


def _shape(r: dict) -> str:
    c = r["case"]
    return f"{c['N']}x{c['C']}" if "D" not in c else f"N {c['N']}, D {c['D']}, C {c['C']}, {c['dtype']}"


def _anything(r: dict) -> bool:
    return True


def ratio(peer: str, select: Callable[[dict], bool] = _anything, bench: str = "loss", **case):
    """Our time over a peer's, the worst of the cases."""

    def measure(records: list[dict], name: str) -> Measured:
        met = [(r, meeting(records, r, peer)) for r in find(records, bench, name, **case) if select(r)]
        met = [(r, *found) for r, found in met if found]
        several = len({_shape(r) for r, _, _ in met}) > 1
        return _worst([Figure(x[0], _shape(r) if several else "", how) for r, x, how in met], "{:.3g}")

    return measure


def faster(peer: str, **case):
    """A peer's time over ours."""

    def measure(records: list[dict], name: str) -> Measured:
        met = [meeting(records, r, peer) for r in find(records, "vote", name, **case)]
        return _worst([Figure(1 / x[0][0], "", x[1]) for x in met if x], "{:.3g}x", above=True)

    return measure


def of_copy(select: Callable[[dict], bool]):
    """The loss's bandwidth as a share of the copy's in the same run, percent, the worst of the cases."""

    def measure(records: list[dict], name: str) -> Measured:
        rows = find(records, "loss", name, mode="both", clock="device", dtype="bfloat16")
        shares = [
            Figure(100 * r["bytes"] / r["median"] / copy, _shape(r), r["how"])
            for r in rows
            if select(r) and (copy := ceiling(records, "copy", run=r["run"]))
        ]
        return _worst(shares, "{:.1f} %", above=True)

    return measure


def microseconds(clock: str, select: Callable[[dict], bool] = _anything, bench: str = "loss", **case):
    """Time of a call, the worst of the cases."""

    def measure(records: list[dict], name: str) -> Measured:
        rows = [r for r in find(records, bench, name, clock=clock, **case) if select(r)]
        return _worst([Figure(1e6 * r["median"], _shape(r), r["how"]) for r in rows], "{:.3g} us")

    return measure


def launches(key: str):
    """A count taken by the profiler."""

    def measure(records: list[dict], name: str) -> Measured:
        rows = [r for r in find(records, "launches", name) if key in r.get("facts", {})]
        return _worst([Figure(r["facts"][key], _shape(r)) for r in rows], "{:.0f}")

    return measure


def peak(bench: str, per_logits: bool = False, **case):
    """Peak extra memory in MiB, or as a multiple of the logits, the worst of the cases."""

    def measure(records: list[dict], name: str) -> Measured:
        rows = [r for r in find(records, bench, name, **case) if r["peak"] is not None]
        if per_logits:
            rows = [r for r in rows if r["bytes"] >= 2 * MIB]
            return _worst([Figure(r["peak"] / (r["bytes"] / 2), _shape(r)) for r in rows], "{:.3f} x logits")
        return _worst([Figure(r["peak"] / MIB, _shape(r)) for r in rows], "{:.2f} MiB")

    return measure


def layouts(records: list[dict], name: str) -> Measured:
    """NCHW's rate as a share of channels_last's, percent."""
    both = [
        find(records, "vote", name, layout=layout, what="ResNet-50, ImageNet", N=256, dtype="bfloat16")
        for layout in ("channels_last", "NCHW")
    ]
    if not all(both):
        return None
    (fast, *_), (slow, *_) = both
    share = 100 * fast["median"] / slow["median"]
    return _worst([Figure(share, "", r["how"]) for r in (fast, slow)], "{:.0f} %")


def added(C: int, key: str = "median"):
    """What our loss adds to a step with F.cross_entropy: percent of its time, or MiB of its peak memory."""

    def measure(records: list[dict], name: str) -> Measured:
        rows = find(records, "step", name, C=C, compiled=False)
        if not rows:
            return None
        if key == "median":
            met = meeting(records, rows[0], baselines.CROSS_ENTROPY)
            return met and _worst([Figure(100 * (met[0][0] - 1), "", met[1])], "{:+.2f} %")
        plain = find(records, "step", baselines.CROSS_ENTROPY, C=C, compiled=False)
        if not plain or rows[0]["peak"] is None or plain[0]["peak"] is None:
            return None
        return _worst([Figure((rows[0]["peak"] - plain[0]["peak"]) / MIB)], "{:+.2f} MiB")

    return measure


def reached(of: str, dtype: str, unit: float, label: str):
    """A ceiling; there is nothing to meet."""

    def measure(records: list[dict], name: str) -> Measured:
        value = ceiling(records, of, dtype)
        return (value, f"{value / unit:.3g} {label}", "") if value else None

    return measure


# The rows --------------------------------------------------------------------------------------------


def _is_small(r: dict) -> bool:
    return (r["case"]["N"], r["case"]["C"]) in ((256, 1000), (512, 1000), (1024, 1000), (128, 100))


def _is_large(r: dict) -> bool:
    return r["bytes"] > 128e6


def _targets() -> list[Target]:
    both, bf16 = {"mode": "both", "dtype": "float32"}, {"dtype": "bfloat16"}
    rows = []

    def cpu(group: str, text: str, bound: float, target: str, measure: Callable) -> None:
        rows.append(Target("cpu", group, text, bound, target, measure))

    for N, C, bound in ((256, 10000, 0.45), (64, 131072, 0.12), (256, 1000, 0.8), (128, 100, 1.2)):
        measure = ratio(baselines.CROSS_ENTROPY, N=N, C=C, **both)
        cpu("CPU loss", f"time of F.cross_entropy, {N} x {C}", bound, f"<= {bound}", measure)
    for name in ("ResNet-18, ImageNet", "CIFAR-100, stage 1", "CIFAR-100, stage 2", "many classes"):
        measure = ratio(
            baselines.MATMUL, bench="vote", what=name, dtype="float32", upsample=1, layout="channels_last"
        )
        cpu("CPU vote", f"time of torch.matmul alone, {name}", 1.05, "<= 1.05", measure)
    cpu("CPU vote", "peak extra memory, any shape", 64, "<= 64 MiB", peak("vote"))

    def gpu(group: str, text: str, bound: float, target: str, measure: Callable, above: bool = False) -> None:
        rows.append(Target("cuda", group, text, bound, target, measure, above))

    gpu("ceiling", "copy, bytes read and written", 0, "-", reached("copy", "float32", 1e12, "TB/s"), True)
    product = reached("product", "bfloat16", 1e12, "TFLOP/s")
    gpu("ceiling", "bf16 matrix product, random data", 0, "-", product, True)
    share = "share of the copy bandwidth"
    wide = of_copy(lambda r: _is_large(r) and r["case"]["C"] >= 4096 and r["case"]["C"] % 8 == 0)
    gpu("loss", f"{share}, C >= 4096, logits > 64 MB", 95, ">= 95 %", wide, True)
    short = of_copy(lambda r: r["case"]["C"] == 1000 and r["case"]["N"] >= 32768)
    gpu("loss", f"{share}, C = 1000, N >= 32768", 90, ">= 90 %", short, True)
    odd = of_copy(lambda r: r["case"]["C"] in (21841, 10007))
    gpu("loss", f"{share}, C = 21841, 10007", 85, ">= 85 %", odd, True)
    gpu("loss, small", "launches in forward", 1, "<= 1", launches("forward"))
    gpu("loss, small", "launches in backward", 1, "<= 1", launches("backward"))
    gpu("loss, small", "host synchronisations", 0, "0", launches("synchronisations"))
    on_device = microseconds("device", _is_small, mode="both", **bf16)
    gpu("loss, small", "time on the GPU", 6, "<= 6 us", on_device)
    on_host = microseconds("host", _is_small, mode="both", **bf16)
    gpu("loss, small", "host time, forward + backward", 25, "<= 25 us", on_host)
    for peer, bound in (
        (baselines.CROSS_ENTROPY, 0.40),
        (baselines.COMPILED_CROSS_ENTROPY, 0.60),
        (baselines.COMPILED_REFERENCE, 0.10),
        (baselines.LIGER, 0.80),
        (baselines.QUACK_IN_FORWARD, 1.05),
    ):
        measure = ratio(peer, _is_large, mode="both", clock="device", **bf16)
        gpu("loss", f"time of {peer}", bound, f"<= {bound:.2f}", measure)
    memory = peak("loss", per_logits=True, mode="both", clock="device", **bf16)
    gpu("loss", "peak extra memory", 1.01, "1 x logits", memory)
    for name, case, bound, times in (
        ("ResNet-50, ImageNet", {"N": 256}, 1.02, 1.3),
        ("ResNet-18, ImageNet", {}, 1.05, 1.8),
        ("ViT-B/16, ImageNet", {}, 1.03, 1.6),
        ("ResNet-50, iNat21", {}, 1.02, 1.25),
    ):
        case = {**case, **bf16, "what": name}
        case["layout"] = "tokens" if name == "ViT-B/16, ImageNet" else "channels_last"
        measure = ratio(baselines.MATMUL, bench="vote", **case)
        gpu("vote", f"time of torch.matmul alone, {name}", bound, f"<= {bound}", measure)
        measure = faster(baselines.MATMUL_ARGMAX, **case)
        gpu("vote", f"speed over matmul + argmax, {name}", times, f">= {times}x", measure, True)
    for stage in (1, 2):
        case = {"what": f"CIFAR-100, stage {stage}", **bf16}
        measure = microseconds("device", bench="vote", layout="channels_last", **case)
        gpu("vote", f"CIFAR-100, stage {stage}, with and without upsampling", 6, "<= 6 us", measure)
        measure = faster(baselines.MATMUL_ARGMAX, layout="channels_last", **case)
        gpu("vote", f"speed over matmul + argmax, CIFAR-100, stage {stage}", 2, ">= 2x", measure, True)
    gpu("vote", "NCHW, rate against channels_last", 85, ">= 85 %", layouts, True)
    for name, bound in (("ResNet-50, ImageNet", 0.5), ("ResNet-50, iNat21", 4)):
        measure = peak("vote", what=name, layout="channels_last", **bf16)
        gpu("vote", f"peak extra memory, {name}", bound, f"<= {bound} MiB", measure)
    for C, bound, name in ((1000, 0.1, "ImageNet"), (10000, 0.7, "iNat21")):
        gpu("step", f"ResNet-50, {name}: added time", bound, f"<= +{bound} %", added(C))
        gpu("step", f"ResNet-50, {name}: added peak memory", 0.5, "+0", added(C, "peak"))
    return rows


TARGETS = _targets()


def judge(records: list[dict], kind: str) -> list[Verdict]:
    """Every row for a kind of device ("cpu", "cuda") against records from one, for each backend of ours."""
    timed = [r for r in records if r["env"]["kind"] == kind and r["bench"] in ("loss", "vote", "step")]
    verdicts = []
    for t in TARGETS:
        if t.kind != kind:
            continue
        for name in [""] if t.target == "-" else names(timed) or [""]:
            found = t.measure(records, name) if name or t.target == "-" else None
            value, text, doubt = found or (0.0, GAP, "")
            met = None
            if doubt:
                text = f"{text}, not judged ({doubt})"
            elif found is not None and t.target != "-":
                met = value >= t.bound if t.above else value <= t.bound
            verdicts.append(Verdict(t.group, t.text, t.target, text, met, name))
    return verdicts


# Which backend serves --------------------------------------------------------------------------------

REGIMES: dict[str, tuple[str, Callable[[dict], bool]]] = {  # words -> benchmark, which of its records
    "loss, C >= 4096, C a multiple of 8": (
        "loss",
        lambda r: r["case"]["C"] >= 4096 and r["case"]["C"] % 8 == 0,
    ),
    "loss, C = 21841, 10007": ("loss", lambda r: r["case"]["C"] in (21841, 10007)),
    "loss, C = 1000, N >= 32768": ("loss", lambda r: r["case"]["C"] == 1000 and r["case"]["N"] >= 32768),
    "loss, small": ("loss", _is_small),
    "votes, channels_last and tokens": (
        "vote",
        lambda r: r["case"]["layout"] != "NCHW" and r["case"]["dtype"] != "tf32",
    ),
    "votes, NCHW": ("vote", lambda r: r["case"]["layout"] == "NCHW"),
    "votes, TF32": ("vote", lambda r: r["case"]["dtype"] == "tf32"),
    "training step": ("step", _anything),
}


@dataclass(frozen=True)
class Choice:
    """A regime: which of two backends was faster, cuda's time over triton's race by race."""

    regime: str
    clock: str
    faster: str
    ratios: list[float]
    doubt: str  # how a case was timed, where that does not decide

    @property
    def middle(self) -> float:
        return statistics.median(self.ratios)


def choice(records: list[dict]) -> list[Choice]:
    """Per regime, which of cuda and triton was faster where both ran in one race; "either" within 2 %.

    Evidence for the order of ``ops.BACKENDS``, which ``backend=None`` follows.
    """
    cuda, triton = baselines.ours("cuda"), baselines.ours("triton")
    found = []
    for regime, (bench, belongs) in REGIMES.items():
        for clock in ("device", "host"):
            races = [
                r for r in find(records, bench, cuda, clock=clock) if belongs(r) and r["mode"] != "backward"
            ]
            met = [x for x in (meeting(records, r, triton) for r in races) if x]
            ratios = [ratio[0] for ratio, _ in met]
            doubt = next((how for _, how in met if how not in harness.SURE), "")
            if ratios:
                middle = statistics.median(ratios)
                best = "either" if abs(middle - 1) < 0.02 else "cuda" if middle < 1 else "triton"
                found.append(Choice(regime, clock, best, ratios, doubt))
    return found
