"""python -m vpt.export task=FILE output=FILE: export of a task, or of a backbone for all tasks, to other runtimes."""

import importlib.util
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.config.command_line import INTERRUPTED, check_file, escape_output, fail, parse_options
from vpt.config.errors import ConfigError, config_keys
from vpt.config.schema import option

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from vpt.export.traced import Traceable
    from vpt.models.task_model import TaskModel
    from vpt.models.task_schema import TaskMetadata

INSTALL = 'uv pip install -p .venv -e ".[export]" -c constraints.txt'
FORMATS = {"onnx": ".onnx", "torch_export": ".pt2"}
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch_export": ()}
BATCH_SIZES = (1, 3)  # that the file is checked with
TOLERANCE = 1e-3
CHUNK = 16 * 1024**2  # bytes

USAGE = f"""python -m vpt.export: a task as a file for other runtimes, checked against torch on real images.

Inputs are normalised images, batches of any size; outputs are logits, or boxes and scores before non-maximum
suppression. The file is loaded again and compared; where it differs from torch by more than 0.001 nothing is written.
docs/export.md describes how to use the files. format=onnx needs the extra "export":
  {INSTALL}
Example: python -m vpt.export task=pets.safetensors output=pets.onnx"""


@dataclass
class ExportOptions:
    """Options of `python -m vpt.export`."""

    task: str = option(about="a task file", shown="FILE")
    output: str = option(about=".onnx, or .pt2 for torch_export", shown="FILE")
    format: str = option("onnx", choices=tuple(FORMATS))
    shared: bool = option(
        False,
        "true: the backbone alone, with prompts and heads as inputs, so that one file serves every task of this "
        "backbone, mixed in a batch; it is checked with the task, or with several, task=FILE,FILE",
    )
    input: str | None = option(
        None, "an image, or a folder of images, to check on; by default images of the package", shown="PATH"
    )
    backbone: str | None = option(None, "timm name of the backbone, by default that of the task file", shown="NAME")
    checkpoint: str | None = option(None, "weights of the backbone, if not those of timm, or moved", shown="FILE")


def main() -> None:
    """Read the options, export, print what was written."""
    escape_output()
    try:
        export(parse_options(ExportOptions, sys.argv[1:], USAGE))
    except KeyboardInterrupt:
        fail(RuntimeError("interrupted; nothing was written"), INTERRUPTED)
    except (ValueError, TypeError, OSError) as error:
        fail(error)


def export(options: ExportOptions) -> None:
    """Trace, write, load again and compare with torch; only then is the output written."""
    output = Path(options.output).expanduser()
    check_file("output", output, [FORMATS[options.format]])
    if missing := [name for name in PACKAGES[options.format] if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"format={options.format} needs {', '.join(missing)}, not installed; type {INSTALL}")
    paths = _task_files(options)

    from vpt.export.files import describe_backbone, describe_task, write_model
    from vpt.export.packing import pack_tasks
    from vpt.export.traced import ExportedModel, SharedModel
    from vpt.models.task_file import read_task
    from vpt.storage.files import write_chunks

    start = time.monotonic()
    tasks = [read_task(path) for path in paths]
    _check_tasks(options, paths, tasks)
    images = _read_images(options, tasks[0])
    print(f"exporting {paths[0]} as {output}, which takes up to some minutes", file=sys.stderr)
    models = _load(options, paths, tasks)
    model = SharedModel(models[0].backbone.vit) if options.shared else ExportedModel(models[0])
    packed = pack_tasks(paths, models[0].backbone.depth) if options.shared else None
    described = describe_backbone(tasks[0]) if options.shared else describe_task(tasks[0])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"model{output.suffix.lower()}")
        write_model(model, file, described)
        difference = _largest_difference(file, models, tasks, images, packed)
        if not difference <= TOLERANCE:
            raise ConfigError(
                f"output={output}: its results differ from torch's by {difference:.2g}, more than {TOLERANCE:g}; "
                f"nothing was written, try format={'torch_export' if options.format == 'onnx' else 'onnx'}"
            )
        with file.open("rb") as opened:
            write_chunks(output, iter(lambda: opened.read(CHUNK), b""), file.stat().st_size)
    print(_table(model))
    seconds = time.monotonic() - start
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB in {seconds:.0f} s; largest difference {difference:.1e}")


def _task_files(options: ExportOptions) -> list[Path]:
    """The task files that are named; several only to check a shared model with."""
    is_one = not options.shared or Path(options.task).expanduser().is_file()
    paths = [Path(word).expanduser() for word in ([options.task] if is_one else options.task.split(","))]
    for path in paths:
        if not path.is_file():
            hint = "" if options.shared or "," not in options.task else "; several are for shared=true"
            raise ConfigError(f"task={path}: no such file{hint}")
    return paths


def _check_tasks(options: ExportOptions, paths: Sequence[Path], tasks: Sequence["TaskMetadata"]) -> None:
    """Refuse tasks that cannot be exported, before the backbone is loaded."""
    from vpt.export.packing import check_shareable
    from vpt.models.task_model import model_named

    for path, task in zip(paths, tasks, strict=True):
        if options.shared:
            check_shareable(path, task, tasks[0])
        elif (reason := model_named(task.task_type).why_not_exported(task.head)) is not None:
            raise ConfigError(f"task={path}: {reason}")
        if (size := task.preprocessing["size"]) != (first := tasks[0].preprocessing["size"]):
            raise ConfigError(f"task={path}: made for images of {size} px, the first task for {first} px")


def _read_images(options: ExportOptions, task: "TaskMetadata") -> list["Image"]:
    """As many images as the largest batch needs; where there are fewer, some are repeated."""
    from vpt.data.image_files import find_images
    from vpt.data.images import read_image
    from vpt.data.transforms.preprocessing import Preprocessing
    from vpt.task_types.base import task_type_named

    root = (
        task_type_named(task.task_type).sample_images() if options.input is None else Path(options.input).expanduser()
    )
    if not (paths := find_images(root)):
        raise ConfigError(f"input={root}: contains no images")
    num = max(BATCH_SIZES)
    decoding = Preprocessing.from_dict(task.preprocessing).decoding
    return [read_image(paths[number * len(paths) // num], decoding) for number in range(num)]


def _load(options: ExportOptions, paths: Sequence[Path], tasks: Sequence["TaskMetadata"]) -> list["TaskModel"]:
    """The models of the tasks, all on one backbone; adapters that are changes of weights are folded into them."""
    from vpt.models.adapters import fold_adapters
    from vpt.models.task_file import load_task
    from vpt.models.vit import load_vit

    size = tuple(tasks[0].preprocessing["size"])
    with config_keys(name="backbone"):
        vit = load_vit(options.backbone or tasks[0].backbone, checkpoint=options.checkpoint, img_size=size)
    models = [load_task(path, vit) for path in paths]
    for model in models:
        fold_adapters(model.backbone.vit)
    return models


def _table(model: "Traceable") -> str:
    """Names, shapes and dtypes of inputs and outputs."""
    import torch

    from vpt.engine.console import format_table

    given = model.examples()
    with torch.no_grad():
        made = model(*given.values())
    found = dict(zip(model.outputs, (made,) if isinstance(made, torch.Tensor) else made, strict=True))
    rows = []
    for side, free, tensors in (("input", model.inputs, given), ("output", model.outputs, found)):
        for name, axes in free.items():
            shape = [axes.get(axis, str(length)) for axis, length in enumerate(tensors[name].shape)]
            rows.append([side, name, f"({', '.join(shape)})", str(tensors[name].dtype).removeprefix("torch.")])
    return format_table(rows, header=["", "name", "shape", "type"])


def _largest_difference(
    file: Path,
    models: Sequence["TaskModel"],
    tasks: Sequence["TaskMetadata"],
    samples: Sequence["Image"],
    packed: "dict[str, NDArray[Any]] | None",
) -> float:
    """Largest difference of the file's results from the models'; pixels by the longer side of the input; nan if any."""
    import numpy as np
    import torch

    from vpt.data.transforms.images import EvalTransform
    from vpt.data.transforms.preprocessing import Preprocessing
    from vpt.export.files import open_model
    from vpt.export.traced import outputs_of

    run = open_model(file)
    transforms = [EvalTransform(Preprocessing.from_dict(task.preprocessing)) for task in tasks]
    differences = []
    for first in range(len(models)):
        for size in BATCH_SIZES:
            chosen = [(first + row) % len(models) for row in range(size)]
            images = torch.stack([transforms[task](sample) for task, sample in zip(chosen, samples, strict=False)])
            inputs = {"images": images.numpy()}
            found = run(inputs if packed is None else inputs | packed | {"task": np.array(chosen)})
            for row, task in enumerate(chosen):
                for name, wanted in outputs_of(models[task], images[row : row + 1]).items():
                    given = found[name][row] if packed is None else found[name][row, : models[task].num_classes]
                    unit = max(images.shape[2:]) if name in models[task].outputs_in_pixels else 1
                    differences.append(np.abs(given - wanted[0].numpy()).max() / unit)
    return float(np.max(differences))


if __name__ == "__main__":
    main()
