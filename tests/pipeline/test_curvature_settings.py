"""What the curvature of the predictions is taken from, and how wide its blocks are."""

import jax
import numpy as np
import pytest

from jaxprune.errors import InputError
from jaxprune.models import llama
from jaxprune.pipeline import CurvatureSettings, PruneSettings, prune_model
from jaxprune.runs import RunFolder
from jaxprune.sparsity import Sparsity

CONFIG = llama.LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    tie_word_embeddings=True,
)
TOKENS = np.random.default_rng(0).integers(0, 40, (4, 12)).astype(np.int32)


def prune(folder, **curvature):
    """Pruned maps of one block of a tiny model."""
    chosen = CurvatureSettings(**curvature)
    settings = PruneSettings("gauss-newton", "all", Sparsity(0.5), curvature=chosen)
    model = llama.Llama(CONFIG, key=jax.random.key(0))
    with RunFolder(folder / "-".join(map(str, chosen)), settings) as run:
        list(prune_model(model, TOKENS, TOKENS, settings, run, lambda where: None))
    return model.blocks.get_value()


class TakenError(Exception):
    """Ends a run where the curvature would be taken."""


def test_they_are_what_the_curvature_is_taken_by(tmp_path, monkeypatch):
    def take(model, tokens, names, key, *, batch, full):
        raise TakenError(len(tokens), full)

    monkeypatch.setattr("jaxprune.pipeline.model.prediction_curvature", take)
    for curvature, found in (
        ({}, (4, 2048)),
        ({"windows": 3}, (3, 2048)),
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
