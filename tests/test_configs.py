"""Every shipped config composes, fits the schema, and its model can be built."""

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from vpt.config.composition import compose_config, config_folder, group_choices
from vpt.config.validation import to_config
from vpt.task_types.base import task_type_of

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = group_choices("experiment")
GROUPS = ("augment", "backbone", "dataset", "head", "optim", "prompt", "tuning")
FILES = [(group, choice) for group in GROUPS for choice in group_choices(group)]
NEEDED = ["dataset.root=somewhere", "dataset.path=somewhere.csv", "dataset.name=CIFAR10"]
BOX_HEADS = ("dense", "retinanet", "fasterrcnn")


@pytest.mark.parametrize(("group", "choice"), FILES)
def test_every_file_of_a_group_composes(group, choice):
    data = {"pyramid": "dataset=pebbles", **dict.fromkeys(BOX_HEADS, "dataset=trees")}
    needed = NEEDED if group == "dataset" else [data[choice]] if choice in data else []
    config = to_config(compose_config([f"{group}={choice}", *needed]))
    text = (config_folder() / group / f"{choice}.yaml").read_text()
    assert text.startswith("# ")
    assert config.dataset.title


@pytest.mark.parametrize("choice", group_choices("backbone"))
def test_every_backbone_is_known_to_timm_with_weights_and_can_be_prompted(choice):
    import vpt.models.nano

    config = to_config(compose_config([f"backbone={choice}"]))
    weights = timm.get_pretrained_cfg(config.backbone.name)
    assert weights is not None
    assert weights.has_weights
    with torch.device("meta"):
        vit = timm.create_model(config.backbone.name, num_classes=0, depth=1)
        assert vpt.PromptedViT(vit, "deep", num_tokens=1).prompt.tokens.shape[2] == vit.embed_dim


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_its_model_is_built(name):
    import vpt.models.nano

    config = to_config(compose_config([f"+experiment={name}", "dataset.root=somewhere", "backbone.pretrained=false"]))
    model = task_type_of(config).build_model(SimpleNamespace(classes=("a", "b"), category_ids=(1, 2)))
    assert isinstance(model, vpt.Detector) == (config.task == "detection")
    assert vpt.count_parameters(model).tuned > 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_short_and_has_its_header(name):
    text = (config_folder() / "experiment" / f"{name}.yaml").read_text()
    assert len(text.splitlines()) <= 25
    for part in ("# What: ", "# Paper: ", "# Expected: ", "# Time: ", "# Command: python -m vpt.train "):
        assert part in text
    assert re.search(rf"\+experiment={name}\s", text)


def test_no_config_names_something_to_instantiate_and_no_experiment_stands_in_the_defaults():
    for path in config_folder().rglob("*.yaml"):
        assert "_target_" not in path.read_text()
    assert not re.search(r"^\s*-\s*(optional )?experiment:", (config_folder() / "train.yaml").read_text(), re.MULTILINE)


def test_every_package_and_every_folder_of_data_is_in_the_wheel():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("vpt/**/__init__.py")}
    assert set(setuptools["packages"]) == packages | {"vpt.conf"}
    folders = {path.parent.name for path in (ROOT / "vpt" / "data").glob("*/LICENSE")}
    assert set(setuptools["package-data"]["vpt.data"]) == {f"{name}/**/*" for name in folders}
