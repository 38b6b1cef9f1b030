r"""Write a task for lm-evaluation-harness from documents of your own: which continuation is true?

A question is the beginning of a document and four continuations, one its own, three from other
documents. The harness reads the files without a network, with any model that it can open::

    python tools/task_files.py --text c4.jsonl --skip 500 --out tasks
    cd tasks && lm_eval --model hf --model_args pretrained=../pruned --include_path . \
        --tasks continuation
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxprune.errors import InputError
from jaxprune.runs.script import run_script
from jaxprune.storage import check_new_folder, new_folder
from jaxprune.text.corpora import calibration_corpus

_TASK = """\
task: continuation
dataset_path: json
dataset_kwargs:
  data_files:
    test: continuation.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@dataclass(frozen=True)
class Config:
    """Write continuation.yaml and continuation.jsonl for lm-evaluation-harness.

    Example: python tools/task_files.py --text c4.jsonl --out tasks
    """

    text: str
    """JSON lines with a field text, a document each, or c4"""
    out: Path
    """folder of the task; must not exist"""
    skip: int = 0
    """documents at the beginning that are left out, such as those calibrated on"""
    questions: int = 300
    """questions, one for each document that is long enough"""
    context: int = 40
    """words of a question"""
    words: int = 10
    """words of each continuation"""
    seed: int = 0
    """of what is drawn: wrong continuations and their order"""


def questions(documents: Iterable[str], config: Config) -> list[dict[str, object]]:
    """Contexts with four continuations, the label which of them is true."""
    length = config.context + config.words
    split = [words for text in documents if len(words := text.split()) >= length]
    if len(split) < 4:
        raise InputError(
            f"--text: {len(split)} documents of {length} words after --skip {config.skip}; "
            "expected 4 or more"
        )
    random = np.random.default_rng(config.seed)
    found: list[dict[str, object]] = []
    for number, words in enumerate(split[: config.questions]):
        others = random.choice(len(split) - 1, 3, replace=False)
        wrong = [split[i + (i >= number)][config.context : length] for i in others]
        label = int(random.integers(4))
        choices = [" ".join(piece) for piece in wrong]
        choices.insert(label, " ".join(words[config.context : length]))
        context = " ".join(words[: config.context])
        found.append({"context": context, "choices": choices, "label": label})
    return found


def body(config: Config) -> None:
    """Write both files."""
    for name in ("questions", "context", "words"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name}: expected 1 or more")
    for name in ("skip", "seed"):
        if getattr(config, name) < 0:
            raise InputError(f"--{name}: expected 0 or more")
    check_new_folder(config.out)
    documents = itertools.islice(calibration_corpus(config.text).documents(), config.skip, None)
    made = questions(documents, config)
    with new_folder(config.out) as folder:
        lines = "".join(json.dumps(one) + "\n" for one in made)
        (folder / "continuation.jsonl").write_text(lines, encoding="utf-8")
        (folder / "continuation.yaml").write_text(_TASK, encoding="utf-8")
    print(f"{config.out}: {len(made)} questions")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_script(Config, body, argv, "task_files.py")


if __name__ == "__main__":
    sys.exit(main())
