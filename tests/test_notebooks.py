"""The notebooks run from their first cell to their last, and are stored without what a run leaves in them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(home|root|tmp|work|mnt|data|content|Users)\b|\b[A-Z]:\\")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 2


@each_notebook
def test_a_notebook_is_stored_without_outputs(path):
    code = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@each_notebook
def test_a_notebook_is_stored_without_the_marks_of_one_machine(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert list(notebook["metadata"]) == ["kernelspec"]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert all(cell["metadata"] == {} for cell in notebook["cells"])


@each_notebook
def test_a_notebook_names_no_absolute_path(path):
    assert [line for cell in cells_of(path) for line in cell["source"] if ABSOLUTE_PATH.search(line)] == []


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_in_a_kernel_and_leaves_no_file_behind(path, tmp_path):
    shutil.copy(path, tmp_path)
    command = [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-timeout=240", "-c", os.devnull]
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    finished = subprocess.run(
        [*command, "--rootdir=.", "-p", "no:cacheprovider", path.name],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": python_path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert [left.name for left in tmp_path.iterdir()] == [path.name]
