"""What `python -m vpt.predict` makes of pictures, by kind of task, and how it is written."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vpt.build import TrainedRun
from vpt.config import ConfigError, did_you_mean
from vpt.data.box_files import FoundBoxes, to_coco, to_csv, to_yolo
from vpt.data.transforms import EvalTransform, unletterbox
from vpt.engine.box_pictures import draw_boxes
from vpt.files import write_bytes
from vpt.models.classification import ClassificationModel
from vpt.models.detection import DetectionModel, Selection

TOP_K = 5
MIN_SCORE = 0.25  # what a person wants to see; metrics are computed from 0.05 up


class Predictions(Protocol):
    """Takes pictures, remembers what a model says of them, and writes it."""

    def add(self, paths: Sequence[Path], pictures: Sequence[Image.Image]) -> None:
        """Predict a batch of upright RGB pictures."""

    def write(self) -> str:
        """Write everything, and say where."""


def predictions_of(run: TrainedRun, options: Any, root: Path) -> Predictions:
    """The predictions of a run's kind of task.

    Args:
        run: A finished run.
        options: The options of `python -m vpt.predict`.
        root: The picture or the folder that is predicted.

    Raises:
        ConfigError: An option is of another kind of task, or cannot be used.
    """
    kind = BoxPredictions if isinstance(run.model, DetectionModel) else ClassPredictions
    own = {*ClassPredictions.options, *BoxPredictions.options}
    for entry in fields(options):
        if entry.name in own - {*kind.options} and getattr(options, entry.name) is not None:
            raise ConfigError(f"{entry.name}: is not for a task of {run.metadata.kind}, as run={options.run} is one")
    return kind(run, options, root)


class ClassPredictions:
    """The most probable classes of each picture, as CSV or JSON."""

    options: ClassVar[Sequence[str]] = ("top_k",)

    def __init__(self, run: TrainedRun, options: Any, root: Path) -> None:
        assert isinstance(run.model, ClassificationModel)
        self.model = run.model
        self.transform = EvalTransform(run.preprocessing)
        self.output = Path(options.output).expanduser()
        if self.output.suffix not in (".csv", ".json"):
            raise ConfigError(f"output={self.output}: must end in .csv or .json")
        self.classes = self.model.classes or [str(index) for index in range(self.model.num_classes)]
        self.top_k = min(options.top_k or TOP_K, len(self.classes))
        self.rows: list[tuple[str, list[tuple[str, float]]]] = []  # path; classes and probabilities

    def add(self, paths: Sequence[Path], pictures: Sequence[Image.Image]) -> None:
        """Predict a batch."""
        probabilities = run_model(self.model, self.transform, pictures).float().softmax(dim=1).cpu()
        top = probabilities.topk(self.top_k, dim=1)
        for path, indices, values in zip(paths, top.indices.tolist(), top.values.tolist(), strict=True):
            names = [self.classes[index] for index in indices]
            self.rows.append((str(path), list(zip(names, values, strict=True))))

    def write(self) -> str:
        """Write the file."""
        text = self._as_csv() if self.output.suffix == ".csv" else self._as_json()
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
    """The boxes in each picture, as CSV, COCO results JSON or YOLO text files, and drawn on the pictures."""

    options: ClassVar[Sequence[str]] = ("pictures", "min_score", "max_overlap", "max_detections", "classes")

    def __init__(self, run: TrainedRun, options: Any, root: Path) -> None:
        assert isinstance(run.model, DetectionModel)
        self.model, self.preprocessing = run.model, run.preprocessing
        self.transform = EvalTransform(run.preprocessing)
        self.root = root if root.is_dir() else root.parent
        self.output = Path(options.output).expanduser()
        if self.output.suffix not in (".csv", ".json", ""):
            raise ConfigError(f"output={self.output}: must end in .csv or .json, or be a folder for YOLO text files")
        self.pictures = None if options.pictures is None else Path(options.pictures).expanduser()
        self.classes = self.model.classes or [str(index) for index in range(self.model.num_classes)]
        given = {"min_score": options.min_score, "max_overlap": options.max_overlap}
        given |= {"max_detections": options.max_detections, "labels": self._labels(options.classes)}
        self.model.selection = Selection(
            **{"min_score": MIN_SCORE, **{key: value for key, value in given.items() if value is not None}}
        )
        self.found: list[FoundBoxes] = []

    def add(self, paths: Sequence[Path], pictures: Sequence[Image.Image]) -> None:
        """Detect on a batch, and draw if that is asked for."""
        detections = run_model(self.model, self.transform, pictures)
        for path, picture, detection in zip(paths, pictures, detections, strict=True):
            values = {name: value.float().cpu().numpy() for name, value in detection.items()}
            size = picture.height, picture.width
            boxes = unletterbox(values["boxes"], size, self.preprocessing)
            name = path.relative_to(self.root).as_posix()
            labels = values["labels"].astype(np.int64)
            self.found.append(FoundBoxes(name, size, None, boxes, values["scores"], labels))
            if self.pictures is not None:
                drawn = draw_boxes(np.asarray(picture), boxes, labels, self.classes, scores=values["scores"])
                buffer = io.BytesIO()
                Image.fromarray(drawn).save(buffer, "JPEG", quality=92)
                write_bytes((self.pictures / name).with_suffix(".jpg"), buffer.getvalue())

    def write(self) -> str:
        """Write the file or the files."""
        if self.output.suffix == "":
            for name, text in to_yolo(self.found).items():
                write_bytes(self.output / name, text.encode())
        else:
            ids = self.model.category_ids or range(1, len(self.classes) + 1)
            is_csv = self.output.suffix == ".csv"
            text = to_csv(self.found, self.classes) if is_csv else to_coco(self.found, ids, self.classes)
            write_bytes(self.output, text.encode())
        return f"{self.output} and {self.pictures}" if self.pictures is not None else str(self.output)

    def _labels(self, text: str | None) -> tuple[int, ...] | None:
        """Labels of the classes that are asked for by name."""
        if text is None:
            return None
        for name in text.split(","):
            if name not in self.classes:
                raise ConfigError(f"classes={text}: no class {name}{did_you_mean(name, list(self.classes))}")
        return tuple(sorted({self.classes.index(name) for name in text.split(",")}))


def run_model(model: Any, transform: EvalTransform, pictures: Sequence[Image.Image]) -> Any:
    """What a model in eval mode gives for pictures."""
    images: Tensor = torch.stack([transform(picture) for picture in pictures])
    with torch.inference_mode():
        return model(images.to(next(model.parameters()).device))
