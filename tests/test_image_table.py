"""A table of image files: the pixels that each is read as, or the words of its refusal."""

import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from tests.helpers import HAS_AVIF, encode, noise
from vpt.data.images import (
    DEFAULT_DECODING,
    FULL,
    Decoding,
    ImageError,
    check_image,
    read_header,
    read_image,
    read_properties,
)

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
HALF_RED = (255, 127, 127)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, rows: bytes, *, bits: int = 8, colour_type: int = 0, extra: bytes = b"", end: bool = True
) -> bytes:
    """A PNG of what it is told, whether that fits together or not."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows, 1))
    return content + (chunk(b"IEND", b"") if end else b"")


def two(left, right, mode: str = "RGB") -> Image.Image:
    """Two pixels."""
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), left)
    image.putpixel((1, 0), right)
    return image


def plain(colour, mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (16, 12), colour).convert(mode)


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    return image


def animation(form: str) -> bytes:
    return encode(plain(RED), form, save_all=True, append_images=[plain(BLUE), plain(GREEN)])


def lying(orientation: int, form: str, **options) -> bytes:
    """Red at the upper left of the upright image, which has 16 columns and 12 rows; the rest is blue."""
    upright = plain(BLUE)
    upright.paste(RED, (0, 0, 8, 6))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose, the inverse of what EXIF asks for
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(stored, form, exif=exif, **({"quality": 95} if form == "JPEG" else {}), **options)


def cut(content: bytes, part: float = 0.5) -> bytes:
    return content[: int(len(content) * part)]


def flipped(content: bytes) -> bytes:
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 0xFF
    return bytes(damaged)


def with_text(size: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "a" * size, zip=True)
    return encode(plain(RED), "PNG", pnginfo=info)


def grey_16(form: str) -> bytes:
    return encode(Image.fromarray(np.array([[0, 128 * 257, 65535]], dtype=np.uint16)), form)


def moved_behind(content: bytes) -> bytes:
    """A PNG whose chunks between its header and its pixels follow the pixels."""
    pixels, end = content.index(b"IDAT") - 4, content.index(b"IEND") - 4
    return content[:33] + content[pixels:end] + content[33:pixels] + content[end:]


def with_scans(num: int) -> bytes:
    """A progressive JPEG with its last scan repeated."""
    content = encode(plain(RED), "JPEG", progressive=True)
    return content[:-2] + num * content[content.rindex(b"\xff\xda") : -2] + content[-2:]


def tiff(width: int, bands: int, bits: int, samples: bytes, extra: int | None = None, form: int = 1) -> bytes:
    """A TIFF of one row without compression; `extra` is what it says of the last band."""
    depth = [(258, 3, 1, bits)] if bands == 1 else [(258, 3, bands, 8)]
    entries = [(256, 3, 1, width), (257, 3, 1, 1), *depth, (259, 3, 1, 1), (262, 3, 1, 2 if bands > 2 else 1)]
    entries += [(273, 4, 1, 16), (277, 3, 1, bands), (278, 3, 1, 1), (279, 4, 1, len(samples))]
    entries += ([] if extra is None else [(338, 3, 1, extra)]) + [(339, 3, 1, form)] * (bands == 1)
    listed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    start = struct.pack("<2sHI", b"II", 42, 16 + len(samples)) + struct.pack("<4H", *[bits] * 4)
    return start + samples + struct.pack("<H", len(entries)) + listed + bytes(4)


def bands_tiff(extra: int | None) -> bytes:
    return tiff(2, 4, 8, bytes([10, 20, 30, 20] * 2), extra)


def signed(values: list[int]) -> bytes:
    return tiff(len(values), 1, 16, struct.pack(f"<{len(values)}h", *values), form=2)


def colours_16(form: str, *extra: int) -> bytes:
    """Two pixels of 12 bits in 16; of them a fourth band if it is given."""
    pixels = np.uint16([[[257, 0, 4095, *extra], [0, 4095, 0, *[0] * len(extra)]]])
    if form == "tif":
        return tiff(2, pixels.shape[2], 16, pixels.astype("<u2").tobytes(), *[0] * len(extra))
    rows = b"\0" + pixels.astype(">u2").tobytes()
    return png(2, 1, rows, bits=16, colour_type=2)


LARGE = b"x" * 5_000_000
SIGNED, THERMAL = Decoding(range=(-300, 300)), Decoding(range=(28000, 29000))
FLOATS = np.float32([[-1000, 0, np.nan]])
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
BROKEN_EXIF = b"Exif\x00\x00nothing"
CUT_EXIF = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x09\x00\x12\x01"
Row = list[tuple[int, int, int]]


@dataclass(frozen=True)
class File:
    """A file, and the size and the pixels of the first row that it gives (within `near`), or the words of an error."""

    name: str
    content: Callable[[], bytes]
    size: tuple[int, int] = (0, 0)
    row: Row = ()
    near: int = 0
    error: str = ""
    decoding: Decoding = DEFAULT_DECODING
    is_ignored: bool = False  # metadata


TABLE = [
    *(
        File(f"exif_{number}.{form.lower()}", lambda n=number, f=form: lying(n, f), (16, 12), [RED], near)
        for number in range(1, 9)
        for form, near in (("PNG", 0), ("JPEG", 12), ("TIFF", 0), ("WEBP", 12))
    ),
    File("grey.png", lambda: encode(two(0, 200, "L"), "PNG"), (2, 1), [BLACK, (200,) * 3]),
    File("grey.jpg", lambda: encode(plain(RED, "L"), "JPEG"), (16, 12), [(76,) * 3], 1),
    File("grey_alpha.png", lambda: encode(two((0, 0), (0, 255), "LA"), "PNG"), (2, 1), [WHITE, BLACK]),
    File("1_bit.png", lambda: encode(two(0, 255, "1"), "PNG"), (2, 1), [BLACK, WHITE]),
    File("1_bit.tif", lambda: encode(two(0, 255, "1"), "TIFF"), (2, 1), [BLACK, WHITE]),
    File("palette.png", lambda: encode(palette(), "PNG"), (2, 1), [RED, BLUE]),
    File("palette_alpha.png", lambda: encode(palette(), "PNG", transparency=0), (2, 1), [WHITE, BLUE]),
    File("palette_alphas.png", lambda: encode(palette(), "PNG", transparency=b"\x80\xff"), (2, 1), [HALF_RED, BLUE], 1),
    File("palette_alpha.gif", lambda: encode(palette(), "GIF", transparency=0), (2, 1), [WHITE, BLUE]),
    File("colour_key.png", lambda: encode(two(RED, BLUE), "PNG", transparency=RED), (2, 1), [WHITE, BLUE]),
    File("rgba.png", lambda: encode(two((*RED, 0), (*RED, 128), "RGBA"), "PNG"), (2, 1), [WHITE, HALF_RED], 1),
    File(
        "rgba_over_a_name.png",
        lambda: encode(two((*RED, 0), (*RED, 255), "RGBA"), "PNG"),
        (2, 1),
        [GREEN, RED],
        decoding=Decoding(background="green"),
    ),
    File(
        "rgba_over_numbers.webp",
        lambda: encode(two((*RED, 0), (*BLUE, 255), "RGBA"), "WEBP", lossless=True),
        (2, 1),
        [(1, 2, 3), BLUE],
        decoding=Decoding(background="#010203"),
    ),
    File("cmyk.jpg", lambda: encode(plain(RED, "CMYK"), "JPEG"), (16, 12), [RED], 8),
    File("cmyk.tif", lambda: encode(plain(RED, "CMYK"), "TIFF"), (16, 12), [RED], 1),
    File("16_bit.png", lambda: grey_16("PNG"), (3, 1), [BLACK, (128,) * 3, WHITE]),
    File("16_bit.tif", lambda: grey_16("TIFF"), (3, 1), [BLACK, (128,) * 3, WHITE]),
    File("16_bit.pgm", lambda: b"P5 2 1 65535\n" + struct.pack(">2H", 0, 128 * 257), (2, 1), [BLACK, (128,) * 3]),
    File("float.tif", lambda: encode(Image.new("F", (2, 2)), "TIFF"), error="floating point images"),
    File("32_bit.tif", lambda: encode(Image.new("I", (2, 2), 70_000), "TIFF"), error="are not 16-bit"),
    File("animated.gif", lambda: animation("GIF"), (16, 12), [RED]),
    File("animated.png", lambda: animation("PNG"), (16, 12), [RED]),
    File("animated.webp", lambda: animation("WEBP"), (16, 12), [RED], 8),
    File("pages.tif", lambda: animation("TIFF"), (16, 12), [RED]),
    File("two_in_one.jpg", lambda: animation("MPO"), (16, 12), [RED], 8),
    File("plain.webp", lambda: encode(plain(BLUE), "WEBP"), (16, 12), [BLUE], 8),
    File("plain.bmp", lambda: encode(plain(BLUE), "BMP"), (16, 12), [BLUE]),
    File("plain.ppm", lambda: encode(plain(BLUE), "PPM"), (16, 12), [BLUE]),
    File("jpeg.tif", lambda: encode(plain(BLUE), "TIFF", compression="jpeg"), (16, 12), [BLUE], 8),
    File("png_inside.jpg", lambda: encode(plain(BLUE), "PNG"), (16, 12), [BLUE]),
    File("no_extension", lambda: encode(plain(BLUE), "PNG"), (16, 12), [BLUE]),
    File("truncated.jpg", lambda: cut(encode(noise(), "JPEG")), error="broken image"),
    File("truncated.png", lambda: cut(encode(noise(), "PNG")), error="broken image"),
    File("truncated.tif", lambda: cut(encode(noise(), "TIFF", compression="tiff_lzw")), error="image"),
    File("header_only.jpg", lambda: cut(encode(noise(), "JPEG"), 0.02), error="not an image"),
    File("truncated.webp", lambda: cut(encode(noise(), "WEBP")), error="broken image"),
    File("truncated.bmp", lambda: cut(encode(noise(), "BMP")), error="broken image"),
    File("grey.bmp", lambda: encode(plain(WHITE, "L"), "BMP"), (16, 12), [WHITE]),
    File("eps.jpg", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n", error="not an image"),
    File("flipped.png", lambda: flipped(encode(noise(), "PNG")), error="broken image"),
    File("no_end.png", lambda: png(2, 1, b"\0\0\xc8", end=False), (2, 1), [BLACK, (200,) * 3]),
    File("no_pixels.png", lambda: png(20, 20, b""), error="broken image"),
    File("empty.jpg", lambda: b"", error="the file is empty"),
    File("text.jpg", lambda: b"hello, this is a text", error="not an image"),
    File("html.png", lambda: HTML, error="not an image"),
    File("zero_by_zero.png", lambda: png(0, 0, b""), error="not an image, or its header is broken"),
    File(
        "negative.bmp",
        lambda: encode(plain(BLUE), "BMP").replace(struct.pack("<i", 16), struct.pack("<i", -16), 1),
        error="image",
    ),
    File("tall.png", lambda: png(1, 10_000, b"\0\x07" * 10_000), (1, 10_000), [(7,) * 3]),
    File("wide.png", lambda: png(10_000, 1, b"\0" + b"\x07" * 10_000), (10_000, 1), [(7,) * 3]),
    File("64_megapixels.png", lambda: png(8_000, 8_000, b""), error="64,000,000 pixels are more than the 50,000,000"),
    File("3600_megapixels.png", lambda: png(60_000, 60_000, b""), error="too many pixels"),
    File("broken_exif.jpg", lambda: encode(plain(BLUE), "JPEG", exif=BROKEN_EXIF), (16, 12), [BLUE], 8),
    File("broken_exif.png", lambda: encode(plain(BLUE), "PNG", exif=BROKEN_EXIF), (16, 12), [BLUE], is_ignored=True),
    File("broken_exif.webp", lambda: encode(plain(BLUE), "WEBP", exif=b"X"), (16, 12), [BLUE], 8, is_ignored=True),
    File("cut_exif.jpg", lambda: encode(plain(BLUE), "JPEG", exif=CUT_EXIF), (16, 12), [BLUE], 8),
    File("text_of_100_kB.png", lambda: with_text(100_000), (16, 12), [RED]),
    File("text_of_100_MB.png", lambda: with_text(100_000_000), (16, 12), [RED], is_ignored=True),
    File("text_behind.png", lambda: moved_behind(with_text(2_000_000)), (16, 12), [RED]),
    File("damaged_text.png", lambda: with_text(9).replace(b"note", b"nope"), (16, 12), [RED], is_ignored=True),
    File("profile.jpg", lambda: encode(plain(BLUE), "JPEG", icc_profile=b"x" * 500_000), (16, 12), [BLUE], 8),
    File("profile.png", lambda: encode(plain(BLUE), "PNG", icc_profile=LARGE), (16, 12), [BLUE], is_ignored=True),
    File("profile_and_exif.png", lambda: lying(6, "PNG", icc_profile=LARGE), (16, 12), [RED], is_ignored=True),
    File("plain.pgm", lambda: b"P2 2 1 255 0 200\n", error="numbers as text"),
    File("plain.pbm", lambda: b"P1 2 1 0 1\n", error="numbers as text"),
    File("comments.pgm", lambda: b"P5\n" + b"#\n" * 9000 + b"2 1 255\n\0\xc8", error="a header of more than"),
    File("comment.pgm", lambda: b"P5\n# by hand\n2 1 255\n\0\xc8", (2, 1), [BLACK, (200,) * 3]),
    File("scans.jpg", lambda: with_scans(200), error="scans"),
    File("few_scans.jpg", lambda: with_scans(5), (16, 12), [RED], 8),
    *(
        File(
            f"{bits}_bits.{form.lower()}", lambda v=values, f=form: encode(Image.fromarray(v), f), size, row, 0, "", how
        )
        for form in ("PNG", "TIFF")
        for bits, values, size, row, how in (
            (12, np.uint16([[0, 2056, 4095]]), (3, 1), [BLACK, (128,) * 3, WHITE], Decoding(range=(0, 4095))),
            (8, np.uint16([[0, 200, 255]]), (3, 1), [BLACK, (200,) * 3, WHITE], Decoding(range=(0, 255))),
            ("beyond", np.uint16([[28000, 28200, 60000]]), (3, 1), [BLACK, (51,) * 3, WHITE], THERMAL),
        )
    ),
    File("signed.tif", lambda: signed([-300, 0, 300]), (3, 1), [BLACK, (128,) * 3, WHITE], 0, "", SIGNED),
    File("32_bits.tif", lambda: encode(Image.new("I", (2, 2), 300), "TIFF"), (2, 2), [WHITE], 0, "", SIGNED),
    File(
        "floats.tif", lambda: encode(Image.fromarray(FLOATS), "TIFF"), (3, 1), [BLACK, (128,) * 3, BLACK], 0, "", SIGNED
    ),
    File(
        "48_bits.png", lambda: colours_16("png"), (2, 1), [(16, 0, 255), (0, 255, 0)], 0, "", Decoding(range=(0, 4095))
    ),
    File(
        "48_bits.tif", lambda: colours_16("tif"), (2, 1), [(16, 0, 255), (0, 255, 0)], 0, "", Decoding(range=(0, 4095))
    ),
    File("48_bits_full.png", lambda: colours_16("png"), (2, 1), [(1, 0, 15), (0, 15, 0)], 0, "", Decoding(range=FULL)),
    File(
        "64_bits.tif",
        lambda: colours_16("tif", 20),
        (2, 1),
        [(16, 16, 16), (0, 0, 0)],
        0,
        "",
        Decoding(range=(0, 320), bands=(4, 4, 4)),
    ),
    File("undeclared.tif", lambda: bands_tiff(None), error="4 bands, of which 1"),
    File("unspecified.tif", lambda: bands_tiff(0), error="4 bands, of which 1"),
    File("declared.tif", lambda: bands_tiff(2), (2, 1), [(235,) * 3], 2),
    *(
        File(f"chosen_{kind}_{bands[0]}.tif", lambda k=kind: bands_tiff(k), (2, 1), row, 0, "", Decoding(bands=bands))
        for kind in (None, 0, 2)
        for bands, row in (((1, 2, 3), [(10, 20, 30)]), ((4, 1, 2), [(20, 10, 20)]))
    ),
    File("no_fifth.tif", lambda: bands_tiff(0), error="only 3 can be read", decoding=Decoding(bands=(5, 1, 2))),
    File(
        "no_alpha.png",
        lambda: encode(two((*RED, 0), (*RED, 9), "RGBA"), "PNG"),
        (2, 1),
        [RED, RED],
        0,
        "",
        Decoding(bands=(1, 2, 3)),
    ),
]
if HAS_AVIF:
    TABLE += [
        File("plain.avif", lambda: encode(plain(BLUE), "AVIF"), (16, 12), [BLUE], 12),
        File("lying.avif", lambda: lying(6, "AVIF"), (16, 12), [RED], 40),
        File("rgba.avif", lambda: encode(Image.new("RGBA", (16, 12), (*RED, 0)), "AVIF"), (16, 12), [WHITE], 12),
        File("truncated.avif", lambda: cut(encode(noise(), "AVIF")), error="image"),
    ]


@pytest.mark.parametrize("file", TABLE, ids=lambda file: file.name)
def test_a_file_is_read_as_its_image_or_refused_with_the_reason(file, tmp_path):
    path = tmp_path / file.name
    path.write_bytes(file.content())
    if not file.row:
        with pytest.raises(ImageError) as error:
            read_image(path, file.decoding)
        assert str(error.value).startswith(f"{path}: ")
        assert file.error in str(error.value)
        assert "\n" not in str(error.value)
        return
    image = read_image(path, file.decoding)
    assert (image.mode, image.size) == ("RGB", file.size)
    found = np.asarray(image)[0, : len(file.row)].astype(int)
    assert np.abs(found - np.array(file.row)).max() <= file.near
    (height, width), stored, _ = read_header(path, file.decoding)
    assert (width, height) == image.size
    assert check_image(path, file.decoding) in (stored[::-1], image.size)
    assert read_properties(path, file.decoding).is_ignored is file.is_ignored


def test_checks_read_the_header_only_and_refuse_what_it_shows(tmp_path):
    files, path = {file.name: file for file in TABLE}, tmp_path / "a"
    assert len(files) == len(TABLE)
    path.write_bytes(files["no_pixels.png"].content())
    assert (check_image(path), read_header(path)) == ((20, 20), ((20, 20), (20, 20), 1))
    for name in (
        "64_megapixels.png",
        "3600_megapixels.png",
        "empty.jpg",
        "text.jpg",
        "undeclared.tif",
        "scans.jpg",
        "plain.pgm",
    ):
        path.write_bytes(files[name].content())
        for check in (read_header, check_image, read_properties):
            with pytest.raises(ImageError, match=f"^{path}: .*{files[name].error}"):
                check(path, files[name].decoding)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.mkdir(), "a folder, not an image"),
        (os.mkfifo, "a pipe or a device, not an image"),
        (lambda path: path.symlink_to("/dev/zero"), "a pipe or a device, not an image"),
        (lambda path: path.symlink_to(path), "cannot be read (Too many levels of symbolic links)"),
        (lambda path: None, "no such file"),
    ],
)
def test_anything_but_a_regular_file_is_refused_without_waiting(make, words, tmp_path):
    path = tmp_path / "a.jpg"
    make(path)
    for read in (read_image, check_image, read_header):
        with pytest.raises(ImageError) as error:
            read(path)
        assert str(error.value) == f"{path}: {words}"


@pytest.mark.parametrize(("background", "word"), [("whte", "not a colour"), ("#01020304", "must be opaque")])
def test_a_background_must_be_an_opaque_colour_even_if_it_is_not_used(background, word, tmp_path):
    plain(RED).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"background='{background}': {word}"):
        Decoding(background=background)


MEASURE = """
import resource, sys
from vpt.data.images import ImageError, read_image
baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_image(sys.argv[1])
    print("read")
except ImageError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline) / 1024)
"""


@pytest.mark.parametrize(("side", "form"), [(10_000, "PNG"), (14_143, "PNG"), (10_000, "WEBP"), (10_000, "TIFF")])
def test_a_bomb_is_refused_by_its_header_with_little_memory(side, form, tmp_path):
    path = tmp_path / "bomb"
    match form:
        case "PNG":  # all of it is there: 100 and 200 million pixels, in 100 and 200 kB
            row = b"\0" * (side + 1)
            path.write_bytes(png(side, side, row * side))
            assert path.stat().st_size < 1_000_000
        case "WEBP":
            content = encode(Image.new("RGB", (16, 16)), "WEBP", lossless=True)
            sides = struct.pack("<I", (side - 1) | (side - 1) << 14)
            path.write_bytes(content[:21] + sides + content[25:])
        case _:
            Image.new("1", (side, side)).save(path, form, compression="group4")
    output = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    words, peak = output.stdout.splitlines()
    assert "pixels are more than the 50,000,000 allowed" in words or "too many pixels" in words
    assert float(peak) < 200  # MB; decoded they would take 400 and 800
