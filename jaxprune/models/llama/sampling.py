"""Text that a model writes itself, token by token, with keys and values kept between tokens."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxprune.attention import contract, rms_norm
from jaxprune.errors import InputError
from jaxprune.models.llama.config import LlamaConfig, check_length
from jaxprune.models.llama.modeling import (
    BlockWeights,
    Llama,
    after_attention,
    attention_form,
    linear,
    one_block,
    split_heads,
)

# Windows are written so many at once that their keys and values take about this many bytes: a
# step of few windows waits for the weights to be read.
_CACHE_BYTES = 2**30
# A window is written in so many parts, each by a loop that reads the keys and values up to its own
# end: reading them is much of the time.
_STAGES = 4


def continuations(
    model: Llama, prompts: Int[np.ndarray, "w p"], length: int, key: Key[Array, ""]
) -> Int[np.ndarray, "w n"]:
    """Windows that begin with ``prompts`` and go on with samples of the model's predictions.

    Args:
      model: predicts; sampled from as it is, at temperature 1.
      prompts: first tokens of every window, one or more.
      length: ``n``, tokens of a window in all.
      key: randomness; a window has its own, whatever the number of windows.

    Raises:
      InputError: prompts are empty or longer than ``length``, or that is too long for the model.
    """
    config, given = model.config, prompts.shape[1]
    check_length(config, length)
    if not 1 <= given <= length:
        raise InputError(f"prompts of {given} tokens: expected 1 to {length}, the window's length")
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(prompts)))
    entries = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length
    bytes_each = entries * model.embedding.get_value().dtype.itemsize
    padded = np.pad(prompts, ((0, 0), (0, length - given)))
    # Batches of one size, for which there is one program; the last is filled up.
    count = -(-len(prompts) // max(1, _CACHE_BYTES // bytes_each))
    windows = np.arange(count * -(-len(prompts) // count)) % len(prompts)
    parts = [
        _write(model, jnp.asarray(padded[batch]), keys[batch], given)
        for batch in windows.reshape(count, -1)
    ]
    written = np.concatenate([np.asarray(part) for part in parts])
    return written[: len(prompts)].astype(prompts.dtype)


@jax.jit
def _write(
    model: Llama, tokens: Int[Array, "b n"], keys: Key[Array, " b"], given: Int[Array, ""] | int
) -> Int[Array, "b n"]:
    """Sample all tokens from ``given`` on."""
    config, blocks = model.config, model.blocks.get_value()
    embedding, (b, n) = model.embedding.get_value(), tokens.shape
    shape = (config.num_hidden_layers, b, config.num_key_value_heads, n, config.head_dim)
    empty = jnp.zeros(shape, embedding.dtype)

    def at(
        seen: int, position: Array, carry: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        tokens, keys_so_far, values_so_far = carry

        def layer(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            return _next(one_block(blocks, i), i, position, seen, carry, config)

        start = (embedding[tokens[:, position]][:, None], keys_so_far, values_so_far)
        hidden, *so_far = lax.fori_loop(0, config.num_hidden_layers, layer, start)
        logits = model.head(hidden)[:, 0]
        draw = jax.vmap(partial(jax.random.fold_in, data=position))(keys)
        sampled = jax.vmap(jax.random.categorical)(draw, logits).astype(tokens.dtype)
        following = jnp.where(position + 1 < given, tokens[:, position + 1], sampled)
        return tokens.at[:, position + 1].set(following), *so_far

    carry = (tokens, empty, empty)
    # No loop is empty, however short the windows.
    ends = sorted({(n - 1) * stage // _STAGES for stage in range(_STAGES + 1)})
    for start, stop in itertools.pairwise(ends):
        carry = lax.fori_loop(start, stop, partial(at, stop), carry)
    return carry[0]


def _next(
    weights: BlockWeights,
    layer: Int[Array, ""],
    position: Int[Array, ""],
    seen: int,
    carry: tuple[Array, Array, Array],
    config: LlamaConfig,
) -> tuple[Array, Array, Array]:
    """``modeling.block`` for one token of every window, after those whose keys are kept.

    Of these the first ``seen`` are read; ``position`` is among them.
    """
    hidden, all_keys, all_values = carry
    x = rms_norm(hidden, weights.attention_norm, config.rms_norm_eps)
    form, places = attention_form(weights, config), position[None]
    q = form.queries(linear(x, weights.wq), config.num_attention_heads, places)
    k = form.keys(linear(x, weights.wk), config.num_key_value_heads, places)
    v = split_heads(linear(x, weights.wv, weights.bv), config.head_dim)
    place = (layer, 0, 0, position, 0)
    all_keys = lax.dynamic_update_slice(all_keys, k[None], place)
    all_values = lax.dynamic_update_slice(all_values, v[None], place)
    size = (1, *all_keys.shape[1:3], seen, config.head_dim)
    first_keys, first_values = (
        lax.dynamic_slice(kept, (layer, 0, 0, 0, 0), size)[0] for kept in (all_keys, all_values)
    )
    attended = _attend(q[:, :, 0], first_keys, first_values, position)
    return after_attention(weights, hidden, x, attended, config)[0], all_keys, all_values


def _attend(
    q: Float[Array, "b h k"],
    keys: Float[Array, "b g n k"],
    values: Float[Array, "b g n k"],
    position: Int[Array, ""],
) -> Float[Array, "b h 1 k"]:
    """Attention of the token at ``position`` to those up to it."""
    (b, h, width), (g, n) = q.shape, keys.shape[1:3]
    shared = (q * width**-0.5).reshape(b, g, h // g, width)
    # Not `attention_rows`: a bias is added there, which XLA takes into the loop of so small a
    # product on a CPU. All of sampling took four times as long.
    logits = contract("bgrk,bgnk->bgrn", shared, keys)
    logits = jnp.where(jnp.arange(n) <= position, logits, -jnp.inf)
    attended = contract("bgrn,bgnk->bgrk", jax.nn.softmax(logits).astype(values.dtype), values)
    return attended.astype(values.dtype).reshape(b, h, 1, width)
