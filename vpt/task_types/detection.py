"""Detection: a picture has boxes, each of a class."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from vpt.build import Data, build_loaders, build_preprocessing, spread, unknown_reader
from vpt.config.schema import Config
from vpt.config.validation import required
from vpt.data.images import Decoding
from vpt.data.readers.box_checks import DataReport
from vpt.data.readers.boxes import read_detection, trees_root
from vpt.data.readers.coco import read_coco
from vpt.data.samples import DetectionDataset, DetectionSamples, collate_detection
from vpt.data.transforms.boxes import DetectionEvalTransform, DetectionTrainTransform
from vpt.data.transforms.preprocessing import Preprocessing, denormalise, letterboxed_size, unletterbox
from vpt.engine.console import format_table, percent
from vpt.engine.metrics.detection import DetectionMetrics
from vpt.engine.monitor import DETECTION_OVERVIEW, Monitor
from vpt.engine.state import FitResult
from vpt.engine.steps import Losses
from vpt.plots.boxes import draw_boxes, precision_recall_picture, truth_and_found_page
from vpt.plots.grid import confusion_picture, picture_grid
from vpt.storage.archives import unpacked
from vpt.task_types.unreadable import LeftOut, describe_left_out, leave_out_unreadable

NUM_GRID_PICTURES = 16
NUM_PAGE_PICTURES = 8
NUM_PAGES = 5  # in a run

Found = dict[str, Tensor]


class BoxEvaluator:
    """Detections of a split -> COCO metrics, in pixels of the original pictures.

    Args:
        num_classes: K.
        samples: The split; None takes boxes as they come, in pixels of the input.
        preprocessing: How its pictures were brought to the size of the input.
    """

    def __init__(self, num_classes: int, samples: DetectionSamples | None, preprocessing: Preprocessing) -> None:
        self.metrics = DetectionMetrics(num_classes)
        self.samples, self.preprocessing = samples, preprocessing
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.metrics.reset()
        self.found: dict[int, Found] = {}  # by index of the picture

    def update(self, model: nn.Module, images: Tensor, targets: Sequence[dict[str, Tensor]]) -> None:
        """Detect on a batch, and add what is found and what it costs."""
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

    def _sizes(self, targets: Sequence[dict[str, Tensor]]) -> list[tuple[int, int]] | None:
        """Where the picture ends in each input."""
        if self.samples is None:
            return None
        sizes = [self.samples.sizes[int(target["image_index"])] for target in targets]
        return [letterboxed_size(size, self.preprocessing) for size in sizes]

    def compute(self) -> dict[str, float]:
        """The COCO numbers, and losses where the head has them in evaluation."""
        return self.metrics.compute()


def to_original(detection: Found, size: tuple[int, int], preprocessing: Preprocessing) -> Found:
    """A detection in pixels of the input -> in those of the picture of this height and width, on the CPU."""
    boxes = unletterbox(detection["boxes"].float().cpu().numpy(), size, preprocessing)
    return {name: value.cpu() for name, value in detection.items()} | {"boxes": torch.from_numpy(boxes)}


def true_boxes(samples: DetectionSamples, index: int) -> Found:
    """Boxes, labels and crowd of a picture, as tensors."""
    arrays = {"boxes": samples.boxes[index], "labels": samples.labels[index], "crowd": samples.crowd[index]}
    return {name: torch.tensor(array) for name, array in arrays.items()}


class Detection:
    """Pictures with boxes, see `Kind`."""

    select: ClassVar[str] = "map"
    goal: ClassVar[float] = 0.9
    charts: ClassVar[Mapping[str, Sequence[str]]] = DETECTION_OVERVIEW

    def __init__(self, config: Config) -> None:
        self.config = config
        self.report = DataReport()
        self.decoding = Decoding(config.data.max_pixels, config.data.background)
        self.left_out: LeftOut = []

    def read(self) -> dict[str, DetectionSamples]:
        """Read and check pictures and boxes, by split.

        Raises:
            ValueError: What a reader refuses, or there is no box in val, so that no epoch could be chosen.
        """
        samples, self.left_out = leave_out_unreadable(self.config, self.read_all(), self.report.left_out)
        if not any((~crowd).any() for crowd in samples["val"].crowd):
            raise ValueError(
                "val has no box, so that no epoch could be chosen; add boxes, or leave val out, and train gives some"
            )
        return samples

    def read_all(self) -> dict[str, DetectionSamples]:
        """Read and check boxes and the headers of pictures, by split."""
        config = self.config.dataset
        reading: dict[str, Any] = {
            "val_fraction": config.val_fraction,
            "test_fraction": config.test_fraction or 0.0,
            "seed": config.split_seed,
            "strict": config.strict,
            "report": self.report,
            "decoding": self.decoding,
        }
        if config.reader == "trees":
            return read_coco(trees_root(), **reading)
        if config.reader != "boxes":
            raise unknown_reader(config, ("boxes", "trees"))
        root = unpacked(Path(required(config, "root")).expanduser(), self.config.cache_dir)
        if config.annotations is not None:
            return read_coco(root, config.annotations, **reading)
        return read_detection(root, config.format.value, **reading)

    def build_data(self, samples: Mapping[str, DetectionSamples], backbone_preprocessing: Mapping[str, Any]) -> Data:
        """Data sets and loaders of all splits; every picture is letterboxed to the size of the input."""
        augment = self.config.augment
        preprocessing = build_preprocessing(backbone_preprocessing, crop_mode="letterbox", crop_pct=1.0)
        evaluation = DetectionEvalTransform(preprocessing)
        training = DetectionTrainTransform(preprocessing, augment.transforms, augment.min_visibility)
        datasets = {
            split: DetectionDataset(members, training if split == "train" else evaluation, seed=self.config.seed)
            for split, members in samples.items()
        }
        loaders = build_loaders(self.config, datasets, collate_detection)
        return Data(dict(samples), datasets, loaders, preprocessing, training.is_random)

    def losses(self, data: Data) -> Losses:
        """The head's own."""
        return lambda model, images, targets: model(images, targets)

    def evaluator(self, data: Data, split: str | None) -> BoxEvaluator:
        """In pixels of the pictures of the split, or in those of the input."""
        samples = None if split is None else data.samples[split]
        return BoxEvaluator(len(data.classes), samples, data.preprocessing)

    def describe(self, samples: Mapping[str, DetectionSamples]) -> list[str]:
        """Classes, pictures and boxes, and what the check of the boxes found."""
        counts = ", ".join(f"{split} {len(of)} ({sum(map(len, of.boxes)):,})" for split, of in samples.items())
        head = f"{self.config.dataset.title}: {len(samples['train'].classes)} classes; pictures (boxes): {counts}"
        return [head, *describe_left_out(self.left_out), *self.report.findings()]

    def class_table(self, evaluator: BoxEvaluator, data: Data, split: str) -> str:
        """The average precision of each class, the score of its best F1, and the number of its boxes."""
        metrics = evaluator.metrics
        of_split: DetectionSamples = data.samples[split]
        labels = [labels[~crowd] for labels, crowd in zip(of_split.labels, of_split.crowd, strict=True)]
        counts = np.bincount(np.concatenate(labels), minlength=len(data.classes))
        columns = metrics.per_class(), metrics.precision_curves().mean(axis=1), metrics.best_thresholds(), counts
        rows = [
            [name, percent(precision), percent(precision50), "-" if score != score else f"{score:.2f}", f"{num:,}"]
            for name, precision, precision50, score, num in zip(data.classes, *columns, strict=True)
        ]
        return format_table(rows, ["class", "map", "map50", "best score", "boxes"])

    def log_start(self, monitor: Monitor, data: Data) -> None:
        """A grid of train pictures as the model will see them, augmented, with their boxes."""
        train = data.datasets["train"]
        pictures = []
        for index in spread(len(train), NUM_GRID_PICTURES):
            image, target = train[(1, index)]
            picture = denormalise(image[None], data.preprocessing)[0]
            pictures.append(draw_boxes(picture, target["boxes"], target["labels"], data.classes))
        names = [Path(data.samples["train"].names[index]).name for index in spread(len(train), NUM_GRID_PICTURES)]
        monitor.images("train/augmented", picture_grid(np.stack(pictures), names, columns=4), 0)

    def log_epoch(self, monitor: Monitor, data: Data, evaluator: BoxEvaluator, epoch: int, step: int) -> None:
        """A page of val pictures with their boxes and what was found, in the first epoch and some later ones."""
        if epoch == 1 or epoch % max(1, self.config.train.epochs // NUM_PAGES) == 0:
            found = list(evaluator.found)
            indices = [found[position] for position in spread(len(found), NUM_PAGE_PICTURES)]
            monitor.images("val/found", self._page(data, evaluator, indices), step)

    def log_end(self, monitor: Monitor, data: Data, evaluator: BoxEvaluator, result: FitResult) -> None:
        """Precision and recall, confusion, the pictures with most errors, and the precision of each class."""
        metrics, step = evaluator.metrics, result.best_step
        monitor.images("val/precision_recall", precision_recall_picture(metrics.precision_curves(), data.classes), step)
        names = [*data.classes, "background"]
        monitor.images("val/confusion", confusion_picture(metrics.confusion().numpy(), names), step)
        found = list(evaluator.found)
        worst = [found[position] for position in metrics.images_by_error(NUM_PAGE_PICTURES)]
        monitor.images("val/worst", self._page(data, evaluator, worst), step)
        precision = zip(data.classes, metrics.per_class(), strict=True)
        monitor.scalars({f"val_map/{name}": value for name, value in precision}, step)

    def _page(self, data: Data, evaluator: BoxEvaluator, indices: Sequence[int]) -> Any:
        samples: DetectionSamples = data.samples["val"]
        return truth_and_found_page(
            [np.asarray(samples.read(index)) for index in indices],
            [true_boxes(samples, index) for index in indices],
            [evaluator.found[index] for index in indices],
            data.classes,
            captions=[Path(samples.names[index]).name for index in indices],
        )
