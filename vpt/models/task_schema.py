"""The task file: a prompt and a head in one small safetensors file, with what is needed to use or refuse it.

Tensors: `prompt.tokens` (L, P, D) when there is a prompt, (L, P, 2 h d) of kind kv; `head.*`, which are `head.weight`
(K, D) and `head.bias` (K,) for classification; `neck.*` for detection; and `backbone.*`, by timm's names, for the
backbone's parameters that were tuned. The metadata, JSON under the key "vpt", has the fields of `TaskMetadata`.
docs/task_format.md says all that another program needs.

A file may come from a stranger: every field is checked before it is used, and tensors are compared by name and shape
with a model that takes no memory, before one that does is made.
"""

import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from vpt.models.adapters import METHODS, Adapters
from vpt.models.prompts import PromptKind

FORMAT_VERSION = 2


MAX_CLASSES = 100_000


MAX_TOKENS = 10_000


MAX_WIDTH = 16_384  # of a token


MAX_CHANNELS = 4096


MAX_BLOCKS = 1000


MAX_SIDE = 4096  # pixels


MAX_TEXT = 1000  # characters of a name


MAX_NOTE = 10_000


MAX_DEPTH = 20  # of objects and lists in each other


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


CROP_MODES = ("center", "squash", "letterbox")


Kind = Literal["classification", "detection"]


Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and what is, for a person to read


@dataclass(frozen=True)
class TaskMetadata:
    """What a task file says of itself.

    Args:
        backbone: timm name of the backbone, with its pretrained tag.
        fingerprint: Digest of the backbone's pretrained weights.
        prompt: Kind, num_tokens, embed_dim, width, blocks and dropout of the prompt; None without one.
        num_classes: K.
        classes: Names of the classes, in the order of the logits; None when nobody named them.
        preprocessing: Size, mean, std, interpolation, crop_pct and crop_mode of the input pictures.
        metrics: What was measured, by split, such as {"val": {"top1": 0.93}}; null for what was not a number.
        format_version: Version of this format.
        kind: Kind of task.
        head: `DetectionModel.layout`; None for classification.
        category_ids: Detection: the data's own number of each class; None when they are not known.
        tuned_backbone: Whether parameters of the backbone were tuned, so that the file holds them.
        adapters: Method and options of the adapters in the backbone, whose tensors are among those; None without any.
        config: The config that it was trained with; None when it was trained otherwise.
        versions: Of vpt, torch and timm when the file was written.
        licence: Under which terms the file may be used, such as "CC-BY-4.0"; empty when nobody said.
        note: What a person should know.

    Raises:
        ValueError: A field is not of its type or out of range; the message begins with its name.
    """

    backbone: str
    fingerprint: str
    prompt: dict[str, Any] | None
    num_classes: int
    classes: list[str] | None
    preprocessing: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    kind: Kind = "classification"
    head: dict[str, Any] | None = None
    category_ids: list[int] | None = None
    tuned_backbone: bool = False
    adapters: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    licence: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        _check_fields("", values, RULES)
        _check_fields("preprocessing", self.preprocessing, PREPROCESSING_RULES)
        for split, values in self.metrics.items():
            _check_values(f"metrics.{split}", values, _or_none(_number(-math.inf, math.inf)))
        _check_values("versions", self.versions, TEXT)
        if self.prompt is not None:
            _check_fields("prompt", self.prompt, PROMPT_RULES)
        if self.adapters is not None:
            _check_fields("adapters", self.adapters, ADAPTERS_RULES)
            Adapters(**self.adapters)
            if not self.tuned_backbone:
                raise ValueError("adapters are named, but tuned_backbone is False, so there are none")
        if self.head is not None:
            _check_fields("head", self.head, HEAD_RULES)
        if (self.head is not None) != (self.kind == "detection"):
            raise ValueError(f"head is {reprlib.repr(self.head)} in a task of kind {self.kind}")
        if self.category_ids is not None and self.kind != "detection":
            raise ValueError(f"category_ids is {reprlib.repr(self.category_ids)} in a task of kind {self.kind}")
        for name, listed in {"classes": self.classes, "category_ids": self.category_ids}.items():
            if listed is not None and len(listed) != self.num_classes:
                raise ValueError(f"{name} has {len(listed)} entries, but num_classes is {self.num_classes}")


def _newest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of version 1, which knew neither adapters nor tokens of another width, as those of version 2."""
    if values.get("format_version") != 1 or type(values["format_version"]) is not int or "adapters" in values:
        return dict(values)
    prompt = values.get("prompt")
    if isinstance(prompt, dict) and "width" not in prompt:
        prompt = {**prompt, "width": prompt.get("embed_dim")}
    return {**values, "format_version": FORMAT_VERSION, "prompt": prompt, "adapters": None}


def _check_fields(prefix: str, values: object, rules: Mapping[str, Rule]) -> None:
    """Refuse fields that are missing, unknown or break their rule."""
    if not isinstance(values, dict) or set(values) != set(rules):
        raise ValueError(f"{prefix} is {reprlib.repr(values)}; its fields must be {', '.join(rules)}")
    for name, (is_allowed, allowed) in rules.items():
        if not is_allowed(values[name]):
            raise ValueError(f"{prefix}{'.' * bool(prefix)}{name} is {reprlib.repr(values[name])}; allowed: {allowed}")


def _check_values(prefix: str, values: object, rule: Rule) -> None:
    """Refuse an object of JSON with a value that breaks the rule of all."""
    is_allowed, allowed = rule
    if not isinstance(values, dict):
        raise ValueError(f"{prefix} is {reprlib.repr(values)}; allowed: an object")
    for name, value in values.items():
        if not is_allowed(value):
            raise ValueError(f"{prefix}.{name} is {reprlib.repr(value)}; allowed: {allowed}")


def _integer(low: int, high: int) -> Rule:
    return lambda value: type(value) is int and low <= value <= high, f"an integer in [{low}, {high}]"


def _number(low: float, high: float) -> Rule:
    def is_allowed(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and low <= value <= high

    return is_allowed, f"a finite number in [{low:g}, {high:g}]"


def _text(pattern: str, allowed: str) -> Rule:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value, re.DOTALL) is not None, allowed


def _list(rule: Rule, least: int, most: int, *, ascends: bool = False) -> Rule:
    def is_allowed(value: Any) -> bool:
        fits = isinstance(value, list) and least <= len(value) <= most and all(map(rule[0], value))
        return fits and (not ascends or value == sorted(set(value)))

    count = str(most) if least == most else f"{least} to {most}"
    return is_allowed, f"a list of {count}, each {rule[1]}" + (", ascending" if ascends else "")


def _or_none(rule: Rule) -> Rule:
    return lambda value: value is None or rule[0](value), f"null, or {rule[1]}"


def _one_of(names: Sequence[str]) -> Rule:
    return lambda value: isinstance(value, str) and value in names, " or ".join(names)


def _is_shallow(value: object) -> bool:
    """Whether copying and printing it in depth can never run out of stack."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list))
        level = [part for parts in inner for part in parts]
    return not level


IS_OBJECT: Rule = (lambda value: isinstance(value, dict), "an object")


TEXT = _text(f".{{0,{MAX_TEXT}}}", f"a text of at most {MAX_TEXT} characters")


BLOCKS = _list(_integer(0, MAX_BLOCKS), 1, MAX_BLOCKS, ascends=True)


RULES: dict[str, Rule] = {
    "backbone": _text(r"\w[\w.-]{0,200}", "the name of a timm model"),
    "fingerprint": _text("[0-9a-f]{64}", "64 hexadecimal digits"),
    "prompt": _or_none(IS_OBJECT),
    "num_classes": _integer(1, MAX_CLASSES),
    "classes": _or_none(_list(TEXT, 1, MAX_CLASSES)),
    "preprocessing": IS_OBJECT,
    "metrics": IS_OBJECT,
    "format_version": _integer(FORMAT_VERSION, FORMAT_VERSION),
    "kind": _one_of(get_args(Kind)),
    "head": _or_none(IS_OBJECT),
    "category_ids": _or_none(_list(_integer(0, 2**63 - 1), 1, MAX_CLASSES)),
    "adapters": _or_none(IS_OBJECT),
    "tuned_backbone": (lambda value: type(value) is bool, "true or false"),
    "config": _or_none(
        (lambda value: isinstance(value, dict) and _is_shallow(value), f"an object of at most {MAX_DEPTH} levels")
    ),
    "versions": IS_OBJECT,
    "licence": TEXT,
    "note": _text(f".{{0,{MAX_NOTE}}}", f"a text of at most {MAX_NOTE} characters"),
}


PREPROCESSING_RULES: dict[str, Rule] = {
    "size": _list(_integer(1, MAX_SIDE), 2, 2),
    "mean": _list(_number(-1e6, 1e6), 3, 3),
    "std": _list(_number(1e-6, 1e6), 3, 3),
    "interpolation": _one_of(INTERPOLATIONS),
    "crop_pct": _number(0.1, 1),
    "crop_mode": _one_of(CROP_MODES),
}


PROMPT_RULES: dict[str, Rule] = {
    "kind": _one_of(get_args(PromptKind)),
    "num_tokens": _integer(1, MAX_TOKENS),
    "embed_dim": _integer(1, MAX_WIDTH),
    "width": _integer(1, 2 * MAX_WIDTH),
    "blocks": BLOCKS,
    "dropout": (lambda value: type(value) in (int, float) and 0 <= value < 1, "a number in [0, 1)"),
}


ADAPTERS_RULES: dict[str, Rule] = {"method": _one_of(METHODS), "options": IS_OBJECT}


HEAD_RULES: dict[str, Rule] = {
    "head": TEXT,
    "taps": BLOCKS,
    "channels": _integer(1, MAX_CHANNELS),
    "strides": _list(_integer(1, MAX_SIDE), 1, 16),
    "num_convs": _integer(0, 16),
}
