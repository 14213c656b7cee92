import json
from pathlib import Path

import pytest

from tests.helpers import TRUTH, coco_content, draw_image, edit_json, write_coco, write_roboflow, write_text
from vpt.data.readers.box_checks import DataReport, Finding
from vpt.data.readers.coco import read_coco


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
        (lambda c: c["images"].append(3), r"images\[3\]: of type int; must be an object with the key 'id'"),
        (lambda c: c["images"][1].pop("file_name"), r"images\[1\]: no key 'file_name'"),
        (lambda c: c["images"][1].update(id="7"), r"images\[1\]: 'id' is of type str; must be int"),
        (lambda c: c["images"][1].update(id=100), r"images\[1\]: id 100 is not unique"),
        (lambda c: c["images"][1].update(file_name="../../x.png"), r"images\[1\]: .*x\.png is outside of"),
        (lambda c: c["images"][1].update(file_name="/etc/hostname"), r"images\[1\]: /etc/hostname is outside of"),
        (lambda c: c["annotations"][2].pop("bbox"), r"annotations\[2\]: no key 'bbox'"),
        (lambda c: c["annotations"][2].pop("image_id"), r"annotations\[2\]: no key 'image_id'"),
        (lambda c: c["annotations"][2].update(category_id=None), r"annotations\[2\]: 'category_id' is of type None"),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, 3]), r"annotations\[2\]: 'bbox' is \[1, 2, 3\]; must be"),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, 3, "4"]), r"annotations\[2\]: 'bbox' is .*; must be four"),
        (lambda c: c["categories"][0].update(id=3), r"categories\[1\]: id 3 is not unique"),
        (lambda c: c["categories"][0].update(name="cat"), r"categories: two classes are named 'cat'"),
        (lambda c: c["categories"][0].update(name=None), r"categories\[0\]: 'name' is of type NoneType; must be str"),
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
