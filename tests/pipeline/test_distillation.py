"""Distillation of pruned blocks from the dense model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import CONFIG

from jaxprune.descent.loop import descend
from jaxprune.models import llama
from jaxprune.models.llama.losses import window_divergences
from jaxprune.models.llama.shapes import LLAMA_3_2_1B
from jaxprune.pipeline.distillation import (
    DistillationContext,
    DistillationSettings,
    distillation,
    distillation_problem,
    resampled,
)
from jaxprune.pipeline.model import distillation_steps
from jaxprune.pipeline.settings import PruneSettings
from jaxprune.sparsity import Sparsity

NAMES = ("wq", "wk")


@pytest.fixture(scope="module")
def dense():
    """The golden model whose query heads share key heads, with attention that is not flat."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=2)
    model = llama.Llama(config, key=jax.random.key(0))
    blocks = model.blocks.get_value()
    model.blocks.set_value(jax.tree.map(lambda w: w * (12 if w.ndim == 3 else 1), blocks))
    model.embedding.set_value(model.embedding.get_value() * 40)
    return model


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 40, (16, 24)), jnp.int32)


@pytest.fixture(scope="module")
def context(dense):
    """Half of the weights of W_Q and W_K dropped, at random."""
    config = dense.config
    pruned = llama.Llama(config, key=jax.random.key(0))
    pruned.embedding.set_value(dense.embedding.get_value())
    blocks = dense.blocks.get_value()
    masks = {
        n: jax.random.bernoulli(jax.random.key(3), 0.5, getattr(blocks, n).shape) for n in NAMES
    }
    pruned.blocks.set_value(
        blocks._replace(**{n: jnp.where(masks[n], getattr(blocks, n), 0) for n in NAMES})
    )
    return DistillationContext(pruned, blocks, masks)


@pytest.fixture(scope="module")
def weights(context):
    return {n: getattr(context.model.blocks.get_value(), n) for n in NAMES}


def test_objective_is_the_divergence_of_the_predictions(dense, context, weights, tokens):
    descent = distillation(weights, context, DistillationSettings())
    found = descent.objective(weights, {"tokens": tokens})
    expected = window_divergences(context.model, dense, tokens).mean()
    assert found > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_gradient_is_that_of_finite_differences(context, weights, tokens):
    descent = distillation(weights, context, DistillationSettings())

    def loss(w):
        return descent.objective(w, {"tokens": tokens})

    direction = jax.tree.map(
        lambda w, k: jax.random.normal(jax.random.key(1), w.shape) * k, weights, context.keep_masks
    )
    step = 1e-2 * jnp.mean(jnp.abs(weights["wq"]))
    above, below = (
        loss(jax.tree.map(lambda w, d, s=s: w + s * step * d, weights, direction)) for s in (1, -1)
    )
    slope = sum(jnp.vdot(g, direction[n]) for n, g in jax.grad(loss)(weights).items())
    np.testing.assert_allclose((above - below) / (2 * step), slope, rtol=2e-2)


def test_kept_weights_learn_and_dropped_ones_stay_zero(context, weights, tokens):
    settings = DistillationSettings(steps=100, learning_rate=0.05)
    fit, fresh = {"tokens": tokens[:12]}, {"tokens": tokens[12:]}
    descent = distillation(weights, context, settings)
    found = jax.jit(
        lambda: descend(descent, weights, fit, key=jax.random.key(0), validation=fresh)
    )()
    before = descent.objective(weights, fresh)
    assert descent.objective(found.weights, fresh) < 0.8 * before
    for n in NAMES:
        assert (found.weights[n][~context.keep_masks[n]] == 0).all()
        assert (found.keep_masks[n] == context.keep_masks[n]).all()


def test_resampled_tokens_are_the_dense_models(dense, context, tokens):
    share = 0.3
    many = jnp.tile(tokens, (50, 1))
    changed = resampled(context, share, jax.random.key(2), {"tokens": many})["tokens"]
    assert (changed[:, 0] == many[:, 0]).all()
    # Half of the windows have less than the mean share, and a draw may be the token itself.
    probability = jax.nn.softmax(dense(tokens))[:, :-1]
    itself = jnp.take_along_axis(probability, tokens[:, 1:, None], -1).mean()
    np.testing.assert_allclose((changed != many)[:, 1:].mean(), share * (1 - itself), atol=0.02)
    # What is drawn at a place is drawn from the predictions there.
    drawn = jnp.where(changed != many, changed, -1).reshape(50, *tokens.shape)[:, :, 1:]
    for window, place in ((0, 3), (5, 11)):
        values = drawn[:, window, place]
        likely = probability[window, place][values[values >= 0]]
        assert likely.mean() > 1.5 / 40  # uniform draws would have 1/40 on average


def test_no_share_changes_nothing(context, tokens):
    batch = {"tokens": tokens}
    assert resampled(context, 0.0, jax.random.key(0), batch)["tokens"] is tokens


def test_what_validates_was_not_calibrated_on(dense, context, tokens):
    settings = DistillationSettings(batch_size=2)
    blocks, masks = context.dense, context.keep_masks

    def problem(seed):
        return distillation_problem(
            context.model, blocks, masks, tokens, jax.random.key(seed), settings
        )

    found = problem(0)
    left_out = np.tile(tokens[7::8], (4, 1))  # eight windows validate at least
    np.testing.assert_array_equal(
        found.data["tokens"], np.delete(np.asarray(tokens), [7, 15], axis=0)
    )
    changed = np.asarray(found.validation["tokens"])
    assert changed.shape == left_out.shape
    assert (changed[:, 0] == left_out[:, 0]).all()
    assert (changed != left_out).any()
    # Both come from one batch, and not by the same draws.
    assert (problem(0).validation["tokens"] == changed).all()
    assert (problem(1).validation["tokens"] != changed).any()
    # A split into batches is none of windows.
    longer = jnp.concatenate([tokens] * 3)
    whole = distillation_problem(
        context.model, blocks, masks, longer, jax.random.key(0), settings
    ).validation["tokens"]
    assert whole.shape == (12, 24)
    assert (whole[:, 0] == jnp.tile(longer[7::8, 0], 2)).all()
    assert (whole[0] != whole[6]).any()  # the same window, of another batch
    assert (whole != jnp.roll(whole, 6, axis=0)).any(axis=1).all()  # or changed again


def test_large_models_are_distilled_only_when_asked(dense):
    half = Sparsity(0.5)
    assert llama.parameter_count(LLAMA_3_2_1B) == 1_235_814_400
    steps = DistillationSettings().steps
    for config, asked, expected in (
        (dense.config, None, steps),
        (dense.config, 0, 0),
        (LLAMA_3_2_1B, None, 0),
        (LLAMA_3_2_1B, 7, 7),
    ):
        settings = PruneSettings("descent", "qk", half, distill=asked)
        assert distillation_steps(settings, config) == expected
    assert distillation_steps(PruneSettings("wanda", "qk", half), dense.config) == 0
    alone = PruneSettings("descent", "qk", half, refit=False)
    assert distillation_steps(alone, dense.config) == 0


def test_parameters_are_counted(dense):
    leaves = jax.tree.leaves(
        (dense.embedding.get_value(), dense.blocks.get_value(), dense.final_norm.get_value())
    )
    assert llama.parameter_count(dense.config) == sum(leaf.size for leaf in leaves)
