"""Descents on kept weights, for any objective: under a mask that tightens, or under a fixed one.

``jaxprune.methods`` gives it the attention matrices of a head or layer, ``jaxprune.pipeline`` the
output of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, PyTree

from jaxprune.descent.loop import Descent, Objective
from jaxprune.descent.relaxations import KeepMasks, Weights, cubic_sparsity, fixed, gradual
from jaxprune.sparsity import Group, Sparsity

# A validation's noise is measured on sequences if there are this many, else on this many samples.
_SEQUENCES = 3
_SAMPLES = 8


def gradual_descent(
    objective: Objective,
    weights: Weights,
    sparsity: Sparsity,
    *,
    rank: Callable[[Weights], PyTree],
    group: Group,
    steps: int,
    learning_rate: ArrayLike,
    anchor_weight: ArrayLike,
    batch_size: int,
    tightened: float = 0.6,
    **options: Any,
) -> Descent:
    """A descent on the kept weights under a mask that tightens, ready to run.

    Adam with warm-up and cosine decay moves the weights; the mask is the best-ranked part of the
    current weights, its size on a cubic schedule; a penalty pulls to the dense weights. Steps and
    penalty are in units of the mean ``|w|`` of each matrix, so that the scale of weights cancels.

    Args:
      objective: effective weights and batch to a scalar.
      weights: dense weights, a pytree of ``[d_in, d_out]``.
      sparsity: final sparsity.
      rank: current weights to scores.
      group: entries that compete.
      steps: updates.
      learning_rate: of Adam, in units of the mean ``|w|``.
      anchor_weight: of the mean squared distance to the dense weights in these units.
      batch_size: sequences of a step.
      tightened: part of the steps after which the mask has its final size.
      **options: further fields of ``Descent``.
    """
    scales = _mean_sizes(weights)
    # From the first step: while nothing is dropped gradients are rounding.
    tightening = cubic_sparsity(max(steps, 1), until=tightened)

    def penalty(variable: Weights) -> Float[Array, ""]:
        distances = jax.tree.map(
            lambda v, w, s: jnp.mean(((v - w) / s) ** 2), variable, weights, scales
        )
        return jnp.asarray(anchor_weight) * sum(jax.tree.leaves(distances))

    return Descent(
        objective=objective,
        relaxation=gradual(
            sparsity,
            rank,
            schedule=lambda step: tightening(step + 1),
            group=group,
        ),
        optimizer=adam_in_units(weights, learning_rate, steps),
        sparsity=sparsity,
        steps=steps,
        batch_size=batch_size,
        penalty=penalty,
        **options,
    )


def refit_descent(
    sample_errors: Callable[[Weights, PyTree], Float[Array, " samples"]],
    weights: Weights,
    keep_masks: KeepMasks,
    *,
    steps: int,
    learning_rate: ArrayLike,
    batch_size: int,
    **options: Any,
) -> Descent:
    """A descent on the kept weights of given masks, ready to run.

    Args:
      sample_errors: effective weights and batch to one error for each sample; their mean is
        minimised.
      weights: pruned weights to start from, a pytree of ``[d_in, d_out]``.
      keep_masks: True where kept.
      steps: updates.
      learning_rate: of Adam, in units of the mean ``|w|`` of each matrix.
      batch_size: sequences of a step.
      **options: further fields of ``Descent``.
    """
    return Descent(
        objective=lambda weights, batch: jnp.mean(sample_errors(weights, batch)),
        relaxation=fixed(keep_masks),
        optimizer=adam_in_units(weights, learning_rate, steps),
        sparsity=Sparsity(0.0),  # the masks have decided
        steps=steps,
        batch_size=batch_size,
        sample_errors=sample_errors,
        **options,
    )


def _mean_sizes(weights: Weights) -> PyTree:
    """Mean ``|w|`` of every matrix, one for each index of leading axes."""
    return jax.tree.map(lambda w: jnp.mean(jnp.abs(w), axis=(-2, -1), keepdims=True), weights)


def adam_in_units(
    weights: Weights, learning_rate: ArrayLike, steps: int
) -> optax.GradientTransformation:
    """Adam with warm-up and cosine decay, its steps in units of the mean ``|w|`` of each matrix.

    Steps grow from zero: near a minimum the first gradients may be rounding alone, of which Adam
    would make steps of full size.

    Args:
      weights: pytree of matrices, which give the units.
      learning_rate: largest step.
      steps: updates in all.
    """
    scales = _mean_sizes(weights)
    decay = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, max(steps, 1))
    return optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_learning_rate(lambda step: jnp.asarray(learning_rate) * decay(step)),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales)),
    )


def split_sequences(data: PyTree) -> tuple[PyTree, PyTree]:
    """Split arrays with a leading sequence axis: every eighth sequence (at least one) validates.

    A single sequence serves as both; ``jaxprune.methods.fused`` splits it by tokens instead.
    """
    count = jax.tree.leaves(data)[0].shape[0]
    return split_axis(data, 0, min(count, 8))


def validation_samples(errors: Float[Array, "b *axes n"]) -> Float[Array, " samples"]:
    """Errors of the positions of sequences to errors of samples, whose mean is that of sequences.

    A sample is a sequence. From one or two of them the noise of a gain is hardly known: it seems
    to be none, or three standard errors of it turn down nearly everything. A sample is then every
    p-th position of a sequence, so that there are at least eight in all; contiguous pieces would
    differ by where they stand.

    Args:
      errors: of every position, on the last axis; those of a sequence are summed.
    """
    b, n = errors.shape[0], errors.shape[-1]
    pieces = 1 if b >= _SEQUENCES else min(math.ceil(_SAMPLES / b), n)
    axes = tuple(range(1, errors.ndim))
    sums = [errors[..., i::pieces].sum(axis=axes) for i in range(pieces)]
    return sums[0] if pieces == 1 else pieces * jnp.stack(sums, axis=1).ravel()


def split_axis(data: PyTree, axis: int, every: int) -> tuple[PyTree, PyTree]:
    """Every ``every``-th entry along an axis to validate on, the others to fit on."""
    size = jax.tree.leaves(data)[0].shape[axis]
    held = np.arange(size) % every == every - 1
    if held.all():
        return data, data

    def part(chosen: np.ndarray) -> PyTree:
        places = np.flatnonzero(chosen)
        return jax.tree.map(lambda a: jnp.take(a, places, axis=axis), data)

    return part(~held), part(held)
