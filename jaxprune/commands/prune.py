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
from typing import Annotated, Any, ClassVar, Literal

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from tqdm import tqdm

from jaxprune.errors import InputError
from jaxprune.models import llama
from jaxprune.models.llama.checkpoint import context_note, write_weights
from jaxprune.models.llama.files import check_outside, checkpoint_hashes
from jaxprune.pipeline.model import (
    TARGETS,
    Progress,
    PruneSettings,
    distillation_steps,
    prune_model,
    units,
)
from jaxprune.runs import flags, plotting
from jaxprune.runs.configuration import configuration, differing
from jaxprune.runs.folder import RunFolder, environment, recorded_configuration
from jaxprune.runs.script import notice, run_script
from jaxprune.sharding import check_mesh, connect, is_writer, on_process_zero, use_mesh
from jaxprune.sparsity import Sparsity
from jaxprune.storage import (
    check_new_folder,
    new_folder,
    remove_partial_folders,
    work_folder,
    write_arrays,
    write_json,
)
from jaxprune.text.tokenizer import Tokenizer
from jaxprune.text.windows import Windows, calibration_windows, check_sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(flags.Dtype, flags.HeldoutWindows, flags.Model):
    """The model, and windows of text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(flags.Repeat, flags.Seed):
    """Where the new checkpoint goes."""

    out: Path
    """folder of the new checkpoint; must not exist"""
    resume: flags.Flag = False
    """go on with the interrupted run with the same --out and settings"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Prune a Llama checkpoint and write one that transformers opens.

    Example: jaxprune prune --model zoo --sparsity 0.7 --out pruned
    """

    method: str = "descent"
    """magnitude, wanda, sparsegpt, descent"""
    targets: Literal["qk", "all"] = "qk"
    """qk (W_Q and W_K) or all (the seven linear maps of a block)"""
    sparsity: str = "0.5"
    """fraction removed, or N:M along the inputs: 2:4 keeps 2 of every 4"""
    refit: bool = True
    """descent lets kept weights adapt; else it learns the mask alone, and they stay as they were"""
    propagate: bool = True
    """descent calibrates on the model pruned so far; else every layer on the dense one"""
    steps: flags.Maybe[int] = None
    """steps of the descent in every block; if left out, the preset's"""
    distill: Annotated[
        int | None,
        tyro.conf.arg(
            help="steps of distillation from the dense model at the end, of all kept weights "
            "together, by descent; if left out, 300 for models of up to 100 million parameters "
            "and none for larger ones",
            help_behavior_hint="",
        ),
    ] = None
    data: Annotated[Data, flags.MODEL_AND_TEXT] = Data()
    devices: Annotated[flags.Devices, flags.DEVICES_AND_MEMORY] = dataclasses.field(
        default=flags.Devices()
    )
    run: Annotated[Run, flags.RUN]

    memory_flags: ClassVar[str] = "--batch, --windows or --seqlen"

    @property
    def records(self) -> tuple[Path, ...]:
        """Folders in which the settings of this run may be recorded."""
        return self.run.out, work_folder(self.run.out)

    def check_used(self) -> None:
        """Raise ``InputError`` for flags without an effect on this method.

        Not for runs that were begun when they were accepted.
        """
        if self.method == "descent" or self.run.resume or self.run.repeat is not None:
            return
        given_flags = {"steps": self.steps is not None, "no_propagate": not self.propagate}
        for name, given in given_flags.items():
            if given:
                raise InputError(
                    f"{flags.flag_of(name)}: has no effect on {self.method}; leave it out"
                )

    def settings(self) -> PruneSettings:
        """What the pipeline needs to know."""
        return PruneSettings(
            method=self.method,
            targets=self.targets,
            sparsity=Sparsity.parse(self.sparsity),
            refit=self.refit,
            propagate=self.propagate,
            steps=self.steps,
            distill=self.distill,
            batch=self.devices.batch,
            seed=self.run.seed,
        )


def finished_before(config: Config) -> bool:
    """Whether this very run has finished already (killed just before it could say so)."""
    if not config.run.resume or not (config.run.out / "pruning.json").is_file():
        return False
    there = recorded_configuration(config.run.out)
    return there is not None and differing(there, config) is None


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
    config.check_used()
    settings, devices = config.settings(), config.devices
    check_sizes(config.data.windows, config.data.seqlen)
    if config.data.heldout is not None and config.data.heldout < 1:
        raise InputError(f"--heldout {config.data.heldout}: expected 1 or more")
    connect(devices.coordinator, devices.processes, devices.process, devices.coordinator_timeout)
    check_mesh(devices.mesh)
    if finished_before(config):
        on_process_zero(lambda: shutil.rmtree(work_folder(config.run.out), ignore_errors=True))
        print(f"{config.run.out}: finished already")
        return
    on_process_zero(lambda: check_new_folder(config.run.out))
    folder = llama.locate(config.data.model)
    shape = llama.load_config(folder)
    check_outside(config.run.out, folder)
    settings.check(shape)
    calibration, heldout = calibration_windows(
        config.data.calibration,
        Tokenizer(folder, shape.vocab_size),
        windows=config.data.windows,
        seqlen=config.data.seqlen,
        heldout=config.data.heldout,
        seed=config.run.seed,
    )
    notice(context_note(folder, calibration.tokens.shape[1]))
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
    work = work_folder(config.run.out)
    with (
        use_mesh(config.devices.mesh, shape.num_key_value_heads),
        RunFolder(work, config, resume=config.run.resume, inputs=inputs) as run,
    ):
        if config.run.resume:
            on_process_zero(lambda: remove_partial_folders(config.run.out))
        model = llama.load(folder, config.data.dtype)
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
        on_process_zero(
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
    with new_folder(config.run.out) as folder:
        write_weights(model, source, folder)
        write_arrays(folder / "keep_masks.npz", **masks)
        metrics.to_csv(folder / "metrics.csv", index=False)
        what = f"{config.method} on {config.targets}, sparsity {config.sparsity}"
        title = f"{config.data.model}: {what}"
        plotting.save(summary_figure(metrics, title), folder, "summary")
        write_json(folder / "pruning.json", report)
    mean = metrics[["calibration_error", "heldout_error"]].mean()
    removed = np.mean([value for values in achieved.values() for value in values])
    print(
        f"{config.run.out}: {removed:.4f} of the pruned matrices is zero; relative attention error "
        f"{mean['calibration_error']:.4f} on calibration, {mean['heldout_error']:.4f} held-out"
    )


def _peak_memory() -> int | None:
    """Peak bytes of the device, where it counts them (a CPU does not)."""
    statistics = jax.local_devices()[0].memory_stats()
    return None if statistics is None else statistics.get("peak_bytes_in_use")


def main(argv: Sequence[str] | None = None, *, prog: str = "jaxprune prune") -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, prog)
