"""experiments/quadratic.py: what the quadratic forms are, and that it runs."""

import jax
import numpy as np
import pandas as pd
import pytest


@pytest.fixture(scope="module")
def quadratic(script):
    return script("quadratic")


def test_small_errors_are_the_second_order_form(quadratic, key):
    """And the form is quadratic in the change of the weight."""
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (3, 9, 6))
    w, change = (0.3 * jax.random.normal(k, (6, 6)) for k in keys[1:])
    error, second, kronecker = quadratic.errors(x, w, w + 0.01 * change)
    np.testing.assert_allclose(error, second, rtol=0.05)
    doubled = quadratic.errors(x, w, w + 0.02 * change)
    np.testing.assert_allclose(doubled[1:], [4 * second, 4 * kronecker], rtol=1e-2)


@pytest.mark.slow
def test_a_small_run_has_a_row_for_every_method_ratio_and_seed(quadratic, tmp_path):
    flags = ["--ratios", "0.3", "0.5", "--d", "6", "--k", "3", "--n", "8", "--sequences", "3"]
    assert quadratic.main([*flags, "--seeds", "2", "--out", str(tmp_path / "run")]) == 0
    metrics = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert len(metrics) == 2 * 2 * 2
    assert (metrics[["error", "second", "kronecker"]] > 0).all(axis=None)
