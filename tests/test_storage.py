"""Files that are there whole or not at all, and what is left where a process was killed."""

import json
import os

import pytest

from jaxprune.errors import InputError
from jaxprune.storage import (
    check_new_folder,
    new_folder,
    read_json,
    remove_partial_files,
    remove_partial_folders,
    replacing,
    work_folder,
)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "names 'c' twice; remove one of them"),
        (b'\xef\xbb\xbf{"a": 1}', "begins with a byte-order mark; save it as UTF-8 without one"),
        ('{"a": 1}'.encode("utf-16"), "begins with a byte-order mark"),
        (b'{"a": \xff}', "not valid JSON"),
        (b"[1]", "holds list, expected a JSON object"),
    ],
)
def test_json_that_is_not_clear_is_refused(tmp_path, content, named):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.json: {named}"):
        read_json(tmp_path / "a.json")


def test_links_to_a_folder_share_its_work_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert work_folder(tmp_path / "link") == work_folder(tmp_path / "real")
    assert work_folder(tmp_path / "real").name == ".real.work"


@pytest.mark.parametrize("name", ["n" * 250, "é" * 120])
def test_the_longest_names_have_room_for_what_is_beside_them(tmp_path, name):
    out = tmp_path / name
    check_new_folder(out)
    work_folder(out).mkdir()
    work_folder(out).rmdir()
    with new_folder(out) as folder:
        (folder / "a").write_text("a")
    assert os.listdir(tmp_path) == [name]
    with replacing(tmp_path / ("f" * 240 + ".json")) as partial:
        partial.write_text(json.dumps(1))
    assert work_folder(tmp_path / ("n" * 250)) != work_folder(tmp_path / ("n" * 249 + "m"))


def test_what_was_left_by_a_killed_process_is_swept(tmp_path):
    mine = [tmp_path / ".out-abcd12_3.partial", tmp_path / ".config-abcdefgh.partial.json"]
    others = [".out-more-abcd12_3.partial", ".out.work", "out-abcd12_3.partial"]
    mine[0].mkdir()
    mine[1].write_text("{")
    for name in others:
        (tmp_path / name).mkdir()
    remove_partial_folders(tmp_path / "out")
    remove_partial_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    remove_partial_files(tmp_path / "nowhere")
