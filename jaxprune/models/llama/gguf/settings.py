"""Settings of a Llama from the metadata of a GGUF file.

Every entry ``llama.*`` is one that is understood, or refused by name: what llama.cpp computes by
an entry not known here is not what this port computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxprune.errors import InputError
from jaxprune.models.llama.config import Llama3Scaling, LlamaConfig, inverse_frequencies

_READ = {
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.attention.value_length",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.type",
    "llama.vocab_size",  # the embedding's rows say it
}
# Entries that change nothing at these values; at others they are refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "general.type": ("model",),
    "llama.attention.causal": (True,),
    "llama.expert_count": (0,),
    "llama.expert_used_count": (0,),
    "llama.rope.scale_linear": (0, 1),
    "llama.rope.scaling.attn_factor": (0, 1),
    "llama.rope.scaling.factor": (0, 1),
    "llama.rope.scaling.type": ("none",),
    "llama.use_parallel_residual": (False,),
}
_WITHOUT_EFFECT = {"llama.rope.scaling.finetuned", "llama.tensor_data_layout"}
# The published llama3 scalings differ in their factor alone.
_LOW, _HIGH, _CONTEXT = 1.0, 4.0, 8192


def read_config(
    settings: Mapping[str, Any], rows: int, tied: bool, rope_factors: np.ndarray | None
) -> LlamaConfig:
    """What a GGUF file's Llama computes.

    Args:
      settings: the metadata of the file.
      rows: of the embedding.
      tied: the file has no head of its own.
      rope_factors: ``[k/2]``, what the rotary frequencies are divided by, if it has them.

    Raises:
      InputError: an entry is missing, wrong, or asks for what this port does not compute.
    """
    _check_supported(settings)
    width = whole_number(settings, "llama.embedding_length")
    heads = whole_number(settings, "llama.attention.head_count")
    if width % heads and "llama.attention.key_length" not in settings:
        raise InputError(
            f"llama.embedding_length {width} is not a multiple of "
            f"llama.attention.head_count {heads}"
        )
    head_dim = whole_number(settings, "llama.attention.key_length", width // heads)
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if whole_number(settings, name, head_dim) != head_dim:
            raise InputError(f"{name} {settings[name]} is not supported, only {head_dim}, as keys")
    content = {
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": whole_number(settings, "llama.feed_forward_length"),
        "num_hidden_layers": whole_number(settings, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": whole_number(settings, "llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _required(settings, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": settings.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": tied,
    }
    config = LlamaConfig.from_json(content)
    if rope_factors is None:
        return config
    context = whole_number(settings, "llama.rope.scaling.original_context_length", _CONTEXT)
    return dataclasses.replace(config, rope_scaling=_scaling(config, rope_factors, context))


def whole_number(settings: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A size in the metadata, the same in every block if it is given for each.

    Raises:
      InputError: it is missing, or no positive whole number.
    """
    value = _required(settings, name) if default is None else settings.get(name, default)
    if isinstance(value, np.ndarray) and value.size:
        if (value != value[0]).any():
            raise InputError(f"{name} differs from block to block, which is not supported")
        value = value[0].item()
    if type(value) is not int or value < 1:
        raise InputError(f"{name} must be a positive whole number, not {value!r:.40}")
    return value


def _required(settings: Mapping[str, Any], name: str) -> Any:
    if name not in settings:
        raise InputError(f"lacks {name}")
    return settings[name]


def _check_supported(settings: Mapping[str, Any]) -> None:
    architecture = _required(settings, "general.architecture")
    if not isinstance(architecture, str) or architecture != "llama":
        raise InputError(
            f"general.architecture {architecture!r:.40} is not supported, only 'llama'"
        )
    parts = settings.get("split.count", 0)
    if not isinstance(parts, int) or parts > 1:
        raise InputError(
            f"split.count {parts!r:.40}: is a part of a split file; put it together with "
            "`llama-gguf-split --merge`"
        )
    for name, values in _NEUTRAL.items():
        value = settings.get(name, values[0])
        if isinstance(value, np.ndarray | list) or value not in values:
            raise InputError(f"{name} {value!r:.40} is not supported, only {values[-1]!r}")
    for name in settings:
        known = name in _READ or name in _NEUTRAL or name in _WITHOUT_EFFECT
        if name.startswith("llama.") and not known:
            raise InputError(f"{name[:60]!r} is not supported")


def _scaling(config: LlamaConfig, factors: np.ndarray, context: int) -> Llama3Scaling | None:
    """The llama3 scaling whose frequencies are the plain ones divided by ``factors``.

    llama.cpp stores no parameters, but for every frequency what they make of it.
    """
    if (factors == 1).all():
        return None
    largest = float(factors.max())
    # Divided by a small or absurd factor, frequencies would leave float32.
    if factors.shape == (config.head_dim // 2,) and factors.min() > 0 and largest < 1e6:
        scaling = Llama3Scaling(largest, _LOW, _HIGH, context)
        scaled = inverse_frequencies(dataclasses.replace(config, rope_scaling=scaling))
        # The two sides were computed in float32 in different orders.
        if np.allclose(inverse_frequencies(config), scaled * factors, rtol=1e-4, atol=0):
            return scaling
    raise InputError(
        f"rope_freqs.weight: not the factors of llama3 scaling with low_freq_factor {_LOW}, "
        f"high_freq_factor {_HIGH}, original_max_position_embeddings {context}, which alone is "
        "supported"
    )
