"""One budget of zeros over many matrices: how much of each to remove.

A matrix ``W`` whose error counts as ``tr(A E B Eᵀ)`` loses about ``A_ii B_jj w_ij²`` with the entry
``ij``. Where factors of all matrices measure the same thing, for instance nats of the model's
predictions, these numbers compare across them, and one threshold takes the least from all.

Entries are counted in bins of their floating-point numbers, not sorted or kept: a model's weights
are too many for that.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxprune.errors import InputError
from jaxprune.sparsity import Sparsity

# The first 16 bits of a float32: sign, exponent and 7 bits, so that bins are within 1 %.
_BINS = 2**15


def saliency_counts(saliency: Float[np.ndarray, "d_in d_out"]) -> Int[np.ndarray, " bins"]:
    """Entries of a matrix in every bin of saliency, lowest first.

    Args:
      saliency: what goes with each entry, 0 or more, finite.

    Raises:
      InputError: negative or not finite.
    """
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused
        values = np.ascontiguousarray(saliency, np.float32).reshape(-1)
    if not (values.size and np.isfinite(values).all() and values.min() >= 0):
        raise InputError("saliency: expected finite numbers, 0 or more")
    values = values + np.float32(0)  # minus zero is zero
    return np.bincount(values.view(np.uint32) >> 16, minlength=_BINS)


def allocate(
    counts: Sequence[Int[np.ndarray, " bins"]],
    drop: int,
    *,
    lowest: float = 0.0,
    highest: float = 1.0,
) -> list[int]:
    """Entries to drop from every matrix so that ``drop`` go in all, by one threshold.

    Every matrix drops its entries below a common saliency, but no less than ``lowest`` and no more
    than ``highest`` of them, both rounded down to whole entries. Of the entries in the bin of the
    threshold, matrices drop shares.

    Args:
      counts: of ``saliency_counts`` for every matrix.
      drop: entries to drop in all.
      lowest: least ratio of a matrix.
      highest: greatest ratio of a matrix.

    Returns:
      Drop counts that add up to ``drop`` exactly.

    Raises:
      InputError: the bounds leave no way.
    """
    if not 0 <= lowest <= highest <= 1:
        raise InputError(
            f"lowest {lowest:g}, highest {highest:g}: expected 0 <= lowest <= highest <= 1"
        )
    if len({len(count) for count in counts}) != 1 or any((count < 0).any() for count in counts):
        raise InputError("counts: expected those of one or more matrices, by `saliency_counts`")
    try:
        drop = operator.index(drop)
    except TypeError:
        raise InputError(f"drop {drop!r:.40}: expected a whole number") from None
    table = np.stack([np.asarray(count, np.int64) for count in counts])
    sizes = table.sum(axis=1)
    # Rounded as one ratio is, so that a bound may be the ratio of all.
    least, most = (
        np.array([Sparsity(bound).drop_count(int(size)) for size in sizes], np.int64)
        for bound in (lowest, highest)
    )
    if not least.sum() <= drop <= most.sum() or (least > most).any():
        raise InputError(
            f"drop {drop} of {sizes.sum()}: between {least.sum()} and {most.sum()} can go where "
            f"every matrix loses {lowest:g} to {highest:g} of its entries"
        )
    below = np.concatenate([np.zeros((len(table), 1), np.int64), table.cumsum(axis=1)], axis=1)
    clipped = np.clip(below, least[:, None], most[:, None])
    # The last bin whose lower edge does not drop too many; totals grow with the edge.
    edge = int(np.searchsorted(clipped.sum(axis=0), drop, side="right")) - 1
    here = clipped[:, edge]
    missing = drop - int(here.sum())
    if not missing:
        return [int(n) for n in here]
    room = clipped[:, edge + 1] - here
    share = room * missing // room.sum()
    # What rounding down left goes to the matrices with most room.
    order = np.argsort(-(room - share), kind="stable")
    share[order[: missing - int(share.sum())]] += 1
    return [int(n) for n in here + share]
