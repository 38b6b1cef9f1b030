"""tools/task_files.py: questions whose true continuation is the document's own."""

import json

import pytest


@pytest.fixture
def write(script, tmp_path):
    """`write("--skip", "2")` is the exit status, files are in `tmp_path / "tasks"`."""
    texts = [" ".join(f"d{number}w{place}" for place in range(12)) for number in range(8)]
    lines = [json.dumps({"text": text}) for text in [*texts, "too short"]]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    module = script("task_files")

    def run(*flags):
        files = ["--text", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "tasks")]
        return module.main([*files, "--context", "8", "--words", "4", *flags])

    return run


def asked(folder):
    lines = (folder / "tasks" / "continuation.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_labelled_choice_goes_on_and_the_others_are_of_other_documents(write, tmp_path):
    assert write("--skip", "2") == 0
    questions = asked(tmp_path)
    assert [q["context"].split("w")[0] for q in questions] == [f"d{n}" for n in range(2, 8)]
    for question in questions:
        document = question["context"].split("w")[0]
        own = [choice.startswith(f"{document}w8 ") for choice in question["choices"]]
        assert own == [place == question["label"] for place in range(4)]
        assert len({choice.split("w")[0] for choice in question["choices"]}) == 4
    assert len({q["label"] for q in questions}) > 1
    assert "task: continuation" in (tmp_path / "tasks" / "continuation.yaml").read_text()


def test_too_few_documents_are_refused_before_anything_is_written(write, tmp_path, capsys):
    assert write("--skip", "6") == 2
    assert "--text: 2 documents of 12 words after --skip 6" in capsys.readouterr().err
    assert not (tmp_path / "tasks").exists()
