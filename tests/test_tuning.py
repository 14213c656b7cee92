import pytest
import torch
from torch import nn

import vpt
from tests.conftest import make_tiny_vit


@pytest.mark.parametrize(("prompt", "num_prompt"), [(None, 0), ("shallow", 5 * 32), ("deep", 3 * 5 * 32)])
def test_exactly_the_prompt_and_the_head_train(prompt, num_prompt, images):
    model = vpt.create_model(make_tiny_vit(), prompt=prompt, num_tokens=5, num_classes=4)
    names = ["backbone.prompt.tokens", "head.weight", "head.bias"][0 if prompt else 1 :]
    assert list(vpt.tuned_parameters(model)) == names
    count = vpt.count_parameters(model)
    assert (count.prompt, count.head, count.tuned) == (num_prompt, 32 * 4 + 4, num_prompt + 132)
    assert count.backbone == sum(p.numel() for p in model.backbone.vit.parameters())
    assert count.share == count.tuned / count.backbone
    model.head.weight.data.normal_()
    model(images).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == names


def test_counts_of_the_paper_for_vit_base_with_fifty_tokens():
    import timm

    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        shallow = vpt.create_model(vit, prompt=vpt.VisualPrompt(50, 768, kind="shallow"), num_classes=100)
        deep = vpt.create_model(vit, prompt=vpt.VisualPrompt(50, 768, blocks=range(12)), num_classes=100)
    assert vpt.count_parameters(shallow).tuned == 115_300
    assert vpt.count_parameters(deep).tuned == 537_700


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match="expected a PromptedViT"):
        vpt.count_parameters(nn.Linear(2, 2))
