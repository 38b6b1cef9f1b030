"""``W_Q`` and ``W_K`` of a block as what ``jaxprune.methods.query_key`` takes."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxprune.descent.gradual import split_sequences
from jaxprune.methods.query_key import (
    GRADUAL_STEPS,
    QueryKeyContext,
    QueryKeySettings,
    prune_closed_form,
    query_key_context,
    query_key_data,
    query_key_descent,
    query_key_importance,
    query_key_refit,
)
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llama.modeling import BlockWeights, attention_form
from jaxprune.pipeline.settings import PruneSettings
from jaxprune.pipeline.streams import Streams
from jaxprune.pipeline.work import Problem, Solution, movable, upcast
from jaxprune.sparsity import Sparsity

_NAMES = ("wq", "wk")


def query_key_settings(settings: PruneSettings, config: LlamaConfig) -> QueryKeySettings:
    """Settings of a layer of a model with this shape."""
    chosen = QueryKeySettings(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        scale=config.head_dim**-0.5,
        sparsity=settings.sparsity,
    )
    if settings.gradual:
        chosen = chosen._replace(steps=GRADUAL_STEPS, refit=settings.refits)
    if settings.steps is not None:
        chosen = chosen._replace(steps=settings.steps)
    return chosen._replace(**settings.tuning)


def _heads(w: Array, config: LlamaConfig) -> Array:
    """A projection ``[d, heads·k]`` as ``[d, heads, k]``."""
    return w.reshape(w.shape[0], -1, config.head_dim)


def _inputs(dense: BlockWeights, streams: Streams, settings: PruneSettings) -> PyTree:
    """Inputs of the pruned projections, and of those that define the attention."""
    x0 = streams.normed(streams.dense, dense)
    return {"x": streams.normed(streams.pruned, dense) if settings.propagate else x0, "x0": x0}


def _context(
    dense: BlockWeights, x0: Array, chosen: QueryKeySettings, config: LlamaConfig
) -> QueryKeyContext:
    wv = _heads(upcast(dense.wv), config)
    wo = _heads(upcast(dense.wo).T, config).transpose(1, 2, 0)
    weights = movable((dense.wq, dense.wk))
    return query_key_context(weights, x0, attention_form(dense, config), chosen, wv, wo)


def query_key_problem(dense: BlockWeights, streams: Streams, settings: PruneSettings) -> Problem:
    """The descent from dense weights under a mask that tightens."""
    chosen = query_key_settings(settings, streams.config)
    inputs = _inputs(dense, streams, settings)
    context = _context(dense, split_sequences(inputs)[0]["x0"], chosen, streams.config)
    data = query_key_data(inputs["x"], inputs["x0"], context, chosen)
    context = query_key_importance(context, split_sequences(data)[0], chosen)
    return Problem(query_key_descent, chosen, context.dense, data, context, _NAMES)


def query_key_refit_problem(
    dense: BlockWeights, streams: Streams, solution: Solution, settings: PruneSettings
) -> Problem:
    """The descent of kept weights from where a method left them."""
    chosen = query_key_settings(settings, streams.config)
    inputs = _inputs(dense, streams, settings)
    context = _context(dense, split_sequences(inputs)[0]["x0"], chosen, streams.config)
    data = query_key_data(inputs["x"], inputs["x0"], context, chosen)
    masks = (solution.keep_masks["wq"], solution.keep_masks["wk"])
    pruned = movable((solution.weights["wq"], solution.weights["wk"]))
    context = context._replace(keep_masks=masks)
    return Problem(query_key_refit, chosen, pruned, data, context, _NAMES)


def query_key_closed_form(
    dense: BlockWeights,
    streams: Streams,
    sparsity: dict[str, Sparsity],
    settings: PruneSettings,
    key: Array,
) -> Solution:
    """The closed form on the curvature of the attention matrices."""
    chosen = query_key_settings(settings, streams.config)
    x = _inputs(dense, streams, settings)["x"].astype(jnp.float32)
    if settings.generated:  # written to be read, however much other text there is
        chosen = chosen._replace(moment_sequences=len(x))
    result = prune_closed_form(
        x,
        movable((dense.wq, dense.wk)),
        attention_form(dense, streams.config),
        key,
        settings=chosen,
        sparsity=(sparsity["wq"], sparsity["wk"]),
    )
    return Solution(
        dict(zip(_NAMES, result.weights, strict=True)),
        dict(zip(_NAMES, result.keep_masks, strict=True)),
        {"predicted_error": float(sum(result.predicted_error))},
    )
