import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import ExifTags, Image

from tests.helpers import noise
from vpt.data.cache import cache_images, decoded_sizes
from vpt.data.images import ImageError, read_image
from vpt.data.loaders import build_loader
from vpt.data.readers.folder import read_folder
from vpt.data.samples import ClassificationDataset
from vpt.data.transforms.images import TrainTransform
from vpt.data.transforms.preprocessing import Preprocessing

HALF = (0.5, 0.5, 0.5)

# Python 3.12 warns when a process with threads forks, and torch has threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@dataclass(frozen=True)
class CountedReader:
    """Reads an image, and writes a line to a file that all processes share."""

    paths: tuple[Path, ...]
    log: Path

    def __call__(self, index):
        with self.log.open("a") as file:
            file.write(f"{index}\n")
        return read_image(self.paths[index])

    @property
    def reads(self):
        return sorted(map(int, self.log.read_text().split()))


@pytest.fixture
def samples(photos, tmp_path):
    found = read_folder(photos)["train"]
    return replace(found, reader=CountedReader(found.paths, tmp_path / "reads"))


def cached(samples):
    return cache_images(samples, decoded_sizes(samples, max_bytes=1e9))


def loader_of(samples, num_workers, start_method=None):
    transform = TrainTransform(Preprocessing((32, 32), HALF, HALF), [{"name": "HorizontalFlip"}])
    loader = build_loader(ClassificationDataset(samples, transform), 5, shuffle=True, num_workers=num_workers)
    loader.multiprocessing_context = start_method
    return loader


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return torch.cat([images for images, _ in loader])


@pytest.mark.parametrize(
    ("num_workers", "start_method"),
    [(0, None), (2, "fork"), *(pytest.param(1, name, marks=pytest.mark.slow) for name in ("spawn", "forkserver"))],
)
def test_epochs_after_the_first_decode_nothing_and_read_the_same_images(samples, num_workers, start_method):
    loader = loader_of(cached(samples), num_workers, start_method)
    plain = loader_of(read_folder(samples.paths[0].parents[2])["train"], num_workers=0)
    for epoch in (1, 2):
        assert torch.equal(epoch_of(loader, epoch), epoch_of(plain, epoch))
        assert samples.reader.reads == list(range(len(samples)))


def test_every_process_and_every_loader_sees_what_one_has_read(samples):
    pictures = cached(samples)
    epoch_of(loader_of(pictures, num_workers=2, start_method="fork"), 1)
    pictures.read(0)
    epoch_of(loader_of(pictures, num_workers=1, start_method="fork"), 2)
    assert samples.reader.reads == list(range(len(samples)))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_photograph_stored_on_its_side_is_cached_upright(samples, tmp_path, orientation):
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    noise(31, 20).save(path, exif=exif)
    reader = CountedReader((path,), tmp_path / "reads")
    pictures = cached(replace(samples.take([0]), reader=reader, paths=(path,)))
    expected = read_image(path)
    assert expected.size == ((20, 31) if orientation >= 6 else (31, 20))
    for _ in range(3):
        found = pictures.read(0)
        assert (found.mode, found.size, found.tobytes()) == ("RGB", expected.size, expected.tobytes())
    assert reader.reads == [0]


def test_changing_an_image_does_not_change_the_cache(samples):
    pictures = cached(samples)
    before = pictures.read(0).tobytes()
    changed = pictures.read(0)
    changed.paste("white", (0, 0, 9, 9))
    assert pictures.read(0).tobytes() == before != changed.tobytes()


def test_an_image_of_another_size_than_in_its_header_is_read_each_time(samples):
    sizes = decoded_sizes(samples, max_bytes=1e9)
    pictures = cache_images(samples, [(sizes[0][0] + 1, sizes[0][1]), *sizes[1:]])
    for _ in range(2):
        assert [pictures.read(index).size for index in (0, 1)] == sizes[:2]
    assert samples.reader.reads == [0, 0, 1]


def test_an_image_that_cannot_be_decoded_is_an_error_each_time(samples, tmp_path):
    broken = tmp_path / "half.png"
    broken.write_bytes(samples.paths[0].read_bytes()[:-900])
    one = replace(samples.take([0]), reader=CountedReader((broken,), tmp_path / "log"), paths=(broken,))
    pictures = cached(one)
    for _ in range(2):
        with pytest.raises(ImageError, match=r"half\.png"):
            pictures.read(0)


def test_sizes_are_read_until_they_exceed_the_limit(samples, monkeypatch):
    sizes = decoded_sizes(samples, max_bytes=18 * 40 * 48 * 3)
    assert sizes == [(48, 40)] * 18
    seen = []
    monkeypatch.setattr("vpt.data.cache.check_image", lambda path, _: seen.append(path) or (48, 40))
    assert decoded_sizes(samples, max_bytes=3 * 40 * 48 * 3 - 1) is None
    assert len(seen) == 3


def test_the_file_of_the_cache_has_no_name_and_is_closed_with_it(samples, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    pictures = cached(samples)
    pictures.read(0)
    assert list((tmp_path / "temporary").iterdir()) == []
    handle = pictures.reader._handle
    assert os.fstat(handle).st_nlink == 0
    del pictures
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)
