"""The paper's synthetic experiment (Figure 2): pruning error against λ, n and the pruning ratio.

Rows of the figure are k = 16 and 64 at d = 64; columns vary the regularisation λ, the number of
tokens n and the ratio. Every error is shown twice: on the sequence the method was calibrated on,
as in the paper, and on fresh sequences. Settings:

  unit_variance  all entries of x, W_Q, W_K standard normal, as in the paper: attention is nearly
                 one-hot (logits' standard deviation 64 sqrt(k))
  soft           the same with the logits scaled to standard deviation 2
  correlated     activations with covariance eigenvalues i^-1 and i^-2, logits of standard
                 deviation 2, 32 calibration sequences

Example:
  python experiments/synthetic.py --k 16 --settings soft --seeds 3 --out runs/soft
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from tqdm import tqdm

from jaxprune.errors import InputError
from jaxprune.evaluation.comparison import (
    ALGORITHM1,
    METHODS,
    ON_PROJECTIONS,
    FusedProblem,
    Outcome,
    compare,
    compare_algorithm1,
)
from jaxprune.evaluation.synthetic import HeadKeys, RandomHead, random_head
from jaxprune.methods.fused import DECAYS
from jaxprune.runs import flags, plotting
from jaxprune.runs.background import in_background
from jaxprune.runs.folder import RunFolder
from jaxprune.runs.metrics import Columns, write_table
from jaxprune.runs.script import Experiment, run_experiment, run_script
from jaxprune.sparsity import Sparsity

HELDOUT_SEQUENCES = 8
# Each holds its activations and masks.
MOST_JOBS = 4
SHOWN = (ALGORITHM1, *METHODS)
COLUMNS = Columns(
    ("exponent", "k", "n", "ratio", "seed", "calibration_error", "heldout_error", "stored_weights"),
    texts=("setting", "method"),
    known={"method": SHOWN},
    sparse=("lam",),
)


class Setting(NamedTuple):
    """How activations and weights are drawn."""

    logits_std: float | None  # None: unit-variance weights, whatever logits that gives
    exponents: tuple[float, ...]  # of the covariance's power law; 0 is isotropic
    sequences: int  # to calibrate on
    batch_size: int | None  # of Algorithm 1, whose cost grows with the sequences
    lam: tuple[float, ...]  # the useful range follows the size of the weights


SETTINGS = {
    "unit_variance": Setting(None, (0.0,), 1, None, (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)),
    "soft": Setting(2.0, (0.0,), 1, None, (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)),
    "correlated": Setting(2.0, (1.0, 2.0), 32, 2, (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)),
}


@dataclass(frozen=True)
class Config:
    """Error of pruned attention on synthetic data against λ, n and the pruning ratio (Figure 2).

    Example: python experiments/synthetic.py --k 16 --settings soft --seeds 3 --out runs/soft
    """

    k: tuple[int, ...] = (16, 64)
    """widths of a head; one row of the figure each"""
    d: int = 64
    """width of the model"""
    n: tuple[int, ...] = (32, 64, 128, 256)
    """tokens of a sequence; the one nearest 128 is used for the other two columns"""
    lam: flags.Several[float] = ()
    """regularisation of Algorithm 1; if left out, six decades around each setting's useful ones"""
    ratio: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """fractions removed; the one nearest 0.5 is used for the other two columns"""
    settings: tuple[str, ...] = tuple(SETTINGS)
    """unit_variance, soft, correlated"""
    seeds: int = 5
    """independent draws of weights and activations"""
    steps: int = 300
    """gradient-descent steps of Algorithm 1"""
    run: Annotated[flags.Run, flags.RUN] = field(default=flags.Run(out=Path("runs/synthetic")))

    memory_flags: ClassVar[str] = "--seeds, --n or --d"
    many_programs: ClassVar[bool] = True

    def check(self) -> None:
        """Raise ``InputError`` for values that cannot work, before anything is computed."""
        for name in ("k", "n", "ratio", "settings"):
            if not getattr(self, name):
                raise InputError(f"--{name}: expected at least one value")
        for name, values in (("k", self.k), ("n", self.n), ("d", (self.d,))):
            if min(values) < 1:
                raise InputError(f"--{name} {min(values)}: expected 1 or more")
        if self.seeds < 1 or self.steps < 1:
            raise InputError("--seeds and --steps: expected 1 or more")
        for ratio in self.ratio:
            try:
                Sparsity(ratio)
            except InputError as error:
                raise InputError(f"--ratio {ratio}: {error}") from None
        for lam in self.lam:
            flags.check_positive("--lam", lam)
        for name in self.settings:
            if name not in SETTINGS:
                raise InputError(f"--settings {name}: expected some of {', '.join(SETTINGS)}")


@dataclass(frozen=True)
class Part:
    """One point of the grid of settings, computed and saved as a whole."""

    setting: str
    exponent: float
    k: int
    n: int
    base: bool  # all λ and ratios here; elsewhere the ratio nearest 0.5

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.setting}-a{self.exponent:g}-k{self.k}-n{self.n}"

    def ratios(self, config: Config) -> list[float]:
        """Fractions removed."""
        return list(config.ratio) if self.base else [nearest(config.ratio, 0.5)]

    @property
    def cost(self) -> float:
        """Rough relative cost, for the progress bar's estimate."""
        sequences = SETTINGS[self.setting].sequences
        return (2.0 if self.base else 0.5) * (1 + sequences / 16) * (0.4 + (self.n / 128) ** 1.5)


def nearest(values: Sequence[float], wanted: float) -> float:
    """The value nearest to what is wanted."""
    return min(values, key=lambda value: abs(value - wanted))


def plan(config: Config) -> list[Part]:
    """All parts; the base length comes first, because longer ones reuse its best step sizes."""
    base = nearest(config.n, 128)
    lengths = [base, *sorted(n for n in set(config.n) if n != base)]
    return [
        Part(setting, exponent, k, int(n), n == base)
        for setting in config.settings
        for exponent in SETTINGS[setting].exponents
        for k in config.k
        # With many sequences, the length of each is not what limits the calibration data.
        for n in (lengths if SETTINGS[setting].sequences == 1 else [base])
    ]


def draw_problem(seed: jax.Array, *, part: Part, d: int) -> FusedProblem:
    """Weights and activations of one seed."""
    setting = SETTINGS[part.setting]
    keys = HeadKeys(*jax.random.split(jax.random.key(seed), 5))
    head = RandomHead(
        d=d,
        k=part.k,
        n=part.n,
        sequences=setting.sequences,
        heldout=HELDOUT_SEQUENCES,
        exponent=part.exponent,
        logits_std=setting.logits_std,
    )
    return random_head(keys if part.exponent else keys._replace(rotation=None), head)


def rows_of(
    part: Part, method: str, ratios: Sequence[float], outcome: Outcome, **extra: object
) -> list[dict]:
    """Rows of metrics, one a seed and ratio; ``extra`` may hold arrays ``[seeds, ratios]``."""
    rows = []
    for seed, i in np.ndindex(outcome.calibration_error.shape):
        row = {
            "setting": part.setting,
            "k": part.k,
            "n": part.n,
            "lam": None,
            "ratio": ratios[i],
            "method": method,
            "seed": seed,
            "calibration_error": float(outcome.calibration_error[seed, i]),
            "heldout_error": float(outcome.heldout_error[seed, i]),
            "stored_weights": int(outcome.stored_weights[seed, i]),
            "exponent": part.exponent,
            "learning_rate": None,
        }
        values = {
            name: float(value[seed, i]) if isinstance(value, jax.Array) else value
            for name, value in extra.items()
        }
        rows.append(row | values)
    return rows


def draw_problems(part: Part, config: Config) -> FusedProblem:
    """Those of all seeds."""
    return jax.vmap(partial(draw_problem, part=part, d=config.d))(jnp.arange(config.seeds))


def compute_algorithm1(
    part: Part, config: Config, problems: FusedProblem, pairs: list[tuple[float, list[float]]]
) -> list[dict]:
    """Rows of Algorithm 1; ``pairs`` are λ with the step sizes to try for it."""
    ratios = part.ratios(config)
    lams, rates = zip(*pairs, strict=True)
    found = compare_algorithm1(
        problems,
        jnp.asarray(ratios),
        jnp.asarray(lams),
        jnp.asarray(rates),
        steps=config.steps,
        batch_size=SETTINGS[part.setting].batch_size,
    )
    rows = []
    for lam, (outcome, rate) in zip(lams, found, strict=True):
        rows += rows_of(part, ALGORITHM1, ratios, outcome, lam=lam, learning_rate=rate)
    return rows


def compute_method(part: Part, config: Config, problems: FusedProblem, method: str) -> list[dict]:
    """Rows of one of the other methods."""
    ratios = part.ratios(config)
    return rows_of(part, method, ratios, compare(problems, jnp.asarray(ratios), method=method))


def step_sizes(
    part: Part, config: Config, base_rows: list[dict]
) -> list[tuple[float, list[float]]]:
    """λ and step sizes for Algorithm 1: the whole grid, or for long sequences the best of it.

    Beyond the base length a run costs with the square of n, so only the three pairs of λ and
    step size with the least mean calibration error at the base length are tried.
    """
    base = int(nearest(config.n, 128))
    if part.n <= base:
        lams = config.lam or SETTINGS[part.setting].lam
        return [(lam, [decay / lam for decay in DECAYS]) for lam in lams]
    seen = pd.DataFrame(base_rows)
    ratio = nearest(config.ratio, 0.5)
    seen = seen[(seen["method"] == ALGORITHM1) & (seen["ratio"] == ratio)]
    best = seen.groupby("lam")["calibration_error"].mean().nsmallest(3).index
    return [
        (float(lam), [float(seen[seen["lam"] == lam]["learning_rate"].mode()[0])]) for lam in best
    ]


def choose_lambda(metrics: pd.DataFrame) -> pd.DataFrame:
    """For Algorithm 1 keep, of every seed and point, the λ of least calibration error."""
    point = ["setting", "exponent", "k", "n", "ratio", "method", "seed"]
    return metrics.loc[metrics.groupby(point)["calibration_error"].idxmin()]


def summary(metrics: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard error over seeds at the base length and ratio."""
    chosen = choose_lambda(metrics)
    n, ratio = nearest(chosen["n"].unique(), 128), nearest(chosen["ratio"].unique(), 0.5)
    at = chosen[(chosen["n"] == n) & (chosen["ratio"] == ratio)]
    groups = at.groupby(["setting", "exponent", "k", "method"], sort=False)
    return groups.agg(
        calibration=("calibration_error", "mean"),
        calibration_se=("calibration_error", "sem"),
        heldout=("heldout_error", "mean"),
        heldout_se=("heldout_error", "sem"),
        stored_weights=("stored_weights", "mean"),
        seeds=("seed", "nunique"),
    ).reset_index()


def equal_storage(metrics: pd.DataFrame, tolerance: float = 0.03) -> pd.DataFrame:
    """Held-out errors of fused and separate pruning that store the same number of weights.

    Each ratio of the baselines on W_Q, W_K is set beside the fused ratio whose number of stored
    weights is nearest, where one is within ``tolerance``.
    """
    chosen = choose_lambda(metrics)
    chosen = chosen[chosen["n"] == nearest(chosen["n"].unique(), 128)]
    point = ["setting", "exponent", "k", "method", "ratio"]
    mean = chosen.groupby(point, sort=False)[["heldout_error", "stored_weights"]].mean()
    mean = mean.reset_index()
    # Runs of earlier versions lack methods of later ones.
    methods = [m for m in SHOWN if m in set(mean["method"])]
    rows = []
    for (setting, exponent, k), here in mean.groupby(["setting", "exponent", "k"], sort=False):
        separate = here[here["method"] == "wanda"].set_index("ratio")
        fused = here[here["method"] == "descent"].set_index("ratio")
        for ratio, stored in separate["stored_weights"].items():
            distance = (fused["stored_weights"] - stored).abs() / max(stored, 1)
            if distance.min() > tolerance:
                continue
            at = dict.fromkeys(ON_PROJECTIONS, ratio)
            errors = {
                method: here[
                    (here["method"] == method)
                    & (here["ratio"] == at.get(method, distance.idxmin()))
                ]["heldout_error"].item()
                for method in methods
            }
            rows.append(
                {
                    "setting": setting,
                    "exponent": exponent,
                    "k": k,
                    "stored_weights": round(stored),
                    "separate_ratio": ratio,
                    "fused_ratio": distance.idxmin(),
                    **errors,
                }
            )
    return pd.DataFrame(rows)


def draw(metrics: pd.DataFrame, folder: Path) -> None:
    """One figure for every setting, exponent and k."""
    for (setting, exponent, k), frame in metrics.groupby(["setting", "exponent", "k"], sort=False):
        name = f"figure2_{setting}" + (f"_{exponent:g}" if exponent else "") + f"_k{k}"
        title = f"{setting}, covariance exponent {exponent:g}, k = {k}"
        plotting.save(figure2(frame, title), folder, name)


def figure2(frame: pd.DataFrame, title: str) -> plt.Figure:
    """Rows: λ, n, ratio. Columns: on the calibration sequence, beside fresh ones."""
    n, ratio = nearest(frame["n"].unique(), 128), nearest(frame["ratio"].unique(), 0.5)
    chosen = choose_lambda(frame)
    rows = [
        ("lam", "regularisation λ", frame[(frame["n"] == n) & (frame["ratio"] == ratio)]),
        ("n", "tokens n", chosen[chosen["ratio"] == ratio]),
        ("ratio", "pruning ratio ρ", chosen[chosen["n"] == n]),
    ]
    rows = [row for row in rows if row[2][row[0]].nunique() > 1] or rows[-1:]
    measures = [
        ("calibration_error", "on the calibration sequence"),
        ("heldout_error", "on fresh sequences"),
    ]
    height = 2.5 * len(rows)
    figure, axes = plt.subplots(
        len(rows), 2, figsize=(7.4, height), squeeze=False, sharey=True, sharex="row"
    )
    for (x, x_label, data), cells in zip(rows, axes, strict=True):
        for (measure, label), cell in zip(measures, cells, strict=True):
            cell.set_yscale("log")
            if x != "ratio":
                cell.set_xscale("log", base=10 if x == "lam" else 2)
            cell.set_xlim(_limits(data[x], log=x != "ratio"))
            plotting.curves(cell, data, x, measure, SHOWN)
            cell.set_xlabel(x_label)
            cell.set_title(label, fontsize=9)
        cells[0].set_ylabel("relative error")
    figure.suptitle(
        f"{title}: at n = {n}, ρ = {ratio:g}; mean ± standard error of "
        f"{frame['seed'].nunique()} seeds",
        fontsize=10,
    )
    # Fixed: to find room for labels, `tight_layout` takes as long as all the rest of a figure.
    figure.subplots_adjust(
        left=0.09,
        right=0.99,
        bottom=0.5 / height,
        top=1 - 0.6 / height,
        hspace=0.6,
        wspace=0.05,
    )
    plotting.legend_below(figure, axes[0, 0])
    return figure


def _limits(values: pd.Series, *, log: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.3, high * 1.3
    return low - 0.02, high + 0.02


def report(metrics: pd.DataFrame, run_folder: Path, figures: Path) -> str:
    """Figures, and tables as CSV and Markdown."""
    draw(metrics, figures)
    text = []
    for name, title, table in (
        ("summary", "Equal ratio: relative error, mean and standard error", summary(metrics)),
        ("equal_storage", "Equal stored weights: held-out error", equal_storage(metrics)),
    ):
        write_table(table, run_folder / f"{name}.csv")
        shown = table.to_markdown(index=False, floatfmt=".4g") if len(table) else "(none match)"
        text.append(f"## {title}\n\n{shown}\n")
    return "\n".join(text)


def prepare(config: Config) -> Experiment:
    """The grid of settings."""
    return Experiment(partial(compute_all, config))


class Jobs(NamedTuple):
    """What computes a part: its rows of Algorithm 1, and of each of the other methods."""

    part: Part
    algorithm1: Future[list[dict]]
    others: dict[str, Future[list[dict]]]

    def rows(self, done: Callable[[float], object]) -> list[dict]:
        """All rows, when they are there; ``done`` is told what of the part's cost is."""
        jobs = (self.algorithm1, *(self.others[method] for method in METHODS))
        found = []
        for job in jobs:
            found += job.result()
            done(self.part.cost / len(jobs))
        return found


def start(part: Part, config: Config, pool: Executor, base: Future[list[dict]] | None) -> Jobs:
    """Submit the jobs of a part, the long ones first.

    Args:
      part: to compute.
      config: of the run.
      pool: takes jobs in order, so that one never waits for another that has not begun.
      base: rows of the curve's base length; ``None`` for the base itself.
    """
    problems = pool.submit(draw_problems, part, config)

    def algorithm1() -> list[dict]:
        pairs = step_sizes(part, config, [] if base is None else base.result())
        return compute_algorithm1(part, config, problems.result(), pairs)

    def other(method: str) -> list[dict]:
        return compute_method(part, config, problems.result(), method)

    first = pool.submit(algorithm1)
    others = {method: pool.submit(other, method) for method in reversed(METHODS)}
    return Jobs(part, first, others)


def compute_all(config: Config, run: RunFolder) -> list[dict]:
    """Rows of all parts. Jobs run side by side, as most of their programs use one core."""
    parts = plan(config)
    jobs: dict[Part, Jobs] = {}
    rows_of_base: dict[tuple, Future[list[dict]]] = {}
    rows: list[dict] = []

    def advance(cost: float) -> None:
        bar.update(min(cost, bar.total - bar.n))  # a sum of parts may round to more than all

    form = "{l_bar}{bar}| {elapsed} elapsed, {remaining} left, {rate_fmt}{postfix}"
    with (
        in_background(min(os.cpu_count() or 1, MOST_JOBS)) as pool,
        tqdm(total=sum(part.cost for part in parts), unit="work", bar_format=form) as bar,
    ):
        for part in parts:
            curve = (part.setting, part.exponent, part.k)
            finished = run.finished(part.name)
            if not finished:
                jobs[part] = start(part, config, pool, rows_of_base.get(curve))
            if part.base:
                rows_of_base[curve] = (
                    pool.submit(run.part, part.name, list) if finished else jobs[part].algorithm1
                )
        for part in parts:
            bar.set_postfix_str(part.name)
            if part in jobs:
                rows += run.part(part.name, partial(jobs.pop(part).rows, advance))
            else:  # read back, not computed: it says nothing about the rate
                rows += run.part(part.name, list)
                bar.initial += part.cost
                advance(part.cost)
    return rows


def body(config: Config) -> None:
    """Run, or redraw."""
    run_experiment(config, prepare, report, COLUMNS)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, "synthetic.py")


if __name__ == "__main__":
    sys.exit(main())
