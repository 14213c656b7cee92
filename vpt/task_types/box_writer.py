"""Writer of detected boxes: CSV, parquet, COCO results JSON, YOLO text files, and images with the boxes drawn."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from vpt.config.errors import ConfigError, did_you_mean
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.models.heads.dense import Selection
from vpt.predictions.boxes import FoundBoxes, to_box_table, to_coco, to_original, to_yolo
from vpt.storage.files import write_bytes
from vpt.task_types.writer import PredictedImage, Predictions, PredictionWriter

MIN_SCORE = 0.25  # for people; metrics are computed from 0.05 up


class BoxWriter(PredictionWriter):
    """The boxes in each image; drawings are written batch by batch, everything else at the end."""

    found = "boxes"
    options: ClassVar[Sequence[str]] = (
        "annotations",
        "drawings",
        "min_score",
        "max_overlap",
        "max_detections",
        "classes",
    )

    def __init__(self, tasks: Any, origin: str, options: Mapping[str, Any], root: Path, paths: Sequence[Path]) -> None:
        super().__init__(tasks, origin, options, root, paths)
        self.preprocessing = {name: Preprocessing.from_dict(of.preprocessing) for name, of in tasks.items()}
        self.classes = {name: of.class_names for name, of in tasks.items()}
        self.selection = self._select(options)
        self.folder = None if options["drawings"] is None else Path(options["drawings"]).expanduser()
        if len(tasks) > 1 and (self.folder or self.output.suffix.lower() not in (".csv", ".parquet")):
            option = f"output={self.output}" if self.folder is None else f"drawings={self.folder}"
            raise ConfigError(f"{option}: is for one task; boxes of several tasks can be written to .csv or .parquet")
        self.drawings = {} if self.folder is None else self.files_in("drawings", self.folder, ".jpg", paths)
        self.texts = self._texts(paths)
        self.needs_images = self.folder is not None
        if options["annotations"] is not None:
            self.use_ids(Path(options["annotations"]).expanduser(), paths)

    def predict(self, images: Sequence[PredictedImage], outputs: Mapping[str, Any]) -> list[Predictions]:
        """Boxes in pixels of each image; they are drawn, too."""
        found: list[Predictions] = [
            {task: self._in_image(image, task, outputs[task][index]) for task in self.tasks}
            for index, image in enumerate(images)
        ]
        for image, of_image in zip(images, found, strict=True):
            if image.path in self.drawings and image.image is not None:
                write_bytes(self.drawings[image.path], self._draw(image.image, of_image))
        return found

    def resume(self, earlier: Mapping[Path, Predictions]) -> set[Path]:
        """Images with a drawing, where drawings are written; a YOLO text file must be what would be written anyway."""
        for path, text in self.texts.items():
            if text.exists() and not (path in earlier and text.read_bytes() == self._text(earlier[path])):
                raise ConfigError(f"output={self.output}: {text} exists already; name a new folder")
        return {path for path in earlier if path not in self.drawings or self.drawings[path].exists()}

    def write(self, predictions: Mapping[Path, Predictions]) -> str:
        """Write the file of all images, or a text file for each."""
        ending = self.output.suffix.lower()
        if self.texts:
            for path, of_image in predictions.items():
                write_bytes(self.texts[path], self._text(of_image))
        elif ending == ".json":
            ((task, metadata),) = self.tasks.items()
            ids = self.category_ids or metadata.category_ids or range(1, metadata.num_classes + 1)
            boxes = [of_image[task] for of_image in predictions.values()]
            if self.image_ids:
                named = [replace(image, image_id=self.image_ids.get(image.path)) for image in boxes]
                boxes = [image for image in named if image.image_id is not None]
            write_bytes(self.output, to_coco(boxes, ids, self.classes[task]).encode())
        else:
            typed = {str(path): of_image for path, of_image in predictions.items()}
            write_bytes(self.output, to_box_table(typed, self.classes, ending))
        return str(self.output) if self.folder is None else f"{self.output} and {self.folder}"

    def to_record(self, predictions: Predictions) -> dict[str, Any]:
        """Boxes, scores and labels."""
        return {task: boxes.to_record() for task, boxes in predictions.items()}

    def from_record(self, path: Path, record: Mapping[str, Any]) -> Predictions:
        """Boxes, scores and labels."""
        name = path.relative_to(self.root).as_posix()
        return {task: FoundBoxes.from_record(name, boxes) for task, boxes in record.items()}

    def _select(self, options: Mapping[str, Any]) -> dict[str, Selection]:
        if options["classes"] is not None and len(self.tasks) > 1:
            raise ConfigError(f"classes={options['classes']}: is for one task; {self.origin} names several")
        typed = {name: options[name] for name in ("min_score", "max_overlap", "max_detections")}
        limits = {"min_score": MIN_SCORE, **{name: value for name, value in typed.items() if value is not None}}
        return {
            task: Selection(**limits, labels=_labels(options["classes"], classes))
            for task, classes in self.classes.items()
        }

    def _in_image(self, image: PredictedImage, task: str, detection: Mapping[str, Any]) -> FoundBoxes:
        found = to_original(dict(detection), image.size, self.preprocessing[task])
        boxes, scores, labels = (found[key] for key in ("boxes", "scores", "labels"))
        name = image.path.relative_to(self.root).as_posix()
        return FoundBoxes(name, image.size, None, boxes.numpy(), scores.float().numpy(), labels.numpy())

    def _texts(self, paths: Sequence[Path]) -> dict[Path, Path]:
        """The YOLO text file of each image; none if the output is one file."""
        suffix = self.output.suffix.lower()
        if suffix in self.endings:
            self.check_output(paths)
            return {}
        if suffix:
            raise ConfigError(
                f"output={self.output}: must end in {' or '.join(self.endings)}, or be a folder for YOLO text files, "
                "with no dot in its name"
            )
        return self.files_in("output", self.output, ".txt", paths)

    def _text(self, predictions: Predictions) -> bytes:
        (boxes,) = predictions.values()
        return to_yolo(boxes).encode()

    def _draw(self, image: Image.Image, predictions: Predictions) -> bytes:
        ((task, found),) = predictions.items()
        from vpt.plots.boxes import draw_boxes

        drawn = draw_boxes(np.asarray(image), found.boxes, found.labels, self.classes[task], scores=found.scores)
        buffer = io.BytesIO()
        Image.fromarray(drawn).save(buffer, "JPEG", quality=92)
        return buffer.getvalue()


def _labels(text: str | None, classes: Sequence[str]) -> tuple[int, ...] | None:
    """Labels of class names in a line of CSV."""
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
