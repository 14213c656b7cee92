"""Images with more than 8 bits: the range that is found over train, and that training and inference use."""

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

import vpt
from tests.helpers import train_with
from vpt.build import load_run
from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.validation import to_config
from vpt.data.images import FULL, Decoding, read_image
from vpt.data.ranges import find_range, format_range, parse_range, scan_headers
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.predict.open_tasks import open_run
from vpt.runs.data import read_run
from vpt.serve.decoding import Upload, read_upload
from vpt.serve.schemas import prepare
from vpt.task_types.base import task_type_of

SPREAD = np.linspace(0, 1, 4096).reshape(64, 64)


def saved(folder, *images):
    """Paths of images of these numbers."""
    paths = [folder / f"{index}.tif" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([np.uint16(4095 * SPREAD)], (0, 4095)),
        ([np.uint16(3500 * SPREAD), np.uint16(100 + 3700 * SPREAD)], (0, 4095)),
        ([np.uint16(2500 * SPREAD)], (0, 2500)),
        ([np.uint16(250 * SPREAD)], (0, 255)),
        ([np.uint16(28000 + 1500 * SPREAD)], (28000, 29500)),
        ([np.int32(-300 + 700 * SPREAD)], (-300, 400)),
        ([np.float32(SPREAD)], (0, 1)),
        ([np.float32(np.where(SPREAD > 0.9, np.nan, 5 * SPREAD - 2))], (-2, 2.5)),
        ([np.uint16(np.where(SPREAD == 1, 65535, 4000 * SPREAD))], (0, 4095)),  # one pixel that is broken
        ([np.full((8, 8), 70_000, np.int32)], (70_000, 70_001)),
        ([np.uint16(40_000 * SPREAD)], FULL),
        ([np.uint16(65535 * SPREAD)], FULL),
        ([np.uint8(255 * SPREAD)], FULL),
    ],
)
def test_a_range_is_that_of_the_values_unless_they_take_half_of_16_bits(images, expected, tmp_path):
    deep = scan_headers(saved(tmp_path, *images), Decoding()).deep
    assert len(deep) == (0 if images[0].dtype == np.uint8 else len(images))
    found = find_range(deep, Decoding())
    assert found == pytest.approx(expected, abs=0.01)
    assert parse_range(format_range(found)) == found


def test_an_image_that_uses_few_of_16_bits_is_read_with_a_warning_if_no_range_is_given(tmp_path):
    for path in saved(tmp_path, np.uint16(4095 * SPREAD), np.uint16(28000 + 1500 * SPREAD)):
        with pytest.warns(UserWarning, match=f"{path}: .*range"):
            read_image(path)
        read_image(path, Decoding(range=FULL))


def test_8_bit_values_in_16_bit_files_are_read_as_in_8_bit_files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    (path,) = saved(tmp_path, pixels.astype(np.uint16))
    image = read_image(path, Decoding(range=find_range([path], Decoding())))
    assert np.array_equal(np.asarray(image)[..., 0], pixels)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Photos of 12 bits in 16, of two classes that differ in their values only."""
    root, generator = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    for split, num in (("train", 4), ("val", 2), ("test", 2)):
        for name, low in (("dark", 0), ("bright", 2095)):
            (root / split / name).mkdir(parents=True)
            for index in range(num):
                values = generator.integers(low, low + 2001, (40, 40)).astype(np.uint16)
                Image.fromarray(values).save(root / split / name / f"{index}.png")
    return root


def task_of(root, *overrides):
    return task_type_of(to_config(compose_config(["dataset=folder", f"dataset.root={root}", *overrides])))


@pytest.mark.parametrize(
    ("override", "expected", "num_levels"),
    [("auto", "0:4095", 128), ("full", "full", 9), ("1000:3000", "1000:3000", 115)],
)
def test_the_range_of_a_run_is_reported_and_used_for_all_splits(scans, override, expected, num_levels):
    task_type = task_of(scans, f"data.range={override}")
    samples = task_type.read()
    line = task_type.describe(samples)[1]
    assert line.startswith(f"8 of 8 train images have more than 8 bits per channel: data.range={expected} ")
    for split in ("train", "test"):
        assert len(np.unique(np.asarray(samples[split].read(0)))) == pytest.approx(num_levels, abs=8)


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("data.range=4095", "HIGH"),
        ("data.range=9:1", "HIGH"),
        ("data.bands=[0,1,2]", "three"),
        ("data.bands=[1]", "three"),
    ],
)
def test_a_range_and_bands_that_cannot_be_used_are_refused_by_their_key(scans, override, word):
    with pytest.raises(ConfigError, match=rf"^{override.partition('=')[0]}=.*{word}"):
        task_of(scans, override)


def test_training_evaluation_prediction_and_serving_read_with_the_range_in_the_task_file(scans, tmp_path):
    short = "backbone.img_size=32", "prompt.num_tokens=2", "train.epochs=1", "num_workers=0", "device=cpu"
    own = f"dataset.root={scans}", f"run.root={tmp_path}", 'data.background="#102030"'
    folder = train_with("dataset=folder", *own, *short)
    metadata = vpt.read_task(folder / "task.safetensors")
    assert metadata.preprocessing["range"] == [0, 4095]
    path = scans / "test" / "bright" / "0.png"
    expected = np.asarray(read_image(path, Decoding(range=(0, 4095), background="#102030")))
    for removed in (scans / "train").rglob("*.png"):  # the range is not looked for again
        Image.fromarray(np.zeros((40, 40), np.uint16)).save(removed)
    run = load_run(folder)
    _, data = read_run(run, ["test"])
    first = data.samples["test"].names.index("test/bright/0.png")
    assert np.array_equal(np.asarray(data.samples["test"].read(first)), expected)
    image, _ = data.datasets["test"][first]
    prepared = open_run(folder, checkpoint=None, device="cpu").prepare(lambda decoding: read_image(path, decoding))
    (job,) = prepare(partial(read_upload, Upload("a", path.read_bytes())), {"a": metadata})
    for found in (*prepared.inputs.values(), job.image):
        assert np.array_equal(found, image)


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_images_are_turned_once(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.arange(6, dtype=np.uint16).reshape(2, 3) * 51
    Image.fromarray(stored).save(tmp_path / f"a.{ending}", exif=exif)
    Image.fromarray(stored.astype(np.uint8)).save(tmp_path / f"b.{ending}", exif=exif)
    expected = np.asarray(read_image(tmp_path / f"b.{ending}"))
    assert np.array_equal(np.asarray(read_image(tmp_path / f"a.{ending}", Decoding(range=(0, 255)))), expected)


def test_preprocessing_of_files_without_a_decoding_is_that_of_version_0_1():
    plain = {"size": [8, 8], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9}
    plain["crop_mode"] = "center"
    preprocessing = Preprocessing.from_dict(plain)
    assert preprocessing.decoding == Decoding()
    assert preprocessing.to_dict() == plain  # so that other task files do not change
    given = {**plain, "background": "black", "range": [-2.5, 7], "bands": [4, 1, 2]}
    assert Preprocessing.from_dict(json.loads(json.dumps(given))).to_dict() == given
    for odd in ({"range": [3, 2]}, {"range": ["a", 2]}, {"bands": [1, 2]}, {"background": "none"}, {"background": 7}):
        with pytest.raises(ValueError, match=next(iter(odd))):
            Preprocessing.from_dict({**plain, **odd})


def test_damaged_metadata_are_counted_and_reported(photos, tmp_path):
    root = tmp_path / "photos"
    for path in photos.rglob("*.png"):
        copy = root / path.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        options = {"icc_profile": b"x" * 3_000_000} if path.name == "1.png" else {}
        Image.open(path).save(copy, **options)
    task_type = task_of(root)
    lines = task_type.describe(task_type.read())
    assert any(line.startswith("3 train images have damaged or very large metadata") for line in lines)
