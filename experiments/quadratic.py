"""How far the closed form's quadratic form is from the attention error it stands for.

Preset ``gauss_newton`` minimises ``½ tr(A E B Eᵀ)``, the error of Def. 3.2 to second order at
``M = 1`` with Kronecker factors. Here fused weights are pruned by it and by magnitude, and three
numbers are set beside each other on the calibration data, all relative to ``½ ‖F‖²``:

  error      ``½ ‖F̃ − F‖²``, the error itself
  second     ``½ Σ_i ‖J_i δS_i‖²``, to second order, ``δS`` the change of the logits
  kronecker  ``½ tr(A E B Eᵀ)``, what is minimised

Heads are those of the setting ``correlated`` of ``synthetic.py`` (exponent 1, 32 sequences).

Example:
  python experiments/quadratic.py --out runs/quadratic
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import pandas as pd
from jaxtyping import Array, Float

from jaxprune.attention import attention_matrix, contract
from jaxprune.baselines import magnitude
from jaxprune.errors import InputError
from jaxprune.evaluation.comparison import FusedProblem
from jaxprune.evaluation.synthetic import HeadKeys, RandomHead, random_head
from jaxprune.gauss_newton import fused_moments
from jaxprune.methods.fused import prune_attention
from jaxprune.runs import flags
from jaxprune.runs.folder import RunFolder
from jaxprune.runs.metrics import Columns
from jaxprune.runs.script import Experiment, run_experiment, run_script
from jaxprune.sparsity import Sparsity

MEASURES = ("error", "second", "kronecker")
METHODS = ("fused_magnitude", "gauss_newton")
COLUMNS = Columns(("ratio", "seed", *MEASURES), texts=("method",), known={"method": METHODS})


@dataclass(frozen=True)
class Config:
    """The attention error, the same to second order, and its Kronecker approximation.

    Example: python experiments/quadratic.py --out runs/quadratic
    """

    ratios: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
    """fractions removed"""
    d: int = 64
    """width of the model"""
    k: int = 16
    """width of a head"""
    n: int = 128
    """tokens of a sequence"""
    sequences: int = 32
    """to calibrate on"""
    seeds: int = 5
    """independent draws of weights and activations, from seed 0"""
    run: Annotated[flags.Run, flags.RUN] = field(default=flags.Run(out=Path("runs/quadratic")))

    memory_flags: ClassVar[str] = "--seeds, --n or --d"

    def check(self) -> None:
        """Raise ``InputError`` for values that cannot work, before anything is computed."""
        if not self.ratios:
            raise InputError("--ratios: expected at least one value")
        for ratio in self.ratios:
            try:
                Sparsity(ratio)
            except InputError as error:
                raise InputError(f"--ratios {ratio}: {error}") from None
        for name in ("d", "k", "n", "sequences", "seeds"):
            if getattr(self, name) < 1:
                raise InputError(f"{flags.flag_of(name)}: expected 1 or more")


def errors(
    x: Float[Array, "b n d"], w: Float[Array, "d d"], pruned: Float[Array, "d d"]
) -> Float[Array, " measures"]:
    """``MEASURES`` of one pruned weight, causal, relative to ``½ ‖F‖²`` over all sequences.

    Args:
      x: activations.
      w: dense fused weight.
      pruned: what it was pruned to.
    """
    difference = pruned - w

    def one(x: Array) -> tuple[Array, Array, Array]:
        dense = attention_matrix(x, w)
        change = contract("nd,de,me->nm", x, difference, x)
        mean = jnp.sum(dense * change, axis=1, keepdims=True)
        second = jnp.sum((dense * (change - mean)) ** 2)
        return jnp.sum((attention_matrix(x, pruned) - dense) ** 2), second, jnp.sum(dense**2)

    error, second, energy = (a.mean() for a in jax.lax.map(one, x))
    moments = fused_moments(x, w)
    kronecker = contract("ij,jo,op,ip->", moments.inputs, difference, moments.outputs, difference)
    return jnp.stack([error, second, kronecker]) / energy


def draw_problem(seed: Array, config: Config) -> FusedProblem:
    """The head of ``synthetic.py`` with this seed."""
    keys = HeadKeys(*jax.random.split(jax.random.key(seed), 5))
    head = RandomHead(
        d=config.d,
        k=config.k,
        n=config.n,
        sequences=config.sequences,
        heldout=1,
        exponent=1.0,
        logits_std=2.0,
    )
    return random_head(keys, head)


@partial(jax.jit, static_argnames="config")
def _measured(seed: Array, ratios: Array, config: Config) -> Array:
    problem = draw_problem(seed, config)
    x, w = problem.x, problem.w

    def at(ratio: Array) -> Array:
        sparsity = Sparsity(ratio)
        closed = prune_attention(x, w, sparsity, preset="gauss_newton").weight
        return jnp.stack([errors(x, w, p) for p in (magnitude(w, sparsity).weight, closed)])

    return jax.lax.map(at, ratios)


def compute(seed: int, config: Config) -> list[dict]:
    """Rows of one draw."""
    found = _measured(jnp.asarray(seed), jnp.asarray(config.ratios), config)
    return [
        {"method": method, "ratio": ratio, "seed": seed}
        | {name: float(found[i, j, k]) for k, name in enumerate(MEASURES)}
        for i, ratio in enumerate(config.ratios)
        for j, method in enumerate(METHODS)
    ]


def report(metrics: pd.DataFrame, folder: Path, figures: Path) -> str:
    """Means over draws, and each quadratic form over the error."""
    del folder, figures
    table = metrics.groupby(["method", "ratio"], sort=False)[list(MEASURES)].mean()
    for name in MEASURES[1:]:
        table[f"{name} / error"] = table[name] / table["error"]
    return table.reset_index().to_markdown(index=False, floatfmt=".3g") + "\n"


def prepare(config: Config) -> Experiment:
    """One part for each draw."""

    def rows(run: RunFolder) -> list[dict]:
        parts = (
            run.part(f"seed{seed}", partial(compute, seed, config)) for seed in range(config.seeds)
        )
        return [row for part in parts for row in part]

    return Experiment(rows)


def body(config: Config) -> None:
    """Run, or redraw."""
    run_experiment(config, prepare, report, COLUMNS)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, "quadratic.py")


if __name__ == "__main__":
    sys.exit(main())
