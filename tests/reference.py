"""Independent NumPy float64 forms of what the package computes, straight from the formulas."""

import numpy as np


def attention(x, w, causal=True):
    """Def. 1.1 and 3.1: A = exp(x w xᵀ), masked, over its row sums."""
    logits = np.asarray(x, np.float64) @ np.asarray(w, np.float64) @ np.asarray(x, np.float64).T
    a = np.exp(logits - logits.max(axis=1, keepdims=True))
    if causal:
        # The maximum may lie above the diagonal; subtract that of the visible part.
        visible = np.where(np.tril(np.ones_like(logits)) > 0, logits, -np.inf)
        a = np.exp(visible - visible.max(axis=1, keepdims=True))
    return a / a.sum(axis=1, keepdims=True)


def loss(mask, x, w, lam, causal=True):
    """Def. 1.2 and 3.2 for one sequence."""
    c = attention(x, mask * w, causal) - attention(x, w, causal)
    return 0.5 * np.sum(c**2) + 0.5 * lam * np.sum(mask**2)


def gradient(mask, x, w, lam, causal=True):
    """The closed form, row by row."""
    f = attention(x, mask * w, causal)
    c = f - attention(x, w, causal)
    p = np.stack([(np.diag(fi) - np.outer(fi, fi)) @ ci for fi, ci in zip(f, c, strict=True)])
    return w * (x.T @ p @ x) + lam * mask


def algorithm1(x, w, lam, rate, steps, drop, causal=True):
    """Gradient descent from ones; the keep mask of the largest entries of the last mask."""
    mask = np.ones_like(w)
    for _ in range(steps):
        mask = mask - rate * gradient(mask, x, w, lam, causal)
    return mask, keep(mask.ravel(), drop).reshape(mask.shape)


def keep(scores, drop):
    """Drop the lowest by a stable ascending sort: of ties, the first goes first."""
    kept = np.ones(len(scores), bool)
    kept[np.argsort(scores, kind="stable")[:drop]] = False
    return kept


def wanda(sequences, w, ratio=None, n_of_m=None):
    """Wanda's keep mask in [out, in] orientation: the original's running mean, sorted rows."""
    weight = np.array(w, np.float64).T
    mean = np.zeros(weight.shape[1])
    for seen, x in enumerate(sequences):
        mean = mean * seen / (seen + 1) + np.linalg.norm(x.astype(np.float64), axis=0) ** 2 / (
            seen + 1
        )
    scores = np.abs(weight) * np.sqrt(mean)
    if n_of_m is None:
        return np.stack([keep(row, int(row.size * ratio + 1e-9)) for row in scores]).T
    n, m = n_of_m
    groups = scores.reshape(-1, m)
    return np.stack([keep(group, m - n) for group in groups]).reshape(scores.shape).T


def sparsegpt(sequences, w, ratio=None, n_of_m=None, block=128, damping=0.01):
    """SparseGPT in [out, in] orientation: explicit inverse, a loop over columns, exact counts."""
    weight = np.array(w, np.float64).T
    inputs = weight.shape[1]
    h = sum(2 * x.T.astype(np.float64) @ x for x in sequences) / len(sequences)
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    weight[:, dead] = 0
    h += damping * np.mean(np.diag(h)) * np.eye(inputs)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        part, square = weight[:, start:stop].copy(), u[start:stop, start:stop]
        errors = np.zeros_like(part)
        scores = part**2 / np.diag(square) ** 2
        kept = np.ones(part.shape, bool)
        if n_of_m is None:
            kept = keep(scores.ravel(), int(scores.size * ratio + 1e-9)).reshape(part.shape)
        for i in range(stop - start):
            if n_of_m is not None and i % n_of_m[1] == 0:
                group = slice(i, i + n_of_m[1])
                scores = part[:, group] ** 2 / np.diag(square)[group] ** 2
                kept[:, group] = [keep(row, n_of_m[1] - n_of_m[0]) for row in scores]
            value = part[:, i].copy()
            pruned = np.where(kept[:, i], value, 0)
            errors[:, i] = (value - pruned) / square[i, i]
            part[:, i:] -= np.outer(errors[:, i], square[i, i:])
            part[:, i] = pruned
        weight[:, start:stop] = part
        weight[:, stop:] -= errors @ u[start:stop, stop:]
    return weight.T
