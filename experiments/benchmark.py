"""Speed and memory, each against what it could be: one table.

  kernel      value and gradient of softmax_error against the time of its dense matrix products at
              the rate measured beside it, and against PyTorch autograd, all heads at once and one
              by one
  devices     the kernel and Algorithm 1 with heads split over devices, of a CPU its cores
  loss        the paper's loss with n = d, against its dense matrix products
  algorithm1  300 steps on 32 heads against the same in PyTorch and the products they need
  sweep       a row of Figure 2, every λ and step size of it, against a PyTorch loop
  baselines   Wanda and SparseGPT against their PyTorch forms
  layer       W_Q and W_K of a layer of SmolLM2's shape in closed form, against SparseGPT and ADMM
  step        value and gradient of a step of descent on such a layer, against the products that
              it needs and PyTorch with all that does not change kept
  forward     logits of a model of SmolLM2's shape, against its products and transformers
  prune       all maps of its first two blocks by every method
  growth      the kernel's time as n, d, heads and samples grow, with fitted exponents
  memory      temporary memory of the compiled kernel, in n x n arrays
  llama       W_Q and W_K of a layer of Llama-3.2-1B's shape, 8 x 2048 tokens, times 16 layers
  all_maps    closed form of all maps of such a model, by part, from two of its layers; peak memory

Contenders run in turn, again and again, so that a slow spell of the machine hits all of them;
ratios are taken within a turn. PyTorch and transformers are optional; without them those rows are
missing, which is said.

Example:
  python experiments/benchmark.py --quick --out runs/benchmark
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch_forms
from matplotlib import ticker
from tqdm import tqdm

from jaxprune import baselines, softmax_error
from jaxprune.attention import AttentionForm, contract
from jaxprune.errors import InputError
from jaxprune.methods.fused import DECAYS, algorithm1
from jaxprune.methods.query_key import (
    QueryKeySettings,
    prune_closed_form,
    query_key_context,
    query_key_data,
    query_key_descent,
    query_key_importance,
    query_key_refit,
)
from jaxprune.models.llama import Llama, LlamaConfig
from jaxprune.models.llama.shapes import LLAMA_3_2_1B, SMOLLM2
from jaxprune.objective import fused_error
from jaxprune.pipeline import METHODS, Progress, PruneSettings
from jaxprune.pipeline.curvature import output_blocks, prediction_curvature
from jaxprune.pipeline.model import prune_model
from jaxprune.runs import flags, plotting
from jaxprune.runs.child import in_child, peak_memory
from jaxprune.runs.folder import RunFolder
from jaxprune.runs.metrics import Columns
from jaxprune.runs.script import Experiment, run_experiment, run_script
from jaxprune.sharding import over_mesh, use_mesh
from jaxprune.sparsity import Sparsity

KERNEL_SHAPES = (  # n, d, heads
    (128, 64, 1),
    (128, 64, 32),
    (512, 64, 16),
    (1024, 64, 16),
    (1024, 1024, 1),
    (2048, 64, 32),
    (2048, 128, 64),
    (4096, 128, 8),
)
DEVICE_SHAPES = ((128, 64, 32), (512, 64, 16), (2048, 64, 32))
QUICK_SHAPES = ((128, 64, 8), (512, 64, 2))
GROWTH = {
    "n": [(n, 64, 1) for n in (512, 1024, 2048, 4096, 8192)],
    "d": [(1024, d, 1) for d in (64, 128, 256, 512, 1024)],
    "heads": [(512, 64, h) for h in (1, 4, 16, 64)],
}
RATE = 1024  # side of the product whose rate is "the rate measured"
_LAM, _RATE = 0.01, 0.1  # of Algorithm 1
COLUMNS = Columns((), texts=("part",), sparse=("seconds",))
PARTS = (
    *("kernel", "devices", "loss", "algorithm1", "sweep", "baselines"),
    *("layer", "step", "forward", "prune"),
    *("growth", "memory", "llama", "all_maps"),
)
# They take an hour or more on a CPU.
LONG = ("llama", "all_maps")
QUICK_LLAMA = replace(
    SMOLLM2,
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


@dataclass(frozen=True, kw_only=True)
class Run(flags.Redraw, flags.Folder):
    """A run whose numbers are times, which nothing can repeat."""


@dataclass(frozen=True)
class Config:
    """Speed and memory, each against what it could be.

    Example: python experiments/benchmark.py --quick --out runs/benchmark
    """

    parts: tuple[str, ...] = tuple(part for part in PARTS if part not in LONG)
    """what to measure; if left out, all but llama and all_maps, which take hours on a CPU"""
    repeats: int = 15
    """turns of every comparison"""
    seconds: float = 20.0
    """a comparison ends after so long even if turns are missing, but not before three"""
    quick: flags.Flag = False
    """small shapes and few turns"""
    layers: int = 16
    """of the llama part; time is the median of those after the first, times 16"""
    steps: int = 300
    """of the descents in algorithm1, sweep and llama"""
    run: Annotated[Run, flags.RUN] = Run(out=Path("runs/benchmark"))

    memory_flags: ClassVar[str] = "the number of --parts, or take --quick"

    def check(self) -> None:
        """Raise ``InputError`` for values that cannot work."""
        if not self.parts:
            raise InputError(f"--parts: expected some of {', '.join(PARTS)}")
        for part in self.parts:
            if part not in PARTS:
                raise InputError(f"--parts {part}: expected some of {', '.join(PARTS)}")
        if min(self.repeats, self.layers, self.steps) < 1 or not self.seconds > 0:
            raise InputError("--repeats, --layers, --steps, --seconds: expected more than 0")


class Contender(NamedTuple):
    """Something to time: a call that returns when done, and how long its compilation took."""

    call: Callable[[], Any]
    compile_seconds: float | None = None


def compiled(function: Callable[..., Any], *arguments: Any) -> Contender:
    """A JAX function with its arguments, compiled."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    return Contender(lambda: jax.block_until_ready(program(*arguments)), seconds)


def in_torch(function: Callable[..., Any], *arrays: Any) -> Contender:
    """A PyTorch function of tensors made from arrays, on the kind of device JAX uses."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    tensors = torch_forms.tensors(arrays, device)

    def call() -> None:
        function(*tensors)
        torch_forms.wait(device)

    return Contender(call)


def turns(contenders: dict[str, Contender], config: Config) -> dict[str, list[float]]:
    """Seconds of every contender in every turn, each after a call of its own that does not count.

    Threads of whoever came before may still look for work during the first, and its own wake up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + config.seconds
    for turn in range(3 if config.quick else config.repeats):
        if turn >= 3 and time.perf_counter() > end:
            break
        for name, contender in contenders.items():
            contender.call()
            start = time.perf_counter()
            contender.call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def rows_of(
    point: dict[str, Any],
    contenders: dict[str, Contender],
    seconds: dict[str, list[float]],
    ours: str,
    floors: dict[str, list[float]] | None = None,
) -> list[dict[str, Any]]:
    """A row for every contender and floor: its time, and ours over it, median and quartiles."""
    rows = []
    for name, values in (seconds | (floors or {})).items():
        ratio = np.asarray(seconds[ours]) / np.asarray(values)
        contender = contenders.get(name)
        rows.append(
            {
                **point,
                "contender": name,
                "seconds": np.median(values),
                "ours_over_it": np.median(ratio),
                "low": np.quantile(ratio, 0.25),
                "high": np.quantile(ratio, 0.75),
                "turns": len(values),
                "compile_seconds": None if contender is None else contender.compile_seconds,
            }
        )
    return rows


@functools.cache
def square(side: int) -> Contender:
    """The matrix product whose rate is the machine's."""
    a = jax.random.normal(jax.random.key(0), (side, side))
    return compiled(lambda a: contract("ij,jk->ik", a, a), a)


def at_rate(operations: float, product_seconds: list[float]) -> list[float]:
    """Seconds of matrix products of so many operations at the rate measured in every turn."""
    return [operations / (2 * RATE**3) * seconds for seconds in product_seconds]


def against_products(
    point: dict[str, Any],
    contenders: dict[str, Contender],
    config: Config,
    ours: str,
    operations: float,
) -> list[dict[str, Any]]:
    """``rows_of`` all turns, and of the products that are needed at the rate of each turn."""
    seconds = turns(contenders | {"product": square(RATE)}, config)
    product = seconds.pop("product")
    floors = {"products needed": at_rate(operations, product)}
    return rows_of(point, contenders, seconds, ours, floors)


def attention_inputs(n: int, d: int, heads: int) -> list[jax.Array]:
    """Queries and keys whose logits have standard deviation one, of both attention matrices."""
    keys = jax.random.split(jax.random.key(n), 4)
    return [jax.random.normal(key, (heads, n, d)) * d**-0.25 for key in keys]


def kernel(q: jax.Array, k: jax.Array, q0: jax.Array, k0: jax.Array) -> Any:
    """Value and gradient in queries and keys, head by head."""
    values, pull_back = jax.vjp(lambda q, k: softmax_error(q, k, q0, k0), q, k)
    return values, pull_back(jnp.ones_like(values))


def on_devices(function: Callable[..., Any], *arrays: jax.Array) -> dict[str, Contender]:
    """A function of heads on one device and, last, split over all where they divide the heads."""
    contenders = {"one device": compiled(function, *arrays)}
    heads, devices = arrays[0].shape[0], jax.device_count()
    if devices > 1 and heads % devices == 0:
        with use_mesh(f"1x{devices}", heads):
            split = compiled(over_mesh(function, "heads"), *map(jnp.array, arrays))
        contenders[f"{devices} devices"] = split
    return contenders


def torch_fits(heads: int, n: int) -> bool:
    """Whether about eight arrays [heads, n, n] fit in half of the free memory."""
    if jax.default_backend() != "cpu":
        return True
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 * 4 * heads * n**2 < free / 2


def kernel_part(config: Config) -> list[dict[str, Any]]:
    """The kernel against its products and PyTorch, shape by shape."""
    rows = []
    for n, d, heads in tqdm(QUICK_SHAPES if config.quick else KERNEL_SHAPES, desc="kernel"):
        arrays = attention_inputs(n, d, heads)
        contenders = {"one device": compiled(kernel, *arrays), "product": square(RATE)}
        if torch_forms.available():
            one = torch_forms.softmax_error_gradients
            contenders["torch per head"] = in_torch(partial(torch_forms.per_head, one), *arrays)
            if torch_fits(heads, n):
                contenders["torch batched"] = in_torch(one, *arrays)
            else:
                print(f"n {n}, heads {heads}: PyTorch with all heads at once needs too much memory")
        seconds = turns(contenders, config)
        product = seconds.pop("product")
        floors = {
            f"{count} products": at_rate(count * 2 * n**2 * d * heads, product) for count in (3, 4)
        }
        point = {"part": "kernel", "n": n, "d": d, "heads": heads}
        rows += rows_of(point, contenders, seconds, "one device", floors)
    return rows


def loss_part(config: Config) -> list[dict[str, Any]]:
    """The fused loss and its gradient in the mask: 4 products, 5 with the target's logits."""
    n = d = 256 if config.quick else 1024
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = jax.random.normal(keys[0], (n, d)), jax.random.normal(keys[1], (d, d)) / d
    queries0 = x @ w

    def loss(mask: jax.Array, x: jax.Array, w: jax.Array, queries0: jax.Array) -> jax.Array:
        return fused_error(mask * w, x, queries0) + 0.05 * jnp.sum(mask**2)

    mask = jnp.full((d, d), 0.9)
    contenders = {
        "loss": compiled(jax.value_and_grad(loss), mask, x, w, queries0),
        "product": square(RATE),
    }
    seconds = turns(contenders, config)
    product = seconds.pop("product")
    floors = {f"{count} products": at_rate(count * 2 * n * n * d, product) for count in (4, 5)}
    return rows_of({"part": "loss", "n": n, "d": d}, contenders, seconds, "loss", floors)


def algorithm1_part(config: Config) -> list[dict[str, Any]]:
    """Algorithm 1 on many heads at once; causal products count by half."""
    x, w = algorithm1_inputs(config)
    contenders = {"one device": compiled(partial(algorithm1_masks, steps=config.steps), x, w)}
    if torch_forms.available():
        form = partial(torch_forms.algorithm1, lam=_LAM, rate=_RATE, steps=config.steps)
        contenders["torch batched"] = in_torch(form, x[:, 0], w)
        contenders["torch per head"] = in_torch(partial(torch_forms.per_head, form), x[:, 0], w)
    heads, _, n, d = x.shape
    # Queries and the mask's gradient; logits and the gradient through them.
    operations = config.steps * heads * (2 * 2 * n * d**2 + 2 * n**2 * d)
    point = {"part": "algorithm1", **algorithm1_sizes(x)}
    return against_products(point, contenders, config, "one device", operations)


def algorithm1_inputs(config: Config) -> tuple[jax.Array, jax.Array]:
    """Activations, one sequence for each head, and fused weights."""
    heads, n, d = (4, 64, 32) if config.quick else (32, 128, 64)
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (heads, 1, n, d))
    return x, jax.random.normal(keys[1], (heads, d, d)) / d


def algorithm1_sizes(x: jax.Array) -> dict[str, int]:
    """Sizes of these activations by the columns of the table."""
    heads, _, n, d = x.shape
    return {"n": n, "d": d, "heads": heads}


def algorithm1_masks(x: jax.Array, w: jax.Array, *, steps: int) -> jax.Array:
    """The masks of Algorithm 1, head by head."""

    def one(x: jax.Array, w: jax.Array) -> jax.Array:
        result = algorithm1(
            x, w, lam=_LAM, learning_rate=_RATE, sparsity=Sparsity(0.5), steps=steps
        )
        return result.state.variable

    return jax.vmap(one)(x, w)


def devices_part(config: Config) -> list[dict[str, Any]]:
    """Heads split over devices; of a CPU, whose cores are made devices, in a process of its own.

    In a process with several, one device of a CPU has a part of its threads alone: whoever wants
    to know what one does has to look where it is the only one.
    """
    if jax.default_backend() == "cpu":
        return in_child(over_cores, config)
    return over_devices(config)


def over_cores(config: Config, report: Callable[[Any], None]) -> list[dict[str, Any]]:
    """``over_devices`` with a device for each core; in a child."""
    one_device_per_core()
    return over_devices(config)


def over_devices(config: Config) -> list[dict[str, Any]]:
    """The kernel and Algorithm 1 on one device and split over all."""
    rows = []
    for n, d, heads in QUICK_SHAPES if config.quick else DEVICE_SHAPES:
        contenders = on_devices(kernel, *attention_inputs(n, d, heads))
        point = {"part": "devices", "n": n, "d": d, "heads": heads, "method": "kernel"}
        rows += rows_of(point, contenders, turns(contenders, config), list(contenders)[-1])
    x, w = algorithm1_inputs(config)
    contenders = on_devices(partial(algorithm1_masks, steps=config.steps), x, w)
    point = {"part": "devices", **algorithm1_sizes(x), "method": "algorithm1"}
    return rows + rows_of(point, contenders, turns(contenders, config), list(contenders)[-1])


def sweep_part(config: Config) -> list[dict[str, Any]]:
    """A row of Figure 2: seeds, λ and step sizes together, against a loop over them."""
    seeds, n, d = (2, 32, 16) if config.quick else (5, 128, 64)
    lams = (1.0, 10.0) if config.quick else (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = jax.random.normal(keys[0], (seeds, 1, n, d)), jax.random.normal(keys[1], (seeds, d, d))
    lam, decay = (a.reshape(-1) for a in jnp.meshgrid(jnp.asarray(lams), jnp.asarray(DECAYS)))

    def every(x: jax.Array, w: jax.Array, lam: jax.Array, rate: jax.Array) -> jax.Array:
        def one(x: jax.Array, w: jax.Array, lam: jax.Array, rate: jax.Array) -> jax.Array:
            result = algorithm1(
                x, w, lam=lam, learning_rate=rate, sparsity=Sparsity(0.5), steps=config.steps
            )
            return result.state.variable

        over_seeds = jax.vmap(one, (0, 0, None, None))
        return jax.vmap(over_seeds, (None, None, 0, 0))(x, w, lam, rate)

    contenders = {"sweep": compiled(every, x, w, lam, decay / lam)}
    if torch_forms.available():
        pairs = list(zip(lam.tolist(), (decay / lam).tolist(), strict=True))

        def loop(x: Any, w: Any) -> None:
            for value, rate in pairs:
                form = partial(torch_forms.algorithm1, lam=value, rate=rate, steps=config.steps)
                torch_forms.per_head(form, x, w)

        contenders["torch loop"] = in_torch(loop, x[:, 0], w)
    point = {"part": "sweep", "n": n, "d": d, "heads": seeds * lam.size}
    return rows_of(point, contenders, turns(contenders, config), "sweep")


def baselines_part(config: Config) -> list[dict[str, Any]]:
    """Wanda and SparseGPT on one square weight."""
    d, n = (64, 128) if config.quick else (1024, 2048)
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = jax.random.normal(keys[0], (4, n, d)), jax.random.normal(keys[1], (d, d))
    rows = []
    for name in ("wanda", "sparsegpt"):
        prune = getattr(baselines, name)
        ours = compiled(lambda x, w, prune=prune: prune(x, w, Sparsity(0.5)).weight, x, w)
        contenders = {name: ours}
        if torch_forms.available():
            form = partial(getattr(torch_forms, name), ratio=0.5)
            contenders["torch"] = in_torch(form, x, w)
        point = {"part": "baselines", "n": 4 * n, "d": d, "method": name}
        rows += rows_of(point, contenders, turns(contenders, config), name)
    return rows


class Layer(NamedTuple):
    """A layer's activations and weights at random, and what a descent of it needs to know."""

    x: jax.Array
    weights: tuple[jax.Array, jax.Array]
    wv: jax.Array
    wo: jax.Array
    settings: QueryKeySettings
    form: AttentionForm


def layer_of(config: Config, windows: int) -> Layer:
    """Of SmolLM2's shape, 512 tokens a window; features fall off with a power law."""
    shape, n = (QUICK_LLAMA, 64) if config.quick else (SMOLLM2, 512)
    d, k = shape.hidden_size, shape.head_dim
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (windows, n, d)) * jnp.arange(1.0, d + 1) ** -0.5
    shapes = ((d, heads * k), (d, groups * k), (d, groups, k), (heads, k, d))
    wq, wk, wv, wo = (
        jax.random.normal(key, shape) for key, shape in zip(keys[1:], shapes, strict=True)
    )
    form = AttentionForm(shape.rope_theta ** -jnp.linspace(0, 1, k // 2))
    settings = QueryKeySettings(heads, groups, k**-0.5, Sparsity(0.5))
    return Layer(x, (wq, wk), wv, wo, settings, form)


def layer_part(config: Config) -> list[dict[str, Any]]:
    """Closed form of W_Q and W_K against the layer-wise methods on the same activations."""
    layer = layer_of(config, 8 if config.quick else 64)
    x, weights, settings = layer.x, layer.weights, layer.settings

    def closed_form(x: jax.Array, weights: tuple, key: jax.Array) -> Any:
        return prune_closed_form(x, weights, layer.form, key, settings=settings).weights

    def layer_wise(name: str, x: jax.Array, weights: tuple) -> list[jax.Array]:
        prune = baselines.BASELINES[name].prune
        return [prune(x, w, settings.sparsity).weight for w in weights]

    contenders = {"closed form": compiled(closed_form, x, weights, jax.random.key(0))}
    for name in ("sparsegpt", "admm"):
        contenders[name] = compiled(partial(layer_wise, name), x, weights)
    point = {"part": "layer", "n": x.shape[0] * x.shape[1], "d": x.shape[2]}
    point["heads"] = settings.heads
    return rows_of(point, contenders, turns(contenders, config), "closed form")


def step_part(config: Config) -> list[dict[str, Any]]:
    """Value and gradient in W_Q and W_K of the error of attention and of its output.

    Causal products count by half: projections, logits of both attentions, the output's error,
    and the gradients through all of them but the dense logits.
    """
    layer = layer_of(config, 8)
    x, weights, settings = layer.x, layer.weights, layer.settings
    context = query_key_context(weights, x, layer.form, settings, layer.wv, layer.wo)
    batch = query_key_data(x, x, context, settings)
    keep_masks = tuple(jnp.abs(w) > jnp.median(jnp.abs(w)) for w in weights)
    context = context._replace(keep_masks=keep_masks)
    pruned = tuple(jnp.where(kept, w, 0) for kept, w in zip(keep_masks, weights, strict=True))

    def step(pruned: tuple, batch: dict, context: Any) -> Any:
        objective = query_key_refit(pruned, context, settings).objective
        return jax.value_and_grad(objective)(pruned, batch)

    contenders = {"step": compiled(step, pruned, batch, context)}
    if torch_forms.available():
        grouped = settings.heads, settings.kv_heads
        form = partial(
            torch_forms.query_key_step,
            grouped=grouped,
            scale=settings.scale,
            rotary=layer.form.rope,
        )
        target = torch_forms.attention_of(batch["q0"], batch["k0"])
        contenders["torch"] = in_torch(form, x, *pruned, target, batch["values"])
    (b, n, d), heads = x.shape, settings.heads
    outputs, k = sum(w.shape[1] for w in weights), weights[0].shape[1] // heads
    # Projections and their gradients; five products of attention and one of the dense logits.
    operations = 2 * (2 * b * n * d * outputs) + 6 * b * heads * n * n * k
    point = {"part": "step", "n": b * n, "d": d, "heads": heads}
    return against_products(point, contenders, config, "step", operations)


def forward_part(config: Config) -> list[dict[str, Any]]:
    """Logits of windows of 1024 tokens; causal products count by half."""
    n, b = (64, 2) if config.quick else (1024, 4)
    shape = QUICK_LLAMA if config.quick else SMOLLM2
    model = Llama(shape, key=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (b, n), 0, shape.vocab_size)
    contenders = {"logits": compiled(lambda model, tokens: model(tokens), model, tokens)}
    if torch_forms.available("transformers"):
        contenders["transformers"] = in_torch(torch_forms.llama_logits(shape), tokens)
    blocks = model.blocks.get_value()
    maps = sum(w.size for w in blocks if w is not None and w.ndim == 3)
    attention = shape.num_hidden_layers * 2 * n * shape.num_attention_heads * shape.head_dim
    operations = b * n * (2 * (maps + shape.vocab_size * shape.hidden_size) + attention)
    point = {"part": "forward", "n": b * n, "d": shape.hidden_size}
    return against_products(point, contenders, config, "logits", operations)


def prune_part(config: Config) -> list[dict[str, Any]]:
    """Whole runs on all maps of two blocks, curvature and errors included, by every method."""
    windows, n = size = (8, 32) if config.quick else (16, 512)
    shape = QUICK_LLAMA if config.quick else replace(SMOLLM2, num_hidden_layers=2)
    tokens = _random_windows(shape, size)
    number = itertools.count()

    def contender(method: str, folder: Path) -> Contender:
        settings = PruneSettings(method, "all", Sparsity(0.5), distill=0)

        def call() -> None:
            model = Llama(shape, key=jax.random.key(0))
            with RunFolder(folder / str(next(number)), config) as run:
                fit, heldout = tokens[:windows], tokens[windows:]
                list(prune_model(model, fit, heldout, settings, run, lambda where: None))

        start = time.perf_counter()
        call()
        first = time.perf_counter() - start
        return Contender(call, first)

    with tempfile.TemporaryDirectory() as folder:
        contenders = {method: contender(method, Path(folder)) for method in METHODS}
        seconds = turns(contenders, config)
    point = {"part": "prune", "n": windows * n, "d": shape.hidden_size}
    return rows_of(point, contenders, seconds, "gauss-newton")


def growth_part(config: Config) -> list[dict[str, Any]]:
    """The kernel alone along each axis; samples are heads that the gradient is summed over."""
    rows = []
    for axis, shapes in GROWTH.items():
        for n, d, heads in tqdm(shapes[:3] if config.quick else shapes, desc=axis):
            contenders = {"kernel": compiled(kernel, *attention_inputs(n, d, heads))}
            point = {"part": "growth", "axis": axis, "n": n, "d": d, "heads": heads}
            rows += rows_of(point, contenders, turns(contenders, config), "kernel")
    for samples in (1, 4, 16) if config.quick else (1, 4, 16, 64):
        x = jax.random.normal(jax.random.key(0), (samples, 256, 64))
        w = jax.random.normal(jax.random.key(1), (64, 64)) / 8

        def loss(w: jax.Array, x: jax.Array) -> jax.Array:
            return fused_error(w, x, x)

        contenders = {"kernel": compiled(jax.value_and_grad(loss), w, x)}
        point = {"part": "growth", "axis": "samples", "n": 256, "d": 64, "samples": samples}
        rows += rows_of(point, contenders, turns(contenders, config), "kernel")
    return rows


def memory_part(config: Config) -> list[dict[str, Any]]:
    """Temporary memory of the compiled kernel over that of one n x n float32 array."""
    rows = []
    for n in (1024,) if config.quick else (2048, 4096, 8192):
        shape = jax.ShapeDtypeStruct((1, n, 64), jnp.float32)
        analysis = jax.jit(kernel).lower(*[shape] * 4).compile().memory_analysis()
        assert analysis is not None
        share = analysis.temp_size_in_bytes / (4 * n**2)
        point = {"part": "memory", "n": n, "d": 64, "heads": 1, "contender": "kernel"}
        rows.append({**point, "temporary_arrays": share})
    return rows


def llama_part(config: Config) -> list[dict[str, Any]]:
    """The factored descent at the shape of Llama-3.2-1B, layer after layer, random weights."""
    d, heads, groups, k, b, n = (
        (64, 4, 2, 16, 8, 64) if config.quick else (2048, 32, 8, 64, 8, 2048)
    )
    settings = QueryKeySettings(
        heads, groups, k**-0.5, Sparsity(0.5), steps=config.steps, batch_size=b
    )
    rope = 500000.0 ** -jnp.linspace(0, 1, k // 2)

    @jax.jit
    def start(key: jax.Array) -> tuple:
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (b, n, d))
        wq = jax.random.normal(keys[1], (d, heads * k)) * d**-0.5
        return x, (wq, jax.random.normal(keys[2], (d, groups * k)) * d**-0.5)

    @jax.jit
    def context_of(weights: tuple, data: dict) -> Any:
        context = query_key_context(weights, data["x"], AttentionForm(rope), settings)
        data = query_key_data(data["x"], data["x"], context, settings)
        return query_key_importance(context, data, settings), data

    @partial(jax.jit, donate_argnums=0)
    def chunk(state: Any, weights: tuple, data: dict, context: Any) -> Any:
        descent = query_key_descent(weights, context, settings)
        return descent.chunk(state, weights, data, None, jax.random.key(0))[0]

    seconds = []
    for layer in tqdm(range(config.layers), desc="llama, layers"):
        x, weights = jax.block_until_ready(start(jax.random.key(layer)))
        data = {"x": x, "x0": x}
        begin = time.perf_counter()
        context, data = context_of(weights, data)
        descent = query_key_descent(weights, context, settings)
        state = jax.jit(lambda weights, descent=descent: descent.init(weights))(weights)
        for _ in range(descent.chunks):
            state = chunk(state, weights, data, context)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - begin)
    # The first layer compiles; the others do not.
    steady = seconds[1:] or seconds
    return [
        {
            "part": "llama",
            "n": n,
            "d": d,
            "heads": heads,
            "samples": b,
            "contender": f"16 layers, {config.steps} steps",
            "seconds": 16 * float(np.median(steady)),
            "low": 16 * min(steady),
            "high": 16 * max(steady),
            "turns": len(steady),
            "compile_seconds": max(0.0, seconds[0] - float(np.median(steady))),
        }
    ]


def all_maps_part(config: Config) -> list[dict[str, Any]]:
    """Closed form of all maps at the shape of Llama-3.2-1B, part by part, each in a process.

    The curvature of one layer and of two tell what a layer takes and what the head does. What 16
    layers hold more than two is their weights, factors, and a batch of hidden states before each,
    which is counted.
    """
    shape = QUICK_LLAMA if config.quick else LLAMA_3_2_1B
    size = (4, 32) if config.quick else (16, 512)
    one = in_child(curvature_seconds, replace(shape, num_hidden_layers=1), size)
    two = in_child(closed_form_seconds, replace(shape, num_hidden_layers=2), size)
    layers, block = shape.num_hidden_layers, two["blocks"][-1]
    curvature = one + (layers - 1) * max(0.0, two["curvature"] - one)
    held = (layers - 2) * two["layer_bytes"] / 2**30
    point = {"part": "all_maps", "n": size[1], "d": shape.hidden_size, "samples": size[0]}
    rows = [
        {"contender": "curvature, 1 layer", "seconds": one},
        {"contender": "curvature, 2 layers", "seconds": two["curvature"]},
        {"contender": "first block", "seconds": two["blocks"][0]},
        {"contender": "second block", "seconds": block, "peak_gib": two["peak"]},
        {"contender": f"curvature, {layers} layers, from these", "seconds": curvature},
        {
            "contender": f"{layers} layers, from these",
            "seconds": curvature + two["blocks"][0] + (layers - 1) * block,
            "peak_gib": two["peak"] + held,
        },
    ]
    return [point | row for row in rows]


_ALL = PruneSettings("gauss-newton", "all", Sparsity(0.5))


def _random_windows(shape: LlamaConfig, size: tuple[int, int]) -> np.ndarray:
    """Windows to calibrate on, with four to judge by."""
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (size[0] + 4, size[1]))
    return tokens.astype(np.int32)


def _curvature(model: Llama, tokens: np.ndarray) -> float:
    """Seconds of the curvature of the predictions, its programs compiled."""

    def call(tokens: np.ndarray) -> None:
        found = prediction_curvature(model, tokens, _ALL.names, jax.random.key(1), batch=_ALL.batch)
        jax.block_until_ready(found)

    call(tokens[: _ALL.batch])
    begin = time.perf_counter()
    call(tokens)
    return time.perf_counter() - begin


def curvature_seconds(
    shape: LlamaConfig, size: tuple[int, int], report: Callable[[Any], None]
) -> float:
    """Seconds of the curvature of the predictions; in a child."""
    tokens = _random_windows(shape, size)
    return _curvature(Llama(shape, key=jax.random.key(0)), tokens[: size[0]])


def closed_form_seconds(
    shape: LlamaConfig, size: tuple[int, int], report: Callable[[Any], None]
) -> dict[str, Any]:
    """Seconds of every part of a run, its peak memory, and bytes of what a layer holds."""
    model, tokens, stamps = Llama(shape, key=jax.random.key(0)), _random_windows(shape, size), []
    curvature = _curvature(model, tokens[: size[0]])

    def progress(where: Progress) -> None:
        stamps.append((where.done, time.perf_counter()))

    with tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder) / "run", _ALL) as run:
        fit, heldout = tokens[: size[0]], tokens[size[0] :]
        list(prune_model(model, fit, heldout, _ALL, run, progress))
    # Units are the curvature, then the blocks; each is reported at its beginning and its end.
    reached = dict(reversed(stamps))
    _, *seconds = np.diff([reached[done] for done in sorted(reached)]).tolist()
    blocks = model.blocks.get_value()
    outputs = [getattr(blocks, name).shape[2] for name in _ALL.names]
    factors = sum(width**2 // output_blocks(width, _ALL.curvature.outputs) for width in outputs)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(blocks)) // shape.num_hidden_layers
    hidden = min(size[0], _ALL.batch) * size[1] * shape.hidden_size
    return {
        "curvature": curvature,
        "blocks": seconds,
        "peak": peak_memory(),
        "layer_bytes": weights + 4 * (factors + hidden),
    }


def exponents(metrics: pd.DataFrame) -> pd.DataFrame:
    """Slope of log time against the log of each axis, over its larger half."""
    rows: list[dict[str, Any]] = []
    growth = metrics[metrics["part"] == "growth"]
    if growth.empty:
        return pd.DataFrame(rows)
    for axis, frame in growth.groupby("axis", sort=False):
        x, y = np.log(frame[str(axis)].astype(float)), np.log(frame["seconds"].astype(float))
        half = len(x) // 2
        rows.append(
            {
                "axis": axis,
                "exponent": np.polyfit(x, y, 1)[0],
                "exponent of the larger half": np.polyfit(x[half - 1 :], y[half - 1 :], 1)[0],
            }
        )
    return pd.DataFrame(rows)


def draw(metrics: pd.DataFrame, folder: Path) -> None:
    """Times along every axis of growth."""
    growth = metrics[metrics["part"] == "growth"]
    if growth.empty:
        return
    groups = list(growth.groupby("axis", sort=False))
    figure, axes = plt.subplots(
        1, len(groups), figsize=(2.8 * len(groups), 3), sharey=True, squeeze=False
    )
    slopes = exponents(metrics).set_index("axis")["exponent"]
    for cell, (axis, frame) in zip(axes[0], groups, strict=True):
        cell.loglog(frame[axis], 1e3 * frame["seconds"], "o-", color="#0072B2")
        cell.set_xlabel(str(axis))
        cell.set_title(f"exponent {slopes[axis]:.2f}", fontsize=9)
        cell.set_xticks(frame[axis], [f"{value:g}" for value in frame[axis]])
        cell.minorticks_off()
        cell.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        cell.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes[0][0].set_ylabel("value and gradient, ms")
    figure.tight_layout()
    plotting.save(figure, folder, "growth")


def report_on(metrics: pd.DataFrame, folder: Path, figures: Path) -> str:
    """The tables and the figure."""
    shown = metrics.drop(columns=["part"]).groupby(metrics["part"], sort=False)
    text = ""
    for part, frame in shown:
        table = frame.dropna(axis=1, how="all").to_markdown(index=False, floatfmt=".3g")
        text += f"## {part}\n\n{table}\n\n"
    slopes = exponents(metrics)
    if len(slopes):
        text += "## fitted exponents\n\n" + slopes.to_markdown(index=False, floatfmt=".2f") + "\n"
    draw(metrics, figures)
    return text


MEASURE = {
    "kernel": kernel_part,
    "devices": devices_part,
    "loss": loss_part,
    "algorithm1": algorithm1_part,
    "sweep": sweep_part,
    "baselines": baselines_part,
    "layer": layer_part,
    "step": step_part,
    "forward": forward_part,
    "prune": prune_part,
    "growth": growth_part,
    "memory": memory_part,
    "llama": llama_part,
    "all_maps": all_maps_part,
}


def one_device_per_core() -> None:
    """Make the CPU look like a device for each core, to split heads over; before JAX starts."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" not in flags:
        count = f"--xla_force_host_platform_device_count={os.cpu_count()}"
        os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()


def prepare(config: Config) -> Experiment:
    """Say what is left out."""
    if not torch_forms.available():
        print("PyTorch is not installed (pip install torch): its rows are left out")
    elif not torch_forms.available("transformers"):
        print("transformers is not installed (pip install transformers): its row is left out")
    return Experiment(partial(compute_all, config))


def compute_all(config: Config, run: RunFolder) -> list[dict[str, Any]]:
    """Rows of all parts."""
    rows: list[dict[str, Any]] = []
    for part in config.parts:
        rows += run.part(part, partial(MEASURE[part], config))
    return rows


def body(config: Config) -> None:
    """Measure part by part, or tabulate again."""
    run_experiment(config, prepare, report_on, COLUMNS)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, "benchmark.py")


if __name__ == "__main__":
    sys.exit(main())
