"""Image files of a folder: which files are images, and which look like images but cannot be read."""

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vpt.data.images import EXTENSIONS, OPTIONAL, PLUG_INS, ImageError, check_image

# Image files that Pillow cannot read without more; they are left out and counted.
UNREAD = frozenset(
    {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2", ".exr", ".hdr", ".ico", ".psd", ".svg", ".tga"}
    | {ending for _, endings in (*OPTIONAL.values(), *PLUG_INS.values()) for ending in endings}
)
IGNORED_FOLDERS = frozenset(
    {"__macosx", "__pycache__", "$recycle.bin", "system volume information", "lost+found", "@eadir"}
)


def find_images(path: str | Path, left_out: list[Path] | None = None) -> list[Path]:
    """The image files of a folder and its subfolders, sorted, without hidden ones; a file is returned as it is.

    Files that look like images, but cannot be read (`UNREAD`, or an image whose name has no extension), are added to
    `left_out`. Hidden folders and those of systems, such as `__MACOSX`, are ignored. Links to folders are followed, but
    no folder is read twice. A name that does not exist may be a pattern, such as `photos/**/*.jpg`: it returns the
    images that match, and those in folders that match; `**` matches any number of folders, but no links.

    Raises:
        FileNotFoundError: There is neither a file nor a folder of this name, or no image matches.
        ValueError: The pattern is invalid.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _walk(path, left_out)
    folder, pattern = split_pattern(path)
    if not pattern:
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        matches = list(folder.glob(pattern))
    except ValueError as error:  # "**.jpg"
        raise ValueError(f"{path}: {error}") from error
    found: set[Path] = set()
    for match in matches:
        if not any(map(is_ignored, match.relative_to(folder).parts)):
            found.update(_walk(match, left_out) if match.is_dir() else _only_images([match], left_out))
    if not found:
        hint = f"; {describe_unread(left_out)}" if left_out else f" ({', '.join(sorted(EXTENSIONS))})"
        raise FileNotFoundError(f"{path}: matches no image{hint}")
    return sorted(found)


def split_pattern(path: Path) -> tuple[Path, str]:
    """The folder that a pattern starts from, and the rest, or ""; names that exist are taken literally.

    Example:
        >>> split_pattern(Path("photos/20*/**/*.jpg"))
        (PosixPath('photos'), '20*/**/*.jpg')
    """
    folder = Path(path.anchor)
    parts = path.parts[1:] if path.anchor else path.parts
    for index, part in enumerate(parts):
        if any(character in part for character in "*?[") and not (folder / part).exists():
            return folder, str(Path(*parts[index:]))
        folder = folder / part
    return folder, ""


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or a system's own, and no data."""
    return name.startswith(".") or name.lower() in IGNORED_FOLDERS


def describe_unread(paths: Sequence[Path]) -> str:
    """How many image files are left out, by extension, and what to do.

    Example:
        >>> describe_unread([Path("a.HEIC"), Path("b.heic"), Path("c.psd")])
        '3 image files cannot be read: 2 .heic, 1 .psd; save them as .jpg or .png, or pip install pillow-heif'
    """
    counts = Counter(path.suffix.lower() or "without an extension" for path in paths)
    listed = ", ".join(f"{number:,} {ending}" for ending, number in counts.most_common())
    plug_ins = [name for name, (_, endings) in PLUG_INS.items() if endings & counts.keys()]
    advice = "".join(f", or pip install {name.replace('_', '-')}" for name in plug_ins)
    files = "1 image file" if len(paths) == 1 else f"{len(paths):,} image files"
    return f"{files} cannot be read: {listed}; save them as .jpg or .png{advice}"


def _walk(folder: Path, left_out: list[Path] | None = None) -> list[Path]:
    found, visited = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        found += [Path(parent, name) for name in files if not is_ignored(name)]
    return _only_images(sorted(found), left_out)


def _only_images(paths: Sequence[Path], left_out: list[Path] | None) -> list[Path]:
    """The paths that end like images; others that hold an image are added to `left_out`."""
    if left_out is not None:
        left_out += [path for path in paths if _is_unread(path)]
    return [path for path in paths if path.suffix.lower() in EXTENSIONS]


def _is_unread(path: Path) -> bool:
    if path.suffix:
        return path.suffix.lower() in UNREAD - EXTENSIONS
    with suppress(ImageError):
        check_image(path)
        return True
    return False
