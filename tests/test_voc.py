from pathlib import Path

import pytest

from tests.helpers import CLASSES, TRUTH, voc_xml, write_text, write_voc
from vpt.data.readers.box_checks import DataReport, Finding
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


LAUGHS = "".join(f'<!ENTITY {n} "{f"&{m};" * 10}">' for m, n in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (f'<!DOCTYPE x [<!ENTITY a "ha">{LAUGHS}]><annotation>&i;</annotation>', r"a\.xml: has a document type"),
        ('<!DOCTYPE x SYSTEM "file:///etc/hostname"><annotation/>', r"a\.xml: has a document type"),
        ("<annotation>&i;</annotation>", r"a\.xml: not XML \(undefined entity"),
        ("<annotation>", r"a\.xml: not XML \("),
        ("", r"a\.xml: not XML \("),
        (voc_xml((64, 32), [(" ", (1, 1, 5, 5))]), r"a\.xml, object 1: no name"),
        ("<a><object><name>dog</name></object></a>", r"a\.xml, object 1: bndbox must have"),
        (voc_xml((64, 32), [("dog", (1, 1, "x", 5))]), r"a\.xml, object 1: bndbox must have"),
    ],
)
def test_wrong_xml_is_refused_by_name(xml, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_xml(tmp_path, xml)
