import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from vpt.storage.files import read_tensors, write_bytes, write_json, write_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}
NOT_METADATA = ('{"a": NaN}', '{"a": 1, "a": 2}', "[1]", "[" * 100_000, '{"a": "\\ud800"}', f'{{"a": {10**400}}}')


@pytest.fixture
def path(tmp_path):
    """A file of tensors and metadata."""
    path = tmp_path / "new folder" / "task.safetensors"
    write_tensors(path, TENSORS, {"classes": ["cat", "dog"], "numbers": [1, 2.5, None]})
    return path


def test_tensors_and_metadata_are_read_as_they_were_written(path):
    tensors, metadata = read_tensors(path)
    assert metadata == {"classes": ["cat", "dog"], "numbers": [1, 2.5, None]}
    torch.testing.assert_close(tensors, TENSORS, rtol=0, atol=0)
    before = path.read_bytes()
    write_tensors(path, tensors, metadata)
    assert path.read_bytes() == before


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(path, monkeypatch):
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(path, b"half")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def flip(position):
    def change(data):
        changed = bytearray(data)
        changed[position] ^= 4
        return changed

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip(-1), "damaged or edited"),
        (flip(-9), "damaged or edited"),
        (flip(-30), "damaged or edited"),
        (lambda data: data.replace(b"dog", b"dof"), "damaged or edited"),
        (lambda data: data[:-5], "not a readable safetensors file"),
        (lambda _: b'{"not": "safetensors"}', "not a readable safetensors file"),
        (lambda _: (2**40).to_bytes(8, "little") + b"{}", "its header is larger than"),
        (lambda _: save(TENSORS), "not one of vpt"),
        (lambda _: save({"a": torch.zeros(2, dtype=torch.complex64)}, {"vpt": "{}"}), r"a is torch\.complex64"),
        *((lambda _, text=text: save(TENSORS, {"vpt": text}), "its 'vpt' metadata is not") for text in NOT_METADATA),
    ],
)
def test_a_file_that_is_damaged_or_not_of_vpt_is_refused_by_name(path, change, message):
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"task\.safetensors: .*{message}"):
        read_tensors(path)


def test_metadata_that_the_sha256_does_not_cover_is_refused(path):
    with safe_open(path, framework="pt") as file:
        texts = file.metadata()
    save_file(load_file(path), path, {**texts, "more": "text"})
    with pytest.raises(ValueError, match="has metadata beside 'vpt'"):
        read_tensors(path)


def test_a_missing_or_too_large_file_is_refused(path):
    with pytest.raises(FileNotFoundError, match="absent: no such file"):
        read_tensors(path.with_name("absent"))
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        read_tensors(path, max_bytes=100)
    assert read_tensors(path, max_bytes=math.inf)[0].keys() == TENSORS.keys()


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    values = {"map": math.nan, "all": [1.0, math.inf, {"deep": (-math.inf, 2)}], "name": "nan"}
    plain = {"map": None, "all": [1.0, None, {"deep": [None, 2]}], "name": "nan"}
    write_json(tmp_path / "a.json", values)
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == plain
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, values)
    assert read_tensors(tmp_path / "a.safetensors")[1] == plain
