import csv
import io
import json

import numpy as np
import pytest
import torch

from tests.helpers import coco_evaluation, coco_metrics, draw_image, write_text
from vpt.data.readers.boxes import read_yolo
from vpt.engine.metrics.detection import DetectionMetrics
from vpt.predictions.boxes import (
    FoundBoxes,
    coco_image_ids,
    file_names,
    match_image_ids,
    to_box_table,
    to_coco,
    to_yolo,
)

CLASSES = ["cat", "guinea pig", "猫, black"]
CATEGORY_IDS = [3, 7, 90]


def found_in(path: str, boxes=(), scores=(), labels=(), size=(480, 640), image_id=None) -> FoundBoxes:
    return FoundBoxes(
        path,
        size,
        image_id,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
        np.array(labels, np.int64),
    )


def random_boxes(num: int, size: tuple[int, int], seed: int) -> np.ndarray:
    chance = np.random.default_rng(seed)
    first, second = chance.uniform(0, size[::-1], (2, num, 2))
    low = np.minimum(np.minimum(first, second), np.array(size[::-1]) - 3)
    return np.concatenate([low, np.maximum(np.maximum(first, second), low + 2)], axis=1).astype(np.float32)


TWO = found_in("a/x.jpg", [[1, 2, 30.5, 40], [0, 0, 640, 480]], [0.9, 0.25], [2, 1])
NONE = found_in("b/y.jpg")


def test_csv_has_a_row_for_each_box_and_none_for_an_image_without():
    found = {picture.path: {"zoo": picture} for picture in (NONE, TWO)}
    rows = list(csv.DictReader(io.StringIO(to_box_table(found, {"zoo": CLASSES}, ".csv").decode())))
    assert [list(row.values()) for row in rows] == [
        ["a/x.jpg", "猫, black", "0.9", "1.0", "2.0", "30.5", "40.0"],
        ["a/x.jpg", "guinea pig", "0.25", "0.0", "0.0", "640.0", "480.0"],
    ]
    assert list(rows[0]) == ["path", "class", "score", "x1", "y1", "x2", "y2"]
    assert to_box_table({}, {"zoo": CLASSES}, ".csv") == b"path,class,score,x1,y1,x2,y2\n"


def test_several_tasks_have_a_column():
    found = {"a/x.jpg": {"zoo": TWO, "house": found_in("a/x.jpg", [[0, 0, 9, 9]], [0.5], [1])}}
    table = to_box_table(found, {"zoo": CLASSES, "house": ["door", "roof"]}, ".csv").decode()
    begins = [",".join(line.split(",")[:2]) for line in table.splitlines()]
    assert begins == ["path,task", "a/x.jpg,zoo", "a/x.jpg,zoo", "a/x.jpg,house"]


@pytest.mark.parametrize("seed", range(3))
def test_a_record_keeps_every_bit(seed):
    boxes = random_boxes(200 * seed, (20_000, 2500), seed)
    scores = np.random.default_rng(seed).random(200 * seed).astype(np.float32) ** 9
    image = found_in("a.jpg", boxes, scores, np.arange(200 * seed) % 3, (20_000, 2500), image_id=seed or None)
    again = FoundBoxes.from_record("a.jpg", json.loads(json.dumps(image.to_record())))
    for name, value in vars(image).items():
        np.testing.assert_array_equal(getattr(again, name), value, strict=isinstance(value, np.ndarray))


def test_scores_keep_their_order_and_their_value():
    scores = np.sort(np.random.default_rng(0).random(500).astype(np.float32))[::-1]
    found = found_in("a.jpg", np.tile([0, 0, 9, 9], (500, 1)), scores, [0] * 500)
    written = [entry["score"] for entry in json.loads(to_coco([found], CATEGORY_IDS, CLASSES))]
    assert np.array_equal(np.array(written, np.float32), scores)
    assert written == sorted(written, reverse=True)


def test_numbers_that_are_not_finite_are_refused_by_json():
    with pytest.raises(ValueError, match="JSON"):
        to_coco([found_in("a.jpg", [[0, 0, np.inf, 1]], [0.5], [0])], CATEGORY_IDS, CLASSES)


@pytest.mark.parametrize(
    ("pictures", "ids"),
    [
        pytest.param([("000139.jpg", 5), ("b.jpg", 9)], [5, 9], id="given"),
        pytest.param([("a/000139.jpg", None), ("a/7.png", None)], [139, 7], id="named by numbers"),
        pytest.param([("a/000139.jpg", None), ("a/x.png", None)], [1, 2], id="not all named by numbers"),
        pytest.param([("a/7.jpg", None), ("b/7.jpg", None)], [1, 2], id="two of the same number"),
        pytest.param([("a/7.jpg", None), ("b/8.jpg", 7)], [7, 8], id="not all given"),
        pytest.param([("²٣.jpg", None), ("8.jpg", None)], [1, 2], id="other digits"),
        pytest.param([], [], id="none"),
    ],
)
def test_images_have_their_own_numbers_or_are_counted_with_a_warning(pictures, ids, capsys):
    found = [found_in(path, [[1, 2, 4, 6]], [0.5], [1], image_id=image_id) for path, image_id in pictures]
    assert coco_image_ids(found) == ids
    assert ("annotations=FILE" in capsys.readouterr().err) == (ids == [1, 2])
    entries = json.loads(to_coco(found, CATEGORY_IDS, CLASSES))
    assert [(entry["image_id"], entry["file_name"]) for entry in entries] == [
        (image_id, path) for image_id, (path, _) in zip(ids, pictures, strict=True)
    ]


@pytest.mark.parametrize(
    ("paths", "ids", "expected"),
    [
        (["zebra.jpg", "ant.jpg"], {"ant.jpg": 3, "cow.jpg": 2, "zebra.jpg": 1}, {"zebra.jpg": 1, "ant.jpg": 3}),
        (["a.jpg"], {"images/a.jpg": 4}, {"a.jpg": 4}),
        (["val/a.jpg", "test/a.jpg"], {"test/a.jpg": 4, "val/a.jpg": 5}, {"val/a.jpg": 5, "test/a.jpg": 4}),
        (["x/val/a.jpg"], {"a.jpg": 4, "val/a.jpg": 5}, {"x/val/a.jpg": 5}),
        (["a.jpg"], {"a.jpg": 4, "val/a.jpg": 5}, {"a.jpg": 4}),
        (["test/a.jpg"], {"/home/data/a.jpg": 4}, {"test/a.jpg": 4}),
        (["a.jpg"], {"A.jpg": 4, "xa.jpg": 5}, {}),
        (["a.jpg"], {"test/a.jpg": 4, "val2/a.jpg": 5}, "may be"),
        (["a.jpg"], {"test/a.jpg": 4, "val1/a.jpg": 5}, "may be"),
        (["c/a.jpg", "b/a.jpg"], {"a.jpg": 4}, "both"),
    ],
)
def test_ids_of_an_annotation_file_are_those_of_the_same_path(paths, ids, expected):
    if isinstance(expected, dict):
        assert match_image_ids(paths, ids) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            match_image_ids(paths, ids)


def test_two_images_of_one_number_are_refused():
    with pytest.raises(ValueError, match="two images have image_id=4"):
        to_coco([found_in("a.jpg", image_id=4), found_in("b.jpg", image_id=4)], CATEGORY_IDS, CLASSES)


def test_coco_results_have_category_ids_and_widths():
    assert json.loads(to_coco([TWO, NONE], CATEGORY_IDS, CLASSES)) == [
        {"image_id": 1, "category_id": 90, "bbox": [1.0, 2.0, 29.5, 38.0], "score": 0.9}
        | {"file_name": "a/x.jpg", "category": "猫, black"},
        {"image_id": 1, "category_id": 7, "bbox": [0.0, 0.0, 640.0, 480.0], "score": 0.25}
        | {"file_name": "a/x.jpg", "category": "guinea pig"},
    ]
    assert json.loads(to_coco([NONE], CATEGORY_IDS, CLASSES)) == []


def test_pycocotools_reads_coco_results_and_measures_the_same(tmp_path):
    chance = np.random.default_rng(3)
    metrics, annotations, found = DetectionMetrics(3), [], []
    ids = [139, 25, 1000]
    for image_id in ids:
        true = random_boxes(6, (480, 640), seed=image_id)
        labels = chance.integers(0, 3, 6)
        boxes = np.concatenate([true + chance.normal(0, 4, true.shape), random_boxes(5, (480, 640), seed=image_id + 1)])
        boxes = np.sort(boxes.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
        names, scores = np.concatenate([labels, chance.integers(0, 3, 5)]), np.sort(chance.random(11))[::-1]
        found.append(found_in(f"{image_id:012d}.jpg", boxes, scores, names))
        annotations += [
            {"id": len(annotations) + i, "image_id": image_id, "category_id": CATEGORY_IDS[label], "iscrowd": 0}
            | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            for i, (label, (x1, y1, x2, y2)) in enumerate(zip(labels, true.astype(float).tolist(), strict=True), 1)
        ]
        detection = {"boxes": found[-1].boxes, "scores": found[-1].scores, "labels": found[-1].labels}
        metrics.update(
            [{name: torch.tensor(values) for name, values in detection.items()}],
            [{"boxes": torch.tensor(true), "labels": torch.tensor(labels)}],
        )
    categories = [{"id": number, "name": name} for number, name in zip(CATEGORY_IDS, CLASSES, strict=True)]
    images = [{"id": image_id, "height": 480, "width": 640} for image_id in ids]
    truth = {"images": images, "categories": categories, "annotations": annotations}
    results = write_text(tmp_path / "results.json", to_coco(found, CATEGORY_IDS, CLASSES))
    expected = coco_metrics(coco_evaluation(truth, str(results)))
    assert 0.05 < expected["map"] < 0.95
    assert metrics.compute() == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_yolo_has_a_line_for_each_box():
    assert to_yolo(NONE) == ""
    first, second = to_yolo(TWO).splitlines()
    assert second == "1 0.50000000 0.50000000 1.00000000 1.00000000 0.25"
    numbers = [float(word) for word in first.split()]
    assert numbers == pytest.approx([2, 15.75 / 640, 21 / 480, 29.5 / 640, 38 / 480, 0.9], abs=1e-8)


@pytest.mark.parametrize("ending", [".txt", ".jpg"])
def test_files_of_images_that_differ_in_folder_or_ending_have_names_of_their_own(ending):
    paths = ["a/x.jpg", "b/x.jpg", "b/x.png", "x.y.jpg", "x.jpg"]
    assert file_names(paths, ending) == [f"{stem}{ending}" for stem in ("a/x", "b/x.jpg", "b/x.png", "x.y", "x")]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["/images/x.jpg"], "must be relative"),
        (["a/../../x.jpg"], "must be relative"),
        (["x.jpg", "x.jpg"], r"x\.jpg: its file x\.jpg\.txt is also that of x\.jpg; rename"),
        (["x.jpg", "x.png", "x.jpg.bmp"], r"x\.jpg\.bmp: its file x\.jpg\.txt is also that of x\.jpg"),
    ],
)
def test_files_that_would_be_written_elsewhere_or_over_each_other_are_refused(paths, message):
    with pytest.raises(ValueError, match=message):
        file_names(paths, ".txt")


def test_yolo_files_without_their_scores_are_read_back_as_the_same_boxes(tmp_path):
    found = []
    write_text(tmp_path / "data.yaml", "train: images\nnames: [a, b, c]\n")
    for i, size in enumerate([(37, 53), (2000, 3001)]):
        boxes = random_boxes(40, size, seed=i)
        found.append(found_in(f"{i}.png", boxes, np.linspace(1, 0, 40), np.arange(40) % 3, size))
        draw_image(tmp_path / "images" / f"{i}.png", size[::-1])
        lines = [line.rsplit(" ", 1)[0] + "\n" for line in to_yolo(found[i]).splitlines()]
        write_text(tmp_path / "labels" / f"{i}.txt", "".join(lines))
    samples = read_yolo(tmp_path, val_fraction=0)["train"]
    assert samples.names == ("images/0.png", "images/1.png")
    for i in range(2):
        assert samples.boxes[i] == pytest.approx(found[i].boxes, abs=1e-3)
        assert samples.labels[i].tolist() == found[i].labels.tolist()
