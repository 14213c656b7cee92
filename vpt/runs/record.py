"""The record of the data and files that a run was made from, and what has changed since.

It is a file of JSON lines in the run folder: the classes and the files of weights, then a line for each image with its
name, split, bytes, modification time (ns) and labels; about 100 bytes an image. The content of images is not read.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpt.config.schema import Config
from vpt.data.samples import Samples
from vpt.engine.console import warn
from vpt.storage.files import write_chunks

RECORD = "data.jsonl"

Entry = list[Any]  # of an image: split, bytes, time, labels; of a file: bytes, time, sha256


@dataclass(frozen=True)
class Record:
    """Classes, images by name, and files by config key."""

    classes: list[str]
    files: dict[str, Entry]
    images: dict[str, Entry]


def record_of(config: Config, splits: Mapping[str, Samples], known: Record | None = None) -> Record:
    """The record of the samples and of the files that the config names.

    A file with the bytes and the time of the record `known` is not read again for its sha256.

    Raises:
        OSError: A file or an image does not exist.
    """
    images: dict[str, Entry] = {}
    for split, samples in splits.items():
        for index, name in enumerate(samples.names):
            size_and_time = _size_and_time(samples.paths[index]) if samples.paths else [None, None]
            key = f"{name} ({split})" if name in images else name
            images[key] = [split, *size_and_time, samples.label_text(index)]
    paths = {"backbone.checkpoint": config.backbone.checkpoint, "prompt.init_from": config.prompt.init_from}
    files = {}
    for key, path in paths.items():
        if path is not None:
            files[key] = _entry_of(Path(path).expanduser(), [] if known is None else known.files.get(key, []))
    return Record(list(next(iter(splits.values())).classes), files, images)


def write_record(folder: Path, record: Record) -> None:
    """Write a record to a run folder."""
    lines = [{"version": 1, "classes": record.classes, "files": record.files}, *record.images.items()]
    write_chunks(folder / RECORD, (f"{json.dumps(line)}\n".encode() for line in lines))


def read_record(folder: Path) -> Record | None:
    """The record in a run folder; None if it has none, as in version 0.1, or, with a warning, if it is damaged."""
    try:
        with (folder / RECORD).open(encoding="utf-8") as file:
            first, *images = map(json.loads, file)
        return Record(list(first["classes"]), dict(first["files"]), dict(images))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        warn(f"{folder / RECORD}: damaged ({error!r})")
        return None


def changes(before: Record, now: Record) -> list[str]:
    """What has changed, in words, of what decides the result of a run; empty for nothing."""
    both = [(name, before.images[name], now.images[name]) for name in before.images if name in now.images]
    counted = {
        "images added": [name for name in now.images if name not in before.images],
        "images removed": [name for name in before.images if name not in now.images],
        "images of other bytes": [name for name, old, new in both if old[1] != new[1]],
        "images in another split": [f"{name}: {old[0]}, now {new[0]}" for name, old, new in both if old[0] != new[0]],
        "images with other labels": [f"{name}: {old[3]}, now {new[3]}" for name, old, new in both if old[3] != new[3]],
        "classes added": [name for name in now.classes if name not in before.classes],
        "classes removed": [name for name in before.classes if name not in now.classes],
    }
    found = [f"{what}: {len(names):,} ({_first(names)})" for what, names in counted.items() if names]
    if not found and list(before.images) != list(now.images):
        found.append("the images are in another order")
    if not found and before.classes != now.classes:
        found.append("the classes are in another order")
    keys = [key for key in {**before.files, **now.files} if before.files.get(key, [])[2:] != now.files.get(key, [])[2:]]
    return found + [f"the file of {key} has another content" for key in keys]


def touched(before: Record, now: Record) -> list[str]:
    """The names of images with other modification times and the same bytes, whose content may have changed."""
    return [name for name, entry in now.images.items() if before.images.get(name, entry)[2] != entry[2]]


def _size_and_time(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _entry_of(path: Path, known: Sequence[Any]) -> Entry:
    found = _size_and_time(path)
    if list(known[:2]) == found:
        return list(known)
    with path.open("rb") as file:
        return [*found, hashlib.file_digest(file, "sha256").hexdigest()]


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
