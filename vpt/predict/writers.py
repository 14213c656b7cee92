"""What `python -m vpt.predict` makes of pictures, by kind of task, and how it is written."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image

from vpt.config.command_line import check_file, check_folder
from vpt.config.errors import ConfigError, did_you_mean
from vpt.models.detector import Selection
from vpt.plots.boxes import draw_boxes
from vpt.predict.open_tasks import OpenTasks, Prepared, run_model
from vpt.predictions.boxes import FoundBoxes, file_names, to_box_table, to_coco, to_yolo
from vpt.predictions.classes import Top, to_class_json, to_class_table
from vpt.predictions.tables import check_table
from vpt.storage.files import write_bytes
from vpt.task_types.detection import to_original

TOP_K = 5
MIN_SCORE = 0.25  # what a person wants to see; metrics are computed from 0.05 up
OUTPUTS = (".csv", ".json", ".parquet")

Found = Mapping[str, Any]  # by task: Top or FoundBoxes


class Predictions(Protocol):
    """Says what the tasks find in pictures, and writes it."""

    keeps_pictures: bool  # whether `predict` wants the pictures themselves

    def predict(self, paths: Sequence[Path], batch: Sequence[Prepared]) -> list[Found]:
        """What is found in each picture of a batch; what is written picture by picture is written."""

    def resume(self, kept: Mapping[Path, Found]) -> set[Path]:
        """Those of the pictures that were predicted earlier that need not be predicted again.

        Raises:
            ConfigError: Something that a person may have made is where the output should go.
        """

    def write(self, found: Mapping[Path, Found]) -> str:
        """Write all that was found, and say where it is."""

    def to_record(self, found: Found) -> dict[str, Any]:
        """Plain JSON values of what was found in a picture, which lose nothing."""

    def from_record(self, path: Path, record: Mapping[str, Any]) -> Found:
        """What `to_record` gave for a picture."""


def predictions_of(tasks: OpenTasks, options: Any, root: Path, paths: Sequence[Path]) -> Predictions:
    """The predictions of tasks, by their kind.

    Args:
        tasks: All of one kind.
        options: The options of `python -m vpt.predict`.
        root: The folder of the pictures.
        paths: The pictures in it.

    Raises:
        ConfigError: An option is of another kind of task, or cannot be used.
    """
    kind = BoxPredictions if tasks.kind == "detection" else ClassPredictions
    own = {*ClassPredictions.options, *BoxPredictions.options}
    for entry in fields(options):
        if entry.name in own - {*kind.options} and getattr(options, entry.name) is not None:
            raise ConfigError(f"{entry.name}: is not for a task of {tasks.kind}, as {tasks.origin} is one")
    return kind(tasks, options, root, paths)


class ClassPredictions:
    """The most probable classes of each picture, as CSV, parquet or JSON."""

    options: ClassVar[Sequence[str]] = ("top_k",)
    keeps_pictures = False

    def __init__(self, tasks: OpenTasks, options: Any, root: Path, paths: Sequence[Path]) -> None:
        self.tasks = tasks
        self.output = Path(options.output).expanduser()
        _check_output(self.output, paths)
        self.top_k = options.top_k or TOP_K

    def predict(self, paths: Sequence[Path], batch: Sequence[Prepared]) -> list[Found]:
        """The most probable classes."""
        found: list[dict[str, Top]] = [{} for _ in batch]
        for task, logits in run_model(self.tasks, batch).items():
            probabilities = logits.float().softmax(dim=1).cpu()
            if not probabilities.isfinite().all():
                raise ValueError(f"task {task} gives logits that are not finite numbers; train it again")
            top = probabilities.topk(min(self.top_k, probabilities.shape[1]), dim=1)
            for of_picture, labels, values in zip(found, top.indices.tolist(), top.values.tolist(), strict=True):
                of_picture[task] = list(zip(labels, values, strict=True))
        return [{task: of_picture[task] for task in self.tasks.metadata} for of_picture in found]

    def resume(self, kept: Mapping[Path, Found]) -> set[Path]:
        """All of them."""
        return set(kept)

    def write(self, found: Mapping[Path, Found]) -> str:
        """Write the file."""
        typed = {str(path): of_picture for path, of_picture in found.items()}
        ending, classes = self.output.suffix.lower(), self.tasks.classes
        is_json = ending == ".json"
        write_bytes(self.output, to_class_json(typed, classes) if is_json else to_class_table(typed, classes, ending))
        return str(self.output)

    def to_record(self, found: Found) -> dict[str, Any]:
        """Labels and probabilities."""
        return dict(found)

    def from_record(self, path: Path, record: Mapping[str, Any]) -> Found:
        """Labels and probabilities."""
        return {task: [(label, value) for label, value in top] for task, top in record.items()}


class BoxPredictions:
    """The boxes in each picture, as CSV, parquet, COCO results JSON or YOLO text files, and drawn on the pictures.

    Drawn pictures are written picture by picture, all else at the end.
    """

    options: ClassVar[Sequence[str]] = ("drawings", "min_score", "max_overlap", "max_detections", "classes")

    def __init__(self, tasks: OpenTasks, options: Any, root: Path, paths: Sequence[Path]) -> None:
        self.tasks, self.root = tasks, root
        self._select(options)
        self.output = Path(options.output).expanduser()
        self.pictures = None if options.drawings is None else Path(options.drawings).expanduser()
        self._check_single(options)
        self.drawings = {} if self.pictures is None else self._files("drawings", self.pictures, ".jpg", paths)
        self.texts = self._texts(paths)
        self.keeps_pictures = self.pictures is not None

    def predict(self, paths: Sequence[Path], batch: Sequence[Prepared]) -> list[Found]:
        """Detect, and draw what is found."""
        detections = run_model(self.tasks, batch)
        found: list[Found] = [
            {task: self._in_picture(path, prepared, task, detections[task][index]) for task in self.tasks.metadata}
            for index, (path, prepared) in enumerate(zip(paths, batch, strict=True))
        ]
        for path, prepared, of_picture in zip(paths, batch, found, strict=True):
            if path in self.drawings and prepared.picture is not None:
                write_bytes(self.drawings[path], self._draw(prepared.picture, of_picture))
        return found

    def resume(self, kept: Mapping[Path, Found]) -> set[Path]:
        """Those that are drawn, if they are to be; a YOLO text file must be what would be written anyway."""
        for path, text in self.texts.items():
            if text.exists() and not (path in kept and text.read_bytes() == self._text(kept[path])):
                raise ConfigError(f"output={self.output}: {text} is there already; name a new folder")
        return {path for path in kept if path not in self.drawings or self.drawings[path].exists()}

    def write(self, found: Mapping[Path, Found]) -> str:
        """Write the file of all pictures, or a text file for each."""
        ending = self.output.suffix.lower()
        if self.texts:
            for path, of_picture in found.items():
                write_bytes(self.texts[path], self._text(of_picture))
        elif ending == ".json":
            (task,) = self.tasks.metadata
            ids = self.tasks.metadata[task].category_ids or range(1, len(self.tasks.classes[task]) + 1)
            boxes = [of_picture[task] for of_picture in found.values()]
            write_bytes(self.output, to_coco(boxes, ids, self.tasks.classes[task]).encode())
        else:
            typed = {str(path): of_picture for path, of_picture in found.items()}
            write_bytes(self.output, to_box_table(typed, self.tasks.classes, ending))
        return f"{self.output} and {self.pictures}" if self.pictures is not None else str(self.output)

    def to_record(self, found: Found) -> dict[str, Any]:
        """Boxes, scores and labels."""
        return {task: boxes.to_record() for task, boxes in found.items()}

    def from_record(self, path: Path, record: Mapping[str, Any]) -> Found:
        """Boxes, scores and labels."""
        name = path.relative_to(self.root).as_posix()
        return {task: FoundBoxes.from_record(name, boxes) for task, boxes in record.items()}

    def _select(self, options: Any) -> None:
        """Tell each task which boxes are wanted."""
        if options.classes is not None and len(self.tasks.metadata) > 1:
            raise ConfigError(f"classes={options.classes}: is for one task, and {self.tasks.origin} names several")
        given = {name: getattr(options, name) for name in ("min_score", "max_overlap", "max_detections")}
        chosen = {"min_score": MIN_SCORE, **{name: value for name, value in given.items() if value is not None}}
        for task, classes in self.tasks.classes.items():
            self.tasks.select(task, Selection(**chosen, labels=_labels(options.classes, classes)))

    def _check_single(self, options: Any) -> None:
        """Refuse several tasks where one only can be told."""
        if len(self.tasks.metadata) > 1 and (self.pictures or self.output.suffix.lower() not in (".csv", ".parquet")):
            option = f"output={options.output}" if self.pictures is None else f"drawings={options.drawings}"
            raise ConfigError(f"{option}: is for one task; several tasks of boxes go to a .csv or .parquet file only")

    def _in_picture(self, path: Path, prepared: Prepared, task: str, detection: Mapping[str, Any]) -> FoundBoxes:
        """A detection, in pixels of the picture."""
        there = to_original(dict(detection), prepared.size, self.tasks.preprocessings[task])
        boxes, scores, labels = (there[key] for key in ("boxes", "scores", "labels"))
        name = path.relative_to(self.root).as_posix()
        return FoundBoxes(name, prepared.size, None, boxes.numpy(), scores.float().numpy(), labels.numpy())

    def _texts(self, paths: Sequence[Path]) -> dict[Path, Path]:
        """The YOLO text file of each picture; none if the output is one file for all."""
        suffix = self.output.suffix.lower()
        if suffix in OUTPUTS:
            _check_output(self.output, paths)
            return {}
        if suffix:
            raise ConfigError(
                f"output={self.output}: must end in {' or '.join(OUTPUTS)}, or be a folder for YOLO text files, "
                "with no dot in its name"
            )
        return self._files("output", self.output, ".txt", paths)

    def _files(self, option: str, folder: Path, ending: str, paths: Sequence[Path]) -> dict[Path, Path]:
        """A file for each picture, in the folder of an option that can be written to."""
        check_folder(option, folder)
        if folder.is_dir() and folder.samefile(self.root):
            example = {"drawings": "drawn", "output": "found"}[option]
            raise ConfigError(
                f"{option}={folder}: is the folder of the input; name another one, such as {option}={example}"
            )
        names = file_names([path.relative_to(self.root).as_posix() for path in paths], ending)
        files = {path: folder / name for path, name in zip(paths, names, strict=True)}
        _spare_pictures(option, folder, files.values(), paths)
        return files

    def _text(self, found: Found) -> bytes:
        """The YOLO text file of a picture."""
        (boxes,) = found.values()
        return to_yolo(boxes).encode()

    def _draw(self, picture: Image.Image, found: Found) -> bytes:
        """The picture with its boxes, as JPEG."""
        ((task, boxes),) = found.items()
        classes = self.tasks.classes[task]
        drawn = draw_boxes(np.asarray(picture), boxes.boxes, boxes.labels, classes, scores=boxes.scores)
        buffer = io.BytesIO()
        Image.fromarray(drawn).save(buffer, "JPEG", quality=92)
        return buffer.getvalue()


def _labels(text: str | None, classes: Sequence[str]) -> tuple[int, ...] | None:
    """Labels of the classes that are asked for by name, as in a line of CSV."""
    if text is None:
        return None
    names = [name.strip() for row in csv.reader([text], skipinitialspace=True) for name in row if name.strip()]
    if not names:
        raise ConfigError(f"classes={text}: names no class; valid: {', '.join(classes)}")
    hints = [f"; a name with a comma needs quotes: classes='\"{name}\"'" for name in classes if "," in name]
    for name in names:
        if name not in classes:
            hint = f"{did_you_mean(name, list(classes))}{''.join(hints[:1])}"
            raise ConfigError(f"classes={text}: no class {name}{hint}")
    return tuple(sorted({classes.index(name) for name in names}))


def _check_output(output: Path, paths: Sequence[Path]) -> None:
    """Make sure, before the work, that the file of all pictures can be written, and is none of them."""
    check_file("output", output, OUTPUTS)
    try:
        check_table(output.suffix.lower())
    except ValueError as error:
        raise ConfigError(f"output={output}: {error}") from error
    _spare_pictures("output", output, [output], paths)


def _spare_pictures(option: str, value: Path, files: Iterable[Path], paths: Sequence[Path]) -> None:
    """Refuse to write over a picture that is predicted, whichever way its name is written."""
    there = [file for file in files if file.exists()]
    if not there:
        return
    pictures = {(stat.st_dev, stat.st_ino) for stat in (path.stat() for path in paths if path.exists())}
    for file in there:
        if (file.stat().st_dev, file.stat().st_ino) in pictures:
            raise ConfigError(f"{option}={value}: {file} is one of the pictures of the input; name another place")
