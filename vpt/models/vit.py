"""timm's ViTs: how one is loaded and named, and what in it differs from family to family.

Three families are understood, by the class that timm builds them on: `VisionTransformer`, `Eva` (rotary position) and
`Beit` (relative position bias). What a model calls its position beyond the position embedding, rotary or relative, is
a tensor that goes with its tokens from block to block.

Legend: B batch, H, W pixels, N prefix + patch tokens, D embed_dim, h heads.
"""

import difflib
import hashlib
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants
from timm.data.config import resolve_model_data_config
from timm.layers.norm import RmsNorm, SimpleNorm
from timm.models import Beit, Eva, VisionTransformer, beit, eva, load_state_dict, vision_transformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

import vpt.models.nano  # noqa: F401  # registers the backbone that ships in the package
from vpt.models.attention import relative_bias, run_block

ViT = VisionTransformer | Eva | Beit
NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm, SimpleNorm)


def load_vit(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    img_size: int | tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> ViT:
    """Make a timm ViT without a classifier.

    Args:
        name: A timm name, with or without a pretrained tag.
        pretrained: Load the weights that timm knows under this name, from the package, the hub's cache or the hub. What
            comes from the hub is checked by the sha256 that the hub tells.
        checkpoint: Load the weights from this file (.safetensors, or .pth read with weights_only) instead.
        img_size: Input size in pixels, one side or (height, width), to which the position embedding is resampled. None
            keeps the model's own.
        dtype: Hold the weights in this dtype, such as torch.bfloat16, for half the memory; None keeps float32.

    Raises:
        ValueError: The name is unknown or no ViT that can be prompted, or weights do not fit or cannot be had.
        FileNotFoundError: There is no such checkpoint.
    """
    _check_name(name)
    path = None if checkpoint is None else Path(checkpoint).expanduser()
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"backbone.checkpoint={checkpoint}: no such file")
    options: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    try:
        with torch.device("meta"):  # what cannot be built or prompted is refused before anything is fetched
            empty: Any = timm.create_model(name, pretrained=False, num_classes=0, **options)
            check_supported(empty)
            if 0 in (empty.patch_embed.grid_size or ()):
                raise ValueError(f"img_size={img_size} is smaller than its patches, {empty.patch_embed.patch_size}")
    except TypeError as error:
        raise ValueError(f"backbone.name={name}: {_first_line(error)}") from error
    except Exception as error:  # timm's models raise kinds of their own
        raise ValueError(f"backbone.name={name} cannot be built: {_first_line(error)}") from error
    try:
        with _checked_downloads():
            vit = timm.create_model(name, pretrained=pretrained and path is None, num_classes=0, **options)
    except _DamagedDownloadError as error:
        raise ValueError(f"the weights of {name}: {error}") from error
    except Exception as error:  # the hub, a file and timm each raise kinds of their own
        raise ValueError(_describe_missing_weights(name, error)) from error
    assert isinstance(vit, ViT)
    if path is not None:
        _load_checkpoint(vit, name, path)
    return vit.to(dtype)


def name_of(vit: ViT) -> str:
    """The timm name with its pretrained tag, such as `vit_tiny_patch16_224.augreg_in21k_ft_in1k`."""
    config: Any = vit.pretrained_cfg
    return f"{config['architecture']}.{config['tag']}" if config.get("tag") else str(config["architecture"])


def preprocessing_of(vit: ViT) -> dict[str, Any]:
    """How a picture becomes an input of this ViT, as plain JSON values.

    Returns:
        size (height, width) in pixels; mean and std of the three channels, for pixels in [0, 1]; interpolation,
        crop_pct and crop_mode, as timm resolves them for the weights.
    """
    config: dict[str, Any] = resolve_model_data_config(vit)  # type: ignore[no-untyped-call]
    size = vit.patch_embed.img_size or config["input_size"][1:]
    return {
        "size": [int(side) for side in size],
        "mean": [float(value) for value in config["mean"]],
        "std": [float(value) for value in config["std"]],
        "interpolation": str(config["interpolation"]),
        "crop_pct": float(config["crop_pct"]),
        "crop_mode": str(config["crop_mode"]),
    }


def fingerprint(vit: ViT) -> str:
    """A digest of the weights, the same for every input size and with or without a classifier.

    Sixty-four values, evenly spread, of each parameter are read as bfloat16, so that a backbone held in bfloat16 is the
    same one. The position embedding and the patch
    kernels are left out, because timm resamples them when the input or the patch size changes.
    """
    digest = hashlib.sha256()
    left_out = ("pos_embed", "patch_embed.", "head.", "head_dist.")
    for name, parameter in sorted(vit.named_parameters()):
        if name.startswith(left_out):
            continue
        values = parameter.detach().reshape(-1)
        step = max(1, len(values) // 64)
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(values[::step][:64].to("cpu", torch.bfloat16).float().numpy().tobytes())
    return digest.hexdigest()


def norms_of(vit: ViT) -> list[nn.Module]:
    """The norms of a ViT that have parameters, but for those of a convolutional stem."""
    return [module for module in vit.modules() if isinstance(module, NORMS)]


def check_supported(vit: nn.Module) -> None:
    """A model is understood when it runs the very `forward_features` of timm's ViT, Eva or Beit."""
    known = (VisionTransformer.forward_features, Eva.forward_features, Beit.forward_features)
    if not isinstance(vit, ViT) or type(vit).forward_features not in known:
        raise TypeError(
            f"{type(vit).__name__} cannot be prompted; supported are plain ViTs that timm builds on VisionTransformer, "
            "Eva or Beit (ViT, DeiT, AugReg, MAE, CLIP, SigLIP, DINO, DINOv2, DINOv3, EVA-02, BEiT; docs/backbones.md)"
        )


def grid_size(vit: ViT, images: Tensor) -> tuple[int, int]:
    """Rows and columns of the patch tokens of images (B, 3, H, W)."""
    rows, columns = vit.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
    return int(rows), int(columns)


def embed(vit: ViT, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, N, D) that enter block 0, and their position, which is the same for all images of a size."""
    tokens = vit.patch_embed(images.to(next(vit.patch_embed.parameters()).dtype))
    if isinstance(vit, Beit):
        tokens = torch.cat([vit.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        tokens = tokens if vit.pos_embed is None else tokens + vit.pos_embed
        return tokens, None if vit.rel_pos_bias is None else vit.rel_pos_bias()
    if isinstance(vit, Eva):
        tokens, position = vit._pos_embed(tokens)
        return vit.norm_pre(tokens), position
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(tokens))), None


def run_timm_block(vit: ViT, index: int, tokens: Tensor, position: Tensor | None, num_prompt_tokens: int = 0) -> Tensor:
    """A block as timm runs it, on a sequence that may have prompt tokens behind its prefix tokens."""
    block: Any = vit.blocks[index]
    if isinstance(vit, Beit) and num_prompt_tokens:  # its own attention cannot take a longer sequence
        return run_block(block, tokens, bias=rope_and_bias(vit, index, position, num_prompt_tokens)[1])
    if isinstance(vit, Beit):
        return block(tokens, shared_rel_pos_bias=position)  # type: ignore[no-any-return]
    if isinstance(vit, Eva):
        return block(tokens, rope=rope_and_bias(vit, index, position, num_prompt_tokens)[0])  # type: ignore[no-any-return]
    return block(tokens)  # type: ignore[no-any-return]


def rope_and_bias(
    vit: ViT, index: int, position: Tensor | None, num_prompt_tokens: int = 0
) -> tuple[Tensor | None, Tensor | None]:
    """What a position is in a block: a rotary embedding, or a relative bias (1, h, N, N); None for what it is not.

    Prompt tokens in the sequence, behind the prefix tokens, do not rotate, and their bias is zero.
    """
    if isinstance(vit, Beit):
        bias = relative_bias(vit.blocks[index], position)
        return None, None if bias is None else _extend_bias(bias, vit.num_prefix_tokens, num_prompt_tokens)
    if position is None:
        return None, None
    # Models with `rope_mixed` have an embedding for each block, stacked first; others share one.
    return _extend_rope(position[index] if vit.rope_mixed else position, num_prompt_tokens), None


def pools_prefix_only(vit: ViT) -> bool:
    """Whether pooling reads prefix tokens and nothing else, as far as the model is one of timm's own."""
    is_known = type(vit) in (VisionTransformer, VisionTransformerDistilled, Eva, Beit)
    return is_known and vit.global_pool == "token"


class _DamagedDownloadError(ValueError):
    """A file that is not the one that the hub has."""


@contextmanager
def _checked_downloads() -> Iterator[None]:
    """Hold what the hub's cache gets inside of this block against the sha256 that it is called by.

    The hub's client compares sizes only. Small files, which are called by a sha1 of git, are not checked.
    """
    cache = Path(constants.HF_HUB_CACHE)
    before = set(cache.glob("models--*/blobs/*"))
    try:
        yield
    finally:  # also if it cannot be read at all, or it would stay in the cache
        for blob in set(cache.glob("models--*/blobs/*")) - before:
            if re.fullmatch("[0-9a-f]{64}", blob.name) and _sha256(blob) != blob.name:
                blob.unlink()
                raise _DamagedDownloadError("the download is not the file that the hub has; it was removed, try again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_checkpoint(vit: ViT, name: str, path: Path) -> None:
    """Load all weights of a ViT from a file; a classifier in the file is left out, anything else must match."""
    family: Any = eva if isinstance(vit, Eva) else beit if isinstance(vit, Beit) else vision_transformer
    try:
        _refuse_packed(path)
        state = family.checkpoint_filter_fn(load_state_dict(str(path), device="cpu", weights_only=True), vit)
        missing, unexpected = vit.load_state_dict(state, strict=False)
    except Exception as error:  # safetensors, pickle's guard, timm and torch each raise kinds of their own
        raise ValueError(f"backbone.checkpoint={path} does not fit {name}: {_first_line(error)}") from error
    odd = [key for key in unexpected if not key.startswith(("head.", "head_dist."))]
    if missing or odd:
        what = f"it lacks {missing[0]}" if missing else f"it has {odd[0]}, which the model has not"
        raise ValueError(
            f"backbone.checkpoint={path} does not fit {name}: {what} ({len(missing) + len(odd)} keys differ)"
        )


def _refuse_packed(path: Path) -> None:
    """Refuse a .pth whose parts would grow when they are read, which torch never writes."""
    if zipfile.is_zipfile(path) and path.suffix != ".safetensors":
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("its parts are compressed, as torch never writes them; save it anew with torch.save")


def _check_name(name: str) -> None:
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    architecture, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if timm.is_model(name) and tag and tag not in tags:
        raise ValueError(f"backbone.name={name}: {architecture} has the weights {', '.join(tags) or 'none'}")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"backbone.name={name} is not a model that timm knows{hint}")


def _describe_missing_weights(name: str, error: Exception) -> str:
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None or not (config.hf_hub_id or config.url or config.file):
        return f"timm has no pretrained weights for {name}; use backbone.pretrained=false or backbone.checkpoint=FILE"
    source = f"model.safetensors of {config.hf_hub_id} on the hub" if config.hf_hub_id else config.url
    return (
        f"the weights of {name} could not be loaded ({_first_line(error)}). "
        f"On a machine with a network fetch {source}, put it anywhere on this machine, and add backbone.checkpoint=FILE"
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__


def _extend_rope(rope: Tensor, num_tokens: int) -> Tensor:
    """Rotations (..., M, 2 * head_dim), sines then cosines, with `num_tokens` rows in front that do not rotate."""
    if num_tokens == 0:
        return rope
    sines, cosines = rope.chunk(2, dim=-1)
    shape = (*sines.shape[:-2], num_tokens, sines.shape[-1])
    still = torch.cat([sines.new_zeros(shape), cosines.new_ones(shape)], dim=-1)
    return torch.cat([still, rope], dim=-2)


def _extend_bias(bias: Tensor, num_prefix_tokens: int, num_tokens: int) -> Tensor:
    """A relative position bias (1, h, N, N) with rows and columns of zeros for tokens behind the prefix tokens."""
    for dim in (-2, -1) if num_tokens else ():
        prefix, rest = bias.tensor_split([num_prefix_tokens], dim)
        shape = list(bias.shape)
        shape[dim] = num_tokens
        bias = torch.cat([prefix, bias.new_zeros(shape), rest], dim)
    return bias
