"""Perplexity, with the protocol it was measured by on every number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from jaxprune.errors import InputError
from jaxprune.models.llama.losses import window_divergences, window_losses
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
    means = np.zeros(count)
    for start in tqdm(range(0, count, batch), desc=name, unit="batch", leave=False):
        # The last batch is filled up with windows from its front, for one compiled program.
        rows = np.arange(start, start + batch) % count
        computed = np.asarray(measure(jnp.asarray(windows[rows])))
        means[start : start + batch] = computed[: count - start]
    return float(means.mean())
