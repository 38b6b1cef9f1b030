"""The convergence theorem, measured: its assumptions, its constants and its bound on real runs.

Algorithm 1 runs on synthetic heads (Gaussian x, W_Q, W_K, logits of standard deviation 2) over λ, n
and d, and on the heads of a model. Of every run: loss and gradient norm, whether the descent lemma
held, the PL envelope μ(ξ), the bound T(ε) = 4 L(M_0) / (η μ ε) of Theorem 5.2 (α = 2, g = f) beside
the updates used. ξ is the smallest loss of the run, and only accuracies reached in its first half
are counted, because the rest of the distance to the true minimum is not known.

Example:
  python experiments/convergence.py --n 32 64 --d 16 --seeds 3 --model none --out runs/small
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, cast, get_args

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from tqdm import tqdm

from jaxprune.convergence.curvature import certified_lipschitz, curvature
from jaxprune.convergence.report import report
from jaxprune.convergence.step_sizes import StepRule
from jaxprune.convergence.theorem import iteration_bound, iterations_used, pl_envelope, step_series
from jaxprune.errors import InputError
from jaxprune.evaluation.heads import FusedHeads
from jaxprune.evaluation.synthetic import HeadKeys, RandomHead, random_head
from jaxprune.methods.fused import algorithm1
from jaxprune.objective import mask_loss
from jaxprune.runs import flags, plotting
from jaxprune.runs.configuration import Group
from jaxprune.runs.folder import RunFolder
from jaxprune.runs.metrics import Columns, write_table
from jaxprune.runs.script import Experiment, run_experiment, run_script
from jaxprune.sparsity import Sparsity

LOGITS_STD = 2.0
# Accuracies ε as fractions of L(M_0) − ξ.
ACCURACIES = tuple(float(10**-power) for power in np.arange(0.5, 4.01, 0.25))
SHOWN_ACCURACY = 0.01
COLUMNS = Columns(
    ("lam", "n", "d", "head"),
    texts=("kind", "setting"),
    known={"kind": ("accuracy", "step", "envelope")},
    sparse=("epsilon", "xi_share", "t", "loss", "squared_gradient_norm", "initial_loss"),
)
QUANTITIES = ("used", "operations", "bound", "bound_certified", "mu", "curvature_start")
CANDIDATES = 40  # ξ of an envelope
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "-", "-", "--", ":", "-.")  # curves that coincide stay visible


@dataclass(frozen=True, kw_only=True)
class Data(Group):
    """Heads of a model on one window of a text."""

    model: str = "zoo"
    """heads of a model: zoo, a folder, a .gguf, owner/name on the hub; none leaves them out"""
    calibration: str = "zoo"
    """text whose first window the model's heads see: zoo, a file, c4, wikitext2"""
    seqlen: int = 64
    """tokens of that window"""
    layers: tuple[int, ...] = (0, 2)
    """layers of the model"""


@dataclass(frozen=True)
class Config:
    """Theorem 5.2 on runs of Algorithm 1: descent lemma, PL envelope, iteration bound.

    Example: python experiments/convergence.py --seeds 3 --out runs/convergence
    """

    lam: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    """regularisation λ; the middle one is used where n and d vary"""
    n: tuple[int, ...] = (32, 64, 128, 256)
    """tokens; the one nearest 64 is used where λ and d vary"""
    d: tuple[int, ...] = (16, 32, 64)
    """widths of the model; the one nearest 32 is used where λ and n vary"""
    k: int = 16
    """width of a synthetic head"""
    seeds: int = 5
    """independent synthetic heads"""
    steps: int = 3000
    """updates of a run"""
    step: str = "curvature"
    """step size η: certified, curvature, backtracking, or a number"""
    data: Annotated[Data, flags.MODEL_AND_TEXT] = Data()
    run: Annotated[flags.Run, flags.RUN] = field(default=flags.Run(out=Path("runs/convergence")))

    memory_flags: ClassVar[str] = "--seeds, --n, --d or --seqlen"

    def check(self) -> None:
        """Raise ``InputError`` for values that cannot work, before anything is computed."""
        for name in ("lam", "n", "d"):
            if not getattr(self, name):
                raise InputError(f"--{name}: expected at least one value")
        for name, least in (("n", 1), ("d", 1), ("k", 1), ("seeds", 1), ("steps", 2)):
            values = getattr(self, name)
            smallest = min(values) if isinstance(values, tuple) else values
            if smallest < least:
                raise InputError(f"--{name} {smallest}: expected {least} or more")
        for lam in self.lam:
            flags.check_positive("--lam", lam)
        self.step_size()

    def step_size(self) -> float | StepRule:
        """``--step`` as the descent takes it."""
        if self.step in get_args(StepRule):
            return cast(StepRule, self.step)
        try:
            size = float(self.step)
        except ValueError:
            size = float("nan")
        if not 0 < size < float("inf"):
            rules = ", ".join(get_args(StepRule))
            raise InputError(f"--step {self.step}: expected {rules} or a positive number")
        return size

    @property
    def base(self) -> tuple[float, int, int]:
        """λ, n, d where another one varies."""
        middle = sorted(self.lam)[len(self.lam) // 2]
        return middle, nearest(self.n, 64), nearest(self.d, 32)


def nearest(values: Sequence[int], wanted: int) -> int:
    """The value nearest to what is wanted."""
    return min(values, key=lambda value: abs(value - wanted))


@dataclass(frozen=True)
class Part:
    """Heads that run together: synthetic ones of a shape, or those of a layer (``layer`` ≥ 0)."""

    lam: float
    n: int
    d: int
    layer: int = -1

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.setting}-lam{self.lam:g}-n{self.n}-d{self.d}"

    @property
    def setting(self) -> str:
        """Where its heads are from."""
        return "synthetic" if self.layer < 0 else f"layer{self.layer}"

    @property
    def cost(self) -> float:
        """Rough relative cost, for the progress bar's estimate."""
        return 1 + (self.n / 64) ** 2 * (0.5 + self.d / 64)


def plan(config: Config, width: int | None) -> list[Part]:
    """All parts: λ, n and d in turn around the base, then layers of a model of that width."""
    lam, n, d = config.base
    varied = [Part(value, n, d) for value in config.lam]
    varied += [Part(lam, value, d) for value in config.n]
    varied += [Part(lam, n, value) for value in config.d]
    if width is not None:
        varied += [
            Part(lam, config.data.seqlen, width, layer) for layer in sorted(set(config.data.layers))
        ]
    return list(dict.fromkeys(varied))


def synthetic_heads(part: Part, config: Config) -> tuple[jax.Array, jax.Array]:
    """``x [heads, 1, n, d]`` and fused ``w [heads, d, d]`` with logits of standard deviation 2."""

    def one(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, wq, wk = jax.random.split(jax.random.key(seed), 3)
        head = random_head(HeadKeys(wq, wk, x), RandomHead(d=part.d, k=config.k, n=part.n))
        return head.x, head.w * (LOGITS_STD / jnp.linalg.norm(head.w))

    return jax.vmap(one)(jnp.arange(config.seeds))


def compute(
    part: Part, config: Config, heads: Callable[[], tuple[jax.Array, jax.Array]]
) -> list[dict]:
    """Rows of a part, told apart by ``kind``: ``accuracy``, ``step`` and ``envelope``."""
    x, w = heads()

    def one(x: jax.Array, w: jax.Array) -> tuple:
        result = algorithm1(
            x,
            w,
            lam=part.lam,
            learning_rate=config.step_size(),
            sparsity=Sparsity(0.5),
            steps=config.steps,
            monitor=True,
        )
        loss = partial(mask_loss, x=x, w=w, lam=part.lam)
        curved = [curvature(loss, mask).value for mask in (jnp.ones_like(w), result.state.variable)]
        return result.trace, jnp.stack(curved), certified_lipschitz(x, w, part.lam)

    trace, curved, lipschitz = jax.jit(jax.vmap(one))(x, w)
    checked, series = report(trace, lipschitz=lipschitz), step_series(trace)
    fractions = jnp.asarray(ACCURACIES)
    rows = []
    for head in range(w.shape[0]):
        r, s = (jax.tree.map(lambda a, head=head: a[head], t) for t in (checked, series))
        point = {"setting": part.setting, "lam": part.lam, "n": part.n, "d": part.d, "head": head}
        run = {
            "xi": float(r.xi),
            "mu": float(r.mu),
            "initial_loss": float(r.initial_loss),
            "eta": float(r.step_size_low),
            "eta_high": float(r.step_size_high),
            "certified_lipschitz": float(r.lipschitz),
            "curvature_start": float(curved[head, 0]),
            "curvature_end": float(curved[head, 1]),
            "lemma_broken": int(r.lemma_broken),
            "not_finite": int(r.not_finite),
            "smallest_ratio": float(r.smallest_ratio),
        }
        epsilon = fractions * (r.initial_loss - r.xi)
        used = iterations_used(s.loss[: config.steps // 2], r.xi, epsilon)
        bound = iteration_bound(r.mu, epsilon, r.step_size_low, r.initial_loss)
        certified = iteration_bound(r.mu, epsilon, 1 / r.lipschitz, r.initial_loss)
        for i, fraction in enumerate(ACCURACIES):
            values = {"epsilon": fraction, "used": float(used[i]), "bound": float(bound[i])}
            values["bound_certified"] = float(certified[i])
            rows.append({"kind": "accuracy", **point, **run, **values})
        rows += step_rows(point, s)
        xis = jnp.linspace(0, 1, CANDIDATES) * 0.98 * r.initial_loss
        mus = pl_envelope(s.loss[:-1], s.squared_gradient_norm, xis)
        rows += [
            {"kind": "envelope", **point, "xi_share": float(xi / r.initial_loss), "mu": float(mu)}
            for xi, mu in zip(xis, mus, strict=True)
        ]
    return rows


def step_rows(point: dict, series: object) -> list[dict]:
    """Loss, gradient and step ratio at about a hundred steps, evenly spaced in their logarithm."""
    loss, squares, _, ratio, size, _ = (np.asarray(a) for a in cast(tuple, series))
    chosen = np.unique(np.geomspace(1, len(squares), 100).astype(int) - 1)
    return [
        {
            "kind": "step",
            **point,
            "t": int(t),
            "loss": float(loss[t]),
            "squared_gradient_norm": float(squares[t]),
            "step_ratio": float(ratio[t]),
            "eta_t": float(size[t]),
        }
        for t in chosen
    ]


def exponents(metrics: pd.DataFrame) -> pd.DataFrame:
    """Slope of log(updates used) against log(1/ε): mean over heads and a 95% interval.

    The theorem promises at most 1. The slope is that over the range measured: where convergence
    is linear, updates grow with log(1/ε) and the slope falls as the range is extended. The interval
    is Student's, over heads.
    """
    reached = reached_by_all(metrics)
    rows = []
    for point, frame in reached.groupby(["setting", "lam", "n", "d"], sort=False):
        fitted = slopes(frame.assign(inverse=1 / frame["epsilon"]), "inverse", "used")
        if fitted:
            row = dict(zip(("setting", "lam", "n", "d"), cast(tuple, point), strict=True))
            rows.append(row | mean_and_interval(fitted))
    return pd.DataFrame(rows, columns=["setting", "lam", "n", "d", "exponent", "low", "high"])


def dependence(metrics: pd.DataFrame) -> pd.DataFrame:
    """Exponents in λ, n and d of the synthetic heads: updates at one accuracy, and the constants.

    The paper has time O(d·poly(n)/ε); here time is counted in ``operations``. Slopes as in
    ``exponents``, over values of λ, n or d at which every head has a finite quantity.
    """
    base = dict(zip(("lam", "n", "d"), at_base(metrics), strict=True))
    rows = []
    for variable in base:
        here = varied(at_shown_accuracy(metrics), variable, base)
        for quantity in QUANTITIES:
            useful = np.isfinite(here[quantity]) & (here[quantity] > 0)
            frame = here[useful.groupby(here[variable]).transform("all")]
            fitted = slopes(frame, variable, quantity)
            if fitted:
                row = {"variable": variable, "quantity": quantity}
                rows.append(row | mean_and_interval(fitted))
    return pd.DataFrame(rows, columns=["variable", "quantity", "exponent", "low", "high"])


def at_shown_accuracy(metrics: pd.DataFrame) -> pd.DataFrame:
    """Rows of the synthetic heads at the accuracy that tables and figures show."""
    rows = metrics[(metrics["kind"] == "accuracy") & (metrics["setting"] == "synthetic")]
    rows = rows[np.isclose(rows["epsilon"], SHOWN_ACCURACY)]
    return rows.assign(operations=rows["used"] * operations(rows["n"], rows["d"]))


def operations(n: pd.Series, d: pd.Series) -> pd.Series:
    """Multiplications and additions of one update's matrix products.

    ``Q = x(M∘w)``, ``Q xᵀ``, ``P x`` and ``xᵀ(P x)``, two for each entry that is multiplied; what
    the step rule tries besides is not counted.
    """
    return 4 * n * d * (n + d)


def varied(rows: pd.DataFrame, variable: str, base: dict[str, float]) -> pd.DataFrame:
    """Rows at the base in all of λ, n, d but ``variable``."""
    others = [key for key in base if key != variable]
    return rows[(rows[others] == pd.Series(base)[others]).all(axis=1)]


def slopes(frame: pd.DataFrame, x: str, y: str) -> list[float]:
    """Slope of log(y) against log(x) of every head that has three points or more."""
    return [
        float(np.polyfit(np.log(run[x]), np.log(run[y]), 1)[0])
        for _, run in frame.groupby("head")
        if run[x].nunique() >= 3
    ]


def mean_and_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean of the heads' exponents with Student's 95% interval (NaN for one head)."""
    mean = float(np.mean(values))
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    half = student(len(values)) * error
    return {"exponent": mean, "low": mean - half, "high": mean + half}


def reached_by_all(metrics: pd.DataFrame) -> pd.DataFrame:
    """Rows of accuracies that every head of a point reached, after at least one update.

    Leaving out only the heads that did not reach one would favour the quick ones.
    """
    rows = metrics[metrics["kind"] == "accuracy"]
    useful = np.isfinite(rows["used"]) & (rows["used"] > 0)
    keys = [rows[name] for name in ("setting", "lam", "n", "d", "epsilon")]
    return rows[useful.groupby(keys).transform("all")]


def student(count: int) -> float:
    """97.5% quantile of Student's t for the mean of ``count`` values (NaN for one).

    An expansion about the normal quantile (Abramowitz & Stegun 26.7.5), within 1% from 4 values
    on; 2 and 3 are tabulated.
    """
    freedom = count - 1
    if freedom < 3:
        return {0: float("nan"), 1: 12.706, 2: 4.303}[freedom]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return float(z + first / freedom + second / freedom**2 + third / freedom**3)


def summary(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row a point: constants, checks, and updates at one accuracy; medians over heads."""
    runs = metrics[metrics["kind"] == "accuracy"]
    runs = runs[np.isclose(runs["epsilon"], SHOWN_ACCURACY)]
    groups = runs.groupby(["setting", "lam", "n", "d"], sort=False)
    table = groups.agg(
        heads=("head", "nunique"),
        lemma_held=("lemma_broken", lambda first: int((first < 0).sum())),
        smallest_ratio=("smallest_ratio", "min"),
        eta=("eta", "median"),
        curvature_start=("curvature_start", "median"),
        curvature_end=("curvature_end", "median"),
        certified_lipschitz=("certified_lipschitz", "median"),
        mu=("mu", "median"),
        used=("used", "median"),
        bound=("bound", "median"),
        bound_certified=("bound_certified", "median"),
    ).reset_index()
    return table.merge(exponents(metrics), on=["setting", "lam", "n", "d"], how="left")


def at_base(metrics: pd.DataFrame) -> tuple[float, int, int]:
    """λ, n and d of most synthetic points: where the others vary."""
    points = metrics[metrics["setting"] == "synthetic"][["lam", "n", "d"]].drop_duplicates()
    middle = (points[name].mode()[0] for name in ("lam", "n", "d"))
    lam, n, d = middle
    return float(lam), int(n), int(d)


def series(metrics: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """What one curve is drawn for: synthetic heads by λ, a model's by layer."""
    lam, n, d = at_base(metrics)
    synthetic = metrics[
        (metrics["setting"] == "synthetic") & (metrics["n"] == n) & (metrics["d"] == d)
    ]
    curves = [(f"synthetic, λ = {value:g}", frame) for value, frame in synthetic.groupby("lam")]
    # Least, middle and largest λ: more curves than that hide each other.
    curves = [curves[i] for i in sorted({0, len(curves) // 2, len(curves) - 1})]
    models = metrics[metrics["setting"] != "synthetic"]
    return curves + [
        (f"model, {str(name).replace('layer', 'layer ')}, λ = {lam:g}", frame)
        for name, frame in models.groupby("setting")
    ]


def middle_and_range(axes: Axes, frame: pd.DataFrame, x: str, y: str, **style: object) -> None:
    """Median over heads as a line, smallest to largest as a band.

    Infinity is a value as any other: what most heads did not reach has no point, what some did
    not reach has no band.
    """
    groups = frame.groupby(x)[y]
    median, high = (values.replace(np.inf, np.nan) for values in (groups.median(), groups.max()))
    color = style["color"]
    axes.plot(median.index, median, linewidth=1.3, **style)  # type: ignore[arg-type]
    axes.fill_between(
        median.index.to_numpy(), groups.min(), high, color=color, alpha=0.12, linewidth=0
    )


def draw_curves(metrics: pd.DataFrame) -> plt.Figure:
    """Distance to ξ, gradient and step ratio against the step."""
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.3))
    for color, dash, (name, frame) in zip(COLORS, DASHES, series(metrics), strict=False):
        look = {"color": color, "linestyle": dash}
        xi = frame[frame["kind"] == "accuracy"].groupby("head")["xi"].first()
        steps = frame[frame["kind"] == "step"].copy()
        steps["gap"] = steps["loss"] - steps["head"].map(xi)
        # The run's own minimum is ξ: the last distances are zero by definition. So near to it that
        # a distance is rounding it counts as zero, and a curve ends where most heads are there.
        settled = steps["gap"] <= 16 * np.finfo(np.float32).eps * steps["loss"]
        steps["gap"] = steps["gap"].mask(settled, 0)
        gaps = steps[steps["t"] < steps["t"].max() / 2]
        gaps = gaps[gaps.groupby("t")["gap"].transform("median") > 0]
        steps["t"] += 1
        gaps = gaps.assign(t=gaps["t"] + 1)
        middle_and_range(axes[0], gaps, "t", "gap", label=name, **look)
        middle_and_range(axes[1], steps, "t", "squared_gradient_norm", **look)
        # Further on, the decrease of a step is rounding.
        falling = gaps[gaps["gap"] > 1e-3 * gaps["loss"]]
        if len(falling):
            middle_and_range(axes[2], falling, "t", "step_ratio", **look)
    axes[2].axhline(1, color="black", linewidth=1, linestyle="--")
    axes[2].annotate(
        "descent lemma: at least 1",
        (0.03, 1.02),
        (0, 2),
        fontsize=8,
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
    )
    for cell, label in zip(
        axes,
        (
            r"$L(M_t) - \xi$",
            r"$\|\nabla L(M_t)\|^2$",
            r"$(L(M_t) - L(M_{t+1})) \,/\, \frac{\eta}{2}\|G_t\|^2$",
        ),
        strict=True,
    ):
        cell.set_xscale("log")
        cell.set_xlabel("step $t + 1$")
        cell.set_ylabel(label)
    axes[0].set_yscale("log")
    axes[1].set_yscale("log")
    axes[2].set_ylim(0.9, 2.05)
    return finished(figure, axes[0])


def draw_envelope(metrics: pd.DataFrame) -> plt.Figure:
    """PL envelope against ξ."""
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for color, dash, (name, frame) in zip(COLORS, DASHES, series(metrics), strict=False):
        envelope = frame[frame["kind"] == "envelope"]
        middle_and_range(axes, envelope, "xi_share", "mu", color=color, linestyle=dash, label=name)
        runs = frame[frame["kind"] == "accuracy"].groupby("head").first()
        axes.plot(runs["xi"] / runs["initial_loss"], runs["mu"], "o", color=color, markersize=3.5)
    axes.set_yscale("log")
    # Below the smallest loss visited μ is as small as the last gradient: no need to see how small.
    axes.set_ylim(bottom=max(1e-6, axes.get_ylim()[0]))
    axes.annotate(
        "left of a dot, $\\xi$ is below every loss visited\n"
        "and the last, smallest gradient decides",
        (0.98, 0.04),
        fontsize=8,
        ha="right",
        xycoords="axes fraction",
    )
    axes.set_xlabel(r"$\xi \,/\, L(M_0)$ (dots, one a head: $\xi$ = smallest loss of the run)")
    axes.set_ylabel(r"$\mu(\xi) = \min_{t:\,L(M_t) > \xi}\, 2\|\nabla L(M_t)\|^2 / (L(M_t) - \xi)$")
    return finished(figure, axes)


def draw_bound(metrics: pd.DataFrame) -> plt.Figure:
    """Updates used and the bound against 1/ε."""
    shown = series(metrics)
    figure, axes = plt.subplots(
        1, len(shown), figsize=(2.6 * len(shown) + 0.5, 3.3), sharey=True, squeeze=False
    )
    fitted = exponents(metrics).set_index(["setting", "lam", "n", "d"])
    for cell, (name, frame) in zip(axes[0], shown, strict=True):
        runs = frame[frame["kind"] == "accuracy"].assign(inverse=lambda f: 1 / f["epsilon"])
        point = tuple(runs.iloc[0][["setting", "lam", "n", "d"]])
        reached = reached_by_all(runs)
        if len(reached):
            middle_and_range(
                cell,
                reached,
                "inverse",
                "used",
                color=COLORS[0],
                label="used",
                marker="o",
                markersize=3,
            )
        for column, color, dash, label in (
            ("bound", COLORS[1], "--", r"$T(\varepsilon)$, $\eta$ of the run"),
            ("bound_certified", COLORS[2], ":", r"$T(\varepsilon)$, $\eta = 1/L_2$ certified"),
        ):
            middle_and_range(
                cell, runs, "inverse", column, color=color, linestyle=dash, label=label
            )
        title = name
        if point in fitted.index:
            fit = fitted.loc[point]
            interval = f"[{fit['low']:.2f}, {fit['high']:.2f}]"
            title += f"\nused ∝ $(1/ε)^{{{fit['exponent']:.2f}}}$, 95%: {interval}"
        cell.set_title(title, fontsize=8.5)
        cell.set_xscale("log")
        cell.set_yscale("log")
        cell.set_xlabel(r"$(L(M_0) - \xi)\,/\,\varepsilon$")
    axes[0, 0].set_ylabel(r"updates $T$ to reach $L \leq \xi + \varepsilon$")
    return finished(figure, axes[0, 0])


def draw_dependence(metrics: pd.DataFrame) -> plt.Figure:
    """Updates, bound and constants against λ, n and d."""
    base = dict(zip(("lam", "n", "d"), at_base(metrics), strict=True))
    runs = at_shown_accuracy(metrics)
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), sharey="row", sharex="col")
    fitted = dependence(metrics)
    upper = (
        ("used", "updates used", "-", "o"),
        ("bound", r"$T(\varepsilon)$, $\eta$ of the run", "--", "s"),
        ("bound_certified", r"$T(\varepsilon)$, $\eta = 1/L_2$ certified", ":", "^"),
    )
    lower = (
        ("curvature_start", r"$\lambda_{\max}(\nabla^2 L(M_0))$, measured", "-", "o"),
        ("certified_lipschitz", r"$L_2$ certified", "--", "s"),
        ("mu", r"$\mu(\xi)$ of the run", ":", "^"),
    )
    for column, (name, symbol) in enumerate((("lam", "λ"), ("n", "n"), ("d", "d"))):
        others = [key for key in base if key != name]
        here = varied(runs, name, base)
        for row, lines in enumerate((upper, lower)):
            cell = axes[row, column]
            for color, (value, label, dash, marker) in zip(COLORS, lines, strict=False):
                middle_and_range(
                    cell,
                    here,
                    name,
                    value,
                    color=color,
                    linestyle=dash,
                    marker=marker,
                    markersize=4,
                    label=label,
                )
            if row == 1:
                places = sorted(here[name].unique())
                alone = [4 * (value if name == "lam" else base["lam"]) for value in places]
                cell.plot(
                    places,
                    alone,
                    color="black",
                    linewidth=0.8,
                    label=r"$4\lambda$: $\mu$ of the penalty",
                )
            cell.set_xscale("log", base=10 if name == "lam" else 2)
            cell.set_yscale("log")
        title = ", ".join(f"{'λ' if key == 'lam' else key} = {base[key]:g}" for key in others)
        for quantity in ("used", "operations"):
            fit = fitted[(fitted["variable"] == name) & (fitted["quantity"] == quantity)]
            for _, result in fit.iterrows():
                interval = f"[{result['low']:.2f}, {result['high']:.2f}]"
                title += f"\n{quantity} ∝ ${symbol}^{{{result['exponent']:.2f}}}$, 95%: {interval}"
        axes[0, column].set_title(title, fontsize=8)
        axes[1, column].set_xlabel(symbol)
    axes[0, 0].set_ylabel(
        "updates to reach $L \\leq \\xi + \\varepsilon$,\n"
        rf"$\varepsilon = {SHOWN_ACCURACY:g}\,(L(M_0) - \xi)$"
    )
    axes[1, 0].set_ylabel(r"$L_2$ and $\mu$ of the theorem")
    for row in range(2):
        axes[row, 2].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def finished(figure: plt.Figure, axes: Axes) -> plt.Figure:
    """The figure with one legend under it."""
    figure.tight_layout()
    plotting.legend_below(figure, axes)
    return figure


def report_on(metrics: pd.DataFrame, folder: Path, figures: Path) -> str:
    """Figures, and the table on file and terminal."""
    for name, draw in (
        ("curves", draw_curves),
        ("envelope", draw_envelope),
        ("bound", draw_bound),
        ("dependence", draw_dependence),
    ):
        plotting.save(draw(metrics), figures, name)
    table = summary(metrics)
    write_table(table, folder / "summary.csv")
    text = (
        "## Theorem 5.2 on runs of Algorithm 1\n\nMedians over heads. `lemma_held`: heads whose "
        "descent lemma held at every step. `used`, `bound`: updates to come within "
        f"{SHOWN_ACCURACY:g} (L(M_0) − ξ) of ξ, and T(ε) for η, μ, ξ of the run "
        "(`bound_certified`: for η = 1/L₂). `exponent`: used ∝ (1/ε)^exponent, with a 95% "
        "interval over heads; the theorem has 1, and where convergence is linear it falls towards "
        "0 as ε does.\n\n" + table.to_markdown(index=False, floatfmt=".3g") + "\n"
    )
    fitted = dependence(metrics)
    if len(fitted):
        text += (
            "\n`quantity` ∝ `variable`^`exponent` on the synthetic heads, with a 95% interval over "
            "heads; the paper has time O(d·poly(n)/ε). `operations`: updates used times "
            "4nd(n + d), the matrix products of one.\n\n"
            + fitted.to_markdown(index=False, floatfmt=".3g")
            + "\n"
        )
    return text


def prepare(config: Config) -> Experiment:
    """Read the model."""
    data = config.data
    model = None
    if data.model != "none":
        model = FusedHeads(data.model, data.calibration, seqlen=data.seqlen, layers=data.layers)
    parts = plan(config, None if model is None else model.config.hidden_size)

    def rows(run: RunFolder) -> list[dict]:
        rows: list[dict] = []
        form = "{l_bar}{bar}| {elapsed} elapsed, {remaining} left{postfix}"
        with tqdm(total=sum(part.cost for part in parts), bar_format=form) as bar:
            for part in parts:
                bar.set_postfix_str(part.name)
                done = run.finished(part.name)
                heads = partial(synthetic_heads, part, config)
                if part.layer >= 0 and model is not None:
                    heads = partial(model.heads, part.layer)
                rows += run.part(part.name, partial(compute, part, config, heads))
                if done:  # read back, not computed: it says nothing about the rate
                    bar.initial += part.cost
                bar.update(part.cost)
        return rows

    return Experiment(rows, {} if model is None else model.inputs)


def body(config: Config) -> None:
    """Run, or redraw."""
    run_experiment(config, prepare, report_on, COLUMNS)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, "convergence.py")


if __name__ == "__main__":
    sys.exit(main())
