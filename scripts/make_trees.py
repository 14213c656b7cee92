"""Create the bundled trees data set: aerial images of trees with boxes, from the wheel deepforest 2.1.0.

The wheel contains four images with boxes, of the National Ecological Observatory Network (NEON), at 10 cm per pixel and
annotated to their edges. They are cut into tiles of `SIZE` pixels from the upper left corner, without overlap; the
remainder at the right and bottom is not used. `PARTS` defines the splits:

- test is the whole second largest image, of denser forest and a road, about 13 km from the image of train and val.
- val is the two lowest rows of the largest image, an open conifer forest, and train the rest without 72 pixels between.
  A tree across this gap is in at most one of the two: it would have to be 360 pixels high for `MIN_PART` of it to be on
  both sides, and the highest is 109.
- train also has the two small images, a pine savanna and one of mostly dead trees. The savanna is too small and too
  different for val: with the pretrained vit_nano (deep prompt, 128 px, one seed) its mAP was 0.01 throughout 25 epochs,
  while that of train rose to 0.31.

All classes of the wheel (Tree, Alive, Dead) become one, tree. A box that a tile cuts is clipped. It is kept if at least
`MIN_PART` of its area and `MIN_SIDE` pixels of each side are left, since less of a tree is hard to tell from a bush.

Example:
    python scripts/make_trees.py deepforest-2.1.0-py3-none-any.whl
"""

import argparse
import io
import json
import shutil
import zipfile
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

SIZE = 200  # pixels, both sides; 20 m
MIN_PART = 0.4  # of the area
MIN_SIDE = 4  # pixels
JPEG_QUALITY = 75
FOLDER = "deepforest/data"
PARTS = (  # split, name in our files, name in the wheel, first and last row of pixels
    ("train", "yell_528000", "2019_YELL_2_528000_4978000_image_crop2", 0, 2000),
    ("train", "osbs_029", "OSBS_029", 0, 400),
    ("train", "soap_061", "SOAP_061", 0, 400),
    ("val", "yell_528000", "2019_YELL_2_528000_4978000_image_crop2", 2072, 2472),
    ("test", "yell_541000", "2019_YELL_2_541000_4977000_image_crop", 0, 1035),
)
TREES = Path(__file__).parents[1] / "vpt" / "data" / "trees"

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels from the upper left corner


def read_boxes(xml: bytes) -> list[Box]:
    """Boxes of a Pascal VOC file, whose pixels are counted from 1, with inclusive corners."""
    keys = ("xmin", "ymin", "xmax", "ymax")
    corners = ([int(box.findtext(key, "")) for key in keys] for box in ElementTree.fromstring(xml).iter("bndbox"))
    return [(x1 - 1, y1 - 1, x2, y2) for x1, y1, x2, y2 in corners]


def clip(box: Box, left: int, top: int) -> Box | None:
    """Clip a box to a tile, in pixels of the tile; None if too little is left."""
    x1, y1, x2, y2 = box
    inside = max(x1 - left, 0), max(y1 - top, 0), min(x2 - left, SIZE), min(y2 - top, SIZE)
    width, height = inside[2] - inside[0], inside[3] - inside[1]
    if min(width, height) < MIN_SIDE or width * height < MIN_PART * (x2 - x1) * (y2 - y1):
        return None
    return inside


def write_trees(wheel: Path, output: Path) -> None:
    """Write `output/<split>/<image>_y<top>_x<left>.jpg` and `_annotations.coco.json`, replacing existing files."""
    contents = {split: {"images": [], "annotations": []} for split in ("train", "val", "test")}
    for split in contents:
        shutil.rmtree(output / split, ignore_errors=True)
        (output / split).mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for split, name, source, start, end in PARTS:
            image = Image.open(io.BytesIO(archive.read(f"{FOLDER}/{source}.png"))).convert("RGB")
            boxes = read_boxes(archive.read(f"{FOLDER}/{source}.xml"))
            for top, left in product(range(start, end - SIZE + 1, SIZE), range(0, image.width - SIZE + 1, SIZE)):
                file = f"{name}_y{top:04d}_x{left:04d}.jpg"
                tile = image.crop((left, top, left + SIZE, top + SIZE))
                tile.save(output / split / file, quality=JPEG_QUALITY, optimize=True)
                parts = [clip(box, left, top) for box in boxes]
                add(contents[split], file, [part for part in parts if part])
    for split, content in contents.items():
        content["categories"] = [{"id": 1, "name": "tree"}]
        text = json.dumps(content, separators=(",", ":")).replace("},{", "},\n{")
        (output / split / "_annotations.coco.json").write_text(text + "\n", encoding="utf-8", newline="\n")


def add(content: dict[str, list[dict[str, object]]], file: str, boxes: list[Box]) -> None:
    """Add a tile and its boxes to the content of a COCO file; ids count from 1."""
    image_id = len(content["images"]) + 1
    content["images"].append({"id": image_id, "file_name": file, "width": SIZE, "height": SIZE})
    for x1, y1, x2, y2 in boxes:
        width, height, box_id = x2 - x1, y2 - y1, len(content["annotations"]) + 1
        box = {"id": box_id, "image_id": image_id, "category_id": 1, "bbox": [x1, y1, width, height]}
        content["annotations"].append({**box, "area": width * height, "iscrowd": 0})


def main() -> None:
    """Read the wheel, write the tiles and their boxes, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="deepforest-2.1.0-py3-none-any.whl")
    parser.add_argument("--output", type=Path, default=TREES)
    arguments = parser.parse_args()
    write_trees(arguments.wheel, arguments.output)
    for split in ("train", "val", "test"):
        folder = arguments.output / split
        content = json.loads((folder / "_annotations.coco.json").read_text(encoding="utf-8"))
        num_bytes = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{split}: {len(content['images'])} tiles, {len(content['annotations'])} boxes, {num_bytes:,} bytes")


if __name__ == "__main__":
    main()
