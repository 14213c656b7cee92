"""Classifier: a prompted backbone and a linear head; images -> logits."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from vpt.models.backbone import PromptedViT
from vpt.models.heads.linear import HeadInit, linear_head
from vpt.models.task_model import Features, Sizes, TaskModel, register_model


@register_model
class Classifier(TaskModel):
    """Images (B, 3, H, W) -> logits (B, K), in the order of `classes`; for `head_init` see `linear_head`."""

    task_type = "classification"
    has_linear_head = True
    head: nn.Linear

    def __init__(
        self,
        backbone: PromptedViT,
        num_classes: int,
        *,
        classes: Sequence[str] | None = None,
        head_init: HeadInit = "zero",
    ) -> None:
        super().__init__(backbone, num_classes, classes=classes)
        self.head = linear_head(backbone.embed_dim, num_classes, head_init)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.head.out_features

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, 3, H, W), normalised as the backbone requires."""
        return self.forward_head(self.backbone(images))

    def forward_head(self, features: Features, sizes: Sizes | None = None) -> Tensor:
        """Logits (B, K) of features (B, D)."""
        assert isinstance(features, Tensor)
        logits: Tensor = self.head(features.to(self.head.weight.dtype))
        return logits

    def forward_tensors(self, features: Features, size: tuple[int, int]) -> dict[str, Tensor]:
        """The logits (B, K)."""
        return {"logits": self.forward_head(features)}

    @classmethod
    def expected_shapes(cls, num_classes: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Weight (K, D) and bias (K,) of the head."""
        width = shapes.get("head.weight", (0, 0))[-1]
        return {"head.weight": (num_classes, width), "head.bias": (num_classes,)}
