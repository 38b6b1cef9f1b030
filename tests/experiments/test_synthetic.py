"""experiments/synthetic.py: what it writes, the same after an interruption, what it refuses."""

import json

import numpy as np
import pandas as pd
import pytest

from jaxprune.evaluation.comparison import METHODS, ON_PROJECTIONS

COLUMNS = ["setting", "k", "n", "lam", "ratio", "method", "seed"]
COLUMNS += ["calibration_error", "heldout_error", "stored_weights", "exponent", "learning_rate"]
TINY = ["--d", "8", "--k", "4", "6", "--n", "8", "--lam", "0.01", "1", "--ratio", "0.25", "0.5"]
TINY += ["--seeds", "2", "--steps", "4"]
SOFT = [*TINY, "--settings", "soft"]


@pytest.fixture(scope="module")
def synthetic(script):
    return script("synthetic")


@pytest.fixture(scope="module")
def finished(synthetic, tmp_path_factory):
    """The folder of a whole run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert synthetic.main([*SOFT, "--out", str(out)]) == 0
    return out


def test_every_point_has_a_row_in_the_documented_columns(finished):
    metrics = pd.read_csv(finished / "metrics.csv")
    assert list(metrics.columns) == COLUMNS
    # Two widths, seeds and ratios; Algorithm 1 twice, once for each λ.
    assert len(metrics) == 2 * 2 * 2 * (len(METHODS) + 2)
    assert metrics.groupby("method").size().to_dict() == {
        "algorithm1": 16,
        **dict.fromkeys(METHODS, 8),
    }
    assert (metrics["setting"] == "soft").all()
    assert set(metrics["k"]) == {4, 6}
    assert set(metrics["seed"]) == {0, 1}
    errors = metrics[["calibration_error", "heldout_error"]]
    assert np.isfinite(errors).all(axis=None)
    assert ((errors > 0) & (errors < 2)).all(axis=None)


def test_stored_weights_are_what_the_ratio_leaves(finished):
    metrics = pd.read_csv(finished / "metrics.csv")
    separate = metrics["method"].isin(ON_PROJECTIONS)
    dense = np.where(separate, 2 * 8 * metrics["k"], 64)
    assert (metrics["stored_weights"] == dense * (1 - metrics["ratio"])).all()


def test_only_algorithm_1_has_a_penalty_and_a_step_size(finished):
    metrics = pd.read_csv(finished / "metrics.csv")
    learned = metrics["method"] == "algorithm1"
    assert set(metrics["lam"][learned]) == {0.01, 1.0}
    assert metrics.loc[~learned, ["lam", "learning_rate"]].isna().all(axis=None)
    assert metrics["learning_rate"][learned].notna().all()


def test_the_run_says_what_it_was(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["k"] == [4, 6]
    assert config["settings"] == ["soft"]
    assert json.loads((finished / "environment.json").read_text())["backend"]


def test_figures_and_tables_are_there(finished):
    assert sorted(f.name for f in (finished / "figures").iterdir()) == [
        f"figure2_soft_k{k}.{form}" for k in (4, 6) for form in ("png", "svg")
    ]
    assert (finished / "figures" / "figure2_soft_k4.png").read_bytes().startswith(b"\x89PNG")
    tables = (finished / "tables.md").read_text()
    for text in ("Equal ratio", "Equal stored weights", "descent", "sparsegpt"):
        assert text in tables


def test_the_summary_is_the_mean_with_the_penalty_chosen_on_calibration_error(finished):
    metrics = pd.read_csv(finished / "metrics.csv")
    table = pd.read_csv(finished / "summary.csv").set_index(["k", "method"])
    half = metrics[(metrics["ratio"] == 0.5) & (metrics["k"] == 4)]
    learned = half[half["method"] == "algorithm1"]
    best = [
        learned[learned["seed"] == seed].sort_values("calibration_error").iloc[0] for seed in (0, 1)
    ]
    row = table.loc[(4, "algorithm1")]
    np.testing.assert_allclose(row["calibration"], np.mean([b["calibration_error"] for b in best]))
    np.testing.assert_allclose(row["heldout"], np.mean([b["heldout_error"] for b in best]))
    wanda = half[half["method"] == "wanda"]["heldout_error"]
    np.testing.assert_allclose(
        table.loc[(4, "wanda"), "heldout_se"], np.std(wanda, ddof=1) / 2**0.5
    )
    assert row["seeds"] == 2


def test_equal_storage_sets_side_by_side_what_stores_the_same(finished):
    table = pd.read_csv(finished / "equal_storage.csv")
    metrics = pd.read_csv(finished / "metrics.csv")
    # 2·8·4 weights less a quarter are 48, the fused 64 less a quarter too.
    row = table[(table["k"] == 4) & (table["stored_weights"] == 48)].iloc[0]
    assert (row["separate_ratio"], row["fused_ratio"]) == (0.25, 0.25)
    at = metrics[(metrics["k"] == 4) & (metrics["ratio"] == 0.25)]
    for method in ("wanda", "descent"):
        expected = at[at["method"] == method]["heldout_error"].mean()
        np.testing.assert_allclose(row[method], expected)


def test_at_equal_storage_every_baseline_has_the_ratio_of_its_projections(synthetic):
    """2 · 16 · 4 weights less half are 64; of the fused 256 a quarter."""
    stored = {
        ratio: {"projections": 128 * (1 - ratio), "fused": 256 * (1 - ratio)}
        for ratio in (0.5, 0.75)
    }
    kinds = dict.fromkeys(("wanda", "sparsegpt", "admm", "magnitude"), "projections")
    kinds |= dict.fromkeys(("algorithm1", "descent"), "fused")
    metrics = pd.DataFrame(
        {
            **{"setting": "soft", "exponent": 0.0, "k": 4, "n": 128, "seed": 0},
            **{"method": method, "ratio": ratio, "stored_weights": stored[ratio][kind]},
            **{"calibration_error": ratio, "heldout_error": ratio},
        }
        for method, kind in kinds.items()
        for ratio in stored
    )
    (row,) = synthetic.equal_storage(metrics).to_dict("records")
    assert (row["separate_ratio"], row["fused_ratio"], row["stored_weights"]) == (0.5, 0.75, 64)
    assert {m: row[m] for m in kinds} == {
        m: {"projections": 0.5, "fused": 0.75}[kind] for m, kind in kinds.items()
    }


def test_metrics_without_the_methods_of_later_versions_are_drawn(synthetic, finished, tmp_path):
    metrics = pd.read_csv(finished / "metrics.csv")
    old = metrics[~metrics["method"].isin(["magnitude", "admm", "gauss_newton"])]
    assert "Equal stored weights" in synthetic.report(old, tmp_path, tmp_path)
    table = pd.read_csv(tmp_path / "equal_storage.csv")
    assert "descent" in table
    assert "gauss_newton" not in table


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_identical_metrics(
    synthetic, finished, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "halved"
    real, calls = synthetic.compare, []

    def interrupt(*arguments, **options):
        calls.append(1)
        if len(calls) == len(METHODS) + 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(synthetic, "compare", interrupt)
    arguments = [*SOFT, "--out", str(out)]
    assert synthetic.main(arguments) == 130
    assert "--resume continues" in capsys.readouterr().err.splitlines()[-1]
    assert [f.name for f in (out / "parts").iterdir()] == ["soft-a0-k4-n8.json"]
    assert not (out / "metrics.csv").exists()
    assert synthetic.main(arguments) == 2, "without --resume"
    calls.clear()
    calls.extend([0] * (len(METHODS) + 3))  # past the interrupt
    assert synthetic.main([*arguments, "--resume"]) == 0
    assert len(calls) == 2 * len(METHODS) + 3, "the finished part is not computed again"
    assert (out / "metrics.csv").read_bytes() == (finished / "metrics.csv").read_bytes()


@pytest.mark.slow
def test_jobs_side_by_side_give_what_one_after_the_other_do(
    synthetic, finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(synthetic, "MOST_JOBS", 1)
    assert synthetic.main([*SOFT, "--out", str(tmp_path / "one")]) == 0
    found = (tmp_path / "one" / "metrics.csv").read_bytes()
    assert found == (finished / "metrics.csv").read_bytes()


@pytest.mark.slow
def test_the_same_seeds_give_the_same_numbers_and_more_seeds_only_add(
    synthetic, finished, tmp_path
):
    out = tmp_path / "one"
    arguments = [*TINY, "--settings", "soft", "--seeds", "1", "--k", "4", "--out", str(out)]
    assert synthetic.main(arguments) == 0
    metrics = pd.read_csv(finished / "metrics.csv")
    expected = metrics[(metrics["seed"] == 0) & (metrics["k"] == 4)].reset_index(drop=True)
    found = pd.read_csv(out / "metrics.csv")
    same = ["setting", "k", "n", "lam", "ratio", "method", "seed", "stored_weights"]
    pd.testing.assert_frame_equal(found[same], expected[same])
    # Mapped over another number of seeds, sums round differently.
    fixed = found["method"] != "descent"
    np.testing.assert_allclose(
        found["heldout_error"][fixed], expected["heldout_error"][fixed], rtol=1e-3
    )


@pytest.mark.slow
def test_redraw_needs_the_metrics_only(synthetic, finished, tmp_path, monkeypatch):
    (tmp_path / "metrics.csv").write_bytes((finished / "metrics.csv").read_bytes())
    monkeypatch.setattr(synthetic, "compute_all", None)
    assert synthetic.main(["--redraw", "--out", str(tmp_path)]) == 0
    names = ["figures/figure2_soft_k4.svg", "tables.md", "summary.csv", "equal_storage.csv"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_every_setting_is_drawn_as_it_says(synthetic):
    """Standard deviation of the logits of independent tokens, and the covariance."""
    for name, exponent, expected in (
        ("unit_variance", 0.0, 16 * 4**0.5),
        ("soft", 0.0, 2.0),
        ("correlated", 2.0, 2.0),
    ):
        setting = synthetic.SETTINGS[name]
        part = synthetic.Part(name, exponent, 4, 500, True)
        problem = synthetic.draw_problem(np.int32(3), part=part, d=16)
        assert problem.x.shape == (setting.sequences, 500, 16)
        assert problem.x_heldout.shape == (synthetic.HELDOUT_SEQUENCES, 500, 16)
        tokens = np.asarray(problem.x_heldout).reshape(-1, 16)
        logits = tokens[:2000] @ np.asarray(problem.w) @ tokens[2000:].T
        # Unit-variance weights give that deviation on the mean over weights only.
        tolerance = 0.25 if name == "unit_variance" else 0.1
        np.testing.assert_allclose(np.std(logits), expected, rtol=tolerance)
        eigenvalues = np.linalg.eigvalsh(np.cov(tokens.T))[::-1]
        wanted = np.arange(1, 17.0) ** -exponent
        np.testing.assert_allclose(eigenvalues, 16 * wanted / wanted.sum(), rtol=0.15)


def test_longer_sequences_reuse_the_best_pairs_of_the_base_length(synthetic):
    config = synthetic.Config(n=(128, 256), lam=(0.1, 1.0, 10.0, 100.0))
    base, longer = (synthetic.Part("soft", 0.0, 16, n, n == 128) for n in (128, 256))
    pairs = synthetic.step_sizes(base, config, [])
    assert [lam for lam, _ in pairs] == [0.1, 1.0, 10.0, 100.0]
    np.testing.assert_allclose(pairs[0][1], [0.03, 0.1, 0.3, 1.0])
    rows = [
        {"method": "algorithm1", "ratio": 0.5, "lam": lam, "seed": seed} | values
        for lam, error, rate in (
            (0.1, 0.9, 1.0),
            (1.0, 0.2, 0.1),
            (10.0, 0.3, 0.01),
            (100.0, 0.1, 0.001),
        )
        for seed in (0, 1)
        for values in [{"calibration_error": error + seed, "learning_rate": rate}]
    ]
    rows += [{"method": "wanda", "ratio": 0.5, "lam": None, "calibration_error": 0.0}]
    assert synthetic.step_sizes(longer, config, rows) == [
        (100.0, [0.001]),
        (1.0, [0.1]),
        (10.0, [0.01]),
    ]


def test_the_default_plan_is_figure_2(synthetic):
    parts = synthetic.plan(synthetic.Config())
    assert len({part.name for part in parts}) == len(parts)
    lengths = [p.n for p in parts if (p.setting, p.k) == ("unit_variance", 16)]
    assert lengths == [128, 32, 64, 256]
    assert {(p.setting, p.exponent) for p in parts} == {
        ("unit_variance", 0.0),
        ("soft", 0.0),
        ("correlated", 1.0),
        ("correlated", 2.0),
    }
    assert {p.k for p in parts} == {16, 64}


@pytest.mark.slow
def test_curves_of_correlated_activations_run_too(synthetic, tmp_path, capsys):
    arguments = ["--d", "8", "--k", "4", "--n", "6", "--lam", "0.1", "--ratio", "0.5"]
    arguments += ["--seeds", "1", "--steps", "2", "--settings", "correlated"]
    assert synthetic.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    names = {f.stem for f in (tmp_path / "run" / "figures").iterdir()}
    assert names == {"figure2_correlated_1_k4", "figure2_correlated_2_k4"}


def refuse(synthetic, capsys, *arguments):
    status = synthetic.main(list(arguments))
    shown = capsys.readouterr()
    assert (status, shown.out) == (2, "")
    assert shown.err.startswith("synthetic.py: error: ")
    assert shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--ratio", "1.5"], "--ratio 1.5"),
        (["--ratio", "0.5", "-0.1"], "-0.1"),
        (["--ratio", "2:0"], "2:0"),
        (["--ratio", "nan"], "--ratio nan"),
        (["--ratio"], "--ratio"),
        (["--k", "0"], "--k 0"),
        (["--k", "sixteen"], "sixteen"),
        (["--n", "0", "32"], "--n 0"),
        (["--d", "0"], "--d 0"),
        (["--lam", "-1"], "-1"),
        (["--lam", "0"], "--lam 0"),
        (["--lam", "nan"], "--lam nan"),
        (["--seeds", "0"], "--seeds"),
        (["--steps", "0"], "--steps"),
        (["--settings", "hard"], "--settings hard: expected some of unit_variance, soft"),
        (["--method", "magnitude"], "--method"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    synthetic, capsys, tmp_path, arguments, named
):
    assert named in refuse(synthetic, capsys, *arguments, "--out", str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "/run"])
def test_a_folder_that_cannot_be_written_is_named(synthetic, capsys, tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    out = str(tmp_path / "file") + below
    assert f"--out {out}: cannot write there" in refuse(synthetic, capsys, "--out", out)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.slow
def test_another_run_is_neither_overwritten_nor_continued(synthetic, finished, capsys):
    before = {f: f.stat().st_mtime_ns for f in finished.rglob("*") if f.name != ".lock"}
    arguments = [*SOFT, "--out", str(finished)]
    assert "--resume continues it" in refuse(synthetic, capsys, *arguments)
    message = refuse(synthetic, capsys, *arguments, "--seeds", "3", "--resume")
    assert "--seeds 2, not 3" in message
    after = {f: f.stat().st_mtime_ns for f in finished.rglob("*") if f.name != ".lock"}
    assert before == after


def test_redraw_without_metrics_says_so(synthetic, capsys, tmp_path):
    assert "run the experiment first" in refuse(
        synthetic, capsys, "--redraw", "--out", str(tmp_path)
    )
