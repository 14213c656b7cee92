"""Image files of a folder, and patterns."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vpt.data.image_files import find_images, split_pattern
from vpt.data.images import ImageError, check_image


@pytest.fixture
def picture() -> Image.Image:
    """A small image."""
    return Image.fromarray(np.zeros((4, 6, 3), np.uint8))


def test_a_folder_that_is_a_link_is_read_and_links_in_a_circle_do_not_multiply_images(picture, tmp_path):
    root = tmp_path / "root"
    for folder in (root / "a", root / "b", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
        picture.save(folder / "0.png")
    for link, target in {"a/me": "root/a", "b/root": "root", "c": "elsewhere", "loop.png": "root/loop.png"}.items():
        (root / link).symlink_to(tmp_path / target)
    assert find_images(root) == [root / name for name in ("a/0.png", "b/0.png", "c/0.png", "loop.png")]
    with pytest.raises(ImageError, match=r"loop\.png"):
        check_image(root / "loop.png")


@pytest.fixture
def many(picture, tmp_path, monkeypatch):
    """A folder of folders of images and other files, and the current folder beside it."""
    names = ("a/1.png", "a/2.JPG", "a/deep/3.png", "b/4.png", "b/.hidden/5.png", ".c/6.png", "x[1]/7.png", "8[9].png")
    for name in names:
        (tmp_path / "many" / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "many" / name)
    (tmp_path / "many" / "a" / "notes.txt").write_text("")
    (tmp_path / "many" / "b" / "loop").symlink_to(tmp_path / "many")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("many/**/*.png", ["8[9].png", "a/1.png", "a/deep/3.png", "b/4.png", "x[1]/7.png"]),
        ("many/a/*", ["a/1.png", "a/2.JPG", "a/deep/3.png"]),
        ("many/?/[13]*", ["a/1.png"]),
        ("many/a*", ["a/1.png", "a/2.JPG", "a/deep/3.png"]),
        ("many/x[1]/*.png", ["x[1]/7.png"]),
        ("many/8[9].png", ["8[9].png"]),
        ("many/x[1]", ["x[1]/7.png"]),
    ],
)
def test_a_pattern_finds_matches_sorted_and_existing_names_are_literal(many, tmp_path, pattern, names):
    assert find_images(pattern) == [Path("many", name) for name in names]
    assert find_images(tmp_path / pattern) == [tmp_path / "many" / name for name in names]


@pytest.mark.parametrize(
    ("pattern", "word"), [("many/*.gif", "bmp"), ("many/a/*.txt", ""), ("nowhere/**/*.jpg", ""), ("many/nothing", "")]
)
def test_a_pattern_without_a_match_is_refused_by_name(many, pattern, word):
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(pattern)}.*{word}"):
        find_images(pattern)


def test_a_pattern_is_split_after_its_existing_folders(many):
    assert split_pattern(Path("many/x[1]/**/*.png")) == (Path("many/x[1]"), "**/*.png")
    assert split_pattern(Path("*.png")) == (Path(), "*.png")
    assert split_pattern(Path("/a*/b")) == (Path("/"), "a*/b")
    assert split_pattern(Path("many/a")) == (Path("many/a"), "")
