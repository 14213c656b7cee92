"""Writers of predictions: outputs, and refusals of predict and evaluate before the work."""

import csv
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vpt
import vpt.engine.trainer
import vpt.evaluate.__main__ as evaluate_command
import vpt.predict.open_tasks
from tests.helpers import edit_json, exit_code_of
from vpt import build
from vpt.config.command_line import INTERRUPTED, parse_options
from vpt.config.errors import ConfigError
from vpt.data.images import read_image
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import letterboxed_size
from vpt.evaluate.__main__ import EvaluateOptions, evaluate_run
from vpt.models.detector import Selection
from vpt.predict.__main__ import USAGE, PredictOptions, predict_run
from vpt.predict.open_tasks import open_run
from vpt.task_types.box_writer import BoxWriter

EVERY_BOX = {"min_score": 0.0, "max_overlap": 1.0}  # the models have learned nothing


@pytest.fixture
def album(tmp_path, monkeypatch):
    """A folder with photos, and the current folder beside it: wide and tall, of one name in two folders and endings."""
    sizes = {"a.jpg": (90, 30), "a.png": (30, 90), "b.jpg": (64, 40), "sub/b.jpg": (50, 50)}
    for name, size in sizes.items():
        path = tmp_path / "album" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "album"


def predict(run_dir, given, output, **more):
    return predict_run(PredictOptions(str(given), str(output), run=str(run_dir), device="cpu", **more))


def rows_of(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("given", "key", "value", "word"),
    [
        ("album", "drawings", "album", "is the folder of the input"),
        ("album/b.jpg", "drawings", "album", "is the folder of the input"),
        ("album", "drawings", "link", "is the folder of the input"),
        ("album", "drawings", "album/sub", r"album/sub/b\.jpg is one of the images"),
        ("album/sub", "drawings", "album", r"album/sub/b\.jpg is one of the images"),
        ("album", "output", "album", "is the folder of the input"),
    ],
)
def test_no_image_of_the_input_is_overwritten(box_run, album, given, key, value, word):
    Path("link").symlink_to(album)
    shutil.copytree(album / "sub", album / "sub" / "sub")
    before = content(album.parent)
    with pytest.raises(ConfigError, match=f"{key}={value}: {word}"):
        predict(box_run, given, **{"output": "found.csv", key: value})
    assert content(album.parent) == before


def test_existing_labels_are_not_overwritten_and_other_files_stay(box_run, album):
    labels = album.parent / "labels"
    (labels / "sub").mkdir(parents=True)
    (labels / "sub" / "b.txt").write_text("1 0.5 0.5 0.2 0.2\n")
    with pytest.raises(ConfigError, match=r"output=labels: labels/sub/b\.txt exists already; name a new folder"):
        predict(box_run, "album", "labels", drawings="drawn")
    assert content(album.parent).keys() == {*(f"album/{name}" for name in content(album)), "labels/sub/b.txt"}
    (labels / "sub" / "b.txt").rename(labels / "other.txt")
    assert predict(box_run, "album", "labels") == []
    assert (labels / "other.txt").read_text() == "1 0.5 0.5 0.2 0.2\n"
    assert set(content(labels)) == {"other.txt", "a.jpg.txt", "a.png.txt", "b.txt", "sub/b.txt"}


def test_earlier_outputs_are_replaced_and_drawings_of_two_images_of_one_name_are_two(class_run, box_run, album):
    for _ in range(2):
        predict(class_run, "album", "classes.csv")
        predict(box_run, "album", "found.json", drawings="drawn")
    assert set(content(Path("drawn"))) == {"a.jpg.jpg", "a.png.jpg", "b.jpg", "sub/b.jpg"}
    with Image.open("drawn/a.jpg.jpg") as wide, Image.open("drawn/a.png.jpg") as tall:
        assert (wide.size, tall.size) == ((90, 30), (30, 90))
    predict(box_run, "album/sub", "found.csv", drawings=".")  # the current folder holds no image of the input
    assert Path("b.jpg").is_file()


def test_boxes_are_inside_their_images_and_have_an_area(box_run, album):
    predict(box_run, "album", "found.csv", max_detections=10_000, **EVERY_BOX)
    rows = rows_of("found.csv")
    assert {row["path"] for row in rows} == {f"album/{name}" for name in content(album)}
    sizes = {row["path"]: read_image(row["path"]).size for row in rows}
    for row in rows:
        x1, y1, x2, y2 = (float(row[key]) for key in ("x1", "y1", "x2", "y2"))
        width, height = sizes[row["path"]]
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height


def test_tables_have_the_path_as_typed_and_coco_the_name_in_the_folder(class_run, box_run, album):
    names = ["a.jpg", "a.png", "b.jpg", "sub/b.jpg"]
    for run_dir in (class_run, box_run):
        more = EVERY_BOX | {"max_detections": 1} if run_dir is box_run else {}
        for given, folder in (("./album", "album"), (album, album)):
            predict(run_dir, given, "f.csv", **more)
            assert [row["path"] for row in rows_of("f.csv")] == [f"{folder}/{name}" for name in names]
    predict(box_run, "album", "f.json", **more)
    results = json.loads(Path("f.json").read_text())
    assert [(row["image_id"], row["file_name"]) for row in results] == list(enumerate(names, 1))


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"output": "there.csv"}, r"output=there\.csv: is a folder"),
        ({"output": "album/b.jpg/f.csv"}, r"output=album/b\.jpg/f\.csv: cannot write to \S+/album/b\.jpg"),
        ({"output": "plain"}, "output=plain: is a file"),
        ({"drawings": "plain"}, "drawings=plain: is a file"),
        ({"drawings": "album/b.jpg/drawn"}, r"drawings=album/b\.jpg/drawn: cannot write to \S+/album/b\.jpg"),
        ({"output": "f.v2"}, r"output=f\.v2: must end in"),
        pytest.param(
            {"output": "/proc/new/f.csv"},
            r"output=/proc/new/f\.csv: cannot write to /proc ",
            marks=pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to"),
        ),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(box_run, album, monkeypatch, more, word):
    monkeypatch.setattr(vpt.predict.open_tasks, "run_model", None)
    Path("there.csv").mkdir()
    Path("plain").write_text("")
    before = content(album.parent)
    with pytest.raises(ConfigError, match=word):
        predict(box_run, "album", **{"output": "f.csv", **more})
    assert content(album.parent) == before


def test_endings_may_be_in_capitals(class_run, box_run, album):
    predict(class_run, "album", "C.CSV")
    assert Path("C.CSV").read_text().startswith("path,class_1,")
    predict(box_run, "album", "new/B.JSON", **EVERY_BOX)
    assert json.loads(Path("new/B.JSON").read_text())[0]["file_name"] == "a.jpg"


@pytest.mark.parametrize(
    ("output", "message"),
    [("m.csv", r"output=m\.csv: must end in \.json"), ("there.json", r"output=there\.json: is a folder")],
)
def test_evaluate_refuses_an_output_before_the_work(class_run, tmp_path, monkeypatch, output, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vpt.engine.trainer, "evaluate", None)
    Path("there.json").mkdir()
    with pytest.raises(ConfigError, match=message):
        evaluate_run(EvaluateOptions(str(class_run), output=output, device="cpu"))


def test_ctrl_c_in_evaluate_is_one_line(class_run, tmp_path, monkeypatch, capsys):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(vpt.engine.trainer, "evaluate", stopped)
    output = tmp_path / "m.json"
    assert exit_code_of(evaluate_command, monkeypatch, f"run={class_run}", f"output={output}") == INTERRUPTED
    assert capsys.readouterr().err == "error: interrupted before the metrics were computed; nothing was written\n"
    assert not output.exists()


@pytest.mark.parametrize("run", ["class_run", "box_run"])
def test_predict_computes_in_the_precision_of_the_run(request, album, run):
    run_dir, copy, is_box = request.getfixturevalue(run), album.parent / "bf16", run == "box_run"
    shutil.copytree(run_dir, copy)
    text = (copy / "config.yaml").read_text()
    assert "precision: auto" in text
    (copy / "config.yaml").write_text(text.replace("precision: auto", "precision: bf16"))
    trained = build.load_run(copy, device="cpu")
    if is_box:
        trained.model.select(Selection(**EVERY_BOX, max_detections=1))
    image = EvalTransform(trained.preprocessing)(read_image(album / "b.jpg"))[None]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        (output,) = trained.model.predict(image, [letterboxed_size((40, 64), trained.preprocessing)])
    expected = (output["scores"] if is_box else output.float().softmax(dim=0)).max()
    scores = []
    for folder in (copy, run_dir):
        predict(folder, "album/b.jpg", "f.json", **(EVERY_BOX if is_box else {}))
        (row, *_) = json.loads(Path("f.json").read_text())
        scores.append(row["score"] if is_box else row["predictions"][0]["probability"])
    assert scores[0] == pytest.approx(float(expected), abs=1e-7)
    assert scores[0] != pytest.approx(scores[1], abs=1e-6)


@pytest.fixture
def labels_of(box_run, tmp_path):
    """The labels that `classes=TEXT` stands for, where the classes are called as given."""

    def labels(names, text):
        (metadata,) = open_run(box_run, checkpoint=None, device="cpu").metadata.values()
        options = asdict(PredictOptions("a", str(tmp_path / "f.csv"), classes=text))
        writer = BoxWriter({"a": replace(metadata, classes=list(names))}, "run=a", options, tmp_path, [])
        return writer.selection["a"].labels

    return labels


@pytest.mark.parametrize(
    ("text", "labels"),
    [("blue box", (1,)), ('"Größe, x"', (0,)), ('blue box , "Größe, x" ,', (0, 1)), ("blue box,blue box", (1,))],
)
def test_classes_are_named_as_in_csv(labels_of, text, labels):
    assert labels_of(("Größe, x", "blue box"), text) == labels


@pytest.mark.parametrize(
    ("names", "text", "words"),
    [
        (("red box", "blue box"), "", "classes=: names no class; valid: red box, blue box$"),
        (("red box", "blue box"), " ,", "names no class"),
        (("red box", "blue box"), "red bix,blue box", "classes=red bix,blue box: no class red bix; .*red box"),
        (("red box", "blue box"), "unicorn", "no class unicorn; valid: red box, blue box$"),
        (("Größe, x", "blue box"), "blue box, Größe, x", "no class Größe.* classes='\"Größe, x\"'"),
    ],
)
def test_unknown_classes_are_refused_with_what_to_type(labels_of, names, text, words):
    with pytest.raises(ConfigError, match=words):
        labels_of(names, text)


@pytest.mark.parametrize(
    ("word", "message"), [("min_score=1", r"at most 0\.999"), ("max_overlap=0", "above 0 and at most 1")]
)
def test_numbers_that_no_selection_takes_are_refused_as_options(word, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(PredictOptions, ["run=a", "input=b", "output=c.csv", word], USAGE)


def rename(content):
    content["categories"][1]["name"] = "green box"


def add(content):
    content["categories"].append({"id": 90, "name": "green box"})


def renumber(content):
    content["categories"][1]["id"] = 18
    for annotation in content["annotations"]:
        annotation["category_id"] += annotation["category_id"] == 17


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename, r"root=.*: classes\[1\] is green box in the data and blue box in the task .*: red box, blue box"),
        (add, r"root=.*: classes\[2\] is green box in the data and missing"),
        (renumber, r"root=.*: category_ids\[1\] is 18 in the data and 17 in the task file; .*: 3, 17"),
    ],
)
def test_evaluate_names_the_first_class_that_differs(box_run, boxes, tmp_path, change, words):
    root = shutil.copytree(boxes, tmp_path / "boxes")
    for path in root.rglob("*.json"):
        edit_json(path, change)
    with pytest.raises(ConfigError, match=words):
        evaluate_run(EvaluateOptions(str(box_run), root=str(root), device="cpu"))


def test_evaluate_takes_class_names_in_another_unicode_form(class_run, photos, tmp_path):
    run_dir, root = shutil.copytree(class_run, tmp_path / "run"), shutil.copytree(photos, tmp_path / "photos")
    for folder in [*root.glob("*/rose")]:
        folder.rename(folder.with_name("ros\u00e9"))
    trained = build.load_run(run_dir, device="cpu")
    names, preprocessing = ["blue sky", "grass", "rose\u0301"], trained.metadata.preprocessing  # as of version 0.1
    vpt.save_task(trained.model, run_dir / "task.safetensors", classes=names, preprocessing=preprocessing)
    assert evaluate_run(EvaluateOptions(str(run_dir), root=str(root), device="cpu"))


@pytest.mark.parametrize(("given", "expected"), [({}, 4), ({"batch_size": 3}, 3)])
def test_evaluate_has_the_batch_size_of_the_run_by_default(box_run, monkeypatch, given, expected):
    real, sizes = vpt.engine.trainer.evaluate, []

    def spy(model, loader, *args, **kwargs):
        sizes.extend(len(images) for images, _ in loader)
        return real(model, loader, *args, **kwargs)

    monkeypatch.setattr(vpt.engine.trainer, "evaluate", spy)
    evaluate_run(EvaluateOptions(str(box_run), device="cpu", **given))
    assert sizes == [expected, 5 - expected]
