"""From records to figures: the README's tables, and the pictures beside the records.

    python benchmarks/report.py            write tables into README.md, draw the pictures
    python benchmarks/report.py --check    say what in them does not follow from the records (exit status 1)

A table goes between ``<!-- report:NAME -->`` and ``<!-- /report -->`` in README.md; the names are BLOCKS and
EFFICACY. Every figure comes from a record in benchmarks/results; where there is none, the block says that
nothing was measured.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import baselines
import efficacy
import harness
import targets
from targets import find

README = harness.ROOT / "README.md"
MARKED = re.compile(r"<!-- report:([\w-]+) -->\n(.*?)<!-- /report -->", re.S)
NOTHING = "*Not measured yet.*"
BUSY = 0.10  # of the machine taken by others: figures from there are marked


# Text ------------------------------------------------------------------------------------------------


def seconds(x: float) -> str:
    """A time in the unit that suits it, three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if x >= size:
            return f"{digits(x / size)} {unit}"
    return f"{digits(x / 1e-9)} ns"


def digits(x: float, n: int = 3) -> str:
    """``n`` significant digits, without an exponent."""
    if x == 0:
        return "0"
    return f"{x:.{max(0, n - 1 - math.floor(math.log10(abs(x))))}f}"


def size(nbytes: float | None) -> str:
    if nbytes is None:
        return "-"
    return f"{digits(nbytes / targets.MIB, 2 if nbytes < targets.MIB else 3)} MiB"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def times(records: list[dict], peer: str) -> str:
    """Our time over a peer's from a record of ours; "-" where the two did not meet."""
    ratio = records[0]["ratio"].get(peer) if records else None
    return digits(ratio[0], 3 if ratio[0] >= 0.1 else 2) if ratio else "-"


def provenance(records: list[dict]) -> str:
    """Where figures come from, in a line."""
    env = records[0]["env"]
    parts = [f"{env['device']} ({env['arch']})"]
    parts += (
        [f"{env['threads']} thread{'s' * (env['threads'] > 1)}"]
        if env["kind"] == "cpu"
        else [f"driver {env['driver']}"]
    )
    parts += [f"torch {env['torch']}", *([f"triton {env['triton']}"] if env["kind"] == "cuda" else [])]
    parts += [env["compiler"], f"commit {env['commit']}{' with changes' if env['dirty'] else ''}"]
    text = ", ".join(part for part in parts if part)
    if env.get("others", 0) > BUSY:
        text += f". **The machine was busy: other programs took {100 * env['others']:.0f} % of it**"
    return text


# Blocks ----------------------------------------------------------------------------------------------


def _shape(r: dict) -> str:
    return f"{r['case']['N']} x {r['case']['C']}"


def _backend(name: str) -> str:
    return name.removeprefix("zipfls_cuda, ")


LOSS_PEERS = {
    baselines.COPY: "copying the logits",
    baselines.CROSS_ENTROPY: "`F.cross_entropy`",
    baselines.COMPILED_CROSS_ENTROPY: "compiled `F.cross_entropy`",
    baselines.COMPILED_REFERENCE: "compiled plain PyTorch",
    baselines.REFERENCE: "plain PyTorch",
    baselines.PUBLISHED: "published way (SciPy)",
    baselines.LIGER: "Liger-Kernel CE",
    baselines.QUACK_IN_FORWARD: "QuACK CE",
}


def loss_block(records: list[dict], picture: Callable[[str], str]) -> str:
    name = targets.default_name(r for r in records if r["bench"] == "loss")
    clock = "device" if records[0]["env"]["kind"] == "cuda" else "host"
    rows = find(records, "loss", name, "both", clock)
    peers = [p for p in LOSS_PEERS if any(p in r["ratio"] for r in rows)]
    copy = targets.ceiling(records, "copy")
    head = ["logits", "dtype", "time", "GB/s", *(LOSS_PEERS[p] for p in peers)]
    body = []
    for r in rows:
        rate = r["bytes"] / r["median"]
        body.append(
            [_shape(r), r["case"]["dtype"], seconds(r["median"]), f"{rate / 1e9:.3g}"]
            + [times([r], p) for p in peers]
        )
    text = (
        f"`zipf_cross_entropy` ({_backend(name)} backend), value and gradient, P = {rows[0]['case']['P']} "
        f"votes a sample: its time, and **its time over that of** each other (below 1: ours is faster). A "
        f"copy of large tensors reached {copy / 1e9:.3g} GB/s in the same run.\n\n" + table(head, body)
    )
    modes = []
    for r in rows:
        if r["case"]["dtype"] != ("bfloat16" if clock == "device" else "float32"):
            continue
        pairs = []
        for mode in ("forward", "backward", "infer"):
            mine, theirs = (
                find(records, "loss", n, mode, clock, **r["case"]) for n in (name, baselines.CROSS_ENTROPY)
            )
            pairs += [f"{seconds(x[0]['median'])}" if x else "-" for x in (mine, theirs)]
        if any(p != "-" for p in pairs):
            modes.append([_shape(r), *pairs])
    if modes:
        head = ["logits"]
        for mode in ("forward", "backward", "no gradient wanted"):
            head += [f"{mode}: ours", "`F.cross_entropy`"]
        text += "\n\nThe gradient is computed in forward; backward only hands it over.\n\n" + table(
            head, modes
        )
    return text + picture("loss") + picture("growth")


def vote_block(records: list[dict], picture: Callable[[str], str]) -> str:
    name = targets.default_name(r for r in records if r["bench"] == "vote")
    body = []
    for r in find(records, "vote", name):
        c = r["case"]
        peers = [find(records, "vote", n, **c) for n in (baselines.MATMUL, baselines.MATMUL_ARGMAX)]
        ceiling = targets.ceiling(records, "product", c["dtype"])
        rate = r["flops"] / r["median"]
        body.append(
            [
                f"{c['what']}{', upsampled' if c['upsample'] == 2 else ''}",
                f"{c['N']}x{c['H'] * c['W']}, {c['D']}, {c['C']}",
                c["dtype"],
                c["layout"],
                seconds(r["median"]),
                f"{rate / 1e9:.3g} ({100 * rate / ceiling:.0f} %)" if ceiling else f"{rate / 1e9:.3g}",
                *(times([r], p) for p in (baselines.MATMUL, baselines.MATMUL_ARGMAX)),
                f"{size(r['peak'])} ({size(peers[1][0]['peak']) if peers[1] else '-'})",
            ]
        )
    head = ["votes", "NxP, D, C", "dtype", "layout", "time", "GFLOP/s (of a large product)"]
    head += ["`torch.matmul` alone", "matmul + argmax", "extra memory (matmul + argmax's)"]
    return (
        f"`dense_vote` ({_backend(name)} backend): its time, **its time over that of** the matrix product "
        "alone and of product and argmax; its peak extra memory.\n\n" + table(head, body) + picture("votes")
    )


def host_block(records: list[dict], picture: Callable[[str], str]) -> str:
    name = targets.default_name(r for r in records if r["bench"] == "loss")
    body = []
    kind = records[0]["env"]["kind"]
    cases = {"sweep": "host"} if kind == "cpu" else {}
    for mode, words in (
        ("both", "forward + backward"),
        ("forward", "forward"),
        ("infer", "forward, no gradient wanted"),
    ):
        for r in find(records, "loss", name, mode, "host", **cases):
            other = find(records, "loss", baselines.CROSS_ENTROPY, mode, "host", **r["case"])
            theirs = seconds(other[0]["median"]) if other else "-"
            row = [words, _shape(r), seconds(r["median"]), theirs, times([r], baselines.CROSS_ENTROPY)]
            body.append(row)
    head = ["call", "logits", "ours", "`F.cross_entropy`", "ratio"]
    return "Host time of a call, where there is next to nothing to compute.\n\n" + table(head, body)


def step_block(records: list[dict], picture: Callable[[str], str]) -> str:
    text = []
    for bench, words in (
        ("step", "A whole training step (forward, loss, backward, SGD): {}."),
        ("head", "The head alone: pooling, classifier, loss, gradients of map and weight: {}."),
    ):
        cases = []
        for r in records:
            if r["bench"] == bench and r["case"] not in cases:
                cases.append(r["case"])
        for case in cases:
            rows = find(records, bench, **case)
            plain_name = baselines.CROSS_ENTROPY if bench == "step" else baselines.LINEAR_THEN_CROSS_ENTROPY
            plain = next((r for r in rows if r["name"] == plain_name), None)
            body = []
            for r in rows:
                ratio = r["ratio"].get(plain_name)
                more = "-" if ratio is None else f"{100 * (ratio[0] - 1):+.2f} %"
                if plain is r:
                    more = "0"
                body.append([r["name"], seconds(r["median"]), more, size(r["peak"])])
            head = ["loss", "time", f"against `{plain_name}`", "peak memory"]
            text.append(words.format(_describe(bench, case)) + "\n\n" + table(head, body))
    return "\n\n".join(text)


def _describe(bench: str, case: dict) -> str:
    if bench == "head":
        return (
            f"{case['N']} maps of {case['H']}x{case['H']}, D = {case['D']}, C = {case['C']}, {case['dtype']}"
        )
    compiled = ", compiled" if case["compiled"] else ""
    return (
        f"{case['what']}{compiled}, {case['N']} images of {case['size']}x{case['size']}, C = {case['C']}, "
        f"{case['dtype']}"
    )


def target_block(records: list[dict], picture: Callable[[str], str]) -> str:
    kind = records[0]["env"]["kind"]
    return target_table(targets.judge(records, kind)) + picture("ceiling")


def target_table(verdicts: list[targets.Verdict]) -> str:
    met = {True: "yes", False: "no", None: "-"}
    rows = [[f"{v.group}: {v.text}", v.target, v.measured, met[v.met]] for v in verdicts]
    return table(["", "target", "measured", "met"], rows)


BLOCKS: dict[str, tuple[str, str, Callable]] = {  # name -> kind of device, benchmark it needs, what writes it
    f"{label}-{name}": (kind, bench, write)
    for label, kind in (("cpu", "cpu"), ("gpu", "cuda"))
    for name, bench, write in (
        ("loss", "loss", loss_block),
        ("vote", "vote", vote_block),
        ("host", "loss", host_block),
        ("step", "step", step_block),
        ("targets", "loss", target_block),
    )
}


EFFICACY = {f"efficacy-{preset}": preset for preset in efficacy.PLANS}  # name of a block -> its plan


def efficacy_block(preset: str, folder: Path) -> str:
    """Accuracy of every method, and its difference from cross-entropy, from the records of a plan."""
    plan, path = efficacy.PLANS[preset], folder / "efficacy" / f"{preset}.json"
    records = efficacy.balanced(plan, harness.load(path) if path.exists() else [])
    if not records:
        return NOTHING

    def cell(sample: efficacy.Sample, form: str) -> str:
        mean = round(sample.mean, 2) + 0.0  # no -0.00
        return f"{mean:{form}}" + (f" ± {sample.deviation:.2f}" if len(sample.values) > 1 else "")

    def bold(less: efficacy.Sample) -> str:
        return f"**{cell(less, '+.2f')}**" if less.certain else cell(less, "+.2f")

    head, rows = ["training loss"], {method: [method] for method in efficacy.METHODS}
    differences, over_smoothing = [], []
    for data in dict.fromkeys(r["data"] for r in records):
        found = {method: efficacy.accuracies(records, data, method) for method in rows}
        base = found[efficacy.BASELINE]
        head += [f"{data}, {len(base)} seed{'s' * (len(base) > 1)}", f"minus {efficacy.BASELINE}"]
        for method, values in found.items():
            rows[method].append(cell(efficacy.Sample(tuple(values.values())), ".2f"))
            less = efficacy.difference(values, base)
            rows[method].append("" if method == efficacy.BASELINE else bold(less))
            differences += [] if method == efficacy.BASELINE else [less]
        less = efficacy.difference(found[efficacy.ZIPF], found[efficacy.SMOOTHING])
        over_smoothing.append(f"{data} {bold(less)}")
    certain = [d for d in differences if d.certain]
    options = "; ".join(f"{data}: `{of_data} {plan.options}`" for data, of_data in plan.data.items())
    where = "; ".join(dict.fromkeys(provenance([r]) for r in records))
    return (
        "Test accuracy in % after the last epoch, mean ± standard deviation over the seeds; and what it is "
        "more or less than cross-entropy's, seed by seed, as all methods start from the same weights and "
        f"meet the same batches and crops.\n\n{table(head, rows.values())}\n\n"
        "**Bold**: a difference that the seeds tell from 0 (95 % interval by Student's t, on these test "
        "images); none of the others can be called one. "
        f"{len(certain)} of the table's {len(differences)} are bold, "
        f"{sum(d.mean > 0 for d in certain)} of them gains; "
        f"chance alone would give about {0.05 * len(differences):.1f}. "
        f"{efficacy.ZIPF}, minus label smoothing: {', '.join(over_smoothing)}.\n\n"
        f"<sub>Options of examples/train.py: {options}. {len(records)} runs, "
        f"{sum(r['seconds'] for r in records) / 60:.0f} min of training. {where}.</sub>"
    )


def block(name: str, results: dict[Path, list[dict]], folder: Path = harness.RESULTS) -> str:
    """The Markdown of a block from all result files of its kind."""
    if name in EFFICACY:
        return efficacy_block(EFFICACY[name], folder)
    kind, bench, write = BLOCKS[name]
    parts = []
    for path, records in results.items():
        source = [r for r in records if r["bench"] == bench and r["env"]["kind"] == kind]
        if not source:
            continue

        def picture(what: str, path: Path = path, records: list[dict] = records) -> str:
            drawn = PICTURES[what](records) is not None
            return f"\n\n![{what}](benchmarks/results/{path.stem}-{what}.svg)" if drawn else ""

        parts.append(f"{write(records, picture)}\n\n<sub>{provenance(source)}.</sub>")
    return "\n\n".join(parts) or NOTHING


# Pictures --------------------------------------------------------------------------------------------

INK, OURS, THEIRS, SOFT = "#22272e", "#d1495b", "#7d8ca3", "#d9dee6"
COLOURS = ("#d1495b", "#3a6ea5", "#8f9bb3", "#e0a458", "#5f9e7e")


def _figure(columns: int, width: float = 4.6, height: float = 3.6, rows: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
            "axes.edgecolor": SOFT, "xtick.color": INK, "ytick.color": INK, "axes.titleweight": "bold",
            "axes.titlesize": 11, "axes.titlelocation": "left", "axes.spines.top": False,
            "axes.spines.right": False, "svg.fonttype": "none", "svg.hashsalt": "zipfls_cuda",
            "figure.facecolor": "white", "legend.frameon": False, "axes.grid": False,
        }
    )  # fmt: skip
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), layout="constrained")


def draw_loss(records: list[dict], draw: bool = False):
    """Bars: how many times faster the loss is than each peer, shape by shape."""
    name = targets.default_name(r for r in records if r["bench"] == "loss")
    on_gpu = records[0]["env"]["kind"] == "cuda"
    clock, dtype = ("device", "bfloat16") if on_gpu else ("host", "float32")
    rows = [r for r in find(records, "loss", name, "both", clock, dtype=dtype) if len(r["ratio"]) > 3]
    rows = [rows[i * len(rows) // 6] for i in range(6)] if len(rows) > 6 else rows
    if not rows:
        return None
    if not draw:
        return True
    columns = min(3, len(rows)) if len(rows) != 4 else 2
    lines = -(-len(rows) // columns)
    figure, axes = _figure(columns, 4.9, 2.9, lines)
    axes = [axes] if len(rows) == 1 else axes.flatten()
    for ax in axes[len(rows) :]:
        ax.axis("off")
    for ax, r in zip(axes, rows):
        peers = [p for p in LOSS_PEERS if p in r["ratio"] and p != baselines.COPY]
        speed = [1 / r["ratio"][p][0] for p in peers]
        low = [1 / r["ratio"][p][0] - 1 / r["ratio"][p][2] for p in peers]
        high = [1 / r["ratio"][p][1] - 1 / r["ratio"][p][0] for p in peers]
        y = range(len(peers))
        colours = [COLOURS[1] if "cross_entropy" in p or "CE" in LOSS_PEERS[p] else THEIRS for p in peers]
        ax.barh(y, speed, 0.62, color=colours, xerr=[low, high], error_kw={"ecolor": INK, "elinewidth": 0.8})
        for i, s in enumerate(speed):
            reach = s + max(0.0, high[i])
            ax.text(reach * 1.08, i, f"{digits(s, 2)}x", va="center", fontweight="bold")
        ax.set_yticks(y, [LOSS_PEERS[p].replace("`", "") for p in peers])
        ax.invert_yaxis()
        ax.set_xscale("log")
        ax.set_xlim(min(0.3, *speed) * 0.8, max(2.0, *(s + h for s, h in zip(speed, high))) * 3)
        ax.axvline(1, color=OURS, lw=1.4, zorder=0)
        ax.tick_params(length=0)
        ax.minorticks_off()
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
        ax.set_title(f"{_shape(r)}: {seconds(r['median'])}")
    figure.suptitle(
        "Loss and gradient: how many times faster than each peer (plain cross-entropy in blue)", fontsize=11
    )
    return figure


def draw_growth(records: list[dict], draw: bool = False):
    """Lines: time of the loss against classes, samples and votes."""
    panels = [
        (key, words)
        for key, words in (("C", "classes C"), ("N", "samples N"), ("P", "votes a sample P"))
        if find(records, "loss", mode="both", sweep=key)
    ]
    if not panels:
        return None
    if not draw:
        return True
    figure, axes = _figure(len(panels), 4.2, 3.4)
    for ax, (key, words) in zip(axes if len(panels) > 1 else [axes], panels):
        rows = find(records, "loss", mode="both", sweep=key)
        names = list(dict.fromkeys(r["name"] for r in rows))
        for name, colour in zip(names, COLOURS):
            mine = sorted((r for r in rows if r["name"] == name), key=lambda r: r["case"][key])
            x = [r["case"][key] for r in mine]
            ax.fill_between(x, [r["p20"] for r in mine], [r["p80"] for r in mine], color=colour, alpha=0.15)
            ax.plot(x, [r["median"] for r in mine], "o-", color=colour, ms=3.5, lw=1.8, label=name)
        rest = {k: v for k, v in rows[0]["case"].items() if k in "NCP" and k != key}
        if key == "C" and len({r["case"]["N"] for r in rows}) > 1:
            rest.pop("N")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel(words)
        ax.set_title(", ".join(f"{k} = {v}" for k, v in rest.items()))
        ax.yaxis.set_major_formatter(lambda t, _: re.sub(r"\.0+ ", " ", seconds(t)) if t > 0 else "")
        ax.minorticks_off()
        ax.grid(True, color=SOFT, lw=0.6)
    (axes[0] if len(panels) > 1 else axes).legend(fontsize=8.5)
    figure.suptitle("Time of loss + gradient as the problem grows (band: 20 to 80 % quantiles)", fontsize=11)
    return figure


def draw_ceiling(records: list[dict], draw: bool = False):
    """The loss's bandwidth against classes, with the copy's as the ceiling; memory beside it."""
    name = targets.default_name(r for r in records if r["bench"] == "loss")
    clock = "device" if records[0]["env"]["kind"] == "cuda" else "host"
    rows = sorted(find(records, "loss", name, "both", clock, sweep="C"), key=lambda r: r["case"]["C"])
    rows = [r for r in rows if r["case"]["P"] == 49]
    copy = targets.ceiling(records, "copy")
    held = [r for r in find(records, "loss", mode="both", clock=clock) if r["peak"] is not None]
    if not rows or not copy or not held:
        return None
    if not draw:
        return True
    figure, (left, right) = _figure(2, 5.2, 3.5)
    peers = dict.fromkeys([name, baselines.CROSS_ENTROPY])
    for i, n in enumerate(peers):
        mine = sorted(find(records, "loss", n, "both", clock, sweep="C"), key=lambda r: r["case"]["C"])
        x = [r["case"]["C"] for r in mine]
        rate = [r["bytes"] / r["median"] / 1e9 for r in mine]
        left.plot(x, rate, "o-", color=COLOURS[i], ms=4, lw=1.8, label=n)
    left.axhline(copy / 1e9, color=INK, lw=1, ls="--", label=f"copy of large tensors, {copy / 1e9:.3g} GB/s")
    left.set_xscale("log")
    left.set_xlabel("classes C")
    left.set_ylabel("GB/s")
    left.set_ylim(0, 1.45 * max(copy / 1e9, *left.get_ylim()))
    left.set_title("Logits read + gradient written, by the clock")
    left.legend(fontsize=8.5, loc="upper left")
    left.grid(True, color=SOFT, lw=0.6)
    case = max(held, key=lambda r: r["bytes"])["case"]
    shown = {name: name, **LOSS_PEERS}
    shown.pop(baselines.COPY)
    chosen = sorted(
        (r for r in held if r["case"] == case and r["name"] in shown), key=lambda r: r["peak"], reverse=True
    )
    logits = chosen[0]["bytes"] / 2
    y = range(len(chosen))
    ours = [COLOURS[0] if r["name"] == name else THEIRS for r in chosen]
    right.barh(y, [r["peak"] / logits for r in chosen], 0.62, color=ours)
    for i, r in enumerate(chosen):
        right.text(r["peak"] / logits, i, f" {r['peak'] / logits:.1f}", va="center")
    right.set_yticks(y, [shown[r["name"]].replace("`", "") for r in chosen])
    right.invert_yaxis()
    right.tick_params(length=0)
    right.set_xlim(0, 1.15 * max(r["peak"] for r in chosen) / logits)
    right.set_xlabel("peak extra memory, multiples of the logits")
    right.set_title(f"Memory at {case['N']} x {case['C']}, {case['dtype']}")
    return figure


def draw_votes(records: list[dict], draw: bool = False):
    """Bars: time of dense votes with the matrix product alone as the unit; their memory."""
    name = targets.default_name(r for r in records if r["bench"] == "vote")
    rows = [r for r in find(records, "vote", name) if baselines.MATMUL in r["ratio"]]
    if not rows:
        return None
    if not draw:
        return True
    figure, (left, right) = _figure(2, 5.6, 0.42 * len(rows) + 1.1)
    labels = []
    for r in rows:
        c = r["case"]
        extra = [x for x in (c["dtype"], c["layout"] if c["layout"] != "channels_last" else "") if x]
        labels.append(f"{c['what']}{' x2' if c['upsample'] == 2 else ''}, {', '.join(extra)}")
    y = range(len(rows))
    argmax = [find(records, "vote", baselines.MATMUL_ARGMAX, **r["case"])[0] for r in rows]
    dense = [r["ratio"][baselines.MATMUL][0] / r["ratio"][baselines.MATMUL_ARGMAX][0] for r in rows]
    mine = [r["ratio"][baselines.MATMUL][0] for r in rows]
    left.barh([i + 0.2 for i in y], dense, 0.36, color=THEIRS, label=baselines.MATMUL_ARGMAX)
    left.barh([i - 0.2 for i in y], mine, 0.36, color=OURS, label=name)
    for i, (a, b) in enumerate(zip(mine, dense)):
        left.text(a, i - 0.2, f" {digits(a)}", va="center", fontsize=8.5)
        left.text(b, i + 0.2, f" {digits(b)}", va="center", fontsize=8.5)
    left.axvline(1, color=INK, lw=1, ls="--")
    left.set_title("Time, torch.matmul alone = 1")
    left.set_xscale("log")
    left.set_xlim(min(0.5, *mine, *dense) * 0.8, 2 * max(2, *mine, *dense))
    left.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    left.minorticks_off()
    right.barh([i + 0.2 for i in y], [(r["peak"] or 0) / targets.MIB for r in argmax], 0.36, color=THEIRS)
    right.barh([i - 0.2 for i in y], [(r["peak"] or 0) / targets.MIB for r in rows], 0.36, color=OURS)
    for i, (a, b) in enumerate(zip(rows, argmax)):
        right.text((a["peak"] or 0) / targets.MIB, i - 0.2, f" {size(a['peak'])}", va="center", fontsize=8.5)
        right.text((b["peak"] or 0) / targets.MIB, i + 0.2, f" {size(b['peak'])}", va="center", fontsize=8.5)
    right.set_title("Peak extra memory, MiB")
    right.set_xlim(0, 1.35 * max(1, *((r["peak"] or 0) / targets.MIB for r in argmax)))
    for ax in (left, right):
        ax.set_yticks(y, labels if ax is left else [""] * len(rows))
        ax.invert_yaxis()
        ax.tick_params(length=0)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


PICTURES: dict[str, Callable] = {
    "loss": draw_loss,
    "growth": draw_growth,
    "ceiling": draw_ceiling,
    "votes": draw_votes,
}


def digest(path: Path) -> str:
    """Names the records a picture was drawn from."""
    return "records " + hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def draw(path: Path, folder: Path, suffix: str = "svg") -> list[Path]:
    """Draw all pictures of a result file into ``folder``."""
    import matplotlib.pyplot as plt

    records = load(path)
    drawn = []
    for what, picture in PICTURES.items():
        figure = picture(records, draw=True) if records else None
        if figure is None:
            continue
        target = folder / f"{path.stem}-{what}.{suffix}"
        about = {"Date": None, "Description": digest(path)} if suffix == "svg" else None
        figure.savefig(target, metadata=about, dpi=110)
        plt.close(figure)
        drawn.append(target)
    return drawn


# Writing and checking --------------------------------------------------------------------------------


def load(path: Path) -> list[dict]:
    """Records of a file, tiny ones left out: they measure nothing."""
    return [r for r in harness.load(path) if not r["env"]["tiny"]]


def load_all(folder: Path = harness.RESULTS) -> dict[Path, list[dict]]:
    return {path: load(path) for path in sorted(folder.glob("*.json"))}


def write(readme: Path = README, folder: Path = harness.RESULTS) -> None:
    """Write the tables and draw the pictures."""
    results = load_all(folder)
    for path in results:
        for picture in draw(path, folder):
            print(picture.name)
    if readme.exists():
        text = readme.read_text()
        readme.write_text(MARKED.sub(lambda m: _marked(m[1], m[2], results, folder), text))


def _marked(name: str, old: str, results: dict[Path, list[dict]], folder: Path) -> str:
    body = block(name, results, folder) + "\n" if name in {*BLOCKS, *EFFICACY} else old
    return f"<!-- report:{name} -->\n{body}<!-- /report -->"


def check(readme: Path = README, folder: Path = harness.RESULTS) -> list[str]:
    """What in the README and the pictures does not follow from the records; empty if all does."""
    problems = []
    results = load_all(folder)
    if readme.exists():
        text = readme.read_text()
        found = MARKED.findall(text)
        opened = re.findall(r"<!-- report:([\w-]+) -->", text)
        problems += [
            f"{readme.name}: the block {n} is not closed" for n in set(opened) - {n for n, _ in found}
        ]
        for name, body in found:
            if name not in {*BLOCKS, *EFFICACY}:
                known = ", ".join([*BLOCKS, *EFFICACY])
                problems.append(f"{readme.name}: there is no block {name}; there are {known}")
                continue
            follows = block(name, results, folder)
            if body != follows + "\n" and not (follows == NOTHING and not body):
                problems.append(f"{readme.name}: the block {name} differs from the records")
        if any(results.values()) and not any(n in BLOCKS for n, _ in found):
            problems.append(f"{readme.name}: shows none of the blocks {', '.join(BLOCKS)}")
    for path, records in results.items():
        for what, picture in PICTURES.items():
            file = folder / f"{path.stem}-{what}.svg"
            if records and picture(records) is not None and digest(path) not in harness._read(str(file)):
                problems.append(f"{file.name}: not drawn from {path.name} as it is")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; say what is out of date")
    arguments = parser.parse_args()
    if not arguments.check:
        write()
        return 0
    problems = check()
    print("\n".join(problems + (["run python benchmarks/report.py"] if problems else [])), file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
