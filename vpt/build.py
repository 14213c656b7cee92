"""From a config to objects: the only file that knows both."""

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vpt.config import (
    ClassWeights,
    Config,
    ConfigError,
    DatasetConfig,
    DatasetKind,
    Dtype,
    Mode,
    Precision,
    PromptName,
    first_line,
    load_config,
)
from vpt.data.classification import (
    ClassificationDataset,
    Samples,
    check_readable,
    fruit_root,
    read_folder,
    take_per_class,
)
from vpt.data.loaders import build_loader
from vpt.data.tables import read_csv, read_list
from vpt.data.torchvision import read_torchvision
from vpt.data.transforms import EvalTransform, Preprocessing, TrainTransform
from vpt.engine.losses import CrossEntropy
from vpt.engine.optim import MovingAverage, make_optimizer, warmup_cosine
from vpt.engine.trainer import FitSettings, Loader
from vpt.engine.watch import RowWatch
from vpt.models.classification import ClassificationModel, create_model
from vpt.models.task_file import TaskMetadata, load_task, read_task
from vpt.models.tuning import tuned_parameters
from vpt.models.vit import load_vit

DRY_BATCHES = 2
DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}


@dataclass(frozen=True)
class Data:
    """The data of a run: samples, data sets and loaders by split, and how pictures are prepared."""

    samples: dict[str, Samples]
    datasets: dict[str, ClassificationDataset]
    loaders: dict[str, Loader]
    preprocessing: Preprocessing
    is_augmented: bool  # at random, so that a train picture may look different in each epoch

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, as train has them."""
        return next(iter(self.samples.values())).classes


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, NumPy and torch; with `deterministic`, refuse operations whose result may vary from run to run."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # libraries that still use the global generator
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is CUDA where there is one, then Apple's GPU, then the CPU.

    Raises:
        ConfigError: torch does not know it, or it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name}: {str(error).splitlines()[0]}; use device=auto or device=cpu") from error


def build_samples(config: DatasetConfig) -> dict[str, Samples]:
    """Read which pictures there are, by split."""
    root = Path(config.root or ".").expanduser()
    split: dict[str, Any] = {"val_fraction": config.val_fraction, "seed": config.split_seed}
    match config.kind:
        case DatasetKind.fruit:
            samples = read_folder(fruit_root(), **split)
        case DatasetKind.folder:
            samples = read_folder(root, test_fraction=config.test_fraction or 0.0, **split)
        case DatasetKind.list:
            lists: dict[str, Any] = {"train": config.train, "val": config.val, "test": config.test}
            samples = read_list(root, **lists, test_fraction=config.test_fraction or 0.0, **split)
        case DatasetKind.csv:
            path = Path(str(config.path)).expanduser()
            pictures_root = None if config.root is None else root
            samples = read_csv(path, pictures_root, test_fraction=config.test_fraction or 0.0, **split)
        case DatasetKind.torchvision:
            if config.test_fraction is not None:
                split["test_fraction"] = config.test_fraction
            samples = read_torchvision(str(config.name), root, download=config.download, **split)
    for members in samples.values():
        check_readable(members)
    if config.num_per_class is not None:
        samples["train"] = take_per_class(samples["train"], config.num_per_class, config.split_seed)
    return samples


def build_data(config: Config, samples: Mapping[str, Samples], backbone_preprocessing: Mapping[str, Any]) -> Data:
    """Data sets and loaders of all splits.

    Args:
        config: The run's config.
        samples: The pictures of each split.
        backbone_preprocessing: How the backbone wants its pictures; `augment.crop_mode` and `crop_pct` win over it.
    """
    overrides = {"crop_mode": config.augment.crop_mode, "crop_pct": config.augment.crop_pct}
    preprocessing = Preprocessing.from_dict(
        {**backbone_preprocessing, **{name: value for name, value in overrides.items() if value is not None}}
    )
    evaluation = EvalTransform(preprocessing)
    training = TrainTransform(preprocessing, config.augment.transforms)
    num_workers = _num_workers(config.num_workers)
    datasets, loaders = {}, {}
    for split, members in samples.items():
        transform = training if split == "train" else evaluation
        datasets[split] = ClassificationDataset(members, transform, seed=config.seed)
        loaders[split] = build_loader(
            datasets[split],
            config.train.batch_size,
            shuffle=split == "train",
            seed=config.seed,
            num_workers=num_workers,
        )
    return Data(dict(samples), datasets, loaders, preprocessing, training.is_random)


def build_model(config: Config, classes: tuple[str, ...]) -> ClassificationModel:
    """The backbone with its prompt, and a head for these classes."""
    prompt: Any = None if config.prompt.kind is PromptName.none else config.prompt.kind.value
    model = create_model(
        config.backbone.name,
        num_classes=len(classes),
        prompt=prompt,
        num_tokens=config.prompt.num_tokens,
        blocks=config.prompt.blocks,
        dropout=config.prompt.dropout,
        impl=config.prompt.impl.value,
        pretrained=config.backbone.pretrained,
        checkpoint=config.backbone.checkpoint,
        img_size=config.backbone.img_size,
        dtype=DTYPES[config.backbone.dtype],
        classes=classes,
        head_init=config.head.init.value,
    )
    model.backbone.vit.set_grad_checkpointing(config.grad_checkpointing)
    return model


def check_compiler(device: torch.device) -> None:
    """Make sure that torch can compile here, and let it forget what it compiled for an earlier run of a sweep.

    Raises:
        ConfigError: It cannot, for lack of a C++ compiler, say.
    """
    torch.compiler.reset()
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # the compiler's backends raise kinds of their own
        raise ConfigError(f"compile=true: {first_line(error)}; install a C++ compiler, or use compile=false") from error


def build_loss(config: Config, train: Samples) -> CrossEntropy:
    """Cross-entropy with label smoothing and class weights; weights have a mean of 1 over the train pictures."""
    weight = None
    if config.train.class_weights is ClassWeights.balanced:
        counts = torch.bincount(torch.tensor(train.targets), minlength=len(train.classes)).clamp(min=1)
        weight = len(train.targets) / (len(train.classes) * counts.float())
    return CrossEntropy(weight, config.train.label_smoothing)


def build_optimizer(config: Config, model: ClassificationModel) -> Optimizer:
    """The optimiser, with a group for the prompt and one for the head."""
    optim = config.optim
    scale = config.train.batch_size * config.train.accumulation / 256 if optim.scale_lr else 1.0
    prompt = model.backbone.prompt
    parts = {
        "prompt": (list(prompt.parameters()) if prompt else [], optim.prompt_lr * scale),
        "head": (list(model.head.parameters()), optim.head_lr * scale),
    }
    return make_optimizer(optim.name.value, parts, weight_decay=optim.weight_decay, momentum=optim.momentum)


def build_schedule(config: Config, optimizer: Optimizer, num_batches: int) -> LRScheduler:
    """Warm-up and cosine over all optimiser steps of the run."""
    steps_per_epoch = -(-num_batches // config.train.accumulation)
    return warmup_cosine(
        optimizer,
        num_steps=config.train.epochs * steps_per_epoch,
        num_warmup_steps=round(config.optim.warmup_epochs * steps_per_epoch),
    )


def build_average(config: Config, model: nn.Module) -> MovingAverage | None:
    """The moving average of the tuned parameters, when the config asks for one."""
    return None if config.train.ema is None else MovingAverage(tuned_parameters(model), config.train.ema)


def build_watches(model: ClassificationModel) -> list[RowWatch]:
    """What to log of the prompt: one row for each prompted block."""
    prompt = model.backbone.prompt
    return (
        [] if prompt is None else [RowWatch("prompt", prompt.tokens, [f"block_{block:02d}" for block in prompt.blocks])]
    )


def build_settings(config: Config, device: torch.device) -> FitSettings:
    """The numbers of the loop."""
    train = config.train
    auto = "bf16" if device.type == "cuda" else "fp32"
    return FitSettings(
        epochs=1 if config.mode is Mode.dry else train.epochs,
        accumulation=train.accumulation,
        clip_norm=train.clip_norm,
        patience=train.patience,
        precision=auto if train.precision is Precision.auto else train.precision.value,  # type: ignore[arg-type]
        log_every=1 if config.mode is Mode.dry else train.log_every,
        max_batches=DRY_BATCHES * train.accumulation if config.mode is Mode.dry else None,
    )


def make_run_dir(root: str, name: str) -> Path:
    """A new run folder `root/name`; when there is one of that name, `root/name_2` and so on."""
    for number in range(1, 10_000):
        path = Path(root).expanduser() / (name if number == 1 else f"{name}_{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
    raise ConfigError(f"run.root={root}: holds ten thousand runs of the name {name}; choose another run.name")


def _num_workers(wanted: int | None) -> int:
    """Loader processes: as asked, or one less than the cores of this process, at most 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores - 1) if wanted is None else wanted


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, ready to use: its config, its model in eval mode and how pictures are prepared."""

    config: Config
    model: ClassificationModel
    metadata: TaskMetadata

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures are prepared, as the task file says."""
        return Preprocessing.from_dict(self.metadata.preprocessing)


def load_run(run_dir: Path, *, checkpoint: str | None = None, device: str = "auto") -> TrainedRun:
    """Load the task file of a run onto the backbone that its config names.

    Args:
        run_dir: The run folder.
        checkpoint: Weights of the backbone, when they no longer lie where the config says.
        device: "auto", "cpu", "cuda", ...

    Raises:
        ConfigError: The folder is not that of a finished run.
        ValueError, FileNotFoundError: The task file or the backbone cannot be used.
    """
    task = run_dir / "task.safetensors"
    if not task.is_file():
        what = "this run has not finished" if (run_dir / "config.yaml").is_file() else "not a run folder"
        raise ConfigError(f"run={run_dir}: {what}, it has no task.safetensors")
    config = load_config(run_dir / "config.yaml")
    metadata = read_task(task)
    seed_everything(config.seed, config.deterministic)  # a backbone without pretrained weights comes from the seed
    backbone = config.backbone
    vit = load_vit(
        backbone.name,
        pretrained=backbone.pretrained,
        checkpoint=checkpoint or backbone.checkpoint,
        img_size=backbone.img_size,
        dtype=DTYPES[backbone.dtype],
    )
    model = load_task(task, vit).to(pick_device(device))
    return TrainedRun(config, model.eval(), metadata)
