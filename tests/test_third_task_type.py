"""A type of task that the package does not have, registered from here, goes through every command without a change."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typing_extensions import TypedDict

import vpt
from tests.helpers import exit_code_of, make_tiny_vit
from vpt.compare import __main__ as compare
from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.validation import to_config
from vpt.data.samples import FileReader, SampleDataset, Samples
from vpt.data.transforms.images import EvalTransform, TrainTransform
from vpt.doctor import __main__ as doctor
from vpt.evaluate.__main__ import EvaluateOptions, evaluate_run
from vpt.models.task_model import TaskModel, register_model
from vpt.models.task_schema import TaskMetadata
from vpt.predict.__main__ import PredictOptions, predict_run
from vpt.storage.files import write_json
from vpt.task_types.base import TaskType, register_task_type, task_type_of
from vpt.task_types.writer import PredictionWriter
from vpt.tasks import __main__ as tasks
from vpt.train import __main__ as train
from vpt.train.training import run

CLOSE = 0.1
RECIPE = ["run.name=gray", "prompt.num_tokens=2", "train.epochs=12", "train.batch_size=8", "optim.head_lr=0.02"]
CONFIG = """# @package dataset
reader: gray
task: brightness
title: gray
"""


@register_model
class BrightnessModel(TaskModel):
    """Images (B, 3, H, W) -> brightness in [0, 1], (B,)."""

    task_type = "brightness"

    def __init__(self, backbone, num_classes=1, *, classes=None):
        super().__init__(backbone, num_classes, classes=classes)
        self.head = nn.Linear(backbone.embed_dim, 1)

    @property
    def num_classes(self):
        return 1

    def forward(self, images):
        return self.forward_head(self.backbone(images))

    def forward_head(self, features, sizes=None):
        return self.head(features)[:, 0].sigmoid()

    def forward_tensors(self, features, size):
        return {"brightness": self.forward_head(features)}


@dataclass(frozen=True, kw_only=True)
class GraySamples(Samples):
    PER_IMAGE = (*Samples.PER_IMAGE, "targets")

    targets: tuple[float, ...]

    @property
    def strata(self):
        return [0] * len(self)

    def labels_of(self, index):
        return np.zeros(1, np.int64)

    def class_counts(self):
        return np.array([len(self)])

    def label_text(self, index):
        return f"{self.targets[index]:.3f}"

    def label_bytes(self) -> Iterator[bytes]:
        return (str(target).encode() for target in self.targets)


class GrayDataset(SampleDataset[GraySamples]):
    def make_item(self, image, index, seed):
        return self.transform(image, seed), torch.tensor(self.samples.targets[index])


class Errors:
    """The share of images whose brightness is close, and the mean squared error."""

    def reset(self):
        self.errors = []

    def update(self, model, images, targets):
        self.errors.append((model(images) - targets).float().cpu())

    def compute(self):
        errors = torch.cat(self.errors)
        return {"loss": float(errors.square().mean()), "close": float((errors.abs() < CLOSE).float().mean())}


class JSONWriter(PredictionWriter):
    endings = (".json",)

    def __init__(self, tasks, origin, options, root, paths):
        super().__init__(tasks, origin, options, root, paths)
        self.check_output(paths)

    def predict(self, images, outputs):
        return [{task: float(outputs[task][row]) for task in self.tasks} for row, _ in enumerate(images)]

    def write(self, predictions):
        write_json(self.output, {path.name: found for path, found in predictions.items()})
        return str(self.output)


class Answer(TypedDict):
    task_type: Literal["brightness"]
    brightness: float


@register_task_type
class Brightness(TaskType):
    name = "brightness"
    main_metric = "close"
    overfit_goal = 0.75
    readers = ("gray",)
    dataset = GrayDataset
    writer = JSONWriter
    answer = Answer
    pipeline_tag = "image-classification"
    usage = "print({repo_id}, {backbone})"

    def read_all(self):
        paths = sorted(Path(self.config.dataset.root).glob("*.png"))
        parts = {"train": paths[::2], "val": paths[1::4], "test": paths[3::4]}
        return {
            split: GraySamples(
                classes=("brightness",),
                names=tuple(path.name for path in of),
                reader=FileReader(tuple(of)),
                paths=tuple(of),
                targets=tuple(float(path.stem) for path in of),
            )
            for split, of in parts.items()
        }

    def transforms(self, preprocessing):
        return TrainTransform(preprocessing, []), EvalTransform(preprocessing)

    def losses(self, data):
        return lambda model, images, targets: {"brightness": (model(images) - targets).square().mean()}

    def evaluator(self, data, split):
        return Errors()

    @classmethod
    def to_answer(cls, metadata: TaskMetadata, output, size, limits):
        return {"task_type": cls.name, "brightness": float(output)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gray images that are named by their brightness, and a config group of their data set."""
    folder = tmp_path_factory.mktemp("gray")
    (folder / "images").mkdir()
    (folder / "conf" / "dataset").mkdir(parents=True)
    (folder / "conf" / "dataset" / "gray.yaml").write_text(CONFIG)
    for number in range(64):
        Image.new("RGB", (64, 64), (4 * number,) * 3).save(folder / "images" / f"{4 * number / 255:.5f}.png")
    return folder


def config_of(folder, *overrides):
    words = ["dataset=gray", f"dataset.root={folder}/images", "backbone=vit_nano", f"run.root={folder}/runs"]
    return to_config(compose_config([*words, "num_workers=0", *overrides], folder / "conf"))


@pytest.fixture(scope="module")
def trained(folder):
    return run(config_of(folder, *RECIPE))


def test_a_third_type_of_task_is_trained_resumed_and_evaluated(folder, trained, capsys):
    result = json.loads((trained / "result.json").read_text())["metrics"]
    assert result["val"]["close"] > 0.7
    assert result["test"].keys() == {"loss", "close"}
    (trained / "result.json").unlink()  # as if the process had been killed at the end
    run(config_of(folder, *RECIPE))
    assert json.loads((trained / "result.json").read_text())["metrics"] == result
    assert evaluate_run(EvaluateOptions(str(trained), "test")) == pytest.approx(result["test"], rel=1e-4)
    assert "close" in capsys.readouterr().out


def test_its_task_file_predicts_and_shares_a_bank_with_other_types(folder, trained):
    file = trained / "task.safetensors"
    output = folder / "found.json"
    assert not predict_run(PredictOptions(str(folder / "images"), str(output), task=str(file)))
    found = json.loads(output.read_text())
    errors = [abs(values["gray"] - float(name.removesuffix(".png"))) for name, values in found.items()]
    assert np.mean(np.array(errors) < CLOSE) > 0.7

    model = vpt.load_task(file, "vit_nano_patch8_64")
    metadata = vpt.read_task(file)
    assert (type(model), metadata.task_type) == (BrightnessModel, "brightness")
    other = vpt.create_model(model.backbone.vit, num_classes=3, num_tokens=4)
    bank = vpt.TaskBank(model.backbone.vit)
    bank.load(file, "gray")
    bank.load(vpt.save_task(other, folder / "other.safetensors"), "other")
    images = torch.rand(4, 3, 64, 64)
    mixed = bank(images, ["gray", "other", "gray", "other"])
    with torch.inference_mode():
        torch.testing.assert_close(torch.stack(mixed[::2]), model(images)[::2])
        torch.testing.assert_close(torch.stack(mixed[1::2]), other.eval()(images)[1::2])


def words_of(folder):
    words = ["--config-dir", f"{folder}/conf", "dataset=gray", f"dataset.root={folder}/images", "backbone=vit_nano"]
    return [*words, "train.epochs=1", "train.batch_size=8", "num_workers=0"]


@pytest.mark.slow
def test_the_command_lines_accept_it_from_a_config_folder_of_the_user(folder, monkeypatch, capsys, trained):
    monkeypatch.chdir(folder)
    words = words_of(folder)
    assert exit_code_of(train, monkeypatch, *words, "mode=overfit", "optim.head_lr=0.005", "tuning=linear") == 0
    assert "learned 8 images" in capsys.readouterr().out
    assert exit_code_of(doctor, monkeypatch, *words, "json=found.json") == 0
    assert json.loads((folder / "found.json").read_text())["task"] == "brightness"
    assert exit_code_of(tasks, monkeypatch, "list", str(trained)) == 0
    assert "brightness" in capsys.readouterr().out
    assert exit_code_of(compare, monkeypatch, *words, "methods=[prompt_deep,linear]", "seeds=1", "output=compared") == 0
    assert "close" in (folder / "compared" / "table.csv").read_text()
    assert (folder / "compared" / "report.html").is_file()


def test_an_unknown_type_or_reader_is_refused_with_the_known_ones(folder):
    with pytest.raises(ConfigError, match=r"dataset\.task=.*brightness"):
        task_type_of(config_of(folder, "dataset.task=brightnes"))
    with pytest.raises(ConfigError, match=r"dataset\.reader=.*gray"):
        task_type_of(config_of(folder, "dataset.reader=colour"))
    with pytest.raises(ValueError, match="brightness"):
        vpt.create_model(make_tiny_vit(), num_classes=1, task="bright")
