"""What each part of the method is worth: a model pruned with one part changed.

Each variant prunes the model, at every sparsity and seed, in a process of its own, and is judged on
text that it was not calibrated on: relative error of the attention matrices, Kullback-Leibler
divergence of the predictions from the dense model's, and perplexity less that of the dense model,
with the time and memory that it took. That divergence is the quietest of the three.

``--start dense`` is the ablation of version 0.1, whose descent began from dense weights.

For example::

  python experiments/ablation.py --model zoo --calibration zoo --out runs/ablation
  python experiments/ablation.py --targets all --sparsity 0.5 --out runs/ablation-all
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import ticker
from tqdm import tqdm

from jaxprune.errors import InputError
from jaxprune.evaluation import perplexity
from jaxprune.models import llama
from jaxprune.models.llama.files import checkpoint_hashes
from jaxprune.pipeline import CurvatureSettings, Progress, PruneSettings, prune_model, units
from jaxprune.runs import flags, plotting
from jaxprune.runs.child import in_child, peak_memory
from jaxprune.runs.duration import estimate
from jaxprune.runs.folder import RunFolder
from jaxprune.runs.metrics import Columns
from jaxprune.runs.script import Experiment, run_experiment, run_script
from jaxprune.sparsity import Sparsity
from jaxprune.storage import read_arrays, write_arrays
from jaxprune.text.tokenizer import Tokenizer
from jaxprune.text.windows import Windows, calibration_windows, unseen_windows

# The finished run whose times tell how long another one takes.
MEASURED = Path("docs/headline")


class Variant(NamedTuple):
    """One row of the table.

    Attributes:
      description: what is changed, in words.
      changes: of ``PruneSettings``.
      start: the only ``--start`` that it is a variant of.
      targets: the only ``--targets`` that have it.
      windows: of calibration that it takes.
    """

    description: str
    changes: dict[str, Any]
    start: str | None = None
    targets: str | None = None
    windows: int | None = None

    def misfit(self, config: Config) -> str | None:
        """The flag that the variant needs otherwise, if there is one."""
        if self.start not in (None, config.start):
            return f"--start {self.start}"
        if self.targets not in (None, config.targets):
            return f"--targets {self.targets}"
        if self.windows is not None and self.windows > (config.data.windows or 128):
            return f"--windows {self.windows} or more"
        return None


def _tuned(**fields: Any) -> dict[str, Any]:
    return {"tuning": fields}


def _closed(**changes: Any) -> dict[str, Any]:
    return {"method": "gauss-newton", **changes}


def _retrained(method: str) -> dict[str, Any]:
    return {"method": method, "refit": True, "distill": 300}


def _blocks(outputs: int) -> dict[str, Any]:
    return _closed(curvature=CurvatureSettings(outputs=outputs))


VARIANTS = {
    "descent": Variant("preset descent", {}),
    # What the closed form measures errors by.
    "closed_form": Variant("closed form alone", _closed()),
    "predictions": Variant(
        "closed form on the curvature of the predictions",
        _closed(metric="predictions"),
        targets="qk",
    ),
    "admm": Variant("closed form on what the maps give (ADMM)", {"method": "admm"}),
    "curvature_blocks": Variant(
        "closed form, curvature in blocks of 64 outputs", _blocks(64), targets="all"
    ),
    "curvature_diagonal": Variant("closed form, curvature a diagonal", _blocks(1), targets="all"),
    "no_correction": Variant(
        "closed form, W_O and W_down take nothing back", _closed(correction=0.0), targets="all"
    ),
    "full_correction": Variant(
        "closed form, W_O and W_down take all back", _closed(correction=1.0), targets="all"
    ),
    # What shares the budget of zeros.
    "block_budget": Variant("closed form, one budget a block", _closed(allocate="block")),
    "model_budget": Variant("closed form, one budget for the model", _closed(allocate="model")),
    "descent_block_budget": Variant(
        "descent, one budget a block", {"allocate": "block"}, "gauss-newton"
    ),
    "descent_longer": Variant(
        "descent, one budget a block, 600 steps of distillation",
        {"allocate": "block", "distill": 600},
        "gauss-newton",
    ),
    "rounds": Variant(
        "closed form, a second round on the curvature of the first's model too",
        _closed(rounds=2),
        targets="all",
    ),
    "descent_rounds": Variant(
        "descent, one budget a block, a second round",
        {"allocate": "block", "rounds": 2},
        "gauss-newton",
        "all",
    ),
    # How long kept weights adapt.
    "steps_25": Variant("25 steps a block", {"steps": 25}, "gauss-newton"),
    "steps_400": Variant("400 steps a block", {"steps": 400}, "gauss-newton"),
    "no_distillation": Variant("no distillation at the end", {"distill": 0}),
    "distillation": Variant("300 steps of distillation at the end", {"distill": 300}),
    "mask_only": Variant("kept weights untouched (--no-refit)", {"refit": False}, targets="qk"),
    # Where the descent begins, and what its steps are.
    "gradual": Variant("from dense weights, by a tightening mask", {"start": "dense"}),
    "attention_only": Variant(
        "attention matrices alone, not the output", _tuned(output_weight=0), targets="qk"
    ),
    "dense_activations": Variant(
        "calibrated on the dense model", {"propagate": False}, targets="qk"
    ),
    "even_columns": Variant(
        "every output column keeps as many", _tuned(columns_compete=False), targets="qk"
    ),
    "slow_schedule": Variant(
        "mask final after 0.8 of the steps", _tuned(tightened=0.8), "dense", "qk"
    ),
    "one_shot": Variant(
        "mask final from the first step, then refit", _tuned(tightened=0.0), "dense", "qk"
    ),
    "small_steps": Variant("a third of the step size", _tuned(learning_rate=0.05), "dense", "qk"),
    # How much text it is calibrated on.
    **{
        f"windows_{count}": Variant(f"{count} windows of calibration", {}, windows=count)
        for count in (8, 16, 32, 64)
    },
    "generated_text": Variant(
        "closed form, 64 windows more that the model writes", _closed(generated=64)
    ),
    "generated_steps": Variant(
        "512 windows more that the model writes, most of them for steps",
        {"generated": 512},
        "gauss-newton",
    ),
    "wanda": Variant("Wanda", {"method": "wanda"}),
    "sparsegpt": Variant("SparseGPT", {"method": "sparsegpt"}),
    "magnitude": Variant("magnitude", {"method": "magnitude"}),
    # What the same retraining makes of other masks; beside "distillation".
    "wanda_retrained": Variant("Wanda, then refit and 300 of distillation", _retrained("wanda")),
    "sparsegpt_retrained": Variant(
        "SparseGPT, then refit and 300 of distillation", _retrained("sparsegpt")
    ),
    "admm_retrained": Variant("ADMM, then refit and 300 of distillation", _retrained("admm")),
}
# The variants of version 0.1.
_EARLIER = (
    *("descent", "attention_only", "dense_activations", "even_columns", "slow_schedule"),
    *("one_shot", "small_steps", "no_distillation", "mask_only"),
    *("wanda", "sparsegpt", "magnitude"),
)
MEASURES = {
    "divergence": "KL divergence (nats)",
    "perplexity_gap": "perplexity above the dense model's",
    "heldout_error": "held-out attention error",
    "seconds": "seconds",
    "peak_memory": "peak GiB",
}
_DIGITS = {"seconds": 0, "peak_memory": 2}
COLUMNS = Columns(
    ("seed", "calibration_error", "divergence", "perplexity_gap", "heldout_error"),
    texts=("variant", "sparsity"),
    known={"variant": VARIANTS},
    optional=("resumed",),
)


@dataclass(frozen=True, kw_only=True)
class Data(flags.CalibrationWindows, flags.Model):
    """The model, windows to calibrate on, and the text to judge by."""

    text: flags.Maybe[str] = None
    """text to judge by; if left out, that of --calibration, after what was calibrated on"""


@dataclass(frozen=True)
class Config:
    """Prune with one part of the method changed at a time, and compare.

    Example: python experiments/ablation.py --model zoo --calibration zoo --out runs/ablation
    """

    targets: Literal["qk", "all"] = "qk"
    """qk (W_Q and W_K) or all (the seven linear maps of a block)"""
    start: Literal["gauss-newton", "dense"] = "gauss-newton"
    """what descent goes on from: the closed form, or dense weights as in version 0.1"""
    sparsity: tuple[str, ...] = ("0.7", "2:4")
    """fractions removed, or N:M patterns, for which no budget is shared"""
    variants: flags.Several[str] = ()
    """rows of the table; if left out, all that there are for --targets, --start and --windows"""
    seeds: int = 2
    """seeds of every row in which there is chance"""
    steps: flags.Maybe[int] = None
    """steps of a descent in every block; if left out, the preset's"""
    distill: flags.Maybe[int] = None
    """steps of distillation at the end; if left out, the preset's"""
    data: Annotated[Data, flags.MODEL_AND_TEXT] = Data(windows=128, seqlen=256)
    run: Annotated[flags.Run, flags.RUN] = field(default=flags.Run(out=Path("runs/ablation")))

    memory_flags: ClassVar[str] = "--windows or --seqlen"
    free: ClassVar[tuple[str, ...]] = ("variants",)
    earlier: ClassVar[Mapping[str, Any]] = {"start": "dense", "steps": 400, "variants": _EARLIER}

    def check(self) -> None:
        """Raise ``InputError`` for values that cannot work, before anything is computed."""
        for name in self.variants:
            if name not in VARIANTS:
                raise InputError(f"--variants {name}: expected some of {', '.join(VARIANTS)}")
            need = VARIANTS[name].misfit(self)
            if need is not None:
                raise InputError(f"--variants {name}: only with {need}")
        for value in self.sparsity:
            Sparsity.parse(value)
        if self.seeds < 1:
            raise InputError("--seeds: expected 1 or more")
        if self.steps is not None and self.steps < 1:
            raise InputError("--steps: expected 1 or more")

    @property
    def chosen(self) -> list[str]:
        """Names of the variants."""
        return list(self.variants) or [n for n, v in VARIANTS.items() if v.misfit(self) is None]


class Material(NamedTuple):
    """What all cells of the table share, as a child needs it."""

    config: Config
    folder: Path
    calibration: Windows
    heldout: Windows
    text: Windows
    dense: Path


def read(config: Config) -> Material:
    """Load and check everything but the weights."""
    data = config.data
    folder = llama.locate(data.model)
    shape = llama.load_config(folder)
    for cell in plan(config):
        settings_of(*cell, config).check(shape)
    tokenizer = Tokenizer(folder, shape.vocab_size)
    calibration, heldout = calibration_windows(
        data.calibration, tokenizer, windows=data.windows, seqlen=data.seqlen
    )
    text = unseen_windows(
        data.text,
        tokenizer,
        calibration=data.calibration,
        seen=calibration.tokens.size + heldout.tokens.size,
        seqlen=calibration.tokens.shape[1],
    )
    return Material(config, folder.resolve(), calibration, heldout, text, Path())


def settings_of(variant: str, sparsity: str, seed: int, config: Config) -> PruneSettings:
    """The pipeline's settings for one cell of the table."""
    plain = PruneSettings(
        method="descent",
        targets=config.targets,
        sparsity=Sparsity.parse(sparsity),
        start=config.start,
        steps=config.steps,
    )
    changes = VARIANTS[variant].changes
    settings = replace(plain, seed=seed, **changes)
    if settings.refits and "distill" not in changes:
        settings = replace(settings, distill=config.distill)
    return settings


def plan(config: Config) -> list[tuple[str, str, int]]:
    """All cells of the table; without chance there is one seed."""
    cells = []
    for sparsity in config.sparsity:
        patterned = Sparsity.parse(sparsity).m is not None
        for variant in config.chosen:
            if patterned and "allocate" in VARIANTS[variant].changes:
                continue
            settings = settings_of(variant, sparsity, 0, config)
            chance = settings.first == "gauss-newton" or settings.refits
            cells += [(variant, sparsity, seed) for seed in range(config.seeds if chance else 1)]
    return cells


def measure_dense(material: Material, report: Callable[[Progress], None]) -> dict[str, Any]:
    """Perplexity of the dense model; its last hidden states are kept."""
    model = llama.load(material.folder)
    states = perplexity.dense_states(model, material.text)
    write_arrays(material.dense, states=states)
    judged = perplexity.judge(model, material.text, states)
    return {"dense_perplexity": judged.perplexity}


def compute(
    cell: tuple[str, str, int],
    dense_perplexity: float,
    material: Material,
    out: Path,
    report: Callable[[Progress], None],
) -> dict[str, Any]:
    """Prune once, with what is needed to go on in ``out``, and judge; in a child."""
    variant, sparsity, seed = cell
    model, started = llama.load(material.folder), time.monotonic()
    settings = settings_of(variant, sparsity, seed, material.config)
    tokens = material.calibration.tokens[: VARIANTS[variant].windows]
    resumed = out.exists()
    work = RunFolder(out, settings, resume=True)
    rows: list[dict[str, Any]] = []
    with work:
        for _, _, new in prune_model(
            model, tokens, material.heldout.tokens, settings, work, report
        ):
            rows += new
        seconds, peak = time.monotonic() - started, peak_memory()
    states = read_arrays(material.dense, "delete the run, and begin anew")["states"]
    judged = perplexity.judge(model, material.text, states)
    work.remove()
    return {
        "variant": variant,
        "description": VARIANTS[variant].description,
        "sparsity": sparsity,
        "seed": seed,
        "calibration_error": float(np.mean([row["calibration_error"] for row in rows])),
        "heldout_error": float(np.mean([row["heldout_error"] for row in rows])),
        "divergence": judged.divergence,
        "perplexity_gap": judged.perplexity - dense_perplexity,
        "dense_perplexity": dense_perplexity,
        "seconds": seconds,
        "peak_memory": peak,
        "resumed": int(resumed),
    }


def table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds, and half the range where there are several."""
    groups = metrics.groupby(["sparsity", "variant"], sort=False)

    def cell(values: pd.Series) -> str:
        digits = _DIGITS.get(str(values.name), 4)
        half = (values.max() - values.min()) / 2
        spread = f" ± {half:.{digits}f}" if len(values) > 1 else ""
        return f"{values.mean():.{digits}f}{spread}"

    there = {name: shown for name, shown in MEASURES.items() if name in metrics}
    shown = groups[list(there)].agg(cell).rename(columns=there).reset_index()
    shown["variant"] = shown["variant"].map(lambda name: VARIANTS[name].description)
    return shown


def draw(metrics: pd.DataFrame) -> plt.Figure:
    """One panel a sparsity: divergence of every variant, a dot for each seed."""
    sparsities = list(dict.fromkeys(metrics["sparsity"]))
    variants = list(dict.fromkeys(metrics["variant"]))
    figure, axes = plt.subplots(
        1,
        len(sparsities),
        figsize=(4.6 + 2.6 * len(sparsities), 0.9 + 0.27 * len(variants)),
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
        cell.set_xlabel("KL divergence from the dense model (nats)")
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


def in_process(function: Callable[..., Any], *arguments: Any, progress: Any = None) -> list[Any]:
    """A row from a process of its own."""
    return [in_child(function, *arguments, progress=progress)]


def compute_all(config: Config, material: Material, run: RunFolder) -> list[dict[str, Any]]:
    """Rows of all cells."""
    cells, rows, shape = plan(config), [], llama.load_config(material.folder)
    material = material._replace(dense=run.part_file("dense").resolve())
    names = ["-".join(map(str, cell)).replace(":", "of") for cell in cells]
    left = [c[0] for c, name in zip(cells, names, strict=True) if not run.finished(name)]
    if left:
        print(estimate(left, MEASURED, "variant", "seconds"))
    dense = run.part("dense", partial(in_process, measure_dense, material))
    steps = [units(settings_of(*cell, config), shape) for cell in cells]
    with tqdm(total=sum(steps), unit="chunk") as bar:
        for i, (cell, name) in enumerate(zip(cells, names, strict=True)):
            arguments = (cell, dense[0]["dense_perplexity"], material, run.path / "work" / name)

            def progress(where: Progress, before: int = sum(steps[:i])) -> None:
                bar.update(before + where.done - bar.n)

            bar.set_postfix_str(name)
            rows += run.part(name, partial(in_process, compute, *arguments, progress=progress))
            bar.update(sum(steps[: i + 1]) - bar.n)
    with contextlib.suppress(OSError):  # there is none, or one of an earlier version
        (run.path / "work").rmdir()
    return rows


def body(config: Config) -> None:
    """Run, or redraw."""
    run_experiment(config, prepare, report, COLUMNS)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, "ablation.py")


if __name__ == "__main__":
    sys.exit(main())
