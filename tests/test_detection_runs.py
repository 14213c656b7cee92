"""A whole run on boxes, from a folder to predictions, in this process."""

import csv
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from pycocotools.coco import COCO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vpt
from tests.helpers import coco_evaluation, coco_metrics, edit_json, metric_lines, train_with, write_text
from vpt import build
from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.validation import to_config
from vpt.evaluate.__main__ import EvaluateOptions, evaluate_run
from vpt.models.vit import fingerprint, load_vit
from vpt.predict.__main__ import PredictOptions, predict_run

SMALL = [
    *("augment=none", "head.channels=32", "head.num_convs=1"),
    *("train.epochs=2", "train.batch_size=4", "train.log_every=1"),
    *("num_workers=0", "prompt.num_tokens=3", "device=cpu"),
]


def train(root, boxes, *overrides):
    return train_with(
        "dataset=boxes", f"dataset.root={boxes}", f"run.root={root}", "run.name=squares", *SMALL, *overrides
    )


def pixels_of(path):
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, boxes):
    """The folder of a run that has learned something."""
    return train(tmp_path_factory.mktemp("runs"), boxes, "train.epochs=30", "optim.head_lr=5e-3")


@pytest.fixture(scope="module")
def result(finished):
    return json.loads((finished / "result.json").read_text())


def test_a_run_detects_boxes_and_saves_the_epoch_that_val_chose(finished, result):
    chosen = [line["val/map"] for line in metric_lines(finished) if "val/map" in line]
    assert result["metrics"]["val"]["map"] == max(chosen) == chosen[result["best_epoch"] - 1]
    assert result["metrics"]["test"]["map50"] > 0.5
    metadata = vpt.read_task(finished / "task.safetensors")
    assert metadata.task_type == "detection"
    assert metadata.classes == ["red box", "blue box"]
    assert metadata.category_ids == [3, 17]
    assert metadata.preprocessing["crop_mode"] == "letterbox"
    assert metadata.metrics["test"]["map"] == result["metrics"]["test"]["map"]


def test_tensorboard_has_the_losses_apart_and_the_images_with_boxes(finished, result):
    events = EventAccumulator(str(finished), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    expected = {"train/loss", "train/class_loss", "train/box_loss", "lr/prompt", "lr/neck", "lr/head"}
    expected |= {"val/map", "val/map50", "val/map75", "val/map_small", "val/ar100", "val/loss_class", "val/loss_box"}
    expected |= {"val_map/red box", "val_map/blue box", "best/val_map", "best/test_map50"}
    expected |= {f"prompt_factor0_{kind}/block_{block:02d}" for kind in ("norm", "grad_norm") for block in range(5)}
    assert expected <= set(tags["scalars"])
    pictures = {"train/augmented", "val/found"}
    figures = "precision_recall", "confusion", "worst"
    pictures |= {f"{split}/{name}" for split in ("val", "test") for name in figures}
    assert set(tags["images"]) == pictures
    assert [event.step for event in events.Images("val/found")] == [4, 24, 48, 72, 96, 120]
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"losses apart" in layout
    total = [event.value for event in events.Scalars("train/loss")]
    parts = [[event.value for event in events.Scalars(f"train/{name}_loss")] for name in ("class", "box")]
    assert np.sum(parts, axis=0) == pytest.approx(total, rel=1e-5)


def test_the_task_file_reproduces_the_test_metrics_and_a_table_of_classes(finished, result, tmp_path, capsys):
    trained = build.load_run(finished, device="cpu")
    assert isinstance(trained.model, vpt.Detector)
    assert trained.model.category_ids == (3, 17)
    assert fingerprint(trained.model.backbone.vit) == fingerprint(load_vit("vit_nano_patch8_64"))
    values = evaluate_run(EvaluateOptions(run=str(finished), device="cpu", batch_size=4))
    saved = {name: np.nan if value is None else value for name, value in result["metrics"]["test"].items()}
    assert values == pytest.approx(saved, nan_ok=True)
    out = capsys.readouterr().out
    assert "map50" in out
    assert "blue box" in out


def test_boxes_are_written_as_csv_coco_and_yolo_in_pixels_of_the_images(finished, boxes, tmp_path):
    options = {"run": str(finished), "input": str(boxes / "test"), "device": "cpu", "batch_size": 2}
    for output in ("found.csv", "found.json", "found"):
        assert predict_run(PredictOptions(**options, output=str(tmp_path / output))) == []
    rows = list(csv.DictReader((tmp_path / "found.csv").read_text().splitlines()))
    results = json.loads((tmp_path / "found.json").read_text())
    yolo = {path.stem: path.read_text().splitlines() for path in (tmp_path / "found").glob("*.txt")}
    assert len(rows) == len(results) == sum(map(len, yolo.values())) > 0
    assert {row["class"] for row in rows} <= {"red box", "blue box"}
    assert {row["category_id"] for row in results} <= {3, 17}
    assert {row["file_name"] for row in results} <= {f"{i}.png" for i in range(1, 6)}
    truth = COCO(str(boxes / "test" / "_annotations.coco.json"))
    num_hit = 0
    for row in rows:
        corners = np.array([float(row[key]) for key in ("x1", "y1", "x2", "y2")])
        height, width, _ = pixels_of(row["path"]).shape
        assert (corners >= 0).all()
        assert (corners <= [width, height, width, height]).all()
        for annotation in truth.imgToAnns[100 + int(Path(row["path"]).stem)]:
            x, y, width, height = annotation["bbox"]
            num_hit += np.abs(corners - [x, y, x + width, y + height]).max() < 10
    assert num_hit >= 4


def test_coco_results_with_the_ids_of_an_annotation_file_can_be_measured_against_it(finished, boxes, tmp_path, capsys):
    truth = json.loads((boxes / "test" / "_annotations.coco.json").read_text())
    for i, entry in enumerate(truth["images"]):
        entry["id"] = 50 - i
    for entry in truth["annotations"]:
        entry["image_id"] = 151 - entry["image_id"]
        entry["category_id"] += 5
    truth["categories"] = [entry | {"id": entry["id"] + 5} for entry in truth["categories"]]
    truth["images"].pop()
    file = write_text(tmp_path / "truth.json", json.dumps(truth))
    options = {"run": str(finished), "input": str(boxes / "test"), "device": "cpu", "annotations": str(file)}
    predict_run(PredictOptions(**options, output=str(tmp_path / "found.json")))
    assert "5.png; their boxes are left out" in capsys.readouterr().err
    results = json.loads((tmp_path / "found.json").read_text())
    assert {(row["image_id"], row["file_name"]) for row in results} == {(51 - i, f"{i}.png") for i in range(1, 5)}
    truth["annotations"] = [row for row in truth["annotations"] if row["image_id"] > 46]
    assert coco_metrics(coco_evaluation(truth, results))["map50"] > 0.5


@pytest.mark.parametrize(
    ("content", "output", "message"),
    [
        ({}, "f.csv", "is for COCO results"),
        ({"categories": []}, "f.json", "no category 'red box'"),
        ({"images": []}, "f.json", "has 5 of the 5 images not"),
        ({"images": 3}, "f.json", "'images' is of type int"),
    ],
)
def test_annotations_that_do_not_fit_are_refused_before_the_prediction(
    finished, boxes, tmp_path, content, output, message
):
    truth = json.loads((boxes / "test" / "_annotations.coco.json").read_text()) | content
    file = write_text(tmp_path / "truth.json", json.dumps(truth))
    options = {"run": str(finished), "input": str(boxes / "test"), "device": "cpu", "annotations": str(file)}
    with pytest.raises(ConfigError, match=message):
        predict_run(PredictOptions(**options, output=str(tmp_path / output)))


def test_options_choose_boxes_and_images_are_drawn(finished, boxes, tmp_path):
    options = {"run": str(finished), "input": str(boxes / "test"), "device": "cpu"}

    def found(**more):
        predict_run(PredictOptions(**options, output=str(tmp_path / "f.csv"), **more))
        return list(csv.DictReader((tmp_path / "f.csv").read_text().splitlines()))

    many = found(min_score=0.06, drawings=str(tmp_path / "drawn"))
    assert all(float(row["score"]) > 0.06 for row in many)
    assert len(found(min_score=0.3)) < len(many)
    assert {row["class"] for row in found(min_score=0.06, classes="blue box")} == {"blue box"}
    one_each = found(min_score=0.06, max_detections=1)
    assert len({row["path"] for row in one_each}) == len(one_each)
    assert len(found(min_score=0.06, max_overlap=0.05)) < len(many)
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in drawn] == [f"{i}.jpg" for i in range(1, 6)]
    before, after = (pixels_of(path) for path in (boxes / "test" / "1.png", drawn[0]))
    assert before.shape == after.shape
    assert np.abs(before - after).max() > 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 3}, "top_k: is not for a detection task"),
        ({"classes": "red bx"}, "no class red bx; did you mean red box"),
        ({"output": "found.txt"}, r"output=found\.txt: must end in"),
    ],
)
def test_wrong_options_of_predict_are_refused_by_name(finished, boxes, tmp_path, changes, message):
    right = {"run": str(finished), "input": str(boxes / "test"), "output": str(tmp_path / "p.csv"), "device": "cpu"}
    with pytest.raises(ConfigError, match=message):
        predict_run(PredictOptions(**{**right, **changes}))
    assert list(tmp_path.iterdir()) == []


def test_options_of_boxes_are_refused_for_classes(tmp_path, photos):
    options = "dataset=folder", f"dataset.root={photos}", f"run.root={tmp_path}", "run.name=a", "mode=dry"
    run_dir = train_with(*options, *SMALL[3:])
    with pytest.raises(ConfigError, match="min_score: is not for a classification task"):
        predict_run(PredictOptions(str(photos), str(tmp_path / "p.csv"), run=str(run_dir), min_score=0.5))


@pytest.mark.parametrize(
    "overrides",
    [
        ["tuning=linear"],
        pytest.param(["prompt=shallow", "augment=aerial"], marks=pytest.mark.slow),
        pytest.param(["prompt=none", "head.out_indices=last", "augment=standard"], marks=pytest.mark.slow),
        ["prompt.blocks=last:2", "prompt.dropout=0.1", "augment=boxes", "head.strides=[4,8,16,32]"],
        pytest.param(["tuning=bias", "train.ema=0.9", "train.accumulation=2"], marks=pytest.mark.slow),
        ["tuning=partial", "optim=vpt_paper", "train.precision=bf16"],
        pytest.param(["tuning=full", "head.out_indices=[1,4]", "backbone.img_size=96"], marks=pytest.mark.slow),
        pytest.param(["head=retinanet", "head.channels=32", "num_workers=1"], marks=pytest.mark.slow),
        pytest.param(["head=fasterrcnn", "head.channels=32", "cache=off"], marks=pytest.mark.slow),
        pytest.param(["backbone.dtype=bf16", "grad_checkpointing=true"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_every_choice_trains_and_its_task_can_be_used(tmp_path, boxes, overrides):
    run_dir = train(tmp_path, boxes, "mode=dry", *overrides)
    trains_backbone = overrides[0] in ("tuning=bias", "tuning=partial", "tuning=full")
    assert ("lr/backbone" in metric_lines(run_dir)[0]) == trains_backbone
    trained = build.load_run(run_dir)
    found = trained.model(torch.zeros(1, 3, *trained.preprocessing.size))
    assert sorted(found[0]) == ["boxes", "labels", "scores"]
    assert evaluate_run(EvaluateOptions(str(run_dir), device="cpu"))["map"] >= 0


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_with_and_without_workers_and_cache(tmp_path, boxes):
    one = train(tmp_path / "a", boxes, "augment=boxes")
    two = train(tmp_path / "b", boxes, "augment=boxes", "num_workers=2", "cache=off")
    assert (one / "task.safetensors").read_bytes() == (two / "task.safetensors").read_bytes()
    three = train(tmp_path / "c", boxes, "augment=boxes", "seed=1")
    assert (one / "task.safetensors").read_bytes() != (three / "task.safetensors").read_bytes()


def test_overfit_finds_the_boxes_of_one_batch(tmp_path, boxes, capsys):
    assert train(tmp_path, boxes, "mode=overfit", "optim.head_lr=5e-3", "train.batch_size=2") is None
    assert "learned 2 images in" in capsys.readouterr().out


@pytest.fixture
def copy(tmp_path, boxes):
    """A copy of the folder with boxes, which a test may change."""
    return shutil.copytree(boxes, tmp_path / "boxes")


@pytest.mark.slow
def test_the_summary_describes_what_trains_and_the_checks_of_the_boxes(tmp_path, copy, capsys):
    def change(content):
        content["annotations"][0]["bbox"] = [5, 5, 0.2, 30]
        content["annotations"][1]["iscrowd"] = 1

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    with Image.open(copy / "train" / "2.png") as image:
        image.save(copy / "train" / "2.png", exif=exif)
    edit_json(copy / "train" / "_annotations.coco.json", change)
    train(tmp_path / "runs", copy, "mode=dry")
    out = capsys.readouterr().out
    assert "data       boxes: 2 classes; images (boxes): train 16 (23), val 4 (6), test 5 (8)\n" in out
    assert "boxes with a side below 1 px: 1, dropped; first " in out
    assert "boxes of crowds or difficult objects: 1, ignored" in out
    assert "(set exif_boxes): 1, boxes taken as for the upright image; first " in out
    assert "prompt 2,925 + neck " in out
    train(tmp_path / "runs", copy, "mode=dry", "dataset.exif_boxes=stored")
    assert "images stored turned or mirrored, with their boxes: 1, turned upright; first " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"_annotations\.coco\.json.*boxes with a side below 1 px \(1\)"):
        train(tmp_path / "runs", copy, "mode=dry", "dataset.strict=true")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset=boxes", "dataset.root=a", "head=pyramid"], "head=pyramid is for segmentation, and dataset=boxes"),
        (["head=dense"], "head=dense is for detection, and dataset=fruit is for classification"),
        (["dataset=boxes"], r"dataset\.root is needed"),
        (["dataset=trees", "train.label_smoothing=0.1"], r"train\.label_smoothing=0\.1 is for classification"),
        (["dataset=trees", "dataset.num_per_class=3"], r"dataset\.num_per_class=3 is for classification"),
        (["dataset=trees", "augment=vtab"], r"augment\.crop_mode=squash is for classification"),
        (["head.channels=64"], r"head\.channels=64 is for detection and segmentation, and dataset=fruit"),
        (["dataset.strict=true"], r"dataset\.strict=True is for detection"),
    ],
)
def test_heads_and_data_of_different_task_types_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        to_config(compose_config(overrides))


def test_val_without_boxes_is_refused_since_it_cannot_choose(tmp_path, copy):
    edit_json(copy / "val" / "_annotations.coco.json", lambda content: content.update(annotations=[]))
    with pytest.raises(ValueError, match="val has no box"):
        train(tmp_path / "runs", copy)


def test_files_of_other_names_are_named_by_split(tmp_path, copy):
    for split in ("train", "val"):
        (copy / split / "_annotations.coco.json").rename(copy / split / "mine.json")
    shutil.rmtree(copy / "test")
    run_dir = train(
        tmp_path / "runs", copy, "mode=dry", "dataset.annotations={train:train/mine.json,val:val/mine.json}"
    )
    assert set(json.loads((run_dir / "result.json").read_text())["metrics"]) == {"val"}


@pytest.mark.slow
def test_a_compiled_model_is_trained_with_the_same_result(tmp_path, boxes, monkeypatch):
    plain = train(tmp_path, boxes)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # all but the code itself
    compiled = train(tmp_path, boxes, "compile=true")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    one, two = (json.loads((path / "result.json").read_text())["metrics"]["val"]["loss"] for path in (plain, compiled))
    assert two == pytest.approx(one, rel=1e-3)
