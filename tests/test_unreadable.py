"""Images that cannot be read in runs: `data.on_error` in both types of task."""

import shutil
import subprocess
import sys

import pytest
from PIL import Image

from tests.helpers import train_with
from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.validation import to_config
from vpt.data.images import ImageError
from vpt.task_types.base import task_type_of

# Python 3.12 warns when a process with threads forks, and torch has threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

SKIP = "data.on_error=skip", "data.max_skipped=0.2"


@pytest.fixture
def album(photos, tmp_path):
    """The photos; of train one is cut in the middle and one is a text."""
    root = shutil.copytree(photos, tmp_path / "album")
    cut(root / "train" / "grass" / "3.png")
    (root / "train" / "rose" / "5.png").write_text("hello")
    return root


@pytest.fixture
def forest(boxes, tmp_path):
    """The images with boxes; of train one is cut in the middle and one is not there."""
    root = shutil.copytree(boxes, tmp_path / "forest")
    cut(root / "train" / "3.png")
    (root / "train" / "5.png").unlink()
    return root


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def task_of(root, *overrides, dataset="folder"):
    return task_type_of(to_config(compose_config([f"dataset={dataset}", f"dataset.root={root}", *overrides])))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skip_leaves_out_train_images_that_cannot_be_read_and_reports_them(album, num_workers, capsys):
    classes = task_of(album, *SKIP, f"num_workers={num_workers}")
    samples = classes.read()
    assert len(samples["train"]) == 16
    assert [name for name, _ in classes.left_out] == ["train/grass/3.png", "train/rose/5.png"]
    assert f"{album}/train/grass/3.png: broken image" in classes.left_out[0][1]
    line = classes.describe(samples)[1]
    assert line.startswith(f"2 train images cannot be read, left out; first {album}/train/grass/3.png: broken")
    for index in range(16):
        samples["train"].read(index)
    assert "check train: 2/2 batches" in capsys.readouterr().err


def test_skip_counts_from_what_is_left(album):
    samples = task_of(album, *SKIP, "dataset.num_per_class=5", "num_workers=0").read()
    assert len(samples["train"]) == 15
    with pytest.raises(ValueError, match="class 'grass' has 5 train images, fewer than num_per_class=6"):
        task_of(album, *SKIP, "dataset.num_per_class=6", "num_workers=0").read()


def test_stop_is_the_default_and_reads_headers(album):
    with pytest.raises(ImageError, match=r"train/rose/5\.png: not an image.*; replace or remove") as error:
        task_of(album).read()
    assert "grass" not in str(error.value)  # its header is whole


def test_more_than_may_be_skipped_and_a_class_that_would_be_lost_stop_the_run(album):
    with pytest.raises(ConfigError, match=r"^2 of 18 train .* data\.max_skipped=0\.1 allows; first .*3\.png"):
        task_of(album, "data.on_error=skip", "data.max_skipped=0.1", "num_workers=0").read()
    for path in (album / "train" / "rose").iterdir():
        path.write_text("hello")
    with pytest.raises(ConfigError, match="class 'rose': none of its train images can be read"):
        task_of(album, "data.on_error=skip", "data.max_skipped=1", "num_workers=0").read()


@pytest.mark.parametrize("split", ["val", "test"])
def test_val_and_test_never_skip(album, split):
    for name in ("0.png", "2.png"):
        cut(album / split / "grass" / name)
    with pytest.raises(ImageError, match=rf"{split}/grass/0\.png: broken image.*; 1 more cannot be read"):
        task_of(album, *SKIP, "num_workers=0").read()


def test_a_whole_album_has_nothing_left_out(photos):
    classes = task_of(photos, "data.on_error=skip", "num_workers=0")
    assert len(classes.describe(classes.read())) == 1
    assert classes.left_out == []


def test_boxes_stop_at_a_missing_image_by_default_and_skip_it_and_what_cannot_be_decoded(forest):
    with pytest.raises(ImageError, match=r"train/5\.png: no such file.*leave it out of train with data\.on_error=skip"):
        task_of(forest, dataset="boxes").read()
    trees = task_of(forest, *SKIP, "num_workers=0", dataset="boxes")
    samples = trees.read()
    assert len(samples["train"]) == 14
    assert sorted(name for name, _ in trees.left_out) == ["train/3.png", "train/5.png"]
    assert any(line.startswith("2 train images cannot be read, left out; first ") for line in trees.describe(samples))


@pytest.mark.parametrize("overrides", [(), SKIP])
@pytest.mark.parametrize("split", ["val", "test"])
def test_boxes_of_val_and_test_never_lose_an_image(boxes, tmp_path, split, overrides):
    root = shutil.copytree(boxes, tmp_path / "forest")
    (root / split / "2.png").unlink()
    with pytest.raises(ImageError, match=rf"{split}/2\.png: no such file; replace or remove"):
        task_of(root, *overrides, dataset="boxes").read()


@pytest.mark.parametrize(("override", "word"), [("data.background=whte", "whte"), ("data.max_pixels=1919", "1,919")])
def test_how_images_are_decoded_comes_from_the_config(photos, boxes, override, word):
    for root, dataset in ((photos, "folder"), (boxes, "boxes")):
        with pytest.raises(ValueError, match=word):
            task_of(root, override, dataset=dataset).read()


def test_a_background_reaches_the_images_of_both_tasks(photos, boxes, tmp_path):
    for source, name, dataset in ((photos, "train/grass/0.png", "folder"), (boxes, "train/1.png", "boxes")):
        root = shutil.copytree(source, tmp_path / dataset)
        with Image.open(root / name) as image:
            size = image.size
        Image.new("RGBA", size, (0, 0, 0, 0)).save(root / name)
        train = task_of(root, 'data.background="#0a141e"', "num_workers=0", dataset=dataset).read()["train"]
        assert train.read(train.names.index(name)).getpixel((0, 0)) == (10, 20, 30)


def test_images_above_pillows_own_limit_cannot_be_allowed():
    with pytest.raises(ConfigError, match=r"data\.max_pixels=178956971 is out of range"):
        to_config(compose_config(["data.max_pixels=178956971"]))


def test_a_run_trains_without_what_it_leaves_out(album, tmp_path, capsys):
    short = "backbone=vit_nano", "train.epochs=1", "num_workers=0", f"run.root={tmp_path / 'runs'}"
    train_with("dataset=folder", f"dataset.root={album}", *SKIP, *short)
    assert "2 train images cannot be read, left out; first" in capsys.readouterr().out


@pytest.mark.slow
def test_an_image_that_breaks_while_training_is_one_line_with_loader_processes(photos, tmp_path):
    root = shutil.copytree(photos, tmp_path / "album")
    cut(root / "train" / "grass" / "3.png")
    arguments = "backbone=vit_nano", "num_workers=2", "cache=off", "train.epochs=1", f"run.root={tmp_path / 'runs'}"
    command = [sys.executable, "-m", "vpt.train", "dataset=folder", f"dataset.root={root}", *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    (line,) = [line for line in process.stderr.splitlines() if "error" in line]
    assert line.startswith(f"error: {root}/train/grass/3.png: broken image")
