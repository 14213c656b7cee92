"""A whole run, from photos to predictions, in this process."""

import csv
import json
import math
import re
import shutil
import signal
from collections import Counter
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vpt
from tests.helpers import attempt_run, metric_lines, train_with
from vpt import build
from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.saved import conceal
from vpt.config.validation import to_config
from vpt.data.samples import ClassificationSamples
from vpt.engine.console import percent
from vpt.engine.steps import OutOfMemoryError
from vpt.evaluate.__main__ import EvaluateOptions, evaluate_run
from vpt.models import block_loop
from vpt.models.vit import fingerprint, load_vit
from vpt.predict.__main__ import PredictOptions, predict_run
from vpt.runs.folder import RunFolder
from vpt.task_types.base import task_type_of
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


def result_of(run_dir):
    return json.loads((run_dir / "result.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, photos):
    """The folder of a finished run."""
    return train(tmp_path_factory.mktemp("runs"), photos, "train.epochs=6")


def test_a_run_writes_its_config_metrics_checkpoints_and_task_file(finished):
    files = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("events.out.tfevents")}
    checkpoints = {"last.checkpoint", "previous.checkpoint"}
    assert len(events) == 1
    assert files - events == {
        "config.yaml",
        "data.jsonl",
        "metrics.jsonl",
        "result.json",
        "task.safetensors",
        *checkpoints,
    }
    result = result_of(finished)
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
    events = EventAccumulator(str(finished), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    kinds = [f"prompt_factor{factor}_{name}" for factor in (0, 1) for name in ("norm", "grad_norm", "update_ratio")]
    assert {
        *("train/loss", "train/grad_norm", "lr/prompt", "lr/head", "val/loss", "val/top1", "val/mean_per_class"),
        *("perf/images_per_s", "perf/data_wait_fraction", "memory/peak_mib", "best/val_top1", "best/test_top1"),
        *(f"{kind}/block_{block:02d}" for kind in kinds for block in range(5)),
        *(f"val_recall/{name}" for name in ("blue sky", "grass", "rose")),
    } <= set(tags["scalars"])
    assert set(tags["images"]) == {"train/augmented"} | {
        f"{split}/{name}" for split in ("val", "test") for name in ("confusion", "worst")
    }
    assert {"config/text_summary", "summary/text_summary", "custom_scalars__config__"} <= set(tags["tensors"])
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 6 * 3 + 1))
    assert [event.step for event in events.Scalars("val/top1")] == [3, 6, 9, 12, 15, 18]
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "num_tokens: 3" in config
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_the_backbone_is_unchanged_and_the_task_file_reproduces_the_test_metric(finished, capsys):
    trained = build.load_run(finished)
    assert fingerprint(trained.model.backbone.vit) == fingerprint(load_vit("vit_nano_patch8_64"))
    values = evaluate_run(EvaluateOptions(run=str(finished), device="cpu", output=str(finished.parent / "m.json")))
    assert values == pytest.approx(result_of(finished)["metrics"]["test"])
    assert json.loads((finished.parent / "m.json").read_text())["metrics"] == values
    assert "blue sky" in capsys.readouterr().out


def test_evaluate_takes_the_best_split_of_data_that_moved_and_counts_pairs_of_classes(
    finished, photos, tmp_path, capsys
):
    moved, root = shutil.copytree(finished, tmp_path / "moved"), shutil.copytree(photos, tmp_path / "photos")
    shutil.rmtree(root / "test")
    options = EvaluateOptions(str(moved), root=str(root), confusion=str(tmp_path / "c.csv"), device="cpu")
    assert evaluate_run(options) == pytest.approx(result_of(finished)["metrics"]["val"])
    printed = capsys.readouterr()
    assert "no test split: val is evaluated" in printed.err
    rows = csv.DictReader((tmp_path / "c.csv").read_text().splitlines())
    counts = Counter({(row["class"], row["predicted"]): int(row["count"]) for row in rows})
    assert 0 not in counts.values()
    for name in ("blue sky", "grass", "rose"):
        (line,) = [line for line in printed.out.splitlines() if line.startswith(name)]
        images, found = (sum(n for pair, n in counts.items() if pair[side] == name) for side in (0, 1))
        recall, precision = counts[name, name] / images, counts[name, name] / found if found else math.nan
        shown = [percent(value) for value in (recall, precision, 2 * counts[name, name] / (images + found))]
        assert re.split("  +", line) == [name, *shown, str(images)]
    config = moved / "config.yaml"
    config.write_text(config.read_text().replace(str(photos), str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"nowhere: no such .*add root="):
        evaluate_run(EvaluateOptions(str(moved), device="cpu"))
    assert evaluate_run(EvaluateOptions(str(moved), split="val", root=str(photos), device="cpu"))


def test_images_are_predicted_to_csv_and_json(finished, photos, tmp_path):
    for name in ("preds.csv", "preds.json"):
        options = {"run": str(finished), "input": str(photos / "test"), "top_k": 2, "batch_size": 5, "device": "cpu"}
        assert predict_run(PredictOptions(**options, output=str(tmp_path / name))) == []
    rows = list(csv.DictReader((tmp_path / "preds.csv").read_text().splitlines()))
    assert len(rows) == 12
    assert sum(row["class_1"] == row["path"].split("/")[-2] for row in rows) >= 11
    assert all(float(row["probability_1"]) >= float(row["probability_2"]) > 0 for row in rows)
    found = json.loads((tmp_path / "preds.json").read_text())
    pairs = [(row["path"], row["predictions"][0]["class"]) for row in found]
    assert pairs == [(row["path"], row["class_1"]) for row in rows]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "nowhere"}, "run=nowhere: not a run folder"),
        ({"input": "nowhere"}, "nowhere: no such file or folder"),
        ({"input": "empty"}, "input=empty"),
    ],
)
def test_wrong_paths_of_predict_are_refused_by_name(finished, photos, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    right = {"run": str(finished), "input": str(photos / "test"), "output": "p.csv"}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        predict_run(PredictOptions(**{**right, **changes}))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_with_and_without_workers(tmp_path, photos):
    one = train(tmp_path / "a", photos)
    two = train(tmp_path / "b", photos, "num_workers=2")
    for name in ("metrics.jsonl", "task.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    three = train(tmp_path / "c", photos, "seed=1")
    assert (one / "task.safetensors").read_bytes() != (three / "task.safetensors").read_bytes()


def test_a_dry_run_takes_two_steps_of_everything(tmp_path, photos):
    run_dir = train(tmp_path, photos, "mode=dry", "train.epochs=100")
    result = result_of(run_dir)
    assert (result["epochs"], result["steps"]) == (1, 2)
    assert set(result["metrics"]) == {"val", "test"}
    assert (run_dir / "task.safetensors").is_file()


def test_the_result_is_written_before_the_figures(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(Classification, "log_end", Mock(side_effect=MemoryError("no room for the figure")))
    with pytest.raises(MemoryError):
        train(tmp_path, photos, "mode=dry")
    result = result_of(tmp_path / "colours_dry")
    assert result["metrics"] == vpt.read_task(tmp_path / "colours_dry/task.safetensors").metrics
    lines = metric_lines(tmp_path / "colours_dry")
    assert "val_recall/rose" in lines[-2]
    assert "best/test_top1" in lines[-1]


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
    for _ in range(2):
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


MORE = ["train.epochs=9", "extend=true"]


def test_a_finished_run_is_extended_with_a_new_schedule_in_the_same_history(finished, photos, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "colours")
    before = metric_lines(finished)
    run_dir = train(tmp_path, photos, *MORE)
    output = capsys.readouterr().out
    assert "one each for epochs 1 to 6, 7 to 9 (extend=true), not one of 9 epochs" in output
    assert "extended after epoch 6" in output
    result, lines = result_of(run_dir), metric_lines(run_dir)
    assert (result["epochs"], result["steps"], result["extended_after"]) == (9, 27, [6])
    assert json.loads((run_dir / "result_6.json").read_text()) == result_of(finished)
    assert lines[: len(before) - 2] == before[:-2]  # all but the metrics of the end
    rates = {line["step"]: line["lr/head"] for line in lines if "lr/head" in line}
    assert [rates[step] for step in (19, 20, 21)] == [rates[step] for step in (1, 2, 3)]  # warm-up
    assert vpt.read_task(run_dir / "task.safetensors").config["extended_after"] == [6]
    assert train(tmp_path, photos, *MORE) == run_dir
    assert "this run has finished, in 9 epochs" in capsys.readouterr().out


@pytest.mark.slow
def test_an_extension_that_is_killed_resumes_to_the_same_bytes(finished, photos, tmp_path):
    for name in ("whole", "early", "late"):
        shutil.copytree(finished, tmp_path / name / "colours")
    whole = train(tmp_path / "whole", photos, *MORE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "make", Mock(side_effect=KeyboardInterrupt))  # before the config is changed
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "early", photos, *MORE)
    words = [f"run.root={tmp_path}/late", "dataset=folder", f"dataset.root={photos}", "run.name=colours", *SMALL]
    assert attempt_run(tmp_path / "log", [*words, *MORE], "behind a step", 5) == -signal.SIGKILL
    for name in ("early", "late"):
        again = train(tmp_path / name, photos, *MORE)
        for file in ("metrics.jsonl", "task.safetensors"):
            assert (again / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OutOfMemoryError("batches of 8"), r"8; .*auto_batch=true, or train\.batch_size=4 train\.accumulation=6, or"),
        (OutOfMemoryError("a batch of 8; try batch_size=4"), r"8; type auto_batch=true, or train\.batch_size=4"),
        (FloatingPointError("loss is nan; skip_nonfinite=2"), r"=2; lower optim\.prompt_lr.* train\.skip_nonfinite=12"),
        (FloatingPointError("not finite in any epoch"), r"epoch; lower optim\.prompt_lr, .*fresh=true$"),
    ],
)
def test_config_keys_are_added_to_errors_of_the_engine(tmp_path, photos, monkeypatch, error, advice):
    monkeypatch.setattr(training, "fit", Mock(side_effect=error))
    with pytest.raises(type(error), match=advice):
        train(tmp_path, photos, "train.accumulation=3", "train.skip_nonfinite=2")


@pytest.mark.parametrize(
    "overrides",
    [
        ["prompt=none"],
        ["prompt=shallow"],
        ["prompt.blocks=last:2", "prompt.dropout=0.1", "augment=strong"],
        ["optim=vpt_paper", "head.init=paper", "augment=vtab"],
        ["train.ema=0.9", "train.class_weights=balanced", "train.label_smoothing=0.1", "train.accumulation=2"],
        ["train.select=loss", "train.patience=1", "train.clip_norm=null", "backbone.img_size=32", "deterministic=true"],
        ["dataset.num_per_class=2", "backbone.pretrained=false", "train.precision=bf16"],
    ],
)
def test_every_choice_trains_and_its_task_can_be_used(tmp_path, photos, overrides):
    run_dir = train(tmp_path, photos, "mode=dry", *overrides)
    assert result_of(run_dir)["select"] == ("loss" if "train.select=loss" in overrides else "top1")
    trained = build.load_run(run_dir)
    size = trained.preprocessing.size
    assert trained.model(torch.zeros(1, 3, *size)).shape == (1, 3)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.select=map"], r"train\.select=map: must be one of top1, mean_per_class, top5, loss"),
        (["dataset=coco", "head=dense", "train.select=top1", "dataset.root=x"], r"must be one of map, map50, map75"),
        (["dataset.num_per_class=2", "train.select=top5", "dataset=folder"], "top5: has no meaning for 3 classes"),
    ],
)
def test_a_metric_that_a_run_does_not_have_selects_no_epoch(photos, words, message):
    roots = [f"dataset.root={photos}"] if "dataset=folder" in words else []
    with pytest.raises(ConfigError, match=message):
        task_type_of(to_config(compose_config([*words, *roots]))).read()


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
    weights = [
        losses(torch.zeros_like, torch.zeros(1, 2), torch.tensor([label]))["class"] / math.log(2) for label in (0, 1)
    ]
    assert weights == pytest.approx([4 / 6, 2.0])


# Options for large backbones.


def test_a_backbone_held_in_bfloat16_trains_and_serves(tmp_path, photos, capsys):
    finished = train(tmp_path, photos, "backbone.dtype=bf16", "train.epochs=4")
    assert "frozen in bf16" in capsys.readouterr().out
    loaded = build.load_run(finished, device="cpu")
    assert {parameter.dtype for parameter in loaded.model.backbone.vit.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in loaded.model.head.parameters()} == {torch.float32}
    found = evaluate_run(EvaluateOptions(run=str(finished), device="cpu"))
    assert found["top1"] == result_of(finished)["metrics"]["test"]["top1"] > 0.6


@pytest.mark.slow
def test_gradient_checkpointing_does_not_change_the_results(tmp_path, photos, monkeypatch):
    checkpoint = Mock(wraps=block_loop.checkpoint)
    monkeypatch.setattr(block_loop, "checkpoint", checkpoint)
    options = ["prompt.dropout=0.3", "cache=off"]
    plain = train(tmp_path, photos, *options)
    assert not checkpoint.called
    recomputed = train(tmp_path / "b", photos, "grad_checkpointing=true", *options)
    assert checkpoint.call_count == 5 * 2 * 3  # blocks, epochs, batches
    assert_loss_is_near(recomputed, plain, "val")


def assert_loss_is_near(run_dir, other, split="test", rel=1e-4):
    one, two = (result_of(folder)["metrics"][split]["loss"] for folder in (run_dir, other))
    assert one == pytest.approx(two, rel=rel)


CACHED = ["prompt.blocks=last:1", "augment=none"]
HAS_COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "overrides"),
    [
        ("aot_eager", ["grad_checkpointing=true"]),  # all but the code itself
        ("aot_eager", CACHED),
        pytest.param("inductor", CACHED, marks=pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")),
    ],
)
def test_a_compiled_model_is_trained_with_the_same_result(tmp_path, photos, backend, overrides, monkeypatch):
    torch.compiler.reset()
    plain = train(tmp_path, photos, *overrides)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compiled = train(tmp_path / "b", photos, "compile=true", *overrides)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_loss_is_near(compiled, plain, rel=1e-4 if backend == "aot_eager" else 1e-3)


def test_a_machine_without_a_compiler_is_refused_before_the_first_epoch(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(torch, "compile", Mock(side_effect=RuntimeError("InvalidCxxCompiler: none found")))
    with pytest.raises(ConfigError, match="compile=true: InvalidCxxCompiler"):
        train(tmp_path, photos, "compile=true")


@pytest.mark.parametrize(
    ("tuning", "options"),
    [
        ("lora", ["tuning.options.r=2"]),
        ("prompt_bias", []),
        pytest.param("norm", [], marks=pytest.mark.slow),
        pytest.param("adapter", ["tuning.options.width=2"], marks=pytest.mark.slow),
        pytest.param("adaptformer", [], marks=pytest.mark.slow),
        pytest.param("peft", ["tuning.adapters=oft", "tuning.options={oft_block_size: 32}"], marks=pytest.mark.slow),
        pytest.param("prompt_proj_bias", ["prompt=bilinear", "prompt.rank=2"], marks=pytest.mark.slow),
    ],
)
def test_every_way_of_tuning_trains_is_evaluated_and_predicts(photos, tmp_path, tuning, options):
    folder = train(tmp_path, photos, f"tuning={tuning}", *options)
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
