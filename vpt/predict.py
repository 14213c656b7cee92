"""python -m vpt.predict run=RUN input=PATH output=FILE: the classes of pictures, or the boxes in them."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vpt.command_line import INTERRUPTED, fail, parse_options, tell
from vpt.config import ConfigError, number

if TYPE_CHECKING:
    from PIL.Image import Image

    from vpt.data.video import Video

    Batches = Iterator[tuple[list[Path], list[Image], list[str]]]  # paths, pictures, what is wrong with the others

UNREADABLE = 1

USAGE = """python -m vpt.predict: classes of pictures, or boxes in them, by the task of a trained run.

  run=FOLDER           a run folder, such as runs/quickstart
  input=PATH           a picture, a folder that is searched for pictures, below it too, or a video
  every=1              of a video every n-th frame, as the picture VIDEO/000012.jpg
  output=FILE          .csv or .json; for boxes .json is COCO results, and a folder gets YOLO text files
  checkpoint=FILE      weights of the backbone, when they have moved
  batch_size=32  device=auto

Classification:
  top_k=5              classes for each picture, most probable first
Detection:
  pictures=FOLDER      the pictures with their boxes drawn on them go there, too, as .jpg
  min_score=0.25       least score of a box
  max_overlap=0.6      two boxes of a class that overlap more (IoU) are one
  max_detections=100   most boxes in a picture
  classes=NAME,NAME    only these; all without; a name with a comma stands in quotes: classes='"NAME, TOO",NAME'

The image_id of COCO results is the number that a picture's file is called by, as 000139.jpg is, if all are; else
pictures are counted 1, 2, ... Beside it stands the file_name, below the folder of the input.
No picture of the input and no YOLO text file that is there already is overwritten; other files are.
Pictures that cannot be read are listed and skipped; the exit code is then 1.
Example: python -m vpt.predict run=runs/quickstart input=photos output=preds.csv"""


@dataclass
class PredictOptions:
    """Options of `python -m vpt.predict`; what is None is for the other kind of task, or has its default there."""

    run: str
    input: str
    output: str
    every: int | None = number(None, low=1)
    top_k: int | None = number(None, low=1)
    pictures: str | None = None
    min_score: float | None = number(None, low=0, high=0.999)  # no score is above 1
    max_overlap: float | None = number(None, above=0, high=1)
    max_detections: int | None = number(None, low=1)
    classes: str | None = None
    checkpoint: str | None = None
    batch_size: int = number(32, low=1)
    device: str = "auto"


def main() -> None:
    """Read the options, predict, write the file."""
    try:
        unreadable = predict_run(parse_options(PredictOptions, sys.argv[1:], USAGE))
    except KeyboardInterrupt:
        what = "interrupted; .csv and .json are written at the end only, drawn pictures and YOLO text files so far stay"
        fail(RuntimeError(what), INTERRUPTED)
    except (ValueError, TypeError, OSError) as error:
        fail(error)
    if unreadable:
        sys.exit(UNREADABLE)


def predict_run(options: PredictOptions) -> list[str]:
    """Predict all pictures of the input and write what is found; return a line for each that cannot be read."""
    from vpt import build
    from vpt.engine.console import Progress
    from vpt.predictions import predictions_of

    root = Path(options.input).expanduser()
    paths, batches = _find(root, options)
    run = build.load_run(Path(options.run).expanduser(), checkpoint=options.checkpoint, device=options.device)
    predictions = predictions_of(run, options, root, paths)
    unreadable: list[str] = []
    with Progress(total=-(-len(paths) // options.batch_size), description="predict") as progress:
        for chunk, pictures, errors in batches:
            unreadable += errors
            if chunk:
                predictions.add(chunk, pictures)
            progress.advance(len(chunk))
    num_read = len(paths) - len(unreadable)
    if num_read:
        print(f"{num_read} pictures predicted, {predictions.write()} written")
    for line in unreadable:
        print(f"skipped: {line}", file=sys.stderr)
    if not num_read:
        tell(
            ConfigError(f"input={options.input}: none of its pictures can be read ({len(paths)}); nothing was written")
        )
    return unreadable


def _find(root: Path, options: PredictOptions) -> tuple[list[Path], "Batches"]:
    """The pictures of the input, or the frames of a video: their paths, and batches of them."""
    from vpt.data import video
    from vpt.data.images import EXTENSIONS, find_images

    if root.suffix.lower() in video.EXTENSIONS and not root.is_dir():
        clip = video.Video(root, options.every or 1)
        return clip.names, _frames(clip, options.batch_size)
    if options.every is not None:
        raise ConfigError(f"every={options.every} is for a video, and input={options.input} is none: leave it out")
    paths = find_images(root)
    if not paths:
        raise ConfigError(f"input={options.input}: holds no pictures ({', '.join(sorted(EXTENSIONS))})")
    return paths, _batches(paths, options.batch_size)


def _frames(clip: "Video", size: int) -> "Batches":
    """The frames of a video, batch by batch; none is unreadable."""
    pairs = zip(clip.names, clip.frames(), strict=True)
    while batch := list(itertools.islice(pairs, size)):
        yield [path for path, _ in batch], [frame for _, frame in batch], []


def _batches(paths: Sequence[Path], size: int) -> "Batches":
    """Readable pictures, and what is wrong with the others, batch by batch."""
    from vpt.data.images import ImageError, read_image

    def read(path: Path) -> "Image | str":
        try:
            return read_image(path)
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(max_workers=4) as pool:
        for start in range(0, len(paths), size):
            chunk = paths[start : start + size]
            read_or_error = list(zip(chunk, pool.map(read, chunk), strict=True))
            good = [(path, picture) for path, picture in read_or_error if not isinstance(picture, str)]
            errors = [picture for _, picture in read_or_error if isinstance(picture, str)]
            yield [path for path, _ in good], [picture for _, picture in good], errors


if __name__ == "__main__":
    main()
