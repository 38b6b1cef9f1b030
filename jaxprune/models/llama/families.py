"""How the families' config.json differ: what a file may leave out, and what it then means.

All compute the same decoder; see ``config.LlamaConfig`` for its settings. A family's fields are
those that ``transformers`` reads for it: what it ignores (``attention_bias`` of a Qwen2, say) is
ignored here too, and the tensors of the file have to agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxprune.errors import InputError
from jaxprune.models.llama.checks import check_flag, check_size
from jaxprune.models.llama.rope import read_rope, write_rope

# Largest value of each size: a bound against absurd files, far above any published model.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# Values of config.json for which this port computes the right thing; others are refused.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


class Family(NamedTuple):
    """A family of Hugging Face models.

    Attributes:
      architecture: its class there.
      defaults: of fields that a file may leave out; ``None`` for what follows from other fields.
      fields: which of ``attention_bias``, ``mlp_bias``, ``no_rope_layers``, ``layer_types`` and
        ``sliding_window`` a file may have. With ``layer_types`` the window is that of some layers.
      query_key_bias: queries, keys and values always have biases, outputs never.
      query_key_norm: queries and keys are normalised.
    """

    architecture: str
    defaults: Mapping[str, Any] = {}
    fields: frozenset[str] = frozenset()
    query_key_bias: bool = False
    query_key_norm: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM", fields=frozenset({"attention_bias", "mlp_bias"})),
    "mistral": Family(
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "sliding_window": 4096},
        frozenset({"sliding_window"}),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
        frozenset({"sliding_window", "layer_types"}),
        query_key_bias=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        frozenset({"attention_bias", "sliding_window", "layer_types"}),
        query_key_norm=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
        frozenset(
            {"attention_bias", "mlp_bias", "no_rope_layers", "sliding_window", "layer_types"}
        ),
    ),
}


def read(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``LlamaConfig`` from the content of a config.json, older or newer.

    Fields that Hugging Face lets a file leave out take the family's defaults.

    Raises:
      InputError: a field is missing, or asks for what this port does not compute. Values of fields
        that go over as they are are left to ``LlamaConfig``.
    """
    family = _family(content)
    missing = [field for field in _REQUIRED if content.get(field) is None]
    if missing:
        raise InputError(f"config.json lacks {', '.join(missing)}")
    sizes = {field: content[field] for field in _REQUIRED}
    for field, value in sizes.items():
        check_size(field, value, LARGEST[field])
    given = {**family.defaults, **content}
    theta, scaling = read_rope(content, family.defaults.get("rope_theta", 10000.0))
    attention_bias = _bias(family, given, "attention_bias")
    without_rope = _layers_without_rope(family, given)
    heads = sizes["num_attention_heads"]
    shared = given.get("num_key_value_heads")
    return sizes | {
        "num_key_value_heads": heads if shared is None else shared,
        "head_dim": _head_dim(given),
        "rms_norm_eps": given.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": given.get("tie_word_embeddings", False),
        "attention_bias": attention_bias or family.query_key_bias,
        "output_bias": attention_bias,
        "mlp_bias": _bias(family, given, "mlp_bias"),
        "query_key_norm": family.query_key_norm,
        "layers_without_rope": without_rope,
        "sliding_window": _sliding_window(family, given, without_rope),
    }


def write(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json of a family; ``read`` says whether it holds all of ``fields``.

    Args:
      name: of the family, ``model_type``.
      fields: of ``LlamaConfig``.
    """
    family = FAMILIES[name]
    layers, window = range(fields["num_hidden_layers"]), fields["sliding_window"]
    scaling = fields["rope_scaling"]
    optional: dict[str, Any] = {
        "attention_bias": fields["output_bias"],
        "mlp_bias": fields["mlp_bias"],
        "no_rope_layers": [int(layer not in fields["layers_without_rope"]) for layer in layers],
        "sliding_window": window,
        "layer_types": [_FULL if window is None else _SLIDING for _ in layers],
    }
    written = {field: value for field, value in optional.items() if field in family.fields}
    if "layer_types" in written:
        written["use_sliding_window"] = window is not None
    as_they_are = (*LARGEST, "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    return {
        "architectures": [family.architecture],
        "model_type": name,
        "hidden_act": "silu",
        **{field: fields[field] for field in as_they_are},
        "rope_scaling": None if scaling is None else write_rope(scaling),
        **written,
    }


def _family(content: Mapping[str, Any]) -> Family:
    """The family of a config.json, once nothing in it asks for what this port computes wrongly."""
    name = content.get("model_type")
    known = ", ".join(map(repr, FAMILIES))
    if name is None:
        raise InputError(f"config.json lacks model_type; supported are {known}")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"config.json: model_type {name!r:.60} is not supported, only {known}")
    for field, values in _SUPPORTED.items():
        value = content.get(field, values[0])
        if value not in values:
            raise InputError(
                f"config.json: {field} {value!r:.60} is not supported, only {values[0]!r}"
            )
    family, architectures = FAMILIES[name], content.get("architectures")
    if architectures is not None and architectures != [family.architecture]:
        raise InputError(
            f"config.json: architectures {architectures!r:.60} is not supported with model_type "
            f"{name!r}, only [{family.architecture!r}]"
        )
    return family


def _head_dim(given: Mapping[str, Any]) -> Any:
    heads, width = given["num_attention_heads"], given["hidden_size"]
    if given.get("head_dim") is not None:
        return given["head_dim"]
    if width % heads:
        raise InputError(
            f"hidden_size {width} is not a multiple of num_attention_heads {heads}, and "
            "head_dim is not given"
        )
    return width // heads


def _bias(family: Family, given: Mapping[str, Any], field: str) -> bool:
    value = given.get(field) if field in family.fields else None
    if value is None:
        return False
    check_flag(field, value)
    return bool(value)


def _layers_without_rope(family: Family, given: Mapping[str, Any]) -> tuple[int, ...]:
    """SmolLM3's ``no_rope_layers`` has, against its name, a 1 for every layer with positions."""
    if "no_rope_layers" not in family.fields:
        return ()
    layers, flags = given["num_hidden_layers"], given.get("no_rope_layers")
    if flags is None:
        interval = given.get("no_rope_layer_interval", 4)
        check_size("no_rope_layer_interval", interval, 2**31)
        return tuple(range(interval - 1, layers, interval))
    if not isinstance(flags, list) or len(flags) < layers or any(f not in (0, 1) for f in flags):
        raise InputError(
            f"no_rope_layers must be a list of 0 and 1, one for every layer, not {flags!r:.40}"
        )
    return tuple(layer for layer in range(layers) if not flags[layer])


def _sliding_window(
    family: Family, given: Mapping[str, Any], without_rope: tuple[int, ...]
) -> int | None:
    """The window of the layers that have one, ``None`` where there are none."""
    if "sliding_window" not in family.fields:
        return None
    window = given.get("sliding_window")
    if "layer_types" in family.fields and not _slides(given, window, without_rope):
        return None
    if window is not None:
        check_size("sliding_window", window, 2**31)
    return window


def _slides(given: Mapping[str, Any], window: Any, without_rope: tuple[int, ...]) -> bool:
    """Whether the window is that of some layer, by ``layer_types`` or by the family's rule."""
    layers, kinds = given["num_hidden_layers"], given.get("layer_types")
    asked = given.get("use_sliding_window", False)
    check_flag("use_sliding_window", asked)
    if kinds is None:
        if not asked or window is None:
            return False
        if "max_window_layers" not in given:  # SmolLM3
            return bool(without_rope)
        first = given["max_window_layers"]
        if isinstance(first, bool) or not isinstance(first, int):
            raise InputError(f"max_window_layers must be a whole number, not {first!r:.40}")
        return first < layers
    known = (_FULL, _SLIDING)
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in known for k in kinds):
        raise InputError(
            f"layer_types must be a list of {_FULL!r} and {_SLIDING!r}, one for every layer, not "
            f"{kinds!r:.60}"
        )
    if _SLIDING in kinds and window is None:
        raise InputError(f"layer_types has {_SLIDING!r}, but sliding_window is not given")
    return _SLIDING in kinds
