"""Perplexity, with the protocol it was measured by on every number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from jaxprune.errors import InputError
from jaxprune.models.llama.losses import (
    head_judgements,
    window_divergences,
    window_losses,
)
from jaxprune.models.llama.modeling import Llama, Tokens
from jaxprune.text.windows import Windows


def evaluate(
    model: Llama,
    windows: Windows,
    *,
    batch: int = 8,
    losses: Callable[[Llama, Tokens], Float[Array, " b"]] | None = None,
) -> dict[str, Any]:
    """Perplexity ``exp(mean_w mean_i −log p(x_{w,i+1} | x_{w,≤i}))`` over windows ``w``.

    Args:
      model: computes in its own type; the cross-entropy is float32.
      windows: of ``text.windows.evaluation_windows``; each is scored on its own.
      batch: windows at once.
      losses: mean cross-entropy of every window, for a model computed in another way;
        ``window_losses`` if ``None``.

    Returns:
      ``perplexity`` and what it depends on: corpus, split, seqlen, windows, bos, dtype,
      tokens_scored. The first token of a window is not scored.

    Raises:
      InputError: the batch is empty, or the loss is not a finite number.
    """
    loss = losses or window_losses
    mean = _mean(windows.tokens, lambda tokens: loss(model, tokens), batch, "perplexity")
    if not math.isfinite(mean) or mean > 700:
        raise InputError(f"the mean loss is {mean}; the weights of the model are not usable")
    return {
        "perplexity": math.exp(mean),
        **windows.protocol,
        "dtype": model.embedding.get_value().dtype.name,
        "tokens_scored": windows.tokens[:, 1:].size,
    }


def divergence(model: Llama, reference: Llama, windows: Windows, *, batch: int = 8) -> float:
    """Kullback-Leibler divergence of the predictions of two models, in nats.

    ``mean_w mean_i KL(p_ref(· | x_{w,≤i}) ‖ p(· | x_{w,≤i}))``. It sees every difference of the
    predictions, where a difference of perplexities is of signed terms that mostly cancel: it
    varies far less from text to text.

    Args:
      model: what is judged.
      reference: the dense model.
      windows: of ``text.windows.evaluation_windows``.
      batch: windows at once.
    """
    return _mean(
        windows.tokens,
        lambda tokens: window_divergences(model, reference, tokens),
        batch,
        "divergence",
    )


class Judgement(NamedTuple):
    """Of a model on a text: its perplexity, its divergence from the dense one in nats."""

    perplexity: float
    divergence: float


def dense_states(model: Llama, windows: Windows, *, batch: int = 8) -> Float[np.ndarray, "w n d"]:
    """Hidden states of the dense model after its last block, float32, for ``judge``."""
    check_batch(batch)
    tokens = windows.tokens
    parts = [_states(model, jnp.asarray(part)) for part in _batches(tokens, batch)]
    return np.concatenate([np.asarray(part, np.float32) for part in parts])[: len(tokens)]


def judge(
    model: Llama,
    windows: Windows,
    expected: Float[np.ndarray, "w n d"],
    *,
    batch: int = 8,
) -> Judgement:
    """What ``evaluate`` and ``divergence`` measure, in one pass through the pruned model alone.

    Args:
      model: a pruned model with embedding, last norm and head of the dense one.
      windows: of ``text.windows.evaluation_windows``.
      expected: ``dense_states`` on these windows.
      batch: windows at once.

    Raises:
      InputError: the batch is empty, or the loss is not a finite number.
    """
    check_batch(batch)
    pairs = zip(_batches(windows.tokens, batch), _batches(expected, batch), strict=True)
    parts = [np.asarray(_judged(model, *map(jnp.asarray, pair))) for pair in pairs]
    values = np.concatenate(parts, axis=1)[:, : len(windows.tokens)].astype(float)
    loss, divergence = values.mean(axis=1)
    if not math.isfinite(loss) or loss > 700:
        raise InputError(f"the mean loss is {loss}; the weights of the model are not usable")
    return Judgement(math.exp(loss), float(divergence))


def _batches(windows: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    """Batches of equal size, the last filled up from the front, for one compiled program."""
    for start in range(0, len(windows), min(batch, len(windows))):
        yield windows[np.arange(start, start + min(batch, len(windows))) % len(windows)]


@jax.jit
def _states(model: Llama, tokens: Tokens) -> Float[Array, "b n d"]:
    return model.hidden_states(tokens)


@jax.jit
def _judged(model: Llama, tokens: Tokens, expected: Float[Array, "b n d"]) -> Float[Array, "2 b"]:
    hidden = model.hidden_states(tokens)
    return jnp.stack(head_judgements(model, hidden, expected.astype(hidden.dtype), tokens))


def check_batch(batch: int) -> None:
    """Raise ``InputError`` for a batch of no windows."""
    if batch < 1:
        raise InputError(f"batch must be at least 1, not {batch}")


def _mean(
    windows: Int[np.ndarray, "w n"],
    measure: Callable[[Array], Float[Array, " b"]],
    batch: int,
    name: str,
) -> float:
    """Mean over windows of what ``measure`` gives for each, batch by batch."""
    check_batch(batch)
    count = windows.shape[0]
    batch = min(batch, count)
    # Closed also when a batch fails: the error has its own line.
    with tqdm(total=math.ceil(count / batch), desc=name, unit="batch", leave=False) as bar:
        means = []
        for part in _batches(windows, batch):
            means.append(np.asarray(measure(jnp.asarray(part))))
            bar.update()
    return float(np.concatenate(means)[:count].astype(float).mean())
