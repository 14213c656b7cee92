"""Objects built from a config."""

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vpt.config.errors import ConfigError, config_keys, first_line
from vpt.config.saved import load_config
from vpt.config.schema import (
    Config,
    Dtype,
    Mode,
    Precision,
    PromptConfig,
    PromptFormName,
    PromptInitName,
    TuningConfig,
    TuningName,
    schema_keys,
)
from vpt.data.loaders import build_loader
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.engine.optim import MovingAverage, make_optimizer, warmup_cosine
from vpt.engine.state import RunState
from vpt.engine.steps import FitSettings, Loader, NamesOf
from vpt.engine.watch import RowWatch
from vpt.models.adapters import Adapters
from vpt.models.backbone import PromptedViT
from vpt.models.bank import TaskBank
from vpt.models.parametrizations import Bilinear, Fourier, Shared
from vpt.models.prompt_init import PatchStart, start_from_patches, start_from_task
from vpt.models.task_file import load_task, read_task
from vpt.models.task_model import TaskModel, model_named
from vpt.models.task_schema import TaskMetadata
from vpt.models.tuning import tune, tuned_parameters, tuned_parts
from vpt.models.vit import ViT, check_input_size, load_vit
from vpt.models.whitening import whiten_from_patches

DRY_BATCHES = 2
STATISTICS_IMAGES = 256  # of train, from which groups, means and whitening are computed
DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}
KEYS = {  # of the config, by parameter of the library
    **{
        key.rpartition(".")[2]: key
        for key in schema_keys()
        if key.startswith(("backbone.", "prompt.", "tuning.", "head"))
    },
    **{"name": "backbone.name", "init": "prompt.init", "start": "prompt.init", "method": "tuning.adapters"},
    **{"head": "head.name", "head_init": "head.init", "task": "dataset.task"},
}


@dataclass(frozen=True)
class Data:
    """The data of a run: samples, data sets and loaders by split, and the preprocessing of images."""

    samples: dict[str, Any]  # of the type of task, as the data sets
    datasets: dict[str, Any]
    loaders: dict[str, Loader]
    preprocessing: Preprocessing
    is_augmented: bool  # at random, so that a train image may differ from epoch to epoch

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of train."""
        return tuple(next(iter(self.samples.values())).classes)


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
    """The device of this name; "auto" is CUDA, else Apple's GPU, else the CPU.

    Raises:
        ConfigError: torch does not know the device, or this machine has none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name}: {str(error).splitlines()[0]}; use device=auto or device=cpu") from error


def build_preprocessing(of_backbone: Mapping[str, Any], **overrides: Any) -> Preprocessing:
    """The preprocessing of the backbone, with the overrides that are not None."""
    with config_keys(crop_mode="augment.crop_mode", crop_pct="augment.crop_pct"):
        return Preprocessing.from_dict(
            {**of_backbone, **{name: value for name, value in overrides.items() if value is not None}}
        )


def spread(num: int, wanted: int) -> list[int]:
    """At most `wanted` of `num` indices, evenly spread."""
    indices: list[int] = np.linspace(0, num - 1, min(wanted, num)).astype(int).tolist()
    return indices


def build_loaders(
    config: Config,
    datasets: Mapping[str, Any],
    collate: Callable[[Any], Any] | None = None,
    balanced: Sequence[int] | None = None,
) -> dict[str, Loader]:
    """A loader for each split; train is shuffled, or drawn by these `balanced` class numbers."""
    num_workers = choose_num_workers(config.num_workers)
    return {
        split: build_loader(
            dataset,
            config.train.batch_size,
            shuffle=split == "train",
            balanced=balanced if split == "train" else None,
            seed=config.seed,
            num_workers=num_workers,
            collate_fn=collate,
            timeout_s=config.data.timeout_s,
        )
        for split, dataset in datasets.items()
    }


def build_model(config: Config, task_type: str, classes: Sequence[str], head_options: Mapping[str, Any]) -> TaskModel:
    """A new model of a task type; `head_options` are further keyword arguments of its class.

    Raises:
        ConfigError: A value cannot be used.
        FileNotFoundError: `backbone.checkpoint` does not exist.
    """
    prompt, tuning = config.prompt, config.tuning
    variant: Any = prompt.variant.value if config.is_prompted else None
    vit = build_backbone(config)
    with config_keys(**KEYS):
        backbone = PromptedViT(
            vit,
            variant,
            num_tokens=prompt.num_tokens,
            blocks=prompt.blocks,
            dropout=prompt.dropout,
            init="normal" if prompt.init is PromptInitName.normal else "uniform",
            form=build_form(prompt),
            impl=prompt.impl.value,
        )
        model = model_named(task_type)(backbone, len(classes), classes=classes, **head_options)
        check_input_size(vit)
        tune(model, tuning.method.value, num_blocks=tuning.num_blocks, adapters=build_adapters(tuning))
    vit.set_grad_checkpointing(config.grad_checkpointing)
    return model


def build_backbone(config: Config, checkpoint: str | None = None) -> ViT:
    """The backbone of a config, with weights from `checkpoint` if given; without pretrained ones from the seed.

    Raises:
        ConfigError, FileNotFoundError: A value of `backbone` cannot be used.
    """
    backbone = config.backbone
    with config_keys(**KEYS if checkpoint is None else {**KEYS, "checkpoint": "checkpoint"}):
        return load_vit(
            backbone.name,
            pretrained=backbone.pretrained,
            checkpoint=checkpoint or backbone.checkpoint,
            img_size=backbone.img_size,
            dtype=DTYPES[backbone.dtype],
        )


def build_adapters(tuning: TuningConfig) -> Adapters | None:
    """The adapters of the backbone; None without.

    Raises:
        ConfigError: The method or an option is unknown.
    """
    if tuning.method is not TuningName.adapters:
        return None
    options = {} if tuning.options is None else tuning.options
    if not isinstance(options, dict):
        raise ConfigError(f"tuning.options={options}: must be keys and values, such as {{r: 4}}")
    with config_keys(**KEYS):
        return Adapters(tuning.adapters, options)


def build_form(prompt: PromptConfig) -> nn.Module | None:
    """The parametrization of the prompt; None where its tokens are learned themselves."""
    match prompt.form:
        case PromptFormName.shared:
            return Shared()
        case PromptFormName.bilinear:
            return Bilinear(prompt.rank, whiten=prompt.whiten)
        case PromptFormName.fourier:
            return Fourier(prompt.fraction)
    return None


def start_prompt(config: Config, model: TaskModel, data: Data) -> None:
    """Initialise the prompt of a new run from patch tokens of train images, or from another task, as the config states.

    Raises:
        FileNotFoundError, ValueError: The task file or the images cannot initialise this prompt.
    """
    prompt, backbone = config.prompt, model.backbone
    if backbone.prompt is None:
        return
    if prompt.init_from is not None:
        start_from_task(backbone, Path(prompt.init_from).expanduser())
    elif prompt.init.value in get_args(PatchStart):
        num_images = prompt.num_tokens if prompt.init is PromptInitName.patch else STATISTICS_IMAGES
        images = _train_images(config, data, num_images)
        with config_keys(**KEYS):
            start_from_patches(backbone, images, prompt.init.value, seed=config.seed)  # type: ignore[arg-type]


def whiten_prompt(config: Config, model: TaskModel, data: Data) -> None:
    """Compute the coordinates that the prompt is learned in, if the config has `prompt.whiten`; also of a resumed run.

    Raises:
        ValueError: The queries of a block cannot be computed.
    """
    if config.prompt.whiten and model.backbone.prompt is not None:
        with config_keys(**KEYS):
            whiten_from_patches(model.backbone, _train_images(config, data, STATISTICS_IMAGES), seed=config.seed)


def _train_images(config: Config, data: Data, num_images: int) -> Iterator[torch.Tensor]:
    """Batches of at least so many train images, or of all, the same ones in each call."""
    size = min(config.train.batch_size, num_images)
    loader = build_loader(data.datasets["train"], size, shuffle=True, seed=config.seed, collate_fn=_stack_images)
    return islice(loader, -(-num_images // size))


def _stack_images(items: Sequence[tuple[torch.Tensor, Any]]) -> torch.Tensor:
    return torch.stack([image for image, _ in items])


def check_compiler(device: torch.device) -> None:
    """Check that torch can compile on this machine, and clear what it compiled for an earlier run of a sweep.

    Raises:
        ConfigError: It cannot, for example without a C++ compiler.
    """
    torch.compiler.reset()
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # the compiler's backends raise classes of their own
        raise ConfigError(f"compile=true: {first_line(error)}; install a C++ compiler, or use compile=false") from error


def build_optimizer(config: Config, model: TaskModel) -> Optimizer:
    """The optimiser, with a parameter group for each part that trains: prompt, neck, head, backbone."""
    optim = config.optim
    scale = config.train.batch_size * config.train.accumulation / 256 if optim.scale_lr else 1.0
    rates = {"prompt": optim.prompt_lr, "backbone": config.tuning.lr}
    parts = {
        name: (parameters, rates.get(name, optim.head_lr) * scale) for name, parameters in tuned_parts(model).items()
    }
    return make_optimizer(optim.name.value, parts, weight_decay=optim.weight_decay, momentum=optim.momentum)


def build_schedule(config: Config, optimizer: Optimizer, num_batches: int, num_done: int = 0) -> LRScheduler:
    """Warm-up and cosine over all optimiser steps of the run, or those behind `num_done` epochs."""
    steps_per_epoch = -(-num_batches // config.train.accumulation)
    return warmup_cosine(
        optimizer,
        num_steps=(config.train.epochs - num_done) * steps_per_epoch,
        num_warmup_steps=round(config.optim.warmup_epochs * steps_per_epoch),
    )


def build_state(config: Config, model: TaskModel, num_batches: int, num_done: int = 0) -> RunState:
    """The state of a new run of `num_batches` batches an epoch; its schedule is that behind `num_done` epochs."""
    optimizer = build_optimizer(config, model)
    schedule, tuned = build_schedule(config, optimizer, num_batches, num_done), tuned_parameters(model)
    return RunState(
        tuned, optimizer, schedule, None if config.train.ema is None else MovingAverage(tuned, config.train.ema)
    )


def names_in(loader: Loader, names: Sequence[str]) -> NamesOf:
    """A function from epoch, first batch and end batch to the names of the images in between."""
    sampler: Any = loader.sampler
    size = loader.batch_size or 1
    return lambda epoch, first, behind: [names[index] for index in sampler.order(epoch)[first * size : behind * size]]


def build_watches(model: TaskModel) -> list[RowWatch]:
    """The learned parameters of the prompt to log: a row for each prompted block, or one where the blocks share it."""
    prompt = model.backbone.prompt
    if prompt is None:
        return []
    rows, learned = [f"block_{block:02d}" for block in prompt.blocks], list(prompt.parameters())
    names = ["prompt"] if len(learned) == 1 else [f"prompt_factor{index}" for index in range(len(learned))]
    return [
        RowWatch(name, parameter, rows if len(parameter) == len(rows) else ["all_blocks"])
        for name, parameter in zip(names, learned, strict=True)
    ]


def build_settings(config: Config, device: torch.device, select: str) -> FitSettings:
    """The settings of the loop; `select` is the metric that selects the best epoch."""
    train = config.train
    return FitSettings(
        epochs=1 if config.mode is Mode.dry else train.epochs,
        select=select,
        accumulation=train.accumulation,
        clip_norm=train.clip_norm,
        patience=train.patience,
        precision=choose_precision(config, device),
        log_every=1 if config.mode is Mode.dry else train.log_every,
        max_batches=DRY_BATCHES * train.accumulation if config.mode is Mode.dry else None,
        skip_nonfinite=train.skip_nonfinite,
        auto_batch=config.auto_batch,
        save_every_s=60 * config.run.save_minutes,
    )


def choose_precision(config: Config, device: torch.device) -> Literal["fp32", "bf16"]:
    """The arithmetic of the forward pass; auto is bf16 on CUDA and fp32 elsewhere."""
    if config.train.precision is Precision.auto:
        return "bf16" if device.type == "cuda" else "fp32"
    return "bf16" if config.train.precision is Precision.bf16 else "fp32"


def open_bank(
    tasks: Mapping[str, Path], *, backbone: str | None = None, checkpoint: str | None = None, device: str = "auto"
) -> TaskBank:
    """Load one or more task files, by the names that they will have, onto one backbone in memory.

    The first file sets the input size, and by default the timm name of the backbone; `checkpoint` is a file of its
    weights, `device` is "auto", "cpu", "cuda", ... Files that cannot be used raise a ConfigError, ValueError or
    FileNotFoundError.
    """
    metadata = read_task(next(iter(tasks.values())))
    height, width = metadata.preprocessing["size"]
    with config_keys(name="backbone"):
        vit = load_vit(backbone or metadata.backbone, checkpoint=checkpoint, img_size=(height, width))
    bank = TaskBank(vit, device=pick_device(device))
    for name, path in tasks.items():
        bank.load(path, name)
    return bank


def choose_num_workers(wanted: int | None) -> int:
    """The number of loader processes; by default one less than the cores of this process, at most 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores - 1) if wanted is None else wanted


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, ready to use: its config, its model in eval mode, and the preprocessing of images."""

    config: Config
    model: TaskModel
    metadata: TaskMetadata

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of images, from the task file."""
        return Preprocessing.from_dict(self.metadata.preprocessing)


def load_run(run_dir: Path, *, checkpoint: str | None = None, device: str = "auto") -> TrainedRun:
    """Load the task file of a run folder onto the backbone that its config names.

    `checkpoint` is the file of its weights, if that has moved; `device` is "auto", "cpu", "cuda", ...

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
    model = load_task(task, build_backbone(config, checkpoint)).to(pick_device(device))
    return TrainedRun(config, model.eval(), metadata)
