"""Activations layer by layer are those of the whole model."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxprune.errors import InputError
from jaxprune.models import llama
from jaxprune.models.llama import activations as calibration

MODEL = Path(__file__).parents[1] / "golden" / "one_kv_head"
TOKENS = np.random.default_rng(0).integers(0, 40, (5, 12)).astype(np.int32)


@pytest.mark.parametrize("batch", [2, 5, 8])
def test_inputs_are_those_that_the_model_captures(batch):
    model = llama.load(MODEL)
    found = list(calibration.attention_inputs(model, TOKENS, batch=batch))
    assert len(found) == model.config.num_hidden_layers == 3
    for x, expected in zip(found, model.activations(TOKENS), strict=True):
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-5)


def test_only_the_blocks_asked_for_are_run(monkeypatch):
    model, run = llama.load(MODEL), []
    original = calibration.next_hidden

    def counted(*arguments, **keywords):
        run.append(arguments)
        return original(*arguments, **keywords)

    monkeypatch.setattr(calibration, "next_hidden", counted)
    inputs = calibration.attention_inputs(model, TOKENS)
    next(inputs)
    assert len(run) == 0
    next(inputs)
    assert len(run) == 1


def test_blocks_in_turn_are_the_model():
    model = llama.load(MODEL)
    hidden = model.embed(TOKENS)
    for layer in range(3):
        hidden = calibration.next_hidden(model.block_weights(layer), hidden, model.config, batch=2)
    np.testing.assert_allclose(model.head(hidden), model(TOKENS), rtol=0, atol=1e-5)


def test_a_layer_of_the_same_shape_does_not_compile_again():
    model = llama.load(MODEL)
    hidden = model.embed(TOKENS)
    calibration.next_hidden(model.block_weights(0), hidden, model.config)
    compiled = calibration._after._cache_size()
    pruned = jax.tree.map(lambda w: 0.5 * w, model.block_weights(1))
    calibration.next_hidden(pruned, hidden, model.config)
    assert calibration._after._cache_size() == compiled


def test_an_empty_batch_is_an_error():
    model = llama.load(MODEL)
    with pytest.raises(InputError, match="batch must be at least 1"):
        list(calibration.attention_inputs(model, TOKENS, batch=0))
