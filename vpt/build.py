"""From a config to objects: the only file that knows both."""

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

from vpt.config.errors import ConfigError, first_line
from vpt.config.saved import load_config
from vpt.config.schema import (
    Config,
    Dtype,
    Mode,
    Precision,
    PromptConfig,
    PromptFormName,
    PromptInitName,
    PromptName,
    TuningConfig,
    TuningName,
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
from vpt.models.vit import ViT, load_vit
from vpt.models.whitening import whiten_from_patches

DRY_BATCHES = 2
STATISTICS_PICTURES = 256  # of train, that groups, means and whitening are computed of
DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}


@dataclass(frozen=True)
class Data:
    """The data of a run: samples, data sets and loaders by split, and how pictures are prepared."""

    samples: dict[str, Any]  # of the kind of task, as the data sets
    datasets: dict[str, Any]
    loaders: dict[str, Loader]
    preprocessing: Preprocessing
    is_augmented: bool  # at random, so that a train picture may look different in each epoch

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, as train has them."""
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


def build_preprocessing(of_backbone: Mapping[str, Any], **overrides: Any) -> Preprocessing:
    """How the backbone wants its pictures; overrides that are not None win."""
    return Preprocessing.from_dict(
        {**of_backbone, **{name: value for name, value in overrides.items() if value is not None}}
    )


def spread(num: int, wanted: int) -> list[int]:
    """At most `wanted` of `num` indices, evenly spread."""
    indices: list[int] = np.linspace(0, num - 1, min(wanted, num)).astype(int).tolist()
    return indices


def build_loaders(
    config: Config, datasets: Mapping[str, Any], collate: Callable[[Any], Any] | None = None
) -> dict[str, Loader]:
    """A loader for the data set of each split; train is shuffled."""
    num_workers = choose_num_workers(config.num_workers)
    return {
        split: build_loader(
            dataset,
            config.train.batch_size,
            shuffle=split == "train",
            seed=config.seed,
            num_workers=num_workers,
            collate_fn=collate,
            timeout_s=config.data.timeout_s,
        )
        for split, dataset in datasets.items()
    }


def build_model(config: Config, task_type: str, classes: Sequence[str], head_options: Mapping[str, Any]) -> TaskModel:
    """A new model: the backbone with its prompt, and a head for these classes.

    Args:
        config: Of the run.
        task_type: Name of the model's type.
        classes: Names of the classes, by label.
        head_options: Further keyword arguments of the model's class.
    """
    prompt, tuning = config.prompt, config.tuning
    is_prompted = prompt.kind is not PromptName.none and (tuning.kind is TuningName.prompt or tuning.with_prompt)
    backbone = PromptedViT(
        build_backbone(config),
        prompt.kind.value if is_prompted else None,
        num_tokens=prompt.num_tokens,
        blocks=prompt.blocks,
        dropout=prompt.dropout,
        init="normal" if prompt.init is PromptInitName.normal else "uniform",
        form=build_form(prompt),
        impl=prompt.impl.value,
    )
    model = model_named(task_type)(backbone, len(classes), classes=classes, **head_options)
    tune(model, tuning.kind.value, num_blocks=tuning.num_blocks, adapters=build_adapters(tuning))
    backbone.vit.set_grad_checkpointing(config.grad_checkpointing)
    return model


def build_backbone(config: Config, checkpoint: str | None = None) -> ViT:
    """The backbone of a config; without pretrained weights they come from the seed.

    Args:
        config: Of the run.
        checkpoint: Weights of the backbone, if they are not those that the config names.
    """
    backbone = config.backbone
    return load_vit(
        backbone.name,
        pretrained=backbone.pretrained,
        checkpoint=checkpoint or backbone.checkpoint,
        img_size=backbone.img_size,
        dtype=DTYPES[backbone.dtype],
    )


def build_adapters(tuning: TuningConfig) -> Adapters | None:
    """What is put into the backbone; None where nothing is.

    Raises:
        ConfigError: The method or an option is none.
    """
    if tuning.kind is not TuningName.adapters:
        return None
    try:
        return Adapters(tuning.adapters, tuning.options or {})
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"tuning.adapters={tuning.adapters}, tuning.options={tuning.options}: {error}") from error


def build_form(prompt: PromptConfig) -> nn.Module | None:
    """What computes the prompt tokens; None where they themselves are learned."""
    match prompt.form:
        case PromptFormName.shared:
            return Shared()
        case PromptFormName.bilinear:
            return Bilinear(prompt.rank, whiten=prompt.whiten)
        case PromptFormName.fourier:
            return Fourier(prompt.fraction)
    return None


def start_prompt(config: Config, model: TaskModel, data: Data) -> None:
    """Let the prompt of a new run start at patch tokens of train pictures, or at another task, if the config says so.

    Raises:
        FileNotFoundError, ValueError: The task file or the pictures cannot start this prompt.
    """
    prompt, backbone = config.prompt, model.backbone
    if backbone.prompt is None:
        return
    if prompt.init_from is not None:
        start_from_task(backbone, Path(prompt.init_from).expanduser())
    elif prompt.init.value in get_args(PatchStart):
        num_pictures = prompt.num_tokens if prompt.init is PromptInitName.patch else STATISTICS_PICTURES
        pictures = _start_pictures(config, data, num_pictures)
        start_from_patches(backbone, pictures, prompt.init.value, seed=config.seed)  # type: ignore[arg-type]


def whiten_prompt(config: Config, model: TaskModel, data: Data) -> None:
    """Fix the coordinates that the prompt is learned in, if the config says so; of a run that goes on, too.

    Raises:
        ValueError: A block of the backbone is not understood.
    """
    if config.prompt.whiten and model.backbone.prompt is not None:
        whiten_from_patches(model.backbone, _start_pictures(config, data, STATISTICS_PICTURES), seed=config.seed)


def _start_pictures(config: Config, data: Data, num_pictures: int) -> Iterator[torch.Tensor]:
    """Batches of at least so many train pictures, or of all, the same ones in each call."""
    size = min(config.train.batch_size, num_pictures)
    loader = build_loader(data.datasets["train"], size, shuffle=True, seed=config.seed, collate_fn=_stack_images)
    return islice(loader, -(-num_pictures // size))


def _stack_images(items: Sequence[tuple[torch.Tensor, Any]]) -> torch.Tensor:
    return torch.stack([image for image, _ in items])


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


def build_optimizer(config: Config, model: TaskModel) -> Optimizer:
    """The optimiser, with a group for each part that trains: prompt, neck, head, backbone."""
    optim = config.optim
    scale = config.train.batch_size * config.train.accumulation / 256 if optim.scale_lr else 1.0
    rates = {"prompt": optim.prompt_lr, "backbone": config.tuning.lr}
    parts = {
        name: (parameters, rates.get(name, optim.head_lr) * scale) for name, parameters in tuned_parts(model).items()
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


def build_state(config: Config, model: TaskModel, num_batches: int) -> RunState:
    """The state of a new run of `num_batches` batches an epoch."""
    optimizer = build_optimizer(config, model)
    schedule = build_schedule(config, optimizer, num_batches)
    return RunState(tuned_parameters(model), optimizer, schedule, build_average(config, model))


def names_in(loader: Loader, names: Sequence[str]) -> NamesOf:
    """A function from epoch, first batch and the one behind the last to the names of the pictures in between."""
    sampler: Any = loader.sampler
    size = loader.batch_size or 1
    return lambda epoch, first, behind: [names[index] for index in sampler.order(epoch)[first * size : behind * size]]


def build_average(config: Config, model: nn.Module) -> MovingAverage | None:
    """The moving average of the tuned parameters, when the config asks for one."""
    return None if config.train.ema is None else MovingAverage(tuned_parameters(model), config.train.ema)


def build_watches(model: TaskModel) -> list[RowWatch]:
    """What to log of what is learned of the prompt: a row for each prompted block, or one where they share it."""
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
    """The numbers of the loop; `select` is the metric that chooses."""
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
    """The arithmetic of the forward pass: as asked, or bf16 on a GPU of CUDA and fp32 elsewhere."""
    if config.train.precision is Precision.auto:
        return "bf16" if device.type == "cuda" else "fp32"
    return "bf16" if config.train.precision is Precision.bf16 else "fp32"


def open_bank(
    tasks: Mapping[str, Path], *, backbone: str | None = None, checkpoint: str | None = None, device: str = "auto"
) -> TaskBank:
    """Load task files onto one backbone in memory.

    Args:
        tasks: Task files, by the names that they will have; at least one.
        backbone: timm name of the backbone; by default that of the first file, as is its input size.
        checkpoint: Load the backbone's weights from this file.
        device: "auto", "cpu", "cuda", ...

    Raises:
        ConfigError, ValueError, FileNotFoundError: A file or the backbone cannot be used.
    """
    metadata = read_task(next(iter(tasks.values())))
    height, width = metadata.preprocessing["size"]
    vit = load_vit(backbone or metadata.backbone, checkpoint=checkpoint, img_size=(height, width))
    bank = TaskBank(vit, device=pick_device(device))
    for name, path in tasks.items():
        bank.load(path, name)
    return bank


def choose_num_workers(wanted: int | None) -> int:
    """Loader processes: as asked, or one less than the cores of this process, at most 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores - 1) if wanted is None else wanted


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, ready to use: its config, its model in eval mode and how pictures are prepared."""

    config: Config
    model: TaskModel
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
    model = load_task(task, build_backbone(config, checkpoint)).to(pick_device(device))
    return TrainedRun(config, model.eval(), metadata)
