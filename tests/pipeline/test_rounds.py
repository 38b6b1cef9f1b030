"""Rounds of the closed form: the curvature of what earlier rounds leave counts too."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import CONFIG as ONE_LAYER

from jaxprune.errors import InputError
from jaxprune.models.llama.modeling import Llama
from jaxprune.pipeline import PruneSettings, prune_model, units
from jaxprune.pipeline import model as pipeline
from jaxprune.runs.folder import RunFolder
from jaxprune.sparsity import Sparsity

CONFIG = replace(ONE_LAYER, num_hidden_layers=2)
READ = np.asarray(jax.random.randint(jax.random.key(1), (4, 24), 0, CONFIG.vocab_size))


def settings_of(**changes):
    return PruneSettings("gauss-newton", "all", Sparsity(0.5), batch=2, **changes)


def run(folder, settings, progress=lambda where: None, resume=False):
    """The pruned model, and keep masks of every block."""
    model = Llama(CONFIG, key=jax.random.key(0))
    with RunFolder(folder, settings, resume=resume) as kept:
        blocks = list(prune_model(model, READ, READ, settings, kept, progress))
    return model, {layer: masks for layer, masks, _ in blocks}


def pairs_of(one, other):
    """Weights of two models."""
    return zip(*(jax.tree.leaves(m.blocks.get_value()) for m in (one, other)), strict=True)


@pytest.mark.parametrize("allocate", ["matrix", "model"])
def test_the_last_round_is_one_on_the_mean_curvature(tmp_path, monkeypatch, taken, allocate):
    three, _ = run(tmp_path / "three", settings_of(rounds=3, allocate=allocate))
    dense = Llama(CONFIG, key=jax.random.key(0)).blocks.get_value()
    seen = [each.blocks.w_up for each in taken]
    zeros = [float(jnp.mean(w_up == 0)) for w_up in seen]
    np.testing.assert_array_equal(seen[0], dense.w_up)
    assert zeros[0] == 0 < min(zeros[1:])
    assert (seen[1] != seen[2]).any()

    mean = jax.tree.map(lambda *values: sum(values) / 3, *(each.curvature for each in taken))
    monkeypatch.setattr(pipeline, "prediction_curvature", lambda *a, **k: mean)
    one, _ = run(tmp_path / "one", settings_of(allocate=allocate))
    for a, b in pairs_of(three, one):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def test_a_round_takes_fresh_cotangents(tmp_path, taken):
    run(tmp_path / "run", settings_of(rounds=3))
    assert len({tuple(np.asarray(jax.random.key_data(each.key))) for each in taken}) == 3


# Curvature and both blocks; the other curvature, the first block again.
@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, stop_after):
    settings, places = settings_of(rounds=2), []
    whole, masks = run(tmp_path / "whole", settings, lambda where: places.append(where.done))
    assert places == sorted(places)
    assert places[-1] == units(settings, CONFIG) == 2 * (1 + CONFIG.num_hidden_layers)

    def stop(where):
        if where.done == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", settings, stop)
    again, same = run(tmp_path / "cut", settings, resume=True)
    for a, b in pairs_of(whole, again):
        np.testing.assert_array_equal(a, b)
    for layer, kept in masks.items():
        for name, mask in kept.items():
            np.testing.assert_array_equal(mask, same[layer][name])


def test_descent_goes_on_from_the_last_round(tmp_path):
    """Steps are of the last round alone: an earlier one with steps would leave their state."""
    settings = PruneSettings("descent", "all", Sparsity(0.5), rounds=2, steps=2, distill=0)
    closed, masks = run(tmp_path / "closed", settings_of(rounds=2))
    refitted, same = run(tmp_path / "descent", settings)
    np.testing.assert_array_equal(masks[0]["w_up"], same[0]["w_up"])
    assert (closed.block_weights(0).w_up != refitted.block_weights(0).w_up).any()


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 0},
        {"rounds": 2, "targets": "qk"},
        {"rounds": 2, "method": "wanda"},
        {"rounds": 2, "method": "wanda", "allocate": "model"},
        {"rounds": 2, "method": "descent", "start": "dense"},
    ],
)
def test_rounds_that_nothing_takes_are_refused(changes):
    settings = {"method": "gauss-newton", "targets": "all", "sparsity": Sparsity(0.5)} | changes
    with pytest.raises(InputError, match=f"rounds {changes['rounds']}: "):
        PruneSettings(**settings).check_names()
