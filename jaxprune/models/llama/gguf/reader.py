"""What is in a GGUF file: settings by name, and where its tensors lie.

The header is read here and not by ``gguf.GGUFReader``, which believes what a file says: counts,
lengths and offsets are compared with the size of the file before anything is made of them. Types
of tensors and their sizes, and turning them into floats, are the package's.

Source: the format's specification, ``docs/gguf.md`` of ggml.
"""

from __future__ import annotations

import functools
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune.errors import InputError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_TEXT, _ARRAY, _BOOL, _FLOAT32 = 8, 9, 7, 6
# Types of settings that are numbers, by their code.
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_DEFAULT_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
# Least bytes of a setting (length of its name, type, one byte) and of a tensor's entry.
_LEAST_SETTING, _LEAST_TENSOR = 13, 32
# How the types are stored that need no conversion; the others become float32.
_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}


def package() -> Any:
    """The package ``gguf``.

    Raises:
      InputError: it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise InputError("reading GGUF needs `pip install 'jaxprune[gguf]'`") from None
    return gguf


class Entry(NamedTuple):
    """A tensor of the file.

    Attributes:
      shape: as NumPy has it, rows first.
      kind: name of its type, such as ``Q4_0``.
      start: of its bytes in the file.
      size: of its bytes.
    """

    shape: tuple[int, ...]
    kind: str
    start: int
    size: int


class Header(NamedTuple):
    """A file's settings and tensors by name.

    Attributes:
      settings: numbers, truth values, texts, lists of texts, arrays of numbers.
      tensors: where they lie.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, Entry]


def read_header(file: Path) -> Header:
    """The header of a GGUF file, all of it compared with the size of the file.

    Raises:
      InputError: it is not a whole GGUF file of a version and with types that are read.
    """
    with file.open("rb") as stream:
        cursor = _Cursor(stream, os.fstat(stream.fileno()).st_size)
        tensor_count, setting_count = _read_start(cursor)
        settings: dict[str, Any] = {}
        for _ in range(setting_count):
            name = cursor.text("the name of a setting")
            if name in settings:
                raise damaged(f"two settings are named {name!r:.60}")
            settings[name] = _read_value(cursor, name)
        stored = {}
        for _ in range(tensor_count):
            name = cursor.text("the name of a tensor")
            if name in stored:
                raise damaged(f"two tensors are named {name!r:.60}")
            stored[name] = _read_entry(cursor, name)
        return Header(settings, _placed(stored, settings, cursor))


def read_tensor(file: Path, name: str, entry: Entry) -> np.ndarray:
    """A tensor in float32, float16 or bfloat16 if it is stored so, else as float32.

    Raises:
      InputError: it holds NaN or infinity.
    """
    with file.open("rb") as stream:
        stream.seek(entry.start)
        content = np.fromfile(stream, np.uint8, entry.size)
    if content.size < entry.size:
        raise damaged(f"the file ends inside {name}")
    if entry.kind in _PLAIN:
        tensor = content.view(_PLAIN[entry.kind])
    else:
        tensor = _dequantised(content.reshape(math.prod(entry.shape[:-1]), -1), entry.kind)
    # Flags of damaged numbers are of no interest: what comes of them is looked at.
    with np.errstate(all="ignore"):
        if not np.isfinite(tensor).all():
            raise InputError(f"{name} holds NaN or infinity")
    return tensor.reshape(entry.shape)


def damaged(what: str) -> InputError:
    """The error of a file that does not hold together."""
    return InputError(f"not a whole GGUF file ({what}); fetch it anew")


class _Cursor:
    """A place in a file, and how to go on from there without leaving the file."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self.size, self.position = stream, size, 0

    @property
    def left(self) -> int:
        return self.size - self.position

    def take(self, count: int, what: str) -> bytes:
        """The next bytes; ``count`` is looked at before any memory is taken."""
        content = self._stream.read(count) if count <= self.left else b""
        if len(content) < count:
            raise damaged(f"it ends inside {what}")
        self.position += count
        return content

    def number(self, code: str, what: str) -> int:
        (value,) = struct.unpack(code, self.take(struct.calcsize(code), what))
        return int(value)

    def text(self, what: str) -> str:
        content = self.take(self.number("<Q", what), what)
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise damaged(f"{what} is not UTF-8") from None


def _read_start(cursor: _Cursor) -> tuple[int, int]:
    """How many tensors and settings follow."""
    magic = cursor.take(min(4, cursor.size), "its first word")
    if magic != _MAGIC:
        raise InputError(f"not a GGUF file (it starts with {magic!r}, not {_MAGIC!r})")
    version = cursor.number("<I", "its version")
    if version not in _VERSIONS:
        # A version is a small number: in the other byte order it is a large one.
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        named = "big-endian" if swapped in _VERSIONS else f"version {version}"
        raise InputError(f"GGUF of {named} is not supported, only little-endian 2 and 3")
    tensors, settings = (cursor.number("<Q", "its counts") for _ in range(2))
    if tensors * _LEAST_TENSOR + settings * _LEAST_SETTING > cursor.left:
        raise damaged(
            f"it says it holds {tensors} tensors and {settings} settings, in {cursor.size} bytes"
        )
    return tensors, settings


def _read_value(cursor: _Cursor, name: str) -> Any:
    what = f"{name!r:.60}"
    kind = cursor.number("<I", what)
    if kind == _TEXT:
        return cursor.text(what)
    if kind in _NUMBERS:
        value = _read_numbers(cursor, kind, 1, what)[0]
        # 1e-5 in float32 is written 1e-05, not 9.999999747378752e-06.
        return float(str(value)) if kind == _FLOAT32 else value.item()
    if kind != _ARRAY:
        raise damaged(f"{what} is of the unknown type {kind}")
    kind, count = cursor.number("<I", what), cursor.number("<Q", what)
    if kind in _NUMBERS:
        return _read_numbers(cursor, kind, count, what)
    if kind != _TEXT:
        raise damaged(f"{what} is an array of type {kind}")
    if 8 * count > cursor.left:
        raise damaged(f"{what} says it has {count} texts")
    return [cursor.text(what) for _ in range(count)]


def _read_numbers(cursor: _Cursor, kind: int, count: int, what: str) -> np.ndarray:
    dtype = np.dtype(_NUMBERS[kind])
    content = cursor.take(count * dtype.itemsize, what)
    if kind == _BOOL:
        return np.frombuffer(content, np.uint8) != 0
    return np.frombuffer(content, dtype)


def _read_entry(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], int, int]:
    """Shape, code of the type, and offset of a tensor."""
    what = f"the entry of {name!r:.60}"
    dimensions = cursor.number("<I", what)
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise damaged(f"{name!r:.60} says it has {dimensions} dimensions")
    # The file has the fastest axis first.
    shape = tuple(cursor.number("<Q", what) for _ in range(dimensions))[::-1]
    if min(shape) < 1:
        raise damaged(f"{name!r:.60} is empty")
    return shape, cursor.number("<I", what), cursor.number("<Q", what)


def _placed(
    stored: Mapping[str, tuple[tuple[int, ...], int, int]],
    settings: Mapping[str, Any],
    cursor: _Cursor,
) -> dict[str, Entry]:
    """Entries with their bytes, which lie in the file and are no other tensor's.

    Overlapping tensors would let a small file become a large checkpoint.
    """
    alignment = settings.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise damaged(f"general.alignment is {alignment!r:.40}, not a power of two")
    first = -(-cursor.position // alignment) * alignment
    entries = {}
    for name, (shape, code, offset) in stored.items():
        kind, block, size = _kind(code)
        if shape[-1] % block:
            raise damaged(f"rows of {name!r:.60} have {shape[-1]} entries, {kind} has {block}")
        size = math.prod(shape) // block * size
        if offset % alignment:
            raise damaged(f"{name!r:.60} starts at {offset}, not a multiple of {alignment}")
        if first + offset + size > cursor.size:
            raise damaged(f"the file ends inside {name!r:.60}")
        entries[name] = Entry(shape, kind, first + offset, size)
    end = first
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start < end:
            raise damaged(f"{name!r:.60} overlaps another tensor")
        end = entry.start + entry.size
    return entries


@functools.cache
def _kind(code: int) -> tuple[str, int, int]:
    """Name of a type of tensors, and the entries and bytes of one of its blocks."""
    gguf = package()
    try:
        kind = gguf.GGMLQuantizationType(code)
        block, size = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise InputError(
            f"holds tensors of type {code}, which this version of the package gguf does not know"
        ) from None
    if kind.name not in _PLAIN:
        try:
            _dequantised(np.zeros((1, size), np.uint8), kind.name)
        except NotImplementedError:
            raise InputError(
                f"holds tensors of type {kind.name}, which the package gguf does not turn into "
                "floats"
            ) from None
    return kind.name, block, size


def _dequantised(rows: np.ndarray, kind: str) -> np.ndarray:
    gguf = package()
    with np.errstate(all="ignore"):
        floats = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    return np.asarray(floats, np.float32)
