import json
from pathlib import Path

import pytest

from tests.helpers import TRUTH, coco_content, draw_image, edit_json, write_coco, write_roboflow, write_text
from vpt.data.readers.box_checks import DataReport, Finding
from vpt.data.readers.boxes import find_formats
from vpt.data.readers.coco import read_coco
from vpt.data.samples import DetectionSamples


def test_files_given_by_split_are_read_and_images_found_below_the_root(tmp_path):
    for split in ("train", "val"):
        write_text(tmp_path / "ann" / f"{split}.json", json.dumps(coco_content(TRUTH[split])))
        for name, (size, _) in TRUTH[split].items():
            draw_image(tmp_path / "images" / split / name, size)
    splits = read_coco(tmp_path, {"train": "ann/train.json", "val": tmp_path / "ann" / "val.json"})
    assert {split: samples.names for split, samples in splits.items()} == {
        "train": ("images/train/a.png", "images/train/b.png", "images/train/c.png"),
        "val": ("images/val/d.png",),
    }


@pytest.mark.parametrize("folder", ["annotations", "train", "images/train2017", "images", "."])
def test_images_are_found_in_the_usual_places(folder, tmp_path):
    write_coco(tmp_path, {"train": TRUTH["train"]})
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for path in (tmp_path / "train2017").iterdir():
        path.rename(tmp_path / folder / path.name)
    train = read_coco(tmp_path, val_fraction=0, strict=True)["train"]
    assert train.names[0] == (Path(folder) / "a.png").as_posix()


def test_a_file_name_with_folders_even_of_windows_is_found(tmp_path):
    draw_image(tmp_path / "photos" / "x" / "a.png", (64, 32))
    write_text(tmp_path / "train.json", json.dumps(coco_content({"photos\\x\\a.png": TRUTH["train"]["a.png"]})))
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
        (lambda c: c.update(annotations={}), r"'annotations' is of type dict; must be list"),
        (lambda c: c["images"].append(3), r"images\[3\]: of type int; must be an object"),
        (lambda c: c["images"][1].pop("file_name"), r"images\[1\]: no key 'file_name'"),
        (lambda c: c["images"][1].update(id=None), r"images\[1\]: 'id' is missing or no whole number"),
        (lambda c: c["images"][1].update(id=100), r"images\[1\]: id 100 is not unique"),
        (lambda c: c["categories"][0].update(id=3), r"categories\[1\]: id 3 is not unique"),
        (lambda c: c["categories"][0].update(name="cat"), r"categories: two classes are named 'cat'"),
        (lambda c: c["categories"][0].update(name=None), r"categories\[0\]: 'name' is missing"),
        (lambda c: c["categories"][0].update(id="x"), r"categories\[0\]: 'id' is missing or no whole number"),
    ],
)
def test_wrong_json_is_refused_by_file_and_key(change, message, tmp_path):
    write_coco(tmp_path)
    edit_json(tmp_path / "annotations" / "instances_train2017.json", change)
    with pytest.raises(ValueError, match=message):
        read_coco(tmp_path)


def edited(root: Path, change) -> tuple[DetectionSamples, DataReport]:
    """Train of `TRUTH` with a change of its JSON."""
    write_coco(root, {"train": TRUTH["train"]})
    edit_json(root / "annotations" / "instances_train2017.json", change)
    report = DataReport()
    return read_coco(root, val_fraction=0, report=report)["train"], report


LAST = [[[0, 0, 64, 32], [8, 4, 24, 28]], [[1, 2, 3, 4]], []]


@pytest.mark.parametrize(
    ("change", "finding", "last"),
    [
        *(({"bbox": bbox}, Finding.INVALID, None) for bbox in ([], None, [1, 2, 3], [1, 2, None, 4], "1 2 3 4", {}, 7)),
        ({"bbox": [1, 2, "x", 4]}, Finding.INVALID, None),
        *(({"category_id": value}, Finding.INVALID, None) for value in (None, 1.5, True, [17])),
        ({"category_id": "bird"}, Finding.UNKNOWN, None),
        *(({"category_id": value}, Finding.CONVERTED, [1, 2, 3, 4]) for value in (17.0, "17", "dog")),
        ({"bbox": ["1", "2.0", 2, 2]}, Finding.CONVERTED, [1, 2, 3, 4]),
        ({"bbox": [1, 2, True, 4]}, Finding.INVALID, None),
        *(({"image_id": value}, Finding.STRAY, None) for value in (None, 999, "b", [101])),
        *(({"image_id": value}, None, [1, 2, 3, 4]) for value in (101.0, "101")),
        ({"bbox": None, "segmentation": [[1, 2, 3, 2, 3, 4]]}, Finding.POLYGON, [1, 2, 3, 4]),
        ({"bbox": [], "segmentation": [[1, 2, 2, 3], [2, 2, 3, 4]]}, Finding.POLYGON, [1, 2, 3, 4]),
        *(
            ({"bbox": [], "segmentation": value}, Finding.INVALID, None)
            for value in ([[1, 2]], [[]], {"counts": "x"}, 3)
        ),
        ({"iscrowd": None}, None, [1, 2, 3, 4]),
        *(({"iscrowd": value}, Finding.CROWD, [1, 2, 3, 4]) for value in (1, 1.0, True, "1")),
    ],
)
def test_a_wrong_annotation_is_repaired_or_dropped_and_counted(change, finding, last, tmp_path):
    train, report = edited(tmp_path, lambda content: content["annotations"][2].update(change))
    assert [boxes.tolist() for boxes in train.boxes] == [*LAST[:1], [last] if last else [], []]
    report.counts.pop(Finding.BACKGROUND)
    assert report.counts == ({finding: 1} if finding else {})
    assert finding is None or "annotations[2]" in report.first[finding]


def test_an_annotation_that_is_no_object_is_left_out(tmp_path):
    train, report = edited(tmp_path, lambda content: content["annotations"].append(3))
    assert [boxes.tolist() for boxes in train.boxes] == LAST
    assert report.counts == {Finding.STRAY: 1, Finding.BACKGROUND: 1}


@pytest.mark.parametrize("form", [str, float, lambda number: f"photo {number}"])
def test_ids_of_other_types_are_converted_and_counted(form, tmp_path):
    def change(content):
        for entry in content["images"]:
            entry["id"] = form(entry["id"])
        for entry in content["annotations"]:
            entry["image_id"] = form(entry["image_id"])

    train, report = edited(tmp_path, change)
    assert [boxes.tolist() for boxes in train.boxes] == LAST
    assert train.image_ids == ((100, 101, 102) if form in (str, float) else (1, 2, 3))
    assert report.counts[Finding.CONVERTED] == 3


@pytest.mark.parametrize("new_id", [100, 999])
def test_an_image_listed_twice_has_the_boxes_of_both_entries(new_id, tmp_path):
    def change(content):
        content["images"].append(content["images"][0] | {"id": new_id})
        content["annotations"].append(content["annotations"][0] | {"image_id": new_id, "bbox": [2, 2, 5, 5]})

    train, report = edited(tmp_path, change)
    assert [boxes.tolist() for boxes in train.boxes] == [[*LAST[0], [2, 2, 7, 7]], *LAST[1:]]
    assert report.counts == {Finding.REPEATED: 1, Finding.BACKGROUND: 1}


@pytest.mark.parametrize("folder", ["/home/somebody/data/train2017/", "C:\\data\\", "../upload/1/", "mine/train2017/"])
def test_images_with_a_path_of_another_machine_are_found_by_its_end_and_counted(folder, tmp_path):
    def change(content):
        for entry in content["images"]:
            entry["file_name"] = folder + entry["file_name"]

    train, report = edited(tmp_path, change)
    assert train.names == ("train2017/a.png", "train2017/b.png", "train2017/c.png")
    assert report.counts == {Finding.MOVED: 3, Finding.BACKGROUND: 1}


def test_images_beside_the_listed_ones_are_counted(tmp_path):
    for name in ("train2017/z.png", "train2017/deep/z.png", "train2017/.hidden.png", "other/z.png", "z.png"):
        draw_image(tmp_path / name, (8, 8))
    _, report = edited(tmp_path, lambda content: content["images"].pop())
    assert report.counts == {Finding.UNNAMED: 3}
    assert report.first[Finding.UNNAMED].endswith("train2017/c.png")


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["annotations/instances_default.json"], ["train"]),
        (["annotations/instances_Train.json", "annotations/instances_Validation.json"], ["train", "val"]),
        (["result.json"], ["train"]),
        (["labels.json"], ["train"]),
        (["annotations.json"], ["train"]),
        (["train.json", "val.json", "notes.json"], ["train", "val"]),
        (["annotations/train.json", "annotations/test_coco.json"], ["train", "test"]),
        (["train/annotations.json", "valid/annotations.json"], ["train", "val"]),
        (["annotations/instances_train2017.json", "annotations/instances_mini.json", "other.json"], ["train"]),
    ],
)
def test_files_of_other_names_and_places_are_found(files, splits, tmp_path):
    for split, file in zip([*splits, None, None], files, strict=False):
        write_text(tmp_path / file, json.dumps(coco_content(TRUTH[split])) if split else "{}")
        for name, (size, _) in TRUTH[split].items() if split else ():
            draw_image(tmp_path / ("images" if "/" in file else "data") / name, size)
    assert find_formats(tmp_path) == ["coco"]
    found = read_coco(tmp_path, val_fraction=0, strict=True)
    assert {split: len(samples) for split, samples in found.items()} == {split: len(TRUTH[split]) for split in splits}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"train\.json: not JSON \("),
        (b"[" * 100_000, r"train\.json: not JSON \("),
        (b"[" + b"9" * 5000 + b"]", r"train\.json: not JSON \("),
        (b"[]", r"train\.json: of type list; must be an object with the key 'images'"),
        (b"\xff\xfe", r"train\.json: not UTF-8 text"),
    ],
)
def test_what_is_no_json_is_refused_by_name(content, message, tmp_path):
    (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_coco(tmp_path, {"train": "train.json"})


def test_a_missing_file_an_unknown_split_and_two_files_of_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train\.json: no such file"):
        read_coco(tmp_path, {"train": "train.json"})
    with pytest.raises(ValueError, match=r"annotations: unknown key 'dev'; allowed: train, val, test"):
        read_coco(tmp_path, {"train": "train.json", "dev": "val.json"})
    write_coco(tmp_path)
    write_text(tmp_path / "annotations" / "instances_train2014.json", "{}")
    with pytest.raises(ValueError, match=r"both train and train are train"):
        read_coco(tmp_path)


@pytest.mark.parametrize(
    "name", ["x" * 5000, "a\0b", "", ".", "..\\", "\ud800", "/etc/hostname", "../../x.png", "/x" * 3000]
)
def test_a_name_that_no_image_of_the_root_can_have_is_counted(name, tmp_path):
    train, report = edited(tmp_path, lambda content: content["images"][1].update(file_name=name))
    assert train.names == ("train2017/a.png", "train2017/c.png")
    assert report.counts[Finding.MISSING] == 1
    assert report.left_out[0][1].startswith(f"{tmp_path}/annotations/instances_train2017.json, images[1]: {tmp_path}")
