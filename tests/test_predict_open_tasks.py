"""Tasks that are open in memory: of a run or of files, the same to whoever predicts."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import vpt
from tests.helpers import NANO
from vpt.data.images import to_rgb
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import letterboxed_size
from vpt.models.detector import Selection
from vpt.predict.open_tasks import open_run, open_task_files, run_model


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in ((40, 90), (70, 50))]


@pytest.fixture
def opened(tasks):
    """The tasks of these names."""

    def opened(*names):
        files = ",".join(str(tasks / f"{name}.safetensors") for name in names)
        return open_task_files(files, checkpoint=None, device="cpu")

    return opened


def test_tasks_with_equal_preprocessing_share_a_call(opened, images, request):
    tasks = opened("deep", "other", "late")
    calls = []
    spied = replace(tasks, infer=lambda *arguments: calls.append(arguments) or tasks.infer(*arguments))
    results = run_model(spied, [tasks.prepare(partial(to_rgb, image)) for image in images])
    assert [names for _, names, _ in calls] == [["deep", "late"], ["other"]]
    assert {name: logits.shape for name, logits in results.items()} == {"deep": (2, 7), "late": (2, 3), "other": (2, 4)}
    for name in results:
        model = vpt.load_task(request.getfixturevalue("tasks") / f"{name}.safetensors", NANO)
        batch = torch.stack([EvalTransform(tasks.preprocessings[name])(image) for image in images])
        with torch.no_grad():
            assert torch.allclose(results[name], model(batch), atol=1e-5)


def test_results_in_bf16_which_a_gpu_computes_in_are_near(opened, images):
    tasks = opened("deep", "late")
    batch = [tasks.prepare(partial(to_rgb, image)) for image in images]
    exact, rough = run_model(tasks, batch), run_model(replace(tasks, precision="bf16"), batch)
    for name in exact:
        assert not torch.equal(exact[name], rough[name])
        torch.testing.assert_close(rough[name].float().softmax(1), exact[name].softmax(1), atol=0.1, rtol=0)


def test_an_image_is_kept_only_if_required(opened, images):
    tasks = opened("deep", "other")
    prepared = tasks.prepare(partial(to_rgb, images[0]))
    assert (prepared.image, prepared.size, len(prepared.inputs)) == (None, (40, 90), 2)
    assert tasks.prepare(partial(to_rgb, images[0]), keeps_image=True).image is images[0]


def test_a_selection_is_kept_and_boxes_end_where_the_picture_does(opened, images):
    tasks = opened("boxes")
    batch = [tasks.prepare(partial(to_rgb, image)) for image in images]
    tasks.select("boxes", Selection(min_score=0.0, max_overlap=1.0, max_detections=7))
    found = run_model(tasks, batch)["boxes"]
    for detection, prepared in zip(found, batch, strict=True):
        height, width = letterboxed_size(prepared.size, tasks.preprocessings["boxes"])
        assert len(detection["boxes"]) == 7
        assert (detection["boxes"] <= torch.tensor([width, height, width, height])).all()
    tasks.select("boxes", Selection(min_score=0.999))
    assert [len(detection["boxes"]) for detection in run_model(tasks, batch)["boxes"]] == [0, 0]


@pytest.mark.parametrize("run", ["class_run", "box_run"])
def test_a_run_and_its_task_file_have_the_same_predictions(request, images, run):
    run_dir, results = request.getfixturevalue(run), []
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
