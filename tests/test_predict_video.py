"""Videos are read as if they were folders of images."""

import csv

import numpy as np
import pytest
from PIL import Image

from tests.helpers import write_clip
from vpt.config.errors import ConfigError
from vpt.data.images import ImageError
from vpt.predict.__main__ import PredictOptions, predict_run
from vpt.predict.video import Video


@pytest.fixture(params=[("clip.avi", "MJPG"), ("clip.MP4", "mp4v")], ids=lambda pair: pair[1])
def clip(request, tmp_path):
    name, codec = request.param
    return write_clip(tmp_path / name, codec)


def reds(frames):
    return [np.asarray(frame)[..., 0].mean() for frame in frames]


def test_all_frames_come_in_order_upright_and_in_rgb(clip):
    video = Video(clip)
    frames = list(video.frames())
    assert len(frames) == 7
    assert {(frame.size, frame.mode) for frame in frames} == {((64, 48), "RGB")}
    assert reds(frames) == pytest.approx([30 * number for number in range(7)], abs=8)
    assert np.asarray(frames[6])[..., 2].mean() < 20
    assert video.names[:2] == [clip / "000000.jpg", clip / "000001.jpg"]


def test_every_nth_frame_is_read_and_named_by_its_number(clip):
    video = Video(clip, every=3)
    assert [path.stem for path in video.names] == ["000000", "000003", "000006"]
    assert reds(video.frames()) == pytest.approx([0, 90, 180], abs=8)


def test_a_file_that_is_not_a_video_is_refused_by_name(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ImageError, match=r"text\.mp4: no frame can be read"):
        Video(tmp_path / "text.mp4")
    with pytest.raises(ImageError, match=r"gone\.mp4: no such file"):
        Video(tmp_path / "gone.mp4")


def test_boxes_in_a_video_are_written_and_drawn_frame_by_frame(tmp_path, boxes, clip, tasks):
    options = {"task": str(tasks / "boxes.safetensors"), "input": str(clip), "batch_size": 2, "min_score": 0.0}
    output, drawn = tmp_path / "found.csv", tmp_path / "drawn"
    assert predict_run(PredictOptions(**options, output=str(output), drawings=str(drawn), every=3)) == []
    frames = {f"{clip.name}/{number:06d}.jpg" for number in (0, 3, 6)}
    assert {path.relative_to(drawn).as_posix() for path in drawn.rglob("*.jpg")} == frames
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert {row["path"] for row in rows} == {str(clip.parent / name) for name in frames}
    with Image.open(drawn / clip.name / "000006.jpg") as picture:
        assert picture.size == (64, 48)
    with pytest.raises(ConfigError, match=r"every=3 is for a video, and input=.*test is none"):
        predict_run(PredictOptions(**{**options, "input": str(boxes / "test")}, output=str(output), every=3))
