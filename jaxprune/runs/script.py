"""What every script shares: one-line errors, exit statuses, repetition, the frame of experiments.

Exit statuses: 0 done; 1 a repetition differs from its original; 2 wrong input, or the machine does
not allow it (disk full, no permission, out of memory), one line on standard error;
130 interrupted, by SIGINT, SIGTERM or SIGHUP.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TextIO, TypeVar, cast

import jax
import pandas as pd

from jaxprune.errors import InputError
from jaxprune.runs.configuration import as_recorded, completed, defaults, flat, names, replaced
from jaxprune.runs.flags import flag_of, in_flags, parse_flags
from jaxprune.runs.folder import (
    RunFolder,
    environment,
    figures_of,
    recorded,
    recorded_configuration,
)
from jaxprune.runs.metrics import Columns, drawing_again, read_metrics
from jaxprune.runs.repetition import differences
from jaxprune.sharding import is_writer
from jaxprune.storage import replacing

Config = TypeVar("Config")


class Experiment(NamedTuple):
    """What an experiment computes, once its input is read and found to be right.

    Attributes:
      compute: all rows of metrics, part by part in the folder of the run.
      inputs: hashes of what was read, for ``RunFolder``.
    """

    compute: Callable[[RunFolder], Sequence[dict[str, Any]]]
    inputs: Mapping[str, Mapping[str, str]] = {}


Report = Callable[[pd.DataFrame, Path, Path], str]
"""Draws metrics: of the folder of the run and that of its figures to Markdown tables."""


def run_experiment(
    config: Any,
    prepare: Callable[[Any], Experiment],
    report: Report,
    columns: Columns,
) -> None:
    """Run an experiment, or draw it again: flags checked, rows computed, metrics, report.

    The report's tables are printed and kept in ``tables.md``.

    Args:
      config: with the group ``run``; its method ``check`` raises ``InputError`` for flags that
        cannot work.
      prepare: reads and checks the input.
      report: figures, tables.
      columns: of the metrics.
    """
    out = config.run.out
    if config.run.redraw:
        with drawing_again(out):
            _write_report(report, read_metrics(out, columns), out)
        return
    config.check()
    experiment = prepare(config)
    with RunFolder(out, config, resume=config.run.resume, inputs=experiment.inputs) as run:
        metrics = run.write_metrics(experiment.compute(run), columns)
    _write_report(report, metrics, out)


def _write_report(report: Report, metrics: pd.DataFrame, out: Path) -> None:
    text = report(metrics, out, figures_of(out))
    with replacing(out / "tables.md") as partial:
        partial.write_text(text, encoding="utf-8")
    print(text)
    print(f"metrics, tables and figures: {out}")


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that a second run starts at once.

    ``JAX_COMPILATION_CACHE_DIR`` names another folder. Where none can be written, none is used.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = cache / "jaxprune" / "xla"
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def compile_lightly() -> None:
    """Have XLA spend less on compiling for a CPU: for scripts of many small programs.

    Its optimisation level 1 without the emitters that fuse loops compiles twice as fast; the
    programs of a sweep, mostly products of matrices, run no slower and give the same numbers
    within rounding. What ``XLA_FLAGS`` sets stays. To be called before JAX computes anything.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    light = ["--xla_backend_optimization_level=1"]
    if jax.__version_info__[:2] == (0, 10):  # XLA aborts on flags that it does not know
        light.append("--xla_cpu_use_fusion_emitters=false")
    missing = [flag for flag in light if flag.partition("=")[0] not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()


def one_thread_for_lapack() -> None:
    """Give LAPACK, which XLA calls on a CPU, one thread unless ``OPENBLAS_NUM_THREADS`` is set.

    Its threads wait for each other actively. Where another process computes too, the eigenvectors
    of a matrix of 1536 took two threads 14 s and one 0.25 s; on two idle cores two threads 0.18 s.
    To be called before the first factorisation, when the library is loaded; children inherit it.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def recorded_config(config: Config, prog: str) -> Config:
    """The configuration of the run that ``config.repeat`` names, with the ``out`` of ``config``.

    Flags that the record lacks, as it is of an earlier version, are as they were then.

    Raises:
      InputError: flags besides ``--repeat`` and ``--out``, or no run of this script there.
    """
    given, standing = flat(config), defaults(type(config))
    where = given["repeat"]
    for name, value in given.items():
        if name not in ("out", "repeat") and value != standing.get(name):
            raise InputError(f"{flag_of(name)}: a repetition takes --repeat and --out alone")
    argv = []
    for name, value in completed(recorded(where).configuration, type(config)).items():
        if name not in given:
            raise InputError(
                f"--repeat {where}: not a run of this version's {prog}: it has {name:.40}"
            )
        argv += _as_flags(name, value, switch=standing.get(name) is True)
    try:
        again = parse_flags(type(config), [*argv, f"--out={given['out']}"], prog)
    except InputError as error:
        raise InputError(f"--repeat {where}: not a run of this version's {prog}: {error}") from None
    return replaced(again, {"repeat": where})


def _as_flags(name: str, value: Any, *, switch: bool) -> list[str]:
    """A recorded value as arguments; a ``switch`` is on unless ``--no-`` says otherwise."""
    flag = flag_of(name)
    if isinstance(value, list):
        return [flag, *map(str, value)]
    if value is True:
        return [flag]
    if value is False:
        return [f"--no-{flag[2:]}"] if switch else []
    return [] if value is None else [f"{flag}={value}"]


def _continued(config: Config) -> Config:
    """The configuration for going on with, or drawing again, what ``--out`` holds.

    A property ``records`` of the configuration names the folders that may hold the record.
    """
    values = flat(config)
    if not (values.get("resume") or values.get("redraw")) or "out" not in values:
        return config
    for folder in getattr(config, "records", (values["out"],)):
        there = recorded_configuration(folder)
        if there is not None:
            return as_recorded(config, there)
    return config


def compare(original: Path, out: Path) -> int:
    """Say how a repetition compares with its original; the exit status."""
    equal, different = differences(original, out)
    for line in different:
        print(f"differs from {original}: {line}")
    if equal:
        print(f"identical to {original}: {', '.join(equal)}")
    if not different:
        return 0
    then, now = recorded(original).environment, environment()
    changed = [
        f"{key} {then[key]} then, {now[key]} now"
        for key in ("versions", "variables", "platform", "backend", "device")
        if key in then and then[key] != now[key]  # version 0.1 recorded no variables
    ]
    print("; ".join(changed) or "versions, variables and device are those of the original")
    return 1


def out_of_memory(error: Exception) -> bool:
    """Whether the device or the host had no memory left."""
    # Computations queued on a CPU report it as INTERNAL, with the reason in words; products of
    # matrices there, by X- or YNNPACK, which need room for a copy, do not even say the reason.
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError)
        and any(
            sign in str(error)
            for sign in ("RESOURCE_EXHAUSTED", "Out of memory", "NNPACK operation failed")
        )
    )


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Interrupt again where an interrupt fell into a callback, whose exceptions Python drops.

    JAX has one in every garbage collection: without this, some Ctrl-C do nothing.
    """
    before, again = sys.unraisablehook, list[threading.Timer]()

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        again.append(threading.Timer(0.05, _thread.interrupt_main))
        again[-1].daemon = True
        again[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in again:
            timer.cancel()


@contextlib.contextmanager
def _ended_as_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP, which would end the process amid a write, as KeyboardInterrupt.

    So is whatever error comes of an interrupt: it may fall where a library makes another of it,
    such as between the opening of an archive's entry and its block. A signal that is ignored, as
    ``nohup`` does, stays so.
    """
    before: dict[signal.Signals, Any] = {}
    came = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        for each in before:  # what is being written is to be cleared away undisturbed
            if each != signal.SIGINT:  # the user's own way out, should that take long
                signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    except Exception as error:
        if came:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Output:
    """Standard output that takes what is printed after its reader has gone, and drops it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._unread():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._unread():
            self._stream.flush()

    @contextlib.contextmanager
    def _unread(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # What is still in the buffer would fail again as Python exits.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _lasting_output() -> Iterator[None]:
    """Standard streams that can be written to: closed ones lead nowhere, others may lose readers.

    A stream that cannot show a character shows a question mark.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed; the lowest free number is taken
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif name == "stdout" and hasattr(stream, "reconfigure"):
            with contextlib.suppress(ValueError, OSError):
                stream.reconfigure(errors="replace")
    output = cast(TextIO, _Output(sys.stdout))
    with contextlib.redirect_stdout(output):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                output.flush()


def run_script(
    config_type: type[Config],
    body: Callable[[Config], None],
    argv: Sequence[str] | None,
    prog: str,
) -> int:
    """Run a script's body on its parsed flags and return the exit status.

    Args:
      config_type: frozen dataclass of flags. A flag ``repeat`` names a run folder to repeat; a
        class attribute ``memory_flags`` says which flags lower the memory needed, ``earlier``
        what flags were by default in version 0.1 (see ``configuration.as_recorded``), a true
        ``many_programs`` that compiling takes as long as computing (see ``compile_lightly``).
      body: does the work; raises ``InputError`` for wrong input, in which arguments of the
        library become flags (see ``flags.in_flags``).
      argv: arguments without the program's name; ``None`` takes those of the process.
      prog: the script's name in messages.
    """
    config: Any = None
    with _lasting_output():
        try:
            config = parse_flags(config_type, argv, prog)
            original = flat(config).get("repeat")
            config = _continued(config) if original is None else recorded_config(config, prog)
            use_compilation_cache()
            one_thread_for_lapack()
            if getattr(config_type, "many_programs", False):
                compile_lightly()
            with _ended_as_interrupted(), _interrupts_kept():
                body(config)
            status = 0 if original is None else compare(original, flat(config)["out"])
            sys.stdout.flush()  # a full disk shows here, not while Python exits
            return status
        except InputError as error:
            return _failed(prog, in_flags(str(error), names(config_type)))
        except OSError as error:
            # The disk, its permissions or limits: what was finished is kept, nothing half-written.
            out = flat(config).get("out") if config else None
            # Of a copy, the file that was written is the second one.
            file = error.filename2 or error.filename
            where = f"{file}: " if file else f"--out {out}: " if out else ""
            return _failed(prog, f"{where}{error.strerror or error}{_continues(config)}")
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not out_of_memory(error):
                raise
            flags = getattr(config_type, "memory_flags", "")
            return _failed(prog, "out of memory" + (f"; lower {flags}" if flags else ""))
        except KeyboardInterrupt:
            # What JAX cleans up at exit takes a while: a second signal would end in a traceback.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                atexit.register(signal.signal, number, signal.SIG_IGN)
            print(f"{prog}: interrupted{_continues(config)}", file=sys.stderr)
            return 130


def notice(text: str | None) -> None:
    """Print a line on standard error, if there is one and this process is to print."""
    if text is not None and is_writer():
        print(f"note: {text}", file=sys.stderr)


def _failed(prog: str, message: str) -> int:
    """Print one line and return the exit status."""
    # Names in hostile files may hold what moves a terminal's cursor.
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    print(f"{prog}: error: {line}", file=sys.stderr)
    return 2


def _continues(config: Any) -> str:
    """How to go on after a stop, for scripts that can and were not only drawing."""
    values = flat(config) if config else {}
    resumes = "resume" in values and not values.get("redraw")
    return "; the same command with --resume continues" if resumes else ""
