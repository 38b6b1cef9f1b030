"""One folder per run: configuration, environment, metrics, figures; resumable, never mixed.

A run is a list of named *parts*, each of which yields rows of metrics. A finished part is one
file; an interrupted run loses at most the part that was being computed, and a resumed run
recomputes nothing else, so it ends with the same rows as an uninterrupted one.

The folder holds what is needed to repeat the run: its configuration, versions, and hashes of the
files it read. ``differences`` compares a repetition with the original.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, cast

import filelock
import jax
import numpy as np
import pandas as pd

from jaxprune.errors import InputError
from jaxprune.sharding import agreed, by_writer, is_writer

_RECORDED_PACKAGES = ("jaxprune", "jax", "jaxlib", "flax", "optax", "numpy", "safetensors")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; rename it onto ``path`` when all went well.

    A reader of ``path`` sees the old file or the whole new one, never a part.
    """
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.stem}-", suffix=f".partial{path.suffix}"
    )
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      InputError: there is no such file, or no JSON object in it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise InputError(f"{file}: not valid JSON") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds {type(content).__name__}, expected a JSON object")
    return content


def environment() -> dict[str, Any]:
    """What a number depends on besides the configuration: versions, device, command."""
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
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "device_count": jax.device_count(),
        "cpu_count": os.cpu_count(),
    }


def configuration(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain JSON values, without where and whether it goes on."""
    fields = dataclasses.asdict(config)
    for where in ("out", "resume", "repeat", "mesh", "coordinator", "processes", "process"):
        fields.pop(where, None)
    return cast(dict[str, Any], json.loads(json.dumps(fields, default=str)))


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays as a compressed ``.npz``, whole or not at all."""
    with replacing(path) as partial:
        np.savez_compressed(partial, **arrays)


def read_arrays(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz``.

    Raises:
      InputError: it cannot be read; the message ends with the remedy.
    """
    try:
        with path.open("rb") as raw, np.lib.npyio.NpzFile(raw) as file:
            # Zeros shrink a thousandfold: without this a small file could take all memory.
            archive = cast(zipfile.ZipFile, file.zip)
            size, memory = sum(entry.file_size for entry in archive.infolist()), _memory()
            if size > memory:
                raise InputError(
                    f"{path}: holds {size / 2**30:.1f} GiB, the machine {memory / 2**30:.1f} GiB"
                )
            return {name: np.asarray(file[name]) for name in file.files}
    except (InputError, MemoryError):
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; {remedy}") from None
    except Exception as error:  # noqa: BLE001 - zip, its codecs and NumPy's parser raise anything
        raise InputError(f"{path}: not a whole .npz of plain arrays ({error}); {remedy}") from None


def _memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def hashes(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of files by their names."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def check_writable(out: Path, flag: str = "--out") -> None:
    """Create the folder ``out`` if need be; raise ``InputError`` where nothing can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(
            f"{flag} {out}: cannot write there ({error.strerror}); choose another folder"
        ) from None


class RunFolder:
    """The folder of one run, held by one run at a time, of which process 0 writes.

    Use as a context manager::

        with RunFolder(out, config, resume=True) as run:
            rows = run.part("k16", lambda: compute(...))   # computed once, then read back
            run.write_metrics(rows)

    Where wrong input only shows while a new run is under way (``InputError`` in the block), the
    folder is taken away again: nothing in it could be continued.

    Raises:
      InputError: the folder cannot be written, holds another run (other settings or inputs, or the
        same ones without ``resume``), or is in use by another process; or ``config.repeat`` names a
        run that had other inputs.

    Args:
      out: the folder.
      config: dataclass of settings.
      resume: go on with the run that is there.
      inputs: flag to ``hashes`` of what it names; kept with the run.
    """

    def __init__(
        self,
        out: Path,
        config: Any,
        *,
        resume: bool = False,
        inputs: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.path = Path(out)
        self.inputs = {flag: dict(files) for flag, files in (inputs or {}).items()}
        self._config = configuration(config)
        self._resume = resume
        self._repeats: Path | None = getattr(config, "repeat", None)

    def __enter__(self) -> RunFolder:
        by_writer(self._open)
        return self

    def _open(self) -> None:
        self._fresh = not (self.path.is_dir() and any(self.path.iterdir()))
        self._check_whose()
        self._made = [p for p in self.path.absolute().parents if not p.exists()]
        check_writable(self.path)
        self._lock = filelock.FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise InputError(f"--out {self.path}: another run is writing there") from None
        try:
            self._claim()
        except BaseException as error:
            self._close(type(error))
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if is_writer():
            self._close(kind)

    def _close(self, kind: type[BaseException] | None) -> None:
        if self._fresh and kind is not None and issubclass(kind, InputError):
            shutil.rmtree(self.path, ignore_errors=True)
            for parent in self._made:  # innermost first
                with contextlib.suppress(OSError):
                    parent.rmdir()
        self._lock.release()

    def _check_whose(self) -> None:
        """Raise ``InputError`` where files are that no run, nor a beginning of one, left there.

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
                f"--out {self.path}: holds {others[0]}, but not a whole run; choose a new or an "
                "empty folder"
            )

    def _claim(self) -> None:
        settings, inputs = self.path / "config.json", self.path / "inputs.json"
        if self._repeats is not None:
            _check_inputs(recorded(self._repeats).inputs, self.inputs, f"--repeat {self._repeats}")
        if settings.exists():
            there = read_json(settings)
            if not self._resume:
                raise InputError(
                    f"--out {self.path} holds a run already; --resume continues it, "
                    "another --out starts anew"
                )
            differing = sorted(
                key
                for key in there.keys() | self._config.keys()
                if there.get(key) != self._config.get(key)
            )
            if differing:
                key = differing[0]
                raise InputError(
                    f"--out {self.path} holds a run with --{key.replace('_', '-')} "
                    f"{there.get(key)}, not {self._config.get(key)}; choose another --out"
                )
            if inputs.exists():
                _check_inputs(read_json(inputs), self.inputs, f"--out {self.path}")
        self._parts.mkdir(exist_ok=True)
        write_json(self.path / "environment.json", environment())
        write_json(inputs, self.inputs)
        write_json(settings, self._config)

    @property
    def _parts(self) -> Path:
        return self.path / "parts"

    @property
    def figures(self) -> Path:
        """Where figures go."""
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        return folder

    def finished(self, name: str) -> bool:
        """Whether the part ``name`` needs no more computing."""
        return (self._parts / f"{name}.json").exists()

    def part(self, name: str, compute: Callable[[], Sequence[dict[str, Any]]]) -> list[dict]:
        """Rows of the part ``name``: read back where finished, else computed and kept.

        A digest of the rows, and of arrays in ``part_file``, is kept with them.

        Raises:
          InputError: what was kept is not what was written.
        """
        file = self._parts / f"{name}.json"
        if not agreed(file.exists()):
            rows = list(compute())
            by_writer(lambda: write_json(file, self._with_digest(name, rows)))
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
            f"{file}: damaged, or changed since it was written; delete it, and --resume computes "
            "it anew"
        )

    def part_arrays(self, name: str) -> dict[str, np.ndarray]:
        """What a finished part keeps in ``part_file``.

        Raises:
          InputError: it is not what was written with the rows.
        """
        file, rows = self.part_file(name), self._parts / f"{name}.json"
        digest = self._read_part(name)["arrays"]
        arrays = read_arrays(file, f"delete {rows} too, and --resume computes both anew")
        if hashes([file])[file.name] != digest:
            raise InputError(
                f"{file}: changed since it was written; delete it and {rows}, and --resume "
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

        by_writer(delete)

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
        with replacing(self.path / "metrics.csv") as partial:
            pd.DataFrame(rows).to_csv(partial, index=False)
        return read_metrics(self.path)


def _digest(name: str, content: dict[str, Any]) -> str:
    """SHA-256 of a part's content and its name."""
    return hashlib.sha256(json.dumps([name, content]).encode()).hexdigest()


class Columns(NamedTuple):
    """What the metrics of a script must have to be drawn.

    Attributes:
      numbers: columns of finite numbers.
      texts: columns of words.
      known: words that a column may have.
      sparse: columns of numbers that rows may lack.
    """

    numbers: tuple[str, ...]
    texts: tuple[str, ...] = ()
    known: Mapping[str, Iterable[str]] = {}
    sparse: tuple[str, ...] = ()

    def check(self, metrics: pd.DataFrame, where: str) -> None:
        """Raise ``InputError`` naming the first column that is not so, and ``where``."""
        asked = (*self.texts, *self.numbers, *self.sparse)
        _check_present(metrics, asked, where)
        for name in asked:
            column = metrics[name]
            if name in self.texts:
                good = column.isin(list(self.known[name])) if name in self.known else column.notna()
            else:
                good = np.isfinite(pd.to_numeric(column, errors="coerce").astype(float))
                good |= column.isna() & (name in self.sparse)
            if not good.all():
                raise InputError(
                    f"{where}: {name} {column[~good].iloc[0]}, not a "
                    f"{'word of this script' if name in self.texts else 'finite number'}; damaged, "
                    "or another script's"
                )


def _check_present(metrics: pd.DataFrame, names: Iterable[str], where: str) -> None:
    missing = [name for name in names if name not in metrics]
    if missing or metrics.empty:
        what = f"no column {missing[0]}" if missing else "no rows"
        raise InputError(f"{where}: {what}; not the metrics of this script, or damaged")


def read_metrics(folder: Path, columns: Columns | Sequence[str] = ()) -> pd.DataFrame:
    """The metrics of a run folder.

    Args:
      folder: of the run.
      columns: that must be there, by name or with what they must hold.

    Raises:
      InputError: there are none, or the file is damaged or another script's.
    """
    file = Path(folder) / "metrics.csv"
    if not file.is_file():
        raise InputError(f"{file}: no such file; run the experiment first")
    try:
        metrics = pd.read_csv(file)
    except ValueError as error:  # what pandas raises for no table, and for no text
        raise InputError(f"{file}: not a table ({error})") from None
    if isinstance(columns, Columns):
        columns.check(metrics, f"{file}")
    else:
        _check_present(metrics, columns, f"{file}")
    return metrics


@contextlib.contextmanager
def drawing_again(folder: Path) -> Iterator[None]:
    """What a damaged ``metrics.csv`` of a folder leads to, beyond ``Columns``, as one line."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder / 'metrics.csv'}: cannot be drawn ({error}); damaged, or of another version"
        ) from error


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


def _check_inputs(there: Mapping[str, Any], here: Mapping[str, Any], where: str) -> None:
    """Raise ``InputError`` naming the first input that is not the one it was."""
    for flag in sorted(there.keys() | here.keys()):
        if there.get(flag) != here.get(flag):
            raise InputError(
                f"{where}: that run was begun with other files for --{flag} than those that are "
                "there now"
            )


def differences(original: Path, repetition: Path) -> tuple[list[str], list[str]]:
    """Compare the results of two runs: metrics, arrays and weights.

    Returns:
      Names of files that are equal (metrics and arrays by value), and a line for each that is not.
    """
    original, repetition = Path(original), Path(repetition)
    equal, different = [], []
    for pattern in ("metrics.csv", "*.npz", "*.safetensors", "*/*.safetensors"):
        names = {
            path.relative_to(folder)
            for folder in (original, repetition)
            for path in folder.glob(pattern)
            if not path.name.startswith(".")
        }
        for name in sorted(names):
            found = _difference(original / name, repetition / name)
            if found is None:
                equal.append(str(name))
            else:
                different.append(f"{name}: {found}")
    return equal, different


def _difference(old: Path, new: Path) -> str | None:
    """How two result files differ, ``None`` where they do not."""
    for file in (old, new):
        if not file.is_file():
            return f"missing in {file.parent}"
    if hashes([old]) == hashes([new]):
        return None
    if old.suffix == ".npz":
        arrays, others = (read_arrays(file, "make the run anew") for file in (old, new))
        same = arrays.keys() == others.keys() and all(
            np.array_equal(arrays[name], others[name]) for name in arrays
        )
        return None if same else "other arrays"
    if old.suffix != ".csv":
        return "other bytes"
    tables = [read_metrics(file.parent) for file in (old, new)]
    if list(tables[0]) != list(tables[1]) or len(tables[0]) != len(tables[1]):
        return f"{tables[0].shape} rows and columns, then {tables[1].shape}, or other columns"
    return _column_differences(*tables)


def _column_differences(old: pd.DataFrame, new: pd.DataFrame) -> str | None:
    """Columns of two tables of one form that differ, numbers with their relative difference."""
    found = []
    for name in old:
        if old[name].equals(new[name]):
            continue
        if not all(pd.api.types.is_numeric_dtype(table[name]) for table in (old, new)):
            found.append(str(name))
            continue
        a, b = (table[name].to_numpy(float) for table in (old, new))
        scale = np.maximum(np.abs(a), np.abs(b))
        relative = np.abs(a - b) / np.where(scale > 0, scale, 1)
        found.append(f"{name} by up to {np.nanmax(relative, initial=0):.1e} of itself")
    return ", ".join(found) or None
