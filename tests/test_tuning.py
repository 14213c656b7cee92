"""What trains, and that its gradients are right however the prompt is computed."""

import copy
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vpt
from tests.helpers import TINY, TINY_VITS, build_model, make_tiny_vit
from vpt import build
from vpt.config.composition import compose_config
from vpt.config.validation import to_config
from vpt.models.adapters import PEFT_METHODS
from vpt.models.backbone import PromptedViT
from vpt.models.detector import Detector
from vpt.models.tuning import tuned_parts
from vpt.runs.summary import task_file_bytes

PROMPT_AND_HEAD = ["backbone.prompt.tokens", "head.weight", "head.bias"]
WAYS = ["bias", "proj_bias", "norm", "partial", "full"]
TARGETS = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0], [10.0, 20.0, 30.0, 60.0]]), "labels": torch.tensor([0, 2])}]


def make_classifier(vit, prompt=None, **options):
    model = vpt.Classifier(PromptedViT(vit, prompt, num_tokens=3, **options), 4)
    model.head.weight.data.normal_()
    return model


def make_detector(kind="cls", prompt=None, **options):
    backbone = PromptedViT(make_tiny_vit(kind, img_size=64), prompt, num_tokens=3)
    return Detector(backbone, num_classes=3, channels=16, num_convs=1, **options)


def tuned_of_vit(model):
    return {name for name, parameter in model.backbone.vit.named_parameters() if parameter.requires_grad}


def check_gradients(model, *arguments):
    """All that trains has a gradient after a pass over images, and nothing else."""
    result = model(*arguments)
    (sum(result.values()) if isinstance(result, dict) else result.square().sum()).backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(vpt.tuned_parameters(model))


@pytest.mark.parametrize(("prompt", "num_prompt"), [(None, 0), ("shallow", 5 * 32), ("deep", 3 * 5 * 32)])
def test_exactly_the_prompt_and_the_head_train(prompt, num_prompt, images):
    model = build_model(make_tiny_vit(), prompt=prompt, num_tokens=5, num_classes=4)
    assert list(vpt.tuned_parameters(model)) == PROMPT_AND_HEAD[0 if prompt else 1 :]
    count = vpt.count_parameters(model)
    assert (count.prompt, count.head, count.tuned) == (num_prompt, 32 * 4 + 4, num_prompt + 132)
    assert (count.neck, count.backbone_tuned) == (0, 0)
    assert count.backbone == sum(p.numel() for p in model.backbone.vit.parameters())
    assert count.share == count.tuned / count.backbone
    model.head.weight.data.normal_()
    check_gradients(model, images)


def test_counts_of_the_paper_for_vit_base_with_fifty_tokens():
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        shallow = build_model(vit, prompt=vpt.VisualPrompt(50, 768, variant="shallow"), num_classes=100)
        deep = build_model(vit, prompt=vpt.VisualPrompt(50, 768, blocks=range(12)), num_classes=100)
        assert vpt.count_parameters(shallow).tuned == 115_300
        assert vpt.count_parameters(deep).tuned == 537_700
        bias, full = (build_model(vit, tuning=way, num_classes=100) for way in ("bias", "full"))
        vpt.tune(bias, "bias")  # the second model froze the ViT that both hold
        assert vpt.count_parameters(bias).backbone_tuned == 768 + 12 * (768 * (2 + 3 + 1 + 4 + 1)) + 768
        vpt.tune(full, "full")
        assert vpt.count_parameters(full).backbone_tuned == 85_798_656


def test_other_modules_are_refused():
    for function in (vpt.count_parameters, tuned_parts, lambda module: vpt.tune(module, "full")):
        with pytest.raises(TypeError, match="expected a PromptedViT"):
            function(nn.Linear(2, 2))


@pytest.mark.parametrize("prompt", ["deep", None])
@pytest.mark.parametrize("kind", TINY_VITS)
def test_full_trains_what_the_logits_depend_on_and_nothing_else(kind, prompt, images):
    model = make_classifier(make_tiny_vit(kind, num_classes=7), prompt)
    vpt.tune(model, "full")
    named = {name for name, _ in model.backbone.vit.named_parameters()}
    assert named - tuned_of_vit(model) == {"head.weight", "head.bias"}
    check_gradients(model.train(), images)
    assert not model.backbone.vit.training


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_distilled_patch16_224", {"num_classes": 5}),
        ("vit_base_patch16_siglip_224", {}),
        ("vit_small_patch16_rope_mixed_224", {}),
        ("eva02_tiny_patch14_224", {}),
    ],
)
@pytest.mark.parametrize("tuning", WAYS)
def test_everything_that_trains_has_a_gradient_in_other_families(name, options, tuning, images):
    model = make_classifier(timm.create_model(name, **TINY | options))
    vpt.tune(model, tuning)
    check_gradients(model, images)


@pytest.mark.parametrize("kind", TINY_VITS)
def test_bias_trains_every_vector_that_timm_calls_a_bias(kind, images):
    model = make_classifier(make_tiny_vit(kind, num_classes=7), "deep")
    vpt.tune(model, "bias")
    vit = model.backbone.vit
    called = {n for n, p in vit.named_parameters() if n.rsplit(".")[-1] in ("bias", "q_bias", "v_bias") and p.ndim == 1}
    assert tuned_of_vit(model) == called - {"head.bias"}
    assert any("norm" in name for name in called)
    check_gradients(model, images)


@pytest.mark.parametrize("rotates", [True, False])
def test_a_key_bias_that_stands_apart_is_left_out_where_the_softmax_takes_it_away(rotates):
    options = {"qkv_bias": True, "qkv_fused": False, "use_rot_pos_emb": rotates}
    vit = timm.create_model("vit_small_patch16_rope_224", **TINY | options).double()
    for parameter in vit.parameters():
        parameter.data.normal_(std=0.3)
    model = make_classifier(vit).double()
    vpt.tune(model, "bias")
    attention, images = vit.blocks[0].attn, torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert attention.q_proj.bias.requires_grad
    assert attention.k_proj.bias.requires_grad is rotates
    before = model(images)
    attention.k_proj.bias.data.normal_()
    assert torch.allclose(model(images), before, rtol=1e-10, atol=1e-10) is not rotates


@pytest.mark.parametrize("kind", TINY_VITS)
def test_norm_trains_every_norm_and_proj_bias_the_bias_behind_attention(kind, images):
    model = make_classifier(make_tiny_vit(kind, num_classes=7), "deep")
    vit = model.backbone.vit
    vpt.tune(model, "norm")
    assert tuned_of_vit(model) == {name for name, _ in vit.named_parameters() if "norm" in name}
    check_gradients(model, images)
    vpt.tune(model, "proj_bias")
    assert tuned_of_vit(model) == {f"blocks.{index}.attn.proj.bias" for index in range(3)}


def test_a_bias_of_values_is_one_behind_the_projection(tiny_vit, images):
    """What a prompted block makes of a bias on all values, prompt tokens among them: the weights sum to one."""
    backbone, changed = (PromptedViT(copy.deepcopy(tiny_vit).double(), "deep", num_tokens=3).double() for _ in range(2))
    changed.prompt.load_state_dict(backbone.prompt.state_dict())
    torch.manual_seed(3)
    change = torch.randn(32, dtype=torch.float64)
    attention, other = backbone.vit.blocks[1].attn, changed.vit.blocks[1].attn
    if hasattr(attention, "q_bias"):  # of EVA and BEiT, apart
        zeros = torch.zeros(32, dtype=torch.float64)
        if attention.q_bias is None:
            attention.q_bias, attention.k_bias = nn.Parameter(zeros), zeros
        attention.v_bias = nn.Parameter(change if attention.v_bias is None else attention.v_bias + change)
    else:
        attention.qkv.bias.data[64:] += change
    other.proj.bias.data += other.proj.weight @ change
    torch.testing.assert_close(backbone(images.double()), changed(images.double()), rtol=1e-10, atol=1e-10)
    unchanged = PromptedViT(tiny_vit.double(), backbone.prompt)(images.double())
    assert not torch.allclose(backbone(images.double()), unchanged)


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_partial_trains_the_last_blocks_and_the_final_norm(num_blocks, images):
    for kind, norm in (("cls", "norm."), ("no_prefix", "fc_norm.")):
        model = make_classifier(make_tiny_vit(kind))
        vpt.tune(model, "full")  # is frozen again
        vpt.tune(model, "partial", num_blocks=num_blocks)
        begins = (norm, *(f"blocks.{index}." for index in range(3 - num_blocks, 3)))
        assert tuned_of_vit(model) == {n for n, _ in model.backbone.vit.named_parameters() if n.startswith(begins)}
        check_gradients(model, images)


def test_blocks_that_there_are_not_cannot_train():
    for model, num_blocks, most in (
        *((make_classifier(make_tiny_vit()), num_blocks, 3) for num_blocks in (0, 4)),
        (make_detector(out_indices=[0, 1]), 3, 2),
    ):
        with pytest.raises(ValueError, match=rf"num_blocks={num_blocks}: must be from 1 to {most}"):
            vpt.tune(model, "partial", num_blocks=num_blocks)


def test_refusals_leave_what_trains_as_it_was_and_another_way_freezes_it():
    model = make_classifier(make_tiny_vit(), "deep")
    vpt.tune(model, "bias")
    before = list(vpt.tuned_parameters(model))
    with pytest.raises(ValueError, match="use prompt=None or tuning="):
        vpt.tune(model, "linear")
    with pytest.raises(ValueError, match=r"tuning='lora': must be one of prompt, linear, bias, .*, adapters"):
        vpt.tune(model, "lora")
    model.backbone.vit.bfloat16()
    with pytest.raises(ValueError, match=r"tuning=full: trains .* torch\.bfloat16; load the backbone in float32"):
        vpt.tune(model, "full")
    assert list(vpt.tuned_parameters(model)) == before
    vpt.tune(model, "prompt")
    assert list(vpt.tuned_parameters(model)) == PROMPT_AND_HEAD


@pytest.mark.parametrize("tuning", WAYS)
@pytest.mark.parametrize("kind", ["cls", "no_prefix", "rope_with_cls_and_4_registers", "relative_position_bias"])
def test_a_detector_trains_what_its_taps_depend_on_and_nothing_else(kind, tuning):
    model = make_detector(kind, "deep" if kind == "cls" else None, out_indices=[0, 1])
    vpt.tune(model, tuning)
    assert not any(name.startswith(("norm.", "fc_norm.", "blocks.2.")) for name in tuned_of_vit(model))
    assert tuned_of_vit(model)
    check_gradients(model.train(), torch.randn(1, 3, 64, 64), TARGETS)
    assert model.backbone.prompt is None or model.backbone.prompt.tokens.grad[:2].abs().sum() > 0


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_the_parts_are_all_that_trains_each_parameter_once(task):
    model = make_detector(prompt="deep") if task == "detection" else make_classifier(make_tiny_vit(), "deep")
    kinds = {"prompt", "head"} | ({"neck"} if isinstance(model, Detector) else set())
    assert set(tuned_parts(model)) == kinds
    vpt.tune(model, "bias")
    parts = tuned_parts(model)
    assert set(parts) == kinds | {"backbone"}
    listed = [parameter for part in parts.values() for parameter in part]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(vpt.tuned_parameters(model).values())
    count = vpt.count_parameters(model)
    assert count.backbone_tuned == sum(p.numel() for p in parts["backbone"])
    assert count.tuned == count.prompt + count.neck + count.head + count.backbone_tuned
    assert (count.neck > 0) == isinstance(model, Detector)


def gradients_of(backbone, run):
    vpt.tune(backbone, "full")
    result = run(backbone)
    (result * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)).sum().backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in vpt.tuned_parameters(backbone).items()}
    backbone.zero_grad()
    return gradients


@pytest.mark.parametrize("use", ["logits", "feature_maps"])
@pytest.mark.parametrize("kind", TINY_VITS)
def test_all_gradients_equal_those_of_the_longer_sequence(kind, use, images):
    options = {"global_pool": "token"} if kind == "rope_with_cls_and_4_registers" else {}
    vit = make_tiny_vit(kind, **options).double()
    for block in vit.blocks:  # attention that matters: timm starts it near zero
        block.attn.qkv.weight.data.mul_(10)
    fast = PromptedViT(vit, "deep", num_tokens=3).double()
    plain = PromptedViT(vit, fast.prompt, impl="concat")

    def run(backbone):
        if use == "logits":
            return backbone(images.double())
        return torch.cat([one.flatten() for one in backbone.feature_maps(images.double(), [0, 2])])

    assert set(fast.paths.values()) == {"kv"}
    assert fast.computes_prefix_only == (kind != "no_prefix")
    actual, expected = gradients_of(fast, run), gradients_of(plain, run)
    assert actual.keys() == expected.keys()
    assert "vit.patch_embed.proj.weight" in actual
    for name, gradient in expected.items():
        if gradient is None:  # behind the feature maps
            assert use == "feature_maps"
            assert actual[name] is None
        else:
            torch.testing.assert_close(actual[name], gradient, rtol=1e-10, atol=1e-10, msg=f"the gradient of {name}")


@pytest.mark.parametrize("edit", ["a step", "an average in .data"])
@pytest.mark.parametrize("kind", TINY_VITS)
def test_after_an_edit_of_tuned_weights_keys_and_values_are_those_of_the_new_ones(kind, edit, images):
    model = make_classifier(make_tiny_vit(kind), "deep")
    vpt.tune(model, "full")
    optimizer = torch.optim.SGD(tuned_parts(model)["backbone"], lr=0.01)  # new keys and values of the same prompt
    model.eval()
    with torch.no_grad():
        before = model(images)
    model(images).square().mean().backward()  # in eval mode, so that nothing but the step can drop them
    if edit == "a step":
        optimizer.step()
    else:
        for parameter in tuned_parts(model)["backbone"]:
            parameter.data.sub_(0.01 * parameter.grad)
    plain = copy.deepcopy(model)
    plain.backbone.impl = "concat"
    with torch.no_grad():
        assert not torch.allclose(model(images), before, rtol=1e-2)
        torch.testing.assert_close(model(images), plain(images), rtol=1e-4, atol=1e-4)


def test_grad_checkpointing_gives_the_same_gradients_of_the_backbone(images):
    backbone = PromptedViT(make_tiny_vit().double(), "deep", num_tokens=3).double()
    wanted = gradients_of(backbone, lambda b: b(images.double()))
    backbone.vit.set_grad_checkpointing()
    actual = gradients_of(backbone, lambda b: b(images.double()))
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


PAGE = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("`"))
def test_the_page_of_methods_tells_what_trains_and_how_large_its_file_is(row, monkeypatch):
    config = to_config(compose_config(["backbone=vit_base", *row[0].split("`")[1].split()]))
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        monkeypatch.setattr(build, "build_backbone", lambda config: vit)
        model = build.build_model(config, "classification", [str(label) for label in range(100)], {})
    count, num_bytes = vpt.count_parameters(model), task_file_bytes(model)
    assert f"{count.tuned - count.head:,}" == row[2]
    assert row[3] in (f"{num_bytes / 1000:,.0f}", "")  # not given in each row
    assert (row[5] == "yes") == (count.backbone_tuned == 0)


def test_the_page_of_methods_names_those_of_peft():
    assert set(re.findall(r"`(\w+)`", PAGE.split("whichever of")[1].split(". ")[0])) == set(PEFT_METHODS)
