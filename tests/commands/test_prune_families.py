"""Every family through `jaxprune prune` and back: what is not pruned stays to the bit."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from jaxprune.models import llama
from jaxprune.pipeline.settings import METHODS

# Interpolated positions; biases; norms of heads; a layer without positions. All but the first have
# yarn's factor.
FAMILIES = ("mistral_linear", "qwen2_yarn", "qwen3_biases", "smollm3_yarn")
TARGETS = {
    "qk": ("q_proj", "k_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
QUICK = {("smollm3_yarn", "sparsegpt", "all")}
ROUND_TRIPS = [
    pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow)
    for each in itertools.product(FAMILIES, METHODS, TARGETS)
]


@pytest.fixture(scope="module")
def prune(script):
    return script("prune").main


@pytest.fixture
def text(tmp_path):
    words = np.random.default_rng(0).choice(["the cat", "sat", "on a mat", "and ran.\n"], 500)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(words))
    return file


def flags(model, text, out, *more):
    named = ("--model", model, "--calibration", text, "--out", out, "--windows", 8, "--heldout", 2)
    return [str(each) for each in (*named, *more)]


@pytest.mark.parametrize(("case", "method", "targets"), ROUND_TRIPS)
def test_every_family_is_pruned_and_written_back(
    prune, checkpoint, text, tmp_path, case, method, targets
):
    source, out = checkpoint(case), tmp_path / "out"
    more = ["--method", method, "--targets", targets, "--sparsity", "2:4", "--seqlen", 32]
    if method in ("descent", "gauss-newton"):
        more += ["--distill", 0]
    if method == "descent":
        more += ["--steps", 30]
    assert prune(flags(source, text, out, *more)) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert before.keys() == after.keys()
    for name, dense in before.items():
        assert dense.dtype == after[name].dtype
        if any(f"{target}.weight" in name for target in TARGETS[targets]):
            zeros = (after[name] == 0).reshape(len(dense), -1, 4).sum(axis=-1)
            assert (zeros == 2).all(), name
        else:
            assert dense.tobytes() == after[name].tobytes(), name
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    errors = json.loads((out / "pruning.json").read_text())["attention_error"]
    assert all(0 <= row["heldout_error"] < 2 for row in errors)
    assert llama.load(out).config == llama.load_config(source)


def test_windows_that_a_sliding_window_would_cut_are_refused(
    prune, checkpoint, text, tmp_path, capsys
):
    assert prune(flags(checkpoint("mistral"), text, tmp_path / "out", "--seqlen", 32)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "sliding_window 16 would hide tokens in windows of 32" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3_biases", "qwen2_yarn"])
def test_with_norms_and_biases_the_closed_form_is_ahead_in_every_layer(
    prune, checkpoint, text, tmp_path, case
):
    """On windows that no method saw, against methods that know the inputs alone."""
    source, errors = checkpoint(case), {}
    for method in ("gauss-newton", "wanda", "sparsegpt"):
        more = ("--method", method, "--seqlen", 32, "--windows", 24)
        assert prune(flags(source, text, tmp_path / method, *more)) == 0
        metrics = pd.read_csv(tmp_path / method / "metrics.csv")
        errors[method] = metrics.groupby("layer")["heldout_error"].mean()
    for rival in ("wanda", "sparsegpt"):
        assert (errors["gauss-newton"] < errors[rival]).all(), errors
