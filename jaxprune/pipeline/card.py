"""The model card of a pruned checkpoint: README.md with metadata that the hub reads.

A card holds nothing that differs between two runs of the same settings, no date, duration or place
on the disk, so that a repeated or resumed run writes the same bytes.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np

from jaxprune import hub
from jaxprune.baselines import BASELINES
from jaxprune.models.llama.checkpoint import TABLE
from jaxprune.models.llama.config import LlamaConfig
from jaxprune.models.llama.files import CARD_FILE, LICENCE_FILES
from jaxprune.models.llama.sources import hub_name
from jaxprune.pipeline.model import descent_steps, distillation_steps
from jaxprune.pipeline.settings import PruneSettings
from jaxprune.text.corpora import NAMED

HOME = "https://github.com/jaxprune/jaxprune"
# What of a source's metadata holds for the pruned model too.
_KEPT = ("license", "license_name", "license_link", "language")
_LONGEST = 300  # characters of a value of metadata
_IN_A_FILE = "see-file"  # as `license_name`, of a licence that no card names
# Names in checkpoint files, as a user of `transformers` knows them.
_PROJECTIONS = {entry.path: entry.name.split(".")[-2] for entry in TABLE if "layers" in entry.name}
_BOS = {
    "one": "one BOS in all",
    "each": "a BOS before each",
    "document": "a BOS before each document, which is then cropped",
    "none": "no BOS",
}


@dataclass(frozen=True)
class Outcome:
    """What a run found and a card tells.

    Attributes:
      texts: protocols of the windows, ``calibration`` and ``heldout``.
      zeros: entries removed, of all pruned matrices together.
      achieved: fraction of them, of the entries of all pruned matrices.
      parameters: of the model.
      achieved_sparsity: fraction of zeros in every pruned matrix, one number a block.
      attention_error: rows with ``layer``, ``head``, ``calibration_error``, ``heldout_error``.
    """

    texts: Mapping[str, Mapping[str, Any]]
    zeros: int
    achieved: float
    parameters: int
    achieved_sparsity: Mapping[str, Sequence[float]]
    attention_error: Sequence[Mapping[str, Any]]


def model_card(
    model: str,
    source: Path,
    settings: PruneSettings,
    config: LlamaConfig,
    dtype: str,
    outcome: Outcome,
) -> str:
    """The text of README.md: metadata in YAML, then what was done, in Markdown.

    Args:
      model: the name that the model was asked for by, as ``files.locate`` takes it.
      source: folder of the dense checkpoint; its own card and licence are read.
      settings: of the run.
      config: shape of the model.
      dtype: of weights and activations in the run.
      outcome: what came of it.
    """
    known = source_metadata(source)
    repository = hub_name(model)
    kept: dict[str, Any] = {name: known.get(name) for name in _KEPT}
    data = huggingface_hub.ModelCardData(
        base_model=repository or known.get("base_model"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["jaxprune", "pruned", "sparse"],
        **kept,
    )
    name = code(repository or os.path.basename(os.path.abspath(model)))
    sections = [
        f"# {name}, pruned",
        _what(name, repository, settings, config, outcome),
        "## How it was pruned",
        _how(settings, config, dtype, outcome),
        "## How far it is from the dense model",
        _errors(outcome.attention_error),
        "## How to use it",
        _use(repository or ("zoo" if model == "zoo" else "DENSE"), dtype, outcome),
        "## What the zeros are worth",
        _worth(settings),
        "## Licence",
        _licence(known, source),
    ]
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n" + "\n\n".join(sections) + "\n"


def source_metadata(source: Path) -> dict[str, Any]:
    """What the card of a checkpoint says of its licence, language and base model.

    Without a card that states a licence, a licence file is named instead. What is no plain text of
    reasonable length, and a base model that is no name on the hub, is left out.
    """
    try:
        stated = huggingface_hub.metadata_load(source / CARD_FILE) or {}
    except Exception:  # noqa: BLE001 - no card, or one that YAML's parser raises anything for
        stated = {}
    found = {name: _plain(stated.get(name)) for name in (*_KEPT, "base_model")}
    bases = found.pop("base_model")
    names = [bases] if isinstance(bases, str) else bases or []
    if names and all(name.isascii() and hub.is_repository(name) for name in names):
        found["base_model"] = bases
    named = [f for f in licence_files(source) if re.fullmatch(r"[\w.-]+", f, re.ASCII)]
    if found["license"] is None and named:
        found |= {"license": "other", "license_name": _IN_A_FILE, "license_link": named[0]}
    return {name: value for name, value in found.items() if value is not None}


def licence_files(source: Path) -> list[str]:
    """Names of the files of a checkpoint that state its licence and what it asks for."""
    return sorted({f.name for p in LICENCE_FILES for f in source.glob(p) if f.is_file()})


def _plain(value: Any) -> str | list[str] | None:
    """A text, or a list of texts, of one line each; ``None`` for anything else."""
    texts = value if isinstance(value, list) else [value]
    fine = [isinstance(t, str) and t.isprintable() and 0 < len(t) <= _LONGEST for t in texts]
    return value if fine and all(fine) else None


def code(text: str) -> str:
    """A text of any origin as a code span of Markdown, in which nothing is markup."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    # A span's first and last character may not be a backtick; one space on both sides is dropped.
    padded = f" {text} " if text.startswith(("`", " ")) or text.endswith(("`", " ")) else text
    return f"{fence}{padded or '?'}{fence}"


def _what(
    name: str,
    repository: str | None,
    settings: PruneSettings,
    config: LlamaConfig,
    outcome: Outcome,
) -> str:
    dense = f"[{name}](https://huggingface.co/{repository})" if repository else name
    names = ", ".join(f"`{_PROJECTIONS[each]}`" for each in settings.names)
    return (
        f"{dense} with zeros in {names} of all {config.num_hidden_layers} blocks, "
        f"{outcome.zeros:,} of its {outcome.parameters:,} parameters "
        f"({outcome.zeros / outcome.parameters:.1%}), by [jaxprune]({HOME}). What was not pruned "
        "is as in the dense model, to the bit."
    )


def _how(settings: PruneSettings, config: LlamaConfig, dtype: str, outcome: Outcome) -> str:
    each = [v for values in outcome.achieved_sparsity.values() for v in values]
    fit, heldout = (_windows(outcome.texts[name]) for name in ("calibration", "heldout"))
    if settings.generated:
        fit += f"; and on {settings.generated:,} more that the dense model wrote"
    rows = {
        "Method": f"`{settings.method}`: {method_in_words(settings, config)}",
        "Sparsity": f"{_asked(settings)}; achieved: {_range(outcome.achieved, each)}",
        "Calibrated on": fit,
        "Held out": heldout,
        "Computed in": f"{dtype}, seed {settings.seed}",
    }
    lines = "\n".join(f"- **{title}**: {text}" for title, text in rows.items())
    return (
        f"{lines}\n\n`pruning.json` has all settings, versions, the hashes of what was read and "
        "the error of every head; `keep_masks.npz` is true where a weight stayed, "
        "`[inputs, outputs]`, by block and matrix (`0.wq`)."
    )


def method_in_words(settings: PruneSettings, config: LlamaConfig) -> str:
    """What a method did, step after step, in one sentence without its full stop."""
    qk = settings.targets == "qk"
    steps = f"{descent_steps(settings, config)} steps a block"
    if settings.gradual:
        aim = "the attention matrices" if qk else "the output of the block"
        parts = [f"a descent on {aim} from dense weights, under a mask that tightens, {steps}"]
    elif settings.closed_form:
        curvature = "predictions" if settings.on_predictions else "attention matrices"
        parts = [f"masks and weights in closed form, on the curvature of the {curvature}"]
        if settings.rounds > 1:
            parts[0] += f", taken anew in each of {settings.rounds} rounds"
    else:
        parts = [f"{BASELINES[settings.first].label}, on the inputs of every matrix"]
    if settings.refits and not settings.gradual:
        aim = "what attention computes" if qk else "the output of the block"
        parts.append(f"then kept weights adapted to {aim}, {steps}")
    if settings.method == "descent" and not settings.refits:
        parts.append("of which the mask alone was taken: kept weights are the dense model's")
    if distilled := distillation_steps(settings, config):
        parts.append(f"then all of them to the dense model's predictions, {distilled} steps")
    if not settings.propagate:
        parts.append("every block on the activations of the dense model")
    return "; ".join(parts)


def _asked(settings: PruneSettings) -> str:
    sparsity = settings.sparsity
    if sparsity.n is not None:
        return f"{sparsity.n} of every {sparsity.m} inputs kept ({sparsity})"
    if settings.allocate == "matrix":
        return f"{sparsity} of every matrix"
    whole = "the model" if settings.allocate == "model" else "each block"
    return (
        f"{sparsity} of all pruned matrices of {whole} together, between {settings.lowest:g} and "
        f"{settings.highest:g} of each, where the predictions feel it least"
    )


def _range(achieved: float, fractions: Sequence[float]) -> str:
    least, greatest = min(fractions), max(fractions)
    spread = f", from {least:.4f} to {greatest:.4f} of a matrix" if least < greatest else ""
    return f"{achieved:.4f}{spread}"


def _windows(protocol: Mapping[str, Any]) -> str:
    corpus, count, seqlen = (protocol[name] for name in ("corpus", "windows", "seqlen"))
    named = code(corpus if corpus in NAMED else Path(corpus).name)
    split = "" if protocol["split"] == "all" else f" ({protocol['split']})"
    return (
        f"{count:,} windows of {seqlen:,} tokens, {count * seqlen:,} in all, of {named}{split}, "
        f"{_BOS[protocol['bos']]}"
    )


def _errors(rows: Sequence[Mapping[str, Any]]) -> str:
    fit, heldout = ([r[f"{name}_error"] for r in rows] for name in ("calibration", "heldout"))
    return (
        "Relative error of the attention matrices, `|F̃ − F|² / |F|²`, mean of "
        f"{len(rows):,} heads: **{np.mean(heldout):.3g} on held-out text**, {np.mean(fit):.3g} on "
        f"the text calibrated on; the worst head has {max(heldout):.3g} held-out.\n\n"
        "![Error of every head, and its mean by layer](summary.png)\n\n"
        "The perplexity of this checkpoint was not taken; see below."
    )


def _use(dense: str, dtype: str, outcome: Outcome) -> str:
    protocol = outcome.texts["calibration"]
    text = protocol["corpus"] if protocol["corpus"] in NAMED else "TEXT.txt"
    more = f"--text {text} --seqlen {protocol['seqlen']}"
    more += "" if dtype == "float32" else f" --dtype {dtype}"
    return (
        "With `transformers`, as any other model; `FOLDER` is where this file is, or the name on "
        "the hub:\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        "```\n\n"
        "Its perplexity and that of the dense model:\n\n"
        "```sh\n"
        "pip install 'jaxprune[cli,hub]'\n"
        f"jaxprune perplexity --model FOLDER {more}\n"
        f"jaxprune perplexity --model {dense} {more}\n"
        "```"
    )


def _worth(settings: PruneSettings) -> str:
    text = (
        "Zeros are stored like any other number, so the files are as large as the dense model's; "
        "and common runtimes multiply by them, so nothing is faster."
    )
    if (settings.sparsity.n, settings.sparsity.m) == (2, 4):
        text += (
            " Some GPUs have instructions for 2:4, but a runtime has to use them: vLLM no longer "
            "runs 2:4 checkpoints."
        )
    return text


def _licence(known: Mapping[str, Any], source: Path) -> str:
    files = licence_files(source)
    copied = f" {', '.join(map(code, files))}: copied from the dense model." if files else ""
    stated = known.get("license")
    if stated is None and not files:
        return "None is stated beside the dense model: ask its authors."
    names = stated if isinstance(stated, list) else [stated]
    if names == ["other"]:
        names = [known.get("license_name")]
    if names in ([None], [_IN_A_FILE]):
        return f"That of the dense model.{copied}"
    return f"That of the dense model, {', '.join(map(code, names))}.{copied}"
