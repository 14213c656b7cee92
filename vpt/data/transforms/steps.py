"""From a picture to a tensor; the only file that knows albumentations.

`EvalTransform` is what the backbone was trained to see: resize, crop, normalise. `TrainTransform` puts random
augmentation between picture and tensor. Both are called with a picture and a seed, and nothing else decides the result:
not the global random state, not the number of workers, not the order of calls.

Shapes: B batch, C channels, H, W pixels.
"""

import inspect
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from vpt.data.transforms.preprocessing import Preprocessing

STEP_FORM = "write {name: HorizontalFlip, p: 0.5}"


# Bases, and what takes functions or makes no 8-bit picture.
NOT_FOR_AUGMENT = {
    "BasicTransform", "DualTransform", "FromFloat", "ImageOnlyTransform", "Lambda", "Normalize", "ToFloat",
    "ToTensor3D", "ToTensorV2", "Transform3D",
}  # fmt: skip


def _build_step(step: object, where: str, preprocessing: Preprocessing) -> Any:
    """Build one transform of albumentations; its warnings about arguments are errors here."""
    if not isinstance(step, Mapping):
        raise ValueError(f"{where} is {step!r}, no mapping; {STEP_FORM}")
    arguments = dict(step)
    name = arguments.pop("name", None)
    transform = _find_transform(name, where)
    allowed = list(inspect.signature(transform).parameters)
    for key in arguments:
        if key not in allowed:
            hint = _did_you_mean(str(key), allowed)
            raise ValueError(f"{where}: {name} has no argument {key!r}{hint}; it has {allowed}")
    if name == "RandomResizedCrop":
        arguments = {"size": preprocessing.size, "area_for_downscale": "image"} | arguments
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            return transform(**arguments)
        except (TypeError, ValueError, UserWarning) as error:
            raise ValueError(f"{where}: {name} refuses {arguments}: {_one_line(error)}") from error


def _find_transform(name: object, where: str) -> Any:
    """Look a transform up by name; nothing but a transform of albumentations is ever found."""
    library = _albumentations()
    valid = [
        key
        for key, value in vars(library).items()
        if isinstance(value, type) and issubclass(value, library.BasicTransform) and key not in NOT_FOR_AUGMENT
    ]
    if name not in valid:
        raise ValueError(
            f"{where}: {name!r} is no transform of albumentations{_did_you_mean(str(name), valid)}; {STEP_FORM}"
        )
    return getattr(library, str(name))


def _one_line(error: Exception) -> str:
    """What an error says, in one line: pydantic's has many, the first a count and the last a link."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if not re.match(r"\d+ validation error|For further information", line))


def _did_you_mean(word: str, valid: Sequence[str]) -> str:
    nearest = get_close_matches(word, valid, n=1, cutoff=0.3)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _albumentations() -> ModuleType:
    """Import albumentations, late because it takes seconds, and without its query for a newer version."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations

    return albumentations  # type: ignore[no-any-return]
