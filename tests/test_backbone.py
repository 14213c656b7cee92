import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from tests.conftest import make_tiny_vit
from vpt.models.backbone import PromptedViT, fingerprint, load_vit, preprocessing_of
from vpt.models.prompts import VisualPrompt


@pytest.mark.parametrize("kind", ["shallow", "deep"])
def test_gradients_reach_exactly_the_prompt(tiny_vit, images, kind):
    backbone = PromptedViT(tiny_vit, prompt=kind, num_tokens=2)
    backbone(images).square().sum().backward()
    with_gradient = [name for name, parameter in backbone.named_parameters() if parameter.grad is not None]
    assert with_gradient == ["prompt.tokens"]
    assert (backbone.prompt.tokens.grad.flatten(1).norm(dim=1) > 0).all()


def test_the_frozen_vit_stays_in_eval_mode_and_train_returns_the_model(images):
    vit = make_tiny_vit(drop_path_rate=0.5, proj_drop_rate=0.5).train()
    backbone = PromptedViT(vit, prompt="deep", num_tokens=2, dropout=0.3)
    assert backbone.train() is backbone
    assert backbone.training
    assert backbone.prompt.training
    assert not any(module.training for module in vit.modules())
    backbone.prompt.dropout.p = 0.0
    assert torch.equal(backbone(images), backbone.eval()(images))


def test_training_leaves_parameters_and_buffers_of_the_vit_bit_identical(images):
    vit = make_tiny_vit()
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    backbone = PromptedViT(vit, prompt="deep", num_tokens=2).train()
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        backbone(images).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())


def test_the_vit_is_held_and_not_copied():
    vit = make_tiny_vit()
    one, two = PromptedViT(vit, "deep", num_tokens=2), PromptedViT(vit, "shallow", num_tokens=3)
    assert one.vit is vit
    assert two.vit is vit


def test_a_ready_prompt_is_used_and_one_that_does_not_fit_is_refused():
    prompt = VisualPrompt(2, 32, blocks=(0, 2))
    assert PromptedViT(make_tiny_vit(), prompt).prompt is prompt
    with pytest.raises(ValueError, match="does not fit a ViT of embed_dim 32 and 3 blocks"):
        PromptedViT(make_tiny_vit(), VisualPrompt(2, 64, blocks=(0,)))
    with pytest.raises(ValueError, match="does not fit"):
        PromptedViT(make_tiny_vit(), VisualPrompt(2, 32, blocks=(0, 3)))


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "beit_base_patch16_224"])
def test_models_that_are_no_plain_vit_are_refused_with_what_is_supported(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(TypeError, match=r"cannot be prompted; supported are plain ViTs"):
        PromptedViT(model)


def test_a_vit_with_another_forward_is_refused():
    class Odd(timm.models.VisionTransformer):
        def forward_features(self, x):
            return x

    with pytest.raises(TypeError, match="Odd cannot be prompted"):
        PromptedViT(Odd(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2))
    with pytest.raises(TypeError, match="Linear cannot be prompted"):
        PromptedViT(nn.Linear(2, 2))


def test_other_input_sizes_work_where_timm_takes_them():
    vit = make_tiny_vit(dynamic_img_size=True)
    backbone = PromptedViT(vit, "deep", num_tokens=2)
    assert backbone.forward_features(torch.randn(2, 3, 48, 32)).shape == (2, 1 + 6 * 4, 32)


def test_a_backbone_held_in_bfloat16_takes_a_float32_prompt(images):
    vit = make_tiny_vit().to(torch.bfloat16)
    backbone = PromptedViT(vit, "deep", num_tokens=2)
    features = backbone(images.to(torch.bfloat16))
    assert features.dtype == torch.bfloat16
    features.sum().backward()
    assert backbone.prompt.tokens.grad.dtype == torch.float32


def test_the_fingerprint_tells_weights_apart_and_ignores_input_size_and_classifier():
    one = fingerprint(make_tiny_vit())
    assert one == fingerprint(make_tiny_vit())
    assert fingerprint(make_tiny_vit().to(torch.float64)) == fingerprint(make_tiny_vit().to(torch.bfloat16)) == one
    vit = make_tiny_vit()
    vit.blocks[1].mlp.fc1.weight.data.mul_(1.001)
    assert fingerprint(vit) != one
    small = load_vit("vit_nano_patch8_64")
    large = load_vit("vit_nano_patch8_64", img_size=96)
    assert (
        fingerprint(small)
        == fingerprint(large)
        == fingerprint(timm.create_model("vit_nano_patch8_64", pretrained=True, num_classes=5))
    )
    assert fingerprint(small) != fingerprint(load_vit("vit_nano_patch8_64", pretrained=False))


def test_preprocessing_is_that_of_timm_at_the_size_of_the_model():
    described = preprocessing_of(load_vit("vit_base_patch16_clip_224.openai", pretrained=False, img_size=112))
    assert described["size"] == [112, 112]
    assert described["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert described["interpolation"] == "bicubic"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_are_loaded_from_a_file(tmp_path, suffix):
    source = timm.create_model("vit_nano_patch8_64", num_classes=7)
    path = tmp_path / f"weights{suffix}"
    save_file(source.state_dict(), path) if suffix == ".safetensors" else torch.save(
        {"model": source.state_dict()}, path
    )
    vit = load_vit("vit_nano_patch8_64", checkpoint=path)
    assert fingerprint(vit) == fingerprint(source)
    assert vit.num_classes == 0


def test_weights_that_cannot_be_used_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"backbone\.checkpoint=.*absent.*no such file"):
        load_vit("vit_nano_patch8_64", checkpoint=tmp_path / "absent.safetensors")
    path = tmp_path / "other.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", depth=2).state_dict(), path)
    with pytest.raises(ValueError, match=r"other\.safetensors does not fit vit_nano_patch8_64"):
        load_vit("vit_nano_patch8_64", checkpoint=path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not fit"):
        load_vit("vit_nano_patch8_64", checkpoint=path)


class Sentinel:
    def __reduce__(self):
        return (print, ("a pickle was executed",))


def test_a_pickle_in_a_checkpoint_is_not_executed(tmp_path, capsys):
    path = tmp_path / "bomb.pth"
    torch.save({"model": Sentinel()}, path)
    with pytest.raises(ValueError, match=r"bomb\.pth does not fit"):
        load_vit("vit_nano_patch8_64", checkpoint=path)
    assert "executed" not in capsys.readouterr().out


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(ValueError, match="did you mean vit_tiny_patch16_224"):
        load_vit("vit_tiny_patch16_2244")


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_a_name_that_cannot_be_prompted_is_refused_before_weights_are_fetched(monkeypatch, name):
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(ValueError, match=f"name={name}: .* cannot be prompted; supported are"):
        load_vit(name)


def test_a_size_that_the_model_cannot_have_is_no_question_of_weights():
    with pytest.raises(ValueError, match=r"backbone\.name=vit_nano_patch8_64 cannot be built"):
        load_vit("vit_nano_patch8_64", img_size=4)


def test_weights_that_cannot_be_had_say_which_file_to_put_where(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(ValueError, match=r"model.safetensors of timm/vit_tiny_patch16_224.* backbone\.checkpoint=FILE"):
        load_vit("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    with pytest.raises(ValueError, match="vit_tiny_patch16_384 has the weights augreg_in21k_ft_in1k"):
        load_vit("vit_tiny_patch16_384.nothing")


def test_a_checkpoint_of_another_depth_is_refused_and_not_loaded_in_part(tmp_path):
    path = tmp_path / "shallow.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", depth=2).state_dict(), path)
    with pytest.raises(ValueError, match=r"does not fit vit_tiny_patch16_224: it lacks blocks\.2"):
        load_vit("vit_tiny_patch16_224", checkpoint=path)
