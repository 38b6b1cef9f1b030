import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jaxprune import attention_matrix, relative_error
from jaxprune.attention import check_finite, rotary_embedding, row_errors


def draw(key, n=11, d=5, b=None, dtype=jnp.float64):
    keys = jax.random.split(key, 2)
    shape = (n, d) if b is None else (b, n, d)
    return jax.random.normal(keys[0], shape, dtype), jax.random.normal(keys[1], (d, d), dtype)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_matrix_is_the_definition(key, x64, causal):
    x, w = draw(key)
    found = attention_matrix(x, w, causal=causal)
    np.testing.assert_allclose(found, reference.attention(x, w, causal), rtol=1e-12, atol=1e-14)


def test_future_keys_get_exactly_nothing(key):
    x, w = draw(key, dtype=jnp.float32)
    found = attention_matrix(x, w)
    assert not np.triu(found, 1).any()
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)


def test_leading_axes_of_both_arguments_broadcast(key):
    x, w = draw(key, b=3, dtype=jnp.float32)
    heads = jnp.stack([w, 2 * w])
    found = attention_matrix(x[:, None], heads)
    assert found.shape == (3, 2, 11, 11)
    # Batched products round differently.
    np.testing.assert_allclose(found[2, 1], attention_matrix(x[2], 2 * w), rtol=2e-4, atol=1e-6)


def test_huge_logits_stay_finite(key):
    x, w = draw(key, dtype=jnp.float32)
    assert jnp.isfinite(attention_matrix(100 * x, 100 * w)).all()


@pytest.mark.parametrize("causal", [True, False])
def test_relative_error_pools_sequences_before_dividing(key, x64, causal):
    x, w = draw(key, b=4)
    pruned = jnp.where(jnp.abs(w) > 0.5, w, 0)
    pairs = [(reference.attention(s, pruned, causal), reference.attention(s, w, causal)) for s in x]
    expected = sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)
    np.testing.assert_allclose(relative_error(x, w, pruned, causal=causal), expected, rtol=1e-12)


def test_relative_error_of_long_sequences_goes_through_several_blocks(key):
    x, w = draw(key, n=700, d=4, dtype=jnp.float32)
    pruned = 0.5 * w
    difference = attention_matrix(x, pruned) - attention_matrix(x, w)
    expected = jnp.sum(difference**2) / jnp.sum(attention_matrix(x, w) ** 2)
    np.testing.assert_allclose(relative_error(x, w, pruned), expected, rtol=1e-4)


def test_row_weights_leave_padding_out(key, x64):
    x, w = draw(key, b=2)
    pruned = 0.3 * w
    weights = jnp.ones((2, 11)).at[1, 6:].set(0)
    error = [row_errors(s @ pruned, s, s @ w, s) for s in (x[0], x[1, :6])]
    expected = sum(e.sum() for e, _ in error) / sum(f.sum() for _, f in error)
    found = relative_error(x.at[1, 6:].set(77.0), w, pruned, row_weights=weights)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_bfloat16_activations_are_accumulated_in_float32(key):
    x, w = draw(key, n=64, d=32, dtype=jnp.float32)
    found = attention_matrix(x.astype(jnp.bfloat16), (w / 30).astype(jnp.bfloat16))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(found, attention_matrix(x, w / 30), atol=0.03)


def test_rotary_embedding_makes_logits_depend_on_distance_only(key, x64):
    q, k = jax.random.normal(key, (2, 8), jnp.float64)
    frequencies = 10000.0 ** -jnp.linspace(0, 1, 4)

    def logit(i, j):
        turned = [
            rotary_embedding(v[None], frequencies, jnp.array([p]))[0] for v, p in ((q, i), (k, j))
        ]
        return jnp.dot(*turned)

    np.testing.assert_allclose(logit(9, 4), logit(6, 1), rtol=1e-12)
    assert abs(logit(9, 4) - logit(9, 5)) > 1e-3
    np.testing.assert_allclose(rotary_embedding(q[None], frequencies)[0], q, rtol=1e-15)


@pytest.mark.parametrize(
    ("x_shape", "w_shape"), [((4, 3), (4, 4)), ((4, 3), (3, 2)), ((3,), (3, 3))]
)
def test_shapes_that_do_not_match_are_named(unchecked, x_shape, w_shape):
    with pytest.raises(ValueError, match=r"x of shape .* w of shape"):
        attention_matrix(jnp.ones(x_shape), jnp.ones(w_shape))


def test_check_finite_counts_and_names():
    with pytest.raises(ValueError, match="wq holds 2 non-finite values"):
        check_finite(x=jnp.ones(3), wq=jnp.array([1.0, jnp.nan, jnp.inf]), other=None)
