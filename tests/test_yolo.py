from pathlib import Path

import pytest

from tests.helpers import TRUTH, draw_image, write_text, write_yolo
from vpt.data.readers.box_checks import DataReport, Finding
from vpt.data.readers.boxes import find_formats
from vpt.data.readers.yolo import read_yolo
from vpt.data.samples import DetectionSamples


def read_lines(root: Path, text: str, keys: str = "", **options) -> tuple[DetectionSamples, DataReport]:
    """Train of one image, 64 x 32, with these labels."""
    write_yolo(root, {"train": TRUTH["train"]})
    write_text(root / "data.yaml", f"train: images/train\nnames: [cat, dog]\n{keys}")
    write_text(root / "labels" / "train" / "c.txt", "0 0.5 0.5 0.5 0.5\n")
    write_text(root / "labels" / "train" / "a.txt", text)
    report = DataReport()
    return read_yolo(root, val_fraction=0, report=report, **options)["train"], report


@pytest.mark.parametrize(
    ("text", "keys", "box"),
    [
        ("1 0.5 0.5 0.25 0.5", "", [24, 8, 40, 24]),
        ("\n1  0.5 0.5 0.25\t0.5 \r\n\n", "", [24, 8, 40, 24]),
        ("1 0.25 0.5 0.5 0.25 0.75 0.75", "", [16, 8, 48, 24]),
        ("1 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75", "", [16, 8, 48, 24]),
        ("1 0.5 0.5 0.25 0.5 0.9 0.9 2 0.1 0.1 1", "kpt_shape: [2, 3]", [24, 8, 40, 24]),
        ("1 0.5 0.5 0.25 0.5 0.9", "kpt_shape: [1, 1]", [24, 8, 40, 24]),
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
    ("line", "finding"),
    [
        *(
            (line, Finding.CONVERTED)
            for line in ("1.0 0.5 0.5 0.25 0.5", "dog 0.5 0.5 0.25 0.5", "1 0.5 0.5 0.25 0.5 0.9")
        ),
        *((line, Finding.INVALID) for line in ("1 0.5 0.5 0.25", "1", "1 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "1 x 1 1 1")),
        *((line, Finding.INVALID) for line in ("bird 0.5 0.5 0.25 0.5", "1.5 0.5 0.5 0.25 0.5", "nan 1 1 1 1")),
        ("1e400 0.5 0.5 0.25 0.5", Finding.INVALID),
    ],
)
def test_a_line_of_another_form_is_repaired_or_dropped_and_counted(line, finding, tmp_path):
    train, report = read_lines(tmp_path, f"0 0.5 0.5 0.5 0.5\n{line}\n")
    assert train.boxes[0].tolist() == [[16, 8, 48, 24], *([[24, 8, 40, 24]] if finding is Finding.CONVERTED else [])]
    assert report.counts == {finding: 1}
    assert "a.txt, line 2: " in report.first[finding]


def test_images_that_share_a_file_of_labels_are_counted(tmp_path):
    write_yolo(tmp_path)
    draw_image(tmp_path / "images" / "train" / "a.jpg", (64, 32))
    draw_image(tmp_path / "images" / "train" / "c.jpg", (64, 32))
    report = DataReport()
    train = read_yolo(tmp_path, report=report)["train"]
    assert [len(boxes) for boxes in train.boxes] == [2, 2, 1, 0, 0]
    assert report.counts == {Finding.SHARED: 2, Finding.BACKGROUND: 2}
    assert report.first[Finding.SHARED].endswith("labels/train/a.txt: images/train/a.jpg")


LINE = "0 0.5 0.5 0.5 0.5\n"
LISTS = {"obj.names": "cat\n", "obj.data": "names = data/obj.names\n", "train.txt": "data/obj_train_data/a.png\n"}


@pytest.mark.parametrize(
    ("files", "image", "labels", "counts"),
    [
        ({"mine.yaml": "train: images\nnames: [cat]\n", "other.yaml": "a: 1"}, "images/a.png", "labels/a.txt", {}),
        ({"coco8.yml": "path: .\nnames:\n  0: cat\ntrain: /data/x/images\n"}, "images/a.png", "labels/a.txt", {}),
        ({"classes.txt": "cat\n", "notes.json": "{}"}, "images/a.png", "labels/a.txt", {}),
        ({"labels/classes.txt": "cat\n"}, "images/a.png", "labels/a.txt", {}),
        ({"classes.txt": "cat\n"}, "images/train/a.png", "labels/train/a.txt", {}),
        ({"classes.txt": "cat\n"}, "train/a.png", "train/a.txt", {}),
        ({"classes.txt": "cat\n", "README.txt": "1 export"}, "a.png", "a.txt", {}),
        ({"train/_darknet.labels": "cat\n", "README.roboflow.txt": "x"}, "train/a.png", "train/a.txt", {}),
        (LISTS, "obj_train_data/a.png", "obj_train_data/a.txt", {Finding.MOVED: 1}),
        ({"data.yaml": "train: ../train/images\nnames: [cat]\n"}, "train/images/a.png", "train/labels/a.txt", {}),
    ],
)
def test_the_folders_of_other_tools_are_read(files, image, labels, counts, tmp_path):
    for name, text in {**files, labels: LINE}.items():
        write_text(tmp_path / name, text)
    draw_image(tmp_path / image, (64, 32))
    assert find_formats(tmp_path) == ["yolo"]
    report = DataReport()
    train = read_yolo(tmp_path, val_fraction=0, report=report, strict=True)["train"]
    assert train.names == (image,)
    assert train.boxes[0].tolist() == [[16, 8, 48, 24]]
    assert report.counts == counts


def test_two_files_that_name_classes_are_refused(tmp_path):
    for name in ("a.yaml", "b.yml"):
        write_text(tmp_path / name, "train: x\nnames: [cat]\n")
    with pytest.raises(ValueError, match=r"both a\.yaml and b\.yml"):
        read_yolo(tmp_path)


def test_labels_without_an_image_are_counted_and_a_list_of_classes_is_none(tmp_path):
    write_yolo(tmp_path)
    write_text(tmp_path / "labels" / "train" / "z.txt", "0 0.5 0.5 0.5 0.5")
    write_text(tmp_path / "labels" / "train" / "classes.txt", "cat\ndog\n")
    report = DataReport()
    read_yolo(tmp_path, report=report)
    assert report.counts[Finding.STRAY] == 1
    assert report.first[Finding.STRAY].endswith("labels/train/z.txt")
    with pytest.raises(ValueError, match=r"z\.txt is the first of: labels of images that do not exist \(1\)"):
        read_yolo(tmp_path, strict=True)
    for name in ("a.txt", "b.txt"):
        write_text(tmp_path / "beside" / name, LINE)
    draw_image(tmp_path / "beside" / "a.png", (64, 32))
    write_text(tmp_path / "beside" / "classes.txt", "cat\n")
    with pytest.raises(ValueError, match=r"b\.txt is the first of: labels"):
        read_yolo(tmp_path / "beside", val_fraction=0, strict=True)


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
    write_text(
        tmp_path / "lists" / "train.txt", "./images/train/a.png\n../images/train/b.png\n\nimages\\train\\c.png\n"
    )
    write_text(tmp_path / "data.yaml", f"{entries}names:\n  0: cat\n  1: dog\n")
    splits = read_yolo(tmp_path, strict=True)
    assert splits["train"].names == ("images/train/a.png", "images/train/b.png", "images/train/c.png")
    assert [len(boxes) for boxes in splits["train"].boxes] == [2, 1, 0]
    assert splits["val"].names == ("images/val/d.png",)
    assert list(splits) == ["train", "val"]


@pytest.mark.parametrize(("image", "labels"), [("photos", "photos"), ("images/images/x", "images/labels/x")])
def test_labels_are_in_the_folder_whose_last_images_is_labels_or_beside_the_image(image, labels, tmp_path):
    draw_image(tmp_path / image / "a.png", (64, 32))
    write_text(tmp_path / labels / "a.txt", "0 0.5 0.5 0.5 0.5")
    write_text(tmp_path / "data.yml", f"train: {Path(image).parts[0]}\nnames: [cat]\n")
    assert len(read_yolo(tmp_path, val_fraction=0)["train"].boxes[0]) == 1


def test_a_listed_image_that_does_not_exist_is_counted(tmp_path):
    write_yolo(tmp_path)
    write_text(tmp_path / "train.txt", "images/train/a.png\nimages/train/none.png\n")
    write_text(tmp_path / "data.yaml", "train: train.txt\nval: images/val\nnames: [cat, dog]\n")
    report = DataReport()
    assert len(read_yolo(tmp_path, report=report)["train"]) == 1
    assert "none.png: no such file" in report.first[Finding.MISSING]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]\n" for last, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images/none\nnames: [cat, dog]", r"data\.yaml, train: no 'images/none' in .*; correct"),
        ("train: /etc\nnames: [cat, dog]", r"data\.yaml, train: no '/etc' in"),
        ("train: 3\nnames: [cat, dog]", r"data\.yaml, train: of type int; must be a folder"),
        ("train: [[images/train]]\nnames: [cat, dog]", r"data\.yaml, train: of type list; must be a folder"),
        ("train: images/train", r"data\.yaml: names must be a list of classes"),
        ("train: images/train\nnames: []", r"data\.yaml: names must be a list of classes"),
        ("train: images/train\nnames: {0: cat, 2: dog}", r"data\.yaml: the keys of names must be 0, 1, 2"),
        ("train: images/train\nnames: [cat, no]", r"data\.yaml: the name of class 1 is of type bool; write it in"),
        ("train: images/train\nnames: [cat, cat]", r"data\.yaml, names: two classes are named 'cat'"),
        ("train: images/train\nnc: 3\nnames: [cat, dog]", r"data\.yaml: nc must be 2, the number of names"),
        ("val: x\nvalid: y\ntrain: z\nnames: [cat]", r"data\.yaml: both val and valid are val"),
        ("names: [", r"data\.yaml: not YAML \("),
        ("names: " + "[" * 1_000, r"data\.yaml: not YAML \("),
        ("x: " + "9" * 5000, r"data\.yaml: not YAML \("),
        ("- cat", r"data\.yaml: of type list; must have the keys"),
        ("!!python/object/apply:os.system ['false']", r"data\.yaml: not YAML \(could not determine a constructor"),
        (f"{BOMB}train: *i\nnames: *i", r"data\.yaml: the name of class 0 is of type list"),
        (f"{BOMB}path: *i\ntrain: *i\nnames: [x]", r"data\.yaml, train: of type list"),
    ],
)
def test_a_wrong_data_yaml_is_refused(text, message, tmp_path):
    write_yolo(tmp_path)
    write_text(tmp_path / "data.yaml", text)
    with pytest.raises(ValueError, match=message):
        read_yolo(tmp_path)


def test_a_list_that_leaves_the_root_is_refused(tmp_path):
    write_yolo(tmp_path / "data")
    draw_image(tmp_path / "secret.png", (8, 8))
    write_text(tmp_path / "data" / "train.txt", "images/train/a.png\n../secret.png\n")
    write_text(tmp_path / "data" / "data.yaml", "train: train.txt\nnames: [cat, dog]\n")
    with pytest.raises(ValueError, match=r"train\.txt, line 2: .*secret\.png is outside of root="):
        read_yolo(tmp_path / "data")
