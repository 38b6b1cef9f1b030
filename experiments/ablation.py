"""What each part of the preset ``descent`` is worth: W_Q and W_K pruned with one part changed.

Each variant prunes the model, at every sparsity and seed, and is judged on text that it was not
calibrated on: relative error of the attention matrices, Kullback-Leibler divergence of the
predictions from the dense model's, and perplexity less that of the dense model. The divergence
is the quietest of the three.

For example::

  python experiments/ablation.py --model zoo --calibration zoo --out runs/ablation
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import ticker
from tqdm import tqdm

from jaxprune.errors import InputError
from jaxprune.evaluation import perplexity
from jaxprune.models import llama
from jaxprune.models.llama.files import checkpoint_hashes
from jaxprune.pipeline.model import Progress, PruneSettings, prune_model, units
from jaxprune.runs import flags, plotting
from jaxprune.runs.folder import RunFolder
from jaxprune.runs.metrics import Columns
from jaxprune.runs.script import Experiment, run_experiment, run_script
from jaxprune.sparsity import Sparsity
from jaxprune.text import corpora
from jaxprune.text.tokenizer import Tokenizer
from jaxprune.text.windows import Windows, calibration_windows, evaluation_windows


class Variant(NamedTuple):
    """One row of the table: what is changed, in words and in ``PruneSettings``."""

    description: str
    changes: dict[str, Any]


def _tuned(**fields: Any) -> dict[str, Any]:
    return {"tuning": fields}


VARIANTS = {
    "descent": Variant("preset descent", {}),
    "attention_only": Variant("attention matrices alone, not the output", _tuned(output_weight=0)),
    "dense_activations": Variant("calibrated on the dense model", {"propagate": False}),
    "even_columns": Variant("every output column keeps as many", _tuned(columns_compete=False)),
    "slow_schedule": Variant("mask final after 0.8 of the steps", _tuned(tightened=0.8)),
    "one_shot": Variant("mask final from the first step, then refit", _tuned(tightened=0.0)),
    "small_steps": Variant("a third of the step size", _tuned(learning_rate=0.05)),
    "no_distillation": Variant("no distillation at the end", {"distill": 0}),
    "mask_only": Variant("kept weights untouched (--no-refit)", {"refit": False}),
    "wanda": Variant("Wanda", {"method": "wanda"}),
    "sparsegpt": Variant("SparseGPT", {"method": "sparsegpt"}),
    "magnitude": Variant("magnitude", {"method": "magnitude"}),
}
MEASURES = {
    "divergence": "divergence (nats)",
    "perplexity_gap": "perplexity above the dense model's",
    "heldout_error": "held-out attention error",
}
COLUMNS = Columns(
    ("seed", "calibration_error", *MEASURES),
    texts=("variant", "sparsity"),
    known={"variant": VARIANTS},
)


@dataclass(frozen=True, kw_only=True)
class Data(flags.CalibrationWindows, flags.Model):
    """The model, windows to calibrate on, and the text to judge by."""

    text: flags.Maybe[str] = None
    """text to judge by; if left out, that of --calibration, after what was calibrated on"""


@dataclass(frozen=True)
class Config:
    """Prune with one part of the preset changed at a time, and compare.

    Example: python experiments/ablation.py --model zoo --calibration zoo --out runs/ablation
    """

    sparsity: tuple[str, ...] = ("0.7", "2:4")
    """fractions removed, or N:M patterns"""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """rows of the table"""
    seeds: int = 2
    """seeds of every descent's batches; baselines have none"""
    steps: int = 400
    """steps of a descent in every block"""
    distill: flags.Maybe[int] = None
    """steps of distillation at the end; if left out, the preset's"""
    data: Annotated[Data, flags.MODEL_AND_TEXT] = Data(windows=128, seqlen=256)
    run: Annotated[flags.Run, flags.RUN] = field(default=flags.Run(out=Path("runs/ablation")))

    memory_flags: ClassVar[str] = "--windows or --seqlen"

    def check(self) -> None:
        """Raise ``InputError`` for values that cannot work, before anything is computed."""
        for name in self.variants:
            if name not in VARIANTS:
                raise InputError(f"--variants {name}: expected some of {', '.join(VARIANTS)}")
        for value in self.sparsity:
            Sparsity.parse(value)
        for name in ("seeds", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}: expected 1 or more")


class Material(NamedTuple):
    """What all cells of the table share."""

    folder: Path
    shape: llama.LlamaConfig
    calibration: Windows
    heldout: Windows
    text: Windows
    reference: llama.Llama
    dense_perplexity: float


def read_text(config: Config, tokenizer: Tokenizer, used: int) -> Windows:
    """Windows to evaluate on: of a running text, those after the ``used`` first."""
    data = config.data
    source = data.text or data.calibration
    windows = evaluation_windows(source, tokenizer, seqlen=data.seqlen)
    if source != data.calibration or source in corpora.NAMED:
        return windows
    if len(windows.tokens) <= used:
        raise InputError(
            f"--calibration {source}: nothing is left after {used} windows; use --text"
        )
    return replace(
        windows,
        tokens=windows.tokens[used:],
        protocol=windows.protocol | {"windows": len(windows.tokens) - used, "after": used},
    )


def read(config: Config) -> Material:
    """Load and check everything, and measure the dense model."""
    data = config.data
    folder = llama.locate(data.model)
    shape = llama.load_config(folder)
    for sparsity in config.sparsity:
        settings_of("descent", sparsity, 0, config).check(shape)
    tokenizer = Tokenizer(folder, shape.vocab_size)
    calibration, heldout = calibration_windows(
        data.calibration, tokenizer, windows=data.windows, seqlen=data.seqlen
    )
    text = read_text(config, tokenizer, len(calibration.tokens) + len(heldout.tokens))
    reference = llama.load(folder)
    dense = perplexity.evaluate(reference, text)["perplexity"]
    return Material(folder, shape, calibration, heldout, text, reference, dense)


def settings_of(variant: str, sparsity: str, seed: int, config: Config) -> PruneSettings:
    """The pipeline's settings for one cell of the table."""
    plain = PruneSettings(
        method="descent", targets="qk", sparsity=Sparsity.parse(sparsity), steps=config.steps
    )
    changes = VARIANTS[variant].changes
    settings = replace(plain, seed=seed, **changes)
    if settings.refits and "distill" not in changes:
        settings = replace(settings, distill=config.distill)
    return settings


def plan(config: Config) -> list[tuple[str, str, int]]:
    """All cells of the table; a baseline has one seed."""
    return [
        (variant, sparsity, seed)
        for sparsity in config.sparsity
        for variant in config.variants
        for seed in range(1 if "method" in VARIANTS[variant].changes else config.seeds)
    ]


def compute(
    cell: tuple[str, str, int],
    config: Config,
    material: Material,
    run: RunFolder,
    progress: Callable[[Progress], None],
) -> list[dict[str, Any]]:
    """Prune once, and judge."""
    variant, sparsity, seed = cell
    model, started = llama.load(material.folder), time.monotonic()
    settings = settings_of(variant, sparsity, seed, config)
    work = RunFolder(run.path / "work", settings, resume=True)
    rows: list[dict[str, Any]] = []
    with work:
        for _, _, new in prune_model(
            model, material.calibration.tokens, material.heldout.tokens, settings, work, progress
        ):
            rows += new
        seconds = time.monotonic() - started
    reached = perplexity.evaluate(model, material.text)["perplexity"]
    row = {
        "variant": variant,
        "sparsity": sparsity,
        "seed": seed,
        "calibration_error": float(np.mean([row["calibration_error"] for row in rows])),
        "heldout_error": float(np.mean([row["heldout_error"] for row in rows])),
        "divergence": perplexity.divergence(model, material.reference, material.text),
        "perplexity_gap": reached - material.dense_perplexity,
        "dense_perplexity": material.dense_perplexity,
        "seconds": seconds,
    }
    work.remove()
    return [row]


def table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds, and half the range where there are several."""
    groups = metrics.groupby(["sparsity", "variant"], sort=False)

    def cell(values: pd.Series) -> str:
        spread = f" ± {(values.max() - values.min()) / 2:.4f}" if len(values) > 1 else ""
        return f"{values.mean():.4f}{spread}"

    shown = groups[list(MEASURES)].agg(cell).rename(columns=MEASURES).reset_index()
    shown["variant"] = shown["variant"].map(lambda name: VARIANTS[name].description)
    return shown


def draw(metrics: pd.DataFrame) -> plt.Figure:
    """One panel a sparsity: divergence of every variant, a dot for each seed."""
    sparsities = list(dict.fromkeys(metrics["sparsity"]))
    variants = list(dict.fromkeys(metrics["variant"]))
    figure, axes = plt.subplots(
        1,
        len(sparsities),
        figsize=(3.2 + 2.6 * len(sparsities), 0.9 + 0.27 * len(variants)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for cell, sparsity in zip(axes[0], sparsities, strict=True):
        rows = metrics[metrics["sparsity"] == sparsity]
        for place, variant in enumerate(variants):
            values = rows.loc[rows["variant"] == variant, "divergence"]
            cell.plot(values, [place] * len(values), "o", color="#0072B2", markersize=4)
        base = rows.loc[rows["variant"] == "descent", "divergence"]
        if len(base):
            cell.axvline(base.mean(), color="black", linewidth=0.8)
        cell.set_xscale("log")
        cell.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
        cell.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        cell.xaxis.set_minor_formatter(ticker.NullFormatter())
        cell.set_title(f"sparsity {sparsity}")
        cell.set_xlabel("divergence from the dense model (nats)")
    axes[0, 0].set_yticks(range(len(variants)), [VARIANTS[v].description for v in variants])
    axes[0, 0].invert_yaxis()
    return figure


def report(metrics: pd.DataFrame, folder: Path, figures: Path) -> str:
    """Figure and table."""
    plotting.save(draw(metrics), figures, "ablation")
    return table(metrics).to_markdown(index=False) + "\n"


def prepare(config: Config) -> Experiment:
    """Read model and texts."""
    material = read(config)
    inputs = {
        "model": checkpoint_hashes(material.folder),
        "calibration": material.calibration.hashes(),
        "text": material.text.hashes(),
    }
    return Experiment(partial(compute_all, config, material), inputs)


def compute_all(config: Config, material: Material, run: RunFolder) -> list[dict[str, Any]]:
    """Rows of all cells."""
    cells, rows = plan(config), []
    steps = [units(settings_of(*cell, config), material.shape) for cell in cells]
    with tqdm(total=sum(steps), unit="chunk") as bar:
        for i, cell in enumerate(cells):
            name = "-".join(map(str, cell)).replace(":", "of")

            def progress(where: Progress, before: int = sum(steps[:i])) -> None:
                bar.update(before + where.done - bar.n)

            bar.set_postfix_str(name)
            rows += run.part(name, partial(compute, cell, config, material, run, progress))
            bar.update(sum(steps[: i + 1]) - bar.n)
    return rows


def body(config: Config) -> None:
    """Run, or redraw."""
    run_experiment(config, prepare, report, COLUMNS)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, "ablation.py")


if __name__ == "__main__":
    sys.exit(main())
