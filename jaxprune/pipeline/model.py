"""Prune a model block by block: hidden states flow on, weights are replaced, nothing is lost.

Two streams of hidden states go through the model: those of the dense model, which define what
attention and blocks should give, and those of the model as pruned so far, which the original
Wanda and SparseGPT calibrate on. Both hold one array of all windows; everything else is gathered
batch by batch. After every block, and inside a descent every few seconds, what is needed to go on
is written to a work folder, so that a run that was killed ends with the same bits. Where a model
is small enough, the kept weights of all blocks are then distilled together from the dense model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from jaxprune.attention import accumulation_dtype
from jaxprune.baselines import PrunedLinear, magnitude
from jaxprune.baselines.sparsegpt import hessian, sparsegpt_from_hessian
from jaxprune.baselines.wanda import wanda_from_norms
from jaxprune.descent.gradual import split_sequences
from jaxprune.descent.loop import Descent, DescentResult, DescentState, Trace, descend
from jaxprune.errors import InputError
from jaxprune.importance import feature_norms
from jaxprune.methods.query_key import (
    QueryKeySettings,
    head_errors,
    query_key_context,
    query_key_descent,
)
from jaxprune.models.llama.activations import next_hidden
from jaxprune.models.llama.config import LlamaConfig, inverse_frequencies
from jaxprune.models.llama.modeling import (
    INPUT_OF,
    BlockWeights,
    Llama,
    block,
    parameter_count,
    rms_norm,
)
from jaxprune.pipeline.block import BlockSettings, block_context, block_descent
from jaxprune.pipeline.distillation import DistillationContext, DistillationSettings, distillation
from jaxprune.runs.folder import RunFolder
from jaxprune.sharding import (
    broadcast_flag,
    gather,
    on_process_zero,
    split_columns,
    split_windows,
)
from jaxprune.sparsity import Sparsity
from jaxprune.storage import read_arrays, write_arrays

METHODS = ("magnitude", "wanda", "sparsegpt", "descent")
TARGETS = {"qk": ("wq", "wk"), "all": tuple(INPUT_OF)}

# A descent's state is written when that costs less than this part of the time since the last.
_SAVING_SHARE = 0.1
# Distillation goes through the whole model, dense and pruned, in every step: it is left out above
# so many parameters unless asked for.
_DISTILLED_BY_DEFAULT = 100_000_000
# W_Q and W_K alone are near what their masks allow after the blocks; all maps have farther to go.
_DISTILLATION_RATES = {"qk": 0.01, "all": 0.03}


@dataclass(frozen=True)
class PruneSettings:
    """What to prune and how.

    Attributes:
      method: one of ``METHODS``.
      targets: ``qk`` for ``W_Q`` and ``W_K``, ``all`` for the seven linear maps of every block.
      sparsity: of every pruned matrix.
      refit: descent lets kept weights adapt; else it learns a mask alone (``qk``).
      propagate: descent calibrates on the model as pruned so far (``all`` always does).
      steps: of a descent; the preset's if ``None``.
      distill: steps of the distillation after a descent with ``refit``; if ``None``, the preset's
        for models of up to 100 million parameters and none for larger ones.
      batch: windows at once in forward passes.
      seed: of the descent's batches.
      tuning: further changes to the preset, fields of ``QueryKeySettings`` or ``BlockSettings``.
    """

    method: str
    targets: str
    sparsity: Sparsity
    refit: bool = True
    propagate: bool = True
    steps: int | None = None
    distill: int | None = None
    batch: int = 8
    seed: int = 0
    tuning: Mapping[str, Any] = field(default_factory=dict)

    @property
    def adapts(self) -> bool:
        """Whether kept weights move: a descent that refits, and what distillation goes on from."""
        return self.method == "descent" and self.refit

    def check(self, config: LlamaConfig) -> None:
        """Raise ``InputError``, naming the argument, for choices that cannot work."""
        if self.method not in METHODS:
            raise InputError(f"method {self.method}: expected one of {', '.join(METHODS)}")
        if self.targets not in TARGETS:
            raise InputError(f"targets {self.targets}: expected one of {', '.join(TARGETS)}")
        if not self.refit and (self.method, self.targets) != ("descent", "qk"):
            raise InputError("refit=False: only with method=descent and targets=qk")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps {self.steps}: expected 1 or more")
        if self.distill is not None and self.distill < 0:
            raise InputError(f"distill {self.distill}: expected 0 or more steps")
        if self.distill and not self.adapts:
            raise InputError("distill: only with method=descent, and not with refit=False")
        if self.batch < 1:
            raise InputError(f"batch {self.batch}: expected 1 or more")
        widths = {config.hidden_size}
        if self.targets == "all":
            widths |= {config.num_attention_heads * config.head_dim, config.intermediate_size}
        for width in sorted(widths):
            self.sparsity.check_divides(width)


PrunedBlock = tuple[int, dict[str, np.ndarray], list[dict[str, Any]]]
"""Number of a block, its keep masks by name, its rows of metrics."""


class Progress(NamedTuple):
    """Where a run is, for a progress bar: of ``total`` units, ``done`` are done."""

    done: int
    total: int
    doing: str


Report = Callable[[int, str], None]  # units done, and of what
DescentSettings = QueryKeySettings | BlockSettings | DistillationSettings


def distillation_steps(settings: PruneSettings, config: LlamaConfig) -> int:
    """Steps of the distillation after the blocks; none for other methods."""
    if not settings.adapts:
        return 0
    if settings.distill is not None:
        return settings.distill
    small = parameter_count(config) <= _DISTILLED_BY_DEFAULT
    return DistillationSettings().steps if small else 0


def units(settings: PruneSettings, config: LlamaConfig) -> int:
    """Units of progress of a run: chunks of its descents, and one for each block."""
    last = math.ceil(distillation_steps(settings, config) / Descent.chunk_size)
    return _block_units(settings, config) * config.num_hidden_layers + last


def _block_units(settings: PruneSettings, config: LlamaConfig) -> int:
    if settings.method != "descent":
        return 1
    return 1 + math.ceil(_descent_settings(settings, config).steps / Descent.chunk_size)


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
      tokens: windows to calibrate on, ``[w, n]``.
      heldout: windows that errors are reported on too.
      settings: what to do.
      run: where finished blocks and the state of a descent are kept.
      progress: called as the work goes on.

    Raises:
      InputError: activations or losses are not finite, or a Hessian cannot be factorised.
    """
    settings.check(model.config)
    total = units(settings, model.config)

    def report(done: int, doing: str) -> None:
        progress(Progress(done, total, doing))

    if not distillation_steps(settings, model.config):
        yield from _prune_blocks(model, tokens, heldout, settings, run, report)
        return
    # Pruned blocks take the memory of the model's.
    dense = jax.tree.map(jnp.copy, model.blocks.get_value())
    pruned = list(_prune_blocks(model, tokens, heldout, settings, run, report))
    yield from _distill(model, dense, pruned, tokens, heldout, settings, run, report)


def _prune_blocks(
    model: Llama,
    tokens: np.ndarray,
    heldout: np.ndarray,
    settings: PruneSettings,
    run: RunFolder,
    report: Report,
) -> Iterator[PrunedBlock]:
    """``prune_model`` without distillation."""
    streams = _Streams.start(model, tokens, heldout)
    names, each = TARGETS[settings.targets], _block_units(settings, model.config)
    for layer in range(model.config.num_hidden_layers):
        name = f"block-{layer}"
        dense = model.block_weights(layer)
        work = _Work(run, name, layer * each, report)
        work.report(0)
        rows = run.part(name, partial(_prune_block, layer, dense, streams, settings, model, work))
        arrays = run.part_arrays(name)
        pruned = dense._replace(**{w: jnp.asarray(arrays[w], dense.wq.dtype) for w in names})
        _set_block(model, layer, pruned)
        streams = streams.after(dense, pruned, settings.batch)
        work.report(each)
        yield layer, {w: arrays[f"keep_{w}"] for w in names}, rows


def _distill(
    model: Llama,
    dense: BlockWeights,
    blocks: list[PrunedBlock],
    tokens: np.ndarray,
    heldout: np.ndarray,
    settings: PruneSettings,
    run: RunFolder,
    report: Report,
) -> Iterator[PrunedBlock]:
    """Let the kept weights of all pruned blocks adapt together, and judge every block anew."""
    name, names = "distillation", TARGETS[settings.targets]
    before = _block_units(settings, model.config) * model.config.num_hidden_layers
    work = _Work(run, name, before, report)
    work.report(0)

    def compute() -> list[dict[str, Any]]:
        masks = {w: jnp.stack([jnp.asarray(kept[w]) for _, kept, _ in blocks]) for w in names}
        weights, extra = _run_distillation(model, dense, masks, tokens, settings, work)
        _set_stacks(model, weights)
        streams, rows = _Streams.start(model, tokens, heldout), []
        for layer, _, found in blocks:
            unpruned = jax.tree.map(lambda stack, layer=layer: stack[layer], dense)
            judged = _head_rows(layer, unpruned, model.block_weights(layer), streams, extra)
            rows += [old | new for old, new in zip(found, judged, strict=True)]
            streams = streams.after(unpruned, None, settings.batch)
        work.finish(**{w: gather(weights[w]) for w in names})
        return rows

    rows = run.part(name, compute)
    _set_stacks(model, {w: jnp.asarray(a) for w, a in run.part_arrays(name).items()})
    for layer, kept, _ in blocks:
        yield layer, kept, [row for row in rows if row["layer"] == layer]


def _run_distillation(
    model: Llama,
    dense: BlockWeights,
    keep_masks: dict[str, Array],
    tokens: np.ndarray,
    settings: PruneSettings,
    work: _Work,
) -> tuple[dict[str, Array], dict[str, Any]]:
    chosen = DistillationSettings(
        steps=distillation_steps(settings, model.config),
        learning_rate=_DISTILLATION_RATES[settings.targets],
    )
    blocks = model.blocks.get_value()
    weights = _movable({name: getattr(blocks, name) for name in keep_masks})
    fit, validation = split_sequences({"tokens": jnp.asarray(tokens)})
    context = DistillationContext(model, dense, keep_masks)
    key = jax.random.fold_in(jax.random.key(settings.seed), model.config.num_hidden_layers)
    found, extra = _run(distillation, chosen, weights, fit, validation, context, key, work)
    return found.weights, {f"distillation_{name}": value for name, value in extra.items()}


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


class _Streams(NamedTuple):
    """Hidden states before a block, of the dense model and of the one pruned so far."""

    dense: Array
    pruned: Array
    heldout: Array
    config: LlamaConfig

    @classmethod
    def start(cls, model: Llama, tokens: np.ndarray, heldout: np.ndarray) -> _Streams:
        hidden, fresh = (
            split_windows(model.embed(jnp.asarray(windows))) for windows in (tokens, heldout)
        )
        return cls(hidden, hidden, fresh, model.config)

    def after(self, dense: BlockWeights, pruned: BlockWeights | None, batch: int) -> _Streams:
        """Streams after a block; without ``pruned``, that stream is not advanced."""
        through = partial(next_hidden, config=self.config, batch=batch)
        return self._replace(
            dense=through(dense, self.dense),
            pruned=self.pruned if pruned is None else through(pruned, self.pruned),
            heldout=through(dense, self.heldout),
        )

    def normed(self, hidden: Array, weights: BlockWeights) -> Array:
        return rms_norm(hidden, weights.attention_norm, self.config.rms_norm_eps)


class _Work:
    """Keeps the state of a descent under way, and reports its progress."""

    def __init__(self, run: RunFolder, name: str, before: int, report: Report) -> None:
        self.run, self.name = run, name
        self._before, self._report = before, report
        self._file = run.part_file(f"{name}-state")
        self._saved_at = time.monotonic()
        self._cost = 0.0

    def report(self, chunks: int) -> None:
        """Say that so many chunks of this part are done."""
        self._report(self._before + chunks, self.name)

    def load(self, start: DescentState) -> DescentState:
        """The saved state, or ``start``."""
        if not broadcast_flag(self._file.exists()):
            return start
        leaves, form = jax.tree.flatten(start)
        remedy = "delete it to begin this part anew"
        saved = read_arrays(self._file, remedy)
        form_of = {str(i): (leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)}
        if {name: (array.shape, array.dtype) for name, array in saved.items()} != form_of:
            raise InputError(f"{self._file}: not the state of this descent; {remedy}")
        placed = [jax.device_put(saved[str(i)], leaf.sharding) for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(form, placed)

    def save(self, state: DescentState, trace: Trace) -> None:
        """Called after every chunk; writes where that is cheap enough."""
        del trace
        now = time.monotonic()
        if broadcast_flag(now - self._saved_at >= self._cost / _SAVING_SHARE):
            arrays = {str(i): gather(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
            on_process_zero(lambda: write_arrays(self._file, **arrays))
            self._saved_at = time.monotonic()
            self._cost = self._saved_at - now
        self.report(math.ceil(int(state.step) / Descent.chunk_size))

    def finish(self, **arrays: np.ndarray) -> None:
        """Keep a finished block's arrays; the state is of no more use."""

        def write() -> None:
            write_arrays(self.run.part_file(self.name), **arrays)
            self._file.unlink(missing_ok=True)

        on_process_zero(write)


def _prune_block(
    layer: int,
    dense: BlockWeights,
    streams: _Streams,
    settings: PruneSettings,
    model: Llama,
    work: _Work,
) -> list[dict[str, Any]]:
    names = TARGETS[settings.targets]
    extra: dict[str, Any] = {}
    if settings.method == "descent":
        weights, kept, extra = _descend(layer, dense, streams, settings, work)
    else:
        results = _baseline(dense, streams, settings)
        weights = {name: result.weight for name, result in results.items()}
        kept = {name: result.keep_mask for name, result in results.items()}
        raised = {n: int(r.damping_raised) for n, r in results.items() if r.damping_raised}
        extra = {"damping_raised": raised} if raised else {}
    for name in names:
        if not bool(jnp.isfinite(weights[name]).all()):
            raise InputError(
                f"block {layer}: {name} is not finite after pruning; check the weights"
            )
    rows = _head_rows(layer, dense, dense._replace(**weights), streams, extra)
    work.finish(
        **{name: gather(weights[name].astype(jnp.float32)) for name in names},
        **{f"keep_{name}": gather(kept[name]) for name in names},
    )
    return rows


def _head_rows(
    layer: int, dense: BlockWeights, pruned: BlockWeights, streams: _Streams, extra: dict[str, Any]
) -> list[dict[str, Any]]:
    """Relative error of every head's attention, both on the dense model's activations."""
    config = streams.config
    settings = _query_key_settings(config, Sparsity(0.0))
    rope = jnp.asarray(inverse_frequencies(config))
    columns = []
    for hidden in (streams.dense, streams.heldout):
        x = streams.normed(hidden, dense)
        error, energy = head_errors(
            x, (pruned.wq, pruned.wk), x, (dense.wq, dense.wk), rope, settings
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


def _heads(w: Array, config: LlamaConfig) -> Array:
    """A projection ``[d, heads·k]`` as ``[d, heads, k]``."""
    return w.reshape(w.shape[0], -1, config.head_dim)


def _query_key_settings(config: LlamaConfig, sparsity: Sparsity) -> QueryKeySettings:
    return QueryKeySettings(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        scale=config.head_dim**-0.5,
        sparsity=sparsity,
    )


def _descent_settings(
    settings: PruneSettings, config: LlamaConfig
) -> QueryKeySettings | BlockSettings:
    chosen: QueryKeySettings | BlockSettings
    if settings.targets == "qk":
        chosen = _query_key_settings(config, settings.sparsity)._replace(refit=settings.refit)
    else:
        chosen = BlockSettings(config, settings.sparsity)
    if settings.steps is not None:
        chosen = chosen._replace(steps=settings.steps)
    return chosen._replace(**settings.tuning)


def _descend(
    layer: int,
    dense: BlockWeights,
    streams: _Streams,
    settings: PruneSettings,
    work: _Work,
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Any]]:
    """Run the preset on one block, from its saved state where there is one."""
    chosen = _descent_settings(settings, streams.config)
    context: Any
    if isinstance(chosen, QueryKeySettings):
        weights: PyTree = _movable((dense.wq, dense.wk))
        x0 = streams.normed(streams.dense, dense)
        x = streams.normed(streams.pruned, dense) if settings.propagate else x0
        data = {"x": x, "x0": x0}
        rope = jnp.asarray(inverse_frequencies(streams.config))
        make: Callable[..., Descent] = query_key_descent
    else:
        weights = _movable({name: getattr(dense, name) for name in TARGETS["all"]})
        target = next_hidden(dense, streams.dense, streams.config, batch=settings.batch)
        data = {"hidden": streams.pruned, "target": target}
        make = block_descent
    fit, validation = split_sequences(data)
    if isinstance(chosen, QueryKeySettings):
        wv = _heads(_wide(dense.wv), streams.config)
        wo = _heads(_wide(dense.wo).T, streams.config).transpose(1, 2, 0)
        context = query_key_context(weights, fit, rope, chosen, wv, wo)
    else:
        norms = _input_norms(dense, streams, TARGETS["all"], settings.batch)
        context = block_context(weights, fit, dense, norms, chosen)
    key = jax.random.fold_in(jax.random.key(settings.seed), layer)
    found, extra = _run(make, chosen, weights, fit, validation, context, key, work)
    if isinstance(chosen, QueryKeySettings):
        return (
            dict(zip(TARGETS["qk"], found.weights, strict=True)),
            dict(zip(TARGETS["qk"], found.keep_masks, strict=True)),
            extra,
        )
    return found.weights, found.keep_masks, extra


def _run(
    make: Callable[..., Descent],
    settings: DescentSettings,
    weights: PyTree,
    fit: PyTree,
    validation: PyTree,
    context: PyTree,
    key: Key[Array, ""],
    work: _Work,
) -> tuple[DescentResult, dict[str, Any]]:
    """Run a descent from its saved state where there is one; what to say of it."""

    def chunk(
        state: DescentState, weights: PyTree, data: PyTree, validation: PyTree, key: Array
    ) -> tuple[DescentState, Trace]:
        return _advance(make, settings, state, weights, data, validation, context, key)

    found = descend(
        make(weights, fit, context, settings),
        weights,
        fit,
        key=key,
        validation=validation,
        state=work.load(_start(make, settings, weights, fit, validation, context)),
        on_chunk=work.save,
        chunk=chunk,
    )
    assert found.state.best is not None
    if int(found.state.rejected) == settings.steps:
        raise InputError(f"{work.name}: the loss was never finite; check weights and activations")
    return found, {
        "best_step": int(found.state.best.step),
        "rejected_steps": int(found.state.rejected),
    }


def _movable(weights: PyTree) -> PyTree:
    """Weights as a descent moves them: float32, whatever the model computes in."""
    return split_columns(jax.tree.map(_wide, weights))


def _wide(w: Array) -> Array:
    return w.astype(accumulation_dtype(w))


@partial(jax.jit, static_argnums=(0, 1))
def _start(
    make: Callable[..., Descent],
    settings: DescentSettings,
    weights: PyTree,
    fit: PyTree,
    validation: PyTree,
    context: PyTree,
) -> DescentState:
    return split_columns(make(weights, fit, context, settings).init(weights, validation))


# One program for all blocks: what differs between them are arguments.
@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _advance(
    make: Callable[..., Descent],
    settings: DescentSettings,
    state: DescentState,
    weights: PyTree,
    fit: PyTree,
    validation: PyTree,
    context: PyTree,
    key: Key[Array, ""],
) -> tuple[DescentState, Trace]:
    descent = make(weights, fit, context, settings)
    state, trace = descent.chunk(state, weights, fit, validation, key)
    return split_columns(state), trace


def _baseline(
    dense: BlockWeights, streams: _Streams, settings: PruneSettings
) -> dict[str, PrunedLinear]:
    """A baseline on every target, scored in one dense pass of the block, as the originals do."""
    names, sparsity = TARGETS[settings.targets], settings.sparsity
    if settings.method == "magnitude":
        return {name: magnitude(getattr(dense, name), sparsity) for name in names}
    if settings.method == "wanda":
        norms = _input_norms(dense, streams, names, settings.batch)
        return {
            name: wanda_from_norms(norms[name], getattr(dense, name), sparsity) for name in names
        }
    hessians = _statistics(dense, streams, names, hessian, settings.batch)
    return {
        name: sparsegpt_from_hessian(hessians[name], getattr(dense, name), sparsity)
        for name in names
    }


def _input_norms(
    dense: BlockWeights, streams: _Streams, names: tuple[str, ...], batch: int
) -> dict[str, Float[Array, " d_in"]]:
    """Wanda's norms of the inputs of linear maps."""
    squares = _statistics(dense, streams, names, _squared_norms, batch)
    return {name: jnp.sqrt(value) for name, value in squares.items()}


def _squared_norms(x: Float[Array, "b n d"]) -> Float[Array, " d"]:
    return feature_norms(x) ** 2


def _statistics(
    dense: BlockWeights,
    streams: _Streams,
    names: tuple[str, ...],
    statistic: Callable[[Array], Array],
    batch: int,
) -> dict[str, Array]:
    """Mean over all windows of a statistic of the inputs of linear maps, batch by batch."""
    fields = tuple(sorted({INPUT_OF[name] for name in names}))
    windows = streams.pruned.shape[0]
    total: dict[str, Array] = {}
    for start in range(0, windows, batch):
        hidden = streams.pruned[start : start + batch]
        share = hidden.shape[0] / windows
        part = _batch_statistics(dense, hidden, streams.config, fields, statistic)
        total = {f: total.get(f, 0) + share * value for f, value in part.items()}
    return {name: total[INPUT_OF[name]] for name in names}


@partial(jax.jit, static_argnums=(2, 3, 4))
def _batch_statistics(
    dense: BlockWeights,
    hidden: Array,
    config: LlamaConfig,
    fields: tuple[str, ...],
    statistic: Callable[[Array], Array],
) -> dict[str, Array]:
    inputs = block(dense, hidden, config)[1]
    return {field: statistic(getattr(inputs, field)) for field in fields}
