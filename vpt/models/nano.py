"""vit_nano_patch8_64: the small pretrained ViT bundled with the package, registered with timm.

A plain ViT with 2.3 M parameters: 64 x 64 pixels, patches of 8 pixels, embed_dim 192, 5 blocks, 3 heads; its card is
`docs/vit_nano.md`. Importing this module, which every use of the library does, registers it.
"""

from pathlib import Path
from typing import Any

from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn

__all__ = ["vit_nano_patch8_64"]

WEIGHTS = Path(__file__).parent / "weights" / "vit_nano_patch8_64.safetensors"

default_cfgs = generate_default_cfgs(
    {
        "vit_nano_patch8_64.vpt": {
            **{"file": str(WEIGHTS), "license": "apache-2.0", "num_classes": 0, "input_size": (3, 64, 64)},
            **{"pool_size": None, "crop_pct": 0.9, "interpolation": "bicubic", "fixed_input_size": True},
            **{"mean": (0.5,) * 3, "std": (0.5,) * 3, "first_conv": "patch_embed.proj", "classifier": "head"},
        }
    }
)


@register_model
def vit_nano_patch8_64(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-Nano/8 at 64 px: embed_dim 192, depth 5, 3 heads, CLS token."""
    layout = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 5, "num_heads": 3, "num_classes": 0, **kwargs}
    vit: VisionTransformer = build_model_with_cfg(
        VisionTransformer, "vit_nano_patch8_64", pretrained, pretrained_filter_fn=checkpoint_filter_fn, **layout
    )
    return vit
