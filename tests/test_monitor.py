import io
import math
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from tests.helpers import metric_lines
from vpt.engine.monitor import CHARTS, Monitor, overview
from vpt.task_types.classification import Classification
from vpt.task_types.detection import Detection


def events_of(run_dir: Path) -> EventAccumulator:
    kinds = ("scalars", "images", "tensors")
    return EventAccumulator(str(run_dir), size_guidance=dict.fromkeys(kinds, 0)).Reload()


def test_scalars_come_back_with_their_steps_and_values(tmp_path):
    with Monitor(tmp_path) as monitor:
        for step in range(1, 31):
            monitor.scalars({"train/loss": 1 / step, "lr/prompt": torch.tensor(0.01 * step)}, step)
            assert len(metric_lines(tmp_path)) == step  # a line can be read before the run ends
        monitor.scalars({"val/top1": np.float64(0.5)}, 30)
    events = events_of(tmp_path)
    assert set(events.Tags()["scalars"]) == {"train/loss", "lr/prompt", "val/top1"}
    points = events.Scalars("train/loss")
    assert [point.step for point in points] == list(range(1, 31))
    assert [point.value for point in points] == pytest.approx([1 / step for step in range(1, 31)])
    assert events.Scalars("lr/prompt")[-1].value == pytest.approx(0.3)
    assert metric_lines(tmp_path)[0] == {"step": 1, "train/loss": 1.0, "lr/prompt": pytest.approx(0.01)}
    assert metric_lines(tmp_path)[-1] == {"step": 30, "val/top1": 0.5}
    assert len(metric_lines(tmp_path)) == 31


def test_numbers_that_are_not_finite_become_null_and_the_tag_step_is_refused(tmp_path):
    with Monitor(tmp_path) as monitor:
        monitor.scalars({"train/loss": math.nan, "val/loss": -math.inf, "lr/head": 1}, 1)
        with pytest.raises(ValueError, match='"step"'):
            monitor.scalars({"step": 1.0}, 1)
    assert metric_lines(tmp_path) == [{"step": 1, "train/loss": None, "val/loss": None, "lr/head": 1.0}]
    assert math.isnan(events_of(tmp_path).Scalars("train/loss")[0].value)


def test_images_and_text_are_read_back(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    with Monitor(tmp_path) as monitor:
        monitor.images("val/confusion", picture, 5)
        monitor.images("val/worst", [picture, 255 - picture], 5)
        monitor.images("val/prompts", picture[None], 5)
        monitor.text("run/config", "```yaml\nseed: 1\n```")
    events = events_of(tmp_path)
    assert set(events.Tags()["images"]) == {"val/confusion", "val/worst_00", "val/worst_01", "val/prompts_00"}
    (event,) = events.Images("val/worst_01")
    assert event.step == 5
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), 255 - picture)
    (event,) = events.Tensors("run/config/text_summary")
    assert event.tensor_proto.string_val[0].decode() == "```yaml\nseed: 1\n```"


@pytest.mark.parametrize("picture", [np.zeros((3, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8)])
def test_images_of_another_shape_or_type_are_refused(tmp_path, picture):
    with Monitor(tmp_path) as monitor, pytest.raises(ValueError, match=r"must be \(H, W, 3\) uint8"):
        monitor.images("val/worst", [picture], 1)


def test_hyperparameters_and_their_results_stay_in_the_same_run(tmp_path):
    run_dir = tmp_path / "runs" / "first"
    with Monitor(run_dir) as monitor:
        monitor.scalars({"val/top1": 0.8}, 40)
        settings = {"seed": 1, "prompt": {"kind": "deep", "impl": None, "dropout": 0.1}, "blocks": [0, 1]}
        monitor.hparams(
            settings, {"test/top1": torch.tensor(0.75)}, usual={"seed": 0, "prompt": {**settings["prompt"]}}
        )
    events_file, metrics_file = sorted(path.name for path in run_dir.iterdir())
    assert (events_file[:20], metrics_file) == ("events.out.tfevents.", "metrics.jsonl")
    events = events_of(run_dir)
    start = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    values = {name: value.WhichOneof("kind") for name, value in start.session_start_info.hparams.items()}
    texts = dict.fromkeys(("prompt.kind", "prompt.impl", "blocks"), "string_value")
    assert values == {"seed": "number_value", "prompt.dropout": "number_value", **texts}
    assert start.session_start_info.hparams["prompt.kind"].string_value == "deep"
    experiment = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    assert [info.name.tag for info in experiment.experiment.metric_infos] == ["test/top1"]
    names = [info.name for info in experiment.experiment.hparam_infos]
    assert names == ["seed", "blocks", "prompt.kind", "prompt.impl", "prompt.dropout"]  # the unusual ones first
    (point,) = events.Scalars("test/top1")
    assert (point.step, point.value) == (40, 0.75)
    assert metric_lines(run_dir)[-1] == {"step": 40, "test/top1": 0.75}


@pytest.mark.parametrize(
    ("task_type", "metrics"),
    [
        (Classification, ["val/top1", "val/mean_per_class"]),
        (Detection, ["train/box_loss", "val/map", "val/map50", "val/map75"]),
    ],
)
def test_the_overview_page_shows_every_tag_that_training_writes_once(tmp_path, task_type, metrics):
    Monitor(tmp_path, layout=overview(task_type.charts)).close()
    (event,) = events_of(tmp_path).Tensors("custom_scalars__config__")
    (page,) = Layout.FromString(event.tensor_proto.string_val[0]).category
    assert page.title == "overview"
    patterns = [tag for chart in page.chart for tag in chart.multiline.tag]
    tags = [*metrics, "train/loss", "val/loss", "lr/prompt", "lr/head"]
    tags += [f"{kind}/block_07" for kind in ("prompt_grad_norm", "prompt_norm", "prompt_update_ratio")]
    tags += ["perf/images_per_s", "perf/data_wait_fraction", "memory/peak_mib"]
    for tag in tags:
        assert sum(re.match(pattern, tag) is not None for pattern in patterns) == 1, tag
    assert [chart.title for chart in page.chart] == ["loss", *task_type.charts, *CHARTS]
    (of_norms,) = overview({}, block=7)["prompt norm"]
    shown = [f"{name}_norm/{row}" for name in ("prompt", "prompt_factor1") for row in ("block_07", "all_blocks")]
    assert all(re.search(of_norms, tag) for tag in shown)
    assert not re.search(of_norms, "prompt_norm/block_06")


def test_lines_after_the_checkpoint_are_removed_when_the_run_resumes_and_all_when_it_starts_anew(tmp_path):
    with Monitor(tmp_path) as monitor:
        monitor.scalars({"train/loss": 0.5}, 1)
        num_bytes = monitor.sync()
        monitor.scalars({"train/loss": 0.4}, 2)
        monitor.scalars({"train/loss": 0.3}, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    with Monitor(tmp_path, resume_at=(num_bytes, 1)) as monitor:
        monitor.scalars({"train/loss": 0.2}, 2)
    assert [(line["step"], line["train/loss"]) for line in metric_lines(tmp_path)] == [(1, 0.5), (2, 0.2)]
    points = [(point.step, point.value) for point in events_of(tmp_path).Scalars("train/loss")]
    assert points == [(1, 0.5), (2, pytest.approx(0.2))]
    with Monitor(tmp_path) as monitor:
        monitor.scalars({"train/loss": 0.5}, 7)
    assert [line["step"] for line in metric_lines(tmp_path)] == [7]


def test_paces_and_memory_are_in_the_events_only(tmp_path):
    with Monitor(tmp_path) as monitor:
        monitor.scalars({"train/loss": 0.5, "perf/images_per_s": 10.0, "memory/peak_mib": 7.0}, 1)
    assert metric_lines(tmp_path) == [{"step": 1, "train/loss": 0.5}]
    assert {"perf/images_per_s", "memory/peak_mib"} <= set(events_of(tmp_path).Tags()["scalars"])


def test_a_folder_that_cannot_be_written_is_reported_once_and_training_continues(tmp_path, capsys):
    (tmp_path / "runs").write_text("a file where a folder should be")
    with Monitor(tmp_path / "runs" / "first") as monitor:
        for step in (1, 2, 3):
            monitor.scalars({"train/loss": 1.0}, step)
        monitor.text("run/config", "text")
        monitor.hparams({"seed": 1}, {"test/top1": 0.5})
        assert monitor.sync() == 0
    warnings = [line.partition(" of ")[0] for line in sorted(capsys.readouterr().err.splitlines())]
    assert warnings == ["warning: TensorBoard events", "warning: metrics.jsonl"]


def test_metrics_and_events_are_written_when_the_other_fails(tmp_path, monkeypatch, capsys):
    with Monitor(tmp_path / "a") as monitor:
        monitor.scalars({"train/loss": 1.0}, 1)
        with monkeypatch.context() as patch:
            patch.setattr(SummaryWriter, "add_scalar", Mock(side_effect=OSError(28, "No space left on device")))
            monitor.scalars({"train/loss": 0.5}, 2)
            monitor.scalars({"train/loss": 0.25}, 3)
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert [line["step"] for line in metric_lines(tmp_path / "a")] == [1, 2, 3]
    with Monitor(tmp_path / "b") as monitor:
        (tmp_path / "b" / "metrics.jsonl").mkdir()
        monitor.scalars({"train/loss": 0.5}, 1)
        monitor.scalars({"train/loss": 0.5}, 2)
    assert "metrics.jsonl of" in capsys.readouterr().err
    assert len(events_of(tmp_path / "b").Scalars("train/loss")) == 2


def test_a_disk_that_is_full_for_a_while_leaves_no_half_lines(small_disk, capsys):
    disk = small_disk("64k")
    with Monitor(disk) as monitor:
        for step in range(2000):
            monitor.scalars({f"train/{name}": step / 3 for name in "abcdefgh"}, step)
            if step == 1500:
                (disk / "metrics.jsonl").write_text("")
    lines = metric_lines(disk)
    assert 0 < len(lines) < 600
    assert all(len(line) == 9 for line in lines)
    assert capsys.readouterr().err.count("metrics.jsonl of") == 1


def test_importing_the_monitor_imports_neither_tensorboard_nor_torch():
    code = "import sys, vpt.engine.monitor; print(sorted({'torch', 'tensorboard', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
