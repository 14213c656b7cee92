"""The record of the data of a run, and a finished run whose data change."""

import os
import shutil

import pytest
from PIL import Image

from tests.helpers import options_of, train_with
from vpt.config.errors import ConfigError
from vpt.models.nano import WEIGHTS
from vpt.runs.record import RECORD, Record, changes, read_record, touched, write_record

BEFORE = Record(
    ["cat", "dog"],
    {"backbone.checkpoint": [900, 1, "aa"]},
    {"cat/1.png": ["train", 10, 1, "cat"], "dog/1.png": ["train", 20, 1, "dog"], "dog/2.png": ["val", 30, 1, "dog"]},
)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ({}, []),
        ({"dog/3.png": ["train", 20, 1, "dog"]}, ["images added: 1 (dog/3.png)"]),
        ({"cat/1.png": None}, ["images removed: 1 (cat/1.png)"]),
        ({"cat/1.png": ["train", 11, 1, "cat"]}, ["images of other bytes: 1 (cat/1.png)"]),
        ({"dog/2.png": ["test", 30, 1, "dog"]}, ["images in another split: 1 (dog/2.png: val, now test)"]),
        ({"cat/1.png": ["train", 10, 1, "dog"]}, ["images with other labels: 1 (cat/1.png: cat, now dog)"]),
        ({"cat/1.png": ["train", 10, 2, "cat"]}, []),
    ],
)
def test_changes_of_images_are_counted_and_named(images, expected):
    merged = {**BEFORE.images, **images}
    now = Record(BEFORE.classes, BEFORE.files, {name: entry for name, entry in merged.items() if entry})
    assert changes(BEFORE, now) == expected
    assert touched(BEFORE, now) == (["cat/1.png"] if ["train", 10, 2, "cat"] in images.values() else [])


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (Record(["cat", "dog"], {"backbone.checkpoint": [900, 2, "aa"]}, BEFORE.images), []),
        (
            Record(["cat", "dog"], {"backbone.checkpoint": [900, 1, "bb"]}, BEFORE.images),
            "backbone.checkpoint has another",
        ),
        (Record(["cat", "dog"], {}, BEFORE.images), "backbone.checkpoint has another"),
        (Record(["dog", "cat"], BEFORE.files, BEFORE.images), "classes are in another order"),
        (Record(["cat", "dog", "elk"], BEFORE.files, BEFORE.images), "classes added: 1 (elk)"),
        (Record(["cat"], BEFORE.files, BEFORE.images), "classes removed: 1 (dog)"),
        (Record(["cat", "dog"], BEFORE.files, dict(reversed(BEFORE.images.items()))), "images are in another order"),
    ],
)
def test_changes_of_files_classes_and_order_are_named(now, expected):
    found = changes(BEFORE, now)
    assert (found == []) if expected == [] else (expected in "; ".join(found))


def test_a_record_is_read_as_it_was_written_and_a_damaged_one_is_reported(tmp_path, capsys):
    assert read_record(tmp_path) is None
    names = Record(
        ["Käfer", "x\udcff"], {}, {"Käfer/\udcff.png": ["train", 1, 2, "Käfer"], "b": ["val", None, None, "b"]}
    )
    write_record(tmp_path, names)
    assert read_record(tmp_path) == names
    assert not capsys.readouterr().err
    (tmp_path / RECORD).write_text("{")
    assert read_record(tmp_path) is None
    assert "damaged" in capsys.readouterr().err


def test_a_finished_run_whose_data_or_weights_changed_is_refused_with_what_to_type(tmp_path, photos, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    weights = tmp_path / "vit.safetensors"
    shutil.copy(WEIGHTS, weights)
    words = options_of(tmp_path / "photos", f"run.root={tmp_path}", f"backbone.checkpoint={weights}", "train.epochs=1")
    run_dir = train_with(*words)
    capsys.readouterr()
    train_with(*words)
    output = capsys.readouterr()
    assert "this run has finished" in output.out
    assert "val has 9 images: its top1" in output.err

    def refused(message):
        with pytest.raises(ConfigError, match=f"{message}.*fresh=true.*run.name=NAME"):
            train_with(*words)

    rose = tmp_path / "photos/val/rose/0.png"
    content, times = rose.read_bytes(), (rose.stat().st_atime_ns, rose.stat().st_mtime_ns)
    Image.new("RGB", (9, 9)).save(rose)
    refused(r"images of other bytes: 1 \(val/rose/0\.png\)")
    rose.write_bytes(content)
    os.utime(rose, (0, 0))
    train_with(*words)
    assert "1 image of the same bytes (first val/rose/0.png)" in capsys.readouterr().err
    os.utime(rose, ns=times)
    for split in ("train", "val", "test"):
        shutil.copytree(tmp_path / "photos" / split / "rose", tmp_path / "photos" / split / "tulip")
    refused(r"images added: 13 \(train/tulip/0\.png, .*; classes added: 1 \(tulip\)")
    (tmp_path / "photos").rename(tmp_path / "gone")
    train_with(*words)
    assert "is not known: " in capsys.readouterr().err
    shutil.copytree(photos, tmp_path / "photos", copy_function=shutil.copy)
    with weights.open("ab") as file:
        file.write(b" ")
    refused(r"the file of backbone\.checkpoint has another content")
    (run_dir / RECORD).unlink()  # as in version 0.1
    train_with(*words)
    assert "cannot be known" in capsys.readouterr().err
