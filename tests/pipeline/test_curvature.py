"""The curvature of the predictions: its factors, what they are taken from, how wide they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import CONFIG

from jaxprune.errors import InputError
from jaxprune.models import llama
from jaxprune.models.llama.modeling import INPUT_OF, Tapped, block
from jaxprune.pipeline import CurvatureSettings, PruneSettings, prune_model
from jaxprune.pipeline.curvature import prediction_cotangents, prediction_curvature
from jaxprune.runs import RunFolder
from jaxprune.sparsity import Sparsity

TOKENS = np.random.default_rng(0).integers(0, 40, (4, 12)).astype(np.int32)


def prune(folder, **curvature):
    """Pruned maps of one block of a tiny model."""
    chosen = CurvatureSettings(**curvature)
    settings = PruneSettings("gauss-newton", "all", Sparsity(0.5), curvature=chosen)
    model = llama.Llama(CONFIG, key=jax.random.key(0))
    with RunFolder(folder / "-".join(map(str, chosen)), settings) as run:
        list(prune_model(model, TOKENS, TOKENS, settings, run, lambda where: None))
    return model.blocks.get_value()


def test_factors_are_sums_over_the_gradients_of_random_cotangents():
    """Against one gradient through the whole model, in what is added to every map's outputs."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=2)
    model, key = llama.Llama(config, key=jax.random.key(0)), jax.random.key(3)
    found = prediction_curvature(model, TOKENS, tuple(INPUT_OF), key, batch=3, full=16)
    layers = range(2)
    taps = [
        {
            n: jnp.zeros((*TOKENS.shape, getattr(model.block_weights(i), n).shape[1]))
            for n in INPUT_OF
        }
        for i in layers
    ]

    @jax.jit
    def logits(taps):
        hidden, inputs = model.embed(jnp.asarray(TOKENS)), []
        for i in layers:
            weights = model.block_weights(i)
            tapped = {n: Tapped(getattr(weights, n), tap) for n, tap in taps[i].items()}
            hidden, seen = block(weights._replace(**tapped), hidden, config)
            inputs.append(seen)
        return model.head(hidden), inputs

    predictions = jax.nn.softmax(logits(taps)[0])
    keys = [jax.random.fold_in(key, window) for window in range(len(TOKENS))]
    draw = jax.jit(prediction_cotangents)
    cotangents = jnp.stack([draw(k, p) for k, p in zip(keys, predictions, strict=True)])

    def pulled(taps):
        found, inputs = logits(taps)
        return jnp.sum(found * cotangents), inputs

    gradients, inputs = jax.jit(jax.grad(pulled, has_aux=True))(taps)
    for i in layers:
        for name, felt in found[i].items():
            g = np.asarray(gradients[i][name], np.float64)
            blocks = np.split(g, len(felt.outputs), axis=-1)
            for part, outputs in zip(blocks, felt.outputs, strict=True):
                expected = np.einsum("btk,btl->kl", part, part) / len(TOKENS)
                np.testing.assert_allclose(outputs, expected, rtol=1e-3, atol=1e-6)
            squares = np.square(getattr(inputs[i], INPUT_OF[name])).mean(axis=(0, 1))
            np.testing.assert_allclose(felt.input_squares, squares, rtol=1e-4)
    assert [felt.outputs.shape for felt in found[0].values()].count((2, 12, 12)) == 2


def test_cotangents_have_the_second_moment_of_the_gradients_of_labels():
    probability = np.array([0.5, 0.0, 0.2, 0.05, 0.25], np.float32)
    rows = np.tile(probability, (40_000, 1))
    cotangents = np.asarray(prediction_cotangents(jax.random.key(1), jnp.asarray(rows)), np.float64)
    fisher = np.diag(probability) - np.outer(probability, probability)
    moment = cotangents.T @ cotangents / len(rows)
    np.testing.assert_allclose(moment, fisher, atol=5 * 0.5 / np.sqrt(len(rows)))
    np.testing.assert_allclose(cotangents.mean(axis=0), 0, atol=5 * 0.5 / np.sqrt(len(rows)))
    # A gradient in the logits, to which adding a constant makes no difference.
    np.testing.assert_allclose(cotangents.sum(axis=1), 0, atol=1e-6)
    assert not cotangents[:, 1].any()


class TakenError(Exception):
    """Ends a run where the curvature would be taken."""


def test_they_are_what_the_curvature_is_taken_by(tmp_path, monkeypatch):
    def take(model, tokens, names, key, *, batch, full):
        raise TakenError(len(tokens), full)

    monkeypatch.setattr("jaxprune.pipeline.model.prediction_curvature", take)
    for curvature, found in (
        ({}, (4, 768)),
        ({"windows": 3}, (3, 768)),
        ({"outputs": 64}, (4, 64)),
    ):
        with pytest.raises(TakenError) as taken:
            prune(tmp_path, **curvature)
        assert taken.value.args == found


@pytest.mark.slow
def test_narrower_blocks_and_fewer_windows_prune_otherwise(tmp_path):
    full = np.asarray(prune(tmp_path).wv)
    for curvature in ({"outputs": 4}, {"outputs": 1}, {"windows": 1}):
        other = np.asarray(prune(tmp_path, **curvature).wv)
        assert (other != 0).mean() == 0.5
        assert not np.array_equal(full, other)
    np.testing.assert_array_equal(full, prune(tmp_path, windows=4, outputs=24).wv)


@pytest.mark.parametrize("curvature", [CurvatureSettings(windows=0), CurvatureSettings(outputs=0)])
def test_nothing_to_take_it_from_is_one_line(curvature):
    settings = PruneSettings("gauss-newton", "all", Sparsity(0.5), curvature=curvature)
    with pytest.raises(InputError, match="curvature"):
        settings.check_names()
