"""Runs: a folder each, metrics, repetition, the frame of every script, figures."""

from jaxprune.runs.configuration import configuration
from jaxprune.runs.folder import Recorded, RunFolder, environment, recorded
from jaxprune.runs.metrics import Columns, drawing_again, read_metrics
from jaxprune.runs.repetition import differences
from jaxprune.storage import (
    check_writable,
    hashes,
    read_arrays,
    read_json,
    replacing,
    write_arrays,
    write_json,
)

__all__ = [
    "Columns",
    "Recorded",
    "RunFolder",
    "check_writable",
    "configuration",
    "differences",
    "drawing_again",
    "environment",
    "hashes",
    "read_arrays",
    "read_json",
    "read_metrics",
    "recorded",
    "replacing",
    "write_arrays",
    "write_json",
]
