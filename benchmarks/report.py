"""From records to figures: the README's tables, and the pictures beside the records.

    python benchmarks/report.py            write tables into README.md, draw the pictures
    python benchmarks/report.py --check    say what in them does not follow from the records (exit status 1)
    python benchmarks/report.py --choice [RECORDS]   say which backend was faster on a GPU, by regime

A table goes between ``<!-- report:NAME -->`` and ``<!-- /report -->`` in README.md; the names are BLOCKS and
EFFICACY. Every figure comes from a record in benchmarks/results; where there is none, the block says that
nothing was measured, or stays empty if it is.
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


MARKS = {"events": "†", "host-bound": "‡"}
NOTES = {
    "†": "by CUDA events from an idle GPU, as the call makes the host wait: not the GPU's time alone",
    "‡": "the host could not be brought ahead of the GPU: not the GPU's time alone",
}


def timed(r: dict) -> str:
    """A record's time, marked where it is not the device's alone."""
    return seconds(r["median"]) + MARKS.get(r["how"], "")


def times(records: list[dict], r: dict, peer: str) -> str:
    """Our time over a peer's at a record's shape, marked as it was timed; "-" where the two did not meet."""
    met = targets.meeting(records, r, peer)
    if met is None:
        return "-"
    (ratio, _, _), how = met
    return digits(ratio, 3 if ratio >= 0.1 else 2) + MARKS.get(how, "")


def noted(text: str) -> str:
    """A block with what its marks mean."""
    notes = [f"{mark} {words}." for mark, words in NOTES.items() if mark in text]
    return "\n\n".join([text, *([f"<sub>{' '.join(notes)}</sub>"] if notes else [])])


def missing(records: list[dict], among: Iterable[str]) -> str:
    """Which peers a table has no column or row of, and why; empty if it has all."""
    found = {
        r["name"]: r["facts"]["reason"] for r in records if r["bench"] == "absent" and r["name"] in among
    }
    words = "; ".join(f"{name} ({reason})" for name, reason in found.items())
    return f"\n\nNot compared with: {words}." if words else ""


def failures(records: list[dict], *benches: str) -> str:
    """Which contestants could not be measured somewhere, and why."""
    found: dict[tuple[str, str], int] = {}
    for r in records:
        if r["bench"] in [harness.FAILED + bench for bench in benches]:
            key = r["name"], r["facts"]["reason"]
            found[key] = found.get(key, 0) + 1
    words = "; ".join(f"{name}, {count} of the races: {why}" for (name, why), count in found.items())
    return f"\n\nCould not be measured: {words}." if words else ""


def provenance(records: list[dict]) -> str:
    """Where figures come from, in a line; several where they come from runs of different code or machines."""
    lines = [_provenance(env) for env in {r["run"]: r["env"] for r in records}.values()]
    return "; ".join(dict.fromkeys(lines))


def _provenance(env: dict) -> str:
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
    baselines.QUACK: "QuACK CE, autograd",
    baselines.QUACK_IN_FORWARD: "QuACK CE",
}


def _clock(records: list[dict]) -> str:
    return "device" if records[0]["env"]["kind"] == "cuda" else "host"


def loss_block(records: list[dict], picture: Callable[[str], str]) -> str:
    texts = [_loss_tables(records, name) for name in targets.names(records, "loss")]
    text = "\n\n".join(t for t in texts if t)
    if not text:
        return ""
    text += missing(records, LOSS_PEERS) + failures(records, "loss")
    return text + picture("loss") + picture("growth")


def _loss_tables(records: list[dict], name: str) -> str:
    """The loss on one backend: against its peers, and forward and backward apart."""
    clock = _clock(records)
    rows = find(records, "loss", name, "both", clock)
    if not rows:
        return ""
    peers = [p for p in LOSS_PEERS if any(targets.meeting(records, r, p) for r in rows)]
    copies = dict.fromkeys(targets.ceiling(records, "copy", run=r["run"]) for r in rows)
    of_copy = ["of the copy"] if clock == "device" else []
    head = ["logits", "dtype", "time", "GB/s", *of_copy, *(LOSS_PEERS[p] for p in peers)]
    body = []
    for r in rows:
        rate = r["bytes"] / r["median"]
        copy = targets.ceiling(records, "copy", run=r["run"])
        share = [f"{100 * rate / copy:.0f} %" if copy else "-"] if of_copy else []
        body.append(
            [_shape(r), r["case"]["dtype"], timed(r), f"{rate / 1e9:.3g}", *share]
            + [times(records, r, p) for p in peers]
        )
    reached = " and ".join(f"{copy / 1e9:.3g}" for copy in copies if copy)
    text = (
        f"`zipf_cross_entropy` ({_backend(name)} backend), value and gradient, P = {rows[0]['case']['P']} "
        f"votes a sample: its time, and **its time over that of** each other (below 1: ours is faster)."
        + (f" A copy of large tensors reached {reached} GB/s in the same run." if reached else "")
        + f"\n\n{table(head, body)}"
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
            pairs += [timed(x[0]) if x else "-" for x in (mine, theirs)]
        if any(p != "-" for p in pairs):
            modes.append([_shape(r), *pairs])
    if modes:
        head = ["logits"]
        for mode in ("forward", "backward", "no gradient wanted"):
            head += [f"{mode}: ours", "`F.cross_entropy`"]
        text += "\n\nThe gradient is computed in forward; backward only hands it over.\n\n" + table(
            head, modes
        )
    return noted(text)


VOTE_PEERS = {
    baselines.MATMUL: "`torch.matmul` alone",
    baselines.MATMUL_BATCHED: "`torch.matmul` alone, no copy",
    baselines.MATMUL_ARGMAX: "matmul + argmax",
    baselines.ARGMAX: "argmax alone",
}


def vote_block(records: list[dict], picture: Callable[[str], str]) -> str:
    texts = [_vote_table(records, name) for name in targets.names(records, "vote")]
    text = "\n\n".join(t for t in texts if t)
    return text + failures(records, "vote") + picture("votes") if text else ""


def _vote_table(records: list[dict], name: str) -> str:
    """Dense votes on one backend."""
    rows = find(records, "vote", name)
    peers = [p for p in VOTE_PEERS if any(p in r["ratio"] for r in rows)]
    body = []
    for r in rows:
        c = r["case"]
        dense = find(records, "vote", baselines.MATMUL_ARGMAX, **c)
        ceiling = targets.ceiling(records, "product", c["dtype"], r["run"])
        rate = r["flops"] / r["median"]
        body.append(
            [
                f"{c['what']}{', upsampled' if c['upsample'] == 2 else ''}",
                f"{c['N']}x{c['H'] * c['W']}, {c['D']}, {c['C']}",
                c["dtype"],
                c["layout"],
                timed(r),
                f"{rate / 1e9:.3g} ({100 * rate / ceiling:.0f} %)" if ceiling else f"{rate / 1e9:.3g}",
                *(times(records, r, p) for p in peers),
                f"{size(r['peak'])} ({size(dense[0]['peak']) if dense else '-'})",
            ]
        )
    if not body:
        return ""
    head = ["votes", "NxP, D, C", "dtype", "layout", "time", "GFLOP/s (of a large product)"]
    head += [*(VOTE_PEERS[p] for p in peers), "extra memory (matmul + argmax's)"]
    parts = "the matrix product alone and of product and argmax"
    if baselines.MATMUL_BATCHED in peers:
        parts = (
            "the matrix product alone (of NCHW: with a transposing copy, and sample by sample without one), "
            "of product and argmax, and of the argmax alone"
        )
    return noted(
        f"`dense_vote` ({_backend(name)} backend): its time, **its time over that of** {parts}; its peak "
        f"extra memory.\n\n{table(head, body)}"
    )


def host_block(records: list[dict], picture: Callable[[str], str]) -> str:
    """Host time of each of our backends beside F.cross_entropy's."""
    ours = targets.names(records, "loss")
    cases = {"sweep": "host"} if records[0]["env"]["kind"] == "cpu" else {}
    body = []
    for mode, words in (
        ("both", "forward + backward"),
        ("forward", "forward"),
        ("infer", "forward, no gradient wanted"),
    ):
        for other in find(records, "loss", baselines.CROSS_ENTROPY, mode, "host", **cases):
            cells, ratios = [], []
            for name in ours:
                mine = find(records, "loss", name, mode, "host", **other["case"])
                cells.append(seconds(mine[0]["median"]) if mine else "-")
                ratios.append(times(records, mine[0], baselines.CROSS_ENTROPY) if mine else "-")
            body.append([words, _shape(other), *cells, seconds(other["median"]), *ratios])
    if not body:
        return ""
    several = len(ours) > 1
    head = ["call", "logits", *([_backend(n) for n in ours] if several else ["ours"]), "`F.cross_entropy`"]
    head += [f"{_backend(n)}, ratio" for n in ours] if several else ["ratio"]
    what = (
        "Host time of a call, where there is next to nothing to compute."
        if cases
        else "Host time of a call: what it takes to issue it."
    )
    return f"{what}\n\n{table(head, body)}"


HEAD_PEERS = (baselines.LINEAR_CROSS_ENTROPY, baselines.CUT)


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
                body.append([r["name"], timed(r), more, size(r["peak"])])
            head = ["loss", "time", f"against `{plain_name}`", "peak memory"]
            text.append(words.format(_describe(bench, case)) + "\n\n" + table(head, body))
    return noted("\n\n".join(text)) + missing(records, HEAD_PEERS) + failures(records, "step", "head")


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
    text = target_table(targets.judge(records, kind))
    choice = choice_table(records)
    if choice:
        text += f"\n\nOur two backends for GPUs, where both ran in one race:\n\n{choice}"
    return text + picture("ceiling")


def target_table(verdicts: list[targets.Verdict]) -> str:
    """A row a target; the backends judged side by side."""
    met = {True: "yes", False: "no", None: "-"}
    names = [name for name in dict.fromkeys(v.backend for v in verdicts) if name] or [""]
    rows: dict[tuple[str, str], dict[str, targets.Verdict]] = {}
    for v in verdicts:
        rows.setdefault((f"{v.group}: {v.text}", v.target), {})[v.backend or names[0]] = v
    head = ["", "target"]
    for name in names:
        head += [_backend(name) if len(names) > 1 else "measured", "met"]
    body = []
    for row, found in rows.items():
        cells = [[found[n].measured, met[found[n].met]] if n in found else ["", ""] for n in names]
        body.append([*row, *(cell for pair in cells for cell in pair)])
    return table(head, body)


def choice_table(records: list[dict]) -> str:
    """Which of our two backends for GPUs was faster, by regime; empty where they did not meet."""
    rows = []
    for c in targets.choice(records):
        low, high = min(c.ratios), max(c.ratios)
        spread = f"{digits(c.middle)} ({digits(low)} to {digits(high)}, {len(c.ratios)} races)"
        rows.append([c.regime, c.clock, spread, c.faster + (f" ({c.doubt})" if c.doubt else "")])
    return table(["regime", "time", "cuda's over triton's", "faster"], rows) if rows else ""


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

    head, rows = ["training loss"], {method: [method] for method in plan.methods}
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

        text = write(records, picture)
        if text:
            parts.append(f"{text}\n\n<sub>{provenance(source)}.</sub>")
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
    """Bars: how many times faster the loss is than each peer, shape by shape, on each of our backends."""
    names = targets.names(records, "loss")
    clock = _clock(records)
    dtype = "bfloat16" if clock == "device" else "float32"
    first = find(records, "loss", names[0], "both", clock, dtype=dtype) if names else []
    rows = [r for r in first if len(r["ratio"]) > 3]
    rows = [rows[i * len(rows) // 6] for i in range(6)] if len(rows) > 6 else rows
    if not rows:
        return None
    if not draw:
        return True
    columns = min(3, len(rows)) if len(rows) != 4 else 2
    lines = -(-len(rows) // columns)
    figure, axes = _figure(columns, 4.9, 2.9 + 0.9 * (len(names) - 1), lines)
    axes = [axes] if len(rows) == 1 else axes.flatten()
    for ax in axes[len(rows) :]:
        ax.axis("off")
    for ax, r in zip(axes, rows):
        met = [
            {p: targets.meeting(records, mine, p) for p in LOSS_PEERS}
            for name in names
            for mine in find(records, "loss", name, "both", clock, **r["case"])
        ]
        peers = [p for p in LOSS_PEERS if p != baselines.COPY and any(found[p] for found in met)]
        height, reaches = 0.62 / len(met), [2.0]
        for k, found in enumerate(met):
            bars = [(i, found[p][0]) for i, p in enumerate(peers) if found[p]]
            y = [i + height * (k - (len(met) - 1) / 2) for i, _ in bars]
            speed = [1 / x[0] for _, x in bars]
            error = [[1 / x[0] - 1 / x[2] for _, x in bars], [1 / x[1] - 1 / x[0] for _, x in bars]]
            plain = ["cross_entropy" in peers[i] or "CE" in LOSS_PEERS[peers[i]] for i, _ in bars]
            ax.barh(
                y,
                speed,
                height,
                color=[COLOURS[1] if p else THEIRS for p in plain],
                alpha=1 - 0.4 * k,
                xerr=error,
                error_kw={"ecolor": INK, "elinewidth": 0.8},
            )
            for at, s, high in zip(y, speed, error[1]):
                reaches += [s + max(0.0, high), s]
                ax.text((s + max(0.0, high)) * 1.08, at, f"{digits(s, 2)}x", va="center", fontweight="bold")
        ax.set_yticks(range(len(peers)), [LOSS_PEERS[p].replace("`", "") for p in peers])
        ax.invert_yaxis()
        ax.set_xscale("log")
        ax.set_xlim(min(0.3, *reaches) * 0.8, max(reaches) * 3)
        ax.axvline(1, color=OURS, lw=1.4, zorder=0)
        ax.tick_params(length=0)
        ax.minorticks_off()
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
        ax.set_title(f"{_shape(r)}: {seconds(r['median'])}")
    shades = f"; dark {_backend(names[0])}, light {_backend(names[1])}" if len(names) > 1 else ""
    figure.suptitle(
        f"Loss and gradient: how many times faster than each peer (plain cross-entropy in blue{shades})",
        fontsize=11,
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
    names, clock = targets.names(records, "loss"), _clock(records)
    rows = find(records, "loss", mode="both", clock=clock, sweep="C")
    rows = sorted((r for r in rows if r["name"] in names), key=lambda r: r["case"]["C"])
    held = [r for r in find(records, "loss", mode="both", clock=clock) if r["peak"] is not None]
    copy = targets.ceiling(records, "copy", run=rows[0]["run"]) if rows else 0.0
    if not rows or not copy or not held:
        return None
    if not draw:
        return True
    figure, (left, right) = _figure(2, 5.2, 3.5)
    for colour, n in zip(COLOURS, [*names, baselines.CROSS_ENTROPY]):
        mine = sorted(find(records, "loss", n, "both", clock, sweep="C"), key=lambda r: r["case"]["C"])
        x = [r["case"]["C"] for r in mine]
        rate = [r["bytes"] / r["median"] / 1e9 for r in mine]
        left.plot(x, rate, "o-", color=colour, ms=4, lw=1.8, label=n)
    left.axhline(copy / 1e9, color=INK, lw=1, ls="--", label=f"copy of large tensors, {copy / 1e9:.3g} GB/s")
    left.set_xscale("log")
    left.set_xlabel("classes C")
    left.set_ylabel("GB/s")
    left.set_ylim(0, 1.45 * max(copy / 1e9, *left.get_ylim()))
    left.set_title("Logits read + gradient written, by the clock")
    left.legend(fontsize=8.5, loc="upper left")
    left.grid(True, color=SOFT, lw=0.6)
    case = max(held, key=lambda r: r["bytes"])["case"]
    shown = {**{name: name for name in names}, **LOSS_PEERS}
    shown.pop(baselines.COPY)
    chosen = [r for r in held if r["case"] == case and r["name"] in shown]
    chosen = sorted(chosen, key=lambda r: r["peak"], reverse=True)
    logits = chosen[0]["bytes"] / 2
    y = range(len(chosen))
    ours = [COLOURS[names.index(r["name"])] if r["name"] in names else THEIRS for r in chosen]
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
    """Bars: time of dense votes, the matrix product alone as the unit, and their memory; ours by backend."""
    names = targets.names(records, "vote")
    first = find(records, "vote", names[0]) if names else []
    rows = [r for r in first if baselines.MATMUL in r["ratio"] and baselines.MATMUL_ARGMAX in r["ratio"]]
    if not rows:
        return None
    if not draw:
        return True
    figure, (left, right) = _figure(2, 5.6, (0.27 + 0.15 * len(names)) * len(rows) + 1.1)
    labels = []
    for r in rows:
        c = r["case"]
        extra = [x for x in (c["dtype"], c["layout"] if c["layout"] != "channels_last" else "") if x]
        labels.append(f"{c['what']}{' x2' if c['upsample'] == 2 else ''}, {', '.join(extra)}")
    height, pitch = 0.72 / (1 + len(names)), 0.8 / (1 + len(names))
    ends = [0.5, 2.0]
    most = 1.0
    for k, name in enumerate([*names, baselines.MATMUL_ARGMAX]):
        colour = COLOURS[k] if name in names else THEIRS
        for i, r in enumerate(rows):
            at, label = i + pitch * (k - len(names) / 2), name if i == 0 else None
            mine = find(records, "vote", name, **r["case"])
            if name in names:
                time = mine[0]["ratio"].get(baselines.MATMUL, [0.0])[0] if mine else 0.0
            else:
                time = r["ratio"][baselines.MATMUL][0] / r["ratio"][name][0]
            left.barh(at, time, height, color=colour, label=label)
            if not mine or not time:
                continue
            ends.append(time)
            left.text(time, at, f" {digits(time)}", va="center", fontsize=8.5)
            peak = (mine[0]["peak"] or 0) / targets.MIB
            most = max(most, peak)
            right.barh(at, peak, height, color=colour)
            right.text(peak, at, f" {size(mine[0]['peak'])}", va="center", fontsize=8.5)
    left.axvline(1, color=INK, lw=1, ls="--")
    left.set_title("Time, torch.matmul alone = 1")
    left.set_xscale("log")
    left.set_xlim(min(ends) * 0.8, 2 * max(ends))
    left.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    left.minorticks_off()
    right.set_title("Peak extra memory, MiB")
    right.set_xlim(0, 1.35 * most)
    for ax in (left, right):
        ax.set_yticks(range(len(rows)), labels if ax is left else [""] * len(rows))
        ax.invert_yaxis()
        ax.tick_params(length=0)
    figure.legend(loc="outside lower center", ncols=len(names) + 1)
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
    body = block(name, results, folder) if name in {*BLOCKS, *EFFICACY} else None
    if body is not None and (old or body != NOTHING):
        old = body + "\n"
    return f"<!-- report:{name} -->\n{old}<!-- /report -->"


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
    parser.add_argument(
        "--choice",
        nargs="*",
        type=Path,
        metavar="RECORDS",
        help="say which backend for GPUs was faster, by regime (default: in all records)",
    )
    arguments = parser.parse_args()
    if arguments.choice is not None:
        for path in arguments.choice or load_all():
            text = choice_table(load(path))
            print(f"{path.name}\n\n{text}\n" if text else f"{path.name}: cuda and triton did not meet")
        return 0
    if not arguments.check:
        write()
        return 0
    problems = check()
    print("\n".join(problems + (["run python benchmarks/report.py"] if problems else [])), file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
