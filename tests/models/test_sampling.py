"""Text that a model writes: the same tokens as from whole forward passes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.errors import InputError
from jaxprune.models import llama
from jaxprune.models.llama import sampling

GOLDEN = Path(__file__).parent.parent / "golden"
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def model():
    return llama.load(GOLDEN / "llama3")


def prompts_of(model, windows, width):
    drawn = np.random.default_rng(0).integers(0, model.config.vocab_size, (windows, width))
    return drawn.astype(np.int32)


@pytest.mark.parametrize(
    "case",
    ["llama3", *(pytest.param(c, marks=pytest.mark.slow) for c in ("qwen3", "smollm3_yarn"))],
)
def test_every_token_is_drawn_from_the_predictions_of_a_whole_pass(case):
    model = llama.load(GOLDEN / case)
    prompts = prompts_of(model, 3, 4)
    written = sampling.continuations(model, prompts, 20, KEY)
    np.testing.assert_array_equal(written[:, :4], prompts)
    logits = jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(written))
    for window in range(3):
        key = jax.random.fold_in(KEY, window)
        for place in range(3, 19):
            draw = jax.random.fold_in(key, place)
            expected = jax.random.categorical(draw, logits[window, place])
            assert written[window, place + 1] == expected, (window, place)


@pytest.mark.parametrize("at_once", [1, 2])  # of three windows, two at once leave one over
def test_windows_do_not_depend_on_how_many_are_written_at_once(model, monkeypatch, at_once):
    prompts, config = prompts_of(model, 3, 2), model.config
    together = sampling.continuations(model, prompts, 12, KEY)
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    monkeypatch.setattr(sampling, "_CACHE_BYTES", 4 * heads * config.head_dim * 12 * at_once)
    sizes, write = [], sampling._write

    def recorded(model, tokens, *arguments):
        sizes.append(len(tokens))
        return write(model, tokens, *arguments)

    monkeypatch.setattr(sampling, "_write", recorded)
    np.testing.assert_array_equal(sampling.continuations(model, prompts, 12, KEY), together)
    assert len({tuple(window) for window in together}) == 3
    assert sizes == [at_once] * -(-3 // at_once)


def test_a_prompt_as_long_as_the_window_is_the_window(model):
    prompts = prompts_of(model, 2, 6)
    np.testing.assert_array_equal(sampling.continuations(model, prompts, 6, KEY), prompts)


@pytest.mark.parametrize("width", [0, 7])
def test_prompts_that_leave_nothing_to_begin_with_or_no_room(model, width):
    with pytest.raises(InputError, match="prompts of"):
        sampling.continuations(model, prompts_of(model, 2, width), 6, KEY)
