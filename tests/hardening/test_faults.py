"""Faults injected into runs: signals, full disks, no memory, two runs at once; and repetitions."""

import dataclasses
import errno
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

from jaxprune.errors import InputError
from jaxprune.runs import folder as runs
from jaxprune.runs import script as cli
from jaxprune.runs.configuration import names
from jaxprune.runs.flags import Flag

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
RESUMES = "the same command with --resume continues"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a run that does nothing."""

    out: Path = Path("out")
    resume: Flag = False


@pytest.fixture
def layer(tmp_path):
    """A layer for llama_heads.py."""
    draw = np.random.default_rng(0)
    shapes = {"x": (4, 8, 6), "x_heldout": (2, 8, 6), "wq": (6, 2, 3), "wk": (6, 1, 3)}
    arrays = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    np.savez(tmp_path / "layer.npz", **arrays)
    return tmp_path / "layer.npz"


@pytest.fixture(scope="module")
def heads(script):
    return script("llama_heads").main


def heads_flags(layer, out, *more):
    methods = ("--methods", "wanda", "fused_magnitude", "--ratios", "0.5")
    return [str(a) for a in ("--input", layer, "--out", out, *methods, *more)]


def results(folder):
    """What a run came to, apart from when and where."""
    tables = [pd.read_csv(file) for file in sorted(folder.rglob("metrics.csv"))]
    weights = {f.name: f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))}
    assert tables
    return [table.to_csv() for table in tables], weights


# prune.py is killed in its own tests; train_zoo.py reads all documentation anew, half a minute.
SCRIPTS = {
    "synthetic": [
        *("--k", "2", "--d", "4", "--n", "6", "8", "--settings", "soft"),
        *("--seeds", "1", "--steps", "20", "--ratio", "0.5"),
    ],
    "llama_heads": [
        *("--head-batch", "1", "--methods", "wanda", "fused_magnitude", "--ratios", "0.5"),
    ],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Processes share what they compile, as a user's do."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def interrupts():
    """Children take interrupts even where these tests, run in the background, ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(name, cache, out, *more, scripts=SCRIPTS, errors="errors.txt"):
    command = [sys.executable, str(REPOSITORY / "experiments" / f"{name}.py")]
    if name != "perplexity":  # writes nothing
        command += ["--out", str(out)]
    with (out.parent / errors).open("w") as errors:
        return subprocess.Popen(
            [*command, *scripts[name], *map(str, more)],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            cwd=out.parent,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
        )


def begun(process, out, file="config.json"):
    """Wait until a run has claimed its folder; its imports are no part of it."""
    deadline = time.monotonic() + 120
    while not list(out.glob(file)) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_at_random_then_resumed_gives_the_same_bits(name, cache, tmp_path, layer):
    """All in processes of their own, which agree to the last bit."""
    more = ("--input", layer) if name == "llama_heads" else ()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    assert start(name, cache, whole, *more).wait() == 0
    length = time.monotonic() - started
    draw = random.Random(name)
    for _ in range(2):
        process = start(name, cache, killed, *more, "--resume")
        begun(process, killed)
        time.sleep(draw.uniform(0, 0.4 * length))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(name, cache, killed, *more, "--resume").wait() == 0
    assert results(whole) == results(killed)


def test_an_interrupt_is_a_clean_stop_that_says_how_to_go_on(cache, tmp_path):
    out = tmp_path / "run"
    process = start("synthetic", cache, out)
    begun(process, out)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    errors = (tmp_path / "errors.txt").read_text()
    assert errors.endswith(f"synthetic.py: interrupted; {RESUMES}\n")
    assert "Traceback" not in errors


# Runs of seconds, and what is there from their first second on.
LONG = {
    "synthetic": [
        *("--k", "2", "3", "4", "--d", "4", "--n", "6", "8", "--settings", "soft"),
        *("--seeds", "1", "--steps", "8000", "--ratio", "0.5"),
    ],
    "llama_heads": [
        *("--head-batch", "1", "--ratios", "0.5", "--steps", "600"),
        *("--methods", "wanda", "descent", "fused_magnitude"),
    ],
    "prune": ["--windows", "8", "--seqlen", "16", "--heldout", "2", "--steps", "300"],
}


@pytest.fixture(scope="module", params=LONG)
def long(request, cache, tmp_path_factory):
    """A long run, and a second one that was begun into the same folder."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    draw, more = np.random.default_rng(0), ()
    if name == "llama_heads":
        shapes = {"x": (8, 32, 16), "x_heldout": (2, 32, 16), "wq": (16, 4, 8), "wk": (16, 2, 8)}
        np.savez(folder / "layer.npz", **{n: draw.normal(size=s) for n, s in shapes.items()})
        more = ("--input", folder / "layer.npz")
    elif name == "prune":
        (folder / "text.txt").write_text(" ".join(draw.choice(["the cat", "sat", "on it"], 3000)))
        more = ("--calibration", folder / "text.txt")

    def begin(out, *flags, **options):
        return start(name, cache, folder / out, *more, *flags, scripts=LONG, **options)

    def under_way(process, out):
        at = f".{out}.work" if name == "prune" else out
        begun(process, folder / at, f"parts/*.{'npz' if name == 'prune' else 'json'}")

    process = begin("whole")
    under_way(process, "whole")
    second = begin("whole", "--resume", errors="second.txt")
    return begin, under_way, folder, (second.wait(), process.wait())


def test_of_two_processes_at_once_the_second_is_refused(long):
    _, _, folder, statuses = long
    assert statuses == (2, 0)
    (error,) = (folder / "second.txt").read_text().splitlines()
    assert "another run is writing there" in error


def test_interrupted_under_way_it_says_how_to_go_on_and_ends_with_the_same_bits(long):
    begin, under_way, folder, _ = long
    process = begin("halved")
    under_way(process, "halved")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    errors = (folder / "errors.txt").read_text()
    assert errors.endswith(f": interrupted; {RESUMES}\n")
    assert "Traceback" not in errors
    assert begin("halved", "--resume").wait() == 0
    assert results(folder / "whole") == results(folder / "halved")


def test_an_interrupt_in_a_callback_is_not_lost(tmp_path, capsys):
    """Python drops what is raised in callbacks of the garbage collector; JAX has one."""

    def interrupted(phase, info):
        gc.callbacks.remove(interrupted)
        signal.raise_signal(signal.SIGINT)

    def body(config):
        gc.callbacks.append(interrupted)
        gc.collect()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            time.sleep(0.01)

    hook = sys.unraisablehook
    assert cli.run_script(Settings, body, [], "tool.py") == 130
    assert capsys.readouterr().err == f"tool.py: interrupted; {RESUMES}\n"
    assert sys.unraisablehook is hook


HUNGRY = {
    "synthetic": ["--d", "40000", "--k", "4", "--n", "8", "--settings", "soft"],
    "llama_heads": ["--ratios", "0.5", "--methods", "fused_magnitude"],
    "perplexity": ["--model", "zoo", "--seqlen", "32000"],
    "prune": [
        *("--model", "zoo", "--windows", "2000", "--heldout", "1", "--batch", "2000"),
        *("--method", "wanda", "--targets", "all"),
    ],
}


@pytest.mark.parametrize("name", HUNGRY)
def test_memory_that_is_not_there_is_one_line(name, cache, tmp_path):
    """In 3 GB of addresses there is no room for 40,000 × 40,000 numbers, nor for such batches."""
    flags = list(HUNGRY[name])
    if name == "llama_heads":
        shapes = {"x": (4, 8, 40000), "wq": (40000, 1, 2), "wk": (40000, 1, 2)}
        np.savez(tmp_path / "wide.npz", **{n: np.ones(s, np.float32) for n, s in shapes.items()})
        flags += ["--input", str(tmp_path / "wide.npz")]
    elif name in ("perplexity", "prune"):
        (tmp_path / "text.txt").write_text("the cat sat on it again. " * 80_000)
        flags += ["--text" if name == "perplexity" else "--calibration", str(tmp_path / "text.txt")]

    process = start(name, cache, tmp_path / "out", scripts={name: flags})
    # From outside: a function that runs between fork and exec would do so amid JAX's threads.
    resource.prlimit(process.pid, resource.RLIMIT_AS, (3 * 10**9, 3 * 10**9))
    assert process.wait(120) == 2
    errors = (tmp_path / "errors.txt").read_text()
    assert errors.splitlines()[-1].startswith(f"{name}.py: error: out of memory; lower --")
    assert "Traceback" not in errors
    if name != "perplexity":  # writes nothing
        claimed = ".out.work" if name == "prune" else "out"
        assert not list((tmp_path / claimed / "parts").iterdir())


def test_a_second_run_into_the_same_folder_is_refused(heads, layer, tmp_path, capsys):
    with runs.RunFolder(tmp_path / "out", Settings(), resume=False):
        assert heads(heads_flags(layer, tmp_path / "out", "--resume")) == 2
    assert "another run is writing there" in capsys.readouterr().err


def test_changed_inputs_are_not_mixed_into_a_run(heads, layer, tmp_path, capsys):
    flags = heads_flags(layer, tmp_path / "out", "--resume")
    assert heads(flags) == 0
    before = results(tmp_path / "out")
    with np.load(layer) as file:
        arrays = dict(file)
    np.savez(layer, **(arrays | {"wq": 2 * arrays["wq"]}))
    assert heads(flags) == 2
    assert "other files for --input" in capsys.readouterr().err
    assert results(tmp_path / "out") == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_a_disk_that_fails_is_one_line_and_the_run_continues(
    heads, layer, tmp_path, capsys, monkeypatch, code, after
):
    """The n-th file written does not fit; what was finished before it is kept."""
    left, replace = [after], Path.replace

    def full(path, target):
        if not left[0]:
            raise OSError(code, os.strerror(code), str(path))
        left[0] -= 1
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    flags = heads_flags(layer, tmp_path / "out", "--resume")
    assert heads(flags) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1
    assert os.strerror(code) in error[0]
    assert RESUMES in error[0]
    assert not list((tmp_path / "out").rglob("*.partial*"))
    assert not (tmp_path / "out" / "metrics.csv").exists()
    monkeypatch.undo()
    assert heads(flags) == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 KB; only root may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_nothing_half_written(
    heads, script, layer, small_disk, checkpoint, capsys
):
    model = checkpoint("untied_gqa")
    (model / "text.txt").write_text("the cat sat on the mat. " * 40)
    (small_disk / "filling").write_bytes(b"0" * 280_000)
    prune = [*("--model", model, "--calibration", model / "text.txt", "--windows", "2")]
    prune += ["--seqlen", "16", "--heldout", "1", "--method", "magnitude"]
    prune += ["--out", small_disk / "pruned"]
    for main, flags in (
        (heads, heads_flags(layer, small_disk / "out")),
        (script("prune").main, [str(a) for a in prune]),
    ):
        assert main(flags) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
        assert len(errors) == 1
        assert "No space left on device" in errors[0]
    assert not (small_disk / "pruned").exists()
    assert not list(small_disk.rglob("*.partial*"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: allocating 9 bytes."),
        jax.errors.JaxRuntimeError("INTERNAL: dispatching: Out of memory allocating 9 bytes."),
        jax.errors.JaxRuntimeError("INTERNAL: dispatching: YNNPACK operation failed: error"),
    ],
)
@pytest.mark.parametrize("name", [*HUNGRY, "ablation", "convergence", "train_zoo"])
def test_no_memory_is_one_line_that_names_the_flag(script, name, error, capsys):
    config = next(v for v in vars(script(name)).values() if hasattr(v, "memory_flags"))

    def body(config):
        raise error

    argv = ["--out", "somewhere"] if name == "prune" else []
    assert cli.run_script(config, body, argv, f"{name}.py") == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"{name}.py: error: out of memory; lower --")
    assert shown.count("\n") == 1
    for flag in (word for word in shown.replace(",", " ").split() if word.startswith("--")):
        assert flag[2:].rstrip(";").replace("-", "_") in names(config)


def test_other_errors_of_the_device_are_defects():
    def body(config):
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a defect"):
        cli.run_script(Settings, body, [], "tool.py")


class TestRepeat:
    def test_the_same_settings_give_the_same_results(self, heads, layer, tmp_path, capsys):
        assert heads(heads_flags(layer, tmp_path / "out")) == 0
        again = ["--repeat", str(tmp_path / "out"), "--out", str(tmp_path / "again")]
        assert heads(again) == 0
        assert f"identical to {tmp_path / 'out'}: metrics.csv" in capsys.readouterr().out
        assert results(tmp_path / "out") == results(tmp_path / "again")
        settings = [runs.recorded(tmp_path / name).configuration for name in ("out", "again")]
        assert settings[0] == settings[1]

    def test_a_pruned_checkpoint_is_made_again(self, script, checkpoint, tmp_path, capsys):
        model = checkpoint("untied_gqa")
        (model / "text.txt").write_text("the cat sat on the mat. " * 40)
        flags = ["--model", model, "--calibration", model / "text.txt", "--windows", "2"]
        flags += ["--seqlen", "16", "--heldout", "1", "--method", "wanda", "--batch", "4"]
        prune = script("prune").main
        assert prune([*map(str, flags), "--out", str(tmp_path / "out")]) == 0
        again = ["--repeat", str(tmp_path / "out"), "--out", str(tmp_path / "again")]
        assert prune(again) == 0
        assert "model.safetensors" in capsys.readouterr().out
        (model / "text.txt").write_text("the dog sat on the mat. " * 40)
        assert prune([*again[:-1], str(tmp_path / "third")]) == 2
        assert "other files for --calibration" in capsys.readouterr().err
        assert not (tmp_path / "third").exists()

    def test_differences_are_said_with_their_size(self, heads, layer, tmp_path, capsys):
        assert heads(heads_flags(layer, tmp_path / "out")) == 0
        file = tmp_path / "out" / "metrics.csv"
        table = pd.read_csv(file)
        table["heldout_error"] *= 1.001
        table.to_csv(file, index=False)
        environment = json.loads((tmp_path / "out" / "environment.json").read_text())
        environment["backend"] = "tpu"
        (tmp_path / "out" / "environment.json").write_text(json.dumps(environment))
        again = ["--repeat", str(tmp_path / "out"), "--out", str(tmp_path / "again")]
        assert heads(again) == 1
        shown = capsys.readouterr().out
        assert "metrics.csv: heldout_error by up to 1.0e-03 of itself" in shown
        assert "backend tpu then, cpu now" in shown

    @pytest.mark.parametrize(
        ("damage", "more", "named"),
        [
            (None, ["--steps", "3"], "--steps: a repetition takes"),
            (None, ["--redraw"], "--redraw: a repetition takes"),
            ("inputs.json", [], "inputs.json: no such file"),
            ("config.json", [], "config.json: no such file"),
        ],
    )
    def test_what_cannot_be_repeated(self, heads, layer, tmp_path, capsys, damage, more, named):
        assert heads(heads_flags(layer, tmp_path / "out")) == 0
        if damage:
            (tmp_path / "out" / damage).unlink()
        again = ["--repeat", str(tmp_path / "out"), "--out", str(tmp_path / "again"), *more]
        assert heads(again) == 2
        assert named in capsys.readouterr().err
        assert not (tmp_path / "again").exists()

    def test_settings_that_are_no_flags_are_not_passed_on(self, heads, layer, tmp_path, capsys):
        assert heads(heads_flags(layer, tmp_path / "out")) == 0
        file = tmp_path / "out" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"help": True}))
        assert heads(["--repeat", str(tmp_path / "out"), "--out", str(tmp_path / "again")]) == 2
        assert "not a run of this version's jaxprune heads: it has help" in capsys.readouterr().err

    def test_another_scripts_run_is_not_repeated(self, script, heads, layer, tmp_path, capsys):
        assert heads(heads_flags(layer, tmp_path / "out")) == 0
        again = ["--repeat", str(tmp_path / "out"), "--out", str(tmp_path / "again")]
        assert script("synthetic").main(again) == 2
        assert "not a run of this version's synthetic.py" in capsys.readouterr().err


def test_the_folder_of_a_run_with_wrong_input_is_taken_away_if_it_was_new(tmp_path):
    def fail(resume):
        with runs.RunFolder(tmp_path / "out", Settings(), resume=resume):
            raise InputError("wrong")

    with pytest.raises(InputError, match="wrong"):
        fail(False)
    assert not (tmp_path / "out").exists()
    with runs.RunFolder(tmp_path / "out", Settings()):
        pass
    with pytest.raises(InputError, match="wrong"):
        fail(True)
    assert (tmp_path / "out" / "config.json").exists()
