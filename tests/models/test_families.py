"""What families add before the softmax reaches the objective: exactly, for every form of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.gauss_newton.residuals import AttentionMatrices
from jaxprune.methods.query_key import (
    QueryKeyContext,
    QueryKeySettings,
    head_errors,
    prune_query_key,
    query_key_refit,
)
from jaxprune.models import llama
from jaxprune.models.llama.checkpoint import abstract_model
from jaxprune.models.llama.modeling import attention_form, rms_norm, rotary_layers
from jaxprune.sparsity import Sparsity

N, D, HEADS, GROUPS, WIDTH = 7, 16, 4, 2, 8
PLAIN = llama.LlamaConfig(20, D, 12, 2, HEADS, GROUPS, WIDTH, rms_norm_eps=1e-2)
FORMS = {
    "biases": {"attention_bias": True, "output_bias": True},
    "biases and norms, no positions": {
        "attention_bias": True,
        "query_key_norm": True,
        "layers_without_rope": (0,),
    },
    "all, yarn": {
        "attention_bias": True,
        "query_key_norm": True,
        "layers_without_rope": (1,),
        "rope_scaling": llama.YarnScaling(4.0, 8, 1.3, 2.0, 0.1),
    },
}


def one_block(config, dtype=jnp.float64):
    """Random weights of the first block."""
    draw = np.random.default_rng(0)
    model = jax.tree.map(
        lambda leaf: jnp.asarray(draw.normal(0.2, 0.5, leaf.shape), dtype),
        abstract_model(config, dtype),
    )
    blocks = model.blocks.get_value()
    model.blocks.set_value(blocks._replace(rotary=rotary_layers(config, dtype)))
    return model.block_weights(0)


def settings_of(config):
    return QueryKeySettings(HEADS, GROUPS, WIDTH**-0.5, Sparsity(0.5), output_weight=0.0)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_that_of_attention_as_the_block_computes_it(x64, form):
    """Finite differences go through the block alone.

    With fewer tokens than a head is wide, values can be unit vectors: then what the heads of a
    block give is its attention matrices.
    """
    config = dataclasses.replace(PLAIN, **FORMS[form])
    weights = one_block(config)
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=(1, N, D)))
    x = rms_norm(hidden, weights.attention_norm, config.rms_norm_eps)
    units = jnp.pad(jnp.linalg.pinv(x[0]), ((0, 0), (0, WIDTH - N)))
    probe = weights._replace(wv=jnp.tile(units, (1, GROUPS)))
    if probe.bv is not None:
        probe = probe._replace(bv=0 * probe.bv)

    def matrices(wq, wk):
        output = llama.block(probe._replace(wq=wq, wk=wk), hidden, config)[1].output
        return output.reshape(N, HEADS, WIDTH)[..., :N]

    np.testing.assert_allclose(matrices(weights.wq, weights.wk).sum(-1), 1, atol=1e-10)

    @jax.jit
    def error(wq, wk):
        return 0.5 * jnp.sum((matrices(wq, wk) - matrices(weights.wq, weights.wk)) ** 2)

    dense, data = (weights.wq, weights.wk), {"x": x, "x0": x}
    form = attention_form(weights, config)
    context = QueryKeyContext(form, dense, None)
    objective = query_key_refit(dense, context, settings_of(config)).objective
    draw = np.random.default_rng(2)
    pruned = tuple(w * (draw.uniform(size=w.shape) < 0.5) for w in dense)
    # What curvature is measured on.
    outputs = {name: x[0] @ w for name, w in zip("qk", pruned, strict=True)}
    shared = {"form": form, "outputs": None}
    groups = AttentionMatrices(HEADS, GROUPS, WIDTH**-0.5)(outputs, {"x": x[0]}, shared)
    rows = [jnp.pad(group, [(0, 0)] * 3 + [(0, N - group.shape[-1])]) for group in groups]
    found = jnp.concatenate(rows, axis=-2).reshape(HEADS, N, N)
    np.testing.assert_allclose(found, matrices(*pruned).swapaxes(0, 1), rtol=1e-9, atol=1e-12)

    value, gradient = jax.jit(jax.value_and_grad(objective))(pruned, data)
    np.testing.assert_allclose(value, error(*pruned), rtol=1e-9)
    step = 1e-5
    for which in (0, 1):
        for _ in range(3):
            along = jnp.asarray(draw.normal(size=pruned[which].shape))
            ends = [
                error(*(w + sign * step * along if i == which else w for i, w in enumerate(pruned)))
                for sign in (1, -1)
            ]
            expected = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(jnp.sum(gradient[which] * along), expected, rtol=1e-6)


@pytest.mark.parametrize("form", ["biases and norms, no positions", "all, yarn"])
def test_errors_of_heads_are_those_of_the_attention_written_out(x64, form):
    """In NumPy, one head and one token at a time."""
    config = dataclasses.replace(PLAIN, **FORMS[form])
    weights = one_block(config)
    x = np.random.default_rng(3).normal(size=(2, N, D))
    turned = 0 not in config.layers_without_rope
    theta = np.asarray(llama.inverse_frequencies(config), np.float64)

    def heads(y, count, norm):
        y = y.reshape(N, count, WIDTH)
        y = norm * y / np.sqrt((y**2).mean(-1, keepdims=True) + config.rms_norm_eps)
        if not turned:
            return y
        complex_y = (y[..., : WIDTH // 2] + 1j * y[..., WIDTH // 2 :]) * np.exp(
            1j * theta * np.arange(N)[:, None, None]
        )
        return np.float32(1.3) * np.concatenate([complex_y.real, complex_y.imag], axis=-1)

    def matrix(x, wq, wk, head):
        q = heads(x @ wq + weights.bq, HEADS, weights.query_norm)[:, head]
        k = heads(x @ wk + weights.bk, GROUPS, weights.key_norm)[:, head // 2]
        logits = np.where(np.tri(N) > 0, q @ k.T / np.sqrt(WIDTH), -np.inf)
        exponents = np.exp(logits - logits.max(-1, keepdims=True))
        return exponents / exponents.sum(-1, keepdims=True)

    dense = (weights.wq, weights.wk)
    pruned = (0.3 * weights.wq, weights.wk)
    error, energy = head_errors(
        jnp.asarray(x), pruned, jnp.asarray(x), dense, attention_form(weights, config),
        settings_of(config),
    )  # fmt: skip
    for head in range(HEADS):
        pairs = [(matrix(s, *pruned, head), matrix(s, *dense, head)) for s in x]
        np.testing.assert_allclose(error[head], sum(((a - b) ** 2).sum() for a, b in pairs))
        np.testing.assert_allclose(energy[head], sum((b**2).sum() for _, b in pairs))


@pytest.mark.slow
def test_arrays_are_pruned_with_biases_and_norms_as_the_model_has_them(unchecked):
    config = dataclasses.replace(PLAIN, attention_bias=True, query_key_norm=True)
    weights = one_block(config, jnp.float32)
    x = jnp.asarray(np.random.default_rng(4).normal(size=(16, N, D)), jnp.float32)
    wq, wk = (w.reshape(D, -1, WIDTH) for w in (weights.wq, weights.wk))
    form = attention_form(weights, config)
    found = prune_query_key(
        x,
        wq,
        wk,
        "0.5",
        rope=form.rope,
        steps=20,
        query_bias=weights.bq.reshape(HEADS, WIDTH),
        key_bias=weights.bk.reshape(GROUPS, WIDTH),
        query_norm=weights.query_norm,
        key_norm=weights.key_norm,
        norm_eps=config.rms_norm_eps,
    )
    pruned, dense = (
        tuple(w.reshape(D, -1) for w in pair) for pair in ((found.wq, found.wk), (wq, wk))
    )
    error, energy = head_errors(x, pruned, x, dense, form, settings_of(config))
    np.testing.assert_allclose(found.calibration_error, error / energy, rtol=1e-4)
    with pytest.raises(ValueError, match="query_bias has 8 entries"):
        prune_query_key(x, wq, wk, "0.5", rope=form.rope, query_bias=jnp.ones(8))
    with pytest.raises(ValueError, match="key_norm holds 8 non-finite"):
        prune_query_key(x, wq, wk, "0.5", rope=form.rope, key_norm=jnp.full(WIDTH, jnp.nan))
