"""Activations of a model on calibration windows, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.attention import rms_norm
from jaxprune.errors import InputError
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llama.modeling import BlockWeights, Llama, Tokens, block
from jaxprune.sharding import AXES, over_mesh, split_windows


def attention_inputs(
    model: Llama, tokens: Tokens, *, batch: int = 8
) -> Iterator[Float[Array, "w n d"]]:
    """Yield what W_Q, W_K and W_V are applied to, one block after the other.

    Blocks run when the next input is asked for, so a consumer that stops early pays for no more;
    besides the weights, hidden states of one layer and the yielded array are held.

    Args:
      model: computes in its own type.
      tokens: ids of all windows.
      batch: windows at once.

    Raises:
      InputError: the batch is empty.
    """
    hidden = model.embed(tokens)
    for layer in range(model.config.num_hidden_layers):
        weights = model.block_weights(layer)
        yield rms_norm(hidden, weights.attention_norm, model.config.rms_norm_eps)
        hidden = next_hidden(weights, hidden, model.config, batch=batch)


def next_hidden(
    weights: BlockWeights, hidden: Float[Array, "w n d"], config: LlamaConfig, *, batch: int = 8
) -> Float[Array, "w n d"]:
    """Hidden states after a block, ``batch`` windows at a time.

    Args:
      weights: of the block, dense or pruned.
      hidden: hidden states before it.
      config: settings of the model.
      batch: windows at once.

    Raises:
      InputError: the batch is empty.
    """
    if batch < 1:
        raise InputError(f"batch must be at least 1, not {batch}")
    starts = range(0, hidden.shape[0], batch)
    parts = [_after(weights, hidden[i : i + batch], config) for i in starts]
    return split_windows(jnp.concatenate(parts))


@partial(jax.jit, static_argnums=2)
def _after(weights: BlockWeights, hidden: Array, config: LlamaConfig) -> Array:
    def through(hidden: Array) -> Array:
        return block(weights, hidden, config)[0]

    return over_mesh(through, AXES)(hidden)
