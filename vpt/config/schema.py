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
    task: str | Sequence[str] = (),  # the only types of task that take the key; empty for all
    needs: str = "",  # what reads the key: `key=value,value`, or `key!=value,value`; "prompt": a prompt that trains
) -> Any:
    """A field of a config or of the options of a command; the value must be typed if there is no default."""
    metadata: dict[str, Any] = {"about": about, "low": low, "high": high, "above": above}
    metadata |= {"choices": tuple(choices), "shown": shown, "needs": needs}
    metadata["task"] = (task,) if isinstance(task, str) else tuple(task)
    if isinstance(default, dict | list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


FEATURE_MAPS = ("detection", "segmentation")  # types of task


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


class ExifBoxes(StrEnum):
    """How boxes were drawn on images that EXIF turns or mirrors, where nothing shows it; auto: upright, reported."""

    auto = "auto"
    upright = "upright"
    stored = "stored"


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

    name: str = option(MISSING, "timm name of the backbone")
    pretrained: bool = option(True, "load the weights that timm has under this name; false: random weights")
    checkpoint: str | None = option(None, "a file of weights, in the place of those of timm", shown="FILE")
    img_size: int | None = option(None, "input size in pixels; null: that of the model", low=1)
    dtype: Dtype = option(Dtype.fp32, "number format of the frozen weights")


@dataclass
class PromptConfig:
    """Prompt tokens and the blocks that they enter."""

    variant: PromptName = option(
        PromptName.deep, "tokens at block 0 (shallow) or at each block (deep), keys and values, or none"
    )
    title: str = option("deep", "what the method is called in the name of a run")
    num_tokens: int = option(20, "prompt tokens in each prompted block", low=1, high=10_000)
    blocks: Any = option("all", "the prompted blocks: all, first:k, last:k, or a list of indices")
    dropout: float = option(0.0, "dropout of prompt tokens", low=0, high=0.99)
    form: PromptFormName = option(PromptFormName.plain, "what is learned: the tokens, or what they are computed from")
    rank: int = option(8, "a block learns rank * (num_tokens + embed_dim) numbers", low=1, needs="prompt.form=bilinear")
    whiten: bool = option(False, "learn in coordinates in which train patches are white", needs="prompt.form=bilinear")
    fraction: float = option(0.3, "of the tokens, in the spectrum", above=0, high=1, needs="prompt.form=fourier")
    init: PromptInitName = option(
        PromptInitName.uniform, "start, at random or from train images", needs="prompt.init_from=null"
    )
    init_from: str | None = option(None, "a task file whose prompt is the start", shown="FILE")
    impl: PromptImplName = option(PromptImplName.auto, "as keys and values where that is exact (auto), or as tokens")


@dataclass
class HeadConfig:
    """The layers from features to outputs."""

    name: str | None = option(
        None, "linear, pyramid, dense, retinanet, fasterrcnn; null: linear, or dense for boxes", shown="NAME"
    )
    task: str | None = option(None, "the type of task that the head is for")
    title: str = option("", "what the head is called in the name of a run")
    init: HeadInitName = option(HeadInitName.zero, "zeros, or as in the paper", needs="dataset.task=classification")
    out_indices: Any = option(
        "quarters", "blocks whose maps are read: quarters, last, or a list of indices", task=FEATURE_MAPS
    )
    channels: int = option(128, "width of pyramid and head", low=8, high=4096, task=FEATURE_MAPS)
    strides: list[int] | None = option(None, "pixels of a cell by level; null: near 8, 16, 32", task=FEATURE_MAPS)
    num_convs: int | None = option(None, "layers of a tower; null: 2, retinanet 4", low=1, high=16, task="detection")


@dataclass
class TuningConfig:
    """What trains beside the head."""

    method: TuningName = option(TuningName.prompt, "what trains beside the head")
    with_prompt: bool = option(False, "train the prompt as well; not with linear", needs="tuning.method!=prompt")
    num_blocks: int = option(1, "number of last blocks that train", low=1, needs="tuning.method=partial")
    adapters: str = option("sequential", "or parallel, or a method of peft", needs="tuning.method=adapters")
    options: Any = option(None, "of the adapters; of peft its own keys", needs="tuning.method=adapters")
    lr: float = option(1e-4, "learning rate in the backbone", above=0, needs="tuning.method!=prompt,linear")
    title: str = option(MISSING, "what the method is called in the name of a run")


@dataclass
class DatasetConfig:
    """The source of images and labels."""

    reader: str = option(MISSING, "how the data set is read")
    task: str = option(MISSING, "the type of task")
    title: str = option(MISSING, "what the data set is called in the name of a run")
    required: list[str] = option([], "keys of this section that must be typed")
    format: BoxFormat = option(BoxFormat.auto, "auto detects it", task="detection", needs="dataset.reader=boxes")
    annotations: Any = option(
        None, "COCO files: {train:a.json,val:b.json}", task="detection", needs="dataset.reader=boxes"
    )
    strict: bool = option(False, "refuse wrong boxes or masks, which else are repaired or left out", task=FEATURE_MAPS)
    exif_boxes: ExifBoxes = option(
        ExifBoxes.auto,
        "how boxes were drawn on images that EXIF turns, where nothing shows it; auto: upright, reported",
        task="detection",
    )
    classes: Any = option(
        None,
        'classes of masks: names of the values 0, 1, ..., or {NAME: VALUE} or {NAME: "#RRGGBB"}',
        task="segmentation",
        needs="dataset.reader=masks",
    )
    ignore: int | None = option(
        255,
        "value of masks that belongs to no class; null: none",
        low=0,
        task="segmentation",
        needs="dataset.reader=masks",
    )
    reduce_zero_label: bool = option(
        False, "value 0 is ignored and 1 is the first class", task="segmentation", needs="dataset.reader=masks"
    )
    instances: bool = option(
        False, "values number objects: all above 0 are one class", task="segmentation", needs="dataset.reader=masks"
    )
    root: str | None = option(None, "its folder or archive", shown="PATH", needs="dataset.reader!=fruit,trees,pebbles")
    path: str | None = option(None, "the CSV file", shown="FILE", needs="dataset.reader=csv")
    name: str | None = option(None, "class in torchvision", shown="NAME", needs="dataset.reader=torchvision")
    download: bool = option(False, "download the data set if it is absent", needs="dataset.reader=torchvision")
    train: str = option("train800.txt", "list of train images", needs="dataset.reader=list")
    val: str | None = option("val200.txt", "list of val images; null: none", needs="dataset.reader=list")
    test: str | None = option("test.txt", "list of test images; null: none", needs="dataset.reader=list")
    val_fraction: float = option(0.2, "part of train that becomes val where there is none", low=0.01, high=0.9)
    test_fraction: float | None = option(
        None, "part that becomes test; null: 0.2, but 0 where the data name a split", low=0, high=0.9
    )
    num_per_class: int | None = option(None, "train images of each class; null: all", low=1, task="classification")
    layout: FolderLayout = option(
        FolderLayout.auto, "what the folders in root are, where they may be both", task="classification"
    )
    group: str | None = option(None, "images of a group stay in one split: regular expression, or column of a CSV")
    folds: int | None = option(None, "parts of train, of which one is held out", low=2)
    fold: int = option(0, "the part that is held out, from 0", low=0, needs="dataset.folds!=null")
    split_seed: int = option(0, "seed of splits and of num_per_class", low=0)


@dataclass
class DataConfig:
    """How image files are read."""

    max_pixels: int = option(50_000_000, "largest image, before decoding", low=1, high=178_956_970)  # Pillow's limit
    background: str = option("white", 'colour behind transparent images, by name or as "#RRGGBB"')
    range: str = option("auto", "values above 8 bits that become 0 and 255: auto (of train), full, or LOW:HIGH")
    bands: list[int] | None = option(None, "bands read as red, green and blue, from 1; null: the colours of the file")
    on_error: OnError = option(OnError.stop, "skip: train images that cannot be read are left out, counted and listed")
    max_skipped: float = option(0.01, "part of train that may be skipped", low=0, high=1, needs="data.on_error=skip")
    timeout_s: float = option(120.0, "seconds for a batch of a loader process", above=0, needs="num_workers!=0")


@dataclass
class AugmentConfig:
    """Transforms of the train images, and how images are resized."""

    transforms: list[Any] = option([], "transforms of albumentations for train images: a list of {name: NAME, ...}")
    crop_mode: str | None = option(None, "center or squash; null: that of the backbone", task="classification")
    crop_pct: float | None = option(
        None, "part of the image seen; null: as above", above=0, high=1, task="classification"
    )
    min_visibility: float = option(
        0.2, "part of a box that must be left", low=0, high=0.99, needs="dataset.task=detection"
    )


@dataclass
class OptimConfig:
    """The optimiser, its learning rates and their schedule."""

    name: OptimName = option(OptimName.adamw, "the optimiser")
    prompt_lr: float = option(1e-2, "learning rate of the prompt", above=0, needs="prompt")
    head_lr: float = option(1e-3, "learning rate of the head", above=0)
    scale_lr: bool = option(False, "multiply all rates by effective batch size / 256")
    weight_decay: float = option(1e-4, "weight decay; with 50 prompt tokens 1e-3 was better", low=0)
    momentum: float = option(0.9, "momentum", low=0, high=0.999, needs="optim.name=sgd")
    warmup_epochs: float = option(1.0, "epochs in which the rates rise from zero", low=0)


@dataclass
class TrainConfig:
    """The training loop."""

    epochs: int = option(20, "passes over the train images", low=1)
    batch_size: int = option(64, "images per batch", low=1)
    accumulation: int = option(1, "batches per optimiser step", low=1)
    clip_norm: float | None = option(1.0, "largest norm of the gradient; null: no clipping", above=0)
    label_smoothing: float = option(0.0, "label smoothing", low=0, high=0.99, task="classification")
    class_weights: ClassWeights = option(
        ClassWeights.none, "or balanced: rare ones weigh more", task=("classification", "segmentation")
    )
    dice: float = option(0.0, "weight of the soft Dice loss beside cross-entropy", low=0, task="segmentation")
    sampling: Sampling = option(Sampling.uniform, "balanced: each class as often as any other", task="classification")
    select: str | None = option(None, "val metric that chooses the best epoch, such as loss; null: top1, map or miou")
    patience: int | None = option(None, "stop after so many epochs without a better val metric; null: never", low=1)
    ema: float | None = option(None, "decay of an average of what trains; null: none", above=0, high=0.99999)
    precision: Precision = option(
        Precision.auto, "arithmetic of the model; auto: bf16 autocast on CUDA, fp32 elsewhere"
    )
    skip_nonfinite: int = option(0, "steps skipped for a loss or gradient that is not finite; one more stops", low=0)
    log_every: int = option(10, "optimiser steps between two log lines", low=1)


@dataclass
class RunConfig:
    """The run folder."""

    root: str = option("runs", "the folder of all runs", shown="FOLDER")
    name: str | None = option(None, "name of the run folder; null: the title and a digest")
    title: str = option(
        "${dataset.title}_${tuning.title}${head.title}", "readable part of the name of the folder", shown="TEXT"
    )
    save_minutes: float = option(5.0, "minutes between checkpoints inside an epoch; one follows each epoch", above=0)


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
    mode: Mode = option(Mode.train, "train; two steps of everything (dry); one batch until it is learned (overfit)")
    fresh: bool = option(False, "rename an earlier run of this folder and start anew; without it the run resumes")
    extend: bool = option(False, "train a finished run on, to train.epochs in all, with a new schedule")
    auto_batch: bool = option(False, "out of memory: compute each batch in parts, with the same result")
    seed: int = option(0, "seed of the start, the order of images and their augmentation", low=0, high=2**32 - 1)
    deterministic: bool = option(False, "refuse operations whose result may vary from run to run")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    num_workers: int | None = option(None, "loader processes; null: the spare cores, at most 4", low=0)
    compile: bool = option(False, "torch.compile: a minute at the start, faster steps after it")
    grad_checkpointing: bool = option(False, "recompute blocks in the backward pass: less memory, a third more time")
    cache: CacheName = option(
        CacheName.auto, "tokens behind the frozen blocks, or decoded images, computed once; auto: in ram"
    )
    cache_gb: float = option(4.0, "of a cache, and of all files in cache_dir", above=0, needs="cache!=off")
    cache_dir: str | None = option(None, "of cache=disk and archives; null: run.root/cache", shown="FOLDER")

    @property
    def task(self) -> str:
        """The type of task."""
        return self.dataset.task

    @property
    def is_prompted(self) -> bool:
        """Whether the model has a prompt, which then trains."""
        with_prompt = self.tuning.method is TuningName.prompt or self.tuning.with_prompt
        return with_prompt and self.prompt.variant is not PromptName.none

    @property
    def tuned_rates(self) -> tuple[str, ...]:
        """Keys of the learning rates of the trained parts; that of the head where nothing else trains."""
        in_backbone = self.tuning.method not in (TuningName.prompt, TuningName.linear)
        rates = ("optim.prompt_lr",) * self.is_prompted + ("tuning.lr",) * in_backbone
        return rates or ("optim.head_lr",)


def schema_options(config: Any = Config, prefix: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]"]]:
    """Key and field of all sections and options, `prompt` and `prompt.num_tokens` alike."""
    for entry in fields(config):
        yield f"{prefix}{entry.name}", entry
        if is_dataclass(entry.type):
            yield from schema_options(entry.type, f"{prefix}{entry.name}.")


def schema_keys() -> list[str]:
    """All keys of the config."""
    return [key for key, _ in schema_options()]
