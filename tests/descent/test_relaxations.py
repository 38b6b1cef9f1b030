"""Every relaxation through one suite, then what is particular to each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import Sparsity
from jaxprune.descent.relaxations import (
    box,
    cubic_sparsity,
    fixed,
    gradual,
    none,
    sigmoid,
    straight_through,
)

STEPS = 10
SPARSITY = Sparsity(0.5)


def magnitudes(weights):
    return jax.tree.map(jnp.abs, weights)


def draw(key):
    """Weights as a pytree of two matrices."""
    keys = jax.random.split(key, 2)
    return {
        "q": jax.random.normal(keys[0], (6, 8)),
        "k": [jax.random.normal(keys[1], (4, 5))],
    }


def some_masks(weights):
    """Half of every matrix, not by magnitude: every other entry."""
    return jax.tree.map(lambda w: (jnp.arange(w.size) % 2 == 1).reshape(w.shape), weights)


RELAXATIONS = {
    "none": lambda weights: none(),
    "box": lambda weights: box(),
    "sigmoid": lambda weights: sigmoid(optax.linear_schedule(1.0, 0.01, STEPS)),
    "straight_through": lambda weights: straight_through(SPARSITY, rank=magnitudes),
    "gradual": lambda weights: gradual(SPARSITY, magnitudes, schedule=cubic_sparsity(STEPS)),
    "fixed": lambda weights: fixed(some_masks(weights)),
}


@pytest.fixture(params=list(RELAXATIONS))
def name(request):
    return request.param


def moved(relaxation, weights, key):
    """A variable somewhere off its start, as after an update."""
    variable = relaxation.init(weights)
    leaves, tree = jax.tree.flatten(variable)
    keys = jax.random.split(key, len(leaves))
    noisy = [v + 0.7 * jax.random.normal(k, v.shape) for v, k in zip(leaves, keys, strict=True)]
    return relaxation.project(jax.tree.unflatten(tree, noisy))


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


def dropped(keep_masks):
    return [int((~m).sum()) for m in jax.tree.leaves(keep_masks)]


def test_a_variable_has_the_structure_of_the_weights(key, name):
    weights = draw(key)
    assert shapes(RELAXATIONS[name](weights).init(weights)) == shapes(weights)


@pytest.mark.parametrize("step", [0, 3, STEPS, 5 * STEPS])
def test_effective_weights_at_every_step_are_finite_and_like_the_weights(key, name, step):
    weights = draw(key)
    relaxation = RELAXATIONS[name](weights)
    variable = moved(relaxation, weights, key)
    effective = jax.jit(relaxation.apply)(variable, weights, jnp.int32(step))
    assert shapes(effective) == shapes(weights)
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(effective))


@pytest.mark.parametrize("sparsity", [Sparsity(0.0), Sparsity(0.3), Sparsity(1.0)])
def test_finish_has_exact_counts_and_exact_zeros(key, name, sparsity):
    weights = draw(key)
    relaxation = RELAXATIONS[name](weights)
    rounded, kept = relaxation.finish(moved(relaxation, weights, key), weights, sparsity)
    sizes = [w.size for w in jax.tree.leaves(weights)]
    expected = [s // 2 if name == "fixed" else sparsity.drop_count(s) for s in sizes]
    assert dropped(kept) == expected
    for w, mask in zip(jax.tree.leaves(rounded), jax.tree.leaves(kept), strict=True):
        assert ((w == 0) == ~mask).all()


def test_finish_keeps_patterns(key, name):
    weights = {"w": draw(key)["q"][:4]}
    relaxation = RELAXATIONS[name](weights)
    _, kept = relaxation.finish(moved(relaxation, weights, key), weights, Sparsity.parse("1:4"))
    if name == "fixed":
        assert (kept["w"] == some_masks(weights)["w"]).all()
    else:
        assert (kept["w"].sum(axis=0) == 1).all()


def test_only_learned_weights_differ_from_the_dense_ones(key, name):
    weights = draw(key)
    relaxation = RELAXATIONS[name](weights)
    rounded, kept = relaxation.finish(moved(relaxation, weights, key), weights, SPARSITY)
    unchanged = [
        bool((r == jnp.where(m, w, 0)).all())
        for r, m, w in zip(*map(jax.tree.leaves, (rounded, kept, weights)), strict=True)
    ]
    assert unchanged == [name not in ("gradual", "fixed")] * 2


def test_vmap_over_heads_equals_a_loop(key, name):
    heads = jax.vmap(draw)(jax.random.split(key, 3))

    def effective_and_rounded(weights):
        relaxation = RELAXATIONS[name](weights)
        variable = relaxation.init(weights)
        return relaxation.apply(variable, weights, jnp.int32(4)), relaxation.finish(
            variable, weights, SPARSITY
        )

    mapped = jax.vmap(effective_and_rounded)(heads)
    for i in range(3):
        one = effective_and_rounded(jax.tree.map(lambda a, i=i: a[i], heads))
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6)


def test_free_and_box_masks_start_at_the_dense_weights(key):
    weights = draw(key)
    for relaxation in (none(), box()):
        effective = relaxation.apply(relaxation.init(weights), weights, 0)
        assert all(
            (a == b).all() for a, b in zip(*map(jax.tree.leaves, (effective, weights)), strict=True)
        )


def test_box_clips_to_the_unit_interval_and_none_does_not():
    mask = {"w": jnp.array([[-0.5, 0.25], [1.0, 1.5]])}
    assert box().project(mask)["w"].tolist() == [[0.0, 0.25], [1.0, 1.0]]
    assert (none().project(mask)["w"] == mask["w"]).all()


def test_a_sigmoid_hardens_as_its_temperature_falls():
    weights = jnp.ones((2, 3))
    variable = jnp.array([[-1.5, -0.2, 0.01], [0.3, 2.0, -0.03]])
    relaxation = sigmoid(optax.exponential_decay(1.0, 1, 0.1))
    masks = [relaxation.apply(variable, weights, jnp.int32(step)) for step in (0, 1, 2, 6)]
    np.testing.assert_allclose(masks[0], 1 / (1 + np.exp(-variable)), rtol=1e-6)
    softness = [float(jnp.sum(m * (1 - m))) for m in masks]
    assert softness == sorted(softness, reverse=True)
    np.testing.assert_allclose(masks[-1], variable > 0, atol=1e-6)


def test_a_sigmoid_mask_starts_where_it_is_told():
    relaxation = sigmoid(2.0, start=4.0)
    effective = relaxation.apply(relaxation.init(jnp.ones((2, 2))), jnp.ones((2, 2)), jnp.int32(0))
    np.testing.assert_allclose(effective, 1 / (1 + np.exp(-2.0)), rtol=1e-6)


def test_straight_through_is_hard_forward_and_the_identity_backward(key):
    weights, gradient = jax.random.normal(key, (2, 6, 8))
    relaxation = straight_through(SPARSITY)
    scores = jax.random.normal(jax.random.fold_in(key, 1), (6, 8))
    effective, pull_back = jax.vjp(lambda v: relaxation.apply(v, weights, jnp.int32(0)), scores)
    kept = scores > jnp.sort(scores.ravel())[23]
    assert (effective == jnp.where(kept, weights, 0)).all()
    np.testing.assert_allclose(pull_back(gradient)[0], weights * gradient, rtol=1e-6)


def test_straight_through_stays_hard_for_huge_scores():
    scores = jnp.array([[1e9, -1e9], [3e9, 5.0]])
    effective = straight_through(SPARSITY).apply(scores, jnp.ones((2, 2)), jnp.int32(0))
    assert effective.tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_straight_through_starts_at_its_ranking_in_unit_mean(key):
    weights = draw(key)
    start = straight_through(SPARSITY, rank=magnitudes).init(weights)
    for scores, w in zip(jax.tree.leaves(start), jax.tree.leaves(weights), strict=True):
        np.testing.assert_allclose(jnp.mean(scores), 1, rtol=1e-6)
        np.testing.assert_allclose(scores / scores[0, 0], jnp.abs(w / w[0, 0]), rtol=1e-5)
    assert not straight_through(SPARSITY, rank=magnitudes).init(jnp.zeros((2, 2))).any()


@pytest.mark.parametrize("make", [straight_through, gradual])
def test_a_schedule_leads_from_dense_to_the_whole_sparsity(key, make):
    weights = draw(key)["q"]
    relaxation = make(SPARSITY, rank=jnp.abs, schedule=cubic_sparsity(STEPS, until=1.0))
    variable = relaxation.init(weights)
    effective = jax.vmap(lambda t: relaxation.apply(variable, weights, t))(jnp.arange(STEPS + 2))
    zeros = (effective == 0).sum(axis=(1, 2)).tolist()
    fractions = 1 - (1 - np.minimum(np.arange(STEPS + 2) / STEPS, 1)) ** 3
    assert zeros == np.floor(24 * fractions + 1e-3).astype(int).tolist()
    assert (zeros[0], zeros[-1]) == (0, 24)


def test_dropped_weights_of_gradual_get_no_gradient_and_kept_ones_all_of_it(key):
    weights, gradient = jax.random.normal(key, (2, 6, 8))
    relaxation = gradual(SPARSITY, jnp.abs, schedule=cubic_sparsity(STEPS))
    kept = relaxation.finish(weights, weights, SPARSITY)[1]
    _, pull_back = jax.vjp(lambda v: relaxation.apply(v, weights, STEPS), weights)
    assert (pull_back(gradient)[0] == jnp.where(kept, gradient, 0)).all()


def test_gradual_ranks_the_current_weights_not_the_dense_ones():
    dense, current = jnp.array([[4.0, 3.0, 2.0, 1.0]]), jnp.array([[0.5, 0.1, 2.0, 1.0]])
    relaxation = gradual(SPARSITY, jnp.abs, schedule=cubic_sparsity(STEPS))
    assert relaxation.apply(current, dense, STEPS).tolist() == [[0.0, 0.0, 2.0, 1.0]]
    assert relaxation.finish(current, dense, SPARSITY)[0].tolist() == [[0.0, 0.0, 2.0, 1.0]]


def test_fixed_masks_stay_and_their_weights_learn():
    kept = jnp.array([[True, False], [False, True]])
    relaxation = fixed(kept)
    variable = jnp.array([[1.0, 20.0], [30.0, 4.0]])
    assert relaxation.apply(variable, variable, 0).tolist() == [[1.0, 0.0], [0.0, 4.0]]
    weights, masks = relaxation.finish(variable, variable, Sparsity(0.75))
    assert weights.tolist() == [[1.0, 0.0], [0.0, 4.0]]
    assert (masks == kept).all()


@pytest.mark.parametrize("make", [none, box, sigmoid])
def test_the_comparison_group_of_the_rounding_is_an_argument(key, make):
    weights = draw(key)["q"]
    variable = jax.random.normal(key, weights.shape)
    _, kept = make(group="output").finish(variable, weights, SPARSITY)
    assert (kept.sum(axis=0) == 3).all()
    assert not (make().finish(variable, weights, SPARSITY)[1].sum(axis=0) == 3).all()


def test_the_cubic_schedule_by_hand():
    schedule = cubic_sparsity(100, until=0.6)
    np.testing.assert_allclose(
        [schedule(t) for t in (0, 15, 30, 60, 99)], [0, 37 / 64, 7 / 8, 1, 1], rtol=1e-6
    )
