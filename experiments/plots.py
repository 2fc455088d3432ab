"""The pictures: accuracy and cross-entropy by epoch, and the spectrum of each network's probabilities."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from .common import atomic_file
from .methods import METHODS
from .model import LOSSES
from .study import Sample, Study, difference
from .trainer import Run, by_loss

OKABE_ITO = "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#56B4E9", "#D55E00", "#000000"  # safe for all eyes
TITLES = LOSSES | {name: title for name, (title, _) in METHODS.items()}
COLOURS = {name: OKABE_ITO[(2, 0, 1, 3, 4, 5, 6)[i % 7]] for i, name in enumerate(TITLES)}
MARKERS = {name: "os^vD<>p"[i % 8] for i, name in enumerate(TITLES)}


def new_figure(columns: int, width: float):
    """A figure with its axes, `width` inches wide, that needs no display."""
    figure = Figure(figsize=(width, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a picture whole or not at all."""
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix[1:])


def plain_ticks(axis, form: str) -> None:
    """Label 1, 2, 5, 10, ... of a logarithmic axis as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter(form))
    axis.set_minor_formatter(NullFormatter())


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Accuracy and cross-entropy of every epoch; several seeds as their mean and range."""
    figure, axes = new_figure(2, 10)
    columns = ("accuracy", "accuracy (%)", 100), ("cross_entropy", "cross-entropy", 1)
    for axis, (name, title, scale) in zip(axes, columns, strict=True):
        for loss, group in by_loss(runs).items():
            epochs = [record["epoch"] for record in group[0].history]
            look = {"color": COLOURS[loss], "lw": 1.8, "marker": None if epochs[1:] else "."}
            train, test = (
                scale * np.array([[record[f"{part}_{name}"] for record in run.history] for run in group])
                for part in ("train", "test")
            )
            axis.plot(epochs, train.mean(0), ":", **look)
            axis.plot(epochs, test.mean(0), "-", label=TITLES[loss], **look)
            if len(group) > 1:
                axis.fill_between(epochs, test.min(0), test.max(0), color=COLOURS[loss], alpha=0.2, lw=0)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(title, loc="left")
        axis.margins(x=0.02)
    axes[1].set_yscale("log")
    plain_ticks(axes[1].yaxis, "{x:g}")
    axes[0].plot([], [], "-", color="0.4", label="test")
    axes[0].plot([], [], ":", color="0.4", label="training (augmented)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    save(figure, path)


def draw_spectra(runs: Sequence[Run], path: Path) -> None:
    """The paper's Fig. 2: mean sorted softmax probability against rank, and the fitted law."""
    figure, (axis,) = new_figure(1, 6.4)
    for loss, group in by_loss(runs).items():
        spectrum = np.mean([run.spectrum for run in group], axis=0)
        alpha = np.mean([run.alpha for run in group])
        intercept = np.mean([run.intercept for run in group])
        rank = np.arange(1, len(spectrum) + 1)
        label = rf"{TITLES[loss]}, $\alpha$ = {alpha:.2f}"
        size = 6 if len(rank) <= 20 else 3.5
        axis.loglog(rank, spectrum, MARKERS[loss], color=COLOURS[loss], ms=size, label=label)
        axis.loglog(rank, np.exp(intercept) * rank**-alpha, "--", color=COLOURS[loss], lw=1.2)
    plain_ticks(axis.xaxis, "{x:.0f}")
    axis.set_xlabel("rank")
    axis.set_title("mean sorted softmax probability, and the fitted Zipf law (dashed)", loc="left")
    axis.legend(frameon=False)
    save(figure, path)


def draw_study(study: Study, records: Sequence[dict], path: Path) -> None:
    """Where a method helps, if anywhere: by epoch, and along each scale of conditions.

    All panels show percent right less the baseline's, seed by seed: the mean and its 95 % interval, by
    Student's t.
    """
    judged = study.results(records)
    figure, axes = new_figure(1 + len(study.scales), 10)
    hues = dict(zip(list(study.methods)[1:], OKABE_ITO, strict=False))
    base = judged[study.baseline]
    for method, colour in hues.items():
        less = np.array(
            [100 * np.subtract(of["accuracy"], base[seed]["accuracy"]) for seed, of in judged[method].items()]
        )
        samples = [Sample(tuple(column)) for column in less.T]
        mean, reach = (np.array([getattr(sample, name) for sample in samples]) for name in ("mean", "reach"))
        epochs = np.arange(1, 1 + len(mean))
        axes[0].plot(epochs, mean, color=colour, lw=1.8, label=method)
        if method in study.compared and np.isfinite(reach).all():
            axes[0].fill_between(epochs, mean - reach, mean + reach, color=colour, alpha=0.2, lw=0)
    axes[0].set_xlabel("epoch")
    axes[0].set_title(f"percent right, minus {study.baseline}", loc="left")
    for axis, (scale, values) in zip(axes[1:], study.scales.items(), strict=True):
        found = [study.results(records, name) if name else judged for name in values.values()]
        for shift, method in zip((-0.1, 0.1), study.compared[1:], strict=False):
            less = [difference(of[method], of[study.baseline]) if of else Sample(()) for of in found]
            place, known = np.arange(len(values)) + shift, [k for k, of in enumerate(found) if of]
            mean = [less[k].mean for k in known]
            reach = [less[k].reach if np.isfinite(less[k].reach) else 0 for k in known]
            axis.errorbar(place[known], mean, yerr=reach, fmt="o", color=hues[method], capsize=3)
        axis.set_xticks(range(len(values)), list(values))
        axis.set_xlabel(scale)
        axis.sharey(axes[1])
    for axis in axes:
        axis.axhline(0, color="0.6", lw=0.8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)
