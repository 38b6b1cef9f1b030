"""The metrics of a run as a table: written once, checked before anything is drawn from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from jaxprune.errors import InputError
from jaxprune.storage import replacing


class Columns(NamedTuple):
    """What the metrics of a script must have to be drawn.

    Attributes:
      numbers: columns of finite numbers.
      texts: columns of words.
      known: words that a column may have.
      sparse: columns of numbers that rows may lack.
      optional: sparse ones that runs of earlier versions lack altogether.
    """

    numbers: tuple[str, ...]
    texts: tuple[str, ...] = ()
    known: Mapping[str, Iterable[str]] = {}
    sparse: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def check(self, metrics: pd.DataFrame, where: str) -> None:
        """Raise ``InputError`` naming the first column that is not so, and ``where``."""
        asked = (*self.texts, *self.numbers, *self.sparse)
        _check_present(metrics, asked, where)
        sparse = (*self.sparse, *(name for name in self.optional if name in metrics))
        for name in (*self.texts, *self.numbers, *sparse):
            column = metrics[name]
            if name in self.texts:
                good = column.isin(list(self.known[name])) if name in self.known else column.notna()
            else:
                good = np.isfinite(pd.to_numeric(column, errors="coerce").astype(float))
                good |= column.isna() & (name in sparse)
            if not good.all():
                raise InputError(
                    f"{where}: {name} {column[~good].iloc[0]}, not a "
                    f"{'word of this script' if name in self.texts else 'finite number'}; damaged, "
                    "or another script's"
                )


def _check_present(metrics: pd.DataFrame, names: Iterable[str], where: str) -> None:
    missing = [name for name in names if name not in metrics]
    if missing or metrics.empty:
        what = f"no column {missing[0]}" if missing else "no rows"
        raise InputError(f"{where}: {what}; not the metrics of this script, or damaged")


def read_metrics(
    folder: Path, columns: Columns | Sequence[str] = (), *, table: str = "metrics.csv"
) -> pd.DataFrame:
    """The metrics of a run folder.

    Args:
      folder: of the run.
      columns: that must be there, by name or with what they must hold.
      table: file that holds them.

    Raises:
      InputError: there are none, or the file is damaged or another script's.
    """
    file = Path(folder) / table
    if not file.is_file():
        raise InputError(f"{file}: no such file; run the experiment first")
    try:
        metrics = pd.read_csv(file)
    except ValueError as error:  # what pandas raises for no table, and for no text
        raise InputError(f"{file}: not a table ({error})") from None
    if isinstance(columns, Columns):
        columns.check(metrics, f"{file}")
    else:
        _check_present(metrics, columns, f"{file}")
    return metrics


def write_table(table: pd.DataFrame, file: Path) -> None:
    """A table as CSV without its index, whole or not at all."""
    with replacing(file) as partial:
        table.to_csv(partial, index=False)


@contextlib.contextmanager
def drawing_again(folder: Path) -> Iterator[None]:
    """What a damaged ``metrics.csv`` of a folder leads to, beyond ``Columns``, as one line."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder / 'metrics.csv'}: cannot be drawn ({error}); damaged, or of another version"
        ) from error
