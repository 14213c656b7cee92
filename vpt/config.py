"""The typed schema of `conf/`, its ranges, and messages that name the nearest valid choice."""

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

PACKAGE = Path(__file__).resolve().parent
ConfigT = TypeVar("ConfigT")


class PromptName(StrEnum):
    """Kinds of prompt, and none."""

    none = "none"
    shallow = "shallow"
    deep = "deep"
    kv = "kv"


class PromptImplName(StrEnum):
    """How prompts are computed: as keys and values where that is exact, or always as tokens."""

    auto = "auto"
    concat = "concat"


class PromptFormName(StrEnum):
    """What is learned of a prompt: its tokens, or what they are computed of."""

    plain = "plain"
    shared = "shared"
    bilinear = "bilinear"
    fourier = "fourier"


class PromptInitName(StrEnum):
    """Where prompt tokens start: at random, or at patch tokens of train pictures in one of three ways."""

    uniform = "uniform"
    normal = "normal"
    patch = "patch"
    prototype = "prototype"
    vipamin = "vipamin"


class TuningName(StrEnum):
    """What trains of the backbone and its prompt, beside the head."""

    prompt = "prompt"
    linear = "linear"
    bias = "bias"
    proj_bias = "proj_bias"
    norm = "norm"
    partial = "partial"
    full = "full"
    adapters = "adapters"


class TaskName(StrEnum):
    """Kinds of task."""

    classification = "classification"
    detection = "detection"


class HeadName(StrEnum):
    """Heads; the first is for classification, the others are for detection."""

    linear = "linear"
    dense = "dense"
    retinanet = "retinanet"
    fasterrcnn = "fasterrcnn"


class DatasetKind(StrEnum):
    """Readers of data; the last two read boxes."""

    fruit = "fruit"
    folder = "folder"
    list = "list"
    csv = "csv"
    torchvision = "torchvision"
    boxes = "boxes"
    trees = "trees"


class BoxForm(StrEnum):
    """Forms of files with boxes; auto looks which of them is there."""

    auto = "auto"
    coco = "coco"
    yolo = "yolo"
    voc = "voc"


TASK_OF = {DatasetKind.boxes: TaskName.detection, DatasetKind.trees: TaskName.detection}  # all others: classification
ONLY_CLASSES = [
    *(("dataset", "num_per_class"), ("train", "class_weights"), ("train", "label_smoothing")),
    *(("augment", "crop_mode"), ("augment", "crop_pct")),
]
ONLY_BOXES = [
    *(("head", "taps"), ("head", "channels"), ("head", "strides"), ("head", "num_convs")),
    *(("dataset", "annotations"), ("dataset", "strict"), ("dataset", "form")),
]
RUN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
NEEDED_KEYS = {
    DatasetKind.boxes: ("root", "PATH"),
    DatasetKind.folder: ("root", "PATH"),
    DatasetKind.list: ("root", "PATH"),
    DatasetKind.csv: ("path", "FILE"),
    DatasetKind.torchvision: ("name", "CIFAR10, or another data set of torchvision"),
}


class OptimName(StrEnum):
    """Optimisers."""

    adamw = "adamw"
    sgd = "sgd"


class Mode(StrEnum):
    """train; two steps of everything (dry); one batch until it is learned (overfit)."""

    train = "train"
    dry = "dry"
    overfit = "overfit"


class ClassWeights(StrEnum):
    """Weights of the classes in the loss."""

    none = "none"
    balanced = "balanced"


class Precision(StrEnum):
    """Arithmetic of the model: auto is bf16 autocast on CUDA and fp32 elsewhere."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Dtype(StrEnum):
    """How the weights of a backbone are held."""

    fp32 = "fp32"
    bf16 = "bf16"


class CacheName(StrEnum):
    """What is kept for later epochs: what fits; nothing; tokens behind the frozen blocks, in memory or on disk."""

    auto = "auto"
    off = "off"
    ram = "ram"
    disk = "disk"


class OnError(StrEnum):
    """What becomes of a train picture that cannot be read."""

    stop = "stop"
    skip = "skip"


class HeadInitName(StrEnum):
    """How the head starts."""

    zero = "zero"
    paper = "paper"


def number(default: Any, low: float | None = None, high: float | None = None, above: float | None = None) -> Any:
    """A field with a range: low <= value <= high, or value > above."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


@dataclass
class BackboneConfig:
    """Which ViT, and where its weights come from."""

    name: str = MISSING
    pretrained: bool = True
    checkpoint: str | None = None
    img_size: int | None = number(None, low=1)
    dtype: Dtype = Dtype.fp32


@dataclass
class PromptConfig:
    """The prompt tokens and the blocks that they enter; `rank`, `whiten` are of form bilinear, `fraction` of fourier.

    `title` is its name in that of a run. Tokens start as those of the task file `init_from`, or else as `init` says.
    """

    kind: PromptName = PromptName.deep
    title: str = "deep"
    num_tokens: int = number(20, low=1, high=10_000)
    blocks: Any = "all"
    dropout: float = number(0.0, low=0, high=0.99)
    form: PromptFormName = PromptFormName.plain
    rank: int = number(8, low=1)
    whiten: bool = False
    fraction: float = number(0.3, above=0, high=1)
    init: PromptInitName = PromptInitName.uniform
    init_from: str | None = None
    impl: PromptImplName = PromptImplName.auto


@dataclass
class HeadConfig:
    """From features to logits (linear: `init`), or from feature maps to boxes (the others: all other keys).

    Without a name it is linear for classes and dense for boxes.
    """

    name: HeadName | None = None
    title: str = ""
    init: HeadInitName = HeadInitName.zero
    taps: Any = "quarters"
    channels: int = number(128, low=8, high=4096)
    strides: list[int] | None = None
    num_convs: int | None = number(None, low=1, high=16)


@dataclass
class TuningConfig:
    """What trains, beside the head and, where `with_prompt` says so, the prompt; `title` is its name in that of a run.

    `adapters` is the method of adapters, and `options` are what the method takes.
    """

    kind: TuningName = TuningName.prompt
    with_prompt: bool = False
    num_blocks: int = number(1, low=1)
    adapters: str = "sequential"
    options: Any = None
    lr: float = number(1e-4, above=0)
    title: str = MISSING


@dataclass
class DatasetConfig:
    """Where pictures and labels come from."""

    kind: DatasetKind = MISSING
    title: str = MISSING
    form: BoxForm = BoxForm.auto
    annotations: Any = None  # split -> file
    strict: bool = False
    root: str | None = None
    path: str | None = None
    name: str | None = None
    download: bool = False
    train: str = "train800.txt"
    val: str | None = "val200.txt"
    test: str | None = "test.txt"
    val_fraction: float = number(0.2, low=0.01, high=0.9)
    test_fraction: float | None = number(None, low=0, high=0.9)
    num_per_class: int | None = number(None, low=1)
    split_seed: int = number(0, low=0)


@dataclass
class DataConfig:
    """How picture files are read: which are refused, and what becomes of train when some cannot be read."""

    max_pixels: int = number(50_000_000, low=1, high=178_956_970)  # as much as Pillow decodes
    background: str = "white"
    on_error: OnError = OnError.stop
    max_skipped: float = number(0.01, low=0, high=1)
    timeout_s: float = number(120.0, above=0)


@dataclass
class AugmentConfig:
    """albumentations transforms of the train pictures, by name, and how pictures are brought to size."""

    transforms: list[Any] = field(default_factory=list)
    crop_mode: str | None = None
    crop_pct: float | None = number(None, above=0, high=1)
    min_visibility: float = number(0.2, low=0, high=0.99)


@dataclass
class OptimConfig:
    """The optimiser, its learning rates and their schedule."""

    name: OptimName = OptimName.adamw
    prompt_lr: float = number(1e-2, above=0)
    head_lr: float = number(1e-3, above=0)
    scale_lr: bool = False
    weight_decay: float = number(1e-4, low=0)
    momentum: float = number(0.9, low=0, high=0.999)
    warmup_epochs: float = number(1.0, low=0)


@dataclass
class TrainConfig:
    """The loop."""

    epochs: int = number(20, low=1)
    batch_size: int = number(64, low=1)
    accumulation: int = number(1, low=1)
    clip_norm: float | None = number(1.0, above=0)
    label_smoothing: float = number(0.0, low=0, high=0.99)
    class_weights: ClassWeights = ClassWeights.none
    patience: int | None = number(None, low=1)
    ema: float | None = number(None, above=0, high=0.99999)
    precision: Precision = Precision.auto
    skip_nonfinite: int = number(0, low=0)
    log_every: int = number(10, low=1)


@dataclass
class RunConfig:
    """The run folder: its name, or else a title that a digest of the config is added to."""

    root: str = "runs"
    name: str | None = None
    title: str = MISSING
    save_minutes: float = number(5.0, above=0)


@dataclass
class Config:
    """Everything that `python -m vpt.train` can be told."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    mode: Mode = Mode.train
    fresh: bool = False
    auto_batch: bool = False
    seed: int = number(0, low=0, high=2**32 - 1)
    deterministic: bool = False
    device: str = "auto"
    num_workers: int | None = number(None, low=0)
    compile: bool = False
    grad_checkpointing: bool = False
    cache: CacheName = CacheName.auto
    cache_gb: float = number(4.0, above=0)
    cache_dir: str | None = None

    @property
    def task(self) -> TaskName:
        """The kind of task, as the data have it."""
        return TASK_OF.get(self.dataset.kind, TaskName.classification)


class ConfigError(ValueError):
    """Something that the user typed cannot be used; the message is one line that says what to type."""


def config_folder() -> Path:
    """The absolute path of `conf/`: inside an installed package, or beside it in a checkout."""
    for folder in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"conf/train.yaml is neither in {PACKAGE} nor beside it; install vpt again")


def register_schema() -> None:
    """Make the schema known to Hydra as `schema`, the first entry of the defaults list of `conf/train.yaml`."""
    ConfigStore.instance().store(name="schema", node=Config)


def compose_config(overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """Compose `conf/train.yaml` with overrides, outside of a Hydra application.

    Args:
        overrides: As typed on the command line: `prompt=shallow`, `+experiment=quickstart`, `train.epochs=3`.
        config_dir: A further folder of configs, searched after `conf/`.

    Raises:
        ConfigError: An override cannot be used.
    """
    register_schema()
    search = [f"hydra.searchpath=[file://{config_dir.resolve()}]"] if config_dir else []
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            return compose("train", [*overrides, *search])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def to_config(composed: DictConfig) -> Config:
    """The composed tree as typed objects, with every number in its range.

    Raises:
        ConfigError: A value is missing or out of range.
    """
    try:
        config = cast(Config, OmegaConf.to_object(composed))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    check_ranges(config)
    _check_dataset(config.dataset)
    _check_task(config)
    _check_start(config.prompt)
    if config.tuning.options and config.tuning.kind is not TuningName.adapters:
        raise ConfigError(
            f"tuning.options={config.tuning.options} are of adapters: type tuning=lora, or leave them out"
        )
    for key, name in {"name": config.run.name, "title": config.run.title}.items():
        if name is not None and not RUN_NAME.fullmatch(name):
            shown = name if name.isprintable() else repr(name)
            raise ConfigError(
                f"run.{key}={shown}: must be the name of a folder, of 1 to 64 of A-Z a-z 0-9 . _ - and no dot in "
                "front; run.root says where it lies"
            )
    return config


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise a ConfigError for the first number that is out of its range."""
    for entry in fields(config):
        key, value = f"{prefix}{entry.name}", getattr(config, entry.name)
        if is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif entry.metadata and value is not None:
            low, high, above = (entry.metadata[bound] for bound in ("low", "high", "above"))
            within = math.isfinite(value) and (
                (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
            )
            if not within:
                raise ConfigError(f"{key}={value} is out of range: it must be {_describe_range(low, high, above)}")


def _check_dataset(dataset: DatasetConfig) -> None:
    key, example = NEEDED_KEYS.get(dataset.kind, (None, ""))
    if key is not None and getattr(dataset, key) is None:
        raise ConfigError(f"dataset.{key} is needed by dataset={dataset.kind.value}: type dataset.{key}={example}")


def _check_task(config: Config) -> None:
    """Head and data must be of one kind of task, and what is for one kind only must not be said of the other."""
    finds_boxes = config.head.name not in (None, HeadName.linear)
    data, has_boxes = f"dataset={config.dataset.kind.value}", config.task is TaskName.detection
    if has_boxes and config.head.name is HeadName.linear:
        raise ConfigError(f"head=linear finds classes, and {data} has boxes: type head=dense, or leave head out")
    if finds_boxes and not has_boxes:
        raise ConfigError(
            f"head={config.head.name} finds boxes, and {data} has none: type dataset=boxes, or head=linear"
        )
    defaults = Config(dataset=DatasetConfig(kind=config.dataset.kind))
    for section, key in ONLY_CLASSES if has_boxes else ONLY_BOXES:
        value = getattr(getattr(config, section), key)
        if value != getattr(getattr(defaults, section), key):
            other = "classification" if has_boxes else "detection"
            raise ConfigError(f"{section}.{key}={value} is for {other}, and {data} is not: leave it out")


def _check_start(prompt: PromptConfig) -> None:
    """Refuse a start for no prompt, and a whitening that nothing would use."""
    if prompt.whiten and prompt.form is not PromptFormName.bilinear:
        raise ConfigError(f"prompt.whiten=true is for prompt=bilinear, and prompt.form={prompt.form}: leave it out")
    if prompt.init_from is not None and prompt.kind is PromptName.none:
        raise ConfigError(f"prompt.init_from={prompt.init_from}: there is no prompt to start; leave it out")


def explain(error: Exception) -> str:
    """One line for an error of Hydra or OmegaConf, with the nearest valid choice where there is one."""
    while isinstance(error, ConfigCompositionException) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    message = str(error)
    unknown_key = re.search(r"Key '([^']*)' (?:not in|is not in struct)", message)
    full_key = re.search(r"full_key: (\S+)", message)
    if unknown_key:
        key = full_key[1] if full_key else unknown_key[1]
        if key.startswith("tuning.options."):
            return f"{key} is none of the options that are there; to add it, type +{key}=..."
        return f"unknown key {key}{did_you_mean(key, list(schema_keys()))}"
    missing = re.search(
        r"Missing mandatory value: (\S+)|Structured config of type .* has missing mandatory value: (\S+)", message
    )
    if missing:
        key = full_key[1] if full_key else missing[1] or missing[2]
        return f"{key} is needed: type {key}=..."
    option = re.search(r"Could not find '([^/']+)/([^']+)'", message)
    if option:
        return no_such_choice(option[1], option[2], group_choices(option[1]))
    line = first_line(error)
    if line.endswith(":"):  # a heading, and what it is about stands below it
        line = " ".join(part.strip() for part in message.splitlines()[:2])
    return f"{full_key[1]}: {line}" if full_key and full_key[1] not in line else line


def group_choices(group: str, config_dir: Path | None = None) -> list[str]:
    """Names of the files of a group of `conf/`."""
    folders = [config_folder(), *([config_dir] if config_dir else [])]
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def no_such_choice(group: str, name: str, choices: Sequence[str]) -> str:
    """One line for a file that a group does not have."""
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"{group}={name}: no such choice{hint} Choices: {', '.join(choices)}"


def schema_keys(config: Any = Config, prefix: str = "") -> Iterator[str]:
    """All keys of a schema, `prompt` and `prompt.num_tokens` alike."""
    for entry in fields(config):
        yield f"{prefix}{entry.name}"
        if is_dataclass(entry.type):
            yield from schema_keys(entry.type, f"{prefix}{entry.name}.")


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """The nearest of the choices, or the choices, as the end of a message."""
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if not near:  # the last part alone: prompt.lenght is nearer to prompt.length than any whole key
        by_last = {choice.rpartition(".")[2]: choice for choice in choices}
        near = [by_last[name] for name in difflib.get_close_matches(word.rpartition(".")[2], list(by_last), n=1)]
    return f"; did you mean {near[0]}?" if near else f"; valid: {', '.join(choices[:20])}"


def _describe_range(low: float | None, high: float | None, above: float | None) -> str:
    bounds = [f"at least {low}" if low is not None else "", f"above {above}" if above is not None else ""]
    bounds.append(f"at most {high}" if high is not None else "")
    return " and ".join(bound for bound in bounds if bound)


def first_line(error: Exception) -> str:
    """The first line of a message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
