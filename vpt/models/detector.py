"""Detector: a prompted backbone, a feature pyramid and a head; images -> boxes.

The backbone stays frozen, so the pyramid reads the patch tokens of several of its blocks, `out_indices`. A head turns
the levels of the pyramid into losses (`losses`) or detections (`detect`), and the model knows nothing else of it.

Legend: B images, D embed_dim, C channels, H, W pixels, S stride in pixels, A points, K classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from vpt.models.backbone import PromptedViT
from vpt.models.heads.dense import DenseHead, Selection
from vpt.models.heads.pyramid import FeaturePyramid, default_strides
from vpt.models.heads.torchvision import FasterRCNNHead, RetinaNetHead
from vpt.models.prompts import Blocks, resolve_blocks
from vpt.models.task_model import Features, Sizes, TaskModel, register_model
from vpt.models.task_schema import BLOCKS, MAX_CHANNELS, MAX_SIDE, TEXT, Rule, check_fields, integer, list_of
from vpt.models.vit import check_images

Targets = Sequence[dict[str, Tensor]]
Detections = list[dict[str, Tensor]]
DetectionHead = DenseHead | RetinaNetHead | FasterRCNNHead

HEADS: dict[str, type[DetectionHead]] = {"dense": DenseHead, "retinanet": RetinaNetHead, "fasterrcnn": FasterRCNNHead}
HEAD_RULES: dict[str, Rule] = {  # of the layout in a task file
    "head": TEXT,
    "taps": BLOCKS,
    "channels": integer(1, MAX_CHANNELS),
    "strides": list_of(integer(1, MAX_SIDE), 1, 16),
    "num_convs": integer(0, 16),
}


@register_model
class Detector(TaskModel):
    """Images (B, 3, H, W) -> boxes, through a frozen prompted backbone, a pyramid and a head that train.

    In train mode it is called with targets and returns losses by name; in eval mode it returns a dict for each image:
    "boxes" (n, 4) as x1, y1, x2, y2 in pixels of the input, "scores" (n,) and "labels" (n,), the best first. That is
    the convention of torchvision.

    Args:
        backbone, num_classes, classes: As for `TaskModel`.
        category_ids: Numbers of the classes in the data's own files, by label.
        head: "dense", which has no anchors, or "retinanet" or "fasterrcnn" of torchvision.
        out_indices: Blocks whose patch tokens the pyramid reads: "quarters", "last", or indices.
        channels: Width of pyramid and head.
        strides: Of the pyramid's levels, in pixels; None is 8, 16 and 32, or the nearest that the patches allow.
        num_convs: Convolutions in each tower of the head; None is the head's default.

    Raises:
        ValueError: A stride that the patches do not allow, a block that the backbone does not have, an unknown head,
            or names or category ids that are not one for each class.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_nano_patch8_64", num_classes=0)
        >>> model = Detector(PromptedViT(vit, "deep"), num_classes=3, channels=32).eval()
        >>> found = model(torch.zeros(1, 3, 64, 64))
        >>> sorted(found[0])
        ['boxes', 'labels', 'scores']
    """

    task_type = "detection"
    outputs_in_pixels = ("boxes",)
    preprocessing: ClassVar = {"crop_mode": "letterbox", "crop_pct": 1.0}
    head: DetectionHead

    def __init__(
        self,
        backbone: PromptedViT,
        num_classes: int,
        *,
        classes: Sequence[str] | None = None,
        category_ids: Sequence[int] | None = None,
        head: str = "dense",
        out_indices: Blocks = "quarters",
        channels: int = 128,
        strides: Sequence[int] | None = None,
        num_convs: int | None = None,
    ) -> None:
        super().__init__(backbone, num_classes, classes=classes, category_ids=category_ids)
        if head not in HEADS:
            raise ValueError(f"head={head!r}: must be one of {', '.join(HEADS)}")
        self.out_indices = resolve_out_indices(out_indices, backbone.depth)
        strides = default_strides(backbone.stride) if strides is None else strides
        self.pyramid = FeaturePyramid(backbone.embed_dim, len(self.out_indices), backbone.stride, channels, strides)
        if backbone.vit.patch_embed.strict_img_size:
            self._check_size(backbone.vit.patch_embed.img_size)
        options = {} if num_convs is None else {"num_convs": num_convs}
        self.head = HEADS[head](channels, num_classes, self.pyramid.strides, **options)
        self.head_name = head
        self.selection = Selection()

    @property
    def neck(self) -> FeaturePyramid:  # type: ignore[override]
        """The pyramid."""
        return self.pyramid

    @property
    def num_classes(self) -> int:
        """K."""
        return self.head.num_classes

    @property
    def selection(self) -> Selection:
        """Which detections are returned; may be replaced at any time."""
        return self._selection

    @selection.setter
    def selection(self, selection: Selection) -> None:
        if selection.labels is not None and max(selection.labels) >= self.num_classes:
            raise ValueError(f"labels must be 0 to {self.num_classes - 1}, got {selection.labels}")
        self._selection = selection

    def select(self, selection: Selection) -> None:
        """Choose which detections are returned from now on; a ValueError for labels that the task does not have."""
        self.selection = selection

    def forward(self, images: Tensor, targets: Targets | None = None, sizes: Sizes | None = None) -> Any:
        """Losses by name in train mode, detections in eval mode; images (B, 3, H, W) as the backbone requires.

        Args:
            images: Normalised; H and W are multiples of the largest stride.
            targets: For each image "boxes" (G, 4) in pixels, "labels" (G,) and, if there are crowds, "crowd" (G,) bool.
            sizes: In eval mode, height and width of the part of each input, at its upper left, to which boxes are cut.

        Raises:
            ValueError: There are no targets in train mode, or H and W are no such multiples.
        """
        if not self.training:
            return self.predict(images, sizes)
        if targets is None:
            raise ValueError("a detector in train mode needs targets; call model.eval() to detect")
        return self.head.losses(self.levels(images), _size(images), targets)

    def predict(self, images: Tensor, sizes: Sizes | None = None) -> Detections:
        """Detections of images (B, 3, H, W)."""
        return self._detect(self.levels(images), sizes or [_size(images)] * len(images))

    def detect_with_losses(
        self, images: Tensor, targets: Targets, sizes: Sizes | None = None
    ) -> tuple[Detections, dict[str, Tensor]]:
        """Detections and losses of the same images in eval mode, for one pass through backbone and pyramid."""
        if self.training:
            raise ValueError("detect_with_losses is for evaluation; call model.eval() first")
        levels, size = self.levels(images), _size(images)
        found = self._detect(levels, sizes or [size] * len(images))
        return found, self.head.losses(levels, size, targets)

    def forward_head(self, features: Features, sizes: Sizes | None = None) -> Detections:
        """Detections, in eval mode, of maps (B, D, rows, columns), one for each of `out_indices`."""
        assert isinstance(features, list)
        assert sizes is not None
        return self._detect(self.pyramid(features), sizes)

    def forward_tensors(self, features: Features, size: tuple[int, int]) -> dict[str, Tensor]:
        """Boxes (B, A, 4), x1, y1, x2, y2 in pixels, clipped, and probabilities "scores" (B, A, K) of all points."""
        assert isinstance(features, list)
        assert isinstance(self.head, DenseHead)
        logits, boxes = self.head(self.pyramid(features))
        return {"boxes": clip_boxes_to_image(boxes, size), "scores": logits.sigmoid()}

    @classmethod
    def why_not_exported(cls, layout: Mapping[str, Any] | None) -> str | None:
        """The heads of torchvision cannot be traced: what they compute depends on what they find."""
        if not layout or (head := layout["head"]) == "dense":
            return None
        why = f"head={head} is torchvision's, and what it computes depends on what it finds"
        return f"{why}; only head=dense is exported"

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Let torch compile backbone and pyramid; what depends on the number of boxes stays as it is."""
        self.levels = torch.compile(self.levels, *args, **kwargs)  # type: ignore[method-assign]

    def levels(self, images: Tensor) -> list[Tensor]:
        """Levels (B, C, H/S, W/S) of the pyramid, the input of the head, of images (B, 3, H, W)."""
        check_images(images)
        self._check_size(_size(images))
        levels: list[Tensor] = self.pyramid(self.read(images))
        return levels

    @property
    def layout(self) -> dict[str, Any]:
        """Keyword arguments of the same modules, by the names that they have in a task file."""
        return {
            "head": self.head_name,
            "taps": list(self.out_indices),
            "channels": self.pyramid.narrow.out_channels,
            "strides": list(self.pyramid.strides),
            "num_convs": self.head.num_convs,
        }

    @classmethod
    def check_layout(cls, layout: object) -> None:
        """Refuse a layout with a missing, unknown or wrong field."""
        check_fields("head", layout, HEAD_RULES)

    def _detect(self, levels: list[Tensor], sizes: Sizes) -> Detections:
        found: Detections = self.head.detect(levels, sizes, self.selection)
        return found

    def _check_size(self, size: tuple[int, int]) -> None:
        stride = max(self.pyramid.strides)
        if any(side % stride for side in size):
            lower, higher = size[0] // stride * stride, (size[0] // stride + 1) * stride
            raise ValueError(
                f"images of {size[0]} x {size[1]} px are not whole cells of {stride} px, the largest stride; "
                f"use img_size={lower or higher} or {higher + (0 if lower else stride)}"
            )


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


def resolve_out_indices(out_indices: Blocks, depth: int) -> tuple[int, ...]:
    """Block indices of "quarters" (the last of each quarter of the depth), "last", or a list of indices.

    Example:
        >>> resolve_out_indices("quarters", depth=12)
        (2, 5, 8, 11)
    """
    if out_indices == "quarters":
        return tuple(sorted({max(1, quarter * depth // 4) - 1 for quarter in (1, 2, 3, 4)}))
    return resolve_blocks("last:1" if out_indices == "last" else out_indices, depth, key="out_indices")
