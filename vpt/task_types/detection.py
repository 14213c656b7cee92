"""Detection: each image has boxes of classes."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import TypedDict

from vpt.build import Data, spread
from vpt.config.errors import config_keys
from vpt.config.schema import Config
from vpt.config.validation import required
from vpt.data.readers.boxes import read_detection, trees_root
from vpt.data.readers.coco import read_coco
from vpt.data.samples import DetectionDataset, DetectionSamples, Size, collate_detection
from vpt.data.transforms.boxes import DetectionEvalTransform, DetectionTrainTransform
from vpt.data.transforms.preprocessing import Preprocessing, denormalise, letterboxed_size
from vpt.engine.console import format_table, percent
from vpt.engine.metrics.detection import AREAS, NUMBERS, DetectionMetrics
from vpt.engine.monitor import Monitor
from vpt.engine.steps import Losses
from vpt.models.detector import HEADS
from vpt.models.heads.pyramid import default_strides
from vpt.models.task_schema import TaskMetadata
from vpt.predictions.boxes import to_original
from vpt.storage.archives import unpacked
from vpt.task_types.base import DATASET_KEYS, AnswerLimits, TaskType, name_pairs, register_task_type
from vpt.task_types.box_findings import FullReport, find_box_problems, find_small_boxes
from vpt.task_types.box_writer import MIN_SCORE, BoxWriter
from vpt.task_types.findings import Finding, Level

NUM_GRID_IMAGES = 16
NUM_PAGE_IMAGES = 8
NUM_PAGES = 5  # in a run

Found = dict[str, Tensor]
DetectedBox = TypedDict(
    "DetectedBox",
    {"class": str, "score": float, "box": tuple[float, float, float, float]},  # x1, y1, x2, y2 in pixels of the image
)


class DetectionAnswer(TypedDict):
    """The boxes, by descending score; x1, y1, x2, y2 in pixels of the upright image, from its upper left corner."""

    task_type: Literal["detection"]
    predictions: list[DetectedBox]


USAGE = """\
import torch

import vpt
from vpt.data.images import read_image
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing, letterboxed_size
from vpt.hub import download
from vpt.predictions.boxes import to_original

model = vpt.from_pretrained({repo_id}, backbone={backbone})
preprocessing = Preprocessing.from_dict(vpt.read_task(download({repo_id})).preprocessing)
image = read_image("photo.jpg", preprocessing.decoding)
size = (image.height, image.width)
inputs = EvalTransform(preprocessing)(image)[None]
with torch.inference_mode():
    found = model(inputs, sizes=[letterboxed_size(size, preprocessing)])[0]
found = to_original(found, size, preprocessing)  # boxes are x1, y1, x2, y2 in pixels of the image
for box, score, label in zip(found["boxes"], found["scores"], found["labels"]):
    print(model.classes[label] if model.classes else int(label), float(score), box.tolist())
"""


class BoxEvaluator:
    """COCO metrics of the detections of a split, in pixels of the original images; without samples, of the input."""

    def __init__(self, num_classes: int, samples: DetectionSamples | None, preprocessing: Preprocessing) -> None:
        self.metrics = DetectionMetrics(num_classes)
        self.samples, self.preprocessing = samples, preprocessing
        self.compute = self.metrics.compute
        self.reset()

    def reset(self) -> None:
        """Clear everything."""
        self.metrics.reset()
        self.found: dict[int, Found] = {}  # by index of the image

    def update(self, model: nn.Module, images: Tensor, targets: Sequence[dict[str, Tensor]]) -> None:
        """Add the detections and losses of a batch."""
        detect_with_losses: Any = model.detect_with_losses
        detections, losses = detect_with_losses(images, targets, self._sizes(targets))
        self.metrics.add_losses({name: float(loss) for name, loss in losses.items()}, len(images))
        if self.samples is None:
            self.metrics.update(detections, targets)
            return
        for detection, target in zip(detections, targets, strict=True):
            index = int(target["image_index"])
            self.found[index] = to_original(detection, self.samples.sizes[index], self.preprocessing)
            self.metrics.update([self.found[index]], [true_boxes(self.samples, index)])

    def result(self) -> dict[str, Any]:
        """The average precision of each class, as the mean over IoU thresholds and at 0.5."""
        precision50 = self.metrics.precision_curves().mean(axis=1).tolist()
        return {"precision": {"map": self.metrics.per_class(), "map50": precision50}}

    def _sizes(self, targets: Sequence[dict[str, Tensor]]) -> list[Size] | None:
        """Height and width of the part of each input that is image and not padding."""
        if self.samples is None:
            return None
        sizes = self.samples.sizes
        return [letterboxed_size(sizes[int(target["image_index"])], self.preprocessing) for target in targets]


def true_boxes(samples: DetectionSamples, index: int) -> Found:
    """Boxes, labels and crowd of an image, as tensors."""
    arrays = {"boxes": samples.boxes[index], "labels": samples.labels[index], "crowd": samples.crowd[index]}
    return {name: torch.tensor(array) for name, array in arrays.items()}


@register_task_type
class Detection(TaskType):
    """Images with boxes; see `TaskType`."""

    name = "detection"
    main_metric = "map"
    metrics = ("map50", "map75", *AREAS[1:], *NUMBERS, "loss")
    overfit_goal = 0.9
    charts: ClassVar[Mapping[str, Sequence[str]]] = {
        "losses apart": ["^train/.*_loss$"],
        "mean average precision": ["^val/map$", "^val/map50$", "^val/map75$"],
    }
    readers = ("boxes", "trees")
    heads = tuple(HEADS)
    counted = "boxes"
    dataset = DetectionDataset
    collate_fn = staticmethod(collate_detection)
    writer = BoxWriter
    answer = DetectionAnswer
    pipeline_tag = "object-detection"
    usage = USAGE
    peft_task = "OBJECT_DETECTION"
    report: FullReport

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.report = FullReport()

    def read(self) -> dict[str, DetectionSamples]:
        """Samples by split; a ValueError if val has no box, so that no epoch could be selected."""
        samples = super().read()
        if not samples["val"].class_counts().any():
            raise ValueError("val has no box, so no epoch could be selected; add boxes, or remove val to split it off")
        return samples

    @config_keys(**DATASET_KEYS)
    def read_all(self) -> dict[str, DetectionSamples]:
        """Samples by split, from boxes and the headers of images."""
        config = self.config.dataset
        reading: dict[str, Any] = {**self.division, "strict": config.strict, "exif_boxes": config.exif_boxes.value}
        reading |= {"report": self.report, "decoding": self.decoding}
        if config.reader == "trees":
            return read_coco(trees_root(), **reading)
        root = unpacked(Path(required(config, "root")).expanduser(), self.config.cache_dir)
        if config.annotations is not None:
            return read_coco(root, config.annotations, **reading)
        return read_detection(root, config.format.value, **reading)

    def transforms(self, preprocessing: Preprocessing) -> tuple[DetectionTrainTransform, DetectionEvalTransform]:
        """Augmentation of train as the config states."""
        options = self.config.augment.transforms, self.config.augment.min_visibility
        return DetectionTrainTransform(preprocessing, *options), DetectionEvalTransform(preprocessing)

    def headline(self, samples: Mapping[str, DetectionSamples]) -> str:
        """The line of the summary on the data, with the number of boxes."""
        counts = ", ".join(f"{split} {len(of)} ({sum(map(len, of.boxes)):,})" for split, of in samples.items())
        return f"{self.config.dataset.title}: {len(samples['train'].classes)} classes; images (boxes): {counts}"

    def strides(self, patch_size: int) -> tuple[int, ...]:
        """Strides of the feature pyramid."""
        return tuple(self.config.head.strides or default_strides(patch_size))

    def check_data(
        self,
        splits: Mapping[str, DetectionSamples],
        readable: Mapping[str, NDArray[np.int64]],
        preprocessing: Preprocessing | None,
        strides: tuple[int, ...],
    ) -> Iterator[Finding]:
        """A val without boxes, problems that the reader found in boxes, and boxes too small for the input size."""
        if readable and "val" in splits and not splits["val"].class_counts().any():
            yield Finding(Level.error, "no_val_boxes", "no boxes, so no epoch could be selected; add some", "val")
        yield from find_box_problems(splits, self.report.places, self.config.dataset.strict)
        if readable and preprocessing is not None:
            yield from find_small_boxes(splits, preprocessing, strides)

    def head_options(self, train: DetectionSamples) -> dict[str, Any]:
        """Head and feature pyramid as the config states; category ids of the data."""
        head = self.config.head
        copied = {key: getattr(head, key) for key in ("out_indices", "channels", "strides", "num_convs")}
        return {"category_ids": train.category_ids, "head": head.name or "dense", **copied}

    def losses(self, data: Data) -> Losses:
        """The losses of the head."""
        return lambda model, images, targets: model(images, targets)

    def evaluator(self, data: Data, split: str | None) -> BoxEvaluator:
        """In pixels of the images of the split, or of the input."""
        return BoxEvaluator(len(data.classes), None if split is None else data.samples[split], data.preprocessing)

    def prediction_evaluator(self, data: Data, split: str) -> BoxEvaluator:
        """The average precision of each class."""
        return self.evaluator(data, split)

    def class_table(self, evaluator: BoxEvaluator, data: Data, split: str) -> str:
        """Average precision, the score with the best F1, and the number of boxes of each class."""
        metrics, counts = evaluator.metrics, data.samples[split].class_counts()
        columns = metrics.per_class(), metrics.precision_curves().mean(axis=1), metrics.best_thresholds(), counts
        rows = [
            [name, percent(precision), percent(precision50), "-" if score != score else f"{score:.2f}", f"{num:,}"]
            for name, precision, precision50, score, num in zip(data.classes, *columns, strict=True)
        ]
        return format_table(rows, ["class", "map", "map50", "best score", "boxes"])

    def confusion_counts(self, evaluator: BoxEvaluator, data: Data) -> list[tuple[str, str, int]]:
        """Of boxes; missed and false ones are paired with "background"."""
        return name_pairs(evaluator.metrics.confusion(), [*data.classes, "background"])

    def log_start(self, monitor: Monitor, data: Data) -> None:
        """A grid of augmented train images with their boxes."""
        from vpt.plots.boxes import draw_boxes  # matplotlib is not needed by commands that only predict
        from vpt.plots.grid import image_grid

        train, images = data.datasets["train"], []
        indices = spread(len(train), NUM_GRID_IMAGES)
        for index in indices:
            image, target = train[(1, index)]
            pixels = denormalise(image[None], data.preprocessing)[0]
            images.append(draw_boxes(pixels, target["boxes"], target["labels"], data.classes))
        names = [Path(data.samples["train"].names[index]).name for index in indices]
        monitor.images("train/augmented", image_grid(np.stack(images), names, columns=4), 0)

    def log_epoch(self, monitor: Monitor, data: Data, evaluator: BoxEvaluator, epoch: int, step: int) -> None:
        """Val images with true and detected boxes, in the first epoch and some later ones."""
        if epoch == 1 or epoch % max(1, self.config.train.epochs // NUM_PAGES) == 0:
            found = list(evaluator.found)
            indices = [found[position] for position in spread(len(found), NUM_PAGE_IMAGES)]
            monitor.images("val/found", self._page(data, evaluator, "val", indices), step)

    def class_scalars(self, evaluator: BoxEvaluator, data: Data) -> dict[str, float]:
        """The average precision of each class."""
        return {
            f"val_map/{name}": value for name, value in zip(data.classes, evaluator.metrics.per_class(), strict=True)
        }

    def log_end(self, monitor: Monitor, data: Data, evaluator: BoxEvaluator, split: str, step: int) -> None:
        """Precision-recall curves, the confusion matrix and images with most errors."""
        from vpt.plots.metrics import confusion_matrix, precision_recall_curves

        metrics = evaluator.metrics
        curves = precision_recall_curves(metrics.precision_curves(), data.classes)
        monitor.images(f"{split}/precision_recall", curves, step)
        confusion = confusion_matrix(metrics.confusion().numpy(), [*data.classes, "background"])
        monitor.images(f"{split}/confusion", confusion, step)
        found = list(evaluator.found)
        worst = [found[position] for position in metrics.images_by_error(NUM_PAGE_IMAGES)]
        monitor.images(f"{split}/worst", self._page(data, evaluator, split, worst), step)

    def _page(self, data: Data, evaluator: BoxEvaluator, split: str, indices: Sequence[int]) -> Any:
        from vpt.plots.boxes import boxes_page

        samples: DetectionSamples = data.samples[split]
        return boxes_page(
            [np.asarray(samples.read(index)) for index in indices],
            [true_boxes(samples, index) for index in indices],
            [evaluator.found[index] for index in indices],
            data.classes,
            captions=[Path(samples.names[index]).name for index in indices],
        )

    @classmethod
    def to_answer(cls, metadata: TaskMetadata, output: Found, size: Size, limits: AnswerLimits) -> dict[str, Any]:
        """The boxes above the lowest score, in pixels of the image."""
        found = to_original(output, size, Preprocessing.from_dict(metadata.preprocessing))
        if not all(bool(torch.isfinite(found[key]).all()) for key in ("boxes", "scores")):
            raise ArithmeticError("boxes are not finite numbers")
        rows = zip(*(found[key].tolist() for key in ("boxes", "scores", "labels")), strict=True)
        boxes = [
            {"class": metadata.class_names[label], "score": score, "box": tuple(box)}
            for box, score, label in rows
            if score >= limits.min_score
        ]
        return {"task_type": cls.name, "predictions": boxes[: limits.max_detections]}

    @classmethod
    def explain(cls, model: Any, image: Tensor, size: Size) -> dict[str, Any]:
        """The boxes that a user is shown, in pixels of the input."""
        (found,) = model(image, sizes=[size])
        rows = zip(*(found[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
        boxes = [
            {"class": model.classes[label] if model.classes else str(label), "score": score, "box": box}
            for label, score, box in rows
            if score >= MIN_SCORE
        ]
        return {"boxes": boxes}

    @classmethod
    def caption(cls, found: Mapping[str, Any]) -> str:
        """The number of boxes of each class."""
        counts = Counter(box["class"] for box in found["boxes"])
        return "detected: " + (", ".join(f"{counts[name]} {name}" for name in sorted(counts)) or "no boxes")

    @classmethod
    def frames(cls, found: Mapping[str, Any]) -> list[tuple[list[float], str]]:
        """The boxes, each with its class."""
        return [(box["box"], box["class"]) for box in found["boxes"]]

    @classmethod
    def sample_images(cls) -> Path:
        """Aerial images of trees."""
        return trees_root()
