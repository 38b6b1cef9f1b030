"""Where Algorithm 1 generalises and where it overfits: logit scale against calibration tokens.

A mask has d² entries and is fitted on the rows of the attention matrices of the calibration
tokens. Two numbers decide what carries over to fresh text: how peaked attention is (the standard
deviation of the logits), and how many calibration tokens there are for each mask entry. The map
shows, for both, the error of Algorithm 1 relative to ranking the fused weights by magnitude, which
looks at no data, on the calibration tokens and on fresh ones, and the gap between the two. Beside
it stands the error of the closed form, preset ``gauss_newton``, on fresh tokens.

Synthetic activations are isotropic or correlated (covariance eigenvalues i^-1); real heads are
those of a model, their fused weight multiplied so that its logits have the scale asked for.

For example::

  python experiments/regimes.py --model zoo --calibration zoo --out runs/regimes
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from tqdm import tqdm

from jaxprune.attention import contract
from jaxprune.errors import InputError
from jaxprune.evaluation.comparison import (
    ALGORITHM1,
    FusedProblem,
    compare,
    judge,
    search_algorithm1,
)
from jaxprune.evaluation.heads import Layers, from_model
from jaxprune.evaluation.synthetic import HeadKeys, RandomHead, random_head
from jaxprune.runs import flags, plotting
from jaxprune.runs.configuration import flat
from jaxprune.runs.folder import RunFolder
from jaxprune.runs.metrics import Columns, write_table
from jaxprune.runs.script import Experiment, run_experiment, run_script
from jaxprune.sparsity import Sparsity

SYNTHETIC = {"isotropic": 0.0, "correlated": 1.0}  # exponents of the covariance's power law
REAL = "real heads"
BASELINE = "fused_magnitude"
CLOSED_FORM = "gauss_newton"
HELDOUT = 8
COLUMNS = Columns(
    ("logits_std", "tokens_per_entry", "index", "calibration_error", "heldout_error"),
    texts=("data", "method"),
    known={"method": (ALGORITHM1, BASELINE, CLOSED_FORM)},
)


@dataclass(frozen=True, kw_only=True)
class Data(flags.Calibration, flags.Model):
    """The model that real heads are taken from, and its text."""

    heads: int = 4
    """real heads, the first of as many layers, spread over the model"""


@dataclass(frozen=True)
class Config:
    """Map of the logit scales and calibration sizes at which Algorithm 1 generalises.

    Example: python experiments/regimes.py --model zoo --calibration zoo --out runs/regimes
    """

    logits_std: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    """standard deviations of the logits, over pairs of tokens"""
    tokens_per_entry: tuple[float, ...] = (0.03125, 0.125, 0.5, 2.0, 8.0)
    """calibration tokens for each entry of the mask; of real text as far as it goes"""
    d: int = 32
    """width of synthetic activations"""
    k: int = 16
    """width of synthetic heads"""
    n: int = 64
    """tokens of a sequence"""
    seeds: int = 3
    """synthetic draws"""
    ratio: float = 0.5
    """fraction removed"""
    steps: int = 300
    """gradient-descent steps of Algorithm 1"""
    batch_size: int = 4
    """sequences of a step of Algorithm 1"""
    data: Annotated[Data, flags.MODEL_AND_TEXT] = Data()
    run: Annotated[flags.Run, flags.RUN] = field(default=flags.Run(out=Path("runs/regimes")))

    memory_flags: ClassVar[str] = "--tokens-per-entry, --n or --d"

    def check(self) -> None:
        """Raise ``InputError`` for values that cannot work, before anything is computed."""
        try:
            Sparsity(self.ratio)
        except InputError as error:
            raise InputError(f"--ratio {self.ratio}: {error}") from None
        for name in ("logits_std", "tokens_per_entry"):
            values = getattr(self, name)
            if not values or not all(0 < value < 1e4 for value in values):
                raise InputError(f"{flags.flag_of(name)}: expected numbers above 0")
        for name in ("d", "k", "n", "seeds", "heads", "steps", "batch_size"):
            if flat(self)[name] < 1:
                raise InputError(f"{flags.flag_of(name)}: expected 1 or more")


def sequences(tokens_per_entry: float, d: int, n: int) -> int:
    """Calibration sequences that give so many tokens for each of the ``d²`` entries."""
    return max(1, round(tokens_per_entry * d * d / n))


def synthetic(seed: Array, *, count: int, exponent: float, config: Config) -> FusedProblem:
    """Weights and activations of one seed, at whatever scale of the logits."""
    rotation, x, heldout, wq, wk = jax.random.split(jax.random.key(seed), 5)
    head = RandomHead(
        d=config.d, k=config.k, n=config.n, sequences=count, heldout=HELDOUT, exponent=exponent
    )
    return random_head(HeadKeys(wq, wk, x, heldout, rotation), head)


def with_logits_std(problems: FusedProblem, wanted: float) -> FusedProblem:
    """The problems with fused weights scaled so that held-out logits have this deviation.

    Over all pairs of a query and a key it can see, less what is equal for all keys of a query,
    which the softmax does not feel.
    """

    def one(x: Array, w: Array) -> Array:
        logits = contract("bnd,de,bme->bnm", x, w, x)
        seen = jnp.tril(jnp.ones(logits.shape[1:], bool), -1)
        mean = jnp.sum(logits * seen, -1) / jnp.maximum(seen.sum(-1), 1)
        spread = jnp.where(seen, (logits - mean[..., None]) ** 2, 0)
        return jnp.sqrt(spread.sum() / (seen.sum() * x.shape[0]))

    axis = 0 if problems.x_heldout.ndim == 4 else None
    deviation = jax.vmap(one, (axis, 0))(problems.x_heldout, problems.w)
    return replace(problems, wq=problems.wq * (wanted / deviation)[:, None, None])


def real_heads(config: Config, source: Layers) -> FusedProblem:
    """The first head of some layers, with activations cut into sequences of ``n`` tokens."""
    chosen = np.unique(
        np.linspace(0, len(source.indices) - 1, config.data.heads).round().astype(int)
    )
    wanted = {source.indices[i] for i in chosen}
    layers = [problems for layer, problems in source.read() if layer in wanted]

    def cut(x: Array) -> Array:
        n = min(config.n, x.shape[1])
        return x[:, : x.shape[1] // n * n].reshape(-1, n, x.shape[2])

    return FusedProblem(
        x=jnp.stack([cut(p.x) for p in layers]),
        x_heldout=jnp.stack([cut(p.x_heldout)[:: max(1, len(p.x_heldout) // 4)] for p in layers]),
        wq=jnp.stack([p.wq[0] for p in layers]),
        wk=jnp.stack([p.wk[0] for p in layers]),
    )


def problems_of(
    data: str, tokens_per_entry: float, config: Config, real: FusedProblem
) -> FusedProblem | None:
    """Problems with so much calibration data; ``None`` where real text does not have as much."""
    if data == REAL:
        count = sequences(tokens_per_entry, real.x.shape[-1], real.x.shape[-2])
        if count > real.x.shape[1]:
            return None
        # Spread over the text, so that few sequences are not from one place.
        places = np.linspace(0, real.x.shape[1] - 1, count).astype(int)
        return replace(real, x=real.x[:, places])
    count = sequences(tokens_per_entry, config.d, config.n)
    draw = partial(synthetic, count=count, exponent=SYNTHETIC[data], config=config)
    return jax.vmap(draw)(jnp.arange(config.seeds))


def compute(
    data: str, std: float, tokens_per_entry: float, config: Config, real: FusedProblem
) -> list[dict]:
    """Rows of one point of the map."""
    problems = problems_of(data, tokens_per_entry, config, real)
    if problems is None:
        return []
    problems = with_logits_std(problems, std)
    ratios = jnp.asarray([config.ratio])
    batch = min(config.batch_size, problems.x.shape[1])
    pruned, lam, _ = search_algorithm1(problems, ratios, steps=config.steps, batch_size=batch)
    outcomes = {
        ALGORITHM1: judge(problems, *pruned),
        BASELINE: compare(problems, ratios, method=BASELINE),
        CLOSED_FORM: compare(problems, ratios, method=CLOSED_FORM),
    }
    _, b, n, d = problems.x.shape
    return [
        {
            "data": data,
            "logits_std": std,
            "tokens_per_entry": tokens_per_entry,
            "tokens": b * n,
            "entries": d * d,
            "method": method,
            "index": i,
            "calibration_error": float(outcome.calibration_error[i, 0]),
            "heldout_error": float(outcome.heldout_error[i, 0]),
            "stored_weights": int(outcome.stored_weights[i, 0]),
            "lam": float(lam[i, 0]) if method == ALGORITHM1 else None,
        }
        for method, outcome in outcomes.items()
        for i in range(outcome.heldout_error.shape[0])
    ]


def plan(config: Config) -> Iterator[tuple[str, str, float, float]]:
    """Names and points of all parts."""
    for data in (*SYNTHETIC, REAL):
        for tokens in sorted(config.tokens_per_entry):
            for std in sorted(config.logits_std):
                yield f"{data.replace(' ', '_')}-{tokens:g}-{std:g}", data, std, tokens


def ratios_of(metrics: pd.DataFrame) -> pd.DataFrame:
    """The numbers of the map at every point, geometric means over draws or heads.

    Algorithm 1 over fused magnitude, on calibration and on held-out tokens, its held-out over its
    calibration error, and the closed form over fused magnitude on held-out tokens; NaN where a
    point of a run of an earlier version lacks it.
    """
    point = ["data", "logits_std", "tokens_per_entry"]
    errors = metrics.pivot_table(
        index=[*point, "index"], columns="method", values=["calibration_error", "heldout_error"]
    ).clip(lower=1e-9)
    calibration, heldout = errors["calibration_error"], errors["heldout_error"]
    logarithms = pd.DataFrame(
        {
            "calibration": np.log(calibration[ALGORITHM1] / calibration[BASELINE]),
            "heldout": np.log(heldout[ALGORITHM1] / heldout[BASELINE]),
            "gap": np.log(heldout[ALGORITHM1] / calibration[ALGORITHM1]),
        }
    )
    if CLOSED_FORM in heldout:
        logarithms["closed_form"] = np.log(heldout[CLOSED_FORM] / heldout[BASELINE])
    return np.exp(logarithms.groupby(level=point, sort=False).mean()).reset_index()


TITLES = {
    "calibration": "error on calibration tokens,\nAlgorithm 1 / fused magnitude",
    "heldout": "error on fresh tokens,\nAlgorithm 1 / fused magnitude",
    "gap": "Algorithm 1: fresh tokens /\ncalibration tokens",
    "closed_form": "error on fresh tokens,\nGauss-Newton / fused magnitude",
}


def draw(metrics: pd.DataFrame) -> plt.Figure:
    """Rows: kinds of data. Columns: the numbers; blue below one, red above."""
    table = ratios_of(metrics)
    measures = [m for m in TITLES if m in table]
    kinds = list(dict.fromkeys(metrics["data"]))
    figure, axes = plt.subplots(
        len(kinds),
        len(measures),
        figsize=(3.2 * len(measures), 0.8 + 2.3 * len(kinds)),
        squeeze=False,
        layout="constrained",
    )
    for i, kind in enumerate(kinds):
        for j, measure in enumerate(measures):
            cell = axes[i, j]
            image = panel(cell, table[table["data"] == kind], measure)
            if j == 0:
                cell.set_ylabel(f"{kind}\ntokens per mask entry")
            if i == 0:
                cell.set_title(TITLES[measure], fontsize=8)
            if i == len(kinds) - 1:
                cell.set_xlabel("standard deviation of the logits")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, label="ratio of errors")
    bar.set_ticks([-5, -2.5, 0, 2.5, 5], labels=["1/32", "1/5.7", "1", "5.7", "32"])
    return figure


def panel(cell: Axes, here: pd.DataFrame, measure: str) -> plt.cm.ScalarMappable:
    """One map, its numbers written in."""
    grid = here.pivot(index="tokens_per_entry", columns="logits_std", values=measure)
    values = np.log2(grid.to_numpy())
    image = cell.imshow(
        values, aspect="auto", origin="lower", cmap="RdBu_r", norm=TwoSlopeNorm(0, -5, 5)
    )
    for (i, j), value in np.ndenumerate(grid.to_numpy()):
        if np.isnan(value):
            continue
        colour = "white" if abs(values[i, j]) > 3 else "black"
        cell.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=6, color=colour)
    cell.set_xticks(range(grid.shape[1]), [f"{v:g}" for v in grid.columns], fontsize=7)
    cell.set_yticks(range(grid.shape[0]), [f"{v:g}" for v in grid.index], fontsize=7)
    cell.grid(False)
    return image


def report(metrics: pd.DataFrame, folder: Path, figures: Path) -> str:
    """Figure and table."""
    plotting.save(draw(metrics), figures, "regimes")
    table = ratios_of(metrics)
    write_table(table, folder / "summary.csv")
    return table.to_markdown(index=False, floatfmt=".3g") + "\n"


def prepare(config: Config) -> Experiment:
    """Read what real heads are taken from."""
    source = from_model(config.data.model, config.data.calibration)

    def rows(run: RunFolder) -> list[dict]:
        real = real_heads(config, source)
        rows: list[dict] = []
        for name, data, std, tokens in tqdm(list(plan(config)), unit="point"):
            rows += run.part(name, partial(compute, data, std, tokens, config, real))
        return rows

    return Experiment(rows, source.inputs)


def body(config: Config) -> None:
    """Run, or redraw."""
    run_experiment(config, prepare, report, COLUMNS)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, "regimes.py")


if __name__ == "__main__":
    sys.exit(main())
