"""The tutorial runs from its first cell to its last, at toy size."""

import ast
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.py"
NOTEBOOK = TUTORIAL.with_suffix(".ipynb")
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


def cells():
    """Kind and content of every cell of the script."""
    for text in re.split(r"^# %%", TUTORIAL.read_text(), flags=re.MULTILINE)[1:]:
        head, _, body = text.partition("\n")
        body = body.strip("\n")
        if head != " [markdown]":
            yield "code", body
        elif body.startswith('"""'):
            yield "markdown", ast.literal_eval(body).strip("\n")
        else:
            yield "markdown", "\n".join(line.removeprefix("#")[1:] for line in body.split("\n"))


def test_the_notebook_has_the_cells_of_the_script():
    """`make notebook` writes it anew."""
    notebook = json.loads(NOTEBOOK.read_text())
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert found == list(cells())


def test_the_notebook_was_run_from_its_first_cell_to_its_last():
    notebook = json.loads(NOTEBOOK.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == len(FIGURES)
    for output in outputs:
        assert output["output_type"] in ("stream", "execute_result", "display_data")
        assert output.get("name") != "stderr"
        text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
        assert not re.search(r"(?<![\w.])/\w+/", text), text
    assert NOTEBOOK.stat().st_size < 2**20
