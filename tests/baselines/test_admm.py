"""ADMM as a baseline: below SparseGPT, and what its Hessian form is."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.baselines import sparsegpt
from jaxprune.baselines.admm import admm, admm_from_hessian
from jaxprune.gauss_newton import factorise
from jaxprune.sparsity import Sparsity


def draw(seed=0, d_in=40, d_out=12, dead=()):
    """Correlated inputs, of which some may be dead."""
    random = np.random.default_rng(seed)
    mixing = np.eye(d_in) + 0.5 * random.normal(size=(d_in, d_in)) / np.sqrt(d_in)
    x = random.normal(size=(3, 50, d_in)) @ mixing * np.exp(random.normal(size=d_in))
    x[..., list(dead)] = 0
    return (jnp.asarray(a, jnp.float32) for a in (x, random.normal(size=(d_in, d_out))))


def error(x, w, pruned):
    return float(jnp.sum((x @ (pruned.weight - w)) ** 2))


@pytest.mark.parametrize("sparsity", [0.5, 0.8, "2:4"])
def test_output_error_is_below_that_of_sparsegpt(sparsity):
    x, w = draw()
    assert error(x, w, admm(x, w, sparsity)) < 0.9 * error(x, w, sparsegpt(x, w, sparsity))


def test_kept_weights_are_least_squares():
    x, w = draw()
    found = admm(x, w, 0.6, damping=0.0, refinements=60)
    flat, target = np.asarray(x, np.float64).reshape(-1, 40), np.asarray(w, np.float64)
    for column in range(12):
        kept = np.asarray(found.keep_mask[:, column])
        best = np.linalg.lstsq(flat[:, kept], flat @ target[:, column], rcond=None)[0]
        np.testing.assert_allclose(found.weight[kept, column], best, rtol=2e-3, atol=2e-3)


def test_moments_are_enough():
    x, w = draw(dead=[3])
    flat = x.reshape(-1, 40)
    once = admm(x, w, 0.5)
    again = admm_from_hessian(factorise(flat.T @ flat), w, Sparsity(0.5))
    assert (once.keep_mask == again.keep_mask).mean() > 0.99
    assert not once.weight[3].any()
    np.testing.assert_allclose(once.damping, 0.01)
