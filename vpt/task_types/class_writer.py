"""Writer of predicted classes: CSV, parquet or JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from vpt.predictions.classes import to_class_json, to_class_table
from vpt.storage.files import write_bytes
from vpt.task_types.writer import PredictedImage, Predictions, PredictionWriter

TOP_K = 5


class ClassWriter(PredictionWriter):
    """The most probable classes of each image; see `PredictionWriter`."""

    options: ClassVar[Sequence[str]] = ("top_k",)

    def __init__(self, tasks: Any, origin: str, options: Mapping[str, Any], root: Path, paths: Sequence[Path]) -> None:
        super().__init__(tasks, origin, options, root, paths)
        self.check_output(paths)
        self.top_k = options["top_k"] or TOP_K

    def predict(self, images: Sequence[PredictedImage], outputs: Mapping[str, Any]) -> list[Predictions]:
        """Labels and probabilities from logits (B, K)."""
        found: list[dict[str, Any]] = [{} for _ in images]
        for task in self.tasks:
            probabilities = outputs[task].float().softmax(dim=1).cpu()
            if not probabilities.isfinite().all():
                raise ValueError(f"task {task}: its logits are not finite numbers; train it again")
            top = probabilities.topk(min(self.top_k, probabilities.shape[1]), dim=1)
            for of_image, labels, values in zip(found, top.indices.tolist(), top.values.tolist(), strict=True):
                of_image[task] = list(zip(labels, values, strict=True))
        return list(found)

    def write(self, predictions: Mapping[Path, Predictions]) -> str:
        """Write the file."""
        typed = {str(path): of_image for path, of_image in predictions.items()}
        ending, classes = self.output.suffix.lower(), {name: of.class_names for name, of in self.tasks.items()}
        is_json = ending == ".json"
        write_bytes(self.output, to_class_json(typed, classes) if is_json else to_class_table(typed, classes, ending))
        return str(self.output)

    def from_record(self, path: Path, record: Mapping[str, Any]) -> Predictions:
        """Labels and probabilities."""
        return {task: [(label, value) for label, value in top] for task, top in record.items()}
