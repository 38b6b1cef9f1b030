"""``W_Q`` and ``W_K`` in closed form on the curvature of the predictions."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import CONFIG as ONE_LAYER

from jaxprune.attention import rms_norm
from jaxprune.baselines import sparsegpt
from jaxprune.errors import InputError
from jaxprune.gauss_newton import kronecker_admm
from jaxprune.models.llama.activations import attention_inputs, next_hidden
from jaxprune.models.llama.modeling import Llama
from jaxprune.pipeline import PruneSettings, prune_model
from jaxprune.runs.folder import RunFolder
from jaxprune.sparsity import Sparsity

CONFIG = replace(ONE_LAYER, num_hidden_layers=2)
READ = np.asarray(jax.random.randint(jax.random.key(1), (4, 24), 0, CONFIG.vocab_size))
DENSE = Llama(CONFIG, key=jax.random.key(0))


def settings_of(sparsity="0.5", method="gauss-newton", **changes):
    changes = {"metric": "predictions"} | changes
    return PruneSettings(method, "qk", Sparsity.parse(sparsity), batch=3, **changes)


def run(folder, settings):
    """Weights of the pruned model's blocks."""
    model = Llama(CONFIG, key=jax.random.key(0))
    with RunFolder(folder, settings) as kept:
        list(prune_model(model, READ, READ, settings, kept, lambda where: None))
    return [model.block_weights(layer) for layer in range(CONFIG.num_hidden_layers)]


def solved(name, curvature, hidden, layer):
    """One map by the solver alone, on the inputs of all tokens."""
    dense = DENSE.block_weights(layer)
    x = rms_norm(hidden, dense.attention_norm, CONFIG.rms_norm_eps).reshape(-1, CONFIG.hidden_size)
    outputs = curvature[layer][name].outputs
    floor = 1e-3 * jnp.mean(jnp.diagonal(outputs, axis1=-2, axis2=-1))
    felt = outputs + floor * jnp.eye(outputs.shape[-1])
    return kronecker_admm(getattr(dense, name), x.T @ x / len(x), felt, Sparsity(0.5)).weight


@pytest.mark.parametrize("propagate", [True, False])
def test_both_maps_are_solved_on_what_the_predictions_feel(tmp_path, taken, propagate):
    """The second block on the stream of the pruned first, or on that of the dense one."""
    blocks = run(tmp_path / "run", settings_of(propagate=propagate))
    hidden = DENSE.embed(jnp.asarray(READ))
    first = blocks[0] if propagate else DENSE.block_weights(0)
    streams = [hidden, next_hidden(first, hidden, CONFIG, batch=4)]
    (curvature,) = (each.curvature for each in taken)
    assert set(curvature[0]) == {"wq", "wk"}
    for layer, found in enumerate(blocks):
        for name in ("wq", "wk"):
            expected = solved(name, curvature, streams[layer], layer)
            np.testing.assert_allclose(getattr(found, name), expected, rtol=2e-3, atol=2e-4)
        others = [field for field in found._fields if field not in ("wq", "wk")]
        for name in others:
            np.testing.assert_array_equal(
                getattr(found, name), getattr(DENSE.block_weights(layer), name)
            )


def test_without_propagation_the_second_block_does_not_see_what_the_first_has_lost(tmp_path):
    alone = run(tmp_path / "alone", settings_of(propagate=False))
    after = run(tmp_path / "after", settings_of())
    np.testing.assert_array_equal(alone[0].wq, after[0].wq)
    assert (alone[1].wq != after[1].wq).any()


def test_a_baseline_without_propagation_sees_the_dense_model(tmp_path):
    choice = {"method": "sparsegpt", "metric": None}
    alone = run(tmp_path / "alone", settings_of(propagate=False, **choice))
    after = run(tmp_path / "after", settings_of(**choice))
    for layer, x in enumerate(attention_inputs(DENSE, jnp.asarray(READ))):
        expected = sparsegpt(x, DENSE.block_weights(layer).wq, Sparsity(0.5)).weight
        np.testing.assert_allclose(alone[layer].wq, expected, rtol=1e-3, atol=1e-5)
    assert (alone[1].wq != after[1].wq).any()


def test_all_maps_are_always_pruned_on_the_model_as_pruned_so_far():
    with pytest.raises(InputError, match="propagate=False: only with targets=qk"):
        PruneSettings("wanda", "all", Sparsity(0.5), propagate=False).check_names()


def test_the_metric_of_attention_is_the_usual_one_and_takes_no_curvature(tmp_path, taken):
    usual = run(tmp_path / "usual", settings_of(metric=None))
    named = run(tmp_path / "named", settings_of(metric="attention"))
    assert not taken
    other = run(tmp_path / "other", settings_of())
    for a, b, c in zip(usual, named, other, strict=True):
        np.testing.assert_array_equal(a.wq, b.wq)
        assert (a.wq != c.wq).any()


@pytest.mark.parametrize("sparsity", ["0.25", "2:4"])
@pytest.mark.parametrize("more", [{}, {"rounds": 2}, {"method": "descent", "steps": 2}])
def test_counts_are_exact(tmp_path, sparsity, more):
    settings = settings_of(sparsity, **more)
    for block in run(tmp_path / "run", settings):
        for name in ("wq", "wk"):
            zeros = getattr(block, name) == 0
            assert zeros.mean() == float(settings.sparsity.ratio)
            if sparsity == "2:4":
                assert (zeros.T.reshape(-1, 4).sum(axis=1) == 2).all()
