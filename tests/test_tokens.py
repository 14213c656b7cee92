import os
import time
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from vpt.data.readers.folder import read_folder
from vpt.data.samples import ClassificationSamples
from vpt.data.tokens import TokenDataset, TokenFolder, content_sha256

SHAPE = (5, 3, 4)


TOKENS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
PARTS = [TOKENS[:2], TOKENS[2:]]


def written(path, dtype=torch.float32):
    folder = TokenFolder(path, max_bytes=1e6)
    folder.write("key", [part.to(dtype) for part in PARTS], SHAPE, dtype)
    return folder, path / "key.tokens"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tokens_come_back_bit_for_bit_in_every_dtype(tmp_path, dtype):
    folder, file = written(tmp_path / "new folder", dtype)
    found = folder.read("key", SHAPE, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, TOKENS.to(dtype))
    assert list(file.parent.iterdir()) == [file]
    assert folder.read("other key", SHAPE, dtype) is None


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"0", lambda data: b"1" + data[1:]])
def test_a_file_that_is_not_as_it_was_written_is_not_used(tmp_path, damage):
    folder, file = written(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    assert folder.read("key", SHAPE, torch.float32) is None


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path):
    def interrupted():
        yield PARTS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TokenFolder(tmp_path, max_bytes=1e6).write("key", interrupted(), SHAPE, torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_two_that_write_at_once_do_not_disturb_each_other(tmp_path):
    def slow():
        yield PARTS[0]
        assert torch.equal(written(tmp_path)[0].read("key", SHAPE, torch.float32), TOKENS)
        yield PARTS[1]

    first = TokenFolder(tmp_path, max_bytes=1e6)
    first.write("key", slow(), SHAPE, torch.float32)
    assert torch.equal(first.read("key", SHAPE, torch.float32), TOKENS)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_least_recently_used_files_are_removed(tmp_path):
    folder = TokenFolder(tmp_path, max_bytes=2 * (TOKENS.nbytes + 32))
    for age, key in enumerate(("c", "b", "a")):
        folder.write(key, PARTS, SHAPE, torch.float32)
        os.utime(tmp_path / f"{key}.tokens", (time.time() - 100 + age,) * 2)
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "b"}
    mapped = folder.read("b", SHAPE, torch.float32)
    folder.write("d", PARTS, SHAPE, torch.float32)
    assert {path.stem for path in tmp_path.iterdir()} == {"b", "d"}
    for key in ("e", "f"):
        folder.write(key, PARTS, SHAPE, torch.float32)
    assert torch.equal(mapped, TOKENS)  # although its file is gone


def test_files_of_a_killed_run_are_removed_after_a_day(tmp_path):
    old, new = tmp_path / ".key.tokens.abc", tmp_path / ".key.tokens.def"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    _, file = written(tmp_path)
    assert set(tmp_path.iterdir()) == {file, new}


def test_a_digest_of_images_depends_on_every_byte_and_the_order(photos, tmp_path):
    samples = read_folder(photos)["val"].take([0, 1])
    digest = content_sha256(samples)
    assert content_sha256(samples) == digest
    assert content_sha256(samples.take([1, 0])) != digest
    copy = tmp_path / "copy.png"
    copy.write_bytes(samples.paths[0].read_bytes())
    assert content_sha256(replace(samples, paths=(copy, samples.paths[1]))) == digest
    copy.write_bytes(copy.read_bytes() + b"0")  # after the end of the image
    assert content_sha256(replace(samples, paths=(copy, samples.paths[1]))) != digest


def test_a_digest_of_images_that_are_not_files_is_of_their_pixels():
    def digest(*pictures):
        num, reader = len(pictures), pictures.__getitem__
        return content_sha256(
            ClassificationSamples(classes=("a", "b"), targets=(0,) * num, names=("x",) * num, reader=reader)
        )

    wide, high = Image.new("RGB", (4, 2)), Image.new("RGB", (2, 4))
    changed = wide.copy()
    changed.putpixel((3, 1), (0, 0, 1))
    digests = [digest(wide), digest(high), digest(changed), digest(wide, wide), digest(wide, high), digest(high, wide)]
    assert len(set(digests)) == len(digests)
    assert digest(wide.copy()) == digests[0]


def test_a_data_set_of_tokens_has_the_keys_of_one_of_images():
    dataset = TokenDataset(TOKENS, (4, 3, 2, 1, 0))
    assert len(dataset) == 5
    assert torch.equal(dataset[(7, 2)][0], TOKENS[2])
    assert [dataset[key][1] for key in (0, (9, 4))] == [4, 0]


def test_a_file_that_another_run_removes_meanwhile_is_no_error(tmp_path, monkeypatch):
    folder, file = written(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "from_file", Mock(side_effect=RuntimeError("unable to open file")))
        assert folder.read("key", SHAPE, torch.float32) is None
    (tmp_path / "gone.tokens").symlink_to(tmp_path / "nowhere")  # its status cannot be read
    TokenFolder(tmp_path, max_bytes=10).write("other", [TOKENS], SHAPE, torch.float32)
    assert not file.exists()


def test_a_file_in_a_folder_of_another_user_is_used(tmp_path, monkeypatch):
    folder, _ = written(tmp_path)
    monkeypatch.setattr(os, "utime", Mock(side_effect=PermissionError(1, "Operation not permitted")))
    assert torch.equal(folder.read("key", SHAPE, torch.float32), TOKENS)
