"""Several jobs of one process at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor


@contextlib.contextmanager
def in_background(threads: int) -> Iterator[Executor]:
    """Threads that take jobs in the order in which they are submitted.

    Where the context ends early, by an interrupt for instance, jobs that have begun come to their
    end and the others never begin.

    Args:
      threads: jobs at once.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
