"""Readers of images with masks, in miniature copies of the layouts that tools write."""

import json

import numpy as np
import pytest
from PIL import Image

from vpt.data.images import ImageError
from vpt.data.masks import IGNORE
from vpt.data.readers.box_checks import DataReport
from vpt.data.readers.mask_classes import Meaning
from vpt.data.readers.masks import MaskFinding, read_masks

INDICES = np.array([[0, 1, 2, 255]], np.uint8).repeat(4, axis=0)


def put(path, pixels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8) if pixels is None else pixels).save(path)


def read(root, **reading):
    report = DataReport(kinds=MaskFinding)
    names = ("classes", "ignore", "reduce_zero_label", "instances")
    meaning = Meaning(**{name: reading.pop(name) for name in names if name in reading})
    return read_masks(root, meaning, report=report, **reading), report


LAYOUTS = {
    "folders in splits": ("{split}/images/{stem}.png", "{split}/masks/{stem}.png"),
    "splits in folders (ADE20K)": ("images/{split}ing/{stem}.png", "annotations/{split}ing/{stem}.png"),
    "beside (Roboflow)": ("{split}/{stem}.png", "{split}/{stem}_mask.png"),
    "endings": ("{split}/imgs/{stem}.png", "{split}/labels/{stem}_gt.png"),
    "in sub-folders": ("{split}/images/city/{stem}.png", "{split}/masks/city/{stem}.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_images_and_masks_are_paired_in_usual_layouts(tmp_path, layout):
    splits = ("train", "val") if "ing" not in layout[0] else ("train",)
    for split in splits:
        for number in range(3):
            for template, pixels in zip(layout, (None, INDICES), strict=True):
                put(tmp_path / template.format(split=split, stem=f"a{number}"), pixels)
    samples, report = read(tmp_path)
    assert samples.keys() == {"train", "val"}
    assert samples["train"].classes == ("0", "1", "2")
    assert samples["train"].masks(0)[0].tolist() == [0, 1, 2, IGNORE]
    assert samples["train"].pixels[0] == (4, 4, 4, 4)
    assert not report.counts


def test_voc_is_read_with_its_lists_and_class_names(tmp_path):
    for stem in ("a", "b", "c"):
        put(tmp_path / "JPEGImages" / f"{stem}.jpg")
        put(tmp_path / "SegmentationClass" / f"{stem}.png", INDICES)
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\n")
    samples, _ = read(tmp_path)
    assert (len(samples["train"]), len(samples["val"])) == (2, 1)
    assert samples["val"].classes[:3] == ("background", "aeroplane", "bicycle")
    assert samples["val"].masks(0)[0].tolist() == [0, 1, 2, IGNORE]


def test_cityscapes_label_ids_become_its_19_classes(tmp_path):
    for split in ("train", "val"):
        put(tmp_path / "leftImg8bit" / split / "ulm" / "ulm_0_leftImg8bit.png")
        folder = tmp_path / "gtFine" / split / "ulm"
        put(folder / "ulm_0_gtFine_labelIds.png", np.array([[7, 8, 0, 33]], np.uint8).repeat(4, axis=0))
        put(folder / "ulm_0_gtFine_color.png")
    samples, report = read(tmp_path)
    assert len(samples["train"].classes) == 19
    assert samples["train"].masks(0)[0].tolist() == [0, 1, IGNORE, 18]
    assert not report.counts


def test_colours_of_cvat_are_named_by_its_labelmap_and_unknown_ones_reported(tmp_path):
    (tmp_path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nsky:0,0,255::\nroad:9,9,9::\nvoid:0,0,0::\n"
    )
    colours = np.array([[[0, 0, 255], [9, 9, 9], [0, 0, 0], [1, 1, 1]]], np.uint8).repeat(4, axis=0)
    for number in range(4):
        put(tmp_path / "images" / f"{number}.png")
        put(tmp_path / "masks" / f"{number}.png", colours)
    samples, report = read(tmp_path)
    assert samples["train"].classes == ("sky", "road")
    assert samples["train"].masks(0)[0].tolist() == [0, 1, IGNORE, IGNORE]
    assert report.counts[MaskFinding.UNKNOWN] == 4
    assert "#010101" in report.first[MaskFinding.UNKNOWN]


def masks_of(root, pixels, num=5):
    for number in range(num):
        put(root / "images" / f"{number}.png")
        put(root / "masks" / f"{number}.png", np.array([pixels], np.uint8).repeat(4, axis=0))
    return root


def test_0_and_255_are_background_and_foreground(tmp_path):
    samples, _ = read(masks_of(tmp_path, [0, 0, 255, 255]))
    assert samples["train"].classes == ("background", "foreground")
    assert samples["train"].masks(0)[0].tolist() == [0, 0, 1, 1]


def test_classes_of_the_config_name_values_lists_of_values_and_colours(tmp_path):
    root = masks_of(tmp_path, [0, 1, 2, 255])
    samples, _ = read(root, classes={"land": [0, 1], "sea": 2})
    assert samples["train"].masks(0)[0].tolist() == [0, 0, 1, IGNORE]
    assert samples["train"].classes == ("land", "sea")
    samples, _ = read(root, classes={"black": "#000000", "white": "#FFFFFF"})
    assert samples["train"].masks(0)[0].tolist() == [0, IGNORE, IGNORE, 1]


def test_reduce_zero_label_ignores_0_and_instances_join_all_others(tmp_path):
    samples, _ = read(masks_of(tmp_path / "ade", [0, 1, 2, 1]), reduce_zero_label=True)
    assert samples["train"].masks(0)[0].tolist() == [IGNORE, 0, 1, 0]
    samples, _ = read(masks_of(tmp_path / "cells", [0, 9, 255, 7]), instances=True)
    assert samples["train"].classes == ("background", "object")
    assert samples["train"].masks(0)[0].tolist() == [0, 1, 1, 1]


def test_what_is_missing_stray_resized_or_empty_is_counted(tmp_path):
    root = masks_of(tmp_path, [0, 1, 1, 0], num=6)
    (root / "masks" / "0.png").unlink()
    put(root / "masks" / "stray.png", INDICES)
    put(root / "masks" / "1.png", np.zeros((2, 2), np.uint8))
    put(root / "masks" / "2.png", np.full((4, 4), 255, np.uint8))
    put(root / "masks" / "3.png", np.zeros((2, 9), np.uint8))
    samples, report = read(root, classes=["a", "b"])
    kinds = (MaskFinding.MISSING, MaskFinding.STRAY, MaskFinding.SIZE, MaskFinding.EMPTY, MaskFinding.SHAPE)
    assert [report.counts[kind] for kind in kinds] == [1] * 5
    assert sum(map(len, samples.values())) == 4
    with pytest.raises(ValueError, match="strict"):
        read(root, classes=["a", "b"], strict=True)


def test_a_broken_mask_is_left_out_of_train_and_refused_in_val(tmp_path):
    for split in ("train", "val"):
        masks_of(tmp_path / split, [0, 1, 1, 0], num=3)
    (tmp_path / "train" / "masks" / "0.png").write_bytes(b"no image")
    samples, report = read(tmp_path)
    assert (len(samples["train"]), len(report.left_out)) == (2, 1)
    (tmp_path / "val" / "masks" / "0.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match="val"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("pixels", "reading", "word"),
    [
        ([3, 3, 3, 3], {}, "nothing"),
        ([0, 1, 1, 0], {"classes": ["a"]}, "one class"),
        ([0, 1, 1, 0], {"classes": ["a", "a"]}, "'a'"),
        ([0, 1, 1, 0], {"classes": {"a": 0, "b": 255}}, "255"),
        ([0, 1, 1, 0], {"classes": {"a": 0, "b": "#00FF00"}}, "mixes"),
        ([0, 1, 1, 0], {"classes": {"a": 0, "b": -1}}, "-1"),
        ([0, 1, 1, 0], {"classes": {"a": 0, "b": []}}, "'b'"),
        ([0, 1, 1, 0], {"classes": {"a": 0, "b": "red"}}, "red"),
        *(([0, 1, 1, 0], {"classes": value}, "list") for value in (5, "ab", [], {})),
        ([0, 1, 1, 0], {"classes": ["a", "b", "c"], "instances": True}, "two names"),
        ([0, 1, 1, 0], {"reduce_zero_label": True, "instances": True}, "exclude"),
    ],
)
def test_classes_that_cannot_be_are_refused_with_a_reason(tmp_path, pixels, reading, word):
    with pytest.raises(ValueError, match=word):
        read(masks_of(tmp_path, pixels), **reading)


def test_colours_without_names_and_numbers_of_objects_are_refused_with_the_key(tmp_path):
    root = masks_of(tmp_path / "colours", [0, 1, 1, 0])
    put(root / "masks" / "0.png", np.full((4, 4, 3), (1, 2, 3), np.uint8))
    with pytest.raises(ValueError, match=r"dataset\.classes"):
        read(root, val_fraction=0.3)
    root = tmp_path / "objects"
    for number in range(4):
        put(root / "images" / f"{number}.png", np.zeros((20, 20, 3), np.uint8))
        put(root / "masks" / f"{number}.png", np.arange(400, dtype=np.uint16).reshape(20, 20))
    with pytest.raises(ValueError, match="instances"):
        read(root)


def test_two_images_of_one_mask_are_refused(tmp_path):
    root = masks_of(tmp_path, [0, 1, 1, 0])
    put(root / "images" / "0.jpg")
    with pytest.raises(ValueError, match=r"0\.(png|jpg)"):
        read(root)


def test_no_known_layout_is_refused_with_the_expected_ones(tmp_path):
    (tmp_path / "notes.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="masks"):
        read(tmp_path)
