"""Extremes of size, shape, type and sparsity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jaxprune import (
    Sparsity,
    attention_matrix,
    baselines,
    closed_form_gradient,
    mask_loss,
    prune_attention,
    relative_error,
)
from jaxprune.methods.query_key import prune_query_key

pytestmark = pytest.mark.slow

# (tokens, width): one token, one feature, more features than tokens.
SHAPES = [(1, 1), (1, 4), (5, 1), (3, 7)]
EVERYTHING = ["0", "1", "1:1", "4:4"]


def draw(key, n, d, size, dtype=jnp.float32):
    """Activations and a fused weight whose logits reach ``size`` in absolute value."""
    keys = jax.random.split(key, 2)
    x, w = jax.random.normal(keys[0], (n, d)), jax.random.normal(keys[1], (d, d))
    w = w * size / jnp.abs(x @ w @ x.T).max()
    return x.astype(dtype), w.astype(dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [1e-4, 1e4])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_loss_and_gradient_of_extreme_logits_are_those_of_the_formulas(
    key, x64, n, d, size, causal
):
    x, w = draw(key, n, d, size, jnp.float64)
    mask = jax.random.uniform(key, (d, d), jnp.float64)
    numbers = [np.asarray(a) for a in (mask, x, w)]
    found, gradient = jax.value_and_grad(mask_loss)(mask, x, w, lam=0.1, causal=causal)
    np.testing.assert_allclose(found, reference.loss(*numbers, 0.1, causal), rtol=1e-9)
    expected = reference.gradient(*numbers, 0.1, causal)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(gradient, expected, atol=1e-9 * scale)
    written = closed_form_gradient(mask, x, w, lam=0.1, causal=causal)
    np.testing.assert_allclose(written, expected, atol=1e-9 * scale)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_every_type_gives_rows_that_sum_to_one_and_finite_errors(key, dtype, size):
    x, w = draw(key, 9, 5, size, dtype)
    matrix = attention_matrix(x, w)
    np.testing.assert_allclose(matrix.sum(axis=-1), 1, rtol=1e-5)
    assert relative_error(x, w, w) == 0
    error = relative_error(x, w, jnp.zeros_like(w))
    assert 0 <= error <= 2
    assert jnp.isfinite(jax.grad(mask_loss)(jnp.ones((5, 5), dtype), x, w, lam=0.1)).all()


def steps_of(preset):
    """Few; the closed form takes none."""
    return None if preset == "gauss_newton" else 3


PRESETS = ["paper", "gauss_newton", "descent"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sparsity", EVERYTHING)
def test_presets_remove_nothing_and_everything(key, preset, sparsity):
    x, w = draw(key, 6, 4, 3.0)
    pruned = prune_attention(x, w, sparsity, preset=preset, steps=steps_of(preset))
    kept = 0 if sparsity == "1" else 16
    assert int(pruned.keep_mask.sum()) == kept
    assert int((pruned.weight != 0).sum()) == kept
    assert jnp.isfinite(pruned.calibration_error)
    if kept and preset == "paper":
        np.testing.assert_array_equal(pruned.weight, w)
        assert pruned.calibration_error < 1e-12


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("n", "d", "size", "dtype"),
    [(1, 1, 1.0, jnp.float32), (5, 4, 1e4, jnp.float32), (5, 4, 2.0, jnp.float16)],
)
def test_presets_at_extremes_give_exact_counts_and_finite_weights(key, preset, n, d, size, dtype):
    x, w = draw(key, n, d, size, dtype)
    pruned = prune_attention(x, w, 0.5, preset=preset, steps=steps_of(preset))
    assert int(pruned.keep_mask.sum()) == d * d - d * d // 2
    assert jnp.isfinite(pruned.weight).all()
    assert 0 <= pruned.calibration_error <= 2


def test_one_head_wider_than_the_model(key):
    """k > d, one query head, one key head, and a sequence of one token among others."""
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (2, 5, 2))
    wq, wk = (jax.random.normal(k, (2, 1, 6)) for k in keys[1:])
    pruned = prune_query_key(x, wq, wk, 0.5, rope=jnp.array([1.0, 0.1, 0.01]), steps=3)
    for kept in (pruned.keep_q, pruned.keep_k):
        assert int(kept.sum()) == 6
    assert all(jnp.isfinite(w).all() for w in (pruned.wq, pruned.wk))


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(
    "x",
    [
        pytest.param(jnp.zeros((4, 4)), id="all zero"),
        pytest.param(jnp.ones((4, 4)), id="rank one"),
        pytest.param(jnp.ones((1, 4)), id="one token"),
        pytest.param(1e-18 * jnp.ones((4, 4)), id="squares underflow"),
        pytest.param(1e15 * jnp.ones((4, 4)), id="large"),
    ],
)
def test_baselines_on_degenerate_activations(key, name, x):
    w = jax.random.normal(key, (4, 3))
    arguments = (w,) if name == "magnitude" else (x, w)
    pruned = getattr(baselines, name)(*arguments, Sparsity(0.5))
    assert int(pruned.keep_mask.sum()) == 6
    assert jnp.isfinite(pruned.weight).all()
    assert not pruned.weight[~pruned.keep_mask].any()
