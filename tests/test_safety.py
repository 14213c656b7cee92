"""Untrusted files run no code, and nothing that they name is read or downloaded."""

import json
import os
import pickle
import shutil
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from safetensors.torch import save

import vpt
from tests.helpers import ROOT
from tests.offline import OUTSIDE
from vpt.config import command_line
from vpt.config.composition import compose_config
from vpt.config.errors import ConfigError
from vpt.config.saved import load_config
from vpt.config.validation import to_config
from vpt.data.images import ImageError
from vpt.data.readers.coco import read_coco
from vpt.data.readers.folder import read_folder
from vpt.data.samples import check_readable
from vpt.evaluate import __main__ as evaluate
from vpt.export import __main__ as export
from vpt.hub.card import model_card
from vpt.models.bank import TaskBank
from vpt.models.task_file import open_task
from vpt.models.vit import load_vit
from vpt.predict import __main__ as predict
from vpt.serve import __main__ as serve
from vpt.serve.app import make_app
from vpt.serve.service import Settings
from vpt.storage.files import UNSEALED, sha256_of
from vpt.tasks import __main__ as tasks
from vpt.tasks.conversion import read_folder as read_peft_folder
from vpt.tasks.conversion import read_original

NANO = "vit_nano_patch8_64"

# Pickles at every entry point for files.


class Evil:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, sentinel):
        self.sentinel = str(sentinel)

    def __reduce__(self):
        return os.mkdir, (self.sentinel,)


def write_bomb(path, form, sentinel):
    """Write a file that runs code when it is unpickled."""
    evil, array = {"prompt.tokens": torch.ones(2), "state_dict": Evil(sentinel)}, np.array([Evil(sentinel)], object)
    writers = {
        "torch": lambda file: torch.save(evil, file),
        "old torch": lambda file: torch.save(evil, file, _use_new_zipfile_serialization=False),
        "pickle": lambda file: pickle.dump(evil, file),
        "npy": lambda file: np.save(file, array, allow_pickle=True),
        "npz": lambda file: np.savez(file, **{"embedding/kernel": array}),
        "yaml": lambda file: file.write(f"!!python/object/apply:os.mkdir ['{sentinel}']".encode()),
    }
    with path.open("wb") as file:
        writers[form](file)
    return path


def typed(monkeypatch, main, *words):
    """A command in this process."""
    monkeypatch.setattr(sys, "argv", ["vpt", *map(str, words)])
    main()


def put(path):
    with TestClient(make_app(TaskBank(NANO), Settings(folder=path.parent, is_local=False))) as client:
        answer = client.put("/tasks/pets", content=path.read_bytes())
    assert answer.status_code == 422
    raise ValueError(answer.json()["detail"])


def in_run(path):
    """The file as the task of a run."""
    run = path.parent / "run"
    run.mkdir(exist_ok=True)
    shutil.copy(path, run / "task.safetensors")
    (run / "config.yaml").write_text(GOOD_CONFIG)
    return run


def in_peft_folder(path):
    folder = path.parent / "peft"
    folder.mkdir(exist_ok=True)
    shutil.copy(path, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "VISUAL_PROMPT_TUNING"}))
    return folder


def open_with(schema, usage, start):
    """A command that is called with parsed options."""
    return lambda **words: start(command_line.parse_options(schema, [f"{k}={v}" for k, v in words.items()], usage))


ENTRIES = {
    "backbone.checkpoint": lambda path: load_vit(NANO, checkpoint=path),
    "load_task": lambda path: vpt.load_task(path, NANO),
    "read_task": vpt.read_task,
    "TaskBank.load": lambda path: TaskBank(NANO).load(path),
    "from_pretrained": lambda path: vpt.from_pretrained(path, NANO),
    "original prompts": read_original,
    "PEFT-style folder": lambda path: read_peft_folder(in_peft_folder(path)),
    "PUT": put,
    "predict task=": lambda path: open_with(predict.PredictOptions, "", predict.predict_run)(
        task=path, input=ROOT / "vpt/data/fruit/test", output=path.parent / "found.csv"
    ),
    "predict run=": lambda path: open_with(predict.PredictOptions, "", predict.predict_run)(
        run=in_run(path), input=ROOT / "vpt/data/fruit/test", output=path.parent / "found.csv"
    ),
    "evaluate run=": lambda path: open_with(evaluate.EvaluateOptions, "", evaluate.evaluate_run)(run=in_run(path)),
    "export task=": lambda path: open_with(export.ExportOptions, "", export.export)(
        task=path, output=path.parent / "a.onnx"
    ),
    "serve tasks=": lambda path: open_with(serve.ServeOptions, "", serve.serve)(tasks=path, port=0),
}


@pytest.mark.filterwarnings("ignore:.*NumPy array")
@pytest.mark.parametrize("form", ["torch", "old torch", "pickle", "npy", "npz", "yaml"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_pickle_is_refused_at_every_entry_point_and_not_run(tmp_path, entry, form):
    sentinel = tmp_path / "ran"
    path = write_bomb(tmp_path / ("a.pth" if entry == "backbone.checkpoint" else "a.safetensors"), form, sentinel)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        ENTRIES[entry](path)
    assert not sentinel.exists()


@pytest.mark.parametrize("command", ["show", "verify", "convert"])
@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".bin", ".npz"])
def test_a_pickle_is_refused_by_the_commands_on_tasks(tmp_path, monkeypatch, capsys, command, ending):
    path = write_bomb(tmp_path / f"a{ending}", "torch", tmp_path / "ran")
    more = [f"output={tmp_path / 'b.safetensors'}"] if command == "convert" else []
    with pytest.raises(SystemExit) as ended:
        typed(monkeypatch, tasks.main, command, path, *more)
    assert ended.value.code in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_the_pickles_of_these_tests_run_code(tmp_path):
    """Otherwise the tests above would prove nothing."""
    for number, form in enumerate(["torch", "old torch", "npy"]):
        path = write_bomb(tmp_path / f"{number}", form, tmp_path / f"ran {number}")
        np.load(path, allow_pickle=True) if form == "npy" else torch.load(path, weights_only=False)
        assert (tmp_path / f"ran {number}").is_dir()


def test_a_compressed_checkpoint_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"cls_token": torch.zeros(10_000_000)}, path)
    with zipfile.ZipFile(path) as whole:
        parts = {info.filename: whole.read(info) for info in whole.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in parts.items():
            packed.writestr(name, content)
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"a\.pth: does not fit .*its members are compressed"):
        load_vit(NANO, checkpoint=path)


# Metadata is text.


@pytest.fixture
def pets(tmp_path):
    torch.manual_seed(0)
    model = vpt.create_model(NANO, prompt="deep", num_tokens=2, num_classes=3)
    return vpt.save_task(model, tmp_path / "pets.safetensors", classes=["cat", "dog", "eel"])


def seal(path, text):
    """Replace the metadata of a task file by any text, with a valid sha256."""
    tensors = open_task(path)[1]
    path.write_bytes(save(tensors, {"vpt": text.replace(UNSEALED, sha256_of(tensors, text), 1)}))


def change(path, **changes):
    seal(path, json.dumps({"sha256": UNSEALED, **vpt.read_task(path).to_json(), **changes}))


LURES = ["${oc.env:VPT_CANARY}", "${oc.decode:${oc.env:VPT_CANARY}}", "{{ VPT_CANARY }}", "$VPT_CANARY"]


def test_interpolations_in_a_task_file_stay_text_in_all_outputs(pets, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VPT_CANARY", "canary-7f3a")
    lure = {"_target_": "os.mkdir", "_args_": [str(tmp_path / "ran")], "__class_fullname__": "os.mkdir"}
    texts = {"note": LURES[0], "licence": LURES[1], "metrics": {LURES[2]: {LURES[3]: 0.5}}}
    change(pets, classes=LURES[:3], config={**lure, "inner": {**lure, "token": LURES[0]}}, **texts)
    metadata = vpt.read_task(pets)
    assert metadata.classes == LURES[:3]
    shown = [json.dumps(vars(metadata)), model_card(metadata, "ann/pets", open_task(pets)[1])]
    for words in (["show", pets], ["list", tmp_path], ["verify", pets, f"backbone={NANO}"]):
        typed(monkeypatch, tasks.main, *words)
        shown.append(capsys.readouterr().out)
    bank = TaskBank(NANO)
    bank.load(pets)
    with TestClient(make_app(bank), base_url="http://localhost") as client:
        shown.append(client.get("/tasks").text)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for output in ("found.csv", "found.json"):
        open_with(predict.PredictOptions, "", predict.predict_run)(
            task=pets, input=tmp_path / "a.png", output=tmp_path / output
        )
        shown.append((tmp_path / output).read_text())
    assert not any("canary-7f3a" in text for text in shown)
    assert all("oc.env" in text for text in (shown[0], shown[1], shown[2], *shown[5:]))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("hf-hub:stranger/vit", "hf_hub:stranger/vit", "HF-HUB:stranger/vit", "local-dir:/tmp", "local-dir:."),
        *("/etc/passwd", "../vit", "stranger/vit", "C:\\vit", "https://example.org/vit", "file:///etc/passwd"),
        *("vit_nano_patch8_64\n", "vit_nano_patch8_64\0", "", "-vit", ".vit", "a" * 300),
    ],
)
def test_a_file_cannot_name_a_backbone_that_is_downloaded_or_opened(pets, monkeypatch, name):
    monkeypatch.setattr("vpt.models.vit.timm", None)
    change(pets, backbone=name)
    with pytest.raises(ValueError, match=r"backbone is .*; allowed: the name of a timm model"):
        vpt.read_task(pets)
    for entry in ("predict task=", "serve tasks=", "TaskBank.load"):
        with pytest.raises((ValueError, AttributeError)):
            ENTRIES[entry](pets)
    assert OUTSIDE == []


def nested(depth, opening="[", closing="]"):
    return opening * depth + "0" * (opening != "[") + closing * depth


@pytest.mark.parametrize("depth", [25, 300, 900, 5000, 100_000])
@pytest.mark.parametrize("braces", [("[", "]"), ('{"a":', "}")])
def test_deeply_nested_metadata_is_refused(pets, depth, braces):
    text = json.dumps({"sha256": UNSEALED, **vpt.read_task(pets).to_json(), "config": {"a": "HERE"}})
    config = {"a": [[[{"b": {"c": 1}}]]]}
    seal(pets, text.replace('{"a": "HERE"}', json.dumps(config)))
    assert vpt.read_task(pets).config == config
    seal(pets, text.replace('"HERE"', nested(depth, *braces)))
    with pytest.raises(ValueError, match=r"config is .* at most 20 levels|its 'vpt' metadata is not JSON"):
        vpt.read_task(pets)


@pytest.mark.slow
def test_metadata_of_a_million_keys_is_read_in_seconds(pets):
    text = json.dumps({"sha256": UNSEALED, **vpt.read_task(pets).to_json(), "config": {}})
    keys = ",".join(f'"{key}":0' for key in range(10**6))
    seal(pets, text.replace('"config": {}', f'"config": {{{keys}}}'))
    start = time.perf_counter()
    assert len(vpt.read_task(pets).config) == 10**6
    assert time.perf_counter() - start < 20


PROMPT = {"kind": "deep", "num_tokens": 10, "embed_dim": 192, "width": 192, "blocks": [0], "dropout": 0.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 10**9},
        {"prompt": {**PROMPT, "num_tokens": 10**12}},
        {"prompt": {**PROMPT, "num_tokens": 10_000, "embed_dim": 16_384, "width": 16_384, "blocks": [0, 1]}},
        {"preprocessing": {"size": [float("nan"), 64]}},
        {"preprocessing": {"size": [10**30, 64]}},
        {"fingerprint": "${oc.env:HOME}"},
        {"_target_": "os.system"},
    ],
)
def test_impossible_sizes_are_refused_before_memory_is_allocated(pets, changes):
    metadata = vpt.read_task(pets).to_json()
    if "preprocessing" in changes:
        changes = {"preprocessing": {**metadata["preprocessing"], **changes["preprocessing"]}}
    seal(pets, json.dumps({"sha256": UNSEALED, **metadata, **changes}))
    with pytest.raises(ValueError, match=r"pets\.safetensors: "):
        vpt.load_task(pets, NANO)


# The config of a run.


GOOD_CONFIG = """\
backbone: {name: vit_nano_patch8_64}
dataset: {task: classification, reader: fruit, title: fruit}
prompt: {variant: deep, title: deep}
tuning: {title: deep, method: prompt}
run: {title: fruit_deep}
optim: {name: adamw}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: ${oc.env:VPT_CANARY}", "seed"),
        ("compile: ${oc.env:VPT_CANARY}", "compile"),
        ("'${oc.env:VPT_CANARY}': 1", "unknown key"),
        ("device: '${oc.env:'", "device"),
        ("device: !!python/object/apply:os.mkdir [ran]", "line 7: has a tag"),
        ("device: !!python/name:os.system ''", "line 7: has a tag"),
        ("device: !mine x", "line 7: has a tag"),
        ("device: &a cpu\ncache_dir: *a", "line 8: has an alias"),
        ("_target_: os.system", "unknown key _target_"),
        ("device: [", "while parsing"),
        ("device: " + "[" * 20_000, "line 7: has more than 20 levels"),
        ("seed: 1e400", "seed"),
        ("device: {a: b}", "device"),
        ("a" * 1_000_001, "larger than 1,000,000 bytes"),
        ("device: \x00", "special characters|unacceptable character"),
        *((content, "") for content in (b"\xff\xfe\x00", b"- a\n- b\n", b"root:x:0:0:root:/root:/bin/bash\n")),
    ],
)
def test_an_untrusted_config_is_plain_or_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VPT_CANARY", "canary-7f3a")
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else (GOOD_CONFIG + text).encode())
    with pytest.raises(ConfigError, match=rf"config\.yaml.*({message})") as error:
        load_config(path)
    assert "canary" not in str(error.value)
    assert "\n" not in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "text",
    [
        *("${oc.env:VPT_CANARY}", "a${oc.env:VPT_CANARY}b", "$${oc.env:VPT_CANARY}", "${run.root}"),
        *("\\${oc.env:VPT_CANARY}", "\\\\${oc.env:VPT_CANARY}", "\\\\\\${oc.env:VPT_CANARY}", "$ {a} $ } \\"),
        *("${oc.env:${oc.env:VPT_CANARY}}", "${oc.decode:${oc.env:VPT_CANARY}}", "${.name}", "${oc.env:A,${oc.env:B}}"),
    ],
)
def test_an_expression_in_the_config_of_a_run_stays_text(tmp_path, monkeypatch, text):
    monkeypatch.setenv("VPT_CANARY", "canary-7f3a")
    values = {"backbone": {"name": NANO}, "device": text, "run": {"title": "a"}, "optim": {"name": "adamw"}}
    values["tuning"] = {"title": "deep", "method": "prompt"}
    values["dataset"] = {"task": "classification", "reader": "fruit", "title": "a", "root": text}
    values["prompt"] = {"variant": "deep", "title": "deep", "blocks": [text, {"a": text}]}
    values["augment"] = {"transforms": [{"Flip": {"p": text}}]}
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    config = load_config(tmp_path / "config.yaml")
    assert (config.device, config.dataset.root) == (text, text)
    assert config.prompt.blocks == [text, {"a": text}]
    assert config.augment.transforms == [{"Flip": {"p": text}}]


def test_an_untrusted_run_does_not_read_the_environment(tmp_path, pets, monkeypatch):
    monkeypatch.setenv("VPT_CANARY", "canary-7f3a")
    run = in_run(pets)
    content = GOOD_CONFIG.replace("reader: fruit", "reader: folder, root: '${oc.env:VPT_CANARY}'")
    (run / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"root=\$\{oc\.env:VPT_CANARY\}") as error:
        open_with(evaluate.EvaluateOptions, "", evaluate.evaluate_run)(run=run)
    assert "canary" not in str(error.value)


# Names that become file names.


@pytest.mark.parametrize(
    ("name", "is_allowed"),
    [
        *((name, False) for name in ("../a", "a/b", "/etc", "..", ".", "", ".hidden", "a\\b", "a\0b", "a\nb", "C:a")),
        *((name, False) for name in ("a" * 65, "~", "Käse", "a b")),
        *((name, True) for name in ("fruit_deep_2026-11-21_19-00-00", "a", "a.b", "7")),
    ],
)
def test_a_run_name_cannot_leave_its_folder(name, is_allowed):
    for key in ("name", "title"):
        config = compose_config(["dataset=fruit"])
        setattr(config.run, key, name)
        if is_allowed:
            assert getattr(to_config(config).run, key) == name
        else:
            with pytest.raises(ConfigError, match=rf"run\.{key}=.*must be the name of a folder"):
                to_config(config)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..\\..\\etc\\passwd", "a/../../../b.jpg"])
def test_a_coco_image_outside_of_its_folder_is_not_read(tmp_path, name):
    (tmp_path / "data" / "train").mkdir(parents=True)
    content = {"images": [{"id": 1, "file_name": name}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "data" / "train" / "_annotations.coco.json").write_text(json.dumps(content))
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg")
    with pytest.raises(
        ValueError, match=rf"no usable image; .*first {tmp_path}/data/.*{tmp_path}/data/.*: no such file"
    ):
        read_coco(tmp_path / "data")


def test_a_link_to_a_secret_named_like_an_image_is_unreadable(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("root:canary-7f3a:19000:0:99999:7:::\n" * 10)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / f"{number}.png")
    (tmp_path / "photos" / "cat" / "x.jpg").symlink_to(secret)
    samples = read_folder(tmp_path / "photos", val_fraction=0)
    with pytest.raises(ImageError, match=r"x\.jpg: not an?") as error:
        check_readable(samples["train"])
    assert "canary" not in str(error.value)
