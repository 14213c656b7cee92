"""`python -m vpt.export`: its output, checks and refusals, and the code in docs/export.md."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vpt
import vpt.export.__main__
from tests.helpers import build_model, exit_code_of
from vpt.config.command_line import INTERRUPTED
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.export import files, traced
from vpt.export.packing import pack_tasks
from vpt.models.detector import Selection

PAGE = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
NANO = "vit_nano_patch8_64"


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    model = build_model(NANO, **{"num_classes": 3, "num_tokens": 4, **options})
    for parameter in model.head.parameters():
        parameter.data.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Models, and files of their tasks, by name."""
    folder = tmp_path_factory.mktemp("tasks")
    models = {
        "pets": make_model(1, classes=["cat", "dog", "eel"]),
        "flowers": make_model(2, prompt="shallow", num_tokens=6, num_classes=5),
        "last": make_model(3, blocks="last:2", num_classes=2),
        "tuned": make_model(4, tuning="bias"),
        "boxes": make_model(5, task="detection", channels=16, num_convs=1),
        "retinanet": make_model(6, task="detection", channels=16, num_convs=1, head="retinanet"),
    }
    return models, {name: vpt.save_task(model, folder / f"{name}.safetensors") for name, model in models.items()}


def command(monkeypatch, capsys, *arguments):
    """Exit code, output and error of the command, called in this process."""
    return exit_code_of(vpt.export.__main__, monkeypatch, *arguments), *capsys.readouterr()


def check_file(path, model, metadata, image):
    """Compare the file with the model, on one image."""
    image = EvalTransform(Preprocessing.from_dict(metadata.preprocessing))(image)[None]
    found = files.open_model(path)({"images": image.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found["logits"], model(image).numpy(), rtol=0, atol=1e-4)


def test_the_command_writes_a_file_and_prints_its_inputs_and_outputs(tmp_path, tasks, monkeypatch, capsys):
    models, paths = tasks
    image = Image.new("RGB", (80, 60), "teal")
    image.save(tmp_path / "one.png")
    arguments = [f"task={paths['pets']}", f"output={tmp_path / 'new' / 'pets.pt2'}", "format=torch_export"]
    code, printed, error = command(monkeypatch, capsys, *arguments, f"input={tmp_path / 'one.png'}")
    assert code == 0
    assert re.search(r"input +images +\(batch, 3, 64, 64\) +float32\noutput +logits +\(batch, 3\) +float32\n", printed)
    assert re.search(r"pets.pt2: 9\.\d MB in \d+ s; largest difference \d\.\de-\d\d\n$", printed)
    assert error.splitlines() == [f"exporting {paths['pets']} as {arguments[1][7:]}, which takes up to some minutes"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pets.pt2"]
    check_file(tmp_path / "new" / "pets.pt2", models["pets"], vpt.read_task(paths["pets"]), image)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pets", "tuned", "boxes"])
def test_onnx_files_pass_the_check_and_replace_older_ones(tmp_path, tasks, monkeypatch, capsys, name):
    models, paths = tasks
    output = tmp_path / f"{name}.onnx"
    output.write_text("old")
    code, printed, error = command(monkeypatch, capsys, f"task={paths[name]}", f"output={output}")
    assert code == 0, error
    assert float(printed.split()[-1]) < 1e-4
    if name != "boxes":
        check_file(output, models[name], vpt.read_task(paths[name]), Image.new("RGB", (80, 60), "teal"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=pets", "output=pets.onx"], "output=pets.onx: must end in .onnx"),
        (["task=pets", "output=pets.onnx", "format=torch_export"], "output=pets.onnx: must end in .pt2"),
        (["task=pets", "output=pets.onnx", "format=onx"], "format=onx: .* did you mean onnx"),
        (["task=pets", "output=pets.onnx", "shared=yes"], "shared=yes: must be true or false"),
        (["task=pets", "output=pets.onnx", "chared=true"], "chared=true: not an option .* did you mean shared"),
        (["task=pets"], "output is needed"),
        (["task=none.safetensors", "output=a.onnx"], "task=none.safetensors: no such file"),
        (["task=pets,flowers", "output=a.onnx"], "no such file; several are for shared=true"),
        (["task=retinanet", "output=a.onnx"], "head=retinanet is torchvision's, .* only head=dense is exported"),
        (["task=boxes", "output=a.onnx", "shared=true"], "a task of type detection cannot share a backbone"),
        (["task=pets,tuned", "output=a.onnx", "shared=true"], "tuned.safetensors: parameters of the backbone"),
        (["task=pets", "output=a.onnx", "input=nowhere"], "nowhere: no such file or folder"),
        (["task=pets", "output=a.onnx", "input=empty"], "input=empty: contains no images"),
        (["task=pets", "output=a.onnx", "input=empty/text.txt"], "text.txt: not an image"),
        (["task=pets", "output=a.onnx", "backbone=vit_nano"], "backbone=vit_nano: not a timm model"),
        (["task=pets", "output=a.onnx", "checkpoint=none.pth"], "checkpoint=none.pth: no such file"),
        (["task=pets", "output=empty/text.txt/a.onnx"], "cannot write|Not a directory"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path, tasks, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty/text.txt").write_text("no image")
    for name, path in tasks[1].items():
        arguments = [re.sub(rf"\b(?<=[=,]){name}(?=,|$)", str(path), word) for word in arguments]
    code, printed, error = command(monkeypatch, capsys, *arguments)
    assert code == 2
    assert re.search(message, error), error
    assert error.splitlines()[-1].startswith("error: ")
    assert len(error.splitlines()) <= 2  # the line before says what is exported
    assert not printed
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "text.txt"]


def test_without_the_extra_the_error_states_what_to_install(tmp_path, tasks, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    code, _, error = command(monkeypatch, capsys, f"task={tasks[1]['pets']}", f"output={tmp_path / 'a.onnx'}")
    assert code == 2
    assert error.startswith("error: format=onnx needs onnxscript, not installed; type uv pip install -p .venv -e ")


@pytest.mark.parametrize("wrong", [0.002, float("nan")])
def test_a_file_whose_results_differ_is_not_written(tmp_path, tasks, monkeypatch, capsys, wrong):
    output = tmp_path / "pets.pt2"
    output.write_text("old")
    monkeypatch.setattr(files, "write_model", lambda *_: None)
    monkeypatch.setattr(
        files, "open_model", lambda _: lambda given: {"logits": np.full((len(given["images"]), 3), wrong)}
    )
    monkeypatch.setattr(traced, "outputs_of", lambda *_: {"logits": torch.zeros(1, 3)})
    arguments = [f"task={tasks[1]['pets']}", f"output={output}", "format=torch_export"]
    code, printed, error = command(monkeypatch, capsys, *arguments)
    assert code == 2
    assert f"differ from torch's by {wrong:.2g}, more than 0.001; nothing was written, try format=onnx" in error
    assert not printed
    assert [path.name for path in tmp_path.iterdir()] == ["pets.pt2"]
    assert output.read_text() == "old"


def test_an_interrupted_export_leaves_no_file(tmp_path, tasks, monkeypatch, capsys):
    def interrupt(model, path, metadata):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write_model", interrupt)
    code, _, error = command(monkeypatch, capsys, f"task={tasks[1]['pets']}", f"output={tmp_path / 'a.onnx'}")
    assert code == INTERRUPTED
    assert error.splitlines()[-1] == "error: interrupted; nothing was written"
    assert not list(tmp_path.iterdir())


def blocks_of_page():
    return re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_mixed_batch_of_the_page_has_the_results_of_the_models(tmp_path, tasks, monkeypatch, capsys):
    models, paths = tasks
    monkeypatch.chdir(tmp_path)
    named = f"task={paths['pets']},{paths['flowers']},{paths['last']}"
    code, printed, error = command(monkeypatch, capsys, named, "output=backbone.onnx", "shared=true")
    assert code == 0, error
    assert re.search(r"input +prompts +\(tasks, 5, num_tokens, 192\) +float32\n", printed)
    assert Path("backbone.onnx").stat().st_size < 9.3e6
    pets = make_model(1, classes=["cat", "dog", "eel"])
    vpt.save_task(pets, "pets.safetensors", dtype=torch.bfloat16)
    pets = vpt.load_task("pets.safetensors", pets.backbone.vit)
    vpt.save_task(models["flowers"], "flowers.safetensors")
    code = blocks_of_page()[0]
    assert not {"torch", "vpt"} & set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
    names = {}
    exec(compile(code, "docs/export.md", "exec"), names)
    assert names["task"].tolist() == [1, 0, 1]
    for row, image, task in zip(names["logits"], names["images"], names["task"], strict=True):
        model = (pets, models["flowers"])[task]
        with torch.no_grad():
            wanted = model(torch.from_numpy(image)[None])[0].numpy()
        np.testing.assert_allclose(row[: len(wanted)], wanted, rtol=0, atol=1e-4)
    packed = pack_tasks(["pets.safetensors", "flowers.safetensors"], depth=5)
    assert packed.keys() == names["packed"].keys()
    assert all(np.array_equal(packed[name], names["packed"][name]) for name in packed)
    assert capsys.readouterr().out.count("\n") == 3


@pytest.mark.parametrize("selection", [Selection(min_score=0.4), Selection(0.3, 0.3, 7), Selection(0.0, 1.0, 50)])
def test_the_last_step_of_the_page_has_the_boxes_of_the_model(tasks, selection):
    model = tasks[0]["boxes"]
    page = {}
    exec(compile(blocks_of_page()[1], "docs/export.md", "exec"), page)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    sizes = [(64, 64), (40, 64), (64, 30)]
    model.selection = selection
    with torch.no_grad():
        wanted = model(images, sizes=sizes)
        boxes, scores = traced.ExportedModel(model)(images)
    numbers = selection.min_score, selection.max_overlap, selection.max_detections
    for row in range(3):
        found = page["finish"](boxes[row].numpy(), scores[row].numpy(), sizes[row], *numbers)
        assert len(found[0]) == len(wanted[row]["boxes"]) > 0
        for array, name in zip(found, ("boxes", "scores", "labels"), strict=True):
            np.testing.assert_allclose(array, wanted[row][name].numpy(), rtol=0, atol=1e-4)


def test_the_commands_of_the_page_are_valid():
    lines = re.findall(r"^python -m vpt\.export (.*)$", PAGE, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        options = vpt.export.__main__.parse_options(vpt.export.__main__.ExportOptions, line.split(), "")
        assert Path(options.output).suffix == vpt.export.__main__.FORMATS[options.format]
