"""The closed form of a block: what ``W_O`` and ``W_down`` are asked to take back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import CONFIG

from jaxprune.errors import InputError
from jaxprune.models import llama
from jaxprune.models.llama import modeling
from jaxprune.models.llama.modeling import INPUT_OF
from jaxprune.pipeline import PruneSettings
from jaxprune.pipeline.closed_form import block_closed_form
from jaxprune.pipeline.curvature import MapCurvature
from jaxprune.pipeline.streams import Streams
from jaxprune.sparsity import Sparsity

RIDGE = 0.3 * (64 * 512 / 576) * 16 / (6 * 20)  # by the width of the model over tokens
block = jax.jit(modeling.block, static_argnums=2)


@pytest.fixture(scope="module")
def layer():
    """A block, its curvature and streams that differ, 6 windows of 20 tokens in batches of 4."""
    keys = jax.random.split(jax.random.key(0), 3)
    dense = llama.Llama(CONFIG, key=keys[0]).block_weights(0)
    curvature = {
        name: MapCurvature(jnp.eye(w.shape[1])[None], jnp.ones(w.shape[0]))
        for name in INPUT_OF
        for w in [getattr(dense, name)]
    }
    hidden = jax.random.normal(keys[1], (6, 20, 16))
    pruned = hidden + 0.3 * jax.random.normal(keys[2], hidden.shape)
    return dense, curvature, Streams(hidden, pruned, hidden[:2], CONFIG).ahead(dense, 4)


def solve(layer, streams=None, sparsity=0.5, **changes):
    """Weights of the block's maps."""
    dense, curvature, found = layer
    settings = PruneSettings("gauss-newton", "all", Sparsity.parse(sparsity), batch=4, **changes)
    ratios = dict.fromkeys(INPUT_OF, settings.sparsity)
    return block_closed_form(dense, streams or found, curvature, ratios, settings)


def ridge(x, y):
    """Of inputs and outputs by rows, in float64."""
    x, y = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (x, y))
    moment = x.T @ x
    return np.linalg.solve(moment + RIDGE * np.diag(np.diag(moment)), x.T @ y)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_maps_that_write_to_the_stream_take_back_a_share_of_its_error(layer, share):
    """With nothing to drop the weights are the goals: least squares, written out."""
    dense, _, streams = layer
    found = solve(layer, sparsity=0.0, correction=share).weights
    _, inputs = block(dense, streams.pruned, CONFIG)
    _, wanted = block(dense, streams.dense, CONFIG)
    before_mlp = (
        streams.dense + wanted.output @ dense.wo - streams.pruned - inputs.output @ dense.wo
    )
    expected = dense.wo + share * ridge(inputs.output, before_mlp)
    np.testing.assert_allclose(found["wo"], expected, rtol=1e-3, atol=2e-4)
    # W_down sees the block as its other maps are by then.
    after, inputs = block(dense._replace(wo=found["wo"]), streams.pruned, CONFIG)
    expected = dense.w_down + share * ridge(inputs.down, streams.target - after)
    np.testing.assert_allclose(found["w_down"], expected, rtol=1e-3, atol=2e-4)
    for name in set(INPUT_OF) - {"wo", "w_down"}:
        np.testing.assert_array_equal(found[name], getattr(dense, name))


def test_the_stream_is_nearer_to_the_dense_one_for_it(layer):
    dense, _, streams = layer

    def error(correction):
        pruned = dense._replace(**solve(layer, correction=correction).weights)
        return float(jnp.sum((block(pruned, streams.pruned, CONFIG)[0] - streams.target) ** 2))

    assert error(1.0) < error(0.5) < error(0.0)


def test_a_stream_without_error_leaves_nothing_to_take_back(layer):
    streams = layer[2]
    same = streams._replace(pruned=streams.dense)
    corrected, plain = (solve(layer, same, correction=share).weights for share in (1.0, 0.0))
    for name in set(INPUT_OF) - {"w_down"}:
        np.testing.assert_allclose(corrected[name], plain[name], rtol=1e-4, atol=1e-6)
    assert not np.allclose(corrected["w_down"], plain["w_down"], rtol=1e-2)


def test_outputs_that_are_hardly_felt_do_not_make_up_for_others(layer):
    dense, curvature, streams = layer
    gradients = np.random.default_rng(0).normal(size=(50, dense.wv.shape[1])).astype(np.float32)
    gradients[:, -1] = 1e-5 * gradients[:, 0]
    unfelt = MapCurvature(jnp.asarray(gradients.T @ gradients)[None], curvature["wv"].input_squares)
    found = solve((dense, curvature | {"wv": unfelt}, streams), sparsity="2:4").weights["wv"]
    assert jnp.linalg.norm(found[:, -1]) < 2 * jnp.linalg.norm(dense.wv[:, -1])


def test_without_a_correction_no_dense_stream_is_needed(layer):
    settings = PruneSettings("gauss-newton", "all", Sparsity(0.5), correction=0.0)
    assert not settings.needs_dense_stream
    assert PruneSettings("gauss-newton", "all", Sparsity(0.5)).needs_dense_stream
    assert not PruneSettings("gauss-newton", "qk", Sparsity(0.5)).needs_dense_stream
    short = Streams(layer[2].dense[:2], layer[2].pruned, layer[2].heldout, CONFIG, whole=False)
    assert short.ahead(layer[0], 4).target is None
    found = solve(layer, short, correction=0.0).weights
    np.testing.assert_array_equal(found["wo"], solve(layer, correction=0.0).weights["wo"])


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_a_share(share):
    with pytest.raises(InputError, match="correction"):
        PruneSettings("gauss-newton", "all", Sparsity(0.5), correction=share).check_names()
