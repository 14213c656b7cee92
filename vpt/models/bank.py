"""TaskBank: any number of tasks on one frozen backbone in memory, mixed in a batch.

Legend: B images, N tokens in the sequence, D embed_dim, K classes of a task.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpt.models.attention import why_not_fast
from vpt.models.block_loop import PromptSource, feature_map, pool, run_blocks, run_images
from vpt.models.task_batch import LoadedTask, TaskBatch, keys_values_of
from vpt.models.task_file import put_task, task_tensors
from vpt.models.task_model import Sizes
from vpt.models.task_schema import DECODING, TaskMetadata
from vpt.models.vit import ViT, check_images, check_supported, grid_size, load_vit, pools_prefix_only

Tasks = Mapping[str, LoadedTask]


class TaskBank:
    """Tasks by name on one frozen backbone, for inference.

    Any thread may load, swap and remove tasks while others infer: a call uses the tasks that were loaded when it began.
    Results are those of `load_task`, up to rounding. The name of a task that is not loaded raises a ValueError.

    Args:
        backbone: A timm ViT in memory, or the timm name of one; it is held, frozen and in eval mode.
        device: Where backbone and tasks are.
        checkpoint, img_size, dtype: With a name: as for `load_vit`, whose errors also pass.

    Example:
        >>> bank = TaskBank("vit_nano_patch8_64")
        >>> bank.names
        ()
    """

    def __init__(
        self,
        backbone: str | ViT,
        *,
        device: str | torch.device = "cpu",
        checkpoint: str | Path | None = None,
        img_size: int | tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(backbone, str):
            backbone = load_vit(backbone, checkpoint=checkpoint, img_size=img_size, dtype=dtype)
        check_supported(backbone)
        self.vit = backbone.to(device).requires_grad_(False).eval()
        self._tasks: Tasks = {}  # replaced as a whole, never changed
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return next(self.vit.parameters()).device

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks, in the order in which they were loaded."""
        return tuple(self._tasks)

    def load(self, path: str | Path, name: str | None = None) -> str:
        """Read a task file; return the task's name, by default that of the file without its ending.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The name is taken, or the file cannot be used on this backbone.
        """
        name = Path(path).stem if name is None else name
        self._check_free(name)
        task = self._read(path)
        with self._lock:
            self._check_free(name)
            self._tasks = {**self._tasks, name: task}
        return name

    def swap(self, name: str, path: str | Path) -> None:
        """Replace a task by that of another file, atomically.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file cannot be used; the old task stays.
        """
        _find(self._tasks, [name])
        task = self._read(path)
        with self._lock:
            _find(self._tasks, [name])
            self._tasks = {**self._tasks, name: task}

    def remove(self, name: str) -> None:
        """Remove a task."""
        with self._lock:
            _find(self._tasks, [name])
            self._tasks = {held: task for held, task in self._tasks.items() if held != name}

    def metadata(self, name: str) -> TaskMetadata:
        """Metadata of the task file, such as the preprocessing of images."""
        return _find(self._tasks, [name])[name].metadata

    def num_bytes(self, name: str) -> int:
        """Memory of a task in addition to the backbone: prompt, keys and values, neck, head, tuned parameters."""
        task = _find(self._tasks, [name])[name]
        cached = {id(part): part for pair in task.keys_values.values() for part in pair}
        return sum(tensor.nbytes for tensor in (*cached.values(), *task_tensors(task.model).values()))

    def is_shared(self, name: str) -> bool:
        """Whether images of a task go through the backbone together with those of other tasks."""
        return _find(self._tasks, [name])[name].is_shared

    def select(self, name: str, selection: Any) -> None:
        """Choose which detections a task returns; a ValueError if it has none, or not the labels of the selection."""
        _find(self._tasks, [name])[name].model.select(selection)

    @torch.inference_mode()
    def __call__(self, images: Tensor, tasks: str | Sequence[str], *, sizes: Sizes | None = None) -> Any:
        """Run each image with its own task, all in one pass through the backbone.

        Tasks with tuned parameters of the backbone take a separate pass. So does each task if the backbone has a block
        that the fast path does not support, see `attention.why_not_fast`.

        Args:
            images: (B, 3, H, W), each prepared as its task requires.
            tasks: The task of all images, or one name for each.
            sizes: For detection: height and width of the part of each input that is image, to which boxes are clipped.

        Returns:
            For one name: logits (B, K), or B detections as of `Detector`; for a list: B results, each of its own task,
            logits (K,) or detections.

        Raises:
            ValueError: Not one name for each image, or images of another size than a task's.
        """
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        held = _find(self._tasks, names)
        images = self._prepare(images, held)
        sizes = _check_sizes(sizes, images)
        if isinstance(tasks, str):
            is_shared = held[tasks] in self._shared(held.values())
            return self._branch(images, held, sizes)[tasks] if is_shared else held[tasks].model.predict(images, sizes)
        if len(names) != len(images):
            raise ValueError(f"{len(names)} names of tasks for {len(images)} images; give one for each, or one for all")
        rows, shared = [held[name] for name in names], self._shared(held.values())
        together = [index for index, task in enumerate(rows) if task in shared]
        results: dict[int, Any] = {}
        if together:
            of_them = [sizes[index] for index in together]
            mixed = self._run_together(images[together], [rows[index] for index in together], of_them)
            results |= zip(together, mixed, strict=True)
        for task, where in _group(rows).items():
            if task not in shared:
                results |= zip(where, task.model.predict(images[where], [sizes[index] for index in where]), strict=True)
        return [results[index] for index in range(len(rows))]

    @torch.inference_mode()
    def every(
        self, images: Tensor, names: str | Sequence[str] | None = None, *, sizes: Sizes | None = None
    ) -> dict[str, Any]:
        """The result of a call with one name, by name, of every task (None) or some.

        Blocks before a task's first prompted one run once for all tasks. Tasks that require different preprocessing
        raise a ValueError.
        """
        held = self._tasks
        tasks = _find(held, held if names is None else [names] if isinstance(names, str) else names)
        _check_same_preprocessing(tasks)
        images = self._prepare(images, tasks)
        sizes = _check_sizes(sizes, images)
        shared = self._shared(tasks.values())
        results = {name: task.model.predict(images, sizes) for name, task in tasks.items() if task not in shared}
        results |= self._branch(images, {name: tasks[name] for name in tasks if name not in results}, sizes)
        return {name: results[name] for name in tasks}

    def _branch(self, images: Tensor, tasks: Tasks, sizes: Sizes) -> dict[str, Any]:
        """Run each task from its first prompted block on; earlier blocks run once for all tasks."""
        if not tasks:
            return {}
        grid, depth = grid_size(self.vit, images), len(self.vit.blocks)
        wanted = {index for task in tasks.values() for index in task.model.out_indices}
        last = max(task.first for task in tasks.values())
        stops = sorted({task.first for task in tasks.values()} | {index + 1 for index in wanted if index < last})
        found = list(run_images(self.vit, images, stops, num_read=self._num_read(depth - 1 in wanted)))
        trunk, position = dict(zip(stops, (tokens for tokens, _ in found), strict=True)), found[0][1]
        maps = {index: feature_map(self.vit, trunk[index + 1], grid) for index in wanted if index + 1 in trunk}
        results: dict[str, Any] = {}
        for name, task in tasks.items():
            source, out_indices = TaskBatch(self.vit, [task] * len(images)), task.model.out_indices
            tokens, own = self._run(trunk[task.first], position, source, (task.first, task.last), grid, out_indices)
            own = maps | own
            features = [own[index] for index in out_indices] or pool(self.vit, tokens, source.num_carried)
            results[name] = task.model.forward_head(features, sizes)
        return results

    def _run_together(self, images: Tensor, rows: Sequence[LoadedTask], sizes: Sizes) -> list[Any]:
        source, last = TaskBatch(self.vit, rows), max(task.last for task in rows)
        out_indices = {index for task in rows for index in task.model.out_indices}
        ((tokens, position),) = run_images(self.vit, images, [0])
        tokens, maps = self._run(tokens, position, source, (0, last), grid_size(self.vit, images), out_indices)
        pools = any(task.model.pools_features for task in rows)
        features = pool(self.vit, tokens, source.num_carried) if pools else tokens
        results: dict[int, Any] = {}
        for task, where in _group(rows).items():
            own = [maps[index][where] for index in task.model.out_indices]
            found = task.model.forward_head(own or features[where], [sizes[index] for index in where])
            results |= zip(where, found, strict=True)
        return [results[index] for index in range(len(rows))]

    def _run(
        self,
        tokens: Tensor,
        position: Tensor | None,
        source: PromptSource,
        blocks: tuple[int, int],
        grid: tuple[int, int],
        out_indices: Iterable[int],
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run blocks, the last excluded; return the tokens behind them, and the maps after those of `out_indices`."""
        first, last = blocks
        inside = sorted(index for index in out_indices if first <= index < last)
        num_read = self._num_read(len(self.vit.blocks) - 1 in inside)
        maps = {}
        for stop in sorted({*(index + 1 for index in inside), last}):
            tokens = run_blocks(self.vit, tokens, position, source, first=first, last=stop, num_read=num_read)
            if stop - 1 in inside:
                maps[stop - 1] = feature_map(self.vit, tokens, grid, source.num_carried)
            first = stop
        return tokens, maps

    def _num_read(self, reads_map: bool) -> int | None:
        """Tokens that are read after the last block; None, all, if a map or patch tokens are needed."""
        return self.vit.num_prefix_tokens if pools_prefix_only(self.vit) and not reads_map else None

    def _shared(self, tasks: Iterable[LoadedTask]) -> set[LoadedTask]:
        return {task for task in tasks if task.is_shared} if self._is_fast() else set()

    def _is_fast(self) -> bool:
        """Whether all blocks support the fast path; checked in each call, since hooks may be added or removed."""
        return all(why_not_fast(block) is None for block in self.vit.blocks)

    def _read(self, path: str | Path) -> LoadedTask:
        model, metadata = put_task(path, self.vit, shares=True)
        is_shared = self._is_fast() and not metadata.tuned_backbone
        return LoadedTask(model, metadata, keys_values_of(model) if is_shared else {}, is_shared)

    def _check_free(self, name: str) -> None:
        if name in self._tasks:
            raise ValueError(f"name={name}: is loaded already; swap it, or use another name")

    def _prepare(self, images: Tensor, tasks: Tasks) -> Tensor:
        """Images on the device, refused if a task takes others."""
        check_images(images)
        for name, task in tasks.items():
            size = tuple(task.metadata.preprocessing["size"])
            if tuple(images.shape[-2:]) != size:
                raise ValueError(f"task {name} takes images of {size} px, got {tuple(images.shape[-2:])}")
        return images.to(self.device)


def _find(held: Tasks, names: Iterable[str]) -> dict[str, LoadedTask]:
    for name in names:
        if name not in held:
            raise ValueError(f"there is no task {name}; loaded: {', '.join(held) or 'none'}")
    return {name: held[name] for name in names}


def _group(rows: Sequence[LoadedTask]) -> dict[LoadedTask, list[int]]:
    """The images of each task."""
    groups: dict[LoadedTask, list[int]] = {}
    for index, task in enumerate(rows):
        groups.setdefault(task, []).append(index)
    return groups


def _check_sizes(sizes: Sizes | None, images: Tensor) -> Sizes:
    if sizes is not None and len(sizes) != len(images):
        raise ValueError(f"{len(sizes)} sizes for {len(images)} images; give one for each")
    return sizes if sizes is not None else [(images.shape[-2], images.shape[-1])] * len(images)


def _check_same_preprocessing(tasks: Tasks) -> None:
    wanted = {name: task.metadata.preprocessing for name, task in tasks.items()}
    for name, preprocessing in wanted.items():
        first = next(iter(wanted))
        one, other = ({**DECODING, **values} for values in (wanted[first], preprocessing))
        if odd := [field for field, value in other.items() if value != one[field]]:
            raise ValueError(
                f"tasks {first} and {name} require different preprocessing "
                f"({odd[0]} {one[odd[0]]} and {other[odd[0]]}); call `every` for each of them"
            )
