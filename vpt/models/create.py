"""create_model: a whole model in one call, from the name of a backbone to a head and what trains."""

import inspect
import reprlib
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, overload

from vpt.models.backbone import PromptedViT
from vpt.models.classifier import Classifier
from vpt.models.detector import Detector
from vpt.models.prompts import DEFAULT_PROMPT, PromptName, VisualPrompt
from vpt.models.segmenter import Segmenter
from vpt.models.task_model import TaskModel, model_named, refuse_equal_names
from vpt.models.tuning import Tuning, tune
from vpt.models.vit import ViT, check_input_size, load_vit

Backbone = str | ViT | PromptedViT
PromptChoice = PromptName | VisualPrompt | Literal["auto"] | None


@overload
def create_model(
    backbone: Backbone, *, num_classes: int, task: Literal["classification"] = "classification", **options: Any
) -> Classifier: ...


@overload
def create_model(backbone: Backbone, *, num_classes: int, task: Literal["detection"], **options: Any) -> Detector: ...


@overload
def create_model(
    backbone: Backbone, *, num_classes: int, task: Literal["segmentation"], **options: Any
) -> Segmenter: ...


@overload
def create_model(backbone: Backbone, *, num_classes: int, task: str, **options: Any) -> TaskModel: ...


def create_model(
    backbone: Backbone,
    *,
    num_classes: int,
    task: str = "classification",
    prompt: PromptChoice = "auto",
    num_tokens: int | None = None,
    tuning: Tuning = "prompt",
    pretrained: bool = True,
    **options: Any,
) -> TaskModel:
    """Make a model of a backbone, a prompt and a head, ready to train.

    For less common choices pass a ready part, of `load_vit` or `PromptedViT`, and call `tune` again.

    Args:
        backbone: A timm name; or a ViT in memory, which is held and not copied; or a ready `PromptedViT`.
        num_classes: K.
        task: Type of task: "classification", "detection", "segmentation", or one that was registered.
        prompt: A name such as "bilinear" or "deep", see `PromptedViT`; None, or a ready `VisualPrompt`; not with
            tuning="linear". "auto" is "bilinear" with tuning="prompt", as in the command, and no prompt with the other
            methods. A ready `PromptedViT` keeps its own.
        num_tokens: P, prompt tokens in each prompted block; None is 20, of "shallow" 50 and of "kv" 10.
        tuning: What trains: "prompt", "linear", "bias", "proj_bias", "norm", "partial" or "full", see `tune`.
        pretrained: With a name: load the weights that timm has under it.
        options: What the model of this type of task takes, such as head="dense" for detection, see `Detector`.

    Raises:
        TypeError: `num_classes` is no integer, or `classes` is no list of texts.
        ValueError: The model does not take an option, two classes have one name, or the input size is no multiple of
            the patch size. Other errors are those of `load_vit`, `PromptedViT` and `tune`.

    Example:
        >>> model = create_model("vit_nano_patch8_64", prompt="deep", num_tokens=10, num_classes=14, pretrained=False)
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        12302
        >>> detector = create_model("vit_nano_patch8_64", task="detection", num_classes=3, tuning="linear", channels=32)
        >>> type(detector).__name__, detector.backbone.prompt
        ('Detector', None)
    """
    model_class = model_named(task)
    allowed = [name for name in inspect.signature(model_class).parameters if name not in ("backbone", "num_classes")]
    for name, value in options.items():
        if name not in allowed:
            raise ValueError(f"{name}={value!r}: not an option of task={task}, which takes {', '.join(allowed)}")
    if not isinstance(num_classes, Integral) or isinstance(num_classes, bool):
        raise TypeError(f"num_classes={num_classes!r}: must be an integer")
    _check_names(options.get("classes"))
    vit = load_vit(backbone, pretrained=pretrained) if isinstance(backbone, str) else backbone
    if prompt == "auto":
        prompt = DEFAULT_PROMPT if tuning == "prompt" else None
    prompted = vit if isinstance(vit, PromptedViT) else PromptedViT(vit, prompt, num_tokens=num_tokens)
    model = model_class(prompted, num_classes, **options)
    check_input_size(prompted.vit)
    tune(model, tuning)
    return model


def _check_names(classes: object) -> None:
    """Refuse names of classes that are no texts, or not distinct."""
    if classes is None:
        return
    if not isinstance(classes, Sequence) or isinstance(classes, str) or not all(isinstance(n, str) for n in classes):
        raise TypeError(f"classes={reprlib.repr(classes)}: must be a list of texts")
    refuse_equal_names(classes)
