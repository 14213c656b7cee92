import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.Image import Transpose

from tests.helpers import coco_content, draw_image, edit_json, read_one, write_coco, write_text
from vpt.data.images import ImageError
from vpt.data.readers.box_checks import DataReport, Finding
from vpt.data.readers.coco import read_coco
from vpt.data.readers.yolo import read_yolo

EXIF_ORIENTATION = 0x0112


NAN, INF = float("nan"), float("inf")
DIRT = [
    ([-4, 10, 20, 10], Finding.CLIPPED, [0, 10, 16, 20]),
    ([50, 20, 20, 20], Finding.CLIPPED, [50, 20, 64, 32]),
    ([5, 5, 0.5, 10], Finding.SMALL, None),
    ([5, 5, 10, 0], Finding.SMALL, None),
    ([63.5, 5, 10, 10], Finding.SMALL, None),
    ([70, 5, 10, 10], Finding.OUTSIDE, None),
    ([5, -20, 10, 10], Finding.OUTSIDE, None),
    ([NAN, 5, 10, 10], Finding.NOT_FINITE, None),
    ([5, 5, INF, 10], Finding.NOT_FINITE, None),
    ([5, 5, 10, 10**400], Finding.NOT_FINITE, None),
    ([20, 20, -10, 5], Finding.SWAPPED, [10, 20, 20, 25]),
    ([20, 20, 10, -5], Finding.SWAPPED, [20, 15, 30, 20]),
    ([2, 2, 10, 10], Finding.DUPLICATE, None),
]


@pytest.mark.parametrize(("bbox", "finding", "expected"), DIRT)
def test_a_wrong_box_is_repaired_or_dropped_and_counted_or_refused(bbox, finding, expected, tmp_path):
    train, report = read_one(tmp_path, [{"bbox": bbox}])
    assert train.boxes[0].tolist() == [[2, 2, 12, 12]] + ([expected] if expected else [])
    assert len(train.labels[0]) == len(train.crowd[0]) == len(train.boxes[0])
    assert report.counts == {finding: 1}
    assert f"{finding.value[0]}: 1, {finding.value[1]}; first {tmp_path}" in report.lines()[-1]
    with pytest.raises(ValueError, match=r"json, annotations\[1\]: box \(.*\) of train2017/a\.png .* \(2\)"):
        read_one(tmp_path, [{"bbox": bbox}, {"bbox": bbox}], strict=True)


@pytest.mark.parametrize("bbox", [[5, 5, 1, 1], [54, 22, 10.4, 10.4], [-0.4, -0.4, 10, 10], [2, 2, 10, 11]])
def test_a_box_of_a_pixel_or_half_a_pixel_outside_or_like_another_is_none_of_these(bbox, tmp_path):
    train, _ = read_one(tmp_path, [{"bbox": bbox}], strict=True)
    x1, y1, x2, y2 = train.boxes[0][1]
    assert min(x1, y1) >= 0
    assert (x2, y2) <= (64, 32)
    assert np.abs(train.boxes[0][1] - [bbox[0], bbox[1], bbox[0] + bbox[2], bbox[1] + bbox[3]]).max() < 0.5


def test_boxes_of_other_classes_and_crowds_are_kept_and_unknown_classes_dropped(tmp_path):
    rows = [{"bbox": [2, 2, 10, 10], "category_id": 17}, {"bbox": [2, 2, 10, 10], "iscrowd": 1}]
    train, report = read_one(tmp_path, rows, strict=True)
    assert train.labels[0].tolist() == [0, 1, 0]
    assert train.crowd[0].tolist() == [False, False, True]
    assert report.counts == {Finding.CROWD: 1}
    train, report = read_one(tmp_path, [{"bbox": [3, 2, 10, 10], "category_id": 4}])
    assert train.labels[0].tolist() == [0]
    assert report.counts == {Finding.UNKNOWN: 1}
    assert report.lines()[-1].endswith("box (3, 2, 13, 12) of train2017/a.png, class 4")


def test_missing_broken_and_unlisted_images_are_left_out_with_their_labels(tmp_path):
    write_coco(tmp_path)
    edit_json(
        tmp_path / "annotations" / "instances_train2017.json",
        lambda content: content["annotations"].append({"image_id": 999, "category_id": 3, "bbox": [1, 1, 5, 5]}),
    )
    (tmp_path / "train2017" / "b.png").unlink()
    (tmp_path / "train2017" / "c.png").write_bytes(b"no picture")
    report = DataReport()
    train = read_coco(tmp_path, report=report)["train"]
    assert train.names == ("train2017/a.png",)
    assert report.counts == {Finding.MISSING: 1, Finding.UNREADABLE: 1, Finding.STRAY: 1}
    assert "images[1]: " in report.first[Finding.MISSING]
    assert "b.png: no such file" in report.first[Finding.MISSING]
    assert "c.png: not an image" in report.first[Finding.UNREADABLE]
    assert report.first[Finding.STRAY].endswith("annotations[3]: image_id 999")
    with pytest.raises(ValueError, match=r"b\.png: no such file is the first of: images that do not exist \(1\)"):
        read_coco(tmp_path, strict=True)


def test_a_declared_size_that_the_image_never_had_is_reported(tmp_path):
    write_coco(tmp_path)
    path = tmp_path / "annotations" / "instances_val2017.json"
    edit_json(path, lambda content: content["images"][0].update(width=640))
    report = DataReport()
    val = read_coco(tmp_path, report=report)["val"]
    assert val.boxes[0].tolist() == [[30, 10, 50, 20]]
    assert val.sizes == ((32, 64),)
    assert report.counts[Finding.SIZE] == 1
    assert "640 x 32 declared" in report.first[Finding.SIZE]
    edit_json(path, lambda content: content["images"][0].update(width=0, height=None))
    assert len(read_coco(tmp_path, strict=True)) == 3


def store(path: Path, upright: Image.Image, orientation: int) -> Image.Image:
    """Save an image so that EXIF turns it upright; the stored image."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    stored = upright.transpose(UNDO[orientation])
    stored.save(path, exif=exif)
    return stored


UNDO = {3: Transpose.ROTATE_180, 5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_90, 7: Transpose.TRANSVERSE}
UNDO |= {8: Transpose.ROTATE_270, 2: Transpose.FLIP_LEFT_RIGHT, 4: Transpose.FLIP_TOP_BOTTOM}


def white_part(image: Image.Image) -> list[int]:
    rows, columns = np.nonzero(np.asarray(image)[..., 0] > 127)
    return [int(value) for value in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_turn_with_an_image_if_the_declared_size_is_that_of_the_stored_one(orientation, suffix, tmp_path):
    upright = Image.new("RGB", (24, 40))
    upright.paste("white", (3, 8, 10, 31))
    lying, standing = white_part(store(tmp_path / f"a.{suffix}", upright, orientation)), [3, 8, 10, 31]
    for size, box, num_turned in [((40, 24), lying, 1), ((24, 40), standing, 0)]:
        content = coco_content({f"a.{suffix}": (size, [("dog", box)])})
        write_text(tmp_path / "train.json", json.dumps(content))
        report = DataReport()
        train = read_coco(tmp_path, {"train": "train.json"}, val_fraction=0, report=report, strict=True)["train"]
        assert train.sizes == ((40, 24),)
        assert train.boxes[0].tolist() == [standing]
        assert train.labels[0].tolist() == [1]
        assert white_part(train.read(0)) == standing
        assert report.counts[Finding.TURNED] == num_turned


@pytest.mark.parametrize("exif_boxes", ["auto", "upright", "stored"])
@pytest.mark.parametrize(("size", "declared"), [((24, 40), (0, 0)), ((24, 24), (24, 24)), ((24, 40), (9, 9))])
@pytest.mark.parametrize("orientation", UNDO)
def test_where_the_declared_size_does_not_show_how_boxes_were_drawn_exif_boxes_decides(
    orientation, size, declared, exif_boxes, tmp_path
):
    upright = Image.new("RGB", size)
    upright.paste("white", (3, 8, 10, 20))
    stored = white_part(store(tmp_path / "a.png", upright, orientation))
    write_text(tmp_path / "train.json", json.dumps(coco_content({"a.png": (declared, [("cat", stored)])})))
    report = DataReport()
    options = {"val_fraction": 0, "exif_boxes": exif_boxes, "report": report}
    train = read_coco(tmp_path, {"train": "train.json"}, **options)["train"]
    assert train.sizes == (size[::-1],)
    is_turned = exif_boxes == "stored"
    if is_turned or max(stored) <= 24:
        assert train.boxes[0].tolist() == [[3, 8, 10, 20] if is_turned else stored]
    assert (report.counts[Finding.UNSURE], report.counts[Finding.TURNED]) == (exif_boxes == "auto", is_turned)


def test_boxes_in_fractions_of_the_stored_image_are_turned(tmp_path):
    upright = Image.new("RGB", (20, 40))
    upright.paste("white", (2, 8, 10, 20))
    (tmp_path / "images").mkdir()
    x1, y1, x2, y2 = white_part(store(tmp_path / "images" / "a.png", upright, 6))
    line = f"0 {(x1 + x2) / 80} {(y1 + y2) / 40} {(x2 - x1) / 40} {(y2 - y1) / 20}"
    write_text(tmp_path / "labels" / "a.txt", line)
    write_text(tmp_path / "data.yaml", "train: images\nnames: [cat]\n")
    train = read_yolo(tmp_path, val_fraction=0, exif_boxes="stored", strict=True)["train"]
    assert train.boxes[0].tolist() == pytest.approx(np.array([[2, 8, 10, 20]]))
    with pytest.raises(ValueError, match="exif_boxes"):
        read_yolo(tmp_path, val_fraction=0, strict=True)
    with pytest.raises(ValueError, match="exif_boxes='turned'"):
        read_yolo(tmp_path, exif_boxes="turned")


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_an_image_that_is_not_of_the_size_its_boxes_are_for_is_refused(tmp_path):
    train = read_coco(write_coco(tmp_path))["train"]
    draw_image(train.paths[0], (65, 32))
    with pytest.raises(ImageError, match=r"a\.png: 65 x 32 pixels, but its boxes are for 64 x 32; it was changed"):
        train.read(0)
    draw_image(train.paths[1], (32, 64))
    content = train.paths[1].read_bytes()
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    late = content[:-12] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\x00\x00")) + content[-12:]
    train.paths[1].write_bytes(late)
    with pytest.raises(ImageError, match=r"b\.png: 64 x 32 pixels, but its boxes are for 32 x 64"):
        read_coco(tmp_path)["train"].read(1)
