"""A model whose logits come from masked fused weights: ones are dense; without RoPE it is plain."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import attention_matrix
from jaxprune.evaluation import fused_llama as fused
from jaxprune.evaluation import perplexity
from jaxprune.evaluation.fused_llama import expansion_cost, fused_block, fused_losses, rotary_heads
from jaxprune.models.llama import Llama, Llama3Scaling, LlamaConfig, modeling
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


def test_heads_are_paired_and_scaled_as_in_the_model(key):
    weights = make(CONFIG, key).block_weights(0)
    heads = rotary_heads(weights, CONFIG)
    assert heads.wq.shape == heads.wk.shape == (4, 12, 6)
    np.testing.assert_allclose(heads.wk[3], weights.wk[:, 6:])
    np.testing.assert_allclose(heads.wq[1], weights.wq[:, 6:12] / np.sqrt(6), rtol=1e-6)


def test_without_rope_and_with_full_rank_it_is_the_plain_fused_model(key, monkeypatch):
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
    )
    monkeypatch.setattr(fused, "inverse_frequencies", lambda config: np.zeros(6, np.float32))
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
