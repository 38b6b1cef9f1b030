"""A repetition of a run compared with its original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from jaxprune.runs.metrics import read_metrics
from jaxprune.storage import hashes, read_arrays


def differences(original: Path, repetition: Path) -> tuple[list[str], list[str]]:
    """Compare the results of two runs: metrics, arrays and weights.

    Returns:
      Names of files that are equal (metrics and arrays by value), and a line for each that is not.
    """
    original, repetition = Path(original), Path(repetition)
    equal, different = [], []
    for pattern in ("metrics.csv", "*.npz", "*.safetensors", "*/*.safetensors"):
        names = {
            path.relative_to(folder)
            for folder in (original, repetition)
            for path in folder.glob(pattern)
            if not path.name.startswith(".")
        }
        for name in sorted(names):
            found = _difference(original / name, repetition / name)
            if found is None:
                equal.append(str(name))
            else:
                different.append(f"{name}: {found}")
    return equal, different


def _difference(old: Path, new: Path) -> str | None:
    """How two result files differ, ``None`` where they do not."""
    for file in (old, new):
        if not file.is_file():
            return f"missing in {file.parent}"
    if hashes([old]) == hashes([new]):
        return None
    if old.suffix == ".npz":
        arrays, others = (read_arrays(file, "make the run anew") for file in (old, new))
        same = arrays.keys() == others.keys() and all(
            np.array_equal(arrays[name], others[name]) for name in arrays
        )
        return None if same else "other arrays"
    if old.suffix != ".csv":
        return "other bytes"
    tables = [read_metrics(file.parent) for file in (old, new)]
    if list(tables[0]) != list(tables[1]) or len(tables[0]) != len(tables[1]):
        return f"{tables[0].shape} rows and columns, then {tables[1].shape}, or other columns"
    return _column_differences(*tables)


def _column_differences(old: pd.DataFrame, new: pd.DataFrame) -> str | None:
    """Columns of two tables of one form that differ, numbers with their relative difference."""
    found = []
    for name in old:
        if old[name].equals(new[name]):
            continue
        if not all(pd.api.types.is_numeric_dtype(table[name]) for table in (old, new)):
            found.append(str(name))
            continue
        a, b = (table[name].to_numpy(float) for table in (old, new))
        scale = np.maximum(np.abs(a), np.abs(b))
        relative = np.abs(a - b) / np.where(scale > 0, scale, 1)
        found.append(f"{name} by up to {np.nanmax(relative, initial=0):.1e} of itself")
    return ", ".join(found) or None
