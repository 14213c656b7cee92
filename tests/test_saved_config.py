import json
from dataclasses import replace

import pytest
import yaml

from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.saved import conceal, load_config, recipe, to_plain
from vpt.config.validation import to_config
from vpt.runs.folder import RunFolder

# The config of `dataset=coco dataset.root=/data/cells head=dense head.taps=last`, as version 0.1 saved it.
FIRST_CONFIG = """{
backbone: {name: vit_nano_patch8_64.vpt, pretrained: true, checkpoint: null, img_size: null, dtype: fp32},
prompt: {kind: deep, title: bilinear, num_tokens: 20, blocks: all, dropout: 0.0, form: bilinear, rank: 8, whiten: false,
  fraction: 0.3, init: patch, init_from: null, impl: auto},
tuning: {kind: prompt, with_prompt: false, num_blocks: 1, adapters: sequential, options: null, lr: 0.0001,
  title: bilinear},
head: {name: dense, title: '', init: zero, taps: last, channels: 128, strides: null, num_convs: null},
dataset: {kind: boxes, title: coco, form: coco, annotations: null, strict: false, root: /data/cells, path: null,
  name: null, download: false, train: train800.txt, val: val200.txt, test: test.txt, val_fraction: 0.2,
  test_fraction: null, num_per_class: null, split_seed: 0},
data: {max_pixels: 50000000, background: white, on_error: stop, max_skipped: 0.01, timeout_s: 120.0},
augment: {transforms: [{name: RandomResizedCrop, scale: [0.5, 1.0]}, {name: HorizontalFlip, p: 0.5}], crop_mode: null,
  crop_pct: null, min_visibility: 0.2},
optim: {name: adamw, prompt_lr: 0.01, head_lr: 0.001, scale_lr: false, weight_decay: 0.0001, momentum: 0.9,
  warmup_epochs: 1.0},
train: {epochs: 20, batch_size: 64, accumulation: 1, clip_norm: 1.0, label_smoothing: 0.0, class_weights: none,
  patience: null, ema: null, precision: auto, skip_nonfinite: 0, log_every: 10},
run: {root: runs, name: null, title: coco_bilinear, save_minutes: 5.0},
mode: train, fresh: false, auto_batch: false, seed: 0, deterministic: false, device: auto, num_workers: null,
compile: false, grad_checkpointing: false, cache: auto, cache_gb: 4.0, cache_dir: null}
"""


def test_the_config_of_a_run_is_loaded_from_its_folder(tmp_path):
    composed = compose_config(["+experiment=quickstart", "prompt.blocks=last:2"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_plain(to_config(composed))))
    assert load_config(path) == to_config(composed)
    for text, message in [("prompt: {num_tokns: 3}", r"unknown key prompt\.num_tokns"), ("a: [b", "")]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=rf"config\.yaml: {message}"):
            load_config(path)
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")


def test_a_run_of_version_0_1_is_read_and_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["dataset=coco", "dataset.root=/data/cells", "head=dense", "head.out_indices=last"]
    config = to_config(compose_config(words))
    folder = RunFolder(config, config)
    assert folder.path.name == "coco_bilinear_64587ab5"  # the digest is that of version 0.1
    folder.path.mkdir(parents=True)
    (folder.path / "config.yaml").write_text(FIRST_CONFIG)
    saved = load_config(folder.path / "config.yaml")
    assert saved == replace(config, dataset=replace(config.dataset, required=[], test_fraction=0.0))
    with folder:
        assert not folder.is_finished
    config.prompt.variant, config.run.name = "kv", folder.path.name
    with pytest.raises(ConfigError, match=r"prompt\.variant was deep, is now kv"), RunFolder(config, config):
        pass


@pytest.mark.parametrize(
    "text",
    [
        *("${oc.env:CANARY}", "x/${oc.env:CANARY}", "${oc.env:NOT_SET,${oc.env:CANARY}}"),
        *("${dataset.path}", "${dataset[path]}", "${ dataset.path }", "${.path}"),
        *("${oc.select:dataset.path}", "${oc.decode:${oc.env:CANARY}}"),
    ],
)
def test_text_from_the_environment_is_saved_as_the_expression_that_reads_it(monkeypatch, text):
    monkeypatch.setenv("CANARY", "s3cret")
    overrides = ["dataset.path='${oc.env:CANARY}'", f"dataset.root='{text}'", "augment.transforms=[{name: '${seed}'}]"]
    composed = compose_config([*overrides, "backbone.checkpoint='${run.root}/vit.pth'"])
    config = to_config(composed)
    assert "s3cret" in config.dataset.root
    shown = conceal(config, composed)
    assert shown.dataset.root == text
    assert "s3cret" not in json.dumps(to_plain(shown)) + json.dumps(recipe(shown))
    assert shown.backbone.checkpoint == "runs/vit.pth"
    assert to_config(composed) == config  # the environment is read again


def test_numbers_and_choices_from_the_environment_are_not_secrets(monkeypatch):
    monkeypatch.setenv("CANARY", "7")
    monkeypatch.setenv("VARIANT", "shallow")
    overrides = ["seed='${oc.env:CANARY}'", "train.epochs='${seed}'", "prompt.variant='${oc.env:VARIANT}'"]
    composed = compose_config(overrides)
    shown = to_plain(conceal(to_config(composed), composed))
    assert (shown["seed"], shown["train"]["epochs"], shown["prompt"]["variant"]) == (7, 7, "shallow")


def test_a_recipe_has_what_decides_the_result_and_no_paths_of_this_machine():
    paths = ["dataset.root=/home/me/flowers", "backbone.checkpoint=/data/vit.safetensors"]
    values = recipe(to_config(compose_config(["dataset=folder", "seed=3", *paths])))
    assert (values["dataset"]["root"], values["backbone"]["checkpoint"]) == ("flowers", "vit.safetensors")
    assert (values["seed"], values["optim"]["prompt_lr"]) == (3, 0.01)
    assert not {"run", "num_workers", "cache"} & values.keys()
    assert "/home" not in json.dumps(values)


@pytest.mark.parametrize(("reader", "expected"), [("folder", 0.0), ("torchvision", None)])
def test_a_run_of_version_0_1_has_no_test_split_off_train(reader, expected, tmp_path):
    text = FIRST_CONFIG.replace("kind: boxes", f"kind: {reader}").replace("name: dense", "name: linear")
    text = text.replace("taps: last", "taps: quarters").replace("form: coco", "form: auto")
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(tmp_path / "config.yaml").dataset.test_fraction == expected
