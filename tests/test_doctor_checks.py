"""Checks of the doctor: problems put into a data set on purpose are found, and the verdict is that of a run."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torchvision
from PIL import Image

from tests.helpers import edit_json
from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.validation import to_config
from vpt.data.readers.coco import read_coco
from vpt.data.transforms.preprocessing import Preprocessing, resize_and_crop
from vpt.doctor.images import cut_off
from vpt.doctor.reading import read_data
from vpt.doctor.report import check
from vpt.doctor.scan import Oddity, find_oddities, pixel_digest
from vpt.doctor.training_plan import input_of
from vpt.task_types.base import task_type_of
from vpt.task_types.box_findings import find_small_boxes, short_sides
from vpt.task_types.findings import Level

HALF = (0.5, 0.5, 0.5)


def configure(*words):
    return to_config(compose_config(["num_workers=0", "run.name=unused", *words]))


def report_of(root, *words, dataset="folder"):
    return check(configure(f"dataset={dataset}", f"dataset.root={root}", *words), "the command")


def found(report):
    """Names of the files of each finding, by code and split."""
    return {(f.code, f.split): [file.file for file in f.files] for f in report.findings}


def cut_short(path, num_bytes):
    path.write_bytes(path.read_bytes()[:num_bytes])


def noise(seed, size=(70, 66), channels=3):
    shape = (size[1], size[0], channels) if channels > 1 else size[::-1]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def save_folder(root, num=6, classes=("cat", "dog")):
    """Class folders of different images, in three splits; returns the root."""
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
    """Every kind of problem that the reader of class folders accepts."""
    train, val, test = (folder / split / "cat" for split in ("train", "val", "test"))
    (train / "text.jpg").write_text("no image")
    for name in ("empty.png", "phone.heic"):
        (train / name).write_bytes(b"")
    for source, target in (
        (train / "0.png", train / "short.png"),
        (train / "1.png", train / "copy.png"),
        (train / "3.png", test / "leak.png"),
        (train / "4.png", folder / "train" / "dog" / "cat.png"),
    ):
        shutil.copyfile(source, target)
    cut_short(train / "short.png", 2000)  # the header is complete
    Image.new("1", (8000, 6500)).save(val / "huge.png")
    Image.open(train / "2.png").save(val / "again.bmp")
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
    return folder


def test_every_problem_is_found_and_nothing_is_changed(dirty):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in dirty.rglob("*")}
    report = report_of(dirty)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in dirty.rglob("*")} == before
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
    levels = [finding.level for finding in report.findings]
    assert levels == sorted(levels, key=list(Level).index)
    details = {file.file: f"{file.same_as} {file.detail}" for finding in report.findings for file in finding.files}
    for name, words in (
        ("train/cat/empty.png", "empty"),
        ("train/cat/short.png", "broken"),
        ("train/cat/text.jpg", "not an"),
        ("val/cat/huge.png", "52,000,000 pixels are more than the 50,000,000"),
        ("val/cat/again.bmp", "train/cat/2.png the same pixels in another file"),
        ("test/cat/leak.png", "train/cat/3.png the same file"),
        ("train/cat/4.png", "labelled cat"),
        ("train/dog/cat.png", "labelled dog"),
    ):
        assert words in details[name]
    assert str(dirty) not in json.dumps(report.to_dict())
    parallel = report_of(dirty, "num_workers=2", "train.batch_size=5")
    assert [finding.to_dict() for finding in parallel.findings] == [finding.to_dict() for finding in report.findings]


def test_a_clean_data_set_has_no_findings(folder):
    report = report_of(folder)
    assert (report.is_fine, report.findings, report.plan.split_off, report.plan.next) == (True, [], (), "the command")
    assert "no problems found" in str(report)
    assert "would run: train 12, val 12, test 12; 1 steps per epoch, 20 in 20 epochs" in str(report)


def test_unreadable_train_images_that_training_skips_are_a_warning(dirty):
    (dirty / "val" / "cat" / "huge.png").unlink()
    report = report_of(dirty, "data.on_error=skip", "data.max_skipped=0.5")
    assert {finding.code: finding.level for finding in report.findings}["unreadable"] is Level.warning
    assert report.plan.would_run
    assert report.plan.images["train"] == len(report.scans["train"].columns) - 3
    assert report_of(dirty, "data.on_error=skip", "data.max_skipped=0.1").plan.stops_at == "unreadable"


def test_the_next_step_is_to_fix_images_or_to_skip_them(folder):
    (folder / "train" / "dog" / "bad.png").write_bytes(b"")
    assert report_of(folder, "data.max_skipped=0.2").plan.next.endswith("the command data.on_error=skip")
    assert report_of(folder).plan.next == "fix unreadable, then check again"  # 1 of 13 is too much to skip
    shutil.copyfile(folder / "train" / "dog" / "0.png", folder / "test" / "dog" / "leak.png")
    (folder / "train" / "dog" / "bad.png").unlink()
    report = report_of(folder)
    assert (report.is_fine, report.plan.would_run, report.plan.stops_at) == (False, True, None)
    assert report.plan.next == "fix leakage, then check again"
    assert report_of(folder / "train", "dataset.test_fraction=0.2").plan.split_off == ("val", "test")


def test_small_and_missing_classes_are_named(tmp_path):
    folder = save_folder(tmp_path / "pets", num=12, classes=("ant", "bee", "cow"))
    for path in sorted((folder / "train" / "bee").iterdir())[1:]:
        path.unlink()
    shutil.rmtree(folder / "val" / "cow")
    report = report_of(folder)
    messages = {(f.code, f.split): (f.level, f.message) for f in report.findings}
    assert messages["few", "train"] == (Level.warning, "1 of 3 (33.3 %) classes have fewer than 5 images: bee (1)")
    assert messages["missing_class", "val"][1].endswith("val cannot evaluate them: cow")
    level, message = messages["imbalance", "train"]
    assert level is Level.warning
    assert "12.0 to 1; train.class_weights=balanced would weight their losses by 0.69 and 8.3" in message  # 25/(3*12)
    assert report.counts["train"].tolist() == [12, 1, 12]
    assert report.to_dict()["splits"]["val"]["images_of_class"] == {"ant": 12, "bee": 12, "cow": 0}


def test_images_of_refused_folders_are_checked(dirty):
    (dirty / "val" / "bird").mkdir()
    noise(200).save(dirty / "val" / "bird" / "0.png")
    (dirty / "train" / "ghost").mkdir()
    report = report_of(dirty)
    first = report.findings[0]
    assert (first.code, first.level) == ("refused", Level.error)
    assert report.plan.stops_at == "refused"
    files = found(report)
    assert files["unreadable", "train"] == ["train/cat/empty.png", "train/cat/short.png", "train/cat/text.jpg"]
    assert files["leakage", "test"] == ["test/cat/leak.png"]
    missing = {f.split: f.message for f in report.findings if f.code == "missing_class"}
    assert missing["train"].endswith("they cannot be learned: bird, ghost")


def test_images_of_a_refused_table_are_checked_if_there_are_any(folder, monkeypatch):
    (folder / "train" / "cat" / "bad.png").write_bytes(b"")
    (folder / "all.csv").write_text("path,label\ntrain/cat/0.png,cat\nnowhere.png,dog\n")
    report = check(configure("dataset=csv", f"dataset.path={folder / 'all.csv'}"), "the command")
    assert "all.csv, row 3: no such file" in report.findings[0].message
    assert found(report)["unreadable", "train"] == ["train/cat/bad.png"]
    assert (report.counts, report.to_dict()["classes"]) == ({}, [])
    (folder / "empty").mkdir()
    monkeypatch.chdir(folder / "empty")
    for words in (["dataset=folder", "dataset.root=nowhere"], ["dataset=csv", "dataset.path=no.csv"]):
        with pytest.raises(ConfigError, match=r"nowhere|no\.csv"):
            read_data(configure(*words))


def test_num_per_class_limits_the_images_used(folder):
    assert "num_per_class=7" in report_of(folder, "dataset.num_per_class=7").findings[0].message
    assert report_of(folder, "dataset.num_per_class=2").plan.images == {"train": 4, "val": 12, "test": 12}


def check_verdict(*words):
    """Compare the verdict of the doctor with what a run does; returns the plan."""
    plan = check(configure(*words), "the command").plan
    try:
        used = {split: len(samples) for split, samples in task_type_of(configure(*words)).read().items()}
    except ValueError:
        assert not plan.would_run
    else:
        assert (plan.would_run, plan.images) == (True, used)
    return plan


ALL_DOGS = [f"train/dog/{i}.png" for i in range(6)]


@pytest.mark.parametrize(
    ("broken", "more", "stops_at"),
    [
        ([], "", None),
        (ALL_DOGS[:1], "", None),
        (ALL_DOGS[:4], "", "unreadable"),  # a third of train
        (["val/dog/0.png"], "", "unreadable"),
        (ALL_DOGS, "data.max_skipped=0.6", "lost_class"),
        ([*ALL_DOGS, *(name.replace("dog", "cat") for name in ALL_DOGS)], "data.max_skipped=1", "unreadable"),
        ([], "dataset.num_per_class=7", "refused"),
    ],
)
def test_the_verdict_is_what_a_run_does(folder, broken, more, stops_at):
    for name in broken:
        cut_short(folder / name, 2000)
    words = ["dataset=folder", f"dataset.root={folder}", "data.on_error=skip", more or "data.max_skipped=0.2"]
    assert check_verdict(*words).stops_at == stops_at


def test_names_that_are_not_utf_8_are_printed_with_escapes_and_a_pipe_is_not_read(folder):
    (folder / "train" / "dog" / os.fsdecode(b"\xff\x1b[31m.png")).write_bytes(b"")
    os.mkfifo(folder / "train" / "dog" / "pipe.png")
    report = report_of(folder)
    assert "not a plain file" in report.scans["train"].errors.values()
    assert "train/dog/\\udcff\\x1b[31m.png" in str(report)
    assert "train/dog/\\udcff\x1b[31m.png" in {file["file"] for file in report.to_dict()["findings"][0]["files"]}
    json.dumps(report.to_dict(), ensure_ascii=False).encode()


@pytest.fixture
def dirty_boxes(boxes, tmp_path):
    """The images of `boxes`, with every kind of wrong box in train."""
    root = shutil.copytree(boxes, tmp_path / "boxes")
    wrong = [[300, 5, 9, 9], [5, 5, 0, 9], [40, 40, -20, -20], [-4, 5, 30, 30], [5, 5, float("nan"), 9], [5, 5, 6, 5]]
    polygon = {"bbox": None, "segmentation": [[2, 2, 9, 2, 9, 9]]}

    def spoil(content):
        first, second, *_ = rows = content["annotations"]
        rows += [{"image_id": 101, "category_id": 3, "bbox": box} for box in [*wrong, []]]
        rows += [{**first}, {**second, "category_id": 99}]
        rows += [{"image_id": 102, "category_id": 17, "bbox": [9, 9, 50, 50], "iscrowd": 1}]
        rows += [{"image_id": "102", "category_id": 17.0, "bbox": ["9", 9, 40, 50]}]
        rows += [{"image_id": 102, "category_id": 17, **polygon}]
        content["images"].append(content["images"][0] | {"id": 999})
        for number, row in enumerate(rows, 1):
            row["id"] = number

    edit_json(root / "train" / "_annotations.coco.json", spoil)
    shutil.copy(root / "val" / "1.png", root / "train" / "beside.png")
    return root


def test_every_wrong_box_is_reported_with_its_place(dirty_boxes):
    report = report_of(dirty_boxes, "backbone.img_size=64", dataset="coco")
    assert report.is_fine
    num = {f.code: len(f.files) for f in report.findings}
    assert num.items() >= {"converted": 1, "repeated": 1, "unnamed": 1}.items()
    codes = [
        "unknown",
        "not_finite",
        "swapped",
        "outside",
        "clipped",
        "small",
        "duplicate",
        "crowd",
        "invalid",
        "polygon",
    ]
    assert {code: num[code] for code in num if code.startswith("boxes_")} == {f"boxes_{code}": 1 for code in codes}
    (outside,) = next(f.files for f in report.findings if f.code == "boxes_outside")
    assert "box (300, 5, 309, 14) of train/1.png" in outside.detail
    strict = report_of(dirty_boxes, "dataset.strict=true", dataset="coco")
    assert strict.plan.stops_at == "repeated"
    levels = {f.code: f.level for f in strict.findings}
    assert (levels["boxes_swapped"], levels["boxes_crowd"]) == (Level.error, Level.note)


def test_copies_with_other_boxes_and_broken_images_are_found(dirty_boxes):
    shutil.copyfile(dirty_boxes / "train" / "4.png", dirty_boxes / "train" / "2.png")
    shutil.copyfile(dirty_boxes / "train" / "6.png", dirty_boxes / "test" / "2.png")
    cut_short(dirty_boxes / "train" / "3.png", 2000)  # the header is complete
    report = report_of(dirty_boxes, dataset="coco")
    files = found(report)
    assert files["duplicates", "train"] == ["train/4.png"]
    assert files["leakage", "test"] == ["test/2.png"]
    assert files["contradiction", None] == ["train/2.png", "train/4.png", "train/6.png", "test/2.png"]
    assert files["unreadable", "train"] == ["train/3.png"]
    assert report.plan.stops_at == "unreadable"


def test_train_images_that_the_reader_skips_stop_training_unless_allowed(dirty_boxes):
    (dirty_boxes / "train" / "3.png").write_bytes(b"")
    (dirty_boxes / "train" / "4.png").unlink()
    report = report_of(dirty_boxes, dataset="coco")
    assert found(report)["unreadable", "train"] == ["train/3.png", "train/4.png"]
    assert "2 of 16 (12.5 %)" in report.findings[0].message
    assert report.plan.stops_at == "unreadable"
    skipping = report_of(dirty_boxes, "data.on_error=skip", "data.max_skipped=0.2", dataset="coco")
    assert (skipping.plan.would_run, skipping.plan.images["train"]) == (True, 14)


def test_labels_that_the_reader_refuses_leave_the_images_to_check(dirty_boxes):
    labels, image = dirty_boxes / "val" / "_annotations.coco.json", dirty_boxes / "val" / "3.png"
    content = labels.read_text()
    labels.write_text(json.dumps({**json.loads(content), "annotations": []}))
    assert report_of(dirty_boxes, dataset="coco").plan.stops_at == "no_val_boxes"
    labels.write_text("{")
    shutil.copyfile(dirty_boxes / "train" / "6.png", dirty_boxes / "test" / "2.png")
    report = report_of(dirty_boxes, dataset="coco")
    assert "not JSON" in report.findings[0].message
    assert found(report)["leakage", "test"] == ["test/2.png"]
    labels.write_text(content)
    image.write_bytes(b"")
    report = report_of(dirty_boxes, dataset="coco")
    assert report.plan.stops_at == "refused"
    assert report.findings[0].message.endswith("without their labels")
    assert found(report)["unreadable", "val"] == ["val/3.png"]


@pytest.mark.parametrize("num_bytes", [0, 2000])  # 2000: the header is complete
@pytest.mark.parametrize(("broken", "limit"), [("", 0.2), ("train", 0.01), ("train", 0.2), ("val", 0.2), ("test", 0.2)])
def test_the_verdict_on_boxes_is_what_a_run_does(dirty_boxes, broken, num_bytes, limit):
    if broken:
        cut_short(dirty_boxes / broken / "3.png", num_bytes)
    check_verdict("dataset=coco", f"dataset.root={dirty_boxes}", "data.on_error=skip", f"data.max_skipped={limit}")


def test_small_boxes_are_counted_and_the_advised_size_leaves_few(boxes):
    generator = np.random.default_rng(0)
    corners, sides = generator.uniform(0, 200, (400, 2)), generator.uniform(5, 100, (400, 2))
    found = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    one = read_coco(boxes)["train"].take([0])
    labels, crowd = np.zeros(400, np.int64), np.zeros(400, bool)
    samples = replace(one, sizes=((300, 400),), boxes=(found,), labels=(labels,), crowd=(crowd,))

    def sides_at(size):
        return short_sides(samples, Preprocessing(size=(size, size), mean=HALF, std=HALF))

    plain = [min(x2 - x1, y2 - y1) * 128 / 400 for x1, y1, x2, y2 in found.tolist()]
    np.testing.assert_allclose(sides_at(128), plain, rtol=1e-5)
    preprocessing = Preprocessing(size=(128, 128), mean=HALF, std=HALF)
    (finding,) = find_small_boxes({"train": samples}, preprocessing, (8, 16, 32))
    assert finding.message.startswith(f"{sum(side < 8 for side in plain)} of 400 (")
    advised = int(finding.message.split("img_size=")[1].split()[0])
    assert advised % 32 == 0
    assert (sides_at(advised) < 8).mean() <= 0.05 < (sides_at(advised - 32) < 8).mean()


@pytest.mark.parametrize(("width", "height"), [(80, 80), (300, 100), (64, 640), (1000, 64)])
def test_the_cut_off_area_is_what_the_transform_does_not_show(width, height):
    """Paint the image with ramps, and measure how much of them the crop shows."""
    preprocessing = Preprocessing(size=(64, 64), mean=HALF, std=HALF, crop_pct=0.9, interpolation="nearest")
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, width)[None]
    ramp[..., 1] = np.linspace(0, 255, height)[:, None]
    seen = np.asarray(resize_and_crop(Image.fromarray(ramp), preprocessing)).astype(float)
    parts = [np.ptp(seen[..., channel]) / 255 * 64 / 63 for channel in (0, 1)]
    cut = cut_off(np.array([float(height)]), np.array([float(width)]), preprocessing)
    assert 1 - cut[0] == pytest.approx(parts[0] * parts[1], abs=0.03)
    for mode in ("letterbox", "squash"):
        whole = replace(preprocessing, crop_pct=1.0, crop_mode=mode)
        assert cut_off(np.array([float(height)]), np.array([float(width)]), whole) == 0


def test_digests_depend_on_pixels_and_size_but_not_on_the_format(tmp_path):
    image, flat = noise(0), Image.new("RGB", (4, 6))
    for name in ("a.png", "a.bmp", "a.tif"):
        image.save(tmp_path / name)
        assert pixel_digest(Image.open(tmp_path / name)) == pixel_digest(image)
    before = pixel_digest(image), pixel_digest(flat)
    image.putpixel((3, 3), (1, 2, 3))
    assert len({*before, pixel_digest(image), pixel_digest(flat.resize((6, 4)))}) == 4


def test_a_photo_with_a_preview_is_not_animated(tmp_path):
    noise(0).save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[noise(1, (20, 20))])
    assert find_oddities(tmp_path / "a.jpg", 10**6) == Oddity(0)


def test_the_input_is_known_without_weights_and_without_a_network():
    words = ["backbone=vit_tiny", "backbone.img_size=112"], ["+experiment=detect", "dataset.root=x"]
    classes, boxes, remote = (configure(*one) for one in (*words, ["backbone.name=hf-hub:someone/something"]))
    assert input_of(classes, task_type_of(classes)).preprocessing.size == (112, 112)
    assert input_of(boxes, task_type_of(boxes)).strides == (8, 16, 32)
    assert input_of(remote, task_type_of(remote)) is None


class FakeCifar(list):
    """Images in an array, as in CIFAR10; the first of test is the last of train."""

    classes = ("cat", "dog")

    def __init__(self, root, train=True, download=False):
        super().__init__((Image.new("RGB", (32, 32), (i,) * 3), i % 2) for i in (range(20) if train else range(19, 24)))
        self.targets = [target for _, target in self]


def test_images_that_are_not_files_are_checked_too(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar)
    report = report_of(tmp_path, dataset="cifar10")
    assert found(report)["leakage", "test"] == ["CIFAR10 test 0"]
    assert report.plan.split_off == ("val",)
