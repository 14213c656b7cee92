"""No source can run code from a file, and no version with a known vulnerability is installed.

Most of it is ruff's work: the rules S and banned-api of pyproject.toml. A regular expression finds what ruff cannot.
"""

import json
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.helpers import ROOT

ALLOWED = {
    ("vpt/tasks/conversion.py", "`pickle`"),  # the name of an error
    ("vpt/tasks/conversion.py", "`torch.load`"),  # with weights_only=True
    ("vpt/__init__.py", "`importlib.import_module`"),  # of names in a table of its own
}
RISKY = re.compile(
    r"\bgetattr\((os|builtins|importlib|torch|np|numpy|yaml|hydra|subprocess|sys),"
    r"|\bweights_only=(?!True)|\ballow_pickle=(?!False)|\bshell=(?!False)|\btrust_remote_code\b|\b_target_\b"
    r"|= ?(eval|exec)$|\b(__import__|breakpoint)\("
)


def findings(folder, *paths):
    """Security findings of ruff and of RISKY, as (file, what); no file of the project is exempt."""
    select = "--select=S102,S301,S302,S307,S506,S602,S604,S605,TID251"
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", select, "--output-format=json"]
    command += ["--config", str(ROOT / "pyproject.toml"), "--config", "lint.per-file-ignores = {}", *paths]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    for found in json.loads(done.stdout):
        if "enters through" not in found["message"]:
            yield found["filename"].removeprefix(f"{folder}/"), found["message"].partition(" is banned")[0]
    for file in (file for path in paths for file in (folder / path).rglob("*.py")):
        for line in file.read_text(encoding="utf-8").splitlines():
            if RISKY.search(line):
                yield file.relative_to(folder).as_posix(), line


def test_no_source_can_run_code_from_a_file():
    assert {*findings(ROOT, "vpt", "scripts", "conf")} == ALLOWED
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert not re.search(r"_target_|!!python|oc\.env|_partial_|_args_", path.read_text(encoding="utf-8")), path


RISKS = [
    *("import pickle", "from pickle import loads", "eval('1')", "run = exec", "import builtins\nbuiltins.eval('1')"),
    *(
        "exec('a')",
        "__import__(name)",
        "import importlib\nimportlib.import_module(name)",
        "import joblib",
        "import runpy",
    ),
    *("import os\nos.system('ls')", "from os import system as start", "import os as o\no.popen('ls')"),
    *("import os\ngetattr(os, 'sys' + 'tem')", "import subprocess\nsubprocess.run('ls', shell=True)"),
    *("import subprocess\nsubprocess.run('ls', shell=unsafe)", "import torch\ntorch.load('a')"),
    *("from torch import load\nload('a', weights_only=True)", "import torch as t\nt.hub.load('a', 'b')"),
    *("load_state_dict(path, weights_only=False)", "load_state_dict(path, weights_only=trusted)"),
    *("import numpy as np\nnp.load('a', allow_pickle=True)", "import yaml\nyaml.load('a', yaml.Loader)"),
    *("from yaml import unsafe_load", "from hydra.utils import instantiate"),
    *("import hydra\nhydra.utils.instantiate(config)", "config = {'_target_': 'os.system'}"),
    "AutoModel.from_pretrained(name, trust_remote_code=True)",
]
HARMLESS = [
    *(
        "model.eval()",
        "import yaml\nyaml.safe_load('a')",
        "import numpy as np\nnp.load('a')",
        "import re\nre.compile('a')",
    ),
    *("import torch\ntorch.compile(model)", "import subprocess\nsubprocess.run(['ls'])", "getattr(metadata, 'pickle')"),
    "load_state_dict(path, weights_only=True)",
]


def test_the_guard_finds_each_risk_and_nothing_harmless(tmp_path):
    for number, source in enumerate(RISKS + HARMLESS):
        (tmp_path / f"{number}.py").write_text(f"{source}\n")
    found = {int(file.removesuffix(".py")) for file, _ in findings(tmp_path, ".")}
    assert found == {*range(len(RISKS))}


FLOORS = {  # the first version without the vulnerability
    "hydra-core": ("1.3.8", "CVE-2026-68508, GHSA-37p2-j732-x8pj, CVE-2026-106439: code from a config"),
    "torch": ("2.10", "CVE-2025-32434, CVE-2026-24747: torch.load with weights_only"),
    "pillow": ("12.2", "CVE-2026-42308 and others: decoders"),
}
NEVER = ("transformers", "lightning", "pytorch-lightning", "joblib", "dill", "h5py")  # their files are or hold pickles
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BASE = {(entry := Requirement(line)).name: entry.specifier for line in PROJECT["dependencies"]}


@pytest.mark.parametrize("name", FLOORS)
def test_versions_with_known_vulnerabilities_are_not_installed(name):
    version, reason = FLOORS[name]
    floors = [Version(part.version) for part in BASE[name] if part.operator in (">=", "==")]
    assert max(floors) >= Version(version), reason


def test_packages_that_read_pickles_are_not_dependencies():
    extras = {Requirement(line).name for lines in PROJECT["optional-dependencies"].values() for line in lines}
    assert not {*BASE, *extras} & set(NEVER)
    assert len(BASE) <= 17
