"""A run folder: whole files, one writer, resumed or refused, never mixed."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import pytest

from jaxprune.errors import InputError
from jaxprune.runs.folder import RunFolder, check_record, keep_record, recorded
from jaxprune.runs.metrics import Columns, read_metrics
from jaxprune.runs.repetition import differences
from jaxprune.storage import check_writable, replacing, write_arrays, write_json


@dataclass(frozen=True)
class Settings:
    steps: int = 3
    ratio: tuple[float, ...] = (0.3, 0.5)
    out: Path = Path("somewhere")
    resume: bool = False


def files(folder):
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock"
    )


def unwritable(tmp_path):
    """Paths where no folder can be: also true for root."""
    (tmp_path / "file").write_text("in the way")
    return [tmp_path / "file", tmp_path / "file" / "below"]


def test_a_file_is_whole_or_not_there(tmp_path):
    def fail_half_way():
        with replacing(tmp_path / "a.txt") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert files(tmp_path) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", [1])
    circular = []
    circular.append(circular)
    with pytest.raises(ValueError, match="Circular"):
        write_json(tmp_path / "a.json", circular)
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
    assert files(tmp_path) == ["a.json"]


def test_while_a_file_is_written_readers_see_the_old_one(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with replacing(tmp_path / "a.txt") as partial:
        partial.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "a.txt").read_text() == "new"


def test_written_files_can_be_read_by_others(tmp_path):
    write_json(tmp_path / "a.json", 1)
    assert os.stat(tmp_path / "a.json").st_mode & 0o777 == 0o644


def test_arrays_come_back(tmp_path):
    write_arrays(tmp_path / "a.npz", mask=np.array([True, False]), w=np.eye(2))
    with np.load(tmp_path / "a.npz") as file:
        assert file["mask"].tolist() == [True, False]
        assert (file["w"] == np.eye(2)).all()
    assert files(tmp_path) == ["a.npz"]


def test_a_new_run_says_what_and_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.delenv("JAX_ENABLE_X64", raising=False)
    with RunFolder(tmp_path / "deep" / "run", Settings()) as run:
        assert run.figures.is_dir()
    config = json.loads((run.path / "config.json").read_text())
    assert config == {"steps": 3, "ratio": [0.3, 0.5]}
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["versions"]["jax"]
    assert {"command", "python", "backend", "device", "cpu_count"} <= environment.keys()
    assert environment["variables"]["OPENBLAS_CORETYPE"] == "Haswell"
    assert "JAX_ENABLE_X64" not in environment["variables"]


def test_a_finished_part_is_read_back_and_not_computed_again(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return [{"error": 0.1 + 0.2, "lam": None, "method": "wanda"}]

    with RunFolder(tmp_path, Settings()) as run:
        assert not run.finished("k16")
        first = run.part("k16", compute)
        assert run.finished("k16")
    with RunFolder(tmp_path, Settings(), resume=True) as run:
        again = run.part("k16", compute)
    assert first == again == [{"error": 0.1 + 0.2, "lam": None, "method": "wanda"}]
    assert calls == [1]


def test_an_interrupted_part_is_never_seen(tmp_path):
    def interrupted():
        yield {"error": 1.0}
        raise KeyboardInterrupt

    with RunFolder(tmp_path, Settings()) as run:
        before = files(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            run.part("k16", interrupted)
        assert not run.finished("k16")
        assert files(tmp_path) == before


def test_a_run_is_not_overwritten_unless_resumed(tmp_path):
    with RunFolder(tmp_path, Settings()):
        pass
    with pytest.raises(ValueError, match="holds a run already; resume=True continues it"):
        RunFolder(tmp_path, Settings()).__enter__()
    with RunFolder(tmp_path, Settings(out=tmp_path, resume=True), resume=True):
        pass


def test_a_run_is_not_continued_with_other_settings(tmp_path):
    with RunFolder(tmp_path, Settings()):
        pass
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}
    with pytest.raises(ValueError, match=r"holds a run with steps=3, not 4; choose another"):
        RunFolder(tmp_path, Settings(steps=4), resume=True).__enter__()
    after = {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}
    assert before == after
    with RunFolder(tmp_path, Settings(), resume=True):
        pass  # a refused run holds no lock


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    with (
        RunFolder(tmp_path, Settings()),
        pytest.raises(ValueError, match="another run is writing there"),
    ):
        RunFolder(tmp_path, Settings(), resume=True).__enter__()
    with filelock.FileLock(tmp_path / ".lock"):
        pass  # free again


def test_the_lock_is_free_after_an_error(tmp_path):
    def fail():
        with RunFolder(tmp_path, Settings()):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    with RunFolder(tmp_path, Settings(), resume=True):
        pass


def test_a_folder_that_cannot_be_is_named(tmp_path):
    for out in unwritable(tmp_path):
        with pytest.raises(ValueError, match=f"out {out}: cannot write there"):
            RunFolder(out, Settings()).__enter__()
        with pytest.raises(ValueError, match=f"cache {out}: cannot write there"):
            check_writable(out, "cache")
    assert files(tmp_path) == ["file"]


def test_metrics_come_back_and_are_asked_for_where_there_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.csv: no such file; run the experiment first"):
        read_metrics(tmp_path)
    rows = [{"k": 16, "lam": None, "error": 1 / 3}, {"k": 64, "lam": 0.1, "error": 2.0}]
    with RunFolder(tmp_path, Settings()) as run:
        written = run.write_metrics(rows)
    pd.testing.assert_frame_equal(written, pd.DataFrame(rows))
    pd.testing.assert_frame_equal(read_metrics(tmp_path), written)


@pytest.mark.parametrize(
    ("content", "columns", "named"),
    [
        (b"", (), "not a table"),
        (b"\xff\xfe\x00\x01", (), "not a table"),
        (b'a,b\n1,"2', (), "not a table"),
        (b"a,b\n", (), "no rows"),
        (b"a,b\n1,2\n", ("a", "ratio"), "no column ratio"),
    ],
)
def test_damaged_metrics_are_named(tmp_path, content, columns, named):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(InputError, match=named):
        read_metrics(tmp_path, columns)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"error": "text"}, "error text, not a finite number"),
        ({"error": float("inf")}, "error inf, not a finite number"),
        ({"error": None}, "error nan, not a finite number"),
        ({"method": "magic"}, "method magic, not a word of this script"),
        ({"data": None}, "data nan, not a word of this script"),
        ({"lam": "text"}, "lam text, not a finite number"),
    ],
)
def test_metrics_that_cannot_be_drawn_are_named(tmp_path, row, named):
    columns = Columns(("error",), ("method", "data"), {"method": ("wanda",)}, ("lam",))
    good = {"error": 1.0, "method": "wanda", "data": "real", "lam": None}
    columns.check(pd.DataFrame([good]), "here")
    pd.DataFrame([good, good | row]).to_csv(tmp_path / "metrics.csv", index=False)
    with pytest.raises(InputError, match=named):
        read_metrics(tmp_path, columns)
    with RunFolder(tmp_path / "out", Settings()) as run, pytest.raises(InputError, match="parts"):
        run.write_metrics([good, good | row], columns)
    assert not (tmp_path / "out" / "metrics.csv").exists()


def test_folders_that_hold_something_else_are_left_alone(tmp_path):
    """A model, notes, and parts whose settings are lost; a run killed at its very start goes on."""
    with RunFolder(tmp_path / "lost", Settings()) as run:
        run.part("a", lambda: [{"error": 1}])
    (tmp_path / "lost" / "config.json").unlink()
    for name, file in (("model", "config.json"), ("notes", "notes.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    for name in ("lost", "model", "notes"):
        before = files(tmp_path)
        for resume in (False, True):
            with pytest.raises(InputError, match="not a whole run; choose a new or an empty"):
                RunFolder(tmp_path / name, Settings(), resume=resume).__enter__()
        assert files(tmp_path) == before
    begun = tmp_path / "begun"
    (begun / "parts").mkdir(parents=True)
    for name in (".lock", "inputs.json", "environment.json", ".config-x.partial.json"):
        (begun / name).write_text("{")
    with RunFolder(begun, Settings(), resume=True) as run:
        assert run.part("a", lambda: [{"error": 1}]) == [{"error": 1}]
    assert (begun / "config.json").exists()


def test_what_is_finished_outlasts_an_error(tmp_path):
    out = tmp_path / "run"

    def fail():
        with RunFolder(out, Settings()) as run:
            run.part("a", lambda: [{"error": 1}])
            raise InputError("late")

    with pytest.raises(InputError, match="late"):
        fail()
    with RunFolder(out, Settings(), resume=True) as run:
        assert run.finished("a")


def test_a_record_is_replaced_by_that_of_the_same_settings_alone(tmp_path):
    run, kept = tmp_path / "run", tmp_path / "kept"
    check_record(Settings(), kept, "save")  # there is none yet
    with RunFolder(run, Settings()) as folder:
        folder.write_metrics([{"error": 1.0}])
    keep_record(run, kept, "save")
    check_record(Settings(out=tmp_path), kept, "save")
    with pytest.raises(InputError, match=r"^save .*: holds the record of a run with steps 3, not"):
        check_record(Settings(steps=4), kept, "save")


def test_folders_on_the_way_to_a_failed_run_are_taken_away(tmp_path):
    def fail(out):
        with RunFolder(out, Settings()):
            raise InputError("wrong")

    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="wrong"):
        fail(tmp_path / "there" / "a" / "b")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_results_are_compared_by_value(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    table = pd.DataFrame({"method": ["a", "b"], "error": [0.1, np.nan], "seed": [0, 1]})
    for folder, scale in ((old, 1.0), (new, 1.01)):
        folder.mkdir()
        write_arrays(folder / "same.npz", mask=np.eye(2))
        write_arrays(folder / "other.npz", mask=scale * np.eye(2))
        (folder / "bits.safetensors").write_bytes(b"%f" % scale)
        table.assign(error=scale * table["error"]).to_csv(folder / "metrics.csv", index=False)
    write_arrays(new / "more.npz", mask=np.eye(2))
    equal, different = differences(old, new)
    assert equal == ["same.npz"]
    assert different == [
        "metrics.csv: error by up to 9.9e-03 of itself",
        f"more.npz: missing in {old}",
        "other.npz: other arrays",
        "bits.safetensors: other bytes",
    ]
    table.assign(method="c").to_csv(new / "metrics.csv", index=False)
    assert differences(old, new)[1][0] == "metrics.csv: method"
    table[:1].to_csv(new / "metrics.csv", index=False)
    assert "(2, 3) rows and columns, then (1, 3)" in differences(old, new)[1][0]


def test_a_run_says_what_it_was(tmp_path):
    inputs = {"model": {"a.bin": "00"}}
    with RunFolder(tmp_path / "out", Settings(), inputs=inputs):
        pass
    found = recorded(tmp_path / "out")
    assert (found.configuration["steps"], found.inputs) == (3, inputs)
    assert "versions" in found.environment
    write_json(tmp_path / "out" / "pruning.json", {"configuration": {}, "inputs": 3})
    with pytest.raises(InputError, match=r"pruning\.json: lacks"):
        recorded(tmp_path / "out")


@pytest.fixture
def kept(tmp_path):
    """A run with a finished part, and its two files."""
    with RunFolder(tmp_path / "out", Settings()) as run:
        write_arrays(run.part_file("a"), x=np.ones(3))
        run.part("a", lambda: [{"error": 1, "lam": float("nan")}, {"error": 0.1 + 0.2}])
        np.testing.assert_array_equal(run.part_arrays("a")["x"], 1)
        yield run, run.part_file("a").with_suffix(".json"), run.part_file("a")


@pytest.mark.parametrize("content", ["", "3", "{}", '{"rows": [{"err', '{"rows": []}', "[" * 9999])
def test_damaged_parts_are_named_with_the_remedy(kept, content):
    run, rows, _ = kept
    rows.write_text(content)
    for read in (lambda: run.part("a", list), lambda: run.part_arrays("a")):
        with pytest.raises(InputError, match=rf"{rows}: damaged.*delete it, and resume=True"):
            read()


@pytest.mark.parametrize("change", ["fewer rows", "a number", "another part", "other arrays"])
def test_parts_that_were_edited_are_not_accepted(kept, change):
    """All of them are valid JSON with everything where it should be."""
    run, rows, _ = kept
    content = json.loads(rows.read_text())
    if change == "fewer rows":
        content["rows"].pop()
    elif change == "a number":
        content["rows"][0]["error"] = 2
    elif change == "other arrays":
        content["arrays"] = None
    rows.unlink()
    name = "b" if change == "another part" else "a"
    rows.with_name(f"{name}.json").write_text(json.dumps(content, indent=2))
    with pytest.raises(InputError, match=rf"{name}\.json: damaged, or changed since"):
        run.part(name, list)


def test_parts_without_a_digest_are_refused(kept):
    run, rows, _ = kept
    rows.write_text('[{"error": 1}]')
    with pytest.raises(InputError, match=r"a\.json: has no digest.*delete the folder"):
        run.part("a", list)


def test_damaged_arrays_of_a_part_are_named_with_the_remedy(kept):
    run, _, arrays = kept
    write_arrays(arrays, x=np.zeros(3))
    with pytest.raises(InputError, match=r"a\.npz: changed since.*delete it and .*a\.json"):
        run.part_arrays("a")
    arrays.write_bytes(arrays.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"not a whole \.npz"):
        run.part_arrays("a")
    np.save(arrays.with_suffix(".npy"), np.ones(3))
    arrays.with_suffix(".npy").replace(arrays)
    with pytest.raises(InputError, match="File is not a zip file"):
        run.part_arrays("a")
    arrays.unlink()
    with pytest.raises(InputError, match=r"No such file.*delete .*a\.json too"):
        run.part_arrays("a")


def test_a_part_that_is_a_folder_is_named_with_the_remedy(kept):
    run, rows, _ = kept
    rows.unlink()
    rows.mkdir()
    with pytest.raises(InputError, match=r"a\.json: cannot be read .*delete it, and resume=True"):
        run.part("a", list)


def test_a_folder_and_a_link_to_it_are_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with (
        RunFolder(tmp_path / "real", Settings()),
        pytest.raises(InputError, match="another run is writing there"),
    ):
        RunFolder(tmp_path / "link", Settings(), resume=True).__enter__()
    with RunFolder(tmp_path / "link", Settings(), resume=True) as run:
        assert run.path == tmp_path / "link"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="is a link to itself"):
        RunFolder(tmp_path / "loop", Settings()).__enter__()


def test_a_new_run_through_a_link_that_fails_is_taken_away(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")

    def fail():
        with RunFolder(tmp_path / "link", Settings()):
            raise InputError("wrong")

    with pytest.raises(InputError, match="wrong"):
        fail()
    assert not (tmp_path / "real").exists()


def test_environments_of_resumed_runs_are_kept(tmp_path, monkeypatch):
    for argv in (["a"], ["b"], ["b"], ["c"]):
        monkeypatch.setattr("sys.argv", argv)
        with RunFolder(tmp_path, Settings(), resume=True) as run:
            pass
    assert recorded(tmp_path).environment == run.environment
    assert run.environment["command"] == ["c"]
    assert [each["command"] for each in run.environment["before"]] == [["a"], ["b"]]
    (tmp_path / "environment.json").write_text("{")
    with RunFolder(tmp_path, Settings(), resume=True) as run:
        assert "before" not in run.environment


def test_what_a_killed_write_left_is_swept(tmp_path):
    with RunFolder(tmp_path, Settings()) as run:
        run.part("a", lambda: [{"error": 1}])
    (tmp_path / "parts" / ".b-abcd_123.partial.json").write_text("{")
    with RunFolder(tmp_path, Settings(), resume=True):
        assert files(tmp_path / "parts") == ["a.json"]


def test_a_hidden_folder_is_not_called_by_the_name_of_an_argument(tmp_path):
    settings = Settings(out=tmp_path / "out")
    with RunFolder(tmp_path / ".out.work", settings, name=""):
        pass
    with pytest.raises(InputError, match=rf"^{tmp_path}/\.out\.work holds a run already"):
        RunFolder(tmp_path / ".out.work", settings, name="").__enter__()
