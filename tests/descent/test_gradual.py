"""What validates a descent: which sequences, and how their errors become samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.descent.gradual import refit_descent, split_sequences, validation_samples
from jaxprune.descent.loop import descend


@pytest.mark.parametrize(("count", "held"), [(1, [0]), (2, [1]), (7, [6]), (24, [7, 15, 23])])
def test_every_eighth_sequence_validates_and_fits_nothing(count, held):
    fit, validation = split_sequences({"x": jnp.arange(count)})
    assert validation["x"].tolist() == held
    assert count == 1 or sorted([*fit["x"].tolist(), *held]) == list(range(count))


@settings(deadline=None)
@given(b=st.integers(1, 12), heads=st.integers(1, 3), n=st.integers(1, 20), seed=st.integers(0, 9))
def test_samples_are_several_and_have_the_mean_of_the_sequences(b, heads, n, seed):
    errors = np.random.default_rng(seed).exponential(size=(b, heads, n)).astype(np.float32)
    samples = validation_samples(jnp.asarray(errors))
    assert len(samples) >= (b if b > 2 else min(8, b * n))
    np.testing.assert_allclose(samples.mean(), errors.sum((1, 2)).mean(), rtol=1e-5)


@pytest.mark.parametrize("count", [3, 8])
def test_several_sequences_are_the_samples(count):
    errors = jnp.asarray(np.random.default_rng(0).normal(size=(count, 2, 5)), jnp.float32)
    np.testing.assert_array_equal(validation_samples(errors), errors.sum((1, 2)))


def test_a_gain_shows_on_two_sequences_of_which_one_gains_more():
    """Three standard errors of gains 1 and 4 are more than their mean; of eight samples not."""
    weight = jnp.ones((1, 1))

    def sample_errors(w, batch):
        return validation_samples(batch["scale"] * w[0] ** 2)

    scale = jnp.asarray([[1.0], [4.0]]) * jnp.ones((2, 40))
    descent = refit_descent(
        sample_errors, weight, weight > 0, steps=20, learning_rate=0.1, batch_size=2
    )
    data = {"scale": scale}
    found = descend(descent, weight, data, key=jax.random.key(0), validation=data)
    assert int(found.state.best.step) == 20
