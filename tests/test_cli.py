"""The commands as they are typed: exit codes, one line of error, nothing heavy loaded before it is needed."""

import importlib
import io
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT, call, exit_code_of


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("vpt.train", ["prompt.num_tokns=3"], "error: unknown key prompt.num_tokns; did you mean prompt.num_tokens?\n"),
        ("vpt.train", ["train.epochs=0"], "error: train.epochs=0 is out of range: it must be at least 1\n"),
        ("vpt.evaluate", ["rn=a"], "error: rn=a: not an option of the form key=value; did you mean run?\n"),
        ("vpt.predict", ["run=a"], "error: input is needed: type input=...\n"),
        ("vpt.train", ["dataset=folder", "dataset.root=nowhere"], "error: dataset.root=nowhere is no folder; expected"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(tmp_path, module, arguments, message):
    done = call(*arguments, cwd=tmp_path, module=module)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert (done.stderr.count("\n"), done.stdout) == (1, "")
    assert list(tmp_path.iterdir()) == []


COMMANDS = "benchmark compare doctor evaluate explain export predict prune serve tasks train"


@pytest.mark.parametrize("name", COMMANDS.split())
def test_every_command_escapes_what_the_console_cannot_show(monkeypatch, name):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert exit_code_of(importlib.import_module(f"vpt.{name}.__main__"), monkeypatch, "犬=1") == 2
    for stream in (sys.stdout, sys.stderr):
        stream.write("犬")
        stream.flush()
        assert stream.buffer.getvalue().endswith(b"\\u72ac")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("train", ["backbone: ", "num_tokens: 20", "cache_gb: 4.0"]),
        ("evaluate", ["split=", "confusion="]),
        ("predict", ["top_k=5"]),
        ("compare", ["seeds=3", "prompt_bilinear"]),
        ("doctor", ["json=FILE.json", "dataset.root"]),
        ("explain", ["max_images=8"]),
        ("serve", ["uploads=false"]),
        ("export", ["shared=false", "onnx, torch_export"]),
        ("tasks", ["verify FILE|DIR", "dtype="]),
        ("prune", ["keep=8,5,2"]),
        ("benchmark", ["num_tokens=1,10,50,100,200", "last_cached"]),
    ],
)
def test_help_lists_keys_and_loads_nothing_heavy(module, words):
    code = "import atexit, runpy, sys; sys.argv = ['x', '--help']; "
    code += "atexit.register(lambda: print(sorted({'torch', 'timm', 'albumentations', 'PIL'} & set(sys.modules)))); "
    code += f"runpy.run_module('vpt.{module}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"python -m vpt.{module}: ")
    assert done.stdout.endswith("[]\n")
    assert all(word in done.stdout for word in words)


@pytest.mark.slow
def test_one_job_is_shown_by_hydra_and_a_full_traceback_by_request(tmp_path, monkeypatch):
    done = call("--cfg", "job", "prompt=deep", "dataset=folder", "dataset.root=${oc.env:HOME}", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "variant: deep" in done.stdout
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    done = call("dataset=folder", "dataset.root=nowhere", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_train_evaluate_and_predict_run_from_another_folder(tmp_path, photos):
    small = ["train.epochs=1", "train.batch_size=8", "num_workers=0", "prompt.num_tokens=2"]
    trained = call("dataset=folder", f"dataset.root={photos}", "run.name=colours", *small, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "task file" in trained.stdout
    assert call("run=runs/colours", cwd=tmp_path, module="vpt.evaluate").returncode == 0
    predict = ["run=runs/colours", f"input={photos}/test", "output=preds.csv"]
    assert call(*predict, cwd=tmp_path, module="vpt.predict").returncode == 0
    assert (tmp_path / "preds.csv").read_text().count("\n") == 13


@pytest.mark.slow
def test_a_failed_run_of_a_sweep_is_told_and_does_not_stop_the_others(tmp_path, photos):
    arguments = ["-m", "dataset=folder", f"dataset.root={photos}", "mode=dry", "run.name=sweep", "num_workers=0"]
    done = call(*arguments, "prompt.blocks=last:9,all", cwd=tmp_path)
    assert done.returncode == 2
    assert "prompt.blocks=last:9: " in done.stderr
    (left,) = (tmp_path / "runs").iterdir()
    # of a sweep each run has a name of its own
    assert re.fullmatch(rf"sweep_{photos.name}_vit_nano_bilinear_blocks-all_seed0_[0-9a-f]{{8}}_dry", left.name)


@pytest.mark.slow
def test_an_installed_wheel_finds_its_configs_pictures_and_weights_from_the_root_folder(tmp_path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(wheels), str(ROOT)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = wheels.glob("vpt-*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True)
    shipped = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    assert {path.relative_to(site / "vpt/conf") for path in (site / "vpt/conf").rglob("*.yaml")} == shipped
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run_at_root(command):
        return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)

    arguments = ["+experiment=quickstart", "mode=dry", f"run.root={tmp_path / 'runs'}", "num_workers=0"]
    for command in ([sys.executable, "-m", "vpt.train"], [str(site / "bin" / "vpt-train")]):
        done = run_at_root([*command, *arguments])
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "runs/quickstart_dry/task.safetensors").is_file()
        shutil.rmtree(tmp_path / "runs")
    origin = run_at_root([sys.executable, "-c", "import vpt; print(vpt.__file__)"])
    assert origin.stdout.startswith(str(site))
