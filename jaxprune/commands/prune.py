"""Prune a Llama checkpoint and write one that ``transformers`` opens.

``descent`` (the default) keeps what the attention matrices of every layer compute, positions and
grouped heads included; magnitude, Wanda and SparseGPT go through the same pipeline. ``--targets
qk`` prunes W_Q and W_K, ``all`` the seven linear maps of every block, on the block's output.

For example::

  jaxprune prune --model zoo --sparsity 0.7 --out pruned
  jaxprune prune --model DIR --calibration text.txt --method wanda --out pruned
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from tqdm import tqdm

from jaxprune.errors import InputError
from jaxprune.models import llama
from jaxprune.models.llama.checkpoint import write_weights
from jaxprune.models.llama.files import checkpoint_hashes
from jaxprune.pipeline.model import (
    TARGETS,
    Progress,
    PruneSettings,
    distillation_steps,
    prune_model,
    units,
)
from jaxprune.runs import plotting
from jaxprune.runs.folder import RunFolder, configuration, environment
from jaxprune.runs.script import Flag, run_script
from jaxprune.sharding import by_writer, connect, is_writer, use_mesh
from jaxprune.sparsity import Sparsity
from jaxprune.storage import check_new_folder, new_folder, read_json, write_arrays, write_json
from jaxprune.text.tokenizer import Tokenizer
from jaxprune.text.windows import Windows, calibration_windows


@dataclasses.dataclass(frozen=True)
class Config:
    """Prune a Llama checkpoint and write one that transformers opens.

    Example: jaxprune prune --model zoo --sparsity 0.7 --out pruned
    """

    out: Path
    """folder of the new checkpoint; must not exist"""
    model: str = "zoo"
    """zoo, a Hugging Face folder, a .gguf file, or owner/name on the hub"""
    calibration: str = "zoo"
    """zoo, a text file (.txt, .jsonl, .json.gz), c4, wikitext2, or a preset: standard, paper"""
    windows: int | None = None
    """windows to calibrate on; 128, or as the preset says"""
    seqlen: int | None = None
    """tokens of a window, a BOS included; 256, or as the preset says"""
    heldout: int | None = None
    """windows after those, for held-out attention errors; 16, or as the preset says"""
    method: str = "descent"
    """magnitude, wanda, sparsegpt, descent"""
    targets: str = "qk"
    """qk (W_Q and W_K) or all (the seven linear maps of a block)"""
    sparsity: str = "0.5"
    """fraction removed, or N:M along the inputs: 2:4 keeps 2 of every 4"""
    refit: bool = True
    """descent lets kept weights adapt; else it learns the mask alone, and they stay as they were"""
    propagate: bool = True
    """descent calibrates on the model pruned so far; else every layer on the dense one"""
    steps: int | None = None
    """steps of the descent in every block; the preset's if left out"""
    distill: int | None = None
    """steps of distillation from the dense model at the end, of all kept weights together, by
    descent; if left out, 300 for models of up to 100 million parameters and none for larger ones"""
    batch: int = 8
    """windows at once in forward passes; lower it if memory runs out"""
    seed: int = 0
    """of the descent's batches and of windows drawn from C4"""
    resume: Flag = False
    """go on with an interrupted run with the same --out"""
    repeat: Path | None = None
    """folder of a pruned checkpoint to make again in --out, with its settings, and to compare"""

    dtype: str = "float32"
    """of the model's weights and activations, float32 or bfloat16; softmax, sums, masks and the
    weights that a descent moves are float32"""
    mesh: str | None = None
    """SxH, devices along sequences and heads; if left out, all there are, heads first"""
    coordinator: str | None = None
    """host:port of process 0 where several processes share the work, or auto on a cluster that
    JAX knows; --out must then be on a file system they all see"""
    processes: int | None = None
    """how many"""
    process: int | None = None
    """which one this is, from 0; process 0 writes"""

    memory_flags: ClassVar[str] = "--batch, --windows or --seqlen"

    def settings(self) -> PruneSettings:
        """What the pipeline needs to know."""
        try:
            sparsity = Sparsity.parse(self.sparsity)
        except InputError as error:
            raise InputError(f"--sparsity: {error}") from None
        return PruneSettings(
            method=self.method,
            targets=self.targets,
            sparsity=sparsity,
            refit=self.refit,
            propagate=self.propagate,
            steps=self.steps,
            distill=self.distill,
            batch=self.batch,
            seed=self.seed,
        )


def work_folder(out: Path) -> Path:
    """Where a run keeps what it needs to resume, beside its output."""
    return out.resolve().parent / f".{out.name}.work"


def finished_before(config: Config) -> bool:
    """Whether this very run has finished already (killed just before it could say so)."""
    report = config.out / "pruning.json"
    return (
        config.resume
        and report.is_file()
        and read_json(report).get("configuration") == configuration(config)
    )


def achieved_sparsity(model: llama.Llama, targets: str) -> dict[str, list[float]]:
    """Fraction of exact zeros in every pruned matrix, one number a block."""
    blocks = model.blocks.get_value()
    return {
        name: [float(np.mean(np.asarray(matrix) == 0)) for matrix in getattr(blocks, name)]
        for name in TARGETS[targets]
    }


def summary_figure(metrics: pd.DataFrame, title: str) -> plt.Figure:
    """Attention error of every head, calibration beside held-out, and their means by layer."""
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
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return figure


def body(config: Config) -> None:
    """Check everything, prune block by block, write the checkpoint whole."""
    settings = config.settings()
    if config.dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {config.dtype}: expected float32 or bfloat16")
    connect(config.coordinator, config.processes, config.process)
    if config.heldout is not None and config.heldout < 1:
        raise InputError(f"--heldout {config.heldout}: expected 1 or more")
    if finished_before(config):
        by_writer(lambda: shutil.rmtree(work_folder(config.out), ignore_errors=True))
        print(f"{config.out}: finished already")
        return
    by_writer(lambda: check_new_folder(config.out))
    folder = llama.locate(config.model)
    shape = llama.load_config(folder)
    settings.check(shape)
    calibration, heldout = calibration_windows(
        config.calibration,
        Tokenizer(folder, shape.vocab_size),
        windows=config.windows,
        seqlen=config.seqlen,
        heldout=config.heldout,
        seed=config.seed,
    )
    hidden = 4 * shape.hidden_size * (2 * calibration.tokens.size + heldout.tokens.size)
    print(
        f"{config.method} on {', '.join(TARGETS[config.targets])} of {shape.num_hidden_layers} "
        f"blocks; besides the weights and one block's work, {hidden / 2**20:.0f} MiB of hidden "
        f"states are held, in proportion to the windows"
        + (
            "; distillation holds the dense blocks too"
            if distillation_steps(settings, shape)
            else ""
        )
    )
    inputs = {
        "model": checkpoint_hashes(folder),
        "calibration": calibration.hashes(),
        "heldout": heldout.hashes(),
    }
    work = work_folder(config.out)
    with (
        use_mesh(config.mesh, shape.num_key_value_heads),
        RunFolder(work, config, resume=config.resume, inputs=inputs) as run,
    ):
        model = llama.load(folder, config.dtype)
        masks: dict[str, np.ndarray] = {}
        rows: list[dict[str, Any]] = []
        total = units(settings, shape)
        with tqdm(total=total, unit="chunk", disable=not is_writer()) as bar:

            def progress(where: Progress) -> None:
                bar.set_postfix_str(where.doing)
                bar.update(where.done - bar.n)

            for layer, kept, new in prune_model(
                model, calibration.tokens, heldout.tokens, settings, run, progress
            ):
                masks |= {f"{layer}.{name}": mask for name, mask in kept.items()}
                rows += new
        by_writer(
            lambda: write(config, model, folder, masks, rows, calibration, heldout, run.inputs)
        )
    run.remove()


def write(
    config: Config,
    model: llama.Llama,
    source: Path,
    masks: dict[str, np.ndarray],
    rows: list[dict[str, Any]],
    calibration: Windows,
    heldout: Windows,
    inputs: dict[str, dict[str, str]],
) -> None:
    """The new checkpoint with its report, masks and figure; it appears whole or not at all."""
    metrics = pd.DataFrame(rows)
    achieved = achieved_sparsity(model, config.targets)
    report = {
        "configuration": configuration(config),
        "environment": environment(),
        "inputs": inputs,
        "calibration": calibration.protocol,
        "heldout": heldout.protocol,
        "achieved_sparsity": achieved,
        "attention_error": rows,
        "peak_device_memory": _peak_memory(),
    }
    with new_folder(config.out) as folder:
        write_weights(model, source, folder)
        write_arrays(folder / "keep_masks.npz", **masks)
        metrics.to_csv(folder / "metrics.csv", index=False)
        title = f"{config.model}: {config.method} on {config.targets}, sparsity {config.sparsity}"
        plotting.save(summary_figure(metrics, title), folder, "summary")
        write_json(folder / "pruning.json", report)
    mean = metrics[["calibration_error", "heldout_error"]].mean()
    removed = np.mean([value for values in achieved.values() for value in values])
    print(
        f"{config.out}: {removed:.4f} of the pruned matrices is zero; relative attention error "
        f"{mean['calibration_error']:.4f} on calibration, {mean['heldout_error']:.4f} held-out"
    )


def _peak_memory() -> int | None:
    """Peak bytes of the device, where it counts them (a CPU does not)."""
    statistics = jax.local_devices()[0].memory_stats()
    return None if statistics is None else statistics.get("peak_bytes_in_use")


def main(argv: Sequence[str] | None = None, *, prog: str = "jaxprune prune") -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, prog)
