"""python -m vpt.doctor: exit codes, report, JSON and refusals."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

import vpt.doctor.__main__
from tests.helpers import ROOT, exit_code_of
from vpt.data.readers import box_checks
from vpt.doctor.images import ODDITIES
from vpt.task_types.box_findings import code_of

PLAIN = ["num_workers=0"]
doctor = partial(exit_code_of, vpt.doctor.__main__)


@pytest.fixture
def broken(photos, tmp_path):
    """Class folders with an unreadable image and a leak."""
    root = shutil.copytree(photos, tmp_path / "my photos (1)")
    (root / "train" / "grass" / "empty.jpg").write_bytes(b"")
    shutil.copyfile(root / "train" / "rose" / "0.png", root / "test" / "rose" / "leak.png")
    return root


def test_a_clean_data_set_exits_with_0_and_reports_what_training_would_do(monkeypatch, capsys, photos):
    assert doctor(monkeypatch, "dataset=folder", f"dataset.root={photos}", "train.batch_size=4", *PLAIN) == 0
    text = capsys.readouterr().out
    assert "training  would run: train 18, val 9, test 12; 5 steps per epoch, 100 in 20 epochs" in text
    assert f"next      python -m vpt.train dataset=folder dataset.root={photos}" in text


def test_problems_exit_with_1_and_are_reported_with_their_files(monkeypatch, capsys, broken):
    assert doctor(monkeypatch, "dataset=folder", f"dataset.root={broken}", *PLAIN) == 1
    text = capsys.readouterr().out
    assert "  unreadable: train: 1 of 19 (5.3 %) images cannot be read" in text
    assert "    train/grass/empty.jpg: the file is empty" in text
    assert "    test/rose/leak.png: same as train/rose/0.png: the same file" in text
    assert "training  would stop: unreadable" in text
    assert "next      fix unreadable and leakage, then check again" in text


def test_json_has_the_documented_form(monkeypatch, tmp_path, broken):
    output = tmp_path / "found.json"
    assert doctor(monkeypatch, "dataset=folder", f"dataset.root={broken}", f"json={output}", *PLAIN) == 1
    content = json.loads(output.read_text())
    page = (ROOT / "docs" / "doctor.md").read_text()
    documented = json.loads(page.split("```json\n")[1].split("```")[0])

    def keys(value):
        """The nested keys of a value; of a list those of its first entry."""
        match value:
            case dict():
                return {key: keys(part) for key, part in value.items() if key not in ("images_of_class", "images")}
            case list():
                return [keys(value[0])] if value and isinstance(value[0], dict) else []
        return None

    assert keys(content) == keys(documented)
    assert content["version"] == documented["version"] == 2
    leak = next(finding for finding in content["findings"] if finding["code"] == "leakage")
    assert (leak["level"], leak["split"], leak["count"]) == ("error", "test", 1)
    file = {"file": "test/rose/leak.png", "split": "test", "detail": "the same file", "same_as": "train/rose/0.png"}
    assert leak["files"] == [file]


def test_every_code_is_documented():
    page = (ROOT / "docs" / "doctor.md").read_text()
    codes = [code_of(finding) for finding in box_checks.Finding if finding is not box_checks.Finding.MISSING]
    codes += [code for code, _ in ODDITIES.values()]
    for path in [*(ROOT / "vpt" / "doctor").glob("*.py"), *(ROOT / "vpt" / "task_types").glob("*.py")]:
        codes += re.findall(r'(?:[lL]evel(?:\.\w+)?, |yield )"(\w+)",', path.read_text())
    assert len(codes) > 30
    assert [code for code in codes if f"`{code}`" not in page] == []


def test_the_next_command_can_be_typed(monkeypatch, capsys, broken):
    (broken / "train" / "grass" / "empty.jpg").unlink()
    (broken / "test" / "rose" / "leak.png").unlink()
    words = ["dataset=folder", f"dataset.root={broken}", *PLAIN]
    assert doctor(monkeypatch, *words) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(line.removeprefix("next      ")) == ["python", "-m", "vpt.train", *words]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset=folder"], "dataset.root"),
        (["dataset=folder", "dataset.root=nowhere"], "dataset.root=nowhere"),
        (["jsn=a.json"], "jsn"),
        (["json=a.txt"], "must end in .json"),
        (["json="], "json=: must be a path"),
        (["json"], "json"),
        (["json=a.json", "json=b.json"], "json is typed twice"),
        (["-m", "seed=0,1"], "-m: not an option"),
        (["backbone.name=vit_tiny_patch16_225"], "vit_tiny_patch16_224"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    assert doctor(monkeypatch, *words) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert (printed.err.count("\n"), printed.out) == (1, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["doctor", "compare", "benchmark", "prune"])
def test_help_of_commands_loads_nothing_heavy(command):
    code = f"import sys; sys.argv = ['x', '--help']; import vpt.{command}.__main__ as command\n"
    code += "try: command.main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'timm', 'albumentations', 'PIL', 'matplotlib', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"python -m vpt.{command}: ")
    assert done.stdout.endswith("[]\n")


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ctrl_c_exits_with_130_and_no_traceback(tmp_path, photos, num_workers):
    code = "import time, vpt.doctor.__main__, vpt.engine.console as console\n"
    code += "def advance(*_, **__): print('.', flush=True); time.sleep(1)\n"
    code += "console.Progress.advance = advance\nvpt.doctor.__main__.main()"
    words = ["dataset=folder", f"dataset.root={photos}", f"num_workers={num_workers}", "train.batch_size=1"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, f"json={tmp_path / 'a.json'}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == ".\n"  # the scan has started
    os.killpg(process.pid, signal.SIGINT)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert time.monotonic() - start < 20
    assert errors == "error: interrupted before every image was read; nothing was written\n"
    assert not (tmp_path / "a.json").exists()
