"""Linear maps of a block in closed form, on the curvature of the model's predictions."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.attention import accumulation_dtype, contract
from jaxprune.gauss_newton import (
    Factor,
    PrunedKronecker,
    factorise,
    kronecker_admm,
    redamped,
    ridge_solution,
)
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llama.modeling import INPUT_OF, BlockWeights, block
from jaxprune.pipeline.curvature import MapCurvature
from jaxprune.pipeline.settings import PruneSettings
from jaxprune.pipeline.streams import Streams
from jaxprune.pipeline.work import Solution, upcast
from jaxprune.sparsity import Sparsity

# On all maps of SmolLM2-135M 15 gave the same divergence as 40, and their products are most of the
# time. W_Q and W_K alone take seconds: on a model of 260,000 parameters 40 left a tenth less.
_ITERATIONS = {"all": 15, "qk": 40}
# What every output counts at least, in parts of the mean. A head of SmolLM2-135M has queries felt
# less than a millionth as much as others: they were used to make up for other heads' errors, with
# weights a thousand times as large as before, which no second order describes.
_FLOOR = 1e-3
# Ridge of what takes back the stream's error, a fraction of every input's moment, in units of the
# model's width over the calibration tokens: few tokens say little about so many coefficients. On
# the first eight blocks of SmolLM2-135M, 576 wide, and 64 windows of 512 tokens, 0.3 was best; with
# 0.01, that of the moments, the best share was a half, and left 3 % more divergence than 0.6 does.
_RIDGE = 0.3 * (64 * 512) / 576


def block_closed_form(
    dense: BlockWeights,
    streams: Streams,
    curvature: dict[str, MapCurvature],
    sparsity: dict[str, Sparsity],
    settings: PruneSettings,
) -> Solution:
    """Minimise ``½ tr(A E B Eᵀ)`` for every pruned map, ``A`` on the model as pruned so far.

    ``A`` is the mean over all tokens of all windows, each counting once. Weights ``ω_t = ‖g_t‖²``,
    as for one layer's attention, would let few tokens decide: of ``W_V`` of SmolLM2-135M 0.3 % of
    them, and no divergence was lower for it.

    ``W_O`` and ``W_down`` write to the residual stream, whose error so far is partly a linear map
    ``Δ`` of their inputs. ``E`` is what they lack of ``W + α Δ``, ``α`` the setting ``correction``.
    On the first eight blocks of SmolLM2-135M ``α = 0.6`` left 17 % less divergence than nothing,
    ``0.4`` 15 %, and ``1``, which fits what the calibration tokens alone have, 13 %. ``W_down``
    comes last, so that it sees what the block's other maps have lost.

    Args:
      dense: weights of the block.
      streams: the pruned one gives the inputs, the dense one what the stream should be.
      curvature: ``B`` of every map, by its name.
      sparsity: of every map.
      settings: the pruned maps, the share of the correction, windows at once.
    """
    results: dict[str, PrunedKronecker] = {}
    pruned = dense
    for group, last in ((_FIRST, "wo"), (("w_down",), "w_down")):
        names = tuple(name for name in group if name in settings.names)
        if not names:
            continue
        writer = last if last in names else None
        moments, cross = _statistics(dense, pruned, streams, names, writer, settings)
        # One factor for all maps that have their input in common.
        factors = {field: factorise(moments.pop(field)) for field in tuple(moments)}
        for name in names:
            factor = factors[INPUT_OF[name]]
            results[name] = kronecker_admm(
                _goal(
                    getattr(dense, name),
                    factor,
                    cross if name == writer else None,
                    streams,
                    settings,
                ),
                factor,
                _blocks(curvature[name].outputs),
                sparsity[name],
                iterations=_ITERATIONS[settings.targets],
            )
        pruned = pruned._replace(
            **{name: results[name].weight.astype(getattr(dense, name).dtype) for name in names}
        )
    return Solution(
        {name: result.weight for name, result in results.items()},
        {name: result.keep_mask for name, result in results.items()},
        {"predicted_divergence": float(sum(result.loss for result in results.values()))},
    )


_FIRST = tuple(name for name in INPUT_OF if name != "w_down")


def _goal(
    dense: Array,
    factor: Factor,
    cross: Array | None,
    streams: Streams,
    settings: PruneSettings,
) -> Float[Array, "d_in d_out"]:
    """The weight, and the share of the stream's error that it is to take back."""
    if cross is None:
        return upcast(dense)
    windows, length, width = streams.pruned.shape
    ridge = _RIDGE * width / (windows * length)
    return upcast(dense) + settings.correction * ridge_solution(redamped(factor, ridge), cross)


def _blocks(outputs: Float[Array, "p k k"]) -> Array:
    """Blocks of ``B`` with a floor on the diagonal; of a diagonal, its entries."""
    width = outputs.shape[-1]
    mean = jnp.mean(jnp.diagonal(outputs, axis1=-2, axis2=-1))
    floored = outputs + _FLOOR * mean * jnp.eye(width, dtype=outputs.dtype)
    return floored if width > 1 else floored[:, 0, 0]


def _statistics(
    dense: BlockWeights,
    pruned: BlockWeights,
    streams: Streams,
    names: tuple[str, ...],
    writer: str | None,
    settings: PruneSettings,
) -> tuple[dict[str, Array], Array | None]:
    """Second moments of the inputs of maps, and the cross moment of the writer among them.

    Means over all tokens, on the block as pruned so far; the cross moment is with the stream's
    error.
    """
    fields = tuple(sorted({INPUT_OF[name] for name in names}))
    windows = streams.pruned.shape[0]
    total = None
    for start in range(0, windows, settings.batch):
        here = slice(start, start + settings.batch)
        target = None
        if settings.correction and writer is not None:
            assert streams.target is not None
            target = streams.dense[here], streams.target[here]
        hidden = streams.pruned[here]
        part = _batch_statistics(
            dense, pruned, hidden, target, streams.config, fields, writer, hidden.shape[0] / windows
        )
        total = part if total is None else jax.tree.map(lambda a, b: a + b, total, part)
    assert total is not None
    return total


@partial(jax.jit, static_argnames=("config", "fields", "writer"))
def _batch_statistics(
    dense: BlockWeights,
    pruned: BlockWeights,
    hidden: Float[Array, "b n d"],
    target: tuple[Float[Array, "b n d"], Float[Array, "b n d"]] | None,
    config: LlamaConfig,
    fields: tuple[str, ...],
    writer: str | None,
    share: Float[Array, ""],
) -> tuple[dict[str, Array], Array | None]:
    after, inputs = block(pruned, hidden, config)
    moments = {f: _moment(getattr(inputs, f), getattr(inputs, f), share) for f in fields}
    if target is None or writer is None:
        return moments, None
    x = getattr(inputs, INPUT_OF[writer])
    if writer == "w_down":
        error = target[1] - after
    else:
        # Before the MLP: what came in, and what attention has added.
        difference = block(dense, target[0], config)[1].output - x
        error = target[0] - hidden + contract("bni,io->bno", difference, dense.wo)
    return moments, _moment(x, error, share)


def _moment(
    x: Float[Array, "b n d"], y: Float[Array, "b n e"], share: Array
) -> Float[Array, "d e"]:
    """Mean of ``x yᵀ`` over the tokens of a batch that is such a share of all."""
    kind = accumulation_dtype(x)
    mean = contract("bnd,bne->de", x.astype(kind), y.astype(kind)) / (x.shape[0] * x.shape[1])
    return share * mean
