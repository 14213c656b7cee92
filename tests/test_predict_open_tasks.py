"""Tasks that are open in memory: of a run or of files, the same to whoever predicts."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import vpt
from tests.helpers import train_with
from vpt.data.images import to_rgb
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import letterboxed_size
from vpt.models.detector import Selection
from vpt.models.vit import load_vit, preprocessing_of
from vpt.predict.open_tasks import open_run, open_task_files, run_model

NANO = "vit_nano_patch8_64"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four tasks: one and two see the same images, three others, and boxes finds boxes."""
    folder, vit = tmp_path_factory.mktemp("tasks"), load_vit(NANO)
    squashed = {**preprocessing_of(vit), "crop_mode": "squash"}
    for number, (name, preprocessing) in enumerate((("one", None), ("two", None), ("three", squashed)), 2):
        model = vpt.create_model(vit, num_classes=number, num_tokens=number)
        torch.nn.init.normal_(model.head.weight)
        vpt.save_task(model, folder / f"{name}.safetensors", preprocessing=preprocessing)
    boxes = vpt.create_model(vit, num_classes=2, task="detection", classes=["a", "b"], channels=16, num_convs=1)
    vpt.save_task(boxes, folder / "boxes.safetensors")
    return folder


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in ((40, 90), (70, 50))]


def opened(folder, *names):
    files = ",".join(str(folder / f"{name}.safetensors") for name in names)
    return open_task_files(files, checkpoint=None, device="cpu")


def test_tasks_with_equal_preprocessing_share_a_call(folder, images):
    tasks = opened(folder, "one", "three", "two")
    calls = []
    spied = replace(tasks, infer=lambda *arguments: calls.append(arguments) or tasks.infer(*arguments))
    results = run_model(spied, [tasks.prepare(partial(to_rgb, image)) for image in images])
    assert [names for _, names, _ in calls] == [["one", "two"], ["three"]]
    assert {name: logits.shape for name, logits in results.items()} == {"one": (2, 2), "two": (2, 3), "three": (2, 4)}
    for name in ("one", "two", "three"):
        model = vpt.load_task(folder / f"{name}.safetensors", NANO)
        batch = torch.stack([EvalTransform(tasks.preprocessings[name])(image) for image in images])
        with torch.no_grad():
            assert torch.allclose(results[name], model(batch), atol=1e-5)


def test_an_image_is_kept_only_if_required(folder, images):
    tasks = opened(folder, "one", "three")
    prepared = tasks.prepare(partial(to_rgb, images[0]))
    assert (prepared.image, prepared.size, len(prepared.inputs)) == (None, (40, 90), 2)
    assert tasks.prepare(partial(to_rgb, images[0]), keeps_image=True).image is images[0]


def test_a_selection_is_kept_and_boxes_end_where_the_picture_does(folder, images):
    tasks = opened(folder, "boxes")
    batch = [tasks.prepare(partial(to_rgb, image)) for image in images]
    tasks.select("boxes", Selection(min_score=0.0, max_overlap=1.0, max_detections=7))
    found = run_model(tasks, batch)["boxes"]
    for detection, prepared in zip(found, batch, strict=True):
        height, width = letterboxed_size(prepared.size, tasks.preprocessings["boxes"])
        assert len(detection["boxes"]) == 7
        assert (detection["boxes"] <= torch.tensor([width, height, width, height])).all()
    tasks.select("boxes", Selection(min_score=0.999))
    assert [len(detection["boxes"]) for detection in run_model(tasks, batch)["boxes"]] == [0, 0]


@pytest.mark.parametrize("data", ["photos", "boxes"])
def test_a_run_and_its_task_file_have_the_same_predictions(tmp_path, request, images, data):
    dataset = "folder" if data == "photos" else "boxes"
    small = ["mode=dry", "num_workers=0", "train.batch_size=4", "device=cpu", "augment=none"]
    source = [f"dataset={dataset}", f"dataset.root={request.getfixturevalue(data)}"]
    run_dir = train_with(f"run.root={tmp_path}", "run.name=a", *source, *small)
    results = []
    for tasks in (
        open_run(run_dir, checkpoint=None, device="cpu"),
        open_task_files(str(run_dir / "task.safetensors"), checkpoint=None, device="cpu"),
    ):
        (name,) = tasks.metadata
        if tasks.task_type == "detection":
            tasks.select(name, Selection(min_score=0.0, max_overlap=1.0, max_detections=5))
        (result,) = run_model(tasks, [tasks.prepare(partial(to_rgb, image)) for image in images]).values()
        results.append([one["scores"] for one in result] if tasks.task_type == "detection" else list(result))
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, atol=1e-5)
