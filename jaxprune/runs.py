"""One folder per run: configuration, environment, metrics, figures; resumable, never mixed.

A run is a list of named *parts*, each of which yields rows of metrics. A finished part is one
file; an interrupted run loses at most the part that was being computed, and a resumed run
recomputes nothing else, so it ends with the same rows as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import filelock
import jax
import numpy as np
import pandas as pd

from jaxprune.errors import InputError

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
    """A configuration dataclass as plain JSON values, without ``out`` and ``resume``."""
    fields = dataclasses.asdict(config)
    for where in ("out", "resume"):
        fields.pop(where, None)
    return cast(dict[str, Any], json.loads(json.dumps(fields, default=str)))


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays as a compressed ``.npz``, whole or not at all."""
    with replacing(path) as partial:
        np.savez_compressed(partial, **arrays)


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
    """The folder of one run, held by one process at a time.

    Use as a context manager::

        with RunFolder(out, config, resume=True) as run:
            rows = run.part("k16", lambda: compute(...))   # computed once, then read back
            run.write_metrics(rows)

    Raises:
      InputError: the folder cannot be written, holds another run (other settings, or the same
        ones without ``resume``), or is in use by another process.
    """

    def __init__(self, out: Path, config: Any, *, resume: bool = False) -> None:
        self.path = Path(out)
        self._config = configuration(config)
        self._resume = resume

    def __enter__(self) -> RunFolder:
        check_writable(self.path)
        self._lock = filelock.FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise InputError(f"--out {self.path}: another run is writing there") from None
        try:
            self._claim()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _claim(self) -> None:
        settings = self.path / "config.json"
        if settings.exists():
            there = json.loads(settings.read_text())
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
        self._parts.mkdir(exist_ok=True)
        write_json(self.path / "environment.json", environment())
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
        """Rows of the part ``name``: read back where finished, else computed and kept."""
        file = self._parts / f"{name}.json"
        if not file.exists():
            write_json(file, list(compute()))
        return cast(list[dict], json.loads(file.read_text()))

    def remove(self) -> None:
        """Delete the folder, where it only held what a finished run no longer needs."""
        shutil.rmtree(self.path)

    def part_file(self, name: str) -> Path:
        """Where a part may keep arrays (``.npz``) beside its rows; write them first."""
        return self._parts / f"{name}.npz"

    def write_metrics(self, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
        """Write ``metrics.csv``, the truth that tables and figures are drawn from."""
        with replacing(self.path / "metrics.csv") as partial:
            pd.DataFrame(rows).to_csv(partial, index=False)
        return read_metrics(self.path)


def read_metrics(folder: Path) -> pd.DataFrame:
    """The metrics of a run folder.

    Raises:
      InputError: there are none.
    """
    file = Path(folder) / "metrics.csv"
    if not file.is_file():
        raise InputError(f"{file}: no such file; run the experiment first")
    return pd.read_csv(file)
