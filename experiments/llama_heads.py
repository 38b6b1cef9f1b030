"""Pruning error of every attention head of a real layer, method by method.

The fused weight of each head is ``W = W_Q W_Kᵀ/√k``, grouped-query heads paired with the key head
they share; positions (RoPE) are left out, as in the paper. Wanda and SparseGPT prune ``W_Q`` and
``W_K`` instead. Algorithm 1 chooses λ and step size on the calibration error, from a grid that
follows the size of its gradient.

For example::

  python experiments/llama_heads.py --input layer.npz --ratios 0.3 0.5 0.7 --out runs/heads
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from tqdm import tqdm

from jaxprune import plotting
from jaxprune.attention import check_finite
from jaxprune.cli import Flag, run_script
from jaxprune.comparison import (
    ALGORITHM1,
    METHODS,
    FusedProblem,
    Outcome,
    compare,
    compare_algorithm1,
)
from jaxprune.errors import InputError
from jaxprune.fused import algorithm1_grid
from jaxprune.runs import (
    RunFolder,
    hashes,
    read_arrays,
    read_metrics,
    replacing,
    write_arrays,
)
from jaxprune.sparsity import Sparsity

SHOWN = (ALGORITHM1, *METHODS)
COLUMNS = ("head", "method", "ratio", "calibration_error", "heldout_error", "stored_weights")


@dataclass(frozen=True)
class Config:
    """Relative attention error of every head against the ratio, held-out beside calibration.

    Example: python experiments/llama_heads.py --input layer.npz --out runs/heads
    """

    input: Path | None = None
    """.npz with the arrays of one layer: x [b, n, d], wq [d, heads, k], wk [d, kv_heads, k], and
    x_heldout [c, m, d] (without it, the last quarter of the sequences is held out)"""
    ratios: tuple[float, ...] = (0.3, 0.5, 0.7)
    """fractions removed"""
    methods: tuple[str, ...] = SHOWN
    """algorithm1, wanda, sparsegpt, fused_magnitude, ranking, descent"""
    head_batch: int = 8
    """heads pruned together; lower it if memory runs out"""
    steps: int = 300
    """gradient-descent steps of Algorithm 1"""
    batch_size: int = 4
    """sequences of a step of Algorithm 1"""
    out: Path = Path("runs/llama_heads")
    """folder of the run"""
    resume: Flag = False
    """go on with the run in --out"""
    redraw: Flag = False
    """only draw figure and table again from the metrics in --out"""
    repeat: Path | None = None
    """folder of a finished run to repeat in a new --out, with its settings, and to compare with"""

    memory_flags: ClassVar[str] = "--head-batch or --batch-size"

    def check(self) -> None:
        """Raise ``InputError`` for values that cannot work, before anything is computed."""
        if self.input is None:
            raise InputError("--input: expected the .npz of a layer, see --help")
        for ratio in self.ratios:
            try:
                Sparsity(ratio)
            except InputError as error:
                raise InputError(f"--ratios {ratio}: {error}") from None
        for method in self.methods:
            if method not in SHOWN:
                raise InputError(f"--methods {method}: expected some of {', '.join(SHOWN)}")
        if not self.ratios or not self.methods:
            raise InputError("--ratios and --methods: expected at least one value")
        for name in ("head_batch", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}: expected 1 or more")


def read_layer(path: Path | None) -> FusedProblem:
    """One layer's heads as problems that share their activations.

    Raises:
      InputError: no such file, not an ``.npz``, a missing array, shapes that do not match, too few
        sequences to hold some out, or values that are not finite.
    """
    assert path is not None
    try:
        found = read_arrays(path, "expected x, wq, wk as in --help")
    except InputError as error:
        raise InputError(f"--input {error}") from None
    kinds = {name: array.dtype.kind for name, array in found.items()}
    if not set(kinds.values()) <= set("fiub"):
        name = next(name for name, kind in kinds.items() if kind not in "fiub")
        raise InputError(f"--input {path}: {name} does not hold real numbers")
    with np.errstate(over="ignore"):  # what does not fit is infinite, and refused as such
        arrays = {name: array.astype(np.float32) for name, array in found.items()}
    missing = sorted({"x", "wq", "wk"} - arrays.keys())
    if missing:
        raise InputError(f"--input {path}: no array named {', '.join(missing)}")
    x, wq, wk = (arrays[name] for name in ("x", "wq", "wk"))
    x = x[None] if x.ndim == 2 else x
    heldout = arrays.get("x_heldout")
    if heldout is None:
        quarter = x.shape[0] // 4
        if not quarter:
            raise InputError(f"--input {path}: no x_heldout, and x has fewer than 4 sequences")
        print(f"no x_heldout: the last {quarter} of {x.shape[0]} sequences are held out")
        x, heldout = x[:-quarter], x[-quarter:]
    heldout = heldout[None] if heldout.ndim == 2 else heldout
    _check_layer(path, x, heldout, wq, wk)
    heads, width = wq.shape[1:]
    wk = np.repeat(wk, heads // wk.shape[1], axis=1)
    return FusedProblem(
        x=jnp.asarray(x),
        x_heldout=jnp.asarray(heldout),
        wq=jnp.asarray(wq.transpose(1, 0, 2) / np.sqrt(width)),
        wk=jnp.asarray(wk.transpose(1, 0, 2)),
    )


def _check_layer(
    path: Path, x: np.ndarray, heldout: np.ndarray, wq: np.ndarray, wk: np.ndarray
) -> None:
    shapes = f"x {x.shape}, x_heldout {heldout.shape}, wq {wq.shape}, wk {wk.shape}"
    if (
        (x.ndim, heldout.ndim, wq.ndim, wk.ndim) != (3, 3, 3, 3)
        or len({x.shape[2], heldout.shape[2], wq.shape[0], wk.shape[0]}) != 1
        or wq.shape[2] != wk.shape[2]
        or min(*x.shape, *heldout.shape, *wq.shape, *wk.shape) < 1
        or wq.shape[1] % wk.shape[1]
    ):
        raise InputError(
            f"--input {path}: shapes do not match: {shapes}; expected x [b, n, d], "
            "wq [d, heads, k], wk [d, kv_heads, k] with kv_heads dividing heads"
        )
    try:
        check_finite(x=x, x_heldout=heldout, wq=wq, wk=wk)
    except InputError as error:
        raise InputError(f"--input {path}: {error}") from None


def prune_heads(problems: FusedProblem, method: str, config: Config) -> tuple[Outcome, jax.Array]:
    """Outcomes ``[heads, ratios]`` of a method, and the λ used (NaN where there is none)."""
    ratios = jnp.asarray(config.ratios)
    if method != ALGORITHM1:
        outcome = compare(problems, ratios, method=method)
        return outcome, jnp.full(outcome.calibration_error.shape, jnp.nan)
    grid = jax.jit(jax.vmap(algorithm1_grid, (None, 0)))(problems.x, problems.w)
    tried = []
    for i in range(grid[0].shape[1]):
        lam, rates = grid[0][:, i, 0], grid[1][:, i]
        outcome, _ = compare_algorithm1(
            problems, ratios, lam, rates, steps=config.steps, batch_size=config.batch_size
        )
        tried.append((outcome, jnp.broadcast_to(lam[:, None], outcome.calibration_error.shape)))
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *tried)
    best = jnp.argmin(stacked[0].calibration_error, axis=0)

    def pick(values: jax.Array) -> jax.Array:
        index = best.reshape(1, *best.shape, *(1,) * (values.ndim - 3))
        return jnp.take_along_axis(values, index, axis=0)[0]

    return jax.tree.map(pick, stacked)


def compute(
    run: RunFolder, name: str, problems: FusedProblem, heads: range, method: str, config: Config
) -> list[dict]:
    """Rows of one method on some heads; their keep masks go beside."""
    chosen = replace(
        problems, wq=problems.wq[heads.start : heads.stop], wk=problems.wk[heads.start : heads.stop]
    )
    outcome, lam = prune_heads(chosen, method, config)
    sides = ("w",) if len(outcome.keep_masks) == 1 else ("wq", "wk")
    masks = {
        f"{method}-{ratio:g}-head{head}-{side}": np.asarray(mask[i, j])
        for side, mask in zip(sides, outcome.keep_masks, strict=True)
        for i, head in enumerate(heads)
        for j, ratio in enumerate(config.ratios)
    }
    write_arrays(run.part_file(name), **masks)
    return [
        {
            "layer": 0,
            "head": head,
            "method": method,
            "ratio": ratio,
            "calibration_error": float(outcome.calibration_error[i, j]),
            "heldout_error": float(outcome.heldout_error[i, j]),
            "stored_weights": int(outcome.stored_weights[i, j]),
            "lam": None if np.isnan(lam[i, j]) else float(lam[i, j]),
        }
        for i, head in enumerate(heads)
        for j, ratio in enumerate(config.ratios)
    ]


def plan(config: Config, heads: int) -> Iterator[tuple[str, str, range]]:
    """Names, methods and heads of all parts."""
    for start in range(0, heads, config.head_batch):
        batch = range(start, min(start + config.head_batch, heads))
        for method in config.methods:
            yield f"{method}-heads{batch.start}-{batch.stop}", method, batch


def summary(metrics: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard error over heads, and the worst head."""
    groups = metrics.groupby(["ratio", "method"], sort=False)
    table = groups.agg(
        calibration=("calibration_error", "mean"),
        heldout=("heldout_error", "mean"),
        heldout_se=("heldout_error", "sem"),
        heldout_worst=("heldout_error", "max"),
        stored_weights=("stored_weights", "mean"),
        heads=("head", "nunique"),
    ).reset_index()
    worst = metrics.loc[groups["heldout_error"].idxmax(), ["ratio", "method", "head"]]
    return table.merge(worst.rename(columns={"head": "worst_head"}), on=["ratio", "method"])


def draw(metrics: pd.DataFrame) -> plt.Figure:
    """Error against ratio, calibration beside held-out; below, every head at the middle ratio."""
    ratios = sorted(metrics["ratio"].unique())
    middle = ratios[len(ratios) // 2]
    methods = [m for m in SHOWN if m in set(metrics["method"])]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
    for cell, measure, title in (
        (axes[0], "calibration_error", "calibration"),
        (axes[1], "heldout_error", "held-out"),
    ):
        plotting.curves(cell, metrics, "ratio", measure, methods)
        cell.set_title(f"{title}, mean ± standard error of heads")
        cell.set_xlabel("pruning ratio ρ")
    axes[0].set_ylabel("relative error of the attention matrix")
    axes[0].set_yscale("log")
    at = metrics[metrics["ratio"] == middle]
    for method in methods:
        rows, style = at[at["method"] == method], plotting.STYLES[method]
        axes[2].plot(rows["head"], rows["heldout_error"], style.marker, color=style.color)
    axes[2].set_title(f"held-out, each head at ρ = {middle:g}")
    axes[2].set_xlabel("head")
    figure.tight_layout()
    plotting.legend_below(figure, axes[0])
    return figure


def report(metrics: pd.DataFrame, folder: Path) -> None:
    """Figure and table."""
    (folder / "figures").mkdir(exist_ok=True)
    plotting.save(draw(metrics), folder / "figures", "heads")
    table = summary(metrics)
    with replacing(folder / "summary.csv") as partial_file:
        table.to_csv(partial_file, index=False)
    shown = table.to_markdown(index=False, floatfmt=".4g")
    with replacing(folder / "tables.md") as partial_file:
        partial_file.write_text(shown + "\n")
    print(shown)
    print(f"metrics, table, figure and keep masks: {folder}")


def body(config: Config) -> None:
    """Run, or redraw."""
    if config.redraw:
        report(read_metrics(config.out, COLUMNS), config.out)
        return
    config.check()
    problems = read_layer(config.input)
    assert config.input is not None
    inputs = {"input": hashes([config.input])}
    with RunFolder(config.out, config, resume=config.resume, inputs=inputs) as run:
        rows: list[dict] = []
        masks: dict[str, np.ndarray] = {}
        for name, method, heads in tqdm(list(plan(config, problems.wq.shape[0])), unit="part"):
            rows += run.part(name, partial(compute, run, name, problems, heads, method, config))
            masks |= run.part_arrays(name)
        write_arrays(run.path / "keep_masks.npz", **masks)
        metrics = run.write_metrics(rows)
    report(metrics, config.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, "llama_heads.py")


if __name__ == "__main__":
    sys.exit(main())
