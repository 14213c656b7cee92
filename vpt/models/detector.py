"""DetectionModel: a prompted backbone, a feature pyramid and a head; images -> boxes.

The backbone stays frozen, so the pyramid looks at the patch tokens of several of its blocks: *taps*. A *head* makes
losses (`losses`) or detections (`detect`) of the levels of the pyramid and the size of the images, and that is all that
the model knows of it.

Legend: B images, D embed_dim, T taps, C channels, H, W pixels, S stride in pixels, A points, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vpt.models.backbone import PromptedViT
from vpt.models.heads.dense import DenseHead
from vpt.models.heads.dense import Selection as Selection
from vpt.models.heads.pyramid import FeaturePyramid, default_strides
from vpt.models.heads.torchvision import FasterRCNNHead, RetinaNetHead
from vpt.models.prompts import Blocks, resolve_blocks

Targets = Sequence[dict[str, Tensor]]


Detections = list[dict[str, Tensor]]


Sizes = Sequence[tuple[int, int]]  # of each image: height, width


DetectionHead = DenseHead | RetinaNetHead | FasterRCNNHead


HEADS: dict[str, type[DetectionHead]] = {
    "dense": DenseHead,
    "retinanet": RetinaNetHead,
    "fasterrcnn": FasterRCNNHead,
}


class DetectionModel(nn.Module):
    """Images (B, 3, H, W) -> boxes, through a frozen prompted backbone, a pyramid and a head that train.

    In train mode it is called with targets and returns losses by name; in eval mode it returns a dict for each image:
    "boxes" (n, 4) as x1, y1, x2, y2 in pixels of the input, "scores" (n,) and "labels" (n,), the best first. That is
    the convention of torchvision.

    Args:
        backbone: The prompted backbone.
        num_classes: K.
        classes: Names of the classes, by label.
        category_ids: What the source of the data calls each class, by label.
        head: "dense", which has no anchors, or "retinanet" or "fasterrcnn" of torchvision.
        taps: Blocks whose patch tokens the pyramid looks at: "quarters", "last", or indices.
        channels: Width of pyramid and head.
        strides: Of the pyramid's levels, in pixels; None is 8, 16 and 32, or what is nearest to them for the patches.
        num_convs: Convolutions in each tower of the head; None is what the head usually has.

    Attributes:
        selection: Which detections are given out; put another one in its place at any time.

    Raises:
        ValueError: A stride that cannot be reached from the patches, a block that the backbone has not, an unknown
            head, or names or category ids that are not one for each class.

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_nano_patch8_64", num_classes=0)
        >>> model = DetectionModel(PromptedViT(vit, "deep"), num_classes=3, channels=32).eval()
        >>> found = model(torch.zeros(1, 3, 64, 64))
        >>> sorted(found[0])
        ['boxes', 'labels', 'scores']
    """

    def __init__(
        self,
        backbone: PromptedViT,
        num_classes: int,
        *,
        classes: Sequence[str] | None = None,
        category_ids: Sequence[int] | None = None,
        head: str = "dense",
        taps: Blocks = "quarters",
        channels: int = 128,
        strides: Sequence[int] | None = None,
        num_convs: int | None = None,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head.name must be one of {', '.join(HEADS)}, got {head!r}")
        if classes is not None and len(classes) != num_classes:
            raise ValueError(f"{len(classes)} class names for num_classes={num_classes}")
        if category_ids is not None and len(category_ids) != num_classes:
            raise ValueError(f"{len(category_ids)} category ids for num_classes={num_classes}")
        self.backbone = backbone
        self.classes = None if classes is None else tuple(classes)
        self.category_ids = None if category_ids is None else tuple(category_ids)
        self.taps = resolve_taps(taps, backbone.depth)
        stride = backbone.stride
        self.pyramid = FeaturePyramid(
            backbone.embed_dim,
            len(self.taps),
            stride,
            channels,
            default_strides(stride) if strides is None else strides,
        )
        if backbone.vit.patch_embed.strict_img_size:
            self._check_size(backbone.vit.patch_embed.img_size)
        options = {} if num_convs is None else {"num_convs": num_convs}
        self.head = HEADS[head](channels, num_classes, self.pyramid.strides, **options)
        self.head_name = head
        self.selection = Selection()

    @property
    def num_classes(self) -> int:
        """K."""
        return self.head.num_classes

    @property
    def layout(self) -> dict[str, Any]:
        """Keyword arguments that make the same modules on the same backbone, ready for JSON."""
        return {
            "head": self.head_name,
            "taps": list(self.taps),
            "channels": self.pyramid.narrow.out_channels,
            "strides": list(self.pyramid.strides),
            "num_convs": self.head.num_convs,
        }

    @property
    def selection(self) -> Selection:
        """Which detections are given out."""
        return self._selection

    @selection.setter
    def selection(self, selection: Selection) -> None:
        if selection.labels is not None and max(selection.labels) >= self.num_classes:
            raise ValueError(f"labels must be 0 to {self.num_classes - 1}, got {selection.labels}")
        self._selection = selection

    def forward(self, images: Tensor, targets: Targets | None = None, sizes: Sizes | None = None) -> Any:
        """Losses by name in train mode, detections in eval mode; images (B, 3, H, W) as the backbone wants them.

        Args:
            images: Normalised; H and W are multiples of the largest stride.
            targets: For each image "boxes" (G, 4) in pixels, "labels" (G,) and, if there are crowds, "crowd" (G,) bool.
            sizes: In eval mode, height and width of what is picture in each image, at its upper left; boxes end there.

        Raises:
            ValueError: There are no targets in train mode, or H and W are no such multiples.
        """
        if not self.training:
            return self._detect(self.levels(images), sizes or [_size(images)] * len(images))
        if targets is None:
            raise ValueError("a detection model in train mode needs targets; call model.eval() to detect")
        return self.head.losses(self.levels(images), _size(images), targets)

    def detect_with_losses(
        self, images: Tensor, targets: Targets, sizes: Sizes | None = None
    ) -> tuple[Detections, dict[str, Tensor]]:
        """Detections and losses of the same images in eval mode, for one pass through the backbone and the pyramid.

        Args:
            images: As `forward` takes them, like the next two.
            targets: For each image.
            sizes: For each image.

        Raises:
            ValueError: The model is in train mode.
        """
        if self.training:
            raise ValueError("detect_with_losses is for evaluation; call model.eval() first")
        levels, size = self.levels(images), _size(images)
        found = self._detect(levels, sizes or [size] * len(images))
        return found, self.head.losses(levels, size, targets)

    def forward_head(self, maps: Sequence[Tensor], sizes: Sizes) -> Detections:
        """Detections, in eval mode, of maps (B, D, rows, columns), one for each tap; for sizes see `forward`."""
        return self._detect(self.pyramid(maps), sizes)

    def _detect(self, levels: list[Tensor], sizes: Sizes) -> Detections:
        return self.head.detect(levels, sizes, self.selection)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Let torch compile backbone and pyramid; what depends on the number of boxes stays as it is."""
        self.levels = torch.compile(self.levels, *args, **kwargs)  # type: ignore[method-assign]

    def levels(self, images: Tensor) -> list[Tensor]:
        """Levels (B, C, H/S, W/S) of the pyramid, which is all that a head sees of images (B, 3, H, W)."""
        self._check_size(_size(images))
        levels: list[Tensor] = self.pyramid(self.backbone.feature_maps(images, self.taps))
        return levels

    def _check_size(self, size: tuple[int, int]) -> None:
        """Levels must cover all of an image."""
        stride = max(self.pyramid.strides)
        if any(side % stride for side in size):
            lower, higher = size[0] // stride * stride, (size[0] // stride + 1) * stride
            raise ValueError(
                f"images of {size[0]} x {size[1]} px are not whole cells of {stride} px, the largest stride; "
                f"use backbone.img_size={lower or higher} or {higher + (0 if lower else stride)}"
            )


def _size(images: Tensor) -> tuple[int, int]:
    """H and W."""
    return images.shape[-2], images.shape[-1]


def resolve_taps(taps: Blocks, depth: int) -> tuple[int, ...]:
    """Block indices of "quarters" (the last of each quarter of the depth), "last", or a list of indices.

    Example:
        >>> resolve_taps("quarters", depth=12)
        (2, 5, 8, 11)
    """
    if taps == "quarters":
        return tuple(sorted({max(1, quarter * depth // 4) - 1 for quarter in (1, 2, 3, 4)}))
    return resolve_blocks("last:1" if taps == "last" else taps, depth, key="head.taps")
