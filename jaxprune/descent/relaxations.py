"""Relaxations: how a variable that descent can move stands for pruned weights.

As an optax transformation is a pair of pure functions, a relaxation is a triple, ``init``,
``apply`` and ``finish`` (and, for constrained variables, a projection). The loop in
``jaxprune.descent`` knows nothing else of a method, so that a new one is a new triple.

Weights are a pytree of matrices ``[d_in, d_out]``; variables and keep masks have its structure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from jaxprune.sparsity import Group, Sparsity, keep_mask

Weights: TypeAlias = PyTree
"""Pytree of float matrices ``[d_in, d_out]``."""
KeepMasks: TypeAlias = PyTree
"""Pytree of boolean matrices, True keeps."""
Schedule = Callable[[Any], Any]
"""An optax schedule: a step count to a value."""


def _identity(variable: PyTree) -> PyTree:
    return variable


class Relaxation(NamedTuple):
    """A relaxed form of pruning.

    Attributes:
      init: ``weights -> variable``.
      apply: ``(variable, weights, step) -> effective weights``, differentiable in the variable.
      finish: ``(variable, weights, sparsity) -> (weights, keep masks)``, rounded exactly.
      project: ``variable -> variable``, applied after every update; the identity by default.
    """

    init: Callable[[Weights], PyTree]
    apply: Callable[[PyTree, Weights, Int[Array, ""]], Weights]
    finish: Callable[[PyTree, Weights, Sparsity], tuple[Weights, KeepMasks]]
    project: Callable[[PyTree], PyTree] = _identity


def round_scores(
    scores: PyTree, sparsity: Sparsity, group: Group = "matrix", fraction: Any = 1.0
) -> KeepMasks:
    """Keep masks of every matrix of a pytree of scores; see ``jaxprune.sparsity.keep_mask``."""
    return jax.tree.map(lambda s: keep_mask(s, sparsity, group=group, fraction=fraction), scores)


def apply_masks(weights: Weights, keep_masks: KeepMasks) -> Weights:
    """Weights with exact zeros where dropped."""
    return jax.tree.map(lambda w, kept: jnp.where(kept, w, jnp.zeros_like(w)), weights, keep_masks)


def _multiply(mask: PyTree, weights: Weights) -> Weights:
    return jax.tree.map(jnp.multiply, mask, weights)


def _unit_mean(scores: Array) -> Array:
    """Scores over their mean absolute value; all zeros stay zeros."""
    mean = jnp.mean(jnp.abs(scores))
    return scores / jnp.where(mean > 0, mean, 1)


def _keep_largest(group: Group) -> Callable[[PyTree, Weights, Sparsity], tuple[Weights, KeepMasks]]:
    """``finish`` of mask variables: the largest entries are kept, with their original weight."""

    def finish(variable: PyTree, weights: Weights, sparsity: Sparsity) -> tuple[Weights, KeepMasks]:
        kept = round_scores(variable, sparsity, group)
        return apply_masks(weights, kept), kept

    return finish


def none(*, group: Group = "matrix") -> Relaxation:
    """A free mask ``M``, effective weights ``M∘w``, started at ones: the paper's Algorithm 1.

    Args:
      group: entries that compete in the final rounding; the paper's is the whole matrix.
    """
    return Relaxation(
        init=lambda weights: jax.tree.map(jnp.ones_like, weights),
        apply=lambda mask, weights, step: _multiply(mask, weights),
        finish=_keep_largest(group),
    )


def box(*, group: Group = "matrix") -> Relaxation:
    """As ``none`` with ``M`` projected onto ``[0, 1]`` after every update.

    Entries that end at exactly zero tie, and rounding then drops them by index: at small ratios
    that makes the result worse than without projection.
    """
    return none(group=group)._replace(
        project=lambda mask: jax.tree.map(lambda m: jnp.clip(m, 0.0, 1.0), mask)
    )


def sigmoid(
    temperature: Schedule | float = 1.0, *, start: float = 2.0, group: Group = "matrix"
) -> Relaxation:
    """A mask ``σ(v / T)`` whose temperature ``T`` may fall on a schedule.

    Args:
      temperature: positive, a number or a schedule; as it falls the mask hardens.
      start: initial value of every ``v``.
      group: entries that compete in the final rounding.
    """
    schedule = temperature if callable(temperature) else lambda step: temperature

    def apply(variable: PyTree, weights: Weights, step: Int[Array, ""]) -> Weights:
        return _multiply(
            jax.tree.map(lambda v: jax.nn.sigmoid(v / schedule(step)), variable), weights
        )

    return Relaxation(
        init=lambda weights: jax.tree.map(lambda w: jnp.full_like(w, start), weights),
        apply=apply,
        finish=_keep_largest(group),
    )


def straight_through(
    sparsity: Sparsity,
    *,
    rank: Callable[[Weights], PyTree] | None = None,
    schedule: Schedule | None = None,
    group: Group = "matrix",
) -> Relaxation:
    """Scores whose hard top-k mask acts forward, and to which its gradient goes unchanged.

    Args:
      sparsity: of the hard mask.
      rank: initial scores from the weights; they are scaled to unit mean absolute value. Ones by
        default, with which index order decides at the start.
      schedule: fraction of the final drop count at a step, from 0 to 1; all by default.
      group: entries that compete.

    Source: the straight-through estimator, Bengio et al. 2013.
    """

    def init(weights: Weights) -> PyTree:
        if rank is None:
            return jax.tree.map(jnp.ones_like, weights)
        return jax.tree.map(_unit_mean, rank(weights))

    def apply(variable: PyTree, weights: Weights, step: Int[Array, ""]) -> Weights:
        fraction = 1.0 if schedule is None else schedule(step)
        kept = round_scores(variable, sparsity, group, fraction)

        def one(v: Array, kept: Array, w: Array) -> Array:
            # The difference is an exact zero whose derivative is one.
            return (kept.astype(v.dtype) + (v - lax.stop_gradient(v))) * w

        return jax.tree.map(one, variable, kept, weights)

    return Relaxation(init=init, apply=apply, finish=_keep_largest(group))


def gradual(
    sparsity: Sparsity,
    rank: Callable[[Weights], PyTree],
    *,
    schedule: Schedule,
    group: Group = "matrix",
) -> Relaxation:
    """The weights themselves are learned, under a hard mask that tightens on a schedule.

    At every step the mask is the best-ranked part of the *current* weights. Kept weights learn
    and take over what dropped ones did; dropped ones get no gradient, and come back only if the
    others sink below them.

    Args:
      sparsity: final sparsity.
      rank: current weights to scores, for instance Wanda's ``|w| · ‖x‖``.
      schedule: fraction of the final drop count at a step, from 0 to 1 (``cubic_sparsity``).
      group: entries that compete.

    Source: gradual magnitude pruning (Zhu & Gupta 2017) with a Wanda-like rank and a layerwise
    objective.
    """

    def masks(variable: PyTree, sparsity: Sparsity, fraction: Any) -> KeepMasks:
        return round_scores(lax.stop_gradient(rank(variable)), sparsity, group, fraction)

    def finish(variable: PyTree, weights: Weights, sparsity: Sparsity) -> tuple[Weights, KeepMasks]:
        kept = masks(variable, sparsity, 1.0)
        return apply_masks(variable, kept), kept

    return Relaxation(
        init=_identity,
        apply=lambda variable, weights, step: apply_masks(
            variable, masks(variable, sparsity, schedule(step))
        ),
        finish=finish,
    )


def fixed(keep_masks: KeepMasks) -> Relaxation:
    """Refit: the kept weights of given masks are learned, the masks stay.

    ``finish`` ignores its sparsity: the masks have decided.
    """

    def finish(variable: PyTree, weights: Weights, sparsity: Sparsity) -> tuple[Weights, KeepMasks]:
        return apply_masks(variable, keep_masks), keep_masks

    return Relaxation(
        init=_identity,
        apply=lambda variable, weights, step: apply_masks(variable, keep_masks),
        finish=finish,
    )


def cubic_sparsity(steps: int, *, until: float = 0.6) -> Schedule:
    """Fraction ``1 − (1 − t)³`` of the final drop count, ``t = step / (until · steps)``, then one.

    Source: Zhu & Gupta 2017, Eq. 1, from a dense start; rises until ``until`` of the steps, and
    is one from the first step for zero.
    """
    if until == 0:
        return optax.constant_schedule(1.0)

    def schedule(step: Any) -> Float[Array, ""]:
        t = jnp.clip(jnp.asarray(step, jnp.float32) / (until * steps), 0.0, 1.0)
        return 1 - (1 - t) ** 3

    return schedule
