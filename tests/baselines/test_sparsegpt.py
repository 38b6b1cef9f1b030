import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jaxprune.baselines import sparsegpt
from jaxprune.baselines.sparsegpt import hessian


def draw(seed=0, d_in=40, d_out=12, dead=()):
    """Correlated inputs, of which some may be dead."""
    random = np.random.default_rng(seed)
    mixing = np.eye(d_in) + 0.5 * random.normal(size=(d_in, d_in)) / np.sqrt(d_in)
    x = random.normal(size=(3, 50, d_in)) @ mixing
    x[..., list(dead)] = 0
    return x.astype(np.float32), random.normal(size=(d_in, d_out)).astype(np.float32)


def assert_close_to_reference(x, w, sparsity, block, **expected):
    found = sparsegpt(jnp.asarray(x), jnp.asarray(w), sparsity, block_size=block)
    weight = reference.sparsegpt(x, w, block=block, **expected)
    assert ((found.weight == 0) == (weight == 0)).all()
    difference = np.abs(np.asarray(found.weight) - weight)
    assert (difference <= 1e-4 * np.abs(weight).max()).all()
    assert np.linalg.norm(difference) <= 1e-4 * np.linalg.norm(weight)


@pytest.mark.parametrize("block", [128, 40, 16, 7, 1])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
def test_weights_are_those_of_the_original_protocol(block, ratio):
    x, w = draw()
    assert_close_to_reference(x, w, ratio, block, ratio=ratio)


@pytest.mark.parametrize(
    ("block", "n_of_m"), [(128, (2, 4)), (8, (2, 4)), (16, (4, 8)), (4, (1, 2))]
)
def test_patterns_are_those_of_the_original_protocol(block, n_of_m):
    x, w = draw(1)
    assert_close_to_reference(x, w, "{}:{}".format(*n_of_m), block, n_of_m=n_of_m)


@pytest.mark.parametrize(("block", "used"), [(128, 39), (16, 15), (2, 3)])
def test_blocks_are_whole_groups_of_a_pattern(block, used):
    x, w = draw(3, d_in=39)
    found = sparsegpt(jnp.asarray(x), jnp.asarray(w), "2:3", block_size=block)
    groups = np.asarray(found.keep_mask).reshape(13, 3, -1)
    assert (groups.sum(axis=1) == 2).all()
    same = sparsegpt(jnp.asarray(x), jnp.asarray(w), "2:3", block_size=used)
    np.testing.assert_array_equal(found.weight, same.weight)


@pytest.mark.parametrize("block", [40, 16])
def test_dead_inputs_are_treated_as_in_the_original(block):
    x, w = draw(2, dead=(0, 5, 17, 39))
    assert_close_to_reference(x, w, 0.5, block, ratio=0.5)


def test_float64_agrees_to_rounding(x64):
    x, w = (a.astype(np.float64) for a in draw(3))
    found = sparsegpt(jnp.asarray(x), jnp.asarray(w), 0.5, block_size=16)
    expected = reference.sparsegpt(x, w, ratio=0.5, block=16)
    np.testing.assert_allclose(found.weight, expected, rtol=1e-9, atol=1e-12)


def test_hessian_is_a_mean_over_sequences():
    x, _ = draw()
    expected = np.mean([2 * s.T @ s for s in x.astype(np.float64)], axis=0)
    np.testing.assert_allclose(hessian(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-3)


def test_damping_asked_for_is_damping_used():
    x, w = map(jnp.asarray, draw())
    pruned = sparsegpt(x, w, 0.5, damping=0.03)
    np.testing.assert_allclose(pruned.damping, 0.03)
    assert pruned.damping_raised == 0
    other = sparsegpt(x, w, 0.5, damping=10.0)
    assert not np.allclose(pruned.weight, other.weight)


def test_damping_is_raised_where_the_hessian_is_singular_and_the_result_says_so():
    x, w = jnp.ones((2, 8)), jnp.arange(1.0, 17).reshape(8, 2)
    pruned = sparsegpt(x, w, 0.5, damping=0.0)
    assert pruned.damping_raised == 1
    np.testing.assert_allclose(pruned.damping, 0.01)
    assert jnp.isfinite(pruned.weight).all()
    asked = sparsegpt(x, w, 0.5, damping=0.01)
    assert (pruned.weight == asked.weight).all()


def test_a_hopeless_hessian_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="x: its Hessian is not positive definite"):
        sparsegpt(jnp.full((4, 8), 1e30), jnp.ones((8, 2)), 0.5)


def test_a_hopeless_hessian_is_nan_under_tracing():
    traced = jax.jit(lambda x: sparsegpt(x, jnp.ones((8, 2)), 0.5))(jnp.full((4, 8), 1e30))
    assert jnp.isnan(traced.weight).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "block_size 0"),
        ({"damping": -0.1}, "damping -0.1"),
        ({"damping": float("nan")}, "damping nan"),
    ],
)
def test_wrong_settings_are_named(change, message):
    x, w = map(jnp.asarray, draw())
    with pytest.raises(ValueError, match=message):
        sparsegpt(x, w, **{"sparsity": 0.5} | change)
