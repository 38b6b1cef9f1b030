"""From a GGUF file to a Hugging Face folder, once, in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import filelock
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxprune.errors import InputError
from jaxprune.models.llama.checkpoint import places_of
from jaxprune.models.llama.checks import check_size
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llama.files import SINGLE_FILE
from jaxprune.models.llama.gguf.reader import Entry, Header, package, read_header, read_tensor
from jaxprune.models.llama.gguf.settings import read_config, whole_number
from jaxprune.models.llama.gguf.tokenizer import TokenizerFiles, read_tokenizer
from jaxprune.models.llama.modeling import block_shapes

# Part of a folder's name: with another number every file is converted anew.
_VERSION = 1
_EMBEDDING, _HEAD, _ROPE = "token_embd.weight", "output.weight", "rope_freqs.weight"
# GGUF's names of what `checkpoint.TABLE` calls by the second word.
_NAMES = {
    "embedding": _EMBEDDING,
    "attention_norm": "blk.{}.attn_norm.weight",
    "wq": "blk.{}.attn_q.weight",
    "wk": "blk.{}.attn_k.weight",
    "wv": "blk.{}.attn_v.weight",
    "wo": "blk.{}.attn_output.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "w_gate": "blk.{}.ffn_gate.weight",
    "w_up": "blk.{}.ffn_up.weight",
    "w_down": "blk.{}.ffn_down.weight",
    "final_norm": "output_norm.weight",
    "lm_head": _HEAD,
}
# Types of numbers by GGUF's name, which is that of safetensors, and by NumPy's.
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
_SHOWN = 10  # names of a kind in an error


class _Part(NamedTuple):
    """A tensor to write.

    Attributes:
      source: its name in the GGUF file.
      shape: rows first.
      heads: whose rows are to be put in Hugging Face's order; ``None`` for other tensors.
    """

    source: str
    shape: tuple[int, ...]
    heads: int | None


def converted(file: Path) -> Path:
    """The Hugging Face folder made from a GGUF file: weights, config.json, tokenizer, template.

    It lies in the user's cache folder, ``jaxprune/gguf`` in ``XDG_CACHE_HOME`` or ``~/.cache``,
    under the file's SHA-256: a file is converted once, an altered one anew. Quantised weights
    become float32; a file of float16 or bfloat16 matrices stays so. Rows of ``W_Q`` and ``W_K``
    go from llama.cpp's order, the two components that are turned side by side, to Hugging Face's,
    in which they are half a head apart. The folder appears whole or not at all.

    Raises:
      InputError: the package ``gguf`` is not installed, the file is broken or not a Llama that
        this port computes, or the cache cannot be written.
    """
    if not file.is_file():
        raise InputError(
            f"{file}: no such file; give zoo, a folder, a .gguf, or owner/name on the hub"
        )
    try:
        package()
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "jaxprune" / "gguf" / f"{digest}-{_VERSION}"
        if not folder.is_dir():
            header = read_header(file)
            with _filled(folder) as partial:
                if partial is not None:
                    _convert(file, header, partial)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from None
    return folder


@contextlib.contextmanager
def _filled(folder: Path) -> Iterator[Path | None]:
    """Yield a folder to fill that becomes ``folder``, ``None`` if another process made it."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):
            if folder.is_dir():
                yield None
                return
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            try:
                partial.mkdir()
                yield partial
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"cannot be converted into {folder.parent} ({error.strerror or error}); make room "
            "there, or choose another place with XDG_CACHE_HOME"
        ) from None


def _convert(file: Path, header: Header, folder: Path) -> None:
    """Write the files of a Hugging Face folder."""
    settings, stored = header
    rows = _rows(stored)
    factors = None
    if _ROPE in stored:
        factors = read_tensor(file, _ROPE, stored[_ROPE]).astype(np.float32)
    config = read_config(settings, rows, _HEAD not in stored, factors)
    context = whole_number(settings, "llama.context_length")
    check_size("llama.context_length", context, 2**31)
    tokenizer = read_tokenizer(settings, rows, context)
    parts = _parts(config)
    _check_tensors(parts, stored)
    dtype = _dtype(file, parts, stored)
    _write_tensors(file, parts, stored, dtype, folder / SINGLE_FILE)
    content = {
        **config.to_json(),
        "max_position_embeddings": context,
        "torch_dtype": _DTYPES[dtype].name,
        **tokenizer.ids,
    }
    _write_texts(folder, content, tokenizer)


def _write_texts(folder: Path, content: Mapping[str, object], tokenizer: TokenizerFiles) -> None:
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(tokenizer.tokenizer, encoding="utf-8")
    named = json.dumps(tokenizer.settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(named)


def _rows(stored: Mapping[str, Entry]) -> int:
    if _EMBEDDING not in stored:
        raise InputError(f"lacks {_EMBEDDING}")
    return stored[_EMBEDDING].shape[0]


def _parts(config: LlamaConfig) -> dict[str, _Part]:
    """The tensors of a model by their names in Hugging Face's files."""
    d, v = config.hidden_size, config.vocab_size
    shapes = block_shapes(config)._asdict()
    shapes |= {"embedding": (v, d), "final_norm": (d,), "lm_head": (d, v)}
    heads = {"wq": config.num_attention_heads, "wk": config.num_key_value_heads}
    parts = {}
    for name, (path, layer, transposed) in places_of(config).items():
        shape = shapes[path][::-1] if transposed else shapes[path]
        parts[name] = _Part(_NAMES[path].format(layer), shape, heads.get(path))
    return parts


def _check_tensors(parts: Mapping[str, _Part], stored: Mapping[str, Entry]) -> None:
    """Raise ``InputError`` naming all tensors that are missing, unexpected or misshapen."""
    shapes = {part.source: part.shape for part in parts.values()}
    wrong = {
        "missing": [name for name in shapes if name not in stored],
        "unexpected": [f"{n!r:.60}" for n in stored if n not in shapes and n != _ROPE],
        "misshapen": [
            f"{name} {list(stored[name].shape)} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in stored and stored[name].shape != shape
        ],
    }
    if any(wrong.values()):
        found = "; ".join(f"{kind}: {_listed(names)}" for kind, names in wrong.items() if names)
        raise InputError(f"tensors do not fit the settings; {found}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _dtype(file: Path, parts: Mapping[str, _Part], stored: Mapping[str, Entry]) -> str:
    """The type of all that is written: float32, or 16 bits if that loses nothing.

    Files of 16-bit matrices have norms in float32; mostly they were widened.
    """
    kinds = {stored[p.source].kind for p in parts.values() if len(p.shape) > 1}
    kind = kinds.pop() if len(kinds) == 1 else "F32"
    if kind not in _DTYPES:
        return "F32"
    with np.errstate(over="ignore"):
        for part in parts.values():
            entry = stored[part.source]
            if entry.kind != kind:
                tensor = read_tensor(file, part.source, entry)
                if (tensor.astype(_DTYPES[kind]).astype(np.float32) != tensor).any():
                    return "F32"
    return kind


def _write_tensors(
    file: Path,
    parts: Mapping[str, _Part],
    stored: Mapping[str, Entry],
    dtype: str,
    out: Path,
) -> None:
    """Write a safetensors file one tensor at a time: all of them may not fit into memory."""
    # `transformers` asks for this entry.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, part in parts.items():
        start, end = end, end + int(np.prod(part.shape)) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": part.shape, "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with out.open("wb") as stream:
        stream.write(struct.pack("<Q", len(content)) + content)
        with tqdm(total=len(parts), desc=file.name, unit="tensor", leave=False) as bar:
            for part in parts.values():
                tensor = read_tensor(file, part.source, stored[part.source])
                if part.heads is not None:
                    tensor = _rotate_half(tensor, part.heads)
                stream.write(np.ascontiguousarray(tensor.astype(_DTYPES[dtype])).tobytes())
                bar.update()


def _rotate_half(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of ``W_Q`` or ``W_K`` in Hugging Face's order, ``[heads · k, d]``.

    Inverse of ``LlamaModel.permute`` of llama.cpp's ``convert_hf_to_gguf.py``.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
