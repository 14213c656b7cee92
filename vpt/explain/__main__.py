"""python -m vpt.explain run=FOLDER input=PATH output=FOLDER: attention maps and prompt tokens of a task."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vpt.config.command_line import INTERRUPTED, check_folder, escape_output, fail, name_task_files, parse_options, tell
from vpt.config.errors import ConfigError
from vpt.config.schema import option

if TYPE_CHECKING:
    from vpt.data.transforms.preprocessing import Preprocessing
    from vpt.explain.numbers import ImageView
    from vpt.models.task_model import TaskModel

UNREADABLE = 1

USAGE = """python -m vpt.explain: attention maps and prompt tokens of a task.

It writes
  image_00.png, ...          attention of CLS over an image, without and with the prompt, and of patches to the prompt
  prompt.png                 attention to the prompt, and the number of tokens in use, over the blocks
  similarity.png             cosines of the prompt tokens
  nearest_block_00.png, ...  the patches of these images that are most similar to them
  explain.json               all numbers, of all blocks
and the same for TensorBoard, with the block as the step. docs/explain.md describes the figures.

Without a prompt there are attention maps only. Images that cannot be read are listed and skipped; the exit code is
then 1.
Example: python -m vpt.explain run=runs/quickstart input=photos output=explained"""


@dataclass
class ExplainOptions:
    """Options of `python -m vpt.explain`."""

    input: str = option(
        about="an image, a folder with its sub-folders, or a pattern in quotes such as 'photos/**/*.jpg'", shown="PATH"
    )
    output: str = option(about="a new folder, or one that this command wrote", shown="FOLDER")
    run: str | None = option(None, "a run folder, such as runs/quickstart", shown="FOLDER")
    task: str | None = option(None, "instead of run: a task file", shown="FILE")
    max_images: int = option(8, "of more images as many are taken, evenly spread", low=1, high=64)
    blocks: str | None = option(
        None, "blocks with pages of their own: all, first:k, last:k or 0,5,11; by default four", shown="all"
    )
    checkpoint: str | None = option(None, "weights of the backbone, if not those of timm, or moved", shown="FILE")
    device: str = option("auto", "auto, cpu, cuda, ...")


def main() -> None:
    """Read the options and write the folder."""
    escape_output()
    try:
        unreadable = explain(parse_options(ExplainOptions, sys.argv[1:], USAGE))
    except KeyboardInterrupt:
        fail(RuntimeError("interrupted; the output may lack figures"), INTERRUPTED)
    except (ValueError, TypeError, OSError) as error:
        fail(error)
    if unreadable:
        sys.exit(UNREADABLE)


def explain(options: ExplainOptions) -> list[str]:
    """Explain images and write the results; return a line for each image that cannot be read."""
    output = Path(options.output).expanduser()
    paths, num_found = _find(options)
    _check_output(output)
    from vpt.explain.numbers import explain_images
    from vpt.explain.pages import write_explanation
    from vpt.models.vit import check_input_size

    model, preprocessing, origin = _open(options)
    check_input_size(model.backbone.vit)
    blocks = _choose_blocks(options.blocks, model.backbone.depth)
    images, unreadable = _read(paths, preprocessing)
    for line in unreadable:
        print(f"skipped: {line}", file=sys.stderr)
    if not images:
        tell(ConfigError(f"input={options.input}: none of its images can be read; nothing was written"))
        return unreadable
    explanation = explain_images(origin, model, images, blocks)
    pages = write_explanation(explanation, output)
    of = f"{len(images)} of {num_found}" if num_found > len(images) else f"{len(images)}"
    print(f"{of} images explained, {len(pages)} figures and explain.json written to {output}")
    if explanation.note:
        print(f"note: {explanation.note}")
    return unreadable


def _find(options: ExplainOptions) -> tuple[list[Path], int]:
    """Images of the input, evenly spread, and the number of all."""
    from vpt.build import spread
    from vpt.data.image_files import describe_unread, find_images
    from vpt.data.images import EXTENSIONS
    from vpt.predict.inputs import is_video

    path = Path(options.input).expanduser()
    if is_video(path):
        raise ConfigError(f"input={options.input}: is a video; save its frames as images")
    left_out: list[Path] = []
    found = find_images(path, left_out)
    what = describe_unread(left_out) if left_out else ", ".join(sorted(EXTENSIONS))
    if not found:
        raise ConfigError(f"input={options.input}: has no images that can be read ({what})")
    if left_out:
        print(f"left out: {what}", file=sys.stderr)
    return [found[index] for index in spread(len(found), options.max_images)], len(found)


def _check_output(output: Path) -> None:
    """Never mix figures with files of the user or of a run."""
    from vpt.explain.pages import is_own_folder

    check_folder("output", output)
    if not is_own_folder(output):
        raise ConfigError(f"output={output}: has other files; name a new folder, such as output={output / 'explain'}")


def _open(options: ExplainOptions) -> "tuple[TaskModel, Preprocessing, str]":
    """The task, its preprocessing, and the option that names it."""
    from vpt.build import load_run, pick_device
    from vpt.data.transforms.preprocessing import Preprocessing
    from vpt.models.task_file import load_task, read_task

    if options.task is not None and options.run is not None:
        raise ConfigError(f"task={options.task} and run={options.run}: name a task file or a run, not both")
    if options.run is not None:
        run = load_run(Path(options.run).expanduser(), checkpoint=options.checkpoint, device=options.device)
        return run.model, run.preprocessing, f"run={options.run}"
    if options.task is None:
        raise ConfigError("run is needed: type run=FOLDER, or task=FILE")
    paths = list(name_task_files("task", options.task).values())
    if len(paths) > 1:
        raise ConfigError(f"task={options.task}: one task is explained at a time; name one file")
    metadata = read_task(paths[0])
    model = load_task(paths[0], metadata.backbone, checkpoint=options.checkpoint).to(pick_device(options.device))
    return model, Preprocessing.from_dict(metadata.preprocessing), f"task={options.task}"


def _choose_blocks(text: str | None, depth: int) -> tuple[int, ...]:
    """Block indices of the option; by default four, the first and the last among them."""
    from vpt.build import spread
    from vpt.models.prompts import resolve_blocks

    if text is None:
        return tuple(spread(depth, 4))
    words = [word.strip() for word in text.split(",")]
    is_list = all(word.removeprefix("-").isdecimal() for word in words)
    return resolve_blocks([int(word) for word in words] if is_list else text, depth, key="blocks")


def _read(paths: list[Path], preprocessing: "Preprocessing") -> "tuple[list[ImageView], list[str]]":
    """Images as the backbone receives them, and why others cannot be read."""
    from vpt.data.images import ImageError, read_image
    from vpt.explain.numbers import view_image

    images, unreadable = [], []
    for path in paths:
        try:
            images.append(view_image(str(path), read_image(path, preprocessing.decoding), preprocessing))
        except ImageError as error:
            unreadable.append(str(error))
    return images, unreadable


if __name__ == "__main__":
    main()
