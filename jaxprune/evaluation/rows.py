"""Pruned models judged on a text, side by side: their metrics, as a table and as figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib import ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from jaxprune.baselines import BASELINES
from jaxprune.errors import InputError
from jaxprune.runs import plotting
from jaxprune.runs.metrics import Columns

DENSE = "dense"
COLUMNS = Columns(
    ("seed", "refit", "distill", "perplexity", "divergence"),
    texts=("row", "method", "targets", "sparsity", "allocate"),
    sparse=(
        *("calibration_error", "heldout_error", "achieved_sparsity"),
        *("seconds", "peak_memory", "resumed", "calibration_tokens", "row_seconds"),
    ),
    optional=("predictions", "generated", "steps"),
)
"""Of the metrics: one row for each pruned model, and one for the dense model."""

_TARGETS = {"qk": "`W_Q`, `W_K`", "all": "all maps", "none": "nothing"}
_LOW_IS_GOOD = ("perplexity", "gap", "divergence", "calibration_error", "heldout_error")
_SHOWN = {
    "perplexity": "perplexity",
    "gap": "above dense",
    "divergence": "KL divergence (nats)",
    "calibration_error": "attention error, calibration",
    "heldout_error": "held-out",
    "achieved_sparsity": "zeros",
    "seconds": "seconds",
    "peak_memory": "peak GiB",
}
# Columns that a table is without where they say no more than this.
_USUAL = {"budget": "matrix", "retraining": "", "text": "read"}
BRIEF = ("perplexity", "gap", "divergence", "seconds")
"""Columns of the table of a first page."""

# Smallest gap that a logarithmic axis shows.
_LEAST_GAP = 0.01


def name_of(method: str) -> str:
    """A method as tables name it."""
    names = {name: baseline.label for name, baseline in BASELINES.items()}
    return {**names, "gauss-newton": "closed form"}.get(method, method)


def chosen(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Names that are among the patterns (``all-0.5-*``), in their order; all without patterns.

    Raises:
      InputError: a pattern that is no name's.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            example = names[-1]
            raise InputError(f"rows {pattern}: no such row; expected names such as {example}")
    return [n for n in names if not patterns or any(fnmatchcase(n, p) for p in patterns)]


def spread(values: pd.Series) -> str:
    """Mean, and half the range where there are several seeds."""
    mean = values.mean()
    digits = 4 if abs(mean) < 0.1 else 3 if abs(mean) < 1 else 2
    text = f"{mean:.{digits}f}"
    if len(values) > 1:
        text += f" ± {(values.max() - values.min()) / 2:.{digits}f}"
    return text


def with_gaps(metrics: pd.DataFrame) -> pd.DataFrame:
    """Metrics with a column ``gap``, the perplexity above that of the dense row.

    Raises:
      InputError: there is no dense row.
    """
    dense = metrics.loc[metrics["method"] == DENSE, "perplexity"]
    if dense.empty:
        raise InputError("the metrics have no row of the dense model")
    return metrics.assign(gap=metrics["perplexity"] - dense.iloc[0])


def table(metrics: pd.DataFrame, columns: Sequence[str] = tuple(_SHOWN)) -> str:
    """A Markdown table: the dense row, then groups of equal maps and sparsity, best in bold.

    Without the columns of the budget, of retraining and of text where all rows are alike.
    """
    shown_columns = {name: _SHOWN[name] for name in columns}
    metrics = with_gaps(metrics)
    dense = metrics[metrics["method"] == DENSE].iloc[0]
    first = {"sparsity": "none", "method": DENSE, "budget": "", "retraining": "", "text": ""}
    lines = [first | dict.fromkeys(shown_columns.values(), "")]
    lines[0][_SHOWN["perplexity"]] = f"{dense['perplexity']:.2f}"
    pruned = metrics[metrics["method"] != DENSE]
    for (targets, sparsity), group in pruned.groupby(["targets", "sparsity"], sort=False):
        rows = group.groupby("row", sort=False)
        best = {name: rows[name].mean().min() for name in _LOW_IS_GOOD}
        for _, seeds in rows:
            one = seeds.iloc[0]
            line = {
                "sparsity": f"{_TARGETS.get(str(targets), targets)}, {sparsity}",
                "method": _method(one),
                "budget": one["allocate"],
                "retraining": _retraining(one),
                "text": "read" + _more_text(one),
            }
            for name, shown in shown_columns.items():
                line[shown] = _cell(seeds, name, best.get(name))
            lines.append(line)
    shown = pd.DataFrame(lines)
    same = [name for name, usual in _USUAL.items() if set(shown[name]) <= {"", usual}]
    return shown.drop(columns=same).to_markdown(index=False, disable_numparse=True)


def _cell(seeds: pd.DataFrame, name: str, best: float | None) -> str:
    values = seeds[name].dropna()
    if values.empty:
        return ""
    if name == "seconds":
        # Of a row that was interrupted, the time and memory of the last process alone are known.
        return f"{'over ' if seeds['resumed'].any() else ''}{values.mean():.0f}"
    text = f"{values.mean():.1f}" if name == "peak_memory" else spread(values)
    return f"**{text}**" if best is not None and values.mean() == best else text


def _metric(row: pd.Series) -> str:
    """What the closed form is on, where that is not the usual; old rows do not say."""
    return "on predictions" if row.get("predictions", 0) > 0 else ""


def _method(row: pd.Series) -> str:
    return ", ".join(filter(None, (name_of(row["method"]), _metric(row))))


def _generated(row: pd.Series) -> bool:
    """Whether windows were generated; old rows do not say."""
    return bool(row.get("generated", 0) > 0)


def _more_text(row: pd.Series) -> str:
    return f", {row['generated']:.0f} generated" if _generated(row) else ""


def _steps(row: pd.Series) -> str:
    """Steps a block, where they are not the preset's."""
    return f", {row['steps']:.0f} steps each" if row.get("steps", 0) > 0 else ""


def _retraining(row: pd.Series) -> str:
    parts = ["blocks" + _steps(row)] if row["refit"] else []
    parts += [f"{row['distill']:.0f} steps of distillation"] if row["distill"] else []
    return ", ".join(parts)


def draw_cost(metrics: pd.DataFrame) -> Figure:
    """Perplexity above the dense model's against seconds of pruning, a panel for each group.

    Left out are rows that were interrupted, whose time is not known, and magnitude among others:
    it is so far above them that they would be drawn in a corner.
    """
    if set(metrics["method"]) - {"magnitude", DENSE}:
        metrics = metrics[metrics["method"] != "magnitude"]
    figure, panels = _panels(metrics, width=3.0, height=2.6, columns=3)
    for axes, there in panels:
        rows = there[there["resumed"] != 1]
        added = (rows["refit"] == 1) & (rows["method"] != "descent") | (rows["distill"] > 0)
        rows = rows.assign(
            named=[_method(row) for _, row in rows.iterrows()],
            generated=[_generated(row) for _, row in rows.iterrows()],
        )
        for (name, retrained), points in rows.groupby(["named", added], sort=False):
            look = plotting.style(points["method"].iloc[0])
            axes.plot(
                points["seconds"],
                points["gap"].clip(lower=_LEAST_GAP),
                look.marker,
                color=look.color,
                fillstyle="none" if retrained else "left" if _metric(points.iloc[0]) else "full",
                label=f"{name}{', retrained' * bool(retrained)}",
                markersize=6,
            )
        # What markers do not say is around them: notes in words would cover each other.
        for frame, shown, within in (
            ("o", "in a ring: one budget", rows["allocate"] != "matrix"),
            ("s", "in a box: generated text", rows["generated"].astype(bool)),
        ):
            if within.any():
                points = rows[within]
                axes.plot(
                    points["seconds"],
                    points["gap"].clip(lower=_LEAST_GAP),
                    frame,
                    color="0.45",
                    fillstyle="none",
                    label=shown,
                    markersize=12,
                    markeredgewidth=0.9,
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.margins(0.12, 0.2)
        _plain_ticks(axes.xaxis, axes.get_xlim())
        _plain_ticks(axes.yaxis, axes.get_ylim())
        axes.set_xlabel("seconds of pruning")
        axes.set_ylabel("perplexity above dense")
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        found, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(map(str, labels), found, strict=True))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=6, frameon=False
    )
    return figure


def _plain_ticks(axis: Axis, limits: tuple[float, float]) -> None:
    """Round numbers on a logarithmic axis."""
    axis.set_major_locator(ticker.FixedLocator(_ticks(*limits)))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, fewer in every decade where there are several."""
    digits: Sequence[float] = (1, 1.5, 2, 3, 5, 7) if high < 8 * low else (1, 2, 5)
    if high < 2.5 * low:
        digits = range(1, 10)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    numbers = [digit * 10.0**decade for decade in decades for digit in digits]
    return [number for number in numbers if low <= number <= high]


def draw_gaps(metrics: pd.DataFrame) -> Figure:
    """Perplexity above the dense model's of every row, a dot for each seed."""
    longest = metrics.groupby(["targets", "sparsity"])["row"].nunique().max()
    figure, panels = _panels(metrics, width=7.0, height=0.9 + 0.22 * longest, columns=2)
    for axes, rows in panels:
        names = list(dict.fromkeys(rows["row"]))
        labels = []
        for place, name in enumerate(names):
            points = rows[rows["row"] == name]
            one = points.iloc[0]
            look = plotting.style(one["method"])
            gaps = points["gap"].clip(lower=_LEAST_GAP)
            axes.plot(gaps, [place] * len(gaps), look.marker, color=look.color, markersize=5)
            shared = "" if one["allocate"] == "matrix" else f"budget: {one['allocate']}"
            retrained = f"retrained: {_retraining(one)}" if _retraining(one) else ""
            generated = "generated text" * _generated(one)
            notes = [note for note in (shared, retrained, generated) if note]
            labels.append(_method(one) + (f" ({'; '.join(notes)})" if notes else ""))
        axes.set_yticks(range(len(names)), labels)
        axes.invert_yaxis()
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis, axes.get_xlim())
        axes.set_xlabel("perplexity above dense")
    return figure


def _panels(
    metrics: pd.DataFrame, *, width: float, height: float, columns: int
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """Axes with a title and the rows of each group of equal maps and sparsity."""
    pruned = with_gaps(metrics)
    pruned = pruned[pruned["method"] != DENSE]
    groups = list(pruned.groupby(["targets", "sparsity"], sort=False))
    if not groups:
        raise InputError("the metrics have no row of a pruned model")
    columns = min(columns, len(groups))
    lines = -(-len(groups) // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(width * columns, height * lines + 0.4),
        squeeze=False,
        layout="constrained",
    )
    panels = []
    for axes, ((targets, sparsity), rows) in zip(grid.flat, groups, strict=False):
        title = "$W_Q$, $W_K$" if targets == "qk" else "all maps"
        axes.set_title(f"{title}, {sparsity}")
        panels.append((axes, rows))
    for axes in list(grid.flat)[len(groups) :]:
        axes.remove()
    return figure, panels
