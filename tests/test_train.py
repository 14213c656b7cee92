"""A whole run, from photos to predictions, in this process."""

import csv
import json
import re
import shutil
from functools import partial
from math import log
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vpt
from tests.helpers import train_with
from vpt import build
from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.saved import conceal
from vpt.config.validation import to_config
from vpt.data.samples import ClassificationSamples
from vpt.engine.steps import OutOfMemoryError
from vpt.evaluate.__main__ import EvaluateOptions, evaluate_run
from vpt.models import block_loop
from vpt.models.vit import fingerprint, load_vit
from vpt.predict.__main__ import PredictOptions, predict_run
from vpt.task_types.classification import Classification
from vpt.train import training
from vpt.train.training import run

SMALL = [
    *("train.epochs=2", "train.batch_size=8", "train.log_every=1"),
    *("num_workers=0", "prompt.num_tokens=3", "device=cpu"),
]


def train(root, photos, *overrides):
    return train_with(
        "dataset=folder", f"dataset.root={photos}", f"run.root={root}", "run.name=colours", *SMALL, *overrides
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, photos):
    """The folder of a finished run."""
    return train(tmp_path_factory.mktemp("runs"), photos, "train.epochs=6")


def test_a_run_writes_its_config_metrics_checkpoints_and_task_file(finished):
    files = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("events.out.tfevents")}
    checkpoints = {"last.checkpoint", "previous.checkpoint"}
    assert len(events) == 1
    assert files - events == {"config.yaml", "metrics.jsonl", "result.json", "task.safetensors", *checkpoints}
    result = json.loads((finished / "result.json").read_text())
    assert result["metrics"]["test"]["top1"] > 0.9
    assert "best" not in result
    metadata = vpt.read_task(finished / "task.safetensors")
    assert metadata.classes == ["blue sky", "grass", "rose"]
    assert metadata.metrics == result["metrics"]
    assert metadata.backbone == "vit_nano_patch8_64.vpt"
    assert metadata.config["dataset"]["root"].startswith("photos")
    assert metadata.config["train"]["epochs"] == 6
    assert set(metadata.versions) == {"vpt", "torch", "timm"}


def test_tensorboard_has_scalars_images_and_texts(finished):
    events = EventAccumulator(str(finished), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    blocks = [f"block_{block:02d}" for block in range(5)]
    expected = {"train/loss", "train/grad_norm", "lr/prompt", "lr/head", "val/loss", "val/top1", "val/mean_per_class"}
    expected |= {"perf/images_per_s", "perf/data_wait_fraction", "memory/peak_mib"}
    kinds = [f"prompt_factor{factor}_{name}" for factor in (0, 1) for name in ("norm", "grad_norm", "update_ratio")]
    expected |= {f"{kind}/{block}" for kind in kinds for block in blocks}
    expected |= {f"val_recall/{name}" for name in ("blue sky", "grass", "rose")}
    expected |= {"best/val_top1", "best/test_top1"}
    assert expected <= set(tags["scalars"])
    assert set(tags["images"]) == {"train/augmented"} | {
        f"{split}/{name}" for split in ("val", "test") for name in ("confusion", "worst")
    }
    assert {"config/text_summary", "summary/text_summary", "custom_scalars__config__"} <= set(tags["tensors"])
    num_steps = 6 * 3
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, num_steps + 1))
    assert [event.step for event in events.Scalars("val/top1")] == [3, 6, 9, 12, 15, 18]
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "num_tokens: 3" in config
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_the_backbone_is_unchanged_and_the_task_file_reproduces_the_test_metric(finished, capsys):
    trained = build.load_run(finished)
    assert fingerprint(trained.model.backbone.vit) == fingerprint(load_vit("vit_nano_patch8_64"))
    values = evaluate_run(EvaluateOptions(run=str(finished), device="cpu", output=str(finished.parent / "m.json")))
    assert values == pytest.approx(json.loads((finished / "result.json").read_text())["metrics"]["test"])
    assert json.loads((finished.parent / "m.json").read_text())["metrics"] == values
    assert "blue sky" in capsys.readouterr().out


def test_images_are_predicted_to_csv_and_json(finished, photos, tmp_path):
    options = {"run": str(finished), "input": str(photos / "test"), "top_k": 2, "batch_size": 5, "device": "cpu"}
    assert predict_run(PredictOptions(**options, output=str(tmp_path / "preds.csv"))) == []
    rows = list(csv.DictReader((tmp_path / "preds.csv").read_text().splitlines()))
    assert len(rows) == 12
    right = [row["class_1"] == row["path"].split("/")[-2] for row in rows]
    assert sum(right) >= 11
    assert all(float(row["probability_1"]) >= float(row["probability_2"]) > 0 for row in rows)
    predict_run(PredictOptions(**options, output=str(tmp_path / "preds.json")))
    found = json.loads((tmp_path / "preds.json").read_text())
    assert [row["path"] for row in found] == [row["path"] for row in rows]
    assert [row["predictions"][0]["class"] for row in found] == [row["class_1"] for row in rows]


def test_unreadable_images_are_listed_and_the_others_predicted(finished, photos, tmp_path, capsys):
    good = (photos / "test" / "rose" / "0.png").read_bytes()
    for name, content in {"good.png": good, "half.png": good[: len(good) // 2], "text.jpg": b"<html>"}.items():
        (tmp_path / name).write_bytes(content)
    skipped = predict_run(PredictOptions(run=str(finished), input=str(tmp_path), output=str(tmp_path / "p.csv")))
    assert [name in line for name, line in zip(("half.png", "text.jpg"), skipped, strict=True)] == [True, True]
    assert (tmp_path / "p.csv").read_text().count("\n") == 2
    assert "skipped: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "nowhere"}, "run=nowhere: not a run folder"),
        ({"input": "nowhere"}, "nowhere: no such file or folder"),
        ({"input": "empty"}, "input=empty"),
        ({"output": "preds.txt"}, r"output=preds\.txt: must end in \.csv or \.json"),
        ({"checkpoint": "nowhere.pth"}, r"^checkpoint=nowhere\.pth: no such file"),
    ],
)
def test_wrong_paths_of_predict_are_refused_by_name(finished, photos, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    right = {"run": str(finished), "input": str(photos / "test"), "output": "p.csv"}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        predict_run(PredictOptions(**{**right, **changes}))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_the_same_seed_gives_the_same_run_with_and_without_workers(tmp_path, photos):
    one = train(tmp_path / "a", photos)
    two = train(tmp_path / "b", photos, "num_workers=2")
    for name in ("metrics.jsonl", "task.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    three = train(tmp_path / "c", photos, "seed=1")
    assert (one / "task.safetensors").read_bytes() != (three / "task.safetensors").read_bytes()


def test_a_dry_run_takes_two_steps_of_everything(tmp_path, photos):
    run_dir = train(tmp_path, photos, "mode=dry", "train.epochs=100")
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["epochs"], result["steps"]) == (1, 2)
    assert set(result["metrics"]) == {"val", "test"}
    assert (run_dir / "task.safetensors").is_file()


def test_results_are_written_before_figures_are_drawn(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(Classification, "log_end", Mock(side_effect=ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, photos, "mode=dry")
    assert {"result.json", "task.safetensors"} <= {path.name for path in tmp_path.rglob("*")}


def test_overfit_learns_one_batch_and_saves_nothing(tmp_path, photos, capsys):
    assert train(tmp_path / "runs", photos, "mode=overfit") is None
    assert "learned 8 images in" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_an_unreadable_image_of_any_split_is_refused_before_training(tmp_path, photos):
    copy = tmp_path / "photos"
    shutil.copytree(photos, copy)
    (copy / "test" / "rose" / "broken.png").write_text("<html>")
    with pytest.raises(ValueError, match=r"broken\.png"):
        train(tmp_path / "runs", copy)
    assert not (tmp_path / "runs").exists()


def test_a_value_of_the_environment_is_in_no_file_of_a_run(tmp_path, photos, monkeypatch):
    (tmp_path / "canary-s3cret").symlink_to(photos)
    monkeypatch.setenv("CANARY", "canary-s3cret")
    root = "dataset.root=" + str(tmp_path / "${oc.env:CANARY}")
    composed = compose_config(["dataset=folder", root, f"run.root={tmp_path}/runs", "run.name=colours", *SMALL])
    config = to_config(composed)
    assert config.dataset.root == str(tmp_path / "canary-s3cret")
    run_dir = run(config, conceal(config, composed))
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(files) >= 6
    assert not [path.name for path in files if b"s3cret" in path.read_bytes()]
    assert b"oc.env:CANARY" in (run_dir / "config.yaml").read_bytes()


def test_the_same_command_reports_a_finished_run_and_another_config_is_refused(finished, photos, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert train(finished.parent, photos, "train.epochs=6", "num_workers=1") == finished
    out = capsys.readouterr().out
    assert "colours: this run has finished, in 6 epochs; fresh=true would start it anew" in out
    assert re.search(r"test +0\.\d+ +\d+\.\d %", out)
    with pytest.raises(ConfigError, match=r"train\.epochs was 6, is now 2"):
        train(finished.parent, photos)
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OutOfMemoryError("batches of 8"), r"auto_batch=true, or train\.batch_size=4 train\.accumulation=6, or grad"),
        (FloatingPointError("the loss is nan; skip_nonfinite=2"), r"lower optim\.prompt_lr.* train\.skip_nonfinite=12"),
        (FloatingPointError("not finite in any epoch"), r"lower optim\.prompt_lr, .*fresh=true$"),
    ],
)
def test_config_keys_are_added_to_errors_of_the_engine(tmp_path, photos, monkeypatch, error, advice):
    def fail(*_):
        raise error

    monkeypatch.setattr(training, "fit", fail)
    with pytest.raises(type(error), match=f"{error}; .*{advice}"):
        train(tmp_path, photos, "train.accumulation=3", "train.skip_nonfinite=2")


@pytest.mark.parametrize(
    "overrides",
    [
        ["prompt=none"],
        ["prompt=shallow"],
        ["prompt.blocks=last:2", "prompt.dropout=0.1", "augment=strong"],
        ["optim=vpt_paper", "head.init=paper", "augment=vtab"],
        ["train.ema=0.9", "train.class_weights=balanced", "train.label_smoothing=0.1", "train.accumulation=2"],
        ["train.patience=1", "train.clip_norm=null", "backbone.img_size=32", "deterministic=true"],
        ["dataset.num_per_class=2", "backbone.pretrained=false", "train.precision=bf16"],
    ],
)
def test_every_choice_trains_and_its_task_can_be_used(tmp_path, photos, overrides):
    run_dir = train(tmp_path, photos, "mode=dry", *overrides)
    trained = build.load_run(run_dir)
    size = trained.preprocessing.size
    assert trained.model(torch.zeros(1, 3, *size)).shape == (1, 3)
    torch.use_deterministic_algorithms(False)


def test_an_unfinished_run_and_another_folder_cannot_be_loaded(tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        build.load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="this run has not finished"):
        build.load_run(tmp_path)


def test_balanced_class_weights_are_inverse_frequencies_with_a_mean_of_one():
    config = to_config(compose_config(["train.class_weights=balanced"]))
    samples = ClassificationSamples(
        classes=("a", "b"), targets=(0, 0, 0, 1), names=("1", "2", "3", "4"), reader=lambda _: None
    )
    losses = Classification(config).losses(SimpleNamespace(samples={"train": samples}))
    weights = [losses(torch.zeros_like, torch.zeros(1, 2), torch.tensor([label]))["class"] / log(2) for label in (0, 1)]
    assert weights == pytest.approx([4 / 6, 2.0])


# Options for large backbones.


def results_of(run_dir):
    return json.loads((run_dir / "result.json").read_text())["metrics"]


def test_a_backbone_held_in_bfloat16_trains_and_serves(tmp_path, photos, capsys):
    finished = train(tmp_path, photos, "backbone.dtype=bf16", "train.epochs=4")
    assert "frozen in bf16" in capsys.readouterr().out
    loaded = build.load_run(finished, device="cpu")
    assert {parameter.dtype for parameter in loaded.model.backbone.vit.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in loaded.model.head.parameters()} == {torch.float32}
    found = evaluate_run(EvaluateOptions(run=str(finished), device="cpu"))
    assert found["top1"] == results_of(finished)["test"]["top1"] > 0.6


def test_gradient_checkpointing_does_not_change_the_results(tmp_path, photos, monkeypatch):
    calls, checkpoint = [], block_loop.checkpoint
    monkeypatch.setattr(block_loop, "checkpoint", lambda *a, **k: calls.append(a) or checkpoint(*a, **k))
    options = ["prompt.dropout=0.3", "cache=off"]
    plain = train(tmp_path, photos, *options)
    assert not calls
    recomputed = train(tmp_path / "b", photos, "grad_checkpointing=true", *options)
    assert len(calls) == 5 * 2 * 3  # blocks, epochs, batches
    assert results_of(recomputed)["val"]["loss"] == pytest.approx(results_of(plain)["val"]["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [["grad_checkpointing=true"], ["prompt.blocks=last:1", "augment=none"]], ids=" ".join
)
def test_a_compiled_model_is_trained_with_the_same_result(tmp_path, photos, overrides, monkeypatch):
    plain = train(tmp_path, photos, *overrides)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # all but the code itself
    compiled = train(tmp_path / "b", photos, "compile=true", *overrides)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert results_of(compiled)["test"]["loss"] == pytest.approx(results_of(plain)["test"]["loss"], rel=1e-4)


def test_a_machine_without_a_compiler_is_refused_before_the_first_epoch(tmp_path, photos, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(ConfigError, match="compile=true: InvalidCxxCompiler"):
        train(tmp_path, photos, "compile=true")


@pytest.mark.slow
def test_torch_compiles_a_run(tmp_path, photos):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    torch.compiler.reset()
    plain = train(tmp_path, photos, "prompt.blocks=last:1", "augment=none")
    compiled = train(tmp_path / "b", photos, "prompt.blocks=last:1", "augment=none", "compile=true")
    assert results_of(compiled)["test"]["loss"] == pytest.approx(results_of(plain)["test"]["loss"], rel=1e-3)


TUNINGS = {
    "norm": [],
    "adapter": ["tuning.options.width=2"],
    "adaptformer": [],
    "lora": ["tuning.options.r=2"],
    "peft": ["tuning.adapters=oft", "tuning.options={oft_block_size: 32}"],
    "prompt_bias": [],
    "prompt_proj_bias": ["prompt=bilinear", "prompt.rank=2"],
}


@pytest.mark.parametrize(
    "tuning",
    [pytest.param(name, marks=() if name in ("lora", "prompt_bias") else pytest.mark.slow) for name in TUNINGS],
)
def test_every_way_of_tuning_trains_is_evaluated_and_predicts(photos, tmp_path, tuning):
    folder = train(tmp_path, photos, f"tuning={tuning}", *TUNINGS[tuning])
    metadata = vpt.read_task(folder / "task.safetensors")
    assert metadata.tuned_backbone
    assert (metadata.prompt is not None) == tuning.startswith("prompt")
    assert (metadata.adapters is None) == (tuning in ("norm", "prompt_bias", "prompt_proj_bias"))
    found = evaluate_run(EvaluateOptions(run=str(folder), split="test", device="cpu"))
    assert found["top1"] == pytest.approx(metadata.metrics["test"]["top1"])
    rows = predict_run(PredictOptions(run=str(folder), input=str(photos / "test"), output=str(tmp_path / "found.csv")))
    assert rows is not None or (tmp_path / "found.csv").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tuning=peft", "tuning.adapters=lorra"], r"tuning\.adapters='lorra': must be one of sequential"),
        (["tuning=lora", "tuning.options.rank=2"], r"to add it, type \+tuning\.options\.rank="),
        (["tuning=lora", "+tuning.options.rank=2"], "rank is unknown; the options are"),
        (["tuning=lora", "tuning.options.r=nine"], r"tuning\.options: r=nine must be"),
        (["tuning=bias", "tuning.options={r: 4}"], r"tuning\.options=.* are for adapters: type tuning=lora"),
        (["tuning=lora", "tuning.with_prompt=true", "prompt=kv"], "block 0 cannot be given keys and values: qkv is a"),
        (["tuning=lora", "tuning.options=3"], r"tuning\.options=3: "),
        (["tuning=linear", "tuning.with_prompt=true"], "tuning=linear: trains the head alone, but there is a prompt"),
    ],
)
def test_invalid_tuning_is_refused(photos, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, photos, *overrides)
