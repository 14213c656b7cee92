"""Conversion of tasks to and from a PEFT-style folder, and from prompts of the original VPT code.

A PEFT-style folder has the file names and keys of PEFT. A `.pth` of the original code has prompts, and a head if it is
a whole state dict; other metadata comes from the backbone. Files are not trusted: pickles are read with `weights_only`,
and NumPy arrays in them become two small classes of this module, so that no code of NumPy runs on them either.

Legend: P prompt tokens, D embed_dim, L prompted blocks, K classes.
"""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vpt.models.task_file import open_task, write_task
from vpt.models.task_schema import TaskMetadata
from vpt.models.vit import ViT, fingerprint, name_of, preprocessing_of, traits_of
from vpt.storage.files import MAX_BYTES, MAX_HEADER, write_json
from vpt.task_types.base import task_type_named
from vpt.version import __version__

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPE = "VISUAL_PROMPT_TUNING"  # unknown to PEFT, which refuses it

PICKLE_ENDINGS = (".pth", ".pt")
ROLES = {"shallow_prompt": "shallow", "deep_prompt": "deep"}  # by the last part of a key in a file of prompts
ROLES |= {"prompt_embeddings": "shallow", "deep_prompt_embeddings": "deep"}  # in a state dict
HEAD = {"head.last_layer.weight": "weight", "head.last_layer.bias": "bias"}
PICKLED_FLOATS = ("f2", "f4", "f8")
# The original code normalises with ImageNet's numbers, whatever the backbone, and resizes as torchvision does.
ORIGINAL_MEAN, ORIGINAL_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CROPS = {"center": 224 / 256, "squash": 1.0}  # crop_mode: crop_pct

Task = tuple[TaskMetadata, dict[str, Tensor]]


@dataclass(frozen=True)
class OriginalPrompt:
    """Content of a `.pth` of the original VPT code, in float32."""

    path: Path
    shallow: Tensor  # (1, P, D), the tokens of block 0
    deep: Tensor | None = None  # (depth - 1, P, D), those of the other blocks; None for a shallow prompt
    head: tuple[Tensor, Tensor] | None = None  # weight (K, D) and bias (K,); None if the file has prompts only


def write_folder(folder: str | Path, metadata: TaskMetadata, tensors: Mapping[str, Tensor]) -> Path:
    """Write a task as a PEFT-style folder, the config last; return its path.

    FileExistsError if the folder is not empty, or is a file; ValueError if the tensors do not match the metadata.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists already; name a new folder")
    write_task(folder / WEIGHTS_NAME, metadata, tensors)
    write_json(folder / CONFIG_NAME, _peft_config(metadata))
    return folder


def read_folder(folder: str | Path) -> Task:
    """Read a task from a PEFT-style folder, with all checks of a task file.

    FileNotFoundError if one of the two files is missing; ValueError if a file is damaged, the adapter is of another
    type, or the config does not match the metadata, which a sha256 protects.
    """
    folder, config_path = Path(folder), Path(folder, CONFIG_NAME)
    config = _read_config(config_path)
    if config.get("peft_type") != PEFT_TYPE:
        found = json.dumps(config.get("peft_type"))[:100]
        raise ValueError(f"{config_path}: peft_type is {found}; only {PEFT_TYPE} can be read")
    metadata, tensors = open_task(folder / WEIGHTS_NAME)
    wanted = _peft_config(metadata)
    if odd := sorted(key for key in config.keys() | wanted.keys() if config.get(key, ...) != wanted.get(key, ...)):
        raise ValueError(f"{config_path}: its {odd[0][:100]} does not match {WEIGHTS_NAME}; get a fresh copy of both")
    return metadata, tensors


def read_original(path: str | Path) -> OriginalPrompt:
    """Read a `.pth` of the original VPT code, running no code in it: prompts, or a state dict with them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read without running code, is too large, or has no prompt of a plain ViT.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    values = _unpickle(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: contains a {type(values).__name__}; expected a dict with a shallow_prompt")
    found: dict[str, Tensor] = {}
    named = {key: value for key, value in values.items() if isinstance(key, str)}
    for key, value in named.items():
        role = _role(path, key)
        if role in found:
            raise ValueError(f"{path}: contains two prompts ({key[:100]} is the second); save one state dict only")
        if role is not None:
            found[role] = _to_tensor(path, key, value)
    if "shallow" not in found:
        keys = ", ".join(list(named)[:5])[:200]
        raise ValueError(f"{path}: has no prompt (shallow_prompt or ...prompt_embeddings), only {keys or 'nothing'}")
    if ("weight" in found) != ("bias" in found):
        raise ValueError(f"{path}: of the head it has only the {'weight' if 'weight' in found else 'bias'}")
    head = (found["weight"], found["bias"]) if "weight" in found else None
    original = OriginalPrompt(path, found["shallow"], found.get("deep"), head)
    _check_shapes(original)
    return original


def task_of(original: OriginalPrompt, vit: ViT, *, num_classes: int | None = None, crop_mode: str = "center") -> Task:
    """Make a classification task from prompts of the original code; ValueError if they, or the head, do not fit.

    Args:
        original: Content of the file.
        vit: The backbone that the prompts were trained on, which the file does not name.
        num_classes: K; required if the file has no head. The head is then zero, as the note states.
        crop_mode: Preprocessing: "center" for FGVC (256 px, then the middle 224), "squash" for VTAB.
    """
    if crop_mode not in CROPS:
        raise ValueError(f"crop_mode={crop_mode}: must be one of {', '.join(CROPS)}")
    _check_fits(original, vit, num_classes)
    num_classes = num_classes if original.head is None else len(original.head[1])
    assert num_classes is not None
    tokens = original.shallow if original.deep is None else torch.cat([original.shallow, original.deep])
    num_tokens, width = tokens.shape[1:]
    untrained = "" if original.head else " The head is untrained: it starts at zero."
    note = (
        f"Converted from {original.path.name[:200]} of the original VPT code.{untrained} The file did not say which "
        "backbone, preprocessing and classes it was trained with."
    )
    try:
        metadata = TaskMetadata(
            backbone=name_of(vit),
            fingerprint=fingerprint(vit),
            prompt={"kind": "shallow" if original.deep is None else "deep", "num_tokens": num_tokens}
            | {"embed_dim": width, "width": width, "blocks": list(range(len(tokens))), "dropout": 0.0},
            num_classes=num_classes,
            classes=None,
            preprocessing={"size": preprocessing_of(vit)["size"], "mean": ORIGINAL_MEAN, "std": ORIGINAL_STD}
            | {"interpolation": "bilinear", "crop_pct": CROPS[crop_mode], "crop_mode": crop_mode},
            versions={"vpt": __version__, **{name: version(name) for name in ("torch", "timm")}},
            note=note,
            traits=traits_of(vit, preprocessing_of(vit)["size"]),
        )
    except ValueError as error:
        raise ValueError(f"{original.path}: {error}") from error
    weight, bias = original.head or (torch.zeros(num_classes, vit.embed_dim), torch.zeros(num_classes))
    return metadata, {"prompt.tokens": tokens, "head.weight": weight, "head.bias": bias}


class _PickledDtype:
    """Dtype of a pickled NumPy array: a code such as "f4", and the byte order."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _PickledArray:
    """State of a pickled NumPy array, checked by `to_tensor`."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_tensor(self) -> Tensor:
        """The array, as float32; ValueError or TypeError if its shape or dtype is invalid."""
        _, shape, dtype, is_fortran, data = self.state
        if not isinstance(dtype, _PickledDtype) or dtype.code not in PICKLED_FLOATS or dtype.order not in ("<", ">"):
            raise ValueError("its dtype is not a float")
        array = np.frombuffer(data, np.dtype(dtype.order + dtype.code))
        if not all(type(size) is int and size > 0 for size in shape) or math.prod(shape) != len(array):
            raise ValueError(f"its shape does not fit {len(array)} numbers")
        return torch.from_numpy(array.reshape(shape, order="F" if is_fortran else "C").astype(np.float32, order="C"))


def _unpickle(path: Path) -> Any:
    """Load a file of torch.save as tensors, plain values and `_PickledArray`s."""
    # NumPy 1 and 2 write different names; each is replaced by a class of this module.
    names: dict[str, Any] = {f"numpy.{core}.multiarray._reconstruct": _PickledArray for core in ("core", "_core")}
    names |= {"numpy.ndarray": _PickledArray, "numpy.dtype": _PickledDtype}
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):  # members may be compressed, and larger when they are read
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(member.file_size for member in archive.infolist()))
        if size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        with torch.serialization.safe_globals([(target, name) for name, target in names.items()]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and the pickle each raise their own types
        what = f"not a .pth file that can be read safely ({_reason(error)})"
        raise ValueError(f"{path}: {what}; nothing in it was run") from error


def _reason(error: BaseException) -> str:
    """The first line of an error, without the advice of torch to trust the file."""
    if isinstance(error, pickle.UnpicklingError) and error.__context__ is not None:
        error = error.__context__
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(r"\. Please use .*|[.:]$", "", lines[0])[:200]


def _role(path: Path, key: str) -> str | None:
    """The role of a key of the file; None if a task does not need it, such as a weight of the backbone."""
    parts = key.split(".")
    for ending, role in HEAD.items():
        if key == ending or key.endswith(f".{ending}"):
            return role
    if parts[-1] in ROLES:
        return ROLES[parts[-1]]
    if any(re.match(r"(deep_)?prompt", part) for part in parts[-2:]):
        raise ValueError(f"{path}: has {key[:100]}; prompts with a projection or of a Swin cannot be converted")
    if "head" in parts:
        raise ValueError(f"{path}: has {key[:100]}; only a head of one layer, head.last_layer, can be converted")
    return None


def _to_tensor(path: Path, key: str, value: Any) -> Tensor:
    try:
        if isinstance(value, _PickledArray):
            value = value.to_tensor()
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
            raise TypeError(f"it is a {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"it is of {value.dtype}")
        if value.numel() * 4 > MAX_BYTES:  # an expanded view may be larger than its storage
            raise ValueError(f"its shape is {tuple(value.shape)}")
        tensor = value.detach().to(torch.float32, copy=True).contiguous()
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises the last one
        raise ValueError(f"{path}: {key[:100]} is not a usable array of floats ({error})") from error
    if not tensor.isfinite().all():
        raise ValueError(f"{path}: {key[:100]} contains nan or inf; its training failed")
    return tensor


def _check_shapes(original: OriginalPrompt) -> None:
    path, shape = original.path, tuple(original.shallow.shape)
    if len(shape) != 3 or shape[0] != 1 or 0 in shape:
        raise ValueError(f"{path}: the prompt of its first block has shape {shape}; expected (1, P, D)")
    if original.deep is not None and (original.deep.ndim != 3 or original.deep.shape[1:] != original.shallow.shape[1:]):
        wanted = f"(depth - 1, {shape[1]}, {shape[2]})"
        raise ValueError(f"{path}: its deep prompt has shape {tuple(original.deep.shape)}; expected {wanted}")
    shapes = tuple(tuple(tensor.shape) for tensor in original.head or ())
    if shapes and (len(shapes[1]) != 1 or shapes[0] != (*shapes[1], shape[2])):
        raise ValueError(f"{path}: its head has shapes {shapes[0]} and {shapes[1]}; expected (K, {shape[2]}) and (K,)")


def _check_fits(original: OriginalPrompt, vit: ViT, num_classes: int | None) -> None:
    """Refuse a backbone or a number of classes that does not fit the prompts and the head."""
    path, name, width, depth = original.path, name_of(vit), original.shallow.shape[2], len(vit.blocks)
    advice = "name another backbone"
    if width != vit.embed_dim:
        raise ValueError(f"{path}: its prompt tokens have width {width}, those of {name} {vit.embed_dim}; {advice}")
    if original.deep is not None and len(original.deep) != depth - 1:
        raise ValueError(f"{path}: its prompt is for {len(original.deep) + 1} blocks, {name} has {depth}; {advice}")
    if vit.global_pool != "token":
        raise ValueError(f"{path}: the original ViT reads the CLS token, {name} pools {vit.global_pool or 'nothing'}")
    if original.head is None and num_classes is None:
        raise ValueError(f"{path}: has prompts but no head; num_classes is required, for a head of zeros")
    if original.head is not None and num_classes not in (None, len(original.head[1])):
        raise ValueError(f"{path}: its head has {len(original.head[1])} classes, not num_classes={num_classes}")


def _peft_config(metadata: TaskMetadata) -> dict[str, Any]:
    """Content of adapter_config.json: keys of PEFT, and the metadata of the task file."""
    task_type, backbone = task_type_named(metadata.task_type).peft_task, metadata.backbone
    base = {"task_type": task_type, "base_model_name_or_path": backbone, "inference_mode": True}
    prompt = {"num_tokens": 0, "width": None, "blocks": []} if metadata.prompt is None else metadata.prompt
    sizes = {"num_virtual_tokens": prompt["num_tokens"], "token_dim": prompt["width"]}
    saved = ["head"] if metadata.head is None else ["head", "neck"]
    rest = {"num_layers": len(prompt["blocks"]), "modules_to_save": saved, "vpt": metadata.to_json()}
    return {"peft_type": PEFT_TYPE, **base, **sizes, **rest}


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a PEFT-style folder has {CONFIG_NAME} and {WEIGHTS_NAME}")
    if path.stat().st_size > MAX_HEADER:
        raise ValueError(f"{path}: larger than {MAX_HEADER} bytes, not the config of an adapter")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return config
