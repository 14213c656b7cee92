import json
import pickle
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vpt.data.boxes import DataReport, DetectionDataset, DetectionSamples, Finding, collate_detection
from vpt.data.detection import find_forms, read_coco, read_detection, read_voc, read_yolo
from vpt.data.images import ImageError
from vpt.data.loaders import EpochSampler
from vpt.data.transforms import DetectionEvalTransform, DetectionTrainTransform, Preprocessing

SMALL = Preprocessing(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
EXIF_ORIENTATION = 0x0112

# Width and height of each picture, and its boxes: a class, and whole numbers, since VOC files have no others.
TRUTH = {
    "train": {
        "a.png": ((64, 32), [("cat", (0, 0, 64, 32)), ("dog", (8, 4, 24, 28))]),
        "b.png": ((32, 64), [("dog", (1, 2, 3, 4))]),
        "c.png": ((64, 64), []),
    },
    "val": {"d.png": ((64, 32), [("cat", (30, 10, 50, 20))])},
    "test": {"e.png": ((128, 64), [("dog", (64, 0, 128, 64)), ("dog", (5, 6, 70, 8))])},
}
CLASSES = ("cat", "dog")
CATEGORY_IDS = {"cat": 3, "dog": 17}


def draw(path: Path, size: tuple[int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def coco_content(pictures: dict, categories: dict[str, int] = CATEGORY_IDS) -> dict:
    images, annotations = [], []
    for image_id, (name, ((width, height), boxes)) in enumerate(pictures.items(), start=100):
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for label, (x1, y1, x2, y2) in boxes:
            row = {"image_id": image_id, "category_id": categories[label], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            annotations.append({"id": len(annotations) + 1, "iscrowd": 0, **row})
    names = [{"id": category_id, "name": name} for name, category_id in reversed(categories.items())]
    return {"images": images, "annotations": annotations, "categories": names}


def write_coco(root: Path, truth: dict = TRUTH) -> Path:
    for split, pictures in truth.items():
        write(root / "annotations" / f"instances_{split}2017.json", json.dumps(coco_content(pictures)))
        for name, (size, _) in pictures.items():
            draw(root / f"{split}2017" / name, size)
    return root


def write_roboflow(root: Path, truth: dict = TRUTH) -> Path:
    for split, pictures in truth.items():
        folder = root / {"val": "valid"}.get(split, split)
        write(folder / "_annotations.coco.json", json.dumps(coco_content(pictures)))
        for name, (size, _) in pictures.items():
            draw(folder / name, size)
    return root


def write_yolo(root: Path, truth: dict = TRUTH) -> Path:
    for split, pictures in truth.items():
        for name, ((width, height), boxes) in pictures.items():
            draw(root / "images" / split / name, (width, height))
            rows = [
                f"{CLASSES.index(label)} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} "
                f"{(x2 - x1) / width} {(y2 - y1) / height}\n"
                for label, (x1, y1, x2, y2) in boxes
            ]
            if rows:
                write(root / "labels" / split / name.replace(".png", ".txt"), "".join(rows))
    entries = "".join(f"{split}: images/{split}\n" for split in truth)
    write(root / "data.yaml", f"{entries}nc: 2\nnames: [cat, dog]\n")
    return root


def voc_xml(size: tuple[int, int], boxes: list, difficult: int = 0) -> str:
    objects = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1 + 1}</xmin>"
        f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for label, (x1, y1, x2, y2) in boxes
    )
    width, height = size
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{objects}</annotation>"


def write_voc(root: Path, truth: dict = TRUTH) -> Path:
    for split, pictures in truth.items():
        stems = "".join(f"{Path(name).stem}\n" for name in pictures)
        write(root / "ImageSets" / "Main" / f"{split}.txt", stems)
        for name, (size, boxes) in pictures.items():
            draw(root / "JPEGImages" / name, size)
            write(root / "Annotations" / f"{Path(name).stem}.xml", voc_xml(size, boxes))
    return root


WRITERS = {"coco": write_coco, "roboflow": write_roboflow, "yolo": write_yolo, "voc": write_voc}


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_same(ours: np.ndarray, theirs: list, dtype: type) -> None:
    assert ours.dtype == dtype
    assert ours.tolist() == theirs


# All forms


@pytest.mark.parametrize("layout", WRITERS)
def test_every_form_reads_to_the_same_records(layout, tmp_path):
    report = DataReport()
    splits = read_detection(WRITERS[layout](tmp_path), report=report, strict=True)
    assert list(splits) == ["train", "val", "test"]
    for split, samples in splits.items():
        assert samples.classes == CLASSES
        assert [Path(name).name for name in samples.names] == list(TRUTH[split])
        assert all(tmp_path / name == path for name, path in zip(samples.names, samples.paths, strict=True))
        for i, ((width, height), boxes) in enumerate(TRUTH[split].values()):
            assert samples.sizes[i] == (height, width)
            assert samples.read(i).size == (width, height)
            assert_same(samples.boxes[i], [list(box) for _, box in boxes], np.float32)
            assert samples.boxes[i].shape == (len(boxes), 4)
            assert_same(samples.labels[i], [CLASSES.index(label) for label, _ in boxes], np.int64)
            assert_same(samples.crowd[i], [False] * len(boxes), np.bool_)
    assert report.counts == {Finding.BACKGROUND: 1}
    assert report.lines()[:3] == [
        "train: 3 pictures, 3 boxes, 2 classes",
        "val: 1 pictures, 1 boxes, 2 classes",
        "test: 1 pictures, 2 boxes, 2 classes",
    ]
    assert len(report.lines()) == 4


@pytest.mark.parametrize(
    ("layout", "category_ids", "image_ids"),
    [
        ("coco", (3, 17), (100, 101, 102)),
        ("roboflow", (3, 17), (100, 101, 102)),
        ("yolo", (0, 1), (1, 2, 3)),
        ("voc", (1, 2), (1, 2, 3)),
    ],
)
def test_records_keep_the_numbers_of_their_source(layout, category_ids, image_ids, tmp_path):
    train = read_detection(WRITERS[layout](tmp_path))["train"]
    assert train.category_ids == category_ids
    assert train.image_ids == image_ids


@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_a_form_is_found_or_named(form, tmp_path):
    WRITERS[form](tmp_path)
    assert find_forms(tmp_path) == [form]
    assert len(read_detection(tmp_path, form=form)["train"]) == 3


def test_two_forms_in_one_folder_must_be_told_apart(tmp_path):
    write_yolo(write_coco(tmp_path))
    with pytest.raises(ValueError, match=r"has data in the forms coco and yolo; choose one, as in dataset\.form=coco"):
        read_detection(tmp_path)
    assert read_detection(tmp_path, form="yolo")["train"].category_ids == (0, 1)


def test_no_form_at_all_is_refused_with_what_was_looked_for_and_where_it_is(tmp_path):
    with pytest.raises(ValueError, match=r"coco: annotations/.*yolo: data\.yaml.*voc: Annotations/"):
        read_detection(tmp_path)
    write_voc(tmp_path / "VOC2007")
    with pytest.raises(ValueError, match=r"did you mean dataset\.root=.*/VOC2007\?"):
        read_detection(tmp_path)
    with pytest.raises(ValueError, match=r"dataset\.root=.*/nothing is no folder"):
        read_detection(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"dataset\.form=pascal; allowed: auto, coco, yolo, voc"):
        read_detection(tmp_path, form="pascal")


@pytest.mark.parametrize(("form", "what"), [("coco", "annotations/"), ("yolo", "data.yaml"), ("voc", "JPEGImages/")])
def test_a_named_form_that_is_not_there_is_refused(form, what, tmp_path):
    with pytest.raises(ValueError, match=rf"nothing found; looked for .*{what}"):
        read_detection(tmp_path, form=form)


@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_a_set_without_train_is_refused(form, tmp_path):
    WRITERS[form](tmp_path, {"val": TRUTH["val"]})
    with pytest.raises(ValueError, match="val but no train found; looked for"):
        read_detection(tmp_path)


@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_a_picture_of_two_splits_is_refused(form, tmp_path):
    WRITERS[form](tmp_path)
    if form == "coco":
        copy = tmp_path / "annotations" / "instances_val2017.json"
        copy.write_text((tmp_path / "annotations" / "instances_train2017.json").read_text())
        for path in (tmp_path / "train2017").iterdir():
            path.rename(tmp_path / path.name)
    elif form == "yolo":
        write(tmp_path / "data.yaml", "train: images/train\nval: images/train\nnames: [cat, dog]\n")
    else:
        write(tmp_path / "ImageSets" / "Main" / "val.txt", "d\na\n")
    with pytest.raises(ValueError, match=r"a\.png is there twice, first at .*; keep one of them"):
        read_detection(tmp_path)


def test_train_without_pictures_or_without_boxes_is_refused_with_what_was_found(tmp_path):
    write_coco(tmp_path, {"train": {"a.png": ((8, 8), [("cat", (0, 0, 0, 0))])}})
    with pytest.raises(ValueError, match=r"train has no box that can be used; boxes with a side below 1 px: 1"):
        read_coco(tmp_path)
    (tmp_path / "train2017" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"train has no picture that can be used; pictures that are not there: 1"):
        read_coco(tmp_path)


# Splits


def many(num: int) -> dict:
    return {"train": {f"{i:02}.png": ((8, 8), [("cat", (1, 1, 5, 5))]) for i in range(num)}}


@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_missing_splits_are_split_off_train_by_name(form, tmp_path):
    WRITERS[form](tmp_path, many(20))
    splits = read_detection(tmp_path, val_fraction=0.4, test_fraction=0.4, seed=1)
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 4, "val": 8, "test": 8}
    names = {split: set(samples.names) for split, samples in splits.items()}
    assert len(set.union(*names.values())) == 20
    again = read_detection(tmp_path, val_fraction=0.4, test_fraction=0.4, seed=1)
    assert {split: set(samples.names) for split, samples in again.items()} == names
    assert set(read_detection(tmp_path, val_fraction=0.4, seed=2)["val"].names) != names["val"]


def test_one_picture_less_moves_at_most_one_other(tmp_path):
    pictures = many(20)["train"]
    before = set(read_yolo(write_yolo(tmp_path / "all", {"train": pictures}))["val"].names)
    del pictures["00.png"]
    after = set(read_yolo(write_yolo(tmp_path / "less", {"train": pictures}))["val"].names)
    assert len(before - after) <= 1


def test_given_splits_stay_and_none_is_made_without_a_fraction(tmp_path):
    write_coco(tmp_path)
    assert len(read_coco(tmp_path, val_fraction=0.5, test_fraction=0.5 - 1e-9)["train"]) == 3
    write_voc(tmp_path / "voc", many(4))
    assert list(read_voc(tmp_path / "voc", val_fraction=0)) == ["train"]


def test_fractions_out_of_range_and_a_train_too_small_are_refused(tmp_path):
    write_coco(tmp_path, many(1))
    with pytest.raises(ValueError, match=r"dataset\.val_fraction=0\.6, test_fraction=0\.4; allowed"):
        read_coco(tmp_path, val_fraction=0.6, test_fraction=0.4)
    with pytest.raises(ValueError, match="train has one picture, so no val can be split off"):
        read_coco(tmp_path)


def test_taken_samples_keep_what_belongs_together(tmp_path):
    train = read_coco(write_coco(tmp_path))["train"]
    taken = train.take([2, 0])
    assert len(taken) == 2
    assert [Path(name).name for name in taken.names] == ["c.png", "a.png"]
    assert taken.image_ids == (102, 100)
    assert taken.sizes == ((64, 64), (32, 64))
    assert taken.read(1).size == (64, 32)
    assert taken.labels[1].tolist() == [0, 1]
    assert len(taken.boxes[0]) == len(taken.crowd[0]) == 0
    assert (taken.classes, taken.category_ids) == (train.classes, train.category_ids)


def test_samples_cannot_be_changed(tmp_path):
    train = read_coco(write_coco(tmp_path))["train"]
    for arrays in (train.boxes, train.labels, train.crowd):
        with pytest.raises(ValueError, match="read-only"):
            arrays[0][:] = 0
    with pytest.raises(AttributeError):
        train.boxes = ()


# Dirt


def read_one(root: Path, rows: list[dict], **options) -> tuple[DetectionSamples, DataReport]:
    """Train of one picture, 64 x 32, with the box (2, 2, 12, 12), and then these rows."""
    write_coco(root, {"train": {"a.png": ((64, 32), [("cat", (2, 2, 12, 12))])}})
    path = root / "annotations" / "instances_train2017.json"
    edit_json(
        path, lambda content: content["annotations"].extend({"image_id": 100, "category_id": 3} | r for r in rows)
    )
    report = DataReport()
    return read_coco(root, val_fraction=0, report=report, **options)["train"], report


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
def test_a_wrong_box_is_repaired_or_dropped_and_counted(bbox, finding, expected, tmp_path):
    train, report = read_one(tmp_path, [{"bbox": bbox}])
    assert train.boxes[0].tolist() == [[2, 2, 12, 12]] + ([expected] if expected else [])
    assert len(train.labels[0]) == len(train.crowd[0]) == len(train.boxes[0])
    assert report.counts == {finding: 1}
    assert f"{finding.value[0]}: 1, {finding.value[1]}; first {tmp_path}" in report.lines()[-1]


@pytest.mark.parametrize("bbox", [bbox for bbox, _, _ in DIRT])
def test_strict_refuses_a_wrong_box_by_file_picture_and_numbers(bbox, tmp_path):
    with pytest.raises(
        ValueError, match=r"instances_train2017\.json, annotations\[1\]: box \(.*\) of train2017/a\.png"
    ):
        read_one(tmp_path, [{"bbox": bbox}], strict=True)


def test_strict_counts_all_that_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"leave their picture \(1\), boxes with a side below 1 px \(2\); correct"):
        read_one(tmp_path, [{"bbox": [-4, 10, 20, 10]}, {"bbox": [5, 5, 0, 0]}, {"bbox": [5, 6, 0, 0]}], strict=True)


@pytest.mark.parametrize("bbox", [[5, 5, 1, 1], [54, 22, 10.4, 10.4], [-0.4, -0.4, 10, 10], [2, 2, 10, 11]])
def test_a_box_of_a_pixel_or_half_a_pixel_outside_or_like_another_is_none_of_these(bbox, tmp_path):
    train, _ = read_one(tmp_path, [{"bbox": bbox}], strict=True)
    x1, y1, x2, y2 = train.boxes[0][1]
    assert min(x1, y1) >= 0
    assert (x2, y2) <= (64, 32)
    assert np.abs(train.boxes[0][1] - [bbox[0], bbox[1], bbox[0] + bbox[2], bbox[1] + bbox[3]]).max() < 0.5


def test_equal_boxes_of_two_classes_are_both_kept(tmp_path):
    train, _ = read_one(tmp_path, [{"bbox": [2, 2, 10, 10], "category_id": 17}], strict=True)
    assert train.labels[0].tolist() == [0, 1]


def test_a_crowd_is_kept_with_its_flag_and_is_no_mistake(tmp_path):
    train, report = read_one(tmp_path, [{"bbox": [2, 2, 10, 10], "iscrowd": 1}], strict=True)
    assert train.crowd[0].tolist() == [False, True]
    assert report.counts == {Finding.CROWD: 1}


def test_a_row_without_iscrowd_is_none(tmp_path):
    train, _ = read_one(tmp_path, [{"bbox": [3, 2, 10, 10]}], strict=True)
    assert train.crowd[0].tolist() == [False, False]


def test_a_category_that_is_not_declared_is_dropped_and_counted(tmp_path):
    train, report = read_one(tmp_path, [{"bbox": [3, 2, 10, 10], "category_id": 4}])
    assert train.labels[0].tolist() == [0]
    assert report.counts == {Finding.UNKNOWN: 1}
    assert report.lines()[-1].endswith("box (3, 2, 13, 12) of train2017/a.png, class 4")


def test_missing_broken_and_unlisted_pictures_are_left_out_with_their_labels(tmp_path):
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
    assert "c.png: not a picture" in report.first[Finding.UNREADABLE]
    assert report.first[Finding.STRAY].endswith("annotations[3]: image_id 999")
    with pytest.raises(ValueError, match=r"b\.png: no such file is the first of: pictures that are not there \(1\)"):
        read_coco(tmp_path, strict=True)


def test_a_declared_size_that_the_picture_never_had_is_reported(tmp_path):
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


def store(path: Path, upright: Image.Image, orientation: int) -> Path:
    """Save a picture so that EXIF turns it upright."""
    undo = {
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
        3: Image.Transpose.ROTATE_180,
    }[orientation]
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    upright.transpose(undo).save(path, exif=exif)
    return path


def white_part(image: Image.Image) -> list[int]:
    rows, columns = np.nonzero(np.asarray(image)[..., 0] > 127)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_turn_with_a_picture_if_the_declared_size_is_that_of_the_stored_one(orientation, suffix, tmp_path):
    upright = Image.new("RGB", (24, 40))
    upright.paste("white", (3, 8, 10, 31))
    path = store(tmp_path / f"a.{suffix}", upright, orientation)
    stored = np.asarray(upright.transpose({5: 5, 6: 2, 7: 6, 8: 4}[orientation]))
    lying, standing = white_part(Image.fromarray(stored)), [3, 8, 10, 31]
    for size, box, num_turned in [((40, 24), lying, 1), ((24, 40), standing, 0)]:
        content = coco_content({path.name: (size, [("cat", tuple(map(int, box)))])})
        write(tmp_path / "train.json", json.dumps(content))
        report = DataReport()
        train = read_coco(tmp_path, {"train": "train.json"}, val_fraction=0, report=report, strict=True)["train"]
        assert train.sizes == ((40, 24),)
        assert train.boxes[0].tolist() == [standing]
        assert white_part(train.read(0)) == standing
        assert report.counts[Finding.TURNED] == num_turned


def test_without_a_declared_size_or_with_equal_sides_boxes_are_upright(tmp_path):
    store(tmp_path / "a.png", Image.new("RGB", (24, 40)), 6)
    store(tmp_path / "b.png", Image.new("RGB", (24, 24)), 6)
    store(tmp_path / "c.png", Image.new("RGB", (24, 40)), 3)
    boxes = [("cat", (3, 8, 10, 20))]
    content = coco_content({"a.png": ((0, 0), boxes), "b.png": ((24, 24), boxes), "c.png": ((24, 40), boxes)})
    write(tmp_path / "train.json", json.dumps(content))
    train = read_coco(tmp_path, {"train": "train.json"}, val_fraction=0, strict=True)["train"]
    assert train.sizes == ((40, 24), (24, 24), (40, 24))
    assert all(array.tolist() == [[3, 8, 10, 20]] for array in train.boxes)


def test_yolo_fractions_are_of_the_upright_picture(tmp_path):
    write_yolo(tmp_path, {"train": {"a.png": ((24, 40), [("cat", (3, 10, 12, 20))])}})
    store(tmp_path / "images" / "train" / "a.png", Image.new("RGB", (24, 40)), 6)
    assert read_yolo(tmp_path, val_fraction=0)["train"].boxes[0].tolist() == [[3, 10, 12, 20]]


def test_a_picture_whose_exif_data_cannot_be_read_is_left_out(tmp_path):
    write_coco(tmp_path)
    Image.new("RGB", (32, 64)).save(tmp_path / "train2017" / "b.png", exif=b"Exif\x00\x00nothing")
    report = DataReport()
    assert len(read_coco(tmp_path, report=report)["train"]) == 2
    assert "b.png: broken picture" in report.first[Finding.UNREADABLE]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_picture_that_is_not_of_the_size_its_boxes_are_for_is_refused(tmp_path):
    train = read_coco(write_coco(tmp_path))["train"]
    draw(train.paths[0], (65, 32))
    with pytest.raises(ImageError, match=r"a\.png: 65 x 32 pixels, but its boxes are for 64 x 32; was it changed"):
        train.read(0)
    draw(train.paths[1], (32, 64))
    content = train.paths[1].read_bytes()
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    late = content[:-12] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\x00\x00")) + content[-12:]
    train.paths[1].write_bytes(late)
    with pytest.raises(ImageError, match=r"b\.png: 64 x 32 pixels, but its boxes are for 32 x 64"):
        read_coco(tmp_path)["train"].read(1)


# COCO


def test_files_given_by_split_are_read_and_pictures_found_below_the_root(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / "ann" / f"{split}.json", json.dumps(coco_content(TRUTH[split])))
        for name, (size, _) in TRUTH[split].items():
            draw(tmp_path / "images" / split / name, size)
    splits = read_coco(tmp_path, {"train": "ann/train.json", "val": tmp_path / "ann" / "val.json"})
    assert {split: samples.names for split, samples in splits.items()} == {
        "train": ("images/train/a.png", "images/train/b.png", "images/train/c.png"),
        "val": ("images/val/d.png",),
    }


@pytest.mark.parametrize("folder", ["annotations", "train", "images/train2017", "images", "."])
def test_pictures_are_found_in_the_usual_places(folder, tmp_path):
    write_coco(tmp_path, {"train": TRUTH["train"]})
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for path in (tmp_path / "train2017").iterdir():
        path.rename(tmp_path / folder / path.name)
    train = read_coco(tmp_path, val_fraction=0, strict=True)["train"]
    assert train.names[0] == (Path(folder) / "a.png").as_posix()


def test_a_file_name_with_folders_even_of_windows_is_found(tmp_path):
    draw(tmp_path / "photos" / "x" / "a.png", (64, 32))
    write(tmp_path / "train.json", json.dumps(coco_content({"photos\\x\\a.png": TRUTH["train"]["a.png"]})))
    assert read_coco(tmp_path, {"train": "train.json"}, val_fraction=0)["train"].names == ("photos/x/a.png",)


def test_the_category_that_roboflow_adds_is_left_out_unless_it_has_boxes(tmp_path):
    write_roboflow(tmp_path)
    path = tmp_path / "train" / "_annotations.coco.json"

    def add_parent(content):
        content["categories"] = [{**entry, "supercategory": "pets"} for entry in content["categories"]]
        content["categories"].append({"id": 0, "name": "pets", "supercategory": "none"})

    edit_json(path, add_parent)
    assert read_coco(tmp_path)["train"].category_ids == (3, 17)
    edit_json(path, lambda content: content["annotations"][0].update(category_id=0))
    assert read_coco(tmp_path)["train"].category_ids == (0, 3, 17)


def test_a_category_that_is_its_own_parent_and_one_without_boxes_are_classes(tmp_path):
    write_coco(tmp_path)
    path = tmp_path / "annotations" / "instances_train2017.json"
    edit_json(path, lambda c: c["categories"].append({"id": 1, "name": "person", "supercategory": "person"}))
    assert read_coco(tmp_path)["val"].classes == ("person", "cat", "dog")


def test_a_category_of_val_that_train_lacks_is_unknown_and_another_name_is_refused(tmp_path):
    write_coco(tmp_path)
    path = tmp_path / "annotations" / "instances_val2017.json"

    def add_bird(content):
        content["categories"].append({"id": 5, "name": "bird"})
        content["annotations"][0]["category_id"] = 5

    edit_json(path, add_bird)
    report = DataReport()
    assert len(read_coco(tmp_path, report=report)["val"].boxes[0]) == 0
    assert report.counts[Finding.UNKNOWN] == 1
    edit_json(path, lambda content: content["categories"][0].update(id=3))
    with pytest.raises(ValueError, match=r"val2017\.json, categories\[0\]: id 3 is 'dog', in train 'cat'"):
        read_coco(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), r"instances_train2017\.json: no key 'images', only annotations, categories"),
        (lambda c: c.update(annotations={}), r"'annotations' is of type dict; expected list"),
        (lambda c: c["images"].append(3), r"images\[3\] is of type int; expected an object with the key 'id'"),
        (lambda c: c["images"][1].pop("file_name"), r"images\[1\]: no key 'file_name'"),
        (lambda c: c["images"][1].update(id="7"), r"images\[1\]: 'id' is of type str; expected int"),
        (lambda c: c["images"][1].update(id=100), r"images\[1\]: id 100 is there twice"),
        (lambda c: c["images"][1].update(file_name="../../x.png"), r"images\[1\]: .*x\.png is outside of"),
        (lambda c: c["images"][1].update(file_name="/etc/hostname"), r"images\[1\]: /etc/hostname is outside of"),
        (lambda c: c["annotations"][2].pop("bbox"), r"annotations\[2\]: no key 'bbox'"),
        (lambda c: c["annotations"][2].pop("image_id"), r"annotations\[2\]: no key 'image_id'"),
        (
            lambda c: c["annotations"][2].update(category_id=None),
            r"annotations\[2\]: 'category_id' is of type NoneType",
        ),
        (
            lambda c: c["annotations"][2].update(bbox=[1, 2, 3]),
            r"annotations\[2\]: 'bbox' is \[1, 2, 3\]; expected four",
        ),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, 3, "4"]), r"annotations\[2\]: 'bbox' is .*; expected four"),
        (lambda c: c["categories"][0].update(id=3), r"categories\[1\]: id 3 is there twice"),
        (lambda c: c["categories"][0].update(name="cat"), r"categories: two classes are called 'cat'"),
        (lambda c: c["categories"][0].update(name=None), r"categories\[0\]: 'name' is of type NoneType; expected str"),
    ],
)
def test_wrong_json_is_refused_by_file_and_key(change, message, tmp_path):
    write_coco(tmp_path)
    edit_json(tmp_path / "annotations" / "instances_train2017.json", change)
    with pytest.raises(ValueError, match=message):
        read_coco(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"train\.json is no JSON \("),
        (b"[" * 100_000, r"train\.json is no JSON \("),
        (b"[" + b"9" * 5000 + b"]", r"train\.json is no JSON \("),
        (b"[]", r"train\.json is of type list; expected an object with the key 'images'"),
        (b"\xff\xfe", r"train\.json is not UTF-8 text"),
    ],
)
def test_what_is_no_json_is_refused_by_name(content, message, tmp_path):
    (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_coco(tmp_path, {"train": "train.json"})


def test_a_missing_file_an_unknown_split_and_two_files_of_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*/train\.json"):
        read_coco(tmp_path, {"train": "train.json"})
    with pytest.raises(ValueError, match=r"dataset\.annotations has the key 'dev'; allowed: train, val, test"):
        read_coco(tmp_path, {"train": "train.json", "dev": "val.json"})
    write_coco(tmp_path)
    write(tmp_path / "annotations" / "instances_train2014.json", "{}")
    with pytest.raises(ValueError, match=r"has train twice"):
        read_coco(tmp_path)


# YOLO


def read_lines(root: Path, text: str, keys: str = "", **options) -> tuple[DetectionSamples, DataReport]:
    """Train of one picture, 64 x 32, with these labels."""
    write_yolo(root, {"train": TRUTH["train"]})
    write(root / "data.yaml", f"train: images/train\nnames: [cat, dog]\n{keys}")
    write(root / "labels" / "train" / "c.txt", "0 0.5 0.5 0.5 0.5\n")
    write(root / "labels" / "train" / "a.txt", text)
    report = DataReport()
    return read_yolo(root, val_fraction=0, report=report, **options)["train"], report


@pytest.mark.parametrize(
    ("text", "keys", "box"),
    [
        ("1 0.5 0.5 0.25 0.5", "", [24, 8, 40, 24]),
        ("\n1.0  0.5 0.5 0.25\t0.5 \r\n\n", "", [24, 8, 40, 24]),
        ("1 0.25 0.5 0.5 0.25 0.75 0.75", "", [16, 8, 48, 24]),
        ("1 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75", "", [16, 8, 48, 24]),
        ("1 0.5 0.5 0.25 0.5 0.9 0.9 2 0.1 0.1 1", "kpt_shape: [2, 3]", [24, 8, 40, 24]),
        ("1 0.5 0.5 1.0000001 1.0000001", "", [0, 0, 64, 32]),
    ],
)
def test_a_line_is_a_box_a_polygon_or_a_pose(text, keys, box, tmp_path):
    train, _ = read_lines(tmp_path, text, keys, strict=True)
    assert train.boxes[0].tolist() == [box]
    assert train.labels[0].tolist() == [1]


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        ("2 0.5 0.5 0.25 0.5", Finding.UNKNOWN),
        ("-1 0.5 0.5 0.25 0.5", Finding.UNKNOWN),
        ("1 nan 0.5 0.25 0.5", Finding.NOT_FINITE),
        ("1 0.1 0.1 0.5 nan 0.9 0.9", Finding.NOT_FINITE),
        ("1 0.5 0.5 0.01 0.5", Finding.SMALL),
        ("1 0.5 0.5 -0.25 0.5", Finding.SWAPPED),
        ("1 1.5 0.5 0.25 0.5", Finding.OUTSIDE),
        ("1 0.9 0.5 0.5 0.5", Finding.CLIPPED),
    ],
)
def test_a_wrong_line_is_counted_with_its_number(line, finding, tmp_path):
    _, report = read_lines(tmp_path, f"0 0.5 0.5 0.5 0.5\n{line}\n")
    assert report.counts == {finding: 1}
    assert "labels/train/a.txt, line 2: box (" in report.first[finding]


@pytest.mark.parametrize(
    "line",
    ["1 0.5 0.5 0.25", "1", "cat 0.5 0.5 0.25 0.5", "1.5 0.5 0.5 0.25 0.5", "1 0.5 0.5 0.25 0.5 0.9", "nan 1 1 1 1"],
)
def test_a_line_that_is_no_box_is_refused_with_its_number(line, tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt, line 2: '.*'; expected `class cx cy w h`"):
        read_lines(tmp_path, f"0 0.5 0.5 0.5 0.5\n{line}\n")


def test_labels_without_a_picture_are_counted_and_a_list_of_classes_is_none(tmp_path):
    write_yolo(tmp_path)
    write(tmp_path / "labels" / "train" / "z.txt", "0 0.5 0.5 0.5 0.5")
    write(tmp_path / "labels" / "train" / "classes.txt", "cat\ndog\n")
    report = DataReport()
    read_yolo(tmp_path, report=report)
    assert report.counts[Finding.STRAY] == 1
    assert report.first[Finding.STRAY].endswith("labels/train/z.txt")
    with pytest.raises(ValueError, match=r"z\.txt is the first of: labels of pictures that are not there \(1\)"):
        read_yolo(tmp_path, strict=True)


@pytest.mark.parametrize(
    "entries",
    [
        "path: /home/somebody/data\ntrain: images/train\nval: images/val\n",
        "path: ../datasets/mine\ntrain: images/train\nval: images/val\n",
        "path: images\ntrain: train\nvalidation: val\n",
        "train: ../images/train\nval: ../images/val\ntest:\n",
        "train: ./images/train/\nval: [images/val]\n",
        "train: lists/train.txt\nval: images/val\n",
    ],
)
def test_entries_are_folders_or_lists_wherever_they_start(entries, tmp_path):
    write_yolo(tmp_path)
    write(tmp_path / "lists" / "train.txt", "./images/train/a.png\n../images/train/b.png\n\nimages\\train\\c.png\n")
    write(tmp_path / "data.yaml", f"{entries}names:\n  0: cat\n  1: dog\n")
    splits = read_yolo(tmp_path, strict=True)
    assert splits["train"].names == ("images/train/a.png", "images/train/b.png", "images/train/c.png")
    assert [len(boxes) for boxes in splits["train"].boxes] == [2, 1, 0]
    assert splits["val"].names == ("images/val/d.png",)
    assert list(splits) == ["train", "val"]


def test_labels_lie_beside_pictures_that_are_in_no_folder_images(tmp_path):
    draw(tmp_path / "photos" / "a.png", (64, 32))
    write(tmp_path / "photos" / "a.txt", "0 0.5 0.5 0.5 0.5")
    write(tmp_path / "data.yml", "train: photos\nnames: [cat]\n")
    assert len(read_yolo(tmp_path, val_fraction=0)["train"].boxes[0]) == 1


def test_the_last_folder_called_images_is_that_of_the_labels(tmp_path):
    draw(tmp_path / "images" / "images" / "x" / "a.png", (64, 32))
    write(tmp_path / "images" / "labels" / "x" / "a.txt", "0 0.5 0.5 0.5 0.5")
    write(tmp_path / "data.yaml", "train: images\nnames: [cat]\n")
    assert len(read_yolo(tmp_path, val_fraction=0)["train"].boxes[0]) == 1


def test_a_listed_picture_that_is_not_there_is_counted(tmp_path):
    write_yolo(tmp_path)
    write(tmp_path / "train.txt", "images/train/a.png\nimages/train/none.png\n")
    write(tmp_path / "data.yaml", "train: train.txt\nval: images/val\nnames: [cat, dog]\n")
    report = DataReport()
    assert len(read_yolo(tmp_path, report=report)["train"]) == 1
    assert "none.png: no such file" in report.first[Finding.MISSING]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]\n" for last, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images/none\nnames: [cat, dog]", r"data\.yaml, train: there is no 'images/none' in .*; correct"),
        ("train: /etc\nnames: [cat, dog]", r"data\.yaml, train: there is no '/etc' in"),
        ("train: 3\nnames: [cat, dog]", r"data\.yaml, train is of type int; expected a folder"),
        ("train: [[images/train]]\nnames: [cat, dog]", r"data\.yaml, train is of type list; expected a folder"),
        ("train: images/train", r"data\.yaml: names is no list of classes"),
        ("train: images/train\nnames: []", r"data\.yaml: names is no list of classes"),
        ("train: images/train\nnames: {0: cat, 2: dog}", r"data\.yaml: the keys of names are not 0, 1, 2"),
        (
            "train: images/train\nnames: [cat, no]",
            r"data\.yaml: the name of class 1 is of type bool; write it in quotes",
        ),
        ("train: images/train\nnames: [cat, cat]", r"data\.yaml, names: two classes are called 'cat'"),
        ("train: images/train\nnc: 3\nnames: [cat, dog]", r"data\.yaml: nc is not 2, the number of names"),
        ("val: x\nvalid: y\ntrain: z\nnames: [cat]", r"data\.yaml has val twice, val and valid; keep one"),
        ("names: [", r"data\.yaml is no YAML \("),
        ("names: " + "[" * 3_000, r"data\.yaml is no YAML \("),
        ("x: " + "9" * 5000, r"data\.yaml is no YAML \("),
        ("- cat", r"data\.yaml is of type list; expected the keys"),
        ("!!python/object/apply:os.system ['false']", r"data\.yaml is no YAML \(could not determine a constructor"),
        (f"{BOMB}train: *i\nnames: *i", r"data\.yaml: the name of class 0 is of type list"),
        (f"{BOMB}path: *i\ntrain: *i\nnames: [x]", r"data\.yaml, train is of type list"),
    ],
)
def test_a_wrong_data_yaml_is_refused(text, message, tmp_path):
    write_yolo(tmp_path)
    write(tmp_path / "data.yaml", text)
    with pytest.raises(ValueError, match=message):
        read_yolo(tmp_path)


def test_a_list_that_leaves_the_root_is_refused(tmp_path):
    write_yolo(tmp_path / "data")
    draw(tmp_path / "secret.png", (8, 8))
    write(tmp_path / "data" / "train.txt", "images/train/a.png\n../secret.png\n")
    write(tmp_path / "data" / "data.yaml", "train: train.txt\nnames: [cat, dog]\n")
    with pytest.raises(ValueError, match=r"train\.txt, line 2: .*secret\.png is outside of .*data; write paths"):
        read_yolo(tmp_path / "data")


# VOC


def read_xml(root: Path, xml: str, **options) -> tuple[DetectionSamples, DataReport]:
    """Train of two pictures, of which the first, 64 x 32, has this XML."""
    write_voc(root, {"train": {"a.png": ((64, 32), []), "b.png": TRUTH["train"]["b.png"]}})
    write(root / "Annotations" / "a.xml", xml)
    report = DataReport()
    return read_voc(root, val_fraction=0, report=report, **options)["train"], report


def test_numbers_of_pixels_count_from_1_and_the_last_one_is_inside(tmp_path):
    train, _ = read_xml(tmp_path, voc_xml((64, 32), [("dog", (0, 0, 64, 32)), ("dog", (4, 4, 6, 7))]), strict=True)
    assert train.boxes[0].tolist() == [[0, 0, 64, 32], [4, 4, 6, 7]]


def test_equal_numbers_are_no_box(tmp_path):
    train, report = read_xml(tmp_path, voc_xml((64, 32), [("dog", (4, 4, 5, 5)), ("dog", (4, 4, 5, 9))]))
    assert len(train.boxes[0]) == 0
    assert report.counts == {Finding.SMALL: 2, Finding.BACKGROUND: 1}


def test_swapped_numbers_are_put_right_before_they_are_counted_from_0(tmp_path):
    xml = voc_xml((64, 32), [("dog", (0, 0, 0, 0))]).replace("<xmin>1</xmin>", "<xmin>20</xmin>")
    xml = xml.replace("<xmax>0</xmax>", "<xmax>11</xmax>").replace("<ymax>0</ymax>", "<ymax>8.5</ymax>")
    train, report = read_xml(tmp_path, xml)
    assert train.boxes[0].tolist() == [[10, 0, 20, 8.5]]
    assert report.counts == {Finding.SWAPPED: 1}


def test_difficult_objects_become_crowd(tmp_path):
    train, report = read_xml(tmp_path, voc_xml((64, 32), [("dog", (4, 4, 9, 9))], difficult=1), strict=True)
    assert train.crowd[0].tolist() == [True]
    assert train.crowd[1].tolist() == [False]
    assert report.counts == {Finding.CROWD: 1}


def test_a_name_that_train_does_not_have_is_dropped_and_counted(tmp_path):
    write_voc(tmp_path, {"train": TRUTH["train"], "val": {"d.png": ((64, 32), [("bird", (1, 1, 9, 9))])}})
    report = DataReport()
    splits = read_voc(tmp_path, report=report)
    assert splits["val"].classes == CLASSES
    assert len(splits["val"].boxes[0]) == 0
    assert report.first[Finding.UNKNOWN].endswith("d.xml, object 1: box (2, 2, 9, 9) of JPEGImages/d.png, class bird")


def test_lists_are_train_or_trainval_or_all(tmp_path):
    write_voc(tmp_path)
    lists = tmp_path / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    (lists / "val.txt").unlink()
    write(lists / "cat_train.txt", "a 1\nb -1\n")
    assert [len(samples) for samples in read_voc(tmp_path, val_fraction=0.3).values()] == [2, 1, 1]
    for path in lists.iterdir():
        path.unlink()
    everything = read_voc(tmp_path, val_fraction=0)
    assert [Path(name).stem for name in everything["train"].names] == list("abcde")


def test_train_goes_before_trainval_and_names_may_have_endings(tmp_path):
    write_voc(tmp_path)
    write(tmp_path / "ImageSets" / "Main" / "trainval.txt", "a\nb\nc\nd\n")
    write(tmp_path / "ImageSets" / "Main" / "train.txt", "a.png\r\nb.PNG\r\n\r\nc")
    assert len(read_voc(tmp_path, strict=True)["train"]) == 3


def test_xml_without_a_picture_is_counted_and_a_picture_without_xml_has_no_boxes(tmp_path):
    write_voc(tmp_path)
    write(tmp_path / "Annotations" / "z.xml", voc_xml((8, 8), []))
    (tmp_path / "JPEGImages" / "b.png").unlink()
    (tmp_path / "Annotations" / "d.xml").unlink()
    report = DataReport()
    splits = read_voc(tmp_path, report=report)
    assert report.counts == {Finding.STRAY: 1, Finding.MISSING: 1, Finding.BACKGROUND: 2}
    assert report.first[Finding.STRAY].endswith("z.xml")
    assert "train.txt, line 2: " in report.first[Finding.MISSING]
    assert len(splits["val"].boxes[0]) == 0


LAUGHS = "".join(f'<!ENTITY {n} "{f"&{m};" * 10}">' for m, n in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (f'<!DOCTYPE x [<!ENTITY a "ha">{LAUGHS}]><annotation>&i;</annotation>', r"a\.xml has a document type"),
        ('<!DOCTYPE x SYSTEM "file:///etc/hostname"><annotation/>', r"a\.xml has a document type"),
        ("<annotation>&i;</annotation>", r"a\.xml is no XML \(undefined entity"),
        ("<annotation>", r"a\.xml is no XML \("),
        ("", r"a\.xml is no XML \("),
        (voc_xml((64, 32), [(" ", (1, 1, 5, 5))]), r"a\.xml, object 1 has no name"),
        ("<a><object><name>dog</name></object></a>", r"a\.xml, object 1: bndbox is not xmin, ymin, xmax, ymax"),
        (voc_xml((64, 32), [("dog", (1, 1, "x", 5))]), r"a\.xml, object 1: bndbox is not xmin"),
    ],
)
def test_wrong_xml_is_refused_by_name(xml, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_xml(tmp_path, xml)


# The data set


def test_an_item_is_an_image_and_a_target_in_its_pixels(tmp_path):
    dataset = DetectionDataset(read_coco(write_coco(tmp_path))["train"], DetectionEvalTransform(SMALL))
    assert len(dataset) == 3
    image, target = dataset[0]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert target["boxes"].tolist() == [[0, 0, 32, 16], [4, 2, 12, 14]]
    assert target["labels"].tolist() == [0, 1]
    kinds = {key: (tuple(value.shape), value.dtype) for key, value in dataset[2][1].items()}
    assert kinds == {
        "boxes": ((0, 4), torch.float32),
        "labels": ((0,), torch.int64),
        "crowd": ((0,), torch.bool),
        "image_index": ((), torch.int64),
    }


def test_labels_and_crowds_go_with_the_boxes_that_stay(tmp_path):
    rows = [{"bbox": [40, 4, 10, 10], "category_id": 17, "iscrowd": 1}, {"bbox": [20, 4, 10, 10], "category_id": 17}]
    train, _ = read_one(tmp_path, rows)
    right = [{"name": "Crop", "x_min": 32, "y_min": 0, "x_max": 64, "y_max": 32}]
    _, target = DetectionDataset(train, DetectionTrainTransform(SMALL, right))[0]
    torch.testing.assert_close(target["boxes"], torch.tensor([[8.0, 4.0, 18.0, 14.0]]), atol=1e-3, rtol=0)
    assert target["labels"].tolist() == [1]
    assert target["crowd"].tolist() == [True]


def test_an_item_depends_on_seed_epoch_and_index_only(tmp_path):
    train = read_coco(write_coco(tmp_path))["train"]
    transform = DetectionTrainTransform(SMALL, [{"name": "CropAndPad", "percent": [-0.1, 0.4], "keep_size": False}])
    dataset = DetectionDataset(train, transform, seed=3)
    first = {key: dataset[key][1]["boxes"].tolist() for key in [(0, 0), (1, 0), (1, 1)]}
    again = pickle.loads(pickle.dumps(dataset))
    assert {key: again[key][1]["boxes"].tolist() for key in reversed(first)} == first
    assert first[0, 0] != first[1, 0]
    assert dataset[0][1]["boxes"].tolist() == first[0, 0]
    assert DetectionDataset(train, transform, seed=4)[0][1]["boxes"].tolist() != first[0, 0]


def test_a_batch_is_images_and_a_list_of_targets(tmp_path):
    dataset = DetectionDataset(read_coco(write_coco(tmp_path))["train"], DetectionEvalTransform(SMALL))
    loader = DataLoader(dataset, batch_size=2, sampler=EpochSampler(3), collate_fn=collate_detection)
    batches = list(loader)
    assert [tuple(images.shape) for images, _ in batches] == [(2, 3, 32, 32), (1, 3, 32, 32)]
    targets = [target for _, members in batches for target in members]
    assert [len(target["boxes"]) for target in targets] == [2, 1, 0]
    assert [int(target["image_index"]) for target in targets] == [0, 1, 2]
    assert Counter(map(tuple, targets)) == {("boxes", "labels", "crowd", "image_index"): 3}
