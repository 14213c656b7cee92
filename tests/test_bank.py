import random
import threading
from functools import partial

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
    """Random tasks on one backbone, as models by name and as a bank of their files."""
    models, bank = {}, vpt.TaskBank(make_tiny_vit(kind, **options))
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        model = build_model(make_tiny_vit(kind, **options), **CHOICES[name]).eval()
        with torch.no_grad():
            for parameter in vpt.tuned_parameters(model).values():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        bank.load(vpt.save_task(model, folder / f"{name}.safetensors"))
        models[name] = model
    return models, bank


def assert_close(result, expected):
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(result, dict(expected), rtol=1e-5, atol=1e-4)


def assert_each_close(results, models, images, names):
    for result, image, name in zip(results, images, names, strict=True):
        assert_close(result, models[name](image[None])[0])


CLASSES = [name for name in CHOICES if name != "boxes"]


def make_images(num, side=32):
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(num))


@pytest.mark.parametrize("kind", TINY_VITS)
def test_any_mix_in_any_order_equals_the_single_models(tmp_path, kind):
    models, bank = make_tasks(tmp_path, kind, CLASSES)
    sizes, images = [], make_images(9)
    bank.vit.patch_embed.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    for seed in range(4):
        names = random.Random(seed).choices(CLASSES, k=9)
        assert_each_close(bank(images, names), models, images, names)
    bank.remove("biases")
    sizes.clear()
    bank(make_images(14), [*bank.names] * 2)
    assert sizes == [14]  # one pass


def test_classes_and_boxes_go_through_the_backbone_together_or_all_tasks_see_every_image(tmp_path):
    models, bank = make_tasks(tmp_path, img_size=64)
    names = ["boxes", "deep", "shallow", "boxes", "linear", "longer", "biases"]
    images = make_images(7, 64)
    assert_each_close(bank(images, names), models, images, names)
    assert sum(len(result["boxes"]) for result in bank(images, "boxes")) > 0
    results = bank.every(images[:3], CLASSES)
    assert list(results) == CLASSES
    for name, result in {**results, **bank.every(images[:3], ["boxes"])}.items():
        for one, expected in zip(result, models[name](images[:3]), strict=True):
            assert_close(one, expected)
    with pytest.raises(ValueError, match=r"tasks deep and boxes require different preprocessing \(crop_pct 0.9"):
        bank.every(images)  # a detector sees whole images


def test_boxes_end_where_the_image_ends_and_can_be_selected(tmp_path):
    models, bank = make_tasks(tmp_path, names=["boxes", "deep"], img_size=64)
    images, sizes = make_images(2, 64), [(40, 64), (64, 30)]
    for tasks in ("boxes", ["boxes", "boxes"]):
        for result, expected in zip(
            bank(images, tasks, sizes=sizes), models["boxes"](images, sizes=sizes), strict=True
        ):
            assert_close(result, expected)
    with pytest.raises(ValueError, match="1 sizes for 2 images"):
        bank(images, "boxes", sizes=sizes[:1])
    everything = bank(images, "boxes")[0]
    bank.select("boxes", Selection(max_detections=2))
    assert_close(bank(images, "boxes")[0], {key: value[:2] for key, value in everything.items()})
    with pytest.raises(ValueError, match="classification"):
        bank.select("deep", Selection())


def test_one_name_gives_the_logits_of_all_images(tmp_path):
    models, bank = make_tasks(tmp_path, names=CLASSES)
    images = make_images(4)
    for name, model in models.items():
        assert_close(bank(images, name), model(images))
        assert bank(images[:0], name).shape == (0, model.num_classes)
    assert bank(images[:0], []) == []


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


def test_a_backbone_that_is_not_understood_serves_its_tasks_one_by_one_until_it_is(tmp_path):
    models, bank = make_tasks(tmp_path, names=["deep", "shallow", "linear"])
    hook = bank.vit.blocks[1].attn.register_forward_hook(lambda *_: None)
    bank.load(tmp_path / "deep.safetensors", "late")
    models["late"] = models["deep"]
    images, mixed = make_images(5), ["deep", "linear", "late", "shallow", "linear"]
    for _ in range(2):
        assert_each_close(bank(images, mixed), models, images, mixed)
        for name, result in bank.every(images).items():
            assert_close(result, models[name](images))
        hook.remove()


def test_a_bank_holds_the_vit_and_tuned_tasks_share_what_they_did_not_tune(tmp_path):
    make_tasks(tmp_path, names=["deep", "biases"])
    vit = make_tiny_vit()
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    bank = vpt.TaskBank(vit)
    for name, is_shared in {"deep": True, "biases": False}.items():
        bank.load(tmp_path / f"{name}.safetensors")
        assert bank.is_shared(name) is is_shared
    assert bank.vit is vit
    own = bank._tasks["biases"].model.backbone.vit
    assert own.blocks[0].attn.qkv.weight is vit.blocks[0].attn.qkv.weight
    assert own.blocks[0].attn.qkv.bias is not vit.blocks[0].attn.qkv.bias
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    num_biases = sum(value.numel() for name, value in vit.named_parameters() if name.endswith("bias"))
    assert bank.num_bytes("biases") == 4 * (num_biases + 3 * 33)
    tokens, head, keys_values, absorbed = 3 * 4 * 32, 3 * 33, 2 * 3 * 4 * 32, 4 * 32
    assert bank.num_bytes("deep") == 4 * (tokens + head + keys_values + absorbed)


def test_tasks_are_loaded_named_swapped_and_removed(tmp_path):
    models, bank = make_tasks(tmp_path, names=["deep", "longer"])
    bank.remove("longer")
    bank.remove("deep")
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
        lambda: bank.is_shared("again"),
        lambda: bank(make_images(1), "again"),
        lambda: bank.every(make_images(1), ["again"]),
    ):
        with pytest.raises(ValueError, match="there is no task again; loaded: deep"):
            call()


def test_a_file_that_is_refused_leaves_the_bank_as_it_was(tmp_path):
    models, bank = make_tasks(tmp_path, names=["deep", "longer"])
    bank.remove("longer")
    write_bytes(tmp_path / "cut.safetensors", (tmp_path / "longer.safetensors").read_bytes()[:-9])
    other = make_tiny_vit()
    other.blocks[0].attn.qkv.weight.data.mul_(1.01)
    vpt.save_task(build_model(other, num_classes=2), tmp_path / "other.safetensors")
    for name, reason in {"cut": "not a readable safetensors file", "other": "made for the backbone"}.items():
        for use in (partial(bank.swap, "deep"), bank.load):
            with pytest.raises(ValueError, match=rf"{name}\.safetensors: {reason}"):
                use(tmp_path / f"{name}.safetensors")
    assert bank.names == ("deep",)
    assert_close(bank(make_images(2), "deep"), models["deep"](make_images(2)))


def test_images_that_a_task_does_not_take_are_refused(tmp_path):
    bank = make_tasks(tmp_path, names=["deep"])[1]
    for images, tasks, message in (
        (make_images(1, 64), "deep", r"task deep takes images of \(32, 32\) px, got \(64, 64\)"),
        (make_images(1)[0], "deep", r"images: must be \(B, 3, H, W\)"),
        (make_images(3), ["deep", "deep"], "2 names of tasks for 3 images"),
    ):
        with pytest.raises(ValueError, match=message):
            bank(images, tasks)


def test_a_request_sees_the_old_or_the_new_task_never_half(tmp_path):
    models, bank = make_tasks(tmp_path, names=["deep", "longer"])
    bank.remove("longer")
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
    for turn in range(12):
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
