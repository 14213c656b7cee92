"""Create the bundled pebbles data set: photos of gravel with masks of stones, from the archive imagegrains 0.8.0.

The archive contains seven photos of 512 x 512 pixels, with masks drawn by hand in which each stone has a number. They
are cut into tiles of `SIZE` pixels without overlap. `PARTS` defines the splits, by photo. A mask becomes an index PNG:
0 is ground, 1 is stone, and 255, which is ignored, are pixels of a stone that touch another stone.

Example:
    python scripts/make_pebbles.py imagegrains-0.8.0.tar.gz
"""

import argparse
import io
import shutil
import tarfile
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = 128  # pixels, both sides
JPEG_QUALITY = 80
CLASSES = ("ground", "stone")
IGNORED = 255
PALETTE = [70, 60, 50, 240, 200, 80, *(255, 255, 255) * 254]  # for viewers; complete, or Pillow saves fewer bits
FOLDER = "imagegrains-0.8.0/demo_data/FH"
PARTS = {  # name in the archive -> split
    "train/1_P1060330_1": "train",
    "train/2_P1060338_0": "train",
    "train/3_P1060343_3": "train",
    "train/7_P1060359_3": "train",
    "train/5_P1060351_2": "val",
    "test/4_P1060348_3": "test",
    "train/6_P1060355_0": "test",
}
PEBBLES = Path(__file__).parents[1] / "vpt" / "data" / "pebbles"


def to_classes(stones: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Numbers of stones (H, W), 0 between them -> 0 for ground, 1 for stone, 255 where two stones touch."""
    classes = (stones > 0).astype(np.uint8)
    for axis in (0, 1):
        first, second = np.moveaxis(stones, axis, 0)[:-1], np.moveaxis(stones, axis, 0)[1:]
        touch = (first != second) & (first > 0) & (second > 0)
        of_axis = np.moveaxis(classes, axis, 0)  # a view
        of_axis[:-1][touch] = of_axis[1:][touch] = IGNORED
    return classes


def write_pebbles(archive: Path, output: Path) -> None:
    """Write `output/<split>/images/<photo>_y<top>_x<left>.jpg`, `.../masks/*.png` and `classes.txt`."""
    for split in set(PARTS.values()):
        shutil.rmtree(output / split, ignore_errors=True)
        for folder in ("images", "masks"):
            (output / split / folder).mkdir(parents=True)
    with tarfile.open(archive) as files:

        def read(name: str) -> Image.Image:
            return Image.open(io.BytesIO(files.extractfile(f"{FOLDER}/{name}").read()))

        for name, split in PARTS.items():
            photo, classes = read(f"{name}.jpg").convert("RGB"), to_classes(np.asarray(read(f"{name}_mask.tif")))
            mask = Image.fromarray(classes)
            mask.putpalette(PALETTE)
            for top, left in product(range(0, photo.height, SIZE), range(0, photo.width, SIZE)):
                box = (left, top, left + SIZE, top + SIZE)
                stem = f"{Path(name).name}_y{top:03d}_x{left:03d}"
                photo.crop(box).save(output / split / "images" / f"{stem}.jpg", quality=JPEG_QUALITY, optimize=True)
                mask.crop(box).save(output / split / "masks" / f"{stem}.png", optimize=True)
    (output / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")


def main() -> None:
    """Read the archive, write the tiles and their masks, print the sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="imagegrains-0.8.0.tar.gz")
    parser.add_argument("--output", type=Path, default=PEBBLES)
    arguments = parser.parse_args()
    write_pebbles(arguments.archive, arguments.output)
    for split in ("train", "val", "test"):
        files = [file for file in (arguments.output / split).rglob("*") if file.is_file()]
        print(f"{split}: {len(files) // 2} tiles, {sum(file.stat().st_size for file in files):,} bytes")


if __name__ == "__main__":
    main()
