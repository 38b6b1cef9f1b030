"""A checkpoint in, a pruned checkpoint out."""

from __future__ import annotations

import contextlib
import math
import numbers
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxprune.errors import InputError, shown
from jaxprune.evaluation.summary import ratio_figure, summary_figure
from jaxprune.models import llama
from jaxprune.models.llama.checkpoint import context_note, write_weights
from jaxprune.models.llama.files import CARD_FILE, check_outside, checkpoint_hashes
from jaxprune.models.llama.modeling import block_shapes, parameter_count
from jaxprune.pipeline.card import Outcome, model_card
from jaxprune.pipeline.model import Progress, distillation_steps, prune_model, units
from jaxprune.pipeline.settings import TARGETS, PruneSettings
from jaxprune.runs import plotting
from jaxprune.runs.configuration import configuration, differing
from jaxprune.runs.folder import RunFolder, recorded_configuration
from jaxprune.sharding import check_mesh, is_writer, on_process_zero, use_mesh
from jaxprune.sparsity import Sparsity
from jaxprune.storage import (
    check_new_folder,
    is_name,
    new_folder,
    read_json,
    remove_partial_folders,
    replacing,
    work_folder,
    write_arrays,
    write_json,
)
from jaxprune.text.tokenizer import Tokenizer
from jaxprune.text.windows import Windows, calibration_windows, check_sizes

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class PruneRequest:
    """What ``prune_checkpoint`` was asked for, as it is recorded with the result.

    Attributes are the arguments of that function.
    """

    model: str
    calibration: str = "zoo"
    windows: int | None = None
    seqlen: int | None = None
    heldout: int | None = None
    method: str = "descent"
    targets: str = "qk"
    sparsity: str = "0.5"
    refit: bool | None = None
    start: str = "gauss-newton"
    metric: str | None = None
    allocate: str = "matrix"
    lowest: float = 0.0
    highest: float = 0.95
    rounds: int = 1
    propagate: bool = True
    steps: int | None = None
    distill: int | None = None
    generated: int = 0
    batch: int = 8
    seed: int = 0
    dtype: str = "float32"
    repeat: Path | None = None

    @staticmethod
    def modernised(record: Mapping[str, Any]) -> dict[str, Any]:
        """A recorded request in the settings of this version."""
        return modernised(record)

    def check(self) -> None:
        """Raise ``InputError``, naming the argument, for all that is wrong with any model."""
        for name, hint in get_type_hints(PruneRequest).items():
            _check_kind(name, getattr(self, name), hint)
        self.settings().check_names()
        check_sizes(self.windows, self.seqlen)
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {shown(self.dtype)}: expected {' or '.join(DTYPES)}")
        if self.heldout is not None and self.heldout < 1:
            raise InputError(f"heldout {self.heldout}: expected 1 or more")

    def settings(self) -> PruneSettings:
        """What the pipeline needs to know."""
        return PruneSettings(
            method=self.method,
            targets=self.targets,
            sparsity=Sparsity.parse(self.sparsity),
            refit=self.refit,
            start=self.start,
            metric=self.metric,
            allocate=self.allocate,
            lowest=self.lowest,
            highest=self.highest,
            rounds=self.rounds,
            propagate=self.propagate,
            steps=self.steps,
            distill=self.distill,
            generated=self.generated,
            batch=self.batch,
            seed=self.seed,
        )


# Kinds of arguments, and what errors call them.
_KINDS: dict[type, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a text"),
    Path: (Path, "a path"),
    type(None): (type(None), "None"),
}


def _check_kind(name: str, value: Any, hint: Any) -> None:
    """Raise ``InputError`` for a value that is not of its argument's type, or that nothing takes.

    A truth value is no number; whole numbers are those that an index or a seed of JAX can be.
    """
    kinds = get_args(hint) or (hint,)
    if not any(
        isinstance(value, _KINDS[kind][0]) and (kind is bool or not isinstance(value, bool))
        for kind in kinds
    ):
        named = " or ".join(dict.fromkeys(_KINDS[kind][1] for kind in kinds))
        raise InputError(f"{name} {value!r:.80}: expected {named}")
    if isinstance(value, numbers.Integral) and abs(int(value)) >= 2**31:
        raise InputError(f"{name} {value!r:.80}: expected a number below 2^31")
    if isinstance(value, str | Path) and not (str(value) and is_name(str(value))):
        raise InputError(
            f"{name} {value!r:.80}: expected one or more characters of Unicode, none of them null"
        )


def modernised(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run of version 0.1, whose descent began from dense weights, as one of this.

    ``refit`` was true for all but descents that only learned a mask.
    """
    if "start" in record:
        return dict(record)
    return {**record, "start": "dense", "refit": None if record.get("refit", True) else False}


@dataclass(frozen=True)
class PruneReport:
    """What was pruned, and how far it is from the dense model.

    Attributes:
      out: folder of the new checkpoint.
      zeros: fraction of exact zeros among the entries of all pruned matrices.
      achieved_sparsity: fraction of exact zeros in every pruned matrix, one number a block.
      attention_error: a row for every head of every block, ``calibration_error`` and
        ``heldout_error`` relative to the dense attention, each on as many windows as are held out.
      seconds: of the work of this call; ``None`` where the run had finished before.
    """

    out: Path
    zeros: float
    achieved_sparsity: dict[str, list[float]]
    attention_error: list[dict[str, Any]]
    seconds: float | None

    def __str__(self) -> str:
        mean = pd.DataFrame(self.attention_error)[["calibration_error", "heldout_error"]].mean()
        return (
            f"{self.out}: {self.zeros:.4f} of the pruned matrices is zero; "
            f"relative attention error {mean['calibration_error']:.4f} on calibration, "
            f"{mean['heldout_error']:.4f} held-out"
        )


def prune_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    calibration: str = "zoo",
    windows: int | None = None,
    seqlen: int | None = None,
    heldout: int | None = None,
    method: str = "descent",
    targets: str = "qk",
    sparsity: Any = "0.5",
    refit: bool | None = None,
    start: str = "gauss-newton",
    metric: str | None = None,
    allocate: str = "matrix",
    lowest: float = 0.0,
    highest: float = 0.95,
    rounds: int = 1,
    propagate: bool = True,
    steps: int | None = None,
    distill: int | None = None,
    generated: int = 0,
    batch: int = 8,
    seed: int = 0,
    dtype: str = "float32",
    mesh: str | None = None,
    resume: bool = False,
    repeat: Path | None = None,
    announce: Callable[[str], None] | None = None,
    warn: Callable[[str], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> PruneReport:
    """Prune a checkpoint and write one that ``transformers`` opens, with card, masks and report.

    Nothing is printed. The folder ``out`` appears whole or not at all; until then the run keeps
    what it needs to go on in ``.NAME.work`` beside it.

    Args:
      model: ``zoo``, a Hugging Face folder, a .gguf file, or ``owner/name`` on the hub.
      out: folder of the new checkpoint; must not exist.
      calibration: ``zoo``, a text file, ``c4``, ``wikitext2``, or a preset: ``standard``,
        ``paper``.
      windows: to calibrate on; 128, or as the preset says, if ``None``.
      seqlen: tokens of a window, a BOS included; 256, or as the preset says, if ``None``.
      heldout: windows for held-out errors; 16, or as the preset says, if ``None``.
      method: one of ``settings.METHODS``.
      targets: ``qk`` or ``all``.
      sparsity: of every pruned matrix, ``Sparsity`` or what ``Sparsity.parse`` reads.
      refit: let kept weights adapt block by block; if ``None``, with ``descent`` alone.
      start: of ``descent``: ``gauss-newton`` or ``dense``.
      metric: whose curvature the closed form is on, ``attention`` or ``predictions``; see
        ``PruneSettings``.
      allocate: what shares the budget of zeros: each ``matrix`` loses ``sparsity``, or those of a
        ``block``, or of the ``model``, together.
      lowest: least ratio of a matrix where a budget is shared.
      highest: greatest.
      rounds: of the closed form on predictions; see ``PruneSettings``.
      propagate: calibrate on the model as pruned so far.
      steps: of a descent in every block; the preset's if ``None``.
      distill: steps of the distillation at the end; see ``PruneSettings``.
      generated: windows to calibrate on that the dense model writes, besides those read; see
        ``PruneSettings``.
      batch: windows at once in forward passes.
      seed: of random batches, cotangents, generated windows, and windows drawn from C4.
      dtype: of the model's weights and activations, ``float32`` or ``bfloat16``.
      mesh: ``SxH``, devices along sequences and heads; all there are if ``None``.
      resume: go on with an interrupted run with the same ``out``.
      repeat: folder of a pruned checkpoint whose inputs must be the same.
      announce: called once with a line on what is about to be done and held in memory.
      warn: called with what is worth a word and no error.
      progress: called as the work goes on.

    Raises:
      InputError: an argument is wrong; named in the message, before any long work.
    """
    began = time.monotonic()
    for name, given, kind in (
        *(("model", model, str | Path), ("out", out, str | Path)),
        *(("resume", resume, bool), ("mesh", mesh, str | None)),
    ):
        _check_kind(name, given, kind)
    for name, function in (("announce", announce), ("warn", warn), ("progress", progress)):
        if function is not None and not callable(function):
            raise InputError(f"{name} {function!r:.80}: expected a function or None")
    out = Path(out)
    # Its own text has six digits.
    ratio = isinstance(sparsity, Sparsity) and sparsity.m is None
    request = PruneRequest(
        model=str(model),
        calibration=calibration,
        windows=windows,
        seqlen=seqlen,
        heldout=heldout,
        method=method,
        targets=targets,
        sparsity=str(sparsity.ratio if ratio else sparsity),
        refit=refit,
        start=start,
        metric=metric,
        allocate=allocate,
        lowest=lowest,
        highest=highest,
        rounds=rounds,
        propagate=propagate,
        steps=steps,
        distill=distill,
        generated=generated,
        batch=batch,
        seed=seed,
        dtype=dtype,
        repeat=repeat,
    )
    request.check()
    check_mesh(mesh)
    settings = request.settings()
    work = work_folder(out)
    if resume and _finished_before(out, request):
        on_process_zero(lambda: shutil.rmtree(work, ignore_errors=True))
        report = read_json(out / "pruning.json")
        achieved = report["achieved_sparsity"]
        zeros = _zeros(achieved, llama.load_config(out))
        return PruneReport(out, zeros, achieved, report["attention_error"], None)
    on_process_zero(lambda: check_new_folder(out))
    folder = llama.locate(request.model)
    config = llama.load_config(folder)
    check_outside(out, folder)
    settings.check(config)
    fit, fresh = calibration_windows(
        calibration,
        Tokenizer(folder, config.vocab_size),
        windows=windows,
        seqlen=seqlen,
        heldout=heldout,
        seed=seed,
    )
    note = context_note(folder, fit.tokens.shape[1])
    if warn is not None and note is not None:
        warn(note)
    if announce is not None and is_writer():
        announce(_plan(settings, config, fit, fresh, dtype))
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_mesh(mesh, config.num_key_value_heads))
        loaded = llama.load(folder, dtype)  # weights that cannot be used show before hashing
        inputs = {
            "model": checkpoint_hashes(folder),
            "calibration": fit.hashes(),
            "heldout": fresh.hashes(),
        }
        # A hidden folder beside what was asked for, no argument of anyone.
        hidden = RunFolder(work, request, resume=resume, inputs=inputs, name="")
        run = stack.enter_context(hidden)
        if resume:
            on_process_zero(lambda: remove_partial_folders(out))
        masks: dict[str, np.ndarray] = {}
        rows: list[dict[str, Any]] = []
        notify = progress or (lambda where: None)
        notify(Progress(0, units(settings, config), "start"))
        for layer, kept, new in prune_model(
            loaded, fit.tokens, fresh.tokens, settings, run, notify
        ):
            masks |= {f"{layer}.{name}": mask for name, mask in kept.items()}
            rows += new
        seconds = time.monotonic() - began
        achieved = _achieved_sparsity(loaded, targets)
        result = PruneReport(out, _zeros(achieved, config), achieved, rows, seconds)
        texts = {"calibration": fit.protocol, "heldout": fresh.protocol}
        on_process_zero(lambda: _write(request, result, loaded, folder, masks, texts, run))
    run.remove()
    return result


def _finished_before(out: Path, request: PruneRequest) -> bool:
    """Whether this very run has finished already (killed just before it could say so)."""
    if not (out / "pruning.json").is_file():
        return False
    there = recorded_configuration(out)
    return there is not None and differing(there, request) is None


def _plan(
    settings: PruneSettings,
    config: llama.LlamaConfig,
    fit: Windows,
    heldout: Windows,
    dtype: str,
) -> str:
    # Where the dense stream is whole, what the block at hand makes of it is held beside it.
    seen = fit.tokens.size + settings.generated * fit.tokens.shape[1]
    dense = 2 * seen if settings.needs_dense_stream else heldout.tokens.size
    hidden = jnp.dtype(dtype).itemsize * config.hidden_size * (dense + seen + heldout.tokens.size)
    line = (
        f"{settings.method} on {', '.join(settings.names)} of {config.num_hidden_layers} blocks; "
        f"besides the weights and one block's work, {hidden / 2**20:.0f} MiB of hidden states are "
        "held, in proportion to the windows"
    )
    if distillation_steps(settings, config):
        line += "; distillation holds the dense blocks too"
    if settings.rounds > 1:
        line += "; rounds before the last hold them too"
    return line


def _achieved_sparsity(model: llama.Llama, targets: str) -> dict[str, list[float]]:
    """Fraction of exact zeros in every pruned matrix, one number a block."""
    blocks = model.blocks.get_value()
    return {
        name: [float(np.mean(np.asarray(matrix) == 0)) for matrix in getattr(blocks, name)]
        for name in TARGETS[targets]
    }


def _zeros(achieved: Mapping[str, Sequence[float]], config: llama.LlamaConfig) -> float:
    """Fraction of zeros among all entries of matrices of which each has its own."""
    shapes = block_shapes(config)
    sizes = {name: math.prod(getattr(shapes, name)) for name in achieved}
    gone = sum(sizes[name] * sum(fractions) for name, fractions in achieved.items())
    return gone / sum(sizes[name] * len(fractions) for name, fractions in achieved.items())


def _write(
    request: PruneRequest,
    result: PruneReport,
    model: llama.Llama,
    source: Path,
    masks: dict[str, np.ndarray],
    texts: dict[str, Any],
    run: RunFolder,
) -> None:
    """The new checkpoint with card, report, masks, figure; it appears whole or not at all."""
    metrics = pd.DataFrame(result.attention_error)
    report = {
        "configuration": configuration(request),
        "environment": run.environment,
        "inputs": run.inputs,
        **texts,
        "achieved_sparsity": result.achieved_sparsity,
        "attention_error": result.attention_error,
        "seconds": result.seconds,
        "peak_device_memory": _peak_memory(),
    }
    outcome = Outcome(
        texts,
        sum(int((~mask).sum()) for mask in masks.values()),
        result.zeros,
        parameter_count(model.config),
        result.achieved_sparsity,
        result.attention_error,
    )
    card = model_card(
        request.model, source, request.settings(), model.config, request.dtype, outcome
    )
    # A folder's name is enough, and says nothing of the machine.
    name = Path(request.model).name if Path(request.model).exists() else request.model
    title = f"{name}: {request.method} on {request.targets}, sparsity {request.sparsity}"
    with new_folder(result.out) as folder:
        write_weights(model, source, folder)
        write_arrays(folder / "keep_masks.npz", **masks)
        metrics.to_csv(folder / "metrics.csv", index=False)
        plotting.save(summary_figure(metrics, title), folder, "summary")
        if request.allocate != "matrix":
            plotting.save(ratio_figure(result.achieved_sparsity, title), folder, "ratios")
        write_json(folder / "pruning.json", report)
        with replacing(folder / CARD_FILE) as partial:
            partial.write_text(card, encoding="utf-8")


def _peak_memory() -> int | None:
    """Peak bytes of the device, where it counts them (a CPU does not)."""
    statistics = jax.local_devices()[0].memory_stats()
    return None if statistics is None else statistics.get("peak_bytes_in_use")
