import json

import pytest
from omegaconf import OmegaConf

from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.saved import conceal, load_config, recipe, to_plain
from vpt.config.validation import to_config


def test_the_config_of_a_run_comes_back_from_its_folder(tmp_path):
    composed = compose_config(["+experiment=quickstart", "prompt.blocks=last:2"])
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(composed, resolve=True))
    assert load_config(tmp_path / "config.yaml") == to_config(composed)
    (tmp_path / "config.yaml").write_text("prompt: {num_tokns: 3}")
    with pytest.raises(ConfigError, match=r"config\.yaml: unknown key prompt\.num_tokns"):
        load_config(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("a: [b")
    with pytest.raises(ConfigError, match=r"config\.yaml: "):
        load_config(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")


SECRET_TEXTS = [
    "${oc.env:CANARY}",
    "x/${oc.env:CANARY}",
    "${oc.env:NOT_SET,${oc.env:CANARY}}",
    "${dataset.path}",
    "${dataset[path]}",
    "${ dataset.path }",
    "${.path}",
    "${oc.select:dataset.path}",
    "${oc.decode:${oc.env:CANARY}}",
]


@pytest.mark.parametrize("text", SECRET_TEXTS)
def test_text_of_the_environment_is_shown_as_the_expression_that_asks_for_it(monkeypatch, text):
    monkeypatch.setenv("CANARY", "s3cret")
    overrides = ["dataset.path='${oc.env:CANARY}'", f"dataset.root='{text}'", "augment.transforms=[{name: '${seed}'}]"]
    composed = compose_config([*overrides, "backbone.checkpoint='${run.root}/vit.pth'"])
    config = to_config(composed)
    assert "s3cret" in config.dataset.root
    shown = conceal(config, composed)
    assert shown.dataset.root == text
    assert "s3cret" not in json.dumps(to_plain(shown)) + json.dumps(recipe(shown))
    assert shown.backbone.checkpoint == "runs/vit.pth"
    assert to_config(composed) == config  # the environment is asked again


def test_numbers_and_choices_of_the_environment_are_no_secrets_and_decide_the_result(monkeypatch):
    monkeypatch.setenv("CANARY", "7")
    monkeypatch.setenv("KIND", "shallow")
    overrides = ["seed='${oc.env:CANARY}'", "train.epochs='${seed}'", "prompt.variant='${oc.env:KIND}'"]
    composed = compose_config(overrides)
    shown = to_plain(conceal(to_config(composed), composed))
    assert (shown["seed"], shown["train"]["epochs"], shown["prompt"]["variant"]) == (7, 7, "shallow")


def test_a_recipe_has_what_decides_the_result_and_tells_nothing_of_the_disk():
    overrides = [
        "dataset=folder",
        "dataset.root=/home/me/flowers",
        "backbone.checkpoint=/data/vit.safetensors",
        "seed=3",
    ]
    told = recipe(to_config(compose_config(overrides)))
    assert told["dataset"]["root"] == "flowers"
    assert told["backbone"]["checkpoint"] == "vit.safetensors"
    assert told["seed"] == 3
    assert told["optim"]["prompt_lr"] == 0.01
    assert not {"run", "num_workers", "cache"} & told.keys()
    assert "/home" not in json.dumps(told)
