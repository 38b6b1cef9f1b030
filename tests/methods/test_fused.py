"""The presets: counts, what they keep and change, when they move, what they refuse."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jaxprune import Sparsity, attention_matrix, prune_attention, relative_error
from jaxprune.baselines import magnitude, sparsegpt, wanda
from jaxprune.gauss_newton import fused_moments, kronecker_admm
from jaxprune.importance import fused_ranking, shrunk_norms
from jaxprune.methods.fused import algorithm1_grid, shuffle_tokens, split_calibration
from jaxprune.sparsity import keep_mask

# A descent compiles the longest; other tests here and of the comparison are of one.
PRESETS = ["paper", "gauss_newton", pytest.param("descent", marks=pytest.mark.slow)]
STEPS = 12


def draw(key, b=3, n=10, d=8, dtype=jnp.float32):
    keys = jax.random.split(key, 2)
    shape = (n, d) if b is None else (b, n, d)
    return jax.random.normal(keys[0], shape, dtype), 0.3 * jax.random.normal(keys[1], (d, d), dtype)


@pytest.fixture(params=PRESETS)
def prune(request):
    """A preset with few steps, one λ and step size for Algorithm 1, a damping unless given."""
    options = {"steps": STEPS, "preset": request.param}
    if request.param == "paper":
        options |= {"lam": 0.01, "learning_rate": 0.3}
    if request.param == "gauss_newton":
        options = {"preset": request.param, "lam": 0.1}
    return partial(prune_attention, **options)


@pytest.mark.parametrize(
    "ratio", [0.3, *(pytest.param(r, marks=pytest.mark.slow) for r in (0.0, 1.0))]
)
def test_counts_are_exact_and_dropped_weights_are_zeros(key, prune, ratio):
    pruned = prune(*draw(key), ratio)
    assert pruned.weight.shape == pruned.keep_mask.shape == (8, 8)
    assert (~pruned.keep_mask).sum() == int(64 * ratio)
    assert ((pruned.weight == 0) == ~pruned.keep_mask).all()


def test_patterns_go_along_the_inputs(key, prune):
    kept = prune(*draw(key), "2:4").keep_mask
    assert (kept.reshape(2, 4, 8).sum(axis=1) == 2).all()


def test_errors_of_the_result_are_those_of_its_weight(key, prune):
    x, w = draw(key)
    pruned = prune(x, w, 0.5)
    np.testing.assert_allclose(
        pruned.calibration_error, relative_error(x, w, pruned.weight), rtol=1e-4
    )
    assert 0 < pruned.initial_error < 2
    steps = prune.keywords.get("steps", 0)
    assert pruned.trace.loss.shape == pruned.trace.squared_gradient_norm.shape == (steps,)
    assert pruned.rejected_steps == 0


def test_nothing_dropped_leaves_the_attention_alone(key, prune):
    x, w = draw(key)
    np.testing.assert_allclose(prune(x, w, 0.0).calibration_error, 0, atol=1e-9)


@pytest.mark.slow
def test_one_sequence_is_a_batch_of_one(key, prune):
    x, w = draw(key, b=None, n=12)
    alone, batch = prune(x, w, 0.5), prune(x[None], w, 0.5)
    assert (alone.weight == batch.weight).all()


@pytest.mark.slow
def test_without_causal_mask_every_key_counts(key, prune):
    x, w = draw(key)
    pruned = prune(x, w, 0.5, causal=False)
    expected = relative_error(x, w, pruned.weight, causal=False)
    np.testing.assert_allclose(pruned.calibration_error, expected, rtol=1e-4)
    other = prune(x, w, 0.5)
    if pruned.trace.loss.size:
        assert not jnp.allclose(pruned.trace.loss, other.trace.loss)
    else:
        assert not jnp.allclose(pruned.weight, other.weight)


@pytest.mark.slow
@pytest.mark.parametrize(("b", "n", "d"), [(None, 1, 1), (2, 1, 3), (1, 3, 1)])
def test_the_smallest_shapes_work(key, prune, b, n, d):
    x, w = draw(key, b, n, d)
    pruned = prune(x, w, 0.5)
    assert (~pruned.keep_mask).sum() == d * d // 2
    assert jnp.isfinite(pruned.weight).all()
    # A single key: attention is one whatever the weight.
    if n == 1:
        assert pruned.calibration_error == 0


@pytest.mark.slow
def test_bfloat16_activations_and_weights_give_a_float32_weight(key, prune):
    x, w = draw(key, dtype=jnp.bfloat16)
    pruned = prune(x, w, 0.5)
    assert pruned.weight.dtype == jnp.float32
    wide = prune(x.astype(jnp.float32), w.astype(jnp.float32), 0.5)
    assert pruned.calibration_error < 1.5 * wide.calibration_error + 0.01


@pytest.mark.slow
def test_float64_stays_float64(key, x64, prune):
    assert prune(*draw(key, dtype=jnp.float64), 0.5).weight.dtype == jnp.float64


@pytest.mark.slow
def test_the_same_key_gives_the_same_weight_and_another_one_another(key):
    x, w = draw(key)
    prune = partial(prune_attention, x, w, 0.5, preset="descent", steps=60, lam=0.0)
    # Judged on the last iterate: the validation split may keep the ranking of both.
    first, again, other = (prune(key=jax.random.key(seed)) for seed in (1, 1, 2))
    assert (first.trace.loss == again.trace.loss).all()
    assert (first.weight == again.weight).all()
    assert not (first.trace.loss == other.trace.loss).all()


def test_heads_are_mapped_over(key, prune):
    x, w = jax.vmap(draw)(jax.random.split(key, 2))
    mapped = jax.vmap(lambda x, w: prune(x, w, 0.5))(x, w)
    for i in range(2):
        one = prune(x[i], w[i], 0.5)
        assert (mapped.keep_mask[i] == one.keep_mask).all()
        np.testing.assert_allclose(mapped.weight[i], one.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_ratios_are_mapped_over(key, prune):
    x, w = draw(key)
    mapped = jax.vmap(lambda ratio: prune(x, w, Sparsity(ratio)))(jnp.array([0.25, 0.5]))
    assert [int((~mask).sum()) for mask in mapped.keep_mask] == [16, 32]


def test_what_padding_holds_does_not_change_the_result(key, prune):
    """Three sentences of 10, 6 and 3 tokens."""
    x, w = draw(key)
    rows = (jnp.arange(10) < jnp.array([10, 6, 3])[:, None]).astype(jnp.float32)
    zeros = prune(jnp.where(rows[..., None] > 0, x, 0), w, 0.5, row_weights=rows)
    sevens = prune(jnp.where(rows[..., None] > 0, x, 7), w, 0.5, row_weights=rows)
    assert (zeros.keep_mask == sevens.keep_mask).all()
    np.testing.assert_allclose(zeros.weight, sevens.weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(zeros.trace.loss, sevens.trace.loss, rtol=1e-4, atol=1e-7)


def test_paper_keeps_the_original_weights(key):
    x, w = draw(key)
    pruned = prune_attention(x, w, 0.5, preset="paper", lam=0.01, learning_rate=0.3, steps=STEPS)
    assert (pruned.weight == jnp.where(pruned.keep_mask, w, 0)).all()


def test_paper_is_the_reference_for_a_given_penalty_and_step(key, x64):
    x, w = draw(key, b=None, dtype=jnp.float64)
    _, kept = reference.algorithm1(np.asarray(x), np.asarray(w), 0.02, 0.5, steps=40, drop=32)
    pruned = prune_attention(x, w, 0.5, preset="paper", lam=0.02, learning_rate=0.5, steps=40)
    assert (pruned.keep_mask == kept).all()
    assert (pruned.lam, pruned.learning_rate) == (0.02, 0.5)


@pytest.mark.slow
def test_paper_chooses_the_best_of_its_grid_on_the_calibration_error(key):
    x, w = draw(key, b=None)
    chosen = prune_attention(x, w, 0.5, steps=STEPS)
    lams, rates = algorithm1_grid(x[None], w)
    assert lams.shape == rates.shape == (5, 4)
    errors = [
        float(prune_attention(x, w, 0.5, lam=lam, learning_rate=r, steps=STEPS).calibration_error)
        for lam, r in zip(lams.ravel(), rates.ravel(), strict=True)
    ]
    np.testing.assert_allclose(chosen.calibration_error, min(errors), rtol=1e-3)
    best = np.isclose(errors, min(errors), rtol=1e-3)
    assert any(
        np.isclose(chosen.lam, lam) and np.isclose(chosen.learning_rate, r)
        for lam, r, good in zip(lams.ravel(), rates.ravel(), best, strict=True)
        if good
    )


@pytest.mark.parametrize("given", [{"lam": 0.05}, {"learning_rate": 0.2}])
def test_paper_leaves_open_only_what_is_not_given(key, given):
    pruned = prune_attention(*draw(key), 0.5, preset="paper", steps=STEPS, **given)
    for name, value in given.items():
        np.testing.assert_allclose(getattr(pruned, name), value, rtol=1e-6)


def test_the_grid_follows_the_scale_of_the_gradient(key):
    x, w = draw(key)
    lams, rates = algorithm1_grid(x, w)
    gradient = [
        reference.gradient(np.zeros((8, 8)), np.asarray(s, float), np.asarray(w, float), 0.0)
        for s in x
    ]
    scale = np.sqrt(np.mean(np.mean(gradient, axis=0) ** 2))
    np.testing.assert_allclose(lams[:, 0], scale * 10.0 ** np.arange(-2, 3), rtol=1e-4)
    np.testing.assert_allclose((lams * rates)[0], [0.003, 0.01, 0.03, 0.1], rtol=1e-5)
    no_signal = algorithm1_grid(jnp.zeros_like(x), w)
    assert all(jnp.isfinite(a).all() for a in no_signal)


def test_a_step_size_that_diverges_is_rejected_and_counted(key):
    x, w = draw(key)
    pruned = prune_attention(x, w, 0.5, lam=10.0, learning_rate=1e4, steps=30)
    assert pruned.rejected_steps > 0
    assert jnp.isfinite(pruned.weight).all()
    assert pruned.keep_mask.sum() == 32


def test_descent_without_steps_is_its_initial_ranking(key):
    x, w = draw(key)
    pruned = prune_attention(x, w, 0.5, preset="descent", start="dense", steps=0)
    fit = x[:2]  # the third of three sequences validates
    scores = np.abs(w) * np.outer(shrunk_norms(fit), shrunk_norms(fit))
    expected = reference.keep(scores.ravel(), 32).reshape(8, 8)
    assert (pruned.keep_mask == expected).all()
    assert (pruned.weight == jnp.where(expected, w, 0)).all()
    assert (pruned.best_step, pruned.trace.loss.shape) == (0, (0,))
    assert pruned.calibration_error == pruned.initial_error


def test_the_closed_form_changes_weights_and_lists_what_was_compared(key):
    x, _, wq, wk = correlated(key, 2.0)
    w = wq @ wk.T
    pruned = prune_attention(x, w, 0.5, preset="gauss_newton")
    validation = pruned.trace.validation_error
    assert validation.shape == (5,)
    assert pruned.best_step == 1
    assert pruned.lam in (0.01, 0.1, 1.0, 3.0)
    assert jnp.isnan(pruned.learning_rate)
    assert validation[1:].min() < validation[0]
    assert not jnp.allclose(pruned.weight, jnp.where(pruned.keep_mask, w, 0), rtol=0.01)
    # On all of the data, at the damping chosen on a part of them.
    given = prune_attention(x, w, 0.5, preset="gauss_newton", lam=pruned.lam)
    np.testing.assert_allclose(given.weight, pruned.weight, rtol=1e-4, atol=1e-6)
    assert given.trace.validation_error.size == 0
    ranking = relative_error(
        x, w, prune_attention(x, w, 0.5, start="dense", steps=0, preset="descent").weight
    )
    np.testing.assert_allclose(pruned.initial_error, ranking, rtol=0.1)


@pytest.mark.parametrize(("exponent", "chosen"), [(2.0, 0.1), (0.0, jnp.inf)])
def test_the_closed_form_is_that_of_the_damping_which_validates_or_the_ranking(exponent, chosen):
    x, _, wq, wk = correlated(jax.random.key(0), exponent, sequences=2)
    w = wq @ wk.T
    pruned = prune_attention(x, w, 0.5, preset="gauss_newton")
    np.testing.assert_allclose(pruned.lam, chosen)
    if jnp.isfinite(chosen):
        pairs = zip(pruned.trace.validation_error[1:], (0.01, 0.1, 1.0, 3.0), strict=True)
        assert min(pairs)[1] == chosen
        moments = fused_moments(x, w)
        by_hand = kronecker_admm(w, moments.inputs, moments.outputs, 0.5, damping=chosen)
        np.testing.assert_allclose(pruned.weight, by_hand.weight, rtol=1e-3, atol=1e-4)
    else:
        kept = keep_mask(fused_ranking(x)(w), Sparsity(0.5))
        np.testing.assert_allclose(pruned.weight, jnp.where(kept, w, 0))


@pytest.mark.slow
def test_on_few_isotropic_tokens_the_closed_form_notices_and_stays_with_the_ranking():
    """Never above fused magnitude by more than a standard error of the draws."""
    draws = [correlated(jax.random.key(s), 0.0, sequences=1, std=8.0) for s in range(20, 24)]
    x, fresh, wq, wk = (jnp.stack(a) for a in zip(*draws, strict=True))
    w = jnp.einsum("sdk,sek->sde", wq, wk)
    closed = jax.vmap(partial(prune_attention, sparsity=0.5, preset="gauss_newton"))(x, w)
    plain = jax.vmap(lambda w: magnitude(w, 0.5).weight)(w)
    excess = jax.vmap(relative_error)(fresh, w, closed.weight)
    excess = excess - jax.vmap(relative_error)(fresh, w, plain)
    assert excess.mean() <= excess.std(ddof=1) / 2
    assert (closed.lam == jnp.inf).all()
    assert (closed.best_step == 0).all()
    assert (closed.weight == jnp.where(closed.keep_mask, w, 0)).all()


@pytest.mark.slow
def test_a_descent_starts_from_the_validated_closed_form(key):
    x, _, wq, wk = correlated(key, 2.0)
    w = wq @ wk.T
    prune = partial(prune_attention, x, w, 0.5)
    fit = jnp.concatenate([x[:7], x[8:15]])
    start = prune(preset="descent", steps=0)
    ranked = prune(preset="descent", start="dense", steps=0)
    dampings = (0.01, 0.1, 1.0, 3.0)
    closed = [prune_attention(fit, w, 0.5, preset="gauss_newton", lam=d).weight for d in dampings]
    assert any(jnp.allclose(start.weight, c, rtol=1e-3, atol=1e-3) for c in closed)
    assert start.best_step == 0
    assert start.calibration_error < ranked.calibration_error


def correlated(key, exponent, d=16, n=32, sequences=16, heldout=16, std=2.0):
    """Covariance eigenvalues ``i^-exponent``, logits of standard deviation ``std``."""
    keys = jax.random.split(key, 5)
    eigenvalues = jnp.arange(1, d + 1.0) ** -exponent
    colour = jnp.sqrt(d * eigenvalues / eigenvalues.sum())[:, None]
    colour = colour * jnp.linalg.qr(jax.random.normal(keys[0], (d, d)))[0].T
    x, fresh = (
        jax.random.normal(k, (count, n, d)) @ colour
        for k, count in ((keys[1], sequences), (keys[2], heldout))
    )
    wq, wk = (jax.random.normal(k, (d, 8)) for k in keys[3:])
    wq = wq * std / jnp.linalg.norm(colour @ wq @ (colour @ wk).T)
    return x, fresh, wq, wk


def heldout_errors(x, fresh, wq, wk, **options):
    w = wq @ wk.T
    judge = partial(relative_error, fresh, w)
    fused = partial(prune_attention, x, w, 0.5, preset="descent", start="dense")
    on_both = [[prune(x, p, 0.5).weight for p in (wq, wk)] for prune in (wanda, sparsegpt)]
    return {
        "ranking": judge(fused(steps=0).weight),
        "descent": judge(fused(**options).weight),
        "gauss_newton": judge(prune_attention(x, w, 0.5, preset="gauss_newton").weight),
        "fused magnitude": judge(magnitude(w, 0.5).weight),
        "wanda": judge(on_both[0][0] @ on_both[0][1].T),
        "sparsegpt": judge(on_both[1][0] @ on_both[1][1].T),
    }


@pytest.mark.slow
def test_on_correlated_activations_descent_beats_every_other_method_on_fresh_ones(key):
    errors = heldout_errors(*correlated(key, 2.0), steps=150)
    descent, closed = errors.pop("descent"), errors.pop("gauss_newton")
    assert descent < 0.4 * min(errors.values()), errors
    assert closed < 0.4 * min(errors.values()), errors


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_on_isotropic_activations_descent_is_no_worse_than_where_it_starts(seed):
    errors = heldout_errors(*correlated(jax.random.key(seed), 0.0, sequences=1), steps=150)
    assert errors["descent"] <= 1.01 * errors["ranking"]


def test_norms_of_few_isotropic_tokens_are_all_equal(key):
    norms = shrunk_norms(jax.random.normal(key, (16, 8)))
    np.testing.assert_allclose(norms, norms[0], rtol=1e-6)


def test_norms_that_differ_beyond_doubt_are_left_nearly_alone(key):
    scales = 2.0 ** jnp.arange(8)
    x = scales * jax.random.normal(key, (2, 500, 8))
    norms = jnp.sqrt(jnp.mean(x**2, axis=(0, 1)))
    np.testing.assert_allclose(shrunk_norms(x), norms, rtol=0.02)


def test_norms_are_shrunk_towards_their_mean_and_not_beyond(key):
    x = jnp.linspace(1, 1.4, 8) * jax.random.normal(key, (60, 8))
    before = jnp.log(jnp.sqrt(jnp.mean(x**2, axis=0)))
    after = jnp.log(shrunk_norms(x))
    assert 0 < jnp.std(after) < jnp.std(before)
    np.testing.assert_allclose(jnp.mean(after), jnp.mean(before), rtol=1e-4, atol=1e-6)


def test_a_dead_feature_has_no_norm_and_drops_first(key):
    x, w = draw(key)
    x = x.at[..., 3].set(0)
    norms = shrunk_norms(x)
    assert norms[3] == 0
    assert (jnp.delete(norms, 3) > 0).all()
    scores = fused_ranking(x)(w)
    assert (scores[3] == 0).all()
    assert (scores[:, 3] == 0).all()
    assert not shrunk_norms(jnp.zeros((4, 3))).any()


def test_tokens_without_weight_do_not_enter_the_norms(key):
    x = jax.random.normal(key, (2, 30, 4)) * jnp.array([1.0, 2.0, 4.0, 8.0])
    weights = jnp.ones((2, 30)).at[:, 20:].set(0)
    found = shrunk_norms(x.at[:, 20:].set(1e3), weights)
    np.testing.assert_allclose(found, shrunk_norms(x[:, :20]), rtol=1e-5)


@pytest.mark.parametrize(
    ("b", "n", "validates"),
    [(8, 2, [7]), (17, 2, [7, 15]), (3, 2, [2]), (2, 5, [1])],
)
def test_of_several_sequences_every_eighth_validates(b, n, validates):
    data = {"x": jnp.arange(b)[:, None] * jnp.ones((1, n))}
    fit, validation = split_calibration(data)
    assert validation["x"][:, 0].tolist() == validates
    assert fit["x"][:, 0].tolist() == [i for i in range(b) if i not in validates]


@pytest.mark.parametrize(("n", "validates"), [(9, [3, 7]), (3, [2]), (2, [1])])
def test_of_one_sequence_every_fourth_token_validates(n, validates):
    fit, validation = split_calibration({"x": jnp.arange(n)[None]})
    assert validation["x"].tolist() == [validates]
    assert fit["x"].tolist() == [[i for i in range(n) if i not in validates]]


def test_a_single_token_both_fits_and_validates():
    data = {"x": jnp.ones((1, 1))}
    assert split_calibration(data) == (data, data)


def test_shuffling_moves_all_arrays_alike_and_leaves_padding_at_its_place(key):
    position = jnp.tile(jnp.arange(12), (4, 1))
    lengths = jnp.array([12, 7, 1, 0])[:, None]
    batch = {"x": position * 1.0, "row_weights": (position < lengths) * (1.0 + position)}
    shuffled = shuffle_tokens(key, batch)
    moved = shuffled["x"].astype(int)
    assert (jnp.sort(moved, axis=1) == position).all()
    assert (jnp.where(position < lengths, moved < lengths, moved == position)).all()
    assert (moved[:2] != position[:2]).any(axis=1).all()
    expected = jnp.take_along_axis(batch["row_weights"], moved, axis=1)
    assert (shuffled["row_weights"] == expected).all()


def test_shuffling_every_token_changes_order_only(key):
    """Without padding all orders are possible, and the error of a set of keys stays."""
    x, w = draw(key, b=1)
    batch = {"x": x, "row_weights": jnp.ones((1, 10))}
    shuffled = shuffle_tokens(key, batch)["x"]
    order = [int(jnp.argmin(jnp.abs(x[0] - row).sum(-1))) for row in shuffled[0]]
    assert sorted(order) == list(range(10))
    whole = attention_matrix(x[0], w, causal=False)
    np.testing.assert_allclose(
        attention_matrix(shuffled[0], w, causal=False),
        whole[jnp.ix_(*[jnp.array(order)] * 2)],
        rtol=1e-4,
    )


def test_a_share_of_the_sequences_keeps_its_order(key):
    position = jnp.tile(jnp.arange(12.0), (200, 1))
    batch = {"x": position, "row_weights": jnp.ones((200, 12))}
    moved = (shuffle_tokens(key, batch, share=0.25)["x"] != position).any(axis=1)
    assert 0.15 < moved.mean() < 0.35
    assert not (shuffle_tokens(key, batch, share=0.0)["x"] != position).any()


@pytest.mark.slow
def test_many_sequences_are_worth_more_steps_and_less_pull(key):
    w = draw(key)[1]
    few, many = (
        prune_attention(jax.random.normal(key, (b, 4, 8)), w, 0.5, preset="descent", batch_size=1)
        for b in (63, 64)
    )
    assert (few.trace.loss.size, many.trace.loss.size) == (400, 600)
    assert many.lam < few.lam
    assert many.learning_rate > few.learning_rate


def test_a_second_call_compiles_nothing(key, prune, compiled):
    x, w = draw(key)
    other = x + 1, 2 * w
    prune(x, w, 0.5)
    compiled.clear()
    prune(*other, 0.5)
    assert not compiled


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "best"}, "preset 'best': expected one of paper, gauss_newton, descent"),
        ({"start": "sparse"}, "start 'sparse': expected one of gauss_newton, dense"),
        ({"preset": "gauss_newton", "steps": 3}, "steps 3: the preset gauss_newton takes no"),
        ({"preset": "gauss_newton", "learning_rate": 0.1}, "learning_rate 0.1: the preset"),
        ({"sparsity": 1.5}, "sparsity 1.5"),
        ({"sparsity": "2:0"}, "sparsity 2:0"),
        ({"sparsity": "2:5"}, "groups of 5 do not divide"),
        ({"steps": -1}, "steps -1"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"x": jnp.ones((4, 7))}, r"x of shape \(4, 7\) and w of shape \(8, 8\)"),
        ({"x": jnp.ones(8)}, r"x of shape \(8,\)"),
        ({"w": jnp.ones((8, 6))}, r"w of shape \(8, 6\)"),
        ({"w": jnp.ones((2, 8, 8))}, "expected one head"),
        ({"x": jnp.full((4, 8), jnp.nan)}, "x holds 32 non-finite"),
        ({"w": jnp.full((8, 8), jnp.inf)}, "w holds 64 non-finite"),
        ({"lam": float("nan")}, "lam holds 1 non-finite"),
        ({"lam": -0.1}, "lam -0.1: expected 0 or more"),
        ({"learning_rate": float("inf")}, "learning_rate holds 1 non-finite"),
        ({"row_weights": jnp.ones(3)}, r"row_weights of shape \(3,\)"),
        ({"row_weights": jnp.zeros((3, 10))}, "row_weights"),
        ({"row_weights": jnp.ones((3, 10)).at[0, 0].set(-1)}, "row_weights"),
    ],
)
def test_wrong_input_is_named(key, unchecked, change, message):
    x, w = draw(key)
    with pytest.raises(ValueError, match=message) as caught:
        prune_attention(**{"x": x, "w": w, "sparsity": 0.5} | change)
    assert "\n" not in str(caught.value)
