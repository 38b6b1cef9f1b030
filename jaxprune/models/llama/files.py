"""The files of a Hugging Face checkpoint: which there are, which tensors they hold.

Only safetensors are read, never pickles. A file is opened anew for every tensor, because a
memory-mapped file counts as memory for as far as it was read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxprune.errors import InputError
from jaxprune.storage import first_repeated, hashes, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Read, but not carried over: a new checkpoint has a card of its own.
CARD_FILE = "README.md"
LICENCE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")

# Files besides the weights that make a checkpoint and are carried over to a new one.
CARRIED = (
    "config.json",
    "generation_config.json",
    INDEX_FILE,
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
    *LICENCE_FILES,
)


class StoredTensor(NamedTuple):
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """The tensors of a checkpoint folder by name, one file or several shards.

    Raises:
      InputError: no safetensors, a missing or broken file, or a shard outside the folder.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> TensorFiles:
        """Read the headers of all weight files of a folder."""
        if (folder / SINGLE_FILE).exists():
            return cls(folder, _read_header(folder / SINGLE_FILE))
        if not (folder / INDEX_FILE).exists():
            pickles = sorted(p.name for e in ("*.bin", "*.pt", "*.pth") for p in folder.glob(e))
            found = f" (pickles such as {pickles[0]} are not read)" if pickles else ""
            raise InputError(f"{folder}: holds no {SINGLE_FILE} and no {INDEX_FILE}{found}")
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{folder / INDEX_FILE}: lacks the object weight_map")
        tensors: dict[str, StoredTensor] = {}
        headers: dict[Path, dict[str, StoredTensor]] = {}
        for name, entry in weight_map.items():
            file = _inside(folder, entry)
            if file not in headers:
                headers[file] = _read_header(file)
            if name not in headers[file]:
                raise InputError(f"{file}: lacks {name}, which {INDEX_FILE} says it holds")
            tensors[name] = headers[file][name]
        for file, header in headers.items():
            for name in header:
                if name in tensors and tensors[name].file != file:
                    raise InputError(
                        f"{folder}: holds {name!r:.80} twice, in {file.name} and in "
                        f"{tensors[name].file.name}; fetch the checkpoint anew"
                    )
        return cls(folder, tensors)

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its own type."""
        return _read_tensor(self.tensors[name].file, name)

    @property
    def files(self) -> list[Path]:
        """The weight files, each once."""
        return sorted({tensor.file for tensor in self.tensors.values()})


def _inside(folder: Path, entry: Any) -> Path:
    """The shard that an entry of ``weight_map`` names; it must lie in the folder itself.

    In the cache of the hub's client a snapshot's files are links into ``blobs`` two levels up.
    """
    where = folder / INDEX_FILE
    if not isinstance(entry, str) or PurePath(entry).name != entry or "\\" in entry:
        raise InputError(f"{where}: weight_map names {entry!r:.80}, which is not a file beside it")
    if PurePath(entry).suffix != ".safetensors":
        raise InputError(f"{where}: weight_map names {entry!r:.80}; only safetensors are read")
    file = folder / entry
    home, target = folder.resolve(), file.resolve()
    if target.parent not in (home, home.parent.parent / "blobs"):
        raise InputError(f"{where}: weight_map names {entry}, a link to outside the folder")
    return file


def _read_header(file: Path) -> dict[str, StoredTensor]:
    if file.is_dir():
        raise InputError(f"{file}: is a folder, expected a safetensors file")
    with _opened(file) as tensors:
        _check_names(file)
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return {
            name: StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
            for name, part in slices.items()
        }


def _check_names(file: Path) -> None:
    """Raise ``InputError`` where a tensor is there twice, of which readers take one or the other.

    The header is one that safetensors has read.
    """

    def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = first_repeated(name for name, _ in pairs)
        if twice is not None:
            raise InputError(f"{file}: holds {twice!r:.80} twice; fetch it anew")
        return dict(pairs)

    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        json.loads(stream.read(size), object_pairs_hook=named_once)


def _read_tensor(file: Path, name: str) -> np.ndarray:
    with _opened(file) as tensors:
        return tensors.get_tensor(name)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; the checkpoint is incomplete") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error})") from None
    except SafetensorError as error:
        raise InputError(f"{file}: not a whole safetensors file ({error}); fetch it anew") from None


def check_outside(out: Path, source: Path) -> None:
    """Raise ``InputError`` for a new folder inside the folder of the checkpoint it is made from."""
    home = Path(source).resolve()
    if home == Path(out).resolve() or home in Path(out).resolve().parents:
        raise InputError(
            f"out {out}: is inside the folder of the model, {source}; choose another folder"
        )


@contextlib.contextmanager
def patch_tensors(file: Path) -> Iterator[Any]:
    """Yield ``replace(name, tensor)``, which overwrites a tensor of a safetensors file in place.

    The layout of the file, its header and all other bytes stay.
    """
    with file.open("r+b") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))

        def replace(name: str, tensor: np.ndarray) -> None:
            start, stop = header[name]["data_offsets"]
            content = np.ascontiguousarray(tensor).tobytes()
            if len(content) != stop - start:
                raise ValueError(f"{name}: {len(content)} bytes for a place of {stop - start}")
            stream.seek(8 + size + start)
            stream.write(content)

        yield replace


def checkpoint_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of what a checkpoint's numbers come from: settings, weights, tokenizer, by name."""
    patterns = ("config.json", INDEX_FILE, "*.safetensors", "tokenizer*.json")
    return hashes(sorted({f for p in patterns for f in folder.glob(p) if f.is_file()}))


def copy_carried(source: Path, target: Path) -> None:
    """Copy configuration and tokenizer files from one checkpoint folder to another."""
    for pattern in CARRIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
