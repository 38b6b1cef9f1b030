"""Pruning error of every attention head of a real model, method by method (Figures 1 and 3).

The fused weight of each head is ``W = W_Q W_Kᵀ/√k``, grouped-query heads paired with the key head
they share; positions (RoPE) are left out, as in the paper. Wanda and SparseGPT prune ``W_Q`` and
``W_K`` instead. Algorithm 1 chooses λ and step size on the calibration error, from a grid that
follows the size of its gradient; where that would take more than an hour, it is left out unless
it is asked for. Besides the ratios asked for, fused matrices are pruned to what ``W_Q`` and
``W_K`` store at the middle ratio.

A model goes layer by layer: activations of one layer and keep masks of one method in it are held.

For example::

  jaxprune heads --model zoo --calibration zoo --out runs/zoo_heads
  jaxprune heads --input layer.npz --ratios 0.3 0.5 0.7 --out runs/heads
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from matplotlib.colors import LogNorm
from tqdm import tqdm

from jaxprune.attention import attention_matrix
from jaxprune.errors import InputError
from jaxprune.evaluation.comparison import (
    ALGORITHM1,
    METHODS,
    ON_PROJECTIONS,
    FusedProblem,
    Pruned,
    judge,
    prune,
    search_algorithm1,
    search_operations,
)
from jaxprune.evaluation.heads import Layers, fitting_heads, from_file, from_model
from jaxprune.models import llama
from jaxprune.models.llama.checkpoint import context_note
from jaxprune.runs import flags, plotting
from jaxprune.runs.configuration import Group, flat
from jaxprune.runs.folder import RunFolder
from jaxprune.runs.metrics import Columns, write_table
from jaxprune.runs.script import Experiment, notice, run_experiment, run_script
from jaxprune.sparsity import Sparsity
from jaxprune.storage import read_arrays, write_arrays, write_json

SHOWN = (ALGORITHM1, *METHODS)
# Those of version 0.1.
SHOWN_BEFORE = (ALGORITHM1, "wanda", "sparsegpt", "fused_magnitude", "ranking", "descent")
COLUMNS = Columns(
    ("layer", "head", "ratio", "calibration_error", "heldout_error", "stored_weights"),
    texts=("method",),
    known={"method": SHOWN},
)
# Operations of Algorithm 1 a second on one CPU core, as measured on layers of Llama-3.2-1B's shape,
# and hours from which it is left out of what is run by default. Other machines are faster; that the
# choice is the same on all of them lets a run go on elsewhere.
_CORE_SPEED, _HOURS = 6e10, 1.0
EXAMPLE = "attention.npz"
EXAMPLE_METHODS = (ALGORITHM1, "wanda", "sparsegpt", "gauss_newton")
EXAMPLE_TOKENS = 48
# In the arrays of a part, beside its masks.
_ATTENTION = "attention"


@dataclass(frozen=True, kw_only=True)
class Data(flags.Dtype, flags.HeldoutWindows):
    """A model and windows of text, or a layer in a file."""

    model: flags.Maybe[str] = None
    """zoo, a Hugging Face folder, a .gguf file, or owner/name on the hub; zoo without --input"""
    layers: flags.Several[int] = ()
    """layers of the model, counted from 0; if left out, all"""
    heads: flags.Maybe[int] = None
    """only the first heads of each layer; if left out, all"""
    input: Annotated[
        Path | None,
        tyro.conf.arg(
            help="instead of a model, an .npz with the arrays of one layer: x [b, n, d], wq "
            "[d, heads, k], wk [d, kv_heads, k], and x_heldout [c, m, d] (without it, the last "
            "quarter of the sequences is held out)",
            help_behavior_hint="",
        ),
    ] = None

    @property
    def model_or_default(self) -> str | None:
        """The model, ``None`` where a layer comes from a file."""
        return None if self.input is not None else self.model or "zoo"


@dataclass(frozen=True, kw_only=True)
class HeadBatch(Group):
    """How much is computed at once."""

    head_batch: flags.Maybe[int] = None
    """heads pruned together; if left out, as many as half of the free memory holds"""


@dataclass(frozen=True)
class Config:
    """Relative attention error of every head against the ratio, held-out beside calibration.

    Example: jaxprune heads --model zoo --calibration zoo --out runs/zoo_heads
    """

    ratios: tuple[float, ...] = (0.3, 0.5, 0.7)
    """fractions removed"""
    methods: Annotated[
        tuple[str, ...] | None,
        tyro.conf.arg(
            help=f"some of {', '.join(SHOWN)}; if left out, all, but algorithm1 only where it "
            "takes less than an hour on a CPU core",
            help_behavior_hint="",
        ),
    ] = None
    steps: int = 300
    """gradient-descent steps of Algorithm 1"""
    batch_size: int = 4
    """sequences of a step of Algorithm 1"""
    descent_steps: flags.Maybe[int] = None
    """steps of the preset descent; if left out, the preset's"""
    example: Annotated[
        tuple[int, int] | None,
        tyro.conf.arg(
            help="layer and head whose attention matrices are drawn (Figure 1); if left out, the "
            "first head of the middle layer",
            help_behavior_hint="",
        ),
    ] = None
    data: Annotated[Data, flags.MODEL_AND_TEXT] = Data()
    devices: Annotated[HeadBatch, flags.DEVICES_AND_MEMORY] = HeadBatch()
    run: Annotated[flags.SeededRun, flags.RUN] = field(
        default=flags.SeededRun(out=Path("runs/llama_heads"))
    )

    memory_flags: ClassVar[str] = "--head-batch, --windows or --batch-size"
    earlier: ClassVar[Mapping[str, Any]] = {"methods": SHOWN_BEFORE}

    def check(self) -> None:
        """Raise ``InputError`` for values that cannot work, before anything is computed."""
        data = self.data
        if data.input is not None and data.model is not None:
            raise InputError("--model or --input: expected one of them, see --help")
        # Runs that were begun when such flags were accepted go on.
        if data.input is not None and not self.run.resume and self.run.repeat is None:
            self._check_of_a_file()
        for ratio in self.ratios:
            try:
                Sparsity(ratio)
            except InputError as error:
                raise InputError(f"--ratios {ratio}: {error}") from None
        for method in self.methods or ():
            if method not in SHOWN:
                raise InputError(f"--methods {method}: expected some of {', '.join(SHOWN)}")
        if not self.ratios or self.methods == ():
            raise InputError("--ratios and --methods: expected at least one value")
        values = flat(self)
        for name in ("heads", "head_batch", "steps", "batch_size", "descent_steps"):
            if values[name] is not None and values[name] < 1:
                raise InputError(f"{flags.flag_of(name)}: expected 1 or more")

    def _check_of_a_file(self) -> None:
        """Raise ``InputError`` for flags that say what to take of a model."""
        standing = flat(Data())
        for name, value in flat(self.data).items():
            if name not in ("model", "input", "heads") and value != standing[name]:
                raise InputError(
                    f"{flags.flag_of(name)}: has no effect with --input, which holds one layer "
                    "with its activations; leave it out"
                )

    @property
    def chosen(self) -> tuple[str, ...]:
        """The methods that are run; see ``with_methods``."""
        return self.methods or ()

    @property
    def middle(self) -> float:
        """The ratio that single numbers are shown at."""
        return middle_of(self.ratios)

    def source(self) -> Layers:
        """Where the layers come from.

        Raises:
          InputError: nothing usable there, or no such layer or head.
        """
        data, model = self.data, self.data.model_or_default
        if model is None:
            assert data.input is not None
            try:
                result = from_file(data.input)
            except InputError as error:
                raise InputError(f"--input {error}") from None
        else:
            result = from_model(
                model,
                data.calibration,
                windows=data.windows,
                seqlen=data.seqlen,
                heldout=data.heldout,
                layers=data.layers,
                seed=self.run.seed,
                dtype=data.dtype,
            )
        if data.heads is not None:
            result = replace(result, heads=min(data.heads, result.heads))
        layer, head = self.example_of(result)
        if layer not in result.indices or not 0 <= head < result.heads:
            raise InputError(
                f"--example {layer} {head}: expected one of the layers {result.indices} and a head "
                f"below {result.heads}"
            )
        return result

    def example_of(self, source: Layers) -> tuple[int, int]:
        """Layer and head of Figure 1."""
        middle = source.indices[len(source.indices) // 2]
        return (middle, 0) if self.example is None else self.example


def hours_of_algorithm1(config: Config, source: Layers) -> float:
    """What Algorithm 1 takes on all heads, estimated for one CPU core."""
    one = search_operations(source.n, source.d, steps=config.steps, batch_size=config.batch_size)
    return one * source.heads * len(source.indices) / _CORE_SPEED / 3600


def with_methods(config: Config, source: Layers) -> Config:
    """The configuration with methods: those asked for, or all that do not take too long."""
    if config.methods is not None:
        return config
    hours = hours_of_algorithm1(config, source)
    if hours <= _HOURS:
        return replace(config, methods=SHOWN)
    rest = tuple(method for method in SHOWN if method != ALGORITHM1)
    notice(
        f"{ALGORITHM1} is left out, it would take about {hours:.0f} hours on a CPU core; "
        f"--methods {ALGORITHM1} {' '.join(rest)} asks for it"
    )
    return replace(config, methods=rest)


def middle_of(ratios: Sequence[float]) -> float:
    """The middle one, of which there may be two."""
    return sorted(ratios)[len(ratios) // 2]


def ratios_of(method: str, config: Config, source: Layers) -> list[float]:
    """Ratios of a method: those asked for; of a fused matrix also that of equal storage."""
    matched = None if method in ON_PROJECTIONS else source.matched_ratio(config.middle)
    return sorted({*config.ratios, *([] if matched is None else [matched])})


def prune_heads(
    problems: FusedProblem, method: str, ratios: Sequence[float], config: Config
) -> tuple[Pruned, jax.Array]:
    """Pruned weights ``[heads, ratios]``, keep masks, and the λ used (NaN where there is none)."""
    values = jnp.asarray(ratios)
    if method == ALGORITHM1:
        batch = min(config.batch_size, problems.x.shape[0])
        pruned, lam, _ = search_algorithm1(problems, values, steps=config.steps, batch_size=batch)
        return pruned, lam
    pruned = prune(problems, values, method=method, steps=config.descent_steps)
    return pruned, jnp.full(pruned[0].shape[:2], jnp.nan)


@dataclass(frozen=True)
class Part:
    """One method on some heads of a layer, computed and saved as a whole."""

    layer: int
    method: str
    heads: range
    ratios: tuple[float, ...]

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"layer{self.layer}-{self.method}-heads{self.heads.start}-{self.heads.stop}"


def heads_together(run: RunFolder, config: Config, source: Layers, method: str) -> int:
    """How many heads are pruned at once: as many as in what is finished, else what fits now."""
    if config.devices.head_batch is not None:
        return config.devices.head_batch
    for first in run.path.glob(f"parts/layer*-{method}-heads0-*.json"):
        return int(first.stem.rpartition("-")[2])
    return fitting_heads(source, len(ratios_of(method, config, source)))


def plan(config: Config, source: Layers, layer: int, method: str, together: int) -> list[Part]:
    """Parts of a method in a layer."""
    ratios = tuple(ratios_of(method, config, source))
    return [
        Part(layer, method, range(start, min(start + together, source.heads)), ratios)
        for start in range(0, source.heads, together)
    ]


def compute(
    run: RunFolder, part: Part, problems: FusedProblem, config: Config, example: int | None
) -> list[dict]:
    """Rows of one part; its keep masks go beside, and the attention of the head of Figure 1."""
    chosen = problems.heads(slice(part.heads.start, part.heads.stop))
    (weight, keep_masks), lam = prune_heads(chosen, part.method, part.ratios, config)
    outcome = judge(chosen, weight, keep_masks)
    sides = ("w",) if len(keep_masks) == 1 else ("wq", "wk")
    points = [
        (i, head, j, ratio)
        for i, head in enumerate(part.heads)
        for j, ratio in enumerate(part.ratios)
    ]
    arrays = {
        f"{part.method}-{ratio:g}-layer{part.layer}-head{head}-{side}": np.asarray(mask[i, j])
        for side, mask in zip(sides, keep_masks, strict=True)
        for i, head, j, ratio in points
    }
    if example is not None and example in part.heads and part.method in EXAMPLE_METHODS:
        pruned = weight[part.heads.index(example), part.ratios.index(config.middle)]
        arrays[_ATTENTION] = example_attention(problems, pruned)
    write_arrays(run.part_file(part.name), **arrays)
    return [
        {
            "layer": part.layer,
            "head": head,
            "method": part.method,
            "ratio": ratio,
            "calibration_error": float(outcome.calibration_error[i, j]),
            "heldout_error": float(outcome.heldout_error[i, j]),
            "stored_weights": int(outcome.stored_weights[i, j]),
            "lam": None if np.isnan(lam[i, j]) else float(lam[i, j]),
        }
        for i, head, j, ratio in points
    ]


def example_attention(problems: FusedProblem, w: jax.Array) -> np.ndarray:
    """Attention matrix of a head on the beginning of the first held-out window."""
    return np.asarray(attention_matrix(problems.x_heldout[0, :EXAMPLE_TOKENS], w))


def compute_layer(
    run: RunFolder,
    problems: FusedProblem,
    layer: int,
    config: Config,
    source: Layers,
    together: Mapping[str, int],
    advance: Callable[[str], None],
) -> Iterator[dict]:
    """Rows of a layer; the masks of each method in it end in one file."""
    example_layer, head = config.example_of(source)
    example = head if layer == example_layer else None
    attention: dict[str, np.ndarray] = {}
    for method in config.chosen:
        masks: dict[str, np.ndarray] = {}
        for part in plan(config, source, layer, method, together[method]):
            work = partial(compute, run, part, problems, config, example)
            yield from run.part(part.name, work)
            arrays = run.part_arrays(part.name)
            if _ATTENTION in arrays:
                attention[method] = arrays.pop(_ATTENTION)
            masks |= arrays
            advance(part.name)
        write_arrays(run.path / f"keep_masks-layer{layer}-{method}.npz", **masks)
    if attention:
        dense = example_attention(problems, problems.heads(slice(head, head + 1)).w[0])
        named = {"layer": layer, "head": head, "ratio": config.middle}
        write_arrays(run.path / EXAMPLE, dense=dense, **attention, **named)


def summary(metrics: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread over heads, and the best and the worst head by name."""
    groups = metrics.groupby(["ratio", "method"], sort=False)
    error = groups["heldout_error"]
    table = groups.agg(
        calibration=("calibration_error", "mean"),
        heldout=("heldout_error", "mean"),
        heldout_se=("heldout_error", "sem"),
        heldout_p10=("heldout_error", lambda e: e.quantile(0.1)),
        heldout_median=("heldout_error", "median"),
        heldout_p90=("heldout_error", lambda e: e.quantile(0.9)),
        stored_weights=("stored_weights", "mean"),
        heads=("head", "size"),
    ).reset_index()
    for name, rows in (("best", error.idxmin()), ("worst", error.idxmax())):
        named = metrics.loc[rows, ["ratio", "method", "layer", "head", "heldout_error"]]
        named.columns = ["ratio", "method", f"{name}_layer", f"{name}_head", f"heldout_{name}"]
        table = table.merge(named, on=["ratio", "method"])
    return table


def equal_storage(metrics: pd.DataFrame) -> pd.DataFrame:
    """Methods that store the same number of weights as Wanda, by the ratio of Wanda.

    Fused ratios count where they store within 1% of it.
    """
    mean = metrics.groupby(["method", "ratio"], sort=False).mean(numeric_only=True).reset_index()
    rows = []
    for _, wanda in mean[mean["method"] == "wanda"].iterrows():
        stored = wanda["stored_weights"]
        close = mean[(mean["stored_weights"] - stored).abs() <= 0.01 * stored]
        if set(close["method"]) - set(ON_PROJECTIONS):
            rows += [
                {
                    "stored_weights": row["stored_weights"],
                    "method": row["method"],
                    "ratio": row["ratio"],
                    "calibration": row["calibration_error"],
                    "heldout": row["heldout_error"],
                }
                for _, row in close.iterrows()
            ]
    return pd.DataFrame(rows)


def methods_in(metrics: pd.DataFrame) -> list[str]:
    """Methods of a run in the order they are shown in."""
    return [m for m in SHOWN if m in set(metrics["method"])]


def asked_ratios(metrics: pd.DataFrame) -> list[float]:
    """The ratios that all methods have, without those of equal storage alone."""
    per_method = [set(rows["ratio"]) for _, rows in metrics.groupby("method")]
    return sorted(set.intersection(*per_method))


def draw_curves(metrics: pd.DataFrame) -> plt.Figure:
    """Figure 3: error against the ratio, calibration and held-out, and against what is stored."""
    methods = methods_in(metrics)
    at = metrics[metrics["ratio"].isin(asked_ratios(metrics))]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True)
    panels = (
        ("calibration, equal ratio", "ratio", "calibration_error", at),
        ("held-out, equal ratio", "ratio", "heldout_error", at),
        ("held-out, equal storage", "stored_weights", "heldout_error", metrics),
    )
    for cell, (title, x, measure, frame) in zip(axes, panels, strict=True):
        plotting.curves(cell, frame, x, measure, methods, band="deciles")
        cell.set_title(title)
        cell.set_xlabel("fraction removed ρ" if x == "ratio" else "stored weights of a head")
    axes[2].set_xscale("log", base=2)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("relative error of the attention matrix")
    heads = metrics.groupby(["layer", "head"]).ngroups
    figure.suptitle(
        f"mean over {heads} heads; band: from the first to the ninth decile", fontsize=9
    )
    figure.tight_layout()
    plotting.legend_below(figure, axes[0])
    return figure


def draw_map(metrics: pd.DataFrame) -> plt.Figure:
    """Held-out error of every head at the middle ratio, one map for each method."""
    methods, ratio = methods_in(metrics), middle_of(asked_ratios(metrics))
    at = metrics[metrics["ratio"] == ratio]
    columns = min(3, len(methods))
    rows = -(-len(methods) // columns)
    layer_count, heads = at["layer"].nunique(), at["head"].nunique()
    size = (
        1.2 + columns * (0.8 + 0.28 * min(heads, 16)),
        rows * (0.9 + 0.28 * min(layer_count, 16)),
    )
    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    shown = at["heldout_error"].clip(lower=1e-6)
    norm = LogNorm(shown.min(), shown.max() * 1.0001)
    for cell in axes.flat[len(methods) :]:
        cell.set_visible(False)
    for cell, method in zip(axes.flat, methods, strict=False):
        here = at[at["method"] == method]
        table = here.pivot_table(index="layer", columns="head", values="heldout_error")
        image = cell.imshow(table.clip(lower=1e-6), aspect="auto", cmap="cividis", norm=norm)
        cell.set_title(plotting.style(method).label, fontsize=8)
        cell.set_yticks(range(len(table)), table.index)
        step = -(-heads // 16)
        cell.set_xticks(range(0, heads, step), table.columns[::step])
        cell.grid(False)
    figure.supxlabel("query head", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    figure.colorbar(image, ax=axes, label=f"held-out relative error, ρ = {ratio:g}")
    return figure


def draw_example(arrays: dict[str, np.ndarray]) -> plt.Figure:
    """Figure 1: how far attention matrices of one head are from the dense one, and themselves."""
    dense = arrays["dense"]
    # Runs of version 0.1 have the descent in place of the closed form.
    methods = [m for m in (*EXAMPLE_METHODS, "descent") if m in arrays]
    errors = {m: np.abs(arrays[m] - dense) for m in methods}
    figure, axes = plt.subplots(
        2,
        1 + len(methods),
        figsize=(2.3 * (1 + len(methods)) + 0.6, 5.0),
        squeeze=False,
        layout="constrained",
    )
    # The square root keeps faint weights visible beside those near one.
    root = partial(plt.matplotlib.colors.PowerNorm, 0.5, 0)
    top = max(e.max() for e in errors.values())
    difference = {"cmap": "magma", "norm": root(top)}
    scale = {"cmap": "viridis", "norm": root(1)}
    axes[0, 0].set_visible(False)
    image = axes[1, 0].imshow(dense, **scale)
    axes[1, 0].set_title("dense", fontsize=9)
    for column, method in enumerate(methods, start=1):
        upper = axes[0, column].imshow(errors[method], **difference)
        relative = np.sum(errors[method] ** 2) / np.sum(dense**2)
        label = plotting.style(method).label
        axes[0, column].set_title(f"{label}\nrelative error {relative:.3g}", fontsize=9)
        axes[1, column].imshow(arrays[method], **scale)
    for cell in axes.flat:
        cell.grid(False)
        cell.set_xticks([])
        cell.set_yticks([])
    axes[1, 0].set_ylabel("query")
    axes[1, 0].set_xlabel("key")
    figure.colorbar(upper, ax=axes[0, :], label="|difference from dense|")
    figure.colorbar(image, ax=axes[1, :], label="attention")
    figure.suptitle(
        f"layer {arrays['layer']}, head {arrays['head']}, ρ = {arrays['ratio']:g}: first "
        f"{len(dense)} tokens of a held-out window",
        fontsize=10,
    )
    return figure


def report(metrics: pd.DataFrame, folder: Path, figures: Path) -> str:
    """Figures and tables."""
    plotting.save(draw_curves(metrics), figures, "figure3")
    plotting.save(draw_map(metrics), figures, "heads")
    if (folder / EXAMPLE).exists():
        arrays = read_arrays(folder / EXAMPLE, "make the run anew")
        plotting.save(draw_example(arrays), figures, "figure1")
    heads, storage = summary(metrics), equal_storage(metrics)
    for name, table in (("summary", heads), ("equal_storage", storage)):
        write_table(table, folder / f"{name}.csv")
    named = [c for c in heads if "best" in c or "worst" in c]
    text = []
    for title, table in (
        ("Equal ratio: relative error over heads", heads.drop(columns=named)),
        ("Best and worst heads, held-out", heads[["ratio", "method", *named]]),
        ("Equal stored weights: mean relative error", storage),
    ):
        shown = table.to_markdown(index=False, floatfmt=".4g") if len(table) else "(none match)"
        text.append(f"## {title}\n\n{shown}\n")
    return "\n".join(text)


def prepare(config: Config) -> Experiment:
    """Read what the heads are taken from, and choose the methods."""
    source = config.source()
    config, model = with_methods(config, source), config.data.model_or_default
    if model is not None:
        notice(context_note(llama.locate(model), source.n))

    def rows(run: RunFolder) -> list[dict[str, Any]]:
        write_json(run.path / "protocol.json", source.protocol)
        rows: list[dict[str, Any]] = []
        # Once for all layers: what is free changes while a run goes on.
        together = {m: heads_together(run, config, source, m) for m in config.chosen}
        total = sum(
            len(plan(config, source, layer, method, together[method]))
            for layer in source.indices
            for method in config.chosen
        )
        with tqdm(total=total, unit="part") as bar:

            def advance(name: str) -> None:
                bar.set_postfix_str(name)
                bar.update()

            for layer, problems in source.read():
                rows += compute_layer(run, problems, layer, config, source, together, advance)
        return rows

    return Experiment(rows, source.inputs)


def body(config: Config) -> None:
    """Run, or redraw."""
    run_experiment(config, prepare, report, COLUMNS)


def main(argv: Sequence[str] | None = None, *, prog: str = "jaxprune heads") -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, prog)
