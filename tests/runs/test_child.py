"""Work in a process of its own: what comes back, what goes wrong there."""

import multiprocessing
import os
import signal

import pytest

from jaxprune.errors import InputError
from jaxprune.runs import child


def work(kind, report):
    """What a child may do; found by its name there."""
    report(f"doing {kind}")
    if kind == "input":
        raise InputError("text: too short")
    if kind == "memory":
        raise MemoryError
    if kind == "disk":
        raise OSError(28, "No space left on device", "file")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "defect":
        os._exit(3)
    return os.getpid(), child.peak_memory()


def served(monkeypatch, kind):
    """What a child would send, without one."""
    monkeypatch.setattr(child, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    here, there = multiprocessing.Pipe()
    child._serve(there, work, (kind,))
    return here.recv(), here.recv()


def test_progress_comes_before_the_result(monkeypatch):
    first, last = served(monkeypatch, "fine")
    assert first == ("progress", "doing fine")
    assert last[0] == "result"
    assert 0 < last[1][1] < 100


@pytest.mark.parametrize(
    ("kind", "error"), [("input", InputError), ("memory", MemoryError), ("disk", OSError)]
)
def test_errors_of_users_are_sent(monkeypatch, kind, error):
    sent = served(monkeypatch, kind)[-1]
    assert sent[0] == "error"
    assert isinstance(sent[1], error)


@pytest.mark.slow
def test_a_child_is_another_process_with_its_own_memory():
    heavy = bytearray(700 * 2**20)
    seen = []
    process, peak = child.in_child(work, "fine", progress=seen.append)
    assert process != os.getpid()
    assert seen == ["doing fine"]
    assert 0.05 < peak < child.peak_memory()
    assert child.peak_memory() > 0.6
    del heavy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("input", InputError, "text: too short"),
        ("disk", OSError, "No space left"),
        ("killed", MemoryError, "^$"),
        ("defect", RuntimeError, "ended with 3"),
    ],
)
def test_what_ends_a_child_ends_its_parent(kind, error, said):
    with pytest.raises(error, match=said):
        child.in_child(work, kind)
