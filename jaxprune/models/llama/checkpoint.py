"""Weights of Llamas and related models in and out of Hugging Face checkpoints.

The names in the files map to the model by one table for all families; weights are ``[out, in]`` in
the file and ``[in, out]`` in the model. ``load`` fills preallocated stacks one tensor at a time, so
it never holds the weights twice; ``save`` rewrites a copy of the source's files tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, use_abstract_mesh
from jax.typing import DTypeLike
from jaxtyping import Array
from safetensors.numpy import save as save_tensors

from jaxprune.errors import InputError
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llama.files import SINGLE_FILE, TensorFiles, copy_carried, patch_tensors
from jaxprune.models.llama.modeling import BlockWeights, Llama, block_shapes, rotary_layers
from jaxprune.storage import new_folder, read_json, write_json

_DTYPES = ("F32", "F16", "BF16")
# Older conversions stored the rotary frequencies, which follow from the configuration.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SHOWN = 20  # names of a kind in an error


class Entry(NamedTuple):
    """A line of the loading table.

    Attributes:
      name: of the tensor in the file, with ``{}`` for the number of the block.
      path: a field of ``Llama``, or of ``BlockWeights``.
      transposed: the file has ``[out, in]``, the model ``[in, out]``.
    """

    name: str
    path: str
    transposed: bool


TABLE = (
    Entry("model.embed_tokens.weight", "embedding", False),
    Entry("model.layers.{}.input_layernorm.weight", "attention_norm", False),
    Entry("model.layers.{}.self_attn.q_proj.weight", "wq", True),
    Entry("model.layers.{}.self_attn.k_proj.weight", "wk", True),
    Entry("model.layers.{}.self_attn.v_proj.weight", "wv", True),
    Entry("model.layers.{}.self_attn.o_proj.weight", "wo", True),
    Entry("model.layers.{}.post_attention_layernorm.weight", "mlp_norm", False),
    Entry("model.layers.{}.mlp.gate_proj.weight", "w_gate", True),
    Entry("model.layers.{}.mlp.up_proj.weight", "w_up", True),
    Entry("model.layers.{}.mlp.down_proj.weight", "w_down", True),
    Entry("model.layers.{}.self_attn.q_proj.bias", "bq", False),
    Entry("model.layers.{}.self_attn.k_proj.bias", "bk", False),
    Entry("model.layers.{}.self_attn.v_proj.bias", "bv", False),
    Entry("model.layers.{}.self_attn.o_proj.bias", "bo", False),
    Entry("model.layers.{}.mlp.gate_proj.bias", "b_gate", False),
    Entry("model.layers.{}.mlp.up_proj.bias", "b_up", False),
    Entry("model.layers.{}.mlp.down_proj.bias", "b_down", False),
    Entry("model.layers.{}.self_attn.q_norm.weight", "query_norm", False),
    Entry("model.layers.{}.self_attn.k_norm.weight", "key_norm", False),
    Entry("model.norm.weight", "final_norm", False),
    Entry("lm_head.weight", "lm_head", True),
)


class Place(NamedTuple):
    """Where a tensor of the file goes in the model.

    Attributes:
      path: a field of ``Llama``, or of ``BlockWeights``.
      layer: the block, ``None`` outside the blocks.
      transposed: see ``Entry``.
    """

    path: str
    layer: int | None
    transposed: bool


def load_config(folder: Path) -> LlamaConfig:
    """Settings of a checkpoint, compared with its tensors; ``vocab_size`` is that of the file.

    Raises:
      InputError: what ``load`` would raise, before anything long is done.
    """
    return _match(folder)[0]


def context_note(folder: Path, seqlen: int) -> str | None:
    """A line for a user whose windows are longer than a checkpoint's context, else ``None``."""
    context = read_json(folder / "config.json").get("max_position_embeddings")
    if context is None or seqlen <= context:
        return None
    return f"windows of {seqlen} tokens are longer than the model's context, {context}"


def load(folder: Path, dtype: DTypeLike = jnp.float32) -> Llama:
    """The model in a checkpoint folder (see ``files.locate`` for names of other kinds).

    Args:
      folder: with config.json and safetensors, one file or shards, float32, float16 or bfloat16.
      dtype: of weights and computation, float32 or bfloat16.

    Raises:
      InputError: a file is missing or broken, the settings are not supported, or tensors are
        missing, unexpected or misshapen (all of them are named), or hold NaN or infinity.
    """
    config, files, places = _match(folder)
    model = abstract_model(config, dtype)
    arrays = {
        path: jnp.zeros(shape.shape, dtype)
        for path, shape in _arrays(model).items()
        if path in BlockWeights._fields
    }
    for name, (path, layer, transposed) in places.items():
        tensor = files.read(name)
        if not _finite(tensor):
            raise InputError(f"{files.tensors[name].file}: {name} holds NaN or infinity")
        if layer is None:
            arrays[path] = _converted(tensor, dtype, transposed)
        else:
            # Waiting keeps the tensors of calls that are merely queued from piling up.
            arrays[path] = _placed(arrays[path], tensor, layer, transposed).block_until_ready()
    _set_arrays(model, arrays)
    return model


def save(model: Llama, source: Path, out: Path) -> None:
    """Write a new checkpoint folder: the source's, with the model's weights.

    See ``write_weights``; the folder appears whole or not at all.

    Raises:
      InputError: ``out`` exists and is not empty, cannot be written, or the model is not of the
        source's shape.
    """
    with new_folder(out) as folder:
        write_weights(model, source, folder)


def write_weights(model: Llama, source: Path, folder: Path) -> None:
    """Fill a folder with the source checkpoint's files, holding the model's weights.

    Names, types, shards and headers are those of the source, and so is every entry of a weight
    that the model still has as it was loaded: bit for bit, even where the model computes in a
    narrower type. config.json and the tokenizer are copied; a ``vocab_size`` that is not that of
    the embedding is corrected.

    Raises:
      InputError: the model is not of the source's shape.
    """
    config, files, places = _match(source)
    if config != model.config:
        raise InputError(f"{source}: its settings are not those of the model to save")
    copy_carried(source, folder)
    settings = read_json(source / "config.json")
    if settings["vocab_size"] != config.vocab_size:
        write_json(folder / "config.json", settings | {"vocab_size": config.vocab_size})
    for file in files.files:
        copy = folder / file.name
        shutil.copyfile(file, copy)
        with patch_tensors(copy) as replace:
            for name, place in places.items():
                if files.tensors[name].file == file:
                    stored = files.read(name)
                    merged = _merged(stored, _tensor(model, place))
                    if merged is not stored:
                        replace(name, merged)


def write_new(model: Llama, folder: Path, dtype: DTypeLike, **settings: Any) -> None:
    """Write a model that comes from no checkpoint: config.json and one safetensors file.

    Args:
      model: the model.
      folder: an existing folder.
      dtype: of the stored weights.
      settings: further fields of config.json, such as ``bos_token_id``.
    """
    tensors = {
        name: np.ascontiguousarray(_tensor(model, place).astype(dtype))
        for name, place in places_of(model.config).items()
    }
    # `transformers` asks for this entry.
    (folder / SINGLE_FILE).write_bytes(save_tensors(tensors, metadata={"format": "pt"}))
    named = {**model.config.to_json(), "torch_dtype": jnp.dtype(dtype).name, **settings}
    write_json(folder / "config.json", named)


def abstract_model(config: LlamaConfig, dtype: DTypeLike) -> Llama:
    """A ``Llama`` of shapes and types without numbers."""
    # Under a mesh Flax asks for the sharding of what has none.
    with use_abstract_mesh(AbstractMesh((), ())):
        return nnx.eval_shape(lambda: Llama(config, key=jax.random.key(0), dtype=dtype))


def _arrays(model: Llama) -> dict[str, Any]:
    """All arrays of a model, or their shapes, by path."""
    arrays = {"embedding": model.embedding.get_value(), "final_norm": model.final_norm.get_value()}
    if model.lm_head is not None:
        arrays["lm_head"] = model.lm_head.get_value()
    blocks = model.blocks.get_value()._replace(rotary=None)._asdict()
    return arrays | {path: array for path, array in blocks.items() if array is not None}


def _set_arrays(model: Llama, arrays: dict[str, Array]) -> None:
    model.embedding.set_value(arrays["embedding"])
    model.final_norm.set_value(arrays["final_norm"])
    if model.lm_head is not None:
        model.lm_head.set_value(arrays["lm_head"])
    blocks = {field: arrays[field] for field in BlockWeights._fields if field in arrays}
    model.blocks.set_value(
        BlockWeights(**blocks)._replace(rotary=rotary_layers(model.config, blocks["wq"].dtype))
    )


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _placed(stack: Array, tensor: Array, layer: Array, transposed: bool) -> Array:
    """``stack`` with one block's tensor in its place; the old stack's memory is used."""
    return stack.at[layer].set(_converted(tensor, stack.dtype, transposed))


@partial(jax.jit, static_argnums=(1, 2))
def _converted(tensor: Array, dtype: DTypeLike, transposed: bool) -> Array:
    return (tensor.T if transposed else tensor).astype(dtype)


@jax.jit
def _finite(tensor: Array) -> Array:
    return jnp.isfinite(tensor).all()


def _tensor(model: Llama, place: Place) -> np.ndarray:
    """A weight of the model as the file has it, but in the model's type."""
    array = _arrays(model)[place.path]
    array = array if place.layer is None else array[place.layer]
    return np.asarray(array).T if place.transposed else np.asarray(array)


def _merged(stored: np.ndarray, tensor: np.ndarray) -> np.ndarray:
    """The stored entries where the model has them still, the model's elsewhere."""
    kept = stored.astype(tensor.dtype) == tensor
    return stored if kept.all() else np.where(kept, stored, tensor.astype(stored.dtype))


def places_of(config: LlamaConfig) -> dict[str, Place]:
    """Names of all tensors that a checkpoint with these settings holds, and where they go."""
    places, shapes = {}, block_shapes(config)._asdict()
    for name, path, transposed in TABLE:
        if path == "lm_head" and config.tie_word_embeddings:
            continue
        if path in shapes:
            if shapes[path] is None:
                continue
            for layer in range(config.num_hidden_layers):
                places[name.format(layer)] = Place(path, layer, transposed)
        else:
            places[name] = Place(path, None, transposed)
    return places


def _match(folder: Path) -> tuple[LlamaConfig, TensorFiles, dict[str, Place]]:
    """Settings corrected to the embedding's rows, the files, and the place of every tensor.

    Raises:
      InputError: naming all tensors that are missing, unexpected, misshapen or of another type.
    """
    content = read_json(folder / "config.json")
    try:
        config = LlamaConfig.from_json(content)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    files = TensorFiles.open(folder)
    stored = files.tensors
    rows = stored[_EMBEDDING].shape[:1] if _EMBEDDING in stored else ()
    if rows:
        config = dataclasses.replace(config, vocab_size=rows[0])
    places = places_of(config)
    if config.tie_word_embeddings and _HEAD in stored and _EMBEDDING in stored:
        places[_HEAD] = _tied_head(files)
    shapes = {path: a.shape for path, a in _arrays(abstract_model(config, jnp.float32)).items()}

    def shape(place: Place) -> tuple[int, ...]:
        inner = shapes[place.path][0 if place.layer is None else 1 :]
        return inner[::-1] if place.transposed else inner

    present = [name for name in places if name in stored]
    wrong = {
        "missing": [name for name in places if name not in stored],
        "unexpected": [n for n in stored if n not in places and not _IGNORED.fullmatch(n)],
        "misshapen": [
            f"{name} {list(stored[name].shape)} instead of {list(shape(places[name]))}"
            for name in present
            if stored[name].shape != shape(places[name])
        ],
        "of an unsupported type": [
            f"{name} {stored[name].dtype}" for name in present if stored[name].dtype not in _DTYPES
        ],
    }
    if any(wrong.values()):
        found = "; ".join(f"{kind}: {_listed(names)}" for kind, names in wrong.items() if names)
        raise InputError(f"{folder}: tensors do not fit config.json; {found}")
    return config, files, places


def _tied_head(files: TensorFiles) -> Place:
    """Place of a head that a checkpoint with tied embeddings stores all the same."""
    if not np.array_equal(files.read(_HEAD), files.read(_EMBEDDING)):
        raise InputError(
            f"{files.folder}: config.json says tie_word_embeddings, "
            f"but {_HEAD} differs from {_EMBEDDING}"
        )
    return Place("embedding", None, False)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
