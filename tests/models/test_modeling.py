"""The Llama against ``transformers``, through golden files, and against itself."""

import dataclasses
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.errors import InputError
from jaxprune.models import llama
from jaxprune.models.llama.activations import attention_inputs
from jaxprune.models.llama.checkpoint import abstract_model
from jaxprune.models.llama.modeling import INPUT_OF, block_shapes, rotary_layers, run_blocks

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(folder.parent.name for folder in GOLDEN.glob("*/config.json"))

SMALL = llama.LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rms_norm_eps=1e-5,
    rope_scaling=llama.Llama3Scaling(8.0, 1.0, 4.0, 16),
)
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 24)).astype(np.int32)


logits_of = jax.jit(lambda model, tokens: model(tokens))


def random_llama(config, dtype=jnp.float32):
    """Weights large enough for attention to be far from uniform, each drawn by its own name."""

    def weight(path, leaf):
        draw = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
        return jnp.asarray(draw.normal(0.3, 0.3, leaf.shape), dtype)

    model = jax.tree_util.tree_map_with_path(weight, abstract_model(config, dtype))
    blocks = model.blocks.get_value()
    model.blocks.set_value(blocks._replace(rotary=rotary_layers(config, dtype)))
    return model


def test_there_are_golden_cases():
    assert len(CASES) >= 17


# Families and files of every kind; the others differ from one of these in a setting.
QUICK = {"llama3", "mistral", "qwen2_yarn", "qwen3", "smollm3", "sharded", "bfloat16"}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES]
)
def test_logits_and_every_block_equal_those_of_transformers(case):
    model, expected = llama.load(GOLDEN / case), np.load(GOLDEN / case / "expected.npz")
    tokens = expected["tokens"]
    np.testing.assert_allclose(logits_of(model, tokens), expected["logits"], rtol=0, atol=1e-4)

    hidden = model.embed(tokens)
    for layer in range(model.config.num_hidden_layers):
        np.testing.assert_allclose(hidden, expected[f"hidden_{layer}"], rtol=0, atol=1e-4)
        hidden, inputs = llama.block(model.block_weights(layer), hidden, model.config)
        for name, value in inputs._asdict().items():
            np.testing.assert_allclose(value, expected[f"{name}_{layer}"], rtol=0, atol=1e-4)
    last = expected[f"hidden_{model.config.num_hidden_layers}"]
    np.testing.assert_allclose(hidden, last, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mistral", "qwen2_yarn", "qwen3_biases", "smollm3_yarn"])
def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(case):
    """Both round after every map, in different orders."""
    expected = np.load(GOLDEN / case / "expected.npz")
    logits = logits_of(llama.load(GOLDEN / case, jnp.bfloat16), expected["tokens"])

    def distance(found):
        return np.sqrt(np.mean((found - expected["logits"]) ** 2))

    assert 0 < distance(logits) < 1.5 * distance(expected["logits_bfloat16"])


@pytest.mark.parametrize("case", CASES)
def test_rotary_frequencies_are_those_of_transformers(case):
    expected = np.load(GOLDEN / case / "expected.npz")["inverse_frequencies"]
    frequencies = llama.inverse_frequencies(llama.load_config(GOLDEN / case))
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, expected, rtol=2e-7)


def test_llama_3_scaling_changes_17_of_the_32_frequencies_of_the_1b_model():
    config = llama.LlamaConfig(
        128256,
        2048,
        8192,
        16,
        32,
        8,
        64,
        rope_theta=500000.0,
        rope_scaling=llama.Llama3Scaling(32.0, 1.0, 4.0, 8192),
    )
    plain = llama.inverse_frequencies(dataclasses.replace(config, rope_scaling=None))
    assert (plain != llama.inverse_frequencies(config)).sum() == 17


def test_a_second_call_does_not_compile():
    model = random_llama(SMALL)
    model(TOKENS)
    model.activations(TOKENS, (1,))
    llama.block(model.block_weights(0), model.embed(TOKENS), SMALL)
    compiled = [function._cache_size() for function in (run_blocks, llama.block)]
    again = random_llama(dataclasses.replace(SMALL))
    again(TOKENS[::-1])
    again.activations(TOKENS[::-1], [1])
    llama.block(again.block_weights(1), again.embed(TOKENS), SMALL)
    assert compiled == [function._cache_size() for function in (run_blocks, llama.block)]


def test_jit_equals_eager():
    model = random_llama(SMALL)
    with jax.disable_jit():
        eager = model(TOKENS[:, :9])
    np.testing.assert_allclose(logits_of(model, TOKENS[:, :9]), eager, rtol=0, atol=1e-5)


def test_later_tokens_do_not_change_earlier_logits():
    model = random_llama(SMALL)
    changed = TOKENS.copy()
    changed[:, 10:] = (changed[:, 10:] + 1) % 40
    before, after = logits_of(model, TOKENS), logits_of(model, changed)
    np.testing.assert_allclose(before[:, :10], after[:, :10], rtol=0, atol=1e-5)
    assert not np.allclose(before[:, 10:], after[:, 10:], atol=1e-3)


def test_blocks_of_rows_and_of_heads_compute_the_same(monkeypatch):
    model = random_llama(SMALL)
    whole = logits_of(model, TOKENS)
    for entries in (24 * 7, 24 * 48 * 3):
        monkeypatch.setattr("jaxprune.models.llama.modeling.BLOCK_ENTRIES", entries)
        jax.clear_caches()
        np.testing.assert_allclose(
            jax.jit(lambda m, t: m(t))(model, TOKENS), whole, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("entries", [pytest.param(2**18, marks=pytest.mark.slow), 24 * 7])
def test_segments_of_a_sequence_compute_the_same(monkeypatch, entries):
    """24 tokens in segments of 4 or 5: what every token sees, and gradients."""
    model = random_llama(SMALL)

    def logits_and_gradient(embedded):
        hidden, pull = jax.vjp(
            lambda x: run_blocks(model.blocks.get_value(), x, SMALL)[0], embedded
        )
        return hidden, pull(jnp.cos(hidden))[0]

    embedded = model.embed(jnp.asarray(TOKENS))
    whole = jax.jit(logits_and_gradient)(embedded)
    monkeypatch.setattr("jaxprune.models.llama.modeling.BLOCK_ENTRIES", entries)
    monkeypatch.setattr("jaxprune.models.llama.modeling._SEGMENTED", 5)
    monkeypatch.setattr("jaxprune.models.llama.modeling._SEGMENTS", 5)
    jax.clear_caches()
    for found, expected in zip(jax.jit(logits_and_gradient)(embedded), whole, strict=True):
        # Sums in another order: rounding of the largest entries reaches all others.
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_bfloat16_is_near_float32():
    exact = logits_of(random_llama(SMALL), TOKENS)
    rounded = random_llama(SMALL, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {jnp.dtype(jnp.bfloat16)}
    logits = logits_of(rounded, TOKENS)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("layers", [None, (), (1,), (2, 0)])
def test_activations_are_the_attention_inputs_of_the_layers_asked_for(layers):
    model = random_llama(SMALL)
    found = model.activations(TOKENS, layers)
    layers = range(3) if layers is None else layers
    assert found.shape == (len(layers), *TOKENS.shape, 16)
    for layer, x in zip(layers, found, strict=True):
        below = jax.tree.map(lambda a, top=layer: a[:top], model.blocks.get_value())
        hidden = model.embed(TOKENS)
        if layer:
            hidden, _ = run_blocks(below, hidden, SMALL)
        expected = llama.block(model.block_weights(layer), hidden, SMALL)[1].attention
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-5)


def test_there_is_no_block_beyond_the_last():
    with pytest.raises(InputError, match="no block 3, only 0 to 2"):
        random_llama(SMALL).activations(TOKENS, (0, 3))


def test_one_capture_costs_no_memory_for_the_others():
    config = dataclasses.replace(SMALL, num_hidden_layers=40)
    model = random_llama(config)

    def peak(layers):
        captured = jax.jit(lambda model, tokens: model.activations(tokens, layers))
        memory = captured.lower(model, TOKENS).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    size = TOKENS.size * config.hidden_size * 4
    assert peak(tuple(range(40))) - peak((20,)) > 30 * size


def test_a_block_takes_replaced_weights():
    model = random_llama(SMALL)
    weights, hidden = model.block_weights(1), model.embed(TOKENS)
    dense, inputs = llama.block(weights, hidden, SMALL)
    for name, field in INPUT_OF.items():
        shape = getattr(block_shapes(SMALL), name)
        assert getattr(inputs, field).shape == (*TOKENS.shape, shape[0])
        changed, _ = llama.block(
            weights._replace(**{name: 0 * getattr(weights, name)}), hidden, SMALL
        )
        assert not np.allclose(dense, changed, atol=1e-4)


CHANGES = {
    "vocab_size": 41,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "rms_norm_eps": 1e-2,
    "rope_theta": 500.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "rope_scaling.factor": 2.0,
    "rope_scaling.low_freq_factor": 2.0,
    "rope_scaling.high_freq_factor": 8.0,
    "rope_scaling.original_max_position_embeddings": 64,
    "attention_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "query_key_norm": True,
    "layers_without_rope": (1,),
}
YARN = llama.YarnScaling(8.0, 64, 1.2, 4.0, 0.25, truncate=False)
YARN_CHANGES = {
    "factor": 2.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "truncate": True,
}


def test_every_setting_is_varied():
    fields = {field.name for field in dataclasses.fields(llama.LlamaConfig)}
    scaling = {f"rope_scaling.{f.name}" for f in dataclasses.fields(llama.Llama3Scaling)}
    # What a window does, and yarn's factor of the attention, have tests of their own.
    assert set(CHANGES) | {"sliding_window"} == fields | scaling
    yarn = {field.name for field in dataclasses.fields(llama.YarnScaling)}
    assert set(YARN_CHANGES) | {"attention_factor"} == yarn


@pytest.mark.parametrize("field", CHANGES)
def test_every_setting_changes_the_output(field):
    name, _, inner = field.partition(".")
    value = CHANGES[field]
    if inner:
        value = dataclasses.replace(SMALL.rope_scaling, **{inner: value})
    changed = logits_of(random_llama(dataclasses.replace(SMALL, **{name: value})), TOKENS)
    logits = logits_of(random_llama(SMALL), TOKENS)
    assert changed.shape != logits.shape or not np.allclose(changed, logits, atol=1e-4)


@pytest.mark.parametrize("field", YARN_CHANGES)
def test_every_setting_of_yarn_changes_the_frequencies(field):
    changed = dataclasses.replace(YARN, **{field: YARN_CHANGES[field]})
    base, other = (
        llama.inverse_frequencies(dataclasses.replace(SMALL, head_dim=16, rope_scaling=scaling))
        for scaling in (YARN, changed)
    )
    assert not np.allclose(base, other, rtol=1e-3)


def test_linear_scaling_divides_positions():
    plain, scaled = (
        llama.inverse_frequencies(dataclasses.replace(SMALL, rope_scaling=scaling))
        for scaling in (None, llama.LinearScaling(4.0))
    )
    np.testing.assert_allclose(scaled, plain / 4)


@pytest.mark.parametrize("norm", [False, True])
def test_yarns_factor_lengthens_queries_and_keys_where_they_are_turned(norm):
    """Its square is a factor of the logits of a layer with positions, and of no other."""
    scaling = dataclasses.replace(YARN, attention_factor=1.5)
    config = dataclasses.replace(
        SMALL, rope_scaling=scaling, layers_without_rope=(1,), query_key_norm=norm
    )
    plain = dataclasses.replace(
        config, rope_scaling=dataclasses.replace(scaling, attention_factor=1.0)
    )
    model = random_llama(config)
    hidden = model.embed(TOKENS)
    for layer, factor in ((0, 1.5**2), (1, 1.0)):
        weights = model.block_weights(layer)
        found = llama.block(weights, hidden, config)[0]
        queries = "query_norm" if norm else "wq"
        longer = weights._replace(**{queries: factor * getattr(weights, queries)})
        np.testing.assert_allclose(found, llama.block(longer, hidden, plain)[0], atol=1e-5)
        if layer == 0:
            assert not np.allclose(found, llama.block(weights, hidden, plain)[0], atol=1e-3)


def test_a_layer_without_positions_does_not_see_the_order_of_earlier_tokens():
    config = dataclasses.replace(SMALL, layers_without_rope=(1,))
    model = random_llama(config)
    hidden = model.embed(TOKENS)
    mixed = jnp.concatenate([hidden[:, 22::-1], hidden[:, 23:]], axis=1)
    for layer, same in ((0, False), (1, True)):
        last, other = (
            llama.block(model.block_weights(layer), h, config)[0][:, -1] for h in (hidden, mixed)
        )
        assert np.allclose(last, other, rtol=0, atol=1e-5) == same


def test_a_window_that_hides_nothing_changes_nothing_and_one_that_would_is_refused():
    wide, narrow = (dataclasses.replace(SMALL, sliding_window=window) for window in (24, 23))
    model = random_llama(SMALL)
    found, expected = logits_of(random_llama(wide), TOKENS), logits_of(model, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    refused, line = random_llama(narrow), "sliding_window 23 would hide tokens in windows of 24"
    for run in (
        lambda: refused(TOKENS),
        lambda: refused.activations(TOKENS),
        lambda: list(attention_inputs(refused, TOKENS)),
        lambda: llama.block(model.block_weights(0), model.embed(TOKENS), narrow),
    ):
        with pytest.raises(InputError, match=line):
            run()
    refused(TOKENS[:, :23])


def test_parameters_of_every_kind_are_counted():
    config = dataclasses.replace(
        SMALL,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        query_key_norm=True,
        layers_without_rope=(0,),
    )
    model = random_llama(config)
    held = sum(leaf.size for leaf in jax.tree.leaves(model)) - config.num_hidden_layers
    assert llama.parameter_count(config) == held


def test_stories_continues_as_its_card_says(shared):
    import tokenizers

    folder = shared / "models" / "stories260K"
    model = llama.load(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode("Once upon a time").ids
    for _ in range(60):
        padded = np.zeros((1, 80), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(logits_of(model, padded)[0, len(ids) - 1].argmax()))
    assert tokenizer.decode(ids).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    )
