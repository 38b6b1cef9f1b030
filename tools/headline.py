"""The README's table, from the saved metrics of ``ablation.py``.

``make headline`` makes the run and then calls this script. It copies the run's metrics and
settings to ``docs/headline``, from where the table can be written again without the run, and puts
the table between the markers of the README.

Example:
  python tools/headline.py --run runs/headline
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from jaxprune.errors import InputError
from jaxprune.runs.flags import Flag
from jaxprune.runs.metrics import Columns, drawing_again, read_metrics
from jaxprune.runs.script import run_script
from jaxprune.storage import check_writable, read_json, replacing

KEPT = ("metrics.csv", "config.json", "environment.json")
METHODS = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "mask_only": "descent, kept weights untouched",
    "descent": "**descent**",
}
COLUMNS = Columns(
    (
        *("seed", "calibration_error", "heldout_error"),
        *("divergence", "perplexity_gap", "dense_perplexity"),
    ),
    texts=("variant", "sparsity"),
)
SETTINGS = {"model": str, "calibration": str, "windows": int, "seqlen": int, "steps": int}
SETTINGS |= {"seeds": int}
SAVED = Path("docs/headline")
# Part of the dense perplexity below which what Wanda adds is not compared with.
_SOMETHING = 0.01


@dataclass(frozen=True)
class Config:
    """Write the table of the README from a run of ablation.py.

    Example: python tools/headline.py --run runs/headline
    """

    run: Path = SAVED
    """folder of a finished run of ablation.py"""
    readme: Path = Path("README.md")
    """file with the markers"""
    saved: Path = SAVED
    """where metrics and settings of the run are kept; its name is that of the markers"""
    show: Flag = False
    """only print the table"""


def spread(values: pd.Series) -> str:
    """Mean, and half the range where there are several seeds."""
    mean = values.mean()
    digits = 4 if mean < 0.1 else 3 if mean < 1 else 2
    text = f"{mean:.{digits}f}"
    if len(values) > 1:
        text += f" ± {(values.max() - values.min()) / 2:.{digits}f}"
    return text


def settings_of(run: Path) -> dict[str, Any]:
    """What the run of ablation.py in a folder was made with, checked."""
    file = run / "config.json"
    settings = read_json(file)
    wrong = [name for name, kind in SETTINGS.items() if not isinstance(settings.get(name), kind)]
    if not isinstance(settings.get("text", 0), str | None):
        wrong.append("text")
    if wrong:
        raise InputError(f"{file}: {wrong[0]} missing or damaged; not a run of ablation.py")
    return settings


def _shares_of_wanda(metrics: pd.DataFrame) -> str:
    """What is left of what Wanda adds to the perplexity, where that is something."""
    gaps = metrics.groupby(["sparsity", "variant"], sort=False)["perplexity_gap"].mean()
    dense = metrics["dense_perplexity"].iloc[0]
    shares = [
        f"1/{gaps[sparsity, 'wanda'] / gaps[sparsity, 'descent']:.0f} at {sparsity}"
        for sparsity in dict.fromkeys(metrics["sparsity"])
        if gaps[sparsity, "wanda"] > _SOMETHING * dense and gaps[sparsity, "descent"] > 0
    ]
    if not shares:
        return ""
    return f"Of what Wanda adds to the perplexity, descent adds {', '.join(shares)}. "


def table(metrics: pd.DataFrame, config: dict[str, Any]) -> str:
    """A Markdown table of methods by sparsity, and a sentence on how it was measured."""
    for sparsity, rows_there in metrics.groupby("sparsity"):
        present = set(rows_there["variant"])
        missing = [name for name in ("descent", "wanda", "sparsegpt") if name not in present]
        if missing:
            raise InputError(
                f"--run: no rows of {', '.join(missing)} at sparsity {sparsity} in its metrics; "
                "see --help"
            )
    dense = metrics["dense_perplexity"].iloc[0]
    rows: list[dict[str, str]] = []
    for sparsity in dict.fromkeys(metrics["sparsity"]):
        for name, label in METHODS.items():
            here = metrics[(metrics["sparsity"] == sparsity) & (metrics["variant"] == name)]
            if here.empty:
                continue
            rows.append(
                {
                    "pruned": str(sparsity),
                    "method": label,
                    "perplexity": spread(here["perplexity_gap"] + dense),
                    "divergence": spread(here["divergence"]),
                    "attention error, held-out": spread(here["heldout_error"]),
                    "on calibration": spread(here["calibration_error"]),
                }
            )
    shown = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    text = config["text"] or config["calibration"]
    return (
        f"{shown}\n\n"
        f"{_shares_of_wanda(metrics)}"
        f"`W_Q` and `W_K` of every layer of `{config['model']}`; dense perplexity {dense:.2f}. "
        f"Calibrated on {config['windows']} windows of {config['seqlen']} tokens of "
        f"`{config['calibration']}`; perplexity, divergence from the dense model's predictions "
        f"(nats) and held-out error on text of `{text}` that was not calibrated on; "
        f"{config['steps']} steps a block. Descents: mean of {config['seeds']} "
        "seeds ± half their range; the baselines have no randomness."
    )


def markers(name: str) -> tuple[str, str]:
    """Lines of the README that a table stands between."""
    return f"<!-- {name}: written by tools/headline.py -->", f"<!-- end of {name} -->"


def replaced(readme: str, text: str, name: str, file: Path) -> str:
    """The README, of ``file``, with ``text`` between the markers ``name``."""
    first, last = markers(name)
    before, begin, rest = readme.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end or readme.count(first) + readme.count(last) > 2:
        raise InputError(f"--readme {file}: expected one line `{first}` and then one `{last}`")
    return f"{before}{first}\n{text}\n{last}{after}"


def body(config: Config) -> None:
    """Read, write."""
    with drawing_again(config.run):
        text = table(read_metrics(config.run, COLUMNS), settings_of(config.run))
    print(text)
    if config.show:
        return
    if not config.readme.is_file():
        raise InputError(f"--readme {config.readme}: no such file")
    try:
        readme = config.readme.read_text(encoding="utf-8")
    except ValueError:
        raise InputError(f"--readme {config.readme}: not text in UTF-8") from None
    page = replaced(readme, text, config.saved.name, config.readme)
    for name in KEPT:
        if not (config.run / name).is_file():
            raise InputError(f"--run {config.run}: has no {name}")
    check_writable(config.saved, "saved")
    if config.run.resolve() != config.saved.resolve():
        for name in KEPT:
            shutil.copyfile(config.run / name, config.saved / name)
    with replacing(config.readme) as partial:
        partial.write_text(page, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, "headline.py")


if __name__ == "__main__":
    sys.exit(main())
