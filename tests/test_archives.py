"""Extraction of whole, hostile and damaged archives; a refusal leaves nothing behind."""

import bz2
import gzip
import hashlib
import io
import itertools
import lzma
import os
import random
import stat
import tarfile
import zipfile

import pytest
import torchvision.datasets

from vpt.config.composition import compose_config
from vpt.config.validation import to_config
from vpt.data.readers.torchvision import _guarded_extraction
from vpt.storage import archives
from vpt.storage.archives import ArchiveError, extract, open_metered, unpacked
from vpt.task_types.base import task_type_of

FILES = {"a/x.jpg": b"one", "a/y.jpg": b"", "b/ü z.jpg": b"three" * 1000}


def make_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tar(path, members, mode="w"):
    """A tar of (TarInfo or name, content)."""
    with tarfile.open(path, mode) as archive:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(content) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(content))
    return path


def tar_member(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(archive, folder, message, **limits):
    """Refuse in one line that names the archive, and leave nothing."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ArchiveError, match=rf"^[^\n]*{message}[^\n]*nothing was extracted$") as refusal:
        extract(archive, folder, **limits)
    assert str(refusal.value).startswith(f"{archive}: ")
    assert sorted(folder.parent.rglob("*")) == before


def patched(path, *changes):
    """A file with bytes changed: (bytes to find, offset, new bytes)."""
    data = bytearray(path.read_bytes())
    for marker, offset, new in changes:
        start = data.index(marker) + offset
        data[start : start + len(new)] = new
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("p.zip", ""), ("p.tar", "w"), ("p.tar.gz", "w:gz"), ("p.tgz", "w:gz"), ("p.tar.bz2", "w:bz2")),
        *(("p.tbz", "w:bz2"), ("p.tbz2", "w:bz2"), ("p.tar.xz", "w:xz"), ("p.TXZ", "w:xz")),
    ],
)
def test_each_format_is_extracted_as_it_was_packed(tmp_path, name, mode):
    path = tmp_path / name
    make_tar(path, FILES.items(), mode) if mode else make_zip(path, FILES)
    assert content_of(extract(path, tmp_path / "out")) == FILES
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([name, "out"])
    assert content_of(unpacked(path)) == FILES


def test_folders_are_extracted_and_files_get_default_permissions(tmp_path):
    info = tarfile.TarInfo("run.sh")
    info.mode, info.uid = 0o6777, 0
    path = make_tar(tmp_path / "p.tar", [(tar_member("empty", tarfile.DIRTYPE), b""), (info, b"x")])
    folder = extract(path, tmp_path / "out")
    (tmp_path / "new").write_bytes(b"")
    assert (folder / "empty").is_dir()
    assert stat.S_IMODE((folder / "run.sh").stat().st_mode) == stat.S_IMODE((tmp_path / "new").stat().st_mode)
    assert stat.S_IMODE(folder.stat().st_mode) & 0o7700 == 0o700


NAMES = [
    *("../evil", "a/../../evil", "/evil", "//evil", "C:evil", "C:/evil", "a\\..\\..\\evil", "..\\evil", "a/..", ".."),
    *("line\nfeed", "a" * 256, "é" * 128, "/".join("a" * 51)),
]


@pytest.mark.parametrize(
    ("form", "name"),
    [*itertools.product(["zip", "tar"], NAMES), ("zip", "nul\0.jpg")],  # a tar ends a name at its NUL
)
def test_a_name_that_leaves_the_folder_or_is_invalid_is_refused(tmp_path, form, name):
    (tmp_path / "in").mkdir()
    if form == "tar":
        path = make_tar(tmp_path / "p.tar", [("good.jpg", b"x"), (name, b"x")])
    else:
        info = zipfile.ZipInfo("x")
        info.filename = info.orig_filename = name  # the constructor would normalise it
        path = make_zip(tmp_path / "p.zip", {"good.jpg": b"x", info: b"x"})
    refused(path, tmp_path / "in" / "out", "(not a plain relative name|is too long)")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        *((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.SYMTYPE, "good.jpg"), (tarfile.LNKTYPE, "../secret")),
        *((tarfile.LNKTYPE, "good.jpg"), (tarfile.CHRTYPE, ""), (tarfile.BLKTYPE, ""), (tarfile.FIFOTYPE, "")),
        (b"Z", ""),  # an unknown type
        *((stat.S_IFLNK, "/etc/passwd"), (stat.S_IFCHR, ""), (stat.S_IFIFO, "")),
    ],
)
def test_a_member_that_is_neither_a_file_nor_a_folder_is_refused(tmp_path, kind, target):
    if isinstance(kind, bytes):
        members = [("good.jpg", b"x"), (tar_member("odd", kind, target), b""), ("odd/evil", b"x")]
        path = make_tar(tmp_path / "p", members)
    else:
        info = zipfile.ZipInfo("odd")
        info.external_attr = (kind | 0o777) << 16
        path = make_zip(tmp_path / "p", {"good.jpg": b"x", info: target.encode()})
    refused(path, tmp_path / "out", "'odd' is neither a file nor a folder")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "names",
    [("a/x.jpg", "a/X.JPG"), ("A/x.jpg", "a/y.jpg"), ("x", "x/y"), ("x/y", "x"), ("x", "./x"), ("é", "e\u0301")],
)
def test_names_that_are_the_same_on_some_disks_are_refused(tmp_path, names):
    for path in (
        make_tar(tmp_path / "p.tar", [(name, b"x") for name in names]),
        make_zip(tmp_path / "p.zip", dict.fromkeys(names, b"x")),
    ):
        refused(path, tmp_path / "out", "have the same name on some disks")


@pytest.mark.parametrize("form", ["zip", "gz", "bz2", "xz"])
def test_a_bomb_is_refused_while_it_is_extracted(tmp_path, form, monkeypatch):
    monkeypatch.setattr(archives, "FREE_BYTES", 1_000_000)
    zeros, path = bytes(30_000_000), tmp_path / "p"
    make_zip(path, {"zeros": zeros}) if form == "zip" else make_tar(path, [("zeros", zeros)], f"w:{form}")
    assert path.stat().st_size < 40_000
    refused(path, tmp_path / "out", r"more than [\d,]+ bytes")
    refused(path, tmp_path / "out", "more than 1,000 bytes", max_bytes=1000, max_ratio=1e9)
    assert (extract(path, tmp_path / "out", max_ratio=1e6) / "zeros").stat().st_size == len(zeros)


def test_too_many_files_are_refused(tmp_path):
    path = make_zip(tmp_path / "p.zip", {f"{number}": b"" for number in range(101)})
    refused(path, tmp_path / "out", "holds more than 100 files", max_files=100)
    assert len(content_of(extract(path, tmp_path / "out", max_files=101))) == 101


@pytest.mark.slow
def test_a_hundred_thousand_files_are_extracted(tmp_path):
    path = make_tar(tmp_path / "p.tar.gz", [(f"{number % 100}/{number}", b"") for number in range(100_000)], "w:gz")
    assert len(content_of(extract(path, tmp_path / "out"))) == 100_000


def zip_with_a_false_size(path):
    size = (10_000_000).to_bytes(4, "little")
    make_zip(path, {"zeros": bytes(10_000_000)})
    path.write_bytes(path.read_bytes().replace(size, (1).to_bytes(4, "little")))


def zip_with_a_short_table_of_contents(path):  # the first comment seems longer than all other entries
    patched(make_zip(path, FILES), (b"PK\x01\x02", 33, b"\xff"))
    with zipfile.ZipFile(path) as opened:
        assert len(opened.infolist()) == 1


def sparse_tar(path):
    info = tarfile.TarInfo("sparse")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(10**12)}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        info.size = 512
        archive.addfile(info, io.BytesIO(b"1\n1000000000000\n0\n".ljust(512, b"\0")))


def tar_with_a_huge_header(path):
    header = tar_member("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    header.size = 2**31
    path.write_bytes(lzma.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(1_000_000)))


def tar_with_a_broken_header(path):  # the checksum of the second of two
    make_tar(path, [("a.jpg", b"x"), ("b.jpg", b"y")])
    data = bytearray(path.read_bytes())
    data[1024 + 150] ^= 1
    path.write_bytes(data)
    with tarfile.open(path) as opened:
        assert opened.getnames() == ["a.jpg"]  # as if there were no more


UNREADABLE = "not a readable zip or tar"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (zip_with_a_false_size, rf"({UNREADABLE}|more than [\d,]+ bytes)"),
        (sparse_tar, rf"({UNREADABLE}|more than [\d,]+ bytes)"),
        (tar_with_a_huge_header, "a header claims to be huge"),
        (zip_with_a_short_table_of_contents, "its table of contents is damaged"),
        (lambda path: make_zip(path, {"good.jpg": b"x", "odd/": b"content"}), "'odd/' is a folder with content"),
        (tar_with_a_broken_header, "it is damaged"),
        (lambda path: patched(make_zip(path, FILES), (b"PK\x01\x02", 8, b"\1")), "is encrypted"),
        (  # an unknown compression
            lambda path: patched(make_zip(path, FILES), (b"PK\x01\x02", 10, b"c"), (b"PK\x03\x04", 8, b"c")),
            UNREADABLE,
        ),
        *(
            (lambda path, content=content: path.write_bytes(content), f"({UNREADABLE}|it is damaged)")
            for content in (b"", b"text", b"PK\x03\x04", b"\x1f\x8b", bytes(511), b"Rar!\x1a\x07\x00" * 100)
        ),
    ],
)
def test_a_damaged_or_deceptive_archive_is_refused(tmp_path, monkeypatch, make, message):
    monkeypatch.setattr(archives, "FREE_BYTES", 1_000_000)
    make(tmp_path / "p.zip")
    refused(tmp_path / "p.zip", tmp_path / "out", message)


@pytest.mark.parametrize("form", ["zip", "tar", "gz", "bz2", "xz"])
def test_a_truncated_or_changed_archive_is_refused_or_extracted_as_it_was_packed(tmp_path, form):
    """A zip and compressed streams have checksums; a bare tar has them for its headers only."""
    files = {f"{number % 3}/{number}.jpg": random.Random(number).randbytes(700) for number in range(9)}
    path = tmp_path / f"p.{form}"
    mode = "w" if form == "tar" else f"w:{form}"
    make_zip(path, files) if form == "zip" else make_tar(path, files.items(), mode)
    whole, generator = path.read_bytes(), random.Random(0)
    num_refused = 0
    for number in range(120):
        changed = bytearray(whole)
        if number % 2:
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        else:
            changed = changed[: generator.randrange(len(changed))]
        path.write_bytes(changed)
        out = tmp_path / f"out{number}"
        try:
            extract(path, out)
        except ArchiveError:
            num_refused += 1
            assert not out.exists()
            continue
        if form != "tar":  # a byte that is not read, such as a date
            assert set(content_of(out).values()) == set(files.values())
    assert num_refused > (20 if form == "tar" else 60)
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "p.zip", FILES)
    monkeypatch.setattr(archives, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        extract(path, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.zip"]


def test_files_of_an_existing_folder_stay(tmp_path):
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    (out / "a" / "mine").write_bytes(b"mine")
    (out / "a" / "x.jpg").write_bytes(b"old")
    assert content_of(extract(make_zip(tmp_path / "p.zip", FILES), out)) == FILES | {"a/mine": b"mine"}
    refused(make_tar(tmp_path / "q.tar", [("new", b"x"), ("../x", b"x")]), out, "not a plain")


def test_a_data_set_is_extracted_once_per_content(tmp_path, monkeypatch):
    path = make_zip(
        tmp_path / "my photos.v2.zip", {"photos/a/x.jpg": b"x", "photos/b/y.jpg": b"y", "__MACOSX/._x": b""}
    )
    folder = unpacked(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert folder == tmp_path / f"my_photos_{sha256[:16]}" / "photos"
    assert content_of(folder) == {"a/x.jpg": b"x", "b/y.jpg": b"y"}
    assert not (folder.parent / "__MACOSX").exists()
    with monkeypatch.context() as patched:
        patched.setattr(archives, "extract", None)
        assert unpacked(path) == folder
    assert unpacked(path, tmp_path / "cache").parent.parent == tmp_path / "cache"
    make_zip(path, {"photos/train/a/x.jpg": b"other"})
    assert unpacked(path).name == "photos"
    assert content_of(unpacked(path)) == {"train/a/x.jpg": b"other"}


def test_a_path_that_is_not_an_archive_is_returned(tmp_path):
    (tmp_path / "folder.zip").mkdir()
    for path in (tmp_path, tmp_path / "folder.zip", tmp_path / "gone.zip", tmp_path / "gone"):
        assert unpacked(path) == path


def test_an_archive_must_match_its_sha256_file(tmp_path):
    path = make_zip(tmp_path / "p.zip", FILES)
    declared, sha256 = tmp_path / "p.zip.sha256", hashlib.sha256(path.read_bytes()).hexdigest()
    declared.write_text(f"{'0' * 64}  p.zip\n")
    with pytest.raises(ArchiveError, match=rf"p\.zip: its sha256 is {sha256}, not the one in p\.zip\.sha256"):
        unpacked(path)
    declared.write_text("no digest")
    with pytest.raises(ArchiveError, match=r"p\.zip\.sha256: must begin with a sha256"):
        unpacked(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["p.zip", "p.zip.sha256"]
    declared.write_text(f"{sha256.upper()}  p.zip\n")
    assert content_of(unpacked(path)) == FILES


@pytest.mark.parametrize("reader", ["folder", "coco"])
def test_a_data_set_is_read_from_an_archive(tmp_path, photos, boxes, reader):
    root, path = (photos, tmp_path / "data.zip") if reader == "folder" else (boxes, tmp_path / "data.tar.gz")
    files = {f"data/{file.relative_to(root)}": file.read_bytes() for file in root.rglob("*") if file.is_file()}
    make_zip(path, files) if reader == "folder" else make_tar(path, files.items(), "w:gz")
    names = []
    for place in (path, root):
        options = [f"dataset={reader}", f"dataset.root={place}", f"cache_dir={tmp_path / 'cache'}"]
        samples = task_type_of(to_config(compose_config(options))).read()
        names.append({split: of.names for split, of in samples.items()})
    assert names[0] == names[1]
    assert (tmp_path / "cache").is_dir()


def test_torchvision_extracts_safely_inside_of_the_block_only(tmp_path, monkeypatch):
    utils = torchvision.datasets.utils
    monkeypatch.setattr(archives, "FREE_BYTES", 1_000_000)
    good = make_zip(tmp_path / "good.zip", FILES)
    evil = make_tar(tmp_path / "evil.tar.gz", [(tar_member("a", tarfile.SYMTYPE, "good"), b"")], "w:gz")
    bombs = []
    for ending, opener in ((".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)):
        bombs.append(tmp_path / f"bomb{ending}")
        with opener(bombs[-1], "wb") as file:
            file.write(bytes(20_000_000))
    before = dict(utils._ARCHIVE_EXTRACTORS), dict(utils._COMPRESSED_FILE_OPENERS)
    with _guarded_extraction():
        utils.extract_archive(str(good), str(tmp_path / "out"))
        assert content_of(tmp_path / "out") == FILES
        with pytest.raises(ArchiveError, match="neither a file nor a folder"):
            utils.extract_archive(str(evil), str(tmp_path / "out"))
        for bomb in bombs:
            with pytest.raises(ArchiveError, match="more than"):
                utils.extract_archive(str(bomb))
    assert (dict(utils._ARCHIVE_EXTRACTORS), dict(utils._COMPRESSED_FILE_OPENERS)) == before


def test_a_torchvision_that_extracts_in_another_way_is_refused(monkeypatch):
    monkeypatch.delattr(torchvision.datasets.utils, "_ARCHIVE_EXTRACTORS")
    with pytest.raises(ValueError, match="extracts archives in a way that cannot be guarded"), _guarded_extraction():
        pass


def test_a_compressed_file_is_read(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"abc" * 1000))
    with open_metered(tmp_path / "a.gz", "rb") as file:
        assert file.read() == b"abc" * 1000


def test_a_pickle_in_place_of_a_torchvision_data_set_is_not_read(tmp_path):
    """CIFAR comes as pickles, which torchvision opens only if it knows their md5."""
    import pickle

    from vpt.data.readers.torchvision import read_torchvision

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (folder / name).write_bytes(pickle.dumps(Evil()))
    (folder / "batches.meta").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="CIFAR10 are not in"):
        read_torchvision("CIFAR10", tmp_path)
    assert not (tmp_path / "ran").exists()
