"""PredictionWriter: from the outputs of models to the files of `python -m vpt.predict`, for one type of task."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from vpt.config.command_line import check_file
from vpt.config.errors import ConfigError
from vpt.data.samples import Size
from vpt.models.task_schema import TaskMetadata
from vpt.predictions.tables import check_table

Predictions = Mapping[str, Any]  # of one image, by name of the task
Options = Mapping[str, Any]  # of python -m vpt.predict; None where an option was not typed


@dataclass(frozen=True)
class PredictedImage:
    """An image that went through the models."""

    path: Path
    size: Size  # in pixels, upright
    image: Image.Image | None  # RGB, where the writer needs it


class PredictionWriter(ABC):
    """Turns outputs of tasks of one type into predictions, and writes them.

    Args:
        tasks: Metadata of the tasks by name.
        origin: The option that named the tasks, such as "run=runs/quickstart", for messages.
        options: All options of the command by name; None where one was not typed.
        root: The folder of the images.
        paths: All images.

    Raises:
        ConfigError: An option is not possible, or the output cannot be written.
    """

    options: ClassVar[Sequence[str]] = ()  # those that this type of task has beside the options of every type
    endings: ClassVar[Sequence[str]] = (".csv", ".json", ".parquet")  # of the output
    needs_images: bool = False  # whether `predict` reads `PredictedImage.image`
    selection: Mapping[str, Any] = {}  # for `TaskModel.select`, by name of the task

    def __init__(
        self, tasks: Mapping[str, TaskMetadata], origin: str, options: Options, root: Path, paths: Sequence[Path]
    ) -> None:
        self.tasks, self.origin, self.root = tasks, origin, root
        self.output = Path(options["output"]).expanduser()

    @abstractmethod
    def predict(self, images: Sequence[PredictedImage], outputs: Mapping[str, Any]) -> list[Predictions]:
        """The predictions for each image of a batch, from what each task's model returned for it."""

    def resume(self, earlier: Mapping[Path, Predictions]) -> set[Path]:
        """Images that a stopped command has done for good; a ConfigError if the output has files of another origin."""
        return set(earlier)

    @abstractmethod
    def write(self, predictions: Mapping[Path, Predictions]) -> str:
        """Write all predictions; return where."""

    def to_record(self, predictions: Predictions) -> dict[str, Any]:
        """The predictions for an image as plain JSON values, without a loss."""
        return dict(predictions)

    def from_record(self, path: Path, record: Mapping[str, Any]) -> Predictions:
        """The inverse of `to_record`."""
        return dict(record)

    def check_output(self, paths: Sequence[Path]) -> None:
        """A ConfigError if the output is not one file that can be written, or if it is one of the images."""
        check_file("output", self.output, self.endings)
        try:
            check_table(self.output.suffix.lower())
        except ValueError as error:
            raise ConfigError(f"output={self.output}: {error}") from error
        spare_images("output", self.output, [self.output], paths)


def spare_images(option: str, value: Path, files: Iterable[Path], paths: Sequence[Path]) -> None:
    """A ConfigError if one of the files is an image of the input, also under another name of the same file."""
    existing = [file for file in files if file.exists()]
    if not existing:
        return
    images = {(stat.st_dev, stat.st_ino) for stat in (path.stat() for path in paths if path.exists())}
    for file in existing:
        if (file.stat().st_dev, file.stat().st_ino) in images:
            raise ConfigError(f"{option}={value}: {file} is one of the images of the input; name another place")
