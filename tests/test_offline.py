"""Imports are lazy, nothing is reported to anybody, and no network is needed."""

import os
import socket
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.offline import OUTSIDE

HEAVY = {"torch", "timm", "albumentations", "torchvision", "numpy", "PIL", "cv2", "tensorboard", "huggingface_hub"}
UNUSED = {"transformers", "lightning", "pytorch_lightning", "torchmetrics", "peft", "joblib", "dill", "datasets"}
OPTIONAL = {"requests", "onnx", "onnxruntime", "fastapi", "uvicorn", "pyarrow", "faster_coco_eval", "matplotlib"}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import vpt", HEAVY | UNUSED | OPTIONAL | {"hydra", "omegaconf", "yaml"}),
        ("import vpt; dir(vpt); vpt.__version__", HEAVY | UNUSED | OPTIONAL | {"hydra", "omegaconf", "yaml"}),
        ("import vpt; vpt.create_model", UNUSED | OPTIONAL | {"hydra", "omegaconf", "tensorboard", "albumentations"}),
        ("import vpt.train", HEAVY | UNUSED | OPTIONAL),
        ("import vpt.predict, vpt.evaluate, vpt.serve, vpt.tasks, vpt.export", HEAVY | UNUSED | OPTIONAL),
    ],
)
def test_unneeded_packages_are_not_imported(code, absent):
    code += f"; import sys; print(sorted({absent!r} & sys.modules.keys()))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_hub_is_not_told_which_packages_are_installed():
    """Unless the user enables it; by default the client of the hub would send their versions."""
    code = "import vpt; from huggingface_hub.utils import build_hf_headers as of; "
    code += "print(of(library_name='vpt')['user-agent'])"
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_TELEMETRY"}
    environment["PYTHONPATH"] = str(ROOT)
    agents = [
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        for env in (environment, {**environment, "HF_HUB_DISABLE_TELEMETRY": "0"})
    ]
    assert "torch/" not in agents[0]
    assert "torch/" in agents[1]


@pytest.mark.parametrize("ask", [socket.getaddrinfo, lambda host, _: socket.gethostbyname(host)])
def test_a_test_cannot_resolve_another_machine(ask):
    with pytest.raises(ConnectionRefusedError, match="tests stay on this machine"):
        ask("huggingface.co", 443)
    assert OUTSIDE == ["huggingface.co"]
    OUTSIDE.clear()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_test_cannot_reach_another_machine(kind):
    address = ("192.0.2.1", 80)
    with socket.socket(socket.AF_INET, kind) as opened:
        ask = {socket.SOCK_STREAM: opened.connect, socket.SOCK_DGRAM: lambda to: opened.sendto(b"x", to)}[kind]
        with pytest.raises(ConnectionRefusedError, match="tests stay on this machine"):
            ask(address)
    assert OUTSIDE == ["192.0.2.1"]
    OUTSIDE.clear()


def can_cut_the_network():
    try:
        return subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not can_cut_the_network(), reason="unshare -rn is not permitted here")
def test_training_and_predicting_need_no_network(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in (
        ["vpt.train", "+experiment=quickstart", "mode=dry", "run.name=a", "num_workers=0"],
        ["vpt.predict", "run=runs/a_dry", f"input={ROOT / 'vpt/data/fruit/test'}", "output=found.csv"],
    ):
        command = ["unshare", "-rn", sys.executable, "-m", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
