"""One piece of work in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxprune.errors import InputError
from jaxprune.runs.script import out_of_memory, use_compilation_cache

Result = TypeVar("Result")


def in_child(
    function: Callable[..., Result], *arguments: Any, progress: Callable[[Any], None] | None = None
) -> Result:
    """``function(*arguments, report)`` in a new process; both must be found by their names there.

    What the function passes to ``report`` comes to ``progress`` here. A child ends with its parent,
    and shares its folder of compiled programs.

    Args:
      function: of a module, or of the script that is running.
      arguments: that ``pickle`` can carry.
      progress: called with what the function reports.

    Raises:
      InputError, OSError, MemoryError: as in the child; MemoryError too if the system killed it.
      RuntimeError: the child failed by a defect, whose traceback it has printed.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, function, arguments), daemon=True)
    process.start()
    there.close()
    try:
        while True:
            kind, content = here.recv()
            if kind == "result":
                return content
            if kind == "error":
                raise content
            if progress is not None:
                progress(content)
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            raise MemoryError from None
        raise RuntimeError(f"the process of a row ended with {process.exitcode}") from None
    finally:
        if process.is_alive():
            process.join(timeout=0.1 if sys.exc_info()[0] else 10)
            process.terminate()
        process.join()


def peak_memory() -> float:
    """Most memory that this process has had so far, resident, in GiB.

    ``ru_maxrss`` is no less than what the parent held when it started this process: Linux has
    another count, which begins with the program.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _serve(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Call the function, in the child."""
    # An interrupt of the terminal reaches both processes: the parent says so and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    use_compilation_cache()
    try:
        answer = ("result", function(*arguments, lambda content: pipe.send(("progress", content))))
    except (InputError, OSError) as error:
        answer = ("error", error)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not out_of_memory(error):
            raise
        answer = ("error", MemoryError())
    pipe.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
