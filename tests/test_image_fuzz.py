"""Damaged files of every format: each gives an image or an `ImageError`, and never anything else."""

import contextlib
import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.helpers import HAS_AVIF, encode, noise
from vpt.data.images import FORMATS, Decoding, ImageError, check_image, read_header, read_image

SEEDS = {
    "BMP": lambda: encode(noise(), "BMP"),
    "GIF": lambda: encode(noise().convert("P"), "GIF", save_all=True, append_images=[noise(32, 24).convert("P")]),
    "JPEG": lambda: encode(noise(), "JPEG", exif=exif(), icc_profile=b"profile"),
    "JPEG, progressive CMYK": lambda: encode(noise().convert("CMYK"), "JPEG", progressive=True),
    "PNG": lambda: encode(noise(channels=4), "PNG", exif=exif()),
    "PNG, palette": lambda: encode(noise().quantize(16), "PNG", transparency=3),
    "PNG, 16 bit": lambda: encode(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100), "PNG"),
    "PNG, 16 bit colour": lambda: cv2.imencode(".png", np.uint16(noise()) * 9)[1].tobytes(),
    "PPM": lambda: encode(noise(), "PPM"),
    "TIFF": lambda: encode(noise(), "TIFF", exif=exif()),
    "TIFF, LZW": lambda: encode(noise(channels=4), "TIFF", compression="tiff_lzw"),
    "TIFF, JPEG": lambda: encode(noise(), "TIFF", compression="jpeg"),
    "TIFF, fax": lambda: encode(noise().convert("1"), "TIFF", compression="group4"),
    "WEBP": lambda: encode(noise(channels=4), "WEBP", exif=exif()),
    "WEBP, lossless": lambda: encode(noise(), "WEBP", lossless=True),
}
if HAS_AVIF:
    SEEDS["AVIF"] = lambda: encode(noise(channels=4), "AVIF", exif=exif())
if "JPEG2000" in FORMATS:
    SEEDS["JPEG2000"] = lambda: encode(noise(channels=4), "JPEG2000")
DECODING = Decoding(1_000_000)  # a damaged header may say anything; what is refused by its size is tested elsewhere


def exif() -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = 6
    found[0x010F] = "a maker of cameras"
    return found


def damaged(content: bytes, number: int) -> bytes:
    """The file with some bits flipped, bytes changed, a part missing or doubled; all of it decided by the number."""
    generator = np.random.default_rng([number, zlib.crc32(content)])
    data = bytearray(content)
    # Most of a header lies in the first bytes, and is where a decoder may be led astray.
    reach = min(len(data), 64) if generator.integers(3) == 0 else len(data)
    places = generator.integers(0, reach, generator.integers(1, 5))
    match number % 5:
        case 0:
            for place in places:
                data[place] ^= 1 << int(generator.integers(8))
        case 1:
            for place in places:
                data[place] = int(generator.choice([0, 1, 127, 128, 255]))
        case 2:
            del data[int(generator.integers(len(data))) :]
        case 3:
            del data[places[0] : places[0] + int(generator.integers(1, 40))]
        case _:
            data[places[0] : places[0]] = generator.bytes(int(generator.integers(1, 40)))
    return bytes(data)


def fuzz(form: str, num: int, path: str) -> dict[str, int]:
    """Read damaged files of a form; how many gave an image, and how many were refused."""
    content, counts = SEEDS[form](), {"pictures": 0, "refused": 0}
    for number in range(num):
        Path(path).write_bytes(damaged(content, number))
        sys.stderr.write(f"{form} {number}\n")
        sys.stderr.flush()
        for read in (check_image, read_header):
            with contextlib.suppress(ImageError):
                read(path, DECODING)
        try:
            image = read_image(path, DECODING if number % 2 else replace(DECODING, range=(0, 4095)))
        except ImageError as error:
            assert str(error).startswith(path) and "\n" not in str(error)  # noqa: PT017, PT018
            counts["refused"] += 1
        else:
            assert image.mode == "RGB"
            assert 0 < image.width * image.height <= DECODING.max_pixels
            image.tobytes()
            counts["pictures"] += 1
    return counts


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_damaged_file_of_any_format_is_an_image_or_an_error(num, tmp_path):
    # In a process of its own, which a decoder may crash; its last line tells which file did.
    process = subprocess.run(
        [sys.executable, "-W", "always", __file__, str(num), str(tmp_path / "a")],
        capture_output=True,
        text=True,
        timeout=580,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    lines = process.stderr.splitlines()
    assert process.returncode == 0, (process.returncode, lines[-20:])
    warned = [line for line in lines if "Warning" in line and "data.range" not in line]
    assert warned == []  # libtiff alone writes lines, and no file stops it
    counts = json.loads(process.stdout)
    assert {form.split(",")[0] for form in counts} == set(FORMATS)
    assert all(values["pictures"] + values["refused"] == num for values in counts.values())
    assert all(values["refused"] for values in counts.values())
    # The damage is not so great that nothing is ever decoded.
    assert sum(values["pictures"] for values in counts.values()) > num


if __name__ == "__main__":
    sys.stdout.write(json.dumps({form: fuzz(form, int(sys.argv[1]), sys.argv[2]) for form in SEEDS}))
