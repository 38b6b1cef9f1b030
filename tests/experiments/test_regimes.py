"""experiments/regimes.py: scales and sizes of its problems, the numbers of its map."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest


@pytest.fixture(scope="module")
def regimes(script):
    return script("regimes")


@pytest.mark.parametrize("shared", [True, False])
def test_logits_get_the_deviation_asked_for(regimes, key, shared):
    """Over the keys of each query, about their mean, written out."""
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (2, 3, 7, 6))
    wq, wk = jax.random.normal(keys[1], (2, 2, 6, 4))
    if shared:
        x = x[0]
    found = regimes.with_logits_std(regimes.FusedProblem(x, x, wq, wk), 3.0)
    for i in range(2):
        own = x if shared else x[i]
        squares = []
        for s in np.asarray(own):
            logits = s @ np.asarray(found.w[i]) @ s.T
            for row in range(1, 7):
                seen = logits[row, :row]
                squares += list((seen - seen.mean()) ** 2)
        np.testing.assert_allclose(np.sqrt(np.mean(squares)), 3.0, rtol=1e-4)


def test_tokens_per_entry_are_counted_in_sequences(regimes):
    assert regimes.sequences(2.0, 32, 64) == 32
    assert regimes.sequences(1e-3, 32, 64) == 1
    config = regimes.Config(d=8, k=4, n=16, seeds=2)
    problems = regimes.problems_of("isotropic", 2.0, config, None)
    assert problems.x.shape == (2, 8, 16, 8)


def test_real_text_ends_where_it_ends(regimes, key):
    x = jax.random.normal(key, (1, 4, 16, 8))
    real = regimes.FusedProblem(x, x, jnp.ones((1, 8, 4)), jnp.ones((1, 8, 4)))
    config = regimes.Config()
    assert regimes.problems_of(regimes.REAL, 2.0, config, real) is None
    half = regimes.problems_of(regimes.REAL, 0.5, config, real)
    np.testing.assert_array_equal(half.x, x[:, [0, 3]])


def test_the_map_shows_geometric_means_of_error_ratios(regimes):
    rows = [
        ("isotropic", 1.0, 0.5, method, i, calibration, heldout)
        for i, errors in enumerate([((1, 4), (2, 2)), ((4, 4), (2, 8))])
        for method, (calibration, heldout) in zip(
            ("algorithm1", "fused_magnitude"), errors, strict=True
        )
    ]
    columns = ["data", "logits_std", "tokens_per_entry", "method", "index"]
    frame = pd.DataFrame(rows, columns=[*columns, "calibration_error", "heldout_error"])
    table = regimes.ratios_of(frame)
    np.testing.assert_allclose(table[["calibration", "heldout", "gap"]], [[1.0, 1.0, 2.0]])


def test_the_map_has_the_closed_form_where_the_metrics_have_it(regimes, tmp_path):
    rows = [
        ("isotropic", std, 0.5, method, 0, error, error)
        for std in (1.0, 2.0)
        for method, error in (("algorithm1", 2), ("fused_magnitude", 4), ("gauss_newton", 1))
    ]
    columns = ["data", "logits_std", "tokens_per_entry", "method", "index"]
    frame = pd.DataFrame(rows, columns=[*columns, "calibration_error", "heldout_error"])
    np.testing.assert_allclose(regimes.ratios_of(frame)["closed_form"], 0.25)
    assert len(regimes.draw(frame).axes) == 5
    regimes.report(frame, tmp_path, tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "summary.csv"), regimes.ratios_of(frame))
    # A run begun by version 0.1 and gone on with, and one that ended there.
    closed = frame["method"] == "gauss_newton"
    begun = frame[~(closed & (frame["logits_std"] == 1.0))]
    np.testing.assert_allclose(regimes.ratios_of(begun)["closed_form"], [np.nan, 0.25])
    regimes.draw(begun)
    assert "closed_form" not in regimes.ratios_of(frame[~closed])
    assert len(regimes.draw(frame[~closed]).axes) == 4


@pytest.mark.slow
def test_a_small_map_is_drawn(regimes, tmp_path, checkpoint):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 3000)
    flags = ["--model", str(checkpoint("llama3")), "--calibration", str(text)]
    flags += ["--logits-std", "2", "--tokens-per-entry", "0.1", "1", "--d", "8", "--k", "4"]
    flags += ["--n", "16", "--seeds", "2", "--heads", "1", "--steps", "3"]
    assert regimes.main([*flags, "--out", str(tmp_path / "run")]) == 0
    metrics = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert set(metrics["data"]) == {"isotropic", "correlated", "real heads"}
    assert (tmp_path / "run" / "figures" / "regimes.svg").exists()


@pytest.mark.parametrize(
    "flags", [["--ratio", "2"], ["--logits-std", "-1"], ["--seeds", "0"], ["--tokens-per-entry"]]
)
def test_wrong_flags_are_one_line(regimes, capsys, tmp_path, flags):
    assert regimes.main([*flags, "--out", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert flags[0] in shown
    assert shown.count("\n") == 1
