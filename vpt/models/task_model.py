"""TaskModel: the base class of the models of all types of task, and their registry.

A task model is a prompted backbone, a head, and a neck between them where the head needs one. Tuning, task files, the
bank, exports and the training loop use this interface only and do not depend on the type of task.

A new type of task is a subclass, registered with `register_model`.

Legend: B images, H, W pixels, D embed_dim, K classes.
"""

import reprlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vpt.models.backbone import PromptedViT
from vpt.models.block_loop import read_features

Sizes = Sequence[tuple[int, int]]  # height and width of each image
Features = Tensor | list[Tensor]  # pooled, (B, D), or one map (B, D, rows, columns) for each of out_indices


class TaskModel(nn.Module, ABC):
    """A prompted backbone and what turns its features into the results of a task.

    `classes` are the K names of the classes, by label; None leaves them unnamed.

    Attributes:
        head: Features -> results; always trains.
        neck: The module between backbone and head, or None.
        out_indices: Blocks whose feature maps neck or head read; empty where they read pooled features.
        category_ids: Numbers of the classes in the data's own files, by label; None where there are none.

    Raises:
        ValueError: The number of names is not the number of classes, or two are equal.
    """

    task_type: ClassVar[str]  # in configs and task files
    preprocessing: ClassVar[Mapping[str, Any]] = {}  # what differs from the preprocessing of the backbone
    has_linear_head: ClassVar[bool] = False  # whether logits are one matrix product of pooled features
    outputs_in_pixels: ClassVar[Sequence[str]] = ()  # names of raw outputs, see `forward_tensors`
    head: nn.Module
    neck: nn.Module | None = None
    out_indices: tuple[int, ...] = ()
    category_ids: tuple[int, ...] | None

    def __init__(
        self,
        backbone: PromptedViT,
        num_classes: int,
        *,
        classes: Sequence[str] | None = None,
        category_ids: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if classes is not None and len(classes) != num_classes:
            raise ValueError(f"{len(classes)} class names for num_classes={num_classes}")
        if category_ids is not None and len(category_ids) != num_classes:
            raise ValueError(f"{len(category_ids)} category ids for num_classes={num_classes}")
        self.backbone = backbone
        self.classes = None if classes is None else tuple(classes)
        self.category_ids = None if category_ids is None else tuple(category_ids)

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """K."""

    @abstractmethod
    def forward_head(self, features: Features, sizes: Sizes | None = None) -> Any:
        """Results in eval mode, one for each image; `sizes` are height and width of the part that is not padding."""

    @abstractmethod
    def forward_tensors(self, features: Features, size: tuple[int, int]) -> dict[str, Tensor]:
        """Raw outputs in eval mode by name, each (B, ...), for images of a size: what an exported model returns."""

    @property
    def pools_features(self) -> bool:
        """Whether the head reads pooled features, and not feature maps of some blocks."""
        return not self.out_indices

    def read(self, images: Tensor) -> Features:
        """What the head reads of images (B, 3, H, W)."""
        num_read = self.backbone.num_read if self.pools_features else None
        return read_features(self.backbone.vit, images, self.out_indices, self.backbone.source, num_read)

    def predict(self, images: Tensor, sizes: Sizes | None = None) -> Any:
        """Results in eval mode of images (B, 3, H, W); for `sizes` see `forward_head`."""
        return self.forward_head(self.read(images), sizes)

    def select(self, selection: Any) -> None:
        """Choose which results are returned from now on; a ValueError where the type of task has no choice."""
        raise ValueError(f"a task of type {self.task_type} has no detections to select")

    @classmethod
    def why_not_exported(cls, layout: Mapping[str, Any] | None) -> str | None:
        """Why a model of this layout cannot be traced, for a message; None if it can."""
        return None

    # The task file.

    @property
    def layout(self) -> dict[str, Any] | None:
        """What of neck and head a task file stores, so that `from_layout` makes the same modules; plain JSON values."""
        return None

    @classmethod
    def check_layout(cls, layout: object) -> None:
        """Raise a ValueError, beginning with "head", for a layout that this type of task cannot have."""
        if layout is not None:
            raise ValueError(f"head must be null in a task of type {cls.task_type}")

    @classmethod
    def from_layout(
        cls,
        backbone: PromptedViT,
        num_classes: int,
        *,
        classes: Sequence[str] | None,
        category_ids: Sequence[int] | None,
        layout: Mapping[str, Any] | None,
    ) -> "TaskModel":
        """A new model whose modules are those of a layout that was checked; its fields are arguments of the class."""
        options = {"out_indices" if name == "taps" else name: value for name, value in (layout or {}).items()}
        if layout is not None:
            options["category_ids"] = category_ids
        return cls(backbone, num_classes, classes=classes, **options)

    @classmethod
    def expected_shapes(
        cls, num_classes: int, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]] | None:
        """Names and shapes of all tensors of neck and head, as far as they are known without the backbone.

        `shapes` are those in the file. None where nothing is known; the model made from the layout decides then.
        """
        return None


class TunedPart(nn.Module):
    """The part of a model behind its frozen blocks: tokens that entered the first prompted block -> results.

    It shares all modules with the model, which must pool features. `PromptedViT.forward_frozen` computes its inputs,
    once for images that stay the same; `position` is what it returns for images of this size.

    Raises:
        ValueError: Parameters of the backbone train, so that its blocks are not frozen.
    """

    position: Tensor | None

    def __init__(self, model: TaskModel, position: Tensor | None) -> None:
        super().__init__()
        if any(parameter.requires_grad for parameter in model.backbone.vit.parameters()):
            raise ValueError(
                'model: tokens of a backbone that trains cannot be cached; call tune(model, "prompt") first'
            )
        self.model = model
        self.register_buffer("position", position, persistent=False)

    def forward(self, tokens: Tensor) -> Any:
        """Results of tokens (B, N, D), or of features (B, D) where there is no prompt."""
        return self.model.forward_head(self.model.backbone.forward_prompted(tokens, self.position))


_registered: dict[str, type[TaskModel]] = {}


def register_model(model: type[TaskModel]) -> type[TaskModel]:
    """Make a type of task known by its name; a decorator. A later class of the same name replaces the earlier one."""
    _registered[model.task_type] = model
    return model


def registered_models() -> dict[str, type[TaskModel]]:
    """Every known class by the name of its type of task."""
    import vpt.models.classifier
    import vpt.models.detector
    import vpt.models.segmenter  # noqa: F401  # all register themselves

    return dict(_registered)


def model_named(task_type: str) -> type[TaskModel]:
    """The class of a type of task; a ValueError if there is none of this name."""
    models = registered_models()
    if task_type not in models:
        raise ValueError(f"task={task_type!r}: must be one of {', '.join(models)}")
    return models[task_type]


def refuse_equal_names(classes: Sequence[str] | None) -> None:
    """Raise a ValueError if two classes have one name; files of version 0.1 may have such names, and are read."""
    if classes is not None and len(set(classes)) < len(classes):
        twin = next(name for name, num in Counter(classes).items() if num > 1)
        raise ValueError(f"classes: {reprlib.repr(twin)} is there more than once; each class needs its own name")


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters."""
    return next(model.parameters()).device
