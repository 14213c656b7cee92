"""PredictionWriter: from the outputs of models to the files of `python -m vpt.predict`, for one type of task."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from vpt.config.command_line import check_file, check_folder
from vpt.config.errors import ConfigError, did_you_mean
from vpt.data.readers.coco import read_ids
from vpt.data.samples import Size
from vpt.engine.console import warn
from vpt.models.task_schema import TaskMetadata
from vpt.predictions.boxes import file_names, match_image_ids
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
    found: ClassVar[str] = "predictions"  # what is found in an image, in messages
    needs_images: bool = False  # whether `predict` reads `PredictedImage.image`
    selection: Mapping[str, Any] = {}  # for `TaskModel.select`, by name of the task

    def __init__(
        self, tasks: Mapping[str, TaskMetadata], origin: str, options: Options, root: Path, paths: Sequence[Path]
    ) -> None:
        self.tasks, self.origin, self.root = tasks, origin, root
        self.output = Path(options["output"]).expanduser()
        self.image_ids: dict[str, int] = {}  # of COCO results, by name of the image; see `use_ids`
        self.category_ids: Sequence[int] = ()

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

    def files_in(self, option: str, folder: Path, ending: str, paths: Sequence[Path]) -> dict[Path, Path]:
        """A file for each image, in the folder of an option; a ConfigError if it would be one of the images."""
        check_folder(option, folder)
        if folder.is_dir() and folder.samefile(self.root):
            example = {"drawings": "drawn", "output": "found"}[option]
            raise ConfigError(
                f"{option}={folder}: is the folder of the input; name another one, such as {option}={example}"
            )
        names = file_names([path.relative_to(self.root).as_posix() for path in paths], ending)
        files = {path: folder / name for path, name in zip(paths, names, strict=True)}
        spare_images(option, folder, files.values(), paths)
        return files

    def use_ids(self, file: Path, paths: Sequence[Path]) -> None:
        """Take ids of images and categories from a COCO file; a ConfigError if they do not fit."""
        if self.output.suffix.lower() != ".json":
            raise ConfigError(f"annotations={file}: is for COCO results, output=FILE.json; leave it out")
        try:
            images, categories = read_ids(file)
        except ValueError as error:
            raise ConfigError(f"annotations={file}: {error}") from error
        ((task, metadata),) = self.tasks.items()
        classes = metadata.class_names
        if unknown := [name for name in classes if name not in categories]:
            what = f"no category {unknown[0]!r}, a class of {task}{did_you_mean(unknown[0], list(categories))}"
            raise ConfigError(f"annotations={file}: {what}")
        self.category_ids = [categories[name] for name in classes]
        names = [path.relative_to(self.root).as_posix() for path in paths]
        try:
            self.image_ids = match_image_ids(names, images)
        except ValueError as error:
            raise ConfigError(f"annotations={file}: {error}") from error
        if unknown := [name for name in names if name not in self.image_ids]:
            what = f"has {len(unknown):,} of the {len(names):,} images not, first {unknown[0]}"
            if len(unknown) == len(names):
                raise ConfigError(f"annotations={file}: {what}; name the file of these images")
            warn(f"annotations={file}: {what}; their {self.found} are left out of the results")

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
