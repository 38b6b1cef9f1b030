"""experiments/perplexity.py: its last line, its exit statuses."""

import json
import math
import pickle

import pytest


@pytest.fixture(scope="module")
def main(script):
    return script("perplexity").main


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the cat sat on the mat. " * 40)
    return str(file)


def run(main, capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return status, shown.out.splitlines(), shown.err.splitlines()


def test_the_last_line_is_the_perplexity_and_its_protocol(main, capsys, checkpoint, text):
    folder = checkpoint()
    status, out, _ = run(main, capsys, "--model", folder, "--text", text, "--seqlen", 64)
    report = json.loads(out[-1])
    assert status == 0
    assert math.isfinite(report.pop("perplexity"))
    assert report == {
        "model": str(folder),
        "corpus": text,
        "split": "all",
        "seqlen": 64,
        "windows": 15,
        "bos": "one",
        "dtype": "float32",
        "tokens_scored": 15 * 63,
    }


def test_every_flag_is_used(main, capsys, checkpoint, text):
    folder = checkpoint()
    arguments = ("--model", folder, "--text", text, "--seqlen", 32)
    more = ("--windows", 3, "--bos-per-window", "--dtype", "bfloat16", "--batch", 2)
    _, out, _ = run(main, capsys, *arguments, *more)
    report = json.loads(out[-1])
    assert report["windows"] == 3
    assert report["bos"] == "each"
    assert report["dtype"] == "bfloat16"


def test_the_embedded_model_is_the_default(main, capsys):
    status, out, _ = run(main, capsys, "--windows", 4)
    report = json.loads(out[-1])
    assert status == 0
    assert (report["model"], report["corpus"], report["seqlen"]) == ("zoo", "zoo", 256)
    assert report["perplexity"] < 40


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def missing_shard(folder):
    next(folder.glob("*-00003-of-*")).unlink()


def wrong_shape(folder):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 28}))


def only_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


@pytest.mark.parametrize(
    ("case", "damage", "named"),
    [
        ("untied_gqa", no_tokenizer, "tokenizer.json"),
        ("untied_gqa", truncated, "model.safetensors"),
        ("sharded", missing_shard, "model-00003-of-00004.safetensors"),
        ("untied_gqa", wrong_shape, "misshapen"),
        ("untied_gqa", only_a_pickle, "pytorch_model.bin"),
    ],
)
def test_a_broken_checkpoint_is_one_line_and_status_2(
    main, capsys, checkpoint, text, case, damage, named
):
    folder = checkpoint(case)
    damage(folder)
    status, out, err = run(main, capsys, "--model", folder, "--text", text, "--seqlen", 32)
    assert (status, out, len(err)) == (2, [], 1)
    assert err[0].startswith("jaxprune perplexity: error: ")
    assert named in err[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--model", "nobody/nothing"), "network"),
        (("--model", "nothing"), "no such folder"),
        (("--text", "c4"), "network"),
        (("--text", "nothing.txt"), "no such file"),
        (("--seqlen", "1"), "--seqlen"),
        (("--windows", "0"), "--windows"),
        (("--windows", "100000"), "needs"),
        (("--batch", "0"), "--batch"),
        (("--dtype", "float64"), "float64"),
        (("--seqlen", "many"), "many"),
        (("--nothing",), "--nothing"),
    ],
)
def test_a_wrong_request_is_one_line_and_status_2(main, capsys, arguments, named):
    status, out, err = run(main, capsys, *arguments)
    assert (status, out, len(err)) == (2, [], 1)
    assert named in err[0]
