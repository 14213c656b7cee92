"""Where prompt tokens start, other than at random: at patch tokens of pictures, or at the prompt of another task.

Patch tokens are those that enter each prompted block of the bare backbone. Tokens of that kind are what its attention
knows, which matters most on self-supervised backbones (Wang et al., 2024).

Legend: B images, M patch tokens of an image, T patch tokens that are looked at, P prompt tokens, L prompted blocks, D
embed_dim, h heads, d their width.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vpt.models.attention import PRE_NORM, key_value_weights, why_not_fast
from vpt.models.backbone import PromptedViT
from vpt.models.prompts import VisualPrompt, format_blocks, uniform_bound
from vpt.models.task_file import open_task
from vpt.models.tuning import pretrained_fingerprint

PatchStart = Literal["patch", "prototype", "vipamin"]

NO_PICTURES = "there are no pictures to start a prompt from"
NUM_PER_IMAGE = 16  # patch tokens that are looked at, at least
NUM_STEPS = 10  # of k-means
NUM_MATCHED = 4  # patch tokens whose mean a token of "vipamin" begins with: k of the paper, which searches it
NEW_SHARE = 0.1  # of a direction of its own: lambda of the paper, which searches it


@torch.no_grad()
def start_from_patches(
    backbone: PromptedViT, batches: Iterable[Tensor], start: PatchStart = "patch", *, seed: int = 0
) -> None:
    """Let the prompt start at patch tokens of images, which the bare backbone is run on once.

    A block that norms first sees but the direction of a deep prompt's token. Its length only says how far a step turns
    it, and patch tokens are some ten times as long as those of a uniform start, which learning rates are made for; so
    they are made as long as those, which changes no result.

    Args:
        backbone: Its prompt starts anew; nothing else of it changes.
        batches: Normalised images (B, 3, H, W), some hundred in all.
        start: "patch": P patches are drawn, and each block's tokens are what has become of them there. "prototype":
            each block's tokens are the centres of P groups of the patch tokens that enter it (k-means). "vipamin":
            each block's tokens are `matched_tokens` of the patch tokens that enter it, mean over the images.
        seed: Of what is drawn.

    Raises:
        ValueError: There is no prompt, another way is asked for, the images have fewer patches than P, or "vipamin"
            does not understand a block.

    References:
        Revisiting the Power of Prompt for Visual Tuning (Wang et al., ICML 2024), https://arxiv.org/abs/2402.02382, for
        "patch" and "prototype".
    """
    prompt = backbone.prompt
    if start not in get_args(PatchStart):
        raise ValueError(f"prompts start from patches by {', '.join(get_args(PatchStart))}, got {start!r}")
    if prompt is None:
        raise ValueError("there is no prompt that could start from patches; give the backbone one")
    generator = torch.Generator().manual_seed(seed)
    if start == "vipamin":
        tokens = _match_in_blocks(backbone, prompt, batches, generator)
    else:
        tokens = _draw(look_at(backbone, prompt, batches, generator), prompt.num_tokens, start)
    backbone.start_prompt(_shorten(backbone, prompt, tokens))


def start_from_task(backbone: PromptedViT, path: str | Path) -> None:
    """Let the prompt start at the tokens of a task file; the file's head is not used.

    Args:
        backbone: The backbone that the task was made for, with a prompt of as many tokens in the same blocks.
        path: The task file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no prompt, in the backbone or in the file, or the file's is another one; or the file is
            damaged, or of another backbone.
    """
    metadata, tensors = open_task(Path(path))
    prompt = backbone.prompt
    if pretrained_fingerprint(backbone.vit) != metadata.fingerprint:
        raise ValueError(f"{path}: made for the backbone {metadata.backbone}, its prompt cannot start another one's")
    if prompt is None or metadata.prompt is None:
        raise ValueError(f"{path}: {'there is no prompt to start' if prompt is None else 'has no prompt'}")
    own = _layout(prompt.kind, prompt.num_tokens, prompt.blocks)
    its = _layout(*(metadata.prompt[name] for name in ("kind", "num_tokens", "blocks")))
    if own != its:
        raise ValueError(f"{path}: its prompt has {its}, but the new one {own}; use the same for both")
    prompt.start_from(tensors["prompt.tokens"])


def _layout(kind: str, num_tokens: int, blocks: list[int] | tuple[int, ...]) -> str:
    return f"kind={kind}, num_tokens={num_tokens}, blocks={format_blocks(blocks)}"


def matched_tokens(
    patches: Tensor, key_weight: Tensor, value_weight: Tensor, num_tokens: int, generator: torch.Generator
) -> Tensor:
    """Tokens (P, D), each the mean of patch tokens that have like keys, and a little of a direction of its own.

    For each token a direction p is drawn. With keys W_k x and values W_v x,

        matched = mean of the k patch tokens x_j with the largest cos(W_k p, W_k x_j),
        new = W_v^+ (1 - V V^T) W_v p, of the length of `matched`,
        token = (1 - lambda) matched + lambda new,

    where the columns of V span the values of the patch tokens, so that the value of `new` is orthogonal to all that
    attention over them can give.

    Args:
        patches: (M, D).
        key_weight: W_k, (h d, D).
        value_weight: W_v, (h d, D).
        num_tokens: P.
        generator: Draws the directions.

    References:
        VIPAMIN: Visual Prompt Initialization via Embedding Selection and Subspace Expansion (Park and Chung, NeurIPS
        2025), https://arxiv.org/abs/2510.16446. The formulas are those of a summary; the paper's text was not at hand.
        Ours: k and lambda are fixed, W_k and W_v have the scale of the first norm in them, V is of the values
        themselves, whose span is that of what attention makes of them, and has at most D / 2 columns, since an image
        with more than D patches would leave no direction; and `new` is made as long as `matched`, so that lambda means
        the same in every block.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> weights = torch.randn(2, 192, 192, generator=generator)
        >>> matched_tokens(
        ...     torch.randn(64, 192, generator=generator), *weights, num_tokens=10, generator=generator
        ... ).shape
        torch.Size([10, 192])
    """
    drawn = torch.randn(num_tokens, patches.shape[1], generator=generator).to(patches)
    of_drawn, of_patches = (torch.nn.functional.normalize(rows @ key_weight.T, dim=1) for rows in (drawn, patches))
    nearest = (of_drawn @ of_patches.T).topk(min(NUM_MATCHED, len(patches))).indices
    matched = patches[nearest].mean(dim=1)
    known = torch.linalg.svd(patches @ value_weight.T, full_matrices=False).Vh[: patches.shape[1] // 2]
    wanted = drawn @ value_weight.T
    wanted = wanted - wanted @ known.T @ known
    new = torch.nn.functional.normalize(wanted @ torch.linalg.pinv(value_weight).T, dim=1)
    tokens: Tensor = (1 - NEW_SHARE) * matched + NEW_SHARE * matched.norm(dim=1, keepdim=True) * new
    return tokens


def _match_in_blocks(
    backbone: PromptedViT, prompt: VisualPrompt, batches: Iterable[Tensor], generator: torch.Generator
) -> Tensor:
    """Tokens (L, P, D), matched in each block."""
    for index in prompt.blocks:
        reason = why_not_fast(backbone.vit.blocks[index])
        if reason is not None:
            raise ValueError(f"prompt.init=vipamin reads keys and values, but in block {index} {reason}; use patch")
    device = next(prompt.parameters()).device
    sums, num_images = [], 0
    for images in batches:
        sums.append([patches.float().sum(0) for patches in backbone.entering_patches(images.to(device))])
        num_images += len(images)
    if not sums:
        raise ValueError(NO_PICTURES)
    tokens = []
    for index, of_block in zip(prompt.blocks, zip(*sums, strict=True), strict=True):
        patches = torch.stack(of_block).sum(0) / num_images
        keys, values = (weight.float() for weight in key_value_weights(backbone.vit.blocks[index]))
        tokens.append(matched_tokens(patches, keys, values, prompt.num_tokens, generator))
    return torch.stack(tokens)


def _shorten(backbone: PromptedViT, prompt: VisualPrompt, tokens: Tensor) -> Tensor:
    """Tokens (L, P, D) as long as those of a uniform start, where their length says nothing."""
    vit: Any = backbone.vit
    if prompt.kind == "shallow" or not all(isinstance(vit.blocks[index], PRE_NORM) for index in prompt.blocks):
        return tokens
    scale = uniform_bound(backbone.embed_dim, vit.patch_embed.patch_size) / math.sqrt(3)  # its standard deviation
    return tokens / tokens.square().mean(-1, keepdim=True).sqrt() * scale


def _draw(patches: Tensor, num_tokens: int, start: PatchStart) -> Tensor:
    """Tokens (L, P, D): the first of the patch tokens (L, T, D), or the centres of groups that begin with them."""
    if patches.shape[1] < num_tokens:
        raise ValueError(
            f"prompt.num_tokens={num_tokens}: the pictures have only {patches.shape[1]} patches to start from; "
            "use fewer tokens or prompt.init=uniform"
        )
    tokens = patches[:, :num_tokens]
    if start == "patch":
        return tokens
    return torch.stack([_centres(*block) for block in zip(patches, tokens, strict=True)])


def look_at(
    backbone: PromptedViT, prompt: VisualPrompt, batches: Iterable[Tensor], generator: torch.Generator
) -> Tensor:
    """Patch tokens (L, T, D) of some patches of each image, in random order; the same ones in every block."""
    found, device = [], next(prompt.parameters()).device
    for images in batches:
        kept = [patches.float() for patches in backbone.entering_patches(images.to(device))]
        num_patches = kept[0].shape[1]
        num_wanted = min(num_patches, max(NUM_PER_IMAGE, prompt.num_tokens))
        drawn = torch.rand(len(images), num_patches, generator=generator).argsort(1)[:, :num_wanted].to(device)
        found.append(torch.stack([patches.take_along_dim(drawn[..., None], 1).flatten(0, 1) for patches in kept]))
    if not found:
        raise ValueError(NO_PICTURES)
    patches = torch.cat(found, dim=1)
    return patches[:, torch.randperm(patches.shape[1], generator=generator).to(device)]


def _centres(patches: Tensor, centres: Tensor) -> Tensor:
    """Centres (P, D) of groups of patches (T, D), by k-means from given ones; that of an empty group stays."""
    for _ in range(NUM_STEPS):
        nearest = torch.cdist(patches, centres).argmin(1)
        members = torch.nn.functional.one_hot(nearest, len(centres)).to(patches)
        sizes = members.sum(0)[:, None]
        centres = torch.where(sizes > 0, members.T @ patches / sizes.clamp(min=1), centres)
    return centres
