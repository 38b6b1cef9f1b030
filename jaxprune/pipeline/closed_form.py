"""All linear maps of a block in closed form, on the curvature of the model's predictions."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.attention import accumulation_dtype, contract
from jaxprune.gauss_newton import kronecker_admm
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llama.modeling import INPUT_OF, BlockWeights, block
from jaxprune.pipeline.curvature import MapCurvature
from jaxprune.pipeline.streams import Streams
from jaxprune.pipeline.work import Solution, upcast
from jaxprune.sparsity import Sparsity


def block_closed_form(
    dense: BlockWeights,
    streams: Streams,
    curvature: dict[str, MapCurvature],
    sparsity: dict[str, Sparsity],
    batch: int,
) -> Solution:
    """Minimise ``½ tr(A E B Eᵀ)`` for every linear map, ``A`` on the model as pruned so far.

    Args:
      dense: weights of the block.
      streams: the pruned one gives the inputs.
      curvature: ``B`` and the weights of tokens, by the names of the maps.
      sparsity: of every map.
      batch: windows at once.
    """
    inputs = _input_moments(dense, streams, curvature, batch)
    results = {
        name: kronecker_admm(
            upcast(getattr(dense, name)), inputs[name], _blocks(felt.outputs), sparsity[name]
        )
        for name, felt in curvature.items()
    }
    return Solution(
        {name: result.weight for name, result in results.items()},
        {name: result.keep_mask for name, result in results.items()},
        {"predicted_divergence": float(sum(result.loss for result in results.values()))},
    )


def _blocks(outputs: Float[Array, "p k k"]) -> Array:
    """Blocks of ``B``; of a diagonal, its entries."""
    return outputs if outputs.shape[-1] > 1 else outputs[:, 0, 0]


def _input_moments(
    dense: BlockWeights, streams: Streams, curvature: dict[str, MapCurvature], batch: int
) -> dict[str, Float[Array, "_ _"]]:
    """``A = Σ_t ω_t x_t x_tᵀ / Σ_t ω_t`` of every map, over the windows that have weights."""
    windows = min(len(felt.token_weights) for felt in curvature.values())
    totals: dict[str, Array] = {}
    for start in range(0, windows, batch):
        part = slice(start, min(start + batch, windows))
        weights = {name: jnp.asarray(felt.token_weights[part]) for name, felt in curvature.items()}
        sums = _weighted_squares(dense, streams.pruned[part], weights, streams.config)
        totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
    scales = {name: max(float(felt.token_weights.sum()), 1e-30) for name, felt in curvature.items()}
    return {name: total / scales[name] for name, total in totals.items()}


@partial(jax.jit, static_argnames="config")
def _weighted_squares(
    dense: BlockWeights,
    hidden: Float[Array, "b n d"],
    weights: dict[str, Float[Array, "b n"]],
    config: LlamaConfig,
) -> dict[str, Float[Array, "_ _"]]:
    inputs = block(dense, hidden, config)[1]
    sums = {}
    for name, omega in weights.items():
        x = getattr(inputs, INPUT_OF[name])
        x = x.astype(accumulation_dtype(x))
        sums[name] = contract("bnd,bne->de", x * omega[..., None], x)
    return sums
