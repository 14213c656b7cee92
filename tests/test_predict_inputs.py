"""Images and frames are read batch by batch, ahead of the model, and never all at once."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vpt.predict.inputs
from tests.helpers import write_clip
from vpt.data.images import DEFAULT_DECODING, read_image
from vpt.predict.inputs import Frames, ImageFiles, is_video


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Nine images, 0 to 8 by their grey, of which number 4 is unreadable."""
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for number in range(9):
        Image.new("RGB", (5 + number, 5), (number,) * 3).save(tmp_path / "photos" / "sub" / f"{number}.png")
    (tmp_path / "photos" / "sub" / "4.png").write_text("<html>")
    monkeypatch.chdir(tmp_path)
    return Path("photos")


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "clip.avi")


def chunks_of(inputs, size):
    return [inputs.paths[start : start + size] for start in range(0, len(inputs.paths), size)]


def grey(read):
    return int(np.asarray(read(DEFAULT_DECODING))[0, 0, 0])


def test_batches_hold_prepared_images_and_why_others_cannot_be_read(folder):
    images = ImageFiles(folder)
    first, (reason, *second), third = images.read(chunks_of(images, 4), grey)
    assert (first, second, third) == ([0, 1, 2, 3], [5, 6, 7], [8])
    assert reason.startswith("photos/sub/4.png: not a")
    assert list(images.read([], grey)) == []


def test_only_two_batches_are_read_before_the_first_is_taken_and_no_more_after_the_end(folder, monkeypatch):
    read = []

    def spy(path, decoding):
        read.append(path)
        return read_image(path, decoding)

    monkeypatch.setattr(vpt.predict.inputs, "read_image", spy)
    images = ImageFiles(folder)
    batches = images.read(chunks_of(images, 2), grey)
    assert read == []
    assert next(batches) == [0, 1]
    batches.close()
    assert set(read) <= set(images.paths[:4])


def test_an_error_of_the_preparation_is_raised(folder):
    def refuse(image):
        raise TypeError("a bug")

    images = ImageFiles(folder)
    with pytest.raises(TypeError, match="a bug"):
        list(images.read(chunks_of(images, 4), refuse))


@pytest.mark.parametrize(
    ("given", "root"),
    [("photos", "photos"), ("photos/sub/3.png", "photos/sub"), ("photos/*/3.png", "photos"), ("*/sub/3.png", ".")],
)
def test_names_are_relative_to_the_folder_or_to_that_of_the_pattern(folder, given, root):
    images = ImageFiles(Path(given))
    assert images.root == Path(root)
    assert Path("photos/sub/3.png") in images.paths


def test_frames_that_are_not_requested_are_left_out_and_the_others_are_the_same(clip):
    frames = Frames(clip, every=2)
    chunks = chunks_of(frames, 2)
    assert chunks[1] == [frames.root / f"clip.avi/00000{number}.jpg" for number in (4, 6)]
    every = list(frames.read(chunks, grey))
    assert np.concatenate(every) == pytest.approx([0, 60, 120, 180], abs=8)
    assert list(frames.read(chunks[1:], grey)) == every[1:]
    assert list(frames.read([], grey)) == []


def test_the_stamp_of_a_frame_is_that_of_its_video(clip, folder):
    frames, images = Frames(clip, 1), ImageFiles(folder)
    assert {frames.stamp(path) for path in frames.paths} == {(clip.stat().st_size, clip.stat().st_mtime_ns)}
    before = [images.stamp(path) for path in images.paths]
    os.utime(images.paths[2], ns=(1, 1))
    after = [images.stamp(path) for path in images.paths]
    assert [index for index in range(9) if before[index] != after[index]] == [2]


def test_a_folder_named_like_a_video_is_a_folder(clip, tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    assert [is_video(path) for path in (clip, tmp_path / "folder.mp4", tmp_path)] == [True, False, False]
