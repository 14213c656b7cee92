"""Classification: each image has one class."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import TypedDict

from vpt.build import Data, spread
from vpt.config.errors import ConfigError, config_keys
from vpt.config.schema import ClassWeights, OnError
from vpt.config.validation import required
from vpt.data.readers.folder import fruit_root, read_folder
from vpt.data.readers.tables import read_csv, read_list
from vpt.data.readers.torchvision import read_torchvision
from vpt.data.samples import ClassificationDataset, ClassificationSamples, Size, check_readable
from vpt.data.splits import take_per_class
from vpt.data.transforms.images import EvalTransform, TrainTransform
from vpt.data.transforms.preprocessing import Preprocessing, denormalise
from vpt.engine.console import format_table, percent
from vpt.engine.losses import CrossEntropy
from vpt.engine.metrics.classification import NUM_TOP, ClassificationMetrics
from vpt.engine.monitor import Monitor
from vpt.engine.steps import Losses
from vpt.models.task_schema import TaskMetadata
from vpt.storage.archives import unpacked
from vpt.task_types.base import DATASET_KEYS, AnswerLimits, TaskType, register_task_type
from vpt.task_types.class_writer import ClassWriter
from vpt.task_types.findings import Finding, Level, some
from vpt.task_types.unreadable import leave_out_unreadable

NUM_GRID_IMAGES = 32

ClassProbability = TypedDict("ClassProbability", {"class": str, "probability": float})


class ClassificationAnswer(TypedDict):
    """The most probable classes, in descending order."""

    task_type: Literal["classification"]
    predictions: list[ClassProbability]


USAGE = """\
import torch

import vpt
from vpt.data.images import read_image
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.hub import download

model = vpt.from_pretrained({repo_id}, backbone={backbone})
preprocessing = Preprocessing.from_dict(vpt.read_task(download({repo_id})).preprocessing)
image = EvalTransform(preprocessing)(read_image("photo.jpg", preprocessing.decoding))
with torch.inference_mode():
    probabilities = model(image[None]).softmax(dim=1)[0]
best = int(probabilities.argmax())
print(model.classes[best] if model.classes else best, float(probabilities[best]))
"""


class ClassEvaluator:
    """Metrics of the logits of a split; `metrics` also stores the confusion matrix and the worst images."""

    def __init__(self, num_classes: int) -> None:
        self.metrics = ClassificationMetrics(num_classes)
        self.reset, self.compute = self.metrics.reset, self.metrics.compute

    def update(self, model: nn.Module, images: Tensor, targets: Tensor) -> None:
        """Add the logits of a batch."""
        self.metrics.update(model(images).float(), targets)


class ClassPredictions:
    """Predicted class and its probability for each image of a split."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Clear everything."""
        self.labels: list[int] = []
        self.probabilities: list[float] = []

    def update(self, model: nn.Module, images: Tensor, targets: Tensor) -> None:
        """Add the predictions for a batch."""
        probabilities, labels = model(images).float().softmax(dim=1).max(dim=1)
        self.labels += labels.tolist()
        self.probabilities += [round(value, 4) for value in probabilities.tolist()]

    def compute(self) -> dict[str, float]:
        """No metrics: the run has them."""
        return {}

    def result(self) -> dict[str, Any]:
        """The predictions and their probabilities, in the order of the split."""
        return {"predictions": self.labels, "probabilities": self.probabilities}


@register_task_type
class Classification(TaskType):
    """Images of one class each; see `TaskType`."""

    name = "classification"
    main_metric = "top1"
    metrics = ("mean_per_class", "top5", "loss")
    overfit_goal = 1.0
    charts: ClassVar[Mapping[str, Sequence[str]]] = {"accuracy": ["^val/top1$", "^val/mean_per_class$"]}
    readers = ("folder", "list", "csv", "torchvision", "fruit")
    heads = ("linear",)
    dataset = ClassificationDataset
    writer = ClassWriter
    answer = ClassificationAnswer
    pipeline_tag = "image-classification"
    usage = USAGE
    peft_task = "IMAGE_CLASSIFICATION"

    def read(self) -> dict[str, ClassificationSamples]:
        """Samples by split; with `dataset.num_per_class` only so many of train."""
        dataset, skips = self.config.dataset, self.config.data.on_error is OnError.skip
        samples = self.decode(self.read_all())
        for split, members in samples.items():
            if split != "train" or not skips:
                check_readable(members, self.decoding)
        if self.select == "top5" and (num := len(samples["train"].classes)) <= NUM_TOP:
            raise ConfigError(f"train.select=top5: has no meaning for {num} classes; use top1 or mean_per_class")
        samples, self.left_out = leave_out_unreadable(self.config, samples)
        if dataset.num_per_class is not None:
            samples["train"] = take_per_class(samples["train"], dataset.num_per_class, dataset.split_seed)
        return samples

    @config_keys(**DATASET_KEYS)
    def read_all(self) -> dict[str, ClassificationSamples]:
        """Samples by split; no image is opened."""
        config = self.config.dataset
        if config.reader in ("folder", "list"):
            required(config, "root")
        root = unpacked(Path(config.root or ".").expanduser(), self.config.cache_dir)
        reading: dict[str, Any] = {**self.division, "decoding": self.decoding, "notes": self.report.notes}
        match config.reader:
            case "folder":
                return read_folder(root, layout=config.layout.value, **reading)
            case "list":
                return read_list(root, config.train, config.val, config.test, **reading)
            case "csv":
                path, images_root = Path(required(config, "path")).expanduser(), None if config.root is None else root
                return read_csv(path, images_root, **reading)
            case "torchvision":
                return read_torchvision(required(config, "name"), root, download=config.download, **reading)
        return read_folder(fruit_root(), **reading)

    def transforms(self, preprocessing: Preprocessing) -> tuple[TrainTransform, EvalTransform]:
        """Augmentation of train as the config states."""
        return TrainTransform(preprocessing, self.config.augment.transforms), EvalTransform(preprocessing)

    def imbalance_note(self, counts: NDArray[np.int64]) -> str:
        """The smallest and the largest weight of `train.class_weights=balanced`."""
        weights = counts.sum() / (len(counts) * counts[counts > 0])
        verb = "weights" if self.config.train.class_weights is ClassWeights.balanced else "would weight"
        return f"train.class_weights=balanced {verb} their losses by {weights.min():.2g} and {weights.max():.2g}"

    def check_data(
        self,
        splits: Mapping[str, ClassificationSamples],
        readable: Mapping[str, NDArray[np.int64]],
        preprocessing: Preprocessing | None,
        strides: tuple[int, ...],
    ) -> Iterator[Finding]:
        """Classes that lose all their images, and classes too small for `dataset.num_per_class`."""
        if not readable:
            return
        train, dataset = splits["train"], self.config.dataset
        if self.config.data.on_error is OnError.skip:
            left = train.take(readable["train"].tolist()).class_counts()
            lost = [train.classes[label] for label in np.flatnonzero((left == 0) & (train.class_counts() > 0))]
            if lost:
                message = f"no image of these classes can be read: {some(lost)}; replace the images"
                yield Finding(Level.error, "lost_class", message, "train")
        if dataset.num_per_class is not None:
            try:
                take_per_class(train, dataset.num_per_class, dataset.split_seed)
            except ValueError as error:
                yield Finding(Level.error, "refused", str(error), "train")

    def head_options(self, train: ClassificationSamples) -> dict[str, Any]:
        """Initialisation of the linear head."""
        return {"head_init": self.config.head.init.value}

    def losses(self, data: Data) -> Losses:
        """Cross-entropy with label smoothing and class weights; weights have a mean of 1 over the images of train."""
        weight, train = None, data.samples["train"]
        if self.config.train.class_weights is ClassWeights.balanced:
            counts = torch.bincount(torch.tensor(train.targets), minlength=len(train.classes)).clamp(min=1)
            weight = len(train.targets) / (len(train.classes) * counts.float())
        cross_entropy = CrossEntropy(weight, self.config.train.label_smoothing)

        def losses(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
            logits = model(images)
            with torch.autocast(images.device.type, enabled=False):
                return {"class": cross_entropy.to(images.device)(logits.float(), targets)}

        return losses

    def evaluator(self, data: Data, split: str | None) -> ClassEvaluator:
        """The same for every split."""
        return ClassEvaluator(len(data.classes))

    def prediction_evaluator(self, data: Data, split: str) -> ClassPredictions:
        """Predicted classes and their probabilities."""
        return ClassPredictions()

    def class_table(self, evaluator: ClassEvaluator, data: Data, split: str) -> str:
        """Recall, precision, F1 and number of images of each class."""
        metrics = evaluator.metrics
        counts, found, hits = metrics.class_counts, metrics.prediction_counts, metrics.hits.double()
        columns = hits / counts, hits / found, 2 * hits / (counts + found)
        cells = [map(percent, column.tolist()) for column in columns]
        rows = [list(row) for row in zip(data.classes, *cells, map(str, counts.tolist()), strict=True)]
        return format_table(rows, ["class", "recall", "precision", "F1", "images"])

    def confusion_counts(self, evaluator: ClassEvaluator, data: Data) -> list[tuple[str, str, int]]:
        """Of images."""
        return [
            (data.classes[target], data.classes[prediction], count)
            for target, prediction, count in evaluator.metrics.pair_counts()
        ]

    def log_start(self, monitor: Monitor, data: Data) -> None:
        """A grid of augmented train images."""
        from vpt.plots.grid import image_grid  # matplotlib is not needed by commands that only predict

        train = data.datasets["train"]
        images, targets = zip(*(train[(1, index)] for index in spread(len(train), NUM_GRID_IMAGES)), strict=True)
        pixels = denormalise(torch.stack(images), data.preprocessing)
        monitor.images("train/augmented", image_grid(pixels, [data.classes[target] for target in targets]), 0)

    def class_scalars(self, evaluator: ClassEvaluator, data: Data) -> dict[str, float]:
        """The recall of each class."""
        pairs = zip(data.classes, evaluator.metrics.per_class(), strict=True)
        return {f"val_recall/{name}": recall for name, recall in pairs}

    def log_end(self, monitor: Monitor, data: Data, evaluator: ClassEvaluator, split: str, step: int) -> None:
        """The confusion matrix and the worst images."""
        from vpt.plots.grid import RIGHT, WRONG, image_grid
        from vpt.plots.metrics import MAX_CELLS, confusion_matrix

        metrics, worst = evaluator.metrics, evaluator.metrics.worst()
        groups, counts = metrics.confusion_of_groups(MAX_CELLS)
        names = data.classes if groups == 1 else [""] * len(counts)
        monitor.images(f"{split}/confusion", confusion_matrix(counts.numpy(), names, groups), step)
        images = torch.stack([data.datasets[split][sample.position][0] for sample in worst])
        captions = [
            f"{data.classes[sample.target]}\npredicted {data.classes[sample.prediction]}\nloss {sample.loss:.1f}"
            for sample in worst
        ]
        colours = [RIGHT if sample.target == sample.prediction else WRONG for sample in worst]
        grid = image_grid(denormalise(images, data.preprocessing), captions, columns=4, colours=colours)
        monitor.images(f"{split}/worst", grid, step)

    @classmethod
    def to_answer(cls, metadata: TaskMetadata, output: Tensor, size: Size, limits: AnswerLimits) -> dict[str, Any]:
        """The most probable classes, of logits (K,)."""
        probabilities, classes = output.float().softmax(dim=0), metadata.class_names
        if not probabilities.isfinite().all():
            raise ArithmeticError("logits are not finite numbers")
        best = probabilities.topk(min(limits.top_k, len(classes)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        predictions = [{"class": classes[label], "probability": value} for label, value in pairs]
        return {"task_type": cls.name, "predictions": predictions}

    @classmethod
    def explain(cls, model: Any, image: Tensor, size: Size) -> dict[str, Any]:
        """The most probable class."""
        probability, label = model(image)[0].float().softmax(0).max(0)
        name = model.classes[int(label)] if model.classes else str(int(label))
        return {"class": name, "probability": float(probability)}

    @classmethod
    def caption(cls, found: Mapping[str, Any]) -> str:
        """The class and its probability."""
        return f"predicted: {found['class']}, {found['probability']:.0%}"
