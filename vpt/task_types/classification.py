"""Classification: a picture has one class."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vpt.build import Data, build_loaders, build_preprocessing, spread, unknown_reader
from vpt.config.schema import ClassWeights, Config, OnError
from vpt.config.validation import required
from vpt.data.images import Decoding
from vpt.data.readers.folder import fruit_root, read_folder
from vpt.data.readers.tables import read_csv, read_list
from vpt.data.readers.torchvision import read_torchvision
from vpt.data.samples import ClassificationDataset, Samples, check_readable
from vpt.data.splits import take_per_class
from vpt.data.transforms.images import EvalTransform, TrainTransform
from vpt.data.transforms.preprocessing import denormalise
from vpt.engine.console import format_table, percent
from vpt.engine.losses import CrossEntropy
from vpt.engine.metrics.classification import ClassificationMetrics
from vpt.engine.monitor import OVERVIEW, Monitor
from vpt.engine.state import FitResult
from vpt.engine.steps import Losses
from vpt.plots.grid import RIGHT, WRONG, confusion_picture, picture_grid
from vpt.storage.archives import unpacked
from vpt.task_types.unreadable import LeftOut, describe_left_out, leave_out_unreadable

NUM_GRID_PICTURES = 32


class ClassEvaluator:
    """Logits of a split -> metrics; `metrics` remembers the confusion and the worst pictures."""

    def __init__(self, num_classes: int) -> None:
        self.metrics = ClassificationMetrics(num_classes)
        self.reset, self.compute = self.metrics.reset, self.metrics.compute

    def update(self, model: nn.Module, images: Tensor, targets: Tensor) -> None:
        """Add the logits of a batch."""
        self.metrics.update(model(images).float(), targets)


class Classification:
    """Pictures of one class each, see `Kind`."""

    select: ClassVar[str] = "top1"
    goal: ClassVar[float] = 1.0
    charts: ClassVar[Mapping[str, Sequence[str]]] = OVERVIEW

    def __init__(self, config: Config) -> None:
        self.config = config
        self.decoding = Decoding(config.data.max_pixels, config.data.background)
        self.left_out: LeftOut = []

    def read(self) -> dict[str, Samples]:
        """Read which pictures there are, by split, without those that cannot be read and may be skipped."""
        dataset, is_skipping = self.config.dataset, self.config.data.on_error is OnError.skip
        samples = self.read_all()
        for split, members in samples.items():
            if split != "train" or not is_skipping:
                check_readable(members, self.decoding)
        samples, self.left_out = leave_out_unreadable(self.config, samples)
        if dataset.num_per_class is not None:
            samples["train"] = take_per_class(samples["train"], dataset.num_per_class, dataset.split_seed)
        return samples

    def read_all(self) -> dict[str, Samples]:
        """Read which pictures there are, by split; none is looked at."""
        config = self.config.dataset
        if config.reader in ("folder", "list"):
            required(config, "root")
        root = unpacked(Path(config.root or ".").expanduser(), self.config.cache_dir)
        split: dict[str, Any] = {
            "val_fraction": config.val_fraction,
            "seed": config.split_seed,
            "decoding": self.decoding,
        }
        match config.reader:
            case "folder":
                return read_folder(root, test_fraction=config.test_fraction or 0.0, **split)
            case "list":
                lists: dict[str, Any] = {"train": config.train, "val": config.val, "test": config.test}
                return read_list(root, **lists, test_fraction=config.test_fraction or 0.0, **split)
            case "csv":
                path = Path(required(config, "path")).expanduser()
                pictures_root = None if config.root is None else root
                return read_csv(path, pictures_root, test_fraction=config.test_fraction or 0.0, **split)
            case "torchvision":
                if config.test_fraction is not None:
                    split["test_fraction"] = config.test_fraction
                return read_torchvision(required(config, "name"), root, download=config.download, **split)
            case "fruit":
                return read_folder(fruit_root(), **split)
        raise unknown_reader(config, ("folder", "list", "csv", "torchvision", "fruit"))

    def build_data(self, samples: Mapping[str, Samples], backbone_preprocessing: Mapping[str, Any]) -> Data:
        """Data sets and loaders of all splits; `augment.crop_mode` and `crop_pct` win over the backbone's wishes."""
        augment = self.config.augment
        preprocessing = build_preprocessing(
            backbone_preprocessing, crop_mode=augment.crop_mode, crop_pct=augment.crop_pct
        )
        evaluation, training = EvalTransform(preprocessing), TrainTransform(preprocessing, augment.transforms)
        datasets = {
            split: ClassificationDataset(members, training if split == "train" else evaluation, seed=self.config.seed)
            for split, members in samples.items()
        }
        loaders = build_loaders(self.config, datasets)
        return Data(dict(samples), datasets, loaders, preprocessing, training.is_random)

    def losses(self, data: Data) -> Losses:
        """Cross-entropy with label smoothing and class weights."""
        cross_entropy = build_cross_entropy(self.config, data.samples["train"])

        def losses(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
            logits = model(images)
            with torch.autocast(images.device.type, enabled=False):
                return {"class": cross_entropy.to(images.device)(logits.float(), targets)}

        return losses

    def evaluator(self, data: Data, split: str | None) -> ClassEvaluator:
        """The same for every split."""
        return ClassEvaluator(len(data.classes))

    def describe(self, samples: Mapping[str, Samples]) -> list[str]:
        """Classes and pictures, and which of them are left out."""
        counts = ", ".join(f"{split} {len(members.targets)}" for split, members in samples.items())
        head = f"{self.config.dataset.title}: {len(samples['train'].classes)} classes; pictures: {counts}"
        return [head, *describe_left_out(self.left_out)]

    def class_table(self, evaluator: ClassEvaluator, data: Data, split: str) -> str:
        """The recall of each class and the number of its pictures."""
        counts = evaluator.metrics.confusion.sum(dim=1).tolist()
        rows = [
            [name, percent(recall), str(num)]
            for name, recall, num in zip(data.classes, evaluator.metrics.per_class(), counts, strict=True)
        ]
        return format_table(rows, ["class", "recall", "pictures"])

    def log_start(self, monitor: Monitor, data: Data) -> None:
        """A grid of train pictures as the model will see them, augmented."""
        train = data.datasets["train"]
        images, targets = zip(*(train[(1, index)] for index in spread(len(train), NUM_GRID_PICTURES)), strict=True)
        captions = [data.classes[target] for target in targets]
        pictures = denormalise(torch.stack(images), data.preprocessing)
        monitor.images("train/augmented", picture_grid(pictures, captions), 0)

    def log_epoch(self, monitor: Monitor, data: Data, evaluator: ClassEvaluator, epoch: int, step: int) -> None:
        """Nothing: the numbers say it."""

    def log_end(self, monitor: Monitor, data: Data, evaluator: ClassEvaluator, result: FitResult) -> None:
        """The confusion matrix, the worst pictures and the recall of each class."""
        metrics = evaluator.metrics
        monitor.images("val/confusion", confusion_picture(metrics.confusion.numpy(), data.classes), result.best_step)
        worst = metrics.worst()
        images = torch.stack([data.datasets["val"][sample.position][0] for sample in worst])
        captions = [
            f"{data.classes[sample.target]}\nsaid {data.classes[sample.prediction]}\nloss {sample.loss:.1f}"
            for sample in worst
        ]
        colours = [RIGHT if sample.target == sample.prediction else WRONG for sample in worst]
        grid = picture_grid(denormalise(images, data.preprocessing), captions, columns=4, colours=colours)
        monitor.images("val/worst", grid, result.best_step)
        recall = {f"val_recall/{name}": value for name, value in zip(data.classes, metrics.per_class(), strict=True)}
        monitor.scalars(recall, result.best_step)


def build_cross_entropy(config: Config, train: Samples) -> CrossEntropy:
    """Cross-entropy with label smoothing and class weights; weights have a mean of 1 over the train pictures."""
    weight = None
    if config.train.class_weights is ClassWeights.balanced:
        counts = torch.bincount(torch.tensor(train.targets), minlength=len(train.classes)).clamp(min=1)
        weight = len(train.targets) / (len(train.classes) * counts.float())
    return CrossEntropy(weight, config.train.label_smoothing)
