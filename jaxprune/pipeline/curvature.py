"""The curvature of a model's predictions, seen from the outputs of its linear maps.

To second order, the KL divergence of the predictions is ``½ vec(E)ᵀ F vec(E)`` in an error ``E``
of a weight, with the Fisher matrix ``F = E[vec(x gᵀ) vec(x gᵀ)ᵀ]``: ``g`` is the gradient, in the
output of the map, of the log-likelihood of a label that the model draws itself, or anything of the
same second moment (``prediction_cotangents``). ``jaxprune.gauss_newton`` takes it by its Kronecker
factors, ``A`` the mean of ``x_t x_tᵀ`` and ``B = Σ_t g_t g_tᵀ``. One pass over
the windows, forwards and backwards, gives ``B`` of every map; ``A`` is gathered later, on what
the model pruned so far computes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxprune.attention import accumulation_dtype, contract
from jaxprune.models.llama.activations import next_hidden
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llama.modeling import INPUT_OF, BlockWeights, Llama, Tapped, block
from jaxprune.pipeline.settings import CurvatureSettings


class MapCurvature(NamedTuple):
    """What the predictions feel of the outputs of one linear map, by windows.

    Attributes:
      outputs: blocks of ``B``, a mean over windows.
      input_squares: mean of ``x_ti²`` over tokens, on the dense model's activations.
    """

    outputs: Float[Array, "p k k"]
    input_squares: Float[Array, " d_in"]

    def saliency(self, w: Float[Array, "d_in d_out"]) -> Float[Array, "d_in d_out"]:
        """``½ A_ii B_jj w_ij²``, nats a window that dropping an entry costs, to first order."""
        outputs = jnp.diagonal(self.outputs, axis1=-2, axis2=-1).reshape(-1)
        return 0.5 * self.input_squares[:, None] * outputs * jnp.square(w.astype(outputs.dtype))


Curvature = list[dict[str, MapCurvature]]
"""Of every block, by the names of its maps."""


def output_blocks(width: int, full: int) -> int:
    """Blocks of ``B`` for a map with so many outputs: as few as have at most ``full`` each."""
    return next(p for p in range(1, width + 1) if width % p == 0 and width // p <= full)


def prediction_curvature(
    model: Llama,
    tokens: Int[np.ndarray, "w n"],
    names: tuple[str, ...],
    key: Key[Array, ""],
    *,
    batch: int,
    full: int = CurvatureSettings().outputs,
) -> Curvature:
    """Curvature of the predictions in the outputs of linear maps of all blocks.

    Args:
      model: the dense model.
      tokens: windows.
      names: of the maps, fields of ``BlockWeights``.
      key: of the random cotangents; a window has its own, whatever the batch.
      batch: windows at once.
      full: greatest width of a block of ``B``.
    """
    config, windows = model.config, len(tokens)
    layers = range(config.num_hidden_layers)
    sums = [_zeros(model, names, full) for _ in layers]
    for start in range(0, windows, batch):
        here = jnp.asarray(tokens[start : start + batch])
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(start + jnp.arange(len(here)))
        hidden = [model.embed(here)]
        for layer in layers:
            hidden.append(next_hidden(model.block_weights(layer), hidden[-1], config, batch=batch))
        gradient = _head_gradient(model, hidden.pop(), keys)
        for layer in reversed(layers):
            gradient, sums[layer] = _through_block(
                model.block_weights(layer), hidden.pop(), gradient, sums[layer], config
            )
    # Layer by layer, so that sums and means of all are not held together.
    return [_means(sums.pop(0), windows, tokens.size) for _ in layers]


def _means(
    sums: dict[str, tuple[Array, Array]], windows: int, tokens: int
) -> dict[str, MapCurvature]:
    return {
        name: MapCurvature(outputs / windows, inputs / tokens)
        for name, (outputs, inputs) in sums.items()
    }


def _zeros(model: Llama, names: tuple[str, ...], full: int) -> dict[str, tuple[Array, Array]]:
    sums = {}
    for name in names:
        d_in, d_out = getattr(model.blocks.get_value(), name).shape[1:]
        blocks = output_blocks(d_out, full)
        sums[name] = (jnp.zeros((blocks, d_out // blocks, d_out // blocks)), jnp.zeros(d_in))
    return sums


def prediction_cotangents(
    key: Key[Array, ""], probability: Float[Array, "n v"]
) -> Float[Array, "n v"]:
    """``√p ∘ (z − ⟨√p, z⟩ √p)`` of every row, with random signs ``z``.

    Their second moment is ``diag(p) − p pᵀ``, the Fisher matrix of a row's prediction in its
    logits, as that of ``1_y − p`` for drawn labels ``y``. Improbable labels make few of those
    gradients decide: on SmolLM2-135M signs left 2 % less divergence for the same windows.
    """
    n, size = probability.shape
    bits = jax.random.bits(key, (n, -(-size // 32), 1), jnp.uint32)
    signs = 2.0 * (bits >> jnp.arange(32, dtype=jnp.uint32) & 1).astype(probability.dtype) - 1
    signs = signs.reshape(n, -1)[:, :size]
    root = jnp.sqrt(probability)
    return root * (signs - root * jnp.sum(root * signs, axis=-1, keepdims=True))


@jax.jit
def _head_gradient(
    model: Llama, hidden: Float[Array, "b n d"], keys: Key[Array, " b"]
) -> Float[Array, "b n d"]:
    """Random cotangents of the logits, pulled back to the hidden states after all blocks."""

    def one(window: tuple[Array, Array]) -> Array:
        hidden, key = window
        logits, pull = jax.vjp(model.head, hidden)
        gradient = prediction_cotangents(key, jax.nn.softmax(logits))
        return pull(gradient.astype(logits.dtype))[0]

    return jax.lax.map(one, (hidden, keys))


@partial(jax.jit, static_argnames="config", donate_argnums=3)
def _through_block(
    weights: BlockWeights,
    hidden: Float[Array, "b n d"],
    gradient: Float[Array, "b n d"],
    sums: dict[str, tuple[Array, Array]],
    config: LlamaConfig,
) -> tuple[Array, dict[str, tuple[Array, Array]]]:
    """Gradient before a block, and sums that its maps add to."""
    lead = hidden.shape[:2]

    def through(hidden: Array, taps: dict[str, Array]) -> tuple[Array, Any]:
        tapped: Any = {n: Tapped(getattr(weights, n), tap) for n, tap in taps.items()}
        return block(weights._replace(**tapped), hidden, config)

    taps = {
        name: jnp.zeros((*lead, getattr(weights, name).shape[1]), hidden.dtype) for name in sums
    }
    _, pull, inputs = jax.vjp(through, hidden, taps, has_aux=True)
    before, outputs = pull(gradient)
    after = {}
    for name, (square, input_squares) in sums.items():
        kind = accumulation_dtype(outputs[name])
        g = outputs[name].astype(kind).reshape(-1, *square.shape[:2])
        x = getattr(inputs, INPUT_OF[name]).astype(kind)
        after[name] = (
            square + contract("tpk,tpl->pkl", g, g),
            input_squares + jnp.sum(x**2, axis=(0, 1)),
        )
    return before, after
