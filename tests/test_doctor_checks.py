"""The report: what it finds in a folder with every kind of dirt, compared with what was put there."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.validation import to_config
from vpt.data.samples import DetectionSamples
from vpt.data.transforms.preprocessing import Preprocessing, resize_and_crop
from vpt.doctor.images import cut_off
from vpt.doctor.reading import read_data
from vpt.doctor.report import check
from vpt.doctor.scan import Oddity, find_oddities, pixel_digest, scan_images
from vpt.doctor.training_plan import input_of
from vpt.task_types.base import task_type_of
from vpt.task_types.box_findings import find_small_boxes, short_sides
from vpt.task_types.findings import Level

HALF = (0.5, 0.5, 0.5)


def configure(*words):
    return to_config(compose_config(["num_workers=0", "run.name=unused", *words]))


def report_of(*words):
    return check(configure(*words), "the command")


def found(report):
    """Names of the files of each finding, by code and split."""
    return {(f.code, f.split): [file.file for file in f.files] for f in report.findings}


def noise(seed, size=(70, 66), channels=3):
    shape = (size[1], size[0], channels) if channels > 1 else size[::-1]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def save_folder(root, num=6, classes=("cat", "dog")):
    """Class folders of different pictures, in three splits; returns the root."""
    seeds = iter(range(10**6))
    for split in ("train", "val", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(num):
                noise(next(seeds)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return save_folder(tmp_path / "pets")


@pytest.fixture
def dirty(folder):
    """Every kind of dirt that a reader of class folders lets through."""
    train, val, test = (folder / split / "cat" for split in ("train", "val", "test"))
    (train / "text.jpg").write_text("not a picture")
    (train / "empty.png").write_bytes(b"")
    content = (train / "0.png").read_bytes()
    (train / "short.png").write_bytes(content[: len(content) // 2])  # its header is whole
    Image.new("1", (8000, 6500)).save(val / "huge.png")
    (train / "copy.png").write_bytes((train / "1.png").read_bytes())
    Image.open(train / "2.png").save(val / "again.bmp")
    (test / "leak.png").write_bytes((train / "3.png").read_bytes())
    (folder / "train" / "dog" / "cat.png").write_bytes((train / "4.png").read_bytes())
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(100, (90, 70)).save(train / "turned.jpg", exif=exif)
    noise(101).convert("CMYK").save(train / "cmyk.jpg")
    noise(102, channels=4).save(train / "alpha.png")
    Image.fromarray(np.arange(4900, dtype=np.uint16).reshape(70, 70)).save(train / "deep.png")
    noise(103).save(train / "moving.gif", save_all=True, append_images=[noise(104)])
    noise(105).save(train / "pages.tif", save_all=True, append_images=[noise(106)])
    noise(107).save(train / "png.jpg", format="PNG")
    noise(108, (20, 16)).save(train / "small.png")
    noise(109, (700, 70)).save(train / "long.png")
    (train / "phone.heic").write_bytes(b"?")
    return folder


def test_every_kind_of_dirt_is_found_where_it_was_put(dirty):
    report = report_of("dataset=folder", f"dataset.root={dirty}")
    assert found(report) == {
        ("unreadable", "train"): ["train/cat/empty.png", "train/cat/short.png", "train/cat/text.jpg"],
        ("too_large", "val"): ["val/cat/huge.png"],
        ("leakage", "val"): ["val/cat/again.bmp"],
        ("leakage", "test"): ["test/cat/leak.png"],
        ("duplicates", "train"): ["train/cat/copy.png", "train/dog/cat.png"],
        ("contradiction", None): ["train/cat/4.png", "train/dog/cat.png"],
        ("ignored", None): ["train/cat/phone.heic"],
        ("imbalance", "train"): [],
        ("extreme_aspect", "train"): ["train/cat/long.png"],
        ("smaller_than_input", "train"): ["train/cat/small.png"],
        ("crop", "train"): ["train/cat/long.png"],
        ("animated", "train"): ["train/cat/moving.gif"],
        ("pages", "train"): ["train/cat/pages.tif"],
        ("sixteen_bit", "train"): ["train/cat/deep.png"],
        ("exif_turned", "train"): ["train/cat/turned.jpg"],
        ("cmyk", "train"): ["train/cat/cmyk.jpg"],
        ("alpha", "train"): ["train/cat/alpha.png"],
        ("ending", "train"): ["train/cat/png.jpg"],
    }
    assert not report.is_fine
    assert report.plan.stops_at == "unreadable"
    assert [finding.level for finding in report.findings] == sorted(
        (finding.level for finding in report.findings), key=list(Level).index
    )


def test_files_of_a_finding_say_what_is_the_matter(dirty):
    report = report_of("dataset=folder", f"dataset.root={dirty}")
    files = {(f.code, f.split): f.files for f in report.findings}
    empty, short, text = files["unreadable", "train"]
    assert empty.detail.startswith("the file is empty")
    assert short.detail.startswith("broken image")
    assert text.detail.startswith("not an image")
    assert files["too_large", "val"][0].detail.startswith("52,000,000 pixels are more than the 50,000,000 allowed")
    (again,), (leak,) = files["leakage", "val"], files["leakage", "test"]
    assert (again.same_as, again.detail) == ("train/cat/2.png", "the same pixels in another file")
    assert (leak.same_as, leak.detail) == ("train/cat/3.png", "the same file")
    assert [file.detail for file in files["contradiction", None]] == ["labelled cat", "labelled dog"]
    assert str(dirty) not in json.dumps(report.to_dict())


def test_a_clean_data_set_is_said_to_be_clean(folder):
    report = report_of("dataset=folder", f"dataset.root={folder}")
    assert (report.is_fine, report.findings) == (True, [])
    assert "no problems found" in str(report)
    assert "would run: train 12, val 12, test 12; 1 steps per epoch, 20 in 20 epochs" in str(report)


def test_nothing_is_changed_on_disk(dirty):
    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in dirty.rglob("*")}

    before = state()
    report_of("dataset=folder", f"dataset.root={dirty}")
    assert state() == before


def test_processes_find_what_one_process_finds(dirty):
    alone = report_of("dataset=folder", f"dataset.root={dirty}")
    many = report_of("dataset=folder", f"dataset.root={dirty}", "num_workers=2", "train.batch_size=5")
    assert [finding.to_dict() for finding in many.findings] == [finding.to_dict() for finding in alone.findings]


def test_pictures_that_may_be_left_out_are_a_warning_and_others_are_not(dirty):
    (dirty / "val" / "cat" / "huge.png").unlink()
    allowed = ["data.on_error=skip", "data.max_skipped=0.5"]
    report = report_of("dataset=folder", f"dataset.root={dirty}", *allowed)
    levels = {finding.code: finding.level for finding in report.findings}
    assert levels["unreadable"] is Level.warning
    assert report.plan.would_run
    assert report.plan.images["train"] == len(report.scans["train"].columns) - 3
    strict = report_of("dataset=folder", f"dataset.root={dirty}", "data.on_error=skip", "data.max_skipped=0.1")
    assert strict.plan.stops_at == "unreadable"
    (dirty / "val" / "cat" / "bad.png").write_bytes(b"")
    of_val = report_of("dataset=folder", f"dataset.root={dirty}", *allowed)
    assert of_val.plan.stops_at == "unreadable"
    assert of_val.findings[0].split == "val"


def test_a_class_without_a_picture_that_can_be_read_stops_training(folder):
    for path in (folder / "train" / "dog").iterdir():
        path.write_bytes(b"")
    allowed = ["data.on_error=skip", "data.max_skipped=0.5"]
    report = report_of("dataset=folder", f"dataset.root={folder}", *allowed)
    assert report.plan.stops_at == "lost_class"
    assert report.findings[0].message.startswith("no image of these classes can be read: dog")


def test_leakage_is_an_error_although_training_would_run(folder):
    (folder / "test" / "dog" / "leak.png").write_bytes((folder / "train" / "dog" / "0.png").read_bytes())
    report = report_of("dataset=folder", f"dataset.root={folder}")
    assert (report.is_fine, report.plan.would_run, report.plan.stops_at) == (False, True, None)
    assert report.plan.next == "fix leakage, then check again"


def test_next_is_the_command_or_how_to_leave_pictures_out(folder):
    assert report_of("dataset=folder", f"dataset.root={folder}").plan.next == "the command"
    (folder / "train" / "dog" / "bad.png").write_bytes(b"")
    words = ["dataset=folder", f"dataset.root={folder}"]
    assert report_of(*words, "data.max_skipped=0.2").plan.next.endswith("the command data.on_error=skip")
    assert report_of(*words).plan.next == "fix unreadable, then check again"  # 1 of 13 is too much to leave out


def test_a_split_that_is_split_off_is_told_from_one_that_is_given(folder):
    words = ["dataset=folder", f"dataset.root={folder / 'train'}"]
    assert report_of(*words, "dataset.test_fraction=0.2").plan.split_off == ("val", "test")
    assert report_of("dataset=folder", f"dataset.root={folder}").plan.split_off == ()


def test_classes_with_few_pictures_or_none_are_named(tmp_path):
    folder = save_folder(tmp_path / "pets", num=12, classes=("ant", "bee", "cow"))
    for path in sorted((folder / "train" / "bee").iterdir())[1:]:
        path.unlink()
    for path in [*(folder / "val" / "cow").iterdir(), folder / "val" / "cow"]:
        path.unlink() if path.is_file() else path.rmdir()
    report = report_of("dataset=folder", f"dataset.root={folder}")
    messages = {(f.code, f.split): (f.level, f.message) for f in report.findings}
    assert messages["few", "train"] == (Level.warning, "1 of 3 (33.3 %) classes have fewer than 5 images: bee (1)")
    assert messages["missing_class", "val"][1].endswith("val cannot evaluate them: cow")
    level, message = messages["imbalance", "train"]
    assert level is Level.warning
    assert "12.0 to 1; train.class_weights=balanced would weight their losses by 0.69 and 8.3" in message  # 25/(3*12)
    assert report.counts["train"].tolist() == [12, 1, 12]
    assert report.to_dict()["splits"]["val"]["images_of_class"] == {"ant": 12, "bee": 12, "cow": 0}


def test_data_that_are_refused_are_looked_at_all_the_same(dirty):
    (dirty / "val" / "bird").mkdir()
    noise(200).save(dirty / "val" / "bird" / "0.png")
    (dirty / "train" / "ghost").mkdir()
    report = report_of("dataset=folder", f"dataset.root={dirty}")
    first = report.findings[0]
    assert (first.code, first.level) == ("refused", Level.error)
    assert report.plan.stops_at == "refused"
    files = found(report)
    assert files["unreadable", "train"] == ["train/cat/empty.png", "train/cat/short.png", "train/cat/text.jpg"]
    assert files["leakage", "test"] == ["test/cat/leak.png"]
    missing = {f.split: f.message for f in report.findings if f.code == "missing_class"}
    assert missing["train"].endswith("they cannot be learned: bird, ghost")


def test_a_table_that_is_refused_leaves_its_pictures_to_look_at(folder):
    (folder / "train" / "cat" / "bad.png").write_bytes(b"")
    (folder / "all.csv").write_text("path,label\ntrain/cat/0.png,cat\nnowhere.png,dog\n")
    report = report_of("dataset=csv", f"dataset.path={folder / 'all.csv'}")
    assert "all.csv, row 3: no such file" in report.findings[0].message
    assert found(report)["unreadable", "train"] == ["train/cat/bad.png"]
    assert report.counts == {}
    assert report.to_dict()["classes"] == []


@pytest.mark.parametrize("words", [["dataset=folder", "dataset.root=nowhere"], ["dataset=csv", "dataset.path=no.csv"]])
def test_without_any_picture_there_is_nothing_to_look_at(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere|no\.csv"):
        read_data(configure(*words))


def test_too_few_pictures_of_a_class_for_num_per_class_stop_training(folder):
    report = report_of("dataset=folder", f"dataset.root={folder}", "dataset.num_per_class=7")
    assert "has 6 train images, fewer than num_per_class=7" in report.findings[0].message
    assert report.plan.stops_at == "refused"
    fewer = report_of("dataset=folder", f"dataset.root={folder}", "dataset.num_per_class=2")
    assert fewer.plan.images == {"train": 4, "val": 12, "test": 12}


DIRT = {
    "nothing": ([], {}),
    "a picture of train": (["train/dog/0.png"], {}),
    "a third of train": (["train/dog/0.png", "train/dog/1.png", "train/cat/0.png", "train/cat/1.png"], {}),
    "a picture of val": (["val/dog/0.png"], {}),
    "a class of train": ([f"train/dog/{i}.png" for i in range(6)], {"max_skipped": 0.6}),
    "all of train": ([f"train/{name}/{i}.png" for name in ("cat", "dog") for i in range(6)], {"max_skipped": 1}),
    "a picture too few": ([], {"num_per_class": 7}),
}


def check_verdict(*words):
    """What the doctor says of a run is what the run does."""
    plan = report_of(*words).plan
    try:
        used = {split: len(samples) for split, samples in task_type_of(configure(*words)).read().items()}
    except ValueError:
        assert not plan.would_run
    else:
        assert (plan.would_run, plan.images) == (True, used)


@pytest.mark.parametrize("dirt", DIRT)
def test_the_verdict_is_what_a_run_does(folder, dirt):
    broken, options = DIRT[dirt]
    for name in broken:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    words = ["dataset=folder", f"dataset.root={folder}", "data.on_error=skip"]
    words.append(f"data.max_skipped={options.get('max_skipped', 0.2)}")
    words.append(f"dataset.num_per_class={options.get('num_per_class', 'null')}")
    check_verdict(*words)


def test_names_that_are_no_text_are_told_with_escapes(folder):
    name = os.fsdecode(b"\xff\x1b[31m.png")
    (folder / "train" / "dog" / name).write_bytes(b"")
    report = report_of("dataset=folder", f"dataset.root={folder}")
    assert "train/dog/\\udcff\\x1b[31m.png" in str(report)
    assert report.to_dict()["findings"][0]["files"][0]["file"] == "train/dog/\\udcff\x1b[31m.png"
    json.dumps(report.to_dict(), ensure_ascii=False).encode()


def test_a_pipe_named_as_a_picture_is_not_waited_for(folder):
    os.mkfifo(folder / "train" / "dog" / "pipe.png")
    config = configure("dataset=folder", f"dataset.root={folder}")
    scans = scan_images(config, read_data(config).splits)
    assert list(scans["train"].errors.values()) == ["not a plain file"]


# Boxes.


@pytest.fixture
def dirty_boxes(boxes, tmp_path):
    """The pictures of `boxes`, with every kind of wrong box in train."""
    root = tmp_path / "boxes"
    for path in boxes.rglob("*"):
        if path.is_file():
            (root / path.relative_to(boxes)).parent.mkdir(parents=True, exist_ok=True)
            (root / path.relative_to(boxes)).write_bytes(path.read_bytes())
    labels = root / "train" / "_annotations.coco.json"
    content = json.loads(labels.read_text())
    wrong = [[300, 5, 9, 9], [5, 5, 0, 9], [40, 40, -20, -20], [-4, 5, 30, 30], [5, 5, float("nan"), 9], [5, 5, 6, 5]]
    for number, box in enumerate(wrong):
        annotation = {"id": 900 + number, "image_id": 101, "category_id": 3, "bbox": box, "iscrowd": 0}
        content["annotations"].append(annotation)
    content["annotations"].append({**content["annotations"][0], "id": 950})
    content["annotations"].append({**content["annotations"][1], "id": 951, "category_id": 99})
    content["annotations"].append({"id": 952, "image_id": 102, "category_id": 17, "bbox": [9, 9, 50, 50], "iscrowd": 1})
    labels.write_text(json.dumps(content))
    return root


def test_every_kind_of_wrong_box_is_counted_with_its_place(dirty_boxes):
    report = report_of("dataset=coco", f"dataset.root={dirty_boxes}", "backbone.img_size=64")
    assert report.is_fine
    num = {f.code: len(f.files) for f in report.findings if f.code.startswith("boxes_")}
    assert num == {
        **{"boxes_unknown": 1, "boxes_not_finite": 1, "boxes_swapped": 1, "boxes_outside": 1, "boxes_clipped": 1},
        **{"boxes_small": 1, "boxes_duplicate": 1, "boxes_crowd": 1},
    }
    (outside,) = next(f.files for f in report.findings if f.code == "boxes_outside")
    assert "box (300, 5, 309, 14) of train/1.png" in outside.detail
    strict = report_of("dataset=coco", f"dataset.root={dirty_boxes}", "dataset.strict=true")
    assert strict.plan.stops_at == "boxes_unknown"
    levels = {f.code: f.level for f in strict.findings}
    assert (levels["boxes_swapped"], levels["boxes_crowd"]) == (Level.error, Level.note)


def test_a_picture_with_other_boxes_the_second_time_is_a_contradiction(dirty_boxes):
    (dirty_boxes / "train" / "2.png").write_bytes((dirty_boxes / "train" / "4.png").read_bytes())
    (dirty_boxes / "test" / "2.png").write_bytes((dirty_boxes / "train" / "6.png").read_bytes())
    files = found(report_of("dataset=coco", f"dataset.root={dirty_boxes}"))
    assert files["duplicates", "train"] == ["train/4.png"]
    assert files["leakage", "test"] == ["test/2.png"]
    assert files["contradiction", None] == ["train/2.png", "train/4.png", "train/6.png", "test/2.png"]


def test_boxes_that_decode_wrongly_are_unreadable(dirty_boxes):
    picture = dirty_boxes / "train" / "3.png"
    picture.write_bytes(picture.read_bytes()[:2000])  # its header is whole
    report = report_of("dataset=coco", f"dataset.root={dirty_boxes}")
    assert found(report)["unreadable", "train"] == ["train/3.png"]
    assert report.plan.stops_at == "unreadable"


def test_a_train_picture_that_the_reader_leaves_out_is_told_and_stops_training_unless_skipped(dirty_boxes):
    (dirty_boxes / "train" / "3.png").write_bytes(b"")
    (dirty_boxes / "train" / "4.png").unlink()
    report = report_of("dataset=coco", f"dataset.root={dirty_boxes}")
    assert found(report)["unreadable", "train"] == ["train/3.png", "train/4.png"]
    assert "2 of 16 (12.5 %)" in report.findings[0].message
    assert report.plan.stops_at == "unreadable"
    allowed = ["data.on_error=skip", "data.max_skipped=0.2"]
    skipping = report_of("dataset=coco", f"dataset.root={dirty_boxes}", *allowed)
    assert (skipping.plan.would_run, skipping.plan.images["train"]) == (True, 14)


def test_a_val_picture_that_the_reader_refuses_is_told(dirty_boxes):
    (dirty_boxes / "val" / "3.png").write_bytes(b"")
    report = report_of("dataset=coco", f"dataset.root={dirty_boxes}")
    assert report.plan.stops_at == "refused"
    assert report.findings[0].message.endswith("; the images were checked without their labels")
    assert found(report)["unreadable", "val"] == ["val/3.png"]


@pytest.mark.parametrize("broken", ["", "train/3.png", "val/3.png", "test/3.png"])
@pytest.mark.parametrize("num_bytes", [0, 2000])  # 2000: the header is whole
@pytest.mark.parametrize("limit", [0.01, 0.2])
def test_the_verdict_on_boxes_is_what_a_run_does(dirty_boxes, broken, num_bytes, limit):
    if broken:
        (dirty_boxes / broken).write_bytes((dirty_boxes / broken).read_bytes()[:num_bytes])
    words = ["dataset=coco", f"dataset.root={dirty_boxes}", "data.on_error=skip", f"data.max_skipped={limit}"]
    check_verdict(*words)


def test_labels_without_a_box_in_val_stop_training(dirty_boxes):
    labels = dirty_boxes / "val" / "_annotations.coco.json"
    labels.write_text(json.dumps({**json.loads(labels.read_text()), "annotations": []}))
    assert report_of("dataset=coco", f"dataset.root={dirty_boxes}").plan.stops_at == "no_val_boxes"


def test_labels_that_are_no_json_leave_the_pictures_to_look_at(dirty_boxes):
    (dirty_boxes / "val" / "_annotations.coco.json").write_text("{")
    (dirty_boxes / "test" / "2.png").write_bytes((dirty_boxes / "train" / "6.png").read_bytes())
    report = report_of("dataset=coco", f"dataset.root={dirty_boxes}")
    assert "not JSON" in report.findings[0].message
    assert found(report)["leakage", "test"] == ["test/2.png"]


def test_small_boxes_are_counted_and_the_size_that_is_advised_leaves_few():
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 200, (400, 2))
    sides = generator.uniform(5, 100, (400, 2))
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    samples = DetectionSamples(
        **{"classes": ("a",), "category_ids": (1,), "names": ("1.png",), "paths": (Path("1.png"),), "reader": None},
        **{"sizes": ((300, 400),), "image_ids": (1,), "boxes": (boxes,)},
        **{"labels": (np.zeros(400, np.int64),), "crowd": (np.zeros(400, bool),)},
    )
    preprocessing = Preprocessing(size=(128, 128), mean=HALF, std=HALF)
    plain = [min(x2 - x1, y2 - y1) * 128 / 400 for x1, y1, x2, y2 in boxes.tolist()]
    np.testing.assert_allclose(short_sides(samples, preprocessing), plain, rtol=1e-5)
    (finding,) = find_small_boxes({"train": samples}, preprocessing, (8, 16, 32))
    num = sum(side < 8 for side in plain)
    assert finding.message.startswith(f"{num} of 400 (")
    advised = int(finding.message.split("img_size=")[1].split()[0])
    assert advised % 32 == 0
    larger = replace(preprocessing, size=(advised, advised))
    assert (short_sides(samples, larger) < 8).mean() <= 0.05
    smaller = replace(preprocessing, size=(advised - 32, advised - 32))
    assert (short_sides(samples, smaller) < 8).mean() > 0.05


# Parts.


@pytest.mark.parametrize(("width", "height"), [(80, 80), (300, 100), (64, 640), (1000, 64)])
def test_what_the_crop_cuts_off_is_what_a_transform_does_not_see(width, height):
    """The plain reading: paint the picture, and count how much of it the crop shows."""
    preprocessing = Preprocessing(size=(64, 64), mean=HALF, std=HALF, crop_pct=0.9, interpolation="nearest")
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, width)[None]
    ramp[..., 1] = np.linspace(0, 255, height)[:, None]
    seen = np.asarray(resize_and_crop(Image.fromarray(ramp), preprocessing)).astype(float)
    parts = [np.ptp(seen[..., channel]) / 255 * 64 / 63 for channel in (0, 1)]
    cut = cut_off(np.array([float(height)]), np.array([float(width)]), preprocessing)
    assert 1 - cut[0] == pytest.approx(parts[0] * parts[1], abs=0.03)


def test_crop_modes_that_keep_all_cut_nothing():
    sides = np.array([100.0]), np.array([1000.0])
    for mode in ("letterbox", "squash"):
        preprocessing = Preprocessing(size=(64, 64), mean=HALF, std=HALF, crop_pct=1.0, crop_mode=mode)
        assert cut_off(*sides, preprocessing) == 0


def test_the_digest_of_pixels_tells_sizes_and_pixels_apart_and_no_formats(tmp_path):
    picture = noise(0)
    for name in ("a.png", "a.bmp", "a.tif"):
        picture.save(tmp_path / name)
        assert pixel_digest(Image.open(tmp_path / name)) == pixel_digest(picture)
    flat = Image.new("RGB", (4, 6))
    assert pixel_digest(flat) != pixel_digest(flat.resize((6, 4)))
    other = picture.copy()
    other.putpixel((3, 3), (1, 2, 3))
    assert pixel_digest(other) != pixel_digest(picture)


def test_a_phones_photo_with_a_preview_is_not_called_animated(tmp_path):
    noise(0).save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[noise(1, (20, 20))])
    assert find_oddities(tmp_path / "a.jpg", 10**6) == Oddity(0)


def test_the_input_is_known_without_weights_and_without_a_network():
    config = configure("backbone=vit_tiny", "backbone.img_size=112")
    assert input_of(config, task_type_of(config)).preprocessing.size == (112, 112)
    assert input_of(configure("+experiment=detect", "dataset.root=x")).strides == (8, 16, 32)
    assert input_of(configure("backbone.name=hf-hub:someone/something")) is None


class FakeCifar:
    """Pictures in an array, as CIFAR10 has them; the first of test is the last of train."""

    classes = ("cat", "dog")

    def __init__(self, root, train=True, download=False):
        self.grey = range(20) if train else range(19, 24)
        self.targets = [grey % 2 for grey in self.grey]

    def __getitem__(self, index):
        return Image.new("RGB", (32, 32), (self.grey[index],) * 3), self.targets[index]


def test_pictures_that_are_no_files_are_looked_at_too(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar)
    report = report_of("dataset=cifar10", f"dataset.root={tmp_path}")
    assert found(report)["leakage", "test"] == ["CIFAR10 test 0"]
    assert report.plan.split_off == ("val",)
