"""Prune a model block by block: hidden states flow on, weights are replaced, nothing is lost.

Two streams of hidden states go through the model: those of the dense model, which define what
attention and blocks should give, and those of the model as pruned so far, which the original
Wanda and SparseGPT calibrate on. Both hold one array of all windows; everything else is gathered
batch by batch. In every block a method finds masks and weights, and, where kept weights are to
adapt, a descent goes on from there. After every block, and inside a descent every few seconds,
what is needed to go on is written to a work folder, so that a run that was killed ends with the
same bits. Kept weights of all blocks may then be distilled together from the dense model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxprune.baselines import BASELINES, PrunedLinear
from jaxprune.descent.loop import Descent
from jaxprune.errors import InputError
from jaxprune.methods.query_key import head_errors
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llama.modeling import (
    BlockWeights,
    Llama,
    attention_form,
    one_block,
    parameter_count,
)
from jaxprune.models.llama.sampling import continuations
from jaxprune.pipeline.block import block_problem, block_refit_problem, block_settings
from jaxprune.pipeline.budget import share_out
from jaxprune.pipeline.closed_form import block_closed_form
from jaxprune.pipeline.curvature import Curvature, prediction_curvature
from jaxprune.pipeline.distillation import DistillationSettings, distillation_problem
from jaxprune.pipeline.query_key import (
    query_key_closed_form,
    query_key_problem,
    query_key_refit_problem,
    query_key_settings,
)
from jaxprune.pipeline.settings import PruneSettings
from jaxprune.pipeline.streams import Streams, linear_inputs, mean_statistic
from jaxprune.pipeline.work import Problem, Report, Solution, Work, solve
from jaxprune.runs.folder import RunFolder
from jaxprune.sharding import gather, on_process_zero
from jaxprune.sparsity import Sparsity, keep_mask
from jaxprune.storage import write_arrays

# Distillation goes through the whole model, dense and pruned, in every step: it is left out above
# so many parameters unless asked for.
_DISTILLED_BY_DEFAULT = 100_000_000
# W_Q and W_K alone are near what their masks allow after the blocks; all maps have farther to go.
_DISTILLATION_RATES = {"qk": 0.01, "all": 0.03}
# They are of models up to this width. On SmolLM2-135M, 576 wide, a rate of 0.01 raised the
# divergence in its first steps, and one of 0.001 lowered it.
_WIDTH_OF_RATES = 128
# Tokens of a step of the distillation.
_DISTILLED_AT_ONCE = 2048
# Tokens of a calibration window that a generated one begins with, so that its matter is like it.
_OPENING = 16

PrunedBlock = tuple[int, dict[str, np.ndarray], list[dict[str, Any]]]
"""Number of a block, its keep masks by name, its rows of metrics."""


class Progress(NamedTuple):
    """Where a run is, for a progress bar: of ``total`` units, ``done`` are done."""

    done: int
    total: int
    doing: str


def distillation_steps(settings: PruneSettings, config: LlamaConfig) -> int:
    """Steps of the distillation after the blocks."""
    if settings.distill is not None:
        return settings.distill
    if settings.method != "descent" or not settings.refits:
        return 0
    small = parameter_count(config) <= _DISTILLED_BY_DEFAULT
    return DistillationSettings().steps if small else 0


def _distillation_settings(
    settings: PruneSettings, config: LlamaConfig, length: int
) -> DistillationSettings:
    """Settings for windows of so many tokens."""
    slower = min(1.0, (_WIDTH_OF_RATES / config.hidden_size) ** 2)
    return DistillationSettings(
        steps=distillation_steps(settings, config),
        batch_size=max(1, _DISTILLED_AT_ONCE // length),
        learning_rate=slower * _DISTILLATION_RATES[settings.targets],
    )


def units(settings: PruneSettings, config: LlamaConfig) -> int:
    """Units of progress of a run: generated text, curvature, every block, chunks of descents."""
    last = math.ceil(distillation_steps(settings, config) / Descent.chunk_size)
    blocks = _block_units(settings, config) * config.num_hidden_layers
    return (
        (settings.generated > 0) + _units_before(settings.rounds, settings, config) + blocks + last
    )


def _units_before(number: int, settings: PruneSettings, config: LlamaConfig) -> int:
    """Before the blocks of a round: its curvature, and all of earlier rounds."""
    return number + (number - 1) * config.num_hidden_layers if settings.needs_curvature else 0


def _block_units(settings: PruneSettings, config: LlamaConfig) -> int:
    if not (settings.refits or settings.gradual):
        return 1
    return 1 + math.ceil(descent_steps(settings, config) / Descent.chunk_size)


def descent_steps(settings: PruneSettings, config: LlamaConfig) -> int:
    """Steps of a descent in every block, where there is one."""
    chosen = (
        query_key_settings(settings, config)
        if settings.targets == "qk"
        else block_settings(settings, config)
    )
    return int(chosen.steps)


def prune_model(
    model: Llama,
    tokens: np.ndarray,
    heldout: np.ndarray,
    settings: PruneSettings,
    run: RunFolder,
    progress: Callable[[Progress], None],
) -> Iterator[PrunedBlock]:
    """Prune ``model`` in place, yielding every block's keep masks and rows of metrics.

    Where there is a distillation, nothing is yielded before its end.

    Args:
      model: its block weights are replaced as the run goes on.
      tokens: windows to calibrate on, ``[w, n]``; generated ones come after them.
      heldout: windows that errors are reported on too.
      settings: what to do.
      run: where finished blocks and the state of a descent are kept.
      progress: called as the work goes on.

    Raises:
      InputError: activations or losses are not finite, or a Hessian cannot be factorised.
    """
    settings.check(model.config)
    total, before = units(settings, model.config), int(settings.generated > 0)
    for_masks = _for_masks(settings, model.config, len(tokens))

    def report(done: int, doing: str) -> None:
        progress(Progress(before + done, total, doing))

    if settings.generated:
        progress(Progress(0, total, "generated text"))
        tokens = np.concatenate([tokens, _generated(model, tokens, settings, run)])
    if not distillation_steps(settings, model.config):
        yield from _prune_blocks(model, tokens, for_masks, heldout, settings, run, report)
        return
    # Pruned blocks take the memory of the model's.
    dense = jax.tree.map(jnp.copy, model.blocks.get_value())
    # Blocks that are not refitted need none of the windows that are for steps alone.
    streamed = tokens if settings.refits or settings.gradual else tokens[:for_masks]
    pruned = list(_prune_blocks(model, streamed, for_masks, heldout, settings, run, report))
    for_steps = tokens[_steps_windows(for_masks, len(tokens))]
    yield from _distill(model, dense, pruned, tokens, for_steps, heldout, settings, run, report)


def _for_masks(settings: PruneSettings, config: LlamaConfig, read: int) -> int:
    """How many windows masks are found on: those read, and generated ones after them.

    What a mask was found on, its weights have memorised, and steps learn little from it. Where
    there are steps, as many generated windows as were read are therefore for them alone, then as
    many for masks, and the rest for steps; with fewer, all windows are for both. On the first three
    blocks of SmolLM2-135M, half of all maps, 100 steps on the 64 windows of the closed form left
    10 % less divergence on fresh text than it, on 64 generated ones 14 %, on 192, with 64 more for
    the masks, 22 %.
    """
    steps = settings.refits or distillation_steps(settings, config) > 0
    if settings.gradual or not steps or settings.generated < read:
        return read + settings.generated
    return read + min(read, settings.generated - read)


def _steps_windows(for_masks: int, windows: int) -> slice:
    """Windows that steps adapt kept weights on: those after the masks', or all if none are."""
    return slice(for_masks if for_masks < windows else 0, None)


def _key(settings: PruneSettings, number: int) -> Key[Array, ""]:
    """Randomness of a block, by its number, or of other work, by numbers after the blocks'."""
    return jax.random.fold_in(jax.random.key(settings.seed), number)


def _generated(
    model: Llama, tokens: np.ndarray, settings: PruneSettings, run: RunFolder
) -> np.ndarray:
    """Windows that the dense model writes, each after the first tokens of one of ``tokens``."""
    name, (windows, length) = "generated", tokens.shape

    def compute() -> list[dict[str, Any]]:
        key = _key(settings, model.config.num_hidden_layers + 2)
        opened = tokens[np.arange(settings.generated) % windows, :_OPENING]
        written = continuations(model, opened, length, key)
        on_process_zero(lambda: write_arrays(run.part_file(name), tokens=written))
        return []

    run.part(name, compute)
    return run.part_arrays(name)["tokens"]


def _prune_blocks(
    model: Llama,
    tokens: np.ndarray,
    for_masks: int,
    heldout: np.ndarray,
    settings: PruneSettings,
    run: RunFolder,
    report: Report,
) -> Iterator[PrunedBlock]:
    """``prune_model`` without distillation; masks are found on the first ``for_masks`` windows."""
    plan = _plan(model, tokens, for_masks, heldout, settings, run, report)
    yield from _round(model, tokens, plan, heldout, settings, run, report)


def _round(
    model: Llama,
    tokens: np.ndarray,
    plan: _Plan,
    heldout: np.ndarray,
    settings: PruneSettings,
    run: RunFolder,
    report: Report,
) -> Iterator[PrunedBlock]:
    """Prune all blocks once, each a part of the run."""
    prefix = "" if plan.number == settings.rounds else f"round-{plan.number}-"
    before = _units_before(plan.number, settings, model.config)
    streams = Streams.start(model, tokens, heldout, whole=settings.needs_dense_stream)
    each = _block_units(settings, model.config)
    for layer in range(model.config.num_hidden_layers):
        name = f"{prefix}block-{layer}"
        dense = model.block_weights(layer)
        streams = streams.ahead(dense, settings.batch)
        work = Work(run, name, before + layer * each, report)
        work.report(0)
        rows = run.part(name, partial(_prune_block, layer, dense, streams, plan, settings, work))
        arrays = run.part_arrays(name)
        pruned = dense._replace(
            **{w: jnp.asarray(arrays[w], dense.wq.dtype) for w in settings.names}
        )
        _set_block(model, layer, pruned)
        streams = streams.after(dense, pruned, settings.batch)
        work.report(each)
        yield layer, {w: arrays[f"keep_{w}"] for w in settings.names}, rows


class _Plan(NamedTuple):
    """What is known before the first block is pruned.

    Attributes:
      number: of the round, from 1.
      sparsity: of every matrix, by its name, for each block.
      curvature: of the predictions, where masks are found on it.
      for_masks: windows that masks are found on.
    """

    number: int
    sparsity: list[dict[str, Sparsity]]
    curvature: Curvature | None
    for_masks: int


def _plan(
    model: Llama,
    tokens: np.ndarray,
    for_masks: int,
    heldout: np.ndarray,
    settings: PruneSettings,
    run: RunFolder,
    report: Report,
) -> _Plan:
    """Take the curvature of the predictions where it is needed, and share out the budget.

    Rounds before the last are gone through here. Each prunes the dense model to take the curvature
    of what is left too; the mean of all counts, for predictions are to stay near on the whole way.
    On SmolLM2-135M, half of all maps, one seed, a second round left 2 % less divergence in twice
    the time; curvature of the dense model on 64 windows in place of 32, 3 % in a quarter more.
    """
    layers = range(model.config.num_hidden_layers)
    even = [dict.fromkeys(settings.names, settings.sparsity) for _ in layers]
    # What is finished needs no curvature.
    if not settings.needs_curvature or all(run.finished(f"block-{layer}") for layer in layers):
        return _Plan(settings.rounds, even, None, for_masks)
    seen = tokens[: min(for_masks, settings.curvature.windows)]
    without_steps = dataclasses.replace(settings, method="gauss-newton", refit=None, distill=None)

    def planned(number: int, curvature: Curvature) -> _Plan:
        shared = settings.allocate != "matrix"
        sparsity = share_out(model, curvature, settings) if shared else even
        kept = curvature if settings.on_predictions else None
        return _Plan(number, sparsity, kept, for_masks)

    plan = planned(1, _curvature(model, seen, 1, settings, report))
    for number in range(2, settings.rounds + 1):
        dense = jax.tree.map(jnp.copy, model.blocks.get_value())
        for _ in _round(model, tokens[:for_masks], plan, heldout, without_steps, run, report):
            pass
        another = _curvature(model, seen, number, settings, report)
        model.blocks.set_value(dense)
        plan = planned(number, jax.tree.map(partial(_nearer, number), plan.curvature, another))
    return plan


def _curvature(
    model: Llama, tokens: np.ndarray, number: int, settings: PruneSettings, report: Report
) -> Curvature:
    """Curvature of the predictions before a round, by random cotangents of its own."""
    before = _units_before(number, settings, model.config)
    report(before - 1, "curvature")
    key = _key(settings, model.config.num_hidden_layers + 1)
    curvature = prediction_curvature(
        model,
        tokens,
        settings.names,
        key if number == 1 else jax.random.fold_in(key, number - 1),
        batch=settings.batch,
        full=settings.curvature.outputs,
    )
    jax.block_until_ready(curvature)  # so that its progress is not the first block's
    report(before, "curvature")
    return curvature


def _nearer(count: int, mean: Array, value: Array) -> Array:
    """The mean of so many values, from that of all but the last, and the last."""
    return mean + (value - mean) / count


def _prune_block(
    layer: int,
    dense: BlockWeights,
    streams: Streams,
    plan: _Plan,
    settings: PruneSettings,
    work: Work,
) -> list[dict[str, Any]]:
    key = _key(settings, layer)
    if settings.gradual:
        solution = solve(_gradual_problem(dense, streams, settings), key, work)
    else:
        found_on = slice(plan.for_masks)
        solution = _find_masks(layer, dense, streams.part(found_on), plan, settings, key)
        if settings.method == "descent" and not settings.refits:
            solution = _with_dense_values(dense, solution)
        if settings.refits:
            remarks = solution.remarks
            others = _steps_windows(plan.for_masks, len(streams.pruned))
            problem = _refit_problem(dense, streams.part(others), solution, settings)
            solution = solve(problem, key, work)
            solution = solution._replace(remarks=remarks | solution.remarks)
    for name in settings.names:
        if not bool(jnp.isfinite(solution.weights[name]).all()):
            raise InputError(
                f"block {layer}: {name} is not finite after pruning; check the weights"
            )
    pruned = dense._replace(**solution.weights)
    # Nobody is told the errors of earlier rounds.
    last = plan.number == settings.rounds
    rows = _head_rows(layer, dense, pruned, streams, solution.remarks) if last else []
    work.finish(
        **{name: gather(solution.weights[name].astype(jnp.float32)) for name in settings.names},
        **{f"keep_{name}": gather(solution.keep_masks[name]) for name in settings.names},
    )
    return rows


def _gradual_problem(dense: BlockWeights, streams: Streams, settings: PruneSettings) -> Problem:
    make = query_key_problem if settings.targets == "qk" else block_problem
    return make(dense, streams, settings)


def _refit_problem(
    dense: BlockWeights, streams: Streams, solution: Solution, settings: PruneSettings
) -> Problem:
    make = query_key_refit_problem if settings.targets == "qk" else block_refit_problem
    return make(dense, streams, solution, settings)


def _find_masks(
    layer: int,
    dense: BlockWeights,
    streams: Streams,
    plan: _Plan,
    settings: PruneSettings,
    key: Array,
) -> Solution:
    """Masks and weights of a block by a method without steps."""
    sparsity = plan.sparsity[layer]
    if not settings.propagate:
        streams = streams._replace(pruned=streams.dense)
    if settings.on_predictions:
        assert plan.curvature is not None
        curvature = plan.curvature[layer]
        return block_closed_form(dense, streams, curvature, sparsity, settings)
    if settings.closed_form:
        return query_key_closed_form(dense, streams, sparsity, settings, key)
    baseline, names = BASELINES[settings.first], settings.names
    # In one dense pass of the block, as the originals do.
    if baseline.moment is None or baseline.prune_from is None:
        data = linear_inputs(dense, streams, names, settings.batch)
        prune: Callable[..., PrunedLinear] = baseline.prune
    else:
        data = mean_statistic(dense, streams, names, baseline.moment, settings.batch)
        prune = baseline.prune_from
    results = {name: prune(data[name], getattr(dense, name), sparsity[name]) for name in names}
    if settings.allocate != "matrix":
        results = {name: _to_the_entry(r, sparsity[name]) for name, r in results.items()}
    raised = {n: int(r.damping_raised) for n, r in results.items() if r.damping_raised}
    return Solution(
        {name: result.weight for name, result in results.items()},
        {name: result.keep_mask for name, result in results.items()},
        {"damping_raised": raised} if raised else {},
    )


def _to_the_entry(result: PrunedLinear, sparsity: Sparsity) -> PrunedLinear:
    """Drop what rounding down in groups left of a matrix's part of a budget, smallest first."""
    size = jnp.where(result.keep_mask, jnp.abs(result.weight), -1.0)
    kept = keep_mask(size, sparsity)
    weight = jnp.where(kept, result.weight, 0)
    return dataclasses.replace(result, weight=weight, keep_mask=kept)


def _with_dense_values(dense: BlockWeights, solution: Solution) -> Solution:
    weights = {
        name: jnp.where(kept, getattr(dense, name), 0) for name, kept in solution.keep_masks.items()
    }
    return solution._replace(weights=weights)


def _distill(
    model: Llama,
    dense: BlockWeights,
    blocks: list[PrunedBlock],
    tokens: np.ndarray,
    for_steps: np.ndarray,
    heldout: np.ndarray,
    settings: PruneSettings,
    run: RunFolder,
    report: Report,
) -> Iterator[PrunedBlock]:
    """Let the kept weights of all pruned blocks adapt together, and judge every block anew.

    The steps take the windows ``for_steps``.
    """
    name, names = "distillation", settings.names
    blocks_done = _block_units(settings, model.config) * model.config.num_hidden_layers
    before = _units_before(settings.rounds, settings, model.config)
    work = Work(run, name, before + blocks_done, report)
    work.report(0)

    def compute() -> list[dict[str, Any]]:
        masks = {w: jnp.stack([jnp.asarray(kept[w]) for _, kept, _ in blocks]) for w in names}
        chosen = _distillation_settings(settings, model.config, tokens.shape[1])
        layers = model.config.num_hidden_layers
        change = _key(settings, layers + 3)
        problem = distillation_problem(model, dense, masks, jnp.asarray(for_steps), change, chosen)
        solution = solve(problem, _key(settings, layers), work)
        extra = {f"distillation_{name}": value for name, value in solution.remarks.items()}
        _set_stacks(model, solution.weights)
        judged = tokens[: len(heldout)]
        streams, rows = Streams.start(model, judged, heldout, whole=False), []
        for layer, _, found in blocks:
            unpruned = one_block(dense, layer)
            now = _head_rows(layer, unpruned, model.block_weights(layer), streams, extra)
            rows += [old | new for old, new in zip(found, now, strict=True)]
            streams = streams.after(unpruned, None, settings.batch)
        work.finish(**{w: gather(solution.weights[w]) for w in names})
        return rows

    rows = run.part(name, compute)
    _set_stacks(model, {w: jnp.asarray(a) for w, a in run.part_arrays(name).items()})
    for layer, kept, _ in blocks:
        yield layer, kept, [row for row in rows if row["layer"] == layer]


def _set_stacks(model: Llama, weights: Mapping[str, Array]) -> None:
    blocks = model.blocks.get_value()
    model.blocks.set_value(
        blocks._replace(**{w: a.astype(getattr(blocks, w).dtype) for w, a in weights.items()})
    )


def _set_block(model: Llama, layer: int, weights: BlockWeights) -> None:
    model.blocks.set_value(
        jax.tree.map(lambda stack, w: _replaced(stack, layer, w), model.blocks.get_value(), weights)
    )


# The old stack's memory is used: a model is held twice only where it is distilled.
@partial(jax.jit, donate_argnums=0)
def _replaced(stack: Array, layer: Array | int, weight: Array) -> Array:
    return stack.at[layer].set(weight)


def _head_rows(
    layer: int, dense: BlockWeights, pruned: BlockWeights, streams: Streams, extra: dict[str, Any]
) -> list[dict[str, Any]]:
    """Relative error of every head's attention on the dense model's activations.

    Of the windows that were calibrated on, as many are taken as are held out.
    """
    config = streams.config
    settings = query_key_settings(PruneSettings("descent", "qk", Sparsity(0.0)), config)
    form = attention_form(dense, config)
    columns = []
    for hidden in streams.judged:
        x = streams.normed(hidden, dense)
        error, energy = head_errors(
            x, (pruned.wq, pruned.wk), x, (dense.wq, dense.wk), form, settings
        )
        columns.append(gather(error / energy))
        if not np.isfinite(columns[-1]).all():
            raise InputError(
                f"block {layer}: its attention is not finite; check weights and activations"
            )
    return [
        {
            "layer": layer,
            "head": head,
            "calibration_error": float(columns[0][head]),
            "heldout_error": float(columns[1][head]),
            **extra,
        }
        for head in range(config.num_attention_heads)
    ]
