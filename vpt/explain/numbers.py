"""What a task looks at in pictures, as numbers: attention of its blocks, its prompt tokens, the patches like them.

Legend: B images, P prompt tokens, H, W pixels of the input, h, w of that part of it which is picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vpt.build import Model
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing, denormalise, letterboxed_size
from vpt.models.detector import Detector
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

Maps = dict[int, NDArray[np.float64]]  # (rows, columns), by block

NUM_NEAREST = 8
MIN_SCORE = 0.25  # of a box


@dataclass(frozen=True)
class Seen:
    """A picture as the backbone sees it.

    Args:
        name: Its path, as it was found.
        image: (3, H, W), normalised.
        pixels: (h, w, 3) uint8, what of the input is picture and not the fill of a letterbox.
    """

    name: str
    image: Tensor
    pixels: NDArray[np.uint8]

    def is_picture(self, grid_size: tuple[int, int]) -> NDArray[np.bool_]:
        """(rows, columns), whether a patch of the input shows something of the picture."""
        rows, columns = (
            np.arange(num) * total / num < side
            for num, total, side in zip(grid_size, self.image.shape[1:], self.pixels.shape[:2], strict=True)
        )
        inside: NDArray[np.bool_] = rows[:, None] & columns
        return inside


def see(name: str, picture: Image.Image, preprocessing: Preprocessing) -> Seen:
    """An upright RGB picture as a backbone sees it."""
    image = EvalTransform(preprocessing)(picture)
    height, width = preprocessing.size
    if preprocessing.crop_mode == "letterbox":
        height, width = letterboxed_size((picture.height, picture.width), preprocessing)
    return Seen(name, image, denormalise(image[None], preprocessing)[0, :height, :width])


@dataclass(frozen=True)
class Look:
    """What was found in one picture.

    Args:
        seen: The picture.
        found: What the model gives for it: class and probability by name, or boxes, scores and labels.
        shares: By block that sees the prompt, the share of attention that goes to it, by who asks: "cls" and "patches";
            and as "uniform" what it would be if all tokens were looked at alike.
        use: By block that sees the prompt, (P,) how much of all attention goes to each prompt token.
        maps: By chosen block, what CLS looks at, or all patches where there is no CLS; 1 is even.
        bare_maps: The same without the prompt; none if there is no prompt.
        prompt_maps: By chosen block that sees the prompt, the share of each patch's attention that goes to it.
    """

    seen: Seen
    found: dict[str, Any]
    shares: dict[int, dict[str, float]]
    use: dict[int, Tensor]
    maps: Maps
    bare_maps: Maps
    prompt_maps: Maps


@dataclass(frozen=True)
class Explanation:
    """What a task looks at in some pictures.

    Args:
        origin: How the task was asked for, such as "run=runs/quickstart".
        model: The task, on its backbone.
        blocks: Those whose maps are kept.
        looks: What was found in each picture.
        similarities: How alike prompt tokens are, for each prompted block; none if there are no tokens.
        nearest: The patches of all pictures that are most like them.
    """

    origin: str
    model: Model
    blocks: tuple[int, ...]
    looks: list[Look]
    similarities: list[TokenSimilarity]
    nearest: list[NearestPatches]

    @property
    def asking(self) -> tuple[str, ...]:
        """Who asks: "cls", if the backbone has it, and "patches"."""
        return ("cls", "patches") if has_cls(self.model.backbone) else ("patches",)

    @property
    def prompted(self) -> list[int]:
        """Blocks that see the prompt."""
        return list(self.looks[0].shares)

    @property
    def note(self) -> str:
        """What is not shown, and why; empty if all is."""
        if self.model.backbone.prompt is None:
            return "there is no prompt: attention maps are all that there is to see"
        return "" if self.similarities else "the prompt is learned as keys and values: there are no tokens to compare"

    def share(self, block: int, asking: str) -> float:
        """Share of attention that goes to the prompt in a block, mean over pictures."""
        return float(np.mean([look.shares[block][asking] for look in self.looks]))

    def tokens_in_use(self, block: int) -> float:
        """How many tokens share the attention to the prompt: exp of the entropy of their shares, from 1 to P."""
        return effective_number(torch.stack([look.use[block] for look in self.looks]).mean(0))

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON has them, see docs/explain.md."""
        from vpt.version import __version__

        backbone = self.model.backbone
        return {
            "version": 1,
            "vpt": __version__,
            "task": self.origin,
            "backbone": backbone.name,
            "prompt": None if backbone.prompt is None else str(backbone.prompt),
            "note": self.note,
            "pictures": [
                {"path": look.seen.name, "page": f"picture_{number:02d}.png", **look.found}
                for number, look in enumerate(self.looks)
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
        shares = {asking: [look.shares[block][asking] for look in self.looks] for asking in self.asking}
        return {
            "block": block,
            "num_tokens": len(self.looks[0].use[block]),
            "uniform": self.share(block, "uniform"),
            **{asking: self.share(block, asking) for asking in self.asking},
            **{
                f"{asking}_over_uniform": self.share(block, asking) / self.share(block, "uniform")
                for asking in self.asking
            },
            **{f"{asking}_by_picture": values for asking, values in shares.items()},
            "tokens_in_use": self.tokens_in_use(block),
        }

    def _nearest(self, found: NearestPatches) -> dict[str, Any]:
        parts = (found.images, found.rows, found.columns, found.cosines)
        return {
            "block": found.block,
            "tokens": [
                [
                    {"picture": self.looks[image].seen.name, "row": row, "column": column, "cosine": cosine}
                    for image, row, column, cosine in zip(*places, strict=True)
                ]
                for places in zip(*(part.tolist() for part in parts), strict=True)
            ],
        }


def explain_pictures(origin: str, model: Model, pictures: Sequence[Seen], blocks: Sequence[int]) -> Explanation:
    """Look at pictures, one by one, and at the prompt.

    Args:
        origin: How the task was asked for.
        model: In eval mode.
        pictures: At least one.
        blocks: Indices of the blocks whose maps are wanted.
    """
    backbone = model.backbone
    device = next(model.parameters()).device
    looks = [_look(model, picture, set(blocks), device) for picture in pictures]
    similarities, nearest = [], []
    if has_tokens(backbone):
        grid_size = next(iter(looks[0].maps.values())).shape
        among = torch.tensor(np.stack([picture.is_picture(grid_size) for picture in pictures]))
        images = torch.stack([picture.image for picture in pictures]).to(device)
        similarities = compare_tokens(backbone)
        nearest = list(nearest_patches(backbone, images, NUM_NEAREST, among=among))
    return Explanation(origin, model, tuple(blocks), looks, similarities, nearest)


def _look(model: Model, picture: Seen, chosen: set[int], device: torch.device) -> Look:
    """What is found in a picture, and where its attention goes in each block."""
    backbone, image = model.backbone, picture.image[None].to(device)
    look = Look(picture, _find(model, image, picture), {}, {}, {}, {}, {})
    for attention in inspect_attention(backbone, image, "all" if backbone.prompt is not None else sorted(chosen)):
        block, is_prompted = attention.block, attention.num_prompt_tokens > 0
        if is_prompted:
            shares = {asking: float(share[0]) for asking, share in attention.prompt_shares.items()}
            look.shares[block] = {"uniform": attention.uniform_share, **shares}
            look.use[block] = attention.to_prompt[0].mean(0).cpu()
        if block in chosen:
            look.maps[block] = _array(attention.patch_map)
        if block in chosen and is_prompted:
            look.prompt_maps[block] = _array(attention.prompt_map)
    if backbone.prompt is not None:
        for attention in inspect_attention(backbone, image, sorted(chosen), prompted=False):
            look.bare_maps[attention.block] = _array(attention.patch_map)
    return look


@torch.no_grad()
def _find(model: Model, image: Tensor, picture: Seen) -> dict[str, Any]:
    """The most probable class, or the boxes in pixels of the input."""
    classes = model.classes or [str(label) for label in range(model.num_classes)]
    if isinstance(model, Detector):
        height, width, _ = picture.pixels.shape
        (found,) = model(image, sizes=[(height, width)])
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        boxes = [{"class": classes[label], "score": score, "box": box} for label, score, box in rows]
        return {"boxes": [box for box in boxes if box["score"] >= MIN_SCORE]}
    probability, label = model(image)[0].float().softmax(0).max(0)
    return {"class": classes[int(label)], "probability": float(probability)}


def _array(maps: Tensor) -> NDArray[np.float64]:
    """The map of the one image, (1, rows, columns)."""
    values: NDArray[np.float64] = maps[0].double().cpu().numpy()
    return values
