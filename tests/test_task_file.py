import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

import vpt
from tests.helpers import TINY_VITS, build_model, make_detector, make_tiny_vit
from vpt.models.detector import Detector
from vpt.models.task_file import open_task, write_task
from vpt.models.tuning import unwrapped
from vpt.models.vit import fingerprint, load_vit
from vpt.storage.files import UNSEALED, read_tensors, sha256_of, write_bytes, write_tensors


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


@pytest.mark.parametrize(
    ("prompt", "options"),
    [(None, {}), ("shallow", {}), ("deep", {}), ("kv", {}), ("deep", {"blocks": "last:2", "dropout": 0.1})],
)
def test_a_task_gives_the_same_logits_on_the_same_backbone(tmp_path, images, prompt, options):
    model = make_model(prompt, **options).eval()
    given = {"config": {"seed": 1, "optim": {"lr": 0.1}}, "licence": "MIT", "note": "a note"}
    metrics = {"val": {"top1": 0.5, "map": float("nan"), "loss": 1}}
    path = vpt.save_task(model, tmp_path / "a.safetensors", classes=["cat", "dog", "eel"], metrics=metrics, **given)
    vit = make_tiny_vit()
    loaded = vpt.load_task(path, backbone=vit)
    assert torch.equal(loaded(images), model(images))
    assert loaded.backbone.vit is vit
    assert prompt is None or loaded.backbone.prompt.blocks == model.backbone.prompt.blocks
    assert loaded.classes == ("cat", "dog", "eel")
    assert not loaded.training
    metadata = vpt.read_task(path)
    assert metadata.metrics == {"val": {"top1": 0.5, "map": None, "loss": 1.0}}
    assert metadata.preprocessing["size"] == [32, 32]
    assert {name: getattr(metadata, name) for name in given} == given
    assert metadata.versions["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize(("size", "tuning"), [((80, 80), "prompt"), ((64, 96), "bias")])
def test_a_task_is_loaded_onto_a_backbone_by_name_at_its_own_input_size(tmp_path, size, tuning):
    model = build_model("vit_nano_patch8_64", num_tokens=2, num_classes=3, img_size=size, tuning=tuning)
    model.head.weight.data.normal_()
    images = torch.randn(2, 3, *size)
    path = vpt.save_task(train(model, images), tmp_path / "pets.safetensors")
    loaded = vpt.load_task(path, backbone="vit_nano_patch8_64")
    assert torch.equal(loaded(images), model(images))
    assert loaded.classes is None


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


def test_another_backbone_or_input_size_is_refused_with_both(tmp_path):
    path = vpt.save_task(make_model(), tmp_path / "pets.safetensors")
    other = make_tiny_vit()
    other.blocks[0].attn.qkv.weight.data.mul_(1.01)
    for backbone, message in (
        (other, r"pets\.safetensors: made for .*vit_tiny_patch16_224.* with other weights"),
        ("vit_nano_patch8_64", "made for the backbone vit_tiny.*the given one is vit_nano_patch8_64"),
    ):
        with pytest.raises(ValueError, match=message):
            vpt.load_task(path, backbone=backbone)
    vpt.save_task(build_model("vit_nano_patch8_64", num_classes=3), path)
    with pytest.raises(ValueError, match=r"\[64, 64\] px, but the backbone takes \[96, 96\]"):
        vpt.load_task(path, backbone=load_vit("vit_nano_patch8_64", img_size=96))


def change_metadata(path, to, **changes):
    tensors, metadata = read_tensors(path)
    described = json.dumps({"sha256": UNSEALED, **metadata, **changes}, default=str)  # strangers may write NaN
    write_bytes(to, save(tensors, {"vpt": described.replace(UNSEALED, sha256_of(tensors, described), 1)}))
    return to


PROMPT = {"kind": "deep", "num_tokens": 4, "embed_dim": 32, "width": 32, "blocks": [0, 1, 2], "dropout": 0.0}
HEAD = {"head": "dense", "taps": [0, 1, 2], "channels": 16, "strides": [8, 16, 32], "num_convs": 1}


REFUSED = {  # a field, and values that it cannot have
    "kind": ["depth", ["detection"]],
    "backbone": [3, "hf-hub:stranger/model"],
    "fingerprint": ["x"],
    "num_classes": [0, 10**12, True, 3.0],
    "classes": [["cat", "dog"], ["cat", "dog", 3], "cat"],
    "head": [3, HEAD],
    "category_ids": [[1, 2, 3]],
    "tuned_backbone": [1, True],
    "prompt": ["deep", {"code": "deep"}],
    "prompt.kind": ["odd"],
    "prompt.num_tokens": [-1, 10**9],
    "prompt.embed_dim": ["32"],
    "prompt.blocks": [[2, 1, 0], [], "all"],
    "prompt.dropout": [1],
    "preprocessing": [{}],
    "preprocessing.size": [[32], [32, 10**9]],
    "preprocessing.mean": [[0, 0, "a"]],
    "preprocessing.std": [[0, 1, 1]],
    "preprocessing.interpolation": ["random"],
    "preprocessing.crop_pct": [0.05],
    "preprocessing.crop_mode": [None],
    "metrics": [[]],
    "metrics.val": [0.5, {"top1": "high"}],
    "versions.torch": [2],
    "config": ["train.yaml"],
    "licence": ["x" * 1001],
    "note": [None],
}
REFUSED_OF_DETECTORS = {
    "head": [None, {"head": "dense"}, {**HEAD, "code": "x"}],
    "head.head": [None],
    "head.taps": ["quarters", [-1]],
    "head.channels": [4097],
    "head.strides": [[8, 16, 10**6], [8] * 1000],
    "head.num_convs": [10**6],
    "category_ids": [[1, 2], [1, 2, 3.5]],
}


@pytest.mark.parametrize(
    ("make", "field", "values"),
    [
        *((make_model, *row) for row in REFUSED.items()),
        *((make_detector, *row) for row in REFUSED_OF_DETECTORS.items()),
    ],
)
def test_a_field_of_another_type_or_out_of_range_is_refused_by_name(tmp_path, make, field, values):
    path = vpt.save_task(make(), tmp_path / "a.safetensors", metrics={"val": {"top1": 0.5}})
    for value in values:
        outer, _, inner = field.partition(".")
        change = {**vpt.read_task(path).to_json()[outer], inner: value} if inner else value
        with pytest.raises(ValueError, match=rf"a\.safetensors: .*{field}"):
            vpt.read_task(change_metadata(path, tmp_path / "b" / path.name, **{outer: change}))


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (make_model, {"format_version": 4}, "task format 4; this version of vpt reads"),
        (make_model, {"format_version": True}, "task format True; this version of vpt reads"),
        (make_model, {"_target_": "os.system"}, r"missing or unknown fields \(_target_\)"),
        (make_model, {"num_classes": 7}, r"not those that its metadata describes \(head\.bias\)"),
        (make_model, {"prompt": None}, r"not those that its metadata describes \(prompt\.tokens\)"),
        (make_model, {"prompt": {**PROMPT, "num_tokens": 3}}, r"not those that .* \(prompt\.tokens\)"),
        (make_model, {"prompt": {**PROMPT, "kind": "shallow"}}, r"cannot be used \(.*a shallow prompt enters"),
        (make_model, {"prompt": {**PROMPT, "blocks": [0, 1, 3]}}, r"cannot be used \(.* does not fit a ViT"),
        (make_model, {"kind": "detection"}, "head is None"),
        (make_detector, {"head": {**HEAD, "head": "odd"}}, r"cannot be used \(head='odd'"),
        (make_detector, {"head": {**HEAD, "strides": [8, 12, 32]}}, "cannot be used .*12 cannot be reached"),
        (make_detector, {"head": {**HEAD, "taps": [0, 1, 9]}}, "cannot be used .*from 0 to 2"),
        (make_detector, {"head": {**HEAD, "channels": 32}}, "not those that its metadata describes"),
        (make_detector, {"head": {**HEAD, "channels": 4096, "num_convs": 16}}, "not those that"),
    ],
)
def test_fields_that_contradict_each_other_the_tensors_or_the_backbone_are_refused(tmp_path, make, changes, message):
    model = make()
    path = vpt.save_task(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: .*" + message):
        vpt.load_task(change_metadata(path, path, **changes), backbone=model.backbone.vit)


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


@pytest.mark.parametrize(
    ("classes", "words"),
    [(["cat", "dog"], "2 class names for a head of 3 classes"), (["cat", "dog", "cat"], "'cat'")],
)
def test_class_names_are_checked_before_anything_is_written(tmp_path, classes, words):
    with pytest.raises(ValueError, match=words):
        vpt.save_task(make_model(), tmp_path / "pets.safetensors", classes=classes)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_version_0_1_may_have_equal_class_names(tmp_path):
    path = vpt.save_task(make_model(), tmp_path / "pets.safetensors", classes=["cat", "dog", "eel"])
    metadata, tensors = open_task(path)
    write_task(path, replace(metadata, classes=["cat", "dog", "cat"]), tensors)
    assert vpt.load_task(path, backbone=make_tiny_vit()).classes == ("cat", "dog", "cat")


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


@pytest.mark.parametrize(
    ("tuning", "prompt"), [("linear", None), ("bias", None), ("partial", "shallow"), ("full", None)]
)
def test_a_detection_task_of_every_tuning_comes_back(tmp_path, tuning, prompt):
    images, vit = torch.randn(2, 3, 64, 64), make_tiny_vit(img_size=64)
    model = train(make_detector(prompt=prompt, tuning=tuning), images, steps=1)
    before = state_of(vit)
    loaded = vpt.load_task(vpt.save_task(model, tmp_path / "boxes.safetensors"), backbone=vit)
    assert_equal_detections(loaded(images), model(images))
    assert (loaded.backbone.vit is vit) == (tuning == "linear")
    assert same(state_of(vit), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preprocessing": {"size": [32, 32]}}, "preprocessing is .*; its fields must be size"),
        ({"classes": ["a", "b", "c" * 1001]}, "classes is .*at most 1000 characters"),
        ({"classes": ["cat", "dog"]}, "2 class names for a head of 3 classes"),
        ({"dtype": torch.float16}, r"head\.bias has numbers that are too large for float16; use"),
        ({}, r"vpt\.tune has not chosen \(norm\.bias\)"),
    ],
)
def test_a_value_that_could_not_be_loaded_is_not_saved(tmp_path, options, message):
    model = make_model()
    model.head.bias.data[0] = 1e6
    model.backbone.vit.norm.requires_grad_(not options)
    with pytest.raises(ValueError, match=message):
        vpt.save_task(model, tmp_path / "a.safetensors", **options)
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


def test_prompts_of_vit_b_with_ten_tokens_take_at_most_190_kb_in_half_precision(tmp_path):
    with torch.device("meta"):
        vit = load_vit("vit_base_patch16_224", pretrained=False)
    model = build_model(vit.to_empty(device="cpu"), prompt="deep", num_tokens=10, num_classes=100)
    path = vpt.save_task(
        model, tmp_path / "a.safetensors", classes=[f"class {i}" for i in range(100)], dtype=torch.half
    )
    assert load_file(path)["prompt.tokens"].nbytes <= 190_000
    assert path.stat().st_size <= 190_000 + 100 * (768 + 1) * 2 + 10_000


@pytest.mark.parametrize("prompt", [None, "deep"])
@pytest.mark.parametrize("version", [1, 2])
def test_a_file_of_an_older_version_is_read_with_a_warning(tmp_path, images, prompt, version):
    model = make_model(prompt).eval()
    path = vpt.save_task(model, tmp_path / "pets.safetensors")
    tensors, values = read_tensors(path)
    del values["traits"]
    if version == 1:
        del values["adapters"]
    if version == 1 and prompt is not None:
        del values["prompt"]["width"]
    write_tensors(path, tensors, {**values, "format_version": version})
    assert (vpt.read_task(path).format_version, vpt.read_task(path).traits) == (2, None)
    with pytest.warns(UserWarning, match=r"pets\.safetensors: .*pooling") as found:
        loaded = vpt.load_task(path, model.backbone.vit)
    assert len(found) == 1
    assert torch.equal(loaded(images), model(images))


EDITS = {  # of a ViT with the same fingerprint, and what the refusal names
    "the pooling": (lambda: set_on(make_tiny_vit(), global_pool="avg"), "pooling avg, not token"),
    "a mean with CLS": (
        lambda: make_tiny_vit(global_pool="avg", fc_norm=False, pool_include_prefix=True),
        "with prefix",
    ),
    "a forward_head": (lambda: set_on(make_tiny_vit(), __class__=PoolsOtherwise), "pooling token of PoolsOtherwise"),
    "the patches": (lambda: scaled(make_tiny_vit(), "patch_embed.proj.weight", 1.3), "patch embedding"),
    "a bias of patches": (lambda: scaled(make_tiny_vit(), "patch_embed.proj.bias", 1.3), "patch embedding"),
    "the position embedding": (lambda: scaled(make_tiny_vit(), "pos_embed", 1.5), "position embedding"),
    "patches of 16": (lambda: with_other_patches(patch_size=16), r"patches of \[16, 16\]"),
    "grey images": (lambda: with_other_patches(in_chans=1), "input channels 1, not 3"),
    "heads": (lambda: make_tiny_vit(num_heads=4), "attention heads 4, not 2"),
    "an activation": (lambda: make_tiny_vit(act_layer="gelu_tanh"), "activation function"),
    "norms": (lambda: make_tiny_vit(norm_layer=partial(torch.nn.LayerNorm, eps=1e-3)), "epsilon of norms"),
    "a scale": (lambda: scaled(make_tiny_vit(), "blocks.0.attn.scale", 2), "scale of attention"),
}


class PoolsOtherwise(timm.models.VisionTransformer):
    def forward_head(self, x, pre_logits=False):
        return x.mean(dim=1)


def set_on(vit, **values):
    for name, value in values.items():
        setattr(vit, name, value)
    return vit


def with_other_patches(**options):
    vit, state = make_tiny_vit(**options), make_tiny_vit().state_dict()
    vit.load_state_dict(
        {name: state[name] for name in state if name.startswith(("blocks.", "norm.", "cls_"))}, strict=False
    )
    return vit


def scaled(vit, name, factor):
    module, _, last = name.rpartition(".")
    module = vit.get_submodule(module)
    value = getattr(module, last) * factor
    setattr(module, last, torch.nn.Parameter(value) if isinstance(value, torch.Tensor) else value)
    return vit


@pytest.mark.parametrize("edit", EDITS)
def test_a_backbone_of_the_same_weights_that_computes_other_features_is_refused(tmp_path, edit):
    path = vpt.save_task(make_model(), tmp_path / "a.safetensors")
    make, message = EDITS[edit]
    vit = make()
    assert fingerprint(vit) == vpt.read_task(path).fingerprint
    for load in (vpt.load_task, lambda path, vit: vpt.TaskBank(vit).load(path)):
        with pytest.raises(ValueError, match=rf"a\.safetensors: .*has its weights, but .*{message}"):
            load(path, vit)


@pytest.mark.parametrize("kind", TINY_VITS)
def test_a_backbone_that_computes_the_same_features_is_taken_at_any_dtype_or_size(tmp_path, kind):
    path = vpt.save_task(build_model(make_tiny_vit(kind), num_classes=3), tmp_path / "a.safetensors")
    vpt.load_task(path, make_tiny_vit(kind).bfloat16())
    vpt.load_task(path, make_tiny_vit(kind).bfloat16().float().train())
    vpt.save_task(build_model(make_tiny_vit(kind).bfloat16(), num_classes=3), path)
    vpt.load_task(path, make_tiny_vit(kind))
    if kind != "relative_position_bias":  # timm supports one size only
        vpt.load_task(path, make_tiny_vit(kind, dynamic_img_size=True))
    if kind.startswith("rope"):
        with pytest.raises(ValueError, match="position embedding in attention"):
            vpt.load_task(path, make_tiny_vit(kind, rope_temperature=7))


def test_a_detector_takes_a_backbone_that_pools_otherwise(tmp_path):
    path = vpt.save_task(make_detector(), tmp_path / "a.safetensors")
    vpt.load_task(path, set_on(make_tiny_vit(img_size=64), global_pool="avg"))


WRAPPERS = [torch.nn.DataParallel, torch.optim.swa_utils.AveragedModel, partial(torch.compile, backend="eager")]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_is_tuned_counted_and_saved_as_the_model_itself(tmp_path, wrap):
    wrapped = wrap(make_model("deep"))
    vpt.tune(wrapped, "bias")
    model = unwrapped(wrapped)
    assert type(model) is vpt.Classifier
    assert vpt.count_parameters(wrapped) == vpt.count_parameters(model)
    one, other = (vpt.save_task(given, tmp_path / f"{type(given).__name__}.st") for given in (wrapped, model))
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(TypeError, match=r"model: expected a TaskModel, .* got Linear"):
        vpt.save_task(torch.nn.Linear(2, 2), tmp_path / "c.safetensors")
