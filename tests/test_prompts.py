import math
from pathlib import Path
from typing import get_args

import pytest
import torch

from tests.helpers import make_tiny_vit
from vpt.build import build_model
from vpt.config.composition import compose_config
from vpt.config.validation import to_config
from vpt.models.backbone import PromptedViT
from vpt.models.create import create_model
from vpt.models.prompts import PROMPTS, PromptName, VisualPrompt, resolve_blocks

CONF = Path(__file__).parents[1] / "conf"


@pytest.mark.parametrize(
    ("init", "std", "bound"), [("uniform", 0.0625 / math.sqrt(3), 0.0625), ("normal", 0.02, math.inf)]
)
def test_tokens_are_initialised_as_in_the_paper(init, std, bound):
    tokens = VisualPrompt(200, 768, blocks=range(12), patch_size=(16, 16), init=init).tokens
    assert tokens.shape == (12, 200, 768)
    assert tokens.std().item() == pytest.approx(std, rel=0.01)
    assert abs(tokens.mean().item()) < 1e-4
    assert min(0.999 * bound, 0.0625) < tokens.abs().max() <= bound  # sqrt(6 / (3 * 16 * 16 + 768)) = 0.0625


def test_a_prompt_is_initialised_from_given_tokens_and_refuses_what_does_not_fit():
    prompt = VisualPrompt(2, 4, blocks=(3, 7))
    tokens = torch.randn(2, 2, 4, dtype=torch.float64)
    prompt.start_from(tokens)
    assert prompt.tokens.requires_grad
    for wrong in (tokens[:1], tokens[:, :1], tokens / 0):
        with pytest.raises(ValueError, match=r"finite and of shape \(2, 2, 4\)"):
            prompt.start_from(wrong)
    assert torch.equal(prompt.tokens, tokens.float())


def test_dropout_draws_a_mask_for_each_sample_and_only_in_training():
    prompt = VisualPrompt(50, 16, blocks=(0, 1), dropout=0.5)
    torch.manual_seed(0)
    tokens = prompt(1, batch_size=3)
    dropped = tokens == 0
    assert tokens.shape == (3, 50, 16)
    assert 0.4 < dropped.float().mean() < 0.6
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(tokens[~dropped], (2 * prompt.tokens[1].expand(3, -1, -1))[~dropped])
    prompt.eval()
    assert torch.equal(prompt(1, batch_size=3), prompt.tokens[1:2])


def test_each_prompted_block_has_tokens_of_its_own_that_survive_saving():
    prompt, other = (VisualPrompt(3, 8, blocks=(0, 2, 3), dropout=0.1).eval() for _ in range(2))
    assert torch.equal(prompt(2, 1)[0], prompt.tokens[1])
    assert [block for block in range(10) if prompt.enters(block)] == [0, 2, 3]
    other.load_state_dict(prompt.state_dict())
    assert list(prompt.state_dict()) == ["tokens"]
    assert torch.equal(prompt.tokens, other.tokens)
    assert repr(prompt) == "VisualPrompt(variant=deep, num_tokens=3, embed_dim=8, blocks=0,2,3, dropout=0.1)"


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [("all", (0, 1, 2, 3)), ("first:2", (0, 1)), ("last:3", (1, 2, 3)), ([2], (2,)), ([-1, 0], (0, 3)), ((1,), (1,))],
)
def test_blocks_are_resolved_from_their_description(blocks, expected):
    assert resolve_blocks(blocks, depth=4) == expected


@pytest.mark.parametrize(
    "blocks", ["last", "last:0", "first:5", "middle:2", [4], [-5], [], [1, 1], [0, -4], 3, None, [0.5], [True], ["a"]]
)
def test_blocks_that_do_not_exist_are_refused(blocks):
    with pytest.raises(ValueError, match=r"^blocks="):
        resolve_blocks(blocks, depth=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "num_tokens=0: must be at least 1; use prompt=None"),
        ({"dropout": 1.0}, r"dropout=1\.0: must be in \[0, 1\)"),
        ({"variant": "wide"}, "variant='wide': must be one of shallow, deep, kv"),
        ({"variant": "shallow", "blocks": (0, 1)}, r"blocks=\[0, 1\]: a shallow"),
        ({"blocks": (1, 0)}, r"blocks=\[1, 0\]: must be ascending"),
        ({"blocks": ()}, r"blocks=\[\]: .* at least one"),
        ({"blocks": None}, "blocks=None: a deep prompt needs"),
        ({"init": "zero"}, "init='zero': must be one of uniform, normal"),
        *(({"num_tokens": value}, rf"num_tokens={value!r}: must be an integer") for value in ("10", 2.0, True, None)),
        ({"embed_dim": "4"}, "embed_dim='4': must be an integer"),
        ({"dropout": "0.1"}, "dropout='0.1': must be a number"),
    ],
)
def test_values_out_of_range_are_refused_with_the_value(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        VisualPrompt(**{"num_tokens": 1, "embed_dim": 4, "blocks": (0,), **options})


def test_python_and_the_command_have_the_same_prompts_by_the_same_names_and_the_same_default():
    choices = {path.stem for path in CONF.glob("prompt/*.yaml")} - {"none"}
    assert choices == set(PROMPTS) == set(get_args(PromptName))
    for name in (*choices, None):
        config = to_config(compose_config([] if name is None else [f"prompt={name}"]))
        of_command = build_model(config, "classification", ("a", "b"), {})
        of_python = create_model(make_tiny_vit(), num_classes=2, **({} if name is None else {"prompt": name}))
        prompts = [model.backbone.prompt for model in (of_command, of_python)]
        one, other = ([prompt.variant, prompt.num_tokens, repr(prompt.form), prompt.dropout.p] for prompt in prompts)
        assert one == other
    assert repr(PromptedViT(make_tiny_vit()).prompt) == repr(of_python.backbone.prompt)
    with pytest.raises(ValueError, match="prompt='wide': must be one of shallow, deep, kv, shared, bilinear, fourier"):
        PromptedViT(make_tiny_vit(), "wide")
