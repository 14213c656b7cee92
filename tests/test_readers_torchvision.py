import inspect
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision
from PIL import Image

from tests.helpers import names_by_split, touch
from vpt.data.images import ImageError
from vpt.data.readers.torchvision import TORCHVISION, read_torchvision
from vpt.data.samples import check_readable


@pytest.mark.parametrize("name", sorted(TORCHVISION))
def test_every_row_of_the_table_fits_the_installed_torchvision(name):
    source, cls = TORCHVISION[name], getattr(torchvision.datasets, name)
    parameters: dict[str, object] = {}
    for base in cls.__mro__:  # some constructors pass **kwargs on
        parameters |= inspect.signature(base.__init__).parameters
    assert {"root", "download"} <= set(parameters)
    assert all(set(arguments) <= set(parameters) for arguments in source.splits.values())
    code = "".join(inspect.getsource(base) for base in cls.__mro__ if base.__module__.startswith("torchvision"))
    for attribute in (source.targets, source.classes, source.files):
        assert attribute is None or attribute in code


class FakeInMemory:
    """Like CIFAR10 or SVHN: images and targets in arrays."""

    classes = ("cat", "dog")

    def __init__(self, root, train=True, download=False):
        if not download:
            raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
        self.num = 10 if train else 4
        self.targets = np.arange(self.num) % 2

    def __getitem__(self, index):
        return Image.new("L", (4, 4), index), int(self.targets[index])


class FakeFiles:
    """Like SUN397: files in the order of the disk, no official splits."""

    classes = ("cat", "dog")

    def __init__(self, root, download=False):
        self._image_files = [touch(Path(root) / "SUN397" / f"{i}.png", i) for i in (3, 0, 2, 1, 5, 4, 7, 6)]
        self._labels = [int(file.stem) % 2 for file in self._image_files]


class FakePairs:
    """Like GTSRB: (file, target) pairs, no class names."""

    def __init__(self, root, split="train", download=False):
        self._samples = [(str(touch(Path(root) / split / f"{i}.png", i)), i % 2) for i in range(4)]


@pytest.fixture
def fakes(monkeypatch):
    for name, fake in {"CIFAR10": FakeInMemory, "SUN397": FakeFiles, "GTSRB": FakePairs}.items():
        monkeypatch.setattr(torchvision.datasets, name, fake)


def test_a_set_in_memory_has_its_test_split_and_val_from_train(fakes, tmp_path):
    splits = read_torchvision("CIFAR10", tmp_path, download=True)
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 8, "val": 2, "test": 4}
    assert splits["test"].classes == ("cat", "dog")
    assert splits["test"].targets == (0, 1, 0, 1)
    assert splits["test"].names[3] == "CIFAR10 test 3"
    assert splits["test"].read(3).getpixel((0, 0)) == (3, 3, 3)


def test_a_set_without_official_splits_is_split_by_seed_whatever_the_order_of_the_disk(fakes, tmp_path, monkeypatch):
    splits = read_torchvision("SUN397", tmp_path, val_fraction=0.25, test_fraction=0.25)
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 4, "val": 2, "test": 2}
    for samples in splits.values():
        for i, name in enumerate(samples.names):
            number = int(Path(name).stem)
            assert samples.targets[i] == number % 2
            assert samples.read(i).getpixel((0, 0)) == (number, number, number)

    class OtherOrder(FakeFiles):
        def __init__(self, root, download=False):
            super().__init__(root)
            self._image_files, self._labels = self._image_files[::-1], self._labels[::-1]

    monkeypatch.setattr(torchvision.datasets, "SUN397", OtherOrder)
    again = read_torchvision("SUN397", tmp_path, val_fraction=0.25, test_fraction=0.25)
    assert names_by_split(again) == names_by_split(splits)


def test_pairs_are_read_and_nameless_classes_are_numbered(fakes, tmp_path):
    splits = read_torchvision("GTSRB", tmp_path, val_fraction=0.5)
    assert splits["test"].classes == ("0", "1")
    assert splits["test"].names == ("test/0.png", "test/1.png", "test/2.png", "test/3.png")
    assert splits["test"].read(2).getpixel((0, 0)) == (2, 2, 2)
    assert len(splits["val"]) == 2


def test_a_real_svhn_file_is_read(tmp_path, monkeypatch):
    savemat = pytest.importorskip("scipy.io").savemat
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    pixels = np.arange(8, dtype=np.uint8)[None, None, None, :].repeat(3, axis=2)
    labels = np.array([10, 1, 10, 1, 10, 1, 10, 1])[:, None]  # SVHN writes 10 for the digit 0
    for split in ("train", "test"):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": labels})
    splits = read_torchvision("SVHN", tmp_path, val_fraction=0.25)
    assert splits["test"].targets == (0, 1, 0, 1, 0, 1, 0, 1)
    assert splits["test"].read(5).getpixel((0, 0)) == (5, 5, 5)
    assert splits["val"].classes == ("0", "1")


def test_files_are_checked_and_images_in_memory_are_not(fakes, tmp_path):
    check_readable(read_torchvision("CIFAR10", tmp_path, download=True)["train"])
    train = read_torchvision("SUN397", tmp_path)["train"]
    check_readable(train)
    (tmp_path / train.names[1]).write_bytes(b"nothing")
    with pytest.raises(ImageError, match=rf"{train.names[1]}: not an image"):
        check_readable(train)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((name, rf"torchvision's {name} are not in .*download=True") for name in ("CIFAR10", "EuroSAT", "Food101")),
        ("cifar100", r"name='cifar100': unknown; did you mean 'CIFAR100'\? Allowed: CIF"),
        ("SVHN", "SVHN needs scipy: pip install scipy"),
        ("GTSRB", "torchvision's GTSRB in .*: one class only, '0'"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_to_do(name, words, tmp_path, monkeypatch):
    def without_scipy(root, split, download):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    def of_one_class(root, split, download):
        return SimpleNamespace(_samples=[("a.png", 0)])

    monkeypatch.setattr(torchvision.datasets, "SVHN", without_scipy)
    monkeypatch.setattr(torchvision.datasets, "GTSRB", of_one_class)
    with pytest.raises(ValueError, match=words):
        read_torchvision(name, tmp_path)
