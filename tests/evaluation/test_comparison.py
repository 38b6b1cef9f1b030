"""Every method on the same heads: what is judged, what is counted, what is chosen."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import Sparsity, baselines, prune_attention, relative_error
from jaxprune.evaluation.comparison import (
    METHODS,
    ON_PROJECTIONS,
    FusedProblem,
    _linear,
    compare,
    compare_algorithm1,
)
from jaxprune.methods.fused import _round, _solve, algorithm1, closed_form
from jaxprune.sparsity import keep_mask

RATIOS = jnp.array([0.25, 0.5])


@pytest.fixture
def problems(key):
    """Three heads with activations of their own."""
    keys = jax.random.split(key, 4)
    return FusedProblem(
        x=jax.random.normal(keys[0], (3, 2, 9, 8)),
        x_heldout=jax.random.normal(keys[1], (3, 4, 7, 8)),
        wq=0.5 * jax.random.normal(keys[2], (3, 8, 6)),
        wk=0.5 * jax.random.normal(keys[3], (3, 8, 6)),
    )


def pruned_by_hand(method, x, wq, wk, ratio):
    """Effective fused weight and keep masks of one head."""
    w = wq @ wk.T
    if method in ON_PROJECTIONS:
        q, k = (baselines.BASELINES[method].prune(x, p, Sparsity(ratio)) for p in (wq, wk))
        return q.weight @ k.weight.T, (q.keep_mask, k.keep_mask)
    if method == "fused_magnitude":
        pruned = baselines.magnitude(w, ratio)
    else:
        options = {
            "ranking": {"preset": "descent", "start": "dense", "steps": 0},
            "gauss_newton": {"preset": "gauss_newton"},
            "descent": {"preset": "descent", "start": "dense"},
        }
        pruned = prune_attention(x, w, ratio, **options[method])
    return pruned.weight, (pruned.keep_mask,)


# The presets compile longest, and have tests of their own.
ONE_BY_ONE = [
    pytest.param(m, marks=pytest.mark.slow if m in ("gauss_newton", "descent", "admm") else ())
    for m in METHODS
]


@pytest.mark.parametrize("method", ONE_BY_ONE)
def test_outcomes_are_those_of_the_method_head_by_head(problems, method):
    outcome = compare(problems, RATIOS, method=method)
    assert outcome.calibration_error.shape == outcome.heldout_error.shape == (3, 2)
    i, j = 2, 1
    x, fresh, wq, wk = (a[i] for a in (problems.x, problems.x_heldout, problems.wq, problems.wk))
    weight, masks = pruned_by_hand(method, x, wq, wk, float(RATIOS[j]))
    for found, expected in zip(outcome.keep_masks, masks, strict=True):
        assert (found[i, j] == expected).all()
    w = wq @ wk.T
    np.testing.assert_allclose(
        outcome.calibration_error[i, j], relative_error(x, w, weight), rtol=1e-3
    )
    np.testing.assert_allclose(
        outcome.heldout_error[i, j], relative_error(fresh, w, weight), rtol=1e-3
    )


@pytest.mark.parametrize("method", METHODS)
def test_stored_weights_count_both_projections_or_the_fused_matrix(problems, method):
    stored = compare(problems, RATIOS, method=method).stored_weights
    expected = [72, 48] if method in ON_PROJECTIONS else [48, 32]
    assert stored.tolist() == [expected] * 3


def test_activations_may_be_shared_by_all_heads(problems):
    shared = replace(problems, x=problems.x[0], x_heldout=problems.x_heldout[0])
    repeated = replace(
        problems,
        x=jnp.stack([problems.x[0]] * 3),
        x_heldout=jnp.stack([problems.x_heldout[0]] * 3),
    )
    for method in ("wanda", "fused_magnitude"):
        one, other = (compare(p, RATIOS, method=method) for p in (shared, repeated))
        np.testing.assert_allclose(one.heldout_error, other.heldout_error, rtol=1e-5)
        assert all((a == b).all() for a, b in zip(one.keep_masks, other.keep_masks, strict=True))


def test_algorithm_1_takes_the_step_size_of_least_calibration_error(problems):
    lams, rates = jnp.array([0.01, 0.05]), jnp.array([[0.05, 0.5], [0.8, 0.3]])
    found = compare_algorithm1(problems, RATIOS, lams, rates, steps=15)

    @jax.jit
    def learn(x, w, lam, rate):
        options = {"sparsity": Sparsity(0.5), "steps": 15}
        return algorithm1(x, w, lam=lam, learning_rate=rate, **options).state.variable

    for lam, of_lam, (outcome, chosen) in zip(lams, rates, found, strict=True):
        assert outcome.stored_weights.tolist() == [[48, 32]] * 3
        for i in range(3):
            errors = np.zeros((2, 2))
            for s in range(2):
                mask = learn(problems.x[i], problems.w[i], lam, of_lam[s])
                for j, ratio in enumerate(RATIOS.tolist()):
                    pruned = jnp.where(keep_mask(mask, Sparsity(ratio)), problems.w[i], 0)
                    errors[s, j] = relative_error(problems.x[i], problems.w[i], pruned)
            best = errors.argmin(axis=0)
            np.testing.assert_allclose(outcome.calibration_error[i], errors.min(axis=0), rtol=1e-3)
            assert (chosen[i] == of_lam[best]).all()
            kept = outcome.keep_masks[0][i]
            fresh = [
                relative_error(problems.x_heldout[i], problems.w[i], jnp.where(m, problems.w[i], 0))
                for m in kept
            ]
            np.testing.assert_allclose(outcome.heldout_error[i], fresh, rtol=1e-3)


def test_a_step_size_that_diverges_is_never_chosen(problems):
    lam = jnp.array([0.01])
    (both,) = compare_algorithm1(problems, RATIOS, lam, jnp.array([[1e30, 0.1]]), steps=15)
    (alone,) = compare_algorithm1(problems, RATIOS, lam, jnp.array([[0.1]]), steps=15)
    assert jnp.isfinite(both[0].calibration_error).all()
    assert (both[0].calibration_error <= alone[0].calibration_error * 1.001).all()
    assert (both[1] == jnp.float32(0.1)).all()


@pytest.mark.parametrize("method", ["wanda", "ranking", "gauss_newton"])
def test_a_second_call_compiles_nothing_and_other_lengths_little(problems, compiled, method):
    other, ratios = replace(problems, x=problems.x + 1, wq=2 * problems.wq), RATIOS / 2
    compare(problems, RATIOS, method=method)
    compiled.clear()
    compare(other, ratios, method=method)
    assert not compiled
    before = _solve._cache_size(), _linear._cache_size(), _round._cache_size()
    longer = replace(problems, x=jnp.concatenate([problems.x] * 2, axis=2))
    compare(longer, RATIOS, method=method)
    assert before == (_solve._cache_size(), _linear._cache_size(), _round._cache_size())


def test_the_closed_form_is_that_of_the_preset_with_its_damping_given_or_not(problems):
    x, w = problems.x[0], problems.w[0]
    for lam in (None, 0.1):
        found = closed_form(x, w, Sparsity(0.5), lam=lam)
        preset = prune_attention(x, w, 0.5, preset="gauss_newton", lam=lam)
        assert (found.keep_mask == preset.keep_mask).all()
        np.testing.assert_allclose(found.weight, preset.weight, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found.damping, preset.lam)
        np.testing.assert_allclose(found.errors, preset.trace.validation_error, rtol=1e-3)
