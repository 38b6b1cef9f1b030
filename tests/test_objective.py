from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jaxprune import closed_form_gradient, mask_loss, softmax_error
from jaxprune.errors import InputError


def problem(key, n=17, d=6, b=None, dtype=jnp.float64, scale=0.5):
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (n, d) if b is None else (b, n, d), dtype)
    w = scale * jax.random.normal(keys[1], (d, d), dtype)
    return jax.random.uniform(keys[2], (d, d), dtype), x, w


def queries_and_keys(key, shape=(3, 19, 4), dtype=jnp.float64):
    return [jax.random.normal(k, shape, dtype) for k in jax.random.split(key, 4)]


def plain_error(q, k, q0, k0, causal):
    """The kernel by ordinary operations and whole matrices."""
    n = q.shape[-2]
    bias = jnp.where(jnp.tril(jnp.ones((n, n))) > 0, 0.0, -jnp.inf) if causal else 0.0
    c = jax.nn.softmax(q @ k.mT + bias) - jax.nn.softmax(q0 @ k0.mT + bias)
    return 0.5 * jnp.sum(c**2, axis=-1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_size", [None, 4])
def test_values_count_what_attention_does_to_them(key, x64, causal, block_size):
    arrays = queries_and_keys(key)
    values = jax.random.normal(jax.random.fold_in(key, 9), (19, 5), jnp.float64)
    weights = jax.random.uniform(jax.random.fold_in(key, 8), (3, 19), jnp.float64)

    def kernel(*arrays):
        return softmax_error(
            *arrays, causal=causal, block_size=block_size, row_weights=weights, values=values
        ).sum()

    def plain(q, k, q0, k0):
        n = q.shape[-2]
        bias = jnp.where(jnp.tril(jnp.ones((n, n))) > 0, 0.0, -jnp.inf) if causal else 0.0
        c = jax.nn.softmax(q @ k.mT + bias) - jax.nn.softmax(q0 @ k0.mT + bias)
        return 0.5 * jnp.sum(weights * (jnp.sum(c**2, -1) + jnp.sum((c @ values) ** 2, -1)))

    found = jax.value_and_grad(kernel, argnums=(0, 1, 2, 3))(*arrays)
    expected = jax.value_and_grad(plain, argnums=(0, 1, 2, 3))(*arrays)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), found, expected)


def test_values_matter_up_to_a_constant_and_must_fit(key, x64, unchecked):
    arrays = queries_and_keys(key)
    values = jax.random.normal(jax.random.fold_in(key, 9), (3, 19, 5), jnp.float64)
    np.testing.assert_allclose(
        softmax_error(*arrays, values=values), softmax_error(*arrays, values=values + 7), rtol=1e-9
    )
    with pytest.raises(InputError, match=r"values \(3, 18, 5\)"):
        softmax_error(*arrays, values=values[:, 1:])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_loss_and_gradient_are_the_papers(key, x64, causal, lam):
    mask, x, w = problem(key)
    value, gradient = jax.value_and_grad(mask_loss)(mask, x, w, lam=lam, causal=causal)
    np.testing.assert_allclose(value, reference.loss(mask, x, w, lam, causal), rtol=1e-12)
    expected = reference.gradient(*map(np.asarray, (mask, x, w)), lam, causal)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(
        closed_form_gradient(mask, x, w, lam=lam, causal=causal), expected, rtol=1e-9, atol=1e-13
    )


@pytest.mark.parametrize("causal", [True, False])
def test_gradient_agrees_with_finite_differences(key, x64, causal):
    mask, x, w = problem(key, b=3)
    gradient = jax.grad(mask_loss)(mask, x, w, lam=0.2, causal=causal)
    direction = jax.random.normal(key, mask.shape, jnp.float64)
    step = 1e-5

    def at(t):
        return mask_loss(mask + t * direction, x, w, lam=0.2, causal=causal)

    slope = (at(step) - at(-step)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(gradient, direction), slope, rtol=1e-7)
    np.testing.assert_allclose(
        closed_form_gradient(mask, x, w, lam=0.2, causal=causal), gradient, rtol=1e-9, atol=1e-13
    )


def test_several_sequences_are_a_mean_with_one_penalty(key, x64):
    mask, x, w = problem(key, b=4)
    each = [mask_loss(mask, s, w, lam=0.0) for s in x]
    expected = np.mean(each) + 0.5 * 0.7 * np.sum(mask**2)
    np.testing.assert_allclose(mask_loss(mask, x, w, lam=0.7), expected, rtol=1e-12)


def test_dense_mask_has_no_error(key, x64):
    _, x, w = problem(key)
    ones = jnp.ones_like(w)
    assert mask_loss(ones, x, w, lam=0.0) < 1e-30
    np.testing.assert_allclose(jax.grad(mask_loss)(ones, x, w, lam=0.5), 0.5 * ones)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_size", [None, 1, 4, 7, 19, 40])
def test_kernel_equals_plain_autodiff_in_every_argument(key, x64, causal, block_size):
    arguments = queries_and_keys(key)
    weights = jax.random.uniform(key, (3, 19), jnp.float64)

    def ours(q, k, q0, k0, r):
        return softmax_error(q, k, q0, k0, causal=causal, block_size=block_size, row_weights=r)

    def plain(q, k, q0, k0, r):
        return jnp.sum(r * plain_error(q, k, q0, k0, causal), axis=-1)

    found = ours(*arguments, weights)
    np.testing.assert_allclose(found, plain(*arguments, weights), rtol=1e-12)
    every = tuple(range(5))
    for ours_g, plain_g in zip(
        jax.grad(lambda *a: jnp.vdot(ours(*a), jnp.arange(1.0, 4)), every)(*arguments, weights),
        jax.grad(lambda *a: jnp.vdot(plain(*a), jnp.arange(1.0, 4)), every)(*arguments, weights),
        strict=True,
    ):
        np.testing.assert_allclose(ours_g, plain_g, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("argument", range(4))
def test_kernel_differentiates_a_single_argument(key, x64, argument):
    arguments = queries_and_keys(key, (9, 3))
    ours = jax.grad(lambda *a: softmax_error(*a, block_size=4), argument)(*arguments)
    plain = jax.grad(lambda *a: plain_error(*a, True).sum(), argument)(*arguments)
    np.testing.assert_allclose(ours, plain, rtol=1e-9, atol=1e-13)


def test_gradient_in_the_activations_passes_through_the_target(key, x64):
    mask, x, w = problem(key, n=7)
    gradient = jax.grad(mask_loss, argnums=1)(mask, x, w, lam=0.1)
    direction = jax.random.normal(key, x.shape, jnp.float64)
    ends = [mask_loss(mask, x + t * direction, w, lam=0.1) for t in (1e-5, -1e-5)]
    np.testing.assert_allclose(jnp.vdot(gradient, direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-6)


def test_hessian_vector_products_are_derivatives_of_the_gradient(key, x64):
    mask, x, w = problem(key)
    direction = jax.random.normal(key, mask.shape, jnp.float64)

    def gradient(mask):
        return jax.grad(mask_loss)(mask, x, w, lam=0.1)

    product = jax.jvp(gradient, (mask,), (direction,))[1]
    slope = (gradient(mask + 1e-5 * direction) - gradient(mask - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(product, slope, rtol=1e-6, atol=1e-8)


def test_leading_axes_broadcast_and_equal_a_loop(key, x64):
    q, k, q0, k0 = queries_and_keys(key, (2, 3, 8, 4))
    shared_k = k[:, :1]
    found = softmax_error(q, shared_k, q0, k0[0, 0])
    assert found.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        one = softmax_error(q[i, j], k[i, 0], q0[i, j], k0[0, 0])
        np.testing.assert_allclose(found[i, j], one, rtol=1e-12)


def test_many_heads_are_mapped_over_in_batches_with_a_remainder(key):
    arguments = queries_and_keys(key, (19, 256, 4), jnp.float32)
    found = softmax_error(*arguments)  # 4 heads of 256 rows are held at once
    each = jax.lax.map(lambda a: plain_error(*a, True).sum(), tuple(arguments))
    np.testing.assert_allclose(found, each, rtol=1e-5)


def test_vmap_and_jit_equal_a_loop(key, x64):
    masks, x, w = problem(key)
    masks = jnp.stack([masks, masks**2, 1 - masks])
    lams = jnp.array([0.0, 0.1, 1.0])
    gradient = jax.grad(lambda m, lam: mask_loss(m, x, w, lam=lam))
    loop = jnp.stack([gradient(m, lam) for m, lam in zip(masks, lams, strict=True)])
    np.testing.assert_allclose(jax.vmap(gradient)(masks, lams), loop, rtol=1e-9)
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient))(masks, lams), loop, rtol=1e-9)


def test_a_second_call_with_another_lambda_does_not_recompile(key):
    mask, x, w = problem(key, dtype=jnp.float32)
    compiled = jax.jit(lambda m, lam: jax.value_and_grad(mask_loss)(m, x, w, lam=lam))
    compiled(mask, 0.1)
    compiled(2 * mask, 0.5)
    assert compiled._cache_size() == 1


def test_bfloat16_inputs_give_float32_errors_near_those_of_float32(key):
    arguments = queries_and_keys(key, (2, 64, 16), jnp.float32)
    low = [a.astype(jnp.bfloat16) for a in arguments]
    found, gradient = jax.value_and_grad(lambda *a: softmax_error(*a).sum())(*low)
    assert found.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    exact, exact_gradient = jax.value_and_grad(lambda *a: softmax_error(*a).sum())(
        *(a.astype(jnp.float32) for a in low)
    )
    np.testing.assert_allclose(found, exact, rtol=1e-3)
    difference = jnp.linalg.norm(gradient.astype(jnp.float32) - exact_gradient)
    assert difference < 0.02 * jnp.linalg.norm(exact_gradient)


@pytest.mark.parametrize(("n", "share"), [(4096, 0.25), (8192, 0.10)])
@pytest.mark.parametrize("causal", [True, False])
def test_no_square_array_outlives_a_block(optimised, n, share, causal):
    """Temporaries of the compiled program, against one n × n float32 array."""
    shape = jax.ShapeDtypeStruct((n, 64), jnp.float32)
    program = jax.jit(jax.value_and_grad(lambda *a: softmax_error(*a, causal=causal).sum(), (0, 1)))
    memory = program.lower(*[shape] * 4).compile().memory_analysis()
    assert memory.temp_size_in_bytes < share * n * n * 4


def test_kernel_shapes_that_do_not_match_are_named(unchecked):
    q, k = jnp.ones((5, 4)), jnp.ones((6, 4))
    with pytest.raises(ValueError, match=r"q \(5, 4\), k \(6, 4\)"):
        softmax_error(q, k, q, q)
    with pytest.raises(ValueError, match="row_weights"):
        softmax_error(q, q, q, q, row_weights=jnp.ones(3))
    with pytest.raises(ValueError, match="mask of shape"):
        mask_loss(jnp.ones((3, 4)), q, jnp.ones((4, 4)), lam=0.0)
