"""No source of the project can run what a file says, and no version with a known hole is installed."""

import ast
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.helpers import ROOT

FORBIDDEN = {
    *("eval", "exec", "__import__", "breakpoint"),
    *("os.system", "os.popen", "os.startfile", "pty.spawn", "runpy", "code.interact"),
    *("pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader"),
    *("hydra.utils", "torch.load", "torch.hub", "torch.jit.load", "torch.package", "numpy.fromregex"),
}
ALLOWED = {
    "vpt/tasks/conversion.py": {"pickle", "pickle.UnpicklingError", "torch.load"},
    "vpt/__init__.py": {"importlib.import_module"},
}
MODULES_OF_POWER = ("os", "builtins", "importlib", "torch", "numpy", "yaml", "hydra", "subprocess", "sys")


def findings_in(source, file=""):
    """What in a source text could run what a file says, as dotted names, whatever a module was imported as."""
    tree, names, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                found.append(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found.append(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            found.append(_dotted(node, names))
        elif isinstance(node, ast.Call):
            found += _of_call(node, names)
        elif isinstance(node, ast.Constant) and node.value in ("_target_", "trust_remote_code"):
            found.append(node.value)
    allowed = ALLOWED.get(file, set())
    return sorted({name for name in found if _is_forbidden(name) and name not in allowed})


def _dotted(node, names):
    """The full name that an expression such as np.random.default_rng stands for."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id).removeprefix("builtins.")
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}".removeprefix("builtins.")
    return ""


def _of_call(node, names):
    """What a call is that depends on its arguments."""
    function = _dotted(node.func, names)
    keywords = {keyword.arg: getattr(keyword.value, "value", ...) for keyword in node.keywords}
    if keywords.get("shell", False) is not False:
        yield "shell=True"
    if keywords.get("allow_pickle", False) is not False:
        yield "allow_pickle=True"
    if "trust_remote_code" in keywords:
        yield "trust_remote_code"
    if keywords.get("weights_only", True) is not True or (function == "torch.load" and "weights_only" not in keywords):
        yield "weights_only=False"
    if function.rpartition(".")[2] in ("instantiate", "import_module"):
        yield "instantiate" if function.endswith("instantiate") else "importlib.import_module"
    if function == "getattr" and node.args and _dotted(node.args[0], names) in MODULES_OF_POWER:
        yield f"getattr({_dotted(node.args[0], names)}, ...)"


def _is_forbidden(name):
    return name in FORBIDDEN | {"instantiate", "importlib.import_module", "_target_", "trust_remote_code"} or (
        name.startswith(tuple(f"{word}." for word in FORBIDDEN)) or bool(re.search(r"^getattr\(|=True$|=False$", name))
    )


def test_no_source_can_run_what_a_file_says():
    files = [path for folder in ("vpt", "scripts", "conf") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 60
    names = {path: path.relative_to(ROOT).as_posix() for path in files}
    assert {
        name: found for path, name in names.items() if (found := findings_in(path.read_text(encoding="utf-8"), name))
    } == {}
    assert all((ROOT / name).is_file() for name in ALLOWED)


def test_no_config_names_something_to_build():
    for path in (ROOT / "conf").rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"_target_|!!python|oc\.env|_partial_|_args_", text), path


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import pickle as p\np.loads(b'')",
        "eval('1')",
        "run = exec",
        "import builtins\nbuiltins.eval('1')",
        "import os\nos.system('ls')",
        "from os import system as start",
        "import os as o\no.popen('ls')",
        "import os\ngetattr(os, 'sys' + 'tem')",
        "import torch\ntorch.load('a')",
        "import torch\ntorch.load('a', weights_only=False)",
        "from torch import load\nload('a', weights_only=True)",
        "import torch as t\nt.hub.load('a', 'b')",
        "load_state_dict(path, weights_only=False)",
        "load_state_dict(path, weights_only=trusted)",
        "import numpy as np\nnp.load('a', allow_pickle=True)",
        "import yaml\nyaml.load('a', yaml.Loader)",
        "from yaml import unsafe_load",
        "from hydra.utils import instantiate",
        "import hydra\nhydra.utils.instantiate(config)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.run('ls', shell=unsafe)",
        "import importlib\nimportlib.import_module(name)",
        "import joblib",
        "config = {'_target_': 'os.system'}",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_guard_notices(source):
    assert findings_in(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import yaml\nyaml.safe_load('a')",
        "import numpy as np\nnp.load('a')",
        "import re\nre.compile('a')",
        "import torch\ntorch.compile(model)",
        "import subprocess\nsubprocess.run(['ls'])",
        "load_state_dict(path, weights_only=True)",
        "getattr(metadata, 'pickle')",
    ],
)
def test_the_guard_lets_what_is_harmless_be(source):
    assert findings_in(source) == []


FLOORS = {  # the first version without it
    "hydra-core": ("1.3.8", "CVE-2026-68508, GHSA-37p2-j732-x8pj, CVE-2026-106439: code from a config"),
    "torch": ("2.10", "CVE-2025-32434, CVE-2026-24747: torch.load with weights_only"),
    "pillow": ("12.2", "CVE-2026-42308 and others: decoders"),
}
NEVER = ("transformers", "lightning", "pytorch-lightning", "joblib", "dill", "h5py")  # their files are or hold pickles


def requirements():
    """Of what is installed with vpt, by name, and of all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [Requirement(line) for lines in project["optional-dependencies"].values() for line in lines]
    return {(entry := Requirement(line)).name: entry for line in project["dependencies"]}, extras


@pytest.mark.parametrize("name", FLOORS)
def test_versions_with_known_holes_are_not_installed(name):
    version, reason = FLOORS[name]
    floors = [Version(part.version) for part in requirements()[0][name].specifier if part.operator in (">=", "==")]
    assert floors, reason
    assert max(floors) >= Version(version), reason
    before = str(Version(version).major) + ".0" if "." in version else "0"
    assert not requirements()[0][name].specifier.contains(before), reason


def test_what_reads_pickles_is_not_depended_upon():
    base, extras = requirements()
    assert not {*base, *(entry.name for entry in extras)} & set(NEVER)
    assert len(base) <= 15
