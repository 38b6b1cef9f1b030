"""The worked example of CONTRIBUTING.md is a baseline like the others."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import Sparsity

REPOSITORY = Path(__file__).parent.parent
PAGE = (REPOSITORY / "CONTRIBUTING.md").read_text()
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def prune():
    names = {}
    exec(compile(EXAMPLE, "CONTRIBUTING.md", "exec"), names)
    return names["relative_importance"]


def test_it_is_short():
    assert len(EXAMPLE.splitlines()) < 40


def test_it_keeps_the_highest_shares_exactly(prune, key):
    keys = jax.random.split(key)
    x, w = jax.random.normal(keys[0], (3, 20, 8)), jax.random.normal(keys[1], (8, 6))
    size, norms = np.abs(np.asarray(w, float)), np.linalg.norm(np.asarray(x, float), axis=1)
    scores = size / size.sum(0) + size / size.sum(1, keepdims=True)
    scores *= np.sqrt(np.mean(norms**2, axis=0))[:, None] ** 0.5
    kept = scores >= np.sort(scores.ravel())[24]
    np.testing.assert_array_equal(prune(x, w, 0.5).keep_mask, kept)
    assert (prune(x, w, "2:4").keep_mask.reshape(2, 4, 6).sum(axis=1) == 2).all()


def test_it_maps_over_heads_and_ratios(prune, key):
    x, w = jax.random.normal(key, (20, 8)), jax.random.normal(key, (3, 8, 6))
    ratios = jnp.array([0.25, 0.5, 0.75])
    masks = jax.vmap(lambda w, r: prune(x, w, Sparsity(r)).keep_mask)(w, ratios)
    np.testing.assert_array_equal(masks.sum(axis=(1, 2)), [36, 24, 12])


def test_every_file_on_the_map_exists():
    table = PAGE.partition("| to find")[2].partition("`tests/`")[0]
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", table):
        assert (REPOSITORY / "jaxprune" / name).exists(), name


def test_every_module_is_on_the_map():
    left_out = {"__init__", "errors"}
    for path in (REPOSITORY / "jaxprune").glob("*.py"):
        assert path.stem in left_out or f"`{path.name}`" in PAGE, path.name
