"""The refit of a block: what it minimises, and that masks hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import CONFIG

from jaxprune.models import llama
from jaxprune.models.llama import modeling
from jaxprune.models.llama.modeling import INPUT_OF
from jaxprune.pipeline import PruneSettings
from jaxprune.pipeline.block import BlockSettings, BlockStart, block_refit, block_refit_problem
from jaxprune.pipeline.streams import Streams
from jaxprune.pipeline.work import Solution
from jaxprune.sparsity import Sparsity

WINDOWS, TOKENS = 3, 10
block = jax.jit(modeling.block, static_argnums=2)


@pytest.fixture(scope="module")
def problem():
    """A block, half of its entries kept, windows whose tokens differ in size a hundredfold."""
    keys = jax.random.split(jax.random.key(1), 4)
    dense = llama.Llama(CONFIG, key=keys[0]).block_weights(0)
    maps = {name: getattr(dense, name) for name in sorted(INPUT_OF)}
    masks = {
        name: jax.random.bernoulli(jax.random.fold_in(keys[1], i), 0.5, w.shape)
        for i, (name, w) in enumerate(maps.items())
    }
    pruned = {name: jnp.where(masks[name], w, 0) for name, w in maps.items()}
    sizes = jnp.geomspace(1, 100, TOKENS)[:, None]
    hidden = sizes * jax.random.normal(keys[2], (WINDOWS, TOKENS, 16))
    batch = {"hidden": hidden, "target": block(dense, hidden, CONFIG)[0]}
    settings = BlockSettings(CONFIG, Sparsity(0.5), steps=20, batch_size=2)
    return dense, pruned, masks, batch, settings


def test_errors_are_relative_to_the_size_of_every_token(problem):
    dense, pruned, masks, batch, settings = problem
    descent = block_refit(pruned, BlockStart(dense, masks), settings)
    output = block(dense._replace(**pruned), batch["hidden"], CONFIG)[0]
    output, target = (np.asarray(a, np.float64) for a in (output, batch["target"]))
    size = (target**2).mean(axis=-1) + CONFIG.rms_norm_eps
    expected = 0.5 * (((output - target) ** 2).sum(axis=-1) / size).sum(axis=-1)
    errors = descent.sample_errors(pruned, batch)
    np.testing.assert_allclose(errors, expected, rtol=1e-5)
    np.testing.assert_allclose(descent.objective(pruned, batch), expected.mean(), rtol=1e-5)


def test_a_refit_lowers_its_error_and_keeps_the_masks(problem):
    dense, pruned, masks, batch, settings = problem
    descent = block_refit(pruned, BlockStart(dense, masks), settings)
    state = descent.init(pruned, batch)
    state, _ = descent.chunk(state, pruned, batch, batch, jax.random.key(0))
    assert float(state.best.error) < 0.9 * float(jnp.mean(state.initial_errors))
    for name, weight in state.best.weights.items():
        assert not bool(jnp.any(weight[~masks[name]])), name


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_refit_is_to_take_back_a_share_of_the_streams_error(problem, share):
    dense, pruned, masks, batch, _ = problem
    wrong = batch["hidden"] + jax.random.normal(jax.random.key(5), batch["hidden"].shape)
    streams = Streams(batch["hidden"], wrong, wrong[:1], CONFIG).ahead(dense, 2)
    settings = PruneSettings("descent", "all", Sparsity(0.5), correction=share, batch=2)
    data = block_refit_problem(dense, streams, Solution(pruned, masks, {}), settings).data
    np.testing.assert_array_equal(data["hidden"], wrong)
    target, own = batch["target"], block(dense, wrong, CONFIG)[0]
    np.testing.assert_allclose(
        data["target"] - own, share * (target - own), atol=1e-5 * float(jnp.abs(target).max())
    )
