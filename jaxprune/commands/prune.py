"""Prune a Llama checkpoint and write one that ``transformers`` opens.

``descent`` (the default) keeps what the attention matrices of every layer compute, positions and
grouped heads included: the closed form of ``gauss-newton`` first, then kept weights adapt.
Baselines go through the same pipeline. ``--targets qk`` prunes W_Q and W_K, ``all`` the seven
linear maps of every block.

For example::

  jaxprune prune --model zoo --sparsity 0.5 --out pruned
  jaxprune prune --model DIR --calibration text.txt --method wanda --out pruned-by-wanda
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from tqdm import tqdm

from jaxprune import hub
from jaxprune.errors import InputError
from jaxprune.pipeline import METHODS, Progress, PruneSettings, prune_checkpoint
from jaxprune.pipeline.checkpoint import PruneRequest, modernised
from jaxprune.runs import flags
from jaxprune.runs.configuration import defaults, flat
from jaxprune.runs.script import notice, run_script
from jaxprune.sharding import check_mesh, connect, is_writer, on_process_zero
from jaxprune.storage import work_folder

# Flags that are for this command alone.
_NOT_OF_THE_LIBRARY = (
    *("coordinator", "coordinator_timeout", "processes", "process"),
    *("push", "public"),
)


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
    push: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="OWNER/NAME",
            help="upload the finished folder to this repository on the hub, private unless "
            "--public; if left out, nothing is uploaded",
            help_behavior_hint="",
        ),
    ] = None
    public: flags.Flag = False
    """with --push: everyone may see it"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Prune a Llama checkpoint and write one that transformers opens.

    Example: jaxprune prune --model zoo --sparsity 0.5 --out pruned
    """

    method: Annotated[
        str,
        tyro.conf.arg(
            help=f"{', '.join(METHODS)}: gauss-newton is the closed form, descent goes on from it"
        ),
    ] = "descent"
    targets: Literal["qk", "all"] = "qk"
    """qk (W_Q and W_K) or all (the seven linear maps of a block)"""
    sparsity: str = "0.5"
    """fraction removed, or N:M along the inputs: 2:4 keeps 2 of every 4"""
    refit: flags.Flag = False
    """after any method, let kept weights adapt block by block, as descent does"""
    no_refit: flags.Flag = False
    """descent leaves kept weights as they were, under its mask"""
    start: Annotated[
        Literal["gauss-newton", "dense"],
        tyro.conf.arg(
            help="what descent goes on from: the closed form, or dense weights, from which it "
            "finds the mask itself in many more steps"
        ),
    ] = "gauss-newton"
    metric: flags.Maybe[Literal["attention", "predictions"]] = None
    """whose curvature the closed form is on; if left out, qk: attention, all: predictions"""
    allocate: Annotated[
        Literal["matrix", "block", "model"],
        tyro.conf.arg(
            help="what shares the budget of zeros: matrix (each loses --sparsity), block or model "
            "(all of them together lose it, where the predictions feel it least)"
        ),
    ] = "matrix"
    lowest: float = 0.0
    """least fraction that a matrix loses where a budget is shared"""
    highest: float = 0.95
    """greatest fraction that a matrix loses where a budget is shared"""
    rounds: int = 1
    """rounds of the closed form on predictions: 2 takes the curvature of a pruned model too"""
    propagate: bool = True
    """calibrate on the model pruned so far; else every layer on the dense one"""
    steps: flags.Maybe[int] = None
    """steps of the descent in every block; if left out, the preset's"""
    distill: Annotated[
        int | None,
        tyro.conf.arg(
            help="steps of distillation from the dense model at the end, of all kept weights "
            "together; if left out, 300 after descent in models of up to 100 million parameters, "
            "else none",
            help_behavior_hint="",
        ),
    ] = None
    generated: int = 0
    """windows to calibrate on that the dense model writes itself, besides --windows of text"""
    data: Annotated[Data, flags.MODEL_AND_TEXT] = Data()
    devices: Annotated[flags.Devices, flags.DEVICES_AND_MEMORY] = dataclasses.field(
        default=flags.Devices()
    )
    run: Annotated[Run, flags.RUN]

    memory_flags: ClassVar[str] = "--batch, --windows or --seqlen"
    earlier: ClassVar[Mapping[str, Any]] = {"start": "dense"}

    @property
    def records(self) -> tuple[Path, ...]:
        """Folders in which the settings of this run may be recorded."""
        return self.run.out, work_folder(self.run.out)

    @staticmethod
    def modernised(record: Mapping[str, Any]) -> dict[str, Any]:
        """A recorded configuration in the flags of this version."""
        record = modernised(record)
        refit = record.get("refit")
        return record | {"refit": refit is True, "no_refit": refit is False}

    def check_used(self, settings: PruneSettings) -> None:
        """Raise ``InputError`` for flags without an effect on this method.

        Not for runs that were begun when they were accepted.
        """
        if self.run.resume or self.run.repeat is not None:
            return
        descends = settings.refits or settings.gradual
        reads = descends or self.method != "magnitude" or self.distill or settings.needs_curvature
        shared, standing = self.allocate != "matrix", defaults(Config)
        # By name: where it has no effect, and whether that is here.
        used = {
            "steps": (
                f"on {self.method}" + " without a refit" * self.no_refit,
                descends or self.steps is None,
            ),
            "no_propagate": ("with --targets all", self.propagate or self.targets == "qk"),
            "generated": (f"on {self.method}", reads or not self.generated),
            "start": (f"on {self.method}", self.method == "descent" or self.start != "dense"),
            "lowest": ("with --allocate matrix", shared or self.lowest == standing["lowest"]),
            "highest": ("with --allocate matrix", shared or self.highest == standing["highest"]),
        }
        for name, (where, fine) in used.items():
            if not fine:
                raise InputError(f"{flags.flag_of(name)}: has no effect {where}; leave it out")

    def arguments(self) -> dict[str, Any]:
        """Those of ``prune_checkpoint``."""
        if self.refit and self.no_refit:
            raise InputError("--refit and --no-refit: expected one of them")
        if self.run.public and self.run.push is None:
            raise InputError("--public: has no effect without --push; leave it out")
        named = flat(self)
        for name in (*_NOT_OF_THE_LIBRARY, "no_refit"):
            del named[name]
        named |= {"refit": True if self.refit else False if self.no_refit else None}
        # Before other processes are waited for, and the hub is asked.
        recorded = {field.name for field in dataclasses.fields(PruneRequest)}
        request = PruneRequest(**{n: value for n, value in named.items() if n in recorded})
        self.check_used(request.settings())
        request.check()
        return named


def body(config: Config) -> None:
    """Connect to the other processes, prune, say what came of it, upload it if asked to."""
    arguments, devices, run = config.arguments(), config.devices, config.run
    connect(devices.coordinator, devices.processes, devices.process, devices.coordinator_timeout)
    check_mesh(devices.mesh)
    push = run.push
    if push is not None:
        on_process_zero(lambda: hub.check_upload(push, public=run.public))
    bars: list[tqdm] = []

    def progress(where: Progress) -> None:
        if not bars:  # not before all is checked: an error is one line
            bars.append(tqdm(total=where.total, unit="chunk", disable=not is_writer()))
        bars[0].set_postfix_str(where.doing)
        bars[0].update(where.done - bars[0].n)

    try:
        report = prune_checkpoint(**arguments, announce=print, warn=notice, progress=progress)
    finally:
        for bar in bars:
            bar.close()
    if is_writer():
        print(f"{report.out}: finished already" if report.seconds is None else report)
    if push is not None:
        on_process_zero(lambda: print(hub.upload(run.out, push, public=run.public)))


def main(argv: Sequence[str] | None = None, *, prog: str = "jaxprune prune") -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, prog)
