"""Metadata of a task file: its fields, and the rules that each of them obeys.

A file may come from an untrusted source, so every field is checked before it is used. docs/task_format.md describes the
format for other programs. The file keeps the field names of format version 1, such as "kind" for the type of task.
"""

import math
import re
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from vpt.models.adapters import METHODS, Adapters
from vpt.models.prompts import PromptVariant

FORMAT_VERSION = 2
MAX_CLASSES = 100_000
MAX_TOKENS = 10_000
MAX_WIDTH = 16_384  # of a token
MAX_CHANNELS = 4096
MAX_BLOCKS = 1000
MAX_SIDE = 4096  # pixels
MAX_TEXT = 1000  # characters of a name
MAX_NOTE = 10_000
MAX_DEPTH = 20  # of nested objects and lists
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "letterbox")

Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and what is allowed, for a message


@dataclass(frozen=True)
class TaskMetadata:
    """Metadata of a task file; docs/task_format.md describes all fields.

    Args:
        backbone: timm name of the backbone, with its pretrained tag.
        fingerprint: Digest of the backbone's pretrained weights.
        traits: What else determines the backbone's features, see `vit.traits_of`; None in files of older versions.
        prompt: kind, num_tokens, embed_dim, width, blocks and dropout of the prompt; None without one.
        classes: Names of the classes, in the order of the logits; None where they are unnamed.
        preprocessing: size, mean, std, interpolation, crop_pct and crop_mode of the input images; optionally
            background, range and bands of their files.
        metrics: Measured values by split, such as {"val": {"top1": 0.93}}; None for what was not a number.
        task_type: Type of task, such as "classification"; "kind" in the file.
        head: `TaskModel.layout`.
        category_ids: Numbers of the classes in the data's own files; None where they are not known.
        adapters: Method and options of the adapters in the backbone; their tensors are among the tuned ones.

    Raises:
        ValueError: A field has a wrong type or is out of range; the message begins with its name in the file.
    """

    backbone: str
    fingerprint: str
    prompt: dict[str, Any] | None
    num_classes: int
    classes: list[str] | None
    preprocessing: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    task_type: str = "classification"
    head: dict[str, Any] | None = None
    category_ids: list[int] | None = None
    tuned_backbone: bool = False
    adapters: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    licence: str = ""
    note: str = ""
    traits: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_fields("", self.to_json(), RULES)
        check_fields("preprocessing", self.preprocessing, PREPROCESSING_RULES, optional=DECODING)
        for split, values in self.metrics.items():
            check_values(f"metrics.{split}", values, or_none(number(-math.inf, math.inf)))
        check_values("versions", self.versions, TEXT)
        for name, values, rules in (("prompt", self.prompt, PROMPT_RULES), ("traits", self.traits, TRAIT_RULES)):
            if values is not None:
                check_fields(name, values, rules)
        if self.adapters is not None:
            check_fields("adapters", self.adapters, ADAPTERS_RULES)
            Adapters(**self.adapters)
            if not self.tuned_backbone:
                raise ValueError("adapters are named, but tuned_backbone is False, so there are none")
        registered()[self.task_type].check_layout(self.head)
        if self.category_ids is not None and self.head is None:
            raise ValueError(f"category_ids is {reprlib.repr(self.category_ids)} in a task of kind {self.task_type}")
        for name, listed in {"classes": self.classes, "category_ids": self.category_ids}.items():
            if listed is not None and len(listed) != self.num_classes:
                raise ValueError(f"{name} has {len(listed)} entries, but num_classes is {self.num_classes}")

    @property
    def class_names(self) -> list[str]:
        """Names of the classes; their numbers where they have none."""
        return self.classes or [str(label) for label in range(self.num_classes)]

    def to_json(self) -> dict[str, Any]:
        """The fields by their names in the file; values are not copied."""
        return {NAMES_IN_FILE.get(entry.name, entry.name): getattr(self, entry.name) for entry in fields(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TaskMetadata":
        """The metadata of a file of format version 1 or 2; a ValueError for any other, or what a rule refuses."""
        values = {"traits": None, **_newest(values)}  # versions before 0.2 did not write them
        version = values.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise ValueError(f"task format {reprlib.repr(version)}; this version of vpt reads {FORMAT_VERSION}")
        if set(values) != set(RULES):
            odd = ", ".join(sorted(set(values) ^ set(RULES)))
            raise ValueError(f"its metadata has missing or unknown fields ({odd[:MAX_TEXT]})")
        in_python = {name: attribute for attribute, name in NAMES_IN_FILE.items()}
        try:
            return cls(**{in_python.get(name, name): value for name, value in values.items()})
        except ValueError as error:
            raise ValueError(f"in its metadata, {error}") from error


NAMES_IN_FILE = {"task_type": "kind"}


def registered() -> Mapping[str, Any]:
    """The classes of models by type of task; imported late, since they use the rules of this module."""
    from vpt.models.task_model import registered_models

    return registered_models()


def _newest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of version 1, which had neither adapters nor tokens of another width, as those of version 2."""
    if values.get("format_version") != 1 or type(values["format_version"]) is not int or "adapters" in values:
        return dict(values)
    prompt = values.get("prompt")
    if isinstance(prompt, dict) and "width" not in prompt:
        prompt = {**prompt, "width": prompt.get("embed_dim")}
    return {**values, "format_version": FORMAT_VERSION, "prompt": prompt, "adapters": None}


def check_fields(prefix: str, values: object, rules: Mapping[str, Rule], optional: Collection[str] = ()) -> None:
    """Refuse an object of JSON whose fields are missing (unless optional), unknown or break their rule."""
    if not isinstance(values, dict) or not set(rules) - set(optional) <= set(values) <= set(rules):
        raise ValueError(f"{prefix} is {reprlib.repr(values)}; its fields must be {', '.join(rules)}")
    for name, (is_allowed, allowed) in rules.items():
        if name in values and not is_allowed(values[name]):
            raise ValueError(f"{prefix}{'.' * bool(prefix)}{name} is {reprlib.repr(values[name])}; allowed: {allowed}")


def check_values(prefix: str, values: object, rule: Rule) -> None:
    """Refuse an object of JSON with a value that breaks the rule of all."""
    is_allowed, allowed = rule
    if not isinstance(values, dict):
        raise ValueError(f"{prefix} is {reprlib.repr(values)}; allowed: an object")
    for name, value in values.items():
        if not is_allowed(value):
            raise ValueError(f"{prefix}.{name} is {reprlib.repr(value)}; allowed: {allowed}")


def integer(low: int, high: int) -> Rule:
    """An integer in [low, high]."""
    return lambda value: type(value) is int and low <= value <= high, f"an integer in [{low}, {high}]"


def number(low: float, high: float) -> Rule:
    """A finite number in [low, high]."""
    return (
        lambda value: type(value) in (int, float) and math.isfinite(value) and low <= value <= high,
        f"a finite number in [{low:g}, {high:g}]",
    )


def text_like(pattern: str, allowed: str) -> Rule:
    """A text that a regular expression matches."""
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value, re.DOTALL) is not None, allowed


def list_of(rule: Rule, least: int, most: int, *, ascends: bool = False) -> Rule:
    """A list of `least` to `most` values that another rule allows."""

    def is_allowed(value: Any) -> bool:
        fits = isinstance(value, list) and least <= len(value) <= most and all(map(rule[0], value))
        return fits and (not ascends or value == sorted(set(value)))

    count = str(most) if least == most else f"{least} to {most}"
    return is_allowed, f"a list of {count}, each {rule[1]}" + (", ascending" if ascends else "")


def or_none(rule: Rule) -> Rule:
    """Null, or what another rule allows."""
    return lambda value: value is None or rule[0](value), f"null, or {rule[1]}"


def one_of(names: Sequence[str]) -> Rule:
    """One of some names."""
    return lambda value: isinstance(value, str) and value in names, " or ".join(names)


def _is_shallow(value: object) -> bool:
    """Whether copying and printing it in depth can never run out of stack."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list))
        level = [part for parts in inner for part in parts]
    return not level


IS_OBJECT: Rule = (lambda value: isinstance(value, dict), "an object")
TEXT = text_like(f".{{0,{MAX_TEXT}}}", f"a text of at most {MAX_TEXT} characters")
BLOCKS = list_of(integer(0, MAX_BLOCKS), 1, MAX_BLOCKS, ascends=True)

RULES: dict[str, Rule] = {
    "backbone": text_like(r"\w[\w.-]{0,200}", "the name of a timm model"),
    "fingerprint": text_like("[0-9a-f]{64}", "64 hexadecimal digits"),
    "prompt": or_none(IS_OBJECT),
    "num_classes": integer(1, MAX_CLASSES),
    "classes": or_none(list_of(TEXT, 1, MAX_CLASSES)),
    "preprocessing": IS_OBJECT,
    "metrics": IS_OBJECT,
    "format_version": integer(FORMAT_VERSION, FORMAT_VERSION),
    "kind": (lambda value: isinstance(value, str) and value in registered(), "a registered type of task"),
    "head": or_none(IS_OBJECT),
    "category_ids": or_none(list_of(integer(0, 2**63 - 1), 1, MAX_CLASSES)),
    "adapters": or_none(IS_OBJECT),
    "tuned_backbone": (lambda value: type(value) is bool, "true or false"),
    "config": or_none(
        (lambda value: isinstance(value, dict) and _is_shallow(value), f"an object of at most {MAX_DEPTH} levels")
    ),
    "versions": IS_OBJECT,
    "licence": TEXT,
    "note": text_like(f".{{0,{MAX_NOTE}}}", f"a text of at most {MAX_NOTE} characters"),
    "traits": or_none(IS_OBJECT),
}
DECODING = {"background": "white", "range": None, "bands": None}  # fields of preprocessing that a file may lack
PREPROCESSING_RULES: dict[str, Rule] = {
    "size": list_of(integer(1, MAX_SIDE), 2, 2),
    "mean": list_of(number(-1e6, 1e6), 3, 3),
    "std": list_of(number(1e-6, 1e6), 3, 3),
    "interpolation": one_of(INTERPOLATIONS),
    "crop_pct": number(0.1, 1),
    "crop_mode": one_of(CROP_MODES),
    "background": text_like("#?[A-Za-z0-9]{1,40}", "the name of a colour, or #RRGGBB"),
    "range": or_none(list_of(number(-1e30, 1e30), 2, 2, ascends=True)),
    "bands": or_none(list_of(integer(1, 4), 3, 3)),
}
PROMPT_RULES: dict[str, Rule] = {
    "kind": one_of(get_args(PromptVariant)),
    "num_tokens": integer(1, MAX_TOKENS),
    "embed_dim": integer(1, MAX_WIDTH),
    "width": integer(1, 2 * MAX_WIDTH),
    "blocks": BLOCKS,
    "dropout": (lambda value: type(value) in (int, float) and 0 <= value < 1, "a number in [0, 1)"),
}
SUMS = or_none(list_of(number(-math.inf, math.inf), 9, 9))
TRAIT_RULES: dict[str, Rule] = {
    "size": list_of(integer(1, MAX_SIDE), 2, 2),
    "pooling": or_none(TEXT),
    "channels": integer(1, MAX_CHANNELS),
    "patch_size": list_of(integer(1, MAX_SIDE), 2, 2),
    "num_heads": or_none(integer(1, MAX_WIDTH)),
    "scale": or_none(number(0, 1e6)),
    "norm_eps": list_of(number(0, 1), 0, MAX_BLOCKS),
    "activation": or_none(list_of(number(-1e6, 1e6), 6, 6)),
    "tokens": SUMS,
    "position": SUMS,
}
ADAPTERS_RULES: dict[str, Rule] = {"method": one_of(METHODS), "options": IS_OBJECT}
