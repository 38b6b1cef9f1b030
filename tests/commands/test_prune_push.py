"""jaxprune prune --push: what is uploaded and how, and what is refused; no network."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors

from jaxprune.commands import prune as command

FIXED = ["--method", "magnitude", "--windows", "8", "--seqlen", "32", "--heldout", "2"]
WRITES = {"auth": {"accessToken": {"role": "write"}}}


class Hub:
    """In place of ``HfApi``: remembers what it is asked to do.

    ``there`` maps repositories to whether they are private; ``broken`` names a method that fails.
    """

    def __init__(self):
        self.calls, self.there, self.broken, self.user = [], {}, None, WRITES

    def __call__(self):
        return self

    def _called(self, name, /, **options):
        self.calls.append((name, options))
        if self.broken == name:
            raise ConnectionError("the line is\ndown")

    def whoami(self):
        self._called("whoami")
        return self.user

    def repo_info(self, name):
        self._called("repo_info", name=name)
        if name not in self.there:
            raise not_found(name)
        return SimpleNamespace(private=self.there[name])

    def create_repo(self, name, **options):
        self._called("create_repo", name=name, **options)
        return f"https://hub/{name}"

    def upload_folder(self, **options):
        files = {file.name for file in Path(options["folder_path"]).iterdir()}
        self._called("upload_folder", files=files, **options)

    @property
    def names(self):
        return [name for name, _ in self.calls]


def not_found(name):
    """The client's error, whose signature differs between its versions."""
    error = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
    Exception.__init__(error, f"{name}: 404")
    return error


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    return hub


@pytest.fixture
def pruned(checkpoint, tmp_path, capsys):
    """`pruned(*flags)` runs the command: its status, what it printed, and the one line of error."""
    model, text = checkpoint("untied_gqa"), tmp_path / "text.txt"
    words = np.random.default_rng(0).choice(["the cat", "sat", "on a mat"], 900)
    text.write_text(" ".join(words))

    def run(*more, out=tmp_path / "out"):
        named = ["--model", model, "--calibration", text, "--out", out, *more]
        status = command.main([*map(str, named), *FIXED])
        shown = capsys.readouterr()
        return status, shown.out, shown.err.splitlines()[-1:]

    return run


def test_private_public_failed_and_again(pruned, hub, tmp_path):
    """One pruning, uploaded several times."""
    hub.broken = "upload_folder"
    out = tmp_path / "out"
    status, _, (line,) = pruned("--push", "me/small")
    assert status == 2
    assert line == (
        "jaxprune prune: error: --push me/small: not uploaded (ConnectionError: the line is); "
        f"{out} is finished, `hf upload me/small {out} . --private` uploads it"
    )
    whole = {file.name: file.read_bytes() for file in out.iterdir()}
    assert {"README.md", "model.safetensors", "pruning.json"} <= whole.keys()

    hub.broken, hub.calls = None, []
    status, shown, _ = pruned("--push", "me/small", "--resume")
    assert status == 0
    assert shown.splitlines() == [f"{out}: finished already", "https://hub/me/small"]
    assert hub.names == ["whoami", "repo_info", "repo_info", "create_repo", "upload_folder"]
    created, uploaded = hub.calls[-2][1], hub.calls[-1][1]
    assert created == {"name": "me/small", "private": True, "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["files"]) == ("me/small", set(whole))

    assert pruned("--push", "me/small", "--public", "--resume")[0] == 0
    assert hub.calls[-2][1]["private"] is False

    # Made public by someone while the work went on.
    hub.there["me/small"], hub.calls = True, []
    real = hub.repo_info

    def changed(name):
        hub.there[name] = "repo_info" not in hub.names
        return real(name)

    hub.repo_info = changed
    status, _, (line,) = pruned("--push", "me/small", "--resume")
    assert status == 2
    assert "not uploaded (is on the hub already and is public; give --public, or" in line
    assert "create_repo" not in hub.names
    assert {file.name: file.read_bytes() for file in out.iterdir()} == whole


def test_nothing_is_asked_of_the_hub_without_the_flag(pruned, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "prune_checkpoint", lambda **_: SimpleNamespace(seconds=1.0))
    assert pruned()[0] == 0
    assert hub.calls == []


def refused(pruned, tmp_path, *more):
    status, shown, (line,) = pruned(*more)
    assert (status, shown) == (2, "")
    assert not list(tmp_path.glob("*out*"))
    assert "hf_secret" not in line
    return line


@pytest.mark.parametrize(
    "name",
    ["small", "a/b/c", "-a/b", "a/b--c", "a/b..c", "a/b.git", "a/ b", "ä/b", "a/" + "b" * 97, "a/"],
)
def test_a_name_of_another_form_is_refused(pruned, hub, tmp_path, name):
    line = refused(pruned, tmp_path, f"--push={name}")
    assert "expected OWNER/NAME in letters" in line
    assert hub.calls == []


def test_without_a_token_it_says_how_to_log_in(pruned, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    line = refused(pruned, tmp_path, "--push", "me/small")
    assert line.endswith("no token of the hub is stored here; run `hf auth login`")
    assert hub.calls == []


def test_a_token_that_the_hub_refuses_or_that_only_reads(pruned, hub, tmp_path, monkeypatch):
    hub.user = {"auth": {"accessToken": {"role": "read"}}}
    assert "may only read" in refused(pruned, tmp_path, "--push", "me/small")

    def unauthorised():
        error = not_found("whoami")
        error.response = SimpleNamespace(status_code=401)
        raise error

    monkeypatch.setattr(hub, "whoami", unauthorised, raising=False)
    line = refused(pruned, tmp_path, "--push", "me/small")
    assert "refuses the token that is stored here; run `hf auth login`" in line


@pytest.mark.parametrize("broken", ["whoami", "repo_info"])
def test_without_a_network_nothing_is_begun(pruned, hub, tmp_path, broken):
    hub.broken = broken
    line = refused(pruned, tmp_path, "--push", "me/small")
    assert "the hub does not answer (ConnectionError: the line is)" in line


def test_a_repository_of_another_visibility_is_refused(pruned, hub, tmp_path):
    hub.there = {"me/open": False, "me/closed": True}
    line = refused(pruned, tmp_path, "--push", "me/open")
    assert "is on the hub already and is public; give --public, or choose another name" in line
    line = refused(pruned, tmp_path, "--push", "me/closed", "--public")
    assert "is private; leave out --public, or choose another name" in line


def test_public_alone_and_a_repetition_are_refused(pruned, hub, tmp_path):
    assert "--public: has no effect without --push" in refused(pruned, tmp_path, "--public")
    again = tmp_path / "finished"
    shutil.copytree(Path(__file__).parents[2] / "docs" / "quadratic", again)
    line = refused(pruned, tmp_path, "--push", "me/small", "--repeat", again)
    assert "a repetition takes --repeat and --out alone" in line
