"""ClassificationModel: a prompted backbone and a linear head; images -> logits."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vpt.models.backbone import PromptedViT, PromptImpl
from vpt.models.heads import HeadInit, linear_head
from vpt.models.prompts import Blocks, PromptKind, VisualPrompt
from vpt.models.vit import ViT, load_vit


class ClassificationModel(nn.Module):
    """Images (B, 3, H, W) -> logits (B, K), through a frozen prompted backbone and a head that trains.

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
    """

    position: Tensor | None

    def __init__(self, model: ClassificationModel, position: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("position", position, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, K) of tokens (B, N, D) that enter the first prompted block, or of features (B, D)."""
        return self.model.forward_head(self.model.backbone.forward_prompted(tokens, self.position))


def create_model(
    backbone: str | ViT,
    *,
    num_classes: int,
    prompt: PromptKind | VisualPrompt | None = "deep",
    num_tokens: int = 10,
    blocks: Blocks = "all",
    dropout: float = 0.0,
    impl: PromptImpl = "auto",
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    img_size: int | None = None,
    dtype: torch.dtype | None = None,
    classes: Sequence[str] | None = None,
    head_init: HeadInit = "zero",
) -> ClassificationModel:
    """Make a classifier of a frozen ViT, a prompt and a linear head.

    Args:
        backbone: A timm name, or a timm ViT that is in memory already.
        num_classes: K.
        prompt: "deep", "shallow", None (a linear probe), or a ready `VisualPrompt`.
        num_tokens: P, prompt tokens in each prompted block.
        blocks: Blocks that a deep prompt enters: "all", "first:k", "last:k" or a list of indices.
        dropout: Dropout of prompt tokens, drawn for each sample.
        impl: How prompts are computed, "auto" or "concat", see `PromptedViT`.
        pretrained: Load the weights that timm knows under the name.
        checkpoint: Load the backbone's weights from this file instead.
        img_size: Input size in pixels; None keeps the model's own.
        dtype: Hold the backbone's weights in this dtype, such as torch.bfloat16; prompt and head stay in float32.
        classes: Names of the classes, in the order of the logits.
        head_init: How the head starts, see `linear_head`.

    Raises:
        ValueError, TypeError, FileNotFoundError: As `load_vit`, `PromptedViT` and `ClassificationModel` raise them;
            `checkpoint`, `img_size` and `dtype` are for a name, and refused for a ViT that is in memory.

    Example:
        >>> model = create_model("vit_nano_patch8_64", prompt="deep", num_tokens=10, num_classes=14, pretrained=False)
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        12302
    """
    for key, value in {"checkpoint": checkpoint, "img_size": img_size, "dtype": dtype}.items():
        if not isinstance(backbone, str) and value is not None:
            raise ValueError(f"{key}={value} is for a backbone given by name; this one is in memory as it is")
    vit = (
        load_vit(backbone, pretrained=pretrained, checkpoint=checkpoint, img_size=img_size, dtype=dtype)
        if isinstance(backbone, str)
        else backbone
    )
    prompted = PromptedViT(vit, prompt, num_tokens=num_tokens, blocks=blocks, dropout=dropout, impl=impl)
    return ClassificationModel(prompted, num_classes, classes=classes, head_init=head_init)
