"""create_model: a whole model in one call, from the name of a backbone to a head; it says what trains."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args, overload

import torch
from torch import nn

from vpt.models.adapters import Adapters
from vpt.models.backbone import PromptedViT, PromptImpl
from vpt.models.classifier import ClassificationModel
from vpt.models.detector import DetectionModel
from vpt.models.heads.linear import HeadInit
from vpt.models.prompts import Blocks, PromptInit, PromptKind, VisualPrompt
from vpt.models.tuning import Tuning, tune
from vpt.models.vit import ViT, load_vit

Task = Literal["classification", "detection"]
PromptChoice = PromptKind | VisualPrompt | Literal["auto"] | None


class Options(TypedDict, total=False):
    """What both kinds of task understand, see `create_model`."""

    prompt: PromptChoice
    num_tokens: int
    blocks: Blocks
    dropout: float
    init: PromptInit
    form: nn.Module | None
    impl: PromptImpl
    tuning: Tuning
    num_blocks: int
    adapters: Adapters | None
    pretrained: bool
    checkpoint: str | Path | None
    img_size: int | tuple[int, int] | None
    dtype: torch.dtype | None
    classes: Sequence[str] | None


class DetectionOptions(Options, total=False):
    """What detection understands, see `create_model`."""

    category_ids: Sequence[int] | None
    head: str | None
    taps: Blocks | None
    channels: int | None
    strides: Sequence[int] | None
    num_convs: int | None


@overload
def create_model(
    backbone: str | ViT,
    *,
    num_classes: int,
    task: Literal["classification"] = "classification",
    head_init: HeadInit | None = None,
    **options: Unpack[Options],
) -> ClassificationModel: ...


@overload
def create_model(
    backbone: str | ViT, *, num_classes: int, task: Literal["detection"], **options: Unpack[DetectionOptions]
) -> DetectionModel: ...


def create_model(
    backbone: str | ViT,
    *,
    num_classes: int,
    task: Task = "classification",
    prompt: PromptChoice = "auto",
    num_tokens: int = 20,
    blocks: Blocks = "all",
    dropout: float = 0.0,
    init: PromptInit = "uniform",
    form: nn.Module | None = None,
    impl: PromptImpl = "auto",
    tuning: Tuning = "prompt",
    num_blocks: int = 1,
    adapters: Adapters | None = None,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    img_size: int | tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    classes: Sequence[str] | None = None,
    head_init: HeadInit | None = None,
    category_ids: Sequence[int] | None = None,
    head: str | None = None,
    taps: Blocks | None = None,
    channels: int | None = None,
    strides: Sequence[int] | None = None,
    num_convs: int | None = None,
) -> ClassificationModel | DetectionModel:
    """Make a classifier or a detector of a ViT, a prompt and a head, ready to train.

    Args:
        backbone: A timm name, or a timm ViT that is in memory already; it is held and not copied.
        num_classes: K.
        task: "classification" or "detection".
        prompt: "deep", "shallow", "kv", None, or a ready `VisualPrompt`. "auto" is "deep" with tuning="prompt", and no
            prompt with the other ways of tuning, which may also be given one; "linear" may not.
        num_tokens: P, prompt tokens in each prompted block.
        blocks: Blocks that a deep prompt enters: "all", "first:k", "last:k" or a list of indices.
        dropout: Dropout of prompt tokens, drawn for each sample.
        init: How prompt tokens start, "uniform" or "normal", see `VisualPrompt`. A deep prompt trains better from
            patches of your images: `start_from_patches`.
        form: What is learned in the place of the tokens, such as `prompt_forms.Bilinear(rank=8)`.
        impl: How prompts are computed, "auto" or "concat", see `PromptedViT`.
        tuning: What trains: "prompt", "linear", "bias", "proj_bias", "norm", "partial", "full" or "adapters", see
            `tune`. All but the first two change the backbone itself.
        num_blocks: Blocks that tuning="partial" trains.
        adapters: What tuning="adapters" puts into the backbone, such as `Adapters("lora", {"r": 8})`.
        pretrained: Load the weights that timm knows under the name.
        checkpoint: Load the backbone's weights from this file instead.
        img_size: Input size in pixels, one side or (height, width); None keeps the model's own.
        dtype: Hold the backbone's weights in this dtype, such as torch.bfloat16; prompt, neck and head stay in float32.
        classes: Names of the classes, in the order of the logits.
        head_init: Classification: how the head starts, see `linear_head`.
        category_ids: Detection: what the source of the data calls each class.
        head: Detection: which head; this and the next four see `DetectionModel`, whose defaults None stands for.
        taps: Detection: blocks whose patch tokens the neck looks at.
        channels: Detection: width of neck and head.
        strides: Detection: of the neck's levels, in pixels.
        num_convs: Detection: convolutions in each tower of the head.

    Raises:
        ValueError, TypeError, FileNotFoundError: As `load_vit`, `PromptedViT`, the model and `tune` raise them; an
            option of the other kind of task; `checkpoint`, `img_size` or `dtype` for a ViT that is in memory.

    Example:
        >>> model = create_model("vit_nano_patch8_64", prompt="deep", num_tokens=10, num_classes=14, pretrained=False)
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        12302
        >>> detector = create_model("vit_nano_patch8_64", task="detection", num_classes=3, tuning="linear", channels=32)
        >>> type(detector).__name__, detector.backbone.prompt
        ('DetectionModel', None)
    """
    if task not in get_args(Task):
        raise ValueError(f"task must be one of {', '.join(get_args(Task))}, got {task!r}")
    detection: dict[str, Any] = {
        "category_ids": category_ids,
        "head": head,
        "taps": taps,
        "channels": channels,
        "strides": strides,
        "num_convs": num_convs,
    }
    classification: dict[str, Any] = {"head_init": head_init}
    own, foreign = (classification, detection) if task == "classification" else (detection, classification)
    for key, value in _given(foreign).items():
        raise ValueError(f"{key}={value} is not for task={task}, which has {', '.join(own)}")
    loading = _given({"checkpoint": checkpoint, "img_size": img_size, "dtype": dtype})
    for key, value in loading.items() if not isinstance(backbone, str) else ():
        raise ValueError(f"{key}={value} is for a backbone given by name; this one is in memory as it is")
    vit = load_vit(backbone, pretrained=pretrained, **loading) if isinstance(backbone, str) else backbone
    if prompt == "auto":
        prompt = "deep" if tuning == "prompt" else None
    prompted = PromptedViT(
        vit, prompt, num_tokens=num_tokens, blocks=blocks, dropout=dropout, init=init, form=form, impl=impl
    )
    kind = ClassificationModel if task == "classification" else DetectionModel
    model = kind(prompted, num_classes, classes=classes, **_given(own))
    tune(model, tuning, num_blocks=num_blocks, adapters=adapters)
    return model


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}
