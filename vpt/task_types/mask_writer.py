"""Writer of found masks: palette PNGs at the size of the images, tables of areas, COCO RLE, and overlays."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from vpt.config.errors import ConfigError
from vpt.data.masks import LabelMap
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.predictions.boxes import numbers_of_images
from vpt.predictions.masks import to_label_map
from vpt.predictions.tables import to_table
from vpt.storage.files import write_bytes
from vpt.task_types.writer import PredictedImage, Predictions, PredictionWriter

COLUMNS = {"image": str, "task": str, "class": str, "pixels": float, "share": float, "probability": float}


class MaskWriter(PredictionWriter):
    """The mask of each image. PNGs and drawings are written batch by batch, everything else at the end."""

    found = "masks"
    options: ClassVar[Sequence[str]] = ("annotations", "drawings")

    def __init__(self, tasks: Any, origin: str, options: Mapping[str, Any], root: Path, paths: Sequence[Path]) -> None:
        super().__init__(tasks, origin, options, root, paths)
        self.preprocessing = {name: Preprocessing.from_dict(of.preprocessing) for name, of in tasks.items()}
        self.drawings: dict[Path, Path] = {}
        if options["drawings"] is not None:
            self.drawings = self.files_in("drawings", Path(options["drawings"]).expanduser(), ".jpg", paths)
        self.pngs: dict[Path, Path] = {}
        if self.output.suffix.lower() in self.endings:
            self.check_output(paths)
        elif self.output.suffix:
            raise ConfigError(
                f"output={self.output}: must end in {' or '.join(self.endings)}, or be a folder for PNG masks, with no "
                "dot in its name"
            )
        else:
            self.pngs = self.files_in("output", self.output, ".png", paths)
        if len(tasks) > 1 and (self.drawings or self.output.suffix.lower() not in (".csv", ".parquet")):
            raise ConfigError(
                f"output={self.output}: is for one task; of several tasks only .csv or .parquet is written"
            )
        if self.pngs and max(of.num_classes for of in tasks.values()) > 256:
            raise ConfigError(f"output={self.output}: a PNG with colours has 256 classes at most; write .csv or .json")
        self.needs_images = bool(self.drawings)
        if options["annotations"] is not None:
            self.use_ids(Path(options["annotations"]).expanduser(), paths)

    def predict(self, images: Sequence[PredictedImage], outputs: Mapping[str, Any]) -> list[Predictions]:
        """The pixels of each class, and in COCO results its RLE; PNGs and drawings are written, too."""
        found: list[Predictions] = []
        for index, image in enumerate(images):
            of_image = {}
            for task, metadata in self.tasks.items():
                labels, probabilities = to_label_map(outputs[task][index], image.size, self.preprocessing[task])
                of_image[task] = self._classes(labels.numpy(), probabilities.numpy(), metadata.class_names)
                if image.path in self.pngs:
                    write_bytes(self.pngs[image.path], to_png(labels.numpy(), metadata.num_classes))
                if image.path in self.drawings and image.image is not None:
                    write_bytes(self.drawings[image.path], _drawing(image.image, labels.numpy(), metadata.num_classes))
            found.append(of_image)
        return found

    def resume(self, earlier: Mapping[Path, Predictions]) -> set[Path]:
        """Images whose files are there, where files are written for each."""
        return {path for path in earlier if all(of[path].exists() for of in (self.pngs, self.drawings) if of)}

    def write(self, predictions: Mapping[Path, Predictions]) -> str:
        """Write the file of all images; PNGs are written already."""
        ending = self.output.suffix.lower()
        if ending == ".json":
            write_bytes(self.output, json.dumps(self._coco(predictions)).encode())
        elif ending:
            rows = [
                (path.relative_to(self.root).as_posix(), task, *(row[key] for key in list(COLUMNS)[2:]))
                for path, of_image in predictions.items()
                for task, of_task in of_image.items()
                for row in of_task
            ]
            write_bytes(self.output, to_table(COLUMNS, rows, ending))
        drawings = {file.parent for file in self.drawings.values()}
        return str(self.output) + (f" and {min(drawings)}" if drawings else "")

    def _classes(self, labels: LabelMap, probabilities: Any, names: Sequence[str]) -> list[dict[str, Any]]:
        rows = []
        for label in np.unique(labels).tolist():
            is_class = labels == label
            row: dict[str, Any] = {"class": names[label], "pixels": int(is_class.sum())}
            row |= {"share": float(is_class.mean()), "probability": float(probabilities[is_class].mean())}
            if self.output.suffix.lower() == ".json":
                row |= {"label": label, "rle": to_rle(is_class)}
            rows.append(row)
        return sorted(rows, key=lambda row: -row["pixels"])

    def _coco(self, predictions: Mapping[Path, Predictions]) -> list[dict[str, Any]]:
        """COCO results: a mask of each class in each image; ids are those of `use_ids`, or of `numbers_of_images`."""
        ((task, metadata),) = self.tasks.items()
        ids = self.category_ids or metadata.category_ids or range(metadata.num_classes)
        names = [path.relative_to(self.root).as_posix() for path in predictions]
        numbers = [self.image_ids.get(name) for name in names] if self.image_ids else numbers_of_images(names)
        return [
            {
                "image_id": number,
                "file_name": name,
                "category_id": ids[row["label"]],
                "segmentation": row["rle"],
                "score": row["probability"],
            }
            for name, number, of_image in zip(names, numbers, predictions.values(), strict=True)
            for row in of_image[task]
            if number is not None
        ]


def to_rle(mask: Any) -> dict[str, Any]:
    """COCO's run-length encoding of a binary mask (H, W), as JSON values."""
    from pycocotools.mask import encode

    encoded = encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def to_png(labels: LabelMap, num_classes: int) -> bytes:
    """A label map (H, W) as a PNG of indices, which viewers show in the colours of the classes."""
    from vpt.plots.masks import palette

    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(palette(256).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _drawing(image: Image.Image, labels: LabelMap, num_classes: int) -> bytes:
    from vpt.plots.masks import draw_mask

    buffer = io.BytesIO()
    Image.fromarray(draw_mask(np.asarray(image), labels, num_classes)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
