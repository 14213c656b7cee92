"""python -m vpt.doctor: exit codes, what it prints and writes, and what it refuses."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vpt.doctor.__main__

ROOT = Path(__file__).resolve().parents[1]
PLAIN = ["num_workers=0"]


def doctor(monkeypatch, *words):
    """The exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["vpt.doctor", *map(str, words)])
    try:
        vpt.doctor.__main__.main()
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture
def broken(tmp_path):
    """Class folders with a picture that cannot be read and one that leaks."""
    generator = np.random.default_rng(0)
    root = tmp_path / "my photos (1)"
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(5):
                pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    (root / "train" / "a" / "empty.jpg").write_bytes(b"")
    (root / "test" / "b" / "leak.png").write_bytes((root / "train" / "b" / "0.png").read_bytes())
    return root


def test_a_clean_data_set_ends_with_0_and_says_what_training_would_do(monkeypatch, capsys, photos):
    assert doctor(monkeypatch, "dataset=folder", f"dataset.root={photos}", "train.batch_size=4", *PLAIN) == 0
    text = capsys.readouterr().out
    assert "training  would run: train 18, val 9, test 12; 5 steps an epoch, 100 in 20 epochs" in text
    assert f"next      python -m vpt.train dataset=folder dataset.root={photos}" in text


def test_dirt_ends_with_1_and_is_told_with_its_files(monkeypatch, capsys, broken):
    assert doctor(monkeypatch, "dataset=folder", f"dataset.root={broken}", *PLAIN) == 1
    text = capsys.readouterr().out
    assert "  unreadable: train: 1 of 11 (9.1 %) pictures cannot be read" in text
    assert "    train/a/empty.jpg: the file is empty" in text
    assert "    test/b/leak.png: same as train/b/0.png: the same file" in text
    assert "training  would stop: unreadable" in text
    assert "next      mend unreadable and leakage, and look again" in text


def test_json_has_everything_in_the_form_that_the_page_documents(monkeypatch, tmp_path, broken):
    output = tmp_path / "found.json"
    assert doctor(monkeypatch, "dataset=folder", f"dataset.root={broken}", f"json={output}", *PLAIN) == 1
    content = json.loads(output.read_text())
    page = (ROOT / "docs" / "doctor.md").read_text()
    documented = json.loads(page.split("```json\n")[1].split("```")[0])

    def keys(value):
        """The nested keys of a value; of a list those of its first entry."""
        match value:
            case dict():
                return {key: keys(part) for key, part in value.items() if key not in ("pictures_of_class", "pictures")}
            case list():
                return [keys(value[0])] if value and isinstance(value[0], dict) else []
        return None

    assert keys(content) == keys(documented)
    assert content["version"] == documented["version"] == 1
    leak = next(finding for finding in content["findings"] if finding["code"] == "leakage")
    assert (leak["level"], leak["split"], leak["count"]) == ("error", "test", 1)
    file = {"file": "test/b/leak.png", "split": "test", "detail": "the same file", "same_as": "train/b/0.png"}
    assert leak["files"] == [file]


def test_every_code_stands_in_the_page():
    from vpt.data.readers import box_checks as sources
    from vpt.doctor.boxes import _code
    from vpt.doctor.images import SAID

    page = (ROOT / "docs" / "doctor.md").read_text()
    codes = [_code(finding) for finding in sources.Finding if finding is not sources.Finding.MISSING]
    codes += [code for code, _ in SAID.values()]
    for path in (ROOT / "vpt" / "doctor").glob("*.py"):
        codes += re.findall(
            r'(?:Finding\([^,()]+(?:\([^)]*\))?[^,()]*, |findings\.append\(|yield )"(\w+)",', path.read_text()
        )
    assert len(codes) > 30
    assert [code for code in codes if f"`{code}`" not in page] == []


def test_what_is_to_be_typed_next_can_be_typed(monkeypatch, capsys, broken):
    (broken / "train" / "a" / "empty.jpg").unlink()
    (broken / "test" / "b" / "leak.png").unlink()
    words = ["dataset=folder", f"dataset.root={broken}", *PLAIN]
    assert doctor(monkeypatch, *words) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(line.removeprefix("next      ")) == ["python", "-m", "vpt.train", *words]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset=folder"], "dataset.root is needed"),
        (["dataset=folder", "dataset.root=nowhere"], "dataset.root=nowhere is no folder"),
        (["dataset=fruits"], "did you mean fruit?"),
        (["jsn=a.json"], "unknown key jsn"),
        (["json=a.txt"], "json=a.txt: must end in .json"),
        (["json="], "json=: must be a path"),
        (["json"], "json: not an option of the form key=value"),
        (["json=a.json", "json=b.json"], "json is typed twice"),
        (["json=no/such/../"], "must end in .json"),
        (["-m", "seed=0,1"], "-m: not an option"),
        (["seed=0,1"], "is a sweep over several values"),
        (["--cfg", "job"], "--cfg: not an option"),
        (["backbone.name=vit_tiny_patch16_225"], "did you mean vit_tiny_patch16_224"),
        (["data.max_pixels=0"], "data.max_pixels=0 is out of range"),
    ],
)
def test_a_command_that_cannot_be_used_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    assert doctor(monkeypatch, *words) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert (told.err.count("\n"), told.out) == (1, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ctrl_c_ends_it_with_130_and_no_traceback(tmp_path, photos, num_workers):
    code = "import time, vpt.doctor, vpt.engine.console as console\n"
    code += "def advance(*_, **__): print('.', flush=True); time.sleep(1)\n"
    code += "console.Progress.advance = advance\nvpt.doctor.main()"
    words = ["dataset=folder", f"dataset.root={photos}", f"num_workers={num_workers}", "train.batch_size=1"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, f"json={tmp_path / 'a.json'}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == ".\n"  # it has begun to look
    os.killpg(process.pid, signal.SIGINT)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert time.monotonic() - start < 20
    assert errors == "error: interrupted before every picture was looked at; nothing was written\n"
    assert not (tmp_path / "a.json").exists()
