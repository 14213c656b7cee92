"""Tasks loaded for predictions, from a run or from task files."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from vpt import build
from vpt.config.command_line import name_task_files
from vpt.config.errors import ConfigError
from vpt.data.images import Decoding
from vpt.data.samples import Size
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing, letterboxed_size
from vpt.engine.steps import autocast
from vpt.models.task_file import read_task
from vpt.models.task_model import Sizes
from vpt.models.task_schema import TaskMetadata


@dataclass(frozen=True)
class Prepared:
    """An image, ready for all tasks."""

    size: Size  # height and width in pixels
    inputs: Mapping[Preprocessing, Tensor]  # (3, H, W)
    image: Image.Image | None  # RGB, where it is still needed


@dataclass(frozen=True)
class OpenTasks:
    """Tasks of one type on one backbone, ready to predict."""

    origin: str  # the option that named them, such as "run=runs/quickstart"
    metadata: Mapping[str, TaskMetadata]  # by name of the task
    digests: Mapping[str, str]  # SHA-256 of each file that they come from, by a name for messages
    # Images on the device, names and sizes -> the output of each task, see `TaskBank.every`.
    infer: Callable[[Tensor, Sequence[str], Sizes], Mapping[str, Any]]
    select: Callable[[str, Any], None]  # of a task by name, see `TaskModel.select`
    device: torch.device
    precision: Literal["fp32", "bf16"]  # of the forward pass

    @property
    def task_type(self) -> str:
        """The type of all tasks."""
        return next(iter(self.metadata.values())).task_type

    @cached_property
    def preprocessings(self) -> dict[str, Preprocessing]:
        """The preprocessing of each task."""
        return {name: Preprocessing.from_dict(of.preprocessing) for name, of in self.metadata.items()}

    def prepare(self, read: Callable[[Decoding], Image.Image], keeps_image: bool = False) -> Prepared:
        """Prepare an image for all tasks; `read` decodes it, upright RGB; may be called from any thread."""
        wanted = dict.fromkeys(self.preprocessings.values())
        images = {decoding: read(decoding) for decoding in dict.fromkeys(each.decoding for each in wanted)}
        inputs = {each: EvalTransform(each)(images[each.decoding]) for each in wanted}
        image = next(iter(images.values()))
        return Prepared((image.height, image.width), inputs, image if keeps_image else None)


def run_model(tasks: OpenTasks, batch: Sequence[Prepared]) -> dict[str, Any]:
    """The outputs for B images by task: logits (B, K), or a list of B detections in pixels of the input.

    Tasks with the same preprocessing share one pass through the blocks that they have in common.
    """
    results: dict[str, Any] = {}
    for preprocessing in dict.fromkeys(tasks.preprocessings.values()):
        names = [name for name, wanted in tasks.preprocessings.items() if wanted == preprocessing]
        images = torch.stack([prepared.inputs[preprocessing] for prepared in batch]).to(tasks.device)
        sizes = [letterboxed_size(prepared.size, preprocessing) for prepared in batch]
        with torch.inference_mode(), autocast(tasks.device, tasks.precision):
            results |= tasks.infer(images, names, sizes)
    return results


def open_run(run_dir: Path, *, checkpoint: str | None, device: str) -> OpenTasks:
    """The task of a run, on the backbone and in the precision of its config; errors are those of `build.load_run`."""
    run = build.load_run(run_dir, checkpoint=checkpoint, device=device)
    model, name = run.model, run_dir.absolute().name
    where = next(model.parameters()).device
    return OpenTasks(
        origin=f"run={run_dir}",
        metadata={name: run.metadata},
        digests={file: _sha256(run_dir / file) for file in ("task.safetensors", "config.yaml")},
        infer=lambda images, names, sizes: {name: model.predict(images, sizes)},
        select=lambda name, selection: model.select(selection),
        device=where,
        precision=build.choose_precision(run.config, where),
    )


def open_task_files(text: str, *, checkpoint: str | None, device: str) -> OpenTasks:
    """Tasks of one type on the backbone that their files, separated by commas, name; by the names of the files.

    Raises:
        ConfigError: A file does not exist, two have one name, or they are of different types.
        ValueError, FileNotFoundError: A file or the backbone cannot be used.
    """
    paths = name_task_files("task", text)
    types = {name: read_task(path).task_type for name, path in paths.items()}
    first = next(iter(types))
    for name, task_type in types.items():
        if task_type != types[first]:
            odd = f"{first} is a {types[first]} task and {name} a {task_type} task"
            raise ConfigError(f"task={text}: {odd}; predict them separately")
    bank = build.open_bank(paths, checkpoint=checkpoint, device=device)
    return OpenTasks(
        origin=f"task={text}",
        metadata={name: bank.metadata(name) for name in paths},
        digests={f"task {name}": _sha256(path) for name, path in paths.items()},
        infer=lambda images, names, sizes: bank.every(images, names, sizes=sizes),
        select=bank.select,
        device=bank.device,
        precision="bf16" if bank.device.type == "cuda" else "fp32",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
