"""The preset ``descent`` on all linear maps of a Llama block, matching the block's output."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxprune.attention import accumulation_dtype
from jaxprune.descent.gradual import gradual_descent
from jaxprune.descent.loop import Descent
from jaxprune.descent.relaxations import Weights
from jaxprune.importance import Importance, column_sensitivity, importance
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llama.modeling import BlockWeights, block
from jaxprune.sparsity import Sparsity


class BlockSettings(NamedTuple):
    """Choices that are static under ``jit``; see ``methods.query_key.QueryKeySettings``."""

    config: LlamaConfig
    sparsity: Sparsity
    steps: int = 1000
    batch_size: int = 4
    learning_rate: float = 0.05


class BlockContext(NamedTuple):
    """Arrays of a block besides the weights that are pruned.

    Attributes:
      weights: dense weights of the block, for its norms.
      importance: factors of ``|w|`` in the ranking, by name.
    """

    weights: BlockWeights
    importance: dict[str, Importance]


def _sample_errors(
    weights: BlockWeights, config: LlamaConfig, pruned: Weights, batch: PyTree
) -> Float[Array, " b"]:
    """Half the squared error of the block's output, for every sequence."""
    hidden = block(weights._replace(**pruned), batch["hidden"], config)[0]
    wide = accumulation_dtype(hidden)
    difference = hidden.astype(wide) - batch["target"].astype(wide)
    return 0.5 * jnp.sum(difference**2, axis=(1, 2))


@partial(jax.jit, static_argnames="settings")
def block_context(
    dense: Weights,
    fit: PyTree,
    weights: BlockWeights,
    input_norms: dict[str, Float[Array, " d_in"]],
    settings: BlockSettings,
) -> BlockContext:
    """What the descent of a block needs to know: see ``BlockContext``.

    Args:
      dense: linear maps to prune, by the names of ``BlockWeights``.
      fit: ``hidden`` and ``target``, see ``block_descent``.
      weights: of the dense block.
      input_norms: Wanda's norms of the inputs of every linear map, by name.
      settings: static choices.
    """
    sample_errors = partial(_sample_errors, weights, settings.config)
    felt = column_sensitivity(
        lambda pruned, batch: jnp.mean(sample_errors(pruned, batch)),
        dense,
        fit,
        batch_size=settings.batch_size,
    )
    return BlockContext(
        weights, {name: importance(w, input_norms[name], felt[name]) for name, w in dense.items()}
    )


def block_descent(
    dense: Weights, fit: PyTree, context: BlockContext, settings: BlockSettings
) -> Descent:
    """Minimise the mean over sequences of ``½ ‖block(hidden; W̃) − target‖²``, ready to run.

    Args:
      dense: linear maps to prune, by the names of ``BlockWeights``.
      fit: ``hidden``, what the pruned block sees, and ``target``, what it should give.
      context: of ``block_context``.
      settings: static choices.
    """
    del fit
    sample_errors = partial(_sample_errors, context.weights, settings.config)

    def objective(weights: Weights, batch: PyTree) -> Float[Array, ""]:
        return jnp.mean(sample_errors(weights, batch))

    def rank(weights: Weights) -> PyTree:
        return {name: context.importance[name].score(w) for name, w in weights.items()}

    return gradual_descent(
        objective,
        dense,
        settings.sparsity,
        rank=rank,
        group="matrix",
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        pull=0.0,
        batch_size=settings.batch_size,
        sample_errors=sample_errors,
    )
