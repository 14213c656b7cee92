"""The notebooks run completely, and are stored without outputs and machine-specific content."""

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

assert len(NOTEBOOKS) >= 2
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_a_notebook_is_stored_without_outputs_and_names_no_machine(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert list(notebook["metadata"]) == ["kernelspec"]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
        assert [line for line in cell["source"] if ABSOLUTE_PATH.search(line)] == []


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_and_leaves_no_file_behind(path, tmp_path):
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
