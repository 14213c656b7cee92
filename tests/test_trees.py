"""The trees that ship in the package, and the script that cuts them."""

import importlib.util
import io
import json
import re
import tomllib
import zipfile
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

from vpt.data.readers.box_checks import DataReport, Finding
from vpt.data.readers.boxes import read_detection, trees_root

ROOT = Path(__file__).parents[1]
SPLITS = ("train", "val", "test")
SIZE = 200


def load_script():
    spec = importlib.util.spec_from_file_location("make_trees", ROOT / "scripts" / "make_trees.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def coco(split):
    return json.loads((trees_root() / split / "_annotations.coco.json").read_text(encoding="utf-8"))


def place(file_name):
    """The image that a tile is from, and its first row and column there."""
    name, top, left = re.fullmatch(r"(\w+)_y(\d{4})_x(\d{4})\.jpg", file_name).groups()
    return name, int(top), int(left)


def test_the_trees_read_without_any_finding_but_images_without_boxes():
    report = DataReport()
    splits = read_detection(trees_root(), strict=True, report=report)
    assert {split: (len(s), sum(map(len, s.boxes))) for split, s in splits.items()} == {
        "train": (118, 554),
        "val": (22, 103),
        "test": (30, 265),
    }
    assert set(report.counts) == {Finding.BACKGROUND}
    assert {(s.classes, s.category_ids) for s in splits.values()} == {(("tree",), (1,))}
    assert all(size == (SIZE, SIZE) for s in splits.values() for size in s.sizes)
    assert splits["train"].read(0).size == (SIZE, SIZE)


def test_the_folder_is_small_and_has_no_image_that_is_not_listed():
    files = [path for path in trees_root().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    listed = {f"{split}/{image['file_name']}" for split in SPLITS for image in coco(split)["images"]}
    assert listed == {path.relative_to(trees_root()).as_posix() for path in files if path.suffix == ".jpg"}
    assert len({path.read_bytes() for path in files}) == len(files)


@pytest.mark.parametrize("split", SPLITS)
def test_ids_count_up_and_each_box_is_inside_its_image(split):
    content = coco(split)
    for key in ("images", "annotations"):
        assert [row["id"] for row in content[key]] == list(range(1, len(content[key]) + 1))
    for box in content["annotations"]:
        x, y, width, height = box["bbox"]
        assert 1 <= box["image_id"] <= len(content["images"])
        assert 0 <= min(x, y) < max(x + width, y + height) <= SIZE
        assert min(width, height) >= 4
        assert (box["area"], box["iscrowd"], box["category_id"]) == (width * height, 0, 1)


def test_no_tiles_overlap_val_keeps_its_distance_from_train_and_the_image_of_test_is_its_own():
    tiles = [(split, *place(image["file_name"])) for split in SPLITS for image in coco(split)["images"]]
    assert {(split == "test", name == "yell_541000") for split, name, _, _ in tiles} == {(True, True), (False, False)}
    for (split, name, top, left), (other_split, other_name, other_top, other_left) in combinations(tiles, 2):
        if name == other_name:
            rows, columns = abs(top - other_top) - SIZE, abs(left - other_left) - SIZE
            assert max(rows, columns) >= (0 if split == other_split else 72)


def test_the_notice_of_the_licence_is_there_and_everything_is_packed():
    notice = (trees_root() / "LICENSE").read_text(encoding="utf-8")
    for part in ("Copyright (c) 2019, Ben Weinstein", "Permission is hereby granted", "deepforest 2.1.0", "NEON"):
        assert part in notice
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["vpt.data"]
    packed = {path for pattern in patterns for path in trees_root().parent.glob(pattern)}
    assert {path for path in trees_root().rglob("*") if path.is_file()} <= packed


def test_a_box_that_a_tile_cuts_is_clipped_and_stays_with_40_percent_of_its_area_and_4_pixels():
    clip = load_script().clip
    assert clip((210, 430, 240, 450), left=200, top=400) == (10, 30, 40, 50)
    assert clip((194, 400, 204, 410), left=200, top=400) == (0, 0, 4, 10)  # 40 of 100 square pixels
    assert clip((193, 400, 203, 410), left=200, top=400) is None  # 30 of them
    assert clip((390, 590, 410, 600), left=200, top=400) == (190, 190, 200, 200)
    assert clip((397, 450, 400, 490), left=200, top=400) is None  # 3 pixels wide
    assert clip((50, 50, 90, 90), left=200, top=400) is None


def test_the_script_cuts_what_voc_files_declare_and_writes_the_same_bytes_again(tmp_path, monkeypatch):
    script = load_script()
    monkeypatch.setattr(script, "PARTS", (("train", "a", "one", 0, 410), ("val", "b", "one", 410, 610)))
    picture = io.BytesIO()
    Image.effect_noise((430, 620), 60).convert("RGB").save(picture, "PNG")
    boxes = ((1, 1, 10, 20), (191, 201, 210, 230), (30, 501, 60, 520))
    keys = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        f"<object><bndbox>{''.join(f'<{k}>{v}</{k}>' for k, v in zip(keys, box, strict=True))}</bndbox></object>"
        for box in boxes
    )
    with zipfile.ZipFile(tmp_path / "wheel.whl", "w") as archive:
        archive.writestr("deepforest/data/one.png", picture.getvalue())
        archive.writestr("deepforest/data/one.xml", f"<annotation>{objects}</annotation>")
    for folder in ("first", "second"):
        script.write_trees(tmp_path / "wheel.whl", tmp_path / folder)
    first, second = (
        {path.relative_to(tmp_path / folder): path.read_bytes() for path in (tmp_path / folder).rglob("*.*")}
        for folder in ("first", "second")
    )
    assert first == second
    content = json.loads((tmp_path / "first/train/_annotations.coco.json").read_text())
    names = ["a_y0000_x0000.jpg", "a_y0000_x0200.jpg", "a_y0200_x0000.jpg", "a_y0200_x0200.jpg"]
    assert [image["file_name"] for image in content["images"]] == names
    assert [(box["image_id"], box["bbox"]) for box in content["annotations"]] == [
        (1, [0, 0, 10, 20]),
        (3, [190, 0, 10, 30]),
        (4, [0, 0, 10, 30]),
    ]
    val = json.loads((tmp_path / "first/val/_annotations.coco.json").read_text())
    assert [(box["image_id"], box["bbox"]) for box in val["annotations"]] == [(1, [29, 90, 31, 20])]
