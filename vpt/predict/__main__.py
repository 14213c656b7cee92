"""python -m vpt.predict task=FILE input=PATH output=FILE: classes of images, boxes in them, or masks."""

import itertools
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.config.command_line import INTERRUPTED, escape_output, fail, parse_options, tell
from vpt.config.errors import ConfigError
from vpt.config.schema import option

if TYPE_CHECKING:
    from vpt.predict.inputs import Inputs
    from vpt.predict.open_tasks import OpenTasks
    from vpt.predict.progress_file import ProgressFile
    from vpt.task_types.writer import Predictions, PredictionWriter

    Results = dict[Path, Predictions | str]  # by image: its predictions, or why it cannot be read

UNREADABLE = 1

USAGE = """python -m vpt.predict: classes of images, boxes in them, or masks, by task files or the task of a run.

With several tasks, tables have a column task, and JSON the key task; COCO results, YOLO text files, PNG masks and
drawings are for one task.
The image_id and category_id of COCO results are those of annotations=FILE. Without it, the image_id is the number in
the file name, as in 000139.jpg, if all names are numbers; else images are counted 1, 2, ..., with a warning. Each
result also has the file_name, relative to the folder of the input.
No image of the input and no existing YOLO text file is overwritten; other files are.
Images that cannot be read are listed and skipped; the exit code is then 1.
Without output, the predictions for a single image are printed: class and probability; class,
score and box; or class, share of the image and mean probability.

Results are stored in OUTPUT.partial until all are done. If the command was stopped, type it again: it resumes after
them, and predicts again only what has changed meanwhile; batch_size, device and checkpoint may be others. Another
command is refused until OUTPUT.partial is deleted. Drawings are written at once, all other files at the end.
Example: python -m vpt.predict task=pets.safetensors,flowers.safetensors input=photos output=found.csv"""


@dataclass
class PredictOptions:
    """Options of `python -m vpt.predict`; None is for another type of task, or the default of this one."""

    input: str = option(
        about="an image, a folder with its sub-folders, a pattern in quotes such as 'photos/**/*.jpg', or a video",
        shown="PATH",
    )
    output: str | None = option(
        None,
        ".csv, .parquet or .json; for boxes and masks .json is COCO results, a folder is YOLO text files or PNG masks; "
        "without it the predictions for one image are printed",
        shown="FILE",
    )
    task: str | None = option(
        None,
        "task files of one backbone and one type of task; each is named as its file, a task.safetensors as its folder",
        shown="FILE,FILE",
    )
    run: str | None = option(None, "instead of task: a run folder, such as runs/quickstart", shown="FOLDER")
    every: int | None = option(None, "of a video every n-th frame, as the image VIDEO/000012.jpg", low=1, shown="1")
    top_k: int | None = option(None, "classification: classes per image, most probable first", low=1, shown="5")
    annotations: str | None = option(
        None, "boxes, masks, output=FILE.json: a COCO file whose ids of images and categories are used", shown="FILE"
    )
    drawings: str | None = option(None, "a folder for the images with their boxes or masks, as .jpg", shown="FOLDER")
    # no score is above 1
    min_score: float | None = option(None, "detection: least score of a box", low=0, high=0.999, shown="0.25")
    max_overlap: float | None = option(
        None, "detection: of two boxes of a class that overlap more (IoU) one is dropped", above=0, high=1, shown="0.6"
    )
    max_detections: int | None = option(None, "detection: most boxes per image", low=1, shown="100")
    classes: str | None = option(
        None,
        "detection: only these classes; a name with a comma in quotes: classes='\"NAME, TOO\",NAME'",
        shown="NAME,NAME",
    )
    checkpoint: str | None = option(None, "weights of the backbone, if not those of timm, or moved", shown="FILE")
    batch_size: int = option(32, "images per batch", low=1)
    device: str = option("auto", "auto, cpu, cuda, ...")


def main() -> None:
    """Read the options, predict, write the file."""
    escape_output()
    try:
        options = parse_options(PredictOptions, sys.argv[1:], USAGE)
    except ConfigError as error:
        fail(error)
    try:
        unreadable = predict_run(options)
    except KeyboardInterrupt:
        progress = None if options.output is None else _progress_path(options.output)
        resume = f"interrupted; type the same command again to resume; finished batches are stored in {progress}"
        is_begun = progress is not None and progress.exists()
        fail(RuntimeError(resume if is_begun else "interrupted before the first batch was done"), INTERRUPTED)
    except (ValueError, TypeError, OSError) as error:
        fail(error)
    if unreadable:
        sys.exit(UNREADABLE)


def predict_run(options: PredictOptions) -> list[str]:
    """Predict all images of the input and write the predictions; return a line for each that cannot be read."""
    from vpt.predict.progress_file import ProgressFile

    inputs = _find(options)
    for path in inputs.paths:
        if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
            raise ConfigError(f"input={options.input}: the name of {str(path)!r} is not UTF-8; rename that image")
    if options.output is None and len(inputs.paths) > 1:
        raise ConfigError(f"output is needed for {len(inputs.paths):,} images: type output=FILE.csv")
    tasks = _open(options)
    _check_options(options, tasks)
    if options.output is None:
        return _print_one(inputs, tasks, options)
    writer = _writer(options, tasks, inputs)
    progress_file = ProgressFile(_progress_path(options.output), _command(options, tasks))
    results = _earlier(inputs, writer, progress_file, options.batch_size)
    with closing(progress_file):
        results |= _predict(inputs, tasks, writer, progress_file, results, options.batch_size)
    in_order = {path: results[path] for path in inputs.paths}
    found = {path: result for path, result in in_order.items() if not isinstance(result, str)}
    unreadable = [result for result in in_order.values() if isinstance(result, str)]
    if found:
        print(f"{len(found)} images predicted, {writer.write(found)} written")
    progress_file.remove()
    for line in unreadable:
        print(f"skipped: {line}", file=sys.stderr)
    if not found:
        none = f"none of its images can be read ({len(unreadable)}); nothing was written"
        tell(ConfigError(f"input={options.input}: {none}"))
    return unreadable


def _print_one(inputs: "Inputs", tasks: "OpenTasks", options: PredictOptions) -> list[str]:
    """Print what each task finds in the only image; return why it cannot be read."""
    from vpt.predict.open_tasks import run_model
    from vpt.storage.text import printable
    from vpt.task_types.base import AnswerLimits, task_type_named

    given: dict[str, Any] = {name: getattr(options, name) for name in ("top_k", "min_score", "max_detections")}
    limits = AnswerLimits(**{name: value for name, value in given.items() if value is not None})
    for name in ("annotations", "drawings", "max_overlap", "classes"):
        if getattr(options, name) is not None:
            raise ConfigError(f"{name}={getattr(options, name)}: needs output=FILE")
    ((prepared,),) = inputs.read([inputs.paths], tasks.prepare)
    if isinstance(prepared, str):
        raise ConfigError(prepared)
    for name, (output,) in run_model(tasks, [prepared]).items():
        answer = task_type_named(tasks.task_type).to_answer(tasks.metadata[name], output, prepared.size, limits)
        for found in answer["predictions"]:
            row = [printable(str(value)) for value in found.values()]
            print(*([name] if len(tasks.metadata) > 1 else []), *row, sep="\t")
    return []


def _earlier(inputs: "Inputs", writer: "PredictionWriter", progress_file: "ProgressFile", size: int) -> "Results":
    """Stored results of images that have not changed since, in batches that are complete.

    Others are predicted again: batches of the same images give the same numbers to the last digit.
    """
    known = {_name(inputs, path): path for path in inputs.paths}
    found: dict[Path, Predictions] = {}
    errors: dict[Path, str] = {}
    for entry in progress_file.entries():
        path = known.get(entry.name)
        if path is None or inputs.stamp(path) != entry.stamp:
            continue
        if entry.error is None:
            found[path] = writer.from_record(path, entry.found)
        else:
            errors[path] = entry.error
    valid: Results = {**{path: found[path] for path in writer.resume(found)}, **errors}
    done = [chunk for chunk in _chunks(inputs, size) if valid.keys() >= set(chunk)]
    if results := {path: valid[path] for path in itertools.chain(*done)}:
        print(f"{len(results)} of {len(inputs.paths)} images were already done ({progress_file.path})")
    return results


def _predict(
    inputs: "Inputs", tasks: "OpenTasks", writer: "PredictionWriter", file: "ProgressFile", done: "Results", size: int
) -> "Results":
    """Results of the images that are not done yet; each batch is added to the progress file."""
    from vpt.engine.console import Progress
    from vpt.predict.open_tasks import run_model
    from vpt.predict.progress_file import Entry
    from vpt.task_types.writer import PredictedImage

    prepare = partial(tasks.prepare, keeps_image=writer.needs_images)
    results: Results = {}
    chunks = [chunk for chunk in _chunks(inputs, size) if not done.keys() >= set(chunk)]
    stamps = {path: inputs.stamp(path) for chunk in chunks for path in chunk}
    with Progress(len(chunks), "predict") as progress, closing(inputs.read(chunks, prepare)) as batches:
        for chunk, batch in zip(chunks, batches, strict=True):
            read = dict(zip(chunk, batch, strict=True))
            errors = {path: one for path, one in read.items() if isinstance(one, str)}
            good = {path: one for path, one in read.items() if not isinstance(one, str)}
            found: dict[Path, Predictions] = {}
            if good:
                images = [PredictedImage(path, one.size, one.image) for path, one in good.items()]
                found = dict(zip(good, writer.predict(images, run_model(tasks, [*good.values()])), strict=True))
            records = {path: writer.to_record(of_image) for path, of_image in found.items()}
            file.add([Entry(_name(inputs, path), stamps[path], records.get(path), errors.get(path)) for path in chunk])
            results |= {**found, **errors}
            progress.advance(len(good))
    return results


def _find(options: PredictOptions) -> "Inputs":
    """The images of the input, or the frames of a video."""
    from vpt.data.image_files import describe_unread
    from vpt.data.images import EXTENSIONS
    from vpt.predict.inputs import Frames, ImageFiles, is_video

    path = Path(options.input).expanduser()
    if is_video(path):
        return Frames(path, options.every or 1)
    if options.every is not None:
        raise ConfigError(f"every={options.every} is for a video, and input={options.input} is none: leave it out")
    images = ImageFiles(path)
    what = describe_unread(images.left_out) if images.left_out else ", ".join(sorted(EXTENSIONS))
    if not images.paths:
        raise ConfigError(f"input={options.input}: contains no images that can be read ({what})")
    if images.left_out:
        print(f"left out: {what}", file=sys.stderr)
    return images


def _chunks(inputs: "Inputs", size: int) -> list[Sequence[Path]]:
    return [inputs.paths[start : start + size] for start in range(0, len(inputs.paths), size)]


def _name(inputs: "Inputs", path: Path) -> str:
    """The name of an image in the progress file."""
    return path.relative_to(inputs.root).as_posix()


def _open(options: PredictOptions) -> "OpenTasks":
    """The tasks of the options."""
    from vpt.predict.open_tasks import open_run, open_task_files

    if options.task is not None and options.run is not None:
        raise ConfigError(f"task={options.task} and run={options.run}: name task files or a run, not both")
    if options.task is not None:
        return open_task_files(options.task, checkpoint=options.checkpoint, device=options.device)
    if options.run is not None:
        return open_run(Path(options.run).expanduser(), checkpoint=options.checkpoint, device=options.device)
    raise ConfigError("task is needed: type task=FILE, or run=FOLDER")


def _check_options(options: PredictOptions, tasks: "OpenTasks") -> None:
    """Refuse options that are only for other types of task."""
    from vpt.task_types.base import task_type_named, task_types

    own = task_type_named(tasks.task_type).writer.options
    for name in {name for of in task_types().values() for name in of.writer.options} - {*own}:
        if getattr(options, name, None) is not None:
            raise ConfigError(f"{name}: is not for a {tasks.task_type} task, which {tasks.origin} is")


def _writer(options: PredictOptions, tasks: "OpenTasks", inputs: "Inputs") -> "PredictionWriter":
    """The writer of the tasks' type."""
    from vpt.task_types.base import task_type_named

    writer = task_type_named(tasks.task_type).writer
    made = writer(tasks.metadata, tasks.origin, asdict(options), inputs.root, inputs.paths)
    for name, selection in made.selection.items():
        tasks.select(name, selection)
    return made


def _progress_path(output: str) -> Path:
    return Path(f"{Path(output).expanduser()}.partial")


def _command(options: PredictOptions, tasks: "OpenTasks") -> dict[str, Any]:
    """All that decides the results, by the names that messages use."""
    from vpt.version import __version__

    places = {"input": options.input, "drawings": options.drawings}
    places = {name: path and str(Path(path).expanduser().absolute()) for name, path in places.items()}
    same = ("every", "top_k", "min_score", "max_overlap", "max_detections", "classes")
    return {"vpt": __version__, **tasks.digests, **places, **{name: getattr(options, name) for name in same}}


if __name__ == "__main__":
    main()
