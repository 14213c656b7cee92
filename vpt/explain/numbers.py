"""Attention of a task's blocks for some images, its prompt tokens, and the patches similar to them, as numbers.

Legend: B images, P prompt tokens, H, W pixels of the input, h, w of the part of it that shows the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing, denormalise, letterboxed_size
from vpt.models.inspection import (
    NearestPatches,
    TokenSimilarity,
    compare_tokens,
    effective_number,
    has_cls,
    has_tokens,
    inspect_attention,
    nearest_patches,
)
from vpt.models.task_model import TaskModel
from vpt.task_types.base import task_type_named

Maps = dict[int, NDArray[np.float64]]  # (rows, columns), by block

NUM_NEAREST = 8


@dataclass(frozen=True)
class ImageView:
    """An image as the backbone receives it."""

    name: str  # its path
    image: Tensor  # (3, H, W), normalised
    pixels: NDArray[np.uint8]  # (h, w, 3), the input without the fill of a letterbox

    def is_inside(self, grid_size: tuple[int, int]) -> NDArray[np.bool_]:
        """(rows, columns), whether a patch of the input shows a part of the image."""
        rows, columns = (
            np.arange(num) * total / num < side
            for num, total, side in zip(grid_size, self.image.shape[1:], self.pixels.shape[:2], strict=True)
        )
        return np.asarray(rows[:, None] & columns, np.bool_)


def view_image(name: str, image: Image.Image, preprocessing: Preprocessing) -> ImageView:
    """Prepare an upright RGB image for a backbone."""
    tensor, (height, width) = EvalTransform(preprocessing)(image), preprocessing.size
    if preprocessing.crop_mode == "letterbox":
        height, width = letterboxed_size((image.height, image.width), preprocessing)
    return ImageView(name, tensor, denormalise(tensor[None], preprocessing)[0, :height, :width])


@dataclass(frozen=True)
class ImageAttention:
    """Prediction and attention for one image; `shares` and `use` are by block with a prompt, maps by chosen block."""

    view: ImageView
    found: dict[str, Any]  # the prediction, as `TaskType.explain` returns it
    # Of the attention of "cls" and "patches", what goes to the prompt; "uniform": if all tokens got the same attention.
    shares: dict[int, dict[str, float]]
    use: dict[int, Tensor]  # (P,) the share of all attention that goes to each prompt token
    maps: Maps  # attention of CLS, or of all patches where there is no CLS, to each patch; 1 is uniform
    bare_maps: Maps  # the same without the prompt; empty if there is no prompt
    prompt_maps: Maps  # the share of each patch's attention that goes to the prompt, where there is one


@dataclass(frozen=True)
class Explanation:
    """Attention of a task for some images, and its prompt tokens."""

    origin: str  # the option that names the task, such as "run=runs/quickstart"
    model: TaskModel
    blocks: tuple[int, ...]  # those with maps
    images: list[ImageAttention]
    similarities: list[TokenSimilarity]  # of the prompt tokens of each prompted block; empty if there are no tokens
    nearest: list[NearestPatches]  # the patches of all images that are most similar to them

    @property
    def sources(self) -> tuple[str, ...]:
        """Tokens whose attention is measured: "cls", if the backbone has it, and "patches"."""
        return ("cls", "patches") if has_cls(self.model.backbone) else ("patches",)

    @property
    def prompted(self) -> list[int]:
        """Blocks with a prompt."""
        return list(self.images[0].shares)

    @property
    def note(self) -> str:
        """What is not shown, and why; empty if everything is."""
        if self.model.backbone.prompt is None:
            return "the task has no prompt: attention maps only"
        return "" if self.similarities else "the prompt is learned as keys and values: there are no tokens to compare"

    def share(self, block: int, source: str) -> float:
        """Share of attention that goes to the prompt in a block, mean over images."""
        return float(np.mean([image.shares[block][source] for image in self.images]))

    def tokens_in_use(self, block: int) -> float:
        """How many tokens share the attention to the prompt: exp of the entropy of their shares, from 1 to P."""
        return effective_number(torch.stack([image.use[block] for image in self.images]).mean(0))

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON values; see docs/explain.md."""
        from vpt.version import __version__

        backbone = self.model.backbone
        return {
            "version": 1,
            "vpt": __version__,
            "task": self.origin,
            "backbone": backbone.name,
            "prompt": None if backbone.prompt is None else str(backbone.prompt),
            "note": self.note,
            "images": [
                {"path": image.view.name, "page": f"image_{number:02d}.png", **image.found}
                for number, image in enumerate(self.images)
            ],
            "attention_to_prompt": [self._attention(block) for block in self.prompted],
            "prompt_tokens": [
                {name: getattr(found, name) for name in ("block", "mean_cosine", "effective_rank")}
                | {"cosines": found.cosines.tolist()}
                for found in self.similarities
            ],
            "nearest_patches": [self._nearest(found) for found in self.nearest],
        }

    def _attention(self, block: int) -> dict[str, Any]:
        uniform, shares = self.share(block, "uniform"), {of: self.share(block, of) for of in self.sources}
        return {
            "block": block,
            "num_tokens": len(self.images[0].use[block]),
            "uniform": uniform,
            **shares,
            **{f"{of}_over_uniform": share / uniform for of, share in shares.items()},
            **{f"{of}_by_image": [image.shares[block][of] for image in self.images] for of in shares},
            "tokens_in_use": self.tokens_in_use(block),
        }

    def _nearest(self, found: NearestPatches) -> dict[str, Any]:
        parts = (found.images, found.rows, found.columns, found.cosines)
        return {
            "block": found.block,
            "tokens": [
                [
                    {"image": self.images[image].view.name, "row": row, "column": column, "cosine": cosine}
                    for image, row, column, cosine in zip(*places, strict=True)
                ]
                for places in zip(*(part.tolist() for part in parts), strict=True)
            ],
        }


@torch.no_grad()
def explain_images(origin: str, model: TaskModel, views: Sequence[ImageView], blocks: Sequence[int]) -> Explanation:
    """Measure the attention of a model in eval mode for at least one image, and compare the prompt tokens."""
    backbone, device = model.backbone, next(model.parameters()).device
    images = [_measure(model, view, set(blocks), device) for view in views]
    similarities, nearest = [], []
    if has_tokens(backbone):
        grid_size = next(iter(images[0].maps.values())).shape
        among = torch.tensor(np.stack([view.is_inside(grid_size) for view in views]))
        inputs = torch.stack([view.image for view in views]).to(device)
        similarities = compare_tokens(backbone)
        nearest = list(nearest_patches(backbone, inputs, NUM_NEAREST, among=among))
    return Explanation(origin, model, tuple(blocks), images, similarities, nearest)


def _measure(model: TaskModel, view: ImageView, chosen: set[int], device: torch.device) -> ImageAttention:
    """The prediction for an image, and its attention in each block."""
    backbone, image, (height, width, _) = model.backbone, view.image[None].to(device), view.pixels.shape
    found = task_type_named(model.task_type).explain(model, image, (height, width))
    result = ImageAttention(view, found, {}, {}, {}, {}, {})
    for attention in inspect_attention(backbone, image, "all" if backbone.prompt is not None else sorted(chosen)):
        block, is_prompted = attention.block, attention.num_prompt_tokens > 0
        if is_prompted:
            shares = {source: float(share[0]) for source, share in attention.prompt_shares.items()}
            result.shares[block] = {"uniform": attention.uniform_share, **shares}
            result.use[block] = attention.to_prompt[0].mean(0).cpu()
        if block in chosen:
            result.maps[block] = _array(attention.patch_map)
            if is_prompted:
                result.prompt_maps[block] = _array(attention.prompt_map)
    if backbone.prompt is not None:
        for attention in inspect_attention(backbone, image, sorted(chosen), prompted=False):
            result.bare_maps[attention.block] = _array(attention.patch_map)
    return result


def _array(maps: Tensor) -> NDArray[np.float64]:
    """The map of the one image, (1, rows, columns)."""
    return np.asarray(maps[0].double().cpu().numpy(), np.float64)
