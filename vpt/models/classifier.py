"""ClassificationModel: a prompted backbone and a linear head; images -> logits."""

from collections.abc import Sequence

from torch import Tensor, nn

from vpt.models.backbone import PromptedViT
from vpt.models.heads.linear import HeadInit, linear_head


class ClassificationModel(nn.Module):
    """Images (B, 3, H, W) -> logits (B, K), through a prompted backbone and a head that trains.

    Args:
        backbone: The prompted backbone.
        num_classes: K.
        classes: Names of the classes, in the order of the logits.
        head_init: How the head starts, see `linear_head`.

    Raises:
        ValueError: The number of names is not the number of classes.
    """

    def __init__(
        self,
        backbone: PromptedViT,
        num_classes: int,
        *,
        classes: Sequence[str] | None = None,
        head_init: HeadInit = "zero",
    ) -> None:
        super().__init__()
        if classes is not None and len(classes) != num_classes:
            raise ValueError(f"{len(classes)} class names for num_classes={num_classes}")
        self.backbone = backbone
        self.head = linear_head(backbone.embed_dim, num_classes, head_init)
        self.classes = None if classes is None else tuple(classes)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.head.out_features

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, 3, H, W), normalised as the backbone wants them."""
        return self.forward_head(self.backbone(images))

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits (B, K) of features (B, D)."""
        logits: Tensor = self.head(features.to(self.head.weight.dtype))
        return logits


class TunedPart(nn.Module):
    """The part of a model that trains: what its frozen blocks made of images -> logits (B, K).

    It shares all modules with the model, so what trains here trains there. `forward_frozen` of the backbone says what
    goes in; as long as the images stay the same, it need be computed only once.

    Args:
        model: The whole model.
        position: The position that `forward_frozen` gives for images of this size.

    Raises:
        ValueError: Parameters of the backbone train, so that its blocks are not frozen.
    """

    position: Tensor | None

    def __init__(self, model: ClassificationModel, position: Tensor | None) -> None:
        super().__init__()
        if any(parameter.requires_grad for parameter in model.backbone.vit.parameters()):
            raise ValueError("tokens of a backbone that trains cannot be kept; use cache=off or tuning=prompt")
        self.model = model
        self.register_buffer("position", position, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, K) of tokens (B, N, D) that enter the first prompted block, or of features (B, D)."""
        return self.model.forward_head(self.model.backbone.forward_prompted(tokens, self.position))
