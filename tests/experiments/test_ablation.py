"""The ablation of the preset, on a toy checkpoint."""

from dataclasses import replace

import pandas as pd
import pytest

from jaxprune.runs.configuration import as_recorded
from jaxprune.runs.metrics import read_metrics
from jaxprune.storage import read_json

TOY = ["--windows", "8", "--seqlen", "16", "--steps", "20", "--distill", "5", "--sparsity", "0.5"]


@pytest.fixture
def ablation(script, monkeypatch):
    """The script, which computes its rows in this process."""
    module = script("ablation")

    def in_child(function, *arguments, progress):
        return function(*arguments, progress or (lambda where: None))

    monkeypatch.setattr(module, "in_child", in_child)
    return module


@pytest.fixture
def main(ablation):
    return ablation.main


@pytest.fixture
def where(checkpoint, tmp_path):
    """Flags for a toy model and a text long enough to leave windows to evaluate on."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and saw another cat\n" * 60)
    return ["--model", str(checkpoint()), "--calibration", str(text)]


@pytest.mark.slow
def test_a_row_for_every_cell_and_files_to_redraw_from(main, where, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--variants", "descent", "wanda", "--seeds", "2", "--out", str(out)]
    assert main([*where, *TOY, *flags]) == 0
    metrics = pd.read_csv(out / "metrics.csv")
    assert list(zip(metrics["variant"], metrics["seed"], strict=True)) == [
        ("descent", 0),
        ("descent", 1),
        ("wanda", 0),
    ]
    assert (metrics["divergence"] > 0).all()
    assert metrics["dense_perplexity"].nunique() == 1
    assert not (out / "work").exists()
    for name in ("tables.md", "figures/ablation.png", "figures/ablation.svg"):
        assert (out / name).stat().st_size > 0
    table = (out / "tables.md").read_text()
    assert table.count("preset descent") == 1
    (out / "tables.md").unlink()
    assert main(["--redraw", "--out", str(out)]) == 0
    assert (out / "tables.md").read_text() == table
    assert "Wanda" in capsys.readouterr().out


@pytest.mark.slow
def test_a_variant_goes_on_with_blocks_of_its_own_alone(ablation, where, tmp_path, monkeypatch):
    """Variants that differ in their windows alone have equal settings."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*where, "--windows", "12", *TOY[2:], "--seeds", "1"]
    assert ablation.main([*flags, "--variants", "descent", "--out", str(whole)]) == 0

    def interrupted(*arguments):
        yield next(prune_model(*arguments))
        raise KeyboardInterrupt

    prune_model = ablation.prune_model
    with monkeypatch.context() as patch:
        patch.setattr(ablation, "prune_model", interrupted)
        more = ["--resume", "--out", str(parts)]
        assert ablation.main([*flags, "--variants", "windows_8", *more]) == 130
    assert ablation.main([*flags, "--variants", "descent", *more]) == 0
    ours, theirs = (pd.read_csv(out / "metrics.csv")["divergence"] for out in (parts, whole))
    pd.testing.assert_series_equal(ours, theirs)


def rows(variants, seeds):
    """Made-up metrics."""
    numbers = dict.fromkeys(
        ("calibration_error", "divergence", "perplexity_gap", "heldout_error"), 1
    )
    return pd.DataFrame(
        [
            {"variant": variant, "sparsity": sparsity, "seed": seed} | numbers | {"divergence": x}
            for sparsity in ("0.7", "2:4")
            for variant in variants
            for seed, x in zip(range(seeds[variant]), (0.5, 0.25), strict=False)
        ]
    )


@pytest.mark.parametrize("seeds", [{"magnitude": 1}, {"descent": 1, "wanda": 1}, {"descent": 2}])
def test_half_the_range_is_shown_where_there_are_several_seeds(script, seeds):
    table = script("ablation").table(rows(list(seeds), seeds))
    several = 2 in seeds.values()
    assert list(table["KL divergence (nats)"].unique()) == (
        ["0.3750 ± 0.1250"] if several else ["0.5000"]
    )
    assert list(table["held-out attention error"].unique()) == (
        ["1.0000 ± 0.0000"] if several else ["1.0000"]
    )
    assert len(table) == 2 * len(seeds)


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        ("variant", "magic", "variant magic, not a word of this script"),
        ("divergence", "much", "divergence much, not a finite number"),
        ("sparsity", None, "sparsity nan"),
        ("seed", None, "seed nan, not a finite number"),
    ],
)
def test_damaged_metrics_are_not_drawn(main, tmp_path, capsys, column, value, named):
    damaged = rows(["wanda", "magnitude"], {"wanda": 1, "magnitude": 1}).astype(object)
    damaged.loc[0, column] = value
    damaged.to_csv(tmp_path / "metrics.csv", index=False)
    assert main(["--redraw", "--out", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert named in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--variants", "descnt"], "--variants descnt"),
        (["--sparsity", "1.5"], "--sparsity"),
        (["--seeds", "0"], "--seeds"),
        (["--sparsity", "3:5"], "--sparsity"),
        (["--steps", "0"], "--steps"),
        (["--variants", "slow_schedule"], "--variants slow_schedule: only with --start dense"),
        (["--variants", "curvature_diagonal"], "only with --targets all"),
        (["--targets", "all", "--variants", "mask_only"], "only with --targets qk"),
        (["--variants", "windows_16"], "only with --windows 16 or more"),
    ],
)
def test_wrong_flags_are_named_before_any_work(main, where, tmp_path, capsys, flags, named):
    out = tmp_path / "run"
    assert main([*where, *TOY, *flags, "--out", str(out)]) == 2
    assert named in capsys.readouterr().err
    assert not out.exists()


def test_evaluation_needs_text_that_was_not_calibrated_on(main, where, tmp_path, capsys):
    flags = ["--windows", "150", "--seqlen", "16", "--out", str(tmp_path / "run")]
    assert main([*where, *flags]) == 2
    assert "nothing is left after 166 windows; use another --text" in capsys.readouterr().err


def test_every_variant_has_settings_that_work(ablation):
    seen = set()
    for targets in ("qk", "all"):
        for start in ("gauss-newton", "dense"):
            config = ablation.Config(targets=targets, start=start, sparsity=("0.5", "2:4"))
            config.check()
            for cell in ablation.plan(config):
                ablation.settings_of(*cell, config).check_names()
                seen.add(cell[0])
    assert seen == set(ablation.VARIANTS)


def test_baselines_have_no_chance_and_patterns_no_budget(ablation):
    config = ablation.Config(variants=("wanda", "admm", "closed_form", "model_budget"))
    assert ablation.plan(config) == [
        *(("wanda", "0.7", 0), ("admm", "0.7", 0), ("closed_form", "0.7", 0)),
        *(("closed_form", "0.7", 1), ("model_budget", "0.7", 0), ("model_budget", "0.7", 1)),
        *(("wanda", "2:4", 0), ("admm", "2:4", 0), ("closed_form", "2:4", 0)),
        ("closed_form", "2:4", 1),
    ]


def test_other_masks_have_the_same_retraining(ablation):
    config = ablation.Config(targets="all")
    names = ("distillation", "wanda_retrained", "sparsegpt_retrained", "admm_retrained")
    found = [ablation.settings_of(name, "0.5", 0, config) for name in names]
    assert {(each.refits, each.distill, each.steps) for each in found} == {(True, 300, None)}
    assert [each.first for each in found] == ["gauss-newton", "wanda", "sparsegpt", "admm"]
    config = replace(config, variants=names, sparsity=("0.5",))
    assert [seed for _, _, seed in ablation.plan(config)] == [0, 1] * 4


@pytest.mark.parametrize(("steps", "again_as"), [(1200, None), (400, 400)])
def test_a_run_of_version_01_goes_on_as_it_was_and_is_drawn(ablation, steps, again_as, tmp_path):
    saved = ablation.Path(__file__).parents[2] / "docs" / "stories260K"
    record = read_json(saved / "config.json") | {"steps": steps}
    here = ablation.Config(variants=tuple(record["variants"]), sparsity=tuple(record["sparsity"]))
    again = as_recorded(here, record)
    assert (again.start, again.targets) == ("dense", "qk")
    assert again.steps == again_as
    settings = ablation.settings_of("descent", "0.5", 0, again)
    assert settings.gradual
    (tmp_path / "figures").mkdir()
    metrics = read_metrics(saved, ablation.COLUMNS)
    shown = ablation.report(metrics, tmp_path, tmp_path / "figures")
    assert shown.count("preset descent") == 3
    assert len(list((tmp_path / "figures").iterdir())) == 2


def test_the_default_variants_of_version_01_stay(ablation):
    record = {"variants": list(ablation._EARLIER), "steps": 400, "seeds": 2}
    again = as_recorded(ablation.Config(), record)
    assert again.chosen == list(ablation._EARLIER)
    again.check()
