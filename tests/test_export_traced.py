"""Exported models against the models themselves: traced or not, in files, alone or in mixed batches."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import vpt
from tests.helpers import TINY_VITS, build_model, make_detector, make_tiny_vit
from vpt.export import files
from vpt.export.files import describe_backbone, describe_task, open_model, write_model
from vpt.export.packing import pack_tasks
from vpt.export.traced import ExportedModel, SharedModel, outputs_of

TOLERANCE = 2e-4  # of logits of some tens, that random weights give
TASKS = [  # prompt, P, classes, and the blocks that it enters
    ("deep", 4, 5, "all"),
    ("deep", 7, 3, "last:2"),
    ("shallow", 3, 2, "all"),
    (None, 1, 4, "all"),
    ("deep", 1, 9, [1]),
    ("shallow", 6, 3, "all"),
]


def make_task(vit, prompt, num_tokens=3, num_classes=4, blocks="all"):
    """A classifier that has a prompt and a head with large values."""
    generator = torch.Generator().manual_seed(num_tokens)
    model = build_model(vit, prompt=prompt, num_tokens=num_tokens, num_classes=num_classes, blocks=blocks).eval()
    for parameter in [*model.head.parameters(), *([model.backbone.prompt.tokens] if prompt else [])]:
        parameter.data.normal_(generator=generator)
    return model


def make_tasks(vit, folder):
    models = [make_task(vit, *task) for task in TASKS]
    return models, [vpt.save_task(model, folder / f"{number}.safetensors") for number, model in enumerate(models)]


def mixed(num, seed):
    """Which tasks are packed, in which order, and which of them each of 1 to 6 images is for."""
    generator = np.random.default_rng(seed)
    packed = generator.permutation(num)[: generator.integers(1, num + 1)]
    return packed, generator.integers(0, len(packed), generator.integers(1, 7))


def check_mixes(run, models, paths, num_mixes=6):
    """Random mixes through a shared model, against each image alone through the model of its task."""
    for seed in range(num_mixes):
        packed, task = mixed(len(models), seed)
        images = torch.randn(len(task), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        arrays = pack_tasks([paths[number] for number in packed], depth=3)
        logits = run({"images": images.numpy(), "task": task, **arrays})["logits"]
        for row, image, chosen in zip(logits, images, packed[task], strict=True):
            with torch.no_grad():
                wanted = models[chosen](image[None])[0].numpy()
            np.testing.assert_allclose(row[: len(wanted)], wanted, rtol=0, atol=TOLERANCE)
            assert (row[len(wanted) :] == -np.inf).all()


def untraced(model):
    """A shared model that runs as a file does, but without one."""

    def run(inputs):
        with torch.no_grad():
            return {"logits": model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()}

    return run


def written(model, path, metadata):
    write_model(ExportedModel(model), path, describe_task(metadata))
    return open_model(path)


@pytest.mark.parametrize("task", TASKS[:4], ids=["deep", "deep_last", "shallow", "none"])
def test_an_exported_model_computes_the_logits_of_its_model(tiny_vit, images, task):
    model = make_task(tiny_vit, *task)
    torch.testing.assert_close(ExportedModel(model)(images), (model(images),), rtol=0, atol=1e-5)


def test_the_prompt_of_an_exported_model_is_fixed(images):
    model = make_task(make_tiny_vit(), "deep")
    exported = ExportedModel(model)
    (before,) = exported(images)
    model.backbone.prompt.tokens.data.zero_()
    assert torch.equal(exported(images)[0], before)
    assert not torch.allclose(model(images), before)


@pytest.mark.parametrize("prompt", ["deep", "kv", "shallow", None])
def test_an_exported_detector_returns_all_boxes_and_scores(prompt):
    model = make_detector(prompt=prompt, channels=32).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    boxes, scores = ExportedModel(model)(images)
    logits, raw = model.head(model.levels(images))
    torch.testing.assert_close(scores, logits.sigmoid())
    torch.testing.assert_close(boxes, raw.clamp(0, 64), rtol=0, atol=1e-4)
    assert (boxes.shape, scores.shape) == ((2, 84, 4), (2, 84, 3))


def test_a_shared_model_returns_for_each_image_the_logits_of_its_task(tiny_vit, tmp_path):
    models, paths = make_tasks(tiny_vit, tmp_path)
    check_mixes(untraced(SharedModel(tiny_vit)), models, paths, num_mixes=20)


def test_padding_does_not_change_the_logits(tmp_path):
    models, paths = make_tasks(make_tiny_vit(), tmp_path)
    run = untraced(SharedModel(models[0].backbone.vit))
    arrays = pack_tasks(paths, depth=3)
    inputs = {"images": np.ones((6, 3, 32, 32), np.float32), "task": np.arange(6), **arrays}
    before = run(inputs)["logits"]
    for name, counts in (("prompts", arrays["num_tokens"]), ("shallow", arrays["num_shallow"])):
        axis = counts.ndim
        places = np.arange(arrays[name].shape[axis])
        arrays[name][places >= counts[..., None]] = 50.0
    assert np.array_equal(run({**inputs, **arrays})["logits"], before)


@pytest.mark.parametrize("prompt", [pytest.param("deep", id="deep"), pytest.param("shallow", marks=pytest.mark.slow)])
def test_a_torch_export_file_runs_at_every_batch_size(tmp_path, images, prompt):
    model = make_task(make_tiny_vit(depth=1), prompt)
    path = vpt.save_task(model, tmp_path / "pets.safetensors", classes=["é", "b", "c", "d"])
    run = written(model, tmp_path / "pets.pt2", vpt.read_task(path))
    for size in (1, 2, 4):
        given = images[:size]
        np.testing.assert_allclose(run({"images": given.numpy()})["logits"], model(given).detach(), atol=1e-5)
    extra = {"vpt.json": ""}
    torch.export.load(tmp_path / "pets.pt2", extra_files=extra)
    assert json.loads(extra["vpt.json"])["classes"] == ["é", "b", "c", "d"]


@pytest.mark.slow
def test_an_onnx_file_is_small_and_has_metadata_but_no_paths(tmp_path, images):
    model = make_task(make_tiny_vit(depth=1), "deep")
    metadata = vpt.read_task(vpt.save_task(model, tmp_path / "pets.safetensors", licence="CC0-1.0"))
    path = tmp_path / "pets.onnx"
    run = written(model, path, metadata)
    for size in (1, 2, 4):
        given = images[:size]
        found = run({"images": given.numpy()})["logits"]
        np.testing.assert_allclose(found, model(given).detach(), rtol=0, atol=TOLERANCE)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights < path.stat().st_size < weights + 80_000
    content = path.read_bytes()
    for place in (Path(__file__).parents[1], sys.prefix):
        assert str(place).encode() not in content
    content = json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["vpt"])
    assert (content["kind"], content["licence"], content["num_classes"]) == ("classification", "CC0-1.0", 4)
    assert content["preprocessing"] == metadata.preprocessing
    assert (content["inputs"], content["outputs"]) == (["images"], ["logits"])
    assert not {"config", "prompt"} & set(content)


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "kind"), [(".pt2", "cls"), *((".onnx", kind) for kind in TINY_VITS)])
def test_files_of_every_kind_of_vit_have_the_results_of_the_models(tmp_path, images, suffix, kind):
    models, paths = make_tasks(make_tiny_vit(kind), tmp_path)
    for model, path in list(zip(models, paths, strict=True))[: 4 if kind == "cls" else 1]:
        run = written(model, tmp_path / f"alone{suffix}", vpt.read_task(path))
        for size in (1, 3):
            found = run({"images": images[:size].numpy()})["logits"]
            np.testing.assert_allclose(found, model(images[:size]).detach(), rtol=0, atol=TOLERANCE)
    shared = tmp_path / f"shared{suffix}"
    write_model(SharedModel(models[0].backbone.vit), shared, describe_backbone(vpt.read_task(paths[0])))
    check_mixes(open_model(shared), models, paths)
    assert shared.stat().st_size < sum(weight.nbytes for weight in models[3].parameters()) + 500_000


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_files_of_a_detector_have_the_results_of_the_model(tmp_path, suffix):
    model = make_detector(channels=32).eval()
    metadata = vpt.read_task(vpt.save_task(model, tmp_path / "boxes.safetensors"))
    run = written(model, tmp_path / f"boxes{suffix}", metadata)
    for size in (1, 3):
        images = torch.randn(size, 3, 64, 64, generator=torch.Generator().manual_seed(size))
        found, wanted = run({"images": images.numpy()}), outputs_of(model, images)
        np.testing.assert_allclose(found["boxes"], wanted["boxes"], rtol=0, atol=1e-3)
        np.testing.assert_allclose(found["scores"], wanted["scores"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tasks_in_half_precision_are_packed_as_float32(tmp_path, dtype):
    model = make_task(make_tiny_vit(), "deep")
    path = vpt.save_task(model, tmp_path / "half.safetensors", dtype=dtype)
    packed = pack_tasks([path], depth=3)
    assert packed["prompts"].dtype == np.float32
    assert np.array_equal(packed["prompts"][0], model.backbone.prompt.tokens.detach().to(dtype).float())


def test_the_arrays_of_a_pack_are_as_large_as_the_largest_task(tmp_path):
    _, paths = make_tasks(make_tiny_vit(), tmp_path)
    packed = pack_tasks(paths, depth=3)
    shapes = {name: array.shape for name, array in packed.items()}
    assert shapes == {
        "prompts": (6, 3, 7, 32),
        "num_tokens": (6, 3),
        "shallow": (6, 6, 32),
        "num_shallow": (6,),
        "head_weight": (6, 9, 32),
        "head_bias": (6, 9),
    }
    assert packed["num_tokens"].tolist() == [[4, 4, 4], [0, 7, 7], [0] * 3, [0] * 3, [0, 1, 0], [0] * 3]
    assert packed["num_shallow"].tolist() == [0, 0, 3, 0, 0, 6]
    assert pack_tasks(paths[3:4], depth=3)["prompts"].shape == (1, 3, 0, 32)


def test_tasks_that_cannot_share_a_backbone_are_refused(tmp_path):
    first = vpt.save_task(make_task(make_tiny_vit(), "deep"), tmp_path / "first.safetensors")
    boxes = vpt.save_task(make_detector(), tmp_path / "boxes.safetensors")
    tuned = build_model(make_tiny_vit(), num_classes=2, tuning="bias")
    tuned = vpt.save_task(tuned, tmp_path / "tuned.safetensors")
    other = make_tiny_vit()
    other.blocks[0].norm1.weight.data += 1
    other = vpt.save_task(make_task(other, "deep"), tmp_path / "other.safetensors")
    for path, message in (
        (boxes, "boxes.safetensors: a task of type detection cannot"),
        (tuned, "tuned.safetensors: parameters of the backbone were tuned"),
        (other, "other.safetensors: made for the backbone .* with other weights"),
    ):
        with pytest.raises(ValueError, match=message):
            pack_tasks([first, path], depth=3)
    with pytest.raises(ValueError, match=r"first.safetensors: does not fit a backbone of embed_dim 32 and 2 blocks"):
        pack_tasks([first], depth=2)
    with pytest.raises(ValueError, match="paths is empty"):
        pack_tasks([], depth=3)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        pack_tasks([first, tmp_path / "none.safetensors"], depth=3)


def test_heads_of_torchvision_are_refused():
    with pytest.raises(ValueError, match=r"head=retinanet is torchvision's, .* only head=dense is exported"):
        ExportedModel(make_detector(head="retinanet"))


def test_a_backbone_in_half_precision_is_refused():
    vit = make_tiny_vit().bfloat16()
    for make in (lambda: SharedModel(vit), lambda: ExportedModel(make_task(vit, "deep"))):
        with pytest.raises(ValueError, match=r"bfloat16; exported models are float32"):
            make()


def test_a_backbone_whose_attention_cannot_be_masked_is_not_shared():
    vit = make_tiny_vit()
    vit.blocks[1].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="cannot be shared, in block 1 attn has hooks"):
        SharedModel(vit)


def test_a_model_too_large_for_an_onnx_file_is_refused_before_tracing(tmp_path, monkeypatch):
    model = make_task(make_tiny_vit(), "deep")
    monkeypatch.setattr(files, "MAX_ONNX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"GB of weights, more than an ONNX file holds; use format=torch_export"):
        write_model(ExportedModel(model), tmp_path / "pets.onnx", {})
    assert not list(tmp_path.iterdir())


class Undecided(torch.nn.Module):
    """A head whose graph depends on its input."""

    def forward(self, features):
        return features if features.sum() > 0 else -features


def test_the_error_for_a_model_that_torch_cannot_trace_is_one_line(tmp_path):
    exported = ExportedModel(make_task(make_tiny_vit(), "deep"))
    exported.model.head = Undecided()
    with pytest.raises(ValueError, match=r"^torch cannot export this model: [^\n]+$"):
        write_model(exported, tmp_path / "pets.pt2", {})
