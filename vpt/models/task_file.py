"""Task files: a prompt and a head in one small safetensors file, with what is needed to use or refuse it.

Tensors: `prompt.tokens` (L, P, D) where there is a prompt, (L, P, 2 h d) of variant kv; `head.*` and, where the model
has a neck, `neck.*`; and `backbone.*`, by timm's names, for parameters of the backbone that were tuned. The metadata,
JSON under the key "vpt", has the fields of `TaskMetadata`. docs/task_format.md describes the format.

A file may come from an untrusted source: tensors are compared by name and shape with a model on the meta device, before
one that takes memory is made.
"""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vpt.models.adapters import Adapters, add_adapters
from vpt.models.backbone import PromptedViT
from vpt.models.prompts import VisualPrompt
from vpt.models.task_model import TaskModel, device_of, model_named, refuse_equal_names
from vpt.models.task_schema import MAX_TEXT, TaskMetadata
from vpt.models.tuning import Origin, origin_now, origin_of, pretrained_fingerprint, set_origin, unwrapped
from vpt.models.vit import ViT, differing_trait, load_vit, name_of, preprocessing_of, traits_of
from vpt.storage.files import read_tensors, write_tensors
from vpt.version import __version__

TASK_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def save_task(
    model: TaskModel,
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    licence: str = "",
    note: str = "",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the learned part of a model, and nothing that is pretrained, as a task file; return its path.

    Args:
        model: The trained model, also inside DataParallel, DistributedDataParallel or torch.compile.
        path: The file; its folder is made if it does not exist.
        classes: Names of the classes, in the order of the logits; the model's own by default.
        preprocessing: How images were prepared; by default as timm states for the backbone, with `model.preprocessing`.
        metrics: Measured values by split, such as {"val": {"top1": 0.93}}.
        config: How it was trained, as plain JSON values.
        licence: Terms of use of the file, such as "CC-BY-4.0".
        note: Free text for users.
        dtype: Write the tensors in this dtype, torch.float16 or torch.bfloat16, for half the size; None keeps theirs.

    Raises:
        TypeError: `model` is not a `TaskModel`.
        ValueError: The number of names is not the number of classes, another value cannot be stored, or parameters of
            the backbone train that `tune` did not choose.
    """
    given, model = type(model).__name__, cast(TaskModel, unwrapped(model))
    if not isinstance(model, TaskModel):
        raise TypeError(f"model: expected a TaskModel, such as create_model returns, got {given}")
    vit, prompt = model.backbone.vit, model.backbone.prompt
    refuse_equal_names(classes)
    classes = model.classes if classes is None else classes
    if classes is not None and len(classes) != model.num_classes:
        raise ValueError(f"{len(classes)} class names for a head of {model.num_classes} classes")
    metadata = TaskMetadata(
        backbone=model.backbone.name,
        fingerprint=_known_fingerprint(vit),
        prompt=None if prompt is None else _describe_prompt(prompt),
        num_classes=model.num_classes,
        classes=None if classes is None else list(classes),
        preprocessing=_plain(preprocessing or {**preprocessing_of(vit), **model.preprocessing}),
        metrics={
            split: {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
            for split, values in (metrics or {}).items()
        },
        task_type=model.task_type,
        head=None if model.layout is None else _plain(model.layout),
        category_ids=None if model.category_ids is None else list(model.category_ids),
        tuned_backbone=bool(_backbone_tensors(vit)),
        adapters=_describe_adapters(vit),
        config=None if config is None else dict(config),
        versions={"vpt": __version__, **{name: version(name) for name in ("torch", "timm")}},
        licence=licence,
        note=note,
        traits=_traits_for(model),
    )
    return write_task(path, metadata, task_tensors(model), dtype=dtype)


def load_task(path: str | Path, backbone: str | ViT, *, checkpoint: str | Path | None = None) -> TaskModel:
    """Read a task file onto a backbone; the model is in eval mode.

    Args:
        path: A task file.
        backbone: A timm ViT in memory, or the timm name of one. A ViT in memory is held; only where the file has tuned
            parameters of the backbone, they go into a copy.
        checkpoint: With a name: load the backbone's weights from this file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, is of another format, or belongs to another backbone.
    """
    if isinstance(backbone, str):
        height, width = read_task(path).preprocessing["size"]
        return put_task(path, load_vit(backbone, checkpoint=checkpoint, img_size=(height, width)))[0]
    return put_task(path, backbone)[0]


def put_task(path: str | Path, vit: ViT, *, shares: bool = False) -> tuple[TaskModel, TaskMetadata]:
    """Read a task file onto a ViT in memory, as `load_task` does; return the model and its metadata.

    With `shares` a copy shares the parameters that were not tuned, for inference: then they must never train.
    """
    path = Path(path)
    metadata, tensors = open_task(path)
    _check_backbone(path, metadata, tensors, vit)
    tuned = _backbone_names(tensors)
    added, own = frozenset[str](), frozenset(vit.state_dict())
    if tuned:
        named = (*vit.named_parameters(), *vit.named_buffers())
        vit = copy.deepcopy(vit, {id(part): part for name, part in named if shares and name not in tuned})
        added = _add_adapters(path, metadata, vit)
    with torch.device("meta"):
        expected = _own_tensors(_make_model(path, metadata, vit))
    state = vit.state_dict(keep_vars=True)
    expected |= {f"backbone.{name}": state[name] for name in added or tuned & own}
    given, wanted = ({name: tensor.shape for name, tensor in side.items()} for side in (tensors, expected))
    _refuse(path, sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name)))
    real = {name: tensors[f"backbone.{name}"].to(device_of(vit), state[name].dtype) for name in added}
    vit.load_state_dict(real, strict=False, assign=True)
    model = _make_model(path, metadata, vit)
    if tuned:
        adapters = None if metadata.adapters is None else Adapters(**metadata.adapters)
        set_origin(vit, Origin(metadata.fingerprint, tuned, adapters, metadata.traits))
    held = task_tensors(model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            held[name].copy_(tensor)
    return model.to(device_of(vit)).eval(), metadata


def read_task(path: str | Path) -> TaskMetadata:
    """The metadata of a task file, read without a backbone.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or is not a task file of a version that this library reads.
    """
    return open_task(path)[0]


def open_task(path: str | Path) -> tuple[TaskMetadata, dict[str, Tensor]]:
    """The metadata and the tensors of a task file, checked against each other; for errors see `read_task`."""
    path = Path(path)
    tensors, values = read_tensors(path)
    try:
        metadata = TaskMetadata.from_json(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _check_described(path, metadata, tensors)
    return metadata, tensors


def write_task(
    path: str | Path, metadata: TaskMetadata, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
) -> Path:
    """Write a task file from metadata and tensors, in another dtype if given; return its path.

    Tensors that contradict the metadata, or are too large for the dtype, raise a ValueError.
    """
    path, tensors = Path(path), tensors if dtype is None else to_dtype(tensors, dtype)
    _check_described(path, metadata, tensors)
    write_tensors(path, tensors, metadata.to_json())
    return path


def to_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same tensors in another dtype; a ValueError if a number is too large for it."""
    converted = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if odd := sorted(name for name in tensors if not converted[name].isfinite().equal(tensors[name].isfinite())):
        short = str(dtype).removeprefix("torch.")
        raise ValueError(f"{odd[0]} has numbers that are too large for {short}; use bfloat16 or float32")
    return converted


def task_tensors(model: TaskModel) -> dict[str, Tensor]:
    """The tensors of a task file, by their names in it."""
    return _own_tensors(model) | _backbone_tensors(model.backbone.vit)


def _own_tensors(model: TaskModel) -> dict[str, Tensor]:
    """Head, neck and prompt."""
    tensors: dict[str, Tensor] = {
        f"{part}.{name}": value
        for part, module in {"head": model.head, "neck": model.neck}.items()
        if module is not None
        for name, value in module.state_dict(keep_vars=True).items()
    }
    if model.backbone.prompt is not None:
        tensors["prompt.tokens"] = model.backbone.prompt.tokens
    return tensors


def _backbone_tensors(vit: ViT) -> dict[str, Tensor]:
    """Parameters of the backbone that train, or trained before and may differ from the pretrained ones."""
    tuned = (origin_of(vit) or Origin("", frozenset())).tuned
    named = vit.state_dict(keep_vars=True).items()
    return {f"backbone.{name}": value for name, value in named if value.requires_grad or name in tuned}


def _backbone_names(tensors: Mapping[str, Tensor]) -> frozenset[str]:
    return frozenset(name.removeprefix("backbone.") for name in tensors if name.startswith("backbone."))


def _known_fingerprint(vit: ViT) -> str:
    """The digest of the weights before any of them were tuned; refuse a ViT of which that is not known."""
    known = (origin_of(vit) or Origin("", frozenset())).tuned
    if odd := _backbone_names(_backbone_tensors(vit)) - known:
        raise ValueError(
            f"parameters of the backbone train that vpt.tune has not chosen ({min(odd)}), and what they were before "
            "is not known; call vpt.tune before training, on loaded weights"
        )
    if gone := known - vit.state_dict().keys():
        raise ValueError(f"{min(gone)} was tuned and is no longer in the backbone; save the task before it is changed")
    return pretrained_fingerprint(vit)


def _traits_for(model: TaskModel) -> dict[str, Any] | None:
    """What determines the features that a model reads, beside the weights in the fingerprint."""
    traits = origin_now(model.backbone.vit).traits
    # A head that reads feature maps works on a backbone that pools otherwise, too.
    return None if traits is None else {**traits, "pooling": traits["pooling"] if model.pools_features else None}


def _check_traits(path: Path, metadata: TaskMetadata, vit: ViT) -> None:
    """Refuse a ViT whose features differ although its weights are right."""
    if metadata.traits is None:
        warnings.warn(
            f"{path}: an older version wrote this file, without the backbone's pooling, patches and position "
            "embedding, so they are not compared; save the task again to add them",
            stacklevel=2,
        )
        return
    origin = origin_of(vit)
    found = traits_of(vit, metadata.traits["size"]) if origin is None else origin.traits
    if found is not None and (odd := differing_trait(metadata.traits, found)) is not None:
        raise ValueError(
            f"{path}: made for the backbone {metadata.backbone}; the given one has its weights, but {odd}; "
            f"load {metadata.backbone} as it was in training"
        )


def _add_adapters(path: Path, metadata: TaskMetadata, vit: ViT) -> frozenset[str]:
    """Add a file's adapters to a ViT, on the meta device; return the names of their tensors."""
    if metadata.adapters is None:
        return frozenset()
    try:
        return add_adapters(vit, Adapters(**metadata.adapters), is_empty=True)
    except ValueError as error:
        raise ValueError(f"{path}: its adapters cannot be used ({error})") from error


def _describe_adapters(vit: ViT) -> dict[str, Any] | None:
    origin = origin_of(vit)
    if origin is None or origin.adapters is None:
        return None
    return {"method": origin.adapters.method, "options": dict(origin.adapters.options)}


def _check_described(path: Path, metadata: TaskMetadata, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that contradict the metadata, as far as that is known without the backbone."""
    if metadata.tuned_backbone != bool(_backbone_names(tensors)):
        raise ValueError(f"{path}: tuned_backbone is {metadata.tuned_backbone}, which its tensors contradict")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted: dict[str, tuple[int, ...]] = {}
    if (prompt := metadata.prompt) is not None:
        wanted["prompt.tokens"] = (len(prompt["blocks"]), prompt["num_tokens"], prompt["width"])
    own = {name: shape for name, shape in shapes.items() if name.startswith(("head.", "neck."))}
    expected = model_named(metadata.task_type).expected_shapes(metadata.num_classes, own)
    wanted |= own if expected is None else expected
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("backbone.")}
    odd = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
    odd += sorted(name for name, tensor in tensors.items() if tensor.dtype not in TASK_DTYPES)
    _refuse(path, odd)


def _refuse(path: Path, odd: Sequence[str]) -> None:
    """Raise an error if there are odd tensors."""
    if odd:
        what = f"its tensors are not those that its metadata describes ({odd[0][:MAX_TEXT]})"
        raise ValueError(f"{path}: {what}; get a fresh copy")


def _check_backbone(path: Path, metadata: TaskMetadata, tensors: Mapping[str, Tensor], vit: ViT) -> None:
    """Refuse a ViT that is not the pretrained one, of another input size, or without the file's parameters."""
    origin, name = origin_of(vit), name_of(vit)
    if pretrained_fingerprint(vit) != metadata.fingerprint:
        raise ValueError(
            f"{path}: made for the backbone {metadata.backbone}, but the given one is {name}"
            + (" with other weights" if name == metadata.backbone else "")
            + f"; load {metadata.backbone} and try again"
        )
    if origin is not None and (origin.adapters is not None or not origin.tuned <= _backbone_names(tensors)):
        raise ValueError(f"{path}: made for pretrained weights, but the given {name} was tuned; load {name} again")
    wanted = metadata.preprocessing["size"]
    size = list(vit.patch_embed.img_size or wanted)
    if size != wanted and vit.patch_embed.strict_img_size:
        raise ValueError(
            f"{path}: made for images of {wanted} px, but the backbone takes {size}; use img_size={wanted}"
        )
    _check_traits(path, metadata, vit)


def _make_model(path: Path, metadata: TaskMetadata, vit: ViT) -> TaskModel:
    try:
        # The inverse of `_describe_prompt`, which uses the names of the file.
        values = {"variant" if name == "kind" else name: value for name, value in (metadata.prompt or {}).items()}
        backbone = PromptedViT(vit, VisualPrompt(**values) if values else None)
        return model_named(metadata.task_type).from_layout(
            backbone,
            metadata.num_classes,
            classes=metadata.classes,
            category_ids=metadata.category_ids,
            layout=metadata.head,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its prompt or head cannot be used ({error})") from error


def _describe_prompt(prompt: VisualPrompt) -> dict[str, Any]:
    return {
        "kind": prompt.variant,
        "num_tokens": prompt.num_tokens,
        "embed_dim": prompt.embed_dim,
        "width": prompt.width,
        "blocks": list(prompt.blocks),
        "dropout": prompt.dropout.p,
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tuples as lists, as JSON reads them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
