"""Pruning ``W_Q`` and ``W_K`` of a layer on its attention matrices, exact with RoPE and GQA.

What a model stores stays what it stores: two projections, with zeros in them. The attention
matrices are those of the model, positions and grouped heads included, so that a key head's mask
feels every query head it serves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxprune.attention import (
    AttentionForm,
    accumulation_dtype,
    check_finite,
    contract,
    qr,
    row_errors,
)
from jaxprune.convergence.theorem import per_step
from jaxprune.descent.gradual import (
    gradual_descent,
    refit_descent,
    split_sequences,
    validation_samples,
)
from jaxprune.descent.loop import Descent, Trace, descend
from jaxprune.descent.relaxations import cubic_sparsity, straight_through
from jaxprune.errors import InputError
from jaxprune.gauss_newton import prune_query_key_on, query_key_moments
from jaxprune.importance import Importance, column_sensitivity, feature_norms, importance
from jaxprune.objective import softmax_error
from jaxprune.sharding import AXES, over_mesh
from jaxprune.sparsity import Group, Sparsity

# Weight of attention's output beside its matrices; see ``output_maps``.
OUTPUT_WEIGHT = 2.0
# Updates of the descent from dense weights. From the closed form fewer are enough.
GRADUAL_STEPS = 1200
# Dense queries, keys and values of all sequences are kept up to this size.
_CACHED_BYTES = 2 * 2**30

PRESETS = ("gauss_newton", "descent")
STARTS = ("gauss_newton", "dense")

Projections = tuple[Array, Array]  # wq [d, heads·k] and wk [d, kv_heads·k]


class QueryKeySettings(NamedTuple):
    """Choices that are static under ``jit``.

    Attributes:
      heads: query heads.
      kv_heads: key heads; each serves ``heads / kv_heads`` consecutive query heads.
      scale: of the logits.
      sparsity: of each matrix.
      steps: updates.
      batch_size: sequences of a step.
      learning_rate: Adam's step under a mask that tightens, in units of the mean ``|w|`` of a
        matrix.
      refit_learning_rate: the same under given masks.
      mask_learning_rate: the same for mask scores, in units of their mean, without ``refit``.
      refit: kept weights adapt; else only the mask is learned and they keep their values.
      output_weight: of the error of attention's output beside that of its matrices, in descents.
      moment_sequences: from which the closed form takes its curvature.
      tightened: part of the steps after which the mask has its final size.
      columns_compete: weights of a whole matrix compete; else every output column keeps as many,
        ranked by Wanda's score.
      monitor: a descent records in its trace what ``jaxprune.convergence.report`` needs.
    """

    heads: int
    kv_heads: int
    scale: float
    sparsity: Sparsity
    steps: int = 100
    batch_size: int = 8
    learning_rate: float = 0.15
    refit_learning_rate: float = 0.05
    mask_learning_rate: float = 0.003
    refit: bool = True
    output_weight: float = OUTPUT_WEIGHT
    moment_sequences: int = 64
    tightened: float = 0.4
    columns_compete: bool = True
    monitor: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrunedQueryKey:
    """Pruned projections of a layer and how they came about.

    Attributes:
      wq: query projection, exact zeros where dropped.
      wk: key projection.
      keep_q: True where kept.
      keep_k: True where kept.
      trace: loss and squared gradient norm at every step, validation errors.
      calibration_error: relative error of every query head's attention matrices on ``x``.
      best_step: step of the iterate that was kept; 0 is the initial ranking.
      rejected_steps: updates left out because they were not finite.
    """

    wq: Float[Array, "*l d h k"]
    wk: Float[Array, "*l d g k"]
    keep_q: Bool[Array, "*l d h k"]
    keep_k: Bool[Array, "*l d g k"]
    trace: Trace
    calibration_error: Float[Array, "*l h"]
    best_step: Int[Array, "*l"]
    rejected_steps: Int[Array, "*l"]


def prune_query_key(
    x: Float[Array, "b n d"],
    wq: Float[Array, "d h k"],
    wk: Float[Array, "d g k"],
    sparsity: Sparsity | Any,
    *,
    rope: Float[Array, " f"] | None,
    scale: float | None = None,
    preset: str = "descent",
    start: str = "gauss_newton",
    refit: bool = True,
    steps: int | None = None,
    x_dense: Float[Array, "b n d"] | None = None,
    wv: Float[Array, "d g k"] | None = None,
    wo: Float[Array, "h k d_out"] | None = None,
    query_bias: Float[Array, "h k"] | None = None,
    key_bias: Float[Array, "g k"] | None = None,
    query_norm: Float[Array, " k"] | None = None,
    key_norm: Float[Array, " k"] | None = None,
    norm_eps: float = 1e-6,
    key: Key[Array, ""] | None = None,
    monitor: bool = False,
) -> PrunedQueryKey:
    """Prune ``W_Q`` and ``W_K`` of a layer so that its attention matrices are kept.

    Minimises the mean over sequences of ``½ Σ_heads ‖C‖²``, ``C = softmax(q̃ k̃ᵀ) − softmax(q kᵀ)``,
    with ``q = rope(x W_Q)·scale`` and ``k = rope(x W_K)``, causal.

    ``gauss_newton`` minimises its Gauss–Newton form in closed form, heads weighed by ``1/‖F_h‖``,
    on the first 64 sequences at most (``prune_closed_form``).
    ``descent`` goes on from there: kept weights adapt to the error itself. From ``dense`` weights
    it finds the mask too, which tightens on a cubic schedule (``descent.gradual``). Given ``wv``
    and ``wo``, what ``C`` does to the output, ``½ Σ_heads ‖C x W_V W_O‖²``, counts in a descent
    too (``output_maps``). Every eighth sequence validates; a descent that helps nothing returns
    what it started from.

    Args:
      x: inputs of the projections, ``b`` sequences.
      wq: query projection of all heads.
      wk: key projection; each key head serves ``h/g`` consecutive query heads.
      sparsity: of each matrix, ``Sparsity`` or what ``Sparsity.parse`` reads; columns differ.
      rope: inverse frequencies, or ``None`` for no positions.
      scale: of the logits; ``1/√k`` if ``None``.
      preset: ``"gauss_newton"`` or ``"descent"``.
      start: of ``descent``: ``"gauss_newton"`` or ``"dense"``.
      refit: let kept weights adapt; else they keep their dense values under the mask.
      steps: updates of ``descent``, where kept weights adapt; if ``None``, 100, or 1200 from
        ``dense``.
      x_dense: inputs that define the dense attention, where ``x`` comes from a pruned model; ``x``
        if ``None``.
      wv: value projection of the layer, with ``wo``.
      wo: output projection; of both or neither. They are not pruned.
      query_bias: added to ``x W_Q``, where the architecture has one.
      key_bias: added to ``x W_K``.
      query_norm: scale of the RMS norm over every query head, where the architecture has one.
      key_norm: scale of that over every key head.
      norm_eps: added to the mean square in these norms.
      key: randomness of the batches; ``jax.random.key(0)`` if ``None``.
      monitor: record in the trace of ``descent`` what ``jaxprune.convergence.report`` needs. Adam
        is no gradient descent, whose descent lemma the report checks: it says so.

    Raises:
      InputError: shapes, sparsity, preset or values are wrong.

    Source: the objective of Liang et al. 2025, Def. 3.2, on the factored, rotated logits.
    """
    sparsity = Sparsity.parse(sparsity)
    for name, value, known in (("preset", preset, PRESETS), ("start", start, STARTS)):
        if value not in known:
            raise InputError(f"{name} {value!r:.40}: expected {' or '.join(known)}")
    if steps is not None:
        if preset == "gauss_newton" or not (refit or start == "dense"):
            raise InputError(f"steps {steps}: no step is taken here; leave it out")
        if steps < 0:
            raise InputError(f"steps {steps}: expected a number of updates, 0 or more")
    x0 = x if x_dense is None else x_dense
    _check_layer(x, x0, wq, wk, rope)
    form = AttentionForm(
        rope,
        None if query_bias is None else query_bias.reshape(-1),
        None if key_bias is None else key_bias.reshape(-1),
        query_norm,
        key_norm,
        norm_eps,
    )
    _check_form(wq, wk, form)
    _check_output(wq, wk, wv, wo)
    sparsity.check_divides(wq.shape[0])
    check_finite(x=x, wq=wq, wk=wk, x_dense=x_dense, rope=rope, wv=wv, wo=wo)
    check_finite(query_bias=query_bias, key_bias=key_bias)
    check_finite(query_norm=query_norm, key_norm=key_norm)
    # What moves, and the moments of its optimiser, are float32 or wider.
    wq, wk = (w.astype(accumulation_dtype(w)) for w in (wq, wk))
    settings = QueryKeySettings(
        heads=wq.shape[1],
        kv_heads=wk.shape[1],
        scale=wq.shape[2] ** -0.5 if scale is None else scale,
        sparsity=sparsity,
        refit=refit,
        monitor=monitor,
    )
    if steps is None:
        steps = GRADUAL_STEPS if start == "dense" else settings.steps
    settings = settings._replace(steps=steps)
    traced = isinstance(sparsity.ratio, jax.core.Tracer)
    key = jax.random.key(0) if key is None else key
    choices: dict[str, Any] = {"settings": settings, "preset": preset, "start": start}
    return (_prune if traced else _prune_jitted)(x, x0, wq, wk, form, wv, wo, key, **choices)


def _check_layer(x: Array, x0: Array, wq: Array, wk: Array, rope: Array | None) -> None:
    if (
        (x.ndim, wq.ndim, wk.ndim) != (3, 3, 3)
        or x.shape != x0.shape
        or not x.shape[2] == wq.shape[0] == wk.shape[0]
        or wq.shape[2] != wk.shape[2]
        or wq.shape[1] % wk.shape[1]
        or (rope is not None and rope.shape != (wq.shape[2] // 2,))
    ):
        raise InputError(
            f"x {x.shape}, x_dense {x0.shape}, wq {wq.shape}, wk {wk.shape}, rope "
            f"{None if rope is None else rope.shape} do not match: expected [b, n, d] twice, "
            "[d, heads, k], [d, kv_heads, k] with kv_heads dividing heads, and [k/2]"
        )


def _check_form(wq: Array, wk: Array, form: AttentionForm) -> None:
    expected = {
        "query_bias": (form.query_bias, wq.shape[1] * wq.shape[2]),
        "key_bias": (form.key_bias, wk.shape[1] * wk.shape[2]),
        "query_norm": (form.query_norm, wq.shape[2]),
        "key_norm": (form.key_norm, wk.shape[2]),
    }
    for name, (array, size) in expected.items():
        if array is not None and array.size != size:
            raise InputError(
                f"{name} has {array.size} entries, but wq {wq.shape} and wk {wk.shape} need {size}"
            )


def _check_output(wq: Array, wk: Array, wv: Array | None, wo: Array | None) -> None:
    if (wv is None) != (wo is None):
        raise InputError("wv and wo: expected both or neither")
    if wv is None or wo is None:
        return
    if (
        (wv.ndim, wo.ndim) != (3, 3)
        or wv.shape[:2] != wk.shape[:2]
        or wo.shape[:2] != (wq.shape[1], wv.shape[2])
    ):
        raise InputError(
            f"wv {wv.shape} and wo {wo.shape} do not match wq {wq.shape} and wk {wk.shape}: "
            "expected [d, kv_heads, k] and [heads, k, d]"
        )


class ClosedForm(NamedTuple):
    """Projections pruned in closed form.

    Attributes:
      weights: ``wq`` and ``wk``, exact zeros where dropped.
      keep_masks: True where kept.
      predicted_error: of each, ``½ tr(A E B Eᵀ)`` over sequences, what the curvature expects.
    """

    weights: Projections
    keep_masks: tuple[Bool[Array, "d e"], Bool[Array, "d f"]]
    predicted_error: tuple[Float[Array, ""], Float[Array, ""]]


def prune_closed_form(
    x: Float[Array, "b n d"],
    dense: Projections,
    form: AttentionForm,
    key: Key[Array, ""],
    *,
    settings: QueryKeySettings,
    sparsity: tuple[Sparsity, Sparsity] | None = None,
) -> ClosedForm:
    """Prune both projections on the Gauss–Newton form of the error of the attention matrices.

    Each minimises ``½ tr(A E B Eᵀ)``, to second order the mean over sequences of
    ``½ Σ_heads ‖F̃_h − F_h‖² / ‖F_h‖``, ``F̃_h = softmax(q̃ kᵀ)``, ``F_h = softmax(q kᵀ)``, with the
    other one dense, see ``jaxprune.gauss_newton``.

    Args:
      x: inputs of the projections.
      dense: projections.
      form: what is done to the projections' outputs before the softmax.
      key: randomness of the cotangents.
      settings: heads, scale, sparsity.
      sparsity: of each projection, where they differ from ``settings.sparsity``.
    """
    d = x.shape[-1]
    wq, wk = dense[0].reshape(d, settings.heads, -1), dense[1].reshape(d, settings.kv_heads, -1)
    moments = query_key_moments(
        x,
        wq,
        wk,
        form=form,
        scale=settings.scale,
        sequences=min(settings.moment_sequences, x.shape[0]),
        key=key,
    )
    sparsity = (settings.sparsity, settings.sparsity) if sparsity is None else sparsity
    q, k = prune_query_key_on(moments, wq, wk, sparsity, group=_group(settings))
    return ClosedForm((q.weight, k.weight), (q.keep_mask, k.keep_mask), (q.loss, k.loss))


@partial(jax.jit, static_argnames=("settings", "preset", "start"))
def _prune_jitted(*arrays: Any, **choices: Any) -> PrunedQueryKey:
    return _prune(*arrays, **choices)


def _prune(
    x: Array,
    x0: Array,
    wq: Array,
    wk: Array,
    form: AttentionForm,
    wv: Array | None,
    wo: Array | None,
    key: Array,
    *,
    settings: QueryKeySettings,
    preset: str,
    start: str,
) -> PrunedQueryKey:
    dense = (wq.reshape(wq.shape[0], -1), wk.reshape(wk.shape[0], -1))
    if preset == "descent" and start == "dense":
        make, weights, kept = query_key_descent, dense, None
    else:
        closed = prune_closed_form(x, dense, form, key, settings=settings)
        make, weights, kept = query_key_refit, closed.weights, closed.keep_masks
        if not settings.refit:
            weights = (jnp.where(kept[0], dense[0], 0), jnp.where(kept[1], dense[1], 0))
    if kept is not None and (preset == "gauss_newton" or not settings.refit):
        empty = jnp.zeros(0, accumulation_dtype(x))
        zero = jnp.zeros((), jnp.int32)
        return _result(
            x, x0, wq, wk, form, settings, weights, kept, Trace(empty, empty, empty), zero, zero
        )
    fit_x0 = split_sequences({"x0": x0})[0]["x0"]
    context = query_key_context(dense, fit_x0, form, settings, wv, wo)
    fit, validation = split_sequences(query_key_data(x, x0, context, settings))
    context = (
        query_key_importance(context, fit, settings)
        if kept is None
        else context._replace(keep_masks=kept)
    )
    result = descend(make(weights, context, settings), weights, fit, key=key, validation=validation)
    assert result.state.best is not None
    step, rejected = result.state.best.step, result.state.rejected
    return _result(
        *(x, x0, wq, wk, form, settings, result.weights, result.keep_masks),
        *(result.trace, step, rejected),
    )


def _result(
    x: Array,
    x0: Array,
    wq: Array,
    wk: Array,
    form: AttentionForm,
    settings: QueryKeySettings,
    weights: Projections,
    keep_masks: tuple[Array, Array],
    trace: Trace,
    best_step: Array,
    rejected: Array,
) -> PrunedQueryKey:
    dense = (wq.reshape(wq.shape[0], -1), wk.reshape(wk.shape[0], -1))
    error, energy = head_errors(x, weights, x0, dense, form, settings)
    return PrunedQueryKey(
        wq=weights[0].reshape(wq.shape),
        wk=weights[1].reshape(wk.shape),
        keep_q=keep_masks[0].reshape(wq.shape),
        keep_k=keep_masks[1].reshape(wk.shape),
        trace=trace,
        calibration_error=error / energy,
        best_step=best_step,
        rejected_steps=rejected,
    )


def queries_and_keys(
    x: Float[Array, "*b n d"],
    weights: Projections,
    form: AttentionForm,
    settings: QueryKeySettings,
) -> tuple[Float[Array, "*b g r n k"], Float[Array, "*b g 1 n k"]]:
    """Rotated queries, scale included, and keys; logits are their inner products.

    Args:
      x: inputs of the projections.
      weights: ``wq`` and ``wk``, heads one after the other on the output axis.
      form: what is done to the projections' outputs before the softmax.
      settings: heads and scale.

    Returns:
      Query heads grouped by the key head they share; key heads with an axis to broadcast.
    """
    y_q, y_k = (contract("...nd,de->...ne", x, w.astype(x.dtype)).astype(x.dtype) for w in weights)
    return grouped_heads(y_q, y_k, form, settings)


def grouped_heads(
    y_q: Float[Array, "*b n e"],
    y_k: Float[Array, "*b n f"],
    form: AttentionForm,
    settings: QueryKeySettings,
) -> tuple[Float[Array, "*b g r n k"], Float[Array, "*b g 1 n k"]]:
    """``queries_and_keys`` from the outputs of the two projections."""
    q = form.queries(y_q, settings.heads) * settings.scale
    k = form.keys(y_k, settings.kv_heads)
    shared = settings.heads // settings.kv_heads
    return q.reshape(*q.shape[:-3], settings.kv_heads, shared, *q.shape[-2:]), k[..., None, :, :]


class QueryKeyContext(NamedTuple):
    """Arrays of a layer's descent besides weights and data.

    Attributes:
      form: what is done to the projections' outputs before the softmax.
      dense: projections that define the attention.
      outputs: of ``output_maps``, ``None`` where the output does not count.
      importance: factors of ``|w|`` in the ranking, for each projection, where the descent finds
        the mask.
      keep_masks: the masks, where they are given.
    """

    form: AttentionForm
    dense: Projections
    outputs: Float[Array, "d h v"] | None
    importance: tuple[Importance, Importance] | None = None
    keep_masks: tuple[Bool[Array, "d e"], Bool[Array, "d f"]] | None = None


def output_maps(
    x: Float[Array, "b n d"],
    wv: Float[Array, "d g k"],
    wo: Float[Array, "h k d_out"],
    weight: float,
) -> Float[Array, "d h v"]:
    """Maps from inputs to values whose errors are those of attention's output, head by head.

    With ``W_O,h = L_h Q_h``, ``Q_h`` of orthonormal rows, ``‖C x W_V W_O,h‖ = ‖C x W_V L_h‖``: a
    head's output is compared at the width of a head. Scaled so that with ``weight`` 1 the outputs
    of two random tokens differ as much as two attention rows that each see one of them, on average
    over heads: then the objective does not depend on the scale of ``W_V`` and ``W_O``.

    Args:
      x: inputs of the value projection.
      wv: value projection.
      wo: output projection; ``h/g`` consecutive query heads share values.
      weight: of the output's error beside the matrices'; zero leaves it out.
    """
    heads, shared = wo.shape[0], wo.shape[0] // wv.shape[1]
    # W_Oᵀ = Q R, so W_O = Rᵀ Qᵀ.
    triangles = jax.vmap(lambda w: qr(w.T)[1].T)(wo)
    maps = contract("dhk,hkv->dhv", jnp.repeat(wv, shared, axis=1), triangles)
    centred = x - jnp.mean(x, axis=(0, 1))
    covariance = contract("bnd,bne->de", centred, centred) / (x.shape[0] * x.shape[1])
    variance = contract("dhv,de,ehv->", maps, covariance, maps) / heads
    return maps * jnp.sqrt(weight / jnp.where(variance > 0, variance, 1)).astype(maps.dtype)


def query_key_data(
    x: Float[Array, "b n d"],
    x0: Float[Array, "b n d"],
    context: QueryKeyContext,
    settings: QueryKeySettings,
) -> PyTree:
    """What a step looks at: ``x``, and dense queries, keys and values where memory allows.

    They are the same in every step. They are kept where those of all sequences take at most
    ``_CACHED_BYTES``; else a step has ``x0`` and computes them.

    Args:
      x: inputs of the pruned projections.
      x0: inputs of the dense ones.
      context: of the layer.
      settings: heads and scale.
    """
    wq, wk = context.dense
    values = 0 if context.outputs is None else context.outputs[0].size
    width = wq.shape[1] + wk.shape[1] + values
    if x0.shape[0] * x0.shape[1] * width * x0.dtype.itemsize > _CACHED_BYTES:
        return {"x": x, "x0": x0}
    q0, k0, v = _dense_attention(x0, context, settings)
    return {"x": x, "q0": q0, "k0": k0} | ({} if v is None else {"values": v})


@partial(jax.jit, static_argnames="settings")
def _dense_attention(
    x0: Float[Array, "b n d"], context: QueryKeyContext, settings: QueryKeySettings
) -> tuple[Array, Array, Array | None]:
    return _targets({"x0": x0}, context, settings)


def _targets(
    batch: PyTree, context: QueryKeyContext, settings: QueryKeySettings
) -> tuple[Array, Array, Array | None]:
    """Dense queries, keys and values of a batch, kept or computed now."""
    if "q0" in batch:
        return batch["q0"], batch["k0"], batch.get("values")
    q0, k0 = queries_and_keys(batch["x0"], context.dense, context.form, settings)
    if context.outputs is None:
        return q0, k0, None
    grouped = context.outputs.reshape(context.outputs.shape[0], *q0.shape[1:3], -1)
    return q0, k0, contract("bnd,dgrv->bgrnv", batch["x0"], grouped).astype(q0.dtype)


def _sample_errors(
    context: QueryKeyContext, settings: QueryKeySettings, weights: Projections, batch: PyTree
) -> Float[Array, " samples"]:
    """Objective of every sample, summed over heads."""
    q, k = queries_and_keys(batch["x"], weights, context.form, settings)
    q0, k0, values = _targets(batch, context, settings)

    def errors(q: Array, k: Array, q0: Array, k0: Array, values: Array | None) -> Array:
        return softmax_error(q, k, q0, k0, values=values)

    return validation_samples(over_mesh(errors, *AXES)(q, k, q0, k0, values))


@partial(jax.jit, static_argnames="settings")
def query_key_context(
    dense: Projections,
    x0: Float[Array, "b n d"],
    form: AttentionForm,
    settings: QueryKeySettings,
    wv: Float[Array, "d g k"] | None = None,
    wo: Float[Array, "h k d_out"] | None = None,
) -> QueryKeyContext:
    """What a descent of a layer needs to know besides its data.

    Args:
      dense: projections that define the attention.
      x0: inputs of the dense projections.
      form: what is done to the projections' outputs before the softmax.
      settings: static choices.
      wv: value projection; with ``wo``, the output counts too.
      wo: output projection.
    """
    outputs = None
    if wv is not None and wo is not None and settings.output_weight:
        outputs = output_maps(x0, wv, wo, settings.output_weight)
    return QueryKeyContext(form, dense, outputs)


@partial(jax.jit, static_argnames="settings")
def query_key_importance(
    context: QueryKeyContext, fit: PyTree, settings: QueryKeySettings
) -> QueryKeyContext:
    """The context with what ranks weights in ``query_key_descent``.

    Args:
      context: of ``query_key_context``.
      fit: of ``query_key_data``, without what validates.
      settings: static choices.
    """
    sample_errors = partial(_sample_errors, context, settings)
    sensitivity = column_sensitivity(
        lambda weights, batch: jnp.mean(sample_errors(weights, batch)),
        context.dense,
        fit,
        batch_size=settings.batch_size,
    )
    norms = feature_norms(fit["x"])
    if not settings.columns_compete:
        even = tuple(Importance(norms, jnp.ones_like(s)) for s in sensitivity)
        return context._replace(importance=(even[0], even[1]))
    ranked = tuple(importance(w, norms, s) for w, s in zip(context.dense, sensitivity, strict=True))
    return context._replace(importance=(ranked[0], ranked[1]))


def _group(settings: QueryKeySettings) -> Group:
    return "matrix" if settings.columns_compete else "output"


def query_key_descent(
    weights: Projections, context: QueryKeyContext, settings: QueryKeySettings
) -> Descent:
    """A descent from dense weights that finds the mask, ready to run.

    Args:
      weights: dense projections.
      context: of ``query_key_importance``.
      settings: static choices.
    """
    assert context.importance is not None
    ranks, sample_errors = context.importance, partial(_sample_errors, context, settings)

    def objective(weights: Projections, batch: PyTree) -> Float[Array, ""]:
        return jnp.mean(sample_errors(weights, batch))

    def rank(weights: Projections) -> PyTree:
        return tuple(i.score(w) for w, i in zip(weights, ranks, strict=True))

    steps, group = settings.steps, _group(settings)
    if settings.refit:
        descent = gradual_descent(
            objective,
            weights,
            settings.sparsity,
            rank=rank,
            group=group,
            steps=steps,
            learning_rate=settings.learning_rate,
            anchor_weight=0.0,
            batch_size=settings.batch_size,
            tightened=settings.tightened,
            sample_errors=sample_errors,
        )
        return _monitored(descent, settings)
    decay = optax.cosine_decay_schedule(settings.mask_learning_rate, max(steps, 1))
    descent = Descent(
        objective=objective,
        relaxation=straight_through(
            settings.sparsity, rank=rank, schedule=cubic_sparsity(max(steps, 1)), group=group
        ),
        optimizer=optax.adam(decay),
        sparsity=settings.sparsity,
        steps=steps,
        batch_size=settings.batch_size,
        sample_errors=sample_errors,
    )
    return _monitored(descent, settings)


def _monitored(descent: Descent, settings: QueryKeySettings) -> Descent:
    return replace(descent, monitor=per_step if settings.monitor else None)


def query_key_refit(
    weights: Projections, context: QueryKeyContext, settings: QueryKeySettings
) -> Descent:
    """A descent on the kept weights of given masks, ready to run.

    Args:
      weights: pruned projections to start from.
      context: with ``keep_masks``.
      settings: static choices.
    """
    descent = refit_descent(
        partial(_sample_errors, context, settings),
        weights,
        context.keep_masks,
        steps=settings.steps,
        learning_rate=settings.refit_learning_rate,
        batch_size=settings.batch_size,
    )
    return _monitored(descent, settings)


@partial(jax.jit, static_argnames="settings")
def head_errors(
    x: Float[Array, "b n d"],
    weights: Projections,
    x0: Float[Array, "b n d"],
    dense: Projections,
    form: AttentionForm,
    settings: QueryKeySettings,
) -> tuple[Float[Array, " h"], Float[Array, " h"]]:
    """Squared error and energy of every query head's attention matrices, summed over sequences.

    Their quotient is the relative error of the head.

    Args:
      x: inputs of the pruned projections.
      weights: pruned ``wq`` and ``wk``, heads flattened.
      x0: inputs of the dense projections.
      dense: dense ``wq`` and ``wk``.
      form: what is done to the projections' outputs before the softmax.
      settings: heads and scale.
    """

    def one(sequence: tuple[Array, Array]) -> tuple[Array, Array]:
        x, x0 = sequence
        pruned = queries_and_keys(x, weights, form, settings)
        target = queries_and_keys(x0, dense, form, settings)
        errors = over_mesh(row_errors, "heads")(*pruned, *target)
        return tuple(a.sum(axis=-1).reshape(-1) for a in errors)

    error, energy = jax.lax.map(one, (x, x0))
    return error.sum(axis=0), energy.sum(axis=0)
