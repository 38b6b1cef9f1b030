"""A model whose logits come from masked fused weights: ones are dense; without RoPE it is plain."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import attention_matrix
from jaxprune.errors import InputError
from jaxprune.evaluation import perplexity
from jaxprune.evaluation.fused_llama import expansion_cost, fused_block, fused_losses, rotary_heads
from jaxprune.evaluation.heads import from_model, of_block
from jaxprune.models.llama import Llama, Llama3Scaling, LlamaConfig, YarnScaling, modeling
from jaxprune.models.llama.losses import window_losses
from jaxprune.text.windows import Windows

CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64),
)


def make(config, key):
    """Random weights, large enough that attention is not flat."""
    model = Llama(config, key=key)
    model.blocks.set_value(
        jax.tree.map(lambda w: w if w.ndim == 2 else 12 * w, model.blocks.get_value())
    )
    return model


@pytest.fixture
def windows(key):
    tokens = np.asarray(jax.random.randint(key, (3, 17), 0, 40), np.int32)
    return Windows(tokens, {"corpus": "random"})


def ones(config):
    heads = config.num_hidden_layers, config.num_attention_heads
    return jnp.ones((*heads, config.hidden_size, config.hidden_size))


def test_a_mask_of_ones_is_the_dense_model(key, windows):
    model = make(CONFIG, key)
    dense = perplexity.evaluate(model, windows)
    fused_model = perplexity.evaluate(
        model, windows, losses=lambda m, t: fused_losses(m, ones(CONFIG), t)
    )
    np.testing.assert_allclose(fused_model["perplexity"], dense["perplexity"], rtol=1e-4)
    masked = ones(CONFIG) * jax.random.bernoulli(key, 0.5, ones(CONFIG).shape)
    assert (
        abs(
            float((fused_losses(model, masked, windows.tokens)).mean())
            - np.log(dense["perplexity"])
        )
        > 2e-4
    )


def test_a_mask_of_ones_is_the_dense_model_of_every_family_without_biases_before_the_softmax(key):
    """Layers without positions, yarn's factor, biases that are not in the logits."""
    config = dataclasses.replace(
        CONFIG,
        rope_scaling=YarnScaling(4.0, 8, 1.4, 2.0, 0.1),
        layers_without_rope=(1,),
        output_bias=True,
        mlp_bias=True,
    )
    model = make(config, key)
    blocks = model.blocks.get_value()
    model.blocks.set_value(blocks._replace(bo=blocks.bo + 0.3, b_up=blocks.b_up - 0.2))
    tokens = np.asarray(jax.random.randint(key, (2, 17), 0, 40), np.int32)
    found = fused_losses(model, ones(config), tokens)
    np.testing.assert_allclose(found, window_losses(model, tokens), rtol=1e-5)

    # Where nothing turns, or at one position, logits are those of the fused problem.
    x = jax.random.normal(key, (1, 5, 12))
    for layer, factor in ((0, 1.4**2), (1, 1)):
        weights = model.block_weights(layer)
        w = of_block(weights, config, x, x).w[0]
        plain = weights.wq[:, :6] @ weights.wk[:, :6].T / np.sqrt(6)
        np.testing.assert_allclose(w, factor * plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("field", ["attention_bias", "query_key_norm"])
def test_biases_and_norms_before_the_softmax_are_refused_by_name(key, field):
    config = dataclasses.replace(CONFIG, **{field: True})
    weights = Llama(config, key=key).block_weights(0)
    with pytest.raises(InputError, match=f"{field}: .* fused weights are not compared"):
        rotary_heads(weights, config)


@pytest.mark.parametrize("case", ["qwen2", "qwen3"])
def test_the_comparison_of_heads_refuses_them_before_any_work(checkpoint, case):
    with pytest.raises(InputError, match="prune W_Q and W_K themselves"):
        from_model(str(checkpoint(case)), "zoo")


def test_heads_are_paired_and_scaled_as_in_the_model(key):
    weights = make(CONFIG, key).block_weights(0)
    heads = rotary_heads(weights, CONFIG)
    assert heads.wq.shape == heads.wk.shape == (4, 12, 6)
    np.testing.assert_allclose(heads.wk[3], weights.wk[:, 6:])
    np.testing.assert_allclose(heads.wq[1], weights.wq[:, 6:12] / np.sqrt(6), rtol=1e-6)


def test_without_rope_and_with_full_rank_it_is_the_plain_fused_model(key):
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        layers_without_rope=(0,),
    )
    weights = make(config, key).block_weights(0)
    hidden = jax.random.normal(key, (2, 9, 12))
    masks = 1.0 * jax.random.bernoulli(key, 0.5, (2, 12, 12))
    x = modeling.rms_norm(hidden, weights.attention_norm, config.rms_norm_eps)
    value = x @ weights.wv
    attended = []
    for head in range(2):
        wq = weights.wq[:, 12 * head : 12 * head + 12]
        w = masks[head] * (wq @ weights.wk.T) / np.sqrt(12)
        attended.append(jnp.stack([attention_matrix(s, w) for s in x]) @ value)
    middle = hidden + jnp.concatenate(attended, axis=-1) @ weights.wo
    y = modeling.rms_norm(middle, weights.mlp_norm, config.rms_norm_eps)
    expected = middle + (jax.nn.silu(y @ weights.w_gate) * (y @ weights.w_up)) @ weights.w_down
    found = fused_block(weights, masks, hidden, config)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_cost_counts_the_operations_of_the_compiled_program():
    """The products with ``A``, ``B`` and the logits, as XLA counts them for one window and head."""
    from jaxprune.methods.rotary import RotaryHead, expanded_keys, expanded_queries

    d, k, n = 32, 8, 64
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=d,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=k,
    )

    def logits(x, mask, wq, wk, rope):
        queries = expanded_queries(x, mask, RotaryHead(wq, wk, rope))
        return queries @ expanded_keys(x, rope).T

    shapes = (n, d), (d, d), (d, k), (d, k), (k // 2,)
    compiled = jax.jit(logits).lower(*map(partial(jnp.zeros), shapes)).compile()
    counted = compiled.cost_analysis()["flops"]
    assert 0.8 < expansion_cost(config, 1, n).operations / counted < 1.1
