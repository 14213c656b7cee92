"""The command: refusals before anything is loaded, and a real process that shuts down properly."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from fastapi.testclient import TestClient

import vpt
import vpt.serve.__main__
from tests.helpers import ROOT, call, make_tiny_vit, png_bytes
from vpt.config.command_line import parse_options
from vpt.config.errors import ConfigError
from vpt.serve.__main__ import USAGE, ServeOptions, serve
from vpt.serve.app import make_app
from vpt.serve.service import Settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two task files on the backbone of the package."""
    folder = tmp_path_factory.mktemp("tasks")
    for seed, name in enumerate(("colours", "shapes")):
        torch.manual_seed(seed)
        model = vpt.create_model("vit_nano_patch8_64", prompt="deep", num_tokens=2, num_classes=2, classes=["a", "b"])
        vpt.save_task(model, folder / f"{name}.safetensors")
    return folder


def options(*arguments):
    return parse_options(ServeOptions, [str(argument) for argument in arguments], USAGE)


def refused(*arguments):
    """The one line of a command that never gets to load a model."""
    with pytest.raises((ConfigError, ValueError)) as caught:
        serve(options(*arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_wrong_option_is_one_line(tmp_path):
    for arguments, message in [
        ([], "error: tasks is needed: type tasks=...\n"),
        (["tasks=a", "port=99999"], "error: port=99999 is out of range: it must be at least 0 and at most 65535\n"),
        (["tasks=nowhere"], "error: tasks=nowhere: no such file\n"),
    ]:
        done = call(*arguments, cwd=tmp_path, module="vpt.serve")
        assert (done.returncode, done.stderr, done.stdout) == (2, message, "")


def test_help_names_every_option_and_loads_nothing_heavy(tmp_path):
    done = call("--help", cwd=tmp_path, module="vpt.serve")
    assert done.returncode == 0
    assert all(f"{name}=" in done.stdout for name in ServeOptions.__dataclass_fields__)
    code = "import sys, vpt.serve; print(sorted({'torch', 'timm', 'fastapi', 'uvicorn'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout == "[]\n"


def test_tasks_must_be_task_files_with_distinct_names(folder, tmp_path):
    assert "contains no task file" in refused(f"tasks={tmp_path}")
    assert "must be true or false" in refused(f"tasks={folder}", "uploads=yes")
    file = folder / "colours.safetensors"
    assert "requires a folder" in refused(f"tasks={file}", "uploads=true")
    assert "are both named colours" in refused(f"tasks={file},{file}")
    assert "tasks=nowhere.safetensors: no such file" in refused(f"tasks={file},nowhere.safetensors")
    assert "tasks=,: names no task file" in refused("tasks=,")


def test_tasks_are_named_by_file_or_by_the_folder_of_a_run(folder, tmp_path):
    for name in ("pets", "flowers"):
        (tmp_path / name).mkdir()
        shutil.copy(folder / "colours.safetensors", tmp_path / name / "task.safetensors")
    for path in folder.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / ".hidden.safetensors").write_bytes(b"half")
    text = f"{tmp_path}/pets/task.safetensors,{tmp_path}/flowers/task.safetensors,{folder}/shapes.safetensors"
    paths, place = vpt.serve.__main__._find_tasks(options(f"tasks={text}"))
    assert (list(paths), place) == (["pets", "flowers", "shapes"], None)
    paths, place = vpt.serve.__main__._find_tasks(options(f"tasks={tmp_path}", "uploads=true"))
    assert (list(paths), place) == (["colours", "shapes"], tmp_path)


def test_a_port_in_use_is_noticed_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vpt.build", None)  # loading would fail
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port={port}: Address already in use; choose another" in refused(f"tasks={folder}", f"port={port}")
    assert "host=no.such.host.invalid" in refused(f"tasks={folder}", "host=no.such.host.invalid")


def test_a_missing_web_framework_is_named_with_the_command_to_install_it(folder, monkeypatch):
    monkeypatch.setattr(
        vpt.serve.__main__.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else name
    )
    assert refused(f"tasks={folder}") == f"uvicorn is not installed: run {vpt.serve.__main__.INSTALL}"


def test_the_tasks_of_a_folder_of_runs_are_named_by_their_runs(folder, tmp_path):
    wanted = {}
    for run in ("pets", "sweep/0", "sweep/1"):
        (tmp_path / run).mkdir(parents=True)
        path = shutil.copy(folder / "colours.safetensors", tmp_path / run / "task.safetensors")
        wanted[run.replace("/", "_")] = path
        (tmp_path / run / "best.safetensors").write_bytes(b"a checkpoint")
    assert vpt.serve.__main__._find_tasks(options(f"tasks={tmp_path}")) == (wanted, None)
    assert "contains no task file" in refused(f"tasks={tmp_path}", "uploads=true")


def test_a_port_accepts_no_connection_before_the_server_can_answer():
    with vpt.serve.__main__._listen("127.0.0.1", 0) as listener, pytest.raises(ConnectionRefusedError):
        socket.create_connection(listener.getsockname())


def opened(*arguments):
    given = options(*arguments)
    return vpt.serve.__main__._open_bank(given, vpt.serve.__main__._find_tasks(given)[0])


def test_a_damaged_named_file_is_refused(folder, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes((folder / "colours.safetensors").read_bytes()[:-1])
    assert "bad.safetensors: not a readable" in refused(f"tasks={bad}", "port=0")
    assert "bad.safetensors: not a readable" in refused(f"tasks={folder / 'shapes.safetensors'},{bad}", "port=0")


def test_unusable_files_of_a_folder_are_printed_and_skipped(folder, tmp_path, capsys):
    whole = (folder / "colours.safetensors").read_bytes()
    (tmp_path / "a_damaged.safetensors").write_bytes(whole[:-1])
    (tmp_path / "b_damaged.safetensors").write_bytes(b"text")
    vpt.save_task(vpt.create_model(make_tiny_vit(), num_classes=2), tmp_path / "other.safetensors")
    for name in ("colours", "shapes"):
        shutil.copy(folder / f"{name}.safetensors", tmp_path)
    bank = opened(f"tasks={tmp_path}")
    assert bank.names == ("colours", "shapes")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["skipped"] * 3
    for line, name in zip(lines, ("a_damaged", "b_damaged", "other"), strict=True):
        assert f"{name}.safetensors: " in line
    assert "made for the backbone vit_tiny" in lines[2]


def test_a_folder_without_usable_files_is_refused(folder, tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(b"text")
    assert refused(f"tasks={tmp_path}", "port=0") == f"tasks={tmp_path}: none of its task files can be used"
    shutil.copy(folder / "colours.safetensors", tmp_path)
    message = refused(f"tasks={tmp_path}", "port=0", "backbone=vit_nano_patch9_64")
    assert "backbone=vit_nano_patch9_64: not a timm model" in message
    assert "skipped" in capsys.readouterr().err


def test_uploads_may_start_from_an_empty_folder_with_a_backbone(folder, tmp_path):
    assert "use uploads=true and backbone=NAME" in refused(f"tasks={tmp_path}", "uploads=true")
    assert "contains no task file" in refused(f"tasks={tmp_path}", "backbone=vit_nano_patch8_64")
    words = (f"tasks={tmp_path}", "uploads=true", "backbone=vit_nano_patch8_64")
    settings = Settings(folder=vpt.serve.__main__._find_tasks(options(*words))[1], is_local=False)
    with TestClient(make_app(opened(*words), settings)) as client:
        assert client.get("/tasks").json() == []
        content = (folder / "colours.safetensors").read_bytes()
        assert client.put("/tasks/colours", content=content).status_code == 201
        answer = client.post("/predict?task=colours", content=png_bytes(), headers={"Content-Type": "image/png"})
        assert answer.status_code == 200
    assert opened(f"tasks={tmp_path}").names == ("colours",)


def test_the_greeting_warns_of_a_host_that_others_can_reach():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        (line,) = vpt.serve.__main__._greeting(options("tasks=a"), listener, ("x", "y"))
        assert line == f"2 tasks (x, y) at http://127.0.0.1:{port}; Ctrl-C ends"
        (line,) = vpt.serve.__main__._greeting(options("tasks=a"), listener, ())
        assert line == f"no task yet at http://127.0.0.1:{port}; Ctrl-C ends"
        _, warning = vpt.serve.__main__._greeting(options("tasks=a", "host=0.0.0.0"), listener, ("x",))
        assert warning == "host=0.0.0.0: everybody who can reach this machine can use it; there is no password"
        _, warning = vpt.serve.__main__._greeting(options("tasks=a", "host=::", "uploads=true"), listener, ("x",))
        assert "change its tasks" in warning
        assert options("tasks=a").host == "127.0.0.1"


def start(folder, tmp_path, *more):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vpt.serve", f"tasks={folder}", "device=cpu", *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_process_answers_accepted_requests_and_exits_with_0(folder, tmp_path, number):
    with start(folder, tmp_path, "port=0", "max_wait_ms=3000") as process, ThreadPoolExecutor(6) as pool:
        where = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        send = {"files": {"images": png_bytes()}, "timeout": 60}
        names = 3 * ["colours", "shapes"]
        asked = [pool.submit(httpx.post, f"{where}/predict?task={name}", **send) for name in names]
        while httpx.get(f"{where}/health").json()["waiting"] < 6:
            time.sleep(0.02)
        process.send_signal(number)  # all six wait for others to share their batch
        assert [future.result().status_code for future in asked] == [200] * 6
        out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert out == "ended; all accepted requests are answered\n"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{where}/health")
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_interrupted_while_it_loads_ends_at_once_and_quietly(folder, tmp_path, number):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with start(folder, tmp_path, f"port={port}") as process:
        while process.poll() is None:  # it has its port before it loads anything
            with socket.socket() as probe:
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    break
            time.sleep(0.02)
        with pytest.raises(ConnectionRefusedError):  # it does not listen before it can answer
            socket.create_connection(("127.0.0.1", port))
        process.send_signal(number)
        out, error = process.communicate(timeout=20)
    assert (process.returncode, out, error) == (-number, "", "")
