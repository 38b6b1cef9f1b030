"""tools/gallery.py: figures of finished runs in a page, and what it refuses."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def gallery(script):
    return script("gallery")


@pytest.fixture
def figure(gallery, tmp_path):
    """One figure of one run."""
    file = tmp_path / "runs" / gallery.ENTRIES["regimes"].source
    file.parent.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def flags(tmp_path, *more):
    return ["--runs", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs"), *more]


def test_figures_that_are_there_make_the_page(gallery, figure, tmp_path, capsys):
    assert gallery.main(flags(tmp_path, "--colours", "16")) == 0
    with Image.open(tmp_path / "docs" / "figures" / "regimes.png") as image:
        assert (image.size, image.mode) == ((60, 40), "P")
        assert len(image.getcolors()) <= 16
    page = (tmp_path / "docs" / "gallery.md").read_text()
    assert page.count("](figures/") == page.count("## ") == 1
    assert gallery.ENTRIES["regimes"].command in page
    figure.unlink()
    assert gallery.main(flags(tmp_path)) == 0, "figures of runs that are gone stay"
    assert (tmp_path / "docs" / "gallery.md").read_text() == page
    assert "1 of" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "header", "bomb", "text", "chunk"])
def test_damaged_figures_are_one_line(gallery, figure, tmp_path, monkeypatch, capsys, damage):
    whole = bytearray(figure.read_bytes())
    if damage == "cut":
        del whole[len(whole) // 2 :]
    elif damage == "header":
        whole[12:20] = b"\xff" * 8
    elif damage == "chunk":
        whole[37:41] = b"\x00\xff\x00\xff"
    elif damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    figure.write_bytes(b"not an image" if damage == "text" else whole)
    assert gallery.main(flags(tmp_path)) == 2
    shown = capsys.readouterr().err
    assert f"{figure}: not a whole PNG" in shown
    assert shown.count("\n") == 1
    assert list((tmp_path / "docs" / "figures").iterdir()) == []


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--colours", "1"], "--colours 1"),
        (["--runs", "nowhere"], "--runs nowhere: no such folder"),
        (["--docs", "/dev/null"], "--docs /dev/null"),
    ],
)
def test_wrong_flags_are_one_line(gallery, figure, tmp_path, capsys, more, named):
    given = {"--runs": str(tmp_path / "runs"), "--docs": str(tmp_path / "docs")}
    given |= dict([more])
    argv = [argument for pair in given.items() for argument in pair]
    assert gallery.main(argv) == 2
    shown = capsys.readouterr().err
    assert named in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "docs").exists()
