"""Attention layers to experiment on, head by head: from arrays in a file, or from a model.

A source yields one layer after the other, so that what is held does not grow with the number of
layers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.attention import check_finite
from jaxprune.errors import InputError
from jaxprune.evaluation.comparison import FusedProblem
from jaxprune.evaluation.fused_llama import check_fusable
from jaxprune.methods.fused import GRID_POINTS
from jaxprune.models import llama
from jaxprune.models.llama.activations import attention_inputs
from jaxprune.models.llama.files import checkpoint_hashes
from jaxprune.models.llama.modeling import BlockWeights, attention_form
from jaxprune.storage import hashes, read_arrays
from jaxprune.text.tokenizer import Tokenizer
from jaxprune.text.windows import calibration_windows, check_sizes


@dataclass(frozen=True)
class Layers:
    """Layers of a model, each with its heads as problems that share their activations.

    Attributes:
      indices: of the layers, ascending.
      heads: query heads of a layer.
      d: width of the model.
      k: width of a head.
      n: tokens of a calibration sequence.
      tokens: of calibration and held-out text together, in one layer.
      read: yields ``(index, problems)``, layer after layer.
      inputs: hashes of what was read, for ``RunFolder``.
      protocol: of the calibration and held-out text.
    """

    indices: tuple[int, ...]
    heads: int
    d: int
    k: int
    n: int
    tokens: int
    read: Callable[[], Iterator[tuple[int, FusedProblem]]]
    inputs: dict[str, dict[str, str]]
    protocol: dict[str, Any] = field(default_factory=dict)

    def matched_ratio(self, ratio: float) -> float | None:
        """Ratio at which a fused matrix stores what ``W_Q`` and ``W_K`` store at ``ratio``.

        ``1 − 2k(1 − ρ)/d``, as the counts round; ``None`` where the fused matrix has room for all.
        """
        stored = 2 * (self.d * self.k - int(self.d * self.k * ratio + 1e-6))
        return round(1 - stored / self.d**2, 6) if stored < self.d**2 else None


def from_file(path: Path) -> Layers:
    """The layer in an ``.npz``; see ``read_layer``."""
    problems = read_layer(path)
    (heads, d, k), n = problems.wq.shape, problems.x.shape[1]
    tokens = sum(x.shape[0] * x.shape[1] for x in (problems.x, problems.x_heldout))
    inputs = {"input": hashes([path])}
    return Layers((0,), heads, d, k, n, tokens, lambda: iter([(0, problems)]), inputs)


def from_model(
    model: str,
    calibration: str,
    *,
    windows: int | None = None,
    seqlen: int | None = None,
    heldout: int | None = None,
    layers: Sequence[int] = (),
    seed: int = 0,
    dtype: str = "float32",
) -> Layers:
    """Layers of a model with its activations on calibration and held-out windows.

    Hidden states of both sets of windows go from block to block; those of one layer are held.

    Args:
      model: ``zoo``, a Hugging Face folder, a GGUF file, or a repository of the hub.
      calibration: text, see ``text.windows.calibration_windows``, as are the next three.
      windows: to calibrate on.
      seqlen: tokens of a window.
      heldout: windows to judge by.
      layers: which ones; all if empty.
      seed: of windows drawn from C4.
      dtype: of the model's weights and activations; problems are float32.

    Raises:
      InputError: the model or text cannot be read, there is no such layer, nothing held out, or
        attention that fused weights do not describe.
    """
    check_sizes(windows, seqlen)
    if heldout is not None and heldout < 1:
        raise InputError(f"heldout {heldout}: expected 1 or more")
    folder = llama.locate(model)
    config = llama.load_config(folder)
    check_fusable(config)
    blocks = config.num_hidden_layers
    _check_layers(layers, config)
    tokenizer = Tokenizer(folder, config.vocab_size)
    fit, fresh = calibration_windows(
        calibration, tokenizer, windows=windows, seqlen=seqlen, heldout=heldout, seed=seed
    )
    llama.check_length(config, fit.tokens.shape[1])
    indices = tuple(sorted(set(layers))) or tuple(range(blocks))

    def read() -> Iterator[tuple[int, FusedProblem]]:
        loaded = llama.load(folder, dtype)
        streams = (attention_inputs(loaded, jnp.asarray(w.tokens)) for w in (fit, fresh))
        for layer, (x, x_heldout) in enumerate(zip(*streams, strict=True)):
            if layer in indices:
                yield layer, of_block(loaded.block_weights(layer), config, x, x_heldout)
            if layer == indices[-1]:
                return

    inputs = {"model": checkpoint_hashes(folder), "calibration": fit.hashes()}
    return Layers(
        indices,
        config.num_attention_heads,
        config.hidden_size,
        config.head_dim,
        fit.tokens.shape[1],
        fit.tokens.size + fresh.tokens.size,
        read,
        inputs | {"heldout": fresh.hashes()},
        {"calibration": fit.protocol, "heldout": fresh.protocol},
    )


class FusedHeads:
    """Fused heads of a model on the first window of a text; RoPE left out, as in the paper.

    Attributes:
      config: of the model.
      inputs: hashes of what was read, for ``RunFolder``.

    Args:
      model: ``zoo``, a Hugging Face folder, or a repository of the hub.
      calibration: text, see ``text.windows.calibration_windows``.
      seqlen: tokens of the window.
      layers: that heads will be asked for.

    Raises:
      InputError: the model or text cannot be read, there is no such layer, or attention that fused
        weights do not describe.
    """

    def __init__(
        self, model: str, calibration: str, *, seqlen: int, layers: Sequence[int] = ()
    ) -> None:
        check_sizes(1, seqlen)
        folder = llama.locate(model)
        self.config = llama.load_config(folder)
        check_fusable(self.config)
        _check_layers(layers, self.config)
        windows, _ = calibration_windows(
            calibration,
            Tokenizer(folder, self.config.vocab_size),
            windows=1,
            seqlen=seqlen,
            heldout=0,
        )
        self._model, self._tokens = llama.load(folder, "float32"), jnp.asarray(windows.tokens)
        self.inputs = {"model": checkpoint_hashes(folder), "calibration": windows.hashes()}

    def heads(self, layer: int) -> tuple[Float[Array, "h 1 n d"], Float[Array, "h d d"]]:
        """Activations, and ``W = W_Q W_Kᵀ/√k`` of every query head."""
        x = next(islice(attention_inputs(self._model, self._tokens), layer, None))
        w = of_block(self._model.block_weights(layer), self.config, x, x[:0]).w
        return jnp.broadcast_to(x, (w.shape[0], *x.shape)), w


def _check_layers(layers: Sequence[int], config: llama.LlamaConfig) -> None:
    last = config.num_hidden_layers - 1
    wrong = [layer for layer in layers if not 0 <= layer <= last]
    if wrong:
        raise InputError(f"layers {wrong[0]}: the model has blocks 0 to {last}")


def of_block(
    weights: BlockWeights, config: llama.LlamaConfig, x: jax.Array, x_heldout: jax.Array
) -> FusedProblem:
    """The heads of a block as problems, in float32.

    They are those of tokens at one position: no rotation, but the factor of yarn's scaling.
    """
    upcast = partial(jnp.asarray, dtype=jnp.float32)
    wq, wk = (
        upcast(w).reshape(config.hidden_size, -1, config.head_dim) for w in (weights.wq, weights.wk)
    )
    factor = attention_form(weights, config).rope_factor
    wq = wq if factor is None else wq * factor**2
    return FusedProblem.of_layer(upcast(x), upcast(x_heldout), wq, wk)


def read_layer(path: Path) -> FusedProblem:
    """The heads of the layer in an ``.npz`` as problems that share their activations.

    Raises:
      InputError: no such file, not an ``.npz``, a missing array, shapes that do not match, too few
        sequences to hold some out, or values that are not finite.
    """
    stored = read_arrays(path, "expected the arrays x, wq and wk")
    kinds = {name: array.dtype.kind for name, array in stored.items()}
    if not set(kinds.values()) <= set("fiub"):
        name = next(name for name, kind in kinds.items() if kind not in "fiub")
        raise InputError(f"{path}: {name} does not hold real numbers")
    with np.errstate(over="ignore"):  # what does not fit is infinite, and refused as such
        arrays = {name: array.astype(np.float32) for name, array in stored.items()}
    missing = sorted({"x", "wq", "wk"} - arrays.keys())
    if missing:
        raise InputError(f"{path}: no array named {', '.join(missing)}")
    x, wq, wk = (arrays[name] for name in ("x", "wq", "wk"))
    x = x[None] if x.ndim == 2 else x
    heldout = arrays.get("x_heldout")
    if heldout is None:
        quarter = len(np.atleast_1d(x)) // 4
        if not quarter:
            raise InputError(f"{path}: no x_heldout, and x has fewer than 4 sequences")
        print(f"no x_heldout: the last {quarter} of {x.shape[0]} sequences are held out")
        x, heldout = x[:-quarter], x[-quarter:]
    heldout = heldout[None] if heldout.ndim == 2 else heldout
    _check_layer(path, x, heldout, wq, wk)
    return FusedProblem.of_layer(*map(jnp.asarray, (x, heldout, wq, wk)))


def _check_layer(
    path: Path, x: np.ndarray, heldout: np.ndarray, wq: np.ndarray, wk: np.ndarray
) -> None:
    shapes = f"x {x.shape}, x_heldout {heldout.shape}, wq {wq.shape}, wk {wk.shape}"
    if (
        (x.ndim, heldout.ndim, wq.ndim, wk.ndim) != (3, 3, 3, 3)
        or len({x.shape[2], heldout.shape[2], wq.shape[0], wk.shape[0]}) != 1
        or wq.shape[2] != wk.shape[2]
        or min(*x.shape, *heldout.shape, *wq.shape, *wk.shape) < 1
        or wq.shape[1] % wk.shape[1]
    ):
        raise InputError(
            f"{path}: shapes do not match: {shapes}; expected x [b, n, d], "
            "wq [d, heads, k], wk [d, kv_heads, k] with kv_heads dividing heads"
        )
    try:
        check_finite(x=x, x_heldout=heldout, wq=wq, wk=wk)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def available_memory() -> int:
    """Bytes of the device that can be used: its limit, or what the machine has free or has."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return int(statistics["bytes_limit"] - statistics.get("bytes_in_use", 0))
    # macOS does not say what is free.
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


# Matrices [d, d] that one run of Algorithm 1 holds (variable, gradient, effective weight, updates).
# All points of its grid are mapped over at once, more runs than any other method has.
_MATRICES = 5


def fitting_heads(layers: Layers, ratios: int) -> int:
    """Heads that can be pruned together in half of the available memory, at least one.

    A head needs its queries for all tokens twice (whole and split for validation) and, whichever
    is more, the grid of Algorithm 1 or the ratios of the other methods.
    """
    matrix = 4 * layers.d**2
    head = 8 * layers.tokens * layers.d + matrix * _MATRICES * max(GRID_POINTS, 2 * ratios)
    return int(min(layers.heads, max(1, available_memory() // 2 // head)))
