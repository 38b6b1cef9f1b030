"""experiments/fused_perplexity.py: rows, dense limit, what it refuses."""

import json

import numpy as np
import pandas as pd
import pytest

FLAGS = ["--windows", "4", "--seqlen", "10", "--eval-windows", "2", "--steps", "3"]
FLAGS += ["--descent-steps", "3", "--rope-steps", "3", "--rope-tokens", "6", "--batch-size", "2"]


@pytest.fixture(scope="module")
def fused(script):
    return script("fused_perplexity")


@pytest.fixture
def arguments(checkpoint, tmp_path):
    """Model, calibration text and another text."""
    texts = []
    for name, line in (("calibration", "the cat sat on the mat. "), ("text", "a dog ran home. ")):
        path = tmp_path / f"{name}.txt"
        path.write_text(line * 60)
        texts += [f"--{name}", str(path)]
    return ["--model", str(checkpoint("llama3")), *texts, *FLAGS]


@pytest.mark.slow
def test_every_method_and_ratio_has_a_row_and_nothing_removed_is_dense(fused, arguments, tmp_path):
    out = tmp_path / "run"
    assert fused.main([*arguments, "--ratios", "0", "0.5", "--out", str(out)]) == 0
    metrics = pd.read_csv(out / "metrics.csv").set_index(["method", "ratio"])
    assert len(metrics) == 1 + 2 * len(fused.METHODS)
    dense = metrics.loc[("dense", 0.0), "perplexity"]
    for method in fused.METHODS:
        # Factors of kept entries learn, even where nothing is removed.
        tolerance = 0.1 if method == "descent_rope" else 1e-4
        np.testing.assert_allclose(
            metrics.loc[(method, 0.0), "perplexity"], dense, rtol=tolerance, err_msg=method
        )
    config = json.loads((tmp_path / "llama3" / "config.json").read_text())
    d, layers = config["hidden_size"], config["num_hidden_layers"]
    entries = layers * config["num_attention_heads"] * d * d
    for method in (*fused.WITHOUT_POSITIONS, *fused.WITH_POSITIONS):
        assert metrics.loc[(method, 0.5), "stored_weights"] == entries // 2
    stored = metrics["stored_weights"]
    assert stored["wanda", 0.5] == stored["dense", 0.0] // 2
    assert "algorithm1_rope" in (out / "tables.md").read_text()
    assert (out / "figures" / "perplexity.svg").exists()


def refuse(fused, capsys, tmp_path, *arguments):
    out = tmp_path / "run"
    assert fused.main([*arguments, "--out", str(out)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("fused_perplexity.py: error: ")
    assert shown.err.count("\n") == 1
    assert not (out / "metrics.csv").exists()
    return shown.out + shown.err


def test_what_takes_too_long_or_too_much_is_refused_beforehand(
    fused, capsys, tmp_path, arguments, monkeypatch
):
    message = refuse(fused, capsys, tmp_path, *arguments, "--max-hours", "1e-9")
    assert "operations, about" in message
    assert "--max-hours" in message
    monkeypatch.setattr(fused, "available_memory", lambda: 1000)
    assert "GiB are free" in refuse(fused, capsys, tmp_path, *arguments)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--ratios", "2"], "--ratios 2"),
        (["--methods", "best"], "--methods best"),
        (["--rope-tokens", "1"], "--rope-tokens"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_wrong_flags_are_one_line(fused, capsys, tmp_path, arguments, changes, named):
    assert named in refuse(fused, capsys, tmp_path, *arguments, *changes)


def test_the_text_must_be_another_file(fused, capsys, tmp_path, arguments):
    same = ["--text", arguments[3]]
    assert "give another file" in refuse(fused, capsys, tmp_path, *arguments, *same)
