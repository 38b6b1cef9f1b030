"""The README's table from metrics."""

import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

from jaxprune.errors import InputError
from jaxprune.runs.flags import parse_flags


@pytest.fixture
def headline(script):
    return script("headline")


@pytest.fixture
def run(headline, tmp_path):
    """A finished run of ablation.py with made-up numbers."""
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [
        {
            "variant": name,
            "sparsity": sparsity,
            "seed": seed,
            "calibration_error": 0.25,
            "heldout_error": 0.5 + 0.1 * seed,
            "divergence": 0.125,
            "perplexity_gap": 1.0 + seed,
            "seconds": 3.0,
            "dense_perplexity": 20.0,
        }
        for sparsity in ("0.5", "2:4")
        for name in headline.METHODS
        for seed in range(2 if name in ("descent", "mask_only") else 1)
    ]
    pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)
    settings = {"model": "zoo", "calibration": "zoo", "text": None, "windows": 7, "seqlen": 9}
    (folder / "config.json").write_text(json.dumps(settings | {"steps": 5, "seeds": 2}))
    (folder / "environment.json").write_text("{}")
    return folder


@pytest.fixture
def ends(headline):
    """The markers of a folder named saved."""
    return headline.markers("saved")


def flags(run, readme, saved):
    return ["--run", str(run), "--page", str(readme), "--saved", str(saved), "--write"]


def test_the_table_goes_between_the_markers_and_can_be_made_again(headline, run, tmp_path, ends):
    readme, saved = tmp_path / "README.md", tmp_path / "saved"
    readme.write_text("before\n{}\nold\n{}\nafter\n".format(*ends))
    assert headline.main(flags(run, readme, saved)) == 0
    page = readme.read_text()
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "old" not in page
    lines = [[c.strip() for c in line.split("|")] for line in page.splitlines() if "|" in line]
    found = {(row[1], row[2]): row[3:7] for row in lines[2:]}
    assert len(found) == 2 * len(headline.METHODS)
    assert found["0.5", "Wanda"] == ["21.00", "0.125", "0.500", "0.250"]
    assert found["2:4", "**descent**"] == [
        *("21.50 ± 0.50", "0.125 ± 0.000"),
        *("0.550 ± 0.050", "0.250 ± 0.000"),
    ]
    assert headline.main(flags(saved, readme, saved)) == 0
    assert readme.read_text() == page


def test_what_does_not_fit_is_one_line(headline, run, tmp_path, capsys, ends):
    readme, saved = tmp_path / "README.md", tmp_path / "saved"
    assert headline.main(flags(run, readme, saved)) == 2
    for markers in ("{1}{0}", "{0}{0}{1}", "{0}{1}{1}", "no markers"):
        readme.write_text(markers.format(*ends))
        assert headline.main(flags(run, readme, saved)) == 2
    metrics = pd.read_csv(run / "metrics.csv")
    metrics[metrics["variant"] != "wanda"].to_csv(run / "metrics.csv", index=False)
    assert headline.main(flags(run, readme, saved)) == 2
    assert readme.read_text() == "no markers"
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("error: ")[2][:8] for line in lines] == [
        *["--page /"] * 5,
        "--run: n",
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        *(({name: ...}, f"{name} missing or damaged") for name in ("text", "model", "seeds")),
        ({"text": 3}, "text missing or damaged"),
        ({"steps": "5"}, "steps missing or damaged"),
    ],
)
def test_settings_of_another_script_are_one_line(headline, run, tmp_path, capsys, change, named):
    file = run / "config.json"
    changed = json.loads(file.read_text()) | change
    file.write_text(json.dumps({k: v for k, v in changed.items() if v is not ...}))
    assert headline.main(["--run", str(run)]) == 2
    shown = capsys.readouterr()
    assert f"{file}: {named}" in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_variants_that_are_more_than_methods_are_all_shown(headline, run):
    metrics = pd.read_csv(run / "metrics.csv")
    metrics = metrics[metrics["sparsity"] == "2:4"].assign(peak_memory=1.25)
    metrics["description"] = "in words: " + metrics["variant"]
    changed = metrics[metrics["variant"] == "descent"].assign(variant="steps_25", description="few")
    changed = changed.assign(divergence=[0.05, 0.15], seconds=[40, 50], peak_memory=[2.0, 3.0])
    pd.concat([metrics, changed]).to_csv(run / "metrics.csv", index=False)
    header, _, first, *others = cells_of(headline.table_of(run).partition("\n\n")[0])
    assert header[:4] == ["sparsity", "variant", "perplexity", "KL divergence"]
    assert first[:4] == ["2:4", "few", "21.50 ± 0.50", "0.100 ± 0.050"]
    assert first[-2:] == ["45", "3.0"]
    assert [line[1] for line in others] == [f"in words: {name}" for name in headline.METHODS]
    assert "of 9 tokens of `zoo`" in headline.table_of(run)


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        ("perplexity_gap", "much", "perplexity_gap much, not a finite number"),
        ("variant", "other", "no rows of wanda at sparsity 0.5"),
        ("sparsity", "0.7", "no rows of wanda at sparsity 0.5"),
    ],
)
def test_damaged_metrics_are_one_line(headline, run, tmp_path, capsys, column, value, named):
    metrics = pd.read_csv(run / "metrics.csv").astype(object)
    metrics.loc[1, column] = value  # of Wanda
    metrics.to_csv(run / "metrics.csv", index=False)
    assert headline.main(["--run", str(run)]) == 2
    shown = capsys.readouterr().err
    assert named in shown
    assert shown.count("\n") == 1


def test_files_that_cannot_be_copied_or_read_are_one_line(headline, run, tmp_path, capsys, ends):
    readme, saved = tmp_path / "README.md", tmp_path / "saved"
    readme.write_bytes(b"\xff\xfe")
    assert headline.main(flags(run, readme, saved)) == 2
    readme.write_text("\n".join(ends))
    (run / "environment.json").unlink()
    assert headline.main(flags(run, readme, saved)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.rpartition(": ")[2] for line in errors] == [
        "not text in UTF-8",
        "no such file",
    ]
    assert "environment.json" in errors[1]
    assert not saved.exists()


ROOT = Path(__file__).parents[2]
MARKER = r"<!-- ([\w.-]+): written by tools/headline\.py *(.*?) *-->"
WRITTEN = [
    pytest.param(page, *found, id=f"{page.name}-{found[0]}")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for found in re.findall(
        r"<!-- ([\w.-]+): written by tools/headline\.py *(.*?) *-->", page.read_text()
    )
]


@pytest.mark.parametrize(("page", "name", "options"), WRITTEN)
def test_pages_have_the_tables_of_their_metrics(headline, page, name, options):
    """What is printed is what the saved metrics say."""
    chosen = parse_flags(headline.Config, shlex.split(options), "headline.py")
    table = headline.table_of(ROOT / "docs" / name, chosen.rows, brief=chosen.brief)
    text = page.read_text()
    assert headline.replaced(text, table, name, page, options) == text


def test_metrics_of_another_program_are_shown_as_they_are(headline, tmp_path):
    (tmp_path / "metrics.csv").write_text("model,accuracy\ndense,0.50\n")
    shown = headline.table_of(tmp_path)
    assert [line.split() for line in shown.splitlines()[::2]] == [
        ["|", "model", "|", "accuracy", "|"],
        ["|", "dense", "|", "0.5", "|"],
    ]


def cells_of(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def saved_run(folder, file, rows):
    """What tables are written from, of one of the paper's experiments."""
    folder.mkdir()
    pd.DataFrame(rows).to_csv(folder / file, index=False)
    for name in ("config.json", "environment.json"):
        (folder / name).write_text("{}")
    return folder


def test_figure_2_is_written_from_the_summary(headline, tmp_path):
    errors = {"calibration": 0.0123, "calibration_se": 0.0045, "heldout": 1.5, "heldout_se": 0.25}
    at = [
        {"setting": "soft", "exponent": 0.0, "k": 4},
        {"setting": "correlated", "exponent": 1.0, "k": 8},
    ]
    rows = [{**where, **errors, "method": m} for where in at for m in ("algorithm1", "wanda")]
    rows[-1] |= {"heldout": 0.2, "heldout_se": 0.0}
    run, page = saved_run(tmp_path / "synthetic", "summary.csv", rows), tmp_path / "results.md"
    header, _, first, second = cells_of(headline.table_of(run))
    assert header == ["method", "`soft`, k = 4", "`correlated`, exponent 1, k = 8"]
    assert first == ["Algorithm 1", *["0.0123 ± 0.0045 / 1.50 ± 0.25"] * 2]
    assert second[0] == "Wanda on `W_Q`, `W_K`"
    assert second[2] == "0.0123 ± 0.0045 / 0.200 ± 0.000"
    page.write_text("{}\n{}\n".format(*headline.markers("synthetic")))
    saved = tmp_path / "docs" / "synthetic"
    assert headline.main(flags(run, page, saved)) == 0
    assert {f.name for f in saved.iterdir()} == {"summary.csv", "config.json", "environment.json"}
    assert "1.50 ± 0.25" in page.read_text()


def test_figure_3_is_written_from_the_summary(headline, tmp_path):
    rows = [
        {"method": "wanda", "ratio": 0.7, "heldout": 0.5},
        {"method": "wanda", "ratio": 0.5, "heldout": 0.25},
        {"method": "gauss_newton", "ratio": 0.7, "heldout": 0.0123},
    ]
    rows = [row | {"heldout_p10": 0.01, "heldout_p90": 2.5} for row in rows]
    header, _, *lines = cells_of(headline.table_of(saved_run(tmp_path / "h", "summary.csv", rows)))
    assert header == ["method", "0.5", "0.7"]
    assert lines == [
        ["Wanda on `W_Q`, `W_K`", "0.25 (0.01–2.5)", "0.5 (0.01–2.5)"],
        ["Gauss-Newton, closed form", "", "0.012 (0.01–2.5)"],
    ]


def test_fused_perplexities_are_written_from_the_metrics(headline, tmp_path):
    rows = [
        {"method": "dense", "ratio": 0.0, "perplexity": 6.614},
        {"method": "algorithm1_rope", "ratio": 0.5, "perplexity": 7.018},
    ]
    rows = [row | {"corpus": "text"} for row in rows]
    run = saved_run(tmp_path / "fused", "metrics.csv", rows)
    assert cells_of(headline.table_of(run))[2:] == [
        ["dense", "6.61", ""],
        ["Algorithm 1, on the logits with RoPE", "", "7.02"],
    ]
    with pytest.raises(InputError, match="brief: only of a run of real"):
        headline.table_of(run, brief=True)


def test_regimes_are_written_with_the_ends_of_each_ratio(headline, tmp_path):
    at = {"data": "isotropic", "tokens_per_entry": 0.125, "heldout": 1.04}
    rows = [
        at | {"logits_std": std, "gap": gap, "calibration": 0.123, "closed_form": closed}
        for std, gap, closed in ((1.0, 24.4, 0.5), (2.0, 0.9375, 0.25), (4.0, 3.0, 2.0))
    ]
    rows.append(rows[0] | {"data": "real heads"})
    header, _, *lines = cells_of(headline.table_of(saved_run(tmp_path / "r", "summary.csv", rows)))
    assert len(header) == 6
    assert lines == [
        ["isotropic", "0.125", "0.94 to 24", "0.12 to 0.12", "1 to 1", "0.25 to 2"],
        ["real heads", "0.125", "24 to 24", "0.12 to 0.12", "1 to 1", "0.5 to 0.5"],
    ]


def test_equal_storage_shows_where_a_fused_mask_removes_more(headline, tmp_path):
    row = {"setting": "unit_variance", "exponent": 0.0, "k": 16, "stored_weights": 1024}
    row |= {"separate_ratio": 0.5, "fused_ratio": 0.75, "algorithm1": 1.25, "wanda": 0.83123}
    other = row | {"setting": "correlated", "exponent": 2.0, "wanda": 1.5}
    rows = [row, other, row | {"fused_ratio": 0.25}]
    run = saved_run(tmp_path / "synthetic", "equal_storage.csv", rows)
    header, _, *lines = cells_of(headline.table_of(run))
    assert header[4:] == ["Algorithm 1", "Wanda on `W_Q`, `W_K`"]
    assert lines == [
        ["`unit_variance`", "1024", "0.5", "0.75", "1.25", "**0.831**"],
        ["`correlated`, exponent 2", "1024", "0.5", "0.75", "**1.25**", "1.5"],
    ]


def test_another_file_of_a_run_is_shown_and_kept_where_it_is_asked_for(headline, tmp_path):
    run = saved_run(tmp_path / "run", "metrics.csv", [{"a": 1}])
    pd.DataFrame([{"b": 2}]).to_csv(run / "other.csv", index=False)
    assert cells_of(headline.table_of(run, record="other.csv"))[0] == ["b"]
    page, saved = tmp_path / "page.md", tmp_path / "docs" / "other"
    page.write_text("{}\n{}\n".format(*headline.markers("other")))
    assert headline.main([*flags(run, page, saved), "--record", "other.csv"]) == 0
    assert (saved / "other.csv").is_file()
    assert not (saved / "metrics.csv").exists()


def test_the_pages_with_tables_are_these():
    assert {page.values[0].name for page in WRITTEN} == {"README.md", "results.md", "choosing.md"}


@pytest.fixture
def real_run(headline, tmp_path):
    """A finished run of real.py with made-up numbers."""
    folder = tmp_path / "smollm2"
    folder.mkdir()
    numbers = dict.fromkeys(headline.rows.COLUMNS.sparse, 0.5) | {"resumed": 0}
    labels = {"targets": "qk", "sparsity": "0.5", "allocate": "matrix", "refit": 0, "distill": 0}
    rows = [{**labels, "row": "none-0-dense", "method": "dense", "seed": 0, "perplexity": 20.0}]
    rows += [
        {**labels, **numbers, "row": f"qk-0.5-{m}", "method": m, "seed": 0, "perplexity": p}
        for m, p in (("wanda", 24.0), ("gauss-newton", 21.0))
    ]
    pd.DataFrame(rows).assign(divergence=0.25).to_csv(folder / "metrics.csv", index=False)
    settings = {"model": "smollm2", "calibration": "zoo", "text": None, "windows": 7, "seqlen": 9}
    settings |= {"steps": None, "seeds": 1, "heldout": 3, "eval_windows": 5, "eval_seqlen": 11}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "environment.json").write_text('{"cpu_count": 2, "device": "cpu"}')
    return folder


def test_a_run_of_real_is_printed_and_written_when_asked(headline, real_run, tmp_path, capsys):
    page, saved = tmp_path / "results.md", tmp_path / "docs" / "smollm2"
    page.write_text("{}\n{}\n".format(*headline.markers("smollm2")))
    before = page.read_text()
    more = ["--page", str(page), "--saved", str(saved), "--rows", "*-wanda"]
    assert headline.main(["--run", str(real_run), *more]) == 0
    assert (page.read_text(), saved.exists()) == (before, False)
    shown = capsys.readouterr().out
    assert "| Wanda " in shown
    assert "closed form" not in shown
    assert "| dense " in shown
    assert headline.main(["--run", str(real_run), *more[:4], "--write"]) == 0
    assert "**1.00**" in page.read_text()
    assert {f.name for f in saved.iterdir()} == {"metrics.csv", "config.json", "environment.json"}


def test_a_brief_table_has_few_columns_and_says_so_in_its_marker(headline, real_run, tmp_path):
    page, saved = tmp_path / "results.md", tmp_path / "docs" / "smollm2"
    page.write_text("{}\n{}\n".format(*headline.markers("smollm2", "--rows '*-x'")))
    more = ["--page", str(page), "--saved", str(saved), "--rows", "*-wanda", "--brief", "--write"]
    assert headline.main(["--run", str(real_run), *more]) == 0
    written = page.read_text()
    assert written.startswith("<!-- smollm2: written by tools/headline.py --rows '*-wanda' --brief")
    heads = [cell.strip() for cell in written.splitlines()[1].split("|")[1:-1]]
    assert heads[:2] == ["sparsity", "method"]
    assert heads[2:] == ["perplexity", "above dense", "KL divergence (nats)", "seconds"]


def test_rows_of_several_seeds_say_so(headline, real_run):
    assert "seeds" not in headline.table_of(real_run)
    metrics = pd.read_csv(real_run / "metrics.csv")
    again = metrics.iloc[2:].assign(seed=1, perplexity=22.0)
    pd.concat([metrics, again]).to_csv(real_run / "metrics.csv", index=False)
    for brief in (True, False):
        shown = headline.table_of(real_run, brief=brief)
        assert "21.50 ± 0.50" in shown
        assert "half the range of 2 seeds" in shown


def test_budgets_and_retraining_are_shown_where_there_are_some(headline, real_run):
    metrics = pd.read_csv(real_run / "metrics.csv")
    metrics.loc[2, ["allocate", "refit", "distill"]] = ["model", 1, 30]
    metrics.to_csv(real_run / "metrics.csv", index=False)
    header, *_, wanda, closed = cells_of(headline.table_of(real_run).partition("\n\n")[0])
    assert header[:4] == ["sparsity", "method", "budget", "retraining"]
    assert wanda[1:4] == ["Wanda", "matrix", ""]
    assert closed[1:4] == ["closed form", "model", "blocks, 30 steps of distillation"]


def test_rows_that_are_not_there_are_one_line(headline, real_run, run, capsys):
    for folder, named in ((real_run, "--rows x: no such row"), (run, "--rows: only of a run of")):
        assert headline.main(["--run", str(folder), "--rows", "x"]) == 2
        assert named in capsys.readouterr().err
    (real_run / "config.json").write_text("{}")
    assert headline.main(["--run", str(real_run)]) == 2
    assert "model missing or damaged" in capsys.readouterr().err
