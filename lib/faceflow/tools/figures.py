"""Charts of the reports. The only module that imports matplotlib; figures are drawn without a display or a global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from faceflow.kernels.knn.recall import RecallEstimate
from faceflow.stages.results import ThresholdResult

PNG_DPI = 130

INK, MUTED, GRID = "#1d2733", "#66727f", "#e3e8ed"
TEAL, SKY, ORANGE, RED, LEAF = "#0b7285", "#8ecae6", "#e8590c", "#c92a2a", "#74b816"

STYLE = {
    "font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID,
    "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5,
    "axes.titlelocation": "left", "axes.titlecolor": INK, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8,
    "axes.axisbelow": True, "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "faceflow",
}  # fmt: skip


def _figure(width: float, height: float, **panels: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**panels)


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(out, format="png", dpi=PNG_DPI)
        # The layout is found, which is half of the work; drawn again, the figure keeps it.
        figure.set_layout_engine("none")
    return out.getvalue()


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element to stand in a page, its text as text."""
    out = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


class Step(Protocol):
    """A step on the timeline, in seconds."""

    @property
    def start(self) -> float: ...
    @property
    def seconds(self) -> float: ...
    @property
    def busy_seconds(self) -> float: ...


class Stage(Protocol):
    """A stage on the timeline, in seconds from the run's begin."""

    @property
    def name(self) -> str: ...
    @property
    def start(self) -> float: ...
    @property
    def seconds(self) -> float: ...
    @property
    def steps(self) -> Sequence[Step]: ...


def timeline(stages: Sequence[Stage], cpus: int) -> Figure:
    """When each stage and its steps ran, and how busy the CPUs were."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(9.5, 0.9 + 0.42 * len(stages))
        for row, stage in enumerate(stages):
            axes.barh(row, stage.seconds, 0.72, left=stage.start, color=GRID)
            for step in stage.steps:
                used = min(1.0, step.busy_seconds / max(step.seconds * cpus, 1e-9))
                axes.barh(row + 0.36 - 0.36 * used, step.seconds, 0.72 * used, left=step.start, color=TEAL, alpha=0.85)
            axes.annotate(
                f"{stage.seconds:,.1f} s", (stage.start + stage.seconds, row), (5, 0), textcoords="offset points",
                va="center", color=MUTED,
            )  # fmt: skip
        axes.set_yticks(range(len(stages)), [stage.name for stage in stages])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"seconds; height of the filled part: share of {cpus} CPUs busy")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
    return figure


def sizes(bands: Mapping[str, int]) -> Figure:
    """How many clusters there are of each size."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(9.5, 2.9)
        bars = axes.bar(range(len(bands)), list(bands.values()), 0.78, color=[SKY if band == "1" else TEAL for band in bands])
        axes.bar_label(bars, [f"{count:,}" for count in bands.values()], padding=2, color=MUTED, fontsize=8.5)
        axes.set_xticks(range(len(bands)), list(bands), rotation=30 if len(bands) > 9 else 0)
        axes.set(yscale="log", xlabel="faces of a cluster", ylabel="clusters", ylim=(0.6, None))
        axes.margins(y=0.15)
        axes.minorticks_off()
        axes.grid(axis="x", visible=False)
    return figure


def similarities(pairs: np.ndarray | None, neighbors: np.ndarray, chosen: ThresholdResult, flank_bins: int) -> Figure:
    """Where the threshold lies among the similarities of pairs.

    pairs: int64[b], histogram from -1 to 1 of a sample of all pairs (None: none was taken); neighbors: int64[2, b], of the
    neighbors found, inside clusters and between; flank_bins: bins that the flank of the impostors was fitted to.
    """
    threshold, support, valley, flank = chosen.similarity, chosen.support, chosen.valley, chosen.flank
    with mpl.rc_context(STYLE):
        panels = 1 if pairs is None else 2
        figure, axes = _figure(9.5, 2.5 * panels, nrows=panels, sharex=True, squeeze=False)
        low, high = _range(neighbors.sum(axis=0), pairs, threshold)
        if pairs is not None:
            upper = axes[0, 0]
            middle = _middles(len(pairs))
            _fill(upper, pairs, (low, high), color=SKY)
            if flank is not None and valley is not None:
                right = middle[(middle > valley - 0.35 * (high - low)) & (middle < high)]
                level = np.exp(flank[0] - flank[1] * (right - valley)) * flank_bins / len(pairs)
                selected = pairs[(middle > valley - 0.35 * (high - low)) & (middle < high)]
                drawn = (level > 0.5) & (level <= np.maximum(selected, 1))
                upper.plot(right[drawn], level[drawn], "--", color=ORANGE, label="impostor pairs, as fitted")
            upper.set(yscale="log", ylabel="pairs", ylim=(0.5, None), title="a sample of all pairs of faces")
            _mark(upper, threshold, support, valley)
        lower = axes[-1, 0]
        for counts, color, name in ((neighbors[0], TEAL, "of one cluster"), (neighbors[1], RED, "of two clusters")):
            _fill(lower, counts, (low, high), color=color, alpha=0.55, label=name)
        lower.set(yscale="log", ylabel="neighbors", xlabel="cosine similarity", xlim=(low, high), ylim=(0.5, None))
        lower.set_title("the neighbors found")
        _mark(lower, threshold, support, None)
    return figure


def _middles(bins: int) -> np.ndarray:
    return (np.arange(bins) + 0.5) * 2 / bins - 1


def _fill(axes: Any, counts: np.ndarray, ends: tuple[float, float], **look: Any) -> None:
    middle = _middles(len(counts))
    seen = (middle >= ends[0]) & (middle <= ends[1])
    axes.fill_between(middle[seen], np.maximum(counts[seen], 0.5), 0.5, step="mid", linewidth=0, **look)


def _range(neighbors: np.ndarray, pairs: np.ndarray | None, threshold: float | None) -> tuple[float, float]:
    """Cosines between which there is something to see."""
    every = [counts for counts in (neighbors, pairs) if counts is not None and counts.sum()]
    ends = [threshold] if threshold is not None else []
    for counts in every:
        share = counts.cumsum() / counts.sum()
        ends += np.interp([0.001, 0.9999], share, _middles(len(counts))).tolist()
    if not ends:
        return -1.0, 1.0
    margin = 0.04 * max(max(ends) - min(ends), 0.02)
    return max(-1.0, min(ends) - margin), min(1.0, max(ends) + margin)


def _mark(axes: Any, threshold: float | None, support: float | None, valley: float | None) -> None:
    lines = (
        (threshold, "-", INK, "threshold"),
        (support if support != threshold else None, ":", INK, "support threshold"),
        (valley, "-.", TEAL, "valley"),
    )
    for at, style, color, name in lines:
        if at is not None:
            axes.axvline(at, linestyle=style, color=color, linewidth=1.3, label=f"{name} {at:.3f}")
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5)


def recall(estimate: RecallEstimate, bands: np.ndarray, threshold: float | None, wanted: float) -> Figure:
    """The recall estimate, and which true neighbors were missed. bands: int64[2, b], true and found, from the threshold to
    1."""
    with mpl.rc_context(STYLE):
        figure, (left, right) = _figure(9.5, 2.5, ncols=2, width_ratios=[2, 3])
        low, high, middle = estimate.low, estimate.high, estimate.estimate
        left.errorbar([middle], [0], xerr=[[max(0.0, middle - low)], [max(0.0, high - middle)]], fmt="o", color=TEAL, capsize=4)
        bottom = min(low, wanted if wanted else low)
        left.axvline(wanted, color=RED, linestyle="--", linewidth=1.2)
        left.annotate("--min-recall", (wanted, 0.42), (4, 0), textcoords="offset points", color=RED, fontsize=8.5)
        left.set(
            xlim=(bottom - max(0.15 * (1 - bottom), 1e-3), 1 + max(0.05 * (1 - bottom), 5e-4)), ylim=(-0.6, 0.6), yticks=[],
            title="share of true edges found (95 % interval)",
        )  # fmt: skip
        edges = np.linspace(threshold if threshold is not None else -1, 1, bands.shape[1] + 1)
        share = np.divide(bands[1], bands[0], out=np.full(bands.shape[1], np.nan), where=bands[0] > 0)
        right.bar(edges[:-1], share, np.diff(edges) * 0.9, align="edge", color=TEAL)
        bottom = float(np.nanmin(share)) if np.isfinite(share).any() else 0.0
        right.set(
            ylim=(max(0.0, bottom - max(0.25 * (1 - bottom), 0.01)), 1),
            xlabel="cosine similarity",
            title="found, by similarity",
        )
    return figure


class MethodRow(Protocol):
    """A scored method: its name, both F, and seconds."""

    @property
    def method(self) -> str: ...
    @property
    def pairwise_f(self) -> float | None: ...
    @property
    def bcubed_f(self) -> float | None: ...
    @property
    def seconds(self) -> float | None: ...


def methods(rows: Sequence[MethodRow]) -> Figure:
    """Both F of each method, the best on top, beside its seconds."""
    with mpl.rc_context(STYLE):
        figure, (left, right) = _figure(9, 1.2 + 0.38 * len(rows), ncols=2, sharey=True, width_ratios=[3, 2])
        at = np.arange(len(rows))
        left.barh(at + 0.2, [row.pairwise_f or 0.0 for row in rows], 0.4, label="pairwise F", color=TEAL)
        left.barh(at - 0.2, [row.bcubed_f or 0.0 for row in rows], 0.4, label="BCubed F", color=LEAF)
        left.set_yticks(at, [row.method for row in rows])
        left.set(xlim=(0, 1), xlabel="F")
        left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        right.barh(at, [max(row.seconds or 0.0, 1e-3) for row in rows], 0.6, color=MUTED)
        right.set(xscale="log", xlabel="seconds, with the neighbor table at hand")
    return figure


def scaling(medians: Mapping[tuple[str, int, int], float], stages: Sequence[str], predictions: Sequence[Any]) -> Figure:
    """Time against workers, speed-up against ideal, and time against faces; projections are drawn hollow and say so.

    medians: seconds by (stage or `total`, workers, faces); predictions: of `workers`, `faces`, `seconds`, `low`, `high`.
    """
    workers, sizes = sorted({key[1] for key in medians}), sorted({key[2] for key in medians})
    most, largest = workers[-1], sizes[-1]
    lines = zip((*stages, "total"), (TEAL, ORANGE, LEAF, RED, SKY, MUTED, INK), strict=False)
    look: dict[str, dict[str, Any]] = {
        name: {"color": color, "linewidth": 2.4 if name == "total" else 1.4} for name, color in lines
    }
    with mpl.rc_context(STYLE):
        figure, (left, middle, right) = _figure(13, 4.2, ncols=3)
        middle.plot(workers, [count / workers[0] for count in workers], "--", color=MUTED, label="ideal")
        for name in look:
            times = [medians[name, count, largest] for count in workers]
            gains = [times[0] / max(item, 1e-3) for item in times]
            left.plot(workers, times, "o-", label=name, **look[name])
            middle.plot(workers, gains, "o-", label=f"{name}: efficiency {gains[-1] * workers[0] / most:.2f}", **look[name])
            right.plot(sizes, [medians[name, most, size] for size in sizes], "o-", **look[name])
        beyond = [item for item in predictions if item.faces == largest]
        for item in beyond:
            left.errorbar(
                [item.workers], [item.seconds], yerr=[[max(0, item.seconds - item.low)], [max(0, item.high - item.seconds)]],
                fmt="o", color=INK, markerfacecolor="white", capsize=3,
                label="total, simulated (not measured)" if item is beyond[0] else None,
            )  # fmt: skip
        left.set(xscale="log", yscale="log", xlabel="workers", ylabel="seconds", title=f"time, {largest:,} faces")
        ticks = sorted({*workers, *(item.workers for item in beyond)})
        left.set_xticks(ticks, [str(tick) for tick in ticks])
        left.minorticks_off()
        middle.set(xlabel="workers", title=f"speed-up over {workers[0]} worker(s)", xticks=workers)
        right.set(xscale="log", yscale="log", xlabel="faces", ylabel="seconds", title=f"time, {most} workers")
        left.legend(fontsize=8)
        middle.legend(fontsize=8)
    return figure
