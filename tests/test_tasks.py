"""`python -m vpt.tasks`, and the promises of docs/task_format.md to other programs."""

import ast
import hashlib
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import vpt
from tests.helpers import NANO, ROOT, build_model, exit_code_of, make_tiny_vit
from vpt.models import adapters, detector, task_schema
from vpt.models.task_file import open_task, read_task, to_dtype, write_task
from vpt.models.task_schema import TaskMetadata
from vpt.models.vit import fingerprint, load_vit
from vpt.storage import files
from vpt.tasks import __main__ as tasks
from vpt.tasks import conversion

PAGE = (ROOT / "docs" / "task_format.md").read_text()


def make_task(path, prompt="deep", num_classes=3, backbone=NANO, **options):
    torch.manual_seed(0)
    keys = ("metrics", "config", "licence", "note", "dtype", "classes")
    saved = {key: options.pop(key) for key in keys if key in options}
    options = {"num_tokens": 2, "prompt": prompt, "num_classes": num_classes, **options}
    model = build_model(backbone, **options)
    for parameter in vpt.tuned_parameters(model).values():
        parameter.data.normal_()
    return vpt.save_task(model, path, **saved)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of good task files, a run folder with its checkpoints among them; only to be read."""
    folder = tmp_path_factory.mktemp("made")
    metrics = {"val": {"top1": 0.95, "loss": 0.1}, "test": {"top1": 0.9128}}
    make_task(folder / "deep.safetensors", blocks="last:3", metrics=metrics, config={"optim": {"lr": 0.01}})
    make_task(folder / "shallow.safetensors", "shallow", 7, dtype=torch.float16, metrics={"val": {"top1": 0.5}})
    make_task(folder / "bias.safetensors", None, tuning="bias", dtype=torch.bfloat16)
    detection = {"task": "detection", "channels": 16, "num_convs": 1, "img_size": 96}
    metrics = {"val": {"map": 0.25, "map50": 0.5}, "test": {"map": float("nan")}}
    make_task(folder / "runs" / "boxes" / "task.safetensors", **detection, metrics=metrics)
    files.write_tensors(folder / "runs" / "boxes" / "last.checkpoint", {"a": torch.zeros(1)}, {})
    (folder / "notes.txt").write_text("no task")
    return folder


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made, tmp_path / "tasks")


@pytest.fixture
def typed(monkeypatch, capsys):
    """Call the command as it is typed; returns exit code, standard output and standard error."""
    return lambda *words: (exit_code_of(tasks, monkeypatch, *words), *capsys.readouterr())


def test_list_shows_each_task_file_below_a_folder_and_no_checkpoints(typed, made):
    code, output, errors = typed("list", made)
    header, _, *rows = [re.split(r"  +", line) for line in output.splitlines()]
    assert header == ["file", "task type", "backbone", "prompt", "classes", "kB", "dtype", "best known metric"]
    assert {row[2] for row in rows} == {f"{NANO}.vpt"}
    assert [int(row[5]) for row in rows] == [round((made / row[0]).stat().st_size / 1000) for row in rows]
    assert [(row[0], row[1], row[3], row[4], *row[6:]) for row in rows] == [
        ("bias.safetensors", "classification", "none, backbone tuned", "3", "bf16", "unknown"),
        ("deep.safetensors", "classification", "deep, P=2, blocks 2-4", "3", "fp32", "test top1 91.3 %"),
        ("runs/boxes/task.safetensors", "detection", "deep, P=2, blocks 0-4", "3", "fp32", "val map 25.0 %"),
        ("shallow.safetensors", "classification", "shallow, P=2", "7", "fp16", "val top1 50.0 %"),
    ]
    assert (code, errors) == (0, "")


def test_list_counts_dry_runs_and_shows_none_of_them(typed, tmp_path):
    for name, mode in {"one": "train", "two": "dry", "three": "dry"}.items():
        make_task(tmp_path / name / "task.safetensors", config={"mode": mode})
    code, output, _ = typed("list", tmp_path)
    assert (code, "one/task" in output, "two" in output, "three" in output) == (0, True, False, False)
    assert output.splitlines()[-1] == "left out: 2 of dry runs (mode=dry)"


def test_list_names_refused_files_below_the_table(typed, copied):
    (copied / "deep.safetensors").write_bytes(b"no safetensors")
    code, output, _ = typed("list", copied)
    *_, last = output.splitlines()
    assert code == 1
    assert last.startswith("refused: deep.safetensors: not a readable safetensors file")
    assert "shallow.safetensors" in output


def test_show_prints_everything_with_the_config_at_the_end(typed, made):
    code, output, _ = typed("show", made / "deep.safetensors")
    assert code == 0
    metadata, tensors = open_task(made / "deep.safetensors")
    for name in metadata.to_json():
        assert re.search(rf"^{name}\b", output, re.MULTILINE), name
    assert metadata.fingerprint in output
    for name, tensor in tensors.items():
        assert re.search(rf"{re.escape(name)} +{re.escape(str(list(tensor.shape)))} +fp32 +{tensor.nbytes:,}", output)
    assert f"{(made / 'deep.safetensors').stat().st_size:,} bytes in the file" in output
    assert output.endswith('\nconfig\n{\n  "optim": {\n    "lr": 0.01\n  }\n}\n')


def test_an_untrusted_text_cannot_control_the_terminal(typed, tmp_path):
    evil = "\x1b[2Jcat\x9b31m\u202e\r\nok deep.safetensors"
    path = make_task(tmp_path / "a.safetensors", classes=[evil, "b", "c"], note=evil, config={evil: evil}, licence=evil)
    code, output, errors = typed("show", path)
    assert code == 0
    assert not any(letter in output + errors for letter in "\x1b\x9b\u202e\r")
    assert not any(line.startswith("ok") for line in output.splitlines())


def test_verify_prints_ok_or_the_reason_for_each_file(typed, copied):
    assert typed("verify", copied / "deep.safetensors") == (0, f"ok       {copied / 'deep.safetensors'}\n", "")
    (copied / "deep.safetensors").write_bytes((copied / "deep.safetensors").read_bytes()[:-7])
    metadata, tensors = open_task(copied / "shallow.safetensors")
    tensors["head.bias"][1] = torch.nan
    write_task(copied / "shallow.safetensors", metadata, tensors)
    data = bytearray((copied / "bias.safetensors").read_bytes())
    data[-5] ^= 1
    (copied / "bias.safetensors").write_bytes(data)
    code, output, errors = typed("verify", copied)
    lines = output.splitlines()
    assert (code, errors, len(lines)) == (1, "", 4)
    assert lines[0].startswith("refused  bias.safetensors: damaged or edited")
    assert lines[1].startswith("refused  deep.safetensors: not a readable safetensors file")
    assert lines[2] == "ok       runs/boxes/task.safetensors"
    assert lines[3] == "refused  shallow.safetensors: head.bias contains nan or inf; train again"


def test_verify_loads_each_file_onto_the_given_backbone(typed, copied):
    make_task(copied / "other.safetensors", backbone=make_tiny_vit())
    metadata, tensors = open_task(copied / "deep.safetensors")
    too_deep = {**metadata.prompt, "blocks": [2, 3, 9]}
    write_task(copied / "deep.safetensors", TaskMetadata(**{**vars(metadata), "prompt": too_deep}), tensors)
    assert typed("verify", copied)[0] == 0
    code, output, _ = typed("verify", copied, f"backbone={NANO}")
    lines = output.splitlines()
    assert code == 1
    assert [line.split()[0] for line in lines] == ["ok", "refused", "refused", "ok", "ok"]
    assert re.search(
        r"deep\.safetensors: its prompt or head cannot be used \(.*does not fit a ViT of .* 5 blocks", lines[1]
    )
    assert re.search(rf"made for the backbone vit_tiny_patch16_224\S*, but the given one is {NANO}", lines[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["backbone=vit_nno_patch8_64"], "backbone=vit_nno_patch8_64: not a timm model; did you mean"),
        ([f"backbone={NANO}", "checkpoint=nowhere.pth"], "checkpoint=nowhere.pth: no such file"),
    ],
)
def test_an_unknown_backbone_is_an_error_of_the_option(typed, made, options, message):
    code, output, errors = typed("verify", made, *options)
    assert (code, output) == (2, "")
    assert errors.startswith(f"error: {message}")


@pytest.mark.parametrize("name", ["deep", "shallow", "bias", "runs/boxes/task"])
def test_convert_makes_a_folder_and_restores_the_same_file(typed, made, tmp_path, name):
    source, folder, back = made / f"{name}.safetensors", tmp_path / "folder.v2", tmp_path / "back.safetensors"
    assert typed("convert", source, folder, "format=peft")[0] == 0
    assert typed("verify", folder) == (0, "ok       adapter_model.safetensors\n", "")
    assert typed("convert", folder, back)[0] == 0
    assert back.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("dtype", "kind"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_convert_writes_another_dtype(typed, made, tmp_path, dtype, kind):
    code, output, _ = typed("convert", made / "deep.safetensors", tmp_path / "new.safetensors", f"dtype={dtype}")
    assert code == 0
    assert re.fullmatch(rf"\S*new\.safetensors written \(\d+ kB of tensors, {dtype}\)\n", output)
    metadata, tensors = open_task(tmp_path / "new.safetensors")
    wanted, whole = open_task(made / "deep.safetensors")
    assert metadata == wanted
    assert all(torch.equal(tensors[name], whole[name].to(kind)) for name in whole)


def test_convert_refuses_numbers_that_are_too_large_for_the_dtype(typed, copied):
    metadata, tensors = open_task(copied / "deep.safetensors")
    tensors["head.bias"][0] = 1e6
    write_task(copied / "deep.safetensors", metadata, tensors)
    for target in ("new.safetensors", "new"):
        code, _, errors = typed("convert", copied / "deep.safetensors", copied / target, "dtype=fp16")
        assert code == 2
        assert "deep.safetensors: head.bias has numbers that are too large for float16; use bfloat16" in errors
        assert not (copied / target).exists()


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        *(
            (name, [], "exists already")
            for name in ("deep.safetensors", "shallow.safetensors", "notes.txt", "runs", ".")
        ),
        ("pets.v2", [], "pets.v2: must end in .safetensors; for a folder, add format=peft"),
        ("pets", ["format=task"], "must end in .safetensors"),
    ],
)
def test_convert_never_overwrites_anything_and_refuses_an_ambiguous_name(typed, copied, target, options, message):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    code, _, errors = typed("convert", copied / "deep.safetensors", copied / target, *options)
    assert (code, message in errors) == (2, True)
    assert before == {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}


@pytest.fixture
def prompts(tmp_path):
    """`.pth` of the original code for the nano ViT."""
    generator = np.random.default_rng(0)
    shallow, deep = (generator.normal(size=(num, 2, 192)).astype(np.float32) for num in (1, 4))
    torch.save({"shallow_prompt": shallow, "deep_prompt": deep}, tmp_path / "prompt_ep9.pth")
    return tmp_path / "prompt_ep9.pth"


def test_convert_makes_a_task_file_of_the_original_prompts(typed, prompts, tmp_path):
    target = tmp_path / "pets.safetensors"
    code, output, _ = typed("convert", prompts, target, f"backbone={NANO}", "num_classes=7", "crop_mode=squash")
    assert code == 0
    assert "note: Converted from prompt_ep9.pth of the original VPT code. The head is untrained" in output
    metadata, tensors = open_task(target)
    assert metadata.preprocessing["crop_mode"] == "squash"
    assert tensors["head.weight"].shape == (7, 192)
    held = torch.load(prompts, weights_only=False)
    assert np.array_equal(tensors["prompt.tokens"][0], held["shallow_prompt"][0])
    assert np.array_equal(tensors["prompt.tokens"][1:], held["deep_prompt"])
    assert typed("verify", target, f"backbone={NANO}")[0] == 0


def test_checkpoint_loads_the_weights_for_the_original_prompts(typed, prompts, tmp_path):
    vit = load_vit(NANO)
    vit.norm.weight.data += 1
    torch.save(vit.state_dict(), tmp_path / "other.pth")
    options = (f"backbone={NANO}", f"checkpoint={tmp_path / 'other.pth'}")
    assert typed("convert", prompts, tmp_path / "pets.safetensors", "num_classes=7", *options)[0] == 0
    assert read_task(tmp_path / "pets.safetensors").fingerprint == fingerprint(vit)
    assert typed("verify", tmp_path / "pets.safetensors", f"backbone={NANO}")[0] == 1
    assert typed("verify", tmp_path / "pets.safetensors", *options)[0] == 0


CONVERT = ["convert", "prompt_ep9.pth", "pets.safetensors"]
CONVERT_K = [*CONVERT, f"backbone={NANO}", "num_classes=2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lst", "x"], "lst: not a command of vpt.tasks; did you mean list?"),
        (["list"], "list needs DIR: run python -m vpt.tasks list DIR"),
        (["convert", "a"], "convert needs IN and OUT: run python -m vpt.tasks convert IN OUT"),
        (["list", "nowhere"], "nowhere: no such file or folder"),
        (["list", "."], ".: contains no task files (.safetensors)"),
        (["show", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["show", "."], "adapter_config.json: no such file; a PEFT-style folder has adapter_config.json and"),
        (["show", "a", "b"], "b: show takes only FILE"),
        (["verify", "a", "backbon=x"], "backbon=x: not an option of the form key=value; did you mean backbone?"),
        (["verify", "a", "checkpoint=x"], "checkpoint=x: add backbone=NAME"),
        (["convert", "a.safetensors", "b.safetensors"], "a.safetensors: no such file"),
        (["convert", "a.pth", "b.safetensors", "backbone=vit_nano_patch8_64"], "a.pth: no such file"),
        (["convert", "a", "b", "num_classes=3"], "num_classes=3 is for a .pth of the original code, not for a"),
        (CONVERT, "prompt_ep9.pth: backbone is required; add its timm name, such as backbone=vit_base"),
        ([*CONVERT, f"backbone={NANO}"], "prompt_ep9.pth: has prompts but no head; add num_classes=K"),
        ([*CONVERT, f"backbone={NANO}", "num_classes=0"], "num_classes=0 is out of range"),
        ([*CONVERT, f"backbone={NANO}", "num_classes=many"], "num_classes=many: must be a whole number"),
        ([*CONVERT_K, "crop_mode=all"], "crop_mode=all: must be one of center, squash"),
        ([*CONVERT_K, "dtype=int8"], "dtype=int8: must be one of fp32, fp16, bf16"),
        ([*CONVERT_K, "format=zip"], "format=zip: must be one of task, peft"),
        ([*CONVERT_K, "classes=2"], "classes=2: not an option of the form key=value; did you mean num_classes?"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(typed, prompts, monkeypatch, words, message):
    monkeypatch.chdir(prompts.parent)
    code, output, errors = typed(*words)
    assert (code, output) == (2, "")
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1
    assert list(prompts.parent.iterdir()) == [prompts]


def test_help_names_every_command_and_option(typed):
    for words in ([], ["--help"], ["convert", "-h"]):
        code, output, errors = typed(*words)
        assert (code, errors) == (0, "")
        assert output.startswith(tasks.USAGE.splitlines()[0])
        for schema in (tasks.VerifyOptions, tasks.ConvertOptions):
            assert all(f" {entry.name}=" in output for entry in fields(schema))
        assert all(f"\n  {name} " in output for name in tasks.COMMANDS)


def test_as_a_program_it_exits_with_its_code_and_imports_nothing_heavy_early():
    code = "import sys, vpt.tasks.__main__; assert not {'torch', 'timm'} & set(sys.modules); vpt.tasks.__main__.main()"
    done = subprocess.run([sys.executable, "-c", code, "verfy"], cwd=ROOT, capture_output=True, text=True, check=False)
    message = "error: verfy: not a command of vpt.tasks; did you mean verify?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def reader_of_the_page():
    return re.search(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]


def test_the_reader_of_the_page_imports_neither_vpt_nor_torch():
    imports = [
        node for node in ast.walk(ast.parse(reader_of_the_page())) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    assert names == {"hashlib", "json", "pathlib", "numpy", "safetensors"}
    code = reader_of_the_page() + "import sys\nassert not {'torch', 'vpt'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["deep", "shallow", "bias", "runs/boxes/task"])
def test_the_reader_of_the_page_reads_what_the_library_reads(made, name):
    space = {}
    exec(reader_of_the_page(), space)
    metadata, tensors = space["read_task"](made / f"{name}.safetensors")
    wanted, wanted_tensors = open_task(made / f"{name}.safetensors")
    assert metadata == wanted.to_json()
    assert tensors.keys() == wanted_tensors.keys()
    for key, array in tensors.items():
        assert array.dtype == (np.float16 if wanted_tensors[key].dtype is torch.float16 else np.float32)
        assert array.shape == wanted_tensors[key].shape
        assert torch.equal(torch.tensor(array).float(), wanted_tensors[key].float())


def test_the_reader_of_the_page_refuses_a_flipped_bit_anywhere(made, tmp_path):
    space = {}
    exec(reader_of_the_page(), space)
    whole = (made / "shallow.safetensors").read_bytes()
    for place in range(0, len(whole), 61):
        data = bytearray(whole)
        data[place] ^= 1
        (tmp_path / "a.safetensors").write_bytes(data)
        with pytest.raises((SafetensorError, KeyError, ValueError)):
            space["read_task"](tmp_path / "a.safetensors")


def test_the_page_names_every_field_and_every_limit():
    rows = re.findall(r"^\| (.*?) \| (.*?) \|", PAGE, re.MULTILINE)
    described = {name: allowed for names, allowed in rows for name in re.findall(r"`([\w.]+)`", names)}
    assert make_vit_b_task(0, "deep", 1)[0].to_json().keys() <= described.keys()
    assert {f"prompt.{name}" for name in task_schema.PROMPT_RULES} <= described.keys()
    assert {f"adapters.{name}" for name in task_schema.ADAPTERS_RULES} <= described.keys()
    assert task_schema.PREPROCESSING_RULES.keys() | detector.HEAD_RULES.keys() <= described.keys()
    for name, limit in {
        "num_classes": task_schema.MAX_CLASSES,
        "prompt.num_tokens": task_schema.MAX_TOKENS,
        "prompt.embed_dim": task_schema.MAX_WIDTH,
        "prompt.blocks": task_schema.MAX_BLOCKS,
        "channels": task_schema.MAX_CHANNELS,
        "size": task_schema.MAX_SIDE,
        "note": task_schema.MAX_NOTE,
        "adapters.options": adapters.MAX_NUMBER,
    }.items():
        assert f"{limit:,}" in described[name], name
    assert f'"Text" is at most {task_schema.MAX_TEXT:,} characters' in PAGE
    assert f"above {files.MAX_BYTES // 1024**3} GiB" in PAGE
    assert f"above {files.MAX_HEADER // 1024**2} MiB" in PAGE
    assert all(f"`{key}`" in PAGE for key in conversion._peft_config(make_vit_b_task(0, "deep", 1)[0]))


def make_vit_b_task(num_tokens, kind, num_blocks):
    blocks = list(range(12 - num_blocks, 12)) if kind == "deep" else [0]
    prompt = {"kind": kind, "num_tokens": num_tokens, "embed_dim": 768, "width": 768, "blocks": blocks, "dropout": 0.0}
    metadata = TaskMetadata(
        backbone="vit_base_patch16_224.augreg_in21k",
        fingerprint="0" * 64,
        prompt=prompt if num_tokens else None,
        num_classes=100,
        classes=[f"class {i}" for i in range(100)],
        preprocessing={
            **{"size": [224, 224], "mean": [0.5] * 3, "std": [0.5] * 3},
            **{"interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"},
        },
        metrics={"val": {"top1": 0.9}},
        versions={"vpt": "0.1.0", "torch": "2.15.0", "timm": "1.0.31"},
    )
    tensors = {"head.weight": torch.zeros(100, 768), "head.bias": torch.zeros(100)}
    return metadata, tensors | ({"prompt.tokens": torch.zeros(len(blocks), num_tokens, 768)} if num_tokens else {})


@pytest.mark.parametrize(
    ("title", "num_tokens", "kind", "num_blocks"),
    [
        ("linear probe", 0, "deep", 12),
        ("shallow, P=50", 50, "shallow", 1),
        ("deep, P=10", 10, "deep", 12),
        ("deep, P=10, last 3 blocks", 10, "deep", 3),
        ("deep, P=50", 50, "deep", 12),
    ],
)
def test_the_sizes_on_the_page_are_those_of_files(tmp_path, title, num_tokens, kind, num_blocks):
    cells = re.search(rf"^\| {re.escape(title)} \|(.*)\|$", PAGE, re.MULTILINE)[1].replace(",", "").split("|")
    metadata, tensors = make_vit_b_task(num_tokens, kind, num_blocks)
    prompts, heads, sizes = [], [], []
    for dtype in ("fp32", "fp16"):
        part = to_dtype(tensors, conversion.DTYPES[dtype])
        prompts.append(part["prompt.tokens"].nbytes if num_tokens else 0)
        heads.append(part["head.weight"].nbytes + part["head.bias"].nbytes)
        sizes.append(write_task(tmp_path / f"{dtype}.safetensors", metadata, part).stat().st_size)
    stated = [int(cell) for cell in cells]
    assert stated[:4] == [*prompts, *heads]
    assert stated[4:] == pytest.approx(sizes, abs=100)  # the versions of libraries are longer or shorter


def plain_fingerprint(vit):
    """The rule of the page, in NumPy, without the library and without torch's bfloat16."""
    digest = hashlib.sha256()
    for name in sorted(name for name, _ in vit.named_parameters()):
        if not name.startswith(("pos_embed", "patch_embed.", "head.", "head_dist.")):
            array = vit.get_parameter(name).detach().numpy()
            digest.update(f"{name} {array.shape}\n".encode())
            bits = array.ravel()[:: max(1, array.size // 64)][:64].astype("<f4").view("<u4").astype(np.int64)
            bits += 0x7FFF + (bits >> 16 & 1)  # to nearest even
            digest.update((bits >> 16 << 16).astype("<u4").tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("make", [make_tiny_vit, lambda: make_tiny_vit("cls_and_4_registers"), lambda: load_vit(NANO)])
def test_the_fingerprint_follows_the_rule_of_the_page(make):
    vit = make()
    assert plain_fingerprint(vit) == fingerprint(vit)
