import json

import numpy as np
import pandas as pd
import pytest

TOY = [
    *("--lam", "0.1", "--n", "8", "16", "--d", "6", "--k", "3", "--seeds", "3"),
    *("--steps", "120"),
]


@pytest.fixture(scope="module")
def convergence(script):
    return script("convergence")


@pytest.fixture(scope="module")
def toy(convergence, drawn, tmp_path_factory):
    """A finished toy run: synthetic heads and a layer of the embedded model."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    arguments = [*TOY, "--layers", "1", "--seqlen", "16", "--out", str(out)]
    assert convergence.main(arguments) == 0
    return out


def metrics_of(folder, kind):
    metrics = pd.read_csv(folder / "metrics.csv")
    return metrics[metrics["kind"] == kind]


@pytest.mark.slow
def test_run_leaves_metrics_tables_and_figures(toy):
    for name in ("curves", "envelope", "bound", "dependence"):
        for suffix in ("png", "svg"):
            assert (toy / "figures" / f"{name}.{suffix}").stat().st_size > 5000
    table = pd.read_csv(toy / "summary.csv")
    assert list(table["setting"]) == ["synthetic", "synthetic", "layer1"]
    assert (table["lemma_held"] == table["heads"]).all()
    assert "T(ε)" in (toy / "tables.md").read_text()
    assert json.loads((toy / "config.json").read_text())["step"] == "curvature"


@pytest.mark.slow
def test_rows_obey_the_theorem(toy):
    rows = metrics_of(toy, "accuracy")
    reached = rows[np.isfinite(rows["used"])]
    assert len(reached) > 0.5 * len(rows)
    assert (reached["used"] <= reached["bound"]).all()
    np.testing.assert_allclose(
        rows["bound"],
        4
        * rows["initial_loss"]
        / (rows["eta"] * rows["mu"] * rows["epsilon"] * (rows["initial_loss"] - rows["xi"])),
        rtol=1e-3,
    )
    assert (rows["curvature_start"] <= rows["certified_lipschitz"]).all()


@pytest.mark.slow
def test_steps_descend(toy):
    steps = metrics_of(toy, "step")
    for _, run in steps.groupby(["setting", "n", "head"]):
        assert (np.diff(run["loss"]) <= 1e-5 * run["loss"].to_numpy()[:-1]).all()
    assert steps["t"].max() == 119


@pytest.mark.slow
def test_interrupted_run_continues_and_redraws(convergence, toy, capsys):
    before = (toy / "metrics.csv").read_bytes()
    next((toy / "parts").glob("synthetic*n16*.json")).unlink()
    arguments = [*TOY, "--layers", "1", "--seqlen", "16", "--out", str(toy)]
    assert convergence.main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert convergence.main([*arguments, "--resume"]) == 0
    assert (toy / "metrics.csv").read_bytes() == before
    (toy / "summary.csv").unlink()
    assert convergence.main(["--out", str(toy), "--redraw"]) == 0
    assert (toy / "summary.csv").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--step", "newton"], "--step newton: expected certified"),
        (["--step", "-1"], "--step -1"),
        (["--lam", "0"], "--lam 0"),
        (["--n", "0"], "--n 0"),
        (["--steps", "1"], "--steps 1"),
        (["--layers", "99"], "--layers 99: the model has blocks"),
        (["--model", "nowhere/at-all"], "nowhere"),
    ],
)
def test_wrong_flags_are_one_line(convergence, tmp_path, capsys, flags, message):
    assert convergence.main([*flags, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_exponents_are_slopes_of_what_every_head_reached(convergence):
    accuracies = [0.1, 0.01, 0.001, 0.0001]
    rows = [
        {
            "kind": "accuracy",
            **{"setting": "synthetic", "lam": 1.0, "n": 2, "d": 2, "head": head},
            "epsilon": epsilon,
            "used": np.inf if head == 2 and epsilon < 5e-4 else 10 * epsilon**-slope,
        }
        for head, slope in enumerate((0.4, 0.5, 0.6))
        for epsilon in accuracies
    ]
    found = convergence.exponents(pd.DataFrame(rows)).iloc[0]
    np.testing.assert_allclose(found["exponent"], 0.5)
    np.testing.assert_allclose(found["high"] - 0.5, 4.303 * 0.1 / np.sqrt(3))
    reached = convergence.reached_by_all(pd.DataFrame(rows))
    assert reached["epsilon"].min() == 0.001


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.706), (4, 3.182), (5, 2.776), (31, 2.042)])
def test_quantiles_are_students(convergence, count, quantile):
    np.testing.assert_allclose(convergence.student(count), quantile, rtol=0.01)


def test_dependence_counts_updates_and_their_operations(convergence):
    """Used ∝ n^0.5 λ^-1, and operations 4nd(n + d) an update on top of it."""
    points = [(lam, 64, 32) for lam in (0.1, 1.0, 10.0)]
    points += [(1.0, n, 32) for n in (32, 128)]
    rows = [
        {
            "kind": "accuracy",
            **{"setting": "synthetic", "lam": lam, "n": n, "d": d, "head": head},
            **{"epsilon": 0.01, "used": (100 + head) * n**0.5 / lam},
            **dict.fromkeys(("bound", "bound_certified", "mu", "curvature_start"), np.inf),
        }
        for lam, n, d in points
        for head in range(3)
    ]
    found = convergence.dependence(pd.DataFrame(rows)).set_index(["variable", "quantity"])
    np.testing.assert_allclose(found.loc[("lam", "used"), "exponent"], -1)
    np.testing.assert_allclose(found.loc[("lam", "operations"), "exponent"], -1)
    np.testing.assert_allclose(found.loc[("n", "used"), "exponent"], 0.5)
    extra = np.log((128 + 32) / (32 + 32)) / np.log(4)  # slope of n + d over the ends
    np.testing.assert_allclose(found.loc[("n", "operations"), "exponent"], 1.5 + extra, atol=1e-9)
    assert "d" not in found.index.get_level_values(0)  # one value: no slope
    assert "bound" not in found.index.get_level_values(1)  # infinite
    assert convergence.operations(3, 5) == 2 * (3 * 5 * 5 + 3 * 3 * 5) * 2
