"""What `python -m vpt.predict` makes of pictures, by kind of task, and how it is written."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image

from vpt.build import TrainedRun, choose_precision
from vpt.command_line import check_file, check_folder
from vpt.config import ConfigError, did_you_mean
from vpt.data.box_files import FoundBoxes, file_names, to_coco, to_csv, to_yolo
from vpt.data.transforms import EvalTransform, letterboxed_size
from vpt.engine.box_pictures import draw_boxes
from vpt.engine.trainer import autocast
from vpt.files import write_bytes
from vpt.kinds.detection import to_original
from vpt.models.classification import ClassificationModel
from vpt.models.detection import DetectionModel, Selection

TOP_K = 5
MIN_SCORE = 0.25  # what a person wants to see; metrics are computed from 0.05 up
TABLES = (".csv", ".json")


class Predictions(Protocol):
    """Takes pictures, remembers what a model says of them, and writes it."""

    def add(self, paths: Sequence[Path], pictures: Sequence[Image.Image]) -> None:
        """Predict a batch of upright RGB pictures, and write what is written picture by picture."""

    def write(self) -> str:
        """Write the rest, and say where everything is."""


def predictions_of(run: TrainedRun, options: Any, root: Path, paths: Sequence[Path]) -> Predictions:
    """The predictions of a run's kind of task.

    Args:
        run: A finished run.
        options: The options of `python -m vpt.predict`.
        root: The picture or the folder that is predicted.
        paths: The pictures in it.

    Raises:
        ConfigError: An option is of another kind of task, or cannot be used.
    """
    kind = BoxPredictions if isinstance(run.model, DetectionModel) else ClassPredictions
    own = {*ClassPredictions.options, *BoxPredictions.options}
    for entry in fields(options):
        if entry.name in own - {*kind.options} and getattr(options, entry.name) is not None:
            raise ConfigError(f"{entry.name}: is not for a task of {run.metadata.kind}, as run={options.run} is one")
    return kind(run, options, root, paths)


class ClassPredictions:
    """The most probable classes of each picture, as CSV or JSON."""

    options: ClassVar[Sequence[str]] = ("top_k",)

    def __init__(self, run: TrainedRun, options: Any, root: Path, paths: Sequence[Path]) -> None:
        assert isinstance(run.model, ClassificationModel)
        self.run, self.model = run, run.model
        self.output = Path(options.output).expanduser()
        check_file("output", self.output, TABLES)
        _spare_pictures("output", self.output, [self.output], paths)
        self.classes = self.model.classes or [str(index) for index in range(self.model.num_classes)]
        self.top_k = min(options.top_k or TOP_K, len(self.classes))
        self.rows: list[tuple[str, list[tuple[str, float]]]] = []  # path; classes and probabilities

    def add(self, paths: Sequence[Path], pictures: Sequence[Image.Image]) -> None:
        """Predict a batch."""
        probabilities = run_model(self.run, pictures).float().softmax(dim=1).cpu()
        top = probabilities.topk(self.top_k, dim=1)
        for path, indices, values in zip(paths, top.indices.tolist(), top.values.tolist(), strict=True):
            names = [self.classes[index] for index in indices]
            self.rows.append((str(path), list(zip(names, values, strict=True))))

    def write(self) -> str:
        """Write the file."""
        text = self._as_csv() if self.output.suffix.lower() == ".csv" else self._as_json()
        write_bytes(self.output, text.encode())
        return str(self.output)

    def _as_csv(self) -> str:
        """Columns path, class_1, probability_1, class_2, ..."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        ranks = range(1, self.top_k + 1)
        writer.writerow(["path", *(f"{name}_{rank}" for rank in ranks for name in ("class", "probability"))])
        for path, top in self.rows:
            writer.writerow([path, *(cell for name, value in top for cell in (name, f"{value:.6f}"))])
        return buffer.getvalue()

    def _as_json(self) -> str:
        """A list of {"path": ..., "predictions": [{"class": ..., "probability": ...}, ...]}."""
        rows = [
            {"path": path, "predictions": [{"class": name, "probability": value} for name, value in top]}
            for path, top in self.rows
        ]
        return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


class BoxPredictions:
    """The boxes in each picture, as CSV, COCO results JSON or YOLO text files, and drawn on the pictures.

    Drawn pictures and YOLO text files are written picture by picture, the others at the end.
    """

    options: ClassVar[Sequence[str]] = ("pictures", "min_score", "max_overlap", "max_detections", "classes")

    def __init__(self, run: TrainedRun, options: Any, root: Path, paths: Sequence[Path]) -> None:
        assert isinstance(run.model, DetectionModel)
        self.run, self.model = run, run.model
        self.root = root if root.is_dir() else root.parent
        self.classes = self.model.classes or [str(index) for index in range(self.model.num_classes)]
        given = {"min_score": options.min_score, "max_overlap": options.max_overlap}
        given |= {"max_detections": options.max_detections, "labels": self._labels(options.classes)}
        self.model.selection = Selection(
            **{"min_score": MIN_SCORE, **{key: value for key, value in given.items() if value is not None}}
        )
        self.output = Path(options.output).expanduser()
        self.pictures = None if options.pictures is None else Path(options.pictures).expanduser()
        self.drawings = {} if self.pictures is None else self._files("pictures", self.pictures, ".jpg", paths)
        self.texts = self._texts(paths)
        self.found: list[FoundBoxes] = []

    def add(self, paths: Sequence[Path], pictures: Sequence[Image.Image]) -> None:
        """Detect on a batch."""
        preprocessing = self.run.preprocessing
        sizes = [(picture.height, picture.width) for picture in pictures]
        inner = [letterboxed_size(size, preprocessing) for size in sizes]
        detections = run_model(self.run, pictures, sizes=inner)
        for path, picture, size, in_input in zip(paths, pictures, sizes, detections, strict=True):
            detection = to_original(in_input, size, preprocessing)
            boxes, scores, labels = (detection[key] for key in ("boxes", "scores", "labels"))
            name = path.relative_to(self.root).as_posix()
            found = FoundBoxes(name, size, None, boxes.numpy(), scores.float().numpy(), labels.numpy())
            if path in self.drawings:
                write_bytes(self.drawings[path], self._draw(picture, found))
            if path in self.texts:
                write_bytes(self.texts[path], to_yolo(found).encode())
            else:
                self.found.append(found)

    def write(self) -> str:
        """Write the file of all pictures, if there is one."""
        if self.output.suffix.lower() == ".csv":
            typed = [replace(found, path=str(self.root / found.path)) for found in self.found]
            write_bytes(self.output, to_csv(typed, self.classes).encode())
        elif self.output.suffix.lower() == ".json":
            ids = self.model.category_ids or range(1, len(self.classes) + 1)
            write_bytes(self.output, to_coco(self.found, ids, self.classes).encode())
        return f"{self.output} and {self.pictures}" if self.pictures is not None else str(self.output)

    def _texts(self, paths: Sequence[Path]) -> dict[Path, Path]:
        """The YOLO text file of each picture; none if the output is one file for all."""
        suffix = self.output.suffix.lower()
        if suffix in TABLES:
            check_file("output", self.output, TABLES)
            _spare_pictures("output", self.output, [self.output], paths)
            return {}
        if suffix:
            raise ConfigError(
                f"output={self.output}: must end in .csv or .json, or be a folder for YOLO text files, "
                "with no dot in its name"
            )
        texts = self._files("output", self.output, ".txt", paths)
        for text in texts.values():
            if text.exists():  # it may be what a person drew
                raise ConfigError(f"output={self.output}: {text} is there already; name a new folder")
        return texts

    def _files(self, option: str, folder: Path, ending: str, paths: Sequence[Path]) -> dict[Path, Path]:
        """A file for each picture, in the folder of an option that can be written to."""
        check_folder(option, folder)
        if folder.is_dir() and folder.samefile(self.root):
            example = {"pictures": "drawn", "output": "found"}[option]
            raise ConfigError(
                f"{option}={folder}: is the folder of the input; name another one, such as {option}={example}"
            )
        names = file_names([path.relative_to(self.root).as_posix() for path in paths], ending)
        files = {path: folder / name for path, name in zip(paths, names, strict=True)}
        _spare_pictures(option, folder, files.values(), paths)
        return files

    def _draw(self, picture: Image.Image, found: FoundBoxes) -> bytes:
        """The picture with its boxes, as JPEG."""
        drawn = draw_boxes(np.asarray(picture), found.boxes, found.labels, self.classes, scores=found.scores)
        buffer = io.BytesIO()
        Image.fromarray(drawn).save(buffer, "JPEG", quality=92)
        return buffer.getvalue()

    def _labels(self, text: str | None) -> tuple[int, ...] | None:
        """Labels of the classes that are asked for by name, as in a line of CSV."""
        if text is None:
            return None
        names = [name.strip() for row in csv.reader([text], skipinitialspace=True) for name in row if name.strip()]
        if not names:
            raise ConfigError(f"classes={text}: names no class; valid: {', '.join(self.classes)}")
        hints = [f"; a name with a comma needs quotes: classes='\"{name}\"'" for name in self.classes if "," in name]
        for name in names:
            if name not in self.classes:
                hint = f"{did_you_mean(name, list(self.classes))}{''.join(hints[:1])}"
                raise ConfigError(f"classes={text}: no class {name}{hint}")
        return tuple(sorted({self.classes.index(name) for name in names}))


def run_model(run: TrainedRun, pictures: Sequence[Image.Image], **options: Any) -> Any:
    """What the model of a run gives for pictures, in the precision of the run; options are the model's."""
    transform, device = EvalTransform(run.preprocessing), next(run.model.parameters()).device
    images = torch.stack([transform(picture) for picture in pictures])
    with torch.inference_mode(), autocast(device, choose_precision(run.config, device)):
        return run.model(images.to(device), **options)


def _spare_pictures(option: str, value: Path, files: Iterable[Path], paths: Sequence[Path]) -> None:
    """Refuse to write over a picture that is predicted, whichever way its name is written."""
    there = [file for file in files if file.exists()]
    if not there:
        return
    pictures = {(stat.st_dev, stat.st_ino) for stat in (path.stat() for path in paths if path.exists())}
    for file in there:
        if (file.stat().st_dev, file.stat().st_ino) in pictures:
            raise ConfigError(f"{option}={value}: {file} is one of the pictures of the input; name another place")
