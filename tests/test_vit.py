"""Loading timm's ViTs: names, weights, what they want of a picture."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.helpers import make_tiny_vit
from vpt.models.vit import fingerprint, load_vit, preprocessing_of


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
