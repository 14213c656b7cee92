"""Fixtures: tiny ViTs with 0, 1 and 5 prefix tokens and each kind of position, random weights."""

import json
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import vpt
from tests.helpers import NANO, TINY_VITS, build_model, make_tiny_vit, train_with
from tests.offline import OUTSIDE
from vpt.models.vit import load_vit, preprocessing_of

torch.set_num_threads(1)  # tests run in a process for each core


@pytest.fixture(autouse=True)
def stays_on_this_machine():
    """Fail a test that asked for another machine, even if the code under test took the refusal for an answer."""
    OUTSIDE.clear()
    yield
    assert OUTSIDE == []


@pytest.fixture(params=list(TINY_VITS))
def tiny_vit(request):
    return make_tiny_vit(request.param)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of small photos, train/ val/ test/ of three classes that differ in colour."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for split, num in (("train", 6), ("val", 3), ("test", 4)):
        for channel, name in enumerate(("blue sky", "grass", "rose")):
            (root / split / name).mkdir(parents=True)
            for i in range(num):
                pixels = generator.integers(0, 90, (40, 48, 3), dtype=np.uint8)
                pixels[..., 2 - channel] += 120
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def small_disk(tmp_path):
    """A function from a size such as "64k" to the folder of an empty disk of that size."""
    disk = tmp_path / "disk"

    def mount(size):
        disk.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True
        ).returncode:
            pytest.skip("no right to mount a small disk")
        return disk

    yield mount
    subprocess.run(["umount", "--lazy", disk], capture_output=True)  # TensorBoard's writer may still have its file


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def boxes(tmp_path_factory):
    """A folder in the form of COCO: squares of two colours on noise, with gaps in the category ids."""
    root = tmp_path_factory.mktemp("boxes")
    generator = np.random.default_rng(0)
    for split, num in (("train", 16), ("val", 4), ("test", 5)):
        (root / split).mkdir()
        content = {"categories": [{"id": 3, "name": "red box"}, {"id": 17, "name": "blue box"}]}
        content |= {"images": [], "annotations": []}
        for number in range(1, num + 1):
            height, width = (96, 128) if number % 2 else (128, 96)
            pixels = generator.integers(0, 90, (height, width, 3), dtype=np.uint8)
            for corner in ((8, 8), (56, 40))[: 1 + number % 2]:
                x, y = (int(value) for value in corner + generator.integers(-6, 7, 2))
                side, label = int(generator.integers(28, 40)), int(generator.integers(2))
                pixels[y : y + side, x : x + side, 2 * label] += 140
                annotation = {"id": len(content["annotations"]) + 1, "image_id": 100 + number, "iscrowd": 0}
                annotation |= {"category_id": (3, 17)[label], "bbox": [x, y, side, side], "area": side * side}
                content["annotations"].append(annotation)
            name = f"{number}.png"
            content["images"].append({"id": 100 + number, "file_name": name, "height": height, "width": width})
            Image.fromarray(pixels).save(root / split / name)
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """A folder of task files on the embedded backbone, with random prompts and heads; "other" wants other images."""
    folder, vit = tmp_path_factory.mktemp("tasks"), load_vit(NANO)
    squashed = {**preprocessing_of(vit), "crop_pct": 1.0, "crop_mode": "squash"}
    boxes = {"task": "detection", "channels": 16, "num_convs": 1}
    torch.manual_seed(0)
    for name, num_classes, num_tokens, preprocessing, options in (
        ("deep", 7, 3, None, {}),
        ("late", 3, 5, None, {"blocks": "last:2"}),
        ("other", 4, 2, squashed, {"prompt": "shallow"}),
        ("boxes", 2, 2, None, boxes),
        ("trees", 3, 2, None, boxes),
    ):
        model = build_model(vit, num_classes=num_classes, num_tokens=num_tokens, **{"prompt": "deep", **options})
        for parameter in vpt.tuned_parameters(model).values():
            torch.nn.init.normal_(parameter, std=0.2)
        classes = [f"{name} {i}" for i in range(num_classes)]
        vpt.save_task(model, folder / f"{name}.safetensors", classes=classes, preprocessing=preprocessing)
    return folder


DRY = ["mode=dry", "num_workers=0", "augment=none", "train.batch_size=4", "prompt.num_tokens=2", "device=cpu"]


@pytest.fixture(scope="session")
def class_run(tmp_path_factory, photos):
    root = tmp_path_factory.mktemp("runs")
    return train_with(f"run.root={root}", "run.name=a", *DRY, "dataset=folder", f"dataset.root={photos}")


@pytest.fixture(scope="session")
def box_run(tmp_path_factory, boxes):
    small = ["head.channels=16", "head.num_convs=1", f"run.root={tmp_path_factory.mktemp('runs')}", "run.name=a"]
    return train_with(*DRY, "dataset=boxes", f"dataset.root={boxes}", *small)
