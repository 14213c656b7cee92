"""The life cycle of adapters in a ViT: initialisation, training, task files, merging; and what is refused."""

import copy
import sys
from functools import partial

import pytest
import timm
import torch

import vpt
from tests.helpers import TINY, build_model, make_tiny_vit, make_tuned_model, train_steps
from vpt.models.adapters import METHODS, Adapters, Bottleneck, add_adapters, fold_adapters, peft_layers
from vpt.models.task_file import open_task, read_task, write_task
from vpt.models.task_schema import TaskMetadata
from vpt.models.tuning import origin_of

NOT_ZERO = {"fourierft", "waveft"}  # initialised at random, not at zero
NOT_FOLDED = {"sequential", "parallel", "lily"}


@pytest.fixture(
    params=[
        pytest.param(method, marks=() if method in ("sequential", "parallel", "lora", "oft") else pytest.mark.slow)
        for method in METHODS
    ]
)
def method(request):
    return request.param


def test_only_adapters_and_head_train_from_an_unchanged_vit_and_all_of_them_get_a_gradient(method, images):
    vit = make_tiny_vit()
    pretrained = dict(vit.named_parameters())
    model = make_tuned_model(method, vit)
    tuned = vpt.tuned_parameters(model)
    assert not any(parameter is other for parameter in tuned.values() for other in pretrained.values())
    initial = model.backbone(images).detach()
    if method not in NOT_ZERO:
        torch.testing.assert_close(initial, make_tiny_vit()(images), rtol=1e-5, atol=1e-5)
    train_steps(model, images)
    assert not torch.allclose(model.backbone(images), initial, atol=1e-4)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(tuned)
    before = make_tiny_vit().state_dict()
    assert all(torch.equal(parameter, before[name]) for name, parameter in pretrained.items())
    count = vpt.count_parameters(model)
    assert count.backbone == sum(parameter.numel() for parameter in pretrained.values())
    assert count.adapters == count.backbone_tuned == count.tuned - count.head > 0


def test_a_task_file_stores_adapters_and_reproduces_the_logits_on_a_bare_vit(method, images, tmp_path):
    model = train_steps(make_tuned_model(method), images)
    path = vpt.save_task(model, tmp_path / "task.safetensors", classes=("a", "b", "c"))
    metadata, tensors = open_task(path)
    assert metadata.adapters["method"] == method
    assert not any(name.endswith(("qkv.weight", "fc1.weight", "base_layer.weight")) for name in tensors)
    for shares in (False, True):
        vit = make_tiny_vit()
        state = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
        loaded = vpt.models.task_file.put_task(path, vit, shares=shares)[0]
        assert torch.equal(loaded(images), model(images))
        assert all(torch.equal(tensor, state[name]) for name, tensor in vit.state_dict().items())
        assert not any(parameter.is_meta for parameter in loaded.parameters())
        assert vpt.save_task(loaded, tmp_path / "again.safetensors", classes=("a", "b", "c")).read_bytes() == (
            path.read_bytes()
        )


def test_folding_keeps_the_logits_and_leaves_a_bare_vit_where_the_method_can_be_merged(method, images):
    model = train_steps(make_tuned_model(method), images)
    logits = model(images)
    fold_adapters(model.backbone.vit)
    torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-4)
    is_bare = set(model.backbone.vit.state_dict()) == set(make_tiny_vit().state_dict())
    assert is_bare is (method not in NOT_FOLDED)
    assert (list(peft_layers(model.backbone.vit)) == []) is (method != "lily")


def test_bottlenecks_are_those_of_the_papers():
    torch.manual_seed(0)
    mlp, tokens = torch.nn.Linear(8, 8), torch.randn(2, 5, 8)
    for is_parallel in (False, True):
        adapted = Bottleneck(mlp, 8, width=3, scale=0.5, is_parallel=is_parallel)
        assert torch.equal(adapted(tokens), mlp(tokens))
        for parameter in (adapted.up.weight, adapted.up.bias, adapted.down.bias):
            torch.nn.init.normal_(parameter)
        h = mlp(tokens)
        if is_parallel:
            inner = torch.relu(tokens @ adapted.down.weight.T + adapted.down.bias)
        else:
            inner = torch.nn.functional.gelu(h @ adapted.down.weight.T + adapted.down.bias)
        expected = h + 0.5 * (inner @ adapted.up.weight.T + adapted.up.bias)
        torch.testing.assert_close(adapted(tokens), expected)


def test_low_rank_adapters_are_those_of_the_paper(images):
    model = train_steps(make_tuned_model("lora"), images)
    bare = make_tiny_vit()
    for index, block in enumerate(model.backbone.vit.blocks):
        for name in ("qkv", "proj"):
            layer = getattr(block.attn, name)
            change = layer.lora_B["vpt"].weight @ layer.lora_A["vpt"].weight  # scale alpha / r = 8 / 8
            getattr(bare.blocks[index].attn, name).weight.data += change
    torch.testing.assert_close(model.backbone(images), bare(images), rtol=1e-5, atol=1e-5)


def test_only_the_dropout_of_the_adapters_is_active_in_training(images):
    vit = make_tiny_vit(proj_drop_rate=0.5, drop_path_rate=0.5)
    model = build_model(vit, num_classes=3, tuning="adapters", adapters=Adapters("lora", {"lora_dropout": 0.5}))
    train_steps(model, images)
    model.train()
    assert not torch.equal(model.backbone(images), model.backbone(images))
    assert not vit.blocks[0].drop_path1.training
    model.eval()
    assert torch.equal(model.backbone(images), model.backbone(images))
    without = make_tuned_model("lora", make_tiny_vit(proj_drop_rate=0.5, drop_path_rate=0.5)).train()
    assert torch.equal(without.backbone(images), without.backbone(images))


@pytest.mark.parametrize("method", ["sequential", "parallel", "lora", "loha"])
@pytest.mark.parametrize("kind", ["no_prefix", "rope_with_cls_and_4_registers"])
def test_prompt_and_adapters_train_together_and_both_implementations_agree(method, kind, images):
    results = []
    for impl in ("auto", "concat"):
        torch.manual_seed(2)
        model = make_tuned_model(method, make_tiny_vit(kind).double(), prompt="deep", impl=impl).double()
        train_steps(model, images.double())
        results.append(model(images.double()))
        assert vpt.count_parameters(model).prompt == 3 * 20 * 32
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-8)


def test_a_detector_can_have_adapters(tmp_path):
    vit = make_tiny_vit(img_size=64)
    options = {"task": "detection", "num_classes": 2, "channels": 16, "num_convs": 1}
    model = build_model(vit, tuning="adapters", adapters=Adapters("lora"), **options)
    images = torch.randn(2, 3, 64, 64)
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 2
    sum(model.train()(images, targets).values()).backward()
    assert all(parameter.grad is not None for parameter in vpt.tuned_parameters(model).values())
    loaded = vpt.load_task(vpt.save_task(model, tmp_path / "task.safetensors"), make_tiny_vit(img_size=64))
    torch.testing.assert_close(loaded(images), model.eval()(images))


def test_a_bank_serves_adapters_beside_prompts(images, tmp_path):
    vit = make_tiny_vit()
    models = {"lora": train_steps(make_tuned_model("lora"), images), "deep": vpt.create_model(vit, num_classes=3)}
    torch.nn.init.normal_(models["deep"].head.weight)
    bank = vpt.TaskBank(vit)
    for name, model in models.items():
        bank.load(vpt.save_task(model.eval(), tmp_path / f"{name}.safetensors"), name)
    for logits, name in zip(bank(images, ["lora", "deep", "lora", "deep"]), ["lora", "deep"] * 2, strict=True):
        assert any(torch.allclose(logits, one, atol=1e-5) for one in models[name](images))


def test_layers_that_a_vit_does_not_call_cannot_be_adapted(images):
    vit = timm.create_model("eva02_tiny_patch14_224", **TINY | {"qkv_fused": True})
    model = build_model(vit, num_classes=3, tuning="adapters", adapters=Adapters("lora"))
    assert origin_of(vit).adapters.options["target_modules"] == [f"blocks.{index}.attn.proj" for index in range(3)]
    train_steps(model, images)
    vit = timm.create_model("eva02_tiny_patch14_224", **TINY | {"qkv_fused": True})
    with pytest.raises(ValueError, match=r"around blocks\.0\.attn\.qkv has no effect"):
        add_adapters(vit, Adapters("lora", {"target_modules": ["attn.qkv"]}))
    assert not any(module._forward_hooks for module in vit.modules())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lorra", {}, "method='lorra': must be one of sequential, parallel, lora"),
        ("lora", {"r": "8"}, "r=8 must be a whole number from 0 to 1024"),
        ("lora", {"r": 10**9}, "r=1000000000 must be"),
        ("lora", {"r": 0.5}, r"r=0\.5 must be"),
        ("lora", {"lora_alpha": float("nan")}, "lora_alpha=nan must be"),
        ("lora", {"use_dora": 1}, "use_dora=1 must be true or false"),
        ("lora", {"megatron_config": 1}, "megatron_config is unknown; the options are width, r, "),
        ("lora", {"modules_to_save": ["blocks.0"]}, "modules_to_save is unknown"),
        ("peanut", {"depth": 16384}, "depth is unknown"),
        ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights is unknown"),
        ("lora", {"target_modules": ["a b"]}, r"target_modules=\['a b'\] must be"),
        ("lora", {"n_frequency": 8}, r"lora adapters: .*unexpected keyword argument 'n_frequency'"),
        ("oft", {"oft_block_size": 7}, "oft adapters: "),
        ("lora", {"r": 0}, "lora adapters: `r` should be a positive integer"),
        ("lora", {"target_modules": ["nowhere"]}, "lora adapters: "),
        ("sequential", {"r": 8}, "r is unknown; sequential adapters have width and scale"),
        ("parallel", {"width": 0}, "width=0 must be a whole number from 1"),
        ("parallel", {"scale": ["a"]}, r"scale=\['a'\] must be"),
    ],
)
def test_unknown_methods_and_options_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(make_tiny_vit(), num_classes=3, tuning="adapters", adapters=Adapters(method, options))


def test_errors_of_peft_and_its_absence_are_reported(monkeypatch):
    from peft import mapping

    def refuse(*_, **__):
        raise NotImplementedError

    older = {name: config for name, config in mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items() if name.value != "LORA"}
    for change, *arguments, match in (
        (monkeypatch.setattr, "peft.inject_adapter_in_model", refuse, "lora adapters: NotImplementedError"),
        (monkeypatch.setattr, mapping, "PEFT_TYPE_TO_CONFIG_MAPPING", older, r"'lora': not in peft \S+; install"),
        (monkeypatch.setitem, sys.modules, "peft", None, r'needs PEFT .*; type pip install "vpt\[baselines\]"'),
    ):
        change(*arguments)
        with pytest.raises(ValueError, match=match):
            add_adapters(make_tiny_vit(), Adapters("lora"))
    assert len(add_adapters(make_tiny_vit(), Adapters("sequential"))) == 12


def test_a_vit_has_adapters_once_and_keeps_its_weights(tmp_path):
    def make(tuning, **options):
        return build_model(make_tiny_vit(), num_classes=3, tuning=tuning, **options)

    model, lora = make_tuned_model("lora"), Adapters("lora")
    path, folded = vpt.save_task(model, tmp_path / "task.safetensors"), copy.deepcopy(model)
    fold_adapters(folded.backbone.vit)
    for use, message in (
        (
            lambda: vpt.tune(model, "adapters", adapters=Adapters("sequential")),
            "has lora adapters already; load it again",
        ),
        (lambda: vpt.tune(model, "bias"), "tuning=bias: this ViT has lora adapters; load it again"),
        (lambda: vpt.load_task(path, model.backbone.vit), "was tuned; load"),
        (lambda: make("adapters"), "required for tuning=adapters"),
        (lambda: make("bias", adapters=lora), "required for tuning=adapters"),
        (lambda: vpt.tune(make("bias"), "adapters", adapters=lora), "weights of this ViT were tuned"),
        (partial(vpt.save_task, folded, path), r"lora_A\.vpt\.weight was tuned and is no longer in the backbone"),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_a_kv_prompt_cannot_be_combined_with_adapters_of_attention():
    with pytest.raises(ValueError, match=r"block 0 cannot be given keys and values: qkv is a peft\."):
        make_tuned_model("lora", prompt="kv")
    assert make_tuned_model("sequential", prompt="kv").backbone.paths == dict.fromkeys(range(3), "kv")


@pytest.mark.parametrize("method", ["sequential", "parallel", "lora"])
def test_a_bfloat16_backbone_serves_adapters(method, images, tmp_path):
    model = train_steps(make_tuned_model(method), images)
    path = vpt.save_task(model, tmp_path / "task.safetensors")
    logits = vpt.load_task(path, make_tiny_vit().bfloat16())(images.bfloat16())
    torch.testing.assert_close(logits.float(), model(images), rtol=0.2, atol=0.5)
    if method == "lora":
        with pytest.raises(ValueError, match=r"adapters that follow its weights, which are torch\.bfloat16"):
            make_tuned_model(method, make_tiny_vit().bfloat16())
    else:
        train_steps(make_tuned_model(method, make_tiny_vit().bfloat16()), images.bfloat16())


def test_copies_of_a_vit_have_adapters_of_their_own(method, images):
    model = train_steps(make_tuned_model(method), images)
    copied = copy.deepcopy(model)
    logits = model(images)
    train_steps(copied, images)
    assert torch.equal(model(images), logits)
    assert origin_of(copied.backbone.vit) == origin_of(model.backbone.vit)


def test_the_adapters_of_a_task_file_are_checked_before_they_are_created(images, tmp_path):
    path = vpt.save_task(make_tuned_model("lora"), tmp_path / "task.safetensors")
    metadata, tensors = open_task(path)
    for adapters, message in (
        ({"method": "vera", "options": {}}, "adapters.method is 'vera'"),
        ({"method": "lora", "options": {"megatron_config": 1}}, "megatron_config is unknown"),
        ({"method": "lora"}, "its fields must be method, options"),
    ):
        with pytest.raises(ValueError, match=message):
            TaskMetadata(**{**vars(metadata), "adapters": adapters})
    with pytest.raises(ValueError, match="adapters are named, but tuned_backbone is False"):
        TaskMetadata(**{**vars(metadata), "tuned_backbone": False})
    for options in ({"r": 4}, {"r": 8, "target_modules": ["attn.proj"]}, {"r": 8, "n_frequency": 1}):
        adapters = {"method": "lora", "options": options}
        write_task(path, TaskMetadata(**{**vars(metadata), "adapters": adapters}), tensors)
        with pytest.raises(ValueError, match=r"its tensors are not those|its adapters cannot be used"):
            vpt.load_task(path, make_tiny_vit())
    write_task(path, TaskMetadata(**{**vars(metadata), "adapters": None}), tensors)
    with pytest.raises(ValueError, match="its tensors are not those"):
        vpt.load_task(path, make_tiny_vit())
    assert read_task(path).adapters is None


@pytest.mark.parametrize("method", ["lora", "sequential"])
def test_a_file_never_writes_into_the_backbone_that_a_bank_shares(method, images, tmp_path):
    metadata, tensors = open_task(vpt.save_task(make_tuned_model(method), tmp_path / "task.safetensors"))
    vit = make_tiny_vit()
    bank = vpt.TaskBank(vit)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    for name, shape in {
        "blocks.0.attn.qkv.base_layer.weight": (96, 32),
        "blocks.0.attn.qkv.weight": (96, 32),
        "blocks.0.mlp.mlp.fc1.bias": (128,),
        "blocks.0.mlp.fc1.bias": (128,),
        "norm.weight": (32,),
    }.items():
        crafted = {**tensors, f"backbone.{name}": torch.zeros(shape)}
        with pytest.raises(ValueError, match="its tensors are not those"):
            bank.load(write_task(tmp_path / "crafted.safetensors", metadata, crafted))
    bank.load(tmp_path / "task.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
