"""Fixtures of all tests. Nothing here or in any test touches the network."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import tokenizers

# Read by the hub's client when it is imported: whatever it is asked for is not there.
os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(__file__).parent.parent
GOLDEN = REPOSITORY / "tests" / "golden"


@pytest.fixture(scope="session")
def script():
    """`script("perplexity")` is the module experiments/perplexity.py."""

    def load(name):
        spec = importlib.util.spec_from_file_location(
            f"script_{name}", REPOSITORY / "experiments" / f"{name}.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def shared():
    """Reference material beside the repository; the test is skipped where there is none."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "models" / "stories260K").is_dir():
        pytest.skip("the folder ../shared with stories260K is not here")
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint("untied_gqa")` is a copy of a golden checkpoint with a tokenizer of its size."""

    def copy(name="untied_gqa"):
        folder = tmp_path / name
        shutil.copytree(GOLDEN / name, folder, ignore=shutil.ignore_patterns("expected.npz"))
        letters = {letter: 4 + i for i, letter in enumerate(" abcdefghijklmnopqrstuvwxyz.\n")}
        vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, **letters}
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=False)
        )
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    return copy
