import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import CLASSES, TRUTH, write_coco, write_roboflow, write_text, write_voc, write_yolo
from vpt.config.composition import compose_config
from vpt.config.validation import to_config
from vpt.data.readers.box_checks import DataReport, Finding
from vpt.data.readers.boxes import find_formats, read_detection
from vpt.data.readers.coco import read_coco
from vpt.data.readers.voc import read_voc
from vpt.data.readers.yolo import read_yolo
from vpt.task_types.base import task_type_of

WRITERS = {"coco": write_coco, "roboflow": write_roboflow, "yolo": write_yolo, "voc": write_voc}
FORMATS = ["coco", "yolo", "voc"]


@pytest.mark.parametrize(
    ("layout", "category_ids", "image_ids"),
    [
        ("coco", (3, 17), (100, 101, 102)),
        ("roboflow", (3, 17), (100, 101, 102)),
        ("yolo", (0, 1), (1, 2, 3)),
        ("voc", (1, 2), (1, 2, 3)),
    ],
)
def test_every_format_is_read_to_the_same_samples_with_the_ids_of_its_source(layout, category_ids, image_ids, tmp_path):
    report = DataReport()
    splits = read_detection(WRITERS[layout](tmp_path), report=report, strict=True)
    assert list(splits) == ["train", "val", "test"]
    assert (splits["train"].category_ids, splits["train"].image_ids) == (category_ids, image_ids)
    for split, samples in splits.items():
        assert samples.classes == CLASSES
        assert [Path(name).name for name in samples.names] == list(TRUTH[split])
        assert all(tmp_path / name == path for name, path in zip(samples.names, samples.paths, strict=True))
        for i, ((width, height), boxes) in enumerate(TRUTH[split].values()):
            assert samples.sizes[i] == (height, width)
            assert samples.read(i).size == (width, height)
            for ours, expected in (
                (samples.boxes[i], np.array([box for _, box in boxes], np.float32).reshape(-1, 4)),
                (samples.labels[i], np.array([CLASSES.index(label) for label, _ in boxes], np.int64)),
                (samples.crowd[i], np.zeros(len(boxes), np.bool_)),
            ):
                np.testing.assert_array_equal(ours, expected, strict=True)
    assert report.counts == {Finding.BACKGROUND: 1}
    assert report.lines()[:3] == [
        "train: 3 images, 3 boxes, 2 classes",
        "val: 1 images, 1 boxes, 2 classes",
        "test: 1 images, 2 boxes, 2 classes",
    ]
    assert len(report.lines()) == 4


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_is_detected_or_named_and_refused_where_it_is_missing(format, tmp_path):
    WRITERS[format](tmp_path / "data" / "VOC")
    assert find_formats(tmp_path / "data" / "VOC") == [format]
    assert len(read_detection(tmp_path / "data" / "VOC", format)["train"]) == 3
    for asked, words in (
        ("auto", r"did you mean root=.*/VOC\? expected coco: annotations/.*yolo: data\.yaml.*voc: Annotations/"),
        (format, "nothing found; expected"),
        ("pascal", "format='pascal': must be one of auto, coco, yolo, voc"),
    ):
        with pytest.raises(ValueError, match=words):
            read_detection(tmp_path / "data", asked)
    with pytest.raises(ValueError, match=r"root=.*/nothing is no folder"):
        read_detection(tmp_path / "nothing")


def test_two_formats_in_one_folder_need_a_choice(tmp_path):
    write_yolo(write_coco(tmp_path))
    with pytest.raises(ValueError, match=r"coco and yolo found; use format='coco'"):
        read_detection(tmp_path)
    assert read_detection(tmp_path, format="yolo")["train"].category_ids == (0, 1)


@pytest.mark.parametrize("format", FORMATS)
def test_a_missing_train_and_an_image_of_two_splits_are_refused(format, tmp_path):
    WRITERS[format](tmp_path / "val", {"val": TRUTH["val"]})
    with pytest.raises(ValueError, match="val but no train found; expected"):
        read_detection(tmp_path / "val")
    WRITERS[format](tmp_path)
    if format == "coco":
        folder = tmp_path / "annotations"
        write_text(folder / "instances_val2017.json", (folder / "instances_train2017.json").read_text())
        for path in (tmp_path / "train2017").iterdir():
            path.rename(tmp_path / path.name)
    elif format == "yolo":
        write_text(tmp_path / "data.yaml", "train: images/train\nval: images/train\nnames: [cat, dog]\n")
    else:
        write_text(tmp_path / "ImageSets" / "Main" / "val.txt", "d\na\n")
    with pytest.raises(ValueError, match=r"a\.png is a duplicate, first at "):
        read_detection(tmp_path)


def test_train_without_images_or_boxes_and_wrong_fractions_are_refused(tmp_path):
    write_coco(tmp_path, many(1))
    for options, words in (
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "val_fraction=0.6, test_fraction=0.4"),
        ({}, "val_fraction=0.2: train has too few images"),
    ):
        with pytest.raises(ValueError, match=words):
            read_coco(tmp_path, **options)
    write_coco(tmp_path, {"train": {"a.png": ((8, 8), [("cat", (0, 0, 0, 0))])}})
    with pytest.raises(ValueError, match="train has no usable box; boxes with a side below 1 px: 1"):
        read_coco(tmp_path)
    (tmp_path / "train2017" / "a.png").unlink()
    with pytest.raises(ValueError, match="train has no usable image; images that do not exist: 1"):
        read_coco(tmp_path)


def many(num: int) -> dict:
    return {"train": {f"{i:02}.png": ((8, 8), [("cat", (1, 1, 5, 5))]) for i in range(num)}}


@pytest.mark.parametrize("format", FORMATS)
def test_missing_splits_are_split_off_train_by_name(format, tmp_path):
    WRITERS[format](tmp_path, many(20))
    splits = read_detection(tmp_path, val_fraction=0.4, test_fraction=0.4, seed=1)
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 4, "val": 8, "test": 8}
    names = {split: set(samples.names) for split, samples in splits.items()}
    assert len(set.union(*names.values())) == 20
    again = read_detection(tmp_path, val_fraction=0.4, test_fraction=0.4, seed=1)
    assert {split: set(samples.names) for split, samples in again.items()} == names
    assert set(read_detection(tmp_path, val_fraction=0.4, seed=2)["val"].names) != names["val"]


def test_one_image_less_moves_at_most_one_other(tmp_path):
    pictures = many(20)["train"]
    before = set(read_yolo(write_yolo(tmp_path / "all", {"train": pictures}))["val"].names)
    del pictures["00.png"]
    after = set(read_yolo(write_yolo(tmp_path / "less", {"train": pictures}))["val"].names)
    assert len(before - after) <= 1


def test_boxes_without_any_split_are_divided_in_three_by_the_command_and_the_summary_says_so(tmp_path):
    flat, named = write_voc(tmp_path / "flat", many(20)), write_coco(tmp_path / "named", many(20))
    shutil.rmtree(flat / "ImageSets")
    task_types = [
        task_type_of(to_config(compose_config(["dataset=boxes", f"dataset.root={r}"]))) for r in (flat, named)
    ]
    splits = task_types[0].read_all()
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 12, "val": 4, "test": 4}
    assert any("split off train" in line for line in task_types[0].describe(splits))
    assert list(task_types[1].read_all()) == ["train", "val"]


def test_given_splits_stay_and_none_is_made_without_a_fraction(tmp_path):
    write_coco(tmp_path)
    assert len(read_coco(tmp_path, val_fraction=0.5, test_fraction=0.5 - 1e-9)["train"]) == 3
    write_voc(tmp_path / "voc", many(4))
    assert list(read_voc(tmp_path / "voc", val_fraction=0)) == ["train"]
