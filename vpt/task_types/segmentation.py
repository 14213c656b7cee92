"""Segmentation: each pixel of an image has a class."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import TypedDict

from vpt.build import Data, spread
from vpt.config.errors import config_keys
from vpt.config.schema import ClassWeights, Config
from vpt.config.validation import required
from vpt.data.masks import LabelMap, SegmentationDataset, SegmentationSamples
from vpt.data.readers.mask_classes import Meaning
from vpt.data.readers.masks import MaskFinding, pebbles_root, read_masks
from vpt.data.samples import Size, collate_detection
from vpt.data.transforms.masks import SegmentationEvalTransform, SegmentationTrainTransform
from vpt.data.transforms.preprocessing import Preprocessing, denormalise
from vpt.engine.console import format_table, percent
from vpt.engine.metrics.segmentation import SegmentationMetrics
from vpt.engine.monitor import Monitor
from vpt.engine.steps import Losses
from vpt.models.heads.masks import mask_losses
from vpt.models.heads.pyramid import default_strides
from vpt.models.segmenter import HEADS
from vpt.models.task_schema import TaskMetadata
from vpt.predictions.masks import to_label_map
from vpt.storage.archives import unpacked
from vpt.task_types.base import DATASET_KEYS, AnswerLimits, TaskType, name_pairs, register_task_type
from vpt.task_types.box_findings import FullReport, find_box_problems
from vpt.task_types.findings import Finding, some
from vpt.task_types.mask_findings import class_weights, find_mask_problems, pixel_shares
from vpt.task_types.mask_writer import MaskWriter

NUM_GRID_IMAGES = 16
NUM_PAGE_IMAGES = 8
NUM_PAGES = 5  # in a run

Criterion = Callable[[Tensor, Tensor], dict[str, Tensor]]
FoundClass = TypedDict("FoundClass", {"class": str, "share": float, "probability": float})


class SegmentationAnswer(TypedDict):
    """The classes in the image, by descending share of its pixels; the probability is the mean over their pixels."""

    task_type: Literal["segmentation"]
    predictions: list[FoundClass]


USAGE = """\
import torch

import vpt
from vpt.data.images import read_image
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.hub import download
from vpt.predictions.masks import to_label_map

model = vpt.from_pretrained({repo_id}, backbone={backbone})
preprocessing = Preprocessing.from_dict(vpt.read_task(download({repo_id})).preprocessing)
image = read_image("photo.jpg")
with torch.inference_mode():
    logits = model(EvalTransform(preprocessing)(image)[None])[0]
labels, probabilities = to_label_map(logits, (image.height, image.width), preprocessing)  # (H, W) of the image
for label in labels.unique().tolist():
    print(model.classes[label] if model.classes else label, float((labels == label).float().mean()))
"""


class MaskEvaluator:
    """Metrics of the masks found in a split, at the size of the original images; without samples, of the input.

    `criterion` returns losses by name of logits and masks. Label maps are kept of a few images that are spread over the
    split, and of those with the lowest mean IoU.
    """

    def __init__(
        self, num_classes: int, samples: SegmentationSamples | None, preprocessing: Preprocessing, criterion: Criterion
    ) -> None:
        self.metrics = SegmentationMetrics(num_classes)
        self.samples, self.preprocessing, self.criterion = samples, preprocessing, criterion
        self.shown = set() if samples is None else {*spread(len(samples), NUM_PAGE_IMAGES)}
        self.compute = self.metrics.compute
        self.reset()

    def reset(self) -> None:
        """Clear everything."""
        self.metrics.reset()
        self.found: dict[int, LabelMap] = {}  # by index of the image
        self.worst: list[tuple[float, int]] = []  # mean IoU and index, ascending

    def update(self, model: nn.Module, images: Tensor, targets: Sequence[dict[str, Tensor]]) -> None:
        """Add the masks and losses of a batch."""
        logits = model(images).float()
        masks = torch.stack([target["mask"] for target in targets])
        losses = self.criterion(logits, masks)
        self.metrics.add_losses({"loss": float(sum(losses.values()))}, len(images))
        for index, (of_image, target) in enumerate(zip(logits, targets, strict=True)):
            if self.samples is None:
                truth, size = masks[index].cpu().numpy(), self.preprocessing.size
                self.metrics.update(truth, to_label_map(of_image, size, self.preprocessing)[0].numpy())
                continue
            place = int(target["image_index"])
            labels = to_label_map(of_image, self.samples.sizes[place], self.preprocessing)[0].numpy()
            self._keep(place, self.metrics.update(self.samples.masks(place), labels), labels)

    def result(self) -> dict[str, Any]:
        """The IoU of each class."""
        return {"precision": {"iou": self.metrics.per_class().tolist()}}

    def _keep(self, place: int, iou: float, labels: LabelMap) -> None:
        if place in self.shown:
            self.found[place] = labels
        if iou == iou:
            self.worst = sorted([*self.worst, (iou, place)])[:NUM_PAGE_IMAGES]
            if (iou, place) in self.worst:
                self.found[place] = labels
        kept = self.shown | {index for _, index in self.worst}
        self.found = {index: of_image for index, of_image in self.found.items() if index in kept}


@register_task_type
class Segmentation(TaskType):
    """Images with a mask; see `TaskType`."""

    name = "segmentation"
    main_metric = "miou"
    metrics = ("pixel_accuracy", "mean_accuracy", "dice", "loss")
    overfit_goal = 0.8
    charts: ClassVar[Mapping[str, Sequence[str]]] = {"mean IoU": ["^val/miou$", "^val/dice$"]}
    readers = ("masks", "pebbles")
    heads = tuple(HEADS)
    counted = "pixels"
    dataset = SegmentationDataset
    collate_fn = staticmethod(collate_detection)
    writer = MaskWriter
    answer = SegmentationAnswer
    pipeline_tag = "image-segmentation"
    usage = USAGE
    report: FullReport

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.report = FullReport(kinds=MaskFinding)

    def read(self) -> dict[str, SegmentationSamples]:
        """Samples by split; a ValueError if val has no pixel of a class, so that no epoch could be selected."""
        samples = super().read()
        if not samples["val"].class_counts().any():
            raise ValueError("all pixels of val are ignored, so no epoch could be selected; correct its masks")
        return samples

    @config_keys(**DATASET_KEYS)
    def read_all(self) -> dict[str, SegmentationSamples]:
        """Samples by split, from all masks and the headers of images."""
        config = self.config.dataset
        reading: dict[str, Any] = {**self.division, "strict": config.strict}
        reading |= {"report": self.report, "decoding": self.decoding}
        if config.reader == "pebbles":
            return read_masks(pebbles_root(), **reading)
        root = unpacked(Path(required(config, "root")).expanduser(), self.config.cache_dir)
        meaning = Meaning(config.classes, config.ignore, config.reduce_zero_label, config.instances)
        return read_masks(root, meaning, **reading)

    def transforms(self, preprocessing: Preprocessing) -> tuple[SegmentationTrainTransform, SegmentationEvalTransform]:
        """Augmentation of train as the config states."""
        training = SegmentationTrainTransform(preprocessing, self.config.augment.transforms)
        return training, SegmentationEvalTransform(preprocessing)

    def headline(self, samples: Mapping[str, SegmentationSamples]) -> str:
        """The line of the summary on the data, with the share of each class."""
        train = samples["train"]
        shares = [f"{name} {part:.1%}" for name, part in zip(train.classes, pixel_shares(train), strict=True)]
        return f"{super().headline(samples)}; train pixels: {some(shares, most=8)}"

    def strides(self, patch_size: int) -> tuple[int, ...]:
        """The stride of the patches for a linear head, and those of the pyramid."""
        if self.config.head.name == "pyramid":
            return tuple(self.config.head.strides or default_strides(patch_size))
        return (patch_size,)

    def check_data(
        self,
        splits: Mapping[str, SegmentationSamples],
        readable: Mapping[str, NDArray[np.int64]],
        preprocessing: Preprocessing | None,
        strides: tuple[int, ...],
    ) -> Iterator[Finding]:
        """Problems in masks, classes without a pixel in train, and what the grid of cells cannot show."""
        yield from find_box_problems(splits, self.report.places, self.config.dataset.strict, MaskFinding)
        if readable:
            yield from find_mask_problems(splits, preprocessing, strides)

    def head_options(self, train: SegmentationSamples) -> dict[str, Any]:
        """Head as the config states; values of the classes in the data."""
        head = self.config.head
        options: dict[str, Any] = {"head": head.name or "linear", "out_indices": head.out_indices}
        if head.name == "pyramid":
            options |= {"channels": head.channels, "strides": head.strides}
        return {"category_ids": train.category_ids, **options}

    def criterion(self, train: SegmentationSamples) -> Criterion:
        """Cross-entropy with class weights, and Dice where the config gives it a weight."""
        weights, dice = torch.ones(len(train.classes)), self.config.train.dice
        if self.config.train.class_weights is ClassWeights.balanced:
            weights = torch.tensor(class_weights(pixel_shares(train)), dtype=torch.float32)
        return lambda logits, masks: mask_losses(logits, masks, weights.to(logits.device), dice)

    def losses(self, data: Data) -> Losses:
        """Those of `criterion`, in float32."""
        criterion = self.criterion(data.samples["train"])

        def losses(model: nn.Module, images: Tensor, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
            logits, masks = model(images), torch.stack([target["mask"] for target in targets])
            with torch.autocast(images.device.type, enabled=False):
                return criterion(logits, masks)

        return losses

    def imbalance_note(self, counts: NDArray[np.int64]) -> str:
        """The smallest and the largest weight of `train.class_weights=balanced`."""
        weights = class_weights(counts / max(counts.sum(), 1))
        verb = "weights" if self.config.train.class_weights is ClassWeights.balanced else "would weight"
        return f"train.class_weights=balanced {verb} their losses by {weights.min():.2g} and {weights.max():.2g}"

    def evaluator(self, data: Data, split: str | None) -> MaskEvaluator:
        """At the size of the original images of the split, or of the input."""
        samples = None if split is None else data.samples[split]
        criterion = self.criterion(data.samples["train"])
        return MaskEvaluator(len(data.classes), samples, data.preprocessing, criterion)

    def prediction_evaluator(self, data: Data, split: str) -> MaskEvaluator:
        """The IoU of each class."""
        return self.evaluator(data, split)

    def class_table(self, evaluator: MaskEvaluator, data: Data, split: str) -> str:
        """IoU, recall and share of the pixels of each class."""
        confusion = evaluator.metrics.confusion
        rows = confusion.sum(axis=1)
        columns = (
            evaluator.metrics.per_class().tolist(),
            np.divide(confusion.diagonal(), rows, out=np.full(len(rows), np.nan), where=rows > 0).tolist(),
            (rows / max(rows.sum(), 1)).tolist(),
        )
        table = [[name, *map(percent, values)] for name, *values in zip(data.classes, *columns, strict=True)]
        return format_table(table, ["class", "iou", "recall", "share of pixels"])

    def confusion_counts(self, evaluator: MaskEvaluator, data: Data) -> list[tuple[str, str, int]]:
        """Of pixels."""
        return name_pairs(torch.tensor(evaluator.metrics.confusion), data.classes)

    def log_start(self, monitor: Monitor, data: Data) -> None:
        """A grid of augmented train images with their masks."""
        from vpt.plots.grid import image_grid  # matplotlib is not needed by commands that only predict
        from vpt.plots.masks import draw_mask

        train, images = data.datasets["train"], []
        indices = spread(len(train), NUM_GRID_IMAGES)
        for index in indices:
            image, target = train[(1, index)]
            pixels = denormalise(image[None], data.preprocessing)[0]
            images.append(draw_mask(pixels, target["mask"].numpy(), len(data.classes)))
        names = [Path(data.samples["train"].names[index]).name for index in indices]
        monitor.images("train/augmented", image_grid(np.stack(images), names, columns=4), 0)

    def log_epoch(self, monitor: Monitor, data: Data, evaluator: MaskEvaluator, epoch: int, step: int) -> None:
        """Val images with true and found masks, in the first epoch and some later ones."""
        if epoch == 1 or epoch % max(1, self.config.train.epochs // NUM_PAGES) == 0:
            monitor.images("val/found", self._page(data, evaluator, "val", sorted(evaluator.shown)), step)

    def class_scalars(self, evaluator: MaskEvaluator, data: Data) -> dict[str, float]:
        """The IoU of each class."""
        iou = evaluator.metrics.per_class().tolist()
        return {f"val_iou/{name}": value for name, value in zip(data.classes, iou, strict=True)}

    def log_end(self, monitor: Monitor, data: Data, evaluator: MaskEvaluator, split: str, step: int) -> None:
        """The confusion matrix, and the images of the lowest IoU."""
        from vpt.plots.metrics import confusion_matrix

        monitor.images(f"{split}/confusion", confusion_matrix(evaluator.metrics.confusion, data.classes), step)
        if worst := [index for _, index in evaluator.worst]:
            monitor.images(f"{split}/worst", self._page(data, evaluator, split, worst), step)

    def _page(self, data: Data, evaluator: MaskEvaluator, split: str, indices: Sequence[int]) -> Any:
        from vpt.plots.masks import masks_page

        samples: SegmentationSamples = data.samples[split]
        return masks_page(
            [np.asarray(samples.read(index)) for index in indices],
            [samples.masks(index) for index in indices],
            [evaluator.found[index] for index in indices],
            len(data.classes),
            captions=[Path(samples.names[index]).name for index in indices],
        )

    @classmethod
    def to_answer(cls, metadata: TaskMetadata, output: Tensor, size: Size, limits: AnswerLimits) -> dict[str, Any]:
        """The classes in the image, of logits (K, h, w)."""
        if not output.isfinite().all():
            raise ArithmeticError("logits are not finite numbers")
        labels, probabilities = to_label_map(output, size, Preprocessing.from_dict(metadata.preprocessing))
        found = [
            {
                "class": metadata.class_names[label],
                "share": float((labels == label).float().mean()),
                "probability": float(probabilities[labels == label].mean()),
            }
            for label in np.unique(labels.numpy()).tolist()
        ]
        return {"task_type": cls.name, "predictions": sorted(found, key=lambda one: -one["share"])}

    @classmethod
    def explain(cls, model: Any, image: Tensor, size: Size) -> dict[str, Any]:
        """The share of each class in the part of the input that is not padding."""
        height, width = image.shape[-2:]
        logits = nn.functional.interpolate(model(image).float(), (height, width), mode="bilinear")[0]
        labels = logits.argmax(dim=0)[: size[0], : size[1]]
        names = model.classes or [str(label) for label in range(len(logits))]
        shares = {names[label]: float((labels == label).float().mean()) for label in np.unique(labels.numpy()).tolist()}
        return {"shares": shares}

    @classmethod
    def caption(cls, found: Mapping[str, Any]) -> str:
        """The share of each class."""
        shares = sorted(found["shares"].items(), key=lambda one: -one[1])
        return "found: " + ", ".join(f"{name} {part:.0%}" for name, part in shares[:4])

    @classmethod
    def sample_images(cls) -> Path:
        """Photos of pebbles."""
        return pebbles_root() / "test" / "images"
