"""Kind: what a run asks of its kind of task, from reading data to telling what was found."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from vpt.build import Data
from vpt.config.schema import Config, TaskName
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.engine.monitor import Monitor
from vpt.engine.state import FitResult
from vpt.engine.steps import Losses
from vpt.engine.trainer import Evaluator
from vpt.task_types.findings import Finding


class Kind(Protocol):
    """One kind of task, for the config of a run.

    Args:
        config: The run's config.
    """

    select: ClassVar[str]  # the metric of val that chooses
    goal: ClassVar[float]  # of that metric on one batch, for mode=overfit
    charts: ClassVar[Mapping[str, Sequence[str]]]  # TensorBoard's overview: title -> regular expressions of tags

    counted: ClassVar[str]  # what is counted of each class: "images" or "boxes"
    report: Any  # a DataReport, filled by `read_all`: problems of the labels

    def __init__(self, config: Config) -> None: ...

    left_out: list[tuple[str, str]]  # train pictures that `read` left out, and why

    def read_all(self) -> dict[str, Any]:
        """Samples by split, from the source that the config names, with pictures that cannot be read."""

    def read(self) -> dict[str, Any]:
        """The same, after a look whether they can be read, which is refused or left out as the config says."""

    def build_data(self, samples: Mapping[str, Any], backbone_preprocessing: Mapping[str, Any]) -> Data:
        """Data sets and loaders of all splits, for a backbone that wants its pictures prepared in this way."""

    def preprocessing(self, backbone_preprocessing: Mapping[str, Any]) -> Preprocessing:
        """How images are prepared for a backbone."""

    def strides(self, patch_size: int) -> tuple[int, ...]:
        """Strides of the head in pixels, for a backbone with patches of this size; empty without feature maps."""

    def class_counts(self, samples: Any) -> NDArray[np.int64]:
        """Images, or boxes that are not crowds, of each class of a split, (K,)."""

    def label_text(self, samples: Any, index: int) -> str:
        """The label of an image in a short form; equal texts mean equal labels."""

    def imbalance_note(self, counts: NDArray[np.int64]) -> str:
        """What class weights do, or would do, about these counts per class of train, (K,); empty without weights."""

    def check_data(
        self,
        splits: Mapping[str, Any],
        readable: Mapping[str, NDArray[np.int64]],
        preprocessing: Preprocessing | None,
        strides: tuple[int, ...],
    ) -> Iterator[Finding]:
        """Problems of the labels, in addition to those of images and classes, which the doctor finds itself.

        Args:
            splits: Samples by split.
            readable: Indices of the images that can be read, by split; empty if labels could not be read.
            preprocessing: How images would be prepared, where known.
            strides: Of the head, see `strides`.
        """

    def losses(self, data: Data) -> Losses:
        """What trains a model on these data."""

    def evaluator(self, data: Data, split: str | None) -> Evaluator:
        """The evaluation on a split; None evaluates a batch as it comes, augmented."""

    def prediction_evaluator(self, data: Data, split: str) -> "PredictionEvaluator":
        """An evaluation that collects what `vpt.compare` reports of a run."""

    def describe(self, samples: Mapping[str, Any]) -> list[str]:
        """What the data are, a line for the summary, and lines on what is wrong with them."""

    def class_table(self, evaluator: Any, data: Data, split: str) -> str:
        """A table with a line for each class, of what was evaluated on a split."""

    def log_start(self, monitor: Monitor, data: Data) -> None:
        """Train pictures as the model will see them."""

    def log_epoch(self, monitor: Monitor, data: Data, evaluator: Any, epoch: int, step: int) -> None:
        """What a person may want to look at while the run goes on, after an evaluation on val."""

    def log_end(self, monitor: Monitor, data: Data, evaluator: Any, result: FitResult) -> None:
        """What the best model makes of val."""


class PredictionEvaluator(Evaluator, Protocol):
    """An evaluator whose results can be saved as JSON."""

    def result(self) -> dict[str, Any]:
        """What was collected, under "predictions" and "probabilities", or "precision"."""


def kind_of(config: Config) -> Kind:
    """The kind of task that a config describes."""
    from vpt.task_types.classification import Classification
    from vpt.task_types.detection import Detection

    return Detection(config) if config.task is TaskName.detection else Classification(config)
