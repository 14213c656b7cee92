"""python -m vpt.tasks list|show|verify|convert PATH: list, show, check and convert task files."""

import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.config.command_line import INTERRUPTED, check_file, check_folder, escape_output, fail, parse_options
from vpt.config.errors import ConfigError, config_keys, did_you_mean
from vpt.config.help import HELP, answer_help, describe_options, print_help
from vpt.config.schema import option
from vpt.storage.text import printable

if TYPE_CHECKING:
    from torch import Tensor

    from vpt.models.task_schema import TaskMetadata
    from vpt.models.vit import ViT

REFUSED = 1

USAGE = """python -m vpt.tasks: list, show, check and convert task files.

The task file of a run is task.safetensors in the run's folder; its checkpoints are not task files, and are ignored.
FILE may also be adapter_model.safetensors of a PEFT-style folder. Existing files are never overwritten.
The exit code of list and verify is 1 if any file is refused.
Example: python -m vpt.tasks convert runs/quickstart/task.safetensors fruit.safetensors dtype=fp16"""


@dataclass
class NoOptions:
    """`list` and `show` have no options."""


@dataclass
class VerifyOptions:
    """Options of `python -m vpt.tasks verify`."""

    backbone: str | None = option(None, "also load it onto this backbone, a timm name", shown="NAME")
    checkpoint: str | None = option(None, "weights of the backbone", shown="FILE")


@dataclass
class ConvertOptions:
    """Options of `python -m vpt.tasks convert`; the last four are for a .pth only."""

    dtype: str | None = option(None, "that of IN by default", choices=("fp32", "fp16", "bf16"))
    format: str | None = option(None, "of OUT, if its name is ambiguous", choices=("task", "peft"))
    backbone: str | None = option(None, "of a .pth: the backbone that it was trained on", shown="NAME")
    checkpoint: str | None = option(None, "of a .pth: weights of the backbone", shown="FILE")
    num_classes: int | None = option(None, "of a .pth without a head; the head of OUT is then zero", low=1, shown="K")
    crop_mode: str | None = option(None, "of a .pth: center as for FGVC, squash as for VTAB")


def main() -> None:
    """Read the subcommand and its options, and run it."""
    escape_output()
    try:
        is_ok = run(sys.argv[1:])
    except KeyboardInterrupt:
        fail(RuntimeError("interrupted; nothing was written"), INTERRUPTED)
    except (ValueError, TypeError, OSError) as error:
        fail(ConfigError(_printable(str(error))))
    if not is_ok:
        sys.exit(REFUSED)


def run(arguments: Sequence[str]) -> bool:
    """Run a subcommand; False if a file was refused."""
    name, *words = arguments or [""]
    options = {entry.name: entry for _, schema, _ in COMMANDS.values() for entry in fields(schema)}
    answer_help([word for word in arguments if word not in COMMANDS], options)
    if not name or HELP & set(arguments):
        print_help(_overview(), USAGE)
    if name not in COMMANDS:
        raise ConfigError(f"{name}: not a command of vpt.tasks{did_you_mean(name, list(COMMANDS))}")
    places, schema, command = COMMANDS[name]
    rest = words[len(places) :]
    if len(words) < len(places):
        raise ConfigError(f"{name} needs {' and '.join(places)}: run python -m vpt.tasks {name} {' '.join(places)}")
    if rest and schema is NoOptions:
        raise ConfigError(f"{rest[0]}: {name} takes only {places[0]}")
    return command(*(Path(word).expanduser() for word in words[: len(places)]), parse_options(schema, rest, USAGE))


def list_tasks(folder: Path, _: NoOptions) -> bool:
    """Print a table of the task files of a folder, then those that are refused; False if any is.

    Those of runs with `mode=dry` are only counted: two steps are no result.
    """
    from vpt.engine.console import format_table

    rows, refused, num_dry = [], [], 0
    for file in _find(folder):
        try:
            metadata, tensors = _open(file)
            if (metadata.config or {}).get("mode") == "dry":
                num_dry += 1
                continue
            cells = [metadata.task_type, metadata.backbone, _prompt(metadata), str(metadata.num_classes)]
            cells += [f"{file.stat().st_size / 1000:,.0f}", _dtypes(tensors), _metric(metadata)]
            rows.append([_name(file, folder), *cells])
        except (ValueError, OSError) as error:
            refused.append(f"refused: {_without_path(file, folder, error)}")
    if rows:
        header = ["file", "task type", "backbone", "prompt", "classes", "kB", "dtype", "best known metric"]
        _print(format_table([[_line(cell) for cell in row] for row in rows], header))
    if num_dry:
        _print(f"left out: {num_dry:,} of dry runs (mode=dry)")
    for line in refused:
        _print(_line(line))
    return not refused


def show_task(file: Path, _: NoOptions) -> bool:
    """Print the metadata of a task file, its tensors, and its config."""
    import json

    from vpt.engine.console import format_table

    metadata, tensors = _open(file)
    fields = metadata.to_json()
    config = fields.pop("config")
    width = max(map(len, fields))
    for name, value in fields.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        _print(f"{name:<{width}}  {_line(text)}")
    rows = [[_line(name), str(list(x.shape)), _dtype_name(x), f"{x.nbytes:,}"] for name, x in sorted(tensors.items())]
    rows.append(["all tensors", "", "", f"{sum(tensor.nbytes for tensor in tensors.values()):,}"])
    table = format_table(rows, ["tensor", "shape", "dtype", "bytes"])
    _print(f"\n{table}\n\n{file.stat().st_size:,} bytes in the file")
    if config is not None:
        _print(f"\nconfig\n{json.dumps(config, indent=2, ensure_ascii=False)}")
    return True


def verify_tasks(path: Path, options: VerifyOptions) -> bool:
    """Check a task file, or all of a folder, and print a line for each; False if any is refused."""
    if options.checkpoint is not None and options.backbone is None:
        raise ConfigError(f"checkpoint={options.checkpoint}: add backbone=NAME, which they belong to")
    files, is_ok = _find(path), True
    load = None if options.backbone is None else _loader(options.backbone, options.checkpoint)
    for file in files:
        try:
            _verify(file, load)
            _print(f"ok       {_line(_name(file, path))}")
        except (ValueError, TypeError, OSError) as error:
            is_ok = False
            _print(f"refused  {_line(_without_path(file, path, error))}")
    return is_ok


def convert_task(source: Path, target: Path, options: ConvertOptions) -> bool:
    """Write a task as a task file or a PEFT-style folder, and print the result."""
    from vpt.models.task_file import to_dtype, write_task
    from vpt.tasks.conversion import DTYPES, write_folder
    from vpt.tasks.peft_folder import why_no_peft_folder, write_peft_folder

    is_file = _check_target(target, options)
    is_original = _check_source(source, options)
    metadata, tensors = _read_original(source, options) if is_original else _open(source)
    try:
        tensors = tensors if options.dtype is None else to_dtype(tensors, DTYPES[options.dtype])
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error
    is_for_peft = not is_file and why_no_peft_folder(metadata) is None
    write = write_task if is_file else write_peft_folder if is_for_peft else write_folder
    written = write(target, metadata, tensors)
    kilobytes = sum(tensor.nbytes for tensor in tensors.values()) / 1000
    _print(f"{written} written ({kilobytes:,.0f} kB of tensors, {_dtypes(tensors)})")
    if is_for_peft:
        _print("note: PEFT reads this folder, but it cannot be converted back; keep the task file")
    if is_original and metadata.note:
        _print(f"note: {_line(metadata.note)}")
    return True


COMMANDS: dict[str, tuple[tuple[str, ...], type[Any], Callable[..., bool]]] = {
    "list": (("DIR",), NoOptions, list_tasks),
    "show": (("FILE",), NoOptions, show_task),
    "verify": (("FILE|DIR",), VerifyOptions, verify_tasks),
    "convert": (("IN", "OUT"), ConvertOptions, convert_task),
}
ABOUT = {
    "list": "a table of the task files in a folder and its sub-folders",
    "show": "metadata and tensors of a task file",
    "verify": "all checks, a line for each file: ok, or refused with the reason",
    "convert": "IN: a task file, a PEFT-style folder, or a .pth of the original VPT code; OUT: a new task file "
    "(.safetensors), or a new PEFT-style folder",
}


def _overview() -> str:
    lines = []
    for name, (places, schema, _) in COMMANDS.items():
        head = f"  {' '.join([name, *places]):<19}  "
        lines += textwrap.wrap(ABOUT[name], 120, initial_indent=head, subsequent_indent=" " * len(head))
        lines += [describe_options(schema, indent=" " * 6)] if schema is not NoOptions else []
    return "\n".join(lines)


def _find(path: Path) -> list[Path]:
    """The file, or all .safetensors files of a folder and its sub-folders."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{path}: no such file or folder")
    if files := sorted(file for file in path.rglob("*.safetensors") if not file.name.startswith(".")):
        return files
    raise ConfigError(f"{path}: contains no task files (.safetensors)")


def _open(path: Path) -> "tuple[TaskMetadata, dict[str, Tensor]]":
    """Read a task from a file or a PEFT-style folder."""
    from vpt.models.task_file import open_task
    from vpt.tasks.conversion import WEIGHTS_NAME, read_folder

    if path.is_dir():
        return read_folder(path)
    return read_folder(path.parent) if path.name == WEIGHTS_NAME else open_task(path)


def _verify(file: Path, load: "Callable[[tuple[int, int]], ViT] | None") -> None:
    from vpt.models.task_file import load_task

    metadata, tensors = _open(file)
    if odd := sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()):
        raise ValueError(f"{file}: {odd[0]} contains nan or inf; train again")
    if load is not None:
        load_task(file, load(tuple(metadata.preprocessing["size"])))


def _loader(backbone: str, checkpoint: str | None) -> "Callable[[tuple[int, int]], ViT]":
    """A cached function from an input size to the backbone; an unknown backbone is an error now."""
    from functools import cache

    from vpt.models.vit import load_vit, preprocessing_of

    with config_keys(name="backbone"):
        first = load_vit(backbone, checkpoint=checkpoint)

    @cache
    def load(size: tuple[int, int]) -> "ViT":
        if list(size) == preprocessing_of(first)["size"]:
            return first
        return load_vit(backbone, checkpoint=checkpoint, img_size=size)

    return load


def _check_source(source: Path, options: ConvertOptions) -> bool:
    """Whether the source of a conversion is a .pth of the original code; refuse its options for other sources."""
    from vpt.tasks.conversion import PICKLE_ENDINGS

    is_original = source.suffix.lower() in PICKLE_ENDINGS and not source.is_dir()
    for key in ("backbone", "checkpoint", "num_classes", "crop_mode"):
        if (value := getattr(options, key)) is not None and not is_original:
            raise ConfigError(f"{key}={value} is for a .pth of the original code, not for {source}; remove it")
    return is_original


def _check_target(target: Path, options: ConvertOptions) -> bool:
    """Whether the target of a conversion is a file and not a folder; refuse one that exists or cannot be written."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ConfigError(f"{target}: exists already; name another output")
    if options.format is None and target.suffix.lower() not in ("", ".safetensors"):
        raise ConfigError(f"{target}: must end in .safetensors; for a folder, add format=peft")
    is_file = options.format == "task" or (options.format is None and target.suffix != "")
    if is_file:
        check_file("OUT", target, (".safetensors",))
    else:
        check_folder("OUT", target)
    return is_file


def _read_original(path: Path, options: ConvertOptions) -> "tuple[TaskMetadata, dict[str, Tensor]]":
    from vpt.models.vit import load_vit
    from vpt.tasks.conversion import read_original, task_of

    if options.backbone is None:
        example = "backbone=vit_base_patch16_224.orig_in21k"
        raise ConfigError(f"{path}: backbone is required; add its timm name, such as {example}")
    original = read_original(path)
    if original.head is None and options.num_classes is None:
        raise ConfigError(f"{path}: has prompts but no head; add num_classes=K, for a head of zeros")
    with config_keys(name="backbone"):
        vit = load_vit(options.backbone, checkpoint=options.checkpoint)
    crop: dict[str, Any] = {} if options.crop_mode is None else {"crop_mode": options.crop_mode}
    return task_of(original, vit, num_classes=options.num_classes, **crop)


def _prompt(metadata: "TaskMetadata") -> str:
    from vpt.models.prompts import format_blocks

    prompt = metadata.prompt
    text = "none" if prompt is None else f"{prompt['kind']}, P={prompt['num_tokens']}"
    if prompt is not None and prompt["kind"] != "shallow":
        text += f", blocks {format_blocks(prompt['blocks'])}"
    if metadata.adapters is not None:
        return f"{text}, {metadata.adapters['method']} adapters"
    return f"{text}, backbone tuned" if metadata.tuned_backbone else text


def _metric(metadata: "TaskMetadata") -> str:
    """The main metric of the task, on test if available."""
    from vpt.engine.console import percent
    from vpt.task_types.base import task_type_named

    main = task_type_named(metadata.task_type).main_metric
    for split in ("test", "val", *metadata.metrics):
        if (value := metadata.metrics.get(split, {}).get(main)) is not None:
            return f"{split} {main} {percent(value)}"
    return "unknown"


def _dtype_name(tensor: "Tensor") -> str:
    from vpt.tasks.conversion import DTYPES

    return next(name for name, dtype in DTYPES.items() if dtype is tensor.dtype)


def _dtypes(tensors: "dict[str, Tensor]") -> str:
    return "+".join(sorted({_dtype_name(tensor) for tensor in tensors.values()}))


def _name(file: Path, root: Path) -> str:
    return str(file) if file == root else file.relative_to(root).as_posix()


def _without_path(file: Path, root: Path, error: Exception) -> str:
    return f"{_name(file, root)}: {str(error).removeprefix(f'{file}: ')}"


def _line(text: str) -> str:
    """An untrusted text on one line."""
    return " ".join(text.split())


def _printable(text: str) -> str:
    """A text of lines without control characters, which could control the terminal."""
    return "\n".join(map(printable, text.split("\n")))


def _print(text: str) -> None:
    print(_printable(text))


if __name__ == "__main__":
    main()
