import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vpt
from tests.conftest import make_tiny_vit
from vpt.files import read_tensors, write_tensors
from vpt.models.vit import load_vit


def make_model(prompt="deep", **options):
    torch.manual_seed(3)
    model = vpt.create_model(make_tiny_vit(), prompt=prompt, num_classes=3, num_tokens=4, **options)
    model.head.weight.data.normal_()
    model.head.bias.data.normal_()
    return model


@pytest.mark.parametrize("prompt", [None, "shallow", "deep"])
def test_a_task_gives_the_same_logits_on_the_same_backbone(tmp_path, images, prompt):
    model = make_model(prompt).eval()
    path = vpt.save_task(
        model, tmp_path / "pets.safetensors", classes=["cat", "dog", "eel"], metrics={"val": {"top1": 0.5}}
    )
    vit = make_tiny_vit()
    loaded = vpt.load_task(path, backbone=vit)
    assert torch.equal(loaded(images), model(images))
    assert loaded.backbone.vit is vit
    assert loaded.classes == ("cat", "dog", "eel")
    assert not loaded.training
    metadata = vpt.read_task(path)
    assert metadata.metrics == {"val": {"top1": 0.5}}
    assert metadata.preprocessing["size"] == [32, 32]


def test_a_task_is_loaded_onto_a_backbone_by_name_at_its_own_input_size(tmp_path):
    model = vpt.create_model("vit_nano_patch8_64", prompt="deep", num_tokens=2, num_classes=3, img_size=80).eval()
    model.head.weight.data.normal_()
    path = vpt.save_task(model, tmp_path / "pets.safetensors")
    images = torch.randn(2, 3, 80, 80)
    loaded = vpt.load_task(path, backbone="vit_nano_patch8_64")
    assert torch.equal(loaded(images), model(images))
    assert loaded.classes is None


def test_a_task_of_an_oblong_input_is_loaded_by_name(tmp_path):
    model = vpt.create_model("vit_nano_patch8_64", prompt=None, num_classes=3, img_size=(64, 96)).eval()
    loaded = vpt.load_task(vpt.save_task(model, tmp_path / "a.safetensors"), backbone="vit_nano_patch8_64")
    assert loaded(torch.zeros(1, 3, 64, 96)).shape == (1, 3)


def test_a_backbone_of_another_input_size_is_refused_with_both_sizes(tmp_path):
    path = vpt.save_task(vpt.create_model("vit_nano_patch8_64", num_classes=3), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"made for pictures of \[64, 64\] px, but the backbone takes \[96, 96\]"):
        vpt.load_task(path, backbone=load_vit("vit_nano_patch8_64", img_size=96))


def test_the_same_weights_held_in_bfloat16_are_the_same_backbone(tmp_path, images):
    path = vpt.save_task(make_model(), tmp_path / "a.safetensors")
    loaded = vpt.load_task(path, backbone=make_tiny_vit().bfloat16())
    torch.testing.assert_close(loaded(images.bfloat16()), make_model().eval()(images), rtol=0.1, atol=0.3)


def test_a_task_file_holds_prompt_and_head_only_and_is_small(tmp_path):
    path = vpt.save_task(make_model(), tmp_path / "pets.safetensors")
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"prompt.tokens", "head.weight", "head.bias"}
        metadata = json.loads(file.metadata()["vpt"])
    assert metadata["format_version"] == 1
    assert metadata["prompt"] == {"kind": "deep", "num_tokens": 4, "embed_dim": 32, "blocks": [0, 1, 2], "dropout": 0.0}
    assert path.stat().st_size < 4 * (3 * 4 * 32 + 3 * 33) + 2000


def test_a_prompt_in_some_blocks_keeps_its_blocks(tmp_path, images):
    model = make_model(blocks="last:2", dropout=0.1).eval()
    loaded = vpt.load_task(vpt.save_task(model, tmp_path / "a.safetensors"), backbone=make_tiny_vit())
    assert loaded.backbone.prompt.blocks == (1, 2)
    assert torch.equal(loaded(images), model(images))


def test_another_backbone_is_refused_with_both_names(tmp_path):
    path = vpt.save_task(make_model(), tmp_path / "pets.safetensors")
    other = make_tiny_vit()
    other.blocks[0].attn.qkv.weight.data.mul_(1.01)
    with pytest.raises(ValueError, match=r"pets\.safetensors: made for .*vit_tiny_patch16_224.* with other weights"):
        vpt.load_task(path, backbone=other)
    with pytest.raises(ValueError, match=r"made for the backbone vit_tiny.*the given one is vit_nano_patch8_64"):
        vpt.load_task(path, backbone="vit_nano_patch8_64")


def change_metadata(path, **changes):
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, {**metadata, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "task format 2; this version of vpt reads 1"),
        ({"kind": "segmentation"}, "a task of kind 'segmentation'"),
        ({"_target_": "os.system"}, r"missing or unknown fields \(_target_\)"),
        ({"prompt": {"kind": "deep", "num_tokens": -1, "embed_dim": 32}}, "its prompt layout cannot be used"),
        ({"prompt": {"code": "deep"}}, "its prompt layout cannot be used"),
        ({"num_classes": 7, "classes": None}, "its tensors are not those that its metadata describes"),
    ],
)
def test_files_of_another_format_are_refused(tmp_path, changes, message):
    path = vpt.save_task(make_model(), tmp_path / "pets.safetensors")
    change_metadata(path, **changes)
    with pytest.raises(ValueError, match=message):
        vpt.load_task(path, backbone=make_tiny_vit())


def test_edited_tensors_are_refused(tmp_path):
    path = vpt.save_task(make_model(), tmp_path / "pets.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["head.bias"][0] += 1e-3
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="damaged"):
        vpt.load_task(path, backbone=make_tiny_vit())


def test_the_number_of_class_names_is_checked_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="2 class names for a head of 3 classes"):
        vpt.save_task(make_model(), tmp_path / "pets.safetensors", classes=["cat", "dog"])
    assert list(tmp_path.iterdir()) == []
