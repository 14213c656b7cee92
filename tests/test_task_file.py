import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import vpt
from tests.helpers import build_model, make_detector, make_tiny_vit
from vpt.models.detector import Detector
from vpt.models.vit import fingerprint, load_vit, preprocessing_of
from vpt.storage.files import UNSEALED, read_tensors, sha256_of, write_tensors


def train(model, images, steps=2):
    """Some steps that change everything that trains; a detection model trains on its features."""
    optimizer = torch.optim.SGD(vpt.tuned_parameters(model).values(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        if isinstance(model, Detector):
            sum(level.square().mean() for level in model.levels(images)).backward()
        else:
            model(images).square().mean().backward()
        optimizer.step()
    return model.eval()


def state_of(vit):
    return {name: tensor.clone() for name, tensor in vit.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def make_model(prompt="deep", **options):
    torch.manual_seed(3)
    model = build_model(make_tiny_vit(), prompt=prompt, num_classes=3, num_tokens=4, **options)
    model.head.weight.data.normal_()
    model.head.bias.data.normal_()
    return model


@pytest.mark.parametrize("prompt", [None, "shallow", "deep", "kv"])
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
    model = build_model("vit_nano_patch8_64", prompt="deep", num_tokens=2, num_classes=3, img_size=80).eval()
    model.head.weight.data.normal_()
    path = vpt.save_task(model, tmp_path / "pets.safetensors")
    images = torch.randn(2, 3, 80, 80)
    loaded = vpt.load_task(path, backbone="vit_nano_patch8_64")
    assert torch.equal(loaded(images), model(images))
    assert loaded.classes is None


def test_a_task_of_an_oblong_input_is_loaded_by_name(tmp_path):
    model = build_model("vit_nano_patch8_64", prompt=None, num_classes=3, img_size=(64, 96)).eval()
    loaded = vpt.load_task(vpt.save_task(model, tmp_path / "a.safetensors"), backbone="vit_nano_patch8_64")
    assert loaded(torch.zeros(1, 3, 64, 96)).shape == (1, 3)


def test_a_backbone_of_another_input_size_is_refused_with_both_sizes(tmp_path):
    path = vpt.save_task(build_model("vit_nano_patch8_64", num_classes=3), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"\[64, 64\] px, but the backbone takes \[96, 96\]"):
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
    assert metadata["format_version"] == 2
    assert metadata["prompt"] == PROMPT
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
    described = json.dumps({"sha256": UNSEALED, **metadata, **changes})  # strangers may write NaN
    path.write_bytes(save(tensors, {"vpt": described.replace(UNSEALED, sha256_of(tensors, described), 1)}))


PREPROCESSING = preprocessing_of(make_tiny_vit())
PROMPT = {"kind": "deep", "num_tokens": 4, "embed_dim": 32, "width": 32, "blocks": [0, 1, 2], "dropout": 0.0}
HEAD = {"head": "dense", "taps": [0, 1, 2], "channels": 16, "strides": [8, 16, 32], "num_convs": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "task format 3; this version of vpt reads 2"),
        ({"format_version": True}, "task format True; this version of vpt reads 2"),
        ({"_target_": "os.system"}, r"missing or unknown fields \(_target_\)"),
        ({"num_classes": 7, "classes": None}, r"not those that its metadata describes \(head\.bias\)"),
        ({"prompt": None}, r"not those that its metadata describes \(prompt\.tokens\)"),
        ({"prompt": {**PROMPT, "num_tokens": 3}}, r"not those that its metadata describes \(prompt\.tokens\)"),
        ({"prompt": {**PROMPT, "kind": "shallow"}}, r"its prompt or head cannot be used \(.*a shallow prompt enters"),
        ({"prompt": {**PROMPT, "blocks": [0, 1, 3]}}, r"its prompt or head cannot be used \(.* does not fit a ViT"),
        ({"tuned_backbone": True}, "tuned_backbone is True, which its tensors contradict"),
    ],
)
def test_files_of_another_format_are_refused(tmp_path, changes, message):
    path = vpt.save_task(make_model(), tmp_path / "pets.safetensors")
    change_metadata(path, **changes)
    with pytest.raises(ValueError, match=r"pets\.safetensors: .*" + message):
        vpt.load_task(path, backbone=make_tiny_vit())


def replaced(values, **changes):
    return {**values, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "segmentation"}, "kind is 'segmentation'"),
        ({"kind": ["detection"]}, "kind is "),
        ({"backbone": 3}, "backbone is 3; allowed: the name of a timm model"),
        ({"fingerprint": "x"}, "fingerprint is 'x'; allowed: 64 hexadecimal digits"),
        ({"num_classes": 0}, r"num_classes is 0; allowed: an integer in \[1, 100000\]"),
        ({"num_classes": 10**12}, "num_classes is "),
        ({"num_classes": True}, "num_classes is True"),
        ({"num_classes": 3.0}, "num_classes is 3.0"),
        ({"classes": ["cat", "dog"]}, "classes has 2 entries, but num_classes is 3"),
        ({"classes": ["cat", "dog", 3]}, "classes is "),
        ({"classes": "cat"}, "classes is 'cat'"),
        ({"metrics": []}, r"metrics is \[\]; allowed: an object"),
        ({"head": 3}, "head is 3; allowed: null, or an object"),
        ({"head": HEAD}, "head must be null"),
        ({"kind": "detection"}, "head is None"),
        ({"category_ids": [1, 2, 3]}, "category_ids is .* in a task of kind classification"),
        ({"tuned_backbone": 1}, "tuned_backbone is 1; allowed: true or false"),
        ({"prompt": "deep"}, "prompt is 'deep'"),
        ({"prompt": {"code": "deep"}}, "prompt is .* must be kind, num_tokens, embed_dim, width, blocks, dropout"),
        ({"prompt": replaced(PROMPT, kind="odd")}, "prompt.kind is 'odd'; allowed: shallow or deep or kv"),
        ({"prompt": replaced(PROMPT, num_tokens=-1)}, "prompt.num_tokens is -1"),
        ({"prompt": replaced(PROMPT, num_tokens=10**9)}, "prompt.num_tokens is 1000000000"),
        ({"prompt": replaced(PROMPT, embed_dim="32")}, "prompt.embed_dim is '32'"),
        ({"prompt": replaced(PROMPT, blocks=[2, 1, 0])}, "prompt.blocks is .* ascending"),
        ({"prompt": replaced(PROMPT, blocks=[])}, "prompt.blocks is "),
        ({"prompt": replaced(PROMPT, blocks="all")}, "prompt.blocks is "),
        ({"preprocessing": {}}, "preprocessing is {}; its fields must be size"),
        ({"preprocessing": replaced(PREPROCESSING, size=[32])}, "preprocessing.size is "),
        ({"preprocessing": replaced(PREPROCESSING, size=[32, 10**9])}, "preprocessing.size is "),
        ({"preprocessing": replaced(PREPROCESSING, mean=[0, 0, "a"])}, "preprocessing.mean is "),
        ({"preprocessing": replaced(PREPROCESSING, std=[0, 1, 1])}, "preprocessing.std is "),
        ({"metrics": {"val": 0.5}}, "metrics.val is 0.5; allowed: an object"),
        ({"metrics": {"val": {"top1": "high"}}}, "metrics.val.top1 is 'high'; allowed: null, or a finite number"),
        ({"versions": {"torch": 2}}, "versions.torch is 2; allowed: a text"),
        ({"backbone": "hf-hub:stranger/model"}, "backbone is 'hf-hub:stranger/model'; allowed: the name"),
        ({"config": "train.yaml"}, "config is 'train.yaml'; allowed: null, or an object"),
        ({"licence": "x" * 1001}, "licence is .*; allowed: a text of at most 1000 characters"),
        ({"note": None}, "note is None; allowed: a text of at most 10000 characters"),
        ({"preprocessing": replaced(PREPROCESSING, interpolation="random")}, "preprocessing.interpolation is 'random'"),
        ({"preprocessing": replaced(PREPROCESSING, crop_pct=0.05)}, "preprocessing.crop_pct is 0.05"),
        ({"prompt": replaced(PROMPT, dropout=1)}, r"prompt.dropout is 1; allowed: a number in \[0, 1\)"),
        ({"preprocessing": replaced(PREPROCESSING, crop_mode=None)}, "preprocessing.crop_mode is None"),
    ],
)
def test_a_field_of_another_type_or_out_of_range_is_refused_by_name(tmp_path, changes, message):
    path = vpt.save_task(make_model(), tmp_path / "pets.safetensors")
    changes = json.loads(json.dumps(changes, default=str))
    change_metadata(path, **changes)
    with pytest.raises(ValueError, match=r"pets\.safetensors: in its metadata, " + message):
        vpt.read_task(path)
    with pytest.raises(ValueError, match=r"pets\.safetensors: in its metadata, " + message):
        vpt.load_task(path, backbone=make_tiny_vit())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": None}, "head is None"),
        ({"head": {"head": "dense"}}, "head is .*; its fields must be head, taps, channels, strides, num_convs"),
        ({"head": replaced(HEAD, code="x")}, "head is .*; its fields must be"),
        ({"head": replaced(HEAD, head=None)}, "head.head is None"),
        ({"head": replaced(HEAD, taps="quarters")}, "head.taps is 'quarters'"),
        ({"head": replaced(HEAD, taps=[-1])}, "head.taps is "),
        ({"head": replaced(HEAD, channels=4097)}, r"head.channels is 4097; allowed: an integer in \[1, 4096\]"),
        ({"head": replaced(HEAD, strides=[8, 16, 10**6])}, "head.strides is "),
        ({"head": replaced(HEAD, strides=[8] * 1000)}, "head.strides is "),
        ({"head": replaced(HEAD, num_convs=10**6)}, "head.num_convs is 1000000"),
        ({"category_ids": [1, 2]}, "category_ids has 2 entries, but num_classes is 3"),
        ({"category_ids": [1, 2, 3.5]}, "category_ids is "),
        ({"head": replaced(HEAD, head="odd")}, r"its prompt or head cannot be used \(head='odd'"),
        ({"head": replaced(HEAD, strides=[8, 12, 32])}, "its prompt or head cannot be used .*12 cannot be reached"),
        ({"head": replaced(HEAD, taps=[0, 1, 9])}, "its prompt or head cannot be used .*from 0 to 2"),
        ({"head": replaced(HEAD, channels=32)}, "its tensors are not those that its metadata describes"),
        ({"head": replaced(HEAD, channels=4096, num_convs=16)}, "its tensors are not those"),
    ],
)
def test_a_head_that_cannot_be_is_refused_by_name(tmp_path, changes, message):
    path = vpt.save_task(make_detector(), tmp_path / "boxes.safetensors")
    change_metadata(path, **changes)
    with pytest.raises(ValueError, match=r"boxes\.safetensors: (in its metadata, )?" + message):
        vpt.load_task(path, backbone=make_tiny_vit(img_size=64))


def change_tensors(path, change):
    tensors, metadata = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors, metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({"backbone.norm.wrong": tensors.pop("backbone.norm.bias")}),
        lambda tensors: tensors.update({"backbone.norm.bias": torch.zeros(31)}),
        lambda tensors: tensors.update({"backbone.norm.bias": torch.zeros(32, dtype=torch.int64)}),
        lambda tensors: tensors.update({"more": torch.zeros(1)}),
        lambda tensors: tensors.pop("head.bias"),
    ],
)
def test_tensors_that_the_backbone_has_not_are_refused_and_it_stays_as_it_was(tmp_path, images, change):
    path = vpt.save_task(train(make_model(None, tuning="bias"), images), tmp_path / "a.safetensors")
    change_tensors(path, change)
    vit = make_tiny_vit()
    before = state_of(vit)
    with pytest.raises(ValueError, match=r"a\.safetensors: its tensors are not those that its metadata describes"):
        vpt.load_task(path, backbone=vit)
    assert same(state_of(vit), before)


def test_edited_tensors_are_refused(tmp_path):
    path = vpt.save_task(make_model(), tmp_path / "pets.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["head.bias"][0] += 1e-3
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="damaged"):
        vpt.load_task(path, backbone=make_tiny_vit())


@pytest.mark.parametrize(
    ("classes", "words"),
    [(["cat", "dog"], "2 class names for a head of 3 classes"), (["cat", "dog", "cat"], "'cat' more than once")],
)
def test_class_names_are_checked_before_anything_is_written(tmp_path, classes, words):
    with pytest.raises(ValueError, match=words):
        vpt.save_task(make_model(), tmp_path / "pets.safetensors", classes=classes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prompt", [None, "deep"])
@pytest.mark.parametrize("tuning", ["bias", "partial", "full"])
def test_a_task_with_a_tuned_backbone_gives_the_same_logits_and_leaves_the_given_vit_alone(
    tmp_path, images, tuning, prompt
):
    vit = make_tiny_vit()
    before, grads = state_of(vit), [parameter.requires_grad for parameter in vit.parameters()]
    other = vpt.load_task(vpt.save_task(make_model(), tmp_path / "other.safetensors"), vit)
    of_other = other(images)
    model = train(make_model(prompt, tuning=tuning), images)
    assert not same(state_of(model.backbone.vit), before)
    path = vpt.save_task(model, tmp_path / "a.safetensors")
    loaded = vpt.load_task(path, backbone=vit)
    assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    assert loaded.backbone.vit is not vit
    assert same(state_of(vit), before)
    assert torch.equal(other(images), of_other)
    assert vpt.read_task(path).tuned_backbone
    assert vpt.read_task(path).fingerprint == fingerprint(make_tiny_vit())
    untouched = make_tiny_vit()
    assert grads == [True] * len(grads)
    vpt.load_task(path, untouched)
    assert all(parameter.requires_grad for parameter in untouched.parameters())


def test_the_file_of_a_tuned_backbone_holds_its_tuned_parameters_and_no_others(tmp_path, images):
    path = vpt.save_task(train(make_model(None, tuning="partial"), images), tmp_path / "a.safetensors")
    named = [name for name, _ in make_tiny_vit().named_parameters() if name.startswith(("blocks.2.", "norm."))]
    assert set(load_file(path)) == {"head.weight", "head.bias", *(f"backbone.{name}" for name in named)}


def test_a_tuned_task_that_is_loaded_saved_and_tuned_again_still_belongs_to_the_pretrained_backbone(tmp_path, images):
    first = vpt.save_task(train(make_model(None, tuning="bias"), images), tmp_path / "first.safetensors")
    loaded = vpt.load_task(first, make_tiny_vit())
    again = vpt.save_task(loaded, tmp_path / "again.safetensors")
    assert again.read_bytes() == first.read_bytes()
    vpt.tune(loaded, "partial")
    train(loaded, images)
    path = vpt.save_task(loaded, tmp_path / "second.safetensors")
    assert {"backbone.blocks.0.attn.qkv.bias", "backbone.blocks.2.mlp.fc1.weight"} <= load_file(path).keys()
    assert torch.equal(vpt.load_task(path, make_tiny_vit())(images), loaded(images))
    vpt.tune(loaded, "linear")  # nothing of the backbone trains, but it is not as pretrained
    path = vpt.save_task(loaded, tmp_path / "third.safetensors")
    assert torch.equal(vpt.load_task(path, make_tiny_vit())(images), loaded(images))


def test_a_tuned_task_is_loaded_onto_a_backbone_by_name(tmp_path):
    model = build_model("vit_nano_patch8_64", num_classes=3, tuning="bias")
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 64, 64)
    path = vpt.save_task(train(model, images), tmp_path / "a.safetensors")
    assert torch.equal(vpt.load_task(path, "vit_nano_patch8_64")(images), model(images))


def test_a_prompt_learned_on_a_vit_that_another_model_tuned_carries_its_parameters(tmp_path, images):
    tuned = train(make_model(None, tuning="bias"), images)
    model = build_model(tuned.backbone.vit, num_classes=3, num_tokens=2)
    torch.nn.init.normal_(model.head.weight)
    path = vpt.save_task(model.eval(), tmp_path / "a.safetensors")
    assert torch.equal(vpt.load_task(path, make_tiny_vit())(images), model(images))


def test_a_task_for_pretrained_weights_is_refused_by_a_vit_that_was_tuned(tmp_path, images):
    pretrained = vpt.save_task(make_model(), tmp_path / "a.safetensors")
    model = make_model(None, tuning="bias")
    with pytest.raises(ValueError, match=r"a\.safetensors: made for pretrained weights, but the given .* was tuned"):
        vpt.load_task(pretrained, train(model, images).backbone.vit)
    path = vpt.save_task(model, tmp_path / "b.safetensors")  # its own task fits: the file has all that changed
    assert torch.equal(vpt.load_task(path, copy.deepcopy(model.backbone.vit))(images), model(images))


def test_a_backbone_that_was_unfrozen_by_hand_is_not_saved(tmp_path):
    model = make_model(None)
    model.backbone.vit.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"vpt\.tune has not chosen \(norm\.bias\)"):
        vpt.save_task(model, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def assert_equal_detections(one, other):
    assert sum(len(found["boxes"]) for found in one) > 0
    for found, wanted in zip(one, other, strict=True):
        assert all(torch.equal(found[name], wanted[name]) for name in ("boxes", "scores", "labels"))


@pytest.mark.parametrize("head", ["dense", "retinanet", "fasterrcnn"])
def test_a_detection_task_gives_the_same_boxes_on_the_same_backbone(tmp_path, head):
    model = make_detector(head, classes=["cat", "dog", "eel"], category_ids=[1, 7, 90]).eval()
    path = vpt.save_task(model, tmp_path / "boxes.safetensors", metrics={"val": {"map": 0.5}})
    vit, images = make_tiny_vit(img_size=64), torch.randn(2, 3, 64, 64)
    loaded = vpt.load_task(path, backbone=vit)
    assert_equal_detections(loaded(images), model(images))
    assert isinstance(loaded, Detector)
    assert (loaded.classes, loaded.category_ids) == (("cat", "dog", "eel"), (1, 7, 90))
    assert loaded.layout == model.layout
    assert loaded.backbone.vit is vit
    assert not loaded.training
    metadata = vpt.read_task(path)
    assert (metadata.task_type, metadata.head, metadata.category_ids) == ("detection", model.layout, [1, 7, 90])
    assert metadata.preprocessing["crop_mode"] == "letterbox"
    assert {name.split(".")[0] for name in load_file(path)} == {"prompt", "neck", "head"}


@pytest.mark.parametrize("way", [("linear", None), ("bias", None), ("partial", "shallow"), ("full", None)])
def test_a_detection_task_of_every_tuning_comes_back(tmp_path, way):
    tuning, prompt = way
    images, vit = torch.randn(2, 3, 64, 64), make_tiny_vit(img_size=64)
    model = train(make_detector(prompt=prompt, tuning=tuning), images, steps=1)
    before = state_of(vit)
    loaded = vpt.load_task(vpt.save_task(model, tmp_path / "boxes.safetensors"), backbone=vit)
    assert_equal_detections(loaded(images), model(images))
    assert (loaded.backbone.vit is vit) == (tuning == "linear")
    assert same(state_of(vit), before)


def test_a_value_that_could_not_be_loaded_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"preprocessing is .*; its fields must be size"):
        vpt.save_task(make_model(), tmp_path / "a.safetensors", preprocessing={"size": [32, 32]})
    with pytest.raises(ValueError, match=r"classes is .*at most 1000 characters"):
        vpt.save_task(make_model(), tmp_path / "a.safetensors", classes=["a", "b", "c" * 1001])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_a_task_in_a_narrow_dtype_is_half_as_large_and_nearly_the_same(tmp_path, images, dtype, tolerance):
    model = make_model().eval()
    whole = vpt.save_task(model, tmp_path / "whole.safetensors")
    half = vpt.save_task(model, tmp_path / "half.safetensors", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(half).values()} == {dtype}
    assert sum(t.nbytes for t in load_file(half).values()) * 2 == sum(t.nbytes for t in load_file(whole).values())
    loaded = vpt.load_task(half, make_tiny_vit())
    assert loaded.head.weight.dtype is torch.float32
    torch.testing.assert_close(loaded(images), model(images), rtol=tolerance * 5, atol=tolerance * 5)


def test_numbers_that_a_dtype_cannot_hold_are_refused(tmp_path):
    model = make_model()
    model.head.bias.data[0] = 1e6
    with pytest.raises(ValueError, match=r"head\.bias has numbers that are too large for float16; use"):
        vpt.save_task(model, tmp_path / "a.safetensors", dtype=torch.float16)
    assert not (tmp_path / "a.safetensors").exists()


def test_prompts_of_vit_b_with_ten_tokens_take_at_most_190_kb_in_half_precision(tmp_path):
    with torch.device("meta"):
        vit = load_vit("vit_base_patch16_224", pretrained=False)
    model = build_model(vit.to_empty(device="cpu"), prompt="deep", num_tokens=10, num_classes=100)
    path = vpt.save_task(
        model, tmp_path / "a.safetensors", classes=[f"class {i}" for i in range(100)], dtype=torch.half
    )
    assert load_file(path)["prompt.tokens"].nbytes <= 190_000
    assert path.stat().st_size <= 190_000 + 100 * (768 + 1) * 2 + 10_000


def test_config_licence_note_and_versions_come_back(tmp_path):
    path = vpt.save_task(
        make_model(), tmp_path / "a.safetensors", config={"seed": 1, "optim": {"lr": 0.1}}, licence="MIT", note="a note"
    )
    metadata = vpt.read_task(path)
    assert metadata.config == {"seed": 1, "optim": {"lr": 0.1}}
    assert (metadata.licence, metadata.note) == ("MIT", "a note")
    assert metadata.versions["torch"] == torch.__version__.partition("+")[0]


def test_a_metric_that_is_not_a_number_is_stored_as_null(tmp_path):
    path = vpt.save_task(make_model(), tmp_path / "a.safetensors", metrics={"val": {"map": float("nan"), "loss": 1}})
    assert vpt.read_task(path).metrics == {"val": {"map": None, "loss": 1.0}}


@pytest.mark.parametrize("prompt", [None, "deep"])
def test_a_file_of_version_1_is_read(tmp_path, images, prompt):
    model = make_model(prompt).eval()
    path = vpt.save_task(model, tmp_path / "pets.safetensors")
    logits = model(images)
    tensors, values = read_tensors(path)
    del values["adapters"]
    if prompt is not None:
        del values["prompt"]["width"]
    write_tensors(path, tensors, {**values, "format_version": 1})
    assert vpt.read_task(path).format_version == 2
    assert torch.equal(vpt.load_task(path, model.backbone.vit)(images), logits)
