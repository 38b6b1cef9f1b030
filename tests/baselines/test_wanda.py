import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jaxprune.baselines import wanda
from jaxprune.importance import feature_norms

PROBLEMS = [(0, 1, 16, 8), (1, 5, 16, 8), (2, 3, 40, 24), (3, 8, 12, 33)]


def draw(seed, sequences, d_in, d_out):
    random = np.random.default_rng(seed)
    scales = random.uniform(0.1, 3, d_in)
    x = random.normal(size=(sequences, 11, d_in)) * scales
    return x.astype(np.float32), random.normal(size=(d_in, d_out)).astype(np.float32)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.77])
def test_the_mask_is_that_of_the_original_protocol(problem, ratio):
    x, w = draw(*problem)
    expected = reference.wanda(x, w, ratio=ratio)
    assert (wanda(jnp.asarray(x), jnp.asarray(w), ratio).keep_mask == expected).all()


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("n_of_m", [(2, 4), (1, 4), (1, 2)])
def test_patterns_are_those_of_the_original_protocol(problem, n_of_m):
    x, w = draw(*problem)
    expected = reference.wanda(x, w, n_of_m=n_of_m)
    found = wanda(jnp.asarray(x), jnp.asarray(w), "{}:{}".format(*n_of_m))
    assert (found.keep_mask == expected).all()


def test_the_comparison_group_is_an_argument():
    x, w = map(jnp.asarray, draw(0, 2, 16, 8))
    counts = wanda(x, w, 0.5, group="input").keep_mask.sum(axis=1)
    assert (counts == 4).all()
    whole = wanda(x, w, 0.5, group="matrix").keep_mask
    assert whole.sum() == 64
    assert set(whole.sum(axis=0).tolist()) != {8}


def test_norms_are_of_the_mean_over_sequences_of_sums_over_tokens():
    x = jnp.array([[[3.0, 0.0], [4.0, 1.0]], [[0.0, 0.0], [5.0, 1.0]]])
    np.testing.assert_allclose(feature_norms(x), np.sqrt([25.0, 1.0]), rtol=1e-6)
    left_out = feature_norms(x, jnp.array([[1.0, 0.0], [1.0, 1.0]]))
    np.testing.assert_allclose(left_out, np.sqrt([17.0, 0.5]), rtol=1e-6)
