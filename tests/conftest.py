"""Fixtures of all tests. Nothing here or in any test touches the network."""

import importlib
import importlib.util
import os
import shutil
import socket
import sys
from pathlib import Path

import jax
import jaxtyping
import matplotlib.figure
import pytest
import tokenizers

FEWER_PASSES = "--xla_cpu_use_fusion_emitters=false"

# Most of the time of these tests is compiling: the costly passes are left out, and the emitters
# that fuse loops, which take two thirds of it. XLA aborts on flags it does not know.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__[:2] == (0, 10):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FEWER_PASSES}".strip()

# Where other processes compute, threads of LAPACK wait for each other: 50 times as long.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

# Scripts keep compiled programs in the user's cache; tests leave it alone.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")

# Shapes and types of every annotated function are checked in tests.
jaxtyping.install_import_hook("jaxprune", "beartype.beartype")

# Read by the hub's client when it is imported: whatever it is asked for is not there.
os.environ["HF_HUB_OFFLINE"] = "1"


def refuse(*arguments, **options):
    """In place of what would reach the network."""
    raise OSError("no network in tests")


socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse

REPOSITORY = Path(__file__).parent.parent
GOLDEN = REPOSITORY / "tests" / "golden"


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Each holds maps of memory, of which a process has 65,530; beyond, compiling crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def sketches():
    """Figures are drawn small and without their layout, which takes longer than most runs here.

    `drawn` draws them as for a user.
    """
    savefig = matplotlib.figure.Figure.savefig

    def sketch(figure, *arguments, **options):
        figure.set_layout_engine("none")
        savefig(figure, *arguments, **options, dpi=20)

    matplotlib.figure.Figure.savefig = sketch
    yield savefig
    matplotlib.figure.Figure.savefig = savefig


@pytest.fixture(scope="module")
def drawn(sketches):
    """Figures as for a user."""
    sketch = matplotlib.figure.Figure.savefig
    matplotlib.figure.Figure.savefig = sketches
    yield
    matplotlib.figure.Figure.savefig = sketch


@pytest.fixture
def key():
    """The one source of randomness in JAX code of a test."""
    return jax.random.key(0)


@pytest.fixture
def unchecked():
    """No type checks for the length of a test: shapes are wrong as a user's would be."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def compiled():
    """One entry for every compilation so far; clear it to start counting anew."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def optimised():
    """Compiled as for a user, with every pass."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """Float64 for the length of a test."""
    with jax.enable_x64(True):
        yield


COMMANDS = {"prune": "prune", "perplexity": "perplexity", "llama_heads": "heads"}


@pytest.fixture(scope="session")
def script():
    """`script("synthetic")` is the module experiments/synthetic.py, or that of a command or tool.

    What experiments/prune.py and its like run is the module in jaxprune/commands.
    """

    def load(name):
        if name in COMMANDS:
            return importlib.import_module(f"jaxprune.commands.{COMMANDS[name]}")
        (path,) = [
            REPOSITORY / folder / f"{name}.py"
            for folder in ("experiments", "tools")
            if (REPOSITORY / folder / f"{name}.py").exists()
        ]
        spec = importlib.util.spec_from_file_location(f"script_{name}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
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
