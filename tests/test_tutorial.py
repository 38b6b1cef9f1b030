"""The tutorial runs from its first cell to its last, at toy size."""

import runpy
from pathlib import Path

import numpy as np
import pytest

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.py"
FIGURES = ("attention", "masks", "convergence", "overfit")


@pytest.mark.slow
def test_it_runs_and_shows_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXPRUNE_TOY", "1")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(TUTORIAL))
    for name in FIGURES:
        assert (tmp_path / "runs" / "tutorial" / f"{name}.png").stat().st_size > 3000
    assert not (tmp_path / "runs" / "tutorial" / "work").exists()
    assert names["paper"].keep_mask.sum() == names["descent"].keep_mask.sum() == 128 * 64
    assert names["layer"].keep_q.mean() == 0.5
    assert np.isfinite([*names["found_perplexity"].values(), names["dense"]]).all()
    assert names["checked"].applicable
    assert "Theorem 5.2" in capsys.readouterr().out


def test_every_cell_of_code_follows_one_of_text():
    cells = TUTORIAL.read_text().split("\n# %%")[1:]
    assert [cell.startswith(" [markdown]") for cell in cells] == [True, False] * (len(cells) // 2)
