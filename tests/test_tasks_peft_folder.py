"""A task with adapters of PEFT, as PEFT reads it."""

import json

import pytest
import torch
from peft import PeftModel

import vpt
from tests.helpers import build_model, make_tiny_vit, make_tuned_model, train_steps
from vpt.models.task_file import open_task
from vpt.tasks.conversion import read_folder
from vpt.tasks.peft_folder import write_peft_folder


@pytest.mark.parametrize("method", ["lora", "oft", pytest.param("loha", marks=pytest.mark.slow), "ia3"])
def test_peft_gives_the_same_logits_as_the_task(method, images, tmp_path):
    model = train_steps(make_tuned_model(method), images)
    path = vpt.save_task(model, tmp_path / "task.safetensors", classes=("a", "b", "c"))
    folder = write_peft_folder(tmp_path / "folder", *open_task(path))
    bare = make_tiny_vit(num_classes=3)
    bare.load_state_dict(make_tiny_vit().state_dict(), strict=False)
    read = PeftModel.from_pretrained(bare, folder).eval()
    torch.testing.assert_close(read(images), model(images), rtol=1e-5, atol=1e-5)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == method.upper()
    assert config["base_model_name_or_path"] == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    with pytest.raises(ValueError, match=f'peft_type is "{method.upper()}"'):
        read_folder(folder)
    with pytest.raises(FileExistsError, match="exists already"):
        write_peft_folder(folder, *open_task(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has no adapters of PEFT"),
        ({"tuning": "adapters", "adapters": vpt.Adapters("parallel")}, "has no adapters of PEFT"),
        ({"tuning": "adapters", "adapters": vpt.Adapters("lora"), "prompt": "deep"}, "has a prompt"),
        (
            {"tuning": "adapters", "adapters": vpt.Adapters("lora"), "task": "detection", "channels": 16},
            "is of type detection",
        ),
    ],
)
def test_what_peft_cannot_represent_is_refused(options, message, tmp_path):
    model = build_model(make_tiny_vit(img_size=64), num_classes=3, **options)
    task = open_task(vpt.save_task(model, tmp_path / "task.safetensors"))
    with pytest.raises(ValueError, match=f"the task {message}"):
        write_peft_folder(tmp_path / "folder", *task)
    assert not (tmp_path / "folder").exists()
