"""Files that are there whole or not at all: JSON, arrays, new folders, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxprune.errors import InputError


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


def check_new_folder(out: Path, flag: str = "--out") -> None:
    """Raise ``InputError`` unless ``new_folder(out)`` will find its place."""
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{flag} {out}: exists and is not empty; choose another folder")
        # Folders on the way are made when there is something to put there.
        there = next(p for p in out.resolve().parents if p.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"{flag} {out}: cannot write there ({error.strerror})") from None
    except RuntimeError:  # of resolve
        raise InputError(f"{flag} {out}: is a link to itself; choose another folder") from None


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out`` to fill; rename it to ``out`` when all went well.

    Raises:
      InputError: ``out`` exists and is not an empty folder, or cannot be written.
    """
    check_new_folder(out)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-", suffix=".partial"))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
