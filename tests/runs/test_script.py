"""Flags, one-line errors, exit statuses."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import pytest

from jaxprune.errors import InputError
from jaxprune.runs import flags
from jaxprune.runs.flags import Flag
from jaxprune.runs.script import (
    compile_lightly,
    one_thread_for_lapack,
    run_script,
    use_compilation_cache,
)


@dataclass(frozen=True)
class Config:
    """What the script is for."""

    ratio: float = 0.5
    """fraction removed"""
    k: tuple[int, ...] = (16, 64)
    """widths of a head"""
    run: Annotated[flags.Folder, flags.RUN] = field(default=flags.Folder(out=Path("runs/x")))


@pytest.fixture
def run(capsys, monkeypatch):
    """`run(argv, body)` is the status, what the body was given, and the two outputs."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")

    def call(argv, body=None):
        given = []
        status = run_script(Config, body or given.append, argv, "tool.py")
        shown = capsys.readouterr()
        return status, given, shown.out, shown.err

    return call


def test_flags_become_the_dataclass(run):
    argv = ["--ratio", "0.25", "--k", "8", "32", "--out", "there", "--resume"]
    expected = Config(0.25, (8, 32), flags.Folder(out=Path("there"), resume=True))
    assert run(argv) == (0, [expected], "", "")
    assert run([]) == (0, [Config()], "", "")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--ratio", "half"], "half"),
        (["--nothing"], "--nothing"),
        (["--no-resume"], "--no-resume"),
        (["stray"], "stray"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(run, argv, named):
    status, given, out, err = run(argv)
    assert (status, given, out) == (2, [], "")
    assert err.startswith("tool.py: error: ")
    assert named in err
    assert err.endswith("(see tool.py --help)\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--out="], "--out: is empty, expected a value"),
        (["--out", ""], "--out: is empty, expected a value"),
        ([""], "an argument: is empty, expected a value"),
        (["--out", "a\0b"], "--out: holds a null character, expected a value"),
        (["--k", "16", "64", "16"], "--k 16: is there twice; give it once"),
    ],
)
def test_values_that_no_flag_takes_are_refused(run, argv, named):
    status, _, _, err = run(argv, lambda config: None)
    assert (status, err) == (2, f"tool.py: error: {named}\n")


def test_a_wrong_flag_is_one_line_without_unicode_too(run, monkeypatch):
    """tyro draws its box with other characters where the output has no encoding of its own."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    status, _, _, err = run(["--ratio", "half"], lambda config: None)
    assert status == 2
    assert err.startswith("tool.py: error: Error parsing --ratio: ")
    assert "--" not in err.replace("--ratio", "").replace("--help", "")


def test_what_moves_the_cursor_is_not_printed(run):
    def body(config):
        raise InputError("the file \x1b[2J names\n\x07 two")

    assert run([], body)[3] == "tool.py: error: the file ?[2J names ? two\n"


def test_an_output_that_is_full_is_one_line(run, monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status, _, _, err = run([], lambda config: print("results"))
        monkeypatch.undo()
        assert status == 2
        assert err.startswith("tool.py: error: --out runs/x: No space left on device; ")
        with contextlib.suppress(OSError):
            full.close()


def test_wrong_input_is_one_line_and_status_2(run):
    def body(config):
        raise InputError("--ratio 7:\n  out of range")

    assert run([], body)[::3] == (2, "tool.py: error: --ratio 7: out of range\n")


def test_an_interruption_says_how_to_go_on_and_is_status_130(run):
    def body(config):
        raise KeyboardInterrupt

    status, _, _, err = run([], body)
    assert status == 130
    assert err == "tool.py: interrupted; the same command with --resume continues\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_of_which_a_library_makes_another_error_is_one(run, number):
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}[number]
    before = signal.signal(number, usual)  # in the background interrupts are ignored

    def body(config):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            # The archive's own, where the interrupt falls on an entry's opening.
            raise ValueError("Can't close the ZIP file") from None

    status, _, _, err = run([], body)
    assert status == 130
    assert err == "tool.py: interrupted; the same command with --resume continues\n"
    assert signal.signal(number, before) is usual


def test_a_second_interruption_does_not_disturb_the_exit(tmp_path):
    code = """
import atexit, os, signal, sys, time
from dataclasses import dataclass, field
from jaxprune.runs.script import run_script

@dataclass(frozen=True)
class Config:
    "Nothing."

def cleaning_up():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)

def body(config):
    raise KeyboardInterrupt

atexit.register(cleaning_up)
sys.exit(run_script(Config, body, [], "tool.py"))
"""
    (tmp_path / "tool.py").write_text(code)
    done = subprocess.run([sys.executable, tmp_path / "tool.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "tool.py: interrupted\n")


def test_a_stop_while_drawing_again_is_not_said_to_be_resumed(capsys):
    @dataclass(frozen=True)
    class Drawing(Config):
        """What the script is for."""

        redraw: Flag = False
        """only draw"""

    for error in (KeyboardInterrupt, FileExistsError(17, "File exists", "figures")):

        def body(config, error=error):
            raise error

        run_script(Drawing, body, ["--redraw"], "tool.py")
    shown = capsys.readouterr().err
    assert shown == "tool.py: interrupted\ntool.py: error: figures: File exists\n"


def test_a_defect_keeps_its_traceback(run):
    def body(config):
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        run([], body)


def test_help_describes_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(Config, print, ["--help"], "tool.py")
    shown = capsys.readouterr().out
    assert stop.value.code in (0, None)
    for text in ("What the script is for", "--ratio", "fraction removed", "--k", "--resume"):
        assert text in shown


def test_help_groups_the_flags_that_scripts_share(capsys):
    with pytest.raises(SystemExit):
        run_script(Config, print, ["--help"], "tool.py")
    boxes = capsys.readouterr().out.partition("What the script is for")[2]  # after the usage
    own, _, shared = boxes.partition("run options")
    assert [flag in own for flag in ("--ratio", "--k", "--out", "--resume")] == [1, 1, 0, 0]
    assert [flag in shared for flag in ("--ratio", "--k", "--out", "--resume")] == [0, 0, 1, 1]


@pytest.fixture
def cache_settings():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path, cache_settings):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jaxprune" / "xla")


def test_a_cache_folder_named_by_the_user_is_left_alone(monkeypatch, cache_settings):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before


def test_a_full_disk_is_named_by_what_is_written(run):
    """A copy that fails names what is read first."""

    def body(config):
        raise OSError(28, "No space left on device", "model/in", None, "small/out")

    err = run([], body)[3]
    assert err.startswith("tool.py: error: small/out: No space left on device; ")


def test_a_cache_that_cannot_be_written_is_not_used(monkeypatch, tmp_path, cache_settings):
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").write_text("in the way")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize("given", ["", "--xla_cpu_use_fusion_emitters=true --xla_dump_to=there"])
def test_light_compilation_leaves_what_the_user_says(monkeypatch, given):
    monkeypatch.setenv("XLA_FLAGS", given)
    compile_lightly()
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[: len(given.split())] == given.split()
    added = {flag.partition("=")[0] for flag in flags[len(given.split()) :]}
    assert "--xla_backend_optimization_level" in added
    assert ("--xla_cpu_use_fusion_emitters" in added) == (
        not given and jax.__version_info__[:2] == (0, 10)
    )
    compile_lightly()
    assert os.environ["XLA_FLAGS"].split() == flags


@pytest.mark.parametrize(("chosen", "left"), [(None, "1"), ("4", "4")])
def test_threads_of_lapack_are_one_or_as_many_as_the_user_says(monkeypatch, chosen, left):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    if chosen is not None:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", chosen)
    one_thread_for_lapack()
    assert os.environ["OPENBLAS_NUM_THREADS"] == left


def test_an_error_of_the_library_names_the_flag(run):
    def body(config):
        raise InputError("out there: holds a run already; resume=True continues it")

    shown = "tool.py: error: --out there: holds a run already; --resume continues it\n"
    assert run([], body)[3] == shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_termination_is_an_interruption(run, number):
    cleared = []

    def body(config):
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # once more, amid what is cleared away
            cleared.append(True)

    before = signal.signal(number, signal.SIG_DFL)
    status, _, _, err = run([], body)
    assert (status, cleared) == (130, [True])
    assert err == "tool.py: interrupted; the same command with --resume continues\n"
    assert signal.signal(number, before) is signal.SIG_DFL


PRINTING = """
import sys
from dataclasses import dataclass
from jaxprune.runs.script import run_script

@dataclass(frozen=True)
class Config:
    "Nothing."

def body(config):
    for line in range(20_000):
        print("line", line)
    open("done", "w").close()

sys.exit(run_script(Config, body, sys.argv[1:], "tool.py"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "{python} tool.py >&-",
        "{python} tool.py >&- 2>&-",
        "{python} tool.py | head -1 > /dev/null; exit ${{PIPESTATUS[0]}}",
        "{python} tool.py --help | head -1 > /dev/null; touch done; exit ${{PIPESTATUS[0]}}",
    ],
)
def test_output_that_nobody_reads_is_no_error(tmp_path, command):
    (tmp_path / "tool.py").write_text(PRINTING)
    shell = ["bash", "-c", command.format(python=sys.executable)]
    done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "done").exists()
