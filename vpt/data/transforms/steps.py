"""Augmentation steps: transforms of albumentations, built from a config and applied with a seed.

The only module that imports albumentations.
"""

import inspect
import os
import random
import re
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpt.data.transforms.preprocessing import Preprocessing, mean_colour

STEP_FORM = "write {name: HorizontalFlip, p: 0.5}"
MIN_SIDE = 1.0  # pixels of a box

# Base classes, and transforms that take functions or return no 8-bit image.
NOT_FOR_AUGMENT = {
    "BasicTransform", "DualTransform", "FromFloat", "ImageOnlyTransform", "Lambda", "Normalize", "ToFloat",
    "ToTensor3D", "ToTensorV2", "Transform3D",
}  # fmt: skip


class Augmentation:
    """Steps that are applied in order and draw from two generators made of the seed, and from nothing else.

    A step is `{"name": a transform of albumentations, **its arguments}`. With a number as `min_visibility` the steps
    take boxes, too: a box remains if this part of its area does. With `moves_masks` they take a mask, too, in which
    what they fill in is -1.

    Raises:
        ValueError: An unknown name or argument, a value that albumentations refuses, or a step that would not move
            boxes or masks with the image.
    """

    def __init__(
        self,
        steps: Sequence[Mapping[str, Any]],
        preprocessing: Preprocessing,
        min_visibility: float | None = None,
        moves_masks: bool = False,
    ) -> None:
        self.config = [dict(step) if isinstance(step, Mapping) else step for step in steps]
        self.moves = "mask" if moves_masks else "bboxes"
        self.steps: list[tuple[str, Any]] = []
        for i, step in enumerate(self.config):
            where = f"augment[{i}]"
            if moves_masks:
                built = _build_moving_step(step, where, preprocessing, "mask", {"fill_mask": -1})
            elif min_visibility is not None:
                built = _build_moving_step(step, where, preprocessing, "bboxes", {})
            else:
                built = _build_step(step, where, preprocessing)
            name = type(built).__name__
            if min_visibility is not None and isinstance(built, _albumentations().DualTransform):
                built = _with_boxes(built, min_visibility)
            self.steps.append((name, built))

    def __call__(
        self, pixels: NDArray[np.uint8], seed: int, labels: NDArray[Any] | None = None, only_certain: bool = False
    ) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        """Apply the steps, or with `only_certain` those that are always applied, to pixels (H, W, 3).

        The labels are boxes with a fifth column that stays with its box, (n, 5), or a mask (H, W) int16; or None.

        Raises:
            ValueError: A step fails, or with labels returns no image (H, W, 3) uint8.
        """
        if self.steps:
            import cv2

            cv2.setNumThreads(0)  # each loader process is one of many; threads of its own would slow down all
        # One pair of generators for all steps: with `set_random_seed` each step would have equal ones, so that a flip
        # and a blur of equal probability always happened together.
        generators = np.random.default_rng(seed), random.Random(seed)
        for name, step in self.steps:
            if only_certain and step.p < 1:
                continue
            step.set_random_state(*generators)
            try:
                result = step(image=pixels, **({} if labels is None else {self.moves: labels}))
            except Exception as error:  # albumentations and OpenCV raise almost anything
                counted = "" if labels is None or self.moves == "mask" else f" and {len(labels)} boxes"
                reason = (
                    f"{name} cannot be applied to {pixels.shape[0]} x {pixels.shape[1]} pixels{counted} ({error!r})"
                )
                raise ValueError(f"augment: {reason}; change its arguments, or remove it") from error
            pixels = result["image"]
            if labels is not None:
                labels = result["mask"] if self.moves == "mask" else np.reshape(result["bboxes"], (-1, 5))
                if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
                    raise ValueError(
                        f"augment: {name} returned {pixels.dtype} pixels of shape {pixels.shape}, not uint8 of "
                        "(height, width, 3); change its arguments, or remove it"
                    )
        return pixels, np.zeros((0, 5)) if labels is None else labels


def _build_step(step: object, where: str, preprocessing: Preprocessing) -> Any:
    """Build one transform of albumentations; its warnings about arguments are errors."""
    if not isinstance(step, Mapping):
        raise ValueError(f"{where}={step!r}: must be a mapping; {STEP_FORM}")
    arguments = dict(step)
    name = arguments.pop("name", None)
    transform = _find_transform(name, where)
    allowed = list(inspect.signature(transform).parameters)
    for key in arguments:
        if key not in allowed:
            raise ValueError(f"{where}: {name} has no argument {key!r}{_hint(str(key), allowed)}; it has {allowed}")
    if name == "RandomResizedCrop":
        arguments = {"size": preprocessing.size, "area_for_downscale": "image"} | arguments
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            return transform(**arguments)
        except (TypeError, ValueError, UserWarning) as error:
            raise ValueError(f"{where}: {name} refuses {arguments}: {_one_line(error)}") from error


def _build_moving_step(
    step: object, where: str, preprocessing: Preprocessing, moves: str, filling: Mapping[str, Any]
) -> Any:
    """Build one transform that moves boxes or masks with the image; empty areas are filled with grey by default."""
    library = _albumentations()
    if isinstance(step, Mapping):
        transform = _find_transform(step.get("name"), where)
        if issubclass(transform, library.DualTransform):
            # One number, and no colour: CropAndPad would draw one of the three, for all channels.
            filling = {"fill": round(sum(mean_colour(preprocessing)) / 3), **filling}
            known = inspect.signature(transform).parameters
            step = {key: value for key, value in filling.items() if key in known} | dict(step)
    built = _build_step(step, where, preprocessing)
    if isinstance(built, library.DualTransform) and moves not in built.available_keys:
        what = {"bboxes": "boxes", "mask": "a mask"}[moves]
        raise ValueError(f"{where}: {type(built).__name__} does not move {what} with the image; remove it")
    return built


def _with_boxes(built: Any, min_visibility: float) -> Any:
    """A transform that clips boxes, and drops those of which too little is left."""
    library = _albumentations()
    parameters = library.BboxParams(
        format="pascal_voc",
        clip=True,
        filter_invalid_bboxes=True,
        min_visibility=min_visibility,
        min_width=MIN_SIDE,
        min_height=MIN_SIDE,
    )
    return library.Compose([built], bbox_params=parameters)


def _find_transform(name: object, where: str) -> Any:
    """Find a transform by name; nothing but a transform of albumentations is ever returned."""
    library = _albumentations()
    types = {key: value for key, value in vars(library).items() if isinstance(value, type)}
    valid = [key for key in types if issubclass(types[key], library.BasicTransform) and key not in NOT_FOR_AUGMENT]
    if name not in valid:
        hint = _hint(str(name), valid)
        raise ValueError(f"{where}: {name!r} is not a transform of albumentations{hint}; {STEP_FORM}")
    return getattr(library, str(name))


def _one_line(error: Exception) -> str:
    """An error in one line: pydantic's has many, the first a count and the last a link."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if not re.match(r"\d+ validation error|For further information", line))


def _hint(word: str, valid: Sequence[str]) -> str:
    nearest = get_close_matches(word, valid, n=1, cutoff=0.3)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _albumentations() -> ModuleType:
    """Import albumentations, late because it takes seconds, and without its query for a newer version."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations

    return albumentations  # type: ignore[no-any-return]
