"""The task file: a prompt and a head in one small safetensors file, with what is needed to use or refuse it.

Tensors: `prompt.tokens` (L, P, D) when there is a prompt, `head.weight` (K, D), `head.bias` (K,). The metadata, JSON
under the key "vpt", has the fields of `TaskMetadata` and a sha256 of the tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vpt.files import read_tensors, write_tensors
from vpt.models.backbone import PromptedViT
from vpt.models.classification import ClassificationModel
from vpt.models.prompts import VisualPrompt
from vpt.models.vit import ViT, fingerprint, load_vit, name_of, preprocessing_of

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TaskMetadata:
    """What a task file says of itself.

    Args:
        backbone: timm name of the backbone, with its pretrained tag.
        fingerprint: Digest of the backbone's weights.
        prompt: Kind, num_tokens, embed_dim, blocks and dropout of the prompt; None without one.
        num_classes: K.
        classes: Names of the classes, in the order of the logits; None when nobody named them.
        preprocessing: Size, mean, std, interpolation, crop_pct and crop_mode of the input pictures.
        metrics: What was measured, such as {"val": {"top1": 0.93}}.
        format_version: Version of this format.
        kind: Kind of task.
    """

    backbone: str
    fingerprint: str
    prompt: dict[str, Any] | None
    num_classes: int
    classes: list[str] | None
    preprocessing: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    kind: Literal["classification"] = "classification"


def save_task(
    model: ClassificationModel,
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Write the prompt and the head of a model as a task file; return its path.

    Args:
        model: The trained model.
        path: Where to; the folder is made when it is missing.
        classes: Names of the classes, in the order of the logits; the model's own by default.
        preprocessing: How pictures were prepared; what timm says of the backbone by default.
        metrics: What was measured, stored as it is.

    Raises:
        ValueError: The number of names is not the number of classes.
    """
    classes = model.classes if classes is None else classes
    if classes is not None and len(classes) != model.num_classes:
        raise ValueError(f"{len(classes)} class names for a head of {model.num_classes} classes")
    metadata = TaskMetadata(
        backbone=model.backbone.name,
        fingerprint=fingerprint(model.backbone.vit),
        prompt=_describe_prompt(model.backbone.prompt),
        num_classes=model.num_classes,
        classes=None if classes is None else list(classes),
        preprocessing=dict(preprocessing or preprocessing_of(model.backbone.vit)),
        metrics=dict(metrics or {}),
    )
    path = Path(path)
    write_tensors(path, task_tensors(model), asdict(metadata))
    return path


def load_task(path: str | Path, backbone: str | ViT, *, checkpoint: str | Path | None = None) -> ClassificationModel:
    """Read a task file onto a backbone; the model is in eval mode.

    Args:
        path: A task file.
        backbone: A timm ViT in memory, which is held and not copied, or the timm name of one.
        checkpoint: With a name: load the backbone's weights from this file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, is of another format, or belongs to another backbone.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    if isinstance(backbone, str):
        height, width = metadata.preprocessing["size"]
        backbone = load_vit(backbone, checkpoint=checkpoint, img_size=(height, width))
    _check_backbone(path, metadata, backbone)
    prompt = None if metadata.prompt is None else _make_prompt(path, metadata.prompt)
    model = ClassificationModel(PromptedViT(backbone, prompt), metadata.num_classes, classes=metadata.classes)
    expected = task_tensors(model)
    if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in expected.items()}:
        raise ValueError(f"{path}: its tensors are not those that its metadata describes; get a fresh copy")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])
    device = next(backbone.parameters()).device
    return model.to(device).eval()


def read_task(path: str | Path) -> TaskMetadata:
    """What a task file says of itself, without a backbone.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or is not a task file of a version that this library reads.
    """
    return _read(Path(path))[1]


def task_tensors(model: ClassificationModel) -> dict[str, Tensor]:
    """The tensors that a task file holds, by the names that they have in it."""
    tensors: dict[str, Tensor] = {f"head.{name}": value for name, value in model.head.named_parameters()}
    if model.backbone.prompt is not None:
        tensors["prompt.tokens"] = model.backbone.prompt.tokens
    return tensors


def _read(path: Path) -> tuple[dict[str, Tensor], TaskMetadata]:
    tensors, values = read_tensors(path)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: task format {version!r}; this version of vpt reads {FORMAT_VERSION}")
    known = {f.name for f in fields(TaskMetadata)}
    if set(values) != known:
        odd = ", ".join(sorted(set(values) ^ known))
        raise ValueError(f"{path}: its metadata has missing or unknown fields ({odd})")
    if values["kind"] != "classification":
        raise ValueError(f"{path}: a task of kind {values['kind']!r}; this version of vpt reads classification")
    return tensors, TaskMetadata(**values)


def _check_backbone(path: Path, metadata: TaskMetadata, vit: ViT) -> None:
    if fingerprint(vit) == metadata.fingerprint:
        size = list(vit.patch_embed.img_size or metadata.preprocessing["size"])
        if size != metadata.preprocessing["size"] and vit.patch_embed.strict_img_size:
            wanted = metadata.preprocessing["size"]
            raise ValueError(
                f"{path}: made for pictures of {wanted} px, but the backbone takes {size}; use img_size={wanted}"
            )
        return
    name = name_of(vit)
    raise ValueError(
        f"{path}: made for the backbone {metadata.backbone}, but the given one is {name}"
        + (" with other weights" if name == metadata.backbone else "")
        + f"; load {metadata.backbone} and try again"
    )


def _describe_prompt(prompt: VisualPrompt | None) -> dict[str, Any] | None:
    if prompt is None:
        return None
    return {
        "kind": prompt.kind,
        "num_tokens": prompt.num_tokens,
        "embed_dim": prompt.embed_dim,
        "blocks": list(prompt.blocks),
        "dropout": prompt.dropout.p,
    }


def _make_prompt(path: Path, described: Mapping[str, Any]) -> VisualPrompt:
    try:
        return VisualPrompt(**described)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its prompt layout cannot be used ({error})") from error
