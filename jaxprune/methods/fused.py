"""Pruning the fused attention weight ``W = W_Q W_Kᵀ`` of one head: presets of the descent.

``paper`` is Algorithm 1 to the letter, ``gauss_newton`` its error to second order in closed form,
``descent`` goes on from there on the error itself. All return a weight and a keep mask with exact
counts. For several heads, seeds or sparsities, ``jax.vmap``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PyTree

from jaxprune.attention import (
    accumulation_dtype,
    check_finite,
    check_fused,
    check_row_weights,
    contract,
    relative_error,
    row_errors,
)
from jaxprune.convergence.curvature import certified_lipschitz
from jaxprune.convergence.step_sizes import StepRule, gradient_descent
from jaxprune.convergence.theorem import per_step
from jaxprune.descent.gradual import (
    gradual_descent,
    refit_descent,
    split_axis,
    split_sequences,
)
from jaxprune.descent.loop import Descent, DescentResult, Trace, descend
from jaxprune.descent.relaxations import none
from jaxprune.errors import InputError
from jaxprune.gauss_newton import Factor, factorise, fused_moments, kronecker_admm, redamped
from jaxprune.importance import fused_ranking
from jaxprune.objective import fused_error
from jaxprune.sparsity import Sparsity, keep_mask

Preset = Literal["paper", "gauss_newton", "descent"]
Start = Literal["gauss_newton", "dense"]

# Grids of Algorithm 1. λ is relative to the root mean square of the error's gradient at M = 0,
# which follows the scale of the weights; step sizes are given as the decay η·λ of a mask entry
# in one step that the regulariser alone would cause.
_LAMBDA_MULTIPLES = (0.01, 0.1, 1.0, 10.0, 100.0)
DECAYS = (0.003, 0.01, 0.03, 0.1)
GRID_POINTS = len(_LAMBDA_MULTIPLES) * len(DECAYS)


class _DescentDefaults(NamedTuple):
    """What preset ``descent`` takes where nothing is given.

    Attributes:
      steps: updates.
      learning_rate: Adam's step in units of the mean ``|w|``.
      anchor_weight: of the distance to the dense weights.
      shuffled: probability that a sequence of a batch comes in a new order.
    """

    steps: int
    learning_rate: float
    anchor_weight: float
    shuffled: float


# With few sequences, shorter and closer to the dense weights; from so many on, the data bear more.
# On 40 heads of a small Llama with 128 sequences of 256 tokens the second left 0.0067 where the
# first left 0.0077, and real orders half of the time were better than always or never.
_MANY_SEQUENCES = 64
_FEW = _DescentDefaults(steps=400, learning_rate=0.05, anchor_weight=0.1, shuffled=1.0)
_MANY = _DescentDefaults(steps=600, learning_rate=0.1, anchor_weight=0.03, shuffled=0.5)


# Dampings of the closed form that are tried: the moments as they are, and shrunk to their diagonals
# by a tenth, a half and three quarters.
_DAMPINGS = (0.01, 0.1, 1.0, 3.0)
# Standard errors by which a closed form must beat the ranking on held-back rows.
_MARGIN = 3.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrunedAttention:
    """A pruned fused weight and how it came about.

    Attributes:
      weight: exact zeros where dropped.
      keep_mask: True where kept.
      trace: loss and squared gradient norm at every step, validation errors.
      lam: λ used (chosen from a grid where none was given); the anchor weight of ``descent``; the
        damping of ``gauss_newton``, infinite where the ranking stayed.
      learning_rate: step size used; NaN where a rule chose one at every step, or without steps.
      calibration_error: relative error of the attention on ``x``.
      initial_error: the same for the preset's initialisation, the rounded starting point.
      best_step: step of the iterate that was kept; 0 is the initialisation. The closed form is
        step 1 of ``gauss_newton``.
      rejected_steps: updates left out because they were not finite.
    """

    weight: Float[Array, "*b d d"]
    keep_mask: Bool[Array, "*b d d"]
    trace: Trace
    lam: Float[Array, "*b"]
    learning_rate: Float[Array, "*b"]
    calibration_error: Float[Array, "*b"]
    initial_error: Float[Array, "*b"]
    best_step: Int[Array, "*b"]
    rejected_steps: Int[Array, "*b"]


def prune_attention(
    x: Float[Array, "*b n d"],
    w: Float[Array, "d d"],
    sparsity: Sparsity | Any,
    *,
    preset: Preset = "paper",
    start: Start = "gauss_newton",
    lam: ArrayLike | None = None,
    learning_rate: ArrayLike | StepRule | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    causal: bool = True,
    row_weights: Float[Array, "*b n"] | None = None,
    key: Key[Array, ""] | None = None,
    monitor: bool = False,
) -> PrunedAttention:
    """Prune the fused attention weight of one head so that its attention matrix is kept.

    ``paper`` minimises ``½‖D̃⁻¹Ã − D⁻¹A‖_F² + ½λ‖M‖_F²`` over the mask by gradient descent from
    ``M = 1`` and keeps the largest entries of the last mask; kept weights are those of ``w``.

    ``gauss_newton`` minimises the error to second order at ``M = 1``, ``½ tr(A E B Eᵀ)`` with
    ``E = W̃ − W`` and ``B = Σ_i xᵀ J_i² x``, ``J_i = diag(F_i) − F_i F_iᵀ``, by
    ``gauss_newton.kronecker_admm``; kept weights adapt. A part of the calibration data is held
    back. On it, closed forms of the others at a few dampings are compared with the best entries
    by ``|w_ij| ‖x_i‖ ‖x_j‖``, and that ranking stays unless one is better beyond the noise: with
    few tokens ``A`` and ``B`` are noise. The damping chosen is used on all of the data.

    ``descent`` starts from what that comparison chose, and lets the kept weights adapt to the
    error itself (Adam, cosine decay, minibatches, a small pull to the start). With
    ``start="dense"`` it finds the mask too, the best by the ranking of the current weights, which
    tightens on a cubic schedule; see ``descent.relaxations.gradual``. Rows see the tokens of their
    sequence in a new random order at every step: the fused logits know no positions, and new
    orders show every query against other keys. From 64 sequences on it takes longer and larger
    steps with a weaker penalty, and keeps half of the orders. An iterate replaces the
    initialisation only where it is better on the data held back beyond its noise.

    Args:
      x: activations ``[n, d]`` or ``[b, n, d]``.
      w: fused weight, any scale ``1/√k`` included.
      sparsity: ``Sparsity`` or what ``Sparsity.parse`` reads; a ratio is of the whole matrix.
      preset: ``"paper"``, ``"gauss_newton"`` or ``"descent"``.
      start: of ``descent``: ``"gauss_newton"`` or ``"dense"``.
      lam: λ of ``paper``; if ``None``, a vmapped grid of λ (and step sizes), chosen on the
        calibration error. Damping of ``gauss_newton``; if ``None``, chosen on data held back. For
        ``descent``, weight of the penalty on the distance to the weights it starts from.
      learning_rate: η of ``paper`` (a grid if ``None``), or the name of a rule that chooses it,
        see ``convergence.gradient_descent``; of ``descent``, Adam's step in units of the mean of
        ``|w|``.
      steps: updates; if ``None``, 300 for ``paper``, 400 for ``descent``, or 600 from 64 sequences
        on; ``gauss_newton`` takes none.
      batch_size: sequences of a step; all for ``paper``, 4 for ``descent`` if ``None``.
      causal: Def. 3.2 if true, else Def. 1.2.
      row_weights: weight of every token's row in the error; zero leaves a row out.
      key: randomness of batches and orders; ``jax.random.key(0)`` if ``None``.
      monitor: record in the trace what ``jaxprune.convergence.report`` needs.

    Raises:
      InputError: a wrong sparsity, preset, shape or value.

    Source: Liang et al. 2025, Algorithm 1; that the last mask is rounded by its largest entries is
    our reading of it.
    """
    sparsity = Sparsity.parse(sparsity)
    check_fused(x, w)
    if w.ndim != 2:
        raise InputError(f"w of shape {w.shape}: expected one head, [d, d]; vmap for more")
    check_row_weights(row_weights, x)
    rule, rate = None, learning_rate
    if isinstance(rate, str):
        rule, rate = rate, None
        _check_rule(rule, preset)
    check_finite(x=x, w=w, lam=lam, learning_rate=rate, row_weights=row_weights)
    if lam is not None and not isinstance(lam, jax.core.Tracer) and (np.asarray(lam) < 0).any():
        raise InputError(f"lam {lam}: expected 0 or more")
    sparsity.check_divides(w.shape[0])
    if preset not in get_args(Preset):
        raise InputError(f"preset {preset!r}: expected one of {', '.join(get_args(Preset))}")
    if start not in get_args(Start):
        raise InputError(f"start {start!r}: expected one of {', '.join(get_args(Start))}")
    if steps is not None and steps < 0:
        raise InputError(f"steps {steps}: expected a number of updates, 0 or more")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size {batch_size}: expected a number of sequences, 1 or more")
    if preset == "gauss_newton":
        _check_closed_form(steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    prune = _PRESETS[preset]
    if not isinstance(sparsity.ratio, jax.core.Tracer):
        prune = jax.jit(
            prune,
            static_argnames=(
                *("sparsity", "start", "steps", "batch_size", "causal", "rule", "monitor"),
            ),
        )
    return prune(
        x.reshape(-1, *x.shape[-2:]),
        w.astype(accumulation_dtype(w)),
        _all_rows(x, row_weights),
        lam,
        rate,
        jax.random.key(0) if key is None else key,
        sparsity=sparsity,
        start=start,
        steps=steps,
        batch_size=batch_size,
        causal=causal,
        rule=rule,
        monitor=monitor,
    )


def _check_closed_form(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name} {value}: the preset gauss_newton takes no steps")


def _check_rule(rule: str, preset: str) -> None:
    if rule not in get_args(StepRule):
        raise InputError(
            f"learning_rate {rule!r}: expected a number or one of {', '.join(get_args(StepRule))}"
        )
    if preset != "paper":
        raise InputError(f"learning_rate {rule!r}: the preset {preset} takes numbers only")


def _all_rows(x: Array, row_weights: Array | None) -> Float[Array, "b n"]:
    if row_weights is None:
        row_weights = jnp.ones(x.shape[:-1], accumulation_dtype(x))
    return row_weights.reshape(-1, x.shape[-2])


def fused_data(
    x: Float[Array, "b n d"], w: Float[Array, "d d"], row_weights: Float[Array, "b n"]
) -> dict[str, Array]:
    """Calibration arrays of the fused objective; ``queries0 = x w`` are the dense queries."""
    queries0 = contract("...nd,de->...ne", x, w).astype(x.dtype)
    return {"x": x, "queries0": queries0, "row_weights": row_weights}


def algorithm1(
    x: Float[Array, "b n d"],
    w: Float[Array, "d d"],
    *,
    lam: ArrayLike,
    learning_rate: ArrayLike | StepRule,
    sparsity: Sparsity,
    steps: int = 300,
    batch_size: int | None = None,
    causal: bool = True,
    row_weights: Float[Array, "b n"] | None = None,
    key: Key[Array, ""] | None = None,
    monitor: bool = False,
) -> DescentResult:
    """Algorithm 1 for one λ and step size; the mask it ends with is ``state.variable``.

    One descent serves every sparsity, because the mask is rounded only at the end
    (``jaxprune.sparsity.keep_mask`` of the mask rounds it anew). Arguments as in
    ``prune_attention``, with a leading sequence axis.

    Raises:
      InputError: a step rule with minibatches: it would be that of another function at every step.

    Source: Liang et al. 2025, Algorithm 1.
    """
    rows = _all_rows(x, row_weights)
    if isinstance(learning_rate, str) and batch_size is not None and batch_size < x.shape[0]:
        raise InputError(f"learning_rate {learning_rate!r} needs all sequences: no batch_size")
    lipschitz = certified_lipschitz(x, w, lam, row_weights=rows)
    descent = Descent(
        objective=partial(_objective, causal=causal),
        relaxation=none(),
        optimizer=gradient_descent(learning_rate, lipschitz=lipschitz),
        sparsity=sparsity,
        steps=steps,
        batch_size=batch_size,
        penalty=lambda mask: 0.5 * jnp.asarray(lam) * jnp.sum(mask**2),
        monitor=per_step if monitor else None,
    )
    data = fused_data(x, w, rows)
    return descend(descent, w, data, key=jax.random.key(0) if key is None else key)


def _objective(w: Array, batch: PyTree, *, causal: bool) -> Float[Array, ""]:
    return fused_error(w, causal=causal, **batch)


def _paper(
    x: Array,
    w: Array,
    row_weights: Array,
    lam: ArrayLike | None,
    learning_rate: ArrayLike | None,
    key: Array,
    *,
    sparsity: Sparsity,
    start: Start,
    steps: int | None,
    batch_size: int | None,
    causal: bool,
    rule: StepRule | None,
    monitor: bool,
) -> PrunedAttention:
    """Algorithm 1 at every point of the grid that is left open; the best one is returned."""
    del start  # of descent

    def one(lam: Array, rate: Array) -> PrunedAttention:
        result = algorithm1(
            x,
            w,
            lam=lam,
            learning_rate=rate if rule is None else rule,
            sparsity=sparsity,
            steps=300 if steps is None else steps,
            batch_size=batch_size,
            causal=causal,
            row_weights=row_weights,
            key=key,
            monitor=monitor,
        )
        return _result(result, x, w, row_weights, lam, rate, causal)

    # With a rule there is one run for each λ, and no number to report.
    asked = learning_rate if rule is None else jnp.nan
    lams, rates = algorithm1_grid(x, w, lam, asked, causal=causal, row_weights=row_weights)
    grid = jax.vmap(one)(lams.reshape(-1), rates.reshape(-1))
    # NaN (a diverged run whose mask is not finite) must not win.
    errors = jnp.where(jnp.isnan(grid.calibration_error), jnp.inf, grid.calibration_error)
    chosen = jnp.argmin(errors)
    return jax.tree.map(lambda a: a[chosen], grid)


def _descent(
    x: Array,
    w: Array,
    row_weights: Array,
    lam: ArrayLike | None,
    learning_rate: ArrayLike | None,
    key: Array,
    *,
    sparsity: Sparsity,
    start: Start,
    steps: int | None,
    batch_size: int | None,
    causal: bool,
    rule: StepRule | None,
    monitor: bool,
) -> PrunedAttention:
    """Weights that adapt under a mask in closed form, or gradual pruning, validated."""
    del rule  # refused before
    default = _MANY if x.shape[0] >= _MANY_SEQUENCES else _FEW
    steps = default.steps if steps is None else steps
    fit, validation = split_calibration(fused_data(x, w, row_weights))
    rate = jnp.asarray(default.learning_rate if learning_rate is None else learning_rate, w.dtype)
    anchor_weight = jnp.asarray(default.anchor_weight if lam is None else lam, w.dtype)
    sample_errors = partial(_weighted_row_errors, causal=causal)
    options: dict[str, Any] = {
        "steps": steps,
        "learning_rate": rate,
        "batch_size": 4 if batch_size is None else batch_size,
        "augment": partial(shuffle_tokens, share=default.shuffled),
        "monitor": per_step if monitor else None,
    }
    if start == "gauss_newton":
        form = _form(fit, w, key, causal)
        first = _validated_closed_form(form, fit, validation, w, sparsity, causal)
        begin, unit = first.weight, jnp.mean(jnp.abs(w))
        descent = refit_descent(
            sample_errors,
            begin,
            first.keep_mask,
            penalty=lambda v: anchor_weight * jnp.mean(((v - begin) / unit) ** 2),
            **options,
        )
    else:
        begin = w
        descent = gradual_descent(
            partial(_objective, causal=causal),
            w,
            sparsity,
            rank=fused_ranking(fit["x"], fit["row_weights"]),
            group="matrix",
            anchor_weight=anchor_weight,
            sample_errors=sample_errors,
            **options,
        )
    result = descend(descent, begin, fit, key=key, validation=validation)
    return _result(result, x, w, row_weights, anchor_weight, rate, causal)


class ClosedForm(NamedTuple):
    """A weight in closed form or by the ranking, and what chose it.

    Attributes:
      weight: exact zeros where dropped.
      keep_mask: True where kept.
      damping: infinite where it is the ranking.
      errors: validation errors of the ranking and of every damping; none where it was given.
    """

    weight: Float[Array, "d d"]
    keep_mask: Bool[Array, "d d"]
    damping: Float[Array, ""]
    errors: Float[Array, " candidates"]


def _static_or_traced(sparsity: Sparsity) -> dict[str, Any]:
    """A sparsity as arguments of a program: static where it is known, else its ratio."""
    if isinstance(sparsity.ratio, jax.core.Tracer):
        return {"ratio": sparsity.ratio, "sparsity": None}
    return {"ratio": None, "sparsity": sparsity}


def _one_of(ratio: Array | None, sparsity: Sparsity | None) -> Sparsity:
    if sparsity is not None:
        return sparsity
    assert ratio is not None
    return Sparsity(ratio)


def _by_ranking(
    data: PyTree, w: Float[Array, "d d"], ratio: Array | None, *, sparsity: Sparsity | None
) -> tuple[Float[Array, "d d"], Bool[Array, "d d"]]:
    scores = fused_ranking(data["x"], data["row_weights"])(w)
    return _round(scores, w, ratio, sparsity=sparsity)


@partial(jax.jit, static_argnames="sparsity")
def _round(
    scores: Array, w: Array, ratio: Array | None, *, sparsity: Sparsity | None
) -> tuple[Array, Array]:
    kept = keep_mask(scores, _one_of(ratio, sparsity))
    return jnp.where(kept, w, 0), kept


def prune_by_ranking(
    x: Float[Array, "b n d"], w: Float[Array, "d d"], sparsity: Sparsity
) -> tuple[Float[Array, "d d"], Bool[Array, "d d"]]:
    """Where the presets stay if nothing better validates: ``importance.fused_ranking``, rounded.

    The features' norms are those of the part of the sequences that is not held back.

    Args:
      x: activations.
      w: fused weight.
      sparsity: its ratio may be traced.

    Returns:
      The weight with exact zeros where dropped, and True where kept.
    """
    fit, _ = _split(x, w, _all_rows(x, None))
    return _by_ranking(fit, w, **_static_or_traced(sparsity))


class _Form(NamedTuple):
    """Factors of the Gauss-Newton form of some data, not damped."""

    inputs: Factor
    outputs: Factor


def _form(data: PyTree, w: Float[Array, "d d"], key: Key[Array, ""], causal: bool) -> _Form:
    moments = fused_moments(data["x"], w, causal=causal, row_weights=data["row_weights"], key=key)
    return _Form(factorise(moments.inputs, 0.0), factorise(moments.outputs[None], 0.0))


@partial(jax.jit, static_argnames="sparsity")
def _solve(
    form: _Form,
    w: Float[Array, "d d"],
    dampings: Float[Array, " c"],
    ratio: Array | None,
    *,
    sparsity: Sparsity | None,
) -> tuple[Float[Array, "c d d"], Bool[Array, "c d d"]]:
    """Closed forms at several dampings, one after the other: they are large together."""

    def one(damping: Array) -> tuple[Array, Array]:
        a, b = (redamped(factor, damping) for factor in form)
        pruned = kronecker_admm(w, a, b, _one_of(ratio, sparsity))
        return pruned.weight, pruned.keep_mask

    return jax.lax.map(one, dampings)


@jax.jit
def _split(x: Array, w: Array, row_weights: Array) -> tuple[PyTree, PyTree]:
    """What the closed form needs of the data to fit on, and all of those to validate on."""
    fit, validation = split_calibration(fused_data(x, w, row_weights))
    return _seen(fit["x"], fit["row_weights"]), validation


def _seen(x: Array, row_weights: Array) -> dict[str, Array]:
    """Data without the dense queries, which are as large for every head as the activations."""
    return {"x": x, "row_weights": row_weights}


@partial(jax.jit, static_argnames="causal")
def _best_on(
    validation: PyTree,
    ranked: tuple[Array, Array],
    solved: tuple[Array, Array],
    *,
    causal: bool,
) -> ClosedForm:
    """The best of the closed forms on held-back rows, the ranking unless it is beaten clearly."""
    weights, kept = (jnp.concatenate([r[None], s]) for r, s in zip(ranked, solved, strict=True))
    rows = jax.lax.map(lambda v: _weighted_row_errors(v, validation, causal), weights)
    gain = rows[0] - rows
    clear = gain.mean(axis=1) > _MARGIN * gain.std(axis=1) / math.sqrt(gain.shape[1])
    errors = rows.mean(axis=1)
    # NaN is not clear; the ranking is there where nothing is.
    chosen = jnp.argmin(jnp.where(clear, errors, jnp.inf).at[0].set(errors[0]))
    damping = jnp.asarray((jnp.inf, *_DAMPINGS), weights.dtype)[chosen]
    return ClosedForm(weights[chosen], kept[chosen], damping, errors)


def _validated_closed_form(
    form: _Form,
    fit: PyTree,
    validation: PyTree,
    w: Float[Array, "d d"],
    sparsity: Sparsity,
    causal: bool,
) -> ClosedForm:
    """Closed forms of ``fit`` at all dampings and its ranking, judged on ``validation``."""
    asked = _static_or_traced(sparsity)
    solved = _solve(form, w, jnp.asarray(_DAMPINGS, w.dtype), **asked)
    return _best_on(validation, _by_ranking(fit, w, **asked), solved, causal=causal)


@jax.jit
def _unless_infinite(
    damping: Array, solved: tuple[Array, Array], ranked: tuple[Array, Array]
) -> tuple[Array, Array]:
    """The only one of ``solved``, or ``ranked`` where the damping is infinite."""
    weight, kept = (
        jnp.where(jnp.isfinite(damping), s[0], r) for s, r in zip(solved, ranked, strict=True)
    )
    return weight, kept


def closed_form(
    x: Float[Array, "b n d"],
    w: Float[Array, "d d"],
    sparsity: Sparsity,
    *,
    lam: ArrayLike | None = None,
    causal: bool = True,
    row_weights: Float[Array, "b n"] | None = None,
    key: Key[Array, ""] | None = None,
) -> ClosedForm:
    """What preset ``gauss_newton`` of ``prune_attention`` does, and no more.

    Outside ``jit``, mapped or not, its stages are programs of their own: those that do not depend
    on the sequences are shared by all lengths. Arguments as in ``prune_attention``, the sparsity's
    ratio may be traced.
    """
    key = jax.random.key(0) if key is None else key
    rows = _all_rows(x, row_weights)
    data, asked = _seen(x, rows), _static_or_traced(sparsity)
    if lam is None:
        fit, validation = _split(x, w, rows)
        form = _form(fit, w, key, causal)
        found = _validated_closed_form(form, fit, validation, w, sparsity, causal)
        damping, errors = found.damping, found.errors
    else:
        damping, errors = jnp.asarray(lam, w.dtype), jnp.zeros(0, w.dtype)
    solvable = jnp.where(jnp.isfinite(damping), damping, 1.0)[None]
    solved = _solve(_form(data, w, key, causal), w, solvable, **asked)
    weight, kept = _unless_infinite(damping, solved, _by_ranking(data, w, **asked))
    return ClosedForm(weight, kept, damping, errors)


def _gauss_newton(
    x: Array,
    w: Array,
    row_weights: Array,
    lam: ArrayLike | None,
    learning_rate: ArrayLike | None,
    key: Array,
    *,
    sparsity: Sparsity,
    start: Start,
    steps: int | None,
    batch_size: int | None,
    causal: bool,
    rule: StepRule | None,
    monitor: bool,
) -> PrunedAttention:
    """The closed form, its damping validated on data held back and used on all of it."""
    del learning_rate, steps, batch_size, rule, start  # refused before, or of descent
    found = closed_form(x, w, sparsity, lam=lam, causal=causal, row_weights=row_weights, key=key)
    data = fused_data(x, w, row_weights)
    ranked, _ = _by_ranking(data, w, **_static_or_traced(sparsity))
    # A descent of no steps: the same trace, and what a monitor sees.
    none_left = refit_descent(
        partial(_weighted_row_errors, causal=causal),
        found.weight,
        found.keep_mask,
        steps=0,
        learning_rate=0.0,
        batch_size=x.shape[0],
        monitor=per_step if monitor else None,
    )
    result = descend(none_left, found.weight, data, key=key)
    result = replace(
        result,
        initial_weights=ranked,
        trace=replace(result.trace, validation_error=found.errors),
        state=replace(result.state, step=jnp.isfinite(found.damping).astype(jnp.int32)),
    )
    no_rate = jnp.full_like(found.damping, jnp.nan)
    return _result(result, x, w, row_weights, found.damping, no_rate, causal)


_PRESETS: dict[str, Callable[..., PrunedAttention]] = {
    "paper": _paper,
    "gauss_newton": _gauss_newton,
    "descent": _descent,
}


def _result(
    result: DescentResult,
    x: Array,
    w: Array,
    row_weights: Array,
    lam: Array,
    rate: Array,
    causal: bool,
) -> PrunedAttention:
    error = partial(relative_error, x, w, causal=causal, row_weights=row_weights)
    best = result.state.best
    return PrunedAttention(
        weight=result.weights,
        keep_mask=result.keep_masks,
        trace=result.trace,
        lam=lam,
        learning_rate=rate,
        calibration_error=error(result.weights),
        initial_error=error(result.initial_weights),
        best_step=result.state.step if best is None else best.step,
        rejected_steps=result.state.rejected,
    )


def algorithm1_grid(
    x: Float[Array, "b n d"],
    w: Float[Array, "d d"],
    lam: ArrayLike | None = None,
    learning_rate: ArrayLike | None = None,
    *,
    causal: bool = True,
    row_weights: Float[Array, "b n"] | None = None,
) -> tuple[Float[Array, "lams rates"], Float[Array, "lams rates"]]:
    """λ and step sizes for Algorithm 1 to try: what is given, else grids that follow the scale.

    Useful λ are comparable to the gradient of the error term, whose size is that of its value at
    ``M = 0``; with ``η = c/λ`` the regulariser alone shrinks a mask entry by ``c`` in a step.

    Args:
      x: calibration activations.
      w: fused weight.
      lam: λ, or ``None`` for multiples of the root mean square of the gradient at ``M = 0``.
      learning_rate: η, or ``None`` for a few ``c/λ``.
      causal: see ``prune_attention``.
      row_weights: see ``prune_attention``.

    Returns:
      λ and η of every point of the grid.
    """
    data = fused_data(x, w, _all_rows(x, row_weights))
    gradient = jax.grad(lambda mask: _objective(mask * w, data, causal=causal))(jnp.zeros_like(w))
    scale = jnp.sqrt(jnp.mean(gradient**2))
    scale = jnp.where(scale > 0, scale, 1.0)
    if lam is None:
        lams = scale * jnp.asarray(_LAMBDA_MULTIPLES, scale.dtype)
    else:
        lams = jnp.asarray(lam, scale.dtype).reshape(1)
    if learning_rate is None:
        decays = jnp.asarray(DECAYS, scale.dtype)
        rates = decays / jnp.maximum(lams, _LAMBDA_MULTIPLES[0] * scale)[:, None]
    else:
        rates = jnp.full((lams.size, 1), learning_rate, scale.dtype)
    return jnp.broadcast_to(lams[:, None], rates.shape), rates


def round_and_judge(
    error: Callable[[Array], Float[Array, ""]],
    w: Float[Array, "d d"],
    masks: Float[Array, "c d d"],
    ratio: float | Array,
) -> tuple[Bool[Array, "c d d"], Float[Array, " c"]]:
    """Round candidate masks at a ratio, and the error of what each of them leaves.

    Args:
      error: pruned weight to a scalar.
      w: dense weight; kept entries keep its values.
      masks: candidates, larger is more important.
      ratio: fraction removed.

    Returns:
      Keep masks, and errors in which NaN, from a step size that diverged, is infinite: it must
      not win.
    """
    kept = jax.vmap(lambda mask: keep_mask(mask, Sparsity(ratio)))(masks)
    errors = jax.lax.map(error, jnp.where(kept, w, 0))
    return kept, jnp.where(jnp.isnan(errors), jnp.inf, errors)


def _weighted_row_errors(w: Array, data: PyTree, causal: bool) -> Float[Array, " rows"]:
    """Half squared error of every row of the validation data, times its weight."""
    x = data["x"]
    queries = contract("...nd,de->...ne", x, w).astype(x.dtype)
    error, _ = row_errors(queries, x, data["queries0"], x, causal=causal)
    return (0.5 * data["row_weights"] * error).reshape(-1)


def shuffle_tokens(key: Key[Array, ""], batch: PyTree, share: float = 1.0) -> PyTree:
    """A new random order of the tokens of sequences of a batch (arrays ``[b, n, …]``).

    Tokens without weight stay where they are: padding never comes before what it pads. Each
    sequence is reordered with probability ``share``.
    """
    b, n = batch["row_weights"].shape

    def order(key: Key[Array, ""], weights: Float[Array, " n"]) -> Int[Array, " n"]:
        idle = weights == 0
        drawn = jax.random.permutation(key, n)
        moving = drawn[jnp.argsort(idle[drawn], stable=True)]
        places = jnp.argsort(idle, stable=True)
        return jnp.where(idle, jnp.arange(n), jnp.zeros(n, int).at[places].set(moving))

    orders = jax.vmap(order)(jax.random.split(key, b), batch["row_weights"])
    if share < 1:
        reordered = jax.random.bernoulli(jax.random.fold_in(key, b), share, (b, 1))
        orders = jnp.where(reordered, orders, jnp.arange(n))
    return jax.tree.map(lambda a: jax.vmap(lambda rows, order: rows[order])(a, orders), batch)


def split_calibration(data: PyTree) -> tuple[PyTree, PyTree]:
    """Split calibration arrays ``[b, n, …]`` into a part to fit on and a part to validate on.

    With several sequences, every eighth (at least one) validates. One sequence alone is split by
    tokens, every fourth: a subset of tokens, in order, is a sequence of the fused attention too.
    A single token serves as both.
    """
    b, n = jax.tree.leaves(data)[0].shape[:2]
    return split_sequences(data) if b > 1 else split_axis(data, 1, min(n, 4))
