"""Typed schema of the config: keys, types, ranges and defaults.

A default is stated here, and a file of `conf/` states what differs from it.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Any

from omegaconf import MISSING


def option(
    default: Any = dataclasses.MISSING,
    about: str = "",  # a line for `--help`
    *,
    low: float | None = None,  # the least number allowed, also for each number of a list
    high: float | None = None,
    above: float | None = None,  # a bound that a number must exceed
    choices: Sequence[str] = (),  # texts allowed, where the type does not name them
    shown: str = "",  # for the value in `--help`, such as "FOLDER"; by default the default, or a word for the type
    task: str = "",  # the only type of task that takes the key; empty for all
) -> Any:
    """A field of a config or of the options of a command; the value must be typed if there is no default."""
    metadata: dict[str, Any] = {"about": about, "low": low, "high": high, "above": above}
    metadata |= {"choices": tuple(choices), "shown": shown, "task": task}
    if isinstance(default, dict | list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class PromptName(StrEnum):
    """How prompt tokens enter."""

    none = "none"
    shallow = "shallow"
    deep = "deep"
    kv = "kv"


class PromptImplName(StrEnum):
    """Computation of prompts: as keys and values where that is exact (auto), or always as tokens (concat)."""

    auto = "auto"
    concat = "concat"


class PromptFormName(StrEnum):
    """What is learned: the tokens (plain), or what they are computed from."""

    plain = "plain"
    shared = "shared"
    bilinear = "bilinear"
    fourier = "fourier"


class PromptInitName(StrEnum):
    """Initialisation of prompt tokens: at random (the first two), or from patch tokens of train images."""

    uniform = "uniform"
    normal = "normal"
    patch = "patch"
    prototype = "prototype"
    vipamin = "vipamin"


class TuningName(StrEnum):
    """What trains beside the head."""

    prompt = "prompt"
    linear = "linear"
    bias = "bias"
    proj_bias = "proj_bias"
    norm = "norm"
    partial = "partial"
    full = "full"
    adapters = "adapters"


class BoxFormat(StrEnum):
    """Formats of files with boxes; auto detects which one the folder has."""

    auto = "auto"
    coco = "coco"
    yolo = "yolo"
    voc = "voc"


class FolderLayout(StrEnum):
    """What folders beside train/ are: ignored (splits), or classes as train/ is; auto refuses what may be both."""

    auto = "auto"
    splits = "splits"
    classes = "classes"


class OptimName(StrEnum):
    """Optimisers."""

    adamw = "adamw"
    sgd = "sgd"


class Mode(StrEnum):
    """Train; two steps of everything (dry); one batch until it is learned (overfit)."""

    train = "train"
    dry = "dry"
    overfit = "overfit"


class ClassWeights(StrEnum):
    """Weights of the classes in the loss; balanced is inverse class frequency."""

    none = "none"
    balanced = "balanced"


class Sampling(StrEnum):
    """How an epoch draws train images: each once (uniform), or as many of each class, with replacement (balanced)."""

    uniform = "uniform"
    balanced = "balanced"


class Precision(StrEnum):
    """Arithmetic of the model; auto is bf16 autocast on CUDA and fp32 elsewhere."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Dtype(StrEnum):
    """Number format of the weights of a backbone."""

    fp32 = "fp32"
    bf16 = "bf16"


class CacheName(StrEnum):
    """What is cached for later epochs."""

    auto = "auto"
    off = "off"
    ram = "ram"
    disk = "disk"


class OnError(StrEnum):
    """What to do about a train image that cannot be read."""

    stop = "stop"
    skip = "skip"


class HeadInitName(StrEnum):
    """Initialisation of a linear head: zeros, or Kaiming fan-out weights and biases of -log(99) (paper)."""

    zero = "zero"
    paper = "paper"


@dataclass
class BackboneConfig:
    """A timm ViT and the source of its weights."""

    name: str = MISSING
    pretrained: bool = True
    checkpoint: str | None = None  # file of weights
    img_size: int | None = option(None, low=1)  # pixels; null: the model's own
    dtype: Dtype = Dtype.fp32


@dataclass
class PromptConfig:
    """Prompt tokens and the blocks that they enter."""

    variant: PromptName = PromptName.deep
    title: str = "deep"  # in the name of a run
    num_tokens: int = option(20, low=1, high=10_000)  # per prompted block
    blocks: Any = "all"  # all, first:k, last:k, or a list of indices
    dropout: float = option(0.0, low=0, high=0.99)
    form: PromptFormName = PromptFormName.plain
    rank: int = option(8, low=1)  # bilinear: a block learns rank * (num_tokens + embed_dim) numbers
    whiten: bool = False  # bilinear: times a fixed matrix, in whose coordinates patches of train images are white
    fraction: float = option(0.3, above=0, high=1)  # fourier: of the tokens
    init: PromptInitName = PromptInitName.uniform
    init_from: str | None = None  # a task file whose prompt replaces `init`
    impl: PromptImplName = PromptImplName.auto


@dataclass
class HeadConfig:
    """The layers from features to outputs; without a name, linear for classes and dense for boxes."""

    name: str | None = None
    task: str | None = None  # the type of task that the head is for
    title: str = ""  # in the name of a run
    init: HeadInitName = HeadInitName.zero
    # blocks that the pyramid reads: the last of each quarter; last: only the last; or a list
    out_indices: Any = option("quarters", task="detection")
    # width of pyramid and head; dense: 1.2 M parameters, with 64 0.3 M
    channels: int = option(128, low=8, high=4096, task="detection")
    # pixels of a cell in each level; null: 8, 16, 32 or the nearest possible for the patch size
    strides: list[int] | None = option(None, task="detection")
    # in each of the two towers; null: 2, or 4 for retinanet, which takes at most 4
    num_convs: int | None = option(None, low=1, high=16, task="detection")


@dataclass
class TuningConfig:
    """What trains beside the head."""

    method: TuningName = TuningName.prompt
    with_prompt: bool = False  # also the prompt; for all methods but linear
    num_blocks: int = option(1, low=1)  # partial
    adapters: str = "sequential"
    options: Any = None  # of adapters; for those of PEFT its own keys: numbers, true, false, lists of module names
    lr: float = option(1e-4, above=0)  # of what trains in the backbone
    title: str = MISSING  # in the name of a run


@dataclass
class DatasetConfig:
    """The source of images and labels."""

    reader: str = MISSING
    task: str = MISSING  # the type of task
    title: str = MISSING  # in the name of a run
    required: list[str] = field(default_factory=list)  # keys that must be typed
    format: BoxFormat = option(BoxFormat.auto, task="detection")
    annotations: Any = option(None, task="detection")  # split -> COCO file: {train:a.json,val:b.json}
    strict: bool = option(False, task="detection")  # refuse data with errors instead of repairing and counting them
    root: str | None = None
    path: str | None = None
    name: str | None = None
    download: bool = False
    train: str = "train800.txt"
    val: str | None = "val200.txt"
    test: str | None = "test.txt"
    val_fraction: float = option(0.2, low=0.01, high=0.9)
    test_fraction: float | None = option(None, low=0, high=0.9)
    num_per_class: int | None = option(None, low=1, task="classification")
    layout: FolderLayout = option(FolderLayout.auto, task="classification")  # what folders in root are
    group: str | None = option(None, task="classification")  # images of a group stay in one split
    folds: int | None = option(None, low=2, task="classification")  # parts of train, of which one is held out
    fold: int = option(0, low=0, task="classification")  # the part that is held out, from 0
    split_seed: int = option(0, low=0)


@dataclass
class DataConfig:
    """How image files are read."""

    max_pixels: int = option(50_000_000, low=1, high=178_956_970)  # checked before decoding; Pillow's limit
    background: str = "white"  # behind transparent images; also "#RRGGBB"
    on_error: OnError = OnError.stop  # skip: train images are left out, counted and listed; val and test never
    max_skipped: float = option(0.01, low=0, high=1)  # of the train images; more stop the run
    timeout_s: float = option(120.0, above=0)  # for a batch of a loader process


@dataclass
class AugmentConfig:
    """albumentations transforms of the train images, by name, and how images are resized."""

    transforms: list[Any] = field(default_factory=list)
    crop_mode: str | None = option(None, task="classification")
    crop_pct: float | None = option(None, above=0, high=1, task="classification")
    min_visibility: float = option(0.2, low=0, high=0.99)  # part of a box that must be left of it


@dataclass
class OptimConfig:
    """The optimiser, its learning rates and their schedule."""

    name: OptimName = OptimName.adamw
    prompt_lr: float = option(1e-2, above=0)
    head_lr: float = option(1e-3, above=0)
    scale_lr: bool = False  # multiply all rates by effective batch size / 256
    weight_decay: float = option(1e-4, low=0)  # with 50 prompt tokens 1e-3 was better
    momentum: float = option(0.9, low=0, high=0.999)  # sgd
    warmup_epochs: float = option(1.0, low=0)


@dataclass
class TrainConfig:
    """The training loop."""

    epochs: int = option(20, low=1)
    batch_size: int = option(64, low=1)
    accumulation: int = option(1, low=1)  # batches per optimiser step
    clip_norm: float | None = option(1.0, above=0)  # null: no clipping
    label_smoothing: float = option(0.0, low=0, high=0.99, task="classification")
    class_weights: ClassWeights = option(ClassWeights.none, task="classification")
    sampling: Sampling = option(Sampling.uniform, task="classification")
    patience: int | None = option(None, low=1)  # epochs without a better val top1 (map) before stopping
    ema: float | None = option(None, above=0, high=0.99999)  # decay of a moving average of the tuned parameters
    precision: Precision = Precision.auto
    skip_nonfinite: int = option(0, low=0)  # steps skipped for a loss or gradient that is not finite; one more stops
    log_every: int = option(10, low=1)  # optimiser steps


@dataclass
class RunConfig:
    """The run folder."""

    root: str = "runs"
    name: str | None = None  # of the folder; null: the title and a digest of the config
    title: str = "${dataset.title}_${tuning.title}${head.title}"
    save_minutes: float = option(5.0, above=0)  # between two checkpoints inside an epoch; one follows each epoch


@dataclass
class Config:
    """All keys of `python -m vpt.train`."""

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
    fresh: bool = False  # move an earlier run of this folder aside and start anew; without it the run resumes
    auto_batch: bool = False  # out of memory: compute each batch in parts, with the same result
    seed: int = option(0, low=0, high=2**32 - 1)
    deterministic: bool = False
    device: str = "auto"
    num_workers: int | None = option(None, low=0)  # null: the spare cores, at most 4
    compile: bool = False  # torch.compile: a minute at the start, faster steps after it
    grad_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more time
    # ram, disk: tokens behind the frozen blocks, computed once; auto: in ram, or else decoded images, if they fit;
    # "off" (in a file with quotes): neither
    cache: CacheName = CacheName.auto
    cache_gb: float = option(4.0, above=0)  # of a cache, and of all files in cache_dir; auto: or half the free memory
    cache_dir: str | None = None  # of cache=disk; null: run.root/cache

    @property
    def task(self) -> str:
        """The type of task."""
        return self.dataset.task


def schema_keys(config: Any = Config, prefix: str = "") -> Iterator[str]:
    """All keys of a schema, `prompt` and `prompt.num_tokens` alike."""
    for entry in fields(config):
        yield f"{prefix}{entry.name}"
        if is_dataclass(entry.type):
            yield from schema_keys(entry.type, f"{prefix}{entry.name}.")
