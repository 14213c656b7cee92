import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import ExifTags, Image

from tests.helpers import ROOT
from vpt.data import images
from vpt.data.images import (
    Decoding,
    ImageError,
    check_image,
    find_images,
    read_header,
    read_image,
    split_pattern,
)

ORIENTATION = 0x0112


@pytest.fixture
def picture() -> Image.Image:
    """Four rows, six columns, no two pixels alike."""
    return Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3)


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(orientation, picture, tmp_path):
    # How each orientation is stored, so that applying the tag gives the image back.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](np.asarray(picture))
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif_of(orientation))
    image = read_image(tmp_path / "a.png")
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(picture))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_header_has_the_upright_and_the_stored_size(suffix, orientation, tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / f"a.{suffix}", exif=exif_of(orientation))
    upright, stored, number = read_header(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}")
    assert upright == (image.height, image.width)
    assert stored == (4, 6)
    assert number == orientation


def test_a_lack_of_open_files_is_not_blamed_on_the_image(picture, tmp_path, monkeypatch):
    picture.save(tmp_path / "a.png")
    monkeypatch.setattr("builtins.open", Mock(side_effect=OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(OSError, match="Too many"):
        read_image(tmp_path / "a.png")


def test_the_limit_of_pixels_is_inclusive_and_holds_for_headers(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    for read in (read_image, check_image, read_header):
        read(tmp_path / "a.png", Decoding(max_pixels=24))
        with pytest.raises(ImageError, match=r"a\.png: 24 pixels are more than the 23 allowed"):
            read(tmp_path / "a.png", Decoding(max_pixels=23))


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


def test_every_extension_belongs_to_a_format_that_is_read():
    known = Image.registered_extensions()
    assert all(known[extension] in images.FORMATS for extension in images.EXTENSIONS)


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


def test_what_an_installed_plug_in_of_pillow_reads_is_read(tmp_path):
    """A plug-in as pillow-heif: it registers a format when it is told to, here one that holds a PNG."""
    (tmp_path / "pillow_heif.py").write_text(
        "from PIL import Image, PngImagePlugin\n"
        "class Heif(PngImagePlugin.PngImageFile):\n    format = 'HEIF'\n"
        "def register_heif_opener():\n    Image.register_open('HEIF', Heif)\n"
    )
    Image.new("RGB", (3, 2)).save(tmp_path / "a.heic", "PNG")
    code = "from vpt.data.images import *; (path,) = find_images('.'); print(path, read_image(path).size)"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "a.heic (3, 2)\n", done.stderr
