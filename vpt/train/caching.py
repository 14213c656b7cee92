"""Caches of training: tokens that frozen blocks compute once, or images that are decoded once.

*Tokens*: where frozen blocks precede the first prompt, or there is no prompt, and train images are not augmented at
random, every epoch would compute the same tokens; they are computed once, and each epoch runs only the later blocks.
*Images*: decoded once, augmented anew in each epoch.

Neither changes a result. A kernel's last bits may depend on the size of its batch (on a CPU those of bfloat16 do, those
of float32 were not observed to), so tokens are computed in batches as large as those of training. One difference
remains: without a cache the last batch of an epoch may be smaller.

Shapes: B batch, N tokens, D embed_dim.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor, nn

from vpt.build import Data, choose_precision
from vpt.config.errors import ConfigError
from vpt.config.schema import CacheName, Config, Mode, Sampling
from vpt.data.cache import cache_images, decoded_sizes, num_bytes
from vpt.data.loaders import build_loader
from vpt.data.tokens import TokenDataset, TokenFolder, content_sha256
from vpt.engine.console import Progress
from vpt.engine.steps import Loader, autocast
from vpt.models.task_model import TaskModel, TunedPart
from vpt.storage.files import sha256_of
from vpt.task_types.base import task_type_of
from vpt.version import __version__

FORMAT_VERSION = 1  # raise it when the same key would stand for other tokens
SPLITS = ("train", "val")  # read in every epoch


@dataclass(frozen=True)
class TokenSpec:
    """The tokens of an image that enter the first prompted block, or its features without a prompt.

    Args:
        shape: (N, D), or (D,) for features.
        dtype: As the backbone computes them.
        position: The position that `forward_frozen` returns, the same for all images.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    position: Tensor | None

    def num_bytes(self, data: Data) -> int:
        """Bytes for all images of an epoch."""
        num_images = sum(len(data.samples[split]) for split in SPLITS)
        return num_images * math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class CachePlan:
    """What a run caches: `data` may read cached images; `tokens` if they are cached; `text` describes it."""

    data: Data
    tokens: TokenSpec | None
    text: str


@dataclass(frozen=True)
class FitInputs:
    """A module and the loaders of its inputs for fit(), and a note if tokens are not cached as planned."""

    model: nn.Module
    train_loader: Loader
    val_loader: Loader
    note: str | None = None


def plan_cache(config: Config, model: TaskModel, data: Data) -> CachePlan:
    """Choose what a run caches; nothing is decoded and no tokens are computed yet.

    Raises:
        ConfigError: `cache=ram` or `cache=disk` is set, and tokens cannot be cached or take too much memory.
    """
    if config.cache is CacheName.off:
        return CachePlan(data, None, "off")
    tokens = None if config.cache is CacheName.auto else _requested_tokens(config, model, data)
    if config.mode is not Mode.train or (tokens is None and config.train.epochs == 1):
        return CachePlan(data, None, "none: no image is read in a second epoch")
    if tokens is None:
        return _plan_auto(config, model, data)
    return CachePlan(data, tokens, _describe(config, model, data, tokens))


def build_fit_inputs(config: Config, model: TaskModel, plan: CachePlan) -> FitInputs:
    """The module and the loaders of fit(); tokens, if they are planned, are computed here or read from the disk."""
    data, spec = plan.data, plan.tokens
    tokens, note = ({}, None) if spec is None else _cache_tokens(config, model, data, spec)
    if spec is None or not tokens or not model.pools_features:
        return FitInputs(model, data.loaders["train"], data.loaders["val"], note)
    is_balanced = config.train.sampling is Sampling.balanced
    loaders = {
        split: build_loader(
            TokenDataset(tokens[split], data.samples[split].targets),
            config.train.batch_size,
            shuffle=split == "train",
            balanced=data.samples[split].targets if split == "train" and is_balanced else None,
            seed=config.seed,
        )
        for split in SPLITS
    }
    return FitInputs(TunedPart(model, spec.position), loaders["train"], loaders["val"], note)


def free_memory() -> float:
    """Free memory in bytes of this machine, or of this container where that is less."""
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = float(available[1]) * 1024 if available else 0.0
    except OSError:  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    return min([free, *(_free_in_group(folder) for folder in _control_groups())])


def _control_groups() -> list[Path]:
    """The folders of the control groups of this process, the outermost first."""
    root = Path("/sys/fs/cgroup")
    try:
        (inner,) = re.findall(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return [root]
    names = Path(inner).parts
    return [root.joinpath(*names[:depth]) for depth in range(len(names) + 1)]


def _free_in_group(folder: Path) -> float:
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        files = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
        return limit - used + (int(files[1]) if files else 0)
    except (OSError, ValueError):  # no such group, or its limit is "max"
        return math.inf


def _plan_auto(config: Config, model: TaskModel, data: Data) -> CachePlan:
    """Tokens in memory if they can be cached and fit, otherwise decoded images if they fit."""
    limit = _limit(config)
    refusal = _why_no_tokens(model, data)
    if refusal is not None:
        return _plan_images(config, data, limit, f"no tokens: {refusal[0]}")
    tokens = _probe(config, model, data)
    size = tokens.num_bytes(data)
    if size <= limit:
        return CachePlan(data, tokens, _describe(config, model, data, tokens))
    return _plan_images(config, data, limit, f"no tokens: {_size(size)} are {_more_than(config, limit)}")


def _plan_images(config: Config, data: Data, limit: float, why_no_tokens: str) -> CachePlan:
    samples, total = dict(data.samples), 0
    for split in SPLITS:
        if not samples[split].paths:
            return CachePlan(data, None, f"none ({why_no_tokens}; no images: they are not files)")
        sizes = decoded_sizes(samples[split], limit - total)
        if sizes is None:
            why = f"decoded they are {_more_than(config, limit)}"
            return CachePlan(data, None, f"none ({why_no_tokens}; no images: {why})")
        total += sum(map(num_bytes, sizes))
        try:
            samples[split] = cache_images(samples[split], sizes)
        except OSError as error:
            return CachePlan(data, None, f"none ({why_no_tokens}; no images: {gettempdir()}: {error})")
    cached = task_type_of(config).build_data(samples, data.preprocessing.to_dict())
    return CachePlan(cached, None, f"images, {_size(total)}, decoded once ({why_no_tokens})")


def _requested_tokens(config: Config, model: TaskModel, data: Data) -> TokenSpec:
    """The tokens that `cache=ram` or `cache=disk` requires; ConfigError with the reason why not."""
    option = f"cache={config.cache.value}"
    refusal = _why_no_tokens(model, data)
    if refusal is not None:
        raise ConfigError(f"{option} needs {refusal[1]}: {refusal[0]}; or type cache=auto")
    tokens = _probe(config, model, data)
    size, free = tokens.num_bytes(data), free_memory()
    if size > config.cache_gb * 1e9:
        enough = math.ceil(size / 1e8) / 10
        raise ConfigError(
            f"{option} needs {_size(size)}, more than cache_gb={config.cache_gb:g}; type cache_gb={enough:g}"
        )
    if config.cache is CacheName.ram and size > free:
        raise ConfigError(f"{option} needs {_size(size)}, more than the free memory of {_size(free)}; type cache=disk")
    return tokens


def _why_no_tokens(model: TaskModel, data: Data) -> tuple[str, str] | None:
    """None if tokens are the same in every epoch and save work; otherwise the reason and what they need."""
    if not model.pools_features:
        return "the head reads several blocks", "a task of classification"
    if any(parameter.requires_grad for parameter in model.backbone.vit.parameters()):
        return "the backbone trains", "tuning=prompt or tuning=linear"
    if data.is_augmented:
        return "augmentation is random", "augment=none"
    prompt = model.backbone.prompt
    if prompt is not None and prompt.blocks[0] == 0:
        return "the prompt enters block 0", "frozen blocks before the prompt, such as prompt=deep prompt.blocks=last:3"
    return None


@torch.no_grad()
def _probe(config: Config, model: TaskModel, data: Data) -> TokenSpec:
    device = next(model.parameters()).device
    with autocast(device, choose_precision(config, device)):
        tokens, position = model.backbone.forward_frozen(torch.zeros(1, 3, *data.preprocessing.size, device=device))
    return TokenSpec(tuple(tokens.shape[1:]), tokens.dtype, position)


def _describe(config: Config, model: TaskModel, data: Data, tokens: TokenSpec) -> str:
    prompt = model.backbone.prompt
    what = "features" if prompt is None else f"tokens that enter block {prompt.blocks[0]}"
    where = f"in {_folder(config)}" if config.cache is CacheName.disk else "in memory"
    return f"{what}, {_size(tokens.num_bytes(data))} {where}, computed once"


def _folder(config: Config) -> Path:
    return Path(config.cache_dir or Path(config.run.root) / "cache").expanduser()


def _limit(config: Config) -> float:
    """Bytes that `cache=auto` may take."""
    return min(config.cache_gb * 1e9, free_memory() / 2)


def _more_than(config: Config, limit: float) -> str:
    by_config = limit == config.cache_gb * 1e9
    return f"more than cache_gb={config.cache_gb:g}" if by_config else "more than half of the free memory"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def _cache_tokens(
    config: Config, model: TaskModel, data: Data, spec: TokenSpec
) -> tuple[dict[str, Tensor], str | None]:
    """The tokens of each split, and a note if the disk cannot hold them; empty if memory cannot either."""
    note = None
    if config.cache is CacheName.disk:
        try:
            return _on_disk(config, model, data, spec), None
        except OSError as error:
            note = f"no tokens on disk: {error}"
        if spec.num_bytes(data) > _limit(config):
            return {}, f"{note}; training continues without a cache"
        note += "; they are held in memory"
    return {split: _in_memory(config, model, data, spec, split) for split in SPLITS}, note


def _in_memory(config: Config, model: TaskModel, data: Data, spec: TokenSpec, split: str) -> Tensor:
    tokens, start = torch.empty(len(data.samples[split]), *spec.shape, dtype=spec.dtype), 0
    for part in _compute(config, model, data, split):
        tokens[start : start + len(part)] = part
        start += len(part)
    return tokens


def _on_disk(config: Config, model: TaskModel, data: Data, spec: TokenSpec) -> dict[str, Tensor]:
    """Read tokens from the folder; compute and write those that it does not hold."""
    folder = TokenFolder(_folder(config), config.cache_gb * 1e9)
    common = _describe_run(config, model, data, spec)
    tokens = {}
    for split in SPLITS:
        # "pictures" stays: another name would make every existing cache useless
        described = {**common, "split": split, "pictures": content_sha256(data.samples[split])}
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        shape = (len(data.samples[split]), *spec.shape)
        found = folder.read(key, shape, spec.dtype)
        if found is None:
            folder.write(key, _compute(config, model, data, split), shape, spec.dtype)
            found = folder.read(key, shape, spec.dtype)
        if found is None:
            raise OSError(f"{folder.path} does not hold the tokens that were written to it")
        tokens[split] = found
    return tokens


def _describe_run(config: Config, model: TaskModel, data: Data, spec: TokenSpec) -> dict[str, Any]:
    """All that decides the bits of tokens except for the images."""
    vit, prompt = model.backbone.vit, model.backbone.prompt
    device = next(model.parameters()).device
    is_cuda = device.type == "cuda"
    processor = torch.cuda.get_device_name(device) if is_cuda else torch.backends.cpu.get_cpu_capability()
    return {
        "format": FORMAT_VERSION,
        "versions": {"vpt": __version__, **{name: version(name) for name in ("numpy", "pillow", "timm", "torch")}},
        "backbone": [model.backbone.name, repr(vit)],
        "weights": sha256_of({**dict(vit.named_parameters()), **dict(vit.named_buffers())}),
        "block": None if prompt is None else prompt.blocks[0],
        "tokens": [spec.shape, str(spec.dtype)],
        "preprocessing": data.preprocessing.to_dict(),
        "batch_size": config.train.batch_size,
        "precision": [choose_precision(config, device), torch.get_float32_matmul_precision()],
        "deterministic": config.deterministic,
        "device": [device.type, processor, torch.get_num_threads()],
    }


@torch.no_grad()
def _compute(config: Config, model: TaskModel, data: Data, split: str) -> Iterator[Tensor]:
    """Tokens (B, N, D) of the images of a split, in order, on the CPU, in batches as in evaluation.

    The order of train changes with the epoch and nearly all of its batches are full, so the last batch is filled up
    with images of the one before.
    """
    device = next(model.parameters()).device
    precision = choose_precision(config, device)
    loader = build_loader(
        data.datasets[split], config.train.batch_size, shuffle=False, num_workers=data.loaders[split].num_workers
    )
    before = torch.empty(0)
    with Progress(total=len(loader), description=f"cache {split}") as progress:
        for images, _ in loader:
            num_images = len(images)
            if split == "train" and num_images < len(before):
                images = torch.cat([before[num_images:], images])
            before = images
            with autocast(device, precision):
                tokens, _ = model.backbone.forward_frozen(images.to(device, non_blocking=True))
            yield tokens[-num_images:].cpu()
            progress.advance(num_images)
