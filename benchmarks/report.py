"""From records to figures: writes the tables in README.md and docs/.

A table goes between ``<!-- report:NAME -->`` and ``<!-- /report -->``, NAME in NAMES or EFFICACY, or TABLE_1.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import baselines
import records as files
import targets
from clock import SURE
from sources import ROOT
from targets import find

sys.path.append(str(ROOT))

from experiments import efficacy
from experiments.model import LOSSES
from experiments.study import tables

MARKED = re.compile(r"<!-- report:([\w-]+) -->\n(.*?)<!-- /report -->", re.S)
NOTHING = "*Not measured yet.*"
BUSY = 0.10  # of the machine taken by other processes: figures from there are marked


def seconds(x: float) -> str:
    """A time in the unit that suits it, three digits."""
    unit, size = next((u for u in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)) if x >= u[1]), ("ns", 1e-9))
    return f"{digits(x / size)} {unit}"


def digits(x: float, n: int = 3) -> str:
    """``n`` significant digits, without an exponent."""
    return f"{x:.{max(0, n - 1 - math.floor(math.log10(abs(x))))}f}" if x else "0"


def size(nbytes: float | None) -> str:
    if nbytes is None:
        return "-"
    return f"{digits(nbytes / targets.MIB, 2 if nbytes < targets.MIB else 3)} MiB"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


MARK = "†"
NOTE = f"{MARK} not the GPU's time alone: the call makes the host wait, or the host could not get ahead."


def mark(how: str) -> str:
    """What stands beside a time that is not the device's alone."""
    return "" if how in SURE else MARK


def timed(r: dict | None) -> str:
    """A record's time, marked where it is not the device's alone; "-" without a record."""
    return seconds(r["median"]) + mark(r["how"]) if r else "-"


def times(records: list[dict], r: dict | None, peer: str) -> str:
    """Our time over a peer's at a record's shape, marked as it was timed; "-" where they did not meet."""
    met = targets.meeting(records, r, peer) if r else None
    if met is None:
        return "-"
    (ratio, _, _), how = met
    return digits(ratio, 3 if ratio >= 0.1 else 2) + mark(how)


def one(records: list[dict], *where: str, **case) -> dict | None:
    """The first record that agrees (targets.find)."""
    return next(iter(find(records, *where, **case)), None)


def noted(text: str) -> str:
    """A block with what its mark means."""
    return f"{text}\n\n<sub>{NOTE}</sub>" if MARK in text else text


def failures(records: list[dict], *benches: str) -> str:
    """What could not be measured somewhere, and why."""
    failed = [r for r in records if r["bench"] in [files.FAILED + bench for bench in benches]]
    found = Counter((r["name"], r["facts"]["reason"]) for r in failed)
    words = "; ".join(f"{name}, {count} of the comparisons: {why}" for (name, why), count in found.items())
    return f"\n\nCould not be measured: {words}." if words else ""


def provenance(records: list[dict]) -> str:
    """Where figures come from, in a line; several where they come from runs of different code or machines."""
    found = []
    for env in {r["run"]: r["env"] for r in records}.values():
        gpu, threads = env["kind"] == "cuda", f"{env['threads']} thread{'s' * (env['threads'] > 1)}"
        parts = [f"{env['device']} ({env['arch']})", f"driver {env['driver']}" if gpu else threads]
        parts += [f"torch {env['torch']}", f"triton {env['triton']}" if gpu else "", env["compiler"]]
        parts += [f"commit {env['commit']}{' with changes' if env['dirty'] else ''}"]
        busy = f"The machine was busy: other programs took {100 * env.get('others', 0):.0f} % of it"
        found.append(", ".join(filter(None, parts)) + f". **{busy}**" * (env.get("others", 0) > BUSY))
    return "; ".join(dict.fromkeys(found))


def _shape(r: dict) -> str:
    method = f"{r['case']['method']}, " if "method" in r["case"] else ""
    return f"{method}{r['case']['N']} x {r['case']['C']}"


def _backend(name: str) -> str:
    return name.removeprefix("zipfls_cuda, ")


def clock_of(records: list[dict]) -> str:
    """The clock that counts on the records' device."""
    return "device" if records[0]["env"]["kind"] == "cuda" else "host"


PEERS = {  # what ours is compared with: the headings of the columns
    baselines.COPY: "copying the logits",
    baselines.CROSS_ENTROPY: "`F.cross_entropy`",
    baselines.COMPILED_CROSS_ENTROPY: "compiled `F.cross_entropy`",
    baselines.COMPILED_REFERENCE: "compiled plain PyTorch",
    baselines.REFERENCE: "plain PyTorch",
    baselines.PLAIN_LOSS: "`zipf_cross_entropy`",
    baselines.PUBLISHED: "published way (SciPy)",
    baselines.LIGER: "Liger-Kernel CE",
    baselines.LIGER_KL: "Liger-Kernel KL",
    baselines.LIGER_JSD: "Liger-Kernel JSD",
    baselines.QUACK: "QuACK CE",
    baselines.MATMUL: "`torch.matmul` alone",
    baselines.MATMUL_BATCHED: "`torch.matmul` alone, no copy",
    baselines.MATMUL_ARGMAX: "matmul + argmax",
    baselines.ARGMAX: "argmax alone",
    baselines.PRODUCTS: "the products alone, in the same chunks",
    baselines.LINEAR_THEN_LOSS: "`F.linear` + `zipf_cross_entropy`",
    baselines.LINEAR_THEN_CROSS_ENTROPY: "`F.linear` + `F.cross_entropy`",
    baselines.COMPILED_LINEAR: "the same compiled",
    baselines.LINEAR_CROSS_ENTROPY: "`F.linear_cross_entropy`",
    baselines.LIGER_LINEAR: "Liger-Kernel's",
    baselines.CUT: "cut-cross-entropy",
}


def each_backend(records: list[dict], bench: str, mode: str, write: Callable[..., str]) -> str:
    """The tables of all our backends, against the peers that they met, and what could not be measured."""
    texts = []
    for name in targets.names(records, bench):
        if rows := find(records, bench, name, mode, clock_of(records)):
            peers = [p for p in PEERS if any(targets.meeting(records, r, p) for r in rows)]
            texts.append(noted(write(records, rows, peers)))
    return "\n\n".join(texts) + failures(records, bench) if texts else ""


def loss_table(records: list[dict], rows: list[dict], peers: list[str]) -> str:
    """The loss, or distillation, on one backend."""
    clock, backend = clock_of(records), _backend(rows[0]["name"])
    copies = {r["run"]: targets.ceiling(records, "copy", run=r["run"]) for r in rows}
    head = ["logits", "dtype", "time", "GB/s", *["of the copy"] * (clock == "device")]
    body = []
    for r in rows:
        rate, copy = r["bytes"] / r["median"], copies[r["run"]]
        share = [f"{100 * rate / copy:.0f} %" if copy else "-"] * (clock == "device")
        cells = [_shape(r), r["case"]["dtype"], timed(r), f"{rate / 1e9:.3g}", *share]
        body.append(cells + [times(records, r, p) for p in peers])
    reached = " and ".join(f"{copy / 1e9:.3g}" for copy in dict.fromkeys(copies.values()) if copy)
    what, votes = "`distillation_loss`", "T = 4"
    if rows[0]["bench"] == "loss":
        what, votes = "`zipf_cross_entropy`", f"P = {rows[0]['case']['P']} votes a sample"
    return (
        f"{what} ({backend} backend), value and gradient, {votes}: "
        f"its time, and **its time over that of** each other (below 1: ours is faster)."
        + (f" A copy of large tensors reached {reached} GB/s in the same run." if reached else "")
        + f"\n\n{table(head + [PEERS[p] for p in peers], body)}"
    )


def linear_table(records: list[dict], rows: list[dict], peers: list[str]) -> str:
    """Linear layer and loss on one backend: time over its peers', and peak memory beside theirs."""
    body, backend = [], _backend(rows[0]["name"])
    for r in rows:
        c, theirs = r["case"], {p: one(records, "linear", p, **r["case"]) for p in peers}
        gradients = c["D"] * (c["N"] * r["bytes"] // (c["N"] * c["C"]) + c["C"] * 4)
        memory = [size(r["peak"]), size(gradients), size(r["bytes"])]
        cells = [f"{times(records, r, p)} ({size(x['peak'])})" if (x := theirs[p]) else "-" for p in peers]
        body.append([f"{c['N']} x {c['D']} x {c['C']}", c["dtype"], timed(r), *memory, *cells])
    head = ["N x D x C", "dtype", "time", "extra memory", "of it gradients", "the logits"]
    return (
        f"`linear_zipf_cross_entropy` ({backend} backend), value and gradients: its time and peak "
        "extra memory, the gradients in it; **its time over that of** each other (and their peak memory)."
        f"\n\n{table(head + [PEERS[p] for p in peers], body)}"
    )


def vote_table(records: list[dict], rows: list[dict], peers: list[str]) -> str:
    """Dense votes on one backend."""
    body, backend = [], _backend(rows[0]["name"])
    for r in rows:
        c = r["case"]
        dense = one(records, "vote", baselines.MATMUL_ARGMAX, **c)
        ceiling = targets.ceiling(records, "product", c["dtype"], r["run"])
        rate = r["flops"] / r["median"]
        what = c["what"] + (", upsampled" if c["upsample"] == 2 else "")
        row = [what, f"{c['N']}x{c['H'] * c['W']}, {c['D']}, {c['C']}", c["dtype"], c["layout"], timed(r)]
        row += [f"{rate / 1e9:.3g}" + (f" ({100 * rate / ceiling:.0f} %)" if ceiling else "")]
        row += [times(records, r, p) for p in peers]
        body.append([*row, f"{size(r['peak'])} ({size(dense['peak']) if dense else '-'})"])
    head = ["votes", "NxP, D, C", "dtype", "layout", "time", "GFLOP/s (of a large product)"]
    head += [*(PEERS[p] for p in peers), "extra memory (matmul + argmax's)"]
    return (
        f"`dense_vote` ({backend} backend): its time, **its time over that of** each other; its peak "
        f"extra memory.\n\n{table(head, body)}"
    )


def host_block(records: list[dict]) -> str:
    """Host time of each of our backends beside F.cross_entropy's."""
    ours = targets.names(records, "loss")
    on_gpu = records[0]["env"]["kind"] == "cuda"
    modes = {"both": "forward + backward", "forward": "forward", "infer": "forward, no gradient wanted"}
    body = []
    for mode, words in modes.items():
        sweep = {} if on_gpu else {"sweep": "host"}
        for other in find(records, "loss", baselines.CROSS_ENTROPY, mode, "host", **sweep):
            mine = [one(records, "loss", name, mode, "host", **other["case"]) for name in ours]
            ratios = [times(records, r, baselines.CROSS_ENTROPY) for r in mine]
            body.append([words, _shape(other), *map(timed, mine), timed(other), *ratios])
    if not body:
        return ""
    several = len(ours) > 1
    head = ["call", "logits", *([_backend(n) for n in ours] if several else ["ours"]), "`F.cross_entropy`"]
    head += [f"{_backend(n)}, ratio" for n in ours] if several else ["ratio"]
    what = "what it takes to issue it." if on_gpu else "where there is next to nothing to compute."
    return f"Host time of a call{': ' if on_gpu else ', '}{what}\n\n{table(head, body)}"


PLAIN = {"step": baselines.CROSS_ENTROPY, "head": baselines.LINEAR_THEN_CROSS_ENTROPY}  # what others add to
STEP = "A whole training step (forward, loss, backward, SGD): {what}, {N} images of {size}x{size}"
HEAD = "The head alone: pooling, classifier, loss, gradients of map and weight: {N} maps of {H}x{H}, D = {D}"


def step_block(records: list[dict]) -> str:
    """Training steps and heads, a table for each case."""
    cases, texts = {(b, str(r["case"])): r["case"] for b in PLAIN for r in records if r["bench"] == b}, []
    for (bench, _), case in cases.items():
        plain, body = PLAIN[bench], []
        for r in find(records, bench, **case):
            ratio = r["ratio"].get(plain)
            more = "0" if r["name"] == plain else "-" if ratio is None else f"{100 * (ratio[0] - 1):+.2f} %"
            body.append([r["name"], timed(r), more, size(r["peak"])])
        head = ["loss", "time", f"against `{plain}`", "peak memory"]
        words = (STEP if bench == "step" else HEAD).format(**case)
        texts.append(f"{words}, C = {case['C']}, {case['dtype']}.\n\n{table(head, body)}")
    return noted("\n\n".join(texts)) + failures(records, *PLAIN) if texts else ""


def speed_block(records: list[dict]) -> str:
    """Four rows for the README: the loss at two sizes, a training step, the head alone; our best backend."""
    if not (backends := targets.names(records, "loss")):
        return ""
    ours, body, clock = backends[0], [], clock_of(records)
    dtype = "bfloat16" if clock == "device" else "float32"
    rows = find(records, "loss", ours, "both", clock, dtype=dtype)
    rows = sorted((r for r in rows if len(r["ratio"]) > 3), key=lambda r: r["case"]["C"])
    for r in rows[(len(rows) - 1) // 2 :][:2]:
        other = one(records, "loss", baselines.CROSS_ENTROPY, "both", clock, **r["case"])
        ratios = [times(records, r, p) for p in (baselines.CROSS_ENTROPY, baselines.COMPILED_CROSS_ENTROPY)]
        body.append([f"loss and gradient, {_shape(r)}", timed(r), timed(other), *ratios])
    others = {"step": "a training step of a small ResNet", "head": "pooling, classifier and loss"}
    for bench, what in others.items():
        r, other = one(records, bench, ours), one(records, bench, PLAIN[bench])
        if r and other:
            ratio = times(records, r, PLAIN[bench])
            body.append([f"{what}, C = {r['case']['C']}", timed(r), timed(other), ratio, "-"])
    head = ["", f"ours ({_backend(ours)})", "with `F.cross_entropy`", "ours / it"]
    head += ["ours / compiled `F.cross_entropy`"]
    return table(head, body) if body else ""


def target_table(verdicts: list[targets.Verdict]) -> str:
    """A row a target; the backends judged side by side."""
    met = {True: "yes", False: "no", None: "-"}
    names = list(dict.fromkeys(v.backend for v in verdicts if v.backend)) or [""]
    rows: dict[tuple[str, str], dict[str, targets.Verdict]] = {}
    for v in verdicts:
        rows.setdefault((f"{v.group}: {v.text}", v.target), {})[v.backend or names[0]] = v
    heads = [_backend(name) for name in names] if len(names) > 1 else ["measured"]
    body = []
    for row, found in rows.items():
        pairs = [(found[n].measured, met[found[n].met]) if n in found else ("", "") for n in names]
        body.append([*row, *(cell for pair in pairs for cell in pair)])
    return table(["", "target", *(cell for name in heads for cell in (name, "met"))], body)


def target_block(records: list[dict]) -> str:
    """The groups of targets of which the device has a figure."""
    verdicts = targets.judge(records, records[0]["env"]["kind"])
    groups = {v.group for v in verdicts if v.measured != targets.GAP}
    return target_table([v for v in verdicts if v.group in groups]) if groups else ""


def efficacy_block(preset: str, folder: Path) -> str:
    """The accuracies of a plan, from its records."""
    path = folder / "efficacy" / f"{preset}.json"
    records = efficacy.balanced(efficacy.PLANS[preset], files.load(path) if path.exists() else [])
    if not records:
        return NOTHING
    head, rows, remarks, source = efficacy.summary(efficacy.PLANS[preset], records)
    where = "; ".join(dict.fromkeys(provenance([r]) for r in records))
    return f"{efficacy.INTRODUCTION}\n\n{table(head, rows)}\n\n{remarks}\n\n<sub>{source} {where}.</sub>"


def study_block(preset: str, folder: Path) -> str:
    """What a study has found, from its records."""
    path = folder / "efficacy" / f"{preset}.json"
    records = files.load(path) if path.exists() else []
    study = efficacy.STUDIES[preset]
    lines = tables(study, records)
    if not lines:
        return NOTHING
    where = "; ".join(dict.fromkeys(provenance([r]) for r in records))
    minutes = sum(r["seconds"] for r in records) / 60
    source = (
        f"Options of experiments.run: `{study.options}`. {len(records)} runs, {minutes:.0f} min of training."
    )
    return "\n".join([*lines, "", f"<sub>{source} {where}.</sub>"])


EFFICACY = {f"efficacy-{preset}": preset for preset in efficacy.PLANS | efficacy.STUDIES}  # block -> its plan
KINDS = {"cpu": "cpu", "gpu": "cuda"}
TABLE_1 = "methods"  # name of the block of all methods, on a CPU and on a GPU


def methods_block(results: dict[Path, list[dict]]) -> str:
    """A step with every method against plain cross-entropy; columns of a GPU stay empty without one."""
    found: dict[str, dict[str, dict]] = {kind: {} for kind in KINDS.values()}
    for r in (r for records in results.values() for r in records if r["bench"] == "methods"):
        found[r["env"]["kind"]].setdefault(r["name"], r)
    records = [r for rows in found.values() for r in rows.values()]
    body, plain = [], LOSSES["ce"]
    for name in dict.fromkeys(r["name"] for r in records):
        cells, kept = [name], max(r["facts"]["kept"] for r in records if r["name"] == name)
        for rows in found.values():
            r = rows.get(name)
            ratio = r and (1.0 if name == plain else r["ratio"].get(plain, [0.0])[0])
            rate = r and digits(r["case"]["N"] / r["median"])
            cells += [timed(r), digits(ratio), rate, size(r["peak"])] if r else [""] * 4
        body.append([*cells, size(kept) if kept else "nothing"])
    if not body:
        return NOTHING
    head = [f"{label} {what}" for label in ("CPU", "GPU") for what in ("step", "of CE's", "images/s", "peak")]
    case = next(iter(records))["case"]
    words = (
        f"A training step with each method of `experiments.run`, ResNet-{case['depth']} on {case['size']}x"
        f"{case['size']} images, C = {case['C']}: its time, its time over plain cross-entropy's, images a "
        "second, peak memory beyond what was held before, and what the method keeps beside the network it "
        f"trains, for {case['M']} training images."
    )
    text = noted(f"{words}\n\n{table(['method', *head, 'kept'], body)}")
    return f"{text}\n\n<sub>{provenance(records)}.</sub>"


BLOCKS: dict[str, Callable[[list[dict]], str]] = {
    "speed": speed_block,
    "loss": functools.partial(each_backend, bench="loss", mode="both", write=loss_table),
    "distill": functools.partial(each_backend, bench="distill", mode="both", write=loss_table),
    "linear": functools.partial(each_backend, bench="linear", mode="both", write=linear_table),
    "vote": functools.partial(each_backend, bench="vote", mode="forward", write=vote_table),
    "host": host_block,
    "step": step_block,
    "targets": target_block,
}
NAMES = [f"{label}-{name}" for label in KINDS for name in BLOCKS]


def block(name: str, results: dict[Path, list[dict]], folder: Path = files.RESULTS) -> str:
    """The Markdown of a block from all result files of its kind."""
    if name in EFFICACY:
        preset = EFFICACY[name]
        return (study_block if preset in efficacy.STUDIES else efficacy_block)(preset, folder)
    if name == TABLE_1:
        return methods_block(results)
    label, what = name.split("-")
    needed, parts = (what,) if what in ("vote", "step", "distill", "linear") else ("loss",), []
    needed = targets.BENCHES if what == "targets" else needed
    for records in results.values():
        source = [r for r in records if r["bench"] in needed and r["env"]["kind"] == KINDS[label]]
        if source and (text := BLOCKS[what](records)):
            parts.append(f"{text}\n\n<sub>{provenance(source)}.</sub>")
    return "\n\n".join(parts) or NOTHING


def load_all(folder: Path = files.RESULTS) -> dict[Path, list[dict]]:
    """The records of each file, tiny ones left out: they measure nothing."""
    found = {path: files.load(path) for path in sorted(folder.glob("*.json"))}
    return {path: [r for r in records if not r["env"]["tiny"]] for path, records in found.items()}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def renewed(text: str, folder: Path = files.RESULTS) -> str:
    """A page with its blocks as the records have them; an empty block without measurements stays empty.

    Raises:
        ValueError: a block of an unknown name, or one that is not closed.
    """
    if text.count("<!-- report:") != text.count("<!-- /report -->"):
        raise ValueError("a block is not closed")
    results = load_all(folder)

    def renew(found: re.Match) -> str:
        name, old = found.groups()
        if name not in (names := (*NAMES, *EFFICACY, TABLE_1)):
            raise ValueError(f"there is no block {name}; there are {', '.join(names)}")
        body = block(name, results, folder)
        if not old and body == NOTHING:
            return found[0]
        return f"<!-- report:{name} -->\n{body}\n<!-- /report -->"

    return MARKED.sub(renew, text)


if __name__ == "__main__":
    for page in pages():
        page.write_text(renewed(page.read_text()))
