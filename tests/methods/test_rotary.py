"""Masked fused weights under RoPE: logits pair by pair in NumPy, limits that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import Sparsity, attention_matrix
from jaxprune.methods.fused import algorithm1, algorithm1_grid
from jaxprune.methods.rotary import (
    RotaryHead,
    expanded_keys,
    expanded_queries,
    frequency_matrices,
    rotary_algorithm1,
    rotary_descent,
    rotary_error,
    typical_weight,
)
from jaxprune.sparsity import keep_mask

ROPE = np.array([1.0, 0.3, 0.02])


@pytest.fixture
def head(key, x64):
    del x64
    keys = jax.random.split(key, 2)
    wq, wk = (0.4 * jax.random.normal(k, (5, 6), jnp.float64) for k in keys)
    return RotaryHead(wq, wk, jnp.asarray(ROPE))


@pytest.fixture
def x(key, x64):
    del x64
    return jax.random.normal(jax.random.fold_in(key, 7), (2, 9, 5), jnp.float64)


def rotation(delta):
    """``R(δ)`` with ``q_i R_i · k_j R_j = q R(i − j) k``, rotate-half layout."""
    cos, sin = np.diag(np.cos(delta * ROPE)), np.diag(np.sin(delta * ROPE))
    return np.block([[cos, sin], [-sin, cos]])


def masked_logits(x, mask, head):
    """``x_i (M ∘ W_Q R(i−j) W_Kᵀ) x_jᵀ``, one pair at a time."""
    x, mask, wq, wk = (np.asarray(a, np.float64) for a in (x, mask, head.wq, head.wk))
    n = x.shape[0]
    return np.array(
        [[x[i] @ (mask * (wq @ rotation(i - j) @ wk.T)) @ x[j] for j in range(n)] for i in range(n)]
    )


def test_logits_are_those_of_the_masked_weight_of_every_distance(key, x, head):
    mask = jax.random.bernoulli(key, 0.5, (5, 5)) * jax.random.normal(key, (5, 5), jnp.float64)
    q, k = expanded_queries(x, mask, head), expanded_keys(x, head.rope)
    assert q.shape == k.shape == (2, 9, 5 * 6)
    for s in range(2):
        np.testing.assert_allclose(q[s] @ k[s].T, masked_logits(x[s], mask, head), atol=1e-12)


def test_without_positions_they_are_those_of_the_fused_weight(key, x):
    """``k = d``: the fused matrix has full rank."""
    wq, wk = jax.random.normal(key, (2, 5, 5), jnp.float64)
    mask = jax.random.bernoulli(key, 0.5, (5, 5)).astype(jnp.float64)
    head = RotaryHead(wq, wk, None)
    q, k = expanded_queries(x, mask, head), expanded_keys(x, None)
    np.testing.assert_allclose(q @ k.mT, x @ (mask * (wq @ wk.T)) @ x.mT, atol=1e-12)
    expected = attention_matrix(x, mask * (wq @ wk.T)) - attention_matrix(x, wq @ wk.T)
    np.testing.assert_allclose(
        rotary_error(mask, x, head), 0.5 * (expected**2).sum((1, 2)), rtol=1e-8
    )


def test_the_error_is_that_of_the_attention_with_positions(key, x, head):
    mask = jax.random.bernoulli(key, 0.5, (5, 5)).astype(jnp.float64)
    for s, found in enumerate(rotary_error(mask, x, head)):
        rows = [causal_softmax(masked_logits(x[s], m, head)) for m in (mask, np.ones((5, 5)))]
        np.testing.assert_allclose(found, 0.5 * np.sum((rows[0] - rows[1]) ** 2), rtol=1e-8)
    np.testing.assert_allclose(rotary_error(jnp.ones((5, 5)), x, head), 0, atol=1e-20)


def causal_softmax(logits):
    weights = np.tril(np.exp(logits - logits.max()))
    return weights / weights.sum(axis=1, keepdims=True)


def test_the_typical_weight_is_the_mean_square_over_all_angles(head):
    """Frequencies in the ratio 1 : 2 : 3, so that one period has all their angles."""
    turned = head._replace(rope=2 * jnp.pi * jnp.arange(1, 4) / 16)
    a, b = frequency_matrices(turned)
    angles = np.arange(16)[:, None] * np.asarray(turned.rope)
    weights = np.einsum("sf,fde->sde", np.cos(angles), a)
    weights += np.einsum("sf,fde->sde", np.sin(angles), b)
    np.testing.assert_allclose(
        typical_weight(turned), np.sqrt(np.mean(weights**2, axis=0)), rtol=1e-10
    )


@pytest.mark.slow
def test_with_frequencies_zero_algorithm_1_is_that_without_positions(x, head):
    still = head._replace(rope=jnp.zeros(3))
    w = head.wq @ head.wk.T
    lam = algorithm1_grid(x, w)[0][2, 0]  # multiple 1 of the gradient's size
    ratios = jnp.array([0.2, 0.6])
    found = rotary_algorithm1(
        x,
        still,
        ratios,
        multiples=jnp.ones(1),
        decays=jnp.full(1, 0.03),
        steps=40,
        batch_size=2,
    )
    plain = algorithm1(x, w, lam=lam, learning_rate=0.03 / lam, sparsity=Sparsity(0.5), steps=40)
    for mask, drop in zip(found, (5, 15), strict=True):
        expected = keep_mask(plain.state.variable, Sparsity(drop / 25))
        assert (mask == expected).all()


@pytest.mark.slow
def test_of_several_penalties_the_one_with_the_least_error_is_taken(x, head):
    options = {"steps": 30, "batch_size": 2, "judged": 2}
    pairs = jnp.array([0.1, 10.0]), jnp.array([0.03, 0.1])
    both = rotary_algorithm1(
        x, head, jnp.array([0.5]), multiples=pairs[0], decays=pairs[1], **options
    )
    errors = []
    for i in range(2):
        alone = rotary_algorithm1(
            x,
            head,
            jnp.array([0.5]),
            multiples=pairs[0][i : i + 1],
            decays=pairs[1][i : i + 1],
            **options,
        )
        errors.append(rotary_error(alone[0].astype(x.dtype), x, head).mean())
    found = rotary_error(both[0].astype(x.dtype), x, head).mean()
    np.testing.assert_allclose(found, min(errors), rtol=1e-10)


@pytest.mark.slow
def test_descent_is_exact_in_its_counts_and_better_than_where_it_starts(key):
    """Frequencies zero and correlated features, where kept weights can take over."""
    keys = jax.random.split(key, 4)
    colour = 2 * jnp.arange(1, 13.0)[:, None] ** -2
    colour = colour * jnp.linalg.qr(jax.random.normal(keys[3], (12, 12)))[0].T
    x, fresh = (jax.random.normal(k, (16, 24, 12)) @ colour for k in keys[:2])
    wq, wk = 0.3 * jax.random.normal(keys[2], (2, 12, 6))
    head = RotaryHead(wq, wk, jnp.zeros(3))
    prune = jax.jit(rotary_descent, static_argnames=("sparsity", "steps", "batch_size"))
    start, _ = prune(x, head, Sparsity(0.5), steps=0, batch_size=4)
    factors, kept = prune(x, head, Sparsity(0.5), steps=150, batch_size=4)
    assert kept.sum() == 72
    assert ((factors != 0) == kept).all()
    np.testing.assert_allclose(start[start != 0], 1, rtol=1e-5)
    errors = [float(rotary_error(m, fresh, head).mean()) for m in (start, factors)]
    assert errors[1] < 0.5 * errors[0], errors
