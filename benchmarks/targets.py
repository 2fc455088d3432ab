"""The performance targets, one row each: what is asked, and how the records answer it.

``judge`` gives for every row what was measured and whether that meets the target. A row without records says
so; nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import baselines

MIB = 1 << 20
GAP = "not measured"


@dataclass(frozen=True)
class Verdict:
    """One row of the table; ``met`` is None where nothing was measured."""

    group: str
    text: str
    target: str
    measured: str
    met: bool | None


# A measurement: the figure that counts, how it reads, or None for no records.
Measured = tuple[float, str] | None


@dataclass(frozen=True)
class Target:
    """A row: on which kind of device, what, and the bound that the measured figure must keep to."""

    kind: str
    group: str
    text: str
    bound: float
    target: str
    measure: Callable[[list[dict]], Measured]
    above: bool = False


# Finding records -------------------------------------------------------------------------------------


def default_name(records: Iterable[dict]) -> str:
    """The name of the backend that a call without ``backend`` takes, among the contestants."""
    records = list(records)
    names = {r["name"] for r in records}
    backends = next((r["env"]["backends"] for r in records), [])
    return next((baselines.ours(b) for b in backends if baselines.ours(b) in names), "")


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


def ceiling(records: list[dict], name: str, dtype: str = "float32") -> float:
    """Bytes (copy) or operations (product) per second that this run's machine reached; 0 if unmeasured."""
    found = find(records, "ceiling", name, dtype=dtype)
    return (found[0]["bytes"] or found[0]["flops"]) / found[0]["median"] if found else 0.0


def _ours(records: list[dict], bench: str, **case) -> list[dict]:
    name = default_name(r for r in records if r["bench"] == bench)
    return find(records, bench, name, **case) if name else []


# Measures --------------------------------------------------------------------------------------------


def _worst(figures: list[tuple[float, str]], form: str, above: bool = False) -> Measured:
    """The figure furthest from its target, and where."""
    if not figures:
        return None
    value, where = (min if above else max)(figures)
    return value, form.format(value) + (f" ({where})" if where else "")


def _shape(r: dict) -> str:
    c = r["case"]
    return f"{c['N']}x{c['C']}" if "P" in c else f"N {c['N']}, D {c['D']}, C {c['C']}, {c['dtype']}"


def ratio(peer: str, select: Callable[[dict], bool] | None = None, bench: str = "loss", **case):
    """Our time over a peer's, the worst of the cases."""

    def measure(records: list[dict]) -> Measured:
        rows = [r for r in _ours(records, bench, **case) if peer in r["ratio"] and (not select or select(r))]
        several = len({_shape(r) for r in rows}) > 1
        return _worst([(r["ratio"][peer][0], _shape(r) if several else "") for r in rows], "{:.3g}")

    return measure


def faster(peer: str, **case):
    """A peer's time over ours."""

    def measure(records: list[dict]) -> Measured:
        rows = [r for r in _ours(records, "vote", **case) if peer in r["ratio"]]
        return _worst([(1 / r["ratio"][peer][0], "") for r in rows], "{:.3g}x", above=True)

    return measure


def of_copy(select: Callable[[dict], bool]):
    """The loss's bandwidth as a share of the copy's, percent, the worst of the cases."""

    def measure(records: list[dict]) -> Measured:
        rows = [r for r in _ours(records, "loss", mode="both", clock="device", dtype="bfloat16") if select(r)]
        copy = ceiling(records, "copy")
        if not copy:
            return None
        shares = [(100 * r["bytes"] / r["median"] / copy, _shape(r)) for r in rows]
        return _worst(shares, "{:.1f} %", above=True)

    return measure


def microseconds(clock: str, select: Callable[[dict], bool] = lambda r: True, bench: str = "loss", **case):
    """Time of a call, the worst of the cases."""

    def measure(records: list[dict]) -> Measured:
        rows = [r for r in _ours(records, bench, clock=clock, **case) if select(r)]
        return _worst([(1e6 * r["median"], _shape(r)) for r in rows], "{:.3g} us")

    return measure


def launches(key: str):
    """A count taken by the profiler."""

    def measure(records: list[dict]) -> Measured:
        rows = [r for r in _ours(records, "launches") if key in r.get("facts", {})]
        return _worst([(r["facts"][key], _shape(r)) for r in rows], "{:.0f}")

    return measure


def peak(bench: str, per_logits: bool = False, **case):
    """Peak extra memory in MiB, or as a multiple of the logits, the worst of the cases."""

    def measure(records: list[dict]) -> Measured:
        rows = [r for r in _ours(records, bench, **case) if r["peak"] is not None]
        if per_logits:
            rows = [r for r in rows if r["bytes"] >= 2 * MIB]
            return _worst([(r["peak"] / (r["bytes"] / 2), _shape(r)) for r in rows], "{:.3f} x logits")
        return _worst([(r["peak"] / MIB, _shape(r)) for r in rows], "{:.2f} MiB")

    return measure


def layouts(records: list[dict]) -> Measured:
    """NCHW's rate as a share of channels_last's, percent."""
    both = [
        _ours(records, "vote", layout=layout, what="ResNet-50, ImageNet", N=256, dtype="bfloat16")
        for layout in ("channels_last", "NCHW")
    ]
    if not all(both):
        return None
    share = 100 * both[0][0]["median"] / both[1][0]["median"]
    return share, f"{share:.0f} %"


def added(C: int, key: str = "median"):
    """What our loss adds to a step with F.cross_entropy: percent of its time, or MiB of its peak memory."""

    def measure(records: list[dict]) -> Measured:
        rows = _ours(records, "step", C=C, compiled=False)
        if not rows:
            return None
        if key == "median":
            percent = 100 * (rows[0]["ratio"][baselines.CROSS_ENTROPY][0] - 1)
            return percent, f"{percent:+.2f} %"
        plain = find(records, "step", baselines.CROSS_ENTROPY, C=C, compiled=False)
        if not plain or rows[0]["peak"] is None or plain[0]["peak"] is None:
            return None
        more = (rows[0]["peak"] - plain[0]["peak"]) / MIB
        return more, f"{more:+.2f} MiB"

    return measure


def reached(name: str, dtype: str, unit: float, label: str):
    """A ceiling; there is nothing to meet."""

    def measure(records: list[dict]) -> Measured:
        value = ceiling(records, name, dtype)
        return (value, f"{value / unit:.3g} {label}") if value else None

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
        if name != "ViT-B/16, ImageNet":
            case["layout"] = "channels_last"
        measure = ratio(baselines.MATMUL, bench="vote", **case)
        gpu("vote", f"time of torch.matmul alone, {name}", bound, f"<= {bound}", measure)
        measure = faster(baselines.MATMUL_ARGMAX, **case)
        gpu("vote", f"speed over matmul + argmax, {name}", times, f">= {times}x", measure, True)
    for stage in (1, 2):
        case = {"what": f"CIFAR-100, stage {stage}", **bf16}
        measure = microseconds("device", bench="vote", **case)
        gpu("vote", f"CIFAR-100, stage {stage}, with and without upsampling", 6, "<= 6 us", measure)
        measure = faster(baselines.MATMUL_ARGMAX, **case)
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
    """Every row for a kind of device ("cpu", "cuda") against records from one."""
    verdicts = []
    for t in TARGETS:
        if t.kind != kind:
            continue
        found = t.measure(records)
        met = None
        if found is not None and t.target != "-":
            met = found[0] >= t.bound if t.above else found[0] <= t.bound
        verdicts.append(Verdict(t.group, t.text, t.target, GAP if found is None else found[1], met))
    return verdicts
