"""Random heads: the same numbers for the same keys, of the covariance and logits asked for."""

import jax
import numpy as np
import pytest

from jaxprune.evaluation.synthetic import HeadKeys, RandomHead, random_head

KEYS = ("wq", "wk", "x", "heldout", "rotation")


def keys(*names):
    all_keys = dict(zip(KEYS, jax.random.split(jax.random.key(3), 5), strict=True))
    return HeadKeys(**{name: all_keys[name] for name in (*KEYS[:3], *names)})


def test_each_part_has_a_key_of_its_own():
    head = RandomHead(d=8, k=4, n=6, sequences=2)
    alone = random_head(keys(), head)
    both = random_head(keys("heldout"), RandomHead(d=8, k=4, n=6, sequences=2, heldout=3))
    for name in ("x", "wq", "wk"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(both, name))
    assert (alone.x_heldout.shape, both.x_heldout.shape) == ((0, 6, 8), (3, 6, 8))
    np.testing.assert_array_equal(alone.wq, jax.random.normal(keys().wq, (8, 4)))


@pytest.mark.parametrize("tokens", [1, 64, 65, 4096])
def test_numbers_are_those_of_a_draw_of_just_that_shape(tokens):
    problem = random_head(keys(), RandomHead(d=64, k=1, n=tokens, sequences=2))
    expected = jax.random.normal(keys().x, (2, tokens, 64))
    np.testing.assert_array_equal(problem.x, expected)


@pytest.mark.parametrize("exponent", [0.0, 2.0])
def test_logits_and_covariance_are_those_asked_for(exponent):
    head = RandomHead(d=16, k=4, n=500, sequences=1, heldout=8, exponent=exponent, logits_std=2.0)
    problem = random_head(keys("heldout", "rotation"), head)
    tokens = np.asarray(problem.x_heldout).reshape(-1, 16)
    logits = tokens[:2000] @ np.asarray(problem.w) @ tokens[2000:].T
    np.testing.assert_allclose(np.std(logits), 2.0, rtol=0.1)
    eigenvalues = np.linalg.eigvalsh(np.cov(tokens.T))[::-1]
    wanted = np.arange(1, 17.0) ** -exponent
    np.testing.assert_allclose(eigenvalues, 16 * wanted / wanted.sum(), rtol=0.15)
