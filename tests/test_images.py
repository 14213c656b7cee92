import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from vpt.data.images import (
    EXTENSIONS,
    FORMATS,
    ImageError,
    check_image,
    find_images,
    read_header,
    read_image,
    split_pattern,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)
ORIENTATION = 0x0112
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"


@pytest.fixture
def picture() -> Image.Image:
    """Four rows, six columns, no two pixels alike."""
    return Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3)


def pixels(path: Path, **arguments) -> np.ndarray:
    image = read_image(path, **arguments)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tif"])
def test_a_lossless_picture_comes_back_as_it_was(suffix, picture, tmp_path):
    picture.save(tmp_path / f"a.{suffix}")
    assert np.array_equal(pixels(tmp_path / f"a.{suffix}"), np.asarray(picture))


def test_the_content_decides_the_format_and_not_the_name(picture, tmp_path):
    picture.save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(pixels(tmp_path / "a.jpg"), np.asarray(picture))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(orientation, picture, tmp_path):
    # How each orientation is stored, so that applying the tag gives the picture back.
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
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(picture))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_put_over_white(mode, tmp_path):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.convert(mode).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").tolist() == [[[255] * 3, [0] * 3]]


def test_a_transparent_palette_entry_is_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert pixels(tmp_path / "a.png").tolist() == [[[255] * 3, list(BLUE)]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_modes_become_rgb(mode, tmp_path):
    Image.new("RGB", (3, 2), "white").convert(mode).save(tmp_path / "a.tif")
    assert (pixels(tmp_path / "a.tif") == 255).all()


def test_16_bit_grey_is_scaled_and_not_white(tmp_path):
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert pixels(tmp_path / name)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_pgm_is_scaled_and_not_white(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 65535\n" + struct.pack(">3H", 0, 128 * 257, 65535))
    assert pixels(tmp_path / "a.pgm")[0, :, 0].tolist() == [0, 128, 255]


def test_32_bit_values_beyond_16_bit_are_refused(tmp_path):
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif: grey values 0 to 70000 are no 16-bit values"):
        read_image(tmp_path / "a.tif")


def test_floating_point_pictures_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif: floating point"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_an_animation_gives_its_first_frame(suffix, tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    assert np.abs(pixels(tmp_path / f"a.{suffix}").astype(int) - RED).max() < 8


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_a_truncated_picture_is_refused_by_name(suffix, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=rf"a\.{suffix}: (broken|not a) picture"):
        read_image(path)


def test_a_flipped_bit_in_a_png_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(noise).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.png: broken picture"):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"", "the file is empty"), (b"hello", "not a picture"), (EPS, "not a picture")],
)
def test_what_is_no_picture_is_refused_by_name(content, why, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=rf"a\.jpg: {why}.*JPEG"):
        read_image(tmp_path / "a.jpg")


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    with pytest.raises(ImageError, match=r"a\.jpg: no such file"):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="a folder, not a picture"):
        read_image(tmp_path)


def png_bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than it holds: decoding it would fail."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_000, 10_000, 60_000])
def test_too_many_pixels_are_refused_before_decoding(side, tmp_path):
    (tmp_path / "a.png").write_bytes(png_bomb(side, side))
    with pytest.raises(ImageError, match=r"a\.png: .*pixels.*shrink"):
        read_image(tmp_path / "a.png")


def test_max_pixels_is_inclusive(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=24).size == (6, 4)
    with pytest.raises(ImageError, match="24 pixels are more than the 23 allowed"):
        read_image(tmp_path / "a.png", max_pixels=23)


def test_a_check_reads_the_header_and_nothing_else(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    check_image(tmp_path / "a.png", max_pixels=24)
    with pytest.raises(ImageError, match=r"a\.png: 24 pixels are more than the 23 allowed; shrink"):
        check_image(tmp_path / "a.png", max_pixels=23)
    (tmp_path / "bomb.png").write_bytes(png_bomb(8_000, 8_000))
    with pytest.raises(ImageError, match=r"bomb\.png: .*pixels.*shrink"):
        check_image(tmp_path / "bomb.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"empty\.png: the file is empty"):
        check_image(tmp_path / "empty.png")
    (tmp_path / "small_bomb.png").write_bytes(png_bomb(100, 100))
    check_image(tmp_path / "small_bomb.png")  # that its pixels are missing is seen when it is read


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_header_tells_the_upright_and_the_stored_size(suffix, orientation, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (6, 4)).save(tmp_path / f"a.{suffix}", exif=exif)
    upright, stored, number = read_header(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}")
    assert upright == (image.height, image.width)
    assert stored == (4, 6)
    assert number == (orientation if upright != stored else 1)


def test_a_header_that_cannot_be_used_is_refused_by_name(tmp_path):
    with pytest.raises(ImageError, match=r"none\.png: no such file"):
        read_header(tmp_path / "none.png")
    (tmp_path / "bomb.png").write_bytes(png_bomb(8_000, 8_000))
    with pytest.raises(ImageError, match=r"bomb\.png: 64,000,000 pixels are more than the 50,000,000 allowed"):
        read_header(tmp_path / "bomb.png")
    Image.new("RGB", (6, 4)).save(tmp_path / "exif.png", exif=b"Exif\x00\x00nothing")
    with pytest.raises(
        ImageError, match=r"exif\.png: broken EXIF data \(.*\), so nothing tells how it lies; save it without"
    ):
        read_header(tmp_path / "exif.png")


def test_links_in_a_circle_do_not_multiply_pictures(picture, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "0.png")
    (tmp_path / "a" / "me").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "root").symlink_to(tmp_path)
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert find_images(tmp_path) == [tmp_path / "a" / "0.png", tmp_path / "b" / "0.png", tmp_path / "loop.png"]
    with pytest.raises(ImageError, match=r"loop\.png"):
        check_image(tmp_path / "loop.png")


def test_a_folder_that_is_a_link_is_read(picture, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    picture.save(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").symlink_to(tmp_path / "elsewhere")
    assert find_images(tmp_path / "root") == [tmp_path / "root" / "a" / "0.png"]


def test_every_extension_belongs_to_a_format_that_is_read():
    known = Image.registered_extensions()
    assert all(known[extension] in FORMATS for extension in EXTENSIONS)


@pytest.fixture
def many(picture, tmp_path, monkeypatch):
    """A folder of folders of pictures and other files, and the current folder beside it."""
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
def test_a_pattern_finds_what_matches_sorted_and_names_that_are_there_are_themselves(many, tmp_path, pattern, names):
    assert find_images(pattern) == [Path("many", name) for name in names]
    assert find_images(tmp_path / pattern) == [tmp_path / "many" / name for name in names]


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("many/*.gif", FileNotFoundError, r"many/\*\.gif: matches no picture \(\.(avif, \.)?bmp, "),
        ("many/a/*.txt", FileNotFoundError, "matches no picture"),
        ("nowhere/**/*.jpg", FileNotFoundError, "matches no picture"),
        ("many/nothing", FileNotFoundError, "many/nothing: no such file or folder"),
    ],
)
def test_a_pattern_without_a_match_is_refused_by_name(many, pattern, error, message):
    with pytest.raises(error, match=message):
        find_images(pattern)


def test_a_pattern_starts_from_its_first_folder_that_is_not_there(many):
    assert split_pattern(Path("many/x[1]/**/*.png")) == (Path("many/x[1]"), "**/*.png")
    assert split_pattern(Path("*.png")) == (Path(), "*.png")
    assert split_pattern(Path("/a*/b")) == (Path("/"), "a*/b")
    assert split_pattern(Path("many/a")) == (Path("many/a"), "")
