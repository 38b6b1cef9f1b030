"""Tables of pages from saved metrics of ``ablation.py``, ``real.py`` and the paper's experiments.

The table is printed. With ``--write`` it is put between the markers of a page, and the run's
metrics and settings are copied to a folder in ``docs``, from where the table can be written again
without the run.

Example:
  python tools/headline.py --run runs/headline --write
  python tools/headline.py --run docs/smollm2 --page README.md --rows 'all-0.5-*' --brief --write
  python tools/headline.py --run runs/synthetic --page docs/results.md --write
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from jaxprune.errors import InputError
from jaxprune.evaluation import rows
from jaxprune.runs import plotting
from jaxprune.runs.flags import Flag, Maybe, Several
from jaxprune.runs.folder import keep_record
from jaxprune.runs.metrics import Columns, drawing_again, read_metrics
from jaxprune.runs.script import run_script
from jaxprune.storage import read_json, replacing

METHODS = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "admm": "ADMM",
    "closed_form": "closed form",
    "mask_only": "descent, kept weights untouched",
    "wanda_retrained": "Wanda, retrained",
    "sparsegpt_retrained": "SparseGPT, retrained",
    "admm_retrained": "ADMM, retrained",
    "descent": "**descent**",
    "descent_longer": "descent, one budget a block, twice the distillation",
}
COLUMNS = Columns(
    (
        *("seed", "calibration_error", "heldout_error"),
        *("divergence", "perplexity_gap", "dense_perplexity"),
    ),
    texts=("variant", "sparsity"),
    sparse=("seconds",),
)
# Of a run whose variants are more than methods.
PARTS = Columns((*COLUMNS.numbers, "seconds", "peak_memory"), (*COLUMNS.texts, "description"))
SETTINGS = {"model": str, "calibration": str, "windows": int, "seqlen": int, "seeds": int}
OPTIONAL = {"text": str | None, "steps": int | None}
PRUNED = {"qk": "`W_Q` and `W_K`", "all": "All linear maps"}
# Files that tables are written from, the first that there is: a run's means over seeds or heads, of
# which a page shows some, its metrics, and by --record what synthetic.py compares at equal storage.
RECORDS = ("summary.csv", "metrics.csv", "equal_storage.csv")
FIGURE2 = Columns(
    ("exponent", "k", "calibration", "calibration_se", "heldout", "heldout_se"),
    texts=("setting", "method"),
)
FIGURE3 = Columns(("ratio", "heldout", "heldout_p10", "heldout_p90"), texts=("method",))
FUSED = Columns(("ratio", "perplexity"), texts=("method", "corpus"))
STORAGE = Columns(
    ("exponent", "k", "stored_weights", "separate_ratio", "fused_ratio"), texts=("setting",)
)
REGIMES = Columns(
    ("logits_std", "tokens_per_entry", "gap", "calibration", "heldout"),
    texts=("data",),
    sparse=("closed_form",),
)
_OVER = " `over`: interrupted, of the last process alone."
REAL_SETTINGS = {"eval_windows": int, "eval_seqlen": int, "heldout": int}


@dataclass(frozen=True)
class Config:
    """Print the table of a run, or write it into a page.

    Example: python tools/headline.py --run runs/headline --write
    """

    run: Path = Path("docs/headline")
    """folder of a finished run of an experiment, or what is kept of it"""
    write: Flag = False
    """put the table between the markers of --page, and keep the run in --saved"""
    page: Path = Path("README.md")
    """file with the markers"""
    saved: Maybe[Path] = None
    """where metrics and settings are kept, named as the markers are; if left out, --run in docs"""
    record: Maybe[str] = None
    """file of the run that the table is written from; if left out, its summary or its metrics"""
    rows: Several[str] = ()
    """rows of a run of real.py by name or pattern, such as 'all-0.5-*'; if left out, all"""
    brief: Flag = False
    """of a run of real.py: few columns, and one sentence on how it was measured"""


def settings_of(run: Path, also: Mapping[str, type]) -> dict[str, Any]:
    """What the run in a folder was made with, checked."""
    file = run / "config.json"
    settings = read_json(file)
    asked = {**SETTINGS, **OPTIONAL, **also}
    # What may be missing by its type must be there all the same.
    wrong = [name for name, kind in asked.items() if not isinstance(settings.get(name, ...), kind)]
    if wrong:
        raise InputError(
            f"{file}: {wrong[0]} missing or damaged; not a run of ablation.py or real.py"
        )
    return settings


def table_of(
    run: Path, patterns: Sequence[str] = (), *, brief: bool = False, record: str | None = None
) -> str:
    """The table of a run, by the columns of its metrics.

    Metrics without methods, such as those of another program, are shown as they are.

    Args:
      run: its folder.
      patterns: of the rows of a run of real.py.
      brief: few columns and one sentence, of a run of real.py.
      record: file of the run; see ``record_of``.
    """
    record = record_of(run, record)
    metrics = read_metrics(run, table=record)
    if (patterns or brief) and "row" not in metrics:
        raise InputError(f"{'rows' if patterns else 'brief'}: only of a run of real.py")
    for columns, shown_by in EXPERIMENTS:
        if {*columns.numbers, *columns.texts} <= set(metrics):
            columns.check(metrics, f"{run / record}")
            return shown_by(metrics)
    if "variant" in metrics:
        COLUMNS.check(metrics, f"{run / 'metrics.csv'}")
        if "description" in metrics and not set(metrics["variant"]) <= set(METHODS):
            PARTS.check(metrics, f"{run / 'metrics.csv'}")
            return parts_table(metrics, settings_of(run, {}), machine_of(run))
        return table(metrics, settings_of(run, {}), machine_of(run))
    if "method" not in metrics:
        return metrics.to_markdown(index=False, disable_numparse=True)
    rows.COLUMNS.check(metrics, f"{run / 'metrics.csv'}")
    settings = settings_of(run, REAL_SETTINGS)
    names = list(dict.fromkeys(metrics["row"]))
    dense = metrics["method"] == rows.DENSE
    shown = metrics[metrics["row"].isin(rows.chosen(names, patterns)) | dense]
    if brief:
        return brief_table(shown, settings, machine_of(run))
    return real_table(shown, settings, machine_of(run))


def machine_of(run: Path) -> str:
    """What a run was timed on."""
    environment = read_json(run / "environment.json")
    return f"{environment.get('cpu_count')} cores ({environment.get('device')})"


def record_of(run: Path, wanted: str | None = None) -> str:
    """The file of a run that its page is written from: the one wanted, or that which is there."""
    there = [name for name in RECORDS if (run / name).is_file()]
    return wanted or (there or ["metrics.csv"])[0]


def figure2(summary: pd.DataFrame) -> str:
    """The paper's Figure 2 at one length and ratio, from the summary of synthetic.py."""

    def cell(row: pd.Series) -> tuple[str, str]:
        errors = (_measured(row[n], row[f"{n}_se"]) for n in ("calibration", "heldout"))
        return f"{_setting(row)}, k = {row['k']}", " / ".join(errors)

    return _by_method(summary, cell)


def figure3(summary: pd.DataFrame) -> str:
    """The paper's Figure 3, from the summary of llama_heads.py: mean and deciles of heads."""

    def cell(row: pd.Series) -> tuple[str, str]:
        spread = f"{row['heldout_p10']:.2g}–{row['heldout_p90']:.2g}"
        return f"{row['ratio']:.4g}", f"{row['heldout']:.2g} ({spread})"

    return _by_method(summary.sort_values("ratio", kind="stable"), cell)


def fused(metrics: pd.DataFrame) -> str:
    """Perplexities of fused_perplexity.py, a column for each ratio."""
    return _by_method(metrics, lambda row: (f"{row['ratio']:g}", f"{row['perplexity']:.2f}"))


def regimes(summary: pd.DataFrame) -> str:
    """Ratios of errors of regimes.py, least and greatest over the scales of the logits."""
    titles = {
        "gap": "Algorithm 1: fresh / calibration",
        "calibration": "Algorithm 1 / magnitude, calibration",
        "heldout": "Algorithm 1 / magnitude, fresh",
        "closed_form": "closed form / magnitude, fresh",
    }
    lines = []
    for (data, tokens), here in summary.groupby(["data", "tokens_per_entry"], sort=False):
        ends = {title: (here[name].min(), here[name].max()) for name, title in titles.items()}
        spans = {title: f"{low:.2g} to {high:.2g}" for title, (low, high) in ends.items()}
        lines.append({"data": str(data), "tokens per mask entry": f"{tokens:g}", **spans})
    return _markdown(lines)


def equal_storage(table: pd.DataFrame) -> str:
    """Where a fused mask removes more than masks on the projections, from synthetic.py."""
    methods = [name for name in table if name in plotting.STYLES]
    lines = []
    for _, row in table[table["fused_ratio"] > table["separate_ratio"]].iterrows():
        least = row[methods].astype(float).idxmin()
        errors = {
            _named(name): f"**{row[name]:.3g}**" if name == least else f"{row[name]:.3g}"
            for name in methods
        }
        lines.append(
            {
                "activations and weights": _setting(row),
                "weights": f"{row['stored_weights']}",
                "removed of `W_Q`, `W_K`": f"{row['separate_ratio']:g}",
                "of the fused": f"{row['fused_ratio']:g}",
                **errors,
            }
        )
    return _markdown(lines)


def _setting(row: pd.Series) -> str:
    """How the activations and weights of a row of synthetic.py were drawn."""
    return f"`{row['setting']}`" + f", exponent {row['exponent']:g}" * bool(row["exponent"])


def _by_method(metrics: pd.DataFrame, cell: Callable[[pd.Series], tuple[str, str]]) -> str:
    """A line for each method; of its rows, column and text are what ``cell`` says."""
    lines = []
    for method, there in metrics.groupby("method", sort=False):
        cells = dict(cell(row) for _, row in there.iterrows())
        lines.append({"method": _named(str(method)), **cells})
    return _markdown(lines)


def _named(method: str) -> str:
    """A method as figures name it."""
    label = method if method == rows.DENSE else plotting.style(method).label
    return re.sub(r"\$(\w+)\$", r"`\1`", label)


def _measured(mean: float, error: float) -> str:
    """A mean and its standard error, to two digits of the error."""
    digits = 1 - math.floor(math.log10(error)) if error > 0 else 3
    return f"{mean:.{max(digits, 0)}f} ± {error:.{max(digits, 0)}f}"


def _markdown(lines: Sequence[Mapping[str, str]]) -> str:
    return pd.DataFrame(lines).fillna("").to_markdown(index=False, disable_numparse=True)


def brief_table(metrics: pd.DataFrame, config: dict[str, Any], machine: str) -> str:
    """The table of real.py, for the first page."""
    text = config["text"] or config["calibration"]
    seeds = _seeds(metrics)
    several = f"; mean ± half the range of {seeds}" * bool(seeds)
    return (
        f"{rows.table(metrics, rows.BRIEF)}\n\n"
        f"`{config['model']}`, calibrated on {config['windows']} windows of {config['seqlen']} "
        f"tokens of `{config['calibration']}`; perplexity on `{text}`{several}; {machine}."
    )


def real_table(metrics: pd.DataFrame, config: dict[str, Any], machine: str) -> str:
    """The table of real.py, and sentences on how it was measured."""
    text = config["text"] or config["calibration"]
    steps = "the preset's" if config["steps"] is None else config["steps"]
    seeds = _seeds(metrics)
    several = f" With ±: mean and half the range of {seeds}." * bool(seeds)
    return (
        f"{rows.table(metrics)}\n\n"
        f"`{config['model']}`, calibrated on {config['windows']} windows of {config['seqlen']} "
        f"tokens of `{config['calibration']}`; perplexity and KL divergence from the dense model's "
        f"predictions on windows of {config['eval_seqlen']} tokens of `{text}`, at most "
        f"{config['eval_windows']}; attention error: mean over heads, held-out on "
        f"{config['heldout']} windows more. Budget: what shares the budget of zeros. Retraining: "
        f"kept weights adapt block by block, and all together at the end; steps a block: {steps}, "
        "where a row does not say. Seconds and peak memory are those of pruning, each row in a "
        "process of its own, compiling included where the programs were not kept, on "
        f"{machine}.{several}{_OVER * _interrupted(metrics)} In bold the best of equal "
        "maps and sparsity."
    )


def _interrupted(metrics: pd.DataFrame) -> bool:
    """Whether seconds of some rows are of a process that went on with another's work."""
    return "resumed" in metrics and bool(metrics["resumed"].any())


def _seeds(metrics: pd.DataFrame) -> str:
    """How many seeds there are, where a row has several."""
    counts = metrics.groupby("row")["seed"].nunique()
    several = sorted(set(counts[counts > 1]))
    return f"{' or '.join(map(str, several))} seeds" if several else ""


def table(metrics: pd.DataFrame, config: dict[str, Any], machine: str) -> str:
    """A Markdown table of methods by sparsity, and a sentence on how it was measured."""
    for sparsity, rows_there in metrics.groupby("sparsity"):
        present = set(rows_there["variant"])
        missing = [name for name in ("descent", "wanda", "sparsegpt") if name not in present]
        if missing:
            raise InputError(
                f"--run: no rows of {', '.join(missing)} at sparsity {sparsity} in its metrics; "
                "see --help"
            )
    lines: list[dict[str, str]] = []
    for sparsity in dict.fromkeys(metrics["sparsity"]):
        for name, label in METHODS.items():
            here = metrics[(metrics["sparsity"] == sparsity) & (metrics["variant"] == name)]
            if here.empty:
                continue
            lines.append({"sparsity": str(sparsity), "method": label, **_cells(here)})
    retrained = any(name.endswith("_retrained") for name in metrics["variant"])
    fair = "Retrained: refit and 300 steps of distillation, as descent. " * retrained
    return f"{_markdown(lines)}\n\n{_protocol(metrics, config, machine, fair)}"


def parts_table(metrics: pd.DataFrame, config: dict[str, Any], machine: str) -> str:
    """All variants of a run of ablation.py, least divergence first, with time and memory."""
    lines = []
    for (sparsity, _), here in sorted(
        metrics.groupby(["sparsity", "variant"], sort=False),
        key=lambda group: (group[0][0], group[1]["divergence"].mean()),
    ):
        peak = f"{here['peak_memory'].max():.1f}"
        words = {"sparsity": str(sparsity), "variant": here["description"].iloc[0]}
        lines.append({**words, **_cells(here), "peak GiB": peak})
    return f"{_markdown(lines)}\n\n{_protocol(metrics, config, machine)}"


def _cells(here: pd.DataFrame) -> dict[str, str]:
    """What is measured of one variant at one sparsity, over seeds."""
    return {
        "perplexity": rows.spread(here["perplexity_gap"] + here["dense_perplexity"]),
        "KL divergence": rows.spread(here["divergence"]),
        "attention error, held-out": rows.spread(here["heldout_error"]),
        "on calibration": rows.spread(here["calibration_error"]),
        "seconds": f"{'over ' * _interrupted(here)}{here['seconds'].mean():.0f}",
    }


def _protocol(metrics: pd.DataFrame, config: dict[str, Any], machine: str, more: str = "") -> str:
    """Sentences on how a run of ablation.py was measured."""
    text = config["text"] or config["calibration"]
    steps = "the preset's" if config["steps"] is None else config["steps"]
    return (
        f"{PRUNED[config.get('targets', 'qk')]} of every layer of `{config['model']}`; dense "
        f"perplexity {metrics['dense_perplexity'].iloc[0]:.2f}. {more}"
        f"Calibrated on {config['windows']} windows of {config['seqlen']} tokens of "
        f"`{config['calibration']}`; perplexity, KL divergence from the dense model's predictions "
        f"(nats) and held-out error on text of `{text}` that was not calibrated on; "
        f"{steps} steps a block. Mean of {config['seeds']} seeds ± half their range; there is no "
        f"chance in baselines that are not retrained. Seconds on {machine}."
        f"{_OVER * _interrupted(metrics)}"
    )


EXPERIMENTS = (
    (FIGURE2, figure2),
    (FIGURE3, figure3),
    (FUSED, fused),
    (REGIMES, regimes),
    (STORAGE, equal_storage),
)


def markers(name: str, options: str = "") -> tuple[str, str]:
    """Lines of a page that a table stands between; the first says which rows it has."""
    chosen = f" {options}" if options else ""
    return f"<!-- {name}: written by tools/headline.py{chosen} -->", f"<!-- end of {name} -->"


def options_of(patterns: Sequence[str], *, brief: bool) -> str:
    """Flags that choose what a table shows."""
    flags = ["--rows", *patterns] if patterns else []
    return shlex.join(flags + ["--brief"] * brief)


def replaced(page: str, text: str, name: str, file: Path, options: str = "") -> str:
    """``page``, of ``file``, with ``text`` between the markers ``name``."""
    first, last = markers(name, options)
    begin = re.compile(rf"<!-- {re.escape(name)}: written by tools/headline\.py[^\n]* -->")
    places = list(begin.finditer(page))
    if len(places) != 1 or page.count(last) != 1 or page.index(last) < places[0].end():
        raise InputError(
            f"--page {file}: expected one line `{markers(name)[0]}` and then one `{last}`"
        )
    after = page[page.index(last) :]
    return f"{page[: places[0].start()]}{first}\n{text}\n{after}"


def body(config: Config) -> None:
    """Read, print, write."""
    with drawing_again(config.run):
        text = table_of(config.run, config.rows, brief=config.brief, record=config.record)
    print(text)
    if not config.write:
        return
    saved = config.saved or Path("docs") / config.run.name
    if not config.page.is_file():
        raise InputError(f"--page {config.page}: no such file")
    try:
        page = config.page.read_text(encoding="utf-8")
    except ValueError:
        raise InputError(f"--page {config.page}: not text in UTF-8") from None
    options = options_of(config.rows, brief=config.brief)
    page = replaced(page, text, saved.name, config.page, options)
    keep_record(config.run, saved, "saved", metrics=record_of(config.run, config.record))
    with replacing(config.page) as partial:
        partial.write_text(page, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, "headline.py")


if __name__ == "__main__":
    sys.exit(main())
