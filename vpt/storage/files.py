"""Atomic files: written under a temporary name, synced and renamed; tensors with a sha256."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

MAX_BYTES = 2 * 1024**3
MAX_HEADER = 16 * 1024**2  # bytes of the JSON before the tensors
UNSEALED = "0" * 64  # in place of the sha256 in the text that is hashed
DTYPES = {  # names in safetensors
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: a reader sees the old file or the new one."""
    write_chunks(path, [data])


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview], num_bytes: int = 0) -> None:
    """Write `chunks` to `path` atomically: a reader sees the old file or the new one.

    A missing folder is created. The content may be computed while it is written; `num_bytes`, those of all chunks, are
    reserved before, so that a full disk is noticed early.

    Raises:
        OSError: The disk is full, or the folder cannot be written to; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            if num_bytes:
                reserve(file.fileno(), num_bytes)
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.umask(mask := os.umask(0))
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
    _sync_folder(path.parent)


def replace(path: Path, target: Path) -> None:
    """Rename a file within its folder, durably; an existing target is replaced."""
    path.replace(target)
    _sync_folder(target.parent)


def reserve(handle: int, num_bytes: int) -> None:
    """Make an open file `num_bytes` long, and allocate them on the disk where the system can.

    Raises:
        OSError: The disk is full; without the allocation a later write to a memory map would kill the process.
    """
    os.ftruncate(handle, num_bytes)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(handle, 0, num_bytes)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON; nan and inf become null."""
    write_bytes(path, (json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata as one safetensors file, with a sha256 of both in the metadata.

    Args:
        path: The file; a missing folder is created.
        tensors: Any shapes, of the dtypes in `DTYPES`; copied to the CPU.
        metadata: Plain JSON values, stored under the safetensors metadata key "vpt"; nan and inf become null.
    """
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    described = json.dumps({"sha256": UNSEALED, **finite(metadata)}, ensure_ascii=False, allow_nan=False)
    # One key only: safetensors writes several in an order that changes from process to process.
    write_bytes(path, save(tensors, {"vpt": described.replace(UNSEALED, sha256_of(tensors, described), 1)}))


def read_tensors(path: Path, max_bytes: float = MAX_BYTES) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors, on the CPU, and the metadata that `write_tensors` wrote; math.inf for a file of our own.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a safetensors file of vpt, or was damaged or edited.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path}: larger than {max_bytes} bytes, not a file of vpt")
    with path.open("rb") as file:
        if int.from_bytes(file.read(8), "little") > MAX_HEADER:
            raise ValueError(f"{path}: not a readable safetensors file (its header is larger than {MAX_HEADER} bytes)")
    try:
        with safe_open(path, framework="pt") as opened:
            texts = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    if "vpt" not in texts:
        raise ValueError(f"{path}: a safetensors file, but not one of vpt (no 'vpt' metadata)")
    if len(texts) > 1:
        raise ValueError(f"{path}: has metadata beside 'vpt'; get a fresh copy")
    odd = sorted(name for name, tensor in tensors.items() if tensor.dtype not in DTYPES)
    if odd:
        raise ValueError(f"{path}: {odd[0]} is {tensors[odd[0]].dtype}, not a dtype of vpt")
    described = texts["vpt"]
    metadata = _parse_metadata(path, described)
    sha256 = str(metadata.pop("sha256", ""))
    if sha256 != sha256_of(tensors, described.replace(sha256, UNSEALED, 1)):
        raise ValueError(f"{path}: damaged or edited, its sha256 does not match its content; get a fresh copy")
    return tensors, metadata


def sha256_of(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Digest of a text, and of names, dtypes, shapes and bytes of tensors in the order of their names."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"\n{name} {DTYPES[tensor.dtype]} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _parse_metadata(path: Path, described: str) -> dict[str, Any]:
    try:
        metadata = json.loads(described, object_pairs_hook=_distinct, parse_int=_whole_number)
        json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode()  # fails on nan, inf and lone surrogates
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its 'vpt' metadata is not JSON") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: its 'vpt' metadata is not a JSON object")
    return metadata


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys, of which programs read different ones."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("duplicate key")
    return values


def _whole_number(digits: str) -> int:
    if len(digits) > 20:  # longer than 64 bits
        raise ValueError("number too long")
    return int(digits)


def finite(value: Any) -> Any:
    """The same plain values, with None for nan and inf."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: finite(part) for key, part in value.items()}
        case list() | tuple():
            return [finite(part) for part in value]
    return value


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
