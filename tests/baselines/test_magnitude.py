import jax.numpy as jnp

from jaxprune.baselines import magnitude


def test_the_smallest_absolute_values_go():
    w = jnp.array([[1.0, -5.0], [-0.5, 3.0]])
    assert magnitude(w, 0.5).weight.tolist() == [[0.0, -5.0], [0.0, 3.0]]


def test_the_comparison_group_is_an_argument():
    w = jnp.array([[1.0, -5.0], [-0.5, 3.0]])
    assert magnitude(w, 0.5, group="output").weight.tolist() == [[1.0, -5.0], [0.0, 0.0]]
    assert magnitude(w, 0.5, group="input").weight.tolist() == [[0.0, -5.0], [0.0, 3.0]]
