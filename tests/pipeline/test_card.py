"""The model card: what it says, and that no name in it is markup."""

import dataclasses

import pytest
import yaml
from huggingface_hub import ModelCard

from jaxprune.models import llama
from jaxprune.models.llama.modeling import parameter_count
from jaxprune.pipeline.card import Outcome, code, model_card, source_metadata
from jaxprune.pipeline.settings import METHODS, PruneSettings
from jaxprune.sparsity import Sparsity

PROTOCOL = {"corpus": "zoo", "split": "calibration", "seqlen": 256, "windows": 128, "bos": "each"}
CONFIG = llama.load_config(llama.locate("zoo"))
ROWS = [
    {"layer": 0, "head": 0, "calibration_error": 0.01, "heldout_error": 0.02},
    {"layer": 0, "head": 1, "calibration_error": 0.02, "heldout_error": 0.04},
]
OUTCOME = Outcome(
    {"calibration": PROTOCOL, "heldout": {**PROTOCOL, "windows": 16}},
    zeros=1000,
    achieved=0.45,
    parameters=parameter_count(CONFIG),
    achieved_sparsity={"wq": [0.5, 0.25], "wk": [0.5, 0.75]},
    attention_error=ROWS,
)
DESCENT = PruneSettings("descent", "qk", Sparsity(0.5))


@pytest.fixture
def written(tmp_path):
    """`written(model, source)` is the card of a pruning, read back as the hub's client reads it."""

    def write(model="zoo", source=None, settings=DESCENT, outcome=OUTCOME, dtype="float32"):
        folder = llama.locate("zoo") if source is None else source
        text = model_card(model, folder, settings, CONFIG, dtype, outcome)
        file = tmp_path / "written.md"
        file.write_text(text, encoding="utf-8")
        return ModelCard.load(file)

    return write


def test_it_says_what_was_done_on_what_and_how_far_it_is(written):
    card = written()
    assert card.data.to_dict() == {
        "language": "en",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["jaxprune", "pruned", "sparse"],
    }
    for text in (
        "zeros in `q_proj`, `k_proj` of all 6 blocks, 1,000 of its 1,238,656 parameters (0.1%)",
        "`descent`: masks and weights in closed form",
        "100 steps a block; then all of them to the dense model's predictions, 300 steps",
        "0.5 of every matrix; achieved: 0.4500, from 0.2500 to 0.7500 of a matrix",
        "128 windows of 256 tokens, 32,768 in all, of `zoo` (calibration), a BOS before each",
        "16 windows of 256 tokens",
        "mean of 2 heads: **0.03 on held-out text**, 0.015 on the text calibrated on",
        "the worst head has 0.04",
        'AutoModelForCausalLM.from_pretrained("FOLDER")',
        "jaxprune perplexity --model FOLDER --text zoo --seqlen 256\n",
        "files are as large as the dense model's",
        "nothing is faster",
        "That of the dense model, `apache-2.0`.",
    ):
        assert text in card.text
    assert "vLLM" not in card.text


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", ["qk", "all"])
def test_every_method_has_words(written, method, targets):
    settings = PruneSettings(method, targets, Sparsity(n=2, m=4), distill=0)
    text = written(settings=settings, dtype="bfloat16").text
    assert f"**Method**: `{method}`: " in text
    assert ("`down_proj`" in text) == (targets == "all")
    assert ("steps" in text) == (method == "descent")
    assert "2 of every 4 inputs kept (2:4)" in text
    assert "vLLM no longer runs 2:4" in text
    assert "--dtype bfloat16\n" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"start": "dense"}, "from dense weights, under a mask that tightens, 1200 steps a block"),
        ({"refit": False}, "the mask alone was taken"),
        ({"method": "wanda", "refit": True}, "Wanda, on the inputs of every matrix; then kept"),
        ({"steps": 7, "distill": 0}, "7 steps a block\n"),
        ({"propagate": False}, "on the activations of the dense model"),
        ({"allocate": "block"}, "0.5 of all pruned matrices of each block together"),
        ({"allocate": "model"}, "0.5 of all pruned matrices of the model together, between 0 and"),
    ],
)
def test_what_departs_from_the_method_is_said(written, changes, said):
    settings = dataclasses.replace(DESCENT, **changes)
    assert said in written(settings=settings).text


def test_a_name_on_the_hub_is_the_base_model(written):
    card = written("owner/name")
    assert card.data.base_model == "owner/name"
    assert "[`owner/name`](https://huggingface.co/owner/name)" in card.text
    assert "jaxprune perplexity --model owner/name --text" in card.text


def test_the_place_on_the_disk_is_not_told(written, tmp_path):
    model = tmp_path / "my model"
    model.mkdir()
    outcome = dataclasses.replace(
        OUTCOME,
        texts=dict.fromkeys(
            ("calibration", "heldout"), PROTOCOL | {"corpus": "/home/me/a.txt", "split": "all"}
        ),
    )
    card = written(str(model), model, outcome=outcome)
    assert "base_model" not in card.data.to_dict()
    assert "# `my model`, pruned" in card.text
    assert "of `a.txt`, a BOS" in card.text
    assert str(tmp_path) not in card.text
    assert "/home" not in card.text
    assert "--model DENSE --text TEXT.txt" in card.text


STATED = """---
license: llama3.2
language: [en, de]
base_model: owner/base
datasets: [private/one]
---
# Card
"""


def test_licence_language_and_base_model_of_a_source_are_carried_over(written, tmp_path):
    (tmp_path / "README.md").write_text(STATED)
    for name in ("LICENSE.txt", "USE_POLICY.md"):
        (tmp_path / name).write_text("terms")
    card = written(str(tmp_path), tmp_path)
    stated = {name: card.data.get(name) for name in ("license", "language", "base_model")}
    assert stated == {"license": "llama3.2", "language": ["en", "de"], "base_model": "owner/base"}
    assert card.data.datasets is None
    assert "That of the dense model, `llama3.2`. `LICENSE.txt`, `USE_POLICY.md`: copied" in (
        card.text
    )
    assert written("other/name", tmp_path).data.base_model == "other/name"


def test_a_licence_in_a_file_alone_is_linked(written, tmp_path):
    (tmp_path / "LICENSE").write_text("terms")
    card = written(str(tmp_path), tmp_path)
    assert (card.data.license, card.data["license_link"]) == ("other", "LICENSE")
    assert "That of the dense model. `LICENSE`: copied from the dense model." in card.text


def test_without_a_licence_none_is_claimed(written, tmp_path):
    card = written(str(tmp_path), tmp_path)
    assert "license" not in card.data.to_dict()
    assert "None is stated beside the dense model" in card.text


@pytest.mark.parametrize(
    "stated",
    [
        "no metadata at all",
        "---\nlicense: [unclosed\n---\n",
        "---\n- a\n- list\n---\n",
        "---\nlicense: {a: b}\nlanguage: 3\nbase_model: [x/y, 4]\n---\n",
        "---\nlicense: 'mit\n\n  ---\n\n  tags: all'\nbase_model: ../../etc/passwd\n---\n",
        f"---\nlicense: {'x' * 1000}\n---\n",
        "---\nlicense: []\nbase_model: []\n---\n",
        "---\nlicense: !!python/object/apply:os.system [id]\n---\n",
        pytest.param("---\na: " + "[" * 5000 + "\n---\n", marks=pytest.mark.slow),
        "---\nbase_model: öwner/name\n---\n",
        b"---\nlicense: \xff\xfe\n---\n",
    ],
)
def test_a_card_that_cannot_be_used_states_nothing(written, tmp_path, stated):
    content = stated if isinstance(stated, bytes) else stated.encode()
    (tmp_path / "README.md").write_bytes(content)
    assert source_metadata(tmp_path) == {}
    assert written(str(tmp_path), tmp_path).data.license is None


HOSTILE = [
    "a`b``c",
    "`",
    "[link](javascript:alert)",
    "<script>alert()</script>",
    "---\nlicense: mit\n---",
    "x\n# heading\n- item",
    "a|b",
    "\u202egnp.exe",
    "\x1b[2J",
    "caf\udce9",
    " ",
    "'\"{}: &a *a !b",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_and_never_markup(written, name):
    shown = code(name)
    fence = shown[: len(shown) - len(shown.lstrip("`"))]
    inner = shown[len(fence) : -len(fence)]
    assert shown.endswith(fence)
    assert fence not in inner
    assert shown.isprintable()
    outcome = dataclasses.replace(
        OUTCOME, texts=dict.fromkeys(("calibration", "heldout"), PROTOCOL | {"corpus": name})
    )
    card = written(f"./models/{name}", outcome=outcome)
    plain = written("./models/name", outcome=outcome)
    assert card.data.to_dict() == plain.data.to_dict()
    assert len(card.text.splitlines()) == len(plain.text.splitlines())


def test_metadata_survives_a_licence_that_looks_like_yaml(written, tmp_path):
    odd = "no: [1, 2] # 'x' --- \"y\""
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({'license': odd})}---\n")
    assert written(str(tmp_path), tmp_path).data.license == odd
