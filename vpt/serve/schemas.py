"""From an uploaded picture to what the bank runs, and from what it finds to JSON values.

The classes that derive from `BaseModel` are what /openapi.json says of the answers.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import torch
from PIL import Image
from pydantic import BaseModel, Field
from torch import Tensor

from vpt.data.images import FORMATS, ImageError, read_image
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing, letterboxed_size
from vpt.models.task_schema import TaskMetadata
from vpt.task_types.detection import to_original

MAX_RATIO = 100  # of a picture's sides: a line of pixels would be resized to one that fills the memory
MAX_NAME = 200  # characters of a picture's name


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str = Field(examples=["no task dogs; there are pets, flowers"])


class ClassProbability(BaseModel):
    """A class and its probability."""

    class_: str = Field(serialization_alias="class", examples=["beagle"])
    probability: float = Field(examples=[0.93])


class FoundBox(BaseModel):
    """A box that was found."""

    class_: str = Field(serialization_alias="class", examples=["tree"])
    score: float = Field(examples=[0.71])
    box: tuple[float, float, float, float] = Field(
        description="x1, y1, x2, y2 in pixels of the upright picture, from its upper left corner"
    )


class Classification(BaseModel):
    """The most probable classes, the best first."""

    kind: Literal["classification"] = "classification"
    predictions: list[ClassProbability]


class Detection(BaseModel):
    """The boxes, the best first."""

    kind: Literal["detection"] = "detection"
    predictions: list[FoundBox]


Prediction = Annotated[Classification | Detection, Field(discriminator="kind")]


class PictureAnswer(BaseModel):
    """What the tasks say of one picture."""

    name: str = Field(description="the name of the uploaded file")
    width: int = Field(description="of the upright picture, in pixels")
    height: int
    tasks: dict[str, Prediction]


class Answer(BaseModel):
    """What the tasks say of the pictures, in the order in which they came."""

    pictures: list[PictureAnswer]


class TaskDescription(BaseModel):
    """A task that can be asked."""

    name: str
    kind: Literal["classification", "detection"]
    classes: list[str]
    backbone: str
    prompt: dict[str, Any] | None
    preprocessing: dict[str, Any]
    metrics: dict[str, dict[str, float | None]]
    licence: str
    note: str
    bytes: int = Field(description="memory that the task takes beside the backbone")


class Health(BaseModel):
    """How the server is."""

    status: Literal["ok"] = "ok"
    tasks: int
    waiting: int = Field(description="predictions that were accepted and are not answered yet")
    predictions: int = Field(description="that were made since the start; one for each picture and task")
    batches: int = Field(description="that they took")
    failed_batches: int
    max_queue: int
    max_body_bytes: int
    uploads: bool = Field(description="whether task files may be put and deleted")


@dataclass(frozen=True)
class Wanted:
    """How much of what was found to tell."""

    top_k: int = 5
    min_score: float = 0.25
    max_detections: int = 100


@dataclass(frozen=True)
class Upload:
    """A picture file as it came."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Job:
    """A picture, prepared for a task.

    Args:
        task: Its name.
        preprocessing: How the picture was prepared.
        image: Normalised, (3, H, W).
        inner: Height and width of what is picture in it.
        size: Height and width of the upright picture itself.
    """

    task: str
    preprocessing: Mapping[str, Any]
    image: Tensor
    inner: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Found:
    """What a task found in a picture: its logits (K,) or its detection, and the task's metadata at that time."""

    metadata: TaskMetadata
    result: Any


def clean_name(name: str | None) -> str:
    """The name of an uploaded file on one short line; what cannot be printed becomes a question mark."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in name or "")
    return printable[:MAX_NAME].strip() or "picture"


def prepare(upload: Upload, tasks: Mapping[str, TaskMetadata]) -> list[Job]:
    """Decode a picture, and prepare it for each task in the task's own way.

    Raises:
        ImageError: It cannot be used; the message begins with its name.
    """
    picture = read_upload(upload)
    size = (picture.height, picture.width)
    prepared: dict[Preprocessing, tuple[Tensor, tuple[int, int]]] = {}
    jobs = []
    for name, metadata in tasks.items():
        preprocessing = Preprocessing.from_dict(metadata.preprocessing)
        if preprocessing not in prepared:
            is_whole = preprocessing.crop_mode == "letterbox"
            inner = letterboxed_size(size, preprocessing) if is_whole else preprocessing.size
            prepared[preprocessing] = EvalTransform(preprocessing)(picture), inner
        jobs.append(Job(name, metadata.preprocessing, *prepared[preprocessing], size))
    return jobs


def read_upload(upload: Upload) -> Image.Image:
    """Decode a picture from memory, as `read_image` does from a file.

    Raises:
        ImageError: It cannot be used; the message begins with its name.
    """
    try:
        picture = read_image(cast(Any, _NamedBytes(upload)))
    except TypeError as error:  # looking for a file of its name, to say whether it is empty
        what = "not an image, or its header is broken" if upload.data else "the file is empty"
        raise ImageError(f"{upload.name}: {what}; pictures are {', '.join(FORMATS)}") from error
    sides = sorted(picture.size)
    if sides[1] > MAX_RATIO * sides[0]:
        raise ImageError(f"{upload.name}: {picture.width} x {picture.height} pixels are a line, not a picture; crop it")
    return picture


def prediction_of(found: Found, size: tuple[int, int], wanted: Wanted) -> Classification | Detection:
    """What was found in a picture of this height and width, as JSON knows it.

    Raises:
        ArithmeticError: The task gives numbers that are none.
    """
    classes = class_names(found.metadata)
    if found.metadata.kind == "detection":
        return _detection_of(found, classes, size, wanted)
    probabilities = found.result.float().softmax(dim=0)
    if not probabilities.isfinite().all():
        raise ArithmeticError("logits are not finite numbers")
    best = probabilities.topk(min(wanted.top_k, len(classes)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Classification(
        predictions=[ClassProbability(class_=classes[label], probability=value) for label, value in pairs]
    )


def class_names(metadata: TaskMetadata) -> Sequence[str]:
    """Names of the classes; their numbers when nobody named them."""
    return metadata.classes or [str(label) for label in range(metadata.num_classes)]


def describe(name: str, metadata: TaskMetadata, num_bytes: int) -> TaskDescription:
    """What a client should know of a task; the config of its training stays here, it may name folders."""
    return TaskDescription(
        name=name,
        kind=metadata.kind,
        classes=list(class_names(metadata)),
        backbone=metadata.backbone,
        prompt=metadata.prompt,
        preprocessing=metadata.preprocessing,
        metrics=metadata.metrics,
        licence=metadata.licence,
        note=metadata.note,
        bytes=num_bytes,
    )


def _detection_of(found: Found, classes: Sequence[str], size: tuple[int, int], wanted: Wanted) -> Detection:
    preprocessing = Preprocessing.from_dict(found.metadata.preprocessing)
    detection = to_original(found.result, size, preprocessing)
    if not all(bool(torch.isfinite(detection[key]).all()) for key in ("boxes", "scores")):
        raise ArithmeticError("boxes are not finite numbers")
    rows = zip(*(detection[key].tolist() for key in ("boxes", "scores", "labels")), strict=True)
    boxes = [
        FoundBox(class_=classes[label], score=score, box=tuple(box))
        for box, score, label in rows
        if score >= wanted.min_score
    ]
    return Detection(predictions=boxes[: wanted.max_detections])


class _NamedBytes(io.BytesIO):
    """A file in memory with a name for messages."""

    def __init__(self, upload: Upload) -> None:
        super().__init__(upload.data)
        self._name = upload.name

    def __str__(self) -> str:
        return self._name
