"""The life cycle of every parametrization of a prompt: created, trained, saved, loaded, exported, served; formulas."""

import copy
import math

import pytest
import torch
from torch.nn.utils import parametrize

import vpt
from tests.helpers import attempt_run, build_model, kept_files, make_tiny_vit, options_of, train_with
from vpt import build
from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.validation import to_config
from vpt.engine.optim import MovingAverage, warmup_cosine
from vpt.engine.state import RunState
from vpt.export.files import describe_task, open_model, write_model
from vpt.export.traced import ExportedModel
from vpt.models.parametrizations import Bilinear, Fourier, Shared
from vpt.models.prompt_init import start_from_patches
from vpt.models.prompts import VisualPrompt
from vpt.models.whitening import whiten_from_patches

LIVES = {  # options, and the shapes of the learned parameters
    "deep": ({"prompt": "deep"}, [(3, 4, 32)]),
    "shallow": ({"prompt": "shallow"}, [(1, 4, 32)]),
    "kv": ({"prompt": "kv"}, [(3, 4, 64)]),
    "kv bilinear": ({"prompt": "kv", "form": Bilinear(2)}, [(3, 4, 2), (3, 2, 64)]),
    "shared": ({"prompt": "deep", "form": Shared()}, [(1, 4, 32)]),
    "bilinear": ({"prompt": "deep", "form": Bilinear(2)}, [(3, 4, 2), (3, 2, 32)]),
    "bilinear shallow": ({"prompt": "shallow", "form": Bilinear(2)}, [(1, 4, 2), (1, 2, 32)]),
    "bilinear in some blocks": ({"prompt": "deep", "form": Bilinear(3), "blocks": [0, 2]}, [(2, 4, 3), (2, 3, 32)]),
    "whitened": ({"prompt": "deep", "form": Bilinear(2, whiten=True)}, [(3, 4, 2), (3, 2, 32)]),
    "whitened shallow": ({"prompt": "shallow", "form": Bilinear(2, whiten=True)}, [(1, 4, 2), (1, 2, 32)]),
    "fourier": ({"prompt": "deep", "form": Fourier(0.5)}, [(3, 4, 32)]),
    "fourier shallow": ({"prompt": "shallow", "form": Fourier(1.0)}, [(1, 4, 32)]),
    "fourier with dropout": ({"prompt": "deep", "form": Fourier(0.5), "dropout": 0.1}, [(3, 4, 32)]),
}
INITS = ("uniform", "normal", "patch", "prototype", "vipamin")
CLASSES = ("a", "b", "c")
KINDS = (("deep", range(3)), ("shallow", None))


def make(name, vit=None, start="uniform", **options):
    """A classifier on a tiny ViT, with a prompt of four tokens and a head that is not zero."""
    torch.manual_seed(1)
    init = start if start == "normal" else "uniform"
    vit = vit or make_tiny_vit()
    model = build_model(vit, num_classes=3, num_tokens=4, init=init, **LIVES[name][0], **options)
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(9)).to(next(vit.parameters()))
    if name.startswith("whitened"):
        whiten_from_patches(model.backbone, [images])
    if start not in ("uniform", "normal"):
        start_from_patches(model.backbone, [images], start)
    return model


def state_of(model):
    parameters = vpt.tuned_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    schedule = warmup_cosine(optimizer, num_steps=9, num_warmup_steps=0)
    return RunState(parameters, optimizer, schedule, MovingAverage(parameters, 0.5))


def step(model, images, state):
    model.train()
    torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
    state.optimizer.step()
    state.average.update()
    state.optimizer.zero_grad()


@torch.no_grad()
def logits_of(model, images):
    return model.eval()(images)


@pytest.fixture(params=list(LIVES))
def name(request):
    return request.param


def test_gradients_reach_all_learned_parameters_and_a_step_changes_the_tokens_of_every_block(name, images):
    model = make(name)
    prompt = model.backbone.prompt
    assert prompt.tokens.shape == (len(prompt.blocks), 4, prompt.width)
    assert [tuple(parameter.shape) for parameter in prompt.parameters()] == LIVES[name][1]
    assert vpt.count_parameters(model).prompt == sum(math.prod(shape) for shape in LIVES[name][1])
    before, logits = prompt.tokens.detach().clone(), logits_of(model, images)
    assert len(model.backbone._cache) == (0 if "shallow" in name else len(prompt.blocks))
    assert torch.equal(logits_of(model, images), logits)
    model(images).square().sum().backward()
    with_gradient = [key for key, parameter in model.named_parameters() if parameter.grad is not None]
    assert with_gradient == list(vpt.tuned_parameters(model))
    assert all(key.startswith(("backbone.prompt.", "head.")) for key in with_gradient)
    assert all((parameter.grad.flatten(1).norm(dim=1) > 0).all() for parameter in prompt.parameters())
    model.zero_grad()
    step(model, images, state_of(model))
    assert ((prompt.tokens.detach() - before).flatten(1).norm(dim=1) > 1e-4).all()
    changed = logits_of(model, images)
    assert not torch.allclose(logits, changed)
    torch.testing.assert_close(changed, model(images).detach())  # with gradients nothing is cached
    with torch.no_grad():
        for parameter in prompt.parameters():
            logits = model(images)
            parameter.data.copy_(torch.randn_like(parameter))  # is not counted by torch
            assert not torch.allclose(model(images), logits)


@pytest.mark.parametrize("name", [name for name in LIVES if "kv" not in name])
def test_the_gradients_of_both_implementations_agree(name, images):
    vit, grads = make_tiny_vit().double(), []
    for impl in ("auto", "concat"):
        model = make(name, vit, impl=impl).double().eval()
        model(images.double()).square().sum().backward()
        grads.append([parameter.grad for parameter in model.backbone.prompt.parameters()])
    for fast, plain in zip(*grads, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-10)


def test_a_run_resumes_from_its_state_as_if_it_had_not_stopped(name, images):
    model, other = make(name), make(name)
    with torch.no_grad():
        for parameter in vpt.tuned_parameters(other).values():
            parameter.add_(1)
    state = state_of(model)
    step(model, images, state)
    state.save_best({"top1": 0.5})
    tensors = {key: tensor.clone() for key, tensor in state.tensors().items()}
    resumed = state_of(other)
    resumed.load(tensors, state.numbers())
    for one, its_state in ((model, state), (other, resumed)):
        its_state.restore_random()
        step(one, images, its_state)
    assert torch.equal(model.backbone.prompt.tokens, other.backbone.prompt.tokens)
    assert torch.equal(logits_of(model, images), logits_of(other, images))


@pytest.mark.parametrize("start", INITS)
def test_it_learns_from_every_initialisation_and_its_task_file_holds_plain_tokens_and_equals_the_live_model(
    name, start, images, tmp_path
):
    vit = make_tiny_vit()
    model = make(name, vit, start)
    before, state = model.backbone.prompt.tokens.detach().clone(), state_of(model)
    for _ in range(2):
        step(model, images, state)
    assert ((model.backbone.prompt.tokens.detach() - before).flatten(1).norm(dim=1) > 1e-4).all()
    path, live = vpt.save_task(model, tmp_path / "task.safetensors", classes=CLASSES), logits_of(model, images)
    loaded = vpt.load_task(path, vit)
    assert loaded.backbone.prompt.form is None
    assert torch.equal(loaded.backbone.prompt.tokens, model.backbone.prompt.tokens)
    assert torch.equal(logits_of(loaded, images), live)
    bank = vpt.TaskBank(vit)
    bank.load(path)
    torch.testing.assert_close(bank(images, "task"), live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("whitened", "kv") else pytest.mark.slow) for name in LIVES]
)
def test_its_exported_task_file_equals_the_live_model(name, images, tmp_path):
    vit = make_tiny_vit()
    model = make(name, vit)
    step(model, images, state_of(model))
    path = vpt.save_task(model, tmp_path / "task.safetensors", classes=CLASSES)
    exported = tmp_path / "task.pt2"
    write_model(ExportedModel(vpt.load_task(path, vit)), exported, describe_task(vpt.read_task(path)))
    found = open_model(exported)({"images": images.numpy()})["logits"]
    torch.testing.assert_close(torch.from_numpy(found), logits_of(model, images), rtol=1e-4, atol=1e-5)


def test_a_mixed_batch_of_a_bank_equals_each_task_alone(name, images, tmp_path):
    vit = make_tiny_vit()
    model, other = make(name, vit), make("deep", vit)
    bank = vpt.TaskBank(vit)
    for key, held in {"one": model, "other": other}.items():
        bank.load(vpt.save_task(held, tmp_path / f"{key}.safetensors", classes=CLASSES))
    mixed = torch.stack(bank(images, ["one", "other", "one", "other"]))
    torch.testing.assert_close(mixed[::2], logits_of(model, images)[::2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1::2], logits_of(other, images)[1::2], rtol=1e-4, atol=1e-5)


def test_copies_states_moves_and_the_removal_of_the_parametrization_keep_the_logits(name, images):
    model, other = make(name), make(name)
    step(model, images, state_of(model))
    other.load_state_dict(model.state_dict())
    live, prompt = logits_of(model, images), model.backbone.prompt
    for same in (other, copy.deepcopy(model), copy.deepcopy(model).double().float()):
        assert torch.equal(logits_of(same, images), live)
        assert repr(same.backbone.prompt) == repr(prompt)
    if prompt.form is not None:
        parametrize.remove_parametrizations(prompt, "tokens")
    assert type(prompt) is VisualPrompt
    assert list(prompt.state_dict()) == ["tokens"]
    assert torch.equal(logits_of(model, images), live)


def test_the_repr_of_a_prompt_ends_with_its_form():
    start = "VisualPrompt(variant=deep, num_tokens=4, embed_dim=32, blocks=0-2, dropout=0.0"
    forms = {"deep": "", "shared": "Shared()", "bilinear": "Bilinear(rank=2)", "fourier": "Fourier(fraction=0.5)"}
    for name, form in forms.items():
        assert repr(make(name).backbone.prompt) == f"{start}, form={form})".replace(", form=)", ")")


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("impl", ["auto", "concat"])
def test_tokens_are_computed_once_for_all_blocks_of_a_pass(impl, recomputes, images, monkeypatch):
    model = make("bilinear", impl=impl)
    calls, forward = [], Bilinear.forward
    monkeypatch.setattr(Bilinear, "forward", lambda form, *factors: calls.append(None) or forward(form, *factors))
    model.backbone.vit.set_grad_checkpointing(recomputes)
    model.train()
    model(images).square().sum().backward()
    assert len(calls) == 1
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.backbone.prompt.parameters())
    model.backbone.feature_maps(images, "all")
    assert len(calls) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared", "bilinear", "whitened", "fourier shallow"])
def test_the_live_model_can_be_compiled_as_one_graph_and_exported(name, images):
    torch.compiler.reset()
    model = make(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for forward in (model, compiled):
        forward(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.backbone.prompt.parameters()])
        model.zero_grad()
    for plain, captured in zip(*gradients, strict=True):
        torch.testing.assert_close(captured, plain, rtol=1e-4, atol=1e-5)
    program = torch.export.export(model.eval(), (images,)).module()
    torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)


def test_shared_tokens_have_the_mean_direction_and_length_of_given_tokens():
    tokens = torch.randn(3, 4, 8, dtype=torch.float64)
    form = Shared()
    shared = form(form.right_inverse(tokens))
    assert torch.equal(shared, shared[:1].repeat(3, 1, 1))
    for index in range(4):
        between = sum(tokens[block, index] for block in range(3))
        assert torch.cosine_similarity(shared[0, index], between, dim=0).item() == pytest.approx(1, abs=1e-12)
        length = sum(tokens[block, index].norm() for block in range(3)) / 3
        torch.testing.assert_close(shared[0, index].norm(), length)
    torch.testing.assert_close(form(form.right_inverse(shared)), shared)
    assert torch.equal(form(form.right_inverse(torch.zeros(3, 4, 8))), torch.zeros(3, 4, 8))


def test_bilinear_is_initialised_to_the_best_approximation_of_its_rank():
    tokens = torch.randn(2, 5, 9, dtype=torch.float64)
    form = Bilinear(3)
    left, right = form.right_inverse(tokens)
    for index, block in enumerate(tokens.numpy()):
        plain = sum(left[index, :, k, None] * right[index, None, k] for k in range(3))
        torch.testing.assert_close(form(left, right)[index], plain)
        values = torch.linalg.svdvals(torch.from_numpy(block))
        error = torch.linalg.norm(tokens[index] - plain)
        torch.testing.assert_close(error, values[3:].norm())  # Eckart and Young: no matrix of rank 3 is closer
    torch.testing.assert_close(left.square().sum((1, 2)), right.square().sum((1, 2)))


@pytest.mark.parametrize("rank", [4, 5, 100])
def test_full_rank_keeps_tokens_and_larger_ranks_are_capped(rank):
    tokens = torch.randn(2, 4, 9, dtype=torch.float64)
    form = Bilinear(rank)
    left, right = form.right_inverse(tokens)
    assert (left.shape, right.shape) == ((2, 4, 4), (2, 4, 9))
    torch.testing.assert_close(form(left, right), tokens)


def test_bilinear_tokens_are_the_same_under_autocast():
    form = Bilinear(4)
    factors = form.right_inverse(torch.randn(2, 4, 9))
    with torch.autocast("cpu", torch.bfloat16):
        tokens = form(*factors)
    assert torch.equal(tokens, factors[0] @ factors[1])


def test_fourier_tokens_are_the_real_part_of_a_plain_transform():
    learned = torch.randn(2, 5, 6, dtype=torch.float64)
    tokens = Fourier(0.6)(learned)
    q, d = 3, 6
    for block in range(2):
        for row in range(q):
            for column in range(d):
                plain = sum(
                    learned[block, i, j].item() * math.cos(2 * math.pi * (row * i / q + column * j / d))
                    for i in range(q)
                    for j in range(d)
                ) / math.sqrt(q * d)
                assert tokens[block, row, column].item() == pytest.approx(plain, abs=1e-12)
    assert torch.equal(tokens[:, q:], learned[:, q:])


def test_fourier_keeps_the_even_part_of_given_tokens_and_their_scale():
    form, tokens = Fourier(1.0), torch.randn(2, 5, 6, dtype=torch.float64)
    even = (tokens + tokens.flip(1, 2).roll((1, 1), (1, 2))) / 2
    for given in (tokens, even):
        torch.testing.assert_close(form(form.right_inverse(given)), even)


@pytest.mark.parametrize(("fraction", "num_transformed"), [(0.01, 1), (0.3, 3), (0.5, 5), (1.0, 10)])
def test_a_fraction_of_the_tokens_is_transformed_and_at_least_one(fraction, num_transformed):
    learned = torch.randn(1, 10, 8)
    same = (Fourier(fraction)(learned) == learned).all(2)[0]
    assert same.tolist() == [False] * num_transformed + [True] * (10 - num_transformed)


def test_options_out_of_range_are_refused():
    for make_form, match in (
        (lambda: Bilinear(0), "rank=0: must be at least 1"),
        (lambda: Fourier(0.0), r"fraction=0\.0: must be in \(0, 1\]"),
        (lambda: Fourier(1.5), r"fraction=1\.5: must be in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=match):
            make_form()


@pytest.mark.parametrize("form", [Shared(), Bilinear(2), Bilinear(2, whiten=True), Fourier(0.5)])
def test_one_form_serves_several_prompts_also_on_the_meta_device(form):
    with torch.device("meta"):
        deep, shallow = (VisualPrompt(4, 32, variant=kind, blocks=blocks, form=form) for kind, blocks in KINDS)
    assert (deep.tokens.shape, shallow.tokens.shape) == ((3, 4, 32), (1, 4, 32))
    assert deep.tokens.is_meta


@pytest.mark.parametrize(
    ("choice", "form"), [("deep", None), ("shared", Shared), ("bilinear", Bilinear), ("fourier", Fourier)]
)
def test_the_config_selects_the_form_and_the_monitored_norms_follow(choice, form):
    config = to_config(compose_config([f"prompt={choice}", "backbone=vit_nano", "prompt.num_tokens=9"]))
    model = build.build_model(config, "classification", CLASSES, {})
    prompt = model.backbone.prompt
    assert prompt.form is None if form is None else type(prompt.form) is form
    watches = build.build_watches(model)
    model.requires_grad_(True)
    prompt.tokens.square().sum().backward()
    for watch in watches:
        watch.before_step()
    tags = {tag for watch in watches for tag in watch.after_step()}
    prefixes = ("prompt_factor0", "prompt_factor1") if choice == "bilinear" else ("prompt",)
    row = "all_blocks" if choice == "shared" else "block_00"
    assert {f"{prefix}_{kind}/{row}" for prefix in prefixes for kind in ("norm", "grad_norm", "update_ratio")} <= tags


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("prompt.rank=0", "prompt.rank=0 is out of range"),
        ("prompt.fraction=0", "prompt.fraction=0.0 is out of range"),
        ("prompt=deep prompt.whiten=true", "prompt.whiten=true is for prompt=bilinear, and prompt.form=plain"),
        ("prompt.form=wide", "prompt.form"),
        ("prompt.init=patches", "prompt.init"),
        ("prompt=none prompt.init_from=a.safetensors", "there is no prompt"),
        ("prompt=biliner", "did you mean bilinear"),
    ],
)
def test_unknown_or_unsuitable_config_values_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        to_config(compose_config(overrides.split()))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bilinear prompt.whiten=true prompt.init=vipamin", "shared", "bilinear", "fourier"])
def test_a_killed_and_resumed_run_ends_with_the_same_bytes(form, photos, tmp_path):
    options = options_of(photos, *f"prompt={form}".split(), "prompt.rank=2", "train.ema=0.5")
    train_with(*options, f"run.root={tmp_path}/whole")
    killed = [*options, f"run.root={tmp_path}/killed"]
    assert attempt_run(tmp_path / "log", killed, "behind a step", 7) != 0
    assert (tmp_path / "killed/run/last.checkpoint").is_file()
    assert attempt_run(tmp_path / "log", killed) == 0
    assert kept_files(tmp_path / "killed") == kept_files(tmp_path / "whole")
