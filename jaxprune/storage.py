"""Files that are there whole or not at all: JSON, arrays, new folders, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxprune.errors import InputError

# What `tempfile` puts between our prefix and our suffix.
_RANDOM, _PARTIAL = r"[a-z0-9_]{8}", ".partial"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; rename it onto ``path`` when all went well.

    A reader of ``path`` sees the old file or the whole new one, never a part.
    """
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{_short(path.stem)}-", suffix=f"{_PARTIAL}{path.suffix}"
    )
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def is_name(text: str) -> bool:
    """Whether a text can be the name of a file, and be written into one.

    Null characters are in no name. Bytes of an argument that are not UTF-8 become surrogates,
    which cannot be written into cards and figures.
    """
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


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
        raw = file.read_bytes()
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_named_once)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (ValueError, RecursionError):
        if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
            raise InputError(
                f"{file}: begins with a byte-order mark; save it as UTF-8 without one"
            ) from None
        raise InputError(f"{file}: not valid JSON") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds {type(content).__name__}, expected a JSON object")
    return content


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a name that is there twice, readers take one value or the other."""
    twice = first_repeated(name for name, _ in pairs)
    if twice is not None:
        raise InputError(f"names {twice!r:.60} twice; remove one of them")
    return dict(pairs)


def first_repeated(names: Iterable[str]) -> str | None:
    """The first name that was there before, ``None`` where all are different."""
    seen = set[str]()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays as a compressed ``.npz``, whole or not at all.

    NumPy compresses harder, to a tenth less, and takes three times as long.
    """
    with (
        replacing(path) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)


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
    digests = {}
    for path in files:
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def check_writable(out: Path, name: str = "out") -> None:
    """Create the folder ``out`` if need be; raise ``InputError`` where nothing can be written.

    Args:
      out: the folder.
      name: of the argument that names it, for the message; empty where none does.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(
            f"{name} {out}: cannot write there ({error.strerror}); choose another folder".lstrip()
        ) from None


def check_new_folder(out: Path, name: str = "out") -> None:
    """Raise ``InputError`` unless ``new_folder(out)`` will find its place.

    Args:
      out: the folder.
      name: see ``check_writable``.
    """
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{name} {out}: exists and is not empty; choose another folder")
        # Folders on the way are made when there is something to put there.
        there = next(p for p in out.resolve().parents if p.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"{name} {out}: cannot write there ({error.strerror})") from None
    except RuntimeError:  # of resolve
        raise InputError(f"{name} {out}: is a link to itself; choose another folder") from None


@contextlib.contextmanager
def new_folder(out: Path, name: str = "out") -> Iterator[Path]:
    """Yield a folder beside ``out`` to fill; rename it to ``out`` when all went well.

    Args:
      out: the folder.
      name: see ``check_writable``.

    Raises:
      InputError: ``out`` exists and is not an empty folder, or cannot be written.
    """
    check_new_folder(out, name)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(
        tempfile.mkdtemp(dir=out.parent, prefix=f".{_short(out.name)}-", suffix=_PARTIAL)
    )
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def work_folder(out: Path) -> Path:
    """A folder beside the new folder ``out``, for what is needed to go on with making it.

    One and the same for all links to ``out``.
    """
    home = Path(out).resolve()
    return home.parent / f".{_short(home.name)}.work"


def remove_partial_folders(out: Path) -> None:
    """Delete what a process that was killed in ``new_folder(out)`` left beside ``out``.

    To be called where no other process is in ``new_folder(out)``.
    """
    home = Path(out).resolve()
    ours = re.compile(rf"\.{re.escape(_short(home.name))}-{_RANDOM}{re.escape(_PARTIAL)}")
    for folder in _entries(home.parent):
        if ours.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def remove_partial_files(folder: Path) -> None:
    """Delete what a process that was killed in ``replacing`` left in a folder; see above."""
    ours = re.compile(rf"\..+-{_RANDOM}{re.escape(_PARTIAL)}(\.\w+)?")
    for file in _entries(folder):
        if ours.fullmatch(file.name) and file.is_file():
            file.unlink(missing_ok=True)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _short(name: str) -> str:
    """A name to which ``.-12345678.partial`` can be added; the longest may have 255 bytes."""
    if len(name.encode()) <= 200:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name.encode()[:180].decode(errors='ignore')}-{digest}"
