"""Where prompt tokens start, other than at random: at patch tokens of pictures, or at the prompt of another task.

Patch tokens are those that enter each prompted block of the bare backbone. Tokens of that kind are what its attention
knows, which matters most on self-supervised backbones (Wang et al., 2024).

Legend: B images, M patch tokens of an image, T patch tokens that are looked at, P prompt tokens, L prompted blocks, D
embed_dim.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from vpt.models.backbone import PromptedViT
from vpt.models.prompts import VisualPrompt, format_blocks
from vpt.models.task_file import open_task
from vpt.models.tuning import pretrained_fingerprint

PatchStart = Literal["patch", "prototype"]

NUM_PER_IMAGE = 16  # patch tokens that are looked at, at least
NUM_STEPS = 10  # of k-means


@torch.no_grad()
def start_from_patches(
    backbone: PromptedViT, batches: Iterable[Tensor], start: PatchStart = "patch", *, seed: int = 0
) -> None:
    """Let the prompt start at patch tokens of images, which the bare backbone is run on once.

    Args:
        backbone: Its prompt starts anew; nothing else of it changes.
        batches: Normalised images (B, 3, H, W), some hundred in all.
        start: "patch": P patches are drawn, and each block's tokens are what has become of them there. "prototype":
            each block's tokens are the centres of P groups of the patch tokens that enter it (k-means).
        seed: Of what is drawn.

    Raises:
        ValueError: There is no prompt, another way is asked for, or the images have fewer patches than P.

    References:
        Revisiting the Power of Prompt for Visual Tuning (Wang et al., ICML 2024), https://arxiv.org/abs/2402.02382.
    """
    prompt = backbone.prompt
    if start not in get_args(PatchStart):
        raise ValueError(f"prompts start from patches by {', '.join(get_args(PatchStart))}, got {start!r}")
    if prompt is None:
        raise ValueError("there is no prompt that could start from patches; give the backbone one")
    patches = _look_at(backbone, prompt, batches, torch.Generator().manual_seed(seed))
    if patches.shape[1] < prompt.num_tokens:
        raise ValueError(
            f"prompt.num_tokens={prompt.num_tokens}: the pictures have only {patches.shape[1]} patches to start from; "
            "use fewer tokens or prompt.init=uniform"
        )
    tokens = patches[:, : prompt.num_tokens]
    if start == "prototype":
        tokens = torch.stack([_centres(*block) for block in zip(patches, tokens, strict=True)])
    backbone.start_prompt(tokens)


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


def _look_at(
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
        raise ValueError("there are no pictures to start a prompt from")
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
