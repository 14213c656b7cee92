"""The typed schema of `conf/`, its ranges, and messages that name the nearest valid choice."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Any, TypeVar

from omegaconf import MISSING

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


def schema_keys(config: Any = Config, prefix: str = "") -> Iterator[str]:
    """All keys of a schema, `prompt` and `prompt.num_tokens` alike."""
    for entry in fields(config):
        yield f"{prefix}{entry.name}"
        if is_dataclass(entry.type):
            yield from schema_keys(entry.type, f"{prefix}{entry.name}.")
