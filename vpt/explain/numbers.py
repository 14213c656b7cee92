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
    """An image as the backbone receives it.

    Args:
        name: Its path.
        image: (3, H, W), normalised.
        pixels: (h, w, 3) uint8, the input without the fill of a letterbox.
    """

    name: str
    image: Tensor
    pixels: NDArray[np.uint8]

    def is_inside(self, grid_size: tuple[int, int]) -> NDArray[np.bool_]:
        """(rows, columns), whether a patch of the input shows a part of the image."""
        rows, columns = (
            np.arange(num) * total / num < side
            for num, total, side in zip(grid_size, self.image.shape[1:], self.pixels.shape[:2], strict=True)
        )
        inside: NDArray[np.bool_] = rows[:, None] & columns
        return inside


def view_image(name: str, image: Image.Image, preprocessing: Preprocessing) -> ImageView:
    """Prepare an upright RGB image for a backbone."""
    tensor, (height, width) = EvalTransform(preprocessing)(image), preprocessing.size
    if preprocessing.crop_mode == "letterbox":
        height, width = letterboxed_size((image.height, image.width), preprocessing)
    return ImageView(name, tensor, denormalise(tensor[None], preprocessing)[0, :height, :width])


@dataclass(frozen=True)
class ImageAttention:
    """Prediction and attention for one image.

    Args:
        view: The image.
        found: The prediction, as `TaskType.explain` returns it.
        shares: By block with a prompt, the share of attention that goes to it, by source: "cls" and "patches"; and
            "uniform", the share if all tokens got the same attention.
        use: By block with a prompt, (P,) the share of all attention that goes to each prompt token.
        maps: By chosen block, attention of CLS, or of all patches where there is no CLS, to each patch; 1 is uniform.
        bare_maps: The same without the prompt; empty if there is no prompt.
        prompt_maps: By chosen block with a prompt, the share of each patch's attention that goes to it.
    """

    view: ImageView
    found: dict[str, Any]
    shares: dict[int, dict[str, float]]
    use: dict[int, Tensor]
    maps: Maps
    bare_maps: Maps
    prompt_maps: Maps


@dataclass(frozen=True)
class Explanation:
    """Attention of a task for some images, and its prompt tokens.

    Args:
        origin: The option that names the task, such as "run=runs/quickstart".
        model: The task, on its backbone.
        blocks: Those with maps.
        images: Results for each image.
        similarities: Similarity of the prompt tokens of each prompted block; empty if there are no tokens.
        nearest: The patches of all images that are most similar to them.
    """

    origin: str
    model: TaskModel
    blocks: tuple[int, ...]
    images: list[ImageAttention]
    similarities: list[TokenSimilarity]
    nearest: list[NearestPatches]

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
                {
                    "block": found.block,
                    "mean_cosine": found.mean_cosine,
                    "effective_rank": found.effective_rank,
                    "cosines": found.cosines.tolist(),
                }
                for found in self.similarities
            ],
            "nearest_patches": [self._nearest(found) for found in self.nearest],
        }

    def _attention(self, block: int) -> dict[str, Any]:
        shares = {source: [image.shares[block][source] for image in self.images] for source in self.sources}
        return {
            "block": block,
            "num_tokens": len(self.images[0].use[block]),
            "uniform": self.share(block, "uniform"),
            **{source: self.share(block, source) for source in self.sources},
            **{
                f"{source}_over_uniform": self.share(block, source) / self.share(block, "uniform")
                for source in self.sources
            },
            **{f"{source}_by_image": values for source, values in shares.items()},
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
    """Measure the attention for images, one by one, and compare the prompt tokens.

    Args:
        origin: The option that names the task.
        model: In eval mode.
        views: At least one.
        blocks: Indices of the blocks with maps.
    """
    backbone = model.backbone
    device = next(model.parameters()).device
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
        if block in chosen and is_prompted:
            result.prompt_maps[block] = _array(attention.prompt_map)
    if backbone.prompt is not None:
        for attention in inspect_attention(backbone, image, sorted(chosen), prompted=False):
            result.bare_maps[attention.block] = _array(attention.patch_map)
    return result


def _array(maps: Tensor) -> NDArray[np.float64]:
    """The map of the one image, (1, rows, columns)."""
    values: NDArray[np.float64] = maps[0].double().cpu().numpy()
    return values
