import random
import threading

import pytest
import torch
from safetensors.torch import save_file

import vpt
from tests.helpers import TINY_VITS, build_model, make_tiny_vit
from vpt.build import open_bank
from vpt.engine.measure import check_attention_is_counted, count_flops
from vpt.models.detector import Selection
from vpt.models.vit import load_vit
from vpt.storage.files import write_bytes

CHOICES = {
    "deep": {"prompt": "deep", "num_tokens": 4, "num_classes": 3},
    "longer": {"prompt": "deep", "num_tokens": 7, "num_classes": 5},
    "last": {"prompt": "deep", "num_tokens": 3, "blocks": "last:1", "num_classes": 2},
    "middle": {"prompt": "deep", "num_tokens": 3, "blocks": [1], "num_classes": 4},
    "shallow": {"prompt": "shallow", "num_tokens": 5, "num_classes": 3},
    "shallower": {"prompt": "shallow", "num_tokens": 2, "num_classes": 6},
    "linear": {"prompt": None, "num_classes": 3},
    "biases": {"tuning": "bias", "num_classes": 3},
    "boxes": {"task": "detection", "num_tokens": 3, "num_classes": 2, "channels": 16, "num_convs": 1},
}


def make_tasks(folder, kind="cls", names=CHOICES, **options):
    """Task files of random tasks on one backbone, and the models that they were saved from."""
    models = {}
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        model = build_model(make_tiny_vit(kind, **options), **CHOICES[name]).eval()
        with torch.no_grad():
            for parameter in vpt.tuned_parameters(model).values():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        vpt.save_task(model, folder / f"{name}.safetensors")
        models[name] = model
    return models


def make_bank(folder, kind="cls", names=CHOICES, **options):
    bank = vpt.TaskBank(make_tiny_vit(kind, **options))
    for name in names:
        bank.load(folder / f"{name}.safetensors")
    return bank


def assert_close(result, expected, tolerance=1e-5):
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
        return
    assert result.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(result[key], expected[key], rtol=tolerance, atol=10 * tolerance)


def make_images(num, side=32):
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(num))


CLASSES = [name for name in CHOICES if name != "boxes"]


@pytest.mark.parametrize("kind", TINY_VITS)
@pytest.mark.parametrize("seed", range(4))
def test_any_mix_in_any_order_equals_the_single_models(tmp_path, kind, seed):
    models, bank = make_tasks(tmp_path, kind, CLASSES), make_bank(tmp_path, kind, CLASSES)
    names = random.Random(seed).choices(CLASSES, k=9)
    images = make_images(9)
    results = bank(images, names)
    for image, name, result in zip(images, names, results, strict=True):
        assert_close(result, models[name](image[None])[0])


def test_classes_and_boxes_go_through_the_backbone_together(tmp_path):
    models, bank = make_tasks(tmp_path, img_size=64), make_bank(tmp_path, img_size=64)
    names = ["boxes", "deep", "shallow", "boxes", "linear", "longer", "biases"]
    images = make_images(7, 64)
    for image, name, result in zip(images, names, bank(images, names), strict=True):
        assert_close(result, models[name](image[None])[0])
    assert sum(len(result["boxes"]) for result in bank(images, "boxes")) > 0


def test_boxes_end_where_the_picture_ends(tmp_path):
    model = make_tasks(tmp_path, names=["boxes"], img_size=64)["boxes"]
    bank = make_bank(tmp_path, names=["boxes"], img_size=64)
    images, sizes = make_images(2, 64), [(40, 64), (64, 30)]
    for tasks in ("boxes", ["boxes", "boxes"]):
        for result, expected in zip(bank(images, tasks, sizes=sizes), model(images, sizes=sizes), strict=True):
            assert_close(result, expected)
    with pytest.raises(ValueError, match="1 sizes for 2 images"):
        bank(images, "boxes", sizes=sizes[:1])


@pytest.mark.parametrize("name", CLASSES)
def test_one_name_gives_the_logits_of_all_images(tmp_path, name):
    models, bank = make_tasks(tmp_path, names=[name]), make_bank(tmp_path, names=[name])
    images = make_images(4)
    assert_close(bank(images, name), models[name](images))
    assert bank(images[:0], name).shape == (0, models[name].num_classes)
    assert bank(images[:0], []) == []


def test_every_task_on_every_picture_equals_the_single_models(tmp_path):
    models, bank = make_tasks(tmp_path, img_size=64), make_bank(tmp_path, img_size=64)
    with_other_pictures = [name for name in CHOICES if name != "boxes"]  # a detector sees whole pictures
    images = make_images(3, 64)
    results = bank.every(images, with_other_pictures)
    assert list(results) == with_other_pictures
    for name, result in results.items():
        assert_close(result, models[name](images))
    for result, expected in zip(bank.every(images, ["boxes"])["boxes"], models["boxes"](images), strict=True):
        assert_close(result, expected)


def test_every_serves_classes_and_boxes_from_one_trunk(tmp_path):
    vit = make_tiny_vit(img_size=64)
    whole = {"crop_mode": "letterbox", "crop_pct": 1.0}
    for name, options in {
        "boxes": {**CHOICES["boxes"], "blocks": "last:1"},
        "more boxes": {**CHOICES["boxes"], "out_indices": [0, 1], "prompt": None},
        "classes": CHOICES["last"],
    }.items():
        model = build_model(make_tiny_vit(img_size=64), **options).eval()
        torch.nn.init.normal_(list(model.head.parameters())[-1])
        preprocessing = {**vpt.models.vit.preprocessing_of(vit), **whole}
        vpt.save_task(model, tmp_path / f"{name}.safetensors", preprocessing=preprocessing)
    bank = vpt.TaskBank(vit)
    names = [bank.load(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    images = make_images(2, 64)
    results = bank.every(images)
    assert list(results) == names == ["boxes", "classes", "more boxes"]
    for name in names:
        expected = vpt.load_task(tmp_path / f"{name}.safetensors", vit)(images)
        for result, single in zip(results[name], expected, strict=True):
            assert_close(result, single)


def test_every_refuses_tasks_that_want_other_pictures_and_says_what_differs(tmp_path):
    make_tasks(tmp_path, img_size=64)
    bank = make_bank(tmp_path, img_size=64)
    with pytest.raises(ValueError, match=r"tasks deep and boxes require different preprocessing \(crop_pct 0.9"):
        bank.every(make_images(1, 64))


def test_a_backbone_that_is_not_understood_serves_its_tasks_one_by_one(tmp_path):
    names = ["deep", "shallow", "linear"]
    models, bank = make_tasks(tmp_path, names=names), make_bank(tmp_path, names=names)
    bank.vit.blocks[1].attn.register_forward_hook(lambda *_: None)
    images, mixed = make_images(5), ["deep", "linear", "deep", "shallow", "linear"]
    for image, name, result in zip(images, mixed, bank(images, mixed), strict=True):
        assert_close(result, models[name](image[None])[0])
    for name, result in bank.every(images).items():
        assert_close(result, models[name](images))


def test_a_task_that_was_loaded_while_a_block_had_a_hook_is_right_when_the_hook_is_gone(tmp_path):
    models, bank = make_tasks(tmp_path, names=["deep"]), vpt.TaskBank(make_tiny_vit())
    hook = bank.vit.blocks[1].attn.register_forward_hook(lambda *_: None)
    bank.load(tmp_path / "deep.safetensors")
    hook.remove()
    images = make_images(2)
    assert_close(bank(images, "deep"), models["deep"](images))
    assert_close(bank.every(images, "deep")["deep"], models["deep"](images))


def test_a_mixed_batch_calls_the_patch_embedding_once(tmp_path):
    make_tasks(tmp_path, names=CLASSES)
    bank = make_bank(tmp_path, names=[name for name in CLASSES if name != "biases"])
    sizes = []
    bank.vit.patch_embed.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    bank(make_images(14), [*bank.names] * 2)
    assert sizes == [14]


def test_a_bank_says_which_tasks_share_batches(tmp_path):
    make_tasks(tmp_path, names=["deep", "biases"])
    bank = make_bank(tmp_path, names=["deep", "biases"])
    assert (bank.is_shared("deep"), bank.is_shared("biases")) == (True, False)
    with pytest.raises(ValueError, match="there is no task gone"):
        bank.is_shared("gone")


def test_a_bank_holds_the_vit_and_tuned_tasks_share_what_they_did_not_tune(tmp_path):
    make_tasks(tmp_path, names=["deep", "biases"])
    vit = make_tiny_vit()
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    bank = vpt.TaskBank(vit)
    bank.load(tmp_path / "deep.safetensors")
    bank.load(tmp_path / "biases.safetensors")
    assert bank.vit is vit
    own = bank._tasks["biases"].model.backbone.vit
    assert own.blocks[0].attn.qkv.weight is vit.blocks[0].attn.qkv.weight
    assert own.blocks[0].attn.qkv.bias is not vit.blocks[0].attn.qkv.bias
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    num_biases = sum(value.numel() for name, value in vit.named_parameters() if name.endswith("bias"))
    assert bank.num_bytes("biases") == 4 * (num_biases + 3 * 33)


def test_bytes_of_a_task_are_counted(tmp_path):
    make_tasks(tmp_path, names=["deep"])
    bank = make_bank(tmp_path, names=["deep"])
    tokens, head, keys_values, absorbed = 3 * 4 * 32, 3 * 33, 2 * 3 * 4 * 32, 4 * 32
    assert bank.num_bytes("deep") == 4 * (tokens + head + keys_values + absorbed)


def test_tasks_are_loaded_named_swapped_and_removed(tmp_path):
    models = make_tasks(tmp_path, names=["deep", "longer"])
    bank = vpt.TaskBank(make_tiny_vit())
    assert bank.load(tmp_path / "deep.safetensors") == "deep"
    assert bank.load(tmp_path / "deep.safetensors", name="again") == "again"
    assert bank.names == ("deep", "again")
    with pytest.raises(ValueError, match="name=deep: is loaded already"):
        bank.load(tmp_path / "longer.safetensors", name="deep")
    bank.swap("again", tmp_path / "longer.safetensors")
    assert_close(bank(make_images(2), "again"), models["longer"](make_images(2)))
    assert bank.metadata("again").num_classes == 5
    bank.remove("again")
    for call in (
        lambda: bank.remove("again"),
        lambda: bank.swap("again", tmp_path / "deep.safetensors"),
        lambda: bank.metadata("again"),
        lambda: bank(make_images(1), "again"),
        lambda: bank.every(make_images(1), ["again"]),
    ):
        with pytest.raises(ValueError, match="there is no task again; loaded: deep"):
            call()


def test_a_file_that_is_refused_leaves_the_bank_as_it_was(tmp_path):
    models = make_tasks(tmp_path, names=["deep", "longer"])
    bank = make_bank(tmp_path, names=["deep"])
    write_bytes(tmp_path / "cut.safetensors", (tmp_path / "longer.safetensors").read_bytes()[:-9])
    other = make_tiny_vit()
    other.blocks[0].attn.qkv.weight.data.mul_(1.01)
    vpt.save_task(build_model(other, num_classes=2), tmp_path / "other.safetensors")
    for name, reason in {"cut": "not a readable safetensors file", "other": "made for the backbone"}.items():
        with pytest.raises(ValueError, match=rf"{name}\.safetensors: {reason}"):
            bank.swap("deep", tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=rf"{name}\.safetensors: {reason}"):
            bank.load(tmp_path / f"{name}.safetensors")
    assert bank.names == ("deep",)
    assert_close(bank(make_images(2), "deep"), models["deep"](make_images(2)))


def test_images_that_a_task_does_not_take_are_refused(tmp_path):
    make_tasks(tmp_path, names=["deep"])
    bank = make_bank(tmp_path, names=["deep"])
    with pytest.raises(ValueError, match=r"task deep takes images of \(32, 32\) px, got \(64, 64\)"):
        bank(make_images(1, 64), "deep")
    with pytest.raises(ValueError, match=r"images: must be \(B, 3, H, W\)"):
        bank(make_images(1)[0], "deep")
    with pytest.raises(ValueError, match="2 names of tasks for 3 images"):
        bank(make_images(3), ["deep", "deep"])


def test_a_request_sees_the_old_or_the_new_task_never_half(tmp_path):
    models = make_tasks(tmp_path, names=["deep", "longer"])
    bank = make_bank(tmp_path, names=["deep"])
    images = make_images(2)
    expected = [models[name](images) for name in ("deep", "longer")]
    stop, wrong = threading.Event(), []

    def infer():
        while not stop.is_set():
            result = bank(images, "deep")
            if not any(result.shape == one.shape and torch.allclose(result, one, atol=1e-5) for one in expected):
                wrong.append(result)

    threads = [threading.Thread(target=infer) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(30):
        bank.swap("deep", tmp_path / ("longer.safetensors" if turn % 2 == 0 else "deep.safetensors"))
        bank.load(tmp_path / "longer.safetensors", name=f"more {turn}")
        bank.remove(f"more {turn}")
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert bank.names == ("deep",)


@pytest.fixture(scope="module")
def eight_tasks(tmp_path_factory):
    """A bank of eight deep tasks in all blocks and eight in the last three, on a ViT-Ti/16 of 12 blocks."""
    folder = tmp_path_factory.mktemp("tasks")
    bank = vpt.TaskBank(load_vit("vit_tiny_patch16_224", pretrained=False))
    for number in range(8):
        for name, blocks in (("all", "all"), ("last", "last:3")):
            model = build_model(bank.vit, num_tokens=10, blocks=blocks, num_classes=10 + number)
            bank.load(vpt.save_task(model, folder / f"{name}_{number}.safetensors"))
    return bank


def test_eight_tasks_in_a_batch_cost_as_much_as_one(eight_tasks):
    check_attention_is_counted(torch.device("cpu"), torch.float32)
    images = torch.zeros(32, 3, 224, 224)
    one = count_flops(lambda: eight_tasks(images, ["all_0"] * 32))
    mixed = count_flops(lambda: eight_tasks(images, [f"all_{number % 8}" for number in range(32)]))
    assert mixed <= 1.02 * one


def test_every_of_eight_tasks_in_the_last_three_blocks_costs_less_than_half_of_eight_passes(eight_tasks):
    images = torch.zeros(2, 3, 224, 224)
    names = [f"last_{number}" for number in range(8)]
    apart = sum(count_flops(lambda name=name: eight_tasks(images, name)) for name in names)
    assert count_flops(lambda: eight_tasks.every(images, names)) <= 0.40 * apart


def test_task_files_are_opened_on_the_backbone_and_at_the_input_size_that_the_first_names(tmp_path):
    model = build_model("vit_nano_patch8_64", num_tokens=2, num_classes=3, img_size=96).eval()
    torch.nn.init.normal_(model.head.weight)
    path = vpt.save_task(model, tmp_path / "a.safetensors")
    bank = open_bank({"one": path, "two": path}, device="cpu")
    assert bank.names == ("one", "two")
    images = make_images(2, 96)
    assert_close(bank(images, "two"), model(images))
    with pytest.raises(ValueError, match=r"a\.safetensors: made for the backbone vit_nano_patch8_64\.vpt"):
        open_bank({"one": path}, backbone="vit_nano_patch8_64", checkpoint=_other_weights(tmp_path), device="cpu")


def _other_weights(folder):
    vit = load_vit("vit_nano_patch8_64")
    vit.blocks[0].attn.qkv.weight.data.mul_(1.01)
    save_file(vit.state_dict(), folder / "other_weights.safetensors")
    return str(folder / "other_weights.safetensors")


def test_it_can_be_said_which_boxes_a_task_gives_out(tmp_path):
    make_tasks(tmp_path, names=["boxes", "deep"], img_size=64)
    bank = make_bank(tmp_path, names=["boxes", "deep"], img_size=64)
    everything = bank(make_images(1, 64), "boxes")[0]
    bank.select("boxes", Selection(max_detections=2))
    assert_close(bank(make_images(1, 64), "boxes")[0], {key: value[:2] for key, value in everything.items()})
    with pytest.raises(ValueError, match="classification"):
        bank.select("deep", Selection())
