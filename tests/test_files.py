import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from vpt.storage.files import read_tensors, write_bytes, write_json, write_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}


def test_tensors_and_metadata_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "new folder" / "task.safetensors"
    write_tensors(path, TENSORS, {"name": "pets", "numbers": [1, 2.5, None]})
    tensors, metadata = read_tensors(path)
    assert metadata == {"name": "pets", "numbers": [1, 2.5, None]}
    assert tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[name], TENSORS[name]) and tensors[name].dtype == TENSORS[name].dtype for name in tensors
    )


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "task.safetensors"
    write_tensors(path, TENSORS, {})
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(path, b"half")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("position", [-1, -9, -30])
def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path, position):
    path = tmp_path / "task.safetensors"
    write_tensors(path, TENSORS, {})
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"task\.safetensors: damaged"):
        read_tensors(path)


def test_truncated_foreign_and_missing_files_are_refused_by_name(tmp_path):
    path = tmp_path / "task.safetensors"
    write_tensors(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"task\.safetensors: not a readable safetensors file"):
        read_tensors(path)
    path.write_text(json.dumps({"not": "safetensors"}))
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_tensors(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_tensors(tmp_path / "absent")


def test_a_safetensors_file_of_another_program_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not one of vpt"):
        read_tensors(tmp_path / "other.safetensors")


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    values = {"map": math.nan, "all": [1.0, math.inf, {"deep": (-math.inf, 2)}], "name": "nan"}
    plain = {"map": None, "all": [1.0, None, {"deep": [None, 2]}], "name": "nan"}
    write_json(tmp_path / "a.json", values)
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == plain
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, values)
    assert read_tensors(tmp_path / "a.safetensors")[1] == plain


def test_a_file_may_be_as_large_as_its_reader_allows(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(100)}, {})
    with pytest.raises(ValueError, match="larger than 100 bytes"):
        read_tensors(tmp_path / "a.safetensors", max_bytes=100)
    assert read_tensors(tmp_path / "a.safetensors", max_bytes=math.inf)[0]["x"].shape == (100,)


def test_a_bit_flipped_in_the_metadata_is_noticed(tmp_path):
    path = tmp_path / "task.safetensors"
    write_tensors(path, TENSORS, {"classes": ["cat", "dog"]})
    data = path.read_bytes()
    path.write_bytes(data.replace(b"dog", b"dof"))
    with pytest.raises(ValueError, match=r"task\.safetensors: damaged or edited"):
        read_tensors(path)


def test_metadata_that_the_seal_does_not_cover_is_refused(tmp_path):
    path = tmp_path / "task.safetensors"
    write_tensors(path, TENSORS, {})
    with safe_open(path, framework="pt") as file:
        texts = file.metadata()
    path.write_bytes(save(load_file(path), {**texts, "more": "text"}))
    with pytest.raises(ValueError, match="has metadata beside 'vpt'"):
        read_tensors(path)


def test_the_same_content_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_tensors(tmp_path / name, TENSORS, {"classes": ["cat", "dog"]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "text",
    ['{"a": NaN}', '{"a": 1, "a": 2}', "[1]", "[" * 100_000, '{"a": "\\ud800"}', f'{{"a": {10**400}}}'],
    ids=["nan", "twice", "list", "deep", "half a character", "long number"],
)
def test_metadata_that_is_no_plain_object_of_json_is_refused(tmp_path, text):
    path = tmp_path / "task.safetensors"
    path.write_bytes(save(TENSORS, {"vpt": text}))
    with pytest.raises(ValueError, match="its 'vpt' metadata is not"):
        read_tensors(path)


def test_a_header_that_claims_to_be_huge_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "task.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="its header is larger than"):
        read_tensors(path)


def test_tensors_of_other_kinds_of_numbers_are_refused(tmp_path):
    path = tmp_path / "task.safetensors"
    path.write_bytes(save({"a": torch.zeros(2, dtype=torch.complex64)}, {"vpt": "{}"}))
    with pytest.raises(ValueError, match=r"task\.safetensors: a is torch\.complex64, which no file of vpt has"):
        read_tensors(path)
