"""A Llama whose attention logits come from masked fused weights, exact under RoPE.

Every head has factors ``M`` on the entries of its fused weight, the same at every distance of
query and key; see ``jaxprune.methods.rotary``. Values, outputs and MLPs are the model's own.

Logits are ``x_i W x_jᵀ`` only where queries and keys are linear in ``x``: models that add biases to
them or normalise them are refused.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxprune.attention import attention_rows, causal_bias, contract, rms_norm
from jaxprune.errors import InputError
from jaxprune.methods.rotary import RotaryHead, expanded_keys, expanded_queries
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llama.losses import head_losses
from jaxprune.models.llama.modeling import (
    BlockWeights,
    Llama,
    Tokens,
    after_attention,
    attention_form,
    linear,
    split_heads,
)


def check_fusable(config: LlamaConfig) -> None:
    """Raise ``InputError`` where logits are no bilinear form of the block's input.

    With a bias, ``(x_i W_Q + b_Q)(x_j W_K + b_K)ᵀ`` has terms in ``x_i`` and in ``x_j`` alone; with
    a norm a head's query is divided by its own length. No matrix ``W_Q W_Kᵀ`` says that.
    """
    for field in ("attention_bias", "query_key_norm"):
        if getattr(config, field):
            raise InputError(
                f"{field}: attention of this model is not that of a fused weight W_Q W_Kᵀ, so "
                "fused weights are not compared; prune W_Q and W_K themselves with jaxprune prune"
            )


def rotary_heads(weights: BlockWeights, config: LlamaConfig) -> RotaryHead:
    """All query heads of a block, each with the key head it shares, on a leading axis.

    Raises:
      InputError: the model has no fused weights, see ``check_fusable``.
    """
    check_fusable(config)
    groups = config.num_attention_heads // config.num_key_value_heads
    form = attention_form(weights, config)
    scale = config.head_dim**-0.5 * (1 if form.rope_factor is None else form.rope_factor**2)

    def heads(w: Array) -> Array:
        return jnp.moveaxis(w.reshape(w.shape[0], -1, config.head_dim), 1, 0)

    return RotaryHead(
        wq=heads(weights.wq) * scale,
        wk=jnp.repeat(heads(weights.wk), groups, axis=0),
        rope=form.rope,
    )


def fused_block(
    weights: BlockWeights,
    multipliers: Float[Array, "h d d"],
    hidden: Float[Array, "b n d"],
    config: LlamaConfig,
) -> Float[Array, "b n d"]:
    """``modeling.block`` with logits ``x_i (M ∘ W_Q R(i−j) W_Kᵀ/√k) x_jᵀ``.

    Args:
      weights: of the block.
      multipliers: ``M`` of every query head; ones are the dense model.
      hidden: hidden states before the block.
      config: settings, static.
    """
    n = hidden.shape[1]
    x = rms_norm(hidden, weights.attention_norm, config.rms_norm_eps)
    groups = config.num_attention_heads // config.num_key_value_heads
    v = jnp.repeat(split_heads(linear(x, weights.wv, weights.bv), config.head_dim), groups, axis=1)
    heads = rotary_heads(weights, config)
    bias = causal_bias(jnp.arange(n), n)

    def window(arrays: tuple[Array, Array]) -> Float[Array, "h n k"]:
        x, v = arrays
        keys = expanded_keys(x, heads.rope)

        def one(head: tuple[Array, Array, Array, Array]) -> Float[Array, "n k"]:
            wq, wk, multiplier, v = head
            queries = expanded_queries(x, multiplier, RotaryHead(wq, wk, heads.rope))
            return contract("nm,mk->nk", attention_rows(queries, keys, bias), v).astype(v.dtype)

        return lax.map(one, (heads.wq, heads.wk, multipliers, v))

    return after_attention(weights, hidden, x, lax.map(window, (x, v)), config)[0]


@jax.jit
def fused_losses(
    model: Llama, multipliers: Float[Array, "l h d d"], tokens: Tokens
) -> Float[Array, " b"]:
    """``perplexity.window_losses`` of the model with masked fused weights.

    Args:
      model: computes in its own type.
      multipliers: factors of every head of every block.
      tokens: ids of windows.
    """

    def step(hidden: Array, each: tuple[BlockWeights, Array]) -> tuple[Array, None]:
        return fused_block(*each, hidden, model.config), None

    blocks = (model.blocks.get_value(), multipliers)
    hidden, _ = lax.scan(step, model.embed(tokens), blocks)
    return head_losses(model, hidden, tokens)


class Cost(NamedTuple):
    """What expanded logits cost, in floating-point operations and bytes."""

    operations: float
    memory: float


def expansion_cost(config: LlamaConfig, windows: int, seqlen: int) -> Cost:
    """Cost of one forward pass with fused masks over all windows.

    For each window, head and block: queries ``2 n d · k d``, logits ``2 n² · k d``; in memory at
    once queries, keys and logits of one window and head, the matrices ``A``, ``B``, and the masks
    of all heads.
    """
    d, k, n = config.hidden_size, config.head_dim, seqlen
    heads = config.num_hidden_layers * config.num_attention_heads
    operations = 2.0 * windows * heads * n * k * d * (d + n)
    memory = 4.0 * (3 * n * k * d + 2 * n * n + 3 * k * d * d + heads * d * d)
    return Cost(operations, memory)
