"""The loop: Algorithm 1 to the letter, any optimiser, chunks, resuming, vmap, grad."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from jaxprune import Sparsity
from jaxprune.descent.loop import Descent, descend
from jaxprune.descent.relaxations import box, cubic_sparsity, fixed, gradual, none, sigmoid
from jaxprune.methods.fused import algorithm1

SPARSITY = Sparsity(0.5)


def squared_error(weights, batch):
    """A linear layer with a target: mean over sequences."""
    return jnp.mean((batch["x"] @ weights - batch["y"]) ** 2)


def draw(key, sequences=8, d=6):
    keys = jax.random.split(key, 3)
    w = jax.random.normal(keys[0], (d, 4))
    x = jax.random.normal(keys[1], (sequences, 5, d)) @ (
        jnp.eye(d) + 0.5 * jax.random.normal(keys[2], (d, d))
    )
    return w, {"x": x, "y": x @ w}


def learn_weights(steps=20, **changes):
    """Gradual pruning with weights that learn, in chunks of seven steps."""
    options = {
        "objective": squared_error,
        "relaxation": gradual(SPARSITY, jnp.abs, schedule=cubic_sparsity(max(steps, 1))),
        "optimizer": optax.adam(0.05),
        "sparsity": SPARSITY,
        "steps": steps,
        "batch_size": 3,
        "chunk_size": 7,
    }
    return Descent(**options | changes)


def assert_equal(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if tolerance:
            np.testing.assert_allclose(one, other, **tolerance)
        else:
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lam", "rate"), [(0.05, 0.3), (0.001, 1.0)])
def test_algorithm_1_is_the_reference(x64, causal, lam, rate):
    random = np.random.default_rng(0)
    x, w = random.normal(size=(20, 6)), 0.2 * random.normal(size=(6, 6))
    mask, kept = reference.algorithm1(x, w, lam, rate, steps=60, drop=18, causal=causal)
    found = jax.jit(
        partial(algorithm1, lam=lam, learning_rate=rate, sparsity=SPARSITY, steps=60, causal=causal)
    )(jnp.asarray(x[None]), jnp.asarray(w))
    np.testing.assert_allclose(found.state.variable, mask, rtol=1e-9)
    assert (found.keep_masks == kept).all()
    assert (found.weights == np.where(kept, w, 0)).all()
    assert len(np.unique(mask)) == 36, "no ties: the masks could differ"


def test_the_trace_of_algorithm_1_is_the_loss_before_each_step(x64):
    random = np.random.default_rng(1)
    x, w = random.normal(size=(9, 4)), 0.3 * random.normal(size=(4, 4))
    found = algorithm1(
        jnp.asarray(x[None]), jnp.asarray(w), lam=0.1, learning_rate=0.5, sparsity=SPARSITY, steps=3
    )
    mask = np.ones((4, 4))
    for step in range(3):
        gradient = reference.gradient(mask, x, w, 0.1)
        np.testing.assert_allclose(found.trace.loss[step], reference.loss(mask, x, w, 0.1))
        np.testing.assert_allclose(found.trace.squared_gradient_norm[step], np.sum(gradient**2))
        mask = mask - 0.5 * gradient


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.05),
    "sgd with a schedule": lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 40)),
    "adam": lambda: optax.adam(0.05),
    "clipped adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05)),
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
    ),
    "lbfgs": lambda: optax.lbfgs(),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_any_optimiser_refits_the_kept_weights(key, name):
    """The refit is least squares, whose solution is known."""
    w, data = draw(key)
    kept = jnp.abs(w) > jnp.median(jnp.abs(w))
    descent = Descent(squared_error, fixed(kept), OPTIMIZERS[name](), SPARSITY, steps=40)
    found = jax.jit(partial(descend, descent))(w, data, key=key)

    inputs, outputs = data["x"].reshape(-1, 6), data["y"].reshape(-1, 4)
    columns = [np.flatnonzero(column) for column in kept.T]
    best = np.zeros(w.shape)
    for j, used in enumerate(columns):
        best[used, j] = np.linalg.lstsq(inputs[:, used], outputs[:, j], rcond=None)[0]
    least = squared_error(jnp.asarray(best, jnp.float32), data)
    start = squared_error(jnp.where(kept, w, 0), data)
    end = squared_error(found.weights, data)
    assert end - least < 0.2 * (start - least)
    assert end > 0.999 * least
    assert (found.keep_masks == kept).all()
    assert found.state.rejected == 0
    if name == "lbfgs":
        np.testing.assert_allclose(found.weights, best, atol=1e-3)


@pytest.mark.parametrize(
    "relaxation", [box(), sigmoid(optax.linear_schedule(1.0, 0.1, 20))], ids=["box", "sigmoid"]
)
def test_masks_learn_under_a_penalty(key, relaxation):
    w, data = draw(key)
    descent = learn_weights(
        relaxation=relaxation, penalty=lambda mask: 0.1 * jnp.sum(mask**2), optimizer=optax.sgd(0.1)
    )
    found = jax.jit(partial(descend, descent))(w, data, key=key)
    assert found.keep_masks.sum() == 12
    assert (found.weights == jnp.where(found.keep_masks, w, 0)).all()
    # What the penalty pulls down first is what matters least: not the index order of a tie.
    error, by_index = (
        squared_error(weights, data) for weights in (found.weights, found.initial_weights)
    )
    assert error < by_index


def test_chunks_from_python_equal_one_scan(key):
    w, data = draw(key)
    descent = learn_weights(sample_errors=lambda w, d: jnp.mean((d["x"] @ w - d["y"]) ** 2, (1, 2)))
    run = partial(descend, descent, w, data, key=key, validation=draw(jax.random.key(5))[1])
    seen = []
    chunked = run(on_chunk=lambda state, trace: seen.append((int(state.step), trace.loss.shape)))
    assert seen == [(7, (7,)), (14, (7,)), (20, (7,))]
    scanned = jax.jit(run)()
    assert scanned.trace.loss.shape == (20,)
    assert scanned.trace.validation_error.shape == (3,)
    assert_equal(chunked, scanned, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "lengths"), [(0, []), (1, [1]), (5, [5]), (7, [7]), (8, [4, 4]), (16, [6, 6, 4])]
)
def test_chunks_are_as_even_as_they_can_be(key, steps, lengths):
    w, data = draw(key)
    seen = [0]
    found = descend(
        learn_weights(steps), w, data, key=key, on_chunk=lambda s, _: seen.append(int(s.step))
    )
    assert [int(n) for n in np.diff(seen)] == lengths
    assert found.trace.loss.shape == (steps,)


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_run_resumed_from_a_saved_state_ends_with_the_identical_result(key, chunks):
    w, data = draw(key)
    run = partial(descend, learn_weights(), w, data, key=key, validation=data)
    states = []
    whole = run(on_chunk=lambda state, _: states.append(state))
    saved = jax.tree.map(lambda a: jnp.asarray(np.array(a)), states[chunks - 1])
    rest = run(state=saved, on_chunk=lambda *_: None)
    assert_equal(rest.state, whole.state)
    assert_equal((rest.weights, rest.keep_masks), (whole.weights, whole.keep_masks))
    assert_equal(rest.trace.loss, whole.trace.loss[7 * chunks :])
    scanned = run(state=saved)
    assert scanned.trace.loss.shape == rest.trace.loss.shape
    assert_equal(scanned.weights, whole.weights, rtol=1e-5, atol=1e-6)


def test_a_finished_state_is_resumed_to_the_same_result(key):
    w, data = draw(key)
    run = partial(descend, learn_weights(), w, data, key=key)
    whole = run()
    for again in (run(state=whole.state), run(state=whole.state, on_chunk=lambda *_: None)):
        assert_equal(again.weights, whole.weights)
        assert again.trace.loss.shape == (0,)


def test_without_steps_the_initial_point_is_rounded(key):
    w, data = draw(key)
    found = descend(learn_weights(steps=0), w, data, key=key, validation=data)
    kept = reference.keep(np.abs(w).ravel(), 12).reshape(w.shape)
    assert (found.weights == np.where(kept, w, 0)).all()
    assert_equal(found.initial_weights, found.weights)
    assert found.trace.loss.shape == (0,)


def drawn_sequences(descent, key, sequences=8, state=None):
    """Which sequences each step drew: the loss sums distinct powers of two."""
    data = {"value": 2.0 ** jnp.arange(sequences)}
    found = descend(descent, jnp.ones((2, 2)), data, key=key, state=state)
    sums = np.asarray(found.trace.loss * descent.batch_size, int)
    return [{i for i in range(sequences) if total >> i & 1} for total in sums], found.state


def test_batches_are_drawn_without_replacement_from_the_key_and_the_step(key):
    descent = Descent(
        objective=lambda w, batch: jnp.mean(batch["value"]) + 0 * jnp.sum(w),
        relaxation=none(),
        optimizer=optax.sgd(0.1),
        sparsity=SPARSITY,
        steps=12,
        batch_size=3,
        chunk_size=4,
    )
    drawn, _ = drawn_sequences(descent, key)
    assert all(len(batch) == 3 for batch in drawn)
    assert len(set(map(frozenset, drawn))) > 6
    assert set.union(*drawn) == set(range(8))
    assert drawn == drawn_sequences(descent, key)[0]
    assert drawn != drawn_sequences(descent, jax.random.key(1))[0]
    _, third_chunk = drawn_sequences(replace(descent, steps=8), key)
    assert drawn_sequences(descent, key, state=third_chunk)[0] == drawn[8:]


def test_a_batch_as_large_as_the_data_takes_every_sequence_in_order(key):
    weighted = jnp.arange(8.0)
    descent = Descent(
        objective=lambda w, batch: jnp.sum(batch["value"] * weighted) + 0 * jnp.sum(w),
        relaxation=none(),
        optimizer=optax.sgd(0.1),
        sparsity=SPARSITY,
        steps=2,
        batch_size=8,
    )
    found = descend(descent, jnp.ones((2, 2)), {"value": weighted}, key=key)
    assert found.trace.loss.tolist() == [140.0, 140.0]


def test_batches_are_changed_anew_at_every_step(key):
    def add_noise(key, batch):
        return batch | {"x": batch["x"] + jax.random.normal(key, batch["x"].shape)}

    w, data = draw(key)
    still = optax.sgd(0.0)
    plain = descend(learn_weights(optimizer=still, batch_size=None), w, data, key=key)
    noisy = descend(
        learn_weights(optimizer=still, batch_size=None, augment=add_noise), w, data, key=key
    )
    assert len(set(plain.trace.loss[-8:].tolist())) == 1, "the schedule is at its end"
    assert len(set(noisy.trace.loss[-8:].tolist())) == 8


@pytest.mark.parametrize("optimizer", [optax.sgd(0.05), optax.adam(0.05)], ids=["sgd", "adam"])
def test_steps_that_are_not_finite_are_left_out_and_counted(key, optimizer):
    w, data = draw(key)
    data["y"] = data["y"].at[3].set(jnp.nan)
    descent = learn_weights(optimizer=optimizer, steps=21)
    validation = draw(key)[1]
    found = descend(descent, w, data, key=key, validation=validation)
    bad = int(jnp.isnan(found.trace.loss).sum())
    assert 0 < bad < 21
    assert found.state.rejected == bad
    assert found.state.step == 21
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(found.state.optimizer_state))
    assert jnp.isfinite(found.weights).all()
    assert squared_error(found.weights, validation) <= squared_error(
        found.initial_weights, validation
    )


def test_a_step_that_diverges_leaves_the_best_finite_iterate(key):
    """Plain gradient descent with a step size far too large, judged on its own data."""
    w, data = draw(key)
    descent = learn_weights(
        optimizer=optax.sgd(1e3),
        relaxation=none(),
        penalty=lambda mask: 0.1 * jnp.sum(mask**2),
        batch_size=None,
    )
    found = descend(descent, w, data, key=key, validation=data)
    assert found.state.rejected > 0
    assert jnp.isfinite(found.state.variable).all()
    assert jnp.isfinite(found.state.best.error)
    assert (found.weights == jnp.where(found.keep_masks, w, 0)).all()


def test_a_candidate_that_is_not_a_number_never_replaces_the_best(key):
    w, data = draw(key)

    def nan_once_it_moved(weights, validation):
        moved = jnp.any((weights != 0) & (weights != w))
        return jnp.where(moved, jnp.nan, jnp.ones(4))

    descent = learn_weights(sample_errors=nan_once_it_moved)
    found = descend(descent, w, data, key=key, validation=data)
    assert jnp.isnan(found.trace.validation_error).all()
    assert (found.state.best.step, found.state.best.error) == (0, 1.0)
    assert_equal(found.weights, found.initial_weights)


def test_the_best_validated_iterate_is_kept_not_the_last(key):
    """Validation prefers weights near twice the dense ones; descent passes by and goes on."""
    w = 1 + jnp.abs(jax.random.normal(key, (6, 4)))
    data = {"x": jnp.zeros((2, 1, 6)), "y": jnp.zeros((2, 1, 4))}
    descent = Descent(
        objective=lambda weights, _: -jnp.sum(weights),
        relaxation=fixed(jnp.ones((6, 4), bool)),
        optimizer=optax.sgd(0.1),
        sparsity=Sparsity(0.0),
        steps=20,
        chunk_size=1,
        sample_errors=lambda weights, _: (weights - w - 1.0).ravel() ** 2,
    )
    found = descend(descent, w, data, key=key, validation=data)
    assert found.state.best.step == 10
    np.testing.assert_allclose(found.weights, w + 1, rtol=1e-5)
    assert len(found.trace.validation_error) == 20


@pytest.mark.parametrize(("margin", "moves"), [(1.0, True), (3.0, False)])
def test_a_gain_within_the_noise_of_the_validation_samples_is_no_gain(key, margin, moves):
    """Mean gain 1 with standard error about 0.49 over 16 samples: two standard errors."""
    w, data = draw(key)
    gains = jnp.asarray([3.0, -1.0] * 8)

    def samples(weights, _):
        moved = jnp.any((weights != 0) & (weights != w))
        return 10 - jnp.where(moved, gains, 0)

    descent = learn_weights(sample_errors=samples, margin=margin)
    found = descend(descent, w, data, key=key, validation=data)
    assert (found.state.best.step > 0) == moves


def test_vmap_over_penalties_rates_and_seeds_equals_a_loop(key):
    w, data = draw(key)
    lams, rates = jnp.array([0.0, 0.01, 0.1]), jnp.array([0.01, 0.1, 0.05])
    keys = jax.random.split(key, 3)

    @jax.jit
    def run(lam, rate, key):
        descent = learn_weights(
            relaxation=none(), optimizer=optax.sgd(rate), penalty=lambda m: lam * jnp.sum(m**2)
        )
        return descend(descent, w, data, key=key)

    mapped = jax.vmap(run)(lams, rates, keys)
    for i in range(3):
        one = run(lams[i], rates[i], keys[i])
        assert_equal(jax.tree.map(lambda a, i=i: a[i], mapped), one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "argument", ["lam", *(pytest.param(a, marks=pytest.mark.slow) for a in ("w", "x"))]
)
def test_reverse_mode_through_a_descent_agrees_with_finite_differences(x64, argument):
    keys = jax.random.split(jax.random.key(0), 4)
    point = {
        "lam": jnp.asarray(0.1),
        "w": 0.4 * jax.random.normal(keys[0], (4, 4), jnp.float64),
        "x": jax.random.normal(keys[1], (1, 7, 4), jnp.float64),
    }
    readout = jax.random.normal(keys[2], (4, 4), jnp.float64)
    direction = jax.random.normal(keys[3], point[argument].shape, jnp.float64)

    @jax.jit
    def learned(value):
        at = point | {argument: value}
        found = algorithm1(**at, learning_rate=0.3, sparsity=SPARSITY, steps=4)
        return jnp.vdot(readout, found.state.variable)

    gradient = jax.grad(learned)(point[argument])
    ends = [learned(point[argument] + h * direction) for h in (1e-5, -1e-5)]
    np.testing.assert_allclose(
        jnp.vdot(gradient, direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-10
    )


def test_weights_may_be_any_pytree(key):
    w, data = draw(key)
    pair = {"a": w, "b": [w[:, :2]]}
    descent = learn_weights(
        objective=lambda p, batch: squared_error(p["a"], batch) + jnp.mean(p["b"][0] ** 2),
        relaxation=gradual(
            SPARSITY, lambda p: jax.tree.map(jnp.abs, p), schedule=cubic_sparsity(20)
        ),
    )
    found = descend(descent, pair, data, key=key, validation=data)
    assert found.keep_masks["a"].sum() == 12
    assert found.keep_masks["b"][0].sum() == 6
    assert (found.weights["b"][0] == 0).sum() == 6


def test_a_second_run_under_jit_compiles_nothing(key, compiled):
    w, data = draw(key)
    run = jax.jit(partial(descend, learn_weights()))
    first = run(w, data, key=key)
    w, data = draw(jax.random.key(1))
    compiled.clear()
    second = run(w, data, key=jax.random.key(2))
    assert not compiled
    assert not (first.weights == second.weights).all()
