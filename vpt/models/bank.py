"""TaskBank: one frozen backbone in memory, and any number of tasks that it serves, mixed in a batch.

Legend: B images, N tokens in the sequence, D embed_dim, K classes of a task.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpt.models.attention import run_block, why_not_fast
from vpt.models.detector import DetectionModel, Selection, Sizes
from vpt.models.task_batch import HeldTask, Maps, Mix, keys_values_of
from vpt.models.task_file import put_task, task_tensors
from vpt.models.task_schema import TaskMetadata
from vpt.models.vit import ViT, check_supported, embed, load_vit, pools_prefix_only, rope_and_bias

Tasks = Mapping[str, HeldTask]


class TaskBank:
    """Tasks by name on one frozen backbone, for inference.

    Any thread may load, swap and remove tasks while others infer: a call sees the tasks as they were when it began.
    Results are those of `load_task`, up to the rounding of another order of additions.

    Args:
        backbone: A timm ViT in memory, or the timm name of one; it is held, frozen and in eval mode.
        device: Where backbone and tasks are.
        checkpoint: With a name: load the backbone's weights from this file.
        img_size: With a name: input size in pixels, one side or (height, width); None keeps the model's own.
        dtype: With a name: hold the backbone's weights in this dtype, such as torch.bfloat16.

    Raises:
        ValueError, TypeError, FileNotFoundError: As `load_vit` raises them.

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
        """Read a task file; return the task's name.

        Args:
            path: The task file.
            name: What the task will be called; by default as the file, without its ending.

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
        """Put the task of another file in the place of a task, at once.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: There is no such task, or the file cannot be used; the old task stays.
        """
        _find(self._tasks, [name])
        task = self._read(path)
        with self._lock:
            _find(self._tasks, [name])
            self._tasks = {**self._tasks, name: task}

    def remove(self, name: str) -> None:
        """Forget a task.

        Raises:
            ValueError: There is no such task.
        """
        with self._lock:
            _find(self._tasks, [name])
            self._tasks = {held: task for held, task in self._tasks.items() if held != name}

    def metadata(self, name: str) -> TaskMetadata:
        """What the file of a task says of itself; how its pictures are prepared, above all."""
        return _find(self._tasks, [name])[name].metadata

    def num_bytes(self, name: str) -> int:
        """Memory that a task takes beside the backbone: prompt, keys and values of it, neck, head, tuned parameters."""
        task = _find(self._tasks, [name])[name]
        kept = {id(part): part for pair in task.keys_values.values() for part in pair}
        return sum(tensor.nbytes for tensor in (*kept.values(), *task_tensors(task.model).values()))

    def is_shared(self, name: str) -> bool:
        """Whether images of a task go through the backbone together with those of other tasks.

        Raises:
            ValueError: There is no such task.
        """
        return _find(self._tasks, [name])[name].is_shared

    def select(self, name: str, selection: Selection) -> None:
        """Say which detections a task gives out from now on.

        Raises:
            ValueError: There is no such task, it finds no boxes, or the selection names labels that it has not.
        """
        model = _find(self._tasks, [name])[name].model
        if not isinstance(model, DetectionModel):
            raise ValueError(f"task {name} is of kind classification and finds no boxes")
        model.selection = selection

    @torch.inference_mode()
    def __call__(self, images: Tensor, tasks: str | Sequence[str], *, sizes: Sizes | None = None) -> Any:
        """Run each image with its own task, all in one pass through the backbone.

        Tasks with tuned parameters of the backbone take a pass of their own. So does each task if the backbone has a
        block that `attention.why_not_fast` does not understand.

        Args:
            images: (B, 3, H, W), each prepared as its task wants it.
            tasks: The task of all images, or one name for each.
            sizes: Of each image: height and width of what is picture in it, for detection; boxes end there.

        Returns:
            For one name: logits (B, K), or a list of B detections. For a list of names: a list of B results, logits
            (K,) or detections, each of its own task. Detections are what `DetectionModel` gives.

        Raises:
            ValueError: There is no such task, not one name for each image, or images of another size than a task's.
        """
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        held = _find(self._tasks, names)
        images = self._prepare(images, held)
        sizes = _check_sizes(sizes, images)
        if isinstance(tasks, str):
            return self._run_alone(images, held[tasks], sizes)
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
                results |= zip(where, task.run(images[where], [sizes[index] for index in where]), strict=True)
        return [results[index] for index in range(len(rows))]

    @torch.inference_mode()
    def every(
        self, images: Tensor, names: str | Sequence[str] | None = None, *, sizes: Sizes | None = None
    ) -> dict[str, Any]:
        """Run each image with every task; blocks before a task's first prompted one run once for all tasks.

        Args:
            images: (B, 3, H, W), prepared as all of these tasks want it.
            names: The tasks; None is all of them.
            sizes: As for a call.

        Returns:
            What a call with one name gives, by name.

        Raises:
            ValueError: There is no such task, or tasks want their images prepared differently.
        """
        held = self._tasks
        tasks = _find(held, held if names is None else [names] if isinstance(names, str) else names)
        _check_same_preprocessing(tasks)
        images = self._prepare(images, tasks)
        sizes = _check_sizes(sizes, images)
        shared = self._shared(tasks.values())
        results = {name: task.run(images, sizes) for name, task in tasks.items() if task not in shared}
        results |= self._branch(images, {name: tasks[name] for name in tasks if name not in results}, sizes)
        return {name: results[name] for name in tasks}

    def _branch(self, images: Tensor, tasks: Tasks, sizes: Sizes) -> dict[str, Any]:
        """Each task from its first prompted block on, on tokens of a trunk that no prompt has entered yet."""
        if not tasks:
            return {}
        trunk, position = embed(self.vit, images)
        grid, reached = self._grid(images), 0
        taps = {tap for task in tasks.values() for tap in task.taps}
        results: dict[str, Any] = {}
        maps: Maps = {}
        for name, task in sorted(tasks.items(), key=lambda item: min(item[1].first, item[1].last)):
            first = min(task.first, task.last)
            trunk, of_trunk = self._run(trunk, position, self._mix([]), range(reached, first), grid, taps)
            reached, maps = first, maps | of_trunk
            mix = self._mix([task] * len(images))
            tokens, own = self._run(mix.insert(trunk), position, mix, range(first, task.last), grid, task.taps)
            features = None if task.taps else self._pool(mix.remove(tokens))
            results[name] = task.finish(features, maps | own, sizes)
        return results

    def _run_alone(self, images: Tensor, task: HeldTask, sizes: Sizes) -> Any:
        """What one task makes of all images: logits (B, K), or B detections."""
        is_shared = task in self._shared([task])
        return self._branch(images, {"": task}, sizes)[""] if is_shared else task.run(images, sizes)

    def _run_together(self, images: Tensor, rows: Sequence[HeldTask], sizes: Sizes) -> list[Any]:
        """The result of each image, in one pass."""
        tokens, position = embed(self.vit, images)
        mix, last = self._mix(rows), max(task.last for task in rows)
        taps = {tap for task in rows for tap in task.taps}
        tokens, maps = self._run(mix.insert(tokens), position, mix, range(last), self._grid(images), taps)
        features = self._pool(mix.remove(tokens)) if any(not task.taps for task in rows) else None
        results: dict[int, Any] = {}
        for task, where in _group(rows).items():
            own = {tap: maps[tap][where] for tap in task.taps}
            of_task = None if features is None else features[where]
            results |= zip(where, task.finish(of_task, own, [sizes[index] for index in where]), strict=True)
        return [results[index] for index in range(len(rows))]

    def _run(
        self,
        tokens: Tensor,
        position: Tensor | None,
        mix: Mix,
        blocks: Iterable[int],
        grid: tuple[int, int],
        taps: Iterable[int],
    ) -> tuple[Tensor, Maps]:
        """Run some blocks on tokens (B, N, D), the mix's slots among them; keep the patch tokens after taps."""
        prefix, maps = self.vit.num_prefix_tokens, Maps()
        for index in blocks:
            is_read_whole = index < len(self.vit.blocks) - 1 or index in taps or not pools_prefix_only(self.vit)
            num_read = None if is_read_whole else prefix
            keys_values, mask = mix.at(index, num_read, tokens)
            rope, bias = rope_and_bias(self.vit, index, position, mix.num_slots)
            block = self.vit.blocks[index]
            tokens = run_block(block, tokens, keys_values, rope=rope, bias=bias, mask=mask, num_queries=num_read)
            if index in taps:
                maps[index] = torch.unflatten(tokens[:, prefix + mix.num_slots :].mT, 2, grid)
        return tokens, maps

    def _mix(self, rows: Sequence[HeldTask]) -> Mix:
        return Mix(rows, self.vit.num_prefix_tokens)

    def _pool(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.vit.forward_head(self.vit.norm(tokens), pre_logits=True)
        return features

    def _grid(self, images: Tensor) -> tuple[int, int]:
        rows, columns = self.vit.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        return int(rows), int(columns)

    def _shared(self, tasks: Iterable[HeldTask]) -> set[HeldTask]:
        """The tasks that may go through the backbone together now."""
        return {task for task in tasks if task.is_shared} if self._is_understood() else set()

    def _is_understood(self) -> bool:
        """Whether prompts may be keys and values in every block; asked anew, since adapters and hooks come and go."""
        return all(why_not_fast(block) is None for block in self.vit.blocks)

    def _read(self, path: str | Path) -> HeldTask:
        model, metadata = put_task(path, self.vit, shares=True)
        is_shared = self._is_understood() and not metadata.tuned_backbone
        return HeldTask(model, metadata, keys_values_of(model) if is_shared else {}, is_shared)

    def _check_free(self, name: str) -> None:
        if name in self._tasks:
            raise ValueError(f"there is a task {name} already; swap it, or load the new one under another name")

    def _prepare(self, images: Tensor, tasks: Tasks) -> Tensor:
        """Images on the device, refused if a task takes others."""
        if images.ndim != 4:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        for name, task in tasks.items():
            size = tuple(task.metadata.preprocessing["size"])
            if tuple(images.shape[-2:]) != size:
                raise ValueError(f"task {name} takes images of {size} px, got {tuple(images.shape[-2:])}")
        return images.to(self.device)


def _find(held: Tasks, names: Iterable[str]) -> dict[str, HeldTask]:
    """The tasks of some names."""
    for name in names:
        if name not in held:
            raise ValueError(f"there is no task {name}; loaded: {', '.join(held) or 'none'}")
    return {name: held[name] for name in names}


def _group(rows: Sequence[HeldTask]) -> dict[HeldTask, list[int]]:
    """The images of each task."""
    groups: dict[HeldTask, list[int]] = {}
    for index, task in enumerate(rows):
        groups.setdefault(task, []).append(index)
    return groups


def _check_sizes(sizes: Sizes | None, images: Tensor) -> Sizes:
    if sizes is not None and len(sizes) != len(images):
        raise ValueError(f"{len(sizes)} sizes for {len(images)} images; give one for each")
    return sizes if sizes is not None else [(images.shape[-2], images.shape[-1])] * len(images)


def _check_same_preprocessing(tasks: Tasks) -> None:
    """Refuse tasks that cannot look at the same images."""
    wanted = {name: task.metadata.preprocessing for name, task in tasks.items()}
    for name, preprocessing in wanted.items():
        first = next(iter(wanted))
        odd = [field for field, value in preprocessing.items() if value != wanted[first][field]]
        if odd:
            raise ValueError(
                f"tasks {first} and {name} want their images prepared differently "
                f"({odd[0]} {wanted[first][odd[0]]} and {preprocessing[odd[0]]}); call every for each apart"
            )
