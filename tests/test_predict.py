"""`python -m vpt.predict` with task files: one backbone, several tasks, and resuming after a stop."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow.csv
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

import vpt
import vpt.predict.__main__
import vpt.predict.inputs
import vpt.predict.open_tasks
import vpt.task_types.box_writer
from tests.helpers import NANO, ROOT, call, exit_code_of, make_album
from vpt.config.command_line import INTERRUPTED
from vpt.config.errors import ConfigError
from vpt.data.images import read_image
from vpt.data.transforms.images import EvalTransform
from vpt.data.transforms.preprocessing import Preprocessing
from vpt.models.task_file import read_task
from vpt.models.vit import load_vit
from vpt.predict.__main__ import PredictOptions, predict_run

command = partial(exit_code_of, vpt.predict.__main__)
EVERY_BOX = {"min_score": 0.0, "max_overlap": 1.0, "max_detections": 3}


@pytest.fixture
def album(tmp_path, monkeypatch):
    """In the current folder."""
    monkeypatch.chdir(tmp_path)
    return make_album(11)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images that are decoded."""
    names = []

    def spy(path, *how):
        names.append(path.name)
        return read_image(path, *how)

    monkeypatch.setattr(vpt.predict.inputs, "read_image", spy)
    return names


def files(tasks, *names):
    return ",".join(str(tasks / f"{name}.safetensors") for name in names)


def predict(task, output, given="album", **more):
    options = {"device": "cpu", "batch_size": 3, **more}
    return predict_run(PredictOptions(str(given), output, task=task, **options))


def rows_of(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def stop_in_batch(monkeypatch, number):
    """Press Ctrl-C in the batch of this number, counted from 1; return a function that restores the model."""
    real, numbers = vpt.predict.open_tasks.run_model, iter(range(1, 99))

    def stopped(*args):
        if next(numbers) == number:
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


# of the first three, two share their images and one wants others
@pytest.mark.parametrize(("names", "num_rows"), [(("deep", "other", "late"), 1), (("boxes", "trees"), 3)])
def test_several_tasks_of_one_backbone_equal_as_many_calls(tasks, album, monkeypatch, names, num_rows):
    more = EVERY_BOX if "boxes" in names else {}
    loads, real = [], vpt.predict.open_tasks.build.open_bank
    monkeypatch.setattr(vpt.predict.open_tasks.build, "open_bank", lambda *a, **k: loads.append(a) or real(*a, **k))
    predict(files(tasks, *names), "all.csv", **more)
    assert len(loads) == 1
    together = rows_of("all.csv")
    assert [row["task"] for row in together] == [name for name in names for _ in range(num_rows)] * 11
    for name in names:
        predict(files(tasks, name), "one.csv", **more)
        of_task = [row for row in together if row["task"] == name]
        for one, two in zip(of_task, rows_of("one.csv"), strict=True):
            for key, value in two.items():
                is_number = key.startswith(("probability", "score", "x", "y"))
                assert one[key] == value or (is_number and float(one[key]) == pytest.approx(float(value), abs=2e-3))


@pytest.mark.parametrize("names", [("deep",), ("deep", "late"), ("boxes",), ("boxes", "trees")], ids=" ".join)
def test_parquet_has_the_content_of_csv(tasks, album, names):
    more = EVERY_BOX if "boxes" in names else {}
    for output in ("f.csv", "f.parquet"):
        predict(files(tasks, *names), output, **more)
    options = pyarrow.csv.ConvertOptions(strings_can_be_null=True)
    as_csv, as_parquet = pyarrow.csv.read_csv("f.csv", convert_options=options), parquet.read_table("f.parquet")
    assert as_parquet.schema.equals(as_csv.schema)
    assert as_parquet.to_pylist() == [pytest.approx(row, abs=1e-6) for row in as_csv.to_pylist()]


@pytest.mark.parametrize("names", [("deep",), ("deep", "late"), ("boxes",)], ids=" ".join)
def test_without_output_the_predictions_for_one_image_are_printed(tasks, album, capsys, names):
    more = {"min_score": 0.0, "max_detections": 2} if "boxes" in names else {"top_k": 2}
    assert predict(files(tasks, *names), None, "album/00.png", **more) == []
    printed = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    predict(files(tasks, *names), "f.csv", "album/00.png", **more)
    for cells, name in zip(printed[:: 2 if "boxes" not in names else 99], names, strict=True):
        row = next(row for row in rows_of("f.csv") if row.get("task", name) == name)
        assert cells[-3 if "boxes" in names else -2] == row.get("class_1", row.get("class"))
    assert len(printed) == 2 * len(names)
    assert [path.name for path in Path().iterdir() if path.name != "f.csv"] == ["album"]


@pytest.mark.parametrize(
    ("given", "more", "word"),
    [
        ("album", {}, "output is needed for 11 images"),
        ("album/00.png", {"classes": "deep 1"}, "classes: is not for"),
        ("album/text.png", {}, "not an image"),
    ],
)
def test_without_output_what_cannot_be_printed_is_refused(tasks, album, given, more, word):
    if given == "album/text.png":
        Path(given).write_text("text")
    with pytest.raises(ConfigError, match=word):
        predict(files(tasks, "deep"), None, given, **more)


def test_a_pattern_selects_images_and_names_start_from_its_folder(tasks, album):
    predict(files(tasks, "late"), "f.csv", given="album/**/*[13579].png")
    assert [row["path"] for row in rows_of("f.csv")] == [f"album/sub/{number:02d}.png" for number in (1, 3, 5, 7, 9)]
    predict(files(tasks, "boxes"), "f.json", given="album/su?", min_score=0.0, max_detections=1)
    assert [row["file_name"] for row in json.loads(Path("f.json").read_text())][:2] == ["sub/01.png", "sub/03.png"]


@pytest.mark.parametrize(
    ("task", "more", "word"),
    [
        (("deep", "boxes"), {}, "deep is a classification task and boxes a detection"),
        (("boxes", "trees"), {"output": "f.json"}, r"output=f\.json: is for one task"),
        (("boxes", "trees"), {"output": "texts"}, "output=texts: is for one task"),
        (("boxes", "trees"), {"drawings": "drawn"}, "drawings=drawn: is for one task"),
        (("boxes", "trees"), {"classes": "trees 1"}, "classes=trees 1: is for one task"),
        (("deep", "late"), {"min_score": 0.5}, "min_score"),
        (("gone",), {}, r"gone\.safetensors: no such file"),
        (("deep", "deep"), {}, "both named deep"),
        (("deep",), {"given": "album/bad\udcff.png"}, "UTF-8"),
        ("a", {"run": "b"}, "not both"),
        (None, {}, "task is needed"),
        ("album", {}, "is a folder"),
        (" ,", {}, "names no task file"),
        ("album/00.png", {}, r"00\.png: not a readable safetensors file"),
    ],
)
def test_tasks_that_do_not_go_together_are_refused_before_the_work(tasks, album, monkeypatch, task, more, word):
    monkeypatch.setattr(vpt.predict.open_tasks, "run_model", None)
    if "given" in more:
        shutil.copy("album/00.png", more["given"])
    with pytest.raises(ValueError, match=word):
        predict(files(tasks, *task) if isinstance(task, tuple) else task, **{"output": "f.csv", **more})
    assert [path.name for path in Path().iterdir()] == ["album"]


def test_images_of_formats_that_cannot_be_read_are_counted_and_never_silently_left_out(tasks, album, capsys):
    for name in ("album/a.heic", "album/sub/b.HEIC", "album/c"):
        shutil.copy("album/00.png", name)
    assert predict(files(tasks, "deep"), "f.csv") == []
    assert "left out: 3 image files cannot be read: 2 .heic, 1 without an extension" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"1 \.heic; save them as"):
        predict(files(tasks, "deep"), "f.csv", given="album/*.heic*")
    for path in album.rglob("*.png"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"2 \.heic"):
        predict(files(tasks, "deep"), "f.csv")


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


def test_a_task_of_other_weights_is_refused_until_a_file_gives_them(tasks, album):
    torch.manual_seed(1)
    vit = load_vit(NANO, pretrained=False)
    vpt.save_task(vpt.create_model(vit, num_classes=2), "elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"elsewhere\.safetensors: made for .* other weights"):
        predict(f"{files(tasks, 'deep')},elsewhere.safetensors", "f.csv")
    with pytest.raises((ValueError, FileNotFoundError), match=r"nowhere\.pth"):
        predict(files(tasks, "deep"), "f.csv", checkpoint="nowhere.pth")
    save_file(vit.state_dict(), "weights.safetensors")
    assert predict("elsewhere.safetensors", "f.csv", checkpoint="weights.safetensors") == []
    assert len(rows_of("f.csv")) == 11


def test_a_file_with_a_comma_in_its_name_is_one_file(tasks, album):
    shutil.copy(tasks / "deep.safetensors", "big, small.safetensors")
    predict("big, small.safetensors", "f.csv")
    assert list(rows_of("f.csv")[0])[:2] == ["path", "class_1"]


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
    more = "min_score=0.0" if "boxes" in names else "top_k=3"
    words = [f"task={files(tasks, *names)}", "input=album", "batch_size=2", "device=cpu", more]
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


def interrupted(task, monkeypatch, batch, output="f.csv", **more):
    restore = stop_in_batch(monkeypatch, batch)
    with pytest.raises(KeyboardInterrupt):
        predict(task, output, **more)
    restore()


def test_what_has_changed_or_come_since_is_predicted_anew_with_its_batch(tasks, album, monkeypatch, decoded):
    interrupted(files(tasks, "deep"), monkeypatch, 4)  # batches 00 02 04, 06 08 10, sub/01 03 05 are done
    shutil.copy("album/10.png", "album/02.png")
    Path("album/sub/05.png").unlink()
    shutil.copy("album/10.png", "album/sub/11.png")
    decoded.clear()
    predict(files(tasks, "deep"), "f.csv")
    assert sorted(decoded) == ["00.png", "01.png", "02.png", "03.png", "04.png", "07.png", "09.png", "11.png"]
    predict(files(tasks, "deep"), "whole.csv")
    assert content(Path("f.csv")) == content(Path("whole.csv"))


def test_batch_size_and_where_the_weights_are_may_change_on_the_way(tasks, album, monkeypatch, decoded):
    interrupted(files(tasks, "deep"), monkeypatch, 3, batch_size=4)
    decoded.clear()
    predict(files(tasks, "deep"), "f.csv", batch_size=2)
    assert sorted(decoded) == ["05.png", "07.png", "09.png"]
    assert len(rows_of("f.csv")) == 11


@pytest.mark.parametrize(
    ("names", "more", "word"),
    [
        (("deep",), {"top_k": 2}, r"f\.csv\.partial: .* \(top_k was None, now 2\)"),
        (("deep",), {"given": "album/sub"}, r"\(input was \S+album, now \S+album/sub\)"),
        (("late",), {}, r"\(task late was None, now [0-9a-f]{64}\)"),
        (("deep", "late"), {}, r"\(task late was None"),
    ],
)
def test_another_command_on_the_output_of_one_that_was_stopped_is_refused(tasks, album, monkeypatch, names, more, word):
    interrupted(files(tasks, "deep"), monkeypatch, 2)
    before = content(Path())
    with pytest.raises(ValueError, match=word):
        predict(files(tasks, *names), "f.csv", **more)
    assert content(Path()) == before
    predict(files(tasks, *names), "other.csv", **more)


def test_a_task_file_that_was_trained_anew_is_another_command(tasks, album, monkeypatch):
    shutil.copy(tasks / "deep.safetensors", "a.safetensors")
    interrupted("a.safetensors", monkeypatch, 2)
    shutil.copy(tasks / "late.safetensors", "a.safetensors")
    with pytest.raises(ValueError, match=r"\(task a was [0-9a-f]{64}, now [0-9a-f]{64}\)"):
        predict("a.safetensors", "f.csv")


def test_ctrl_c_before_the_first_batch_is_done_leaves_nothing(tasks, album, monkeypatch, capsys):
    stop_in_batch(monkeypatch, 1)
    words = [f"task={files(tasks, 'deep')}", "input=album", "output=f.csv", "device=cpu"]
    assert command(monkeypatch, *words) == INTERRUPTED
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted before the first batch was done"
    assert [path.name for path in Path().iterdir()] == ["album"]


def test_drawings_are_whole_after_a_stop_and_one_that_is_gone_is_drawn_again(tasks, album, monkeypatch, decoded):
    more = {"min_score": 0.0, "max_detections": 3}
    predict(files(tasks, "boxes"), "whole.csv", drawings="whole", **more)
    interrupted(files(tasks, "boxes"), monkeypatch, 3, drawings="drawn", **more)
    assert len(content(Path("drawn"))) == 6
    Path("drawn/02.jpg").unlink()
    decoded.clear()
    predict(files(tasks, "boxes"), "f.csv", drawings="drawn", **more)
    assert len(decoded) == 8  # 00 02 04 again, and the last two batches
    assert content(Path("drawn")) == content(Path("whole"))
    assert content(Path("f.csv")) == content(Path("whole.csv"))


def test_text_files_that_came_meanwhile_are_not_overwritten(tasks, album, monkeypatch):
    interrupted(files(tasks, "boxes"), monkeypatch, 3, "texts", min_score=0.0)
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
    assert command(monkeypatch, f"task={files(tasks, 'deep')}", "input=album", "output=f.csv", "device=cpu") == 1
    out, err = capsys.readouterr()
    assert "written" not in out
    assert err.count("skipped: ") == 11
    assert err.splitlines()[-1] == "error: input=album: none of its images can be read (11); nothing was written"
    assert [path.name for path in Path().iterdir()] == ["album"]


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
    resume = partial(call, *words, cwd=".", module="vpt.predict")
    whole = resume("output=whole.csv")
    assert whole.returncode == 0, whole.stderr
    killed = [sys.executable, "-c", KILL, *words, "output=f.csv"]
    assert subprocess.run(killed, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == -signal.SIGKILL
    progress = Path("f.csv.partial")
    assert not Path("f.csv").exists()
    os.truncate(progress, progress.stat().st_size - cut)
    again = resume("output=f.csv")
    assert again.returncode == 0, again.stderr
    assert f"{3 if cut else 6} of 11 images were already done (f.csv.partial)" in again.stdout
    assert content(Path("f.csv")) == content(Path("whole.csv"))
    assert not progress.exists()
