"""Loading timm ViTs, and the differences between their families.

Three families are supported, by their timm base class: `VisionTransformer`, `Eva` (rotary position embedding) and
`Beit` (relative position bias). `position` is the rotary embedding or relative bias that a model passes from block to
block beside its tokens.

Legend: B batch, H, W pixels, M patch tokens, N prefix + patch tokens, D embed_dim, h heads.
"""

import difflib
import hashlib
import math
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, get_session
from timm.data.config import resolve_model_data_config
from timm.layers.norm import RmsNorm, SimpleNorm
from timm.models import Beit, Eva, VisionTransformer, beit, eva, load_state_dict, vision_transformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

import vpt.models.nano  # noqa: F401  # registers the bundled backbone with timm
from vpt.models.attention import relative_bias, run_block

ViT = VisionTransformer | Eva | Beit
TRAITS = {  # of a ViT that are not in its fingerprint, and their names in messages
    "pooling": "pooling",
    "channels": "input channels",
    "patch_size": "patches of",
    "num_heads": "attention heads",
    "scale": "scale of attention",
    "norm_eps": "epsilon of norms",
    "activation": "activation function",
    "tokens": "patch embedding or position embedding",
    "position": "position embedding in attention",
}
SAMPLED = ("activation", "tokens", "position")
PROBED = (-2.5, -1.0, -0.3, 0.5, 1.5, 2.5)  # inputs of the activation function
NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm, SimpleNorm)


def load_vit(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    img_size: int | tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> ViT:
    """Create a timm ViT without a classifier.

    Args:
        name: A timm name, with or without a pretrained tag.
        pretrained: Load the weights registered in timm, from the package, the hub's cache or the hub. Downloads are
            verified by the sha256 that the hub publishes.
        checkpoint: Load the weights from this file (.safetensors, or .pth read with weights_only) instead.
        img_size: Input size in pixels, one side or (height, width); the position embedding is resampled to it. None
            keeps the size of the model.
        dtype: Dtype of the weights, such as torch.bfloat16 to halve the memory; None keeps float32.

    Raises:
        ValueError: The name is unknown, the model is not a supported ViT, or weights do not fit or are not available.
        FileNotFoundError: The checkpoint does not exist.
    """
    _check_name(name)
    path = None if checkpoint is None else Path(checkpoint).expanduser()
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"checkpoint={checkpoint}: no such file")
    options: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    try:
        with torch.device("meta"):  # refuse unsupported models before any download
            empty: Any = timm.create_model(name, pretrained=False, num_classes=0, **options)
            check_supported(empty)
            if 0 in (empty.patch_embed.grid_size or ()):
                raise ValueError(f"must be at least a patch of {empty.patch_embed.patch_size} px")
    except TypeError as error:
        raise ValueError(f"name={name}: {_first_line(error)}") from error
    except Exception as error:  # timm models raise various exceptions
        parameter = f"name={name}" if img_size is None else f"img_size={img_size}"
        raise ValueError(f"{parameter}: {name} cannot be built: {_first_line(error)}") from error
    try:
        if pretrained and path is None:
            _check_connection(name)
        with _checked_downloads():
            vit = timm.create_model(name, pretrained=pretrained and path is None, num_classes=0, **options)
    except _DamagedDownloadError as error:
        raise ValueError(f"name={name}: {error}") from error
    except Exception as error:  # the hub, safetensors and timm raise various exceptions
        raise ValueError(f"name={name}: {_describe_missing_weights(name, error)}") from error
    assert isinstance(vit, ViT)
    if path is not None:
        _load_checkpoint(vit, name, path)
    return vit.to(dtype)


def name_of(vit: ViT) -> str:
    """The timm name with its pretrained tag, such as `vit_tiny_patch16_224.augreg_in21k_ft_in1k`."""
    config: Any = vit.pretrained_cfg
    return f"{config['architecture']}.{config['tag']}" if config.get("tag") else str(config["architecture"])


def preprocessing_of(vit: ViT) -> dict[str, Any]:
    """Preprocessing of images for this ViT, as plain JSON values.

    That is size (height, width) in pixels; mean and std of the three channels, for pixels in [0, 1]; interpolation,
    crop_pct and crop_mode, as timm resolves them for the weights.
    """
    config: dict[str, Any] = resolve_model_data_config(vit)  # type: ignore[no-untyped-call]
    return {
        "size": [int(side) for side in vit.patch_embed.img_size or config["input_size"][1:]],
        **{name: [float(value) for value in config[name]] for name in ("mean", "std")},
        "interpolation": str(config["interpolation"]),
        "crop_pct": float(config["crop_pct"]),
        "crop_mode": str(config["crop_mode"]),
    }


def fingerprint(vit: ViT) -> str:
    """Digest of the weights, independent of input size, classifier and dtype.

    64 evenly spaced values of each parameter are read as bfloat16, so that a backbone in bfloat16 has the same digest.
    Position embedding and patch kernels are left out, because timm resamples them to other input and patch sizes.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(vit.named_parameters()):
        if name.startswith(("pos_embed", "patch_embed.", "head.", "head_dist.")):
            continue
        values = parameter.detach().reshape(-1)
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(values[:: max(1, len(values) // 64)][:64].to("cpu", torch.bfloat16).float().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def traits_of(vit: ViT, size: Sequence[int]) -> dict[str, Any]:
    """What determines features beside the parameters in `fingerprint`, as plain JSON values; see `TRAITS`.

    `tokens` and `position` are the root mean square and eight weighted sums of what enters block 0, for a fixed image
    of `size`, (height, width) in pixels. They are None where the ViT takes another size or a number is not finite;
    `position` also where there is none.
    """
    embed_parameter, attention = next(vit.patch_embed.parameters()), getattr(vit.blocks[0], "attn", None)
    scale, patch = getattr(attention, "scale", None), list(vit.patch_embed.patch_size)
    epsilons: list[Any] = [getattr(norm, "eps", None) for norm in norms_of(vit)]
    activations = {name.rpartition(".")[2]: part for name, part in vit.named_modules()}
    traits: dict[str, Any] = {
        "size": list(size),
        "pooling": describe_pooling(vit),
        "channels": embed_parameter.shape[1],
        "patch_size": patch,
        "num_heads": getattr(attention, "num_heads", None),
        "scale": float(scale) if isinstance(scale, float) else None,
        "norm_eps": sorted({float(eps) for eps in epsilons if eps is not None}),
        "activation": None if "act" not in activations else activations["act"](torch.tensor(PROBED)).tolist(),
        "tokens": None,
        "position": None,
    }
    takes_any = not vit.patch_embed.strict_img_size and [side % n for side, n in zip(size, patch, strict=True)] == [
        0,
        0,
    ]
    fits = takes_any or list(vit.patch_embed.img_size or size) == list(size)
    if fits and not embed_parameter.is_meta:
        pixels = torch.arange(traits["channels"] * size[0] * size[1]) * 0.7
        images = (2 * pixels.sin()).view(1, -1, *size).to(embed_parameter)
        was_training = vit.training
        tokens, position = embed(vit.eval(), images)
        vit.train(was_training)
        traits["tokens"] = _sums(tokens)
        traits["position"] = None if position is None else _sums(position)
    return traits


def describe_pooling(vit: ViT) -> str:
    """How a ViT pools, such as "token", "avg" or "avg with prefix tokens"; a class outside timm is named."""
    module = type(vit).forward_head.__module__
    with_prefix = " with prefix tokens" if getattr(vit, "pool_include_prefix", False) else ""
    own = "" if module.startswith("timm.") else f" of {type(vit).__name__}"
    return f"{vit.global_pool or 'none'}{with_prefix}{own}"


def differing_trait(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """The first trait in which two results of `traits_of` differ, for a message; None if they agree.

    Sums may differ by 2 % of the root mean square, since weights may be rounded to bfloat16. A trait that is None is
    not compared.
    """
    for name, label in TRAITS.items():
        one, other = wanted[name], found[name]
        if one is None or other is None or one == other:
            continue
        if name not in SAMPLED:
            return f"{label} {other}, not {one}"
        most = 1e-5 if name == "activation" else 2e-2 * one[0]
        if len(one) != len(other) or any(abs(a - b) > most for a, b in zip(one, other, strict=True)):
            return f"another {label}"
    return None


def _sums(tensor: Tensor) -> list[float] | None:
    """Root mean square of a tensor, and eight sums with fixed weights, which a change of any number changes."""
    numbers = tensor.detach().double().flatten().cpu()
    scaled, places = numbers / len(numbers) ** 0.5, torch.arange(1, len(numbers) + 1, dtype=torch.float64)
    sums = [scaled.norm(), *(scaled @ (places * root**0.5).cos() for root in (2, 3, 5, 7, 11, 13, 17, 19))]
    rounded = [float(f"{number:.6g}") for number in sums]
    return rounded if all(map(math.isfinite, rounded)) else None


def norms_of(vit: ViT) -> list[nn.Module]:
    """Norm layers of a ViT, except those of a convolutional stem."""
    return [module for module in vit.modules() if isinstance(module, NORMS)]


def check_supported(vit: nn.Module) -> None:
    """Raise a TypeError unless the model runs the original `forward_features` of VisionTransformer, Eva or Beit."""
    known = (VisionTransformer.forward_features, Eva.forward_features, Beit.forward_features)
    if not isinstance(vit, ViT) or type(vit).forward_features not in known:
        supported = "plain timm ViTs based on VisionTransformer, Eva or Beit"
        examples = "ViT, DeiT, AugReg, MAE, CLIP, SigLIP, DINO, DINOv2, DINOv3, EVA-02, BEiT; docs/backbones.md"
        raise TypeError(f"{type(vit).__name__} cannot be prompted; supported are {supported} ({examples})")


def check_images(images: object, vit: ViT | None = None) -> None:
    """Raise an error that names `images` unless they are (B, C, H, W) in floating point, and of the size of the ViT.

    Numbers that are not finite are not looked for: the results are nan, too.

    Raises:
        TypeError: They are no tensor, or of another dtype.
        ValueError: The shape, the number of channels, the size or the device is not that of the ViT.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images: must be a torch.Tensor (B, 3, H, W), got {type(images).__name__}")
    if images.ndim != 4:
        raise ValueError(f"images: must be (B, 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(
            f"images: must be normalised numbers in floating point, got {images.dtype}; see preprocessing_of"
        )
    if vit is None:
        return
    kernel, own, size = next(vit.patch_embed.parameters()), vit.patch_embed.img_size, tuple(images.shape[-2:])
    if images.device != kernel.device:
        raise ValueError(f"images: are on {images.device}, and the backbone is on {kernel.device}; move one of them")
    if kernel.ndim == 4 and images.shape[1] != kernel.shape[1]:
        raise ValueError(f"images: must have {kernel.shape[1]} channels for this backbone, got {tuple(images.shape)}")
    if own is not None and vit.patch_embed.strict_img_size and size != tuple(own):
        how = f"resize them, or create the ViT with img_size={size}"
        raise ValueError(f"images: must be {tuple(own)} px, height and width, for this backbone, got {size}; {how}")


def check_input_size(vit: ViT) -> None:
    """Raise a ValueError if the patches do not cover the whole input, so that no token would see its right or bottom.

    `load_vit` does not refuse such a size, since a task file of version 0.1 may have it.
    """
    embed: Any = vit.patch_embed
    size, patch = embed.img_size, embed.patch_size
    if size is None or getattr(embed, "dynamic_img_pad", False):
        return
    lower, higher = ([f(s / p) * p for s, p in zip(size, patch, strict=True)] for f in (math.floor, math.ceil))
    if lower == higher:
        return
    given, *near = (str(sides[0] if sides[0] == sides[1] else list(sides)) for sides in (size, lower, higher))
    raise ValueError(
        f"img_size={given}: not whole patches of {patch[0]} x {patch[1]} px, so that the right or lower edge of images "
        f"would not be seen; use img_size={' or '.join(near if min(lower) else near[1:])}"
    )


def grid_size(vit: ViT, images: Tensor) -> tuple[int, int]:
    """Rows and columns of the patch tokens of images (B, 3, H, W)."""
    check_images(images, vit)
    rows, columns = vit.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
    return int(rows), int(columns)


def embed(vit: ViT, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, N, D) that enter block 0, and their position, which is the same for all images of one size.

    For errors see `check_images`.
    """
    check_images(images, vit)
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
    """Run a block as timm does, on a sequence that may have prompt tokens after its prefix tokens."""
    block: Any = vit.blocks[index]
    if isinstance(vit, Beit) and num_prompt_tokens:  # its attention cannot take a longer sequence
        return run_block(block, tokens, bias=rope_and_bias(vit, index, position, num_prompt_tokens)[1])
    if isinstance(vit, Beit):
        return block(tokens, shared_rel_pos_bias=position)  # type: ignore[no-any-return]
    if isinstance(vit, Eva):
        return block(tokens, rope=rope_and_bias(vit, index, position, num_prompt_tokens)[0])  # type: ignore[no-any-return]
    return block(tokens)  # type: ignore[no-any-return]


def rope_and_bias(
    vit: ViT, index: int, position: Tensor | None, num_prompt_tokens: int = 0
) -> tuple[Tensor | None, Tensor | None]:
    """Rotary embedding and relative bias (1, h, N, N) of a block; None for each that the model does not have.

    Prompt tokens in the sequence, after the prefix tokens, are not rotated and have zero bias.
    """
    if isinstance(vit, Beit):
        bias = relative_bias(vit.blocks[index], position)
        return None, None if bias is None else _extend_bias(bias, vit.num_prefix_tokens, num_prompt_tokens)
    if position is None:
        return None, None
    # Models with `rope_mixed` have an embedding for each block, stacked first; others share one.
    return _extend_rope(position[index] if vit.rope_mixed else position, num_prompt_tokens), None


def pools_prefix_only(vit: ViT) -> bool:
    """Whether pooling is known to read prefix tokens only."""
    # A subclass outside timm may pool in another way.
    return type(vit) in (VisionTransformer, VisionTransformerDistilled, Eva, Beit) and vit.global_pool == "token"


class _DamagedDownloadError(ValueError):
    """A downloaded file that differs from the file on the hub."""


def _check_connection(name: str) -> None:
    """Ask the hub once for weights that are not in its cache: its client would repeat each request for a minute."""
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None or not config.hf_hub_id or constants.HF_HUB_OFFLINE:
        return
    folder = f"models--{config.hf_hub_id.replace('/', '--')}"
    if any(Path(constants.HF_HUB_CACHE).glob(f"{folder}/snapshots/*/*")):
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # those of the hub's client, of its library and of sockets
        raise ConnectionError(f"{constants.ENDPOINT} cannot be reached: {_first_line(error)}") from error


@contextmanager
def _checked_downloads() -> Iterator[None]:
    """Verify files that are added to the hub's cache inside this context by the sha256 in their name.

    The hub's client compares sizes only. Small files are named by a git sha1 and are not verified.
    """
    cache = Path(constants.HF_HUB_CACHE)
    before = set(cache.glob("models--*/blobs/*"))
    try:
        yield
    finally:  # also after an error, or an unreadable file would stay in the cache
        for blob in set(cache.glob("models--*/blobs/*")) - before:
            if not re.fullmatch("[0-9a-f]{64}", blob.name):
                continue
            with blob.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != blob.name:
                blob.unlink()
                raise _DamagedDownloadError("the download differs from the file on the hub and was removed; try again")


def _load_checkpoint(vit: ViT, name: str, path: Path) -> None:
    """Load the weights of a ViT from a file; a classifier in the file is ignored, everything else must match."""
    family: Any = eva if isinstance(vit, Eva) else beit if isinstance(vit, Beit) else vision_transformer
    try:
        _refuse_packed(path)
        state = family.checkpoint_filter_fn(load_state_dict(str(path), device="cpu", weights_only=True), vit)
        missing, unexpected = vit.load_state_dict(state, strict=False)
    except AttributeError as error:  # of timm, for a tensor or a list
        how = "torch.save(vit.state_dict(), PATH)"
        raise ValueError(
            f"checkpoint={path}: does not fit {name}: it is no dict of weights; write it by {how}"
        ) from error
    except Exception as error:  # safetensors, pickle, timm and torch raise various exceptions
        raise ValueError(f"checkpoint={path}: does not fit {name}: {_first_line(error)}") from error
    odd = [key for key in unexpected if not key.startswith(("head.", "head_dist."))]
    if missing or odd:
        what = f"it lacks {missing[0]}" if missing else f"it has {odd[0]}, which the model does not have"
        raise ValueError(f"checkpoint={path}: does not fit {name}: {what} ({len(missing) + len(odd)} keys differ)")


def _refuse_packed(path: Path) -> None:
    """Refuse a .pth file with compressed members, which could expand without limit; torch never writes them."""
    if zipfile.is_zipfile(path) and path.suffix != ".safetensors":
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                why = "its members are compressed, unlike those of torch.save; save it again with torch.save"
                raise ValueError(why)


def _check_name(name: str) -> None:
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    architecture, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if timm.is_model(name) and tag and tag not in tags:
        raise ValueError(f"name={name}: the pretrained tags of {architecture} are {', '.join(tags) or 'none'}")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"name={name}: not a timm model{hint}")


def _describe_missing_weights(name: str, error: Exception) -> str:
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None or not (config.hf_hub_id or config.url or config.file):
        return "timm has no pretrained weights for it; use pretrained=False or checkpoint=FILE"
    source = f"model.safetensors of {config.hf_hub_id} on the hub" if config.hf_hub_id else config.url
    how = f"On a machine with network access download {source}, copy it to this machine and use checkpoint=FILE"
    return f"its weights could not be loaded ({_first_line(error)}). {how}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__


def _extend_rope(rope: Tensor, num_tokens: int) -> Tensor:
    """Prepend `num_tokens` rows without rotation to a rotary embedding (..., M, 2 d): sines, then cosines."""
    if num_tokens == 0:
        return rope
    sines, cosines = rope.chunk(2, dim=-1)
    shape = (*sines.shape[:-2], num_tokens, sines.shape[-1])
    return torch.cat([torch.cat([sines.new_zeros(shape), cosines.new_ones(shape)], dim=-1), rope], dim=-2)


def _extend_bias(bias: Tensor, num_prefix_tokens: int, num_tokens: int) -> Tensor:
    """Insert rows and columns of zeros for prompt tokens, after the prefix tokens, into a bias (1, h, N, N)."""
    for dim in (-2, -1) if num_tokens else ():
        prefix, rest = bias.tensor_split([num_prefix_tokens], dim)
        shape = list(bias.shape)
        shape[dim] = num_tokens
        bias = torch.cat([prefix, bias.new_zeros(shape), rest], dim)
    return bias
