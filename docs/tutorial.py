# %% [markdown]
"""From one head to a pruned model: a script with cells.

Open `docs/tutorial.py` in an editor that knows cells, or run it whole (`python docs/tutorial.py`):
figures go to the folder `runs/tutorial`. It takes a few minutes on two CPU cores; with
`JAXPRUNE_TOY=1` in the environment it is smaller, which is how the tests run it.
`docs/tutorial.ipynb` is the same with its outputs.
"""

# %% [markdown]
# # What is pruned
#
# Attention compares tokens by `x_i W x_jᵀ`, `W = W_Q W_Kᵀ/√k`, and a softmax turns each row of
# these logits into weights that sum to one. Weights of `W` that the softmax hides may go; a small
# change of a large logit may not. We take one head of the embedded Llama and look.

# %%
import os
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxprune import (
    attention_matrix,
    baselines,
    prune_attention,
    prune_query_key,
    relative_error,
    softmax_error,
)
from jaxprune.convergence.report import report
from jaxprune.evaluation import perplexity
from jaxprune.evaluation.comparison import FusedProblem
from jaxprune.evaluation.heads import of_block
from jaxprune.models import llama
from jaxprune.models.llama.activations import attention_inputs
from jaxprune.pipeline.model import PruneSettings, prune_model
from jaxprune.runs import plotting
from jaxprune.runs.folder import RunFolder
from jaxprune.sparsity import Sparsity
from jaxprune.text.tokenizer import Tokenizer
from jaxprune.text.windows import calibration_windows, evaluation_windows

TOY = bool(os.environ.get("JAXPRUNE_TOY"))
WINDOWS, SEQLEN = (8, 24) if TOY else (64, 128)
STEPS = 30 if TOY else 300
LAYER, HEAD = 3, 0
FIGURES = Path("runs/tutorial")
FIGURES.mkdir(parents=True, exist_ok=True)

folder = llama.locate("zoo")
model = llama.load(folder)
tokenizer = Tokenizer(folder, model.config.vocab_size)
windows, fresh = calibration_windows("zoo", tokenizer, windows=WINDOWS, seqlen=SEQLEN, heldout=4)
# What the projections of a layer are applied to, on both sets of windows.
x, x_fresh = (
    next(islice(attention_inputs(model, jnp.asarray(w.tokens)), LAYER, None))
    for w in (windows, fresh)
)
heads: FusedProblem = of_block(model.block_weights(LAYER), model.config, x, x_fresh)
w = heads.w[HEAD]
print(f"{x.shape[0]} sequences of {x.shape[1]} tokens; W is {w.shape[0]} x {w.shape[1]}")

# %% [markdown]
# # Half of it removed
#
# Wanda looks at each projection as a linear map. Algorithm 1 learns a mask for `W` by gradient
# descent on the attention matrix itself and leaves kept weights alone. The preset `gauss_newton`
# finds the mask, and values for the weights that it keeps, in closed form, from the curvature of
# the error; `descent` goes on from there, in steps on the error itself. These heads are fused
# without positions, as in the paper; how positions come in is seen below.

# %%
half = Sparsity(0.5)
wq, wk = heads.wq[HEAD], heads.wk[HEAD]
wanda_q, wanda_k = (baselines.wanda(x, projection, half) for projection in (wq, wk))
paper = prune_attention(x, w, half, preset="paper", steps=STEPS, batch_size=4)
closed = prune_attention(x, w, half, preset="gauss_newton")
descent = prune_attention(x, w, half, preset="descent", steps=STEPS)
pruned = {
    "Wanda on $W_Q$, $W_K$": wanda_q.weight @ wanda_k.weight.T,
    "Algorithm 1": paper.weight,
    "closed form": closed.weight,
    "preset descent": descent.weight,
}
errors = {
    name: [float(relative_error(inputs, w, weight)) for inputs in (x, x_fresh)]
    for name, weight in pruned.items()
}
for name, (calibration, heldout) in errors.items():
    print(f"{name:24} calibration {calibration:.4f}, held-out {heldout:.4f}")

# %% [markdown]
# # Attention before and after

# %%
shown = x_fresh[0, :24]
figure, axes = plt.subplots(1, 5, figsize=(12, 3), layout="constrained")
for cell, (name, weight) in zip(axes, {"dense": w, **pruned}.items(), strict=True):
    cell.imshow(attention_matrix(shown, weight) ** 0.5, vmin=0, vmax=1, cmap="viridis")
    cell.set_title(name, fontsize=9)
    cell.set_axis_off()
figure.suptitle("attention of the first tokens of a fresh window (square root)", fontsize=10)
plotting.save(figure, FIGURES, "attention")

# %% [markdown]
# # Where the masks keep
#
# Features of large activations keep more of their rows and columns. Algorithm 1 has to find them
# from gradients; the curvature that the closed form takes knows them.

# %%
norms = np.linalg.norm(np.asarray(x).reshape(-1, x.shape[-1]), axis=0)
figure, axes = plt.subplots(1, 2, figsize=(6.5, 3.0), sharey=True, layout="constrained")
for cell, (name, method, found) in zip(
    axes,
    [("Algorithm 1", "algorithm1", paper), ("closed form", "gauss_newton", closed)],
    strict=True,
):
    look = plotting.style(method)
    for axis, side, marker in ((1, "query", "o"), (0, "key", "^")):
        kept = np.asarray(found.keep_mask).mean(axis=axis)
        fill = look.color if marker == "^" else "none"
        cell.scatter(
            norms, kept, 14, marker=marker, edgecolors=look.color, facecolors=fill, label=side
        )
    cell.set_xscale("log")
    cell.set_title(name, fontsize=9)
    cell.legend(title="feature of the", frameon=False, fontsize=8, title_fontsize=8)
figure.supxlabel("norm of the feature's activations", fontsize=9)
axes[0].set_ylabel("fraction of its weights kept")
plotting.save(figure, FIGURES, "masks")

# %% [markdown]
# # Convergence
#
# For full-batch gradient descent the paper proves that `L(M)` comes within `ε` of `ξ` after a
# bounded number of steps. `monitor` records what is needed to hold a run against the theorem.

# %%
watched = prune_attention(
    x[:4],
    w,
    half,
    preset="paper",
    lam=paper.lam,
    learning_rate="curvature",
    steps=STEPS,
    monitor=True,
)
checked = report(watched.trace)
print(checked.describe())
figure, axes = plt.subplots(figsize=(4.5, 3), layout="constrained")
axes.semilogy(watched.trace.loss)
axes.set_xlabel("step")
axes.set_ylabel("$L(M)$")
plotting.save(figure, FIGURES, "convergence")

# %% [markdown]
# # Overfit against calibration size
#
# A mask has `d²` entries. `descent` from few windows is far better on them than on fresh ones, and
# held-out error comes down as there are more. Algorithm 1 is far from both here: its kept weights
# cannot make up for what it drops.

# %%
counts = [c for c in (1, 2, 4, 8, 16, 32, 64) if c <= WINDOWS][:: 3 if TOY else 1]
curves: dict[str, list[list[float]]] = {"paper": [], "descent": []}
for preset, points in curves.items():
    for count in counts:
        some = x[:count]
        found = prune_attention(some, w, half, preset=preset, steps=STEPS, batch_size=min(count, 4))
        points.append([float(relative_error(a, w, found.weight)) for a in (some, x_fresh)])
figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
for (preset, points), style in zip(
    curves.items(),
    (plotting.STYLES["algorithm1"], plotting.STYLES["descent"]),
    strict=True,
):
    for column, (dash, where) in enumerate((("--", "calibration"), ("-", "held-out"))):
        values = np.asarray(points)[:, column]
        axes.loglog(
            counts, values, dash, color=style.color, marker=style.marker, label=f"{preset}, {where}"
        )
axes.set_xlabel(f"calibration windows of {SEQLEN} tokens")
axes.set_ylabel("relative error")
axes.legend(frameon=False, fontsize=8)
plotting.save(figure, FIGURES, "overfit")

# %% [markdown]
# # A layer as the model has it
#
# A model stores `W_Q` and `W_K`, rotates queries and keys by their position, and lets several
# query heads share a key head. `prune_query_key` prunes the two projections on the attention
# matrices that come out of all that.

# %%
block, shape = model.block_weights(LAYER), model.config
by_head = partial(jnp.reshape, shape=(shape.hidden_size, -1, shape.head_dim))
layer = prune_query_key(
    x,
    by_head(block.wq),
    by_head(block.wk),
    half,
    rope=jnp.asarray(llama.inverse_frequencies(shape)),
    steps=STEPS,
)
print("relative error of every query head:", np.round(layer.calibration_error, 4))

# %% [markdown]
# # The loss in a training step
#
# `softmax_error` compares the attention of any queries and keys, `[..., tokens, width]`, with that
# of others: a layer that is pruned or trained with the dense one. The scale is part of the queries,
# key heads are repeated for the query heads that they serve, and a model that rotates does so
# before. Sequences and heads are leading axes, which it maps over as memory allows. Where the
# dense pair comes out of the same step, put `jax.lax.stop_gradient` around it.

# %%
Pair = tuple[jax.Array, jax.Array]
some = x[:4]


def projected(weight: jax.Array) -> jax.Array:
    """Queries or keys of every head, `[sequences, heads, tokens, width]`."""
    return jnp.einsum("bnd,hdk->bhnk", some, weight)


dense_q, dense_k = projected(heads.wq), projected(heads.wk)
kept_q, kept_k = (
    jnp.abs(weight) > jnp.median(jnp.abs(weight), axis=(1, 2), keepdims=True)
    for weight in (heads.wq, heads.wk)
)
weights = heads.wq * kept_q, heads.wk * kept_k
optimizer = optax.adam(2e-3)
state = optimizer.init(weights)


@jax.jit
def step(weights: Pair, state: optax.OptState) -> tuple[Pair, optax.OptState, jax.Array]:
    """One update; add the loss to that of your task."""

    def loss_of(weights: Pair) -> jax.Array:
        q, k = projected(weights[0] * kept_q), projected(weights[1] * kept_k)
        return softmax_error(q, k, dense_q, dense_k).mean()

    loss, gradient = jax.value_and_grad(loss_of)(weights)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(weights, updates), state, loss


losses = []
for _ in range(STEPS // 3):
    weights, state, loss = step(weights, state)
    losses.append(float(loss))
print(f"loss of magnitude pruning {losses[0]:.3f}, after {len(losses)} steps {losses[-1]:.3f}")

# %% [markdown]
# # The whole model
#
# Block after block, each on the activations of the model as pruned so far; then perplexity on a
# text that took no part, in windows as short as those here. The result is an ordinary checkpoint.
# `jaxprune prune` does the same with more care about files, and then distils the kept weights of
# all blocks together, which is left out here.

# %%
text = evaluation_windows("zoo", tokenizer, seqlen=SEQLEN, windows=4 if TOY else 64)
dense = perplexity.evaluate(model, text)["perplexity"]
found_perplexity = {}
for method in ("wanda", "descent"):
    smaller = llama.load(folder)
    settings = PruneSettings(method, "qk", Sparsity(0.7), steps=STEPS, distill=0)
    with RunFolder(FIGURES / "work", settings) as run:
        for _ in prune_model(
            smaller, windows.tokens, fresh.tokens, settings, run, lambda progress: None
        ):
            pass
    run.remove()
    found_perplexity[method] = perplexity.evaluate(smaller, text)["perplexity"]
shown = ", ".join(f"{method} {value:.2f}" for method, value in found_perplexity.items())
print(f"perplexity: dense {dense:.2f}, {shown}")
jax.clear_caches()
