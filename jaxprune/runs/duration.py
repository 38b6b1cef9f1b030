"""How long a run will take, by the times of an earlier one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from jaxprune.errors import InputError
from jaxprune.runs.metrics import read_metrics
from jaxprune.storage import read_json


def estimate(names: Sequence[str], measured: Path, column: str, seconds: str) -> str:
    """A line on how long rows take; those that the earlier run lacks count as its mean.

    Args:
      names: of the rows, one for each that is to be computed.
      measured: folder of the earlier run.
      column: of its metrics, with such names.
      seconds: the column with their times.
    """
    count = f"{len(names)} rows"
    try:
        metrics = read_metrics(measured, (column, seconds))
        environment = read_json(measured / "environment.json")
    except InputError:
        return f"{count}; no times of an earlier run are known here"
    times = metrics.groupby(column)[seconds].mean()
    total = sum(times.get(name, times.mean()) for name in names)
    shown = f"{max(1, math.ceil(total / 60))} min" if total < 6000 else f"{total / 3600:.1f} h"
    return (
        f"{count}; about {shown} by the times in {measured}, measured with its settings on "
        f"{environment.get('cpu_count')} cores ({environment.get('device')}, "
        f"{environment.get('platform')})"
    )
