import os
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from vpt.data.readers.folder import read_folder
from vpt.data.samples import ClassificationSamples
from vpt.data.tokens import TokenDataset, TokenFolder, content_sha256

SHAPE = (5, 3, 4)


def parts(dtype=torch.float32):
    tokens = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    return tokens, [tokens[:2], tokens[2:]]


def written(path, dtype=torch.float32):
    folder, (tokens, rows) = TokenFolder(path, max_bytes=1e6), parts(dtype)
    folder.write("key", rows, SHAPE, dtype)
    (file,) = path.iterdir()
    return folder, tokens, file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tokens_come_back_bit_for_bit_in_every_dtype(tmp_path, dtype):
    folder, tokens, file = written(tmp_path / "new folder", dtype)
    found = folder.read("key", SHAPE, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, tokens)
    assert file.name == "key.tokens"
    assert folder.read("other key", SHAPE, dtype) is None


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"0", lambda data: b"1" + data[1:]])
def test_a_file_that_is_not_as_it_was_written_is_not_used(tmp_path, damage):
    folder, _, file = written(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    assert folder.read("key", SHAPE, torch.float32) is None


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path):
    tokens, _ = parts()

    def interrupted():
        yield tokens[:2]
        raise KeyboardInterrupt

    folder = TokenFolder(tmp_path, max_bytes=1e6)
    with pytest.raises(KeyboardInterrupt):
        folder.write("key", interrupted(), SHAPE, tokens.dtype)
    assert list(tmp_path.iterdir()) == []


def test_two_that_write_at_once_do_not_disturb_each_other(tmp_path):
    tokens, rows = parts()
    first, second = TokenFolder(tmp_path, max_bytes=1e6), TokenFolder(tmp_path, max_bytes=1e6)

    def slow():
        yield rows[0]
        second.write("key", rows, SHAPE, tokens.dtype)
        assert torch.equal(second.read("key", SHAPE, tokens.dtype), tokens)
        yield rows[1]

    first.write("key", slow(), SHAPE, tokens.dtype)
    assert torch.equal(first.read("key", SHAPE, tokens.dtype), tokens)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_least_recently_used_files_are_removed(tmp_path):
    tokens, rows = parts()
    size = tokens.nbytes + 32
    folder = TokenFolder(tmp_path, max_bytes=2 * size)
    for age, key in enumerate(("c", "b", "a")):
        folder.write(key, rows, SHAPE, tokens.dtype)
        os.utime(tmp_path / f"{key}.tokens", (time.time() - 100 + age,) * 2)
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "b"}
    mapped = folder.read("b", SHAPE, tokens.dtype)
    folder.write("d", rows, SHAPE, tokens.dtype)
    assert {path.stem for path in tmp_path.iterdir()} == {"b", "d"}
    folder.write("e", rows, SHAPE, tokens.dtype)
    folder.write("f", rows, SHAPE, tokens.dtype)
    assert torch.equal(mapped, tokens)  # although its file is gone


def test_files_of_a_killed_run_are_removed_after_a_day(tmp_path):
    old, new = tmp_path / ".key.tokens.abc", tmp_path / ".key.tokens.def"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    written_files = {path.name for path in written_into(tmp_path)}
    assert written_files == {"key.tokens", new.name}


def written_into(path):
    tokens, rows = parts()
    TokenFolder(path, max_bytes=1e6).write("key", rows, SHAPE, tokens.dtype)
    return path.iterdir()


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
    tokens, _ = parts()
    dataset = TokenDataset(tokens, (4, 3, 2, 1, 0))
    assert len(dataset) == 5
    assert torch.equal(dataset[(7, 2)][0], tokens[2])
    assert [dataset[key][1] for key in (0, (9, 4))] == [4, 0]


def test_a_file_that_another_run_removes_meanwhile_is_no_error(tmp_path, monkeypatch):
    folder, tokens, file = written(tmp_path)

    def removed(*_, **__):
        raise RuntimeError("unable to open file: No such file or directory (2)")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "from_file", removed)
        assert folder.read("key", SHAPE, torch.float32) is None
    (tmp_path / "gone.tokens").symlink_to(tmp_path / "nowhere")  # its status cannot be read
    TokenFolder(tmp_path, max_bytes=10).write("other", [tokens], SHAPE, torch.float32)
    assert not file.exists()


def test_a_file_in_a_folder_of_another_user_is_used(tmp_path, monkeypatch):
    folder, tokens, _ = written(tmp_path)

    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refused)
    assert torch.equal(folder.read("key", SHAPE, torch.float32), tokens)
