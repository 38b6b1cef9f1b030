"""The README's examples run as they are printed, its commands have flags that exist."""

import re
import shlex
from pathlib import Path

import pytest

from jaxprune.runs.configuration import flat
from jaxprune.runs.flags import parse_flags

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()
PAGES = {
    name: (REPOSITORY / name).read_text()
    for name in (
        *("README.md", "CONTRIBUTING.md", "docs/choosing.md", "docs/experiments.md"),
        *("docs/gallery.md", "docs/results.md"),
    )
}
# Where the package index finds what the README shows and links to.
OURS = (
    "https://github.com/jaxprune/jaxprune/blob/main/",
    "https://raw.githubusercontent.com/jaxprune/jaxprune/main/",
)
CONFIGS = {"perplexity": "PerplexityConfig"}


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text):
    """Commands in code blocks, and those in backquotes that are no patterns of a command."""
    lines = "".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:python experiments/|python tools/|make )[^`\[]*)`", text)
    return [shlex.split(line, comments=True) for line in lines]


def called(word):
    """Scripts with their flags, on any page."""
    for page, text in PAGES.items():
        for command in commands(text):
            scripts = [c for c in command[:3] if re.fullmatch(word, c)]
            if scripts and "pip" not in command:
                flags = command[command.index(scripts[0]) + 1 :]
                yield pytest.param(scripts[0], flags, id=f"{page}: {' '.join(command)[-60:]}")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Names that the blocks define and what each of them prints, all run in order."""
    import contextlib
    import io

    names, outputs = {}, []
    with contextlib.chdir(tmp_path_factory.mktemp("readme")):
        for block in blocks(README, "python"):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block, "README.md", "exec"), names)
            outputs.append(out.getvalue())
        names["files"] = sorted(f.name for f in Path("pruned-zoo").iterdir())
    return names, outputs


@pytest.mark.slow
def test_the_examples_run(printed):
    names, outputs = printed
    assert len(outputs) == 3
    errors = [float(number) for number in outputs[1].split()]
    assert len(errors) == 2
    assert all(0 < error < 1 for error in errors)
    assert names["head"].keep_mask.mean() == 0.5
    assert names["layer"].calibration_error.shape == (4,)


@pytest.mark.slow
def test_the_checkpoint_of_the_example_is_written(printed):
    names, outputs = printed
    assert outputs[0].startswith("pruned-zoo: 0.5000 of the pruned matrices is zero")
    assert names["report"].achieved_sparsity == {"wq": [0.5] * 6, "wk": [0.5] * 6}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names["files"])


@pytest.mark.parametrize(("path", "flags"), list(called(r"(?:experiments|tools)/\w+\.py|jaxprune")))
def test_commands_have_flags_that_exist(script, path, flags):
    name = Path(path).stem
    if path == "jaxprune":
        name, *flags = flags
        name = {"heads": "llama_heads"}.get(name, name)
    config = getattr(script(name), CONFIGS.get(name, "Config"))
    parsed = parse_flags(config, flags, path)
    if hasattr(parsed, "check") and flat(parsed).get("repeat") is None:
        parsed.check()


def test_no_two_commands_write_the_same_folder():
    """Whoever follows the pages from top to bottom meets no output that is there already."""
    written = {}
    pages = {**PAGES, "docs/paper.md": (REPOSITORY / "docs" / "paper.md").read_text()}
    for text in pages.values():
        lines = re.findall(r"`([^`\n]*--out [^`\n]*)`", text) + "".join(blocks(text, "sh")).split(
            "\n"
        )
        for line in lines:
            command = [word for word in shlex.split(line, comments=True) if word != "--resume"]
            if "--out" in command and "[" not in line and "NEW" not in line:
                out = command[command.index("--out") + 1]
                assert written.setdefault(out, command) == command, out
        for call in re.findall(r"prune_checkpoint\(\s*\"[^\"]+\", \"([^\"]+)\"", text):
            assert call not in written, call
            written[call] = call


def test_make_has_every_target_named():
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    named = {
        word
        for text in PAGES.values()
        for command in commands(text)
        if command[:1] == ["make"]
        for word in command[1 : command.index("&&") if "&&" in command else None]
        if re.fullmatch("[a-z-]+", word)
    }
    assert {"sweep", "test"} <= named <= set(targets)


@pytest.mark.parametrize("page", [*PAGES, "docs/paper.md", "docs/models.md", "CHANGELOG.md"])
def test_links_lead_to_files(page):
    text = (REPOSITORY / page).read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        if link.startswith(OURS):
            assert (REPOSITORY / re.sub(rf"^(?:{'|'.join(OURS)})", "", link)).exists(), link
        elif not link.startswith("https://"):
            assert ((REPOSITORY / page).parent / link).exists(), link


def test_the_readme_is_of_one_screen_and_its_links_hold_on_the_package_index():
    assert len(README.replace("|", "").split()) <= 900, "tables and code included"
    assert not re.search(r"\]\((?!https://)", README)


SCRIPTS = [p for name in ("experiments", "tools") for p in sorted((REPOSITORY / name).glob("*.py"))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_of_every_script_has_an_example(path, script, capsys, monkeypatch):
    if path.stem == "torch_forms":  # a module of benchmark.py
        return
    monkeypatch.syspath_prepend(path.parent)  # as when it is run
    with pytest.raises(SystemExit):
        script(path.stem).main(["--help"])
    shown = capsys.readouterr().out
    assert f"{path.parent.name}/{path.name} " in shown or "Example: jaxprune " in shown
    for odd in ("None", "(default: )", "}|", "|{"):
        assert odd not in shown
