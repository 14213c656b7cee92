"""Segmenter: a prompted backbone and a head on its feature maps; images -> logits of each cell.

The backbone stays frozen, so the head reads the patch tokens of several of its blocks, `out_indices`, directly
(`head="linear"`) or through the feature pyramid of the detector (`head="pyramid"`).

Legend: B images, K classes, D embed_dim, H, W pixels, S stride in pixels.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from vpt.models.backbone import PromptedViT
from vpt.models.detector import HEAD_RULES, resolve_out_indices
from vpt.models.heads.masks import IGNORED, LinearMaskHead, PyramidMaskHead, mask_losses
from vpt.models.heads.pyramid import FeaturePyramid, default_strides
from vpt.models.prompts import Blocks
from vpt.models.task_model import Features, Sizes, TaskModel, register_model
from vpt.models.task_schema import check_fields

HEADS = {"linear": ("head", "taps"), "pyramid": ("head", "taps", "channels", "strides")}  # -> fields of the layout


@register_model
class Segmenter(TaskModel):
    """Images (B, 3, H, W) -> logits (B, K, H/S, W/S), through a frozen prompted backbone and a head that trains.

    S is the patch size with head="linear", and the finest of `strides` with "pyramid". `to_label_map` of
    `vpt.predictions.masks` turns the logits of an image into the class of each pixel of the original image. Called with
    targets, (B, H, W) numbers of classes or -1 for ignored pixels, the model returns losses by name.

    Args:
        backbone, num_classes, classes: As for `TaskModel`.
        category_ids: The values of the classes in the data's own masks, by label.
        head: "linear" or "pyramid".
        out_indices: Blocks whose patch tokens are read: "quarters", "last", or indices.
        channels: Width of the pyramid.
        strides: Of the pyramid's levels, in pixels; None is 8, 16 and 32, or the nearest that the patches allow.

    Raises:
        ValueError: Fewer than two classes, an unknown head, a block that the backbone does not have, a stride that the
            patches do not allow, or names or values that are not one for each class.

    Example:
        >>> import timm, torch
        >>> vit = timm.create_model("vit_nano_patch8_64", num_classes=0)
        >>> model = Segmenter(PromptedViT(vit, "deep"), num_classes=3).eval()
        >>> tuple(model(torch.zeros(1, 3, 64, 64)).shape)
        (1, 3, 8, 8)
    """

    task_type = "segmentation"
    preprocessing: ClassVar = {"crop_mode": "letterbox", "crop_pct": 1.0}

    def __init__(
        self,
        backbone: PromptedViT,
        num_classes: int,
        *,
        classes: Sequence[str] | None = None,
        category_ids: Sequence[int] | None = None,
        head: str = "linear",
        out_indices: Blocks = "quarters",
        channels: int = 64,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__(backbone, num_classes, classes=classes, category_ids=category_ids)
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: segmentation takes two or more; name the rest as a class")
        if head not in HEADS:
            raise ValueError(f"head={head!r}: must be one of {', '.join(HEADS)}")
        self.out_indices = resolve_out_indices(out_indices, backbone.depth)
        self.head_name = head
        width, num_maps = backbone.embed_dim, len(self.out_indices)
        if head == "linear":
            self.pyramid = None
            self.head = LinearMaskHead(width, num_maps, num_classes)
        else:
            strides = default_strides(backbone.stride) if strides is None else strides
            self.pyramid = FeaturePyramid(width, num_maps, backbone.stride, channels, strides)
            self.head = PyramidMaskHead(channels, num_classes)

    @property
    def neck(self) -> FeaturePyramid | None:  # type: ignore[override]
        """The pyramid, if there is one."""
        return self.pyramid

    @property
    def num_classes(self) -> int:
        """K."""
        return int(self.head.conv.out_channels)  # type: ignore[union-attr,arg-type]

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        """Logits (B, K, H/S, W/S) of normalised images (B, 3, H, W); with targets (B, H, W) the losses by name.

        Raises:
            TypeError: The targets are no integers.
            ValueError: Their shape is not that of the images, or a value is no class and not -1.
        """
        logits = self.predict(images)
        if targets is None:
            return logits
        self._check_targets(targets, (len(images), *images.shape[-2:]))
        return mask_losses(logits, targets)

    def forward_head(self, features: Features, sizes: Sizes | None = None) -> Tensor:
        """Logits (B, K, H/S, W/S) of maps (B, D, rows, columns), one for each of `out_indices`."""
        assert isinstance(features, list)
        logits: Tensor = self.head(features if self.pyramid is None else self.pyramid(features))
        return logits

    def forward_tensors(self, features: Features, size: tuple[int, int]) -> dict[str, Tensor]:
        """The logits (B, K, H/S, W/S)."""
        return {"logits": self.forward_head(features)}

    def _check_targets(self, targets: Tensor, shape: tuple[int, ...]) -> None:
        if targets.is_floating_point() or targets.is_complex():
            raise TypeError(f"targets: must be numbers of classes, integers, got {targets.dtype}")
        if targets.shape != shape:
            raise ValueError(f"targets: must be {shape}, the images' (B, H, W), got {tuple(targets.shape)}")
        if targets.numel() and not IGNORED <= int(targets.min()) <= int(targets.max()) < self.num_classes:
            found = f"got {int(targets.min())} to {int(targets.max())}"
            raise ValueError(f"targets: must be classes in [0, {self.num_classes}), or -1 where ignored, {found}")

    @property
    def layout(self) -> dict[str, Any]:
        """Keyword arguments of the same modules, by the names that they have in a task file."""
        layout: dict[str, Any] = {"head": self.head_name, "taps": list(self.out_indices)}
        if self.pyramid is not None:
            layout |= {"channels": self.pyramid.narrow.out_channels, "strides": list(self.pyramid.strides)}
        return layout

    @classmethod
    def check_layout(cls, layout: object) -> None:
        """Refuse a layout with a missing, unknown or wrong field."""
        names = HEADS.get(layout["head"]) if isinstance(layout, dict) and isinstance(layout.get("head"), str) else None
        check_fields("head", layout, {name: HEAD_RULES[name] for name in names or HEADS["pyramid"]})
        if names is None:
            raise ValueError(f"head.head is {layout['head']!r}; allowed: {', '.join(HEADS)}")  # type: ignore[index]
