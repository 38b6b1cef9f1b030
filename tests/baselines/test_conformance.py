"""What every baseline keeps to, through one suite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import Sparsity
from jaxprune.baselines import BASELINES, magnitude, sparsegpt
from jaxprune.baselines.registry import register

# Entries of a [24, 10] weight that compete, as slices; blocks of 128 inputs have all 24.
GROUPS = {
    "matrix": [np.s_[:, :]],
    "block": [np.s_[:, :]],
    "output": [np.s_[:, i] for i in range(10)],
    "input": [np.s_[i] for i in range(24)],
}


@pytest.fixture(params=list(BASELINES))
def name(request):
    return request.param


@pytest.fixture
def prune(name):
    return BASELINES[name].prune


@pytest.fixture
def groups(name):
    return GROUPS[BASELINES[name].group]


def draw(key, d_in=24, d_out=10, dtype=jnp.float32):
    keys = jax.random.split(key, 2)
    return (
        jax.random.normal(keys[0], (3, 20, d_in), dtype),
        jax.random.normal(keys[1], (d_in, d_out), dtype),
    )


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.999, 1.0])
def test_counts_are_exact_in_every_group(key, prune, groups, ratio):
    kept = np.asarray(prune(*draw(key), ratio).keep_mask)
    for group in groups:
        assert np.sum(~kept[group]) == int(kept[group].size * ratio)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "4:4"])
def test_n_of_m_keeps_n_of_every_m_inputs(key, prune, pattern):
    n, m = map(int, pattern.split(":"))
    kept = np.asarray(prune(*draw(key), pattern).keep_mask)
    assert (kept.reshape(24 // m, m, 10).sum(axis=1) == n).all()


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_dropped_weights_are_exact_zeros_and_kept_ones_are_not(key, prune, sparsity):
    pruned = prune(*draw(key), sparsity)
    assert ((pruned.weight == 0) == ~pruned.keep_mask).all()


def test_kept_weights_change_where_the_registry_says_so(key, name, prune):
    x, w = draw(key)
    pruned = prune(x, w, 0.5)
    kept = (pruned.weight == jnp.where(pruned.keep_mask, w, 0)).all()
    assert kept != BASELINES[name].updates


def test_moments_are_enough_and_are_means_over_sequences(key, name):
    x, w = draw(key)
    entry = BASELINES[name]
    if entry.moment is None:
        assert entry.prune_from is None
        return
    whole, parts = entry.moment(x), [entry.moment(x[i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(whole, sum(parts) / 3, rtol=1e-4, atol=1e-5)
    direct, by_moment = entry.prune(x, w, 0.5), entry.prune_from(whole, w, Sparsity(0.5))
    assert (direct.keep_mask == by_moment.keep_mask).all()
    np.testing.assert_allclose(direct.weight, by_moment.weight, rtol=1e-4, atol=1e-5)


def test_names_are_taken_once():
    with pytest.raises(ValueError, match="name wanda: there is such a baseline"):
        register(BASELINES["magnitude"]._replace(name="wanda"))
    with pytest.raises(ValueError, match="expected moment and prune_from"):
        register(BASELINES["wanda"]._replace(name="half", moment=None))
    assert "half" not in BASELINES


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.999, 1.0])
def test_sparsegpt_counts_are_exact_in_every_block_of_inputs(key, ratio):
    kept = np.asarray(sparsegpt(*draw(key), ratio, block_size=8).keep_mask)
    for start in range(0, 24, 8):
        assert np.sum(~kept[start : start + 8]) == int(80 * ratio)


@pytest.mark.parametrize("keeps_all", [0.0, "4:4"])
def test_nothing_to_drop_leaves_the_weight_alone(key, prune, keeps_all):
    x, w = draw(key)
    pruned = prune(x, w, keeps_all)
    assert pruned.keep_mask.all()
    assert (pruned.weight == w).all()


def test_everything_dropped_is_zero(key, prune):
    assert not prune(*draw(key), 1.0).weight.any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_the_type_of_the_weight_stays(key, x64, prune, groups, dtype):
    x, w = draw(key, dtype=dtype)
    pruned = prune(x, w, 0.5)
    assert pruned.weight.dtype == dtype
    assert pruned.keep_mask.dtype == bool
    for group in groups:
        assert np.sum(~np.asarray(pruned.keep_mask)[group]) == w[group].size // 2


def test_activations_may_have_another_type(key, prune):
    x, w = draw(key)
    assert prune(x.astype(jnp.bfloat16), w, 0.5).weight.dtype == jnp.float32


def test_of_ties_the_first_input_goes_first(name, prune):
    # Orthogonal inputs of equal norm: all scores are equal for every method.
    pruned = prune(jnp.eye(8), jnp.ones((8, 4)), 0.5)
    assert (pruned.keep_mask == (jnp.arange(8) >= 4)[:, None]).all()
    patterned = prune(jnp.eye(8), jnp.ones((8, 4)), "2:4")
    assert (patterned.keep_mask == (jnp.arange(8) % 4 >= 2)[:, None]).all()


def test_dead_inputs_are_dropped_first(key, name, prune):
    x, w = draw(key)
    dead = jnp.arange(24) % 3 == 0
    x = jnp.where(dead, 0, x)
    pruned = prune(x, w, 1 / 3)
    if name == "magnitude":  # sees no inputs
        assert (pruned.keep_mask == magnitude(w, 1 / 3).keep_mask).all()
    else:
        assert (pruned.keep_mask == ~dead[:, None]).all()
        assert not pruned.weight[dead].any()
        assert jnp.isfinite(pruned.weight).all()


def test_dead_activations_leave_finite_weights_and_exact_counts(key, prune, groups):
    x, w = draw(key)
    pruned = prune(jnp.zeros_like(x), w, 0.5)
    assert jnp.isfinite(pruned.weight).all()
    for group in groups:
        assert np.sum(~np.asarray(pruned.keep_mask)[group]) == w[group].size // 2


def test_leading_sequence_axes_are_sequences(key, prune):
    x, w = draw(key)
    flat, nested = prune(x, w, 0.5), prune(x[:, None], w, 0.5)
    assert (flat.keep_mask == nested.keep_mask).all()
    np.testing.assert_allclose(flat.weight, nested.weight, rtol=1e-5)


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_vmap_over_heads_equals_a_loop(key, prune, sparsity):
    x, w = jax.vmap(draw)(jax.random.split(key, 3))
    mapped = jax.jit(jax.vmap(lambda x, w: prune(x, w, sparsity)))(x, w)
    for i in range(3):
        one = prune(x[i], w[i], sparsity)
        assert (mapped.keep_mask[i] == one.keep_mask).all()
        np.testing.assert_allclose(mapped.weight[i], one.weight, rtol=1e-4, atol=1e-5)


def test_vmap_over_ratios_equals_a_loop(key, prune):
    x, w = draw(key)
    ratios = [0.0, 0.29, 0.5, 0.9, 1.0]
    mapped = jax.jit(jax.vmap(lambda r: prune(x, w, Sparsity(r))))(jnp.asarray(ratios))
    for ratio, kept in zip(ratios, mapped.keep_mask, strict=True):
        assert (kept == prune(x, w, ratio).keep_mask).all()


def test_a_second_call_compiles_nothing(key, prune, compiled):
    x, w = draw(key)
    for ratio in (0.5, 0.5):
        compiled.clear()
        prune(x, w, ratio)
        prune(x + 1, 2 * w, "2:4")
    assert not compiled


WRONG = [
    ({"sparsity": 1.5}, "sparsity 1.5"),
    ({"sparsity": float("nan")}, "sparsity nan"),
    ({"sparsity": "2:0"}, "sparsity 2:0"),
    ({"sparsity": "half"}, "sparsity 'half'"),
    ({"sparsity": "2:5"}, "groups of 5 do not divide the 24 inputs"),
    ({"w": jnp.ones(24)}, r"w of shape \(24,\)"),
    ({"w": jnp.ones((2, 24, 10))}, r"w of shape \(2, 24, 10\)"),
    ({"w": jnp.full((24, 10), jnp.nan)}, "w holds 240 non-finite"),
]
WRONG_INPUTS = [
    ({"x": jnp.ones((20, 23))}, r"x of shape \(20, 23\) and w of shape \(24, 10\)"),
    ({"x": jnp.ones(24)}, r"x of shape \(24,\)"),
    ({"x": jnp.ones((20, 24)).at[3, 4].set(jnp.nan)}, "x holds 1 non-finite"),
    ({"x": jnp.ones((20, 24)).at[3, 4].set(jnp.inf)}, "x holds 1 non-finite"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_input_is_named(key, unchecked, prune, change, message):
    x, w = draw(key)
    with pytest.raises(ValueError, match=message):
        prune(**{"x": x, "w": w, "sparsity": 0.5} | change)


@pytest.mark.parametrize(("change", "message"), WRONG_INPUTS)
def test_wrong_activations_are_named(key, unchecked, name, prune, change, message):
    if name == "magnitude":  # sees no inputs
        return
    x, w = draw(key)
    with pytest.raises(ValueError, match=message):
        prune(**{"x": x, "w": w, "sparsity": 0.5} | change)


def relative_output_error(x, w, pruned):
    return jnp.sum((x @ pruned.weight - x @ w) ** 2) / jnp.sum((x @ w) ** 2)


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_on_correlated_inputs_knowing_more_of_them_helps(key, sparsity):
    """Output error: SparseGPT below Wanda below magnitude."""
    keys = jax.random.split(key, 3)
    scales = jnp.arange(1, 33.0) ** -1
    rotation, _ = jnp.linalg.qr(jax.random.normal(keys[0], (32, 32)))
    x = jax.random.normal(keys[1], (4, 64, 32)) * scales @ (0.7 * rotation + jnp.eye(32))
    w = jax.random.normal(keys[2], (32, 16))
    by_magnitude, by_wanda, by_sparsegpt = (
        relative_output_error(x, w, prune(x, w, sparsity))
        for prune in (BASELINES[name].prune for name in ("magnitude", "wanda", "sparsegpt"))
    )
    assert by_sparsegpt < 0.6 * by_wanda
    assert by_wanda < 0.9 * by_magnitude
