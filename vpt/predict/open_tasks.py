"""Tasks that are open in memory, of a run or of task files, and what they make of pictures."""

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
from vpt.data.samples import Size
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing, letterboxed_size
from vpt.engine.steps import autocast
from vpt.models.detector import DetectionModel, Selection, Sizes
from vpt.models.task_file import read_task
from vpt.models.task_schema import Kind, TaskMetadata


@dataclass(frozen=True)
class Prepared:
    """A picture, ready for all tasks.

    Args:
        size: Its height and width.
        images: (3, H, W), by how it was prepared.
        picture: The picture itself, if it is still wanted.
    """

    size: Size
    images: Mapping[Preprocessing, Tensor]
    picture: Image.Image | None


@dataclass(frozen=True)
class OpenTasks:
    """Tasks of one kind on one backbone, ready to predict.

    Args:
        origin: How they were asked for, such as "run=runs/quickstart".
        metadata: What the file of each task says, by name.
        digests: sha256 of each file that they come from, by what a person would call it.
        infer: Images on the device, names and, for detection, sizes -> what `TaskBank.every` gives.
        select: Name of a detection task and which of its boxes are given out -> None.
        device: Where they are.
        precision: The arithmetic of the forward pass.
    """

    origin: str
    metadata: Mapping[str, TaskMetadata]
    digests: Mapping[str, str]
    infer: Callable[[Tensor, Sequence[str], Sizes | None], Mapping[str, Any]]
    select: Callable[[str, Selection], None]
    device: torch.device
    precision: Literal["fp32", "bf16"]

    @property
    def kind(self) -> Kind:
        """Kind of all tasks."""
        return next(iter(self.metadata.values())).kind

    @cached_property
    def classes(self) -> dict[str, list[str]]:
        """Names of the classes of each task; their numbers where nobody named them."""
        return {
            name: metadata.classes or [str(label) for label in range(metadata.num_classes)]
            for name, metadata in self.metadata.items()
        }

    @cached_property
    def preprocessings(self) -> dict[str, Preprocessing]:
        """How pictures are prepared for each task."""
        return {name: Preprocessing.from_dict(of.preprocessing) for name, of in self.metadata.items()}

    def prepare(self, picture: Image.Image, keeps_picture: bool = False) -> Prepared:
        """An upright RGB picture as the tasks want it; any thread may call this."""
        images = {wanted: EvalTransform(wanted)(picture) for wanted in set(self.preprocessings.values())}
        return Prepared((picture.height, picture.width), images, picture if keeps_picture else None)


def run_model(tasks: OpenTasks, batch: Sequence[Prepared]) -> dict[str, Any]:
    """Logits (B, K), or a list of B detections in pixels of the input, by task.

    Tasks whose pictures are prepared in the same way take one pass through the blocks that they have in common.
    """
    results: dict[str, Any] = {}
    for preprocessing in dict.fromkeys(tasks.preprocessings.values()):
        names = [name for name, wanted in tasks.preprocessings.items() if wanted == preprocessing]
        images = torch.stack([prepared.images[preprocessing] for prepared in batch]).to(tasks.device)
        sizes = [letterboxed_size(prepared.size, preprocessing) for prepared in batch]
        with torch.inference_mode(), autocast(tasks.device, tasks.precision):
            results |= tasks.infer(images, names, sizes if tasks.kind == "detection" else None)
    return results


def open_run(run_dir: Path, *, checkpoint: str | None, device: str) -> OpenTasks:
    """The task of a run, on the backbone and in the precision of its config.

    Raises:
        ConfigError, ValueError, FileNotFoundError: As `build.load_run` raises them.
    """
    run = build.load_run(run_dir, checkpoint=checkpoint, device=device)
    model, name = run.model, run_dir.absolute().name
    where = next(model.parameters()).device

    def infer(images: Tensor, names: Sequence[str], sizes: Sizes | None) -> dict[str, Any]:
        return {name: model(images) if sizes is None else model(images, sizes=sizes)}

    def select(name: str, selection: Selection) -> None:
        assert isinstance(model, DetectionModel)
        model.selection = selection

    return OpenTasks(
        origin=f"run={run_dir}",
        metadata={name: run.metadata},
        digests={file: _sha256(run_dir / file) for file in ("task.safetensors", "config.yaml")},
        infer=infer,
        select=select,
        device=where,
        precision=build.choose_precision(run.config, where),
    )


def open_task_files(text: str, *, checkpoint: str | None, device: str) -> OpenTasks:
    """Tasks of one kind on the backbone that their files name, by the names of the files.

    Args:
        text: Files, with commas between them; they must be of one kind.
        checkpoint: Weights of the backbone; None takes those that timm knows.
        device: "auto", "cpu", "cuda", ...

    Raises:
        ConfigError: A file is not there, two have one name, or they are of different kinds.
        ValueError, FileNotFoundError: A file or the backbone cannot be used.
    """
    paths = name_task_files("task", text)
    kinds = {name: read_task(path).kind for name, path in paths.items()}
    for name, kind in kinds.items():
        first = next(iter(kinds))
        if kind != kinds[first]:
            raise ConfigError(
                f"task={text}: {first} is a task of {kinds[first]} and {name} one of {kind}; predict them apart"
            )
    bank = build.open_bank(paths, checkpoint=checkpoint, device=device)

    def infer(images: Tensor, names: Sequence[str], sizes: Sizes | None) -> dict[str, Any]:
        return bank.every(images, names, sizes=sizes)

    return OpenTasks(
        origin=f"task={text}",
        metadata={name: bank.metadata(name) for name in paths},
        digests={f"task {name}": _sha256(path) for name, path in paths.items()},
        infer=infer,
        select=bank.select,
        device=bank.device,
        precision="bf16" if bank.device.type == "cuda" else "fp32",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
