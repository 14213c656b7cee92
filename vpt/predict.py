"""python -m vpt.predict run=RUN input=PATH output=FILE: classes and probabilities of pictures."""

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.command_line import fail, parse_options
from vpt.config import ConfigError, number

if TYPE_CHECKING:
    from torch import Tensor

    from vpt.build import TrainedRun

UNREADABLE = 1

USAGE = """python -m vpt.predict: classes and probabilities of pictures, with the task of a trained run.

  run=FOLDER         a run folder, such as runs/quickstart
  input=PATH         a picture, or a folder that is searched for pictures, below it too
  output=FILE        .csv or .json
  top_k=5            classes for each picture, most probable first
  checkpoint=FILE    weights of the backbone, when they have moved
  batch_size=32  device=auto

Pictures that cannot be read are listed and skipped; the exit code is then 1.
Example: python -m vpt.predict run=runs/quickstart input=photos output=preds.csv"""


@dataclass
class PredictOptions:
    """Options of `python -m vpt.predict`."""

    run: str
    input: str
    output: str
    top_k: int = number(5, low=1)
    checkpoint: str | None = None
    batch_size: int = number(32, low=1)
    device: str = "auto"


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of a picture and their probabilities, most probable first."""

    path: str
    classes: list[str]
    probabilities: list[float]


def main() -> None:
    """Read the options, predict, write the file."""
    try:
        unreadable = predict_run(parse_options(PredictOptions, sys.argv[1:], USAGE))
    except (ValueError, TypeError, OSError) as error:
        fail(error)
    if unreadable:
        sys.exit(UNREADABLE)


def predict_run(options: PredictOptions) -> list[str]:
    """Predict all pictures of the input and write them; return one line for each picture that cannot be read."""
    from vpt import build
    from vpt.data.images import EXTENSIONS, find_images
    from vpt.engine.console import Progress
    from vpt.files import write_bytes

    output = Path(options.output).expanduser()
    if output.suffix not in (".csv", ".json"):
        raise ConfigError(f"output={output}: must end in .csv or .json")
    paths = find_images(Path(options.input).expanduser())
    if not paths:
        raise ConfigError(f"input={options.input}: holds no pictures ({', '.join(sorted(EXTENSIONS))})")
    run = build.load_run(Path(options.run).expanduser(), checkpoint=options.checkpoint, device=options.device)
    predictions: list[Prediction] = []
    unreadable: list[str] = []
    with Progress(total=-(-len(paths) // options.batch_size), description="predict") as progress:
        for chunk, images, errors in _batches(run, paths, options.batch_size):
            unreadable += errors
            if chunk:
                predictions += _predict(run, chunk, images, options.top_k)
            progress.advance(len(chunk))
    text = _as_csv(predictions) if output.suffix == ".csv" else _as_json(predictions)
    write_bytes(output, text.encode())
    print(f"{len(predictions)} pictures predicted, {output} written")
    for line in unreadable:
        print(f"skipped: {line}", file=sys.stderr)
    return unreadable


def _batches(
    run: "TrainedRun", paths: Sequence[Path], size: int
) -> Iterator[tuple[list[Path], list["Tensor"], list[str]]]:
    """Readable pictures with their tensors, and what is wrong with the others, batch by batch."""
    from vpt.data.images import ImageError, read_image
    from vpt.data.transforms import EvalTransform

    transform = EvalTransform(run.preprocessing)

    def read(path: Path) -> "Tensor | str":
        try:
            return transform(read_image(path))
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(max_workers=4) as pool:
        for start in range(0, len(paths), size):
            chunk = paths[start : start + size]
            read_or_error = list(zip(chunk, pool.map(read, chunk), strict=True))
            good = [(path, image) for path, image in read_or_error if not isinstance(image, str)]
            errors = [image for _, image in read_or_error if isinstance(image, str)]
            yield [path for path, _ in good], [image for _, image in good], errors


def _predict(run: "TrainedRun", paths: Sequence[Path], images: Sequence["Tensor"], top_k: int) -> list[Prediction]:
    import torch

    device = next(run.model.parameters()).device
    with torch.inference_mode():
        probabilities = run.model(torch.stack(list(images)).to(device)).float().softmax(dim=1).cpu()
    classes = run.model.classes or [str(index) for index in range(run.model.num_classes)]
    top = probabilities.topk(min(top_k, len(classes)), dim=1)
    return [
        Prediction(str(path), [classes[index] for index in indices], values)
        for path, indices, values in zip(paths, top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _as_csv(predictions: Sequence[Prediction]) -> str:
    """Columns path, class_1, probability_1, class_2, ..."""
    num = len(predictions[0].classes) if predictions else 0
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["path", *(f"{name}_{rank}" for rank in range(1, num + 1) for name in ("class", "probability"))])
    for prediction in predictions:
        pairs = zip(prediction.classes, (f"{value:.6f}" for value in prediction.probabilities), strict=True)
        writer.writerow([prediction.path, *(cell for pair in pairs for cell in pair)])
    return buffer.getvalue()


def _as_json(predictions: Sequence[Prediction]) -> str:
    """A list of {"path": ..., "predictions": [{"class": ..., "probability": ...}, ...]}."""
    rows: list[dict[str, Any]] = [
        {
            "path": prediction.path,
            "predictions": [
                {"class": name, "probability": value}
                for name, value in zip(prediction.classes, prediction.probabilities, strict=True)
            ],
        }
        for prediction in predictions
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
