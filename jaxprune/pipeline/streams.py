"""Hidden states on their way through a model, and statistics of what its linear maps see."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune.attention import rms_norm
from jaxprune.models.llama.activations import next_hidden
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llama.modeling import INPUT_OF, BlockWeights, Llama, block
from jaxprune.sharding import split_windows


class Streams(NamedTuple):
    """Hidden states before a block, of the dense model and of the one pruned so far.

    Attributes:
      dense: of all windows where the method needs them, else of the first, to judge by.
      pruned: of all windows.
      heldout: of the dense model on windows that no method sees.
      config: settings of the model.
      whole: whether the dense stream is of all windows.
      target: the dense stream after the block, where it is of all windows; see ``ahead``.
    """

    dense: Array
    pruned: Array
    heldout: Array
    config: LlamaConfig
    whole: bool = True
    target: Array | None = None

    @classmethod
    def start(
        cls, model: Llama, tokens: np.ndarray, heldout: np.ndarray, *, whole: bool = True
    ) -> Streams:
        """Streams before the first block.

        Args:
          model: embeds.
          tokens: windows to calibrate on.
          heldout: windows to judge by.
          whole: whether the dense stream is needed on more windows than it is judged by.
        """
        hidden, fresh = (
            split_windows(model.embed(jnp.asarray(windows))) for windows in (tokens, heldout)
        )
        judged = split_windows(hidden[: len(heldout)])
        return cls(hidden if whole else judged, hidden, fresh, model.config, whole)

    @property
    def judged(self) -> tuple[Array, Array]:
        """Of the dense model: the first windows, as many as are held out, and those held out."""
        return split_windows(self.dense[: self.heldout.shape[0]]), self.heldout

    def ahead(self, dense: BlockWeights, batch: int) -> Streams:
        """The same, and what the dense block makes of the dense stream where that is whole."""
        if not self.whole:
            return self
        return self._replace(target=next_hidden(dense, self.dense, self.config, batch=batch))

    def part(self, windows: slice) -> Streams:
        """Only some of the windows; of a dense stream to judge by, all."""

        def cut(hidden: Array) -> Array:
            return split_windows(hidden[windows])

        return self._replace(
            dense=cut(self.dense) if self.whole else self.dense,
            pruned=cut(self.pruned),
            target=None if self.target is None else cut(self.target),
        )

    def after(self, dense: BlockWeights, pruned: BlockWeights | None, batch: int) -> Streams:
        """Streams after a block; without ``pruned``, that stream is not advanced."""
        through = partial(next_hidden, config=self.config, batch=batch)
        return self._replace(
            dense=through(dense, self.dense) if self.target is None else self.target,
            target=None,
            pruned=self.pruned if pruned is None else through(pruned, self.pruned),
            heldout=through(dense, self.heldout),
        )

    def normed(self, hidden: Array, weights: BlockWeights) -> Array:
        """What ``W_Q``, ``W_K`` and ``W_V`` of a block are applied to."""
        return rms_norm(hidden, weights.attention_norm, self.config.rms_norm_eps)


def mean_statistic(
    dense: BlockWeights,
    streams: Streams,
    names: tuple[str, ...],
    statistic: Callable[[Array], Array],
    batch: int,
) -> dict[str, Array]:
    """Mean over all windows of a statistic of the inputs of linear maps, batch by batch.

    Args:
      dense: weights of the block, as the originals of Wanda and SparseGPT take its inputs.
      streams: the pruned one goes in.
      names: of the linear maps.
      statistic: of inputs ``[b, n, d_in]``, a mean over sequences.
      batch: windows at once.
    """
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


def linear_inputs(
    dense: BlockWeights, streams: Streams, names: tuple[str, ...], batch: int
) -> dict[str, Array]:
    """All inputs ``[w, n, d_in]`` of linear maps, for methods that need them whole."""
    fields = tuple(sorted({INPUT_OF[name] for name in names}))
    parts = [
        _batch_inputs(dense, streams.pruned[start : start + batch], streams.config, fields)
        for start in range(0, streams.pruned.shape[0], batch)
    ]
    whole = {field: jnp.concatenate([part[field] for part in parts]) for field in fields}
    return {name: whole[INPUT_OF[name]] for name in names}


@partial(jax.jit, static_argnums=(2, 3))
def _batch_inputs(
    dense: BlockWeights, hidden: Array, config: LlamaConfig, fields: tuple[str, ...]
) -> dict[str, Array]:
    inputs = block(dense, hidden, config)[1]
    return {field: getattr(inputs, field) for field in fields}
