"""All linear maps of a Llama block, pruned or refitted on the block's output."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxprune.attention import accumulation_dtype
from jaxprune.descent.gradual import (
    gradual_descent,
    refit_descent,
    split_sequences,
    validation_samples,
)
from jaxprune.descent.loop import Descent
from jaxprune.descent.relaxations import KeepMasks, Weights
from jaxprune.importance import Importance, column_sensitivity, feature_norms, importance
from jaxprune.models.llama.activations import next_hidden
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llama.modeling import BlockWeights, block
from jaxprune.pipeline.settings import PruneSettings
from jaxprune.pipeline.streams import Streams, mean_statistic
from jaxprune.pipeline.work import Problem, Solution, movable
from jaxprune.sparsity import Sparsity

# Updates of the descent from dense weights; a refit starts near its end and takes fewer.
GRADUAL_STEPS = 1000


class BlockSettings(NamedTuple):
    """Choices that are static under ``jit``; see ``methods.query_key.QueryKeySettings``."""

    config: LlamaConfig
    sparsity: Sparsity
    steps: int = 100
    batch_size: int = 4
    learning_rate: float = 0.02


class BlockContext(NamedTuple):
    """Arrays of a block besides the weights that are pruned.

    Attributes:
      weights: dense weights of the block, for its norms.
      importance: factors of ``|w|`` in the ranking, by name.
    """

    weights: BlockWeights
    importance: dict[str, Importance]


def _differences(
    weights: BlockWeights, config: LlamaConfig, pruned: Weights, batch: PyTree
) -> tuple[Float[Array, "b n d"], Float[Array, "b n d"]]:
    """What the block's output is off its target, and the target."""
    hidden = block(weights._replace(**pruned), batch["hidden"], config)[0]
    dtype = accumulation_dtype(hidden)
    target = batch["target"].astype(dtype)
    return hidden.astype(dtype) - target, target


def _sample_errors(
    weights: BlockWeights, config: LlamaConfig, pruned: Weights, batch: PyTree
) -> Float[Array, " samples"]:
    """Half the squared error of the block's output, for every sample."""
    difference, _ = _differences(weights, config, pruned, batch)
    return validation_samples(0.5 * jnp.sum(difference**2, axis=-1))


def _relative_errors(
    weights: BlockWeights, config: LlamaConfig, pruned: Weights, batch: PyTree
) -> Float[Array, " samples"]:
    """The same, every token's relative to the mean square of its target."""
    difference, target = _differences(weights, config, pruned, batch)
    size = jnp.mean(target**2, axis=-1) + config.rms_norm_eps
    return validation_samples(0.5 * jnp.sum(difference**2, axis=-1) / size)


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
      fit: ``hidden`` and ``target``, see ``block_descent``, to measure sensitivities on.
      weights: of the dense block.
      input_norms: Wanda's norms of the inputs of every linear map, by name.
      settings: static choices.
    """
    sample_errors = partial(_sample_errors, weights, settings.config)
    sensitivity = column_sensitivity(
        lambda pruned, batch: jnp.mean(sample_errors(pruned, batch)),
        dense,
        fit,
        batch_size=settings.batch_size,
    )
    return BlockContext(
        weights,
        {name: importance(w, input_norms[name], sensitivity[name]) for name, w in dense.items()},
    )


def block_descent(dense: Weights, context: BlockContext, settings: BlockSettings) -> Descent:
    """Minimise the mean over sequences of ``½ ‖block(hidden; W̃) − target‖²``, from dense weights.

    A batch has ``hidden``, what the pruned block sees, and ``target``, what it should give.

    Args:
      dense: linear maps to prune, by the names of ``BlockWeights``.
      context: of ``block_context``.
      settings: static choices.
    """
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
        anchor_weight=0.0,
        batch_size=settings.batch_size,
        sample_errors=sample_errors,
    )


class BlockStart(NamedTuple):
    """Arrays of a block whose kept weights are to adapt: its dense weights, the keep masks."""

    weights: BlockWeights
    keep_masks: KeepMasks


def block_refit(weights: Weights, context: BlockStart, settings: BlockSettings) -> Descent:
    """Minimise ``½ Σ_t ‖block(hidden; W̃)_t − target_t‖² d / ‖target_t‖²`` over kept weights.

    The next blocks read every token normalised. In the plain error of ``block_descent`` a few
    tokens whose states are a hundred times as large are all there is: on the first three blocks of
    SmolLM2-135M, half of all maps, 100 steps on it left 9 % less divergence than the closed form,
    on this one 14 %.

    Args:
      weights: pruned linear maps to start from, by the names of ``BlockWeights``.
      context: of the block.
      settings: static choices.
    """
    return refit_descent(
        partial(_relative_errors, context.weights, settings.config),
        weights,
        context.keep_masks,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
    )


def block_settings(settings: PruneSettings, config: LlamaConfig) -> BlockSettings:
    """Settings of a block of a model with this shape."""
    chosen = BlockSettings(config, settings.sparsity)
    if settings.gradual:
        chosen = chosen._replace(steps=GRADUAL_STEPS, learning_rate=0.05)
    if settings.steps is not None:
        chosen = chosen._replace(steps=settings.steps)
    return chosen._replace(**settings.tuning)


def _linear_maps(weights: Mapping[str, Array], names: tuple[str, ...]) -> Weights:
    return movable({name: weights[name] for name in names})


def block_problem(dense: BlockWeights, streams: Streams, settings: PruneSettings) -> Problem:
    """The descent from dense weights under a mask that tightens."""
    chosen, names = block_settings(settings, streams.config), tuple(sorted(settings.names))
    weights = _linear_maps(dense._asdict(), names)
    data = {"hidden": streams.pruned, "target": streams.target}
    squares = mean_statistic(dense, streams, names, squared_norms, settings.batch)
    norms = {name: jnp.sqrt(value) for name, value in squares.items()}
    context = block_context(weights, split_sequences(data)[0], dense, norms, chosen)
    return Problem(block_descent, chosen, weights, data, context, names)


def block_refit_problem(
    dense: BlockWeights, streams: Streams, solution: Solution, settings: PruneSettings
) -> Problem:
    """The descent of kept weights from where a method left them.

    The target is ``α`` of what the dense model gives after the block, and ``1 - α`` of what the
    dense block makes of the pruned model's stream; ``α`` is the setting ``correction``. Of the
    stream's error a block can take back what is a function of its input, and of few windows it
    learns more than that. On the first eight blocks of SmolLM2-135M, half of all maps, a refit
    with ``α = ½`` left 7 % less divergence on fresh text than the closed form, one with ``α = 1``
    5 %, and in six of the blocks it improved nothing that validates.
    """
    chosen, names = block_settings(settings, streams.config), tuple(sorted(settings.names))
    masks = {name: solution.keep_masks[name] for name in names}
    share, target = settings.correction, streams.target
    assert target is not None
    if share < 1:
        own = next_hidden(dense, streams.pruned, streams.config, batch=settings.batch)
        target = (share * target + (1 - share) * own).astype(target.dtype)
    return Problem(
        block_refit,
        chosen,
        _linear_maps(solution.weights, names),
        {"hidden": streams.pruned, "target": target},
        BlockStart(dense, masks),
        names,
    )


def squared_norms(x: Float[Array, "b n d"]) -> Float[Array, " d"]:
    """Squares of Wanda's norms, which are means over windows."""
    return feature_norms(x) ** 2
