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
    for more, is_told in (({}, False), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, True)):
        env = {**environment, "PYTHONPATH": str(ROOT), **more}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert ("torch/" in done.stdout) == is_told


@pytest.mark.parametrize(
    ("ask", "host"),
    [
        (lambda *_: socket.getaddrinfo("huggingface.co", 443), "huggingface.co"),
        (lambda *_: socket.gethostbyname("huggingface.co"), "huggingface.co"),
        (lambda tcp, _: tcp.connect(("192.0.2.1", 80)), "192.0.2.1"),
        (lambda _, udp: udp.sendto(b"x", ("192.0.2.1", 80)), "192.0.2.1"),
    ],
)
def test_a_test_cannot_resolve_or_reach_another_machine(ask, host):
    refused = pytest.raises(ConnectionRefusedError, match="tests stay on this machine")
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp, refused:
        ask(tcp, udp)
    assert [host] == OUTSIDE
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
