"""Reading config.json: what is read, what has defaults, what is refused by name."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.errors import InputError
from jaxprune.models.llama import Llama3Scaling, LlamaConfig

CONTENT = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_defaults_are_those_of_hugging_face():
    assert LlamaConfig.from_json(CONTENT) == LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=False,
    )


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": SCALING}, 5e5, SCALING),
        ({"rope_parameters": {**SCALING, "rope_theta": 5e5}}, 5e5, SCALING),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, 5e5, None),
        ({"rope_scaling": {"type": "default"}}, 1e4, None),
        ({"rope_scaling": None, "rope_parameters": None}, 1e4, None),
    ],
)
def test_rotary_settings_of_older_and_newer_files(rope, theta, scaling):
    config = LlamaConfig.from_json(CONTENT | rope)
    assert config.rope_theta == theta
    if scaling is None:
        assert config.rope_scaling is None
    else:
        fields = {name: value for name, value in scaling.items() if name != "rope_type"}
        assert config.rope_scaling == Llama3Scaling(**fields)


def test_settings_survive_writing_and_reading():
    for rope in ({}, {"rope_scaling": SCALING, "rope_theta": 5e5}):
        config = LlamaConfig.from_json(CONTENT | rope | {"tie_word_embeddings": True})
        assert LlamaConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"model_type": None}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type 'yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": "llama3"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks low_freq_factor"),
        ({"rope_scaling": SCALING | {"factor": "8"}}, "rope_scaling.factor"),
        ({"rope_scaling": SCALING | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"hidden_size": 33}, "head_dim is not given"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"vocab_size": 1.5}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_what_is_wrong_or_not_supported_is_named(change, named):
    with pytest.raises(InputError, match=named.replace("[", r"\[")):
        LlamaConfig.from_json(CONTENT | change)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
FIELDS = [*sorted(LlamaConfig.from_json(CONTENT).to_json()), "rope_parameters"]


@given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_content_is_read_or_refused(change):
    with contextlib.suppress(InputError):
        LlamaConfig.from_json(CONTENT | change)
