"""Safe extraction of untrusted archives: zip, and tar with gzip, bzip2 or xz.

Only regular files and folders with plain names are extracted. An archive with a link, a device, a name that leaves the
folder, or more than the limits allow is refused as a whole. Sizes in headers are not trusted; bytes are counted as they
are decompressed. Everything is written to a hidden folder first, which is renamed when it is complete.

`tarfile.data_filter` and the checks of `zipfile` are not enough: they allow links, have no limits, and take a damaged
header for the end.
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
from pathlib import Path
from typing import IO, Any, cast

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz")
MAX_BYTES = 200 * 1024**3  # of all extracted files
MAX_FILES = 2_000_000  # and folders
MAX_RATIO = 200  # of extracted bytes to those of the archive; images hardly shrink
FREE_BYTES = 64 * 1024**2  # extracted from an archive whatever the ratio
MAX_NAME = 255  # bytes of a part of a path, as on most disks
MAX_PARTS = 50  # of a path
CHUNK = 1024**2  # bytes
MAX_READ = 16 * CHUNK  # at a time; only the header of a tar requests more, for a name or a comment
LITTER = ("__MACOSX",)  # added to a zip by macOS; would look like a class
SPLIT_FOLDERS = ("train", "val", "valid", "validation", "test")
OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}  # by the first bytes of a file

Members = Iterator[tuple[str, IO[bytes] | None]]  # name and content; None for a folder
Names = dict[str, tuple[tuple[str, ...], bool]]  # normalised path -> parts of the path, and whether it is a file


class ArchiveError(ValueError):
    """An archive was refused; the message names it and the reason."""


def unpacked(path: Path, cache_dir: str | Path | None = None) -> Path:
    """The folder of a data set: the path itself, or the folder that an archive is extracted to, once per content.

    A single folder around everything else is skipped. If `photos.zip.sha256` exists beside `photos.zip`, the digests
    must match. Archives are extracted into `cache_dir`, by default beside them.

    Raises:
        ArchiveError: The archive is refused, see `extract`, or does not match its .sha256 file.
        OSError: The disk is full, or the folder cannot be written to.
    """
    if not (str(path).lower().endswith(ENDINGS) and path.is_file()):
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
    """Extract a whole archive into a folder, or nothing; return the folder.

    Files get default permissions. What macOS adds (`__MACOSX`) is left out.

    Args:
        archive: A zip or tar, recognised by its content, not by its name.
        into: The folder, created if missing; existing files of the same names are replaced.
        max_bytes: Most bytes to extract.
        max_files: Most files and folders.
        max_ratio: Most bytes to extract for each byte of the archive, beyond the first 64 MiB.

    Raises:
        ArchiveError: It is damaged or encrypted, exceeds a limit, or contains something that is neither a file nor a
            folder, a duplicate name (ignoring case), or a name that is absolute, leaves the folder, has a backslash or
            control characters, or is longer than 255 bytes.
        OSError: The disk is full, or the folder cannot be written to.
    """
    archive, into = Path(archive), Path(into)
    allowed = _max_bytes(archive, max_bytes, max_ratio)
    into.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=into if into.is_dir() else into.parent, prefix=f".{into.name[:64]}."))
    try:
        temporary.chmod(0o755)
        with _one_line_errors(archive):
            with archive.open("rb") as file:
                is_zip = file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
            members = _zip_members(archive) if is_zip else _tar_members(archive, allowed + 2048 * max_files)
            _write(members, temporary, allowed, max_files)
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
        self.last = b""  # the piece that was read last

    def __enter__(self) -> "Metered":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes; all remaining ones for -1.

        Raises:
            ArchiveError: The limit is exceeded.
        """
        if size > MAX_READ:
            raise ArchiveError("a header claims to be huge")
        if size >= 0:
            self.last = self.stream.read(size)
            self.position += len(self.last)
            if self.position > self.limit:
                raise ArchiveError(f"it holds more than {self.limit:,} bytes")
            return self.last
        return b"".join(iter(lambda: self.read(CHUNK), b""))

    def tell(self) -> int:
        """Number of bytes read."""
        return self.position

    def seek(self, position: int) -> int:
        """Read forwards to a position, or to the end."""
        if position < self.position:
            raise ArchiveError("its parts are not in order")
        while self.position < position and self.read(min(CHUNK, position - self.position)):
            pass
        return self.position


def open_metered(path: str | Path, mode: str = "rb", *, max_ratio: float = MAX_RATIO) -> Metered:
    """Open a file that may be packed by gzip, bzip2 or xz, to read its content up to the limit."""
    assert mode == "rb"
    return Metered(_decompressed(Path(path)), _max_bytes(Path(path), MAX_BYTES, max_ratio))


def _max_bytes(path: Path, max_bytes: int, max_ratio: float) -> int:
    return min(max_bytes, max(FREE_BYTES, int(max_ratio * path.stat().st_size)))


def _zip_members(archive: Path) -> Members:
    with archive.open("rb") as file:  # zipfile does not compare the declared number of members with those it finds
        file.seek(max(0, archive.stat().st_size - 22 - 0xFFFF))
        tail = file.read()
    num_declared = int.from_bytes(tail[tail.rfind(b"PK\x05\x06") :][10:12], "little")
    with zipfile.ZipFile(archive) as opened:
        if num_declared not in (0xFFFF, len(opened.infolist()) & 0xFFFF):  # 0xFFFF: zip64 declares it elsewhere
            raise ArchiveError("its table of contents is damaged")
        for info in opened.infolist():
            name = info.orig_filename  # info.filename ends at a NUL
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ArchiveError(f"{name!r} is neither a file nor a folder")
            if name.endswith("/") and info.file_size:
                raise ArchiveError(f"{name!r} is a folder with content")
            if name.endswith("/"):
                yield name, None
            else:
                with opened.open(info) as content:
                    yield name, content


def _tar_members(archive: Path, limit: int) -> Members:
    with Metered(_decompressed(archive), limit) as stream:
        with tarfile.TarFile(fileobj=cast(Any, stream)) as opened:
            for info in opened:
                if not (info.isreg() or info.isdir()):
                    raise ArchiveError(f"{info.name!r} is neither a file nor a folder")
                yield info.name, None if info.isdir() else opened.extractfile(info)
                cast(Any, opened).members = []  # or a list of all of them would grow
        if stream.last.strip(b"\0"):  # tarfile takes a header that it cannot read for the end
            raise ArchiveError("it is damaged")
        stream.read()  # up to the checksum of what was packed


def _decompressed(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        head = file.read(8)
    opener: Callable[..., Any] = next((opener for start, opener in OPENERS.items() if head.startswith(start)), open)
    return cast(IO[bytes], opener(path, "rb"))


def _write(members: Members, folder: Path, allowed: int, max_files: int) -> None:
    """Write the members of an archive into an empty folder."""
    names: Names = {}
    left = allowed
    for number, (name, content) in enumerate(members, start=1):
        if number > max_files:
            raise ArchiveError(f"it holds more than {max_files:,} files")
        parts = _parts(name)
        if not parts or parts[0] in LITTER:
            continue
        _check_distinct(parts, content is not None, names)
        target = folder.joinpath(*parts)
        if content is None:
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            while chunk := content.read(min(CHUNK, left + 1)):
                left -= len(chunk)
                if left < 0:
                    raise ArchiveError(f"it holds more than {allowed:,} bytes")
                file.write(chunk)


def _parts(name: str) -> tuple[str, ...]:
    """The parts of a name that is valid on every system and stays within the folder."""
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if name.startswith("/") or ".." in parts or re.search(r"^[A-Za-z]:|[\\\x00-\x1f\x7f]", name):
        raise ArchiveError(f"{name[:100]!r} is not a plain relative name")
    if len(parts) > MAX_PARTS or any(len(part.encode()) > MAX_NAME for part in parts):
        raise ArchiveError(f"the name {name[:100]!r} is too long")
    return parts


def _check_distinct(parts: tuple[str, ...], is_file: bool, names: Names) -> None:
    """Refuse a name that exists already, or would on a disk that ignores case."""
    for depth in range(1, len(parts) + 1):
        here = parts[:depth], is_file and depth == len(parts)
        known = names.setdefault(unicodedata.normalize("NFC", "/".join(here[0])).casefold(), here)
        if known != here or (here[1] and known is not here):
            raise ArchiveError(f"{'/'.join(parts)!r} and {'/'.join(known[0])!r} have the same name on some disks")


def _move(source: Path, target: Path) -> None:
    """Rename; the content of a folder is merged into an existing one."""
    try:
        source.replace(target)
    except OSError:
        if not (source.is_dir() and target.is_dir()):
            raise
        for entry in source.iterdir():
            _move(entry, target / entry.name)


def _unwrap(folder: Path) -> Path:
    """The first folder, from this one down, that holds more than a single folder that is not a split."""
    while True:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        if len(entries) != 1 or not entries[0].is_dir() or entries[0].name.lower() in SPLIT_FOLDERS:
            return folder
        folder = entries[0]


def _check_digest(path: Path, sha256: str) -> None:
    """Compare an archive with its .sha256 file, as `sha256sum` writes it, if there is one."""
    declared = path.with_name(f"{path.name}.sha256")
    if not declared.is_file():
        return
    with declared.open("rb") as file:
        expected = file.read(64).decode("ascii", "replace").lower()
    if not re.fullmatch("[0-9a-f]{64}", expected):
        raise ArchiveError(f"{declared}: must begin with a sha256, 64 hexadecimal digits; rewrite it, or remove it")
    if expected != sha256:
        raise ArchiveError(f"{path}: its sha256 is {sha256}, not the one in {declared.name}; get a fresh copy")


@contextmanager
def _one_line_errors(archive: Path) -> Iterator[None]:
    """Errors that name the archive, in place of those of each format's own module."""
    broken = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, NotImplementedError)
    try:
        yield
    except ArchiveError as error:
        raise ArchiveError(f"{archive}: refused, {error}; nothing was extracted") from error
    except (ValueError, RuntimeError, OSError, *broken) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # of the disk, not of the archive
            raise
        reason = "a name is not UTF-8" if isinstance(error, UnicodeError) else " ".join(str(error).split())[:200]
        raise ArchiveError(
            f"{archive}: not a readable zip or tar ({reason or type(error).__name__}); get a fresh copy; "
            "nothing was extracted"
        ) from error
