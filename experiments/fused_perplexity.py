"""Perplexity of a Llama whose attention logits come from pruned fused weights, exact under RoPE.

With positions the fused weight of a head depends on the distance of query and key; the same mask
goes on all of them (``jaxprune.methods.rotary``). Masks are learned without positions, as in the
paper, and on the logits of the model (``_rope``); magnitude, Wanda and SparseGPT prune W_Q and
W_K. Masks leave kept weights alone, but for ``descent_rope``, whose kept entries get a factor each.

The cost of the fused logits is d times that of the model's own: for small models. The script says
what it will take and refuses what does not fit.

For example::

  python experiments/fused_perplexity.py --model zoo --calibration zoo --text zoo
  python experiments/fused_perplexity.py --model zoo --calibration paper --text paper
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from jaxtyping import Array
from tqdm import tqdm

from jaxprune import baselines
from jaxprune.errors import InputError
from jaxprune.evaluation import perplexity
from jaxprune.evaluation.comparison import ALGORITHM1, FusedProblem, prune, search_algorithm1
from jaxprune.evaluation.fused_llama import expansion_cost, fused_losses, rotary_heads
from jaxprune.evaluation.heads import Layers, available_memory, from_model
from jaxprune.methods.rotary import RotaryHead, rotary_algorithm1, rotary_descent
from jaxprune.models import llama
from jaxprune.runs import flags, plotting
from jaxprune.runs.folder import RunFolder
from jaxprune.runs.metrics import Columns
from jaxprune.runs.script import Experiment, run_experiment, run_script
from jaxprune.sparsity import Sparsity
from jaxprune.storage import write_arrays
from jaxprune.text.tokenizer import Tokenizer
from jaxprune.text.windows import PRESETS, Windows, evaluation_windows

SEPARATE = ("magnitude", "wanda", "sparsegpt")
WITHOUT_POSITIONS = ("fused_magnitude", "ranking", ALGORITHM1, "descent")
WITH_POSITIONS = ("algorithm1_rope", "descent_rope")
METHODS = (*SEPARATE, *WITHOUT_POSITIONS, *WITH_POSITIONS)
COLUMNS = Columns(
    ("ratio", "perplexity", "stored_weights", "windows", "seqlen"),
    texts=("method", "corpus"),
    known={"method": ("dense", *METHODS)},
)

# Pairs of λ, in units of the gradient, and decay tried by Algorithm 1 on the logits with positions;
# without positions the whole grid most often ends at these.
_MULTIPLES, _DECAYS = (10.0, 10.0, 1.0), (0.003, 0.01, 0.01)


@dataclass(frozen=True, kw_only=True)
class Data(flags.CalibrationWindows, flags.Model):
    """The model, windows to calibrate on, and those that the perplexity is taken on."""

    text: str = "zoo"
    """what the perplexity is taken on, likewise; another file than that of --calibration"""
    eval_windows: flags.Maybe[int] = None
    """windows of --text, from its start; if left out, 32 or as the preset says"""


@dataclass(frozen=True)
class Config:
    """Perplexity with pruned fused weights, exact under RoPE, beside pruned projections.

    Example: python experiments/fused_perplexity.py --model zoo --calibration zoo --text zoo
    """

    ratios: tuple[float, ...] = (0.5, 0.7)
    """fractions removed"""
    methods: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            help="magnitude, wanda, sparsegpt, fused_magnitude, ranking, algorithm1, descent, "
            "algorithm1_rope, descent_rope"
        ),
    ] = METHODS
    steps: int = 300
    """gradient-descent steps of Algorithm 1 without positions"""
    descent_steps: flags.Maybe[int] = None
    """steps of the preset descent without positions; if left out, the preset's"""
    rope_steps: int = 200
    """steps of the methods that learn on the logits with positions"""
    rope_tokens: int = 96
    """tokens, from the start of each window, that those learn on"""
    batch_size: int = 4
    """sequences of a step of Algorithm 1"""
    max_hours: float = 1.0
    """refuse what is estimated to take longer"""
    data: Annotated[Data, flags.MODEL_AND_TEXT] = Data()
    run: Annotated[flags.SeededRun, flags.RUN] = field(
        default=flags.SeededRun(out=Path("runs/fused_perplexity"))
    )

    memory_flags: ClassVar[str] = "--windows, --seqlen or --batch-size"

    def check(self) -> None:
        """Raise ``InputError`` for values that cannot work, before anything is computed."""
        for ratio in self.ratios:
            try:
                Sparsity(ratio)
            except InputError as error:
                raise InputError(f"--ratios {ratio}: {error}") from None
        for method in self.methods:
            if method not in METHODS:
                raise InputError(f"--methods {method}: expected some of {', '.join(METHODS)}")
        if not self.ratios or not self.methods:
            raise InputError("--ratios and --methods: expected at least one value")
        for name in ("steps", "descent_steps", "rope_steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{flags.flag_of(name)}: expected 1 or more")
        if not self.max_hours > 0:
            raise InputError(f"--max-hours {self.max_hours:g}: expected more than 0")
        if self.rope_tokens < 2:
            raise InputError("--rope-tokens: expected 2 or more")
        text = self.data.text
        if text == self.data.calibration and Path(text).is_file():
            raise InputError(f"--text {text}: is what --calibration names; give another file")

    def evaluation(self, tokenizer: Tokenizer) -> Windows:
        """Windows the perplexity is taken on."""
        data = self.data
        windows = data.eval_windows
        if windows is None and data.text not in PRESETS:
            windows = 32
        return evaluation_windows(data.text, tokenizer, windows=windows, seqlen=data.seqlen)


def refuse_what_does_not_fit(
    config: Config, shape: llama.LlamaConfig, windows: int, n: int
) -> None:
    """Print what the fused logits will take.

    Raises:
      InputError: more memory than there is, or more time than ``--max-hours``.
    """
    fused = [m for m in config.methods if m not in SEPARATE]
    evaluated = expansion_cost(shape, windows, n)
    # A step is a forward pass and about twice as much backwards, on a window at a time.
    each_step = 3 * expansion_cost(shape, config.batch_size, min(n, config.rope_tokens)).operations
    runs = {"algorithm1_rope": len(_MULTIPLES), "descent_rope": len(config.ratios)}
    steps = config.rope_steps * sum(runs[m] for m in fused if m in runs)
    operations = evaluated.operations * len(fused) * len(config.ratios) + steps * each_step
    hours = operations / matrix_speed() / 3600
    free, model = available_memory(), f"--model {config.data.model}"
    print(
        f"fused logits: {operations:.2g} operations, about {60 * hours:.1f} minutes here, and "
        f"{evaluated.memory / 2**20:.0f} MiB at once ({free / 2**20:.0f} MiB are free)"
    )
    if fused and evaluated.memory > free:
        raise InputError(
            f"{model}: the fused logits need {evaluated.memory / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free; they are for models of small width"
        )
    if fused and hours > config.max_hours:
        raise InputError(
            f"{model}: the fused logits would take about {hours:.1f} hours, more "
            f"than --max-hours {config.max_hours:g}; fewer --eval-windows, --ratios or --methods "
            "take less"
        )


def matrix_speed(size: int = 1024, repeats: int = 4) -> float:
    """Operations per second of matrix products, measured."""
    a = jnp.ones((size, size))
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    product(a).block_until_ready()
    start = time.perf_counter()
    for _ in range(repeats):
        product(a).block_until_ready()
    return 2 * size**3 * repeats / (time.perf_counter() - start)


def separate_weights(
    problems: FusedProblem, wq: Array, wk: Array, method: str, ratios: Sequence[float]
) -> dict[str, np.ndarray]:
    """Pruned projections of a layer at every ratio."""
    arrays = {}
    for ratio in ratios:
        for name, w in (("wq", wq), ("wk", wk)):
            arguments = (w,) if method == "magnitude" else (problems.x, w)
            pruned = getattr(baselines, method)(*arguments, Sparsity(ratio))
            arrays[f"{ratio:g}-{name}"] = np.asarray(pruned.weight)
    return arrays


def fused_factors(
    problems: FusedProblem, heads: RotaryHead, method: str, config: Config
) -> dict[str, np.ndarray]:
    """Factors ``[heads, d, d]`` of the entries at every ratio: masks, or learned where kept."""
    ratios = jnp.asarray(config.ratios)
    batch = min(config.batch_size, problems.x.shape[0])
    if method in WITH_POSITIONS:
        x = problems.x[:, : config.rope_tokens]
        factors = np.asarray(
            learn_with_positions(x, heads, ratios, method, config.rope_steps, batch)
        )
    elif method == ALGORITHM1:
        (_, (kept,)), _, _ = search_algorithm1(
            problems, ratios, steps=config.steps, batch_size=batch
        )
        factors = np.asarray(kept)
    else:
        factors = np.asarray(
            prune(problems, ratios, method=method, steps=config.descent_steps)[1][0]
        )
    return {f"{ratio:g}": factors[:, i] for i, ratio in enumerate(config.ratios)}


@partial(jax.jit, static_argnames=("method", "steps", "batch"))
def learn_with_positions(
    x: Array, heads: RotaryHead, ratios: Array, method: str, steps: int, batch: int
) -> Array:
    """Factors ``[heads, ratios, d, d]`` learned on the logits with RoPE, one head at a time."""

    def one(weights: tuple[Array, Array]) -> Array:
        head = RotaryHead(*weights, heads.rope)
        if method == "algorithm1_rope":
            return rotary_algorithm1(
                x,
                head,
                ratios,
                multiples=jnp.asarray(_MULTIPLES),
                decays=jnp.asarray(_DECAYS),
                steps=steps,
                batch_size=batch,
            )

        def at_ratio(ratio: Array) -> Array:
            return rotary_descent(x, head, Sparsity(ratio), steps=steps, batch_size=batch)[0]

        return jax.lax.map(at_ratio, ratios)

    return jax.lax.map(one, (heads.wq, heads.wk))


def learn_layer(
    run: RunFolder,
    name: str,
    method: str,
    problems: FusedProblem,
    weights: llama.BlockWeights,
    shape: llama.LlamaConfig,
    config: Config,
) -> list[dict[str, Any]]:
    """One method in one layer: arrays to the part's file, what is stored to its rows."""
    if method in SEPARATE:
        arrays = separate_weights(problems, weights.wq, weights.wk, method, config.ratios)
    else:
        arrays = fused_factors(problems, rotary_heads(weights, shape), method, config)
    write_arrays(run.part_file(name), **arrays)
    return [
        {
            "ratio": ratio,
            "stored": int(
                sum(
                    np.count_nonzero(a)
                    for key, a in arrays.items()
                    if key.split("-")[0] == f"{ratio:g}"
                )
            ),
        }
        for ratio in config.ratios
    ]


def evaluate(
    model: llama.Llama,
    arrays: list[dict[str, np.ndarray]],
    method: str,
    ratio: float,
    text: Windows,
) -> dict[str, Any]:
    """Perplexity with what a method left of every layer."""
    if method in SEPARATE:
        blocks = model.blocks.get_value()
        pruned = {
            name: jnp.stack([jnp.asarray(layer[f"{ratio:g}-{name}"]) for layer in arrays])
            for name in ("wq", "wk")
        }
        model.blocks.set_value(blocks._replace(**pruned))
        try:
            return perplexity.evaluate(model, text)
        finally:
            model.blocks.set_value(blocks)
    factors = jnp.stack([jnp.asarray(layer[f"{ratio:g}"], jnp.float32) for layer in arrays])
    return perplexity.evaluate(
        model, text, batch=4, losses=lambda model, tokens: fused_losses(model, factors, tokens)
    )


def learn(
    run: RunFolder, source: Layers, model: llama.Llama, config: Config, bar: tqdm
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every method in every layer; yields the rows of each part with its name."""
    for layer, problems in source.read():
        weights = model.block_weights(layer)
        for method in config.methods:
            name = f"layer{layer}-{method}"
            bar.set_postfix_str(name)
            compute = partial(
                learn_layer, run, name, method, problems, weights, model.config, config
            )
            yield name, run.part(name, compute)
            bar.update()


def rows_of(
    run: RunFolder, model: llama.Llama, text: Windows, config: Config, stored: dict, bar: tqdm
) -> Iterator[dict[str, Any]]:
    """The perplexity of the dense model, then of every method at every ratio."""
    count = model.config.num_hidden_layers

    def row(name: str, method: str, ratio: float, measure: Any) -> dict[str, Any]:
        bar.set_postfix_str(name)
        result = run.part(name, lambda: [measure()])[0]
        bar.update()
        weights = stored[method, ratio]
        return {"method": method, "ratio": ratio, "stored_weights": weights, **result}

    blocks = model.blocks.get_value()
    stored = stored | {("dense", 0.0): blocks.wq.size + blocks.wk.size}
    yield row("ppl-dense", "dense", 0.0, partial(perplexity.evaluate, model, text))
    for method in config.methods:
        arrays = [run.part_arrays(f"layer{layer}-{method}") for layer in range(count)]
        for ratio in config.ratios:
            measure = partial(evaluate, model, arrays, method, ratio, text)
            yield row(f"ppl-{method}-{ratio:g}", method, ratio, measure)


def table_of(metrics: pd.DataFrame) -> pd.DataFrame:
    """Perplexity, one row a method and one column a ratio."""
    pruned = metrics[metrics["method"] != "dense"]
    table = pruned.pivot_table(index="method", columns="ratio", values="perplexity", sort=False)
    table.columns = [f"{ratio:g}" for ratio in table.columns]
    return table.reset_index()


def draw(metrics: pd.DataFrame) -> plt.Figure:
    """Perplexity against the fraction removed, one line a method."""
    dense = metrics.loc[metrics["method"] == "dense", "perplexity"].item()
    methods = [m for m in METHODS if m in set(metrics["method"])]
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    plotting.curves(axes, metrics, "ratio", "perplexity", methods)
    axes.axhline(dense, color="black", linewidth=0.8, label=f"dense, {dense:.2f}")
    axes.set_yscale("log")
    axes.set_xticks(sorted(set(metrics["ratio"]) - {0.0}))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("fraction removed ρ, of every fused matrix or of W_Q and W_K")
    axes.set_ylabel("perplexity")
    first = metrics.iloc[0]
    axes.set_title(
        f"{first['corpus'].split('/')[-1]}, {first['windows']} windows of {first['seqlen']}",
        fontsize=9,
    )
    figure.tight_layout()
    plotting.legend_below(figure, axes)
    return figure


def report(metrics: pd.DataFrame, folder: Path, figures: Path) -> str:
    """Figure and table."""
    plotting.save(draw(metrics), figures, "perplexity")
    dense = metrics.loc[metrics["method"] == "dense", "perplexity"].item()
    shown = table_of(metrics).to_markdown(index=False, floatfmt=".4f")
    return f"Perplexity (dense: {dense:.4f})\n\n{shown}\n"


def prepare(config: Config) -> Experiment:
    """Read model and texts, and refuse what does not fit."""
    data = config.data
    folder = llama.locate(data.model)
    shape = llama.load_config(folder)
    text = config.evaluation(Tokenizer(folder, shape.vocab_size))
    refuse_what_does_not_fit(config, shape, *text.tokens.shape)
    source = from_model(
        data.model,
        data.calibration,
        windows=data.windows,
        seqlen=data.seqlen,
        seed=config.run.seed,
    )

    def rows(run: RunFolder) -> list[dict[str, Any]]:
        model = llama.load(folder)
        learned = shape.num_hidden_layers * len(config.methods)
        measured = 1 + len(config.methods) * len(config.ratios)
        stored: dict[tuple[str, float], int] = {}
        with tqdm(total=learned + measured, unit="part") as bar:
            for name, new in learn(run, source, model, config, bar):
                method = name.split("-", 1)[1]
                for row in new:
                    point = method, row["ratio"]
                    stored[point] = stored.get(point, 0) + row["stored"]
            return list(rows_of(run, model, text, config, stored, bar))

    return Experiment(rows, source.inputs | {"text": text.hashes()})


def body(config: Config) -> None:
    """Run, or redraw."""
    run_experiment(config, prepare, report, COLUMNS)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, "fused_perplexity.py")


if __name__ == "__main__":
    sys.exit(main())
