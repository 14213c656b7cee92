import errno
import os
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import ExifTags, Image

from tests.helpers import ROOT
from vpt.data import images
from vpt.data.images import Decoding, ImageError, check_image, read_header, read_image

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


def test_every_extension_belongs_to_a_format_that_is_read():
    known = Image.registered_extensions()
    assert all(known[extension] in images.FORMATS for extension in images.EXTENSIONS)


def test_what_an_installed_plug_in_of_pillow_reads_is_read(tmp_path):
    """A plug-in as pillow-heif: it registers a format when it is told to, here one that holds a PNG."""
    (tmp_path / "pillow_heif.py").write_text(
        "from PIL import Image, PngImagePlugin\n"
        "class Heif(PngImagePlugin.PngImageFile):\n    format = 'HEIF'\n"
        "def register_heif_opener():\n    Image.register_open('HEIF', Heif)\n"
    )
    Image.new("RGB", (3, 2)).save(tmp_path / "a.heic", "PNG")
    code = "from vpt.data.images import read_image; from vpt.data.image_files import find_images; "
    code += "(path,) = find_images('.'); print(path, read_image(path).size)"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "a.heic (3, 2)\n", done.stderr
