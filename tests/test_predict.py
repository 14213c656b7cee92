"""`python -m vpt.predict` with task files: one backbone, several tasks, and resuming after a stop."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pyarrow import parquet

import vpt
import vpt.predict.__main__
import vpt.predict.inputs
import vpt.predict.open_tasks
import vpt.task_types.box_writer
from tests.helpers import build_model, make_album
from vpt.config.command_line import INTERRUPTED
from vpt.config.errors import ConfigError
from vpt.data.images import read_image
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.models.task_file import read_task
from vpt.models.vit import load_vit, preprocessing_of
from vpt.predict.__main__ import PredictOptions, predict_run

NANO = "vit_nano_patch8_64"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files on the embedded backbone: random prompts and heads."""
    folder = tmp_path_factory.mktemp("tasks")
    vit = load_vit(NANO)
    other = {**preprocessing_of(vit), "crop_pct": 1.0, "crop_mode": "squash"}
    torch.manual_seed(0)

    def save(name, **options):
        num_classes = options.get("num_classes")
        more = {
            "preprocessing": options.pop("preprocessing", None),
            "classes": [f"{name} {i}" for i in range(num_classes)],
        }
        model = build_model(vit, **options)
        for parameter in vpt.tuned_parameters(model).values():
            torch.nn.init.normal_(parameter, std=0.2)
        vpt.save_task(model, folder / f"{name}.safetensors", **more)

    save("deep", num_classes=7, prompt="deep", num_tokens=3)
    save("late", num_classes=3, prompt="deep", num_tokens=5, blocks="last:2")
    save("other", num_classes=4, prompt="shallow", num_tokens=2, preprocessing=other)
    for name, num_classes in (("boxes", 2), ("trees", 3)):
        save(name, num_classes=num_classes, task="detection", prompt="deep", num_tokens=2, channels=16, num_convs=1)
    return folder


@pytest.fixture
def album(tmp_path, monkeypatch):
    """In the current folder."""
    monkeypatch.chdir(tmp_path)
    return make_album(11)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images that are decoded."""
    names = []

    def spy(path):
        names.append(path.name)
        return read_image(path)

    monkeypatch.setattr(vpt.predict.inputs, "read_image", spy)
    return names


def files(tasks, *names):
    return ",".join(str(tasks / f"{name}.safetensors") for name in names)


def predict(task, output, given="album", **more):
    options = {"device": "cpu", "batch_size": 3, **more}
    return predict_run(PredictOptions(str(given), str(output), task=task, **options))


def rows_of(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def command(monkeypatch, *arguments):
    """The exit code of the command, called in this process."""
    monkeypatch.setattr(sys, "argv", ["vpt", *map(str, arguments), "device=cpu"])
    try:
        vpt.predict.__main__.main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def stop_in_batch(monkeypatch, number):
    """Press Ctrl-C in the batch of this number, counted from 1; return a function that restores the model."""
    real, calls = vpt.predict.open_tasks.run_model, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(vpt.predict.open_tasks, "run_model", stopped)
    return lambda: monkeypatch.setattr(vpt.predict.open_tasks, "run_model", real)


@pytest.mark.parametrize("name", ["deep", "other"])
def test_one_task_file_has_the_predictions_of_its_model(tasks, album, name):
    assert predict(files(tasks, name), "f.json", top_k=2) == []
    path = tasks / f"{name}.safetensors"
    model, metadata = vpt.load_task(path, NANO), read_task(path)
    transform = EvalTransform(Preprocessing.from_dict(metadata.preprocessing))
    found = json.loads(Path("f.json").read_text())
    assert [row["path"] for row in found] == sorted(map(str, album.rglob("*.png")))
    for row in found:
        with torch.no_grad():
            top = model(transform(read_image(row["path"]))[None])[0].softmax(dim=0).topk(2)
        assert [entry["class"] for entry in row["predictions"]] == [metadata.classes[i] for i in top.indices]
        assert [entry["probability"] for entry in row["predictions"]] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_several_tasks_of_one_backbone_equal_as_many_calls(tasks, album, monkeypatch):
    names = ("deep", "other", "late")  # two that share their images, one that wants others
    loads, real = [], vpt.predict.open_tasks.build.open_bank
    monkeypatch.setattr(vpt.predict.open_tasks.build, "open_bank", lambda *a, **k: loads.append(a) or real(*a, **k))
    predict(files(tasks, *names), "all.json")
    assert len(loads) == 1
    together = json.loads(Path("all.json").read_text())
    assert [row["task"] for row in together] == list(names) * 11
    for name in names:
        predict(files(tasks, name), "one.json")
        alone = json.loads(Path("one.json").read_text())
        of_task = [row for row in together if row["task"] == name]
        assert [row["path"] for row in of_task] == [row["path"] for row in alone]
        for one, two in zip(of_task, alone, strict=True):
            assert [entry["class"] for entry in one["predictions"]] == [entry["class"] for entry in two["predictions"]]
            values = [[entry["probability"] for entry in row["predictions"]] for row in (one, two)]
            assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_several_detection_tasks_equal_as_many_calls(tasks, album):
    chosen = {"min_score": 0.0, "max_overlap": 1.0, "max_detections": 3}
    predict(files(tasks, "boxes", "trees"), "all.csv", **chosen)
    together = rows_of("all.csv")
    assert list(together[0]) == ["path", "task", "class", "score", "x1", "y1", "x2", "y2"]
    for name in ("boxes", "trees"):
        predict(files(tasks, name), "one.csv", **chosen)
        of_task = [row for row in together if row["task"] == name]
        alone = rows_of("one.csv")
        assert len(of_task) == len(alone) == 33
        for one, two in zip(of_task, alone, strict=True):
            assert (one["path"], one["class"]) == (two["path"], two["class"])
            numbers = [[float(row[key]) for key in ("score", "x1", "y1", "x2", "y2")] for row in (one, two)]
            assert numbers[0] == pytest.approx(numbers[1], abs=2e-3)


@pytest.mark.parametrize("names", [("deep",), ("deep", "late"), ("boxes",), ("boxes", "trees")], ids=" ".join)
def test_parquet_has_the_content_of_csv(tasks, album, names):
    more = {"min_score": 0.0, "max_detections": 2} if "boxes" in names else {}
    for output in ("f.csv", "f.parquet"):
        predict(files(tasks, *names), output, **more)
    table = parquet.read_table("f.parquet")
    assert table.schema.names == list(rows_of("f.csv")[0])
    digits = "{}" if "boxes" in names else "{:.6f}"
    as_text = [
        {key: digits.format(cell) if isinstance(cell, float) else cell or "" for key, cell in row.items()}
        for row in table.to_pylist()
    ]
    assert as_text == rows_of("f.csv")
    assert {str(table.schema.field(name).type) for name in table.schema.names if name in ("x1", "score")} <= {"double"}


def test_a_pattern_selects_images_and_names_start_from_its_folder(tasks, album):
    predict(files(tasks, "late"), "f.csv", given="album/**/*[13579].png")
    assert [row["path"] for row in rows_of("f.csv")] == [f"album/sub/{number:02d}.png" for number in (1, 3, 5, 7, 9)]
    predict(files(tasks, "boxes"), "f.json", given="album/su?", min_score=0.0, max_detections=1)
    assert [row["file_name"] for row in json.loads(Path("f.json").read_text())][:2] == ["sub/01.png", "sub/03.png"]


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (("deep", "boxes"), {}, r"task=.*: deep is a classification task and boxes a detection task"),
        (("boxes", "trees"), {"output": "f.json"}, r"output=f\.json: is for one task; .* \.csv or \.parquet"),
        (("boxes", "trees"), {"output": "texts"}, r"output=texts: is for one task"),
        (("boxes", "trees"), {"drawings": "drawn"}, r"drawings=drawn: is for one task"),
        (("boxes", "trees"), {"classes": "trees 1"}, r"classes=trees 1: is for one task; task=\S+ names several"),
        (("deep", "late"), {"min_score": 0.5}, "min_score: is not for a classification task"),
        (("gone",), {}, r"task=\S+/gone\.safetensors: no such file"),
        (("deep", "deep"), {}, r"are both named deep; copy one of them to a file of another name"),
        (("deep",), {"given": "album/bad\udcff.png"}, "is not UTF-8; rename that image"),
    ],
)
def test_tasks_that_do_not_go_together_are_refused_before_the_work(tasks, album, monkeypatch, names, more, message):
    monkeypatch.setattr(vpt.predict.open_tasks, "run_model", None)
    if "given" in more:
        shutil.copy("album/00.png", more["given"])
    with pytest.raises(ConfigError, match=message):
        predict(files(tasks, *names), **{"output": "f.csv", **more})
    assert [path.name for path in Path().iterdir()] == ["album"]


def test_the_tasks_of_two_runs_are_named_as_the_runs(tasks, album):
    for name in ("deep", "late"):
        Path("runs", name).mkdir(parents=True)
        shutil.copy(tasks / f"{name}.safetensors", Path("runs", name, "task.safetensors"))
    predict("runs/deep/task.safetensors,runs/late/task.safetensors", "found.csv")
    assert {row["task"] for row in rows_of("found.csv")} == {"deep", "late"}


def test_a_task_whose_numbers_are_none_is_refused_and_nothing_is_written(tasks, album, tmp_path):
    model = vpt.load_task(tasks / "deep.safetensors", NANO)
    torch.nn.init.constant_(model.head.bias, float("nan"))
    path = vpt.save_task(model, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="task none: its logits are not finite numbers"):
        predict(str(path), "found.csv")
    assert not Path("found.csv").exists()


def test_a_task_is_a_file_or_a_run_and_one_of_them_is_needed(tasks, album):
    with pytest.raises(ConfigError, match=r"task=a and run=b: name task files or a run, not both"):
        predict_run(PredictOptions("album", "f.csv", task="a", run="b"))
    with pytest.raises(ConfigError, match="task is needed: type task=FILE, or run=FOLDER"):
        predict_run(PredictOptions("album", "f.csv"))
    with pytest.raises(
        ConfigError, match=r"task=album: is a folder; name a task file in it, or type run=album if it is"
    ):
        predict("album", "f.csv")
    with pytest.raises(ConfigError, match="task= ,: names no task file"):
        predict(" ,", "f.csv")
    Path("text.safetensors").write_text("no task")
    with pytest.raises(ValueError, match=r"text\.safetensors: not a readable safetensors file"):
        predict("text.safetensors", "f.csv")


def test_a_task_of_another_backbone_and_wrong_weights_are_refused(tasks, album):
    torch.manual_seed(1)
    vit = load_vit(NANO, pretrained=False)
    vpt.save_task(vpt.create_model(vit, num_classes=2), "elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"elsewhere\.safetensors: made for the backbone .* with other weights"):
        predict(f"{files(tasks, 'deep')},elsewhere.safetensors", "f.csv")
    with pytest.raises((ValueError, FileNotFoundError), match=r"nowhere\.pth"):
        predict(files(tasks, "deep"), "f.csv", checkpoint="nowhere.pth")


def test_weights_of_the_backbone_may_come_from_a_file(tasks, album):
    from safetensors.torch import save_file

    torch.manual_seed(1)
    vit = load_vit(NANO, pretrained=False)
    save_file(vit.state_dict(), "weights.safetensors")
    vpt.save_task(vpt.create_model(vit, num_classes=2), "elsewhere.safetensors")
    assert predict("elsewhere.safetensors", "f.csv", checkpoint="weights.safetensors") == []
    assert len(rows_of("f.csv")) == 11


def test_a_file_with_a_comma_in_its_name_is_one_file(tasks, album):
    shutil.copy(tasks / "deep.safetensors", "big, small.safetensors")
    predict("big, small.safetensors", "f.csv")
    assert list(rows_of("f.csv")[0])[:2] == ["path", "class_1"]


def test_predict_computes_in_bf16_where_tasks_are_on_a_gpu_and_results_are_near(tasks, album, monkeypatch):
    predict(files(tasks, "deep", "late"), "exact.json")
    opened = vpt.predict.open_tasks.open_task_files

    def rough(*args, **kwargs):
        return replace(opened(*args, **kwargs), precision="bf16")

    monkeypatch.setattr(vpt.predict.open_tasks, "open_task_files", rough)
    predict(files(tasks, "deep", "late"), "rough.json")
    pairs = zip(*(json.loads(Path(name).read_text()) for name in ("exact.json", "rough.json")), strict=True)
    for exact, near in pairs:
        by_class = {entry["class"]: entry["probability"] for entry in near["predictions"]}
        for entry in exact["predictions"]:
            assert by_class.get(entry["class"], entry["probability"]) == pytest.approx(entry["probability"], abs=0.1)


OUTPUTS = {
    "f.csv": ("deep", "late"),
    "f.json": ("deep",),
    "f.parquet": ("deep", "other"),
    "b.csv": ("boxes", "trees"),
    "b.json": ("boxes",),
    "b.parquet": ("boxes",),
    "texts": ("boxes",),
}


def content(path):
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path): file.read_bytes() for file in inside} if path.is_dir() else path.read_bytes()


@pytest.mark.parametrize("output", OUTPUTS)
def test_after_ctrl_c_the_same_command_resumes_and_the_output_is_the_same_to_the_byte(
    tasks, album, monkeypatch, capsys, decoded, output
):
    Path("album/05.png").write_text("<html>")
    names = OUTPUTS[output]
    more = {"min_score": "0.0"} if "boxes" in names else {"top_k": "3"}
    words = [f"task={files(tasks, *names)}", "input=album", "batch_size=2", *(f"{key}={more[key]}" for key in more)]
    Path("whole").mkdir()
    assert command(monkeypatch, *words, f"output=whole/{output}") == 1
    decoded.clear()

    restore = stop_in_batch(monkeypatch, 4)
    assert command(monkeypatch, *words, f"output={output}") == INTERRUPTED
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: interrupted; type the same command again to resume; ")
    assert error.endswith(f" {output}.partial")
    assert not Path(output).exists()
    restore()
    decoded.clear()

    assert command(monkeypatch, *words, f"output={output}") == 1
    out, err = capsys.readouterr()
    assert f"6 of 12 images were already done ({output}.partial)" in out
    assert "11 images predicted" in out
    assert err.count("skipped: album/05.png: not an image") == 1
    assert len(decoded) == 6
    assert content(Path(output)) == content(Path("whole", output))
    assert not Path(f"{output}.partial").exists()


def interrupted(tasks, monkeypatch, batch, names=("boxes",), output="f.csv", **more):
    """Stop in a batch; return the number of images whose work is not done."""
    restore = stop_in_batch(monkeypatch, batch)
    with pytest.raises(KeyboardInterrupt):
        predict(files(tasks, *names), output, **more)
    restore()


def test_what_has_changed_or_come_since_is_predicted_anew_with_its_batch(tasks, album, monkeypatch, decoded):
    interrupted(tasks, monkeypatch, 4, ("deep",))  # batches 00 02 04, 06 08 10, sub/01 03 05 are done
    shutil.copy("album/10.png", "album/02.png")
    Path("album/sub/05.png").unlink()
    shutil.copy("album/10.png", "album/sub/11.png")
    decoded.clear()
    predict(files(tasks, "deep"), "f.csv")
    assert sorted(decoded) == ["00.png", "01.png", "02.png", "03.png", "04.png", "07.png", "09.png", "11.png"]
    predict(files(tasks, "deep"), "whole.csv")
    assert content(Path("f.csv")) == content(Path("whole.csv"))


def test_batch_size_and_where_the_weights_are_may_change_on_the_way(tasks, album, monkeypatch, decoded):
    interrupted(tasks, monkeypatch, 3, ("deep",), batch_size=4)
    decoded.clear()
    predict(files(tasks, "deep"), "f.csv", batch_size=2)
    assert sorted(decoded) == ["05.png", "07.png", "09.png"]
    assert len(rows_of("f.csv")) == 11


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (("deep",), {"top_k": 2}, r"f\.csv\.partial: .* \(top_k was None, now 2\); .*, delete the file, or"),
        (("deep",), {"given": "album/sub"}, r"\(input was \S+album, now \S+album/sub\)"),
        (("late",), {}, r"\(task late was None, now [0-9a-f]{64}\)"),
        (("deep", "late"), {}, r"\(task late was None"),
    ],
)
def test_another_command_on_the_output_of_one_that_was_stopped_is_refused(
    tasks, album, monkeypatch, names, more, message
):
    interrupted(tasks, monkeypatch, 2, ("deep",))
    before = content(Path())
    with pytest.raises(ValueError, match=message):
        predict(files(tasks, *names), "f.csv", **more)
    assert content(Path()) == before
    predict(files(tasks, *names), "other.csv", **more)


def test_a_task_file_that_was_trained_anew_is_another_command(tasks, album, monkeypatch):
    shutil.copy(tasks / "deep.safetensors", "a.safetensors")
    restore = stop_in_batch(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        predict("a.safetensors", "f.csv")
    restore()
    shutil.copy(tasks / "late.safetensors", "a.safetensors")
    with pytest.raises(ValueError, match=r"\(task a was [0-9a-f]{64}, now [0-9a-f]{64}\)"):
        predict("a.safetensors", "f.csv")


def test_ctrl_c_before_the_first_batch_is_done_leaves_nothing(tasks, album, monkeypatch, capsys):
    stop_in_batch(monkeypatch, 1)
    assert command(monkeypatch, f"task={files(tasks, 'deep')}", "input=album", "output=f.csv") == INTERRUPTED
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted before the first batch was done"
    assert [path.name for path in Path().iterdir()] == ["album"]


def test_drawings_are_whole_after_a_stop_and_one_that_is_gone_is_drawn_again(tasks, album, monkeypatch, decoded):
    more = {"min_score": 0.0, "max_detections": 3}
    predict(files(tasks, "boxes"), "whole.csv", drawings="whole", **more)
    interrupted(tasks, monkeypatch, 3, drawings="drawn", **more)
    assert len(content(Path("drawn"))) == 6
    Path("drawn/02.jpg").unlink()
    decoded.clear()
    predict(files(tasks, "boxes"), "f.csv", drawings="drawn", **more)
    assert len(decoded) == 8  # 00 02 04 again, and the last two batches
    assert content(Path("drawn")) == content(Path("whole"))
    assert content(Path("f.csv")) == content(Path("whole.csv"))


def test_text_files_that_came_meanwhile_are_not_overwritten(tasks, album, monkeypatch):
    interrupted(tasks, monkeypatch, 3, output="texts", min_score=0.0)
    Path("texts/sub").mkdir(parents=True)
    Path("texts/00.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    for text in (Path("texts/00.txt"), Path("texts/sub/09.txt")):  # of an image that is done, and of one that is not
        text.write_text("0 0.5 0.5 0.1 0.1\n")
        with pytest.raises(ConfigError, match=rf"output=texts: {text} exists already; name a new folder"):
            predict(files(tasks, "boxes"), "texts", min_score=0.0)
        assert text.read_text() == "0 0.5 0.5 0.1 0.1\n"
        text.unlink()
    predict(files(tasks, "boxes"), "texts", min_score=0.0)
    assert len(content(Path("texts"))) == 11


@pytest.mark.parametrize("output", ["texts", "f.csv"])
def test_a_stop_while_the_output_is_written_loses_nothing(tasks, album, monkeypatch, decoded, output):
    more = {"min_score": 0.0}
    Path("whole").mkdir()
    predict(files(tasks, "boxes"), f"whole/{output}", **more)
    real, written = vpt.task_types.box_writer.write_bytes, []

    def stopped(path, data):
        written.append(path)
        if len(written) == (5 if output == "texts" else 1):
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(vpt.task_types.box_writer, "write_bytes", stopped)
    with pytest.raises(KeyboardInterrupt):
        predict(files(tasks, "boxes"), output, **more)
    monkeypatch.setattr(vpt.task_types.box_writer, "write_bytes", real)
    decoded.clear()
    predict(files(tasks, "boxes"), output, **more)
    assert decoded == []
    assert content(Path(output)) == content(Path("whole", output))
    assert {path.name for path in Path().iterdir()} == {"album", "whole", output}


def test_a_folder_of_broken_images_leaves_no_progress_file(tasks, album, monkeypatch, capsys):
    for path in album.rglob("*.png"):
        path.write_text("<html>")
    assert command(monkeypatch, f"task={files(tasks, 'deep')}", "input=album", "output=f.csv") == 1
    out, err = capsys.readouterr()
    assert "written" not in out
    assert err.count("skipped: ") == 11
    assert err.splitlines()[-1] == "error: input=album: none of its images can be read (11); nothing was written"
    assert [path.name for path in Path().iterdir()] == ["album"]


def test_images_are_decoded_one_batch_ahead(tasks, album, monkeypatch, decoded):
    ahead, real = [], vpt.predict.open_tasks.run_model

    def spy(opened, batch):
        ahead.append(len(decoded) - 3 * len(ahead))
        return real(opened, batch)

    monkeypatch.setattr(vpt.predict.open_tasks, "run_model", spy)
    predict(files(tasks, "deep"), "f.csv")
    assert len(ahead) == 4
    assert max(ahead) <= 6


KILL = """
import os, signal, sys
import vpt.predict.__main__, vpt.predict.open_tasks
real, calls = vpt.predict.open_tasks.run_model, []
def killed(*args):
    calls.append(args)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
vpt.predict.open_tasks.run_model = killed
vpt.predict.__main__.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("cut", [0, 40])
def test_after_sigkill_the_same_command_resumes_even_after_a_cut_line(tasks, album, cut):
    words = [f"task={files(tasks, 'deep', 'late')}", "input=album", "batch_size=3", "device=cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def call(*arguments):
        done = [sys.executable, *arguments]
        return subprocess.run(done, env=environment, capture_output=True, text=True, check=False)

    whole = call("-m", "vpt.predict", *words, "output=whole.csv")
    assert whole.returncode == 0, whole.stderr
    assert call("-c", KILL, *words, "output=f.csv").returncode == -signal.SIGKILL
    progress = Path("f.csv.partial")
    assert not Path("f.csv").exists()
    os.truncate(progress, progress.stat().st_size - cut)
    again = call("-m", "vpt.predict", *words, "output=f.csv")
    assert again.returncode == 0, again.stderr
    assert f"{3 if cut else 6} of 11 images were already done (f.csv.partial)" in again.stdout
    assert content(Path("f.csv")) == content(Path("whole.csv"))
    assert not progress.exists()
