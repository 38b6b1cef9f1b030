"""Distillation: kept weights of a pruned Llama adapt together, on what the dense one predicts.

Blocks are pruned one after the other, each to give what the dense block gives. What their errors
do together is seen only at the end, in the predictions; this is the stage that sees it. Masks
stay as they are.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxprune.descent.gradual import refit_descent, split_sequences
from jaxprune.descent.loop import Descent
from jaxprune.descent.relaxations import KeepMasks, Weights
from jaxprune.models.llama.losses import head_divergences
from jaxprune.models.llama.modeling import BlockWeights, Llama, block, run_blocks
from jaxprune.pipeline.work import Problem, movable

# Windows that validate, at least: of two changed ones the gains differ by more than they are.
_VALIDATING = 8


class DistillationSettings(NamedTuple):
    """Choices that are static under ``jit``.

    Attributes:
      steps: updates.
      batch_size: windows of a step.
      learning_rate: Adam's step, in units of the mean ``|w|`` of a matrix.
      resampled: mean share of a window's tokens that are replaced by samples of the dense model.
    """

    steps: int = 300
    batch_size: int = 8
    learning_rate: float = 0.01
    resampled: float = 0.3


class DistillationContext(NamedTuple):
    """Arrays of a distillation besides weights and data.

    Attributes:
      model: the pruned model; what is learned is replaced in its blocks.
      dense: weights of all blocks of the dense model, which shares the rest.
      keep_masks: of the learned weights, by name.
    """

    model: Llama
    dense: BlockWeights
    keep_masks: KeepMasks


def distillation(
    weights: Weights, context: DistillationContext, settings: DistillationSettings
) -> Descent:
    """Minimise ``E KL(p ‖ p̃)``, the KL divergence of the pruned model's next-token predictions.

    ``p`` are the predictions of the dense model. A few windows are little to fit all blocks at
    once on: their divergence falls by half and that on fresh text hardly. In every step, tokens of
    the windows are therefore replaced by samples of the dense model's predictions at their places,
    a share of them drawn for each window from 0 to twice ``resampled``; what the pruned model has
    to give is the dense one's predictions on the changed windows.

    Args:
      weights: pruned matrices of all blocks on a leading axis, by the names of ``BlockWeights``.
      context: models and masks.
      settings: static choices.

    Source: Hinton et al. 2015, at temperature 1; the resampling is ours.
    """

    def divergences(pruned: Weights, batch: PyTree) -> Float[Array, " b"]:
        blocks = context.model.blocks.get_value()._replace(**pruned)
        return _window_divergences(context, blocks, batch["tokens"])

    return refit_descent(
        divergences,
        weights,
        context.keep_masks,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        augment=partial(resampled, context, settings.resampled),
    )


def distillation_problem(
    model: Llama,
    dense: BlockWeights,
    keep_masks: dict[str, Bool[Array, "l _ _"]],
    tokens: Int[Array, "w n"],
    key: Key[Array, ""],
    settings: DistillationSettings,
) -> Problem:
    """The distillation of a model pruned so far.

    What validates is changed once as the windows of a step are, several times over where they are
    few. The windows themselves may be what the blocks were pruned on: after the closed form of
    SmolLM2-135M the divergence on them is a quarter of that on fresh text, and no step lowers it,
    whatever it does elsewhere.

    Args:
      model: the pruned model.
      dense: weights of all blocks of the dense one.
      keep_masks: of the pruned matrices of all blocks, by the names of ``BlockWeights``.
      tokens: windows, of which every eighth validates.
      key: randomness of those.
      settings: static choices.
    """
    blocks = model.blocks.get_value()
    names = tuple(sorted(keep_masks))
    weights = movable({name: getattr(blocks, name) for name in names})
    context = DistillationContext(model, dense, keep_masks)
    fit, validation = split_sequences({"tokens": tokens})
    held = validation["tokens"]
    repeated = jnp.tile(held, (math.ceil(_VALIDATING / len(held)), 1))
    validation = _changed(context, repeated, key, settings)
    return Problem(distillation, settings, weights, fit, context, names, validation)


def _changed(
    context: DistillationContext,
    tokens: Int[Array, "w n"],
    key: Key[Array, ""],
    settings: DistillationSettings,
) -> PyTree:
    """All windows resampled, as many at once as in a step."""
    change, at_once = jax.jit(partial(resampled, share=settings.resampled)), settings.batch_size
    parts = [
        change(context, key=jax.random.fold_in(key, i), batch={"tokens": tokens[i : i + at_once]})
        for i in range(0, len(tokens), at_once)
    ]
    return jax.tree.map(lambda *windows: jnp.concatenate(windows), *parts)


def _window_divergences(
    context: DistillationContext, pruned: BlockWeights, tokens: Int[Array, "b n"]
) -> Float[Array, " b"]:
    """Mean divergence of the predictions of every window; of a block only its input is kept."""
    model = context.model
    embedded = model.embed(tokens)
    expected = run_blocks(context.dense, embedded, model.config)[0]

    @jax.checkpoint
    def step(hidden: Array, weights: BlockWeights) -> tuple[Array, None]:
        return block(weights, hidden, model.config)[0], None

    result = lax.scan(step, embedded, pruned)[0]
    return head_divergences(model, model, result, expected)


def resampled(
    context: DistillationContext, share: float, key: Key[Array, ""], batch: PyTree
) -> PyTree:
    """Windows in which a random share of the tokens are samples of the dense model.

    A replaced token is drawn from the predictions at its place, given the true tokens before it;
    first tokens stay.

    Args:
      context: holds the dense model.
      share: of the tokens, on average.
      key: randomness.
      batch: ``tokens``, ``[b, n]``.
    """
    tokens, model = batch["tokens"], context.model
    if share == 0:
        return batch
    share_key, place_key, token_key = jax.random.split(key, 3)
    hidden = run_blocks(context.dense, model.embed(tokens), model.config)[0]

    def sample(window: tuple[Array, Array]) -> Array:
        key, hidden = window
        return jax.random.categorical(key, model.head(hidden[:-1]))

    keys = jax.random.split(token_key, tokens.shape[0])
    drawn = lax.map(sample, (keys, hidden)).astype(tokens.dtype)
    shares = 2 * share * jax.random.uniform(share_key, (tokens.shape[0], 1))
    replaced = jax.random.bernoulli(place_key, shares, drawn.shape)
    return batch | {"tokens": tokens.at[:, 1:].set(jnp.where(replaced, drawn, tokens[:, 1:]))}
