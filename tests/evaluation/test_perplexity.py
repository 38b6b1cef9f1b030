"""Perplexity against ``transformers``, and its arithmetic."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.errors import InputError
from jaxprune.evaluation import perplexity
from jaxprune.models import llama
from jaxprune.models.zoo import ZOO
from jaxprune.text import windows as data
from jaxprune.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


def windows_of(tokens):
    return data.Windows(tokens, {"seqlen": tokens.shape[1], "windows": len(tokens)})


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 40, (7, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return llama.load(GOLDEN / "untied_gqa")


def test_it_is_the_exponential_of_the_mean_cross_entropy(model, tokens):
    log_p = jax.nn.log_softmax(model(tokens), axis=-1)
    picked = np.take_along_axis(np.asarray(log_p)[:, :-1], tokens[:, 1:, None], axis=-1)
    report = perplexity.evaluate(model, windows_of(tokens))
    np.testing.assert_allclose(report["perplexity"], np.exp(-picked.mean()), rtol=1e-6)
    assert report["tokens_scored"] == 7 * 11
    assert report["dtype"] == "float32"
    assert report["seqlen"] == 12


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 100])
def test_the_batch_does_not_matter(model, tokens, batch):
    expected = perplexity.evaluate(model, windows_of(tokens), batch=7)["perplexity"]
    found = perplexity.evaluate(model, windows_of(tokens), batch=batch)["perplexity"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_one_program_serves_all_batches(model, tokens):
    perplexity.evaluate(model, windows_of(tokens), batch=5)
    compiled = perplexity.window_losses._cache_size()
    perplexity.evaluate(llama.load(GOLDEN / "untied_gqa"), windows_of(tokens[::-1]), batch=5)
    assert perplexity.window_losses._cache_size() == compiled


def test_the_cross_entropy_is_float32_in_bfloat16_too(tokens):
    model = llama.load(GOLDEN / "untied_gqa", jnp.bfloat16)
    assert perplexity.window_losses(model, tokens).dtype == jnp.float32
    assert perplexity.evaluate(model, windows_of(tokens))["dtype"] == "bfloat16"


def test_unusable_weights_are_an_error(tokens):
    model = llama.load(GOLDEN / "untied_gqa")
    model.final_norm.set_value(jnp.full(16, jnp.nan))
    with pytest.raises(InputError, match="the mean loss is nan"):
        perplexity.evaluate(model, windows_of(tokens))
    with pytest.raises(InputError, match="batch"):
        perplexity.evaluate(model, windows_of(tokens), batch=0)


@pytest.mark.parametrize("batch", [3, 8])
def test_one_pass_judges_as_two_do(model, tokens, batch):
    windows, pruned = windows_of(tokens), llama.load(GOLDEN / "untied_gqa")
    blocks = pruned.blocks.get_value()
    pruned.blocks.set_value(blocks._replace(wq=blocks.wq.at[:, ::2].set(0)))
    expected = perplexity.dense_states(model, windows, batch=batch)
    found = perplexity.judge(pruned, windows, expected, batch=batch)
    apart = perplexity.divergence(pruned, model, windows)
    np.testing.assert_allclose(
        found, (perplexity.evaluate(pruned, windows)["perplexity"], apart), rtol=1e-5
    )
    assert apart > 1e-6
    with pytest.raises(InputError, match="batch"):
        perplexity.judge(pruned, windows, expected, batch=0)


@pytest.mark.slow
@pytest.mark.parametrize("bos", ["one", pytest.param("each", marks=pytest.mark.slow)])
def test_a_trained_model_has_the_perplexity_that_transformers_finds(shared, bos):
    expected = json.loads((GOLDEN / "perplexity.json").read_text())["stories260K"][bos]
    folder = shared / "models" / "stories260K"
    model = llama.load(folder)
    windows = data.evaluation_windows(
        str(shared / "data" / "tinystories.txt"),
        Tokenizer(folder, model.config.vocab_size),
        seqlen=256,
        bos_per_window=bos == "each",
    )
    report = perplexity.evaluate(model, windows)
    assert report["windows"] == expected["windows"]
    assert abs(report["perplexity"] - expected["perplexity"]) < 1e-3


def test_the_embedded_model_is_as_good_as_its_card_says():
    model = llama.load(ZOO)
    windows = data.evaluation_windows("zoo", Tokenizer(ZOO, model.config.vocab_size))
    report = perplexity.evaluate(model, windows)
    rows = (line.split("|") for line in (ZOO / "README.md").read_text().splitlines())
    card = {row[1].split()[0]: row[2] for row in rows if len(row) == 4 and row[1].strip()}
    assert f"{report['perplexity']:.2f}" == card["this"].strip()
    assert report["perplexity"] < 0.5 * float(card["bigram"]) < 0.5 * float(card["unigram"])
