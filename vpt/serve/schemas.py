"""Requests and answers of the server: jobs for the bank, and JSON schemas.

Classes derived from `BaseModel`, and the answers of the task types, are in /openapi.json.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from PIL import Image
from pydantic import BaseModel, Field
from torch import Tensor

from vpt.data.images import Decoding
from vpt.data.samples import Size
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing, letterboxed_size
from vpt.models.task_schema import TaskMetadata
from vpt.task_types.base import task_types

MAX_NAME = 200  # characters of an image name


class Problem(BaseModel):
    """Reason of a refusal."""

    detail: str = Field(examples=["no task dogs; there are pets, flowers"])


if TYPE_CHECKING:
    Prediction = dict[str, Any]
else:
    Prediction = Annotated[
        Union[*(task_type.answer for task_type in task_types().values())], Field(discriminator="task_type")
    ]


class ImageAnswer(BaseModel):
    """Predictions of all tasks for one image."""

    name: str = Field(description="the name of the uploaded file")
    width: int = Field(description="of the upright image, in pixels")
    height: int
    tasks: dict[str, Prediction]


class Answer(BaseModel):
    """Predictions for the images, in the order of the request."""

    images: list[ImageAnswer]


class TaskDescription(BaseModel):
    """A task of the server."""

    name: str
    task_type: str
    classes: list[str]
    backbone: str
    prompt: dict[str, Any] | None
    preprocessing: dict[str, Any]
    metrics: dict[str, dict[str, float | None]]
    licence: str
    note: str
    bytes: int = Field(description="memory of the task, without the backbone")


class Ready(BaseModel):
    """The server accepts predictions."""

    status: Literal["ready"] = "ready"


class Health(BaseModel):
    """State of the server."""

    status: Literal["ok"] = "ok"
    tasks: int
    waiting: int = Field(description="accepted predictions without an answer yet")
    predictions: int = Field(description="since the start; one for each image and task")
    batches: int = Field(description="since the start")
    failed_batches: int
    max_queue: int
    max_body_bytes: int
    uploads: bool = Field(description="whether task files may be uploaded and deleted")


@dataclass(frozen=True)
class Job:
    """An image, prepared for one task; sizes are height and width."""

    task: str
    preprocessing: Mapping[str, Any]
    image: Tensor  # normalised, (3, H, W)
    inner: Size  # of the part of it that is image and not padding
    size: Size  # of the upright image itself


@dataclass(frozen=True)
class Found:
    """The output of a task for one image, and the task's metadata at that time."""

    metadata: TaskMetadata
    output: Any


def clean_name(name: str | None) -> str:
    """The name of an uploaded file on one short line; unprintable characters become question marks."""
    return "".join(letter if letter.isprintable() else "?" for letter in name or "")[:MAX_NAME].strip() or "image"


def prepare(decode: Callable[[Decoding], Image.Image], tasks: Mapping[str, TaskMetadata]) -> list[Job]:
    """Decode an image as each task requires, and prepare it for the task."""
    jobs: list[Job] = []
    images: dict[Decoding, Image.Image] = {}
    prepared: dict[Preprocessing, tuple[Tensor, Size]] = {}
    for name, metadata in tasks.items():
        preprocessing = Preprocessing.from_dict(metadata.preprocessing)
        decoding = preprocessing.decoding
        if decoding not in images:
            images[decoding] = decode(decoding)
        image = images[decoding]
        size = (image.height, image.width)
        if preprocessing not in prepared:
            is_whole = preprocessing.crop_mode == "letterbox"
            inner = letterboxed_size(size, preprocessing) if is_whole else preprocessing.size
            prepared[preprocessing] = EvalTransform(preprocessing)(image), inner
        jobs.append(Job(name, metadata.preprocessing, *prepared[preprocessing], size))
    return jobs


def describe(name: str, metadata: TaskMetadata, num_bytes: int) -> TaskDescription:
    """The public description of a task, without the config of its training, which may name folders."""
    fields = ("task_type", "backbone", "prompt", "preprocessing", "metrics", "licence", "note")
    shown = {field: getattr(metadata, field) for field in fields}
    return TaskDescription(name=name, classes=metadata.class_names, bytes=num_bytes, **shown)
