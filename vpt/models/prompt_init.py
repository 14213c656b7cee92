"""Initialisation of prompt tokens from patch tokens of images, or from the prompt of another task.

Patch tokens are taken where they enter each prompted block of the bare backbone. Its attention is used to tokens of
that distribution, which matters most on self-supervised backbones (Wang et al., 2024).

Legend: B images, M patch tokens per image, T collected patch tokens, P prompt tokens, L prompted blocks, D embed_dim,
h heads, d head width.
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
from vpt.models.vit import check_images

PatchStart = Literal["patch", "prototype", "vipamin"]

NO_IMAGES = "batches: must hold at least one image to initialise the prompt from"
NUM_PER_IMAGE = 16  # patch tokens collected per image, at least
NUM_STEPS = 10  # iterations of k-means
NUM_MATCHED = 4  # patch tokens averaged for each token by "vipamin": k in the paper, which searches it
NEW_SHARE = 0.1  # weight of the new direction in "vipamin": lambda in the paper, which searches it


@torch.no_grad()
def start_from_patches(
    backbone: PromptedViT, batches: Iterable[Tensor], start: PatchStart = "patch", *, seed: int = 0
) -> None:
    """Initialise the prompt from patch tokens of images, in one pass of the bare backbone over `batches`.

    In a pre-norm block only the direction of a deep prompt token has an effect on the result; its length only scales
    the effect of an update. Patch tokens are about ten times as long as uniformly initialised tokens, for which the
    default learning rates are chosen, so they are rescaled to that length.

    Args:
        backbone: Its prompt is initialised in place; nothing else changes.
        batches: Normalised images (B, 3, H, W), some hundred in all.
        start: "patch": P patches are drawn at random; each block gets their tokens as they enter that block.
            "prototype": each block gets the centres of P clusters of its patch tokens (k-means). "vipamin": each block
            gets `matched_tokens` of its patch tokens, averaged over the images.
        seed: Seed of the random choices.

    Raises:
        ValueError: There is no prompt, `start` is unknown, there are fewer patches than P, or a block is not supported
            by "vipamin".

    References:
        Revisiting the Power of Prompt for Visual Tuning (Wang et al., ICML 2024), https://arxiv.org/abs/2402.02382, for
        "patch" and "prototype".
    """
    prompt = backbone.prompt
    if start not in get_args(PatchStart):
        raise ValueError(f"start={start!r}: must be one of {', '.join(get_args(PatchStart))}")
    if prompt is None:
        raise ValueError("backbone: has no prompt to initialise; create it with one")
    generator = torch.Generator().manual_seed(seed)
    if start == "vipamin":
        tokens = _match(backbone, prompt, batches, generator)
    else:
        tokens = _choose(collect_patch_tokens(backbone, prompt, batches, generator), prompt.num_tokens, start)
    backbone.start_prompt(_rescale(backbone, prompt, tokens))


def start_from_task(backbone: PromptedViT, path: str | Path) -> None:
    """Initialise the prompt from the prompt of a task file; the file's head is not used.

    Args:
        backbone: The backbone of the task, with a prompt of the same variant, number of tokens and blocks.
        path: The task file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The backbone or the file has no prompt, the prompts differ in layout, or the file is damaged or for
            another backbone.
    """
    metadata, tensors = open_task(Path(path))
    prompt = backbone.prompt
    if pretrained_fingerprint(backbone.vit) != metadata.fingerprint:
        raise ValueError(f"{path}: is for the backbone {metadata.backbone}; its prompt does not fit another backbone")
    if prompt is None or metadata.prompt is None:
        raise ValueError(f"{path}: {'the backbone has no prompt to initialise' if prompt is None else 'has no prompt'}")
    saved_layout = [metadata.prompt[name] for name in ("kind", "num_tokens", "blocks")]
    layouts: Any = ((prompt.variant, prompt.num_tokens, prompt.blocks), saved_layout)
    new, saved = (f"variant={kind}, num_tokens={num}, blocks={format_blocks(blocks)}" for kind, num, blocks in layouts)
    if new != saved:
        raise ValueError(f"{path}: its prompt has {saved}, but the new prompt has {new}; both must be the same")
    prompt.start_from(tensors["prompt.tokens"])


def matched_tokens(
    patches: Tensor, key_weight: Tensor, value_weight: Tensor, num_tokens: int, generator: torch.Generator
) -> Tensor:
    """Compute tokens (P, D) by VIPAMIN: the mean of patch tokens (M, D) with similar keys, plus a small new direction.

    For each token the generator draws a direction p. With keys W_k x and values W_v x, both weights (h d, D),

        matched = mean of the k patch tokens x_j with the largest cos(W_k p, W_k x_j),
        new = W_v^+ (1 - V V^T) W_v p, rescaled to the length of `matched`,
        token = (1 - lambda) matched + lambda new,

    where the columns of V span the values of the patch tokens. The value of `new` is therefore orthogonal to every
    output of attention over the patch tokens.

    References:
        VIPAMIN: Visual Prompt Initialization via Embedding Selection and Subspace Expansion (Park and Chung, NeurIPS
        2025), https://arxiv.org/abs/2510.16446; from a summary, as the paper was not available. Our deviations: k and
        lambda are fixed; W_k and W_v include the scale of the first norm; V spans the values themselves, which is the
        span of the attention outputs, and has at most D / 2 columns, since an image with more than D patches would
        leave no direction; `new` is rescaled so that lambda means the same in every block.
    """
    drawn = torch.randn(num_tokens, patches.shape[1], generator=generator).to(patches)
    drawn_keys, patch_keys = (torch.nn.functional.normalize(rows @ key_weight.T, dim=1) for rows in (drawn, patches))
    nearest = (drawn_keys @ patch_keys.T).topk(min(NUM_MATCHED, len(patches))).indices  # (P, k)
    matched = patches[nearest].mean(dim=1)
    basis = torch.linalg.svd(patches @ value_weight.T, full_matrices=False).Vh[: patches.shape[1] // 2]  # V^T
    values = drawn @ value_weight.T
    values = values - values @ basis.T @ basis
    new = torch.nn.functional.normalize(values @ torch.linalg.pinv(value_weight).T, dim=1)
    tokens: Tensor = (1 - NEW_SHARE) * matched + NEW_SHARE * matched.norm(dim=1, keepdim=True) * new
    return tokens


def _match(backbone: PromptedViT, prompt: VisualPrompt, batches: Iterable[Tensor], rng: torch.Generator) -> Tensor:
    """`matched_tokens` of each prompted block, (L, P, D)."""
    for index in prompt.blocks:
        reason = why_not_fast(backbone.vit.blocks[index])
        if reason is not None:
            why = f"in block {index} {reason}"
            raise ValueError(f"start='vipamin': needs keys and values, but {why}; use start='patch'")
    device = next(prompt.parameters()).device
    sums, num_images = [], 0
    for images in batches:
        check_images(images)
        sums.append([patches.float().sum(0) for patches in backbone.entering_patches(images.to(device))])
        num_images += len(images)
    if not sums:
        raise ValueError(NO_IMAGES)
    tokens = []
    for index, block_sums in zip(prompt.blocks, zip(*sums, strict=True), strict=True):
        patches = torch.stack(block_sums).sum(0) / num_images
        keys, values = (weight.float() for weight in key_value_weights(backbone.vit.blocks[index]))
        tokens.append(matched_tokens(patches, keys, values, prompt.num_tokens, rng))
    return torch.stack(tokens)


def _rescale(backbone: PromptedViT, prompt: VisualPrompt, tokens: Tensor) -> Tensor:
    """Rescale tokens (L, P, D) to the length of uniformly initialised ones, if their length has no effect."""
    vit: Any = backbone.vit
    if prompt.variant == "shallow" or not all(isinstance(vit.blocks[index], PRE_NORM) for index in prompt.blocks):
        return tokens
    # The standard deviation of the uniform initialisation
    scale = uniform_bound(backbone.embed_dim, vit.patch_embed.patch_size) / math.sqrt(3)
    return tokens / tokens.square().mean(-1, keepdim=True).sqrt() * scale


def _choose(patches: Tensor, num_tokens: int, start: PatchStart) -> Tensor:
    """Tokens (L, P, D): the first of the patch tokens (L, T, D), or the k-means centres that start from them."""
    if patches.shape[1] < num_tokens:
        why = "use fewer tokens, more images or init='uniform'"
        most = f"must be at most the {patches.shape[1]} patches of the images"
        raise ValueError(f"num_tokens={num_tokens}: {most}; {why}")
    tokens = patches[:, :num_tokens]
    if start == "patch":
        return tokens
    return torch.stack([_centres(*block) for block in zip(patches, tokens, strict=True)])


def collect_patch_tokens(
    backbone: PromptedViT, prompt: VisualPrompt, batches: Iterable[Tensor], generator: torch.Generator
) -> Tensor:
    """Collect tokens (L, T, D) of random patches of each image, in random order; the same patches in every block."""
    found, device = [], next(prompt.parameters()).device
    for images in batches:
        check_images(images)
        blocks = [patches.float() for patches in backbone.entering_patches(images.to(device))]  # L of (B, M, D)
        num_patches = blocks[0].shape[1]
        num_drawn = min(num_patches, max(NUM_PER_IMAGE, prompt.num_tokens))
        drawn = torch.rand(len(images), num_patches, generator=generator).argsort(1)[:, :num_drawn].to(device)
        found.append(torch.stack([patches.take_along_dim(drawn[..., None], 1).flatten(0, 1) for patches in blocks]))
    if not found:
        raise ValueError(NO_IMAGES)
    patches = torch.cat(found, dim=1)
    return patches[:, torch.randperm(patches.shape[1], generator=generator).to(device)]


def _centres(patches: Tensor, centres: Tensor) -> Tensor:
    """Centres (P, D) of clusters of patches (T, D), by k-means; the centre of an empty cluster stays where it is."""
    for _ in range(NUM_STEPS):
        members = torch.nn.functional.one_hot(torch.cdist(patches, centres).argmin(1), len(centres)).to(patches)
        sizes = members.sum(0)[:, None]
        centres = torch.where(sizes > 0, members.T @ patches / sizes.clamp(min=1), centres)
    return centres
