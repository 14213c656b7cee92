import subprocess
import sys

import numpy as np
import pytest
import torch

import vpt
from tests.helpers import attempt_run, entering, kept_files, make_tiny_vit, options_of, train_with
from vpt import build
from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.validation import to_config
from vpt.models import prompt_init
from vpt.models.parametrizations import Bilinear, Fourier, Shared
from vpt.models.prompt_init import NEW_SHARE, NUM_MATCHED, NUM_STEPS, start_from_patches, start_from_task
from vpt.models.task_file import open_task
from vpt.models.vit import preprocessing_of
from vpt.task_types.base import task_type_of

EXACT = "donot_use_mm_for_euclid_dist"


@pytest.fixture
def as_long_as_they_are(monkeypatch):
    monkeypatch.setattr(prompt_init, "_shorten", lambda backbone, prompt, tokens: tokens)


def test_tokens_from_patches_are_as_long_as_uniform_ones_and_give_the_results_of_the_patches(
    tiny_vit, images, monkeypatch
):
    vit, images = tiny_vit.double(), images.double()
    short, whole = (vpt.PromptedViT(vit, "deep", num_tokens=4).double() for _ in range(2))
    uniform = short.prompt.tokens.detach().square().mean().sqrt()
    start_from_patches(short, [images])
    lengths = short.prompt.tokens.detach().square().mean(-1).sqrt()
    assert torch.allclose(lengths, lengths[0, 0])
    assert lengths[0, 0].item() == pytest.approx(uniform.item(), rel=0.1)
    monkeypatch.setattr(prompt_init, "_shorten", lambda backbone, prompt, tokens: tokens)
    start_from_patches(whole, [images])
    assert whole.prompt.tokens.detach().square().mean().sqrt() > 2 * uniform
    torch.testing.assert_close(short(images), whole(images), rtol=1e-3, atol=1e-3)  # a norm adds 1e-6 to the variance
    travelling = vpt.PromptedViT(vit, "shallow", num_tokens=4).double()
    start_from_patches(travelling, [images])
    assert torch.equal(travelling.prompt.tokens[0], whole.prompt.tokens[0])


@pytest.mark.parametrize("impl", ["auto", "concat"])
def test_patches_that_enter_prompted_blocks_are_those_of_the_bare_vit(tiny_vit, images, impl):
    backbone = vpt.PromptedViT(tiny_vit, "deep", num_tokens=5, blocks=[0, 2], impl=impl)
    with torch.no_grad():
        found = list(backbone.entering_patches(images))
    assert len(found) == 2
    for patches, block in zip(found, (0, 2), strict=True):
        torch.testing.assert_close(patches, entering(tiny_vit, images, block))


def test_a_prompt_starts_at_the_same_patches_in_every_block(images, as_long_as_they_are):
    vit = make_tiny_vit()
    backbone = vpt.PromptedViT(vit, "deep", num_tokens=6)
    start_from_patches(backbone, images.split(3), seed=3)
    chosen = []
    for block in range(3):
        patches = entering(vit, images, block).flatten(0, 1)
        distance, index = torch.cdist(backbone.prompt.tokens[block], patches, compute_mode=EXACT).min(1)
        assert distance.max() < 1e-4
        chosen.append(index.tolist())
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(set(chosen[0])) == 6
    assert len({index // 16 for index in chosen[0]}) > 1  # patches of more than one image


def test_the_seed_decides_which_and_no_other_random_number_is_drawn(images):
    tokens = {}
    for name, seed in {"one": 1, "same": 1, "other": 2}.items():
        backbone = vpt.PromptedViT(make_tiny_vit(), "deep", num_tokens=4)
        state = torch.get_rng_state()
        start_from_patches(backbone, [images], seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        tokens[name] = backbone.prompt.tokens.detach()
    assert torch.equal(tokens["one"], tokens["same"])
    assert not torch.equal(tokens["one"], tokens["other"])


def test_prototypes_are_the_centres_that_plain_k_means_finds(images, as_long_as_they_are):
    vit = make_tiny_vit()
    drawn, grouped = (vpt.PromptedViT(vit, "deep", num_tokens=4, blocks=[1, 2]) for _ in range(2))
    start_from_patches(drawn, [images], seed=5)
    start_from_patches(grouped, [images], "prototype", seed=5)
    for row, block in enumerate((1, 2)):
        patches = entering(vit, images, block).flatten(0, 1).double().numpy()
        centres = drawn.prompt.tokens[row].detach().double().numpy()
        for _ in range(NUM_STEPS):
            nearest = [int(np.argmin([np.sum((patch - centre) ** 2) for centre in centres])) for patch in patches]
            centres = np.stack([patches[np.equal(nearest, group)].mean(0) for group in range(4)])
        np.testing.assert_allclose(grouped.prompt.tokens[row].detach().numpy(), centres, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("start", ["patch", "prototype", "vipamin"])
@pytest.mark.parametrize("form", [None, Shared(), Bilinear(4), Fourier(0.5)])
@pytest.mark.parametrize("kind", ["deep", "kv", "shallow"])
def test_every_form_starts_from_patches_as_near_as_it_can(kind, form, start, images):
    plain, other = (vpt.PromptedViT(make_tiny_vit(), kind, num_tokens=4, form=way) for way in (None, form))
    for backbone in (plain, other):
        start_from_patches(backbone, [images], start)
    tokens, wanted = other.prompt.tokens.detach(), plain.prompt.tokens.detach()
    if isinstance(form, Fourier):
        assert torch.equal(tokens[:, 2:], wanted[:, 2:])
        assert torch.linalg.norm(tokens - wanted) < torch.linalg.norm(wanted)
    else:
        if isinstance(form, Shared):
            lengths, mean = wanted.norm(dim=2, keepdim=True).mean(0), wanted.mean(0)
            wanted = (mean * lengths / mean.norm(dim=1, keepdim=True)).expand_as(wanted)
        torch.testing.assert_close(tokens, wanted, rtol=1e-4, atol=1e-5)
    other(images).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in other.prompt.parameters())


def test_a_backbone_in_bfloat16_gives_float32_tokens(images):
    backbone = vpt.PromptedViT(make_tiny_vit().bfloat16(), "deep", num_tokens=4)
    start_from_patches(backbone, [images])
    assert backbone.prompt.tokens.dtype == torch.float32


def test_pictures_that_cannot_start_a_prompt_are_refused(images):
    backbone = vpt.PromptedViT(make_tiny_vit(), "deep", num_tokens=65)
    before = backbone.prompt.tokens.detach().clone()
    with pytest.raises(ValueError, match=r"num_tokens=65: the pictures have only 64 patches to start from; use fewer"):
        start_from_patches(backbone, [images])
    with pytest.raises(ValueError, match="no pictures"):
        start_from_patches(backbone, [])
    with pytest.raises(ValueError, match="no pictures"):
        start_from_patches(backbone, [], "vipamin")
    with pytest.raises(ValueError, match="patch, prototype, vipamin, got 'mean'"):
        start_from_patches(backbone, [images], "mean")
    with pytest.raises(ValueError, match="no prompt that could start"):
        start_from_patches(vpt.PromptedViT(make_tiny_vit(), None), [images])
    assert torch.equal(backbone.prompt.tokens, before)


@pytest.mark.parametrize("blocks", [[0, 2], "all"])
def test_vipamin_matches_keys_and_adds_a_value_that_the_patches_do_not_have(blocks, images, as_long_as_they_are):
    vit = make_tiny_vit()
    backbone = vpt.PromptedViT(vit, "deep", num_tokens=5, blocks=blocks)
    start_from_patches(backbone, images.split(3), "vipamin", seed=4)
    generator, size = torch.Generator().manual_seed(4), vit.embed_dim
    centring = torch.eye(size, dtype=torch.float64) - 1 / size
    for row, index in enumerate(backbone.prompt.blocks):
        block = vit.blocks[index]
        mean = entering(vit, images, index).mean(0).double()
        of_keys, of_values = (
            part @ torch.diag(block.norm1.weight.double()) @ centring
            for part in block.attn.qkv.weight.double().chunk(3)[1:]
        )
        basis = np.linalg.svd((mean @ of_values.T).numpy())[2][:16]
        drawn = torch.randn(5, size, generator=generator).double()
        for token, direction in zip(backbone.prompt.tokens[row].detach().double(), drawn, strict=True):
            near = sorted(mean, key=lambda patch: -torch.cosine_similarity(of_keys @ direction, of_keys @ patch, dim=0))
            matched = torch.stack(near[:NUM_MATCHED]).mean(0)
            new = (token - (1 - NEW_SHARE) * matched) / NEW_SHARE
            assert new.norm().item() == pytest.approx(matched.norm().item(), rel=1e-3)
            value = (of_values @ new).numpy()
            assert np.linalg.norm(basis @ value) < 1e-3 * np.linalg.norm(value)
            left = (of_values @ direction).numpy()
            left = left - basis.T @ (basis @ left)
            assert left @ value == pytest.approx(np.linalg.norm(left) * np.linalg.norm(value), rel=1e-4)


@pytest.mark.parametrize("prompt", ["deep", "shallow"])
def test_vipamin_starts_a_prompt_on_every_family_of_backbones(tiny_vit, prompt, images):
    backbone = vpt.PromptedViT(tiny_vit, prompt, num_tokens=70)  # more than the pictures have patches
    start_from_patches(backbone, [images], "vipamin")
    tokens = backbone.prompt.tokens.detach()
    assert tokens.isfinite().all()
    assert len(tokens[0].unique(dim=0)) == 70
    tiny_vit.blocks[0].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"vipamin reads keys and values, but in block 0 attn has hooks"):
        start_from_patches(backbone, [images], "vipamin")


# Another task's prompt.


@pytest.fixture
def task(tmp_path):
    torch.manual_seed(3)
    model = vpt.create_model(make_tiny_vit(), num_classes=3, num_tokens=4, blocks=[0, 2], form=Bilinear(2))
    return vpt.save_task(model, tmp_path / "task.safetensors"), model.backbone.prompt.tokens.detach()


@pytest.mark.parametrize("form", [None, Bilinear(2), Bilinear(4)])
def test_a_prompt_starts_from_that_of_a_task_file(task, form):
    path, tokens = task
    backbone = vpt.PromptedViT(make_tiny_vit(), "deep", num_tokens=4, blocks=[0, 2], form=form)
    start_from_task(backbone, path)
    torch.testing.assert_close(backbone.prompt.tokens.detach(), tokens, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 5}, r"num_tokens=4, blocks=0,2, but the new one kind=deep, num_tokens=5, blocks=0,2; use the"),
        ({"blocks": "all"}, r"blocks=0,2, but the new one kind=deep, num_tokens=4, blocks=0-2"),
        ({"prompt": "shallow", "blocks": "all"}, "kind=deep, .* but the new one kind=shallow"),
        ({"prompt": None}, "there is no prompt to start"),
    ],
)
def test_a_prompt_of_another_layout_is_refused(task, options, message):
    backbone = vpt.PromptedViT(make_tiny_vit(), **{"prompt": "deep", "num_tokens": 4, "blocks": [0, 2], **options})
    with pytest.raises(ValueError, match=f"task.safetensors: .*{message}"):
        start_from_task(backbone, task[0])


def test_a_file_without_a_prompt_of_another_backbone_or_none_at_all_is_refused(task, tmp_path):
    backbone = vpt.PromptedViT(make_tiny_vit(), "deep", num_tokens=4, blocks=[0, 2])
    linear = vpt.create_model(make_tiny_vit(), num_classes=3, prompt=None)
    with pytest.raises(ValueError, match=r"linear\.safetensors: has no prompt"):
        start_from_task(backbone, vpt.save_task(linear, tmp_path / "linear.safetensors"))
    other = vpt.PromptedViT(make_tiny_vit("no_prefix"), "deep", num_tokens=4, blocks=[0, 2])
    with pytest.raises(
        ValueError, match=r"made for the backbone vit_tiny_patch16_224.*, its prompt cannot start another"
    ):
        start_from_task(other, task[0])
    with pytest.raises(FileNotFoundError, match="no such file"):
        start_from_task(backbone, tmp_path / "gone.safetensors")


# From the config.


def started(photos, *overrides):
    """The model and the data of a run, once its prompt has started."""
    config = to_config(compose_config(options_of(photos, *overrides)))
    build.seed_everything(0, deterministic=False)
    kind = task_type_of(config)
    samples = kind.read()
    model = build.build_model(config, samples["train"].classes)
    data = kind.build_data(samples, preprocessing_of(model.backbone.vit))
    state = torch.get_rng_state()
    build.start_prompt(config, model, data)
    assert torch.equal(torch.get_rng_state(), state)
    return model, data


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("init", ["patch", "prototype", "vipamin"])
def test_the_prompt_of_a_run_starts_at_patches_of_its_train_pictures(init, num_workers, photos):
    model, data = started(photos, f"prompt.init={init}", f"num_workers={num_workers}")
    if init == "patch":
        pictures = torch.stack([data.datasets["train"][(0, index)][0] for index in range(18)])
        patches = entering(model.backbone.vit, pictures, 0).flatten(0, 1)
        patches = patches / patches.norm(dim=1, keepdim=True) * model.backbone.prompt.tokens[0, 0].norm()
        assert torch.cdist(model.backbone.prompt.tokens[0], patches, compute_mode=EXACT).min(1).values.max() < 1e-4


def test_a_deep_prompt_starts_at_patches_of_as_many_pictures_as_it_has_tokens(photos, monkeypatch):
    looks = []
    monkeypatch.setattr(
        build,
        "start_from_patches",
        lambda backbone, batches, start, seed: looks.append((start, sum(map(len, batches)))),
    )
    started(photos)
    started(photos, "prompt.num_tokens=5")
    started(photos, "prompt.init=prototype")
    for overrides in (["prompt.init=uniform"], ["prompt=shallow"], ["tuning=linear"]):
        started(photos, *overrides)
    assert looks == [("patch", 3), ("patch", 8), ("prototype", 18)]  # in batches of 4, of 18 pictures


def test_a_task_file_is_the_start_whatever_else_the_config_says(photos, tmp_path):
    model, _ = started(photos, "prompt=deep", "prompt.init=normal")
    file = vpt.save_task(model, tmp_path / "task.safetensors")
    again, _ = started(photos, "prompt=deep", f"prompt.init_from={file}")
    assert torch.equal(again.backbone.prompt.tokens, model.backbone.prompt.tokens)


def test_the_config_says_how_tokens_start():
    def tokens(*overrides):
        torch.manual_seed(0)
        config = to_config(compose_config(["prompt=deep", *overrides]))
        return build.build_model(config, ("a", "b")).backbone.prompt.tokens

    assert tokens("prompt.num_tokens=200", "prompt.init=normal").std().item() == pytest.approx(0.02, rel=0.01)
    assert tokens("prompt.num_tokens=200").std().item() > 0.04


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompt.init=patches"], "prompt.init"),
        (["prompt=none", "prompt.init_from=a.safetensors"], "there is no prompt to start; leave it out"),
    ],
)
def test_starts_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        to_config(compose_config(overrides))


@pytest.mark.slow
def test_a_run_that_goes_on_does_not_start_again_and_ends_with_the_same_bytes(photos, tmp_path, monkeypatch):
    options = options_of(photos, "prompt.init=patch", "train.ema=0.5")
    train_with(*options, f"run.root={tmp_path}/whole")
    killed = [*options, f"run.root={tmp_path}/killed"]
    assert attempt_run(tmp_path / "log", killed, "behind a step", 7) != 0
    assert (tmp_path / "killed/run/last.checkpoint").is_file()
    monkeypatch.setattr(build, "start_prompt", lambda *_: pytest.fail("it starts again"))
    train_with(*killed)
    assert kept_files(tmp_path / "killed") == kept_files(tmp_path / "whole")


@pytest.mark.slow
def test_the_command_starts_from_a_task_file_and_refuses_another_before_there_is_a_folder(photos, tmp_path):
    def train(*overrides):
        command = [sys.executable, "-m", "vpt.train", *options_of(photos, *overrides), "train.epochs=1"]
        return subprocess.run([*command, f"run.root={tmp_path}"], capture_output=True, text=True, check=False)

    assert train("run.name=first").returncode == 0
    file = tmp_path / "first" / "task.safetensors"
    assert train("run.name=second", f"prompt.init_from={file}", "optim.prompt_lr=1e-12").returncode == 0
    first, second = (open_task(tmp_path / name / "task.safetensors")[1] for name in ("first", "second"))
    torch.testing.assert_close(first["prompt.tokens"], second["prompt.tokens"], rtol=1e-4, atol=1e-6)
    refused = train("run.name=third", f"prompt.init_from={file}", "prompt.num_tokens=4")
    assert refused.returncode == 2
    assert "num_tokens=3" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "third").exists()
