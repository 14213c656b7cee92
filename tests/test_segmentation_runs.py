"""A run of segmentation, from training to written masks."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.mask import decode

from tests.helpers import exit_code_of, write_text
from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.validation import to_config
from vpt.data.readers.masks import pebbles_root
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.doctor import __main__ as doctor
from vpt.engine.metrics.segmentation import confusion_of, intersection_over_union
from vpt.evaluate.__main__ import EvaluateOptions, evaluate_run
from vpt.models.task_file import load_task, read_task
from vpt.predict.__main__ import PredictOptions, predict_run
from vpt.task_types.base import AnswerLimits, task_type_of
from vpt.task_types.mask_findings import class_weights
from vpt.task_types.segmentation import Segmentation
from vpt.train.training import run

IMAGES = pebbles_root() / "test" / "images"
RECIPE = [
    "+experiment=segment_quickstart",
    "backbone.img_size=64",
    "train.epochs=2",
    "num_workers=0",
    "prompt.num_tokens=2",
]


def config_of(root, *overrides):
    return to_config(compose_config([*RECIPE, f"run.root={root}", *overrides]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(config_of(tmp_path_factory.mktemp("runs"), "train.class_weights=balanced", "train.dice=0.5"))


def test_a_run_learns_and_its_result_has_the_metrics_of_masks(trained):
    result = json.loads((trained / "result.json").read_text())["metrics"]
    assert result["val"].keys() == {"loss", "miou", "pixel_accuracy", "mean_accuracy", "dice"}
    assert result["val"]["miou"] > 0.4  # one class everywhere: 0.30


def test_evaluation_gives_the_result_of_the_run_and_the_table_of_classes(trained, capsys):
    result = json.loads((trained / "result.json").read_text())["metrics"]
    assert evaluate_run(EvaluateOptions(str(trained), "test")) == pytest.approx(result["test"], rel=1e-4)
    assert "stone" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_killed_in_an_epoch_resumes_to_the_same_bytes(trained, tmp_path):
    words = ["train.class_weights=balanced", "train.dice=0.5", "run.name=a"]
    first = run(config_of(tmp_path, *words))
    assert (first / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()
    (first / "result.json").unlink()
    again = run(config_of(tmp_path, *words))
    assert (again / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()


def test_predicted_pngs_score_as_the_evaluation_does(trained, tmp_path):
    output = tmp_path / "found"
    assert not predict_run(PredictOptions(str(IMAGES), str(output), run=str(trained), drawings=str(tmp_path / "drawn")))
    total = np.zeros((2, 2), np.int64)
    for path in sorted(output.glob("*.png")):
        mask = Image.open(path)
        assert mask.mode == "P"
        truth = np.asarray(Image.open(pebbles_root() / "test" / "masks" / path.name)).astype(int)
        total += confusion_of(np.where(truth == 255, -1, truth), np.asarray(mask).astype(int), 2)
    expected = json.loads((trained / "result.json").read_text())["metrics"]["test"]["miou"]
    assert intersection_over_union(total).mean() == pytest.approx(expected, rel=1e-3)
    assert len(list((tmp_path / "drawn").glob("*.jpg"))) == 32


@pytest.mark.filterwarnings("ignore:__array__")  # of pycocotools, while it decodes
def test_tables_and_coco_results_tell_the_same_areas(trained, tmp_path):
    table, coco = tmp_path / "found.csv", tmp_path / "found.json"
    for output in (table, coco):
        assert not predict_run(PredictOptions(str(IMAGES), str(output), run=str(trained)))
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert sum(int(row["pixels"]) for row in rows) == 32 * 128 * 128
    areas = {(row["image"], row["class"]): int(row["pixels"]) for row in rows}
    for found in json.loads(coco.read_text()):
        rle = {**found["segmentation"], "counts": found["segmentation"]["counts"].encode()}
        name = ("ground", "stone")[found["category_id"]]
        assert decode(rle).sum() == areas[found["file_name"], name]


def test_coco_results_take_the_ids_of_an_annotation_file_and_warn_without_one(trained, tmp_path, capsys):
    names = sorted(path.name for path in IMAGES.iterdir())
    images = [{"id": 100 + number, "file_name": name, "width": 128, "height": 128} for number, name in enumerate(names)]
    categories = [{"id": 7, "name": "stone"}, {"id": 8, "name": "ground"}]
    truth = write_text(
        tmp_path / "truth.json", json.dumps({"images": images[1:], "annotations": [], "categories": categories})
    )
    output = tmp_path / "found.json"
    predict_run(PredictOptions(str(IMAGES), str(output), run=str(trained)))
    assert "image_id" in capsys.readouterr().err
    predict_run(PredictOptions(str(IMAGES), str(output), run=str(trained), annotations=str(truth)))
    assert f"{names[0]}; their masks are left out" in capsys.readouterr().err
    found = json.loads(output.read_text())
    assert {(row["image_id"], row["file_name"]) for row in found} == {
        (image["id"], image["file_name"]) for image in images[1:]
    }
    assert {row["category_id"] for row in found} <= {7, 8}


def test_a_server_answers_with_the_share_of_each_class(trained):
    file = trained / "task.safetensors"
    metadata, model = read_task(file), load_task(file, "vit_nano_patch8_64")
    with torch.inference_mode():
        (logits,) = model(torch.zeros(1, 3, 64, 64))
    answer = Segmentation.to_answer(metadata, logits, (30, 50), AnswerLimits())
    assert sum(one["share"] for one in answer["predictions"]) == pytest.approx(1)
    with pytest.raises(ArithmeticError):
        Segmentation.to_answer(metadata, logits * torch.nan, (30, 50), AnswerLimits())
    assert Preprocessing.from_dict(metadata.preprocessing).crop_mode == "letterbox"


def test_the_doctor_tells_the_ceiling_of_the_grid(monkeypatch, capsys):
    assert exit_code_of(doctor, monkeypatch, *RECIPE) == 0
    assert "ceiling" in capsys.readouterr().out


def test_class_weights_have_a_mean_of_1_over_pixels_and_bounds():
    shares = np.array([0.9, 0.0999, 0.0001, 0.0])
    weights = class_weights(shares)
    assert (weights * shares).sum() == pytest.approx(1)
    assert weights[3] == 0
    assert weights[2] / weights[0] <= 100


@pytest.mark.parametrize(
    ("override", "word"),
    [("head=dense", "dense"), ("head.name=retinanet", "linear"), ("train.label_smoothing=0.1", "label_smoothing")],
)
def test_keys_of_other_types_of_task_are_refused(tmp_path, override, word):
    with pytest.raises(ConfigError, match=word):
        task_type_of(config_of(tmp_path, override))
