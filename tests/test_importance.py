"""Importance across columns, on an objective whose curvature is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.importance import column_sensitivity, importance


@pytest.fixture
def problem(key, x64):
    """``½ Σ_ic (x_i² w_ic)² a_c``, mean over sequences, has a diagonal Hessian."""
    w = jax.random.normal(key, (6, 4), jnp.float64)
    x = jax.random.normal(jax.random.fold_in(key, 1), (8, 6), jnp.float64)
    felt = jnp.array([1.0, 4.0, 0.0, 0.25])

    def objective(weights, batch):
        errors = 0.5 * jnp.sum(
            (batch["x"][:, :, None] * (weights["w"] - w - 1)) ** 2 * felt, (1, 2)
        )
        return jnp.mean(errors)

    return objective, w, x, felt


def test_sensitivity_is_the_diagonal_curvature_against_the_weights(problem):
    objective, w, x, felt = problem
    found = column_sensitivity(objective, {"w": w}, {"x": x}, batch_size=8)["w"]
    expected = felt * jnp.sum(w**2 * jnp.mean(x**2, axis=0)[:, None], axis=0)
    # Signs square to one, so that a diagonal Hessian is met exactly, far from its minimum too.
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-9, atol=1e-12)


def test_batches_go_round_the_data(problem):
    objective, w, x, _ = problem
    whole = column_sensitivity(objective, {"w": w}, {"x": x}, batch_size=8)["w"]
    parts = column_sensitivity(objective, {"w": w}, {"x": x}, batch_size=2)["w"]
    np.testing.assert_allclose(parts, whole, rtol=1e-9)


def test_importance_weighs_shares_of_a_column(problem):
    _, w, x, felt = problem
    norms = jnp.linalg.norm(x, axis=0)
    found = importance(w, norms, felt)
    shares = jnp.abs(w) * norms[:, None] / jnp.linalg.norm(w * norms[:, None], axis=0)
    np.testing.assert_allclose(
        found.score(w)[:, [0, 1, 3]], shares[:, [0, 1, 3]] * felt[jnp.array([0, 1, 3])] ** 0.25
    )
    # A column nobody feels goes first, but is not all equal; one of zeros divides by nothing.
    assert 0 < found.score(w)[:, 2].max() < 0.3 * found.score(w)[:, 3].max()
    assert jnp.isfinite(importance(w.at[:, 1].set(0), norms, felt).score(w)).all()
