"""experiments/llama_heads.py: pairing of heads, what it writes, what it refuses."""

import io
import json
import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import reference

from jaxprune.evaluation.comparison import METHODS, ON_PROJECTIONS
from jaxprune.evaluation.heads import from_model, read_layer
from jaxprune.runs.configuration import as_recorded
from jaxprune.runs.flags import parse_flags
from jaxprune.runs.folder import RunFolder

COLUMNS = ["layer", "head", "method", "ratio"]
COLUMNS += ["calibration_error", "heldout_error", "stored_weights", "lam"]
FLAGS = ["--ratios", "0.25", "0.5", "--steps", "4", "--batch-size", "2"]
D, WIDTH = 8, 4


@pytest.fixture(scope="module")
def heads(script):
    return script("llama_heads")


def arrays():
    """Four query heads, two key heads."""
    random = np.random.default_rng(0)
    return {
        "x": random.normal(size=(4, 8, D)).astype(np.float16),
        "x_heldout": random.normal(size=(2, 6, D)).astype(np.float16),
        "wq": random.normal(size=(D, 4, WIDTH)),
        "wk": random.normal(size=(D, 2, WIDTH)),
    }


@pytest.fixture
def layer(tmp_path):
    """`layer(wq=...)` is the path of an .npz; `None` leaves an array out."""

    def save(**changes):
        path = tmp_path / "layer.npz"
        content = arrays() | changes
        np.savez(path, **{name: a for name, a in content.items() if a is not None})
        return path

    return save


@pytest.fixture(scope="module")
def finished(heads, tmp_path_factory):
    """Input and folder of a whole run."""
    folder = tmp_path_factory.mktemp("heads")
    np.savez(folder / "layer.npz", **arrays())
    arguments = ["--input", str(folder / "layer.npz"), "--out", str(folder / "whole")]
    assert heads.main([*FLAGS, "--head-batch", "2", *arguments]) == 0
    return folder


def test_query_heads_are_paired_with_the_key_head_they_share(heads, layer):
    problems = read_layer(layer())
    data = arrays()
    for head in range(4):
        shared = data["wk"][:, head // 2]
        fused = data["wq"][:, head] @ shared.T / np.sqrt(WIDTH)
        np.testing.assert_allclose(problems.w[head], fused, rtol=1e-5, atol=1e-6)
    assert problems.x.shape == (4, 8, D)
    assert problems.x_heldout.shape == (2, 6, D)


def test_without_heldout_sequences_the_last_quarter_is_held_out(heads, layer, capsys):
    problems = read_layer(layer(x_heldout=None))
    x = arrays()["x"].astype(np.float32)
    assert (problems.x == x[:3]).all()
    assert (problems.x_heldout == x[3:]).all()
    assert "the last 1 of 4 sequences" in capsys.readouterr().out


def test_single_sequences_need_no_leading_axis(heads, layer):
    problems = read_layer(layer(x=arrays()["x"][0], x_heldout=arrays()["x"][1]))
    assert problems.x.shape == problems.x_heldout.shape == (1, 8, D)


def test_every_head_method_and_ratio_has_a_row_in_the_documented_columns(finished):
    metrics = pd.read_csv(finished / "whole" / "metrics.csv")
    assert list(metrics.columns) == COLUMNS
    # One matrix of 8 x 8 stores what two of 8 x 4 do: no further ratio for equal storage.
    assert len(metrics) == 4 * 2 * (len(METHODS) + 1)
    assert not metrics.duplicated(["head", "method", "ratio"]).any()
    assert set(metrics["head"]) == set(range(4))
    errors = metrics[["calibration_error", "heldout_error"]]
    assert ((errors > 0) & (errors < 2.1)).all(axis=None)
    separate = metrics["method"].isin(["wanda", "sparsegpt"])
    dense = np.where(separate, 2 * D * WIDTH, D * D)
    assert (metrics["stored_weights"] == dense * (1 - metrics["ratio"])).all()
    assert (metrics["lam"].notna() == (metrics["method"] == "algorithm1")).all()


def keep_masks(out):
    masks = {}
    for path in sorted(out.glob("keep_masks-layer*.npz")):
        with np.load(path, allow_pickle=False) as file:
            masks |= {name: file[name] for name in file.files}
    return masks


def test_keep_masks_reproduce_the_errors(heads, finished):
    """Fused magnitude and Wanda leave kept weights alone, so masks and weights tell all."""
    problems = read_layer(finished / "layer.npz")
    metrics = pd.read_csv(finished / "whole" / "metrics.csv").set_index(["method", "ratio", "head"])
    masks = keep_masks(finished / "whole")
    assert len(masks) == 4 * 2 * (len(METHODS) + 1 + len(ON_PROJECTIONS)), (
        "two masks where both are pruned"
    )
    q, k = (masks[f"wanda-0.5-layer0-head3-{side}"] for side in ("wq", "wk"))
    w = (problems.wq[3] * q) @ (problems.wk[3] * k).T
    fused = problems.w[3] * masks["fused_magnitude-0.25-layer0-head3-w"]
    np.testing.assert_allclose(
        relative_error(problems.x_heldout, problems.w[3], w),
        metrics.loc[("wanda", 0.5, 3), "heldout_error"],
        rtol=1e-4,
    )
    np.testing.assert_allclose(
        relative_error(problems.x_heldout, problems.w[3], fused),
        metrics.loc[("fused_magnitude", 0.25, 3), "heldout_error"],
        rtol=1e-4,
    )


def relative_error(x, w, pruned):
    pairs = [(reference.attention(s, pruned), reference.attention(s, w)) for s in x]
    return sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)


def test_figure_table_and_settings_are_there(finished):
    out = finished / "whole"
    assert sorted(f.name for f in (out / "figures").iterdir()) == [
        f"{name}.{form}" for name in ("figure1", "figure3", "heads") for form in ("png", "svg")
    ]
    assert "heldout_worst" in (out / "tables.md").read_text()
    config = json.loads((out / "config.json").read_text())
    assert config["ratios"] == [0.25, 0.5]
    assert config["head_batch"] == 2
    assert (out / "environment.json").exists()


def test_a_run_of_version_0_1_goes_on_with_its_methods(heads):
    then = ("algorithm1", "wanda", "sparsegpt", "fused_magnitude", "ranking", "descent")
    assert as_recorded(heads.Config(), {"methods": list(then)}).methods == then
    assert as_recorded(heads.Config(), {"methods": None}).methods is None


def of_shape(heads, layers, count, d, n):
    """Layers of that many heads, of which only the sizes are known."""
    return heads.Layers(tuple(range(layers)), count, d, 64, n, 1, iter, {})


def test_heads_go_together_as_when_the_run_began(heads, tmp_path, monkeypatch):
    source = of_shape(heads, 2, 8, 64, 16)
    config = heads.Config(methods=("wanda", "descent"))
    for free, expected in ((3, 3), (1, 3)):
        monkeypatch.setattr(heads, "fitting_heads", lambda source, ratios, free=free: free)
        with RunFolder(tmp_path / "run", config, resume=True) as run:
            assert heads.heads_together(run, config, source, "wanda") == expected
            parts = heads.plan(config, source, 1, "wanda", expected)
            assert [part.heads for part in parts] == [range(3), range(3, 6), range(6, 8)]
            run.part(parts[0].name, list)
    with RunFolder(tmp_path / "run", config, resume=True) as run:
        assert heads.heads_together(run, config, source, "descent") == 1
    given = replace(config, devices=replace(config.devices, head_batch=2))
    assert heads.heads_together(run, given, source, "wanda") == 2


def test_algorithm_1_is_left_out_where_it_takes_hours_unless_asked_for(heads, capsys):
    small, large = of_shape(heads, 6, 4, 128, 256), of_shape(heads, 16, 32, 2048, 256)
    assert heads.with_methods(heads.Config(), small).chosen == heads.SHOWN
    assert capsys.readouterr().err == ""
    left = heads.with_methods(heads.Config(), large).chosen
    assert left == tuple(method for method in heads.SHOWN if method != "algorithm1")
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "note: algorithm1 is left out, it would take about 96 hours on a CPU core; " in shown
    asked = shown.split("; ")[1].split(" asks for it")[0].split()
    config = parse_flags(heads.Config, asked, "heads")
    assert heads.with_methods(config, large).chosen == heads.SHOWN
    assert heads.with_methods(heads.Config(steps=1), large).chosen == left
    assert heads.with_methods(heads.Config(steps=1), of_shape(heads, 1, 2, 2048, 256)).chosen == (
        heads.SHOWN
    )


def test_the_hours_of_algorithm_1_are_those_measured(heads):
    """Two layers of Llama-3.2-1B's shape with windows of 128 took 0.16 s an update and head."""
    source, updates = of_shape(heads, 2, 32, 2048, 128), 20 * 60 + 3 * 300
    hours = heads.hours_of_algorithm1(heads.Config(), source)
    np.testing.assert_allclose(hours, 0.16 * updates * 64 / 3600, rtol=0.1)


def test_the_model_is_zoo_unless_there_is_an_input(heads, layer, monkeypatch):
    asked = []
    monkeypatch.setattr(heads, "from_model", lambda model, *_, **__: asked.append(model) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        heads.Config().source()
    assert asked == ["zoo"]
    config = heads.Config(data=heads.Data(input=layer()))
    config.check()
    assert config.source().heads == 4


def test_the_summary_names_the_worst_head(finished):
    metrics = pd.read_csv(finished / "whole" / "metrics.csv")
    table = pd.read_csv(finished / "whole" / "summary.csv").set_index(["method", "ratio"])
    here = metrics[(metrics["method"] == "descent") & (metrics["ratio"] == 0.5)]
    worst = here.sort_values("heldout_error").iloc[-1]
    row = table.loc[("descent", 0.5)]
    np.testing.assert_allclose(row["heldout"], here["heldout_error"].mean())
    assert (row["worst_head"], row["heads"]) == (worst["head"], 4)
    np.testing.assert_allclose(row["heldout_worst"], worst["heldout_error"])


@pytest.mark.slow
def test_how_many_heads_go_together_does_not_matter(heads, finished, tmp_path):
    arguments = ["--input", str(finished / "layer.npz"), "--out", str(tmp_path / "run")]
    flags = [*FLAGS, "--methods", "wanda", "fused_magnitude", "--head-batch", "4"]
    assert heads.main([*flags, *arguments]) == 0
    point = ["head", "method", "ratio"]
    whole, other = (
        pd.read_csv(out / "metrics.csv").set_index(point).sort_index()
        for out in (finished / "whole", tmp_path / "run")
    )
    np.testing.assert_allclose(
        other["heldout_error"], whole.loc[other.index, "heldout_error"], rtol=1e-4
    )


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_identical_files(
    heads, finished, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "halved"
    real, calls = heads.write_arrays, []

    def interrupt(*arguments, **content):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(*arguments, **content)

    monkeypatch.setattr(heads, "write_arrays", interrupt)
    arguments = [*FLAGS, "--head-batch", "2", "--input", str(finished / "layer.npz")]
    arguments += ["--out", str(out)]
    assert heads.main(arguments) == 130
    assert "--resume continues" in capsys.readouterr().err.splitlines()[-1]
    assert len(list((out / "parts").glob("*.json"))) == 6
    assert not (out / "metrics.csv").exists()
    assert heads.main([*arguments, "--resume"]) == 0
    whole = finished / "whole"
    assert (out / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    masks, expected = keep_masks(out), keep_masks(whole)
    assert masks.keys() == expected.keys()
    assert all((masks[name] == expected[name]).all() for name in masks)


@pytest.mark.slow
def test_redraw_needs_the_metrics_only(heads, finished, tmp_path):
    metrics = finished / "whole" / "metrics.csv"
    (tmp_path / "metrics.csv").write_bytes(metrics.read_bytes())
    assert heads.main(["--redraw", "--out", str(tmp_path)]) == 0
    for name in ("figures/heads.svg", "figures/figure3.svg", "tables.md", "summary.csv"):
        assert (tmp_path / name).read_bytes() == (finished / "whole" / name).read_bytes()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat. a dog saw it and ran. " * 40)
    return path


@pytest.mark.slow
def test_layers_of_a_model_are_those_of_its_blocks(heads, checkpoint, text, tmp_path):
    """A file with one layer's arrays gives the same rows."""
    model = checkpoint("llama3")
    out = tmp_path / "run"
    flags = ["--methods", "wanda", "fused_magnitude", "--ratios", "0.5", "--windows", "4"]
    flags += ["--seqlen", "12", "--heldout", "2"]
    arguments = ["--model", str(model), "--calibration", str(text), "--out", str(out)]
    assert heads.main([*flags, *arguments, "--layers", "1"]) == 0
    metrics = pd.read_csv(out / "metrics.csv")
    config = json.loads((model / "config.json").read_text())
    query_heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    assert set(metrics["layer"]) == {1}
    assert set(metrics["head"]) == set(range(query_heads))
    source = from_model(str(model), str(text), windows=4, seqlen=12, heldout=2, layers=[1])
    ((index, problems),) = source.read()
    assert index == 1
    width = problems.wq.shape[-1]
    np.savez(
        tmp_path / "layer.npz",
        x=problems.x,
        x_heldout=problems.x_heldout,
        wq=np.sqrt(width) * np.asarray(problems.wq).transpose(1, 0, 2),
        wk=np.asarray(problems.wk)[:: query_heads // kv_heads].transpose(1, 0, 2),
    )
    other = tmp_path / "other"
    arguments = ["--input", str(tmp_path / "layer.npz"), "--out", str(other)]
    assert heads.main([*flags[:5], *arguments]) == 0
    again = pd.read_csv(other / "metrics.csv")
    for column in ("heldout_error", "calibration_error", "stored_weights", "ratio"):
        np.testing.assert_allclose(again[column], metrics[column], rtol=1e-4, atol=1e-9)
    protocol = json.loads((out / "protocol.json").read_text())
    assert protocol["heldout"]["windows"] == 2


def test_equal_storage_sets_equal_counts_side_by_side(heads):
    rows = [("wanda", 0.5, 100, 0.3), ("descent", 0.5, 400, 0.01), ("descent", 0.875, 100, 0.1)]
    metrics = pd.DataFrame(rows, columns=["method", "ratio", "stored_weights", "heldout_error"])
    metrics["calibration_error"] = metrics["heldout_error"]
    table = heads.equal_storage(metrics)
    assert set(zip(table["method"], table["ratio"], strict=True)) == {
        ("wanda", 0.5),
        ("descent", 0.875),
    }
    assert heads.equal_storage(metrics[:2]).empty


@pytest.mark.parametrize(
    ("d", "k", "ratio", "expected"),
    [(64, 8, 0.5, 0.875), (128, 32, 0.5, 0.75), (8, 8, 0.5, None), (8, 8, 0.7, 1 - 40 / 64)],
)
def test_the_ratio_of_equal_storage_stores_the_same(heads, d, k, ratio, expected):
    source = heads.Layers((0,), 1, d, k, 1, 1, iter, {})
    assert source.matched_ratio(ratio) == expected


def test_the_example_is_a_head_of_a_real_window(heads, finished):
    problems = read_layer(finished / "layer.npz")
    with np.load(finished / "whole" / "attention.npz") as file:
        found = {name: file[name] for name in file.files}
    masks = keep_masks(finished / "whole")
    q, k = (masks[f"wanda-0.5-layer0-head0-{side}"] for side in ("wq", "wk"))
    w = (problems.wq[0] * q) @ (problems.wk[0] * k).T
    x = problems.x_heldout[0]
    np.testing.assert_allclose(found["dense"], reference.attention(x, problems.w[0]), atol=1e-5)
    np.testing.assert_allclose(found["wanda"], reference.attention(x, w), atol=1e-5)
    assert (found["layer"], found["head"], found["ratio"]) == (0, 0, 0.5)


def refuse(heads, capsys, tmp_path, *arguments):
    out = tmp_path / "run"
    status = heads.main([*map(str, arguments), "--out", str(out)])
    shown = capsys.readouterr()
    assert status == 2
    assert shown.err.startswith("jaxprune heads: error: ")
    assert shown.err.count("\n") == 1
    assert not out.exists()
    return shown.err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"x": None}, "no array named x"),
        ({"wq": None, "wk": None}, "no array named wk, wq"),
        ({"x": arrays()["x"][:3], "x_heldout": None}, "fewer than 4 sequences"),
        ({"x": np.ones((4, 8, D + 1))}, f"x (4, 8, {D + 1})"),
        ({"x": np.ones(3)}, "shapes do not match"),
        ({"x_heldout": np.ones((2, 8, D + 1))}, f"x_heldout (2, 8, {D + 1})"),
        ({"wq": np.ones((D, 16))}, "wq (8, 16)"),
        ({"wk": np.ones((D, 3, WIDTH))}, "kv_heads dividing heads"),
        ({"wk": np.ones((D, 2, WIDTH + 1))}, "shapes do not match"),
        ({"wk": np.ones((D, 0, WIDTH))}, "shapes do not match"),
        ({"x": np.full((4, 8, D), np.nan)}, "x holds 256 non-finite"),
        ({"wq": np.full((D, 4, WIDTH), np.inf)}, "wq holds 128 non-finite"),
        ({"x": np.array(["text"])}, "x does not hold real numbers"),
    ],
)
def test_arrays_that_cannot_work_are_one_line_that_names_them(
    heads, capsys, tmp_path, layer, changes, named
):
    assert named in refuse(heads, capsys, tmp_path, "--input", layer(**changes))


class Trap:
    """Unpickled, it would be noticed."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def damaged():
    content = io.BytesIO()
    np.savez_compressed(content, **arrays())
    whole = bytearray(content.getvalue())
    return {
        "truncated": bytes(whole[: len(whole) // 2]),
        "overwritten": bytes(whole[:100] + bytes(100) + whole[200:]),
        "empty": b"",
        "text": b"no arrays here",
        "pickle": pickle.dumps(Trap()),
        "npy": npy(np.ones(3)),
    }


def npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


@pytest.mark.parametrize("kind", list(damaged()))
def test_a_file_that_is_not_an_npz_is_one_line(heads, capsys, tmp_path, kind):
    path = tmp_path / "layer.npz"
    path.write_bytes(damaged()[kind])
    message = refuse(heads, capsys, tmp_path, "--input", path)
    assert f"--input {path}: not a" in message
    assert message.endswith("; expected the arrays x, wq and wk\n")


def test_an_array_of_objects_is_not_unpickled(heads, capsys, tmp_path, layer):
    trap = np.array([Trap()], dtype=object)
    assert "plain arrays" in refuse(heads, capsys, tmp_path, "--input", layer(wk=trap))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "zoo"], "--model or --input"),
        (["--example", "0", "9"], "--example 0 9"),
        (["--descent-steps", "0"], "--descent-steps"),
        (["--input", "nothing.npz"], "No such file"),
        (["--input", "."], "Is a directory"),
        (["--ratios", "1.5"], "--ratios 1.5"),
        (["--ratios", "2:0"], "2:0"),
        (["--ratios"], "--ratios"),
        (["--methods", "best"], "--methods best: expected some of algorithm1, "),
        (["--methods"], "--methods"),
        (["--head-batch", "0"], "--head-batch"),
        (["--layers", "0"], "--layers: has no effect with --input"),
        (["--windows", "3"], "--windows: has no effect with --input"),
        (["--steps", "0"], "--steps"),
        (["--batch-size", "0"], "--batch-size"),
        (["--nothing"], "--nothing"),
    ],
)
def test_wrong_flags_are_one_line_and_nothing_is_written(
    heads, capsys, tmp_path, layer, arguments, named
):
    if arguments and arguments[0] != "--input":
        arguments = ["--input", layer(), *arguments]
    assert named in refuse(heads, capsys, tmp_path, *arguments)


def test_a_folder_that_cannot_be_written_is_named(heads, capsys, tmp_path, layer):
    (tmp_path / "file").write_text("in the way")
    status = heads.main(["--input", str(layer()), "--out", str(tmp_path / "file" / "run")])
    shown = capsys.readouterr()
    assert status == 2
    assert "cannot write there" in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.slow
def test_on_real_attention_curvature_and_descent_beat_every_other_method(heads, shared, tmp_path):
    """Two heads and the beginnings of the sequences of a trained layer."""
    with np.load(shared / "data" / "stories260K_layer2.npz") as file:
        np.savez(
            tmp_path / "layer.npz",
            x=file["x"][:, :64],
            x_heldout=file["x_heldout"][:8, :64],
            wq=file["wq"][:, 2:4],
            wk=file["wk"][:, 1:2],
        )
    arguments = ["--input", str(tmp_path / "layer.npz"), "--out", str(tmp_path / "run")]
    assert heads.main([*arguments, "--ratios", "0.5", "--steps", "50"]) == 0
    errors = pd.read_csv(tmp_path / "run" / "metrics.csv").pivot_table(
        index="head", columns="method", values="heldout_error"
    )
    learned = [errors.pop(method) for method in ("gauss_newton", "descent")]
    for ours in learned:
        assert (ours < 0.7 * errors.min(axis=1)).all(), (ours, errors)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "zoo", "--layers", "6"], "--layers 6: the model has blocks 0 to 5"),
        (["--model", "zoo", "--example", "9", "0"], "--example 9 0"),
        (["--model", "zoo", "--calibration", "nothing.txt"], "nothing.txt: no such file"),
        (["--model", "zoo", "--heldout", "0"], "--heldout 0"),
        (["--model", "no-such-folder"], "no-such-folder"),
    ],
)
def test_wrong_models_and_texts_are_one_line(heads, capsys, tmp_path, arguments, named):
    assert named in refuse(heads, capsys, tmp_path, *arguments)
