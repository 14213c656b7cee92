"""PromptedViT: a timm vision transformer, held and frozen, that carries a prompt.

Only this file knows timm's internals.

The sequence in a prompted block is `[prefix tokens, prompt tokens, patch tokens]`. The prompt enters after the position
embedding and has no position of its own: where a block rotates queries and keys (RoPE), prompt tokens are not rotated.

Legend: B batch, C channels, H, W pixels, M patch tokens, P prompt tokens, N prefix + patch tokens, D embed_dim.
"""

import difflib
import hashlib
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models import Beit, Eva, VisionTransformer, beit, eva, load_state_dict, vision_transformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

import vpt.models.nano  # noqa: F401  # registers the backbone that ships in the package
from vpt.models.attention import KeysValues, can_absorb, prompt_keys_values, relative_bias, run_block, why_not_fast
from vpt.models.constants import Constants
from vpt.models.prompts import Blocks, PromptKind, VisualPrompt, format_blocks, resolve_blocks

ViT = VisionTransformer | Eva | Beit
PromptImpl = Literal["auto", "concat"]

SUPPORTED = "plain ViTs that timm builds on VisionTransformer, Eva or Beit"
POOLING = (VisionTransformer, VisionTransformerDistilled, Eva, Beit)  # whose "token" pooling reads prefix tokens only


class PromptedViT(nn.Module):
    """A frozen timm ViT that carries a prompt; the prompt is all that trains.

    The ViT is held, not copied: its parameters lose `requires_grad`, it stays in eval mode (no dropout, no drop path)
    also while the prompt trains, and the same object may be held by several prompted backbones. With `prompt=None`
    the results are those of the ViT, bit for bit.

    Args:
        vit: A plain timm ViT: anything that timm builds on `VisionTransformer`, `Eva` or `Beit`. A classifier in it is
            not used.
        prompt: "deep", "shallow", None, or a ready `VisualPrompt`, which brings what the next three say.
        num_tokens: P, prompt tokens in each prompted block.
        blocks: Blocks that a deep prompt enters: "all", "first:k", "last:k" or a list of indices.
        dropout: Dropout of prompt tokens, drawn for each sample.
        impl: "auto" computes a deep prompt as keys and values in every block that `attention.py` understands, with the
            same result for less work; "concat" always inserts the tokens, the plain reading of the paper.

    Raises:
        TypeError: `vit` is not a model that can be prompted.
        ValueError: The prompt does not fit the ViT, or a number is out of range.

    References:
        Visual Prompt Tuning (Jia et al., 2022), https://arxiv.org/abs/2203.12119, equations 4 to 7.

    Example:
        >>> vit = timm.create_model("vit_nano_patch8_64", num_classes=0)
        >>> backbone = PromptedViT(vit, prompt="deep", num_tokens=10)
        >>> images = torch.zeros(2, 3, 64, 64)
        >>> backbone(images).shape, backbone.forward_features(images).shape
        (torch.Size([2, 192]), torch.Size([2, 65, 192]))
    """

    def __init__(
        self,
        vit: ViT,
        prompt: PromptKind | VisualPrompt | None = "deep",
        *,
        num_tokens: int = 10,
        blocks: Blocks = "all",
        dropout: float = 0.0,
        impl: PromptImpl = "auto",
    ) -> None:
        super().__init__()
        if impl not in get_args(PromptImpl):
            raise ValueError(f"prompt.impl must be one of {', '.join(get_args(PromptImpl))}, got {impl!r}")
        _check_supported(vit)
        self.vit = vit.requires_grad_(False).eval()
        if isinstance(prompt, str):
            prompt = VisualPrompt(
                num_tokens,
                self.embed_dim,
                kind=prompt,
                blocks=(0,) if prompt == "shallow" and blocks == "all" else resolve_blocks(blocks, self.depth),
                dropout=dropout,
                patch_size=vit.patch_embed.patch_size,
            )
        if prompt is not None and (prompt.embed_dim != self.embed_dim or prompt.blocks[-1] >= self.depth):
            raise ValueError(f"{prompt} does not fit a ViT of embed_dim {self.embed_dim} and {self.depth} blocks")
        self.prompt = prompt
        self.impl: PromptImpl = impl
        self._paths = {
            block: _choose_path(vit.blocks[block], prompt, impl) for block in (prompt.blocks if prompt else ())
        }
        self._constants: Constants[KeysValues] = Constants()

    @property
    def paths(self) -> dict[int, str]:
        """How each prompted block is computed: "kv", or "concat" and the reason."""
        return dict(self._paths)

    @property
    def computes_prefix_only(self) -> bool:
        """Whether the last block computes prefix tokens only, because nothing else is pooled."""
        pools_prefix = type(self.vit) in POOLING and self.vit.global_pool == "token"
        is_asked = self.prompt is not None and self.impl == "auto"
        return is_asked and pools_prefix and why_not_fast(self.vit.blocks[-1]) is None

    @property
    def embed_dim(self) -> int:
        """D, token width."""
        return int(self.vit.embed_dim)

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return len(self.vit.blocks)

    @property
    def num_prefix_tokens(self) -> int:
        """CLS and registers, as timm counts them; they come first in the sequence."""
        return int(self.vit.num_prefix_tokens)

    @property
    def name(self) -> str:
        """The timm name with its pretrained tag, such as `vit_tiny_patch16_224.augreg_in21k_ft_in1k`."""
        return name_of(self.vit)

    def train(self, mode: bool = True) -> "PromptedViT":
        """Set the mode of the prompt; the frozen ViT stays in eval mode."""
        super().train(mode)
        self.vit.eval()
        self._constants.clear()  # an edit through `.data` leaves no other trace
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D), pooled as the timm model pools, of normalised images (B, 3, H, W)."""
        return self.forward_prompted(*self.forward_frozen(images))

    def forward_frozen(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """What no prompt changes: the tokens (B, N, D) that enter the first prompted block, and their position.

        The position is the rotary or relative position embedding of models that have one; it is the same for all
        images of a size. Without a prompt the features (B, D) are all done, and there is no position.
        """
        tokens, position = self._embed(images)
        if self.prompt is None:
            return self._pool(self._run_blocks(tokens, position)), None
        return self._run_blocks(tokens, position, last=self.prompt.blocks[0]), position

    def forward_prompted(self, tokens: Tensor, position: Tensor | None = None) -> Tensor:
        """Features (B, D) from what `forward_frozen` gave."""
        if self.prompt is None:
            return tokens
        num_read = self.num_prefix_tokens if self.computes_prefix_only else None
        return self._pool(self._run_blocks(tokens, position, first=self.prompt.blocks[0], num_read=num_read))

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens (B, N, D) after the final norm, prefix tokens first, prompt tokens removed."""
        features: Tensor = self.vit.norm(self._run_blocks(*self._embed(images)))
        return features

    def extra_repr(self) -> str:
        """The path of each prompted block."""
        by_path: dict[str, list[int]] = {}
        for block, path in self._paths.items():
            by_path.setdefault(path, []).append(block)
        lines = [f"blocks {format_blocks(blocks)}: {path}" for path, blocks in by_path.items()]
        if self.computes_prefix_only:
            lines.append(f"block {self.depth - 1}: prefix tokens only, for what is pooled")
        return "; ".join(lines)

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens that enter block 0, and the position embedding that blocks apply, of models that have one."""
        vit, position = self.vit, None
        tokens = vit.patch_embed(images.to(next(vit.patch_embed.parameters()).dtype))
        if isinstance(vit, Beit):
            tokens = torch.cat([vit.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
            tokens = tokens if vit.pos_embed is None else tokens + vit.pos_embed
            return tokens, None if vit.rel_pos_bias is None else vit.rel_pos_bias()
        if isinstance(vit, Eva):
            tokens, position = vit._pos_embed(tokens)
        else:
            tokens = vit.patch_drop(vit._pos_embed(tokens))
        return vit.norm_pre(tokens), position

    def _pool(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.vit.forward_head(self.vit.norm(tokens), pre_logits=True)
        return features

    def _run_blocks(
        self,
        tokens: Tensor,
        position: Tensor | None,
        first: int = 0,
        last: int | None = None,
        num_read: int | None = None,
    ) -> Tensor:
        """Run blocks `first` to `last`, which is left out; of the very last block only `num_read` tokens are wanted."""
        for index in range(first, self.depth if last is None else last):
            arguments = (index, tokens, position, num_read if index == self.depth - 1 else None)
            if self.vit.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpointed(self._run_block, *arguments, use_reentrant=False)
            else:
                tokens = self._run_block(*arguments)
        if self.prompt is not None and self.prompt.kind == "shallow" and num_read is None and last is None:
            tokens = self._remove(tokens, self.prompt.num_tokens)
        return tokens

    def _run_block(self, index: int, tokens: Tensor, position: Tensor | None, num_read: int | None) -> Tensor:
        """Tokens after a block, of which a shallow prompt's are some."""
        block, prompt = self.vit.blocks[index], self.prompt
        enters = prompt is not None and prompt.enters(index)
        rope, bias = self._rope_and_bias(index, position)
        few: dict[str, Any] = {"num_queries": num_read, "absorbed": num_read is not None and can_absorb(block)}
        if enters and self._paths[index] == "kv":
            keys_values = self._keys_values(index, tokens, few["absorbed"])
            return run_block(block, tokens, keys_values, rope=rope, bias=bias, **few)
        if prompt is not None and enters:
            tokens = self._insert(tokens, prompt(index, tokens.shape[0]))
        num_held = prompt.num_tokens if prompt is not None and (enters or prompt.kind == "shallow") else 0
        rope = _extend_rope(rope, num_held) if rope is not None and num_held else rope
        bias = _extend_bias(bias, self.num_prefix_tokens, num_held) if bias is not None and num_held else bias
        if num_read is not None or (bias is not None and num_held):  # BEiT's block cannot take a longer sequence
            tokens = run_block(block, tokens, rope=rope, bias=bias, **few)
        elif isinstance(self.vit, Eva):
            tokens = block(tokens, rope=rope)
        elif isinstance(self.vit, Beit):
            tokens = block(tokens, shared_rel_pos_bias=position)
        else:
            tokens = block(tokens)
        drops = prompt is not None and prompt.kind == "deep" and num_held > 0
        return self._remove(tokens, num_held) if drops else tokens

    def _keys_values(self, index: int, tokens: Tensor, absorbed: bool) -> KeysValues:
        """Keys and values of the prompt in a block; where nothing trains or draws they are constants that are kept."""
        assert self.prompt is not None
        block: Any = self.vit.blocks[index]
        prompt, batch_size, dtype = self.prompt, tokens.shape[0], tokens.dtype

        def compute() -> KeysValues:
            return prompt_keys_values(block, prompt(index, batch_size).to(dtype), absorbed)

        if torch.is_grad_enabled() or prompt.draws or torch.compiler.is_compiling():
            return compute()
        sources = (prompt.tokens, *block.norm1.parameters(), *block.attn.parameters())
        return self._constants.get((index, dtype, absorbed), sources, compute)

    def _rope_and_bias(self, index: int, position: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The rotary embedding and the relative position bias of a block, for the sequence without prompt tokens."""
        if isinstance(self.vit, Beit):
            return None, relative_bias(self.vit.blocks[index], position)
        # Models with `rope_mixed` have an embedding for each block, stacked first; others share one.
        return (position[index] if position is not None and self.vit.rope_mixed else position), None

    def _insert(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        prefix = self.num_prefix_tokens
        prompt = prompt.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return torch.cat([tokens[:, :prefix], prompt, tokens[:, prefix:]], dim=1)

    def _remove(self, tokens: Tensor, num_tokens: int) -> Tensor:
        prefix = self.num_prefix_tokens
        return torch.cat([tokens[:, :prefix], tokens[:, prefix + num_tokens :]], dim=1)


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
        pretrained: Load the weights that timm knows under this name, from the package, the hub's cache or the hub.
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
            _check_supported(empty)
            if 0 in (empty.patch_embed.grid_size or ()):
                raise ValueError(f"img_size={img_size} is smaller than its patches, {empty.patch_embed.patch_size}")
    except TypeError as error:
        raise ValueError(f"backbone.name={name}: {_first_line(error)}") from error
    except Exception as error:  # timm's models raise kinds of their own
        raise ValueError(f"backbone.name={name} cannot be built: {_first_line(error)}") from error
    try:
        vit = timm.create_model(name, pretrained=pretrained and path is None, num_classes=0, **options)
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


def _check_supported(vit: nn.Module) -> None:
    """A model is understood when it runs the very `forward_features` of timm's ViT, Eva or Beit."""
    known = (VisionTransformer.forward_features, Eva.forward_features, Beit.forward_features)
    if not isinstance(vit, ViT) or type(vit).forward_features not in known:
        raise TypeError(
            f"{type(vit).__name__} cannot be prompted; supported are {SUPPORTED} (ViT, DeiT, AugReg, MAE, CLIP, "
            "SigLIP, DINO, DINOv2, DINOv3, EVA-02, BEiT), see docs/backbones.md"
        )


def _load_checkpoint(vit: ViT, name: str, path: Path) -> None:
    """Load all weights of a ViT from a file; a classifier in the file is left out, anything else must match."""
    family: Any = eva if isinstance(vit, Eva) else beit if isinstance(vit, Beit) else vision_transformer
    try:
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


def _choose_path(block: nn.Module, prompt: VisualPrompt | None, impl: PromptImpl) -> str:
    if impl == "concat":
        return "concat (asked for)"
    if prompt is not None and prompt.kind == "shallow":
        return "concat (a shallow prompt travels with the sequence)"
    reason = why_not_fast(block)
    return "kv" if reason is None else f"concat ({reason})"


def _extend_rope(rope: Tensor, num_tokens: int) -> Tensor:
    """Rotations (..., M, 2 * head_dim), sines then cosines, with `num_tokens` rows in front that do not rotate."""
    sines, cosines = rope.chunk(2, dim=-1)
    shape = (*sines.shape[:-2], num_tokens, sines.shape[-1])
    still = torch.cat([sines.new_zeros(shape), cosines.new_ones(shape)], dim=-1)
    return torch.cat([still, rope], dim=-2)


def _extend_bias(bias: Tensor, num_prefix_tokens: int, num_tokens: int) -> Tensor:
    """A relative position bias (1, h, N, N) with rows and columns of zeros for tokens behind the prefix tokens."""
    for dim in (-2, -1):
        prefix, rest = bias.tensor_split([num_prefix_tokens], dim)
        shape = list(bias.shape)
        shape[dim] = num_tokens
        bias = torch.cat([prefix, bias.new_zeros(shape), rest], dim)
    return bias
