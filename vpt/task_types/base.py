"""TaskType: everything that differs between the types of task, outside their models.

Commands ask a task type for what they need and never which type it is. A new type is one module with a `TaskModel`
(see `vpt.models.task_model`) and a `TaskType`, both registered under the same name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from vpt.build import Data, build_loaders, build_model, build_preprocessing
from vpt.config.errors import ConfigError, did_you_mean
from vpt.config.schema import Config, DatasetConfig, Sampling
from vpt.data.readers.box_checks import DataReport
from vpt.data.readers.folder import fruit_root
from vpt.data.samples import Size
from vpt.data.splits import Division
from vpt.data.transforms.preprocessing import DECODING, Preprocessing
from vpt.engine.monitor import Monitor
from vpt.engine.steps import Evaluator, Losses
from vpt.models.task_model import TaskModel, model_named
from vpt.models.task_schema import TaskMetadata
from vpt.task_types.decoding import build_decoding, find_decoding
from vpt.task_types.findings import Finding
from vpt.task_types.unreadable import LeftOut, describe_left_out, leave_out_unreadable
from vpt.task_types.writer import PredictionWriter

DATASET_KEYS = {entry.name: f"dataset.{entry.name}" for entry in fields(DatasetConfig)}  # for `config_keys`


@dataclass(frozen=True)
class AnswerLimits:
    """How much a server returns of one image."""

    top_k: int = 5  # most classes
    min_score: float = 0.25  # lowest score of a box
    max_detections: int = 100  # most boxes


class TaskType(ABC):
    """A type of task, for the config of one run.

    The class itself, without a config, describes how predictions of trained tasks are written, served and published.
    """

    name: ClassVar[str]  # `dataset.task` in configs, "kind" in task files
    main_metric: ClassVar[str]  # on val; selects the best epoch by default, higher is better
    metrics: ClassVar[Sequence[str]] = ()  # others that `train.select` may name; higher is better, but for "loss"
    overfit_goal: ClassVar[float]  # of the main metric on one batch, for mode=overfit
    charts: ClassVar[Mapping[str, Sequence[str]]] = {}  # in TensorBoard's overview: title -> regular expressions
    readers: ClassVar[Sequence[str]]  # allowed values of `dataset.reader`
    heads: ClassVar[Sequence[str]] = ()  # allowed values of `head.name`, beside null
    counted: ClassVar[str] = "images"  # what `class_counts` of the samples counts
    dataset: ClassVar[Callable[..., Dataset[Any]]]  # (samples, transform, seed=) -> a `SampleDataset`
    collate_fn: ClassVar[Callable[..., Any] | None] = None

    writer: ClassVar[type[PredictionWriter]]  # for python -m vpt.predict
    answer: ClassVar[type]  # a TypedDict of what a server returns for one image; its key "task_type" is a Literal
    pipeline_tag: ClassVar[str]  # on the Hugging Face Hub
    usage: ClassVar[str]  # Python code for a card, formatted with repo_id= and backbone=
    peft_task: ClassVar[str | None] = None  # task_type in PEFT's adapter_config.json

    def __init__(self, config: Config) -> None:
        self.config = config
        self.select = config.train.select or self.main_metric
        self.decoding = build_decoding(config)
        self.image_notes: list[str] = []  # what `decode` found in the headers of images
        self.report = DataReport()  # problems that `read_all` found in labels
        self.left_out: LeftOut = []  # train images that `read` left out, and why

    # Reading the data.

    @abstractmethod
    def read_all(self) -> dict[str, Any]:
        """Samples by split, including images that cannot be read."""

    def read(self) -> dict[str, Any]:
        """Samples by split; a ValueError or OSError for images that may not be left out, and other unusable data."""
        samples = self.decode(self.read_all())
        samples, self.left_out = leave_out_unreadable(self.config, samples, self.report.left_out)
        return samples

    def decode(self, samples: Mapping[str, Any]) -> dict[str, Any]:
        """Samples whose files are read with the range of values that `data.range=auto` finds over train."""
        self.decoding, self.image_notes = find_decoding(self.config, samples, self.decoding)
        return {split: members.decoded(self.decoding) for split, members in samples.items()}

    @property
    def division(self) -> Division:
        """How readers split val and test off train."""
        config = self.config.dataset
        return {
            "val_fraction": config.val_fraction,
            "test_fraction": config.test_fraction,
            "seed": config.split_seed,
            "group": config.group,
            "folds": config.folds,
            "fold": config.fold,
        }

    @abstractmethod
    def transforms(self, preprocessing: Preprocessing) -> tuple[Any, Any]:
        """The transform of train images, with its attribute `is_random`, and that of all others."""

    def preprocessing(self, backbone_preprocessing: Mapping[str, Any]) -> Preprocessing:
        """Preprocessing of the images: as the model requires, else as `augment` states, else as the backbone's."""
        augment, needed = self.config.augment, model_named(self.name).preprocessing
        crop = {"crop_mode": augment.crop_mode, "crop_pct": augment.crop_pct} | dict(needed)
        return build_preprocessing(backbone_preprocessing, **crop)

    def build_data(self, samples: Mapping[str, Any], backbone_preprocessing: Mapping[str, Any]) -> Data:
        """Data sets and loaders of all splits, for a backbone with this preprocessing."""
        decoding = {name: getattr(self.decoding, name) for name in DECODING}
        preprocessing = self.preprocessing({**decoding, **backbone_preprocessing})
        training, evaluation = self.transforms(preprocessing)
        datasets = {
            split: type(self).dataset(members, training if split == "train" else evaluation, seed=self.config.seed)
            for split, members in samples.items()
        }
        balanced = samples["train"].strata if self.config.train.sampling is Sampling.balanced else None
        loaders = build_loaders(self.config, datasets, type(self).collate_fn, balanced)
        return Data(dict(samples), datasets, loaders, preprocessing, training.is_random)

    def headline(self, samples: Mapping[str, Any]) -> str:
        """The line of the summary on the data themselves."""
        counts = ", ".join(f"{split} {len(members)}" for split, members in samples.items())
        return f"{self.config.dataset.title}: {len(samples['train'].classes)} classes; images: {counts}"

    def describe(self, samples: Mapping[str, Any]) -> list[str]:
        """Lines for the summary: the data, and what was found, left out or guessed in them."""
        notes = *map(str, self.report.notes), *self.report.findings()
        return [self.headline(samples), *self.image_notes, *describe_left_out(self.left_out), *notes]

    # Checks of python -m vpt.doctor.

    def strides(self, patch_size: int) -> tuple[int, ...]:
        """Strides of the head in pixels, for a backbone with patches of this size; empty without feature maps."""
        return ()

    def imbalance_note(self, counts: NDArray[np.int64]) -> str:
        """The effect of class weights on these counts per class of train, (K,); empty without class weights."""
        return ""

    def check_data(
        self,
        splits: Mapping[str, Any],
        readable: Mapping[str, NDArray[np.int64]],
        preprocessing: Preprocessing | None,
        strides: tuple[int, ...],
    ) -> Iterator[Finding]:
        """Problems of the labels, in addition to those of images and classes, which the doctor finds itself.

        `readable` has the indices of the images that can be read, by split; it is empty if labels could not be read.
        """
        return iter(())

    # Training and evaluation.

    def head_options(self, train: Any) -> dict[str, Any]:
        """Keyword arguments of the model's class, beside those that every task model has, for samples of train."""
        return {}

    def build_model(self, train: Any) -> TaskModel:
        """A new model for the classes of train."""
        return build_model(self.config, self.name, train.classes, self.head_options(train))

    @abstractmethod
    def losses(self, data: Data) -> Losses:
        """A function from model, images and targets to losses by name."""

    @abstractmethod
    def evaluator(self, data: Data, split: str | None) -> Evaluator:
        """An evaluator for a split; for one batch, augmented or not, where split is None."""

    def prediction_evaluator(self, data: Data, split: str) -> "PredictionEvaluator | None":
        """An evaluator whose results `python -m vpt.compare` saves for each run; None for no results."""
        return None

    def class_table(self, evaluator: Any, data: Data, split: str) -> str:
        """A table with a row for each class, of an evaluated split; empty where there are no classes."""
        return ""

    def confusion_counts(self, evaluator: Any, data: Data) -> list[tuple[str, str, int]]:
        """True class, predicted class and their number in an evaluated split, without pairs that do not occur."""
        raise ConfigError(f"confusion: classes of {self.name} are not counted in pairs; leave it out")

    # Figures in TensorBoard; a type may have none.

    def log_start(self, monitor: Monitor, data: Data) -> None:  # noqa: B027
        """Log train images as the model receives them."""

    def log_epoch(self, monitor: Monitor, data: Data, evaluator: Any, epoch: int, step: int) -> None:  # noqa: B027
        """Log figures after an evaluation on val."""

    def class_scalars(self, evaluator: Any, data: Data) -> dict[str, float]:
        """A metric of each class for the best model on val, by tag; empty without classes."""
        return {}

    def log_end(self, monitor: Monitor, data: Data, evaluator: Any, split: str, step: int) -> None:  # noqa: B027
        """Log figures of the best model on val, and on test; the result of the run is written before."""

    # Trained tasks.

    @classmethod
    @abstractmethod
    def to_answer(cls, metadata: TaskMetadata, output: Any, size: Size, limits: AnswerLimits) -> dict[str, Any]:
        """The JSON values, as `answer` declares them, of the output for one upright image of this size in pixels.

        An ArithmeticError is raised if the output has numbers that are not finite.
        """

    @classmethod
    def explain(cls, model: Any, image: Tensor, size: Size) -> dict[str, Any]:
        """JSON values of what a model in eval mode predicts for a normalised image (1, 3, H, W); size: less padding."""
        return {}

    @classmethod
    def caption(cls, found: Mapping[str, Any]) -> str:
        """The result of `explain` in a few words."""
        return ""

    @classmethod
    def frames(cls, found: Mapping[str, Any]) -> list[tuple[list[float], str]]:
        """Boxes in the result of `explain`, in pixels of the input, each with its text."""
        return []

    @classmethod
    def sample_images(cls) -> Path:
        """A folder of images that ships with the package, for the check of an exported model."""
        return fruit_root()


class PredictionEvaluator(Evaluator, Protocol):
    """An evaluator whose results can be saved as JSON."""

    def result(self) -> dict[str, Any]:
        """Results under "predictions" and "probabilities", or "precision"."""


def name_pairs(confusion: Tensor, classes: Sequence[str]) -> list[tuple[str, str, int]]:
    """The counts of a confusion matrix (K, K) that are not 0, with the names of their rows and columns."""
    counts = confusion.to_sparse()
    pairs = zip(*counts.indices().tolist(), counts.values().tolist(), strict=True)
    return [(classes[row], classes[column], count) for row, column, count in pairs]


_registered: dict[str, type[TaskType]] = {}


def register_task_type(task_type: type[TaskType]) -> type[TaskType]:
    """Register a type of task by its name; a decorator. A later class of the same name replaces the earlier one."""
    _registered[task_type.name] = task_type
    return task_type


def task_types() -> dict[str, type[TaskType]]:
    """All registered types of task by name."""
    import vpt.task_types.classification
    import vpt.task_types.detection
    import vpt.task_types.segmentation  # noqa: F401  # all register themselves

    return dict(_registered)


def task_type_named(name: str) -> type[TaskType]:
    """The class of a type of task; a ValueError if there is none of this name."""
    if name not in (found := task_types()):
        raise ValueError(f"no type of task {name!r}; registered are {', '.join(found)}")
    return found[name]


def task_type_of(config: Config) -> TaskType:
    """The type of task of a config; a ConfigError if it is unknown, or does not have this reader or head."""
    name, found = config.dataset.task, task_types()
    if name not in found:
        raise ConfigError(f"dataset.task={name}: no such type of task{did_you_mean(name, list(found))}")
    task_type = found[name]
    keys = (
        ("dataset.reader", config.dataset.reader, task_type.readers),
        ("head.name", config.head.name, (None, *task_type.heads)),
        ("train.select", config.train.select, (None, task_type.main_metric, *task_type.metrics)),
    )
    for key, value, allowed in keys:
        if value not in allowed:
            names = ", ".join(str(choice) for choice in allowed if choice is not None)
            raise ConfigError(f"{key}={value}: must be one of {names}, for {name}")
    return task_type(config)
