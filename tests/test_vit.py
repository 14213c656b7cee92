"""Loading of timm ViTs: names, weights and preprocessing."""

import pytest
import timm
import torch
from huggingface_hub import get_session
from safetensors.torch import save_file

import vpt
from tests.helpers import make_tiny_vit
from vpt.models.vit import fingerprint, load_vit, preprocessing_of


def test_the_fingerprint_depends_on_weights_but_not_on_input_size_or_classifier():
    one, vit = fingerprint(make_tiny_vit()), make_tiny_vit()
    assert all(fingerprint(make_tiny_vit().to(dtype)) == one for dtype in (torch.float64, torch.bfloat16))
    vit.blocks[1].mlp.fc1.weight.data.mul_(1.001)
    assert fingerprint(vit) != one
    nano = fingerprint(load_vit("vit_nano_patch8_64"))
    assert nano == fingerprint(load_vit("vit_nano_patch8_64", img_size=96))
    assert nano == fingerprint(timm.create_model("vit_nano_patch8_64", pretrained=True, num_classes=5))
    assert nano != fingerprint(load_vit("vit_nano_patch8_64", pretrained=False))


def test_preprocessing_is_that_of_timm_at_the_size_of_the_model():
    described = preprocessing_of(load_vit("vit_base_patch16_clip_224.openai", pretrained=False, img_size=112))
    assert described["size"] == [112, 112]
    assert described["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert described["interpolation"] == "bicubic"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_are_loaded_from_a_file(tmp_path, suffix, prefix):
    source = timm.create_model("vit_nano_patch8_64", num_classes=7)
    path = tmp_path / f"weights{suffix}"
    state = {f"{prefix}{name}": tensor for name, tensor in source.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model": state}, path)
    vit = load_vit("vit_nano_patch8_64", checkpoint=path)
    assert fingerprint(vit) == fingerprint(source)
    assert vit.num_classes == 0


def test_unsuitable_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^checkpoint=.*absent.*no such file"):
        load_vit("vit_nano_patch8_64", checkpoint=tmp_path / "absent.safetensors")
    path = tmp_path / "other.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", depth=2).state_dict(), path)
    for name, reason in (("vit_nano_patch8_64", ""), ("vit_tiny_patch16_224", r"it lacks blocks\.2")):
        with pytest.raises(ValueError, match=rf"^checkpoint=.*other\.safetensors: does not fit {name}: {reason}"):
            load_vit(name, checkpoint=path)
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth: .* no dict of weights"):
        load_vit("vit_nano_patch8_64", checkpoint=tmp_path / "list.pth")
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors: does not fit"):
        load_vit("vit_nano_patch8_64", checkpoint=path)


class Sentinel:
    def __reduce__(self):
        return (print, ("a pickle was executed",))


def test_a_pickle_in_a_checkpoint_is_not_executed(tmp_path, capsys):
    path = tmp_path / "bomb.pth"
    torch.save({"model": Sentinel()}, path)
    with pytest.raises(ValueError, match=r"bomb\.pth: does not fit"):
        load_vit("vit_nano_patch8_64", checkpoint=path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_2244", {}, "^name=vit_tiny_patch16_2244: .* did you mean vit_tiny_patch16_224"),
        ("resnet18", {}, "name=resnet18: .* cannot be prompted; supported are"),
        ("swin_tiny_patch4_window7_224", {}, "name=swin_tiny_patch4_window7_224: .* cannot be prompted; supported are"),
        ("vit_nano_patch8_64", {"img_size": 4}, "^img_size=4: vit_nano_patch8_64 cannot be built"),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_any_download(monkeypatch, name, options, message):
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(ValueError, match=message):
        load_vit(name, **options)


def test_unavailable_weights_are_reported_with_the_file_to_download(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(get_session(), "head", offline)
    for name, message in (
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", "of timm/vit_tiny_patch16_224.* checkpoint=FILE"),
        ("vit_tiny_patch16_384.nothing", "tags of vit_tiny_patch16_384 are augreg_in21k_ft_in1k"),
    ):
        with pytest.raises(ValueError, match=message):
            load_vit(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images[0], r"images: must be \(B, 3, H, W\), got \(3, 32, 32\)"),
        (lambda images: images.numpy(), r"images: must be a torch.Tensor \(B, 3, H, W\), got ndarray"),
        (list, r"images: must be a torch.Tensor \(B, 3, H, W\), got list"),
        (lambda images: images.byte(), "images: .* floating point, got torch.uint8"),
        (lambda images: images > 0, "images: .* floating point, got torch.bool"),
        (lambda images: images[:, :1], r"images: must have 3 channels .* got \(4, 1, 32, 32\)"),
        (lambda images: images[..., :24], r"images: must be \(32, 32\) px.* got \(32, 24\).* img_size=\(32, 24\)"),
        (lambda images: images.to("meta"), "images: are on meta, and the backbone is on cpu"),
    ],
)
def test_images_that_a_backbone_does_not_take_are_refused_by_name(images, change, message):
    detector = vpt.create_model(make_tiny_vit(), task="detection", num_classes=2, strides=[8])
    backbone, classifier = detector.backbone, vpt.create_model(make_tiny_vit(), num_classes=2)
    bare = vpt.create_model(make_tiny_vit(), num_classes=2, prompt=None)
    for use in (
        *(classifier, classifier.predict, bare, detector.eval(), backbone, backbone.forward_features),
        *(backbone.feature_maps, backbone.forward_frozen, backbone.entering_patches),
        *(
            lambda images: list(vpt.inspect_attention(backbone, images)),
            lambda images: list(vpt.nearest_patches(backbone, images)),
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            use(change(images))
    if "meta" not in message:
        with pytest.raises((TypeError, ValueError), match=message):
            vpt.start_from_patches(backbone, [change(images)])
    with torch.no_grad():
        assert classifier(images[:0]).shape == (0, 2)
        assert classifier(images.half()).shape == (4, 2)
