"""Archives of data, extracted so that a stranger's does no harm: zip and tar, with gzip, bzip2 or xz.

Regular files and folders come out, with plain names, inside of one folder, and nothing else: an archive with a link, a
device, a name that leaves the folder or more than the caps allow is refused as a whole. What headers say of sizes is
not believed; bytes are counted as they come. All goes to a hidden folder first, which is renamed when it is whole.
"""

import bz2
import errno
import gzip
import hashlib
import lzma
import re
import shutil
import stat
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz")
MAX_BYTES = 200 * 1024**3  # that come out
MAX_FILES = 2_000_000  # and folders
MAX_RATIO = 200  # of what comes out to the archive; pictures hardly shrink
FREE_BYTES = 64 * 1024**2  # that may come out of an archive whatever their ratio
MAX_NAME = 255  # bytes of a part of a path, as on most disks
MAX_PARTS = 50  # of a path
CHUNK = 1024**2  # bytes
MAX_READ = 16 * CHUNK  # at a time: more is asked for only by the header of a tar, for a name or a comment
LITTER = ("__MACOSX",)  # what macOS adds to a zip, which would look like a class
SPLIT_FOLDERS = ("train", "val", "valid", "validation", "test")
OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}  # by the first bytes of a file

Names = dict[str, tuple[tuple[str, ...], bool]]  # by what cannot be beside it: the parts of a path, and if it is a file


class ArchiveError(ValueError):
    """An archive that is refused; the message names it and says why."""


@dataclass(frozen=True)
class _Member:
    name: str
    content: IO[bytes] | None  # None for a folder


def is_archive(path: str | Path) -> bool:
    """Whether a path looks like that of an archive, by its ending."""
    return str(path).lower().endswith(ENDINGS)


def unpacked(path: Path, cache_dir: str | Path | None = None) -> Path:
    """The folder of data: the path itself, or, if it is an archive, what is in it; extracted once for a content.

    A single folder that wraps all else is left out. If there is a file `photos.zip.sha256` beside `photos.zip`, the
    archive must be the one that it tells of.

    Args:
        path: A folder or an archive.
        cache_dir: Where archives are extracted to; by default beside them.

    Raises:
        ArchiveError: The archive is refused, see `extract`, or is another one than its .sha256 tells of.
        OSError: There is no room, or the folder cannot be written to.
    """
    if not (is_archive(path) and path.is_file()):
        return path
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    _check_digest(path, sha256)
    title = re.sub(r"[^\w-]", "_", path.name.partition(".")[0])[:64]
    folder = (path.parent if cache_dir is None else Path(cache_dir).expanduser()) / f"{title}_{sha256[:16]}"
    if not folder.is_dir():
        extract(path, folder)
    return _unwrap(folder)


def extract(
    archive: str | Path,
    into: str | Path,
    *,
    max_bytes: int = MAX_BYTES,
    max_files: int = MAX_FILES,
    max_ratio: float = MAX_RATIO,
) -> Path:
    """Extract an archive into a folder, whole or not at all; return the folder.

    Files get the rights that any new file gets. What macOS adds (`__MACOSX`) is left out.

    Args:
        archive: A zip, or a tar that may be packed by gzip, bzip2 or xz; its content decides, not its name.
        into: Made when it is missing; in one that is there, files of the same names are replaced.
        max_bytes: Most bytes that may come out.
        max_files: Most files and folders.
        max_ratio: Most bytes that may come out for each byte of the archive, beyond the first 64 MiB.

    Raises:
        ArchiveError: It is damaged or encrypted, holds more than the caps allow, or something that is neither a file
            nor a folder, or a name that is absolute, leaves the folder, has a backslash or control characters, is
            longer than 255 bytes, or is there twice but for upper and lower case.
        OSError: There is no room, or the folder cannot be written to.
    """
    archive, into = Path(archive), Path(into)
    allowed = min(max_bytes, max(FREE_BYTES, int(max_ratio * archive.stat().st_size)))
    into.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=into if into.is_dir() else into.parent, prefix=f".{into.name[:64]}."))
    try:
        temporary.chmod(0o755)
        with _one_line_errors(archive):
            _write(_members(archive, allowed + 2048 * max_files), temporary, allowed, max_files)
        _move(temporary, into)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return into


class Metered:
    """A stream that is read forwards, in moderate pieces, and no further than a limit.

    Args:
        stream: Decompresses as it is read.
        limit: Most bytes.
    """

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self.stream, self.limit = stream, limit
        self.position = 0
        self.last = b""  # what was read last

    def __enter__(self) -> "Metered":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def read(self, size: int = -1) -> bytes:
        """The next bytes; all that are left for -1.

        Raises:
            ArchiveError: They are too many.
        """
        if size > MAX_READ:
            raise ArchiveError("a header claims to be huge")
        if size >= 0:
            self.last = self.stream.read(size)
            self.position += len(self.last)
            if self.position > self.limit:
                raise ArchiveError(f"more than {self.limit:,} bytes come out of it")
            return self.last
        return b"".join(iter(lambda: self.read(CHUNK), b""))

    def tell(self) -> int:
        """How many bytes were read."""
        return self.position

    def seek(self, position: int) -> int:
        """Read on up to a position, or to the end."""
        if position < self.position:
            raise ArchiveError("its parts are not in order")
        while self.position < position and self.read(min(CHUNK, position - self.position)):
            pass
        return self.position


def open_metered(path: str | Path, mode: str = "rb", *, max_ratio: float = MAX_RATIO) -> Metered:
    """A file that may be packed by gzip, bzip2 or xz, to read what was packed, as far as the cap allows."""
    assert mode == "rb"
    path = Path(path)
    return Metered(_decompressed(path), min(MAX_BYTES, max(FREE_BYTES, int(max_ratio * path.stat().st_size))))


def _members(archive: Path, limit: int) -> Iterator[_Member]:
    with archive.open("rb") as file:
        is_zip = file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
    yield from _zip_members(archive) if is_zip else _tar_members(archive, limit)


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as opened:
        if _num_told(archive) not in (0xFFFF, len(opened.infolist()) & 0xFFFF):  # the first: told elsewhere
            raise ArchiveError("its table of contents is damaged")
        for info in opened.infolist():
            name = info.orig_filename  # the other one ends at a NUL
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ArchiveError(f"{name!r} is neither a file nor a folder")
            if info.flag_bits & 1:
                raise ArchiveError(f"{name!r} is encrypted")
            if name.endswith("/") and info.file_size:
                raise ArchiveError(f"{name!r} is a folder with content")
            if name.endswith("/"):
                yield _Member(name, None)
            else:
                with opened.open(info) as content:
                    yield _Member(name, content)


def _num_told(archive: Path) -> int:
    """How many members a zip says that it has, which zipfile does not hold against those that it finds."""
    with archive.open("rb") as file:
        file.seek(max(0, archive.stat().st_size - 22 - 0xFFFF))
        tail = file.read()
    return int.from_bytes(tail[tail.rfind(b"PK\x05\x06") :][10:12], "little")


def _tar_members(archive: Path, limit: int) -> Iterator[_Member]:
    with Metered(_decompressed(archive), limit) as stream:
        with tarfile.TarFile(fileobj=cast(Any, stream)) as opened:
            for info in opened:
                if not (info.isreg() or info.isdir()):
                    raise ArchiveError(f"{info.name!r} is neither a file nor a folder")
                yield _Member(info.name, None if info.isdir() else opened.extractfile(info))
                cast(Any, opened).members = []  # or a list of all of them would grow
        if stream.last.strip(b"\0"):  # tarfile takes a header that it cannot read for the end
            raise ArchiveError("it is damaged")
        stream.read()  # up to the checksum of what was packed


def _decompressed(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        head = file.read(8)
    opener: Callable[..., Any] = next((opener for start, opener in OPENERS.items() if head.startswith(start)), open)
    return cast(IO[bytes], opener(path, "rb"))


def _write(members: Iterator[_Member], folder: Path, allowed: int, max_files: int) -> None:
    """Write what an archive holds into an empty folder."""
    names: Names = {}
    left = allowed
    for number, member in enumerate(members, start=1):
        if number > max_files:
            raise ArchiveError(f"holds more than {max_files:,} files")
        parts = _parts(member.name)
        if not parts or parts[0] in LITTER:
            continue
        _claim(parts, member.content is not None, names)
        target = folder.joinpath(*parts)
        if member.content is None:
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            while chunk := member.content.read(min(CHUNK, left + 1)):
                left -= len(chunk)
                if left < 0:
                    raise ArchiveError(f"more than {allowed:,} bytes come out of it")
                file.write(chunk)


def _parts(name: str) -> tuple[str, ...]:
    """The parts of a name that every system takes, and that stays where it is put."""
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if name.startswith("/") or ".." in parts or re.search(r"^[A-Za-z]:|[\\\x00-\x1f\x7f]", name):
        raise ArchiveError(f"{name[:100]!r} is no plain name inside of it")
    if len(parts) > MAX_PARTS or any(len(part.encode()) > MAX_NAME for part in parts):
        raise ArchiveError(f"the name {name[:100]!r} is too long")
    return parts


def _claim(parts: tuple[str, ...], is_file: bool, names: Names) -> None:
    """Refuse a name that is there already, or would be on a disk that does not tell upper from lower case."""
    for depth in range(1, len(parts) + 1):
        here = parts[:depth], is_file and depth == len(parts)
        known = names.setdefault(unicodedata.normalize("NFC", "/".join(here[0])).casefold(), here)
        if known != here:
            raise ArchiveError(f"{'/'.join(parts)!r} and {'/'.join(known[0])!r} cannot be beside each other")
        if here[1] and known is not here:
            raise ArchiveError(f"{'/'.join(parts)!r} is there twice")


def _move(source: Path, target: Path) -> None:
    """Rename; what is in a folder goes into one of the same name that is there."""
    try:
        source.replace(target)
    except OSError:
        if not (source.is_dir() and target.is_dir()):
            raise
        for entry in source.iterdir():
            _move(entry, target / entry.name)


def _unwrap(folder: Path) -> Path:
    """The first folder, from this one down, that holds more than one folder of another name than a split's."""
    while True:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        if len(entries) != 1 or not entries[0].is_dir() or entries[0].name.lower() in SPLIT_FOLDERS:
            return folder
        folder = entries[0]


def _check_digest(path: Path, sha256: str) -> None:
    """Hold an archive against the file that tells its sha256, as `sha256sum` writes it, if there is one."""
    told = path.with_name(f"{path.name}.sha256")
    if not told.is_file():
        return
    with told.open("rb") as file:
        wanted = file.read(64).decode("ascii", "replace").lower()
    if not re.fullmatch("[0-9a-f]{64}", wanted):
        raise ArchiveError(f"{told}: does not begin with a sha256, 64 hexadecimal digits; write it anew, or remove it")
    if wanted != sha256:
        raise ArchiveError(f"{path}: its sha256 is {sha256}, not the one that {told.name} tells; get a fresh copy")


@contextmanager
def _one_line_errors(archive: Path) -> Iterator[None]:
    """Errors that name the archive, in place of those of each format's own module."""
    broken = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, NotImplementedError)
    try:
        yield
    except ArchiveError as error:
        raise ArchiveError(f"{archive}: refused, {error}; nothing was extracted") from error
    except UnicodeError as error:
        raise ArchiveError(f"{archive}: refused, a name in it is not UTF-8; nothing was extracted") from error
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # of the disk, and not of a place that is none in the archive
            raise
        raise _damaged(archive, error) from error
    except (ValueError, RuntimeError, *broken) as error:
        raise _damaged(archive, error) from error


def _damaged(archive: Path, error: Exception) -> ArchiveError:
    what = " ".join(str(error).split())[:200] or type(error).__name__
    return ArchiveError(f"{archive}: no zip or tar that can be read ({what}); get a fresh copy; nothing was extracted")
