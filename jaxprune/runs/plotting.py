"""Figures from saved metrics: one palette, one style, PNG and SVG.

Colours are those of Okabe & Ito and one of Tol, told apart with any colour vision; every method
also has its own marker and dash, for print without colour.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxprune.storage import replacing


class Style(NamedTuple):
    """How a method looks in every figure."""

    label: str
    color: str
    marker: str
    dash: str


STYLES = {
    "algorithm1": Style("Algorithm 1", "#D55E00", "o", "-"),
    "wanda": Style("Wanda on $W_Q$, $W_K$", "#0072B2", "s", "--"),
    "sparsegpt": Style("SparseGPT on $W_Q$, $W_K$", "#009E73", "^", "-."),
    "fused_magnitude": Style("fused magnitude", "#999999", "D", ":"),
    "ranking": Style("descent's initial ranking", "#E69F00", "v", ":"),
    "gauss_newton": Style("Gauss-Newton, closed form", "#56B4E9", "h", "-"),
    "descent": Style("preset descent", "#000000", "*", "-"),
    "magnitude": Style("magnitude on $W_Q$, $W_K$", "#CC79A7", "x", "--"),
    "admm": Style("ADMM on $W_Q$, $W_K$", "#882255", "d", "-."),
    "algorithm1_rope": Style("Algorithm 1, on the logits with RoPE", "#D55E00", "o", ":"),
    "descent_rope": Style("descent, on the logits with RoPE", "#000000", "P", "--"),
}

# For methods without a style of their own.
_SPARE_COLORS = ("#F0E442", "#44AA99", "#AA4499", "#DDCC77", "#332288")
_SPARE_MARKERS = "p8<>X"


def style(method: str) -> Style:
    """The style of a method, ``gauss_newton`` or ``gauss-newton``.

    One that is not in ``STYLES`` is named as it is, always alike.
    """
    method = method.replace("-", "_")
    if method in STYLES:
        return STYLES[method]
    number = zlib.crc32(method.encode())
    color = _SPARE_COLORS[number % len(_SPARE_COLORS)]
    marker = _SPARE_MARKERS[number % len(_SPARE_MARKERS)]
    return Style(f"{method.replace('_', ' ')} on $W_Q$, $W_K$", color, marker, "--")


# Figures go to files; no screen is needed or opened. A notebook shows what its cells return.
if "inline" not in os.environ.get("MPLBACKEND", ""):
    mpl.use("Agg")
mpl.rcParams.update(
    {
        "figure.dpi": 120,
        "savefig.bbox": "tight",
        "font.size": 9,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "jaxprune",
    }
)


def save(figure: Figure, folder: Path, name: str) -> Figure:
    """Write ``name.png`` and ``name.svg``, each whole or not at all, and close the figure.

    Returns:
      The figure, for a notebook to show.
    """
    # Once for both formats: to find what a "tight" figure holds takes longer than to draw it.
    figure.draw_without_rendering()
    box = figure.get_tightbbox().padded(mpl.rcParams["savefig.pad_inches"])
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        with replacing(folder / f"{name}.{suffix}") as partial:
            figure.savefig(partial, format=suffix, metadata=metadata, bbox_inches=box)
    plt.close(figure)
    return figure


def curves(
    axes: Axes,
    frame: pd.DataFrame,
    x: str,
    y: str,
    methods: Sequence[str],
    *,
    band: Literal["error", "deciles"] = "error",
) -> None:
    """A line for each method: the mean of ``y`` over rows of equal ``x``, and a band around it.

    The band is the standard error of the mean, or goes from the first to the ninth decile of the
    rows. A method that has no ``x`` (Wanda has no λ) is a level line.
    """
    for method in methods:
        rows = frame[frame["method"] == method]
        if rows.empty:
            continue
        look = style(method)
        if rows[x].isna().all():
            rows = pd.concat([rows.assign(**{x: limit}) for limit in axes.get_xlim()])
            marker = ""
        else:
            marker = look.marker
        groups = rows.groupby(x)[y]
        places, values = list(groups.groups), groups.mean()
        if band == "error":
            error = groups.sem().fillna(0)
            low, high = values - error, values + error
        else:
            low, high = groups.quantile(0.1), groups.quantile(0.9)
        axes.plot(
            places,
            values,
            look.dash,
            color=look.color,
            marker=marker,
            markersize=4,
            linewidth=1.3,
            label=look.label,
        )
        axes.fill_between(
            places, low.clip(lower=1e-9), high, color=look.color, alpha=0.15, linewidth=0
        )


def legend_below(figure: Figure, axes: Axes) -> None:
    """One legend for the whole figure, under it."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, frameon=False
    )
