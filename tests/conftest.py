"""Fixtures: tiny ViTs with 0, 1 and 5 prefix tokens and each kind of position, random weights."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.offline import OUTSIDE
from vpt.config import compose_config, to_config
from vpt.train import run

torch.set_num_threads(1)  # tests run in a process for each core

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
TINY_VITS = {
    "cls": ("vit_tiny_patch16_224", {}),
    "no_prefix": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "cls_and_4_registers": ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.1}),
    "rope_with_cls_and_4_registers": ("vit_small_patch16_dinov3", {}),
    "relative_position_bias": (
        "beit_base_patch16_224",
        {"global_pool": "token", "use_rel_pos_bias": True, "use_shared_rel_pos_bias": True},
    ),
}


@pytest.fixture(autouse=True)
def stays_on_this_machine():
    """Fail a test that asked for another machine, even if the code under test took the refusal for an answer."""
    OUTSIDE.clear()
    yield
    assert OUTSIDE == []


def make_tiny_vit(kind: str = "cls", **options):
    """A random ViT of three blocks for 32 px images; every parameter is random, also those that timm starts at zero."""
    name, extra = TINY_VITS[kind]
    torch.manual_seed(0)
    vit = timm.create_model(name, **{**TINY, **extra, **options})
    for parameter_name, parameter in vit.named_parameters():
        if parameter.ndim in (1, 3) or "relative_position_bias" in parameter_name:
            parameter.data.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    return vit.eval()


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


def make_album(num_photos):
    """A folder "album" in the current one, of photos of several shapes, some of them in a folder below."""
    Path("album/sub").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(num_photos):
        pixels = generator.integers(0, 255, (40 + 30 * (number % 5), 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path("album") / ("sub" if number % 2 else "") / f"{number:02d}.png")
    return Path("album")


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


def train_with(*overrides):
    """One training run as the command does it, in this process; returns its folder, None for mode=overfit."""
    return run(to_config(compose_config(overrides)))


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
