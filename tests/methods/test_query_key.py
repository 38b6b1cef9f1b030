"""W_Q and W_K on the attention matrices of a layer: positions, grouped heads, exact counts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import attention_matrix, convergence
from jaxprune.attention import AttentionForm
from jaxprune.baselines import BASELINES, magnitude, wanda
from jaxprune.errors import InputError
from jaxprune.methods.query_key import (
    QueryKeySettings,
    head_errors,
    output_maps,
    prune_query_key,
    queries_and_keys,
    query_key_context,
    query_key_data,
    query_key_importance,
    query_key_refit,
)
from jaxprune.sparsity import Sparsity

D, HEADS, GROUPS, WIDTH, N = 16, 4, 2, 4, 12
ROPE = 10000.0 ** -jnp.linspace(0, 1, WIDTH // 2)
SETTINGS = QueryKeySettings(HEADS, GROUPS, WIDTH**-0.5, Sparsity(0.5))


def layer(key, sequences=16, dtype=jnp.float32):
    """Correlated activations, as real ones are."""
    keys = jax.random.split(key, 4)
    colour = jnp.arange(1, D + 1.0)[:, None] ** -1.25 * jax.random.orthogonal(keys[3], D)
    x = jax.random.normal(keys[0], (sequences, N, D)) @ colour
    wq = jax.random.normal(keys[1], (D, HEADS, WIDTH))
    wk = jax.random.normal(keys[2], (D, GROUPS, WIDTH))
    return x.astype(dtype), wq.astype(dtype), wk.astype(dtype)


def flat(*weights):
    return tuple(w.reshape(D, -1) for w in weights)


def test_logits_rotate_by_distance_and_heads_share_keys(key, x64):
    x, wq, wk = layer(key, 2, jnp.float64)
    half, rope = WIDTH // 2, ROPE.astype(jnp.float64)
    q, k = queries_and_keys(x, flat(wq, wk), AttentionForm(rope), SETTINGS)
    found = jnp.einsum("bgrnk,bgrmk->bgrnm", q, jnp.broadcast_to(k, q.shape))
    for head in range(HEADS):
        a, b = x[1] @ wq[:, head], x[1] @ wk[:, head // 2]
        expected = np.zeros((N, N))
        for f in range(half):
            # A pair of components as one complex number, turned by θ times the distance.
            qc, kc = a[:, f] + 1j * a[:, f + half], b[:, f] + 1j * b[:, f + half]
            angle = rope[f] * (jnp.arange(N)[:, None] - jnp.arange(N))
            expected += np.real(qc[:, None] * jnp.conj(kc) * jnp.exp(1j * angle))
        np.testing.assert_allclose(
            found[1, head // 2, head % 2], expected / np.sqrt(WIDTH), rtol=1e-9, atol=1e-12
        )


def test_without_positions_a_head_is_its_fused_matrix(key, x64):
    x, wq, wk = layer(key, 3, jnp.float64)
    half = (0.5 * wq, wk)
    error, energy = head_errors(x, flat(*half), x, flat(wq, wk), AttentionForm(), SETTINGS)
    for head in range(HEADS):
        w = wq[:, head] @ wk[:, head // 2].T / np.sqrt(WIDTH)
        dense = attention_matrix(x, w)
        np.testing.assert_allclose(energy[head], jnp.sum(dense**2), rtol=1e-9)
        np.testing.assert_allclose(
            error[head], jnp.sum((attention_matrix(x, w / 2) - dense) ** 2), rtol=1e-9
        )


# Others differ from one of these in numbers alone, and compile anew.
QUICK = {("0.3", True), ("2:4", False)}
CASES = [
    pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow)
    for each in itertools.product(["0.3", "0.5", "2:4", "0", "1"], [True, False])
]


@pytest.mark.parametrize(("sparsity", "refit"), CASES)
def test_counts_are_exact_and_dropped_weights_are_zero(key, sparsity, refit):
    x, wq, wk = layer(key)
    found = prune_query_key(x, wq, wk, sparsity, rope=ROPE, steps=20, start="dense", refit=refit)
    for weight, kept, dense in ((found.wq, found.keep_q, wq), (found.wk, found.keep_k, wk)):
        assert (~kept).sum() == Sparsity.parse(sparsity).drop_count(dense.size)
        assert not weight[~kept].any()
        if not refit:
            assert (weight[kept] == dense[kept]).all()
        if sparsity == "2:4":
            assert (kept.reshape(D // 4, 4, -1).sum(1) == 2).all()


@pytest.mark.slow
def test_descent_beats_its_ranking_and_the_baselines_on_fresh_sequences(key):
    x, wq, wk = layer(key, 48)
    fresh, fit = x[:16], x[16:]
    found = prune_query_key(fit, wq, wk, "0.5", rope=ROPE, steps=200, start="dense")
    ranking = prune_query_key(fit, wq, wk, "0.5", rope=ROPE, steps=0, start="dense")
    dense = flat(wq, wk)
    rivals = {
        "ranking": flat(ranking.wq, ranking.wk),
        "wanda": tuple(wanda(fit, w, "0.5").weight for w in dense),
        "magnitude": tuple(magnitude(w, "0.5").weight for w in dense),
    }

    def error(weights):
        error, energy = head_errors(fresh, weights, fresh, dense, AttentionForm(ROPE), SETTINGS)
        return float(error.sum() / energy.sum())

    ours = error(flat(found.wq, found.wk))
    for name, weights in rivals.items():
        assert ours < 0.5 * error(weights), name


def test_sensitivity_finds_the_column_that_attention_does_not_feel(key):
    """A component whose key is zero can be dropped from the query for nothing."""
    x, wq, wk = layer(key)
    silent = wk.at[:, 0, 1].set(0)
    context = query_key_context(flat(wq, silent), x, AttentionForm(), SETTINGS)
    context = query_key_importance(context, query_key_data(x, x, context, SETTINGS), SETTINGS)
    importance = context.importance[0].score(wq.reshape(D, -1)).reshape(wq.shape).max(axis=0)
    others = jnp.delete(importance.reshape(-1), jnp.array([1, 5]))
    assert importance[:2, 1].max() < 0.3 * jnp.median(others)


def test_output_maps_give_the_error_of_each_heads_output(key, x64):
    """Up to one factor, and with no n-wide or d-wide intermediate, ‖C x W_V W_O‖."""
    x = layer(key, 3, jnp.float64)[0]
    keys = jax.random.split(key, 3)
    wv = jax.random.normal(keys[0], (D, GROUPS, WIDTH), jnp.float64)
    wo = jax.random.normal(keys[1], (HEADS, WIDTH, D), jnp.float64)
    maps = output_maps(x, wv, wo, 1.0)
    difference = jax.random.normal(keys[2], (N, N), jnp.float64)
    expected = [
        np.linalg.norm(difference @ x[0] @ wv[:, head // 2] @ wo[head]) for head in range(HEADS)
    ]
    found = [np.linalg.norm(difference @ x[0] @ maps[:, head]) for head in range(HEADS)]
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-9)
    # Two random tokens differ by twice the variance, as do two rows that see one token each.
    tokens = x.reshape(-1, D)
    outputs = jnp.einsum("td,dhv->thv", tokens - tokens.mean(axis=0), maps)
    np.testing.assert_allclose((outputs**2).sum(axis=(1, 2)).mean() / HEADS, 1, rtol=1e-9)
    np.testing.assert_allclose(output_maps(x, 3 * wv, wo, 4.0), 2 * maps, rtol=1e-9)


def test_the_output_counts_where_values_are_given(key, x64, unchecked):
    x, wq, wk = layer(key, 4, jnp.float64)
    wv = jax.random.normal(key, (D, GROUPS, WIDTH), jnp.float64)
    wo = jax.random.normal(jax.random.fold_in(key, 1), (HEADS, WIDTH, D), jnp.float64)
    dense, pruned, rope = flat(wq, wk), flat(0.5 * wq, wk), ROPE.astype(jnp.float64)

    def matrices(weights):
        q, k = queries_and_keys(x, weights, AttentionForm(rope), SETTINGS)
        logits = jnp.einsum("bgrnk,bgxmk->bgrnm", q, k).reshape(-1, HEADS, N, N)
        return jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((N, N))) > 0, logits, -jnp.inf))

    difference = matrices(pruned) - matrices(dense)
    outputs = jnp.einsum("bnd,dhk,hke->bhne", x, jnp.repeat(wv, 2, axis=1), wo)
    spread = ((outputs - outputs.mean(axis=(0, 2), keepdims=True)) ** 2).sum(axis=-1).mean()
    expected = 0.5 * (difference**2).sum() + ((difference @ outputs) ** 2).sum() / spread

    settings, data = SETTINGS._replace(output_weight=2.0), {"x": x, "x0": x}
    context = query_key_context(dense, x, AttentionForm(rope), settings, wv, wo)
    descent = query_key_refit(pruned, context, settings)
    np.testing.assert_allclose(descent.objective(pruned, data), expected / 4, rtol=1e-9)
    # Dense queries, keys and values that are kept give the same.
    kept = query_key_data(x, x, context, settings)
    assert kept.keys() == {"x", "q0", "k0", "values"}
    np.testing.assert_allclose(descent.objective(pruned, kept), expected / 4, rtol=1e-9)

    with pytest.raises(InputError, match="wv and wo"):
        prune_query_key(x, wq, wk, "0.6", rope=ROPE, wv=wv)
    with pytest.raises(InputError, match=r"wv \(16, 2, 4\)"):
        prune_query_key(x, wq, wk, "0.6", rope=ROPE, wv=wv, wo=wo[:2])


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "gauss_newton"},
        pytest.param({"steps": 10, "start": "dense"}, marks=pytest.mark.slow),
    ],
    ids=["gauss_newton", "dense"],
)
def test_vmap_over_layers_equals_one_at_a_time(key, options):
    layers = [layer(k) for k in jax.random.split(key, 2)]
    x, wq, wk = (jnp.stack(a) for a in zip(*layers, strict=True))

    def one(x, wq, wk):
        return prune_query_key(x, wq, wk, "0.5", rope=ROPE, **options)

    mapped = jax.vmap(one)(x, wq, wk)
    for i in range(2):
        alone = one(x[i], wq[i], wk[i])
        assert (mapped.keep_q[i] == alone.keep_q).mean() > 0.97
        np.testing.assert_allclose(
            mapped.calibration_error[i], alone.calibration_error, rtol=0.05, atol=1e-3
        )


def test_same_key_same_descent_and_another_key_another(key):
    x, wq, wk = layer(key, 32)

    def run(seed):
        found = prune_query_key(
            x, wq, wk, "0.5", rope=ROPE, steps=10, start="dense", key=jax.random.key(seed)
        )
        return found.trace.loss

    assert (run(1) == run(1)).all()
    assert (run(1) != run(2)).any()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"wk": jnp.ones((D, 3, WIDTH))}, "wk"),
        ({"wq": jnp.ones((D + 1, HEADS, WIDTH))}, "wq"),
        ({"rope": jnp.ones(WIDTH)}, "rope"),
        ({"x": jnp.full((4, N, D), jnp.nan)}, "x holds"),
        ({"sparsity": "3:5"}, "do not divide the 16 inputs"),
        ({"preset": "paper"}, "preset 'paper'"),
    ],
)
def test_wrong_input_is_named(unchecked, key, changes, named):
    x, wq, wk = layer(key, 4)
    arguments = {"x": x, "wq": wq, "wk": wk, "sparsity": "0.5", "rope": ROPE} | changes
    with pytest.raises(ValueError, match=named):
        prune_query_key(**arguments)


@pytest.fixture(scope="module")
def closed():
    """A layer, its closed form, and what of it is judged on fresh sequences."""
    key = jax.random.key(5)
    x, wq, wk = layer(key, 16)
    found = prune_query_key(x, wq, wk, "0.5", rope=ROPE, preset="gauss_newton")
    return x, wq, wk, found


def test_the_closed_form_is_ahead_of_the_baselines_on_fresh_sequences(closed):
    _, wq, wk, found = closed
    fresh = layer(jax.random.key(5), 24)[0][16:]
    x, dense = closed[0], flat(wq, wk)

    def error(weights):
        error, energy = head_errors(fresh, weights, fresh, dense, AttentionForm(ROPE), SETTINGS)
        return float(error.sum() / energy.sum())

    ours = error(flat(found.wq, found.wk))
    for name in ("wanda", "sparsegpt", "admm"):
        weights = tuple(BASELINES[name].prune(x, w, "0.5").weight for w in dense)
        assert ours < error(weights), name
    assert int(found.keep_q.sum()) == wq.size // 2
    assert int(found.keep_k.sum()) == wk.size // 2
    assert not found.wq[~found.keep_q].any()
    assert found.trace.loss.size == 0


def test_descent_goes_on_from_the_closed_form_under_its_masks(closed):
    x, wq, wk, form = closed
    found = prune_query_key(x, wq, wk, "0.5", rope=ROPE, steps=20)
    assert (found.keep_q == form.keep_q).all()
    assert (found.keep_k == form.keep_k).all()
    # Validation may keep the start; what it keeps is no worse.
    assert found.calibration_error.mean() <= form.calibration_error.mean() * 1.02
    untouched = prune_query_key(x, wq, wk, "0.5", rope=ROPE, refit=False)
    np.testing.assert_array_equal(untouched.wq, jnp.where(form.keep_q, wq, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "paper"}, "preset 'paper'"),
        ({"start": "random"}, "start 'random'"),
        ({"steps": -5}, "steps -5: expected"),
        ({"steps": 5, "preset": "gauss_newton"}, "steps 5: no step is taken"),
        ({"steps": 5, "refit": False}, "steps 5: no step is taken"),
    ],
)
def test_unknown_presets_starts_and_idle_steps_are_refused(closed, change, message):
    x, wq, wk, _ = closed
    with pytest.raises(InputError, match=message):
        prune_query_key(x, wq, wk, "0.5", rope=ROPE, **change)


def test_what_moves_is_float32_where_weights_are_narrower(closed):
    x, wq, wk, _ = closed
    x, wq, wk = (a.astype(jnp.bfloat16) for a in (x, wq, wk))
    found = prune_query_key(x, wq, wk, "0.5", rope=ROPE, steps=4)
    assert found.wq.dtype == found.wk.dtype == jnp.float32
    assert found.keep_q.mean() == 0.5


@pytest.mark.slow
def test_a_monitored_descent_is_reported_on(key):
    x, wq, wk = layer(key, 8)
    watched = prune_query_key(x, wq, wk, "0.5", rope=ROPE, steps=4, monitor=True)
    found = convergence.report(watched.trace)
    assert found.steps == 4
    assert not found.gradient_descent  # but Adam
    assert not found.applicable
