"""Corpora, tokenizers and windows: which tokens, in which order, or which one-line error."""

import gzip
import json
import random
from functools import partial

import numpy as np
import pytest

from jaxprune import hub
from jaxprune.errors import InputError
from jaxprune.models.zoo import ZOO
from jaxprune.text import corpora
from jaxprune.text import windows as data
from jaxprune.text.tokenizer import Tokenizer

LETTERS = " abcdefghijklmnopqrstuvwxyz."


def text_of(length, seed=0):
    return "".join(random.Random(seed).choices(LETTERS, k=length))


@pytest.fixture
def tokenizer(checkpoint):
    """One token a letter, BOS is 1."""
    return Tokenizer(checkpoint(), 40)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(text_of(1000))
    return file


def configure(folder, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(folder, 40)


def test_encoding_adds_nothing(tokenizer):
    assert tokenizer.bos_id == 1
    assert tokenizer.encode("ab .").tolist() == [5, 6, 4, 31]
    assert tokenizer.encode("").tolist() == []


def test_who_says_that_there_is_a_bos(checkpoint):
    folder = checkpoint()
    assert configure(folder, bos_token="<s>").bos_id == 1
    assert configure(folder, bos_token={"content": "<s>"}, add_bos_token=True).bos_id == 1
    assert configure(folder, bos_token="<s>", add_bos_token=False).bos_id is None
    assert configure(folder, bos_token="</s>").bos_id is None, "the template puts <s> in front"
    assert configure(folder, bos_token="</s>", add_bos_token=True).bos_id == 2
    for more in ({"add_bos_token": True}, {}):
        with pytest.raises(InputError, match="bos_token 'nothing' is not in the vocabulary"):
            configure(folder, bos_token="nothing", **more)
    assert configure(folder, bos_token="nothing", add_bos_token=False).bos_id is None
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("bos_token_id", None)
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="no bos_token is named"):
        configure(folder, add_bos_token=True)


def test_a_tokenizer_that_is_missing_broken_or_of_another_model(checkpoint):
    folder = checkpoint()
    with pytest.raises(InputError, match="id 31, but the embedding has 10 rows"):
        Tokenizer(folder, 10).encode("a.")
    with pytest.raises(InputError, match="id 1, but the embedding has 1 rows"):
        Tokenizer(folder, 1)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer"):
        Tokenizer(folder, 40)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="holds no tokenizer"):
        Tokenizer(folder, 40)


def test_calibration_takes_the_first_windows_of_a_file_then_held_out_ones(tokenizer, text):
    chosen, heldout = data.calibration_windows(
        str(text), tokenizer, windows=3, seqlen=17, heldout=2
    )
    ids = tokenizer.encode(text.read_text())
    every = np.concatenate([chosen.tokens, heldout.tokens])
    assert chosen.tokens.shape == (3, 17)
    assert heldout.tokens.shape == (2, 17)
    assert every.dtype == np.int32
    np.testing.assert_array_equal(every[:, 0], 1)
    np.testing.assert_array_equal(every[:, 1:].ravel(), ids[: 5 * 16])
    assert chosen.protocol == {
        "corpus": str(text),
        "split": "all",
        "seqlen": 17,
        "windows": 3,
        "bos": "each",
    }


def test_perplexity_windows_have_one_bos_in_all_or_one_each(tokenizer, text):
    ids = tokenizer.encode(text.read_text())
    one = data.evaluation_windows(str(text), tokenizer, seqlen=64)
    np.testing.assert_array_equal(one.tokens.ravel(), [1, *ids[: 15 * 64 - 1]])
    assert one.protocol["bos"] == "one"
    each = data.evaluation_windows(str(text), tokenizer, seqlen=64, bos_per_window=True)
    np.testing.assert_array_equal(each.tokens[:, 0], 1)
    np.testing.assert_array_equal(each.tokens[:, 1:].ravel(), ids[: 15 * 63])
    assert each.protocol["bos"] == "each"
    first = data.evaluation_windows(str(text), tokenizer, seqlen=64, windows=4)
    np.testing.assert_array_equal(first.tokens, one.tokens[:4])


def test_a_text_by_two_names_is_one_whose_beginning_was_seen(tokenizer, text, monkeypatch):
    monkeypatch.chdir(text.parent)
    every = data.evaluation_windows(str(text), tokenizer, seqlen=64).tokens
    unseen = partial(data.unseen_windows, tokenizer=tokenizer, seen=100, seqlen=64)
    for source in (None, text.name, f"./{text.name}"):
        left = unseen(source, calibration=str(text))
        np.testing.assert_array_equal(left.tokens, every[2:])
        assert left.protocol["after"] == 2
    other = text.with_name("other.txt")
    other.write_text(text.read_text())
    np.testing.assert_array_equal(unseen(str(other), calibration=str(text)).tokens, every)
    np.testing.assert_array_equal(unseen(str(text), calibration="zoo").tokens, every)


def test_without_a_bos_windows_are_text_alone(checkpoint, text):
    tokenizer = configure(checkpoint(), add_bos_token=False)
    ids = tokenizer.encode(text.read_text())
    chosen, _ = data.calibration_windows(str(text), tokenizer, windows=3, seqlen=16, heldout=0)
    np.testing.assert_array_equal(chosen.tokens.ravel(), ids[:48])
    windows = data.evaluation_windows(str(text), tokenizer, seqlen=16)
    np.testing.assert_array_equal(windows.tokens.ravel(), ids[:992])
    assert chosen.protocol["bos"] == windows.protocol["bos"] == "none"
    with pytest.raises(InputError, match="bos_per_window"):
        data.evaluation_windows(str(text), tokenizer, bos_per_window=True)


def test_a_long_text_is_read_as_far_as_needed_with_the_same_tokens(tokenizer, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text(text_of(5 * 2**18))
    ids = tokenizer.encode(file.read_text())
    some = data.evaluation_windows(str(file), tokenizer, seqlen=50, windows=20)
    np.testing.assert_array_equal(some.tokens.ravel(), [1, *ids[:999]])
    assert len(corpora.evaluation_corpus(str(file)).text(10)) == 2**20
    assert corpora.evaluation_corpus(str(file)).text() == file.read_text()


def test_text_with_few_tokens_for_its_characters_is_read_on(checkpoint, tmp_path):
    folder = checkpoint()
    # Letters outside the vocabulary become one token a run here.
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["fuse_unk"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
    file = tmp_path / "sparse.txt"
    file.write_text(("#" * 2000 + "a") * 3000)
    windows = data.evaluation_windows(str(file), Tokenizer(folder, 40), seqlen=40, windows=100)
    assert windows.tokens.shape == (100, 40)


@pytest.mark.parametrize("name", ["c.jsonl", "c.json", "c.jsonl.gz", "c.json.gz", "c.txt.gz"])
def test_kinds_of_files(tmp_path, name):
    file = tmp_path / name
    lines = ["abc", "déf"]
    if ".json" in name:
        content = "\n".join(json.dumps({"text": line, "url": 1}) for line in lines) + "\n\n"
    else:
        content = "\n\n".join(lines)
    raw = content.encode()
    file.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert corpora.calibration_corpus(str(file)).text() == "abc\n\ndéf"


BROKEN = {
    "latin.txt": ("é".encode("latin-1"), "not UTF-8"),
    "binary.jsonl": (b"\x80\xff", "not UTF-8"),
    "empty.txt": (b"", "has no text"),
    "blank.txt": (b" \n\n", "has no text"),
    "empty.jsonl": (b"\n", "has no text"),
    "short.txt": (b"abc", "has 3 tokens, but 5 windows of 20 needs 95"),
    "array.json": (b'["a"]', 'line 1 is not a JSON object with a string "text"'),
    "nothing.jsonl": (b'{"text": "a"}\n{"body": "a"}', "line 2 is not"),
    "number.jsonl": (b'{"text": 3}', "line 1 is not"),
    "half.jsonl": (b'{"text": "a', "line 1 is not"),
    "surrogate.jsonl": (b'{"text": "a"}\n{"text": "\\ud800"}', "jsonl: line 2 holds a lone"),
    "null.txt": (b"\0" * 200, "holds null characters, which no text does"),
    "mark.jsonl": (b'\xef\xbb\xbf{"text": "abc"}', "has 3 tokens, but"),
    "plain.json.gz": (b'{"text": "a"}', "cannot be read"),
    "truncated.txt.gz": (gzip.compress(b"abc" * 99)[:-12], "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_text_is_one_clear_line(tokenizer, tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        data.calibration_windows(str(tmp_path / name), tokenizer, windows=3, seqlen=20, heldout=2)
    assert "\n" not in str(error.value)


def test_requests_that_make_no_sense(tokenizer, text, tmp_path):
    for source in (str(tmp_path), str(tmp_path / "none.txt"), "c5"):
        with pytest.raises(InputError, match="no such file; give zoo, c4, wikitext2"):
            data.evaluation_windows(source, tokenizer)
    for function in (data.calibration_windows, data.evaluation_windows):
        with pytest.raises(InputError, match="windows must be at least 1"):
            function(str(text), tokenizer, windows=0)
        with pytest.raises(InputError, match="seqlen must be at least 2"):
            function(str(text), tokenizer, seqlen=1)
        with pytest.raises(InputError, match="has 1000 tokens, but"):
            function(str(text), tokenizer, windows=10**9)
    with pytest.raises(InputError, match="one window of 5000 needs 4999"):
        data.evaluation_windows(str(text), tokenizer, seqlen=5000)
    with pytest.raises(InputError, match="heldout must not be negative"):
        data.calibration_windows(str(text), tokenizer, heldout=-1)
    with pytest.raises(InputError, match="the network"):
        data.evaluation_windows("c4", tokenizer)


@pytest.fixture
def the_hub(tmp_path, monkeypatch):
    """Stand-ins for the files of C4 and WikiText-2."""

    def shard(name, seed):
        draw = random.Random(seed)
        file = tmp_path / name
        with gzip.open(file, "wt") as stream:
            for number in range(1200):
                line = {"text": text_of(draw.randint(1, 60), number + seed)}
                stream.write(json.dumps(line) + "\n")
        return file

    files = {
        "en/c4-train.00000-of-01024.json.gz": shard("train.json.gz", 0),
        "en/c4-validation.00000-of-00008.json.gz": shard("validation.json.gz", 10**6),
    }

    def fetch(repository, name):
        assert repository == "allenai/c4"
        return files[name]

    monkeypatch.setattr(hub, "fetch_dataset_file", fetch)
    return {
        "train" if "train" in name else "validation": [
            json.loads(line)["text"] for line in gzip.open(file, "rt")
        ]
        for name, file in files.items()
    }


def reference_windows(documents, tokenizer, count, seqlen):
    """``get_c4`` of SparseGPT and Wanda."""
    random.seed(0)
    rows = []
    for _ in range(count):
        while True:
            i = random.randint(0, len(documents) - 1)
            ids = [1, *tokenizer.encode(documents[i])]
            if len(ids) > seqlen:
                break
        i = random.randint(0, len(ids) - seqlen - 1)
        rows.append(ids[i : i + seqlen])
    return rows


def test_calibration_on_c4_is_that_of_the_reference_implementations(tokenizer, the_hub):
    chosen, heldout = data.calibration_windows("c4", tokenizer, windows=20, seqlen=50, heldout=7)
    expected = reference_windows(the_hub["train"], tokenizer, 20, 50)
    np.testing.assert_array_equal(chosen.tokens, expected)
    expected = reference_windows(the_hub["validation"], tokenizer, 7, 50)
    np.testing.assert_array_equal(heldout.tokens, expected)
    assert chosen.protocol["split"] == "train"
    assert heldout.protocol["split"] == "validation"
    assert chosen.protocol["seed"] == 0
    other, _ = data.calibration_windows("c4", tokenizer, windows=20, seqlen=50, seed=1)
    assert not np.array_equal(chosen.tokens, other.tokens)
    with pytest.raises(InputError, match="none of 5000 documents drawn has more than 99 tokens"):
        data.calibration_windows("c4", tokenizer, windows=1, seqlen=99)


def test_perplexity_on_c4_takes_1100_documents_and_256_windows(tokenizer, the_hub):
    ids = [1, *tokenizer.encode(" ".join(the_hub["validation"][:1100]))]
    windows = data.evaluation_windows("c4", tokenizer, seqlen=50)
    np.testing.assert_array_equal(windows.tokens.ravel(), ids[: 256 * 50])
    windows = data.evaluation_windows("c4", tokenizer, seqlen=1000)
    np.testing.assert_array_equal(windows.tokens.ravel(), ids[: len(ids) // 1000 * 1000])
    assert windows.protocol["split"] == "first 1100 documents of validation"


def test_presets(tokenizer, the_hub):
    chosen, heldout = data.calibration_windows("paper", tokenizer, seqlen=30)
    assert chosen.tokens.shape == (8, 30)
    assert heldout.tokens.shape == (128, 30)
    windows = data.evaluation_windows("paper", tokenizer, seqlen=30)
    np.testing.assert_array_equal(windows.tokens, heldout.tokens)
    standard = data.PRESETS["standard"]
    assert (standard.calibration, standard.windows, standard.seqlen) == ("c4", 128, 2048)
    assert standard.text == "wikitext2"


def test_wikitext2_is_joined_by_blank_lines(tokenizer, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an optional extra")
    import pyarrow

    rows = ["", " abc \n", "", text_of(300)]
    file = tmp_path / "test.parquet"
    parquet.write_table(pyarrow.table({"text": rows}), file)

    def fetch(repository, name):
        assert repository == "Salesforce/wikitext"
        assert name == "wikitext-2-raw-v1/test-00000-of-00001.parquet"
        return file

    monkeypatch.setattr(hub, "fetch_dataset_file", fetch)
    windows = data.evaluation_windows("wikitext2", tokenizer, seqlen=100)
    ids = [1, *tokenizer.encode("\n\n".join(rows))]
    np.testing.assert_array_equal(windows.tokens.ravel(), ids[:300])


def test_the_embedded_texts_are_large_enough_and_share_nothing():
    tokenizer = Tokenizer(ZOO, 1024)
    chosen, heldout = data.calibration_windows("zoo", tokenizer)
    assert chosen.tokens.shape == (128, 256)
    assert heldout.tokens.shape == (16, 256)
    windows = data.evaluation_windows("zoo", tokenizer)
    assert len(windows.tokens) >= 64
    assert windows.protocol["split"] == "evaluation"

    def paragraphs(corpus):
        return {part for part in corpus.text().split("\n\n") if len(part) >= 40}

    evaluation = paragraphs(corpora.evaluation_corpus("zoo"))
    assert not evaluation & paragraphs(corpora.calibration_corpus("zoo"))
