"""Reading config.json: what is read, what has defaults, what is refused by name."""

import contextlib
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.errors import InputError
from jaxprune.models.llama import (
    LinearScaling,
    Llama3Scaling,
    LlamaConfig,
    YarnScaling,
    check_length,
)

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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def of_family(name, **fields):
    return LlamaConfig.from_json(CONTENT | {"architectures": None, "model_type": name} | fields)


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
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
        query_key_norm=False,
        layers_without_rope=(),
        sliding_window=None,
    )


def test_families_have_defaults_and_peculiarities_of_their_own():
    heads = {"num_attention_heads": 32, "hidden_size": 64, "num_hidden_layers": 9}
    mistral, qwen2, qwen3, smollm3 = (
        of_family(name, **heads) for name in ("mistral", "qwen2", "qwen3", "smollm3")
    )
    assert (mistral.num_key_value_heads, mistral.sliding_window) == (8, 4096)
    assert (qwen2.num_key_value_heads, qwen2.sliding_window, qwen2.head_dim) == (32, None, 2)
    assert (qwen2.attention_bias, qwen2.output_bias) == (True, False)
    assert (qwen3.query_key_norm, qwen3.head_dim, qwen3.attention_bias) == (True, 128, False)
    assert (smollm3.num_key_value_heads, smollm3.rope_theta) == (4, 2e6)
    assert (smollm3.layers_without_rope, smollm3.tie_word_embeddings) == ((3, 7), True)
    biased = of_family("qwen3", **heads, attention_bias=True)
    assert (biased.attention_bias, biased.output_bias) == (True, True)
    # `transformers` reads no such field of these.
    assert not of_family("mistral", **heads, attention_bias=True).attention_bias
    assert not of_family("qwen2", **heads, attention_bias=True).output_bias
    assert of_family("smollm3", **heads, no_rope_layers=[0, 1] * 5).layers_without_rope == (
        *(0, 2, 4, 6, 8),
    )


SLIDING = {"use_sliding_window": True, "sliding_window": 16}


@pytest.mark.parametrize(
    ("name", "fields", "window"),
    [
        ("llama", {"sliding_window": 16}, None),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 16}, 16),
        ("qwen2", {"sliding_window": 16}, None),
        ("qwen2", SLIDING, None),  # from layer 28 on
        ("qwen2", SLIDING | {"max_window_layers": 2}, None),
        ("qwen2", SLIDING | {"max_window_layers": 1}, 16),
        ("qwen3", SLIDING | {"layer_types": ["full_attention"] * 2}, None),
        ("qwen3", SLIDING | {"layer_types": ["full_attention", "sliding_attention"]}, 16),
        ("smollm3", SLIDING | {"no_rope_layers": [1, 1]}, None),
        ("smollm3", SLIDING | {"no_rope_layers": [1, 0]}, 16),
    ],
)
def test_a_window_is_that_of_the_layers_that_have_one(name, fields, window):
    config = of_family(name, num_key_value_heads=2, **fields)
    assert config.sliding_window == window
    check_length(config, 16)
    if window:
        with pytest.raises(InputError, match=r"sliding_window 16 .* seqlen=16 or less"):
            check_length(config, 17)


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


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, LinearScaling(2.0)),
        ({"rope_parameters": YARN}, YarnScaling(4.0, 32, 1.1386294361119891)),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, YarnScaling(4.0, 64, 1.1386294361119891)),
        ({"rope_scaling": YARN | {"factor": 0.5}}, YarnScaling(0.5, 32, 1.0)),
        (
            {"rope_scaling": YARN | {"attention_factor": 2.0, "mscale": 3, "beta_fast": None}},
            YarnScaling(4.0, 32, 2.0),
        ),
        (
            {"rope_scaling": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False}},
            YarnScaling(4.0, 32, 1.2772588722239782 / 1.0693147180559945, truncate=False),
        ),
        ({"rope_scaling": YARN | {"mscale": 2.0}}, YarnScaling(4.0, 32, 1.1386294361119891)),
    ],
)
def test_scalings_of_rotary_frequencies(rope, scaling):
    found = LlamaConfig.from_json(CONTENT | {"max_position_embeddings": 64} | rope)
    assert found.rope_scaling == scaling
    assert LlamaConfig.from_json(found.to_json()) == found


def test_settings_survive_writing_and_reading_in_every_family():
    for name, fields in {
        "llama": {"attention_bias": True, "mlp_bias": True},
        "mistral": {"sliding_window": 16},
        "qwen2": SLIDING | {"max_window_layers": 0},
        "qwen3": {"attention_bias": True, "rope_scaling": YARN},
        "smollm3": {"no_rope_layers": [1, 0], "rope_theta": 5e5},
    }.items():
        config = of_family(name, num_key_value_heads=2, **fields)
        content = config.to_json()
        assert content["model_type"] == name
        assert LlamaConfig.from_json(content) == config
    mixed = dataclasses.replace(config, query_key_norm=True)
    with pytest.raises(InputError, match="no family has these settings"):
        mixed.to_json()


def test_settings_survive_writing_and_reading():
    for rope in ({}, {"rope_scaling": SCALING, "rope_theta": 5e5}):
        config = LlamaConfig.from_json(CONTENT | rope | {"tie_word_embeddings": True})
        assert LlamaConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mistral"}, "architectures .* with model_type 'mistral'"),
        ({"model_type": 3}, "model_type 3"),
        ({"model_type": None}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false"),
        ({"mlp_bias": 1}, "mlp_bias must be true or false"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "lacks original_max_position"),
        ({"rope_scaling": YARN | {"factor": "2"}}, "rope_scaling.factor"),
        ({"rope_scaling": YARN | {"attention_factor": 0}}, "rope_scaling.attention_factor"),
        ({"rope_scaling": YARN | {"beta_slow": -1}}, "rope_scaling.beta_slow"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "rope_scaling.truncate"),
        ({"rope_scaling": YARN | {"mscale": "a", "mscale_all_dim": 1}}, "rope_scaling.mscale"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 8}, "contradicts"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta 1.0 must be above 1"),
        ({"rope_parameters": {"full_attention": YARN}}, "rope_parameters.full_attention"),
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


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window"),
        ("qwen2", SLIDING | {"max_window_layers": "1"}, "max_window_layers"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types must be a list"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
        ("qwen3", {"layer_types": 3}, "layer_types must be a list"),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": None},
            "sliding_window is not given",
        ),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must be a list"),
        ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers must be a list"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    ],
)
def test_what_is_wrong_in_a_family_is_named(name, change, named):
    with pytest.raises(InputError, match=named) as error:
        of_family(name, num_key_value_heads=2, **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        *("gemma", "gemma2", "gemma3_text", "phi", "phi3", "mixtral", "gpt2", "deepseek_v2"),
        *("deepseek_v3", "qwen2_moe", "qwen3_moe", "ministral", "olmo2", "cohere"),
    ],
)
def test_another_architecture_is_one_line(name):
    # GPT-2 does not even call its sizes by these names.
    with pytest.raises(InputError) as error:
        LlamaConfig.from_json({"model_type": name, "n_embd": 8})
    assert str(error.value) == (
        f"config.json: model_type '{name}' is not supported, "
        "only 'llama', 'mistral', 'qwen2', 'qwen3', 'smollm3'"
    )


@pytest.mark.parametrize("layers", [(2,), (-1,), (1, 0), (0, 0), [0]])
def test_layers_without_positions_are_layers(layers, unchecked):
    config = LlamaConfig.from_json(CONTENT)
    with pytest.raises(InputError, match="layers_without_rope"):
        dataclasses.replace(config, layers_without_rope=layers)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
FIELDS = [
    *sorted(LlamaConfig.from_json(CONTENT).to_json()),
    *("rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers"),
    *("layer_types", "no_rope_layers", "no_rope_layer_interval"),
]
ROPE_FIELDS = st.sampled_from([*YARN, *SCALING, "type", "mscale", "mscale_all_dim", "beta_fast"])


@pytest.mark.slow
@given(
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "smollm3"]),
    st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3),
    st.none() | st.dictionaries(ROPE_FIELDS, st.just("yarn") | json_values, max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_any_content_is_read_or_refused(name, change, rope):
    with contextlib.suppress(InputError):
        of_family(name, **{"rope_scaling": rope and YARN | rope} | change)


def test_a_whole_number_will_do_as_the_base_of_positions():
    assert of_family("llama", rope_theta=5).rope_theta == 5.0
