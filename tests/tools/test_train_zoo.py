"""tools/train_zoo.py: the same model however often it was interrupted, and its parts."""

import dataclasses
import random

import numpy as np
import pytest

from jaxprune.models import llama
from jaxprune.text.tokenizer import Tokenizer

WORDS = "a matrix is masked by descent and the softmax sees what remains of every row"
FLAGS = ["--steps", "6", "--batch", "2", "--seqlen", "16", "--layers", "1", "--save-every", "2"]
FLAGS += ["--warmup", "2", "--evaluation-characters", "900", "--calibration-characters", "900"]


def documents():
    draw = random.Random(0)
    for number in range(30):
        paragraphs = [" ".join(draw.choices(WORDS.split(), k=12)) for _ in range(5)]
        yield f"document {number}", "\n\n".join([*paragraphs, "Short.", "Repeated. " * 9])


@pytest.fixture
def zoo(script, monkeypatch):
    module = script("train_zoo")
    monkeypatch.setattr(module, "documents", documents)
    return module


def test_texts_share_only_short_paragraphs(zoo):
    config = zoo.ZooConfig(evaluation_characters=900, calibration_characters=900)
    texts = zoo.split_texts(config)
    assert texts == zoo.split_texts(config)
    parts = [{part for part in text.split("\n\n") if len(part) >= 40} for text in texts.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 30 * 5 + 1
    assert sum(text.count("Short.") for text in texts.values()) == 30
    for split in ("evaluation", "calibration"):
        assert 900 <= len(texts[split]) < 2000


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_model(zoo, tmp_path, monkeypatch, capsys):
    assert zoo.main([*FLAGS, "--out", str(tmp_path / "whole")]) == 0

    real, seen = zoo.batch_of, []

    def interrupt(config, ids, bos, step):
        seen.append(step)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(config, ids, bos, step)

    monkeypatch.setattr(zoo, "batch_of", interrupt)
    arguments = [*FLAGS, "--out", str(tmp_path / "halved")]
    assert zoo.main(arguments) == 130
    assert not (tmp_path / "halved" / "zoo").exists()
    assert zoo.main(arguments) == 2
    assert zoo.main([*arguments, "--resume"]) == 0
    assert seen == [0, 1, 2, 3, 2, 3, 4, 5]
    for file in (tmp_path / "whole" / "zoo").iterdir():
        assert file.read_bytes() == (tmp_path / "halved" / "zoo" / file.name).read_bytes()
    assert zoo.main(arguments) == 2
    assert "--resume continues it" in capsys.readouterr().err
    assert zoo.main([*arguments, "--resume"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'halved' / 'zoo'}: finished already\n"
    assert len(seen) == 8

    folder = tmp_path / "whole" / "zoo"
    model = llama.load(folder)
    assert dataclasses.astuple(model.config)[:7] == (1024, 128, 352, 1, 4, 2, 32)
    assert Tokenizer(folder, 1024).bos_id == 0
    assert "| bigram model of the training text |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("damage", ["names", "shapes", "losses", "too many", "bytes"])
def test_a_damaged_state_is_one_line(zoo, tmp_path, monkeypatch, capsys, damage):
    """In place of training there are two leaves."""

    def train(config, model, ids, bos, state):
        carry = ({"a": np.zeros((2, 3), np.float32)}, np.zeros((), np.int32))
        if state.exists():
            zoo.read_state(state, carry, config.steps)
        arrays = {"leaf0": carry[0]["a"], "leaf1": carry[1], "losses": np.ones(4)}
        if damage == "names":
            arrays["leaf2"] = arrays.pop("leaf1")
        elif damage == "shapes":
            arrays["leaf0"] = np.zeros((3, 2), np.float32)
        elif damage == "losses":
            del arrays["losses"]
        elif damage == "too many":
            arrays["losses"] = np.ones(7)
        np.savez(state, **arrays)
        if damage == "bytes":
            state.write_bytes(state.read_bytes()[:-30])
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "train", train)
    arguments = [*FLAGS, "--out", str(tmp_path / "run"), "--resume"]
    assert zoo.main(arguments) == 130
    capsys.readouterr()
    assert zoo.main(arguments) == 2
    shown = capsys.readouterr().err
    assert f"{tmp_path / 'run' / 'state.npz'}: not " in shown
    assert shown.endswith("delete it to train from the start\n")
    assert shown.count("\n") == 1


def test_a_saved_state_comes_back(zoo, tmp_path):
    carry = ({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, np.int32(4))
    np.savez(tmp_path / "state.npz", leaf0=carry[0]["a"], leaf1=carry[1], losses=[0.5, 0.25])
    found, losses = zoo.read_state(tmp_path / "state.npz", carry, 2)
    np.testing.assert_array_equal(found[0]["a"], carry[0]["a"])
    assert (int(found[1]), losses) == (4, [0.5, 0.25])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--seqlen", "4000"], "--seqlen 4000: the evaluation text has"),
        (["--evaluation-characters", "10000"], "--evaluation-characters 10000: documents of"),
        (["--calibration-characters", "8674"], "--seqlen 16: the training text has 0 tokens"),
    ],
)
def test_texts_without_a_window_are_found_before_training(
    zoo, tmp_path, monkeypatch, capsys, flags, named
):
    monkeypatch.setattr(zoo, "train", lambda *_: pytest.fail("trained"))
    assert zoo.main([*FLAGS, *flags, "--out", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert named in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_training(zoo, tmp_path, capsys):
    flags = [*FLAGS, "--learning-rate", "1e30", "--out", str(tmp_path / "run")]
    assert zoo.main(flags) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert "--learning-rate 1e+30: the loss of step" in shown
    assert not (tmp_path / "run").exists()


def test_ngram_models_by_hand(zoo):
    train, window = np.array([0, 1, 0, 1, 0, 2]), np.array([[0, 1, 2]])
    found = zoo.ngram_perplexities(train, window, 4)
    unigram = np.array([4, 3, 2, 1]) / 10
    np.testing.assert_allclose(found["unigram"], (unigram[1] * unigram[2]) ** -0.5)
    # 0 was followed by 1 twice and by 2 once, 1 by 0 twice.
    strengths = 2.0 ** np.arange(12)
    first = (2 + strengths * unigram[1]) / (3 + strengths)
    second = (0 + strengths * unigram[2]) / (2 + strengths)
    np.testing.assert_allclose(found["bigram"], ((first * second) ** -0.5).min())


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *((name, "0") for name in ("steps", "batch", "layers", "save-every", "learning-rate")),
        *((name, "-1") for name in ("warmup", "seed", "weight-decay", "evaluation-characters")),
        *(("seqlen", "1"), ("learning-rate", "nan"), ("warmup", "1500"), ("weight-decay", "inf")),
    ],
)
def test_flags_that_cannot_work_are_named(script, tmp_path, capsys, flag, value):
    argv = [f"--{flag}={value}", "--out", str(tmp_path / "run")]
    assert script("train_zoo").main(argv) == 2
    assert f"--{flag}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
