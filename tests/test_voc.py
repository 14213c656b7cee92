from pathlib import Path

import pytest

from tests.helpers import CLASSES, TRUTH, draw_image, voc_xml, write_text, write_voc
from vpt.data.readers.box_checks import DataReport, Finding
from vpt.data.readers.boxes import find_formats
from vpt.data.readers.voc import read_voc
from vpt.data.samples import DetectionSamples


def read_xml(root: Path, xml: str, **options) -> tuple[DetectionSamples, DataReport]:
    """Train of two images, of which the first, 64 x 32, has this XML."""
    write_voc(root, {"train": {"a.png": ((64, 32), []), "b.png": TRUTH["train"]["b.png"]}})
    write_text(root / "Annotations" / "a.xml", xml)
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
    write_text(lists / "cat_train.txt", "a 1\nb -1\n")
    assert [len(samples) for samples in read_voc(tmp_path, val_fraction=0.3).values()] == [2, 1, 1]
    for path in lists.iterdir():
        path.unlink()
    everything = read_voc(tmp_path, val_fraction=0)
    assert [Path(name).stem for name in everything["train"].names] == list("abcde")


def test_train_goes_before_trainval_and_names_may_have_endings(tmp_path):
    write_voc(tmp_path)
    write_text(tmp_path / "ImageSets" / "Main" / "trainval.txt", "a\nb\nc\nd\n")
    write_text(tmp_path / "ImageSets" / "Main" / "train.txt", "a.png\r\nb.PNG\r\n\r\nc")
    assert len(read_voc(tmp_path, strict=True)["train"]) == 3


def test_xml_without_an_image_is_counted_and_an_image_without_xml_has_no_boxes(tmp_path):
    write_voc(tmp_path)
    write_text(tmp_path / "Annotations" / "z.xml", voc_xml((8, 8), []))
    (tmp_path / "JPEGImages" / "b.png").unlink()
    (tmp_path / "Annotations" / "d.xml").unlink()
    report = DataReport()
    splits = read_voc(tmp_path, report=report)
    assert report.counts == {Finding.STRAY: 1, Finding.MISSING: 1, Finding.BACKGROUND: 2}
    assert report.first[Finding.STRAY].endswith("z.xml")
    assert "train.txt, line 2: " in report.first[Finding.MISSING]
    assert len(splits["val"].boxes[0]) == 0


def test_a_list_that_leaves_the_root_is_refused(tmp_path):
    write_voc(tmp_path / "data")
    draw_image(tmp_path / "secret.jpg", (8, 8))
    write_text(tmp_path / "data" / "ImageSets" / "Main" / "train.txt", "a\n../../secret\n")
    with pytest.raises(ValueError, match=r"train\.txt, line 2: .*secret\.jpg is outside of root="):
        read_voc(tmp_path / "data")


LAUGHS = "".join(f'<!ENTITY {n} "{f"&{m};" * 10}">' for m, n in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (f'<!DOCTYPE x [<!ENTITY a "ha">{LAUGHS}]><annotation>&i;</annotation>', r"a\.xml: has a document type"),
        ('<!DOCTYPE x SYSTEM "file:///etc/hostname"><annotation/>', r"a\.xml: has a document type"),
        ("<annotation>&i;</annotation>", r"a\.xml: not XML \(undefined entity"),
        ("<annotation>", r"a\.xml: not XML \("),
        ("", r"a\.xml: not XML \("),
    ],
)
def test_wrong_xml_is_refused_by_name(xml, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_xml(tmp_path, xml)


def with_dog(entry: str) -> str:
    return voc_xml((64, 32), [("dog", (4, 4, 9, 9))]).replace("</annotation>", f"<object>{entry}</object></annotation>")


BOX = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>{}</xmax><ymax>9</ymax></bndbox>"
POLYGON = "<polygon><x1>2</x1><y1>3</y1><x2>20</x2><y2>3</y2><x3>20</x3><y3>9</y3></polygon>"


@pytest.mark.parametrize(
    ("entry", "finding", "box"),
    [
        (BOX.format(9), Finding.INVALID, None),
        (f"<name> </name>{BOX.format(9)}", Finding.INVALID, None),
        ("<name>dog</name>", Finding.INVALID, None),
        (f"<name>dog</name>{BOX.format('x')}", Finding.INVALID, None),
        ("<name>dog</name><bndbox><xmin>2</xmin></bndbox>", Finding.INVALID, None),
        ("<name>dog</name><polygon></polygon>", Finding.INVALID, None),
        (f"<name>dog</name>{BOX.format('nan')}", Finding.NOT_FINITE, None),
        (f"<name>dog</name>{POLYGON}", Finding.POLYGON, [1, 2, 20, 9]),
    ],
)
def test_a_wrong_object_is_repaired_or_dropped_and_counted(entry, finding, box, tmp_path):
    train, report = read_xml(tmp_path, with_dog(entry))
    assert train.boxes[0].tolist() == [[4, 4, 9, 9], *([box] if box else [])]
    assert report.counts == {finding: 1}
    assert "a.xml, object 2" in report.first[finding]


@pytest.mark.parametrize(
    ("images", "file", "tags", "expected"),
    [
        (["d1/x.jpg", "d2/x.jpg"], "x.xml", "<folder>d1</folder><filename>x.jpg</filename>", "d1/x.jpg"),
        (["d1/x.jpg", "d2/x.jpg"], "x.xml", "<folder>photos\\d2</folder>", "d2/x.jpg"),
        (["d1/x.jpg", "d2/x.jpg"], "d2/x.xml", "<folder>d1</folder>", "d2/x.jpg"),
        (["x.jpg", "x.png"], "x.xml", "<filename>x.png</filename>", "x.png"),
        (["x.jpg"], "0001.xml", "<filename>x.jpg</filename>", "x.jpg"),
        (["d1/x.jpg", "d2/x.jpg"], "x.xml", "<folder>d3</folder><filename>x.jpg</filename>", None),
        (["x.jpg", "x.png"], "x.xml", "", None),
    ],
)
@pytest.mark.parametrize("has_list", [False, True])
def test_of_images_of_one_name_the_xml_chooses_and_what_is_left_is_counted(
    images, file, tags, expected, has_list, tmp_path
):
    for image in [*images, "other.jpg"]:
        draw_image(tmp_path / "JPEGImages" / image, (64, 32))
    xml = voc_xml((64, 32), [("dog", (4, 4, 9, 9))])
    write_text(tmp_path / "Annotations" / "other.xml", xml)
    write_text(tmp_path / "Annotations" / file, xml.replace("<size>", f"{tags}<size>"))
    if has_list:
        write_text(tmp_path / "ImageSets" / "Main" / "train.txt", f"{Path(file).stem}\nother.jpg\n")
    report = DataReport()
    train = read_voc(tmp_path, val_fraction=0, report=report)["train"]
    assert set(train.names) == {"JPEGImages/other.jpg", *([f"JPEGImages/{expected}"] if expected else [])}
    assert all(boxes.tolist() == [[4, 4, 9, 9]] for boxes in train.boxes)
    assert report.counts[Finding.UNNAMED] == len(images) - (expected is not None)
    assert report.counts[Finding.AMBIGUOUS] == (expected is None)


@pytest.mark.parametrize(
    ("images", "annotations"),
    [
        ("images", "annotations"),
        ("Images", "annotations/xmls"),
        ("JPEGImages/{}", "Annotations/{}"),
        ("{}", "{}"),
        ("{}/images", "{}/annotations"),
        ("{}/images", "{}/images"),
        ("", ""),
        ("images", "images"),
        ("", "Annotations"),
    ],
)
def test_xml_is_found_in_other_folders_and_beside_the_images(images, annotations, tmp_path):
    for split in ("train", "val"):
        for name, (size, boxes) in TRUTH[split].items():
            folder = {"val": "valid"}.get(split, split)
            draw_image(tmp_path / images.format(folder) / name, size)
            write_text(tmp_path / annotations.format(folder) / f"{Path(name).stem}.xml", voc_xml(size, boxes))
    assert find_formats(tmp_path) == ["voc"]
    splits = read_voc(tmp_path, val_fraction=0, strict=True)
    num = {"train": 3, "val": 1} if "{}" in images else {"train": 4}
    assert {split: len(samples) for split, samples in splits.items()} == num
    assert sum(len(boxes) for samples in splits.values() for boxes in samples.boxes) == 4
