"""One folder per run: configuration, environment, metrics, figures; resumable, never mixed.

A run is a list of named *parts*, each of which yields rows of metrics. A finished part is one
file; an interrupted run loses at most the part that was being computed, and a resumed run
recomputes nothing else, so it ends with the same rows as an uninterrupted one.

The folder holds what is needed to repeat the run: its configuration, versions, and hashes of the
files it read. ``differences`` compares a repetition with the original.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, cast

import filelock
import jax
import numpy as np
import pandas as pd

from jaxprune.errors import InputError
from jaxprune.runs.configuration import configuration, differing, flat
from jaxprune.runs.metrics import Columns, read_metrics, write_table
from jaxprune.sharding import broadcast_flag, is_writer, on_process_zero
from jaxprune.storage import (
    check_writable,
    hashes,
    read_arrays,
    read_json,
    remove_partial_files,
    replacing,
    write_json,
)

_RECORDED_PACKAGES = ("jaxprune", "jax", "jaxlib", "flax", "optax", "numpy", "safetensors")
# Compiler, precision and the kernels of LAPACK: with others, last bits differ.
_RECORDED_VARIABLES = (
    *("JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64", "NVIDIA_TF32_OVERRIDE"),
    *("OMP_NUM_THREADS", "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "XLA_FLAGS"),
)


def environment() -> dict[str, Any]:
    """What a number depends on besides the configuration: versions, variables, device, command."""
    device = jax.devices()[0]
    versions = {}
    for package in _RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "variables": {name: os.environ[name] for name in _RECORDED_VARIABLES if name in os.environ},
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "device_count": jax.device_count(),
        "cpu_count": os.cpu_count(),
    }


class RunFolder:
    """The folder of one run, held by one run at a time, of which process 0 writes.

    Use as a context manager::

        with RunFolder(out, config, resume=True) as run:
            rows = run.part("k16", lambda: compute(...))   # computed once, then read back
            run.write_metrics(rows)

    Where wrong input only shows while a new run is under way (``InputError`` in the block) and no
    part is finished, the folder is taken away again: nothing in it could be continued.

    Raises:
      InputError: the folder cannot be written, holds another run (other settings or inputs, or the
        same ones without ``resume``), or is in use by another process; or ``config.repeat`` names a
        run that had other inputs.

    Args:
      out: the folder.
      config: dataclass of settings.
      resume: go on with the run that is there.
      inputs: flag to ``hashes`` of what it names; kept with the run.
      name: of the argument that names the folder, for messages; empty where none does.
    """

    def __init__(
        self,
        out: Path,
        config: Any,
        *,
        resume: bool = False,
        inputs: Mapping[str, Mapping[str, str]] | None = None,
        name: str = "out",
    ) -> None:
        self.path = Path(out)
        self.inputs = {flag: dict(files) for flag, files in (inputs or {}).items()}
        self._config = config
        self._resume = resume
        self._repeats: Path | None = flat(config).get("repeat")
        self._name, self._where = name, f"{name} {self.path}".lstrip()

    def __enter__(self) -> RunFolder:
        on_process_zero(self._open)
        return self

    def _open(self) -> None:
        try:
            self._home = self.path.resolve()  # one folder, whatever links lead to it
        except (OSError, RuntimeError):
            raise InputError(f"{self._where}: is a link to itself; choose another folder") from None
        self._fresh = not (self._home.is_dir() and any(self._home.iterdir()))
        self._check_whose()
        self._made = [p for p in self._home.parents if not p.exists()]
        check_writable(self.path, self._name)
        self._lock = filelock.FileLock(self._home / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise InputError(f"{self._where}: another run is writing there") from None
        try:
            self._claim()
        except BaseException as error:
            self._close(type(error))
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if is_writer():
            self._close(kind)

    def _close(self, kind: type[BaseException] | None) -> None:
        refused = kind is not None and issubclass(kind, InputError)
        if self._fresh and refused and not any(self._parts.glob("*.json")):
            shutil.rmtree(self._home, ignore_errors=True)
            for parent in self._made:  # innermost first
                with contextlib.suppress(OSError):
                    parent.rmdir()
        self._lock.release()

    def _check_whose(self) -> None:
        """Raise ``InputError`` if the folder holds files no run left.

        ``config.json`` is written last: parts without it could be of any run.
        """
        if self._fresh or ((self.path / "config.json").exists() and self._parts.is_dir()):
            return
        left = {file.name for file in self.path.iterdir() if ".partial" not in file.name}
        if self._parts.is_dir() and not any(self._parts.iterdir()):
            left.discard("parts")
        others = sorted(left - {".lock", "environment.json", "inputs.json"})
        if others:
            raise InputError(
                f"{self._where}: holds {others[0]}, but not a whole run; choose a new or an "
                "empty folder"
            )

    def _claim(self) -> None:
        settings, inputs = self.path / "config.json", self.path / "inputs.json"
        if self._repeats is not None:
            _check_inputs(recorded(self._repeats).inputs, self.inputs, f"repeat={self._repeats}")
        if settings.exists():
            self._check_same(read_json(settings))
            if inputs.exists():
                _check_inputs(read_json(inputs), self.inputs, self._where)
            for folder in (self.path, self._parts, self.path / "figures"):
                remove_partial_files(folder)
        self._parts.mkdir(exist_ok=True)
        write_json(self.path / "environment.json", self._environments())
        write_json(inputs, self.inputs)
        write_json(settings, configuration(self._config))

    def _check_same(self, there: Mapping[str, Any]) -> None:
        """Raise ``InputError`` unless this run may go on with one of this configuration."""
        if not self._resume:
            raise InputError(
                f"{self._where} holds a run already; resume=True continues it, "
                "another folder starts anew"
            )
        difference = _difference(there, self._config)
        if difference is None:
            return
        name, then, now = difference
        if now is None:
            raise InputError(
                f"{self._where} holds a run with {name} {then}, which this version does not have; "
                "choose another folder"
            )
        raise InputError(
            f"{self._where} holds a run with {name}={then}, not {now}; choose another folder"
        )

    def _environments(self) -> dict[str, Any]:
        """This environment, and in ``before`` those that the run was in earlier, oldest first."""
        file, now = self.path / "environment.json", environment()
        try:
            last = read_json(file) if file.exists() else {}
        except InputError:  # what was computed does not depend on it
            last = {}
        before = last.pop("before", [])
        before = [each for each in [*before, last] if each and each != now]
        return now | ({"before": before} if before else {})

    @property
    def _parts(self) -> Path:
        return self.path / "parts"

    @property
    def figures(self) -> Path:
        """Where figures go."""
        return figures_of(self.path)

    @property
    def environment(self) -> dict[str, Any]:
        """The environment of this run, and in ``before`` those that it was in until resumed."""
        return read_json(self.path / "environment.json")

    def finished(self, name: str) -> bool:
        """Whether the part ``name`` needs no more computing, as process 0 sees it."""
        return broadcast_flag((self._parts / f"{name}.json").exists())

    def part(self, name: str, compute: Callable[[], Sequence[dict[str, Any]]]) -> list[dict]:
        """Rows of the part ``name``: read back where finished, else computed and kept.

        A digest of the rows, and of arrays in ``part_file``, is kept with them.

        Raises:
          InputError: what was kept is not what was written.
        """
        if not self.finished(name):
            rows, file = list(compute()), self._parts / f"{name}.json"
            on_process_zero(lambda: write_json(file, self._with_digest(name, rows)))
        return cast(list[dict], self._read_part(name)["rows"])

    def _with_digest(self, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        arrays = self.part_file(name)
        content = {
            "arrays": hashes([arrays])[arrays.name] if arrays.exists() else None,
            "rows": json.loads(json.dumps(rows, default=str)),
        }
        return {"sha256": _digest(name, content), **content}

    def _read_part(self, name: str) -> dict[str, Any]:
        file = self._parts / f"{name}.json"
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            kept = None
        except OSError as error:
            raise InputError(
                f"{file}: cannot be read ({error.strerror}); delete it, and resume=True computes "
                "it anew"
            ) from None
        if isinstance(kept, list):
            raise InputError(
                f"{file}: has no digest, so it is damaged or an older version's; delete the folder "
                f"{self.path}, and begin anew"
            )
        if isinstance(kept, dict) and kept.keys() == {"sha256", "arrays", "rows"}:
            digest = kept.pop("sha256")
            if digest == _digest(name, kept):
                return cast(dict[str, Any], kept)
        raise InputError(
            f"{file}: damaged, or changed since it was written; delete it, and resume=True "
            "computes it anew"
        )

    def part_arrays(self, name: str) -> dict[str, np.ndarray]:
        """What a finished part keeps in ``part_file``.

        Raises:
          InputError: it is not what was written with the rows.
        """
        file, rows = self.part_file(name), self._parts / f"{name}.json"
        digest = self._read_part(name)["arrays"]
        arrays = read_arrays(file, f"delete {rows} too, and resume=True computes both anew")
        if hashes([file])[file.name] != digest:
            raise InputError(
                f"{file}: changed since it was written; delete it and {rows}, and resume=True "
                "computes both anew"
            )
        return arrays

    def remove(self) -> None:
        """Delete the folder, where it only held what a finished run no longer needs.

        Parts first, so that a run killed here is begun anew, not taken for damaged.
        """

        def delete() -> None:
            for file in sorted(self._parts.glob("*.json")):
                file.unlink()
            shutil.rmtree(self._parts)
            shutil.rmtree(self.path)

        on_process_zero(delete)

    def part_file(self, name: str) -> Path:
        """Where a part may keep arrays (``.npz``) beside its rows; write them first."""
        return self._parts / f"{name}.npz"

    def write_metrics(
        self, rows: Sequence[dict[str, Any]], columns: Columns | None = None
    ) -> pd.DataFrame:
        """Write ``metrics.csv``, the truth that tables and figures are drawn from.

        Raises:
          InputError: rows do not have the columns; parts were damaged.
        """
        if columns is not None:
            columns.check(pd.DataFrame(rows), f"{self._parts}")
        write_table(pd.DataFrame(rows), self.path / "metrics.csv")
        return read_metrics(self.path)


def _digest(name: str, content: dict[str, Any]) -> str:
    """SHA-256 of a part's content and its name."""
    return hashlib.sha256(json.dumps([name, content]).encode()).hexdigest()


def figures_of(folder: Path) -> Path:
    """Where the figures of a run folder go."""
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    return figures


def check_record(config: Any, folder: Path, name: str) -> None:
    """Whose record a folder holds, before the run that ``keep_record`` is to copy there.

    Args:
      config: settings of the run.
      folder: where its record is to go.
      name: of the argument that names it.

    Raises:
      InputError: it is that of a run of other settings.
    """
    settings = folder / "config.json"
    difference = _difference(read_json(settings), config) if settings.exists() else None
    if difference is not None:
        setting, then, now = difference
        other = "which this version does not have" if now is None else f"not {now}"
        raise InputError(
            f"{name} {folder}: holds the record of a run with {setting} {then}, {other}; choose "
            "another folder"
        )


def keep_record(run: Path, folder: Path, name: str, *, metrics: str = "metrics.csv") -> None:
    """Copy what tables are written from, and hashes of inputs, to a folder that lasts.

    Args:
      run: folder of a finished run.
      folder: where to.
      name: of the argument that names it.
      metrics: file that tables are written from.

    Raises:
      InputError: the run has no metrics or no settings, or the folder cannot be written.
    """
    record = (metrics, "config.json", "environment.json")
    for file in record:
        if not (run / file).is_file():
            raise InputError(f"{run}: has no {file}")
    check_writable(folder, name)
    if run.resolve() == folder.resolve():
        return
    for file in (*record, "inputs.json"):
        if (run / file).is_file():
            with replacing(folder / file) as partial:
                shutil.copyfile(run / file, partial)


def _difference(there: Mapping[str, Any], config: Any) -> tuple[str, str, str | None] | None:
    """The first setting in which a record differs, what it was, and is (``None``: no more)."""
    name = differing(there, config)
    if name is None:
        return None
    here = configuration(config)
    then = _shown(there[name]) if name in there else "as it was before there was this choice"
    return name, then, _shown(here[name]) if name in here else None


def _shown(value: Any) -> str:
    """A setting as it is given on a command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


class Recorded(NamedTuple):
    """What a finished run says of itself."""

    configuration: dict[str, Any]
    inputs: dict[str, Any]
    environment: dict[str, Any]


def recorded(folder: Path) -> Recorded:
    """Configuration, input hashes and environment of the run in a folder.

    A pruned checkpoint has them in ``pruning.json``, a run folder in files of their own.

    Raises:
      InputError: they are not there.
    """
    report = Path(folder) / "pruning.json"
    if report.is_file():
        content = read_json(report)
        parts = [content.get(name) for name in Recorded._fields]
    else:
        names = ("config.json", "inputs.json", "environment.json")
        parts = [read_json(Path(folder) / name) for name in names]
    if not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{report}: lacks the configuration, inputs or environment of the run")
    return Recorded(*cast(list[dict], parts))


def recorded_configuration(folder: Path) -> dict[str, Any] | None:
    """Configuration of the run in a folder, finished or not; ``None`` where there is none."""
    for file in (Path(folder) / "pruning.json", Path(folder) / "config.json"):
        with contextlib.suppress(InputError):
            content = read_json(file)
            content = content.get("configuration", {}) if file.name == "pruning.json" else content
            if isinstance(content, dict):
                return content
    return None


def _check_inputs(there: Mapping[str, Any], here: Mapping[str, Any], where: str) -> None:
    """Raise ``InputError`` naming the first input that is not the one it was."""
    for flag in sorted(there.keys() | here.keys()):
        if there.get(flag) != here.get(flag):
            raise InputError(
                f"{where}: that run was begun with other files for `{flag}` than those that are "
                "there now"
            )
