"""The settings of a decoder of Llama's kind, validated, read from and written to config.json.

Every field changes what the model computes. What Hugging Face's config.json may say besides is
either without effect on the computation (token ids, the type of the stored numbers) or refused by
name; ``families`` knows what the families call it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxprune.errors import InputError
from jaxprune.models.llama import families
from jaxprune.models.llama.checks import check_flag, check_positive, check_size
from jaxprune.models.llama.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from jaxprune.models.llama.rope import frequencies as rotary_frequencies

__all__ = [
    "LinearScaling",
    "Llama3Scaling",
    "LlamaConfig",
    "YarnScaling",
    "attention_factor",
    "check_length",
    "inverse_frequencies",
]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """What a Llama, or a model of a related family, computes; names are those of Hugging Face.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: width of the model, ``d``.
      intermediate_size: width of the MLP, ``f``.
      num_hidden_layers: blocks.
      num_attention_heads: query heads.
      num_key_value_heads: key and value heads; each serves equally many consecutive query heads.
      head_dim: width of a head, ``k``, even.
      rms_norm_eps: added to the mean square in every normalisation.
      rope_theta: base of the rotary frequencies.
      rope_scaling: their scaling, if any.
      tie_word_embeddings: the head is the transposed embedding.
      attention_bias: ``W_Q``, ``W_K`` and ``W_V`` have biases.
      output_bias: ``W_O`` has one.
      mlp_bias: the three maps of the MLP have biases.
      query_key_norm: an RMS norm over every query head and every key head, before positions.
      layers_without_rope: blocks that turn no queries and keys, ascending.
      sliding_window: in some layers a token sees only so many; see ``check_length``.

    Raises:
      InputError: a field has the wrong type, is out of range, or contradicts another.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    layers_without_rope: tuple[int, ...] = ()
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        _check_fields(vars(self))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LlamaConfig:
        """Settings from the content of a config.json of any of ``families.FAMILIES``.

        Fields that Hugging Face lets a file leave out take its defaults.

        Raises:
          InputError: a field is missing, wrong, or asks for what this port does not compute.
        """
        fields = families.read(content)
        _check_fields(fields)
        context = content.get("max_position_embeddings")
        if context is not None:
            check_size("max_position_embeddings", context, 2**31)
        floats = {field: float(fields[field]) for field in ("rms_norm_eps", "rope_theta")}
        return cls(**fields | floats)

    def to_json(self) -> dict[str, Any]:
        """The content of a config.json for a new checkpoint, of the first family that fits.

        Raises:
          InputError: no family has these settings together.
        """
        for name in families.FAMILIES:
            content = families.write(name, vars(self))
            if LlamaConfig.from_json(content) == self:
                return content
        raise InputError(f"no family has these settings together: {self}")


def inverse_frequencies(config: LlamaConfig) -> Float[np.ndarray, " half"]:
    """Rotary frequencies in radians per position, scaling applied; see ``rope.frequencies``.

    They are those of the layers that have positions.
    """
    return rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


def attention_factor(config: LlamaConfig) -> float:
    """What rotated queries and keys are multiplied by: 1, or what yarn's scaling says."""
    scaling = config.rope_scaling
    return scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0


def check_length(config: LlamaConfig, tokens: int) -> None:
    """Raise ``InputError`` where a sliding window would act on sequences of so many tokens.

    Token ``i`` of a layer with window ``w`` sees tokens ``i − w + 1 … i``: all before it, as long
    as there are no more than ``w``. Windows that hide tokens are not implemented.
    """
    if config.sliding_window is not None and tokens > config.sliding_window:
        raise InputError(
            f"sliding_window {config.sliding_window} would hide tokens in windows of {tokens}, "
            f"which is not implemented; take seqlen={config.sliding_window} or less"
        )


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Raise ``InputError`` naming the first field of ``LlamaConfig`` that is wrong."""
    for field, largest in families.LARGEST.items():
        check_size(field, fields[field], largest)
    check_positive("rms_norm_eps", fields["rms_norm_eps"])
    check_positive("rope_theta", fields["rope_theta"])
    for field in (
        "tie_word_embeddings",
        "attention_bias",
        "output_bias",
        "mlp_bias",
        "query_key_norm",
    ):
        check_flag(field, fields[field])
    _check_positions(fields)
    heads, shared = fields["num_attention_heads"], fields["num_key_value_heads"]
    if heads % shared:
        raise InputError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {shared}"
        )


def _check_positions(fields: Mapping[str, Any]) -> None:
    scaling, window = fields["rope_scaling"], fields["sliding_window"]
    if scaling is not None and not isinstance(scaling, RopeScaling):
        raise InputError(
            f"rope_scaling must be LinearScaling, Llama3Scaling or YarnScaling, not {scaling!r:.40}"
        )
    if fields["head_dim"] % 2:
        raise InputError(
            f"head_dim {fields['head_dim']} is odd; rotary embeddings turn pairs of components"
        )
    if isinstance(scaling, YarnScaling) and fields["rope_theta"] <= 1:
        raise InputError(f"rope_theta {fields['rope_theta']} must be above 1 with yarn's scaling")
    rotary_frequencies(fields["head_dim"], float(fields["rope_theta"]), scaling)
    layers, without = fields["num_hidden_layers"], fields["layers_without_rope"]
    if not isinstance(without, tuple) or list(without) != sorted(set(range(layers)) & set(without)):
        raise InputError(
            f"layers_without_rope must be blocks from 0 to {layers - 1}, ascending, not "
            f"{without!r:.40}"
        )
    if window is not None:
        check_size("sliding_window", window, 2**31)
