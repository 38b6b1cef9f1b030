"""Train the embedded model: a tiny Llama on the English that every Python carries.

    python tools/train_zoo.py --out runs/zoo [--resume]

Text, tokenizer, training and the card with its numbers come from this one script. The result is
the folder ``zoo`` in ``--out``, which is copied by hand to ``jaxprune/models/zoo``.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import platform
import pydoc_data.topics
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx
from tqdm import trange

from jaxprune.errors import InputError
from jaxprune.evaluation import perplexity
from jaxprune.models import llama
from jaxprune.models.llama.checkpoint import write_new
from jaxprune.models.llama.losses import window_losses
from jaxprune.runs import flags
from jaxprune.runs.configuration import Group, configuration, flat
from jaxprune.runs.folder import RunFolder
from jaxprune.runs.script import run_script
from jaxprune.storage import new_folder, read_arrays, replacing, write_json
from jaxprune.text.tokenizer import Tokenizer
from jaxprune.text.windows import evaluation_windows

_BOS, _EOS = "<s>", "</s>"
# Folders of the standard library whose docstrings are no documentation, or are not always there.
_SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}
_LARGEST_HELDOUT = 20_000  # characters; longer documents are for training
_SHARED = 40  # characters from which on a paragraph may not occur in two texts
_STATE = "state.npz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Group):
    """The model's depth, and windows of text."""

    seqlen: int = 256
    """tokens of a window"""
    layers: int = 6
    """blocks"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(flags.Repeat, flags.Folder, flags.Seed):
    """A training run; the model appears in its subfolder zoo."""


@dataclasses.dataclass(frozen=True)
class ZooConfig:
    """Train the embedded tiny Llama.

    Example: python tools/train_zoo.py --out runs/zoo --resume
    """

    steps: int = 1500
    """optimiser steps"""
    learning_rate: float = 3e-3
    """peak of the cosine schedule"""
    warmup: int = 100
    """steps of linear warm-up"""
    weight_decay: float = 0.1
    """of AdamW; norms do not decay"""
    evaluation_characters: int = 80_000
    """least size of the text kept for perplexity"""
    calibration_characters: int = 180_000
    """least size of the text kept for calibration"""
    save_every: int = 100
    """steps between saved states"""
    data: Annotated[Data, flags.MODEL_AND_TEXT] = Data()
    devices: Annotated[flags.Batch, flags.DEVICES_AND_MEMORY] = dataclasses.field(
        default=flags.Batch(batch=16)
    )
    run: Annotated[Run, flags.RUN] = Run(out=Path("runs/zoo"))

    memory_flags: ClassVar[str] = "--batch or --seqlen"

    def check(self) -> None:
        """Raise ``InputError`` for values that cannot work, before anything is computed."""
        least = {"steps": 1, "batch": 1, "seqlen": 2, "layers": 1, "save_every": 1, "warmup": 0}
        least |= {"evaluation_characters": 1, "calibration_characters": 1, "seed": 0}
        values = flat(self)
        for name, smallest in least.items():
            if values[name] < smallest:
                flag = flags.flag_of(name)
                raise InputError(f"{flag} {values[name]}: expected {smallest} or more")
        if self.warmup >= self.steps:
            raise InputError(f"--warmup {self.warmup}: expected fewer than --steps {self.steps}")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"--learning-rate {self.learning_rate}: expected a positive number")
        if not 0 <= self.weight_decay < float("inf"):
            raise InputError(f"--weight-decay {self.weight_decay}: expected 0 or more")


def documents() -> Iterator[tuple[str, str]]:
    """Names and texts: topics of the language reference, docstrings of each library module."""
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield f"topic {name}", text
    library = Path(sysconfig.get_paths()["stdlib"])
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(library.rglob("*.py")):
        path = file.relative_to(library)
        if _SKIPPED & set(path.parts) or path.parts[0].startswith("_sysconfigdata"):
            continue
        tree = ast.parse(file.read_bytes())
        docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        if any(docstrings):
            yield f"module {path.as_posix()}", "\n\n".join(filter(None, docstrings))


def split_texts(config: ZooConfig) -> dict[str, str]:
    """Evaluation, calibration and training text, which share no longer paragraph.

    Documents are taken in the order of a hash of their names. The library repeats itself, so
    a paragraph stays only where it occurs first, and the evaluation text comes first.

    Raises:
      InputError: there is less text than was asked for.
    """
    ordered = sorted(documents(), key=lambda each: hashlib.sha256(each[0].encode()).hexdigest())
    limits = {
        "evaluation": config.evaluation_characters,
        "calibration": config.calibration_characters,
    }
    texts, seen = {}, set[str]()
    for split, limit in limits.items():
        chosen, left = "", []
        for name, text in ordered:
            if len(chosen) < limit and len(text) <= _LARGEST_HELDOUT:
                chosen += _fresh_paragraphs(text, seen)
            else:
                left.append((name, text))
        if len(chosen) < limit:
            raise InputError(
                f"--{split}-characters {limit}: documents of at most {_LARGEST_HELDOUT} characters "
                f"give {len(chosen)}; lower it"
            )
        texts[split], ordered = chosen, left
    texts["training"] = "".join(_fresh_paragraphs(text, seen) for _, text in ordered)
    return texts


def _fresh_paragraphs(text: str, seen: set[str]) -> str:
    """The paragraphs of ``text`` that are short or not in ``seen``, which they are added to."""
    kept = []
    for paragraph in text.split("\n\n"):
        if len(paragraph) < _SHARED or paragraph not in seen:
            kept.append(paragraph + "\n\n")
        seen.add(paragraph)
    return "".join(kept)


def train_tokenizer(text: str, folder: Path, seqlen: int) -> None:
    """Write a byte-level BPE of 1,024 tokens that puts a BOS before every text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[_BOS, _EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, tokenizer.token_to_id(_BOS))]
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BOS,
        "eos_token": _EOS,
        "add_bos_token": True,
        "model_max_length": seqlen,
    }
    write_json(folder / "tokenizer_config.json", settings)


def optimiser(config: ZooConfig) -> optax.GradientTransformation:
    """AdamW on clipped gradients, linear warm-up, cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup, config.steps, end_value=config.learning_rate / 20
    )

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "norm" not in jax.tree_util.keystr(path), params
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.95, weight_decay=config.weight_decay, mask=decays),
    )


def batch_of(config: ZooConfig, ids: np.ndarray, bos: int, step: int) -> np.ndarray:
    """Random crops for one step; half of them start with a BOS in place of their first token."""
    draw = np.random.default_rng((config.run.seed, step))
    starts = draw.integers(0, len(ids) - config.data.seqlen, config.devices.batch)
    windows = ids[starts[:, None] + np.arange(config.data.seqlen)]
    windows[: config.devices.batch // 2, 0] = bos
    return windows


def check_lengths(config: ZooConfig, tokenizer: Tokenizer, texts: dict[str, str]) -> None:
    """Raise ``InputError`` where a text has no whole window, before anything is trained on it."""
    for split, text in texts.items():
        count = len(tokenizer.encode(text))
        if count <= config.data.seqlen:
            raise InputError(
                f"--seqlen {config.data.seqlen}: the {split} text has {count} tokens; lower it, or "
                "change --evaluation-characters or --calibration-characters"
            )


def read_state(state: Path, carry: Any, steps: int) -> tuple[Any, list[float]]:
    """What training goes on from, in the form of ``carry``, and the losses so far.

    Raises:
      InputError: the file does not hold it.
    """
    remedy = "delete it to train from the start"
    saved = read_arrays(state, remedy)
    leaves, form = jax.tree.flatten(carry)
    expected = {f"leaf{i}": (leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)}
    losses = saved.pop("losses", np.zeros(()))
    stored = {name: (array.shape, array.dtype) for name, array in saved.items()}
    if stored != expected or losses.ndim != 1 or not 0 < len(losses) <= steps:
        raise InputError(f"{state}: not the state of this training; {remedy}")
    return jax.tree.unflatten(form, [jnp.asarray(saved[name]) for name in expected]), [*losses]


def train(config: ZooConfig, model: llama.Llama, ids: np.ndarray, bos: int, state: Path) -> list:
    """Train ``model`` in place, from the saved state if there is one; losses of all steps."""
    graph, params = nnx.split(model)
    rule = optimiser(config)

    @jax.jit
    def update(params: Any, rule_state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            return window_losses(nnx.merge(graph, params), tokens).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        change, rule_state = rule.update(gradient, rule_state, params)
        return optax.apply_updates(params, change), rule_state, value

    carry, losses = (params, rule.init(params)), list[float]()
    if state.exists():
        carry, losses = read_state(state, carry, config.steps)
    progress = trange(len(losses), config.steps, initial=len(losses), total=config.steps)
    for step in progress:
        *carry, loss = update(*carry, batch_of(config, ids, bos, step))
        losses.append(float(loss))
        if not np.isfinite(losses[-1]):
            raise InputError(
                f"--learning-rate {config.learning_rate:g}: the loss of step {step} is not finite; "
                "lower it"
            )
        progress.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
        if len(losses) % config.save_every == 0:
            leaves = jax.tree.leaves(tuple(carry))
            arrays = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
            with replacing(state) as partial:
                np.savez(partial, allow_pickle=False, losses=np.array(losses), **arrays)
    nnx.update(model, carry[0])
    return losses


def ngram_perplexities(train_ids: np.ndarray, windows: np.ndarray, size: int) -> dict[str, float]:
    """Perplexities of a unigram and a bigram model on what the windows score.

    Unigram counts start at one; bigrams are ``(c(a,b) + κ p(b)) / (c(a) + κ)`` with the ``κ``
    that serves them best on the evaluation text itself.
    """
    unigram = np.bincount(train_ids, minlength=size) + 1.0
    unigram /= unigram.sum()
    pairs = np.zeros((size, size))
    np.add.at(pairs, (train_ids[:-1], train_ids[1:]), 1.0)
    before, after = windows[:, :-1].ravel(), windows[:, 1:].ravel()

    def bigram(strength: float) -> float:
        counts = pairs[before, after] + strength * unigram[after]
        return float(np.exp(-np.log(counts / (pairs.sum(1)[before] + strength)).mean()))

    return {
        "unigram": float(np.exp(-np.log(unigram[after]).mean())),
        "bigram": min(bigram(strength) for strength in 2.0 ** np.arange(12)),
    }


def build(config: ZooConfig) -> None:
    """Collect text, train tokenizer and model, write the model's folder."""
    config.check()
    with RunFolder(config.run.out, config, resume=config.run.resume) as run:
        if (run.path / "zoo" / "README.md").exists():  # the folder appears whole
            print(f"{run.path / 'zoo'}: finished already")
            return
        texts = split_texts(config)
        with new_folder(run.path / "zoo") as folder:
            train_tokenizer(texts["training"], folder, config.data.seqlen)
            settings = llama.LlamaConfig(
                vocab_size=1024,
                hidden_size=128,
                intermediate_size=352,
                num_hidden_layers=config.data.layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=32,
                rms_norm_eps=1e-5,
                tie_word_embeddings=True,
            )
            model = llama.Llama(settings, key=jax.random.key(config.run.seed))
            more = {
                "bos_token_id": 0,
                "eos_token_id": 1,
                "max_position_embeddings": config.data.seqlen,
            }
            tokenizer = Tokenizer(folder, settings.vocab_size)
            check_lengths(config, tokenizer, texts)
            ids = tokenizer.encode(texts["training"])
            losses = train(config, model, ids, 0, run.path / _STATE)
            run.write_metrics([{"step": i, "loss": loss} for i, loss in enumerate(losses)])
            write_new(model, folder, jnp.bfloat16, **more)
            for split in ("evaluation", "calibration"):
                (folder / f"{split}.txt").write_text(texts[split], encoding="utf-8")
            (folder / "README.md").write_text(card(config, folder, texts, ids), encoding="utf-8")
    print(f"{run.path / 'zoo'}: perplexities are in its README.md")


def card(config: ZooConfig, folder: Path, texts: dict[str, str], ids: np.ndarray) -> str:
    """The model card: what it was trained on, how, and what it reaches."""
    model = llama.load(folder)
    tokenizer = Tokenizer(folder, model.config.vocab_size)
    text = str(folder / "evaluation.txt")
    windows = evaluation_windows(text, tokenizer, seqlen=config.data.seqlen)
    report = perplexity.evaluate(model, windows)
    rivals = ngram_perplexities(ids, windows.tokens, model.config.vocab_size)
    sizes = {
        split: f"{len(tokenizer.encode(text)):,} | {len(text):,}" for split, text in texts.items()
    }
    digest = hashlib.sha256("".join(texts.values()).encode()).hexdigest()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    hyperparameters = configuration(config)
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The embedded Llama

A tiny Llama that jaxprune carries, so that every command works without a download. It was
trained by `tools/train_zoo.py` with jaxprune's own model code, and this card was written by
that script.

| perplexity of `evaluation.txt` | |
| --- | --- |
| this model | {report["perplexity"]:.2f} |
| bigram model of the training text | {rivals["bigram"]:.2f} |
| unigram model of the training text | {rivals["unigram"]:.2f} |

Protocol: {report["windows"]} windows of {report["seqlen"]} tokens, one BOS in all,
{report["tokens_scored"]} tokens scored, {report["dtype"]}, stored weights in bfloat16. The bigram
model is smoothed with the unigram model as is best for it on this very text.

## Model

{parameters:,} parameters: {json.dumps(dataclasses.asdict(model.config))}

The tokenizer is a byte-level BPE of {model.config.vocab_size} tokens, trained on the training
text.

## Text

`pydoc_data.topics` (the language reference) and the docstrings of the standard library of Python
{platform.python_version()}. Whole documents, a topic or a module, were set aside in the order of a
hash of their names; a paragraph of {_SHARED} characters or more occurs once in all three texts.
SHA-256 of all text: `{digest}`.

| text | tokens | characters | used for |
| --- | --- | --- | --- |
| training | {sizes["training"]} | weights, tokenizer |
| `calibration.txt` | {sizes["calibration"]} | `--calibration zoo` |
| `evaluation.txt` | {sizes["evaluation"]} | `--text zoo` |

## Training

AdamW on gradients clipped to norm 1, linear warm-up, cosine decay to a twentieth, float32; random
crops of the training text, half of them with a BOS in front: {json.dumps(hyperparameters)}

## Licence

Python's documentation and docstrings, and so the two texts here, are copyright of the Python
Software Foundation and used under the PSF License Agreement
(https://docs.python.org/3/license.html). The weights follow jaxprune's own licence.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_script(ZooConfig, build, argv, "train_zoo.py")


if __name__ == "__main__":
    sys.exit(main())
