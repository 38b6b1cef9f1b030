"""What predictions cost: cross-entropy, and the KL divergence from another model's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxprune.models.llama.modeling import Llama, Tokens


@jax.jit
def window_losses(model: Llama, tokens: Tokens) -> Float[Array, " b"]:
    """Mean cross-entropy of the next token in every window, in nats, float32.

    Logits are held for one window at a time.
    """
    return head_losses(model, model.hidden_states(tokens), tokens)


def head_losses(model: Llama, hidden: Float[Array, "b n d"], tokens: Tokens) -> Float[Array, " b"]:
    """``window_losses`` from the hidden states after the last block."""

    def one(window: tuple[Array, Array]) -> Array:
        hidden, tokens = window
        logits = model.head(hidden[:-1])
        picked = jnp.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)

    return lax.map(one, (hidden, tokens))


@jax.jit
def window_divergences(model: Llama, reference: Llama, tokens: Tokens) -> Float[Array, " b"]:
    """Mean divergence of the predictions at every position of a window, in nats, float32."""
    hidden, expected = model.hidden_states(tokens), reference.hidden_states(tokens)
    return head_divergences(model, reference, hidden, expected)


def head_divergences(
    model: Llama,
    reference: Llama,
    hidden: Float[Array, "b n d"],
    expected: Float[Array, "b n d"],
) -> Float[Array, " b"]:
    """``window_divergences`` from the hidden states of both after the last block.

    Logits are held for one window at a time, also by a backward pass.
    """

    @jax.checkpoint
    def one(window: tuple[Array, Array]) -> Array:
        log_found = jax.nn.log_softmax(model.head(window[0]))
        log_expected = jax.nn.log_softmax(reference.head(window[1]))
        return jnp.mean(jnp.sum(jnp.exp(log_expected) * (log_expected - log_found), axis=-1))

    return lax.map(one, (hidden, expected))
