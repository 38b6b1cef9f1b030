"""The preset ``descent`` on all linear maps of a Llama block, matching the block's output."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxprune.attention import accumulation_dtype
from jaxprune.descent import Descent
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llama.modeling import BlockWeights, block
from jaxprune.presets import gradual_descent
from jaxprune.relaxations import Weights
from jaxprune.sparsity import Sparsity


class BlockSettings(NamedTuple):
    """Choices that are static under ``jit``; see ``jaxprune.factored.QueryKeySettings``."""

    config: LlamaConfig
    sparsity: Sparsity
    steps: int = 500
    batch_size: int = 4
    learning_rate: float = 0.05


class BlockContext(NamedTuple):
    """Arrays of a block besides the weights that are pruned.

    Attributes:
      weights: dense weights of the block, for its norms.
      input_norms: Wanda's norms of the inputs of every linear map, by name.
    """

    weights: BlockWeights
    input_norms: dict[str, Float[Array, " d_in"]]


def block_descent(
    dense: Weights, fit: PyTree, context: BlockContext, settings: BlockSettings
) -> Descent:
    """Minimise the mean over sequences of ``½ ‖block(hidden; W̃) − target‖²``, ready to run.

    Args:
      dense: linear maps to prune, by the names of ``BlockWeights``.
      fit: ``hidden``, what the pruned block sees, and ``target``, what it should give.
      context: norms of the block and of its inputs.
      settings: static choices.
    """
    del fit

    def sample_errors(weights: Weights, batch: PyTree) -> Float[Array, " b"]:
        hidden = block(context.weights._replace(**weights), batch["hidden"], settings.config)[0]
        wide = accumulation_dtype(hidden)
        difference = hidden.astype(wide) - batch["target"].astype(wide)
        return 0.5 * jnp.sum(difference**2, axis=(1, 2))

    def objective(weights: Weights, batch: PyTree) -> Float[Array, ""]:
        return jnp.mean(sample_errors(weights, batch))

    def rank(weights: Weights) -> PyTree:
        return {
            name: jnp.abs(w) * context.input_norms[name][:, None] for name, w in weights.items()
        }

    return gradual_descent(
        objective,
        dense,
        settings.sparsity,
        rank=rank,
        group="output",
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        pull=0.0,
        batch_size=settings.batch_size,
        sample_errors=sample_errors,
    )
