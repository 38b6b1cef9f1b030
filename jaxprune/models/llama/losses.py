"""What predictions cost: cross-entropy, and the KL divergence from another model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxprune.models.llama.modeling import Llama, Tokens

# Positions whose logits are held at once. Those of a large vocabulary stay in a CPU's cache: half
# of the time that whole windows of 1024 tokens took on SmolLM2-135M.
_POSITIONS = 128


@jax.jit
def window_losses(model: Llama, tokens: Tokens) -> Float[Array, " b"]:
    """Mean cross-entropy of the next token in every window, in nats, float32.

    Logits are held for a few positions at a time.
    """
    return head_losses(model, model.hidden_states(tokens), tokens)


def head_losses(model: Llama, hidden: Float[Array, "b n d"], tokens: Tokens) -> Float[Array, " b"]:
    """``window_losses`` from the hidden states after the last block."""

    def one(position: tuple[Array, Array]) -> Array:
        hidden, following = position
        return _loss(_logits(model, hidden), following)

    losses = over_positions(one, (hidden, jnp.roll(tokens, -1, axis=1)))
    return jnp.mean(losses[:, :-1], axis=1)


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

    Logits are held for a few positions at a time, also by a backward pass.
    """

    @jax.checkpoint
    def one(position: tuple[Array, Array]) -> Array:
        return _divergence(_logits(model, position[0]), _logits(reference, position[1]))

    return jnp.mean(over_positions(one, (hidden, expected)), axis=1)


def head_judgements(
    model: Llama, hidden: Float[Array, "b n d"], expected: Float[Array, "b n d"], tokens: Tokens
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """``head_losses``, and ``head_divergences`` from states of a model with the same head."""

    def one(position: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        hidden, expected, following = position
        logits = _logits(model, hidden)
        return _loss(logits, following), _divergence(logits, _logits(model, expected))

    arrays = (hidden, expected, jnp.roll(tokens, -1, axis=1))
    losses, divergences = over_positions(one, arrays)
    return jnp.mean(losses[:, :-1], axis=1), jnp.mean(divergences, axis=1)


def _logits(model: Llama, hidden: Float[Array, " d"]) -> Float[Array, " v"]:
    return model.head(hidden[None])[0]


def _loss(logits: Float[Array, " v"], following: Int[Array, ""]) -> Float[Array, ""]:
    return jax.nn.logsumexp(logits) - logits[following]


def _divergence(logits: Float[Array, " v"], expected: Float[Array, " v"]) -> Float[Array, ""]:
    normalisers = jax.nn.logsumexp(logits), jax.nn.logsumexp(expected)
    probability = jnp.exp(expected - normalisers[1])
    return jnp.sum(probability * (expected - logits)) + normalisers[0] - normalisers[1]


def over_positions(measure: Callable[[Any], Any], arrays: tuple[Array, ...]) -> Any:
    """``measure`` of every position of every window, a few at a time.

    Args:
      measure: from entries of ``arrays`` to a value, or a tree of values, of any shape.
      arrays: ``[b, n, …]``.

    Returns:
      What ``measure`` gives, ``[b, n, …]``.
    """
    b, n = arrays[0].shape[:2]
    flat = [array.reshape(b * n, *array.shape[2:]) for array in arrays]
    measured = lax.map(measure, tuple(flat), batch_size=min(_POSITIONS, b * n))
    return jax.tree.map(lambda values: values.reshape(b, n, *values.shape[1:]), measured)
