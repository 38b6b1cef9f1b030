"""Figures of a pruned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd


def summary_figure(metrics: pd.DataFrame, title: str) -> plt.Figure:
    """Attention error of every head, calibration beside held-out, and their means by layer.

    Args:
      metrics: rows with ``layer``, ``head``, ``calibration_error``, ``heldout_error``.
      title: of the figure.
    """
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
    measures = ("calibration_error", "heldout_error")
    top = metrics[list(measures)].to_numpy().max()
    for cell, measure in zip(axes, measures, strict=False):
        table = metrics.pivot_table(index="layer", columns="head", values=measure)
        image = cell.imshow(table, aspect="auto", cmap="cividis", vmin=0, vmax=top)
        cell.set_title(f"{measure.removesuffix('_error')} error of the attention")
        cell.set_xlabel("query head")
        cell.set_ylabel("layer")
        cell.grid(False)
        figure.colorbar(image, ax=cell)
    for measure, marker in zip(measures, "os", strict=True):
        mean = metrics.groupby("layer")[measure].mean()
        axes[2].plot(mean.index, mean, marker=marker, label=measure.removesuffix("_error"))
    axes[2].set_xlabel("layer")
    axes[2].set_ylabel("relative error, mean over heads")
    axes[2].set_ylim(bottom=0)
    axes[2].legend(frameon=False)
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.tight_layout()
    return figure


def _symbol(name: str) -> str:
    """A matrix as the paper writes it: ``wq`` is W with the index Q."""
    index = name.removeprefix("w").removeprefix("_")
    return f"$W_{{\\mathrm{{{index.upper() if len(index) == 1 else index}}}}}$"


def ratio_figure(ratios: Mapping[str, Sequence[float]], title: str) -> plt.Figure:
    """Fraction of zeros in every matrix: a map, layers down and matrices across.

    Args:
      ratios: of every layer, by the name of the matrix.
      title: of the figure.
    """
    table = np.array(list(ratios.values())).T
    figure, cell = plt.subplots(
        figsize=(1.6 + 0.75 * table.shape[1], 1.4 + 0.16 * len(table)), layout="constrained"
    )
    image = cell.imshow(table, aspect="auto", cmap="cividis", vmin=0, vmax=1)
    cell.set_xticks(range(len(ratios)), [_symbol(name) for name in ratios])
    cell.set_ylabel("layer")
    cell.grid(False)
    figure.colorbar(image, ax=cell, label="fraction of zeros")
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure
