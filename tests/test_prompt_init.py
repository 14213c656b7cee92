"""Initialisation of prompts from patch tokens and from task files, in the library and in runs."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import vpt
from tests.helpers import attempt_run, build_model, entering, kept_files, make_tiny_vit, options_of, train_with
from vpt import build
from vpt.config.composition import compose_config
from vpt.config.validation import to_config
from vpt.models import prompt_init
from vpt.models.parametrizations import Bilinear, Fourier, Shared
from vpt.models.prompt_init import NEW_SHARE, NUM_MATCHED, NUM_STEPS, start_from_patches, start_from_task
from vpt.models.prompts import uniform_bound
from vpt.models.task_file import open_task
from vpt.models.vit import preprocessing_of
from vpt.task_types.base import task_type_of

EXACT = "donot_use_mm_for_euclid_dist"


@pytest.fixture
def not_rescaled(monkeypatch):
    monkeypatch.setattr(prompt_init, "_rescale", lambda backbone, prompt, tokens: tokens)


def test_tokens_from_patches_are_rescaled_to_uniform_ones_without_a_change_of_the_results(
    tiny_vit, images, monkeypatch
):
    vit, images = tiny_vit.double(), images.double()
    short, whole = (vpt.PromptedViT(vit, "deep", num_tokens=4).double() for _ in range(2))
    uniform = short.prompt.tokens.detach().square().mean().sqrt()
    start_from_patches(short, [images])
    lengths = short.prompt.tokens.detach().square().mean(-1).sqrt()
    assert torch.allclose(lengths, lengths[0, 0])
    assert lengths[0, 0].item() == pytest.approx(uniform.item(), rel=0.1)
    monkeypatch.setattr(prompt_init, "_rescale", lambda backbone, prompt, tokens: tokens)
    start_from_patches(whole, [images])
    assert whole.prompt.tokens.detach().square().mean().sqrt() > 2 * uniform
    torch.testing.assert_close(short(images), whole(images), rtol=1e-3, atol=1e-3)  # a norm adds 1e-6 to the variance
    travelling = vpt.PromptedViT(vit, "shallow", num_tokens=4).double()
    start_from_patches(travelling, [images])
    assert torch.equal(travelling.prompt.tokens[0], whole.prompt.tokens[0])


@pytest.mark.parametrize("impl", ["auto", "concat"])
def test_entering_patches_are_those_of_the_bare_vit(tiny_vit, images, impl):
    backbone = vpt.PromptedViT(tiny_vit, "deep", num_tokens=5, blocks=[0, 2], impl=impl)
    with torch.no_grad():
        found = list(backbone.entering_patches(images))
    assert len(found) == 2
    for patches, block in zip(found, (0, 2), strict=True):
        torch.testing.assert_close(patches, entering(tiny_vit, images, block))


def test_the_same_patches_initialise_every_block(images, not_rescaled):
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


def test_the_seed_selects_the_patches_and_the_global_random_state_is_untouched(images):
    tokens = {}
    for name, seed in {"one": 1, "same": 1, "other": 2}.items():
        backbone = vpt.PromptedViT(make_tiny_vit(), "deep", num_tokens=4)
        state = torch.get_rng_state()
        start_from_patches(backbone, [images], seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        tokens[name] = backbone.prompt.tokens.detach()
    assert torch.equal(tokens["one"], tokens["same"])
    assert not torch.equal(tokens["one"], tokens["other"])


def test_prototypes_are_the_centres_of_plain_k_means(images, not_rescaled):
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
def test_every_form_is_initialised_as_close_to_the_patches_as_possible(kind, form, start, images):
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


def test_images_that_cannot_initialise_a_prompt_are_refused(images):
    for prompt, batches, start, match in (
        ("deep", [images], "patch", "num_tokens=65: must be at most the 64 patches"),
        ("deep", [], "patch", "at least one image"),
        ("deep", [], "vipamin", "at least one image"),
        ("deep", [images], "mean", "start='mean': must be one of patch, prototype, vipamin"),
        (None, [images], "patch", "no prompt to initialise"),
    ):
        backbone = vpt.PromptedViT(make_tiny_vit(), prompt, num_tokens=65)
        before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
        with pytest.raises(ValueError, match=match):
            start_from_patches(backbone, batches, start)
        assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("blocks", [[0, 2], "all"])
def test_vipamin_matches_keys_and_adds_a_value_orthogonal_to_those_of_the_patches(blocks, images, not_rescaled):
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
def test_vipamin_supports_every_family_of_backbones(tiny_vit, prompt, images):
    backbone = vpt.PromptedViT(tiny_vit, prompt, num_tokens=70)  # more than the patches of an image
    start_from_patches(backbone, [images], "vipamin")
    tokens = backbone.prompt.tokens.detach()
    assert tokens.isfinite().all()
    assert len(tokens[0].unique(dim=0)) == 70
    tiny_vit.blocks[0].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"vipamin.* in block 0 attn has hooks"):
        start_from_patches(backbone, [images], "vipamin")


@pytest.fixture
def task(tmp_path):
    torch.manual_seed(3)
    model = build_model(make_tiny_vit(), num_classes=3, num_tokens=4, blocks=[0, 2], form=Bilinear(2))
    return vpt.save_task(model, tmp_path / "task.safetensors"), model.backbone.prompt.tokens.detach()


@pytest.mark.parametrize("form", [None, Bilinear(2), Bilinear(4)])
def test_a_prompt_is_initialised_from_a_task_file(task, form):
    path, tokens = task
    backbone = vpt.PromptedViT(make_tiny_vit(), "deep", num_tokens=4, blocks=[0, 2], form=form)
    start_from_task(backbone, path)
    torch.testing.assert_close(backbone.prompt.tokens.detach(), tokens, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("cls", {"num_tokens": 5}, "num_tokens=4, blocks=0,2, but .* variant=deep, num_tokens=5, blocks=0,2"),
        ("cls", {"blocks": "all"}, "blocks=0,2, but .* variant=deep, num_tokens=4, blocks=0-2"),
        ("cls", {"prompt": "shallow", "blocks": "all"}, "variant=deep, .* but .* variant=shallow"),
        ("cls", {"prompt": None}, "no prompt to initialise"),
        ("no_prefix", {}, "is for the backbone vit_tiny_patch16_224"),
    ],
)
def test_a_prompt_of_another_layout_or_backbone_is_refused(task, tmp_path, kind, options, message):
    options = {"prompt": "deep", "num_tokens": 4, "blocks": [0, 2], **options}
    backbone = vpt.PromptedViT(make_tiny_vit(kind), **options)
    with pytest.raises(ValueError, match=f"task.safetensors: .*{message}"):
        start_from_task(backbone, task[0])
    with pytest.raises(FileNotFoundError, match="no such file"):
        start_from_task(backbone, tmp_path / "gone.safetensors")


def test_a_file_without_a_prompt_is_refused(tmp_path):
    linear = vpt.create_model(make_tiny_vit(), num_classes=3, prompt=None)
    with pytest.raises(ValueError, match=r"linear.safetensors: has no prompt"):
        start_from_task(vpt.PromptedViT(make_tiny_vit()), vpt.save_task(linear, tmp_path / "linear.safetensors"))


def initialised(photos, *overrides):
    """Model and data of a run, after the initialisation of its prompt."""
    config = to_config(compose_config(options_of(photos, *overrides)))
    build.seed_everything(0, deterministic=False)
    kind = task_type_of(config)
    samples = kind.read()
    model = kind.build_model(samples["train"])
    data = kind.build_data(samples, preprocessing_of(model.backbone.vit))
    state = torch.get_rng_state()
    build.start_prompt(config, model, data)
    assert torch.equal(torch.get_rng_state(), state)
    return model, data


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("init", ["patch", "prototype", "vipamin"])
def test_the_prompt_of_a_run_is_initialised_from_its_train_images(init, num_workers, photos):
    model, data = initialised(photos, f"prompt.init={init}", f"num_workers={num_workers}")
    if init == "patch":
        images = torch.stack([data.datasets["train"][(0, index)][0] for index in range(18)])
        patches = entering(model.backbone.vit, images, 0).flatten(0, 1)
        patches = patches / patches.norm(dim=1, keepdim=True) * model.backbone.prompt.tokens[0, 0].norm()
        assert torch.cdist(model.backbone.prompt.tokens[0], patches, compute_mode=EXACT).min(1).values.max() < 1e-4


def test_a_deep_prompt_reads_as_many_images_as_it_has_tokens(photos, monkeypatch):
    calls = []
    monkeypatch.setattr(
        build,
        "start_from_patches",
        lambda backbone, batches, start, seed: calls.append((start, sum(map(len, batches)))),
    )
    initialised(photos)
    initialised(photos, "prompt.num_tokens=5")
    initialised(photos, "prompt.init=prototype")
    for overrides in (["prompt.init=uniform"], ["prompt=shallow"], ["tuning=linear"]):
        initialised(photos, *overrides)
    assert calls == [("patch", 3), ("patch", 8), ("prototype", 18)]  # in batches of 4, of 18 images


def test_a_task_file_takes_precedence_over_other_initialisation(photos, tmp_path):
    model, _ = initialised(photos, "prompt=deep", "prompt.init=normal")
    file = vpt.save_task(model, tmp_path / "task.safetensors")
    again, _ = initialised(photos, "prompt=deep", f"prompt.init_from={file}")
    assert torch.equal(again.backbone.prompt.tokens, model.backbone.prompt.tokens)


def test_the_config_selects_the_random_initialisation():
    for init, std in {"normal": 0.02, "uniform": uniform_bound(192, (8, 8)) / 3**0.5}.items():
        config = to_config(compose_config(["prompt=deep", "prompt.num_tokens=200", f"prompt.init={init}"]))
        tokens = build.build_model(config, "classification", ("a", "b"), {}).backbone.prompt.tokens
        assert tokens.std().item() == pytest.approx(std, rel=0.01)


@pytest.mark.slow
def test_a_resumed_run_does_not_initialise_again_and_ends_with_the_same_bytes(photos, tmp_path, monkeypatch):
    options = options_of(photos, "prompt.init=patch", "train.ema=0.5")
    train_with(*options, f"run.root={tmp_path}/whole")
    killed = [*options, f"run.root={tmp_path}/killed"]
    assert attempt_run(tmp_path / "log", killed, "behind a step", 7) != 0
    assert (tmp_path / "killed/run/last.checkpoint").is_file()
    monkeypatch.setattr(build, "start_prompt", lambda *_: pytest.fail("initialised again"))
    train_with(*killed)
    assert kept_files(tmp_path / "killed") == kept_files(tmp_path / "whole")


@pytest.mark.slow
def test_the_command_initialises_from_a_task_file_and_refuses_an_unsuitable_one_before_it_creates_a_folder(
    photos, tmp_path
):
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
