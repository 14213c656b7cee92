import copy

import pytest
import torch
from torch.nn import functional as F

import vpt
from tests.helpers import build_model, make_detector, make_tiny_vit
from vpt.models.parametrizations import Bilinear, Shared
from vpt.models.prompts import VisualPrompt
from vpt.prune.token_importance import MaskedPrompt, keep_tokens, token_importance

TARGETS = torch.tensor([0, 1, 2, 0])


def losses(model, images, targets):
    return {"class": F.cross_entropy(model(images), targets)}


def make(vit=None, **options):
    torch.manual_seed(2)
    options = {"prompt": "deep", "num_tokens": 4, **options}
    model = build_model(vit or make_tiny_vit(), num_classes=3, **options).double()
    torch.nn.init.normal_(model.head.weight, std=0.2)
    with torch.no_grad():
        for parameter in model.backbone.prompt.parameters():
            parameter.mul_(10)
    return model.eval()


def loss_of(model, images, masks):
    source = MaskedPrompt(model.backbone, model.backbone.prompt)
    source.masks = masks
    with torch.no_grad(), model.backbone.replaced_source(source):
        return F.cross_entropy(model(images), TARGETS, reduction="none")


@pytest.mark.parametrize("prompt", ["deep", "shallow", "kv"])
def test_a_mask_of_zero_is_the_model_without_the_token_one_changes_nothing_two_doubles_it(tiny_vit, prompt, images):
    images, model = images.double(), make(tiny_vit, prompt=prompt)
    own, blocks = model.backbone.prompt, model.backbone.prompt.blocks
    masks = torch.ones(4, len(blocks), 4, dtype=torch.float64)
    plain = F.cross_entropy(model(images), TARGETS, reduction="none").detach()
    torch.testing.assert_close(loss_of(model, images, masks), plain, rtol=1e-9, atol=1e-9)
    for factor, rows in ((0.0, [0, 1, 3]), (2.0, [0, 1, 2, 2, 3])):
        masks[:, :, 2] = factor
        other = VisualPrompt(len(rows), own.embed_dim, variant=own.variant, blocks=blocks, width=own.width).double()
        other.tokens.data = own.tokens.detach()[:, rows]
        changed = make(tiny_vit, prompt=prompt)
        changed.backbone.prompt = other
        torch.testing.assert_close(
            loss_of(model, images, masks), F.cross_entropy(changed(images), TARGETS, reduction="none").detach()
        )


@pytest.mark.parametrize(
    "options", [{}, {"prompt": "shallow"}, {"prompt": "kv"}, {"blocks": [0, 2]}, {"form": Bilinear(2)}]
)
def test_scores_are_the_mean_size_of_differences_that_each_token_makes_to_the_loss_of_a_picture(options, images):
    images, model, step = images.double(), make(**options), 1e-6
    found = token_importance(model, [(images[:3], TARGETS[:3]), (images[3:], TARGETS[3:])], losses)
    ones = torch.ones(4, len(model.backbone.prompt.blocks), 4, dtype=torch.float64)
    for row, token in ((0, 0), (-1, 1), (-1, 3)):
        more, less = ones.clone(), ones.clone()
        more[:, row, token] += step
        less[:, row, token] -= step
        slopes = (loss_of(model, images, more) - loss_of(model, images, less)) / (2 * step)
        assert found[row, token].item() == pytest.approx(slopes.abs().mean().item(), rel=1e-4)
        assert slopes.abs().max() > 1e-4


def test_a_mask_on_a_deep_token_itself_would_say_nothing(images):
    model = make()
    masks = torch.ones(3, 4, 1, dtype=torch.float64, requires_grad=True)
    tokens = model.backbone.prompt.tokens.detach()
    del model.backbone.prompt.tokens
    model.backbone.prompt.tokens = tokens * masks
    F.cross_entropy(model(images.double()), TARGETS).backward()
    found = token_importance(make(), [(images.double(), TARGETS)], losses)
    assert masks.grad.abs().max() < 1e-3 * found.max()


def test_the_model_stays_as_it_was(images):
    model = make(tuning="bias")
    model.train()
    backbone, state = model.backbone, copy.deepcopy(model.state_dict())
    tuned = list(vpt.tuned_parameters(model))
    token_importance(model, [(images.double(), TARGETS)], losses)
    assert model.backbone is backbone
    assert model.training
    assert model.backbone.prompt.training
    assert list(vpt.tuned_parameters(model)) == tuned
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_dropout_does_not_play_a_part(images):
    scores = [token_importance(make(dropout=0.5), [(images.double(), TARGETS)], losses) for _ in range(2)]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], token_importance(make(), [(images.double(), TARGETS)], losses))


@pytest.mark.parametrize("head", ["dense", "retinanet", "fasterrcnn"])
def test_tokens_of_a_detector_are_scored_by_its_losses(head):
    model, images = make_detector(head).eval(), torch.randn(2, 3, 64, 64)
    targets = [{"boxes": torch.tensor([[2.0, 3, 40, 44]]), "labels": torch.tensor([0])} for _ in images]
    found = token_importance(model, [(images, targets)], lambda model, *inputs: model(*inputs))
    assert found.shape == model.backbone.prompt.tokens.shape[:2]
    assert (found.max(dim=1).values > 0).all()
    assert not model.training


def test_the_tokens_with_the_largest_scores_are_kept_in_their_order():
    prompt = VisualPrompt(4, 8, blocks=[0, 2])
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [9.0, 0.0, 7.0, 8.0]])
    smaller = keep_tokens(prompt, scores, 2)
    assert torch.equal(smaller.tokens[0], prompt.tokens[0, [1, 3]])
    assert torch.equal(smaller.tokens[1], prompt.tokens[1, [0, 3]])
    assert (smaller.blocks, smaller.num_tokens, prompt.num_tokens) == ((0, 2), 2, 4)
    assert [name for name, _ in smaller.named_parameters()] == ["tokens"]


@pytest.mark.parametrize("kind", ["deep", "kv"])
@pytest.mark.parametrize("form", [Shared(), Bilinear(2)])
def test_what_is_kept_of_a_prompt_with_a_form_is_plain_and_in_a_task_file(kind, form, images, tmp_path):
    model = make(prompt=kind, form=form).float()
    before = model(images)
    prompt = model.backbone.prompt
    model.backbone.prompt = keep_tokens(prompt, torch.rand(3, 4), 3)
    assert prompt.form is not None
    assert model.backbone.prompt.form is None
    after = model(images)
    assert not torch.allclose(before, after)
    loaded = vpt.load_task(vpt.save_task(model, tmp_path / "task.safetensors"), model.backbone.vit)
    assert loaded.backbone.prompt.num_tokens == 3
    torch.testing.assert_close(loaded(images), after)


def test_what_cannot_be_pruned_is_refused(images):
    prompt = VisualPrompt(4, 8, blocks=[0, 2])
    for keep in (0, 4, 5):
        with pytest.raises(ValueError, match=f"num_tokens={keep}"):
            keep_tokens(prompt, torch.rand(2, 4), keep)
    with pytest.raises(ValueError, match=r"scores of shape \(2, 3\) do not fit VisualPrompt"):
        keep_tokens(prompt, torch.rand(2, 3), 1)
    with pytest.raises(ValueError, match="no images"):
        token_importance(make(), [], losses)
    with pytest.raises(ValueError, match="no prompt whose tokens"):
        token_importance(build_model(make_tiny_vit(), num_classes=3, prompt=None), [], losses)
    model = make()
    model.backbone.vit.blocks[2].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="cannot be scored: in block 2 the block has hooks"):
        token_importance(model, [(images.double(), TARGETS)], losses)
