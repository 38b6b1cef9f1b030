"""The settings of a Llama, validated, read from and written to Hugging Face's config.json.

Every field changes what the model computes. What config.json may say besides is either without
effect on the computation (token ids, the type of the stored numbers) or refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxprune.errors import InputError

# Largest value of each size: a bound against absurd files, far above any published Llama.
_LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
}

# Values of config.json for which this port computes the right thing; others are refused.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Scaling of the rotary frequencies introduced with Llama 3.1 (``rope_type: llama3``).

    Attributes:
      factor: wavelengths above ``original_max_position_embeddings / low_freq_factor`` grow by it.
      low_freq_factor: see ``factor``.
      high_freq_factor: wavelengths below ``original_max_position_embeddings / high_freq_factor``
        stay; those in between are interpolated.
      original_max_position_embeddings: context length of pre-training.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _check_scaling(vars(self))


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """What a Llama computes; names are those of Hugging Face.

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
    rope_scaling: Llama3Scaling | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        _check_fields(vars(self))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LlamaConfig:
        """Settings from the content of a config.json, older (``rope_scaling``) or newer.

        Fields that Hugging Face lets a file leave out take its defaults.

        Raises:
          InputError: a field is missing, wrong, or asks for what this port does not compute.
        """
        _check_supported(content)
        required = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        missing = [field for field in required if content.get(field) is None]
        if missing:
            raise InputError(f"config.json lacks {', '.join(missing)}")
        sizes = {field: content[field] for field in required}
        for field, value in sizes.items():
            _check_size(field, value, _LARGEST[field])
        heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
        head_dim = content.get("head_dim")
        if head_dim is None and width % heads:
            raise InputError(
                f"hidden_size {width} is not a multiple of num_attention_heads {heads}, and "
                "head_dim is not given"
            )
        key_value_heads = content.get("num_key_value_heads")
        theta, scaling = _read_rope(content)
        fields = sizes | {
            "num_key_value_heads": heads if key_value_heads is None else key_value_heads,
            "head_dim": width // heads if head_dim is None else head_dim,
            "rms_norm_eps": content.get("rms_norm_eps", 1e-6),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": content.get("tie_word_embeddings", False),
        }
        _check_fields(fields)
        context = content.get("max_position_embeddings")
        if context is not None:
            _check_size("max_position_embeddings", context, 2**31)
        floats = {field: float(fields[field]) for field in ("rms_norm_eps", "rope_theta")}
        return cls(**fields | floats)

    def to_json(self) -> dict[str, Any]:
        """The content of a config.json for a new checkpoint with these settings."""
        content = dataclasses.asdict(self)
        if self.rope_scaling is not None:
            content["rope_scaling"]["rope_type"] = "llama3"
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            **content,
        }


def inverse_frequencies(config: LlamaConfig) -> Float[np.ndarray, " half"]:
    """Rotary frequencies ``θ_f = rope_theta^(−2f/k)`` in radians per position, scaling applied.

    llama3 scaling, with wavelength ``λ_f = 2π/θ_f`` and context ``c`` of pre-training: ``θ_f``
    stays where ``λ_f < c/high_freq_factor``, becomes ``θ_f/factor`` where
    ``λ_f > c/low_freq_factor``, and in between ``(1−s) θ_f/factor + s θ_f`` with
    ``s = (c/λ_f − low) / (high − low)``.

    Returns:
      float32, computed in float32 in the order of Hugging Face's code: another rounding of
      ``θ_f`` would turn distant tokens by visibly other angles.

    Source: Su et al. 2021; ``transformers``, ``_compute_llama3_parameters``.
    """
    exponents = np.arange(0, config.head_dim, 2).astype(np.float32) / np.float32(config.head_dim)
    theta = np.float32(1) / np.power(np.float32(config.rope_theta), exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return theta
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    context = np.float32(scaling.original_max_position_embeddings)
    factor = np.float32(scaling.factor)
    wavelength = np.float32(2 * math.pi) / theta
    share = (context / wavelength - low) / (high - low)
    between = (np.float32(1) - share) * theta / factor + share * theta
    return np.where(
        wavelength > context / low,
        theta / factor,
        np.where(wavelength < context / high, theta, between),
    )


def _check_size(field: str, value: Any, largest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise InputError(f"{field} must be a whole number from 1 to {largest}, not {value!r:.40}")


def _check_positive(field: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # The upper bound is that of float32, in which the model computes.
    if not number or not 1e-30 < value < 1e30:
        raise InputError(f"{field} must be a positive number, not {value!r:.40}")


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Raise ``InputError`` naming the first field of ``LlamaConfig`` that is wrong."""
    for field, largest in _LARGEST.items():
        _check_size(field, fields[field], largest)
    _check_positive("rms_norm_eps", fields["rms_norm_eps"])
    _check_positive("rope_theta", fields["rope_theta"])
    tied, scaling = fields["tie_word_embeddings"], fields["rope_scaling"]
    if not isinstance(tied, bool):
        raise InputError(f"tie_word_embeddings must be true or false, not {tied!r:.40}")
    if scaling is not None and not isinstance(scaling, Llama3Scaling):
        raise InputError(f"rope_scaling must be Llama3Scaling, not {scaling!r:.40}")
    heads, shared = fields["num_attention_heads"], fields["num_key_value_heads"]
    if heads % shared:
        raise InputError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {shared}"
        )
    if fields["head_dim"] % 2:
        raise InputError(
            f"head_dim {fields['head_dim']} is odd; rotary embeddings turn pairs of components"
        )


def _check_scaling(fields: Mapping[str, Any]) -> None:
    """Raise ``InputError`` naming the first field of ``Llama3Scaling`` that is wrong."""
    for field in ("factor", "low_freq_factor", "high_freq_factor"):
        _check_positive(f"rope_scaling.{field}", fields[field])
    context = "original_max_position_embeddings"
    _check_size(f"rope_scaling.{context}", fields[context], 2**31)
    low, high = fields["low_freq_factor"], fields["high_freq_factor"]
    if high <= low:
        raise InputError(
            f"rope_scaling.high_freq_factor {high} must be larger than low_freq_factor {low}"
        )


def _check_supported(content: Mapping[str, Any]) -> None:
    """Raise ``InputError`` naming the first setting that this port would compute wrongly."""
    if content.get("model_type") is None:
        raise InputError("config.json lacks model_type; 'llama' is the one supported")
    for field, values in _SUPPORTED.items():
        value = content.get(field, values[0])
        if value not in values:
            raise InputError(
                f"config.json: {field} {value!r:.60} is not supported, only {values[0]!r}"
            )
    architectures = content.get("architectures")
    if architectures is not None and architectures != ["LlamaForCausalLM"]:
        raise InputError(
            f"config.json: architectures {architectures!r:.60} is not supported, "
            "only ['LlamaForCausalLM']"
        )


def _read_rope(content: Mapping[str, Any]) -> tuple[Any, Llama3Scaling | None]:
    """Base (unchecked) and scaling of the rotary embedding.

    Where a file has both entries the older one wins, as in ``transformers``.
    """
    field = "rope_scaling" if content.get("rope_scaling") else "rope_parameters"
    rope = content.get(field) or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"config.json: {field} must be an object, not {rope!r:.60}")
    theta = rope.get("rope_theta", content.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    factor = rope.get("partial_rotary_factor", 1.0)
    if factor != 1.0:
        raise InputError(
            f"config.json: {field}.partial_rotary_factor {factor!r:.40} is not supported, only 1.0"
        )
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(
            f"config.json: {field}.rope_type {kind!r:.40} is not supported, "
            "only 'default' and 'llama3'"
        )
    names = [field.name for field in dataclasses.fields(Llama3Scaling)]
    missing = [name for name in names if name not in rope]
    if missing:
        raise InputError(f"config.json: {field} lacks {', '.join(missing)}")
    fields = {name: rope[name] for name in names}
    _check_scaling(fields)
    floats = {name: float(value) for name, value in fields.items() if name != names[-1]}
    return theta, Llama3Scaling(**fields | floats)
